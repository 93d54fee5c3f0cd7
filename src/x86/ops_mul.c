/* SPDX-License-Identifier: MIT */
/* Multiplication and division. Divide errors are found before the host would trap. */
#include "x86/decode.h"
#include "x86/ops.h"

#define SIZES(X) X(16, "w") X(32, "l") X(64, "q")

/* The host leaves some flags of MUL and DIV as they were: they go in as well as out. */
#define WITH_FLAGS(insn) "pushq %q[fl]\n\tpopfq\n\t" insn "\n\tpushfq\n\tpopq %q[fl]"
#define HOST_FLAGS(v)    (((v)->rflags & KL_FL_STATUS) | 0x202)

KL_INLINE void put_rflags(struct kl_vcpu *v, uint64_t fl)
{
	v->rflags = (v->rflags & ~(uint64_t)KL_FL_STATUS) | (fl & KL_FL_STATUS);
}

KL_INLINE uint64_t operand(struct kl_vcpu *v, const struct kl_op *op, unsigned size)
{
	return op->flags & KL_OPF_MEM ? kl_mem_read(v, op, size) : kl_gpr_get(v, op->reg, size);
}

#define MULTIPLY(bits, sfx, name, insn)                                           \
	static enum kl_next name##bits(struct kl_vcpu *v, const struct kl_op *op) \
	{                                                                         \
		uint##bits##_t s = (uint##bits##_t)operand(v, op, bits / 8);      \
		uint##bits##_t a = (uint##bits##_t)v->gpr[KL_RAX], d;             \
		uint64_t fl = HOST_FLAGS(v);                                      \
                                                                                  \
		__asm__ volatile(WITH_FLAGS(insn sfx " %[s]")                     \
				 : "+a"(a), "=&d"(d), [fl] "+&r"(fl)              \
				 : [s] "r"(s)                                     \
				 : "cc", "memory");                               \
		kl_gpr_set(v, 0, a, bits / 8);                                    \
		kl_gpr_set(v, 8 * KL_RDX, d, bits / 8);                           \
		put_rflags(v, fl);                                                \
		return KL_NEXT;                                                   \
	}
#define MULS(bits, sfx) MULTIPLY(bits, sfx, mul, "mul") MULTIPLY(bits, sfx, imul, "imul")
SIZES(MULS)

#define MULTIPLY8(name, insn)                                                   \
	static enum kl_next name##8(struct kl_vcpu * v, const struct kl_op *op) \
	{                                                                       \
		uint8_t s = (uint8_t)operand(v, op, 1);                         \
		uint16_t a = (uint8_t)v->gpr[KL_RAX];                           \
		uint64_t fl = HOST_FLAGS(v);                                    \
                                                                                \
		__asm__ volatile(WITH_FLAGS(insn "b %[s]")                      \
				 : "+a"(a), [fl] "+&r"(fl)                      \
				 : [s] "r"(s)                                   \
				 : "cc", "memory");                             \
		*(uint16_t *)&v->gpr[KL_RAX] = a;                               \
		put_rflags(v, fl);                                              \
		return KL_NEXT;                                                 \
	}
MULTIPLY8(mul, "mul")
MULTIPLY8(imul, "imul")

