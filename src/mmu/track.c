/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <stdlib.h>

#include "base/failpoint.h"
#include "base/log.h"
#include "base/racepoint.h"
#include "host/guard.h"
#include "host/sys.h"
#include "mem/subscribers.h"
#include "mmu/track.h"
#include "mmu/zap.h"

#define MAX_COUNT UINT16_MAX

/* Of one slot. In one mapping, of which the kernel provides what is touched. */
struct kl_track_counts {
	kl_gfn_t base;
	uint64_t npages;
	uint64_t nr; /* gfns that are tracked; mmu_lock for writing */
	size_t size; /* of the mapping */
	_Atomic uint16_t *count;
	/* How many gfns are tracked in the range of a leaf of level 2 and 3; mmu_lock. */
	uint32_t *large[KL_PT_LEAF_LEVEL - 1];
};

typedef _Atomic(struct kl_track_counts *) counts_ptr;

struct kl_track {
	struct kl_srcu srcu; /* reports */
	_Atomic(struct kl_tracker *) trackers;
	unsigned nr_external;                  /* slots_lock */
	_Atomic(counts_ptr *) by_id[KL_NR_AS]; /* written under mmu_lock for writing */
};

#define BY_ID_BYTES (KL_USER_MEM_SLOTS * sizeof(counts_ptr))

int kl_track_create(struct kl_vm *vm)
{
	vm->track = kl_failpoint("track-create") ? NULL : calloc(1, sizeof(*vm->track));
	if (!vm->track)
		return -ENOMEM;
	kl_srcu_init(&vm->track->srcu);
	return 0;
}

/* ---- counts -------------------------------------------------------------------------------- */

/* Which of the entries of @level, from the one of base on, holds @gfn. */
static uint64_t large_index(const struct kl_track_counts *c, kl_gfn_t gfn, unsigned level)
{
	return gfn / kl_pt_span(level) - c->base / kl_pt_span(level);
}

static struct kl_track_counts *new_counts(kl_gfn_t base, uint64_t npages)
{
	struct kl_track_counts c = {.base = base, .npages = npages}, *new;
	size_t large[KL_PT_LEAF_LEVEL - 1], at = sizeof(c);

	for (unsigned level = 2; level <= KL_PT_LEAF_LEVEL; level++) {
		large[level - 2] = at;
		at += (large_index(&c, base + npages - 1, level) + 1) * sizeof(uint32_t);
	}
	c.size = (at + npages * sizeof(*c.count) + KL_PAGE_SIZE - 1) & KL_PAGE_MASK;
	new = kl_failpoint("track-counts") ? NULL : kl_sys_map(c.size);
	if (!new)
		return NULL;
	c.count = (void *)((char *)new + at);
	for (unsigned i = 0; i < KL_ARRAY_SIZE(large); i++)
		c.large[i] = (void *)((char *)new + large[i]);
	*new = c;
	return new;
}

static void free_counts(struct kl_track_counts *c)
{
	if (c)
		kl_sys_unmap(c, c->size);
}

static struct kl_track_counts *counts_of(struct kl_vm *vm, unsigned as, unsigned id)
{
	counts_ptr *by_id = atomic_load_explicit(&vm->track->by_id[as], memory_order_acquire);

	return by_id ? atomic_load_explicit(&by_id[id], memory_order_acquire) : NULL;
}

static unsigned count(const struct kl_track_counts *c, kl_gfn_t gfn)
{
	return atomic_load_explicit(&c->count[gfn - c->base], memory_order_acquire);
}

/* The gfn's count leaves 0 or comes back to it. Context: mmu_lock for writing. */
static void note_tracked(struct kl_vm *vm, struct kl_track_counts *c, kl_gfn_t gfn, int by)
{
	for (unsigned level = 2; level <= KL_PT_LEAF_LEVEL; level++)
		c->large[level - 2][large_index(c, gfn, level)] += (uint32_t)by;
	c->nr += (uint64_t)by;
	atomic_fetch_add(&vm->tracked_pages, (uint64_t)by);
}

bool kl_track_in_leaf(struct kl_vm *vm, unsigned as, unsigned id, kl_gfn_t gfn, unsigned level)
{
	struct kl_track_counts *c;

	kl_assert_held(&vm->mmu->lock);
	if (KL_LIKELY(!kl_track_any(vm)))
		return false;
	c = counts_of(vm, as, id);
	if (!c)
		return false;
	return level > 1 ? c->large[level - 2][large_index(c, gfn, level)] : count(c, gfn);
}

