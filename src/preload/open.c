/* SPDX-License-Identifier: MIT */
/*
 * open() in every spelling: /dev/kvm becomes kvmlet's, /sys/module/kvm* its parameters (U4).
 * A real /dev/kvm is never handed out: where the kernel opened one, whatever it is called, it
 * is closed again.
 */
#include <fcntl.h>
#include <stdarg.h>
#include <string.h>

#include "preload/preload.h"
#include "preload/wrapped.h"

WRAPPED(int, close, (int));

int kl_open_kvm(int flags)
{
	struct kl_object *obj = NULL;
	struct kl_entry e;
	int fd, r;

	/* O_PATH of a device is a name, and no ioctl works on it. */
	if (flags & O_PATH)
		return (int)kl_sys(SYS_openat, AT_FDCWD, "/dev/null", flags);
	kl_pl_take_over();
	kl_pl_enter(&e);
	fd = kl_uapi_open_system(flags, &obj);
	if (fd >= 0) {
		r = kl_fd_bind(fd, obj);
		if (r) {
			kl_object_put(obj);
			kl_sys(SYS_close, fd);
			fd = r;
		}
	}
	kl_pl_leave(&e);
	return fd;
}

/* A second opening, by /proc/self/fd/N, of a descriptor of ours: as the kernel does for KVM's. */
static int reopened(int fd, int flags)
{
	struct kl_object *obj;
	struct stat st;
	bool system;

	if (!atomic_load_explicit(&kl_pl_opened, memory_order_relaxed) || (flags & O_PATH) ||
	    kl_sys(SYS_fstat, fd, &st))
		return fd;
	kl_engine_enter();
	obj = kl_object_find(st.st_dev, st.st_ino);
	system = obj && obj->kind == KL_OBJ_SYSTEM;
	if (obj)
		kl_object_put(obj);
	kl_engine_leave();
	if (!obj)
		return fd;
	kl_sys(SYS_close, fd);
	/* An anonymous inode cannot be opened. */
	return (int)kl_ret(system ? kl_open_kvm(flags) : -ENXIO);
}

static int finish(int dirfd, const char *path, int flags, int fd)
{
	if (fd >= 0) {
		if (!kl_path_opened_real_kvm(fd) || (flags & O_PATH))
			return fd;
		kl_sys(SYS_close, fd);
		return (int)kl_ret(kl_open_kvm(flags));
	}
	if (errno != ENOENT || (flags & O_NOFOLLOW))
		return fd;
	if (kl_path_dangles_to_kvm(dirfd, path))
		return (int)kl_ret(kl_open_kvm(flags));
	errno = ENOENT;
	return -1;
}

int kl_pl_openat(int dirfd, const char *path, int flags, unsigned mode)
{
	char buf[KL_PATH_BUF];
	const char *rest;

	switch (kl_path_classify(dirfd, path, buf, sizeof(buf), &rest)) {
	case KL_PATH_KVM:
		return (int)kl_ret(kl_open_kvm(flags));
	case KL_PATH_IN_KVM:
		return (int)kl_ret(-ENOTDIR);
	case KL_PATH_SYSFS:
		return (int)kl_ret(kl_sysfs_open(rest, flags));
	case KL_PATH_FD: {
		int fd;

		kl_truncate_early(dirfd, path, flags);
		fd = REAL(openat)(dirfd, path, flags, mode);
		return fd < 0 ? fd : reopened(fd, flags);
	}
	default:
		kl_truncate_early(dirfd, path, flags);
		return finish(dirfd, path, flags, REAL(openat)(dirfd, path, flags, mode));
	}
}

/* The optional mode is a register, whether it was passed or not. */
#define OPEN_MODE(flags)                                 \
	({                                               \
		unsigned mode_ = 0;                      \
		if ((flags) & (O_CREAT | __O_TMPFILE)) { \
			va_list ap_;                     \
			va_start(ap_, flags);            \
			mode_ = va_arg(ap_, unsigned);   \
			va_end(ap_);                     \
		}                                        \
		mode_;                                   \
	})

WRAP(int, open, (const char *path, int flags, ...))
{
	return kl_pl_openat(AT_FDCWD, path, flags, OPEN_MODE(flags));
}
WRAP_ALIAS(int, open64, open, (const char *path, int flags, ...));
WRAP_ALIAS(int, __open, open, (const char *path, int flags, ...));
WRAP_ALIAS(int, __open64, open, (const char *path, int flags, ...));

