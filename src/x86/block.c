/* SPDX-License-Identifier: MIT */
/*
 * The per-vCPU cache of decoded blocks (T8).
 *
 * A block is used only if its bytes equal memory, through the pointer that the vCPU's TLB
 * gives for its address. They are compared at each entry, so that nobody has to notify; blocks that
 * are entered often have their page tracked instead (code.h). A store of this vCPU into the page
 * that it executes sets v->code_written, and the block is left after that instruction.
 *
 * All blocks live in one arena, which is filled part by part. When all parts are full, the blocks
 * of one go, chosen at random: if there is more hot code than room, some of it is then still there
 * when its turn comes again, however regularly it comes. No block is running then, and what points
 * to one is cleared before its memory is used again: both tables by key, the links of
 * blocks in other parts, the jump that wants to be linked, and translations (xlate/parts.c). A
 * block to be asked for (ask) has been answered before another is looked for.
 */
#include <string.h>

#include "base/config.h"
#include "base/failpoint.h"
#include "host/sys.h"
#include "x86/block.h"
#include "x86/fast.h"
#include "x86/memo.h"
#include "x86/thunk.h"
#include "x86/xlate/xlate.h"

#define MAX_OPS 32
/* Behind a conditional jump a block goes on as long as it is short: all of it is compared. */
#define MAX_BYTES_BEHIND_JUMP 32
/* Of the arena: three blocks or so. */
#define BYTES_PER_SET 2048u

static size_t block_size(unsigned nr_ops, unsigned nr_bytes)
{
	return sizeof(struct kl_block) + (nr_ops + 1) * sizeof(struct kl_op) +
	       ((nr_bytes + 15u) & ~15u);
}

static size_t arena_size(const struct kl_block_cache *c)
{
	return (size_t)KL_BLOCK_PARTS * c->part_size;
}

static unsigned max_links(const struct kl_block_cache *c)
{
	return c->part_size / 128;
}

static size_t links_size(const struct kl_block_cache *c)
{
	return (size_t)KL_BLOCK_PARTS * max_links(c) * sizeof(struct kl_block_link);
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
	if (v->blocks && v->blocks->memos)
		kl_sys_unmap(v->blocks->memos, sizeof(*v->blocks->memos));
	if (v->blocks && v->blocks->arena) {
		kl_sys_unmap(v->blocks->arena, arena_size(v->blocks));
		kl_sys_unmap(v->blocks->links, links_size(v->blocks));
	}
	if (v->blocks)
		kl_sys_unmap(v->blocks, sizeof(*v->blocks));
	v->blocks = NULL;
}

static uint8_t *part_at(const struct kl_block_cache *c, unsigned i)
{
	return c->arena + (size_t)i * c->part_size;
}

/* Of as many sets as there is a power of two up to @n. */
static unsigned set_mask(size_t n)
{
	unsigned sets = KL_BLOCK_SETS;

	while (sets > 1 && sets > n)
		sets /= 2;
	return sets - 1;
}

static struct kl_block_way *set_of(struct kl_block_cache *c, uint64_t key)
{
	return c->sets[kl_block_hash(key) >> 2 & c->set_mask];
}

static uint32_t tag_of(uint64_t key)
{
	return (uint32_t)((key >> 2) * 0x9e3779b97f4a7c15ull >> 8);
}

static uint32_t place_of(const struct kl_block_cache *c, const struct kl_block *b)
{
	return (uint32_t)(((const uint8_t *)b - c->arena) / 8) + 1;
}

static struct kl_block *block_at(const struct kl_block_cache *c, uint32_t at)
{
	return (struct kl_block *)(void *)(c->arena + (at - 1) * 8ul);
}

/* Where the block with @key is found, or NULL. */
static struct kl_block_way *find(struct kl_block_cache *c, uint64_t key)
{
	struct kl_block_way *set = set_of(c, key);
	uint32_t tag = tag_of(key);

	for (struct kl_block_way *w = set; w < set + KL_BLOCK_WAYS; w++)
		if (w->tag == tag && w->at && block_at(c, w->at)->key == key)
			return w;
	return NULL;
}

static unsigned random_below(struct kl_block_cache *c, unsigned n)
{
	c->random = c->random * 6364136223846793005 + 1442695040888963407;
	return (unsigned)(c->random >> 33) % n;
}

/* There is none with its key. If the set is full another is not found any more. */
static void insert(struct kl_block_cache *c, const struct kl_block *b)
{
	struct kl_block_way *set = set_of(c, b->key), *w = set;

	while (w < set + KL_BLOCK_WAYS && w->at)
		w++;
	if (w == set + KL_BLOCK_WAYS)
		w = set + random_below(c, KL_BLOCK_WAYS);
	*w = (struct kl_block_way){tag_of(b->key), place_of(c, b)};
}

