/* SPDX-License-Identifier: MIT */
/*
 * KVM_TPR_ACCESS_REPORTING, and the vapic page (X3): a task priority in the guest's memory. A real
 * /dev/kvm shows neither where the processor has a task priority for guests.
 */
#include "uapi_guest.h"

#define APIC      0xfee00000u
#define TPR       (APIC + 0x80)
#define PAGE_AT   0x6000u
#define SEEN      0x7000u
#define COUNT     0x7010u
#define ELSEWHERE 0x40000000ul /* no slot */
#define READONLY  0x200000ul
#define TOP       0xfffff000ul
#define IDT       0x9000u
#define HANDLER   0xa000u
#define VECTOR    0x41u
#define HIGHER    0x52u
#define PORT      0x10
#define X2APIC_ID 0x808u

static struct guest g;

#define LE32(x) (uint8_t)(x), (uint8_t)((x) >> 8), (uint8_t)((x) >> 16), (uint8_t)((x) >> 24)

/* 32-bit instructions */
#define STORE(at, val)    0xc7, 0x05, LE32(at), LE32(val) /* movl $val, at */
#define STORE_BYTE(at, b) 0xc6, 0x05, LE32(at), b         /* movb $b, at */
#define LOAD(at)          0xa1, LE32(at)                  /* mov at, %eax */
#define SAVE(at)          0xa3, LE32(at)                  /* mov %eax, at */
#define OUT               0xe6, PORT                      /* out %al, $PORT */
#define POLL              0xb8, LE32(1), 0x0f, 0x01, 0xc1 /* mov $1, %eax; vmcall */
#define STI               0xfb
#define IRET              0xcf

/* Flat 32-bit code without paging; its APIC is on. */
static int setup(void **state)
{
	const struct kvm_segment data = {
		.limit = ~0u, .selector = 0x10, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1};
	struct kvm_lapic_state lapic;
	struct kvm_sregs s;
	uint64_t *gdt;

	(void)state;
	guest_make(&g, true);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_SREGS, &s), 0);
	s.ds = s.es = s.fs = s.gs = s.ss = s.cs = data;
	s.cs.selector = 8;
	s.cs.type = 11;
	s.cr0 |= 1;
	s.idt.base = IDT;
	s.idt.limit = 0x7ff;
	s.gdt.base = IDT - 0x100;
	s.gdt.limit = 23;
	gdt = (uint64_t *)(void *)(g.ram + IDT - 0x100);
	gdt[1] = 0x00cf9b000000ffff;
	gdt[2] = 0x00cf93000000ffff;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_SREGS, &s), 0);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_LAPIC, &lapic), 0);
	lapic.regs[0xf1] |= 1;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_LAPIC, &lapic), 0);
	for (unsigned v = 0; v < 256; v++)
		guest_table(&g, IDT)[v] = HANDLER | 8ull << 16 | 0x8e00ull << 32;
	return 0;
}

static int teardown(void **state)
{
	(void)state;
	guest_free(&g);
	return 0;
}

static void put_code(uint64_t at, const uint8_t *code, size_t len)
{
	memcpy(g.ram + at, code, len);
}

static void begin(void)
{
	struct kvm_regs r = {.rip = CODE, .rsp = STACK, .rflags = 2};

	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &r), 0);
}

#define PUT(at, ...)                                          \
	do {                                                  \
		static const uint8_t code_[] = {__VA_ARGS__}; \
		put_code(at, code_, sizeof(code_));           \
	} while (0)
#define EXECUTE(...)                    \
	do {                            \
		PUT(CODE, __VA_ARGS__); \
		begin();                \
	} while (0)

static long set_vapic(uint64_t addr)
{
	struct kvm_vapic_addr va = {.vapic_addr = addr};

	return dev_ioctl_p(&g.vcpu, KVM_SET_VAPIC_ADDR, &va);
}

static void report(bool on)
{
	struct kvm_tpr_access_ctl ctl = {.enabled = on};

	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_TPR_ACCESS_REPORTING, &ctl), 0);
}

