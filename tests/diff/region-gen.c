/* SPDX-License-Identifier: MIT */
/*
 * Generates sequences of memory-region calls: small sets of ids, places and sizes, so that calls
 * meet each other, and values at and beyond every limit.
 */
#include <linux/kvm.h>
#include <string.h>

#include "../random.h"
#include "region.h"

#define MAX_PAGES ((1ull << 31) - 1)
#define RECENT    8

const uint64_t windows[WINDOWS] = {
	0,          0x200000,    0x400000,    0xa00000,    0xc00000,    0xfe000000,
	0xffe00000, 0x100000000, 0x100200000, 0x7ffe00000, 0xfffc00000, 0xfffe00000,
};

struct gen {
	uint64_t state;
	unsigned features;
	struct call recent[RECENT]; /* calls that may have made a slot */
	unsigned nrecent;
};

static uint64_t next(struct gen *g)
{
	return random_next(&g->state);
}

static uint64_t below(struct gen *g, uint64_t n)
{
	return next(g) % n;
}

/* True @percent times in 100. */
static bool chance(struct gen *g, unsigned percent)
{
	return below(g, 100) < percent;
}

#define PICK(g, table) ((table)[below(g, sizeof(table) / sizeof((table)[0]))])

static uint32_t any_id(struct gen *g)
{
	static const uint32_t usual[] = {0, 1, 2, 3, 4, 5, 6, 7, 200, 32763};
	static const uint32_t odd[] = {32764,   32765,   32766,   32767,      32768,      0xffff,
				       0x20000, 0x20001, 0x30000, 0xffff0000, 0xffffffff, 0x7ffc};

	if (chance(g, 95))
		return PICK(g, usual);
	if (g->features & FEATURE_ONE && chance(g, 20))
		return (1 << 16) + (uint32_t)below(g, 8);
	return PICK(g, odd);
}

static uint64_t any_gpa(struct gen *g)
{
	static const uint64_t far[] = {
		0xfffff000,
		0x100000000,
		0xfffff000 - 3 * PAGE,
		0xfff000,
		0x7ffe00000,
		0xfffc00000,
		1ull << 46,
		(1ull << 48) - PAGE,
		(1ull << 52) - PAGE,
		(1ull << 52) - 4 * PAGE,
		1ull << 52,
		1ull << 62,
		~0ull - PAGE + 1,
		~0ull - 4 * PAGE + 1,
		1ull << 63,
		(1ull << 51) - PAGE,
	};

	if (chance(g, 75))
		return below(g, 32) * PAGE;
	if (chance(g, 60))
		return windows[below(g, WINDOWS)] + below(g, 16) * PAGE;
	return PICK(g, far);
}

static uint64_t any_hva(struct gen *g)
{
	static const uint64_t odd[] = {
		0,
		PAGE,
		0x7ffffffff000,
		0x7fffffffe000,
		0x7fffffffd000,
		0x800000000000,
		0x8000000000000000,
		0xffff800000000000,
		0xfffffffffffff000,
		0xffffffffffffe000,
		0x7ffffffff000 - (MAX_PAGES << 12),
		0x7fffffffffffe000,
	};

	if (chance(g, 94))
		return POOL + below(g, POOL_PAGES) * PAGE;
	return PICK(g, odd);
}

static uint64_t any_size(struct gen *g)
{
	static const uint64_t big[] = {
		512 * PAGE, 513 * PAGE, 1ull << 30, 600 * PAGE, 1024 * PAGE, 5ull << 20,
	};
	static const uint64_t limit[] = {
		MAX_PAGES << 12, (MAX_PAGES + 1) << 12, (MAX_PAGES + 2) << 12,    1ull << 52,
		1ull << 63,      ~0ull - PAGE + 1,      (MAX_PAGES << 12) - PAGE, 1ull << 47,
		1ull << 46,
	};

	if (chance(g, 90))
		return (1 + below(g, 16)) * PAGE;
	return chance(g, 80) ? PICK(g, big) : PICK(g, limit);
}

static uint32_t any_flags(struct gen *g)
{
	static const uint32_t odd[] = {
		4, 8, 0x10, 0x80000000, 0xffffffff, 5, 6, 7, 9, 0x100,
	};

	if (chance(g, 55))
		return 0;
	if (chance(g, 8))
		return PICK(g, odd);
	if (!(g->features & FEATURE_LOG))
		return KVM_MEM_READONLY;
	return (uint32_t)(1 + below(g, 3));
}

