/* SPDX-License-Identifier: MIT */
/* The program's signals (U3). */
#include <pthread.h>
#include <setjmp.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>

#include "t.h"

#define MAGIC ((void *)0x1234567)

static struct vm v;
static volatile sig_atomic_t hits;
static siginfo_t last;

static void count(int sig)
{
	hits++;
}

static void keep(int sig, siginfo_t *info, void *uc)
{
	hits++;
	last = *info;
	CHECK(sig == info->si_signo);
	CHECK(((ucontext_t *)uc)->uc_mcontext.gregs[REG_RSP] != 0);
}

static void install(int sig, void (*h)(int, siginfo_t *, void *), int flags)
{
	struct sigaction sa = {.sa_sigaction = h, .sa_flags = SA_SIGINFO | flags};

	sigemptyset(&sa.sa_mask);
	NEED(!sigaction(sig, &sa, NULL));
}

struct shot {
	pthread_t at;
	int sig, n;
	bool queued, process;
};

static void pause_us(long us)
{
	struct timespec t = {0, us * 1000};

	nanosleep(&t, NULL);
}

static void *shooter(void *arg)
{
	struct shot *s = arg;
	union sigval val = {.sival_ptr = MAGIC};

	for (int i = 0; i < s->n; i++) {
		pause_us(20000);
		if (s->process)
			CHECK(!kill(getpid(), s->sig));
		else if (s->queued)
			CHECK(!pthread_sigqueue(s->at, s->sig, val));
		else
			CHECK(!pthread_kill(s->at, s->sig));
	}
	return NULL;
}

static pthread_t shoot(struct shot *s, int sig, bool queued)
{
	pthread_t t;

	*s = (struct shot){.at = pthread_self(), .sig = sig, .n = 1, .queued = queued};
	NEED(!pthread_create(&t, NULL, shooter, s));
	return t;
}

/* A handler ends KVM_RUN, runs once, and knows who sent the signal. */
static void ends_run(void)
{
	struct shot s;
	pthread_t t;

	install(SIGUSR1, keep, 0);
	for (int restart = 0; restart < 2; restart++) {
		install(SIGUSR1, keep, restart ? SA_RESTART : 0);
		hits = 0;
		t = shoot(&s, SIGUSR1, true);
		FAILS(t_run(&v), EINTR);
		CHECK(v.run->exit_reason == KVM_EXIT_INTR);
		CHECK(hits == 1);
		CHECK(last.si_code == SI_QUEUE && last.si_pid == getpid() &&
		      last.si_value.sival_ptr == MAGIC);
		pthread_join(t, NULL);
	}
	signal(SIGUSR1, count);
	hits = 0;
	t = shoot(&s, SIGUSR1, false);
	FAILS(t_run(&v), EINTR);
	CHECK(hits == 1);
	pthread_join(t, NULL);
}

/* kill() to the process, with this thread the only one to take it. */
static void process_signal(void)
{
	struct shot s = {.sig = SIGUSR1, .n = 1, .process = true};
	sigset_t set, old;
	pthread_t t;

	install(SIGUSR1, keep, 0);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	hits = 0;
	pthread_sigmask(SIG_BLOCK, &set, &old);
	NEED(!pthread_create(&t, NULL, shooter, &s));
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	FAILS(t_run(&v), EINTR);
	CHECK(hits == 1 && last.si_code == SI_USER && last.si_pid == getpid());
	pthread_join(t, NULL);
}

