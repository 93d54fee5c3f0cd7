/* SPDX-License-Identifier: MIT */
/*
 * ADD OR ADC SBB AND SUB XOR CMP TEST, INC DEC NEG NOT, with LOCK. fast_alu.c has the usual forms,
 * also without flags.
 */
#include "x86/decode.h"
#include "x86/ops.h"

#define SIZES(X, ...)          \
	X(8, "b", __VA_ARGS__) \
	X(16, "w", __VA_ARGS__) X(32, "l", __VA_ARGS__) X(64, "q", __VA_ARGS__)

/* ---- two operands ------------------------------------------------------------------ */

/* What computes: the host instruction. */
#define BINARY(bits, sfx, name, pre, insn)                                                   \
	KL_INLINE uint##bits##_t name##bits(uint##bits##_t d, uint##bits##_t s, uint64_t fl, \
					    uint32_t *ax)                                    \
	{                                                                                    \
		__asm__(pre insn sfx " %2, %0" KL_FLAGS_OUT                                  \
			: "+r"(d), "=&a"(*ax)                                                \
			: "r"(s), "r"((uint32_t)fl)                                          \
			: "cc");                                                             \
		return d;                                                                    \
	}
#define CARRY_IN "btl $0, %3\n\t"
SIZES(BINARY, add, "", "add")
SIZES(BINARY, or, "", "or")
SIZES(BINARY, adc, CARRY_IN, "adc")
SIZES(BINARY, sbb, CARRY_IN, "sbb")
SIZES(BINARY, and, "", "and")
SIZES(BINARY, sub, "", "sub")
SIZES(BINARY, xor, "", "xor")
SIZES(BINARY, cmp, "", "cmp")
SIZES(BINARY, test, "", "test")

#define FLAGS_(v, ax)    kl_flags_put(v, ax)
#define FLAGS__nf(v, ax) ((void)(ax))

