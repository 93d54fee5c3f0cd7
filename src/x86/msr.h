/* SPDX-License-Identifier: MIT */
/* MSR numbers and what other files need of them. */
#pragma once

#include "x86/vcpu.h"

enum kl_msr_index {
	KL_MSR_TSC = 0x10,
	KL_MSR_KVM_WALL_CLOCK = 0x11,
	KL_MSR_KVM_SYSTEM_TIME = 0x12,
	KL_MSR_PLATFORM_ID = 0x17,
	KL_MSR_APIC_BASE = 0x1b,
	KL_MSR_EBL_CR_POWERON = 0x2a,
	KL_MSR_FEATURE_CONTROL = 0x3a,
	KL_MSR_TSC_ADJUST = 0x3b,
	KL_MSR_UCODE_WRITE = 0x79,
	KL_MSR_UCODE_REV = 0x8b,
	KL_MSR_P6_PERFCTR0 = 0xc1,
	KL_MSR_P6_PERFCTR1 = 0xc2,
	KL_MSR_FSB_FREQ = 0xcd,
	KL_MSR_PLATFORM_INFO = 0xce,
	KL_MSR_MTRRCAP = 0xfe,
	KL_MSR_ARCH_CAPABILITIES = 0x10a,
	KL_MSR_MISC_FEATURES = 0x140,
	KL_MSR_SYSENTER_CS = 0x174,
	KL_MSR_SYSENTER_ESP = 0x175,
	KL_MSR_SYSENTER_EIP = 0x176,
	KL_MSR_MCG_CAP = 0x179,
	KL_MSR_MCG_STATUS = 0x17a,
	KL_MSR_MCG_CTL = 0x17b,
	KL_MSR_P6_EVNTSEL0 = 0x186,
	KL_MSR_P6_EVNTSEL1 = 0x187,
	KL_MSR_PERF_STATUS = 0x198,
	KL_MSR_PERF_CTL = 0x199,
	KL_MSR_MISC_ENABLE = 0x1a0,
	KL_MSR_DEBUGCTL = 0x1d9,
	KL_MSR_POWER_CTL = 0x1fc,
	KL_MSR_MTRR_VAR0 = 0x200,
	KL_MSR_MTRR_VAR15 = 0x20f,
	KL_MSR_MTRR_FIX64K = 0x250,
	KL_MSR_MTRR_FIX16K = 0x258,
	KL_MSR_MTRR_FIX4K = 0x268,
	KL_MSR_PAT = 0x277,
	KL_MSR_MTRR_DEFTYPE = 0x2ff,
	KL_MSR_MC0_CTL2 = 0x280,
	KL_MSR_MC0_CTL = 0x400,
	KL_MSR_MCG_EXT_CTL = 0x4d0,
	KL_MSR_TSC_DEADLINE = 0x6e0,
	KL_MSR_X2APIC = 0x800,
	KL_MSR_XSS = 0xda0,
	KL_MSR_KVM_WALL_CLOCK_NEW = 0x4b564d00,
	KL_MSR_KVM_SYSTEM_TIME_NEW = 0x4b564d01,
	KL_MSR_KVM_STEAL_TIME = 0x4b564d03,
	KL_MSR_KVM_POLL_CONTROL = 0x4b564d05,
	KL_MSR_EFER = 0xc0000080,
	KL_MSR_STAR = 0xc0000081,
	KL_MSR_LSTAR = 0xc0000082,
	KL_MSR_CSTAR = 0xc0000083,
	KL_MSR_FMASK = 0xc0000084,
	KL_MSR_FS_BASE = 0xc0000100,
	KL_MSR_GS_BASE = 0xc0000101,
	KL_MSR_KERNEL_GS_BASE = 0xc0000102,
	KL_MSR_TSC_AUX = 0xc0000103,
	KL_MSR_K7_EVNTSEL0 = 0xc0010000,
	KL_MSR_K7_PERFCTR3 = 0xc0010007,
	KL_MSR_HWCR = 0xc0010015,
	KL_MSR_DE_CFG = 0xc0011029,
};

#define KL_PAT_DEFAULT         0x0007040600070406ull
#define KL_MISC_ENABLE_DEFAULT ((1ull << 11) | (1ull << 12)) /* no BTS, no PEBS */
#define KL_HWCR_MCSTATUS_WR_EN (1ull << 18)
#define KL_NR_VAR_MTRR         8
#define KL_APIC_BASE_BSP       (1u << 8)
#define KL_APIC_BASE_X2APIC    (1u << 10)
#define KL_APIC_BASE_ENABLE    (1u << 11)
#define KL_APIC_BASE_ADDR      0xfee00000u

/* Values at power-on. */
void kl_msr_reset(struct kl_vcpu *v, bool init_event);
/* IA32_APIC_BASE by the program or the guest: 0 or -EINVAL. */
int kl_set_apic_base(struct kl_vcpu *v, uint64_t base, bool host) KL_MUST_CHECK;
void kl_msr_filter_free(struct kl_x86_vm *vm);
/* KL_PENDING_MSR: the program has answered. True: the instruction is done. */
bool kl_msr_complete(struct kl_vcpu *v);
