/* SPDX-License-Identifier: MIT */
/*
 * ADD OR ADC SBB AND SUB XOR CMP TEST INC DEC NEG NOT, shifts and rotates, IMUL MUL, XADD CMPXCHG.
 * Each is the host's own instruction, with the guest's flags in the host's where it leaves some of
 * them alone or undefined.
 */
#include "x86/xlate/lower.h"

#define GPR(off) ((off) / 8u)

/* ---- two operands ---- */

enum { ADD, OR, ADC, SBB, AND, SUB, XOR, CMP, TEST };

static bool reads_carry(unsigned n)
{
	return n == ADC || n == SBB;
}

static void emit_imm(struct kl_emit *e, unsigned size, int32_t imm)
{
	kl_e8(e, (uint8_t)imm);
	if (size >= 2)
		kl_e8(e, (uint8_t)(imm >> 8));
	if (size >= 4) {
		kl_e8(e, (uint8_t)(imm >> 16));
		kl_e8(e, (uint8_t)(imm >> 24));
	}
}

static bool binary_register(struct kl_translation *t, struct kl_t_op *o, unsigned n)
{
	const struct kl_op *op = &o->op;
	struct kl_emit *e = &t->e;
	unsigned size = op->opsize, d, s;

	if (!kl_t_is_low(op->reg) || (o->d.form == KL_FORM_RR && !kl_t_is_low(op->rm)))
		return false;
	if (reads_carry(n))
		kl_t_flags_need(t);
	if (o->d.form == KL_FORM_RR) {
		s = kl_t_use(t, GPR(op->rm), H_S1);
		d = kl_t_use(t, GPR(op->reg), H_S0);
		kl_e_rr(e, n == TEST ? 0x85 : 8 * n + 1, size, s, d);
	} else {
		d = kl_t_use(t, GPR(op->reg), H_S0);
		if (n == TEST) {
			kl_e_rr(e, 0xf7, size, 0, d);
			emit_imm(e, size, (int32_t)kl_t_imm(o));
		} else {
			kl_e_alu_ri(e, n, size, d, (int32_t)kl_t_imm(o));
		}
	}
	if (n < CMP)
		kl_t_put(t, GPR(op->reg), d);
	return true;
}

static bool binary_memory(struct kl_translation *t, struct kl_t_op *o, unsigned n)
{
	const struct kl_op *op = &o->op;
	struct kl_emit *e = &t->e;
	unsigned size = op->opsize, r;
	bool store = o->d.form != KL_FORM_RM && n < CMP;

	if (!kl_t_can_address(t, o) || (o->d.form != KL_FORM_MI && !kl_t_is_low(op->reg)))
		return false;
	kl_t_access(t, o, size, store);
	if (reads_carry(n))
		kl_t_flags_need(t);
	if (o->d.form == KL_FORM_MI) {
		kl_t_point(t);
		if (op->flags & KL_OPF_LOCK)
			kl_e8(e, 0xf0);
		if (n == TEST) {
			kl_e_rm(e, 0xf7, size, 0, KL_T_PTR);
			emit_imm(e, size, (int32_t)kl_t_imm(o));
		} else {
			kl_e_alu_mi(e, n, size, KL_T_PTR, (int32_t)kl_t_imm(o));
		}
		return true;
	}
	r = kl_t_use(t, GPR(op->reg), H_S0);
	kl_t_point(t);
	if (op->flags & KL_OPF_LOCK)
		kl_e8(e, 0xf0);
	/* TEST has one opcode for both. */
	kl_e_rm(e,
		n == TEST                 ? 0x85
		: o->d.form == KL_FORM_RM ? 8 * n + 3
					  : 8 * n + 1,
		size, r, KL_T_PTR);
	if (o->d.form == KL_FORM_RM && n < CMP)
		kl_t_put(t, GPR(op->reg), r);
	return true;
}

