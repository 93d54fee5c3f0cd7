/* SPDX-License-Identifier: MIT */
/* Which MSRs the program is told of: KVM_GET_MSR_INDEX_LIST, KVM_GET_MSR_FEATURE_INDEX_LIST. */
#include <errno.h>

#include "x86/guest_cpuid.h"
#include "x86/msr.h"

const uint32_t kl_x86_msr_list[] = {
	KL_MSR_SYSENTER_CS,
	KL_MSR_SYSENTER_ESP,
	KL_MSR_SYSENTER_EIP,
	KL_MSR_STAR,
	KL_MSR_CSTAR,
	KL_MSR_KERNEL_GS_BASE,
	KL_MSR_FMASK,
	KL_MSR_LSTAR,
	KL_MSR_TSC,
	KL_MSR_PAT,
	KL_MSR_TSC_AUX,
	KL_MSR_DEBUGCTL,
	KL_MSR_LASTBRANCH_FROM,
	KL_MSR_LASTBRANCH_FROM + 1, /* to */
	KL_MSR_LASTBRANCH_FROM + 2, /* the same of the last interrupt */
	KL_MSR_LASTBRANCH_FROM + 3,
	KL_MSR_TSC_ADJUST,
	KL_MSR_TSC_DEADLINE,
	KL_MSR_ARCH_CAPABILITIES,
	KL_MSR_PERF_CAPABILITIES,
	KL_MSR_MISC_ENABLE,
	KL_MSR_MCG_STATUS,
	KL_MSR_MCG_CTL,
	KL_MSR_SMI_COUNT,
	KL_MSR_PLATFORM_INFO,
	KL_MSR_MISC_FEATURES,
	KL_MSR_POWER_CTL,
	KL_MSR_UCODE_REV,
	KL_MSR_HWCR,
	KL_MSR_KVM_WALL_CLOCK,
	KL_MSR_KVM_SYSTEM_TIME,
	KL_MSR_KVM_WALL_CLOCK_NEW,
	KL_MSR_KVM_SYSTEM_TIME_NEW,
	KL_MSR_KVM_STEAL_TIME,
	KL_MSR_KVM_PV_EOI,
	KL_MSR_KVM_POLL_CONTROL,
	KL_MSR_KVM_ASYNC_PF_EN,
	KL_MSR_KVM_ASYNC_PF_INT,
	KL_MSR_KVM_ASYNC_PF_ACK,
	/* Hyper-V's (pv/hyperv.h) */
	0x40000000, /* GUEST_OS_ID */
	0x40000001, /* HYPERCALL */
	0x40000020, /* TIME_REF_COUNT */
	0x40000021, /* REFERENCE_TSC */
	0x40000022, /* TSC_FREQUENCY */
	0x40000023, /* APIC_FREQUENCY */
	0x40000100, /* CRASH_P0 ... P4 */
	0x40000101,
	0x40000102,
	0x40000103,
	0x40000104,
	0x40000105, /* CRASH_CTL */
	0x40000003, /* RESET */
	0x40000002, /* VP_INDEX */
	0x40000010, /* VP_RUNTIME */
	0x40000073, /* VP_ASSIST_PAGE */
	0x40000106, /* REENLIGHTENMENT_CONTROL */
	0x40000107, /* TSC_EMULATION_CONTROL */
	0x40000108, /* TSC_EMULATION_STATUS */
	0x40000118, /* TSC_INVARIANT_CONTROL */
	/* Up to here on every host; the rest on AMD's. */
	KL_MSR_VM_HSAVE_PA,
	KL_MSR_VIRT_SPEC_CTRL,
	KL_MSR_TSC_RATIO,
};
#define NR_AMD_MSRS 3u

unsigned kl_x86_nr_msrs(void)
{
	unsigned n = KL_ARRAY_SIZE(kl_x86_msr_list);

	return kl_host_is_intel() ? n - NR_AMD_MSRS : n;
}

const uint32_t kl_x86_feature_msr_list[] = {
	KL_MSR_DE_CFG,
	KL_MSR_UCODE_REV,
	KL_MSR_ARCH_CAPABILITIES,
};
const unsigned kl_x86_nr_feature_msrs = KL_ARRAY_SIZE(kl_x86_feature_msr_list);

bool kl_msr_advertised(uint32_t index)
{
	for (unsigned i = 0; i < kl_x86_nr_msrs(); i++)
		if (kl_x86_msr_list[i] == index)
			return true;
	return false;
}

int kl_x86_get_feature_msr(uint32_t index, uint64_t *data)
{
	switch (index) {
	case KL_MSR_DE_CFG:
		*data = 2; /* LFENCE is serializing: each instruction is finished before the next */
		return 0;
	case KL_MSR_UCODE_REV:
		*data = kl_host_is_intel() ? 1ull << 32 : 0x01000065;
		return 0;
	case KL_MSR_ARCH_CAPABILITIES:
		*data = 0;
		return 0;
	default:
		*data = 0;
		return kl_msr_advertised(index) ? 0 : -EINVAL;
	}
}
