/* SPDX-License-Identifier: MIT */
/*
 * Stage-2 lookups and faults (M1-M4, M7, N7).
 *
 * Between looking a slot up and installing its SPTE nothing is held, because making the host
 * page present may sleep. What could happen meanwhile, and what catches it, all under the mmu
 * lock held for reading:
 *   - the range is being unmapped               in_progress covers the gfn
 *   - it was unmapped and the bracket is over    mmu_invalidate_seq moved
 *   - the slot was deleted, moved, or changed    the generation moved, or is odd  [B31]
 *   - its frame became private, or shared, or the guest_memfd was closed: as for an unmapping
 * What happens after the SPTE is in is caught by the zap, which takes the lock for writing.
 */
#include <errno.h>
#include <sched.h>

#include "base/log.h"
#include "base/racepoint.h"
#include "host/populate.h"
#include "host/uffd.h"
#include "mem/dirty.h"
#include "mem/dirty_ring.h"
#include "mem/gmem.h"
#include "mem/private.h"
#include "mem/vm.h"
#include "mmu/huge.h"
#include "mmu/mmu.h"
#include "mmu/split.h"
#include "mmu/stage2.h"
#include "mmu/trace.h"
#include "mmu/track.h"
#include "mmu/zap.h"

/* ---- lookups ----------------------------------------------------------------------- */

/* A vCPU's first look at a leaf since it was made or aged (N6). The leaf may change or go. */
static KL_NOINLINE void set_accessed(kl_spte_t *p, uint64_t spte)
{
	while (kl_spte_is_leaf(spte) && !(spte & KL_SPTE_ACCESSED))
		if (atomic_compare_exchange_weak(p, &spte, spte | KL_SPTE_ACCESSED))
			break;
}

uint8_t *kl_mmu_lookup(struct kl_vcpu_core *c, kl_gpa_t gpa, unsigned access, bool *writable,
		       bool *mmio)
{
	struct kl_vm *vm = c->vm;
	kl_gfn_t gfn = gpa >> KL_PAGE_SHIFT;
	unsigned level;
	uint64_t spte;
	kl_spte_t *p = kl_stage2_walk(vm->mmu, c->as_id, gfn, &level, &spte);
	bool may_write;

	*mmio = false;
	if (KL_UNLIKELY(!(spte & KL_SPTE_PRESENT))) {
		if (spte & KL_SPTE_MMIO)
			*mmio = kl_spte_mmio_current(spte, kl_generation(vm, c->as_id));
		return NULL;
	}
	may_write = spte & KL_SPTE_WRITABLE;
	if (KL_UNLIKELY(kl_vm_logs(vm)) && may_write)
		may_write = kl_dirty_may_write(c, gfn, access & KL_ACC_WRITE);
	*writable = may_write && !(spte & KL_SPTE_TRACKED);
	if ((access & KL_ACC_WRITE) && !may_write)
		return NULL;
	racepoint("lookup-spte");
	if (KL_UNLIKELY(!(spte & KL_SPTE_ACCESSED)))
		set_accessed(p, spte);
	return (uint8_t *)kl_spte_page(spte, gfn);
}

/* ---- faults ------------------------------------------------------------------------ */

/* What a fault learned about its gfn in one reader section. */
struct lookup {
	uint64_t generation;
	kl_hva_t hva;
	enum { NO_SLOT, INVALID, READONLY, WRITABLE, NOT_BACKED } slot;
	bool private;
	struct kl_gmem_inode *inode; /* a reference, if the page is in a guest_memfd */
	unsigned id, max_level;
};

/* What a guest_memfd or attributes change of what the slot says. Context: reader section. */
static void look_up_backing(struct kl_vm *vm, const struct kl_memslot *slot, kl_gfn_t gfn,
			    struct lookup *l)
{
	unsigned uniform;
	enum kl_backing b = kl_backing_of(vm, slot, gfn, &l->private, &uniform);

