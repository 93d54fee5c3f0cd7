/* SPDX-License-Identifier: MIT */
/* Hardware task switches. */
#include "x86_env.h"

#include "x86/debug.h"

#define TSS2      0x5000ul
#define SEL_TSS2  0x48
#define SEL_TGATE 0x50
#define SEL_LDT   0x58
#define SEL_GONE  0x60 /* data, not present */
#define ENTRY2    0x1800u
#define STACK2    0x6f00u

static void put32(struct env *e, uint64_t gpa, uint32_t val)
{
	memcpy(e->mem + gpa, &val, 4);
}

static uint32_t get32(struct env *e, uint64_t gpa)
{
	uint32_t val;

	memcpy(&val, e->mem + gpa, 4);
	return val;
}

static void put16(struct env *e, uint64_t gpa, uint16_t val)
{
	memcpy(e->mem + gpa, &val, 2);
}

static uint16_t get16(struct env *e, uint64_t gpa)
{
	uint16_t val;

	memcpy(&val, e->mem + gpa, 2);
	return val;
}

static unsigned type_of(struct env *e, unsigned sel)
{
	return e->mem[GDT + (sel & ~7u) + 5] & 31;
}

/* A second task: 32 or 16 bits wide, at ENTRY2 in ring 0. */
static void second_task(struct env *e, bool wide)
{
	put64(e, GDT + SEL_TSS2,
	      (wide ? 0x67 : 0x2b) | TSS2 << 16 | (wide ? 0x89ull : 0x81ull) << 40);
	put64(e, GDT + SEL_TGATE, (uint64_t)SEL_TSS2 << 16 | 0x85ull << 40);
	put64(e, GDT + SEL_LDT, 0xff | 0x5800ull << 16 | 0x82ull << 40);
	put64(e, GDT + SEL_GONE, descriptor(3, 0, false, true) & ~(0x80ull << 40));
	e->v->gdt.limit = 0x67;
	memset(e->mem + TSS2, 0, 0x68);
	if (wide) {
		put32(e, TSS2 + 32, ENTRY2);
		put32(e, TSS2 + 36, 0x202);
		for (unsigned i = 0; i < 8; i++)
			put32(e, TSS2 + 40 + 4 * i, i == KL_RSP ? STACK2 : 0xa0000 + i);
		for (unsigned i = 0; i < 6; i++)
			put32(e, TSS2 + 72 + 4 * i, i == KL_CS ? SEL_CODE : SEL_DATA);
		put32(e, TSS2 + 96, SEL_LDT);
	} else {
		put16(e, TSS2 + 14, ENTRY2);
		put16(e, TSS2 + 16, 0x202);
		for (unsigned i = 0; i < 8; i++)
			put16(e, TSS2 + 18 + 2 * i, i == KL_RSP ? STACK2 : (uint16_t)(0xa0 + i));
		for (unsigned i = 0; i < 4; i++)
			put16(e, TSS2 + 34 + 2 * i, i == KL_CS ? SEL_CODE : SEL_DATA);
	}
	e->mem[ENTRY2] = 0xf4; /* hlt */
}

static void start(struct env *e, unsigned cpl, bool wide)
{
	mode32(e, cpl);
	second_task(e, wide);
	e->v->gpr[KL_RBX] = 0x11223344;
	e->v->rflags |= KL_FL_DF;
}

static void jump(void **state)
{
	struct env *e = *state;

	/* jmp SEL_TSS2:0 */
	env_code(e, 0xea, 0, 0, 0, 0, SEL_TSS2, 0);
	start(e, 0, true);
	e->v->dr7 = 0x401 | 2;
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->rip, ENTRY2 + 1);
	assert_int_equal(e->v->rflags, 0x202);
	assert_int_equal(e->v->gpr[KL_RAX], 0xa0000);
	assert_int_equal(e->v->gpr[KL_RDI], 0xa0007);
	assert_int_equal(e->v->gpr[KL_RSP], STACK2);
	assert_int_equal(e->v->seg[KL_TR].selector, SEL_TSS2);
	assert_int_equal(e->v->seg[KL_TR].base, TSS2);
	assert_int_equal(e->v->seg[KL_LDTR].selector, SEL_LDT);
	assert_int_equal(e->v->seg[KL_LDTR].base, 0x5800);
	assert_int_equal(e->v->seg[KL_FS].selector, SEL_DATA);
	assert_true(e->v->cr0 & KL_CR0_TS);
	assert_int_equal(e->v->dr7, 0x402);
	assert_int_equal(type_of(e, SEL_TSS), 9);
	assert_int_equal(type_of(e, SEL_TSS2), 11);
	assert_int_equal(get32(e, TSS + 32), CODE + 7);
	assert_int_equal(get32(e, TSS + 36), 2 | KL_FL_DF);
	assert_int_equal(get32(e, TSS + 52), 0x11223344);
	assert_int_equal(get32(e, TSS + 76), SEL_CODE);
	assert_int_equal(get32(e, TSS2), 0);
}

