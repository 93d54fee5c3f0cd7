/* SPDX-License-Identifier: MIT */
/*
 * Dirty rings (D2): each vCPU has one, in memory that it shares with the program. What a vCPU
 * writes is pushed there; the program marks entries as collected, and KVM_RESET_DIRTY_RINGS makes
 * the pages be pushed again when they are written again.
 *
 * A slot's log has a bit for each page then, `in_ring`:
 *
 *   (R1) a page whose bit is set is in an entry, already published, that was not reset.
 *
 * So whoever finds it set may write without pushing. An entry is pushed, then the bit set, and an
 * entry is reset and the bit cleared, both under the lock of the entry's ring; a reset flushes
 * before it returns, as when a log is taken (dirty.h). A page may be in several rings, which only
 * means that it is reported more than once.
 *
 * Who is no vCPU, or whose vCPU is not in KVM_RUN, marks the bitmap beside the rings if the program
 * asked for one (KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP), else pushes to whatever ring has room; if
 * none has, or there is no vCPU yet, the page stays in the bitmap, and goes to a ring when one is
 * reset or the next vCPU runs.
 *
 * A program that uses the library has no vCPUs. Its VM may have a ring of its own, which is shared
 * with nobody: what is collected is reset in one step.
 *
 * Entries are the program's to write at any time: what is read from one is read once and checked.
 * The indices are the engine's own. A wrong entry makes nothing worse than a page that is not
 * reported again, as in KVM.
 *
 * The lock is a spin lock below all others (held for some entries; no waiting, no guest memory), so
 * that vCPUs may take it in guest mode.
 */
#pragma once

#include <kvmlet/dirty.h>

#include "mem/dirty.h"

#define KL_DIRTY_RING_MAX_ENTRIES 65536
/* So many entries before the end the vCPU exits: an instruction may write several pages. */
#define KL_DIRTY_RING_RESERVED 64

struct kl_dirty_ring {
	_Atomic uint32_t lock;
	struct kl_vcpu_core *owner;    /* NULL: the VM's own */
	struct kvm_dirty_gfn *entries; /* shared with the program */
	uint32_t size, soft_limit;     /* entries */
	/* Own count of pushes and resets; the lock to change them. */
	_Atomic uint32_t pushed, reset;
};

/*
 * KVM_CAP_DIRTY_LOG_RING: rings of @bytes for the vCPUs to come. 0; -EINVAL; -E2BIG.
 * @late: there are vCPUs already. Context: what keeps @late true or false.
 * KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP: 0; -EINVAL: no rings, or there are slots.
 */
int kl_dirty_rings_enable(struct kl_vm *vm, uint64_t bytes, bool late) KL_MUST_CHECK;
int kl_dirty_rings_with_bitmap(struct kl_vm *vm) KL_MUST_CHECK;

/*
 * A ring of the VM's own, of @size entries (a power of two), in place of those of vCPUs. 0;
 * -EEXIST: there are rings; -EBUSY: there are slots; -ENOMEM. Context: no lock.
 */
int kl_dirty_ring_make(struct kl_vm *vm, unsigned size) KL_MUST_CHECK;
/* Nobody uses the VM. */
void kl_dirty_ring_destroy(struct kl_vm *vm);
/* At most @max from it; all there are, if it returns fewer. Context: may sleep; no lock. */
unsigned kl_dirty_ring_collect(struct kl_vm *vm, struct kvmlet_dirty_page *pages, unsigned max);

/* @entries: vm->dirty_ring_size bytes. Context: @c does not run yet. */
void kl_dirty_ring_init(struct kl_dirty_ring *ring, struct kl_vcpu_core *c, void *entries);

/* Should the vCPU exit, so that the program resets the ring? Any thread. */
KL_INLINE bool kl_dirty_ring_soft_full(struct kl_dirty_ring *ring)
{
	uint32_t reset = atomic_load_explicit(&ring->reset, memory_order_relaxed);

	return atomic_load_explicit(&ring->pushed, memory_order_relaxed) - reset >=
	       ring->soft_limit;
}

/* No page can be pushed: the vCPU must exit before it writes another one. */
KL_INLINE bool kl_dirty_ring_full(struct kl_dirty_ring *ring)
{
	uint32_t reset = atomic_load_explicit(&ring->reset, memory_order_relaxed);

	return atomic_load_explicit(&ring->pushed, memory_order_relaxed) - reset >= ring->size;
}

/* For kl_dirty_may_write(): false if the vCPU's ring is full. */
bool kl_dirty_ring_mark_in_guest(struct kl_vcpu_core *c, struct kl_dirty_log *log, uint64_t index);

/* For kl_dirty_mark(). @c: the vCPU that the calling thread runs, or NULL. */
void kl_dirty_ring_mark(struct kl_vm *vm, struct kl_vcpu_core *c, struct kl_dirty_log *log,
			uint64_t index);

/* Before a vCPU enters the guest: pages for which no ring had room. Context: no lock above SLOTS.
 */
KL_INLINE bool kl_dirty_left_over(struct kl_vm *vm)
{
	return atomic_load_explicit(&vm->dirty_left_over, memory_order_relaxed);
}
void kl_dirty_rings_push_left_over(struct kl_vm *vm);

/*
 * KVM_RESET_DIRTY_RINGS. Returns how many entries were reset; -EINVAL: no rings.
 * Context: may sleep; no lock.
 */
int kl_dirty_rings_reset(struct kl_vm *vm);