static void assert_reported(uint64_t rip, bool is_write)
{
	assert_exit(&g, KVM_EXIT_TPR_ACCESS);
	assert_int_equal(g.run->tpr_access.rip, rip);
	assert_int_equal(g.run->tpr_access.is_write, is_write);
}

static uint32_t word_at(unsigned at)
{
	uint32_t word;

	memcpy(&word, g.ram + at, 4);
	return word;
}

#define assert_port(at)                               \
	do {                                          \
		assert_exit(&g, KVM_EXIT_IO);         \
		assert_int_equal(g.run->io.port, at); \
	} while (0)

static uint32_t apic_reg(unsigned reg)
{
	struct kvm_lapic_state lapic;
	uint32_t val;

	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_LAPIC, &lapic), 0);
	memcpy(&val, lapic.regs + reg, 4);
	return val;
}

static void signal_msi(unsigned vector)
{
	struct kvm_msi msi = {.address_lo = APIC, .data = vector};

	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SIGNAL_MSI, &msi), 1);
}

/* ---- reports ---- */

static void errors(void **state)
{
	struct kvm_tpr_access_ctl ctl = {.enabled = 1, .flags = 1};
	struct kvm_vapic_addr va = {0};
	struct dev kvm = open_kvm(), vm = make_vm(&kvm), vcpu = make_vcpu(&vm, 0);

	(void)state;
	assert_int_equal(dev_ioctl(&g.vm, KVM_CHECK_EXTENSION, KVM_CAP_VAPIC), 1);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_TPR_ACCESS_REPORTING, &ctl), -EINVAL);
	assert_int_equal(dev_ioctl(&g.vcpu, KVM_TPR_ACCESS_REPORTING, 0), -EFAULT);
	ctl.flags = 0;
	ctl.enabled = 7;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_TPR_ACCESS_REPORTING, &ctl), 0);
	assert_int_equal(ctl.enabled, 7);
	/* Without an APIC there is nothing to report; there is no page either. */
	assert_int_equal(dev_ioctl_p(&vcpu, KVM_TPR_ACCESS_REPORTING, &ctl), 0);
	assert_int_equal(dev_ioctl_p(&vcpu, KVM_SET_VAPIC_ADDR, &va), -EINVAL);
	assert_int_equal(dev_ioctl(&vcpu, KVM_SET_VAPIC_ADDR, 0), -EINVAL);
	assert_int_equal(dev_ioctl(&g.vcpu, KVM_SET_VAPIC_ADDR, 0), -EFAULT);
	assert_int_equal(set_vapic(0), 0);
	assert_int_equal(set_slot(&g, 1, KVM_MEM_READONLY, READONLY, 0x1000, g.ram), 0);
	assert_int_equal(set_vapic(ELSEWHERE), -EINVAL);
	assert_int_equal(set_vapic(READONLY), -EINVAL);
	assert_int_equal(set_vapic(RAM - 2), -EINVAL); /* half of it is nowhere */
	assert_int_equal(set_vapic(UINT64_MAX), -EINVAL);
	assert_int_equal(set_vapic(RAM - 4), 0);
	dev_close(&vcpu);
	dev_close(&vm);
	dev_close(&kvm);
}

/* The access is done, and the exit says which instruction made it. */
static void accesses(void **state)
{
	(void)state;
	report(true);
	EXECUTE(0x90, STORE(TPR, 0x35), OUT);
	assert_reported(CODE + 1, true);
	assert_int_equal(guest_get(&g).rip, CODE + 11);
	assert_int_equal(g.run->cr8, 3);
	assert_port(PORT);
	EXECUTE(LOAD(TPR), OUT);
	assert_reported(CODE, false);
	assert_int_equal(guest_get(&g).rax, 0x35);
	assert_port(PORT);
	/* The last access of one that reads and writes; of a byte; of no other register. */
	EXECUTE(0x83, 0x0d, LE32(TPR), 0x40, 0xa0, LE32(TPR + 1), LOAD(APIC + 0x90),
		STORE(APIC + 0xb0, 0), OUT); /* orl $0x40; mov TPR + 1, %al */
	assert_reported(CODE, true);
	assert_reported(CODE + 7, false);
	assert_port(PORT);
	assert_int_equal(apic_reg(0x80), 0x75);
	/* Neither one that the APIC ignores. */
	EXECUTE(STORE_BYTE(TPR, 1), OUT);
	assert_port(PORT);
	report(false);
	EXECUTE(STORE(TPR, 0x10), LOAD(TPR), OUT);
	assert_port(PORT);
	assert_int_equal(g.run->cr8, 1);
}

