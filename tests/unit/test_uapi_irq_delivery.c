/* SPDX-License-Identifier: MIT */
/*
 * Interrupts from their sources to the guest's handlers and back: PIC, IOAPIC, PIT, messages and
 * irqfds, ends of interrupts, resampling. With KVMLET_TEST_REAL=1 on the real /dev/kvm, if its
 * local APIC knows what is in service (some software KVMs' does not, in real mode).
 */
#include <pthread.h>
#include <stdio.h>
#include <sys/eventfd.h>

#include "irq_guest.h"

#define LAPIC      0xfee00000u
#define INT_PORT   0x501
#define YIELD_PORT 0x502
#define HANDLERS   0x4000u
#define COUNTER    0x700u
#define LAST       0x704u
#define LONGEST    0x708u
#define MAX_INTS   32

static struct guest g;
static uint8_t ints[MAX_INTS + 1]; /* vectors that the guest took, in order */
static unsigned nr_ints;
static int eoi_exit; /* the last KVM_EXIT_IOAPIC_EOI, or -1 */

/* Until the guest writes to DONE_PORT. */
static void run_to_done(void)
{
	for (;;) {
		assert_int_equal(guest_run(&g), 0);
		if (g.run->exit_reason == KVM_EXIT_IOAPIC_EOI) {
			eoi_exit = g.run->eoi.vector;
			continue;
		}
		assert_int_equal(g.run->exit_reason, KVM_EXIT_IO);
		if (g.run->io.port == DONE_PORT)
			return;
		if (g.run->io.port == INT_PORT) {
			assert_true(nr_ints < MAX_INTS);
			ints[nr_ints++] = *run_data(&g);
		}
	}
}

static void run_code(const uint8_t *code, size_t n, uint64_t ds)
{
	static const uint8_t done[] = {0xba, DONE_PORT & 0xff, DONE_PORT >> 8, 0xee};

	memcpy(g.ram + CODE, code, n);
	memcpy(g.ram + CODE + n, done, sizeof(done));
	guest_regs(&g);
	ds_at(&g, ds);
	run_to_done();
}

/* sti; a few exits; cli. Returns how many interrupts came. */
static unsigned take(void)
{
	uint8_t code[5 + 8 + 1] = {0xba, YIELD_PORT & 0xff, YIELD_PORT >> 8, 0xfb, 0x90};

	memset(code + 5, 0xee, 8);
	code[13] = 0xfa;
	nr_ints = 0;
	run_code(code, sizeof(code), 0);
	return nr_ints;
}

/* sti; hlt; cli: sleeps until one has come. */
static void sleep_for_interrupt(void)
{
	static const uint8_t code[] = {0xfb, 0xf4, 0xfa};

	nr_ints = 0;
	run_code(code, sizeof(code), 0);
}

static void lapic_write(uint16_t reg, uint32_t val)
{
	const uint8_t code[] = {
		0x66,
		0xb8,
		(uint8_t)val,
		(uint8_t)(val >> 8),
		(uint8_t)(val >> 16),
		(uint8_t)(val >> 24),
		0x66,
		0xa3,
		(uint8_t)reg,
		(uint8_t)(reg >> 8),
	};

	run_code(code, sizeof(code), LAPIC);
}

static void lapic_eoi(void)
{
	eoi_exit = -1;
	lapic_write(0xb0, 0);
}

static void install_handlers(void)
{
	for (unsigned v = 0; v < 256; v++) {
		uint16_t at = (uint16_t)(HANDLERS + 16 * v);
		const uint8_t h[] = {
			0x50,          0x52, 0xb0, (uint8_t)v, 0xba, INT_PORT & 0xff,
			INT_PORT >> 8, 0xee, 0x5a, 0x58,       0xcf,
		};

		set_vector(&g, (int)v, at);
		memcpy(g.ram + at, h, sizeof(h));
	}
}

static bool apic_has_isr(void)
{
	struct kvm_msi m = {.address_lo = LAPIC, .data = 0x80};
	struct kvm_lapic_state l;

	if (!on_real_kvm())
		return true;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SIGNAL_MSI, &m), 1);
	assert_int_equal(take(), 1);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_LAPIC, &l), 0);
	lapic_eoi();
	return l.regs[0x140] & 1;
}

static int setup(void **state)
{
	(void)state;
	guest_make(&g, true);
	install_handlers();
	pic_init(&g, 0x20, 0x28, 1);
	return 0;
}

