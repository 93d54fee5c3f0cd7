/* SPDX-License-Identifier: MIT */
#include "ref_transfer.h"

#include <setjmp.h>
#include <string.h>

enum { TS = 10, NP = 11, SS = 12, GP = 13 };

struct desc {
	uint64_t low, high;
	unsigned index;
	unsigned type, dpl;
	bool s, p, l, db;
	uint64_t limit;
};

static struct ref_outcome out;
static jmp_buf end;

static void fault(int vector, uint32_t error) __attribute__((noreturn));
static void fault(int vector, uint32_t error)
{
	memset(&out, 0, sizeof(out));
	out.vector = vector;
	out.error = error;
	longjmp(end, 1);
}

static bool null(uint16_t sel)
{
	return !(sel & 0xfffc);
}

/* Error codes: the selector without RPL, with EXT where an event is being delivered. */
static uint32_t err(uint16_t sel)
{
	return sel & 0xfffc;
}

static struct desc parse(uint64_t low)
{
	struct desc d = {.low = low};

	d.type = low >> 40 & 15;
	d.s = low >> 44 & 1;
	d.dpl = low >> 45 & 3;
	d.p = low >> 47 & 1;
	d.l = low >> 53 & 1;
	d.db = low >> 54 & 1;
	d.limit = (low & 0xffff) | (low >> 32 & 0xf0000);
	if (low >> 55 & 1)
		d.limit = d.limit << 12 | 0xfff;
	return d;
}

/* @n 8-byte entries at @sel; there is no LDT. */
static struct desc fetch(const struct ref_env *e, uint16_t sel, unsigned n, int vector)
{
	unsigned i = sel >> 3;
	struct desc d;

	if ((sel & 4) || i + n > 64)
		fault(vector, err(sel));
	d = parse(e->gdt[i]);
	d.high = n > 1 ? e->gdt[i + 1] : 0;
	d.index = i;
	return d;
}

static bool is_code(const struct desc *d)
{
	return d->s && (d->type & 8);
}

static bool conforming(const struct desc *d)
{
	return d->type & 4;
}

static bool writable_data(const struct desc *d)
{
	return d->s && !(d->type & 8) && (d->type & 2);
}

static bool canonical(uint64_t a)
{
	return (uint64_t)((int64_t)(a << 16) >> 16) == a;
}

/* ---- loads ---- */

static void load_data(const struct ref_env *e, uint16_t sel)
{
	unsigned rpl = sel & 3;
	struct desc d;

	if (null(sel))
		return;
	d = fetch(e, sel, 1, GP);
	if (!d.s || (is_code(&d) && !(d.type & 2)))
		fault(GP, err(sel));
	if (!(is_code(&d) && conforming(&d)) && (rpl > d.dpl || e->cpl > d.dpl))
		fault(GP, err(sel));
	if (!d.p)
		fault(NP, err(sel));
	out.accessed |= 1ull << d.index;
}

static void load_stack(const struct ref_env *e, uint16_t sel)
{
	unsigned rpl = sel & 3;
	struct desc d;

	if (null(sel)) {
		if (!e->wide || e->cpl == 3 || rpl != e->cpl)
			fault(GP, 0);
		return;
	}
	d = fetch(e, sel, 1, GP);
	if (rpl != e->cpl || !writable_data(&d) || d.dpl != e->cpl)
		fault(GP, err(sel));
	if (!d.p)
		fault(SS, err(sel));
	out.accessed |= 1ull << d.index;
}

static void load_system(const struct ref_env *e, uint16_t sel, bool task)
{
	struct desc d;

	if (e->cpl)
		fault(GP, 0);
	if (null(sel)) {
		if (task)
			fault(GP, 0);
		return;
	}
	d = fetch(e, sel, e->wide ? 2 : 1, GP);
	if (d.s || (task ? d.type != 9 && (e->wide || d.type != 1) : d.type != 2))
		fault(GP, err(sel));
	if (!d.p)
		fault(NP, err(sel));
	if (e->wide && (d.high >> 40 & 31))
		fault(GP, err(sel));
	if (e->wide &&
	    !canonical((d.low >> 16 & 0xffffff) | (d.low >> 32 & 0xff000000) | d.high << 32))
		fault(GP, err(sel));
	if (task)
		out.accessed |= 1ull << d.index;
}

