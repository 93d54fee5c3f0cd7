/* SPDX-License-Identifier: MIT */
/* The ordered index against a sorted array, and its bound on nodes under hostile orders. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "base/btree.h"

#define N 3000

struct entry {
	uint64_t key, end;
};

struct model {
	struct kl_btree t;
	void *arena;
	unsigned n;
	struct entry e[N]; /* sorted */
	uint64_t seed;
};

static uint64_t rnd(struct model *m)
{
	m->seed = m->seed * 6364136223846793005ull + 1442695040888963407ull;
	return m->seed >> 33;
}

static unsigned position(const struct model *m, uint64_t key)
{
	unsigned i = 0;

	while (i < m->n && m->e[i].key < key)
		i++;
	return i;
}

static void insert(struct model *m, uint64_t key, uint64_t end)
{
	unsigned i = position(m, key);

	memmove(m->e + i + 1, m->e + i, (m->n - i) * sizeof(m->e[0]));
	m->e[i] = (struct entry){key, end};
	m->n++;
	kl_btree_insert(&m->t, key, end, (void *)(key + 1));
}

static void drop(struct model *m, unsigned i)
{
	assert_ptr_equal(kl_btree_remove(&m->t, m->e[i].key), (void *)(m->e[i].key + 1));
	memmove(m->e + i, m->e + i + 1, (m->n - i - 1) * sizeof(m->e[0]));
	m->n--;
}

static unsigned check_node(const struct kl_btree_node *x, unsigned height, unsigned *leaves)
{
	unsigned n = 0;

	for (unsigned i = 0; i < x->n; i++) {
		assert_true(i == 0 || x->key[i - 1] < x->key[i]);
		if (height) {
			const struct kl_btree_node *c = x->ptr[i];
			uint64_t end = 0;

			assert_int_equal(x->key[i], c->key[0]);
			for (unsigned j = 0; j < c->n; j++)
				end = kl_max(end, c->end[j]);
			assert_int_equal(x->end[i], end);
			assert_true(c->n > 0);
			n += check_node(c, height - 1, leaves);
		}
	}
	for (unsigned i = x->n; i <= KL_BTREE_WIDTH; i++)
		assert_true(x->key[i] == KL_BTREE_NO_KEY);
	for (unsigned i = 0; i < KL_BTREE_LINES - 1; i++)
		assert_true(x->last[i] == x->key[8 * i + 7]);
	if (!height) {
		(*leaves)++;
		n = x->n;
	}
	return n;
}

static void compare(struct model *m)
{
	uint64_t k = rnd(m) % 20000, from = rnd(m) % 20000, limit = from + rnd(m) % 4000;
	uint64_t start = rnd(m) % 20000, found;
	unsigned i = position(m, k + 1), leaves = 0;
	bool avx2 = m->t.avx2;
	void *v;

	assert_ptr_equal(kl_btree_floor(&m->t, k), i ? (void *)(m->e[i - 1].key + 1) : NULL);
	m->t.avx2 = false;
	assert_ptr_equal(kl_btree_floor(&m->t, k), i ? (void *)(m->e[i - 1].key + 1) : NULL);
	m->t.avx2 = avx2;
	for (i = position(m, from); i < m->n && m->e[i].key < limit; i++) {
		if (m->e[i].end <= start)
			continue;
		v = kl_btree_overlap(&m->t, from, limit, start, &found);
		assert_ptr_equal(v, (void *)(m->e[i].key + 1));
		assert_int_equal(found, m->e[i].key);
		from = found + 1;
	}
	assert_null(kl_btree_overlap(&m->t, from, limit, start, &found));
	assert_int_equal(check_node(m->t.root, m->t.height, &leaves), m->n);
	assert_int_equal(m->t.n, m->n);
}

static int setup(void **state)
{
	struct model *m = calloc(1, sizeof(*m));

	m->arena = aligned_alloc(_Alignof(struct kl_btree_node), kl_btree_arena_size());
	memset(m->arena, 0, kl_btree_arena_size());
	m->seed = 1;
	kl_btree_init(&m->t, m->arena);
	*state = m;
	return 0;
}

static int teardown(void **state)
{
	struct model *m = *state;

	free(m->arena);
	free(m);
	return 0;
}

/* S1: floor and overlaps are those of a sorted array, while the tree grows and shrinks. */
static void random_changes(void **state)
{
	struct model *m = *state;

	for (unsigned step = 0; step < 20000; step++) {
		bool grow = (step / 4000) % 2 == 0;

		if (m->n && (m->n == N || rnd(m) % 4 < (grow ? 1u : 3u))) {
			drop(m, (unsigned)(rnd(m) % m->n));
		} else {
			uint64_t key = rnd(m) % 16000;
			unsigned i = position(m, key);

			if (i == m->n || m->e[i].key != key)
				insert(m, key, key + rnd(m) % 500);
		}
		if (step % 16 == 0)
			compare(m);
	}
	while (m->n)
		drop(m, m->n - 1);
	compare(m);
}

/* Fill it to the brim, thin it out so that nodes are as empty as they get, fill it again. */
static void hostile_orders(void **state)
{
	struct model *m = *state;
	struct kl_btree *t = &m->t;
	const uint64_t top = KL_BTREE_NO_KEY - 1;

	for (unsigned round = 0; round < 12; round++) {
		unsigned keep = 2 + round * 3, leaves = 0, n = 0;

		for (uint64_t k = 0; t->n < KL_BTREE_MAX; k++)
			kl_btree_insert(t, round % 2 ? top - k : k, 0, t);
		for (uint64_t k = 0; k < KL_BTREE_MAX; k++)
			if (k % keep)
				kl_btree_remove(t, round % 2 ? top - k : k);
		for (uint64_t k = 0; k < KL_BTREE_MAX; k += keep)
			for (unsigned j = 1; j < keep && t->n < KL_BTREE_MAX; j++)
				kl_btree_insert(t, (round % 2 ? top - k : k) ^ ((uint64_t)j << 32),
						0, t);
		n = check_node(t->root, t->height, &leaves);
		assert_int_equal(n, t->n);
		assert_true(leaves * 12 <= KL_BTREE_MAX + 12);
		kl_btree_init(t, memset(m->arena, 0, kl_btree_arena_size()));
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(random_changes, setup, teardown),
		cmocka_unit_test_setup_teardown(hostile_orders, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
