/* SPDX-License-Identifier: MIT */
/* A small assembler, and which host register holds what. */
#pragma once

#include <string.h>

#include "x86/insn.h"
#include "x86/xlate/xlate.h"

enum kl_host_reg {
	H_RAX,
	H_RCX,
	H_RDX,
	H_RBX,
	H_RSP,
	H_RBP,
	H_RSI,
	H_RDI,
	H_R8,
	H_R9,
	H_R10,
	H_R11,
	H_R12,
	H_R13,
	H_R14,
	H_R15,
	H_NONE = 0xff
};

/* Scratch registers; flags go through the first. And the vCPU: its gpr[] is KL_BIAS before it. */
#define H_S0    H_RAX
#define H_S1    H_R14
#define H_CTX   H_R15
#define KL_BIAS 128

#define KL_CTX(field) \
	((int32_t)(offsetof(struct kl_vcpu, field) - offsetof(struct kl_vcpu, gpr)) - KL_BIAS)
#define KL_CTX_GPR(n) ((int32_t)(8 * (n)) - KL_BIAS)

/* Guest registers: the host's, or H_NONE: in gpr[]. */
extern const uint8_t kl_host_of[16];

struct kl_emit {
	uint8_t *p, *end;
	int64_t to_rx; /* from where it is written to where it is executed */
};

KL_INLINE const uint8_t *kl_here(const struct kl_emit *e)
{
	return e->p + e->to_rx;
}

KL_INLINE void kl_e8(struct kl_emit *e, unsigned x)
{
	*e->p++ = (uint8_t)x;
}

KL_INLINE void kl_e32(struct kl_emit *e, uint32_t x)
{
	memcpy(e->p, &x, 4);
	e->p += 4;
}

KL_INLINE void kl_e64(struct kl_emit *e, uint64_t x)
{
	memcpy(e->p, &x, 8);
	e->p += 8;
}

/* An operand in memory: [base + index << scale + disp]; index H_NONE: none. */
struct kl_mem {
	uint8_t base, index, scale;
	int32_t disp;
};

#define KL_AT(b, d) ((struct kl_mem){.base = (b), .index = H_NONE, .disp = (d)})

/* Opcodes: two bytes are 0F xx, three 0F38xx or 0F3Axx; a prefix 66, F2, F3 in bits 24..31. */
#define KL_P66 0x66000000u
#define KL_PF2 0xf2000000u
#define KL_PF3 0xf3000000u

KL_INLINE void kl_e_opcode(struct kl_emit *e, unsigned op, unsigned rex, bool force)
{
	if (op >> 24)
		kl_e8(e, op >> 24);
	if (rex || force)
		kl_e8(e, 0x40 | rex);
	if (op >> 16 & 0xff)
		kl_e8(e, op >> 16 & 0xff);
	if (op >> 8 & 0xff)
		kl_e8(e, op >> 8 & 0xff);
	kl_e8(e, op & 0xff);
}

/* Of general operands: the byte form is @op & ~1, if the opcode has one. */
KL_INLINE unsigned kl_sized(struct kl_emit *e, unsigned op, unsigned size, unsigned *rex)
{
	if (size == 2)
		kl_e8(e, 0x66);
	if (size == 8)
		*rex |= 8;
	return size == 1 ? op & ~1u : op;
}

/* @size 0: neither a prefix nor REX.W nor a byte form. */
KL_INLINE void kl_e_rr(struct kl_emit *e, unsigned op, unsigned size, unsigned reg, unsigned rm)
{
	unsigned rex = (reg >> 3) << 2 | rm >> 3;
	bool force = size == 1 && (reg >= 4 || rm >= 4);

	op = kl_sized(e, op, size, &rex);
	kl_e_opcode(e, op, rex, force);
	kl_e8(e, 0xc0 | (reg & 7) << 3 | (rm & 7));
}

/* The same opcode whatever the size, of a byte operand as source or a /n. */
KL_INLINE void kl_e_rr_byte(struct kl_emit *e, unsigned op, bool wide, unsigned reg, unsigned rm)
{
	kl_e_opcode(e, op, (wide ? 8u : 0u) | (reg >> 3) << 2 | rm >> 3, rm >= 4);
	kl_e8(e, 0xc0 | (reg & 7) << 3 | (rm & 7));
}