static int setup_apic(void **state)
{
	setup(state);
	/* Only the APIC's. */
	port_out(&g, 0x21, 0xff);
	port_out(&g, 0xa1, 0xff);
	lapic_write(0xf0, 0x1ff);
	return 0;
}

static int teardown(void **state)
{
	(void)state;
	guest_free(&g);
	return 0;
}

static long irqfd(int fd, uint32_t gsi, uint32_t flags, int resample)
{
	struct kvm_irqfd f = {
		.fd = (uint32_t)fd,
		.gsi = gsi,
		.flags = flags,
		.resamplefd = (uint32_t)resample,
	};

	return dev_ioctl_p(&g.vm, KVM_IRQFD, &f);
}

static void signal_fd(int fd)
{
	uint64_t one = 1;

	assert_int_equal(write(fd, &one, sizeof(one)), sizeof(one));
}

static uint64_t count_of(int fd)
{
	uint64_t n = 0;

	return read(fd, &n, sizeof(n)) == sizeof(n) ? n : 0;
}

/* ---- the 8259s --------------------------------------------------------------------- */

static void pic_delivers_by_priority(void **state)
{
	(void)state;
	/* The cascade's pin is 2: the slave's come before 3. */
	irq_line(&g, 7, 1);
	irq_line(&g, 12, 1);
	irq_line(&g, 3, 1);
	assert_int_equal(take(), 1);
	assert_int_equal(ints[0], 0x2c);
	assert_int_equal(get_pic(&g, false).isr, 4);
	assert_int_equal(get_pic(&g, true).isr, 0x10);
	/* Nothing of lower priority until both are told the end. */
	assert_int_equal(take(), 0);
	port_out(&g, 0xa0, 0x20);
	assert_int_equal(take(), 0);
	port_out(&g, 0x20, 0x20);
	assert_int_equal(take(), 1);
	assert_int_equal(ints[0], 0x23);
	/* A higher one interrupts. */
	irq_line(&g, 0, 1);
	assert_int_equal(take(), 1);
	assert_int_equal(ints[0], 0x20);
	port_out(&g, 0x20, 0x20);
	port_out(&g, 0x20, 0x20);
	assert_int_equal(take(), 1);
	assert_int_equal(ints[0], 0x27);
	port_out(&g, 0x20, 0x20);
	assert_int_equal(get_pic(&g, false).isr, 0);
}

static void pic_ends_by_itself(void **state)
{
	(void)state;
	pic_init(&g, 0x20, 0x28, 3);
	irq_line(&g, 3, 1);
	irq_line(&g, 5, 1);
	assert_int_equal(take(), 2);
	assert_int_equal(ints[0], 0x23);
	assert_int_equal(ints[1], 0x25);
	assert_int_equal(get_pic(&g, false).isr, 0);
	/* And rotates. */
	port_out(&g, 0x20, 0x80);
	irq_line(&g, 3, 0);
	irq_line(&g, 3, 1);
	assert_int_equal(take(), 1);
	assert_int_equal(get_pic(&g, false).priority_add, 4);
}

static void pic_level_until_lowered(void **state)
{
	(void)state;
	port_out(&g, 0x4d0, 0x20);
	irq_line(&g, 5, 1);
	assert_int_equal(take(), 1);
	assert_int_equal(ints[0], 0x25);
	port_out(&g, 0x20, 0x20);
	assert_int_equal(take(), 1);
	irq_line(&g, 5, 0);
	port_out(&g, 0x20, 0x20);
	assert_int_equal(take(), 0);
}

static void pic_fully_nested_for_the_slave(void **state)
{
	(void)state;
	/* Without the special mode the slave's second one waits; with it, it does not. */
	for (uint8_t icw4 = 1; icw4 <= 0x11; icw4 += 0x10) {
		pic_init(&g, 0x20, 0x28, icw4);
		irq_line(&g, 12, 1);
		assert_int_equal(take(), 1);
		irq_line(&g, 9, 1);
		assert_int_equal(take(), icw4 == 0x11);
		irq_line(&g, 12, 0);
		irq_line(&g, 9, 0);
		for (unsigned i = 0; i < 2; i++) {
			port_out(&g, 0xa0, 0x20);
			port_out(&g, 0x20, 0x20);
		}
	}
}

/* Only an APIC whose LINT0 is in ExtINT mode takes what the PIC has. */
static void pic_through_lint0(void **state)
{
	(void)state;
	lapic_write(0xf0, 0x1ff);
	irq_line(&g, 3, 1);
	lapic_write(0x350, 0x10700);
	assert_int_equal(take(), 0);
	lapic_write(0x350, 0x700);
	assert_int_equal(take(), 1);
	assert_int_equal(ints[0], 0x23);
}

