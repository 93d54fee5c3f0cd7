/* SPDX-License-Identifier: MIT */
/*
 * Sets of memslots, and how one follows another (S1-S5).
 *
 * A VM has two sets for each address space, of which one is published. Memory is constant:
 * trees for the largest number of slots, of which the kernel only provides what is touched.
 *
 * Invariant: outside an update both sets hold the same slots. An update makes its edit in the
 * hidden set, publishes that, waits for the readers of the other, and repeats the edit there.
 * So nothing can fail once the new slot object exists, and a change costs O(log n).
 *
 *   CREATE, FLAGS_ONLY   publish(final)
 *   DELETE, MOVE         publish(old slot marked invalid); zap and flush; publish(final)
 *
 *   publish(edit): edit the hidden set ; gate (no bracket over the slot in flight, S7)
 *                  { generation odd ; swap } ; wait for readers ; generation even ; edit the
 *                  other set
 *
 * Slots themselves are immutable: a change of flags, or "invalid", is another slot object.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/failpoint.h"
#include "base/log.h"
#include "base/racepoint.h"
#include "host/sys.h"
#include "host/thread.h"
#include "mem/dirty.h"
#include "mem/gmem.h"
#include "mem/heat.h"
#include "mem/notifier.h"
#include "mem/subscribers.h"
#include "mem/uffd_source.h"
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

static uint64_t size_of(const struct kl_memslot *slot)
{
	return slot->npages << KL_PAGE_SHIFT;
}

static uint64_t hva_end(const struct kl_memslot *slot)
{
	return slot->hva + size_of(slot);
}

/* Slots may share host memory: the id makes keys unique. */
static uint64_t hva_key(uint64_t hva, unsigned id)
{
	return (hva >> KL_PAGE_SHIFT) << 16 | id;
}

void kl_overlap_next(struct kl_overlap *o)
{
	const struct kl_memslot *slot;
	uint64_t key, hva;

	slot = kl_btree_overlap(o->in_gmem ? &o->set->by_gmem : &o->set->by_hva, o->cursor,
				hva_key(o->end + ~KL_PAGE_MASK, 0), o->start, &key);
	o->slot = slot;
	if (!slot) {
		if (o->in_gmem || !o->set->by_gmem.n)
			return;
		o->in_gmem = true;
		o->cursor = 0;
		kl_overlap_next(o);
		return;
	}
	hva = o->in_gmem ? slot->gmem->hva : slot->hva;
	o->cursor = key + 1;
	o->first = slot->base_gfn + ((kl_max(o->start, hva) - hva) >> KL_PAGE_SHIFT);
	o->last = slot->base_gfn +
		  ((kl_min(o->end, hva + size_of(slot)) - hva + ~KL_PAGE_MASK) >> KL_PAGE_SHIFT);
}

void kl_overlap_first(struct kl_overlap *o, const struct kl_memslots *s, uint64_t start,
		      uint64_t end)
{
	*o = (struct kl_overlap){.set = s, .start = start, .end = kl_min(end, USER_ADDRESS_END)};
	kl_overlap_next(o);
}

/* Take @del out and put @add in; either may be NULL. Context: nobody reads @s. */
static void set_edit(struct kl_memslots *s, const struct kl_memslot *del,
		     const struct kl_memslot *add)
{
	if (del) {
		kl_btree_remove(&s->by_gfn, del->base_gfn);
		kl_btree_remove(&s->by_hva, hva_key(del->hva, del->id));
		if (del->gmem)
			kl_btree_remove(&s->by_gmem, hva_key(del->gmem->hva, del->id));
	}
	if (add) {
		kl_btree_insert(&s->by_gfn, add->base_gfn, add->base_gfn + add->npages,
				(void *)add);
		kl_btree_insert(&s->by_hva, hva_key(add->hva, add->id), hva_end(add), (void *)add);
		if (add->gmem)
			kl_btree_insert(&s->by_gmem, hva_key(add->gmem->hva, add->id),
					add->gmem->hva + size_of(add), (void *)add);
	}
}

/* ---- installing ------------------------------------------------------------------ */

