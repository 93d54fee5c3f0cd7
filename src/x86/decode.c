/* SPDX-License-Identifier: MIT */
/*
 * Bytes to a struct kl_op: Zydis decodes, this file turns its operands into kl_op's and lets
 * the instruction families pick a handler. What no family takes is an emulation failure;
 * what is no instruction is #UD.
 */
#include <string.h>

#include "host/cpu.h"
#include "x86/decode.h"

kl_op_fn kl_op_unsupported, kl_op_too_long;

enum kl_next kl_op_unsupported(struct kl_vcpu *v, const struct kl_op *op)
{
	kl_emulation_failure(v);
}

enum kl_next kl_op_too_long(struct kl_vcpu *v, const struct kl_op *op)
{
	kl_raise_error(v, KL_EXC_GP, 0);
}

static const ZydisDecoder *decoder(enum kl_code_mode mode)
{
	static _Thread_local ZydisDecoder dec[3];
	static _Thread_local bool ready;
	static const struct {
		ZydisMachineMode machine;
		ZydisStackWidth stack;
	} modes[3] = {
		[KL_CODE16] = {ZYDIS_MACHINE_MODE_LEGACY_16, ZYDIS_STACK_WIDTH_16},
		[KL_CODE32] = {ZYDIS_MACHINE_MODE_LEGACY_32, ZYDIS_STACK_WIDTH_32},
		[KL_CODE64] = {ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64},
	};

	if (!ready) {
		for (unsigned i = 0; i < 3; i++) {
			ZydisDecoderInit(&dec[i], modes[i].machine, modes[i].stack);
			/* Without these features their encodings are NOPs. */
			ZydisDecoderEnableMode(&dec[i], ZYDIS_DECODER_MODE_MPX, ZYAN_FALSE);
			ZydisDecoderEnableMode(&dec[i], ZYDIS_DECODER_MODE_CET, ZYAN_FALSE);
			/* Near branches of 64-bit code: does the operand-size prefix count? */
			ZydisDecoderEnableMode(&dec[i], ZYDIS_DECODER_MODE_AMD_BRANCHES,
					       !kl_host_is_intel());
		}
		ready = true;
	}
	return &dec[mode];
}

/* Byte offset into gpr[], or KL_NOREG if it is another kind of register. */
static uint8_t gpr_offset(ZydisRegister r)
{
	if (r >= ZYDIS_REGISTER_AL && r <= ZYDIS_REGISTER_BL)
		return (uint8_t)(8 * (r - ZYDIS_REGISTER_AL));
	if (r >= ZYDIS_REGISTER_AH && r <= ZYDIS_REGISTER_BH)
		return (uint8_t)(8 * (r - ZYDIS_REGISTER_AH) + 1);
	if (r >= ZYDIS_REGISTER_SPL && r <= ZYDIS_REGISTER_R15B)
		return (uint8_t)(8 * (r - ZYDIS_REGISTER_SPL + KL_RSP));
	if (r >= ZYDIS_REGISTER_AX && r <= ZYDIS_REGISTER_R15W)
		return (uint8_t)(8 * (r - ZYDIS_REGISTER_AX));
	if (r >= ZYDIS_REGISTER_EAX && r <= ZYDIS_REGISTER_R15D)
		return (uint8_t)(8 * (r - ZYDIS_REGISTER_EAX));
	if (r >= ZYDIS_REGISTER_RAX && r <= ZYDIS_REGISTER_R15)
		return (uint8_t)(8 * (r - ZYDIS_REGISTER_RAX));
	return KL_NOREG;
}

static uint8_t seg_number(ZydisRegister r)
{
	return r >= ZYDIS_REGISTER_ES && r <= ZYDIS_REGISTER_GS ? (uint8_t)(r - ZYDIS_REGISTER_ES)
								: KL_DS;
}

static uint8_t seg_override(const ZydisDecodedInstruction *in)
{
	return in->attributes & ZYDIS_ATTRIB_HAS_SEGMENT_ES   ? KL_ES
	       : in->attributes & ZYDIS_ATTRIB_HAS_SEGMENT_CS ? KL_CS
	       : in->attributes & ZYDIS_ATTRIB_HAS_SEGMENT_SS ? KL_SS
	       : in->attributes & ZYDIS_ATTRIB_HAS_SEGMENT_FS ? KL_FS
	       : in->attributes & ZYDIS_ATTRIB_HAS_SEGMENT_GS ? KL_GS
							      : KL_DS;
}

