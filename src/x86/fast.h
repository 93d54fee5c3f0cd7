/* SPDX-License-Identifier: MIT */
/*
 * Blocks quickly: handlers that run one op of a block and go on to the next by themselves.
 *
 * A fast handler (op->run) does the usual case only: operands in registers, or in memory that
 * the TLB has. Anything else it leaves to kl_fast_call(), which puts the state in place and has
 * op->fn do the whole instruction; so all that is rare is written once, in ops_*.c. While fast
 * handlers run, v->lazy is set: rip is not kept, and the status flags are in v->flags_now.
 *
 * What a fast handler must do: set v->cur_op before it touches guest memory (the access may be
 * abandoned or trap, and control then leaves by longjmp), change nothing before the last such
 * access, and leave the block after a store into the page that it is in.
 *
 * Handlers are built without frames, so that the call of the next one is a jump. Where the
 * compiler does not promise that (KL_TAILCALLS), they return the next op to kl_interp_run().
 */
#pragma once

#include "x86/block.h"
#include "x86/decode.h"
#include "x86/ops.h"

#if KL_TAILCALLS
/* A test looks for jumps in the handlers' code (tests/guest). */
#define KL_NEXT_OP(v, op)                         \
	do {                                      \
		const struct kl_op *next_ = (op); \
		return next_->run(v, next_);      \
	} while (0)
#else
#define KL_NEXT_OP(v, op) return (op)
#endif

/* What executes d->op; *@noflags: the same if its flags are dead, or NULL. Sets add_*. */
kl_run_fn *kl_fast_select(const struct kl_decode *d, kl_run_fn **noflags);
/* Join neighbours. The second of two keeps its own op for jumps and faults into the middle. */
void kl_fast_fuse(struct kl_op *ops, unsigned n);

kl_run_fn *kl_fast_select_alu(const struct kl_decode *d, kl_run_fn **noflags);
kl_run_fn *kl_fast_select_mov(const struct kl_decode *d, kl_run_fn **noflags);
kl_run_fn *kl_fast_select_sse(const struct kl_decode *d);
kl_run_fn *kl_fast_select_branch(const struct kl_decode *d);

/* Let op->fn do it. False: the block is left. */
bool kl_fast_do(struct kl_vcpu *v, const struct kl_op *op);
/* The same, and go on. */
kl_run_fn kl_fast_call;
/* Behind the last op: the next block. */
kl_run_fn kl_fast_go_on;
/* Back to kl_interp_run(), v->cur_op not executed. Returns NULL. */
const struct kl_op *kl_fast_leave(struct kl_vcpu *v) KL_COLD;

/* May vector instructions run on the host as they are? Then the host's MXCSR is the guest's. */
bool kl_fast_lend_mxcsr(struct kl_vcpu *v);
/* Take the host's MXCSR back. */
void kl_fast_return_mxcsr(struct kl_vcpu *v) KL_COLD;

/* ---- rip and flags ------------------------------------------------------------------- */

/* Only what changes no mode comes before @op in a block. */
KL_INLINE uint64_t kl_fast_rip(const struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t rip = v->block->rip + op->offset;

	if (KL_LIKELY(v->code_mode == KL_CODE64))
		return rip;
	rip -= v->seg[KL_CS].base;
	return v->code_mode == KL_CODE32 ? (uint32_t)rip : (uint16_t)rip;
}

/* Of the instruction that runs, while a handler of either kind does. */
KL_INLINE uint64_t kl_rip_now(const struct kl_vcpu *v)
{
	return v->lazy ? kl_fast_rip(v, v->cur_op) : v->rip;
}

/* Put rip and rflags in place, as they are before @op; and back to lazy. */
KL_INLINE void kl_fast_sync(struct kl_vcpu *v, const struct kl_op *op)
{
	if (KL_UNLIKELY(v->mxcsr_lent))
		kl_fast_return_mxcsr(v);
	v->rip = kl_fast_rip(v, op);
	kl_flags_put(v, v->flags_now);
	v->lazy = false;
}

KL_INLINE void kl_fast_unsync(struct kl_vcpu *v)
{
	v->flags_now = (uint16_t)kl_flags_pack(v);
	v->lazy = true;
}

/* ---- blocks ---------------------------------------------------------------------------- */

KL_INLINE bool kl_fast_may_enter(struct kl_vcpu *v, const struct kl_block *b)
{
	return b && b->gen == v->code_gen &&
	       !atomic_load_explicit(&v->core.requests, memory_order_relaxed);
}

/*
 * Go on with @b after @done instructions of the current block. Comparing may trap, or find other
 * bytes: rip is then where @b begins. @linked: by op->link, so it need not be done each time.
 */
KL_INLINE const struct kl_op *kl_fast_enter(struct kl_vcpu *v, struct kl_block *b, unsigned done,
					    bool linked)
{
	v->insn_count += done;
	v->block = b;
	v->cur_op = b->ops;
	v->code_page = (uint8_t *)((uint64_t)b->code & KL_PAGE_MASK);
	if (!(linked && KL_LIKELY(b->seen == v->code_epoch)) && KL_UNLIKELY(!kl_block_verify(v, b)))
		return kl_fast_leave(v);
	KL_NEXT_OP(v, b->ops);
}

