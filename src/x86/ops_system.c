/* SPDX-License-Identifier: MIT */
/* Which handler a system instruction has, and its operands as insn.h promises them. */
#include "x86/decode.h"

/* It ends its block: changes what a block depends on, or leaves guest mode. And it serialises. */
#define SERIALISES (KL_OPF_END | KL_OPF_EPOCH)

static const struct {
	uint16_t mnemonic;
	uint16_t flags;
	kl_op_fn *fn;
} table[] = {
#define OP(m, fn)                                          \
	{                                                  \
		ZYDIS_MNEMONIC_##m, SERIALISES, kl_op_##fn \
	}
/* It does not serialise. */
#define QUIET(m, fn)                                       \
	{                                                  \
		ZYDIS_MNEMONIC_##m, KL_OPF_END, kl_op_##fn \
	}
/* Neither. */
#define MILD(m, fn)                               \
	{                                         \
		ZYDIS_MNEMONIC_##m, 0, kl_op_##fn \
	}
	OP(CPUID, cpuid), /* it serialises: what is behind it is fetched afterwards */
	OP(RDMSR, rdmsr),
	OP(WRMSR, wrmsr),
	MILD(RDTSC, rdtsc),
	MILD(RDTSCP, rdtscp),
	MILD(RDPID, rdpid),
	MILD(RDPMC, rdpmc),
	OP(HLT, hlt),
	OP(PAUSE, pause),
	OP(MONITOR, monitor),
	OP(MWAIT, mwait),
	MILD(CLI, cli),
	QUIET(STI, sti),
	OP(CLTS, clts),
	OP(INVD, invd),
	OP(WBINVD, wbinvd),
	OP(INVLPG, invlpg),
	OP(INVPCID, invpcid),
	OP(LMSW, lmsw),
	MILD(SMSW, smsw),
	OP(LGDT, lgdt),
	OP(LIDT, lidt),
	OP(SGDT, sgdt),
	OP(SIDT, sidt),
	OP(LLDT, lldt),
	OP(LTR, ltr),
	OP(SLDT, sldt),
	OP(STR, str),
	OP(LAR, lar),
	OP(LSL, lsl),
	OP(VERR, verr),
	OP(VERW, verw),
	OP(ARPL, arpl),
	OP(INT, int_n),
	OP(INT3, int3),
	OP(INT1, int1),
	OP(INTO, into),
	OP(UD0, ud),
	OP(UD1, ud),
	OP(UD2, ud),
	QUIET(SYSCALL, syscall),
	QUIET(SYSRET, sysret),
	QUIET(SYSENTER, sysenter),
	QUIET(SYSEXIT, sysexit),
	MILD(SWAPGS, swapgs),
	MILD(RDFSBASE, rdfsbase),
	MILD(RDGSBASE, rdgsbase),
	MILD(WRFSBASE, wrfsbase),
	MILD(WRGSBASE, wrgsbase),
	OP(IN, in),
	OP(OUT, out),
	OP(INSB, ins),
	OP(INSW, ins),
	OP(INSD, ins),
	OP(OUTSB, outs),
	OP(OUTSW, outs),
	OP(OUTSD, outs),
	MILD(PUSHF, pushf),
	MILD(PUSHFD, pushf),
	MILD(PUSHFQ, pushf),
	QUIET(POPF, popf),
	QUIET(POPFD, popf),
	QUIET(POPFQ, popf),
	MILD(CLAC, clac),
	MILD(STAC, stac),
	MILD(XGETBV, xgetbv),
	OP(XSETBV, xsetbv),
	OP(VMCALL, vmcall),
	OP(VMMCALL, vmmcall),
	OP(FXSAVE, fxsave),
	OP(FXSAVE64, fxsave),
	OP(FXRSTOR, fxrstor),
	OP(FXRSTOR64, fxrstor),
	OP(XSAVE, xsave),
	OP(XSAVE64, xsave),
	OP(XSAVEOPT, xsave),
	OP(XSAVEOPT64, xsave),
	OP(XSAVEC, xsave),
	OP(XSAVEC64, xsave),
	OP(XSAVES, xsave),
	OP(XSAVES64, xsave),
	OP(XRSTOR, xrstor),
	OP(XRSTORS, xrstor),
	OP(XRSTORS64, xrstor),
	OP(XRSTOR64, xrstor),
	MILD(LDMXCSR, ldmxcsr),
	OP(STMXCSR, stmxcsr),
	OP(RSM, rsm),
	OP(CLFLUSH, clflush),
	OP(CLFLUSHOPT, clflush),
	OP(CLWB, clflush),
	OP(IRET, iret),
	OP(IRETD, iret),
	OP(IRETQ, iret),
#undef OP
#undef QUIET
#undef MILD
};