static void memory_operand(struct kl_decode *d, const ZydisDecodedOperand *o, uint64_t next_rip)
{
	struct kl_op *op = d->op;
	uint8_t r;

	op->flags |= KL_OPF_MEM;
	op->seg = seg_number(o->mem.segment);
	op->disp = o->mem.disp.has_displacement ? o->mem.disp.value : 0;
	op->base = KL_NOREG;
	if (o->mem.base == ZYDIS_REGISTER_RIP || o->mem.base == ZYDIS_REGISTER_EIP) {
		/* Code is cached by its linear address, which is rip in 64-bit mode. */
		op->disp += (int64_t)next_rip;
	} else if ((r = gpr_offset(o->mem.base)) != KL_NOREG) {
		op->base = r / 8;
	}
	op->index = KL_NOREG;
	if ((r = gpr_offset(o->mem.index)) != KL_NOREG) {
		op->index = r / 8;
		op->scale = o->mem.scale == 8 ? 3 : o->mem.scale == 4 ? 2 : o->mem.scale == 2;
	}
}

static enum kl_form form_of(const ZydisDecodedOperand *o, unsigned n)
{
	static const enum kl_form two[3][3] = {
		/* register, memory, immediate as the second */
		{KL_FORM_RR, KL_FORM_RM, KL_FORM_RI},
		{KL_FORM_MR, KL_FORM_OTHER, KL_FORM_MI},
		{KL_FORM_OTHER, KL_FORM_OTHER, KL_FORM_OTHER},
	};
	static const enum kl_form one[3] = {KL_FORM_R, KL_FORM_M, KL_FORM_I};
	unsigned kind[2] = {0};

	if (n == 0 || n > 2)
		return n ? KL_FORM_OTHER : KL_FORM_NONE;
	for (unsigned i = 0; i < n; i++) {
		switch (o[i].type) {
		case ZYDIS_OPERAND_TYPE_REGISTER:
			if (gpr_offset(o[i].reg.value) == KL_NOREG)
				return KL_FORM_OTHER;
			kind[i] = 0;
			break;
		case ZYDIS_OPERAND_TYPE_MEMORY:
			kind[i] = 1;
			break;
		case ZYDIS_OPERAND_TYPE_IMMEDIATE:
			kind[i] = 2;
			break;
		default:
			return KL_FORM_OTHER;
		}
	}
	return n == 1 ? one[kind[0]] : two[kind[0]][kind[1]];
}

static void operands(struct kl_decode *d, uint64_t next_rip)
{
	const ZydisDecodedInstruction *in = &d->in;
	struct kl_op *op = d->op;
	unsigned n = in->operand_count_visible, width = in->operand_width / 8;

	op->reg = op->rm = op->base = op->index = KL_NOREG;
	op->seg = seg_override(in);
	for (unsigned i = 0; i < n; i++) {
		const ZydisDecodedOperand *o = &d->opnd[i];
		uint8_t r;

		switch (o->type) {
		case ZYDIS_OPERAND_TYPE_REGISTER:
			r = gpr_offset(o->reg.value);
			if (op->reg == KL_NOREG)
				op->reg = r;
			else if (op->rm == KL_NOREG)
				op->rm = r;
			break;
		case ZYDIS_OPERAND_TYPE_MEMORY:
			memory_operand(d, o, next_rip);
			if (i == 0 && (o->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE))
				op->flags |= KL_OPF_MEM_DST;
			break;
		case ZYDIS_OPERAND_TYPE_IMMEDIATE:
			op->imm = o->imm.value.u;
			break;
		default:
			break;
		}
	}
	for (unsigned i = n; i < in->operand_count; i++)
		if (d->opnd[i].type == ZYDIS_OPERAND_TYPE_MEMORY &&
		    d->opnd[i].mem.segment == ZYDIS_REGISTER_SS)
			op->flags |= KL_OPF_STACK;
	if (n && d->opnd[0].type != ZYDIS_OPERAND_TYPE_IMMEDIATE && d->opnd[0].size &&
	    d->opnd[0].type != ZYDIS_OPERAND_TYPE_POINTER)
		width = d->opnd[0].size / 8;
	op->opsize = (uint8_t)width;
	d->size2 = width == 1 ? 0 : width == 2 ? 1 : width == 4 ? 2 : 3;
	d->form = form_of(d->opnd, n);
}

