/* SPDX-License-Identifier: MIT */
/*
 * Guest paging against ref_walk.c (M9): all combinations of a leaf's bits with the control
 * bits, access kinds and CPL that decide over it; all of an upper entry's; and everything at
 * random. For each access: done or not, where, error code, CR2, the A and D bits that were set,
 * none on a fault; then a second access that finds what the first left in the vCPU's TLB.
 */
#include <stdio.h>

#include "../random.h"
#include "x86_env.h"

#include "ref_walk.h"
#include "x86/access.h"
#include "x86/insn.h"
#include "x86/paging.h"

#define P  1ull
#define W  2ull
#define U  4ull
#define A  0x20ull
#define D  0x40ull
#define PS 0x80ull
#define G  0x100ull
#define NX (1ull << 63)

/* Tables: 0x10000 and up, one for each level, the root's level last. Data: 2 MiB and up. */
#define TABLE(level) (TABLES + ((level)-1) * 0x1000ul)
#define PAGE         0x212000ul

static uint64_t rng;

static uint64_t rnd(void)
{
	return random_next(&rng);
}

static bool once_in(unsigned n)
{
	return !(rnd() % n);
}

/* ---- the vCPU's side ---- */

static void configure(struct env *e, const struct ref_cfg *c)
{
	struct kl_vcpu *v = e->v;
	bool wide = c->paging >= REF_4LEVEL;

	v->cr0 = KL_CR0_PE | KL_CR0_ET | (c->wp ? KL_CR0_WP : 0) | (c->paging ? KL_CR0_PG : 0);
	v->cr4 = (c->pse ? KL_CR4_PSE : 0) | (c->smep ? KL_CR4_SMEP : 0) |
		 (c->smap ? KL_CR4_SMAP : 0) | (c->pke ? KL_CR4_PKE : 0) |
		 (c->paging >= REF_PAE ? KL_CR4_PAE : 0) |
		 (c->paging == REF_5LEVEL ? KL_CR4_LA57 : 0);
	v->efer = (c->nxe ? KL_EFER_NX : 0) | (wide ? KL_EFER_LME | KL_EFER_LMA : 0);
	v->cr3 = c->cr3;
	memcpy(v->pdptrs, c->pdpte, sizeof(v->pdptrs));
	v->rflags = 2 | (c->ac ? KL_FL_AC : 0);
	v->cpl = c->user ? 3 : 0;
	v->maxphyaddr = c->maxphyaddr;
	v->intel_compatible = !c->amd;
	set_segment_cache(&v->seg[KL_CS], 8, 0xb, v->cpl, wide, !wide);
	kl_x86_update_mode(v);
	kl_tlb_flush(v);
}

struct outcome {
	enum ref_status status;
	uint32_t error;
	uint64_t cr2;
	bool mmio;
	uint64_t gpa; /* of MMIO */
	const uint8_t *fetched;
	uint64_t val;
};

static void do_access(struct kl_vcpu *v, uint64_t lin, enum ref_kind kind, struct outcome *o)
{
	uint8_t byte = 0x5a;

	switch (kind) {
	case REF_READ:
		o->val = kl_read(v, lin, 1);
		break;
	case REF_WRITE:
		kl_write(v, lin, 0x5a, 1);
		break;
	case REF_EXEC:
		o->fetched = kl_fetch_pointer(v, lin);
		if (!o->fetched)
			o->fetched = kl_fetch_slow(v, lin);
		break;
	case REF_SYS_READ:
		kl_read_system(v, lin, &byte, 1);
		o->val = byte;
		break;
	default:
		kl_write_system(v, lin, &byte, 1);
	}
}

