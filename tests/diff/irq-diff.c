/* SPDX-License-Identifier: MIT */
/*
 * Random sequences of what programs and guests do to the interrupt controllers, and everything
 * that can be seen of it: results, the interrupts that the guest takes, all registers. The same
 * program runs under kvmlet and on /dev/kvm; tests/diff/irqs compares.
 *
 *   irq-diff probe             print "n" if this KVM's local APIC does not know what it has in
 *                              service (some software KVMs, in real mode), else nothing
 *   irq-diff SEED COUNT [nv]   n: compared with such a one, the guest takes no interrupts while
 *                              its APIC is enabled; v: registers themselves, not a sum over them
 *
 * The guest is in real mode, with interrupts off but in windows. Each access ends with an OUT to
 * DONE; handlers report their vector with an OUT to INT and end no interrupt. Nothing here depends
 * on time: the PIT's first channel is left alone.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define DONE     0x500
#define INT      0x501
#define YIELD    0x502
#define RAM      0x10000u
#define CODE     0x1000u
#define HANDLERS 0x4000u
#define STACK    0x8000u
#define IOAPIC   0xfec00000u
#define LAPIC    0xfee00000u
#define OPS      60
#define MAX_INTS 8  /* in one window; then it is closed, for a line may never be quiet */
#define YIELDS   24 /* exits while the window is open: some KVMs look for interrupts only then */

static int kvm, vm, vcpu;
static struct kvm_run *run;
static uint8_t *ram;
static uint64_t state;
static bool verbose, split, no_isr, apic_on;

static uint32_t rnd(uint32_t n)
{
	state = state * 6364136223846793005ull + 1442695040888963407ull;
	return (uint32_t)((state >> 33) % n);
}

static void die(const char *what)
{
	perror(what);
	exit(99);
}

static int try(int fd, unsigned long cmd, void *arg)
{
	int r = ioctl(fd, cmd, arg);

	return r < 0 ? -errno : r;
}

/* ---- the guest --------------------------------------------------------------------- */

static bool must_stop, silent;
static size_t done_at;

/* Returns what DONE was written with. */
static uint32_t go(uint32_t base)
{
	struct kvm_regs regs = {.rip = CODE, .rsp = STACK, .rflags = 2};
	struct kvm_sregs s;
	uint32_t val = 0;

	if (ioctl(vcpu, KVM_GET_SREGS, &s))
		die("KVM_GET_SREGS");
	s.cs.base = s.cs.selector = 0;
	s.ds.base = base;
	s.ds.selector = (uint16_t)(base >> 4);
	if (ioctl(vcpu, KVM_SET_SREGS, &s) || ioctl(vcpu, KVM_SET_REGS, &regs))
		die("KVM_SET_REGS");
	for (int n = 0;;) {
		uint8_t *data;

		if (ioctl(vcpu, KVM_RUN, 0))
			die("KVM_RUN");
		data = (uint8_t *)run + run->io.data_offset;
		if (run->exit_reason == KVM_EXIT_IOAPIC_EOI) {
			printf("  ioapic eoi %02x\n", run->eoi.vector);
			continue;
		}
		if (run->exit_reason != KVM_EXIT_IO) {
			printf("  exit %u\n", run->exit_reason);
			must_stop = true;
			return 0;
		}
		switch (run->io.port) {
		case DONE:
			memcpy(&val, data, run->io.size);
			return val;
		case YIELD:
			break;
		case INT:
			if (!silent)
				printf("  int %02x\n", *data);
			if (++n < MAX_INTS)
				break;
			/* To the end of the access. */
			regs.rip = CODE + done_at;
			if (ioctl(vcpu, KVM_SET_REGS, &regs))
				die("KVM_SET_REGS");
			break;
		default:
			printf("  port %x%s\n", run->io.port, run->io.direction ? " out" : " in");
			break;
		}
	}
}

static void code(const void *p, size_t n)
{
	static const uint8_t done[] = {0xba, DONE & 0xff, DONE >> 8, 0x66, 0xef};

	memcpy(ram + CODE, p, n);
	memcpy(ram + CODE + n, done, sizeof(done));
	done_at = n;
}

