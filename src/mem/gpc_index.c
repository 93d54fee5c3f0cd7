/* SPDX-License-Identifier: MIT */
#include <errno.h>

#include "base/failpoint.h"
#include "base/log.h"
#include "base/racepoint.h"
#include "host/sys.h"
#include "mem/gpc.h"
#include "mem/notifier_gate.h"
#include "mem/vm.h"

static _Atomic unsigned long indexed; /* addresses in all indexes */

bool kl_gpcs_in_use(void)
{
	return atomic_load(&indexed) != 0; /* PAIR(gpc-index) */
}

static size_t head_size(void)
{
	return (sizeof(struct kl_gpcs) + KL_PAGE_SIZE - 1) & KL_PAGE_MASK;
}

static size_t store_size(void)
{
	return head_size() + 2 * kl_btree_arena_size();
}

struct kl_gpcs *kl_gpcs_get(struct kl_vm *vm)
{
	struct kl_gpcs *g = atomic_load_explicit(&vm->gpcs, memory_order_acquire), *there = NULL;

	if (g)
		return g;
	g = kl_failpoint("gpcs-init") ? NULL : kl_sys_map(store_size());
	if (!g)
		return NULL;
	kl_mutex_init(&g->lock, KL_RANK_GPC_INDEX);
	for (unsigned i = 0; i < 2; i++)
		kl_btree_init(&g->tree[i], (char *)g + head_size() + i * kl_btree_arena_size());
	atomic_init(&g->published, &g->tree[0]);
	if (atomic_compare_exchange_strong(&vm->gpcs, &there, g))
		return g;
	kl_sys_unmap(g, store_size());
	return there;
}

void kl_gpcs_destroy(struct kl_vm *vm)
{
	struct kl_gpcs *g = atomic_load(&vm->gpcs);

	if (!g)
		return;
	KL_WARN_ONCE(g->nr_objects, "VM %llu dies before %u of its caches",
		     (unsigned long long)vm->serial, g->nr_objects);
	atomic_fetch_sub(&indexed, g->nr);
	kl_mutex_destroy(&g->lock);
	kl_sys_unmap(g, store_size());
	vm->gpcs = NULL;
}

void kl_gpcs_after_fork(void)
{
	atomic_store(&indexed, 0);
}

/* ---- changes ------------------------------------------------------------------------------- */

static void enter(struct kl_btree *t, unsigned which, struct kl_gpc *c, uint64_t page)
{
	struct kl_gpc *first = kl_btree_floor(t, page);
	struct kl_gpc_link *l = &c->link[which];

	/* Of a page's caches one is in the tree; those that come go behind it. */
	if (first && first->page_in[which] == page) {
		struct kl_gpc *next = first->link[which].next;

		*l = (struct kl_gpc_link){.next = next, .prev = first};
		if (next)
			next->link[which].prev = c;
		first->link[which].next = c;
	} else {
		*l = (struct kl_gpc_link){0};
		kl_btree_insert(t, page, page + 1, c);
	}
	c->page_in[which] = page;
}

static void take_out(struct kl_btree *t, unsigned which, struct kl_gpc *c)
{
	struct kl_gpc_link *l = &c->link[which];

	if (l->next)
		l->next->link[which].prev = l->prev;
	if (l->prev) {
		l->prev->link[which].next = l->next;
	} else {
		kl_btree_remove(t, c->page_in[which]);
		if (l->next)
			kl_btree_insert(t, c->page_in[which], c->page_in[which] + 1, l->next);
	}
	c->page_in[which] = 0;
}

static void edit(struct kl_gpcs *g, unsigned which, struct kl_gpc *c, uint64_t page)
{
	if (c->page_in[which])
		take_out(&g->tree[which], which, c);
	if (page)
		enter(&g->tree[which], which, c, page);
}

int kl_gpc_index_move(struct kl_gpc *c, uint64_t page)
{
	struct kl_gpcs *g = c->gpcs;
	unsigned hidden;

	kl_assert_held(&c->lock);
	kl_mutex_lock(&g->lock);
	if (page && (kl_failpoint("gpc-index") || g->tree[0].n >= KL_BTREE_MAX)) {
		kl_mutex_unlock(&g->lock);
		return -ENOMEM;
	}
	/* First whatever makes a bracket look here at all. */
	if (page)
		kl_notifier_cover(page << KL_PAGE_SHIFT, (page + 1) << KL_PAGE_SHIFT);
	if (page && !c->page) {
		atomic_fetch_add(&indexed, 1); /* PAIR(gpc-index) */
		g->nr++;
	}
	hidden = atomic_load_explicit(&g->published, memory_order_relaxed) == &g->tree[0];
	edit(g, hidden, c, page);
	atomic_store(&g->published, &g->tree[hidden]); /* PAIR(gpc-index) */
	racepoint("gpc-index-published");
	kl_rank_wait(KL_RANK_SRCU_WAIT);
	kl_srcu_synchronize(&c->vm->srcu);
	edit(g, !hidden, c, page);
	if (!page && c->page) {
		g->nr--;
		atomic_fetch_sub(&indexed, 1);
	}
	c->page = page;
	atomic_fetch_add_explicit(&g->changes, 1, memory_order_relaxed);
	kl_mutex_unlock(&g->lock);
	return 0;
}

/* ---- walks --------------------------------------------------------------------------------- */

static void next_page(struct kl_gpc_walk *w)
{
	uint64_t key;

	w->c = kl_btree_overlap(w->tree, w->cursor, w->end, w->start, &key);
	if (w->c)
		w->cursor = key + 1;
}

void kl_gpc_walk_first(struct kl_gpc_walk *w, struct kl_vm *vm, uint64_t start, uint64_t end)
{
	struct kl_gpcs *g = atomic_load(&vm->gpcs);

	w->c = NULL;
	if (!g)
		return;
	w->tree = atomic_load(&g->published); /* PAIR(gpc-index) */
	w->which = w->tree == &g->tree[1];
	w->start = start >> KL_PAGE_SHIFT;
	w->end = (end >> KL_PAGE_SHIFT) + ((end & ~KL_PAGE_MASK) != 0);
	w->cursor = w->start;
	next_page(w);
}

void kl_gpc_walk_next(struct kl_gpc_walk *w)
{
	w->c = w->c->link[w->which].next;
	if (!w->c)
		next_page(w);
}
