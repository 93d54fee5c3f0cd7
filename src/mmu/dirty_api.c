/* SPDX-License-Identifier: MIT */
/* The library's public functions on dirty logs: argument checks. The rest is in mem/dirty*.c. */
#include <errno.h>

#include "mem/dirty_ring.h"
#include "mmu/api.h"

_Static_assert(KVMLET_DIRTY_MANUAL == KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE &&
		       KVMLET_DIRTY_ALL_SET == KVM_DIRTY_LOG_INITIALLY_SET,
	       "KVM's");
_Static_assert(KVMLET_DIRTY_RING_MIN * sizeof(struct kvm_dirty_gfn) >= KL_PAGE_SIZE &&
		       KVMLET_DIRTY_RING_MAX == KL_DIRTY_RING_MAX_ENTRIES,
	       "KVM's");

KL_EXPORT int kvmlet_dirty_set_mode(struct kvmlet_vm *vm, unsigned mode)
{
	int r = kl_api_may_wait(vm);

	if (r)
		return r;
	if (mode != 0 && mode != KVMLET_DIRTY_MANUAL &&
	    mode != (KVMLET_DIRTY_MANUAL | KVMLET_DIRTY_ALL_SET))
		return -EINVAL;
	kl_engine_enter();
	kl_dirty_log_set_manual(&vm->vm, mode);
	kl_engine_leave();
	return 0;
}

KL_EXPORT int kvmlet_dirty_get(struct kvmlet_vm *vm, uint32_t slot, uint64_t *bitmap,
			       uint64_t npages)
{
	int r = kl_api_may_wait(vm);

	if (r)
		return r;
	kl_engine_enter();
	r = kl_dirty_log_get_pages(&vm->vm, slot >> 16, slot & 0xffff, bitmap, npages);
	kl_engine_leave();
	return r;
}

KL_EXPORT int kvmlet_dirty_clear(struct kvmlet_vm *vm, uint32_t slot, uint64_t first,
				 uint64_t npages, const uint64_t *bitmap)
{
	int r = kl_api_may_wait(vm);

	if (r)
		return r;
	kl_engine_enter();
	r = kl_dirty_log_clear(&vm->vm, slot >> 16, slot & 0xffff, first, npages, bitmap);
	kl_engine_leave();
	return r;
}

KL_EXPORT int kvmlet_dirty_ring_create(struct kvmlet_vm *vm, unsigned entries)
{
	int r = kl_api_may_wait(vm);

	if (r)
		return r;
	if (entries < KVMLET_DIRTY_RING_MIN || entries > KVMLET_DIRTY_RING_MAX ||
	    (entries & (entries - 1)))
		return -EINVAL;
	kl_engine_enter();
	r = kl_dirty_ring_make(&vm->vm, entries);
	kl_engine_leave();
	return r;
}

KL_EXPORT int kvmlet_dirty_ring_collect(struct kvmlet_vm *vm, struct kvmlet_dirty_page *pages,
					unsigned max, unsigned *n)
{
	int r = kl_api_may_wait(vm);

	if (r)
		return r;
	if (!atomic_load(&vm->vm.dirty_ring))
		return -EINVAL;
	kl_engine_enter();
	*n = kl_dirty_ring_collect(&vm->vm, pages, max);
	kl_engine_leave();
	return 0;
}
