/* SPDX-License-Identifier: MIT */
/*
 * Write tracking (T1-T6): whoever writes to a guest page that somebody watches tells the trackers,
 * after the write is visible.
 *
 * Counts. Each slot has a count for each gfn, of who tracks it; they come into being when the first
 * gfn of the slot is tracked, and go with the slot. They change under mmu_lock for writing. To read
 * them takes mmu_lock or a reader section of vm->srcu in which the slot was found.
 *
 * Invariant: while a gfn's count is not 0, every leaf that maps it is of level 1 and has
 * KL_SPTE_TRACKED, and when kl_track_add() has returned no vCPU has a writable TLB entry for it. So
 * who wants to write finds the bit, writes all the same (the leaf says whether the host's page may
 * be written, and whether the dirty log knows) and then reports. A fault reads the count where it
 * makes the leaf, under mmu_lock: what it has seen before counts for nothing [B22].
 *
 * A report is a reader section of track->srcu, entered before the writer gives up what made its
 * write part of the slot: guest mode, or a cache. So who has taken a slot away (zapped, flushed,
 * waited for caches) and then waits for reports has all reports of writes to it behind him, and
 * tells the trackers of the removal last (T5). What follows for callbacks: they may sleep and reach
 * guest memory, but must not wait for a change of the slots.
 *
 * Trackers: a list that changes under slots_lock, and is walked in a report or under slots_lock.
 */
#pragma once

#include <kvmlet/track.h>

#include "host/thread.h"
#include "mem/vm.h"

struct kl_tracker {
	struct kvmlet_track_ops ops; /* include/kvmlet/track.h */
	void *opaque;
	/*
	 * One of the engine's own: it copes with MOVE (T6), and its track_write() neither sleeps
	 * nor takes a lock, since some writers hold locks.
	 */
	bool internal;
	_Atomic(struct kl_tracker *) next;
};

/* Context: may sleep; not in a report, a bracket, or by a holder of a cache or window. */
void kl_track_register(struct kl_vm *vm, struct kl_tracker *t);
/* On return none of its callbacks runs any more. The same context. */
void kl_track_unregister(struct kl_vm *vm, struct kl_tracker *t);

/*
 * One more, or one less, who tracks @gfn.
 * Context: no lock from GPC on; any reader section. Waits for vCPUs in guest mode and holders of
 * caches, so not by one of those.
 * Returns: 0; -ENOENT: no slot there, or it is on its way out; remove: nobody tracks it;
 * -EOVERFLOW: 65535 do; -ENOMEM.
 */
int kl_track_add(struct kl_vm *vm, unsigned as, kl_gfn_t gfn) KL_MUST_CHECK;
int kl_track_remove(struct kl_vm *vm, unsigned as, kl_gfn_t gfn) KL_MUST_CHECK;

/* Does anybody track @gfn? May be over at once, unless the caller holds off kl_track_add(). */
bool kl_track_is(struct kl_vm *vm, unsigned as, kl_gfn_t gfn);
/*
 * Is there a tracked gfn of slot @id in the range of a leaf of @level around @gfn?
 * Context: mmu_lock; the slot's generation stands.
 */
bool kl_track_in_leaf(struct kl_vm *vm, unsigned as, unsigned id, kl_gfn_t gfn, unsigned level);

/* May there be tracked pages at all? */
KL_INLINE bool kl_track_any(const struct kl_vm *vm)
{
	return atomic_load_explicit(&vm->tracked_pages, memory_order_relaxed);
}

/*
 * A report. Between the two: kl_track_write() for each page, outside guest mode and without locks
 * (internal trackers: whatever).
 */
int kl_track_begin(struct kl_vm *vm);
void kl_track_write(struct kl_vm *vm, unsigned as, kl_gpa_t gpa, const void *bytes, size_t len);
void kl_track_end(struct kl_vm *vm, int token);