static void prefixes(struct kl_decode *d)
{
	const ZydisDecodedInstruction *in = &d->in;

	if (in->attributes & ZYDIS_ATTRIB_HAS_LOCK)
		d->op->flags |= KL_OPF_LOCK;
	for (unsigned i = 0; i < in->raw.prefix_count; i++) {
		uint16_t *f = &d->op->flags;

		if (in->raw.prefixes[i].value == 0xf3)
			*f = (uint16_t)((*f & ~KL_OPF_REPNE) | KL_OPF_REP);
		else if (in->raw.prefixes[i].value == 0xf2)
			*f = (uint16_t)((*f & ~KL_OPF_REP) | KL_OPF_REPNE);
	}
}

static bool pick(struct kl_decode *d)
{
	/* Zydis knows VEX forms of POPCNT and others that no processor of this kind has. */
	if (d->in.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY)
		return kl_select_avx(d) || kl_select_sse(d);
	return kl_select_alu(d) || kl_select_mov(d) || kl_select_branch(d) || kl_select_stack(d) ||
	       kl_select_shift(d) || kl_select_mul(d) || kl_select_bit(d) || kl_select_atomic(d) ||
	       kl_select_string(d) || kl_select_misc(d) || kl_select_system(d) ||
	       kl_select_mmx(d) || kl_select_sse(d) || kl_select_x87(d);
}

/*
 * Part of what GET_SUPPORTED_CPUID offers, or of every processor. The encodings of extensions
 * that are not are no instructions.
 */
static bool offered(const struct kl_decode *d)
{
	switch (d->in.meta.isa_ext) {
	case ZYDIS_ISA_EXT_BASE:
	case ZYDIS_ISA_EXT_LONGMODE:
	case ZYDIS_ISA_EXT_X87:
	case ZYDIS_ISA_EXT_MMX:
		return d->in.encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY;
	default:
		return kl_host_has(d);
	}
}

/* Each prefix @old becomes @new. */
static void replace_prefix(uint8_t *bytes, const ZydisDecodedInstruction *in, uint8_t old,
			   uint8_t new)
{
	for (unsigned i = 0; i < in->raw.prefix_count; i++)
		if (in->raw.prefixes[i].value == old)
			bytes[i] = new;
}

/* What Zydis 4.0 makes of some encodings is not what processors do. */
static ZyanStatus decode(struct kl_decode *d, const uint8_t *bytes, unsigned len)
{
	const ZydisDecoder *dec = decoder(d->mode);
	ZyanStatus status = ZydisDecoderDecodeFull(dec, bytes, len, &d->in, d->opnd);
	ZydisDecodedInstruction *in = &d->in;
	uint8_t copy[15];

	if (!ZYAN_SUCCESS(status))
		return status;
	if (in->mnemonic == ZYDIS_MNEMONIC_PAUSE && in->raw.rex.B && !kl_host_is_intel()) {
		/* XCHG R8, rAX on AMD's processors */
		memcpy(copy, bytes, in->length);
		replace_prefix(copy, in, 0xf3, 0x3e);
		return ZydisDecoderDecodeFull(dec, copy, in->length, in, d->opnd);
	}
	if (in->opcode_map == ZYDIS_OPCODE_MAP_0F && in->opcode == 0x0d && in->raw.modrm.mod == 3 &&
	    !kl_host_is_intel())
		return ZYDIS_STATUS_DECODING_ERROR; /* PREFETCHW of a register */
	if ((in->mnemonic == ZYDIS_MNEMONIC_VPEXTRD || in->mnemonic == ZYDIS_MNEMONIC_VPINSRD) &&
	    in->raw.vex.W && d->mode != KL_CODE64 && !kl_host_is_intel())
		return ZYDIS_STATUS_DECODING_ERROR;
	/* A SIB byte without base, whatever REX.B says */
	if (in->address_width == 32 && (in->attributes & ZYDIS_ATTRIB_HAS_SIB) &&
	    in->raw.modrm.mod == 0 && in->raw.sib.base == 5) {
		for (unsigned i = 0; i < in->operand_count_visible; i++) {
			ZydisDecodedOperandMem *m = &d->opnd[i].mem;

			if (d->opnd[i].type != ZYDIS_OPERAND_TYPE_MEMORY ||
			    m->base != ZYDIS_REGISTER_R13D)
				continue;
			m->base = ZYDIS_REGISTER_NONE;
			m->disp.has_displacement = ZYAN_TRUE;
			m->disp.value = in->raw.disp.value;
		}
	}
	return status;
}

