/* SPDX-License-Identifier: MIT */
/*
 * SSE and AVX: moves, and what runs in a thunk in the interpreter (the allow-lists of ops_sse.c and
 * ops_avx.c), with vector and general registers and memory as operands. The guest's instruction
 * with other registers.
 *
 * Within a block guest vector registers are in the host's of the same number, from their first use
 * on; their upper halves only if an instruction has used or written those, and never without the
 * lower. What has changed is written back before C is called and at each edge. (The host's upper
 * halves are cleared on the way to C, which has SSE code.) The host's MXCSR is the guest's
 * meanwhile, as fast_sse.c has it: the first of these instructions in a block sees to that, and to
 * what VEX wants; slow paths restore it.
 */
#include "x86/vector.h"
#include "x86/xlate/lower.h"

#define LOW(n)   (1u << (n))
#define UPPER(n) (1u << (16 + (n)))
#define LOWS     0xffffu

#define XMM_AT(n)   KL_AT(H_CTX, KL_CTX(xsave) + (int32_t)(KL_XMM_OFFSET + 16 * (n)))
#define UPPER_AT(n) KL_AT(H_CTX, KL_CTX(xsave) + (int32_t)(KL_XMM_OFFSET + KL_YMM_HI + 16 * (n)))

static void vex_mem(struct kl_emit *e, struct kl_vex x, unsigned op, unsigned reg, unsigned vvvv,
		    struct kl_mem m)
{
	kl_e_vex(e, x, reg, vvvv, m.base);
	kl_e8(e, op);
	kl_e_modrm_mem(e, reg, m);
}

void kl_t_xmm_write_back(struct kl_translation *t, uint32_t mask)
{
	for (unsigned i = 0; i < 16; i++) {
		if (mask & LOW(i))
			kl_e_rm(&t->e, 0x0f29, 0, i, XMM_AT(i));
		if (mask & UPPER(i)) { /* vextractf128 */
			vex_mem(&t->e, (struct kl_vex){KL_VEX_0F3A, 1, 0, 1}, 0x19, i, 0,
				UPPER_AT(i));
			kl_e8(&t->e, 1);
		}
	}
}

void kl_t_xmm_load(struct kl_translation *t, uint32_t mask)
{
	for (unsigned i = 0; i < 16; i++) {
		if (mask & LOW(i)) {
			/* vmovaps, which leaves nothing of what was in the upper half to wait for
			 */
			if (t->lent_avx)
				vex_mem(&t->e, (struct kl_vex){KL_VEX_0F, 0, 0, 0}, 0x28, i, 0,
					XMM_AT(i));
			else
				kl_e_rm(&t->e, 0x0f28, 0, i, XMM_AT(i));
		}
		if (mask & UPPER(i)) { /* vinsertf128 */
			vex_mem(&t->e, (struct kl_vex){KL_VEX_0F3A, 1, 0, 1}, 0x18, i, i,
				UPPER_AT(i));
			kl_e8(&t->e, 1);
		}
	}
}

static bool is_ymm(const ZydisDecodedOperand *o)
{
	return kl_is_class(o, ZYDIS_REGCLASS_YMM);
}

static bool is_vector(const ZydisDecodedOperand *o)
{
	return kl_is_class(o, ZYDIS_REGCLASS_XMM) || is_ymm(o);
}

static bool is_vex(const struct kl_t_op *o)
{
	return o->d.in.encoding == ZYDIS_INSTRUCTION_ENCODING_VEX;
}

/* No operands but those that can be seen, flags and MXCSR. */
static bool has_hidden(const struct kl_decode *d)
{
	for (unsigned i = d->in.operand_count_visible; i < d->in.operand_count; i++) {
		const ZydisDecodedOperand *o = &d->opnd[i];

		if (o->type != ZYDIS_OPERAND_TYPE_REGISTER ||
		    (o->reg.value != ZYDIS_REGISTER_MXCSR &&
		     ZydisRegisterGetClass(o->reg.value) != ZYDIS_REGCLASS_FLAGS))
			return true;
	}
	return false;
}

enum kind { NONE, PLAIN, ALIGNED, SETS_FLAGS };

