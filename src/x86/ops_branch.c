/* SPDX-License-Identifier: MIT */
/* Near branches: Jcc JMP CALL RET LOOP JCXZ. */
#include "host/cpu.h"
#include "x86/decode.h"
#include "x86/ops.h"

static bool branch_ok(struct kl_vcpu *v, uint64_t target)
{
	unsigned shift = v->cr4 & KL_CR4_LA57 ? 7 : 16;

	if (v->code_mode != KL_CODE64)
		return target <= v->seg[KL_CS].limit;
	return (uint64_t)((int64_t)(target << shift) >> shift) == target;
}

void kl_branch_check_slow(struct kl_vcpu *v, uint64_t target)
{
	if (!branch_ok(v, target))
		kl_raise_error(v, KL_EXC_GP, 0);
}

/* Where a relative branch goes, truncated to the operand size. */
KL_INLINE uint64_t target(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t t = v->rip + op->len + op->imm;

	return op->opsize == 8 ? t : op->opsize == 4 ? (uint32_t)t : (uint16_t)t;
}

KL_INLINE enum kl_next jump(struct kl_vcpu *v, uint64_t t)
{
	kl_branch_check(v, t);
	v->rip = t;
	return KL_JUMPED;
}

#define JCC(n)                                                                   \
	static enum kl_next jcc##n(struct kl_vcpu *v, const struct kl_op *op)    \
	{                                                                        \
		return kl_cond(v->rflags, n) ? jump(v, target(v, op)) : KL_NEXT; \
	}
#define EACH_CC(X) \
	X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)
EACH_CC(JCC)

#define JCC_ROW(n) jcc##n,
static kl_op_fn *const jcc[16] = {EACH_CC(JCC_ROW)};

static enum kl_next jmp_rel(struct kl_vcpu *v, const struct kl_op *op)
{
	return jump(v, target(v, op));
}

KL_INLINE uint64_t indirect(struct kl_vcpu *v, const struct kl_op *op)
{
	return op->flags & KL_OPF_MEM ? kl_mem_read(v, op, op->opsize)
				      : kl_gpr_get(v, op->reg, op->opsize);
}

static enum kl_next jmp_indirect(struct kl_vcpu *v, const struct kl_op *op)
{
	return jump(v, indirect(v, op));
}

/* A call to nowhere: a fault of the stack comes first; Intel's processors have pushed by then. */
static KL_COLD KL_NORETURN void bad_call(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t sp = (v->gpr[KL_RSP] - op->opsize) & kl_stack_mask(v);
	uint64_t lin = kl_seg_linear(v, KL_SS, sp, op->opsize, true);

	if (kl_host_is_intel())
		kl_write(v, lin, kl_next_rip(v, op), op->opsize);
	else
		kl_mem_probe(v, lin, op->opsize);
	kl_raise_error(v, KL_EXC_GP, 0);
}

KL_INLINE enum kl_next call(struct kl_vcpu *v, const struct kl_op *op, uint64_t t)
{
	if (KL_UNLIKELY(!branch_ok(v, t)))
		bad_call(v, op);
	kl_push(v, kl_next_rip(v, op), op->opsize);
	v->rip = t;
	return KL_JUMPED;
}

static enum kl_next call_rel(struct kl_vcpu *v, const struct kl_op *op)
{
	return call(v, op, target(v, op));
}

static enum kl_next call_indirect(struct kl_vcpu *v, const struct kl_op *op)
{
	return call(v, op, indirect(v, op));
}

/* RET and RET imm16. */
static enum kl_next ret(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t t = kl_stack_read(v, 0, op->opsize);

	kl_branch_check(v, t);
	kl_rsp_set(v, v->gpr[KL_RSP] + op->opsize + op->imm);
	v->rip = t;
	return KL_JUMPED;
}

/* LOOP LOOPE LOOPNE: cond 0, or 1 + the wanted ZF. The counter has the address size. */
static enum kl_next loop(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t n = kl_gpr_get(v, 8 * KL_RCX, op->addrsize) - 1;
	bool go = op->cond == 0 || !!(v->rflags & KL_FL_ZF) == op->cond - 1;
	uint64_t t = target(v, op);

	n = op->addrsize == 8 ? n : op->addrsize == 4 ? (uint32_t)n : (uint16_t)n;
	go = go && n;
	if (go)
		kl_branch_check(v, t);
	kl_gpr_set(v, 8 * KL_RCX, n, op->addrsize);
	if (!go)
		return KL_NEXT;
	v->rip = t;
	return KL_JUMPED;
}

static enum kl_next jcxz(struct kl_vcpu *v, const struct kl_op *op)
{
	return kl_gpr_get(v, 8 * KL_RCX, op->addrsize) ? KL_NEXT : jump(v, target(v, op));
}

/* In 64-bit code an operand-size prefix counts on processors of AMD, unless REX.W does. */
static bool has_16bit_target(const ZydisDecodedInstruction *in)
{
	for (unsigned i = 0; i < in->raw.prefix_count; i++)
		if (in->raw.prefixes[i].value == 0x66)
			return !in->raw.rex.W && !kl_host_is_intel();
	return false;
}

static bool branch(struct kl_decode *d, kl_op_fn *fn)
{
	if (d->mode == KL_CODE64)
		d->op->opsize = has_16bit_target(&d->in) ? 2 : 8;
	d->op->fn = fn;
	d->op->flags |= KL_OPF_END;
	d->reads_flags = true;
	return true;
}

static bool conditional(struct kl_decode *d, unsigned cc)
{
	d->op->cond = (uint8_t)cc;
	return branch(d, jcc[cc]);
}

bool kl_select_branch(struct kl_decode *d)
{
	bool rel = d->opnd[0].type == ZYDIS_OPERAND_TYPE_IMMEDIATE;

	if (d->in.meta.branch_type == ZYDIS_BRANCH_TYPE_FAR)
		return false;
	switch (d->in.mnemonic) {
#define CC(n, sfx)                  \
	case ZYDIS_MNEMONIC_J##sfx: \
		return conditional(d, n);
		KL_CONDITIONS(CC)
#undef CC
	case ZYDIS_MNEMONIC_JMP:
		return branch(d, rel ? jmp_rel : jmp_indirect);
	case ZYDIS_MNEMONIC_CALL:
		return branch(d, rel ? call_rel : call_indirect);
	case ZYDIS_MNEMONIC_RET:
		d->op->imm &= 0xffff;
		return branch(d, ret);
	case ZYDIS_MNEMONIC_LOOP:
		d->op->cond = 0;
		return branch(d, loop);
	case ZYDIS_MNEMONIC_LOOPE:
		d->op->cond = 2;
		return branch(d, loop);
	case ZYDIS_MNEMONIC_LOOPNE:
		d->op->cond = 1;
		return branch(d, loop);
	case ZYDIS_MNEMONIC_JCXZ:
	case ZYDIS_MNEMONIC_JECXZ:
	case ZYDIS_MNEMONIC_JRCXZ:
		return branch(d, jcxz);
	default:
		return false;
	}
}
