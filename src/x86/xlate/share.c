/* SPDX-License-Identifier: MIT */
/*
 * Accesses that one TLB check may serve: operands with the same registers in their addresses, a few
 * hundred bytes apart, with nothing in between that changes those by an unknown amount. Pushes,
 * pops, calls and returns are such, too.
 *
 * This is a plan only. Whether the pointer is still there when the next access of the group comes
 * is seen when it is emitted (kl_t_access()): if not, that access checks for the rest of the group.
 */
#include "x86/xlate/lower.h"

#define MAX_SPAN 512

/* The group that is being made. */
struct group {
	uint8_t number, base, index, scale;
	int64_t low, high;
	int64_t delta; /* the base's value now, less what it was at the first access */
	bool write, jumped;
};

struct access {
	uint8_t base, index, scale;
	int64_t disp;
	unsigned size;
	bool write;
};

/* Of what is known here: registers it changes are among its operands. */
static bool is_plain(const struct kl_t_op *o)
{
	if (o->op.flags & (KL_OPF_REP | KL_OPF_REPNE) &&
	    o->d.in.opcode_map == ZYDIS_OPCODE_MAP_DEFAULT)
		return false;
	switch (o->d.in.meta.category) {
	case ZYDIS_CATEGORY_BINARY:
	case ZYDIS_CATEGORY_LOGICAL:
	case ZYDIS_CATEGORY_LOGICAL_FP:
	case ZYDIS_CATEGORY_DATAXFER:
	case ZYDIS_CATEGORY_SHIFT:
	case ZYDIS_CATEGORY_ROTATE:
	case ZYDIS_CATEGORY_CMOV:
	case ZYDIS_CATEGORY_SETCC:
	case ZYDIS_CATEGORY_BITBYTE:
	case ZYDIS_CATEGORY_COND_BR:
	case ZYDIS_CATEGORY_NOP:
	case ZYDIS_CATEGORY_WIDENOP:
	case ZYDIS_CATEGORY_SSE:
	case ZYDIS_CATEGORY_AVX:
	case ZYDIS_CATEGORY_AVX2:
	case ZYDIS_CATEGORY_VFMA:
	case ZYDIS_CATEGORY_CONVERT:
	case ZYDIS_CATEGORY_BROADCAST:
		return true;
	case ZYDIS_CATEGORY_CALL:
	case ZYDIS_CATEGORY_RET:
		return o->d.in.meta.branch_type != ZYDIS_BRANCH_TYPE_FAR;
	default:
		return o->d.in.mnemonic == ZYDIS_MNEMONIC_PUSH ||
		       o->d.in.mnemonic == ZYDIS_MNEMONIC_POP ||
		       o->d.in.mnemonic == ZYDIS_MNEMONIC_LEA;
	}
}

/* Does it access the stack and nothing else, as lower_mov.c and lower_branch.c have it? */
static bool stack_access(const struct kl_translation *t, const struct kl_t_op *o, struct access *a)
{
	*a = (struct access){KL_RSP, KL_NOREG, 0, 0, t->word, false};
	if (o->op.opsize != t->word || (o->op.flags & KL_OPF_MEM))
		return false;
	switch (o->d.in.mnemonic) {
	case ZYDIS_MNEMONIC_PUSH:
	case ZYDIS_MNEMONIC_CALL:
		a->disp = -(int64_t)t->word;
		a->write = true;
		return true;
	case ZYDIS_MNEMONIC_POP:
	case ZYDIS_MNEMONIC_RET:
		return true;
	default:
		return false;
	}
}

static bool find_access(const struct kl_translation *t, const struct kl_t_op *o, struct access *a)
{
	const struct kl_op *op = &o->op;

	if (stack_access(t, o, a))
		return true;
	if (!kl_t_can_address(t, o) || op->seg >= KL_FS || op->addrsize != t->word ||
	    o->d.in.meta.category == ZYDIS_CATEGORY_BITBYTE || op->disp != (int32_t)op->disp)
		return false;
	for (unsigned i = 0; i < o->d.in.operand_count_visible; i++) {
		const ZydisDecodedOperand *x = &o->d.opnd[i];

		if (x->type != ZYDIS_OPERAND_TYPE_MEMORY || x->mem.type != ZYDIS_MEMOP_TYPE_MEM ||
		    !x->size || x->size > 256)
			continue;
		*a = (struct access){op->base,    op->index,
				     op->scale,   op->disp,
				     x->size / 8, x->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE};
		return true;
	}
	return false;
}

