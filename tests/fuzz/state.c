/* SPDX-License-Identifier: MIT */
/* What a guest starts with: tables in memory, registers; and what happens to it from outside. */
#include "fuzz.h"

#define CR0_PE (1ull << 0)
#define CR0_WP (1ull << 16)
#define CR0_PG (1ull << 31)

#define CR4_PSE   (1ull << 4)
#define CR4_PAE   (1ull << 5)
#define CR4_LA57  (1ull << 12)
#define CR4_PCIDE (1ull << 17)

#define EFER_LME (1ull << 8)
#define EFER_LMA (1ull << 10)
#define EFER_NX  (1ull << 11)

const char *const mode_names[NMODES] = {"real",  "prot16", "prot32",   "vm86",     "paged32",
					"pae32", "long64", "compat32", "compat16", "la57"};

static bool is_long(enum mode m)
{
	return m >= LONG64;
}

uint64_t some_address(struct vm *vm, uint64_t *rng)
{
	const struct slot *s = &vm->slots[below(rng, vm->nslots)];

	switch (below(rng, 12)) {
	case 0:
		return rnd(rng);
	case 1:
		return (uint32_t)rnd(rng);
	case 2:
		return 0xfee00000 + (below(rng, 0x40) << 4);
	case 3:
		return 0xfec00000 + (below(rng, 8) << 4);
	case 4: /* not canonical, or just so */
		return (rnd(rng) & 1 ? 0x0000800000000000 : 0x0080000000000000) - 16 +
		       below(rng, 32);
	case 5:
		return -below(rng, 64);
	case 6:
		return TABLES + below(rng, NTABLES * PAGE);
	case 7:
		return CODE + below(rng, CODE_SIZE);
	case 8:
		return DATA + below(rng, DATA_SIZE / PAGE) * PAGE - below(rng, 16);
	case 9: /* around an end */
		return s->r.guest_phys_addr + (rnd(rng) & 1 ? s->r.memory_size : 0) - 32 +
		       below(rng, 64);
	default:
		return s->r.guest_phys_addr + below(rng, s->r.memory_size);
	}
}

/* ---- descriptors ---- */

static uint64_t descriptor(uint64_t base, uint32_t limit, unsigned access, unsigned flags)
{
	return (limit & 0xffff) | (base & 0xffffff) << 16 | (uint64_t)access << 40 |
	       (uint64_t)(limit >> 16 & 15) << 48 | (uint64_t)flags << 52 |
	       (base >> 24 & 0xff) << 56;
}

static uint64_t gate(uint64_t *rng, unsigned type, uint32_t to)
{
	unsigned sel = once_in(rng, 4) ? (unsigned)below(rng, GDT_LIMIT)
				       : (const uint8_t[]){SEL_CODE, SEL_CODE64, SEL_CODE16,
							   SEL_CODE}[below(rng, 4)];

	return (to & 0xffff) | (uint64_t)sel << 16 | (once_in(rng, 8) ? below(rng, 32) : 0) << 32 |
	       (uint64_t)(type | below(rng, 4) << 5 | !once_in(rng, 16) << 7) << 40 |
	       (uint64_t)(to >> 16) << 48;
}

static uint64_t random_descriptor(uint64_t *rng)
{
	static const uint8_t gates[] = {4, 5, 6, 7, 12, 14, 15, 12};

	switch (below(rng, 4)) {
	case 0:
		return rnd(rng);
	case 1:
		return gate(rng, gates[below(rng, 8)], CODE + (uint32_t)below(rng, CODE_SIZE));
	case 2: /* a system segment */
		return descriptor(once_in(rng, 2) ? TSS : LDT, (uint32_t)below(rng, 256),
				  (unsigned)below(rng, 16) | 0x80 | (unsigned)below(rng, 4) << 5,
				  0);
	default:
		return descriptor(once_in(rng, 2) ? 0 : rnd(rng),
				  once_in(rng, 2) ? 0xfffff : (uint32_t)rnd(rng) & 0xfffff,
				  0x90 | (unsigned)rnd(rng), (unsigned)below(rng, 16));
	}
}

