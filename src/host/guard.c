/* SPDX-License-Identifier: MIT */
/*
 * The handler never jumps: it rewrites the interrupted context so that returning from the
 * handler enters landing(), which does the longjmp with the thread's own signal mask and
 * stack in place.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

#include "base/log.h"
#include "host/access.h"
#include "host/guard.h"
#include "host/sys.h"

#define RED_ZONE   128
#define KICK_MAGIC ((void *)(uintptr_t)0x6b766d6c65746bull)

/* Offsets of the listed access instructions, each relative to its own entry. */
#if !KL_TSAN
extern const int32_t kl_extable_start[] __asm__("__start_kl_extable")
	__attribute__((visibility("hidden")));
extern const int32_t kl_extable_end[] __asm__("__stop_kl_extable")
	__attribute__((visibility("hidden")));
#endif

static uint64_t way_out(uint64_t pc)
{
	const struct kl_generated *g = kl_self.generated;

	return g && pc - g->start < g->end - g->start ? g->way_out(g, pc) : 0;
}

static bool is_access(uint64_t pc)
{
	if (way_out(pc))
		return true;
#if !KL_TSAN
	for (const int32_t *e = kl_extable_start; e < kl_extable_end; e++)
		if ((uint64_t)e + (uint64_t)(int64_t)*e == pc)
			return true;
#endif
	return false;
}

extern const int32_t kl_fixup_start[] __asm__("__start_kl_fixup")
	__attribute__((visibility("hidden"), weak));
extern const int32_t kl_fixup_end[] __asm__("__stop_kl_fixup")
	__attribute__((visibility("hidden"), weak));

/* Of kl_guard_probe(). */
static bool fix_up(ucontext_t *uc)
{
	greg_t *pc = &uc->uc_mcontext.gregs[REG_RIP];

	for (const int32_t *e = kl_fixup_start; e < kl_fixup_end; e += 2)
		if ((uint64_t)e + (uint64_t)(int64_t)e[0] == (uint64_t)*pc) {
			*pc = (greg_t)((uint64_t)(e + 1) + (uint64_t)(int64_t)e[1]);
			return true;
		}
	return false;
}

static void landing(long reason) KL_NORETURN;
static void landing(long reason)
{
	_longjmp(*kl_self.guard, (int)reason);
}

static void redirect(ucontext_t *uc, enum kl_guard_reason reason)
{
	greg_t *g = uc->uc_mcontext.gregs;
	uint64_t out = way_out((uint64_t)g[REG_RIP]);

	if (out) {
		kl_self.landed = (int)reason;
		g[REG_RIP] = (greg_t)out;
		return;
	}
	g[REG_RSP] = ((g[REG_RSP] - RED_ZONE) & ~15ll) - 8; /* as after a call */
	g[REG_RDI] = reason;
	g[REG_RIP] = (greg_t)(uintptr_t)landing;
	g[REG_EFL] &= ~(1ll << 10); /* DF */
}

/* Or does @uc belong to a handler of the program's, which runs on top of the access? */
static bool is_ours(const ucontext_t *uc)
{
	return !kl_self.only_listed || is_access((uint64_t)uc->uc_mcontext.gregs[REG_RIP]);
}

void kl_guard_abandon(void *context)
{
	ucontext_t *uc = context;

	if (!kl_self.guard)
		return;
	if ((kl_self.touching && is_ours(uc)) ||
	    (kl_self.running && is_access((uint64_t)uc->uc_mcontext.gregs[REG_RIP]))) {
		kl_self.touching = 0;
		redirect(uc, KL_GUARD_INTR);
	}
}

