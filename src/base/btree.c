/* SPDX-License-Identifier: MIT */
/*
 * Invariants
 *   - key[i] of an inner node is the smallest key below ptr[i], end[i] the largest end.
 *   - no node but an empty tree's root is empty.
 *   - two neighbours below one parent have more than MERGE entries together. So there is a leaf
 *     for every twelve entries at most, whatever the order of changes, and the arena is large
 *     enough.
 */
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

static struct kl_btree_node *new_node(struct kl_btree *t)
{
	struct kl_btree_node *x = t->free;

	if (x) {
		t->free = x->ptr[0];
	} else {
		KL_ASSERT(t->used < MAX_NODES);
		x = &t->arena[t->used++];
	}
	memset(x->key, 0xff, sizeof(x->key));
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
	*t = (struct kl_btree){.arena = arena};
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
}

static void take(struct kl_btree_node *x, unsigned i)
{
	unsigned tail = --x->n - i;

	memmove(x->key + i, x->key + i + 1, tail * sizeof(x->key[0]));
	memmove(x->end + i, x->end + i + 1, tail * sizeof(x->end[0]));
	memmove(x->ptr + i, x->ptr + i + 1, tail * sizeof(x->ptr[0]));
	x->key[x->n] = UINT64_MAX;
}

/* The entries of @from behind the first @keep to the end of @to. */
static void move_tail(struct kl_btree_node *to, struct kl_btree_node *from, unsigned keep)
{
	unsigned n = from->n - keep;

	memcpy(to->key + to->n, from->key + keep, n * sizeof(to->key[0]));
	memcpy(to->end + to->n, from->end + keep, n * sizeof(to->end[0]));
	memcpy(to->ptr + to->n, from->ptr + keep, n * sizeof(to->ptr[0]));
	memset(from->key + keep, 0xff, n * sizeof(from->key[0]));
	to->n += n;
	from->n = keep;
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
	unsigned i = kl_btree_rank(x->key, key);
	struct kl_btree_node *child, *right;

	if (!height)
		return insert_at(t, x, i, key, end, value);
	if (i)
		i--;
	else
		x->key[0] = key;
	child = x->ptr[i];
	right = insert(t, child, height - 1, key, end, value);
	x->end[i] = max_end(child);
	return right ? insert_at(t, x, i + 1, right->key[0], max_end(right), right) : NULL;
}

void kl_btree_insert(struct kl_btree *t, uint64_t key, uint64_t end, void *value)
{
	struct kl_btree_node *right = insert(t, t->root, t->height, key, end, value);

	KL_ASSERT(t->n < KL_BTREE_MAX);
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
	unsigned i = kl_btree_rank(x->key, key) - 1;
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
		x->key[i] = child->key[0];
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
	unsigned i = kl_btree_rank(x->key, from);

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
