/* SPDX-License-Identifier: MIT */
/* PUSH POP PUSHA POPA ENTER LEAVE. op->opsize is what moves, kl_stack_mask() what rSP is. */
#include "x86/decode.h"
#include "x86/ops.h"

static enum kl_next push_r(struct kl_vcpu *v, const struct kl_op *op)
{
	kl_push(v, kl_gpr_get(v, op->reg, op->opsize), op->opsize);
	return KL_NEXT;
}

static enum kl_next push_r64(struct kl_vcpu *v, const struct kl_op *op)
{
	kl_push(v, *(uint64_t *)kl_gpr(v, op->reg), 8);
	return KL_NEXT;
}

static enum kl_next push_i(struct kl_vcpu *v, const struct kl_op *op)
{
	kl_push(v, op->imm, op->opsize);
	return KL_NEXT;
}

static enum kl_next push_m(struct kl_vcpu *v, const struct kl_op *op)
{
	kl_push(v, kl_mem_read(v, op, op->opsize), op->opsize);
	return KL_NEXT;
}

static enum kl_next pop_r(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t x = kl_stack_read(v, 0, op->opsize);

	kl_rsp_set(v, v->gpr[KL_RSP] + op->opsize);
	kl_gpr_set(v, op->reg, x, op->opsize); /* POP rSP: the value stays */
	return KL_NEXT;
}

static enum kl_next pop_r64(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t x = kl_stack_read(v, 0, 8);

	kl_rsp_set(v, v->gpr[KL_RSP] + 8);
	*(uint64_t *)kl_gpr(v, op->reg) = x;
	return KL_NEXT;
}

/* An rSP-relative destination is addressed after the pop: the decoder has added to disp. */
static enum kl_next pop_m(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t x = kl_stack_read(v, 0, op->opsize);

	kl_write(v, kl_mem_lin(v, op, op->opsize, true), x, op->opsize);
	kl_rsp_set(v, v->gpr[KL_RSP] + op->opsize);
	return KL_NEXT;
}

static enum kl_next pusha(struct kl_vcpu *v, const struct kl_op *op)
{
	unsigned size = op->opsize;

	for (unsigned i = 0; i < 8; i++)
		kl_stack_write(v, -(uint64_t)(i + 1) * size, v->gpr[i], size);
	kl_rsp_set(v, v->gpr[KL_RSP] - 8 * size);
	return KL_NEXT;
}

static enum kl_next popa(struct kl_vcpu *v, const struct kl_op *op)
{
	unsigned size = op->opsize;
	uint64_t x[8];

	for (unsigned i = 0; i < 8; i++)
		x[7 - i] = kl_stack_read(v, (uint64_t)i * size, size);
	for (unsigned i = 0; i < 8; i++)
		if (i != KL_RSP)
			kl_gpr_set(v, (uint8_t)(8 * i), x[i], size);
	kl_rsp_set(v, v->gpr[KL_RSP] + 8 * size);
	return KL_NEXT;
}

/* imm: bytes of locals; disp: nesting level. */
static enum kl_next enter(struct kl_vcpu *v, const struct kl_op *op)
{
	unsigned size = op->opsize, level = (unsigned)op->disp & 31;
	uint64_t off = -(uint64_t)size; /* of the last store, from rSP */
	uint64_t frame = v->gpr[KL_RSP] - size, mask = kl_stack_mask(v), sp;

	kl_stack_write(v, off, v->gpr[KL_RBP], size);
	for (unsigned i = 1; i < level; i++) {
		uint64_t bp = (v->gpr[KL_RBP] - i * size) & mask;
		uint64_t x = kl_read(v, kl_seg_linear(v, KL_SS, bp, size, false), size);

		off -= size;
		kl_stack_write(v, off, x, size);
	}
	if (level) {
		off -= size;
		kl_stack_write(v, off, frame & mask, size);
	}
	/* The new stack must be writable, too. */
	off -= op->imm;
	sp = (v->gpr[KL_RSP] + off) & mask;
	kl_mem_probe(v, kl_seg_linear(v, KL_SS, sp, size, true), size);
	kl_rsp_set(v, sp);
	kl_gpr_set(v, 8 * KL_RBP, frame, mask == 0xffff ? 2 : size);
	return KL_NEXT;
}

static enum kl_next leave(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t bp = v->gpr[KL_RBP] & kl_stack_mask(v);
	uint64_t x = kl_read(v, kl_seg_linear(v, KL_SS, bp, op->opsize, false), op->opsize);

	kl_rsp_set(v, bp + op->opsize);
	kl_gpr_set(v, 8 * KL_RBP, x, op->opsize);
	return KL_NEXT;
}

bool kl_select_stack(struct kl_decode *d)
{
	struct kl_op *op = d->op;

	switch (d->in.mnemonic) {
	case ZYDIS_MNEMONIC_PUSH:
		op->fn = d->form == KL_FORM_R   ? (op->opsize == 8 ? push_r64 : push_r)
			 : d->form == KL_FORM_I ? push_i
			 : d->form == KL_FORM_M ? push_m
						: NULL;
		d->stores = true;
		d->simple = d->form != KL_FORM_OTHER;
		break;
	case ZYDIS_MNEMONIC_POP:
		if (d->form == KL_FORM_M && op->base == KL_RSP)
			op->disp += op->opsize;
		op->fn = d->form == KL_FORM_R   ? (op->opsize == 8 ? pop_r64 : pop_r)
			 : d->form == KL_FORM_M ? pop_m
						: NULL;
		d->stores = d->form == KL_FORM_M;
		break;
	case ZYDIS_MNEMONIC_PUSHA:
	case ZYDIS_MNEMONIC_PUSHAD:
		op->fn = pusha;
		break;
	case ZYDIS_MNEMONIC_POPA:
	case ZYDIS_MNEMONIC_POPAD:
		op->fn = popa;
		break;
	case ZYDIS_MNEMONIC_ENTER:
		op->imm = d->opnd[0].imm.value.u & 0xffff;
		op->disp = (int64_t)(d->opnd[1].imm.value.u & 31);
		op->fn = enter;
		break;
	case ZYDIS_MNEMONIC_LEAVE:
		op->fn = leave;
		break;
	default:
		return false;
	}
	d->simple = false; /* the stack is memory that op->flags does not show */
	return op->fn;
}
