/* SPDX-License-Identifier: MIT */
/*
 * The per-vCPU cache of decoded blocks (block.c), as interp.c uses it.
 *
 * A block is straight-line code of one page with conditional jumps out of it, keyed by linear
 * address and code mode, with a private copy of the bytes that it was decoded from. They are
 * compared with memory when it is entered (T8), through the pointer that the TLB gave
 * for them (code), which is good as long as v->code_gen is what it was then (gen). So a jump that
 * knows where it goes (op->link) needs neither the hash nor the TLB; nor does it compare, if the
 * page is known not to have been written (code.h) since that was done in this epoch (seen).
 * Everything is the vCPU thread's own.
 */
#pragma once

#include "x86/code.h"
#include "x86/debug.h"
#include "x86/insn.h"

#define KL_BLOCK_MAX_BYTES 224u

/* A generation and an epoch that never are: links to the block are to be made anew; compare. */
#define KL_STALE UINT64_MAX

/* Entries of a block before its page is asked for: what is executed once is not worth it. */
#define KL_BLOCK_PATIENCE 256u

struct kl_block {
	uint64_t key;
	uint64_t rip; /* where it starts, linear */
	const uint8_t *code;
	uint64_t gen;
	/* The translation of xlate/, or NULL; what lets it be entered; the first op's run without.
	 */
	const uint8_t *host;
	uint64_t pass;
	kl_run_fn *run0;
	uint32_t heat, brief;
	uint64_t seen; /* the epoch in which it was compared while its page was live, or KL_STALE */
	const uint8_t *own; /* the copy, padded to 16 bytes */
	uint16_t nr_ops, nr_bytes;
	/* xlate/check.c: ops from the first on, + 1, or 0: not known; no vectors; how often */
	uint16_t repeatable;
	bool general;
	uint8_t differed;
	uint32_t strings;    /* the same: a bit for each op that repeats */
	uint16_t short_mask; /* less than 16 bytes: which of them count, or 0 at a page's end */
	uint32_t until;      /* entries before the page is asked for */
	kl_gfn_t gfn;
	struct kl_code_page *page; /* the one with this gfn, or NULL */
	struct kl_op ops[];        /* one more, that goes on to the next block; then the copy */
};

/*
 * An instruction that was executed outside of blocks: an MMIO access whose answer has come is
 * decoded once, not each time. Unlike in a block, all its flags are computed.
 */
struct kl_single {
	uint64_t key;
	uint64_t lo, hi; /* the 16 bytes of memory that it was decoded from */
	struct kl_op op; /* op.len 0: none */
};
#define KL_NR_SINGLES 16

/* Where blocks are found: by key in a direct-mapped table, and behind it in sets of so many. */
#define KL_BLOCK_FRONT 16384u
#define KL_BLOCK_SETS  65536u
#define KL_BLOCK_WAYS  8u

struct kl_block_front {
	uint64_t key;
	struct kl_block *b; /* or NULL */
};

/* What is looked for is not there most often: that is seen here, without a look at any block. */
struct kl_block_way {
	uint32_t tag;
	uint32_t at; /* in 8 bytes from the arena's start, + 1; or 0: none */
};

/* Blocks are in this many parts of the arena; about 7 MiB of guest code in all. */
#define KL_BLOCK_PARTS 8u
#define KL_BLOCK_PART  (16u << 20)

/* Both in 8 bytes from the arena's start. */
struct kl_block_link {
	uint32_t op, to;
};

struct kl_block_cache {
	struct kl_block_way sets[KL_BLOCK_SETS][KL_BLOCK_WAYS];
	unsigned set_mask; /* of those that are used */
	struct kl_block_front front[KL_BLOCK_FRONT];
	uint8_t *arena;
	unsigned part; /* that is being filled */
	uint32_t part_size, used[KL_BLOCK_PARTS];
	struct kl_block_link *links; /* that ops in a part have; nr_links for each */
	unsigned nr_links[KL_BLOCK_PARTS];
	uint64_t random;
	struct kl_memos *memos; /* memo.h; or NULL */
	struct kl_xlate *xlate; /* or NULL */
	bool stepping;          /* kl_interp_one: one element of a string instruction at a time */
	bool stop;              /* kl_interp_run() is to return */
	struct kl_block *ask;   /* its page is to be asked for, before another block runs */
	/* The jump that is to be linked to the block that comes next, or NULL. */
	struct kl_op *from;
	struct kl_single single[KL_NR_SINGLES]; /* by hash of the key */
	/* Statistics for tests. */
	uint64_t nr_built, nr_evicted, nr_stale;
};

/* The block that an op is in. */
KL_INLINE struct kl_block *kl_block_of(const struct kl_op *op)
{
	const struct kl_op *first = op - (op->nth - 1);

	return (struct kl_block *)((uint8_t *)(uintptr_t)first - offsetof(struct kl_block, ops));
}

/* @op always goes to @to: from here on without looking. */
void kl_block_link(struct kl_block_cache *c, const struct kl_op *op, struct kl_block *to);

KL_INLINE bool kl_single_stepping(const struct kl_vcpu *v)
{
	return v->blocks->stepping;
}

