/* SPDX-License-Identifier: MIT */
/*
 * Deferral of the program's signals while a thread is inside the engine (U3).
 *
 * Only the kernel's eight bytes of a signal mask are read or written in a handler's context:
 * glibc's sigset_t is longer than what the kernel put into the frame.
 */
#include <errno.h>
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include "host/guard.h"
#include "host/sys.h"
#include "host/thread.h"

KL_TLS struct kl_thread kl_self;
void (*kl_thread_on_unblock)(uint64_t signals);
void (*kl_thread_on_poison)(uint64_t addr);

static uint64_t sig_bit(int sig)
{
	return 1ull << (sig - 1);
}

/* Without these the engine does not work: its guards, its kick. */
static uint64_t needed(void)
{
	return sig_bit(SIGSEGV) | sig_bit(SIGBUS) | sig_bit(KL_KICK_SIGNAL);
}

/*
 * Signals that are not held back before one has come: also those of faults, so that the
 * engine's own are reported, and the two that libc uses for cancellation and set*id.
 */
static uint64_t never_blocked(void)
{
	return needed() | sig_bit(SIGILL) | sig_bit(SIGFPE) | sig_bit(SIGTRAP) | sig_bit(SIGKILL) |
	       sig_bit(SIGSTOP) | sig_bit(32) | sig_bit(33);
}

static void hold_all(uint64_t *old)
{
	uint64_t block = ~never_blocked();

	kl_sys(SYS_rt_sigprocmask, SIG_BLOCK, &block, old, sizeof(block));
}

static void set_mask(uint64_t mask, uint64_t *old)
{
	kl_sys(SYS_rt_sigprocmask, SIG_SETMASK, &mask, old, sizeof(mask));
}

void kl_engine_leave_slow(void)
{
	uint64_t mask = kl_self.saved_mask;

	kl_self.sig_pending = 0;
	kl_self.deferred = 0;
	atomic_signal_fence(memory_order_seq_cst);
	/* What is pending is delivered here, before the call returns. */
	set_mask(mask, NULL);
}

void kl_thread_defer_signal(int sig, siginfo_t *info, void *context)
{
	ucontext_t *uc = context;
	uint64_t *uc_mask = (uint64_t *)(void *)&uc->uc_sigmask;
	uint64_t block = ~never_blocked() | sig_bit(sig);
	long r;

	/* A handler with SA_NODEFER has its signal unblocked: it would come at once, for ever. */
	kl_sys(SYS_rt_sigprocmask, SIG_BLOCK, &block, NULL, sizeof(block));
	r = kl_sys(SYS_rt_tgsigqueueinfo, getpid(), kl_gettid(), sig, info);
	/* The queue of pending signals is full: better without siginfo than lost. */
	if (r < 0)
		kl_sys(SYS_tgkill, getpid(), kl_gettid(), sig);
	kl_thread_interrupt(context);
	/* One of a fault that somebody sent waits too, and stays blocked for what comes next. */
	kl_self.deferred |= sig_bit(sig);
	*uc_mask |= ~never_blocked() | kl_self.deferred;
}

void kl_thread_interrupt(void *context)
{
	ucontext_t *uc = context;

	if (!kl_self.sig_pending) {
		kl_self.saved_mask = *(uint64_t *)(void *)&uc->uc_sigmask;
		kl_self.sig_pending = 1;
	}
	/*
	 * Not by an atomic of C: ThreadSanitizer's hold a lock of its runtime, which the
	 * interrupted code may be inside of with this very word.
	 */
	if (kl_self.running)
		__asm__ volatile("lock orl %1, %0"
				 : "+m"(*(uint32_t *)(void *)kl_self.running)
				 : "i"(KL_THREAD_SIGNAL_REQUEST)
				 : "memory", "cc");
	kl_guard_abandon(context);
}

void kl_thread_mask_begin(uint64_t mask, uint64_t *old)
{
	uint64_t now;

	/*
	 * First hold everything off, then decide: a signal that was deferred up to here has
	 * everything blocked already, and the mask to come back to is in saved_mask. KVM_RUN is
	 * about to return EINTR then.
	 */
	hold_all(&now);
	if (kl_self.sig_pending) {
		*old = kl_self.saved_mask;
		return;
	}
	*old = now;
	mask &= ~needed();
	if (kl_thread_on_unblock)
		kl_thread_on_unblock(~mask & now);
	set_mask(mask, NULL);
}

void kl_thread_mask_end(uint64_t old)
{
	/*
	 * First hold everything off, then decide: whatever was deferred up to here has left
	 * KVM's mask in saved_mask, and kl_engine_leave() must restore the program's instead.
	 */
	hold_all(NULL);
	if (kl_self.sig_pending)
		kl_self.saved_mask = old;
	else
		set_mask(old, NULL);
}

bool kl_thread_poisoned(uint64_t addr)
{
	if (!kl_thread_on_poison)
		return false;
	kl_thread_on_poison(addr);
	return true;
}

/* It inherits the mask: no signal finds it before it could block them itself. */
int kl_thread_create(pthread_t *t, const char *name, void *(*fn)(void *), void *arg)
{
	uint64_t all = ~0ull, old;
	int r;

	set_mask(all, &old);
	r = pthread_create(t, NULL, fn, arg);
	set_mask(old, NULL);
	if (!r)
		pthread_setname_np(*t, name);
	return -r;
}