/* ---- waking ------------------------------------------------------------------------ */

static void *signals_soon(void *arg)
{
	signal_fd(*(int *)arg);
	return NULL;
}

static void irqfd_wakes_the_halted(void **state)
{
	int fd = eventfd(0, EFD_NONBLOCK);
	pthread_t t;

	(void)state;
	assert_int_equal(irqfd(fd, 4, 0, 0), 0);
	for (unsigned i = 0; i < 50; i++) {
		assert_int_equal(pthread_create(&t, NULL, signals_soon, &fd), 0);
		sleep_for_interrupt();
		pthread_join(t, NULL);
		assert_int_equal(nr_ints, 1);
		assert_int_equal(ints[0], 0x24);
		port_out(&g, 0x20, 0x20);
	}
	assert_int_equal(count_of(fd), 0);
	close(fd);
}

static void *raises_soon(void *arg)
{
	irq_line(arg, 6, 1);
	irq_line(arg, 6, 0);
	return NULL;
}

static void line_wakes_the_halted(void **state)
{
	pthread_t t;

	(void)state;
	for (unsigned i = 0; i < 50; i++) {
		assert_int_equal(pthread_create(&t, NULL, raises_soon, &g), 0);
		sleep_for_interrupt();
		pthread_join(t, NULL);
		assert_int_equal(nr_ints, 1);
		assert_int_equal(ints[0], 0x26);
		port_out(&g, 0x20, 0x20);
	}
}

/* ---- the IOAPIC -------------------------------------------------------------------- */

static void ioapic_level(void **state)
{
	(void)state;
	if (!apic_has_isr())
		skip();
	ioapic_entry(&g, 20, E_LEVEL | 0x61);
	assert_int_equal(irq_status(&g, 20, 1), 1);
	assert_int_equal(get_entry(&g, 20), E_LEVEL | E_RIRR | 0x61);
	/* Nothing more until its end. */
	assert_int_equal(irq_status(&g, 20, 1), -1);
	assert_int_equal(take(), 1);
	assert_int_equal(ints[0], 0x61);
	/* Still high: again. */
	lapic_eoi();
	assert_int_equal(get_entry(&g, 20) & E_RIRR, E_RIRR);
	assert_int_equal(take(), 1);
	irq_line(&g, 20, 0);
	assert_int_equal(get_entry(&g, 20) & E_RIRR, E_RIRR);
	lapic_eoi();
	assert_int_equal(get_entry(&g, 20) & E_RIRR, 0);
	assert_int_equal(take(), 0);
}

static void ioapic_edge(void **state)
{
	(void)state;
	if (!apic_has_isr())
		skip();
	ioapic_entry(&g, 21, 0x62);
	assert_int_equal(irq_status(&g, 21, 1), 1);
	assert_int_equal(get_ioapic(&g).irr, 0);
	assert_int_equal(irq_status(&g, 21, 1), 0);
	irq_line(&g, 21, 0);
	assert_int_equal(take(), 1);
	assert_int_equal(ints[0], 0x62);
	lapic_eoi();
	assert_int_equal(take(), 0);
	/* One that was masked when it came is not made up for by unmasking. */
	ioapic_entry(&g, 21, E_MASK | 0x62);
	irq_line(&g, 21, 1);
	ioapic_entry(&g, 21, 0x62);
	assert_int_equal(take(), 0);
}

/* The pin was retargeted while its interrupt was in service: the end is its end all the same. */
static void ioapic_retargeted_in_service(void **state)
{
	(void)state;
	if (!apic_has_isr())
		skip();
	ioapic_entry(&g, 20, E_LEVEL | 0x61);
	irq_line(&g, 20, 1);
	assert_int_equal(take(), 1);
	irq_line(&g, 20, 0);
	ioapic_write(&g, ENTRIES + 2 * 20 + 1, 0x05000000);
	assert_int_equal(get_entry(&g, 20) & E_RIRR, E_RIRR);
	lapic_eoi();
	assert_int_equal(get_entry(&g, 20) & E_RIRR, 0);
}

static struct dev vcpu1;
static struct kvm_run *run1;

static void swap_vcpus(void)
{
	struct dev d = g.vcpu;
	struct kvm_run *r = g.run;

	g.vcpu = vcpu1;
	g.run = run1;
	vcpu1 = d;
	run1 = r;
}