static bool binary(struct kl_translation *t, struct kl_t_op *o, unsigned n)
{
	bool done = false;

	if (o->d.form == KL_FORM_RR || o->d.form == KL_FORM_RI)
		done = binary_register(t, o, n);
	else if (o->d.form == KL_FORM_RM || o->d.form == KL_FORM_MR || o->d.form == KL_FORM_MI)
		done = binary_memory(t, o, n);
	if (done)
		kl_t_flags_set(t);
	return done;
}

/* ---- one operand ---- */

static bool unary(struct kl_translation *t, struct kl_t_op *o, unsigned code, unsigned n,
		  bool keeps, bool sets)
{
	const struct kl_op *op = &o->op;
	struct kl_emit *e = &t->e;
	unsigned r;

	if (o->d.form == KL_FORM_R) {
		if (!kl_t_is_low(op->reg))
			return false;
		if (keeps)
			kl_t_flags_keep(t);
		r = kl_t_use(t, GPR(op->reg), H_S0);
		kl_e_rr(e, code, op->opsize, n, r);
		kl_t_put(t, GPR(op->reg), r);
	} else if (o->d.form == KL_FORM_M && kl_t_can_address(t, o)) {
		kl_t_access(t, o, op->opsize, true);
		if (keeps)
			kl_t_flags_keep(t);
		kl_t_point(t);
		if (op->flags & KL_OPF_LOCK)
			kl_e8(e, 0xf0);
		kl_e_rm(e, code, op->opsize, n, KL_T_PTR);
	} else {
		return false;
	}
	if (sets)
		kl_t_flags_set(t);
	return true;
}

/* ---- shifts ---- */

static bool shift(struct kl_translation *t, struct kl_t_op *o, unsigned n)
{
	const struct kl_op *op = &o->op;
	struct kl_emit *e = &t->e;
	bool mem = o->d.opnd[0].type == ZYDIS_OPERAND_TYPE_MEMORY;
	bool cl = o->d.opnd[1].type == ZYDIS_OPERAND_TYPE_REGISTER;
	unsigned code = cl ? 0xd3 : 0xc1, r;

	_Static_assert((int)KL_RCX == (int)H_RCX, "counts are where they are wanted");
	/* RCL and RCR read the carry. */
	if (mem ? !kl_t_can_address(t, o) : !kl_t_is_low(op->reg))
		return false;
	if (mem)
		kl_t_access(t, o, op->opsize, true);
	if (n == 2 || n == 3)
		kl_t_flags_need(t);
	else if (!o->d.writes_flags)
		kl_t_flags_keep(t);
	/* By one: an instruction of its own, which defines more flags. */
	if (!cl && op->imm == 1)
		code = 0xd1;
	if (mem) {
		kl_t_point(t);
		kl_e_rm(e, code, op->opsize, n, KL_T_PTR);
	} else {
		r = kl_t_use(t, GPR(op->reg), H_S0);
		kl_e_rr(e, code, op->opsize, n, r);
	}
	if (code == 0xc1)
		kl_e8(e, (uint8_t)op->imm);
	if (!mem)
		kl_t_put(t, GPR(op->reg), r);
	kl_t_flags_set(t);
	return true;
}

/* SHLD and SHRD of registers. op->imm: 0x100 is by CL. */
static bool shift_double(struct kl_translation *t, struct kl_t_op *o, unsigned code)
{
	const struct kl_op *op = &o->op;
	bool cl = op->imm == 0x100;
	unsigned d, s;

	/* With 16 bits, counts above that are the processor's own business. */
	if (op->flags & KL_OPF_MEM || op->opsize < 4 || !kl_t_is_low(op->reg) ||
	    !kl_t_is_low(op->rm))
		return false;
	kl_t_flags_keep(t);
	s = kl_t_use(t, GPR(op->rm), H_S1);
	d = kl_t_use(t, GPR(op->reg), H_S0);
	kl_e_rr(&t->e, code | cl, op->opsize, s, d);
	if (!cl)
		kl_e8(&t->e, (uint8_t)op->imm);
	kl_t_put(t, GPR(op->reg), d);
	kl_t_flags_set(t);
	return true;
}

/* ---- products ---- */

