/* SPDX-License-Identifier: MIT */
/*
 * Instructions that have been decoded before, wherever they were: a table by their bytes. Where a
 * guest has more code than there is room for blocks, most blocks are made of these.
 *
 * An entry holds what decode.c and fast.c made of the instruction for a block, which depends on its
 * bytes and on the mode, and on nothing else: but for the target of a jump, and for the
 * displacement of an operand beside rIP, which are not compared, and put in place anew.
 */
#pragma once

#include "x86/decode.h"

/* What block.c wants to know of its flags. */
struct kl_flag_use {
	kl_op_fn *noflags;
	kl_run_fn *run_noflags;
	bool before; /* live at its start whatever comes after */
	bool after;  /* live at its end whatever comes after */
	bool kills;
};

#define KL_NR_MEMOS  16384u
#define KL_NR_SHAPES 8192u

/* The first @n of 16 bytes: a bit for each that counts. */
KL_INLINE void kl_first_bytes(uint64_t mask[2], unsigned n)
{
	mask[0] = n >= 8 ? ~0ull : (1ull << (8 * n)) - 1;
	mask[1] = n >= 16 ? ~0ull : n > 8 ? (1ull << (8 * (n - 8))) - 1 : 0;
}

struct kl_memo {
	uint64_t bytes[2], mask[2]; /* which bits of the instruction's bytes count */
	struct kl_op op;            /* op.len 0: none */
	struct kl_flag_use use;
	uint8_t mode;
	uint8_t imm_at, imm_size; /* the target of a jump, or size 0 */
	uint8_t disp_at;          /* a displacement from rIP, or 0 */
};

struct kl_memos {
	/* By the bytes that tell how long an instruction is: those that counted last. */
	struct {
		uint64_t mask[2];
	} shape[KL_NR_SHAPES];
	struct kl_memo memo[KL_NR_MEMOS];
	uint64_t nr_found, nr_added; /* for tests */
};

/*
 * The instruction at @bytes, which is at @rip; 16 bytes can be read, @avail are there. False: it is
 * to be decoded.
 */
bool kl_memo_find(struct kl_memos *m, struct kl_op *op, struct kl_flag_use *use,
		  enum kl_code_mode mode, uint64_t rip, const uint8_t *bytes, unsigned avail);
/* It has been, and @d->op has not been changed by its neighbours. */
void kl_memo_add(struct kl_memos *m, const struct kl_decode *d, const struct kl_flag_use *use,
		 uint64_t rip, const uint8_t *bytes);