/* Of ops in @part, those to [@start, @start + @len) of the arena. */
static void drop_links(struct kl_block_cache *c, unsigned part, uint64_t start, uint64_t len)
{
	struct kl_block_link *links = c->links + (size_t)part * max_links(c);
	unsigned kept = 0;

	for (unsigned i = 0; i < c->nr_links[part]; i++) {
		struct kl_op *op = (struct kl_op *)(void *)(c->arena + links[i].op * 8ul);

		if (links[i].to - start >= len)
			links[kept++] = links[i];
		else if ((uint8_t *)op->link == c->arena + links[i].to * 8ul)
			op->link = NULL; /* it has no newer one */
	}
	c->nr_links[part] = kept;
}

void kl_block_link(struct kl_block_cache *c, const struct kl_op *op, struct kl_block *to)
{
	uint64_t at = (uint64_t)((const uint8_t *)op - c->arena);
	unsigned part = (unsigned)(at / c->part_size);

	if (op->link == to)
		return;
	if (c->nr_links[part] == max_links(c))
		drop_links(c, part, 0, UINT64_MAX);
	c->links[(size_t)part * max_links(c) + c->nr_links[part]++] = (struct kl_block_link){
		(uint32_t)(at / 8), (uint32_t)(((uint8_t *)to - c->arena) / 8)};
	((struct kl_op *)(uintptr_t)op)->link = to;
}

static void evict(struct kl_block_cache *c, unsigned part)
{
	const uint8_t *lo = part_at(c, part), *hi = lo + c->part_size;
#define GOES(b) ((const uint8_t *)(b) >= lo && (const uint8_t *)(b) < hi)

	for (unsigned i = 0; i < KL_BLOCK_FRONT; i++)
		if (GOES(c->front[i].b))
			c->front[i].b = NULL;
	/* All of it, in order, is less than a look at each block in the part. */
	for (unsigned i = 0; i <= c->set_mask; i++)
		for (unsigned k = 0; k < KL_BLOCK_WAYS; k++)
			if (c->sets[i][k].at && GOES(block_at(c, c->sets[i][k].at)))
				c->sets[i][k].at = 0;
	for (unsigned i = 0; i < KL_BLOCK_PARTS; i++)
		if (i != part)
			drop_links(c, i, (uint64_t)part * c->part_size / 8, c->part_size / 8);
#undef GOES
	c->from = NULL;
	if (c->xlate)
		kl_xlate_drop(c->xlate, lo, hi);
	c->used[part] = c->nr_links[part] = 0;
	c->nr_evicted++;
}

/* Another part is filled. */
static void next_part(struct kl_block_cache *c)
{
	unsigned i = 1;

	while (i < KL_BLOCK_PARTS && c->used[(c->part + i) % KL_BLOCK_PARTS])
		i++;
	if (i == KL_BLOCK_PARTS) {
		i = 1 + random_below(c, KL_BLOCK_PARTS - 1);
		evict(c, (c->part + i) % KL_BLOCK_PARTS);
	}
	c->part = (c->part + i) % KL_BLOCK_PARTS;
}

/* Room for a block, or NULL: without memory everything is executed uncached. */
static struct kl_block *room(struct kl_block_cache *c, size_t size)
{
	if (!c->arena) {
		c->part_size = kl_config.block_part ? kl_config.block_part : KL_BLOCK_PART;
		c->set_mask = set_mask(arena_size(c) / BYTES_PER_SET);
		c->arena = kl_sys_map(arena_size(c));
		c->links = c->arena ? kl_sys_map(links_size(c)) : NULL;
		if (c->arena && !c->links) {
			kl_sys_unmap(c->arena, arena_size(c));
			c->arena = NULL;
		}
		if (c->arena)
			c->memos = kl_sys_map(sizeof(*c->memos));
	}
	if (!c->arena)
		return NULL;
	if (c->used[c->part] + size > c->part_size)
		next_part(c);
	return (struct kl_block *)(void *)(part_at(c, c->part) + c->used[c->part]);
}

/*
 * Flags that every path overwrites before anything can see them need not be computed. They
 * can be seen at a fault, when the block is left early after a store, and at its end.
 */
static void drop_dead_flags(struct kl_op *ops, const struct kl_flag_use *use, unsigned n)
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

/* False: more bytes are needed. */
static bool decode(struct kl_block_cache *c, struct kl_op *op, struct kl_flag_use *use,
		   enum kl_code_mode mode, uint64_t rip, const uint8_t *bytes, unsigned avail)
{
	struct kl_decode d;
	bool mem;

	if (c->memos && kl_memo_find(c->memos, op, use, mode, rip, bytes, avail))
		return true;
	if (kl_decode_one(&d, op, mode, rip, bytes, avail) == KL_DECODE_TRUNCATED)
		return false;
	mem = op->flags & KL_OPF_MEM;
	use->noflags = d.noflags;
	use->before = !d.simple || mem || d.reads_flags;
	use->after = !d.simple || d.stores;
	use->kills = d.writes_flags;
	op->run = kl_fast_select(&d, &use->run_noflags);
	if (c->memos)
		kl_memo_add(c->memos, &d, use, rip, bytes);
	return true;
}

