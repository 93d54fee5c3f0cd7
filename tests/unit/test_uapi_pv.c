/* SPDX-License-Identifier: MIT */
/*
 * kvmclock, steal time and what else the engine writes into a guest's memory (X3), through KVM's
 * ioctls. With KVMLET_TEST_REAL=1 on the real /dev/kvm, where that can do it.
 */
#include <time.h>

#include "host/thread.h"
#include "uapi_guest.h"

#define WALL_CLOCK_OLD  0x11
#define SYSTEM_TIME_OLD 0x12
#define WALL_CLOCK      0x4b564d00
#define SYSTEM_TIME     0x4b564d01
#define STEAL_TIME      0x4b564d03
#define POLL_CONTROL    0x4b564d05
#define ENABLED         1

#define PAGE_AT   0x6000       /* in the guest's RAM */
#define ELSEWHERE 0x40000000ul /* no slot yet */

#define TSC_STABLE    1
#define GUEST_STOPPED 2
#define PREEMPTED     1
#define FLUSH_TLB     2

struct pvclock {
	uint32_t version, pad;
	uint64_t tsc, ns;
	uint32_t mul;
	int8_t shift;
	uint8_t flags, pad2[2];
};

struct steal {
	uint64_t steal;
	uint32_t version, flags;
	uint8_t preempted, pad[47];
};

static struct guest g;

static int setup(void **state)
{
	(void)state;
	guest_make(&g, false);
	guest_long_mode(&g, 0);
	return 0;
}

static int teardown(void **state)
{
	(void)state;
	guest_free(&g);
	return 0;
}

static void *at(uint64_t gpa)
{
	return g.ram + gpa;
}

/* WRMSR by the guest, then RDTSC, then HLT. False: #GP (there is no IDT: shutdown). */
static bool guest_wrmsr(uint32_t msr, uint64_t data)
{
	static const uint8_t code[] = {0x0f, 0x30, 0x0f, 0x31, 0xf4};
	struct kvm_regs r = guest_get(&g);

	memcpy(g.ram + CODE, code, sizeof(code));
	r.rip = CODE;
	r.rcx = msr;
	r.rax = (uint32_t)data;
	r.rdx = data >> 32;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &r), 0);
	assert_int_equal(guest_run(&g), 0);
	return g.run->exit_reason == KVM_EXIT_HLT;
}

static void run_again(void)
{
	struct kvm_regs r = guest_get(&g);

	g.ram[CODE] = 0xf4;
	r.rip = CODE;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &r), 0);
	assert_exit(&g, KVM_EXIT_HLT);
}

static uint64_t guest_tsc(void)
{
	struct kvm_regs r = guest_get(&g);

	return r.rdx << 32 | (uint32_t)r.rax;
}

static struct kvm_clock_data get_clock(void)
{
	struct kvm_clock_data d;

	assert_int_equal(dev_ioctl_p(&g.vm, KVM_GET_CLOCK, &d), 0);
	return d;
}

static uint64_t to_ns(const struct pvclock *c, uint64_t tsc)
{
	uint64_t d = tsc - c->tsc;

	d = c->shift < 0 ? d >> -c->shift : d << c->shift;
	return c->ns + (uint64_t)((unsigned __int128)d * c->mul >> 32);
}

/* X3: what the guest computes from its page lies between what the program is told around it. */
static void clock_page(void **state)
{
	struct pvclock *c = at(PAGE_AT);
	struct kvm_clock_data before, after;
	uint64_t ns;

	(void)state;
	for (unsigned old = 0; old < 2; old++) {
		memset(c, 0x55, sizeof(*c));
		before = get_clock();
		assert_true(guest_wrmsr(old ? SYSTEM_TIME_OLD : SYSTEM_TIME, PAGE_AT | ENABLED));
		after = get_clock();
		assert_int_equal(c->version & 1, 0);
		ns = to_ns(c, guest_tsc());
		if (!old) { /* the boot vCPU's old clock is not stable */
			assert_int_equal(c->flags & TSC_STABLE, TSC_STABLE);
			assert_in_range(ns, before.clock, after.clock);
		} else {
			assert_int_equal(c->flags & TSC_STABLE, 0);
			assert_int_equal(after.flags, 0);
		}
		assert_int_equal(guest_get_msr(&g, SYSTEM_TIME), PAGE_AT | ENABLED);
		assert_int_equal(guest_get_msr(&g, SYSTEM_TIME_OLD), PAGE_AT | ENABLED);
	}
}

