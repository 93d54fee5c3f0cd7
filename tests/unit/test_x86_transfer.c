/* SPDX-License-Identifier: MIT */
/*
 * Segment loads, far transfers, IRET and INT n with random descriptors, selectors, gates and
 * frames, against ref_transfer.c: which exception, with which error code, or where the vCPU is
 * then, on which stack; and that an instruction that faults has changed nothing at all.
 */
#include <stdio.h>

#include "../random.h"
#include "x86_env.h"

#include "ref_transfer.h"

#define FIRST  16u /* random descriptors: this one to LAST */
#define LAST   47u
#define VECTOR 0x30u
#define FAR    0x5000ul /* m16:32 */
#define PUSHED 0x5800ul /* ring 0's stack, from the TSS */

static uint64_t rng;

static uint64_t rnd(void)
{
	return random_next(&rng);
}

static bool once_in(unsigned n)
{
	return !(rnd() % n);
}

/* ---- random tables ---- */

/* Rings 0 and 3 most often, so that levels match. */
static unsigned random_level(void)
{
	return once_in(8) ? (unsigned)rnd() & 3 : once_in(2) ? 0 : 3;
}

static uint16_t random_selector(void)
{
	unsigned index = FIRST + (unsigned)(rnd() % (LAST - FIRST + 1));

	if (once_in(24))
		return (uint16_t)(rnd() & 3);
	if (once_in(24))
		return (uint16_t)(0x200 + (rnd() & 0xff));
	return (uint16_t)(index << 3 | (once_in(24) ? 4 : 0) | random_level());
}

static uint64_t random_gate(unsigned type, uint64_t rip)
{
	return (rip & 0xffff) | (uint64_t)random_selector() << 16 |
	       (uint64_t)(type | random_level() << 5 | (once_in(8) ? 0u : 0x80u)) << 40 |
	       (rip >> 16 & 0xffff) << 48;
}

/* Bases are 0, stacks reach as far as memory does. */
static uint64_t random_descriptor(bool wide, enum ref_insn insn)
{
	static const uint8_t others[] = {0, 2, 8, 10, 13, 14, 15, 12};
	static const uint8_t system[] = {1, 2, 3, 9, 11, 9, 2, 12};
	unsigned type = (unsigned)rnd() & 15, dpl = random_level();
	bool p = !once_in(8), code = type & 8;
	bool l = wide ? !once_in(4) : once_in(8);

	if (once_in(4) || ((insn == REF_LLDT || insn == REF_LTR) && !once_in(4))) {
		type = insn == REF_LLDT || insn == REF_LTR ? system[rnd() & 7] : others[rnd() & 7];
		if (type == 12)
			return random_gate(12, CODE + 0x80);
		return 0xfff | (uint64_t)(type | dpl << 5 | p << 7) << 40;
	}
	if (code && once_in(8)) /* a limit that counts outside 64-bit code */
		return 0x100 | (uint64_t)(0x10 | type | dpl << 5 | p << 7) << 40 |
		       (uint64_t)(l << 5 | !l << 6) << 48;
	/* Expand-down data would reach nothing. */
	return 0xffff | (uint64_t)(0x10 | (code ? type : type & ~4u) | dpl << 5 | p << 7) << 40 |
	       (uint64_t)(0x8f | (code && l) << 5 | !(code && l && !once_in(8)) << 6) << 48;
}

