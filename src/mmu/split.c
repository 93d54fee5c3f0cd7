/* SPDX-License-Identifier: MIT */
#include "mmu/split.h"

#include "base/pool.h"
#include "base/racepoint.h"
#include "mem/dirty.h"
#include "mem/subscribers.h"
#include "mmu/zap.h"

bool kl_eager_page_split;

static void fill(struct kl_pt *pt, uint64_t leaf)
{
	unsigned level = kl_spte_level(leaf) - 1;
	uint64_t flags = leaf & ~(KL_SPTE_ADDR | 3ull << KL_SPTE_LEVEL_SHIFT);

	for (unsigned i = 0; i < KL_PT_ENTRIES; i++)
		atomic_store_explicit(
			&pt->e[i],
			((leaf & KL_SPTE_ADDR) + i * (kl_pt_span(level) << KL_PAGE_SHIFT)) | flags |
				(uint64_t)level << KL_SPTE_LEVEL_SHIFT,
			memory_order_relaxed);
}

/* One large leaf becomes a table of those of the next level. False: no memory. */
static bool split(struct kl_vm *vm, unsigned as, kl_spte_t *p, uint64_t leaf)
{
	struct kl_pt *pt = kl_page_alloc();
	unsigned level = kl_spte_level(leaf) - 1;

	kl_assert_held(&vm->mmu->lock);
	if (!pt)
		return false;
	fill(pt, leaf);
	racepoint("split-filled");
	/* A vCPU that looks at the leaf meanwhile may have set its ACCESSED. */
	while (!kl_spte_cas(vm, as, p, leaf, (uint64_t)pt | KL_SPTE_PRESENT | KL_SPTE_TABLE)) {
		leaf = atomic_load_explicit(p, memory_order_relaxed);
		fill(pt, leaf);
	}
	kl_stage2_count(vm, as, level, KL_PT_ENTRIES);
	return true;
}

void kl_mmu_split_range(struct kl_vm *vm, unsigned as, kl_gfn_t first, kl_gfn_t last)
{
	for (kl_gfn_t gfn = first; gfn < last;) {
		bool done = true;
		unsigned level;
		uint64_t spte;
		kl_spte_t *p;

		kl_write_lock(&vm->mmu->lock);
		p = kl_stage2_walk(vm->mmu, as, gfn, &level, &spte);
		if (kl_spte_is_leaf(spte) && level > 1)
			done = split(vm, as, p, spte);
		kl_write_unlock(&vm->mmu->lock);
		if (!done)
			return;
		/* What was a leaf of the next level but one is looked at again. */
		if (kl_spte_is_leaf(spte) && level > 2)
			continue;
		/* Where there are small leaves, or nothing, all of the entry's range has none. */
		level = level > 1 ? level : 2;
		gfn = (gfn | (kl_pt_span(level) - 1)) + 1;
	}
}

void kl_mmu_log_begun(struct kl_vm *vm, const struct kl_memslot *slot)
{
	if (kl_eager_page_split && !(vm->manual_dirty_log & KVM_DIRTY_LOG_INITIALLY_SET))
		kl_mmu_split_range(vm, slot->as_id, slot->base_gfn, slot->base_gfn + slot->npages);
}

void kl_mmu_log_cleared(struct kl_vm *vm, const struct kl_memslot *slot, uint64_t first,
			uint64_t last)
{
	if (kl_eager_page_split && (vm->manual_dirty_log & KVM_DIRTY_LOG_INITIALLY_SET))
		kl_mmu_split_range(vm, slot->as_id, slot->base_gfn + first,
				   slot->base_gfn + kl_min(last, slot->npages));
}

/* Faults make small leaves large again: where they are not there. */
void kl_mmu_log_ended(struct kl_vm *vm, const struct kl_memslot *slot)
{
	if (kl_eager_page_split)
		kl_mmu_zap_range(vm, slot->as_id, slot->base_gfn, slot->base_gfn + slot->npages,
				 "log ended");
}
