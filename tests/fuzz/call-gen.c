/* SPDX-License-Identifier: MIT */
/*
 * Generates sequences of KVM calls: the right call with values at and beyond its limits, the wrong
 * object, the wrong number, the wrong pointer. Guest memory regions have a generator of their own
 * (tests/diff/region-gen.c).
 */
#include <linux/kvm.h>
#include <string.h>

#include "../random.h"
#include "call.h"

#define S(type) (uint16_t)sizeof(struct type)

#define EVENTFD 100 /* and the next: call-fuzz.c puts event descriptors there */

/* clang-format off */
const struct form forms[] = {
	/* system */
	{"GET_API_VERSION", ON_KVM, NO_ARG, KVM_GET_API_VERSION, .weight = 1},
	{"GET_VCPU_MMAP_SIZE", ON_KVM, NO_ARG, KVM_GET_VCPU_MMAP_SIZE, .weight = 1},
	{"CREATE_VM", ON_KVM, CREATE_VM, KVM_CREATE_VM, .weight = 3},
	{"CHECK_EXTENSION", ON_KVM, CHECK_CAP, KVM_CHECK_EXTENSION, .weight = 3},
	{"GET_MSR_INDEX_LIST", ON_KVM, IN_OUT, KVM_GET_MSR_INDEX_LIST, .size = 8, .weight = 1, .mask = {{0, 8}}},
	{"GET_MSR_FEATURE_INDEX_LIST", ON_KVM, IN_OUT, KVM_GET_MSR_FEATURE_INDEX_LIST, .size = 8, .weight = 1,
	 .mask = {{0, 8}}},
	{"GET_SUPPORTED_CPUID", ON_KVM, CPUID_GET, KVM_GET_SUPPORTED_CPUID, .weight = 1},
	{"GET_EMULATED_CPUID", ON_KVM, CPUID_GET, KVM_GET_EMULATED_CPUID, .weight = 1},
	{"X86_GET_MCE_CAP_SUPPORTED", ON_KVM, OUT, KVM_X86_GET_MCE_CAP_SUPPORTED, .size = 8, .weight = 1,
	 .mask = {{0, 8}}},
	/* VM */
	{"CREATE_VCPU", ON_VM, CREATE_VCPU, KVM_CREATE_VCPU, .weight = 4},
	{"VM_CHECK_EXTENSION", ON_VM, CHECK_CAP, KVM_CHECK_EXTENSION, .weight = 2},
	{"VM_ENABLE_CAP", ON_VM, ENABLE_CAP, KVM_ENABLE_CAP, .weight = 12},
	{"SET_TSS_ADDR", ON_VM, NO_ARG, KVM_SET_TSS_ADDR, .weight = 2},
	{"SET_IDENTITY_MAP_ADDR", ON_VM, IN, KVM_SET_IDENTITY_MAP_ADDR, .size = 8, .weight = 2},
	{"CREATE_IRQCHIP", ON_VM, NO_ARG, KVM_CREATE_IRQCHIP, .weight = 3},
	{"CREATE_PIT2", ON_VM, IN, KVM_CREATE_PIT2, .size = S(kvm_pit_config), .weight = 3},
	{"CREATE_PIT", ON_VM, NO_ARG, KVM_CREATE_PIT, .weight = 1},
	{"GET_IRQCHIP", ON_VM, IN_OUT, KVM_GET_IRQCHIP, .size = S(kvm_irqchip), .weight = 4},
	{"SET_IRQCHIP", ON_VM, CHANGE, KVM_SET_IRQCHIP, KVM_GET_IRQCHIP, S(kvm_irqchip), .weight = 6},
	{"GET_PIT2", ON_VM, OUT, KVM_GET_PIT2, .size = S(kvm_pit_state2), .weight = 3,
	 .mask = {{16, 8}, {40, 8}, {64, 8}}},
	{"SET_PIT2", ON_VM, CHANGE, KVM_SET_PIT2, KVM_GET_PIT2, S(kvm_pit_state2), .weight = 3},
	{"GET_PIT", ON_VM, OUT, KVM_GET_PIT, .size = S(kvm_pit_state), .weight = 1,
	 .mask = {{16, 8}, {40, 8}, {64, 8}}},
	{"REINJECT_CONTROL", ON_VM, IN, KVM_REINJECT_CONTROL, .size = S(kvm_reinject_control), .weight = 2},
	{"IRQ_LINE", ON_VM, IN, KVM_IRQ_LINE, .size = S(kvm_irq_level), .weight = 4},
	{"IRQ_LINE_STATUS", ON_VM, IN_OUT, KVM_IRQ_LINE_STATUS, .size = S(kvm_irq_level), .weight = 4},
	{"SET_GSI_ROUTING", ON_VM, IN, KVM_SET_GSI_ROUTING, .size = 8 + 6 * S(kvm_irq_routing_entry), .weight = 5},
	{"SIGNAL_MSI", ON_VM, IN, KVM_SIGNAL_MSI, .size = S(kvm_msi), .weight = 4},
	{"IRQFD", ON_VM, IN, KVM_IRQFD, .size = S(kvm_irqfd), .weight = 5},
	{"IOEVENTFD", ON_VM, IN, KVM_IOEVENTFD, .size = S(kvm_ioeventfd), .weight = 6},
	{"REGISTER_COALESCED_MMIO", ON_VM, IN, KVM_REGISTER_COALESCED_MMIO, .size = S(kvm_coalesced_mmio_zone),
	 .weight = 2},
	{"UNREGISTER_COALESCED_MMIO", ON_VM, IN, KVM_UNREGISTER_COALESCED_MMIO,
	 .size = S(kvm_coalesced_mmio_zone), .weight = 2},
	{"SET_BOOT_CPU_ID", ON_VM, NO_ARG, KVM_SET_BOOT_CPU_ID, .weight = 2},
	{"GET_CLOCK", ON_VM, OUT, KVM_GET_CLOCK, .size = S(kvm_clock_data), .weight = 1,
	 .mask = {{0, 8}, {8, 4}, {16, 16}}},
	{"SET_CLOCK", ON_VM, IN, KVM_SET_CLOCK, .size = S(kvm_clock_data), .weight = 3},
	{"VM_GET_TSC_KHZ", ON_VM, NO_ARG, KVM_GET_TSC_KHZ, .weight = 1},
	{"VM_SET_TSC_KHZ", ON_VM, NO_ARG, KVM_SET_TSC_KHZ, .weight = 1},
	{"GET_NR_MMU_PAGES", ON_VM, NO_ARG, KVM_GET_NR_MMU_PAGES, .weight = 1},
	{"SET_NR_MMU_PAGES", ON_VM, NO_ARG, KVM_SET_NR_MMU_PAGES, .weight = 1},
	{"CREATE_DEVICE", ON_VM, IN_OUT, KVM_CREATE_DEVICE, .size = S(kvm_create_device), .weight = 2},
	{"X86_SET_MSR_FILTER", ON_VM, IN, KVM_X86_SET_MSR_FILTER, .size = S(kvm_msr_filter), .weight = 3},
	{"VM_HAS_DEVICE_ATTR", ON_VM, IN, KVM_HAS_DEVICE_ATTR, .size = S(kvm_device_attr), .weight = 1},
	{"MEMORY_ENCRYPT_OP", ON_VM, NO_ARG, KVM_MEMORY_ENCRYPT_OP, .weight = 1},
	/* vCPU */
	{"RUN", ON_VCPU, RUN, KVM_RUN, .weight = 20},
	{"GET_REGS", ON_VCPU, OUT, KVM_GET_REGS, .size = S(kvm_regs), .weight = 5},
	{"SET_REGS", ON_VCPU, CHANGE, KVM_SET_REGS, KVM_GET_REGS, S(kvm_regs), .weight = 5},
	{"GET_SREGS", ON_VCPU, OUT, KVM_GET_SREGS, .size = S(kvm_sregs), .weight = 6, .mask = {{0x90, 48}}},
	{"SET_SREGS", ON_VCPU, CHANGE, KVM_SET_SREGS, KVM_GET_SREGS, S(kvm_sregs), .weight = 10},
	{"GET_SREGS2", ON_VCPU, OUT, KVM_GET_SREGS2, .size = S(kvm_sregs2), .weight = 2,
	 .mask = {{0x90, 48}}},
	{"SET_SREGS2", ON_VCPU, CHANGE, KVM_SET_SREGS2, KVM_GET_SREGS2, S(kvm_sregs2), .weight = 5},
	{"GET_FPU", ON_VCPU, OUT, KVM_GET_FPU, .size = S(kvm_fpu), .weight = 2},
	/*
	 * Not KVM_SET_FPU: KVM stores the registers and leaves XSTATE_BV alone, so that whether they are
	 * there afterwards depends on what the processor had saved before.
	 */
	{"GET_LAPIC", ON_VCPU, OUT, KVM_GET_LAPIC, .size = S(kvm_lapic_state), .weight = 4,
	 .mask = {{0xa0, 4}, {0x390, 4}}}, /* KVM computes the PPR later */
	{"SET_LAPIC", ON_VCPU, CHANGE, KVM_SET_LAPIC, KVM_GET_LAPIC, S(kvm_lapic_state), .weight = 6},
	{"GET_MP_STATE", ON_VCPU, OUT, KVM_GET_MP_STATE, .size = S(kvm_mp_state), .weight = 3},
	{"SET_MP_STATE", ON_VCPU, IN, KVM_SET_MP_STATE, .size = S(kvm_mp_state), .weight = 4},
	{"GET_VCPU_EVENTS", ON_VCPU, OUT, KVM_GET_VCPU_EVENTS, .size = S(kvm_vcpu_events), .weight = 6},
	{"SET_VCPU_EVENTS", ON_VCPU, CHANGE, KVM_SET_VCPU_EVENTS, KVM_GET_VCPU_EVENTS, S(kvm_vcpu_events),
	 .weight = 8},
	{"GET_DEBUGREGS", ON_VCPU, OUT, KVM_GET_DEBUGREGS, .size = S(kvm_debugregs), .weight = 2},
	{"SET_DEBUGREGS", ON_VCPU, CHANGE, KVM_SET_DEBUGREGS, KVM_GET_DEBUGREGS, S(kvm_debugregs), .weight = 4},
	{"GET_XSAVE", ON_VCPU, OUT, KVM_GET_XSAVE, .size = S(kvm_xsave), .weight = 2, .mask = {{28, 4}, {464, 48}}},
	{"SET_XSAVE", ON_VCPU, CHANGE, KVM_SET_XSAVE, KVM_GET_XSAVE, S(kvm_xsave), .weight = 4},
	{"GET_XCRS", ON_VCPU, OUT, KVM_GET_XCRS, .size = S(kvm_xcrs), .weight = 2},
	{"SET_XCRS", ON_VCPU, CHANGE, KVM_SET_XCRS, KVM_GET_XCRS, S(kvm_xcrs), .weight = 3},
	{"GET_MSRS", ON_VCPU, MSRS_GET, KVM_GET_MSRS, .weight = 8},
	{"SET_MSRS", ON_VCPU, MSRS_SET, KVM_SET_MSRS, .weight = 14},
	{"GET_CPUID2", ON_VCPU, CPUID_GET, KVM_GET_CPUID2, .weight = 2},
	{"SET_CPUID2", ON_VCPU, CPUID_SET, KVM_SET_CPUID2, .weight = 4},
	{"INTERRUPT", ON_VCPU, IN, KVM_INTERRUPT, .size = S(kvm_interrupt), .weight = 4},
	{"NMI", ON_VCPU, NO_ARG, KVM_NMI, .weight = 3},
	{"SMI", ON_VCPU, NO_ARG, KVM_SMI, .weight = 1, .cap = KVM_CAP_X86_SMM},
	{"TRANSLATE", ON_VCPU, IN_OUT, KVM_TRANSLATE, .size = S(kvm_translation), .weight = 3},
	{"TPR_ACCESS_REPORTING", ON_VCPU, IN_OUT, KVM_TPR_ACCESS_REPORTING, .size = S(kvm_tpr_access_ctl),
	 .weight = 2, .cap = KVM_CAP_VAPIC},
	{"SET_VAPIC_ADDR", ON_VCPU, IN, KVM_SET_VAPIC_ADDR, .size = 8, .weight = 2, .cap = KVM_CAP_VAPIC},
	{"X86_SETUP_MCE", ON_VCPU, IN, KVM_X86_SETUP_MCE, .size = 8, .weight = 3},
	{"X86_SET_MCE", ON_VCPU, IN, KVM_X86_SET_MCE, .size = S(kvm_x86_mce), .weight = 3},
	{"GET_TSC_KHZ", ON_VCPU, NO_ARG, KVM_GET_TSC_KHZ, .weight = 1},
	{"SET_TSC_KHZ", ON_VCPU, NO_ARG, KVM_SET_TSC_KHZ, .weight = 1},
	{"KVMCLOCK_CTRL", ON_VCPU, NO_ARG, KVM_KVMCLOCK_CTRL, .weight = 2},
	{"SET_GUEST_DEBUG", ON_VCPU, IN, KVM_SET_GUEST_DEBUG, .size = S(kvm_guest_debug), .weight = 4},
	{"VCPU_ENABLE_CAP", ON_VCPU, ENABLE_CAP, KVM_ENABLE_CAP, .weight = 2},
	{"VCPU_HAS_DEVICE_ATTR", ON_VCPU, IN, KVM_HAS_DEVICE_ATTR, .size = S(kvm_device_attr), .weight = 1},
	{"SET_SIGNAL_MASK", ON_VCPU, IN, KVM_SET_SIGNAL_MASK, .size = 12, .weight = 1},
};
/* clang-format on */
const unsigned nr_forms = sizeof(forms) / sizeof(forms[0]);

