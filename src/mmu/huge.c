/* SPDX-License-Identifier: MIT */
/*
 * Asking the host takes system calls, so it is only done for the first fault in the range of an
 * entry; a range whose pages come one by one has a table from its first fault on, and never
 * asks again.
 *
 * The answer is a policy, not a promise: a leaf maps guest pages to the same host addresses
 * whatever mapping is there, and an event on any page of it takes all of it away.
 *
 * Locks: mmu->mapping_lock (rank LEAF) for the mapping that was asked for last. Changes of it are
 * announced while it overlaps a slot, so it is good for as long as neither an event that
 * overlapped a slot nor a change of the slots came.
 */
#include "host/mapping.h"
#include "mmu/huge.h"

unsigned kl_huge_slot_level(const struct kl_memslot *slot, kl_hva_t hva, kl_gfn_t gfn)
{
	uint64_t skew = (hva.addr >> KL_PAGE_SHIFT) ^ gfn;

	for (unsigned level = KL_PT_LEAF_LEVEL; level > 1; level--) {
		uint64_t span = kl_pt_span(level);
		kl_gfn_t base = gfn & ~(span - 1);

		if (!(skew & (span - 1)) && base >= slot->base_gfn &&
		    base + span <= slot->base_gfn + slot->npages)
			return level;
	}
	return 1;
}

static bool cached(const struct kl_mapping_cache *c, struct kl_vm *vm, uint64_t seq, uint64_t hva)
{
	bool same = c->seq == seq && hva >= c->start && hva < c->end;

	for (unsigned as = 0; as < KL_NR_AS; as++)
		same = same && c->generation[as] == kl_generation(vm, as);
	return same;
}

/* The mapping that holds @hva; empty if nobody can say. */
static struct kl_mapping_cache mapping_at(struct kl_vm *vm, uint64_t hva, uint64_t seq)
{
	struct kl_mmu *mmu = vm->mmu;
	struct kl_mapping_cache c;
	struct kl_mapping m;

	kl_mutex_lock(&mmu->mapping_lock);
	c = mmu->mapping;
	kl_mutex_unlock(&mmu->mapping_lock);
	if (cached(&c, vm, seq, hva))
		return c;
	c.seq = seq;
	for (unsigned as = 0; as < KL_NR_AS; as++)
		c.generation[as] = kl_generation(vm, as);
	if (!kl_host_mapping(hva, &m))
		m = (struct kl_mapping){0};
	c.start = m.start;
	c.end = m.end;
	c.page_size = m.page_size;
	/* Asked for while something changed: good for this fault, which will retry, if that. */
	kl_mutex_lock(&mmu->mapping_lock);
	mmu->mapping = c;
	kl_mutex_unlock(&mmu->mapping_lock);
	return c;
}

unsigned kl_huge_host_level(struct kl_vm *vm, kl_gfn_t gfn, kl_hva_t hva, unsigned goal,
			    uint64_t seq)
{
	struct kl_mapping_cache m = mapping_at(vm, hva.addr, seq);
	unsigned level = 1;

	while (level < goal) {
		uint64_t span = kl_pt_span(level + 1) << KL_PAGE_SHIFT;
		uint64_t start = hva.addr & ~(span - 1);

		if (start < m.start || start + span > m.end)
			break;
		if (m.page_size < span && !kl_host_resident(start, start + span))
			break;
		level++;
	}
	return level;
}
