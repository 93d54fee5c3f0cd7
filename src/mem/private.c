/* SPDX-License-Identifier: MIT */
#include <errno.h>

#include "base/log.h"
#include "base/racepoint.h"
#include "host/thread.h"
#include "mem/gmem.h"
#include "mem/private.h"
#include "mem/subscribers.h"
#include "mem/vm.h"

/*
 * The list of subscribers (mem/subscribers.h), as for a bracket. Caches find out about a change
 * under way by the flag: their pages are not found by address, since it is the address that
 * changes.
 */
void kl_gfn_change_begin(struct kl_vm *vm, kl_gfn_t first, kl_gfn_t last, const char *cause)
{
	kl_assert_held(&vm->slots_lock);
	KL_ASSERT(!kl_self.brackets);
	atomic_store(&vm->gfn_change, true); /* PAIR(gfn-change) */
	racepoint("gfn-change");
	kl_gpc_zap_gfns(vm, first, last);
	racepoint("gfn-change-gpcs-done");
	kl_mmu_change_begin(vm, first, last, cause);
	kl_stat_add(&vm->stats.mmu_invalidations, 1);
	racepoint("gfn-change-begun");
}

void kl_gfn_change_end(struct kl_vm *vm)
{
	racepoint("gfn-change-made");
	kl_mmu_change_end(vm);
	atomic_store(&vm->gfn_change, false);
}

bool kl_gfn_changing(struct kl_vm *vm)
{
	return atomic_load(&vm->gfn_change); /* PAIR(gfn-change) */
}

enum kl_backing kl_backing_of(struct kl_vm *vm, const struct kl_memslot *slot, kl_gfn_t gfn,
			      bool *private, unsigned *uniform)
{
	const struct kl_gmem_binding *b = slot ? slot->gmem : NULL;

	*private = false;
	*uniform = KL_ATTR_LEVELS;
	if (vm->private_mem)
		*private = kl_attr_private(&vm->attrs, gfn, uniform);
	if (*private || (b && (b->inode->flags & KL_GMEM_MMAP)))
		return b && !atomic_load(&b->closed) ? KL_BACKED_BY_GMEM /* PAIR(gfn-change) */
						     : KL_BACKED_BY_NONE;
	return KL_BACKED_BY_HVA;
}

static int set_private_locked(struct kl_vm *vm, kl_gfn_t first, kl_gfn_t last, bool private)
{
	int r;

	if (kl_attr_uniform(&vm->attrs, first, last, private))
		return 0;
	r = kl_attr_prepare(&vm->attrs, first, last, private);
	if (r)
		return r;
	kl_gfn_change_begin(vm, first, last, "KVM_SET_MEMORY_ATTRIBUTES");
	if (kl_attr_set(&vm->attrs, first, last, private)) {
		kl_gfn_change_end(vm);
		kl_srcu_synchronize(&vm->srcu);
		kl_attr_reclaim(&vm->attrs);
	} else {
		kl_gfn_change_end(vm);
	}
	return 0;
}

int kl_set_private(struct kl_vm *vm, kl_gfn_t first, kl_gfn_t last, bool private)
{
	int r;

	kl_mutex_lock(&vm->slots_lock);
	r = set_private_locked(vm, first, last, private);
	kl_mutex_unlock(&vm->slots_lock);
	KL_TRACE("vm%llu gfns 0x%llx-0x%llx %s -> %d", (unsigned long long)vm->serial,
		 (unsigned long long)first, (unsigned long long)last,
		 private ? "private" : "shared", r);
	return r;
}