static bool writes(const struct kl_t_op *o, uint8_t n)
{
	for (unsigned i = 0; i < o->d.in.operand_count; i++) {
		const ZydisDecodedOperand *x = &o->d.opnd[i];

		if (x->type == ZYDIS_OPERAND_TYPE_REGISTER &&
		    (x->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE) &&
		    ZydisRegisterGetClass(ZydisRegisterGetLargestEnclosing(
			    ZYDIS_MACHINE_MODE_LONG_64, x->reg.value)) == ZYDIS_REGCLASS_GPR64 &&
		    ZydisRegisterGetId(ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64,
									x->reg.value)) == n)
			return true;
	}
	return false;
}

/* By how much it changes register @n; false: by nobody knows how much. */
static bool adds(const struct kl_translation *t, const struct kl_t_op *o, uint8_t n, int64_t *by)
{
	const struct kl_op *op = &o->op;

	*by = 0;
	if (n == KL_NOREG || !writes(o, n))
		return true;
	if (op->opsize != t->word)
		return false;
	switch (o->d.in.mnemonic) {
	case ZYDIS_MNEMONIC_PUSH:
		*by = -(int64_t)t->word;
		return n == KL_RSP;
	case ZYDIS_MNEMONIC_POP:
		*by = t->word;
		return n == KL_RSP && !(op->flags & KL_OPF_MEM) && op->reg != 8 * KL_RSP;
	case ZYDIS_MNEMONIC_ADD:
	case ZYDIS_MNEMONIC_SUB:
		*by = o->d.in.mnemonic == ZYDIS_MNEMONIC_ADD ? kl_t_imm(o) : -kl_t_imm(o);
		return o->d.form == KL_FORM_RI;
	case ZYDIS_MNEMONIC_LEA:
		*by = op->disp;
		return op->base == n && op->index == KL_NOREG && op->addrsize == t->word &&
		       op->disp == (int32_t)op->disp;
	default:
		return false;
	}
}

/* @a, as a distance from where the base was, belongs to @g. */
static bool joins(const struct group *g, const struct access *a)
{
	int64_t low = a->disp + g->delta, high = low + a->size;

	if (!g->number || a->base != g->base || a->index != g->index ||
	    (a->index != KL_NOREG && a->scale != g->scale))
		return false;
	/* What may not be written must not be asked for because of what may not be reached. */
	if (a->write && !g->write && g->jumped)
		return false;
	low = low < g->low ? low : g->low;
	high = high > g->high ? high : g->high;
	return high - low <= MAX_SPAN;
}

bool kl_t_plan(struct kl_translation *t)
{
	struct group g = {0};
	bool any = false;
	uint8_t last = 0;

	for (unsigned i = 0; i < t->nr; i++) {
		struct kl_t_op *o = &t->ops[i];
		struct access a;
		int64_t by, by_index;

		o->group = 0;
		if (!is_plain(o)) {
			g.number = 0;
			continue;
		}
		if (find_access(t, o, &a)) {
			if (!joins(&g, &a)) {
				g = (struct group){.number = ++last,
						   .base = a.base,
						   .index = a.index,
						   .scale = a.scale,
						   .low = a.disp,
						   .high = a.disp + a.size};
			} else {
				any = true;
			}
			o->group = g.number;
			o->disp = a.disp;
			o->at = a.disp + g.delta;
			o->size = a.size;
			o->write = a.write;
			g.low = o->at < g.low ? o->at : g.low;
			g.high = o->at + a.size > g.high ? o->at + a.size : g.high;
			g.write |= a.write;
		}
		g.jumped |= o->d.in.meta.category == ZYDIS_CATEGORY_COND_BR;
		if (!adds(t, o, g.base, &by) || !adds(t, o, g.index, &by_index) || by_index ||
		    (by && g.base == KL_NOREG))
			g.number = 0;
		else
			g.delta += by;
	}
	return any;
}

/* What a check at @o is to cover: the rest of its group. False: there is no more of it. */
bool kl_t_rest_of_group(const struct kl_translation *t, const struct kl_t_op *o, int64_t *low,
			unsigned *span, bool *write)
{
	int64_t high = o->at + o->size;
	bool more = false;

	*low = o->at;
	*write = o->write;
	for (const struct kl_t_op *p = o + 1; p < t->ops + t->nr; p++) {
		if (!o->group || p->group != o->group)
			continue;
		more = true;
		*low = p->at < *low ? p->at : *low;
		high = p->at + p->size > high ? p->at + p->size : high;
		*write |= p->write;
	}
	*span = (unsigned)(high - *low);
	return more;
}
