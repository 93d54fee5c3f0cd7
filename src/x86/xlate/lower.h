/* SPDX-License-Identifier: MIT */
/*
 * One block's translation while it is made, for the instruction families (lower*.c).
 *
 * A family looks at one instruction and either emits nothing and returns false, or all of it. What
 * it must do:
 *   - change no guest state before the last access that can fail; access memory only through
 *     kl_t_access(), and with one instruction behind kl_t_point();
 *   - call kl_t_flags_clobber() before it changes the host's flags as a side effect,
 *     kl_t_flags_need() before what reads them, kl_t_flags_keep() before what leaves some of them
 *     alone, and kl_t_flags_set() after what sets the guest's.
 *
 * Where the guest's flags are: in the host's, in flags_now, in both, or, if nothing can see them
 * any more, nowhere. At both ends of a block, and wherever C is called, they are in flags_now.
 */
#pragma once

#include "x86/decode.h"
#include "x86/ops.h"
#include "x86/xlate/emit.h"

#define KL_T_MAX_OPS 33
#define KL_T_REFS    6
#define KL_T_AGAIN   (2 * KL_T_MAX_OPS)
/* Of 8 bytes, the last of which may be some again. */
#define KL_T_COMPARES (KL_BLOCK_MAX_BYTES / 8 + 1)

struct kl_t_op {
	struct kl_decode d; /* of op */
	struct kl_op op;    /* as decoded: the block's own has been prepared for its handlers */
	const struct kl_op *own;
	bool sees_before, live_after; /* flags: before it, after it */
	/* Its access, if that is of a group that one check may serve (share.c); group 0: none. */
	uint8_t group;
	bool write;
	unsigned size;
	int64_t disp, at; /* from the base as it is; as it was at the group's first access */
	/* Jumps to its slow path; the code behind it, with flags in the host's. */
	uint8_t *slow[KL_T_REFS];
	unsigned nr_slow, nr_points;
	const uint8_t *next;
	bool next_host;
	uint32_t xmm_dirty, next_xmm; /* to be written back for it; to be loaded for what follows */
};

struct kl_translation {
	struct kl_vcpu *v;
	struct kl_xlate *x;
	struct kl_block *b;
	unsigned word; /* bytes of an address and of a stack slot: 8, or 4 in 32-bit code */
	struct kl_emit e;
	struct kl_t_op *ops, *at; /* those of the version that is made */
	unsigned nr;
	/*
	 * A block in which one check may serve several accesses is made twice: with such checks,
	 * and without any. The first is what is entered; when an instruction of it went the slow
	 * way, or a check of several fails, the second goes on from there.
	 */
	struct kl_t_op version[2][KL_T_MAX_OPS];
	bool shared, sharing; /* there are two; it is the first that is made */
	const uint8_t *plain; /* where the second begins */
	struct kl_mem ptr;    /* the operand, while group: relative to H_S1 */
	uint8_t group;        /* H_S1 is a pointer for accesses of this group that lie at */
	int64_t low, high;    /* from low on and below high */
	bool group_write;
	unsigned aligned; /* ptr less aligned_at is known to be a multiple of this */
	int32_t aligned_at;
	bool host, mem; /* where flags are */
	struct {
		uint32_t at;
		unsigned op; /* of the versions, or KL_T_AGAIN */
	} point[KL_T_MAX_OPS * 8 + KL_T_COMPARES];
	unsigned nr_points;
	/* Jumps from where memory is compared to the call of kl_xlate_reenter(). */
	uint8_t *again[KL_T_COMPARES + 4]; /* and requests, gen, page, live */
	unsigned nr_again;
	struct {
		uint8_t *field;
		const struct kl_op *op;
		bool flags_out;
		unsigned count; /* 0: has been counted */
	} edge[4 * KL_T_MAX_OPS];
	unsigned nr_edges;
	struct {
		uint8_t *field;
		const struct kl_op *op;
		const uint8_t *again; /* NULL: in the second version */
	} indirect[4];
	unsigned nr_indirect;
	struct {
		uint8_t *field;
		const uint8_t *back;
		struct kl_t_op *op;
		unsigned span;
		bool write, group;
		uint32_t xmm_dirty;
	} stack[2 * KL_T_MAX_OPS];
	unsigned nr_stack;
	struct {
		uint8_t *field;
		unsigned op;
		uint32_t xmm_dirty;
	} bail[2 * KL_T_MAX_OPS];
	unsigned nr_bails;
	/* The host's MXCSR is the guest's; what VEX wants was looked at (lower_vector.c). */
	bool lent, lent_avx;
	/* Guest vector registers that are in the host's, and have changed: a bit for each lower
	 * half, and above those one for each upper half. */
	uint32_t xmm, xmm_dirty;
	bool ended; /* nothing runs into what follows */
};

/* ---- flags ---- */

KL_INLINE void kl_t_flags_save(struct kl_translation *t)
{
	if (t->host && !t->mem) {
		kl_e_flags_out(&t->e);
		t->mem = true;
	}
}

KL_INLINE void kl_t_flags_clobber(struct kl_translation *t)
{
	if (t->at->sees_before)
		kl_t_flags_save(t);
	t->host = false;
}

