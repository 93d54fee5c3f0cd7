/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <sched.h>
#include <string.h>

#include "base/failpoint.h"
#include "base/log.h"
#include "base/racepoint.h"
#include "host/guard.h"
#include "host/populate.h"
#include "mem/gmem.h"
#include "mem/gpc.h"
#include "mem/notifier.h"
#include "mem/notifier_gate.h"
#include "mem/private.h"
#include "mem/subscribers.h"
#include "mem/vm.h"

#define USER_ADDRESS_END 0x00007ffffffff000ull

static uint64_t page_of(uint64_t addr)
{
	return addr >> KL_PAGE_SHIFT;
}

/* G4 */
static bool fits(uint64_t addr, size_t len)
{
	return len - 1 < KL_PAGE_SIZE - (addr & ~KL_PAGE_MASK);
}

/* G7 */
static void lock_cache(struct kl_gpc *c)
{
	if (kl_mutex_trylock(&c->lock))
		return;
	racepoint("gpc-lock-waits");
	kl_mutex_lock(&c->lock);
}

int kl_gpc_init(struct kl_gpc *c, struct kl_vm *vm, unsigned as_id, enum kl_gpc_kind kind)
{
	struct kl_gpcs *g = kl_gpcs_get(vm);

	if (!g)
		return -ENOMEM;
	memset(c, 0, sizeof(*c));
	c->bias = (struct kl_bias)KL_BIAS_INITIALIZER;
	atomic_init(&c->current, &c->generation);
	c->gpcs = g;
	c->hits = &g->counter[0].hits[kind];
	c->vm = vm;
	c->as_id = as_id;
	c->kind = kind;
	kl_mutex_init(&c->lock, KL_RANK_GPC);
	kl_mutex_lock(&g->lock);
	g->nr_objects++;
	kl_mutex_unlock(&g->lock);
	return 0;
}

static struct kl_gpc_stats *stats_of(const struct kl_gpc *c)
{
	return &c->vm->stats.gpc[c->kind];
}

/* Invalid, and no holder is left. Context: c->lock; the calling thread does not hold it. */
static void quiesce(struct kl_gpc *c)
{
	uint64_t now;

	kl_assert_held(&c->lock);
	(void)kl_bias_close(&c->bias, &now);
	if (now & KL_BIAS_DRAINED)
		return;
	racepoint("gpc-quiesce");
	kl_rank_wait(KL_RANK_GPC_WAIT);
	kl_bias_wait(&c->bias);
	kl_bias_set_drained(&c->bias); /* only we could open it */
}

/* To nowhere: cannot fail. */
static void take_out_of_index(struct kl_gpc *c)
{
	if (c->page && kl_gpc_index_move(c, 0))
		kl_vm_bug(c->vm, "a cache cannot leave the index");
}

/* Context: c->lock. */
static void make_inactive(struct kl_gpc *c)
{
	c->active = false;
	quiesce(c);
	racepoint("gpc-inactive");
	take_out_of_index(c);
}

void kl_gpc_destroy(struct kl_gpc *c)
{
	struct kl_gpcs *g = c->gpcs;

	lock_cache(c);
	make_inactive(c);
	kl_mutex_unlock(&c->lock);
	kl_mutex_destroy(&c->lock);
	kl_mutex_lock(&g->lock);
	g->nr_objects--;
	kl_mutex_unlock(&g->lock);
}

/* ---- refresh ------------------------------------------------------------------------------- */

/* What one reader section says of a gpa-based cache's page; a fixed address says it itself. */
struct lookup {
	uint64_t hva; /* of the area's first byte; 0: none */
	uint64_t generation;
	struct kl_dirty_log *log; /* or NULL */
	uint64_t log_index;
	bool changing;               /* the slot, the set, or what backs some frames */
	struct kl_gmem_inode *inode; /* a reference, if the page is in a guest_memfd */
};

/* F7; 0: nothing is there. Context: reader section. */
static uint64_t page_address(struct kl_vm *vm, const struct kl_memslot *slot, kl_gfn_t gfn,
			     struct kl_gmem_inode **inode)
{
	unsigned uniform;
	bool private;

