/* SPDX-License-Identifier: MIT */
#include "base/log.h"
#include "base/pool.h"
#include "mmu/stage2.h"

void kl_pt_garbage_free(struct kl_pt_garbage *g)
{
	while (g->head) {
		struct kl_pt *pt = g->head;

		g->head = (struct kl_pt *)atomic_load_explicit(&pt->e[0], memory_order_relaxed);
		kl_page_free(pt);
	}
}

bool kl_spte_cas(struct kl_vm *vm, kl_spte_t *sptep, uint64_t old, uint64_t new)
{
	if (!atomic_compare_exchange_strong(sptep, &old, new))
		return false;
	if (kl_spte_is_leaf(new) != kl_spte_is_leaf(old))
		kl_stat_add(&vm->stats.pages_4k, kl_spte_is_leaf(new) ? 1 : (uint64_t)-1);
	return true;
}

kl_spte_t *kl_stage2_make(struct kl_mmu *mmu, unsigned as, kl_gfn_t gfn)
{
	struct kl_pt *pt = mmu->root[as];

	kl_assert_held(&mmu->lock);
	for (unsigned level = KL_PT_LEVELS; level > 1; level--) {
		kl_spte_t *p = &pt->e[kl_pt_index(gfn, level)];
		uint64_t spte = atomic_load_explicit(p, memory_order_acquire);

		if (!spte) {
			struct kl_pt *child = kl_page_alloc();
			uint64_t new = (uint64_t)child | KL_SPTE_PRESENT | KL_SPTE_TABLE;

			if (!child)
				return NULL;
			if (atomic_compare_exchange_strong(p, &spte, new))
				spte = new;
			else
				kl_page_free(child); /* another fault was first */
		}
		pt = kl_spte_table(spte);
	}
	return &pt->e[kl_pt_index(gfn, 1)];
}

kl_spte_t *kl_stage2_find(struct kl_mmu *mmu, unsigned as, kl_gfn_t gfn)
{
	struct kl_pt *pt = mmu->root[as];

	for (unsigned level = KL_PT_LEVELS; level > 1; level--) {
		uint64_t spte =
			atomic_load_explicit(&pt->e[kl_pt_index(gfn, level)], memory_order_acquire);

		if (!spte)
			return NULL;
		pt = kl_spte_table(spte);
	}
	return &pt->e[kl_pt_index(gfn, 1)];
}

static bool zap_leaf(struct kl_vm *vm, kl_spte_t *p, enum kl_zap_what what)
{
	uint64_t spte = atomic_load_explicit(p, memory_order_relaxed);
	uint64_t new = 0;

	if (!spte)
		return false;
	if (what == KL_ZAP_WRITE) {
		if (!kl_spte_is_leaf(spte) || !(spte & KL_SPTE_WRITABLE))
			return false;
		new = spte & ~KL_SPTE_WRITABLE;
	} else if (what == KL_ZAP_MMIO && !(spte & KL_SPTE_MMIO)) {
		return false;
	} else if (what == KL_ZAP_NOTHING) {
		return kl_spte_is_leaf(spte);
	} else if (what == KL_ZAP_LEAVES && !kl_spte_is_leaf(spte)) {
		return false;
	}
	/* The write lock is held: nobody else changes entries. */
	kl_spte_cas(vm, p, spte, new);
	return kl_spte_is_leaf(spte);
}

struct zap {
	struct kl_vm *vm;
	kl_gfn_t first, last;
	enum kl_zap_what what;
	struct kl_pt_garbage *garbage;
	bool flush;
};

/* @base: first gfn of @pt. Returns true if @pt is empty afterwards. */
static bool zap_table(struct zap *z, struct kl_pt *pt, unsigned level, kl_gfn_t base)
{
	uint64_t span = kl_pt_span(level);
	unsigned used = 0;

	for (unsigned i = 0; i < KL_PT_ENTRIES; i++) {
		kl_gfn_t lo = base + i * span;
		kl_spte_t *p = &pt->e[i];
		uint64_t spte = atomic_load_explicit(p, memory_order_relaxed);

		if (!spte)
			continue;
		if (lo >= z->last || lo + span <= z->first) {
			used++;
			continue;
		}
		if (level == 1) {
			z->flush |= zap_leaf(z->vm, p, z->what);
		} else {
			struct kl_pt *child = kl_spte_table(spte);

			if (zap_table(z, child, level - 1, lo) && z->garbage) {
				atomic_store_explicit(p, 0, memory_order_release);
				atomic_store_explicit(&child->e[0], (uint64_t)z->garbage->head,
						      memory_order_relaxed);
				z->garbage->head = child;
			}
		}
		used += atomic_load_explicit(p, memory_order_relaxed) != 0;
	}
	return used == 0;
}

bool kl_stage2_zap(struct kl_vm *vm, unsigned as, kl_gfn_t first, kl_gfn_t last,
		   enum kl_zap_what what, struct kl_pt_garbage *g)
{
	struct zap z = {.vm = vm, .first = first, .last = last, .what = what, .garbage = g};

	kl_assert_held(&vm->mmu->lock);
	zap_table(&z, vm->mmu->root[as], KL_PT_LEVELS, 0);
	return z.flush;
}
