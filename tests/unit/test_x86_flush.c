/* SPDX-License-Identifier: MIT */
/*
 * What a guest must not see of the vCPU's TLB (M9): translations that an instruction should have
 * dropped, rights that have changed. And what PAE's PDPTE registers hold, when.
 */
#include "x86_env.h"

#include "x86/paging.h"

#define P  1ull
#define W  2ull
#define U  4ull
#define PS 0x80ull
#define G  0x100ull

#define LIN    0x20a000ul /* the page that is looked at */
#define OLD    0x210000ul
#define NEW    0x212000ul
#define PDE    (TABLES + 0x2000ul + 8) /* of LIN */
#define PTE_AT (PT + (LIN >> 9 & 0xff8))
#define PT     (TABLES + 0x4000ul)
#define OPER   0x5000ul /* INVPCID's descriptor */
#define OTHER  0x20000ul
#define BIT63  (1ull << 63)

struct code {
	const char *name;
	uint8_t bytes[24];
	unsigned n;
};
#define CODE_OF(name, ...)                                            \
	{                                                             \
		name, {__VA_ARGS__}, sizeof((uint8_t[]){__VA_ARGS__}) \
	}

static void regs_for(struct env *e, uint64_t rcx)
{
	struct kvm_regs r = {
		.rip = CODE, .rsp = STACK, .rflags = 2, .rbx = LIN, .rcx = rcx, .rdi = OPER};

	kl_x86_set_regs(e->v, &r);
}

/* @code, then AL = [LIN]; HLT. */
static void run_and_look(struct env *e, const struct code *c, uint64_t rcx)
{
	static const uint8_t look[] = {0x8a, 0x03, 0xf4}; /* mov al, [rbx]; hlt */

	memcpy(e->mem + CODE, c->bytes, c->n);
	memcpy(e->mem + CODE + c->n, look, sizeof(look));
	regs_for(e, rcx);
	assert_run(e, KVM_EXIT_HLT);
}

static unsigned al(struct env *e)
{
	return (uint8_t)e->v->gpr[KL_RAX];
}

static void map_lin(struct env *e, bool large, bool global, uint64_t to)
{
	put64(e, PDE, PT | P | W | U);
	put64(e, PTE_AT, to | P | W | U | (global ? G : 0));
	if (large)
		put64(e, PDE, (to & ~0x1fffffull) | P | W | PS | (global ? G : 0));
}

/* The code must go on when user pages are out of reach. */
static void low_is_supervisor(struct env *e)
{
	for (uint64_t page = CODE; page < 0xb000; page += 0x1000)
		put64(e, TABLES + 0x3000 + (page >> 9), page | P | W);
}

static const struct code nothing = CODE_OF("nothing", 0x90);

static const struct code flushes[] = {
	CODE_OF("INVLPG", 0x0f, 0x01, 0x3b),
	CODE_OF("MOV CR3", 0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8),
	/* mov rax, cr4; btc rax, 7; mov cr4, rax */
	CODE_OF("CR4.PGE", 0x0f, 0x20, 0xe0, 0x48, 0x0f, 0xba, 0xf8, 7, 0x0f, 0x22, 0xe0),
	/* or eax, 1 << 20: SMEP from 0 to 1 */
	CODE_OF("CR4.SMEP", 0x0f, 0x20, 0xe0, 0x0d, 0, 0, 0x10, 0, 0x0f, 0x22, 0xe0),
	CODE_OF("INVPCID", 0x66, 0x0f, 0x38, 0x82, 0x0f),
};

/* M9 */
static void dropped_translations(void **state)
{
	struct env *e = *state;

	for (unsigned i = 0; i < KL_ARRAY_SIZE(flushes); i++) {
		bool invpcid = !strcmp(flushes[i].name, "INVPCID");

		for (unsigned n = 0; n < (invpcid ? 16u : 4u); n++) {
			bool large = n & 1, global = n & 2;
			unsigned type = n >> 2;

			/* What keeps global pages, by right */
			if (global && (!strcmp(flushes[i].name, "MOV CR3") ||
				       !strcmp(flushes[i].name, "CR4.SMEP") ||
				       (invpcid && (type == 0 || type == 1 || type == 3))))
				continue;
			mode64(e, 0);
			low_is_supervisor(e);
			e->v->cr4 |= KL_CR4_PGE;
			memset(e->mem + LIN, 0x11, 0x1000);
			memset(e->mem + OLD, 0x11, 0x1000);
			memset(e->mem + NEW, 0x22, 0x1000);
			put64(e, OPER, 0);
			put64(e, OPER + 8, LIN);
			put64(e, PDE + 8, 0);
			map_lin(e, large, global, large ? LIN : OLD);
			kl_tlb_flush(e->v);
			run_and_look(e, &nothing, 0);
			assert_int_equal(al(e), 0x11);
			/* A large page becomes small ones; the same table for the other. */
			put64(e, PDE, PT | P | W | U);
			put64(e, PTE_AT, NEW | P | W | U);
			run_and_look(e, &nothing, 0);
			assert_int_equal(al(e), 0x11); /* there is a TLB */
			run_and_look(e, &flushes[i], type);
			if (al(e) != 0x22)
				fail_msg("%s, large %u, global %u, type %u", flushes[i].name, large,
					 global, type);
		}
	}
}

