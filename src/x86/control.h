/* SPDX-License-Identifier: MIT */
/*
 * Control registers, for system.c, state.c and msr.c.
 */
#pragma once

#include "x86/vcpu.h"

#define KL_EFER_KNOWN (KL_EFER_SCE | KL_EFER_LME | KL_EFER_LMA | KL_EFER_NX)
#define KL_CR0_KNOWN                                                                         \
	(KL_CR0_PE | KL_CR0_MP | KL_CR0_EM | KL_CR0_TS | KL_CR0_ET | KL_CR0_NE | KL_CR0_WP | \
	 KL_CR0_AM | KL_CR0_NW | KL_CR0_CD | KL_CR0_PG)

/* CR4 bits that this engine has, whatever the program's CPUID says (cpuid.c). */
uint64_t kl_cr4_supported(void);
bool kl_cr0_valid(uint64_t cr0);
bool kl_cr4_valid(struct kl_vcpu *v, uint64_t cr4);
/* For the guest (WRMSR). */
bool kl_efer_valid(struct kl_vcpu *v, uint64_t efer);
bool kl_xcr0_valid(struct kl_vcpu *v, uint64_t xcr0);

/* MOV to CR by the guest. May leave: #GP, or for the PDPTEs. Context: in an instruction. */
void kl_write_cr0(struct kl_vcpu *v, uint64_t val);
void kl_write_cr3(struct kl_vcpu *v, uint64_t val);
void kl_write_cr4(struct kl_vcpu *v, uint64_t val);

/* PAE paging without long mode: the PDPTEs count. */
KL_INLINE bool kl_pae_paging(uint64_t cr0, uint64_t cr4, uint64_t efer)
{
	return (cr0 & KL_CR0_PG) && (cr4 & KL_CR4_PAE) && !(efer & KL_EFER_LMA);
}
/* Read and check them. Not IN_GUEST. 0, -EINVAL malformed, or -errno of the access. */
int kl_read_pdptes(struct kl_vcpu *v, uint64_t cr3, uint64_t pdpte[4]) KL_MUST_CHECK;
