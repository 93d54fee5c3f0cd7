/* SPDX-License-Identifier: MIT */
/*
 * The radix table of stage 2: structure, and the one place where SPTEs change.
 *
 * Invariants
 *   - mmu->lock for reading: entries may be installed (compare-and-swap), tables linked in.
 *   - mmu->lock for writing: entries may be removed, tables unlinked.
 *   - A table that was unlinked is freed only after kl_vcpus_flush(): a vCPU IN_GUEST may
 *     still be walking it.
 */
#pragma once

#include "base/lock.h"
#include "mem/vm.h"
#include "mmu/spte.h"

struct kl_mmu {
	struct kl_rwlock lock;
	struct kl_pt *root[KL_NR_AS];
	bool flush_owed; /* lock for writing: something was zapped and not every vCPU waited for */
};

/* Tables unlinked under the write lock, chained through their first entry. */
struct kl_pt_garbage {
	struct kl_pt *head;
};
void kl_pt_garbage_free(struct kl_pt_garbage *g);

/*
 * The level-1 entry of @gfn, creating tables on the way. NULL: out of memory.
 * Context: mmu->lock for reading or writing.
 */
kl_spte_t *kl_stage2_make(struct kl_mmu *mmu, unsigned as, kl_gfn_t gfn);
/* The level-1 entry of @gfn or NULL. Context: lock held, or the vCPU IN_GUEST. */
kl_spte_t *kl_stage2_find(struct kl_mmu *mmu, unsigned as, kl_gfn_t gfn);

/* Change *@sptep from @old to @new; false if it is not @old any more. Keeps the statistics. */
bool kl_spte_cas(struct kl_vm *vm, kl_spte_t *sptep, uint64_t old, uint64_t new);

enum kl_zap_what { KL_ZAP_ALL, KL_ZAP_LEAVES, KL_ZAP_MMIO, KL_ZAP_WRITE, KL_ZAP_NOTHING };
/*
 * Zap [first, last): all entries, present leaves, MMIO entries, just the permission to write,
 * or nothing, which only tells whether there are leaves. True if a vCPU could hold a translation
 * that must be flushed. Tables that became empty go to @g, or stay if @g is NULL. Context:
 * mmu->lock for writing.
 */
bool kl_stage2_zap(struct kl_vm *vm, unsigned as, kl_gfn_t first, kl_gfn_t last,
		   enum kl_zap_what what, struct kl_pt_garbage *g);
