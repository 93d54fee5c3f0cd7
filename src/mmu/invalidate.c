/* SPDX-License-Identifier: MIT */
/*
 * Everything that takes translations away: notifier events (N2, N3), slot changes (S4), the
 * wrap of the MMIO generation (S6), and the death of the VM.
 *
 * A zap has flushed before it returns (M5). Between removing an SPTE and the end of the
 * flush the mmu lock is held for writing, so no fault can install a new one that the flush
 * would miss, and no unlinked table is reused.
 *
 * The one exception is a notifier event that must not sleep and finds, after it has zapped,
 * that a vCPU entered guest mode meanwhile: it fails, the flush is owed, and the next zap of
 * whatever range pays it before it returns.
 *
 * Bookkeeping of notifier events, all under the write lock, read by faults under the read
 * lock:  begin: in_progress++, range widened.   end: seq++, then in_progress--.
 */
#include <errno.h>
#include <stdlib.h>

#include "base/failpoint.h"
#include "base/log.h"
#include "base/pool.h"
#include "base/racepoint.h"
#include "host/thread.h"
#include "mem/notifier.h"
#include "mem/subscribers.h"
#include "mmu/stage2.h"

int kl_mmu_create(struct kl_vm *vm)
{
	struct kl_mmu *mmu = kl_failpoint("mmu-create") ? NULL : calloc(1, sizeof(*mmu));

	if (!mmu)
		return -ENOMEM;
	kl_rwlock_init(&mmu->lock, KL_RANK_MMU);
	for (unsigned as = 0; as < KL_NR_AS; as++) {
		mmu->root[as] = kl_page_alloc();
		if (!mmu->root[as]) {
			while (as > 0)
				kl_page_free(mmu->root[--as]);
			kl_rwlock_destroy(&mmu->lock);
			free(mmu);
			return -ENOMEM;
		}
	}
	vm->mmu = mmu;
	return 0;
}

void kl_mmu_destroy(struct kl_vm *vm)
{
	struct kl_pt_garbage garbage = {0};
	struct kl_mmu *mmu = vm->mmu;

	/* A bracket of this thread that will end later may be open (B19); no other. */
	KL_WARN_ONCE(vm->mmu_invalidate_in_progress > kl_self.brackets,
		     "internal error: VM %llu dies with %d invalidations in progress",
		     (unsigned long long)vm->serial, vm->mmu_invalidate_in_progress);
	kl_write_lock(&mmu->lock);
	for (unsigned as = 0; as < KL_NR_AS; as++)
		kl_stage2_zap(vm, as, 0, KL_MAX_GFN + 1, KL_ZAP_ALL, &garbage);
	kl_write_unlock(&mmu->lock);
	kl_pt_garbage_free(&garbage);
	for (unsigned as = 0; as < KL_NR_AS; as++)
		kl_page_free(mmu->root[as]);
	kl_rwlock_destroy(&mmu->lock);
	free(mmu);
	vm->mmu = NULL;
}

/* Overlapping events share one range: the smallest that holds all of them. */
static void raise_in_progress(struct kl_vm *vm, kl_gfn_t first, kl_gfn_t last)
{
	if (vm->mmu_invalidate_in_progress++) {
		first = kl_min(first, vm->mmu_invalidate_start);
		last = kl_max(last, vm->mmu_invalidate_end);
	}
	vm->mmu_invalidate_start = first;
	vm->mmu_invalidate_end = last;
}

/* Context: lock held for writing. 0, or -EAGAIN if !may_wait and a vCPU is in the way. */
static int flush_after_zap(struct kl_vm *vm, bool needed, bool may_wait)
{
	struct kl_mmu *mmu = vm->mmu;
	int r = 0;

	kl_assert_held(&mmu->lock);
	if (needed || mmu->flush_owed) {
		r = kl_vcpus_flush(vm, may_wait);
		mmu->flush_owed = r != 0;
	}
	return r;
}

