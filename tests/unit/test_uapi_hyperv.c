/* SPDX-License-Identifier: MIT */
/*
 * Hyper-V through KVM's ioctls: CPUID, MSRs, hypercalls, the reference page (X3). With
 * KVMLET_TEST_REAL=1 on the real /dev/kvm, where that can do it.
 */
#include <pthread.h>
#include <sys/eventfd.h>

#include "base/racepoint.h"
#include "uapi_guest.h"

#define GUEST_OS_ID    0x40000000u
#define HYPERCALL      0x40000001u
#define VP_INDEX       0x40000002u
#define RESET          0x40000003u
#define VP_RUNTIME     0x40000010u
#define TIME_REF_COUNT 0x40000020u
#define REFERENCE_TSC  0x40000021u
#define TSC_FREQUENCY  0x40000022u
#define APIC_FREQUENCY 0x40000023u
#define SCONTROL       0x40000080u
#define CRASH_P0       0x40000100u
#define CRASH_CTL      0x40000105u
#define EMU_CONTROL    0x40000107u
#define EMU_STATUS     0x40000108u
#define TSC_INVARIANT  0x40000118u
#define ENABLED        1u

#define PAGE_AT   0x6000u /* in the guest's RAM */
#define INPUT_AT  0x7000u
#define ELSEWHERE 0x40000000ul /* no slot yet */

#define SUCCESS           0u
#define INVALID_CODE      2u
#define INVALID_INPUT     3u
#define INVALID_ALIGNMENT 4u
#define INVALID_PARAMETER 5u
#define ACCESS_DENIED     6u
#define FAST              (1ull << 16)

#define WAIT_MS 10000
#define LEAVES  10u

struct cpuid {
	struct kvm_cpuid2 head;
	struct kvm_cpuid_entry2 e[LEAVES + 2];
};

static struct guest g;

static struct cpuid supported(struct dev *d)
{
	struct cpuid c = {.head.nent = LEAVES};

	assert_int_equal(dev_ioctl_p(d, KVM_GET_SUPPORTED_HV_CPUID, &c), 0);
	return c;
}

static struct kvm_cpuid_entry2 *leaf(struct cpuid *c, uint32_t function)
{
	for (unsigned i = 0; i < c->head.nent; i++)
		if (c->e[i].function == function)
			return &c->e[i];
	fail_msg("no leaf %#x", function);
	return NULL;
}

static int setup(void **state)
{
	struct cpuid c;

	(void)state;
	guest_make(&g, true);
	c = supported(&g.vcpu);
	/* Long mode; wide addresses for what lies ELSEWHERE. */
	c.e[c.head.nent++] = (struct kvm_cpuid_entry2){.function = 0x80000001, .edx = 1u << 29};
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_CPUID2, &c), 0);
	guest_long_mode(&g, 0);
	return 0;
}

static int teardown(void **state)
{
	(void)state;
	guest_free(&g);
	return 0;
}

/* Three bytes of code and an exit, with these registers. */
static void prepare(uint8_t a, uint8_t b, uint8_t c, struct kvm_regs *r)
{
	uint8_t *code = g.ram + CODE;

	code[0] = a;
	code[1] = b;
	code[2] = c;
	code[3] = 0xe6; /* out %al, $0x10 */
	code[4] = 0x10;
	r->rip = CODE;
	r->rsp = STACK;
	r->rflags = 2;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, r), 0);
}

/* By the guest. False: #GP (there is no IDT: shutdown). */
static bool guest_wrmsr(uint32_t msr, uint64_t data)
{
	struct kvm_regs r = {.rcx = msr, .rax = (uint32_t)data, .rdx = data >> 32};

	prepare(0x0f, 0x30, 0x90, &r);
	assert_int_equal(guest_run(&g), 0);
	if (g.run->exit_reason == KVM_EXIT_IO)
		return true;
	assert_int_equal(g.run->exit_reason, KVM_EXIT_SHUTDOWN);
	guest_long_mode(&g, 0);
	return false;
}

