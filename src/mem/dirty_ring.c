/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <sched.h>
#include <stdlib.h>

#include "base/failpoint.h"
#include "base/log.h"
#include "base/racepoint.h"
#include "host/sys.h"
#include "mem/dirty_ring.h"

#define RESET_BATCH 64u /* entries for which the lock is held at a time */

int kl_dirty_rings_enable(struct kl_vm *vm, uint64_t bytes, bool late)
{
	if (!bytes || (bytes & (bytes - 1)))
		return -EINVAL;
	if (bytes < KL_DIRTY_RING_RESERVED * sizeof(struct kvm_dirty_gfn) || bytes < KL_PAGE_SIZE)
		return -EINVAL;
	if (bytes > KL_DIRTY_RING_MAX_ENTRIES * sizeof(struct kvm_dirty_gfn))
		return -E2BIG;
	if (vm->dirty_ring_size || late)
		return -EINVAL;
	kl_mutex_lock(&vm->slots_lock);
	vm->dirty_ring_size = (uint32_t)bytes;
	kl_mutex_unlock(&vm->slots_lock);
	return 0;
}

int kl_dirty_rings_with_bitmap(struct kl_vm *vm)
{
	int r = -EINVAL;

	kl_mutex_lock(&vm->slots_lock);
	if (vm->dirty_ring_size && !kl_memslots_any(vm)) {
		vm->dirty_ring_with_bitmap = true;
		r = 0;
	}
	kl_mutex_unlock(&vm->slots_lock);
	return r;
}

void kl_dirty_ring_init(struct kl_dirty_ring *ring, struct kl_vcpu_core *c, void *entries)
{
	uint32_t size = c->vm->dirty_ring_size / sizeof(struct kvm_dirty_gfn);

	*ring = (struct kl_dirty_ring){
		.owner = c,
		.entries = entries,
		.size = size,
		.soft_limit = size - KL_DIRTY_RING_RESERVED,
	};
	atomic_store_explicit(&c->ring, ring, memory_order_release);
}

int kl_dirty_ring_make(struct kl_vm *vm, unsigned size)
{
	uint32_t bytes = size * (uint32_t)sizeof(struct kvm_dirty_gfn);
	struct kl_dirty_ring *ring = kl_failpoint("dirty-ring") ? NULL : malloc(sizeof(*ring));
	void *entries = ring && !kl_failpoint("dirty-ring-entries") ? kl_sys_map(bytes) : NULL;
	int r = entries ? 0 : -ENOMEM;

	/* Never soft-full: there is nobody who could be told. */
	if (!r)
		*ring = (struct kl_dirty_ring){
			.entries = entries, .size = size, .soft_limit = size + 1};
	kl_mutex_lock(&vm->slots_lock);
	if (!r && vm->dirty_ring_size)
		r = -EEXIST;
	if (!r && kl_memslots_any(vm))
		r = -EBUSY;
	if (!r) {
		vm->dirty_ring_size = bytes;
		atomic_store_explicit(&vm->dirty_ring, ring, memory_order_release);
	}
	kl_mutex_unlock(&vm->slots_lock);
	if (!r)
		return 0;
	if (entries)
		kl_sys_unmap(entries, bytes);
	free(ring);
	return r;
}

void kl_dirty_ring_destroy(struct kl_vm *vm)
{
	struct kl_dirty_ring *ring = atomic_load(&vm->dirty_ring);

	if (ring)
		kl_sys_unmap(ring->entries, vm->dirty_ring_size);
	free(ring);
}

static void lock(struct kl_dirty_ring *ring)
{
	for (unsigned n = 0; atomic_exchange(&ring->lock, 1); n++) {
		if (n < 100)
			kl_cpu_relax();
		else
			sched_yield();
	}
}

static void unlock(struct kl_dirty_ring *ring)
{
	atomic_store_explicit(&ring->lock, 0, memory_order_release);
}

/* ---- pushing ----------------------------------------------------------------------------- */

static void push_locked(struct kl_dirty_ring *ring, uint32_t slot, uint64_t offset)
{
	uint32_t pushed = atomic_load_explicit(&ring->pushed, memory_order_relaxed);
	struct kvm_dirty_gfn *e = &ring->entries[pushed & (ring->size - 1)];

	__atomic_store_n(&e->slot, slot, __ATOMIC_RELAXED);
	__atomic_store_n(&e->offset, offset, __ATOMIC_RELAXED);
	/* The program's acquire, or KVM's plain x86 load, pairs with it. */
	__atomic_store_n(&e->flags, KVM_DIRTY_GFN_F_DIRTY, __ATOMIC_RELEASE);
	atomic_store_explicit(&ring->pushed, pushed + 1, memory_order_relaxed);
}

