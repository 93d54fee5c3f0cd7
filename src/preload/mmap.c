/* SPDX-License-Identifier: MIT */
/*
 * Calls that change the program's mappings (N1), and mappings of kvmlet's descriptors (U4).
 *
 * A call whose result may land anywhere is bracketed afterwards: nothing but a stale slot
 * could be there, and nothing was mapped there before.
 */
#include <fcntl.h>
#include <stdarg.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/shm.h>

#include "preload/preload.h"

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#endif
#ifndef MADV_SOFT_OFFLINE
#define MADV_SOFT_OFFLINE 101
#endif
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

static void *real_mmap(void *addr, size_t len, int prot, int flags, int fd, off_t off)
{
	struct kl_bracket b;
	void *p;

	if (KL_LIKELY(!kl_notifier_active()))
		return REAL(mmap)(addr, len, prot, flags, fd, off);
	if ((flags & MAP_FIXED) && (flags & MAP_FIXED_NOREPLACE) != MAP_FIXED_NOREPLACE) {
		kl_bracket_begin(&b, addr, len, KL_EVENT_REPLACE);
		p = REAL(mmap)(addr, len, prot, flags, fd, off);
		kl_bracket_end(&b);
		return p;
	}
	p = REAL(mmap)(addr, len, prot, flags, fd, off);
	if (p != MAP_FAILED)
		kl_bracket_after(p, len, KL_EVENT_REPLACE);
	return p;
}

/*
 * The vCPU's descriptor is its kvm_run area; the coalesced ring's page belongs to the VM. The
 * program's signal handlers may leave map_object() by siglongjmp: nothing is held then.
 */
static void *map_object(void *addr, size_t len, int prot, int flags, int fd, off_t off)
{
	struct kl_object *obj;
	struct kl_entry e;
	size_t over_off = 0;
	int over_fd = -1;
	long n, r;
	void *p;

	kl_pl_enter(&e);
	obj = kl_fd_get(fd);
	n = 0;
	if (obj) {
		n = kl_uapi_mmap(obj, len, prot, flags, off, &over_fd, &over_off);
		kl_fd_put(fd, obj);
	}
	kl_pl_leave(&e);
	if (n < 0) {
		errno = (int)-n;
		return MAP_FAILED;
	}
	p = real_mmap(addr, len, prot, flags, fd, off);
	if (p == MAP_FAILED || n == 0)
		return p;
	r = kl_sys(SYS_mmap, (char *)p + over_off, n, prot,
		   (flags & (MAP_SHARED | MAP_PRIVATE | MAP_POPULATE | MAP_LOCKED)) | MAP_FIXED,
		   over_fd, 0);
	if (r < 0) {
		kl_sys(SYS_munmap, p, len);
		errno = (int)-r;
		return MAP_FAILED;
	}
	return p;
}

WRAP(void *, mmap, (void *addr, size_t len, int prot, int flags, int fd, off_t off))
{
	if (KL_UNLIKELY(!(flags & MAP_ANONYMOUS) && kl_fd_known(fd)))
		return map_object(addr, len, prot, flags, fd, off);
	return real_mmap(addr, len, prot, flags, fd, off);
}
WRAP_ALIAS(void *, mmap64, mmap, (void *addr, size_t len, int prot, int flags, int fd, off_t off));

WRAP(int, munmap, (void *addr, size_t len))
{
	struct kl_bracket b;
	int r;

	if (KL_LIKELY(!kl_notifier_active()))
		return REAL(munmap)(addr, len);
	kl_bracket_begin(&b, addr, len, KL_EVENT_UNMAP);
	r = REAL(munmap)(addr, len);
	kl_bracket_end(&b);
	return r;
}

WRAP(void *, mremap, (void *old, size_t old_len, size_t new_len, int flags, ...))
{
	struct kl_bracket from = {.on = false}, to = {.on = false};
	void *target = NULL, *p;
	va_list ap;

	if (flags & (MREMAP_FIXED | MREMAP_DONTUNMAP)) {
		va_start(ap, flags);
		target = va_arg(ap, void *);
		va_end(ap);
	}
	if (KL_LIKELY(!kl_notifier_active()))
		return REAL(mremap)(old, old_len, new_len, flags, target);
	/* old_len 0 makes a second mapping of the same pages and leaves the first alone. */
	if (new_len != old_len || (flags & (MREMAP_FIXED | MREMAP_DONTUNMAP)))
		kl_bracket_begin(&from, old, old_len, KL_EVENT_REMAP);
	if (flags & MREMAP_FIXED)
		kl_bracket_begin(&to, target, new_len, KL_EVENT_REPLACE);
	p = REAL(mremap)(old, old_len, new_len, flags, target);
	kl_bracket_end(&to);
	kl_bracket_end(&from);
	if (p != MAP_FAILED && p != old && !(flags & MREMAP_FIXED))
		kl_bracket_after(p, new_len, KL_EVENT_REPLACE);
	return p;
}

/* Advice after which what was in the pages, or where it is, may be different. */
static bool discards(int advice)
{
	switch (advice) {
	case MADV_DONTNEED:
	case MADV_DONTNEED_LOCKED:
	case MADV_FREE:
	case MADV_REMOVE:
	case MADV_PAGEOUT:
	case MADV_HWPOISON:
	case MADV_SOFT_OFFLINE:
	case MADV_GUARD_INSTALL:
		return true;
	default:
		return false;
	}
}

