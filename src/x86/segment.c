/* SPDX-License-Identifier: MIT */
/*
 * Descriptors and segment registers: loads with their checks, limits, the stacks in the TSS,
 * and the instructions that look at descriptors.
 *
 * kvm_segment is the descriptor cache; limit is in bytes, as KVM has it.
 */
#include "x86/segment.h"

#include <string.h>

#include "host/cpu.h"
#include "x86/access.h"
#include "x86/insn.h"
#include "x86/paging.h"

bool kl_desc_try_read(struct kl_vcpu *v, uint16_t sel, struct kl_desc *d)
{
	uint64_t base = v->gdt.base;
	uint32_t limit = v->gdt.limit;

	if (sel & 4) {
		const struct kvm_segment *ldt = &v->seg[KL_LDTR];

		if (ldt->unusable || !ldt->present)
			return false;
		base = ldt->base;
		limit = ldt->limit;
	}
	if ((uint32_t)(sel | 7) > limit)
		return false;
	d->addr = base + (sel & ~7u);
	d->base_hi = 0;
	kl_read_system(v, d->addr, &d->low, sizeof(d->low));
	return true;
}

void kl_desc_read(struct kl_vcpu *v, uint16_t sel, struct kl_desc *d, unsigned vector, uint32_t ext)
{
	if (!kl_desc_try_read(v, sel, d))
		kl_raise_error(v, vector, (sel & 0xfffc) | ext);
}

/* The second half of a system descriptor in long mode. */
static bool read_high(struct kl_vcpu *v, uint16_t sel, struct kl_desc *d)
{
	uint32_t limit = sel & 4 ? v->seg[KL_LDTR].limit : v->gdt.limit;
	uint64_t high;

	if ((uint32_t)(sel | 7) + 8 > limit)
		return false;
	kl_read_system(v, d->addr + 8, &high, sizeof(high));
	d->base_hi = (uint32_t)high;
	return !((high >> 40) & 31); /* the type field of the upper half must be 0 */
}

void kl_desc_to_segment(const struct kl_desc *d, uint16_t sel, struct kvm_segment *s)
{
	uint32_t limit = (uint32_t)((d->low & 0xffff) | ((d->low >> 32) & 0xf0000));

	memset(s, 0, sizeof(*s));
	s->selector = sel;
	s->base = ((d->low >> 16) & 0xffffff) | ((d->low >> 32) & 0xff000000) |
		  ((uint64_t)d->base_hi << 32);
	s->g = (d->low >> 55) & 1;
	s->limit = s->g ? (limit << 12) | 0xfff : limit;
	s->type = (uint8_t)kl_desc_type(d);
	s->s = kl_desc_s(d);
	s->dpl = (uint8_t)kl_desc_dpl(d);
	s->present = kl_desc_present(d);
	s->avl = (d->low >> 52) & 1;
	s->l = kl_desc_l(d);
	s->db = kl_desc_db(d);
	if (s->s)
		s->type |= 1;
}

void kl_desc_set_accessed(struct kl_vcpu *v, struct kl_desc *d)
{
	uint8_t type;

	if (d->low & (1ull << 40))
		return;
	d->low |= 1ull << 40;
	type = (uint8_t)(d->low >> 40);
	kl_write_system(v, d->addr + 5, &type, 1);
}

void kl_segment_null(struct kvm_segment *s, uint16_t sel)
{
	memset(s, 0, sizeof(*s));
	s->selector = sel;
	s->unusable = 1;
}

void kl_set_cs(struct kl_vcpu *v, const struct kvm_segment *cs, unsigned cpl)
{
	v->seg[KL_CS] = *cs;
	v->cpl = (uint8_t)cpl;
	v->seg[KL_SS].dpl = (uint8_t)cpl;
	kl_x86_update_mode(v);
}

uint64_t kl_sp_mask(struct kl_vcpu *v)
{
	if (v->long_mode)
		return ~0ull;
	return v->seg[KL_SS].db ? 0xffffffff : 0xffff;
}

static bool beyond_limit(const struct kvm_segment *s, bool typed, uint64_t ea, unsigned size)
{
	uint64_t last = ea + size - 1;

	if (typed && (s->type & 12) == 4) /* expands down */
		return ea <= s->limit || last > (s->db ? 0xffffffffu : 0xffffu);
	/* What begins below 4 GiB and ends above wraps on Intel's processors. */
	return last > s->limit && !(s->limit == 0xffffffff && kl_host_is_intel());
}

