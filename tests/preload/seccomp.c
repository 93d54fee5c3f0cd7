/* SPDX-License-Identifier: MIT */
/*
 * A filter that a KVM program installs once it is set up: accepted, and kvmlet goes on
 * working. With KVMLET_KEEP_SECCOMP the filter is real.
 */
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include "t.h"

static struct sock_filter deny_getppid[] = {
	BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
	BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 0, 1),
	BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EXDEV),
	BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
};

static bool kept(void)
{
	const char *e = getenv("KVMLET_KEEP_SECCOMP");

	return !t_preloaded() || (e && *e == '1');
}

static int by_prctl(void)
{
	struct sock_fprog p = {4, deny_getppid}, none = {0, deny_getppid};
	struct vm v;

	t_failures = 0;
	T_VM(&v, code_out);
	CHECK(prctl(PR_GET_SECCOMP) == 0);
	CHECK(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	FAILS(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, NULL), EFAULT);
	FAILS(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, 8), EFAULT);
	FAILS(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &none), EINVAL);
	FAILS(prctl(PR_SET_SECCOMP, 99, &p), EINVAL);
	CHECK(!prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &p));
	CHECK(prctl(PR_GET_SECCOMP) == SECCOMP_MODE_FILTER);
	errno = 0;
	if (kept())
		CHECK(syscall(SYS_getppid) == -1 && errno == EXDEV);
	else
		CHECK(syscall(SYS_getppid) == getppid());
	CHECK(t_out(&v) == 0);
	return t_failures;
}

static int by_syscall(void)
{
	struct sock_fprog p = {4, deny_getppid};
	struct vm v;

	t_failures = 0;
	T_VM(&v, code_out);
	CHECK(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	/* How libraries ask what there is. */
	FAILS(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, NULL), EFAULT);
	FAILS(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0x80000000u, &p), EINVAL);
	FAILS(syscall(SYS_seccomp, SECCOMP_SET_MODE_STRICT, 1, NULL), EINVAL);
	FAILS(syscall(SYS_seccomp, 99, 0, NULL), EINVAL);
	CHECK(!syscall(SYS_seccomp, SECCOMP_GET_ACTION_AVAIL, 0, &(uint32_t){SECCOMP_RET_ALLOW}));
	CHECK(!syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &p));
	errno = 0;
	if (kept())
		CHECK(syscall(SYS_getppid) == -1 && errno == EXDEV);
	else
		CHECK(syscall(SYS_getppid) == getppid());
	CHECK(t_out(&v) == 0);
	return t_failures;
}

int main(void)
{
	CHECK(t_child(by_prctl) == 0);
	CHECK(t_child(by_syscall) == 0);
	return t_done();
}
