/* SPDX-License-Identifier: MIT */
/*
 * Processes: fork, exec, exit (U5).
 *
 * fork() and a clone() that copies memory run kl_pl_after_fork_child() in the child. A child
 * of vfork() or posix_spawn() shares our memory until it execs, and is recognised where it
 * would do harm (kl_fd_shared_child()). A new program or thread inherits the signal mask as
 * the program knows it.
 */
#include <alloca.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdlib.h>
#include <unistd.h>

#include "preload/preload.h"

static void before_fork(void)
{
	kl_signals_fork_lock();
}

static void after_fork_parent(void)
{
	kl_signals_fork_unlock(false);
}

static void after_fork_child(void)
{
	kl_signals_fork_unlock(true);
	kl_pl_after_fork_child();
}

void kl_proc_init(void)
{
	pthread_atfork(before_fork, after_fork_parent, after_fork_child);
}

void kl_pl_after_raw_fork(void)
{
	kl_signals_after_raw_fork();
	kl_pl_after_fork_child();
}

WRAP(pid_t, _Fork, (void))
{
	pid_t pid = REAL(_Fork)();

	if (!pid)
		kl_pl_after_raw_fork();
	return pid;
}

struct start {
	int (*fn)(void *);
	void *arg;
};

/* In the child's copy of the parent's stack frame. */
static int cloned(void *p)
{
	struct start *s = p;

	kl_pl_after_raw_fork();
	return s->fn(s->arg);
}

WRAP(int, clone,
     (int (*fn)(void *), void *stack, int flags, void *arg, void *ptid, void *tls, void *ctid))
{
	struct start s = {fn, arg};

	if (flags & CLONE_VM || !fn)
		return REAL(clone)(fn, stack, flags, arg, ptid, tls, ctid);
	return REAL(clone)(cloned, stack, flags, &s, ptid, tls, ctid);
}

WRAP(int, pthread_create,
     (pthread_t * t, const pthread_attr_t *attr, void *(*fn)(void *), void *arg))
{
	uint64_t exposed = kl_mask_expose();
	int r = REAL(pthread_create)(t, attr, fn, arg);

	kl_mask_unexpose(exposed);
	return r;
}

WRAP(int, posix_spawn,
     (pid_t * pid, const char *path, const posix_spawn_file_actions_t *fa,
      const posix_spawnattr_t *attr, char *const argv[], char *const envp[]))
{
	uint64_t exposed = kl_mask_expose();
	int r = REAL(posix_spawn)(pid, path, fa, attr, argv, envp);

	kl_mask_unexpose(exposed);
	return r;
}

WRAP(int, posix_spawnp,
     (pid_t * pid, const char *path, const posix_spawn_file_actions_t *fa,
      const posix_spawnattr_t *attr, char *const argv[], char *const envp[]))
{
	uint64_t exposed = kl_mask_expose();
	int r = REAL(posix_spawnp)(pid, path, fa, attr, argv, envp);

	kl_mask_unexpose(exposed);
	return r;
}

/* Returns only if it failed: then everything is as before. */
#define EXEC(call)                                    \
	do {                                          \
		uint64_t exposed_ = kl_mask_expose(); \
		int r_, saved_;                       \
		kl_signals_before_exec();             \
		r_ = (call);                          \
		saved_ = errno;                       \
		kl_signals_exec_failed();             \
		kl_mask_unexpose(exposed_);           \
		errno = saved_;                       \
		return r_;                            \
	} while (0)

WRAP(int, execve, (const char *path, char *const argv[], char *const envp[]))
{
	EXEC(REAL(execve)(path, argv, envp));
}

WRAP(int, execv, (const char *path, char *const argv[]))
{
	EXEC(REAL(execve)(path, argv, environ));
}

WRAP(int, execvpe, (const char *file, char *const argv[], char *const envp[]))
{
	EXEC(REAL(execvpe)(file, argv, envp));
}

WRAP(int, execvp, (const char *file, char *const argv[]))
{
	EXEC(REAL(execvpe)(file, argv, environ));
}

WRAP(int, fexecve, (int fd, char *const argv[], char *const envp[]))
{
	EXEC(REAL(fexecve)(fd, argv, envp));
}

WRAP(int, execveat,
     (int dirfd, const char *path, char *const argv[], char *const envp[], int flags))
{
	EXEC(REAL(execveat)(dirfd, path, argv, envp, flags));
}

/* The arguments of execl() and relatives as an array on the stack; @last: what follows NULL. */
#define COLLECT(argv, first, last)                           \
	do {                                                 \
		unsigned n_ = 1;                             \
		va_list ap_;                                 \
		va_start(ap_, first);                        \
		while (va_arg(ap_, char *))                  \
			n_++;                                \
		va_end(ap_);                                 \
		(argv) = alloca((n_ + 1) * sizeof(*(argv))); \
		(argv)[0] = (char *)(first);                 \
		va_start(ap_, first);                        \
		for (unsigned i_ = 1; i_ <= n_; i_++)        \
			(argv)[i_] = va_arg(ap_, char *);    \
		(last) = va_arg(ap_, void *);                \
		va_end(ap_);                                 \
	} while (0)

WRAP(int, execl, (const char *path, const char *arg, ...))
{
	char **argv;
	void *last;

	COLLECT(argv, arg, last);
	(void)last;
	EXEC(REAL(execve)(path, argv, environ));
}

WRAP(int, execlp, (const char *file, const char *arg, ...))
{
	char **argv;
	void *last;

	COLLECT(argv, arg, last);
	(void)last;
	EXEC(REAL(execvpe)(file, argv, environ));
}

WRAP(int, execle, (const char *path, const char *arg, ...))
{
	char **argv;
	void *envp;

	COLLECT(argv, arg, envp);
	EXEC(REAL(execve)(path, argv, envp));
}

/* libc's exit functions that run no destructors. */
KL_EXPORT void wrap__exit(int status) __asm__("_exit") KL_NORETURN;
void wrap__exit(int status)
{
	kl_pl_exit_report();
	REAL(_exit)(status);
}
KL_EXPORT void wrap__Exit(int status) __asm__("_Exit") __attribute__((alias("_exit"), noreturn));