struct gen {
	uint64_t state;
	const struct features *features;
	struct sequence *s;
};

static uint64_t next(struct gen *g)
{
	return random_next(&g->state);
}

static uint64_t below(struct gen *g, uint64_t n)
{
	return next(g) % n;
}

/* True @percent times in 100. */
static bool chance(struct gen *g, unsigned percent)
{
	return below(g, 100) < percent;
}

#define PICK(g, table) ((table)[below(g, sizeof(table) / sizeof((table)[0]))])

static bool has(const struct gen *g, unsigned cap)
{
	return !cap || g->features->caps[cap / 64] >> cap % 64 & 1;
}

static uint64_t any_value(struct gen *g)
{
	static const uint64_t special[] = {
		0x10000,     0x7fffffff, 0x80000000,    0xffffffff,
		0x100000000, 1ull << 40, 1ull << 47,    1ull << 52,
		1ull << 63,  ~0ull,      ~0ull << 12,   ~0ull << 47,
		0xfee00000,  0xfee00900, 0xfec00000,    0xfffbc000,
		0xfffbd000,  0xfeffc000, 0x0101010101,  0x7ff00000,
		0xf0000000f, 0xcafe0001, 0x00070406ull, 0x0007040600070406ull,
		0x500,       0xd01,      0xfe0,         0x1f80,
		0x37f,       0xffff0ff0, 0x80000011,    0x60000010,
		0x406f0,     0x20,       0x2000,        0xc3,
	};

	switch (below(g, 8)) {
	case 0:
		return 0;
	case 1:
	case 2:
		return below(g, 8);
	case 3:
		return below(g, 256);
	case 4:
		return 1ull << below(g, 64);
	case 5:
		return (1ull << below(g, 64)) - 1;
	case 6:
		return next(g);
	default:
		return PICK(g, special);
	}
}