/* INVLPG of one part of a large page drops the others. */
static void large_page_as_a_whole(void **state)
{
	static const struct code code = CODE_OF("", 0x0f, 0x01, 0xbb, 0x00, 0x30, 0, 0);
	struct env *e = *state;

	mode64(e, 0);
	memset(e->mem + LIN, 0x11, 0x1000);
	memset(e->mem + NEW, 0x22, 0x1000);
	map_lin(e, true, false, LIN);
	kl_tlb_flush(e->v);
	run_and_look(e, &nothing, 0);
	map_lin(e, false, false, NEW);
	run_and_look(e, &code, 0);
	assert_int_equal(al(e), 0x22);
}

/* Two address spaces with PCIDs, and switches between them that keep translations. */
static void pcids(void **state)
{
	static const struct code to = CODE_OF("", 0x0f, 0x22, 0xd9); /* mov cr3, rcx */
	static const struct code invpcid = CODE_OF("", 0x31, 0xc9, 0x66, 0x0f, 0x38, 0x82, 0x0f);
	struct env *e = *state;

	mode64(e, 0);
	memset(e->mem + OLD, 0x11, 0x1000);
	memset(e->mem + NEW, 0x22, 0x1000);
	memset(e->mem + LIN, 0x33, 0x1000);
	map_lin(e, false, false, OLD);
	/* The other's tables differ in LIN. */
	memcpy(e->mem + OTHER, e->mem + TABLES, 0x3000);
	put64(e, OTHER, (OTHER + 0x1000) | P | W | U);
	put64(e, OTHER + 0x1000, (OTHER + 0x2000) | P | W | U);
	put64(e, OTHER + 0x2008, (OTHER + 0x3000) | P | W | U);
	put64(e, OTHER + 0x3000 + (LIN >> 9 & 0xff8), NEW | P | W | U);
	e->v->cr4 |= KL_CR4_PCIDE;
	e->v->cr3 = TABLES | 1;
	kl_tlb_flush(e->v);
	for (unsigned n = 0; n < 4; n++) {
		uint64_t keep = n & 1 ? BIT63 : 0;

		run_and_look(e, &to, OTHER | 2 | keep);
		assert_int_equal(al(e), 0x22);
		assert_int_equal(e->v->cr3, OTHER | 2);
		run_and_look(e, &to, TABLES | 1 | keep);
		assert_int_equal(al(e), 0x11);
	}
	/* From the other one, drop the address in this one. */
	run_and_look(e, &to, OTHER | 2 | BIT63);
	put64(e, PTE_AT, LIN | P | W | U);
	put64(e, OPER, 1);
	put64(e, OPER + 8, LIN);
	run_and_look(e, &invpcid, 0);
	assert_int_equal(al(e), 0x22);
	run_and_look(e, &to, TABLES | 1 | BIT63);
	assert_int_equal(al(e), 0x33);
}

