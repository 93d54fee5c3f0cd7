/* SPDX-License-Identifier: MIT */
/*
 * An ordered index of intervals: entries (key, end, value) with unique keys, found by the
 * largest key <= k and by overlap, in a B+tree whose inner entries also know the largest end
 * below them.
 *
 * Guarantees
 *   (a) finding and changing cost O(log n); walking over overlaps O(log n) for each.
 *   (b) nodes come from one mapping made at birth, which holds KL_BTREE_MAX entries however
 *       they are distributed: no change can fail. The kernel provides what is touched.
 *   (c) no locks: readers and a writer of one tree exclude each other by the caller's means.
 *
 * What an end means is the caller's business; it only has to be comparable to the @start
 * that overlaps are asked for.
 */
#pragma once

#include "base/compiler.h"

#define KL_BTREE_MAX 32768 /* entries */

/* With one that is never used, whole cache lines of keys. */
#define KL_BTREE_WIDTH 39
#define KL_BTREE_LINES ((KL_BTREE_WIDTH + 1) / 8)
/* Greater than every key, also for signed comparisons, which is all that AVX2 has. */
#define KL_BTREE_NO_KEY ((uint64_t)INT64_MAX)

struct kl_btree_node {
	uint64_t last[KL_BTREE_LINES - 1]; /* the last key of each cache line of keys but one */
	unsigned n;
	uint64_t key[KL_BTREE_WIDTH + 1] KL_CACHELINE; /* beyond n, and the last: NO_KEY */
	void *ptr[KL_BTREE_WIDTH];                     /* child, or value */
	uint64_t end[KL_BTREE_WIDTH];
} KL_CACHELINE;

struct kl_btree {
	struct kl_btree_node *root;
	unsigned height; /* 0: the root is a leaf */
	unsigned n;      /* entries */
	bool avx2;       /* the processor has it */
	/* private */
	struct kl_btree_node *arena, *free;
	unsigned used;
};

/* Bytes that kl_btree_init() needs. */
size_t kl_btree_arena_size(void);
/* @arena: zeroed, aligned to a cache line; outlives the tree. */
void kl_btree_init(struct kl_btree *t, void *arena);

/* @key: not in the tree, less than KL_BTREE_NO_KEY. @value: not NULL. */
void kl_btree_insert(struct kl_btree *t, uint64_t key, uint64_t end, void *value);
/* @key is in the tree. Returns its value. */
void *kl_btree_remove(struct kl_btree *t, uint64_t key);

/*
 * Number of keys <= @k, which is less than KL_BTREE_NO_KEY: which of the cache lines, and how many
 * in that. No branch to guess, and only the second step waits for the first. Written out, and
 * counting the larger keys: each is a comparison and a subtraction of its carry.
 */
KL_INLINE unsigned kl_btree_rank(const struct kl_btree_node *x, uint64_t k)
{
	unsigned line = KL_BTREE_LINES - 1, n = 8;
	const uint64_t *key = x->key;

	line -= k < x->last[0];
	line -= k < x->last[1];
	line -= k < x->last[2];
	line -= k < x->last[3];
	key += 8 * line;
	n -= k < key[0];
	n -= k < key[1];
	n -= k < key[2];
	n -= k < key[3];
	n -= k < key[4];
	n -= k < key[5];
	n -= k < key[6];
	n -= k < key[7];
	return 8 * line + n;
}

/* The same with three comparisons of four keys: half the time of a lookup among many. */
void *kl_btree_floor_avx2(const struct kl_btree *t, uint64_t k);

/* The value with the largest key <= @k, or NULL. */
KL_INLINE void *kl_btree_floor(const struct kl_btree *t, uint64_t k)
{
	const struct kl_btree_node *x = t->root;
	unsigned i;

	if (KL_LIKELY(t->avx2))
		return kl_btree_floor_avx2(t, k);
	for (unsigned h = t->height; h; h--) {
		i = kl_btree_rank(x, k);
		if (KL_UNLIKELY(!i))
			return NULL;
		x = x->ptr[i - 1];
	}
	i = kl_btree_rank(x, k);
	return i ? x->ptr[i - 1] : NULL;
}

/*
 * The value with the smallest key in [@from, @limit) whose end is greater than @start, or NULL;
 * *@key is its key then. To go on: from *@key + 1.
 */
void *kl_btree_overlap(const struct kl_btree *t, uint64_t from, uint64_t limit, uint64_t start,
		       uint64_t *key);