void kl_stack_room(struct kl_vcpu *v, const struct kvm_segment *ss, uint64_t sp, unsigned size,
		   uint32_t error)
{
	bool typed = !kl_real_mode(v);

	if ((typed && (ss->unusable || !ss->present)) || beyond_limit(ss, typed, sp, size))
		kl_raise_error(v, KL_EXC_SS, error);
}

uint64_t kl_seg_linear_slow(struct kl_vcpu *v, unsigned s, uint64_t ea, unsigned size, bool write)
{
	const struct kvm_segment *seg = &v->seg[s];
	unsigned vector = s == KL_SS ? KL_EXC_SS : KL_EXC_GP;
	bool typed = !kl_real_mode(v) && !kl_vm86(v);

	if (v->long_mode) {
		if (s < KL_FS)
			return ea;
		if (!kl_canonical(v, ea) && !kl_host_is_intel())
			kl_raise_error(v, KL_EXC_GP, 0);
		return ea + seg->base;
	}
	if (typed) {
		if (seg->unusable || !seg->present)
			kl_raise_error(v, vector, 0);
		if (seg->type & 8 ? write || !(seg->type & 2) : write && !(seg->type & 2))
			kl_raise_error(v, vector, 0);
	}
	if (beyond_limit(seg, typed, ea, size))
		kl_raise_error(v, vector, 0);
	return (uint32_t)(seg->base + ea);
}

/* ---- loads ---- */

void kl_load_real_segment(struct kl_vcpu *v, enum kl_seg seg, uint16_t sel)
{
	struct kvm_segment *s = &v->seg[seg];

	s->selector = sel;
	s->base = (uint32_t)sel << 4;
	if (kl_vm86(v)) {
		s->limit = 0xffff;
		s->type = 3;
		s->s = s->present = 1;
		s->dpl = 3;
		s->db = s->l = s->g = s->unusable = 0;
	}
	if (seg == KL_CS)
		kl_x86_update_mode(v);
}

static void load_ss(struct kl_vcpu *v, uint16_t sel)
{
	struct kl_desc d;

	if (KL_DESC_NULL(sel)) {
		if (v->code_mode != KL_CODE64 || v->cpl == 3 || (sel & 3) != v->cpl)
			kl_raise_error(v, KL_EXC_GP, 0);
		kl_segment_null(&v->seg[KL_SS], sel);
		v->seg[KL_SS].dpl = v->cpl;
		return;
	}
	kl_desc_read(v, sel, &d, KL_EXC_GP, 0);
	if ((sel & 3) != v->cpl || kl_desc_dpl(&d) != v->cpl || !kl_desc_s(&d) ||
	    (kl_desc_type(&d) & 10) != 2)
		kl_raise_error(v, KL_EXC_GP, sel & 0xfffc);
	if (!kl_desc_present(&d))
		kl_raise_error(v, KL_EXC_SS, sel & 0xfffc);
	kl_desc_set_accessed(v, &d);
	kl_desc_to_segment(&d, sel, &v->seg[KL_SS]);
}

void kl_load_segment(struct kl_vcpu *v, enum kl_seg seg, uint16_t sel)
{
	struct kl_desc d;
	unsigned type, rpl = sel & 3;

	if (kl_real_mode(v) || kl_vm86(v)) {
		kl_load_real_segment(v, seg, sel);
		return;
	}
	if (seg == KL_SS) {
		load_ss(v, sel);
		return;
	}
	if (KL_DESC_NULL(sel)) {
		kl_segment_null(&v->seg[seg], sel);
		return;
	}
	kl_desc_read(v, sel, &d, KL_EXC_GP, 0);
	type = kl_desc_type(&d);
	if (!kl_desc_s(&d) || (type & 10) == 8)
		kl_raise_error(v, KL_EXC_GP, sel & 0xfffc);
	if ((type & 12) != 12 && (rpl > kl_desc_dpl(&d) || v->cpl > kl_desc_dpl(&d)))
		kl_raise_error(v, KL_EXC_GP, sel & 0xfffc);
	if (!kl_desc_present(&d))
		kl_raise_error(v, KL_EXC_NP, sel & 0xfffc);
	kl_desc_set_accessed(v, &d);
	kl_desc_to_segment(&d, sel, &v->seg[seg]);
}

void kl_drop_inner_segments(struct kl_vcpu *v, unsigned cpl)
{
	static const uint8_t data[4] = {KL_ES, KL_DS, KL_FS, KL_GS};

	for (unsigned i = 0; i < 4; i++) {
		struct kvm_segment *s = &v->seg[data[i]];

		/* The base stays: 64-bit programs have their FS and GS without selectors. */
		if (KL_DESC_NULL(s->selector) ||
		    (!s->unusable && s->s && (s->type & 12) != 12 && s->dpl < cpl)) {
			uint64_t base = s->base;

			kl_segment_null(s, 0);
			s->base = base;
		}
	}
}

