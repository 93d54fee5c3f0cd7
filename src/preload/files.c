/* SPDX-License-Identifier: MIT */
/*
 * Holes and truncation of files that the program has mapped (N1), and of kvmlet's own
 * descriptors. A bracketed call is made without libc: fallocate() is a cancellation point, and
 * a thread must not be unwound out of a bracket.
 */
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdio.h>
#include <string.h>

#include "preload/preload.h"

#ifndef FALLOC_FL_WRITE_ZEROES
#define FALLOC_FL_WRITE_ZEROES 0x80
#endif

/* NULL: it fills holes at most. */
static const char *changes_pages(int mode)
{
	if (mode & FALLOC_FL_PUNCH_HOLE)
		return "fallocate(FALLOC_FL_PUNCH_HOLE)";
	if (mode & FALLOC_FL_COLLAPSE_RANGE)
		return "fallocate(FALLOC_FL_COLLAPSE_RANGE)";
	if (mode & FALLOC_FL_INSERT_RANGE)
		return "fallocate(FALLOC_FL_INSERT_RANGE)";
	if (mode & (FALLOC_FL_ZERO_RANGE | FALLOC_FL_WRITE_ZEROES))
		return "fallocate(FALLOC_FL_ZERO_RANGE)";
	return NULL;
}

static void begin_file(struct kl_bracket *b, const struct stat *st, uint64_t off, uint64_t len,
		       const char *cause)
{
	uint64_t start, end;

	if (kl_maps_of_file(st->st_ino, off, len, &start, &end))
		kl_bracket_begin(b, (void *)(uintptr_t)start, end - start, KL_EVENT_TRUNCATE,
				 cause);
}

static void begin(struct kl_bracket *b, int fd, uint64_t off, uint64_t len, const char *cause)
{
	struct stat st;

	b->state = KL_BRACKET_NONE;
	if (!kl_sys(SYS_fstat, fd, &st))
		begin_file(b, &st, off, len, cause);
}

/* The program may have mapped what is about to go, and put a slot over that. Inside the engine. */
static void begin_own(struct kl_bracket *b, int fd, off_t off, off_t len, const char *cause)
{
	uint64_t start, end;
	struct stat st;

	if (off >= 0 && len > 0 && kl_notifier_active() && !kl_sys(SYS_fstat, fd, &st) &&
	    kl_maps_of_file(st.st_ino, (uint64_t)off, (uint64_t)len, &start, &end))
		kl_bracket_open_inside(b, start, end - start, KL_EVENT_TRUNCATE, cause);
}

/* Of kvmlet's own. */
static long own_fallocate(int fd, int mode, off_t off, off_t len)
{
	struct kl_bracket b = {.state = KL_BRACKET_NONE};
	const char *cause = changes_pages(mode);
	struct kl_object *obj;
	struct kl_entry e;
	long r = -EBADF;

	kl_pl_enter(&e);
	obj = kl_fd_get(fd);
	if (obj) {
		if (KL_UNLIKELY(cause && kl_uapi_maps_memory(obj)))
			begin_own(&b, fd, off, len, cause);
		r = kl_uapi_fallocate(obj, mode, off, len);
		kl_bracket_end(&b);
		kl_fd_put(fd, obj);
	}
	kl_pl_leave(&e);
	return r;
}

/* libc goes on with reading and writing where the file system cannot allocate. */
static int own_posix_fallocate(int fd, off_t off, off_t len)
{
	long r = own_fallocate(fd, 0, off, len);

	return r == -EOPNOTSUPP ? ESPIPE : (int)-r;
}

WRAP(int, fallocate, (int fd, int mode, off_t off, off_t len))
{
	const char *cause = changes_pages(mode);
	struct kl_bracket b;
	long r;

	if (kl_fd_known(fd))
		return (int)kl_ret(own_fallocate(fd, mode, off, len));
	if (!kl_notifier_active() || !cause)
		return REAL(fallocate)(fd, mode, off, len);
	/* Shifted ranges change everything behind them too. */
	begin(&b, fd, (uint64_t)off,
	      mode & (FALLOC_FL_COLLAPSE_RANGE | FALLOC_FL_INSERT_RANGE) ? 0 : (uint64_t)len,
	      cause);
	r = kl_sys(SYS_fallocate, fd, mode, off, len);
	kl_bracket_end(&b);
	return (int)kl_ret(r);
}
WRAP_ALIAS(int, fallocate64, fallocate, (int fd, int mode, off_t off, off_t len));