/* ---- transfers ---- */

static void check_target(const struct ref_env *e, const struct desc *cs, uint64_t rip)
{
	if (e->wide && cs->l) {
		if (!canonical(rip))
			fault(GP, 0);
	} else if (rip > cs->limit) {
		fault(GP, 0);
	}
}

static void go(const struct desc *cs, uint16_t sel, unsigned cpl, uint64_t rip)
{
	out.cs = (uint16_t)((sel & ~3u) | cpl);
	out.cpl = cpl;
	out.rip = rip;
	out.accessed |= 1ull << cs->index;
}

/* To a ring further inside: the stack that the TSS names. */
static void inner_stack(const struct ref_env *e, unsigned cpl)
{
	struct desc ss;

	out.stack_switched = true;
	out.sp = e->sp0;
	out.ss = (uint16_t)cpl;
	if (e->wide)
		return;
	out.ss = e->ss0;
	if (null(e->ss0))
		fault(TS, 0);
	ss = fetch(e, e->ss0, 1, TS);
	if ((e->ss0 & 3) != cpl || !writable_data(&ss) || ss.dpl != cpl)
		fault(TS, err(e->ss0));
	if (!ss.p)
		fault(SS, err(e->ss0));
	out.accessed |= 1ull << ss.index;
}

/* JMP and CALL through a call gate. */
static void through_gate(const struct ref_env *e, const struct desc *g, uint16_t gate_sel,
			 bool call)
{
	uint16_t sel = (uint16_t)(g->low >> 16);
	uint64_t rip = (g->low & 0xffff) | (g->low >> 32 & 0xffff0000) | g->high << 32;
	struct desc cs;

	if (g->dpl < e->cpl || g->dpl < (gate_sel & 3))
		fault(GP, err(gate_sel));
	if (!g->p)
		fault(NP, err(gate_sel));
	if (e->wide && (g->high >> 40 & 31))
		fault(GP, err(gate_sel));
	if (null(sel))
		fault(GP, 0);
	cs = fetch(e, sel, 1, GP);
	if (!is_code(&cs) || cs.dpl > e->cpl)
		fault(GP, err(sel));
	if (!call && !conforming(&cs) && cs.dpl != e->cpl)
		fault(GP, err(sel));
	if (e->wide && (!cs.l || cs.db))
		fault(GP, err(sel));
	if (!cs.p)
		fault(NP, err(sel));
	if (call && !conforming(&cs) && cs.dpl < e->cpl) {
		inner_stack(e, cs.dpl);
		go(&cs, sel, cs.dpl, rip);
	} else {
		go(&cs, sel, e->cpl, rip);
	}
	check_target(e, &cs, rip);
}

static void jump(const struct ref_env *e, const struct ref_operands *o, bool call)
{
	unsigned rpl = o->sel & 3;
	struct desc d;

	if (null(o->sel))
		fault(GP, 0);
	d = fetch(e, o->sel, 1, GP);
	if (!d.s) {
		if (d.type != 12)
			fault(GP, err(o->sel)); /* the test leaves tasks alone */
		if (e->wide)
			d = fetch(e, o->sel, 2, GP);
		through_gate(e, &d, o->sel, call);
		return;
	}
	if (!is_code(&d))
		fault(GP, err(o->sel));
	if (conforming(&d) ? d.dpl > e->cpl : rpl > e->cpl || d.dpl != e->cpl)
		fault(GP, err(o->sel));
	if (e->wide && d.l && d.db)
		fault(GP, err(o->sel));
	if (!d.p)
		fault(NP, err(o->sel));
	check_target(e, &d, o->offset);
	go(&d, o->sel, e->cpl, o->offset);
}

