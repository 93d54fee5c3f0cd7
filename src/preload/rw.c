/* SPDX-License-Identifier: MIT */
/*
 * read(), write() and relatives on kvmlet's descriptors: refused as KVM's files refuse them;
 * statistics files are read (U4). write() to an eventfd that is an irqfd.
 */
#include <fcntl.h>
#include <unistd.h>

#include "preload/preload.h"

#define MAX_IOV 1024

enum io { IO_READ, IO_WRITE };

/* What the kind of file alone decides; 0: go on and read. */
static long refuse(struct kl_object *obj, int fd, enum io io, bool at, off_t off)
{
	bool stats = obj->kind == KL_OBJ_STATS;
	long fl;

	if (at && off < 0)
		return -EINVAL;
	if (at && (obj->kind == KL_OBJ_VM || obj->kind == KL_OBJ_VCPU || obj->kind == KL_OBJ_GMEM ||
		   (stats && io == IO_WRITE)))
		return -ESPIPE;
	if (stats)
		return io == IO_WRITE ? -EBADF : 0;
	fl = kl_sys(SYS_fcntl, fd, F_GETFL) & O_ACCMODE;
	if ((io == IO_WRITE && fl == O_RDONLY) || (io == IO_READ && fl == O_WRONLY))
		return -EBADF;
	return -EINVAL;
}

static ssize_t transfer(int fd, enum io io, void *buf, size_t n, bool at, off_t off)
{
	struct kl_object *obj;
	struct kl_entry e;
	long r = -EBADF;

	kl_pl_enter(&e);
	obj = kl_fd_get(fd);
	if (obj) {
		r = refuse(obj, fd, io, at, off);
		if (!r)
			r = kl_uapi_read(obj, buf, n, at ? &off : NULL);
		kl_fd_put(fd, obj);
	}
	kl_pl_leave(&e);
	return kl_ret(r);
}

static long gather(struct kl_object *obj, const struct iovec *iov, int n, bool at, off_t off)
{
	struct iovec v;
	long total = 0, r;

	if (n < 0 || n > MAX_IOV)
		return -EINVAL;
	for (int i = 0; i < n; i++) {
		r = kl_copy_from_user(&v, &iov[i], sizeof(v));
		if (!r && (ssize_t)v.iov_len < 0)
			r = -EINVAL;
		if (!r && v.iov_len)
			r = kl_uapi_read(obj, v.iov_base, v.iov_len, at ? &off : NULL);
		if (r < 0)
			return total ? total : r;
		total += r;
		off += r;
		if ((size_t)r < v.iov_len)
			break;
	}
	return total;
}

static ssize_t transfer_v(int fd, enum io io, const struct iovec *iov, int n, bool at, off_t off)
{
	struct kl_object *obj;
	struct kl_entry e;
	long r = -EBADF;

	kl_pl_enter(&e);
	obj = kl_fd_get(fd);
	if (obj) {
		r = refuse(obj, fd, io, at, off);
		if (!r)
			r = gather(obj, iov, n, at, off);
		kl_fd_put(fd, obj);
	}
	kl_pl_leave(&e);
	return kl_ret(r);
}

WRAP(ssize_t, read, (int fd, void *buf, size_t n))
{
	return kl_fd_known(fd) ? transfer(fd, IO_READ, buf, n, false, 0) : REAL(read)(fd, buf, n);
}
WRAP_ALIAS(ssize_t, __read, read, (int fd, void *buf, size_t n));

/* The program has signalled what may be an irqfd. */
static void irqfd_written(void)
{
	struct kl_entry e;

	if (kl_fd_shared_child())
		return;
	kl_pl_enter(&e);
	kl_irqfd_written();
	kl_pl_leave(&e);
}

WRAP(ssize_t, write, (int fd, const void *buf, size_t n))
{
	ssize_t r;

	if (kl_fd_known(fd))
		return transfer(fd, IO_WRITE, NULL, n, false, 0);
	r = REAL(write)(fd, buf, n);
	if (KL_UNLIKELY(r == sizeof(uint64_t) && kl_irqfd_may_be(fd)))
		irqfd_written();
	return r;
}
WRAP_ALIAS(ssize_t, __write, write, (int fd, const void *buf, size_t n));

WRAP(ssize_t, pread, (int fd, void *buf, size_t n, off_t off))
{
	return kl_fd_known(fd) ? transfer(fd, IO_READ, buf, n, true, off)
			       : REAL(pread)(fd, buf, n, off);
}
WRAP_ALIAS(ssize_t, pread64, pread, (int fd, void *buf, size_t n, off_t off));

WRAP(ssize_t, pwrite, (int fd, const void *buf, size_t n, off_t off))
{
	return kl_fd_known(fd) ? transfer(fd, IO_WRITE, NULL, n, true, off)
			       : REAL(pwrite)(fd, buf, n, off);
}
WRAP_ALIAS(ssize_t, pwrite64, pwrite, (int fd, const void *buf, size_t n, off_t off));

WRAP(ssize_t, __read_chk, (int fd, void *buf, size_t n, size_t size))
{
	return kl_fd_known(fd) && n <= size ? transfer(fd, IO_READ, buf, n, false, 0)
					    : REAL(__read_chk)(fd, buf, n, size);
}

WRAP(ssize_t, __pread_chk, (int fd, void *buf, size_t n, off_t off, size_t size))
{
	return kl_fd_known(fd) && n <= size ? transfer(fd, IO_READ, buf, n, true, off)
					    : REAL(__pread_chk)(fd, buf, n, off, size);
}
WRAP_ALIAS(ssize_t, __pread64_chk, __pread_chk,
	   (int fd, void *buf, size_t n, off_t off, size_t size));

