/* SPDX-License-Identifier: MIT */
/*
 * MMX, and what mixes it with SSE: computed natively in thunks on copies of the two operands.
 *
 * The registers lie in v->xsave relative to the top of the x87 stack; each of these
 * instructions moves the top to 0 and marks all registers valid, besides EMMS.
 */
#include <string.h>

#include "host/cpu.h"
#include "x86/fpu.h"
#include "x86/thunk.h"
#include "x86/vector.h"

enum {
	I_REG_M = 1 << 0, /* ModRM.reg is an MMX register */
	I_REG_X = 1 << 1, /* ... an XMM one */
	I_REG_G = 1 << 2, /* ... a general one */
	I_REG_W = 1 << 3,
	I_RM_M = 1 << 4,
	I_RM_X = 1 << 5,
	I_RM_G = 1 << 6,
	I_RM_W = 1 << 7,
	I_MEM_R = 1 << 8,
	I_MEM_W = 1 << 9,
	I_WIDE = 1 << 10, /* general registers are written with 64 bits */
	I_ALIGN = 1 << 11,
	I_FP = 1 << 12,       /* uses MXCSR */
	I_SSE_ONLY = 1 << 13, /* CVTPI2PS and CVTPI2PD from memory */
};
#define I_SIZE_SHIFT 24

#define ST_OFFSET 32u

static unsigned top_of(const struct kl_vcpu *v)
{
	return v->xsave[3] >> 3 & 7;
}

static uint8_t *mm(struct kl_vcpu *v, unsigned n)
{
	return v->xsave + ST_OFFSET + 16 * ((n - top_of(v)) & 7);
}

static void clear_top(struct kl_vcpu *v)
{
	unsigned top = top_of(v);
	uint8_t old[128];

	if (KL_LIKELY(!top))
		return;
	memcpy(old, v->xsave + ST_OFFSET, 128);
	memcpy(v->xsave + ST_OFFSET, old + 16 * (8 - top), 16 * top);
	memcpy(v->xsave + ST_OFFSET + 16 * top, old, 128 - 16 * top);
	v->xsave[3] &= (uint8_t)~0x38;
}

/* From x87 to MMX: the stack's top becomes 0, and no register is empty. */
static void enter_mmx(struct kl_vcpu *v)
{
	clear_top(v);
	v->xsave[4] = 0xff;
}

static void put_mm(struct kl_vcpu *v, unsigned n, const void *x)
{
	uint8_t *d = mm(v, n);

	memcpy(d, x, 8);
	memset(d + 8, 0xff, 2);
}

static void check_mmx(struct kl_vcpu *v, unsigned info)
{
	bool xmm = info & (I_REG_X | I_RM_X);

	if ((v->cr0 & KL_CR0_EM) || (xmm && !(v->cr4 & KL_CR4_OSFXSR)))
		kl_raise(v, KL_EXC_UD);
	if (v->cr0 & KL_CR0_TS)
		kl_raise(v, KL_EXC_NM);
	if (!(info & I_SSE_ONLY) && kl_fpu_pending(v))
		kl_raise(v, KL_EXC_MF);
}

static void run(struct kl_thunk_ctx *c, void *thunk)
{
	register void *fn __asm__("r8") = thunk;

	__asm__ volatile("movups 128(%%rdi), %%xmm0\n\tmovups 144(%%rdi), %%xmm1\n\t"
			 "movq 128(%%rdi), %%mm0\n\tmovq 144(%%rdi), %%mm1\n\t"
			 "movq 192(%%rdi), %%rax\n\tmovq 200(%%rdi), %%rcx\n\t"
			 "stmxcsr 236(%%rdi)\n\tldmxcsr 232(%%rdi)\n\t"
			 "call *%[fn]\n\t"
			 "stmxcsr 232(%%rdi)\n\tldmxcsr 236(%%rdi)\n\t"
			 "movq %%rax, 192(%%rdi)\n\tmovq %%rcx, 200(%%rdi)\n\t"
			 "movq %%mm0, 160(%%rdi)\n\tmovq %%mm1, 176(%%rdi)\n\t"
			 "movups %%xmm0, 128(%%rdi)\n\tmovups %%xmm1, 144(%%rdi)\n\t"
			 "emms"
			 :
			 : "D"(c), [fn] "r"(fn)
			 : "rax", "rcx", "xmm0", "xmm1", "mm0", "mm1", "st", "st(1)", "st(2)",
			   "st(3)", "st(4)", "st(5)", "st(6)", "st(7)", "cc", "memory");
}

static enum kl_next thunked(struct kl_vcpu *v, const struct kl_op *op)
{
	unsigned info = (unsigned)op->imm & 0xffffff, size = (unsigned)(op->imm >> I_SIZE_SHIFT);
	unsigned gsize = info & I_WIDE ? 8 : 4;
	struct kl_thunk_ctx c;
	uint64_t lin = 0;