/* X3: the program sets the clock, also by what the time of day was. */
static void set_clock(void **state)
{
	const uint64_t hour = 3600ull * 1000000000;
	struct kvm_clock_data d = {.clock = hour}, now;
	struct pvclock *c = at(PAGE_AT);
	struct timespec ts;
	uint64_t ns;

	(void)state;
	assert_true(guest_wrmsr(SYSTEM_TIME, PAGE_AT | ENABLED));
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_CLOCK, &d), 0);
	run_again();
	now = get_clock();
	assert_in_range(now.clock, hour, hour + hour / 60);
	assert_in_range(c->ns, hour, now.clock);

	clock_gettime(CLOCK_REALTIME, &ts);
	ns = (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
	d.flags = KVM_CLOCK_REALTIME;
	d.realtime = ns - 10 * hour;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_CLOCK, &d), 0);
	now = get_clock();
	assert_in_range(now.clock, 11 * hour, 11 * hour + hour / 60);
	assert_int_equal(now.flags & (KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC),
			 KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC);
	/* A time of day to come is taken as now. */
	d.realtime = ns + 10 * hour;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_CLOCK, &d), 0);
	assert_in_range(get_clock().clock, hour, hour + hour / 60);

	/* The answer may be given back as it is. */
	now = get_clock();
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_CLOCK, &now), 0);
	d.flags = 1;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_CLOCK, &d), -EINVAL);
	assert_int_equal(dev_ioctl(&g.vm, KVM_SET_CLOCK, 8), -EFAULT);
	assert_int_equal(dev_ioctl(&g.vm, KVM_GET_CLOCK, 8), -EFAULT);
}

/* B26: the MSR write succeeds though there is no memory; the page is written when there is. G16 */
static void absent_page(void **state)
{
	struct pvclock *c;
	uint32_t version;

	(void)state;
	assert_true(guest_wrmsr(SYSTEM_TIME, ELSEWHERE | ENABLED));
	assert_true(guest_wrmsr(STEAL_TIME, (ELSEWHERE + 64) | ENABLED));
	c = mmap(NULL, KL_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	assert_int_equal(set_slot(&g, 1, 0, ELSEWHERE, KL_PAGE_SIZE, c), 0);
	assert_int_equal(dev_ioctl(&g.vcpu, KVM_KVMCLOCK_CTRL, 0), 0);
	run_again();
	assert_true(c->version && !(c->version & 1) && c->mul);

	/* It goes and comes back (G17). */
	version = ((struct steal *)(c + 2))->version;
	assert_true(version);
	assert_int_equal(set_slot(&g, 1, 0, ELSEWHERE, 0, c), 0);
	run_again();
	assert_int_equal(((struct steal *)(c + 2))->version, version);
	assert_int_equal(set_slot(&g, 1, 0, ELSEWHERE, KL_PAGE_SIZE, c), 0);
	run_again();
	assert_true(((struct steal *)(c + 2))->version > version);
	munmap(c, KL_PAGE_SIZE);
}

/* A page that cannot be (the area would cross its end) is none, and no error for the guest. */
static void impossible_page(void **state)
{
	uint8_t zero[64] = {0};

	(void)state;
	assert_true(guest_wrmsr(SYSTEM_TIME, (PAGE_AT + KL_PAGE_SIZE - 8) | ENABLED));
	assert_memory_equal(at(PAGE_AT + KL_PAGE_SIZE - 8), zero, 8);
	assert_true(guest_wrmsr(SYSTEM_TIME, PAGE_AT | ENABLED));
	assert_true(((struct pvclock *)at(PAGE_AT))->mul);
	/* Off: nothing is written any more. */
	assert_true(guest_wrmsr(SYSTEM_TIME, PAGE_AT));
	memset(at(PAGE_AT), 0, 32);
	assert_int_equal(dev_ioctl(&g.vcpu, KVM_KVMCLOCK_CTRL, 0), -EINVAL);
	run_again();
	assert_memory_equal(at(PAGE_AT), zero, 32);
}

/* KVM_KVMCLOCK_CTRL: the guest is told once, and keeps the flag until it takes it off. */
static void stopped(void **state)
{
	struct pvclock *c = at(PAGE_AT);
	struct kvm_clock_data d = {.clock = 5};

	(void)state;
	assert_int_equal(dev_ioctl(&g.vcpu, KVM_KVMCLOCK_CTRL, 0), -EINVAL);
	assert_true(guest_wrmsr(SYSTEM_TIME, PAGE_AT | ENABLED));
	assert_int_equal(c->flags & GUEST_STOPPED, 0);
	assert_int_equal(dev_ioctl(&g.vcpu, KVM_KVMCLOCK_CTRL, 0), 0);
	run_again();
	assert_int_equal(c->flags & GUEST_STOPPED, GUEST_STOPPED);
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_CLOCK, &d), 0);
	run_again();
	assert_int_equal(c->flags & GUEST_STOPPED, GUEST_STOPPED);
	c->flags &= (uint8_t)~GUEST_STOPPED;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_CLOCK, &d), 0);
	run_again();
	assert_int_equal(c->flags & GUEST_STOPPED, 0);
}

