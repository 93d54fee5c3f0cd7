/* SPDX-License-Identifier: MIT */
/*
 * Slot changes (S4), the wrap of the MMIO generation (S6), birth and death of stage 2.
 *
 * In batches: mmu_lock is released every KL_SWEEP_BATCH entries. What was swept stays so because
 * faults on the range do not install meanwhile: the slot is marked invalid, its generation has
 * moved, or the range is in progress.
 */
#include <errno.h>
#include <stdlib.h>

#include "base/failpoint.h"
#include "base/log.h"
#include "base/pool.h"
#include "base/racepoint.h"
#include "host/thread.h"
#include "mem/subscribers.h"
#include "mmu/zap.h"

#define REAP_AT_ONCE 32 /* tables that a slot change frees itself; later faults do the rest */

int kl_mmu_create(struct kl_vm *vm)
{
	struct kl_mmu *mmu = kl_failpoint("mmu-create") ? NULL : calloc(1, sizeof(*mmu));

	if (!mmu)
		return -ENOMEM;
	kl_rwlock_init(&mmu->lock, KL_RANK_MMU);
	kl_mutex_init(&mmu->mapping_lock, KL_RANK_LEAF);
	kl_graveyard_init(&mmu->graveyard);
	for (unsigned as = 0; as < KL_NR_AS; as++) {
		mmu->root[as] = kl_page_alloc();
		if (!mmu->root[as]) {
			while (as > 0)
				kl_page_free(mmu->root[--as]);
			kl_graveyard_destroy(&mmu->graveyard);
			kl_mutex_destroy(&mmu->mapping_lock);
			kl_rwlock_destroy(&mmu->lock);
			free(mmu);
			return -ENOMEM;
		}
	}
	mmu->trace = kl_mmu_trace_create();
	vm->mmu = mmu;
	return 0;
}

void kl_mmu_destroy(struct kl_vm *vm)
{
	struct kl_mmu *mmu = vm->mmu;

	/* Brackets of those who destroy VMs inside one may be open (B19); no other. */
	KL_WARN_ONCE(vm->mmu_invalidate_in_progress > (int)vm->brackets_at_removal,
		     "internal error: VM %llu dies with %d invalidations in progress",
		     (unsigned long long)vm->serial, vm->mmu_invalidate_in_progress);
	kl_write_lock(&mmu->lock);
	for (unsigned as = 0; as < KL_NR_AS; as++) {
		kl_stage2_detach_all(vm, as);
		kl_stage2_bury_detached(vm, as);
	}
	kl_write_unlock(&mmu->lock);
	kl_graveyard_destroy(&mmu->graveyard);
	for (unsigned as = 0; as < KL_NR_AS; as++)
		kl_page_free(mmu->root[as]);
	kl_mmu_trace_destroy(mmu->trace);
	kl_mutex_destroy(&mmu->mapping_lock);
	kl_rwlock_destroy(&mmu->lock);
	free(mmu);
	vm->mmu = NULL;
}

int kl_mmu_flush(struct kl_vm *vm, bool needed, bool may_wait, struct kl_flush_report *f)
{
	struct kl_mmu *mmu = vm->mmu;
	uint64_t begun = 0;
	int r;

	kl_assert_held(&mmu->lock);
	if (!needed && !mmu->flush_owed)
		return 0;
	if (KL_UNLIKELY(mmu->trace))
		begun = kl_trace_ns();
	r = kl_vcpus_flush(vm, may_wait);
	mmu->flush_owed = r != 0;
	if (KL_UNLIKELY(mmu->trace)) {
		f->flush_ns += kl_trace_ns() - begun;
		f->waits += kl_flush_wait.vcpus;
		if (kl_flush_wait.slowest_ns > f->slowest_ns) {
			f->slowest_ns = kl_flush_wait.slowest_ns;
			f->slowest_id = kl_flush_wait.slowest_id;
		}
	}
	return r;
}

void kl_mmu_sweep_locked(struct kl_sweep *s, struct kl_flush_report *f)
{
	struct kl_mmu *mmu = s->vm->mmu;
	bool more;

	for (;;) {
		more = kl_stage2_sweep(s, KL_SWEEP_BATCH);
		racepoint("mmu-zapped");
		(void)kl_mmu_flush(s->vm, s->hit || s->garbage.head, true, f);
		s->hit = false;
		if (!more && !s->garbage.head)
			break;
		kl_write_unlock(&mmu->lock);
		kl_pt_garbage_free(&s->garbage);
		racepoint("mmu-batch");
		kl_write_lock(&mmu->lock);
		if (!more)
			break;
	}
	f->leaves += s->leaves;
}

void kl_mmu_zap_range(struct kl_vm *vm, unsigned as, kl_gfn_t first, kl_gfn_t last,
		      const char *cause)
{
	struct kl_sweep s = {.vm = vm, .as = as, .next = first, .last = last, .what = KL_SWEEP_ZAP};
	struct kl_flush_report f = {.begun_ns = vm->mmu->trace ? kl_trace_ns() : 0};

	kl_write_lock(&vm->mmu->lock);
	kl_mmu_sweep_locked(&s, &f);
	kl_write_unlock(&vm->mmu->lock);
	if (KL_UNLIKELY(vm->mmu->trace))
		kl_mmu_trace_begin(vm, NULL, cause, first, last, &f);
}

static void zap_all(struct kl_vm *vm, unsigned as, const char *cause)
{
	struct kl_flush_report f = {.begun_ns = vm->mmu->trace ? kl_trace_ns() : 0};
	struct kl_mmu *mmu = vm->mmu;

	kl_write_lock(&mmu->lock);
	if (KL_UNLIKELY(mmu->trace))
		f.leaves = kl_stage2_leaves(vm, as);
	if (kl_stage2_detach_all(vm, as)) {
		racepoint("mmu-detached");
		(void)kl_mmu_flush(vm, true, true, &f);
		kl_stage2_bury_detached(vm, as);
	}
	kl_write_unlock(&mmu->lock);
	kl_graveyard_reap(&mmu->graveyard, REAP_AT_ONCE);
	if (KL_UNLIKELY(mmu->trace))
		kl_mmu_trace_begin(vm, NULL, cause, 0, KL_MAX_GFN + 1, &f);
}

void kl_mmu_zap_slot(struct kl_vm *vm, const struct kl_memslot *slot)
{
	if (atomic_load_explicit(&vm->slot_zap_all_quirk, memory_order_relaxed))
		zap_all(vm, slot->as_id, "slot removed (all)");
	else
		kl_mmu_zap_range(vm, slot->as_id, slot->base_gfn, slot->base_gfn + slot->npages,
				 "slot removed");
}

/* As KVM: everything goes. The generation is odd, so no MMIO entry can be made meanwhile. */
void kl_mmu_zap_mmio(struct kl_vm *vm)
{
	for (unsigned as = 0; as < KL_NR_AS; as++)
		zap_all(vm, as, "MMIO generation wrapped");
}