static bool guest_rdmsr(uint32_t msr, uint64_t *data)
{
	struct kvm_regs r = {.rcx = msr};

	prepare(0x0f, 0x32, 0x90, &r);
	assert_int_equal(guest_run(&g), 0);
	if (g.run->exit_reason != KVM_EXIT_IO) {
		guest_long_mode(&g, 0);
		return false;
	}
	r = guest_get(&g);
	*data = r.rdx << 32 | (uint32_t)r.rax;
	return true;
}

/* With a call of the page: the engine has put this host's instruction there. */
static void prepare_call(uint64_t input, uint64_t in, uint64_t out)
{
	struct kvm_regs r = {.rcx = input, .rdx = in, .r8 = out, .rbx = PAGE_AT};

	prepare(0xff, 0xd3, 0x90, &r); /* call *%rbx */
}

static uint64_t call(uint64_t input, uint64_t in, uint64_t out)
{
	prepare_call(input, in, out);
	assert_exit(&g, KVM_EXIT_IO);
	return guest_get(&g).rax;
}

static void enable_hypercalls(void)
{
	assert_true(guest_wrmsr(GUEST_OS_ID, 0x5a));
	assert_true(guest_wrmsr(HYPERCALL, PAGE_AT | ENABLED));
}

/* What is offered, of both descriptors; and what else the caller may hand in. */
static void cpuid(void **state)
{
	struct cpuid c = {.head.nent = LEAVES - 1}, sys = supported(&g.kvm);

	(void)state;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_SUPPORTED_HV_CPUID, &c), -E2BIG);
	assert_int_equal(dev_ioctl_p(&g.kvm, KVM_GET_SUPPORTED_HV_CPUID, &c), -E2BIG);
	assert_int_equal(dev_ioctl(&g.vcpu, KVM_GET_SUPPORTED_HV_CPUID, 8), -EFAULT);
	c.head.nent = LEAVES + 2;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_SUPPORTED_HV_CPUID, &c), 0);
	assert_int_equal(c.head.nent, LEAVES);
	assert_memory_equal(c.e, sys.e, LEAVES * sizeof(c.e[0]));
	assert_memory_equal(&leaf(&c, 0x40000000)->ebx, "Linux KVM Hv", 12);
	assert_int_equal(leaf(&c, 0x40000001)->eax, 0x31237648);
	/* No synthetic interrupt controller, no timers, no debugger. */
	assert_int_equal(leaf(&c, 0x40000003)->eax & (1u << 2 | 1u << 3), 0);
	assert_int_equal(leaf(&c, 0x40000003)->ebx & (1u << 4 | 1u << 11), 0);
	assert_int_equal(leaf(&c, 0x40000003)->edx & (1u << 1 | 1u << 11 | 1u << 19), 0);
	assert_int_equal(leaf(&c, 0x40000082)->eax, 0);
}

/* A guest that is not told of Hyper-V finds none; the program can always. */
static void unknown(void **state)
{
	struct cpuid c = {.head.nent = 1, .e[0] = {.function = 0x80000001, .edx = 1u << 29}};

	(void)state;
	/* Not fixed yet: setup() has not run it. */
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_CPUID2, &c), 0);
	assert_false(guest_wrmsr(GUEST_OS_ID, 1));
	assert_int_equal(guest_set_msr(&g, GUEST_OS_ID, 7), 1);
	assert_int_equal(guest_get_msr(&g, GUEST_OS_ID), 7);
}

