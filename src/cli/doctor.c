/* SPDX-License-Identifier: MIT */
/* `kvmlet doctor`: what this machine offers, and what follows from it. */
#include "cli.h"

#include <cpuid.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/kvm.h>
#include <linux/membarrier.h>
#include <linux/userfaultfd.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

/* Newer than Debian 12's headers; values are kernel ABI. */
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

enum verdict { OK, NOTE, MISSING };

static bool unusable;

/* NOTE: kvmlet works, something is limited. MISSING: kvmlet does not work. */
static void __attribute__((format(printf, 3, 4)))
report(enum verdict v, const char *what, const char *fmt, ...)
{
	static const char *const words[] = {"ok", "note", "MISSING"};
	va_list ap;

	printf("%-8s %-20s ", words[v], what);
	va_start(ap, fmt);
	vprintf(fmt, ap);
	va_end(ap);
	putchar('\n');
	if (v == MISSING)
		unusable = true;
}

/* The first line of a small file; false if it cannot be read. */
static bool read_line(const char *path, char *buf, size_t size)
{
	FILE *f = fopen(path, "re");
	bool got = f && fgets(buf, (int)size, f);

	if (f)
		fclose(f);
	if (got)
		buf[strcspn(buf, "\n")] = 0;
	return got;
}

static void check_preload(void)
{
	char path[PATH_MAX];

	if (find_preload(path, sizeof(path), false))
		report(MISSING, "preload library", "not found; install kvmlet again");
	else
		report(OK, "preload library", "%s", path);
}

static void check_kvm(void)
{
	int fd = open("/dev/kvm", O_RDWR | O_CLOEXEC), err = errno, version;

	if (fd >= 0) {
		version = ioctl(fd, KVM_GET_API_VERSION, 0);
		report(OK, "/dev/kvm", "usable, API version %d; 'kvmlet run' does not use it",
		       version);
		close(fd);
	} else if (err == ENOENT) {
		report(OK, "/dev/kvm", "none; 'kvmlet run' provides one");
	} else {
		report(OK, "/dev/kvm", "there, but: %s; 'kvmlet run' provides one", strerror(err));
	}
}

