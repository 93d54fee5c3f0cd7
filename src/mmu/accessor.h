/* SPDX-License-Identifier: MIT */
/*
 * How a thread that is no vCPU reaches guest memory (mem/vcpu_core.h has the protocol).
 *
 *     c = kl_accessor_enter(vm, as)       IN_GUEST
 *     kl_mmu_lookup(c, ...)               a miss: leave, kl_accessor_fault(), start again
 *     guarded access through the result
 *     kl_accessor_leave(c)                OUTSIDE; the pointer is void
 *
 * An accessor belongs to its thread only between enter and leave; while a fault is resolved,
 * which may take long, nothing is held.
 */
#pragma once

#include <kvmlet/types.h>

#include "mem/vm.h"

/*
 * Enter guest mode. @kick: a flusher that has to wait may interrupt this thread's access
 * (host/guard.h); a caller with @kick false lets its user touch memory, which nothing may
 * interrupt.
 * Context: not inside a bracket of this thread, no lock, not in guest mode.
 * Returns 0, or -ENOMEM.
 */
int kl_accessor_enter(struct kl_vm *vm, unsigned as, bool kick,
		      struct kl_vcpu_core **c) KL_MUST_CHECK;
void kl_accessor_leave(struct kl_vcpu_core *c);

/* A pointer from before is void if this returns true. IN_GUEST. */
KL_INLINE bool kl_accessor_flushed(struct kl_vcpu_core *c)
{
	return KL_UNLIKELY(kl_vcpu_requests(c)) && kl_vcpu_take_requests(c, ~0u) & KL_REQ_TLB_FLUSH;
}

/*
 * Make @gpa accessible; afterwards look again.
 * Returns 0; -EFAULT: no slot, a write to a read-only one, or no memory behind it;
 * -EHWPOISON; -ENOMEM.
 */
int kl_accessor_fault(struct kl_vm *vm, unsigned as, kl_gpa_t gpa, unsigned access) KL_MUST_CHECK;

/* With the VM: after kl_vm_destroy(). */
void kl_accessors_free(struct kl_vm *vm);