WRAP(int, madvise, (void *addr, size_t len, int advice))
{
	struct kl_bracket b;
	int r;

	if (KL_LIKELY(!kl_notifier_active()) || !discards(advice))
		return REAL(madvise)(addr, len, advice);
	kl_bracket_begin(&b, addr, len, KL_EVENT_DISCARD);
	r = REAL(madvise)(addr, len, advice);
	kl_bracket_end(&b);
	return r;
}

WRAP(int, posix_madvise, (void *addr, size_t len, int advice))
{
	/* glibc makes POSIX_MADV_DONTNEED a no-op; another libc may not. */
	struct kl_bracket b = {.on = false};
	int r;

	if (advice == POSIX_MADV_DONTNEED)
		kl_bracket_begin(&b, addr, len, KL_EVENT_DISCARD);
	r = REAL(posix_madvise)(addr, len, advice);
	kl_bracket_end(&b);
	return r;
}

/*
 * Whose pidfd it is does not matter: an event for a range of ours that did not change costs a
 * few faults. Brackets nest as far as the table goes; the hull of the rest is one more.
 */
#define MAX_BRACKETS 8

static unsigned open_iovec(struct kl_bracket *b, const struct iovec *iov, size_t n)
{
	uint64_t start = UINT64_MAX, end = 0, base, len;
	unsigned nr = 0;

	for (size_t i = 0; i < n && i < 1024; i++) {
		struct kl_entry e;
		struct iovec v;
		int err;

		kl_pl_enter(&e);
		err = kl_guard_copy(&v, &iov[i], sizeof(v));
		kl_pl_leave(&e);
		if (err)
			break; /* EFAULT is the kernel's to say */
		base = (uint64_t)(uintptr_t)v.iov_base;
		len = v.iov_len;
		if (base + len < base)
			continue;
		if (nr < MAX_BRACKETS - 1) {
			kl_bracket_begin(&b[nr++], v.iov_base, len, KL_EVENT_DISCARD);
			continue;
		}
		start = kl_min(start, base);
		end = kl_max(end, base + len);
	}
	if (start < end)
		kl_bracket_begin(&b[nr++], (void *)(uintptr_t)start, end - start, KL_EVENT_DISCARD);
	return nr;
}

WRAP(ssize_t, process_madvise,
     (int pidfd, const struct iovec *iov, size_t n, int advice, unsigned flags))
{
	struct kl_bracket b[MAX_BRACKETS];
	unsigned nr;
	ssize_t r;

	if (!kl_notifier_active() || !discards(advice))
		return REAL(process_madvise)(pidfd, iov, n, advice, flags);
	nr = open_iovec(b, iov, n);
	r = REAL(process_madvise)(pidfd, iov, n, advice, flags);
	while (nr)
		kl_bracket_end(&b[--nr]);
	return r;
}

WRAP(int, mprotect, (void *addr, size_t len, int prot))
{
	struct kl_bracket b;
	int r;

	if (KL_LIKELY(!kl_notifier_active()))
		return REAL(mprotect)(addr, len, prot);
	kl_bracket_begin(&b, addr, len, KL_EVENT_PROTECT);
	r = REAL(mprotect)(addr, len, prot);
	kl_bracket_end(&b);
	return r;
}

WRAP(int, pkey_mprotect, (void *addr, size_t len, int prot, int pkey))
{
	struct kl_bracket b;
	int r;

	kl_bracket_begin(&b, addr, len, KL_EVENT_PROTECT);
	r = REAL(pkey_mprotect)(addr, len, prot, pkey);
	kl_bracket_end(&b);
	return r;
}

/* ---- System V shared memory ------------------------------------------------------------ */

static uint64_t segment_size(int id)
{
	struct shmid_ds ds;

	return kl_sys(SYS_shmctl, id, IPC_STAT, &ds) < 0 ? 0 : (uint64_t)ds.shm_segsz;
}

WRAP(void *, shmat, (int id, const void *addr, int flags))
{
	struct kl_bracket b = {.on = false};
	uint64_t at = (uint64_t)(uintptr_t)addr, len;
	void *p;

	if (KL_LIKELY(!kl_notifier_active()))
		return REAL(shmat)(id, addr, flags);
	len = segment_size(id);
	if (flags & SHM_RND)
		at &= ~(uint64_t)(SHMLBA - 1);
	if (flags & SHM_REMAP)
		kl_bracket_begin(&b, (void *)(uintptr_t)at, len, KL_EVENT_REPLACE);
	p = REAL(shmat)(id, addr, flags);
	kl_bracket_end(&b);
	if (p != (void *)-1 && !(flags & SHM_REMAP))
		kl_bracket_after(p, len, KL_EVENT_REPLACE);
	return p;
}

/*
 * How much goes is known to the kernel alone, and only for as long as it is attached: ask
 * where the mapping at @addr ends. A segment of which pieces were unmapped or protected is
 * several mappings of one file; detaching takes them all.
 */
WRAP(int, shmdt, (const void *addr))
{
	struct kl_bracket b = {.on = false};
	uint64_t len;
	int r;

	if (KL_LIKELY(!kl_notifier_active()))
		return REAL(shmdt)(addr);
	len = kl_maps_segment((uint64_t)(uintptr_t)addr);
	kl_bracket_begin(&b, addr, len, KL_EVENT_UNMAP);
	r = REAL(shmdt)(addr);
	kl_bracket_end(&b);
	return r;
}