static void random_tables(struct env *e, struct ref_env *r, enum ref_insn insn)
{
	for (unsigned i = FIRST; i <= LAST; i++) {
		uint64_t d = random_descriptor(r->wide, insn);

		/* The upper half of what has 16 bytes */
		if (r->wide && i > FIRST && (i & 1) && !once_in(8))
			d = once_in(16) ? 0x8000 : 0;
		put64(e, GDT + i * 8, d);
	}
	memcpy(r->gdt, e->mem + GDT, sizeof(r->gdt));
	for (unsigned i = 48; i < 64; i++)
		r->gdt[i] = 0;
	memcpy(e->mem + GDT, r->gdt, sizeof(r->gdt));
	r->ss0 = random_selector();
	r->sp0 = PUSHED;
	r->ist1 = IST1;
	for (unsigned ring = 0; ring < 3; ring++) {
		put64(e, TSS + 4 + ring * 8, r->sp0 | (r->wide ? 0 : (uint64_t)r->ss0 << 32));
	}
	if (once_in(2) && !r->wide) {
		/* A stack that will do: ring 0's */
		r->ss0 = SEL_DATA;
		for (unsigned ring = 0; ring < 3; ring++)
			put64(e, TSS + 4 + ring * 8, r->sp0 | (uint64_t)r->ss0 << 32);
	}
	r->gate[0] = random_gate(once_in(8) ? (unsigned)rnd() & 31 & ~5u : 14 | (rnd() & 1),
				 CODE + 0x80);
	/* Task gates are another test's. */
	if ((r->gate[0] >> 40 & 31) == 5)
		r->gate[0] |= 1ull << 41;
	r->gate[1] = once_in(16) ? 0x8000 : 0;
	if (r->wide) {
		r->gate[0] |= once_in(4) ? 1ull << 32 : 0;
		memcpy(e->mem + IDT + VECTOR * 16, r->gate, 16);
	} else {
		memcpy(e->mem + IDT + VECTOR * 8, r->gate, 8);
	}
}

/* ---- one instruction ---- */

static const struct {
	uint8_t narrow[3], wide[3];
} code[REF_NR_INSNS] = {
	[REF_MOV_DS] = {{0x8e, 0xd8}, {0x8e, 0xd8}},
	[REF_MOV_SS] = {{0x8e, 0xd0}, {0x8e, 0xd0}},
	[REF_LLDT] = {{0x0f, 0x00, 0xd0}, {0x0f, 0x00, 0xd0}},
	[REF_LTR] = {{0x0f, 0x00, 0xd8}, {0x0f, 0x00, 0xd8}},
	[REF_JMP] = {{0xff, 0x2f}, {0xff, 0x2f}},
	[REF_CALL] = {{0xff, 0x1f}, {0xff, 0x1f}},
	[REF_RETF] = {{0xcb}, {0x48, 0xcb}},
	[REF_IRET] = {{0xcf}, {0x48, 0xcf}},
	[REF_INT] = {{0xcd, VECTOR}, {0xcd, VECTOR}},
};

static void put_word(struct env *e, uint64_t *at, uint64_t val, bool wide)
{
	memcpy(e->mem + *at, &val, wide ? 8 : 4);
	*at += wide ? 8 : 4;
}

static void put_operands(struct env *e, const struct ref_env *r, enum ref_insn insn,
			 const struct ref_operands *o)
{
	struct kl_vcpu *v = e->v;
	uint64_t sp = STACK;

	memcpy(e->mem + CODE, r->wide ? code[insn].wide : code[insn].narrow, 3);
	v->gpr[KL_RAX] = o->sel;
	v->gpr[KL_RDI] = FAR;
	memcpy(e->mem + FAR, &o->offset, 4);
	memcpy(e->mem + FAR + 4, &o->sel, 2);
	put_word(e, &sp, o->offset, r->wide);
	put_word(e, &sp, o->sel, r->wide);
	if (insn == REF_IRET)
		put_word(e, &sp, o->flags, r->wide);
	put_word(e, &sp, o->sp, r->wide);
	put_word(e, &sp, o->ss, r->wide);
}

/* ---- what must have happened ---- */

struct state {
	uint64_t gpr[16], rip, rflags;
	struct kvm_segment seg[KL_NR_SEGS];
	unsigned cpl;
	uint8_t mem[0x8000]; /* tables and stacks */
};

