/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <limits.h>
#include <sched.h>

#include "base/log.h"
#include "host/guard.h"
#include "host/sys.h"
#include "mem/vm.h"

#define SPINS_BEFORE_YIELD 200
#define YIELDS_BEFORE_KICK 64

_Static_assert(offsetof(struct kl_vcpu_core, requests) == 0, "host/thread.c relies on it");
_Static_assert(KL_REQ_SIGNAL == KL_THREAD_SIGNAL_REQUEST, "one bit, two layers");

void kl_vcpu_request(struct kl_vcpu_core *c, uint32_t bits)
{
	atomic_fetch_or(&c->requests, bits); /* PAIR(vcpu-sleep) */
	if (atomic_load(&c->sleeping))
		kl_futex_wake(&c->requests, 1);
}

void kl_vcpu_sleep(struct kl_vcpu_core *c)
{
	atomic_store(&c->sleeping, 1); /* PAIR(vcpu-sleep) */
	for (;;) {
		uint32_t seen = atomic_load(&c->requests);

		/*
		 * A flush has nothing to wake for: the TLB is dropped before the next guest
		 * access in any case (B14). Nor has who wants it out of guest mode. A signal
		 * handler sets KL_REQ_SIGNAL, which changes the word, so one that runs just before
		 * the wait is not lost.
		 */
		if (seen & ~(KL_REQ_TLB_FLUSH | KL_REQ_STOP | KL_REQ_CODE))
			break;
		kl_futex_wait(&c->requests, seen, NULL);
	}
	atomic_store_explicit(&c->sleeping, 0, memory_order_relaxed);
}

static bool in_guest(struct kl_vcpu_core *c)
{
	return atomic_load(&c->mode) == KL_IN_GUEST;
}

static bool must_wait_for(struct kl_vcpu_core *c)
{
	return atomic_load(&c->mode) == KL_IN_GUEST && /* PAIR(vcpu-mode) */
	       (atomic_load(&c->requests) & KL_REQ_TLB_FLUSH);
}

KL_TLS struct kl_flush_wait kl_flush_wait;

static void note_wait(struct kl_vcpu_core *c, uint64_t ns)
{
	kl_flush_wait.vcpus++;
	if (ns < kl_flush_wait.slowest_ns)
		return;
	kl_flush_wait.slowest_id = c->id;
	kl_flush_wait.slowest_ns = ns;
}

static void wait_while(bool (*condition)(struct kl_vcpu_core *), struct kl_vcpu_core *c)
{
	uint64_t begun = KL_UNLIKELY(kl_trace_on) ? kl_trace_ns() : 0;
	bool waited = false;
	unsigned next_kick = SPINS_BEFORE_YIELD + YIELDS_BEFORE_KICK;

	kl_rank_wait(KL_RANK_VCPU_WAIT);
	for (unsigned n = 0; condition(c); n++) {
		if (!waited)
			racepoint("vcpu-awaited");
		waited = true;
		if (n < SPINS_BEFORE_YIELD) {
			kl_cpu_relax();
			continue;
		}
		/*
		 * It may sit in a host page fault: signal it out of the access (M6). Ever more
		 * seldom: a thread that is only waiting for a CPU would find all of them at once.
		 */
		if (n == next_kick) {
			pid_t tid = atomic_load(&c->tid);

			if (tid)
				kl_guard_kick(tid);
			next_kick = n < UINT_MAX / 4 ? n * 2 : n + UINT_MAX / 8;
		}
		sched_yield();
	}
	if (KL_UNLIKELY(begun && waited))
		note_wait(c, kl_trace_ns() - begun);
}

static struct kl_vcpu_core *vcpu_at(struct kl_vm *vm, unsigned i)
{
	return atomic_load_explicit(&vm->vcpus[i], memory_order_acquire);
}

/* The accessors that were ever used are the bits of @used. */
#define for_each_accessor(c, accessors, used)                                       \
	for (uint64_t left_ = (used);                                               \
	     left_ ? (c = &(accessors)[__builtin_ctzll(left_)].core, true) : false; \
	     left_ &= left_ - 1)

void kl_vcpus_request_all(struct kl_vm *vm, uint32_t bits)
{
	unsigned n = atomic_load(&vm->nr_vcpus);

	for (unsigned i = 0; i < n; i++) {
		struct kl_vcpu_core *c = vcpu_at(vm, i);

		if (c)
			atomic_fetch_or(&c->requests, bits);
	}
}

bool kl_vcpus_in_guest(struct kl_vm *vm)
{
	uint64_t used = atomic_load_explicit(&vm->accessors_used, memory_order_acquire);
	struct kl_accessor *accessors = atomic_load_explicit(&vm->accessors, memory_order_acquire);
	unsigned n = atomic_load_explicit(&vm->nr_vcpus, memory_order_acquire);
	struct kl_vcpu_core *a;

	for (unsigned i = 0; i < n; i++) {
		struct kl_vcpu_core *c = vcpu_at(vm, i);

		if (c && atomic_load(&c->mode) == KL_IN_GUEST)
			return true;
	}
	for_each_accessor (a, accessors, used)
		if (atomic_load(&a->mode) == KL_IN_GUEST)
			return true;
	return false;
}

