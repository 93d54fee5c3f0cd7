/* SPDX-License-Identifier: MIT */
/*
 * The block translator: decoded blocks of 64-bit and flat 32-bit code as host code, beside the
 * interpreter and interchangeable with it block by block (docs/vcpu.md).
 *
 *   arena.c       memory for code, what is common to all of it, faults in it
 *   translate.c   one block: flags, edges, slow paths
 *   lower*.c      instructions, by family; what none of them takes is executed by op->fn
 *   runtime.c     what generated code calls
 *   check.c       translations compared with the interpreter
 *
 * Everything belongs to one vCPU and its thread.
 */
#pragma once

#include "host/guard.h"
#include "x86/block.h"

/* Entries of a block whose page is known not to change, before it is translated. */
#define KL_XLATE_PATIENCE 32u

#define KL_XLATE_CODE   (16u << 20)
#define KL_XLATE_JUMPS  2048u
#define KL_XLATE_POINTS (512u << 10)

/* Where returns and indirect jumps went. The target checks itself (see kl_block.pass). */
struct kl_xlate_jump {
	uint64_t rip;
	const void *host;
};

/* An access to guest memory, and where the instruction is executed instead; both from rx on. */
struct kl_xlate_point {
	uint32_t at, slow;
};

struct kl_xlate {
	struct kl_generated generated; /* first */
	uint8_t *rw, *rx;              /* the same memory */
	size_t used, start;            /* start: behind what is common */
	struct kl_xlate_jump *jumps;   /* of 64-bit code, and behind them of 32-bit code */
	struct kl_xlate_point *points;
	unsigned nr_points;
	struct kl_block **blocks; /* that are translated */
	unsigned nr_blocks;
	bool refused; /* no memory that can be executed */
	struct kl_translation *work;
	const struct kl_op *(*enter)(struct kl_vcpu *v, const void *host);
	/* For generated code to call: all guest state in place, and back. */
	const uint8_t *slow, *reenter, *edge, *indirect, *lend, *lend_avx;
	/* Statistics for tests. */
	uint64_t nr_translated, nr_flushes;
};

/* By base/config.h, and where there can be one. */
bool kl_xlate_wanted(void);
/* NULL: there is none. */
struct kl_xlate *kl_xlate_create(void);
void kl_xlate_destroy(struct kl_xlate *x);
/* All translations go; those of @c's blocks. No generated code is running. */
void kl_xlate_flush(struct kl_xlate *x);

/* A new block's: counts, has it translated, runs the translation. */
void kl_xlate_prepare(struct kl_block *b);
kl_run_fn kl_xlate_first;

/*
 * check.c: the translation of @b runs, and the interpreter before it. As kl_xlate_first().
 */
const struct kl_op *kl_check_block(struct kl_vcpu *v, struct kl_block *b);
/* v->check is set. @op is not to be executed. */
bool kl_check_stops(const struct kl_vcpu *v, const struct kl_op *op);
/* The same: memory is about to be accessed; @once: in a way that must not be repeated. May leave.
 */
void kl_check_access(struct kl_vcpu *v, uint64_t lin, unsigned access, bool once, uint8_t *p,
		     unsigned len);

/* ---- inside ---- */

/* @b's translation, with flags in flags_now; it is the block that runs. */
const struct kl_op *kl_xlate_enter(struct kl_vcpu *v, struct kl_block *b);

/* Room for the translation of any block. */
#define KL_XLATE_ROOM (64u << 10)

extern const size_t kl_xlate_work_size;
bool kl_xlate_map(struct kl_xlate *x);
/* Emit what is common, from x->rw on. */
void kl_xlate_common(struct kl_xlate *x);
bool kl_xlate_translate(struct kl_vcpu *v, struct kl_xlate *x, struct kl_block *b);

/* Generated code goes on at host, or if it is NULL, the interpreter at op, or if that is, too, it
 * looks for the next block. */
struct kl_xlate_to {
	const void *host;
	const struct kl_op *op;
};

/* Called by generated code; guest registers are in gpr[], flags in flags_now. */
struct kl_xlate_to kl_xlate_slow(struct kl_vcpu *v, const struct kl_op *op);
struct kl_xlate_to kl_xlate_lend(struct kl_vcpu *v, const struct kl_op *op);
struct kl_xlate_to kl_xlate_lend_avx(struct kl_vcpu *v, const struct kl_op *op);
struct kl_xlate_to kl_xlate_reenter(struct kl_vcpu *v, struct kl_block *b);
struct kl_xlate_to kl_xlate_edge(struct kl_vcpu *v, const struct kl_op *op, const int32_t *site);
struct kl_xlate_to kl_xlate_indirect(struct kl_vcpu *v, const struct kl_op *op, uint64_t target);

KL_INLINE struct kl_block *kl_xlate_block(const struct kl_op *op)
{
	const struct kl_op *first = op - (op->nth - 1);

	return (struct kl_block *)((uint8_t *)(uintptr_t)first - offsetof(struct kl_block, ops));
}
