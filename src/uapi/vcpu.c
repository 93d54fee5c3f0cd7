/* SPDX-License-Identifier: MIT */
/*
 * A vCPU: its birth and death, and its ioctls. All that look at the vCPU take its mutex, as in
 * KVM: one that comes while KVM_RUN runs on another thread waits for it. The program's memory
 * is copied before or after, never under the mutex (M6).
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/failpoint.h"
#include "base/log.h"
#include "host/guard.h"
#include "host/sys.h"
#include "pv/pv.h"
#include "uapi/object.h"
#include "x86/lapic.h"
#include "x86/debug.h"
#include "x86/mce.h"
#include "x86/tsc.h"

/* ---- life -------------------------------------------------------------------------- */

/* Takes the id, or refuses it. From here to the VM's end it is in the VM's list. */
static int reserve(struct kl_uvm *vm, struct kl_uvcpu *vc, unsigned id)
{
	struct kl_x86_vm *kvm = &vm->kvm;
	int r = 0;

	kl_mutex_lock(&kvm->lock);
	if (vm->nr_vcpus >= KL_MAX_VCPUS) {
		r = -EINVAL;
		goto out;
	}
	if (!kvm->max_vcpu_ids)
		kvm->max_vcpu_ids = KL_MAX_VCPU_IDS;
	if (id >= kvm->max_vcpu_ids) {
		r = -EINVAL;
		goto out;
	}
	for (struct kl_uvcpu *p = vm->vcpus; p && !r; p = p->next) {
		if (p->id == id)
			r = -EEXIST;
	}
	if (!r) {
		vc->next = vm->vcpus;
		vm->vcpus = vc;
		vm->nr_vcpus++;
	}
out:
	kl_mutex_unlock(&kvm->lock);
	return r;
}

static void unreserve(struct kl_uvm *vm, struct kl_uvcpu *vc)
{
	struct kl_uvcpu **p;

	kl_mutex_lock(&vm->kvm.lock);
	for (p = &vm->vcpus; *p != vc;)
		p = &(*p)->next;
	*p = vc->next;
	vm->nr_vcpus--;
	kl_mutex_unlock(&vm->kvm.lock);
}

#define RUN_SIZE    (KL_VCPU_MMAP_PAGES * KL_PAGE_SIZE)
#define RING_OFFSET (KVM_DIRTY_LOG_PAGE_OFFSET * KL_PAGE_SIZE)

static long map_area(int fd, size_t size, off_t off)
{
	if (kl_failpoint("vcpu-run-map"))
		return -ENOMEM;
	return kl_sys(SYS_mmap, NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, off);
}

static int make_engine_vcpu(struct kl_uvm *vm, struct kl_uvcpu *vc, int fd)
{
	size_t ring_size = vm->kvm.mem.dirty_ring_size;
	long run = map_area(fd, RUN_SIZE, 0), ring = 0;
	struct kl_vcpu *v;
	int r = 0;

	if (run < 0)
		return (int)run;
	if (ring_size) {
		ring = map_area(fd, ring_size, RING_OFFSET);
		r = ring < 0 ? (int)ring : 0;
	}
	if (!r)
		r = kl_x86_vcpu_create(&vm->kvm, vc->id, &v);
	if (r) {
		kl_sys_unmap((void *)run, RUN_SIZE);
		if (ring > 0)
			kl_sys_unmap((void *)ring, ring_size);
		return r;
	}
	if (ring_size)
		kl_dirty_ring_init(&vc->ring, &v->core, (void *)ring);
	v->pio_data = (uint8_t *)run + KL_PIO_PAGE * KL_PAGE_SIZE;
	vc->run = (struct kvm_run *)run;
	/* --stats looks at it as soon as it is there. */
	kl_mutex_lock(&vm->kvm.lock);
	vc->v = v;
	kl_mutex_unlock(&vm->kvm.lock);
	return 0;
}

int kl_vm_create_vcpu(struct kl_uvm *vm, unsigned long id, struct kl_object **new_obj)
{
	struct kl_uvcpu *vc;
	size_t ring_size;
	char name[32];
	int r, fd;

	if (id >= KL_MAX_VCPU_IDS)
		return -EINVAL;
	vc = kl_failpoint("vcpu-alloc") ? NULL : calloc(1, sizeof(*vc));
	if (!vc)
		return -ENOMEM;
	kl_mutex_init(&vc->lock, KL_RANK_VCPU);
	vc->vm = vm;
	vc->id = (unsigned)id;
	r = reserve(vm, vc, vc->id);
	if (r)
		goto out_free;
	snprintf(name, sizeof(name), "kvm-vcpu:%u", vc->id);
	ring_size = vm->kvm.mem.dirty_ring_size; /* does not change while there are vCPUs */
	fd = kl_object_open(&vc->obj, KL_OBJ_VCPU, name,
			    ring_size ? RING_OFFSET + ring_size : RUN_SIZE, O_RDWR | O_CLOEXEC);
	if (fd < 0) {
		r = fd;
		goto out_unreserve;
	}
	r = make_engine_vcpu(vm, vc, fd);
	if (r) {
		kl_sys(SYS_close, fd);
		goto out_unreserve;
	}
	kl_object_get(&vm->obj);
	kl_stats_count_vcpu();
	kl_object_publish(&vc->obj);
	*new_obj = &vc->obj;
	return fd;
out_unreserve:
	unreserve(vm, vc);
out_free:
	kl_mutex_destroy(&vc->lock);
	free(vc);
	return r;
}