int kl_vcpus_flush(struct kl_vm *vm, bool may_wait)
{
	/* One that is not among these had its barrier with our zap: mmu/accessor.c. */
	uint64_t used = atomic_load_explicit(&vm->accessors_used, memory_order_acquire);
	struct kl_accessor *accessors = atomic_load_explicit(&vm->accessors, memory_order_acquire);
	/*
	 * Not a load: the zap's stores come before it. A vCPU that is not counted yet sees them
	 * when it first enters guest mode.
	 */
	unsigned n = atomic_fetch_add(&vm->nr_vcpus, 0);
	struct kl_vcpu_core *a;
	int r = 0;

	kl_stat_add(&vm->stats.remote_tlb_flush_requests, 1);
	for (unsigned i = 0; i < n; i++) {
		struct kl_vcpu_core *c = vcpu_at(vm, i);

		if (c)
			atomic_fetch_or(&c->requests, KL_REQ_TLB_FLUSH); /* PAIR(vcpu-mode) */
	}
	for_each_accessor (a, accessors, used)
		atomic_fetch_or(&a->requests, KL_REQ_TLB_FLUSH); /* PAIR(vcpu-mode) */
	racepoint("flush-requested");
	if (KL_UNLIKELY(kl_trace_on))
		kl_flush_wait = (struct kl_flush_wait){0};
	for (unsigned i = 0; i < n && !r; i++) {
		struct kl_vcpu_core *c = vcpu_at(vm, i);

		if (!c)
			continue;
		if (may_wait)
			wait_while(must_wait_for, c);
		else if (must_wait_for(c))
			r = -EAGAIN;
	}
	for_each_accessor (a, accessors, used) {
		if (may_wait)
			wait_while(must_wait_for, a);
		else if (must_wait_for(a))
			r = -EAGAIN;
	}
	if (!r)
		kl_stat_add(&vm->stats.remote_tlb_flush, 1);
	return r;
}

/* ---- one vCPU alone ---- */

void kl_vcpu_enter_guest(struct kl_vcpu_core *c)
{
	for (;;) {
		atomic_store(&c->mode, KL_IN_GUEST); /* PAIR(vcpu-mode) PAIR(vcpu-stop) */
		racepoint("vcpu-entered");
		if (KL_LIKELY(!atomic_load(&c->vm->alone) || c->alone))
			return;
		kl_vcpu_leave_guest(c);
		racepoint("vcpu-stopped");
		kl_futex_wait(&c->vm->alone, 1, NULL);
	}
}

bool kl_vcpus_stop(struct kl_vcpu_core *me)
{
	struct kl_vm *vm = me->vm;
	uint32_t nobody = 0;
	unsigned n;

	while (!atomic_compare_exchange_strong(&vm->alone, &nobody, 1)) { /* PAIR(vcpu-stop) */
		if (kl_vcpu_requests(me) & (KL_REQ_SIGNAL | KL_REQ_VM_DEAD))
			return false;
		kl_futex_wait(&vm->alone, 1, NULL);
		nobody = 0;
	}
	me->alone = true;
	racepoint("vcpus-stopping");
	/* One that is not counted yet finds the word set when it enters. */
	n = atomic_load(&vm->nr_vcpus);
	for (unsigned i = 0; i < n; i++) {
		struct kl_vcpu_core *c = vcpu_at(vm, i);

		if (c && c != me && in_guest(c)) /* else a halted one would wake for nothing */
			atomic_fetch_or(&c->requests, KL_REQ_STOP);
	}
	for (unsigned i = 0; i < n; i++) {
		struct kl_vcpu_core *c = vcpu_at(vm, i);

		if (c && c != me)
			wait_while(in_guest, c);
	}
	return true;
}

void kl_vcpus_go(struct kl_vcpu_core *me)
{
	me->alone = false;
	atomic_store(&me->vm->alone, 0);
	kl_futex_wake(&me->vm->alone, INT_MAX);
}

int kl_vcpu_core_add(struct kl_vm *vm, struct kl_vcpu_core *c, unsigned id)
{
	unsigned n;
	int r = 0;

	if (id >= KL_MAX_VCPU_IDS)
		return -EINVAL;
	kl_mutex_lock(&vm->vcpus_lock);
	n = atomic_load_explicit(&vm->nr_vcpus, memory_order_relaxed);
	if (n >= KL_MAX_VCPUS)
		r = -EINVAL;
	for (unsigned i = 0; !r && i < n; i++) {
		struct kl_vcpu_core *other = atomic_load(&vm->vcpus[i]);

		if (other && other->id == id)
			r = -EEXIST;
	}
	if (!r) {
		c->vm = vm;
		c->id = id;
		c->index = n;
		atomic_store_explicit(&vm->vcpus[n], c, memory_order_release);
		atomic_store(&vm->nr_vcpus, n + 1);
	}
	kl_mutex_unlock(&vm->vcpus_lock);
	return r;
}

void kl_vcpu_core_remove(struct kl_vcpu_core *c)
{
	struct kl_vm *vm = c->vm;
	unsigned n;

	kl_mutex_lock(&vm->vcpus_lock);
	atomic_store(&vm->vcpus[c->index], NULL);
	n = atomic_load(&vm->nr_vcpus);
	/* Indexes never change; the last one can be given again. */
	if (c->index == n - 1)
		atomic_store(&vm->nr_vcpus, n - 1);
	kl_mutex_unlock(&vm->vcpus_lock);
}
