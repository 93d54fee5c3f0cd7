/* SPDX-License-Identifier: MIT */
/*
 * MMU-notifier brackets, and the gate between them and changes of memslots.
 *
 * Invariant: while a bracket is in flight, the set of slots that overlap its range does not
 * change, in any VM. So end() finds the same VMs by looking again, nothing is allocated, and
 * begin/end are balanced whatever the program does in between (N3, S7). A slot elsewhere may
 * come and go: a bracket delays nobody who does not care for its range.
 *
 * Kept by a handshake (N4) of brackets, which publish their range in a cell, and updates, which
 * announce theirs in a list:                                             PAIR(notifier-cells)
 *
 *     bracket: cell = range; any update announced?    update: announce; any cell overlaps?
 *
 * Both are sequentially consistent, so at least one sees the other.
 *   - An update that sees a bracket waits for it, and looks again under the gate, where it also
 *     makes its change: whoever publishes a cell later finds the change made, or the
 *     announcement.
 *   - A bracket that sees an overlapping update takes its range back and queues behind it. If
 *     its thread holds a bracket already it must not wait (the update may be waiting for that
 *     one): its cell stays, and the update waits for it, too, since it looks again.
 * For B32 this means: a bracket that looked before a slot was published, and found nothing,
 * holds off the publication until its host call is over.
 *
 * Locks: the gate (rank NOTIFIER) for the list of updates, the list of VMs, and all waiting.
 * Brackets take it only where an update is under way. vms_srcu protects walks of the list of
 * VMs, vm->srcu the sets. No lock here is ever taken by a vCPU.
 */
#include <errno.h>
#include <pthread.h>

#include "base/log.h"
#include "base/racepoint.h"
#include "base/srcu.h"
#include "host/thread.h"
#include "mem/gpc.h"
#include "mem/notifier.h"
#include "mem/notifier_gate.h"
#include "mem/subscribers.h"
#include "mem/vm.h"

/* ---- cells ------------------------------------------------------------------------------ */

/*
 * A range in one word, so that one compare-and-swap publishes it: page number and length in
 * pages, LEN_ALL standing for "to the end". 0 is a free cell.
 */
#define NR_CELLS 64
#define LEN_BITS 28
#define LEN_ALL  ((1ull << LEN_BITS) - 1)

struct cell {
	_Atomic uint64_t range;
	bool parked; /* gate: its thread waits in kl_notifier_remove_vm() */
} KL_CACHELINE;

static struct cell cells[NR_CELLS];
static _Atomic unsigned cells_used; /* those from here on were never published */
/* Brackets that found no cell: each counts as one over all memory. */
static _Atomic unsigned wild;
static unsigned wild_parked; /* gate */

/* The brackets of this thread, innermost last; deeper ones are wild, and only counted. */
#define MAX_DEPTH 8
struct open_bracket {
	uint64_t start, end;
	int cell;     /* or WILD */
	bool touched; /* some VM's begin() was called */
};
enum { WILD = -1 };
static KL_TLS struct open_bracket open_brackets[MAX_DEPTH];
static KL_TLS int nr_open;
static KL_TLS unsigned my_cell; /* 1 + where to look first */

static uint64_t encode(uint64_t start, uint64_t end)
{
	uint64_t first = start >> KL_PAGE_SHIFT, n = (end - start) >> KL_PAGE_SHIFT;

	/* Beyond what a program can own: over everything, for simplicity. */
	if (first >> (64 - LEN_BITS))
		return LEN_ALL;
	return first << LEN_BITS | kl_min(n, LEN_ALL);
}

static bool claim(unsigned i, uint64_t range)
{
	uint64_t none = 0;

	return atomic_load_explicit(&cells[i].range, memory_order_relaxed) == 0 &&
	       atomic_compare_exchange_strong(&cells[i].range, &none,
					      range); /* PAIR(notifier-cells) */
}

/* @range 0: over everything. */
static int publish(uint64_t range)
{
	unsigned used = atomic_load_explicit(&cells_used, memory_order_relaxed);

	if (KL_UNLIKELY(!range)) {
		atomic_fetch_add(&wild, 1);
		return WILD;
	}
	if (my_cell && claim(my_cell - 1, range))
		return (int)my_cell - 1;
	for (unsigned i = 0; i < used; i++)
		if (claim(i, range)) {
			my_cell = i + 1;
			return (int)i;
		}
	racepoint("notifier-new-cell");
	/* A new one: an update looks as far as cells_used, so it is raised first. */
	for (unsigned i = used; i < NR_CELLS; i++) {
		while (used <= i && !atomic_compare_exchange_weak(&cells_used, &used, i + 1))
			;
		if (claim(i, range)) {
			my_cell = i + 1;
			return (int)i;
		}
	}
	atomic_fetch_add(&wild, 1);
	return WILD;
}

