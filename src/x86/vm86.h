/* SPDX-License-Identifier: MIT */
/*
 * Virtual-8086 extensions (CR4.VME) and protected-mode virtual interrupts (CR4.PVI): below the
 * IOPL, EFLAGS.VIF stands in for IF, and INT n may stay in the virtual-8086 task.
 */
#pragma once

#include "x86/segment.h"

/* Not allowed to touch IF. */
KL_INLINE bool kl_below_iopl(struct kl_vcpu *v)
{
	return !kl_real_mode(v) && v->cpl > ((v->rflags & KL_FL_IOPL) >> 12);
}

/* Virtual-8086 mode below IOPL 3, with VIF in place of IF. */
KL_INLINE bool kl_vme(struct kl_vcpu *v)
{
	return kl_vm86(v) && (v->cr4 & KL_CR4_VME) && kl_below_iopl(v);
}

/* CLI or STI below the IOPL: on VIF, or #GP. */
void kl_virtual_if(struct kl_vcpu *v, bool on);
/* With kl_vme(): flags as PUSHF and INT n store them. */
uint16_t kl_vm86_flags(struct kl_vcpu *v);
/* With kl_vme(): what POPF and IRET of 16 bits load. #GP if that needs the monitor; then change. */
void kl_vm86_check_flags(struct kl_vcpu *v, uint64_t val);
void kl_vm86_load_flags(struct kl_vcpu *v, uint64_t val);
/* INT n in virtual-8086 mode. True: it went to the task's own handler. Else by its gate. */
bool kl_vm86_int(struct kl_vcpu *v, unsigned vector, uint64_t next_rip);
