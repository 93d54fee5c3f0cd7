/* SPDX-License-Identifier: MIT */
/*
 * BT BTS BTR BTC, BSF BSR LZCNT TZCNT POPCNT, BMI1 and BMI2, ADCX ADOX, CRC32, MOVBE, and two that
 * have their operands in fixed registers: DIV IDIV, CMPXCHG8B CMPXCHG16B.
 */
#include "x86/xlate/lower.h"

#define GPR(off) ((off) / 8u)

static bool in_memory(const struct kl_t_op *o)
{
	return o->op.flags & KL_OPF_MEM;
}

/* The source: a register or memory that can be had. */
static bool can_read(const struct kl_translation *t, const struct kl_t_op *o)
{
	return in_memory(o) ? kl_t_can_address(t, o) : kl_t_is_low(o->op.rm);
}

/* @code of register @d, which is read and written, and the other operand: @s if it is a register.
 */
static void two_operands(struct kl_translation *t, const struct kl_t_op *o, unsigned code,
			 unsigned size, unsigned d, unsigned s)
{
	unsigned r;

	if (!in_memory(o))
		s = kl_t_use(t, s, H_S1);
	r = kl_t_use(t, d, H_S0);
	if (in_memory(o)) {
		kl_t_point(t);
		kl_e_rm(&t->e, code, size, r, KL_T_PTR);
	} else {
		kl_e_rr(&t->e, code, size, r, s);
	}
	kl_t_put(t, d, r);
}

/* ---- single bits ---- */

/* BT BTS BTR BTC are /4../7. */
static bool bit_register(struct kl_translation *t, struct kl_t_op *o, unsigned n)
{
	const struct kl_op *op = &o->op;
	struct kl_emit *e = &t->e;
	unsigned d, s;

	if (op->opsize < 4 || !kl_t_is_low(op->reg) ||
	    (o->d.form == KL_FORM_RR && !kl_t_is_low(op->rm)))
		return false;
	kl_t_flags_keep(t);
	if (o->d.form == KL_FORM_RR) {
		s = kl_t_use(t, GPR(op->rm), H_S1);
		d = kl_t_use(t, GPR(op->reg), H_S0);
		kl_e_rr(e, 0x0f83u | n << 3, op->opsize, s, d);
	} else {
		d = kl_t_use(t, GPR(op->reg), H_S0);
		kl_e_rr(e, 0x0fba, op->opsize == 8 ? 8 : 0, n, d);
		kl_e8(e, (uint8_t)o->d.in.raw.imm[0].value.u);
	}
	if (n != 4)
		kl_t_put(t, GPR(op->reg), d);
	kl_t_flags_set(t);
	return true;
}

/* A register's offset may be into any unit before or behind the operand. */
static bool bit_memory(struct kl_translation *t, struct kl_t_op *o, unsigned n)
{
	const struct kl_op *op = &o->op;
	struct kl_emit *e = &t->e;
	unsigned size = op->opsize, s;
	bool far = o->d.form == KL_FORM_MR;

	if (size < 4 || op->addrsize != 8 || !kl_t_can_address(t, o) ||
	    (far && !kl_t_is_low(op->reg)))
		return false;
	if (!far) {
		kl_t_access(t, o, size, n != 4);
		kl_t_flags_keep(t);
		kl_t_point(t);
		if (op->flags & KL_OPF_LOCK)
			kl_e8(e, 0xf0);
		kl_e_rm(e, 0x0fba, size == 8 ? 8 : 0, n, KL_T_PTR);
		kl_e8(e, (uint8_t)(op->imm & (8 * size - 1)));
		kl_t_flags_set(t);
		return true;
	}
	kl_t_flags_clobber(t);
	kl_t_forget_pointer(t);
	kl_t_address(t, o, H_S1, true);
	s = kl_t_use(t, GPR(op->reg), H_S0);
	kl_e_rr(e, size == 8 ? 0x8b : 0x63, 8, H_S0, s); /* movsxd of 32 bits */
	kl_e_rr(e, 0xc1, 8, 7, H_S0), kl_e8(e, size == 8 ? 6 : 5);
	kl_e_lea(e, 8, H_S1,
		 (struct kl_mem){.base = H_S1, .index = H_S0, .scale = size == 8 ? 3 : 2});
	kl_t_check(t, size, n != 4);
	kl_e_rr(e, 0x8b, 4, H_S0, kl_t_use(t, GPR(op->reg), H_S0));
	kl_e_alu_ri(e, 4, 4, H_S0, (int32_t)(8 * size - 1));
	if (t->at->live_after) {
		kl_e_store(e, H_S0, KL_CTX(branch_target));
		kl_t_flags_keep(t);
		kl_e_load(e, H_S0, KL_CTX(branch_target));
	}
	kl_t_point(t);
	if (op->flags & KL_OPF_LOCK)
		kl_e8(e, 0xf0);
	kl_e_rm(e, 0x0f83u | n << 3, size, H_S0, KL_T_PTR);
	kl_t_flags_set(t);
	return true;
}

