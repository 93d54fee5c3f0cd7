/* SPDX-License-Identifier: MIT */
/*
 * VEX-encoded vector instructions: AVX, AVX2, FMA, F16C, VAES, VPCLMULQDQ, GFNI. Plain moves
 * are C; the rest, by the list below and only if the host has it, runs natively in a thunk
 * with its registers loaded whole, so that what VEX does to upper halves comes by itself.
 */
#include <string.h>

#include "host/cpu.h"
#include "x86/access.h"
#include "x86/decode.h"
#include "x86/fpu.h"
#include "x86/thunk.h"
#include "x86/vector.h"

/* What op->imm says. Canonical vector registers: 0 reg, 1 rm, 2 vvvv, 3 imm8[7:4]; if xmm0 is a
 * hidden operand it is 0 and the others move up. */
enum {
	I_W0 = 1 << 0, /* canonical register 0 is written */
	I_W1 = 1 << 1,
	I_RM_X = 1 << 2,   /* ModRM.rm is a vector register */
	I_REG_G = 1 << 3,  /* ModRM.reg is a general register */
	I_REG_GW = 1 << 4, /* ... written */
	I_RM_G = 1 << 5,
	I_RM_GW = 1 << 6,
	I_MEM_R = 1 << 7,
	I_MEM_W = 1 << 8,
	I_FP = 1 << 9, /* uses MXCSR */
	I_FLAGS = 1 << 10,
	I_X0 = 1 << 11,
	I_RAX = 1 << 12, /* hidden general registers */
	I_RDX = 1 << 13,
	I_RCX_W = 1 << 14,
	I_WIDE = 1 << 15, /* general registers are written with 64 bits */
	I_IS4 = 1 << 16,
};
/* Bits that only the general handler knows. */
#define I_GENERAL \
	(I_W1 | I_REG_G | I_RM_G | I_MEM_W | I_FLAGS | I_X0 | I_RAX | I_RDX | I_RCX_W | I_IS4)
#define I_SIZE_SHIFT 24 /* bytes of the memory operand */
#define I_IS4_SHIFT  32

KL_INLINE unsigned mem_size(const struct kl_op *op)
{
	return (unsigned)(op->imm >> I_SIZE_SHIFT) & 0xff;
}

/* ---- thunks ------------------------------------------------------------------------------ */

#define LOAD(n, p)                                                                             \
	"vmovups (%[" p "]), %%xmm" n "\n\tvinsertf128 $1, 416(%[" p "]), %%ymm" n ", %%ymm" n \
	"\n\t"
#define SAVE_BOTH "vmovups %%ymm0, 256(%%rdi)\n\tvmovups %%ymm1, 288(%%rdi)\n\tvzeroupper\n\t"
_Static_assert(KL_YMM_HI == 416, "LOAD");
_Static_assert(offsetof(struct kl_thunk_ctx, y) == 256, "SAVE_BOTH");

/* Destination and up to two sources, all vectors: most instructions. */
KL_INLINE void run3(struct kl_vcpu *v, const struct kl_op *op, struct kl_thunk_ctx *c)
{
	uint8_t *d = kl_xmm(v, op->reg), *a = kl_xmm(v, op->rm), *b = kl_xmm(v, op->cond);
	void *thunk = op->thunk;
	register void *fn __asm__("r8") = thunk; /* last: a sanitizer's calls would destroy it */

	__asm__ volatile(
		LOAD("0", "d") LOAD("1", "a") LOAD(
			"2", "b") "call *%[fn]\n\t"
				  "vmovups %%xmm0, (%[d])\n\tvextractf128 $1, %%ymm0, 416(%[d])\n\t"
				  "vzeroupper"
		:
		: "D"(c), [fn] "r"(fn), [d] "r"(d), [a] "r"(a), [b] "r"(b)
		: "xmm0", "xmm1", "xmm2", "cc", "memory");
}