static void make_descriptors(struct vm *vm, uint64_t *rng, enum mode mode)
{
	uint64_t *gdt = (uint64_t *)(vm->low + GDT), *ldt = (uint64_t *)(vm->low + LDT);
	uint64_t *idt = (uint64_t *)(vm->low + IDT);
	unsigned type = mode == PROT16 ? 6 : 14;

	for (unsigned i = 0; i <= GDT_LIMIT / 8; i++) {
		gdt[i] = random_descriptor(rng);
		ldt[i] = random_descriptor(rng);
	}
	gdt[SEL_CODE / 8] = descriptor(0, 0xfffff, 0x9b, is_long(mode) ? 10 : 12);
	gdt[SEL_DATA / 8] = descriptor(0, 0xfffff, 0x93, 12);
	gdt[SEL_CODE64 / 8] = descriptor(0, 0xfffff, 0x9b, 10);
	gdt[SEL_CODE16 / 8] = descriptor(CODE, 0xffff, 0x9b, 0);
	gdt[SEL_DATA16 / 8] = descriptor(DATA, 0xffff, 0x93, 0);
	gdt[SEL_UCODE / 8] = descriptor(0, 0xfffff, 0xfb, 12);
	gdt[SEL_UDATA / 8] = descriptor(0, 0xfffff, 0xf3, 12);
	gdt[SEL_UCODE6 / 8] = descriptor(0, 0xfffff, 0xfb, 10);
	gdt[SEL_TSS / 8] = descriptor(TSS, 0x67 + 0x100, 0x89, 0);
	gdt[SEL_TSS / 8 + 1] = 0;
	gdt[SEL_LDT / 8] = descriptor(LDT, GDT_LIMIT, 0x82, 0);
	gdt[SEL_LDT / 8 + 1] = 0;

	/* A few handlers, so that a guest goes on after an exception. */
	for (unsigned i = 0; i < PAGE / 8; i++) {
		unsigned t = once_in(rng, 16) ? (unsigned)below(rng, 32) : type | (i & 1);

		idt[i] = gate(rng, t, CODE + (uint32_t)below(rng, CODE_SIZE));
		if (is_long(mode) && (i & 1))
			idt[i] = once_in(rng, 32) ? rnd(rng) : 0;
	}
	for (unsigned i = 0; i < 256 && mode == REAL; i++)
		((uint32_t *)vm->low)[i] = (uint32_t)below(rng, 0x10000) | (uint32_t)(CODE >> 4)
										   << 16;

	fill_random(rng, vm->low + TSS, 0x68);
	for (unsigned i = 0; i < 3; i++) {
		uint64_t sp = DATA + below(rng, DATA_SIZE);

		if (is_long(mode))
			memcpy(vm->low + TSS + 4 + i * 8, &sp, 8);
		else
			memcpy(vm->low + TSS + 4 + i * 8, &(uint32_t[2]){(uint32_t)sp, SEL_DATA},
			       8);
	}
	for (unsigned i = 0; i < 7 && is_long(mode); i++) {
		uint64_t sp = some_address(vm, rng);

		memcpy(vm->low + TSS + 0x24 + i * 8, &sp, 8);
	}
	memcpy(vm->low + TSS + 0x66, &(uint16_t){0x68}, 2);
	if (once_in(rng, 2))
		memset(vm->low + TSS + 0x68, 0, 0x100);
}

/* ---- page tables ---- */

static uint64_t random_entry(struct vm *vm, uint64_t *rng)
{
	uint64_t e = some_address(vm, rng) & 0x000ffffffffff000;

	if (once_in(rng, 4))
		e = TABLES + below(rng, NTABLES) * PAGE;
	if (!once_in(rng, 64))
		e &= 0x3fffffffff; /* below most reserved bits */
	for (unsigned bit = 0; bit < 3; bit++)
		e |= (uint64_t)!once_in(rng, 8) << bit;
	e |= rnd(rng) & 0xf78 & (once_in(rng, 2) ? ~0ull : 0);
	e |= (uint64_t)once_in(rng, 8) << 7;
	e |= (uint64_t)once_in(rng, 16) << 63;
	e |= (uint64_t)once_in(rng, 32) << below(rng, 64);
	return e;
}

