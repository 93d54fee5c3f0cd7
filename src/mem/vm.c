/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <string.h>

#include "base/bias.h"
#include "base/log.h"
#include "base/pool.h"
#include "host/await.h"
#include "host/guard.h"
#include "host/maps.h"
#include "host/timer.h"
#include "mem/gmem.h"
#include "mem/gpc.h"
#include "mem/heat.h"
#include "mem/notifier_gate.h"
#include "mem/subscribers.h"
#include "mem/uffd_source.h"
#include "mem/vm.h"

static _Atomic uint64_t next_serial;

int kl_vm_init(struct kl_vm *vm)
{
	int r;

	memset(vm, 0, sizeof(*vm));
	r = kl_guard_init();
	if (r)
		return r;
	kl_mutex_init(&vm->slots_lock, KL_RANK_SLOTS);
	kl_mutex_init(&vm->vcpus_lock, KL_RANK_VCPUS);
	kl_srcu_init(&vm->srcu);
	atomic_init(&vm->slot_zap_all_quirk, true);
	vm->serial = atomic_fetch_add(&next_serial, 1);
	r = kl_memslots_init(vm);
	if (!r)
		r = kl_track_create(vm);
	if (!r)
		r = kl_mmu_create(vm);
	if (r) {
		kl_track_destroy(vm);
		kl_memslots_destroy(vm);
		return r;
	}
	kl_notifier_add_vm(vm);
	return 0;
}

/* KVM zaps all when a slot goes for VMs of the default type only. */
void kl_vm_make_private(struct kl_vm *vm)
{
	vm->private_mem = vm->gmem_slots = true;
	atomic_init(&vm->slot_zap_all_quirk, false);
}

void kl_vm_destroy(struct kl_vm *vm)
{
	kl_heat_remove_vm(vm);
	kl_notifier_remove_vm(vm);
	kl_gmem_vm_gone(vm); /* who closes a file of it is not done before */
	if (kl_uffd_source_on())
		kl_uffd_source_vm_gone(vm);
	kl_gpcs_destroy(vm);
	kl_mmu_destroy(vm);
	kl_track_destroy(vm);
	kl_memslots_destroy(vm);
	kl_attr_destroy(&vm->attrs);
	kl_srcu_destroy(&vm->srcu);
	kl_mutex_destroy(&vm->vcpus_lock);
	kl_mutex_destroy(&vm->slots_lock);
}

void kl_vm_bug(struct kl_vm *vm, const char *what)
{
	unsigned n = atomic_load_explicit(&vm->nr_vcpus, memory_order_acquire);

	kl_log(KL_LOG_ERR, "internal error, VM %llu is unusable from here on: %s",
	       (unsigned long long)vm->serial, what);
	atomic_store(&vm->dead, true);
	kl_gpc_close_all(vm);
	for (unsigned i = 0; i < n; i++) {
		struct kl_vcpu_core *c = atomic_load_explicit(&vm->vcpus[i], memory_order_acquire);

		if (c)
			kl_vcpu_request(c, KL_REQ_VM_DEAD);
	}
#ifdef KL_DEBUG
	kl_assert_fail(what, __FILE__, __LINE__);
#endif
}

void kl_vms_after_fork(void)
{
	kl_notifier_after_fork();
	kl_gpcs_after_fork();
	kl_gmem_after_fork();
	kl_heat_after_fork();
	kl_bias_after_fork();
	kl_uffd_source_after_fork();
	kl_maps_after_fork();
	kl_pool_after_fork();
	kl_timer_after_fork();
	kl_await_after_fork();
	kl_rank_forget();
	kl_thread_after_fork();
}
