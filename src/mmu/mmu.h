/* SPDX-License-Identifier: MIT */
/*
 * Stage 2 as a vCPU uses it (M1-M6).
 */
#pragma once

#include <kvmlet/types.h>

#include "base/compiler.h"
#include "mem/vcpu_core.h"

#define KL_ACC_READ  1u
#define KL_ACC_WRITE 2u
#define KL_ACC_EXEC  4u
/* kl_mmu_fault() alone: rather than wait for a userfaultfd, -EAGAIN */
#define KL_ACC_NOWAIT 8u

enum kl_fault_result {
	KL_FAULT_MAPPED = 0, /* look up again */
	KL_FAULT_MMIO = 1,   /* no slot there, or a write to a read-only slot */
};

/*
 * Lock-free lookup of the host page behind @gpa.
 *
 * Returns the host address of the page (page-aligned) or 0 if nothing suitable is mapped
 * and kl_mmu_fault() must be called. *writable tells whether the page may be written
 * through the result; a write lookup of a read-only mapping returns 0. A write lookup marks the
 * page in the dirty log of its slot (D3). A write lookup that succeeds though *writable is false:
 * the page is tracked. Who writes there reports it (mmu/track.h), and keeps no way to write once
 * more. *mmio set: a current MMIO SPTE says that there is no slot (then the result is 0).
 *
 * Context: the vCPU is IN_GUEST. The result is usable until it leaves or consumes
 * KL_REQ_TLB_FLUSH.
 */
uint8_t *kl_mmu_lookup(struct kl_vcpu_core *c, kl_gpa_t gpa, unsigned access, bool *writable,
		       bool *mmio);

/*
 * Resolve a stage-2 fault at @gpa.
 * Context: the vCPU's thread, OUTSIDE guest mode, no lock. May sleep.
 * Returns: enum kl_fault_result; -EFAULT (the slot's host memory is not there, or not
 * writable); -EINTR; -EHWPOISON; -ENOMEM; -ENOBUFS: for writing, and the vCPU's dirty ring is full;
 * -EAGAIN: nothing was done, c->awaited would have to be waited for.
 */
int kl_mmu_fault(struct kl_vcpu_core *c, kl_gpa_t gpa, unsigned access) KL_MUST_CHECK;
