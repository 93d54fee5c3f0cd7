/* SPDX-License-Identifier: MIT */
/*
 * Guarded access to memory that may vanish (N7) or block (M6).
 *
 * kl_guard_enter() is setjmp: it returns KL_GUARD_NONE at first; when an access faults it
 * returns again with the reason. The code between enter and leave holds no lock and owns
 * nothing that must be released, or releases it after the second return.
 *
 *     jmp_buf here;
 *     int why = kl_guard_enter(&here);
 *     if (why == KL_GUARD_NONE) { ...access...; }
 *     kl_guard_leave(saved);
 *
 * SIGSEGV and SIGBUS are synchronous and land here while a guard is set, with the exception below.
 * An asynchronous abandon (KL_GUARD_INTR) happens only when the interrupted instruction is one of
 * host/access.h's, so that an interpreter never loses half of an instruction.
 *
 * Where handlers of the program run in the middle of the engine (it is linked, not preloaded),
 * such a handler may fault itself. kl_self.only_listed tells the guard to take faults of listed
 * instructions alone, and to leave others to the program.
 */
#pragma once

#include <errno.h>

#include "host/thread.h"

/*
 * Code that is made at run time, for one thread: kl_self.generated. @way_out: if the instruction at
 * @pc is an access to guest memory, where to go on instead, with all registers but the flags as
 * they are; else 0. What is there finds enum kl_guard_reason in kl_self.landed and ends in
 * _longjmp(*kl_self.guard).
 */
struct kl_generated {
	uint64_t start, end;
	uint64_t (*way_out)(const struct kl_generated *g, uint64_t pc);
};

/* Install SIGSEGV/SIGBUS/kick handlers once per process. 0 or -errno. Idempotent. */
int kl_guard_init(void);

/*
 * Let the guard's three signals through to the calling thread, for good: it may block all that
 * there are, and a fault whose signal is blocked ends the process. Nothing where somebody else owns
 * the handlers, who then sees to it.
 */
void kl_guard_unblock(void);
/* The same for a thread of the engine's own, whose mask is nobody else's business. */
void kl_guard_unblock_own(void);

/*
 * Somebody else (the preload library) owns the process's handlers and calls
 * kl_guard_signal(): kl_guard_init() then installs nothing. Before the first VM.
 */
void kl_guard_external_handlers(void);

/*
 * In a handler: if the interrupted instruction is a guarded access of this thread, return
 * from the handler to its guard with KL_GUARD_INTR instead.
 */
void kl_guard_abandon(void *uc);

/* For whoever owns the process's handlers: true if the engine consumed the signal. */
bool kl_guard_signal(int sig, siginfo_t *info, void *uc);

/* The signal with which the engine interrupts its own vCPU threads. SIGRTMAX is Valgrind's own. */
#define KL_KICK_SIGNAL (SIGRTMAX - 1)
/* Interrupt whatever guarded access thread @tid is blocked in. Any thread. */
void kl_guard_kick(pid_t tid);

#define kl_guard_enter(env) (kl_self.guard = (env), (enum kl_guard_reason)_setjmp(*(env)))
KL_INLINE void kl_guard_leave(jmp_buf *outer)
{
	kl_self.guard = outer;
}

KL_INLINE int kl_guard_errno(enum kl_guard_reason why)
{
	switch (why) {
	case KL_GUARD_NONE:
		return 0;
	case KL_GUARD_INTR:
		return -EINTR;
	case KL_GUARD_HWPOISON:
		return -EHWPOISON;
	default:
		return -EFAULT;
	}
}

/*
 * Load a byte: false if that faults. Costs the load; needs no guard, and the thread has only to let
 * SIGSEGV and SIGBUS through. Not abandoned if it blocks.
 */
KL_INLINE bool kl_guard_probe(const void *p)
{
	/* The instruction, and where a fault goes on; each relative to its own entry. */
	__asm__ goto("1: cmpb $0, %0\n\t"
		     ".pushsection kl_fixup,\"a\"\n\t.long 1b - ., %l1 - .\n\t.popsection\n\t"
		     :
		     : "m"(*(const char *)p)
		     : "cc"
		     : faulted);
	return true;
faulted:
	return false;
}

/* Copies between the engine and program memory. 0, -EFAULT, -EINTR, or -EHWPOISON. */
int kl_guard_copy(void *dst, const void *src, size_t len) KL_MUST_CHECK;

/*
 * Copies from/to the program for ioctl arguments; @uptr may be any value, NULL too.
 * 0 or -EFAULT.
 */
KL_INLINE int KL_MUST_CHECK kl_copy_from_user(void *dst, const void *uptr, size_t len)
{
	return kl_guard_copy(dst, uptr, len) ? -EFAULT : 0;
}
KL_INLINE int KL_MUST_CHECK kl_copy_to_user(void *uptr, const void *src, size_t len)
{
	return kl_guard_copy(uptr, src, len) ? -EFAULT : 0;
}
