/* SPDX-License-Identifier: MIT */
/*
 * The vCPU TLB (M6, M9): gva page -> host page, and what of it outlives the loads of CR3 (T8).
 *
 * First level. One direct-mapped array per access mode, because what a page allows depends on it. A
 * tag is the page's linear address if the access is allowed, else kl_tlb_none(), the address of a
 * page that other entries are for: whoever looks at this one looks for another page, and may
 * compare by subtraction. Writable tags are set only when the guest's D bit is set and the page is
 * not logged or tracked. An entry is 4 KiB, whatever the guest's page is. It is global (from a page
 * with G set under CR4.PGE, or made without paging) or local, of the address space in use.
 *
 * Behind it there is no array of translations: a miss walks the guest's tables. Walks begin at the
 * table that the last one in the same region has come to (kl_walk_cache), so that most read one
 * entry of the guest's; these entries are the second level, and can't be stale.
 *
 * Address spaces. The local entries of an address space that CR3 leaves are put away together with
 * references to the entries of page tables that they came from: the address in the host, and the
 * value. When CR3 comes back, each is read again, and what is equal is used again. So
 *   - between two events that drop translations, an entry says what a walk at some time in between
 *     has said;
 *   - no entry outlives an event that drops it, unless all entries of page tables that it came from
 *     have been read after that event, and were what they had been. It does not matter who writes
 *     page tables: this vCPU, another, a device, or the program through pointers of its own;
 *   - what was put away for an address space is only what a walk from its root gave, since the last
 *     flush of everything.
 *
 * What drops translations, and what becomes of them:
 *   - all (kl_tlb_flush): changes of the paging mode, of CR4.PGE, of what the program sets; INVPCID
 *     of everything; requests of stage 2: pointers into memory, and into page tables, are void.
 *   - local ones (kl_tlb_load_space): CR3 writes, with and without "keep", INVPCID of a context.
 *     They are read again.
 *   - those of a page (kl_tlb_flush_page): INVLPG. They go; if the page may be large, all go.
 * Each of these forgets kl_walk_cache. PCIDs therefore need nothing of their own: address spaces
 * are told apart by their root, and one that comes back was read again, which is more than an
 * INVPCID in its absence asks for.
 *
 * Code. Blocks (block.h) keep pointers that came from fetches; they hold while gen[mode] is what it
 * was then. It changes when the translation of a page is dropped from which code was fetched; and
 * an address space gets its old one back if the entries of all pages of code that it fetched from
 * are equal, and nothing else has changed it meanwhile (code_serial).
 *
 * All of it belongs to the vCPU's own thread.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include <kvmlet/types.h>

#include "base/compiler.h"

struct kl_vcpu;
struct kl_walk;

#define KL_TLB_BITS       10
#define KL_TLB_SIZE       (1u << KL_TLB_BITS)
#define KL_NR_TABLE_PAGES 64
#define KL_MMIO_NONE      0xfffull

struct kl_tlb_entry {
	uint64_t rtag, wtag, xtag;
	uint8_t *page; /* where the host has it */
};

enum kl_tlb_mode {
	KL_TLB_SUPER,      /* CPL 0-2, AC set or no SMAP */
	KL_TLB_SUPER_SMAP, /* CPL 0-2 with SMAP and AC clear */
	KL_TLB_USER,       /* CPL 3 */
	KL_TLB_ALIGNED,    /* CPL 3 with alignment checks: no data tags, all of it is slow */
	KL_NR_TLB_MODES
};

/* A bit per slot of the first level, or per hash of a page address. */
typedef uint64_t kl_tlb_bits[KL_TLB_SIZE / 64];

/* An entry of a page table (or a PDPTE register) as a walk has read it. */
struct kl_pte_ref {
	const uint8_t *ptr;
	uint64_t val;
};

#define KL_SPACES      16
#define KL_SPACE_SAVED 128
#define KL_SPACE_UPPER 32
#define KL_SPACE_CODE  64

