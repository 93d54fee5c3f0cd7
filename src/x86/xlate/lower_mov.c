/* SPDX-License-Identifier: MIT */
/* MOV MOVZX MOVSX MOVSXD LEA CMOVcc SETcc PUSH POP LEAVE XCHG BSWAP, sign extensions, NOP. */
#include "x86/xlate/lower.h"

#define GPR(off) ((off) / 8u)

/* A register becomes @size bytes of what @emit leaves: smaller ones are merged. */
static unsigned dst_for(struct kl_translation *t, uint8_t off, unsigned size)
{
	return size >= 4 ? kl_t_dst(t, GPR(off), H_S0) : kl_t_use(t, GPR(off), H_S0);
}

static bool mov(struct kl_translation *t, struct kl_t_op *o)
{
	const struct kl_op *op = &o->op;
	struct kl_emit *e = &t->e;
	unsigned size = op->opsize, r, s;

	switch (o->d.form) {
	case KL_FORM_RR:
		if (!kl_t_is_low(op->reg) || !kl_t_is_low(op->rm))
			return false;
		s = kl_t_use(t, GPR(op->rm), H_S1);
		r = dst_for(t, op->reg, size);
		kl_e_rr(e, 0x8b, size, r, s);
		break;
	case KL_FORM_RI:
		if (!kl_t_is_low(op->reg))
			return false;
		r = dst_for(t, op->reg, size);
		if (size == 8) {
			kl_e_imm(e, r, op->imm);
		} else if (size == 4) {
			kl_e_imm(e, r, (uint32_t)op->imm);
		} else {
			kl_e_rr(e, 0xc7, size, 0, r);
			kl_e8(e, (uint8_t)op->imm);
			if (size == 2)
				kl_e8(e, (uint8_t)(op->imm >> 8));
		}
		break;
	case KL_FORM_RM:
		if (!kl_t_is_low(op->reg) || !kl_t_can_address(t, o))
			return false;
		kl_t_access(t, o, size, false);
		r = dst_for(t, op->reg, size);
		kl_t_point(t);
		kl_e_rm(e, 0x8b, size, r, KL_T_PTR);
		break;
	case KL_FORM_MR:
		if (!kl_t_is_low(op->reg) || !kl_t_can_address(t, o))
			return false;
		kl_t_access(t, o, size, true);
		s = kl_t_use(t, GPR(op->reg), H_S0);
		kl_t_point(t);
		kl_e_rm(e, 0x89, size, s, KL_T_PTR);
		return true;
	case KL_FORM_MI:
		if (!kl_t_can_address(t, o))
			return false;
		kl_t_access(t, o, size, true);
		kl_t_point(t);
		kl_e_rm(e, 0xc7, size, 0, KL_T_PTR);
		if (size == 1)
			kl_e8(e, (uint8_t)op->imm);
		else if (size == 2) {
			kl_e8(e, (uint8_t)op->imm);
			kl_e8(e, (uint8_t)(op->imm >> 8));
		} else
			kl_e32(e, (uint32_t)op->imm);
		return true;
	default:
		return false;
	}
	kl_t_put(t, GPR(op->reg), r);
	return true;
}

static bool extend(struct kl_translation *t, struct kl_t_op *o, bool sign)
{
	const struct kl_op *op = &o->op;
	struct kl_emit *e = &t->e;
	unsigned from = o->d.opnd[1].size / 8, size = op->opsize, r, s;
	unsigned code = from == 4 ? 0x63 : (sign ? 0x0fbeu : 0x0fb6u) | (from == 2);

	if (!kl_t_is_low(op->reg) || size < 4 || (from == 4 && !sign) || from > 4)
		return false;
	if (o->d.form == KL_FORM_RR) {
		if (!kl_t_is_low(op->rm))
			return false;
		s = kl_t_use(t, GPR(op->rm), H_S1);
		r = kl_t_dst(t, GPR(op->reg), H_S0);
		kl_e_rr_byte(e, code, size == 8, r, s);
	} else if (o->d.form == KL_FORM_RM && kl_t_can_address(t, o)) {
		kl_t_access(t, o, from, false);
		r = kl_t_dst(t, GPR(op->reg), H_S0);
		kl_t_point(t);
		kl_e_rm(e, code, size == 8 ? 8 : 0, r, KL_T_PTR);
	} else {
		return false;
	}
	kl_t_put(t, GPR(op->reg), r);
	return true;
}

static bool lea(struct kl_translation *t, struct kl_t_op *o)
{
	unsigned r;

	if (!kl_t_is_low(o->op.reg) || o->op.opsize < 4 ||
	    (o->op.addrsize != 8 && o->op.addrsize != 4))
		return false;
	r = kl_t_dst(t, GPR(o->op.reg), H_S0);
	/* Large displacements have no registers, which the address must not come before. */
	if (o->op.disp != (int32_t)o->op.disp &&
	    (o->op.base != KL_NOREG || o->op.index != KL_NOREG))
		return false;
	kl_t_address(t, o, r, false);
	if (o->op.opsize == 4)
		kl_e_rr(&t->e, 0x8b, 4, r, r);
	kl_t_put(t, GPR(o->op.reg), r);
	return true;
}

