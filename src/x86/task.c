/* SPDX-License-Identifier: MIT */
/* Hardware task switches; task.h. */
#include "x86/task.h"

#include <string.h>

#include "x86/access.h"
#include "x86/control.h"
#include "x86/debug.h"
#include "x86/insn.h"

struct tss16 {
	uint16_t link, sp0, ss0, sp1, ss1, sp2, ss2;
	uint16_t ip, flags, gpr[8]; /* saved from here */
	uint16_t es, cs, ss, ds;    /* to here */
	uint16_t ldt;
};
_Static_assert(sizeof(struct tss16) == 44, "the architecture's");

struct tss32 {
	uint32_t link, esp0, ss0, esp1, ss1, esp2, ss2, cr3;
	uint32_t eip, eflags, gpr[8];    /* saved from here */
	uint32_t es, cs, ss, ds, fs, gs; /* to here */
	uint32_t ldt;
	uint16_t trap, io_map;
};
_Static_assert(sizeof(struct tss32) == 104, "the architecture's");

/* What a task is made of, whatever its TSS looks like. */
struct task {
	uint32_t rip, rflags, cr3;
	uint32_t gpr[8];
	uint16_t seg[KL_LDTR + 1]; /* by enum kl_seg */
	bool wide, trap;
};

/* The first thing that is wrong with the new task. */
struct flaw {
	unsigned vector; /* 0: none */
	uint32_t error;
};

static bool wide(const struct kl_desc *d)
{
	return kl_desc_type(d) & 8;
}

static uint32_t limit(const struct kl_desc *d)
{
	struct kvm_segment s;

	kl_desc_to_segment(d, 0, &s);
	return s.limit;
}

static uint32_t base(const struct kl_desc *d)
{
	struct kvm_segment s;

	kl_desc_to_segment(d, 0, &s);
	return (uint32_t)s.base;
}

/* ---- checks in the old task ---- */

static bool available(const struct kl_desc *d)
{
	return !kl_desc_s(d) && (kl_desc_type(d) == 1 || kl_desc_type(d) == 9);
}

uint16_t kl_task_gate(struct kl_vcpu *v, const struct kl_desc *gate, uint32_t ext,
		      struct kl_desc *tss)
{
	uint16_t sel = (uint16_t)(gate->low >> 16);
	uint32_t error = (sel & 0xfffcu) | ext;

	if (sel & 4)
		kl_raise_error(v, KL_EXC_GP, error);
	kl_desc_read(v, sel, tss, KL_EXC_GP, ext);
	if (!available(tss))
		kl_raise_error(v, KL_EXC_GP, error);
	if (!kl_desc_present(tss))
		kl_raise_error(v, KL_EXC_NP, error);
	return sel;
}

void kl_task_check(struct kl_vcpu *v, uint16_t sel, const struct kl_desc *d)
{
	unsigned dpl = kl_desc_dpl(d);

	if ((sel & 4) || dpl < v->cpl || dpl < (sel & 3u) || !available(d))
		kl_raise_error(v, KL_EXC_GP, sel & 0xfffc);
	if (!kl_desc_present(d))
		kl_raise_error(v, KL_EXC_NP, sel & 0xfffc);
}

/* ---- memory ---- */

static void read_task(struct kl_vcpu *v, const struct kl_desc *d, struct task *t)
{
	memset(t, 0, sizeof(*t));
	t->wide = wide(d);
	if (t->wide) {
		struct tss32 s;

		kl_read_system(v, base(d), &s, sizeof(s));
		t->rip = s.eip;
		t->rflags = s.eflags;
		t->cr3 = s.cr3;
		t->trap = s.trap & 1;
		memcpy(t->gpr, s.gpr, sizeof(t->gpr));
		t->seg[KL_ES] = (uint16_t)s.es;
		t->seg[KL_CS] = (uint16_t)s.cs;
		t->seg[KL_SS] = (uint16_t)s.ss;
		t->seg[KL_DS] = (uint16_t)s.ds;
		t->seg[KL_FS] = (uint16_t)s.fs;
		t->seg[KL_GS] = (uint16_t)s.gs;
		t->seg[KL_LDTR] = (uint16_t)s.ldt;
	} else {
		struct tss16 s;

		kl_read_system(v, base(d), &s, sizeof(s));
		t->rip = s.ip;
		t->rflags = s.flags;
		for (unsigned i = 0; i < 8; i++)
			t->gpr[i] = s.gpr[i];
		t->seg[KL_ES] = s.es;
		t->seg[KL_CS] = s.cs;
		t->seg[KL_SS] = s.ss;
		t->seg[KL_DS] = s.ds;
		t->seg[KL_LDTR] = s.ldt;
	}
}

