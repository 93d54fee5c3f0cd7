/* SPDX-License-Identifier: MIT */
/*
 * Control transfers that change CS: far jumps, calls and returns, call gates, IRET, SYSCALL and
 * SYSENTER with their returns.
 *
 * Everything that can fault comes before the first change of a register.
 */
#include <string.h>

#include "x86/access.h"
#include "x86/insn.h"
#include "x86/paging.h"
#include "x86/segment.h"
#include "x86/task.h"
#include "x86/vm86.h"

static uint64_t truncate_rip(uint64_t rip, unsigned size)
{
	return size == 8 ? rip : size == 4 ? (uint32_t)rip : (uint16_t)rip;
}

/* A new rip must be canonical in 64-bit code and inside the limit elsewhere. */
static void check_target(struct kl_vcpu *v, const struct kvm_segment *cs, uint64_t rip)
{
	if ((v->efer & KL_EFER_LMA) && cs->l ? !kl_canonical(v, rip) : rip > cs->limit)
		kl_raise_error(v, KL_EXC_GP, 0);
}

/* Read @n words of @size at offset @off above the stack pointer. */
static void stack_read(struct kl_vcpu *v, unsigned off, uint64_t *word, unsigned n, unsigned size)
{
	uint64_t mask = kl_sp_mask(v);

	for (unsigned i = 0; i < n; i++) {
		uint64_t sp = (v->gpr[KL_RSP] + off + i * size) & mask;

		word[i] = kl_read(v, kl_seg_linear(v, KL_SS, sp, size, false), size);
	}
}

/* Push @n words of @size, the last of which ends up lowest. Both pages are checked first. */
static void stack_push(struct kl_vcpu *v, const uint64_t *word, unsigned n, unsigned size)
{
	uint64_t mask = kl_sp_mask(v), sp = (v->gpr[KL_RSP] - n * size) & mask;
	uint8_t buf[64];

	for (unsigned i = 0; i < n; i++)
		memcpy(buf + (n - 1 - i) * size, &word[i], size);
	kl_write_bytes(v, kl_seg_linear(v, KL_SS, sp, n * size, true), buf, n * size);
	kl_set_sp(v, sp);
}

struct far_target {
	uint16_t sel;
	uint64_t rip;
};

static void far_operand(struct kl_vcpu *v, const struct kl_op *op, struct far_target *t)
{
	if (op->flags & KL_OPF_MEM) {
		uint64_t lin = kl_seg_linear(v, op->seg, kl_ea(v, op), op->opsize + 2u, false);

		t->rip = kl_read(v, lin, op->opsize);
		t->sel = (uint16_t)kl_read(v, kl_linear_add(v, lin, op->opsize), 2);
	} else {
		t->rip = truncate_rip((uint32_t)op->imm, op->opsize);
		t->sel = (uint16_t)(op->imm >> 32);
	}
}

/* Direct transfer to a code segment: checks of JMP and CALL. */
static void check_code(struct kl_vcpu *v, uint16_t sel, const struct kl_desc *d)
{
	unsigned dpl = kl_desc_dpl(d);

	if (kl_desc_conforming(d) ? dpl > v->cpl : (sel & 3u) > v->cpl || dpl != v->cpl)
		kl_raise_error(v, KL_EXC_GP, sel & 0xfffc);
	if ((v->efer & KL_EFER_LMA) && kl_desc_l(d) && kl_desc_db(d))
		kl_raise_error(v, KL_EXC_GP, sel & 0xfffc);
	if (!kl_desc_present(d))
		kl_raise_error(v, KL_EXC_NP, sel & 0xfffc);
}

