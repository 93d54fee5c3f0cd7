/* SPDX-License-Identifier: MIT */
/*
 * x87 and MMX: the guest's FXSAVE area is loaded, the instruction runs in a thunk with its
 * memory operand in a buffer, and the state is saved again.
 *
 * The guest's own control and status words are in force: an exception that it has unmasked is
 * pending in the saved state then, and its next waiting instruction raises #MF. No instruction of
 * the host waits in between. Exceptions of SSE are masked, see kl_mxcsr_note().
 */
#include <string.h>

#include "host/cpu.h"
#include "x86/fpu.h"
#include "x86/ops.h"
#include "x86/thunk.h"
#include "x86/vector.h"

struct fx {
	uint16_t fcw, fsw;
	uint8_t ftw, pad;
	uint16_t fop;
	uint64_t fip, fdp;
	uint32_t mxcsr, mxcsr_mask;
	uint8_t rest[480];
} __attribute__((aligned(64)));
_Static_assert(sizeof(struct fx) == 512, "FXSAVE area");

enum {
	I_MMX = 1 << 0, /* or a mix with SSE */
	I_XMM = 1 << 1,
	I_CONTROL = 1 << 2, /* acts on the control or status word: keeps the pointers */
	I_NOWAIT = 1 << 3,
	I_MEM_R = 1 << 4,
	I_MEM_W = 1 << 5,
	I_REG_G = 1 << 6, /* as in ops_sse.c */
	I_REG_W = 1 << 7,
	I_RM_G = 1 << 8,
	I_RM_W = 1 << 9,
	I_AX_W = 1 << 10,
	I_FLAGS = 1 << 11,
	I_ENV = 1 << 12, /* stores the environment: pointers to be replaced */
	I_WIDE = 1 << 13,
	I_ALIGN = 1 << 14,
};
#define I_SIZE_SHIFT 24

#define FSW_IE  0x01u
#define FSW_OE  0x08u
#define FSW_UE  0x10u
#define FSW_TOP 0x3800u

static struct fx *state(struct kl_vcpu *v)
{
	return (struct fx *)(void *)v->xsave;
}

static void check(struct kl_vcpu *v, unsigned info)
{
	if (info & (I_MMX | I_XMM)) {
		if ((v->cr0 & KL_CR0_EM) || ((info & I_XMM) && !(v->cr4 & KL_CR4_OSFXSR)))
			kl_raise(v, KL_EXC_UD);
		if (v->cr0 & KL_CR0_TS)
			kl_raise(v, KL_EXC_NM);
	} else if (v->cr0 & (KL_CR0_EM | KL_CR0_TS)) {
		kl_raise(v, KL_EXC_NM);
	}
	if (!(info & I_NOWAIT) && kl_fpu_pending(v))
		kl_raise(v, KL_EXC_MF);
}

/* Run with the FPU state @f; the host's own control words survive. */
static void run(struct kl_thunk_ctx *c, struct fx *f, void *thunk)
{
	register void *fn __asm__("r8") = thunk;
	register struct fx *fx __asm__("r9") = f;
	uint16_t host_fcw;

	__asm__ volatile("fnstcw %[fcw]\n\t"
			 "stmxcsr 236(%%rdi)\n\t"
			 "fxrstor64 (%[fx])\n\t"
			 "movq 192(%%rdi), %%rax\n\tmovq 200(%%rdi), %%rcx\n\t"
			 "pushq 224(%%rdi)\n\tpopfq\n\t"
			 "call *%[fn]\n\t"
			 "pushfq\n\tpopq 224(%%rdi)\n\t"
			 "movq %%rax, 192(%%rdi)\n\tmovq %%rcx, 200(%%rdi)\n\t"
			 "fxsave64 (%[fx])\n\t"
			 "fninit\n\t"
			 "fldcw %[fcw]\n\t"
			 "ldmxcsr 236(%%rdi)"
			 : [fcw] "=m"(host_fcw)
			 : "D"(c), [fn] "r"(fn), [fx] "r"(fx)
			 : "rax", "rcx", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6",
			   "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14",
			   "xmm15", "cc", "memory");
}