static void put(struct call *c, unsigned at, const void *what, unsigned n)
{
	memcpy(c->data + at, what, n);
	if (at + n > c->ndata)
		c->ndata = (uint16_t)(at + n);
}

static void put32(struct call *c, unsigned at, uint64_t what)
{
	uint32_t v = (uint32_t)what;

	put(c, at, &v, 4);
}

static void put64(struct call *c, unsigned at, uint64_t what)
{
	put(c, at, &what, 8);
}

/* ---- MSRs and CPUID --------------------------------------------------------------------- */

static uint32_t any_msr(struct gen *g)
{
	static const uint32_t usual[] = {
		0x0,        0x1,        0x10,       0x17,       0x1b,       0x34,       0x11,
		0x3b,       0x2c,       0x12,       0x79,       0x12,       0xc1,       0xce,
		0xcd,       0xfe,       0x12,       0x12,       0x11e,      0x174,      0x175,
		0x176,      0x179,      0x17a,      0x17b,      0x186,      0x187,      0x198,
		0x199,      0x19a,      0x19c,      0x12,       0x1a2,      0x1ad,      0x1db,
		0x1dc,      0x200,      0x201,      0x20e,      0x20f,      0x210,      0x250,
		0x258,      0x259,      0x268,      0x26f,      0x12,       0x280,      0x281,
		0x2ff,      0x38d,      0x38f,      0x390,      0x400,      0x401,      0x402,
		0x403,      0x404,      0x47f,      0x480,      0x47e,      0x606,      0x611,
		0x6e0,      0x800,      0x802,      0x803,      0x808,      0x80b,      0x80d,
		0x80f,      0x830,      0x831,      0x832,      0x838,      0x839,      0x83e,
		0x83f,      0x11,       0xc0000080, 0xc0000081, 0xc0000082, 0xc0000083, 0xc0000084,
		0xc0000100, 0xc0000101, 0xc0000102, 0xc0000103, 0xc001001b, 0xc0010000, 0xc0010015,
		0xc0010007, 0xc001001f, 0xc0010055, 0xc0010058, 0xc0010114, 0xc0010117, 0xc001100c,
		0xc0011020, 0xc0011022, 0xc0011023, 0x12,       0x11,       0x12,       0x4b564d00,
		0x4b564d01, 0x4b564d02, 0x4b564d03, 0x4b564d04, 0x4b564d05, 0x4b564d06, 0x4b564d07,
		0x4b564d08,
	};

	/* Others than Hyper-V's, which not all have. */
	return chance(g, 97) ? PICK(g, usual) : (uint32_t)any_value(g) & ~0x40000000u;
}