/* The same with MXCSR; the result comes into the context first. */
KL_INLINE void run3_fp(struct kl_vcpu *v, const struct kl_op *op, struct kl_thunk_ctx *c)
{
	uint8_t *d = kl_xmm(v, op->reg), *a = kl_xmm(v, op->rm), *b = kl_xmm(v, op->cond);
	void *thunk = op->thunk;
	register void *fn __asm__("r8");

	c->mxcsr = kl_mxcsr_quiet(v);
	fn = thunk;
	__asm__ volatile(LOAD("0", "d") LOAD("1", "a")
				 LOAD("2", "b") "stmxcsr 236(%%rdi)\n\tldmxcsr 232(%%rdi)\n\t"
						"call *%[fn]\n\t"
						"stmxcsr 232(%%rdi)\n\tldmxcsr 236(%%rdi)\n\t"
						"vmovups %%ymm0, 256(%%rdi)\n\tvzeroupper"
			 :
			 : "D"(c), [fn] "r"(fn), [d] "r"(d), [a] "r"(a), [b] "r"(b)
			 : "xmm0", "xmm1", "xmm2", "cc", "memory");
	kl_mxcsr_note(v, c->mxcsr);
	memcpy(d, c->y[0], 16);
	memcpy(d + KL_YMM_HI, c->y[0] + 16, 16);
}

static enum kl_next thunk_rr(struct kl_vcpu *v, const struct kl_op *op)
{
	struct kl_thunk_ctx c;

	kl_check_avx(v);
	run3(v, op, &c);
	return KL_NEXT;
}

static enum kl_next thunk_rm(struct kl_vcpu *v, const struct kl_op *op)
{
	struct kl_thunk_ctx c;
	unsigned size = mem_size(op);

	kl_check_avx(v);
	kl_vec_read(v, kl_mem_lin(v, op, size, false), c.mem, size);
	run3(v, op, &c);
	return KL_NEXT;
}

static enum kl_next thunk_fp_rr(struct kl_vcpu *v, const struct kl_op *op)
{
	struct kl_thunk_ctx c;

	kl_check_avx(v);
	run3_fp(v, op, &c);
	return KL_NEXT;
}

static enum kl_next thunk_fp_rm(struct kl_vcpu *v, const struct kl_op *op)
{
	struct kl_thunk_ctx c;
	unsigned size = mem_size(op);

	kl_check_avx(v);
	kl_vec_read(v, kl_mem_lin(v, op, size, false), c.mem, size);
	run3_fp(v, op, &c);
	return KL_NEXT;
}

static void run_general(struct kl_thunk_ctx *c, void *thunk, uint8_t *const x[4])
{
	uint8_t *p0 = x[0], *p1 = x[1], *p2 = x[2], *p3 = x[3];
	register void *fn __asm__("r8") = thunk;

	__asm__ volatile(
		LOAD("0", "p0") LOAD("1", "p1") LOAD("2", "p2") LOAD(
			"3", "p3") "movq 192(%%rdi), %%rax\n\tmovq 200(%%rdi), %%rcx\n\t"
				   "movq 208(%%rdi), %%rdx\n\t"
				   "stmxcsr 236(%%rdi)\n\tldmxcsr 232(%%rdi)\n\t"
				   "pushq 224(%%rdi)\n\tpopfq\n\t"
				   "call *%[fn]\n\t"
				   "pushfq\n\tpopq 224(%%rdi)\n\t"
				   "stmxcsr 232(%%rdi)\n\tldmxcsr 236(%%rdi)\n\t"
				   "movq %%rax, 192(%%rdi)\n\tmovq %%rcx, 200(%%rdi)\n\t" SAVE_BOTH
		:
		: "D"(c), [fn] "r"(fn), [p0] "r"(p0), [p1] "r"(p1), [p2] "r"(p2), [p3] "r"(p3)
		: "rax", "rcx", "rdx", "xmm0", "xmm1", "xmm2", "xmm3", "cc", "memory");
}

static void put_ymm(uint8_t *x, const uint8_t *y)
{
	memcpy(x, y, 16);
	memcpy(x + KL_YMM_HI, y + 16, 16);
}

