/* SPDX-License-Identifier: MIT */
/*
 * Tables that no vCPU can reach any more, on their way back to the page pool.
 *
 * Small numbers are freed by who unlinked them. A whole tree that went at once is buried here,
 * and freed a few tables at a time by whoever comes by: each allocation of a table frees two, so
 * that what lies here is never more than what was once in use (M5).
 *
 * Locks: kl_graveyard.lock (rank LEAF).
 */
#pragma once

#include "base/lock.h"

struct kl_pt;

/* Tables that were unlinked, chained through their first entry. */
struct kl_pt_garbage {
	struct kl_pt *head;
};
void kl_pt_garbage_add(struct kl_pt_garbage *g, struct kl_pt *pt);
void kl_pt_garbage_free(struct kl_pt_garbage *g);

struct kl_graveyard {
	struct kl_mutex lock;
	struct kl_pt *head;  /* trees; see graveyard.c for the links */
	unsigned cursor;     /* entries of @head before it are done with */
	_Atomic bool filled; /* head != NULL; a hint for those without the lock */
};

void kl_graveyard_init(struct kl_graveyard *g);
/* Frees everything. */
void kl_graveyard_destroy(struct kl_graveyard *g);
/* @pt, a table of @level >= 2, and all that hangs on it. Context: flushed; leaf lock. */
void kl_graveyard_bury(struct kl_graveyard *g, struct kl_pt *pt, unsigned level);
/* Free up to about @n tables. Context: no lock of rank LEAF. */
void kl_graveyard_reap_slow(struct kl_graveyard *g, unsigned n);
KL_INLINE void kl_graveyard_reap(struct kl_graveyard *g, unsigned n)
{
	if (KL_UNLIKELY(atomic_load_explicit(&g->filled, memory_order_relaxed)))
		kl_graveyard_reap_slow(g, n);
}