/* A second vCPU, running, with its APIC enabled. */
static void second_vcpu(void)
{
	struct kvm_mp_state mp = {.mp_state = KVM_MP_STATE_RUNNABLE};

	vcpu1 = make_vcpu(&g.vm, 1);
	run1 = map_run(&vcpu1);
	assert_int_equal(dev_ioctl_p(&vcpu1, KVM_SET_MP_STATE, &mp), 0);
	swap_vcpus();
	lapic_write(0xf0, 0x1ff);
	swap_vcpus();
}

static void no_second_vcpu(void)
{
	munmap(run1, RUN_SIZE);
	dev_close(&vcpu1);
}

/* Two pins with one vector and different vCPUs: each ends its own. */
static void ioapic_same_vector(void **state)
{
	(void)state;
	if (!apic_has_isr())
		skip();
	second_vcpu();
	ioapic_entry(&g, 20, E_LEVEL | 0x61);
	ioapic_entry(&g, 21, E_LEVEL | 0x61 | 1ull << 56);
	irq_line(&g, 20, 1);
	irq_line(&g, 21, 1);
	assert_int_equal(take(), 1);
	irq_line(&g, 20, 0);
	irq_line(&g, 21, 0);
	lapic_eoi();
	assert_int_equal(get_entry(&g, 20) & E_RIRR, 0);
	assert_int_equal(get_entry(&g, 21) & E_RIRR, E_RIRR);
	swap_vcpus();
	assert_int_equal(take(), 1);
	assert_int_equal(ints[0], 0x61);
	lapic_eoi();
	assert_int_equal(get_entry(&g, 21) & E_RIRR, 0);
	swap_vcpus();
	no_second_vcpu();
}

/* The RTC's interrupt goes to both, and is served when both have ended it. */
static void rtc_to_two(void **state)
{
	(void)state;
	if (!apic_has_isr())
		skip();
	second_vcpu();
	ioapic_entry(&g, 8, 0x73 | 0xffull << 56);
	assert_int_equal(irq_status(&g, 8, 1), 2);
	irq_line(&g, 8, 0);
	assert_int_equal(take(), 1);
	lapic_eoi();
	assert_int_equal(irq_status(&g, 8, 1), 0);
	irq_line(&g, 8, 0);
	swap_vcpus();
	assert_int_equal(take(), 1);
	lapic_eoi();
	swap_vcpus();
	assert_int_equal(irq_status(&g, 8, 1), 2);
	no_second_vcpu();
}

/* State that is set with requests delivers them. */
static void ioapic_set_delivers(void **state)
{
	struct kvm_irqchip c = get_chip(&g, KVM_IRQCHIP_IOAPIC);

	(void)state;
	if (!apic_has_isr())
		skip();
	c.chip.ioapic.redirtbl[10].bits = 0x71;
	c.chip.ioapic.redirtbl[11].bits = E_LEVEL | 0x72;
	c.chip.ioapic.irr = 3u << 10;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_IRQCHIP, &c), 0);
	assert_int_equal(get_entry(&g, 11), E_LEVEL | E_RIRR | 0x72);
	assert_int_equal(get_ioapic(&g).irr, 1u << 11);
	assert_int_equal(take(), 1);
	assert_int_equal(ints[0], 0x72);
	/* Nobody drives the line, but nobody has lowered it either. */
	lapic_eoi();
	assert_int_equal(get_ioapic(&g).irr, 1u << 11);
}

/* The RTC's edges: the program is told that the last one was not served. */
static void rtc_is_coalesced(void **state)
{
	(void)state;
	if (!apic_has_isr())
		skip();
	ioapic_entry(&g, 8, 0x73);
	assert_int_equal(irq_status(&g, 8, 1), 1);
	assert_int_equal(irq_status(&g, 8, 0), 1);
	assert_int_equal(irq_status(&g, 8, 1), 0);
	irq_line(&g, 8, 0);
	assert_int_equal(take(), 1);
	assert_int_equal(ints[0], 0x73);
	/* In service still. */
	assert_int_equal(irq_status(&g, 8, 1), 0);
	irq_line(&g, 8, 0);
	/* Without a status it is like any other. */
	irq_line(&g, 8, 1);
	irq_line(&g, 8, 0);
	lapic_eoi();
	assert_int_equal(take(), 1);
	lapic_eoi();
	assert_int_equal(irq_status(&g, 8, 1), 1);
}