static void retract(int cell)
{
	if (cell == WILD)
		atomic_fetch_sub(&wild, 1);
	else
		atomic_exchange(&cells[cell].range, 0); /* PAIR(notifier-cells) */
}

/* ---- the gate ----------------------------------------------------------------------------- */

static struct kl_mutex gate = KL_MUTEX_INITIALIZER(NOTIFIER);
static pthread_cond_t gate_cond = PTHREAD_COND_INITIALIZER;
static struct kl_notifier_update *updates; /* gate */

/*
 * What a bracket reads first, in one cache line; changed under the gate. Outside [lo, hi) there
 * has never been a slot: an update widens it between its last look and its change, so a bracket
 * that finds no update announced finds the range of every slot that it could meet.
 */
static struct {
	_Atomic unsigned nr_updates;
	_Atomic uint64_t lo, hi;
} seen KL_CACHELINE = {.lo = UINT64_MAX};
static _Atomic(struct kl_vm *) vms; /* changed under the gate */
static struct kl_srcu vms_srcu = KL_SRCU_INITIALIZER;

bool kl_notifier_active(void)
{
	return atomic_load_explicit(&vms, memory_order_relaxed) != NULL;
}

static struct kl_vm *first_vm(void)
{
	return atomic_load_explicit(&vms, memory_order_acquire);
}

static struct kl_vm *next_vm(struct kl_vm *vm)
{
	return atomic_load_explicit(&vm->next, memory_order_acquire);
}

static void gate_wait(void)
{
	pthread_cond_wait(&gate_cond, &gate.m);
}

/* Context: reader section of vm->srcu, or the set cannot change. */
static bool vm_overlaps(struct kl_vm *vm, uint64_t start, uint64_t end)
{
	for (unsigned as = 0; as < KL_NR_AS; as++) {
		struct kl_overlap o;

		kl_overlap_first(&o, kl_memslots(vm, as), start, end);
		if (o.slot)
			return true;
	}
	return false;
}

/* A slot's update cares for the slot's memory, a VM's death for that of all its slots. */
static bool update_overlaps(const struct kl_notifier_update *u, uint64_t range)
{
	uint64_t start = range >> LEN_BITS << KL_PAGE_SHIFT, n = range & LEN_ALL;
	uint64_t end = n == LEN_ALL ? UINT64_MAX : start + (n << KL_PAGE_SHIFT);

	if (!range)
		return false;
	if (u->vm)
		return vm_overlaps(u->vm, start, end);
	return (start < u->end && end > u->start) || (start < u->end2 && end > u->start2);
}

static bool bracket_in_flight(const struct kl_notifier_update *u)
{
	unsigned n = atomic_load(&cells_used);

	for (unsigned i = 0; i < n; i++) {
		uint64_t range = atomic_load(&cells[i].range); /* PAIR(notifier-cells) */

		if (!(u->vm && cells[i].parked) && update_overlaps(u, range))
			return true;
	}
	return atomic_load(&wild) > (u->vm ? wild_parked : 0);
}

bool kl_notifier_in_flight(uint64_t start, uint64_t end)
{
	const struct kl_notifier_update u = {.start = start, .end = end};

	return bracket_in_flight(&u);
}

static void announce(struct kl_notifier_update *u)
{
	kl_assert_held(&gate);
	u->next = updates;
	updates = u;
	atomic_fetch_add(&seen.nr_updates, 1); /* PAIR(notifier-cells) */
	while (bracket_in_flight(u)) {
		racepoint("notifier-update-waits");
		gate_wait();
	}
}

static void withdraw(struct kl_notifier_update *u)
{
	struct kl_notifier_update **p = &updates;

	kl_assert_held(&gate);
	while (*p != u)
		p = &(*p)->next;
	*p = u->next;
	atomic_fetch_sub(&seen.nr_updates, 1);
	pthread_cond_broadcast(&gate_cond);
}