void kl_uvcpu_free(struct kl_uvcpu *vc)
{
	kl_x86_vcpu_destroy(vc->v);
	kl_sys_unmap(vc->run, RUN_SIZE);
	if (vc->ring.entries)
		kl_sys_unmap(vc->ring.entries, vc->ring.size * sizeof(*vc->ring.entries));
	kl_mutex_destroy(&vc->lock);
	free(vc);
}

/* ---- ioctls ------------------------------------------------------------------------ */

#define LOCKED(vc, call)                        \
	({                                      \
		kl_mutex_lock(&(vc)->lock);     \
		__auto_type locked_r_ = (call); \
		kl_mutex_unlock(&(vc)->lock);   \
		locked_r_;                      \
	})

/* Out: the engine fills a structure that the program gets. In: the other way round. */
#define GET(type, call)                                      \
	({                                                   \
		type x;                                      \
		memset(&x, 0, sizeof(x));                    \
		LOCKED(vc, (call, 0));                       \
		kl_copy_to_user((void *)arg, &x, sizeof(x)); \
	})
#define SET(type, call)                                                                     \
	({                                                                                  \
		type x;                                                                     \
		kl_copy_from_user(&x, (void *)arg, sizeof(x)) ? -EFAULT : LOCKED(vc, call); \
	})

static long get_mp_state(struct kl_uvcpu *vc, unsigned long arg)
{
	struct kvm_mp_state m = {0};
	int r = LOCKED(vc, kl_x86_get_mp_state(vc->v, &m));

	return r ? r : kl_copy_to_user((void *)arg, &m, sizeof(m));
}

static long translate(struct kl_uvcpu *vc, unsigned long arg)
{
	struct kvm_translation tr;
	bool writable, user;
	uint64_t gpa;
	int r;

	if (kl_copy_from_user(&tr, (void *)arg, sizeof(tr)))
		return -EFAULT;
	r = LOCKED(vc, kl_x86_translate(vc->v, tr.linear_address, &gpa, &writable, &user));
	tr.valid = !r;
	tr.physical_address = r ? ~0ull : gpa;
	/* KVM does not look at the rights. */
	tr.writeable = 1;
	tr.usermode = 0;
	return kl_copy_to_user((void *)arg, &tr, sizeof(tr));
}

static long set_signal_mask(struct kl_uvcpu *vc, unsigned long arg)
{
	struct kvm_signal_mask head;
	uint64_t mask = 0;

	if (!arg)
		goto set;
	if (kl_copy_from_user(&head, (void *)arg, sizeof(head)))
		return -EFAULT;
	if (head.len != KL_KERNEL_SIGSET_SIZE)
		return -EINVAL;
	if (kl_copy_from_user(&mask, (char *)arg + offsetof(struct kvm_signal_mask, sigset),
			      sizeof(mask)))
		return -EFAULT;
set:
	kl_mutex_lock(&vc->lock);
	vc->sigmask = mask;
	vc->sigmask_set = arg;
	kl_mutex_unlock(&vc->lock);
	return 0;
}

static long get_xsave(struct kl_uvcpu *vc, unsigned long arg)
{
	uint8_t buf[KL_XSAVE_SIZE] __attribute__((aligned(64)));

	_Static_assert(sizeof(buf) == sizeof(struct kvm_xsave), "GET_XSAVE and GET_XSAVE2 agree");
	memset(buf, 0, sizeof(buf));
	LOCKED(vc, (kl_x86_get_xsave(vc->v, buf, sizeof(buf)), 0));
	return kl_copy_to_user((void *)arg, buf, sizeof(buf));
}

static long set_xsave(struct kl_uvcpu *vc, unsigned long arg)
{
	uint8_t buf[KL_XSAVE_SIZE] __attribute__((aligned(64)));

	if (kl_copy_from_user(buf, (void *)arg, sizeof(buf)))
		return -EFAULT;
	return LOCKED(vc, kl_x86_set_xsave(vc->v, buf, sizeof(buf)));
}

