/* SPDX-License-Identifier: MIT */
/*
 * Guest page walks (M9): no paging, 32-bit with PSE and PSE-36, PAE, 4 and 5 levels.
 *
 * Page-table entries are read through stage 2 as any access of the vCPU, and A and D bits
 * are set in them with compare-and-swap, after all rights were checked. What a walk has found above
 * the table that it ended in is remembered (kl_walk_cache, tlb.h), as processors do, until a CR3
 * write, an INVLPG or the like; the last entry is read each time.
 */
#include "host/atomic.h"
#include "x86/paging.h"

#include "x86/report.h"

#define PTE_P    (1ull << 0)
#define PTE_W    (1ull << 1)
#define PTE_U    (1ull << 2)
#define PTE_A    (1ull << 5)
#define PTE_D    (1ull << 6)
#define PTE_PS   (1ull << 7)
#define PTE_G    (1ull << 8)
#define PTE_NX   (1ull << 63)
#define PTE_ADDR 0x000ffffffffff000ull

/* A level of the table that the walk passed. */
struct step {
	uint8_t *ptr;
	uint64_t gpa;
	uint64_t pte;
};

/* What the levels of a walk together allow. */
struct rights {
	bool user, writable, nx;
};

/* How the current mode's tables look. */
struct format {
	unsigned levels, index_bits, entry_size;
	uint64_t root;
	bool pae;  /* bits 62:52 are reserved */
	bool wide; /* 64-bit long mode tables */
};

bool kl_canonical(struct kl_vcpu *v, uint64_t lin)
{
	unsigned bits = v->cr4 & KL_CR4_LA57 ? 57 : 48;

	if (!(v->efer & KL_EFER_LMA))
		return true;
	return (uint64_t)((int64_t)(lin << (64 - bits)) >> (64 - bits)) == lin;
}

unsigned kl_walk_allowed(struct kl_vcpu *v, const struct kl_walk *w, enum kl_tlb_mode mode)
{
	unsigned ok = 0;

	if (mode >= KL_TLB_USER) {
		if (!w->user)
			return 0;
		ok = KL_ACC_READ;
		if (w->writable)
			ok |= KL_ACC_WRITE;
		if (!w->nx)
			ok |= KL_ACC_EXEC;
		return ok;
	}
	if (!(w->user && mode == KL_TLB_SUPER_SMAP)) {
		ok = KL_ACC_READ;
		if (w->writable || !(v->cr0 & KL_CR0_WP))
			ok |= KL_ACC_WRITE;
	}
	if (!w->nx && !(w->user && (v->cr4 & KL_CR4_SMEP)))
		ok |= KL_ACC_EXEC;
	return ok;
}

static void get_format(struct kl_vcpu *v, struct format *f)
{
	*f = (struct format){.entry_size = 8, .index_bits = 9};
	if (v->efer & KL_EFER_LMA) {
		f->levels = v->cr4 & KL_CR4_LA57 ? 5 : 4;
		f->root = v->cr3 & PTE_ADDR;
		f->wide = true;
	} else if (v->cr4 & KL_CR4_PAE) {
		f->levels = 2; /* below the PDPTEs */
		f->pae = true;
	} else {
		f->levels = 2;
		f->root = v->cr3 & 0xfffff000;
		f->entry_size = 4;
		f->index_bits = 10;
	}
}

/* Reserved bits of an entry at @level (1 is the last), a large page or not. */
static uint64_t reserved_bits(struct kl_vcpu *v, const struct format *f, unsigned level, bool large)
{
	uint64_t r;

	if (f->entry_size == 4) {
		/* PSE-36: bits 20:13 are address bits 39:32, as far as they exist. */
		unsigned wide = v->maxphyaddr > 32 ? v->maxphyaddr - 32 : 0;

		if (!large)
			return 0;
		r = (1ull << 22) - (1ull << 13);
		return r & ~(((1ull << (wide > 8 ? 8 : wide)) - 1) << 13);
	}
	r = kl_reserved_gpa_bits(v);
	if (!(v->efer & KL_EFER_NX))
		r |= PTE_NX;
	if (f->pae)
		r |= 0x7ff0000000000000ull;
	if (large && level == 2)
		r |= 0x1fe000;
	else if (large && level == 3)
		r |= 0x3fffe000;
	if (level >= 4) /* the G of no page: AMD insists */
		r |= v->intel_compatible ? PTE_PS : PTE_PS | PTE_G;
	return r;
}