static void ignored(void)
{
	struct shot a, b;
	pthread_t t, u;

	signal(SIGUSR2, SIG_IGN);
	signal(SIGCHLD, SIG_DFL);
	install(SIGUSR1, keep, 0);
	hits = 0;
	t = shoot(&a, SIGUSR2, false);
	a.n = 1;
	u = shoot(&b, SIGCHLD, false);
	pthread_join(t, NULL);
	pthread_join(u, NULL);
	/* Both while the vCPU runs, then one that counts. */
	a = (struct shot){.at = pthread_self(), .sig = SIGUSR2, .n = 3};
	b = (struct shot){.at = pthread_self(), .sig = SIGUSR1, .n = 1};
	NEED(!pthread_create(&t, NULL, shooter, &a));
	pause_us(1000);
	(void)u;
	{
		struct itimerspec its = {.it_value = {.tv_nsec = 150000000}};
		struct sigevent ev = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGUSR1};
		timer_t timer;

		NEED(!timer_create(CLOCK_MONOTONIC, &ev, &timer));
		NEED(!timer_settime(timer, 0, &its, NULL));
		FAILS(t_run(&v), EINTR);
		CHECK(hits == 1 && last.si_code == SI_TIMER);
		timer_delete(timer);
	}
	pthread_join(t, NULL);
	signal(SIGUSR2, SIG_DFL);
}

/* A signal that waits while blocked, taken at once when it is let through. */
static void blocked(void)
{
	sigset_t set, old, pending;
	struct shot s;
	pthread_t t;

	install(SIGUSR1, keep, 0);
	install(SIGALRM, keep, 0);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	pthread_sigmask(SIG_BLOCK, &set, &old);
	hits = 0;
	raise(SIGUSR1);
	t = shoot(&s, SIGALRM, false);
	FAILS(t_run(&v), EINTR);
	CHECK(hits == 1 && last.si_signo == SIGALRM);
	CHECK(!sigpending(&pending) && sigismember(&pending, SIGUSR1) == 1);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	CHECK(hits == 2 && last.si_signo == SIGUSR1);
	pthread_join(t, NULL);
}

struct kvm_mask {
	struct kvm_signal_mask m;
	uint64_t set;
};

static void set_kvm_mask(uint64_t set)
{
	struct kvm_mask m = {.m.len = 8, .set = set};

	memcpy(m.m.sigset, &set, 8);
	CHECK(!ioctl(v.vcpu, KVM_SET_SIGNAL_MASK, &m));
}

/* KVM_SET_SIGNAL_MASK: the signal ends KVM_RUN and stays pending, whatever its action is. */
static void kvm_mask(void)
{
	void (*const actions[])(int) = {SIG_DFL, SIG_IGN, count};
	struct timespec zero = {0, 0};
	struct kvm_mask bad = {.m.len = 16};
	sigset_t set, old, pending, now;
	siginfo_t info;
	struct shot s;
	pthread_t t;

	FAILS(ioctl(v.vcpu, KVM_SET_SIGNAL_MASK, &bad), EINVAL);
	FAILS(ioctl(v.vcpu, KVM_SET_SIGNAL_MASK, 8), EFAULT);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	pthread_sigmask(SIG_BLOCK, &set, &old);
	set_kvm_mask(0);
	for (unsigned i = 0; i < 3; i++) {
		signal(SIGUSR2, actions[i]);
		hits = 0;
		t = shoot(&s, SIGUSR2, true);
		FAILS(t_run(&v), EINTR);
		CHECK(v.run->exit_reason == KVM_EXIT_INTR);
		CHECK(!sigpending(&pending) && sigismember(&pending, SIGUSR2) == 1);
		/* Pending already: at once. */
		FAILS(t_run(&v), EINTR);
		CHECK(hits == 0);
		pthread_sigmask(SIG_BLOCK, NULL, &now);
		CHECK(sigismember(&now, SIGUSR2) == 1 && sigismember(&now, SIGUSR1) == 0);
		CHECK(sigtimedwait(&set, &info, &zero) == SIGUSR2 && info.si_code == SI_QUEUE &&
		      info.si_value.sival_ptr == MAGIC);
		CHECK(sigtimedwait(&set, &info, &zero) == -1 && errno == EAGAIN);
		pthread_join(t, NULL);
	}
	/* One that both let through runs its handler. */
	install(SIGUSR1, keep, 0);
	hits = 0;
	t = shoot(&s, SIGUSR1, false);
	FAILS(t_run(&v), EINTR);
	CHECK(hits == 1);
	pthread_join(t, NULL);
	/* One that KVM's mask blocks waits until KVM_RUN is over. */
	set_kvm_mask(1ull << (SIGUSR1 - 1));
	hits = 0;
	raise(SIGUSR2);
	pthread_kill(pthread_self(), SIGUSR1);
	CHECK(hits == 1);
	FAILS(t_run(&v), EINTR);
	CHECK(sigwaitinfo(&set, &info) == SIGUSR2);
	CHECK(!ioctl(v.vcpu, KVM_SET_SIGNAL_MASK, NULL));
	signal(SIGUSR2, SIG_DFL);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
}

