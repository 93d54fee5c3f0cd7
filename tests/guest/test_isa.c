/* SPDX-License-Identifier: MIT */
/*
 * The whole opcode space, in all modes: an instruction that CPUID offers has a handler, none ends
 * in an emulation failure, and what no guest can use up is the room for native thunks.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "fuzz/fuzz.h"
#include "mem/notifier_gate.h"
#include "x86/decode.h"

static struct kl_x86_vm *vm;
static struct kl_vcpu *vcpu;

enum { EAX, EBX, ECX, EDX };

/* Instructions of the system, which isa.c does not speak of. */
static bool system_offered(ZydisISASet set)
{
	switch (set) {
	case ZYDIS_ISA_SET_SMAP:
		return isa_has(7, 0, EBX, 20);
	case ZYDIS_ISA_SET_INVPCID:
		return isa_has(7, 0, EBX, 10);
	case ZYDIS_ISA_SET_RDSEED:
		return isa_has(7, 0, EBX, 18);
	case ZYDIS_ISA_SET_RDRAND:
		return isa_has(1, 0, ECX, 30);
	case ZYDIS_ISA_SET_RDPID:
		return isa_has(7, 0, ECX, 22);
	case ZYDIS_ISA_SET_RDTSCP:
		return isa_has(0x80000001, 0, EDX, 27);
	case ZYDIS_ISA_SET_XSAVES:
		return isa_has(0xd, 1, EAX, 3);
	case ZYDIS_ISA_SET_CLZERO:
		return isa_has(0x80000008, 0, EBX, 0);
	case ZYDIS_ISA_SET_PREFETCHWT1:
		return isa_has(0x80000001, 0, ECX, 8);
	default:
		return false;
	}
}

/* #UD by definition, or on AMD's processors only, which Zydis does not ask about. */
static bool undefined(const ZydisDecodedInstruction *in)
{
	if (in->mnemonic == ZYDIS_MNEMONIC_VPEXTRD || in->mnemonic == ZYDIS_MNEMONIC_VPINSRD)
		return in->raw.vex.W && in->machine_mode != ZYDIS_MACHINE_MODE_LONG_64;
	return in->mnemonic == ZYDIS_MNEMONIC_UD0 || in->mnemonic == ZYDIS_MNEMONIC_UD1 ||
	       in->mnemonic == ZYDIS_MNEMONIC_UD2 ||
	       (in->meta.isa_set == ZYDIS_ISA_SET_PREFETCH_NOP && in->raw.modrm.mod == 3);
}

static unsigned nr_instructions, nr_bad;
static uint8_t seen[ZYDIS_MNEMONIC_MAX_VALUE + 1];

/* A handler, or a reason for #UD. */
static void look(const uint8_t *bytes, enum kl_code_mode mode)
{
	struct kl_decode d;
	struct kl_op op;
	char text[96];

	if (kl_decode_one(&d, &op, mode, 0x1000, bytes, 15) != KL_DECODE_OK ||
	    op.fn == kl_op_too_long)
		return;
	if (!ZYAN_SUCCESS(ZydisDecoderDecodeFull(isa_decoder(mode), bytes, 15, &d.in, d.opnd)))
		return;
	nr_instructions++;
	if (op.fn != kl_op_unsupported &&
	    (op.fn != kl_op_ud || undefined(&d.in) ||
	     !(isa_offered(d.in.meta.isa_set) || system_offered(d.in.meta.isa_set))))
		return;
	nr_bad++;
	if (seen[d.in.mnemonic]++)
		return;
	for (unsigned i = 0; i < d.in.length; i++)
		snprintf(text + 3 * i, 4, "%02x ", bytes[i]);
	print_message("# %s: %s(%s, %s, %u bits)\n",
		      op.fn == kl_op_ud ? "offered, but #UD" : "no handler", text,
		      ZydisMnemonicGetString(d.in.mnemonic),
		      ZydisISASetGetString(d.in.meta.isa_set), 16u << mode);
}

/* Opcodes whose r/m field selects an instruction. */
static bool whole_modrm(unsigned map, unsigned opcode)
{
	return map == 0 ? (opcode & 0xf8) == 0xd8
			: map == 1 && (opcode == 0x01 || opcode == 0xae || opcode == 0xc7);
}

static void legacy(enum kl_code_mode mode, unsigned map, unsigned opcode, unsigned prefix, bool w)
{
	static const uint8_t prefixes[] = {0, 0x66, 0xf3, 0xf2, 0xf0};

	for (unsigned m = 0; m < 256; m++) {
		uint8_t bytes[16] = {0};
		unsigned n = 0;

		if (!whole_modrm(map, opcode) && (m & 7) != 3)
			continue;
		if (prefix)
			bytes[n++] = prefixes[prefix];
		if (w)
			bytes[n++] = 0x48;
		if (map)
			bytes[n++] = 0x0f;
		if (map >= 2)
			bytes[n++] = map == 2 ? 0x38 : 0x3a;
		bytes[n++] = (uint8_t)opcode;
		bytes[n] = (uint8_t)m;
		look(bytes, mode);
	}
}

