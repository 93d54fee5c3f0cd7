/* SPDX-License-Identifier: MIT */
/*
 * Holes and truncation of files that the program has mapped (N1), and of kvmlet's own
 * descriptors. A bracketed call is made without libc: fallocate() is a cancellation point, and
 * a thread must not be unwound out of a bracket.
 */
#include <fcntl.h>
#include <linux/falloc.h>

#include "preload/preload.h"

static bool changes_pages(int mode)
{
	return mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_COLLAPSE_RANGE | FALLOC_FL_ZERO_RANGE |
		       FALLOC_FL_INSERT_RANGE);
}

/* Of kvmlet's own, statistics files are not open for writing. */
static int refuse(int fd, off_t off, off_t len)
{
	struct kl_object *obj;
	int r = -ENODEV;

	if (off < 0 || len <= 0)
		return -EINVAL;
	kl_engine_enter();
	obj = kl_fd_get(fd);
	if (obj) {
		r = obj->kind == KL_OBJ_STATS ? -EBADF : -ENODEV;
		kl_fd_put(fd, obj);
	}
	kl_engine_leave();
	return r;
}

static void begin(struct kl_bracket *b, int fd, uint64_t off, uint64_t len,
		  enum kl_notifier_event ev)
{
	uint64_t start, end;

	b->on = false;
	if (kl_notifier_active() && kl_maps_of_file(fd, off, len, &start, &end))
		kl_bracket_begin(b, (void *)(uintptr_t)start, end - start, ev);
}

WRAP(int, fallocate, (int fd, int mode, off_t off, off_t len))
{
	struct kl_bracket b;
	long r;

	if (kl_fd_known(fd))
		return (int)kl_ret(refuse(fd, off, len));
	if (!kl_notifier_active() || !changes_pages(mode))
		return REAL(fallocate)(fd, mode, off, len);
	/* Shifted ranges change everything behind them too. */
	begin(&b, fd, (uint64_t)off,
	      mode & (FALLOC_FL_COLLAPSE_RANGE | FALLOC_FL_INSERT_RANGE) ? 0 : (uint64_t)len,
	      KL_EVENT_TRUNCATE);
	r = kl_sys(SYS_fallocate, fd, mode, off, len);
	kl_bracket_end(&b);
	return (int)kl_ret(r);
}
WRAP_ALIAS(int, fallocate64, fallocate, (int fd, int mode, off_t off, off_t len));

WRAP(int, posix_fallocate, (int fd, off_t off, off_t len))
{
	return kl_fd_known(fd) ? -refuse(fd, off, len) : REAL(posix_fallocate)(fd, off, len);
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
	begin(&b, fd, (uint64_t)len, 0, KL_EVENT_TRUNCATE);
	r = kl_sys(SYS_ftruncate, fd, len);
	kl_bracket_end(&b);
	return (int)kl_ret(r);
}
WRAP_ALIAS(int, ftruncate64, ftruncate, (int fd, off_t len));

WRAP(int, truncate, (const char *path, off_t len))
{
	struct kl_bracket b = {.on = false};
	long r, fd;

	if (!kl_notifier_active() || len < 0)
		return REAL(truncate)(path, len);
	fd = kl_sys(SYS_openat, AT_FDCWD, path, O_PATH | O_CLOEXEC);
	if (fd >= 0) {
		begin(&b, (int)fd, (uint64_t)len, 0, KL_EVENT_TRUNCATE);
		kl_sys(SYS_close, fd);
	}
	r = kl_sys(SYS_truncate, path, len);
	kl_bracket_end(&b);
	return (int)kl_ret(r);
}
WRAP_ALIAS(int, truncate64, truncate, (const char *path, off_t len));
