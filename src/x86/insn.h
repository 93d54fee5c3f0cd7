/* SPDX-License-Identifier: MIT */
/*
 * Decoded operations and the handlers that execute them.
 *
 * decode.c turns bytes into a struct kl_op once; blocks cache arrays of them. A handler
 * returns KL_NEXT (the caller advances rip by op->len), KL_JUMPED (the handler set rip),
 * or KL_STOP / KL_JUMPED_STOP (the same, and kl_interp_run() must return to run.c: an exit
 * is pending or events must be looked at). Faults leave by longjmp with rip unchanged.
 *
 * In a block an op is executed through op->run (fast.h), which does it quickly or lets op->fn do
 * it. It returns what is executed next, or NULL: kl_interp_run() finds the next block.
 */
#pragma once

#include "x86/vcpu.h"

enum kl_next { KL_NEXT = 0, KL_JUMPED = 1, KL_STOP = 2, KL_JUMPED_STOP = 3 };

typedef enum kl_next kl_op_fn(struct kl_vcpu *v, const struct kl_op *op);
typedef const struct kl_op *kl_run_fn(struct kl_vcpu *v, const struct kl_op *op);

#define KL_OPF_LOCK    (1u << 0)
#define KL_OPF_REP     (1u << 1) /* F3 */
#define KL_OPF_REPNE   (1u << 2) /* F2 */
#define KL_OPF_MEM     (1u << 3) /* has a memory operand: seg/base/index/scale/disp */
#define KL_OPF_MEM_DST (1u << 4) /* the memory operand is the destination */
#define KL_OPF_MMIO_OK (1u << 5) /* KVM 6.12's emulator decodes it (U2) */
#define KL_OPF_END     (1u << 6) /* ends a block */
#define KL_OPF_LINK    (1u << 7) /* op->link is where its jump goes */
#define KL_OPF_STACK   (1u << 8) /* accesses the stack, too */
#define KL_OPF_EPOCH   (1u << 9) /* serialises: what comes next is compared anew (code.h) */

#define KL_NOREG 0xff

struct kl_op {
	kl_run_fn *run;
	kl_op_fn *fn;
	uint64_t imm;
	int64_t disp;
	union {
		void *thunk;           /* native thunk, for operations that only compute */
		struct kl_block *link; /* KL_OPF_LINK: the block that is jumped to, if known */
	};
	uint16_t flags;
	uint8_t len;         /* bytes of the instruction */
	uint8_t opsize;      /* operand size in bytes */
	uint8_t addrsize;    /* 2, 4, 8 */
	uint8_t seg;         /* enum kl_seg of the memory operand */
	uint8_t base, index; /* register numbers or KL_NOREG; base 16 = next rip */
	uint8_t scale;       /* shift */
	uint8_t reg;         /* register operand: byte offset into gpr[] (AH = 1), or a register
			      * number for segment, control, debug and vector registers */
	uint8_t rm;          /* the other operand if it is a register, the same way */
	uint8_t cond;        /* condition code of Jcc/SETcc/CMOVcc */
	/* Where it lies in its block: bytes from the start, and its number from 1. */
	uint8_t offset, nth;
	/* For op->run: what the address is the sum of, as indices from gpr[0]. */
	uint8_t add_base, add_index, add_seg;
	uint8_t bytes[15];
	uint16_t mnemonic; /* ZydisMnemonic */
};

/* RFLAGS were @old. Stop, if run.c must look: an interrupt may come in now, or a trap. */
KL_INLINE enum kl_next kl_flags_loaded(const struct kl_vcpu *v, uint64_t old)
{
	return (v->rflags & KL_FL_TF) || (v->rflags & ~old & KL_FL_IF) ? KL_STOP : KL_NEXT;
}

KL_INLINE void *kl_gpr(struct kl_vcpu *v, uint8_t offset)
{
	return (uint8_t *)v->gpr + offset;
}

KL_INLINE uint64_t kl_gpr_get(struct kl_vcpu *v, uint8_t offset, unsigned size)
{
	switch (size) {
	case 1:
		return *(uint8_t *)kl_gpr(v, offset);
	case 2:
		return *(uint16_t *)kl_gpr(v, offset);
	case 4:
		return *(uint32_t *)kl_gpr(v, offset);
	default:
		return *(uint64_t *)kl_gpr(v, offset);
	}
}

/* 32-bit results clear the upper half, as the architecture says. */
KL_INLINE void kl_gpr_set(struct kl_vcpu *v, uint8_t offset, uint64_t val, unsigned size)
{
	switch (size) {
	case 1:
		*(uint8_t *)kl_gpr(v, offset) = (uint8_t)val;
		break;
	case 2:
		*(uint16_t *)kl_gpr(v, offset) = (uint16_t)val;
		break;
	case 4:
		*(uint64_t *)kl_gpr(v, offset) = (uint32_t)val;
		break;
	default:
		*(uint64_t *)kl_gpr(v, offset) = val;
		break;
	}
}

/* Effective address of the memory operand, truncated to the address size. */
KL_INLINE uint64_t kl_ea(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t ea = (uint64_t)op->disp;

	if (op->base < 16)
		ea += v->gpr[op->base];
	else if (op->base == 16)
		ea += v->rip + op->len;
	if (op->index != KL_NOREG)
		ea += v->gpr[op->index] << op->scale;
	if (op->addrsize == 8)
		return ea;
	return op->addrsize == 4 ? (uint32_t)ea : (uint16_t)ea;
}