/* The host's instruction pointers are none of the guest's business. */
static void replace_pointers(struct kl_vcpu *v, uint8_t *mem, unsigned size)
{
	const struct fx *f = state(v);
	uint32_t ip = (uint32_t)f->fip, dp = (uint32_t)f->fdp;

	if (size == 14 || size == 94) {
		memcpy(mem + 6, &ip, 2);
		memset(mem + 8, 0, 2);
		memcpy(mem + 10, &dp, 2);
		memset(mem + 12, 0, 2);
	} else {
		memcpy(mem + 12, &ip, 4);
		memset(mem + 16, 0, 2);
		memcpy(mem + 18, &f->fop, 2);
		memcpy(mem + 20, &dp, 4);
		memset(mem + 24, 0, 2);
	}
}

/* What every MMX instruction but EMMS does: all registers valid, MM0 on top. */
static void enter_mmx(struct fx *f)
{
	unsigned top = f->fsw >> 11 & 7;
	struct fx old = *f;

	for (unsigned i = 0; i < 8; i++)
		memcpy(f->rest + 16 * i, old.rest + 16 * ((i - top) & 7), 10);
	f->fsw &= (uint16_t)~FSW_TOP;
	f->ftw = 0xff;
}

static enum kl_next thunked(struct kl_vcpu *v, const struct kl_op *op)
{
	struct kl_thunk_ctx c;
	struct fx f, *guest = state(v);
	unsigned info = (unsigned)op->imm & 0xffffff, size = (unsigned)(op->imm >> I_SIZE_SHIFT);
	uint64_t lin = 0;

	check(v, info);
	if (info & (I_MEM_R | I_MEM_W)) {
		lin = kl_mem_lin(v, op, size, info & I_MEM_W);
		if ((info & I_ALIGN) && (lin & 15))
			kl_raise_error(v, KL_EXC_GP, 0);
		if (info & I_MEM_R)
			kl_read_bytes(v, lin, c.mem, size);
	}
	f = *guest;
	f.mxcsr = kl_mxcsr_quiet(v);
	c.rax = info & I_REG_G ? *(uint64_t *)kl_gpr(v, op->reg) : v->gpr[KL_RAX];
	c.rcx = info & I_RM_G ? *(uint64_t *)kl_gpr(v, op->rm) : 0;
	c.flags = (v->rflags & KL_FL_STATUS) | 0x202;
	run(&c, &f, op->thunk);

	if (info & I_XMM) {
		uint32_t mxcsr = f.mxcsr;

		/* The transition to MMX comes before #XM. */
		if (info & I_MMX) {
			enter_mmx(guest);
			kl_xstate_bv_set(v, kl_xstate_bv(v) | 1);
		}
		kl_mxcsr_note(v, mxcsr);
	}
	f.mxcsr = guest->mxcsr;
	if (info & I_MEM_W) {
		if (info & I_ENV)
			replace_pointers(v, c.mem, size);
		if (!(info & I_CONTROL) && (f.fsw & ~f.fcw & (FSW_IE | FSW_OE | FSW_UE)))
			kl_rmw_pointer(v, lin, size); /* nothing is stored; faults come first */
		else
			kl_write_bytes(v, lin, c.mem, size);
	}
	if (info & (I_CONTROL | I_MMX)) {
		f.fip = guest->fip;
		f.fdp = guest->fdp;
		f.fop = guest->fop;
	} else if (!(info & I_XMM)) {
		f.fip = v->rip;
		f.fdp = lin;
	}
	f.mxcsr_mask = guest->mxcsr_mask;
	/* The reserved end of the area is software's. */
	memcpy(guest, &f, 416);
	kl_fpu_summarize(v);
	kl_xstate_bv_set(v, kl_xstate_bv(v) | 1);
	if ((info & (I_RM_G | I_RM_W)) == (I_RM_G | I_RM_W))
		kl_gpr_set(v, op->rm, c.rcx, info & I_WIDE ? 8 : 4);
	if ((info & (I_REG_G | I_REG_W)) == (I_REG_G | I_REG_W))
		kl_gpr_set(v, op->reg, c.rax, info & I_WIDE ? 8 : 4);
	if (info & I_AX_W)
		*(uint16_t *)&v->gpr[KL_RAX] = (uint16_t)c.rax;
	if (info & I_FLAGS)
		v->rflags = (v->rflags & ~(uint64_t)KL_FL_STATUS) | (c.flags & KL_FL_STATUS);
	return KL_NEXT;
}

static enum kl_next fwait(struct kl_vcpu *v, const struct kl_op *op)
{
	if ((v->cr0 & (KL_CR0_MP | KL_CR0_TS)) == (KL_CR0_MP | KL_CR0_TS))
		kl_raise(v, KL_EXC_NM);
	if (kl_fpu_pending(v))
		kl_raise(v, KL_EXC_MF);
	return KL_NEXT;
}

