/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <stdlib.h>

#include "base/failpoint.h"
#include "base/log.h"
#include "mem/attr.h"

#define BITS    9
#define ENTRIES (1u << BITS)
#define WORDS   (ENTRIES / 64)

#define SHARED  0ull
#define PRIVATE 1ull

struct kl_attr_node {
	struct kl_attr_node *next; /* of those retired */
	unsigned level; /* of the entry that it is below: 1 has bits, the others entries */
	_Atomic uint64_t e[];
};

static size_t node_size(unsigned level)
{
	return sizeof(struct kl_attr_node) + (level == 1 ? WORDS : ENTRIES) * sizeof(uint64_t);
}

static bool is_node(uint64_t entry)
{
	return entry > PRIVATE;
}

static struct kl_attr_node *node_of(uint64_t entry)
{
	return (struct kl_attr_node *)(uintptr_t)entry;
}

static uint64_t load(const _Atomic uint64_t *e)
{
	return atomic_load_explicit(e, memory_order_acquire);
}

/* Frames that an entry of @level stands for. */
static uint64_t span(unsigned level)
{
	return 1ull << (BITS * level);
}

static unsigned index_of(kl_gfn_t gfn, unsigned level)
{
	return gfn >> (BITS * level) & (ENTRIES - 1);
}

/* ---- reading ------------------------------------------------------------------------------- */

bool kl_attr_private(const struct kl_attrs *a, kl_gfn_t gfn, unsigned *level)
{
	uint64_t entry = load(&a->root);
	unsigned l = KL_ATTR_LEVELS;

	for (; is_node(entry); l--) {
		const struct kl_attr_node *x = node_of(entry);

		if (l == 1) {
			unsigned bit = index_of(gfn, 0);

			entry = load(&x->e[bit / 64]) >> (bit % 64) & 1;
		} else {
			entry = load(&x->e[index_of(gfn, l - 1)]);
		}
	}
	*level = l;
	return entry;
}

bool kl_attr_uniform(const struct kl_attrs *a, kl_gfn_t first, kl_gfn_t last, bool private)
{
	while (first < last) {
		unsigned level;

		if (kl_attr_private(a, first, &level) != private)
			return false;
		first = (first | (span(level) - 1)) + 1;
	}
	return true;
}

static uint64_t memory_below(uint64_t entry, unsigned level)
{
	uint64_t sum = 0;

	if (!is_node(entry))
		return 0;
	for (unsigned i = 0; level > 1 && i < ENTRIES; i++)
		sum += memory_below(load(&node_of(entry)->e[i]), level - 1);
	return sum + node_size(level);
}

uint64_t kl_attr_memory(const struct kl_attrs *a)
{
	return memory_below(load(&a->root), KL_ATTR_LEVELS);
}

/* ---- changing ------------------------------------------------------------------------------ */

/* What an entry of @level at @base has of [first, last), relative to it. */
struct part {
	uint64_t first, last;
	bool none, all;
};

static struct part part_of(kl_gfn_t base, unsigned level, kl_gfn_t first, kl_gfn_t last)
{
	kl_gfn_t end = base + span(level);
	struct part p = {.none = first >= end || last <= base};

	p.first = kl_max(first, base) - base;
	p.last = kl_min(last, end) - base;
	p.all = !p.none && p.first == 0 && p.last == span(level);
	return p;
}

/* The same frames as before, as a node. */
static int split(_Atomic uint64_t *e, unsigned level)
{
	uint64_t uniform = atomic_load_explicit(e, memory_order_relaxed);
	unsigned n = level == 1 ? WORDS : ENTRIES;
	struct kl_attr_node *x = kl_failpoint("attr-node") ? NULL : malloc(node_size(level));

	if (!x)
		return -ENOMEM;
	x->level = level;
	for (unsigned i = 0; i < n; i++)
		atomic_init(&x->e[i], level == 1 && uniform ? ~0ull : uniform);
	atomic_store_explicit(e, (uint64_t)(uintptr_t)x, memory_order_release);
	return 0;
}