	switch (kl_backing_of(vm, slot, gfn, &private, &uniform)) {
	case KL_BACKED_BY_HVA:
		return kl_memslot_hva(slot, gfn).addr;
	case KL_BACKED_BY_GMEM:
		*inode = slot->gmem->inode;
		kl_gmem_inode_get(*inode);
		return kl_gmem_hva(slot->gmem, gfn);
	default:
		return 0;
	}
}

static struct lookup look_up(struct kl_gpc *c)
{
	struct lookup l = {0};
	const struct kl_memslot *slot;
	kl_gfn_t gfn = page_of(c->addr);
	int token;

	if (c->hva_based) {
		l.hva = c->addr;
		return l;
	}
	token = kl_srcu_read_lock(&c->vm->srcu);
	l.generation = kl_generation(c->vm, c->as_id); /* before the set (S5) */
	slot = kl_memslot_find(kl_memslots(c->vm, c->as_id), gfn);
	/* Before what backs the frame. */
	l.changing = (l.generation & 1) || (slot && slot->invalid) || kl_gfn_changing(c->vm);
	racepoint("gpc-not-changing");
	/* As KVM, which maps what it caches writable. */
	if (slot && !slot->invalid && !(slot->flags & KVM_MEM_READONLY)) {
		l.hva = page_address(c->vm, slot, gfn, &l.inode) | (c->addr & ~KL_PAGE_MASK);
		l.log = kl_dirty_log_of(slot);
		l.log_index = gfn - slot->base_gfn;
	}
	kl_srcu_read_unlock(&c->vm->srcu, token);
	return l;
}

/* After which wait another attempt may succeed. */
enum { AT_ONCE = 1, AFTER_BRACKETS, AFTER_SLOTS };

/*
 * Only the generation has moved on: somewhere else a slot changed. Storing the tag is all there is
 * to do, and needs no closing: check fails until it is stored, and a bracket or the end of the slot
 * meanwhile closes the cache whatever its tag. A pointer that is held stays true.
 */
static bool retag(struct kl_gpc *c, const struct lookup *l)
{
	if (!(kl_bias_state(&c->bias) & KL_BIAS_OPEN) || c->hva_based ||
	    atomic_load_explicit(&c->khva, memory_order_relaxed) != l->hva ||
	    atomic_load_explicit(&c->log, memory_order_relaxed) != l->log ||
	    c->log_index != l->log_index)
		return false;
	atomic_store_explicit(&c->generation, l->generation, memory_order_release);
	return kl_bias_state(&c->bias) & KL_BIAS_OPEN;
}

/* Context: closed and drained. */
static void set_fields(struct kl_gpc *c, const struct lookup *l)
{
	atomic_store_explicit(&c->khva, l->hva, memory_order_relaxed);
	atomic_store_explicit(&c->log, l->log, memory_order_relaxed);
	c->log_index = l->log_index;
	if (c->hva_based) {
		atomic_store_explicit(&c->current, &c->generation, memory_order_relaxed);
	} else {
		atomic_store_explicit(&c->generation, l->generation, memory_order_relaxed);
		atomic_store_explicit(&c->current, &c->vm->generation[c->as_id],
				      memory_order_relaxed);
	}
}

/* G14: a signal that is put off until the engine is left ends it with EINTR. */
static int populate(uint64_t hva)
{
	bool writable;
	int r;

	kl_guard_unblock(); /* in case that the thread has blocked them again */
	kl_self.interruptible = true;
	r = kl_host_populate((kl_hva_t){hva}, true, &writable);
	kl_self.interruptible = false;
	return r;
}

static bool in_bracket(uint64_t hva)
{
	return kl_notifier_in_flight(hva & KL_PAGE_MASK, (hva & KL_PAGE_MASK) + KL_PAGE_SIZE);
}

static void put_lookup(const struct lookup *l)
{
	if (l->inode)
		kl_gmem_inode_put(l->inode);
}

/*
 * What backs the frame may have changed since it was looked up, and when the address was not in the
 * index yet, so that the change did not find it. PAIR(gfn-change) 0, or a wait.
 */
static int look_again(struct kl_gpc *c, uint64_t hva)
{
	struct lookup l;

	if (c->hva_based || !c->vm->gmem_slots)
		return 0;
	l = look_up(c);
	put_lookup(&l);
	return l.changing ? AFTER_SLOTS : l.hva != hva ? AT_ONCE : 0;
}