/*
 * Low memory is mapped where it is, more or less; everything else leads somewhere. Tables of
 * long modes: 0 PML5, 1 PML4, 2 PDPT, 3 page directory, 4 and up page tables. Of 32 bits: 2 PAE's
 * PDPT, 8 the 2-level directory, 9 its first page table.
 */
static void make_tables(struct vm *vm, uint64_t *rng, enum mode mode)
{
	uint64_t(*t)[512] = (uint64_t(*)[512])(vm->low + TABLES);
	unsigned spoil = once_in(rng, 4) ? 8 : 200;

	for (unsigned i = 0; i < NTABLES; i++)
		for (unsigned k = 0; k < 512; k++)
			t[i][k] = once_in(rng, 4) ? random_entry(vm, rng) : 0;
	if (mode == PAGED32) {
		uint32_t *pd = (uint32_t *)t[8], *pt = (uint32_t *)t[9];

		for (unsigned k = 0; k < 1024; k++) {
			pd[k] = (uint32_t)random_entry(vm, rng);
			pt[k] = k < LOW_SIZE / PAGE && !once_in(rng, spoil)
					? k * PAGE | 7
					: (uint32_t)random_entry(vm, rng);
		}
		pd[0] = TABLES + 9 * PAGE + 7;
		return;
	}
	t[0][0] = TABLES + 1 * PAGE + 7;
	t[1][0] = TABLES + 2 * PAGE + 7;
	t[2][0] = TABLES + 3 * PAGE + (mode == PAE32 ? 1 : 7);
	for (unsigned i = 1; i < 4 && mode == PAE32; i++)
		t[2][i] = once_in(rng, 2) ? TABLES + below(rng, NTABLES) * PAGE + 1 : 0;
	for (unsigned i = 0; i < 4; i++)
		t[3][i] = TABLES + (4 + i) * PAGE + 7;
	for (unsigned k = 0; k < LOW_SIZE / PAGE; k++)
		if (!once_in(rng, spoil))
			t[4][k] = k * PAGE | 7;
	/* A table that contains itself, and the top of the address space. */
	if (once_in(rng, 2))
		t[1][below(rng, 512)] = TABLES + 1 * PAGE + 7;
	if (once_in(rng, 2))
		t[1][511] = t[0][511] = TABLES + below(rng, NTABLES) * PAGE + 7;
}

void make_memory(struct vm *vm, uint64_t *rng, enum mode mode)
{
	fill_random(rng, vm->low + DATA, 0x4000);
	for (unsigned i = 0; i < 256; i++) {
		uint64_t a = some_address(vm, rng);

		memcpy(vm->low + DATA + below(rng, DATA_SIZE - 8), &a, 8);
	}
	make_tables(vm, rng, mode);
	make_descriptors(vm, rng, mode);
	make_code(rng, vm->low + CODE, CODE_SIZE, mode);
}

/* ---- registers ---- */

static struct kvm_segment segment(unsigned sel, uint64_t base, unsigned type, unsigned dpl, bool l,
				  bool db)
{
	return (struct kvm_segment){.base = base,
				    .limit = db || l ? 0xffffffff : 0xffff,
				    .selector = (uint16_t)sel,
				    .type = (uint8_t)type,
				    .present = 1,
				    .dpl = (uint8_t)dpl,
				    .db = db,
				    .s = 1,
				    .l = l,
				    .g = db || l};
}

static void make_segments(struct kvm_sregs *s, enum mode mode, bool user)
{
	unsigned rpl = user ? 3 : 0;

	switch (mode) {
	case REAL:
	case VM86:
		s->cs = segment(CODE >> 4, CODE, 3, mode == VM86 ? 3 : 0, false, false);
		s->ss = s->ds = segment(DATA >> 4, DATA, 3, mode == VM86 ? 3 : 0, false, false);
		break;
	case PROT16:
		s->cs = segment(SEL_CODE16, CODE, 11, 0, false, false);
		s->ss = s->ds = segment(SEL_DATA16, DATA, 3, 0, false, false);
		break;
	case COMPAT16:
		s->cs = segment(SEL_CODE16, CODE, 11, 0, false, false);
		s->ss = s->ds = segment(SEL_DATA, 0, 3, 0, false, true);
		break;
	case LONG64:
	case LA57:
		s->cs = segment(user ? SEL_UCODE6 | 3 : SEL_CODE64, 0, 11, rpl, true, false);
		s->ss = s->ds = segment(user ? SEL_UDATA | 3 : SEL_DATA, 0, 3, rpl, false, true);
		break;
	default:
		s->cs = segment(user ? SEL_UCODE | 3 : SEL_CODE, 0, 11, rpl, false, true);
		s->ss = s->ds = segment(user ? SEL_UDATA | 3 : SEL_DATA, 0, 3, rpl, false, true);
	}
	s->es = s->fs = s->gs = s->ds;
}

