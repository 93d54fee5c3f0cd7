/* SPDX-License-Identifier: MIT */
/* Signals and cancellation that find a thread inside KVM_RUN, in their less usual forms (U3). */
#include <pthread.h>
#include <sys/syscall.h>

#include "t.h"

static struct vm v;
static volatile sig_atomic_t hits;

static void count(int sig)
{
	hits++;
}

static void install(int sig, int flags)
{
	struct sigaction sa = {.sa_handler = count, .sa_flags = flags};

	sigemptyset(&sa.sa_mask);
	NEED(!sigaction(sig, &sa, NULL));
}

struct shot {
	pid_t tid;
	int sig;
};

static void *shooter(void *arg)
{
	struct shot *s = arg;

	usleep(20000);
	CHECK(!syscall(SYS_tgkill, getpid(), s->tid, s->sig));
	return NULL;
}

/* KVM_RUN ends by @sig, whose handler runs once. */
static void shot_at(int sig)
{
	struct shot s = {(pid_t)syscall(SYS_gettid), sig};
	pthread_t t;

	hits = 0;
	NEED(!pthread_create(&t, NULL, shooter, &s));
	FAILS(t_run(&v), EINTR);
	CHECK(hits == 1);
	pthread_join(t, NULL);
}

/* The signal is not blocked while its handler runs. */
static void nodefer(void)
{
	struct sigaction sa;

	for (int i = 0; i < 3; i++) {
		install(SIGUSR1, SA_NODEFER);
		shot_at(SIGUSR1);
		install(SIGRTMIN, SA_NODEFER | SA_RESTART);
		shot_at(SIGRTMIN);
	}
	CHECK(sysv_signal(SIGUSR1, count) == count);
	shot_at(SIGUSR1);
	CHECK(!sigaction(SIGUSR1, NULL, &sa) && sa.sa_handler == SIG_DFL);
}

/* Signals that usually mean a fault, sent by somebody. */
static void sent_faults(void)
{
	static const int sigs[] = {SIGFPE, SIGTRAP, SIGILL, SIGSEGV, SIGBUS, SIGSYS};

	for (unsigned i = 0; i < 2 * sizeof(sigs) / sizeof(sigs[0]); i++) {
		int sig = sigs[i / 2];

		install(sig, i & 1 ? SA_NODEFER : 0);
		shot_at(sig);
		shot_at(sig);
		signal(sig, SIG_DFL);
	}
}

/* The same where the program and KVM_SET_SIGNAL_MASK block it: it waits for the program. */
static void blocked_fault(void)
{
	struct {
		struct kvm_signal_mask m;
		uint8_t set[8];
	} m = {.m.len = 8};
	uint64_t set = 1ull << (SIGFPE - 1);
	sigset_t fpe, old, pending;

	install(SIGFPE, 0);
	install(SIGUSR1, 0);
	sigemptyset(&fpe);
	sigaddset(&fpe, SIGFPE);
	memcpy(m.m.sigset, &set, 8);
	CHECK(!ioctl(v.vcpu, KVM_SET_SIGNAL_MASK, &m));
	pthread_sigmask(SIG_BLOCK, &fpe, &old);
	CHECK(!syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), SIGFPE));
	shot_at(SIGUSR1);
	CHECK(!sigpending(&pending) && sigismember(&pending, SIGFPE) == 1);
	hits = 0;
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	CHECK(hits == 1);
	CHECK(!ioctl(v.vcpu, KVM_SET_SIGNAL_MASK, NULL));
	signal(SIGFPE, SIG_DFL);
}

static uint8_t alt[64 << 10];
static volatile int on_alt;

static void where(int sig)
{
	uint8_t c;

	on_alt = (uintptr_t)&c - (uintptr_t)alt < sizeof(alt);
}

/* SIGSEGV and SIGBUS too run where the program wants them. */
static void stacks(void)
{
	stack_t ss = {.ss_sp = alt, .ss_size = sizeof(alt)}, off = {.ss_flags = SS_DISABLE};
	static const int sigs[] = {SIGSEGV, SIGBUS, SIGUSR2};

	NEED(!sigaltstack(&ss, NULL));
	for (unsigned i = 0; i < 6; i++) {
		struct sigaction sa = {.sa_handler = where, .sa_flags = i & 1 ? SA_ONSTACK : 0};

		NEED(!sigaction(sigs[i / 2], &sa, NULL));
		on_alt = -1;
		raise(sigs[i / 2]);
		CHECK(on_alt == (int)(i & 1));
		signal(sigs[i / 2], SIG_DFL);
	}
	NEED(!sigaltstack(&off, NULL));
}

/* ---- cancellation ------------------------------------------------------------------------ */

static _Atomic int entered, unwound;

static void cleanup(void *arg)
{
	unwound++;
}

static void *cancelled(void *type)
{
	pthread_setcanceltype((int)(intptr_t)type, NULL);
	pthread_cleanup_push(cleanup, NULL);
	entered++;
	for (;;) {
		t_run(&v);
		pthread_testcancel();
	}
	pthread_cleanup_pop(0);
	return NULL;
}

static void *cancelled_mapping(void *arg)
{
	void *p;

	pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, NULL);
	pthread_cleanup_push(cleanup, NULL);
	entered++;
	for (;;) {
		p = mmap(NULL, T_PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		munmap(p, T_PAGE);
	}
	pthread_cleanup_pop(0);
	return NULL;
}

/* What the thread held is free: the vCPU runs, its memory can change. */
static void cancel(void *(*fn)(void *), long us)
{
	struct kvm_regs regs;
	void *result, *p;
	pthread_t t;

	entered = unwound = 0;
	NEED(!pthread_create(&t, NULL, fn, (void *)(intptr_t)PTHREAD_CANCEL_ASYNCHRONOUS));
	while (!entered)
		usleep(100);
	usleep((useconds_t)us);
	CHECK(!pthread_cancel(t));
	CHECK(!pthread_join(t, &result) && result == PTHREAD_CANCELED && unwound == 1);
	CHECK(!ioctl(v.vcpu, KVM_GET_REGS, &regs));
	v.run->immediate_exit = 1;
	FAILS(t_run(&v), EINTR);
	v.run->immediate_exit = 0;
	p = mmap(NULL, T_PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(!t_slot(&v, SLOT_DATA, DATA, T_PAGE, p) && !munmap(p, T_PAGE));
	CHECK(!t_slot(&v, SLOT_DATA, DATA, 0, NULL));
}

static void cancels(void)
{
	cancel(cancelled, 20000);
	for (int i = 0; i < 50; i++) {
		cancel(cancelled, i * 10);
		/* A sanitizer's own part of a call is not safe to cancel. */
		if (!t_sanitized())
			cancel(cancelled_mapping, i * 10);
	}
	shot_at(SIGUSR1);
}

int main(void)
{
	alarm(40);
	T_VM(&v, code_spin);
	nodefer();
	sent_faults();
	blocked_fault();
	stacks();
	cancels();
	t_free(&v);
	return t_done();
}