int kl_mmu_invalidate_begin(struct kl_vm *vm, const struct kl_notifier_range *range)
{
	kl_gfn_t lowest = UINT64_MAX, highest = 0;
	struct kl_pt_garbage garbage = {0};
	struct kl_mmu *mmu = vm->mmu;
	struct kl_overlap o;
	bool flush = false;
	int r = 0;

	if (range->may_block)
		kl_write_lock(&mmu->lock);
	else if (!kl_write_trylock(&mmu->lock))
		return -EAGAIN;
	for (unsigned as = 0; as < KL_NR_AS; as++)
		kl_for_each_overlap (&o, kl_memslots(vm, as), range->start, range->end) {
			lowest = kl_min(lowest, o.first);
			highest = kl_max(highest, o.last);
			flush |= !range->may_block &&
				 kl_stage2_zap(vm, as, o.first, o.last, KL_ZAP_NOTHING, NULL);
		}
	/* Would it have to wait? Then nothing has changed yet (N5). */
	if (!range->may_block && (flush || mmu->flush_owed) && kl_vcpus_in_guest(vm)) {
		kl_write_unlock(&mmu->lock);
		return -EAGAIN;
	}
	raise_in_progress(vm, lowest, highest);
	/* A table can be freed only by who may wait for the vCPUs that walk it. */
	for (unsigned as = 0; as < KL_NR_AS; as++)
		kl_for_each_overlap (&o, kl_memslots(vm, as), range->start, range->end)
			flush |= kl_stage2_zap(vm, as, o.first, o.last, KL_ZAP_LEAVES,
					       range->may_block ? &garbage : NULL);
	racepoint("mmu-zapped");
	r = flush_after_zap(vm, flush || garbage.head, range->may_block);
	if (r)
		vm->mmu_invalidate_in_progress--; /* what was zapped will be faulted in again */
	kl_write_unlock(&mmu->lock);
	kl_pt_garbage_free(&garbage);
	return r;
}

void kl_mmu_invalidate_end(struct kl_vm *vm, const struct kl_notifier_range *range)
{
	struct kl_mmu *mmu = vm->mmu;

	kl_write_lock(&mmu->lock);
	/* Before in_progress falls: a fault sees one or the other. */
	atomic_fetch_add(&vm->mmu_invalidate_seq, 1);
	KL_BUG_ON(--vm->mmu_invalidate_in_progress < 0, vm);
	kl_write_unlock(&mmu->lock);
}

static void zap_and_flush(struct kl_vm *vm, unsigned as, kl_gfn_t first, kl_gfn_t last,
			  enum kl_zap_what what)
{
	struct kl_pt_garbage garbage = {0};
	struct kl_mmu *mmu = vm->mmu;
	bool flush;

	kl_write_lock(&mmu->lock);
	flush = kl_stage2_zap(vm, as, first, last, what, &garbage);
	(void)flush_after_zap(vm, flush || garbage.head, true);
	kl_write_unlock(&mmu->lock);
	kl_pt_garbage_free(&garbage);
}

void kl_mmu_zap_slot(struct kl_vm *vm, const struct kl_memslot *slot)
{
	if (atomic_load_explicit(&vm->slot_zap_all_quirk, memory_order_relaxed))
		zap_and_flush(vm, slot->as_id, 0, KL_MAX_GFN + 1, KL_ZAP_LEAVES);
	else
		zap_and_flush(vm, slot->as_id, slot->base_gfn, slot->base_gfn + slot->npages,
			      KL_ZAP_LEAVES);
}

void kl_mmu_protect_slot(struct kl_vm *vm, const struct kl_memslot *slot)
{
	zap_and_flush(vm, slot->as_id, slot->base_gfn, slot->base_gfn + slot->npages, KL_ZAP_WRITE);
}

void kl_mmu_zap_mmio(struct kl_vm *vm)
{
	for (unsigned as = 0; as < KL_NR_AS; as++)
		zap_and_flush(vm, as, 0, KL_MAX_GFN + 1, KL_ZAP_MMIO);
}