static void test_legacy(void **state)
{
	nr_bad = 0;
	for (unsigned i = 0; i < 3 * 4 * 256 * 5 * 2; i++) {
		enum kl_code_mode mode = (enum kl_code_mode)(i % 3);
		unsigned map = i / 3 % 4, prefix = i / 12 % 5, opcode = i / 120;
		bool w = i / 60 % 2;

		if (w && mode != KL_CODE64)
			continue;
		legacy(mode, map, opcode, prefix, w);
	}
	assert_int_equal(nr_bad, 0);
}

/* VEX with each length, W and prefix; EVEX and XOP are no instructions. */
static void test_vex(void **state)
{
	static const uint8_t modrm[] = {0x03, 0x0b, 0x13, 0x1b, 0x23, 0x2b, 0x33, 0x3b, 0xc1,
					0xca, 0xd3, 0xdc, 0xe5, 0xee, 0xf7, 0xf8, 0x04};

	nr_bad = 0;
	for (unsigned i = 0; i < 3 * 3 * 256 * 16 * 2; i++) {
		enum kl_code_mode mode = (enum kl_code_mode)(i % 3);
		unsigned map = i / 3 % 3 + 1, wlpp = i / 9 % 16, opcode = i / 288;
		unsigned vvvv = i / 144 % 2 ? 15 : 10;

		for (unsigned m = 0; m < KL_ARRAY_SIZE(modrm); m++) {
			uint8_t bytes[16] = {0xc4,
					     (uint8_t)(0xe0 | map),
					     (uint8_t)((wlpp & 8) << 4 | vvvv << 3 | (wlpp & 7)),
					     (uint8_t)opcode,
					     modrm[m],
					     0x18};

			look(bytes, mode);
		}
	}
	assert_int_equal(nr_bad, 0);
}

/*
 * Every immediate byte of everything that has one. A guest could do that; after it there must
 * still be room for a thunk of an instruction that nobody has decoded before.
 */
static void test_arena(void **state)
{
	static const uint8_t prefixes[] = {0, 0x66, 0xf3, 0xf2};
	static const uint8_t modrm[] = {0x03, 0x13, 0x23, 0x33, 0xc1, 0xd3, 0xe5, 0xf7};

	nr_bad = 0;
	for (unsigned imm = 0; imm < 256; imm++)
		for (unsigned i = 0; i < 2 * 256 * 4 * 2; i++) {
			unsigned map = i & 1 ? 3 : 1, opcode = i / 16 % 256, p = i / 2 % 4;

			if (map == 1 && !(opcode >= 0x70 && opcode <= 0x73) && opcode != 0xc2 &&
			    (opcode < 0xc4 || opcode > 0xc6))
				continue;
			for (unsigned m = 0; m < KL_ARRAY_SIZE(modrm); m++) {
				uint8_t bytes[16] = {0};
				unsigned n = 0, w = i / 8 % 2;

				if (p)
					bytes[n++] = prefixes[p];
				if (w)
					bytes[n++] = 0x48;
				bytes[n++] = 0x0f;
				if (map == 3)
					bytes[n++] = 0x3a;
				bytes[n++] = (uint8_t)opcode;
				bytes[n++] = modrm[m];
				bytes[n] = (uint8_t)imm;
				look(bytes, KL_CODE64);
				for (unsigned l = 0; l < 2; l++) {
					uint8_t vex[16] = {0xc4,
							   (uint8_t)(0xe0 | map),
							   (uint8_t)(w << 7 | 15 << 3 | l << 2 | p),
							   (uint8_t)opcode,
							   modrm[m],
							   (uint8_t)imm};

					look(vex, KL_CODE64);
					vex[2] ^= 2 << 3;
					look(vex, KL_CODE64);
				}
			}
		}
	assert_int_equal(nr_bad, 0);
	look((const uint8_t *)"\x66\x0f\x38\x04\xc1\0\0\0\0\0\0\0\0\0\0", KL_CODE64);
	assert_int_equal(nr_bad, 0);
}

static int setup(void **state)
{
	struct kvm_cpuid_entry2 cpuid[100];
	int n;

	vm = calloc(1, sizeof(*vm));
	if (!vm || kl_x86_vm_init(vm) || kl_x86_vcpu_create(vm, 0, &vcpu))
		return -1;
	n = kl_x86_supported_cpuid(cpuid, 100);
	if (n <= 0 || kl_x86_set_cpuid(vcpu, cpuid, (unsigned)n))
		return -1;
	isa_init(vcpu);
	return 0;
}

static int teardown(void **state)
{
	print_message("# %u instructions\n", nr_instructions);
	kl_notifier_remove_vm(&vm->mem);
	kl_x86_vcpu_destroy(vcpu);
	kl_x86_vm_destroy(vm);
	free(vm);
	return 0;
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_legacy),
		cmocka_unit_test(test_vex),
		cmocka_unit_test(test_arena),
	};

	cmocka_set_test_filter(getenv("KVMLET_TEST"));
	return cmocka_run_group_tests(tests, setup, teardown);
}
