/* SPDX-License-Identifier: MIT */
/*
 * Dirty logs: which pages of a slot were written since the program last asked.
 *
 *     kvmlet_memslot_set(vm, 0, KVMLET_MEM_LOG_DIRTY, gpa, size, hva);   logging begins
 *     copy all of it
 *     do {
 *             kvmlet_dirty_get(vm, 0, bitmap, npages);
 *             copy the pages that the bitmap names
 *     } while (there were many);
 *     kvmlet_memslot_set(vm, 0, 0, gpa, size, hva);                      logging ends
 *
 * For migration and snapshots, and for displays. A write is in the log: of kvmlet_vm_write and the
 * atomics (kvmlet/vm.h) when the call returns; through a gfn-to-pfn cache, when that is unlocked as
 * written (kvmlet/gpc.h); through a window for writing, when it is locked: all of it. What is read
 * from a page after its mark was taken has every write that the mark stands for, but for those of a
 * window or cache that is held still: a call that takes marks waits for windows, and the page of a
 * cache is marked anew when it is unlocked. What the program writes through pointers of its own is
 * not seen, nor what comes through a cache at a fixed host address.
 *
 * There are two kinds, and a VM has the one or the other:
 *   - Bitmaps, a bit for each page of the slot: bit n % 64 of word n / 64 is page n. To read one
 * costs next to nothing for pages that are clean, however large the slot is. kvmlet_dirty_get takes
 * the marks, unless kvmlet_dirty_set_mode has said that kvmlet_dirty_clear does: then what is
 * written between the two stays marked, and a page may be taken when it is about to be copied.
 *   - A ring of the VM, to which each page goes once: kvmlet_dirty_ring_create, before there are
 * slots. kvmlet_dirty_ring_collect takes from it. For slots of which little is written at a time.
 *
 * Common to all calls
 *   - Any thread, not from a signal handler. kvmlet/vm.h has what there is to know about signals.
 *   - `slot` is as for kvmlet_memslot_set: bits 0 to 15 the number, 16 to 31 the address space.
 *   - Context: may sleep; not inside a notifier bracket, a window, a cache or a tracker's callback
 * of the calling thread, since they would wait for those: -EDEADLK.
 *   - In a forked child, a VM of the parent is unusable: -EIO, as after an internal error.
 */
#ifndef KVMLET_DIRTY_H
#define KVMLET_DIRTY_H

#include <stdint.h>

#include <kvmlet/types.h>

#ifdef __cplusplus
extern "C" {
#endif

struct kvmlet_vm;

/** kvmlet_dirty_get leaves the marks as they are, kvmlet_dirty_clear takes them. */
#define KVMLET_DIRTY_MANUAL (1u << 0)
/** With KVMLET_DIRTY_MANUAL: all pages are marked when logging begins. */
#define KVMLET_DIRTY_ALL_SET (1u << 1)

/**
 * How bitmaps are read from now on, for all slots; KVM's KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
 *
 * @param mode  0 (as at first), KVMLET_DIRTY_MANUAL, or both flags
 * Returns: 0;
 *   -EINVAL   another value
 *   -EDEADLK, -EIO  as above
 */
int kvmlet_dirty_set_mode(struct kvmlet_vm *vm, unsigned mode);

/**
 * Read the log of a slot, and take its marks, unless the mode is manual; KVM_GET_DIRTY_LOG.
 *
 * @param bitmap  out: npages / 64 words, rounded up; bits behind the slot's end are 0
 * @param npages  how many pages @bitmap has room for: at least the slot's; words that the slot does
 *                not need are not written
 * Returns: 0;
 *   -ENOENT   no such slot, or it does not log
 *   -EINVAL   no such number or address space, or the slot has more pages than @npages
 *   -EFAULT   @bitmap is not there; no mark is lost
 *   -ENXIO    the VM has a ring
 *   -EDEADLK, -EIO  as above
 */
int kvmlet_dirty_get(struct kvmlet_vm *vm, uint32_t slot, uint64_t *bitmap, uint64_t npages);

/**
 * Take marks; KVM_CLEAR_DIRTY_LOG. Works in all modes.
 *
 * @param first   the first page, a multiple of 64
 * @param npages  how many; a multiple of 64, or up to the slot's end
 * @param bitmap  which of them: bit 0 is @first
 * Returns: 0;
 *   -ENOENT   no such slot, or it does not log
 *   -EINVAL   no such number or address space, @first or @npages as they may not be
 *   -EFAULT   @bitmap is not there; nothing is taken
 *   -ENXIO    the VM has a ring
 *   -EDEADLK, -EIO  as above
 */
int kvmlet_dirty_clear(struct kvmlet_vm *vm, uint32_t slot, uint64_t first, uint64_t npages,
		       const uint64_t *bitmap);

/** Of the ring, how many entries there may be: a power of two from and to. */
#define KVMLET_DIRTY_RING_MIN 256u
#define KVMLET_DIRTY_RING_MAX 65536u

/** A page that was written. */
struct kvmlet_dirty_page {
	uint32_t slot; /* as for kvmlet_memslot_set */
	uint64_t page; /* from the slot's beginning */
};

/**
 * Have a ring in place of bitmaps, for all slots that log.
 *
 * A page that was written is in it once, until it is collected. What finds the ring full is kept
 * aside, and is in it again when something was collected: nobody waits, and no write is lost.
 *
 * @param entries  a power of two, KVMLET_DIRTY_RING_MIN to KVMLET_DIRTY_RING_MAX
 * Returns: 0;
 *   -EINVAL   @entries as it may not be
 *   -EEXIST   there is one
 *   -EBUSY    there are slots
 *   -ENOMEM, -EDEADLK, -EIO
 */
int kvmlet_dirty_ring_create(struct kvmlet_vm *vm, unsigned entries);

/**
 * Take pages out of the ring, oldest first. A page that is written after that is in it anew.
 * Slots may have changed: what was written before a slot went may come after it.
 *
 * @param pages  out
 * @param max    room for so many
 * @param n      out: so many there were; fewer than @max: that was all
 * Returns: 0;
 *   -EINVAL   no ring
 *   -EDEADLK, -EIO  as above
 */
int kvmlet_dirty_ring_collect(struct kvmlet_vm *vm, struct kvmlet_dirty_page *pages, unsigned max,
			      unsigned *n);

#ifdef __cplusplus
}
#endif

#endif
