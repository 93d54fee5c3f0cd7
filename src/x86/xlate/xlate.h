/* SPDX-License-Identifier: MIT */
/*
 * The block translator: decoded blocks of 64-bit and flat 32-bit code as host code, beside the
 * interpreter and interchangeable with it block by block (docs/vcpu.md).
 *
 *   arena.c       memory for code, what is common to all of it, faults in it
 *   parts.c       what is where in that memory; making room
 *   translate.c   one block: flags, edges, slow paths
 *   lower*.c      instructions, by family; what none of them takes is executed by op->fn
 *   runtime.c     what generated code calls
 *   check.c       translations compared with the interpreter; copies.c: memory meanwhile
 *
 * Everything belongs to one vCPU and its thread.
 */
#pragma once

#include "host/guard.h"
#include "x86/block.h"

/* Entries of a block whose page is known not to change, before it is translated. */
#define KL_XLATE_PATIENCE 32u

/* A translation is not worth entering from the interpreter if it comes back as soon, as often. */
#define KL_XLATE_BRIEF       20u
#define KL_XLATE_BRIEF_TIMES 256u

/* What is common; then that many parts, of this size unless kl_config has another. */
#define KL_XLATE_COMMON 4096u
#define KL_XLATE_PARTS  16u
#define KL_XLATE_PART   (2u << 20)
#define KL_XLATE_JUMPS  8192u

/* Where returns and indirect jumps went. The target checks itself (see kl_block.pass). */
struct kl_xlate_jump {
	uint64_t rip;
	const void *host;
};

/* An access to guest memory, and where the instruction is executed instead; both from rx on. */
struct kl_xlate_point {
	uint32_t at, slow;
};

/* A jump to another block: where its distance lies, and its way out while it is not linked. */
struct kl_xlate_edge {
	uint32_t site, out;
};

struct kl_xlate_part {
	struct kl_block **blocks;      /* that are translated here */
	struct kl_xlate_point *points; /* sorted */
	struct kl_xlate_edge *edges;
	unsigned nr_blocks, nr_points, nr_edges;
};

struct kl_xlate {
	struct kl_generated generated; /* first */
	uint8_t *rw, *rx;              /* the same memory */
	uint32_t start, part_size;     /* start: behind what is common */
	unsigned part;                 /* that is being filled: */
	uint32_t used, end;
	struct kl_xlate_part parts[KL_XLATE_PARTS];
	uint8_t *lists;              /* theirs */
	struct kl_xlate_jump *jumps; /* of 64-bit code, and behind them of 32-bit code */
	bool refused;                /* no memory that can be executed */
	struct kl_translation *work;
	struct kl_check *check; /* of kl_check_size bytes; or NULL */
	const struct kl_op *(*enter)(struct kl_vcpu *v, const void *host);
	/* For generated code to call: all guest state in place, and back. */
	const uint8_t *slow, *reenter, *edge, *indirect, *lend, *lend_avx;
	/* Statistics for tests. */
	uint64_t nr_translated, nr_evicted, nr_instead;
};

/* By base/config.h, and where there can be one. */
bool kl_xlate_wanted(void);
/* NULL: there is none. */
struct kl_xlate *kl_xlate_create(void);
void kl_xlate_destroy(struct kl_xlate *x);
/* Blocks in [@from, @to) go. No generated code is running. */
void kl_xlate_drop(struct kl_xlate *x, const void *from, const void *to);

/* A new block's: counts, has it translated, runs the translation. */
void kl_xlate_prepare(struct kl_block *b);
kl_run_fn kl_xlate_first;

/*
 * check.c: the translation of @b runs, and the interpreter before it. As kl_xlate_first().
 */
const struct kl_op *kl_check_block(struct kl_vcpu *v, struct kl_block *b);
/* v->check is set. @op is not to be executed. */
bool kl_check_stops(const struct kl_vcpu *v, const struct kl_op *op);
/*
 * The same: @len bytes of memory at @p are about to be accessed; @once: in a way that must not be
 * repeated; @part: of an operand in two pages. Returns where to access them instead. May leave.
 */
uint8_t *kl_check_access(struct kl_vcpu *v, unsigned access, bool once, bool part, uint8_t *p,
			 unsigned len) KL_MUST_CHECK;
extern const size_t kl_check_size;

/* ---- inside ---- */

/* @b's translation, with flags in flags_now; it is the block that runs. */
const struct kl_op *kl_xlate_enter(struct kl_vcpu *v, struct kl_block *b);

/* Room for the translation of any block. */
#define KL_XLATE_ROOM (128u << 10)

extern const size_t kl_xlate_work_size;
/* With its memory in place. False: there is none. */
bool kl_xlate_ready(struct kl_vcpu *v, struct kl_xlate *x);
bool kl_xlate_map(struct kl_xlate *x);
void kl_xlate_unmap(struct kl_xlate *x);
/* Have KL_XLATE_ROOM from x->used on. No generated code is running, before kl_xlate_serialize(). */
void kl_xlate_make_room(struct kl_xlate *x);
void kl_xlate_serialize(void);
/* No jump leads to @b's translation any more. */
void kl_xlate_unlink(struct kl_xlate *x, const struct kl_block *b);
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
struct kl_xlate_to kl_xlate_edge(struct kl_vcpu *v, const struct kl_op *op, const void *site);
struct kl_xlate_to kl_xlate_indirect(struct kl_vcpu *v, const struct kl_op *op, uint64_t target);

/* Of the translation that is made: in the order of addresses; both from rx on. */
KL_INLINE void kl_xlate_add_point(struct kl_xlate *x, uint32_t at, uint32_t slow)
{
	struct kl_xlate_part *p = &x->parts[x->part];

	p->points[p->nr_points++] = (struct kl_xlate_point){at, slow};
}

KL_INLINE void kl_xlate_add_edge(struct kl_xlate *x, uint32_t site, uint32_t out)
{
	struct kl_xlate_part *p = &x->parts[x->part];

	p->edges[p->nr_edges++] = (struct kl_xlate_edge){site, out};
}