KL_INLINE void kl_t_flags_need(struct kl_translation *t)
{
	if (!t->host && t->mem)
		kl_e_flags_in(&t->e);
	t->host |= t->mem;
}

KL_INLINE void kl_t_flags_keep(struct kl_translation *t)
{
	if (t->at->live_after)
		kl_t_flags_need(t);
}

KL_INLINE void kl_t_flags_set(struct kl_translation *t)
{
	t->host = true;
	t->mem = false;
}

/* ---- registers ---- */

/* The host register with guest register @n in it, which is @scratch if it has to be loaded. */
KL_INLINE unsigned kl_t_use(struct kl_translation *t, unsigned n, unsigned scratch)
{
	if (kl_host_of[n] != H_NONE)
		return kl_host_of[n];
	if (scratch == H_S1)
		t->group = 0;
	kl_e_load(&t->e, scratch, KL_CTX_GPR(n));
	return scratch;
}

/* The same without its value. */
KL_INLINE unsigned kl_t_dst(struct kl_translation *t, unsigned n, unsigned scratch)
{
	if (kl_host_of[n] != H_NONE)
		return kl_host_of[n];
	if (scratch == H_S1)
		t->group = 0;
	return scratch;
}

/* It has been changed. */
KL_INLINE void kl_t_put(struct kl_translation *t, unsigned n, unsigned reg)
{
	if (kl_host_of[n] == H_NONE)
		kl_e_store(&t->e, reg, KL_CTX_GPR(n));
}

/* Operands by their offset into gpr[]: not AH, CH, DH, BH. */
KL_INLINE bool kl_t_is_low(uint8_t off)
{
	return off != KL_NOREG && !(off & 7);
}

/* The visible operand that is encoded as @e, or NULL. */
KL_INLINE const ZydisDecodedOperand *kl_t_field(const struct kl_t_op *o, ZydisOperandEncoding e)
{
	for (unsigned i = 0; i < o->d.in.operand_count_visible; i++)
		if (o->d.opnd[i].encoding == e)
			return &o->d.opnd[i];
	return NULL;
}

KL_INLINE int64_t kl_t_imm(const struct kl_t_op *o)
{
	uint64_t x = o->op.imm;

	return o->op.opsize == 1   ? (int8_t)x
	       : o->op.opsize == 2 ? (int16_t)x
	       : o->op.opsize == 4 ? (int32_t)x
				   : (int64_t)x;
}

/* ---- memory ---- */

bool kl_t_can_address(const struct kl_translation *t, const struct kl_t_op *o);
/* The operand's address into @reg; it does not change flags unless there is a segment base. */
void kl_t_address(struct kl_translation *t, const struct kl_t_op *o, unsigned reg, bool segment);
/*
 * H_S1 is a linear address; make a host address of it, or go to the slow path. Flags are lost.
 */
void kl_t_check(struct kl_translation *t, unsigned size, bool write);
/* Address and check, for the memory operand: it is at KL_T_PTR then. */
void kl_t_access(struct kl_translation *t, const struct kl_t_op *o, unsigned size, bool write);
/* The same for the stack slot at rSP + @disp. */
void kl_t_stack(struct kl_translation *t, const struct kl_t_op *o, int disp, bool write);
/* H_S1 is about to become something else. */
KL_INLINE void kl_t_forget_pointer(struct kl_translation *t)
{
	t->group = 0;
}
/* The operand must be aligned, or the slow path deals with it. */
void kl_t_aligned(struct kl_translation *t, unsigned size);
/* The plan: which accesses are of which group. False: no check could be shared. */
bool kl_t_plan(struct kl_translation *t);
bool kl_t_rest_of_group(const struct kl_translation *t, const struct kl_t_op *o, int64_t *low,
			unsigned *span, bool *write);
/* The next instruction is the access. */
void kl_t_point(struct kl_translation *t);
/* To the slow path if the condition holds. */
void kl_t_slow_if(struct kl_translation *t, unsigned cc);

#define KL_T_PTR (t->ptr)

/* ---- edges ---- */

/* At the end of a path: flags are saved and everything is done; count and go where own's link
 * goes. */
void kl_t_edge(struct kl_translation *t, const struct kl_op *own, unsigned count);
/* Jcc: the same if @cc holds. */
void kl_t_edge_if(struct kl_translation *t, unsigned cc, bool likely);
/* H_S1 is the address to go to; before: what is to be done if it is known. */
void kl_t_jump(struct kl_translation *t, const uint8_t *again, int rsp_change);

/* ---- vector registers ---- */

void kl_t_xmm_write_back(struct kl_translation *t, uint32_t mask);
void kl_t_xmm_load(struct kl_translation *t, uint32_t mask);

/* ---- families ---- */

bool kl_lower_alu(struct kl_translation *t, struct kl_t_op *o);
bool kl_lower_mov(struct kl_translation *t, struct kl_t_op *o);
bool kl_lower_bit(struct kl_translation *t, struct kl_t_op *o);
bool kl_lower_branch(struct kl_translation *t, struct kl_t_op *o);
bool kl_lower_vector(struct kl_translation *t, struct kl_t_op *o);