bool kl_track_is(struct kl_vm *vm, unsigned as, kl_gfn_t gfn)
{
	const struct kl_memslot *slot;
	struct kl_track_counts *c;
	bool is = false;
	int token;

	if (!kl_track_any(vm))
		return false;
	token = kl_srcu_read_lock(&vm->srcu);
	slot = kl_memslot_find(kl_memslots(vm, as), gfn);
	c = slot ? counts_of(vm, as, slot->id) : NULL;
	racepoint("track-looks");
	/* A slot that moves leaves its counts behind. */
	if (c && gfn - c->base < c->npages)
		is = count(c, gfn);
	kl_srcu_read_unlock(&vm->srcu, token);
	return is;
}

/* ---- protection ---------------------------------------------------------------------------- */

/* T3. Context: mmu_lock for writing; it may be released and taken again. */
static void protect(struct kl_vm *vm, unsigned as, kl_gfn_t gfn)
{
	struct kl_sweep zap = {
		.vm = vm, .as = as, .next = gfn, .last = gfn + 1, .what = KL_SWEEP_ZAP};
	struct kl_flush_report f = {0};
	unsigned level;
	uint64_t spte;
	kl_spte_t *p = kl_stage2_walk(vm->mmu, as, gfn, &level, &spte);

	if (!kl_spte_is_leaf(spte))
		return;
	if (level > 1) {
		kl_mmu_sweep_locked(&zap, &f);
	} else {
		spte = atomic_fetch_or(p, KL_SPTE_TRACKED);
		racepoint("track-protected");
		(void)kl_mmu_flush(vm, spte & KL_SPTE_WRITABLE, true, &f);
	}
}

/* What the vCPUs have in their TLBs may be used: it only makes them look again. */
static void unprotect(struct kl_vm *vm, unsigned as, kl_gfn_t gfn)
{
	unsigned level;
	uint64_t spte;
	kl_spte_t *p = kl_stage2_walk(vm->mmu, as, gfn, &level, &spte);

	if (kl_spte_is_leaf(spte))
		atomic_fetch_and(p, ~KL_SPTE_TRACKED);
}

static int add_locked(struct kl_vm *vm, unsigned as, struct kl_track_counts *c, kl_gfn_t gfn,
		      bool *first)
{
	unsigned n = count(c, gfn);

	kl_assert_held(&vm->mmu->lock);
	if (n == MAX_COUNT)
		return -EOVERFLOW;
	*first = !n;
	atomic_store_explicit(&c->count[gfn - c->base], (uint16_t)(n + 1), memory_order_release);
	if (!n) {
		note_tracked(vm, c, gfn, 1);
		racepoint("track-counted");
		protect(vm, as, gfn);
	}
	return 0;
}

static int remove_locked(struct kl_vm *vm, unsigned as, struct kl_track_counts *c, kl_gfn_t gfn)
{
	unsigned n = count(c, gfn);

	kl_assert_held(&vm->mmu->lock);
	if (!n)
		return -ENOENT;
	atomic_store_explicit(&c->count[gfn - c->base], (uint16_t)(n - 1), memory_order_release);
	if (n == 1) {
		note_tracked(vm, c, gfn, -1);
		unprotect(vm, as, gfn);
	}
	return 0;
}

/* Where the counts of a gfn are to be. */
struct place {
	const struct kl_memslot *slot; /* in the section only */
	unsigned id;
	kl_gfn_t base;
	uint64_t npages;
};

/* Context: reader section. */
static bool find_place(struct kl_vm *vm, unsigned as, kl_gfn_t gfn, struct place *p)
{
	const struct kl_memslot *slot = kl_memslot_find(kl_memslots(vm, as), gfn);

	/* Nothing is added to what is on its way out: its counts may be gone. */
	if (!slot || slot->invalid)
		return false;
	*p = (struct place){slot, slot->id, slot->base_gfn, slot->npages};
	return true;
}

