/* SPDX-License-Identifier: MIT */
/*
 * Breakpoints: the guest's debug registers, or the program's in their place
 * (KVM_SET_GUEST_DEBUG), and the #DB that they cause.
 *
 * Nothing is asked in the hot path. A page with an armed breakpoint gets no TLB tag for the
 * accesses that it watches, so that they take the slow path, which asks; code in a page with
 * an instruction breakpoint is executed by kl_block_one(). What an instruction hits is
 * collected in v->bp.hit, becomes v->bp.trap when it has finished, and #DB or
 * KVM_EXIT_DEBUG when run.c looks.
 */
#pragma once

#include "x86/vcpu.h"

#define KL_DR6_BD    (1u << 13)
#define KL_DR6_BS    (1u << 14)
#define KL_DR6_BT    (1u << 15)
#define KL_DR6_FIXED 0xffff0ff0u
#define KL_DR6_TRAPS 0xfu
#define KL_DR7_FIXED 0x400u
#define KL_DR7_GD    (1u << 13)

/* The DR7 that counts. */
KL_INLINE uint64_t kl_debug_dr7(const struct kl_vcpu *v)
{
	return v->debug.control & KVM_GUESTDBG_USE_HW_BP ? v->debug.arch.debugreg[7] : v->dr7;
}

/* Does the program get every #DB of the processor? */
KL_INLINE bool kl_debug_program_owns(const struct kl_vcpu *v)
{
	return v->debug.control & (KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_USE_HW_BP);
}

/* Whether interrupts and NMIs have to wait for the debugger. */
KL_INLINE bool kl_debug_blocks_irq(const struct kl_vcpu *v)
{
	return v->debug.control & KVM_GUESTDBG_BLOCKIRQ;
}

/* After DR0 to DR3, DR7 or v->debug changed. */
void kl_debug_update(struct kl_vcpu *v);

/* KVM_SET_GUEST_DEBUG. 0, or -EBUSY: an exception is pending already. */
int kl_x86_set_guest_debug(struct kl_vcpu *v, const struct kvm_guest_debug *d) KL_MUST_CHECK;

/* ---- in an instruction ---- */

/* Take the tags off that a breakpoint in the page @tag forbids. */
void kl_debug_mask_tlb(struct kl_vcpu *v, uint64_t tag, struct kl_tlb_entry *e);
/* Has the page of @lin an instruction breakpoint? */
bool kl_debug_code_page(struct kl_vcpu *v, uint64_t lin);
/* The instruction at @lin is next: leaves with #DB if a breakpoint is there. */
void kl_debug_fetch(struct kl_vcpu *v, uint64_t lin);
/* #DB before an instruction (breakpoint, general detect). */
void kl_debug_fault(struct kl_vcpu *v, uint32_t dr6_bits) KL_NORETURN KL_COLD;
/* INT3 with KVM_GUESTDBG_USE_SW_BP: the program's. */
void kl_debug_int3(struct kl_vcpu *v) KL_NORETURN KL_COLD;
void kl_debug_data(struct kl_vcpu *v, uint64_t lin, unsigned len, bool write);
void kl_debug_port(struct kl_vcpu *v, unsigned port, unsigned size);

/* An access of the instruction that will succeed. */
KL_INLINE void kl_debug_access(struct kl_vcpu *v, uint64_t lin, unsigned len, bool write)
{
	if (KL_UNLIKELY(v->bp.write | v->bp.access))
		kl_debug_data(v, lin, len, write);
}

KL_INLINE void kl_debug_io(struct kl_vcpu *v, unsigned port, unsigned size)
{
	if (KL_UNLIKELY(v->bp.io))
		kl_debug_port(v, port, size);
}

/* ---- between instructions (run.c) ---- */

/* The instruction is done; @step: it was to be trapped behind. */
KL_INLINE void kl_debug_done(struct kl_vcpu *v, bool step)
{
	v->bp.trap |= v->bp.hit | (step ? KL_DR6_BS : 0);
	v->bp.hit = 0;
}

/* Make #DB of v->bp.trap, if nothing is before it. True: v->exit is filled instead. */
bool kl_debug_take(struct kl_vcpu *v);