/* From a lookup to open. 0: valid; the waits above; -errno. Context: c->lock. */
static int attempt_with(struct kl_gpc *c, bool doubted, struct lookup l)
{
	uint64_t state;
	int r, again;

	racepoint("gpc-looked-up");
	if (l.changing)
		return AFTER_SLOTS;
	if (!doubted && retag(c, &l))
		return 0;
	/* From here on check fails, until the end. [B1] */
	quiesce(c);
	if (!page_of(l.hva)) {
		take_out_of_index(c);
		return -EFAULT;
	}
	if (page_of(l.hva) != c->page) {
		r = kl_gpc_index_move(c, page_of(l.hva));
		if (r)
			return r;
	}
	racepoint("gpc-indexed");
	/* After the address is in the index. [B32] */
	state = kl_bias_state(&c->bias);
	racepoint("gpc-populate");
	r = populate(l.hva);
	racepoint("gpc-populated");
	if (!r)
		set_fields(c, &l);
	again = look_again(c, l.hva);
	if (again)
		return again;
	/*
	 * First what is in flight, then what has been: end() raises the sequence, then takes its
	 * range back. [B2] Inside a bracket the memory may be in any state, so that a failure says
	 * nothing.
	 */
	if ((!r || r == -EFAULT) && in_bracket(l.hva))
		return AFTER_BRACKETS;
	racepoint("gpc-not-in-flight");
	if (r)
		return r == -EFAULT && kl_bias_state(&c->bias) != state ? AT_ONCE : r;
	if (!kl_bias_open(&c->bias, state))
		return AT_ONCE;
	return 0;
}

static int attempt(struct kl_gpc *c, size_t len, bool doubted, uint64_t *hva)
{
	struct lookup l;
	int r;

	if (atomic_load(&c->vm->dead))
		return -EIO;
	/* Nobody could invalidate it. [B6] */
	if (!c->active || !fits(c->addr, len))
		return -EINVAL;
	if (!doubted && kl_gpc_check(c, len))
		return 0;
	kl_stat_add(&stats_of(c)->refreshes, 1);
	l = look_up(c);
	*hva = l.hva;
	r = attempt_with(c, doubted, l);
	put_lookup(&l);
	return r;
}

/* Sleeps until no bracket over the page is in flight; those that come next queue. */
static void wait_for_brackets(uint64_t hva)
{
	struct kl_notifier_update u = {.start = hva & KL_PAGE_MASK,
				       .end = (hva & KL_PAGE_MASK) + KL_PAGE_SIZE};

	kl_notifier_update_begin(&u);
	kl_notifier_update_end(&u);
}

static void wait_for_slots(struct kl_vm *vm)
{
	racepoint("gpc-waits-for-slots");
	/* The change may be waiting for this thread; by then the sets have settled. */
	if (kl_self.reports) {
		sched_yield();
		return;
	}
	kl_mutex_lock(&vm->slots_lock);
	kl_mutex_unlock(&vm->slots_lock);
}

/*
 * @doubted: the pointer of the valid cache turned out to be bad. The waits are made without
 * c->lock, and each attempt begins anew: the cache may have moved or have become inactive
 * meanwhile.
 */
static int refresh(struct kl_gpc *c, size_t len, bool doubted)
{
	uint64_t hva;
	int r;

	/* A bracket waits for holders, and we would wait for the bracket. [B33] */
	if (kl_self.brackets || kl_bias_held())
		return -EDEADLK;
	for (;;) {
		lock_cache(c);
		r = attempt(c, len, doubted, &hva);
		kl_mutex_unlock(&c->lock);
		if (r <= 0)
			return r;
		kl_stat_add(&stats_of(c)->retries, 1);
		if (r == AFTER_BRACKETS)
			wait_for_brackets(hva);
		else if (r == AFTER_SLOTS)
			wait_for_slots(c->vm);
	}
}

int kl_gpc_refresh(struct kl_gpc *c, size_t len)
{
	return refresh(c, len, false);
}

/* ---- activation ---------------------------------------------------------------------------- */