/* Something near the truth: a slot that may exist, with one thing about it changed. */
static void vary(struct gen *g, struct call *c)
{
	static const int64_t near[] = {1, -1, 2, -2, 4, -4, 16, -16, 512};

	*c = g->recent[below(g, g->nrecent)];
	switch (below(g, 12)) {
	case 0:
	case 1:
	case 2:
		c->size = 0;
		break;
	case 3:
	case 4:
		c->gpa += (uint64_t)PICK(g, near) * PAGE;
		break;
	case 5:
		c->gpa = any_gpa(g);
		break;
	case 6:
	case 7:
		c->flags ^= g->features & FEATURE_LOG ? KVM_MEM_LOG_DIRTY_PAGES : KVM_MEM_READONLY;
		break;
	case 8:
		if (chance(g, 50))
			c->flags ^= KVM_MEM_READONLY;
		else
			c->flags = any_flags(g);
		break;
	case 9:
		c->size += (uint64_t)PICK(g, near) * PAGE;
		break;
	case 10:
		c->hva += (uint64_t)PICK(g, near) * PAGE;
		break;
	default:
		c->slot = any_id(g);
		if (chance(g, 60)) /* beside it: adjacent, or one page too near */
			c->gpa += c->size - (chance(g, 40) ? PAGE : 0);
		break;
	}
}

static void misalign(struct gen *g, struct call *c)
{
	static const uint64_t by[] = {1, 8, 0x800, 0xfff, 0x100};

	switch (below(g, 3)) {
	case 0:
		c->gpa += PICK(g, by);
		break;
	case 1:
		c->size += PICK(g, by);
		break;
	default:
		c->hva += PICK(g, by);
		break;
	}
}

static bool plausible(const struct call *c)
{
	return c->size && c->size <= MAX_PAGES << 12 && c->slot < 32764 && c->flags < 4 &&
	       !((c->size | c->gpa | c->hva) & (PAGE - 1)) && c->gpa + c->size > c->gpa &&
	       c->hva + c->size > c->hva && c->hva + c->size <= 0x7ffffffff000;
}

static void make_set(struct gen *g, struct call *c)
{
	if (g->nrecent && chance(g, 60)) {
		vary(g, c);
	} else {
		*c = (struct call){.slot = any_id(g), .gpa = any_gpa(g), .flags = any_flags(g)};
		c->size = chance(g, 6) ? 0 : any_size(g);
		c->hva = any_hva(g);
	}
	c->what = g->features & FEATURE_SET2 && chance(g, 25) ? SET2 : SET;
	c->ptr = GOOD;
	c->gmem = 0;
	c->gmem_offset = c->pad = 0;
	if (c->what == SET2 && chance(g, 10)) { /* without its flag nobody looks at it */
		c->gmem = (uint32_t)next(g);
		c->gmem_offset = next(g);
		c->pad = (uint32_t)next(g);
	} else if (c->flags & 4) { /* refused, also where 6.12 would not look at the descriptor */
		c->gmem = ~0u;
		c->size += c->size ? 0 : PAGE;
	}
	if (chance(g, 3))
		misalign(g, c);
	if (chance(g, 2))
		c->ptr = chance(g, 50) ? BAD_POINTER : HALF_POINTER;
	/* The bitmap and the tables of a large slot cost the kernel too much for every day. */
	if (c->size > 1ull << 30 && c->size <= MAX_PAGES << 12) {
		c->flags &= ~(uint32_t)KVM_MEM_LOG_DIRTY_PAGES;
		if (!chance(g, 3))
			c->size = 1ull << 30;
	}
	if (c->ptr == GOOD && plausible(c))
		g->recent[g->nrecent < RECENT ? g->nrecent++ : below(g, RECENT)] = *c;
}

static const struct call *recent(struct gen *g)
{
	return g->nrecent ? &g->recent[below(g, g->nrecent)] : NULL;
}

static void make_get_log(struct gen *g, struct call *c)
{
	const struct call *r = recent(g);

	*c = (struct call){.what = GET_LOG, .slot = r && chance(g, 90) ? r->slot : any_id(g)};
	if (chance(g, 5))
		c->ptr = chance(g, 50) ? BAD_POINTER : HALF_POINTER;
}

static void make_clear_log(struct gen *g, struct call *c)
{
	static const uint64_t bits[] = {~0ull, 1, 0xff, 0xaaaa, 0, 1ull << 63};
	const struct call *r = recent(g);

	make_get_log(g, c);
	c->what = CLEAR_LOG;
	c->first = chance(g, 75) ? 0 : chance(g, 60) ? 64 * below(g, 10) : below(g, 100);
	c->num = r ? (uint32_t)(r->size / PAGE) : (uint32_t)below(g, 80);
	if (chance(g, 35))
		c->num = (uint32_t)below(g, 3) * 64 + (chance(g, 50) ? (uint32_t)below(g, 64) : 0);
	c->bits = PICK(g, bits);
}