WRAP(int, posix_fallocate, (int fd, off_t off, off_t len))
{
	return kl_fd_known(fd) ? own_posix_fallocate(fd, off, len)
			       : REAL(posix_fallocate)(fd, off, len);
}
WRAP_ALIAS(int, posix_fallocate64, posix_fallocate, (int fd, off_t off, off_t len));

WRAP(int, ftruncate, (int fd, off_t len))
{
	struct kl_bracket b;
	long r;

	if (kl_fd_known(fd))
		return (int)kl_ret(-EINVAL);
	if (!kl_notifier_active() || len < 0)
		return REAL(ftruncate)(fd, len);
	begin(&b, fd, (uint64_t)len, 0, "ftruncate");
	r = kl_sys(SYS_ftruncate, fd, len);
	kl_bracket_end(&b);
	return (int)kl_ret(r);
}
WRAP_ALIAS(int, ftruncate64, ftruncate, (int fd, off_t len));

#define BY_FD_SIZE 32

/* The file behind @fd by name: the program's own string is not read inside a bracket. */
static const char *by_fd(char *buf, long fd, const char *path)
{
	snprintf(buf, BY_FD_SIZE, "/proc/self/fd/%d", (int)fd);
	return kl_sys(SYS_access, buf, 0) ? path : buf;
}

WRAP(int, truncate, (const char *path, off_t len))
{
	char buf[BY_FD_SIZE];
	struct kl_bracket b;
	long r, fd;

	if (!kl_notifier_active() || len < 0)
		return REAL(truncate)(path, len);
	fd = kl_sys(SYS_openat, AT_FDCWD, path, O_PATH | O_CLOEXEC);
	if (fd < 0)
		return REAL(truncate)(path, len);
	path = by_fd(buf, fd, path);
	begin(&b, (int)fd, (uint64_t)len, 0, "truncate");
	r = kl_sys(SYS_truncate, path, len);
	kl_bracket_end(&b);
	kl_sys(SYS_close, fd);
	return (int)kl_ret(r);
}
WRAP_ALIAS(int, truncate64, truncate, (const char *path, off_t len));

/*
 * What the kernel checks before it truncates is asked by opening the file without O_TRUNC. The
 * real open then truncates an empty file; on failure everything is left to it.
 */
void kl_truncate_early(int dirfd, const char *path, int flags)
{
	struct kl_bracket b = {.state = KL_BRACKET_NONE};
	int saved = errno;
	struct stat st;
	long fd;

	if (!(flags & O_TRUNC) || (flags & O_PATH) || !kl_notifier_active())
		return;
	/* Not of devices and pipes, where it does something else. */
	if (kl_sys(SYS_newfstatat, dirfd, path, &st,
		   flags & O_NOFOLLOW ? AT_SYMLINK_NOFOLLOW : 0) ||
	    !S_ISREG(st.st_mode) || !st.st_size ||
	    (flags & (O_CREAT | O_EXCL)) == (O_CREAT | O_EXCL))
		goto out;
	begin_file(&b, &st, 0, 0, "open(O_TRUNC)");
	if (b.state == KL_BRACKET_NONE)
		goto out;
	/* It is mapped. The open itself may wait, for a lease. */
	kl_bracket_end(&b);
	flags &= ~(O_TRUNC | O_CREAT | O_APPEND);
	if ((flags & O_ACCMODE) == O_RDONLY)
		flags |= O_RDWR; /* truncating is writing */
	fd = kl_sys(SYS_openat, dirfd, path, flags | O_CLOEXEC | O_NONBLOCK);
	if (fd < 0)
		goto out;
	begin(&b, (int)fd, 0, 0, "open(O_TRUNC)");
	kl_sys(SYS_ftruncate, fd, 0);
	kl_bracket_end(&b);
	kl_sys(SYS_close, fd);
out:
	errno = saved;
}

/* libc opens /dev/shm/NAME without the wrappers. */
WRAP(int, shm_open, (const char *name, int flags, mode_t mode))
{
	char path[KL_PATH_BUF];

	if ((flags & O_TRUNC) && kl_notifier_active() && name) {
		while (*name == '/')
			name++;
		if (snprintf(path, sizeof(path), "/dev/shm/%s", name) < (int)sizeof(path))
			kl_truncate_early(AT_FDCWD, path, flags | O_NOFOLLOW);
	}
	return REAL(shm_open)(name, flags, mode);
}