/* What is pending is found again in an APIC's state that is set. */
static void rtc_after_restore(void **state)
{
	struct kvm_irqchip c;
	struct kvm_lapic_state l;

	(void)state;
	if (!apic_has_isr())
		skip();
	ioapic_entry(&g, 8, 0x73);
	assert_int_equal(irq_status(&g, 8, 1), 1);
	irq_line(&g, 8, 0);
	assert_int_equal(take(), 1);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_LAPIC, &l), 0);
	/* With the IOAPIC's state, before the APIC's has been set: as the APIC is. */
	c = get_chip(&g, KVM_IRQCHIP_IOAPIC);
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_IRQCHIP, &c), 0);
	assert_int_equal(irq_status(&g, 8, 1), 0);
	irq_line(&g, 8, 0);
	/* In service no more. */
	memset(l.regs + 0x100, 0, 0x80);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_LAPIC, &l), 0);
	assert_int_equal(irq_status(&g, 8, 1), 1);
}

/*
 * A line that nobody lowers: the guest, which does nothing but take it, gets a pause after 10,000
 * times, and its main program a turn.
 */
static void endless_level_gets_a_pause(void **state)
{
	/*
	 * rdtsc; mov %eax, %ecx; xchg %eax, %cs:LAST; sub %eax, %ecx
	 * cmp %cs:LONGEST, %ecx; jbe 1f; mov %ecx, %cs:LONGEST
	 * 1: incl %cs:COUNTER; EOI; iret
	 */
	/* clang-format off */
	static const uint8_t handler[] = {
		0x0f, 0x31, 0x66, 0x89, 0xc1, 0x2e, 0x66, 0x87, 0x06, LAST & 0xff, LAST >> 8, 0x66, 0x29, 0xc1,
		0x2e, 0x66, 0x3b, 0x0e, LONGEST & 0xff, LONGEST >> 8, 0x76, 6,
		0x2e, 0x66, 0x89, 0x0e, LONGEST & 0xff, LONGEST >> 8,
		0x2e, 0x66, 0xff, 0x06, COUNTER & 0xff, COUNTER >> 8, 0x66, 0x31, 0xc0, 0x66, 0xa3, 0xb0, 0, 0xcf,
	};
	/* clang-format on */
	static const uint8_t code[] = {0xfb, 0xf4, 0xfa};
	uint32_t count = 0, longest, khz;

	(void)state;
	if (on_real_kvm())
		skip();
	khz = (uint32_t)dev_ioctl(&g.vcpu, KVM_GET_TSC_KHZ, 0);
	assert_true((int32_t)khz > 0);
	ioapic_entry(&g, 20, E_LEVEL | 0x61);
	set_vector(&g, 0x61, 0x3800);
	memcpy(g.ram + 0x3800, handler, sizeof(handler));
	memset(g.ram + COUNTER, 0, 4);
	irq_line(&g, 20, 1);
	for (unsigned i = 0; i < 5; i++) {
		memset(g.ram + LONGEST, 0, 4);
		run_code(code, sizeof(code), LAPIC);
		memcpy(&count, g.ram + COUNTER, 4);
		memcpy(&longest, g.ram + LONGEST, 4);
		/* On a busy machine the pause may be over before the guest has gone on. */
		assert_true(count >= (i + 1) * 10000);
		assert_int_equal(count % 10000, 0);
		assert_true(!i || longest >= 10 * khz); /* ms */
	}
	irq_line(&g, 20, 0);
}

/* ---- messages ---------------------------------------------------------------------- */

static void messages(void **state)
{
	struct kvm_msi m = {.address_lo = LAPIC, .data = 0x91};

	(void)state;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SIGNAL_MSI, &m), 1);
	assert_int_equal(take(), 1);
	assert_int_equal(ints[0], 0x91);
	lapic_eoi();
	/* Nobody's. */
	m.address_lo = LAPIC | 0x33000;
	assert_true(dev_ioctl_p(&g.vm, KVM_SIGNAL_MSI, &m) <= 0);
	m.flags = KVM_MSI_VALID_DEVID;
	m.address_lo = LAPIC;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SIGNAL_MSI, &m), 1);
	m.flags = 2;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SIGNAL_MSI, &m), -EINVAL);
	m.flags = 0;
	take();
	lapic_eoi();
	/* NMI: the vector does not matter. */
	m.data = 0x400;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SIGNAL_MSI, &m), 1);
	assert_int_equal(take(), 1);
	assert_int_equal(ints[0], 2);
}