/* By slot id, for address space @as; NULL: out of memory. Context: mmu_lock for writing. */
static counts_ptr *make_index(struct kl_vm *vm, unsigned as)
{
	counts_ptr *by_id = atomic_load_explicit(&vm->track->by_id[as], memory_order_relaxed);

	if (by_id)
		return by_id;
	by_id = kl_failpoint("track-index") ? NULL : kl_sys_map(BY_ID_BYTES);
	atomic_store_explicit(&vm->track->by_id[as], by_id, memory_order_release);
	return by_id;
}

/* The slot of @p may have changed since. 0 or -ENOMEM; afterwards look again. */
static int make_counts(struct kl_vm *vm, unsigned as, kl_gfn_t gfn, const struct place *p)
{
	struct kl_track_counts *c = new_counts(p->base, p->npages);
	counts_ptr *by_id;
	struct place now;
	int token, r = 0;

	if (!c)
		return -ENOMEM;
	token = kl_srcu_read_lock(&vm->srcu);
	if (find_place(vm, as, gfn, &now) && now.id == p->id && now.base == p->base &&
	    now.npages == p->npages) {
		kl_write_lock(&vm->mmu->lock);
		by_id = make_index(vm, as);
		if (!by_id)
			r = -ENOMEM;
		else if (!atomic_load_explicit(&by_id[p->id], memory_order_relaxed)) {
			atomic_store_explicit(&by_id[p->id], c, memory_order_release);
			c = NULL;
		}
		kl_write_unlock(&vm->mmu->lock);
	}
	kl_srcu_read_unlock(&vm->srcu, token);
	free_counts(c);
	return r;
}

int kl_track_add(struct kl_vm *vm, unsigned as, kl_gfn_t gfn)
{
	struct kl_track_counts *c;
	bool first = false, found;
	struct place p;
	int token, r;

	for (;;) {
		token = kl_srcu_read_lock(&vm->srcu);
		found = find_place(vm, as, gfn, &p);
		c = found ? counts_of(vm, as, p.id) : NULL;
		if (c || !found)
			break;
		kl_srcu_read_unlock(&vm->srcu, token);
		r = make_counts(vm, as, gfn, &p);
		if (r)
			return r;
	}
	r = -ENOENT;
	if (c) {
		racepoint("track-adds");
		/* In the section: whoever takes the slot away waits for it. */
		kl_write_lock(&vm->mmu->lock);
		r = add_locked(vm, as, c, gfn, &first);
		kl_write_unlock(&vm->mmu->lock);
	}
	/* Who holds a cache of the page has looked whether to report, or will find that he has to.
	 */
	if (!r && first)
		kl_gpc_close_page(vm, p.slot, gfn);
	kl_srcu_read_unlock(&vm->srcu, token);
	return r;
}

int kl_track_remove(struct kl_vm *vm, unsigned as, kl_gfn_t gfn)
{
	int token = kl_srcu_read_lock(&vm->srcu), r = -ENOENT;
	struct kl_track_counts *c;
	struct place p;

	if (find_place(vm, as, gfn, &p) && (c = counts_of(vm, as, p.id))) {
		kl_write_lock(&vm->mmu->lock);
		r = remove_locked(vm, as, c, gfn);
		kl_write_unlock(&vm->mmu->lock);
	}
	kl_srcu_read_unlock(&vm->srcu, token);
	return r;
}

/* ---- slots --------------------------------------------------------------------------------- */

bool kl_track_forbids_move(struct kl_vm *vm)
{
	kl_assert_held(&vm->slots_lock);
	return vm->track->nr_external;
}

struct kl_track_counts *kl_track_detach(struct kl_vm *vm, const struct kl_memslot *slot)
{
	struct kl_track_counts *c = counts_of(vm, slot->as_id, slot->id);

	if (!c)
		return NULL;
	/* A fault reads counts under the lock. */
	kl_write_lock(&vm->mmu->lock);
	atomic_store_explicit(&atomic_load(&vm->track->by_id[slot->as_id])[slot->id], NULL,
			      memory_order_release);
	atomic_fetch_sub(&vm->tracked_pages, c->nr);
	kl_write_unlock(&vm->mmu->lock);
	return c;
}