/* ---- stacks of the TSS ---- */

static void tss_read(struct kl_vcpu *v, unsigned off, void *buf, unsigned len, uint32_t ext)
{
	const struct kvm_segment *tr = &v->seg[KL_TR];

	if (tr->unusable || off + len - 1 > tr->limit)
		kl_raise_error(v, KL_EXC_TS, (tr->selector & 0xfffc) | ext);
	kl_read_system(v, tr->base + off, buf, len);
}

uint64_t kl_tss_ist(struct kl_vcpu *v, unsigned ist, uint32_t ext)
{
	uint64_t sp;

	tss_read(v, 0x24 + (ist - 1) * 8, &sp, 8, ext);
	return sp;
}

void kl_tss_stack(struct kl_vcpu *v, unsigned cpl, uint64_t *sp, uint16_t *ss, uint32_t ext)
{
	if (v->efer & KL_EFER_LMA) {
		tss_read(v, 4 + cpl * 8, sp, 8, ext);
		if (ss)
			*ss = (uint16_t)cpl;
	} else if (v->seg[KL_TR].type & 8) {
		uint32_t word[2];

		tss_read(v, 4 + cpl * 8, word, 8, ext);
		*sp = word[0];
		*ss = (uint16_t)word[1];
	} else {
		uint16_t word[2];

		tss_read(v, 2 + cpl * 4, word, 4, ext);
		*sp = word[0];
		*ss = word[1];
	}
}

void kl_check_inner_ss(struct kl_vcpu *v, uint16_t sel, unsigned cpl, struct kl_desc *d,
		       uint32_t ext)
{
	if (KL_DESC_NULL(sel))
		kl_raise_error(v, KL_EXC_TS, ext);
	kl_desc_read(v, sel, d, KL_EXC_TS, ext);
	if ((sel & 3) != cpl || kl_desc_dpl(d) != cpl || !kl_desc_s(d) ||
	    (kl_desc_type(d) & 10) != 2)
		kl_raise_error(v, KL_EXC_TS, (sel & 0xfffc) | ext);
	if (!kl_desc_present(d))
		kl_raise_error(v, KL_EXC_SS, (sel & 0xfffc) | ext);
}

/* ---- instructions ---- */

static uint16_t value16(struct kl_vcpu *v, const struct kl_op *op)
{
	if (op->flags & KL_OPF_MEM)
		return (uint16_t)kl_read(v, kl_seg_linear(v, op->seg, kl_ea(v, op), 2, false), 2);
	return (uint16_t)kl_gpr_get(v, op->rm, 2);
}

/* A selector to memory is always 2 bytes; a register gets opsize, zero-extended. */
static void put_value16(struct kl_vcpu *v, const struct kl_op *op, uint16_t val)
{
	if (op->flags & KL_OPF_MEM)
		kl_write(v, kl_seg_linear(v, op->seg, kl_ea(v, op), 2, true), val, 2);
	else
		kl_gpr_set(v, op->rm, val, op->opsize);
}

static void need_protected(struct kl_vcpu *v)
{
	if (kl_real_mode(v) || kl_vm86(v))
		kl_raise(v, KL_EXC_UD);
}

static void need_cpl0(struct kl_vcpu *v)
{
	if (v->cpl)
		kl_raise_error(v, KL_EXC_GP, 0);
}

enum kl_next kl_op_mov_to_sreg(struct kl_vcpu *v, const struct kl_op *op)
{
	if (op->reg == KL_CS || op->reg > KL_GS)
		kl_raise(v, KL_EXC_UD);
	kl_load_segment(v, (enum kl_seg)op->reg, value16(v, op));
	if (op->reg != KL_SS)
		return KL_NEXT;
	v->int_shadow = KVM_X86_SHADOW_INT_MOV_SS;
	return KL_STOP;
}

enum kl_next kl_op_mov_from_sreg(struct kl_vcpu *v, const struct kl_op *op)
{
	if (op->reg > KL_GS)
		kl_raise(v, KL_EXC_UD);
	put_value16(v, op, v->seg[op->reg].selector);
	return KL_NEXT;
}

static uint64_t stack_linear(struct kl_vcpu *v, uint64_t sp, unsigned size, bool write)
{
	return kl_seg_linear(v, KL_SS, sp & kl_sp_mask(v), size, write);
}

enum kl_next kl_op_push_sreg(struct kl_vcpu *v, const struct kl_op *op)
{
	/* Intel's processors leave the upper half of 32 bits as it was. */
	unsigned size = op->opsize == 4 && kl_host_is_intel() ? 2 : op->opsize;
	uint64_t sp = v->gpr[KL_RSP] - op->opsize;