	if (l->slot == INVALID)
		return;
	if (b == KL_BACKED_BY_NONE) {
		l->slot = NOT_BACKED;
	} else if (b == KL_BACKED_BY_GMEM) {
		l->inode = slot->gmem->inode;
		kl_gmem_inode_get(l->inode);
		l->hva.addr = kl_gmem_hva(slot->gmem, gfn);
		l->max_level = kl_huge_slot_level(slot, l->hva, gfn);
	}
	/* What is not uniform is not mapped as one (M1). */
	l->max_level = kl_min(l->max_level, uniform + 1);
}

static struct lookup look_up(struct kl_vm *vm, unsigned as, kl_gfn_t gfn)
{
	int token = kl_srcu_read_lock(&vm->srcu);
	struct lookup l = {.generation = kl_generation(vm, as), .slot = NO_SLOT};
	const struct kl_memslot *slot = kl_memslot_find(kl_memslots(vm, as), gfn);

	racepoint("fault-lookup");
	if (slot) {
		l.slot = slot->invalid                      ? INVALID
			 : (slot->flags & KVM_MEM_READONLY) ? READONLY
							    : WRITABLE;
		l.hva = kl_memslot_hva(slot, gfn);
		l.id = slot->id;
		l.max_level =
			kl_eager_page_split && slot->log ? 1 : kl_huge_slot_level(slot, l.hva, gfn);
	}
	if (KL_UNLIKELY(vm->gmem_slots))
		look_up_backing(vm, slot, gfn, &l);
	kl_srcu_read_unlock(&vm->srcu, token);
	return l;
}

bool kl_in_bracket(struct kl_vm *vm, kl_gfn_t first, kl_gfn_t last)
{
	return vm->mmu_invalidate_in_progress && first < vm->mmu_invalidate_end &&
	       last > vm->mmu_invalidate_start;
}

/*
 * The order counts: a bracket ends without the lock, seq++ then in_progress--.
 * Context: mmu lock for reading, so none begins.
 */
static enum kl_fault_retry must_retry(struct kl_vm *vm, unsigned as, kl_gfn_t gfn, uint64_t seq,
				      uint64_t generation)
{
	kl_assert_held(&vm->mmu->lock);
	if (kl_in_bracket(vm, gfn, gfn + 1))
		return KL_RETRY_IN_PROGRESS;
	racepoint("fault-not-in-progress");
	if (atomic_load(&vm->mmu_invalidate_seq) != seq) /* PAIR(inval-seq) */
		return KL_RETRY_SEQ;
	if ((generation & 1) || kl_generation(vm, as) != generation)
		return KL_RETRY_SLOTS;
	return KL_RETRY_NONE;
}

/* The level of the first entry that a walk for @gfn finds empty, or 0: none is. */
static unsigned empty_level(struct kl_vm *vm, unsigned as, kl_gfn_t gfn)
{
	unsigned level;
	uint64_t spte;

	kl_stage2_walk(vm->mmu, as, gfn, &level, &spte);
	return spte ? 0 : level;
}

/* What must be true of all the range of a large leaf when it is installed. Context: mmu lock. */
static unsigned lower_level(struct kl_vm *vm, kl_gfn_t gfn, kl_hva_t hva, unsigned level)
{
	for (; level > 1; level--) {
		uint64_t span = kl_pt_span(level), bytes = span << KL_PAGE_SHIFT;
		uint64_t start = hva.addr & ~(bytes - 1);

		gfn &= ~(span - 1);
		if (!kl_in_bracket(vm, gfn, gfn + span) && !kl_uffd_overlaps(start, start + bytes))
			break;
	}
	return level;
}

/*
 * Put a leaf of @*level where nothing, a stale MMIO entry, or a weaker leaf is; of a smaller level
 * where there is a table. 0 or -ENOMEM.
 */
static int install(struct kl_vm *vm, unsigned as, kl_gfn_t gfn, const struct lookup *l,
		   bool writable, unsigned *level)
{
	uint64_t want = writable ? KL_SPTE_WRITABLE : 0, old, new;
	kl_spte_t *p;

	do {
		p = kl_stage2_make(vm->mmu, as, gfn, level);
		if (!p)
			return -ENOMEM;
		old = atomic_load_explicit(p, memory_order_relaxed);
		if (old & KL_SPTE_TABLE)
			continue; /* another fault was first: go on below */
		if (kl_spte_is_leaf(old)) {
			/* Another vCPU's fault was first, and got at least as much. */
			if ((old & want) == want)
				return 0;
			new = old | want;
		} else {
			new = kl_spte_leaf(l->hva, gfn, *level, writable) |
			      (l->inode ? KL_SPTE_GMEM : 0);
			if (*level == 1 && kl_track_in_leaf(vm, as, l->id, gfn, 1))
				new |= KL_SPTE_TRACKED;
		}
	} while ((old & KL_SPTE_TABLE) || !kl_spte_cas(vm, as, p, old, new));
	return 0;
}