/* JMP or CALL to @d of @sel, if that is a task: true, it is done. */
static bool to_task(struct kl_vcpu *v, uint16_t sel, struct kl_desc *d, enum kl_task_cause cause,
		    uint64_t next)
{
	unsigned type = kl_desc_type(d);
	struct kl_desc tss;

	if ((v->efer & KL_EFER_LMA) || kl_desc_s(d))
		return false;
	if (type == 5) {
		if (kl_desc_dpl(d) < v->cpl || kl_desc_dpl(d) < (sel & 3u))
			kl_raise_error(v, KL_EXC_GP, sel & 0xfffc);
		if (!kl_desc_present(d))
			kl_raise_error(v, KL_EXC_NP, sel & 0xfffc);
		sel = kl_task_gate(v, d, 0, &tss);
		kl_task_switch(v, sel, &tss, cause, next, NULL, 0);
		return true;
	}
	if (type != 1 && type != 9)
		return false;
	kl_task_check(v, sel, d);
	kl_task_switch(v, sel, d, cause, next, NULL, 0);
	return true;
}

struct call_gate {
	struct kl_desc cs;
	uint16_t sel;
	uint64_t rip;
	unsigned size;   /* of what is pushed */
	unsigned params; /* words to copy */
};

/* @d is a system descriptor of @sel: a call gate that a CALL (or JMP) may use, or it leaves. */
static void read_gate(struct kl_vcpu *v, uint16_t sel, const struct kl_desc *d, bool call,
		      struct call_gate *g)
{
	unsigned type = kl_desc_type(d), dpl = kl_desc_dpl(d);
	bool wide = v->efer & KL_EFER_LMA;

	if (wide ? type != 12 : type != 12 && type != 4)
		kl_raise_error(v, KL_EXC_GP, sel & 0xfffc);
	if (dpl < v->cpl || dpl < (sel & 3u))
		kl_raise_error(v, KL_EXC_GP, sel & 0xfffc);
	if (!kl_desc_present(d))
		kl_raise_error(v, KL_EXC_NP, sel & 0xfffc);
	g->sel = (uint16_t)(d->low >> 16);
	g->rip = (d->low & 0xffff) | (type == 12 ? (d->low >> 32) & 0xffff0000 : 0);
	g->params = (d->low >> 32) & 31;
	g->size = wide ? 8 : type == 12 ? 4 : 2;
	if (wide) {
		uint64_t high;

		kl_read_system(v, d->addr + 8, &high, sizeof(high));
		if ((high >> 40) & 31)
			kl_raise_error(v, KL_EXC_GP, sel & 0xfffc);
		g->rip |= high << 32;
		g->params = 0;
	}
	if (KL_DESC_NULL(g->sel))
		kl_raise_error(v, KL_EXC_GP, 0);
	kl_desc_read(v, g->sel, &g->cs, KL_EXC_GP, 0);
	if (!kl_desc_is_code(&g->cs) || kl_desc_dpl(&g->cs) > v->cpl ||
	    (!call && !kl_desc_conforming(&g->cs) && kl_desc_dpl(&g->cs) != v->cpl) ||
	    (wide && (!kl_desc_l(&g->cs) || kl_desc_db(&g->cs))))
		kl_raise_error(v, KL_EXC_GP, g->sel & 0xfffc);
	if (!kl_desc_present(&g->cs))
		kl_raise_error(v, KL_EXC_NP, g->sel & 0xfffc);
}

static void go(struct kl_vcpu *v, struct kl_desc *d, uint16_t sel, unsigned cpl, uint64_t rip)
{
	struct kvm_segment cs;

	kl_desc_to_segment(d, (uint16_t)((sel & ~3u) | cpl), &cs);
	kl_set_cs(v, &cs, cpl);
	v->rip = rip;
}

enum kl_next kl_op_far_jmp(struct kl_vcpu *v, const struct kl_op *op)
{
	struct far_target t;
	struct kvm_segment cs;
	struct kl_desc d;

	far_operand(v, op, &t);
	if (kl_real_mode(v) || kl_vm86(v)) {
		check_target(v, &v->seg[KL_CS], t.rip);
		kl_load_real_segment(v, KL_CS, t.sel);
		v->rip = t.rip;
		return KL_JUMPED_STOP;
	}
	if (KL_DESC_NULL(t.sel))
		kl_raise_error(v, KL_EXC_GP, 0);
	kl_desc_read(v, t.sel, &d, KL_EXC_GP, 0);
	if (to_task(v, t.sel, &d, KL_TASK_JMP, kl_next_rip(v, op)))
		return KL_JUMPED_STOP;
	if (!kl_desc_s(&d)) {
		struct call_gate g;

		read_gate(v, t.sel, &d, false, &g);
		d = g.cs;
		t.sel = g.sel;
		t.rip = g.rip;
	} else {
		if (!kl_desc_is_code(&d))
			kl_raise_error(v, KL_EXC_GP, t.sel & 0xfffc);
		check_code(v, t.sel, &d);
	}
	kl_desc_to_segment(&d, t.sel, &cs);
	check_target(v, &cs, t.rip);
	kl_desc_set_accessed(v, &d);
	go(v, &d, t.sel, v->cpl, t.rip);
	return KL_JUMPED_STOP;
}

