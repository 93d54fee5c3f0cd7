/* SPDX-License-Identifier: MIT */
/* What the decoder says of instructions that this directory does not execute. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#include "x86/decode.h"

/* U2, some of each side. */
static void test_emulator_table(void **state)
{
	static const struct {
		const char *bytes;
		bool mmio;
	} t[] = {
		{"\x8b\x03", true},              /* mov */
		{"\x01\x03", true},              /* add to memory */
		{"\xf0\x0f\xb1\x0b", true},      /* lock cmpxchg */
		{"\x48\x0f\xc7\x0b", false},     /* cmpxchg16b */
		{"\x0f\xc7\x0b", true},          /* cmpxchg8b */
		{"\x0f\xb6\x03", true},          /* movzx */
		{"\xa4", true},                  /* movsb */
		{"\x0f\x10\x03", true},          /* movups */
		{"\x66\x0f\x6f\x03", true},      /* movdqa */
		{"\xf3\x0f\x6f\x03", true},      /* movdqu */
		{"\xf2\x0f\x10\x03", false},     /* movsd */
		{"\xf3\x0f\x10\x03", false},     /* movss */
		{"\x66\x0f\x7e\x03", false},     /* movd */
		{"\x0f\x58\x03", false},         /* addps */
		{"\xd9\x03", false},             /* flds */
		{"\xd9\x3b", true},              /* fnstcw */
		{"\xdd\x3b", true},              /* fnstsw */
		{"\xdd\x03", false},             /* fldl */
		{"\x0f\x38\xf0\x03", true},      /* movbe */
		{"\xf2\x0f\x38\xf1\x03", false}, /* crc32 */
		{"\xf3\x0f\xb8\x03", false},     /* popcnt */
		{"\x0f\xbc\x03", true},          /* bsf */
		{"\x0f\xc3\x03", true},          /* movnti */
		{"\x66\x0f\xe7\x03", true},      /* movntdq */
		{"\x0f\xae\x13", false},         /* ldmxcsr */
		{"\x0f\xae\x03", true},          /* fxsave */
		{"\x0f\xae\x23", false},         /* xsave */
		{"\x0f\xa5\x03", true},          /* shld */
		{"\xff\x33", true},              /* push */
		{"\xff\x13", true},              /* call */
		{"\x0f\x02\x03", false},         /* lar */
		{"\x0f\xb2\x03", true},          /* lss */
		{"\xc4\xe2\x78\xf3\x0b", false}, /* blsr */
	};

	for (unsigned i = 0; i < KL_ARRAY_SIZE(t); i++) {
		uint8_t bytes[16] = {0};
		struct kl_decode d;
		struct kl_op op;

		memcpy(bytes, t[i].bytes, strlen(t[i].bytes));
		assert_int_equal(kl_decode_one(&d, &op, KL_CODE64, 0, bytes, 15), KL_DECODE_OK);
		if (!!(op.flags & KL_OPF_MMIO_OK) != t[i].mmio)
			fail_msg("entry %u: %02x %02x %02x", i, bytes[0], bytes[1], bytes[2]);
	}
}