static void port_out(uint16_t port, uint8_t val)
{
	const uint8_t c[] = {0xb0, val, 0xba, (uint8_t)port, (uint8_t)(port >> 8), 0xee};

	code(c, sizeof(c));
	go(0);
}

static uint8_t port_in(uint16_t port)
{
	const uint8_t c[] = {0x66, 0x31, 0xc0, 0xba, (uint8_t)port, (uint8_t)(port >> 8), 0xec};

	code(c, sizeof(c));
	return (uint8_t)go(0);
}

static uint32_t mmio(uint32_t base, uint16_t off, bool write, uint32_t val)
{
	const uint8_t c[] = {
		0x66,
		0xb8,
		(uint8_t)val,
		(uint8_t)(val >> 8),
		(uint8_t)(val >> 16),
		(uint8_t)(val >> 24),
		0x66,
		(uint8_t)(write ? 0xa3 : 0xa1),
		(uint8_t)off,
		(uint8_t)(off >> 8),
	};

	code(c, sizeof(c));
	return go(base);
}

static uint32_t ioapic_reg(uint8_t reg, bool write, uint32_t val)
{
	mmio(IOAPIC, 0, true, reg);
	return mmio(IOAPIC, 0x10, write, val);
}

/* An NMI is taken at once, or at one of the next exits. */
static void settle(void)
{
	static const uint8_t c[] = {0xba, YIELD & 0xff, YIELD >> 8, 0xee, 0xee, 0xee, 0xee};

	code(c, sizeof(c));
	go(0);
}

/* mov $YIELD, %dx; sti; nop; OUTs; cli */
static void window(void)
{
	uint8_t c[5 + YIELDS + 1] = {0xba, YIELD & 0xff, YIELD >> 8, 0xfb, 0x90};

	memset(c + 5, 0xee, YIELDS);
	c[5 + YIELDS] = 0xfa;
	code(c, sizeof(c));
	go(0);
}

static void make_vm(void)
{
	struct kvm_userspace_memory_region r = {.memory_size = RAM,
						.userspace_addr = (uint64_t)ram};
	struct kvm_enable_cap cap = {.cap = KVM_CAP_SPLIT_IRQCHIP, .args = {24}};
	struct kvm_pit_config pit = {0};
	int r1;

	memset(ram, 0, RAM);
	for (unsigned v = 0; v < 256; v++) {
		uint16_t at = (uint16_t)(HANDLERS + 16 * v);
		const uint8_t h[] = {0x50,     0x52, 0xb0, (uint8_t)v, 0xba, INT & 0xff,
				     INT >> 8, 0xee, 0x5a, 0x58,       0xcf};

		memcpy(ram + 4 * v, &at, 2);
		memcpy(ram + at, h, sizeof(h));
	}
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	if (vm < 0)
		die("KVM_CREATE_VM");
	r1 = split ? ioctl(vm, KVM_ENABLE_CAP, &cap) : ioctl(vm, KVM_CREATE_IRQCHIP, 0);
	if (r1 || (!split && ioctl(vm, KVM_CREATE_PIT2, &pit)))
		die("KVM_CREATE_IRQCHIP");
	vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	if (vcpu < 0 || ioctl(vm, KVM_SET_USER_MEMORY_REGION, &r))
		die("KVM_CREATE_VCPU");
	run = mmap(NULL, (size_t)ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE,
		   MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED)
		die("mmap");
}