/* By a push, too, which rip does not show, and in another segment. */
static void strange_accesses(void **state)
{
	struct kvm_regs r = {.rip = CODE, .rsp = TPR + 4, .rflags = 2};

	(void)state;
	report(true);
	PUT(CODE, 0x6a, 0x20, OUT); /* push $0x20 */
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &r), 0);
	assert_reported(CODE, true);
	assert_int_equal(apic_reg(0x80), 0x20);
	assert_port(PORT);
	/* call: rip is elsewhere when it is done */
	r.rsp = TPR + 4;
	PUT(CODE, 0xe8, LE32(0x20));
	PUT(CODE + 0x25, OUT);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &r), 0);
	assert_reported(CODE, true);
	assert_int_equal(guest_get(&g).rip, CODE + 0x25);
	assert_port(PORT);
}

/* x2APIC's register is the same; CR8 is not reported. */
static void by_msr(void **state)
{
	struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[100];
	} cpuid = {.head.nent = 100};
	struct kvm_sregs s;

	(void)state;
	assert_int_equal(dev_ioctl_p(&g.kvm, KVM_GET_SUPPORTED_CPUID, &cpuid), 0);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_CPUID2, &cpuid), 0);
	guest_long_mode(&g, 0);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_SREGS, &s), 0);
	s.apic_base |= 0xc00;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_SREGS, &s), 0);
	report(true);
	/* mov $X2APIC_ID, %ecx; mov $0x60, %eax; xor %edx, %edx; wrmsr; rdmsr; mov %rax, %cr8 */
	EXECUTE(0xb9, LE32(X2APIC_ID), 0xb8, LE32(0x60), 0x31, 0xd2, 0x0f, 0x30, 0x0f, 0x32, 0x31,
		0xc0, 0x44, 0x0f, 0x22, 0xc0, OUT);
	assert_reported(CODE + 12, true);
	assert_int_equal(g.run->cr8, 6);
	assert_reported(CODE + 14, false);
	assert_int_equal(guest_get(&g).rax, 0x60);
	assert_int_equal(guest_get(&g).rip, CODE + 16);
	assert_port(PORT);
	assert_int_equal(g.run->cr8, 0);
}

/* ---- the page ---- */

/* The guest sees its priority, what is in service and requested, and sets the first. */
static void word(void **state)
{
	(void)state;
	assert_int_equal(set_vapic(PAGE_AT), 0);
	EXECUTE(STORE(TPR, 0x31), LOAD(PAGE_AT), SAVE(SEEN), STORE_BYTE(PAGE_AT, 0x57), OUT);
	signal_msi(VECTOR); /* interrupts are off */
	assert_port(PORT);
	assert_int_equal(word_at(SEEN), VECTOR << 24 | 0x31);
	assert_int_equal(apic_reg(0x80), 0x57);
	assert_int_equal(apic_reg(0xa0), 0x57);
	assert_int_equal(g.run->cr8, 5);
	/* In the handler, with another one requested. */
	PUT(HANDLER, LOAD(PAGE_AT), SAVE(SEEN), OUT);
	EXECUTE(STORE_BYTE(PAGE_AT, 0x20), STI, 0x90, 0xf4);
	signal_msi(HIGHER);
	assert_port(PORT);
	assert_int_equal(word_at(SEEN), VECTOR << 24 | (HIGHER & 0xf0) << 8 | 0x20);
}

