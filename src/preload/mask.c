/* SPDX-License-Identifier: MIT */
/*
 * Signal masks (U3): SIGSEGV, SIGBUS and the kick must reach a thread that works on guest
 * memory, whatever the program blocks.
 *
 * A thread is left alone until it first enters the engine ("adopted"). From then on the
 * kernel's mask has the guard signals unblocked and `view` says which of them the program
 * believes blocked. Where they end up blocked all the same (in the program's own SIGSEGV
 * handler, or because one that the program sent to itself waits), mask_ok is false, and
 * entering the engine unblocks them for as long as it takes.
 */
#include <poll.h>
#include <setjmp.h>
#include <string.h>
#include <ucontext.h>

#include "preload/preload.h"

KL_TLS struct kl_pl_thread kl_pl_self;

static void change_mask(int how, uint64_t set, uint64_t *old)
{
	kl_sys(SYS_rt_sigprocmask, how, &set, old, 8);
}

void kl_entry_slow(struct kl_entry *e)
{
	uint64_t old;

	if (!kl_signals_taken() || kl_self.depth > 1)
		return;
	change_mask(SIG_UNBLOCK, kl_guard_signals(), &old);
	old &= kl_guard_signals();
	if (!kl_pl_self.adopted) {
		kl_pl_self.adopted = true;
		kl_pl_self.view = old;
		kl_pl_self.mask_ok = true;
	} else if (!old) {
		kl_pl_self.mask_ok = true;
	} else {
		e->restore = old;
	}
}

void kl_exit_slow(const struct kl_entry *e)
{
	if (kl_self.sig_pending)
		kl_self.saved_mask |= e->restore;
	else
		change_mask(SIG_BLOCK, e->restore, NULL);
}

/* As when it is pending: once, if it is a standard signal. */
void kl_park(const siginfo_t *info)
{
	struct kl_pl_thread *t = &kl_pl_self;

	for (unsigned i = 0; i < t->nr_parked && info->si_signo < SIGRTMIN; i++)
		if (t->parked[i].si_signo == info->si_signo)
			return;
	if (t->nr_parked < KL_ARRAY_SIZE(t->parked))
		t->parked[t->nr_parked++] = *info;
	else
		kl_log(KL_LOG_WARN, "signal %d is lost: too many have come", info->si_signo);
}

void kl_parked_release(void)
{
	struct kl_pl_thread *t = &kl_pl_self;
	int saved = errno;

	/* A handler may run meanwhile, and not come back. */
	while (t->nr_parked) {
		siginfo_t info = t->parked[0];

		memmove(t->parked, t->parked + 1, --t->nr_parked * sizeof(info));
		kl_signal_requeue(info.si_signo, &info);
		/* Valgrind does not look what is pending after that call, but after this. */
		kl_sys(SYS_rt_sigprocmask, SIG_BLOCK, NULL, NULL, 8);
	}
	errno = saved;
}

uint64_t kl_mask_expose(void)
{
	uint64_t old;

	if (KL_LIKELY(!kl_pl_self.adopted || !kl_pl_self.view))
		return 0;
	if (kl_fd_shared_child() && kl_pl_self.masked_child == kl_sys(SYS_getpid))
		return 0;
	change_mask(SIG_BLOCK, kl_pl_self.view, &old);
	return kl_pl_self.view & ~old;
}

void kl_mask_unexpose(uint64_t exposed)
{
	if (exposed)
		change_mask(SIG_UNBLOCK, exposed, NULL);
}

/* ---- the program's calls ---------------------------------------------------------------- */

/* After a successful change: what the program believes of the guard signals. */
static void update_view(int how, uint64_t set)
{
	set &= kl_guard_signals();
	switch (how) {
	case SIG_BLOCK:
		kl_pl_self.view |= set;
		break;
	case SIG_UNBLOCK:
		kl_pl_self.view &= ~set;
		break;
	default:
		kl_pl_self.view = set;
	}
}

static int set_mask(int (*real)(int, const sigset_t *, sigset_t *), int how, const sigset_t *set,
		    sigset_t *old)
{
	uint64_t want = 0, view = kl_pl_self.view;
	sigset_t clean;
	int r;

	if (KL_LIKELY(!kl_pl_self.adopted))
		return real(how, set, old);
	if (set && kl_fd_shared_child()) {
		/* vfork: the thread's record is the parent's, the mask in the kernel is not. */
		kl_pl_self.masked_child = kl_sys(SYS_getpid);
		return real(how, set, old);
	}
	if (set) {
		want = kl_sigset_get(set);
		clean = *set;
		if (how != SIG_UNBLOCK)
			kl_sigset_put(&clean, want & ~kl_guard_signals());
	}
	/* Before the call: what becomes deliverable arrives inside it. */
	if (set)
		update_view(how, want);
	r = real(how, set ? &clean : NULL, old);
	if (r) {
		kl_pl_self.view = view;
		return r;
	}
	if (old)
		kl_sigset_put(old, kl_sigset_get(old) | view);
	return 0;
}

static int raw_mask(int how, const sigset_t *set, sigset_t *old)
{
	return (int)kl_sys(SYS_rt_sigprocmask, how, set, old, 8);
}

