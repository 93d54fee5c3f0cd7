/* SPDX-License-Identifier: MIT */
/*
 * The radix table of stage 2: structure, and the one place where SPTEs change.
 *
 * Invariants
 *   - mmu->lock for reading: entries may be installed (compare-and-swap), tables linked in.
 *   - mmu->lock for writing: entries may be removed, tables unlinked.
 *   - The ACCESSED bit of a leaf may come at any time (a vCPU IN_GUEST, without a lock), and go
 *     under the lock for reading. So nothing that keeps a leaf may lose a bit of it (M7).
 *   - A table that was unlinked is freed only after kl_vcpus_flush(): a vCPU IN_GUEST may
 *     still be walking it.
 *   - A table is never replaced by a leaf: it is zapped first. So is a leaf before a table takes
 * its place, but for a split (mmu/split.h), under the lock for writing.
 */
#pragma once

#include "base/lock.h"
#include "mem/vm.h"
#include "mmu/graveyard.h"
#include "mmu/spte.h"

struct kl_mmu_trace;

struct kl_mmu {
	struct kl_rwlock lock;
	struct kl_pt *root[KL_NR_AS];
	bool flush_owed; /* lock for writing: something was zapped and not every vCPU waited for */
	/*
	 * Leaves that exist, by level; of address space 0: the statistics less the others. A
	 * root that is emptied at once takes its count with it.
	 */
	_Atomic uint64_t leaves[KL_NR_AS][KL_PT_LEAF_LEVEL + 1];
	_Atomic uint64_t mmio_tables[KL_NR_AS]; /* how often one was missing for an MMIO entry */
	struct kl_graveyard graveyard;
	struct kl_mutex mapping_lock; /* mapping, below */
	struct kl_mapping_cache {
		uint64_t start, end, page_size;
		uint64_t seq, generation[KL_NR_AS]; /* when it was asked for */
	} mapping;
	struct kl_mmu_trace *trace; /* NULL: off */
};

/* 32 GiB of MMIO, if the guest touches it from end to end. */
#define KL_MAX_MMIO_TABLES 16384

/*
 * The entry of @gfn at @*level, creating tables on the way; or the leaf of a higher level that
 * is in the way, or the level-1 entry where there is a table instead. *level tells which.
 * NULL: out of memory.
 * Context: mmu->lock for reading or writing.
 */
kl_spte_t *kl_stage2_make(struct kl_mmu *mmu, unsigned as, kl_gfn_t gfn, unsigned *level);

/*
 * Where the walk for @gfn ends: the first entry that is not a table, of *level.
 * Context: lock held, or the vCPU IN_GUEST.
 */
KL_INLINE kl_spte_t *kl_stage2_walk(struct kl_mmu *mmu, unsigned as, kl_gfn_t gfn, unsigned *level,
				    uint64_t *spte)
{
	struct kl_pt *pt = mmu->root[as];

	for (unsigned l = KL_PT_LEVELS;; l--) {
		kl_spte_t *p = &pt->e[kl_pt_index(gfn, l)];

		*spte = atomic_load_explicit(p, memory_order_acquire);
		if (!(*spte & KL_SPTE_TABLE)) {
			*level = l;
			return p;
		}
		pt = kl_spte_table(*spte);
	}
}

/* Change *@sptep from @old to @new; false if it is not @old any more. Keeps the statistics. */
bool kl_spte_cas(struct kl_vm *vm, unsigned as, kl_spte_t *sptep, uint64_t old, uint64_t new);

/* @n leaves of @level came, by which no entry that is counted was changed. */
void kl_stage2_count(struct kl_vm *vm, unsigned as, unsigned level, uint64_t n);

enum kl_sweep_what {
	KL_SWEEP_ZAP,    /* take every entry away, and tables that became empty */
	KL_SWEEP_AGE,    /* take ACCESSED */
	KL_SWEEP_MAPPED, /* only look: is there a leaf? */
	KL_SWEEP_YOUNG,  /* only look: is there a leaf with ACCESSED? */
};

/*
 * A walk over the entries of [next, last), in batches, so that the lock is not held for long
 * (M5). @hit: a leaf was changed (or found), so a vCPU may hold a translation that must be
 * flushed. Tables that were unlinked are in @garbage.
 */
struct kl_sweep {
	struct kl_vm *vm;
	unsigned as;
	kl_gfn_t next, last;
	enum kl_sweep_what what;
	enum { KL_SWEEP_BOTH, KL_SWEEP_HVA, KL_SWEEP_GMEM } only; /* leaves by what backs them */
	bool keep_tables; /* who may not wait for vCPUs cannot free tables */
	bool hit;
	unsigned budget;                       /* entries that may still be looked at */
	uint64_t zapped[KL_PT_LEAF_LEVEL + 1]; /* by level, not yet counted */
	uint64_t leaves; /* changed or found, of any level, over all batches */
	struct kl_pt_garbage garbage;
};
#define KL_SWEEP_BATCH     4096
#define KL_SWEEP_UNLIMITED (~0u)
/*
 * Up to @budget entries. True if there is more to do, at @next.
 * Context: mmu->lock for writing; for reading is enough for AGE, MAPPED and YOUNG.
 */
bool kl_stage2_sweep(struct kl_sweep *s, unsigned budget);

/* How many leaves address space @as has. Context: mmu->lock for writing. */
uint64_t kl_stage2_leaves(struct kl_vm *vm, unsigned as);

/*
 * Take everything away at once, in constant time: detach, flush, then bury. Between the two the
 * lock is not released. True if there was anything.
 * Context: mmu->lock for writing.
 */
bool kl_stage2_detach_all(struct kl_vm *vm, unsigned as);
void kl_stage2_bury_detached(struct kl_vm *vm, unsigned as);

/*
 * Is a bracket open over some of the gfns [first, last), or over ranges on both sides of them?
 * Context: mmu->lock, so none begins. One may end: look at mmu_invalidate_seq afterwards.
 */
bool kl_in_bracket(struct kl_vm *vm, kl_gfn_t first, kl_gfn_t last);
