/* SPDX-License-Identifier: MIT */
/* Every spelling of opening /dev/kvm, and of paths that are not it (U4). */
#include <linux/openat2.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>

#include "t.h"

int __open_2(const char *, int);
int __open64_2(const char *, int);
int __openat_2(int, const char *, int);
int __openat64_2(int, const char *, int);

static void is_kvm(const char *how, int fd)
{
	struct stat st;
	int cloexec;

	if (!CHECK(fd >= 0)) {
		fprintf(stderr, "  %s\n", how);
		return;
	}
	CHECK(ioctl(fd, KVM_GET_API_VERSION, 0) == 12);
	CHECK(!fstat(fd, &st) && S_ISCHR(st.st_mode) && st.st_rdev == makedev(10, 232));
	cloexec = fcntl(fd, F_GETFD);
	CHECK(cloexec == 0 || cloexec == FD_CLOEXEC);
	CHECK(!close(fd));
	FAILS(ioctl(fd, KVM_GET_API_VERSION, 0), EBADF);
}
#define IS_KVM(call) is_kvm(#call, call)

static void spellings(void)
{
	int dev = open("/dev", O_PATH | O_DIRECTORY);
	int root = open("/", O_RDONLY | O_DIRECTORY);
	struct open_how how = {.flags = O_RDWR};
	FILE *f;

	NEED(dev >= 0 && root >= 0);
	IS_KVM(open("/dev/kvm", O_RDWR));
	IS_KVM(open64("/dev/kvm", O_RDWR));
	IS_KVM(openat(AT_FDCWD, "/dev/kvm", O_RDWR));
	IS_KVM(openat64(AT_FDCWD, "/dev/kvm", O_RDWR));
	IS_KVM(openat(-1, "/dev/kvm", O_RDWR));
	IS_KVM(openat(dev, "kvm", O_RDWR));
	IS_KVM(openat(dev, "./kvm", O_RDWR));
	IS_KVM(openat(dev, "../dev/kvm", O_RDWR));
	IS_KVM(openat64(root, "dev/kvm", O_RDWR));
	IS_KVM(__open_2("/dev/kvm", O_RDWR));
	IS_KVM(__open64_2("/dev/kvm", O_RDWR));
	IS_KVM(__openat_2(AT_FDCWD, "/dev/kvm", O_RDWR));
	IS_KVM(__openat64_2(dev, "kvm", O_RDWR));
	IS_KVM((int)syscall(SYS_open, "/dev/kvm", O_RDWR));
	IS_KVM((int)syscall(SYS_openat, AT_FDCWD, "/dev/kvm", O_RDWR));
	IS_KVM((int)syscall(SYS_openat, dev, "kvm", O_RDWR));
	IS_KVM((int)syscall(SYS_openat2, AT_FDCWD, "/dev/kvm", &how, sizeof(how)));
	IS_KVM(open("//dev/kvm", O_RDWR));
	IS_KVM(open("/dev//kvm", O_RDWR));
	IS_KVM(open("/dev/./kvm", O_RDWR));
	IS_KVM(open("/dev/../dev/kvm", O_RDWR));
	IS_KVM(open("/proc/../dev/kvm", O_RDWR));
	IS_KVM(open("/proc/self/root/dev/kvm", O_RDWR));
	IS_KVM(open("/dev/kvm", O_RDONLY));
	IS_KVM(open("/dev/kvm", O_WRONLY));
	IS_KVM(open("/dev/kvm", O_RDWR | O_CLOEXEC | O_NONBLOCK | O_NOCTTY | O_NOFOLLOW));
	IS_KVM(open("/dev/kvm", O_RDWR | O_CREAT, 0600));
	IS_KVM(open("/dev/kvm", O_RDWR | O_TRUNC));
	IS_KVM(creat("/dev/kvm", 0600));
	f = fopen("/dev/kvm", "r+");
	if (CHECK(f)) {
		int fd = fileno(f);

		CHECK(ioctl(fd, KVM_GET_API_VERSION, 0) == 12);
		CHECK(!fclose(f));
		FAILS(ioctl(fd, KVM_GET_API_VERSION, 0), EBADF);
	}
	CHECK(!chdir("/dev"));
	IS_KVM(open("kvm", O_RDWR));
	IS_KVM(open("./kvm", O_RDWR));
	CHECK(!chdir("/"));
	IS_KVM(open("dev/kvm", O_RDWR));
	close(dev);
	close(root);
}

static void links(void)
{
	char dir[] = "/tmp/kvm-open-XXXXXX", a[64], b[64], c[64];

	NEED(mkdtemp(dir));
	snprintf(a, sizeof(a), "%s/a", dir);
	snprintf(b, sizeof(b), "%s/kvm", dir);
	snprintf(c, sizeof(c), "%s/d", dir);
	CHECK(!symlink("/dev/kvm", a) && !symlink("a", b) && !symlink("/dev", c));
	IS_KVM(open(a, O_RDWR));
	IS_KVM(open(b, O_RDWR));
	strcat(c, "/kvm");
	IS_KVM(open(c, O_RDWR));
	FAILS(open(a, O_RDWR | O_NOFOLLOW), ELOOP);
	/* A file that only has the name. */
	unlink(b);
	close(open(b, O_RDWR | O_CREAT, 0600));
	FAILS(ioctl(open(b, O_RDWR), KVM_GET_API_VERSION, 0), ENOTTY);
	unlink(a);
	unlink(b);
	c[strlen(c) - 4] = 0;
	unlink(c);
	rmdir(dir);
}