static void give_back(const struct ref_env *e, const struct ref_operands *o, bool iret)
{
	unsigned rpl = o->sel & 3;
	struct desc cs, ss;
	bool pops_ss;

	if (null(o->sel))
		fault(GP, 0);
	cs = fetch(e, o->sel, 1, GP);
	if (!is_code(&cs) || rpl < e->cpl)
		fault(GP, err(o->sel));
	if (conforming(&cs) ? cs.dpl > rpl : cs.dpl != rpl)
		fault(GP, err(o->sel));
	if (e->wide && cs.l && cs.db)
		fault(GP, err(o->sel));
	if (!cs.p)
		fault(NP, err(o->sel));
	/* AMD's order; Intel's manual has the stack first. */
	check_target(e, &cs, o->offset);
	pops_ss = rpl > e->cpl || (iret && e->wide);
	if (pops_ss) {
		if (null(o->ss)) {
			if (!e->wide || !cs.l || rpl == 3 || (o->ss & 3) != rpl)
				fault(GP, 0);
		} else {
			ss = fetch(e, o->ss, 1, GP);
			if ((o->ss & 3) != rpl || !writable_data(&ss) || ss.dpl != rpl)
				fault(GP, err(o->ss));
			if (!ss.p)
				fault(SS, err(o->ss));
			out.accessed |= 1ull << ss.index;
		}
		out.stack_switched = true;
		out.ss = o->ss;
		out.sp = o->sp;
	}
	go(&cs, o->sel, rpl, o->offset);
}

static void interrupt(const struct ref_env *e, unsigned vector)
{
	struct desc g = parse(e->gate[0]), cs;
	uint16_t sel = (uint16_t)(e->gate[0] >> 16);
	uint64_t rip = e->gate[0] & 0xffff;
	uint32_t idt_error = vector * 8 + 2;
	unsigned ist = e->wide ? e->gate[0] >> 32 & 7 : 0;

	if (g.s || (g.type != 14 && g.type != 15 && (e->wide || (g.type != 6 && g.type != 7))))
		fault(GP, idt_error);
	if (g.dpl < e->cpl)
		fault(GP, idt_error);
	if (!g.p)
		fault(NP, idt_error);
	if (g.type & 8)
		rip |= e->gate[0] >> 32 & 0xffff0000;
	if (e->wide)
		rip |= e->gate[1] << 32;
	if (null(sel))
		fault(GP, 0);
	cs = fetch(e, sel, 1, GP);
	if (!is_code(&cs) || cs.dpl > e->cpl)
		fault(GP, err(sel));
	if (e->wide && (!cs.l || cs.db))
		fault(GP, err(sel));
	if (!cs.p)
		fault(NP, err(sel));
	if (!conforming(&cs) && cs.dpl < e->cpl)
		inner_stack(e, cs.dpl);
	if (ist) {
		if (!out.stack_switched)
			out.ss = 0xffff; /* as it was */
		out.stack_switched = true;
		out.sp = e->ist1;
	}
	check_target(e, &cs, rip);
	go(&cs, sel, conforming(&cs) ? e->cpl : cs.dpl, rip);
}

struct ref_outcome ref_execute(const struct ref_env *e, enum ref_insn insn,
			       const struct ref_operands *o)
{
	memset(&out, 0, sizeof(out));
	out.vector = -1;
	if (setjmp(end))
		return out;
	switch (insn) {
	case REF_MOV_DS:
		load_data(e, o->sel);
		break;
	case REF_MOV_SS:
		load_stack(e, o->sel);
		break;
	case REF_LLDT:
		load_system(e, o->sel, false);
		break;
	case REF_LTR:
		load_system(e, o->sel, true);
		break;
	case REF_JMP:
		jump(e, o, false);
		break;
	case REF_CALL:
		jump(e, o, true);
		break;
	case REF_RETF:
		give_back(e, o, false);
		break;
	case REF_IRET:
		give_back(e, o, true);
		break;
	default:
		interrupt(e, o->vector);
	}
	return out;
}
