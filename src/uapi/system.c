/* SPDX-License-Identifier: MIT */
/*
 * ioctls of /dev/kvm.
 */
#include <errno.h>

#include "host/guard.h"
#include "uapi/object.h"
#include "x86/mce.h"

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
	case KVM_X86_GET_MCE_CAP_SUPPORTED: {
		uint64_t cap = kl_mce_cap_supported();

		return kl_copy_to_user((void *)arg, &cap, sizeof(cap));
	}
	default:
		return -EINVAL;
	}
}
