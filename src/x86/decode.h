/* SPDX-License-Identifier: MIT */
/*
 * What decode.c tells the instruction families (ops_*.c), and they tell it.
 *
 * decode.c fills a struct kl_op with operands and then asks each family in turn; the one
 * that knows the mnemonic sets op->fn and says what its handler does to the flags.
 */
#pragma once

#include <Zydis/Zydis.h>

#include "x86/insn.h"

/* Explicit operands. Register operands: dst in op->reg, src in op->rm. With a memory operand
 * the register is op->reg. */
enum kl_form {
	KL_FORM_NONE,
	KL_FORM_R,
	KL_FORM_M,
	KL_FORM_I,
	KL_FORM_RR,
	KL_FORM_RM,
	KL_FORM_MR,
	KL_FORM_RI,
	KL_FORM_MI,
	KL_FORM_OTHER,
};

struct kl_decode {
	ZydisDecodedInstruction in;
	ZydisDecodedOperand opnd[ZYDIS_MAX_OPERAND_COUNT];
	struct kl_op *op;
	enum kl_form form;
	unsigned size2; /* log2 of op->opsize, if it is 1, 2, 4 or 8 */
	enum kl_code_mode mode;

	/* Set by the family. */
	kl_op_fn *noflags; /* the same without flags, or NULL */
	bool simple;       /* leaves early only through its memory operand */
	bool reads_flags;  /* or leaves some unchanged */
	bool writes_flags; /* all of them */
	bool stores;       /* writes memory: the block may have to be left */
};

/* ---- Zydis' operands, for the families ---- */

KL_INLINE bool kl_is_class(const ZydisDecodedOperand *o, ZydisRegisterClass c)
{
	return o->type == ZYDIS_OPERAND_TYPE_REGISTER && ZydisRegisterGetClass(o->reg.value) == c;
}

/* A general register of 32 or 64 bits. */
KL_INLINE bool kl_is_gpr(const ZydisDecodedOperand *o)
{
	return kl_is_class(o, ZYDIS_REGCLASS_GPR32) || kl_is_class(o, ZYDIS_REGCLASS_GPR64);
}

KL_INLINE uint8_t kl_register_number(const ZydisDecodedOperand *o)
{
	return (uint8_t)ZydisRegisterGetId(o->reg.value);
}

/*
 * Register numbers into op->reg and op->rm in the order of the first two operands; of general
 * registers their offsets into gpr[].
 */
void kl_number_registers(struct kl_decode *d);
/* The handler of a move between a register and a register or memory. */
bool kl_select_move(struct kl_decode *d, kl_op_fn *fn);

/* ROL and ROR of a register by op->imm leave OF, which is undefined unless that is 1, as it was. */
bool kl_rotate_keeps_of(const struct kl_decode *d);

/* The decoders: true if the mnemonic is theirs. A form that does not exist is left to fail. */
bool kl_select_alu(struct kl_decode *d);
bool kl_select_mov(struct kl_decode *d);
bool kl_select_shift(struct kl_decode *d);
bool kl_select_mul(struct kl_decode *d);
bool kl_select_bit(struct kl_decode *d);
bool kl_select_atomic(struct kl_decode *d);
bool kl_select_branch(struct kl_decode *d);
bool kl_select_stack(struct kl_decode *d);
bool kl_select_string(struct kl_decode *d);
bool kl_select_avx(struct kl_decode *d);
bool kl_select_sse(struct kl_decode *d);
bool kl_select_mmx(struct kl_decode *d);
bool kl_select_x87(struct kl_decode *d);
bool kl_select_misc(struct kl_decode *d);
bool kl_select_system(struct kl_decode *d);

enum kl_decode_result {
	KL_DECODE_OK,        /* also for instructions that raise #UD or fail */
	KL_DECODE_TRUNCATED, /* more bytes are needed */
};

/* Decode one instruction from @len bytes. */
enum kl_decode_result kl_decode_one(struct kl_decode *d, struct kl_op *op, enum kl_code_mode mode,
				    uint64_t rip, const uint8_t *bytes, unsigned len);

/*
 * The host has the extension of the instruction, one of those that run in thunks: running what
 * it lacks would kill the program (ops_sse.c).
 */
bool kl_host_has(const struct kl_decode *d);

/* U2: KVM 6.12's emulator decodes it. */
bool kl_emulator_decodes(const ZydisDecodedInstruction *in);

kl_op_fn kl_op_unsupported; /* ends in an emulation failure */
kl_op_fn kl_op_too_long;    /* #GP: more than 15 bytes */
