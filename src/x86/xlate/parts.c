/* SPDX-License-Identifier: MIT */
/*
 * What is in the memory for generated code, and how room is made in it.
 *
 * The memory is used part by part, in turn. When the next part is not empty its translations go,
 * and nothing refers to them any more before the first byte is written over. What may refer to
 * generated code is
 *   - kl_block.host, of the blocks that are in the part's list;
 *   - jumps from block to block, each of which is an edge of some part: those that lead into the
 *     part get back what they had before they were linked, the way out of their own block;
 *   - the table of indirect jumps: what leads into the part is forgotten;
 *   - the stack and the interrupted context of a handler: they don't, as no generated code is
 *     running.
 *
 * If blocks go (block.c), so do their translations: nothing leads to them, and their
 * memory comes back with the part. Their own edges lead out of code that nobody executes.
 */
#include <string.h>

#include "base/config.h"
#include "base/failpoint.h"
#include "host/sys.h"
#include "host/valgrind.h"
#include "x86/xlate/xlate.h"

/* No less code is there for each; and what one block may have of them at most. */
#define CODE_PER_EDGE  20u
#define CODE_PER_POINT 16u
#define CODE_PER_BLOCK 64u
#define MAX_EDGES      (KL_XLATE_ROOM / 512)
#define MAX_POINTS     (KL_XLATE_ROOM / 256)

#define NR_JUMPS   (2 * KL_XLATE_JUMPS)
#define SIZE_JUMPS (NR_JUMPS * sizeof(struct kl_xlate_jump))

static size_t size_edges(const struct kl_xlate *x)
{
	return x->part_size / CODE_PER_EDGE * sizeof(struct kl_xlate_edge);
}

static size_t size_points(const struct kl_xlate *x)
{
	return x->part_size / CODE_PER_POINT * sizeof(struct kl_xlate_point);
}

static size_t size_blocks(const struct kl_xlate *x)
{
	return x->part_size / CODE_PER_BLOCK * sizeof(struct kl_block *);
}

static size_t size_lists(const struct kl_xlate *x)
{
	return (size_edges(x) + size_points(x) + size_blocks(x)) * KL_XLATE_PARTS;
}

bool kl_xlate_wanted(void)
{
#if KL_TSAN
	return false;
#else
	return kl_config.translate && !kl_under_valgrind();
#endif
}

struct kl_xlate *kl_xlate_create(void)
{
	return kl_sys_map(sizeof(struct kl_xlate));
}

static void unmap(struct kl_xlate *x)
{
	if (x->rw)
		kl_xlate_unmap(x);
	if (x->jumps)
		kl_sys_unmap(x->jumps, SIZE_JUMPS);
	if (x->lists)
		kl_sys_unmap(x->lists, size_lists(x));
	if (x->work)
		kl_sys_unmap(x->work, kl_xlate_work_size);
	if (x->check)
		kl_sys_unmap(x->check, kl_check_size);
	*x = (struct kl_xlate){.refused = true};
}

void kl_xlate_destroy(struct kl_xlate *x)
{
	unmap(x);
	kl_sys_unmap(x, sizeof(*x));
}

/* Those that lead to [@lo, @hi) of the code. */
static void forget_jumps(struct kl_xlate *x, uint32_t lo, uint32_t hi)
{
	for (unsigned i = 0; i < NR_JUMPS; i++) {
		struct kl_xlate_jump *j = &x->jumps[i];

		/* None: an address that is looked for in another entry. */
		if (!j->host || (uint64_t)((const uint8_t *)j->host - x->rx) - lo < hi - lo)
			*j = (struct kl_xlate_jump){.rip = (i ^ 1ull) << 1};
	}
}

static void unlink_edges(struct kl_xlate *x, uint32_t lo, uint32_t hi)
{
	for (unsigned i = 0; i < KL_XLATE_PARTS; i++) {
		const struct kl_xlate_part *p = &x->parts[i];

		for (const struct kl_xlate_edge *e = p->edges; e < p->edges + p->nr_edges; e++) {
			uint32_t to, from = e->site + 4;

			memcpy(&to, x->rw + e->site, 4);
			to += from;
			if (to == e->out || to - lo >= hi - lo)
				continue;
			to = e->out - from;
			memcpy(x->rw + e->site, &to, 4);
		}
	}
}

void kl_xlate_unlink(struct kl_xlate *x, const struct kl_block *b)
{
	uint32_t at = (uint32_t)(b->host - x->rx);

	unlink_edges(x, at, at + 1);
	forget_jumps(x, at, at + 1);
	kl_xlate_serialize();
}