static void msrs(struct gen *g, struct call *c)
{
	unsigned n = 1 + (unsigned)below(g, chance(g, 20) ? 6 : 2);

	put32(c, 0, chance(g, 2) ? any_value(g) : n);
	put32(c, 4, chance(g, 2) ? any_value(g) : 0);
	for (unsigned i = 0; i < n; i++) {
		put32(c, 8 + 16 * i, any_msr(g));
		put32(c, 12 + 16 * i, chance(g, 2) ? any_value(g) : 0);
		put64(c, 16 + 16 * i, any_value(g));
	}
}

unsigned usual_cpuid(struct kvm_cpuid_entry2 *e, unsigned room)
{
	static const struct kvm_cpuid_entry2 usual[] = {
		{0, .eax = 0xd, .ebx = 0x756e6547, .ecx = 0x6c65746e, .edx = 0x49656e69},
		{1, .eax = 0x306a9, .ebx = 0x800, .ecx = 0xf7f83203, .edx = 0x1f8bfbff},
		{0xd, .flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX, .eax = 7, .ebx = 0x240,
		 .ecx = 0x340},
		{0xd, .index = 1, .flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX, .eax = 1},
		{0xd, .index = 2, .flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX, .eax = 0x100,
		 .ebx = 0x240},
		{0x40000000, .eax = 0x40000001, .ebx = 0x4b4d564b, .ecx = 0x564b4d56, .edx = 0x4d},
		{0x40000001, .eax = 0x01000000 | 0x6b},
		{0x80000000, .eax = 0x80000008},
		{0x80000001, .ecx = 1, .edx = 0x2c100800},
		{0x80000008, .eax = 0x3028},
	};
	unsigned n = sizeof(usual) / sizeof(usual[0]);

	if (n > room)
		n = room;
	memcpy(e, usual, n * sizeof(*e));
	return n;
}