static bool cmov(struct kl_translation *t, struct kl_t_op *o)
{
	const struct kl_op *op = &o->op;
	struct kl_emit *e = &t->e;
	unsigned code = 0x0f40u | op->cond, size = op->opsize, r, s;

	if (!kl_t_is_low(op->reg) || size < 4)
		return false;
	if (o->d.form == KL_FORM_RR) {
		if (!kl_t_is_low(op->rm))
			return false;
		kl_t_flags_need(t);
		s = kl_t_use(t, GPR(op->rm), H_S1);
		r = kl_t_use(t, GPR(op->reg), H_S0);
		kl_e_rr(e, code, size, r, s);
	} else if (o->d.form == KL_FORM_RM && kl_t_can_address(t, o)) {
		kl_t_access(t, o, size, false);
		kl_t_flags_need(t);
		r = kl_t_use(t, GPR(op->reg), H_S0);
		kl_t_point(t);
		kl_e_rm(e, code, size, r, KL_T_PTR);
	} else {
		return false;
	}
	kl_t_put(t, GPR(op->reg), r);
	return true;
}

static bool setcc(struct kl_translation *t, struct kl_t_op *o)
{
	const struct kl_op *op = &o->op;
	struct kl_emit *e = &t->e;
	unsigned code = 0x0f90u | op->cond, r;

	if (o->d.form == KL_FORM_R) {
		if (!kl_t_is_low(op->reg))
			return false;
		kl_t_flags_need(t);
		r = kl_t_use(t, GPR(op->reg), H_S0);
		kl_e_rr_byte(e, code, false, 0, r);
		kl_t_put(t, GPR(op->reg), r);
		return true;
	}
	if (o->d.form != KL_FORM_M || !kl_t_can_address(t, o))
		return false;
	kl_t_access(t, o, 1, true);
	kl_t_flags_need(t);
	kl_t_point(t);
	kl_e_rm(e, code, 0, 0, KL_T_PTR);
	return true;
}

/* ---- the stack ---- */

#define RSP kl_host_of[KL_RSP]

static bool push(struct kl_translation *t, struct kl_t_op *o)
{
	const struct kl_op *op = &o->op;
	struct kl_emit *e = &t->e;
	unsigned s;

	if (op->opsize != t->word || (o->d.form != KL_FORM_R && o->d.form != KL_FORM_I))
		return false;
	kl_t_stack(t, o, -(int)t->word, true);
	if (o->d.form == KL_FORM_R) {
		s = kl_t_use(t, GPR(op->reg), H_S0);
		kl_t_point(t);
		kl_e_rm(e, 0x89, t->word, s, KL_T_PTR);
	} else {
		kl_t_point(t);
		kl_e_rm(e, 0xc7, t->word, 0, KL_T_PTR);
		kl_e32(e, (uint32_t)op->imm);
	}
	kl_e_lea(e, t->word, RSP, KL_AT(RSP, -(int)t->word));
	return true;
}

static bool pop(struct kl_translation *t, struct kl_t_op *o)
{
	const struct kl_op *op = &o->op;
	struct kl_emit *e = &t->e;
	unsigned r;

	if (op->opsize != t->word || o->d.form != KL_FORM_R)
		return false;
	kl_t_stack(t, o, 0, false);
	r = kl_t_dst(t, GPR(op->reg), H_S0);
	kl_t_point(t);
	kl_e_rm(e, 0x8b, t->word, r, KL_T_PTR);
	if (GPR(op->reg) != KL_RSP)
		kl_e_lea(e, t->word, RSP, KL_AT(RSP, (int)t->word));
	kl_t_put(t, GPR(op->reg), r);
	return true;
}

static bool leave(struct kl_translation *t, struct kl_t_op *o)
{
	struct kl_emit *e = &t->e;
	unsigned rbp = kl_host_of[KL_RBP];

	if (o->op.opsize != t->word)
		return false;
	kl_t_flags_clobber(t);
	kl_e_rr(e, 0x8b, t->word, H_S1, rbp);
	kl_t_check(t, t->word, false);
	kl_t_point(t);
	kl_e_rm(e, 0x8b, t->word, H_S0, KL_T_PTR);
	kl_e_lea(e, t->word, RSP, KL_AT(rbp, (int)t->word));
	kl_e_mov(e, rbp, H_S0);
	return true;
}

/* ---- others ---- */

