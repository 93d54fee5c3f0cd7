/* SPDX-License-Identifier: MIT */
/*
 * Claims of accessors. One compare-and-swap of `mode` takes an accessor and enters guest
 * mode; the release store of OUTSIDE gives it back.
 *
 * A flush looks at the accessors in accessors_used alone, so that a VM without users of the
 * library pays one load. An accessor enters that set before its first use, and then its thread
 * takes the mmu lock once:
 *   - a zap that held the lock before: we see its cleared SPTEs, so its flush may miss us;
 *   - a zap that takes it later: its flush sees our bit.
 * `ready` is set after that and carries it to every later owner.
 *
 * All accessors can be taken, and their owners blocked in host page faults that only a thread
 * that waits here can resolve (a userfaultfd handler that reads guest memory). So a waiter
 * interrupts them, as a flusher would; who was interrupted waits for the page outside.
 */
#include <errno.h>
#include <sched.h>

#include "base/racepoint.h"
#include "host/guard.h"
#include "host/sys.h"
#include "mmu/accessor.h"
#include "mmu/mmu.h"
#include "mmu/stage2.h"

#define ROUNDS_BEFORE_KICK 64
#define MAX_LOOKS          32 /* for memory that is missing while brackets come and go */

_Static_assert(KL_NR_ACCESSORS == 64, "one bit each in kl_vm.accessors_used");

static KL_TLS unsigned my_place; /* 1-based; 0: not chosen yet */
static _Atomic unsigned next_place;

static struct kl_accessor *create(struct kl_vm *vm)
{
	size_t size = KL_NR_ACCESSORS * sizeof(struct kl_accessor);
	struct kl_accessor *new = kl_sys_map(size), *there = NULL;

	if (!new)
		return NULL;
	for (unsigned i = 0; i < KL_NR_ACCESSORS; i++) {
		new[i].core.vm = vm;
		new[i].core.id = KL_ACCESSOR_ID;
	}
	if (atomic_compare_exchange_strong(&vm->accessors, &there, new))
		return new;
	kl_sys_unmap(new, size);
	return there;
}

void kl_accessors_free(struct kl_vm *vm)
{
	struct kl_accessor *a = atomic_load(&vm->accessors);

	if (a)
		kl_sys_unmap(a, KL_NR_ACCESSORS * sizeof(*a));
}

static void make_ready(struct kl_vm *vm, struct kl_accessor *a, unsigned i)
{
	atomic_fetch_or(&vm->accessors_used, 1ull << i);
	racepoint("accessor-used");
	kl_read_lock(&vm->mmu->lock);
	kl_read_unlock(&vm->mmu->lock);
	atomic_store_explicit(&a->ready, true, memory_order_release);
}

/* Every accessor was taken: let owners that block in an access step aside. */
static void wait_for_any(struct kl_accessor *all, unsigned round)
{
	if (round >= ROUNDS_BEFORE_KICK && !(round & (round - 1))) {
		for (unsigned i = 0; i < KL_NR_ACCESSORS; i++) {
			pid_t tid = atomic_load_explicit(&all[i].core.tid, memory_order_relaxed);

			if (tid)
				kl_guard_kick(tid);
		}
	}
	sched_yield();
}

static struct kl_accessor *claim(struct kl_vm *vm, struct kl_accessor *all)
{
	if (KL_UNLIKELY(!my_place))
		my_place = 1 + atomic_fetch_add_explicit(&next_place, 1, memory_order_relaxed) %
				       KL_NR_ACCESSORS;
	for (unsigned n = 0, i = my_place - 1;; n++, i = (i + 1) % KL_NR_ACCESSORS) {
		struct kl_accessor *a = &all[i];
		uint32_t outside = KL_OUTSIDE_GUEST;

		if (n && n % KL_NR_ACCESSORS == 0)
			wait_for_any(all, n / KL_NR_ACCESSORS);
		if (KL_UNLIKELY(!atomic_load_explicit(&a->ready, memory_order_acquire)))
			make_ready(vm, a, i);
		if (KL_LIKELY(atomic_compare_exchange_strong(&a->core.mode, &outside,
							     KL_IN_GUEST))) /* PAIR(vcpu-mode) */
			return a;
	}
}

int kl_accessor_enter(struct kl_vm *vm, unsigned as, bool kick, struct kl_vcpu_core **c)
{
	struct kl_accessor *all = atomic_load_explicit(&vm->accessors, memory_order_acquire);
	struct kl_accessor *a;

	if (KL_UNLIKELY(!kl_self.unblocked))
		kl_guard_unblock();
	if (KL_UNLIKELY(!all)) {
		all = create(vm);
		if (!all)
			return -ENOMEM;
	}
	a = claim(vm, all);
	a->core.as_id = as;
	kl_self.running = &a->core;
	kl_self.only_listed = !KL_TSAN; /* which lists nothing */
	if (kick)
		atomic_store_explicit(&a->core.tid, kl_gettid(), memory_order_relaxed);
	kl_accessor_flushed(&a->core); /* holding nothing yet */
	*c = &a->core;
	return 0;
}

void kl_accessor_leave(struct kl_vcpu_core *c)
{
	kl_self.running = NULL;
	kl_self.only_listed = 0;
	atomic_store_explicit(&c->tid, 0, memory_order_relaxed);
	kl_vcpu_leave_guest(c);
}

enum { NOT_CHANGED, CHANGED, CHANGING };

/*
 * Inside a bracket the memory may be in any state: a failure of then says nothing (several host
 * calls may be needed to replace a mapping). What is true is seen after its end.
 */
static int changed_meanwhile(struct kl_vm *vm, kl_gfn_t gfn, uint64_t seq)
{
	int r = NOT_CHANGED;

	kl_read_lock(&vm->mmu->lock);
	if (kl_in_bracket(vm, gfn, gfn + 1))
		r = CHANGING;
	else if (atomic_load(&vm->mmu_invalidate_seq) != seq)
		r = CHANGED;
	kl_read_unlock(&vm->mmu->lock);
	return r;
}

int kl_accessor_fault(struct kl_vm *vm, unsigned as, kl_gpa_t gpa, unsigned access)
{
	struct kl_vcpu_core c = {.vm = vm, .as_id = as, .id = KL_ACCESSOR_ID};
	unsigned looks = 0;
	uint64_t seq;
	int r, now;

	kl_guard_unblock(); /* in case that the thread has blocked them again */
	do {
		seq = atomic_load_explicit(&vm->mmu_invalidate_seq, memory_order_acquire);
		kl_self.only_listed = !KL_TSAN;
		r = kl_mmu_fault(&c, gpa, access);
		kl_self.only_listed = 0;
		if (r == KL_FAULT_MMIO)
			return -EFAULT;
		if (r != -EFAULT)
			return r == -EINTR ? 0 : r;
		now = changed_meanwhile(vm, gpa >> KL_PAGE_SHIFT, seq);
		if (now == CHANGING)
			sched_yield();
		/* The sequence is that of all memory: brackets elsewhere may never cease. */
	} while (now == CHANGING || (now == CHANGED && ++looks < MAX_LOOKS));
	return r;
}
