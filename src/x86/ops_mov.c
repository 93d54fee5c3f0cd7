/* SPDX-License-Identifier: MIT */
/*
 * Moves: MOV MOVZX MOVSX MOVSXD MOVBE MOVNTI LEA CMOVcc SETcc BSWAP XLAT, sign extensions of rAX,
 * LAHF SAHF and the carry and direction flags.
 */
#include "host/cpu.h"
#include "x86/decode.h"
#include "x86/ops.h"

#define REG(v, off, bits) (*(uint##bits##_t *)kl_gpr(v, off))

#define MOV(bits)                                                                                \
	static enum kl_next mov##bits##_rr(struct kl_vcpu *v, const struct kl_op *op)            \
	{                                                                                        \
		kl_gpr_set(v, op->reg, REG(v, op->rm, bits), bits / 8);                          \
		return KL_NEXT;                                                                  \
	}                                                                                        \
	static enum kl_next mov##bits##_rm(struct kl_vcpu *v, const struct kl_op *op)            \
	{                                                                                        \
		kl_gpr_set(v, op->reg, kl_mem_read(v, op, bits / 8), bits / 8);                  \
		return KL_NEXT;                                                                  \
	}                                                                                        \
	static enum kl_next mov##bits##_mr(struct kl_vcpu *v, const struct kl_op *op)            \
	{                                                                                        \
		kl_write(v, kl_mem_lin(v, op, bits / 8, true), REG(v, op->reg, bits), bits / 8); \
		return KL_NEXT;                                                                  \
	}                                                                                        \
	static enum kl_next mov##bits##_ri(struct kl_vcpu *v, const struct kl_op *op)            \
	{                                                                                        \
		kl_gpr_set(v, op->reg, op->imm, bits / 8);                                       \
		return KL_NEXT;                                                                  \
	}                                                                                        \
	static enum kl_next mov##bits##_mi(struct kl_vcpu *v, const struct kl_op *op)            \
	{                                                                                        \
		kl_write(v, kl_mem_lin(v, op, bits / 8, true), op->imm, bits / 8);               \
		return KL_NEXT;                                                                  \
	}
MOV(8)
MOV(16)
MOV(32)
MOV(64)

#define MOV5(b)                                                                 \
	{                                                                       \
		mov##b##_rr, mov##b##_rm, mov##b##_mr, mov##b##_ri, mov##b##_mi \
	}
static kl_op_fn *const mov[4][5] = {MOV5(8), MOV5(16), MOV5(32), MOV5(64)};

/* MOVZX and MOVSX: to @db bits from @sb bits. */
#define EXTEND(name, db, sb, type)                                                          \
	static enum kl_next name##db##_##sb##_r(struct kl_vcpu *v, const struct kl_op *op)  \
	{                                                                                   \
		kl_gpr_set(v, op->reg, (uint64_t)(type)REG(v, op->rm, sb), db / 8);         \
		return KL_NEXT;                                                             \
	}                                                                                   \
	static enum kl_next name##db##_##sb##_m(struct kl_vcpu *v, const struct kl_op *op)  \
	{                                                                                   \
		kl_gpr_set(v, op->reg, (uint64_t)(type)kl_mem_read(v, op, sb / 8), db / 8); \
		return KL_NEXT;                                                             \
	}
EXTEND(zx, 16, 8, uint8_t)
EXTEND(zx, 32, 8, uint8_t)
EXTEND(zx, 64, 8, uint8_t)
EXTEND(zx, 16, 16, uint16_t)
EXTEND(zx, 32, 16, uint16_t)
EXTEND(zx, 64, 16, uint16_t)
EXTEND(sx, 16, 8, int8_t)
EXTEND(sx, 32, 8, int8_t)
EXTEND(sx, 64, 8, int8_t)
EXTEND(sx, 16, 16, int16_t)
EXTEND(sx, 32, 16, int16_t)
EXTEND(sx, 64, 16, int16_t)
EXTEND(sx, 64, 32, int32_t)
EXTEND(sx, 16, 32, int32_t)

#define EXTEND2(n)           \
	{                    \
		n##_r, n##_m \
	}
/* [signed][log2 of the source][log2 of the destination - 1][memory] */
static kl_op_fn *const extend[2][3][3][2] = {
	{{EXTEND2(zx16_8), EXTEND2(zx32_8), EXTEND2(zx64_8)},
	 {EXTEND2(zx16_16), EXTEND2(zx32_16), EXTEND2(zx64_16)}},
	{{EXTEND2(sx16_8), EXTEND2(sx32_8), EXTEND2(sx64_8)},
	 {EXTEND2(sx16_16), EXTEND2(sx32_16), EXTEND2(sx64_16)},
	 {EXTEND2(sx16_32), {mov32_rr, mov32_rm}, EXTEND2(sx64_32)}},
};

#define LEA(bits)                                                                \
	static enum kl_next lea##bits(struct kl_vcpu *v, const struct kl_op *op) \
	{                                                                        \
		kl_gpr_set(v, op->reg, kl_ea(v, op), bits / 8);                  \
		return KL_NEXT;                                                  \
	}