static void save_task(struct kl_vcpu *v, uint64_t rip, uint64_t rflags)
{
	const struct kvm_segment *tr = &v->seg[KL_TR];

	if (tr->type & 8) {
		struct tss32 s = {.eip = (uint32_t)rip,
				  .eflags = (uint32_t)rflags,
				  .es = v->seg[KL_ES].selector,
				  .cs = v->seg[KL_CS].selector,
				  .ss = v->seg[KL_SS].selector,
				  .ds = v->seg[KL_DS].selector,
				  .fs = v->seg[KL_FS].selector,
				  .gs = v->seg[KL_GS].selector};

		for (unsigned i = 0; i < 8; i++)
			s.gpr[i] = (uint32_t)v->gpr[i];
		kl_write_system(v, tr->base + offsetof(struct tss32, eip), &s.eip,
				offsetof(struct tss32, ldt) - offsetof(struct tss32, eip));
	} else {
		struct tss16 s = {.ip = (uint16_t)rip,
				  .flags = (uint16_t)rflags,
				  .es = v->seg[KL_ES].selector,
				  .cs = v->seg[KL_CS].selector,
				  .ss = v->seg[KL_SS].selector,
				  .ds = v->seg[KL_DS].selector};

		for (unsigned i = 0; i < 8; i++)
			s.gpr[i] = (uint16_t)v->gpr[i];
		kl_write_system(v, tr->base + offsetof(struct tss16, ip), &s.ip,
				offsetof(struct tss16, ldt) - offsetof(struct tss16, ip));
	}
}

static void set_busy(struct kl_vcpu *v, uint64_t desc_addr, uint64_t low, bool busy)
{
	uint8_t type = (uint8_t)(low >> 40);

	type = busy ? type | 2 : type & (uint8_t)~2u;
	kl_write_system(v, desc_addr + 5, &type, 1);
}

/* ---- the new task's segments ---- */

static bool wrong(struct flaw *f, unsigned vector, uint16_t sel)
{
	*f = (struct flaw){vector, sel & 0xfffcu};
	return false;
}

static bool load_ldt(struct kl_vcpu *v, uint16_t sel, struct flaw *f)
{
	struct kl_desc d;

	if (KL_DESC_NULL(sel))
		return true;
	if ((sel & 4) || !kl_desc_try_read(v, sel, &d) || kl_desc_s(&d) || kl_desc_type(&d) != 2 ||
	    !kl_desc_present(&d))
		return wrong(f, KL_EXC_TS, sel);
	kl_desc_to_segment(&d, sel, &v->seg[KL_LDTR]);
	return true;
}

static bool right_type(const struct kl_vcpu *v, enum kl_seg seg, uint16_t sel,
		       const struct kl_desc *d)
{
	unsigned type = kl_desc_type(d), dpl = kl_desc_dpl(d), rpl = sel & 3;

	if (!kl_desc_s(d))
		return false;
	switch (seg) {
	case KL_CS:
		return (type & 8) && (type & 4 ? dpl <= rpl : dpl == rpl);
	case KL_SS:
		return (type & 10) == 2 && rpl == v->cpl && dpl == v->cpl;
	default:
		return (type & 10) != 8 && ((type & 12) == 12 || (dpl >= v->cpl && dpl >= rpl));
	}
}

static bool load_segment(struct kl_vcpu *v, enum kl_seg seg, uint16_t sel, struct flaw *f)
{
	struct kl_desc d;

	if (v->rflags & KL_FL_VM) {
		kl_load_real_segment(v, seg, sel);
		return true;
	}
	if (KL_DESC_NULL(sel) && seg != KL_CS && seg != KL_SS) {
		kl_segment_null(&v->seg[seg], sel);
		return true;
	}
	if (KL_DESC_NULL(sel) || !kl_desc_try_read(v, sel, &d) || !right_type(v, seg, sel, &d))
		return wrong(f, KL_EXC_TS, sel);
	if (!kl_desc_present(&d))
		return wrong(f, seg == KL_SS ? KL_EXC_SS : KL_EXC_NP, sel);
	kl_desc_set_accessed(v, &d);
	kl_desc_to_segment(&d, sel, &v->seg[seg]);
	return true;
}

static bool load_segments(struct kl_vcpu *v, const struct task *t, struct flaw *f)
{
	static const uint8_t order[] = {KL_ES, KL_CS, KL_SS, KL_DS, KL_FS, KL_GS};
	unsigned n = t->wide ? 6 : 4; /* a 16-bit TSS leaves FS and GS alone */

	/* What is not loaded yet must not be used. */
	for (unsigned i = 0; i < n; i++) {
		if (order[i] == KL_CS)
			v->seg[KL_CS].selector = t->seg[KL_CS];
		else
			kl_segment_null(&v->seg[order[i]], t->seg[order[i]]);
	}
	kl_segment_null(&v->seg[KL_LDTR], t->seg[KL_LDTR]);
	v->cpl = v->rflags & KL_FL_VM ? 3 : t->seg[KL_CS] & 3;
	v->seg[KL_SS].dpl = v->cpl;
	kl_x86_update_mode(v);
	if (!load_ldt(v, t->seg[KL_LDTR], f))
		return false;
	for (unsigned i = 0; i < n; i++)
		if (!load_segment(v, (enum kl_seg)order[i], t->seg[order[i]], f))
			return false;
	return v->rip > v->seg[KL_CS].limit ? wrong(f, KL_EXC_GP, 0) : true;
}

