/* SPDX-License-Identifier: MIT */
/*
 * gfn->pfn caches (G1-G17): one area within one guest page, or at one host address, as a pointer
 * that is good from lock to unlock, whatever changes the memory.
 *
 * States of a cache, and what holds in each
 *   inactive                 closed, in no index
 *   active, without address  closed: no slot is there (yet), or it may not be written (G16)
 *   active, with address     in the VM's index: every bracket over its page finds it
 *   valid                    active, with address, open (base/bias.h): its pointer and its tag are
 *                            those of the lookup and the populate that made it valid
 * So: Valid => active => reachable by notifiers (G5).
 *
 * Who may change what
 *   - c->lock (rank GPC) serialises activate, deactivate and refresh (G7), which alone change the
 *     address and what readers read, and open the cache. They do so while it is closed and drained.
 *   - brackets and changes of slots close it, with no lock, and wait for its holders.
 *   - holders take no lock, and wait for nobody (G1a).
 *
 * Why no stale pointer becomes valid (B1-B5, B32). A refresh closes the cache, enters its address
 * into the index, reads the state, resolves, and then opens the cache if
 *   no bracket over the page is in flight   (it is one of those that closed the cache before, or it
 *                                           looked into the index before the address was there)
 *   the state is still the one it read      (a bracket that began or ended meanwhile raised the
 *                                           sequence in it; so did a slot's change)
 * in this order. A bracket publishes its range before it looks into the index, and looks again at
 * its end before it takes the range back; so it is seen in flight, or it has raised the sequence,
 * or it will close the cache after it was opened.
 *
 * Nothing is pinned (G17): the pointer is the host address itself.
 */
#pragma once

#include <kvmlet/types.h>

#include "base/bias.h"
#include "base/lock.h"
#include "host/guard.h"
#include "mem/dirty.h"
#include "mem/gpc_index.h"
#include "mem/vm.h"

#define KL_INVALID_GPA UINT64_MAX

struct kl_gpc {
	/* What a holder reads; changes only while closed and drained. */
	struct kl_bias bias;
	_Atomic uint64_t khva;                     /* of the area's first byte */
	_Atomic(const _Atomic uint64_t *) current; /* the generation that counts for it ... */
	_Atomic uint64_t generation;               /* ... and the tag; hva-based: the same word */
	_Atomic(struct kl_dirty_log *) log;        /* of the slot, or NULL (G13) */
	uint64_t log_index;
	_Atomic size_t area; /* the most bytes that were ever locked here: what is reported (T1) */
	kl_stat_t *hits;     /* of thread 0: kl_gpc_pointer() */
	struct kl_vm *vm;    /* with as_id, kind and gpcs: the immutable owner */

	/* c->lock */
	struct kl_mutex lock;
	struct kl_gpcs *gpcs;
	unsigned as_id;
	enum kl_gpc_kind kind;
	bool active;
	_Atomic bool hva_based; /* read by changes of slots; only changes outside the index */
	_Atomic uint64_t addr;  /* gpa or hva, as hva_based says; holders may read it */

	/* The index; page is its place, 0: none (c->lock) */
	uint64_t page, page_in[2];
	struct kl_gpc_link link[2];

	/* A bracket that may not block: what to restore if it fails (G15, N5). */
	_Atomic uint64_t undo;
} KL_CACHELINE;

/* The immutable owner. 0 or -ENOMEM. */
int kl_gpc_init(struct kl_gpc *c, struct kl_vm *vm, unsigned as_id,
		enum kl_gpc_kind kind) KL_MUST_CHECK;
/* Nobody uses @c any more. */
void kl_gpc_destroy(struct kl_gpc *c);

/*
 * The calls of include/kvmlet/gpc.h, whose contracts are there. Context of all but try, check and
 * unlock: no lock above GPC, no reader section, no window; the VM is usable.
 */
int kl_gpc_activate(struct kl_gpc *c, kl_gpa_t gpa, size_t len) KL_MUST_CHECK;
int kl_gpc_activate_hva(struct kl_gpc *c, kl_hva_t hva, size_t len) KL_MUST_CHECK;
int kl_gpc_deactivate(struct kl_gpc *c) KL_MUST_CHECK;
int kl_gpc_refresh(struct kl_gpc *c, size_t len) KL_MUST_CHECK;
int kl_gpc_lock_slow(struct kl_gpc *c, size_t len, void **p) KL_MUST_CHECK;
int kl_gpc_trylock(struct kl_gpc *c, size_t len, void **p) KL_MUST_CHECK;
int kl_gpc_lock_many(struct kl_gpc *const *c, const size_t *len, void **p,
		     unsigned n) KL_MUST_CHECK;

