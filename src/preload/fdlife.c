/* SPDX-License-Identifier: MIT */
/*
 * Descriptors: closed and duplicated (U4). The engine's own survive (base/hidden_fd.h).
 *
 * A child of vfork() has its own descriptors but our memory: it leaves the table alone.
 */
#include <fcntl.h>
#include <linux/close_range.h>

#include "base/hidden_fd.h"
#include "preload/preload.h"

#ifndef F_ADD_SEALS
#define F_ADD_SEALS 1033
#define F_GET_SEALS 1034
#endif

static int close_ours(int fd)
{
	struct kl_object *obj;
	struct kl_entry e;
	long r;

	if (kl_fd_shared_child())
		return REAL(close)(fd);
	kl_pl_enter(&e);
	obj = kl_fd_close_begin(fd);
	/* Not libc's close: it is a cancellation point. */
	r = kl_sys(SYS_close, fd);
	kl_fd_close_end(fd);
	if (obj)
		kl_object_put(obj);
	kl_pl_leave(&e);
	return (int)kl_ret(r);
}

WRAP(int, close, (int fd))
{
	int r;

	if (KL_UNLIKELY(kl_fd_known(fd)))
		r = close_ours(fd);
	else if (KL_UNLIKELY(kl_fd_hidden(fd)) && !kl_fd_shared_child())
		r = (int)kl_ret(-EBADF);
	else
		r = REAL(close)(fd);
	if (KL_UNLIKELY(atomic_load_explicit(&kl_scm_any, memory_order_relaxed)))
		kl_scm_reap();
	return r;
}
WRAP_ALIAS(int, __close, close, (int fd));

/* libc closes the descriptor without the wrapper. */
WRAP(int, fclose, (FILE * f))
{
	int fd = f ? fileno(f) : -1;
	struct kl_object *obj;
	struct kl_entry e;
	int r;

	if (KL_LIKELY(fd < 0 || !kl_fd_known(fd)) || kl_fd_shared_child())
		return REAL(fclose)(f);
	obj = kl_fd_close_begin(fd);
	r = REAL(fclose)(f);
	kl_pl_enter(&e);
	kl_fd_close_end(fd);
	if (obj)
		kl_object_put(obj);
	kl_pl_leave(&e);
	return r;
}

WRAP(int, close_range, (unsigned first, unsigned last, int flags))
{
	unsigned from = first;
	int fd, r;

	if (first > last || (flags & ~CLOSE_RANGE_UNSHARE) ||
	    !atomic_load_explicit(&kl_pl_opened, memory_order_relaxed) || kl_fd_shared_child())
		return REAL(close_range)(first, last, flags);
	for (fd = kl_fd_next(first, last); fd >= 0; fd = kl_fd_next((unsigned)fd + 1, last))
		close_ours(fd);
	do {
		fd = kl_fd_next_hidden(from);
		if (fd < 0 || (unsigned)fd > last)
			return REAL(close_range)(from, last, flags);
		r = (unsigned)fd > from ? REAL(close_range)(from, (unsigned)fd - 1, flags) : 0;
		if (r)
			return r;
		from = (unsigned)fd + 1;
	} while (from && from <= last);
	return 0;
}

/* libc's uses /proc where the kernel has no close_range(); such kernels are older than ours. */
WRAP(void, closefrom, (int low))
{
	wrap_close_range(low < 0 ? 0 : (unsigned)low, ~0u, 0);
}

/* @new is now what @old is. */
int kl_fd_duplicated(int old, int new)
{
	struct kl_object *obj, *was;
	_Atomic uint64_t *slot;
	struct kl_entry e;
	long r = new;

	if (new < 0 || new == old)
		return new;
	slot = kl_fd_slot(new);
	if (KL_LIKELY(!kl_fd_known(old)) && (!slot || !atomic_load(slot)))
		return new;
	if (kl_fd_shared_child())
		return new;
	kl_pl_enter(&e);
	obj = kl_fd_get(old);
	if (obj) {
		kl_object_get(obj);
		r = kl_fd_bind(new, obj);
		if (r) {
			kl_object_put(obj);
			kl_sys(SYS_close, new);
		} else {
			r = new;
		}
		kl_fd_put(old, obj);
	} else {
		was = kl_fd_unbind(new);
		if (was)
			kl_object_put(was);
	}
	kl_pl_leave(&e);
	return (int)kl_ret(r);
}

WRAP(int, dup, (int fd))
{
	return kl_fd_duplicated(fd, REAL(dup)(fd));
}

/* The number is in use by the engine, which keeps it. */
static bool taken(int old, int new)
{
	return KL_UNLIKELY(kl_fd_hidden(new)) && old != new && !kl_fd_shared_child();
}

WRAP(int, dup2, (int old, int new))
{
	if (taken(old, new))
		return (int)kl_ret(-EBUSY);
	return kl_fd_duplicated(old, REAL(dup2)(old, new));
}
WRAP_ALIAS(int, __dup2, dup2, (int old, int new));

WRAP(int, dup3, (int old, int new, int flags))
{
	if (taken(old, new))
		return (int)kl_ret(-EBUSY);
	return kl_fd_duplicated(old, REAL(dup3)(old, new, flags));
}

static bool read_only(int fd)
{
	return (kl_sys(SYS_fcntl, fd, F_GETFL) & O_ACCMODE) == O_RDONLY;
}

static int do_fcntl(int fd, int cmd, unsigned long arg)
{
	switch (cmd) {
	case F_DUPFD:
	case F_DUPFD_CLOEXEC:
		return kl_fd_duplicated(fd, REAL(fcntl)(fd, cmd, arg));
	case F_ADD_SEALS:
	case F_GET_SEALS:
		/* That there is a memfd is nobody's business. */
		if (kl_fd_known(fd))
			return (int)kl_ret(cmd == F_ADD_SEALS && read_only(fd) ? -EPERM : -EINVAL);
		return REAL(fcntl)(fd, cmd, arg);
	case F_SETFL:
		if (arg & O_DIRECT && kl_fd_known(fd))
			return (int)kl_ret(-EINVAL);
		/* fallthrough */
	default:
		return REAL(fcntl)(fd, cmd, arg);
	}
}

WRAP(int, fcntl, (int fd, int cmd, unsigned long arg))
{
	return do_fcntl(fd, cmd, arg);
}
WRAP_ALIAS(int, fcntl64, fcntl, (int fd, int cmd, unsigned long arg));
WRAP_ALIAS(int, __fcntl, fcntl, (int fd, int cmd, unsigned long arg));

/* A regular file cannot be polled by epoll, nor could KVM's: the kernel's EPERM is right. */