static enum kind kind_of(const struct kl_t_op *o)
{
	switch (o->d.in.mnemonic) {
	case ZYDIS_MNEMONIC_MOVAPS:
	case ZYDIS_MNEMONIC_MOVAPD:
	case ZYDIS_MNEMONIC_MOVDQA:
	case ZYDIS_MNEMONIC_MOVNTPS:
	case ZYDIS_MNEMONIC_MOVNTPD:
	case ZYDIS_MNEMONIC_MOVNTDQ:
		return ALIGNED;
	case ZYDIS_MNEMONIC_VMOVAPS:
	case ZYDIS_MNEMONIC_VMOVAPD:
	case ZYDIS_MNEMONIC_VMOVDQA:
	case ZYDIS_MNEMONIC_VMOVNTPS:
	case ZYDIS_MNEMONIC_VMOVNTPD:
	case ZYDIS_MNEMONIC_VMOVNTDQ:
	case ZYDIS_MNEMONIC_VMOVNTDQA:
		return kl_host_has(&o->d) ? ALIGNED : NONE;
	case ZYDIS_MNEMONIC_MOVUPS:
	case ZYDIS_MNEMONIC_MOVUPD:
	case ZYDIS_MNEMONIC_MOVDQU:
	case ZYDIS_MNEMONIC_MOVSS:
	case ZYDIS_MNEMONIC_MOVSD:
	case ZYDIS_MNEMONIC_MOVD:
	case ZYDIS_MNEMONIC_MOVQ:
		return PLAIN;
	case ZYDIS_MNEMONIC_VMOVUPS:
	case ZYDIS_MNEMONIC_VMOVUPD:
	case ZYDIS_MNEMONIC_VMOVDQU:
	case ZYDIS_MNEMONIC_VLDDQU:
	case ZYDIS_MNEMONIC_VMOVSS:
	case ZYDIS_MNEMONIC_VMOVSD:
	case ZYDIS_MNEMONIC_VMOVD:
	case ZYDIS_MNEMONIC_VMOVQ:
		return kl_host_has(&o->d) ? PLAIN : NONE;
	case ZYDIS_MNEMONIC_COMISS:
	case ZYDIS_MNEMONIC_COMISD:
	case ZYDIS_MNEMONIC_UCOMISS:
	case ZYDIS_MNEMONIC_UCOMISD:
	case ZYDIS_MNEMONIC_PTEST:
	case ZYDIS_MNEMONIC_VCOMISS:
	case ZYDIS_MNEMONIC_VCOMISD:
	case ZYDIS_MNEMONIC_VUCOMISS:
	case ZYDIS_MNEMONIC_VUCOMISD:
	case ZYDIS_MNEMONIC_VPTEST:
	case ZYDIS_MNEMONIC_VTESTPS:
	case ZYDIS_MNEMONIC_VTESTPD:
		return o->op.thunk ? SETS_FLAGS : NONE;
	default:
		/* Others with flags, or that have more operands, are not for us. */
		if (!o->op.thunk || (o->d.in.cpu_flags->modified | o->d.in.cpu_flags->tested |
				     o->d.in.cpu_flags->undefined))
			return NONE;
		return is_vex(o) ? PLAIN : ALIGNED;
	}
}

static void encode_legacy(struct kl_emit *e, const ZydisDecodedInstruction *in, unsigned reg,
			  unsigned rm)
{
	unsigned simd = 0, rex = in->raw.rex.W << 3 | (reg >> 3) << 2 | rm >> 3;

	for (unsigned i = 0; i < in->raw.prefix_count; i++) {
		uint8_t p = in->raw.prefixes[i].value;

		if (p == 0xf2 || p == 0xf3)
			simd = p;
		else if (p == 0x66 && !simd)
			simd = p;
	}
	if (simd)
		kl_e8(e, simd);
	if (rex)
		kl_e8(e, 0x40 | rex);
	kl_e8(e, 0x0f);
	if (in->opcode_map == ZYDIS_OPCODE_MAP_0F38)
		kl_e8(e, 0x38);
	else if (in->opcode_map == ZYDIS_OPCODE_MAP_0F3A)
		kl_e8(e, 0x3a);
}

