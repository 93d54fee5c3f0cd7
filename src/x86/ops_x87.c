/* SPDX-License-Identifier: MIT */
/*
 * x87: the guest's FXSAVE area is loaded, the instruction runs in a thunk with its
 * memory operand in a buffer, and the state is saved again.
 *
 * It runs with the guest's own control word. The host does not trap all the same: an unmasked
 * exception waits for the next instruction that looks for one, and between the one in the thunk
 * and FNINIT there is none. So scaled results, results that are withheld, and the status word
 * are the processor's own.
 */
#include <string.h>

#include "host/cpu.h"
#include "x86/access.h"
#include "x86/fpu.h"
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
	I_CONTROL = 1 << 2, /* acts on the control or status word */
	I_NOWAIT = 1 << 3,
	I_MEM_R = 1 << 4,
	I_MEM_W = 1 << 5,
	I_REG_G = 1 << 6, /* as in ops_sse.c */
	I_REG_W = 1 << 7,
	I_RM_G = 1 << 8,
	I_RM_W = 1 << 9,
	I_AX_W = 1 << 10,
	I_FLAGS = 1 << 11,
	I_ENV = 1 << 12, /* stores the environment */
	I_WIDE = 1 << 13,
	I_LOADS_ENV = 1 << 16,
};
#define I_SIZE_SHIFT 24
#define I_FOP_SHIFT  32 /* what FOP says of the instruction */

/* Exceptions that withhold the store of a result if they are unmasked: all but precision. */
#define WITHHOLD 0x1fu

static struct fx *state(struct kl_vcpu *v)
{
	return (struct fx *)(void *)v->xsave;
}

