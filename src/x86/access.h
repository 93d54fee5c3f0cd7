/* SPDX-License-Identifier: MIT */
/*
 * Guest memory beyond vcpu.h, for the system half of src/x86.
 */
#pragma once

#include "x86/vcpu.h"

/* Linear accesses with the rights of @mode; page tables and MMIO as for kl_read_bytes(). */
void kl_write_as(struct kl_vcpu *v, uint64_t lin, const void *buf, unsigned len,
		 enum kl_tlb_mode mode);

/* The TLB mode of an access at @cpl; implicit ones (descriptor tables) ignore EFLAGS.AC. */
enum kl_tlb_mode kl_tlb_mode_of(struct kl_vcpu *v, unsigned cpl, bool implicit);

/* #SS(0) if @lin is accessed through the stack segment, else #GP(0). */
void kl_raise_not_canonical(struct kl_vcpu *v, uint64_t lin) KL_NORETURN KL_COLD;

/* Fault as a read of one byte would; nothing is read. */
void kl_probe(struct kl_vcpu *v, uint64_t lin);

/* Fault as a store of @len bytes would, at most a page; nothing is written. */
void kl_probe_store(struct kl_vcpu *v, uint64_t lin, unsigned len);

/*
 * Consume KL_REQ_TLB_FLUSH if it is set: drop the TLB, leave the current block soon.
 * Context: IN_GUEST, no pointer into guest memory held.
 */
void kl_serve_flush(struct kl_vcpu *v);

/*
 * In a handler: out of guest mode for what takes locks or waits, and back. No pointer into guest
 * memory survives.
 */
KL_INLINE void kl_guest_pause(struct kl_vcpu *v)
{
	kl_vcpu_leave_guest(&v->core);
}

KL_INLINE void kl_guest_resume(struct kl_vcpu *v)
{
	kl_vcpu_enter_guest(&v->core);
	if (kl_vcpu_requests(&v->core) & KL_REQ_TLB_FLUSH)
		kl_serve_flush(v);
}

/*
 * OUTSIDE guest mode: the host page at @addr, which belongs to guest memory, vanished under an
 * access. 0: try again; -EFAULT, -EINTR, -EHWPOISON: KVM_RUN's result.
 */
int kl_host_page_vanished(struct kl_vcpu *v, uint64_t addr, bool poison) KL_MUST_CHECK;
