/* SPDX-License-Identifier: MIT */
/*
 * Layout of a stage-2 entry. Nothing else knows it.
 *
 *   not present  0
 *   table        host address of the next table | PRESENT | TABLE
 *   leaf         host address of the first page | PRESENT | level | ACCESSED? | WRITABLE?
 *                | TRACKED? | GMEM?
 *   MMIO         generation << 12 | MMIO                       ("no slot here", S6)
 *   none of the flags: a table that is being unlinked; not present to whoever walks
 *
 * A leaf of level 1, 2 or 3 maps 4 KiB, 2 MiB or 1 GiB (M1). MMIO entries are of level 1.
 */
#pragma once

#include "base/compiler.h"
#include "mem/memslot.h"

typedef _Atomic uint64_t kl_spte_t;

#define KL_SPTE_PRESENT     (1ull << 0)
#define KL_SPTE_WRITABLE    (1ull << 1)
#define KL_SPTE_TABLE       (1ull << 2)
#define KL_SPTE_MMIO        (1ull << 3)
#define KL_SPTE_ACCESSED    (1ull << 4) /* looked up since it was made or last aged (N6, M7) */
#define KL_SPTE_TRACKED     (1ull << 5) /* level 1: who writes all the same reports it (T3) */
#define KL_SPTE_GMEM        (1ull << 6) /* of a leaf: the address is in a guest_memfd's mapping (F3) */
#define KL_SPTE_LEVEL_SHIFT 8           /* of a leaf; two bits */
#define KL_SPTE_ADDR        0x0000fffffffff000ull
#define KL_SPTE_GEN_SHIFT   12

_Static_assert(KL_SPTE_GEN_SHIFT + KL_MMIO_GEN_BITS <= 64, "the MMIO generation fits");

#define KL_PT_LEVELS     5 /* 52 bits of guest-physical address */
#define KL_PT_LEAF_LEVEL 3 /* the highest at which there are leaves */
#define KL_PT_BITS       9
#define KL_PT_ENTRIES    (1u << KL_PT_BITS)

struct kl_pt {
	kl_spte_t e[KL_PT_ENTRIES];
};
_Static_assert(sizeof(struct kl_pt) == KL_PAGE_SIZE, "one page");

KL_INLINE unsigned kl_pt_index(kl_gfn_t gfn, unsigned level)
{
	return (gfn >> (KL_PT_BITS * (level - 1))) & (KL_PT_ENTRIES - 1);
}

/* Guest pages that an entry of @level stands for. */
KL_INLINE uint64_t kl_pt_span(unsigned level)
{
	return 1ull << (KL_PT_BITS * (level - 1));
}

KL_INLINE bool kl_spte_is_leaf(uint64_t spte)
{
	return (spte & (KL_SPTE_PRESENT | KL_SPTE_TABLE)) == KL_SPTE_PRESENT;
}

KL_INLINE struct kl_pt *kl_spte_table(uint64_t spte)
{
	return (struct kl_pt *)(spte & KL_SPTE_ADDR);
}

KL_INLINE unsigned kl_spte_level(uint64_t leaf)
{
	return leaf >> KL_SPTE_LEVEL_SHIFT & 3;
}

/* A leaf of @level that maps @gfn, of which @hva is the host page. */
KL_INLINE uint64_t kl_spte_leaf(kl_hva_t hva, kl_gfn_t gfn, unsigned level, bool writable)
{
	return (hva.addr - ((gfn & (kl_pt_span(level) - 1)) << KL_PAGE_SHIFT)) | KL_SPTE_PRESENT |
	       (uint64_t)level << KL_SPTE_LEVEL_SHIFT | (writable ? KL_SPTE_WRITABLE : 0);
}

/* The host page of @gfn that @leaf maps. */
KL_INLINE uint64_t kl_spte_page(uint64_t leaf, kl_gfn_t gfn)
{
	return (leaf & KL_SPTE_ADDR) +
	       ((gfn & (kl_pt_span(kl_spte_level(leaf)) - 1)) << KL_PAGE_SHIFT);
}

KL_INLINE uint64_t kl_spte_mmio(uint64_t generation)
{
	return KL_MMIO_GEN(generation) << KL_SPTE_GEN_SHIFT | KL_SPTE_MMIO;
}

/* An MMIO entry made at an odd generation never exists; one of another generation is stale. */
KL_INLINE bool kl_spte_mmio_current(uint64_t spte, uint64_t generation)
{
	return !(generation & 1) && spte == kl_spte_mmio(generation);
}