/* What the byte holds back comes when the guest lowers it and asks. */
static void masks(void **state)
{
	(void)state;
	assert_int_equal(set_vapic(PAGE_AT), 0);
	PUT(HANDLER, 0xff, 0x05, LE32(COUNT), OUT, IRET); /* incl COUNT */
	PUT(CODE, STORE_BYTE(PAGE_AT, 0x50), STI, 0x90, 0xe6, PORT + 1, LOAD(PAGE_AT), SAVE(SEEN),
	    0xe6, PORT + 2);
	begin();
	assert_port(PORT + 1);
	signal_msi(VECTOR);
	assert_port(PORT + 2);
	assert_int_equal(word_at(SEEN), VECTOR << 24 | 0x50);
	/* At once, and not at the next exit. (VMCALL may be the other vendor's, the first time.) */
	PUT(CODE, STI, 0x90, STORE_BYTE(PAGE_AT, 0x50), POLL, LOAD(COUNT), SAVE(SEEN), 0xe6,
	    PORT + 1);
	begin();
	assert_port(PORT + 1);
	g.ram[CODE + 8] = 0x30;
	begin();
	assert_port(PORT);
	assert_port(PORT + 1);
	assert_int_equal(word_at(SEEN), 1);
	/* A request of a lower class than what the byte says does not end HLT; the timer's does. */
	PUT(CODE, STORE(APIC + 0x320, HIGHER + 0x10), STI, STORE_BYTE(PAGE_AT, 0x50),
	    STORE(APIC + 0x380, 0x1000), 0xf4, 0xe6, PORT + 1);
	begin();
	signal_msi(VECTOR);
	assert_port(PORT);
	assert_true(apic_reg(0x200 + VECTOR / 32 * 16) & 1u << VECTOR % 32);
}

/* The last way that it was set in is the one that counts. */
static void other_ways(void **state)
{
	(void)state;
	assert_int_equal(set_vapic(PAGE_AT), 0);
	EXECUTE(STORE_BYTE(PAGE_AT, 0x70), STORE(TPR, 0x20), LOAD(PAGE_AT), SAVE(SEEN), OUT);
	assert_port(PORT);
	assert_int_equal(word_at(SEEN), 0x20);
	assert_int_equal(apic_reg(0x80), 0x20);
	/* The register is what the byte says. */
	EXECUTE(STORE_BYTE(PAGE_AT, 0x70), LOAD(TPR), SAVE(SEEN), OUT);
	assert_port(PORT);
	assert_int_equal(word_at(SEEN), 0x70);
	/* CR8, too: mov $4, %eax; mov %rax, %cr8; mov PAGE_AT, %eax; mov %eax, SEEN */
	guest_long_mode(&g, 0);
	EXECUTE(0xb8, LE32(4), 0x44, 0x0f, 0x22, 0xc0, 0x8b, 0x04, 0x25, LE32(PAGE_AT), 0x89, 0x04,
		0x25, LE32(SEEN), OUT);
	assert_port(PORT);
	assert_int_equal(word_at(SEEN), 0x40);
	assert_int_equal(g.run->cr8, 4);
}