static bool bit(struct kl_translation *t, struct kl_t_op *o, unsigned n)
{
	switch (o->d.form) {
	case KL_FORM_RR:
	case KL_FORM_RI:
		return !(o->op.flags & KL_OPF_LOCK) && bit_register(t, o, n);
	case KL_FORM_MR:
	case KL_FORM_MI:
		return bit_memory(t, o, n);
	default:
		return false;
	}
}

/* ---- scans, counts, and others with two operands ---- */

static bool scan(struct kl_translation *t, struct kl_t_op *o, unsigned code)
{
	if (o->op.opsize < 4 || !kl_t_is_low(o->op.reg) || !can_read(t, o))
		return false;
	if (in_memory(o))
		kl_t_access(t, o, o->op.opsize, false);
	kl_t_flags_keep(t);
	two_operands(t, o, code, o->op.opsize, GPR(o->op.reg), GPR(o->op.rm));
	kl_t_flags_set(t);
	return true;
}

/* ADCX ADOX */
static bool add_carry(struct kl_translation *t, struct kl_t_op *o, unsigned code)
{
	const ZydisDecodedOperand *d = &o->d.opnd[0], *s = &o->d.opnd[1];
	unsigned size = d->size / 8;

	/* Run in a thunk, they have registers' numbers elsewhere. */
	if (!o->op.thunk || !kl_is_gpr(d) || (!kl_is_gpr(s) && !kl_t_can_address(t, o)))
		return false;
	if (in_memory(o))
		kl_t_access(t, o, size, false);
	kl_t_flags_need(t);
	two_operands(t, o, code, size, kl_register_number(d),
		     in_memory(o) ? 0 : kl_register_number(s));
	kl_t_flags_set(t);
	return true;
}

static bool crc32(struct kl_translation *t, struct kl_t_op *o)
{
	unsigned size = o->d.opnd[1].size / 8;

	if (!__builtin_cpu_supports("sse4.2") || !kl_t_is_low(o->op.reg) || !can_read(t, o))
		return false;
	if (in_memory(o))
		kl_t_access(t, o, size, false);
	two_operands(t, o, KL_PF2 | 0x0f38f1, size, GPR(o->op.reg), GPR(o->op.rm));
	return true;
}

static void bswap(struct kl_emit *e, unsigned size, unsigned r)
{
	if (size == 8 || r >> 3)
		kl_e8(e, 0x40 | (size == 8 ? 8u : 0u) | r >> 3);
	kl_e8(e, 0x0f);
	kl_e8(e, 0xc8 | (r & 7));
}

static bool movbe(struct kl_translation *t, struct kl_t_op *o)
{
	const struct kl_op *op = &o->op;
	bool store = o->d.form == KL_FORM_MR;
	unsigned size = op->opsize, r;

	if ((!store && o->d.form != KL_FORM_RM) || size < 4 || !kl_t_is_low(op->reg) ||
	    !kl_t_can_address(t, o))
		return false;
	kl_t_access(t, o, size, store);
	if (store) {
		r = kl_t_use(t, GPR(op->reg), H_S0);
		kl_e_rr(&t->e, 0x8b, size, H_S0, r);
		bswap(&t->e, size, H_S0);
		kl_t_point(t);
		kl_e_rm(&t->e, 0x89, size, H_S0, KL_T_PTR);
		return true;
	}
	r = kl_t_dst(t, GPR(op->reg), H_S0);
	kl_t_point(t);
	kl_e_rm(&t->e, 0x8b, size, r, KL_T_PTR);
	bswap(&t->e, size, r);
	kl_t_put(t, GPR(op->reg), r);
	return true;
}

/* ---- BMI: VEX with general registers ---- */