/* CALL through a gate to more privilege: a new stack, parameters copied. */
static void call_inner(struct kl_vcpu *v, struct call_gate *g, uint64_t ret)
{
	unsigned cpl = kl_desc_dpl(&g->cs), n = 0;
	uint64_t word[4 + 32], sp, mask = ~0ull, base = 0, bytes;
	uint8_t buf[(4 + 32) * 8];
	struct kvm_segment ss, cs;
	struct kl_desc ss_desc;
	uint16_t sel;

	kl_tss_stack(v, cpl, &sp, &sel, 0);
	if (g->size == 8) {
		kl_segment_null(&ss, sel);
		ss.dpl = (uint8_t)cpl;
		if (!kl_canonical(v, sp))
			kl_raise_error(v, KL_EXC_SS, 0);
	} else {
		kl_check_inner_ss(v, sel, cpl, &ss_desc, 0);
		kl_desc_to_segment(&ss_desc, sel, &ss);
		mask = ss.db ? 0xffffffff : 0xffff;
		base = ss.base;
	}
	word[n++] = ret;
	word[n++] = v->seg[KL_CS].selector;
	stack_read(v, 0, word + n, g->params, g->size);
	n += g->params;
	word[n++] = v->gpr[KL_RSP];
	word[n++] = v->seg[KL_SS].selector;
	bytes = (uint64_t)n * g->size;
	for (unsigned i = 0; i < n; i++)
		memcpy(buf + i * g->size, &word[i], g->size);
	sp = (sp - bytes) & mask;
	if (g->size != 8)
		kl_stack_room(v, &ss, sp, (unsigned)bytes, sel & 0xfffc);
	kl_desc_to_segment(&g->cs, g->sel, &cs);
	check_target(v, &cs, g->rip);
	kl_write_as(v, g->size == 8 ? sp : (uint32_t)(base + sp), buf, (unsigned)bytes,
		    kl_tlb_mode_of(v, cpl, true));
	kl_desc_set_accessed(v, &g->cs);
	if (g->size != 8)
		kl_desc_set_accessed(v, &ss_desc);
	v->seg[KL_SS] = ss;
	v->gpr[KL_RSP] = mask == 0xffff ? (v->gpr[KL_RSP] & ~0xffffull) | sp : sp;
	go(v, &g->cs, g->sel, cpl, g->rip);
}

enum kl_next kl_op_far_call(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t word[2] = {v->seg[KL_CS].selector, kl_next_rip(v, op)};
	unsigned size = op->opsize;
	struct far_target t;
	struct kvm_segment cs;
	struct kl_desc d;

	far_operand(v, op, &t);
	if (kl_real_mode(v) || kl_vm86(v)) {
		check_target(v, &v->seg[KL_CS], t.rip);
		stack_push(v, word, 2, size);
		kl_load_real_segment(v, KL_CS, t.sel);
		v->rip = t.rip;
		return KL_JUMPED_STOP;
	}
	if (KL_DESC_NULL(t.sel))
		kl_raise_error(v, KL_EXC_GP, 0);
	kl_desc_read(v, t.sel, &d, KL_EXC_GP, 0);
	if (to_task(v, t.sel, &d, KL_TASK_CALL, word[1]))
		return KL_JUMPED_STOP;
	if (!kl_desc_s(&d)) {
		struct call_gate g;

		read_gate(v, t.sel, &d, true, &g);
		if (!kl_desc_conforming(&g.cs) && kl_desc_dpl(&g.cs) < v->cpl) {
			call_inner(v, &g, word[1]);
			return KL_JUMPED_STOP;
		}
		kl_desc_to_segment(&g.cs, g.sel, &cs);
		check_target(v, &cs, g.rip);
		d = g.cs;
		t.sel = g.sel;
		t.rip = g.rip;
		size = g.size;
	} else {
		if (!kl_desc_is_code(&d))
			kl_raise_error(v, KL_EXC_GP, t.sel & 0xfffc);
		check_code(v, t.sel, &d);
		kl_desc_to_segment(&d, t.sel, &cs);
		check_target(v, &cs, t.rip);
	}
	kl_desc_set_accessed(v, &d);
	stack_push(v, word, 2, size);
	go(v, &d, t.sel, v->cpl, t.rip);
	return KL_JUMPED_STOP;
}