	check_mmx(v, info);
	if (info & (I_MEM_R | I_MEM_W)) {
		if ((info & I_MEM_W) && kl_host_is_intel())
			clear_top(v); /* also if the store faults */
		lin = kl_mem_lin(v, op, size, info & I_MEM_W);
		if ((info & I_ALIGN) && (lin & 15))
			kl_raise_error(v, KL_EXC_GP, 0);
		if (info & I_MEM_R)
			kl_vec_read(v, lin, c.mem, size);
	}
	if (info & I_REG_M)
		memcpy(c.x[0], mm(v, op->reg), 8);
	if (info & I_REG_X)
		memcpy(c.x[0], kl_xmm(v, op->reg), 16);
	if (info & I_RM_M)
		memcpy(c.x[1], mm(v, op->rm), 8);
	if (info & I_RM_X)
		memcpy(c.x[1], kl_xmm(v, op->rm), 16);
	if (info & I_REG_G)
		c.rax = *(uint64_t *)kl_gpr(v, op->reg);
	if (info & I_RM_G)
		c.rcx = *(uint64_t *)kl_gpr(v, op->rm);
	c.mxcsr = kl_mxcsr_quiet(v);
	run(&c, op->thunk);
	if (info & I_MEM_W)
		kl_vec_write(v, lin, c.mem, size);
	if (!(info & I_SSE_ONLY))
		enter_mmx(v); /* also if #XM comes */
	if (info & I_FP)
		kl_mxcsr_note(v, c.mxcsr);
	if (info & I_REG_W) {
		if (info & I_REG_M)
			put_mm(v, op->reg, c.x[2]);
		else if (info & I_REG_X)
			memcpy(kl_xmm(v, op->reg), c.x[0], 16);
		else
			kl_gpr_set(v, op->reg, c.rax, gsize);
	}
	if (info & I_RM_W) {
		if (info & I_RM_M)
			put_mm(v, op->rm, c.x[3]);
		else if (info & I_RM_X)
			memcpy(kl_xmm(v, op->rm), c.x[1], 16);
		else
			kl_gpr_set(v, op->rm, c.rcx, gsize);
	}
	return KL_NEXT;
}

static enum kl_next emms(struct kl_vcpu *v, const struct kl_op *op)
{
	check_mmx(v, 0);
	enter_mmx(v);
	v->xsave[4] = 0;
	return KL_NEXT;
}

/* MASKMOVQ: the memory operand is at rDI. */
static enum kl_next maskmovq(struct kl_vcpu *v, const struct kl_op *op)
{
	check_mmx(v, 0);
	enter_mmx(v); /* also if the store faults */
	kl_masked_bytes(v, op, mm(v, op->reg), mm(v, op->rm), 8);
	return KL_NEXT;
}

/* ---- selection --------------------------------------------------------------------------- */

#define CASE(n) case ZYDIS_MNEMONIC_##n:

/* The allow-list: bits for an instruction of it, or -1. */
static int kind_of(ZydisMnemonic m)
{
	switch (m) {
		/* clang-format off */
	CASE(CVTPI2PS) CASE(CVTPI2PD) CASE(CVTPS2PI) CASE(CVTTPS2PI) CASE(CVTPD2PI) CASE(CVTTPD2PI)
		return I_FP;
	CASE(MOVD) CASE(MOVQ) CASE(MOVNTQ) CASE(MOVDQ2Q) CASE(MOVQ2DQ) CASE(PACKSSDW)
	CASE(PACKSSWB) CASE(PACKUSWB) CASE(PADDB) CASE(PADDW) CASE(PADDD) CASE(PADDQ) CASE(PADDSB)
	CASE(PADDSW) CASE(PADDUSB) CASE(PADDUSW) CASE(PSUBB) CASE(PSUBW) CASE(PSUBD) CASE(PSUBQ)
	CASE(PSUBSB) CASE(PSUBSW) CASE(PSUBUSB) CASE(PSUBUSW) CASE(PAND) CASE(PANDN) CASE(POR)
	CASE(PXOR) CASE(PAVGB) CASE(PAVGW) CASE(PCMPEQB) CASE(PCMPEQW) CASE(PCMPEQD) CASE(PCMPGTB)
	CASE(PCMPGTW) CASE(PCMPGTD) CASE(PEXTRW) CASE(PINSRW) CASE(PMADDWD) CASE(PMAXSW)
	CASE(PMAXUB) CASE(PMINSW) CASE(PMINUB) CASE(PMOVMSKB) CASE(PMULHUW) CASE(PMULHW)
	CASE(PMULLW) CASE(PMULUDQ) CASE(PSADBW) CASE(PSHUFW) CASE(PSLLW) CASE(PSLLD) CASE(PSLLQ)
	CASE(PSRLW) CASE(PSRLD) CASE(PSRLQ) CASE(PSRAW) CASE(PSRAD) CASE(PUNPCKHBW) CASE(PUNPCKHWD)
	CASE(PUNPCKHDQ) CASE(PUNPCKLBW) CASE(PUNPCKLWD) CASE(PUNPCKLDQ) CASE(PHADDW) CASE(PHADDD)
	CASE(PHADDSW) CASE(PHSUBW) CASE(PHSUBD) CASE(PHSUBSW) CASE(PSIGNB) CASE(PSIGNW) CASE(PSIGND)
	CASE(PABSB) CASE(PABSW) CASE(PABSD) CASE(PALIGNR) CASE(PSHUFB) CASE(PMADDUBSW)
	CASE(PMULHRSW)
		return 0;
	/* clang-format on */
	default:
		return -1;
	}
}