static long get_lapic(struct kl_uvcpu *vc, unsigned long arg)
{
	struct kvm_lapic_state s;

	if (!vc->v->apic)
		return -EINVAL;
	LOCKED(vc, (kl_apic_get_state(vc->v, &s), 0));
	return kl_copy_to_user((void *)arg, &s, sizeof(s));
}

static long set_lapic(struct kl_uvcpu *vc, unsigned long arg)
{
	if (!vc->v->apic)
		return -EINVAL;
	return SET(struct kvm_lapic_state, kl_apic_set_state(vc->v, &x));
}

static long set_vapic_addr(struct kl_uvcpu *vc, unsigned long arg)
{
	if (!vc->v->apic)
		return -EINVAL;
	return SET(struct kvm_vapic_addr, kl_pv_vapic_set(vc->v, x.vapic_addr));
}

/* Without an APIC of the engine's, too, where there is nothing to report. */
static long tpr_access_reporting(struct kl_uvcpu *vc, unsigned long arg)
{
	struct kvm_tpr_access_ctl ctl;

	if (kl_copy_from_user(&ctl, (void *)arg, sizeof(ctl)))
		return -EFAULT;
	if (ctl.flags)
		return -EINVAL;
	LOCKED(vc, (vc->v->tpr_reporting = ctl.enabled));
	return kl_copy_to_user((void *)arg, &ctl, sizeof(ctl));
}

/* The TSC's offset is the only attribute that a vCPU has. */
static long device_attr(struct kl_uvcpu *vc, unsigned cmd, unsigned long arg)
{
	struct kvm_device_attr attr;
	uint64_t offset;

	if (kl_copy_from_user(&attr, (void *)arg, sizeof(attr)))
		return -EFAULT;
	if (attr.group != KVM_VCPU_TSC_CTRL || attr.attr != KVM_VCPU_TSC_OFFSET)
		return -ENXIO;
	switch (cmd) {
	case KVM_GET_DEVICE_ATTR:
		offset = LOCKED(vc, vc->v->tsc_offset);
		return kl_copy_to_user((void *)attr.addr, &offset, sizeof(offset));
	case KVM_SET_DEVICE_ATTR:
		if (kl_copy_from_user(&offset, (void *)attr.addr, sizeof(offset)))
			return -EFAULT;
		return LOCKED(vc, (kl_tsc_set_offset(vc->v, offset), 0));
	default:
		return 0;
	}
}

static int enable_cap(struct kl_vcpu *v, const struct kvm_enable_cap *cap)
{
	if (cap->flags)
		return -EINVAL;
	switch (cap->cap) {
	case KVM_CAP_ENFORCE_PV_FEATURE_CPUID:
		v->pv->enforce = cap->args[0];
		return 0;
	case KVM_CAP_HYPERV_ENFORCE_CPUID:
		v->pv->hv.enforce = cap->args[0];
		return 0;
	default:
		return -EINVAL;
	}
}

/* As KVM: the padding is not looked at, and one page is success. */
static long pre_fault_memory(struct kl_uvcpu *vc, unsigned long arg)
{
	struct kvm_pre_fault_memory r;
	uint64_t gpa, size;
	int ret;

	if (kl_copy_from_user(&r, (void *)arg, sizeof(r)))
		return -EFAULT;
	gpa = r.gpa;
	size = r.size;
	vc->v->core.memory_fault = false;
	if (r.flags || ((gpa | size) & ~KL_PAGE_MASK) || gpa + size <= gpa)
		ret = -EINVAL;
	else
		ret = LOCKED(vc, kl_x86_pre_fault(vc->v, &gpa, &size));
	if (ret < 0 && vc->v->core.memory_fault)
		kl_memory_fault_out(vc->run, vc->v); /* as KVM, there too */
	if (size != r.size)
		ret = 0;
	r.gpa = gpa;
	r.size = size;
	return kl_copy_to_user((void *)arg, &r, sizeof(r)) ? -EFAULT : ret;
}