/* CS of a far return or IRET to protected mode. */
static void check_return_cs(struct kl_vcpu *v, uint16_t sel, struct kl_desc *d)
{
	unsigned rpl = sel & 3;

	if (KL_DESC_NULL(sel))
		kl_raise_error(v, KL_EXC_GP, 0);
	kl_desc_read(v, sel, d, KL_EXC_GP, 0);
	if (!kl_desc_is_code(d) || rpl < v->cpl ||
	    (kl_desc_conforming(d) ? kl_desc_dpl(d) > rpl : kl_desc_dpl(d) != rpl) ||
	    ((v->efer & KL_EFER_LMA) && kl_desc_l(d) && kl_desc_db(d)))
		kl_raise_error(v, KL_EXC_GP, sel & 0xfffc);
	if (!kl_desc_present(d))
		kl_raise_error(v, KL_EXC_NP, sel & 0xfffc);
}

/* SS of a return to @rpl. True: a null selector, which 64-bit code may have. */
static bool check_return_ss(struct kl_vcpu *v, uint16_t sel, unsigned rpl, const struct kl_desc *cs,
			    struct kl_desc *d)
{
	if (KL_DESC_NULL(sel)) {
		if (!(v->efer & KL_EFER_LMA) || !kl_desc_l(cs) || rpl == 3 || (sel & 3u) != rpl)
			kl_raise_error(v, KL_EXC_GP, 0);
		return true;
	}
	kl_desc_read(v, sel, d, KL_EXC_GP, 0);
	if ((sel & 3u) != rpl || kl_desc_dpl(d) != rpl || !kl_desc_s(d) ||
	    (kl_desc_type(d) & 10) != 2)
		kl_raise_error(v, KL_EXC_GP, sel & 0xfffc);
	if (!kl_desc_present(d))
		kl_raise_error(v, KL_EXC_SS, sel & 0xfffc);
	return false;
}

static void load_return_ss(struct kl_vcpu *v, uint16_t sel, const struct kl_desc *d, bool null,
			   uint64_t sp)
{
	if (null)
		kl_segment_null(&v->seg[KL_SS], sel);
	else
		kl_desc_to_segment(d, sel, &v->seg[KL_SS]);
	v->gpr[KL_RSP] = sp;
}

static uint64_t return_sp(struct kl_vcpu *v, uint64_t sp, const struct kl_desc *cs,
			  const struct kl_desc *ss, bool null)
{
	if ((v->efer & KL_EFER_LMA) && kl_desc_l(cs))
		return sp;
	if (null || kl_desc_db(ss))
		return (uint32_t)sp;
	return (v->gpr[KL_RSP] & ~0xffffull) | (uint16_t)sp;
}

enum kl_next kl_op_far_ret(struct kl_vcpu *v, const struct kl_op *op)
{
	unsigned size = op->opsize, rpl;
	uint64_t word[2], outer[2];
	struct kl_desc d, ss;
	struct kvm_segment cs;
	uint16_t sel;
	bool null;