/* Handlers of one operation in one size, suffix nf = "" or _nf; wb: 0 for CMP and TEST. */
#define BINARY_FORMS(bits, sfx, name, nf, wb)                                                     \
	static enum kl_next name##bits##nf##_rr(struct kl_vcpu *v, const struct kl_op *op)        \
	{                                                                                         \
		uint32_t ax;                                                                      \
		uint##bits##_t r =                                                                \
			name##bits##nf(*(uint##bits##_t *)kl_gpr(v, op->reg),                     \
				       *(uint##bits##_t *)kl_gpr(v, op->rm), v->rflags, &ax);     \
		if (wb)                                                                           \
			kl_gpr_set(v, op->reg, r, bits / 8);                                      \
		FLAGS_##nf(v, ax);                                                                \
		return KL_NEXT;                                                                   \
	}                                                                                         \
	static enum kl_next name##bits##nf##_ri(struct kl_vcpu *v, const struct kl_op *op)        \
	{                                                                                         \
		uint32_t ax;                                                                      \
		uint##bits##_t r = name##bits##nf(*(uint##bits##_t *)kl_gpr(v, op->reg),          \
						  (uint##bits##_t)op->imm, v->rflags, &ax);       \
		if (wb)                                                                           \
			kl_gpr_set(v, op->reg, r, bits / 8);                                      \
		FLAGS_##nf(v, ax);                                                                \
		return KL_NEXT;                                                                   \
	}                                                                                         \
	static enum kl_next name##bits##nf##_rm(struct kl_vcpu *v, const struct kl_op *op)        \
	{                                                                                         \
		uint32_t ax;                                                                      \
		uint##bits##_t s = (uint##bits##_t)kl_mem_read(v, op, bits / 8);                  \
		uint##bits##_t r =                                                                \
			name##bits##nf(*(uint##bits##_t *)kl_gpr(v, op->reg), s, v->rflags, &ax); \
		if (wb)                                                                           \
			kl_gpr_set(v, op->reg, r, bits / 8);                                      \
		FLAGS_##nf(v, ax);                                                                \
		return KL_NEXT;                                                                   \
	}                                                                                         \
	KL_INLINE enum kl_next name##bits##nf##_mem(struct kl_vcpu *v, const struct kl_op *op,    \
						    uint##bits##_t s)                             \
	{                                                                                         \
		uint32_t ax;                                                                      \
		struct kl_rmw m;                                                                  \
		uint##bits##_t d, r;                                                              \
                                                                                                  \
		d = (uint##bits##_t)(wb ? kl_rmw_begin(v, op, bits / 8, &m)                       \
					: kl_mem_read(v, op, bits / 8));                          \
		r = name##bits##nf(d, s, v->rflags, &ax);                                         \
		if (wb)                                                                           \
			kl_rmw_end(v, &m, r, bits / 8);                                           \
		FLAGS_##nf(v, ax);                                                                \
		return KL_NEXT;                                                                   \
	}                                                                                         \
	static enum kl_next name##bits##nf##_mr(struct kl_vcpu *v, const struct kl_op *op)        \
	{                                                                                         \
		return name##bits##nf##_mem(v, op, *(uint##bits##_t *)kl_gpr(v, op->reg));        \
	}                                                                                         \
	static enum kl_next name##bits##nf##_mi(struct kl_vcpu *v, const struct kl_op *op)        \
	{                                                                                         \
		return name##bits##nf##_mem(v, op, (uint##bits##_t)op->imm);                      \
	}

#define BINARY_SIZES(name, wb) SIZES(BINARY_FORMS, name, , wb)
BINARY_SIZES(add, 1)
BINARY_SIZES(or, 1)
BINARY_SIZES(adc, 1)
BINARY_SIZES(sbb, 1)
BINARY_SIZES(and, 1)
BINARY_SIZES(sub, 1)
BINARY_SIZES(xor, 1)
BINARY_SIZES(cmp, 0)
BINARY_SIZES(test, 0)

/* LOCK: the host's own atomic; flags always. */
#define LOCKED(bits, sfx, name, pre, insn)                                                    \
	KL_INLINE enum kl_next name##bits##_locked(struct kl_vcpu *v, const struct kl_op *op, \
						   uint##bits##_t s)                          \
	{                                                                                     \
		uint64_t lin = kl_mem_lin(v, op, bits / 8, true);                             \
		void *p = kl_mem_rmw(v, lin, bits / 8);                                       \
		uint32_t ax;                                                                  \
                                                                                              \
		if (!p)                                                                       \
			return name##bits##_mem(v, op, s);                                    \
		__asm__ volatile(pre "1: lock " insn sfx " %2, %0" KL_FLAGS_OUT               \
				     "\n\t" KL_OP_EXTABLE("1b")                               \
				 : "+m"(*(uint##bits##_t *)p), "=&a"(ax)                      \
				 : "r"(s), "r"((uint32_t)v->rflags)                           \
				 : "cc", "memory");                                           \
		kl_note_store(v, p);                                                          \
		kl_flags_put(v, ax);                                                          \
		return KL_NEXT;                                                               \
	}                                                                                     \
	static enum kl_next name##bits##_lock_mr(struct kl_vcpu *v, const struct kl_op *op)   \
	{                                                                                     \
		return name##bits##_locked(v, op, *(uint##bits##_t *)kl_gpr(v, op->reg));     \
	}                                                                                     \
	static enum kl_next name##bits##_lock_mi(struct kl_vcpu *v, const struct kl_op *op)   \
	{                                                                                     \
		return name##bits##_locked(v, op, (uint##bits##_t)op->imm);                   \
	}
SIZES(LOCKED, add, "", "add")
SIZES(LOCKED, or, "", "or")
SIZES(LOCKED, adc, CARRY_IN, "adc")
SIZES(LOCKED, sbb, CARRY_IN, "sbb")
SIZES(LOCKED, and, "", "and")
SIZES(LOCKED, sub, "", "sub")
SIZES(LOCKED, xor, "", "xor")

/* ---- one operand ------------------------------------------------------------------- */

#define UNARY(bits, sfx, name, insn, expr)                                                      \
	KL_INLINE uint##bits##_t name##bits(uint##bits##_t d, uint32_t *ax)                     \
	{                                                                                       \
		__asm__(KL_FLAGS_IN insn sfx " %0" KL_FLAGS_OUT : "+r"(d), "+a"(*ax) : : "cc"); \
		return d;                                                                       \
	}                                                                                       \
	KL_INLINE uint##bits##_t name##bits##_nf(uint##bits##_t d, uint32_t *ax)                \
	{                                                                                       \
		return (uint##bits##_t)(expr);                                                  \
	}
SIZES(UNARY, inc, "inc", d + 1)
SIZES(UNARY, dec, "dec", d - 1)
SIZES(UNARY, neg, "neg", -d)
SIZES(UNARY, not, "not", ~d)

#define UNARY_FORMS(bits, sfx, name, nf)                                                       \
	static enum kl_next name##bits##nf##_r(struct kl_vcpu *v, const struct kl_op *op)      \
	{                                                                                      \
		uint32_t ax = kl_flags_pack(v);                                                \
		uint##bits##_t r = name##bits##nf(*(uint##bits##_t *)kl_gpr(v, op->reg), &ax); \
                                                                                               \
		kl_gpr_set(v, op->reg, r, bits / 8);                                           \
		FLAGS_##nf(v, ax);                                                             \
		return KL_NEXT;                                                                \
	}                                                                                      \
	static enum kl_next name##bits##nf##_m(struct kl_vcpu *v, const struct kl_op *op)      \
	{                                                                                      \
		struct kl_rmw m;                                                               \
		uint##bits##_t d = (uint##bits##_t)kl_rmw_begin(v, op, bits / 8, &m);          \
		uint32_t ax = kl_flags_pack(v);                                                \
                                                                                               \
		kl_rmw_end(v, &m, name##bits##nf(d, &ax), bits / 8);                           \
		FLAGS_##nf(v, ax);                                                             \
		return KL_NEXT;                                                                \
	}
#define UNARY_LOCKED(bits, sfx, name, insn)                                                \
	static enum kl_next name##bits##_lock_m(struct kl_vcpu *v, const struct kl_op *op) \
	{                                                                                  \
		void *p = kl_mem_rmw(v, kl_mem_lin(v, op, bits / 8, true), bits / 8);      \
		uint32_t ax = kl_flags_pack(v);                                            \
                                                                                           \
		if (!p)                                                                    \
			return name##bits##_m(v, op);                                      \
		__asm__ volatile(KL_FLAGS_IN "1: lock " insn sfx " %0" KL_FLAGS_OUT        \
					     "\n\t" KL_OP_EXTABLE("1b")                    \
				 : "+m"(*(uint##bits##_t *)p), "+a"(ax)                    \
				 :                                                         \
				 : "cc", "memory");                                        \
		kl_note_store(v, p);                                                       \
		kl_flags_put(v, ax);                                                       \
		return KL_NEXT;                                                            \
	}
#define UNARY_ALL(name, insn)         \
	SIZES(UNARY_FORMS, name, )    \
	SIZES(UNARY_FORMS, name, _nf) \
	SIZES(UNARY_LOCKED, name, insn)
UNARY_ALL(inc, "inc")
UNARY_ALL(dec, "dec")
UNARY_ALL(neg, "neg")
UNARY_ALL(not, "not")

/* ---- selection --------------------------------------------------------------------- */

#define FORMS5(n)                                      \
	{                                              \
		n##_rr, n##_rm, n##_mr, n##_ri, n##_mi \
	}
#define BY_SIZE(F, name, nf)                                                      \
	{                                                                         \
		F(name##8##nf), F(name##16##nf), F(name##32##nf), F(name##64##nf) \
	}
#define ALL5(name) BY_SIZE(FORMS5, name, )

/* [operation][size][form - RR] */
static kl_op_fn *const binary[9][4][5] = {
	ALL5(add), ALL5(or),  ALL5(adc), ALL5(sbb),  ALL5(and),
	ALL5(sub), ALL5(xor), ALL5(cmp), ALL5(test),
};

#define LOCK2(n)                         \
	{                                \
		n##_lock_mr, n##_lock_mi \
	}
static kl_op_fn *const locked[7][4][2] = {
	BY_SIZE(LOCK2, add, ), BY_SIZE(LOCK2, or, ),  BY_SIZE(LOCK2, adc, ), BY_SIZE(LOCK2, sbb, ),
	BY_SIZE(LOCK2, and, ), BY_SIZE(LOCK2, sub, ), BY_SIZE(LOCK2, xor, ),
};

#define FORMS2(n)            \
	{                    \
		n##_r, n##_m \
	}
#define BOTH2(name)                                                 \
	{                                                           \
		BY_SIZE(FORMS2, name, ), BY_SIZE(FORMS2, name, _nf) \
	}
static kl_op_fn *const unary[4][2][4][2] = {BOTH2(inc), BOTH2(dec), BOTH2(neg), BOTH2(not )};

#define LOCK1(n) n##_lock_m
static kl_op_fn *const unary_locked[4][4] = {
	BY_SIZE(LOCK1, inc, ),
	BY_SIZE(LOCK1, dec, ),
	BY_SIZE(LOCK1, neg, ),
	BY_SIZE(LOCK1, not, ),
};

static bool select_binary(struct kl_decode *d, unsigned n, bool carry)
{
	bool lock = d->op->flags & KL_OPF_LOCK;

	if (d->form < KL_FORM_RR || d->form > KL_FORM_MI)
		return false;
	d->simple = true;
	d->reads_flags = carry;
	d->writes_flags = true;
	d->stores = n < 7 && (d->form == KL_FORM_MR || d->form == KL_FORM_MI);
	if (lock) {
		if (n >= 7 || !d->stores)
			return false;
		d->op->fn = locked[n][d->size2][d->form == KL_FORM_MI];
		return true;
	}
	d->op->fn = binary[n][d->size2][d->form - KL_FORM_RR];
	/* XOR r,r and SUB r,r need no special case; TEST has no RM form but is symmetric. */
	return true;
}

static bool select_unary(struct kl_decode *d, unsigned n)
{
	if (d->form != KL_FORM_R && d->form != KL_FORM_M)
		return false;
	d->simple = true;
	d->reads_flags = n != 2; /* NEG writes all; the others leave some */
	d->writes_flags = n == 2;
	d->stores = d->form == KL_FORM_M;
	if (d->op->flags & KL_OPF_LOCK) {
		if (!d->stores)
			return false;
		d->op->fn = unary_locked[n][d->size2];
		return true;
	}
	d->op->fn = unary[n][n == 3][d->size2][d->stores]; /* NOT has no flags */
	d->noflags = unary[n][1][d->size2][d->stores];
	return true;
}

bool kl_select_alu(struct kl_decode *d)
{
	switch (d->in.mnemonic) {
	case ZYDIS_MNEMONIC_ADD:
		return select_binary(d, 0, false);
	case ZYDIS_MNEMONIC_OR:
		return select_binary(d, 1, false);
	case ZYDIS_MNEMONIC_ADC:
		return select_binary(d, 2, true);
	case ZYDIS_MNEMONIC_SBB:
		return select_binary(d, 3, true);
	case ZYDIS_MNEMONIC_AND:
		return select_binary(d, 4, false);
	case ZYDIS_MNEMONIC_SUB:
		return select_binary(d, 5, false);
	case ZYDIS_MNEMONIC_XOR:
		return select_binary(d, 6, false);
	case ZYDIS_MNEMONIC_CMP:
		return select_binary(d, 7, false);
	case ZYDIS_MNEMONIC_TEST:
		return select_binary(d, 8, false);
	case ZYDIS_MNEMONIC_INC:
		return select_unary(d, 0);
	case ZYDIS_MNEMONIC_DEC:
		return select_unary(d, 1);
	case ZYDIS_MNEMONIC_NEG:
		return select_unary(d, 2);
	case ZYDIS_MNEMONIC_NOT:
		return select_unary(d, 3);
	default:
		return false;
	}
}
