/* SPDX-License-Identifier: MIT */
/*
 * access() and stat() of the paths that kvmlet presents, and fstat() of /dev/kvm: a program
 * that looks before it opens finds a character device that it may use.
 */
#include <fcntl.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <unistd.h>

#include "preload/preload.h"

#define KVM_MINOR  232
#define MISC_MAJOR 10

/* 1: ours, *mode says what it is; 0: not ours; -errno: ours, and it is not there. */
static int look(int dirfd, const char *path, unsigned *mode)
{
	char buf[KL_PATH_BUF];
	const char *rest;
	int r;

	switch (kl_path_classify(dirfd, path, buf, sizeof(buf), &rest)) {
	case KL_PATH_KVM:
		*mode = S_IFCHR | 0666;
		return 1;
	case KL_PATH_IN_KVM:
		return -ENOTDIR;
	case KL_PATH_SYSFS:
		r = kl_sysfs_mode(rest, mode);
		return r ? r : 1;
	default:
		return 0;
	}
}

static int check_access(unsigned mode, int want)
{
	if (want & ~(R_OK | W_OK | X_OK))
		return -EINVAL;
	if (S_ISDIR(mode))
		return want & W_OK ? -EACCES : 0;
	if (want & X_OK)
		return -EACCES;
	return (want & W_OK) && !(mode & 0222) ? -EACCES : 0;
}

static void fill(struct stat *st, unsigned mode)
{
	memset(st, 0, sizeof(*st));
	st->st_mode = mode;
	st->st_nlink = S_ISDIR(mode) ? 2 : 1;
	st->st_blksize = 4096;
	if (S_ISCHR(mode))
		st->st_rdev = makedev(MISC_MAJOR, KVM_MINOR);
	if (S_ISREG(mode))
		st->st_size = 4096;
}

static long own_pid(void)
{
	return kl_sys(SYS_getpid);
}

/* No handler of ours may be installed yet: the kernel copies. */
static int put(void *to, void *from, size_t size)
{
	struct iovec l = {from, size}, r = {to, size};
	long n = kl_sys(SYS_process_vm_writev, own_pid(), &l, 1, &r, 1, 0);

	if (n == -ENOSYS || n == -EPERM) {
		memcpy(to, from, size);
		return 0;
	}
	return n == (long)size ? 0 : -EFAULT;
}

/* 1: answered in @st; 0: ask the kernel; < 0: -errno. */
static int stat_path(int dirfd, const char *path, struct stat *st)
{
	unsigned mode;
	int r = look(dirfd, path, &mode);

	if (r > 0)
		fill(st, mode);
	return r;
}

static int stat_user(int dirfd, const char *path, struct stat *st)
{
	struct stat tmp;
	int r = stat_path(dirfd, path, &tmp);

	if (r > 0 && put(st, &tmp, sizeof(tmp)))
		return -EFAULT;
	return r;
}

/* After the kernel's fstat: the memfd that stands for /dev/kvm shows as the device. */
static void fix_fstat(int fd, struct stat *st)
{
	struct kl_object *obj = kl_fd_get(fd);

	if (!obj)
		return;
	st->st_mode = obj->kind == KL_OBJ_SYSTEM ? S_IFCHR | 0666
		      : obj->kind == KL_OBJ_GMEM ? S_IFREG | 0600
						 : 0600;
	st->st_rdev = obj->kind == KL_OBJ_SYSTEM ? makedev(MISC_MAJOR, KVM_MINOR) : 0;
	if (obj->kind == KL_OBJ_GMEM)
		st->st_blksize = KL_PAGE_SIZE;
	else
		st->st_size = 0;
	st->st_blocks = 0;
	kl_engine_enter();
	kl_fd_put(fd, obj);
	kl_engine_leave();
}

WRAP(int, access, (const char *path, int want))
{
	unsigned mode;
	int r = look(AT_FDCWD, path, &mode);

	if (!r)
		return REAL(access)(path, want);
	return (int)kl_ret(r < 0 ? r : check_access(mode, want));
}

WRAP(int, eaccess, (const char *path, int want))
{
	unsigned mode;
	int r = look(AT_FDCWD, path, &mode);

	if (!r)
		return REAL(eaccess)(path, want);
	return (int)kl_ret(r < 0 ? r : check_access(mode, want));
}
WRAP_ALIAS(int, euidaccess, eaccess, (const char *path, int want));