/*
 * True if the page is in a ring. The bit is looked at behind the lock, which is a barrier: a store
 * to the page before it is visible to whoever clears the bit afterwards.
 */
static bool mark_in(struct kl_dirty_ring *ring, struct kl_dirty_log *log, uint64_t index)
{
	bool done = true, soft_full = false;

	lock(ring);
	if (!kl_dirty_test(log->in_ring, index)) {
		done = !kl_dirty_ring_full(ring);
		if (done) {
			push_locked(ring, log->slot, index);
			racepoint("dirty-pushed");
			atomic_fetch_or(&log->in_ring[index / 64], 1ull << index % 64);
			soft_full = kl_dirty_ring_soft_full(ring);
		}
	}
	unlock(ring);
	if (KL_UNLIKELY(soft_full))
		kl_vcpu_request(ring->owner, KL_REQ_RING_FULL);
	return done;
}

/* In whatever ring has room. */
static bool mark_anywhere(struct kl_vm *vm, struct kl_dirty_log *log, uint64_t index)
{
	struct kl_dirty_ring *own = atomic_load_explicit(&vm->dirty_ring, memory_order_acquire);
	unsigned n = atomic_load_explicit(&vm->nr_vcpus, memory_order_acquire);

	if (own)
		return mark_in(own, log, index);
	for (unsigned i = 0; i < n; i++) {
		struct kl_vcpu_core *c = atomic_load_explicit(&vm->vcpus[i], memory_order_acquire);
		struct kl_dirty_ring *ring =
			c ? atomic_load_explicit(&c->ring, memory_order_acquire) : NULL;

		if (ring && mark_in(ring, log, index))
			return true;
	}
	return false;
}

void kl_dirty_ring_mark(struct kl_vm *vm, struct kl_vcpu_core *c, struct kl_dirty_log *log,
			uint64_t index)
{
	struct kl_dirty_ring *ring = c ? atomic_load(&c->ring) : NULL;

	if (ring && mark_in(ring, log, index))
		return;
	if (!vm->dirty_ring_with_bitmap && mark_anywhere(vm, log, index))
		return;
	kl_dirty_mark_half(log, index);
	/* After the mark: who takes the flag off looks at the bitmap then. */
	if (!vm->dirty_ring_with_bitmap)
		atomic_store(&vm->dirty_left_over, true);
}

bool kl_dirty_ring_mark_in_guest(struct kl_vcpu_core *c, struct kl_dirty_log *log, uint64_t index)
{
	struct kl_dirty_ring *ring = atomic_load_explicit(&c->ring, memory_order_relaxed);

	if (kl_dirty_test(log->in_ring, index))
		return true;
	if (ring)
		return mark_in(ring, log, index);
	kl_dirty_ring_mark(c->vm, NULL, log, index);
	return true;
}

/* ---- what no ring had room for ----------------------------------------------------------- */

/* Take the bitmap's marks to rings, as far as there is room. Context: slots_lock. */
static void push_left_over_of(struct kl_vm *vm, struct kl_dirty_log *log)
{
	struct kl_dirty_half *half = &log->half[log->seq & 1];

	for (uint64_t w = 0; w < (log->npages + 63) / 64; w++) {
		uint64_t left = atomic_exchange(&half->words[w], 0);

		for (; left; left &= left - 1)
			kl_dirty_ring_mark(vm, NULL, log, w * 64 + (unsigned)__builtin_ctzll(left));
	}
}

static void push_left_over_locked(struct kl_vm *vm)
{
	kl_assert_held(&vm->slots_lock);
	if (!atomic_exchange(&vm->dirty_left_over, false))
		return;
	for (unsigned as = 0; as < KL_NR_AS; as++)
		for (unsigned id = 0; id < KL_USER_MEM_SLOTS; id++)
			if (vm->slot_by_id[as][id] && vm->slot_by_id[as][id]->log)
				push_left_over_of(vm, vm->slot_by_id[as][id]->log);
}

void kl_dirty_rings_push_left_over(struct kl_vm *vm)
{
	kl_mutex_lock(&vm->slots_lock);
	push_left_over_locked(vm);
	kl_mutex_unlock(&vm->slots_lock);
}

/* ---- reset ------------------------------------------------------------------------------- */

