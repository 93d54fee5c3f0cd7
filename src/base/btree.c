/* SPDX-License-Identifier: MIT */
/*
 * Invariants
 *   - key[i] of an inner node is the smallest key below ptr[i], end[i] the largest end.
 *   - last[i] of a node is key[8 * i + 7].
 *   - no node but an empty tree's root is empty.
 *   - two neighbours below one parent have more than MERGE entries together. So there is a leaf
 *     for every twelve entries at most, whatever the order of changes, and the arena is large
 *     enough.
 */
#include <immintrin.h>
#include <string.h>

#include "base/btree.h"
#include "base/log.h"

#define WIDTH      KL_BTREE_WIDTH
#define MERGE      29
#define MAX_HEIGHT 8
#define MAX_LEAVES (KL_BTREE_MAX / 12 + 1)
#define MAX_NODES  (MAX_LEAVES + MAX_LEAVES / 8 + MAX_HEIGHT)

size_t kl_btree_arena_size(void)
{
	return MAX_NODES * sizeof(struct kl_btree_node);
}

static void set_key(struct kl_btree_node *x, unsigned i, uint64_t key)
{
	x->key[i] = key;
	if (i % 8 == 7 && i / 8 < KL_BTREE_LINES - 1)
		x->last[i / 8] = key;
}

/* Keys have moved. */
static void set_last(struct kl_btree_node *x)
{
	for (unsigned i = 0; i < KL_BTREE_LINES - 1; i++)
		x->last[i] = x->key[8 * i + 7];
}

static void no_keys(struct kl_btree_node *x, unsigned from, unsigned to)
{
	for (; from < to; from++)
		x->key[from] = KL_BTREE_NO_KEY;
}

static struct kl_btree_node *new_node(struct kl_btree *t)
{
	struct kl_btree_node *x = t->free;

	if (x) {
		t->free = x->ptr[0];
	} else {
		KL_ASSERT(t->used < MAX_NODES);
		x = &t->arena[t->used++];
	}
	no_keys(x, 0, WIDTH + 1);
	set_last(x);
	x->n = 0;
	return x;
}

static void free_node(struct kl_btree *t, struct kl_btree_node *x)
{
	x->ptr[0] = t->free;
	t->free = x;
}

void kl_btree_init(struct kl_btree *t, void *arena)
{
	__builtin_cpu_init();
	*t = (struct kl_btree){.arena = arena, .avx2 = __builtin_cpu_supports("avx2")};
	t->root = new_node(t);
}

static uint64_t max_end(const struct kl_btree_node *x)
{
	uint64_t m = 0;

	for (unsigned i = 0; i < x->n; i++)
		m = kl_max(m, x->end[i]);
	return m;
}

static void put(struct kl_btree_node *x, unsigned i, uint64_t key, uint64_t end, void *ptr)
{
	unsigned tail = x->n - i;

	memmove(x->key + i + 1, x->key + i, tail * sizeof(x->key[0]));
	memmove(x->end + i + 1, x->end + i, tail * sizeof(x->end[0]));
	memmove(x->ptr + i + 1, x->ptr + i, tail * sizeof(x->ptr[0]));
	x->key[i] = key;
	x->end[i] = end;
	x->ptr[i] = ptr;
	x->n++;
	set_last(x);
}

static void take(struct kl_btree_node *x, unsigned i)
{
	unsigned tail = --x->n - i;

	memmove(x->key + i, x->key + i + 1, tail * sizeof(x->key[0]));
	memmove(x->end + i, x->end + i + 1, tail * sizeof(x->end[0]));
	memmove(x->ptr + i, x->ptr + i + 1, tail * sizeof(x->ptr[0]));
	x->key[x->n] = KL_BTREE_NO_KEY;
	set_last(x);
}

/* The entries of @from behind the first @keep to the end of @to. */
static void move_tail(struct kl_btree_node *to, struct kl_btree_node *from, unsigned keep)
{
	unsigned n = from->n - keep;

	memcpy(to->key + to->n, from->key + keep, n * sizeof(to->key[0]));
	memcpy(to->end + to->n, from->end + keep, n * sizeof(to->end[0]));
	memcpy(to->ptr + to->n, from->ptr + keep, n * sizeof(to->ptr[0]));
	no_keys(from, keep, from->n);
	to->n += n;
	from->n = keep;
	set_last(to);
	set_last(from);
}

/*
 * Returns a new right neighbour of @x if @x had to be split. At the very end the left half
 * stays full: slots are often created in ascending order.
 */
static struct kl_btree_node *insert_at(struct kl_btree *t, struct kl_btree_node *x, unsigned i,
				       uint64_t key, uint64_t end, void *ptr)
{
	struct kl_btree_node *right;

	if (x->n < WIDTH) {
		put(x, i, key, end, ptr);
		return NULL;
	}
	right = new_node(t);
	move_tail(right, x, i == WIDTH ? WIDTH : WIDTH / 2);
	if (i <= x->n && i != WIDTH)
		put(x, i, key, end, ptr);
	else
		put(right, i - x->n, key, end, ptr);
	return right;
}