static bool is_large(struct kl_vcpu *v, const struct format *f, unsigned level, uint64_t pte)
{
	if (!(pte & PTE_PS))
		return false;
	if (level == 2)
		return f->entry_size == 8 || (v->cr4 & KL_CR4_PSE);
	return level == 3;
}

static enum kl_walk_status fault(struct kl_vcpu *v, struct kl_walk *w, unsigned access,
				 enum kl_tlb_mode mode, uint32_t error)
{
	if (access == KL_ACC_WRITE)
		error |= KL_PF_WRITE;
	if (mode >= KL_TLB_USER)
		error |= KL_PF_USER;
	if (access == KL_ACC_EXEC &&
	    (((v->efer & KL_EFER_NX) && (v->cr4 & KL_CR4_PAE)) || (v->cr4 & KL_CR4_SMEP)))
		error |= KL_PF_FETCH;
	w->error = error;
	return KL_WALK_FAULT;
}

/* *@tracked: who writes reports it. */
static enum kl_walk_status table_page(struct kl_vcpu *v, uint64_t gpa, unsigned access,
				      struct kl_walk *w, uint8_t **ptr, bool *tracked)
{
	bool writable = true, mmio = false;
	uint8_t *page = kl_mmu_lookup(&v->core, gpa & KL_PAGE_MASK, access, &writable, &mmio);

	if (KL_UNLIKELY(!page)) {
		if (mmio)
			return KL_WALK_MMIO;
		w->miss_gpa = gpa;
		w->miss_access = access;
		return KL_WALK_MISS;
	}
	*ptr = page + (gpa & ~KL_PAGE_MASK);
	*tracked = !writable;
	return KL_WALK_OK;
}

/*
 * The same for reading, by the page that was found there last. The entries themselves are read at
 * each walk: so it does not matter who has changed them, the guest, a device or the program, when
 * the guest has dropped a translation.
 */
KL_INLINE enum kl_walk_status read_table(struct kl_vcpu *v, uint64_t gpa, struct kl_walk *w,
					 uint8_t **ptr)
{
	kl_gfn_t gfn = gpa >> KL_PAGE_SHIFT;
	struct kl_table_page *t = &v->table_page[gfn % KL_NR_TABLE_PAGES];
	enum kl_walk_status st;
	bool tracked; /* nothing is written here */

	if (KL_UNLIKELY(t->next_gfn != gfn + 1)) {
		t->next_gfn = 0;
		st = table_page(v, gpa & KL_PAGE_MASK, KL_ACC_READ, w, &t->page, &tracked);
		if (st != KL_WALK_OK)
			return st;
		t->next_gfn = gfn + 1;
	}
	*ptr = t->page + (gpa & ~KL_PAGE_MASK);
	return KL_WALK_OK;
}

/* Set A on every level and D on the leaf of a write. */
static enum kl_walk_status set_bits(struct kl_vcpu *v, struct step *s, unsigned n, bool write,
				    unsigned entry_size, struct kl_walk *w, bool *again)
{
	for (unsigned i = 0; i < n; i++) {
		uint64_t want = s[i].pte | PTE_A | (write && i == n - 1 ? PTE_D : 0);
		enum kl_walk_status st;
		bool done, tracked;

		if (want == s[i].pte)
			continue;
		if (w->skip_ad)
			continue;
		st = table_page(v, s[i].gpa, KL_ACC_WRITE, w, &s[i].ptr, &tracked);
		if (st != KL_WALK_OK)
			return st;
		if (entry_size == 8)
			done = kl_cmpxchg64(s[i].ptr, s[i].pte, want) == s[i].pte;
		else
			done = kl_cmpxchg32(s[i].ptr, (uint32_t)s[i].pte, (uint32_t)want) ==
			       (uint32_t)s[i].pte;
		if (!done) {
			*again = true;
			return KL_WALK_OK;
		}
		s[i].pte = want;
		if (KL_UNLIKELY(tracked))
			kl_note_value(v, s[i].gpa, want, entry_size);
	}
	return KL_WALK_OK;
}