/*
 * VCVTPS2PH flushes nothing to zero, so kl_mxcsr_quiet() does not make it show results that are
 * tiny and exact: underflows all the same, if they are not masked.
 */
static uint32_t tiny_halves(const struct kl_vcpu *v, const uint8_t *x, unsigned len)
{
	uint16_t half;

	for (unsigned i = 0; i < len && !(*kl_mxcsr(v) & KL_MXCSR_UM); i += 2) {
		memcpy(&half, x + i, 2);
		if (!(half & 0x7c00) && (half & 0x3ff))
			return KL_MXCSR_UE;
	}
	return 0;
}

static enum kl_next thunk_general(struct kl_vcpu *v, const struct kl_op *op)
{
	struct kl_thunk_ctx c = {0};
	unsigned info = (unsigned)op->imm, size = mem_size(op), gsize = info & I_WIDE ? 8 : 4;
	/* On Intel's processors what the result raises comes before its place's faults. */
	bool late = (info & I_MEM_W) && (info & I_FP) && kl_host_is_intel();
	uint8_t *x[4];
	uint64_t lin = 0;

	kl_check_avx(v);
	if ((info & (I_MEM_R | I_MEM_W)) && !late) {
		lin = kl_mem_lin(v, op, size, info & I_MEM_W);
		if (info & I_MEM_R)
			kl_vec_read(v, lin, c.mem, size);
	}
	/* Where a field is no vector register, any will do. */
	x[0] = kl_xmm(v, info & I_REG_G ? 0 : op->reg);
	x[1] = kl_xmm(v, info & I_RM_X ? op->rm : 0);
	x[2] = kl_xmm(v, op->cond);
	x[3] = kl_xmm(v, (unsigned)(op->imm >> I_IS4_SHIFT) & 15);
	if (info & I_X0) {
		x[3] = x[2];
		x[2] = x[1];
		x[1] = x[0];
		x[0] = kl_xmm(v, 0);
	}
	c.rax = info & I_REG_G ? *(uint64_t *)kl_gpr(v, op->reg) : v->gpr[KL_RAX];
	c.rcx = info & I_RM_G ? *(uint64_t *)kl_gpr(v, op->rm) : 0;
	c.rdx = v->gpr[KL_RDX];
	c.flags = (v->rflags & KL_FL_STATUS) | 0x202;
	c.mxcsr = kl_mxcsr_quiet(v);
	run_general(&c, op->thunk, x);
	if (op->mnemonic == ZYDIS_MNEMONIC_VCVTPS2PH)
		c.mxcsr |=
			tiny_halves(v, info & I_MEM_W ? c.mem : c.y[1], info & I_MEM_W ? size : 16);
	/* Else faults of the store come before #XM and before MXCSR changes. */
	if ((info & I_FP) && kl_host_is_intel())
		kl_mxcsr_note(v, c.mxcsr);
	if (late)
		lin = kl_mem_lin(v, op, size, true);
	if ((info & I_MEM_W) && !((info & I_FP) && kl_mxcsr_raises(v, c.mxcsr)))
		kl_vec_write(v, lin, c.mem, size);
	else if (info & I_MEM_W)
		kl_probe_store(v, lin, size);
	if ((info & I_FP) && !kl_host_is_intel())
		kl_mxcsr_note(v, c.mxcsr);
	if (info & I_W0)
		put_ymm(x[0], c.y[0]);
	if (info & I_W1)
		put_ymm(x[1], c.y[1]);
	if (info & I_REG_GW)
		kl_gpr_set(v, op->reg, c.rax, gsize);
	if (info & I_RM_GW)
		kl_gpr_set(v, op->rm, c.rcx, gsize);
	if (info & I_RCX_W)
		kl_gpr_set(v, 8 * KL_RCX, c.rcx, gsize);
	if (info & I_FLAGS)
		v->rflags = (v->rflags & ~(uint64_t)KL_FL_STATUS) | (c.flags & KL_FL_STATUS);
	return KL_NEXT;
}