	stack_read(v, 0, word, 2, size);
	sel = (uint16_t)word[1];
	if (kl_real_mode(v) || kl_vm86(v)) {
		check_target(v, &v->seg[KL_CS], word[0]);
		kl_set_sp(v, v->gpr[KL_RSP] + 2 * size + op->imm);
		kl_load_real_segment(v, KL_CS, sel);
		v->rip = word[0];
		return KL_JUMPED_STOP;
	}
	check_return_cs(v, sel, &d);
	kl_desc_to_segment(&d, sel, &cs);
	check_target(v, &cs, word[0]);
	rpl = sel & 3;
	if (rpl == v->cpl) {
		kl_desc_set_accessed(v, &d);
		kl_set_sp(v, v->gpr[KL_RSP] + 2 * size + op->imm);
		go(v, &d, sel, rpl, word[0]);
		return KL_JUMPED_STOP;
	}
	stack_read(v, 2 * size + (unsigned)op->imm, outer, 2, size);
	null = check_return_ss(v, (uint16_t)outer[1], rpl, &d, &ss);
	kl_desc_set_accessed(v, &d);
	if (!null)
		kl_desc_set_accessed(v, &ss);
	load_return_ss(v, (uint16_t)outer[1], &ss, null,
		       return_sp(v, outer[0] + op->imm, &d, &ss, null));
	go(v, &d, sel, rpl, word[0]);
	kl_drop_inner_segments(v, rpl);
	return KL_JUMPED_STOP;
}

/* ---- IRET ---- */

static void iret_done(struct kl_vcpu *v)
{
	v->nmi.masked = false;
	v->int_shadow = 0;
}

static enum kl_next iret_real(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t word[3], mask = 0xffffffff & ~(uint64_t)(KL_FL_VM | KL_FL_VIF | KL_FL_VIP);
	bool virtual = kl_vme(v);

	if (kl_vm86(v)) {
		if (virtual ? op->opsize != 2 : kl_below_iopl(v))
			kl_raise_error(v, KL_EXC_GP, 0);
		mask &= ~(uint64_t)KL_FL_IOPL;
	}
	if (op->opsize == 2)
		mask &= 0xffff;
	stack_read(v, 0, word, 3, op->opsize);
	if (virtual)
		kl_vm86_check_flags(v, word[2]);
	check_target(v, &v->seg[KL_CS], word[0]);
	kl_set_sp(v, v->gpr[KL_RSP] + 3u * op->opsize);
	kl_load_real_segment(v, KL_CS, (uint16_t)word[1]);
	v->rip = word[0];
	if (virtual)
		kl_vm86_load_flags(v, word[2]);
	else
		kl_load_flags(v, word[2], mask);
	iret_done(v);
	return KL_JUMPED_STOP;
}

/* From CPL 0 with VM set in the image. */
static void iret_to_vm86(struct kl_vcpu *v, const uint64_t word[3])
{
	static const uint8_t order[] = {KL_SS, KL_ES, KL_DS, KL_FS, KL_GS};
	uint64_t more[6];
	struct kvm_segment cs = {.limit = 0xffff, .type = 3, .s = 1, .present = 1, .dpl = 3};

	stack_read(v, 12, more, 6, 4);
	kl_load_flags(v, word[2], 0xffffffff);
	v->rip = (uint16_t)word[0];
	v->gpr[KL_RSP] = (uint32_t)more[0];
	for (unsigned i = 0; i < 5; i++)
		kl_load_real_segment(v, (enum kl_seg)order[i], (uint16_t)more[1 + i]);
	cs.selector = (uint16_t)word[1];
	cs.base = (uint32_t)cs.selector << 4;
	kl_set_cs(v, &cs, 3);
}

enum kl_next kl_op_iret(struct kl_vcpu *v, const struct kl_op *op)
{
	unsigned size = op->opsize, rpl;
	uint64_t word[3], outer[2], mask;
	struct kl_desc d, ss;
	struct kvm_segment cs;
	bool null = false, pops_stack;
	uint16_t sel;

	if (kl_real_mode(v) || kl_vm86(v))
		return iret_real(v, op);
	if (v->rflags & KL_FL_NT) {
		if (v->efer & KL_EFER_LMA)
			kl_raise_error(v, KL_EXC_GP, 0);
		kl_task_return(v, kl_next_rip(v, op));
		return KL_JUMPED_STOP;
	}
	stack_read(v, 0, word, 3, size);
	if (!(v->efer & KL_EFER_LMA) && v->cpl == 0 && size == 4 && (word[2] & KL_FL_VM)) {
		iret_to_vm86(v, word);
		iret_done(v);
		return KL_JUMPED_STOP;
	}
	sel = (uint16_t)word[1];
	check_return_cs(v, sel, &d);
	kl_desc_to_segment(&d, sel, &cs);
	check_target(v, &cs, word[0]);
	rpl = sel & 3;