/* Each MSR that is offered, as the guest and as the program see it. */
static void msrs(void **state)
{
	uint64_t val, again;

	(void)state;
	assert_true(guest_rdmsr(VP_INDEX, &val));
	assert_int_equal(val, 0);
	assert_false(guest_wrmsr(VP_INDEX, 0));
	assert_int_equal(guest_set_msr(&g, VP_INDEX, 1024), 0);
	assert_int_equal(guest_set_msr(&g, VP_INDEX, 5), 1);
	assert_true(guest_rdmsr(VP_INDEX, &val));
	assert_int_equal(val, 5);

	assert_false(guest_wrmsr(VP_RUNTIME, 0));
	assert_int_equal(guest_set_msr(&g, VP_RUNTIME, 1ull << 40), 1);
	assert_true(guest_rdmsr(VP_RUNTIME, &val));
	assert_true(val >= 1ull << 40);
	assert_true(guest_rdmsr(VP_RUNTIME, &again));
	assert_true(again >= val);

	assert_true(guest_rdmsr(TSC_FREQUENCY, &val));
	assert_int_equal(val / 1000, dev_ioctl(&g.vcpu, KVM_GET_TSC_KHZ, 0));
	assert_false(guest_wrmsr(TSC_FREQUENCY, val));
	assert_int_equal(guest_set_msr(&g, TSC_FREQUENCY, 1), 1);
	assert_true(guest_rdmsr(APIC_FREQUENCY, &val));
	assert_int_equal(val, 1000000000);

	assert_true(guest_wrmsr(CRASH_P0 + 4, 99));
	assert_int_equal(guest_get_msr(&g, CRASH_P0 + 4), 99);
	assert_true(guest_wrmsr(EMU_CONTROL, 1));
	assert_int_equal(guest_get_msr(&g, EMU_CONTROL), 1);
	assert_false(guest_wrmsr(EMU_STATUS, 1));
	assert_int_equal(guest_set_msr(&g, EMU_STATUS, 1), 1);
	assert_true(guest_wrmsr(EMU_STATUS, 0));

	assert_false(guest_wrmsr(TSC_INVARIANT, 2));
	assert_true(guest_wrmsr(TSC_INVARIANT, 1));
	assert_false(guest_wrmsr(TSC_INVARIANT, 0));
	assert_int_equal(guest_set_msr(&g, TSC_INVARIANT, 0), 1);

	/* What is not offered is not there. */
	assert_false(guest_rdmsr(SCONTROL, &val));
}

/* Exits to the program: a crash, a reset. */
static void system_events(void **state)
{
	struct kvm_regs r = {.rcx = CRASH_CTL, .rdx = 1u << 31};

	(void)state;
	prepare(0x0f, 0x30, 0x90, &r);
	assert_exit(&g, KVM_EXIT_SYSTEM_EVENT);
	assert_int_equal(g.run->system_event.type, KVM_SYSTEM_EVENT_CRASH);
	assert_int_equal(guest_get(&g).rip, CODE + 2);
	assert_exit(&g, KVM_EXIT_IO);
	/* The program's value says what it can do, and is no crash. */
	assert_int_equal(guest_set_msr(&g, CRASH_CTL, ~0ull), 1);
	assert_true(guest_get_msr(&g, CRASH_CTL) == 1ull << 63);

	r = (struct kvm_regs){.rcx = RESET, .rax = 1};
	prepare(0x0f, 0x30, 0x90, &r);
	assert_exit(&g, KVM_EXIT_SYSTEM_EVENT);
	assert_int_equal(g.run->system_event.type, KVM_SYSTEM_EVENT_RESET);
	assert_exit(&g, KVM_EXIT_IO);
}