WRAP(int, openat, (int dirfd, const char *path, int flags, ...))
{
	return kl_pl_openat(dirfd, path, flags, OPEN_MODE(flags));
}
WRAP_ALIAS(int, openat64, openat, (int dirfd, const char *path, int flags, ...));

/* _FORTIFY_SOURCE's: no mode, so no file to create. */
WRAP(int, __open_2, (const char *path, int flags))
{
	return kl_pl_openat(AT_FDCWD, path, flags, 0);
}
WRAP_ALIAS(int, __open64_2, __open_2, (const char *path, int flags));

WRAP(int, __openat_2, (int dirfd, const char *path, int flags))
{
	return kl_pl_openat(dirfd, path, flags, 0);
}
WRAP_ALIAS(int, __openat64_2, __openat_2, (int dirfd, const char *path, int flags));

WRAP(int, creat, (const char *path, unsigned mode))
{
	return kl_pl_openat(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}
WRAP_ALIAS(int, creat64, creat, (const char *path, unsigned mode));

static int stdio_flags(const char *mode)
{
	int flags = strchr(mode, '+') ? O_RDWR : mode[0] == 'r' ? O_RDONLY : O_WRONLY;

	if (mode[0] == 'w')
		flags |= O_CREAT | O_TRUNC;
	if (mode[0] == 'a')
		flags |= O_CREAT | O_APPEND;
	if (strchr(mode, 'x'))
		flags |= O_EXCL;
	return strchr(mode, 'e') ? flags | O_CLOEXEC : flags;
}

/* libc's own fopen() opens without the wrappers. */
WRAP(FILE *, fopen, (const char *path, const char *mode))
{
	char buf[KL_PATH_BUF];
	const char *rest;
	FILE *f;
	int fd, saved;

	switch (kl_path_classify(AT_FDCWD, path, buf, sizeof(buf), &rest)) {
	case KL_PATH_KVM:
		fd = kl_open_kvm(stdio_flags(mode));
		break;
	case KL_PATH_IN_KVM:
		fd = -ENOTDIR;
		break;
	case KL_PATH_SYSFS:
		fd = kl_sysfs_open(rest, stdio_flags(mode));
		break;
	default:
		kl_truncate_early(AT_FDCWD, path, stdio_flags(mode));
		return REAL(fopen)(path, mode);
	}
	if (fd < 0) {
		errno = -fd;
		return NULL;
	}
	f = fdopen(fd, mode);
	if (!f) {
		saved = errno;
		wrap_close(fd);
		errno = saved;
	}
	return f;
}
WRAP_ALIAS(FILE *, fopen64, fopen, (const char *path, const char *mode));

/* libc replaces what is behind the stream's descriptor, which keeps its number. */
static FILE *reopen(const char *path, const char *mode, FILE *f)
{
	int fd = fileno(f);
	struct kl_object *obj;
	struct kl_entry e;
	FILE *r;

	if (KL_LIKELY(fd < 0 || !kl_fd_known(fd)) || kl_fd_shared_child())
		return REAL(freopen)(path, mode, f);
	obj = kl_fd_close_begin(fd);
	r = REAL(freopen)(path, mode, f);
	kl_pl_enter(&e);
	kl_fd_close_end(fd);
	if (obj)
		kl_object_put(obj);
	kl_pl_leave(&e);
	return r;
}

WRAP(FILE *, freopen, (const char *path, const char *mode, FILE *f))
{
	char buf[KL_PATH_BUF], by_fd[32];
	const char *rest;
	int fd, saved;
	FILE *r;

	switch (path ? kl_path_classify(AT_FDCWD, path, buf, sizeof(buf), &rest) : KL_PATH_OTHER) {
	case KL_PATH_KVM:
		fd = kl_open_kvm(stdio_flags(mode));
		break;
	case KL_PATH_SYSFS:
		fd = kl_sysfs_open(rest, stdio_flags(mode));
		break;
	default:
		if (path)
			kl_truncate_early(AT_FDCWD, path, stdio_flags(mode));
		return reopen(path, mode, f);
	}
	/* What failed closes the stream all the same. */
	snprintf(by_fd, sizeof(by_fd), "/proc/self/fd/%d", fd);
	r = reopen(by_fd, mode, f);
	saved = fd < 0 ? -fd : errno;
	if (fd >= 0) {
		if (r)
			kl_fd_duplicated(fd, fileno(r));
		wrap_close(fd);
	}
	errno = saved;
	return r;
}
WRAP_ALIAS(FILE *, freopen64, freopen, (const char *path, const char *mode, FILE *f));