/* ---- moves in C: op->imm 1: the memory operand must be aligned ---------------------------- */

KL_INLINE uint64_t vector_lin(struct kl_vcpu *v, const struct kl_op *op, unsigned size, bool write)
{
	uint64_t lin = kl_mem_lin(v, op, size, write);

	if (KL_UNLIKELY(op->imm && (lin & (size - 1))))
		kl_raise_error(v, KL_EXC_GP, 0);
	return lin;
}

KL_INLINE void put_xmm(struct kl_vcpu *v, unsigned n, const void *x)
{
	uint8_t *d = kl_xmm(v, n);

	memcpy(d, x, 16);
	memset(d + KL_YMM_HI, 0, 16);
}

static enum kl_next mov128_rr(struct kl_vcpu *v, const struct kl_op *op)
{
	kl_check_avx(v);
	put_xmm(v, op->reg, kl_xmm(v, op->rm));
	return KL_NEXT;
}

static enum kl_next mov128_rm(struct kl_vcpu *v, const struct kl_op *op)
{
	uint8_t x[16];

	kl_check_avx(v);
	kl_vec_read(v, vector_lin(v, op, 16, false), x, 16);
	put_xmm(v, op->reg, x);
	return KL_NEXT;
}

static enum kl_next mov128_mr(struct kl_vcpu *v, const struct kl_op *op)
{
	kl_check_avx(v);
	kl_vec_write(v, vector_lin(v, op, 16, true), kl_xmm(v, op->reg), 16);
	return KL_NEXT;
}

static enum kl_next mov256_rr(struct kl_vcpu *v, const struct kl_op *op)
{
	uint8_t *d = kl_xmm(v, op->reg);
	const uint8_t *s = kl_xmm(v, op->rm);

	kl_check_avx(v);
	memmove(d, s, 16);
	memmove(d + KL_YMM_HI, s + KL_YMM_HI, 16);
	return KL_NEXT;
}

static enum kl_next mov256_rm(struct kl_vcpu *v, const struct kl_op *op)
{
	uint8_t x[32] __attribute__((aligned(32)));

	kl_check_avx(v);
	kl_vec_read(v, vector_lin(v, op, 32, false), x, 32);
	put_ymm(kl_xmm(v, op->reg), x);
	return KL_NEXT;
}

static enum kl_next mov256_mr(struct kl_vcpu *v, const struct kl_op *op)
{
	uint8_t x[32] __attribute__((aligned(32)));

	kl_check_avx(v);
	memcpy(x, kl_xmm(v, op->reg), 16);
	memcpy(x + 16, kl_xmm(v, op->reg) + KL_YMM_HI, 16);
	kl_vec_write(v, vector_lin(v, op, 32, true), x, 32);
	return KL_NEXT;
}

/* Load the low @size bytes and clear the rest; store them. */
#define MOV_LOW(size)                                                                    \
	static enum kl_next movlow##size##_rm(struct kl_vcpu *v, const struct kl_op *op) \
	{                                                                                \
		uint64_t x[2] = {0};                                                     \
                                                                                         \
		kl_check_avx(v);                                                         \
		x[0] = kl_mem_read(v, op, size);                                         \
		put_xmm(v, op->reg, x);                                                  \
		return KL_NEXT;                                                          \
	}                                                                                \
	static enum kl_next movlow##size##_mr(struct kl_vcpu *v, const struct kl_op *op) \
	{                                                                                \
		uint64_t x;                                                              \
                                                                                         \
		kl_check_avx(v);                                                         \
		memcpy(&x, kl_xmm(v, op->reg), 8);                                       \
		kl_write(v, kl_mem_lin(v, op, size, true), x, size);                     \
		return KL_NEXT;                                                          \
	}                                                                                \
	static enum kl_next movlow##size##_xg(struct kl_vcpu *v, const struct kl_op *op) \
	{                                                                                \
		uint64_t x[2] = {kl_gpr_get(v, op->rm, size), 0};                        \
                                                                                         \
		kl_check_avx(v);                                                         \
		put_xmm(v, op->reg, x);                                                  \
		return KL_NEXT;                                                          \
	}                                                                                \
	static enum kl_next movlow##size##_gx(struct kl_vcpu *v, const struct kl_op *op) \
	{                                                                                \
		uint64_t x;                                                              \
                                                                                         \
		kl_check_avx(v);                                                         \
		memcpy(&x, kl_xmm(v, op->rm), 8);                                        \
		kl_gpr_set(v, op->reg, x, size);                                         \
		return KL_NEXT;                                                          \
	}