/* UD0 and UD1, of which AMD's processors need no more than the opcode. */
static bool is_ud(const uint8_t *bytes, unsigned len, enum kl_code_mode mode)
{
	static const uint8_t prefixes[] = {0x66, 0x67, 0xf0, 0xf2, 0xf3, 0x26,
					   0x2e, 0x36, 0x3e, 0x64, 0x65};
	unsigned i = 0;

	while (i < len && (memchr(prefixes, bytes[i], sizeof(prefixes)) ||
			   (mode == KL_CODE64 && (bytes[i] & 0xf0) == 0x40)))
		i++;
	return i + 1 < len && bytes[i] == 0x0f && (bytes[i + 1] == 0xff || bytes[i + 1] == 0xb9) &&
	       !kl_host_is_intel();
}

void kl_number_registers(struct kl_decode *d)
{
	uint8_t *to = &d->op->reg;

	for (unsigned i = 0; i < 2; i++) {
		const ZydisDecodedOperand *o = &d->opnd[i];

		if (o->type != ZYDIS_OPERAND_TYPE_REGISTER)
			continue;
		*to = kl_register_number(o);
		if (kl_is_gpr(o))
			*to = (uint8_t)(8 * *to);
		to = &d->op->rm;
	}
}

bool kl_select_move(struct kl_decode *d, kl_op_fn *fn)
{
	d->op->fn = fn;
	d->op->imm = 0;
	d->stores = d->opnd[0].type == ZYDIS_OPERAND_TYPE_MEMORY;
	return true;
}

enum kl_decode_result kl_decode_one(struct kl_decode *d, struct kl_op *op, enum kl_code_mode mode,
				    uint64_t rip, const uint8_t *bytes, unsigned len)
{
	ZyanStatus status;

	memset(op, 0, sizeof(*op));
	d->op = op;
	d->mode = mode;
	d->noflags = NULL;
	d->simple = d->writes_flags = d->reads_flags = d->stores = false;
	status = decode(d, bytes, len);
	if (status == ZYDIS_STATUS_NO_MORE_DATA && is_ud(bytes, len, mode))
		status = ZYDIS_STATUS_DECODING_ERROR;
	if (status == ZYDIS_STATUS_NO_MORE_DATA && len < 15)
		return KL_DECODE_TRUNCATED;
	memcpy(op->bytes, bytes, kl_min(len, 15u));
	if (!ZYAN_SUCCESS(status)) {
		op->fn = status == ZYDIS_STATUS_INSTRUCTION_TOO_LONG ? kl_op_too_long : kl_op_ud;
		op->len = (uint8_t)kl_min(len, 15u); /* it depends on as many bytes */
		op->flags = KL_OPF_END;
		op->base = op->index = op->reg = op->rm = KL_NOREG;
		d->reads_flags = true;
		return KL_DECODE_OK;
	}
	op->len = d->in.length;
	op->addrsize = d->in.address_width / 8;
	op->mnemonic = (uint16_t)d->in.mnemonic;
	operands(d, rip + op->len);
	prefixes(d);
	if (kl_emulator_decodes(&d->in))
		op->flags |= KL_OPF_MMIO_OK;
	if (!pick(d) || !op->fn) {
		op->fn = offered(d) ? kl_op_unsupported : kl_op_ud;
		op->flags |= KL_OPF_END;
		d->simple = d->writes_flags = false;
		d->noflags = NULL;
	}
	return KL_DECODE_OK;
}