/* Only the two edges of a range lie in entries that it covers in part. */
static int prepare(_Atomic uint64_t *e, unsigned level, kl_gfn_t base, kl_gfn_t first,
		   kl_gfn_t last, uint64_t value)
{
	struct part p = part_of(base, level, first, last);
	struct kl_attr_node *x;
	unsigned edge[2];
	int r;

	if (p.none || p.all || load(e) == value)
		return 0;
	if (!is_node(load(e)) && (r = split(e, level)))
		return r;
	if (level == 1)
		return 0;
	x = node_of(load(e));
	edge[0] = index_of(p.first, level - 1);
	edge[1] = index_of(p.last - 1, level - 1);
	for (unsigned i = 0; i < 1u + (edge[0] != edge[1]); i++) {
		r = prepare(&x->e[edge[i]], level - 1, base + edge[i] * span(level - 1), first,
			    last, value);
		if (r)
			return r;
	}
	return 0;
}

static void retire(struct kl_attrs *a, uint64_t entry)
{
	struct kl_attr_node *x = node_of(entry);

	x->next = a->retired;
	a->retired = x;
}

static void set_bits(struct kl_attr_node *x, unsigned first, unsigned last, bool private)
{
	for (unsigned i = 0; i < WORDS; i++) {
		unsigned lo = kl_max(first, i * 64), hi = kl_min(last, i * 64 + 64);
		uint64_t word = atomic_load_explicit(&x->e[i], memory_order_relaxed), mask;

		if (lo >= hi)
			continue;
		mask = (hi - lo == 64 ? ~0ull : (1ull << (hi - lo)) - 1) << (lo % 64);
		atomic_store_explicit(&x->e[i], private ? word | mask : word & ~mask,
				      memory_order_release);
	}
}

/* All of a node as one value, if it is. */
static bool uniform(const struct kl_attr_node *x, uint64_t *value)
{
	unsigned n = x->level == 1 ? WORDS : ENTRIES;
	uint64_t v = atomic_load_explicit(&x->e[0], memory_order_relaxed);

	if (x->level == 1 ? v && ~v : is_node(v))
		return false;
	for (unsigned i = 1; i < n; i++)
		if (atomic_load_explicit(&x->e[i], memory_order_relaxed) != v)
			return false;
	*value = v ? PRIVATE : SHARED;
	return true;
}

static void set(struct kl_attrs *a, _Atomic uint64_t *e, unsigned level, kl_gfn_t base,
		kl_gfn_t first, kl_gfn_t last, bool private)
{
	struct part p = part_of(base, level, first, last);
	uint64_t was = load(e), value = private ? PRIVATE : SHARED;
	struct kl_attr_node *x;

	if (p.none || was == value)
		return;
	if (p.all) {
		atomic_store_explicit(e, value, memory_order_release);
		if (is_node(was))
			retire(a, was);
		return;
	}
	x = node_of(was); /* prepared */
	if (level == 1) {
		set_bits(x, (unsigned)p.first, (unsigned)p.last, private);
	} else {
		unsigned i = index_of(p.first, level - 1), end = index_of(p.last - 1, level - 1);

		for (; i <= end; i++)
			set(a, &x->e[i], level - 1, base + i * span(level - 1), first, last,
			    private);
	}
	if (uniform(x, &value)) {
		atomic_store_explicit(e, value, memory_order_release);
		retire(a, was);
	}
}

int kl_attr_prepare(struct kl_attrs *a, kl_gfn_t first, kl_gfn_t last, bool private)
{
	/* What was split before a failure says what it said before. */
	return prepare(&a->root, KL_ATTR_LEVELS, 0, first, last, private ? PRIVATE : SHARED);
}

bool kl_attr_set(struct kl_attrs *a, kl_gfn_t first, kl_gfn_t last, bool private)
{
	set(a, &a->root, KL_ATTR_LEVELS, 0, first, last, private);
	return a->retired;
}

static void free_node(struct kl_attr_node *x)
{
	for (unsigned i = 0; x->level > 1 && i < ENTRIES; i++) {
		uint64_t entry = atomic_load_explicit(&x->e[i], memory_order_relaxed);

		if (is_node(entry))
			free_node(node_of(entry));
	}
	free(x);
}

void kl_attr_reclaim(struct kl_attrs *a)
{
	struct kl_attr_node *x;

	while ((x = a->retired)) {
		a->retired = x->next;
		free_node(x);
	}
}

void kl_attr_destroy(struct kl_attrs *a)
{
	uint64_t root = load(&a->root);

	kl_attr_reclaim(a);
	if (is_node(root))
		free_node(node_of(root));
	atomic_store_explicit(&a->root, SHARED, memory_order_relaxed);
}
