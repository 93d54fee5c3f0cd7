/* SPDX-License-Identifier: MIT */
/*
 * The per-vCPU cache of decoded blocks (block.c), as interp.c uses it.
 *
 * A block is straight-line code of one page, keyed by linear address and code mode, with a
 * private copy of the bytes that it was decoded from. kl_block_get() compares them with
 * memory each time (T8). Everything is the vCPU thread's own.
 */
#pragma once

#include "x86/debug.h"
#include "x86/insn.h"

struct kl_block {
	uint64_t key;
	struct kl_block *next; /* in its hash chain */
	uint16_t nr_ops, nr_bytes;
	struct kl_op ops[]; /* then nr_bytes of code */
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

#define KL_BLOCK_FRONT 2048
#define KL_BLOCK_HASH  4096

struct kl_block_cache {
	struct kl_block *front[KL_BLOCK_FRONT]; /* direct-mapped, before the hash */
	struct kl_block *hash[KL_BLOCK_HASH];
	uint8_t *arena;
	size_t used;
	bool stepping; /* kl_interp_one: one element of a string instruction at a time */
	const struct kl_op *run_end; /* of the block whose count is in insn_count, or NULL */
	struct kl_single single[KL_NR_SINGLES]; /* by hash of the key */
	/* Statistics for tests. */
	uint64_t nr_built, nr_flushes, nr_stale;
};

KL_INLINE bool kl_single_stepping(const struct kl_vcpu *v)
{
	return v->blocks->stepping;
}

KL_INLINE uint64_t kl_code_lin(const struct kl_vcpu *v)
{
	return KL_LIKELY(v->code_mode == KL_CODE64) ? v->rip
						    : (uint32_t)(v->seg[KL_CS].base + v->rip);
}

KL_INLINE unsigned kl_block_hash(uint64_t key)
{
	return (unsigned)(key >> 2 ^ key >> 14);
}

KL_INLINE uint64_t kl_block_bytes(const uint8_t *own, unsigned size)
{
	uint64_t x = 0;

	__builtin_memcpy(&x, own, size);
	return x;
}

/* Whether memory at @code still holds what the block was decoded from. */
KL_INLINE bool kl_block_same(const struct kl_block *b, const uint8_t *code)
{
	const uint8_t *own = (const uint8_t *)&b->ops[b->nr_ops];
	unsigned n = b->nr_bytes;
	uint64_t diff = 0;

	if (KL_LIKELY(n >= 8)) {
		for (unsigned i = 0; i < n - 8; i += 8)
			diff |= kl_load64(code + i) ^ kl_block_bytes(own + i, 8);
		return !(diff | (kl_load64(code + n - 8) ^ kl_block_bytes(own + n - 8, 8)));
	}
	if (n >= 4) {
		diff = kl_load32(code) ^ kl_block_bytes(own, 4);
		return !(diff | (kl_load32(code + n - 4) ^ kl_block_bytes(own + n - 4, 4)));
	}
	diff = kl_load8(code) ^ own[0];
	if (n >= 2)
		diff |= kl_load16(code + n - 2) ^ kl_block_bytes(own + n - 2, 2);
	return !diff;
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
	struct kl_block *b = c->front[kl_block_hash(key) % KL_BLOCK_FRONT];

	if (KL_UNLIKELY(!code)) {
		v->cur_op = NULL;
		code = kl_fetch_slow(v, lin);
		if (KL_UNLIKELY(v->bp.exec) && kl_debug_code_page(v, lin))
			return NULL;
	}
	v->code_page = (uint8_t *)((uint64_t)code & KL_PAGE_MASK);
	if (KL_UNLIKELY(!b || b->key != key || !kl_block_same(b, code))) {
		b = kl_block_get_slow(v, key, lin, code);
		if (!b)
			return NULL;
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