static bool xchg(struct kl_translation *t, struct kl_t_op *o)
{
	const struct kl_op *op = &o->op;
	struct kl_emit *e = &t->e;
	unsigned r, s;

	if (o->d.form == KL_FORM_RR) {
		if (!kl_t_is_low(op->reg) || !kl_t_is_low(op->rm) || op->reg == op->rm)
			return false;
		r = kl_t_use(t, GPR(op->reg), H_S0);
		s = kl_t_use(t, GPR(op->rm), H_S1);
		kl_e_rr(e, 0x87, op->opsize, r, s);
		kl_t_put(t, GPR(op->reg), r);
		kl_t_put(t, GPR(op->rm), s);
		return true;
	}
	if ((o->d.form != KL_FORM_RM && o->d.form != KL_FORM_MR) || !kl_t_is_low(op->reg) ||
	    !kl_t_can_address(t, o))
		return false;
	/* Locked without a prefix. */
	kl_t_access(t, o, op->opsize, true);
	r = kl_t_use(t, GPR(op->reg), H_S0);
	kl_t_point(t);
	kl_e_rm(e, 0x87, op->opsize, r, KL_T_PTR);
	kl_t_put(t, GPR(op->reg), r);
	return true;
}

static bool bswap(struct kl_translation *t, struct kl_t_op *o)
{
	unsigned r;

	if (!kl_t_is_low(o->op.reg) || o->op.opsize < 4)
		return false;
	r = kl_t_use(t, GPR(o->op.reg), H_S0);
	if (o->op.opsize == 8 || r >> 3)
		kl_e8(&t->e, 0x40 | (o->op.opsize == 8 ? 8u : 0u) | r >> 3);
	kl_e8(&t->e, 0x0f);
	kl_e8(&t->e, 0xc8 | (r & 7));
	kl_t_put(t, GPR(o->op.reg), r);
	return true;
}

/* CBW ... CQO: rAX is in no register of its own. */
static bool sign(struct kl_translation *t, struct kl_t_op *o)
{
	unsigned rax = kl_host_of[KL_RAX], rdx = kl_host_of[KL_RDX];
	struct kl_emit *e = &t->e;

	switch (o->d.in.mnemonic) {
	case ZYDIS_MNEMONIC_CDQE:
		kl_e_rr(e, 0x63, 8, rax, rax);
		return true;
	case ZYDIS_MNEMONIC_CWDE:
		kl_e_rr(e, 0x0fbf, 0, rax, rax);
		return true;
	case ZYDIS_MNEMONIC_CDQ:
	case ZYDIS_MNEMONIC_CQO:
		_Static_assert((int)KL_RDX == (int)H_RDX, "where CDQ wants it");
		kl_e_mov(e, H_RAX, rax);
		if (o->d.in.mnemonic == ZYDIS_MNEMONIC_CQO)
			kl_e8(e, 0x48);
		kl_e8(e, 0x99);
		return rdx == H_RDX;
	default:
		return false;
	}
}

bool kl_lower_mov(struct kl_translation *t, struct kl_t_op *o)
{
	if (o->op.flags & KL_OPF_LOCK)
		return o->d.in.mnemonic == ZYDIS_MNEMONIC_XCHG && xchg(t, o);
	switch (o->d.in.mnemonic) {
	case ZYDIS_MNEMONIC_MOV:
		return mov(t, o);
	case ZYDIS_MNEMONIC_MOVZX:
		return extend(t, o, false);
	case ZYDIS_MNEMONIC_MOVSX:
	case ZYDIS_MNEMONIC_MOVSXD:
		return extend(t, o, true);
	case ZYDIS_MNEMONIC_LEA:
		return lea(t, o);
	case ZYDIS_MNEMONIC_PUSH:
		return push(t, o);
	case ZYDIS_MNEMONIC_POP:
		return pop(t, o);
	case ZYDIS_MNEMONIC_LEAVE:
		return leave(t, o);
	case ZYDIS_MNEMONIC_XCHG:
		return xchg(t, o);
	case ZYDIS_MNEMONIC_BSWAP:
		return bswap(t, o);
	case ZYDIS_MNEMONIC_CDQE:
	case ZYDIS_MNEMONIC_CWDE:
	case ZYDIS_MNEMONIC_CDQ:
	case ZYDIS_MNEMONIC_CQO:
		return sign(t, o);
	case ZYDIS_MNEMONIC_NOP:
	case ZYDIS_MNEMONIC_ENDBR32:
	case ZYDIS_MNEMONIC_ENDBR64:
		return true;
#define CC(n, sfx) case ZYDIS_MNEMONIC_CMOV##sfx:
		KL_CONDITIONS(CC)
#undef CC
		return cmov(t, o);
#define CC(n, sfx) case ZYDIS_MNEMONIC_SET##sfx:
		KL_CONDITIONS(CC)
#undef CC
		return setcc(t, o);
	default:
		return false;
	}
}
