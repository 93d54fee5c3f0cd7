/* SPDX-License-Identifier: MIT */
#include "x86/tlb.h"

#include <string.h>

#include "base/racepoint.h"
#include "host/guard.h"
#include "x86/control.h"
#include "x86/debug.h"
#include "x86/paging.h"
#include "x86/vcpu.h"

#define PTE_D (1ull << 6)

_Static_assert(KL_NR_TLB_MODES <= 4, "the mode is in the low bits of a generation");

/* ---- bits ---------------------------------------------------------------------------------- */

static void set_bit(uint64_t *bits, unsigned i)
{
	bits[i / 64] |= 1ull << i % 64;
}

static void clear_bit(uint64_t *bits, unsigned i)
{
	bits[i / 64] &= ~(1ull << i % 64);
}

static bool test_bit(const uint64_t *bits, unsigned i)
{
	return bits[i / 64] >> i % 64 & 1;
}

/* For each bit @i of kl_tlb_bits @bits, which may be cleared meanwhile. */
#define for_each_slot(i, bits)                                                        \
	for (unsigned word_ = 0, i; word_ < KL_ARRAY_SIZE(bits); word_++)             \
		for (uint64_t left_ = (bits)[word_];                                  \
		     left_ && (i = word_ * 64 + (unsigned)__builtin_ctzll(left_), 1); \
		     left_ &= left_ - 1)

static unsigned large_bit(uint64_t lin)
{
	uint64_t region = lin >> 22;

	return (region ^ region >> 12) % (64 * KL_ARRAY_SIZE(((struct kl_tlb_state *)0)->large));
}

/* ---- code ---------------------------------------------------------------------------------- */

/* Nothing local was fetched any more. */
static void forget_local_code(struct kl_tlb_state *t)
{
	memset(t->fetched_local, 0, sizeof(t->fetched_local));
	memset(t->local_code, 0, sizeof(t->local_code));
}

/* Blocks of local pages are to be looked up anew. */
static void void_local_code(struct kl_tlb_state *t)
{
	for (unsigned m = 0; m < KL_NR_TLB_MODES; m++)
		if (t->local_code[m])
			kl_tlb_new_gen(t, m);
	forget_local_code(t);
}

/* ---- entries of page tables ------------------------------------------------------------------ */

static bool differ(uint64_t a, uint64_t b, uint64_t ignored)
{
	return (a ^ b) & ~ignored;
}

/* Does the entry still say what it said? */
static bool same(const struct kl_pte_ref *r, unsigned size, uint64_t ignored)
{
	uint64_t now = KL_LIKELY(size == 8) ? kl_load64(r->ptr) : kl_load32(r->ptr);

	return !differ(now, r->val, ignored);
}

static unsigned pte_size(const struct kl_vcpu *v)
{
	return v->cr4 & KL_CR4_PAE ? 8 : 4;
}

static uint64_t key_of(const struct kl_vcpu *v)
{
	return (v->cr3 & (v->efer & KL_EFER_LMA ? KL_PAGE_MASK : ~0x1full)) | 1;
}

static void reset(struct kl_space *s, uint64_t key)
{
	s->key = key;
	s->nr_upper = s->nr_code = s->nr_saved = 0;
	s->torn = s->code_torn = false;
	memset(s->gen, 0, sizeof(s->gen));
}

static struct kl_space *find_space(struct kl_vcpu *v)
{
	struct kl_space *oldest = v->spaces, *s;
	uint64_t key = key_of(v);

	for (s = v->spaces; s < v->spaces + KL_SPACES; s++) {
		if (s->key == key) {
			oldest = s;
			break;
		}
		if (s->used < oldest->used)
			oldest = s;
	}
	if (oldest->key != key)
		reset(oldest, key);
	oldest->used = ++v->tlbs.clock;
	return oldest;
}

/* The one in use, or NULL. After a flush of everything there is none, and no entry either. */
static struct kl_space *current_space(struct kl_vcpu *v)
{
	struct kl_tlb_state *t = &v->tlbs;

	if (KL_UNLIKELY(!t->space) && t->spaces_used)
		t->space = find_space(v);
	return t->space;
}

