/* SPDX-License-Identifier: MIT */
#include "x86/xlate/copies.h"

#include <stdio.h>

#include "host/access.h"
#include "host/guard.h"

#define LINE  64u
#define LOOKS 50

static struct kl_copy *copy_of(struct kl_copies *c, uint8_t *page)
{
	struct kl_copy *p;

	for (p = c->copy; p < c->copy + c->nr; p++)
		if (p->page == page)
			return p;
	if (c->nr == KL_MAX_COPIES)
		return NULL;
	p->page = page;
	p->lines = 0;
	c->nr++;
	return p;
}

static void make_line(struct kl_copy *p, unsigned line)
{
	for (unsigned at = line * LINE; at < (line + 1) * LINE; at += 8) {
		uint64_t x = kl_load64(p->page + at);

		kl_store64(p->before + at, x);
		kl_store64(p->now + at, x);
	}
	p->read[line] = p->stored[line] = 0;
	p->lines |= 1ull << line;
}

uint8_t *kl_copies_lend(struct kl_copies *c, uint8_t *p, unsigned len, bool write)
{
	unsigned at = (unsigned)((uint64_t)p & ~KL_PAGE_MASK);
	struct kl_copy *copy = copy_of(c, p - at);

	if (!copy)
		return NULL;
	c->stored |= write;
	for (unsigned i = at; i < at + len; i = (i | (LINE - 1)) + 1) {
		unsigned line = i / LINE, n = kl_min(at + len - i, LINE - i % LINE);
		uint64_t bytes = (n == LINE ? ~0ull : (1ull << n) - 1) << i % LINE;

		if (!(copy->lines >> line & 1))
			make_line(copy, line);
		if (write)
			copy->stored[line] |= bytes;
		else
			copy->read[line] |= bytes;
	}
	return copy->now + at;
}

/* A byte of ones for each bit. */
static uint64_t spread(uint64_t bits)
{
	uint64_t x = (bits & 0xff) * 0x0101010101010101 & 0x8040201008040201;

	return ((x + 0x7f7f7f7f7f7f7f7f) >> 7 & 0x0101010101010101) * 0xff;
}

/* Are memory's @bytes of the line those of @as? */
static bool same_line(const struct kl_copy *p, unsigned line, const uint8_t *as, uint64_t bytes)
{
	for (unsigned at = line * LINE; bytes; at += 8, bytes >>= 8) {
		uint64_t diff = kl_load64(p->page + at) ^ kl_load64(as + at);

		if (KL_UNLIKELY(diff) && (diff & spread(bytes)))
			return false;
	}
	return true;
}

static bool same_stored(struct kl_copy *p, unsigned line)
{
	return same_line(p, line, p->now, p->stored[line]);
}

/* What the block has both read and stored is not known any more. */
static bool same_read(struct kl_copy *p, unsigned line)
{
	return same_line(p, line, p->before, p->read[line] & ~p->stored[line]);
}

static bool remember(struct kl_copy *p, unsigned line)
{
	for (unsigned at = line * LINE; at < (line + 1) * LINE; at += 8)
		kl_store64(p->seen + at, kl_load64(p->page + at));
	return true;
}

static bool stays(struct kl_copy *p, unsigned line)
{
	return same_line(p, line, p->seen, p->stored[line]);
}

static bool undo(struct kl_copy *p, unsigned line)
{
	for (unsigned i = 0; i < LINE; i++)
		if (p->stored[line] >> i & 1)
			kl_store8(p->page + line * LINE + i, p->before[line * LINE + i]);
	return true;
}

static bool print(struct kl_copy *p, unsigned line)
{
	for (unsigned i = 0; i < LINE; i++) {
		unsigned at = line * LINE + i;
		uint8_t now = kl_load8(p->page + at);

		if ((p->stored[line] >> i & 1) && now != p->now[at])
			fprintf(stderr, "  host %p: %02x, translated %02x\n",
				(void *)(p->page + at), p->now[at], now);
	}
	return true;
}

static enum kl_looked each_line(struct kl_copies *c, bool (*look)(struct kl_copy *p, unsigned line))
{
	jmp_buf *outer = kl_self.guard;
	volatile unsigned tries = 0;
	volatile bool all;
	enum kl_guard_reason why;
	jmp_buf here;

	if (!c->nr)
		return KL_ALL_TRUE;
	why = kl_guard_enter(&here); /* it comes back here, too */
	if (why == KL_GUARD_NONE || (why == KL_GUARD_INTR && tries++ < 100)) {
		all = true;
		for (struct kl_copy *p = c->copy; p < c->copy + c->nr; p++)
			for (uint64_t left = p->lines; left; left &= left - 1)
				all &= look(p, (unsigned)__builtin_ctzll(left));
		why = KL_GUARD_NONE;
	}
	kl_guard_leave(outer);
	return why != KL_GUARD_NONE ? KL_NOT_THERE : all ? KL_ALL_TRUE : KL_SOME_FALSE;
}

enum kl_looked kl_copies_same_stored(struct kl_copies *c)
{
	return c->stored ? each_line(c, same_stored) : KL_ALL_TRUE;
}

enum kl_looked kl_copies_same_read(struct kl_copies *c)
{
	return each_line(c, same_read);
}

bool kl_copies_are_written(struct kl_copies *c)
{
	if (each_line(c, remember) != KL_ALL_TRUE)
		return true;
	for (unsigned i = 0; i < LOOKS; i++)
		if (each_line(c, stays) != KL_ALL_TRUE)
			return true;
	return false;
}

enum kl_looked kl_copies_undo(struct kl_copies *c)
{
	return each_line(c, undo);
}

void kl_copies_print(struct kl_copies *c)
{
	(void)each_line(c, print);
}
