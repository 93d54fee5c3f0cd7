/* SPDX-License-Identifier: MIT */
/*
 * ioctls of /dev/kvm.
 */
#include <errno.h>

#include "host/guard.h"
#include "uapi/object.h"
#include "x86/fpu.h"
#include "x86/mce.h"

/* What guests may have in XCR0 is the only attribute of the system. */
static long device_attr(unsigned cmd, unsigned long arg)
{
	struct kvm_device_attr attr;
	uint64_t xcr0 = kl_xcr0_supported();

	if (kl_copy_from_user(&attr, (void *)arg, sizeof(attr)))
		return -EFAULT;
	if (attr.group || attr.attr != KVM_X86_XCOMP_GUEST_SUPP)
		return -ENXIO;
	return cmd == KVM_HAS_DEVICE_ATTR ? 0
					  : kl_copy_to_user((void *)attr.addr, &xcr0, sizeof(xcr0));
}

long kl_system_ioctl(unsigned cmd, unsigned long arg, struct kl_object **new_obj)
{
	switch (cmd) {
	case KVM_GET_API_VERSION:
		return arg ? -EINVAL : KVM_API_VERSION;
	case KVM_CREATE_VM:
		return kl_uvm_create(arg, new_obj);
	case KVM_CHECK_EXTENSION:
		return kl_check_extension(NULL, (long)arg);
	case KVM_GET_VCPU_MMAP_SIZE:
		return arg ? -EINVAL : (long)(KL_VCPU_MMAP_PAGES * KL_PAGE_SIZE);
	case KVM_GET_MSR_INDEX_LIST:
		return kl_msrs_index_list(arg, false);
	case KVM_GET_MSR_FEATURE_INDEX_LIST:
		return kl_msrs_index_list(arg, true);
	case KVM_GET_MSRS:
		return kl_msrs_get(NULL, arg);
	case KVM_GET_SUPPORTED_CPUID:
		return kl_cpuid_get_system(arg, false);
	case KVM_GET_EMULATED_CPUID:
		return kl_cpuid_get_system(arg, true);
	case KVM_GET_SUPPORTED_HV_CPUID:
		return kl_cpuid_get_hyperv(NULL, arg);
	case KVM_HAS_DEVICE_ATTR:
	case KVM_GET_DEVICE_ATTR:
		return device_attr(cmd, arg);
	case KVM_X86_GET_MCE_CAP_SUPPORTED: {
		uint64_t cap = kl_mce_cap_supported();

		return kl_copy_to_user((void *)arg, &cap, sizeof(cap));
	}
	default:
		return -EINVAL;
	}
}