long kl_vcpu_ioctl(struct kl_uvcpu *vc, unsigned cmd, unsigned long arg, struct kl_object **new_obj)
{
	struct kl_vcpu *v = vc->v;

	switch (cmd) {
	case KVM_RUN:
		return arg ? -EINVAL : LOCKED(vc, kl_uvcpu_run(vc));
	case KVM_GET_REGS:
		return GET(struct kvm_regs, kl_x86_get_regs(v, &x));
	case KVM_SET_REGS:
		return SET(struct kvm_regs, (kl_x86_set_regs(v, &x), 0));
	case KVM_GET_SREGS:
		return GET(struct kvm_sregs, kl_x86_get_sregs(v, &x));
	case KVM_SET_SREGS:
		return SET(struct kvm_sregs, kl_x86_set_sregs(v, &x));
	case KVM_GET_SREGS2:
		return GET(struct kvm_sregs2, kl_x86_get_sregs2(v, &x));
	case KVM_SET_SREGS2:
		return SET(struct kvm_sregs2, kl_x86_set_sregs2(v, &x));
	case KVM_GET_FPU:
		return GET(struct kvm_fpu, kl_x86_get_fpu(v, &x));
	case KVM_SET_FPU:
		return SET(struct kvm_fpu, (kl_x86_set_fpu(v, &x), 0));
	case KVM_GET_XSAVE:
	case KVM_GET_XSAVE2:
		return get_xsave(vc, arg);
	case KVM_SET_XSAVE:
		return set_xsave(vc, arg);
	case KVM_GET_XCRS:
		return GET(struct kvm_xcrs, kl_x86_get_xcrs(v, &x));
	case KVM_SET_XCRS:
		return SET(struct kvm_xcrs, kl_x86_set_xcrs(v, &x));
	case KVM_GET_DEBUGREGS:
		return GET(struct kvm_debugregs, kl_x86_get_debugregs(v, &x));
	case KVM_SET_GUEST_DEBUG:
		return SET(struct kvm_guest_debug, kl_x86_set_guest_debug(v, &x));
	case KVM_SET_DEBUGREGS:
		return SET(struct kvm_debugregs, kl_x86_set_debugregs(v, &x));
	case KVM_GET_VCPU_EVENTS:
		return GET(struct kvm_vcpu_events, kl_x86_get_events(v, &x));
	case KVM_SET_VCPU_EVENTS:
		return SET(struct kvm_vcpu_events, kl_x86_set_events(v, &x));
	case KVM_GET_MP_STATE:
		return get_mp_state(vc, arg);
	case KVM_SET_MP_STATE:
		return SET(struct kvm_mp_state, kl_x86_set_mp_state(v, &x));
	case KVM_GET_MSRS:
		return kl_msrs_get(vc, arg);
	case KVM_SET_MSRS:
		return kl_msrs_set(vc, arg);
	case KVM_GET_CPUID2:
		return kl_cpuid_get(vc, arg);
	case KVM_SET_CPUID2:
		return kl_cpuid_set(vc, arg, true);
	case KVM_SET_CPUID:
		return kl_cpuid_set(vc, arg, false);
	case KVM_GET_SUPPORTED_HV_CPUID:
		return kl_cpuid_get_hyperv(vc, arg);
	case KVM_TRANSLATE:
		return translate(vc, arg);
	case KVM_PRE_FAULT_MEMORY:
		return pre_fault_memory(vc, arg);
	case KVM_INTERRUPT:
		return SET(struct kvm_interrupt, kl_x86_interrupt(v, x.irq));
	case KVM_NMI:
		return LOCKED(vc, (kl_x86_nmi(v), 0));
	case KVM_GET_LAPIC:
		return get_lapic(vc, arg);
	case KVM_SET_LAPIC:
		return set_lapic(vc, arg);
	case KVM_SET_VAPIC_ADDR:
		return set_vapic_addr(vc, arg);
	case KVM_TPR_ACCESS_REPORTING:
		return tpr_access_reporting(vc, arg);
	case KVM_SMI: /* no SMM */
		return -ENOTTY;
	case KVM_SET_SIGNAL_MASK:
		return set_signal_mask(vc, arg);
	case KVM_SET_TSC_KHZ:
		return LOCKED(vc, kl_tsc_set_khz(v, (uint32_t)arg));
	case KVM_GET_TSC_KHZ:
		return LOCKED(vc, v->tsc_khz);
	case KVM_X86_SETUP_MCE:
		return SET(uint64_t, kl_mce_setup(v, x));
	case KVM_X86_SET_MCE:
		return SET(struct kvm_x86_mce, kl_mce_inject(v, &x));
	case KVM_HAS_DEVICE_ATTR:
	case KVM_GET_DEVICE_ATTR:
	case KVM_SET_DEVICE_ATTR:
		return device_attr(vc, cmd, arg);
	case KVM_ENABLE_CAP:
		return SET(struct kvm_enable_cap, enable_cap(v, &x));
	case KVM_KVMCLOCK_CTRL:
		return LOCKED(vc, kl_pv_guest_stopped(v));
	case KVM_XEN_VCPU_GET_ATTR:
	case KVM_XEN_VCPU_SET_ATTR:
		return kl_vcpu_xen_attr(vc, arg, cmd == KVM_XEN_VCPU_SET_ATTR);
	case KVM_GET_STATS_FD:
		return kl_stats_open(vc->vm, vc, new_obj);
	default:
		return -EINVAL;
	}
}
