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

#include "host/uffd.h"
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
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

/* Neither a VM nor a userfaultfd: nobody wants to know. */
KL_INLINE bool unwatched(void)
{
	return KL_LIKELY(!kl_notifier_active() && !kl_uffd_any());
}

static uint64_t addr_of(const void *p)
{
	return (uint64_t)(uintptr_t)p;
}

static bool forget(const void *p, uint64_t len)
{
	return addr_of(p) + len > addr_of(p) && kl_uffd_remove(addr_of(p), addr_of(p) + len);
}

static void remember(const void *p, uint64_t len)
{
	kl_uffd_add(addr_of(p), addr_of(p) + len);
}

/*
 * MAP_POPULATE may wait for a file's server, and takes long: that is not for the bracket. As in
 * the kernel its failures do not show.
 */
static void populate(void *p, size_t len, int prot, int flags)
{
	bool write = (flags & MAP_TYPE) == MAP_PRIVATE && (prot & PROT_WRITE);

	if ((flags & MAP_NONBLOCK) || !(prot & (PROT_READ | PROT_WRITE | PROT_EXEC)))
		return;
	kl_sys(SYS_madvise, p, (len + KL_PAGE_SIZE - 1) & KL_PAGE_MASK,
	       write ? MADV_POPULATE_WRITE : MADV_POPULATE_READ);
}

static void *replace(void *addr, size_t len, int prot, int flags, int fd, off_t off)
{
	struct kl_bracket b;
	bool was;
	void *p;

	kl_bracket_begin(&b, addr, len, KL_EVENT_REPLACE, "mmap(MAP_FIXED)");
	was = forget(addr, len);
	p = REAL(mmap)(addr, len, prot, flags & ~MAP_POPULATE, fd, off);
	if (p == MAP_FAILED && was)
		remember(addr, len);
	kl_bracket_end(&b);
	if (p != MAP_FAILED && (flags & MAP_POPULATE))
		populate(p, len, prot, flags);
	return p;
}