static bool bmi(struct kl_translation *t, struct kl_t_op *o)
{
	const ZydisDecodedInstruction *in = &o->d.in;
	const ZydisDecodedOperand *reg = kl_t_field(o, ZYDIS_OPERAND_ENCODING_MODRM_REG);
	const ZydisDecodedOperand *rm = kl_t_field(o, ZYDIS_OPERAND_ENCODING_MODRM_RM);
	const ZydisDecodedOperand *vvvv = kl_t_field(o, ZYDIS_OPERAND_ENCODING_NDSNDD);
	bool flags = in->cpu_flags->modified | in->cpu_flags->undefined, mem, two;
	unsigned r = in->raw.modrm.reg, v = 0, m = H_S1;

	if (!o->op.thunk || !rm || (reg && !kl_is_gpr(reg)) || (vvvv && !kl_is_gpr(vvvv)))
		return false;
	mem = rm->type == ZYDIS_OPERAND_TYPE_MEMORY;
	if (mem ? !kl_t_can_address(t, o) : !kl_is_gpr(rm))
		return false;
	if (mem)
		kl_t_access(t, o, rm->size / 8, false);
	if (flags)
		kl_t_flags_keep(t);
	if (!mem)
		m = kl_t_use(t, kl_register_number(rm), H_S1);
	/* Without reg's, the destination is vvvv's; MULX has two. */
	two = reg && vvvv && (vvvv->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE);
	if (vvvv && (two || !reg))
		v = kl_t_dst(t, kl_register_number(vvvv), two ? H_S1 : H_S0);
	else if (vvvv)
		v = kl_t_use(t, kl_register_number(vvvv), H_S0);
	if (reg)
		r = kl_t_dst(t, kl_register_number(reg), H_S0);
	if (mem)
		kl_t_point(t);
	kl_e_vex(&t->e,
		 (struct kl_vex){(uint8_t)in->opcode_map, in->raw.vex.pp,
				 t->word == 8 ? in->raw.vex.W : 0, 0},
		 r, v, m);
	kl_e8(&t->e, in->opcode);
	if (mem)
		kl_e_modrm_mem(&t->e, r, KL_T_PTR);
	else
		kl_e8(&t->e, 0xc0 | (r & 7) << 3 | (m & 7));
	if (in->raw.imm[0].size)
		kl_e8(&t->e, (uint8_t)in->raw.imm[0].value.u);
	if (vvvv && (two || !reg))
		kl_t_put(t, kl_register_number(vvvv), v);
	if (reg) /* if both are the same, this is what stays */
		kl_t_put(t, kl_register_number(reg), r);
	if (flags)
		kl_t_flags_set(t);
	return true;
}

/* ---- operands in fixed registers ---- */

/*
 * The host's must not raise #DE. DIV: it does not if rDX is below the divisor. IDIV: nor if rDX is
 * rAX's sign, and the divisor neither 0 nor -1. The divisor is read once, since memory may change.
 */
static bool divide(struct kl_translation *t, struct kl_t_op *o, bool sign)
{
	unsigned size = o->op.opsize, rax = kl_host_of[KL_RAX], s;
	bool mem = o->d.opnd[0].type == ZYDIS_OPERAND_TYPE_MEMORY;
	struct kl_emit *e = &t->e;

	_Static_assert((int)KL_RDX == (int)H_RDX, "where DIV wants it");
	if (size < 4 || (mem ? !kl_t_can_address(t, o) : !kl_t_is_low(o->op.reg)))
		return false;
	kl_t_flags_clobber(t);
	if (mem) {
		kl_t_access(t, o, size, false);
		kl_t_point(t);
		kl_e_rm(e, 0x8b, size, H_S1, KL_T_PTR);
		kl_t_forget_pointer(t);
		s = H_S1;
	} else {
		s = kl_t_use(t, GPR(o->op.reg), H_S1);
	}
	if (sign) {
		kl_e_mov(e, H_S0, rax);
		kl_e_rr(e, 0xc1, size, 7, H_S0), kl_e8(e, size == 8 ? 63 : 31);
		kl_e_rr(e, 0x3b, size, H_S0, H_RDX);
		kl_t_slow_if(t, 5);
		kl_e_lea(e, size, H_S0, KL_AT(s, 1));
		kl_e_alu_ri(e, 7, size, H_S0, 1);
		kl_t_slow_if(t, 6);
	} else {
		kl_e_rr(e, 0x3b, size, H_RDX, s);
		kl_t_slow_if(t, 3);
	}
	kl_t_flags_keep(t);
	kl_e_mov(e, H_RAX, rax);
	kl_e_rr(e, 0xf7, size, sign ? 7 : 6, s);
	kl_e_mov(e, rax, H_RAX);
	kl_t_flags_set(t);
	return true;
}

