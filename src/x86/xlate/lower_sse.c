/* SPDX-License-Identifier: MIT */
/*
 * SSE: moves, and what runs in a thunk in the interpreter (ops_sse.c's allow-list), with XMM and
 * general registers and memory as operands. The guest's instruction with other registers.
 *
 * Within a block guest XMM registers are in the host's of the same number, from their first use on;
 * what has changed is written back before C is called and at each edge. The host's MXCSR is the
 * guest's meanwhile, as fast_sse.c has it: the first of these instructions in a block sees to it,
 * and slow paths restore it.
 */
#include "x86/vector.h"
#include "x86/xlate/lower.h"

#define XMM_AT(n) KL_AT(H_CTX, KL_CTX(xsave) + (int32_t)(KL_XMM_OFFSET + 16 * (n)))

void kl_t_xmm_write_back(struct kl_translation *t, unsigned mask)
{
	for (unsigned i = 0; i < 16; i++)
		if (mask >> i & 1)
			kl_e_rm(&t->e, 0x0f29, 0, i, XMM_AT(i));
}

void kl_t_xmm_load(struct kl_translation *t, unsigned mask)
{
	for (unsigned i = 0; i < 16; i++)
		if (mask >> i & 1)
			kl_e_rm(&t->e, 0x0f28, 0, i, XMM_AT(i));
}

static bool is_xmm(const ZydisDecodedOperand *o)
{
	return kl_is_class(o, ZYDIS_REGCLASS_XMM);
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
	case ZYDIS_MNEMONIC_MOVUPS:
	case ZYDIS_MNEMONIC_MOVUPD:
	case ZYDIS_MNEMONIC_MOVDQU:
	case ZYDIS_MNEMONIC_MOVSS:
	case ZYDIS_MNEMONIC_MOVSD:
	case ZYDIS_MNEMONIC_MOVD:
	case ZYDIS_MNEMONIC_MOVQ:
		return PLAIN;
	case ZYDIS_MNEMONIC_COMISS:
	case ZYDIS_MNEMONIC_COMISD:
	case ZYDIS_MNEMONIC_UCOMISS:
	case ZYDIS_MNEMONIC_UCOMISD:
	case ZYDIS_MNEMONIC_PTEST:
		return o->op.thunk ? SETS_FLAGS : NONE;
	default:
		/* Others with flags, or that have more operands, are not for us. */
		if (!o->op.thunk || (o->d.in.cpu_flags->modified | o->d.in.cpu_flags->tested |
				     o->d.in.cpu_flags->undefined))
			return NONE;
		return ALIGNED;
	}
}

static void encode(struct kl_translation *t, const struct kl_t_op *o, unsigned reg, bool mem,
		   unsigned rm)
{
	const ZydisDecodedInstruction *in = &o->d.in;
	struct kl_emit *e = &t->e;
	unsigned simd = 0, rex;

	for (unsigned i = 0; i < in->raw.prefix_count; i++) {
		uint8_t p = in->raw.prefixes[i].value;

		if (p == 0xf2 || p == 0xf3)
			simd = p;
		else if (p == 0x66 && !simd)
			simd = p;
	}
	if (mem)
		rm = H_S1;
	rex = in->raw.rex.W << 3 | (reg >> 3) << 2 | rm >> 3;
	if (simd)
		kl_e8(e, simd);
	if (rex)
		kl_e8(e, 0x40 | rex);
	kl_e8(e, 0x0f);
	if (in->opcode_map == ZYDIS_OPCODE_MAP_0F38)
		kl_e8(e, 0x38);
	else if (in->opcode_map == ZYDIS_OPCODE_MAP_0F3A)
		kl_e8(e, 0x3a);
	kl_e8(e, in->opcode);
	if (mem)
		kl_e_modrm_mem(e, reg, KL_T_PTR);
	else
		kl_e8(e, 0xc0 | (reg & 7) << 3 | (rm & 7));
	if (in->raw.imm[0].size)
		kl_e8(e, (uint8_t)in->raw.imm[0].value.u);
}