/* What a signal with KVM's mask does elsewhere: its default action. */
static int default_elsewhere(void)
{
	struct vm mine = v;
	sigset_t set;

	T_VM(&v, code_out);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	signal(SIGUSR2, SIG_DFL);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	set_kvm_mask(0);
	CHECK(t_out(&v) == 0);
	pthread_sigmask(SIG_UNBLOCK, &set, NULL);
	raise(SIGUSR2);
	v = mine;
	return 1;
}

/* ---- handlers that do things ------------------------------------------------------------- */

static uint8_t *slot;

static void unmaps_slot(int sig)
{
	hits++;
	CHECK(!munmap(slot, T_PAGE));
}

static void handler_unmaps(void)
{
	struct shot s;
	pthread_t t;

	slot = mmap(NULL, T_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	memcpy(slot, code_spin, sizeof(code_spin));
	NEED(!t_slot(&v, SLOT_CODE, CODE, 0, NULL));
	NEED(!t_slot(&v, SLOT_CODE, CODE, T_PAGE, slot));
	t_rewind(&v);
	signal(SIGUSR1, unmaps_slot);
	hits = 0;
	t = shoot(&s, SIGUSR1, false);
	FAILS(t_run(&v), EINTR);
	CHECK(hits == 1);
	/* A KVM that emulates real mode cannot fetch, and says so in another way. */
	if (t_run(&v))
		CHECK(errno == EFAULT);
	else
		CHECK(!t_preloaded() && v.run->exit_reason == KVM_EXIT_INTERNAL_ERROR);
	pthread_join(t, NULL);
	NEED(!t_slot(&v, SLOT_CODE, CODE, 0, NULL));
	NEED(!t_slot(&v, SLOT_CODE, CODE, T_PAGE, v.code));
	t_rewind(&v);
}

static void does_ioctls(int sig)
{
	struct kvm_regs regs;
	int vm;

	hits++;
	CHECK(!ioctl(v.vcpu, KVM_GET_REGS, &regs) && regs.rip == CODE);
	CHECK(ioctl(v.vm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) == 1);
	vm = ioctl(v.kvm, KVM_CREATE_VM, 0);
	CHECK(vm >= 0 && !close(vm));
	free(malloc(1 << 20));
	v.run->immediate_exit = 1;
	FAILS(t_run(&v), EINTR);
	v.run->immediate_exit = 0;
}

static void handler_ioctls(void)
{
	struct shot s;
	pthread_t t;

	signal(SIGUSR1, does_ioctls);
	hits = 0;
	t = shoot(&s, SIGUSR1, false);
	FAILS(t_run(&v), EINTR);
	CHECK(hits == 1);
	pthread_join(t, NULL);
}

static sigjmp_buf out;

static void jumps(int sig)
{
	hits++;
	siglongjmp(out, 1);
}

static void handler_jumps(void)
{
	struct shot s;
	pthread_t t;
	sigset_t now;

	signal(SIGUSR1, jumps);
	hits = 0;
	for (volatile int i = 0; i < 3; i++) {
		t = shoot(&s, SIGUSR1, false);
		if (!sigsetjmp(out, 1)) {
			t_run(&v);
			CHECK(!"KVM_RUN returned");
		}
		pthread_join(t, NULL);
		CHECK(hits == i + 1);
		pthread_sigmask(SIG_BLOCK, NULL, &now);
		CHECK(!sigismember(&now, SIGUSR1));
	}
	/* Nothing is left held. */
	signal(SIGUSR1, does_ioctls);
	hits = 0;
	t = shoot(&s, SIGUSR1, false);
	FAILS(t_run(&v), EINTR);
	CHECK(hits == 1);
	pthread_join(t, NULL);
	CHECK(!t_slot(&v, SLOT_DATA, DATA, T_PAGE, v.code) &&
	      !t_slot(&v, SLOT_DATA, DATA, 0, NULL));
}

/* ---- the program's view of its handlers and masks ----------------------------------------- */

static void views(void)
{
	/* Linking against this one draws a warning. */
	int (*get_mask)(void) = (int (*)(void))dlsym(RTLD_DEFAULT, "siggetmask");
	struct sigaction sa, old;
	sigset_t set, got;

	memset(&sa, 0, sizeof(sa));
	sa.sa_handler = count;
	sa.sa_flags = SA_RESTART | SA_NODEFER | SA_ONSTACK;
	sigfillset(&sa.sa_mask);
	CHECK(!sigaction(SIGUSR2, &sa, NULL));
	CHECK(!sigaction(SIGUSR2, NULL, &old));
	CHECK(old.sa_handler == count);
	CHECK((old.sa_flags & (SA_RESTART | SA_NODEFER | SA_ONSTACK | SA_SIGINFO | SA_RESETHAND)) ==
	      (SA_RESTART | SA_NODEFER | SA_ONSTACK));
	CHECK(sigismember(&old.sa_mask, SIGSEGV) == 1 && sigismember(&old.sa_mask, SIGUSR1) == 1 &&
	      sigismember(&old.sa_mask, SIGKILL) == 0);
	CHECK(signal(SIGUSR2, SIG_IGN) == count);
	CHECK(signal(SIGUSR2, count) == SIG_IGN);
	CHECK(!sigaction(SIGUSR2, NULL, &old) && (old.sa_flags & SA_RESTART));
	CHECK(!siginterrupt(SIGUSR2, 1) && !sigaction(SIGUSR2, NULL, &old) &&
	      !(old.sa_flags & SA_RESTART));
	CHECK(signal(SIGUSR2, count) == count && !sigaction(SIGUSR2, NULL, &old) &&
	      !(old.sa_flags & SA_RESTART));
	CHECK(!siginterrupt(SIGUSR2, 0));
	CHECK(ssignal(SIGUSR2, SIG_DFL) == count);
	CHECK(sysv_signal(SIGUSR2, count) == SIG_DFL);
	CHECK(!sigaction(SIGUSR2, NULL, &old) && (old.sa_flags & SA_RESETHAND));
	hits = 0;
	raise(SIGUSR2);
	CHECK(hits == 1 && !sigaction(SIGUSR2, NULL, &old) && old.sa_handler == SIG_DFL);
	CHECK(signal(0, count) == SIG_ERR && errno == EINVAL);
	CHECK(signal(65, count) == SIG_ERR && errno == EINVAL);
	FAILS(sigaction(SIGKILL, &sa, NULL), EINVAL);
	FAILS(sigaction(99, NULL, &old), EINVAL);
	CHECK(signal(SIGSTOP, count) == SIG_ERR && errno == EINVAL);
	/* SIGSEGV and SIGBUS, which the engine uses: nothing of it shows. */
	if (!t_sanitized()) {
		CHECK(!sigaction(SIGSEGV, NULL, &old) && old.sa_handler == SIG_DFL);
		CHECK(!sigaction(SIGBUS, NULL, &old) && old.sa_handler == SIG_DFL);
	}
	CHECK(!sigaction(SIGRTMAX - 1, NULL, &old) && old.sa_handler == SIG_DFL);
	sigfillset(&set);
	CHECK(!pthread_sigmask(SIG_BLOCK, &set, &got) && sigismember(&got, SIGSEGV) == 0);
	CHECK(!sigprocmask(SIG_SETMASK, &got, &set));
	CHECK(sigismember(&set, SIGSEGV) == 1 && sigismember(&set, SIGBUS) == 1 &&
	      sigismember(&set, SIGUSR1) == 1 && sigismember(&set, SIGKILL) == 0);
	CHECK(!sigprocmask(0, NULL, &set) && sigismember(&set, SIGSEGV) == 0);
	FAILS(sigprocmask(99, &set, NULL), EINVAL);
	CHECK(sigblock(1 << (SIGBUS - 1)) == 0);
	CHECK(get_mask && get_mask() == 1 << (SIGBUS - 1));
	CHECK(sigsetmask(0) == 1 << (SIGBUS - 1));
	CHECK(!sighold(SIGSEGV) && !sigprocmask(0, NULL, &set) && sigismember(&set, SIGSEGV) == 1);
	CHECK(!sigrelse(SIGSEGV) && !sigprocmask(0, NULL, &set) && !sigismember(&set, SIGSEGV));
	CHECK(sigset(SIGUSR2, count) == SIG_DFL && sigset(SIGUSR2, SIG_HOLD) == count &&
	      sigset(SIGUSR2, SIG_DFL) == SIG_HOLD);
	CHECK(!sigignore(SIGUSR2) && signal(SIGUSR2, SIG_DFL) == SIG_IGN);
}

/* Everything blocked, as threads that leave signals to others do: guest faults still work. */
static void *all_blocked(void *arg)
{
	struct kvm_regs regs;
	sigset_t set, now;

	sigfillset(&set);
	pthread_sigmask(SIG_SETMASK, &set, NULL);
	FAILS(ioctl(v.vcpu, KVM_GET_REGS, 8), EFAULT);
	CHECK(!ioctl(v.vcpu, KVM_GET_REGS, &regs));
	pthread_sigmask(SIG_SETMASK, NULL, &now);
	CHECK(sigismember(&now, SIGSEGV) == 1 && sigismember(&now, SIGBUS) == 1);
	/* And the other way round. */
	pthread_sigmask(SIG_SETMASK, &set, NULL);
	FAILS(ioctl(v.vcpu, KVM_SET_REGS, ~0xffful), EFAULT);
	return NULL;
}

static void *born_blocked(void *arg)
{
	sigset_t now;

	pthread_sigmask(SIG_SETMASK, NULL, &now);
	CHECK(sigismember(&now, SIGSEGV) == 1);
	FAILS(ioctl(v.vcpu, KVM_GET_REGS, 8), EFAULT);
	pthread_sigmask(SIG_SETMASK, NULL, &now);
	CHECK(sigismember(&now, SIGSEGV) == 1);
	return NULL;
}

static void masks(void)
{
	sigset_t set, old;
	pthread_t t;

	NEED(!pthread_create(&t, NULL, all_blocked, NULL));
	pthread_join(t, NULL);
	sigfillset(&set);
	pthread_sigmask(SIG_SETMASK, &set, &old);
	NEED(!pthread_create(&t, NULL, born_blocked, NULL));
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	pthread_join(t, NULL);
}

/* ---- the program's own SIGSEGV ------------------------------------------------------------- */

static void on_segv(int sig, siginfo_t *info, void *uc)
{
	sigset_t now;

	hits++;
	last = *info;
	pthread_sigmask(SIG_BLOCK, NULL, &now);
	CHECK(sigismember(&now, SIGSEGV) == 1 && sigismember(&now, SIGUSR1) == 0);
	/* The engine works in here too. */
	FAILS(ioctl(v.vcpu, KVM_GET_REGS, 16), EFAULT);
	pthread_sigmask(SIG_BLOCK, NULL, &now);
	CHECK(sigismember(&now, SIGSEGV) == 1);
	CHECK(!mprotect(slot, T_PAGE, PROT_READ | PROT_WRITE));
}

static void segv_jumps(int sig)
{
	hits++;
	siglongjmp(out, 1);
}

static void own_faults(void)
{
	sigset_t now;

	slot = mmap(NULL, T_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	install(SIGSEGV, on_segv, 0);
	hits = 0;
	*(volatile uint8_t *)slot = 1;
	CHECK(hits == 1 && last.si_addr == slot && last.si_code == SEGV_ACCERR && slot[0] == 1);
	FAILS(ioctl(v.vcpu, KVM_GET_REGS, 16), EFAULT);
	CHECK(hits == 1);
	/* The first KVM call after each jump still finds its guard. */
	signal(SIGSEGV, segv_jumps);
	for (volatile int i = 0; i < 5; i++) {
		if (!sigsetjmp(out, 1))
			*(volatile uint8_t *)8 = 1;
		CHECK(hits == i + 2);
		FAILS(ioctl(v.vcpu, KVM_GET_REGS, 16), EFAULT);
		pthread_sigmask(SIG_BLOCK, NULL, &now);
		CHECK(!sigismember(&now, SIGSEGV));
	}
	/* Sent by somebody, blocked, let through. */
	signal(SIGBUS, count);
	hits = 0;
	sigemptyset(&now);
	sigaddset(&now, SIGBUS);
	pthread_sigmask(SIG_BLOCK, &now, NULL);
	raise(SIGBUS);
	CHECK(hits == 0);
	FAILS(ioctl(v.vcpu, KVM_GET_REGS, 16), EFAULT);
	CHECK(hits == 0);
	pthread_sigmask(SIG_UNBLOCK, &now, NULL);
	CHECK(hits == 1);
	signal(SIGSEGV, SIG_DFL);
	signal(SIGBUS, SIG_DFL);
}

static int crashes(void)
{
	*(volatile int *)8 = 1;
	return 0;
}

static int crashes_ignoring(void)
{
	signal(SIGSEGV, SIG_IGN);
	*(volatile int *)8 = 1;
	return 0;
}

static int killed_by_segv(void)
{
	raise(SIGSEGV);
	return 0;
}

static int ignores_sent_segv(void)
{
	signal(SIGSEGV, SIG_IGN);
	raise(SIGSEGV);
	return 7;
}

static int killed_by_term(void)
{
	struct vm mine;
	struct shot s;

	T_VM(&mine, code_spin);
	v = mine;
	shoot(&s, SIGTERM, false);
	t_run(&v);
	return 0;
}

/* Handlers and vCPUs in bulk: no signal is lost, none runs in the engine. */
static volatile long storm_hits;

static void on_storm(int sig)
{
	struct kvm_regs regs;

	storm_hits++;
	ioctl(v.vcpu, KVM_GET_REGS, &regs);
	free(malloc(300 << 10));
}

static void *stormer(void *arg)
{
	pthread_t *t = arg;
	union sigval val = {0};

	for (int i = 0; i < 2000; i++)
		while (pthread_sigqueue(*t, SIGRTMIN, val))
			pause_us(100);
	return NULL;
}

static void storm(void)
{
	struct sigaction sa = {.sa_handler = on_storm};
	pthread_t self = pthread_self(), t;
	void *p;

	sigemptyset(&sa.sa_mask);
	NEED(!sigaction(SIGRTMIN, &sa, NULL));
	storm_hits = 0;
	NEED(!pthread_create(&t, NULL, stormer, &self));
	while (storm_hits < 2000) {
		if (storm_hits & 1)
			FAILS(t_run(&v), EINTR);
		p = mmap(NULL, T_PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		munmap(p, T_PAGE);
		if (storm_hits > 1990)
			break;
	}
	pthread_join(t, NULL);
	CHECK(storm_hits == 2000);
}

int main(void)
{
	struct sigaction before = {.sa_handler = count}, after;

	/* Installed before /dev/kvm is opened. */
	sigaction(SIGHUP, &before, NULL);
	T_VM(&v, code_spin);
	CHECK(!sigaction(SIGHUP, NULL, &after) && after.sa_handler == count);
	hits = 0;
	raise(SIGHUP);
	CHECK(hits == 1);
	ends_run();
	process_signal();
	ignored();
	blocked();
	kvm_mask();
	handler_unmaps();
	handler_ioctls();
	handler_jumps();
	views();
	masks();
	own_faults();
	storm();
	CHECK(t_child(default_elsewhere) == 256 + SIGUSR2);
	CHECK(t_child(crashes) == 256 + SIGSEGV);
	CHECK(t_child(crashes_ignoring) == 256 + SIGSEGV);
	CHECK(t_child(killed_by_segv) == 256 + SIGSEGV);
	CHECK(t_child(ignores_sent_segv) == 7);
	CHECK(t_child(killed_by_term) == 256 + SIGTERM);
	t_free(&v);
	return t_done();
}
