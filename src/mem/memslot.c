/* SPDX-License-Identifier: MIT */
/*
 * Sets of memslots, and how one follows another (S1-S5).
 *
 * A VM has two sets for each address space, of which one is published. Memory is constant:
 * arrays for the largest number of slots, of which the kernel only provides what is touched.
 *
 * Invariant: outside an update both sets hold the same slots. An update makes its edit in the
 * hidden set, publishes that, waits for the readers of the other, and repeats the edit there.
 * So nothing can fail once the new slot object exists, and a change costs the moved tail of
 * an array, not a copy of the whole.
 *
 *   CREATE, FLAGS_ONLY   publish(final)
 *   DELETE, MOVE         publish(old slot marked invalid); zap and flush; publish(final)
 *
 *   publish(edit): edit the hidden set ; gate (no bracket in flight, S7) { generation odd ;
 *                  swap } ; wait for readers ; generation even ; edit the other set
 *
 * Slots themselves are immutable: a change of flags, or "invalid", is another slot object.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/racepoint.h"
#include "host/sys.h"
#include "host/thread.h"
#include "mem/notifier.h"
#include "mem/subscribers.h"
#include "mem/vm.h"

#define USER_ADDRESS_END 0x00007ffffffff000ull

const struct kl_memslots *kl_memslots(struct kl_vm *vm, unsigned as_id)
{
	return atomic_load_explicit(&vm->memslots[as_id], memory_order_acquire);
}

uint64_t kl_generation(struct kl_vm *vm, unsigned as_id)
{
	return atomic_load_explicit(&vm->generation[as_id], memory_order_acquire);
}

/* Index of the first slot with base_gfn > @gfn. */
static unsigned upper_gfn(const struct kl_memslots *s, kl_gfn_t gfn)
{
	unsigned lo = 0, hi = s->n;

	while (lo < hi) {
		unsigned mid = lo + (hi - lo) / 2;

		if (s->by_gfn[mid]->base_gfn > gfn)
			hi = mid;
		else
			lo = mid + 1;
	}
	return lo;
}

const struct kl_memslot *kl_memslot_find(const struct kl_memslots *s, kl_gfn_t gfn)
{
	unsigned i = upper_gfn(s, gfn);
	const struct kl_memslot *slot;

	if (!i)
		return NULL;
	slot = s->by_gfn[i - 1];
	return gfn - slot->base_gfn < slot->npages ? slot : NULL;
}

static uint64_t hva_end(const struct kl_memslot *slot)
{
	return slot->hva + (slot->npages << KL_PAGE_SHIFT);
}

/* Index of the first slot with hva >= @hva. */
static unsigned lower_hva(const struct kl_memslots *s, uint64_t hva)
{
	unsigned lo = 0, hi = s->n;

	while (lo < hi) {
		unsigned mid = lo + (hi - lo) / 2;

		if (s->by_hva[mid]->hva >= hva)
			hi = mid;
		else
			lo = mid + 1;
	}
	return lo;
}

/* From the last slot that begins before the end, backwards until none can reach the start. */
void kl_overlap_next(struct kl_overlap *o)
{
	const struct kl_memslots *s = o->set;
	unsigned i = o->cursor;

	o->slot = NULL;
	while (i > 0 && s->max_end[i - 1] > o->start) {
		const struct kl_memslot *slot = s->by_hva[--i];

		if (hva_end(slot) <= o->start)
			continue;
		o->slot = slot;
		o->first = slot->base_gfn +
			   ((kl_max(o->start, slot->hva) - slot->hva) >> KL_PAGE_SHIFT);
		o->last = slot->base_gfn +
			  ((kl_min(o->end, hva_end(slot)) - slot->hva) >> KL_PAGE_SHIFT);
		break;
	}
	o->cursor = i;
}

void kl_overlap_first(struct kl_overlap *o, const struct kl_memslots *s, uint64_t start,
		      uint64_t end)
{
	*o = (struct kl_overlap){.set = s, .start = start, .end = end, .cursor = lower_hva(s, end)};
	kl_overlap_next(o);
}

/* ---- editing a hidden set ---------------------------------------------------------- */

static unsigned index_by_hva(const struct kl_memslots *s, const struct kl_memslot *slot)
{
	unsigned i = lower_hva(s, slot->hva);

	while (s->by_hva[i] != slot)
		i++;
	return i;
}

static void array_remove(const struct kl_memslot **a, unsigned n, unsigned i)
{
	memmove(a + i, a + i + 1, (n - i - 1) * sizeof(*a));
}

static void array_insert(const struct kl_memslot **a, unsigned n, unsigned i,
			 const struct kl_memslot *slot)
{
	memmove(a + i + 1, a + i, (n - i) * sizeof(*a));
	a[i] = slot;
}

