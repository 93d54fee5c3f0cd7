/* SPDX-License-Identifier: MIT */
/*
 * The program's signal handlers (U3).
 *
 * From the first /dev/kvm on, every handler of the program is entered through dispatch(): a
 * signal that finds the thread inside the engine is put off until it has left. What the
 * program installed is recorded here and reported back to it; the kernel's action differs in
 * the handler's address, SA_SIGINFO and SA_RESETHAND (done here), in the guard signals
 * (SIGSEGV, SIGBUS, the kick), which are never in a handler's mask, and in:
 *   - the guard signals themselves, which always have dispatch() as their handler, with
 *     nothing blocked: mask and SA_NODEFER of the program's handler are done here;
 *   - `held` signals: KVM_SET_SIGNAL_MASK lets them end KVM_RUN while the thread blocks them,
 *     so that their default action must not happen; when one arrives elsewhere its default
 *     action is done here.
 *
 * Lock: a spin lock taken with all signals blocked, so that everything here may be called
 * from handlers. dispatch() reads the table without it, by the sequence number.
 */
#include <string.h>
#include <ucontext.h>

#include "host/valgrind.h"
#include "preload/preload.h"

#define NSIG_MAX 65
/* What the kernel stores of sa_flags; libc's restorer is part of what it reports. */
#define SA_RESTORER_FLAG 0x04000000
#define SA_EXPOSE_TAGS   0x00000800
#define SA_KNOWN                                                                           \
	(SA_NOCLDSTOP | SA_NOCLDWAIT | SA_SIGINFO | SA_ONSTACK | SA_RESTART | SA_NODEFER | \
	 SA_RESETHAND | SA_RESTORER_FLAG | SA_EXPOSE_TAGS)

struct record {
	_Atomic uint32_t seq; /* odd while it changes */
	uintptr_t handler;    /* the program's */
	uint64_t mask;
	int flags;
	void (*restorer)(void);
	bool held;
};

static struct record records[NSIG_MAX];
static _Atomic int lock;
static _Atomic bool taken;
static _Atomic int forwarding;   /* threads that call libc's sigaction for the program */
static _Atomic uint64_t covered; /* signals whose kernel action is dispatch() */

static void dispatch(int sig, siginfo_t *info, void *uc);

uint64_t kl_guard_signals(void)
{
	return KL_SIGBIT(SIGSEGV) | KL_SIGBIT(SIGBUS) | KL_SIGBIT(KL_KICK_SIGNAL);
}

static bool is_guard(int sig)
{
	return kl_guard_signals() & KL_SIGBIT(sig);
}

static uint64_t lock_signals(void)
{
	uint64_t all = ~0ull, old;

	kl_sys(SYS_rt_sigprocmask, SIG_SETMASK, &all, &old, 8);
	while (atomic_exchange_explicit(&lock, 1, memory_order_acquire))
		kl_sys(SYS_sched_yield);
	return old;
}

static void unlock_signals(uint64_t old)
{
	atomic_store_explicit(&lock, 0, memory_order_release);
	kl_sys(SYS_rt_sigprocmask, SIG_SETMASK, &old, NULL, 8);
}

static uint64_t fork_mask; /* lock */

void kl_signals_fork_lock(void)
{
	uint64_t old = lock_signals();

	fork_mask = old;
}

void kl_signals_fork_unlock(bool child)
{
	if (child)
		atomic_store(&forwarding, 0);
	unlock_signals(fork_mask);
}

void kl_signals_after_raw_fork(void)
{
	atomic_store(&forwarding, 0);
	atomic_store(&lock, 0);
	for (int sig = 1; sig < NSIG_MAX; sig++)
		if (atomic_load(&records[sig].seq) & 1)
			atomic_fetch_add(&records[sig].seq, 1);
}

/* ---- the table ------------------------------------------------------------------------ */

static void store(int sig, const struct record *new)
{
	struct record *r = &records[sig];
	uint32_t seq = atomic_load_explicit(&r->seq, memory_order_relaxed);

	atomic_store_explicit(&r->seq, seq + 1, memory_order_relaxed);
	atomic_thread_fence(memory_order_release);
	r->handler = new->handler;
	r->mask = new->mask;
	r->flags = new->flags;
	r->restorer = new->restorer;
	r->held = new->held;
	atomic_store_explicit(&r->seq, seq + 2, memory_order_release);
}