/* IMUL r, r/m and r, r/m, imm. rm or memory times rm2: imm, or reg itself. */
#define IMUL23(bits, sfx)                                                                       \
	static enum kl_next imul2_##bits(struct kl_vcpu *v, const struct kl_op *op)             \
	{                                                                                       \
		uint##bits##_t d = (uint##bits##_t)kl_gpr_get(v, op->reg, bits / 8), s;         \
		uint64_t fl;                                                                    \
                                                                                                \
		s = (uint##bits##_t)(op->flags & KL_OPF_MEM ? kl_mem_read(v, op, bits / 8)      \
							    : kl_gpr_get(v, op->rm, bits / 8)); \
		fl = HOST_FLAGS(v);                                                             \
		__asm__ volatile(WITH_FLAGS("imul" sfx " %[s], %[d]")                           \
				 : [d] "+&r"(d), [fl] "+&r"(fl)                                 \
				 : [s] "r"(s)                                                   \
				 : "cc", "memory");                                             \
		kl_gpr_set(v, op->reg, d, bits / 8);                                            \
		put_rflags(v, fl);                                                              \
		return KL_NEXT;                                                                 \
	}                                                                                       \
	static enum kl_next imul3_##bits(struct kl_vcpu *v, const struct kl_op *op)             \
	{                                                                                       \
		uint##bits##_t d = (uint##bits##_t)op->imm, s;                                  \
		uint64_t fl;                                                                    \
                                                                                                \
		s = (uint##bits##_t)(op->flags & KL_OPF_MEM ? kl_mem_read(v, op, bits / 8)      \
							    : kl_gpr_get(v, op->rm, bits / 8)); \
		fl = HOST_FLAGS(v);                                                             \
		__asm__ volatile(WITH_FLAGS("imul" sfx " %[s], %[d]")                           \
				 : [d] "+&r"(d), [fl] "+&r"(fl)                                 \
				 : [s] "r"(s)                                                   \
				 : "cc", "memory");                                             \
		kl_gpr_set(v, op->reg, d, bits / 8);                                            \
		put_rflags(v, fl);                                                              \
		return KL_NEXT;                                                                 \
	}                                                                                       \
	static enum kl_next imul2_##bits##_nf(struct kl_vcpu *v, const struct kl_op *op)        \
	{                                                                                       \
		uint64_t s = op->flags & KL_OPF_MEM ? kl_mem_read(v, op, bits / 8)              \
						    : kl_gpr_get(v, op->rm, bits / 8);          \
                                                                                                \
		kl_gpr_set(v, op->reg, kl_gpr_get(v, op->reg, 8) * s, bits / 8);                \
		return KL_NEXT;                                                                 \
	}                                                                                       \
	static enum kl_next imul3_##bits##_nf(struct kl_vcpu *v, const struct kl_op *op)        \
	{                                                                                       \
		uint64_t s = op->flags & KL_OPF_MEM ? kl_mem_read(v, op, bits / 8)              \
						    : kl_gpr_get(v, op->rm, bits / 8);          \
                                                                                                \
		kl_gpr_set(v, op->reg, op->imm *s, bits / 8);                                   \
		return KL_NEXT;                                                                 \
	}
SIZES(IMUL23)

/* ---- division ------------------------------------------------------------------------ */