static bool imul(struct kl_translation *t, struct kl_t_op *o)
{
	const struct kl_op *op = &o->op;
	struct kl_emit *e = &t->e;
	unsigned n = o->d.in.operand_count_visible, size = op->opsize, r, s = H_NONE;
	bool mem = op->flags & KL_OPF_MEM, small = op->imm == (uint64_t)(int8_t)op->imm;

	if (n < 2 || size < 4 || !kl_t_is_low(op->reg) ||
	    (mem ? !kl_t_can_address(t, o) : !kl_t_is_low(op->rm)))
		return false;
	if (mem)
		kl_t_access(t, o, size, false);
	kl_t_flags_keep(t);
	if (!mem)
		s = kl_t_use(t, GPR(op->rm), H_S1);
	r = n == 2 ? kl_t_use(t, GPR(op->reg), H_S0) : kl_t_dst(t, GPR(op->reg), H_S0);
	if (mem)
		kl_t_point(t);
	if (n == 2) {
		if (mem)
			kl_e_rm(e, 0x0faf, size, r, KL_T_PTR);
		else
			kl_e_rr(e, 0x0faf, size, r, s);
	} else {
		if (mem)
			kl_e_rm(e, small ? 0x6b : 0x69, size, r, KL_T_PTR);
		else
			kl_e_rr(e, small ? 0x6b : 0x69, size, r, s);
		emit_imm(e, small ? 1 : 4, (int32_t)op->imm);
	}
	kl_t_put(t, GPR(op->reg), r);
	kl_t_flags_set(t);
	return true;
}

/* MUL and IMUL with one operand, into rDX and rAX. */
static bool mul(struct kl_translation *t, struct kl_t_op *o, unsigned n)
{
	const struct kl_op *op = &o->op;
	struct kl_emit *e = &t->e;
	bool mem = o->d.opnd[0].type == ZYDIS_OPERAND_TYPE_MEMORY;
	unsigned s;

	if (o->d.in.operand_count_visible != 1 || op->opsize < 4 ||
	    (mem ? !kl_t_can_address(t, o) : !kl_t_is_low(op->reg)))
		return false;
	if (mem)
		kl_t_access(t, o, op->opsize, false);
	kl_t_flags_keep(t);
	if (mem) {
		kl_e_mov(e, H_RAX, kl_host_of[KL_RAX]);
		kl_t_point(t);
		kl_e_rm(e, 0xf7, op->opsize, n, KL_T_PTR);
	} else {
		s = kl_t_use(t, GPR(op->reg), H_S1);
		kl_e_mov(e, H_RAX, kl_host_of[KL_RAX]);
		kl_e_rr(e, 0xf7, op->opsize, n, s);
	}
	kl_e_mov(e, kl_host_of[KL_RAX], H_RAX);
	kl_t_flags_set(t);
	return true;
}

/* ---- with LOCK ---- */

static bool xadd(struct kl_translation *t, struct kl_t_op *o)
{
	const struct kl_op *op = &o->op;
	unsigned r;

	if (o->d.form != KL_FORM_MR || !kl_t_is_low(op->reg) || !kl_t_can_address(t, o))
		return false;
	kl_t_access(t, o, op->opsize, true);
	r = kl_t_use(t, GPR(op->reg), H_S0);
	kl_t_point(t);
	if (op->flags & KL_OPF_LOCK)
		kl_e8(&t->e, 0xf0);
	kl_e_rm(&t->e, 0x0fc1, op->opsize, r, KL_T_PTR);
	kl_t_put(t, GPR(op->reg), r);
	kl_t_flags_set(t);
	return true;
}

static bool cmpxchg(struct kl_translation *t, struct kl_t_op *o)
{
	const struct kl_op *op = &o->op;
	unsigned r;

	/* Both scratch registers are taken. */
	if (o->d.form != KL_FORM_MR || !kl_t_is_low(op->reg) || !kl_t_can_address(t, o) ||
	    kl_host_of[GPR(op->reg)] == H_NONE)
		return false;
	kl_t_access(t, o, op->opsize, true);
	r = kl_host_of[GPR(op->reg)];
	kl_e_mov(&t->e, H_RAX, kl_host_of[KL_RAX]);
	kl_t_point(t);
	if (op->flags & KL_OPF_LOCK)
		kl_e8(&t->e, 0xf0);
	kl_e_rm(&t->e, 0x0fb1, op->opsize, r, KL_T_PTR);
	kl_e_mov(&t->e, kl_host_of[KL_RAX], H_RAX);
	kl_t_flags_set(t);
	return true;
}

