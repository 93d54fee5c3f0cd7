/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include "base/hidden_fd.h"
#include "host/sys.h"
#include "host/thread.h"

#define MIN_HIGH_FDS 64u
#define MAX_HIGH_FDS 4096u

int (*kl_sys_sigaction)(int, const struct sigaction *, struct sigaction *) = sigaction;

static KL_TLS pid_t cached_tid;

/*
 * The kernel orders an munmap before an mmap that gets the same addresses. ThreadSanitizer does not
 * know of either, and would see a race between the old use and the new.
 */
static _Atomic unsigned unmaps;

void *kl_sys_map(size_t len)
{
	long p = kl_sys(SYS_mmap, NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			-1, 0);

	(void)atomic_load_explicit(&unmaps, memory_order_acquire);
	return p < 0 ? NULL : (void *)p;
}

void kl_sys_unmap(void *p, size_t len)
{
	atomic_fetch_add_explicit(&unmaps, 1, memory_order_release);
	kl_sys(SYS_munmap, p, len);
}

/*
 * As high as the limit allows, out of the way of "lowest free descriptor": the upper quarter, if
 * that is no more than irqfds and ioeventfds will ever need.
 */
static long dup_high(int fd)
{
	struct rlimit lim = {1024, 1024};
	unsigned long end;

	kl_sys(SYS_prlimit64, 0, RLIMIT_NOFILE, NULL, &lim);
	end = kl_min(lim.rlim_cur, 1ul << 20);
	if (end / 4 < MIN_HIGH_FDS)
		return -EMFILE;
	return kl_sys(SYS_fcntl, fd, F_DUPFD_CLOEXEC,
		      end - kl_min(end / 4, (unsigned long)MAX_HIGH_FDS));
}

int kl_sys_dup(int fd)
{
	long high = dup_high(fd);

	if (high == -EMFILE)
		high = kl_sys(SYS_fcntl, fd, F_DUPFD_CLOEXEC, 0);
	if (high >= 0)
		kl_fd_hide((int)high);
	return (int)high;
}

void kl_sys_close(int fd)
{
	kl_fd_unhide(fd);
	kl_sys(SYS_close, fd);
}

static int move_up(int fd)
{
	long high = dup_high(fd);

	if (high >= 0) {
		kl_sys(SYS_close, fd);
		fd = (int)high;
	}
	kl_fd_hide(fd);
	return fd;
}

int kl_sys_memfd(const char *name, size_t size, unsigned seals)
{
	long fd = kl_sys(SYS_memfd_create, name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
	long r;

	if (fd < 0)
		return (int)fd;
	r = kl_sys(SYS_ftruncate, fd, size);
	if (!r && seals)
		r = kl_sys(SYS_fcntl, fd, F_ADD_SEALS, seals);
	if (r < 0) {
		kl_sys(SYS_close, fd);
		return (int)r;
	}
	return move_up((int)fd);
}

int kl_futex_wait(_Atomic uint32_t *addr, uint32_t val, const struct timespec *timeout)
{
	return (int)kl_sys(SYS_futex, addr, FUTEX_WAIT_PRIVATE, val, timeout);
}

int kl_futex_wait_until(_Atomic uint32_t *addr, uint32_t val, const struct timespec *deadline)
{
	return (int)kl_sys(SYS_futex, addr, FUTEX_WAIT_BITSET_PRIVATE, val, deadline, NULL,
			   FUTEX_BITSET_MATCH_ANY);
}

void kl_futex_wake(_Atomic uint32_t *addr, int n)
{
	kl_sys(SYS_futex, addr, FUTEX_WAKE_PRIVATE, n);
}

pid_t kl_gettid(void)
{
	if (KL_UNLIKELY(!cached_tid))
		cached_tid = (pid_t)kl_sys(SYS_gettid, 0);
	return cached_tid;
}

void kl_thread_after_fork(void)
{
	cached_tid = 0;
	kl_self.running = NULL;
	kl_self.brackets = 0;
}