static int activate_locked(struct kl_gpc *c, bool hva_based, uint64_t addr, size_t len)
{
	struct lookup l;

	if (c->active && c->hva_based == hva_based && c->addr == addr)
		return 0;
	if (KL_BUG_ON(!c->active && (kl_bias_state(&c->bias) & KL_BIAS_OPEN), c->vm)) /* [B8] */
		return -EIO;
	if (c->active)
		make_inactive(c);
	c->hva_based = hva_based;
	c->addr = addr;
	atomic_store_explicit(&c->area, len, memory_order_relaxed);
	l = look_up(c);
	put_lookup(&l);
	racepoint("gpc-activate-looked-up");
	if (page_of(l.hva)) {
		int r = kl_gpc_index_move(c, page_of(l.hva));

		if (r)
			return r;
	}
	c->active = true;
	return 0;
}

static int activate(struct kl_gpc *c, bool hva_based, uint64_t addr, size_t len)
{
	int r;

	if (kl_self.brackets || kl_bias_held())
		return -EDEADLK;
	if (!fits(addr, len))
		return -EINVAL;
	lock_cache(c);
	r = activate_locked(c, hva_based, addr, len);
	kl_mutex_unlock(&c->lock);
	if (r)
		return r;
	racepoint("gpc-active");
	/* So that a caller who may not sleep finds it valid. What fails now fails at use (G16). */
	r = refresh(c, len, false);
	return r == -EIO ? r : 0;
}

int kl_gpc_activate(struct kl_gpc *c, kl_gpa_t gpa, size_t len)
{
	if (gpa == KL_INVALID_GPA)
		return -EINVAL;
	return activate(c, false, gpa, len);
}

int kl_gpc_activate_hva(struct kl_gpc *c, kl_hva_t hva, size_t len)
{
	if (!page_of(hva.addr) || hva.addr >= USER_ADDRESS_END)
		return -EINVAL;
	return activate(c, true, hva.addr, len);
}

int kl_gpc_deactivate(struct kl_gpc *c)
{
	if (kl_bias_held())
		return -EDEADLK;
	lock_cache(c);
	if (c->active)
		make_inactive(c);
	kl_mutex_unlock(&c->lock);
	return 0;
}

/* ---- use ----------------------------------------------------------------------------------- */

/* The calling thread's cells, with room for @n more. */
static int my_cells(unsigned n, struct kl_bias_thread **t)
{
	*t = kl_bias_self ? kl_bias_self : kl_bias_register();
	if (!*t)
		return -ENOMEM;
	if (KL_UNLIKELY(!kl_self.unblocked))
		kl_guard_unblock();
	return kl_bias_held() + n > KL_BIAS_CELLS ? -E2BIG : 0;
}

int kl_gpc_lock_slow(struct kl_gpc *c, size_t len, void **p)
{
	return kl_gpc_lock_many(&c, &len, p, 1);
}

static void enlarge_area(struct kl_gpc *c, size_t len)
{
	size_t old = atomic_load_explicit(&c->area, memory_order_relaxed);

	while (old < len && !atomic_compare_exchange_weak(&c->area, &old, len))
		;
}

bool kl_gpc_try(struct kl_gpc *c, struct kl_bias_thread *t, size_t len, void **p)
{
	if (!kl_bias_enter(t, &c->bias))
		return false;
	*p = fits(atomic_load_explicit(&c->khva, memory_order_relaxed), len) ? kl_gpc_pointer(c, t)
									     : NULL;
	if (*p)
		enlarge_area(c, len);
	else
		kl_bias_leave(t, &c->bias);
	return *p;
}

/* Written, and some page of the VM is tracked (T1). */
static KL_NOINLINE void leave_and_report(struct kl_gpc *c)
{
	uint64_t khva = atomic_load_explicit(&c->khva, memory_order_relaxed);
	struct kl_track_copy copy;
	bool tracked = kl_track_cache_begin(c->vm, c->as_id,
					    atomic_load_explicit(&c->addr, memory_order_relaxed),
					    (void *)(uintptr_t)khva, atomic_load(&c->area), &copy);
	struct kl_vm *vm = c->vm; /* who destroys the cache waits for its holders only */

	kl_bias_leave(kl_bias_self, &c->bias);
	if (tracked)
		kl_track_cache_report(vm, &copy);
}