/* D3, B26: the page is written as guest memory is; what it lies in decides what the guest gets. */
static void hypercall_page(void **state)
{
	uint8_t *more =
		mmap(NULL, 0x1000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct kvm_dirty_log log = {.slot = 2};
	struct kvm_regs r = {.rcx = HYPERCALL, .rax = ELSEWHERE | ENABLED};
	uint64_t bits = 0;

	(void)state;
	assert_true(more != MAP_FAILED);
	log.dirty_bitmap = &bits;
	/* Without a name of the system nothing happens. */
	assert_true(guest_wrmsr(HYPERCALL, ELSEWHERE | ENABLED));
	assert_int_equal(guest_get_msr(&g, HYPERCALL), 0);
	assert_true(guest_wrmsr(GUEST_OS_ID, 1));
	assert_false(guest_wrmsr(HYPERCALL, ELSEWHERE | ENABLED));
	assert_int_equal(guest_get_msr(&g, HYPERCALL), 0);
	assert_int_equal(set_slot(&g, 2, KVM_MEM_LOG_DIRTY_PAGES, ELSEWHERE, 0x1000, more), 0);
	assert_true(guest_wrmsr(HYPERCALL, ELSEWHERE | ENABLED));
	assert_int_equal(guest_get_msr(&g, HYPERCALL), ELSEWHERE | ENABLED);
	assert_int_equal(more[0], 0x0f);
	assert_int_equal(more[1], 0x01);
	assert_int_equal(more[3], 0xc3);
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_GET_DIRTY_LOG, &log), 0);
	assert_int_equal(bits, 1);
	/* That the host lacks the page is the program's matter, not the guest's. */
	assert_int_equal(mprotect(more, 0x1000, PROT_NONE), 0);
	prepare(0x0f, 0x30, 0x90, &r);
	assert_int_equal(guest_run(&g), -EFAULT);
	assert_int_equal(guest_get(&g).rip, CODE);
	assert_int_equal(mprotect(more, 0x1000, PROT_READ | PROT_WRITE), 0);
	assert_exit(&g, KVM_EXIT_IO);
	/* Without a name there are no hypercalls. */
	assert_true(guest_wrmsr(GUEST_OS_ID, 0));
	assert_int_equal(guest_get_msr(&g, HYPERCALL), ELSEWHERE);
	munmap(more, 0x1000);
}

/* Statuses of what the guest may do wrong. */
static void statuses(void **state)
{
	uint64_t *input = (uint64_t *)(void *)(g.ram + INPUT_AT);

	(void)state;
	enable_hypercalls();
	assert_int_equal(call(0xbeef, 0, 0), INVALID_CODE);
	assert_int_equal(call(0x5c, 0, 0), INVALID_INPUT);
	assert_int_equal(call(0x5d, 4, 0), INVALID_ALIGNMENT);
	assert_int_equal(call(0x5d, ELSEWHERE, 0), INVALID_ALIGNMENT);
	assert_int_equal(call(0x6b, 0, 0), INVALID_CODE);
	assert_int_equal(call(0x69 | FAST, 0, 0), INVALID_PARAMETER);
	assert_int_equal(call(8 | 1ull << 27, 0, 0), INVALID_INPUT);
	assert_int_equal(call(8 | 1ull << 32, 0, 0), INVALID_INPUT);
	assert_int_equal(call(8, 0, 0), SUCCESS);
	/* Flushes: everybody; of a list of three; of processors in banks. */
	memset(input, 0, 64);
	assert_int_equal(call(2, INPUT_AT, 0), SUCCESS);
	assert_int_equal(call(2, ELSEWHERE, 0), INVALID_INPUT);
	assert_int_equal(call(2 | 1ull << 32, INPUT_AT, 0), INVALID_INPUT);
	assert_int_equal(call(3, INPUT_AT, 0), INVALID_INPUT);
	assert_int_equal(call(3 | 3ull << 32, INPUT_AT, 0), 3ull << 32);
	input[3] = 5;
	assert_int_equal(call(0x13 | 1ull << 17, INPUT_AT, 0), INVALID_INPUT);
	assert_int_equal(call(0x13 | 2ull << 17, INPUT_AT, 0), SUCCESS);
	/* Interrupts. */
	memset(input, 0, 64);
	assert_int_equal(call(0xb, INPUT_AT, 0), INVALID_INPUT); /* vector 0 */
	assert_int_equal(call(0xb | FAST, 0x1000000020, 1), INVALID_INPUT);
	assert_int_equal(call(0xb | FAST, 0x20, 2), SUCCESS); /* to nobody */
	assert_int_equal(call(0x15, INPUT_AT, 0), SUCCESS);
	/* Privilege. */
	guest_long_mode(&g, 3);
	prepare_call(8, 0, 0);
	assert_int_equal(guest_run(&g), 0);
	assert_int_equal(g.run->exit_reason, KVM_EXIT_SHUTDOWN);
}