bool kl_guard_signal(int sig, siginfo_t *info, void *context)
{
	if (sig == KL_KICK_SIGNAL) {
		if (info->si_code != SI_QUEUE || info->si_value.sival_ptr != KICK_MAGIC)
			return false;
		kl_guard_abandon(context);
		return true;
	}
	if ((sig != SIGSEGV && sig != SIGBUS) || info->si_code <= 0)
		return false;
	if (fix_up(context))
		return true;
	if (!kl_self.guard || !is_ours(context))
		return false;
	kl_self.fault_addr = (uint64_t)(uintptr_t)info->si_addr;
	kl_self.touching = 0;
	redirect(context,
		 sig == SIGBUS && (info->si_code == BUS_MCEERR_AR || info->si_code == BUS_MCEERR_AO)
			 ? KL_GUARD_HWPOISON
			 : KL_GUARD_FAULT);
	return true;
}

/*
 * Handlers for programs that link the library without the preload library. What is not ours
 * goes to whoever was there before.
 */
static struct sigaction previous[_NSIG];

static void handler(int sig, siginfo_t *info, void *uc)
{
	const struct sigaction *p = &previous[sig];
	int saved = errno;

	if (!kl_guard_signal(sig, info, uc)) {
		if (p->sa_flags & SA_SIGINFO) {
			p->sa_sigaction(sig, info, uc);
		} else if (p->sa_handler == SIG_DFL) {
			struct sigaction dfl = {.sa_handler = SIG_DFL};

			/* Returning repeats the fault, now with the default action. */
			kl_sys_sigaction(sig, &dfl, NULL);
			if (info->si_code <= 0)
				kl_sys(SYS_tgkill, getpid(), kl_gettid(), sig);
		} else if (p->sa_handler != SIG_IGN) {
			p->sa_handler(sig);
		}
	}
	errno = saved;
}

static int install(int sig)
{
	struct sigaction sa = {.sa_sigaction = handler,
			       .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART | SA_NODEFER};

	sigemptyset(&sa.sa_mask);
	/* Kicks queue: handled one after the other, not one inside the other. */
	if (sig == KL_KICK_SIGNAL) {
		sa.sa_flags &= ~SA_NODEFER;
		sigaddset(&sa.sa_mask, sig);
	}
	return kl_sys_sigaction(sig, &sa, &previous[sig]) ? -errno : 0;
}

static int init_result;

static void init_once(void)
{
	static const int sigs[] = {SIGSEGV, SIGBUS, 0};
	int r = install(KL_KICK_SIGNAL);

	for (int i = 0; !r && sigs[i]; i++)
		r = install(sigs[i]);
	init_result = r;
}

static bool handlers_elsewhere;

void kl_guard_external_handlers(void)
{
	handlers_elsewhere = true;
}

int kl_guard_init(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	if (handlers_elsewhere)
		return 0;
	pthread_once(&once, init_once);
	return init_result;
}

void kl_guard_unblock_own(void)
{
	uint64_t needed =
		1ull << (SIGSEGV - 1) | 1ull << (SIGBUS - 1) | 1ull << (KL_KICK_SIGNAL - 1);

	kl_sys(SYS_rt_sigprocmask, SIG_UNBLOCK, &needed, NULL, sizeof(needed));
	kl_self.unblocked = true;
}

void kl_guard_unblock(void)
{
	if (handlers_elsewhere)
		kl_self.unblocked = true;
	else
		kl_guard_unblock_own();
}

void kl_guard_kick(pid_t tid)
{
	siginfo_t info;

	memset(&info, 0, sizeof(info));
	info.si_code = SI_QUEUE;
	info.si_pid = getpid();
	info.si_value.sival_ptr = KICK_MAGIC;
	kl_sys(SYS_rt_tgsigqueueinfo, getpid(), tid, KL_KICK_SIGNAL, &info);
}

int kl_guard_copy(void *dst, const void *src, size_t len)
{
	jmp_buf *outer = kl_self.guard;
	enum kl_guard_reason why;
	jmp_buf here;

	why = kl_guard_enter(&here);
	if (why == KL_GUARD_NONE)
		kl_access_copy(dst, src, len);
	kl_guard_leave(outer);
	return kl_guard_errno(why);
}