static void routed_message(void **state)
{
	struct {
		struct kvm_irq_routing head;
		struct kvm_irq_routing_entry e;
	} r = {.head = {.nr = 1},
	       .e = {.gsi = 70,
		     .type = KVM_IRQ_ROUTING_MSI,
		     .u.msi = {.address_lo = LAPIC, .data = 0x92}}};
	int fd = eventfd(0, EFD_NONBLOCK);
	pthread_t t;

	(void)state;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_GSI_ROUTING, &r), 0);
	assert_int_equal(irq_status(&g, 70, 1), 1);
	assert_int_equal(irq_status(&g, 70, 0), -1);
	assert_int_equal(take(), 1);
	assert_int_equal(ints[0], 0x92);
	lapic_eoi();
	/* Changed while an irqfd is assigned to it. */
	assert_int_equal(irqfd(fd, 70, 0, 0), 0);
	r.e.u.msi.data = 0x93;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_GSI_ROUTING, &r), 0);
	assert_int_equal(pthread_create(&t, NULL, signals_soon, &fd), 0);
	sleep_for_interrupt();
	pthread_join(t, NULL);
	assert_int_equal(ints[0], 0x93);
	close(fd);
}

/* ---- resampling -------------------------------------------------------------------- */

static void end_resamples(void **state)
{
	int a = eventfd(0, EFD_NONBLOCK), b = eventfd(0, EFD_NONBLOCK);
	int ra = eventfd(0, EFD_NONBLOCK), rb = eventfd(0, EFD_NONBLOCK);
	pthread_t t;

	(void)state;
	if (!apic_has_isr())
		skip();
	ioapic_entry(&g, 20, E_LEVEL | 0x61);
	assert_int_equal(irqfd(a, 20, KVM_IRQFD_FLAG_RESAMPLE, ra), 0);
	assert_int_equal(irqfd(b, 20, KVM_IRQFD_FLAG_RESAMPLE, rb), 0);
	assert_int_equal(pthread_create(&t, NULL, signals_soon, &a), 0);
	sleep_for_interrupt();
	pthread_join(t, NULL);
	assert_int_equal(ints[0], 0x61);
	assert_int_equal(count_of(ra), 0);
	assert_int_equal(get_ioapic(&g).irr, 1u << 20);
	/* At its end the line falls, and all are asked. */
	lapic_eoi();
	assert_int_equal(count_of(ra), 1);
	assert_int_equal(count_of(rb), 1);
	assert_int_equal(get_ioapic(&g).irr, 0);
	assert_int_equal(get_entry(&g, 20) & E_RIRR, 0);
	assert_int_equal(take(), 0);
	/* One that still wants it raises it anew. */
	assert_int_equal(pthread_create(&t, NULL, signals_soon, &b), 0);
	sleep_for_interrupt();
	pthread_join(t, NULL);
	lapic_eoi();
	assert_int_equal(count_of(ra), 1);
	/* Who has gone is not asked. */
	assert_int_equal(irqfd(a, 20, KVM_IRQFD_FLAG_DEASSIGN, 0), 0);
	assert_int_equal(pthread_create(&t, NULL, signals_soon, &b), 0);
	sleep_for_interrupt();
	pthread_join(t, NULL);
	lapic_eoi();
	assert_int_equal(count_of(ra), 0);
	assert_int_equal(count_of(rb), 2);
	close(a);
	close(b);
	close(ra);
	close(rb);
}

/* An edge-triggered pin that was retargeted in service: who waits for the end hears of it. */
static void retargeted_edge_is_ended(void **state)
{
	int a = eventfd(0, EFD_NONBLOCK), r = eventfd(0, EFD_NONBLOCK);
	pthread_t t;

	(void)state;
	if (!apic_has_isr())
		skip();
	ioapic_entry(&g, 21, 0x62);
	assert_int_equal(irqfd(a, 21, KVM_IRQFD_FLAG_RESAMPLE, r), 0);
	assert_int_equal(pthread_create(&t, NULL, signals_soon, &a), 0);
	sleep_for_interrupt();
	pthread_join(t, NULL);
	ioapic_write(&g, ENTRIES + 2 * 21 + 1, 0x05000000);
	lapic_eoi();
	assert_int_equal(count_of(r), 1);
	/* Not twice. */
	lapic_eoi();
	assert_int_equal(count_of(r), 0);
	close(a);
	close(r);
}

