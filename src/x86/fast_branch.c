/* SPDX-License-Identifier: MIT */
/*
 * Fast handlers: Jcc JMP CALL RET in 64-bit code, and comparisons joined with the Jcc behind them.
 *
 * Where the target's block is not at hand, op->fn jumps, checks the target, and kl_interp_run()
 * finds the block and links it.
 */
#include "x86/fast.h"

#define HANDLER(name) static const struct kl_op *name(struct kl_vcpu *v, const struct kl_op *op)

/* The condition codes in encoding order, as the compiler's flag outputs are called. */
// clang-format off
#define CONDITIONS(X, ...) \
	X(0, o, __VA_ARGS__) X(1, no, __VA_ARGS__) X(2, b, __VA_ARGS__) X(3, ae, __VA_ARGS__) \
	X(4, e, __VA_ARGS__) X(5, ne, __VA_ARGS__) X(6, be, __VA_ARGS__) X(7, a, __VA_ARGS__) \
	X(8, s, __VA_ARGS__) X(9, ns, __VA_ARGS__) X(10, p, __VA_ARGS__) X(11, np, __VA_ARGS__) \
	X(12, l, __VA_ARGS__) X(13, ge, __VA_ARGS__) X(14, le, __VA_ARGS__) X(15, g, __VA_ARGS__)
// clang-format on

