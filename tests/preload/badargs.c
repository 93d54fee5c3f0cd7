/* SPDX-License-Identifier: MIT */
/*
 * Every ioctl with pointers that cannot be used: EFAULT where KVM reads or writes the
 * argument, whatever else KVM says where it does not, never a crash.
 */
#include <sys/syscall.h>

#include "t.h"

enum kind { SYSTEM, VM, VCPU };

struct cmd {
	const char *name;
	enum kind kind;
	unsigned long nr;
	int err; /* for a bad pointer */
};

#define C(kind, nr, err)           \
	{                          \
#nr, kind, nr, err \
	}

static const struct cmd cmds[] = {
	C(SYSTEM, KVM_GET_SUPPORTED_CPUID, EFAULT),
	C(SYSTEM, KVM_GET_EMULATED_CPUID, EFAULT),
	C(SYSTEM, KVM_GET_MSR_INDEX_LIST, EFAULT),
	C(SYSTEM, KVM_GET_MSR_FEATURE_INDEX_LIST, EFAULT),
	C(SYSTEM, KVM_GET_MSRS, EFAULT),
	C(SYSTEM, KVM_GET_API_VERSION, EINVAL),
	C(SYSTEM, KVM_GET_VCPU_MMAP_SIZE, EINVAL),
	C(VM, KVM_SET_USER_MEMORY_REGION, EFAULT),
	C(VM, KVM_ENABLE_CAP, EFAULT),
	C(VM, KVM_SET_IDENTITY_MAP_ADDR, EINVAL), /* there is a vCPU */
	C(VM, KVM_REGISTER_COALESCED_MMIO, EFAULT),
	C(VM, KVM_UNREGISTER_COALESCED_MMIO, EFAULT),
	C(VM, KVM_IOEVENTFD, EFAULT),
	C(VM, KVM_X86_SET_MSR_FILTER, EFAULT),
	C(VCPU, KVM_GET_REGS, EFAULT),
	C(VCPU, KVM_SET_REGS, EFAULT),
	C(VCPU, KVM_GET_SREGS, EFAULT),
	C(VCPU, KVM_SET_SREGS, EFAULT),
	C(VCPU, KVM_GET_SREGS2, EFAULT),
	C(VCPU, KVM_SET_SREGS2, EFAULT),
	C(VCPU, KVM_GET_FPU, EFAULT),
	C(VCPU, KVM_SET_FPU, EFAULT),
	C(VCPU, KVM_GET_XSAVE, EFAULT),
	C(VCPU, KVM_SET_XSAVE, EFAULT),
	C(VCPU, KVM_GET_XCRS, EFAULT),
	C(VCPU, KVM_SET_XCRS, EFAULT),
	C(VCPU, KVM_GET_MSRS, EFAULT),
	C(VCPU, KVM_SET_MSRS, EFAULT),
	C(VCPU, KVM_GET_CPUID2, EFAULT),
	C(VCPU, KVM_SET_CPUID2, EFAULT),
	C(VCPU, KVM_TRANSLATE, EFAULT),
	C(VCPU, KVM_GET_MP_STATE, EFAULT),
	C(VCPU, KVM_SET_MP_STATE, EFAULT),
	C(VCPU, KVM_GET_VCPU_EVENTS, EFAULT),
	C(VCPU, KVM_SET_VCPU_EVENTS, EFAULT),
	C(VCPU, KVM_SET_SIGNAL_MASK, EFAULT),
	C(VCPU, KVM_RUN, EINVAL),
};

static struct vm v;
static uint8_t *edge; /* the last byte before memory that is not there */
static uint8_t *none; /* PROT_NONE */

static int fd_of(enum kind k)
{
	return k == SYSTEM ? v.kvm : k == VM ? v.vm : v.vcpu;
}

static void pointers(void)
{
	void *const bad[] = {NULL,
			     (void *)8,
			     none,
			     edge,
			     none - 3,
			     (void *)~0ul,
			     (void *)0xffff800000000000,
			     (void *)0x800000000000};

	for (unsigned i = 0; i < sizeof(cmds) / sizeof(cmds[0]); i++) {
		const struct cmd *c = &cmds[i];

		for (unsigned b = 0; b < sizeof(bad) / sizeof(bad[0]); b++) {
			/* These mean something else, or succeed. */
			if (!bad[b] &&
			    ((c->err == EINVAL && c->kind != VM) || c->nr == KVM_SET_SIGNAL_MASK))
				continue;
			if (!FAILS(ioctl(fd_of(c->kind), c->nr, bad[b]), c->err))
				fprintf(stderr, "  %s, %p\n", c->name, bad[b]);
		}
	}
}

struct msrs {
	struct kvm_msrs h;
	struct kvm_msr_entry e[2];
};
struct cpuid {
	struct kvm_cpuid2 h;
	struct kvm_cpuid_entry2 e[2];
};
struct list {
	struct kvm_msr_list h;
	uint32_t i[2];
};