static void widen(uint64_t start, uint64_t end)
{
	kl_assert_held(&gate);
	if (start < atomic_load_explicit(&seen.lo, memory_order_relaxed))
		atomic_store(&seen.lo, start);
	if (end > atomic_load_explicit(&seen.hi, memory_order_relaxed))
		atomic_store(&seen.hi, end);
}

void kl_notifier_update_begin(struct kl_notifier_update *u)
{
	KL_ASSERT(!kl_self.brackets);
	u->vm = NULL;
	kl_rank_wait(KL_RANK_NOTIFIER_WAIT);
	kl_mutex_lock(&gate);
	announce(u);
	widen(u->start, u->end);
	if (u->end2)
		widen(u->start2, u->end2);
}

void kl_notifier_cover(uint64_t start, uint64_t end)
{
	if (start >= atomic_load(&seen.lo) && end <= atomic_load(&seen.hi))
		return;
	kl_mutex_lock(&gate);
	widen(start, end);
	kl_mutex_unlock(&gate);
}

void kl_notifier_update_end(struct kl_notifier_update *u)
{
	withdraw(u);
	kl_mutex_unlock(&gate);
}

/* ---- brackets ------------------------------------------------------------------------------ */

/* One that found no cell counts as over all memory, so it queues behind every update. */
static bool queued_behind_update(uint64_t range, int cell)
{
	if (cell == WILD)
		range = LEN_ALL;
	for (struct kl_notifier_update *u = updates; u; u = u->next)
		if (update_overlaps(u, range))
			return true;
	return false;
}

/*
 * An update was announced when *cell had been published: wait for it if it is over the same
 * memory. 0, or -EAGAIN with the cell given back.
 *
 * Who must not wait takes the gate all the same: between an update's last look and its change
 * nobody else gets it, so what the caller reads next is after the change, or the update is
 * going to see the cell.
 */
static int wait_for_updates(const struct kl_notifier_range *r, uint64_t range, int *cell)
{
	bool queue = !kl_self.brackets && !r->no_queue;
	int ret = 0;

	kl_mutex_lock(&gate);
	while (queue && queued_behind_update(range, *cell)) {
		retract(*cell);
		pthread_cond_broadcast(&gate_cond);
		ret = -EAGAIN;
		if (!r->may_block)
			break;
		do
			gate_wait();
		while (queued_behind_update(range, *cell));
		/* Under the gate: an update that comes next sees it. */
		*cell = publish(range);
		ret = 0;
	}
	kl_mutex_unlock(&gate);
	return ret;
}

static void leave(int cell)
{
	retract(cell);
	if (--kl_self.brackets == 0)
		kl_bias_bar(false);
	if (KL_UNLIKELY(atomic_load(&seen.nr_updates))) { /* PAIR(notifier-cells) */
		kl_mutex_lock(&gate);
		pthread_cond_broadcast(&gate_cond);
		kl_mutex_unlock(&gate);
	}
}

/* Context: reader section of vms_srcu. */
static void end_until(const struct kl_notifier_range *r, const struct kl_vm *stop)
{
	for (struct kl_vm *vm = first_vm(); vm != stop; vm = next_vm(vm)) {
		int token = kl_srcu_read_lock(&vm->srcu);

		if (vm_overlaps(vm, r->start, r->end))
			kl_mmu_invalidate_end(vm, r);
		kl_gpc_invalidate_end(vm, r);
		kl_srcu_read_unlock(&vm->srcu, token);
	}
}

/*
 * The list of subscribers (mem/subscribers.h) for one VM. 1: stage 2 was touched; 0; or -EAGAIN
 * with all as before. Context: reader section of vm->srcu.
 */
static int begin_one(struct kl_vm *vm, const struct kl_notifier_range *r)
{
	int ret = kl_gpc_invalidate_begin(vm, r);

	if (ret || !vm_overlaps(vm, r->start, r->end))
		return ret;
	racepoint("notifier-gpcs-done");
	ret = kl_mmu_invalidate_begin(vm, r);
	if (ret) {
		kl_gpc_invalidate_undo(vm, r);
		return ret;
	}
	kl_stat_add(&vm->stats.mmu_invalidations, 1);
	return 1;
}

