/* SPDX-License-Identifier: MIT */
/*
 * U2: the instructions that KVM 6.12's emulator decodes. Only they may touch memory that KVM
 * would have to emulate (MMIO, reserved guest-physical addresses); the access of another is
 * an emulation failure.
 *
 * One bit per opcode of the one-byte and the 0F map, most significant bit = x0; opcodes of
 * which only some forms are decoded have their bit set and are looked at again below.
 */
#include "x86/decode.h"

#define ROW(a, b) ((uint16_t)((a) << 8 | (b)))

static const uint16_t one_byte[16] = {
	ROW(0xff, 0xfe), /* 0x: ADD, PUSH/POP ES, OR, PUSH CS */
	ROW(0xff, 0xff), /* 1x: ADC, SBB, PUSH/POP SS and DS */
	ROW(0xfc, 0xfd), /* 2x: AND, SUB, DAS */
	ROW(0xfc, 0xfc), /* 3x: XOR, CMP */
	ROW(0xff, 0xff), /* 4x: INC, DEC */
	ROW(0xff, 0xff), /* 5x: PUSH, POP */
	ROW(0xd0, 0xff), /* 6x: PUSHA, POPA, MOVSXD, PUSH imm, IMUL, INS, OUTS */
	ROW(0xff, 0xff), /* 7x: Jcc */
	ROW(0xff, 0xff), /* 8x: group 1, TEST, XCHG, MOV, LEA, POP */
	ROW(0xff, 0xef), /* 9x: XCHG, CBW, CWD, far CALL, PUSHF ... not FWAIT */
	ROW(0xff, 0xff), /* Ax: MOV moffs, MOVS, CMPS, TEST, STOS, LODS, SCAS */
	ROW(0xff, 0xff), /* Bx: MOV imm */
	ROW(0xff, 0xff), /* Cx: shifts, RET, LES, LDS, MOV imm, ENTER ... IRET */
	ROW(0xff, 0x54), /* Dx: shifts, AAM ... XLAT; D9, DB, DD in part */
	ROW(0xff, 0xff), /* Ex: LOOP, IN, OUT, CALL, JMP */
	ROW(0x4f, 0xff), /* Fx: INT1, HLT, CMC, group 3, flags, groups 4 and 5 */
};

static const uint16_t two_byte[16] = {
	ROW(0xc6, 0xc4), /* 0x: groups 6 and 7, SYSCALL, CLTS, INVD, WBINVD, PREFETCHW */
	ROW(0xc0, 0xcf), /* 1x: MOVUPS; PREFETCH and NOPs, not 1A and 1B */
	ROW(0xf0, 0xd0), /* 2x: MOV CR and DR, MOVAPS, MOVNTPS */
	ROW(0xfc, 0x00), /* 3x: WRMSR RDTSC RDMSR RDPMC SYSENTER SYSEXIT */
	ROW(0xff, 0xff), /* 4x: CMOVcc */
	ROW(0x00, 0x00), /* 5x */
	ROW(0x00, 0x01), /* 6x: MOVQ, MOVDQA */
	ROW(0x00, 0x01), /* 7x: MOVQ, MOVDQA */
	ROW(0xff, 0xff), /* 8x: Jcc */
	ROW(0xff, 0xff), /* 9x: SETcc */
	ROW(0xfc, 0xff), /* Ax: PUSH/POP FS and GS, CPUID, BT, SHLD, SHRD, group 15, IMUL */
	ROW(0xff, 0x3f), /* Bx: CMPXCHG, LSS ... MOVZX, group 8, BTC, BSF, BSR, MOVSX */
	ROW(0xd1, 0xff), /* Cx: XADD, MOVNTI, group 9, BSWAP */
	ROW(0x00, 0x00), /* Dx */
	ROW(0x01, 0x00), /* Ex: MOVNTDQ */
	ROW(0x00, 0x00), /* Fx */
};

static bool bit(const uint16_t *map, unsigned opcode)
{
	return map[opcode >> 4] >> (15 - (opcode & 15)) & 1;
}

/* The prefix that selects among an opcode's SIMD forms: 0, 0x66, 0xf2 or 0xf3. */
static unsigned simd_prefix(const ZydisDecodedInstruction *in)
{
	unsigned p = 0;

	for (unsigned i = 0; i < in->raw.prefix_count; i++) {
		unsigned v = in->raw.prefixes[i].value;

		if (v == 0xf2 || v == 0xf3 || (v == 0x66 && !p))
			p = v;
	}
	return p;
}

static bool one_byte_form(const ZydisDecodedInstruction *in)
{
	unsigned reg = in->raw.modrm.reg;
	bool mem = in->raw.modrm.mod != 3;
	bool code64 = in->machine_mode == ZYDIS_MACHINE_MODE_LONG_64;

	switch (in->opcode) {
	case 0x63:
		return code64;
	case 0x8f: /* POP */
	case 0xc6:
	case 0xc7: /* MOV */
		return reg == 0;
	case 0xd9: /* FNSTCW */
	case 0xdd: /* FNSTSW */
		return mem && reg == 7;
	case 0xdb: /* FNINIT */
		return !mem && reg == 4 && in->raw.modrm.rm == 3;
	case 0xfe:
		return reg < 2;
	case 0xff:
		return reg < 7;
	default:
		return true;
	}
}

static bool two_byte_form(const ZydisDecodedInstruction *in)
{
	unsigned reg = in->raw.modrm.reg, prefix = simd_prefix(in);
	bool mem = in->raw.modrm.mod != 3;

	switch (in->opcode) {
	case 0x00: /* SLDT STR LLDT LTR */
		return reg < 4;
	case 0x01: /* SGDT SIDT LGDT LIDT SMSW LMSW INVLPG; VMCALL and VMMCALL */
		return mem ? reg != 5 : in->raw.modrm.rm == 1 && (reg == 0 || reg == 3);
	case 0x10:
	case 0x11:
	case 0x28:
	case 0x29:
		return prefix == 0 || prefix == 0x66;
	case 0x2b:
		return mem && (prefix == 0 || prefix == 0x66);
	case 0x6f:
	case 0x7f:
		return prefix != 0xf2;
	case 0xe7:
		return prefix == 0x66;
	case 0xae: /* FXSAVE FXRSTOR CLFLUSH CLFLUSHOPT */
		return mem && (reg < 2 || (reg == 7 && (prefix == 0 || prefix == 0x66)));
	case 0xba: /* BT BTS BTR BTC imm */
		return reg >= 4;
	case 0xc3:
		return mem;
	case 0xc7: /* CMPXCHG8B; 16B it decodes and refuses */
		return mem && reg == 1 && !in->raw.rex.W;
	default:
		return true;
	}
}

bool kl_emulator_decodes(const ZydisDecodedInstruction *in)
{
	unsigned prefix;

	if (in->encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY)
		return false;
	switch (in->opcode_map) {
	case ZYDIS_OPCODE_MAP_DEFAULT:
		return bit(one_byte, in->opcode) && one_byte_form(in);
	case ZYDIS_OPCODE_MAP_0F:
		return bit(two_byte, in->opcode) && two_byte_form(in);
	case ZYDIS_OPCODE_MAP_0F38: /* MOVBE */
		prefix = simd_prefix(in);
		return (in->opcode == 0xf0 || in->opcode == 0xf1) &&
		       (prefix == 0 || prefix == 0x66) && in->raw.modrm.mod != 3;
	default:
		return false;
	}
}