static void forget(struct kl_block *b)
{
	b->host = NULL;
	b->pass = KL_STALE;
	b->ops[0].run = kl_xlate_first;
	b->brief = 0;
	/* To be used as often as ever: where there is more of it than room, little is translated.
	 */
	b->heat = 0;
}

/* What is used next. */
static void use_part(struct kl_xlate *x, unsigned i)
{
	struct kl_xlate_part *p = &x->parts[i];
	uint32_t lo = x->start + i * x->part_size, hi = lo + x->part_size;

	x->part = i;
	x->used = lo;
	x->end = hi;
	p->nr_points = p->nr_edges = 0;
	if (!p->nr_blocks)
		return; /* nor does anything lead there */
	for (unsigned k = 0; k < p->nr_blocks; k++)
		forget(p->blocks[k]);
	p->nr_blocks = 0;
	unlink_edges(x, lo, hi);
	forget_jumps(x, lo, hi);
	x->nr_evicted++;
}

void kl_xlate_make_room(struct kl_xlate *x)
{
	const struct kl_xlate_part *p = &x->parts[x->part];

	if (x->used + KL_XLATE_ROOM > x->end || p->nr_blocks == x->part_size / CODE_PER_BLOCK ||
	    p->nr_points + MAX_POINTS > x->part_size / CODE_PER_POINT ||
	    p->nr_edges + MAX_EDGES > x->part_size / CODE_PER_EDGE)
		use_part(x, (x->part + 1) % KL_XLATE_PARTS);
}

void kl_xlate_drop(struct kl_xlate *x, const void *from, const void *to)
{
	bool any = false;

	for (unsigned i = 0; i < KL_XLATE_PARTS; i++) {
		struct kl_xlate_part *p = &x->parts[i];
		unsigned kept = 0;

		for (unsigned k = 0; k < p->nr_blocks; k++)
			if ((uintptr_t)p->blocks[k] - (uintptr_t)from >=
			    (uintptr_t)to - (uintptr_t)from)
				p->blocks[kept++] = p->blocks[k];
		any |= kept < p->nr_blocks;
		p->nr_blocks = kept;
	}
	if (!any)
		return;
	/* Those of the rest are linked again when they are used. */
	unlink_edges(x, 0, UINT32_MAX);
	forget_jumps(x, 0, UINT32_MAX);
	kl_xlate_serialize();
}

void kl_xlate_wrapped(struct kl_vcpu *v)
{
	struct kl_xlate *x = v->blocks->xlate;

	for (unsigned i = 0; x && i < KL_XLATE_PARTS; i++)
		for (unsigned k = 0; k < x->parts[i].nr_blocks; k++)
			x->parts[i].blocks[k]->pass = KL_STALE;
}

/* What was written through other addresses is executed next. */
void kl_xlate_serialize(void)
{
	__asm__ volatile("movl %%ss, %%eax\n\t"
			 "movq %%rsp, %%rcx\n\t"
			 "pushq %%rax\n\t"
			 "pushq %%rcx\n\t"
			 "pushfq\n\t"
			 "movl %%cs, %%eax\n\t"
			 "pushq %%rax\n\t"
			 "leaq 1f(%%rip), %%rax\n\t"
			 "pushq %%rax\n\t"
			 "iretq\n"
			 "1:"
			 :
			 :
			 : "rax", "rcx", "cc", "memory");
}

/* At the first translation. */
bool kl_xlate_ready(struct kl_vcpu *v, struct kl_xlate *x)
{
	uint8_t *at;

	if (x->rw || x->refused)
		return x->rw;
	x->part_size = kl_config.code_part ? kl_config.code_part : KL_XLATE_PART;
	if (!kl_xlate_map(x)) {
		x->refused = true;
		return false;
	}
	if (!kl_failpoint("x86-xlate-lists")) {
		x->jumps = kl_sys_map(SIZE_JUMPS);
		x->lists = kl_sys_map(size_lists(x));
		x->work = kl_sys_map(kl_xlate_work_size);
	}
	if (!x->jumps || !x->lists || !x->work) {
		unmap(x);
		return false;
	}
	at = x->lists;
	for (unsigned i = 0; i < KL_XLATE_PARTS; i++) {
		struct kl_xlate_part *p = &x->parts[i];

		p->blocks = (struct kl_block **)(void *)at;
		at += size_blocks(x);
		p->points = (struct kl_xlate_point *)(void *)at;
		at += size_points(x);
		p->edges = (struct kl_xlate_edge *)(void *)at;
		at += size_edges(x);
	}
	kl_xlate_common(x);
	forget_jumps(x, 0, UINT32_MAX);
	v->jumps = x->jumps;
	v->jumps32 = x->jumps + KL_XLATE_JUMPS;
	use_part(x, 0);
	return true;
}