static void check_memfd(void)
{
	/* mov $42,%eax; ret */
	static const unsigned char code[] = {0xb8, 42, 0, 0, 0, 0xc3};
	int fd = (int)syscall(SYS_memfd_create, "kvmlet-doctor", 1u /* CLOEXEC */);
	void *rw = MAP_FAILED, *rx = MAP_FAILED;
	long page = sysconf(_SC_PAGESIZE);
	int (*fn)(void);

	if (fd < 0) {
		report(MISSING, "memfd_create", "%s; KVM descriptors are memfds", strerror(errno));
		return;
	}
	report(OK, "memfd_create", "available");
	if (!ftruncate(fd, page)) {
		rw = mmap(NULL, (size_t)page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		rx = mmap(NULL, (size_t)page, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
	}
	if (rw == MAP_FAILED || rx == MAP_FAILED) {
		report(MISSING, "executable memory",
		       "%s; a security policy forbids generated code, "
		       "on which guest SSE instructions run",
		       strerror(errno));
	} else {
		memcpy(rw, code, sizeof(code));
		memcpy(&fn, &rx, sizeof(fn));
		if (fn() == 42)
			report(OK, "executable memory",
			       "a memfd can be mapped writable and, "
			       "elsewhere, executable");
		else
			report(MISSING, "executable memory",
			       "generated code does not run as "
			       "written");
	}
	if (rw != MAP_FAILED)
		munmap(rw, (size_t)page);
	if (rx != MAP_FAILED)
		munmap(rx, (size_t)page);
	close(fd);
}

static void check_userfaultfd(void)
{
	int fd, dev, err;

	fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	err = errno;
	if (fd >= 0) {
		report(OK, "userfaultfd", "system call");
		close(fd);
		return;
	}
	dev = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	if (dev >= 0) {
		fd = ioctl(dev, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
		close(dev);
		if (fd >= 0) {
			report(OK, "userfaultfd", "through /dev/userfaultfd (system call: %s)",
			       strerror(err));
			close(fd);
			return;
		}
	}
	fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	if (fd >= 0) {
		report(NOTE, "userfaultfd",
		       "for faults of user mode only (sysctl "
		       "vm.unprivileged_userfaultfd=1 lifts that)");
		close(fd);
		return;
	}
	report(NOTE, "userfaultfd", "%s; programs that use it (demand paging) will not work",
	       strerror(err));
}

static void check_membarrier(void)
{
	long cmds = syscall(SYS_membarrier, MEMBARRIER_CMD_QUERY, 0, 0);

	if (cmds < 0)
		report(NOTE, "membarrier", "%s; slower ways are used", strerror(errno));
	else if (cmds & MEMBARRIER_CMD_PRIVATE_EXPEDITED)
		report(OK, "membarrier", "private expedited");
	else
		report(NOTE, "membarrier", "without the private expedited command");
}

static void limit(const char *what, int resource, const char *consequence, uint64_t enough)
{
	struct rlimit rl;

	if (getrlimit(resource, &rl)) {
		report(NOTE, what, "%s", strerror(errno));
		return;
	}
	if (rl.rlim_cur == RLIM_INFINITY)
		report(OK, what, "unlimited");
	else
		report(rl.rlim_cur < enough ? NOTE : OK, what, "%llu (hard limit %lld)%s%s",
		       (unsigned long long)rl.rlim_cur, (long long)rl.rlim_max,
		       rl.rlim_cur < enough ? "; " : "", rl.rlim_cur < enough ? consequence : "");
}

static void check_memory(void)
{
	char buf[256];

	limit("RLIMIT_AS", RLIMIT_AS, "guests of that size will not fit", UINT64_C(1) << 36);
	limit("RLIMIT_MEMLOCK", RLIMIT_MEMLOCK, "programs that lock guest memory need more", 0);
	limit("RLIMIT_NOFILE", RLIMIT_NOFILE, "every vCPU is a descriptor", 1100);
	if (read_line("/proc/sys/vm/overcommit_memory", buf, sizeof(buf)))
		report(buf[0] == '2' ? NOTE : OK, "overcommit", "%s%s", buf,
		       buf[0] == '2' ? "; strict: guest memory must fit into the commit limit"
				     : "");
	if (read_line("/proc/sys/vm/max_map_count", buf, sizeof(buf)))
		report(atol(buf) < 65530 ? NOTE : OK, "max_map_count", "%s", buf);
	if (read_line("/sys/fs/cgroup/memory.max", buf, sizeof(buf)) && strcmp(buf, "max"))
		report(NOTE, "cgroup memory", "%s bytes", buf);
	if (read_line("/sys/kernel/mm/transparent_hugepage/enabled", buf, sizeof(buf)))
		report(OK, "transparent pages", "%s", buf);
	else
		report(NOTE, "transparent pages",
		       "this kernel has none; some KVM selftests insist");
}

static void check_cpu(void)
{
	static const struct {
		const char *name;
		unsigned leaf;
		int reg; /* index into a, b, c, d */
		unsigned bit;
		bool needed;
	} features[] = {
		{"cx16", 1, 2, 13, true},     {"sse4.2", 1, 2, 20, false},
		{"popcnt", 1, 2, 23, false},  {"xsave", 1, 2, 26, false},
		{"avx", 1, 2, 28, false},     {"fsgsbase", 7, 1, 0, false},
		{"bmi1", 7, 1, 3, false},     {"avx2", 7, 1, 5, false},
		{"bmi2", 7, 1, 8, false},     {"erms", 7, 1, 9, false},
		{"avx512f", 7, 1, 16, false},
	};
	unsigned r[4], vendor[4] = {0}, bits = 36;
	char list[256] = "", name[13] = "";
	bool missing = false;

	__get_cpuid(0, &r[0], &vendor[0], &vendor[2], &vendor[1]);
	memcpy(name, vendor, 12);
	if (__get_cpuid(0x80000008, &r[0], &r[1], &r[2], &r[3]))
		bits = r[0] & 0xff;
	for (unsigned i = 0; i < sizeof(features) / sizeof(features[0]); i++) {
		bool has = __get_cpuid_count(features[i].leaf, 0, &r[0], &r[1], &r[2], &r[3]) &&
			   (r[features[i].reg] >> features[i].bit & 1);

		if (has) {
			strcat(list, " ");
			strcat(list, features[i].name);
		} else if (features[i].needed) {
			missing = true;
		}
	}
	report(missing ? MISSING : OK, "CPU", "%s, %u physical address bits,%s%s", name, bits, list,
	       missing ? "; kvmlet needs cx16" : "");
}

static void check_seccomp(void)
{
	char buf[256];
	FILE *f = fopen("/proc/self/status", "re");

	while (f && fgets(buf, sizeof(buf), f))
		if (!strncmp(buf, "Seccomp:", 8) && atoi(buf + 8) == 2)
			report(NOTE, "seccomp",
			       "a filter is active here (a container's?); it may "
			       "refuse system calls that the lines above tried");
	if (f)
		fclose(f);
}

int cmd_doctor(int argc, char **argv)
{
	struct utsname u;

	if (argc > 1) {
		complain("'kvmlet doctor' takes no arguments, not '%s'", argv[1]);
		return EXIT_USAGE;
	}
	if (!uname(&u))
		printf("kvmlet " KVMLET_VERSION " on Linux %s, %ld CPUs\n", u.release,
		       sysconf(_SC_NPROCESSORS_ONLN));
	check_preload();
	check_kvm();
	check_memfd();
	check_userfaultfd();
	check_membarrier();
	check_memory();
	check_cpu();
	check_seccomp();
	printf(unusable ? "kvmlet will not work here, for the reasons marked MISSING.\n"
			: "kvmlet works here.\n");
	return unusable ? 1 : 0;
}