void kl_tlb_note_upper(struct kl_vcpu *v, const uint8_t *ptr, uint64_t val)
{
	struct kl_space *s = current_space(v);

	if (!s)
		return;
	for (unsigned i = 0; i < s->nr_upper; i++) {
		if (s->upper[i].ptr != ptr)
			continue;
		/* What was translated by the old value may still be there. */
		s->torn |= differ(s->upper[i].val, val, PTE_D);
		return;
	}
	if (s->nr_upper == KL_SPACE_UPPER)
		s->torn = true;
	else
		s->upper[s->nr_upper++] = (struct kl_pte_ref){ptr, val};
}

static void note_code(struct kl_vcpu *v, uint64_t page, enum kl_tlb_mode mode,
		      const struct kl_walk *w)
{
	struct kl_tlb_state *t = &v->tlbs;
	struct kl_space *s;

	if (w->global) {
		set_bit(t->fetched_global, kl_tlb_index(page));
		return;
	}
	set_bit(t->fetched_local, kl_tlb_index(page));
	t->local_code[mode] = true;
	s = current_space(v);
	if (!s)
		return;
	for (unsigned i = 0; i < s->nr_code; i++) {
		const struct kl_space_code *c = &s->code[i];

		if (c->page != page)
			continue;
		/* Blocks that came from there may still be in use. */
		s->code_torn |=
			c->from.ptr != w->leaf.ptr || differ(c->from.val, w->leaf.val, PTE_D);
		return;
	}
	if (s->nr_code == KL_SPACE_CODE)
		s->code_torn = true;
	else
		s->code[s->nr_code++] = (struct kl_space_code){page, w->leaf};
}

/* ---- entries of the first level ----------------------------------------------------------------
 */

static void clear(struct kl_vcpu *v, unsigned mode, unsigned index)
{
	struct kl_tlb_entry *e = &v->tlb[mode][index];

	e->rtag = e->wtag = e->xtag = kl_tlb_none(index);
	v->stack_limit = 0; /* translated code may have remembered it */
}

/* Pages are entered for fetches when something is fetched: tlb_gfn is of interest for those only.
 */
void kl_tlb_fill(struct kl_vcpu *v, uint64_t lin, enum kl_tlb_mode mode, const struct kl_walk *w,
		 const uint8_t *page, unsigned access, bool writable)
{
	struct kl_tlb_state *t = &v->tlbs;
	unsigned index = kl_tlb_index(lin), ok = kl_walk_allowed(v, w, mode);
	struct kl_tlb_entry *e = &v->tlb[mode][index];
	uint64_t tag = lin & KL_PAGE_MASK, none = kl_tlb_none(index);

	if (KL_UNLIKELY(mode == KL_TLB_ALIGNED))
		ok &= KL_ACC_EXEC;
	e->rtag = ok & KL_ACC_READ ? tag : none;
	e->wtag = (ok & KL_ACC_WRITE) && w->dirty && writable ? tag : none;
	if (access == KL_ACC_EXEC) {
		e->xtag = tag;
		v->tlb_gfn[mode][index] = w->gpa >> KL_PAGE_SHIFT;
		note_code(v, tag, mode, w);
	} else if (e->xtag != tag || !(ok & KL_ACC_EXEC) || e->page != page ||
		   test_bit(t->local[mode], index) == w->global) {
		e->xtag = none;
	}
	e->page = (uint8_t *)(uintptr_t)page;
	if (KL_UNLIKELY(v->bp.exec | v->bp.write | v->bp.access))
		kl_debug_mask_tlb(v, tag, e);
	set_bit(t->filled[mode], index);
	if (w->global) {
		clear_bit(t->local[mode], index);
	} else {
		(void)current_space(v);
		set_bit(t->local[mode], index);
		t->from[mode][index] = w->leaf;
	}
	if (w->page_shift > 22)
		t->huge = true;
	else if (w->page_shift != KL_PAGE_SHIFT)
		set_bit(t->large, large_bit(lin));
}

/* All of them, and what is known by them. */
static void drop_all(struct kl_vcpu *v)
{
	struct kl_tlb_state *t = &v->tlbs;

	for (unsigned m = 0; m < KL_NR_TLB_MODES; m++)
		for_each_slot(i, t->filled[m]) clear(v, m, i);
	memset(t->filled, 0, sizeof(t->filled));
	memset(t->local, 0, sizeof(t->local));
	memset(t->fetched_global, 0, sizeof(t->fetched_global));
	forget_local_code(t);
	kl_code_unmapped(v);
	t->walk_epoch++;
	v->mmio_tag = KL_MMIO_NONE;
}