/* Jump where @op always does. */
KL_INLINE const struct kl_op *kl_fast_jump(struct kl_vcpu *v, const struct kl_op *op)
{
	struct kl_block *b = op->link;

	if (KL_UNLIKELY(!kl_fast_may_enter(v, b)))
		return kl_fast_call(v, op);
	return kl_fast_enter(v, b, op->nth, true);
}

/* The block at linear address @rip of code in @mode, if it is at hand and may be entered, or NULL.
 */
KL_INLINE struct kl_block *kl_fast_find_in(struct kl_vcpu *v, uint64_t rip, unsigned mode)
{
	uint64_t key = rip << 2 | mode;
	struct kl_block *b = kl_block_in_front(v->blocks, key);

	/* The key alone has not all bits. */
	return kl_fast_may_enter(v, b) && b->rip == rip ? b : NULL;
}

KL_INLINE struct kl_block *kl_fast_find(struct kl_vcpu *v, uint64_t rip)
{
	return kl_fast_find_in(v, rip, KL_CODE64);
}

/* ---- operands -------------------------------------------------------------------------- */

#define KL_FAST_REG(v, off, bits) (*(uint##bits##_t *)kl_gpr(v, off))

/* A result; 32 bits clear the upper half. */
#define KL_FAST_SET_8(v, off, x)  (KL_FAST_REG(v, off, 8) = (uint8_t)(x))
#define KL_FAST_SET_16(v, off, x) (KL_FAST_REG(v, off, 16) = (uint16_t)(x))
#define KL_FAST_SET_32(v, off, x) (KL_FAST_REG(v, off, 64) = (uint32_t)(x))
#define KL_FAST_SET_64(v, off, x) (KL_FAST_REG(v, off, 64) = (uint64_t)(x))

/*
 * Linear addresses of 64-bit code, in two forms: base and displacement, and everything. What is
 * missing is added as v->zero.
 */
#define KL_FAST_TERM(v, i)   (((const uint64_t *)(const void *)kl_gpr(v, 0))[i])
#define KL_FAST_LIN_b(v, op) ((uint64_t)(op)->disp + KL_FAST_TERM(v, (op)->add_base))
#define KL_FAST_LIN_x(v, op)                                     \
	(KL_FAST_LIN_b(v, op) + KL_FAST_TERM(v, (op)->add_seg) + \
	 (KL_FAST_TERM(v, (op)->add_index) << (op)->scale))

/* The TLB entry of kl_tlb_entry(), with less arithmetic. */
KL_INLINE struct kl_tlb_entry *kl_fast_tlb(struct kl_vcpu *v, uint64_t lin)
{
	enum { SIZE = sizeof(struct kl_tlb_entry), SHIFT = 5 };
	uint64_t at = lin >> (KL_PAGE_SHIFT - SHIFT) ^ lin >> (KL_PAGE_SHIFT + KL_TLB_BITS - SHIFT);

	_Static_assert(SIZE == 1 << SHIFT, "index times size is one shift");
	return (void *)((char *)v->tlb_now + (at & ((KL_TLB_SIZE - 1) * SIZE)));
}

KL_INLINE bool kl_fast_crosses(uint64_t lin, unsigned size)
{
	return KL_UNLIKELY(lin & (size - 1)) && (lin & ~KL_PAGE_MASK) + size > KL_PAGE_SIZE;
}

/* The host address of an operand, or NULL: kl_fast_call(). Sets cur_op. */
KL_INLINE void *kl_fast_read(struct kl_vcpu *v, const struct kl_op *op, uint64_t lin, unsigned size)
{
	struct kl_tlb_entry *e = kl_fast_tlb(v, lin);

	v->cur_op = op;
	if (KL_UNLIKELY(e->rtag != (lin & KL_PAGE_MASK)) || kl_fast_crosses(lin, size))
		return NULL;
	return kl_tlb_host(e, lin);
}

KL_INLINE void *kl_fast_write(struct kl_vcpu *v, const struct kl_op *op, uint64_t lin,
			      unsigned size)
{
	struct kl_tlb_entry *e = kl_fast_tlb(v, lin);

	v->cur_op = op;
	if (KL_UNLIKELY(e->wtag != (lin & KL_PAGE_MASK)) || kl_fast_crosses(lin, size))
		return NULL;
	return kl_tlb_host(e, lin);
}

/* For a read-modify-write. */
KL_INLINE void *kl_fast_rmw(struct kl_vcpu *v, const struct kl_op *op, uint64_t lin, unsigned size)
{
	struct kl_tlb_entry *e = kl_fast_tlb(v, lin);

	v->cur_op = op;
	if (KL_UNLIKELY(e->wtag != (lin & KL_PAGE_MASK) || e->rtag != e->wtag) ||
	    kl_fast_crosses(lin, size))
		return NULL;
	return kl_tlb_host(e, lin);
}

/* After a store to @p by @op: the rest of the block may be stale. */
KL_INLINE const struct kl_op *kl_fast_stored(struct kl_vcpu *v, const struct kl_op *op,
					     const void *p)
{
	if (KL_UNLIKELY((uint8_t *)((uint64_t)p & KL_PAGE_MASK) == v->code_page)) {
		v->cur_op = op + 1;
		return kl_fast_leave(v);
	}
	KL_NEXT_OP(v, op + 1);
}

/* Which of a form's two handlers. */
KL_INLINE kl_run_fn *kl_fast_pick(const struct kl_op *op, kl_run_fn *const fns[2])
{
	return fns[op->index != KL_NOREG || op->seg >= KL_FS];
}