/* The wall clock is the time of day at clock 0, at any address. */
static void wall_clock(void **state)
{
	static const uint32_t msr[] = {WALL_CLOCK, WALL_CLOCK_OLD};
	uint32_t w[3];
	struct timespec ts;

	(void)state;
	for (unsigned i = 0; i < 2; i++) {
		uint64_t gpa = PAGE_AT + KL_PAGE_SIZE - 2 - 4 * i; /* over the end of a page */

		memset(at(gpa), 0, sizeof(w));
		assert_true(guest_wrmsr(msr[i], gpa));
		memcpy(w, at(gpa), sizeof(w));
		assert_true(w[0] && !(w[0] & 1));
		clock_gettime(CLOCK_REALTIME, &ts);
		assert_in_range(w[1], ts.tv_sec - 600, ts.tv_sec);
		assert_true(w[2] < 1000000000);
		assert_int_equal(guest_get_msr(&g, WALL_CLOCK), gpa);
	}
	assert_true(guest_wrmsr(WALL_CLOCK, ELSEWHERE));
}

/* X3: the version rises with each run, and "preempted" is set in between; a flush is carried out.
 */
static void steal_time(void **state)
{
	struct steal *s = at(PAGE_AT);
	uint32_t version = 0;
	uint64_t steal = 0;

	(void)state;
	if (guest_get_msr(&g, STEAL_TIME) || guest_set_msr(&g, STEAL_TIME, PAGE_AT | ENABLED) != 1)
		skip(); /* the host does not say what its threads waited */
	s->version = 7; /* rubbish */
	for (unsigned i = 0; i < 5; i++) {
		run_again();
		assert_true(s->version > version && !(s->version & 1));
		assert_true(s->steal >= steal);
		assert_int_equal(s->flags, 0);
		assert_int_equal(s->preempted, PREEMPTED);
		version = s->version;
		steal = s->steal;
	}
	assert_int_equal(guest_set_msr(&g, STEAL_TIME, PAGE_AT | 2 | ENABLED), 0);
	assert_int_equal(guest_get_msr(&g, STEAL_TIME), PAGE_AT | ENABLED);
	/* Another page table entry for one page, which the vCPU has in its TLB. */
	{
		static const uint8_t load[] = {0x8b, 0x04, 0x25, 0, 0, 0x20, 0, 0xf4};
		struct kvm_regs r = guest_get(&g);

		memcpy(g.ram + CODE, load, sizeof(load)); /* mov 0x200000, %eax */
		guest_table(&g, PD)[1] = 0x87;            /* to 0 */
		*(uint32_t *)at(0) = 1;
		r.rip = CODE;
		assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &r), 0);
		assert_exit(&g, KVM_EXIT_HLT);
		assert_int_equal(guest_get(&g).rax, 1);
		guest_table(&g, PD)[1] = 0; /* not there any more; the TLB may know it still */
		s->preempted = PREEMPTED | FLUSH_TLB;
		assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &r), 0);
		assert_exit(&g, KVM_EXIT_SHUTDOWN); /* #PF without an IDT */
	}
}

static void poll_control(void **state)
{
	(void)state;
	assert_int_equal(guest_get_msr(&g, POLL_CONTROL), 1);
	assert_true(guest_wrmsr(POLL_CONTROL, 0));
	assert_int_equal(guest_get_msr(&g, POLL_CONTROL), 0);
	assert_int_equal(guest_set_msr(&g, POLL_CONTROL, 2), 0);
	assert_false(guest_wrmsr(POLL_CONTROL, 2));
}

