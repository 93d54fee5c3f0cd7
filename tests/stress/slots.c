/* SPDX-License-Identifier: MIT */
/*
 * Slot changes: created, deleted, moved, re-created read-only, refused; VMs without vCPUs that
 * come and go; and slots on memory that belongs to malloc.
 */
#include <malloc.h>
#include <sched.h>

#include "stress.h"

#define NO_SLOT    0
#define FIRST_SLOT 10
#define HEAP_SLOT  30
#define NSLOTS     16

/* Which slot lies in which window. Context: vm->slots. */
struct window {
	unsigned slot;
	int place;
	unsigned first, n;
	unsigned flags;
};
static struct window windows[MAX_VMS][NWIN];
static bool busy[MAX_VMS][NSLOTS];

static void win_begin(struct vm *vm, unsigned win, struct state s, const char *what)
{
	pthread_mutex_lock(&vm->lock);
	hist_begin(&vm->win[win], s, tick(), what);
	pthread_mutex_unlock(&vm->lock);
}

static void win_end(struct vm *vm, unsigned win)
{
	pthread_mutex_lock(&vm->lock);
	hist_end(&vm->win[win], tick());
	pthread_mutex_unlock(&vm->lock);
}

static struct state slot_state(const struct window *w)
{
	return (struct state){
		.kind = SLOT,
		.place = (int16_t)w->place,
		.first = (uint16_t)w->first,
		.n = (uint16_t)w->n,
		.ro = w->flags & KVM_MEM_READONLY,
	};
}

static const uint8_t *slot_hva(const struct window *w)
{
	return places[w->place].base + (size_t)w->first * PAGE;
}

static int set(struct vm *vm, unsigned win, const struct window *w)
{
	return set_slot(vm->fd, w->slot, w->flags, win_gpa(win), (uint64_t)w->n * PAGE,
			slot_hva(w));
}

/* The place will not be used for anything else while a slot lies on it. */
static bool use_place(int place)
{
	atomic_fetch_add(&places[place].users, 1);
	if (!atomic_load(&places[place].closed))
		return true;
	atomic_fetch_sub(&places[place].users, 1);
	return false;
}

static void create(struct vm *vm, unsigned win, const struct window *w)
{
	windows[vm->id][win] = *w;
	win_begin(vm, win, slot_state(w), "create");
	NEED(!set(vm, win, w));
	win_end(vm, win);
}

static void op_create(struct vm *vm, unsigned win, uint64_t *rng)
{
	struct window w = {0};
	unsigned k;

	for (k = 0; busy[vm->id][k]; k++)
		;
	w.slot = FIRST_SLOT + k;
	if (win == WIN_BIG) {
		w.place = NSMALL + (int)below(rng, NBIG);
		w.n = below(rng, 4) ? BIG : BIG / 2;
	} else {
		w.place = (int)(below(rng, 8) ? below(rng, NSMALL) : NSMALL + below(rng, NBIG));
		w.n = below(rng, 4) ? SMALL : 1 + below(rng, SMALL);
		w.first = below(rng, places[w.place].npages - w.n + 1);
	}
	w.flags = below(rng, 5) ? 0 : KVM_MEM_READONLY;
	if (!use_place(w.place))
		return;
	busy[vm->id][k] = true;
	create(vm, win, &w);
}

static void delete (struct vm *vm, unsigned win, uint64_t *rng)
{
	struct window *w = &windows[vm->id][win];

	win_begin(vm, win, (struct state){.kind = AWAY}, "delete");
	NEED(!set_slot(vm->fd, w->slot, 0, win_gpa(win), 0, NULL));
	win_end(vm, win);
	busy[vm->id][w->slot - FIRST_SLOT] = false;
	w->slot = NO_SLOT;
	atomic_fetch_sub(&places[w->place].users, 1);
	if (below(rng, 4))
		quarantine(w->place, rng);
}