/* Take @del out and put @add in; either may be NULL. Context: nobody reads @s. */
static void set_edit(struct kl_memslots *s, const struct kl_memslot *del,
		     const struct kl_memslot *add)
{
	unsigned dirty = s->n, i;

	if (del) {
		array_remove(s->by_gfn, s->n, upper_gfn(s, del->base_gfn) - 1);
		dirty = index_by_hva(s, del);
		array_remove(s->by_hva, s->n, dirty);
		s->n--;
	}
	if (add) {
		array_insert(s->by_gfn, s->n, upper_gfn(s, add->base_gfn), add);
		i = lower_hva(s, add->hva);
		array_insert(s->by_hva, s->n, i, add);
		dirty = kl_min(dirty, i);
		s->n++;
	}
	/* Largest ends change from the first edit on. */
	for (i = dirty; i < s->n; i++)
		s->max_end[i] = kl_max(i ? s->max_end[i - 1] : 0, hva_end(s->by_hva[i]));
}

/* ---- installing ------------------------------------------------------------------ */

static struct kl_memslots *hidden_set(struct kl_vm *vm, unsigned as)
{
	return kl_memslots(vm, as) == &vm->memslot_sets[as][0] ? &vm->memslot_sets[as][1]
							       : &vm->memslot_sets[as][0];
}

/*
 * Context: slots_lock, no bracket of this thread (checked at the start of the update, so this
 * cannot fail).
 */
static void publish(struct kl_vm *vm, unsigned as, const struct kl_memslot *del,
		    const struct kl_memslot *add)
{
	uint64_t gen = atomic_load_explicit(&vm->generation[as], memory_order_relaxed);
	struct kl_memslots *set = hidden_set(vm, as);
	int r;

	kl_assert_held(&vm->slots_lock);
	set_edit(set, del, add);
	racepoint("memslots-publish");
	r = kl_notifier_update_begin();
	KL_BUG_ON(r, vm);
	atomic_store(&vm->generation[as], gen + 1);
	atomic_store(&vm->memslots[as], set);
	kl_notifier_update_end();
	racepoint("memslots-published");
	kl_srcu_synchronize(&vm->srcu);
	/* At the wrap, while no tag can match: entries of the last cycle would (S6, B17). */
	if (KL_MMIO_GEN(gen + 2) == 0)
		kl_mmu_zap_mmio(vm);
	atomic_store(&vm->generation[as], gen + 2);
	set_edit(hidden_set(vm, as), del, add);
}

enum change { CREATE, DELETE, MOVE, FLAGS_ONLY };

/*
 * @old, @slot: before and after; either may be NULL. Takes ownership of @slot when it
 * succeeds.
 */
static int install(struct kl_vm *vm, unsigned as, enum change change, const struct kl_memslot *old,
		   const struct kl_memslot *slot)
{
	struct kl_memslot *invalid = NULL;

	/* Prepare: what can fail. */
	if (change == DELETE || change == MOVE) {
		invalid = malloc(sizeof(*invalid));
		if (!invalid)
			return -ENOMEM;
		*invalid = *old;
		invalid->invalid = true;
	}
	/* Commit: nothing fails from here. */
	if (invalid) {
		publish(vm, as, old, invalid);
		racepoint("memslot-invalid");
		kl_mmu_zap_slot(vm, old);
		publish(vm, as, invalid, slot);
	} else {
		publish(vm, as, old, slot);
	}
	/*
	 * A fault that looked the old slot up and slept in populate carries the old generation
	 * and will not install (B31). What was mapped writable under other flags goes now.
	 */
	if (change == FLAGS_ONLY)
		kl_mmu_protect_slot(vm, slot);
	vm->slot_by_id[as][old ? old->id : slot->id] = slot;
	free(invalid);
	free((void *)old);
	kl_stat_add(&vm->stats.memslot_changes, 1);
	return 0;
}

/* Does [base, base + npages) meet a slot other than @self? */
static bool overlaps(const struct kl_memslots *s, kl_gfn_t base, uint64_t npages,
		     const struct kl_memslot *self)
{
	for (unsigned i = upper_gfn(s, base + npages - 1); i > 0; i--) {
		const struct kl_memslot *e = s->by_gfn[i - 1];

		if (e == self)
			continue;
		return e->base_gfn + e->npages > base;
	}
	return false;
}