/* KVM_CAP_ENFORCE_PV_FEATURE_CPUID: what CPUID does not name does not exist. */
static void enforced(void **state)
{
	static const uint32_t msr[] = {WALL_CLOCK_OLD, SYSTEM_TIME_OLD, WALL_CLOCK,
				       SYSTEM_TIME,    STEAL_TIME,      POLL_CONTROL};
	struct kvm_enable_cap cap = {.cap = KVM_CAP_ENFORCE_PV_FEATURE_CPUID, .args = {1}};

	(void)state;
	assert_int_equal(guest_set_msr(&g, SYSTEM_TIME, 0), 1);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_ENABLE_CAP, &cap), 0);
	for (unsigned i = 0; i < sizeof(msr) / sizeof(msr[0]); i++)
		assert_int_equal(guest_set_msr(&g, msr[i], 0), 0);
	assert_false(guest_wrmsr(SYSTEM_TIME, PAGE_AT | ENABLED));
	cap.args[0] = 0;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_ENABLE_CAP, &cap), 0);
	assert_int_equal(guest_set_msr(&g, SYSTEM_TIME, 0), 1);
	cap.flags = 1;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_ENABLE_CAP, &cap), -EINVAL);
}

/* Vendor's hypercall instruction, then HLT. */
static uint64_t hypercall(uint64_t nr, uint64_t a0, uint64_t a1)
{
	struct kvm_regs r = guest_get(&g);

	memcpy(g.ram + CODE, "\x0f\x01\xd9\xf4", 4); /* patched where the host is Intel's */
	r.rip = CODE;
	r.rax = nr;
	r.rbx = a0;
	r.rcx = a1;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &r), 0);
	assert_exit(&g, KVM_EXIT_HLT);
	return guest_get(&g).rax;
}

static void clock_pairing(void **state)
{
	struct {
		int64_t sec, nsec;
		uint64_t tsc;
		uint32_t flags, pad[9];
	} p;
	const uint64_t gpa = PAGE_AT + KL_PAGE_SIZE - 12;
	uint64_t tsc = __builtin_ia32_rdtsc();
	struct timespec ts;
	uint64_t zero = 0;

	(void)state;
	assert_int_equal(guest_set_msr(&g, 0x10, zero), 1);
	tsc = guest_get_msr(&g, 0x10);
	assert_int_equal(hypercall(9, gpa, 0), 0);
	memcpy(&p, at(gpa), sizeof(p));
	clock_gettime(CLOCK_REALTIME, &ts);
	assert_in_range(p.sec, ts.tv_sec - 600, ts.tv_sec);
	assert_in_range(p.tsc, tsc, guest_get_msr(&g, 0x10));
	assert_int_equal(p.flags, 0);
	assert_int_equal(hypercall(9, gpa, 1), (uint64_t)-95);
	assert_int_equal(hypercall(9, ELSEWHERE, 0), (uint64_t)-14);
	assert_int_equal(hypercall(11, 0, 0), 0); /* SCHED_YIELD */
	assert_int_equal(hypercall(8, 0, 0), (uint64_t)-1000);
}

/* X3: the clock is stable as long as all vCPUs have one TSC. */
static void two_vcpus(void **state)
{
	struct dev second = make_vcpu(&g.vm, 1);
	struct kvm_clock_data d;

	(void)state;
	assert_int_equal(get_clock().flags & KVM_CLOCK_TSC_STABLE, KVM_CLOCK_TSC_STABLE);
	assert_int_equal(guest_set_msr(&g, 0x10, 1ull << 50), 1);
	d = get_clock();
	assert_int_equal(d.flags, 0);
	assert_true(guest_wrmsr(SYSTEM_TIME, PAGE_AT | ENABLED));
	assert_int_equal(((struct pvclock *)at(PAGE_AT))->flags & TSC_STABLE, 0);
	assert_true(get_clock().clock >= d.clock);
	dev_close(&second);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(clock_page, setup, teardown),
		cmocka_unit_test_setup_teardown(set_clock, setup, teardown),
		cmocka_unit_test_setup_teardown(absent_page, setup, teardown),
		cmocka_unit_test_setup_teardown(impossible_page, setup, teardown),
		cmocka_unit_test_setup_teardown(stopped, setup, teardown),
		cmocka_unit_test_setup_teardown(wall_clock, setup, teardown),
		cmocka_unit_test_setup_teardown(steal_time, setup, teardown),
		cmocka_unit_test_setup_teardown(poll_control, setup, teardown),
		cmocka_unit_test_setup_teardown(enforced, setup, teardown),
		cmocka_unit_test_setup_teardown(clock_pairing, setup, teardown),
		cmocka_unit_test_setup_teardown(two_vcpus, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