/* Is an operand a general register, or would be if it were not in memory? */
static bool has_general(const struct kl_t_op *o)
{
	switch (o->d.in.mnemonic) {
	case ZYDIS_MNEMONIC_VMOVD:
	case ZYDIS_MNEMONIC_VPEXTRD:
	case ZYDIS_MNEMONIC_VPINSRD:
	case ZYDIS_MNEMONIC_VCVTSI2SD:
	case ZYDIS_MNEMONIC_VCVTSI2SS:
		return true;
	default:
		for (unsigned i = 0; i < o->d.in.operand_count_visible; i++)
			if (kl_is_gpr(&o->d.opnd[i]))
				return true;
		return false;
	}
}

/* @vvvv 0: none, or the first. @rm H_NONE: at H_S1. */
static void encode(struct kl_translation *t, const struct kl_t_op *o, unsigned reg, unsigned vvvv,
		   unsigned rm, bool is4)
{
	const ZydisDecodedInstruction *in = &o->d.in;
	uint8_t imm = (uint8_t)in->raw.imm[0].value.u, w = in->raw.vex.W;
	struct kl_emit *e = &t->e;
	bool mem = rm == H_NONE;

	if (t->word == 4) {
		/* What would be a register above the eighth, or 64 bits of a general one, is not.
		 */
		if (is4)
			imm &= 0x7f;
		if (has_general(o))
			w = 0;
	}
	if (mem)
		rm = H_S1;
	if (is_vex(o))
		kl_e_vex(e,
			 (struct kl_vex){(uint8_t)in->opcode_map, in->raw.vex.pp, w, in->raw.vex.L},
			 reg, vvvv, rm);
	else
		encode_legacy(e, in, reg, rm);
	kl_e8(e, in->opcode);
	if (mem)
		kl_e_modrm_mem(e, reg, KL_T_PTR);
	else
		kl_e8(e, 0xc0 | (reg & 7) << 3 | (rm & 7));
	if (in->raw.imm[0].size)
		kl_e8(e, imm);
}

/* Operands of the kinds that there are here, each in a field of its own. */
static bool fits(const struct kl_t_op *o)
{
	bool vector = false;

	for (unsigned i = 0; i < o->d.in.operand_count_visible; i++) {
		const ZydisDecodedOperand *x = &o->d.opnd[i];

		vector |= is_vector(x);
		switch (x->encoding) {
		case ZYDIS_OPERAND_ENCODING_MODRM_REG:
		case ZYDIS_OPERAND_ENCODING_MODRM_RM:
			if (!is_vector(x) && !kl_is_gpr(x) && x->type != ZYDIS_OPERAND_TYPE_MEMORY)
				return false;
			break;
		case ZYDIS_OPERAND_ENCODING_NDSNDD:
		case ZYDIS_OPERAND_ENCODING_IS4:
			if (!is_vector(x))
				return false;
			break;
		default:
			if (x->type != ZYDIS_OPERAND_TYPE_IMMEDIATE)
				return false;
			break;
		}
	}
	return vector;
}

static void ready(struct kl_translation *t, bool avx)
{
	struct kl_emit *e = &t->e;
	uint8_t *lent;

	if (avx ? t->lent_avx : t->lent)
		return;
	t->lent = true;
	t->lent_avx |= avx;
	kl_t_forget_pointer(t);
	kl_t_flags_clobber(t);
	kl_e_rm(e, 0x80, 0, 7, KL_AT(H_CTX, avx ? KL_CTX(avx_lent) : KL_CTX(mxcsr_lent)));
	kl_e8(e, 0);
	lent = kl_e_jcc(e, 5);
	/* If it is not ready for VEX behind others that have been, the call does not come back. */
	kl_t_xmm_write_back(t, t->xmm_dirty);
	kl_e_imm(e, H_S0, (uint64_t)(uintptr_t)t->at->own);
	kl_e_call(e, avx ? t->x->lend_avx : t->x->lend);
	kl_e_bind(e, lent);
}

/* A register operand's number in the host. */
static unsigned use(struct kl_translation *t, const struct kl_t_op *o, const ZydisDecodedOperand *x,
		    unsigned scratch)
{
	unsigned n = kl_register_number(x);
	uint32_t want = LOW(n) | (is_ymm(x) ? UPPER(n) : 0);

	if (!is_vector(x))
		return kl_t_use(t, n, scratch);
	/* VEX writes all of a register, others may leave some. */
	if (is_vex(o) && !(x->actions & ZYDIS_OPERAND_ACTION_MASK_READ))
		return n;
	kl_t_xmm_load(t, want & ~t->xmm);
	t->xmm |= want;
	return n;
}