static uint32_t load(int sig, struct record *out)
{
	struct record *r = &records[sig];
	uint32_t seq;

	for (;;) {
		seq = atomic_load_explicit(&r->seq, memory_order_acquire);
		out->handler = r->handler;
		out->mask = r->mask;
		out->flags = r->flags;
		out->restorer = r->restorer;
		out->held = r->held;
		atomic_thread_fence(memory_order_acquire);
		if (!(seq & 1) && seq == atomic_load_explicit(&r->seq, memory_order_relaxed))
			return seq;
		kl_cpu_relax();
	}
}

static bool has_handler(const struct record *r)
{
	return r->handler != (uintptr_t)SIG_DFL && r->handler != (uintptr_t)SIG_IGN;
}

/* Lock held: make the kernel's action what the record asks for. 0 or -1. */
static int apply(int sig, const struct record *r)
{
	struct sigaction sa;
	bool ours = true;

	memset(&sa, 0, sizeof(sa));
	sa.sa_sigaction = dispatch;
	if (is_guard(sig)) {
		sa.sa_flags = SA_SIGINFO | SA_NODEFER;
		sa.sa_flags |= has_handler(r) ? r->flags & (SA_RESTART | SA_ONSTACK)
					      : SA_RESTART | SA_ONSTACK;
		/* Kicks queue: handled one after the other, not one inside the other. */
		if (sig == KL_KICK_SIGNAL && !has_handler(r)) {
			sa.sa_flags &= ~SA_NODEFER;
			sigaddset(&sa.sa_mask, sig);
		}
	} else if (has_handler(r)) {
		sa.sa_flags = (r->flags & ~(SA_RESETHAND | SA_RESTORER_FLAG)) | SA_SIGINFO;
		kl_sigset_put(&sa.sa_mask, r->mask & ~kl_guard_signals());
	} else if (r->held) {
		sa.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART |
			      (r->flags & (SA_NOCLDSTOP | SA_NOCLDWAIT));
	} else {
		ours = false;
		sa.sa_handler = (sighandler_t)r->handler;
		sa.sa_flags = r->flags & ~SA_RESTORER_FLAG;
		kl_sigset_put(&sa.sa_mask, r->mask);
	}
	if (REAL(sigaction)(sig, &sa, NULL))
		return -1;
	if (ours)
		atomic_fetch_or(&covered, KL_SIGBIT(sig));
	else
		atomic_fetch_and(&covered, ~KL_SIGBIT(sig));
	return 0;
}

static int change(int sig, const struct record *new)
{
	struct record old;
	uint64_t mask = lock_signals();
	int r;

	load(sig, &old);
	store(sig, new);
	r = apply(sig, new);
	if (r)
		store(sig, &old);
	unlock_signals(mask);
	return r;
}

/* ---- what the program asks for --------------------------------------------------------- */

static void report(const struct record *r, struct sigaction *out)
{
	memset(out, 0, sizeof(*out));
	out->sa_handler = (sighandler_t)r->handler;
	out->sa_flags = r->flags;
	out->sa_restorer = r->restorer;
	kl_sigset_put(&out->sa_mask, r->mask);
}

/*
 * A child of vfork() has its own actions in the kernel, and our table: it must not write it.
 * What it installs before it execs is installed as it is.
 */
static int child_action(int sig, const struct sigaction *act, struct sigaction *old)
{
	struct sigaction was;
	struct record r;

	if (REAL(sigaction)(sig, act, &was))
		return -1;
	if (old && was.sa_sigaction == dispatch) {
		load(sig, &r);
		report(&r, old);
	} else if (old) {
		*old = was;
	}
	return 0;
}

