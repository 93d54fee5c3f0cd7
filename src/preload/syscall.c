/* SPDX-License-Identifier: MIT */
/*
 * syscall(2) with the numbers of what is wrapped. Everything else is the system call itself,
 * made from the caller's own stack frame: clone() and vfork() return twice.
 */
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include "preload/preload.h"
#include "preload/wrapped.h"

#define ROUTED_WORDS 8

/* A bit for each number that route() knows. */
extern const uint64_t kl_syscall_routed[ROUTED_WORDS];
long kl_syscall_route(long nr, long a, long b, long c, long d, long e, long f);
long kl_syscall_failed(long r);

/* A clone() that shares memory or brings its own stack goes the direct way. */
__asm__(".text\n"
	".globl syscall\n"
	".type syscall, @function\n"
	".p2align 4\n"
	"syscall:\n"
	".cfi_startproc\n"
	"	cmpq $512, %rdi\n"
	"	jae 1f\n"
	"	leaq kl_syscall_routed(%rip), %rax\n"
	"	btq %rdi, (%rax)\n"
	"	jnc 1f\n"
	"	cmpq $56, %rdi\n" /* clone */
	"	jne 2f\n"
	"	testl $0x100, %esi\n" /* CLONE_VM */
	"	jnz 1f\n"
	"	testq %rdx, %rdx\n"
	"	jnz 1f\n"
	"2:	jmp kl_syscall_route\n"
	"1:	movq %rdi, %rax\n"
	"	movq %rsi, %rdi\n"
	"	movq %rdx, %rsi\n"
	"	movq %rcx, %rdx\n"
	"	movq %r8, %r10\n"
	"	movq %r9, %r8\n"
	"	movq 8(%rsp), %r9\n"
	"	syscall\n"
	"	cmpq $-4095, %rax\n"
	"	jae 3f\n"
	"	ret\n"
	"3:	movq %rax, %rdi\n"
	"	jmp kl_syscall_failed\n"
	".cfi_endproc\n"
	".size syscall, . - syscall\n");

long kl_syscall_failed(long r)
{
	return kl_ret(r);
}

WRAPPED(int, ioctl, (int, unsigned long, unsigned long));
WRAPPED(int, close, (int));
WRAPPED(int, close_range, (unsigned, unsigned, int));
WRAPPED(int, dup, (int));
WRAPPED(int, dup2, (int, int));
WRAPPED(int, dup3, (int, int, int));
WRAPPED(int, fcntl, (int, int, unsigned long));
WRAPPED(int, access, (const char *, int));
WRAPPED(int, faccessat, (int, const char *, int, int));
WRAPPED(int, stat, (const char *, struct stat *));
WRAPPED(int, lstat, (const char *, struct stat *));
WRAPPED(int, fstat, (int, struct stat *));
WRAPPED(int, fstatat, (int, const char *, struct stat *, int));
WRAPPED(int, statx, (int, const char *, int, unsigned, struct statx *));
WRAPPED(ssize_t, read, (int, void *, size_t));
WRAPPED(ssize_t, write, (int, const void *, size_t));
WRAPPED(ssize_t, pread, (int, void *, size_t, off_t));
WRAPPED(ssize_t, pwrite, (int, const void *, size_t, off_t));
WRAPPED(ssize_t, readv, (int, const struct iovec *, int));
WRAPPED(ssize_t, writev, (int, const struct iovec *, int));
WRAPPED(ssize_t, preadv, (int, const struct iovec *, int, off_t));
WRAPPED(ssize_t, pwritev, (int, const struct iovec *, int, off_t));
WRAPPED(ssize_t, preadv2, (int, const struct iovec *, int, off_t, int));
WRAPPED(ssize_t, pwritev2, (int, const struct iovec *, int, off_t, int));
WRAPPED(ssize_t, sendfile, (int, int, off_t *, size_t));
WRAPPED(ssize_t, splice, (int, off_t *, int, off_t *, size_t, unsigned));
WRAPPED(ssize_t, copy_file_range, (int, off_t *, int, off_t *, size_t, unsigned));
WRAPPED(off_t, lseek, (int, off_t, int));
WRAPPED(int, fsync, (int));
WRAPPED(int, fdatasync, (int));
WRAPPED(ssize_t, sendmsg, (int, const struct msghdr *, int));
WRAPPED(ssize_t, recvmsg, (int, struct msghdr *, int));
WRAPPED(int, sendmmsg, (int, struct mmsghdr *, unsigned, int));
WRAPPED(int, recvmmsg, (int, struct mmsghdr *, unsigned, int, struct timespec *));
WRAPPED(int, fallocate, (int, int, off_t, off_t));
WRAPPED(int, ftruncate, (int, off_t));
WRAPPED(int, truncate, (const char *, off_t));
WRAPPED(void *, mmap, (void *, size_t, int, int, int, off_t));
WRAPPED(int, munmap, (void *, size_t));
WRAPPED(void *, mremap, (void *, size_t, size_t, int, ...));
WRAPPED(int, madvise, (void *, size_t, int));
WRAPPED(int, mprotect, (void *, size_t, int));
WRAPPED(int, pkey_mprotect, (void *, size_t, int, int));
WRAPPED(ssize_t, process_madvise, (int, const struct iovec *, size_t, int, unsigned));
WRAPPED(int, remap_file_pages, (void *, size_t, int, size_t, int));
WRAPPED(void *, shmat, (int, const void *, int));
WRAPPED(int, shmdt, (const void *));
WRAPPED(int, execve, (const char *, char *const[], char *const[]));
WRAPPED(int, execveat, (int, const char *, char *const[], char *const[], int));
WRAPPED(int, prctl, (int, unsigned long, unsigned long, unsigned long, unsigned long));

