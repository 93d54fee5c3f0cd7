/* SPDX-License-Identifier: MIT */
/*
 * The library's public functions on the memory engine: argument checks, and the brackets that
 * every entry from a program needs (host/thread.h).
 */
#include <errno.h>
#include <kvmlet/kvmlet.h>
#include <stdlib.h>

#include "host/thread.h"
#include "mem/notifier.h"
#include "mem/vm.h"

struct kvmlet_vm {
	struct kl_vm vm;
};

KL_EXPORT const char *kvmlet_version(void)
{
	return KVMLET_VERSION;
}

KL_EXPORT int kvmlet_vm_create(struct kvmlet_vm **out)
{
	struct kvmlet_vm *vm = malloc(sizeof(*vm));
	int r;

	if (!vm)
		return -ENOMEM;
	kl_engine_enter();
	r = kl_vm_init(&vm->vm);
	kl_engine_leave();
	if (r)
		free(vm);
	else
		*out = vm;
	return r;
}

KL_EXPORT void kvmlet_vm_destroy(struct kvmlet_vm *vm)
{
	if (!vm)
		return;
	kl_engine_enter();
	kl_vm_destroy(&vm->vm);
	kl_engine_leave();
	free(vm);
}

KL_EXPORT int kvmlet_memslot_set(struct kvmlet_vm *vm, uint32_t slot, uint32_t flags, kl_gpa_t gpa,
				 uint64_t size, kl_hva_t hva)
{
	struct kl_uapi_memory_region2 r = {
		.slot = slot,
		.flags = flags,
		.guest_phys_addr = gpa,
		.memory_size = size,
		.userspace_addr = hva.addr,
	};
	int ret;

	kl_engine_enter();
	ret = kl_set_memory_region(&vm->vm, &r);
	kl_engine_leave();
	return ret;
}

KL_EXPORT uint64_t kvmlet_memslot_generation(struct kvmlet_vm *vm)
{
	return kl_generation(&vm->vm, 0);
}

KL_EXPORT int kvmlet_memslot_find(struct kvmlet_vm *vm, kl_gpa_t gpa, kl_hva_t *hva)
{
	const struct kl_memslot *slot;
	int token, r = -EFAULT;

	kl_engine_enter();
	token = kl_srcu_read_lock(&vm->vm.srcu);
	slot = kl_memslot_find(kl_memslots(&vm->vm, 0), gpa >> KL_PAGE_SHIFT);
	if (slot && !slot->invalid) {
		*hva = kl_memslot_hva(slot, gpa >> KL_PAGE_SHIFT);
		hva->addr += gpa & ~KL_PAGE_MASK;
		r = 0;
	}
	kl_srcu_read_unlock(&vm->vm.srcu, token);
	kl_engine_leave();
	return r;
}

static struct kl_notifier_range internal_range(const struct kvmlet_notifier_range *range)
{
	return (struct kl_notifier_range){
		.start = range->start,
		.end = range->end,
		.event = KL_EVENT_UNMAP,
		.may_block = range->may_block,
	};
}

KL_EXPORT int kvmlet_notifier_begin(struct kvmlet_notifier_range *range)
{
	struct kl_notifier_range r = internal_range(range);
	int ret;

	if (range->start >= range->end || range->reserved)
		return -EINVAL;
	kl_engine_enter();
	ret = kl_notifier_begin(&r);
	kl_engine_leave();
	return ret;
}

KL_EXPORT void kvmlet_notifier_end(struct kvmlet_notifier_range *range)
{
	struct kl_notifier_range r = internal_range(range);

	kl_engine_enter();
	kl_notifier_end(&r);
	kl_engine_leave();
}
