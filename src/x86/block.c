/* SPDX-License-Identifier: MIT */
/*
 * The per-vCPU cache of decoded blocks (T8).
 *
 * A block is used only if its bytes equal memory, through the pointer that the vCPU's TLB
 * gives for its address. They are compared at each entry, so that nobody has to notify; blocks that
 * are entered often have their page tracked instead (code.h). A store of this vCPU into the page
 * that it executes sets v->code_written, and the block is left after that instruction.
 *
 * All blocks live in one arena; when it is full, all are dropped.
 */
#include <string.h>

#include "base/failpoint.h"
#include "host/sys.h"
#include "x86/block.h"
#include "x86/fast.h"
#include "x86/thunk.h"
#include "x86/xlate/xlate.h"

/* About 3 MiB of guest code. When it is full all of it goes: more hot code than that is slow. */
#define ARENA_SIZE (64u << 20)
#define MAX_OPS    32
#define MAX_BYTES  224
/* Behind a conditional jump a block goes on as long as it is short: all of it is compared. */
#define MAX_BYTES_BEHIND_JUMP 32

static size_t block_size(unsigned nr_ops, unsigned nr_bytes)
{
	return sizeof(struct kl_block) + (nr_ops + 1) * sizeof(struct kl_op) +
	       ((nr_bytes + 15u) & ~15u);
}

bool kl_block_same_short(const struct kl_block *b)
{
	for (unsigned i = 0; i < b->nr_bytes; i++)
		if (kl_load8(b->code + i) != b->own[i])
			return false;
	return true;
}

int kl_blocks_create(struct kl_vcpu *v)
{
	kl_thunk_init();
	/* Pages that come when they are used: a program may make thousands of vCPUs. */
	v->blocks = kl_failpoint("x86-blocks-map") ? NULL : kl_sys_map(sizeof(*v->blocks));
	kl_not_leaked(v->blocks);
	if (!v->blocks)
		return -12; /* ENOMEM */
	if (kl_xlate_wanted())
		v->blocks->xlate = kl_xlate_create();
	kl_not_leaked(v->blocks->xlate);
	return 0;
}

void kl_blocks_destroy(struct kl_vcpu *v)
{
	if (v->blocks && v->blocks->xlate)
		kl_xlate_destroy(v->blocks->xlate);
	if (v->blocks && v->blocks->arena)
		kl_sys_unmap(v->blocks->arena, ARENA_SIZE);
	if (v->blocks)
		kl_sys_unmap(v->blocks, sizeof(*v->blocks));
	v->blocks = NULL;
}

static void flush(struct kl_block_cache *c)
{
	memset(c->front, 0, sizeof(c->front));
	memset(c->hash, 0, sizeof(c->hash));
	c->used = 0;
	c->nr_flushes++;
	if (c->xlate)
		kl_xlate_flush(c->xlate);
}

/* Room for a block, or NULL: without memory everything is executed uncached. */
static struct kl_block *room(struct kl_block_cache *c, size_t size)
{
	if (!c->arena) {
		c->arena = kl_sys_map(ARENA_SIZE);
		c->used = 0;
	}
	if (!c->arena)
		return NULL;
	if (c->used + size > ARENA_SIZE)
		flush(c);
	return (struct kl_block *)(void *)(c->arena + c->used);
}

/*
 * Flags that every path overwrites before anything can see them need not be computed. They
 * can be seen at a fault, when the block is left early after a store, and at its end.
 */
struct flag_use {
	kl_op_fn *noflags;
	kl_run_fn *run_noflags;
	bool before; /* live at its start whatever comes after */
	bool after;  /* live at its end whatever comes after */
	bool kills;
};

static void drop_dead_flags(struct kl_op *ops, const struct flag_use *use, unsigned n)
{
	bool live = true;

	for (unsigned i = n; i-- > 0;) {
		live |= use[i].after;
		if (!live && use[i].noflags)
			ops[i].fn = use[i].noflags;
		if (!live && use[i].run_noflags)
			ops[i].run = use[i].run_noflags;
		live = use[i].before || (live && !use[i].kills);
	}
}

static bool ends_block(const struct kl_op *op, unsigned len)
{
	return (op->flags & KL_OPF_END) ||
	       ((op->flags & KL_OPF_LINK) && (len > MAX_BYTES_BEHIND_JUMP || (int64_t)op->imm < 0));
}

/* Decode the straight line at @lin from a private copy of its bytes. NULL: use kl_block_one. */
static struct kl_block *build(struct kl_vcpu *v, uint64_t key, uint64_t lin, const uint8_t *code)
{
	struct kl_block_cache *c = v->blocks;
	unsigned avail = (unsigned)(KL_PAGE_SIZE - (lin & ~KL_PAGE_MASK)), len = 0, n = 0;
	uint8_t bytes[MAX_BYTES + 16] = {0};
	struct flag_use use[MAX_OPS];
	struct kl_decode d;
	struct kl_block *b;
	uint8_t *own;