static struct kl_memslots *hidden_set(struct kl_vm *vm, unsigned as)
{
	return kl_memslots(vm, as) == &vm->memslot_sets[as][0] ? &vm->memslot_sets[as][1]
							       : &vm->memslot_sets[as][0];
}

/*
 * A slot keeps its host memory and its guest_memfd for life, so @del and @add cover the same.
 * Context: slots_lock, no bracket of this thread.
 */
static void publish(struct kl_vm *vm, unsigned as, const struct kl_memslot *del,
		    const struct kl_memslot *add)
{
	uint64_t gen = atomic_load_explicit(&vm->generation[as], memory_order_relaxed);
	const struct kl_memslot *either = del ? del : add;
	struct kl_memslots *set = hidden_set(vm, as);
	struct kl_notifier_update u = {.start = either->hva, .end = hva_end(either)};

	if (either->gmem) {
		u.start2 = either->gmem->hva;
		u.end2 = u.start2 + size_of(either);
	}
	kl_assert_held(&vm->slots_lock);
	set_edit(set, del, add);
	racepoint("memslots-publish");
	kl_notifier_update_begin(&u);
	atomic_store(&vm->generation[as], gen + 1);
	atomic_store(&vm->memslots[as], set);
	kl_notifier_update_end(&u);
	racepoint("memslots-published");
	kl_srcu_synchronize(&vm->srcu);
	/* While no tag is current, and before a dirty log goes: who still holds a pointer? */
	if (del && !del->invalid)
		kl_gpc_zap_slot(vm, del);
	/* At the wrap, while no tag can match: entries of the last cycle would (S6, B17). */
	if (KL_MMIO_GEN(gen + 2) == 0)
		kl_mmu_zap_mmio(vm);
	atomic_store(&vm->generation[as], gen + 2);
	set_edit(hidden_set(vm, as), del, add);
}

/* One cache line: with many slots a lookup's last miss is on the slot itself. */
static struct kl_memslot *new_slot(void)
{
	return kl_failpoint("memslot-alloc")
		       ? NULL
		       : aligned_alloc(_Alignof(struct kl_memslot), sizeof(struct kl_memslot));
}

enum change { CREATE, DELETE, MOVE, FLAGS_ONLY };

/*
 * @old, @slot: before and after; either may be NULL. Takes ownership of @slot when it
 * succeeds.
 */
static int install(struct kl_vm *vm, unsigned as, enum change change, const struct kl_memslot *old,
		   const struct kl_memslot *slot)
{
	struct kl_track_counts *counts = NULL;
	struct kl_memslot *invalid = NULL;

	/* Prepare: what can fail. */
	if (change == DELETE || change == MOVE) {
		invalid = new_slot();
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
		counts = kl_track_detach(vm, old);
		publish(vm, as, invalid, slot);
	} else {
		publish(vm, as, old, slot);
	}
	/* Logging has begun: who may write to its pages without having marked them? (D4) */
	if (slot && slot->log && !(old && old->log)) {
		(void)kl_vcpus_flush(vm, true);
		kl_mmu_log_begun(vm, slot);
	}
	if (slot && !slot->log && old && old->log)
		kl_mmu_log_ended(vm, slot);
	vm->slot_by_id[as][old ? old->id : slot->id] = slot;
	if (invalid)
		kl_track_slot_gone(vm, old, counts);
	free(invalid);
	if (change == DELETE && old->gmem)
		kl_gmem_unbind(old->gmem);
	if (old && old->log && !(slot && slot->log))
		kl_dirty_log_free(vm, old->log);
	if (slot && slot->heat)
		kl_heat_slot_set(vm, slot);
	else if (old && old->heat)
		kl_heat_slot_gone(vm, old);
	free((void *)old);
	kl_stat_add(&vm->stats.memslot_changes, 1);
	return 0;
}

/* Does [base, base + npages) meet a slot other than @self? */
static bool overlaps(const struct kl_memslots *s, kl_gfn_t base, uint64_t npages,
		     const struct kl_memslot *self)
{
	const struct kl_memslot *e;
	uint64_t key;

	e = kl_btree_overlap(&s->by_gfn, 0, base + npages, base, &key);
	if (e && e == self)
		e = kl_btree_overlap(&s->by_gfn, key + 1, base + npages, base, &key);
	return e;
}