#define DIVIDE(bits, sfx, wide, swide)                                               \
	static enum kl_next div##bits(struct kl_vcpu *v, const struct kl_op *op)     \
	{                                                                            \
		uint##bits##_t s = (uint##bits##_t)operand(v, op, bits / 8);         \
		uint##bits##_t a = (uint##bits##_t)v->gpr[KL_RAX];                   \
		uint##bits##_t d = (uint##bits##_t)v->gpr[KL_RDX];                   \
		uint64_t fl = HOST_FLAGS(v);                                         \
                                                                                     \
		if (d >= s) /* s == 0, too */                                        \
			kl_raise(v, KL_EXC_DE);                                      \
		__asm__ volatile(WITH_FLAGS("div" sfx " %[s]")                       \
				 : "+a"(a), "+d"(d), [fl] "+&r"(fl)                  \
				 : [s] "r"(s)                                        \
				 : "cc", "memory");                                  \
		kl_gpr_set(v, 0, a, bits / 8);                                       \
		kl_gpr_set(v, 8 * KL_RDX, d, bits / 8);                              \
		put_rflags(v, fl);                                                   \
		return KL_NEXT;                                                      \
	}                                                                            \
	static enum kl_next idiv##bits(struct kl_vcpu *v, const struct kl_op *op)    \
	{                                                                            \
		uint##bits##_t s = (uint##bits##_t)operand(v, op, bits / 8);         \
		uint##bits##_t a = (uint##bits##_t)v->gpr[KL_RAX];                   \
		uint##bits##_t d = (uint##bits##_t)v->gpr[KL_RDX];                   \
		wide n = (wide)d << bits | a;                                        \
		wide un = (swide)n < 0 ? -n : n; /* magnitudes, unsigned */          \
		wide us = (int##bits##_t)s < 0 ? -(wide)(swide)(int##bits##_t)s : s; \
		bool neg = ((swide)n < 0) != ((int##bits##_t)s < 0);                 \
		wide max = ((wide)1 << (bits - 1)) - !neg;                           \
		uint64_t fl = HOST_FLAGS(v);                                         \
                                                                                     \
		/* quotient > max, without dividing: un >= (max + 1) * us */         \
		if (!us || un >= (max + 1) * us)                                     \
			kl_raise(v, KL_EXC_DE);                                      \
		__asm__ volatile(WITH_FLAGS("idiv" sfx " %[s]")                      \
				 : "+a"(a), "+d"(d), [fl] "+&r"(fl)                  \
				 : [s] "r"(s)                                        \
				 : "cc", "memory");                                  \
		kl_gpr_set(v, 0, a, bits / 8);                                       \
		kl_gpr_set(v, 8 * KL_RDX, d, bits / 8);                              \
		put_rflags(v, fl);                                                   \
		return KL_NEXT;                                                      \
	}
DIVIDE(16, "w", uint32_t, int32_t)
DIVIDE(32, "l", uint64_t, int64_t)
DIVIDE(64, "q", unsigned __int128, __int128)

static enum kl_next div8(struct kl_vcpu *v, const struct kl_op *op)
{
	uint8_t s = (uint8_t)operand(v, op, 1);
	uint16_t a = (uint16_t)v->gpr[KL_RAX];
	uint64_t fl = HOST_FLAGS(v);

	if (a >> 8 >= s)
		kl_raise(v, KL_EXC_DE);
	__asm__ volatile(WITH_FLAGS("divb %[s]")
			 : "+a"(a), [fl] "+&r"(fl)
			 : [s] "r"(s)
			 : "cc", "memory");
	*(uint16_t *)&v->gpr[KL_RAX] = a;
	put_rflags(v, fl);
	return KL_NEXT;
}

static enum kl_next idiv8(struct kl_vcpu *v, const struct kl_op *op)
{
	int8_t s = (int8_t)operand(v, op, 1);
	int16_t a = (int16_t)v->gpr[KL_RAX];
	uint64_t fl = HOST_FLAGS(v);

	if (!s || (int)a / s > 127 || (int)a / s < -128)
		kl_raise(v, KL_EXC_DE);
	__asm__ volatile(WITH_FLAGS("idivb %[s]")
			 : "+a"(a), [fl] "+&r"(fl)
			 : [s] "r"(s)
			 : "cc", "memory");
	*(uint16_t *)&v->gpr[KL_RAX] = (uint16_t)a;
	put_rflags(v, fl);
	return KL_NEXT;
}

/* ---- selection ----------------------------------------------------------------------- */

static kl_op_fn *const one_operand[4][4] = {
	{mul8, mul16, mul32, mul64},
	{imul8, imul16, imul32, imul64},
	{div8, div16, div32, div64},
	{idiv8, idiv16, idiv32, idiv64},
};
static kl_op_fn *const imul[2][2][4] = {
	{{NULL, imul2_16, imul2_32, imul2_64}, {NULL, imul2_16_nf, imul2_32_nf, imul2_64_nf}},
	{{NULL, imul3_16, imul3_32, imul3_64}, {NULL, imul3_16_nf, imul3_32_nf, imul3_64_nf}},
};

static bool one(struct kl_decode *d, unsigned n)
{
	d->op->fn = one_operand[n][d->size2];
	d->simple = n < 2;
	d->reads_flags = true;
	return true;
}

bool kl_select_mul(struct kl_decode *d)
{
	switch (d->in.mnemonic) {
	case ZYDIS_MNEMONIC_MUL:
		return one(d, 0);
	case ZYDIS_MNEMONIC_IMUL:
		if (d->form == KL_FORM_R || d->form == KL_FORM_M)
			return one(d, 1);
		d->op->fn = imul[d->in.operand_count_visible == 3][0][d->size2];
		d->noflags = imul[d->in.operand_count_visible == 3][1][d->size2];
		d->simple = true;
		d->reads_flags = true;
		return true;
	case ZYDIS_MNEMONIC_DIV:
		return one(d, 2);
	case ZYDIS_MNEMONIC_IDIV:
		return one(d, 3);
	default:
		return false;
	}
}