/* An interrupt reaches the processors that are named, by their index. */
static void ipi(void **state)
{
	struct kvm_lapic_state lapic;
	uint32_t irr;

	(void)state;
	enable_hypercalls();
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_LAPIC, &lapic), 0);
	memcpy(&irr, lapic.regs + 0xf0, 4);
	irr |= 0x100; /* software enable */
	memcpy(lapic.regs + 0xf0, &irr, 4);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_LAPIC, &lapic), 0);
	assert_int_equal(guest_set_msr(&g, VP_INDEX, 70), 1);
	assert_int_equal(call(0xb | FAST, 0x41, 1), SUCCESS);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_LAPIC, &lapic), 0);
	memcpy(&irr, lapic.regs + 0x220, 4);
	assert_int_equal(irr, 0);
	((uint64_t *)(void *)(g.ram + INPUT_AT))[0] = 0x41;
	((uint64_t *)(void *)(g.ram + INPUT_AT))[1] = 0;
	((uint64_t *)(void *)(g.ram + INPUT_AT))[2] = 2; /* the second bank */
	((uint64_t *)(void *)(g.ram + INPUT_AT))[3] = 1u << (70 - 64);
	assert_int_equal(call(0x15 | 1ull << 17, INPUT_AT, 0), SUCCESS);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_LAPIC, &lapic), 0);
	memcpy(&irr, lapic.regs + 0x220, 4);
	assert_int_equal(irr, 2);
}

/* Calls that the program answers. */
static void to_the_program(void **state)
{
	(void)state;
	enable_hypercalls();
	prepare_call(0x8001, 0x1230, 0x4560);
	assert_exit(&g, KVM_EXIT_HYPERV);
	assert_int_equal(g.run->hyperv.type, KVM_EXIT_HYPERV_HCALL);
	assert_int_equal(g.run->hyperv.u.hcall.input, 0x8001);
	assert_int_equal(g.run->hyperv.u.hcall.params[0], 0x1230);
	assert_int_equal(g.run->hyperv.u.hcall.params[1], 0x4560);
	g.run->hyperv.u.hcall.result = 0x77;
	assert_exit(&g, KVM_EXIT_IO);
	assert_int_equal(guest_get(&g).rax, 0x77);
	assert_int_equal(call(0x8041 | FAST, 0, 0), INVALID_PARAMETER);
	assert_int_equal(call(0x8042, 0, 0), INVALID_CODE);
}

/* KVM_HYPERV_EVENTFD and the hypercall that signals it. */
static void events(void **state)
{
	struct kvm_hyperv_eventfd e = {.conn_id = 7, .fd = eventfd(0, EFD_NONBLOCK)};
	struct kvm_hyperv_eventfd bad = e;
	uint64_t n = 0;

	(void)state;
	enable_hypercalls();
	assert_int_equal(call(0x5d | FAST, 7, 0), INVALID_INPUT);
	bad.flags = 2;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_HYPERV_EVENTFD, &bad), -EINVAL);
	bad = (struct kvm_hyperv_eventfd){.conn_id = 1u << 24, .fd = e.fd};
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_HYPERV_EVENTFD, &bad), -EINVAL);
	bad = (struct kvm_hyperv_eventfd){.conn_id = 7, .fd = -1};
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_HYPERV_EVENTFD, &bad), -EBADF);
	bad.flags = KVM_HYPERV_EVENTFD_DEASSIGN;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_HYPERV_EVENTFD, &bad), -ENOENT);
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_HYPERV_EVENTFD, &e), 0);
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_HYPERV_EVENTFD, &e), -EEXIST);
	assert_int_equal(call(0x5d | FAST, 7, 0), SUCCESS);
	assert_int_equal(call(0x5d | FAST, 7 | 1ull << 32, 0), INVALID_INPUT);
	assert_int_equal(read(e.fd, &n, sizeof(n)), sizeof(n));
	assert_int_equal(n, 1);
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_HYPERV_EVENTFD, &bad), 0);
	assert_int_equal(call(0x5d | FAST, 7, 0), INVALID_INPUT);
	/* What is left goes with the VM. */
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_HYPERV_EVENTFD, &e), 0);
	close(e.fd);
}