/* The 8259's end of interrupt asks, too. */
static void pic_end_resamples(void **state)
{
	int a = eventfd(0, EFD_NONBLOCK), r = eventfd(0, EFD_NONBLOCK);
	pthread_t t;

	(void)state;
	port_out(&g, 0x4d1, 4);
	assert_int_equal(irqfd(a, 10, KVM_IRQFD_FLAG_RESAMPLE, r), 0);
	assert_int_equal(pthread_create(&t, NULL, signals_soon, &a), 0);
	sleep_for_interrupt();
	pthread_join(t, NULL);
	assert_int_equal(nr_ints, 1);
	assert_int_equal(ints[0], 0x2a);
	assert_int_equal(count_of(r), 0);
	port_out(&g, 0xa0, 0x62);
	port_out(&g, 0x20, 0x62);
	assert_int_equal(count_of(r), 1);
	assert_int_equal(get_pic(&g, true).irr, 0);
	assert_int_equal(take(), 0);
	close(a);
	close(r);
}

/* ---- the PIT ----------------------------------------------------------------------- */

static void make_pit(void)
{
	struct kvm_pit_config c = {0};

	assert_int_equal(dev_ioctl_p(&g.vm, KVM_CREATE_PIT2, &c), 0);
}

/* Channel 0, low and high byte. */
static void pit_program(uint8_t mode, uint16_t count)
{
	port_out(&g, 0x43, (uint8_t)(0x30 | mode << 1));
	port_out(&g, 0x40, (uint8_t)count);
	port_out(&g, 0x40, (uint8_t)(count >> 8));
}

/* For the timer to expire often enough, also where its thread has to wait for a processor. */
static void let_ms_pass(unsigned ms)
{
	usleep(ms * 1000);
}

/* The HPET takes over: the timer stops, what was counted stays. */
static void pit_stop(void)
{
	struct kvm_pit_state2 s;

	assert_int_equal(dev_ioctl_p(&g.vm, KVM_GET_PIT2, &s), 0);
	s.flags |= KVM_PIT_FLAGS_HPET_LEGACY;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_PIT2, &s), 0);
}

static unsigned ticks_until_quiet(void)
{
	unsigned n = 0;

	while (take()) {
		n += nr_ints;
		port_out(&g, 0x20, 0x20);
		if (on_real_kvm()) /* whose worker makes up for them */
			let_ms_pass(20);
	}
	return n;
}

static void pit_interrupts(void **state)
{
	(void)state;
	make_pit();
	pit_program(2, 1193);
	for (unsigned i = 0; i < 20; i++) {
		sleep_for_interrupt();
		assert_int_equal(nr_ints, 1);
		assert_int_equal(ints[0], 0x20);
		port_out(&g, 0x20, 0x20);
	}
	/* One shot, when nothing is left of what was before. */
	pit_program(0, 1193);
	let_ms_pass(20);
	ticks_until_quiet();
	pit_program(0, 1193);
	sleep_for_interrupt();
	assert_int_equal(ints[0], 0x20);
	port_out(&g, 0x20, 0x20);
	assert_int_equal(take(), 0);
}

static uint64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

static void pit_makes_up_for_lost_ticks(void **state)
{
	struct kvm_reinject_control rc = {.pit_reinject = 0};
	uint64_t begun, most;
	unsigned n;

	(void)state;
	make_pit();
	begun = now_ms();
	pit_program(2, 1193);
	let_ms_pass(200);
	pit_stop();
	most = now_ms() - begun;
	n = ticks_until_quiet();
	assert_true(n >= 20);
	assert_true(n <= most + 1);

	/* Not asked to: one, however many there were. */
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_REINJECT_CONTROL, &rc), 0);
	{
		struct kvm_pit_state2 s;

		assert_int_equal(dev_ioctl_p(&g.vm, KVM_GET_PIT2, &s), 0);
		s.flags = 0;
		assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_PIT2, &s), 0);
	}
	let_ms_pass(100);
	pit_stop();
	assert_int_equal(ticks_until_quiet(), 1);
}

/* What was lost while the line was masked is not made up for. */
static void pit_forgets_when_unmasked(void **state)
{
	unsigned n;

	(void)state;
	make_pit();
	port_out(&g, 0x21, 1);
	pit_program(2, 1193);
	let_ms_pass(100);
	pit_stop();
	port_out(&g, 0x21, 0);
	n = ticks_until_quiet();
	assert_int_equal(n, 1);
}

