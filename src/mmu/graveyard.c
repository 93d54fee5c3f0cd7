/* SPDX-License-Identifier: MIT */
/*
 * A buried table keeps its entries until it is freed, because its children hang on them. The
 * link to the next buried table and its own level are therefore kept in the bits of its first
 * entries that table entries do not use: 16 bits each in the first three, and the level in the
 * fourth.
 */
#include "base/pool.h"
#include "mmu/graveyard.h"
#include "mmu/spte.h"

#define SPARE_SHIFT 48
#define SPARE_MASK  (~0ull << SPARE_SHIFT)
#define ADDR_BITS   36 /* of a page's number in 48 bits of address */

_Static_assert(!(KL_SPTE_ADDR & SPARE_MASK), "table entries leave these bits alone");
_Static_assert(3 * (64 - SPARE_SHIFT) >= ADDR_BITS, "a link fits");

void kl_pt_garbage_add(struct kl_pt_garbage *g, struct kl_pt *pt)
{
	atomic_store_explicit(&pt->e[0], (uint64_t)g->head, memory_order_relaxed);
	g->head = pt;
}

void kl_pt_garbage_free(struct kl_pt_garbage *g)
{
	while (g->head) {
		struct kl_pt *pt = g->head;

		g->head = (struct kl_pt *)atomic_load_explicit(&pt->e[0], memory_order_relaxed);
		kl_page_free(pt);
	}
}

/* Nobody else sees the table any more: plain loads and stores of its entries. */
static uint64_t get(struct kl_pt *pt, unsigned i)
{
	return atomic_load_explicit(&pt->e[i], memory_order_relaxed);
}

static void put(struct kl_pt *pt, unsigned i, uint64_t val)
{
	atomic_store_explicit(&pt->e[i], val, memory_order_relaxed);
}

static void set_spare(struct kl_pt *pt, unsigned i, uint64_t val)
{
	put(pt, i, (get(pt, i) & ~SPARE_MASK) | val << SPARE_SHIFT);
}

static void push(struct kl_graveyard *g, struct kl_pt *pt, unsigned level)
{
	uint64_t link = (uint64_t)g->head >> KL_PAGE_SHIFT;

	for (unsigned i = 0; i < 3; i++)
		set_spare(pt, i, link >> (16 * i));
	set_spare(pt, 3, level);
	g->head = pt;
	g->cursor = 0;
}

static void pop(struct kl_graveyard *g)
{
	uint64_t link = 0;

	for (unsigned i = 0; i < 3; i++)
		link |= get(g->head, i) >> SPARE_SHIFT << (16 * i);
	g->head = (struct kl_pt *)((link & ((1ull << ADDR_BITS) - 1)) << KL_PAGE_SHIFT);
	g->cursor = 0;
}

void kl_graveyard_init(struct kl_graveyard *g)
{
	kl_mutex_init(&g->lock, KL_RANK_LEAF);
}

void kl_graveyard_destroy(struct kl_graveyard *g)
{
	kl_graveyard_reap(g, ~0u);
	kl_mutex_destroy(&g->lock);
}

void kl_graveyard_bury(struct kl_graveyard *g, struct kl_pt *pt, unsigned level)
{
	kl_mutex_lock(&g->lock);
	push(g, pt, level);
	atomic_store_explicit(&g->filled, true, memory_order_relaxed);
	kl_mutex_unlock(&g->lock);
}

/* One table off, or NULL. */
static struct kl_pt *dig_up(struct kl_graveyard *g)
{
	while (g->head) {
		struct kl_pt *pt = g->head;
		unsigned level = (unsigned)(get(pt, 3) >> SPARE_SHIFT);
		unsigned i = g->cursor;

		while (i < KL_PT_ENTRIES && !(get(pt, i) & KL_SPTE_TABLE))
			i++;
		if (i == KL_PT_ENTRIES) {
			pop(g);
			return pt;
		} else {
			struct kl_pt *child = kl_spte_table(get(pt, i));

			put(pt, i, get(pt, i) & SPARE_MASK);
			g->cursor = i + 1;
			if (level == 2)
				return child;
			push(g, child, level - 1);
		}
	}
	atomic_store_explicit(&g->filled, false, memory_order_relaxed);
	return NULL;
}

void kl_graveyard_reap_slow(struct kl_graveyard *g, unsigned n)
{
	struct kl_pt_garbage done = {0};
	struct kl_pt *pt;

	kl_mutex_lock(&g->lock);
	for (; n && (pt = dig_up(g)); n--)
		kl_pt_garbage_add(&done, pt);
	kl_mutex_unlock(&g->lock);
	kl_pt_garbage_free(&done);
}
