/* SPDX-License-Identifier: MIT */
/*
 * The older ways to say sigaction(), with glibc's meaning. Before the first /dev/kvm they are
 * libc's own.
 */
#include <string.h>

#include "preload/preload.h"
#include "preload/wrapped.h"

WRAPPED(int, sigprocmask, (int, const sigset_t *, sigset_t *));

/* siginterrupt(sig, 1): signal() then installs without SA_RESTART. */
static _Atomic uint64_t interrupting;

static bool bad(int sig)
{
	return sig < 1 || sig > 64;
}

static sighandler_t install(int sig, sighandler_t h, int flags, uint64_t mask)
{
	struct sigaction sa, old;

	if (h == SIG_ERR || bad(sig)) {
		errno = EINVAL;
		return SIG_ERR;
	}
	memset(&sa, 0, sizeof(sa));
	sa.sa_handler = h;
	sa.sa_flags = flags;
	kl_sigset_put(&sa.sa_mask, mask);
	return kl_signals_action(sig, &sa, &old) ? SIG_ERR : old.sa_handler;
}

WRAP(int, sigaction, (int sig, const struct sigaction *act, struct sigaction *old))
{
	return kl_signals_action(sig, act, old);
}
WRAP_ALIAS(int, __sigaction, sigaction,
	   (int sig, const struct sigaction *act, struct sigaction *old));

WRAP(sighandler_t, signal, (int sig, sighandler_t h))
{
	if (!kl_signals_taken())
		return REAL(signal)(sig, h);
	return install(sig, h,
		       !bad(sig) && (atomic_load(&interrupting) & KL_SIGBIT(sig)) ? 0 : SA_RESTART,
		       bad(sig) ? 0 : KL_SIGBIT(sig));
}
WRAP_ALIAS(sighandler_t, bsd_signal, signal, (int sig, sighandler_t h));
WRAP_ALIAS(sighandler_t, ssignal, signal, (int sig, sighandler_t h));

WRAP(sighandler_t, __sysv_signal, (int sig, sighandler_t h))
{
	if (!kl_signals_taken())
		return REAL(__sysv_signal)(sig, h);
	return install(sig, h, (int)(SA_RESETHAND | SA_NODEFER | SA_INTERRUPT), 0);
}
WRAP_ALIAS(sighandler_t, sysv_signal, __sysv_signal, (int sig, sighandler_t h));

WRAP(sighandler_t, sigset, (int sig, sighandler_t h))
{
	sigset_t one, before;
	sighandler_t old;

	if (!kl_signals_taken())
		return REAL(sigset)(sig, h);
	sigemptyset(&one);
	if (sigaddset(&one, sig))
		return SIG_ERR;
	if (h == SIG_HOLD) {
		struct sigaction sa;

		if (wrap_sigprocmask(SIG_BLOCK, &one, &before))
			return SIG_ERR;
		if (sigismember(&before, sig))
			return SIG_HOLD;
		return kl_signals_action(sig, NULL, &sa) ? SIG_ERR : sa.sa_handler;
	}
	old = install(sig, h, 0, 0);
	if (old == SIG_ERR || wrap_sigprocmask(SIG_UNBLOCK, &one, &before))
		return SIG_ERR;
	return sigismember(&before, sig) ? SIG_HOLD : old;
}

WRAP(int, sigignore, (int sig))
{
	if (!kl_signals_taken())
		return REAL(sigignore)(sig);
	return install(sig, SIG_IGN, 0, 0) == SIG_ERR ? -1 : 0;
}

WRAP(int, siginterrupt, (int sig, int interrupt))
{
	struct sigaction sa;

	if (!bad(sig)) {
		if (interrupt)
			atomic_fetch_or(&interrupting, KL_SIGBIT(sig));
		else
			atomic_fetch_and(&interrupting, ~KL_SIGBIT(sig));
	}
	if (!kl_signals_taken())
		return REAL(siginterrupt)(sig, interrupt);
	if (kl_signals_action(sig, NULL, &sa))
		return -1;
	if (interrupt)
		sa.sa_flags &= ~SA_RESTART;
	else
		sa.sa_flags |= SA_RESTART;
	return kl_signals_action(sig, &sa, NULL);
}