/* There and back: through a gate, from ring 3. */
static void call_and_return(void **state)
{
	struct env *e = *state;

	/* call SEL_TGATE:0; mov ecx, eax (then a #GP for HLT) */
	env_code(e, 0x9a, 0, 0, 0, 0, SEL_TGATE | 3, 0, 0x89, 0xc1, 0xf4);
	start(e, 3, true);
	put64(e, GDT + SEL_TGATE, get64(e, GDT + SEL_TGATE) | 0x60ull << 40);
	e->v->gpr[KL_RAX] = 77;
	e->mem[ENTRY2] = 0xcf; /* iretd */
	assert_vector(e, 13);
	assert_int_equal(e->v->gpr[KL_RCX], 77);
	assert_int_equal(e->v->gpr[KL_RBX], 0x11223344);
	assert_int_equal(get32(e, e->v->gpr[KL_RSP] + 4), CODE + 9);
	assert_int_equal(get32(e, e->v->gpr[KL_RSP] + 8), SEL_UCODE);
	assert_int_equal(e->v->seg[KL_TR].selector, SEL_TSS);
	assert_int_equal(type_of(e, SEL_TSS), 11);
	assert_int_equal(type_of(e, SEL_TSS2), 9);
	assert_int_equal(get16(e, TSS2), SEL_TSS);    /* the link */
	assert_int_equal(get32(e, TSS2 + 36), 0x202); /* NT is gone */
	assert_int_equal(e->v->rflags & KL_FL_NT, 0);
}

static void narrow(void **state)
{
	struct env *e = *state;

	env_code(e, 0x9a, 0, 0, 0, 0, SEL_TSS2, 0);
	start(e, 0, false);
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->rip, ENTRY2 + 1);
	assert_int_equal(e->v->rflags, 0x202 | KL_FL_NT);
	assert_int_equal(e->v->gpr[KL_RDI], 0xa7);
	assert_int_equal(e->v->seg[KL_TR].type, 3);
	assert_int_equal(get16(e, TSS2), SEL_TSS);
}

/* An exception by way of a task gate: the error code is on the new stack. */
static void exception(void **state)
{
	struct env *e = *state;

	env_code(e, 0x8e, 0xd8); /* mov ds, eax: beyond the GDT */
	start(e, 0, true);
	put64(e, IDT + 13 * 8, (uint64_t)SEL_TSS2 << 16 | 0x85ull << 40);
	e->v->gpr[KL_RAX] = 0x1230;
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->rip, ENTRY2 + 1);
	assert_int_equal(e->v->gpr[KL_RSP], STACK2 - 4);
	assert_int_equal(get32(e, STACK2 - 4), 0x1230);
	assert_int_equal(get32(e, TSS + 32), CODE);
	assert_true(get32(e, TSS + 36) & KL_FL_RF);
	assert_int_equal(e->v->rflags & KL_FL_NT, KL_FL_NT);
}

/* The old task's faults: nothing has changed. */
static void refused(void **state)
{
	struct env *e = *state;

	for (unsigned i = 0; i < 5; i++) {
		unsigned vector = 13, error = SEL_TSS2;

		env_code(e, 0xea, 0, 0, 0, 0, SEL_TSS2, 0);
		start(e, i == 0 ? 3 : 0, true);
		switch (i) {
		case 0: /* DPL */
			break;
		case 1: /* busy */
			e->mem[GDT + SEL_TSS2 + 5] |= 2;
			break;
		case 2: /* not there */
			e->mem[GDT + SEL_TSS2 + 5] &= 0x7f;
			vector = 11;
			break;
		case 3: /* too short */
			e->mem[GDT + SEL_TSS2] = 0x66;
			vector = 10;
			break;
		default: /* by a gate whose TSS is in the LDT */
			e->mem[CODE + 5] = SEL_TGATE;
			put64(e, GDT + SEL_TGATE, (uint64_t)(SEL_TSS2 | 4) << 16 | 0x85ull << 40);
			error = SEL_TSS2 | 4;
			break;
		}
		assert_vector(e, vector);
		assert_int_equal(get32(e, e->v->gpr[KL_RSP]), error);
		assert_int_equal(get32(e, e->v->gpr[KL_RSP] + 4), CODE);
		assert_int_equal(e->v->seg[KL_TR].selector, SEL_TSS);
		assert_int_equal(type_of(e, SEL_TSS), 11);
		assert_int_equal(get32(e, TSS + 32), 0);
	}
}