static void op_move(struct vm *vm, unsigned win, uint64_t *rng)
{
	unsigned to = below(rng, WIN_BIG);
	struct window *w = windows[vm->id];

	if (win >= WIN_BIG || w[to].slot)
		return;
	win_begin(vm, to, slot_state(&w[win]), "move here");
	win_begin(vm, win, (struct state){.kind = AWAY}, "move away");
	NEED(!set(vm, to, &w[win]));
	win_end(vm, to);
	win_end(vm, win);
	w[to] = w[win];
	w[win].slot = NO_SLOT;
}

/* Read-only becomes writable, and back: deleted and created, with the place still in use. */
static void op_flip(struct vm *vm, unsigned win, uint64_t *rng)
{
	struct window w = windows[vm->id][win];

	w.flags ^= KVM_MEM_READONLY;
	win_begin(vm, win, (struct state){.kind = AWAY}, "delete");
	NEED(!set_slot(vm->fd, w.slot, 0, win_gpa(win), 0, NULL));
	win_end(vm, win);
	create(vm, win, &w);
}

/* What must fail and change nothing. */
static void op_refused(struct vm *vm, unsigned win, uint64_t *rng)
{
	struct window w = windows[vm->id][win];

	switch (below(rng, 4)) {
	case 0:
		w.slot = FIRST_SLOT + NSLOTS;
		NEED(set(vm, win, &w) == -1 && errno == EEXIST);
		break;
	case 1:
		w.n++;
		NEED(set(vm, win, &w) == -1 && errno == EINVAL);
		break;
	case 2:
		w.flags ^= KVM_MEM_READONLY;
		NEED(set(vm, win, &w) == -1 && errno == EINVAL);
		break;
	default:
		NEED(set_slot(vm->fd, w.slot, w.flags, win_gpa(win) + 1, (uint64_t)w.n * PAGE,
			      slot_hva(&w)) == -1 &&
		     errno == EINVAL);
		break;
	}
}

/* Dirty logging goes on and off, where it exists. */
static void op_flags(struct vm *vm, unsigned win, uint64_t *rng)
{
	static _Atomic bool missing;
	struct window w = windows[vm->id][win];

	if (missing)
		return;
	w.flags ^= KVM_MEM_LOG_DIRTY_PAGES;
	if (set(vm, win, &w)) {
		NEED(errno == EINVAL);
		missing = true;
		return;
	}
	windows[vm->id][win] = w;
}

/* A VM that has slots and nothing else, for a moment. */
static void op_other_vm(uint64_t *rng)
{
	int fd = ioctl(kvm_fd, KVM_CREATE_VM, 0), used[3];

	NEED(fd >= 0);
	for (unsigned i = 0; i < 3; i++) {
		used[i] = (int)below(rng, NPLACES);
		if (!use_place(used[i])) {
			used[i] = -1;
			continue;
		}
		NEED(!set_slot(fd, i, 0, BIG * PAGE * (i + 1ull), places[used[i]].npages * PAGE,
			       places[used[i]].base));
	}
	if (below(rng, 2))
		place_op(rng);
	NEED(!close(fd));
	for (unsigned i = 0; i < 3; i++)
		if (used[i] >= 0)
			atomic_fetch_sub(&places[used[i]].users, 1);
}

void slot_op(uint64_t *rng)
{
	struct vm *vm = &vms[below(rng, opt.vms)];
	unsigned win = below(rng, 20) ? below(rng, WIN_BIG) : WIN_BIG, pick = below(rng, 20);

	if (pick == 0 && wanted("other-vm")) {
		at("other-vm");
		op_other_vm(rng);
		return;
	}
	if (!wanted("slots"))
		return;
	at("slot change");
	pthread_mutex_lock(&vm->slots);
	if (!windows[vm->id][win].slot)
		op_create(vm, win, rng);
	else if (pick < 4)
		delete (vm, win, rng);
	else if (pick < 10)
		op_move(vm, win, rng);
	else if (pick < 13)
		op_flip(vm, win, rng);
	else if (pick < 18)
		op_refused(vm, win, rng);
	else
		op_flags(vm, win, rng);
	pthread_mutex_unlock(&vm->slots);
	atomic_fetch_add_explicit(&counters.slot_ops, 1, memory_order_relaxed);
}