/* Would try() succeed, but for what happens meanwhile? (G6) */
KL_INLINE bool kl_gpc_check(const struct kl_gpc *c, size_t len)
{
	uint64_t khva = atomic_load_explicit(&c->khva, memory_order_relaxed);

	return (kl_bias_state((struct kl_bias *)&c->bias) & KL_BIAS_OPEN) &&
	       atomic_load_explicit(&c->generation, memory_order_relaxed) ==
		       atomic_load_explicit(atomic_load_explicit(&c->current, memory_order_relaxed),
					    memory_order_acquire) &&
	       len - 1 < KL_PAGE_SIZE - (khva & ~KL_PAGE_MASK);
}

/*
 * Of a cache that the thread has published and found open, its pointer; NULL: its tag is old, or
 * memory that went without an event is found here, and not by the holder (N7).
 */
KL_INLINE void *kl_gpc_pointer(struct kl_gpc *c, struct kl_bias_thread *t)
{
	uint64_t khva = atomic_load_explicit(&c->khva, memory_order_relaxed);

	/* The tag is looked at after "open": who opened it had seen that it was current. */
	if (KL_UNLIKELY(
		    atomic_load_explicit(&c->generation, memory_order_relaxed) !=
			    atomic_load(atomic_load_explicit(&c->current, memory_order_relaxed)) ||
		    !kl_guard_probe((void *)(uintptr_t)khva)))
		return NULL;
	kl_stat_own_add((kl_stat_t *)((char *)c->hits + t->index * sizeof(struct kl_gpc_counter)),
			1);
	return (void *)(uintptr_t)khva;
}

/* Lock if it is valid; else false, and nothing is held. Waits only for a page that was swapped out.
 */
bool kl_gpc_try(struct kl_gpc *c, struct kl_bias_thread *t, size_t len, void **p);

/*
 * The same for the usual case: a thread that has been here before, holds no other cache, and is in
 * no bracket (which bars it). False in other cases, too. Whether the cache may be used at all, by a
 * forked child or of a VM that is dead, is not asked: kl_gpc_close_all() has seen to it.
 */
KL_INLINE bool kl_gpc_try_fast(struct kl_gpc *c, size_t len, void **p)
{
	struct kl_bias_thread *t = kl_bias_self;

	if (KL_UNLIKELY(!t || kl_bias_first(t) || !kl_bias_enter_first(t, &c->bias)))
		return false;
	/* What was locked before fits in the page. */
	if (KL_LIKELY(len - 1 < atomic_load_explicit(&c->area, memory_order_relaxed))) {
		*p = kl_gpc_pointer(c, t);
		if (KL_LIKELY(*p))
			return true;
	}
	kl_bias_leave_first(t);
	return false;
}

KL_INLINE int kl_gpc_lock(struct kl_gpc *c, size_t len, void **p)
{
	return KL_LIKELY(kl_gpc_try_fast(c, len, p)) ? 0 : kl_gpc_lock_slow(c, len, p);
}

KL_INLINE void kl_gpc_mark_dirty(struct kl_gpc *c)
{
	struct kl_dirty_log *log = atomic_load_explicit(&c->log, memory_order_relaxed);

	if (KL_UNLIKELY(log))
		kl_dirty_mark(c->vm, log, c->log_index);
}

bool kl_gpc_unlock_one(struct kl_gpc *c, bool written);

/*
 * @written: the area, since it was locked. The usual case only; else false, and it is held still.
 * What would be a call in here, and in kl_gpc_try_fast(), is left to the slow way: registers that
 * are saved for it are stores that the next exchange waits for.
 */
KL_INLINE bool kl_gpc_unlock_fast(struct kl_gpc *c, bool written)
{
	struct kl_bias_thread *t = kl_bias_self;

	if (KL_UNLIKELY(!t || kl_bias_first(t) != &c->bias))
		return false;
	/* It is held still: kl_gpc_close_page() waits, if this looked too early. */
	if (written && KL_UNLIKELY(atomic_load(&c->vm->tracked_pages) ||
				   atomic_load_explicit(&c->log, memory_order_relaxed)))
		return false;
	kl_bias_leave_first(t);
	return true;
}

/* False: the calling thread does not hold it. */
KL_INLINE bool kl_gpc_unlock(struct kl_gpc *c, bool written)
{
	return KL_LIKELY(kl_gpc_unlock_fast(c, written)) || kl_gpc_unlock_one(c, written);
}

/* Nobody uses a cache of @vm any more; who tries finds out why. Waits for nobody. */
void kl_gpc_close_all(struct kl_vm *vm);

/* Is the cache that the calling thread holds at guest-physical address @gpa? */
KL_INLINE bool kl_gpc_is_at(const struct kl_gpc *c, kl_gpa_t gpa)
{
	return !c->hva_based && atomic_load_explicit(&c->addr, memory_order_relaxed) == gpa;
}

/* Bring the hits in vm->stats.gpc up to date: threads count for themselves. */
void kl_gpc_count_hits(struct kl_vm *vm);