/* By mnemonic, filled at first use: index + 1 into table. */
static uint8_t lookup(ZydisMnemonic m)
{
	static uint8_t index[ZYDIS_MNEMONIC_MAX_VALUE + 1];
	static _Atomic bool ready;

	if (!atomic_load_explicit(&ready, memory_order_acquire)) {
		/* Racing threads store the same bytes. */
		for (unsigned i = 0; i < KL_ARRAY_SIZE(table); i++)
			__atomic_store_n(&index[table[i].mnemonic], (uint8_t)(i + 1),
					 __ATOMIC_RELAXED);
		atomic_store_explicit(&ready, true, memory_order_release);
	}
	return __atomic_load_n(&index[m], __ATOMIC_RELAXED);
}

static bool use(struct kl_decode *d, kl_op_fn *fn, uint16_t flags)
{
	d->op->fn = fn;
	d->op->flags |= flags;
	return true;
}

/* Number of a segment (kind 0), control (1) or debug register (2); -1: another. */
static int special(const ZydisDecodedOperand *o, int kind)
{
	static const struct {
		ZydisRegister first, last;
	} range[3] = {
		{ZYDIS_REGISTER_ES, ZYDIS_REGISTER_GS},
		{ZYDIS_REGISTER_CR0, ZYDIS_REGISTER_CR15},
		{ZYDIS_REGISTER_DR0, ZYDIS_REGISTER_DR15},
	};
	ZydisRegister r = o->reg.value;

	if (o->type != ZYDIS_OPERAND_TYPE_REGISTER || r < range[kind].first || r > range[kind].last)
		return -1;
	return (int)(r - range[kind].first);
}

/* MOV with a special register. d->op has the general one in reg or rm, or memory. */
static bool select_mov(struct kl_decode *d)
{
	static kl_op_fn *const fn[3][2] = {
		{kl_op_mov_from_sreg, kl_op_mov_to_sreg},
		{kl_op_mov_from_cr, kl_op_mov_to_cr},
		{kl_op_mov_from_dr, kl_op_mov_to_dr},
	};
	struct kl_op *op = d->op;

	for (int kind = 0; kind < 3; kind++) {
		for (int to = 0; to < 2; to++) {
			int n = special(&d->opnd[!to], kind);

			if (n < 0)
				continue;
			if (!(op->flags & KL_OPF_MEM))
				op->rm = op->reg == KL_NOREG ? op->rm : op->reg;
			op->reg = (uint8_t)n;
			op->opsize = (uint8_t)(d->opnd[to].size / 8);
			return use(d, fn[kind][to],
				   fn[kind][to] == kl_op_mov_from_cr ? 0 : SERIALISES);
		}
	}
	return false;
}

static bool select_far(struct kl_decode *d, kl_op_fn *fn)
{
	const ZydisDecodedOperand *o = &d->opnd[0];

	if (o->type == ZYDIS_OPERAND_TYPE_POINTER)
		d->op->imm = (uint64_t)o->ptr.segment << 32 | o->ptr.offset;
	d->op->opsize = d->in.operand_width / 8;
	return use(d, fn, SERIALISES);
}

static bool select_load_far(struct kl_decode *d, enum kl_seg seg)
{
	d->op->imm = seg;
	return use(d, kl_op_load_far_ptr, SERIALISES);
}