/* One access, as an instruction makes it. */
static void access_one(struct env *e, uint64_t lin, enum ref_kind kind, struct outcome *out)
{
	static const struct kl_op op = {.flags = KL_OPF_MEM | KL_OPF_MMIO_OK, .seg = KL_DS};
	struct kl_vcpu *v = e->v;
	int why;

	memset(out, 0, sizeof(*out));
	v->cur_op = &op;
	v->nr_mmio = v->mmio_used = 0;
	v->exc.pending = false;
	v->exit_pending = false;
	kl_self.guard = &v->jmp;
	why = _setjmp(v->jmp);
	if (!why) {
		v->in_run = true;
		kl_vcpu_enter_guest(&v->core);
		kl_serve_flush(v);
		do_access(v, lin, kind, out);
	}
	kl_vcpu_leave_guest(&v->core);
	kl_self.guard = NULL;
	v->in_run = false;
	v->pending = KL_PENDING_NONE;
	if (v->nr_mmio) {
		out->mmio = true;
		out->gpa = v->mmio[0].gpa;
	}
	if (why == KL_LEAVE_EXIT && !v->nr_mmio) {
		/* A fetch, or the processor's own access, where there is no slot */
		assert_int_equal(v->exit.reason, KVM_EXIT_INTERNAL_ERROR);
		out->mmio = true;
		out->gpa = ~0ull;
	}
	if (why == KL_LEAVE_EXCEPTION) {
		switch (v->exc.nr) {
		case KL_EXC_PF:
			out->status = REF_PF;
			out->error = v->exc.error;
			out->cr2 = v->exc.payload;
			break;
		case KL_EXC_GP:
			out->status = REF_GP;
			break;
		default: /* as above, at CPL 3 */
			assert_int_equal(v->exc.nr, KL_EXC_UD);
			out->mmio = true;
			out->gpa = ~0ull;
		}
	}
	v->exc.pending = false;
}

/* ---- comparison ---- */

static unsigned long compared;

static void explain(struct env *e, const struct ref_cfg *c, uint64_t lin, enum ref_kind kind,
		    const struct ref_result *want, const struct outcome *got,
		    const uint64_t *before)
{
	fprintf(stderr,
		"paging %u wp %u pse %u smep %u smap %u pke %u nxe %u ac %u user %u amd %u pkru %x "
		"maxphyaddr %u kind %u lin %lx\n",
		c->paging, c->wp, c->pse, c->smep, c->smap, c->pke, c->nxe, c->ac, c->user, c->amd,
		c->pkru, c->maxphyaddr, kind, (unsigned long)lin);
	for (unsigned i = 0; i < want->n; i++)
		fprintf(stderr, "  entry at %lx: %lx, now %lx, to be set %lx\n",
			(unsigned long)want->entry[i].gpa, (unsigned long)before[i],
			(unsigned long)get64(e, want->entry[i].gpa),
			(unsigned long)want->entry[i].set);
	fprintf(stderr, "  want status %u error %x gpa %lx\n", want->status, want->error,
		(unsigned long)want->gpa);
	fprintf(stderr, "  got  status %u error %x gpa %lx mmio %u cr2 %lx\n", got->status,
		got->error, (unsigned long)got->gpa, got->mmio, (unsigned long)got->cr2);
}

static bool place_is_right(struct env *e, enum ref_kind kind, uint64_t gpa,
			   const struct outcome *got)
{
	if (gpa >= MEM)
		return got->mmio && (got->gpa == gpa || got->gpa == ~0ull);
	if (got->mmio)
		return false;
	switch (kind) {
	case REF_EXEC:
		return got->fetched == e->mem + gpa;
	case REF_READ:
	case REF_SYS_READ:
		return got->val == e->mem[gpa];
	default:
		return e->mem[gpa] == 0x5a;
	}
}

/* The access that @c, memory and the TLB (which was filled from them) are ready for. */
static bool agrees(struct env *e, const struct ref_cfg *c, uint64_t lin, enum ref_kind kind)
{
	struct ref_result want = ref_walk(c, e->mem, MEM, lin, kind);
	uint64_t before[5], now, mask;
	struct outcome got;
	uint8_t old = 0;
	bool ok;

	for (unsigned i = 0; i < want.n; i++)
		before[i] = get64(e, want.entry[i].gpa);
	if (want.status == REF_OK && want.gpa < MEM) {
		old = e->mem[want.gpa];
		/* Who reads this read the right byte, most likely. */
		e->mem[want.gpa] = (uint8_t)(0x80 | (rnd() & 0x3f));
	}
	access_one(e, lin, kind, &got);
	compared++;
	ok = got.status == want.status;
	if (ok && want.status == REF_PF)
		ok = got.error == want.error && got.cr2 == lin;
	if (ok && want.status == REF_OK)
		ok = place_is_right(e, kind, want.gpa, &got);
	for (unsigned i = 0; i < want.n; i++) {
		mask = want.entry[i].size == 8 ? ~0ull : 0xffffffff;
		now = get64(e, want.entry[i].gpa);
		if (want.status == REF_OK)
			ok &= (now & mask) == ((before[i] | want.entry[i].set) & mask);
		else
			ok &= now == before[i];
	}
	if (!ok)
		explain(e, c, lin, kind, &want, &got, before);
	if (want.status == REF_OK && want.gpa < MEM)
		e->mem[want.gpa] = old;
	return ok;
}

/* ---- tables ---- */