static void make_sregs(struct vm *vm, uint64_t *rng, struct kvm_sregs *s, enum mode mode, bool user)
{
	/* VME .. UMIP, FSGSBASE, PCIDE, SMEP, SMAP, PKE */
	uint64_t cr4 = rnd(rng) & rnd(rng) & 0x7307df;

	make_segments(s, mode, user);
	s->gdt = (struct kvm_dtable){.base = GDT, .limit = GDT_LIMIT};
	s->idt = (struct kvm_dtable){.base = mode == REAL ? 0 : IDT, .limit = 0xfff};
	s->tr = (struct kvm_segment){.base = TSS,
				     .limit = 0x167,
				     .selector = SEL_TSS,
				     .type = mode == PROT16 && once_in(rng, 4) ? 3 : 11,
				     .present = 1};
	s->ldt = (struct kvm_segment){
		.base = LDT, .limit = GDT_LIMIT, .selector = SEL_LDT, .type = 2, .present = 1};
	s->cr0 = 0x10 | (rnd(rng) & rnd(rng) & 0x5002e);
	s->cr2 = some_address(vm, rng);
	s->cr3 = TABLES;
	s->cr4 = cr4 & ~(CR4_PAE | CR4_LA57 | CR4_PCIDE);
	s->cr8 = below(rng, 16);
	s->efer = rnd(rng) & 1;
	if (mode != REAL)
		s->cr0 |= CR0_PE;
	if (mode >= PAGED32) {
		s->cr0 |= CR0_PG;
		s->efer |= once_in(rng, 2) ? EFER_NX : 0;
	}
	switch (mode) {
	case PAGED32:
		s->cr3 = TABLES + 8 * PAGE;
		break;
	case PAE32:
		s->cr4 |= CR4_PAE;
		s->cr3 = TABLES + 2 * PAGE;
		break;
	case LONG64:
	case COMPAT32:
	case COMPAT16:
		s->cr4 |= CR4_PAE | (cr4 & CR4_PCIDE);
		s->cr3 = TABLES + 1 * PAGE;
		s->efer |= EFER_LME | EFER_LMA;
		break;
	case LA57:
		s->cr4 |= CR4_PAE | CR4_LA57;
		s->efer |= EFER_LME | EFER_LMA;
		break;
	default:
		break;
	}
	if (once_in(rng, 8))
		s->cr4 |= 0x600; /* OSFXSR, OSXMMEXCPT */
}

static void make_regs(struct vm *vm, uint64_t *rng, struct kvm_regs *r, enum mode mode)
{
	__u64 *g = &r->rax;
	bool based = mode == REAL || mode == VM86 || mode == PROT16;

	for (unsigned i = 0; i < 16; i++)
		g[i] = once_in(rng, 4) ? below(rng, 256) : some_address(vm, rng);
	r->rsp = (based ? 0 : DATA) + below(rng, 0xfff0);
	if (once_in(rng, 8))
		r->rsp = some_address(vm, rng);
	r->rip = below(rng, CODE_SIZE) + (based || mode == COMPAT16 ? 0 : CODE);
	r->rflags = 2 | (rnd(rng) & rnd(rng) & 0x257fd5);
	if (!once_in(rng, 8))
		r->rflags &= ~0x100ull; /* TF */
	if (mode == VM86)
		r->rflags |= 0x20000 | (once_in(rng, 2) ? 0x3000 : 0);
}

/* Overwrite a few bytes of what will be handed to an ioctl. */
static void spoil(uint64_t *rng, void *at, size_t n)
{
	for (unsigned i = 1 + (unsigned)below(rng, 4); i; i--) {
		uint8_t *b = (uint8_t *)at + below(rng, n);

		*b = once_in(rng, 2) ? (uint8_t)rnd(rng) : *b ^ (uint8_t)(1 << below(rng, 8));
	}
}

