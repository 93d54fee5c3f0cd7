/* SPDX-License-Identifier: MIT */
#include "base/failpoint.h"
#include "base/log.h"
#include "base/pool.h"
#include "mmu/stage2.h"

/* ---- leaves and their statistics --------------------------------------------------- */

static kl_stat_t *level_stat(struct kl_vm *vm, unsigned level)
{
	return level == 1   ? &vm->stats.pages_4k
	       : level == 2 ? &vm->stats.pages_2m
			    : &vm->stats.pages_1g;
}

static void count_leaf(struct kl_vm *vm, unsigned as, unsigned level, uint64_t n)
{
	kl_stat_add(level_stat(vm, level), n);
	if (as)
		kl_stat_add(&vm->mmu->leaves[as][level], n);
}

void kl_stage2_count(struct kl_vm *vm, unsigned as, unsigned level, uint64_t n)
{
	count_leaf(vm, as, level, n);
}

static void count_change(struct kl_vm *vm, unsigned as, uint64_t old, uint64_t new)
{
	if (kl_spte_is_leaf(new) == kl_spte_is_leaf(old))
		return;
	if (kl_spte_is_leaf(new))
		count_leaf(vm, as, kl_spte_level(new), 1);
	else
		count_leaf(vm, as, kl_spte_level(old), (uint64_t)-1);
}

bool kl_spte_cas(struct kl_vm *vm, unsigned as, kl_spte_t *sptep, uint64_t old, uint64_t new)
{
	if (!atomic_compare_exchange_strong(sptep, &old, new))
		return false;
	count_change(vm, as, old, new);
	return true;
}

/* ---- building ---------------------------------------------------------------------- */

static struct kl_pt *new_table(struct kl_mmu *mmu)
{
	if (kl_failpoint("mmu-table"))
		return NULL;
	kl_graveyard_reap(&mmu->graveyard, 2);
	return kl_page_alloc();
}

kl_spte_t *kl_stage2_make(struct kl_mmu *mmu, unsigned as, kl_gfn_t gfn, unsigned *level)
{
	struct kl_pt *pt = mmu->root[as];
	unsigned want = *level;

	kl_assert_held(&mmu->lock);
	for (unsigned l = KL_PT_LEVELS;; l--) {
		kl_spte_t *p = &pt->e[kl_pt_index(gfn, l)];
		uint64_t spte = atomic_load_explicit(p, memory_order_acquire);

		if (!spte && l > want) {
			struct kl_pt *child = new_table(mmu);
			uint64_t new = (uint64_t)child | KL_SPTE_PRESENT | KL_SPTE_TABLE;

			if (!child)
				return NULL;
			if (atomic_compare_exchange_strong(p, &spte, new))
				spte = new;
			else
				kl_page_free(child); /* another fault was first */
		}
		if (!(spte & KL_SPTE_TABLE)) {
			*level = l;
			return p;
		}
		pt = kl_spte_table(spte);
	}
}

/* ---- sweeping ---------------------------------------------------------------------- */

/* Take @bits off a leaf, to which others may add bits at the same time. True if any was set. */
static bool take_bits(kl_spte_t *p, uint64_t spte, uint64_t bits)
{
	return (spte & bits) && (atomic_fetch_and(p, ~bits) & bits);
}

/* A vCPU that is about to set ACCESSED fails to: its compare-and-swap finds something else. */
static bool zap_entry(struct kl_sweep *s, kl_spte_t *p, uint64_t spte)
{
	atomic_store_explicit(p, 0, memory_order_release);
	if (!kl_spte_is_leaf(spte))
		return false;
	s->zapped[kl_spte_level(spte)]++;
	return true;
}

/* An event on the one memory of a slot is none on the other (F3). */
static bool concerned(const struct kl_sweep *s, uint64_t spte)
{
	return s->only == KL_SWEEP_BOTH || !kl_spte_is_leaf(spte) ||
	       !(spte & KL_SPTE_GMEM) == (s->only == KL_SWEEP_HVA);
}

/* True if the entry counts as a hit. */
static bool sweep_entry(struct kl_sweep *s, kl_spte_t *p, uint64_t spte)
{
	if (!concerned(s, spte))
		return false;
	switch (s->what) {
	case KL_SWEEP_ZAP:
		return zap_entry(s, p, spte);
	case KL_SWEEP_AGE:
		return kl_spte_is_leaf(spte) && take_bits(p, spte, KL_SPTE_ACCESSED);
	case KL_SWEEP_MAPPED:
		return kl_spte_is_leaf(spte);
	case KL_SWEEP_YOUNG:
		return kl_spte_is_leaf(spte) && (spte & KL_SPTE_ACCESSED);
	}
	return false;
}

static bool is_empty(struct kl_pt *pt)
{
	for (unsigned i = 0; i < KL_PT_ENTRIES; i++)
		if (atomic_load_explicit(&pt->e[i], memory_order_relaxed))
			return false;
	return true;
}