struct tables {
	enum ref_paging paging;
	unsigned levels;
	uint64_t lin;
	uint64_t entry[6]; /* of the level; [1] is the PTE */
};

static unsigned entry_size(const struct tables *t)
{
	return t->paging == REF_32 ? 4 : 8;
}

static uint64_t entry_at(const struct tables *t, unsigned level)
{
	unsigned ib = t->paging == REF_32 ? 10 : 9;
	uint64_t index = t->lin >> (12 + (level - 1) * ib) & ((1u << ib) - 1);

	return TABLE(level) + index * entry_size(t);
}

static void put_entries(struct env *e, const struct tables *t, struct ref_cfg *c)
{
	for (unsigned l = 1; l <= t->levels; l++) {
		if (t->paging == REF_PAE && l == 3)
			c->pdpte[t->lin >> 30 & 3] = t->entry[l];
		else
			memcpy(e->mem + entry_at(t, l), &t->entry[l], entry_size(t));
	}
	/* PDPTEs lie in 32 bytes, and are found in registers. */
	c->cr3 = TABLE(t->levels);
	c->paging = t->paging;
}

static const uint64_t all_rights = P | W | U;

static void plain_tables(struct tables *t, enum ref_paging paging)
{
	static const unsigned levels[] = {0, 2, 3, 4, 5};

	*t = (struct tables){.paging = paging, .levels = levels[paging]};
	t->lin = rnd();
	if (paging <= REF_PAE)
		t->lin = (uint32_t)t->lin;
	else if (paging == REF_4LEVEL)
		t->lin = (uint64_t)((int64_t)(t->lin << 16) >> 16);
	else
		t->lin = (uint64_t)((int64_t)(t->lin << 7) >> 7);
	for (unsigned l = 2; l <= t->levels; l++)
		t->entry[l] = TABLE(l - 1) | (paging == REF_PAE && l == 3 ? P : all_rights);
	t->entry[1] = PAGE | all_rights;
}

/* Bit @n of @from, and so on through a number that counts all combinations. */
static bool take(unsigned *from)
{
	bool b = *from & 1;

	*from >>= 1;
	return b;
}

/* Everything outside of memory that decides over an access: 8 bits. */
#define NR_CONTROLS 256u

static void controls(struct ref_cfg *c, unsigned n)
{
	c->wp = take(&n);
	c->smep = take(&n);
	c->smap = take(&n);
	c->nxe = take(&n);
	c->ac = take(&n);
	c->user = take(&n);
	c->pse = take(&n);
	c->amd = take(&n);
}

static bool both(struct env *e, struct ref_cfg *c, struct tables *t)
{
	for (enum ref_kind k = 0; k < REF_NR_KINDS; k++) {
		enum ref_kind second = (enum ref_kind)(rnd() % REF_NR_KINDS);

		put_entries(e, t, c);
		if (k == REF_READ)
			configure(e, c);
		else
			kl_tlb_flush(e->v);
		if (!agrees(e, c, t->lin, k) || !agrees(e, c, t->lin ^ 8, second))
			return false;
	}
	return true;
}

/* All combinations of @nbits bits of the entry of one @level with all controls. */
static bool every_entry(struct env *e, enum ref_paging paging, unsigned level, const uint64_t *bit,
			unsigned nbits)
{
	struct ref_cfg c = {.maxphyaddr = 40};
	struct tables t;

	plain_tables(&t, paging);
	for (unsigned n = 0; n < 1u << nbits; n++) {
		/* A page of its own: large ones lie at 2 MiB, or 0. */
		uint64_t base = level == 1 ? PAGE : TABLE(level - 1);

		t.entry[level] = 0;
		for (unsigned i = 0; i < nbits; i++)
			t.entry[level] |= n & 1u << i ? bit[i] : 0;
		if (level > 1 && (t.entry[level] & PS))
			base = level == 2 && paging != REF_32 ? 0x200000 : 0;
		if (level > 1 && paging == REF_32)
			base = TABLE(1); /* PS may mean nothing; see random_entry() */
		t.entry[level] |= base;
		for (unsigned ctl = 0; ctl < NR_CONTROLS; ctl++) {
			controls(&c, ctl);
			/* 4 MiB at an address that is no table's */
			if (level == 2 && paging == REF_32) {
				bool large = c.pse && (t.entry[2] & PS);

				t.entry[2] = (t.entry[2] & 0xfff) | (large ? 0 : TABLE(1));
			}
			if (!both(e, &c, &t))
				return false;
		}
	}
	return true;
}