#define JCC(n, cc, ...)                                                        \
	HANDLER(j##cc)                                                         \
	{                                                                      \
		uint32_t ax = v->flags_now;                                    \
		bool go;                                                       \
                                                                               \
		__asm__("addb $127, %%al\n\tsahf" : "=@cc" #cc(go), "+a"(ax)); \
		if (go)                                                        \
			return kl_fast_jump(v, op);                            \
		KL_NEXT_OP(v, op + 1);                                         \
	}
CONDITIONS(JCC)
#define JCC_ROW(n, cc, ...) j##cc,
static kl_run_fn *const jcc[16] = {CONDITIONS(JCC_ROW)};

HANDLER(jmp_rel)
{
	return kl_fast_jump(v, op);
}

/*
 * Push the address behind @op and go to @b. Not if the return address lands in the running code:
 * what is behind @b's jump may then be stale.
 */
KL_INLINE const struct kl_op *call(struct kl_vcpu *v, const struct kl_op *op, struct kl_block *b,
				   bool linked)
{
	uint64_t sp = v->gpr[KL_RSP] - 8;
	void *p = kl_fast_write(v, op, sp, 8);

	if (KL_UNLIKELY(!p))
		return kl_fast_call(v, op);
	kl_store64(p, kl_fast_rip(v, op) + op->len);
	v->gpr[KL_RSP] = sp;
	return kl_fast_enter(v, b, op->nth, linked);
}

HANDLER(call_rel)
{
	struct kl_block *b = op->link;

	if (KL_UNLIKELY(!kl_fast_may_enter(v, b)))
		return kl_fast_call(v, op);
	return call(v, op, b, true);
}

KL_INLINE const struct kl_op *jump_to(struct kl_vcpu *v, const struct kl_op *op, uint64_t rip)
{
	struct kl_block *b = kl_fast_find(v, rip);

	if (KL_UNLIKELY(!b))
		return kl_fast_call(v, op);
	return kl_fast_enter(v, b, op->nth, false);
}

KL_INLINE const struct kl_op *call_to(struct kl_vcpu *v, const struct kl_op *op, uint64_t rip)
{
	struct kl_block *b = kl_fast_find(v, rip);

	if (KL_UNLIKELY(!b))
		return kl_fast_call(v, op);
	return call(v, op, b, false);
}

#define INDIRECT(name)                                                  \
	HANDLER(name##_r)                                               \
	{                                                               \
		return name##_to(v, op, KL_FAST_REG(v, op->reg, 64));   \
	}                                                               \
	HANDLER(name##_m)                                               \
	{                                                               \
		void *p = kl_fast_read(v, op, KL_FAST_LIN_x(v, op), 8); \
                                                                        \
		if (KL_UNLIKELY(!p))                                    \
			return kl_fast_call(v, op);                     \
		return name##_to(v, op, kl_load64(p));                  \
	}
INDIRECT(jump)
INDIRECT(call)

/* RET and RET imm16. */
HANDLER(ret)
{
	uint64_t sp = v->gpr[KL_RSP];
	void *p = kl_fast_read(v, op, sp, 8);
	struct kl_block *b;

	if (KL_UNLIKELY(!p))
		return kl_fast_call(v, op);
	b = kl_fast_find(v, kl_load64(p));
	if (KL_UNLIKELY(!b))
		return kl_fast_call(v, op);
	v->gpr[KL_RSP] = sp + 8 + op->imm;
	return kl_fast_enter(v, b, op->nth, false);
}

/* ---- joined with what sets the flags ------------------------------------------------------- */

#define JOINED(n, cc, name, bits, form, insn, src, set)                             \
	HANDLER(name##bits##_##form##_j##cc)                                        \
	{                                                                           \
		uint##bits##_t d = KL_FAST_REG(v, op->reg, bits);                   \
		uint32_t ax;                                                        \
		bool go;                                                            \
                                                                                    \
		__asm__(insn KL_FLAGS_OUT                                           \
			: "+r"(d), "=&a"(ax), "=@cc" #cc(go)                        \
			: "r"((uint##bits##_t)(src)), "r"((uint32_t)v->flags_now)); \
		set(v, op->reg, d);                                                 \
		v->flags_now = (uint16_t)ax;                                        \
		if (go)                                                             \
			return kl_fast_jump(v, op + 1);                             \
		KL_NEXT_OP(v, op + 2);                                              \
	}
#define NO_SET(v, off, d) ((void)(d))
#define RM(bits)          KL_FAST_REG(v, op->rm, bits)
/* operation, bits, form, host instruction, source, result */
// clang-format off
#define JOINABLE(X) \
	X(cmp, 8, rr, "cmpb %3, %0", RM(8), NO_SET) X(cmp, 8, ri, "cmpb %3, %0", op->imm, NO_SET) \
	X(cmp, 32, rr, "cmpl %3, %0", RM(32), NO_SET) X(cmp, 32, ri, "cmpl %3, %0", op->imm, NO_SET) \
	X(cmp, 64, rr, "cmpq %3, %0", RM(64), NO_SET) X(cmp, 64, ri, "cmpq %3, %0", op->imm, NO_SET) \
	X(test, 8, rr, "testb %3, %0", RM(8), NO_SET) X(test, 8, ri, "testb %3, %0", op->imm, NO_SET) \
	X(test, 32, rr, "testl %3, %0", RM(32), NO_SET) X(test, 64, rr, "testq %3, %0", RM(64), NO_SET) \
	X(test, 32, ri, "testl %3, %0", op->imm, NO_SET) \
	X(add, 32, ri, "addl %3, %0", op->imm, KL_FAST_SET_32) X(add, 64, ri, "addq %3, %0", op->imm, KL_FAST_SET_64) \
	X(sub, 32, ri, "subl %3, %0", op->imm, KL_FAST_SET_32) X(sub, 64, ri, "subq %3, %0", op->imm, KL_FAST_SET_64) \
	X(sub, 32, rr, "subl %3, %0", RM(32), KL_FAST_SET_32) X(sub, 64, rr, "subq %3, %0", RM(64), KL_FAST_SET_64) \
	X(dec, 32, r, "btl $8, %4\n\tdecl %0", 0, KL_FAST_SET_32) X(dec, 64, r, "btl $8, %4\n\tdecq %0", 0, KL_FAST_SET_64)
// clang-format on
#define JOINED_ALL(...) CONDITIONS(JOINED, __VA_ARGS__)
JOINABLE(JOINED_ALL)

enum {
	IS_cmp = ZYDIS_MNEMONIC_CMP,
	IS_test = ZYDIS_MNEMONIC_TEST,
	IS_add = ZYDIS_MNEMONIC_ADD,
	IS_sub = ZYDIS_MNEMONIC_SUB,
	IS_dec = ZYDIS_MNEMONIC_DEC,
	rr = 0,
	ri = 1,
	r = 1
};
#define JOINED_NAME(n, cc, name, bits, form, ...) name##bits##_##form##_j##cc,
#define JOINED_ROW(name, bits, form, ...) \
	{IS_##name, bits / 8, form, {CONDITIONS(JOINED_NAME, name, bits, form)}},
static const struct joined {
	uint16_t mnemonic;
	uint8_t opsize;
	bool immediate; /* or one operand */
	kl_run_fn *run[16];
} joined[] = {JOINABLE(JOINED_ROW)};

void kl_fast_fuse(struct kl_op *ops, unsigned n)
{
	for (unsigned i = 0; i + 1 < n; i++) {
		struct kl_op *op = &ops[i], *next = op + 1;

		if ((next->flags & (KL_OPF_LINK | KL_OPF_END)) != KL_OPF_LINK ||
		    (op->flags & KL_OPF_MEM) || op->run == kl_fast_call)
			continue;
		for (const struct joined *j = joined; j < joined + KL_ARRAY_SIZE(joined); j++)
			if (j->mnemonic == op->mnemonic && j->opsize == op->opsize &&
			    j->immediate == (op->rm == KL_NOREG))
				op->run = j->run[next->cond];
	}
}

/* Not JRCXZ or LOOP. */
static bool is_jcc(ZydisMnemonic m)
{
	switch (m) {
#define CC(n, sfx) case ZYDIS_MNEMONIC_J##sfx:
		KL_CONDITIONS(CC)
#undef CC
		return true;
	default:
		return false;
	}
}

kl_run_fn *kl_fast_select_branch(const struct kl_decode *d)
{
	struct kl_op *op = d->op;
	bool rel = d->opnd[0].type == ZYDIS_OPERAND_TYPE_IMMEDIATE;

	if (d->in.meta.branch_type == ZYDIS_BRANCH_TYPE_FAR)
		return NULL;
	/* Translated code has its edges linked, too. */
	if (d->mode == KL_CODE32 && op->opsize == 4 && rel &&
	    (d->in.meta.category == ZYDIS_CATEGORY_UNCOND_BR ||
	     d->in.meta.category == ZYDIS_CATEGORY_CALL ||
	     (d->in.meta.category == ZYDIS_CATEGORY_COND_BR && is_jcc(d->in.mnemonic))))
		op->flags |= KL_OPF_LINK;
	if (d->mode != KL_CODE64 || op->opsize != 8)
		return NULL;
	switch (d->in.mnemonic) {
#define CC(n, sfx) case ZYDIS_MNEMONIC_J##sfx:
		KL_CONDITIONS(CC)
#undef CC
		op->flags = (uint16_t)((op->flags & ~KL_OPF_END) | KL_OPF_LINK);
		return jcc[op->cond];
	case ZYDIS_MNEMONIC_JMP:
		if (rel)
			op->flags |= KL_OPF_LINK;
		return rel ? jmp_rel : op->flags & KL_OPF_MEM ? jump_m : jump_r;
	case ZYDIS_MNEMONIC_CALL:
		if (rel)
			op->flags |= KL_OPF_LINK;
		return rel ? call_rel : op->flags & KL_OPF_MEM ? call_m : call_r;
	case ZYDIS_MNEMONIC_RET:
		return ret;
	default:
		return NULL;
	}
}