long kl_mask_raw(int how, const void *set, void *old, size_t size)
{
	struct kl_entry e;
	sigset_t s, o;
	int r;

	if (size != 8 || !kl_pl_self.adopted)
		return kl_sys(SYS_rt_sigprocmask, how, set, old, size);
	if (set) {
		sigemptyset(&s);
		kl_pl_enter(&e);
		r = kl_copy_from_user(&s, set, 8);
		kl_pl_leave(&e);
		if (r)
			return r;
	}
	r = set_mask(raw_mask, how, set ? &s : NULL, old ? &o : NULL);
	if (!r && old) {
		kl_pl_enter(&e);
		r = kl_copy_to_user(old, &o, 8);
		kl_pl_leave(&e);
	}
	return r;
}

WRAP(int, sigprocmask, (int how, const sigset_t *set, sigset_t *old))
{
	return set_mask(REAL(sigprocmask), how, set, old);
}

WRAP(int, pthread_sigmask, (int how, const sigset_t *set, sigset_t *old))
{
	return set_mask(REAL(pthread_sigmask), how, set, old);
}

static int change_one(int how, int sig)
{
	sigset_t s;

	sigemptyset(&s);
	if (sigaddset(&s, sig))
		return -1;
	return wrap_sigprocmask(how, &s, NULL);
}

WRAP(int, sighold, (int sig))
{
	return change_one(SIG_BLOCK, sig);
}

WRAP(int, sigrelse, (int sig))
{
	return change_one(SIG_UNBLOCK, sig);
}

/* 4.2BSD's: the first 32 signals. */
static int bsd_mask(int how, int mask, bool change)
{
	sigset_t s, old;

	sigemptyset(&s);
	kl_sigset_put(&s, (unsigned)mask);
	return wrap_sigprocmask(how, change ? &s : NULL, &old) ? -1 : (int)kl_sigset_get(&old);
}

WRAP(int, sigblock, (int mask))
{
	return bsd_mask(SIG_BLOCK, mask, true);
}

WRAP(int, sigsetmask, (int mask))
{
	return bsd_mask(SIG_SETMASK, mask, true);
}

WRAP(int, siggetmask, (void))
{
	return bsd_mask(SIG_BLOCK, 0, false);
}

/*
 * Calls that change the mask while they wait: handlers that run then may enter the engine.
 * Returns what to hand to the kernel.
 */
static const sigset_t *waiting_mask(const sigset_t *mask, sigset_t *clean)
{
	if (KL_LIKELY(!kl_pl_self.adopted) || !mask)
		return mask;
	*clean = *mask;
	kl_sigset_put(clean, kl_sigset_get(mask) & ~kl_guard_signals());
	return clean;
}

WRAP(int, sigsuspend, (const sigset_t *mask))
{
	sigset_t clean;

	return REAL(sigsuspend)(waiting_mask(mask, &clean));
}
WRAP_ALIAS(int, __sigsuspend, sigsuspend, (const sigset_t *mask));

WRAP(int, ppoll, (struct pollfd * fds, nfds_t n, const struct timespec *t, const sigset_t *mask))
{
	sigset_t clean;

	return REAL(ppoll)(fds, n, t, waiting_mask(mask, &clean));
}

WRAP(int, __ppoll_chk,
     (struct pollfd * fds, nfds_t n, const struct timespec *t, const sigset_t *mask, size_t size))
{
	sigset_t clean;

	return REAL(__ppoll_chk)(fds, n, t, waiting_mask(mask, &clean), size);
}

WRAP(int, pselect,
     (int n, fd_set *r, fd_set *w, fd_set *x, const struct timespec *t, const sigset_t *mask))
{
	sigset_t clean;

	return REAL(pselect)(n, r, w, x, t, waiting_mask(mask, &clean));
}

WRAP(int, epoll_pwait, (int fd, struct epoll_event *ev, int n, int timeout, const sigset_t *mask))
{
	sigset_t clean;

	return REAL(epoll_pwait)(fd, ev, n, timeout, waiting_mask(mask, &clean));
}

WRAP(int, epoll_pwait2,
     (int fd, struct epoll_event *ev, int n, const struct timespec *t, const sigset_t *mask))
{
	sigset_t clean;

	return REAL(epoll_pwait2)(fd, ev, n, t, waiting_mask(mask, &clean));
}

/*
 * The mask that a jump restores was saved when the thread may not have been adopted yet: look
 * again at the next entry.
 */
static void jumping(void)
{
	/* The engine's own guards save no mask. */
	if (kl_engine_active())
		return;
	kl_pl_self.mask_ok = false;
}

KL_EXPORT void wrap_siglongjmp(void *env, int val) __asm__("siglongjmp") KL_NORETURN;
void wrap_siglongjmp(void *env, int val)
{
	jumping();
	REAL(siglongjmp)(env, val);
}
KL_EXPORT void wrap_longjmp(void *env, int val) __asm__("longjmp")
	__attribute__((alias("siglongjmp"), noreturn));
KL_EXPORT void wrap__longjmp(void *env, int val) __asm__("_longjmp")
	__attribute__((alias("siglongjmp"), noreturn));

KL_EXPORT void wrap___longjmp_chk(void *env, int val) __asm__("__longjmp_chk") KL_NORETURN;
void wrap___longjmp_chk(void *env, int val)
{
	jumping();
	REAL(__longjmp_chk)(env, val);
}