static bool carry(struct kl_translation *t, unsigned code)
{
	kl_t_flags_need(t);
	kl_e8(&t->e, code);
	kl_t_flags_set(t);
	return true;
}

static bool locked(struct kl_translation *t, struct kl_t_op *o)
{
	bool mem = (o->op.flags & KL_OPF_MEM) && o->d.opnd[0].type == ZYDIS_OPERAND_TYPE_MEMORY;

	return !(o->op.flags & KL_OPF_LOCK) || mem;
}

bool kl_lower_alu(struct kl_translation *t, struct kl_t_op *o)
{
	if (!locked(t, o))
		return false;
	switch (o->d.in.mnemonic) {
	case ZYDIS_MNEMONIC_ADD:
		return binary(t, o, ADD);
	case ZYDIS_MNEMONIC_OR:
		return binary(t, o, OR);
	case ZYDIS_MNEMONIC_ADC:
		return binary(t, o, ADC);
	case ZYDIS_MNEMONIC_SBB:
		return binary(t, o, SBB);
	case ZYDIS_MNEMONIC_AND:
		return binary(t, o, AND);
	case ZYDIS_MNEMONIC_SUB:
		return binary(t, o, SUB);
	case ZYDIS_MNEMONIC_XOR:
		return binary(t, o, XOR);
	case ZYDIS_MNEMONIC_CMP:
		return binary(t, o, CMP);
	case ZYDIS_MNEMONIC_TEST:
		return binary(t, o, TEST);
	case ZYDIS_MNEMONIC_INC:
		return unary(t, o, 0xff, 0, true, true);
	case ZYDIS_MNEMONIC_DEC:
		return unary(t, o, 0xff, 1, true, true);
	case ZYDIS_MNEMONIC_NOT:
		return unary(t, o, 0xf7, 2, false, false);
	case ZYDIS_MNEMONIC_NEG:
		return unary(t, o, 0xf7, 3, false, true);
	case ZYDIS_MNEMONIC_XADD:
		return xadd(t, o);
	case ZYDIS_MNEMONIC_CMPXCHG:
		return cmpxchg(t, o);
	default:
		break;
	}
	if (o->op.flags & KL_OPF_LOCK)
		return false;
	switch (o->d.in.mnemonic) {
	case ZYDIS_MNEMONIC_ROL:
		return shift(t, o, 0);
	case ZYDIS_MNEMONIC_ROR:
		return shift(t, o, 1);
	case ZYDIS_MNEMONIC_RCL:
		return shift(t, o, 2);
	case ZYDIS_MNEMONIC_RCR:
		return shift(t, o, 3);
	case ZYDIS_MNEMONIC_SHL:
		return shift(t, o, 4);
	case ZYDIS_MNEMONIC_SHR:
		return shift(t, o, 5);
	case ZYDIS_MNEMONIC_SAR:
		return shift(t, o, 7);
	case ZYDIS_MNEMONIC_SHLD:
		return shift_double(t, o, 0x0fa4);
	case ZYDIS_MNEMONIC_SHRD:
		return shift_double(t, o, 0x0fac);
	case ZYDIS_MNEMONIC_IMUL:
		return imul(t, o) || mul(t, o, 5);
	case ZYDIS_MNEMONIC_MUL:
		return mul(t, o, 4);
	case ZYDIS_MNEMONIC_CLC:
		return carry(t, 0xf8);
	case ZYDIS_MNEMONIC_STC:
		return carry(t, 0xf9);
	case ZYDIS_MNEMONIC_CMC:
		return carry(t, 0xf5);
	default:
		return false;
	}
}