bool kl_select_system(struct kl_decode *d)
{
	struct kl_op *op = d->op;
	bool far = d->in.meta.branch_type == ZYDIS_BRANCH_TYPE_FAR;
	uint8_t i = lookup(d->in.mnemonic);
	int n;

	d->reads_flags = true;
	d->stores = true;
	switch (d->in.mnemonic) {
	case ZYDIS_MNEMONIC_MOV:
		return select_mov(d);
	case ZYDIS_MNEMONIC_PUSH:
	case ZYDIS_MNEMONIC_POP:
		n = special(&d->opnd[0], 0);
		if (n < 0)
			return false;
		op->reg = op->rm = (uint8_t)n;
		op->opsize = d->in.operand_width / 8;
		return use(d,
			   d->in.mnemonic == ZYDIS_MNEMONIC_PUSH ? kl_op_push_sreg : kl_op_pop_sreg,
			   SERIALISES);
	case ZYDIS_MNEMONIC_JMP:
		return far && select_far(d, kl_op_far_jmp);
	case ZYDIS_MNEMONIC_CALL:
		return far && select_far(d, kl_op_far_call);
	case ZYDIS_MNEMONIC_RET:
		op->imm &= 0xffff;
		return far && select_far(d, kl_op_far_ret);
	case ZYDIS_MNEMONIC_LES:
		return select_load_far(d, KL_ES);
	case ZYDIS_MNEMONIC_LDS:
		return select_load_far(d, KL_DS);
	case ZYDIS_MNEMONIC_LSS:
		return select_load_far(d, KL_SS);
	case ZYDIS_MNEMONIC_LFS:
		return select_load_far(d, KL_FS);
	case ZYDIS_MNEMONIC_LGS:
		return select_load_far(d, KL_GS);
	case ZYDIS_MNEMONIC_IN:
	case ZYDIS_MNEMONIC_OUT:
		n = d->in.mnemonic == ZYDIS_MNEMONIC_OUT;
		op->opsize = (uint8_t)(d->opnd[n].size / 8);
		op->reg = 0;
		op->rm = d->opnd[!n].type == ZYDIS_OPERAND_TYPE_REGISTER ? 8 * KL_RDX : KL_NOREG;
		op->imm &= 0xff;
		break;
	case ZYDIS_MNEMONIC_INSB:
	case ZYDIS_MNEMONIC_OUTSB:
		op->opsize = 1;
		break;
	case ZYDIS_MNEMONIC_INSW:
	case ZYDIS_MNEMONIC_OUTSW:
		op->opsize = 2;
		break;
	case ZYDIS_MNEMONIC_INSD:
	case ZYDIS_MNEMONIC_OUTSD:
		op->opsize = 4;
		break;
	case ZYDIS_MNEMONIC_INT:
		op->imm &= 0xff;
		break;
	case ZYDIS_MNEMONIC_LGDT:
	case ZYDIS_MNEMONIC_LIDT:
	case ZYDIS_MNEMONIC_SGDT:
	case ZYDIS_MNEMONIC_SIDT:
		op->opsize = d->mode == KL_CODE64 ? 8 : d->in.operand_width / 8;
		break;
	case ZYDIS_MNEMONIC_ARPL:
		if (!(op->flags & KL_OPF_MEM)) {
			uint8_t dst = op->reg;

			op->reg = op->rm;
			op->rm = dst;
		}
		break;
	case ZYDIS_MNEMONIC_FXSAVE:
	case ZYDIS_MNEMONIC_FXRSTOR:
	case ZYDIS_MNEMONIC_XSAVE:
	case ZYDIS_MNEMONIC_XSAVEOPT:
	case ZYDIS_MNEMONIC_XSAVEC:
	case ZYDIS_MNEMONIC_XSAVES:
	case ZYDIS_MNEMONIC_XRSTOR:
	case ZYDIS_MNEMONIC_XRSTORS:
		op->opsize = 4;
		break;
	case ZYDIS_MNEMONIC_FXSAVE64:
	case ZYDIS_MNEMONIC_FXRSTOR64:
	case ZYDIS_MNEMONIC_XSAVE64:
	case ZYDIS_MNEMONIC_XSAVEOPT64:
	case ZYDIS_MNEMONIC_XSAVEC64:
	case ZYDIS_MNEMONIC_XSAVES64:
	case ZYDIS_MNEMONIC_XRSTOR64:
	case ZYDIS_MNEMONIC_XRSTORS64:
		op->opsize = 8;
		break;
	case ZYDIS_MNEMONIC_SYSRET:
	case ZYDIS_MNEMONIC_SYSEXIT:
	case ZYDIS_MNEMONIC_IRET:
	case ZYDIS_MNEMONIC_IRETD:
	case ZYDIS_MNEMONIC_IRETQ:
	case ZYDIS_MNEMONIC_PUSHF:
	case ZYDIS_MNEMONIC_PUSHFD:
	case ZYDIS_MNEMONIC_PUSHFQ:
	case ZYDIS_MNEMONIC_POPF:
	case ZYDIS_MNEMONIC_POPFD:
	case ZYDIS_MNEMONIC_POPFQ:
		op->opsize = d->in.operand_width / 8;
		break;
	default:
		if (i && !(op->flags & KL_OPF_MEM) && op->rm == KL_NOREG)
			op->rm = op->reg; /* one register operand: it is both */
		break;
	}
	if (!i)
		return false;
	op->fn = table[i - 1].fn;
	op->flags |= table[i - 1].flags;
	return true;
}