KL_INLINE void kl_e_modrm_mem(struct kl_emit *e, unsigned reg, struct kl_mem m)
{
	unsigned mod = !m.disp && (m.base & 7) != 5 ? 0 : m.disp == (int8_t)m.disp ? 1 : 2;

	if (m.base == H_NONE) { /* index and disp32, or disp32 alone */
		kl_e8(e, (reg & 7) << 3 | 4);
		kl_e8(e, (unsigned)m.scale << 6 | (m.index == H_NONE ? 4u : m.index & 7u) << 3 | 5);
		kl_e32(e, (uint32_t)m.disp);
		return;
	}
	if (m.index != H_NONE || (m.base & 7) == 4) {
		kl_e8(e, mod << 6 | (reg & 7) << 3 | 4);
		kl_e8(e, (unsigned)m.scale << 6 | (m.index == H_NONE ? 4u : m.index & 7u) << 3 |
				 (m.base & 7));
	} else {
		kl_e8(e, mod << 6 | (reg & 7) << 3 | (m.base & 7));
	}
	if (mod == 1)
		kl_e8(e, (uint8_t)m.disp);
	else if (mod == 2)
		kl_e32(e, (uint32_t)m.disp);
}

KL_INLINE unsigned kl_rex_mem(unsigned reg, struct kl_mem m)
{
	return (reg >> 3) << 2 | (m.index == H_NONE ? 0 : m.index >> 3 << 1) |
	       (m.base == H_NONE ? 0 : m.base >> 3);
}

KL_INLINE void kl_e_rm(struct kl_emit *e, unsigned op, unsigned size, unsigned reg, struct kl_mem m)
{
	unsigned rex = kl_rex_mem(reg, m);
	bool force = size == 1 && reg >= 4;

	op = kl_sized(e, op, size, &rex);
	kl_e_opcode(e, op, rex, force);
	kl_e_modrm_mem(e, reg, m);
}

/* What VEX has of an instruction's opcode; map as Zydis numbers them. */
struct kl_vex {
	uint8_t map, pp, w, l;
};

#define KL_VEX_0F   1
#define KL_VEX_0F3A 3

/* The prefix alone. @vvvv 0: none, or the first. */
KL_INLINE void kl_e_vex(struct kl_emit *e, struct kl_vex x, unsigned reg, unsigned vvvv,
			unsigned rm)
{
	kl_e8(e, 0xc4);
	kl_e8(e, (reg >> 3 ? 0u : 0x80u) | 0x40 | (rm >> 3 ? 0u : 0x20u) | x.map);
	kl_e8(e, (unsigned)x.w << 7 | (~vvvv & 15) << 3 | (unsigned)x.l << 2 | x.pp);
}

KL_INLINE void kl_e_vzeroupper(struct kl_emit *e)
{
	kl_e8(e, 0xc5);
	kl_e8(e, 0xf8);
	kl_e8(e, 0x77);
}

/* ---- what is used a lot ---- */

KL_INLINE void kl_e_mov(struct kl_emit *e, unsigned dst, unsigned src)
{
	kl_e_rr(e, 0x8b, 8, dst, src);
}

KL_INLINE void kl_e_load(struct kl_emit *e, unsigned dst, int32_t ctx)
{
	kl_e_rm(e, 0x8b, 8, dst, KL_AT(H_CTX, ctx));
}

KL_INLINE void kl_e_store(struct kl_emit *e, unsigned src, int32_t ctx)
{
	kl_e_rm(e, 0x89, 8, src, KL_AT(H_CTX, ctx));
}

KL_INLINE void kl_e_lea(struct kl_emit *e, unsigned size, unsigned dst, struct kl_mem m)
{
	kl_e_rm(e, 0x8d, size, dst, m);
}