/* The kernel's struct open_how begins with these. */
struct how {
	uint64_t flags, mode;
};

/* The kernel reads and checks it first: no file has an empty name. */
static long read_how(int dirfd, struct how *how, const void *uhow, size_t size)
{
	long r = kl_sys(SYS_openat2, dirfd, "", uhow, size);
	struct kl_entry e;

	if (r != -ENOENT)
		return r < 0 ? r : -EINVAL;
	kl_pl_enter(&e);
	r = kl_copy_from_user(how, uhow, sizeof(*how));
	kl_pl_leave(&e);
	return r;
}

static long do_openat2(int dirfd, const char *path, const void *uhow, size_t size)
{
	char buf[KL_PATH_BUF];
	const char *rest;
	struct how how;
	long fd, r;

	switch (kl_path_classify(dirfd, path, buf, sizeof(buf), &rest)) {
	case KL_PATH_KVM:
		r = read_how(dirfd, &how, uhow, size);
		return kl_ret(r ? r : kl_open_kvm((int)how.flags));
	case KL_PATH_SYSFS:
		r = read_how(dirfd, &how, uhow, size);
		return kl_ret(r ? r : kl_sysfs_open(rest, (int)how.flags));
	default:
		if (kl_notifier_active() && !read_how(dirfd, &how, uhow, size))
			kl_truncate_early(dirfd, path, (int)how.flags);
		fd = kl_sys(SYS_openat2, dirfd, path, uhow, size);
		if (fd >= 0 && kl_path_opened_real_kvm((int)fd)) {
			kl_sys(SYS_close, fd);
			r = read_how(dirfd, &how, uhow, size);
			return kl_ret(r ? r : kl_open_kvm((int)how.flags));
		}
		return kl_ret(fd);
	}
}

static long do_fork(long nr, long a, long b, long c, long d, long e)
{
	long r = kl_sys(nr, a, b, c, d, e);

	if (!r)
		kl_pl_after_raw_fork();
	return kl_ret(r);
}

#define P(x)  ((void *)(x))
#define CP(x) ((const char *)(x))