static void counts(void)
{
	struct msrs m = {.h.nmsrs = ~0u};
	struct cpuid c = {.h.nent = ~0u};
	struct list l = {.h.nmsrs = 1};
	struct kvm_msrs *over = (void *)(none - sizeof(m.h) - 8);

	FAILS(ioctl(v.vcpu, KVM_GET_MSRS, &m), E2BIG);
	FAILS(ioctl(v.vcpu, KVM_SET_MSRS, &m), E2BIG);
	FAILS(ioctl(v.kvm, KVM_GET_MSRS, &m), E2BIG);
	FAILS(ioctl(v.vcpu, KVM_SET_CPUID2, &c), E2BIG);
	c.h.nent = 0;
	FAILS(ioctl(v.kvm, KVM_GET_SUPPORTED_CPUID, &c), E2BIG);
	FAILS(ioctl(v.kvm, KVM_GET_MSR_INDEX_LIST, &l), E2BIG);
	CHECK(l.h.nmsrs > 1);
	/* The header can be read, the entries cannot. */
	memset(over, 0, sizeof(*over));
	over->nmsrs = 3;
	FAILS(ioctl(v.vcpu, KVM_GET_MSRS, over), EFAULT);
	FAILS(ioctl(v.vcpu, KVM_SET_MSRS, over), EFAULT);
}

/* Where the kernel checks no alignment, neither may we. */
static void misaligned(void)
{
	static uint8_t buf[sizeof(struct kvm_sregs) + 16];
	struct kvm_regs regs;

	for (int i = 1; i < 8; i++) {
		CHECK(!ioctl(v.vcpu, KVM_GET_REGS, buf + i));
		memcpy(&regs, buf + i, sizeof(regs));
		CHECK(regs.rip == CODE);
		CHECK(!ioctl(v.vcpu, KVM_SET_REGS, buf + i));
		CHECK(!ioctl(v.vcpu, KVM_GET_SREGS, buf + i));
		CHECK(!ioctl(v.vcpu, KVM_SET_SREGS, buf + i));
	}
}

/* All numbers, sizes and directions of KVM's type: answered, and nothing is broken. */
static void all_numbers(void)
{
	static const unsigned sizes[] = {0, 4, 8, 16, 64, 4096, 16383};
	int fds[3] = {v.kvm, v.vm, v.vcpu};
	struct kvm_regs regs;

	for (unsigned nr = 0; nr < 256; nr++)
		for (unsigned dir = 0; dir < 4; dir++)
			for (unsigned s = 0; s < sizeof(sizes) / sizeof(sizes[0]); s++)
				for (int f = 0; f < 3; f++) {
					unsigned long cmd = _IOC(dir, KVMIO, nr, sizes[s]);
					int r;

					if (cmd == KVM_RUN || cmd == KVM_CREATE_VM ||
					    cmd == KVM_CREATE_VCPU)
						continue;
					r = ioctl(fds[f], cmd, none);
					if (r > 2 && cmd == KVM_GET_STATS_FD)
						close(r);
				}
	CHECK(ioctl(v.kvm, KVM_GET_API_VERSION, 0) == 12);
	CHECK(ioctl(v.vm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) == 1);
	CHECK(!ioctl(v.vcpu, KVM_GET_REGS, &regs) && (regs.rip == CODE || regs.rip == CODE + 2));
}

/* Pointers that only syscall() hands on. */
static void raw_calls(void)
{
	uint64_t how[3] = {O_RDWR, 0, 0}, set = 1ull << (SIGUSR1 - 1), old;
	int fd;

	FAILS(syscall(SYS_rt_sigprocmask, SIG_BLOCK, none, NULL, 8), EFAULT);
	FAILS(syscall(SYS_rt_sigprocmask, SIG_BLOCK, edge, NULL, 8), EFAULT);
	FAILS(syscall(SYS_rt_sigprocmask, SIG_BLOCK, NULL, none, 8), EFAULT);
	FAILS(syscall(SYS_rt_sigprocmask, SIG_BLOCK, NULL, edge, 8), EFAULT);
	CHECK(!syscall(SYS_rt_sigprocmask, SIG_BLOCK, &set, &old, 8) && !(old & set));
	CHECK(!syscall(SYS_rt_sigprocmask, SIG_SETMASK, &old, &set, 8) &&
	      set == (old | 1ull << (SIGUSR1 - 1)));
	FAILS(syscall(SYS_openat2, AT_FDCWD, "/dev/kvm", none, sizeof(how)), EFAULT);
	FAILS(syscall(SYS_openat2, AT_FDCWD, "/dev/kvm", edge, sizeof(how)), EFAULT);
	FAILS(syscall(SYS_openat2, AT_FDCWD, "/dev/kvm", how, 8), EINVAL);
	fd = (int)syscall(SYS_openat2, AT_FDCWD, "/dev/kvm", how, sizeof(how));
	CHECK(fd >= 0 && ioctl(fd, KVM_GET_API_VERSION, 0) == 12);
	close(fd);
	how[0] = 1ull << 40;
	FAILS(syscall(SYS_openat2, AT_FDCWD, "/dev/kvm", how, sizeof(how)), EINVAL);
}

int main(void)
{
	uint8_t *p =
		mmap(NULL, 3 * T_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	NEED(p != MAP_FAILED && !mprotect(p + T_PAGE, 2 * T_PAGE, PROT_NONE));
	none = p + T_PAGE;
	edge = none - 1;
	T_VM(&v, code_out);
	pointers();
	counts();
	misaligned();
	raw_calls();
	CHECK(t_out(&v) == 0);
	all_numbers();
	return t_done();
}