/* LINT0 in NMI mode: each tick is an NMI, too. */
static void pit_as_nmi_watchdog(void **state)
{
	/* mov $0x34, %al; out %al, $0x43; xor %al, %al; out %al, $0x40; out %al, $0x40: 55 ms */
	static const uint8_t start[] = {0xb0, 0x34, 0xe6, 0x43, 0x30, 0xc0, 0xe6, 0x40, 0xe6, 0x40};
	bool nmi = false, tick = false;

	(void)state;
	make_pit();
	lapic_write(0xf0, 0x1ff);
	lapic_write(0x350, 0x400);
	/* Not by port_out(), which knows of no exit in its middle: the first may come at once. */
	nr_ints = 0;
	run_code(start, sizeof(start), 0);
	if (!nr_ints)
		sleep_for_interrupt();
	for (unsigned k = 0; k < nr_ints; k++) {
		nmi |= ints[k] == 2;
		tick |= ints[k] == 0x20;
	}
	assert_true(nmi);
	assert_false(tick); /* the PIC's output goes nowhere */
}

/* ---- split ------------------------------------------------------------------------- */

static void split_tells_ends(void **state)
{
	struct kvm_enable_cap cap = {.cap = KVM_CAP_SPLIT_IRQCHIP, .args = {24}};
	struct {
		struct kvm_irq_routing head;
		struct kvm_irq_routing_entry e[3];
	} r = {.head = {.nr = 3}};

	(void)state;
	memset(&g, 0, sizeof(g));
	g.kvm = open_kvm();
	g.vm = make_vm(&g.kvm);
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_ENABLE_CAP, &cap), 0);
	g.vcpu = make_vcpu(&g.vm, 0);
	g.run = map_run(&g.vcpu);
	g.ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	assert_int_equal(set_slot(&g, 0, 0, 0, RAM, g.ram), 0);
	install_handlers();
	lapic_write(0xf0, 0x1ff);
	for (unsigned i = 0; i < 3; i++)
		r.e[i] = (struct kvm_irq_routing_entry){
			.gsi = i == 2 ? 24 : i, /* beyond the program's pins */
			.type = KVM_IRQ_ROUTING_MSI,
			.u.msi = {.address_lo = LAPIC,
				  .data = 0x61 + i * 0x10 + (i == 1 ? 0 : 0x8000)},
		};
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_GSI_ROUTING, &r), 0);
	if (!apic_has_isr()) {
		guest_free(&g);
		skip();
	}
	irq_line(&g, 0, 1);
	assert_int_equal(take(), 1);
	assert_int_equal(ints[0], 0x61);
	lapic_eoi();
	assert_int_equal(eoi_exit, 0x61);
	irq_line(&g, 1, 1);
	assert_int_equal(take(), 1);
	lapic_eoi();
	assert_int_equal(eoi_exit, -1);
	irq_line(&g, 24, 1);
	assert_int_equal(take(), 1);
	assert_int_equal(ints[0], 0x81);
	lapic_eoi();
	assert_int_equal(eoi_exit, -1);
	/* The route goes while its interrupt is in service. */
	irq_line(&g, 0, 1);
	assert_int_equal(take(), 1);
	r.e[0].u.msi.data = 0x99;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_GSI_ROUTING, &r), 0);
	lapic_eoi();
	assert_int_equal(eoi_exit, -1);
	guest_free(&g);
}

int main(void)
{
#define PIC(f)  cmocka_unit_test_setup_teardown(f, setup, teardown)
#define APIC(f) cmocka_unit_test_setup_teardown(f, setup_apic, teardown)
	const struct CMUnitTest tests[] = {
		PIC(pic_delivers_by_priority),
		PIC(pic_ends_by_itself),
		PIC(pic_level_until_lowered),
		PIC(pic_fully_nested_for_the_slave),
		PIC(pic_through_lint0),
		PIC(irqfd_wakes_the_halted),
		PIC(line_wakes_the_halted),
		APIC(ioapic_level),
		APIC(ioapic_edge),
		APIC(ioapic_retargeted_in_service),
		APIC(ioapic_same_vector),
		APIC(rtc_to_two),
		APIC(ioapic_set_delivers),
		APIC(rtc_is_coalesced),
		APIC(rtc_after_restore),
		APIC(endless_level_gets_a_pause),
		APIC(messages),
		APIC(routed_message),
		APIC(end_resamples),
		APIC(retargeted_edge_is_ended),
		PIC(pic_end_resamples),
		PIC(pit_interrupts),
		PIC(pit_makes_up_for_lost_ticks),
		PIC(pit_forgets_when_unmasked),
		PIC(pit_as_nmi_watchdog),
		cmocka_unit_test(split_tells_ends),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
