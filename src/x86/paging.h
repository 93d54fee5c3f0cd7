/* SPDX-License-Identifier: MIT */
/*
 * Guest page-table walks (M9), between paging.c and access.c.
 */
#pragma once

#include "x86/vcpu.h"

#define KL_PF_PRESENT 1u
#define KL_PF_WRITE   2u
#define KL_PF_USER    4u
#define KL_PF_RSVD    8u
#define KL_PF_FETCH   16u

enum kl_walk_status {
	KL_WALK_OK,
	KL_WALK_FAULT, /* #PF with w->error */
	KL_WALK_GP,    /* not canonical */
	KL_WALK_MISS,  /* stage 2: resolve w->miss_gpa for w->miss_access, then walk again */
	KL_WALK_MMIO,  /* a page table lies where there is no slot */
};

struct kl_walk {
	uint64_t gpa;
	uint32_t error;
	bool user, writable, nx; /* what all levels together allow */
	bool dirty;              /* the leaf's D bit is set (or there is none) */
	bool skip_ad;            /* in: the tables are read-only, leave A and D alone */
	bool global;             /* of all address spaces */
	bool fresh;              /* in: from the root on, whatever is remembered */
	unsigned page_shift;
	struct kl_pte_ref leaf; /* if not global */
	uint64_t miss_gpa;
	unsigned miss_access;
};

/* True if @lin is canonical in the current paging mode (always outside long mode). */
bool kl_canonical(struct kl_vcpu *v, uint64_t lin);

/*
 * Translate @lin for @access (one of KL_ACC_*) in @mode. Sets A and D bits if @set_ad.
 * Context: IN_GUEST; a guard is set, because page tables may vanish. Does not leave.
 * If bits were set in a tracked table (v->nr_notes), the result is void: report, and walk again.
 */
enum kl_walk_status kl_walk(struct kl_vcpu *v, uint64_t lin, unsigned access, enum kl_tlb_mode mode,
			    bool set_ad, struct kl_walk *w);

/* What @mode may do with a page of these rights. */
unsigned kl_walk_allowed(struct kl_vcpu *v, const struct kl_walk *w, enum kl_tlb_mode mode);

/* Bits of a guest-physical address that the program's CPUID leaves out. */
KL_INLINE uint64_t kl_reserved_gpa_bits(struct kl_vcpu *v)
{
	return v->maxphyaddr >= 52 ? 0 : ~((1ull << v->maxphyaddr) - 1) & ((1ull << 52) - 1);
}

/* PAE: is this PDPTE well-formed? */
bool kl_pdptes_valid(struct kl_vcpu *v, const uint64_t pdpte[4]);