MOV_LOW(4)
MOV_LOW(8)

/* Outside 64-bit code there are eight registers, and the others stay what they are. */
static enum kl_next vzero(struct kl_vcpu *v, const struct kl_op *op)
{
	unsigned n = v->code_mode == KL_CODE64 ? 16 : 8;

	kl_check_avx(v);
	if (op->imm)
		memset(kl_xmm(v, 0), 0, 16 * n);
	memset(kl_xmm(v, 0) + KL_YMM_HI, 0, 16 * n);
	return KL_NEXT;
}

/* ---- selection --------------------------------------------------------------------------- */

enum kind { NOT_OURS, INTEGER, FLOATING };

#define CASE(n)    case ZYDIS_MNEMONIC_V##n:
#define EACH4(n)   CASE(n##PS) CASE(n##PD) CASE(n##SS) CASE(n##SD)
#define EACH2(n)   CASE(n##PS) CASE(n##PD)
#define BWD(n)     CASE(n##B) CASE(n##W) CASE(n##D)
#define ORDERS4(n) EACH4(n##132) EACH4(n##213) EACH4(n##231)
#define ORDERS2(n) EACH2(n##132) EACH2(n##213) EACH2(n##231)

/* The allow-list. */
static enum kind kind_of(ZydisMnemonic m)
{
	switch (m) {
		/* clang-format off */
	EACH4(ADD) EACH4(SUB) EACH4(MUL) EACH4(DIV) EACH4(SQRT) EACH4(MIN) EACH4(MAX) EACH4(CMP)
	EACH4(ROUND) EACH2(HADD) EACH2(HSUB) EACH2(ADDSUB) EACH2(DP) CASE(COMISS) CASE(COMISD)
	CASE(UCOMISS) CASE(UCOMISD) CASE(CVTDQ2PD) CASE(CVTDQ2PS) CASE(CVTPD2DQ) CASE(CVTPD2PS)
	CASE(CVTPS2DQ) CASE(CVTPS2PD) CASE(CVTSD2SI) CASE(CVTSD2SS) CASE(CVTSI2SD) CASE(CVTSI2SS)
	CASE(CVTSS2SD) CASE(CVTSS2SI) CASE(CVTTPD2DQ) CASE(CVTTPS2DQ) CASE(CVTTSD2SI)
	CASE(CVTTSS2SI) CASE(CVTPH2PS) CASE(CVTPS2PH) ORDERS4(FMADD) ORDERS4(FMSUB)
	ORDERS4(FNMADD) ORDERS4(FNMSUB) ORDERS2(FMADDSUB) ORDERS2(FMSUBADD)
		return FLOATING;
	EACH2(AND) EACH2(ANDN) EACH2(OR) EACH2(XOR) EACH2(SHUF) EACH2(UNPCKH) EACH2(UNPCKL)
	EACH2(MOVMSK) EACH2(MOVH) EACH2(MOVL) EACH2(BLEND) EACH2(BLENDV) EACH2(PERMIL) EACH2(PERM)
	EACH2(TEST) CASE(RCPPS) CASE(RSQRTPS) CASE(MOVHLPS) CASE(MOVLHPS) CASE(MOVSS) CASE(MOVSD)
	CASE(MOVQ) CASE(RCPSS) CASE(RSQRTSS) CASE(MOVSLDUP) CASE(MOVSHDUP) CASE(MOVDDUP)
	CASE(EXTRACTPS) CASE(INSERTPS) CASE(EXTRACTF128) CASE(EXTRACTI128) CASE(INSERTF128)
	CASE(INSERTI128) CASE(BROADCASTF128) CASE(BROADCASTI128) CASE(BROADCASTSD)
	CASE(BROADCASTSS) BWD(PBROADCAST) CASE(PBROADCASTQ) CASE(PERM2F128) CASE(PERM2I128)
	CASE(PERMD) CASE(PERMQ) CASE(PACKSSDW) CASE(PACKSSWB) CASE(PACKUSWB) CASE(PACKUSDW)
	BWD(PADD) CASE(PADDQ) CASE(PADDSB) CASE(PADDSW) CASE(PADDUSB) CASE(PADDUSW) BWD(PSUB)
	CASE(PSUBQ) CASE(PSUBSB) CASE(PSUBSW) CASE(PSUBUSB) CASE(PSUBUSW) CASE(PAND) CASE(PANDN)
	CASE(POR) CASE(PXOR) CASE(PAVGB) CASE(PAVGW) BWD(PCMPEQ) CASE(PCMPEQQ) BWD(PCMPGT)
	CASE(PCMPGTQ) BWD(PEXTR) CASE(PEXTRQ) BWD(PINSR) CASE(PINSRQ) CASE(PMADDWD)
	CASE(PMADDUBSW) BWD(PMAXS) BWD(PMAXU) BWD(PMINS) BWD(PMINU) CASE(PMOVMSKB) CASE(PMULHUW)
	CASE(PMULHW) CASE(PMULLW) CASE(PMULLD) CASE(PMULDQ) CASE(PMULUDQ) CASE(PMULHRSW)
	CASE(PSADBW) CASE(MPSADBW) CASE(PSHUFB) CASE(PSHUFD) CASE(PSHUFHW) CASE(PSHUFLW)
	CASE(PSLLW) CASE(PSLLD) CASE(PSLLQ) CASE(PSLLDQ) CASE(PSRLW) CASE(PSRLD) CASE(PSRLQ)
	CASE(PSRLDQ) CASE(PSRAW) CASE(PSRAD) CASE(PSLLVD) CASE(PSLLVQ) CASE(PSRLVD) CASE(PSRLVQ)
	CASE(PSRAVD) CASE(PUNPCKHBW) CASE(PUNPCKHWD) CASE(PUNPCKHDQ) CASE(PUNPCKHQDQ)
	CASE(PUNPCKLBW) CASE(PUNPCKLWD) CASE(PUNPCKLDQ) CASE(PUNPCKLQDQ) CASE(PHADDW) CASE(PHADDD)
	CASE(PHADDSW) CASE(PHSUBW) CASE(PHSUBD) CASE(PHSUBSW) BWD(PSIGN) BWD(PABS) CASE(PALIGNR)
	CASE(PBLENDVB) CASE(PBLENDW) CASE(PBLENDD) CASE(PHMINPOSUW) CASE(PMOVSXBW) CASE(PMOVSXBD)
	CASE(PMOVSXBQ) CASE(PMOVSXWD) CASE(PMOVSXWQ) CASE(PMOVSXDQ) CASE(PMOVZXBW) CASE(PMOVZXBD)
	CASE(PMOVZXBQ) CASE(PMOVZXWD) CASE(PMOVZXWQ) CASE(PMOVZXDQ) CASE(PTEST) CASE(AESDEC)
	CASE(AESDECLAST) CASE(AESENC) CASE(AESENCLAST) CASE(AESIMC) CASE(AESKEYGENASSIST)
	CASE(PCLMULQDQ) CASE(GF2P8AFFINEINVQB) CASE(GF2P8AFFINEQB) CASE(GF2P8MULB)
	CASE(PCMPESTRI) CASE(PCMPESTRM) CASE(PCMPISTRI) CASE(PCMPISTRM)
		return INTEGER;
	/* clang-format on */
	default:
		return NOT_OURS;
	}
}

