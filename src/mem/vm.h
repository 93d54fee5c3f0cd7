/* SPDX-License-Identifier: MIT */
/*
 * A VM as the memory engine sees it. The x86 and uapi layers embed it.
 */
#pragma once

#include "base/lock.h"
#include "base/srcu.h"
#include "base/stats.h"
#include "mem/attr.h"
#include "mem/memslot.h"
#include "mem/vcpu_core.h"

#define KL_MAX_VCPUS    1024
#define KL_MAX_VCPU_IDS 4096

struct kl_mmu;
struct kl_gpcs;
struct kl_gmem;
struct kl_track;

struct kl_vm {
	/* Memslots. */
	struct kl_mutex slots_lock;
	struct kl_srcu srcu;
	_Atomic(struct kl_memslots *) memslots[KL_NR_AS]; /* one of memslot_sets */
	struct kl_memslots memslot_sets[KL_NR_AS][2];
	const struct kl_memslot **slot_by_id[KL_NR_AS]; /* slots_lock */
	_Atomic uint64_t generation[KL_NR_AS];
	_Atomic bool slot_zap_all_quirk; /* KVM_X86_QUIRK_SLOT_ZAP_ALL */

	/* Dirty logs (mem/dirty.h) and rings (mem/dirty_ring.h). */
	_Atomic unsigned nr_logs;       /* slots_lock to change it */
	struct kl_dirty_log *spare_log; /* slots_lock */
	bool heat;                      /* its slots have logs of the engine's own; mem/heat.h */
	struct kl_vm *next_hot;         /* mem/heat.c */
	uint64_t manual_dirty_log;      /* KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2's flags */
	uint32_t dirty_ring_size;       /* bytes, or 0; set once, before there is a vCPU */
	bool dirty_ring_with_bitmap;    /* slots_lock; set once, before there is a slot */
	_Atomic bool dirty_left_over;
	_Atomic(struct kl_dirty_ring *) dirty_ring; /* of who has no vCPUs; set before slots */

	/*
	 * Private memory. private_mem and gmem_slots are set before anybody else knows the VM:
	 * there are attributes, and one address space (as KVM: no SMM); slots may be bound to
	 * guest_memfds.
	 */
	bool private_mem, gmem_slots;
	_Atomic bool gfn_change; /* what backs some frames is being changed; mem/private.h */
	struct kl_attrs attrs;
	struct kl_gmem *gmem_files; /* mem/gmem.c */

	/* Invalidations in flight; see mmu/invalidate.c. */
	_Atomic int mmu_invalidate_in_progress;            /* raised under mmu_lock for writing */
	kl_gfn_t mmu_invalidate_start, mmu_invalidate_end; /* mmu_lock for writing */
	_Atomic uint64_t mmu_invalidate_seq;

	/* vCPUs, by index; entries are published with release and never change while set. */
	struct kl_mutex vcpus_lock;
	_Atomic(struct kl_vcpu_core *) vcpus[KL_MAX_VCPUS];
	_Atomic unsigned nr_vcpus;
	_Atomic uint32_t alone; /* futex: one vCPU has stopped the others */

	/* Accessors (mmu/accessor.c): KL_NR_ACCESSORS of them; NULL and 0 until the first use. */
	_Atomic(struct kl_accessor *) accessors;
	_Atomic uint64_t accessors_used; /* bit i: flushes look at accessor i */

	_Atomic(struct kl_gpcs *) gpcs; /* mem/gpc_index.h; NULL until there is a cache */
	struct kl_mmu *mmu;             /* mmu/ */
	struct kl_track *track;         /* mmu/track.h */
	_Atomic uint64_t tracked_pages; /* gfns whose writes are reported */

	_Atomic bool dead; /* internal error: every later call is -EIO */
	struct kl_vm_stats stats;
	uint64_t serial; /* for log and trace */

	unsigned brackets_at_removal; /* open ones that never end for this VM (B19) */
	_Atomic(struct kl_vm *) next; /* list of VMs that notifiers walk; mem/notifier.c */
};

/* Address spaces: KVM has no SMM where there is private memory. */
KL_INLINE unsigned kl_nr_as(const struct kl_vm *vm)
{
	return vm->private_mem ? 1 : KL_NR_AS;
}

/* 0 or -ENOMEM. */
int kl_vm_init(struct kl_vm *vm) KL_MUST_CHECK;
/* KVM_X86_SW_PROTECTED_VM. Nobody else knows @vm yet. */
void kl_vm_make_private(struct kl_vm *vm);
/* No vCPU runs and nobody else uses @vm. Waits for brackets in flight. */
void kl_vm_destroy(struct kl_vm *vm);

/* An internal inconsistency: log, mark dead, make vCPUs leave. */
void kl_vm_bug(struct kl_vm *vm, const char *what);
#define KL_BUG_ON(cond, vm)                   \
	({                                    \
		bool b_ = (cond);             \
		if (KL_UNLIKELY(b_))          \
			kl_vm_bug(vm, #cond); \
		b_;                           \
	})

/* fork(): in the child every VM of the parent is unusable and no notifier sees it (U5). */
void kl_vms_after_fork(void);