/*
 * A guest can touch more addresses without a slot than there is memory for tables: from some
 * number of tables on, others are not cached any more until everything is zapped.
 */
static bool may_make_mmio(struct kl_vm *vm, unsigned as, kl_gfn_t gfn)
{
	struct kl_mmu *mmu = vm->mmu;
	unsigned level;
	uint64_t spte;

	kl_stage2_walk(mmu, as, gfn, &level, &spte);
	return level == 1 || atomic_fetch_add_explicit(&mmu->mmio_tables[as], 1,
						       memory_order_relaxed) < KL_MAX_MMIO_TABLES;
}

/*
 * The MMIO entry only caches "no slot": if it cannot be made now (an update is under way, no
 * memory) the access is MMIO all the same, because the lookup said so.
 */
static void install_mmio(struct kl_vm *vm, unsigned as, kl_gfn_t gfn, uint64_t seq,
			 uint64_t generation)
{
	unsigned level = 1;
	kl_spte_t *p;

	if (generation & 1)
		return;
	racepoint("fault-mmio-tag");
	kl_read_lock(&vm->mmu->lock);
	if (kl_generation(vm, as) == generation && may_make_mmio(vm, as, gfn) &&
	    (!vm->private_mem || !must_retry(vm, as, gfn, seq, generation)) &&
	    (p = kl_stage2_make(vm->mmu, as, gfn, &level))) {
		uint64_t old = atomic_load_explicit(p, memory_order_relaxed);

		/* No leaf can be there, or get there, while the generation stands. */
		if (!kl_spte_is_leaf(old))
			(void)kl_spte_cas(vm, as, p, old, kl_spte_mmio(generation));
	}
	kl_read_unlock(&vm->mmu->lock);
}

/*
 * The page cannot be had, though a leaf may say so: it went without an event (N7). The leaf
 * goes too, so that whoever reported it finds nothing next time, and not the same again.
 */
static void drop_refuted(struct kl_vm *vm, unsigned as, kl_gfn_t gfn, bool write)
{
	unsigned level;
	uint64_t spte;

	kl_read_lock(&vm->mmu->lock);
	kl_stage2_walk(vm->mmu, as, gfn, &level, &spte);
	kl_read_unlock(&vm->mmu->lock);
	if (kl_spte_is_leaf(spte) && (!write || (spte & KL_SPTE_WRITABLE)))
		kl_mmu_zap_range(vm, as, gfn, gfn + 1, "vanished");
}

/* The page is present: lock, check, install. */
static int map(struct kl_vm *vm, unsigned as, kl_gfn_t gfn, const struct lookup *l, uint64_t seq,
	       bool writable, struct kl_fault_report *rep)
{
	unsigned level = 1, goal;
	int r = 0;

	kl_read_lock(&vm->mmu->lock);
	rep->retry = must_retry(vm, as, gfn, seq, l->generation);
	if (!rep->retry && l->max_level > 1) {
		goal = kl_min(empty_level(vm, as, gfn), l->max_level);
		if (goal > 1) {
			/* The first fault in this range: may it be a large leaf? */
			kl_read_unlock(&vm->mmu->lock);
			level = kl_huge_host_level(vm, gfn, l->hva, goal, seq);
			racepoint("fault-huge");
			kl_read_lock(&vm->mmu->lock);
			/* First whether a bracket is over some of it, then whether one was. */
			level = lower_level(vm, gfn, l->hva, level);
			racepoint("fault-huge-level");
			rep->retry = must_retry(vm, as, gfn, seq, l->generation);
		}
	}
	if (!rep->retry) {
		while (level > 1 && kl_track_in_leaf(vm, as, l->id, gfn, level))
			level--;
		r = install(vm, as, gfn, l, writable, &level);
		rep->level = level;
	}
	kl_read_unlock(&vm->mmu->lock);
	return r;
}