	mask = KL_FL_STATUS | KL_FL_TF | KL_FL_DF | KL_FL_NT;
	if (size > 2)
		mask |= KL_FL_AC | KL_FL_ID | KL_FL_RF;
	if (v->cpl <= ((v->rflags & KL_FL_IOPL) >> 12))
		mask |= KL_FL_IF;
	if (v->cpl == 0)
		mask |= KL_FL_IOPL | (size > 2 ? KL_FL_VIF | KL_FL_VIP : 0);

	pops_stack = v->code_mode == KL_CODE64 || rpl != v->cpl;
	if (pops_stack) {
		stack_read(v, 3 * size, outer, 2, size);
		null = check_return_ss(v, (uint16_t)outer[1], rpl, &d, &ss);
		if (!null)
			kl_desc_set_accessed(v, &ss);
	}
	kl_desc_set_accessed(v, &d);
	if (pops_stack)
		load_return_ss(v, (uint16_t)outer[1], &ss, null,
			       return_sp(v, outer[0], &d, &ss, null));
	else
		kl_set_sp(v, v->gpr[KL_RSP] + 3 * size);
	if (rpl != v->cpl) {
		go(v, &d, sel, rpl, word[0]);
		kl_drop_inner_segments(v, rpl);
	} else {
		go(v, &d, sel, rpl, word[0]);
	}
	kl_load_flags(v, word[2], mask);
	iret_done(v);
	return KL_JUMPED_STOP;
}

/* ---- SYSCALL, SYSENTER ---- */

static void flat_cs(struct kvm_segment *s, uint16_t sel, unsigned dpl, bool l)
{
	*s = (struct kvm_segment){.selector = sel,
				  .limit = 0xffffffff,
				  .type = 11,
				  .s = 1,
				  .present = 1,
				  .dpl = (uint8_t)dpl,
				  .g = 1,
				  .l = l,
				  .db = !l};
}

static void flat_ss(struct kvm_segment *s, uint16_t sel, unsigned dpl)
{
	*s = (struct kvm_segment){.selector = sel,
				  .limit = 0xffffffff,
				  .type = 3,
				  .s = 1,
				  .present = 1,
				  .dpl = (uint8_t)dpl,
				  .g = 1,
				  .db = 1};
}

enum kl_next kl_op_syscall(struct kl_vcpu *v, const struct kl_op *op)
{
	uint16_t sel = (uint16_t)(v->msr_star >> 32) & 0xfffc;
	uint64_t next = kl_next_rip(v, op);
	struct kvm_segment cs, ss;

	if (kl_real_mode(v) || !(v->efer & KL_EFER_SCE))
		kl_raise(v, KL_EXC_UD);
	/* Intel processors have it in 64-bit code only. */
	if (v->intel_compatible && v->code_mode != KL_CODE64)
		kl_raise(v, KL_EXC_UD);
	flat_ss(&ss, (uint16_t)(sel + 8), 0);
	if (v->efer & KL_EFER_LMA) {
		uint64_t target = v->code_mode == KL_CODE64 ? v->msr_lstar : v->msr_cstar;

		v->gpr[KL_RCX] = next;
		v->gpr[KL_R11] = v->rflags & ~(uint64_t)KL_FL_RF;
		v->rflags = (v->rflags & ~(v->msr_fmask | KL_FL_RF)) | 2;
		flat_cs(&cs, sel, 0, true);
		v->seg[KL_SS] = ss;
		kl_set_cs(v, &cs, 0);
		v->rip = target;
	} else {
		v->gpr[KL_RCX] = (uint32_t)next;
		v->rflags &= ~(uint64_t)(KL_FL_VM | KL_FL_IF | KL_FL_RF);
		flat_cs(&cs, sel, 0, false);
		v->seg[KL_SS] = ss;
		kl_set_cs(v, &cs, 0);
		v->rip = (uint32_t)v->msr_star;
	}
	/* IF and TF are never set by this, so nothing waits for run.c. */
	return KL_JUMPED;
}