static void save(struct env *e, struct state *s)
{
	memset(s, 0, sizeof(*s));
	memcpy(s->gpr, e->v->gpr, sizeof(s->gpr));
	memcpy(s->seg, e->v->seg, sizeof(s->seg));
	s->rip = e->v->rip;
	s->rflags = e->v->rflags;
	s->cpl = e->v->cpl;
	memcpy(s->mem, e->mem, sizeof(s->mem));
}

/* Bytes that the instruction pushes, or less than 0 for pops without another stack. */
static int pushed(const struct ref_env *r, enum ref_insn insn, const struct ref_outcome *w,
		  bool gate)
{
	bool inner = w->stack_switched && w->cpl != r->cpl;

	switch (insn) {
	case REF_CALL:
		if (!gate)
			return 8;
		return (inner ? 4 : 2) * (r->wide ? 8 : 4);
	case REF_INT:
		if (r->wide)
			return 40;
		return (inner ? 5 : 3) * (r->gate[0] >> 43 & 1 ? 4 : 2);
	case REF_RETF:
		return w->stack_switched ? 0 : r->wide ? -16 : -8;
	case REF_IRET:
		return w->stack_switched ? 0 : -12;
	default:
		return 0;
	}
}

static const char *done_right(struct env *e, const struct ref_env *r, enum ref_insn insn,
			      const struct ref_operands *o, const struct ref_outcome *w,
			      const struct state *before)
{
	struct kl_vcpu *v = e->v;
	uint64_t gdt[64], sp = r->rsp;
	bool gate = !(r->gdt[o->sel >> 3 & 63] >> 44 & 1);

	if (w->cs && (v->seg[KL_CS].selector != w->cs || v->cpl != w->cpl || v->rip != w->rip))
		return "code segment";
	if (!w->cs && v->rip != before->rip + (insn == REF_LLDT || insn == REF_LTR ? 3 : 2))
		return "rip";
	if (w->stack_switched) {
		sp = w->sp;
		if (w->ss != 0xffff && v->seg[KL_SS].selector != w->ss)
			return "SS";
	} else if (insn != REF_MOV_SS && v->seg[KL_SS].selector != before->seg[KL_SS].selector) {
		return "SS changed";
	}
	if (insn == REF_INT && r->wide)
		sp &= ~15ull;
	sp -= (uint64_t)pushed(r, insn, w, gate);
	if (v->gpr[KL_RSP] != sp)
		return "RSP";
	if (insn == REF_INT || insn == REF_CALL) {
		uint64_t back = 0;

		memcpy(&back, e->mem + sp, 2);
		if (back != CODE + 2)
			return "return address";
	}
	memcpy(gdt, r->gdt, sizeof(gdt));
	for (unsigned i = 0; i < 64; i++)
		if (w->accessed >> i & 1)
			gdt[i] |= 1ull << (insn == REF_LTR ? 41 : 40);
	if (memcmp(gdt, e->mem + GDT, sizeof(gdt)))
		return "accessed and busy bits";
	/* Data segments that the outer ring may not have */
	for (unsigned s = KL_DS; w->cs && w->cpl > r->cpl && s <= KL_GS; s++)
		if (v->seg[s].selector)
			return "a segment of the inner ring is kept";
	return NULL;
}

static const char *nothing_done(struct env *e, const struct state *before)
{
	static struct state now;

	save(e, &now);
	if (memcmp(now.gpr, before->gpr, sizeof(now.gpr)))
		return "a register changed";
	if (memcmp(now.seg, before->seg, sizeof(now.seg)) || now.cpl != before->cpl)
		return "a segment changed";
	if (now.rip != before->rip || now.rflags != before->rflags)
		return "rip or flags changed";
	return memcmp(now.mem, before->mem, sizeof(now.mem)) ? "memory changed" : NULL;
}

static unsigned long done, faulted[32];

