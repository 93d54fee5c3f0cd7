/* SPDX-License-Identifier: MIT */
/*
 * Fast handlers: ADD OR ADC SBB AND SUB XOR CMP TEST, INC DEC NEG NOT, shifts and rotates of
 * registers, IMUL. The flags are the host's, as in ops_alu.c.
 */
#include "x86/fast.h"

#define WIDE(X, ...) X(32, "l", __VA_ARGS__) X(64, "q", __VA_ARGS__)
#define ALL(X, ...)  X(8, "b", __VA_ARGS__) WIDE(X, __VA_ARGS__)

#define HANDLER(name) static const struct kl_op *name(struct kl_vcpu *v, const struct kl_op *op)

#define FLAGS_(v, ax)    ((v)->flags_now = (uint16_t)(ax))
#define FLAGS__nf(v, ax) ((void)(ax))

/* ---- two operands ---------------------------------------------------------------------- */

/* @fl: the flags before, packed. */
#define COMPUTE(bits, sfx, name, pre, insn, expr)                                                 \
	KL_INLINE uint##bits##_t name##bits(uint##bits##_t d, uint##bits##_t s, uint32_t fl,      \
					    uint32_t *ax)                                         \
	{                                                                                         \
		__asm__(pre insn sfx " %2, %0" KL_FLAGS_OUT                                       \
			: "+r"(d), "=&a"(*ax)                                                     \
			: "r"(s), "r"(fl)                                                         \
			: "cc");                                                                  \
		return d;                                                                         \
	}                                                                                         \
	KL_INLINE uint##bits##_t name##bits##_nf(uint##bits##_t d, uint##bits##_t s, uint32_t fl, \
						 uint32_t *ax)                                    \
	{                                                                                         \
		*ax = 0;                                                                          \
		return (uint##bits##_t)(expr);                                                    \
	}
#define CARRY_IN "btl $8, %3\n\t"
#define CARRY    (fl >> 8 & 1)
ALL(COMPUTE, add, "", "add", d + s)
ALL(COMPUTE, or, "", "or", d | s)
WIDE(COMPUTE, adc, CARRY_IN, "adc", d + s + CARRY)
WIDE(COMPUTE, sbb, CARRY_IN, "sbb", d - s - CARRY)
ALL(COMPUTE, and, "", "and", d &s)
ALL(COMPUTE, sub, "", "sub", d - s)
ALL(COMPUTE, xor, "", "xor", d ^ s)
ALL(COMPUTE, cmp, "", "cmp", d)
ALL(COMPUTE, test, "", "test", d)

/* wb: 0 for CMP and TEST. */
#define REG_FORM(bits, name, nf, wb, form, src)                                              \
	HANDLER(name##bits##nf##_##form)                                                     \
	{                                                                                    \
		uint32_t ax;                                                                 \
		uint##bits##_t r = name##bits##nf(KL_FAST_REG(v, op->reg, bits),             \
						  (uint##bits##_t)(src), v->flags_now, &ax); \
                                                                                             \
		if (wb)                                                                      \
			KL_FAST_SET_##bits(v, op->reg, r);                                   \
		FLAGS_##nf(v, ax);                                                           \
		KL_NEXT_OP(v, op + 1);                                                       \
	}
#define LOAD_FORM(bits, name, nf, wb, at)                                                \
	HANDLER(name##bits##nf##_rm_##at)                                                \
	{                                                                                \
		void *p = kl_fast_read(v, op, KL_FAST_LIN_##at(v, op), bits / 8);        \
		uint##bits##_t r;                                                        \
		uint32_t ax;                                                             \
                                                                                         \
		if (KL_UNLIKELY(!p))                                                     \
			return kl_fast_call(v, op);                                      \
		r = kl_load##bits(p);                                                    \
		r = name##bits##nf(KL_FAST_REG(v, op->reg, bits), r, v->flags_now, &ax); \
		if (wb)                                                                  \
			KL_FAST_SET_##bits(v, op->reg, r);                               \
		FLAGS_##nf(v, ax);                                                       \
		KL_NEXT_OP(v, op + 1);                                                   \
	}
/* The store is the last thing that can fail. */
#define STORE_FORM(bits, name, form, src, at)                                    \
	HANDLER(name##bits##_##form##_##at)                                      \
	{                                                                        \
		void *p = kl_fast_rmw(v, op, KL_FAST_LIN_##at(v, op), bits / 8); \
		uint##bits##_t r;                                                \
		uint32_t ax;                                                     \
                                                                                 \
		if (KL_UNLIKELY(!p))                                             \
			return kl_fast_call(v, op);                              \
		r = kl_load##bits(p);                                            \
		r = name##bits(r, (uint##bits##_t)(src), v->flags_now, &ax);     \
		kl_store##bits(p, r);                                            \
		v->flags_now = (uint16_t)ax;                                     \
		return kl_fast_stored(v, op, p);                                 \
	}
#define COMPARE_FORM(bits, name, form, src, at)                                   \
	HANDLER(name##bits##_##form##_##at)                                       \
	{                                                                         \
		void *p = kl_fast_read(v, op, KL_FAST_LIN_##at(v, op), bits / 8); \
		uint##bits##_t r;                                                 \
		uint32_t ax;                                                      \
                                                                                  \
		if (KL_UNLIKELY(!p))                                              \
			return kl_fast_call(v, op);                               \
		r = kl_load##bits(p);                                             \
		name##bits(r, (uint##bits##_t)(src), v->flags_now, &ax);          \
		v->flags_now = (uint16_t)ax;                                      \
		KL_NEXT_OP(v, op + 1);                                            \
	}
#define REG_FORMS(bits, name, nf, wb)                                  \
	REG_FORM(bits, name, nf, wb, rr, KL_FAST_REG(v, op->rm, bits)) \
	REG_FORM(bits, name, nf, wb, ri, op->imm)                      \
	LOAD_FORM(bits, name, nf, wb, b) LOAD_FORM(bits, name, nf, wb, x)
#define MEM_FORMS(bits, name, FORM)                            \
	FORM(bits, name, mr, KL_FAST_REG(v, op->reg, bits), b) \
	FORM(bits, name, mr, KL_FAST_REG(v, op->reg, bits), x) \
	FORM(bits, name, mi, op->imm, b) FORM(bits, name, mi, op->imm, x)
#define BINARY(bits, sfx, name, wb, FORM) \
	REG_FORMS(bits, name, , wb) REG_FORMS(bits, name, _nf, wb) MEM_FORMS(bits, name, FORM)
ALL(BINARY, add, 1, STORE_FORM)
ALL(BINARY, or, 1, STORE_FORM)
WIDE(BINARY, adc, 1, STORE_FORM)
WIDE(BINARY, sbb, 1, STORE_FORM)
ALL(BINARY, and, 1, STORE_FORM)
ALL(BINARY, sub, 1, STORE_FORM)
ALL(BINARY, xor, 1, STORE_FORM)
ALL(BINARY, cmp, 0, COMPARE_FORM)
ALL(BINARY, test, 0, COMPARE_FORM)

struct binary {
	kl_run_fn *rr[2], *ri[2], *rm[2][2], *mr[2], *mi[2]; /* without flags; address form */
};
#define ROW(n)                                                                                    \
	{                                                                                         \
		{n##_rr, n##_nf_rr}, {n##_ri, n##_nf_ri},                                         \
			{{n##_rm_b, n##_rm_x}, {n##_nf_rm_b, n##_nf_rm_x}}, {n##_mr_b, n##_mr_x}, \
			{n##_mi_b, n##_mi_x},                                                     \
	}
#define ROWS(name)                                             \
	{                                                      \
		ROW(name##8), {}, ROW(name##32), ROW(name##64) \
	}
#define ROWS2(name)                                  \
	{                                            \
		{}, {}, ROW(name##32), ROW(name##64) \
	}
static const struct binary binary[9][4] = {
	ROWS(add), ROWS(or),  ROWS2(adc), ROWS2(sbb), ROWS(and),
	ROWS(sub), ROWS(xor), ROWS(cmp),  ROWS(test),
};

static kl_run_fn *select_binary(const struct kl_decode *d, unsigned n, kl_run_fn **noflags)
{
	const struct binary *row = &binary[n][d->size2];

	switch (d->form) {
	case KL_FORM_RR:
		*noflags = row->rr[1];
		return row->rr[0];
	case KL_FORM_RI:
		*noflags = row->ri[1];
		return row->ri[0];
	case KL_FORM_RM:
		*noflags = kl_fast_pick(d->op, row->rm[1]);
		return kl_fast_pick(d->op, row->rm[0]);
	case KL_FORM_MR:
		return kl_fast_pick(d->op, row->mr);
	case KL_FORM_MI:
		return kl_fast_pick(d->op, row->mi);
	default:
		return NULL;
	}
}

/* ---- one operand ------------------------------------------------------------------------ */

#define UNARY(bits, sfx, name, pre, insn)                         \
	HANDLER(name##bits##_r)                                   \
	{                                                         \
		uint##bits##_t d = KL_FAST_REG(v, op->reg, bits); \
		uint32_t ax;                                      \
                                                                  \
		__asm__(pre insn sfx " %0" KL_FLAGS_OUT           \
			: "+r"(d), "=&a"(ax)                      \
			: "r"((uint32_t)v->flags_now)             \
			: "cc");                                  \
		KL_FAST_SET_##bits(v, op->reg, d);                \
		v->flags_now = (uint16_t)ax;                      \
		KL_NEXT_OP(v, op + 1);                            \
	}
#define UNARY_NF(bits, sfx, name, expr)                           \
	HANDLER(name##bits##_nf_r)                                \
	{                                                         \
		uint##bits##_t d = KL_FAST_REG(v, op->reg, bits); \
                                                                  \
		KL_FAST_SET_##bits(v, op->reg, expr);             \
		KL_NEXT_OP(v, op + 1);                            \
	}
#define CARRY_KEPT "btl $8, %2\n\t"
WIDE(UNARY, inc, CARRY_KEPT, "inc")
WIDE(UNARY, dec, CARRY_KEPT, "dec")
WIDE(UNARY, neg, "", "neg")
WIDE(UNARY_NF, inc, d + 1)
WIDE(UNARY_NF, dec, d - 1)
WIDE(UNARY_NF, neg, -d)
WIDE(UNARY_NF, not, ~d)
/* [operation][64 bits][without flags] */
static kl_run_fn *const unary[4][2][2] = {
	{{inc32_r, inc32_nf_r}, {inc64_r, inc64_nf_r}},
	{{dec32_r, dec32_nf_r}, {dec64_r, dec64_nf_r}},
	{{neg32_r, neg32_nf_r}, {neg64_r, neg64_nf_r}},
	{{not32_nf_r, not32_nf_r}, {not64_nf_r, not64_nf_r}},
};

static kl_run_fn *select_unary(const struct kl_decode *d, unsigned n, kl_run_fn **noflags)
{
	if (d->form != KL_FORM_R || d->size2 < 2)
		return NULL;
	*noflags = unary[n][d->size2 - 2][1];
	return unary[n][d->size2 - 2][0];
}

/* ---- shifts ------------------------------------------------------------------------------- */

/* All flags go in: a count of 0 keeps them, rotates keep some. */
#define SHIFT(bits, sfx, name, form, insn, count, of)                         \
	HANDLER(name##bits##_##form)                                          \
	{                                                                     \
		uint##bits##_t d = KL_FAST_REG(v, op->reg, bits);             \
		uint32_t ax = v->flags_now;                                   \
                                                                              \
		__asm__(KL_FLAGS_IN##of insn sfx " %%cl, %0" KL_FLAGS_OUT##of \
			: "+r"(d), "+a"(ax)                                   \
			: "c"((uint8_t)(count))                               \
			: "cc");                                              \
		KL_FAST_SET_##bits(v, op->reg, d);                            \
		v->flags_now = (uint16_t)ax;                                  \
		KL_NEXT_OP(v, op + 1);                                        \
	}
#define SHIFT_NF(bits, sfx, name, type, operator)                                         \
	HANDLER(name##bits##_nf_ri)                                                       \
	{                                                                                 \
		type##bits##_t d = (type##bits##_t)KL_FAST_REG(v, op->reg, bits);         \
                                                                                          \
		KL_FAST_SET_##bits(v, op->reg, d operator((uint8_t)op->imm &(bits - 1))); \
		KL_NEXT_OP(v, op + 1);                                                    \
	}
#define SHIFTS(name, insn)                     \
	WIDE(SHIFT, name, ri, insn, op->imm, ) \
	WIDE(SHIFT, name, rc, insn, v->gpr[KL_RCX], )
#define ROTATES(name, insn) \
	SHIFTS(name, insn)  \
	WIDE(SHIFT, name##_of_kept, ri, insn, op->imm, _OF_KEPT)
ROTATES(rol, "rol")
ROTATES(ror, "ror")
SHIFTS(shl, "shl")
SHIFTS(shr, "shr")
SHIFTS(sar, "sar")
WIDE(SHIFT_NF, shl, uint, <<)
WIDE(SHIFT_NF, shr, uint, >>)
WIDE(SHIFT_NF, sar, int, >>)
#define SHIFT_ROW(n, nf)                                 \
	{                                                \
		{n##32_ri, n##32_rc, nf##32_nf_ri},      \
		{                                        \
			n##64_ri, n##64_rc, nf##64_nf_ri \
		}                                        \
	}
#define ROTATE_ROW(n)                            \
	{                                        \
		{n##32_ri, n##32_rc, NULL},      \
		{                                \
			n##64_ri, n##64_rc, NULL \
		}                                \
	}
/* [operation][64 bits][by imm, by CL, by imm without flags] */
static kl_run_fn *const shift[5][2][3] = {
	ROTATE_ROW(rol),     ROTATE_ROW(ror),     SHIFT_ROW(shl, shl),
	SHIFT_ROW(shr, shr), SHIFT_ROW(sar, sar),
};

static kl_run_fn *const rotate_of_kept[2][2] = {
	{rol_of_kept32_ri, rol_of_kept64_ri},
	{ror_of_kept32_ri, ror_of_kept64_ri},
};

static kl_run_fn *select_shift(const struct kl_decode *d, unsigned n, kl_run_fn **noflags)
{
	bool cl = d->opnd[1].type == ZYDIS_OPERAND_TYPE_REGISTER;

	if (d->opnd[0].type != ZYDIS_OPERAND_TYPE_REGISTER || d->size2 < 2)
		return NULL;
	if (n < 2 && !cl && kl_rotate_keeps_of(d))
		return rotate_of_kept[n][d->size2 - 2];
	*noflags = cl ? NULL : shift[n][d->size2 - 2][2];
	return shift[n][d->size2 - 2][cl];
}

/* ---- IMUL --------------------------------------------------------------------------------- */

#define IMUL(bits, sfx, form, a, b)                                                        \
	HANDLER(imul##bits##_##form)                                                       \
	{                                                                                  \
		uint##bits##_t d = (uint##bits##_t)(a);                                    \
		uint32_t ax = v->flags_now;                                                \
                                                                                           \
		__asm__(KL_FLAGS_IN "imul" sfx " %2, %0" KL_FLAGS_OUT                      \
			: "+r"(d), "+a"(ax)                                                \
			: "r"((uint##bits##_t)(b))                                         \
			: "cc");                                                           \
		KL_FAST_SET_##bits(v, op->reg, d);                                         \
		v->flags_now = (uint16_t)ax;                                               \
		KL_NEXT_OP(v, op + 1);                                                     \
	}                                                                                  \
	HANDLER(imul##bits##_nf_##form)                                                    \
	{                                                                                  \
		KL_FAST_SET_##bits(v, op->reg, (uint##bits##_t)(a) * (uint##bits##_t)(b)); \
		KL_NEXT_OP(v, op + 1);                                                     \
	}
WIDE(IMUL, rr, KL_FAST_REG(v, op->reg, 64), KL_FAST_REG(v, op->rm, 64))
WIDE(IMUL, rri, KL_FAST_REG(v, op->rm, 64), op->imm)
/* [three operands][64 bits][without flags] */
static kl_run_fn *const imul[2][2][2] = {
	{{imul32_rr, imul32_nf_rr}, {imul64_rr, imul64_nf_rr}},
	{{imul32_rri, imul32_nf_rri}, {imul64_rri, imul64_nf_rri}},
};

static kl_run_fn *select_imul(const struct kl_decode *d, kl_run_fn **noflags)
{
	bool three = d->in.operand_count_visible == 3;

	if (d->in.operand_count_visible < 2 || (d->op->flags & KL_OPF_MEM) || d->size2 < 2)
		return NULL;
	*noflags = imul[three][d->size2 - 2][1];
	return imul[three][d->size2 - 2][0];
}

kl_run_fn *kl_fast_select_alu(const struct kl_decode *d, kl_run_fn **noflags)
{
	switch (d->in.mnemonic) {
	case ZYDIS_MNEMONIC_ADD:
		return select_binary(d, 0, noflags);
	case ZYDIS_MNEMONIC_OR:
		return select_binary(d, 1, noflags);
	case ZYDIS_MNEMONIC_ADC:
		return select_binary(d, 2, noflags);
	case ZYDIS_MNEMONIC_SBB:
		return select_binary(d, 3, noflags);
	case ZYDIS_MNEMONIC_AND:
		return select_binary(d, 4, noflags);
	case ZYDIS_MNEMONIC_SUB:
		return select_binary(d, 5, noflags);
	case ZYDIS_MNEMONIC_XOR:
		return select_binary(d, 6, noflags);
	case ZYDIS_MNEMONIC_CMP:
		return select_binary(d, 7, noflags);
	case ZYDIS_MNEMONIC_TEST:
		return select_binary(d, 8, noflags);
	case ZYDIS_MNEMONIC_INC:
		return select_unary(d, 0, noflags);
	case ZYDIS_MNEMONIC_DEC:
		return select_unary(d, 1, noflags);
	case ZYDIS_MNEMONIC_NEG:
		return select_unary(d, 2, noflags);
	case ZYDIS_MNEMONIC_NOT:
		return select_unary(d, 3, noflags);
	case ZYDIS_MNEMONIC_ROL:
		return select_shift(d, 0, noflags);
	case ZYDIS_MNEMONIC_ROR:
		return select_shift(d, 1, noflags);
	case ZYDIS_MNEMONIC_SHL:
		return select_shift(d, 2, noflags);
	case ZYDIS_MNEMONIC_SHR:
		return select_shift(d, 3, noflags);
	case ZYDIS_MNEMONIC_SAR:
		return select_shift(d, 4, noflags);
	case ZYDIS_MNEMONIC_IMUL:
		return select_imul(d, noflags);
	default:
		return NULL;
	}
}