enum kl_next kl_op_sysret(struct kl_vcpu *v, const struct kl_op *op)
{
	uint16_t sel = (uint16_t)(v->msr_star >> 48);
	struct kvm_segment cs, ss;
	uint64_t rip = v->gpr[KL_RCX];
	bool wide = op->opsize == 8;
	uint64_t old = v->rflags;

	if (!(v->efer & KL_EFER_SCE))
		kl_raise(v, KL_EXC_UD);
	if (kl_real_mode(v) || v->cpl)
		kl_raise_error(v, KL_EXC_GP, 0);
	if (wide && v->intel_compatible && !kl_canonical(v, rip))
		kl_raise_error(v, KL_EXC_GP, 0);
	flat_cs(&cs, (uint16_t)((wide ? sel + 16 : sel) | 3), 3, wide);
	flat_ss(&ss, (uint16_t)((sel + 8) | 3), 3);
	if (v->efer & KL_EFER_LMA) {
		const uint64_t keep = 0x3c7fd7; /* all but RF and VM */

		v->rflags = (v->gpr[KL_R11] & keep) | 2;
	} else {
		v->rflags |= KL_FL_IF;
	}
	v->seg[KL_SS] = ss;
	kl_set_cs(v, &cs, 3);
	v->rip = wide ? rip : (uint32_t)rip;
	return KL_JUMPED | kl_flags_loaded(v, old);
}

enum kl_next kl_op_sysenter(struct kl_vcpu *v, const struct kl_op *op)
{
	uint16_t sel = (uint16_t)v->msr_sysenter_cs & 0xfffc;
	bool wide = v->efer & KL_EFER_LMA;
	struct kvm_segment cs;

	/* AMD processors have it in legacy mode only. */
	if (wide && !v->intel_compatible)
		kl_raise(v, KL_EXC_UD);
	if (kl_real_mode(v) || !sel)
		kl_raise_error(v, KL_EXC_GP, 0);
	v->rflags &= ~(uint64_t)(KL_FL_VM | KL_FL_IF | KL_FL_RF);
	flat_cs(&cs, sel, 0, wide);
	flat_ss(&v->seg[KL_SS], (uint16_t)(sel + 8), 0);
	kl_set_cs(v, &cs, 0);
	v->gpr[KL_RSP] = wide ? v->msr_sysenter_esp : (uint32_t)v->msr_sysenter_esp;
	v->rip = wide ? v->msr_sysenter_eip : (uint32_t)v->msr_sysenter_eip;
	return KL_JUMPED_STOP;
}

enum kl_next kl_op_sysexit(struct kl_vcpu *v, const struct kl_op *op)
{
	uint16_t sel = (uint16_t)v->msr_sysenter_cs & 0xfffc;
	bool wide = op->opsize == 8;
	struct kvm_segment cs;

	if ((v->efer & KL_EFER_LMA) && !v->intel_compatible)
		kl_raise(v, KL_EXC_UD);
	if (kl_real_mode(v) || v->cpl || !sel)
		kl_raise_error(v, KL_EXC_GP, 0);
	if (wide && (!kl_canonical(v, v->gpr[KL_RCX]) || !kl_canonical(v, v->gpr[KL_RDX])))
		kl_raise_error(v, KL_EXC_GP, 0);
	flat_cs(&cs, (uint16_t)((sel + (wide ? 32 : 16)) | 3), 3, wide);
	flat_ss(&v->seg[KL_SS], (uint16_t)((sel + (wide ? 40 : 24)) | 3), 3);
	kl_set_cs(v, &cs, 3);
	v->gpr[KL_RSP] = wide ? v->gpr[KL_RCX] : (uint32_t)v->gpr[KL_RCX];
	v->rip = wide ? v->gpr[KL_RDX] : (uint32_t)v->gpr[KL_RDX];
	return KL_JUMPED_STOP;
}
