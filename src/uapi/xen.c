/* SPDX-License-Identifier: MIT */
/* The ioctls of Xen HVM (pv/xen.h), and of Hyper-V (pv/hyperv.h). */
#include <errno.h>

#include "host/guard.h"
#include "pv/pv.h"
#include "pv/xen_abi.h"
#include "uapi/object.h"

int kl_xen_capability(void)
{
	int cap = KVM_XEN_HVM_CONFIG_HYPERCALL_MSR | KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL |
		  KVM_XEN_HVM_CONFIG_SHARED_INFO | KVM_XEN_HVM_CONFIG_EVTCHN_2LEVEL |
		  KVM_XEN_HVM_CONFIG_EVTCHN_SEND | KVM_XEN_HVM_CONFIG_PVCLOCK_TSC_UNSTABLE |
		  KVM_XEN_HVM_CONFIG_SHARED_INFO_HVA;

	if (kl_pv_steal_supported())
		cap |= KVM_XEN_HVM_CONFIG_RUNSTATE | KVM_XEN_HVM_CONFIG_RUNSTATE_UPDATE_FLAG;
	return cap;
}

static long config(struct kl_x86_vm *kvm, unsigned long arg)
{
	struct kvm_xen_hvm_config c;

	if (kl_copy_from_user(&c, (void *)arg, sizeof(c)))
		return -EFAULT;
	return kl_xen_config(kvm, &c);
}

static long vm_attr(struct kl_x86_vm *kvm, unsigned long arg, bool set)
{
	struct kvm_xen_hvm_attr a;
	int r;

	if (kl_copy_from_user(&a, (void *)arg, sizeof(a)))
		return -EFAULT;
	if (set)
		return kl_xen_set_attr(kvm, &a);
	r = kl_xen_get_attr(kvm, &a);
	return r ? r : kl_copy_to_user((void *)arg, &a, sizeof(a));
}

static long evtchn_send(struct kl_x86_vm *kvm, unsigned long arg)
{
	struct kvm_irq_routing_xen_evtchn e;

	if (kl_copy_from_user(&e, (void *)arg, sizeof(e)))
		return -EFAULT;
	return kl_xen_evtchn_send(kvm, &e);
}

static long hyperv_eventfd(struct kl_x86_vm *kvm, unsigned long arg)
{
	struct kvm_hyperv_eventfd e;

	if (kl_copy_from_user(&e, (void *)arg, sizeof(e)))
		return -EFAULT;
	return kl_hv_eventfd(kvm, &e);
}

long kl_vm_xen_ioctl(struct kl_uvm *vm, unsigned cmd, unsigned long arg)
{
	struct kl_x86_vm *kvm = &vm->kvm;

	switch (cmd) {
	case KVM_XEN_HVM_CONFIG:
		return config(kvm, arg);
	case KVM_XEN_HVM_GET_ATTR:
	case KVM_XEN_HVM_SET_ATTR:
		return vm_attr(kvm, arg, cmd == KVM_XEN_HVM_SET_ATTR);
	case KVM_XEN_HVM_EVTCHN_SEND:
		return evtchn_send(kvm, arg);
	case KVM_HYPERV_EVENTFD:
		return hyperv_eventfd(kvm, arg);
	default:
		return kl_vm_irq_ioctl(vm, cmd, arg);
	}
}

long kl_vcpu_xen_attr(struct kl_uvcpu *vc, unsigned long arg, bool set)
{
	struct kvm_xen_vcpu_attr a;
	int r;

	if (kl_copy_from_user(&a, (void *)arg, sizeof(a)))
		return -EFAULT;
	kl_mutex_lock(&vc->lock);
	r = set ? kl_xen_vcpu_set_attr(vc->v, &a) : kl_xen_vcpu_get_attr(vc->v, &a);
	kl_mutex_unlock(&vc->lock);
	return r || set ? r : kl_copy_to_user((void *)arg, &a, sizeof(a));
}