static struct kl_btree_node *insert(struct kl_btree *t, struct kl_btree_node *x, unsigned height,
				    uint64_t key, uint64_t end, void *value)
{
	unsigned i = kl_btree_rank(x, key);
	struct kl_btree_node *child, *right;

	if (!height)
		return insert_at(t, x, i, key, end, value);
	if (i)
		i--;
	else
		set_key(x, 0, key);
	child = x->ptr[i];
	right = insert(t, child, height - 1, key, end, value);
	x->end[i] = max_end(child);
	return right ? insert_at(t, x, i + 1, right->key[0], max_end(right), right) : NULL;
}

void kl_btree_insert(struct kl_btree *t, uint64_t key, uint64_t end, void *value)
{
	struct kl_btree_node *right = insert(t, t->root, t->height, key, end, value);

	KL_ASSERT(t->n < KL_BTREE_MAX && key < KL_BTREE_NO_KEY);
	t->n++;
	if (right) {
		struct kl_btree_node *root = new_node(t);

		put(root, 0, t->root->key[0], max_end(t->root), t->root);
		put(root, 1, right->key[0], max_end(right), right);
		t->root = root;
		t->height++;
	}
}

/* Children @i and @i + 1 of @x become one, if they are small enough. */
static void try_merge(struct kl_btree *t, struct kl_btree_node *x, unsigned i)
{
	struct kl_btree_node *left, *right;

	if (i + 1 >= x->n)
		return;
	left = x->ptr[i];
	right = x->ptr[i + 1];
	if (left->n + right->n > MERGE)
		return;
	move_tail(left, right, 0);
	x->end[i] = kl_max(x->end[i], x->end[i + 1]);
	take(x, i + 1);
	free_node(t, right);
}

static void *remove_from(struct kl_btree *t, struct kl_btree_node *x, unsigned height, uint64_t key)
{
	unsigned i = kl_btree_rank(x, key) - 1;
	struct kl_btree_node *child;
	void *value;

	KL_ASSERT(i < x->n);
	if (!height) {
		KL_ASSERT(x->key[i] == key);
		value = x->ptr[i];
		take(x, i);
		return value;
	}
	child = x->ptr[i];
	value = remove_from(t, child, height - 1, key);
	if (child->n) {
		set_key(x, i, child->key[0]);
		x->end[i] = max_end(child);
		try_merge(t, x, i);
	} else {
		take(x, i);
		free_node(t, child);
	}
	if (i)
		try_merge(t, x, i - 1);
	return value;
}

void *kl_btree_remove(struct kl_btree *t, uint64_t key)
{
	void *value = remove_from(t, t->root, t->height, key);

	t->n--;
	if (!t->root->n)
		t->height = 0;
	while (t->height && t->root->n == 1) {
		struct kl_btree_node *old = t->root;

		t->root = old->ptr[0];
		t->height--;
		free_node(t, old);
	}
	return value;
}

static void *overlap(const struct kl_btree_node *x, unsigned height, uint64_t from, uint64_t limit,
		     uint64_t start, uint64_t *key)
{
	unsigned i = kl_btree_rank(x, from);

	/* The entry at or before @from: an inner one may hold later keys, a leaf's only itself. */
	if (i && (height || x->key[i - 1] == from))
		i--;
	for (; i < x->n && x->key[i] < limit; i++) {
		void *value;

		if (x->end[i] <= start)
			continue;
		if (!height) {
			*key = x->key[i];
			return x->ptr[i];
		}
		value = overlap(x->ptr[i], height - 1, from, limit, start, key);
		if (value)
			return value;
	}
	return NULL;
}

void *kl_btree_overlap(const struct kl_btree *t, uint64_t from, uint64_t limit, uint64_t start,
		       uint64_t *key)
{
	return overlap(t->root, t->height, from, limit, start, key);
}

/* ---- finding, with AVX2 ---------------------------------------------------------------- */

#define AVX2 __attribute__((target("avx2,popcnt")))

/* How many of four keys are larger. */
AVX2 KL_INLINE unsigned larger(const uint64_t *key, __m256i k)
{
	__m256i x = _mm256_cmpgt_epi64(_mm256_load_si256((const __m256i *)(const void *)key), k);

	return (unsigned)__builtin_popcount((unsigned)_mm256_movemask_pd(_mm256_castsi256_pd(x)));
}

AVX2 KL_INLINE unsigned rank_avx2(const struct kl_btree_node *x, __m256i k)
{
	unsigned line = KL_BTREE_LINES - 1 - larger(x->last, k);
	const uint64_t *key = x->key + 8 * line;

	return 8 * line + 8 - larger(key, k) - larger(key + 4, k);
}

AVX2 void *kl_btree_floor_avx2(const struct kl_btree *t, uint64_t k)
{
	const struct kl_btree_node *x = t->root;
	__m256i wide = _mm256_set1_epi64x((long long)k);
	unsigned i;

	for (unsigned h = t->height; h; h--) {
		i = rank_avx2(x, wide);
		if (KL_UNLIKELY(!i))
			return NULL;
		x = x->ptr[i - 1];
	}
	i = rank_avx2(x, wide);
	return i ? x->ptr[i - 1] : NULL;
}
