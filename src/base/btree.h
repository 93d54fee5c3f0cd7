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

struct kl_btree_node {
	uint64_t
		key[KL_BTREE_WIDTH + 1]; /* those beyond n are UINT64_MAX; the last is never used */
	void *ptr[KL_BTREE_WIDTH];       /* child, or value */
	uint64_t end[KL_BTREE_WIDTH];
	unsigned n;
} KL_CACHELINE;

struct kl_btree {
	struct kl_btree_node *root;
	unsigned height; /* 0: the root is a leaf */
	unsigned n;      /* entries */
	/* private */
	struct kl_btree_node *arena, *free;
	unsigned used;
};

/* Bytes that kl_btree_init() needs. */
size_t kl_btree_arena_size(void);
/* @arena: zeroed, aligned to a cache line; outlives the tree. */
void kl_btree_init(struct kl_btree *t, void *arena);

/* @key: not in the tree, less than UINT64_MAX. @value: not NULL. */
void kl_btree_insert(struct kl_btree *t, uint64_t key, uint64_t end, void *value);
/* @key is in the tree. Returns its value. */
void *kl_btree_remove(struct kl_btree *t, uint64_t key);

/*
 * Number of keys <= @k, which is less than UINT64_MAX: which of the five cache lines, and how
 * many in that. No branch to guess, and only the second step waits for the first. Written out,
 * and counting the larger keys: each is a comparison and a subtraction of its carry.
 */
KL_INLINE unsigned kl_btree_rank(const uint64_t *key, uint64_t k)
{
	unsigned line = KL_BTREE_WIDTH / 8, n = 8;

	line -= k < key[7];
	line -= k < key[15];
	line -= k < key[23];
	line -= k < key[31];
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

/* The value with the largest key <= @k, or NULL. */
KL_INLINE void *kl_btree_floor(const struct kl_btree *t, uint64_t k)
{
	const struct kl_btree_node *x = t->root;
	unsigned i;

	for (unsigned h = t->height; h; h--) {
		i = kl_btree_rank(x->key, k);
		if (KL_UNLIKELY(!i))
			return NULL;
		x = x->ptr[i - 1];
	}
	i = kl_btree_rank(x->key, k);
	return i ? x->ptr[i - 1] : NULL;
}

/*
 * The value with the smallest key in [@from, @limit) whose end is greater than @start, or NULL;
 * *@key is its key then. To go on: from *@key + 1.
 */
void *kl_btree_overlap(const struct kl_btree *t, uint64_t from, uint64_t limit, uint64_t start,
		       uint64_t *key);