int kl_signals_action(int sig, const struct sigaction *act, struct sigaction *old)
{
	struct sigaction new_act, old_act;
	struct record new, was;
	int r;

	if (!atomic_load_explicit(&taken, memory_order_acquire)) {
		/* Whoever takes over meanwhile waits until this is done. */
		atomic_fetch_add(&forwarding, 1);
		if (!atomic_load(&taken)) {
			r = REAL(sigaction)(sig, act, old);
			atomic_fetch_sub(&forwarding, 1);
			return r;
		}
		atomic_fetch_sub(&forwarding, 1);
	}
	if (sig <= 0 || sig >= NSIG_MAX || sig == 32 || sig == 33 || sig == SIGKILL ||
	    sig == SIGSTOP)
		return REAL(sigaction)(sig, act, old);
	if (kl_fd_shared_child())
		return child_action(sig, act, old);
	if (act)
		new_act = *act;
	load(sig, &was);
	report(&was, &old_act);
	if (act) {
		new = was;
		new.handler = (uintptr_t)new_act.sa_handler;
		new.mask = kl_sigset_get(&new_act.sa_mask) &
			   ~(KL_SIGBIT(SIGKILL) | KL_SIGBIT(SIGSTOP));
		new.flags = (new_act.sa_flags & SA_KNOWN) | SA_RESTORER_FLAG;
		if (change(sig, &new))
			return -1;
	}
	if (old)
		*old = old_act;
	return 0;
}

/* What the kernel's rt_sigaction takes. */
struct kernel_action {
	uintptr_t handler;
	unsigned long flags;
	void (*restorer)(void);
	uint64_t mask;
};

long kl_signals_raw_action(int sig, const void *act, void *old, size_t size)
{
	struct sigaction sa, was;
	struct kernel_action k;
	struct kl_entry e;
	int r = 0;

	if (!kl_signals_taken() || size != 8 || sig == 32 || sig == 33)
		return kl_sys(SYS_rt_sigaction, sig, act, old, size);
	if (act) {
		kl_pl_enter(&e);
		r = kl_copy_from_user(&k, act, sizeof(k));
		kl_pl_leave(&e);
		if (r)
			return r;
		memset(&sa, 0, sizeof(sa));
		sa.sa_handler = (sighandler_t)k.handler;
		sa.sa_flags = (int)k.flags;
		kl_sigset_put(&sa.sa_mask, k.mask);
	}
	if (kl_signals_action(sig, act ? &sa : NULL, &was))
		return -errno;
	if (old) {
		k = (struct kernel_action){(uintptr_t)was.sa_handler, (unsigned)was.sa_flags,
					   was.sa_restorer, kl_sigset_get(&was.sa_mask)};
		kl_pl_enter(&e);
		r = kl_copy_to_user(old, &k, sizeof(k));
		kl_pl_leave(&e);
	}
	return r;
}

/* The kick and the guards come to dispatch() only; nothing else installs handlers. */
static int engine_sigaction(int sig, const struct sigaction *act, struct sigaction *old)
{
	if (old)
		memset(old, 0, sizeof(*old));
	return 0;
}

static void hold(uint64_t signals)
{
	struct record r;

	signals &= ~atomic_load_explicit(&covered, memory_order_relaxed) &
		   ~(KL_SIGBIT(SIGKILL) | KL_SIGBIT(SIGSTOP) | KL_SIGBIT(32) | KL_SIGBIT(33));
	while (signals) {
		int sig = __builtin_ctzll(signals) + 1;

		signals &= signals - 1;
		load(sig, &r);
		r.held = true;
		change(sig, &r);
	}
}

/* As KVM does it; delivered with the signals that came while the engine was busy. */
static void send_poison(uint64_t addr)
{
	siginfo_t *info;

	if (kl_pl_self.nr_parked == KL_ARRAY_SIZE(kl_pl_self.parked))
		return;
	info = &kl_pl_self.parked[kl_pl_self.nr_parked++];
	memset(info, 0, sizeof(*info));
	info->si_signo = SIGBUS;
	info->si_code = BUS_MCEERR_AR;
	info->si_addr = (void *)(uintptr_t)addr;
	info->si_addr_lsb = KL_PAGE_SHIFT;
}