	if (v->code_mode == KL_CODE64 && op->reg < KL_FS)
		kl_raise(v, KL_EXC_UD);
	kl_write(v, stack_linear(v, sp, size, true), v->seg[op->reg].selector, size);
	kl_set_sp(v, sp);
	return KL_NEXT;
}

enum kl_next kl_op_pop_sreg(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t sel;

	if ((v->code_mode == KL_CODE64 && op->reg < KL_FS) || op->reg == KL_CS)
		kl_raise(v, KL_EXC_UD);
	sel = kl_read(v, stack_linear(v, v->gpr[KL_RSP], op->opsize, false), op->opsize);
	kl_load_segment(v, (enum kl_seg)op->reg, (uint16_t)sel);
	kl_set_sp(v, v->gpr[KL_RSP] + op->opsize);
	if (op->reg != KL_SS)
		return KL_NEXT;
	v->int_shadow = KVM_X86_SHADOW_INT_MOV_SS;
	return KL_STOP;
}

enum kl_next kl_op_load_far_ptr(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t lin = kl_seg_linear(v, op->seg, kl_ea(v, op), op->opsize + 2u, false);
	uint64_t off = kl_read(v, lin, op->opsize);
	uint16_t sel = (uint16_t)kl_read(v, kl_linear_add(v, lin, op->opsize), 2);

	kl_load_segment(v, (enum kl_seg)op->imm, sel);
	kl_gpr_set(v, op->reg, off, op->opsize);
	return KL_NEXT;
}

/* LDT and TSS in 64-bit code: the upper half is there, and the base is an address. */
static void need_wide_system(struct kl_vcpu *v, uint16_t sel, struct kl_desc *d)
{
	struct kvm_segment s;

	if (!read_high(v, sel, d))
		kl_raise_error(v, KL_EXC_GP, sel & 0xfffc);
	kl_desc_to_segment(d, sel, &s);
	if (!kl_canonical(v, s.base))
		kl_raise_error(v, KL_EXC_GP, sel & 0xfffc);
}

enum kl_next kl_op_lldt(struct kl_vcpu *v, const struct kl_op *op)
{
	struct kl_desc d;
	uint16_t sel;

	need_protected(v);
	need_cpl0(v);
	sel = value16(v, op);
	if (KL_DESC_NULL(sel)) {
		kl_segment_null(&v->seg[KL_LDTR], sel);
		return KL_NEXT;
	}
	if (sel & 4)
		kl_raise_error(v, KL_EXC_GP, sel & 0xfffc);
	kl_desc_read(v, sel, &d, KL_EXC_GP, 0);
	if (kl_desc_s(&d) || kl_desc_type(&d) != 2)
		kl_raise_error(v, KL_EXC_GP, sel & 0xfffc);
	if (!kl_desc_present(&d))
		kl_raise_error(v, KL_EXC_NP, sel & 0xfffc);
	if (v->long_mode)
		need_wide_system(v, sel, &d);
	kl_desc_to_segment(&d, sel, &v->seg[KL_LDTR]);
	return KL_NEXT;
}

enum kl_next kl_op_ltr(struct kl_vcpu *v, const struct kl_op *op)
{
	struct kl_desc d;
	uint16_t sel;
	uint8_t type;

	need_protected(v);
	need_cpl0(v);
	sel = value16(v, op);
	if (KL_DESC_NULL(sel))
		kl_raise_error(v, KL_EXC_GP, 0);
	if (sel & 4)
		kl_raise_error(v, KL_EXC_GP, sel & 0xfffc);
	kl_desc_read(v, sel, &d, KL_EXC_GP, 0);
	type = (uint8_t)kl_desc_type(&d);
	if (kl_desc_s(&d) || (type != 9 && (type != 1 || v->long_mode)))
		kl_raise_error(v, KL_EXC_GP, sel & 0xfffc);
	if (!kl_desc_present(&d))
		kl_raise_error(v, KL_EXC_NP, sel & 0xfffc);
	if (v->long_mode)
		need_wide_system(v, sel, &d);
	d.low |= 2ull << 40; /* busy */
	type = (uint8_t)(d.low >> 40);
	kl_write_system(v, d.addr + 5, &type, 1);
	kl_desc_to_segment(&d, sel, &v->seg[KL_TR]);
	return KL_NEXT;
}

static enum kl_next store_selector(struct kl_vcpu *v, const struct kl_op *op, enum kl_seg seg)
{
	need_protected(v);
	if (v->cr4 & KL_CR4_UMIP)
		need_cpl0(v);
	put_value16(v, op, v->seg[seg].selector);
	return KL_NEXT;
}

