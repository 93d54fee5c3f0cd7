/* SPDX-License-Identifier: MIT */
/*
 * Guest page walks (M9): every mode, every right, the exact error code, A and D bits.
 */
#include "x86_env.h"

#include "x86/access.h"
#include "x86/paging.h"

#define P    1ull
#define W    2ull
#define U    4ull
#define A    0x20ull
#define D    0x40ull
#define PS   0x80ull
#define NX   (1ull << 63)
#define T(n) (TABLES + (n)*0x1000ul)

/* Walk as the vCPU does: resolve what stage 2 misses, then again. */
static enum kl_walk_status walk(struct env *e, uint64_t lin, unsigned access, enum kl_tlb_mode mode,
				struct kl_walk *w)
{
	struct kl_vcpu_core *c = &e->v->core;
	enum kl_walk_status st;

	memset(w, 0, sizeof(*w));
	w->fresh = true; /* the tables change without a flush */
	for (;;) {
		kl_vcpu_enter_guest(c);
		st = kl_walk(e->v, lin, access, mode, true, w);
		kl_vcpu_leave_guest(c);
		if (st != KL_WALK_MISS)
			return st;
		if (kl_mmu_fault(c, w->miss_gpa, w->miss_access) == KL_FAULT_MMIO)
			return KL_WALK_MMIO;
	}
}

#define assert_gpa(e, lin, access, mode, want)                                 \
	do {                                                                   \
		struct kl_walk w_;                                             \
		assert_int_equal(walk(e, lin, access, mode, &w_), KL_WALK_OK); \
		assert_int_equal(w_.gpa, want);                                \
	} while (0)

#define assert_pf(e, lin, access, mode, want)                                     \
	do {                                                                      \
		struct kl_walk w_;                                                \
		assert_int_equal(walk(e, lin, access, mode, &w_), KL_WALK_FAULT); \
		assert_int_equal(w_.error, want);                                 \
	} while (0)

static void control(struct env *e, uint64_t cr0, uint64_t cr4, uint64_t efer)
{
	e->v->cr0 = KL_CR0_PE | cr0;
	e->v->cr4 = cr4;
	e->v->efer = efer;
	e->v->cr3 = TABLES;
	kl_tlb_flush(e->v);
}

static void long_mode(struct env *e, uint64_t cr4)
{
	control(e, KL_CR0_PG | KL_CR0_WP, KL_CR4_PAE | cr4, KL_EFER_LME | KL_EFER_LMA | KL_EFER_NX);
}

static void no_paging(void **state)
{
	struct env *e = *state;

	control(e, 0, 0, 0);
	assert_gpa(e, 0x12345, KL_ACC_WRITE, KL_TLB_USER, 0x12345);
}

static void two_levels(void **state)
{
	struct env *e = *state;
	uint32_t *pd = (void *)(e->mem + T(0)), *pt = (void *)(e->mem + T(1));

	control(e, KL_CR0_PG | KL_CR0_WP, 0, 0);
	pd[1] = (uint32_t)(T(1) | P | W | U);
	pt[3] = 0x5000 | P | U;
	assert_gpa(e, 0x403123, KL_ACC_READ, KL_TLB_USER, 0x5123);
	assert_int_equal(pd[1] & (A | D), A);
	assert_int_equal(pt[3] & (A | D), A);
	assert_pf(e, 0x403123, KL_ACC_WRITE, KL_TLB_USER, KL_PF_PRESENT | KL_PF_WRITE | KL_PF_USER);
	assert_pf(e, 0x403123, KL_ACC_WRITE, KL_TLB_SUPER, KL_PF_PRESENT | KL_PF_WRITE);
	e->v->cr0 &= ~(uint64_t)KL_CR0_WP;
	assert_gpa(e, 0x403123, KL_ACC_WRITE, KL_TLB_SUPER, 0x5123);
	assert_int_equal(pt[3] & D, D);
	/* No NX without PAE: a fetch is a read, and says so. */
	assert_pf(e, 0x404000, KL_ACC_EXEC, KL_TLB_SUPER, 0);

	/* A large page only with CR4.PSE. */
	pd[2] = (uint32_t)(0x00c00000 | P | W | PS);
	assert_int_equal(walk(e, 0x800000, KL_ACC_READ, KL_TLB_SUPER, &(struct kl_walk){0}),
			 KL_WALK_MMIO); /* 0xc00000 as a table: there is no slot */
	e->v->cr4 = KL_CR4_PSE;
	pd[2] = (uint32_t)(0x00c00000 | P | W | PS);
	assert_gpa(e, 0x9abcde, KL_ACC_READ, KL_TLB_SUPER, 0x00dabcdeul);
	/* PSE-36: bits 16:13 are address bits 35:32. */
	pd[2] = (uint32_t)(0x00c00000 | P | W | PS | 3 << 13);
	assert_gpa(e, 0x9abcde, KL_ACC_READ, KL_TLB_SUPER, 0x300dabcdeul);
	pd[2] = (uint32_t)(0x00c00000 | P | W | PS | 1 << 21);
	assert_pf(e, 0x9abcde, KL_ACC_READ, KL_TLB_SUPER, KL_PF_PRESENT | KL_PF_RSVD);
}