void kl_signals_take_over(void)
{
	struct sigaction sa;
	struct record r;
	uint64_t old;

	if (atomic_load(&taken))
		return;
	kl_guard_external_handlers();
	kl_sys_sigaction = engine_sigaction;
	kl_thread_on_unblock = hold;
	kl_thread_on_poison = send_poison;
	old = lock_signals();
	if (!atomic_exchange(&taken, true)) {
		for (int i = 0; atomic_load(&forwarding) && i < 1000; i++)
			kl_sys(SYS_sched_yield);
		for (int sig = 1; sig < NSIG_MAX; sig++) {
			if (sig == SIGKILL || sig == SIGSTOP || sig == 32 || sig == 33 ||
			    REAL(sigaction)(sig, NULL, &sa))
				continue;
			memset(&r, 0, sizeof(r));
			r.handler = (uintptr_t)sa.sa_handler;
			r.mask = kl_sigset_get(&sa.sa_mask);
			r.flags = sa.sa_flags;
			r.restorer = sa.sa_restorer;
			store(sig, &r);
			if (has_handler(&r) || is_guard(sig))
				apply(sig, &r);
		}
	}
	unlock_signals(old);
}

/*
 * exec resets handlers and keeps ignored signals ignored. The caller may be a child of
 * vfork(): only the kernel's actions change, which are its own.
 */
void kl_signals_before_exec(void)
{
	struct sigaction ign;
	struct record r;

	if (!kl_signals_taken())
		return;
	memset(&ign, 0, sizeof(ign));
	ign.sa_handler = SIG_IGN;
	for (int sig = 1; sig < NSIG_MAX; sig++) {
		if (!(atomic_load(&covered) & KL_SIGBIT(sig)))
			continue;
		load(sig, &r);
		if (r.handler == (uintptr_t)SIG_IGN)
			REAL(sigaction)(sig, &ign, NULL);
	}
}

void kl_signals_exec_failed(void)
{
	struct record r;
	uint64_t old;

	if (!kl_signals_taken())
		return;
	old = lock_signals();
	for (int sig = 1; sig < NSIG_MAX; sig++) {
		load(sig, &r);
		if ((atomic_load(&covered) & KL_SIGBIT(sig)) && r.handler == (uintptr_t)SIG_IGN)
			apply(sig, &r);
	}
	unlock_signals(old);
}

bool kl_signals_taken(void)
{
	return atomic_load_explicit(&taken, memory_order_acquire);
}

/* ---- delivery --------------------------------------------------------------------------- */

void kl_signal_requeue(int sig, siginfo_t *info)
{
	long pid = kl_sys(SYS_getpid), tid = kl_sys(SYS_gettid);

	if (kl_sys(SYS_rt_tgsigqueueinfo, pid, tid, sig, info) < 0)
		kl_sys(SYS_tgkill, pid, tid, sig);
}

/* Raised by the instruction that was interrupted. */
static bool synchronous(int sig, const siginfo_t *info)
{
	if (info->si_code <= 0)
		return false;
	switch (sig) {
	case SIGBUS:
#ifdef BUS_MCEERR_AO
		if (info->si_code == BUS_MCEERR_AO)
			return false;
#endif
		return true;
	case SIGSEGV:
	case SIGILL:
	case SIGFPE:
	case SIGTRAP:
	case SIGSYS:
		return true;
	default:
		return false;
	}
}

/* The kernel does it when the handler returns: the fault again, or the signal again. */
static void die(int sig, siginfo_t *info, ucontext_t *uc)
{
	struct sigaction dfl;
	uint64_t m = kl_sigset_get(&uc->uc_sigmask) & ~KL_SIGBIT(sig);

	memset(&dfl, 0, sizeof(dfl));
	REAL(sigaction)(sig, &dfl, NULL);
	memcpy(&uc->uc_sigmask, &m, sizeof(m));
	/* The one that send_poison() made does not come again by itself. */
	if (!synchronous(sig, info) || (sig == SIGBUS && info->si_code == BUS_MCEERR_AR))
		kl_signal_requeue(sig, info);
}

static void default_action(int sig, siginfo_t *info, ucontext_t *uc)
{
	long pid;

	switch (sig) {
	case SIGCHLD:
	case SIGURG:
	case SIGWINCH:
	case SIGCONT:
		return;
	case SIGTSTP:
	case SIGTTIN:
	case SIGTTOU:
		pid = kl_sys(SYS_getpid);
		kl_sys(SYS_kill, pid, SIGSTOP);
		return;
	default:
		die(sig, info, uc);
	}
}

static void call(const struct record *r, int sig, siginfo_t *info, void *uc)
{
	/* As the kernel does: three registers, whatever SA_SIGINFO says. */
	((void (*)(int, siginfo_t *, void *))r->handler)(sig, info, uc);
}

