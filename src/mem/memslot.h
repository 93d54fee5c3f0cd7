/* SPDX-License-Identifier: MIT */
/*
 * Memslots and their generations (S1-S8).
 *
 * A set of slots does not change while it is published or has readers. Readers hold vm->srcu
 * and see one whole set; an updater (vm->slots_lock) edits a second set, publishes it, and
 * waits for readers of the first.
 */
#pragma once

#include <linux/kvm.h>
#include <kvmlet/types.h>

#include "base/btree.h"
#include "base/compiler.h"

struct kl_vm;
struct kl_dirty_log;
struct kl_gmem;
struct kl_gmem_binding;

#ifndef KVM_MEM_GUEST_MEMFD
#define KVM_MEM_GUEST_MEMFD (1UL << 2)
#endif

#define KL_NR_AS          2     /* address spaces; the second is that of SMM */
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
	uint64_t hva;   /* of base_gfn */
	uint32_t flags; /* KVM_MEM_* */
	uint16_t id;
	uint8_t as_id;
	bool invalid;                 /* being deleted or moved (S4): faults retry */
	struct kl_dirty_log *log;     /* NULL without KVM_MEM_LOG_DIRTY_PAGES */
	struct kl_dirty_log *heat;    /* the engine's own (mem/heat.h), or NULL */
	struct kl_gmem_binding *gmem; /* NULL without KVM_MEM_GUEST_MEMFD; mem/gmem.h */
} KL_CACHELINE;

/*
 * Generations (S5). vm->generation is even while the set is stable and odd while a change is
 * being installed: raised before the new set is published, and again after all readers of the
 * old set have left. A reader takes it *first*, then the set; so a tag made from the old set
 * is the old even value or odd, and neither equals the value after the change.
 * The first value is close below the wrap of the MMIO field (S6), and has the address space in
 * its highest bits, so that generations of two address spaces never compare equal.
 */
uint64_t kl_generation(struct kl_vm *vm, unsigned as_id);

/*
 * One set: the same slots in the order of their gfns and of their host addresses; those that are
 * bound to a guest_memfd also in the order of their addresses in the engine's mapping of it.
 */
struct kl_memslots {
	struct kl_btree by_gfn, by_hva, by_gmem;
};

/* Context: reader section of vm->srcu, or vm->slots_lock. */
const struct kl_memslots *kl_memslots(struct kl_vm *vm, unsigned as_id);
/* The slot that holds @gfn, or NULL. Same context; the result lives as long as it. */
KL_INLINE const struct kl_memslot *kl_memslot_find(const struct kl_memslots *s, kl_gfn_t gfn)
{
	const struct kl_memslot *slot = kl_btree_floor(&s->by_gfn, gfn);

	return slot && gfn - slot->base_gfn < slot->npages ? slot : NULL;
}

/*
 * Walk the slots of @s that overlap host memory [@start, @end), invalid ones included, and be it by
 * their guest_memfd; one that does by both comes twice:
 *
 *     struct kl_overlap o;
 *     kl_for_each_overlap (&o, s, start, end)
 *             ... o.slot, and its gfns [o.first, o.last) that lie in the range
 */
struct kl_overlap {
	const struct kl_memslot *slot; /* NULL: no more */
	kl_gfn_t first, last;
	bool in_gmem; /* that is where it overlaps */
	/* private */
	const struct kl_memslots *set;
	uint64_t start, end, cursor;
};
void kl_overlap_first(struct kl_overlap *o, const struct kl_memslots *s, uint64_t start,
		      uint64_t end);
void kl_overlap_next(struct kl_overlap *o);
#define kl_for_each_overlap(o, s, start, end) \
	for (kl_overlap_first(o, s, start, end); (o)->slot; kl_overlap_next(o))

KL_INLINE kl_hva_t kl_memslot_hva(const struct kl_memslot *s, kl_gfn_t gfn)
{
	return (kl_hva_t){s->hva + ((gfn - s->base_gfn) << KL_PAGE_SHIFT)};
}

/*
 * KVM_SET_USER_MEMORY_REGION(2) [api.rst 4.35]: create, delete, move or change the flags of
 * a slot, from a caller's unchecked structure.
 * Context: may sleep; not inside a notifier bracket or a tracker's callback of this thread.
 * Returns: 0; -EINVAL; -EEXIST; -ENOMEM; -EDEADLK inside one of those. After any error
 * the set is as it was (S2).
 */
int kl_set_memory_region(struct kl_vm *vm, const struct kl_uapi_memory_region2 *r) KL_MUST_CHECK;

/*
 * The same, for flags with KVM_MEM_GUEST_MEMFD: @file is what r->guest_memfd stands for. NULL: it
 * stands for none, and @error says why.
 */
int kl_set_memory_region_gmem(struct kl_vm *vm, const struct kl_uapi_memory_region2 *r,
			      struct kl_gmem *file, int error) KL_MUST_CHECK;

/* Is there any slot? Context: slots_lock. */
bool kl_memslots_any(struct kl_vm *vm);

/* Birth (-ENOMEM) and death with the VM. */
int kl_memslots_init(struct kl_vm *vm) KL_MUST_CHECK;
void kl_memslots_destroy(struct kl_vm *vm);

/*
 * The MMIO generation (S6): the generation without its low bit, cut to the width of the field
 * in an SPTE. A new VM starts 150 changes below the wrap.
 */
#define KL_MMIO_GEN_BITS           19
#define KL_MMIO_GEN(gen)           (((gen) >> 1) & ((1u << KL_MMIO_GEN_BITS) - 1))
#define KL_FIRST_GENERATION(as_id) ((uint64_t)(as_id) << 60 | ((2ull << KL_MMIO_GEN_BITS) - 300))

/* Largest gfn that a slot may contain, from the guest's physical address width. */
#define KL_MAX_GFN ((1UL << (52 - KL_PAGE_SHIFT)) - 1)