KL_INLINE uint64_t kl_code_lin(const struct kl_vcpu *v)
{
	return KL_LIKELY(v->code_mode == KL_CODE64) ? v->rip
						    : (uint32_t)(v->seg[KL_CS].base + v->rip);
}

/*
 * What lies in one page of code lies together in the tables, too, in 256 places: a small guest
 * touches little of them.
 */
KL_INLINE uint32_t kl_block_hash(uint64_t key)
{
	uint64_t page = key >> (KL_PAGE_SHIFT + 2);
	uint32_t offset = (uint32_t)(key >> 2) & (KL_PAGE_SIZE - 1);

	return (uint32_t)(page * 0x9e3779b97f4a7c15ull >> 40) << 8 | offset * 0x9e3779b1u >> 24;
}

KL_INLINE struct kl_block *kl_block_in_front(const struct kl_block_cache *c, uint64_t key)
{
	const struct kl_block_front *f = &c->front[kl_block_hash(key) % KL_BLOCK_FRONT];

	return f->key == key ? f->b : NULL;
}

bool kl_block_same_short(const struct kl_block *b);

KL_INLINE bool kl_v128_is_zero(kl_v128 x, unsigned mask)
{
	typedef char bytes __attribute__((vector_size(16)));

	return ((unsigned)__builtin_ia32_pmovmskb128((bytes)x == (bytes){0}) & mask) == mask;
}

/* Whether memory still holds what the block was decoded from. */
KL_INLINE bool kl_block_same(const struct kl_block *b)
{
	const uint8_t *code = b->code, *own = b->own;
	unsigned n = b->nr_bytes;
	kl_v128 diff;

	if (n >= 16) {
		diff = kl_load128(code + n - 16) ^ *(const kl_v128 *)(own + n - 16);
		for (unsigned i = 0; i + 16 < n; i += 16)
			diff |= kl_load128(code + i) ^ *(const kl_v128 *)(own + i);
		return kl_v128_is_zero(diff, 0xffff);
	}
	if (KL_LIKELY(b->short_mask))
		return kl_v128_is_zero(kl_load128(code) ^ *(const kl_v128 *)own, b->short_mask);
	return kl_block_same_short(b);
}

/*
 * @b is entered: compare. False: it is not to run now, because memory has changed, or because its
 * page is to be asked for.
 */
KL_INLINE bool kl_block_verify(struct kl_vcpu *v, struct kl_block *b)
{
	/* First: what is written after this look is reported. */
	bool live = kl_code_live(b->page);

	if (KL_UNLIKELY(!kl_block_same(b))) {
		b->gen = b->pass = KL_STALE;
		return false;
	}
	if (KL_LIKELY(live)) {
		b->seen = v->code_epoch;
		return true;
	}
	b->seen = KL_STALE;
	if (KL_LIKELY(--b->until))
		return true;
	v->blocks->ask = b;
	return false;
}

struct kl_block *kl_block_get_slow(struct kl_vcpu *v, uint64_t key, uint64_t lin,
				   const uint8_t *code);

/*
 * The block at v->rip, or NULL: execute kl_block_one()'s instruction. Sets v->code_page. May
 * leave (#PF on fetch).
 */
KL_INLINE struct kl_block *kl_block_get(struct kl_vcpu *v)
{
	struct kl_block_cache *c = v->blocks;
	uint64_t lin = kl_code_lin(v), key = lin << 2 | v->code_mode;
	const uint8_t *code = kl_fetch_pointer(v, lin);
	kl_gfn_t gfn;
	bool live;
	struct kl_block *b = kl_block_in_front(c, key);

	if (KL_UNLIKELY(!code)) {
		v->cur_op = NULL;
		code = kl_fetch_slow(v, lin);
		if (KL_UNLIKELY(v->bp.exec) && kl_debug_code_page(v, lin))
			return NULL;
	}
	v->code_page = (uint8_t *)((uint64_t)code & KL_PAGE_MASK);
	gfn = kl_fetch_gfn(v, lin);
	live = false;
	if (KL_LIKELY(b)) {
		/* What it was true of may come back (tlb.h), but not with this pointer. */
		b->gen = KL_STALE;
		b->code = code;
		/* Before the comparison, as in kl_block_verify(). */
		live = kl_code_live(b->page) && b->gfn == gfn;
	}
	if (KL_UNLIKELY(!b || !kl_block_same(b))) {
		if (b)
			b->pass = KL_STALE;
		live = false;
		b = kl_block_get_slow(v, key, lin, code);
		if (!b)
			return NULL;
	}
	b->gen = v->code_gen;
	b->seen = live ? v->code_epoch : KL_STALE;
	if (KL_UNLIKELY(b->gfn != gfn)) {
		b->gfn = gfn;
		b->page = kl_code_find(v, gfn);
	}
	if (KL_UNLIKELY(v->code_mode != KL_CODE64)) {
		uint64_t top = v->code_mode == KL_CODE16 ? 0xffff : 0xffffffff;

		if (v->rip + b->nr_bytes - 1 > kl_min(top, (uint64_t)v->seg[KL_CS].limit))
			return NULL;
	}
	return b;
}

/* Decode the one instruction at v->rip, whichever pages it lies in. May leave. */
const struct kl_op *kl_block_one(struct kl_vcpu *v);