/* Operands of system instructions, as insn.h promises them to their handlers. */
static void test_system_operands(void **state)
{
	static const struct {
		const char *bytes;
		unsigned len;
		enum kl_code_mode mode;
		kl_op_fn *fn;
		uint8_t reg, rm, opsize;
		uint64_t imm;
	} t[] = {
#define ANY 0xfe
		{"\x0f\x22\xd8", 3, KL_CODE64, kl_op_mov_to_cr, 3, 0, 8, 0},
		{"\x41\x0f\x20\xc4", 4, KL_CODE64, kl_op_mov_from_cr, 0, 8 * 12, 8, 0},
		{"\x44\x0f\x22\xc1", 4, KL_CODE64, kl_op_mov_to_cr, 8, 8, 8, 0},
		{"\x0f\x23\xf8", 3, KL_CODE32, kl_op_mov_to_dr, 7, 0, 4, 0},
		{"\x8e\xd8", 2, KL_CODE64, kl_op_mov_to_sreg, KL_DS, 0, ANY, 0},
		{"\x8e\x13", 2, KL_CODE64, kl_op_mov_to_sreg, KL_SS, KL_NOREG, 2, 0},
		{"\x48\x8c\xc9", 3, KL_CODE64, kl_op_mov_from_sreg, KL_CS, 8, 8, 0},
		{"\x8c\x0b", 2, KL_CODE64, kl_op_mov_from_sreg, KL_CS, KL_NOREG, 2, 0},
		{"\x0f\xa0", 2, KL_CODE64, kl_op_push_sreg, KL_FS, ANY, 8, 0},
		{"\x1e", 1, KL_CODE16, kl_op_push_sreg, KL_DS, ANY, 2, 0},
		{"\xec", 1, KL_CODE64, kl_op_in, 0, 8 * KL_RDX, 1, 0},
		{"\xe5\x60", 2, KL_CODE64, kl_op_in, 0, KL_NOREG, 4, 0x60},
		{"\xe6\x80", 2, KL_CODE64, kl_op_out, 0, KL_NOREG, 1, 0x80},
		{"\x66\xef", 2, KL_CODE64, kl_op_out, 0, 8 * KL_RDX, 2, 0},
		{"\xf3\x6e", 2, KL_CODE64, kl_op_outs, ANY, ANY, 1, 0},
		{"\x66\x6d", 2, KL_CODE64, kl_op_ins, ANY, ANY, 2, 0},
		{"\xcd\x80", 2, KL_CODE64, kl_op_int_n, ANY, ANY, ANY, 0x80},
		{"\x48\xcf", 2, KL_CODE64, kl_op_iret, ANY, ANY, 8, 0},
		{"\xcf", 1, KL_CODE64, kl_op_iret, ANY, ANY, 4, 0},
		{"\xcf", 1, KL_CODE16, kl_op_iret, ANY, ANY, 2, 0},
		{"\x48\xcb", 2, KL_CODE64, kl_op_far_ret, ANY, ANY, 8, 0},
		{"\xca\x08\x00", 3, KL_CODE32, kl_op_far_ret, ANY, ANY, 4, 8},
		{"\xff\x2b", 2, KL_CODE64, kl_op_far_jmp, ANY, ANY, 4, 0},
		{"\x48\xff\x2b", 3, KL_CODE64, kl_op_far_jmp, ANY, ANY, 8, 0},
		{"\xea\x34\x12\x08\x00", 5, KL_CODE16, kl_op_far_jmp, ANY, ANY, 2, 0x800001234},
		{"\x66\xea\x78\x56\x34\x12\x10\x00", 8, KL_CODE16, kl_op_far_jmp, ANY, ANY, 4,
		 0x1012345678},
		{"\x0f\xb4\x03", 3, KL_CODE64, kl_op_load_far_ptr, 0, ANY, 4, KL_FS},
		{"\x0f\x01\x13", 3, KL_CODE64, kl_op_lgdt, ANY, ANY, 8, 0},
		{"\x0f\x01\x16\x00\x10", 5, KL_CODE16, kl_op_lgdt, ANY, ANY, 2, 0},
		{"\x0f\x00\xd8", 3, KL_CODE64, kl_op_ltr, 0, 0, ANY, 0},
		{"\x0f\x02\xca", 3, KL_CODE64, kl_op_lar, 8, 16, 4, 0},
		{"\x63\xca", 2, KL_CODE32, kl_op_arpl, 8, 16, 2, 0},
		{"\xf3\x48\x0f\xae\xd1", 5, KL_CODE64, kl_op_wrfsbase, 8, 8, 8, 0},
		{"\x48\x0f\x07", 3, KL_CODE64, kl_op_sysret, ANY, ANY, 8, 0},
		{"\x0f\x07", 2, KL_CODE64, kl_op_sysret, ANY, ANY, 4, 0},
		{"\x0f\x05", 2, KL_CODE64, kl_op_syscall, ANY, ANY, ANY, 0},
		{"\x0f\x34", 2, KL_CODE32, kl_op_sysenter, ANY, ANY, ANY, 0},
		{"\x9d", 1, KL_CODE64, kl_op_popf, ANY, ANY, 8, 0},
		{"\x66\x9c", 2, KL_CODE64, kl_op_pushf, ANY, ANY, 2, 0},
		{"\x0f\xae\x03", 3, KL_CODE64, kl_op_fxsave, ANY, ANY, 4, 0},
		{"\x48\x0f\xae\x2b", 4, KL_CODE64, kl_op_xrstor, ANY, ANY, 8, 0},
		{"\x66\x0f\x38\x82\x03", 5, KL_CODE64, kl_op_invpcid, 0, ANY, ANY, 0},
		{"\x0f\x0b", 2, KL_CODE64, kl_op_ud, ANY, ANY, ANY, 0},
		{"\x0f\x01\xd9", 3, KL_CODE64, kl_op_vmmcall, ANY, ANY, ANY, 0},
		{"\x0f\x01\xc1", 3, KL_CODE64, kl_op_vmcall, ANY, ANY, ANY, 0},
	};

	for (unsigned i = 0; i < KL_ARRAY_SIZE(t); i++) {
		uint8_t bytes[16] = {0};
		struct kl_decode d;
		struct kl_op op;

		memcpy(bytes, t[i].bytes, t[i].len);
		assert_int_equal(kl_decode_one(&d, &op, t[i].mode, 0, bytes, 15), KL_DECODE_OK);
		if (op.fn != t[i].fn || op.len != t[i].len ||
		    (t[i].reg != ANY && op.reg != t[i].reg) ||
		    (t[i].rm != ANY && op.rm != t[i].rm) ||
		    (t[i].opsize != ANY && op.opsize != t[i].opsize) || op.imm != t[i].imm)
			fail_msg("entry %u: fn %d len %u reg %u rm %u opsize %u imm %#lx", i,
				 op.fn == t[i].fn, op.len, op.reg, op.rm, op.opsize, op.imm);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_emulator_table),
		cmocka_unit_test(test_system_operands),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
