/* SPDX-License-Identifier: MIT */
/*
 * How large a leaf may be (M1).
 */
#pragma once

#include "mmu/stage2.h"

/*
 * The highest level whose leaf around @gfn, the page of which is at @hva, lies in @slot, with
 * addresses that are congruent.
 */
unsigned kl_huge_slot_level(const struct kl_memslot *slot, kl_hva_t hva, kl_gfn_t gfn);

/*
 * The highest level, @goal at most, whose leaf around @gfn (host page @hva, which is present) lies
 * in one mapping of the host and is resident as a whole. @seq: mmu_invalidate_seq from before
 * the slot was looked up.
 * Context: as host/mapping.h.
 */
unsigned kl_huge_host_level(struct kl_vm *vm, kl_gfn_t gfn, kl_hva_t hva, unsigned goal,
			    uint64_t seq);