void slots_init(struct vm *vm, uint64_t *rng)
{
	memset(windows[vm->id], 0, sizeof(windows[0]));
	memset(busy[vm->id], 0, sizeof(busy[0]));
	for (unsigned w = 0; w <= WIN_BIG; w += 1 + below(rng, 2))
		op_create(vm, w, rng);
}

/* ---- slots on the heap ----------------------------------------------------------------- */

/*
 * Guests only read there, through read-only slots: what was freed under them may be anybody's,
 * as it may on a real KVM. One thread does all this, because the allocator's own heap, which
 * gives memory back at its top, is that of one thread.
 */
static struct block {
	uint8_t *p, *pages;
	size_t size;
	uint64_t serial;
} blocks[MAX_VMS];

static struct state heap_state(const struct block *b)
{
	return (struct state){.kind = SLOT,
			      .place = -1,
			      .n = SMALL,
			      .ro = true,
			      .prot = PROT_READ,
			      .serial = b->serial};
}

static void heap_slot(struct vm *vm, struct block *b)
{
	b->pages = (uint8_t *)(((uintptr_t)b->p + PAGE - 1) & ~(uintptr_t)(PAGE - 1));
	b->serial = new_serial();
	for (unsigned i = 0; i < SMALL; i++)
		fill(b->pages + i * PAGE, b->serial);
	win_begin(vm, WIN_HEAP, heap_state(b), "create");
	NEED(!set_slot(vm->fd, HEAP_SLOT, KVM_MEM_READONLY, win_gpa(WIN_HEAP), SMALL * PAGE,
		       b->pages));
	win_end(vm, WIN_HEAP);
}

static void heap_unslot(struct vm *vm)
{
	win_begin(vm, WIN_HEAP, (struct state){.kind = AWAY}, "delete");
	NEED(!set_slot(vm->fd, HEAP_SLOT, 0, 0, 0, NULL));
	win_end(vm, WIN_HEAP);
}

static void heap_alloc(struct vm *vm, struct block *b, uint64_t *rng)
{
	bool mapped = below(rng, 2);

	/* Mapped on their own, or at the top of the break. */
	mallopt(M_MMAP_THRESHOLD, mapped ? 128 << 10 : 32 << 20);
	b->size = (size_t)(1 + below(rng, 4)) << 20;
	switch (below(rng, 3)) {
	case 0:
		b->p = malloc(b->size);
		break;
	case 1:
		b->p = aligned_alloc(PAGE, b->size);
		break;
	default:
		b->p = aligned_alloc(2 << 20, b->size & ~((2ul << 20) - 1)
						      ? b->size & ~((2ul << 20) - 1)
						      : 2ul << 20);
		break;
	}
	NEED(b->p);
	heap_slot(vm, b);
}

static void heap_foreign(struct vm *vm, const char *what)
{
	win_begin(vm, WIN_HEAP, (struct state){.kind = FOREIGN, .place = -1}, what);
}

void heap_op(uint64_t *rng)
{
	struct vm *vm = &vms[below(rng, opt.vms)];
	struct block *b = &blocks[vm->id];
	bool polite = opt.asan || opt.tsan; /* what is freed stays mapped there, but is watched */

	if (!wanted("heap"))
		return;
	at("heap");
	pthread_mutex_lock(&vm->slots);
	if (!b->p) {
		heap_alloc(vm, b, rng);
	} else if (polite || below(rng, 3) == 0) {
		heap_unslot(vm);
		free(b->p);
		b->p = NULL;
	} else if (below(rng, 2)) {
		heap_foreign(vm, "free");
		free(b->p);
		win_end(vm, WIN_HEAP);
		b->p = NULL;
		sched_yield();
		heap_unslot(vm);
	} else {
		heap_foreign(vm, "realloc");
		b->p = realloc(b->p, (size_t)(1 + below(rng, 8)) << 20);
		NEED(b->p);
		win_end(vm, WIN_HEAP);
		heap_unslot(vm);
		heap_slot(vm, b);
	}
	pthread_mutex_unlock(&vm->slots);
}

void heap_free(void)
{
	for (unsigned i = 0; i < opt.vms; i++) {
		free(blocks[i].p);
		blocks[i].p = NULL;
	}
}
