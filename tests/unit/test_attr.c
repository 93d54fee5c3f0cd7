/* SPDX-License-Identifier: MIT */
/* The tree of memory attributes (mem/attr.h), beside a plain array (F5). */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "base/failpoint.h"
#include "mem/attr.h"

#define N (3u << 18) /* 3 GiB of frames: some levels of the tree */

struct model {
	struct kl_attrs a;
	uint64_t rnd;
	uint8_t private[N];
};

static int setup(void **state)
{
	struct model *m = calloc(1, sizeof(*m));

	m->rnd = 88172645463325252ull;
	*state = m;
	return 0;
}

static int teardown(void **state)
{
	struct model *m = *state;

	kl_attr_destroy(&m->a);
	free(m);
	return 0;
}

static uint64_t rnd(struct model *m)
{
	m->rnd ^= m->rnd << 13;
	m->rnd ^= m->rnd >> 7;
	m->rnd ^= m->rnd << 17;
	return m->rnd;
}

static void change(struct model *m, kl_gfn_t base, uint64_t first, uint64_t last, bool private)
{
	assert_int_equal(kl_attr_prepare(&m->a, base + first, base + last, private), 0);
	if (kl_attr_set(&m->a, base + first, base + last, private))
		kl_attr_reclaim(&m->a);
	memset(m->private + first, private, last - first);
}

/* Of one frame: its value, and that what is called uniform around it is. */
static void check(struct model *m, kl_gfn_t base, uint64_t i)
{
	unsigned level;
	bool p = kl_attr_private(&m->a, base + i, &level);

	assert_int_equal(p, m->private[i]);
	if (level > 0 && level < 3) {
		uint64_t span = 1ull << (9 * level), start = i & ~(span - 1);

		assert_int_equal(m->private[start], p);
		for (unsigned n = 0; n < 100; n++) {
			uint64_t k = start + rnd(m) % span;

			assert_true(k >= N || m->private[k] == p);
		}
	}
}

static void edge(struct model *m, uint64_t *x)
{
	static const uint64_t unit[] = {1, 1, 64, 512, 512, 1ull << 18};

	*x = rnd(m) % (N + 1);
	*x -= *x % unit[rnd(m) % 6];
}

/* F5: values are those of an array, also far up, where a frame number has 52 bits. */
static void random_changes(void **state)
{
	static const kl_gfn_t bases[] = {0, 1ull << 36, (1ull << 52) - (1ull << 20)};
	struct model *m = *state;

	for (unsigned b = 0; b < 3; b++) {
		memset(m->private, 0, N);
		for (unsigned step = 0; step < 3000; step++) {
			uint64_t x, y;

			edge(m, &x);
			edge(m, &y);
			if (step % 3)
				y = x + 1 + rnd(m) % 700;
			if (x > y) {
				uint64_t t = x;

				x = y;
				y = t;
			}
			y = y > N ? N : y;
			if (x == y)
				continue;
			change(m, bases[b], x, y, rnd(m) & 1);
			check(m, bases[b], x);
			check(m, bases[b], y - 1);
			if (x)
				check(m, bases[b], x - 1);
			if (y < N)
				check(m, bases[b], y);
			for (unsigned k = 0; k < 10; k++)
				check(m, bases[b], rnd(m) % N);
			assert_true(
				kl_attr_uniform(&m->a, bases[b] + x, bases[b] + y, m->private[x]));
			assert_false(
				kl_attr_uniform(&m->a, bases[b] + x, bases[b] + y, !m->private[x]));
		}
		for (uint64_t i = 0; i < N; i += 61)
			check(m, bases[b], i);
		change(m, bases[b], 0, N, false);
		/* Everything that became uniform is one entry again. */
		assert_int_equal(kl_attr_memory(&m->a), 0);
	}
}

/* F5: memory is paid for edges: a petabyte costs what a page costs. */
static void memory_by_change(void **state)
{
	struct model *m = *state;
	uint64_t page, huge;
	unsigned level;

	assert_int_equal(kl_attr_prepare(&m->a, 5, 6, true), 0);
	kl_attr_set(&m->a, 5, 6, true);
	page = kl_attr_memory(&m->a);
	assert_true(page < 6 * 4200);
	assert_int_equal(kl_attr_prepare(&m->a, 3, (1ull << 52) - 3, true), 0);
	if (kl_attr_set(&m->a, 3, (1ull << 52) - 3, true))
		kl_attr_reclaim(&m->a);
	huge = kl_attr_memory(&m->a);
	assert_true(huge < 3 * page);
	assert_true(kl_attr_private(&m->a, 1ull << 51, &level));
	assert_true(level >= 4);
	assert_false(kl_attr_private(&m->a, 2, &level));
	assert_int_equal(level, 0);
	/* Every second page of 2 MiB: bits, not entries. */
	for (unsigned i = 0; i < 512; i += 2) {
		assert_int_equal(kl_attr_prepare(&m->a, i, i + 1, false), 0);
		if (kl_attr_set(&m->a, i, i + 1, false))
			kl_attr_reclaim(&m->a);
	}
	assert_true(kl_attr_memory(&m->a) <= huge + 128);
}

/* F5: a change that there is no memory for changes nothing, and can be made later. */
static void failed_change(void **state)
{
	struct model *m = *state;
	unsigned level;

	if (!kl_failpoints_enabled())
		skip();
	change(m, 0, 600, 1000, true);
	for (unsigned nth = 1;; nth++) {
		int r;

		kl_failpoint_arm("attr-node", nth);
		r = kl_attr_prepare(&m->a, 700, 300000, false);
		if (!kl_failpoint_disarm("attr-node"))
			break;
		assert_int_equal(r, -ENOMEM);
		for (unsigned i = 0; i < 1100; i++)
			assert_int_equal(kl_attr_private(&m->a, i, &level), m->private[i]);
	}
	change(m, 0, 700, 300000, false);
	for (unsigned i = 0; i < 1100; i++)
		assert_int_equal(kl_attr_private(&m->a, i, &level), m->private[i]);
}

/* F5: a node whose first entry alone differs is no single value; neither is one whose last does. */
static void all_but_one(void **state)
{
	static const struct {
		uint64_t unit, n;
	} levels[] = {{64, 8}, {512, 512}};
	struct model *m = *state;

	for (unsigned i = 0; i < 4; i++) {
		uint64_t unit = levels[i / 2].unit, all = unit * levels[i / 2].n;
		bool first = i & 1;
		unsigned level;

		change(m, 0, 0, 2 * all, false);
		change(m, 0, first ? unit : 0, first ? all : all - unit, true);
		for (uint64_t k = 0; k < all; k += unit / 2)
			assert_int_equal(kl_attr_private(&m->a, k, &level), m->private[k]);
		assert_false(kl_attr_uniform(&m->a, 0, all, true));
		assert_false(kl_attr_uniform(&m->a, 0, all, false));
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(random_changes, setup, teardown),
		cmocka_unit_test_setup_teardown(memory_by_change, setup, teardown),
		cmocka_unit_test_setup_teardown(failed_change, setup, teardown),
		cmocka_unit_test_setup_teardown(all_but_one, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