static void pae(void **state)
{
	struct env *e = *state;
	uint64_t *pd = (void *)(e->mem + T(1)), *pt = (void *)(e->mem + T(2));

	control(e, KL_CR0_PG | KL_CR0_WP, KL_CR4_PAE, KL_EFER_NX);
	e->v->pdptrs[0] = T(1) | P;
	pd[1] = T(2) | P | W | U;
	pt[4] = 0x7000 | P | W | U | NX;
	assert_gpa(e, 0x204008, KL_ACC_WRITE, KL_TLB_USER, 0x7008);
	assert_int_equal(pt[4] & (A | D), A | D);
	assert_pf(e, 0x204008, KL_ACC_EXEC, KL_TLB_USER, KL_PF_PRESENT | KL_PF_USER | KL_PF_FETCH);
	e->v->efer = 0; /* then NX is a reserved bit */
	assert_pf(e, 0x204008, KL_ACC_READ, KL_TLB_USER, KL_PF_PRESENT | KL_PF_USER | KL_PF_RSVD);
	pd[2] = 0x200000 | P | W | PS;
	assert_gpa(e, 0x412345, KL_ACC_READ, KL_TLB_SUPER, 0x212345);
	pd[2] |= 1ull << 52;
	assert_pf(e, 0x412345, KL_ACC_READ, KL_TLB_SUPER, KL_PF_PRESENT | KL_PF_RSVD);
	assert_pf(e, 0xc0000000, KL_ACC_READ, KL_TLB_SUPER, 0); /* PDPTE not present */
	assert_false(kl_pdptes_valid(e->v, (uint64_t[4]){P | W}));
	assert_true(kl_pdptes_valid(e->v, (uint64_t[4]){W, T(1) | P}));
}