static void cpuid(struct gen *g, struct call *c)
{
	struct kvm_cpuid_entry2 e[32] = {0};
	unsigned n = usual_cpuid(e, 32), changes = chance(g, 50) ? 0 : 1 + (unsigned)below(g, 3);

	while (changes--) {
		uint32_t *w = (uint32_t *)&e[below(g, n)];

		w[below(g, 10)] ^= (uint32_t)any_value(g);
	}
	put32(c, 0, chance(g, 3) ? any_value(g) : n);
	put32(c, 4, 0);
	put(c, 8, e, n * (unsigned)sizeof(*e));
}

/* ---- structures ------------------------------------------------------------------------- */

static uint64_t any_gsi(struct gen *g)
{
	return chance(g, 90) ? below(g, 26) : any_value(g);
}

static uint64_t any_fd(struct gen *g)
{
	return chance(g, 85) ? EVENTFD + below(g, 3) : any_value(g);
}

static void routing(struct gen *g, struct call *c)
{
	unsigned n = (unsigned)below(g, 7);

	put32(c, 0, chance(g, 3) ? 4097 + below(g, 1ull << 31) : n);
	put32(c, 4, chance(g, 5) ? any_value(g) : 0);
	for (unsigned i = 0; i < n; i++) {
		struct kvm_irq_routing_entry e = {
			.gsi = (uint32_t)any_gsi(g),
			.type = chance(g, 45)   ? KVM_IRQ_ROUTING_IRQCHIP
				: chance(g, 90) ? KVM_IRQ_ROUTING_MSI
						: (uint32_t)below(g, 8),
			.flags = chance(g, 5) ? (uint32_t)any_value(g) : 0,
		};

		if (e.type == KVM_IRQ_ROUTING_IRQCHIP) {
			e.u.irqchip.irqchip = (uint32_t)below(g, chance(g, 95) ? 3 : 5);
			e.u.irqchip.pin = (uint32_t)below(g, e.u.irqchip.irqchip == 2 ? 26 : 9);
		} else {
			e.u.msi.address_lo = 0xfee00000 | (uint32_t)below(g, 3) << 12;
			e.u.msi.address_hi = chance(g, 10) ? (uint32_t)any_value(g) : 0;
			e.u.msi.data = (uint32_t)(chance(g, 80) ? below(g, 256) : any_value(g));
		}
		put(c, 8 + i * (unsigned)sizeof(e), &e, sizeof(e));
	}
}

static void ioeventfd(struct gen *g, struct call *c)
{
	static const uint64_t ports[] = {0, 1, 2, 0x80, 0x1f0, 0xffff, 0x10000};
	static const uint64_t gpas[] = {0x10000000, 0x10000004, 0x10000000, 0xfffffffffffffffc};
	struct kvm_ioeventfd e = {
		.datamatch = chance(g, 50) ? below(g, 3) : any_value(g),
		.len = chance(g, 90) ? 1u << below(g, 4) : (uint32_t)below(g, 10),
		.fd = (int32_t)any_fd(g),
		.flags = (uint32_t)(chance(g, 90) ? below(g, 8) : any_value(g)),
	};

	if (chance(g, 10))
		e.len = 0;
	e.addr = e.flags & KVM_IOEVENTFD_FLAG_PIO ? PICK(g, ports) : PICK(g, gpas);
	put(c, 0, &e, sizeof(e));
}