/* KVM_CAP_HYPERV_ENFORCE_CPUID: the guest has what its CPUID says. */
static void enforced(void **state)
{
	struct kvm_enable_cap cap = {.cap = KVM_CAP_HYPERV_ENFORCE_CPUID, .args[0] = 1};
	struct cpuid c = supported(&g.vcpu);
	uint64_t val;

	(void)state;
	c.e[c.head.nent++] = (struct kvm_cpuid_entry2){.function = 0x80000001, .edx = 1u << 29};
	leaf(&c, 0x40000003)->eax = 1u << 5; /* hypercalls, and nothing else */
	leaf(&c, 0x40000003)->ebx = leaf(&c, 0x40000003)->edx = 0;
	leaf(&c, 0x40000004)->eax = leaf(&c, 0x40000004)->ebx = 0;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_CPUID2, &c), 0);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_ENABLE_CAP, &cap), 0);
	enable_hypercalls();
	assert_false(guest_rdmsr(VP_INDEX, &val));
	assert_false(guest_rdmsr(TIME_REF_COUNT, &val));
	assert_false(guest_wrmsr(CRASH_P0, 1));
	assert_int_equal(call(8, 0, 0), ACCESS_DENIED);
	assert_int_equal(call(2, INPUT_AT, 0), ACCESS_DENIED);
	assert_int_equal(call(0xb, INPUT_AT, 0), ACCESS_DENIED);
	assert_int_equal(call(0x8001, 0, 0), ACCESS_DENIED);
	assert_int_equal(call(0xbeef, 0, 0), INVALID_CODE);
	cap.args[0] = 0;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_ENABLE_CAP, &cap), 0);
	assert_int_equal(call(8, 0, 0), SUCCESS);
}

/* ---- the reference page ------------------------------------------------------------------- */

struct page {
	uint32_t sequence, reserved;
	uint64_t scale, offset;
};

static struct page *page(void)
{
	return (struct page *)(void *)(g.ram + PAGE_AT);
}

/* What the guest computes, and what the counter says before and after. */
static void page_agrees(void)
{
	const uint8_t code[] = {0x0f, 0x32, 0x89, 0xc6, 0x89, 0xd7, /* rdmsr; esi, edi */
				0x0f, 0x31, 0xe6, 0x10};            /* rdtsc; out */
	struct kvm_regs r = {.rcx = TIME_REF_COUNT, .rip = CODE, .rflags = 2};
	uint64_t before, t;

	memcpy(g.ram + CODE, code, sizeof(code));
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &r), 0);
	assert_exit(&g, KVM_EXIT_IO);
	r = guest_get(&g);
	before = r.rdi << 32 | (uint32_t)r.rsi;
	t = (uint64_t)((unsigned __int128)(r.rdx << 32 | (uint32_t)r.rax) * page()->scale >> 64) +
	    page()->offset;
	assert_in_range(t, before, guest_get_msr(&g, TIME_REF_COUNT));
}

/* The counter is kvmclock, up to a microsecond. */
static void counter_is_the_clock(void)
{
	struct kvm_clock_data before, after;
	uint64_t t;

	assert_int_equal(dev_ioctl_p(&g.vm, KVM_GET_CLOCK, &before), 0);
	t = guest_get_msr(&g, TIME_REF_COUNT);
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_GET_CLOCK, &after), 0);
	assert_in_range(t + 10, before.clock / 100, after.clock / 100 + 20);
}