LEA(16)
LEA(32)
LEA(64)
static kl_op_fn *const lea[4] = {NULL, lea16, lea32, lea64};

#define CMOV(bits)                                                                      \
	static enum kl_next cmov##bits##_rr(struct kl_vcpu *v, const struct kl_op *op)  \
	{                                                                               \
		uint64_t s = REG(v, op->rm, bits), d = REG(v, op->reg, bits);           \
                                                                                        \
		kl_gpr_set(v, op->reg, kl_cond(v->rflags, op->cond) ? s : d, bits / 8); \
		return KL_NEXT;                                                         \
	}                                                                               \
	static enum kl_next cmov##bits##_rm(struct kl_vcpu *v, const struct kl_op *op)  \
	{                                                                               \
		uint64_t s = kl_mem_read(v, op, bits / 8), d = REG(v, op->reg, bits);   \
                                                                                        \
		kl_gpr_set(v, op->reg, kl_cond(v->rflags, op->cond) ? s : d, bits / 8); \
		return KL_NEXT;                                                         \
	}
CMOV(16)
CMOV(32)
CMOV(64)
static kl_op_fn *const cmov[4][2] = {
	{NULL, NULL}, {cmov16_rr, cmov16_rm}, {cmov32_rr, cmov32_rm}, {cmov64_rr, cmov64_rm}};

static enum kl_next setcc_r(struct kl_vcpu *v, const struct kl_op *op)
{
	REG(v, op->reg, 8) = kl_cond(v->rflags, op->cond);
	return KL_NEXT;
}

static enum kl_next setcc_m(struct kl_vcpu *v, const struct kl_op *op)
{
	kl_write(v, kl_mem_lin(v, op, 1, true), kl_cond(v->rflags, op->cond), 1);
	return KL_NEXT;
}

static uint64_t swap(uint64_t x, unsigned size)
{
	return size == 8   ? __builtin_bswap64(x)
	       : size == 4 ? __builtin_bswap32((uint32_t)x)
			   : __builtin_bswap16((uint16_t)x);
}

static enum kl_next bswap(struct kl_vcpu *v, const struct kl_op *op)
{
	/* 16 bits: undefined; processors give 0. */
	uint64_t x = op->opsize == 2 ? 0 : swap(kl_gpr_get(v, op->reg, op->opsize), op->opsize);

	kl_gpr_set(v, op->reg, x, op->opsize);
	return KL_NEXT;
}

static enum kl_next movbe_rm(struct kl_vcpu *v, const struct kl_op *op)
{
	kl_gpr_set(v, op->reg, swap(kl_mem_read(v, op, op->opsize), op->opsize), op->opsize);
	return KL_NEXT;
}

static enum kl_next movbe_mr(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t x = swap(kl_gpr_get(v, op->reg, op->opsize), op->opsize);

	kl_write(v, kl_mem_lin(v, op, op->opsize, true), x, op->opsize);
	return KL_NEXT;
}

static enum kl_next xlat(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t ea = v->gpr[KL_RBX] + (uint8_t)v->gpr[KL_RAX];

	ea = op->addrsize == 8 ? ea : op->addrsize == 4 ? (uint32_t)ea : (uint16_t)ea;
	REG(v, 0, 8) = (uint8_t)kl_read(v, kl_seg_linear(v, op->seg, ea, 1, false), 1);
	return KL_NEXT;
}

static enum kl_next cbw(struct kl_vcpu *v, const struct kl_op *op)
{
	REG(v, 0, 16) = (uint16_t)(int8_t)v->gpr[KL_RAX];
	return KL_NEXT;
}

static enum kl_next cwde(struct kl_vcpu *v, const struct kl_op *op)
{
	v->gpr[KL_RAX] = (uint32_t)(int16_t)v->gpr[KL_RAX];
	return KL_NEXT;
}

static enum kl_next cdqe(struct kl_vcpu *v, const struct kl_op *op)
{
	v->gpr[KL_RAX] = (uint64_t)(int32_t)v->gpr[KL_RAX];
	return KL_NEXT;
}

static enum kl_next cwd(struct kl_vcpu *v, const struct kl_op *op)
{
	*(uint16_t *)&v->gpr[KL_RDX] = (uint16_t)((int16_t)v->gpr[KL_RAX] >> 15);
	return KL_NEXT;
}

static enum kl_next cdq(struct kl_vcpu *v, const struct kl_op *op)
{
	v->gpr[KL_RDX] = (uint32_t)((int32_t)v->gpr[KL_RAX] >> 31);
	return KL_NEXT;
}

static enum kl_next cqo(struct kl_vcpu *v, const struct kl_op *op)
{
	v->gpr[KL_RDX] = (uint64_t)((int64_t)v->gpr[KL_RAX] >> 63);
	return KL_NEXT;
}

static enum kl_next lahf(struct kl_vcpu *v, const struct kl_op *op)
{
	REG(v, 1, 8) = (uint8_t)((v->rflags & 0xd5) | 2);
	return KL_NEXT;
}

