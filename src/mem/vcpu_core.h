/* SPDX-License-Identifier: MIT */
/*
 * The part of a vCPU that the memory engine knows: its mode and its requests (M6).
 *
 * Invariants
 *   - A host pointer that came from stage 2 or from a vCPU TLB is used only while the
 *     vCPU's mode is IN_GUEST, by its own thread.
 *   - The vCPU thread goes OUTSIDE before it takes any engine lock but a dirty ring's, sleeps, or
 *     runs anything that can wait for another vCPU. A reader section in guest mode ends before
 *     guest code goes on (mem/dirty.c).
 *   - Entering: mode = IN_GUEST, then read requests (both sequentially consistent). A
 *     flusher: set request, then read mode. One of the two sees the other.  PAIR(vcpu-mode)
 *   - A flusher returns when, for each vCPU, mode left IN_GUEST or KL_REQ_TLB_FLUSH was
 *     consumed. The vCPU consumes it by dropping its whole TLB, at a point where it holds
 *     no pointer.
 *
 * Threads of a program that uses the library reach guest memory by the same protocol, through
 * an accessor (mmu/accessor.h): a core without a TLB that is not in vm->vcpus and belongs to a
 * thread only while it is IN_GUEST. Flushes treat accessors as vCPUs.
 */
#pragma once

#include <sys/types.h>

#include <kvmlet/types.h>

#include "base/compiler.h"
#include "base/racepoint.h"
#include "base/stats.h"

struct kl_vm;
struct kl_dirty_log;
struct kl_dirty_ring;

enum kl_vcpu_mode { KL_OUTSIDE_GUEST, KL_IN_GUEST };

/* Bits of kl_vcpu_core.requests (KL_REQ_SIGNAL = KL_THREAD_SIGNAL_REQUEST of host/thread.h). */
#define KL_REQ_TLB_FLUSH (1u << 0) /* drop the TLB; waited for */
#define KL_REQ_SIGNAL    (1u << 1) /* the thread has a pending program signal: leave with EINTR */
#define KL_REQ_EVENT     (1u << 2) /* an interrupt, NMI or exception may have become deliverable */
#define KL_REQ_UNHALT    (1u << 3) /* wake from HLT */
#define KL_REQ_VM_DEAD   (1u << 4) /* never consumed: KVM_RUN returns EIO */
#define KL_REQ_STOP      (1u << 5) /* another vCPU stops all others: leave guest mode */
#define KL_REQ_PV        (1u << 6) /* pages that the guest shares with the engine are to be written */
#define KL_REQ_CODE      (1u << 8) /* a page of code was written (x86/code.h); wakes nobody */
#define KL_REQ_RING_FULL (1u << 7) /* its dirty ring should be emptied: exit */

/* The slot of the page that was last looked up while slots log, as find_log() of mem/dirty.c saw
 * it. */
struct kl_slot_log {
	uint64_t generation; /* none of this is true at another one */
	uint64_t base_gfn, npages;
	struct kl_dirty_log *log; /* or NULL */
};

struct kl_vcpu_core {
	_Atomic uint32_t requests; /* futex word of a halted vCPU */
	/* Own thread: changes when what was derived from code may be void (x86/vcpu.h). Code that
	 * is made at run time reads both as one word. */
	uint32_t pass;
	_Atomic uint32_t mode;
	_Atomic uint32_t sleeping; /* set around the futex wait of a halted vCPU */
	struct kl_vm *vm;
	unsigned as_id;                       /* the address space that it runs in */
	unsigned index;                       /* in vm->vcpus */
	unsigned id;                          /* the APIC id given to KVM_CREATE_VCPU */
	_Atomic pid_t tid;                    /* thread inside KVM_RUN, or 0 */
	bool alone;                           /* own thread: it has stopped the others */
	struct kl_slot_log log;               /* own thread */
	_Atomic(struct kl_dirty_ring *) ring; /* NULL: none */
	/* Own thread: the last stage-2 fault failed for KVM_EXIT_MEMORY_FAULT's reason, there. */
	bool memory_fault, memory_fault_private;
	uint64_t memory_fault_gpa;
	kl_hva_t awaited; /* own thread: the page that a fault did not wait for (KL_ACC_NOWAIT) */
	struct kl_vcpu_stats stats;
};