void make_state(struct vm *vm, struct vcpu *v, enum mode mode)
{
	uint64_t *rng = &v->rng;
	bool user = mode == PROT32 || mode >= PAGED32 ? once_in(rng, 3) : false;
	struct kvm_sregs now, s;
	struct kvm_regs r = {0};

	memset(&now, 0, sizeof(now));
	ioctl(v->fd, KVM_GET_SREGS, &now);
	s = now;
	make_sregs(vm, rng, &s, mode, user);
	make_regs(vm, rng, &r, mode);
	if (once_in(rng, 4)) {
		struct kvm_sregs bad = s;

		spoil(rng, &bad, sizeof(bad));
		if (!ioctl(v->fd, KVM_SET_SREGS, &bad))
			goto regs;
	}
	if (ioctl(v->fd, KVM_SET_SREGS, &s)) {
		/* What this processor has not, and nothing else */
		s.cr4 &= CR4_PSE | CR4_PAE | CR4_LA57;
		s.efer &= ~EFER_NX;
		if (ioctl(v->fd, KVM_SET_SREGS, &s)) {
			s.cr4 &= ~CR4_LA57;
			s.cr3 += s.efer & EFER_LMA ? PAGE : 0;
			ioctl(v->fd, KVM_SET_SREGS, &s);
		}
	}
regs:
	if (once_in(rng, 8))
		spoil(rng, &r, sizeof(r));
	ioctl(v->fd, KVM_SET_REGS, &r);
}

/* ---- from outside ---- */

static void set_msr(struct vm *vm, struct vcpu *v)
{
	static const uint32_t which[] = {0x10,       0x1b,       0x174,      0x175,      0x176,
					 0x277,      0x1a0,      0x6e0,      0xda0,      0xc0000080,
					 0xc0000081, 0xc0000082, 0xc0000083, 0xc0000084, 0xc0000100,
					 0xc0000101, 0xc0000102, 0xc0000103, 0x179,      0x808};
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry e[4];
	} m = {{.nmsrs = 4}};

	for (unsigned i = 0; i < 4; i++) {
		m.e[i].index =
			once_in(&v->rng, 16) ? (uint32_t)rnd(&v->rng) : which[below(&v->rng, 20)];
		m.e[i].data = some_address(vm, &v->rng);
	}
	ioctl(v->fd, KVM_SET_MSRS, &m);
}

static void set_events(struct vcpu *v)
{
	uint64_t *rng = &v->rng;
	struct kvm_vcpu_events e;

	if (ioctl(v->fd, KVM_GET_VCPU_EVENTS, &e))
		return;
	switch (below(rng, 5)) {
	case 0:
		fill_random(rng, &e, sizeof(e));
		if (once_in(rng, 2))
			e.flags &= 0xf;
		break;
	case 1:
		e.exception.injected = 1;
		e.exception.nr = (uint8_t)below(rng, 32);
		e.exception.has_error_code = (uint8_t)below(rng, 2);
		e.exception.error_code = (uint32_t)rnd(rng);
		break;
	case 2:
		e.interrupt.injected = 1;
		e.interrupt.nr = (uint8_t)rnd(rng);
		e.interrupt.soft = (uint8_t)below(rng, 2);
		break;
	case 3:
		e.nmi.injected = (uint8_t)below(rng, 2);
		e.nmi.pending = (uint8_t)below(rng, 2);
		e.nmi.masked = (uint8_t)below(rng, 2);
		e.flags |= KVM_VCPUEVENT_VALID_NMI_PENDING;
		break;
	default:
		e.interrupt.shadow = (uint8_t)below(rng, 4);
		e.flags |= KVM_VCPUEVENT_VALID_SHADOW;
	}
	ioctl(v->fd, KVM_SET_VCPU_EVENTS, &e);
}

