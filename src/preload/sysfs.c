/* SPDX-License-Identifier: MIT */
/*
 * /sys/module/kvm* as the program sees it: the parameters that mean something here, with the
 * values that hold here. They are the same on every host, and cannot be written: what may be chosen
 * is chosen for a program and those that it runs, by `kvmlet run --param`.
 *
 * Text as the kernel formats it: bool "Y\n" or "N\n", numbers in decimal and "\n".
 */
#include <cpuid.h>
#include <fcntl.h>
#include <string.h>

#include "preload/preload.h"

struct param {
	const char *module, *name, *value;
};

static const struct param params[] = {
	/* No instruction prefix forces the guest's code into an emulator of its own. */
	{"kvm", "force_emulation_prefix", "0\n"},
	{"kvm", "enable_pmu", "N\n"},
	{"kvm", "enable_vmware_backdoor", "N\n"},
	{"kvm", "ignore_msrs", "N\n"},
	{"kvm", "tdp_mmu", "Y\n"},
	{"kvm", "mmio_caching", "Y\n"},
	{"kvm", "eager_page_split", "N\n"},
	{"kvm", "nx_huge_pages", "N\n"},
	{"kvm", "nx_huge_pages_recovery_ratio", "0\n"},
	{"kvm", "nx_huge_pages_recovery_period_ms", "0\n"},
	{"kvm", "halt_poll_ns", "0\n"},
	{"kvm_amd", "npt", "Y\n"},
	{"kvm_amd", "avic", "N\n"},
	{"kvm_amd", "nested", "0\n"},
	{"kvm_amd", "sev", "N\n"},
	{"kvm_amd", "sev_es", "N\n"},
	{"kvm_amd", "sev_snp", "N\n"},
	{"kvm_amd", "tsc_scaling", "1\n"},
	{"kvm_intel", "ept", "Y\n"},
	/* With two-dimensional paging both modules leave it off; AMD's has no such parameter. */
	{"kvm_intel", "allow_smaller_maxphyaddr", "N\n"},
	{"kvm_intel", "unrestricted_guest", "Y\n"},
	{"kvm_intel", "enable_apicv", "N\n"},
	{"kvm_intel", "nested", "N\n"},
};

static const char *vendor_module(void)
{
	unsigned a, b, c, d;

	if (!__get_cpuid(0, &a, &b, &c, &d))
		return "";
	if (b == signature_INTEL_ebx && d == signature_INTEL_edx && c == signature_INTEL_ecx)
		return "kvm_intel";
	if (b == signature_AMD_ebx && d == signature_AMD_edx && c == signature_AMD_ecx)
		return "kvm_amd";
	if (b == 0x6f677948 && d == 0x6e65476e && c == 0x656e6975) /* HygonGenuine */
		return "kvm_amd";
	return "";
}

/* Splits "module[/parameters[/name]]"; false if it does not exist. @name: "" for directories. */
static bool split(const char *rest, char *module, size_t size, const char **name)
{
	const char *slash = strchrnul(rest, '/');
	size_t n = (size_t)(slash - rest);

	if (n >= size)
		return false;
	memcpy(module, rest, n);
	module[n] = 0;
	if (strcmp(module, "kvm") && strcmp(module, vendor_module()))
		return false;
	*name = "";
	if (!*slash || !strcmp(slash, "/parameters"))
		return true;
	if (strncmp(slash, "/parameters/", 12))
		return false;
	*name = slash + 12;
	return true;
}

static const struct param *find(const char *rest, bool *dir)
{
	char module[16];
	const char *name;

	*dir = false;
	if (!split(rest, module, sizeof(module), &name))
		return NULL;
	*dir = !*name;
	for (size_t i = 0; !*dir && i < KL_ARRAY_SIZE(params); i++)
		if (!strcmp(params[i].module, module) && !strcmp(params[i].name, name))
			return &params[i];
	return NULL;
}

int kl_sysfs_mode(const char *rest, unsigned *mode)
{
	bool dir;

	if (!find(rest, &dir) && !dir)
		return -ENOENT;
	*mode = dir ? S_IFDIR | 0755 : S_IFREG | 0444;
	return 0;
}

int kl_sysfs_open(const char *rest, int flags)
{
	const struct param *p;
	const char *value;
	char path[32];
	long fd, ro;
	bool dir;

	p = find(rest, &dir);
	if (!p)
		return dir ? ((flags & O_ACCMODE) == O_RDONLY ? -EACCES : -EISDIR) : -ENOENT;
	if ((flags & (O_CREAT | O_EXCL)) == (O_CREAT | O_EXCL))
		return -EEXIST;
	if (flags & O_DIRECTORY)
		return -ENOTDIR;
	if ((flags & O_ACCMODE) != O_RDONLY)
		return -EACCES;
	fd = kl_sys(SYS_memfd_create, p->name, 1 /* MFD_CLOEXEC */);
	if (fd < 0)
		return (int)fd;
	value = kl_config.eager_page_split && !strcmp(p->name, "eager_page_split") ? "Y\n"
										   : p->value;
	kl_sys(SYS_write, fd, value, strlen(value));
	snprintf(path, sizeof(path), "/proc/self/fd/%d", (int)fd);
	ro = kl_sys(SYS_openat, AT_FDCWD, path, O_RDONLY | (flags & O_CLOEXEC));
	if (ro < 0) {
		/* No /proc: the writable descriptor has to do. */
		kl_sys(SYS_lseek, fd, 0, SEEK_SET);
		if (!(flags & O_CLOEXEC))
			kl_sys(SYS_fcntl, fd, F_SETFD, 0);
		return (int)fd;
	}
	/* open() promises the lowest free number: the first of the two. */
	kl_sys(SYS_dup3, ro, fd, flags & O_CLOEXEC);
	kl_sys(SYS_close, ro);
	return (int)fd;
}