static void check(struct kl_vcpu *v, unsigned info)
{
	if (v->cr0 & (KL_CR0_EM | KL_CR0_TS))
		kl_raise(v, KL_EXC_NM);
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

static void put16(uint8_t *p, uint64_t x)
{
	memcpy(p, &(uint16_t){(uint16_t)x}, 2);
}

static uint16_t get16(const uint8_t *p)
{
	uint16_t x;

	memcpy(&x, p, 2);
	return x;
}

/* In real mode the pointers of an environment are linear addresses in pieces. */
static bool real_layout(const struct kl_vcpu *v)
{
	return !(v->cr0 & KL_CR0_PE) || (v->rflags & KL_FL_VM);
}

/* Where the words of the pointers lie in an image: IP, CS or the rest of IP, DP, DS. */
static const uint8_t *pointer_words(unsigned size)
{
	static const uint8_t narrow[4] = {6, 8, 10, 12}, wide[4] = {12, 16, 20, 24};

	return size == 14 || size == 94 ? narrow : wide;
}

/* The host's instruction pointers are none of the guest's business. Selectors are 0. */
static void store_pointers(struct kl_vcpu *v, uint8_t *mem, unsigned size)
{
	const uint8_t *at = pointer_words(size);
	const struct fx *f = state(v);
	uint64_t ip = f->fip, dp = f->fdp;
	bool wide = at[0] == 12;

	if (real_layout(v)) {
		ip += v->seg[KL_CS].base;
		dp += v->seg[KL_DS].base;
		put16(mem + at[0], ip);
		put16(mem + at[2], dp);
		if (wide) {
			memcpy(mem + at[1], &(uint32_t){(ip >> 16 & 0xffff) << 12 | f->fop}, 4);
			memcpy(mem + at[3], &(uint32_t){(dp >> 16 & 0xffff) << 12}, 4);
		} else {
			put16(mem + at[1], (ip >> 16 & 15) << 12 | f->fop);
			put16(mem + at[3], (dp >> 16 & 15) << 12);
		}
	} else if (wide) {
		memcpy(mem + at[0], &(uint32_t){(uint32_t)ip}, 4);
		memcpy(mem + at[1], &(uint32_t){(uint32_t)f->fop << 16}, 4);
		memcpy(mem + at[2], &(uint32_t){(uint32_t)dp}, 4);
		put16(mem + at[3], 0);
	} else {
		put16(mem + at[0], ip);
		put16(mem + at[1], 0);
		put16(mem + at[2], dp);
		put16(mem + at[3], 0);
	}
}

static void load_pointers(struct kl_vcpu *v, const uint8_t *mem, unsigned size, struct fx *f)
{
	const uint8_t *at = pointer_words(size);
	uint32_t hi = get16(mem + at[1]), dhi = get16(mem + at[3]);

	if (!real_layout(v))
		return; /* done by the instruction */
	if (at[0] == 12) {
		memcpy(&hi, mem + at[1], 4);
		memcpy(&dhi, mem + at[3], 4);
	}
	f->fop = hi & 0x7ff;
	f->fip = (uint32_t)(get16(mem + at[0]) | hi >> 12 << 16) - v->seg[KL_CS].base;
	f->fdp = (uint32_t)(get16(mem + at[2]) | dhi >> 12 << 16) - v->seg[KL_DS].base;
}

/* The beginning of an operand, with its faults. */
static uint64_t first_part(struct kl_vcpu *v, const struct kl_op *op, unsigned size, bool write)
{
	uint64_t lin = kl_mem_lin(v, op, size, write);
	uint8_t x[8];

	if (write)
		kl_probe_store(v, lin, size);
	else
		kl_read_bytes(v, lin, x, size);
	return lin;
}

/*
 * The address of a memory operand. AMD's processors look at the first word of an image and then at
 * its last byte, and have floats of 10 bytes in two pieces: at the segment as at the page.
 */
static uint64_t operand_lin(struct kl_vcpu *v, const struct kl_op *op, unsigned size, unsigned info)
{
	bool write = info & I_MEM_W, image = info & (I_ENV | I_LOADS_ENV);
	uint64_t lin, last;

	if (!(image || (size == 10 && !v->long_mode)) || !kl_checks_parts(op))
		return kl_mem_lin(v, op, size, write);
	if (!image) {
		lin = first_part(v, op, 8, write);
		(void)kl_mem_part(v, op, 8, 2, write);
		return lin;
	}
	lin = first_part(v, op, pointer_words(size)[0] == 12 ? 4 : 2, write);
	last = kl_mem_part(v, op, size - 1, 1, write);
	if (write)
		kl_probe_store(v, last, 1);
	else
		(void)kl_read(v, last, 1);
	return lin;
}

static enum kl_next thunked(struct kl_vcpu *v, const struct kl_op *op)
{
	struct kl_thunk_ctx c;
	struct fx f, *guest = state(v);
	unsigned info = (unsigned)op->imm & 0xffffff, size = op->imm >> I_SIZE_SHIFT & 0xff;
	uint16_t pending;

	check(v, info);
	if (info & I_MEM_R)
		kl_read_bytes(v, operand_lin(v, op, size, info), c.mem, size);
	f = *guest;
	f.mxcsr = 0x1f80;
	c.rax = info & I_REG_G ? *(uint64_t *)kl_gpr(v, op->reg) : v->gpr[KL_RAX];
	c.rcx = info & I_RM_G ? *(uint64_t *)kl_gpr(v, op->rm) : 0;
	c.flags = (v->rflags & KL_FL_STATUS) | 0x202;
	run(&c, &f, op->thunk);

	pending = f.fsw & (uint16_t)~f.fcw & KL_FPU_FLAGS;
	if ((info & I_MEM_W) && ((info & I_CONTROL) || !(pending & WITHHOLD))) {
		uint64_t lin = operand_lin(v, op, size, info);

		if (info & I_ENV)
			store_pointers(v, c.mem, size);
		if (size == 10 && kl_host_is_intel()) { /* in two pieces: the second may fault */
			kl_write_bytes(v, lin, c.mem, 8);
			kl_write_bytes(v, kl_linear_add(v, lin, 8), c.mem + 8, 2);
		} else {
			kl_write_bytes(v, lin, c.mem, size);
		}
	} else if ((info & I_MEM_W) && !kl_host_is_intel()) {
		/* AMD's processors look at where they would have stored. */
		kl_probe_store(v, operand_lin(v, op, size, info), size);
	}
	if (info & I_LOADS_ENV) {
		load_pointers(v, c.mem, size, &f);
	} else if (!(info & I_CONTROL) && f.fip != guest->fip) {
		/* The processor noted where it was; some do for unmasked exceptions only. */
		f.fip = v->rip;
		f.fdp = info & (I_MEM_R | I_MEM_W) ? kl_ea(v, op) : guest->fdp;
		f.fop = (uint16_t)(op->imm >> I_FOP_SHIFT & 0x7ff);
	}
	f.mxcsr = guest->mxcsr;
	f.mxcsr_mask = guest->mxcsr_mask;
	/* The reserved end of the area is software's. */
	memcpy(guest, &f, 416);
	kl_fpu_summarize(v);
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

/* ---- selection --------------------------------------------------------------------------- */

#define CASE(n) case ZYDIS_MNEMONIC_##n:

/* Bits for an instruction of the list, or -1. */
static int kind_of(ZydisMnemonic m)
{
	switch (m) {
		/* clang-format off */
	CASE(FNINIT) CASE(FNCLEX) CASE(FNSTCW) CASE(FNSTSW) CASE(FENI8087_NOP) CASE(FDISI8087_NOP)
	CASE(FSETPM287_NOP)
		return I_CONTROL | I_NOWAIT;
	CASE(FNSTENV) CASE(FNSAVE)
		return I_CONTROL | I_NOWAIT | I_ENV;
	CASE(FLDCW)
		return I_CONTROL;
	CASE(FLDENV) CASE(FRSTOR)
		return I_CONTROL | I_LOADS_ENV;
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
	int kind = kind_of(d->in.mnemonic);
	uint64_t info = (uint64_t)kind;
	uint8_t code[16];
	unsigned len;

	d->reads_flags = true;
	d->stores = true;
	if (d->in.mnemonic == ZYDIS_MNEMONIC_FWAIT) {
		d->op->fn = fwait;
		return true;
	}
	if (kind < 0 || d->in.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY)
		return false;
	for (unsigned i = 0; i < d->in.operand_count; i++)
		if (!note_operand(d, &d->opnd[i], &info))
			return false;
	len = kl_thunk_rewrite(d, -1, code);
	d->op->thunk = len ? kl_thunk_get(code, len) : NULL;
	if (!d->op->thunk)
		return false;
	info |= (uint64_t)((d->in.opcode & 7u) << 8 | d->op->bytes[d->in.raw.modrm.offset])
		<< I_FOP_SHIFT;
	d->op->imm = info;
	d->op->fn = thunked;
	return true;
}