bool kl_gpc_unlock_one(struct kl_gpc *c, bool written)
{
	if (!kl_bias_reads(kl_bias_self, &c->bias))
		return false;
	if (written) {
		kl_gpc_mark_dirty(c);
		if (!c->hva_based && atomic_load(&c->vm->tracked_pages)) {
			leave_and_report(c);
			return true;
		}
	}
	return kl_bias_leave(kl_bias_self, &c->bias);
}

int kl_gpc_trylock(struct kl_gpc *c, size_t len, void **p)
{
	struct kl_bias_thread *t;
	int r = kl_self.brackets ? -EDEADLK : my_cells(1, &t);

	if (!r && !kl_gpc_try(c, t, len, p))
		r = -EAGAIN;
	return r;
}

/* 0, or which one could not be locked. */
static unsigned try_all(struct kl_gpc *const *c, const size_t *len, void **p, unsigned n,
			struct kl_bias_thread *t)
{
	for (unsigned i = 0; i < n; i++) {
		if (kl_gpc_try(c[i], t, len[i], &p[i]))
			continue;
		for (unsigned k = 0; k < i; k++)
			kl_bias_leave(t, &c[k]->bias);
		return i + 1;
	}
	return 0;
}

int kl_gpc_lock_many(struct kl_gpc *const *c, const size_t *len, void **p, unsigned n)
{
	struct kl_bias_thread *t;
	unsigned miss;
	int r;

	if (kl_self.brackets)
		return -EDEADLK;
	r = my_cells(n, &t);
	while (!r && (miss = try_all(c, len, p, n, t))) {
		racepoint("gpc-miss");
		/* One that is valid all the same points to memory that is not there. */
		r = refresh(c[miss - 1], len[miss - 1], kl_gpc_check(c[miss - 1], len[miss - 1]));
	}
	return r;
}

/* ---- brackets ------------------------------------------------------------------------------ */

static void undo_range(struct kl_vm *vm, uint64_t start, uint64_t end)
{
	struct kl_gpc_walk w;

	kl_for_each_gpc (&w, vm, start, end) {
		uint64_t undo = atomic_load(&w.c->undo);

		if (undo)
			(void)kl_bias_reopen(&w.c->bias, undo);
	}
}

/*
 * Wait for the holders of what was closed. What is found closed here has not been open since: none
 * becomes valid while the bracket is in flight.
 */
static bool drain_range(struct kl_vm *vm, const struct kl_notifier_range *r)
{
	struct kl_gpc_walk w;

	kl_rank_wait(KL_RANK_GPC_WAIT);
	kl_for_each_gpc (&w, vm, r->start, r->end) {
		if (kl_bias_state(&w.c->bias) & KL_BIAS_DRAINED)
			continue;
		if (r->may_block)
			kl_bias_wait(&w.c->bias);
		else if (kl_bias_busy(&w.c->bias))
			return false;
		kl_bias_set_drained(&w.c->bias);
	}
	return true;
}

int kl_gpc_invalidate_begin(struct kl_vm *vm, const struct kl_notifier_range *r)
{
	bool drain = false;
	uint64_t now, closed[KL_NR_GPC_KINDS] = {0};
	struct kl_gpc_walk w;

	kl_for_each_gpc (&w, vm, r->start, r->end) {
		bool was_open = kl_bias_close(&w.c->bias, &now) & KL_BIAS_OPEN;

		if (!r->may_block)
			atomic_store(&w.c->undo, was_open ? now : 0);
		drain |= !(now & KL_BIAS_DRAINED);
		closed[w.c->kind] += was_open;
	}
	racepoint("gpc-invalidated");
	if (drain && !drain_range(vm, r)) {
		undo_range(vm, r->start, r->end);
		return -EAGAIN;
	}
	for (unsigned i = 0; i < KL_NR_GPC_KINDS; i++)
		if (closed[i])
			kl_stat_add(&vm->stats.gpc[i].invalidations, closed[i]);
	return 0;
}

void kl_gpc_invalidate_undo(struct kl_vm *vm, const struct kl_notifier_range *r)
{
	undo_range(vm, r->start, r->end);
}