static void changed(struct kl_translation *t, const struct kl_t_op *o, const ZydisDecodedOperand *x,
		    unsigned reg)
{
	uint32_t mask = LOW(reg) | (is_vex(o) ? UPPER(reg) : 0);

	if (!x || x->type != ZYDIS_OPERAND_TYPE_REGISTER ||
	    !(x->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE))
		return;
	if (!is_vector(x)) {
		kl_t_put(t, kl_register_number(x), reg);
		return;
	}
	t->xmm |= mask;
	t->xmm_dirty |= mask;
}

/* All upper halves become zero, those in the host and those in memory; in 32-bit code of eight. */
static bool zero_upper(struct kl_translation *t)
{
	struct kl_emit *e = &t->e;
	unsigned r = 0;

	ready(t, true);
	while (r < 15 && t->xmm & LOW(r))
		r++;
	t->xmm_dirty &= LOWS;
	kl_t_xmm_write_back(t, t->xmm_dirty & LOW(r));
	t->xmm_dirty &= ~LOW(r);
	t->xmm &= ~(LOW(r) | UPPER(r));
	/* vxorps, vmovaps: the halves lie side by side */
	kl_e_vex(e, (struct kl_vex){KL_VEX_0F, 0, 0, 0}, r, r, r);
	kl_e8(e, 0x57), kl_e8(e, 0xc0 | (r & 7) << 3 | (r & 7));
	for (unsigned i = 0; i < (t->word == 8 ? 16 : 8); i += 2)
		vex_mem(e, (struct kl_vex){KL_VEX_0F, 0, 0, 1}, 0x29, r, 0, UPPER_AT(i));
	kl_e_vzeroupper(e);
	t->xmm |= (t->xmm & LOWS) << 16;
	return true;
}

bool kl_lower_vector(struct kl_translation *t, struct kl_t_op *o)
{
	const ZydisDecodedInstruction *in = &o->d.in;
	const ZydisDecodedOperand *reg, *rm, *vvvv, *is4;
	unsigned size = 0, r, v = 0, m = H_NONE;
	bool mem, store;
	enum kind kind;

	if ((!is_vex(o) && in->encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY) ||
	    (in->opcode_map != ZYDIS_OPCODE_MAP_0F && in->opcode_map != ZYDIS_OPCODE_MAP_0F38 &&
	     in->opcode_map != ZYDIS_OPCODE_MAP_0F3A) ||
	    (o->op.flags & KL_OPF_LOCK))
		return false;
	if (in->mnemonic == ZYDIS_MNEMONIC_VZEROUPPER && kl_host_has(&o->d))
		return zero_upper(t);
	if (in->operand_count_visible < 2 || has_hidden(&o->d) || !fits(o))
		return false;
	reg = kl_t_field(o, ZYDIS_OPERAND_ENCODING_MODRM_REG);
	rm = kl_t_field(o, ZYDIS_OPERAND_ENCODING_MODRM_RM);
	vvvv = kl_t_field(o, ZYDIS_OPERAND_ENCODING_NDSNDD);
	is4 = kl_t_field(o, ZYDIS_OPERAND_ENCODING_IS4);
	if (!rm)
		return false;
	kind = kind_of(o);
	mem = rm->type == ZYDIS_OPERAND_TYPE_MEMORY;
	if (mem)
		size = rm->size / 8;
	store = mem && (rm->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE);
	if (kind == NONE || (mem && (!kl_t_can_address(t, o) || !size || size > 32)))
		return false;
	ready(t, is_vex(o));
	if (mem) {
		kl_t_access(t, o, size, store);
		if (size >= 16 && kind != PLAIN)
			kl_t_aligned(t, size);
	} else {
		m = use(t, o, rm, H_S1);
	}
	/* A destination in vvvv leaves reg to the opcode. */
	r = reg ? use(t, o, reg, H_S0) : in->raw.modrm.reg;
	if (vvvv)
		v = use(t, o, vvvv, H_NONE);
	if (is4)
		use(t, o, is4, H_NONE);
	if (mem)
		kl_t_point(t);
	encode(t, o, r, v, m, is4);
	if (!mem)
		changed(t, o, rm, m);
	changed(t, o, reg, r);
	changed(t, o, vvvv, v);
	if (kind == SETS_FLAGS)
		kl_t_flags_set(t);
	return true;
}
