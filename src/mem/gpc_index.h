/* SPDX-License-Identifier: MIT */
/*
 * The index of a VM's caches by host address, for notifiers (G5, G15).
 *
 * Two trees with the same contents outside of a change, as with memslots: a change edits the hidden
 * one, publishes it, waits for readers of the other, and repeats the edit there. So a bracket looks
 * without a lock, and a miss among n caches costs O(log n).
 *
 * The order of a change and of a bracket is the filter's handshake (N4): PAIR(gpc-index) cache:
 * enter the address; later, before it becomes valid: is a bracket over it in flight? bracket:
 * publish the range; look into the index At least one sees the other. An address that entered after
 * a bracket had looked is found when the bracket looks again at its end.
 *
 * Caches on one host page are a list; the tree has a key for each page.
 */
#pragma once

#include "base/bias.h"
#include "base/btree.h"
#include "base/lock.h"
#include "base/stats.h"

struct kl_vm;
struct kl_gpc;

/* A cache's place among those of its page, in both trees. */
struct kl_gpc_link {
	struct kl_gpc *next, *prev;
};

/* Hits are counted by thread (base/bias.h), and by kind of cache. */
#define KL_GPC_COUNTERS KL_BIAS_INDEXES
struct kl_gpc_counter {
	kl_stat_t hits[KL_NR_GPC_KINDS];
} KL_CACHELINE;

/* What a VM that has caches has. */
struct kl_gpcs {
	_Atomic(struct kl_btree *) published; /* one of tree */
	struct kl_btree tree[2];
	struct kl_mutex lock;     /* changes */
	unsigned nr;              /* caches in the index; lock */
	unsigned nr_objects;      /* initialised and not destroyed; lock */
	_Atomic uint64_t changes; /* of the index; tests count them */
	struct kl_gpc_counter counter[KL_GPC_COUNTERS];
};

/* The VM's, made at the first call; NULL: no memory. */
struct kl_gpcs *kl_gpcs_get(struct kl_vm *vm);
/* Birth of the first cache and death of the VM: complains if a cache still exists. */
void kl_gpcs_destroy(struct kl_vm *vm);

/* In a forked child, which has no VM. */
void kl_gpcs_after_fork(void);

/* Is any address in the index of any VM? */
bool kl_gpcs_in_use(void);

/*
 * @c moves from its page to @page; 0: nowhere. It is not valid, and nobody holds it.
 * Context: c->lock; may sleep; no bracket's or slots' reader section of this thread.
 * Returns: 0; -ENOMEM: too many pages have caches (nothing changed).
 */
int kl_gpc_index_move(struct kl_gpc *c, uint64_t page) KL_MUST_CHECK;

/*
 * Walk the caches of @vm whose page overlaps host memory [@start, @end):
 *
 *     kl_for_each_gpc (&w, vm, start, end)
 *             ... w.c
 *
 * Context: reader section of vm->srcu, from before the first to after the last use.
 */
struct kl_gpc_walk {
	struct kl_gpc *c; /* NULL: no more */
	/* private */
	const struct kl_btree *tree;
	unsigned which;
	uint64_t cursor, start, end;
};
void kl_gpc_walk_first(struct kl_gpc_walk *w, struct kl_vm *vm, uint64_t start, uint64_t end);
void kl_gpc_walk_next(struct kl_gpc_walk *w);
#define kl_for_each_gpc(w, vm, start, end) \
	for (kl_gpc_walk_first(w, vm, start, end); (w)->c; kl_gpc_walk_next(w))