static void leaf_bits(void **state)
{
	static const uint64_t legacy[] = {P, W, U, A, D, PS, G};
	static const uint64_t wide[] = {P, W, U, A, D, G, NX, 1ull << 45};
	struct env *e = *state;

	assert_true(every_entry(e, REF_32, 1, legacy, 7));
	assert_true(every_entry(e, REF_PAE, 1, wide, 8));
	assert_true(every_entry(e, REF_4LEVEL, 1, wide, 8));
	assert_true(every_entry(e, REF_5LEVEL, 1, wide, 8));
}

static void upper_bits(void **state)
{
	static const uint64_t legacy[] = {P, W, U, A, D, PS, G};
	static const uint64_t wide[] = {P, W, U, A, PS, G, NX, 1ull << 45};
	struct env *e = *state;

	assert_true(every_entry(e, REF_32, 2, legacy, 7));
	assert_true(every_entry(e, REF_PAE, 2, wide, 8));
	for (unsigned level = 2; level <= 4; level++)
		assert_true(every_entry(e, REF_4LEVEL, level, wide, 8));
	assert_true(every_entry(e, REF_5LEVEL, 5, wide, 8));
}

/* ---- random ---- */

/* The tables stay in memory; pages may lie anywhere. */
static uint64_t random_entry(const struct tables *t, const struct ref_cfg *c, unsigned level)
{
	uint64_t e = rnd() & (A | D | G | 0xe00 | 0x18);

	e |= once_in(16) ? 0 : P;
	e |= once_in(6) ? 0 : W;
	e |= once_in(6) ? 0 : U;
	if (t->paging != REF_32)
		e |= once_in(8) ? NX : 0;
	if (t->paging >= REF_4LEVEL)
		e |= rnd() & 0x7ff0000000000000;
	else if (t->paging == REF_PAE && once_in(16))
		e |= 1ull << (52 + rnd() % 11);
	if (once_in(16) && t->paging != REF_32 && c->maxphyaddr < 52)
		e |= 1ull << (c->maxphyaddr + rnd() % (52 - c->maxphyaddr));
	if (level > 1 && once_in(4))
		e |= PS;
	/* Bit 12 of a large page is PAT, those above are reserved or address. */
	if (level == 1) {
		e |= PAGE | (rnd() & PS);
	} else if ((e & PS) && (t->paging != REF_32 || c->pse) && level <= 3 &&
		   !(t->paging == REF_PAE && level == 3)) {
		e |= once_in(2) ? 0x1000 : 0;
		e |= once_in(6) ? 1ull << (13 + rnd() % 9) : 0;
		e |= level == 2 && t->paging != REF_32 && once_in(2) ? 0x200000 : 0;
		e |= once_in(8) ? rnd() & (t->paging == REF_32 ? 0xffc00000 : 0xffc0000000) : 0;
	} else {
		e |= TABLE(level - 1);
	}
	return e;
}

static void everything(void **state)
{
	struct env *e = *state;
	struct ref_cfg c;
	struct tables t;

	for (unsigned n = 0; n < 200000; n++) {
		c = (struct ref_cfg){.maxphyaddr = 36 + (unsigned)(rnd() % 17)};
		controls(&c, (unsigned)rnd());
		plain_tables(&t, REF_32 + (unsigned)(rnd() % 4));
		for (unsigned l = 1; l <= t.levels; l++) {
			if (once_in(3))
				continue;
			t.entry[l] = random_entry(&t, &c, l);
			/* Malformed PDPTEs are not loaded. */
			if (t.paging == REF_PAE && l == 3)
				t.entry[l] = TABLE(2) | (t.entry[l] & P);
		}
		if (!both(e, &c, &t))
			fail_msg("number %u", n);
	}
	/* Linear addresses that are, or are not, canonical */
	for (unsigned n = 0; n < 20000; n++) {
		c = (struct ref_cfg){.maxphyaddr = 40};
		plain_tables(&t, REF_4LEVEL + (unsigned)(rnd() % 2));
		t.lin = rnd() & 1 ? ~0ull << (45 + rnd() % 14) : (1ull << (45 + rnd() % 14)) - 1;
		t.lin += (rnd() % 3 - 1) * 8;
		t.lin &= ~7ull;
		if (!both(e, &c, &t))
			fail_msg("number %u", n);
	}
	print_message("%lu accesses\n", compared);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, env_setup, env_teardown)
	const struct CMUnitTest tests[] = {
		TEST(leaf_bits),
		TEST(upper_bits),
		TEST(everything),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
