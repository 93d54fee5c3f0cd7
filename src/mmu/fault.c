/* SPDX-License-Identifier: MIT */
/*
 * Stage-2 lookups and faults (M1-M4, N7).
 *
 * Between looking a slot up and installing its SPTE nothing is held, because making the host
 * page present may sleep. What could happen meanwhile, and what catches it, all under the mmu
 * lock held for reading:
 *   - the range is being unmapped               in_progress covers the gfn
 *   - it was unmapped and the bracket is over    mmu_invalidate_seq moved
 *   - the slot was deleted, moved, or changed    the generation moved, or is odd  [B31]
 * What happens after the SPTE is in is caught by the zap, which takes the lock for writing.
 */
#include <errno.h>
#include <sched.h>

#include "base/log.h"
#include "base/racepoint.h"
#include "host/populate.h"
#include "mem/vm.h"
#include "mmu/mmu.h"
#include "mmu/stage2.h"

uint8_t *kl_mmu_lookup(struct kl_vcpu_core *c, kl_gpa_t gpa, unsigned access, bool *writable,
		       bool *mmio)
{
	struct kl_vm *vm = c->vm;
	kl_spte_t *p = kl_stage2_find(vm->mmu, c->as_id, gpa >> KL_PAGE_SHIFT);
	uint64_t spte;

	*mmio = false;
	if (!p)
		return NULL;
	spte = atomic_load_explicit(p, memory_order_acquire);
	if (spte & KL_SPTE_MMIO) {
		*mmio = kl_spte_mmio_current(spte, kl_generation(vm, c->as_id));
		return NULL;
	}
	*writable = spte & KL_SPTE_WRITABLE;
	if (!(spte & KL_SPTE_PRESENT) || ((access & KL_ACC_WRITE) && !*writable))
		return NULL;
	return (uint8_t *)(spte & KL_SPTE_ADDR);
}

/* What a fault learned about its gfn in one reader section. */
struct lookup {
	uint64_t generation;
	kl_hva_t hva;
	enum { NO_SLOT, INVALID, READONLY, WRITABLE } slot;
};

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
	}
	kl_srcu_read_unlock(&vm->srcu, token);
	return l;
}

/* Context: mmu lock for reading. */
static bool must_retry(struct kl_vm *vm, unsigned as, kl_gfn_t gfn, uint64_t seq,
		       uint64_t generation)
{
	kl_assert_held(&vm->mmu->lock);
	if (vm->mmu_invalidate_in_progress && gfn >= vm->mmu_invalidate_start &&
	    gfn < vm->mmu_invalidate_end)
		return true;
	return atomic_load_explicit(&vm->mmu_invalidate_seq, memory_order_relaxed) != seq ||
	       (generation & 1) || kl_generation(vm, as) != generation;
}

/* Put @new where nothing, a stale MMIO entry, or a weaker leaf is. 0 or -ENOMEM. */
static int install(struct kl_vm *vm, unsigned as, kl_gfn_t gfn, uint64_t new)
{
	kl_spte_t *p = kl_stage2_make(vm->mmu, as, gfn);
	uint64_t old;

	if (!p)
		return -ENOMEM;
	do {
		old = atomic_load_explicit(p, memory_order_relaxed);
		/* Another vCPU's fault was first, and got at least as much. */
		if (kl_spte_is_leaf(old) &&
		    (old & new &KL_SPTE_WRITABLE) == (new &KL_SPTE_WRITABLE))
			return 0;
	} while (!kl_spte_cas(vm, p, old, new));
	return 0;
}

/*
 * The MMIO entry only caches "no slot": if it cannot be made now (an update is under way, no
 * memory) the access is MMIO all the same, because the lookup said so.
 */
static void install_mmio(struct kl_vm *vm, unsigned as, kl_gfn_t gfn, uint64_t generation)
{
	if (generation & 1)
		return;
	racepoint("fault-mmio-tag");
	kl_read_lock(&vm->mmu->lock);
	if (kl_generation(vm, as) == generation)
		(void)install(vm, as, gfn, kl_spte_mmio(generation));
	kl_read_unlock(&vm->mmu->lock);
}

int kl_mmu_fault(struct kl_vcpu_core *c, kl_gpa_t gpa, unsigned access)
{
	struct kl_vm *vm = c->vm;
	kl_gfn_t gfn = gpa >> KL_PAGE_SHIFT;
	unsigned as = c->as_id;
	bool write = access & KL_ACC_WRITE;
	bool writable = false;
	struct lookup l;
	uint64_t seq;
	int r;

	KL_ASSERT(atomic_load(&c->mode) != KL_IN_GUEST);
	kl_stat_own_add(&c->stats.pf_taken, 1);
	if (gfn > KL_MAX_GFN)
		return KL_FAULT_MMIO;
	seq = atomic_load_explicit(&vm->mmu_invalidate_seq, memory_order_acquire);
	l = look_up(vm, as, gfn);
	switch (l.slot) {
	case NO_SLOT:
		install_mmio(vm, as, gfn, l.generation);
		return KL_FAULT_MMIO;
	case INVALID:
		sched_yield(); /* the update that marked it will be over soon */
		return KL_FAULT_MAPPED;
	case READONLY:
		if (write)
			return KL_FAULT_MMIO;
		break;
	case WRITABLE:
		break;
	}

	racepoint("fault-populate");
	r = kl_host_populate(l.hva, write, &writable);
	if (r)
		return r;
	racepoint("fault-populated");

	kl_read_lock(&vm->mmu->lock);
	if (must_retry(vm, as, gfn, seq, l.generation)) {
		kl_read_unlock(&vm->mmu->lock);
		sched_yield();
		return KL_FAULT_MAPPED; /* the caller looks again and finds nothing */
	}
	r = install(vm, as, gfn,
		    l.hva.addr | KL_SPTE_PRESENT |
			    (writable && l.slot == WRITABLE ? KL_SPTE_WRITABLE : 0));
	kl_read_unlock(&vm->mmu->lock);
	if (!r)
		kl_stat_own_add(&c->stats.pf_fixed, 1);
	KL_TRACE("vcpu%u fault gpa=%#llx access=%u -> %d", c->id, (unsigned long long)gpa, access,
		 r);
	return r;
}