/* The page may be pushed again. @slot and @offset are the program's. Context: slots_lock. */
static void forget(struct kl_vm *vm, uint32_t slot, uint64_t offset)
{
	unsigned as = slot >> 16, id = slot & 0xffff;
	const struct kl_memslot *s;

	if (as >= KL_NR_AS || id >= KL_USER_MEM_SLOTS)
		return;
	s = vm->slot_by_id[as][id];
	if (s && s->log && offset < s->npages)
		atomic_fetch_and(&s->log->in_ring[offset / 64], ~(1ull << offset % 64));
}

/* Some entries; returns how many. */
static unsigned reset_some(struct kl_vm *vm, struct kl_dirty_ring *ring)
{
	uint32_t pushed, reset;
	unsigned n = 0;

	lock(ring);
	pushed = atomic_load_explicit(&ring->pushed, memory_order_relaxed);
	reset = atomic_load_explicit(&ring->reset, memory_order_relaxed);
	for (; n < RESET_BATCH && reset != pushed; n++, reset++) {
		struct kvm_dirty_gfn *e = &ring->entries[reset & (ring->size - 1)];
		uint32_t slot;
		uint64_t offset;

		if (!(__atomic_load_n(&e->flags, __ATOMIC_ACQUIRE) & KVM_DIRTY_GFN_F_RESET))
			break;
		slot = __atomic_load_n(&e->slot, __ATOMIC_RELAXED);
		offset = __atomic_load_n(&e->offset, __ATOMIC_RELAXED);
		__atomic_store_n(&e->flags, 0, __ATOMIC_RELEASE);
		forget(vm, slot, offset);
	}
	atomic_store_explicit(&ring->reset, reset, memory_order_relaxed);
	unlock(ring);
	return n;
}

int kl_dirty_rings_reset(struct kl_vm *vm)
{
	unsigned n = atomic_load_explicit(&vm->nr_vcpus, memory_order_acquire), some;
	int total = 0;

	if (!vm->dirty_ring_size)
		return -EINVAL;
	kl_mutex_lock(&vm->slots_lock);
	for (unsigned i = 0; i < n; i++) {
		struct kl_vcpu_core *c = atomic_load_explicit(&vm->vcpus[i], memory_order_acquire);
		struct kl_dirty_ring *ring =
			c ? atomic_load_explicit(&c->ring, memory_order_acquire) : NULL;

		/* No more than there is room for: the vCPU may push all the time. */
		for (unsigned done = 0; ring && done < ring->size; done += some) {
			some = reset_some(vm, ring);
			total += (int)some;
			if (!some)
				break;
		}
	}
	racepoint("dirty-rings-reset");
	if (total)
		(void)kl_vcpus_flush(vm, true);
	push_left_over_locked(vm);
	kl_mutex_unlock(&vm->slots_lock);
	return total;
}

/* ---- the VM's own ------------------------------------------------------------------------ */

/* Some entries; returns how many. */
static unsigned collect_some(struct kl_vm *vm, struct kl_dirty_ring *ring,
			     struct kvmlet_dirty_page *pages, unsigned max)
{
	uint32_t pushed, reset;
	unsigned n = 0;

	lock(ring);
	pushed = atomic_load_explicit(&ring->pushed, memory_order_relaxed);
	reset = atomic_load_explicit(&ring->reset, memory_order_relaxed);
	for (; n < kl_min(max, RESET_BATCH) && reset != pushed; n++, reset++) {
		const struct kvm_dirty_gfn *e = &ring->entries[reset & (ring->size - 1)];

		pages[n] = (struct kvmlet_dirty_page){.slot = e->slot, .page = e->offset};
		forget(vm, e->slot, e->offset);
	}
	atomic_store_explicit(&ring->reset, reset, memory_order_relaxed);
	unlock(ring);
	return n;
}

unsigned kl_dirty_ring_collect(struct kl_vm *vm, struct kvmlet_dirty_page *pages, unsigned max)
{
	struct kl_dirty_ring *ring = atomic_load(&vm->dirty_ring);
	unsigned n = 0, some;

	kl_mutex_lock(&vm->slots_lock);
	do {
		some = collect_some(vm, ring, pages + n, max - n);
		n += some;
		/* Now there is room. */
		push_left_over_locked(vm);
	} while (some && n < max);
	racepoint("dirty-ring-collected");
	if (n)
		(void)kl_vcpus_flush(vm, true);
	kl_mutex_unlock(&vm->slots_lock);
	return n;
}