/* With the page of @l, if there is one: populate, then install. */
static int fault_in(struct kl_vcpu_core *c, kl_gfn_t gfn, const struct lookup *l, uint64_t seq,
		    unsigned access, struct kl_fault_report *rep)
{
	/* As KVM, whatever the access: the page is allocated, and may be written. */
	bool write = (access & KL_ACC_WRITE) || l->inode, writable = false;
	struct kl_vm *vm = c->vm;
	unsigned as = c->as_id;
	int r;

	racepoint("fault-populate");
	r = kl_host_populate(l->hva, write, &writable);
	if (r) {
		if (r != -EINTR)
			drop_refuted(vm, as, gfn, write);
		return r;
	}
	racepoint("fault-populated");
	r = map(vm, as, gfn, l, seq, writable && l->slot == WRITABLE, rep);
	if (rep->retry)
		sched_yield();
	else if (!r)
		kl_stat_own_add(&c->stats.pf_fixed, 1);
	return r; /* after a retry the caller looks again and finds nothing */
}

/* Who asks is told more than an errno: KVM_EXIT_MEMORY_FAULT (F5). */
static int memory_fault(struct kl_vcpu_core *c, kl_gfn_t gfn, const struct lookup *l, int r)
{
	c->memory_fault = true;
	c->memory_fault_private = l->private;
	c->memory_fault_gpa = gfn << KL_PAGE_SHIFT;
	return r;
}

static int fault(struct kl_vcpu_core *c, kl_gfn_t gfn, unsigned access, struct kl_fault_report *rep)
{
	struct kl_vm *vm = c->vm;
	unsigned as = c->as_id;
	bool write = access & KL_ACC_WRITE;
	struct lookup l;
	uint64_t seq;
	struct kl_dirty_ring *ring = atomic_load_explicit(&c->ring, memory_order_relaxed);
	int r;

	c->memory_fault = false;
	if (gfn > KL_MAX_GFN)
		return KL_FAULT_MMIO;
	if (KL_UNLIKELY(ring) && write && kl_dirty_ring_full(ring))
		return -ENOBUFS;
	seq = atomic_load_explicit(&vm->mmu_invalidate_seq, memory_order_acquire);
	l = look_up(vm, as, gfn);
	switch (l.slot) {
	case NO_SLOT:
		install_mmio(vm, as, gfn, seq, l.generation);
		return KL_FAULT_MMIO;
	case NOT_BACKED:
		return memory_fault(c, gfn, &l, -EFAULT);
	case INVALID:
		rep->retry = KL_RETRY_SLOTS;
		sched_yield(); /* the update that marked it will be over soon */
		return KL_FAULT_MAPPED;
	case READONLY:
		if (write)
			return KL_FAULT_MMIO;
		break;
	case WRITABLE:
		break;
	}

	/* A page of a guest_memfd comes at once. */
	if (KL_UNLIKELY(access & KL_ACC_NOWAIT) && !l.inode && kl_host_must_wait(l.hva)) {
		c->awaited = l.hva;
		return -EAGAIN;
	}
	r = fault_in(c, gfn, &l, seq, access, rep);
	if (KL_UNLIKELY(l.inode != NULL)) {
		kl_gmem_inode_put(l.inode);
		if (r < 0 && r != -EINTR)
			r = memory_fault(c, gfn, &l, r);
	}
	return r;
}

int kl_mmu_fault(struct kl_vcpu_core *c, kl_gpa_t gpa, unsigned access)
{
	struct kl_fault_report rep = {0};
	uint64_t begun = 0;
	int r;

	KL_ASSERT(atomic_load(&c->mode) != KL_IN_GUEST);
	kl_stat_own_add(&c->stats.pf_taken, 1);
	if (KL_UNLIKELY(c->vm->mmu->trace))
		begun = kl_trace_ns();
	r = fault(c, gpa >> KL_PAGE_SHIFT, access, &rep);
	if (KL_UNLIKELY(c->vm->mmu->trace))
		kl_mmu_trace_fault(c, gpa, access, r, &rep, begun);
	return r;
}
