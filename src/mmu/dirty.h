/* SPDX-License-Identifier: MIT */
/*
 * The dirty bitmap of a memslot (D1, D3, D4).
 *
 * Invariant: in a slot that logs, a page that some SPTE lets a vCPU write has its bit set. A fault
 * sets the bit before it makes the SPTE writable, under the mmu lock for reading; reading the log
 * takes bits, write-protects those pages and flushes, under the lock for writing.
 * So a store that is visible before a read of the log begins is in that log or in an earlier one,
 * and a store after it faults and is in the next.
 *
 * The bitmap belongs to the memslot (mem/memslot.h): one bit for each page, in whole words.
 */
#pragma once

#include "mem/vm.h"

KL_INLINE void kl_dirty_set(_Atomic uint64_t *dirty, uint64_t index)
{
	_Atomic uint64_t *word = &dirty[index / 64];
	uint64_t bit = 1ull << index % 64;

	if (!(atomic_load_explicit(word, memory_order_relaxed) & bit))
		atomic_fetch_or_explicit(word, bit, memory_order_release);
}

/*
 * KVM_GET_DIRTY_LOG: the log of slot @id into the program's @bitmap, and cleared.
 * Context: may sleep; no lock.
 * Returns: 0; -EINVAL: no such @as or @id; -ENOENT: no such slot, or it has no log; -EFAULT.
 */
int kl_dirty_log_get(struct kl_vm *vm, unsigned as, unsigned id, void *bitmap) KL_MUST_CHECK;

/*
 * KVM_CLEAR_DIRTY_LOG: of slot @id's pages from @first_page on, @num_pages, take those out of the
 * log that the program's @bitmap names; its bit 0 is @first_page, a multiple of 64. Either all of
 * it is read, or nothing changes.
 * Context: may sleep; no lock.
 * Returns: 0; -EINVAL: as above, or pages that the slot does not have, or an end within a word that
 * is not the slot's; -ENOENT; -EFAULT; -ENOMEM.
 */
int kl_dirty_log_clear(struct kl_vm *vm, unsigned as, unsigned id, uint64_t first_page,
		       uint64_t num_pages, const void *bitmap) KL_MUST_CHECK;
