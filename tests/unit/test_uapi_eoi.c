/* SPDX-License-Identifier: MIT */
/*
 * PV EOI (X3): the guest ends an interrupt by taking a bit off in its memory. With
 * KVMLET_TEST_REAL=1 on the real /dev/kvm.
 */
#include "uapi_guest.h"

#define PV_EOI       0x4b564d04u
#define ASSIST_PAGE  0x40000073u
#define PAGE_AT      0x6000u
#define ELSEWHERE    0x40000000ul /* no slot */
#define IDT          0x9000u
#define APIC_TABLE   0xb000u
#define HANDLER      0xa000u
#define VECTOR       0x41u
#define HIGHER       0x52u
#define ISR          0x100u /* in the register page */
#define IRR          0x200u
#define APIC_ENABLED 0x100u

static struct guest g;

static void set_gate(unsigned vector, uint64_t to)
{
	uint64_t *gate = (uint64_t *)(void *)(g.ram + IDT) + 2 * vector;

	gate[0] = (to & 0xffff) | 8ull << 16 | 0x8e00ull << 32 | (to >> 16 & 0xffff) << 48;
	gate[1] = to >> 32;
}

/* Stops where interrupts are on; a handler for each vector. */
static int setup(void **state)
{
	struct kvm_lapic_state lapic;
	struct kvm_sregs s;
	uint64_t *gdt;

	(void)state;
	guest_make(&g, true);
	guest_long_mode(&g, 0);
	/* The APIC's page, behind the first GiB. */
	guest_table(&g, TABLES + 0x1000)[3] = APIC_TABLE | 7;
	guest_table(&g, APIC_TABLE)[0xfee00000u >> 21 & 511] = 0xfee00000u | 0x87;
	gdt = (uint64_t *)(void *)(g.ram + IDT - 0x100);
	gdt[1] = 0x00af9b000000ffff;
	gdt[2] = 0x00cf93000000ffff;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_SREGS, &s), 0);
	s.idt.base = IDT;
	s.idt.limit = 0xfff;
	s.gdt.base = IDT - 0x100;
	s.gdt.limit = 23;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_SREGS, &s), 0);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_LAPIC, &lapic), 0);
	lapic.regs[0xf1] |= APIC_ENABLED >> 8;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_LAPIC, &lapic), 0);
	set_gate(VECTOR, HANDLER);
	set_gate(HIGHER, HANDLER);
	return 0;
}

static int teardown(void **state)
{
	(void)state;
	guest_free(&g);
	return 0;
}

static void signal_msi(unsigned vector)
{
	struct kvm_msi msi = {.address_lo = 0xfee00000, .data = vector};

	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SIGNAL_MSI, &msi), 1);
}

static bool in_apic(unsigned bitmap, unsigned vector)
{
	struct kvm_lapic_state lapic;

	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_LAPIC, &lapic), 0);
	return (uint8_t)lapic.regs[bitmap + vector / 32 * 16 + vector % 32 / 8] >> vector % 8 & 1;
}

/* The guest executes @len bytes with interrupts on or off, then OUT. */
static void execute(uint64_t at, const uint8_t *code, size_t len, bool interrupts)
{
	struct kvm_regs r = {.rip = at, .rsp = STACK, .rflags = interrupts ? 0x202 : 2};

	memcpy(g.ram + at, code, len);
	memcpy(g.ram + at + len, (const uint8_t[]){0xe6, 0x10, 0xf4}, 3);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &r), 0);
	assert_exit(&g, KVM_EXIT_IO);
}

#define EXECUTE(interrupts, ...)                                 \
	do {                                                     \
		static const uint8_t code_[] = {__VA_ARGS__};    \
		execute(CODE, code_, sizeof(code_), interrupts); \
	} while (0)

/*
 * An interrupt comes; its handler: btrq $0, PAGE_AT; sbb %eax, %eax; out %eax. True: the bit was
 * set, and the interrupt is over.
 */
static bool handle(unsigned vector)
{
	static const uint8_t handler[] = {0x48, 0x0f, 0xba, 0x34, 0x25, 0x00, 0x60,
					  0x00, 0x00, 0x00, 0x19, 0xc0, 0xe7, 0x11};
	struct kvm_regs r = {.rip = CODE, .rsp = STACK, .rflags = 0x202};

	memcpy(g.ram + HANDLER, handler, sizeof(handler));
	g.ram[CODE] = 0xf4;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &r), 0);
	signal_msi(vector);
	assert_exit(&g, KVM_EXIT_IO);
	assert_int_equal(g.run->io.port, 0x11);
	return *((uint8_t *)g.run + g.run->io.data_offset);
}

/* The guest may end the interrupt by the bit, and that ends it. */
static void by_the_bit(void **state)
{
	(void)state;
	assert_int_equal(guest_set_msr(&g, PV_EOI, PAGE_AT | 1), 1);
	assert_true(handle(VECTOR));
	assert_int_equal(g.ram[PAGE_AT], 0);
	assert_false(in_apic(ISR, VECTOR));
	/* Again: nothing is left of the first. */
	assert_true(handle(VECTOR));
	assert_false(in_apic(ISR, VECTOR));
}