#define KL_NR_ACCESSORS 64         /* bits of kl_vm.accessors_used */
#define KL_ACCESSOR_ID  UINT32_MAX /* kl_vcpu_core.id of all of them */

struct kl_accessor {
	struct kl_vcpu_core
		core;       /* who moves mode from OUTSIDE to IN_GUEST owns it till it is back */
	_Atomic bool ready; /* flushes know it; mmu/accessor.c */
} KL_CACHELINE;

/* May sleep while another vCPU of the VM has stopped this one. */
void kl_vcpu_enter_guest(struct kl_vcpu_core *c);

KL_INLINE void kl_vcpu_leave_guest(struct kl_vcpu_core *c)
{
	atomic_store_explicit(&c->mode, KL_OUTSIDE_GUEST, memory_order_release);
}

/* After entering, and at every block boundary. */
KL_INLINE uint32_t kl_vcpu_requests(struct kl_vcpu_core *c)
{
	return atomic_load_explicit(&c->requests, memory_order_seq_cst);
}

/* Own thread: take @bits off; returns those that were set. */
KL_INLINE uint32_t kl_vcpu_take_requests(struct kl_vcpu_core *c, uint32_t bits)
{
	return atomic_fetch_and_explicit(&c->requests, ~bits, memory_order_acq_rel) & bits;
}

/*
 * The thread of a halted vCPU: sleep until a request other than TLB_FLUSH, STOP and CODE is
 * set or a signal arrives. OUTSIDE guest mode.
 */
void kl_vcpu_sleep(struct kl_vcpu_core *c);

/* Set @bits and wake a halted vCPU. Any thread; async-signal-safe; never waits. */
void kl_vcpu_request(struct kl_vcpu_core *c, uint32_t bits);

/* Set @bits on all vCPUs, and wake none. Any thread; never waits. */
void kl_vcpus_request_all(struct kl_vm *vm, uint32_t bits);

/*
 * Every vCPU and accessor of @vm drops its TLB before its next guest access; on return none
 * holds a pointer that it obtained before the call.
 * Context: may hold mmu_lock; the caller is not in guest mode. @may_wait false: instead of
 * waiting for a vCPU returns -EAGAIN; the requests are set all the same, and a later flush that
 * may wait must be made before anybody relies on it.
 */
int kl_vcpus_flush(struct kl_vm *vm, bool may_wait);

/*
 * Stop all other vCPUs of the VM: until kl_vcpus_go() none is in guest mode, and @me may go in
 * and out. For what the guest takes for one access and the host cannot do as one. Accessors are
 * not stopped.
 * Context: own thread, OUTSIDE, no lock. False: @me has a signal, nobody is stopped.
 */
bool kl_vcpus_stop(struct kl_vcpu_core *me) KL_MUST_CHECK;
/* Own thread, in guest mode or not. */
void kl_vcpus_go(struct kl_vcpu_core *me);

/* Whom this thread's last flush waited for. Only kept while tracing. */
struct kl_flush_wait {
	unsigned vcpus;      /* how many were in the way */
	unsigned slowest_id; /* the one that took longest */
	uint64_t slowest_ns;
};
extern KL_TLS struct kl_flush_wait kl_flush_wait;

/* Is some vCPU or accessor in guest mode right now? */
bool kl_vcpus_in_guest(struct kl_vm *vm);

/* Registration in vm->vcpus. 0, -EEXIST (id), -EINVAL (id or count over the limits). */
int kl_vcpu_core_add(struct kl_vm *vm, struct kl_vcpu_core *c, unsigned id) KL_MUST_CHECK;
/* Take it off again: creation failed after add. The vCPU never ran. */
void kl_vcpu_core_remove(struct kl_vcpu_core *c);