WRAP(int, faccessat, (int dirfd, const char *path, int want, int flags))
{
	unsigned mode;
	int r = look(dirfd, path, &mode);

	if (!r)
		return REAL(faccessat)(dirfd, path, want, flags);
	return (int)kl_ret(r < 0 ? r : check_access(mode, want));
}

#define STAT_BODY(dirfd, path, st, call)                           \
	do {                                                       \
		int r_ = stat_user(dirfd, path, st);               \
		return r_ ? (int)kl_ret(r_ < 0 ? r_ : 0) : (call); \
	} while (0)

WRAP(int, stat, (const char *path, struct stat *st))
{
	STAT_BODY(AT_FDCWD, path, st, REAL(stat)(path, st));
}
WRAP_ALIAS(int, stat64, stat, (const char *path, struct stat *st));

WRAP(int, lstat, (const char *path, struct stat *st))
{
	STAT_BODY(AT_FDCWD, path, st, REAL(lstat)(path, st));
}
WRAP_ALIAS(int, lstat64, lstat, (const char *path, struct stat *st));

static int fstat_checked(int fd, struct stat *st, int r)
{
	if (!r && kl_fd_known(fd))
		fix_fstat(fd, st);
	return r;
}

WRAP(int, fstatat, (int dirfd, const char *path, struct stat *st, int flags))
{
	int r = stat_user(dirfd, path, st);

	if (r)
		return (int)kl_ret(r < 0 ? r : 0);
	r = REAL(fstatat)(dirfd, path, st, flags);
	return (flags & AT_EMPTY_PATH) && kl_fd_known(dirfd) && !*path ? fstat_checked(dirfd, st, r)
								       : r;
}
WRAP_ALIAS(int, fstatat64, fstatat, (int dirfd, const char *path, struct stat *st, int flags));

WRAP(int, fstat, (int fd, struct stat *st))
{
	return fstat_checked(fd, st, REAL(fstat)(fd, st));
}
WRAP_ALIAS(int, fstat64, fstat, (int fd, struct stat *st));

/* Programs linked before glibc 2.33. */
WRAP(int, __xstat, (int ver, const char *path, struct stat *st))
{
	STAT_BODY(AT_FDCWD, path, st, REAL(__xstat)(ver, path, st));
}
WRAP_ALIAS(int, __xstat64, __xstat, (int ver, const char *path, struct stat *st));

WRAP(int, __lxstat, (int ver, const char *path, struct stat *st))
{
	STAT_BODY(AT_FDCWD, path, st, REAL(__lxstat)(ver, path, st));
}
WRAP_ALIAS(int, __lxstat64, __lxstat, (int ver, const char *path, struct stat *st));

WRAP(int, __fxstat, (int ver, int fd, struct stat *st))
{
	return fstat_checked(fd, st, REAL(__fxstat)(ver, fd, st));
}
WRAP_ALIAS(int, __fxstat64, __fxstat, (int ver, int fd, struct stat *st));

WRAP(int, __fxstatat, (int ver, int dirfd, const char *path, struct stat *st, int flags))
{
	STAT_BODY(dirfd, path, st, REAL(__fxstatat)(ver, dirfd, path, st, flags));
}
WRAP_ALIAS(int, __fxstatat64, __fxstatat,
	   (int ver, int dirfd, const char *path, struct stat *st, int flags));

WRAP(int, statx, (int dirfd, const char *path, int flags, unsigned mask, struct statx *ustx))
{
	struct statx stx;
	struct stat st;
	int r = stat_path(dirfd, path, &st);

	if (r <= 0)
		return r ? (int)kl_ret(r) : REAL(statx)(dirfd, path, flags, mask, ustx);
	memset(&stx, 0, sizeof(stx));
	stx.stx_mask = STATX_BASIC_STATS;
	stx.stx_mode = (uint16_t)st.st_mode;
	stx.stx_nlink = (uint32_t)st.st_nlink;
	stx.stx_blksize = 4096;
	stx.stx_size = (uint64_t)st.st_size;
	stx.stx_rdev_major = major(st.st_rdev);
	stx.stx_rdev_minor = minor(st.st_rdev);
	return (int)kl_ret(put(ustx, &stx, sizeof(stx)));
}