/* A guest that leaves the bit alone has the interrupt in service, and can end it as ever. */
static void left_alone(void **state)
{
	struct kvm_regs r = {.rip = CODE, .rsp = STACK, .rflags = 0x202};

	(void)state;
	assert_int_equal(guest_set_msr(&g, PV_EOI, PAGE_AT | 1), 1);
	memcpy(g.ram + HANDLER,
	       (const uint8_t[]){0x8a, 0x04, 0x25, 0x00, 0x60, 0x00, 0x00, 0xe6, 0x11}, 9);
	g.ram[CODE] = 0xf4;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &r), 0);
	signal_msi(VECTOR);
	assert_exit(&g, KVM_EXIT_IO);
	/* It saw the bit; outside of KVM_RUN it is not there. */
	assert_int_equal(*((uint8_t *)g.run + g.run->io.data_offset), 1);
	assert_int_equal(g.ram[PAGE_AT], 0);
	assert_true(in_apic(ISR, VECTOR));
	/* mov $0xfee000b0, %eax; mov %eax, (%rax) */
	EXECUTE(false, 0xb8, 0xb0, 0x00, 0xe0, 0xfe, 0x89, 0x00);
	assert_false(in_apic(ISR, VECTOR));
}

/* With another one requested there must be an EOI: no bit. */
static void one_more_requested(void **state)
{
	(void)state;
	assert_int_equal(guest_set_msr(&g, PV_EOI, PAGE_AT | 1), 1);
	signal_msi(VECTOR);
	assert_false(handle(HIGHER));
	assert_true(in_apic(ISR, HIGHER));
	assert_true(in_apic(IRR, VECTOR));
}

/* The bit was taken off, and the next interrupt, of lower priority, is delivered at once. */
static void next_follows(void **state)
{
	static const uint8_t handler[] = {
		0x48, 0x0f, 0xba, 0x34, 0x25, 0x00, 0x60, 0x00, 0x00, 0x00, /* btrq $0, PAGE_AT */
		0xff, 0x04, 0x25, 0x00, 0x70, 0x00, 0x00,                   /* incl 0x7000 */
		0x48, 0xcf,                                                 /* iretq */
	};
	struct kvm_regs r = {.rip = CODE, .rsp = STACK, .rflags = 0x202};

	(void)state;
	assert_int_equal(guest_set_msr(&g, PV_EOI, PAGE_AT | 1), 1);
	memcpy(g.ram + HANDLER, handler, sizeof(handler));
	/* int 0x41's IPI to itself, twice: mov to the ICR; the second after the first has ended */
	memcpy(g.ram + CODE,
	       (const uint8_t[]){0xb8, 0x00, 0x03,   0xe0,   0xfe,             /* mov $ICR, %eax */
				 0xc7, 0x00, HIGHER, 0x00,   0x04, 0x00,       /* to itself */
				 0x90, 0xc7, 0x00,   VECTOR, 0x00, 0x04, 0x00, /* lower */
				 0x90, 0xe6, 0x10},
	       21);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &r), 0);
	assert_exit(&g, KVM_EXIT_IO);
	assert_int_equal(g.ram[0x7000], 2);
	assert_false(in_apic(ISR, HIGHER));
	assert_false(in_apic(ISR, VECTOR));
}

/* X3, B26: the page goes away and comes back; a missing one costs the guest only its EOI. */
static void page_goes(void **state)
{
	(void)state;
	assert_int_equal(guest_set_msr(&g, PV_EOI, PAGE_AT | 2), 0);
	assert_int_equal(guest_set_msr(&g, PV_EOI, ELSEWHERE | 1), 0);
	assert_int_equal(guest_set_msr(&g, PV_EOI, PAGE_AT | 1), 1);
	assert_true(handle(VECTOR));
	/* Somewhere else: the old place is left alone. */
	assert_int_equal(guest_set_msr(&g, PV_EOI, (PAGE_AT + 0x10) | 1), 1);
	assert_false(handle(VECTOR));
	assert_int_equal(g.ram[PAGE_AT], 0);
	assert_true(in_apic(ISR, VECTOR));
	EXECUTE(false, 0xb8, 0xb0, 0x00, 0xe0, 0xfe, 0x89, 0x00);
	assert_int_equal(guest_set_msr(&g, PV_EOI, 0), 1);
	assert_false(handle(VECTOR));
}

/* Hyper-V's VP assist page has the same word. */
static void assist_page(void **state)
{
	(void)state;
	memset(g.ram + PAGE_AT, 0xff, 16);
	assert_int_equal(guest_set_msr(&g, ASSIST_PAGE, ELSEWHERE | 1), 0);
	assert_int_equal(guest_set_msr(&g, ASSIST_PAGE, PAGE_AT | 1), 1);
	assert_int_equal(g.ram[PAGE_AT], 0);
	assert_int_equal(g.ram[PAGE_AT + 4], 0xff);
	assert_true(handle(VECTOR));
	assert_false(in_apic(ISR, VECTOR));
	assert_int_equal(guest_set_msr(&g, ASSIST_PAGE, 0), 1);
	assert_false(handle(VECTOR));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(by_the_bit, setup, teardown),
		cmocka_unit_test_setup_teardown(left_alone, setup, teardown),
		cmocka_unit_test_setup_teardown(one_more_requested, setup, teardown),
		cmocka_unit_test_setup_teardown(next_follows, setup, teardown),
		cmocka_unit_test_setup_teardown(page_goes, setup, teardown),
		cmocka_unit_test_setup_teardown(assist_page, setup, teardown),
	};

	cmocka_set_test_filter(getenv("KVMLET_TEST"));
	return cmocka_run_group_tests(tests, NULL, NULL);
}