static void set_blob(struct vcpu *v)
{
	uint64_t *rng = &v->rng;
	union {
		struct kvm_xsave xsave;
		struct kvm_fpu fpu;
		struct kvm_xcrs xcrs;
		struct kvm_debugregs dr;
		struct kvm_lapic_state lapic;
		struct kvm_sregs sregs;
		struct kvm_guest_debug debug;
		struct kvm_mp_state mp;
	} u;
	static const struct {
		unsigned long get, set;
		size_t size;
	} kinds[] = {
		{KVM_GET_XSAVE, KVM_SET_XSAVE, sizeof(u.xsave)},
		{KVM_GET_FPU, KVM_SET_FPU, sizeof(u.fpu)},
		{KVM_GET_XCRS, KVM_SET_XCRS, sizeof(u.xcrs)},
		{KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS, sizeof(u.dr)},
		{KVM_GET_LAPIC, KVM_SET_LAPIC, sizeof(u.lapic)},
		{KVM_GET_SREGS, KVM_SET_SREGS, sizeof(u.sregs)},
		{0, KVM_SET_GUEST_DEBUG, sizeof(u.debug)},
		{KVM_GET_MP_STATE, KVM_SET_MP_STATE, sizeof(u.mp)},
	};
	unsigned k = (unsigned)below(rng, sizeof(kinds) / sizeof(*kinds));

	memset(&u, 0, sizeof(u));
	if (kinds[k].get && ioctl(v->fd, kinds[k].get, &u))
		return;
	if (!kinds[k].get)
		u.debug = (struct kvm_guest_debug){.control = (uint32_t)below(rng, 4) |
							      (uint32_t)below(rng, 16) << 16};
	else
		spoil(rng, &u, kinds[k].size);
	ioctl(v->fd, kinds[k].set, &u);
}

/* The interrupt controllers' states, which are the VM's. */
static void set_controller(struct vm *vm, uint64_t *rng)
{
	struct kvm_irqchip chip = {.chip_id = (uint32_t)below(rng, 3)};
	struct kvm_pit_config config = {.flags = (uint32_t)below(rng, 2)};
	struct kvm_pit_state2 pit;

	switch (below(rng, 8)) {
	case 0:
		ioctl(vm->fd, KVM_CREATE_PIT2, &config);
		break;
	case 1:
	case 2:
		if (ioctl(vm->fd, KVM_GET_PIT2, &pit))
			return;
		spoil(rng, &pit, sizeof(pit));
		ioctl(vm->fd, KVM_SET_PIT2, &pit);
		break;
	default:
		if (ioctl(vm->fd, KVM_GET_IRQCHIP, &chip))
			return;
		spoil(rng, &chip.chip, sizeof(chip.chip));
		ioctl(vm->fd, KVM_SET_IRQCHIP, &chip);
	}
}

void disturb(struct vm *vm, struct vcpu *v)
{
	uint64_t *rng = &v->rng;
	struct kvm_interrupt irq = {.irq = (uint32_t)below(rng, 260)};
	struct kvm_translation tr = {.linear_address = some_address(vm, rng)};
	struct kvm_irq_level line = {.irq = (uint32_t)below(rng, 26),
				     .level = (uint32_t)below(rng, 2)};
	struct kvm_msi msi = {.address_lo = 0xfee00000 | (uint32_t)below(rng, 0x100000),
			      .data = (uint32_t)below(rng, 0x10000)};

	switch (below(rng, 12)) {
	case 0:
		ioctl(v->fd, KVM_INTERRUPT, &irq);
		v->run->request_interrupt_window = (uint8_t)below(rng, 2);
		break;
	case 1:
		ioctl(v->fd, KVM_NMI);
		break;
	case 2:
		ioctl(v->fd, KVM_TRANSLATE, &tr);
		break;
	case 3:
		ioctl(vm->fd, KVM_IRQ_LINE, &line);
		break;
	case 4:
		ioctl(vm->fd, KVM_SIGNAL_MSI, &msi);
		break;
	case 5:
	case 6:
		set_msr(vm, v);
		break;
	case 7:
	case 8:
		set_events(v);
		break;
	case 9:
		v->run->kvm_valid_regs = below(rng, 16);
		v->run->kvm_dirty_regs = below(rng, 8);
		v->run->cr8 = rnd(rng);
		v->garbage = true;
		if (once_in(rng, 2))
			spoil(rng, &v->run->s, sizeof(v->run->s.regs));
		break;
	case 10:
		set_controller(vm, rng);
		break;
	default:
		set_blob(v);
	}
}