static int set_region_locked(struct kl_vm *vm, unsigned as, unsigned id,
			     const struct kl_uapi_memory_region2 *r)
{
	const struct kl_memslots *now = kl_memslots(vm, as);
	const struct kl_memslot *old = vm->slot_by_id[as][id];
	kl_gfn_t base = r->guest_phys_addr >> KL_PAGE_SHIFT;
	uint64_t npages = r->memory_size >> KL_PAGE_SHIFT;
	struct kl_memslot *slot;
	enum change change;
	int ret;

	if (!npages)
		return old ? install(vm, as, DELETE, old, NULL) : -EINVAL;
	if (!old) {
		change = CREATE;
	} else {
		if (r->userspace_addr != old->hva || npages != old->npages ||
		    ((r->flags ^ old->flags) & KVM_MEM_READONLY))
			return -EINVAL;
		if (base != old->base_gfn)
			change = MOVE;
		else if (r->flags != old->flags)
			change = FLAGS_ONLY;
		else
			return 0;
	}
	if (change != FLAGS_ONLY && overlaps(now, base, npages, old))
		return -EEXIST;
	if (change != FLAGS_ONLY && base + npages - 1 > KL_MAX_GFN)
		return -EINVAL;
	if (change == CREATE && now->n >= KL_USER_MEM_SLOTS)
		return -EINVAL;

	slot = malloc(sizeof(*slot));
	if (!slot)
		return -ENOMEM;
	kl_not_leaked(slot);
	*slot = (struct kl_memslot){
		.base_gfn = base,
		.npages = npages,
		.hva = r->userspace_addr,
		.flags = r->flags,
		.id = (uint16_t)id,
		.as_id = (uint8_t)as,
	};
	ret = install(vm, as, change, old, slot);
	if (ret)
		free(slot);
	return ret;
}

int kl_set_memory_region(struct kl_vm *vm, const struct kl_uapi_memory_region2 *r)
{
	unsigned as = r->slot >> 16, id = r->slot & 0xffff;
	int ret;

	/* The order of checks decides which errno a program sees that is wrong twice. */
	if (id >= KL_USER_MEM_SLOTS)
		return -EINVAL;
	if (r->flags & ~(uint32_t)KVM_MEM_READONLY)
		return -EINVAL;
	if ((r->memory_size | r->guest_phys_addr | r->userspace_addr) & ~KL_PAGE_MASK)
		return -EINVAL;
	if (r->userspace_addr > USER_ADDRESS_END ||
	    r->memory_size > USER_ADDRESS_END - r->userspace_addr)
		return -EINVAL;
	if (as >= KL_NR_AS)
		return -EINVAL;
	if (r->guest_phys_addr + r->memory_size < r->guest_phys_addr)
		return -EINVAL;
	if (r->memory_size >> KL_PAGE_SHIFT > KL_MEM_MAX_PAGES)
		return -EINVAL;

	/* Inside one's own bracket an update could only wait for itself. */
	if (kl_self.brackets)
		return -EDEADLK;
	kl_mutex_lock(&vm->slots_lock);
	ret = set_region_locked(vm, as, id, r);
	kl_mutex_unlock(&vm->slots_lock);
	KL_TRACE("vm%llu memslot %u gpa=%#llx size=%#llx hva=%#llx flags=%#x -> %d",
		 (unsigned long long)vm->serial, r->slot, (unsigned long long)r->guest_phys_addr,
		 (unsigned long long)r->memory_size, (unsigned long long)r->userspace_addr,
		 r->flags, ret);
	return ret;
}

/* by_gfn, by_hva and max_end of two sets, and the index by id, in one mapping. */
#define ARRAY_BYTES (KL_USER_MEM_SLOTS * sizeof(uint64_t))
#define STORE_BYTES (7 * ARRAY_BYTES)

int kl_memslots_init(struct kl_vm *vm)
{
	for (unsigned as = 0; as < KL_NR_AS; as++) {
		char *p = kl_sys_map(STORE_BYTES);

		if (!p)
			return -ENOMEM;
		vm->slot_by_id[as] = (void *)p;
		for (unsigned i = 0; i < 2; i++) {
			struct kl_memslots *s = &vm->memslot_sets[as][i];

			s->by_gfn = (void *)(p + (3 * i + 1) * ARRAY_BYTES);
			s->by_hva = (void *)(p + (3 * i + 2) * ARRAY_BYTES);
			s->max_end = (void *)(p + (3 * i + 3) * ARRAY_BYTES);
		}
		atomic_init(&vm->memslots[as], &vm->memslot_sets[as][0]);
		atomic_init(&vm->generation[as], KL_FIRST_GENERATION(as));
	}
	return 0;
}

void kl_memslots_destroy(struct kl_vm *vm)
{
	for (unsigned as = 0; as < KL_NR_AS; as++) {
		if (!vm->slot_by_id[as])
			continue;
		for (unsigned i = 0; i < vm->memslot_sets[as][0].n; i++)
			free((void *)vm->memslot_sets[as][0].by_gfn[i]);
		kl_sys_unmap(vm->slot_by_id[as], STORE_BYTES);
	}
}