static void drop_local(struct kl_vcpu *v)
{
	struct kl_tlb_state *t = &v->tlbs;

	for (unsigned m = 0; m < KL_NR_TLB_MODES; m++) {
		for_each_slot(i, t->local[m])
		{
			clear(v, m, i);
			clear_bit(t->filled[m], i);
		}
	}
	memset(t->local, 0, sizeof(t->local));
	void_local_code(t);
}

void kl_tlb_flush(struct kl_vcpu *v)
{
	struct kl_tlb_state *t = &v->tlbs;

	drop_all(v);
	memset(t->large, 0, sizeof(t->large));
	t->huge = false;
	t->space = NULL;
	for (unsigned i = 0; t->spaces_used && i < KL_SPACES; i++)
		v->spaces[i].key = 0;
}

void kl_tlb_flush_page(struct kl_vcpu *v, uint64_t lin)
{
	struct kl_tlb_state *t = &v->tlbs;
	unsigned index = kl_tlb_index(lin);
	struct kl_space *s = t->space;

	/* An entry is 4 KiB: those of the rest of a large page must go, too. */
	if (t->huge || test_bit(t->large, large_bit(lin))) {
		drop_all(v);
		if (s)
			reset(s, s->key);
		return;
	}
	for (unsigned m = 0; m < KL_NR_TLB_MODES; m++) {
		clear(v, m, index);
		clear_bit(t->filled[m], index);
		clear_bit(t->local[m], index);
	}
	if (test_bit(t->fetched_local, index) || test_bit(t->fetched_global, index)) {
		kl_code_unmapped(v);
		for (unsigned i = 0; s && i < s->nr_code; i++)
			if (s->code[i].page == (lin & KL_PAGE_MASK))
				s->code[i--] = s->code[--s->nr_code];
	}
	t->walk_epoch++;
	v->mmio_tag = KL_MMIO_NONE;
}

/* ---- address spaces ----------------------------------------------------------------------------
 */

static bool same_upper(const struct kl_space *s, unsigned size)
{
	if (s->torn)
		return false;
	for (unsigned i = 0; i < s->nr_upper; i++)
		if (!same(&s->upper[i], size, PTE_D))
			return false;
	return true;
}

static bool same_code(const struct kl_space *s, unsigned size)
{
	if (s->code_torn)
		return false;
	for (unsigned i = 0; i < s->nr_code; i++)
		if (!same(&s->code[i].from, size, PTE_D))
			return false;
	return true;
}

/* What the entry allows, and the page's address if that is anything. */
static unsigned allowed_by(const struct kl_tlb_entry *e, unsigned index, uint64_t *tag)
{
	uint64_t none = kl_tlb_none(index);
	unsigned allowed = 0;

	if (e->rtag != none) {
		allowed |= KL_ACC_READ;
		*tag = e->rtag;
	}
	if (e->wtag != none) {
		allowed |= KL_ACC_WRITE;
		*tag = e->wtag;
	}
	if (e->xtag != none) {
		allowed |= KL_ACC_EXEC;
		*tag = e->xtag;
	}
	return allowed;
}

/* D is of no interest to who may not write. */
static uint64_t ignored(unsigned allowed)
{
	return allowed & KL_ACC_WRITE ? 0 : PTE_D;
}

/* The address space in use once more: what is not as it was goes. */
static void read_again(struct kl_vcpu *v, struct kl_space *s)
{
	struct kl_tlb_state *t = &v->tlbs;
	unsigned size = pte_size(v);
	bool code;

	if (!same_upper(s, size)) {
		drop_local(v);
		reset(s, s->key);
		return;
	}
	code = same_code(s, size);
	if (!code) {
		void_local_code(t);
		s->nr_code = 0;
		s->code_torn = false;
	}
	for (unsigned m = 0; m < KL_NR_TLB_MODES; m++) {
		for_each_slot(i, t->local[m])
		{
			struct kl_tlb_entry *e = &v->tlb[m][i];
			uint64_t tag;

			if (!code)
				e->xtag = kl_tlb_none(i);
			if (same(&t->from[m][i], size, ignored(allowed_by(e, i, &tag))))
				continue;
			clear(v, m, i);
			clear_bit(t->filled[m], i);
			clear_bit(t->local[m], i);
		}
	}
}