void kl_track_slot_gone(struct kl_vm *vm, const struct kl_memslot *slot, struct kl_track_counts *c)
{
	struct kl_track *track = vm->track;
	struct kl_tracker *t = atomic_load_explicit(&track->trackers, memory_order_relaxed);

	kl_assert_held(&vm->slots_lock);
	free_counts(c);
	if (!t)
		return;
	racepoint("track-slot-gone");
	kl_rank_wait(KL_RANK_TRACK_WAIT);
	kl_srcu_synchronize(&track->srcu);
	kl_self.reports++;
	for (; t; t = atomic_load_explicit(&t->next, memory_order_relaxed))
		if (t->ops.track_remove_region)
			t->ops.track_remove_region(t->opaque, slot->as_id, slot->base_gfn,
						   slot->npages);
	kl_self.reports--;
}

/* ---- trackers ------------------------------------------------------------------------------ */

void kl_track_register(struct kl_vm *vm, struct kl_tracker *t)
{
	struct kl_track *track = vm->track;

	kl_mutex_lock(&vm->slots_lock);
	atomic_store_explicit(&t->next, atomic_load(&track->trackers), memory_order_relaxed);
	atomic_store_explicit(&track->trackers, t, memory_order_release);
	track->nr_external += !t->internal;
	kl_mutex_unlock(&vm->slots_lock);
}

void kl_track_unregister(struct kl_vm *vm, struct kl_tracker *t)
{
	struct kl_track *track = vm->track;
	_Atomic(struct kl_tracker *) *link = &track->trackers;

	kl_mutex_lock(&vm->slots_lock);
	while (atomic_load_explicit(link, memory_order_relaxed) != t)
		link = &atomic_load_explicit(link, memory_order_relaxed)->next;
	/* Reports may be looking at it: its own link stays. */
	atomic_store_explicit(link, atomic_load(&t->next), memory_order_release);
	track->nr_external -= !t->internal;
	kl_mutex_unlock(&vm->slots_lock);
	racepoint("track-unlinked");
	kl_rank_wait(KL_RANK_TRACK_WAIT);
	kl_srcu_synchronize(&track->srcu);
}

int kl_track_begin(struct kl_vm *vm)
{
	kl_self.reports++;
	return kl_srcu_read_lock(&vm->track->srcu);
}

void kl_track_write(struct kl_vm *vm, unsigned as, kl_gpa_t gpa, const void *bytes, size_t len)
{
	struct kl_tracker *t = atomic_load_explicit(&vm->track->trackers, memory_order_acquire);

	KL_ASSERT(kl_self.reports > 0);
	for (; t; t = atomic_load_explicit(&t->next, memory_order_acquire)) {
		racepoint("track-callback");
		t->ops.track_write(t->opaque, as, gpa, bytes, len);
	}
}

void kl_track_end(struct kl_vm *vm, int token)
{
	kl_srcu_read_unlock(&vm->track->srcu, token);
	kl_self.reports--;
}

/* ---- caches -------------------------------------------------------------------------------- */

bool kl_track_cache_begin(struct kl_vm *vm, unsigned as, kl_gpa_t gpa, const void *khva, size_t len,
			  struct kl_track_copy *copy)
{
	int only_listed = kl_self.only_listed;

	if (!kl_track_is(vm, as, gpa >> KL_PAGE_SHIFT))
		return false;
	copy->token = kl_track_begin(vm);
	copy->as = as;
	copy->gpa = gpa;
	/* If it has vanished without an event, there is nothing to tell any more. */
	kl_self.only_listed = !KL_TSAN; /* the program's handlers may run, and fault themselves */
	copy->len = kl_guard_copy(copy->bytes, khva, len) ? 0 : len;
	kl_self.only_listed = only_listed;
	return true;
}

void kl_track_cache_report(struct kl_vm *vm, const struct kl_track_copy *copy)
{
	if (copy->len)
		kl_track_write(vm, copy->as, copy->gpa, copy->bytes, copy->len);
	kl_track_end(vm, copy->token);
}

void kl_track_destroy(struct kl_vm *vm)
{
	struct kl_track *track = vm->track;

	for (unsigned as = 0; track && as < KL_NR_AS; as++) {
		counts_ptr *by_id = atomic_load(&track->by_id[as]);

		for (unsigned id = 0; by_id && id < KL_USER_MEM_SLOTS; id++)
			free_counts(atomic_load_explicit(&by_id[id], memory_order_relaxed));
		if (by_id)
			kl_sys_unmap(by_id, BY_ID_BYTES);
	}
	if (track)
		kl_srcu_destroy(&track->srcu);
	free(track);
	vm->track = NULL;
}
