/* SPDX-License-Identifier: MIT */
/*
 * A VM: its birth and death, and its ioctls.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "base/config.h"
#include "base/failpoint.h"
#include "host/guard.h"
#include "host/sys.h"
#include "mem/notifier_gate.h"
#include "mem/dirty.h"
#include "mem/dirty_ring.h"
#include "pv/pv.h"
#include "uapi/heatmap.h"
#include "uapi/object.h"
#include "x86/irqchip.h"
#include "x86/tsc.h"

/* ---- life -------------------------------------------------------------------------- */

static int io_write(struct kl_x86_vm *kvm, bool pio, uint64_t addr, unsigned len, const void *data)
{
	struct kl_uvm *vm = kl_container_of(kvm, struct kl_uvm, kvm);

	return kl_iobus_write(&vm->bus, pio ? KL_BUS_PIO : KL_BUS_MMIO, addr, len, data);
}

static int ring_create(struct kl_uvm *vm)
{
	int fd = kl_failpoint("coalesced-memfd")
			 ? -EMFILE
			 : kl_sys_memfd("kvm-coalesced", KL_PAGE_SIZE,
					F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
	long p;

	if (fd < 0)
		return fd;
	p = kl_sys(SYS_mmap, NULL, KL_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (p < 0) {
		kl_sys_close(fd);
		return (int)p;
	}
	vm->ring_fd = fd;
	vm->ring = (struct kvm_coalesced_mmio_ring *)p;
	return 0;
}

static void ring_destroy(struct kl_uvm *vm)
{
	kl_sys_unmap(vm->ring, KL_PAGE_SIZE);
	kl_sys_close(vm->ring_fd);
}

static void list_add(struct kl_uvm *vm)
{
	kl_mutex_lock(&kl_objects_lock);
	vm->next = kl_uvms;
	vm->pprev = &kl_uvms;
	if (kl_uvms)
		kl_uvms->pprev = &vm->next;
	kl_uvms = vm;
	kl_stats_count_vm();
	kl_mutex_unlock(&kl_objects_lock);
}

static void list_del(struct kl_uvm *vm)
{
	kl_mutex_lock(&kl_objects_lock);
	kl_stats_retire(vm);
	*vm->pprev = vm->next;
	if (vm->next)
		vm->next->pprev = vm->pprev;
	kl_mutex_unlock(&kl_objects_lock);
}

int kl_uvm_create(unsigned long type, struct kl_object **new_obj)
{
	struct kl_uvm *vm;
	int r, fd;

	if (type != KVM_X86_DEFAULT_VM && type != KVM_X86_SW_PROTECTED_VM)
		return -EINVAL;
	vm = kl_failpoint("vm-alloc") ? NULL : calloc(1, sizeof(*vm));
	if (!vm)
		return -ENOMEM;
	r = ring_create(vm);
	if (r)
		goto out_free;
	r = kl_x86_vm_init(&vm->kvm);
	if (r)
		goto out_ring;
	if (type == KVM_X86_SW_PROTECTED_VM)
		kl_vm_make_private(&vm->kvm.mem);
	vm->kvm.mem.gmem_slots |= kl_config.abi_6_18;
	kl_iobus_init(&vm->bus, vm->ring);
	vm->kvm.io_write = io_write;
	fd = kl_object_open(&vm->obj, KL_OBJ_VM, "kvm-vm", 0, O_RDWR | O_CLOEXEC);
	if (fd < 0) {
		r = fd;
		goto out_vm;
	}
	list_add(vm);
	kl_heatmap_add_vm(&vm->kvm.mem);
	kl_object_publish(&vm->obj);
	*new_obj = &vm->obj;
	return fd;
out_vm:
	kl_x86_vm_destroy(&vm->kvm);
	kl_iobus_destroy(&vm->bus);
out_ring:
	ring_destroy(vm);
out_free:
	free(vm);
	return r;
}

void kl_uvm_destroy(struct kl_uvm *vm)
{
	struct kl_uvcpu *vc;

	list_del(vm);
	kl_heatmap_remove_vm(&vm->kvm.mem);
	/* From here on nobody raises an interrupt. */
	kl_irqfd_release(vm);
	for (vc = vm->vcpus; vc; vc = vc->next)
		kl_xen_timers_destroy(vc->v);
	kl_irqchip_destroy(&vm->kvm);
	/* From here on no notifier looks at its vCPUs. */
	kl_notifier_remove_vm(&vm->kvm.mem);
	while ((vc = vm->vcpus)) {
		vm->vcpus = vc->next;
		kl_uvcpu_free(vc);
	}
	kl_x86_vm_destroy(&vm->kvm);
	kl_iobus_destroy(&vm->bus);
	ring_destroy(vm);
	free(vm);
}

/* ---- ioctls ------------------------------------------------------------------------ */

static long set_memory_region(struct kl_uvm *vm, unsigned long arg, bool v2)
{
	const uint32_t v1_flags = KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY;
	struct kl_uapi_memory_region2 r = {0};

	if (kl_copy_from_user(&r, (void *)arg,
			      v2 ? sizeof(r) : sizeof(struct kvm_userspace_memory_region)))
		return -EFAULT;
	if (!v2 && (r.flags & ~v1_flags))
		return -EINVAL;
	return kl_vm_set_gmem_region(vm, &r);
}

static long get_dirty_log(struct kl_uvm *vm, unsigned long arg)
{
	struct kvm_dirty_log log;

	if (kl_copy_from_user(&log, (void *)arg, sizeof(log)))
		return -EFAULT;
	return kl_dirty_log_get(&vm->kvm.mem, log.slot >> 16, log.slot & 0xffff, log.dirty_bitmap,
				vm->kvm.mem.manual_dirty_log);
}

static long clear_dirty_log(struct kl_uvm *vm, unsigned long arg)
{
	struct kvm_clear_dirty_log log;

	if (kl_copy_from_user(&log, (void *)arg, sizeof(log)))
		return -EFAULT;
	return kl_dirty_log_clear(&vm->kvm.mem, log.slot >> 16, log.slot & 0xffff, log.first_page,
				  log.num_pages, log.dirty_bitmap);
}

static long set_boot_cpu_id(struct kl_x86_vm *kvm, const struct kl_uvm *vm, unsigned long id)
{
	int r = 0;

	kl_mutex_lock(&kvm->lock);
	if (vm->nr_vcpus)
		r = -EBUSY;
	else if (id > KL_MAX_VCPU_IDS || (kvm->max_vcpu_ids && id > kvm->max_vcpu_ids))
		r = -EINVAL;
	else
		kvm->boot_cpu_id = (uint32_t)id;
	kl_mutex_unlock(&kvm->lock);
	return r;
}

static bool has_vcpus(struct kl_uvm *vm)
{
	bool yes;

	kl_mutex_lock(&vm->kvm.lock);
	yes = vm->nr_vcpus;
	kl_mutex_unlock(&vm->kvm.lock);
	return yes;
}

static long set_identity_map_addr(struct kl_uvm *vm, unsigned long arg)
{
	struct kl_x86_vm *kvm = &vm->kvm;
	uint64_t addr;
	int r = 0;

	if (has_vcpus(vm))
		return -EINVAL;
	if (kl_copy_from_user(&addr, (void *)arg, sizeof(addr)))
		return -EFAULT;
	kl_mutex_lock(&kvm->lock);
	if (vm->nr_vcpus)
		r = -EINVAL;
	else
		kvm->identity_map_addr = addr;
	kl_mutex_unlock(&kvm->lock);
	return r;
}

/* For vCPUs to come. */
static long set_tsc_khz(struct kl_x86_vm *kvm, uint32_t khz)
{
	if (!kl_tsc_khz_valid(kvm, khz))
		return -EINVAL;
	kvm->default_tsc_khz = khz ? khz : kvm->tsc_khz;
	return 0;
}

static long coalesced(struct kl_uvm *vm, unsigned long arg, bool add)
{
	struct kvm_coalesced_mmio_zone z;

	if (kl_copy_from_user(&z, (void *)arg, sizeof(z)))
		return -EFAULT;
	return add ? kl_iobus_add_zone(&vm->bus, &z) : kl_iobus_del_zone(&vm->bus, &z);
}

static long ioeventfd(struct kl_uvm *vm, unsigned long arg)
{
	struct kvm_ioeventfd a;

	if (kl_copy_from_user(&a, (void *)arg, sizeof(a)))
		return -EFAULT;
	return kl_iobus_ioeventfd(&vm->bus, &a);
}

static long get_clock(struct kl_x86_vm *kvm, unsigned long arg)
{
	struct kvm_clock_data d;

	kl_pv_get_clock(kvm, &d);
	return kl_copy_to_user((void *)arg, &d, sizeof(d));
}

static long set_clock(struct kl_x86_vm *kvm, unsigned long arg)
{
	struct kvm_clock_data d;

	if (kl_copy_from_user(&d, (void *)arg, sizeof(d)))
		return -EFAULT;
	return kl_pv_set_clock(kvm, &d);
}

static long enable_cap(struct kl_uvm *vm, unsigned long arg)
{
	struct kvm_enable_cap cap;

	if (kl_copy_from_user(&cap, (void *)arg, sizeof(cap)))
		return -EFAULT;
	return kl_vm_enable_cap(vm, &cap);
}

long kl_vm_ioctl(struct kl_uvm *vm, unsigned cmd, unsigned long arg, struct kl_object **new_obj)
{
	struct kl_x86_vm *kvm = &vm->kvm;

	switch (cmd) {
	case KVM_CHECK_EXTENSION:
		return kl_check_extension(vm, (long)arg);
	case KVM_CREATE_VCPU:
		return kl_vm_create_vcpu(vm, arg, new_obj);
	case KVM_SET_USER_MEMORY_REGION:
		return set_memory_region(vm, arg, false);
	case KVM_SET_USER_MEMORY_REGION2:
		return set_memory_region(vm, arg, true);
	case KVM_SET_MEMORY_ATTRIBUTES:
		return kl_vm_set_memory_attributes(vm, arg);
	case KVM_CREATE_GUEST_MEMFD:
		return kl_vm_create_gmem(vm, arg, new_obj);
	case KVM_GET_DIRTY_LOG:
		return get_dirty_log(vm, arg);
	case KVM_CLEAR_DIRTY_LOG:
		return clear_dirty_log(vm, arg);
	case KVM_ENABLE_CAP:
		return enable_cap(vm, arg);
	case KVM_SET_BOOT_CPU_ID:
		return set_boot_cpu_id(kvm, vm, arg);
	case KVM_SET_TSS_ADDR:
		if (arg > KL_MAX_TSS_ADDR)
			return -EINVAL;
		kvm->tss_addr = arg;
		return 0;
	case KVM_SET_IDENTITY_MAP_ADDR:
		return set_identity_map_addr(vm, arg);
	case KVM_SET_NR_MMU_PAGES:
		if (arg < KL_MIN_MMU_PAGES)
			return -EINVAL;
		return 0; /* a hint: page tables cost what the touched memory costs */
	case KVM_SET_TSC_KHZ:
		return set_tsc_khz(kvm, (uint32_t)arg);
	case KVM_GET_TSC_KHZ:
		return kvm->default_tsc_khz;
	case KVM_REGISTER_COALESCED_MMIO:
		return coalesced(vm, arg, true);
	case KVM_UNREGISTER_COALESCED_MMIO:
		return coalesced(vm, arg, false);
	case KVM_IOEVENTFD:
		return ioeventfd(vm, arg);
	case KVM_GET_CLOCK:
		return get_clock(kvm, arg);
	case KVM_SET_CLOCK:
		return set_clock(kvm, arg);
	case KVM_X86_SET_MSR_FILTER:
		return kl_vm_set_msr_filter(vm, arg);
	case KVM_GET_STATS_FD:
		return kl_stats_open(vm, NULL, new_obj);
	case KVM_RESET_DIRTY_RINGS:
		return kl_dirty_rings_reset(&kvm->mem);
	default:
		return kl_vm_xen_ioctl(vm, cmd, arg);
	}
}