/* Local entries leave the first level, and are kept if there is room. */
static void put_away(struct kl_vcpu *v, struct kl_space *s)
{
	struct kl_tlb_state *t = &v->tlbs;
	unsigned n = 0;

	if (s->torn) {
		reset(s, s->key);
		drop_local(v);
		return;
	}
	for (unsigned m = 0; m < KL_NR_TLB_MODES; m++) {
		s->gen[m] = t->local_code[m] ? t->gen[m] : 0;
		for_each_slot(i, t->local[m])
		{
			const struct kl_tlb_entry *e = &v->tlb[m][i];
			uint64_t tag = 0;
			unsigned allowed = allowed_by(e, i, &tag);

			if (!allowed || n == KL_SPACE_SAVED)
				continue;
			s->saved[n++] = (struct kl_space_entry){
				.tag = tag,
				.page = e->page,
				.gfn = v->tlb_gfn[m][i],
				.from = t->from[m][i],
				.slot = (uint16_t)(m << KL_TLB_BITS | i),
				.allowed = (uint8_t)allowed,
			};
		}
	}
	s->nr_saved = n;
	s->code_serial = t->code_serial;
	drop_local(v);
}

/* What was put away, as far as it is as it was. No local entry is there. */
static void take_back(struct kl_vcpu *v, struct kl_space *s)
{
	struct kl_tlb_state *t = &v->tlbs;
	unsigned size = pte_size(v);
	bool code;

	if (!same_upper(s, size)) {
		reset(s, s->key);
		return;
	}
	code = s->code_serial == t->code_serial && same_code(s, size);
	if (code) {
		for (unsigned m = 0; m < KL_NR_TLB_MODES; m++) {
			if (!s->gen[m])
				continue;
			t->gen[m] = s->gen[m];
			t->local_code[m] = true;
		}
		for (unsigned i = 0; i < s->nr_code; i++)
			set_bit(t->fetched_local, kl_tlb_index(s->code[i].page));
	} else {
		s->nr_code = 0;
		s->code_torn = false;
	}
	for (const struct kl_space_entry *x = s->saved; x < s->saved + s->nr_saved; x++) {
		unsigned mode = x->slot >> KL_TLB_BITS, i = x->slot & (KL_TLB_SIZE - 1);
		struct kl_tlb_entry *e = &v->tlb[mode][i];
		uint64_t none = kl_tlb_none(i);

		/* A global one has come there: it is more likely to be used. */
		if (test_bit(t->filled[mode], i))
			continue;
		if (!same(&x->from, size, ignored(x->allowed)))
			continue;
		e->rtag = x->allowed & KL_ACC_READ ? x->tag : none;
		e->wtag = x->allowed & KL_ACC_WRITE ? x->tag : none;
		e->xtag = code && (x->allowed & KL_ACC_EXEC) ? x->tag : none;
		e->page = x->page;
		v->tlb_gfn[mode][i] = x->gfn;
		t->from[mode][i] = x->from;
		set_bit(t->filled[mode], i);
		set_bit(t->local[mode], i);
	}
}

static void switch_spaces(struct kl_vcpu *v)
{
	struct kl_tlb_state *t = &v->tlbs;
	struct kl_space *s = current_space(v);

	if (s->key == key_of(v)) {
		read_again(v, s);
		return;
	}
	put_away(v, s);
	t->space = s = find_space(v);
	racepoint("tlb-takes-back");
	take_back(v, s);
}

void kl_tlb_load_space(struct kl_vcpu *v)
{
	struct kl_tlb_state *t = &v->tlbs;
	jmp_buf *outer = kl_self.guard;
	jmp_buf here;

	t->walk_epoch++;
	v->mmio_tag = KL_MMIO_NONE;
	if (KL_UNLIKELY(!t->spaces_used)) {
		drop_local(v); /* nobody has noted where it came from */
		t->spaces_used = true;
	}
	/* A page table that has vanished, or whoever wants this vCPU out of a read that waits: the
	 * instruction is complete all the same. */
	if (KL_LIKELY(kl_guard_enter(&here) == KL_GUARD_NONE))
		switch_spaces(v);
	else
		kl_tlb_flush(v);
	kl_guard_leave(outer);
	v->code_gen = t->gen[v->tlb_mode];
	kl_code_void(v);
}

void kl_tlb_make(struct kl_vcpu *v, enum kl_tlb_mode mode)
{
	for (unsigned i = 0; i < KL_TLB_SIZE; i++)
		clear(v, mode, i);
	v->tlbs.made[mode] = true;
}