/* Who only looks need not look further. */
static bool found(const struct kl_sweep *s)
{
	return s->hit && (s->what == KL_SWEEP_MAPPED || s->what == KL_SWEEP_YOUNG);
}

/* @base: first gfn of @pt. Stops when the budget is used up; s->next tells where. */
static void sweep_table(struct kl_sweep *s, struct kl_pt *pt, unsigned level, kl_gfn_t base)
{
	unsigned shift = KL_PT_BITS * (level - 1);
	unsigned i = s->next > base ? (unsigned)((s->next - base) >> shift) : 0;

	for (; i < KL_PT_ENTRIES && s->next < s->last; i++) {
		kl_gfn_t lo = base + ((uint64_t)i << shift);
		kl_gfn_t hi = lo + (1ull << shift);
		kl_spte_t *p = &pt->e[i];
		uint64_t spte = atomic_load_explicit(p, memory_order_relaxed);

		if (!s->budget)
			return;
		s->budget--;
		if (spte & KL_SPTE_TABLE) {
			struct kl_pt *child = kl_spte_table(spte);

			sweep_table(s, child, level - 1, lo);
			if (s->next < kl_min(hi, s->last) || found(s))
				return;
			if (s->what == KL_SWEEP_ZAP && !s->keep_tables && is_empty(child)) {
				atomic_store_explicit(p, 0, memory_order_release);
				kl_pt_garbage_add(&s->garbage, child);
			}
		} else if (spte && sweep_entry(s, p, spte)) {
			s->hit = true;
			s->leaves++;
			if (found(s)) {
				s->next = s->last;
				return;
			}
		}
		s->next = hi;
	}
}

bool kl_stage2_sweep(struct kl_sweep *s, unsigned budget)
{
	struct kl_mmu *mmu = s->vm->mmu;

	kl_assert_held(&mmu->lock);
	s->budget = budget;
	sweep_table(s, mmu->root[s->as], KL_PT_LEVELS, 0);
	for (unsigned level = 1; level <= KL_PT_LEAF_LEVEL; level++) {
		if (s->zapped[level])
			count_leaf(s->vm, s->as, level, -s->zapped[level]);
		s->zapped[level] = 0;
	}
	return s->next < s->last;
}

/* ---- all at once ------------------------------------------------------------------- */

/* Entries of the root that are ever used: it stands for more than there are addresses. */
#define ROOT_ENTRIES ((unsigned)(KL_MAX_GFN >> (KL_PT_BITS * (KL_PT_LEVELS - 1))) + 1)
_Static_assert(ROOT_ENTRIES <= 64, "so that emptying the root takes constant time");

static uint64_t leaves_of(struct kl_vm *vm, unsigned as, unsigned level)
{
	uint64_t n = kl_stat_get(&vm->mmu->leaves[as][level]);

	if (!as) {
		n = kl_stat_get(level_stat(vm, level));
		for (unsigned other = 1; other < KL_NR_AS; other++)
			n -= kl_stat_get(&vm->mmu->leaves[other][level]);
	}
	return n;
}

uint64_t kl_stage2_leaves(struct kl_vm *vm, unsigned as)
{
	uint64_t n = 0;

	kl_assert_held(&vm->mmu->lock);
	for (unsigned level = 1; level <= KL_PT_LEAF_LEVEL; level++)
		n += leaves_of(vm, as, level);
	return n;
}

bool kl_stage2_detach_all(struct kl_vm *vm, unsigned as)
{
	struct kl_mmu *mmu = vm->mmu;
	bool any = false;

	kl_assert_held(&mmu->lock);
	for (unsigned i = 0; i < ROOT_ENTRIES; i++) {
		kl_spte_t *p = &mmu->root[as]->e[i];
		uint64_t spte = atomic_load_explicit(p, memory_order_relaxed);

		if (spte & KL_SPTE_TABLE) {
			atomic_store_explicit(p, spte & KL_SPTE_ADDR, memory_order_release);
			any = true;
		}
	}
	atomic_store_explicit(&mmu->mmio_tables[as], 0, memory_order_relaxed);
	for (unsigned level = 1; any && level <= KL_PT_LEAF_LEVEL; level++)
		count_leaf(vm, as, level, -leaves_of(vm, as, level));
	return any;
}

void kl_stage2_bury_detached(struct kl_vm *vm, unsigned as)
{
	struct kl_mmu *mmu = vm->mmu;

	kl_assert_held(&mmu->lock);
	for (unsigned i = 0; i < ROOT_ENTRIES; i++) {
		kl_spte_t *p = &mmu->root[as]->e[i];
		uint64_t spte = atomic_load_explicit(p, memory_order_relaxed);

		if (!spte || (spte & KL_SPTE_TABLE))
			continue;
		kl_graveyard_bury(&mmu->graveyard, (struct kl_pt *)spte, KL_PT_LEVELS - 1);
		atomic_store_explicit(p, 0, memory_order_relaxed);
	}
}