static int set_region_locked(struct kl_vm *vm, unsigned as, unsigned id,
			     const struct kl_uapi_memory_region2 *r, struct kl_gmem *file,
			     int file_error)
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
		/* What is bound to a guest_memfd can only be deleted. */
		if ((r->flags & KVM_MEM_GUEST_MEMFD) || r->userspace_addr != old->hva ||
		    npages != old->npages ||
		    ((r->flags ^ old->flags) & (KVM_MEM_READONLY | KVM_MEM_GUEST_MEMFD)))
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
	if (change == MOVE && kl_track_forbids_move(vm))
		return -EINVAL;
	if ((r->flags & KVM_MEM_GUEST_MEMFD) && !file)
		return file_error;
	slot = new_slot();
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
	if (r->flags & KVM_MEM_GUEST_MEMFD) {
		ret = kl_gmem_bind(vm, file, r->guest_memfd_offset, base, npages, &slot->gmem);
		if (ret)
			goto fail;
	}
	ret = -EINVAL;
	if (change != FLAGS_ONLY && base + npages - 1 > KL_MAX_GFN)
		goto fail;
	if (change == CREATE && now->by_gfn.n >= KL_USER_MEM_SLOTS)
		goto fail;
	slot->heat = old ? old->heat : kl_heat_log_new(vm, as, id, npages);
	if (r->flags & KVM_MEM_LOG_DIRTY_PAGES) {
		slot->log = old && old->log ? old->log
					    : kl_dirty_log_new(vm, as, id, npages, slot->heat);
		ret = -ENOMEM;
		if (!slot->log)
			goto fail;
	}
	ret = install(vm, as, change, old, slot);
	if (ret)
		goto fail;
	return 0;
fail:
	if (slot->log && !(old && old->log))
		kl_dirty_log_free(vm, slot->log);
	if (slot->heat && !old)
		kl_dirty_log_free(vm, slot->heat);
	if (slot->gmem)
		kl_gmem_unbind(slot->gmem);
	free(slot);
	return ret;
}

/*
 * As KVM: no dirty log of private memory; and no read-only slots, since a write to one is MMIO,
 * which there is none of on private memory.
 */
static uint32_t valid_flags(const struct kl_vm *vm, uint32_t flags)
{
	uint32_t valid = KVM_MEM_READONLY | KVM_MEM_LOG_DIRTY_PAGES;

	return vm->gmem_slots && (flags & KVM_MEM_GUEST_MEMFD) ? KVM_MEM_GUEST_MEMFD : valid;
}

int kl_set_memory_region(struct kl_vm *vm, const struct kl_uapi_memory_region2 *r)
{
	return kl_set_memory_region_gmem(vm, r, NULL, -EBADF);
}

int kl_set_memory_region_gmem(struct kl_vm *vm, const struct kl_uapi_memory_region2 *r,
			      struct kl_gmem *file, int error)
{
	unsigned as = r->slot >> 16, id = r->slot & 0xffff;
	const struct kl_memslot *old;
	uint64_t hva, size;
	int ret;

	/* The order of checks decides which errno a program sees that is wrong twice. */
	if (id >= KL_USER_MEM_SLOTS)
		return -EINVAL;
	if (r->flags & ~valid_flags(vm, r->flags))
		return -EINVAL;
	if ((r->memory_size | r->guest_phys_addr | r->userspace_addr) & ~KL_PAGE_MASK)
		return -EINVAL;
	if (r->userspace_addr > USER_ADDRESS_END ||
	    r->memory_size > USER_ADDRESS_END - r->userspace_addr)
		return -EINVAL;
	if ((r->flags & KVM_MEM_GUEST_MEMFD) &&
	    ((r->guest_memfd_offset & ~KL_PAGE_MASK) ||
	     r->guest_memfd_offset + r->memory_size < r->guest_memfd_offset))
		return -EINVAL;
	if (as >= kl_nr_as(vm))
		return -EINVAL;
	if (r->guest_phys_addr + r->memory_size < r->guest_phys_addr)
		return -EINVAL;
	if (r->memory_size >> KL_PAGE_SHIFT > KL_MEM_MAX_PAGES)
		return -EINVAL;