/* X3: the page moves, goes and comes back; without it the priority stays. D3: it is in the log. */
static void page_goes(void **state)
{
	struct kvm_dirty_log log = {.slot = 0};
	uint64_t bits[RAM / 0x1000 / 64 + 1] = {0};

	(void)state;
	assert_int_equal(set_slot(&g, 0, KVM_MEM_LOG_DIRTY_PAGES, 0, RAM, g.ram), 0);
	log.dirty_bitmap = bits;
	assert_int_equal(set_vapic(PAGE_AT), 0);
	EXECUTE(0x90, OUT); /* not where the last exit was */
	assert_port(PORT);
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_GET_DIRTY_LOG, &log), 0);
	assert_true(bits[0] & 1ull << PAGE_AT / 0x1000);
	/* Over the end of a page. */
	assert_int_equal(set_vapic(PAGE_AT + 0x1000 - 3), 0);
	EXECUTE(STORE(TPR, 0x31), STORE_BYTE(PAGE_AT + 0x1000 - 3, 0x44), OUT);
	assert_port(PORT);
	assert_int_equal(g.run->cr8, 4);
	/* Nowhere: the first place is left alone. */
	assert_int_equal(set_vapic(0), 0);
	EXECUTE(STORE_BYTE(PAGE_AT, 0x99), OUT);
	assert_port(PORT);
	assert_int_equal(g.run->cr8, 4);
	/* In a slot that goes. */
	assert_int_equal(set_slot(&g, 1, 0, READONLY, 0x1000, g.ram + PAGE_AT), 0);
	assert_int_equal(set_vapic(READONLY), 0);
	EXECUTE(STORE_BYTE(READONLY, 0x60), OUT);
	assert_port(PORT);
	assert_int_equal(g.run->cr8, 6);
	assert_int_equal(set_slot(&g, 1, 0, READONLY, 0, NULL), 0);
	EXECUTE(0x90, OUT);
	assert_port(PORT);
	assert_int_equal(g.run->cr8, 6);
	assert_int_equal(set_slot(&g, 1, 0, READONLY, 0x1000, g.ram + PAGE_AT), 0);
	EXECUTE(STORE_BYTE(READONLY, 0x20), OUT);
	assert_port(PORT);
	assert_int_equal(g.run->cr8, 2);
}

/* What the program sets between two KVM_RUNs is what the guest finds; INIT ends it. */
static void program_sets(void **state)
{
	static uint8_t top[0x1000] __attribute__((aligned(0x1000)));
	struct kvm_lapic_state lapic;

	(void)state;
	assert_int_equal(set_vapic(PAGE_AT), 0);
	EXECUTE(STORE_BYTE(PAGE_AT, 0x70), OUT);
	assert_port(PORT);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_LAPIC, &lapic), 0);
	lapic.regs[0x80] = 0x22;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_LAPIC, &lapic), 0);
	EXECUTE(LOAD(PAGE_AT), SAVE(SEEN), OUT);
	assert_port(PORT);
	assert_int_equal(word_at(SEEN), 0x22);
	/* An APIC that is off shows nothing. */
	lapic.regs[0xf1] &= (char)~1;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_LAPIC, &lapic), 0);
	EXECUTE(STORE(PAGE_AT, 0x12345678), 0x90, LOAD(TPR), SAVE(SEEN), LOAD(PAGE_AT),
		SAVE(SEEN + 4), OUT);
	assert_port(PORT);
	assert_int_equal(word_at(SEEN), 0x78);
	assert_int_equal(word_at(SEEN + 4), 0x12345678);
	/* INIT, which the guest sends to itself: it goes on at the end of 4 GiB. */
	lapic.regs[0xf1] |= 1;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_LAPIC, &lapic), 0);
	top[0xff0] = top[0xff2] = 0xe6;
	top[0xff1] = top[0xff3] = PORT;
	assert_int_equal(set_slot(&g, 1, 0, TOP, sizeof(top), top), 0);
	EXECUTE(STORE_BYTE(PAGE_AT, 0x70), STORE(APIC + 0x300, 0x44500), OUT);
	assert_port(PORT);
	assert_int_equal(g.run->cr8, 0);
	g.ram[PAGE_AT] = 0x90;
	assert_port(PORT);
	assert_int_equal(g.run->cr8, 0);
	assert_int_equal(g.ram[PAGE_AT], 0x90);
}

#define TEST(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(errors),     TEST(accesses),  TEST(strange_accesses),
		TEST(by_msr),     TEST(word),      TEST(masks),
		TEST(other_ways), TEST(page_goes), TEST(program_sets),
	};

	cmocka_set_test_filter(getenv("KVMLET_TEST"));
	return cmocka_run_group_tests(tests, NULL, NULL);
}