/* SIGSEGV and SIGBUS of the program: dispatch() runs with nothing blocked, its handler not. */
static void call_guard_handler(const struct record *r, int sig, siginfo_t *info, void *uc)
{
	uint64_t block = r->mask & ~(kl_guard_signals() & ~KL_SIGBIT(sig));
	bool ok = kl_pl_self.mask_ok;

	if (!(r->flags & SA_NODEFER))
		block |= KL_SIGBIT(sig);
	if (block & KL_SIGBIT(sig))
		kl_pl_self.mask_ok = false;
	kl_sys(SYS_rt_sigprocmask, SIG_BLOCK, &block, NULL, 8);
	call(r, sig, info, uc);
	/* The kernel's mask is about to be what it was. */
	kl_pl_self.mask_ok = ok;
}

/* SA_RESETHAND: one caller gets the handler. */
static bool reset_handler(int sig, uint32_t seq, const struct record *r)
{
	struct record new = *r;
	uint64_t mask = lock_signals();
	bool mine = atomic_load(&records[sig].seq) == seq;

	if (mine) {
		new.handler = (uintptr_t)SIG_DFL;
		store(sig, &new);
		apply(sig, &new);
	}
	unlock_signals(mask);
	return mine;
}

static void deliver(int sig, siginfo_t *info, void *uc)
{
	struct record r;
	uint32_t seq = load(sig, &r);

	if (has_handler(&r) && (r.flags & SA_RESETHAND) && !reset_handler(sig, seq, &r))
		load(sig, &r);
	if (has_handler(&r)) {
		if (is_guard(sig))
			call_guard_handler(&r, sig, info, uc);
		else
			call(&r, sig, info, uc);
		return;
	}
	if (r.handler == (uintptr_t)SIG_IGN) {
		/* A fault cannot be ignored. */
		if (synchronous(sig, info))
			die(sig, info, uc);
		return;
	}
	default_action(sig, info, uc);
}

void kl_signal_put_off(int sig, siginfo_t *info, void *uc)
{
	if (!kl_under_valgrind()) {
		kl_thread_defer_signal(sig, info, uc);
		return;
	}
	kl_park(info);
	kl_thread_interrupt(uc);
}

/* A guard signal that is the program's own and must wait: it cannot stay blocked here. */
static void park(int sig, siginfo_t *info, ucontext_t *uc)
{
	uint64_t bit = KL_SIGBIT(sig), m;

	if (kl_engine_active()) {
		kl_park(info);
		if (!(kl_pl_self.view & bit))
			kl_thread_interrupt(uc);
		return;
	}
	/* Outside: blocked for real, and pending. Entering the engine takes the slow way. */
	m = kl_sigset_get(&uc->uc_sigmask) | bit;
	memcpy(&uc->uc_sigmask, &m, sizeof(m));
	kl_sys(SYS_rt_sigprocmask, SIG_BLOCK, &bit, NULL, 8);
	kl_pl_self.mask_ok = false;
	kl_signal_requeue(sig, info);
}

static void dispatch(int sig, siginfo_t *info, void *ucontext)
{
	ucontext_t *uc = ucontext;
	int saved = errno;

	if (is_guard(sig) && kl_guard_signal(sig, info, uc))
		goto out;
	if (synchronous(sig, info)) {
		if (KL_UNLIKELY(kl_engine_active())) {
			kl_log(KL_LOG_ERR, "signal %d in the engine at %#llx, address %p", sig,
			       (unsigned long long)uc->uc_mcontext.gregs[REG_RIP], info->si_addr);
			die(sig, info, uc);
			goto out;
		}
		errno = saved;
		deliver(sig, info, uc);
		return;
	}
	if (is_guard(sig)) {
		if (kl_engine_active() ||
		    (kl_pl_self.adopted && (kl_pl_self.view & KL_SIGBIT(sig)))) {
			park(sig, info, uc);
			goto out;
		}
	} else if (kl_engine_active()) {
		kl_signal_put_off(sig, info, uc);
		goto out;
	}
	errno = saved;
	deliver(sig, info, uc);
	return;
out:
	errno = saved;
}