/* Register MM@n: the image has what is on top first. */
static const uint8_t *mmx(struct kl_vcpu *v, unsigned n)
{
	const struct fx *f = state(v);

	return f->rest + 16 * ((n - (f->fsw >> 11)) & 7);
}

/* MASKMOVQ: the hidden memory operand is written here, byte by byte. */
static enum kl_next maskmovq(struct kl_vcpu *v, const struct kl_op *op)
{
	uint8_t x[8], mask[8];
	uint64_t ea = v->gpr[KL_RDI], lin;

	check(v, I_MMX);
	memcpy(x, mmx(v, op->reg), 8);
	memcpy(mask, mmx(v, op->rm), 8);
	enter_mmx(state(v)); /* also if the store faults */
	kl_xstate_bv_set(v, kl_xstate_bv(v) | 1);
	ea = op->addrsize == 8 ? ea : op->addrsize == 4 ? (uint32_t)ea : (uint16_t)ea;
	lin = kl_seg_linear(v, op->seg, ea, 8, true);
	if (!kl_host_is_intel())
		kl_rmw_pointer(v, lin, 8); /* all must be writable */
	for (unsigned i = 0; i < 8; i++)
		if (mask[i] & 0x80)
			kl_write(v, kl_linear_add(v, lin, i), x[i], 1);
	return KL_NEXT;
}

/* ---- selection --------------------------------------------------------------------------- */

#define CASE(n) case ZYDIS_MNEMONIC_##n:

/* Bits for an instruction of the list, or -1. */
static int kind_of(ZydisMnemonic m, bool memory)
{
	switch (m) {
		/* clang-format off */
	CASE(FNINIT) CASE(FNCLEX) CASE(FNSTCW) CASE(FNSTSW) CASE(FENI8087_NOP) CASE(FDISI8087_NOP)
	CASE(FSETPM287_NOP)
		return I_CONTROL | I_NOWAIT;
	CASE(FNSTENV) CASE(FNSAVE)
		return I_CONTROL | I_NOWAIT | I_ENV;
	CASE(FLDCW) CASE(FLDENV) CASE(FRSTOR)
		return I_CONTROL;
	CASE(FABS) CASE(FCHS) CASE(FADD) CASE(FADDP) CASE(FIADD) CASE(FSUB) CASE(FSUBP) CASE(FISUB)
	CASE(FSUBR) CASE(FSUBRP) CASE(FISUBR) CASE(FMUL) CASE(FMULP) CASE(FIMUL) CASE(FDIV)
	CASE(FDIVP) CASE(FIDIV) CASE(FDIVR) CASE(FDIVRP) CASE(FIDIVR) CASE(FSQRT) CASE(FSCALE)
	CASE(FPREM) CASE(FPREM1) CASE(FRNDINT) CASE(FXTRACT) CASE(FSIN) CASE(FCOS) CASE(FSINCOS)
	CASE(FPTAN) CASE(FPATAN) CASE(F2XM1) CASE(FYL2X) CASE(FYL2XP1) CASE(FCOM) CASE(FCOMP)
	CASE(FCOMPP) CASE(FUCOM) CASE(FUCOMP) CASE(FUCOMPP) CASE(FCOMI) CASE(FCOMIP) CASE(FUCOMI)
	CASE(FUCOMIP) CASE(FICOM) CASE(FICOMP) CASE(FTST) CASE(FXAM) CASE(FLD) CASE(FST) CASE(FSTP)
	CASE(FSTPNCE) CASE(FILD) CASE(FIST) CASE(FISTP) CASE(FISTTP) CASE(FBLD) CASE(FBSTP)
	CASE(FXCH) CASE(FLD1) CASE(FLDL2T) CASE(FLDL2E) CASE(FLDPI) CASE(FLDLG2) CASE(FLDLN2)
	CASE(FLDZ) CASE(FCMOVB) CASE(FCMOVE) CASE(FCMOVBE) CASE(FCMOVU) CASE(FCMOVNB) CASE(FCMOVNE)
	CASE(FCMOVNBE) CASE(FCMOVNU) CASE(FINCSTP) CASE(FDECSTP) CASE(FFREE) CASE(FFREEP) CASE(FNOP)
		return 0;
	CASE(CVTPI2PD) CASE(CVTPI2PS)
		/* From memory, no MMX register is involved; Intel's CVTPI2PS acts as if. */
		if (memory && (m == ZYDIS_MNEMONIC_CVTPI2PD || !kl_host_is_intel()))
			return I_XMM | I_NOWAIT;
		return I_MMX | I_XMM;
	CASE(CVTPS2PI) CASE(CVTTPS2PI) CASE(CVTPD2PI) CASE(CVTTPD2PI)
		return I_MMX | I_XMM;
	CASE(EMMS) CASE(MOVD) CASE(MOVQ) CASE(MOVNTQ) CASE(MOVDQ2Q) CASE(MOVQ2DQ) CASE(PACKSSDW)
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
		return I_MMX;
	/* clang-format on */
	default:
		return -1;
	}
}