/* An address space: what is known of it, and while CR3 points elsewhere its entries. */
struct kl_space {
	uint64_t key;  /* CR3 without its low bits, and 1; or 0: none */
	uint64_t used; /* when */
	/* Entries above the last level. If there are others, or one has changed under a
	 * translation: torn, nothing is kept. */
	unsigned nr_upper;
	bool torn;
	struct kl_pte_ref upper[KL_SPACE_UPPER];
	/* Last entries of pages from which code was fetched; the same of those. */
	unsigned nr_code;
	bool code_torn;
	struct kl_space_code {
		uint64_t page;
		struct kl_pte_ref from;
	} code[KL_SPACE_CODE];
	uint64_t code_serial;
	uint64_t gen[KL_NR_TLB_MODES]; /* or 0: nothing was fetched in that mode */
	unsigned nr_saved;
	struct kl_space_entry {
		uint64_t tag; /* of all accesses that are in allowed */
		uint8_t *page;
		kl_gfn_t gfn;
		struct kl_pte_ref from;
		uint16_t slot; /* mode << KL_TLB_BITS | index */
		uint8_t allowed;
	} saved[KL_SPACE_SAVED];
};

/* Where a walk may begin. */
struct kl_walk_cache {
	uint64_t region; /* linear address >> what the table translates */
	uint64_t epoch;
	uint8_t *table; /* host page */
	uint64_t gpa;
	bool user, writable, nx; /* what the levels above allow */
	bool noted;              /* they are in the address space's upper[] */
};
#define KL_WALK_CACHE_LAST 64 /* tables of the last level */
#define KL_WALK_CACHE_NEXT 16 /* of the level above: large pages */

/* What belongs to the first level; the entries are in struct kl_vcpu. */
struct kl_tlb_state {
	bool made[KL_NR_TLB_MODES]; /* the array is there */
	kl_tlb_bits filled[KL_NR_TLB_MODES], local[KL_NR_TLB_MODES];
	struct kl_pte_ref from[KL_NR_TLB_MODES][KL_TLB_SIZE]; /* of local entries */
	/* Of pages from which code was fetched, by kl_tlb_index(). */
	kl_tlb_bits fetched_local, fetched_global;
	bool local_code[KL_NR_TLB_MODES]; /* some were local, since gen[mode] */
	uint64_t gen[KL_NR_TLB_MODES];
	uint64_t last_gen;
	uint64_t code_serial; /* moves with gen, unless that is because of another address space */
	/* By a hash of the 4 MiB that they lie in: large pages since the last flush of all. */
	uint64_t large[64];
	bool huge; /* there were larger ones, or there was no paging */
	uint64_t walk_epoch;
	struct kl_walk_cache last[KL_WALK_CACHE_LAST], next[KL_WALK_CACHE_NEXT];
	bool spaces_used;       /* CR3 was loaded, so there will be more of them */
	struct kl_space *space; /* in use; NULL: none */
	uint64_t clock;
};

/* Blocks of @mode are to be looked up anew; kl_code_unmapped() for all modes. */
KL_INLINE void kl_tlb_new_gen(struct kl_tlb_state *t, unsigned mode)
{
	t->gen[mode] = ++t->last_gen << 2 | mode;
}

/* The translation of @lin for @access, in @mode: @page in the host. Context: IN_GUEST. */
void kl_tlb_fill(struct kl_vcpu *v, uint64_t lin, enum kl_tlb_mode mode, const struct kl_walk *w,
		 const uint8_t *page, unsigned access, bool writable);

/* The whole TLB / one page. */
void kl_tlb_flush(struct kl_vcpu *v);
void kl_tlb_flush_page(struct kl_vcpu *v, uint64_t lin);
/*
 * CR3 was loaded (PDPTEs, too), or local translations are to be dropped. Context: IN_GUEST, guard
 * set: it reads page tables. It may be left at any of these reads, and be called again.
 */
void kl_tlb_load_space(struct kl_vcpu *v);

/* For walks: entries above the last level on the way to a local page, as they were read. */
void kl_tlb_note_upper(struct kl_vcpu *v, const uint8_t *ptr, uint64_t val);

/* Before the first access in @mode: arrays of modes that are never used cost no memory. */
void kl_tlb_make(struct kl_vcpu *v, enum kl_tlb_mode mode);
