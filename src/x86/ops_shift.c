/* SPDX-License-Identifier: MIT */
/*
 * Shifts and rotates: ROL ROR RCL RCR SHL SHR SAR, SHLD SHRD, and BMI2's flagless ones. The
 * count is in CL, an immediate, or 1; the host masks it and leaves the flags alone as the
 * guest's processor would.
 */
#include "host/cpu.h"
#include "x86/decode.h"
#include "x86/ops.h"

#define REG(v, off, bits) (*(uint##bits##_t *)kl_gpr(v, off))
#define SIZES(X, ...)          \
	X(8, "b", __VA_ARGS__) \
	X(16, "w", __VA_ARGS__) X(32, "l", __VA_ARGS__) X(64, "q", __VA_ARGS__)

#define COMPUTE(bits, sfx, name, insn)                                                 \
	KL_INLINE uint##bits##_t name##bits(uint##bits##_t d, uint8_t n, uint32_t *ax) \
	{                                                                              \
		__asm__(KL_FLAGS_IN insn sfx " %%cl, %0" KL_FLAGS_OUT                  \
			: "+r"(d), "+a"(*ax)                                           \
			: "c"(n)                                                       \
			: "cc");                                                       \
		return d;                                                              \
	}
SIZES(COMPUTE, rol, "rol")
SIZES(COMPUTE, ror, "ror")
SIZES(COMPUTE, rcl, "rcl")
SIZES(COMPUTE, rcr, "rcr")
SIZES(COMPUTE, shl, "shl")
SIZES(COMPUTE, shr, "shr")
SIZES(COMPUTE, sar, "sar")

/*
 * Rotates of a register by an immediate count other than 1, whose OF is undefined: Intel's
 * processors keep it.
 */
#define COMPUTE_OF_KEPT(bits, sfx, name, insn)                                         \
	KL_INLINE uint##bits##_t name##bits(uint##bits##_t d, uint8_t n, uint32_t *ax) \
	{                                                                              \
		__asm__(KL_FLAGS_IN_OF_KEPT insn sfx " %%cl, %0" KL_FLAGS_OUT_OF_KEPT  \
			: "+r"(d), "+a"(*ax)                                           \
			: "c"(n)                                                       \
			: "cc");                                                       \
		return d;                                                              \
	}
SIZES(COMPUTE_OF_KEPT, rol_of_kept, "rol")
SIZES(COMPUTE_OF_KEPT, ror_of_kept, "ror")

/* The count is op->imm, */
#define FORM_RI(bits, sfx, name)                                                       \
	static enum kl_next name##bits##_ri(struct kl_vcpu *v, const struct kl_op *op) \
	{                                                                              \
		uint32_t ax = kl_flags_pack(v);                                        \
		uint64_t r = name##bits(REG(v, op->reg, bits), (uint8_t)op->imm, &ax); \
                                                                                       \
		kl_gpr_set(v, op->reg, r, bits / 8);                                   \
		kl_flags_put(v, ax);                                                   \
		return KL_NEXT;                                                        \
	}