static bool is_vector(const ZydisDecodedOperand *o)
{
	return kl_is_class(o, ZYDIS_REGCLASS_XMM) || kl_is_class(o, ZYDIS_REGCLASS_YMM);
}

/* Registers that ModRM, vvvv and imm8 do not name. */
static bool note_hidden(const ZydisDecodedOperand *o, bool written, uint64_t *info)
{
	if (kl_is_class(o, ZYDIS_REGCLASS_XMM) && kl_register_number(o) == 0 && written)
		*info |= I_X0 | I_W0;
	else if (kl_is_gpr(o) && kl_register_number(o) == KL_RAX && !written)
		*info |= I_RAX;
	else if (kl_is_gpr(o) && kl_register_number(o) == KL_RDX && !written)
		*info |= I_RDX;
	else if (kl_is_gpr(o) && kl_register_number(o) == KL_RCX && written)
		*info |= I_RCX_W;
	else
		return false;
	return true;
}

/* Note one operand in *info; false: a shape that thunks do not have. */
static bool note_operand(struct kl_decode *d, const ZydisDecodedOperand *o, uint64_t *info)
{
	bool written = o->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE;
	bool x = is_vector(o), g = kl_is_gpr(o);
	struct kl_op *op = d->op;

	if (o->type == ZYDIS_OPERAND_TYPE_IMMEDIATE)
		return true;
	if (o->type == ZYDIS_OPERAND_TYPE_MEMORY) {
		if (o->visibility == ZYDIS_OPERAND_VISIBILITY_HIDDEN ||
		    o->mem.type != ZYDIS_MEMOP_TYPE_MEM || o->size > 256)
			return false;
		*info |= (uint64_t)(o->size / 8) << I_SIZE_SHIFT;
		*info |= written ? I_MEM_W : I_MEM_R;
		return true;
	}
	if (o->type != ZYDIS_OPERAND_TYPE_REGISTER)
		return false;
	if (kl_is_class(o, ZYDIS_REGCLASS_FLAGS)) {
		*info |= I_FLAGS;
		return true;
	}
	if (g && o->size == 64)
		*info |= I_WIDE;
	switch (o->encoding) {
	case ZYDIS_OPERAND_ENCODING_MODRM_REG:
		op->reg = g ? (uint8_t)(8 * kl_register_number(o)) : kl_register_number(o);
		*info |= g ? I_REG_G | (written ? I_REG_GW : 0) : written ? I_W0 : 0;
		return x || g;
	case ZYDIS_OPERAND_ENCODING_MODRM_RM:
		op->rm = g ? (uint8_t)(8 * kl_register_number(o)) : kl_register_number(o);
		*info |= g ? I_RM_G | (written ? I_RM_GW : 0) : I_RM_X | (written ? I_W1 : 0);
		return x || g;
	case ZYDIS_OPERAND_ENCODING_NDSNDD:
		/* A destination here (shifts by an immediate count) is numbered as reg's. */
		*(written ? &op->reg : &op->cond) = kl_register_number(o);
		*info |= written ? I_W0 : 0;
		return x;
	case ZYDIS_OPERAND_ENCODING_IS4:
		*info |= I_IS4 | (uint64_t)kl_register_number(o) << I_IS4_SHIFT;
		return x && !written;
	default:
		return note_hidden(o, written, info);
	}
}

