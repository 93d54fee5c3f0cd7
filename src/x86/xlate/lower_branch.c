/* SPDX-License-Identifier: MIT */
/* Jcc JMP CALL RET. */
#include "x86/xlate/lower.h"

#define GPR(off) ((off) / 8u)
#define RSP      kl_host_of[KL_RSP]

static bool relative(const struct kl_t_op *o)
{
	return o->own->flags & KL_OPF_LINK;
}

/* A loop's end is likely to be taken. */
static bool jcc(struct kl_translation *t, struct kl_t_op *o)
{
	kl_t_flags_need(t);
	kl_t_edge_if(t, o->op.cond, (int64_t)o->op.imm < 0);
	return true;
}

/* The target into H_S1. */
static void fetch_target(struct kl_translation *t, struct kl_t_op *o)
{
	kl_t_forget_pointer(t);
	if (o->op.flags & KL_OPF_MEM) {
		kl_t_access(t, o, t->word, false);
		kl_t_point(t);
		kl_e_rm(&t->e, 0x8b, t->word, H_S1, KL_T_PTR);
	} else {
		kl_t_flags_clobber(t);
		kl_e_rr(&t->e, 0x8b, t->word, H_S1, kl_t_use(t, GPR(o->op.reg), H_S1));
	}
}

static bool target_known(const struct kl_translation *t, const struct kl_t_op *o)
{
	return o->op.flags & KL_OPF_MEM ? kl_t_can_address(t, o) : kl_t_is_low(o->op.reg);
}

static bool jmp(struct kl_translation *t, struct kl_t_op *o)
{
	const uint8_t *again;

	kl_t_flags_save(t);
	if (relative(o)) {
		kl_t_edge(t, o->own, o->own->nth);
		t->ended = true;
		return true;
	}
	if (!target_known(t, o))
		return false;
	again = kl_here(&t->e);
	fetch_target(t, o);
	kl_t_jump(t, again, 0);
	return true;
}

static bool call(struct kl_translation *t, struct kl_t_op *o)
{
	uint64_t next = t->b->rip + o->own->offset + o->own->len;
	struct kl_emit *e = &t->e;
	const uint8_t *again;

	if (!relative(o) && !target_known(t, o))
		return false;
	kl_t_flags_save(t);
	again = kl_here(e);
	if (!relative(o)) {
		fetch_target(t, o);
		kl_e_store(e, H_S1, KL_CTX(branch_target));
	}
	kl_t_stack(t, o, -(int)t->word, true);
	if ((int64_t)next == (int32_t)next || t->word == 4) {
		kl_t_point(t);
		kl_e_rm(e, 0xc7, t->word, 0, KL_T_PTR);
		kl_e32(e, (uint32_t)next);
	} else {
		kl_e_imm(e, H_S0, next);
		kl_t_point(t);
		kl_e_rm(e, 0x89, 8, H_S0, KL_T_PTR);
	}
	if (relative(o)) {
		kl_e_lea(e, t->word, RSP, KL_AT(RSP, -(int)t->word));
		kl_t_edge(t, o->own, o->own->nth);
		t->ended = true;
	} else {
		/* If nobody knows the target, the return address is stored again. */
		kl_e_load(e, H_S1, KL_CTX(branch_target));
		kl_t_jump(t, again, -(int)t->word);
	}
	return true;
}

static bool ret(struct kl_translation *t, struct kl_t_op *o)
{
	struct kl_emit *e = &t->e;
	const uint8_t *again;

	kl_t_flags_save(t);
	/* With a pointer that another access got it can't be done again. */
	again = o->group && t->group == o->group ? NULL : kl_here(e);
	kl_t_stack(t, o, 0, false);
	kl_t_point(t);
	kl_e_rm(e, 0x8b, t->word, H_S1, KL_T_PTR);
	kl_t_forget_pointer(t);
	kl_t_jump(t, again, (int)(t->word + (o->op.imm & 0xffff)));
	return true;
}

bool kl_lower_branch(struct kl_translation *t, struct kl_t_op *o)
{
	if (o->op.opsize != t->word || (o->op.flags & KL_OPF_LOCK) ||
	    o->d.in.meta.branch_type == ZYDIS_BRANCH_TYPE_FAR)
		return false;
	if (o->d.in.meta.category != ZYDIS_CATEGORY_COND_BR &&
	    o->d.in.meta.category != ZYDIS_CATEGORY_UNCOND_BR &&
	    o->d.in.meta.category != ZYDIS_CATEGORY_CALL &&
	    o->d.in.meta.category != ZYDIS_CATEGORY_RET)
		return false;
	kl_t_xmm_write_back(t, t->xmm_dirty);
	t->xmm_dirty = t->at->xmm_dirty = 0;
	switch (o->d.in.mnemonic) {
#define CC(n, sfx) case ZYDIS_MNEMONIC_J##sfx:
		KL_CONDITIONS(CC)
#undef CC
		return relative(o) && jcc(t, o);
	case ZYDIS_MNEMONIC_JMP:
		return jmp(t, o);
	case ZYDIS_MNEMONIC_CALL:
		return call(t, o);
	case ZYDIS_MNEMONIC_RET:
		return ret(t, o);
	default:
		return false;
	}
}