/* As if it had not been: of the VMs before @stop. Context: reader section of vms_srcu. */
static void undo_until(const struct kl_notifier_range *r, const struct kl_vm *stop)
{
	for (struct kl_vm *vm = first_vm(); vm != stop; vm = next_vm(vm)) {
		int token = kl_srcu_read_lock(&vm->srcu);

		if (vm_overlaps(vm, r->start, r->end))
			kl_mmu_invalidate_end(vm, r);
		kl_gpc_invalidate_undo(vm, r);
		kl_srcu_read_unlock(&vm->srcu, token);
	}
}

/* Returns how many VMs were touched, or -EAGAIN with all of them as before. */
static int begin_all(const struct kl_notifier_range *r)
{
	int list = kl_srcu_read_lock(&vms_srcu), n = 0;

	for (struct kl_vm *vm = first_vm(); vm; vm = next_vm(vm)) {
		int token = kl_srcu_read_lock(&vm->srcu), ret = begin_one(vm, r);

		if (ret)
			racepoint("notifier-begun-one");
		kl_srcu_read_unlock(&vm->srcu, token);
		if (ret < 0) {
			undo_until(r, vm);
			n = ret;
			break;
		}
		n += ret;
	}
	kl_srcu_read_unlock(&vms_srcu, list);
	return n;
}

static void round_to_pages(struct kl_notifier_range *r)
{
	r->start &= KL_PAGE_MASK;
	if (r->end > KL_PAGE_MASK) /* rounding up would wrap */
		r->end = KL_PAGE_MASK;
	r->end = (r->end + KL_PAGE_SIZE - 1) & KL_PAGE_MASK;
}

/* Can there be a slot or a cache? PAIR(notifier-cells) */
static bool covered(const struct kl_notifier_range *r)
{
	return r->end > atomic_load(&seen.lo) && r->start < atomic_load(&seen.hi);
}

int kl_notifier_begin(struct kl_notifier_range *r)
{
	uint64_t range;
	int cell, n;

	round_to_pages(r);
	range = encode(r->start, r->end);
	cell = publish(nr_open < MAX_DEPTH ? range : 0);
	racepoint("notifier-published");
	if (KL_UNLIKELY(atomic_load(&seen.nr_updates))) { /* PAIR(notifier-cells) */
		int ret = wait_for_updates(r, range, &cell);

		if (ret)
			return ret;
	}
	kl_self.brackets++;
	kl_bias_bar(true); /* G1a */
	racepoint("notifier-begin-counted");
	/* Which slots overlap is settled from here to the end of the bracket. */
	n = covered(r) ? begin_all(r) : 0;
	if (n < 0) {
		leave(cell);
		return n;
	}
	if (nr_open < MAX_DEPTH)
		open_brackets[nr_open++] = (struct open_bracket){
			.start = r->start, .end = r->end, .cell = cell, .touched = n > 0};
	return 0;
}

/* The innermost bracket over the same range, taken out of the list. */
static bool take_bracket(const struct kl_notifier_range *r, struct open_bracket *b)
{
	for (int i = nr_open - 1; i >= 0; i--) {
		if (open_brackets[i].start != r->start || open_brackets[i].end != r->end)
			continue;
		*b = open_brackets[i];
		for (nr_open--; i < nr_open; i++)
			open_brackets[i] = open_brackets[i + 1];
		return true;
	}
	*b = (struct open_bracket){.cell = WILD, .touched = true};
	return kl_self.brackets > nr_open;
}

void kl_notifier_end(struct kl_notifier_range *r)
{
	struct open_bracket b;

	round_to_pages(r);
	if (KL_WARN_ONCE(!take_bracket(r, &b), "end of a notifier bracket that was not begun on "
					       "this thread; ignored"))
		return;
	/* Of caches there may be others than at the beginning (mem/gpc_index.h). */
	if (b.touched || (kl_gpcs_in_use() && covered(r))) {
		int list = kl_srcu_read_lock(&vms_srcu);

		end_until(r, NULL);
		kl_srcu_read_unlock(&vms_srcu, list);
	}
	leave(b.cell);
}

static int age(uint64_t start, uint64_t end, bool clear)
{
	struct kl_notifier_range r = {.start = start, .end = end};
	int list, young = 0;

	round_to_pages(&r);
	list = kl_srcu_read_lock(&vms_srcu);
	for (struct kl_vm *vm = first_vm(); vm && (clear || !young); vm = next_vm(vm)) {
		int token = kl_srcu_read_lock(&vm->srcu);

		if (vm_overlaps(vm, r.start, r.end))
			young |= kl_mmu_age(vm, &r, clear);
		kl_srcu_read_unlock(&vm->srcu, token);
	}
	kl_srcu_read_unlock(&vms_srcu, list);
	return young;
}

