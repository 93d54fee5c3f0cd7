/* SPDX-License-Identifier: MIT */
/*
 * Which paths are kvmlet's. Most are told apart by their text; what only the file system
 * knows (directories, symbolic links) is asked for when the last component is "kvm", when
 * the host has a /dev/kvm of its own, or when the kernel found nothing.
 */
#include <fcntl.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/sysmacros.h>

#include "preload/preload.h"

#define KVM_RDEV  makedev(10, 232)
#define MAX_LINKS 40

/*
 * Copy the program's string, whatever the pointer is. No handler of ours may be installed
 * yet, so the kernel is asked whether the page can be read: a futex's word is, before anything
 * else, and whatever it holds nobody waits.
 */
static bool readable(const char *p)
{
	static const struct timespec at_once;
	const void *word = (const void *)((uintptr_t)p & ~3ul);

	return kl_sys(SYS_futex, word, FUTEX_WAIT | FUTEX_PRIVATE_FLAG, 0, &at_once) != -EFAULT;
}

static long copy_string(const char *s, char *buf, size_t size)
{
	uintptr_t page = 0;

	for (size_t i = 0; i < size; i++) {
		if (((uintptr_t)(s + i) & KL_PAGE_MASK) != page) {
			page = (uintptr_t)(s + i) & KL_PAGE_MASK;
			if (!readable(s + i))
				return -EFAULT;
		}
		buf[i] = s[i];
		if (!buf[i])
			return (long)i;
	}
	return -ENAMETOOLONG;
}

/* In place: "//", "/./", "/x/../". True for what is left of an absolute path. */
static void normalize(char *p)
{
	char *out = p, *in = p;

	while (*in) {
		char *end;
		size_t n;

		while (*in == '/')
			in++;
		if (!*in)
			break;
		end = strchrnul(in, '/');
		n = (size_t)(end - in);
		if (n == 1 && in[0] == '.') {
			in = end;
			continue;
		}
		if (n == 2 && in[0] == '.' && in[1] == '.') {
			while (out > p && *--out != '/')
				;
			in = end;
			continue;
		}
		*out++ = '/';
		memmove(out, in, n);
		out += n;
		in = end;
	}
	if (out == p)
		*out++ = '/';
	*out = 0;
}

static bool same_dir_as_dev(int dirfd, const char *dir)
{
	struct stat a, b;

	if (kl_sys(SYS_newfstatat, dirfd, dir, &a, *dir ? 0 : AT_EMPTY_PATH) ||
	    kl_sys(SYS_newfstatat, AT_FDCWD, "/dev", &b, 0))
		return false;
	return a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

static bool digits(const char *s)
{
	size_t n = strspn(s, "0123456789");

	return n && !s[n];
}

/* /dev/fd/N, /proc/self/fd/N and the like: a second opening of a file that is open. */
static bool is_fd_path(const char *p)
{
	const char *last = strrchr(p, '/');

	if (!last || last - p < 3 || !digits(last + 1) || strncmp(last - 3, "/fd", 3))
		return false;
	return !strncmp(p, "/proc/", 6) || !strncmp(p, "/dev/fd/", 8);
}

enum kl_path_kind kl_path_classify(int dirfd, const char *path, char *buf, size_t size,
				   const char **rest)
{
	char *last;
	size_t n;

	if ((uintptr_t)path < KL_PAGE_SIZE || copy_string(path, buf, size) <= 0)
		return KL_PATH_OTHER;
	n = strlen(buf);
	if (buf[0] == '/') {
		/* The last component tells most paths apart before any work. */
		if (n >= 4 && !strcmp(buf + n - 4, "/kvm")) {
			last = buf + n - 4;
			*last = 0;
			if (same_dir_as_dev(AT_FDCWD, last == buf ? "/" : buf)) {
				return KL_PATH_KVM;
			}
			*last = '/';
			normalize(buf);
			if (!strcmp(buf, "/dev/kvm"))
				return KL_PATH_KVM;
		}
		if (is_fd_path(buf))
			return KL_PATH_FD;
		if (!strstr(buf, "/kvm"))
			return KL_PATH_OTHER;
		normalize(buf);
		if (!strncmp(buf, "/dev/kvm", 8) && (!buf[8] || buf[8] == '/'))
			return KL_PATH_IN_KVM;
		if (strncmp(buf, "/sys/module/kvm", 15))
			return KL_PATH_OTHER;
		if (buf[15] && buf[15] != '/' && buf[15] != '_')
			return KL_PATH_OTHER;
		*rest = buf + 12;
		return KL_PATH_SYSFS;
	}
	last = n >= 3 ? buf + n - 3 : NULL;
	if (!last || strcmp(last, "kvm") || (last > buf && last[-1] != '/'))
		return KL_PATH_OTHER;
	*last = 0;
	if (last == buf && dirfd == AT_FDCWD)
		return same_dir_as_dev(AT_FDCWD, ".") ? KL_PATH_KVM : KL_PATH_OTHER;
	return same_dir_as_dev(dirfd, buf) ? KL_PATH_KVM : KL_PATH_OTHER;
}

static bool host_has_kvm(void)
{
	static _Atomic int known; /* 0 unknown, 1 no, 2 yes */
	int k = atomic_load_explicit(&known, memory_order_relaxed);
	struct stat st;

	if (!k) {
		k = kl_sys(SYS_newfstatat, AT_FDCWD, "/dev/kvm", &st, 0) ? 1 : 2;
		atomic_store_explicit(&known, k, memory_order_relaxed);
	}
	return k == 2;
}

bool kl_path_opened_real_kvm(int fd)
{
	struct stat st;

	return host_has_kvm() && !kl_sys(SYS_fstat, fd, &st) && S_ISCHR(st.st_mode) &&
	       st.st_rdev == KVM_RDEV;
}

bool kl_path_dangles_to_kvm(int dirfd, const char *path)
{
	char cur[KL_PATH_BUF], link[KL_PATH_BUF];
	const char *rest;

	if (copy_string(path, cur, sizeof(cur)) <= 0)
		return false;
	for (int i = 0; i < MAX_LINKS; i++) {
		long n = kl_sys(SYS_readlinkat, dirfd, cur, link, sizeof(link) - 1);
		char *slash;
		size_t dir;

		if (n <= 0)
			return false;
		link[n] = 0;
		slash = strrchr(cur, '/');
		dir = link[0] != '/' && slash ? (size_t)(slash + 1 - cur) : 0;
		if (dir + (size_t)n >= sizeof(cur))
			return false;
		memcpy(cur + dir, link, (size_t)n + 1);
		if (kl_path_classify(dirfd, cur, link, sizeof(link), &rest) == KL_PATH_KVM)
			return true;
	}
	return false;
}