void kl_gpc_invalidate_end(struct kl_vm *vm, const struct kl_notifier_range *r)
{
	struct kl_gpc_walk w;
	uint64_t now;

	kl_for_each_gpc (&w, vm, r->start, r->end)
		(void)kl_bias_close(&w.c->bias, &now);
}

/*
 * Close the caches that follow slots and lie over host memory [@start, @end), and wait for who
 * holds them. It marks nothing as drained: a refresh may open the cache meanwhile.
 */
static void close_caches(struct kl_vm *vm, uint64_t start, uint64_t end)
{
	int token = kl_srcu_read_lock(&vm->srcu);
	struct kl_gpc_walk w;
	bool wait = false;
	uint64_t now;

	kl_for_each_gpc (&w, vm, start, end) {
		if (w.c->hva_based) /* G11 */
			continue;
		if (kl_bias_close(&w.c->bias, &now) & KL_BIAS_OPEN)
			kl_stat_add(&stats_of(w.c)->invalidations, 1);
		wait |= !(now & KL_BIAS_DRAINED);
	}
	racepoint("gpc-slot-closed");
	if (wait) {
		kl_rank_wait(KL_RANK_GPC_WAIT);
		kl_for_each_gpc (&w, vm, start, end)
			if (!w.c->hva_based)
				kl_bias_wait(&w.c->bias);
	}
	kl_srcu_read_unlock(&vm->srcu, token);
}

/* Frames [@first, @last) of @slot. */
static void zap_part(struct kl_vm *vm, const struct kl_memslot *slot, kl_gfn_t first, kl_gfn_t last)
{
	uint64_t start = kl_memslot_hva(slot, first).addr, size = (last - first) << KL_PAGE_SHIFT;

	close_caches(vm, start, start + size);
	if (slot->gmem) {
		start = kl_gmem_hva(slot->gmem, first);
		close_caches(vm, start, start + size);
	}
}

/*
 * No tag is current, so whom it waits for was there before; a cache that is opened meanwhile, by a
 * refresh that had looked the slot up before, has a tag that is old.
 */
void kl_gpc_zap_slot(struct kl_vm *vm, const struct kl_memslot *slot)
{
	zap_part(vm, slot, slot->base_gfn, slot->base_gfn + slot->npages);
}

void kl_gpc_zap_gfns(struct kl_vm *vm, kl_gfn_t first, kl_gfn_t last)
{
	const struct kl_memslot *slot;

	if (!atomic_load(&vm->gpcs)) /* PAIR(gfn-change) */
		return;
	for (unsigned as = 0; as < KL_NR_AS; as++) {
		uint64_t cursor = 0, key;

		for (; (slot = kl_btree_overlap(&kl_memslots(vm, as)->by_gfn, cursor, last, first,
						&key));
		     cursor = key + 1)
			zap_part(vm, slot, kl_max(first, slot->base_gfn),
				 kl_min(last, slot->base_gfn + slot->npages));
	}
}

/* Who holds a cache that is opened meanwhile finds vm->tracked_pages set when he leaves. */
void kl_gpc_close_page(struct kl_vm *vm, const struct kl_memslot *slot, kl_gfn_t gfn)
{
	zap_part(vm, slot, gfn, gfn + 1);
}

void kl_gpc_close_all(struct kl_vm *vm)
{
	int token = kl_srcu_read_lock(&vm->srcu);
	struct kl_gpc_walk w;
	uint64_t now;

	kl_for_each_gpc (&w, vm, 0, USER_ADDRESS_END)
		(void)kl_bias_close(&w.c->bias, &now);
	kl_srcu_read_unlock(&vm->srcu, token);
}

void kl_gpc_count_hits(struct kl_vm *vm)
{
	struct kl_gpcs *g = atomic_load(&vm->gpcs);

	for (unsigned kind = 0; g && kind < KL_NR_GPC_KINDS; kind++) {
		uint64_t sum = 0;

		for (unsigned i = 0; i < KL_GPC_COUNTERS; i++)
			sum += kl_stat_get(&g->counter[i].hits[kind]);
		atomic_store_explicit(&vm->stats.gpc[kind].hits, sum, memory_order_relaxed);
	}
}