static void *real_mmap(void *addr, size_t len, int prot, int flags, int fd, off_t off)
{
	void *p;

	if (unwatched())
		return REAL(mmap)(addr, len, prot, flags, fd, off);
	if ((flags & MAP_FIXED) && (flags & MAP_FIXED_NOREPLACE) != MAP_FIXED_NOREPLACE)
		return replace(addr, len, prot, flags, fd, off);
	p = REAL(mmap)(addr, len, prot, flags, fd, off);
	if (p != MAP_FAILED) {
		forget(p, len);
		kl_bracket_after(p, len, KL_EVENT_REPLACE, "mmap");
	}
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
	struct kl_overlay over;
	long n, r;
	void *p;

	kl_pl_enter(&e);
	obj = kl_fd_get(fd);
	n = 0;
	if (obj) {
		n = kl_uapi_mmap(obj, len, prot, flags, off, &over);
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
	r = kl_sys(SYS_mmap, (char *)p + over.at, n, prot,
		   (flags & (MAP_SHARED | MAP_PRIVATE | MAP_POPULATE | MAP_LOCKED)) | MAP_FIXED,
		   over.fd, over.off);
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
	bool was;
	int r;

	if (unwatched())
		return REAL(munmap)(addr, len);
	kl_bracket_begin(&b, addr, len, KL_EVENT_UNMAP, "munmap");
	was = forget(addr, len);
	r = REAL(munmap)(addr, len);
	if (r && was)
		remember(addr, len);
	kl_bracket_end(&b);
	return r;
}

/*
 * The registration with a userfaultfd may move along, and where the memory grows it grows too. (It
 * does not move with a userfaultfd that reports no such events; that costs huge leaves at most.)
 */
static void moved(void *old, size_t old_len, void *p, size_t new_len, int flags)
{
	bool was = kl_uffd_overlaps(addr_of(old), addr_of(old) + kl_max(old_len, 1ul));

	if (p == old) {
		if (new_len < old_len)
			forget((char *)old + new_len, old_len - new_len);
	} else if (old_len && !(flags & MREMAP_DONTUNMAP)) {
		forget(old, old_len);
	}
	if (was)
		remember(p, new_len);
	else
		forget(p, new_len);
}

WRAP(void *, mremap, (void *old, size_t old_len, size_t new_len, int flags, ...))
{
	struct kl_bracket b[2] = {{.state = KL_BRACKET_NONE}, {.state = KL_BRACKET_NONE}};
	void *target = NULL, *p;
	va_list ap;

	if (flags & (MREMAP_FIXED | MREMAP_DONTUNMAP)) {
		va_start(ap, flags);
		target = va_arg(ap, void *);
		va_end(ap);
	}
	if (unwatched())
		return REAL(mremap)(old, old_len, new_len, flags, target);
	/* old_len 0 makes a second mapping of the same pages and leaves the first alone. */
	if (new_len != old_len || (flags & (MREMAP_FIXED | MREMAP_DONTUNMAP)))
		kl_bracket_begin(&b[0], old, old_len, KL_EVENT_REMAP, "mremap");
	if (flags & MREMAP_FIXED)
		kl_bracket_begin_more(&b[1], b[0].state == KL_BRACKET_OPEN, target, new_len,
				      KL_EVENT_REPLACE, "mremap(MREMAP_FIXED)");
	kl_bracket_join(b, 2);
	p = REAL(mremap)(old, old_len, new_len, flags, target);
	if (p != MAP_FAILED && kl_uffd_any())
		moved(old, old_len, p, new_len, flags);
	kl_bracket_end(&b[1]);
	kl_bracket_end(&b[0]);
	if (p != MAP_FAILED && p != old && !(flags & MREMAP_FIXED))
		kl_bracket_after(p, new_len, KL_EVENT_REPLACE, "mremap");
	return p;
}

WRAP(int, remap_file_pages, (void *addr, size_t len, int prot, size_t pgoff, int flags))
{
	struct kl_bracket b;
	int r;

	/* The kernel maps the pages anew. */
	kl_bracket_begin(&b, addr, len, KL_EVENT_REPLACE, "remap_file_pages");
	r = REAL(remap_file_pages)(addr, len, prot, pgoff, flags);
	kl_bracket_end(&b);
	return r;
}

/*
 * Advice after which what was in the pages, or where it is, may be different. Everything else
 * only says how memory will be used, or fills in what was absent.
 */
static const char *discards(int advice)
{
	switch (advice) {
	case MADV_DONTNEED:
		return "madvise(MADV_DONTNEED)";
	case MADV_DONTNEED_LOCKED:
		return "madvise(MADV_DONTNEED_LOCKED)";
	case MADV_FREE:
		return "madvise(MADV_FREE)";
	case MADV_REMOVE:
		return "madvise(MADV_REMOVE)";
	case MADV_PAGEOUT:
		return "madvise(MADV_PAGEOUT)";
	case MADV_HWPOISON:
		return "madvise(MADV_HWPOISON)";
	case MADV_SOFT_OFFLINE:
		return "madvise(MADV_SOFT_OFFLINE)";
	case MADV_GUARD_INSTALL:
		return "madvise(MADV_GUARD_INSTALL)";
	case MADV_COLLAPSE:
		/* Nothing changes but that a huge leaf has become possible. */
		return "madvise(MADV_COLLAPSE)";
	default:
		return NULL;
	}
}

WRAP(int, madvise, (void *addr, size_t len, int advice))
{
	const char *cause;
	struct kl_bracket b;
	int r;

	if (KL_LIKELY(!kl_notifier_active()))
		return REAL(madvise)(addr, len, advice);
	cause = discards(advice);
	if (!cause)
		return REAL(madvise)(addr, len, advice);
	kl_bracket_begin(&b, addr, len, KL_EVENT_DISCARD, cause);
	r = REAL(madvise)(addr, len, advice);
	kl_bracket_end(&b);
	return r;
}

WRAP(int, posix_madvise, (void *addr, size_t len, int advice))
{
	/* glibc makes POSIX_MADV_DONTNEED a no-op; another libc may not. */
	struct kl_bracket b = {.state = KL_BRACKET_NONE};
	int r;

	if (advice == POSIX_MADV_DONTNEED)
		kl_bracket_begin(&b, addr, len, KL_EVENT_DISCARD, "posix_madvise");
	r = REAL(posix_madvise)(addr, len, advice);
	kl_bracket_end(&b);
	return r;
}

/*
 * Whose pidfd it is does not matter: an event for a range of ours that did not change costs a
 * few faults. Of more ranges than brackets, the last one is the hull of the rest.
 */
#define MAX_BRACKETS 8

struct span {
	uint64_t start, end;
};

/* The program's memory is read before the first bracket is open. */
static unsigned read_iovec(struct span *spans, const struct iovec *iov, size_t n)
{
	unsigned nr = 0;

	for (size_t i = 0; i < n && i < 1024; i++) {
		uint64_t base, len;
		struct kl_entry e;
		struct iovec v;
		int err;

		kl_pl_enter(&e);
		err = kl_guard_copy(&v, &iov[i], sizeof(v));
		kl_pl_leave(&e);
		if (err)
			break; /* EFAULT is the kernel's to say */
		base = addr_of(v.iov_base);
		len = v.iov_len;
		if (base + len < base || !len)
			continue;
		if (nr < MAX_BRACKETS) {
			spans[nr++] = (struct span){base, base + len};
		} else {
			struct span *last = &spans[MAX_BRACKETS - 1];

			last->start = kl_min(last->start, base);
			last->end = kl_max(last->end, base + len);
		}
	}
	return nr;
}

WRAP(ssize_t, process_madvise,
     (int pidfd, const struct iovec *iov, size_t n, int advice, unsigned flags))
{
	struct kl_bracket b[MAX_BRACKETS];
	struct span spans[MAX_BRACKETS];
	const char *cause = discards(advice);
	bool inside = false;
	unsigned nr;
	ssize_t r;

	if (!kl_notifier_active() || !cause)
		return REAL(process_madvise)(pidfd, iov, n, advice, flags);
	nr = read_iovec(spans, iov, n);
	for (unsigned i = 0; i < nr; i++) {
		kl_bracket_begin_more(&b[i], inside, (void *)(uintptr_t)spans[i].start,
				      spans[i].end - spans[i].start, KL_EVENT_DISCARD, cause);
		inside |= b[i].state == KL_BRACKET_OPEN;
	}
	kl_bracket_join(b, nr);
	r = REAL(process_madvise)(pidfd, iov, n, advice, flags);
	while (nr)
		kl_bracket_end(&b[--nr]);
	return r;
}

static int protect(void *addr, size_t len, int prot, int pkey)
{
	struct kl_bracket b;
	int r;

	kl_bracket_begin(&b, addr, len, KL_EVENT_PROTECT,
			 pkey == -1 ? "mprotect" : "pkey_mprotect");
	r = pkey == -1 ? REAL(mprotect)(addr, len, prot)
		       : REAL(pkey_mprotect)(addr, len, prot, pkey);
	kl_bracket_end(&b);
	return r;
}

WRAP(int, mprotect, (void *addr, size_t len, int prot))
{
	if (KL_LIKELY(!kl_notifier_active()))
		return REAL(mprotect)(addr, len, prot);
	return protect(addr, len, prot, -1);
}

WRAP(int, pkey_mprotect, (void *addr, size_t len, int prot, int pkey))
{
	if (KL_LIKELY(!kl_notifier_active()))
		return REAL(pkey_mprotect)(addr, len, prot, pkey);
	return protect(addr, len, prot, pkey);
}

/* ---- System V shared memory ------------------------------------------------------------ */

static uint64_t segment_size(int id)
{
	struct shmid_ds ds;

	return kl_sys(SYS_shmctl, id, IPC_STAT, &ds) < 0 ? 0 : (uint64_t)ds.shm_segsz;
}

WRAP(void *, shmat, (int id, const void *addr, int flags))
{
	struct kl_bracket b = {.state = KL_BRACKET_NONE};
	uint64_t at = addr_of(addr), len;
	void *p;

	if (unwatched())
		return REAL(shmat)(id, addr, flags);
	len = segment_size(id);
	if (flags & SHM_RND)
		at &= ~(uint64_t)(SHMLBA - 1);
	if (flags & SHM_REMAP)
		kl_bracket_begin(&b, (void *)(uintptr_t)at, len, KL_EVENT_REPLACE,
				 "shmat(SHM_REMAP)");
	p = REAL(shmat)(id, addr, flags);
	if (p != (void *)-1)
		forget(p, len);
	kl_bracket_end(&b);
	if (p != (void *)-1 && !(flags & SHM_REMAP))
		kl_bracket_after(p, len, KL_EVENT_REPLACE, "shmat");
	return p;
}

/*
 * How much goes is known to the kernel alone, and only for as long as it is attached: ask
 * where the mapping at @addr ends. A segment of which pieces were unmapped or protected is
 * several mappings of one file; detaching takes them all.
 */
WRAP(int, shmdt, (const void *addr))
{
	struct kl_bracket b;
	uint64_t len;
	bool was;
	int r;

	if (unwatched())
		return REAL(shmdt)(addr);
	len = kl_maps_segment(addr_of(addr));
	kl_bracket_begin(&b, addr, len, KL_EVENT_UNMAP, "shmdt");
	was = forget(addr, len);
	r = REAL(shmdt)(addr);
	if (r && was)
		remember(addr, len);
	kl_bracket_end(&b);
	return r;
}