/* No flags change. */
KL_INLINE void kl_e_imm(struct kl_emit *e, unsigned dst, uint64_t x)
{
	if (x == (uint32_t)x) {
		if (dst >> 3)
			kl_e8(e, 0x41);
		kl_e8(e, 0xb8 | (dst & 7));
		kl_e32(e, (uint32_t)x);
	} else if ((int64_t)x == (int32_t)x) {
		kl_e8(e, 0x48 | dst >> 3);
		kl_e8(e, 0xc7);
		kl_e8(e, 0xc0 | (dst & 7));
		kl_e32(e, (uint32_t)x);
	} else {
		kl_e8(e, 0x48 | dst >> 3);
		kl_e8(e, 0xb8 | (dst & 7));
		kl_e64(e, x);
	}
}

/* An immediate of @size, which is 4 bytes for 8. */
KL_INLINE void kl_e_alu_imm(struct kl_emit *e, unsigned size, int32_t imm)
{
	if (size == 1) {
		kl_e8(e, (uint8_t)imm);
	} else if (size == 2) {
		kl_e8(e, (uint8_t)imm);
		kl_e8(e, (uint8_t)(imm >> 8));
	} else {
		kl_e32(e, (uint32_t)imm);
	}
}

/* ADD /0 OR /1 ADC /2 SBB /3 AND /4 SUB /5 XOR /6 CMP /7, and @imm as @size has it. */
KL_INLINE void kl_e_alu_ri(struct kl_emit *e, unsigned n, unsigned size, unsigned rm, int32_t imm)
{
	bool small = size != 1 && imm == (int8_t)imm;

	kl_e_rr(e, size == 1 ? 0x81 : small ? 0x83 : 0x81, size, n, rm);
	kl_e_alu_imm(e, small ? 1 : size, imm);
}

KL_INLINE void kl_e_alu_mi(struct kl_emit *e, unsigned n, unsigned size, struct kl_mem m,
			   int32_t imm)
{
	bool small = size != 1 && imm == (int8_t)imm;

	kl_e_rm(e, small ? 0x83 : 0x81, size, n, m);
	kl_e_alu_imm(e, small ? 1 : size, imm);
}

/* Jumps: the address of the 32-bit field, for kl_e_bind(). */
KL_INLINE uint8_t *kl_e_jmp(struct kl_emit *e)
{
	kl_e8(e, 0xe9);
	kl_e32(e, 0);
	return e->p - 4;
}

KL_INLINE uint8_t *kl_e_jcc(struct kl_emit *e, unsigned cc)
{
	kl_e8(e, 0x0f);
	kl_e8(e, 0x80 | cc);
	kl_e32(e, 0);
	return e->p - 4;
}

KL_INLINE void kl_e_call(struct kl_emit *e, const uint8_t *rx)
{
	kl_e8(e, 0xe8);
	kl_e32(e, (uint32_t)(rx - (kl_here(e) + 4)));
}

KL_INLINE void kl_e_bind_to(struct kl_emit *e, uint8_t *field, const uint8_t *rx)
{
	int32_t rel = (int32_t)(rx - (field + e->to_rx + 4));

	memcpy(field, &rel, 4);
}

KL_INLINE void kl_e_bind(struct kl_emit *e, uint8_t *field)
{
	kl_e_bind_to(e, field, kl_here(e));
}

/* Flags: KL_FLAGS_IN and KL_FLAGS_OUT of ops.h. */
KL_INLINE void kl_e_flags_out(struct kl_emit *e)
{
	kl_e8(e, 0x9f);                                 /* lahf */
	kl_e8(e, 0x0f), kl_e8(e, 0x90), kl_e8(e, 0xc0); /* seto al */
	kl_e_rm(e, 0x89, 2, H_S0, KL_AT(H_CTX, KL_CTX(flags_now)));
}

KL_INLINE void kl_e_flags_in(struct kl_emit *e)
{
	kl_e_rm(e, 0x0fb7, 0, H_S0, KL_AT(H_CTX, KL_CTX(flags_now))); /* movzx eax, word */
	kl_e8(e, 0x04), kl_e8(e, 127);                                /* add al, 127 */
	kl_e8(e, 0x9e);                                               /* sahf */
}