static bool is_class(const ZydisDecodedOperand *o, ZydisRegisterClass c)
{
	return ZydisRegisterGetClass(o->reg.value) == c;
}

/* Add what one operand needs; false: not a shape we have. */
static bool note_operand(struct kl_decode *d, const ZydisDecodedOperand *o, uint64_t *info)
{
	bool written = o->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE;
	bool g = o->type == ZYDIS_OPERAND_TYPE_REGISTER &&
		 (is_class(o, ZYDIS_REGCLASS_GPR32) || is_class(o, ZYDIS_REGCLASS_GPR64));
	uint8_t n;

	switch (o->type) {
	case ZYDIS_OPERAND_TYPE_IMMEDIATE:
		return true;
	case ZYDIS_OPERAND_TYPE_MEMORY:
		if (o->size > 8 * sizeof(((struct kl_thunk_ctx *)0)->mem) ||
		    o->visibility == ZYDIS_OPERAND_VISIBILITY_HIDDEN)
			return false;
		*info |= (uint64_t)(o->size / 8) << I_SIZE_SHIFT;
		*info |= written ? I_MEM_W : I_MEM_R;
		return true;
	case ZYDIS_OPERAND_TYPE_REGISTER:
		break;
	default:
		return false;
	}
	if (o->reg.value == ZYDIS_REGISTER_AX) {
		*info |= I_AX_W;
		return written;
	}
	if (is_class(o, ZYDIS_REGCLASS_FLAGS)) {
		*info |= I_FLAGS;
		return true;
	}
	n = (uint8_t)ZydisRegisterGetId(o->reg.value);
	if (is_class(o, ZYDIS_REGCLASS_XMM))
		*info |= I_XMM;
	if (g && o->size == 64)
		*info |= I_WIDE;
	if (o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG) {
		d->op->reg = g ? (uint8_t)(8 * n) : n;
		*info |= g ? I_REG_G | (written ? I_REG_W : 0) : 0;
	} else if (o->encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM) {
		d->op->rm = g ? (uint8_t)(8 * n) : n;
		*info |= g ? I_RM_G | (written ? I_RM_W : 0) : 0;
	} else if (g) {
		return false;
	}
	return true;
}

bool kl_select_x87(struct kl_decode *d)
{
	int kind = kind_of(d->in.mnemonic, d->op->flags & KL_OPF_MEM);
	uint64_t info = (uint64_t)kind;
	uint8_t code[16];
	unsigned len;

	d->reads_flags = true;
	d->stores = true;
	if (d->in.mnemonic == ZYDIS_MNEMONIC_FWAIT) {
		d->op->fn = fwait;
		return true;
	}
	if (d->in.mnemonic == ZYDIS_MNEMONIC_MASKMOVQ) {
		d->op->reg = (uint8_t)ZydisRegisterGetId(d->opnd[0].reg.value);
		d->op->rm = (uint8_t)ZydisRegisterGetId(d->opnd[1].reg.value);
		d->op->fn = maskmovq;
		return true;
	}
	if (kind < 0 || d->in.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY)
		return false;
	if (d->in.meta.isa_ext == ZYDIS_ISA_EXT_SSSE3 && !__builtin_cpu_supports("ssse3"))
		return false;
	for (unsigned i = 0; i < d->in.operand_count; i++)
		if (!note_operand(d, &d->opnd[i], &info))
			return false;
	if ((info & I_XMM) && info >> I_SIZE_SHIFT == 16)
		info |= I_ALIGN;
	len = kl_thunk_rewrite(d, -1, code);
	d->op->thunk = len ? kl_thunk_get(code, len) : NULL;
	if (!d->op->thunk)
		return false;
	d->op->imm = info;
	d->op->fn = thunked;
	return true;
}