static void drop_vm(void)
{
	munmap(run, (size_t)ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
	close(vcpu);
	close(vm);
}

/* ---- what can be seen -------------------------------------------------------------- */

static uint64_t sum;

static void see(const char *name, const void *p, size_t n)
{
	const uint8_t *b = p;

	if (verbose)
		printf("    %s ", name);
	for (size_t i = 0; i < n; i++) {
		sum = (sum ^ b[i]) * 0x100000001b3ull;
		if (verbose)
			printf("%02x", b[i]);
	}
	if (verbose)
		printf("\n");
}

static void see_lapic(void)
{
	/* TPR, LDR, DFR, SVR, ISR, TMR, IRR, LVT0 */
	static const uint16_t regs[] = {0x80, 0xd0, 0xe0, 0xf0, 0x350};
	struct kvm_lapic_state l;

	if (ioctl(vcpu, KVM_GET_LAPIC, &l))
		return;
	for (unsigned i = 0; i < sizeof(regs) / sizeof(regs[0]); i++)
		see("lapic", l.regs + regs[i], 4);
	for (unsigned base = 0x100; base < 0x280; base += 0x80) {
		uint32_t bits[8];

		for (unsigned i = 0; i < 8; i++)
			memcpy(&bits[i], l.regs + base + 0x10 * i, 4);
		see(base == 0x100 ? "isr" : base == 0x180 ? "tmr" : "irr", bits, sizeof(bits));
	}
}

static void see_all(void)
{
	struct kvm_irqchip c;
	struct kvm_pit_state2 p;

	sum = 0xcbf29ce484222325ull;
	for (c.chip_id = 0; !split && c.chip_id < 3; c.chip_id++) {
		if (ioctl(vm, KVM_GET_IRQCHIP, &c))
			die("KVM_GET_IRQCHIP");
		if (c.chip_id < 2)
			see("pic", &c.chip.pic, sizeof(c.chip.pic));
		else
			see("ioapic", &c.chip.ioapic, sizeof(c.chip.ioapic));
	}
	if (!split) {
		if (ioctl(vm, KVM_GET_PIT2, &p))
			die("KVM_GET_PIT2");
		for (unsigned i = 1; i < 3; i++) {
			p.channels[i].count_load_time = 0;
			p.channels[i].latched_count = 0;
			p.channels[i].status = 0;
			see("pit", &p.channels[i], sizeof(p.channels[i]));
		}
	}
	see_lapic();
	printf("  %016llx\n", (unsigned long long)sum);
}

/* ---- what is done ------------------------------------------------------------------ */

/*
 * Fixed, lowest priority, NMI, ExtINT: not what stops the vCPU. An APIC that is disabled takes NMIs
 * (6.12), or does not (later).
 */
static unsigned delivery(void)
{
	static const uint8_t modes[] = {0, 0, 0, 0, 0, 1, 4, 7};
	unsigned mode = modes[rnd(8)];

	return mode == 4 && !apic_on ? 0 : mode;
}

static uint8_t vector(void)
{
	return rnd(8) ? (uint8_t)(0x40 + rnd(8) * 0x10 + rnd(2)) : (uint8_t)rnd(256);
}

static uint8_t destination(void)
{
	static const uint8_t dests[] = {0, 0, 0, 1, 0xff, 0x80};

	return dests[rnd(6)];
}

/* A few that meet again, or any. */
static unsigned some_pin(void)
{
	static const uint8_t pins[] = {1, 3, 8, 9, 10, 20};

	return rnd(4) ? pins[rnd(6)] : rnd(24);
}

static uint64_t random_entry(void)
{
	uint64_t e = vector() | (uint64_t)delivery() << 8 | (uint64_t)destination() << 56;

	e |= (uint64_t)rnd(2) << 11 | (uint64_t)rnd(2) << 13 | (uint64_t)rnd(2) << 15;
	return e | (uint64_t)!rnd(3) << 16;
}

static void op_pic(void)
{
	static const uint16_t ports[] = {0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1};
	uint16_t port = ports[rnd(rnd(4) ? 4 : 6)];
	uint8_t val;

	if (!rnd(4)) {
		printf("in %x\n", port);
		val = port_in(port);
		printf("  = %02x\n", val);
		return;
	}
	/* EOIs and small masks, or anything. */
	val = (uint8_t)rnd(256);
	if (!(port & 1) && rnd(2))
		val = rnd(2) ? 0x20 : (uint8_t)(0x60 + rnd(8));
	else if ((port & ~0x81) == 0x20 && (port & 1) && rnd(2))
		val = (uint8_t)(1u << rnd(8));
	printf("out %x %02x\n", port, val);
	port_out(port, val);
}

static void op_pic_init(void)
{
	uint8_t icw4 = (uint8_t)(rnd(8) ? 1 : rnd(32));

	printf("pic init %02x\n", icw4);
	for (unsigned i = 0; i < 2; i++) {
		uint16_t port = i ? 0xa0 : 0x20;

		port_out(port, 0x11);
		port_out(port + 1, i ? 0x28 : 0x20);
		port_out(port + 1, i ? 2 : 4);
		port_out(port + 1, icw4);
		port_out(port + 1, 0);
	}
}

static void op_ioapic(void)
{
	unsigned pin = some_pin();
	uint64_t e = random_entry();

	printf("ioapic %u %016llx\n", pin, (unsigned long long)e);
	ioapic_reg((uint8_t)(0x11 + 2 * pin), true, (uint32_t)(e >> 32));
	ioapic_reg((uint8_t)(0x10 + 2 * pin), true, (uint32_t)e);
}

static void op_ioapic_any(void)
{
	uint8_t reg = (uint8_t)rnd(0x48);
	uint32_t val = rnd(UINT32_MAX);

	printf("ioapic read %02x\n", reg);
	val = ioapic_reg(reg, false, 0);
	printf("  = %08x\n", val);
}

static void op_line(void)
{
	struct kvm_irq_level l = {.irq = rnd(16) ? some_pin() : rnd(40), .level = rnd(3) > 0};
	int r;

	printf("line %u %u\n", l.irq, l.level);
	r = try(vm, KVM_IRQ_LINE_STATUS, &l);
	printf("  = %d %d\n", r, (int)l.status);
}

static void op_msi(void)
{
	struct kvm_msi m = {
		.address_lo = 0xfee00000u | (uint32_t)destination() << 12 | rnd(4) << 2,
		.address_hi = rnd(4) ? 0 : rnd(UINT32_MAX),
		.data = vector() | delivery() << 8 | rnd(4) << 14,
		.flags = rnd(10) ? 0 : rnd(3),
	};
	int r;

	printf("msi %08x %08x\n", m.address_lo, m.data);
	r = try(vm, KVM_SIGNAL_MSI, &m);
	printf("  = %d\n", r);
}

static void op_routing(void)
{
	struct {
		struct kvm_irq_routing head;
		struct kvm_irq_routing_entry e[24];
	} t = {0};

	t.head.nr = rnd(25);
	for (unsigned i = 0; i < t.head.nr; i++) {
		struct kvm_irq_routing_entry *e = &t.e[i];

		e->gsi = rnd(16) ? i : rnd(24);
		if (split || !rnd(3)) {
			e->type = KVM_IRQ_ROUTING_MSI;
			e->u.msi.address_lo = 0xfee00000u | (uint32_t)destination() << 12;
			e->u.msi.data = vector() | delivery() << 8 | rnd(2) << 15;
		} else {
			e->type = KVM_IRQ_ROUTING_IRQCHIP;
			e->u.irqchip.irqchip = rnd(50) ? 2 - !rnd(3) : rnd(4);
			e->u.irqchip.pin = e->u.irqchip.irqchip == 2 ? rnd(24) : rnd(8);
		}
	}
	printf("routing %u\n", t.head.nr);
	printf("  = %d\n", try(vm, KVM_SET_GSI_ROUTING, &t));
}

static void op_lapic(void)
{
	switch (rnd(6)) {
	case 0:
		if (no_isr)
			break;
		printf("svr\n");
		mmio(LAPIC, 0xf0, true, 0x1ff);
		apic_on = true;
		break;
	case 1: {
		uint32_t tpr = rnd(3) ? 0 : rnd(256);

		printf("tpr %02x\n", tpr);
		mmio(LAPIC, 0x80, true, tpr);
		break;
	}
	case 2: {
		/* ExtINT, masked, or fixed (which nothing raises). */
		uint32_t lvt = rnd(4) ? 0x700 : rnd(2) ? 0x10700 : 0x41;

		printf("lvt0 %x\n", lvt);
		mmio(LAPIC, 0x350, true, lvt);
		break;
	}
	default:
		printf("eoi\n");
		mmio(LAPIC, 0xb0, true, 0);
		break;
	}
}

static void op_window(void)
{
	if (no_isr && apic_on)
		return;
	printf("window\n");
	window();
}

static void op_set_chip(void)
{
	struct kvm_irqchip c = {.chip_id = rnd(3)};
	unsigned pin = rnd(24);

	printf("set chip %u\n", c.chip_id);
	if (ioctl(vm, KVM_GET_IRQCHIP, &c))
		die("KVM_GET_IRQCHIP");
	if (c.chip_id < 2) {
		c.chip.pic.irr = (uint8_t)rnd(256);
		c.chip.pic.isr = (uint8_t)(rnd(2) ? 0 : 1u << rnd(8));
		c.chip.pic.elcr = (uint8_t)(rnd(2) ? 0 : rnd(256));
		c.chip.pic.special_fully_nested_mode = (uint8_t)rnd(2);
	} else {
		c.chip.ioapic.irr = rnd(2) ? 0 : rnd(1u << 24);
		c.chip.ioapic.redirtbl[pin].bits = random_entry() | (uint64_t)!rnd(3) << 14;
	}
	printf("  = %d\n", try(vm, KVM_SET_IRQCHIP, &c));
}

static void op_pit(void)
{
	uint16_t port = (uint16_t)(0x41 + rnd(3));
	uint8_t val = (uint8_t)rnd(256);

	if (port == 0x43 && val < 0x40)
		val |= 0x40;
	if (port == 0x43 && val >= 0xc0)
		val &= 0xfd; /* read-back of any but the first */
	printf("out %x %02x\n", port, val);
	port_out(port, val);
	if (rnd(2)) {
		port = (uint16_t)(0x41 + rnd(2));
		printf("in %x\n", port);
		port_in(port);
	}
}

static void op_reset_vm_bits(void)
{
	struct kvm_irq_level l = {0};

	printf("quiet\n");
	for (l.irq = 0; l.irq < 24; l.irq++)
		try(vm, KVM_IRQ_LINE, &l);
}

static const struct {
	void (*fn)(void);
	unsigned weight;
	bool in_split;
} ops[] = {
	{op_line, 12, true},     {op_pic, 10, false},       {op_pic_init, 1, false},
	{op_ioapic, 8, false},   {op_ioapic_any, 1, false}, {op_msi, 4, true},
	{op_routing, 1, true},   {op_lapic, 8, true},       {op_window, 16, true},
	{op_set_chip, 2, false}, {op_pit, 3, false},        {op_reset_vm_bits, 1, true},
};

static void one(void)
{
	unsigned total = 0;

	for (unsigned i = 0; i < sizeof(ops) / sizeof(ops[0]); i++)
		total += ops[i].weight;
	must_stop = false;
	split = !rnd(5);
	make_vm();
	if (!split)
		op_pic_init();
	apic_on = no_isr ? rnd(2) : rnd(4);
	if (apic_on) {
		printf("svr on\n");
		mmio(LAPIC, 0xf0, true, 0x1ff);
	}
	for (unsigned n = 0; n < OPS && !must_stop;) {
		unsigned w = rnd(total), i = 0;

		while (w >= ops[i].weight)
			w -= ops[i++].weight;
		if (split && !ops[i].in_split)
			continue;
		ops[i].fn();
		if (apic_on)
			settle();
		see_all();
		n++;
	}
	drop_vm();
}

/* Is a vector that was delivered in service? */
static void probe(void)
{
	struct kvm_msi m = {.address_lo = LAPIC, .data = 0x80};

	make_vm();
	mmio(LAPIC, 0xf0, true, 0x1ff);
	if (try(vm, KVM_SIGNAL_MSI, &m) != 1)
		die("KVM_SIGNAL_MSI");
	silent = true;
	window();
	if (!(mmio(LAPIC, 0x140, false, 0) & 1))
		printf("n\n");
	drop_vm();
}

int main(int argc, char **argv)
{
	unsigned long seed = argc > 1 ? strtoul(argv[1], NULL, 0) : 1;
	unsigned long count = argc > 2 ? strtoul(argv[2], NULL, 0) : 1;
	const char *flags = argc > 3 ? argv[3] : "";

	verbose = strchr(flags, 'v');
	no_isr = strchr(flags, 'n');
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (kvm < 0 || ram == MAP_FAILED)
		die("/dev/kvm");
	if (argc > 1 && !strcmp(argv[1], "probe")) {
		probe();
		return 0;
	}
	for (unsigned long i = 0; i < count; i++) {
		printf("seed %lu\n", seed + i);
		state = (seed + i) * 0x9e3779b97f4a7c15ull + 1;
		rnd(2);
		one();
	}
	return fflush(stdout) || ferror(stdout);
}