	avail = kl_min(avail, (unsigned)MAX_BYTES);
	b = room(c, block_size(MAX_OPS, MAX_BYTES));
	if (!b)
		return NULL;
	kl_access_copy(bytes, code, avail);
	while (n < MAX_OPS && len < avail) {
		struct kl_op *op = &b->ops[n];
		bool mem;

		if (kl_decode_one(&d, op, (enum kl_code_mode)v->code_mode, v->rip + len,
				  bytes + len, avail - len) == KL_DECODE_TRUNCATED)
			break;
		mem = op->flags & KL_OPF_MEM;
		use[n].noflags = d.noflags;
		use[n].before = !d.simple || mem || d.reads_flags;
		use[n].after = !d.simple || d.stores;
		use[n].kills = d.writes_flags;
		op->offset = (uint8_t)len;
		len += op->len;
		op->nth = (uint8_t)++n;
		op->run = kl_fast_select(&d, &use[n - 1].run_noflags);
		if (ends_block(op, len))
			break;
	}
	if (!n)
		return NULL;
	drop_dead_flags(b->ops, use, n);
	kl_fast_fuse(b->ops, n);
	b->ops[n] = (struct kl_op){
		.run = kl_fast_go_on, .offset = (uint8_t)len, .nth = (uint8_t)(n + 1)};
	b->key = key;
	b->rip = lin;
	b->nr_ops = (uint16_t)n;
	b->nr_bytes = (uint16_t)len;
	b->short_mask = len < 16 && (lin & ~KL_PAGE_MASK) + 16 <= KL_PAGE_SIZE
				? (uint16_t)((1u << len) - 1)
				: 0;
	own = (uint8_t *)&b->ops[n + 1];
	memcpy(own, bytes, (len + 15u) & ~15u);
	b->own = own;
	b->code = code;
	b->seen = KL_STALE;
	b->until = KL_BLOCK_PATIENCE;
	b->gfn = KL_STALE;
	b->page = NULL;
	if (c->xlate && v->code_mode != KL_CODE16)
		kl_xlate_prepare(b);
	c->used += block_size(n, len);
	c->nr_built++;
	return b;
}

struct kl_block *kl_block_get_slow(struct kl_vcpu *v, uint64_t key, uint64_t lin,
				   const uint8_t *code)
{
	struct kl_block_cache *c = v->blocks;
	struct kl_block **link = &c->hash[kl_block_hash(key) % KL_BLOCK_HASH], *b;

	for (; (b = *link); link = &b->next) {
		if (b->key != key)
			continue;
		b->gen = KL_STALE;
		b->code = code;
		if (kl_block_same(b))
			break;
		b->pass = KL_STALE;
		*link = b->next; /* its memory comes back with the next flush */
		c->nr_stale++;
		b = NULL;
		break;
	}
	if (!b) {
		b = build(v, key, lin, code);
		if (!b)
			return NULL;
		link = &c->hash[kl_block_hash(key) % KL_BLOCK_HASH];
		b->next = *link;
		*link = b;
	}
	c->front[kl_block_hash(key) % KL_BLOCK_FRONT] = b;
	return b;
}

/* Do the first @len bytes of two 16-byte strings agree? */
static bool same_bytes(const struct kl_single *s, uint64_t lo, uint64_t hi)
{
	unsigned len = s->op.len;
	uint64_t low_mask = len >= 8 ? ~0ull : (1ull << (8 * len)) - 1;
	uint64_t high_mask = len > 8 ? (1ull << (8 * (len - 8))) - 1 : 0;

	return !(((lo ^ s->lo) & low_mask) | ((hi ^ s->hi) & high_mask));
}

/* The bytes at @lin and what they decode to, over a page boundary if need be. */
static void decode_single(struct kl_vcpu *v, struct kl_single *s, uint64_t lin, const uint8_t *code,
			  unsigned n)
{
	uint8_t bytes[32] = {0};
	struct kl_decode d;
	uint64_t next;

	/* Whatever leaves below finds no half-made entry. */
	s->op.len = 0;
	kl_access_copy(bytes, code, n);
	if (kl_decode_one(&d, &s->op, (enum kl_code_mode)v->code_mode, v->rip, bytes, n) ==
	    KL_DECODE_TRUNCATED) {
		s->op.len = 0;
		next = (lin | ~KL_PAGE_MASK) + 1;
		if (v->code_mode != KL_CODE64)
			next = (uint32_t)next;
		code = kl_fetch_pointer(v, next);
		if (!code)
			code = kl_fetch_slow(v, next);
		kl_access_copy(bytes + n, code, 16);
		kl_decode_one(&d, &s->op, (enum kl_code_mode)v->code_mode, v->rip, bytes, n + 16);
	}
	memcpy(&s->lo, bytes, 8);
	memcpy(&s->hi, bytes + 8, 8);
}

const struct kl_op *kl_block_one(struct kl_vcpu *v)
{
	uint64_t lin = kl_code_lin(v), key = lin << 2 | v->code_mode;
	struct kl_single *s = &v->blocks->single[kl_block_hash(key) % KL_NR_SINGLES];
	unsigned n = (unsigned)(KL_PAGE_SIZE - (lin & ~KL_PAGE_MASK));
	const uint8_t *code = kl_fetch_pointer(v, lin);

	n = kl_min(n, 16u);
	v->cur_op = NULL;
	if (KL_UNLIKELY(v->bp.exec))
		kl_debug_fetch(v, lin);
	if (!code)
		code = kl_fetch_slow(v, lin);
	v->code_page = (uint8_t *)((uint64_t)code & KL_PAGE_MASK);
	if (v->code_mode != KL_CODE64 && v->rip > v->seg[KL_CS].limit)
		kl_raise_error(v, KL_EXC_GP, 0);
	if (s->key != key || !s->op.len || n < 16 ||
	    !same_bytes(s, kl_load64(code), kl_load64(code + 8))) {
		s->key = key;
		decode_single(v, s, lin, code, n);
	}
	if (v->code_mode != KL_CODE64 && s->op.fn != kl_op_ud &&
	    v->rip + s->op.len - 1 > v->seg[KL_CS].limit)
		kl_raise_error(v, KL_EXC_GP, 0);
	return &s->op;
}