/* ---- the switch ---- */

void kl_task_undo(struct kl_vcpu *v)
{
	const struct kl_task_undo *u = &v->task_undo;

	if (!v->task_undo.valid)
		return;
	v->task_undo.valid = false;
	memcpy(v->gpr, u->gpr, sizeof(v->gpr));
	memcpy(v->seg, u->seg, sizeof(v->seg));
	memcpy(v->pdptrs, u->pdptrs, sizeof(v->pdptrs));
	v->rip = u->rip;
	v->rflags = u->rflags;
	v->cr3 = u->cr3;
	v->cpl = u->cpl;
	kl_tlb_flush(v);
	kl_x86_update_mode(v);
}

static void remember(struct kl_vcpu *v)
{
	struct kl_task_undo *u = &v->task_undo;

	memcpy(u->gpr, v->gpr, sizeof(v->gpr));
	memcpy(u->seg, v->seg, sizeof(v->seg));
	memcpy(u->pdptrs, v->pdptrs, sizeof(v->pdptrs));
	u->rip = v->rip;
	u->rflags = v->rflags;
	u->cr3 = v->cr3;
	u->cpl = v->cpl;
	u->valid = true;
}

static void push_error(struct kl_vcpu *v, uint32_t error, unsigned size)
{
	uint64_t sp = (v->gpr[KL_RSP] - size) & kl_sp_mask(v);

	kl_write(v, kl_seg_linear(v, KL_SS, sp, size, true), error, size);
	kl_set_sp(v, sp);
}

void kl_task_switch(struct kl_vcpu *v, uint16_t sel, struct kl_desc *d, enum kl_task_cause cause,
		    uint64_t rip, const uint32_t *error, uint32_t ext)
{
	const bool nested = cause == KL_TASK_CALL || cause == KL_TASK_EVENT;
	uint64_t rflags = v->rflags;
	struct flaw flaw = {0};
	struct kl_desc old;
	struct task t;

	if (limit(d) < (wide(d) ? sizeof(struct tss32) : sizeof(struct tss16)) - 1)
		kl_raise_error(v, KL_EXC_TS, (sel & 0xfffc) | ext);
	read_task(v, d, &t);
	if (cause == KL_TASK_IRET)
		rflags &= ~(uint64_t)KL_FL_NT;
	save_task(v, rip, rflags);
	if (nested)
		kl_write_system(v, base(d), &v->seg[KL_TR].selector, 2);
	else if (kl_desc_try_read(v, v->seg[KL_TR].selector, &old))
		set_busy(v, old.addr, old.low, false);

	remember(v);
	if (t.wide && (v->cr0 & KL_CR0_PG))
		kl_write_cr3(v, t.cr3);
	for (unsigned i = 0; i < 8; i++)
		v->gpr[i] = t.gpr[i];
	v->rip = t.rip;
	v->rflags &= ~(uint64_t)KL_FL_VM;
	kl_load_flags(v, t.rflags | (nested ? KL_FL_NT : 0), 0xffffffff);
	load_segments(v, &t, &flaw);
	kl_x86_update_mode(v);
	if (cause != KL_TASK_IRET)
		set_busy(v, d->addr, d->low, true);
	d->low |= 2ull << 40;
	kl_desc_to_segment(d, sel, &v->seg[KL_TR]);
	if (!flaw.vector && error)
		push_error(v, *error, t.wide ? 4 : 2);
	v->task_undo.valid = false;

	/* It is done. */
	v->cr0 |= KL_CR0_TS;
	v->dr7 &= ~0x155ull; /* local breakpoints */
	kl_debug_update(v);
	v->int_shadow = 0;
	if (flaw.vector)
		kl_raise_error(v, flaw.vector, flaw.error | ext);
	if (t.trap)
		v->bp.trap |= KL_DR6_BT;
}

void kl_task_return(struct kl_vcpu *v, uint64_t rip)
{
	struct kl_desc d;
	uint16_t sel;

	kl_read_system(v, v->seg[KL_TR].base, &sel, 2);
	if ((sel & 4) || !kl_desc_try_read(v, sel, &d) || kl_desc_s(&d) ||
	    (kl_desc_type(&d) & 7) != 3)
		kl_raise_error(v, KL_EXC_TS, sel & 0xfffc);
	if (!kl_desc_present(&d))
		kl_raise_error(v, KL_EXC_NP, sel & 0xfffc);
	kl_task_switch(v, sel, &d, KL_TASK_IRET, rip, NULL, 0);
	v->nmi.masked = false;
}