enum kl_next kl_op_sldt(struct kl_vcpu *v, const struct kl_op *op)
{
	return store_selector(v, op, KL_LDTR);
}

enum kl_next kl_op_str(struct kl_vcpu *v, const struct kl_op *op)
{
	return store_selector(v, op, KL_TR);
}

static void set_zf(struct kl_vcpu *v, bool on)
{
	v->rflags = on ? v->rflags | KL_FL_ZF : v->rflags & ~(uint64_t)KL_FL_ZF;
}

/* LAR and LSL: may @sel's descriptor be seen from here? */
static bool visible(struct kl_vcpu *v, uint16_t sel, struct kl_desc *d, bool lsl)
{
	unsigned type;

	if (KL_DESC_NULL(sel) || !kl_desc_try_read(v, sel, d))
		return false;
	type = kl_desc_type(d);
	if (!kl_desc_s(d)) {
		bool wide = v->efer & KL_EFER_LMA;
		uint16_t ok = wide ? (1 << 2 | 1 << 9 | 1 << 11)
				   : (1 << 1 | 1 << 2 | 1 << 3 | 1 << 9 | 1 << 11);

		if (!lsl)
			ok |= wide ? 1 << 12 : (1 << 4 | 1 << 5 | 1 << 12);
		if (!((ok >> type) & 1))
			return false;
	} else if ((type & 12) == 12) {
		return true; /* conforming code */
	}
	return v->cpl <= kl_desc_dpl(d) && (sel & 3u) <= kl_desc_dpl(d);
}

enum kl_next kl_op_lar(struct kl_vcpu *v, const struct kl_op *op)
{
	struct kl_desc d;
	uint16_t sel;
	bool ok;

	need_protected(v);
	sel = value16(v, op);
	ok = visible(v, sel, &d, false);
	set_zf(v, ok);
	if (ok)
		kl_gpr_set(v, op->reg, (d.low >> 32) & 0x00f0ff00, op->opsize);
	return KL_NEXT;
}

enum kl_next kl_op_lsl(struct kl_vcpu *v, const struct kl_op *op)
{
	struct kvm_segment s;
	struct kl_desc d;
	uint16_t sel;
	bool ok;

	need_protected(v);
	sel = value16(v, op);
	ok = visible(v, sel, &d, true);
	set_zf(v, ok);
	if (ok) {
		kl_desc_to_segment(&d, sel, &s);
		kl_gpr_set(v, op->reg, s.limit, op->opsize);
	}
	return KL_NEXT;
}

static enum kl_next verify(struct kl_vcpu *v, const struct kl_op *op, bool write)
{
	struct kl_desc d;
	unsigned type;
	uint16_t sel;
	bool ok;

	need_protected(v);
	sel = value16(v, op);
	ok = !KL_DESC_NULL(sel) && kl_desc_try_read(v, sel, &d) && kl_desc_s(&d);
	if (ok) {
		type = kl_desc_type(&d);
		if (write)
			ok = (type & 10) == 2;
		else
			ok = (type & 10) != 8;
		if ((type & 12) != 12)
			ok &= v->cpl <= kl_desc_dpl(&d) && (sel & 3u) <= kl_desc_dpl(&d);
	}
	set_zf(v, ok);
	return KL_NEXT;
}

enum kl_next kl_op_verr(struct kl_vcpu *v, const struct kl_op *op)
{
	return verify(v, op, false);
}

enum kl_next kl_op_verw(struct kl_vcpu *v, const struct kl_op *op)
{
	return verify(v, op, true);
}

enum kl_next kl_op_arpl(struct kl_vcpu *v, const struct kl_op *op)
{
	uint16_t dst, src;
	bool raise;

	need_protected(v);
	src = (uint16_t)kl_gpr_get(v, op->reg, 2);
	if (op->flags & KL_OPF_MEM) {
		uint64_t ea = kl_ea(v, op);

		dst = (uint16_t)kl_read(v, kl_seg_linear(v, op->seg, ea, 2, false), 2);
		raise = (dst & 3) < (src & 3);
		if (raise)
			kl_write(v, kl_seg_linear(v, op->seg, ea, 2, true), (dst & ~3u) | (src & 3),
				 2);
	} else {
		dst = (uint16_t)kl_gpr_get(v, op->rm, 2);
		raise = (dst & 3) < (src & 3);
		if (raise)
			kl_gpr_set(v, op->rm, (dst & ~3u) | (src & 3), 2);
	}
	set_zf(v, raise);
	return KL_NEXT;
}
