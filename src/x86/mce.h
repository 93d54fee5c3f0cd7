/* SPDX-License-Identifier: MIT */
/*
 * Machine checks: the banks' MSRs, and errors that the program injects. The engine itself never
 * makes one: what the host's memory loses is the program's to report (KVM_X86_SET_MCE).
 */
#pragma once

#include "x86/vcpu.h"

#define KL_MCE_BANKS  32u
#define KL_MCG_CTL_P  (1ull << 8)
#define KL_MCG_CMCI_P (1ull << 10)
#define KL_MCG_SER_P  (1ull << 24)
#define KL_MCG_LMCE_P (1ull << 27)

/* KVM_X86_GET_MCE_CAP_SUPPORTED. */
uint64_t kl_mce_cap_supported(void);
/* At power-on: all banks, no capability. */
void kl_mce_init(struct kl_vcpu *v);
/* KVM_X86_SETUP_MCE: 0 or -EINVAL. */
int kl_mce_setup(struct kl_vcpu *v, uint64_t mcg_cap) KL_MUST_CHECK;
/* KVM_X86_SET_MCE: 0 or -EINVAL. */
int kl_mce_inject(struct kl_vcpu *v, const struct kvm_x86_mce *mce) KL_MUST_CHECK;

/* Is @index one of these MSRs? */
bool kl_mce_msr(uint32_t index);
/* False: refused. */
bool kl_mce_msr_read(struct kl_vcpu *v, uint32_t index, uint64_t *data, bool host);
bool kl_mce_msr_write(struct kl_vcpu *v, uint32_t index, uint64_t data, bool host);