/* What is remembered of tables at @level, 1 or 2, on the way to @lin. */
static struct kl_walk_cache *remembered(struct kl_vcpu *v, const struct format *f, unsigned level,
					uint64_t lin, uint64_t *region)
{
	*region = lin >> (KL_PAGE_SHIFT + level * f->index_bits);
	return level == 1 ? &v->tlbs.last[*region % KL_WALK_CACHE_LAST]
			  : &v->tlbs.next[*region % KL_WALK_CACHE_NEXT];
}

/*
 * The level at which the walk begins, and *@c for it; *@c NULL: the root. Of few levels there is
 * nothing to save above the last one.
 */
static unsigned first_level(struct kl_vcpu *v, const struct format *f, uint64_t lin,
			    const struct kl_walk_cache **c)
{
	for (unsigned level = 1; level < 3 && level < f->levels; level++) {
		uint64_t region;

		*c = remembered(v, f, level, lin, &region);
		if ((*c)->region == region && (*c)->epoch == v->tlbs.walk_epoch)
			return level;
	}
	*c = NULL;
	return f->levels;
}

/*
 * A walk has ended at @level, in the last of @n @steps. @above: the rights of the levels above it;
 * @noted: those above the first step are noted.
 */
static void remember(struct kl_vcpu *v, const struct format *f, uint64_t lin, unsigned level,
		     const struct step *steps, unsigned n, const struct kl_walk *w,
		     const struct rights *above, bool noted)
{
	const struct step *leaf = &steps[n - 1];
	struct kl_walk_cache *c;
	uint64_t region;

	if (!w->global)
		for (unsigned i = 0; i < n - 1; i++)
			kl_tlb_note_upper(v, steps[i].ptr, steps[i].pte);
	if (level > 2 || level == f->levels)
		return;
	c = remembered(v, f, level, lin, &region);
	*c = (struct kl_walk_cache){
		.region = region,
		.epoch = v->tlbs.walk_epoch,
		.table = (uint8_t *)((uint64_t)leaf->ptr & KL_PAGE_MASK),
		.gpa = leaf->gpa & KL_PAGE_MASK,
		.user = above->user,
		.writable = above->writable,
		.nx = above->nx,
		.noted = noted && !w->global,
	};
}

