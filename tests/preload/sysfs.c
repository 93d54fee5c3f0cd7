/* SPDX-License-Identifier: MIT */
/* /sys/module/kvm*: the parameters that hold here, and no others. */
#include <cpuid.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include "t.h"

#define BASE "/sys/module/kvm/parameters/"

static const char *get(const char *path)
{
	static char b[64];
	int fd = open(path, O_RDONLY);
	ssize_t n;

	if (fd < 0)
		return NULL;
	n = read(fd, b, sizeof(b) - 1);
	close(fd);
	if (n < 0)
		return NULL;
	b[n] = 0;
	return b;
}

static bool is(const char *path, const char *value)
{
	const char *v = get(path);

	return v && !strcmp(v, value);
}

static void values(void)
{
	unsigned a, b, c, d;
	bool amd, intel;

	CHECK(is(BASE "force_emulation_prefix", "0\n"));
	CHECK(is(BASE "enable_pmu", "N\n"));
	CHECK(is(BASE "tdp_mmu", "Y\n"));
	CHECK(get(BASE "eager_page_split"));
	CHECK(is(BASE "nx_huge_pages", "N\n"));
	CHECK(get(BASE "nx_huge_pages_recovery_ratio"));
	CHECK(get(BASE "nx_huge_pages_recovery_period_ms"));
	CHECK(!get(BASE "nonsense"));
	NEED(__get_cpuid(0, &a, &b, &c, &d));
	amd = b == signature_AMD_ebx;
	intel = b == signature_INTEL_ebx;
	CHECK(!!get("/sys/module/kvm_amd/parameters/npt") == amd);
	CHECK(!!get("/sys/module/kvm_amd/parameters/avic") == amd);
	CHECK(!!get("/sys/module/kvm_intel/parameters/ept") == intel);
	CHECK(!!get("/sys/module/kvm_intel/parameters/unrestricted_guest") == intel);
	CHECK(!get("/sys/module/kvm_other/parameters/npt"));
	if (amd)
		CHECK(is("/sys/module/kvm_amd/parameters/npt", "Y\n") &&
		      is("/sys/module/kvm_amd/parameters/avic", "N\n"));
	if (intel)
		CHECK(is("/sys/module/kvm_intel/parameters/ept", "Y\n"));
}

static void spellings(void)
{
	struct stat st;
	char b[8];
	int fd, dir;
	FILE *f;

	CHECK(is("/sys//module/kvm/./parameters/tdp_mmu", "Y\n"));
	fd = (int)syscall(SYS_openat, AT_FDCWD, BASE "tdp_mmu", O_RDONLY);
	CHECK(fd >= 0 && read(fd, b, 1) == 1 && b[0] == 'Y' && read(fd, b, 8) == 1 &&
	      read(fd, b, 8) == 0);
	CHECK(lseek(fd, 0, SEEK_SET) == 0 && pread(fd, b, 8, 0) == 2);
	FAILS(write(fd, "N", 1), EBADF);
	CHECK(!close(fd));
	fd = open64(BASE "tdp_mmu", O_RDONLY | O_CLOEXEC);
	CHECK(fcntl(fd, F_GETFD) == FD_CLOEXEC);
	close(fd);
	f = fopen(BASE "tdp_mmu", "r");
	CHECK(f && fgetc(f) == 'Y');
	if (f)
		fclose(f);
	f = fopen64(BASE "tdp_mmu", "re");
	CHECK(f && fgetc(f) == 'Y');
	if (f)
		fclose(f);
	CHECK(!fopen(BASE "nonsense", "r") && errno == ENOENT);
	FAILS(open(BASE "tdp_mmu", O_RDONLY | O_DIRECTORY), ENOTDIR);
	FAILS(open(BASE "tdp_mmu", O_RDWR | O_CREAT | O_EXCL, 0600), EEXIST);
	FAILS(open(BASE "tdp_mmu", O_RDWR), EACCES);
	CHECK(!access(BASE "tdp_mmu", R_OK));
	FAILS(access(BASE "tdp_mmu", W_OK), EACCES);
	FAILS(access(BASE "nonsense", F_OK), ENOENT);
	CHECK(!stat(BASE "tdp_mmu", &st) && S_ISREG(st.st_mode));
	CHECK(!stat("/sys/module/kvm", &st) && S_ISDIR(st.st_mode));
	CHECK(!access("/sys/module/kvm/parameters", X_OK));
	FAILS(stat("/sys/module/kvm_other", &st), ENOENT);
	/* Names that only begin alike are the host's. */
	FAILS(open("/sys/module/kvmx/parameters/y", O_RDONLY), ENOENT);
	dir = open("/proc/self", O_RDONLY | O_DIRECTORY);
	fd = openat(dir, "stat", O_RDONLY);
	CHECK(fd >= 0 && read(fd, b, 1) == 1);
	close(fd);
	close(dir);
}

int main(void)
{
	values();
	spellings();
	return t_done();
}