/* A guest-physical address that the guest can reach, often at an edge of a slot. */
static uint64_t reachable(struct gen *g)
{
	static const uint16_t offsets[] = {0, 0, 8, 0x800, 0xff8};
	const struct call *r = recent(g);
	uint64_t gpa = 0;
	bool ok = false;

	if (r && chance(g, 85)) {
		gpa = (r->gpa & ~(PAGE - 1)) + below(g, r->size / PAGE + 1) * PAGE;
		if (chance(g, 40))
			gpa = (r->gpa & ~(PAGE - 1)) + (chance(g, 50) ? r->size : 0);
		if (chance(g, 12))
			gpa -= PAGE;
		gpa &= ~(PAGE - 1);
		for (unsigned w = 0; w < WINDOWS; w++)
			ok |= gpa - windows[w] < 0x200000;
	}
	if (!ok)
		gpa = chance(g, 70) ? below(g, 36) * PAGE
				    : windows[below(g, WINDOWS)] + below(g, 20) * PAGE;
	return gpa + PICK(g, offsets);
}

/* RET at the front of both halves, as a store may cross a page. */
static uint64_t returning(uint64_t v)
{
	return (v & ~0xff000000ffull) | 0xc3000000c3;
}

static void make_guest(struct gen *g, struct call *c)
{
	*c = (struct call){.what = GUEST, .gpa = reachable(g), .value = next(g)};
	c->op = (unsigned)below(g, OPS);
	/*
	 * What is called must return: all words keep RET as their first byte. Where memory is zero
	 * instead, that is an ADD to (%rax), which here is no address.
	 */
	c->value = returning(c->value);
	if (c->op == ADD4)
		c->value &= ~0xffffull;
	if (c->op == FETCH && !chance(g, 40))
		c->op = chance(g, 50) ? LOAD8 : STORE8;
	if (c->op == FETCH)
		c->value = 1ull << 63;
	/* Across a page, where both lie in one window. */
	if ((c->op == LOAD8 || c->op == STORE8) && chance(g, 10) && (c->gpa & 0x1fffff) < 0x1ff000)
		c->gpa = (c->gpa & ~(PAGE - 1)) + PAGE - 4;
}

static void make_host(struct gen *g, struct call *c)
{
	static const uint8_t ops[] = {
		HOST_LOAD,  HOST_LOAD,    HOST_LOAD,     HOST_STORE,    HOST_STORE,
		HOST_STORE, HOST_DISCARD, HOST_DISCARD,  HOST_NONE,     HOST_UNMAP,
		HOST_MAP,   HOST_MAP,     HOST_READONLY, HOST_WRITABLE, HOST_PUNCH,
	};
	static const uint16_t offsets[] = {0, 8, 0x800, 0xff8};
	const struct call *r = recent(g);

	*c = (struct call){
		.what = HOST, .op = PICK(g, ops), .npages = 1, .value = returning(next(g))};
	c->page = (unsigned)below(g, POOL_PAGES);
	if (r && r->hva - POOL < POOL_PAGES * PAGE && chance(g, 80))
		c->page = (unsigned)((r->hva - POOL) / PAGE + below(g, 4)) % POOL_PAGES;
	c->first = PICK(g, offsets);
	if (c->op >= HOST_DISCARD)
		c->npages = 1 + (unsigned)below(g, 4);
	if (c->page + c->npages > POOL_PAGES)
		c->npages = POOL_PAGES - c->page;
}

static void make_call(struct gen *g, struct call *c)
{
	unsigned r = (unsigned)below(g, 100);

	if (r < 45)
		make_set(g, c);
	else if (r < 53)
		make_get_log(g, c);
	else if (r < 56 && g->features & FEATURE_CLEAR)
		make_clear_log(g, c);
	else if (r < 57 && g->features & FEATURE_MANUAL)
		*c = (struct call){.what = MANUAL, .value = below(g, 5)};
	else if (r < 85)
		make_guest(g, c);
	else
		make_host(g, c);
}

void generate(struct sequence *s, uint64_t seed, unsigned features)
{
	struct gen g = {.state = seed * 0x2545f4914f6cdd1d + 1, .features = features};

	memset(s, 0, sizeof(*s));
	s->n = 20 + (unsigned)below(&g, MAX_CALLS - 20 + 1);
	s->fresh = chance(&g, 25);
	for (unsigned i = 0; i < s->n; i++) /* begin with a slot or two */
		if (i < 2)
			make_set(&g, &s->calls[i]);
		else
			make_call(&g, &s->calls[i]);
}