/* Next instruction's rip, wrapped to the code size. */
KL_INLINE uint64_t kl_next_rip(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t n = v->rip + op->len;

	return v->code_mode == KL_CODE64   ? n
	       : v->code_mode == KL_CODE32 ? (uint32_t)n
					   : (uint16_t)n;
}

/*
 * System instructions: exception.c, segment.c, system.c, msr.c, cpuid.c, io.c. decode.c maps
 * mnemonics to these. Operands as in struct kl_op; a handler checks its own privileges.
 */
// clang-format off
#define KL_SYSTEM_OPS(X) \
	X(cpuid) X(rdmsr) X(wrmsr) X(rdtsc) X(rdtscp) X(rdpid) X(rdpmc) X(hlt) X(pause) \
	X(monitor) X(mwait) X(cli) X(sti) X(clts) X(invd) X(wbinvd) X(invlpg) X(invpcid) \
	X(mov_to_cr) X(mov_from_cr) X(mov_to_dr) X(mov_from_dr) X(lmsw) X(smsw) X(lgdt) \
	X(lidt) X(sgdt) X(sidt) X(lldt) X(ltr) X(sldt) X(str) X(lar) X(lsl) X(verr) \
	X(verw) X(arpl) X(mov_to_sreg) X(mov_from_sreg) X(push_sreg) X(pop_sreg) \
	X(load_far_ptr) X(far_jmp) X(far_call) X(far_ret) X(iret) X(int_n) X(int3) \
	X(int1) X(into) X(ud) X(syscall) X(sysret) X(sysenter) X(sysexit) X(swapgs) \
	X(rdfsbase) X(rdgsbase) X(wrfsbase) X(wrgsbase) X(in) X(out) X(ins) X(outs) \
	X(pushf) X(popf) X(clac) X(stac) X(xgetbv) X(xsetbv) X(vmcall) X(vmmcall) \
	X(fxsave) X(fxrstor) X(xsave) X(xrstor) X(ldmxcsr) X(stmxcsr) X(rsm) X(clflush)
// clang-format on
#define KL_DECLARE_OP(name) kl_op_fn kl_op_##name;
KL_SYSTEM_OPS(KL_DECLARE_OP)
#undef KL_DECLARE_OP

/*
 * What decode.c puts into a system instruction's op:
 *   reg, rm   as ModRM has them: the reg field and the r/m field (if it is a register). LAR
 *             and LSL: reg is the destination; ARPL: rm is. MOV to and from segment, control
 *             and debug registers: reg is that register's number, rm the general one.
 *             One register operand only (STR, LTR, RDFSBASE, ...): both, PUSH/POP sreg too.
 *   opsize    of the operand: memory operands have their own size (MOV m16,sreg: 2); far
 *             pointers, IRET, far RET, SYSRET, PUSHF, string I/O: the effective operand size;
 *             LGDT and the like: 8 in 64-bit mode, else the effective operand size.
 *   imm       INT's vector, far RET's count, a port, ptr16:xx as selector << 32 | offset.
 *   IN/OUT    rm is KL_NOREG if the port is in imm, else DX's offset.
 *   seg       of the memory operand; for INS/OUTS/MONITOR of the implicit one.
 * Each of them ends its block, unless it changes nothing that a block depends on.
 */

/*
 * Operands of the system handlers. "value": op->rm (byte offset into gpr[]) or, with
 * KL_OPF_MEM, the memory operand.
 *
 *   in, out             opsize = data size; port: op->rm == KL_NOREG ? imm : DX
 *   ins, outs           opsize = element size, addrsize, seg (outs), KL_OPF_REP
 *   mov_to/from_sreg    reg = enum kl_seg; value; opsize of a register destination
 *   push_sreg, pop_sreg reg = enum kl_seg; opsize = size on the stack
 *   load_far_ptr        reg = destination byte offset; imm = enum kl_seg; opsize of the offset
 *   far_jmp, far_call   KL_OPF_MEM: m16:opsize, else imm = selector << 32 | offset; opsize
 *   far_ret, iret       imm = bytes to drop (far_ret); opsize
 *   int_n               imm = vector
 *   mov_to/from_cr/dr   reg = number; rm = general register; opsize 4 or 8
 *   lmsw smsw lldt sldt ltr str verr verw     value; opsize of a register destination
 *   lar, lsl            reg = destination byte offset; value = selector; opsize
 *   arpl                reg = source byte offset; value = destination
 *   lgdt lidt sgdt sidt invlpg clflush fxsave fxrstor xsave xrstor ldmxcsr stmxcsr
 *                       memory operand; opsize 8 where REX.W matters (fxsave64, xsave64...)
 *   invpcid             reg = byte offset of the type register; memory operand
 *   rd/wrfsbase, rd/wrgsbase, rdpid           rm = general register; opsize
 *   sysret, sysexit     opsize 8: REX.W
 *   pushf, popf         opsize
 *
 * Which form of an instruction (XSAVE, XSAVEOPT...) is in op->mnemonic.
 */
