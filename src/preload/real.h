/* SPDX-License-Identifier: MIT */
/*
 * The next definitions of everything that the library wraps, and how a wrapper is defined.
 *
 * REAL(name) may be used at any time, also before the constructor ran (other libraries'
 * constructors, IFUNC resolvers of allocators): the table is filled on first use. A function
 * that this libc lacks answers ENOSYS.
 *
 * WRAP() defines the exported symbol under a private C name: libc's prototypes, whose
 * attributes would let the compiler drop checks of caller-controlled pointers, stay out.
 */
#pragma once

#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/poll.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "base/compiler.h"

#define WRAP(ret, name, args)                          \
	KL_EXPORT ret wrap_##name args __asm__(#name); \
	ret wrap_##name args

/* A second spelling of a wrapper. */
#define WRAP_ALIAS(ret, name, other, args) \
	KL_EXPORT ret wrap_##name args __asm__(#name) __attribute__((alias(#other)))

#define KL_REALS(X)                                                                              \
	/* first: dlsym's own error paths may free */                                            \
	X(void, free, (void *))                                                                  \
	X(void *, realloc, (void *, size_t))                                                     \
	X(void *, reallocarray, (void *, size_t, size_t))                                        \
	X(int, open, (const char *, int, ...))                                                   \
	X(int, openat, (int, const char *, int, ...))                                            \
	X(FILE *, fopen, (const char *, const char *))                                           \
	X(int, access, (const char *, int))                                                      \
	X(int, eaccess, (const char *, int))                                                     \
	X(int, faccessat, (int, const char *, int, int))                                         \
	X(int, stat, (const char *, struct stat *))                                              \
	X(int, lstat, (const char *, struct stat *))                                             \
	X(int, fstat, (int, struct stat *))                                                      \
	X(int, fstatat, (int, const char *, struct stat *, int))                                 \
	X(int, statx, (int, const char *, int, unsigned, struct statx *))                        \
	X(int, __xstat, (int, const char *, struct stat *))                                      \
	X(int, __lxstat, (int, const char *, struct stat *))                                     \
	X(int, __fxstat, (int, int, struct stat *))                                              \
	X(int, __fxstatat, (int, int, const char *, struct stat *, int))                         \
	X(int, ioctl, (int, unsigned long, ...))                                                 \
	X(int, close, (int))                                                                     \
	X(int, close_range, (unsigned, unsigned, int))                                           \
	X(int, dup, (int))                                                                       \
	X(int, dup2, (int, int))                                                                 \
	X(int, dup3, (int, int, int))                                                            \
	X(int, fcntl, (int, int, ...))                                                           \
	X(int, fcntl64, (int, int, ...))                                                         \
	X(ssize_t, sendmsg, (int, const struct msghdr *, int))                                   \
	X(ssize_t, recvmsg, (int, struct msghdr *, int))                                         \
	X(int, sendmmsg, (int, struct mmsghdr *, unsigned, int))                                 \
	X(int, recvmmsg, (int, struct mmsghdr *, unsigned, int, struct timespec *))              \
	X(ssize_t, read, (int, void *, size_t))                                                  \
	X(ssize_t, write, (int, const void *, size_t))                                           \
	X(ssize_t, pread, (int, void *, size_t, off_t))                                          \
	X(ssize_t, pwrite, (int, const void *, size_t, off_t))                                   \
	X(ssize_t, readv, (int, const struct iovec *, int))                                      \
	X(ssize_t, writev, (int, const struct iovec *, int))                                     \
	X(ssize_t, preadv, (int, const struct iovec *, int, off_t))                              \
	X(ssize_t, pwritev, (int, const struct iovec *, int, off_t))                             \
	X(ssize_t, preadv2, (int, const struct iovec *, int, off_t, int))                        \
	X(ssize_t, pwritev2, (int, const struct iovec *, int, off_t, int))                       \
	X(ssize_t, __read_chk, (int, void *, size_t, size_t))                                    \
	X(ssize_t, __pread_chk, (int, void *, size_t, off_t, size_t))                            \
	X(ssize_t, sendfile, (int, int, off_t *, size_t))                                        \
	X(ssize_t, splice, (int, off_t *, int, off_t *, size_t, unsigned))                       \
	X(ssize_t, copy_file_range, (int, off_t *, int, off_t *, size_t, unsigned))              \
	X(int, fsync, (int))                                                                     \
	X(int, fdatasync, (int))                                                                 \
	X(off_t, lseek, (int, off_t, int))                                                       \
	X(int, fallocate, (int, int, off_t, off_t))                                              \
	X(int, posix_fallocate, (int, off_t, off_t))                                             \
	X(int, ftruncate, (int, off_t))                                                          \
	X(int, truncate, (const char *, off_t))                                                  \
	X(void *, mmap, (void *, size_t, int, int, int, off_t))                                  \
	X(int, munmap, (void *, size_t))                                                         \
	X(void *, mremap, (void *, size_t, size_t, int, ...))                                    \
	X(int, madvise, (void *, size_t, int))                                                   \
	X(int, posix_madvise, (void *, size_t, int))                                             \
	X(int, mprotect, (void *, size_t, int))                                                  \
	X(int, pkey_mprotect, (void *, size_t, int, int))                                        \
	X(ssize_t, process_madvise, (int, const struct iovec *, size_t, int, unsigned))          \
	X(int, remap_file_pages, (void *, size_t, int, size_t, int))                             \
	X(void *, shmat, (int, const void *, int))                                               \
	X(int, shmdt, (const void *))                                                            \
	X(int, shm_open, (const char *, int, mode_t))                                            \
	X(int, malloc_trim, (size_t))                                                            \
	X(int, brk, (void *))                                                                    \
	X(void *, sbrk, (intptr_t))                                                              \
	X(int, sigaction, (int, const struct sigaction *, struct sigaction *))                   \
	X(sighandler_t, signal, (int, sighandler_t))                                             \
	X(sighandler_t, __sysv_signal, (int, sighandler_t))                                      \
	X(sighandler_t, sigset, (int, sighandler_t))                                             \
	X(int, sigignore, (int))                                                                 \
	X(int, sighold, (int))                                                                   \
	X(int, sigrelse, (int))                                                                  \
	X(int, siginterrupt, (int, int))                                                         \
	X(int, sigprocmask, (int, const sigset_t *, sigset_t *))                                 \
	X(int, pthread_sigmask, (int, const sigset_t *, sigset_t *))                             \
	X(int, sigblock, (int))                                                                  \
	X(int, sigsetmask, (int))                                                                \
	X(int, siggetmask, (void))                                                               \
	X(int, sigsuspend, (const sigset_t *))                                                   \
	X(int, ppoll, (struct pollfd *, nfds_t, const struct timespec *, const sigset_t *))      \
	X(int, __ppoll_chk,                                                                      \
	  (struct pollfd *, nfds_t, const struct timespec *, const sigset_t *, size_t))          \
	X(int, pselect,                                                                          \
	  (int, fd_set *, fd_set *, fd_set *, const struct timespec *, const sigset_t *))        \
	X(int, epoll_pwait, (int, struct epoll_event *, int, int, const sigset_t *))             \
	X(int, epoll_pwait2,                                                                     \
	  (int, struct epoll_event *, int, const struct timespec *, const sigset_t *))           \
	X(int, epoll_ctl, (int, int, int, struct epoll_event *))                                 \
	X(void, siglongjmp, (void *, int)KL_NORETURN)                                            \
	X(void, __longjmp_chk, (void *, int)KL_NORETURN)                                         \
	X(int, pthread_create, (pthread_t *, const pthread_attr_t *, void *(*)(void *), void *)) \
	X(int, pthread_cancel, (pthread_t))                                                      \
	X(int, posix_spawn,                                                                      \
	  (pid_t *, const char *, const posix_spawn_file_actions_t *, const posix_spawnattr_t *, \
	   char *const[], char *const[]))                                                        \
	X(int, posix_spawnp,                                                                     \
	  (pid_t *, const char *, const posix_spawn_file_actions_t *, const posix_spawnattr_t *, \
	   char *const[], char *const[]))                                                        \
	X(int, execve, (const char *, char *const[], char *const[]))                             \
	X(int, execvpe, (const char *, char *const[], char *const[]))                            \
	X(int, fexecve, (int, char *const[], char *const[]))                                     \
	X(int, execveat, (int, const char *, char *const[], char *const[], int))                 \
	X(pid_t, _Fork, (void))                                                                  \
	X(int, fclose, (FILE *))                                                                 \
	X(FILE *, freopen, (const char *, const char *, FILE *))                                 \
	X(int, clone, (int (*)(void *), void *, int, void *, ...))                               \
	X(void, _exit, (int)KL_NORETURN)                                                         \
	X(int, prctl, (int, ...))

struct kl_real {
#define X(ret, name, args) ret(*name) args;
	KL_REALS(X)
#undef X
};

extern struct kl_real kl_real;
void kl_real_resolve(void);

#define REAL(name)                                                                              \
	({                                                                                      \
		__typeof__(kl_real.name) f_ = __atomic_load_n(&kl_real.name, __ATOMIC_RELAXED); \
		if (KL_UNLIKELY(!f_)) {                                                         \
			kl_real_resolve();                                                      \
			f_ = __atomic_load_n(&kl_real.name, __ATOMIC_RELAXED);                  \
		}                                                                               \
		f_;                                                                             \
	})