int kl_notifier_test_young(uint64_t start, uint64_t end)
{
	return age(start, end, false);
}

int kl_notifier_clear_young(uint64_t start, uint64_t end)
{
	return age(start, end, true);
}

/* ---- VMs ------------------------------------------------------------------------------------ */

/* A VM without slots overlaps nothing, so a bracket in flight may or may not see it. */
void kl_notifier_add_vm(struct kl_vm *vm)
{
	kl_mutex_lock(&gate);
	atomic_store_explicit(&vm->next, first_vm(), memory_order_relaxed);
	atomic_store_explicit(&vms, vm, memory_order_release);
	kl_mutex_unlock(&gate);
}

static void park_own(bool parked)
{
	int uncounted = kl_self.brackets - nr_open;

	for (int i = 0; i < nr_open; i++)
		if (open_brackets[i].cell == WILD)
			uncounted++;
		else
			cells[open_brackets[i].cell].parked = parked;
	wild_parked += (unsigned)(parked ? uncounted : -uncounted);
}

/* Those that will not find the VM when they end: our own, and those of parked threads. */
static unsigned brackets_over(const struct kl_notifier_update *u)
{
	unsigned n = atomic_load(&wild);

	for (unsigned i = 0; i < NR_CELLS; i++)
		n += update_overlaps(u, atomic_load(&cells[i].range));
	return n;
}

/*
 * Destruction inside a bracket of the same thread (B19): nobody else's bracket over the VM's
 * memory may be in flight, except of threads that wait here too; our own will not find the VM
 * when it ends, and what it raised dies with the VM.
 */
void kl_notifier_remove_vm(struct kl_vm *vm)
{
	struct kl_notifier_update u = {.vm = vm};
	_Atomic(struct kl_vm *) *p = &vms;

	kl_rank_wait(KL_RANK_NOTIFIER_WAIT);
	kl_mutex_lock(&gate);
	park_own(true);
	pthread_cond_broadcast(&gate_cond);
	announce(&u);
	park_own(false);
	/* It may have been removed already: uapi/ does so before it frees the vCPUs. */
	for (struct kl_vm *i; (i = atomic_load_explicit(p, memory_order_relaxed)); p = &i->next)
		if (i == vm) {
			vm->brackets_at_removal = brackets_over(&u);
			atomic_store_explicit(p, next_vm(vm), memory_order_release);
			break;
		}
	withdraw(&u);
	kl_mutex_unlock(&gate);
	/* Walks that started before, and do not care for this VM, may stand on it. */
	kl_rank_wait(KL_RANK_SRCU_WAIT);
	kl_srcu_synchronize(&vms_srcu);
}

void kl_notifier_walk_slots(uint64_t start, uint64_t end, void (*fn)(uint64_t, uint64_t))
{
	int list = kl_srcu_read_lock(&vms_srcu);

	for (struct kl_vm *vm = first_vm(); vm; vm = next_vm(vm)) {
		int token = kl_srcu_read_lock(&vm->srcu);
		struct kl_overlap o;

		for (unsigned as = 0; as < KL_NR_AS; as++)
			kl_for_each_overlap (&o, kl_memslots(vm, as), start, end) {
				if (o.in_gmem) /* the engine's own mapping */
					continue;
				fn(kl_memslot_hva(o.slot, o.first).addr,
				   kl_memslot_hva(o.slot, o.last).addr);
			}
		kl_srcu_read_unlock(&vm->srcu, token);
	}
	kl_srcu_read_unlock(&vms_srcu, list);
}

void kl_notifier_after_fork(void)
{
	for (struct kl_vm *vm = first_vm(); vm; vm = next_vm(vm))
		kl_gpc_close_all(vm);
	pthread_mutex_init(&gate.m, NULL);
	pthread_cond_init(&gate_cond, NULL);
	for (unsigned i = 0; i < NR_CELLS; i++)
		cells[i] = (struct cell){0};
	atomic_store(&cells_used, 0);
	atomic_store(&wild, 0);
	wild_parked = 0;
	kl_self.brackets = nr_open = 0;
	kl_bias_bar(false);
	my_cell = 0;
	updates = NULL;
	atomic_store(&seen.nr_updates, 0);
	atomic_store(&vms, NULL);
	kl_srcu_init(&vms_srcu);
}