static void four_levels(void **state)
{
	struct env *e = *state;
	uint64_t *l4 = (void *)(e->mem + T(0)), *l3 = (void *)(e->mem + T(1));
	uint64_t *l2 = (void *)(e->mem + T(2)), *l1 = (void *)(e->mem + T(3));
	const uint64_t lin = 0xffff800000000000ull | 5ull << 30 | 6ull << 21 | 7ull << 12;

	long_mode(e, 0);
	l4[256] = T(1) | P | W | U;
	l3[5] = T(2) | P | W | U;
	l2[6] = T(3) | P | W | U;
	l1[7] = 0x9000 | P | W | U;
	assert_gpa(e, lin | 0xfff, KL_ACC_READ, KL_TLB_USER, 0x9fff);
	assert_int_equal(l4[256] & (A | D), A);
	assert_int_equal(l3[5] & (A | D), A);
	assert_int_equal(l2[6] & (A | D), A);
	assert_int_equal(l1[7] & (A | D), A);
	assert_gpa(e, lin, KL_ACC_WRITE, KL_TLB_USER, 0x9000);
	assert_int_equal(l2[6] & (A | D), A);
	assert_int_equal(l1[7] & (A | D), A | D);

	/* Rights of all levels count, and an access that faults sets nothing. */
	l3[5] = T(2) | P | W;
	l1[7] = 0x9000 | P | W | U;
	assert_pf(e, lin, KL_ACC_READ, KL_TLB_USER, KL_PF_PRESENT | KL_PF_USER);
	assert_int_equal(l1[7] & (A | D), 0);
	l3[5] = T(2) | P | U;
	assert_pf(e, lin, KL_ACC_WRITE, KL_TLB_SUPER, KL_PF_PRESENT | KL_PF_WRITE);
	l3[5] = T(2) | P | W | U | NX;
	assert_pf(e, lin, KL_ACC_EXEC, KL_TLB_SUPER, KL_PF_PRESENT | KL_PF_FETCH);
	l3[5] = T(2) | P | W | U;
	l2[6] = 0;
	assert_pf(e, lin, KL_ACC_EXEC, KL_TLB_USER, KL_PF_USER | KL_PF_FETCH);
	assert_pf(e, lin, KL_ACC_WRITE, KL_TLB_USER, KL_PF_USER | KL_PF_WRITE);

	/* Large pages. */
	l2[6] = 0x200000 | P | W | PS;
	assert_gpa(e, lin | 0xabc, KL_ACC_WRITE, KL_TLB_SUPER, 0x207abc);
	assert_int_equal(l2[6] & (A | D), A | D);
	l2[6] |= 1 << 13;
	assert_pf(e, lin, KL_ACC_READ, KL_TLB_SUPER, KL_PF_PRESENT | KL_PF_RSVD);
	l3[5] = 0x40000000 | P | W | PS;
	assert_gpa(e, lin, KL_ACC_READ, KL_TLB_SUPER, 0x40000000 | (lin & 0x3fffffff));
	l3[5] |= 1 << 20;
	assert_pf(e, lin, KL_ACC_READ, KL_TLB_SUPER, KL_PF_PRESENT | KL_PF_RSVD);
	l3[5] = T(2) | P | W | U;
	l2[6] = T(3) | P | W | U;
	assert_gpa(e, lin, KL_ACC_READ, KL_TLB_USER, 0x9000);
	l4[256] |= PS;
	assert_pf(e, lin, KL_ACC_READ, KL_TLB_USER, KL_PF_PRESENT | KL_PF_USER | KL_PF_RSVD);
}

static void address_width(void **state)
{
	struct env *e = *state;
	uint64_t *l4 = (void *)(e->mem + T(0));
	struct kl_walk w;

	long_mode(e, 0);
	assert_in_range(e->v->maxphyaddr, 36, 51);
	l4[0] = 1ull << e->v->maxphyaddr | P;
	assert_pf(e, 0, KL_ACC_READ, KL_TLB_SUPER, KL_PF_PRESENT | KL_PF_RSVD);
	l4[0] = 1ull << 40 | P; /* a legal address with nothing behind it */
	assert_int_equal(walk(e, 0, KL_ACC_READ, KL_TLB_SUPER, &w), KL_WALK_MMIO);
	assert_int_equal(walk(e, 1ull << 47, KL_ACC_READ, KL_TLB_SUPER, &w), KL_WALK_GP);
	assert_int_equal(walk(e, ~0ull << 48, KL_ACC_READ, KL_TLB_SUPER, &w), KL_WALK_GP);
	assert_pf(e, ~0ull << 47, KL_ACC_READ, KL_TLB_SUPER, 0);
}

static void five_levels(void **state)
{
	struct env *e = *state;
	uint64_t *l5 = (void *)(e->mem + T(4));
	const uint64_t lin = 3ull << 48 | 0x1234;
	struct kl_walk w;

	long_mode(e, KL_CR4_LA57);
	map64(e);
	e->v->cr3 = T(4);
	l5[3] = TABLES | P | W | U;
	assert_gpa(e, lin, KL_ACC_READ, KL_TLB_USER, 0x1234);
	assert_int_equal(l5[3] & A, A);
	assert_int_equal(walk(e, 1ull << 56, KL_ACC_READ, KL_TLB_SUPER, &w), KL_WALK_GP);
}