static void debug_control(struct gen *g, struct call *c)
{
	struct kvm_guest_debug d = {
		.control =
			(uint32_t)(chance(g, 85) ? below(g, 4) | below(g, 4) << 16 : any_value(g)),
	};

	for (unsigned i = 0; i < 8; i++)
		d.arch.debugreg[i] = chance(g, 60) ? 0 : any_value(g);
	put(c, 0, &d, sizeof(d));
}

/* Fill in a structure that is read. Those not named get values at random places. */
static void structure(struct gen *g, struct call *c)
{
	unsigned long cmd = c->form->cmd;
	unsigned size = c->form->size;

	memset(c->data, 0, size);
	c->ndata = (uint16_t)size;
	switch (cmd) {
	case KVM_SET_IDENTITY_MAP_ADDR:
	case KVM_SET_VAPIC_ADDR:
		put64(c, 0, chance(g, 70) ? below(g, 16) << 12 : any_value(g));
		return;
	case KVM_X86_SETUP_MCE:
		put64(c, 0,
		      below(g, 40) | (chance(g, 60) ? 0x1000100 : 0) |
			      (chance(g, 10) ? any_value(g) & ~0x8000400ull : 0));
		return;
	case KVM_X86_SET_MCE:
		put64(c, 0,
		      1ull << 63 | (chance(g, 50) ? 1ull << 61 : 0) |
			      (chance(g, 10) ? any_value(g) : 0));
		put64(c, 8, below(g, 4096));
		put64(c, 24, below(g, 16));
		put32(c, 32, below(g, 40)); /* bank: a byte */
		return;
	case KVM_CREATE_PIT2:
		put32(c, 0, chance(g, 70) ? below(g, 2) : any_value(g));
		return;
	case KVM_GET_IRQCHIP:
		put32(c, 0, below(g, chance(g, 90) ? 3 : 6));
		return;
	case KVM_IRQ_LINE:
	case KVM_IRQ_LINE_STATUS:
		put32(c, 0, any_gsi(g));
		put32(c, 4, chance(g, 90) ? below(g, 2) : any_value(g));
		return;
	case KVM_SET_GSI_ROUTING:
		routing(g, c);
		return;
	case KVM_SIGNAL_MSI: {
		struct kvm_msi m = {
			.address_lo = 0xfee00000 | (uint32_t)below(g, 4) << 12 |
				      (chance(g, 20) ? (uint32_t)below(g, 16) << 2 : 0),
			.address_hi = chance(g, 10) ? (uint32_t)any_value(g) : 0,
			.data = (uint32_t)(chance(g, 80) ? below(g, 256) : any_value(g)),
			.flags = chance(g, 5) ? (uint32_t)any_value(g) : 0,
		};

		if (chance(g, 5))
			m.address_lo = (uint32_t)any_value(g);
		put(c, 0, &m, sizeof(m));
		return;
	}
	case KVM_IRQFD: {
		struct kvm_irqfd e = {
			.fd = (uint32_t)any_fd(g),
			.gsi = (uint32_t)any_gsi(g),
			.flags = (uint32_t)(chance(g, 90) ? below(g, 4) : any_value(g)),
			.resamplefd = (uint32_t)any_fd(g),
		};

		put(c, 0, &e, sizeof(e));
		return;
	}
	case KVM_IOEVENTFD:
		ioeventfd(g, c);
		return;
	case KVM_REGISTER_COALESCED_MMIO:
	case KVM_UNREGISTER_COALESCED_MMIO:
		put64(c, 0, chance(g, 90) ? 0x10000000 + (below(g, 3) << 12) : any_value(g));
		put32(c, 8, chance(g, 90) ? 1u << below(g, 13) : any_value(g));
		put32(c, 12, chance(g, 90) ? below(g, 2) : any_value(g));
		return;
	case KVM_SET_CLOCK:
		put64(c, 0, any_value(g) >> 2);
		put32(c, 8, chance(g, 60) ? 0 : below(g, 16));
		put64(c, 16, any_value(g) >> 2);
		return;
	case KVM_CREATE_DEVICE:
		put32(c, 0, below(g, 14));
		put32(c, 8, chance(g, 70) ? KVM_CREATE_DEVICE_TEST : below(g, 4));
		/* Only the real thing has VFIO, and 4 is it. */
		if (c->data[0] == KVM_DEV_TYPE_VFIO)
			put32(c, 0, KVM_DEV_TYPE_XICS);
		return;
	case KVM_X86_SET_MSR_FILTER:
		put32(c, 0, chance(g, 90) ? below(g, 2) : any_value(g));
		if (chance(g, 30)) {
			put32(c, 8, below(g, 4));
			put32(c, 12, below(g, 40));
			put32(c, 16, any_msr(g));
			put64(c, 24, chance(g, 50) ? 0 : any_value(g));
		}
		return;
	case KVM_SET_MP_STATE:
		put32(c, 0, chance(g, 90) ? below(g, 7) : any_value(g));
		return;
	case KVM_INTERRUPT:
		put32(c, 0, chance(g, 90) ? below(g, 256) : any_value(g));
		return;
	case KVM_TRANSLATE:
		put64(c, 0, chance(g, 80) ? below(g, 1 << 20) : any_value(g));
		return;
	case KVM_SET_GUEST_DEBUG:
		debug_control(g, c);
		return;
	case KVM_HAS_DEVICE_ATTR:
		put32(c, 0, chance(g, 80) ? 0 : any_value(g));
		put32(c, 4, below(g, 3));
		put64(c, 8, below(g, 3));
		return;
	case KVM_SET_SIGNAL_MASK:
		put32(c, 0, chance(g, 80) ? 8 : any_value(g));
		return;
	default:
		for (unsigned n = 1 + (unsigned)below(g, 3); n; n--)
			put32(c, 4 * (unsigned)below(g, size / 4), any_value(g));
	}
}