static void refusals(void)
{
	char path[64];
	int fd = open("/dev/kvm", O_RDWR), again, vm;

	FAILS(open("/dev/kvm", O_RDWR | O_CREAT | O_EXCL, 0600), EEXIST);
	FAILS(open("/dev/kvm", O_RDONLY | O_DIRECTORY), ENOTDIR);
	FAILS(open("/dev/kvm/", O_RDWR), ENOTDIR);
	FAILS(open("/dev/kvm/x", O_RDWR), ENOTDIR);
	FAILS(access("/dev/kvm/", F_OK), ENOTDIR);
	FAILS(open("/dev/kvmx", O_RDWR), ENOENT);
	FAILS(open("/dev/kv", O_RDWR), ENOENT);
	FAILS(open("", O_RDWR), ENOENT);
	FAILS(open((char *)8, O_RDWR), EFAULT);
	FAILS(open((char *)0x7fff00000000dead, O_RDWR), EFAULT);
	FAILS(openat(-1, "kvm", O_RDWR), EBADF);
	FAILS(ioctl(open("/dev/kvm", O_PATH), KVM_GET_API_VERSION, 0), EBADF);
	CHECK(!access("/dev/kvm", R_OK | W_OK));
	CHECK(!access("/dev/kvm", F_OK));
	CHECK(!euidaccess("/dev/kvm", R_OK));
	CHECK(!faccessat(AT_FDCWD, "/dev/kvm", R_OK | W_OK, 0));
	FAILS(access("/dev/kvm", X_OK), EACCES);
	/* Opening a descriptor again: a new /dev/kvm, but never a VM. */
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	again = open(path, O_RDWR);
	CHECK(again >= 0 && ioctl(again, KVM_GET_API_VERSION, 0) == 12);
	close(again);
	vm = ioctl(fd, KVM_CREATE_VM, 0);
	NEED(vm >= 0);
	snprintf(path, sizeof(path), "/dev/fd/%d", vm);
	FAILS(open(path, O_RDWR), ENXIO);
	close(vm);
	close(fd);
}

static void flags(void)
{
	int fd = open("/dev/kvm", O_RDWR);
	int vm = ioctl(fd, KVM_CREATE_VM, 0);

	CHECK(fcntl(fd, F_GETFD) == 0);
	CHECK(fcntl(vm, F_GETFD) == FD_CLOEXEC);
	CHECK((fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDWR);
	close(fd);
	fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	CHECK(fcntl(fd, F_GETFD) == FD_CLOEXEC);
	close(fd);
	close(vm);
	fd = open("/dev/kvm", O_RDONLY);
	CHECK((fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDONLY);
	FAILS(write(fd, "", 1), EBADF);
	FAILS(fcntl(fd, F_SETFL, O_DIRECT), EINVAL);
	close(fd);
	FAILS(open("/dev/kvm", O_RDWR | O_DIRECT), EINVAL);
}

/* A stream that is KVM's becomes another file's, and back. */
static void streams(void)
{
	FILE *f = fopen("/dev/kvm", "r+");
	int fd;

	NEED(f);
	CHECK(ioctl(fileno(f), KVM_GET_API_VERSION, 0) == 12);
	f = freopen("/dev/null", "r", f);
	NEED(f);
	fd = fileno(f);
	FAILS(ioctl(fd, KVM_GET_API_VERSION, 0), ENOTTY);
	CHECK(read(fd, &(char){0}, 1) == 0);
	f = freopen("/dev/kvm", "r+", f);
	NEED(f);
	CHECK(ioctl(fileno(f), KVM_GET_API_VERSION, 0) == 12);
	fd = ioctl(fileno(f), KVM_CREATE_VM, 0);
	CHECK(fd >= 0 && !close(fd));
	fd = fileno(f);
	/* The stream is closed, but libc does not free it: a leak to who looks for leaks. */
	if (t_sanitized())
		fclose(f);
	else
		CHECK(!freopen("/dev/kvm/x", "r", f) && errno == ENOTDIR);
	FAILS(ioctl(fd, KVM_GET_API_VERSION, 0), EBADF);
}

static void stats(void)
{
	struct stat st;
	struct statx stx;

	CHECK(!stat("/dev/kvm", &st) && S_ISCHR(st.st_mode) && st.st_rdev == makedev(10, 232));
	CHECK(!lstat("/dev/kvm", &st) && S_ISCHR(st.st_mode));
	CHECK(!fstatat(AT_FDCWD, "/dev/kvm", &st, 0) && S_ISCHR(st.st_mode));
	CHECK(!statx(AT_FDCWD, "/dev/kvm", 0, STATX_BASIC_STATS, &stx) && S_ISCHR(stx.stx_mode) &&
	      stx.stx_rdev_major == 10 && stx.stx_rdev_minor == 232);
	FAILS(stat("/dev/kvm", (struct stat *)8), EFAULT);
}

int main(void)
{
	/* Before anything was opened. */
	FAILS(stat("/dev/kvm", (struct stat *)8), EFAULT);
	FAILS(statx(AT_FDCWD, "/dev/kvm", 0, 0, (struct statx *)8), EFAULT);
	stats();
	spellings();
	links();
	refusals();
	flags();
	streams();
	stats();
	return t_done();
}