/* The new task's faults: they are its own. */
static void flaws(void **state)
{
	static const struct {
		unsigned at;
		uint16_t sel;
		unsigned vector, error;
	} t[] = {
		{72, 0x1230, 10, 0x1230},             /* ES beyond the GDT */
		{72, SEL_GONE, 11, SEL_GONE},         /* ES not present */
		{84, SEL_TSS, 10, SEL_TSS},           /* DS no segment */
		{80, 0, 10, 0},                       /* SS null */
		{80, SEL_UDATA, 10, SEL_UDATA & ~3u}, /* SS of another ring */
		{96, SEL_DATA, 10, SEL_DATA},         /* no LDT */
	};
	struct env *e = *state;

	for (unsigned i = 0; i < KL_ARRAY_SIZE(t); i++) {
		env_code(e, 0xea, 0, 0, 0, 0, SEL_TSS2, 0);
		start(e, 0, true);
		put32(e, TSS2 + t[i].at, t[i].sel);
		/* The handler needs a stack: a task of its own, or the new one's. */
		if (t[i].at == 80 || t[i].at == 96 || t[i].at == 72) {
			/* SS was not loaded yet: the frame cannot be stored, #SS, #DF, shutdown. */
			assert_run(e, KVM_EXIT_SHUTDOWN);
		} else {
			assert_vector(e, t[i].vector);
			assert_int_equal(get32(e, e->v->gpr[KL_RSP]), t[i].error);
			assert_int_equal(get32(e, e->v->gpr[KL_RSP] + 4), ENTRY2);
			assert_int_equal(e->v->seg[KL_TR].selector, SEL_TSS2);
		}
		assert_int_equal(type_of(e, SEL_TSS2), 11);
	}
}

static void trap_bit(void **state)
{
	struct env *e = *state;

	env_code(e, 0xea, 0, 0, 0, 0, SEL_TSS2, 0);
	start(e, 0, true);
	put16(e, TSS2 + 100, 1);
	assert_vector(e, 1);
	assert_int_equal(get32(e, e->v->gpr[KL_RSP]), ENTRY2);
	assert_int_equal(e->v->dr6, 0xffff8ff0);
}

/* IRET to no task. */
static void bad_link(void **state)
{
	struct env *e = *state;

	env_code(e, 0xcf);
	start(e, 0, true);
	e->v->rflags |= KL_FL_NT;
	put16(e, TSS, SEL_TSS2); /* not busy */
	assert_vector(e, 10);
	assert_int_equal(get32(e, e->v->gpr[KL_RSP]), SEL_TSS2);
}

/* The new task's address space; its table is not mapped in the host until it is walked. */
static void address_space(void **state)
{
	struct env *e = *state;
	uint8_t *late =
		mmap(NULL, 0x200000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	env_code(e, 0xea, 0, 0, 0, 0, SEL_TSS2, 0);
	start(e, 0, true);
	for (unsigned i = 0; i < 1024; i++)
		put32(e, TABLES + 4 * i, i << 22 | 0x83);
	e->v->cr3 = TABLES;
	e->v->cr4 |= KL_CR4_PSE;
	e->v->cr0 |= KL_CR0_PG;
	assert_int_equal(env_slot(e, 1, 0, 0x800000, 0x200000, late), 0);
	memcpy(late + 0x1000, e->mem + TABLES, 0x1000);
	put32(e, TSS2 + 28, 0x801000);
	e->v->rflags |= KL_FL_IF;
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->cr3, 0x801000);
	assert_int_equal(e->v->rip, ENTRY2 + 1);
	assert_int_equal(type_of(e, SEL_TSS2), 11);
	assert_int_equal(type_of(e, SEL_TSS), 9);
	assert_int_equal(env_slot(e, 1, 0, 0x800000, 0, late), 0);
	munmap(late, 0x200000);
}

/* The new page tables are out of reach: nothing has happened, and later it happens all the same. */
static void out_of_reach(void **state)
{
	struct env *e = *state;
	uint8_t *late =
		mmap(NULL, 0x200000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	env_code(e, 0xea, 0, 0, 0, 0, SEL_TSS2, 0);
	start(e, 0, true);
	for (unsigned i = 0; i < 1024; i++)
		put32(e, TABLES + 4 * i, i << 22 | 0x83);
	e->v->cr3 = TABLES;
	e->v->cr4 |= KL_CR4_PSE;
	e->v->cr0 |= KL_CR0_PG;
	memcpy(late + 0x1000, e->mem + TABLES, 0x1000);
	assert_int_equal(env_slot(e, 1, 0, 0x800000, 0x200000, late), 0);
	put32(e, TSS2 + 28, 0x801000);
	mprotect(late, 0x200000, PROT_NONE);
	assert_int_equal(env_run(e), -EFAULT);
	assert_int_equal(e->v->rip, CODE);
	assert_int_equal(e->v->cr3, TABLES);
	assert_int_equal(e->v->gpr[KL_RBX], 0x11223344);
	assert_int_equal(e->v->seg[KL_TR].selector, SEL_TSS);
	assert_int_equal(e->v->seg[KL_DS].selector, SEL_DATA);
	assert_int_equal(type_of(e, SEL_TSS2), 9);
	mprotect(late, 0x200000, PROT_READ | PROT_WRITE);
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->rip, ENTRY2 + 1);
	assert_int_equal(e->v->cr3, 0x801000);
	assert_int_equal(type_of(e, SEL_TSS2), 11);
	assert_int_equal(get32(e, TSS + 52), 0x11223344);
	assert_int_equal(env_slot(e, 1, 0, 0x800000, 0, late), 0);
	munmap(late, 0x200000);
}

#define TEST(fn) cmocka_unit_test_setup_teardown(fn, env_setup, env_teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(jump),          TEST(call_and_return), TEST(narrow),   TEST(exception),
		TEST(refused),       TEST(flaws),           TEST(trap_bit), TEST(bad_link),
		TEST(address_space), TEST(out_of_reach),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
