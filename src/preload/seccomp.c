/* SPDX-License-Identifier: MIT */
/*
 * Filters that a KVM program installs once it is set up allow what the program calls, not
 * what kvmlet calls for it. After the first /dev/kvm they are checked as the kernel checks
 * them, accepted, and not installed, unless --keep-seccomp is given. Filters with a listener
 * cannot be pretended and are installed.
 */
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>

#include "preload/preload.h"
#include "preload/wrapped.h"

#define PRETENDED_FLAGS                                                                         \
	(SECCOMP_FILTER_FLAG_TSYNC | SECCOMP_FILTER_FLAG_LOG | SECCOMP_FILTER_FLAG_SPEC_ALLOW | \
	 SECCOMP_FILTER_FLAG_TSYNC_ESRCH)

static _Atomic bool pretended;

static bool may_install(void)
{
	struct __user_cap_header_struct h = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct d[2] = {{0}};

	if (kl_sys(SYS_prctl, PR_GET_NO_NEW_PRIVS) == 1)
		return true;
	return !kl_sys(SYS_capget, &h, d) && (d[0].effective & (1u << CAP_SYS_ADMIN));
}

static long pretend(unsigned long uprog)
{
	struct sock_fprog prog;
	struct sock_filter insn;
	struct kl_entry e;
	long r;

	kl_pl_enter(&e);
	r = kl_copy_from_user(&prog, (void *)uprog, sizeof(prog));
	if (!r && (!prog.len || prog.len > BPF_MAXINSNS))
		r = -EINVAL;
	for (unsigned i = 0; !r && i < prog.len; i++)
		r = kl_copy_from_user(&insn, &prog.filter[i], sizeof(insn));
	kl_pl_leave(&e);
	if (r)
		return r;
	if (!may_install())
		return -EACCES;
	if (!atomic_exchange(&pretended, true))
		kl_log(KL_LOG_WARN, "the program's seccomp filter is not installed, since it does "
				    "not know kvmlet's system calls (--keep-seccomp installs it)");
	return 0;
}

static bool applies(void)
{
	return atomic_load_explicit(&kl_pl_opened, memory_order_relaxed) &&
	       !kl_config.keep_seccomp && !kl_fd_shared_child();
}

WRAP(int, prctl, (int op, unsigned long a, unsigned long b, unsigned long c, unsigned long d))
{
	if (op == PR_SET_SECCOMP && a == SECCOMP_MODE_FILTER && applies())
		return (int)kl_ret(pretend(b));
	if (op == PR_GET_SECCOMP && atomic_load(&pretended))
		return SECCOMP_MODE_FILTER;
	return REAL(prctl)(op, a, b, c, d);
}

long kl_pl_seccomp(unsigned op, unsigned flags, unsigned long arg)
{
	if (op == SECCOMP_SET_MODE_FILTER && !(flags & ~(unsigned)PRETENDED_FLAGS) && arg &&
	    applies())
		return pretend(arg);
	return kl_sys(SYS_seccomp, op, flags, arg);
}
