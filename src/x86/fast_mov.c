/* SPDX-License-Identifier: MIT */
/* Fast handlers: MOV MOVZX MOVSX MOVSXD LEA CMOVcc SETcc PUSH POP LEAVE NOP. */
#include "x86/fast.h"

#define HANDLER(name) static const struct kl_op *name(struct kl_vcpu *v, const struct kl_op *op)

/* ---- MOV ------------------------------------------------------------------------------- */

#define SET(bits, form, src)                         \
	HANDLER(mov##bits##_##form)                  \
	{                                            \
		KL_FAST_SET_##bits(v, op->reg, src); \
		KL_NEXT_OP(v, op + 1);               \
	}
#define LOAD(name, bits, mbits, type, at)                                          \
	HANDLER(name##_rm_##at)                                                    \
	{                                                                          \
		void *p = kl_fast_read(v, op, KL_FAST_LIN_##at(v, op), mbits / 8); \
                                                                                   \
		if (KL_UNLIKELY(!p))                                               \
			return kl_fast_call(v, op);                                \
		KL_FAST_SET_##bits(v, op->reg, (type)kl_load##mbits(p));           \
		KL_NEXT_OP(v, op + 1);                                             \
	}
#define STORE(bits, form, src, at)                                                 \
	HANDLER(mov##bits##_##form##_##at)                                         \
	{                                                                          \
		void *p = kl_fast_write(v, op, KL_FAST_LIN_##at(v, op), bits / 8); \
                                                                                   \
		if (KL_UNLIKELY(!p))                                               \
			return kl_fast_call(v, op);                                \
		kl_store##bits(p, (uint##bits##_t)(src));                          \
		return kl_fast_stored(v, op, p);                                   \
	}
#define MOV(bits)                                         \
	SET(bits, rr, KL_FAST_REG(v, op->rm, bits))       \
	SET(bits, ri, op->imm)                            \
	LOAD(mov##bits, bits, bits, uint##bits##_t, b)    \
	LOAD(mov##bits, bits, bits, uint##bits##_t, x)    \
	STORE(bits, mr, KL_FAST_REG(v, op->reg, bits), b) \
	STORE(bits, mr, KL_FAST_REG(v, op->reg, bits), x) \
	STORE(bits, mi, op->imm, b) STORE(bits, mi, op->imm, x)
MOV(8)
MOV(16)
MOV(32)
MOV(64)
struct mov {
	kl_run_fn *rr, *ri, *rm[2], *mr[2], *mi[2];
};
#define MOV_ROW(n)                                                          \
	{                                                                   \
		n##_rr, n##_ri, {n##_rm_b, n##_rm_x}, {n##_mr_b, n##_mr_x}, \
		{                                                           \
			n##_mi_b, n##_mi_x                                  \
		}                                                           \
	}
static const struct mov mov[4] = {MOV_ROW(mov8), MOV_ROW(mov16), MOV_ROW(mov32), MOV_ROW(mov64)};

static kl_run_fn *select_mov(const struct kl_decode *d)
{
	const struct mov *m = &mov[d->size2];

	switch (d->form) {
	case KL_FORM_RR:
		return m->rr;
	case KL_FORM_RI:
		return m->ri;
	case KL_FORM_RM:
		return kl_fast_pick(d->op, m->rm);
	case KL_FORM_MR:
		return kl_fast_pick(d->op, m->mr);
	case KL_FORM_MI:
		return kl_fast_pick(d->op, m->mi);
	default:
		return NULL;
	}
}

/* ---- extensions -------------------------------------------------------------------------- */

#define EXTEND(name, bits, sbits, type)                                              \
	HANDLER(name##_rr)                                                           \
	{                                                                            \
		KL_FAST_SET_##bits(v, op->reg, (type)KL_FAST_REG(v, op->rm, sbits)); \
		KL_NEXT_OP(v, op + 1);                                               \
	}                                                                            \
	LOAD(name, bits, sbits, type, b) LOAD(name, bits, sbits, type, x)
EXTEND(zx32_8, 32, 8, uint8_t)
EXTEND(zx32_16, 32, 16, uint16_t)
EXTEND(sx32_8, 32, 8, int8_t)
EXTEND(sx32_16, 32, 16, int16_t)
EXTEND(sx64_8, 64, 8, int8_t)
EXTEND(sx64_16, 64, 16, int16_t)
EXTEND(sx64_32, 64, 32, int32_t)

struct extend {
	kl_run_fn *rr, *rm[2];
};
#define EXTEND_ROW(n)                      \
	{                                  \
		n##_rr,                    \
		{                          \
			n##_rm_b, n##_rm_x \
		}                          \
	}
/* [signed][64 bits][log2 of the source]; zero extension to 32 bits is one to 64. */
static const struct extend extend[2][2][3] = {
	{{EXTEND_ROW(zx32_8), EXTEND_ROW(zx32_16), {}},
	 {EXTEND_ROW(zx32_8), EXTEND_ROW(zx32_16), {}}},
	{{EXTEND_ROW(sx32_8), EXTEND_ROW(sx32_16), {}},
	 {EXTEND_ROW(sx64_8), EXTEND_ROW(sx64_16), EXTEND_ROW(sx64_32)}},
};

static kl_run_fn *select_extend(const struct kl_decode *d, bool sign)
{
	unsigned src = d->opnd[1].size == 8 ? 0 : d->opnd[1].size == 16 ? 1 : 2;
	const struct extend *e;

	if (d->size2 < 2)
		return NULL;
	e = &extend[sign][d->size2 - 2][src];
	if (!e->rr)
		return NULL;
	return d->form == KL_FORM_RR   ? e->rr
	       : d->form == KL_FORM_RM ? kl_fast_pick(d->op, e->rm)
				       : NULL;
}

/* ---- LEA ----------------------------------------------------------------------------------- */

/* A segment does not count. */
#define LEA_X(v, op) (KL_FAST_LIN_b(v, op) + (KL_FAST_TERM(v, (op)->add_index) << (op)->scale))
#define LEA(bits)                                                     \
	HANDLER(lea##bits##_b)                                        \
	{                                                             \
		KL_FAST_SET_##bits(v, op->reg, KL_FAST_LIN_b(v, op)); \
		KL_NEXT_OP(v, op + 1);                                \
	}                                                             \
	HANDLER(lea##bits##_x)                                        \
	{                                                             \
		KL_FAST_SET_##bits(v, op->reg, LEA_X(v, op));         \
		KL_NEXT_OP(v, op + 1);                                \
	}
LEA(32)
LEA(64)
static kl_run_fn *const lea[2][2] = {{lea32_b, lea32_x}, {lea64_b, lea64_x}};

/* ---- CMOV and SET -------------------------------------------------------------------------- */

/*
 * A condition as a mask of packed flags, with SF != OF in bit 1, and in bit 2 if the condition is
 * to be negated.
 */
#define LESS   2u
#define NEGATE 4u
static uint16_t condition_mask(unsigned cc)
{
	static const uint16_t mask[8] = {
		1,
		KL_FL_CF << 8,
		KL_FL_ZF << 8,
		(KL_FL_CF | KL_FL_ZF) << 8,
		KL_FL_SF << 8,
		KL_FL_PF << 8,
		LESS,
		LESS | KL_FL_ZF << 8,
	};

	return (uint16_t)(mask[cc >> 1] | (cc & 1 ? NEGATE : 0));
}

KL_INLINE bool condition(struct kl_vcpu *v, const struct kl_op *op)
{
	unsigned fl = v->flags_now, mask = (unsigned)op->imm;

	fl = (fl & 0xd501) | ((fl >> 15 ^ fl) & 1) << 1;
	return !!(fl & mask) ^ !!(mask & NEGATE);
}

#define CMOV(bits)                                                                   \
	HANDLER(cmov##bits##_rr)                                                     \
	{                                                                            \
		uint##bits##_t x = condition(v, op) ? KL_FAST_REG(v, op->rm, bits)   \
						    : KL_FAST_REG(v, op->reg, bits); \
                                                                                     \
		KL_FAST_SET_##bits(v, op->reg, x);                                   \
		KL_NEXT_OP(v, op + 1);                                               \
	}
CMOV(32)
CMOV(64)

HANDLER(set8_r)
{
	KL_FAST_REG(v, op->reg, 8) = condition(v, op);
	KL_NEXT_OP(v, op + 1);
}

static kl_run_fn *select_conditional(const struct kl_decode *d)
{
	kl_run_fn *run = NULL;

	if (d->form == KL_FORM_RR && d->size2 >= 2)
		run = d->size2 == 2 ? cmov32_rr : cmov64_rr;
	else if (d->form == KL_FORM_R)
		run = set8_r;
	if (run)
		d->op->imm = condition_mask(d->op->cond);
	return run;
}

/* ---- the stack, in 64-bit code ------------------------------------------------------------- */

KL_INLINE const struct kl_op *push(struct kl_vcpu *v, const struct kl_op *op, uint64_t x)
{
	uint64_t sp = v->gpr[KL_RSP] - 8;
	void *p = kl_fast_write(v, op, sp, 8);

	if (KL_UNLIKELY(!p))
		return kl_fast_call(v, op);
	kl_store64(p, x);
	v->gpr[KL_RSP] = sp;
	return kl_fast_stored(v, op, p);
}

HANDLER(push_r)
{
	return push(v, op, KL_FAST_REG(v, op->reg, 64));
}

HANDLER(push_i)
{
	return push(v, op, op->imm);
}

HANDLER(pop_r)
{
	uint64_t sp = v->gpr[KL_RSP], x;
	void *p = kl_fast_read(v, op, sp, 8);

	if (KL_UNLIKELY(!p))
		return kl_fast_call(v, op);
	x = kl_load64(p);
	v->gpr[KL_RSP] = sp + 8;
	KL_FAST_REG(v, op->reg, 64) = x; /* POP rSP: the value stays */
	KL_NEXT_OP(v, op + 1);
}

HANDLER(leave)
{
	uint64_t sp = v->gpr[KL_RBP];
	void *p = kl_fast_read(v, op, sp, 8);

	if (KL_UNLIKELY(!p))
		return kl_fast_call(v, op);
	v->gpr[KL_RBP] = kl_load64(p);
	v->gpr[KL_RSP] = sp + 8;
	KL_NEXT_OP(v, op + 1);
}

static kl_run_fn *select_stack(const struct kl_decode *d)
{
	if (d->mode != KL_CODE64 || d->op->opsize != 8)
		return NULL;
	switch (d->in.mnemonic) {
	case ZYDIS_MNEMONIC_PUSH:
		return d->form == KL_FORM_R ? push_r : d->form == KL_FORM_I ? push_i : NULL;
	case ZYDIS_MNEMONIC_POP:
		return d->form == KL_FORM_R ? pop_r : NULL;
	default:
		return leave;
	}
}

HANDLER(nop)
{
	KL_NEXT_OP(v, op + 1);
}

kl_run_fn *kl_fast_select_mov(const struct kl_decode *d, kl_run_fn **noflags)
{
	switch (d->in.mnemonic) {
	case ZYDIS_MNEMONIC_MOV:
		return select_mov(d);
	case ZYDIS_MNEMONIC_MOVZX:
		return select_extend(d, false);
	case ZYDIS_MNEMONIC_MOVSX:
	case ZYDIS_MNEMONIC_MOVSXD:
		return select_extend(d, true);
	case ZYDIS_MNEMONIC_LEA:
		return d->size2 < 2 ? NULL : lea[d->size2 - 2][d->op->index != KL_NOREG];
	case ZYDIS_MNEMONIC_PUSH:
	case ZYDIS_MNEMONIC_POP:
	case ZYDIS_MNEMONIC_LEAVE:
		return select_stack(d);
	case ZYDIS_MNEMONIC_NOP:
	case ZYDIS_MNEMONIC_ENDBR64:
		return nop;
#define CC(n, sfx)                     \
	case ZYDIS_MNEMONIC_CMOV##sfx: \
	case ZYDIS_MNEMONIC_SET##sfx:  \
		KL_CONDITIONS(CC)
#undef CC
		return select_conditional(d);
	default:
		return NULL;
	}
}
