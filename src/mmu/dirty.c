/* SPDX-License-Identifier: MIT */
/*
 * Reading a dirty log. In batches: take some words and write-protect what they name under
 * mmu_lock, flush, release, then copy to the program, which may take as long as a page fault of
 * its own takes.
 *
 * Why no store is lost: a page whose bit was taken is writable until the flush is over; a store
 * until then belongs to a page that this log names, and the program looks at the page after the
 * call. A fault on it waits for mmu_lock, and sets the bit again.
 *
 * Locks: slots_lock (rank SLOTS) throughout, so that the slot stays; as in KVM, a program must not
 * make the copy wait for a change of slots.
 */
#include <errno.h>

#include "base/log.h"
#include "base/racepoint.h"
#include "host/guard.h"
#include "host/sys.h"
#include "mmu/dirty.h"
#include "mmu/zap.h"

#define BATCH_WORDS 64 /* 4096 pages */

static bool protect(struct kl_vm *vm, unsigned as, kl_gfn_t gfn)
{
	unsigned level;
	uint64_t spte;
	kl_spte_t *p = kl_stage2_walk(vm->mmu, as, gfn, &level, &spte);

	/* A larger leaf cannot be: faults do not make any while the slot logs. */
	return kl_spte_is_leaf(spte) && (spte & KL_SPTE_WRITABLE) &&
	       (atomic_fetch_and(p, ~KL_SPTE_WRITABLE) & KL_SPTE_WRITABLE);
}

/* Of words [first, first + n) take the bits that @mask has, or all if it is NULL, into @out. */
static void harvest(struct kl_vm *vm, const struct kl_memslot *slot, uint64_t first, unsigned n,
		    const uint64_t *mask, uint64_t *out)
{
	struct kl_mmu *mmu = vm->mmu;
	struct kl_flush_report f = {0};
	bool flush = false, any = false;

	for (unsigned i = 0; i < n; i++) {
		out[i] = 0;
		any |= (atomic_load_explicit(&slot->dirty[first + i], memory_order_acquire) &
			(mask ? mask[i] : ~0ull)) != 0;
	}
	if (!any)
		return;
	kl_write_lock(&mmu->lock);
	for (unsigned i = 0; i < n; i++) {
		_Atomic uint64_t *word = &slot->dirty[first + i];
		kl_gfn_t base = slot->base_gfn + (first + i) * 64;

		uint64_t take = mask ? mask[i] : ~0ull;

		if (!(atomic_load_explicit(word, memory_order_relaxed) & take))
			continue;
		out[i] = atomic_fetch_and(word, ~take) & take;
		for (uint64_t left = out[i]; left; left &= left - 1)
			flush |= protect(vm, slot->as_id, base + (unsigned)__builtin_ctzll(left));
	}
	racepoint("dirty-protected");
	(void)kl_mmu_flush(vm, flush, true, &f);
	kl_write_unlock(&mmu->lock);
}

static int get_locked(struct kl_vm *vm, const struct kl_memslot *slot, char *bitmap)
{
	uint64_t words = (slot->npages + 63) / 64;
	uint64_t buf[BATCH_WORDS];

	for (uint64_t at = 0; at < words; at += BATCH_WORDS) {
		unsigned n = (unsigned)kl_min(words - at, (uint64_t)BATCH_WORDS);

		harvest(vm, slot, at, n, NULL, buf);
		racepoint("dirty-harvested");
		if (!kl_copy_to_user(bitmap + at * sizeof(*buf), buf, n * sizeof(*buf)))
			continue;
		/* What the program did not get stays dirty. */
		for (unsigned i = 0; i < n; i++)
			if (buf[i])
				atomic_fetch_or(&slot->dirty[at + i], buf[i]);
		return -EFAULT;
	}
	return 0;
}

int kl_dirty_log_get(struct kl_vm *vm, unsigned as, unsigned id, void *bitmap)
{
	const struct kl_memslot *slot;
	int r = -ENOENT;

	if (as >= KL_NR_AS || id >= KL_USER_MEM_SLOTS)
		return -EINVAL;
	kl_mutex_lock(&vm->slots_lock);
	slot = vm->slot_by_id[as][id];
	if (slot && slot->dirty)
		r = get_locked(vm, slot, bitmap);
	kl_mutex_unlock(&vm->slots_lock);
	return r;
}

static int clear_locked(struct kl_vm *vm, const struct kl_memslot *slot, uint64_t first_page,
			uint64_t num_pages, const void *bitmap)
{
	uint64_t words = (num_pages + 63) / 64, taken[BATCH_WORDS];
	uint64_t *mask;
	int r;

	if (first_page > slot->npages || num_pages > slot->npages - first_page ||
	    ((num_pages & 63) && num_pages != slot->npages - first_page))
		return -EINVAL;
	if (!words)
		return 0;
	mask = kl_sys_map(words * sizeof(*mask));
	if (!mask)
		return -ENOMEM;
	r = kl_copy_from_user(mask, bitmap, words * sizeof(*mask));
	for (uint64_t at = 0; !r && at < words; at += BATCH_WORDS)
		harvest(vm, slot, first_page / 64 + at,
			(unsigned)kl_min(words - at, (uint64_t)BATCH_WORDS), mask + at, taken);
	kl_sys_unmap(mask, words * sizeof(*mask));
	return r;
}

int kl_dirty_log_clear(struct kl_vm *vm, unsigned as, unsigned id, uint64_t first_page,
		       uint64_t num_pages, const void *bitmap)
{
	const struct kl_memslot *slot;
	int r = -ENOENT;

	if (as >= KL_NR_AS || id >= KL_USER_MEM_SLOTS || (first_page & 63))
		return -EINVAL;
	kl_mutex_lock(&vm->slots_lock);
	slot = vm->slot_by_id[as][id];
	if (slot && slot->dirty)
		r = clear_locked(vm, slot, first_page, num_pages, bitmap);
	kl_mutex_unlock(&vm->slots_lock);
	return r;
}