/* Rights that lie in registers count from the next access on. */
static void changed_rights(void **state)
{
	/* mov rax, cr0; btc rax, 16; mov cr0, rax; mov [rbx], al */
	static const uint8_t wp[] = {0x88, 0x03, 0x0f, 0x20, 0xc0, 0x48, 0x0f, 0xba,
				     0xf8, 16,   0x0f, 0x22, 0xc0, 0x88, 0x03};
	/* mov al, [rbx]; mov rax, cr4; bts rax, 21; mov cr4, rax; stac; mov al, [rbx]; clac; mov ..
	 */
	static const uint8_t smap[] = {0x8a, 0x03, 0x0f, 0x20, 0xe0, 0x48, 0x0f, 0xba,
				       0xe8, 21,   0x0f, 0x22, 0xe0, 0x0f, 0x01, 0xcb,
				       0x8a, 0x03, 0x0f, 0x01, 0xca, 0x8a, 0x03};
	/* call rbx; mov rax, cr4; bts rax, 20; mov cr4, rax; call rbx */
	static const uint8_t smep[] = {0xff, 0xd3, 0x0f, 0x20, 0xe0, 0x48, 0x0f, 0xba,
				       0xe8, 20,   0x0f, 0x22, 0xe0, 0xff, 0xd3};
	static const struct {
		const uint8_t *code;
		unsigned n, at; /* of the instruction that faults */
		uint64_t rights;
		uint32_t error;
	} t[] = {
		{wp, sizeof(wp), 13, P | U, KL_PF_PRESENT | KL_PF_WRITE},
		{smap, sizeof(smap), 21, P | W | U, KL_PF_PRESENT},
		{smep, sizeof(smep), 0, P | W | U, KL_PF_PRESENT | KL_PF_FETCH},
	};
	struct env *e = *state;

	for (unsigned i = 0; i < KL_ARRAY_SIZE(t); i++) {
		mode64(e, 0);
		map_lin(e, false, false, OLD);
		put64(e, PTE_AT, OLD | t[i].rights);
		e->mem[OLD] = 0xc3; /* ret */
		e->v->cr0 &= ~(uint64_t)KL_CR0_WP;
		low_is_supervisor(e);
		kl_tlb_flush(e->v);
		memcpy(e->mem + CODE, t[i].code, t[i].n);
		regs_for(e, 0);
		assert_vector(e, KL_EXC_PF);
		assert_int_equal(e->v->cr2, LIN);
		assert_int_equal(get64(e, e->v->gpr[KL_RSP]), t[i].error);
		assert_int_equal(get64(e, e->v->gpr[KL_RSP] + 8), t[i].at ? CODE + t[i].at : LIN);
	}
}

/* ---- PDPTEs ---- */

#define PDPT 0x18000ul
#define PD   0x19000ul

static void mode_pae(struct env *e)
{
	struct kvm_sregs s;

	mode32(e, 0);
	for (unsigned i = 0; i < 4; i++)
		put64(e, PDPT + i * 8, i ? 0 : PD | P);
	put64(e, PD, P | W | U | PS);
	put64(e, PD + 8, 0x200000 | P | W | U | PS);
	kl_x86_get_sregs(e->v, &s);
	s.cr3 = PDPT;
	s.cr4 = KL_CR4_PAE;
	s.cr0 |= KL_CR0_PG;
	assert_int_equal(kl_x86_set_sregs(e->v, &s), 0);
}

static const struct code loads[] = {
	CODE_OF("MOV CR3", 0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8),
	/* mov eax, cr0; and eax, ~PG; mov cr0, eax; or eax, PG; mov cr0, eax */
	CODE_OF("CR0.PG", 0x0f, 0x20, 0xc0, 0x25, 0xff, 0xff, 0xff, 0x7f, 0x0f, 0x22, 0xc0, 0x0d, 0,
		0, 0, 0x80, 0x0f, 0x22, 0xc0),
	/* mov eax, cr4; xor eax, PGE; mov cr4, eax */
	CODE_OF("CR4.PGE", 0x0f, 0x20, 0xe0, 0x35, 0x80, 0, 0, 0, 0x0f, 0x22, 0xe0),
	CODE_OF("CR4.PSE", 0x0f, 0x20, 0xe0, 0x35, 0x10, 0, 0, 0, 0x0f, 0x22, 0xe0),
	CODE_OF("CR4.SMEP", 0x0f, 0x20, 0xe0, 0x35, 0, 0, 0x10, 0, 0x0f, 0x22, 0xe0),
};

static void pdpte_loads(void **state)
{
	static const struct code look[] = {CODE_OF("", 0x90)};
	struct env *e = *state;

	/* SMEP: code in a supervisor page then. */
	for (unsigned i = 0; i < KL_ARRAY_SIZE(loads); i++) {
		for (unsigned bit = 0; bit < 64; bit++) {
			uint64_t val = 1ull << bit;
			/* An absent one may say what it likes. */
			uint64_t bad = (0x1e6 | ~0ull << e->v->maxphyaddr) & val;

			for (unsigned present = bit > 0; present < 2; present++) {
				mode_pae(e);
				put64(e, PD, P | W | PS);
				run_and_look(e, look, 0);
				put64(e, PDPT + 8, (val & ~P) | present);
				assert_int_equal(e->v->pdptrs[1], 0);
				if (bad && present) {
					memcpy(e->mem + CODE, loads[i].bytes, loads[i].n);
					regs_for(e, 0);
					assert_vector(e, KL_EXC_GP);
					assert_int_equal(e->v->pdptrs[1], 0);
					continue;
				}
				run_and_look(e, &loads[i], 0);
				assert_int_equal(e->v->pdptrs[1], (val & ~P) | present);
			}
		}
	}
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, env_setup, env_teardown)
	const struct CMUnitTest tests[] = {
		TEST(dropped_translations), TEST(large_page_as_a_whole), TEST(pcids),
		TEST(changed_rights),       TEST(pdpte_loads),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
