/* SPDX-License-Identifier: MIT */
/* Virtual-8086 mode with and without CR4.VME, and CR4.PVI. */
#include "x86_env.h"

#define VCODE  0x12000ul
#define VSTACK 0x13000ul
#define VSP    0x100u
#define VTEXT  0x14000ul /* a handler of the task's own */
#define IO_MAP 0x88u
#define IOPL3  ((uint64_t)KL_FL_IOPL)

static uint32_t get32(struct env *e, uint64_t gpa)
{
	uint32_t val;

	memcpy(&val, e->mem + gpa, 4);
	return val;
}

static uint16_t get16(struct env *e, uint64_t gpa)
{
	uint16_t val;

	memcpy(&val, e->mem + gpa, 2);
	return val;
}

/* IRET from ring 0 into virtual-8086 code. */
static void enter_vm86(struct env *e, const uint8_t *code, unsigned len, uint64_t flags,
		       uint64_t cr4)
{
	const uint32_t frame[] = {0,           VCODE >> 4,  (uint32_t)(2 | KL_FL_VM | flags),
				  VSP,         VSTACK >> 4, VSTACK >> 4,
				  VSTACK >> 4, 0,           0};
	uint16_t io_map = IO_MAP;

	mode32(e, 0);
	e->v->cr4 |= cr4;
	e->v->seg[KL_TR].limit = 0xff;
	memcpy(e->mem + TSS + 102, &io_map, 2);
	memset(e->mem + TSS + IO_MAP - 32, 0, 32);
	put64(e, 0x30 * 4, VTEXT >> 4 << 16);
	e->mem[VTEXT] = 0xf4;
	memset(e->mem + VCODE, 0xf4, 64);
	memcpy(e->mem + VCODE, code, len);
	env_code(e, 0xcf);
	memcpy(e->mem + STACK, frame, sizeof(frame));
}

#define run_vm86(e, flags, cr4, ...)                               \
	do {                                                       \
		static const uint8_t vcode_[] = {__VA_ARGS__};     \
		enter_vm86(e, vcode_, sizeof(vcode_), flags, cr4); \
		assert_run(e, KVM_EXIT_HLT);                       \
	} while (0)

/* HLT, or what else is privileged, ended it: #GP from virtual-8086 code at @ip. */
static uint32_t gp_flags(struct env *e, unsigned ip)
{
	uint64_t sp = e->v->gpr[KL_RSP];

	assert_int_equal(e->v->rip, HANDLER(13) + 1);
	assert_int_equal(get32(e, sp), 0);
	assert_int_equal(get32(e, sp + 4), ip);
	assert_int_equal(get32(e, sp + 8), VCODE >> 4);
	assert_int_equal(get32(e, sp + 20), VSTACK >> 4);
	assert_int_equal(e->v->seg[KL_DS].unusable, 1);
	return get32(e, sp + 12);
}

static void without_vme(void **state)
{
	struct env *e = *state;

	/* IOPL 3: all of it is the task's. */
	run_vm86(e, IOPL3, 0, 0x9c, 0xfb, 0x9c, 0xfa, 0x9d); /* pushf; sti; pushf; cli; popf */
	assert_int_equal(gp_flags(e, 5) & KL_FL_IF, KL_FL_IF);
	assert_int_equal(get16(e, VSTACK + VSP - 2), 2 | KL_FL_IOPL);
	assert_int_equal(get16(e, VSTACK + VSP - 4), 2 | KL_FL_IOPL | KL_FL_IF);
	/* Below, the monitor's. */
	run_vm86(e, 0, 0, 0xfa);
	gp_flags(e, 0);
	run_vm86(e, 0, 0, 0x9c);
	gp_flags(e, 0);
	run_vm86(e, 0, 0, 0xcf);
	gp_flags(e, 0);
	run_vm86(e, 0, 0, 0xcd, 0x30);
	gp_flags(e, 0);
}