static bool cmpxchg_pair(struct kl_translation *t, struct kl_t_op *o, unsigned size)
{
	struct kl_emit *e = &t->e;

	_Static_assert((int)KL_RBX == (int)H_RBX && (int)KL_RCX == (int)H_RCX &&
			       (int)KL_RDX == (int)H_RDX,
		       "where it wants them");
	if (!kl_t_can_address(t, o))
		return false;
	kl_t_access(t, o, size, true);
	if (size == 16) /* else #GP */
		kl_t_aligned(t, 16);
	kl_t_flags_keep(t);
	kl_e_mov(e, H_RAX, kl_host_of[KL_RAX]);
	kl_t_point(t);
	if (o->op.flags & KL_OPF_LOCK)
		kl_e8(e, 0xf0);
	kl_e_rm(e, 0x0fc7, size == 16 ? 8 : 0, 1, KL_T_PTR);
	kl_e_mov(e, kl_host_of[KL_RAX], H_RAX);
	kl_t_flags_set(t);
	return true;
}

bool kl_lower_bit(struct kl_translation *t, struct kl_t_op *o)
{
	if ((o->op.flags & KL_OPF_LOCK) && !in_memory(o))
		return false;
	switch (o->d.in.mnemonic) {
	case ZYDIS_MNEMONIC_BT:
		return !(o->op.flags & KL_OPF_LOCK) && bit(t, o, 4);
	case ZYDIS_MNEMONIC_BTS:
		return bit(t, o, 5);
	case ZYDIS_MNEMONIC_BTR:
		return bit(t, o, 6);
	case ZYDIS_MNEMONIC_BTC:
		return bit(t, o, 7);
	case ZYDIS_MNEMONIC_CMPXCHG8B:
		return cmpxchg_pair(t, o, 8);
	case ZYDIS_MNEMONIC_CMPXCHG16B:
		return cmpxchg_pair(t, o, 16);
	default:
		break;
	}
	if (o->op.flags & KL_OPF_LOCK)
		return false;
	switch (o->d.in.mnemonic) {
	case ZYDIS_MNEMONIC_BSF:
		return scan(t, o, 0x0fbc);
	case ZYDIS_MNEMONIC_BSR:
		return scan(t, o, 0x0fbd);
	case ZYDIS_MNEMONIC_TZCNT:
		return scan(t, o, KL_PF3 | 0x0fbc);
	case ZYDIS_MNEMONIC_LZCNT:
		return scan(t, o, KL_PF3 | 0x0fbd);
	case ZYDIS_MNEMONIC_POPCNT:
		return scan(t, o, KL_PF3 | 0x0fb8);
	case ZYDIS_MNEMONIC_ADCX:
		return add_carry(t, o, KL_P66 | 0x0f38f6);
	case ZYDIS_MNEMONIC_ADOX:
		return add_carry(t, o, KL_PF3 | 0x0f38f6);
	case ZYDIS_MNEMONIC_CRC32:
		return crc32(t, o);
	case ZYDIS_MNEMONIC_MOVBE:
		return movbe(t, o);
	case ZYDIS_MNEMONIC_DIV:
		return divide(t, o, false);
	case ZYDIS_MNEMONIC_IDIV:
		return divide(t, o, true);
	case ZYDIS_MNEMONIC_ANDN:
	case ZYDIS_MNEMONIC_BEXTR:
	case ZYDIS_MNEMONIC_BLSI:
	case ZYDIS_MNEMONIC_BLSMSK:
	case ZYDIS_MNEMONIC_BLSR:
	case ZYDIS_MNEMONIC_BZHI:
	case ZYDIS_MNEMONIC_MULX:
	case ZYDIS_MNEMONIC_PDEP:
	case ZYDIS_MNEMONIC_PEXT:
	case ZYDIS_MNEMONIC_RORX:
	case ZYDIS_MNEMONIC_SARX:
	case ZYDIS_MNEMONIC_SHLX:
	case ZYDIS_MNEMONIC_SHRX:
		return bmi(t, o);
	default:
		return false;
	}
}