WRAP(ssize_t, readv, (int fd, const struct iovec *iov, int n))
{
	return kl_fd_known(fd) ? transfer_v(fd, IO_READ, iov, n, false, 0)
			       : REAL(readv)(fd, iov, n);
}

WRAP(ssize_t, writev, (int fd, const struct iovec *iov, int n))
{
	return kl_fd_known(fd) ? transfer_v(fd, IO_WRITE, iov, n, false, 0)
			       : REAL(writev)(fd, iov, n);
}

WRAP(ssize_t, preadv, (int fd, const struct iovec *iov, int n, off_t off))
{
	return kl_fd_known(fd) ? transfer_v(fd, IO_READ, iov, n, true, off)
			       : REAL(preadv)(fd, iov, n, off);
}
WRAP_ALIAS(ssize_t, preadv64, preadv, (int fd, const struct iovec *iov, int n, off_t off));

WRAP(ssize_t, pwritev, (int fd, const struct iovec *iov, int n, off_t off))
{
	return kl_fd_known(fd) ? transfer_v(fd, IO_WRITE, iov, n, true, off)
			       : REAL(pwritev)(fd, iov, n, off);
}
WRAP_ALIAS(ssize_t, pwritev64, pwritev, (int fd, const struct iovec *iov, int n, off_t off));

/* Offset -1: the file position. */
WRAP(ssize_t, preadv2, (int fd, const struct iovec *iov, int n, off_t off, int flags))
{
	return kl_fd_known(fd) ? transfer_v(fd, IO_READ, iov, n, off != -1, off)
			       : REAL(preadv2)(fd, iov, n, off, flags);
}
WRAP_ALIAS(ssize_t, preadv64v2, preadv2,
	   (int fd, const struct iovec *iov, int n, off_t off, int flags));

WRAP(ssize_t, pwritev2, (int fd, const struct iovec *iov, int n, off_t off, int flags))
{
	return kl_fd_known(fd) ? transfer_v(fd, IO_WRITE, iov, n, off != -1, off)
			       : REAL(pwritev2)(fd, iov, n, off, flags);
}
WRAP_ALIAS(ssize_t, pwritev64v2, pwritev2,
	   (int fd, const struct iovec *iov, int n, off_t off, int flags));

/* Is @fd a file of @kind? */
static bool is_kind(int fd, enum kl_object_kind kind)
{
	struct kl_object *obj;
	bool yes = false;

	if (!kl_fd_known(fd))
		return false;
	kl_engine_enter();
	obj = kl_fd_get(fd);
	if (obj) {
		yes = obj->kind == kind;
		kl_fd_put(fd, obj);
	}
	kl_engine_leave();
	return yes;
}

WRAP(ssize_t, sendfile, (int out, int in, off_t *off, size_t n))
{
	if (kl_fd_known(in))
		return kl_ret(off && (is_kind(in, KL_OBJ_VM) || is_kind(in, KL_OBJ_VCPU) ||
				      is_kind(in, KL_OBJ_GMEM))
				      ? -ESPIPE
				      : -EINVAL);
	if (kl_fd_known(out))
		return kl_ret(is_kind(out, KL_OBJ_STATS) ? -EBADF : -EINVAL);
	return REAL(sendfile)(out, in, off, n);
}
WRAP_ALIAS(ssize_t, sendfile64, sendfile, (int out, int in, off_t *off, size_t n));

WRAP(ssize_t, splice, (int in, off_t *off_in, int out, off_t *off_out, size_t n, unsigned flags))
{
	if (n && kl_fd_known(in))
		return kl_ret(-EINVAL);
	if (n && kl_fd_known(out))
		return kl_ret(is_kind(out, KL_OBJ_STATS) ? -EBADF : -EINVAL);
	return REAL(splice)(in, off_in, out, off_out, n, flags);
}

static bool is_regular(int fd)
{
	struct stat st;

	return !kl_fd_known(fd) && !kl_sys(SYS_fstat, fd, &st) && S_ISREG(st.st_mode);
}

/* A guest_memfd is a regular file, on a file system of its own. */
static bool crosses_files(int in, int out)
{
	return (is_kind(in, KL_OBJ_GMEM) && is_regular(out)) ||
	       (is_kind(out, KL_OBJ_GMEM) && is_regular(in));
}

WRAP(ssize_t, copy_file_range,
     (int in, off_t *off_in, int out, off_t *off_out, size_t n, unsigned flags))
{
	if (kl_fd_known(in) || kl_fd_known(out))
		return kl_ret(crosses_files(in, out) ? -EXDEV : -EINVAL);
	return REAL(copy_file_range)(in, off_in, out, off_out, n, flags);
}

WRAP(off_t, lseek, (int fd, off_t off, int whence))
{
	struct kl_object *obj;
	struct kl_entry e;
	off_t r = -EBADF;

	if (KL_LIKELY(!kl_fd_known(fd)))
		return REAL(lseek)(fd, off, whence);
	if (whence < SEEK_SET || whence > SEEK_HOLE)
		return kl_ret(-EINVAL);
	kl_pl_enter(&e);
	obj = kl_fd_get(fd);
	if (obj) {
		r = kl_uapi_lseek(obj, off, whence);
		kl_fd_put(fd, obj);
	}
	kl_pl_leave(&e);
	return kl_ret(r);
}
WRAP_ALIAS(off_t, lseek64, lseek, (int fd, off_t off, int whence));

WRAP(int, fsync, (int fd))
{
	return kl_fd_known(fd) ? (int)kl_ret(-EINVAL) : REAL(fsync)(fd);
}

WRAP(int, fdatasync, (int fd))
{
	return kl_fd_known(fd) ? (int)kl_ret(-EINVAL) : REAL(fdatasync)(fd);
}