SIZES(FORM_RI, rol_of_kept)
SIZES(FORM_RI, ror_of_kept)
/* or CL. */
#define FORMS(bits, sfx, name)                                                                \
	FORM_RI(bits, sfx, name)                                                              \
	static enum kl_next name##bits##_rc(struct kl_vcpu *v, const struct kl_op *op)        \
	{                                                                                     \
		uint32_t ax = kl_flags_pack(v);                                               \
		uint64_t r = name##bits(REG(v, op->reg, bits), (uint8_t)v->gpr[KL_RCX], &ax); \
                                                                                              \
		kl_gpr_set(v, op->reg, r, bits / 8);                                          \
		kl_flags_put(v, ax);                                                          \
		return KL_NEXT;                                                               \
	}                                                                                     \
	KL_INLINE enum kl_next name##bits##_mem(struct kl_vcpu *v, const struct kl_op *op,    \
						uint8_t n)                                    \
	{                                                                                     \
		struct kl_rmw m;                                                              \
		uint##bits##_t d = (uint##bits##_t)kl_rmw_begin(v, op, bits / 8, &m);         \
		uint32_t ax = kl_flags_pack(v);                                               \
                                                                                              \
		kl_rmw_end(v, &m, name##bits(d, n, &ax), bits / 8);                           \
		kl_flags_put(v, ax);                                                          \
		return KL_NEXT;                                                               \
	}                                                                                     \
	static enum kl_next name##bits##_mi(struct kl_vcpu *v, const struct kl_op *op)        \
	{                                                                                     \
		return name##bits##_mem(v, op, (uint8_t)op->imm);                             \
	}                                                                                     \
	static enum kl_next name##bits##_mc(struct kl_vcpu *v, const struct kl_op *op)        \
	{                                                                                     \
		return name##bits##_mem(v, op, (uint8_t)v->gpr[KL_RCX]);                      \
	}
SIZES(FORMS, rol)
SIZES(FORMS, ror)
SIZES(FORMS, rcl)
SIZES(FORMS, rcr)
SIZES(FORMS, shl)
SIZES(FORMS, shr)
SIZES(FORMS, sar)

/* Immediate shifts of registers whose flags nobody reads. imm is masked by the decoder. */
#define NOFLAGS(bits, sfx, name, expr)                                                    \
	static enum kl_next name##bits##_nf_ri(struct kl_vcpu *v, const struct kl_op *op) \
	{                                                                                 \
		uint##bits##_t d = REG(v, op->reg, bits);                                 \
		unsigned n = (unsigned)op->imm;                                           \
                                                                                          \
		kl_gpr_set(v, op->reg, (uint##bits##_t)(expr), bits / 8);                 \
		return KL_NEXT;                                                           \
	}
NOFLAGS(32, , shl, d << n)
NOFLAGS(64, , shl, d << n)
NOFLAGS(32, , shr, d >> n)
NOFLAGS(64, , shr, d >> n)
NOFLAGS(32, , sar, (int32_t)d >> n)
NOFLAGS(64, , sar, (int64_t)d >> n)

#define FORMS4(n)                              \
	{                                      \
		n##_ri, n##_rc, n##_mi, n##_mc \
	}
#define BY_SIZE(name)                                                                 \
	{                                                                             \
		FORMS4(name##8), FORMS4(name##16), FORMS4(name##32), FORMS4(name##64) \
	}
static kl_op_fn *const shift[7][4][4] = {
	BY_SIZE(rol), BY_SIZE(ror), BY_SIZE(rcl), BY_SIZE(rcr),
	BY_SIZE(shl), BY_SIZE(shr), BY_SIZE(sar),
};
#define KEPT_BY_SIZE(name)                                        \
	{                                                         \
		name##8_ri, name##16_ri, name##32_ri, name##64_ri \
	}
static kl_op_fn *const rotate_of_kept[2][4] = {KEPT_BY_SIZE(rol_of_kept),
					       KEPT_BY_SIZE(ror_of_kept)};
static kl_op_fn *const noflags[3][2] = {
	{shl32_nf_ri, shl64_nf_ri}, {shr32_nf_ri, shr64_nf_ri}, {sar32_nf_ri, sar64_nf_ri}};

/* ---- SHLD, SHRD --------------------------------------------------------------------- */

#define DOUBLE(bits, sfx, name, insn)                                                         \
	KL_INLINE uint##bits##_t name##bits(uint##bits##_t d, uint##bits##_t s, uint8_t n,    \
					    uint32_t *ax)                                     \
	{                                                                                     \
		__asm__(KL_FLAGS_IN insn sfx " %%cl, %2, %0" KL_FLAGS_OUT                     \
			: "+r"(d), "+a"(*ax)                                                  \
			: "r"(s), "c"(n)                                                      \
			: "cc");                                                              \
		return d;                                                                     \
	}                                                                                     \
	/* reg, reg (rm), count in imm; imm 0x100: CL */                                      \
	static enum kl_next name##bits##_r(struct kl_vcpu *v, const struct kl_op *op)         \
	{                                                                                     \
		uint8_t n = (uint8_t)(op->imm > 0xff ? v->gpr[KL_RCX] : op->imm);             \
		uint32_t ax = kl_flags_pack(v);                                               \
		uint64_t r = name##bits(REG(v, op->reg, bits), REG(v, op->rm, bits), n, &ax); \
                                                                                              \
		kl_gpr_set(v, op->reg, r, bits / 8);                                          \
		kl_flags_put(v, ax);                                                          \
		return KL_NEXT;                                                               \
	}                                                                                     \
	static enum kl_next name##bits##_m(struct kl_vcpu *v, const struct kl_op *op)         \
	{                                                                                     \
		uint8_t n = (uint8_t)(op->imm > 0xff ? v->gpr[KL_RCX] : op->imm);             \
		struct kl_rmw m;                                                              \
		uint##bits##_t d = (uint##bits##_t)kl_rmw_begin(v, op, bits / 8, &m);         \
		uint32_t ax = kl_flags_pack(v);                                               \
                                                                                              \
		kl_rmw_end(v, &m, name##bits(d, REG(v, op->reg, bits), n, &ax), bits / 8);    \
		kl_flags_put(v, ax);                                                          \
		return KL_NEXT;                                                               \
	}
DOUBLE(16, "w", shld, "shld")
DOUBLE(32, "l", shld, "shld")
DOUBLE(64, "q", shld, "shld")
DOUBLE(16, "w", shrd, "shrd")
DOUBLE(32, "l", shrd, "shrd")
DOUBLE(64, "q", shrd, "shrd")

#define DOUBLE2(n)           \
	{                    \
		n##_r, n##_m \
	}
static kl_op_fn *const shift_double[2][4][2] = {
	{{NULL, NULL}, DOUBLE2(shld16), DOUBLE2(shld32), DOUBLE2(shld64)},
	{{NULL, NULL}, DOUBLE2(shrd16), DOUBLE2(shrd32), DOUBLE2(shrd64)},
};

/* ---- selection ---------------------------------------------------------------------- */

bool kl_rotate_keeps_of(const struct kl_decode *d)
{
	return kl_host_is_intel() && d->op->imm != 1;
}

static bool select_shift(struct kl_decode *d, unsigned n)
{
	bool mem = d->opnd[0].type == ZYDIS_OPERAND_TYPE_MEMORY;
	bool cl = d->opnd[1].type == ZYDIS_OPERAND_TYPE_REGISTER;

	if (!cl)
		d->op->imm &= d->size2 == 3 ? 63 : 31;
	d->op->fn = shift[n][d->size2][2 * mem + cl];
	if (n < 2 && !mem && !cl && kl_rotate_keeps_of(d))
		d->op->fn = rotate_of_kept[n][d->size2];
	d->simple = true;
	d->stores = mem;
	/* Only these surely write all flags: rotates keep some, a count of 0 keeps all. */
	d->writes_flags = n >= 4 && !cl && d->op->imm;
	d->reads_flags = !d->writes_flags;
	if (n >= 4 && !cl && !mem && d->size2 >= 2)
		d->noflags = noflags[n - 4][d->size2 - 2];
	return true;
}

static bool select_double(struct kl_decode *d, unsigned n)
{
	bool mem = d->opnd[0].type == ZYDIS_OPERAND_TYPE_MEMORY;

	if (d->opnd[2].type == ZYDIS_OPERAND_TYPE_REGISTER)
		d->op->imm = 0x100;
	else
		d->op->imm &= 0xff;
	d->op->fn = shift_double[n][d->size2][mem];
	d->simple = true;
	d->stores = mem;
	d->reads_flags = true;
	return true;
}

bool kl_select_shift(struct kl_decode *d)
{
	switch (d->in.mnemonic) {
	case ZYDIS_MNEMONIC_ROL:
		return select_shift(d, 0);
	case ZYDIS_MNEMONIC_ROR:
		return select_shift(d, 1);
	case ZYDIS_MNEMONIC_RCL:
		return select_shift(d, 2);
	case ZYDIS_MNEMONIC_RCR:
		return select_shift(d, 3);
	case ZYDIS_MNEMONIC_SHL:
		return select_shift(d, 4);
	case ZYDIS_MNEMONIC_SHR:
		return select_shift(d, 5);
	case ZYDIS_MNEMONIC_SAR:
		return select_shift(d, 6);
	case ZYDIS_MNEMONIC_SHLD:
		return select_double(d, 0);
	case ZYDIS_MNEMONIC_SHRD:
		return select_double(d, 1);
	default:
		return false;
	}
}
