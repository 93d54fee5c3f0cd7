/* SPDX-License-Identifier: MIT */
/*
 * Asynchronous cancellation (U3): libc's signal for it waits, like the program's signals, until
 * the thread has left the engine; unwinding would leave locks held.
 *
 * libc installs its handler on the first pthread_cancel(), past all wrappers, and may send the
 * signal in the same call. So it is made to install it for a thread that is there for nothing
 * else, and the kernel's action is replaced before the program's thread is cancelled.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <semaphore.h>

#include "preload/preload.h"

#define CANCEL_SIGNAL 32

struct action {
	uintptr_t handler;
	unsigned long flags;
	void (*restorer)(void);
	uint64_t mask;
};

static _Atomic uintptr_t libc_handler;

static void dispatch(int sig, siginfo_t *info, void *uc)
{
	int saved = errno;

	if (kl_engine_active())
		kl_signal_put_off(sig, info, uc);
	else
		((void (*)(int, siginfo_t *, void *))atomic_load(&libc_handler))(sig, info, uc);
	errno = saved;
}

/* True if libc's handler was there, and ours is now. */
static bool replace(void)
{
	struct action a;

	if (kl_sys(SYS_rt_sigaction, CANCEL_SIGNAL, NULL, &a, 8))
		return true;
	if (a.handler == (uintptr_t)dispatch)
		return true;
	if (a.handler == (uintptr_t)SIG_DFL || a.handler == (uintptr_t)SIG_IGN)
		return false;
	atomic_store(&libc_handler, a.handler);
	a.handler = (uintptr_t)dispatch;
	a.flags |= SA_SIGINFO;
	kl_sys(SYS_rt_sigaction, CANCEL_SIGNAL, &a, NULL, 8);
	return true;
}

void kl_cancel_take_over(void)
{
	replace();
}

static void *victim(void *sem)
{
	while (sem_wait(sem))
		;
	return NULL;
}

typedef int create_fn(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);

/*
 * A sanitizer's runtime, ours or the program's, comes before this library, and must know of each
 * thread in which code of its own runs: ThreadSanitizer's ends the program otherwise.
 */
static create_fn *creator(void)
{
	create_fn *theirs = (create_fn *)dlsym(RTLD_DEFAULT, "__interceptor_pthread_create");

	return theirs ? theirs : REAL(pthread_create);
}

static void make_libc_install(void)
{
	uint64_t all = ~0ull, old;
	pthread_attr_t attr;
	pthread_t t;
	sem_t sem;

	if (pthread_attr_init(&attr))
		return;
	sem_init(&sem, 0, 0);
	kl_sys(SYS_rt_sigprocmask, SIG_SETMASK, &all, &old, 8);
	if (!creator()(&t, &attr, victim, &sem)) {
		REAL(pthread_cancel)(t);
		sem_post(&sem);
		kl_sys(SYS_rt_sigprocmask, SIG_SETMASK, &old, NULL, 8);
		pthread_join(t, NULL);
	} else {
		kl_sys(SYS_rt_sigprocmask, SIG_SETMASK, &old, NULL, 8);
	}
	sem_destroy(&sem);
	pthread_attr_destroy(&attr);
}

WRAP(int, pthread_cancel, (pthread_t t))
{
	if (kl_signals_taken() && !kl_fd_shared_child() && !replace()) {
		make_libc_install();
		replace();
	}
	return REAL(pthread_cancel)(t);
}