static enum kl_walk_status walk_once(struct kl_vcpu *v, uint64_t lin, unsigned access,
				     enum kl_tlb_mode mode, bool set_ad, struct kl_walk *w,
				     bool *again)
{
	const struct kl_walk_cache *c = NULL;
	struct step steps[5];
	struct rights above;
	struct format f;
	unsigned level, n = 0;
	uint64_t table, pte;
	bool large = false;

	get_format(v, &f);
	level = w->fresh ? f.levels : first_level(v, &f, lin, &c);
	if (c) {
		w->user = c->user;
		w->writable = c->writable;
		w->nx = c->nx;
		table = c->gpa;
	} else {
		w->user = w->writable = true;
		w->nx = false;
		table = f.root;
	}
	if (f.pae && !c) {
		uint64_t pdpte = v->pdptrs[(lin >> 30) & 3];

		if (!(pdpte & PTE_P))
			return fault(v, w, access, mode, 0);
		table = pdpte & PTE_ADDR;
	}
	for (;; level--) {
		unsigned shift = KL_PAGE_SHIFT + (level - 1) * f.index_bits;
		uint64_t index = (lin >> shift) & ((1u << f.index_bits) - 1);
		struct step *s = &steps[n++];
		enum kl_walk_status st;

		s->gpa = table + index * f.entry_size;
		if (c && n == 1) {
			s->ptr = c->table + index * f.entry_size;
		} else {
			st = read_table(v, s->gpa, w, &s->ptr);
			if (st != KL_WALK_OK)
				return st;
		}
		s->pte = pte = kl_load(s->ptr, f.entry_size);
		if (!(pte & PTE_P))
			return fault(v, w, access, mode, 0);
		large = is_large(v, &f, level, pte);
		if (pte & reserved_bits(v, &f, level, large))
			return fault(v, w, access, mode, KL_PF_PRESENT | KL_PF_RSVD);
		above = (struct rights){w->user, w->writable, w->nx};
		w->user &= !!(pte & PTE_U);
		w->writable &= !!(pte & PTE_W);
		w->nx |= f.entry_size == 8 && (pte & PTE_NX);
		if (level == 1 || large) {
			w->page_shift = shift;
			break;
		}
		table = f.entry_size == 8 ? pte & PTE_ADDR : pte & 0xfffff000;
	}
	w->global = (pte & PTE_G) && (v->cr4 & KL_CR4_PGE);
	/* The levels above were passed on the way to a global page only: they are not noted. */
	if (c && !c->noted && !w->global) {
		w->fresh = true;
		*again = true;
		return KL_WALK_OK;
	}
	if (!(kl_walk_allowed(v, w, mode) & access))
		return fault(v, w, access, mode, KL_PF_PRESENT);

	if (f.entry_size == 4) {
		if (large)
			w->gpa = (pte & 0xffc00000) | ((pte & 0x1fe000) << 19);
		else
			w->gpa = pte & 0xfffff000;
	} else {
		w->gpa = pte & PTE_ADDR & ~((1ull << w->page_shift) - 1);
	}
	w->gpa |= lin & ((1ull << w->page_shift) - 1);

	if (set_ad) {
		enum kl_walk_status st =
			set_bits(v, steps, n, access == KL_ACC_WRITE, f.entry_size, w, again);

		if (st != KL_WALK_OK || *again)
			return st;
	}
	w->leaf = (struct kl_pte_ref){steps[n - 1].ptr, steps[n - 1].pte};
	/* Tables that cannot be written have no use for D: do not ask for it again. */
	w->dirty = (steps[n - 1].pte & PTE_D) || w->skip_ad;
	if (set_ad) {
		if (f.pae && !c && !w->global) {
			unsigned i = (lin >> 30) & 3;

			kl_tlb_note_upper(v, (const uint8_t *)&v->pdptrs[i], v->pdptrs[i]);
		}
		if (!c || n > 1)
			remember(v, &f, lin, level, steps, n, w, &above, !c || c->noted);
	}
	return KL_WALK_OK;
}

enum kl_walk_status kl_walk(struct kl_vcpu *v, uint64_t lin, unsigned access, enum kl_tlb_mode mode,
			    bool set_ad, struct kl_walk *w)
{
	enum kl_walk_status st;
	bool again;

	if (!(v->cr0 & KL_CR0_PG)) {
		w->gpa = lin;
		w->user = w->writable = w->dirty = w->global = true;
		w->nx = false;
		w->page_shift = 32;
		return KL_WALK_OK;
	}
	if (!kl_canonical(v, lin))
		return KL_WALK_GP;
	do {
		again = false;
		st = walk_once(v, lin, access, mode, set_ad, w, &again);
		/*
		 * A fault drops what is remembered of its address, as processors do: who has
		 * relaxed an entry need not invalidate it, and must not meet the same fault for
		 * ever.
		 */
		if (st == KL_WALK_FAULT && !w->fresh)
			again = w->fresh = true;
		/* What was noted is reported first. */
	} while (again && !v->nr_notes);
	return st;
}

bool kl_pdptes_valid(struct kl_vcpu *v, const uint64_t pdpte[4])
{
	uint64_t reserved = kl_reserved_gpa_bits(v) | 0xfff0000000000000ull | 0x1e6;

	for (unsigned i = 0; i < 4; i++)
		if ((pdpte[i] & PTE_P) && (pdpte[i] & reserved))
			return false;
	return true;
}