static enum kl_next sahf(struct kl_vcpu *v, const struct kl_op *op)
{
	v->rflags = (v->rflags & ~0xd5ull) | (REG(v, 1, 8) & 0xd5);
	return KL_NEXT;
}

/* CLC STC CMC CLD STD: imm is what to clear, disp what to toggle after. */
static enum kl_next flag_op(struct kl_vcpu *v, const struct kl_op *op)
{
	v->rflags = (v->rflags & ~op->imm) ^ (uint64_t)op->disp;
	return KL_NEXT;
}

static bool flag(struct kl_decode *d, uint64_t clear, uint64_t toggle)
{
	d->op->fn = flag_op;
	d->op->imm = clear;
	d->op->disp = (int64_t)toggle;
	d->simple = true;
	d->reads_flags = true;
	return true;
}

static bool plain(struct kl_decode *d, kl_op_fn *fn)
{
	d->op->fn = fn;
	d->simple = true;
	return true;
}

static bool select_extend(struct kl_decode *d, bool sign)
{
	unsigned src = d->opnd[1].size == 8 ? 0 : d->opnd[1].size == 16 ? 1 : 2;

	if ((d->form != KL_FORM_RR && d->form != KL_FORM_RM) || d->size2 == 0)
		return false;
	return plain(d, extend[sign][src][d->size2 - 1][d->form == KL_FORM_RM]);
}

static int condition(ZydisMnemonic m)
{
	switch (m) {
#define CC(n, sfx)                     \
	case ZYDIS_MNEMONIC_CMOV##sfx: \
	case ZYDIS_MNEMONIC_SET##sfx:  \
		return n;
		KL_CONDITIONS(CC)
#undef CC
	default:
		return -1;
	}
}

static bool select_conditional(struct kl_decode *d)
{
	int cc = condition(d->in.mnemonic);

	if (cc < 0)
		return false;
	d->op->cond = (uint8_t)cc;
	d->reads_flags = true;
	if (d->form == KL_FORM_RR || d->form == KL_FORM_RM)
		return plain(d, cmov[d->size2][d->form == KL_FORM_RM]);
	d->stores = d->form == KL_FORM_M;
	return plain(d, d->stores ? setcc_m : setcc_r);
}

bool kl_select_mov(struct kl_decode *d)
{
	switch (d->in.mnemonic) {
	case ZYDIS_MNEMONIC_MOV:
		if (d->form < KL_FORM_RR || d->form > KL_FORM_MI)
			return false; /* segment, control, debug registers */
		d->stores = d->form == KL_FORM_MR || d->form == KL_FORM_MI;
		return plain(d, mov[d->size2][d->form - KL_FORM_RR]);
	case ZYDIS_MNEMONIC_MOVNTI:
		d->stores = true;
		return plain(d, mov[d->size2][KL_FORM_MR - KL_FORM_RR]);
	case ZYDIS_MNEMONIC_MOVZX:
		return select_extend(d, false);
	case ZYDIS_MNEMONIC_MOVSXD:
		if (d->size2 == 1 && kl_host_is_intel()) /* reads two bytes, not four */
			return plain(d, mov[1][d->form - KL_FORM_RR]);
		return select_extend(d, true);
	case ZYDIS_MNEMONIC_MOVSX:
		return select_extend(d, true);
	case ZYDIS_MNEMONIC_LEA:
		return plain(d, lea[d->size2]);
	case ZYDIS_MNEMONIC_BSWAP:
		return plain(d, bswap);
	case ZYDIS_MNEMONIC_MOVBE:
		d->stores = d->form == KL_FORM_MR;
		return plain(d, d->stores ? movbe_mr : movbe_rm);
	case ZYDIS_MNEMONIC_XLAT:
		d->op->fn = xlat;
		return true;
	case ZYDIS_MNEMONIC_CBW:
		return plain(d, cbw);
	case ZYDIS_MNEMONIC_CWDE:
		return plain(d, cwde);
	case ZYDIS_MNEMONIC_CDQE:
		return plain(d, cdqe);
	case ZYDIS_MNEMONIC_CWD:
		return plain(d, cwd);
	case ZYDIS_MNEMONIC_CDQ:
		return plain(d, cdq);
	case ZYDIS_MNEMONIC_CQO:
		return plain(d, cqo);
	case ZYDIS_MNEMONIC_LAHF:
		d->reads_flags = true;
		return plain(d, lahf);
	case ZYDIS_MNEMONIC_SAHF:
		d->reads_flags = true;
		return plain(d, sahf);
	case ZYDIS_MNEMONIC_CLC:
		return flag(d, KL_FL_CF, 0);
	case ZYDIS_MNEMONIC_STC:
		return flag(d, KL_FL_CF, KL_FL_CF);
	case ZYDIS_MNEMONIC_CMC:
		return flag(d, 0, KL_FL_CF);
	case ZYDIS_MNEMONIC_CLD:
		return flag(d, KL_FL_DF, 0);
	case ZYDIS_MNEMONIC_STD:
		return flag(d, KL_FL_DF, KL_FL_DF);
	default:
		return select_conditional(d);
	}
}