/* Add what one operand needs; false: not a shape we have. */
static bool note_operand(struct kl_decode *d, const ZydisDecodedOperand *o, uint64_t *info)
{
	bool written = o->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE;
	bool g = kl_is_class(o, ZYDIS_REGCLASS_GPR32) || kl_is_class(o, ZYDIS_REGCLASS_GPR64);
	bool m = kl_is_class(o, ZYDIS_REGCLASS_MMX), x = kl_is_class(o, ZYDIS_REGCLASS_XMM);
	uint8_t n;

	if (o->type == ZYDIS_OPERAND_TYPE_IMMEDIATE)
		return true;
	if (o->type == ZYDIS_OPERAND_TYPE_MEMORY) {
		if (o->size > 128 || o->visibility == ZYDIS_OPERAND_VISIBILITY_HIDDEN)
			return false;
		*info |= (uint64_t)(o->size / 8) << I_SIZE_SHIFT;
		*info |= written ? I_MEM_W : I_MEM_R;
		return true;
	}
	if (!g && !m && !x)
		return false;
	n = kl_register_number(o);
	n = (uint8_t)(g ? 8 * n : m ? n & 7 : n);
	if (g && o->size == 64)
		*info |= I_WIDE;
	if (o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG) {
		d->op->reg = n;
		*info |= (g ? I_REG_G : m ? I_REG_M : I_REG_X) | (written ? I_REG_W : 0);
		return true;
	}
	if (o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM) {
		d->op->rm = n;
		*info |= (g ? I_RM_G : m ? I_RM_M : I_RM_X) | (written ? I_RM_W : 0);
		return true;
	}
	return false;
}

static bool uses_mmx(const struct kl_decode *d)
{
	for (unsigned i = 0; i < d->in.operand_count_visible; i++)
		if (kl_is_class(&d->opnd[i], ZYDIS_REGCLASS_MMX))
			return true;
	/* CVTPI2PS with memory, and the other way round */
	return kind_of(d->in.mnemonic) > 0;
}

bool kl_select_mmx(struct kl_decode *d)
{
	int kind = kind_of(d->in.mnemonic);
	uint64_t info = (uint64_t)kind;
	struct kl_op *op = d->op;
	uint8_t code[16];
	unsigned len;

	d->reads_flags = true;
	if (d->in.mnemonic == ZYDIS_MNEMONIC_EMMS) {
		op->fn = emms;
		return true;
	}
	if (d->in.mnemonic == ZYDIS_MNEMONIC_MASKMOVQ) {
		op->reg = kl_register_number(&d->opnd[0]);
		op->rm = kl_register_number(&d->opnd[1]);
		op->fn = maskmovq;
		d->stores = true;
		return true;
	}
	if (kind < 0 || !uses_mmx(d))
		return false;
	if (d->in.meta.isa_ext == ZYDIS_ISA_EXT_SSSE3 && !__builtin_cpu_supports("ssse3"))
		return false;
	for (unsigned i = 0; i < d->in.operand_count; i++)
		if (!note_operand(d, &d->opnd[i], &info))
			return false;
	if (info >> I_SIZE_SHIFT == 16)
		info |= I_ALIGN;
	/* CVTPI2PS and CVTPI2PD from memory, whatever their manuals say of the x87 state */
	if (!(info & (I_REG_M | I_RM_M)))
		info |= I_SSE_ONLY;
	len = kl_thunk_rewrite(d, 0, code);
	op->thunk = len ? kl_thunk_get(code, len) : NULL;
	if (!op->thunk)
		return false;
	op->imm = info;
	op->fn = thunked;
	d->stores = info & I_MEM_W;
	return true;
}