/* The ModRM field's operand, or NULL. */
static const ZydisDecodedOperand *field(const struct kl_t_op *o, ZydisOperandEncoding e)
{
	for (unsigned i = 0; i < o->d.in.operand_count_visible; i++)
		if (o->d.opnd[i].encoding == e)
			return &o->d.opnd[i];
	return NULL;
}

static bool fits(const ZydisDecodedOperand *x)
{
	return is_xmm(x) || kl_is_gpr(x) || x->type == ZYDIS_OPERAND_TYPE_MEMORY;
}

static void ready(struct kl_translation *t)
{
	struct kl_emit *e = &t->e;
	uint8_t *lent;

	if (t->lent)
		return;
	t->lent = true;
	kl_t_flags_clobber(t);
	kl_e_rm(e, 0x80, 0, 7, KL_AT(H_CTX, KL_CTX(mxcsr_lent)));
	kl_e8(e, 0);
	lent = kl_e_jcc(e, 5);
	kl_e_imm(e, H_S0, (uint64_t)(uintptr_t)t->at->own);
	kl_e_call(e, t->x->lend);
	kl_e_bind(e, lent);
}

/* A register operand's number in the host. */
static unsigned use(struct kl_translation *t, const ZydisDecodedOperand *x, unsigned scratch)
{
	unsigned n = kl_register_number(x);

	if (!is_xmm(x))
		return kl_t_use(t, n, scratch);
	if (!(t->xmm >> n & 1))
		kl_t_xmm_load(t, 1u << n);
	t->xmm |= 1u << n;
	return n;
}

static void changed(struct kl_translation *t, const ZydisDecodedOperand *x, unsigned reg)
{
	if (x->type != ZYDIS_OPERAND_TYPE_REGISTER ||
	    !(x->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE))
		return;
	if (is_xmm(x))
		t->xmm_dirty |= 1u << reg;
	else
		kl_t_put(t, kl_register_number(x), reg);
}

bool kl_lower_sse(struct kl_translation *t, struct kl_t_op *o)
{
	const ZydisDecodedInstruction *in = &o->d.in;
	const ZydisDecodedOperand *reg, *rm;
	unsigned size, r, m = H_NONE;
	bool mem, store;
	enum kind kind;

	if (in->encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY ||
	    (in->opcode_map != ZYDIS_OPCODE_MAP_0F && in->opcode_map != ZYDIS_OPCODE_MAP_0F38 &&
	     in->opcode_map != ZYDIS_OPCODE_MAP_0F3A) ||
	    (o->op.flags & KL_OPF_LOCK) || in->operand_count_visible < 2 ||
	    in->operand_count_visible > 3 || has_hidden(&o->d))
		return false;
	reg = field(o, ZYDIS_OPERAND_ENCODING_MODRM_REG);
	rm = field(o, ZYDIS_OPERAND_ENCODING_MODRM_RM);
	if (!reg || !rm || !fits(reg) || !fits(rm) || (!is_xmm(reg) && !is_xmm(rm)))
		return false;
	if (in->operand_count_visible == 3 && o->d.opnd[2].type != ZYDIS_OPERAND_TYPE_IMMEDIATE)
		return false;
	kind = kind_of(o);
	mem = rm->type == ZYDIS_OPERAND_TYPE_MEMORY;
	size = rm->size / 8;
	store = mem && (rm->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE);
	if (kind == NONE || (mem && (!kl_t_can_address(t, o) || size > 16)))
		return false;
	ready(t);
	if (mem) {
		kl_t_access(t, o, size, store);
		if (size == 16 && kind != PLAIN) {
			kl_e_rr(&t->e, 0xf7, 1, 0, H_S1); /* test r14b, 15 */
			kl_e8(&t->e, 15);
			kl_t_slow_if(t, 5);
		}
	} else {
		m = use(t, rm, H_S1);
	}
	r = use(t, reg, H_S0);
	if (mem)
		kl_t_point(t);
	encode(t, o, r, mem, m);
	changed(t, reg, r);
	if (!mem)
		changed(t, rm, m);
	if (kind == SETS_FLAGS)
		kl_t_flags_set(t);
	return true;
}