	/* Inside one's own bracket, or told of a write, an update could only wait for itself. */
	if (kl_self.brackets || kl_self.reports)
		return -EDEADLK;
	/* Before a vCPU can use the memory, so that no event is missed. */
	if (kl_uffd_source_on() && r->memory_size)
		kl_uffd_source_watch(r->userspace_addr, r->userspace_addr + r->memory_size);
	racepoint("memslot-watched");
	kl_mutex_lock(&vm->slots_lock);
	old = vm->slot_by_id[as][id];
	hva = old ? old->hva : 0;
	size = old ? old->npages << KL_PAGE_SHIFT : 0;
	ret = set_region_locked(vm, as, id, r, file, error);
	kl_mutex_unlock(&vm->slots_lock);
	racepoint("memslot-set");
	if (kl_uffd_source_on()) {
		/* Once more: another slot over the same memory may have gone before ours was in. */
		if (r->memory_size && !ret)
			kl_uffd_source_watch(r->userspace_addr, r->userspace_addr + r->memory_size);
		else if (r->memory_size)
			kl_uffd_source_unwatch(r->userspace_addr,
					       r->userspace_addr + r->memory_size);
		else if (!ret)
			kl_uffd_source_unwatch(hva, hva + size);
	}
	KL_TRACE("vm%llu memslot %u gpa=%#llx size=%#llx hva=%#llx flags=%#x -> %d",
		 (unsigned long long)vm->serial, r->slot, (unsigned long long)r->guest_phys_addr,
		 (unsigned long long)r->memory_size, (unsigned long long)r->userspace_addr,
		 r->flags, ret);
	return ret;
}

/* The index by id and two sets of three trees, in one mapping. */
#define BY_ID_BYTES (KL_BTREE_MAX * sizeof(void *))

static size_t store_size(void)
{
	return BY_ID_BYTES + 6 * kl_btree_arena_size();
}

_Static_assert(KL_USER_MEM_SLOTS <= KL_BTREE_MAX, "a set of slots fits into a tree");

int kl_memslots_init(struct kl_vm *vm)
{
	for (unsigned as = 0; as < KL_NR_AS; as++) {
		char *p = kl_failpoint("memslots-init") ? NULL : kl_sys_map(store_size());

		if (!p)
			return -ENOMEM;
		vm->slot_by_id[as] = (void *)p;
		p += BY_ID_BYTES;
		for (unsigned i = 0; i < 2; i++) {
			struct kl_memslots *s = &vm->memslot_sets[as][i];

			kl_btree_init(&s->by_gfn, p + 3 * i * kl_btree_arena_size());
			kl_btree_init(&s->by_hva, p + (3 * i + 1) * kl_btree_arena_size());
			kl_btree_init(&s->by_gmem, p + (3 * i + 2) * kl_btree_arena_size());
		}
		atomic_init(&vm->memslots[as], &vm->memslot_sets[as][0]);
		atomic_init(&vm->generation[as], KL_FIRST_GENERATION(as));
	}
	return 0;
}

static void free_slot(const struct kl_memslot *slot)
{
	if (slot->log)
		kl_sys_unmap(slot->log, slot->log->size);
	if (slot->heat)
		kl_sys_unmap(slot->heat, slot->heat->size);
	if (slot->gmem)
		kl_gmem_unbind(slot->gmem);
	free((void *)slot);
}

bool kl_memslots_any(struct kl_vm *vm)
{
	kl_assert_held(&vm->slots_lock);
	for (unsigned as = 0; as < KL_NR_AS; as++)
		if (kl_memslots(vm, as)->by_gfn.n)
			return true;
	return false;
}

void kl_memslots_destroy(struct kl_vm *vm)
{
	for (unsigned as = 0; as < KL_NR_AS; as++) {
		if (!vm->slot_by_id[as])
			continue;
		while (vm->memslot_sets[as][0].by_gfn.n)
			free_slot(kl_btree_remove(&vm->memslot_sets[as][0].by_gfn,
						  vm->memslot_sets[as][0].by_gfn.root->key[0]));
		kl_sys_unmap(vm->slot_by_id[as], store_size());
	}
	kl_dirty_logs_destroy(vm);
}