static void patches(struct gen *g, struct call *c)
{
	/* Nothing but padding in most of these: aim at the registers. */
	unsigned size = c->form->cmd == KVM_SET_XSAVE ? 640 : c->form->size;

	c->npatches = chance(g, 10) ? 0 : 1 + (unsigned)below(g, MAX_PATCH);
	for (unsigned i = 0; i < c->npatches; i++) {
		struct patch *p = &c->patch[i];

		p->size = (uint8_t)(1u << below(g, 4));
		p->at = (uint16_t)(below(g, size / p->size) * p->size);
		p->how = (unsigned)below(g, 10) < 5 ? PUT : chance(g, 80) ? FLIP : ADD;
		p->value = p->how == FLIP && chance(g, 80) ? 1ull << below(g, 8 * p->size)
							   : any_value(g);
		/* The registers of an APIC are 16 bytes apart, and of 4. */
		if (c->form->cmd == KVM_SET_LAPIC) {
			p->at = (uint16_t)(below(g, 64) * 16);
			p->size = 4;
		}
		/* SMM is not everywhere, and KVM has taken half of the structure when it refuses
		 * it. */
		if (c->form->cmd == KVM_SET_VCPU_EVENTS && p->at + p->size > 24 && p->at < 28)
			p->at = 0;
		/* What a segment's attributes are kept as depends on the processor. */
		if ((c->form->cmd == KVM_SET_SREGS || c->form->cmd == KVM_SET_SREGS2) &&
		    p->at < offsetof(struct kvm_sregs, gdt)) {
			p->at = (uint16_t)(p->at / sizeof(struct kvm_segment) *
					   sizeof(struct kvm_segment));
			p->size = 8;
		}
		/* Control registers are few among many. */
		if ((c->form->cmd == KVM_SET_SREGS || c->form->cmd == KVM_SET_SREGS2) &&
		    chance(g, 40)) {
			p->at = (uint16_t)(offsetof(struct kvm_sregs, cr0) + 8 * below(g, 7));
			p->size = 8;
		}
	}
	/* Which chip: what is read says it. */
	if (c->form->cmd == KVM_SET_IRQCHIP)
		c->value = below(g, chance(g, 95) ? 3 : 5);
}

static void capability(struct gen *g, struct call *c)
{
	static const uint32_t common[] = {
		KVM_CAP_SPLIT_IRQCHIP,
		KVM_CAP_X2APIC_API,
		KVM_CAP_X86_DISABLE_EXITS,
		KVM_CAP_MAX_VCPU_ID,
		KVM_CAP_EXCEPTION_PAYLOAD,
		KVM_CAP_X86_USER_SPACE_MSR,
		KVM_CAP_HYPERV_SYNIC,
		KVM_CAP_X86_TRIPLE_FAULT_EVENT,
		KVM_CAP_DISABLE_QUIRKS,
		KVM_CAP_DISABLE_QUIRKS2,
		KVM_CAP_EXIT_HYPERCALL,
		KVM_CAP_X86_BUS_LOCK_EXIT,
		KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
		KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
		KVM_CAP_EXIT_ON_EMULATION_FAILURE,
		KVM_CAP_HYPERV_ENFORCE_CPUID,
		KVM_CAP_PMU_CAPABILITY,
		KVM_CAP_X86_NOTIFY_VMEXIT,
	};
	uint32_t cap;

	do
		cap = chance(g, 80) ? PICK(g, common) : (uint32_t)below(g, NR_CAPS);
	while (cap < NR_CAPS && !has(g, cap));
	memset(c->data, 0, sizeof(struct kvm_enable_cap));
	put32(c, 0, cap);
	put32(c, 4, chance(g, 5) ? any_value(g) : 0);
	for (unsigned i = 0; i < 4; i++)
		put64(c, 8 + 8 * i, i && chance(g, 90) ? 0 : any_value(g));
	/* Those that everybody has. */
	if (cap == KVM_CAP_DISABLE_QUIRKS || cap == KVM_CAP_DISABLE_QUIRKS2)
		put64(c, 8, c->data[8] & ~(uint64_t)KVM_X86_QUIRK_CD_NW_CLEARED);
	c->ndata = sizeof(struct kvm_enable_cap);
}