static bool select_thunk(struct kl_decode *d)
{
	enum kind kind = kind_of(d->in.mnemonic);
	uint64_t info = kind == FLOATING ? I_FP : 0;
	struct kl_op *op = d->op;
	uint8_t code[16];
	unsigned len;

	if (kind == NOT_OURS || !kl_host_has(d))
		return false;
	op->reg = op->rm = op->cond = 0;
	for (unsigned i = 0; i < d->in.operand_count; i++)
		if (!note_operand(d, &d->opnd[i], &info))
			return false;
	len = kl_thunk_rewrite(d, info & I_X0 ? 1 : 0, code);
	op->thunk = len ? kl_thunk_get(code, len) : NULL;
	if (!op->thunk)
		return false;
	op->imm = info;
	if ((info & I_GENERAL) || !(info & I_W0))
		op->fn = thunk_general;
	else if (info & I_MEM_R)
		op->fn = info & I_FP ? thunk_fp_rm : thunk_rm;
	else
		op->fn = info & I_FP ? thunk_fp_rr : thunk_rr;
	d->reads_flags = true;
	d->stores = info & I_MEM_W;
	return true;
}

static bool select_move(struct kl_decode *d, bool aligned)
{
	static kl_op_fn *const fn[2][3] = {
		{mov128_rr, mov128_rm, mov128_mr},
		{mov256_rr, mov256_rm, mov256_mr},
	};
	bool load = d->opnd[1].type == ZYDIS_OPERAND_TYPE_MEMORY;
	bool store = d->opnd[0].type == ZYDIS_OPERAND_TYPE_MEMORY;

	kl_number_registers(d);
	kl_select_move(d, fn[d->in.raw.vex.L][store ? 2 : load]);
	d->op->imm = aligned;
	return true;
}