static void smep_smap(void **state)
{
	struct env *e = *state;

	map64(e);
	long_mode(e, 0);
	assert_gpa(e, CODE, KL_ACC_EXEC, KL_TLB_SUPER, CODE);
	assert_gpa(e, CODE, KL_ACC_READ, KL_TLB_SUPER, CODE);
	long_mode(e, KL_CR4_SMEP | KL_CR4_SMAP);
	assert_pf(e, CODE, KL_ACC_EXEC, KL_TLB_SUPER, KL_PF_PRESENT | KL_PF_FETCH);
	assert_gpa(e, CODE, KL_ACC_EXEC, KL_TLB_USER, CODE);
	assert_pf(e, CODE, KL_ACC_READ, KL_TLB_SUPER_SMAP, KL_PF_PRESENT);
	assert_pf(e, CODE, KL_ACC_WRITE, KL_TLB_SUPER_SMAP, KL_PF_PRESENT | KL_PF_WRITE);
	assert_gpa(e, P_SUPER, KL_ACC_WRITE, KL_TLB_SUPER_SMAP, P_SUPER);
	/* EFLAGS.AC lifts SMAP for explicit accesses, never for descriptor tables. */
	e->v->rflags |= KL_FL_AC;
	assert_int_equal(kl_tlb_mode_of(e->v, 0, false), KL_TLB_SUPER);
	assert_int_equal(kl_tlb_mode_of(e->v, 0, true), KL_TLB_SUPER_SMAP);
	assert_int_equal(kl_tlb_mode_of(e->v, 3, true), KL_TLB_SUPER_SMAP);
}

/* Page tables in a read-only slot work; their A and D bits stay as they are. */
static void read_only_tables(void **state)
{
	struct env *e = *state;
	struct kl_walk w = {.skip_ad = true};

	map64(e);
	assert_int_equal(env_slot(e, 0, 0, 0, 0, e->mem), 0);
	assert_int_equal(env_slot(e, 0, KVM_MEM_READONLY, 0, MEM, e->mem), 0);
	long_mode(e, 0);
	for (;;) {
		enum kl_walk_status st;

		kl_vcpu_enter_guest(&e->v->core);
		st = kl_walk(e->v, CODE, KL_ACC_WRITE, KL_TLB_USER, true, &w);
		kl_vcpu_leave_guest(&e->v->core);
		if (st == KL_WALK_OK)
			break;
		assert_int_equal(st, KL_WALK_MISS);
		assert_int_equal(kl_mmu_fault(&e->v->core, w.miss_gpa, w.miss_access), 0);
	}
	assert_int_equal(w.gpa, CODE);
	assert_true(w.dirty);
	assert_int_equal(get64(e, TABLES) & A, 0);
}

static void translate(void **state)
{
	struct env *e = *state;
	bool writable, user;
	uint64_t gpa;

	mode64(e, 0);
	assert_int_equal(kl_x86_translate(e->v, P_RO + 5, &gpa, &writable, &user), 0);
	assert_int_equal(gpa, P_RO + 5);
	assert_int_equal(kl_x86_translate(e->v, P_MMIO + 5, &gpa, &writable, &user), 0);
	assert_int_equal(gpa, MMIO_GPA + 5);
	assert_int_not_equal(kl_x86_translate(e->v, P_ABSENT, &gpa, &writable, &user), 0);
	assert_int_not_equal(kl_x86_translate(e->v, 1ull << 63, &gpa, &writable, &user), 0);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, env_setup, env_teardown)
	const struct CMUnitTest tests[] = {
		TEST(no_paging),   TEST(two_levels),       TEST(pae),
		TEST(four_levels), TEST(address_width),    TEST(five_levels),
		TEST(smep_smap),   TEST(read_only_tables), TEST(translate),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