/* Decode the straight line at @lin from a private copy of its bytes. NULL: use kl_block_one. */
static struct kl_block *build(struct kl_vcpu *v, uint64_t key, uint64_t lin, const uint8_t *code)
{
	struct kl_block_cache *c = v->blocks;
	unsigned avail = (unsigned)(KL_PAGE_SIZE - (lin & ~KL_PAGE_MASK)), len = 0, n = 0;
	uint8_t bytes[KL_BLOCK_MAX_BYTES + 16] = {0};
	struct kl_flag_use use[MAX_OPS];
	struct kl_block *b;
	uint8_t *own;

	avail = kl_min(avail, (unsigned)KL_BLOCK_MAX_BYTES);
	b = room(c, block_size(MAX_OPS, KL_BLOCK_MAX_BYTES));
	if (!b)
		return NULL;
	kl_access_copy(bytes, code, avail);
	while (n < MAX_OPS && len < avail) {
		struct kl_op *op = &b->ops[n];

		if (!decode(c, op, &use[n], (enum kl_code_mode)v->code_mode, v->rip + len,
			    bytes + len, avail - len))
			break;
		op->offset = (uint8_t)len;
		len += op->len;
		op->nth = (uint8_t)++n;
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
	c->used[c->part] += (uint32_t)block_size(n, len);
	c->nr_built++;
	return b;
}

static struct kl_single *single_of(struct kl_block_cache *c, uint64_t key)
{
	return &c->single[kl_block_hash(key) % KL_NR_SINGLES];
}

/* Was @s decoded from @lo and @hi, as far as its first @n bytes go? */
static bool same_bytes(const struct kl_single *s, unsigned n, uint64_t lo, uint64_t hi)
{
	uint64_t mask[2];

	kl_first_bytes(mask, n);
	return !(((lo ^ s->lo) & mask[0]) | ((hi ^ s->hi) & mask[1]));
}

/*
 * The instruction of which the first @n bytes are at @code, and then its page ends, has more: it
 * had when it began so before. In a loop that goes on in another page that is each time.
 */
static bool known_to_cross(const struct kl_single *s, uint64_t key, const uint8_t *code, unsigned n)
{
	uint64_t bytes[2] = {0};

	if (KL_LIKELY(n >= 15) || s->key != key || s->op.len <= n)
		return false;
	kl_access_copy(bytes, code, n);
	return same_bytes(s, n, bytes[0], bytes[1]);
}

struct kl_block *kl_block_get_slow(struct kl_vcpu *v, uint64_t key, uint64_t lin,
				   const uint8_t *code)
{
	struct kl_block_cache *c = v->blocks;
	struct kl_block_way *w = find(c, key);
	struct kl_block *b = NULL;

	if (w) {
		b = block_at(c, w->at);
		b->gen = KL_STALE;
		b->code = code;
		if (!kl_block_same(b)) {
			b->pass = KL_STALE;
			w->at = 0; /* its memory comes back with the part's */
			c->nr_stale++;
			b = NULL;
		}
	}
	if (!b) {
		if (known_to_cross(single_of(c, key), key, code,
				   (unsigned)(KL_PAGE_SIZE - (lin & ~KL_PAGE_MASK))))
			return NULL;
		b = build(v, key, lin, code);
		if (!b)
			return NULL;
		insert(c, b);
	}
	c->front[kl_block_hash(key) % KL_BLOCK_FRONT] = (struct kl_block_front){key, b};
	return b;
}

/* The bytes at @lin and what they decode to, over a page boundary if need be. */
static void decode_single(struct kl_vcpu *v, struct kl_single *s, uint64_t key, uint64_t lin,
			  const uint8_t *code, unsigned n)
{
	enum kl_code_mode mode = (enum kl_code_mode)v->code_mode;
	bool crosses = known_to_cross(s, key, code, n);
	struct kl_flag_use use;
	uint8_t bytes[32] = {0};
	uint64_t next;

	/* Whatever leaves below finds no half-made entry. */
	s->op.len = 0;
	s->key = key;
	kl_access_copy(bytes, code, n);
	if (crosses || !decode(v->blocks, &s->op, &use, mode, v->rip, bytes, n)) {
		s->op.len = 0;
		next = (lin | ~KL_PAGE_MASK) + 1;
		if (mode != KL_CODE64)
			next = (uint32_t)next;
		code = kl_fetch_pointer(v, next);
		if (!code)
			code = kl_fetch_slow(v, next);
		kl_access_copy(bytes + n, code, 16);
		(void)decode(v->blocks, &s->op, &use, mode, v->rip, bytes, n + 16);
	}
	memcpy(&s->lo, bytes, 8);
	memcpy(&s->hi, bytes + 8, 8);
}

const struct kl_op *kl_block_one(struct kl_vcpu *v)
{
	uint64_t lin = kl_code_lin(v), key = lin << 2 | v->code_mode;
	struct kl_single *s = single_of(v->blocks, key);
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
	    !same_bytes(s, s->op.len, kl_load64(code), kl_load64(code + 8)))
		decode_single(v, s, key, lin, code, n);
	if (v->code_mode != KL_CODE64 && s->op.fn != kl_op_ud &&
	    v->rip + s->op.len - 1 > v->seg[KL_CS].limit)
		kl_raise_error(v, KL_EXC_GP, 0);
	return &s->op;
}