/* X3: the guest's time from the page and the counter agree, also after the clock is set. */
static void reference_time(void **state)
{
	struct kvm_clock_data d = {.clock = 0};
	uint64_t t, offset, n;

	(void)state;
	assert_true(guest_rdmsr(TIME_REF_COUNT, &t));
	assert_false(guest_wrmsr(TIME_REF_COUNT, 0));
	assert_true(guest_wrmsr(REFERENCE_TSC, PAGE_AT | ENABLED));
	assert_int_not_equal(page()->sequence, 0);
	page_agrees();
	counter_is_the_clock();
	offset = page()->offset;
	n = page()->sequence;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_CLOCK, &d), 0);
	assert_true(guest_rdmsr(TIME_REF_COUNT, &t));
	assert_true(page()->offset != offset);
	assert_int_not_equal(page()->sequence, n);
	assert_true(t < 600000000); /* a minute */
	page_agrees();
	/* A guest that emulates its TSC for a while has the page as it is. */
	assert_true(guest_wrmsr(EMU_CONTROL, 1));
	offset = page()->offset;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_CLOCK, &d), 0);
	page_agrees();
	assert_true(page()->offset == offset);
	/* Away. */
	assert_true(guest_wrmsr(REFERENCE_TSC, 0));
	memset(page(), 0, sizeof(struct page));
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_CLOCK, &d), 0);
	assert_true(guest_rdmsr(TIME_REF_COUNT, &t));
	assert_int_equal(page()->sequence, 0);
	/* Where no memory is, the guest has the counter. */
	assert_true(guest_wrmsr(REFERENCE_TSC, ELSEWHERE | ENABLED));
	assert_true(guest_rdmsr(TIME_REF_COUNT, &t));
	assert_int_equal(guest_get_msr(&g, REFERENCE_TSC), ELSEWHERE | ENABLED);
}

static void *enable_page(void *arg)
{
	(void)arg;
	assert_true(guest_wrmsr(REFERENCE_TSC, PAGE_AT | ENABLED));
	return NULL;
}

/*
 * X3: the clock is set between the moment that a vCPU has taken it and the moment that the page is
 * valid. The page must not stay what it would have been.
 */
static void set_clock_at(const char *place)
{
	struct kvm_clock_data d = {.clock = 3600ull * 1000000000};
	pthread_t t;

	if (!kl_racepoints_enabled())
		skip();
	kl_racepoint_arm(place, 1);
	pthread_create(&t, NULL, enable_page, NULL);
	assert_true(kl_racepoint_wait(place, WAIT_MS));
	assert_int_equal(page()->sequence, 0);
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_CLOCK, &d), 0);
	kl_racepoint_release(place);
	pthread_join(t, NULL);
	page_agrees();
	assert_true(guest_get_msr(&g, TIME_REF_COUNT) >= d.clock / 100);
	counter_is_the_clock();
}

static void clock_set_meanwhile(void **state)
{
	(void)state;
	set_clock_at("hv-tsc-page");
}

/* X3: the same, between the moment that it has read the clock and the moment that it begins. */
static void clock_set_before(void **state)
{
	(void)state;
	set_clock_at("pv-clock");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(cpuid, setup, teardown),
		cmocka_unit_test_setup_teardown(unknown, setup, teardown),
		cmocka_unit_test_setup_teardown(msrs, setup, teardown),
		cmocka_unit_test_setup_teardown(system_events, setup, teardown),
		cmocka_unit_test_setup_teardown(hypercall_page, setup, teardown),
		cmocka_unit_test_setup_teardown(statuses, setup, teardown),
		cmocka_unit_test_setup_teardown(ipi, setup, teardown),
		cmocka_unit_test_setup_teardown(events, setup, teardown),
		cmocka_unit_test_setup_teardown(to_the_program, setup, teardown),
		cmocka_unit_test_setup_teardown(enforced, setup, teardown),
		cmocka_unit_test_setup_teardown(reference_time, setup, teardown),
		cmocka_unit_test_setup_teardown(clock_set_meanwhile, setup, teardown),
		cmocka_unit_test_setup_teardown(clock_set_before, setup, teardown),
	};

	cmocka_set_test_filter(getenv("KVMLET_TEST"));
	return cmocka_run_group_tests(tests, NULL, NULL);
}