static void virtual_interrupt_flag(void **state)
{
	struct env *e = *state;

	/* sti; pushf; cli; pushf */
	run_vm86(e, KL_FL_IF, KL_CR4_VME, 0xfb, 0x9c, 0xfa, 0x9c);
	assert_int_equal(gp_flags(e, 4) & (KL_FL_IF | KL_FL_VIF | KL_FL_IOPL), KL_FL_IF);
	assert_int_equal(get16(e, VSTACK + VSP - 2), 2 | KL_FL_IOPL | KL_FL_IF);
	assert_int_equal(get16(e, VSTACK + VSP - 4), 2 | KL_FL_IOPL);
	/* push 0x3203; popf: IF to VIF, IOPL stays */
	run_vm86(e, 0, KL_CR4_VME, 0x68, 0x03, 0x32, 0x9d);
	assert_int_equal(gp_flags(e, 4), 2 | KL_FL_CF | KL_FL_VIF | KL_FL_VM | KL_FL_RF);
	/* With an interrupt pending: STI, and POPF that would set IF; of TF, too. */
	run_vm86(e, KL_FL_VIP, KL_CR4_VME, 0xfb);
	gp_flags(e, 0);
	run_vm86(e, KL_FL_VIP, KL_CR4_VME, 0x68, 0x00, 0x02, 0x9d);
	gp_flags(e, 3);
	run_vm86(e, 0, KL_CR4_VME, 0x68, 0x00, 0x01, 0x9d);
	gp_flags(e, 3);
	/* 32 bits are the monitor's. */
	run_vm86(e, 0, KL_CR4_VME, 0x66, 0x9c);
	gp_flags(e, 0);
	/* push 0x0203; push VCODE >> 4; push 0x20; iret */
	run_vm86(e, 0, KL_CR4_VME, 0x68, 0x03, 0x02, 0x68, 0x00, 0x12, 0x6a, 0x20, 0xcf);
	assert_int_equal(gp_flags(e, 0x20), 2 | KL_FL_CF | KL_FL_VIF | KL_FL_VM | KL_FL_RF);
}

static void redirection(void **state)
{
	static const uint8_t code[] = {0xcd, 0x30}; /* int 0x30 */
	struct env *e = *state;
	uint64_t sp;

	/* To the task's own handler, whose HLT is a #GP. */
	run_vm86(e, KL_FL_VIF, KL_CR4_VME, 0xcd, 0x30);
	sp = e->v->gpr[KL_RSP];
	assert_int_equal(e->v->rip, HANDLER(13) + 1);
	assert_int_equal(get32(e, sp + 8), VTEXT >> 4);
	assert_int_equal(get32(e, sp + 12) & (KL_FL_VIF | KL_FL_IF), 0);
	assert_int_equal(get32(e, sp + 16), VSP - 6);
	assert_int_equal(get16(e, VSTACK + VSP - 6), 2);
	assert_int_equal(get16(e, VSTACK + VSP - 4), VCODE >> 4);
	assert_int_equal(get16(e, VSTACK + VSP - 2), 2 | KL_FL_IOPL | KL_FL_IF);
	/* To the monitor: below IOPL 3 by #GP, else by the gate. */
	for (unsigned iopl = 0; iopl < 2; iopl++) {
		enter_vm86(e, code, sizeof(code), iopl ? IOPL3 : 0, KL_CR4_VME);
		e->mem[TSS + IO_MAP - 32 + 6] = 1;
		e->mem[IDT + 0x30 * 8 + 5] |= 0x60;
		assert_run(e, KVM_EXIT_HLT);
		if (iopl) {
			assert_int_equal(e->v->rip, HANDLER(0x30) + 1);
			assert_int_equal(get32(e, e->v->gpr[KL_RSP]), 2);
		} else {
			gp_flags(e, 0);
		}
	}
}

/* Protected mode: CLI and STI at CPL 3 only. */
static void pvi(void **state)
{
	struct env *e = *state;

	env_code(e, 0xfb, 0x90, 0xfa, 0xfb, 0xf4); /* sti; nop; cli; sti; hlt */
	mode32(e, 3);
	e->v->cr4 |= KL_CR4_PVI;
	assert_vector(e, 13);
	assert_int_equal(get32(e, e->v->gpr[KL_RSP] + 4), CODE + 4);
	assert_int_equal(get32(e, e->v->gpr[KL_RSP] + 12) & (KL_FL_VIF | KL_FL_IF), KL_FL_VIF);
	mode32(e, 3);
	e->v->cr4 &= ~(uint64_t)KL_CR4_PVI;
	assert_vector(e, 13);
	assert_int_equal(get32(e, e->v->gpr[KL_RSP] + 4), CODE);
}

#define TEST(fn) cmocka_unit_test_setup_teardown(fn, env_setup, env_teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(without_vme),
		TEST(virtual_interrupt_flag),
		TEST(redirection),
		TEST(pvi),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