static bool select_move_low(struct kl_decode *d, unsigned size)
{
	const ZydisDecodedOperand *a = &d->opnd[0], *b = &d->opnd[1];
	bool wide = size == 8;

	if (is_vector(a) && is_vector(b))
		return select_thunk(d);
	kl_number_registers(d);
	if (a->type == ZYDIS_OPERAND_TYPE_MEMORY)
		return kl_select_move(d, wide ? movlow8_mr : movlow4_mr);
	if (b->type == ZYDIS_OPERAND_TYPE_MEMORY)
		return kl_select_move(d, wide ? movlow8_rm : movlow4_rm);
	if (is_vector(a))
		return kl_select_move(d, wide ? movlow8_xg : movlow4_xg);
	return kl_select_move(d, wide ? movlow8_gx : movlow4_gx);
}

bool kl_select_avx(struct kl_decode *d)
{
	if (d->in.encoding != ZYDIS_INSTRUCTION_ENCODING_VEX || !kl_host_has(d))
		return false;
	switch (d->in.mnemonic) {
	case ZYDIS_MNEMONIC_VMOVAPS:
	case ZYDIS_MNEMONIC_VMOVAPD:
	case ZYDIS_MNEMONIC_VMOVDQA:
	case ZYDIS_MNEMONIC_VMOVNTPS:
	case ZYDIS_MNEMONIC_VMOVNTPD:
	case ZYDIS_MNEMONIC_VMOVNTDQ:
	case ZYDIS_MNEMONIC_VMOVNTDQA:
		return select_move(d, true);
	case ZYDIS_MNEMONIC_VMOVUPS:
	case ZYDIS_MNEMONIC_VMOVUPD:
	case ZYDIS_MNEMONIC_VMOVDQU:
	case ZYDIS_MNEMONIC_VLDDQU:
		return select_move(d, false);
	case ZYDIS_MNEMONIC_VMOVSS:
	case ZYDIS_MNEMONIC_VMOVD:
		return select_move_low(d, 4);
	case ZYDIS_MNEMONIC_VMOVSD:
	case ZYDIS_MNEMONIC_VMOVQ:
		return select_move_low(d, 8);
	case ZYDIS_MNEMONIC_VZEROALL:
	case ZYDIS_MNEMONIC_VZEROUPPER:
		kl_select_move(d, vzero);
		d->op->imm = d->in.mnemonic == ZYDIS_MNEMONIC_VZEROALL;
		return true;
	case ZYDIS_MNEMONIC_VLDMXCSR:
	case ZYDIS_MNEMONIC_VSTMXCSR:
		d->op->fn =
			d->in.mnemonic == ZYDIS_MNEMONIC_VLDMXCSR ? kl_op_ldmxcsr : kl_op_stmxcsr;
		d->stores = true;
		return true;
	default:
		return kl_select_avx_mem(d) || select_thunk(d);
	}
}