static void compare(struct env *e, bool wide, unsigned cpl, enum ref_insn insn)
{
	static const char *const names[] = {"mov ds",   "mov ss", "lldt", "ltr", "far jmp",
					    "far call", "retf",   "iret", "int"};
	struct ref_env r = {.wide = wide, .cpl = cpl, .rsp = STACK};
	struct ref_operands o = {.sel = random_selector(),
				 .offset = CODE + (once_in(8) ? 0x80000 : 0x80),
				 .ss = random_selector(),
				 .sp = 0x6800,
				 .flags = 2 | (rnd() & 0xcd5),
				 .vector = VECTOR};
	static struct state before;
	struct ref_outcome want;
	const char *wrong;
	uint32_t error = 0;
	int got;

	if (once_in(32) && wide && (insn == REF_RETF || insn == REF_IRET))
		o.offset = 0x0000800000000000;
	random_tables(e, &r, insn);
	put_operands(e, &r, insn, &o);
	want = ref_execute(&r, insn, &o);
	save(e, &before);
	got = env_one(e, &error);
	if (got != want.vector)
		wrong = "exception";
	else if (got >= 0 && error != want.error)
		wrong = "error code";
	else
		wrong = got < 0 ? done_right(e, &r, insn, &o, &want, &before)
				: nothing_done(e, &before);
	if (got < 0)
		done++;
	else
		faulted[got & 31]++;
	if (!wrong)
		return;
	fprintf(stderr, "%s, %u bits, CPL %u: %s\n", names[insn], wide ? 64 : 32, cpl, wrong);
	fprintf(stderr, "  sel %x (%016lx) offset %lx ss %x (%016lx) gate %016lx ss0 %x\n", o.sel,
		(unsigned long)r.gdt[o.sel >> 3 & 63], (unsigned long)o.offset, o.ss,
		(unsigned long)r.gdt[o.ss >> 3 & 63], (unsigned long)r.gate[0], r.ss0);
	fprintf(stderr, "  gate's segment %016lx\n",
		(unsigned long)
			r.gdt[(insn == REF_INT ? r.gate[0] : r.gdt[o.sel >> 3 & 63]) >> 19 & 63]);
	fprintf(stderr, "  want %d(%x) cs %x cpl %u rip %lx sp %lx\n", want.vector, want.error,
		want.cs, want.cpl, (unsigned long)want.rip, (unsigned long)want.sp);
	fprintf(stderr, "  got  %d(%x) cs %x cpl %u rip %lx ss %x sp %lx\n", got, error,
		e->v->seg[KL_CS].selector, e->v->cpl, (unsigned long)e->v->rip,
		e->v->seg[KL_SS].selector, (unsigned long)e->v->gpr[KL_RSP]);
	fail();
}

static void all(struct env *e, bool wide)
{
	for (unsigned n = 0; n < 150000; n++) {
		enum ref_insn insn = (enum ref_insn)(n % REF_NR_INSNS);
		unsigned cpl = n / REF_NR_INSNS & 1 ? 3 : 0;

		if (wide)
			mode64(e, cpl);
		else
			mode32(e, cpl);
		e->v->gdt.limit = 0x1ff;
		for (unsigned s = KL_DS; s <= KL_GS; s++)
			set_segment_cache(&e->v->seg[s], SEL_DATA, 3, 0, false, true);
		set_segment_cache(&e->v->seg[KL_ES], SEL_DATA, 3, 0, false, true);
		compare(e, wide, cpl, insn);
	}
	print_message("%lu done; #TS %lu, #NP %lu, #SS %lu, #GP %lu\n", done, faulted[10],
		      faulted[11], faulted[12], faulted[13]);
}

static void protected_mode(void **state)
{
	all(*state, false);
}

static void long_mode(void **state)
{
	all(*state, true);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, env_setup, env_teardown)
	const struct CMUnitTest tests[] = {
		TEST(protected_mode),
		TEST(long_mode),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