static void fill(struct gen *g, struct call *c, const struct form *f)
{
	c->form = f;
	c->on = f->on;
	c->cmd = f->cmd;
	c->vm = chance(g, 90) ? 0 : (unsigned)below(g, NR_VMS);
	c->vcpu = (unsigned)below(g, 10) < 7 ? 0 : (unsigned)below(g, NR_VCPUS);
	switch (f->shape) {
	case CREATE_VM: /* all have type 0, and none those */
		c->value = chance(g, 80) ? 0 : 16 + any_value(g) % (1ull << 62);
		break;
	case NO_ARG:
		c->value = chance(g, 60) ? 0 : any_value(g);
		if (f->cmd == KVM_SET_TSS_ADDR)
			c->value = chance(g, 70) ? below(g, 0x100000) << 12 : any_value(g);
		break;
	case CREATE_VCPU:
		c->value = chance(g, 90) ? c->vcpu : any_value(g);
		break;
	case CHECK_CAP:
		do
			c->value = below(g, NR_CAPS);
		while (!has(g, (unsigned)c->value));
		break;
	case OUT:
		break;
	case IN:
	case IN_OUT:
		structure(g, c);
		break;
	case CHANGE:
		patches(g, c);
		break;
	case MSRS_GET:
	case MSRS_SET:
		msrs(g, c);
		break;
	case CPUID_GET:
		put32(c, 0, chance(g, 50) ? below(g, 8) : chance(g, 80) ? 40 : any_value(g));
		put32(c, 4, 0);
		break;
	case CPUID_SET:
		cpuid(g, c);
		break;
	case ENABLE_CAP:
		capability(g, c);
		break;
	case RUN:
		c->value = below(g, 16);
		put32(c, 0, any_msr(g));
		put64(c, 8, any_value(g));
		break;
	}
	/* What nobody should do. */
	if (chance(g, 3))
		c->ptr = 1 + (unsigned)below(g, 3);
	if (chance(g, 2))
		c->on = (enum where)below(g, 3);
	if (chance(g, 1))
		c->cmd ^= 1ul << below(g, 32);
}

static const struct form *any_form(struct gen *g)
{
	unsigned total = 0, n;

	for (unsigned i = 0; i < nr_forms; i++)
		total += forms[i].weight;
	for (;;) {
		n = (unsigned)below(g, total);
		for (unsigned i = 0; i < nr_forms; i++) {
			if (n < forms[i].weight) {
				if (has(g, forms[i].cap))
					return &forms[i];
				break;
			}
			n -= forms[i].weight;
		}
	}
}

static const struct form *the_form(unsigned long cmd)
{
	for (unsigned i = 0; i < nr_forms; i++)
		if (forms[i].cmd == cmd)
			return &forms[i];
	return NULL;
}

void generate(struct sequence *s, uint64_t seed, const struct features *features)
{
	struct gen g = {.state = seed * 0x2545f4914f6cdd1d, .features = features, .s = s};

	memset(s, 0, sizeof(*s));
	s->n = MAX_CALLS;
	for (unsigned i = 0; i < s->n; i++) {
		struct call *c = &s->calls[i];
		unsigned long first = 0;

		/* Before the vCPUs: what can only be done there. */
		if (i < 3)
			first = chance(&g, 40)   ? KVM_CREATE_IRQCHIP
				: chance(&g, 50) ? KVM_ENABLE_CAP
						 : 0;
		if (i == 3 || (i == 5 && chance(&g, 60)))
			first = KVM_CREATE_VCPU;
		if ((i == 4 || i == 6) && chance(&g, 80))
			first = KVM_SET_CPUID2;
		fill(&g, c, first ? the_form(first) : any_form(&g));
		if (first == KVM_CREATE_VCPU) {
			c->vm = 0;
			c->value = c->vcpu = i == 5;
		}
	}
}