/* number, arguments as the kernel has them */
#define ROUTES(X)                                                                                  \
	X(SYS_open, kl_pl_openat(AT_FDCWD, CP(a), (int)b, (unsigned)c))                            \
	X(SYS_openat, kl_pl_openat((int)a, CP(b), (int)c, (unsigned)d))                            \
	X(SYS_openat2, do_openat2((int)a, CP(b), P(c), (size_t)d))                                 \
	X(SYS_creat, kl_pl_openat(AT_FDCWD, CP(a), O_CREAT | O_WRONLY | O_TRUNC, (unsigned)b))     \
	X(SYS_access, wrap_access(CP(a), (int)b))                                                  \
	X(SYS_faccessat, wrap_faccessat((int)a, CP(b), (int)c, 0))                                 \
	X(SYS_faccessat2, wrap_faccessat((int)a, CP(b), (int)c, (int)d))                           \
	X(SYS_stat, wrap_stat(CP(a), P(b)))                                                        \
	X(SYS_lstat, wrap_lstat(CP(a), P(b)))                                                      \
	X(SYS_fstat, wrap_fstat((int)a, P(b)))                                                     \
	X(SYS_newfstatat, wrap_fstatat((int)a, CP(b), P(c), (int)d))                               \
	X(SYS_statx, wrap_statx((int)a, CP(b), (int)c, (unsigned)d, P(e)))                         \
	X(SYS_ioctl, wrap_ioctl((int)a, (unsigned long)b, (unsigned long)c))                       \
	X(SYS_close, wrap_close((int)a))                                                           \
	X(SYS_close_range, wrap_close_range((unsigned)a, (unsigned)b, (int)c))                     \
	X(SYS_dup, wrap_dup((int)a))                                                               \
	X(SYS_dup2, wrap_dup2((int)a, (int)b))                                                     \
	X(SYS_dup3, wrap_dup3((int)a, (int)b, (int)c))                                             \
	X(SYS_fcntl, wrap_fcntl((int)a, (int)b, (unsigned long)c))                                 \
	X(SYS_read, wrap_read((int)a, P(b), (size_t)c))                                            \
	X(SYS_write, wrap_write((int)a, P(b), (size_t)c))                                          \
	X(SYS_pread64, wrap_pread((int)a, P(b), (size_t)c, d))                                     \
	X(SYS_pwrite64, wrap_pwrite((int)a, P(b), (size_t)c, d))                                   \
	X(SYS_readv, wrap_readv((int)a, P(b), (int)c))                                             \
	X(SYS_writev, wrap_writev((int)a, P(b), (int)c))                                           \
	X(SYS_preadv, wrap_preadv((int)a, P(b), (int)c, d))                                        \
	X(SYS_pwritev, wrap_pwritev((int)a, P(b), (int)c, d))                                      \
	X(SYS_preadv2, wrap_preadv2((int)a, P(b), (int)c, d, (int)f))                              \
	X(SYS_pwritev2, wrap_pwritev2((int)a, P(b), (int)c, d, (int)f))                            \
	X(SYS_sendfile, wrap_sendfile((int)a, (int)b, P(c), (size_t)d))                            \
	X(SYS_splice, wrap_splice((int)a, P(b), (int)c, P(d), (size_t)e, (unsigned)f))             \
	X(SYS_copy_file_range,                                                                     \
	  wrap_copy_file_range((int)a, P(b), (int)c, P(d), (size_t)e, (unsigned)f))                \
	X(SYS_lseek, wrap_lseek((int)a, b, (int)c))                                                \
	X(SYS_fsync, wrap_fsync((int)a))                                                           \
	X(SYS_fdatasync, wrap_fdatasync((int)a))                                                   \
	X(SYS_sendmsg, wrap_sendmsg((int)a, P(b), (int)c))                                         \
	X(SYS_recvmsg, wrap_recvmsg((int)a, P(b), (int)c))                                         \
	X(SYS_sendmmsg, wrap_sendmmsg((int)a, P(b), (unsigned)c, (int)d))                          \
	X(SYS_recvmmsg, wrap_recvmmsg((int)a, P(b), (unsigned)c, (int)d, P(e)))                    \
	X(SYS_fallocate, wrap_fallocate((int)a, (int)b, c, d))                                     \
	X(SYS_ftruncate, wrap_ftruncate((int)a, b))                                                \
	X(SYS_truncate, wrap_truncate(CP(a), b))                                                   \
	X(SYS_mmap, (long)wrap_mmap(P(a), (size_t)b, (int)c, (int)d, (int)e, f))                   \
	X(SYS_munmap, wrap_munmap(P(a), (size_t)b))                                                \
	X(SYS_mremap, (long)wrap_mremap(P(a), (size_t)b, (size_t)c, (int)d, P(e)))                 \
	X(SYS_madvise, wrap_madvise(P(a), (size_t)b, (int)c))                                      \
	X(SYS_mprotect, wrap_mprotect(P(a), (size_t)b, (int)c))                                    \
	X(SYS_pkey_mprotect, wrap_pkey_mprotect(P(a), (size_t)b, (int)c, (int)d))                  \
	X(SYS_process_madvise, wrap_process_madvise((int)a, P(b), (size_t)c, (int)d, (unsigned)e)) \
	X(SYS_shmat, (long)wrap_shmat((int)a, P(b), (int)c))                                       \
	X(SYS_brk, kl_pl_brk(a))                                                                   \
	X(SYS_remap_file_pages, wrap_remap_file_pages(P(a), (size_t)b, (int)c, (size_t)d, (int)e)) \
	X(SYS_shmdt, wrap_shmdt(P(a)))                                                             \
	X(SYS_execve, wrap_execve(CP(a), P(b), P(c)))                                              \
	X(SYS_execveat, wrap_execveat((int)a, CP(b), P(c), P(d), (int)e))                          \
	X(SYS_prctl, wrap_prctl((int)a, (unsigned long)b, (unsigned long)c, (unsigned long)d,      \
				(unsigned long)e))                                                 \
	X(SYS_seccomp, kl_ret(kl_pl_seccomp((unsigned)a, (unsigned)b, (unsigned long)c)))          \
	X(SYS_rt_sigaction, kl_ret(kl_signals_raw_action((int)a, P(b), P(c), (size_t)d)))          \
	X(SYS_rt_sigprocmask, kl_ret(kl_mask_raw((int)a, P(b), P(c), (size_t)d)))                  \
	X(SYS_fork, do_fork(SYS_fork, 0, 0, 0, 0, 0))                                              \
	X(SYS_clone, do_fork(SYS_clone, a, b, c, d, e))                                            \
	X(SYS_exit_group, (kl_pl_exit_report(), kl_ret(kl_sys(SYS_exit_group, a))))

#define BIT_IN(word, nr) (((nr) / 64 == (word)) ? 1ull << ((nr) % 64) : 0)
#define X0(nr, call)     | BIT_IN(0, nr)
#define X1(nr, call)     | BIT_IN(1, nr)
#define X2(nr, call)     | BIT_IN(2, nr)
#define X3(nr, call)     | BIT_IN(3, nr)
#define X4(nr, call)     | BIT_IN(4, nr)
#define X5(nr, call)     | BIT_IN(5, nr)
#define X6(nr, call)     | BIT_IN(6, nr)
#define X7(nr, call)     | BIT_IN(7, nr)
const uint64_t kl_syscall_routed[ROUTED_WORDS] = {
	0 ROUTES(X0), 0 ROUTES(X1), 0 ROUTES(X2), 0 ROUTES(X3),
	0 ROUTES(X4), 0 ROUTES(X5), 0 ROUTES(X6), 0 ROUTES(X7),
};

long kl_syscall_route(long nr, long a, long b, long c, long d, long e, long f)
{
	switch (nr) {
#define X(n, call) \
	case n:    \
		return (long)(call);
		ROUTES(X)
#undef X
	default:
		return kl_ret(kl_sys(nr, a, b, c, d, e, f));
	}
}
