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
	KL_MSR_EBC_FREQUENCY_ID = 0x2c,
	KL_MSR_SMI_COUNT = 0x34,
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
	KL_MSR_BBL_CR_CTL3 = 0x11e,
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
	KL_MSR_LASTBRANCH_FROM = 0x1db,
	KL_MSR_POWER_CTL = 0x1fc,
	KL_MSR_MTRR_VAR0 = 0x200,
	KL_MSR_MTRR_VAR15 = 0x20f,
	KL_MSR_MTRR_FIX64K = 0x250,
	KL_MSR_MTRR_FIX16K = 0x258,
	KL_MSR_MTRR_FIX4K = 0x268,
	KL_MSR_PAT = 0x277,
	KL_MSR_MTRR_DEFTYPE = 0x2ff,
	KL_MSR_MC0_CTL2 = 0x280,
	KL_MSR_PERF_CAPABILITIES = 0x345,
	KL_MSR_MC0_CTL = 0x400,
	KL_MSR_MCG_EXT_CTL = 0x4d0,
	KL_MSR_TSC_DEADLINE = 0x6e0,
	KL_MSR_X2APIC = 0x800,
	KL_MSR_XSS = 0xda0,
	KL_MSR_KVM_WALL_CLOCK_NEW = 0x4b564d00,
	KL_MSR_KVM_SYSTEM_TIME_NEW = 0x4b564d01,
	KL_MSR_KVM_ASYNC_PF_EN = 0x4b564d02,
	KL_MSR_KVM_STEAL_TIME = 0x4b564d03,
	KL_MSR_KVM_PV_EOI = 0x4b564d04,
	KL_MSR_KVM_POLL_CONTROL = 0x4b564d05,
	KL_MSR_KVM_ASYNC_PF_INT = 0x4b564d06,
	KL_MSR_KVM_ASYNC_PF_ACK = 0x4b564d07,
	KL_MSR_EFER = 0xc0000080,
	KL_MSR_STAR = 0xc0000081,
	KL_MSR_LSTAR = 0xc0000082,
	KL_MSR_CSTAR = 0xc0000083,
	KL_MSR_FMASK = 0xc0000084,
	KL_MSR_FS_BASE = 0xc0000100,
	KL_MSR_GS_BASE = 0xc0000101,
	KL_MSR_KERNEL_GS_BASE = 0xc0000102,
	KL_MSR_TSC_AUX = 0xc0000103,
	KL_MSR_TSC_RATIO = 0xc0000104,
	KL_MSR_K7_EVNTSEL0 = 0xc0010000,
	KL_MSR_K7_PERFCTR3 = 0xc0010007,
	KL_MSR_HWCR = 0xc0010015,
	KL_MSR_K7_CLK_CTL = 0xc001001b,
	KL_MSR_VM_CR = 0xc0010114,
	KL_MSR_VM_HSAVE_PA = 0xc0010117,
	KL_MSR_VIRT_SPEC_CTRL = 0xc001011f,
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

enum kl_msr_result {
	KL_MSR_OK,
	KL_MSR_REFUSED, /* #GP */
	KL_MSR_UNKNOWN, /* there is no such register */
	KL_MSR_FILTERED /* by the program (only for the guest's instructions) */
};

/* By the program (@host) or the guest. Context: the vCPU's thread; of the guest, in an instruction.
 */
enum kl_msr_result kl_msr_get(struct kl_vcpu *v, uint32_t index, uint64_t *data, bool host);
enum kl_msr_result kl_msr_set(struct kl_vcpu *v, uint32_t index, uint64_t data, bool host);
/* The program may read, and set to 0, what the list has, even if it is nothing here. */
bool kl_msr_advertised(uint32_t index);

/* Order in v->msr_mtrr: 16 variable, 64K, 2 of 16K, 8 of 4K, default type. -1: not an MTRR. */
int kl_mtrr_slot(uint32_t index);
bool kl_mtrr_valid(struct kl_vcpu *v, int slot, uint64_t data);
bool kl_pat_valid(uint64_t data);

/* Does the filter let the guest do that? @type: KVM_MSR_FILTER_*. Context: in an instruction. */
bool kl_msr_allowed(struct kl_vcpu *v, uint32_t index, uint32_t type);

/* Values at power-on. */
void kl_msr_reset(struct kl_vcpu *v, bool init_event);
/* IA32_APIC_BASE by the program or the guest: 0 or -EINVAL. */
int kl_set_apic_base(struct kl_vcpu *v, uint64_t base, bool host) KL_MUST_CHECK;
void kl_msr_filter_free(struct kl_x86_vm *vm);
/* KL_PENDING_MSR: the program has answered. True: the instruction is done. */
bool kl_msr_complete(struct kl_vcpu *v);
