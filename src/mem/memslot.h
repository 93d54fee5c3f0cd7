/* SPDX-License-Identifier: MIT */
/*
 * Memslots and their generations (S1-S8).
 *
 * A set of slots is immutable once published. Readers hold vm->srcu and see one whole set;
 * an updater (vm->slots_lock) builds the next set, publishes it, and waits for readers.
 */
#pragma once

#include <linux/kvm.h>
#include <kvmlet/types.h>

#include "base/compiler.h"

struct kl_vm;

#define KL_NR_AS	  1	/* address spaces; a second one would be SMM */
#define KL_USER_MEM_SLOTS 32764 /* as KVM: SHRT_MAX - 3 */
#define KL_MEM_MAX_PAGES  ((1UL << 31) - 1)

/* struct kvm_userspace_memory_region2, which Debian 12's header lacks. */
struct kl_uapi_memory_region2 {
	__u32 slot;
	__u32 flags;
	__u64 guest_phys_addr;
	__u64 memory_size;
	__u64 userspace_addr;
	__u64 guest_memfd_offset;
	__u32 guest_memfd;
	__u32 pad1;
	__u64 pad2[14];
};

struct kl_memslot {
	kl_gfn_t base_gfn;
	uint64_t npages;
	uint64_t hva; /* of base_gfn */
	uint32_t flags; /* KVM_MEM_* */
	uint16_t id;
	uint8_t as_id;
	bool invalid; /* being deleted or moved (S4): faults retry */
};

/* One immutable set. Arrays are sorted: by_gfn by base_gfn; by_hva by hva. */
struct kl_memslots {
	uint64_t generation; /* even: stable, odd: a change is being installed (S5) */
	unsigned n;
	const struct kl_memslot *const *by_gfn;
	const struct kl_memslot *const *by_hva;
	const uint64_t *max_end; /* max_end[i]: largest hva end among by_hva[0..i] */
};

/* Context: reader section of vm->srcu, or vm->slots_lock. */
const struct kl_memslots *kl_memslots(struct kl_vm *vm, unsigned as_id);
/* The slot that holds @gfn, or NULL. Same context; the result lives as long as it. */
const struct kl_memslot *kl_memslot_find(const struct kl_memslots *s, kl_gfn_t gfn);

KL_INLINE kl_hva_t kl_memslot_hva(const struct kl_memslot *s, kl_gfn_t gfn)
{
	return (kl_hva_t){s->hva + ((gfn - s->base_gfn) << KL_PAGE_SHIFT)};
}

/*
 * KVM_SET_USER_MEMORY_REGION(2) [api.rst 4.35]: create, delete, move or change the flags of
 * a slot, from a caller's unchecked structure.
 * Context: may sleep; not inside a notifier bracket of this thread.
 * Returns: 0; -EINVAL; -EEXIST; -ENOMEM; after any error the set is as it was (S2).
 */
int kl_set_memory_region(struct kl_vm *vm, const struct kl_uapi_memory_region2 *r) KL_MUST_CHECK;

/* Largest gfn that a slot may contain, from the guest's physical address width. */
#define KL_MAX_GFN ((1UL << (52 - KL_PAGE_SHIFT)) - 1)
