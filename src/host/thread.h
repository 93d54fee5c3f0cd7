/* SPDX-License-Identifier: MIT */
/*
 * What the engine knows about the calling thread, and where the program's signals meet it.
 *
 * Every entry from the program brackets its work with kl_engine_enter() and
 * kl_engine_leave(); they nest. Between the two the program's signal handlers do not run
 * (U3): the preload library's handler calls kl_thread_defer_signal() instead, which
 *   - queues the signal to this thread again, with its siginfo,
 *   - blocks the program's signals in the context that the handler returns to,
 *   - sets sig_pending, and KL_REQ_SIGNAL on the vCPU that this thread runs.
 * The outermost kl_engine_leave() restores the mask and the kernel then delivers the signal
 * on a thread that holds nothing of the engine.
 */
#pragma once

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>

#include "base/compiler.h"

struct kl_vcpu_core;
struct kl_generated;

/* Why control came back to a guard (host/guard.h). */
enum kl_guard_reason {
	KL_GUARD_NONE = 0,
	KL_GUARD_FAULT,    /* SIGSEGV or SIGBUS at fault_addr */
	KL_GUARD_HWPOISON, /* SIGBUS BUS_MCEERR_AR at fault_addr */
	KL_GUARD_INTR,     /* a blocked access was abandoned: signal or flush request */
};

struct kl_thread {
	int depth;                         /* nesting of kl_engine_enter */
	volatile sig_atomic_t sig_pending; /* a program signal waits for the engine to leave */
	jmp_buf *volatile guard;           /* where a fault on guarded memory goes, or NULL */
	volatile sig_atomic_t touching;    /* in kl_host_populate(): abandon wherever it is */
	volatile sig_atomic_t
		only_listed; /* of faults, only those of listed instructions are ours */
	uint64_t fault_addr;
	/* Code made at run time that this thread may be in (host/guard.h), or NULL; why the guard
	 * had it take its way out. */
	const struct kl_generated *generated;
	volatile sig_atomic_t landed;
	struct kl_vcpu_core *running; /* the vCPU in KVM_RUN on this thread, or NULL */
	uint64_t saved_mask;          /* valid while sig_pending: kernel sigset to restore */
	uint64_t deferred;            /* signals that were put off (sig_pending) */
	bool unblocked;               /* kl_guard_unblock() was called */
	bool interruptible;           /* kl_host_populate() gives up for a signal (G14) */
	/* kl_host_populate() gives up when it becomes true (host/await.c); or NULL */
	const _Atomic bool *give_up;
	int brackets; /* notifier brackets that this thread has open (S7) */
	int reports;  /* it tells trackers of something (mmu/track.h) */
};

extern KL_TLS struct kl_thread kl_self;

KL_INLINE void kl_engine_enter(void)
{
	kl_self.depth++;
	atomic_signal_fence(memory_order_seq_cst);
}

void kl_engine_leave_slow(void);

KL_INLINE void kl_engine_leave(void)
{
	atomic_signal_fence(memory_order_seq_cst);
	if (--kl_self.depth == 0) {
		atomic_signal_fence(memory_order_seq_cst);
		if (KL_UNLIKELY(kl_self.sig_pending))
			kl_engine_leave_slow();
	}
}

KL_INLINE bool kl_engine_active(void)
{
	return kl_self.depth > 0;
}

/* KL_REQ_SIGNAL of the running vCPU; requests is the first member of struct kl_vcpu_core. */
#define KL_THREAD_SIGNAL_REQUEST (1u << 1)

/*
 * From a handler on this thread, when kl_engine_active(). @uc as given to the handler.
 * Not for synchronous signals (SIGILL, SIGFPE, SIGTRAP with si_code > 0): those are the
 * engine's or the program's own mistake and must be acted upon at once.
 */
void kl_thread_defer_signal(int sig, siginfo_t *info, void *uc);

/*
 * From a handler, when kl_engine_active(): the same for a signal that cannot be blocked here
 * (the program's own use of SIGSEGV, SIGBUS or the kick). The vCPU leaves; the signal itself
 * is kept by the caller.
 */
void kl_thread_interrupt(void *uc);

/*
 * KVM_SET_SIGNAL_MASK: the thread's mask is @mask (KVM's 8-byte sigset) between begin and
 * end; what arrives meanwhile and @old blocks stays pending after end. Both inside the
 * engine. SIGSEGV, SIGBUS and KL_KICK_SIGNAL stay deliverable whatever @mask says.
 * @on_unblock (may be NULL) sees the signals that @mask lets through and @old blocks: whoever
 * owns the handlers makes sure that none of them has its default action in the kernel.
 */
extern void (*kl_thread_on_unblock)(uint64_t signals);
void kl_thread_mask_begin(uint64_t mask, uint64_t *old);
void kl_thread_mask_end(uint64_t old);

/*
 * A vCPU met a page at @addr that the host has poisoned: the program gets the SIGBUS that KVM
 * sends, when the engine has been left. False where nobody has set the hook.
 */
extern void (*kl_thread_on_poison)(uint64_t addr);
bool kl_thread_poisoned(uint64_t addr);

/* A thread of the engine's own, with all signals blocked. 0, -EAGAIN. */
int kl_thread_create(pthread_t *t, const char *name, void *(*fn)(void *), void *arg) KL_MUST_CHECK;

/* In a forked child: this thread is the only one, and its tid is new. */
void kl_thread_after_fork(void);
