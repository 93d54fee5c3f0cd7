/* SPDX-License-Identifier: MIT */
/*
 * SSE to SSE4.2, AES, PCLMULQDQ, SHA, BMI and ADX. Plain moves are C; the rest, by the list
 * below and only if the host has it, runs natively in a thunk with its operands copied in and
 * out. Guest vector state lives only in v->xsave.
 */
#include <cpuid.h>
#include <string.h>

#include "host/cpu.h"
#include "x86/thunk.h"
#include "x86/vector.h"

#define MXCSR_MM (1u << 17) /* AMD: operands need not be aligned, besides those of moves */

/* What a thunk's op->imm says. */
enum {
	I_REG_X = 1 << 0, /* ModRM.reg is a vector register */
	I_REG_G = 1 << 1, /* ... a general one */
	I_REG_W = 1 << 2, /* ... written */
	I_RM_X = 1 << 3,
	I_RM_G = 1 << 4,
	I_RM_W = 1 << 5,
	I_VVVV_G = 1 << 6,
	I_VVVV_W = 1 << 7,
	I_MEM_R = 1 << 8,
	I_MEM_W = 1 << 9,
	I_ALIGN = 1 << 10,
	I_FP = 1 << 11,    /* uses MXCSR */
	I_FLAGS = 1 << 12, /* uses or changes EFLAGS */
	I_X0 = 1 << 13,    /* hidden XMM0; the fields start at xmm1 */
	I_X0_W = 1 << 14,
	I_RAX = 1 << 15, /* hidden general registers */
	I_RDX = 1 << 16,
	I_RCX_W = 1 << 17,
	I_GPR = 1 << 18,  /* no vector state involved */
	I_WIDE = 1 << 19, /* general registers are written with 64 bits */
	I_VEX = 1 << 20,
};
#define I_SIZE_SHIFT 24 /* bytes of the memory operand */

KL_INLINE void check_sse(struct kl_vcpu *v)
{
	if (KL_UNLIKELY((v->cr0 & (KL_CR0_EM | KL_CR0_TS)) || !(v->cr4 & KL_CR4_OSFXSR)))
		kl_raise(v,
			 (v->cr0 & KL_CR0_EM) || !(v->cr4 & KL_CR4_OSFXSR) ? KL_EXC_UD : KL_EXC_NM);
}

/* ---- moves in C: op->imm 1: the memory operand must be aligned ---------------------------- */

KL_INLINE uint64_t vector_lin(struct kl_vcpu *v, const struct kl_op *op, unsigned size, bool write)
{
	uint64_t lin = kl_mem_lin(v, op, size, write);

	if (KL_UNLIKELY(op->imm && (lin & (size - 1))))
		kl_raise_error(v, KL_EXC_GP, 0);
	return lin;
}

static enum kl_next mov128_rr(struct kl_vcpu *v, const struct kl_op *op)
{
	check_sse(v);
	memcpy(kl_xmm(v, op->reg), kl_xmm(v, op->rm), 16);
	return KL_NEXT;
}

static enum kl_next mov128_rm(struct kl_vcpu *v, const struct kl_op *op)
{
	uint8_t x[16];

	check_sse(v);
	kl_vec_read(v, vector_lin(v, op, 16, false), x, 16);
	memcpy(kl_xmm(v, op->reg), x, 16);
	return KL_NEXT;
}

static enum kl_next mov128_mr(struct kl_vcpu *v, const struct kl_op *op)
{
	check_sse(v);
	kl_vec_write(v, vector_lin(v, op, 16, true), kl_xmm(v, op->reg), 16);
	return KL_NEXT;
}

/* Load the low @size bytes and clear the rest; store them. */
#define MOV_LOW(size)                                                                    \
	static enum kl_next movlow##size##_rm(struct kl_vcpu *v, const struct kl_op *op) \
	{                                                                                \
		uint64_t x[2] = {0};                                                     \
                                                                                         \
		check_sse(v);                                                            \
		x[0] = kl_mem_read(v, op, size);                                         \
		memcpy(kl_xmm(v, op->reg), x, 16);                                       \
		return KL_NEXT;                                                          \
	}                                                                                \
	static enum kl_next movlow##size##_mr(struct kl_vcpu *v, const struct kl_op *op) \
	{                                                                                \
		uint64_t x;                                                              \
                                                                                         \
		check_sse(v);                                                            \
		memcpy(&x, kl_xmm(v, op->reg), 8);                                       \
		kl_write(v, kl_mem_lin(v, op, size, true), x, size);                     \
		return KL_NEXT;                                                          \
	}                                                                                \
	static enum kl_next movlow##size##_xg(struct kl_vcpu *v, const struct kl_op *op) \
	{                                                                                \
		uint64_t x[2] = {kl_gpr_get(v, op->rm, size), 0};                        \
                                                                                         \
		check_sse(v);                                                            \
		memcpy(kl_xmm(v, op->reg), x, 16);                                       \
		return KL_NEXT;                                                          \
	}                                                                                \
	static enum kl_next movlow##size##_gx(struct kl_vcpu *v, const struct kl_op *op) \
	{                                                                                \
		uint64_t x;                                                              \
                                                                                         \
		check_sse(v);                                                            \
		memcpy(&x, kl_xmm(v, op->rm), 8);                                        \
		kl_gpr_set(v, op->reg, x, size);                                         \
		return KL_NEXT;                                                          \
	}
MOV_LOW(4)
MOV_LOW(8)

static enum kl_next maskmovdqu(struct kl_vcpu *v, const struct kl_op *op)
{
	check_sse(v);
	kl_masked_bytes(v, op, kl_xmm(v, op->reg), kl_xmm(v, op->rm), 16);
	return KL_NEXT;
}

/* ---- SSE4a: op->imm has the length in bits 0..5, the index in 8..13 ------------------------- */

/* A field of 64 bits: its mask, and where it begins. Length 0 is 64. */
static uint64_t field_mask(uint64_t desc, unsigned *index)
{
	unsigned len = desc & 63;

	*index = (unsigned)(desc >> 8) & 63;
	return len ? (1ull << len) - 1 : ~0ull;
}

static void extract(struct kl_vcpu *v, unsigned reg, uint64_t desc)
{
	unsigned index;
	uint64_t mask = field_mask(desc, &index), *x = (uint64_t *)(void *)kl_xmm(v, reg);

	x[0] = x[0] >> index & mask;
	x[1] = 0;
}

static void insert(struct kl_vcpu *v, unsigned reg, uint64_t from, uint64_t desc)
{
	unsigned index;
	uint64_t mask = field_mask(desc, &index), *x = (uint64_t *)(void *)kl_xmm(v, reg);

	x[0] = (x[0] & ~(mask << index)) | (from & mask) << index;
	x[1] = 0;
}

static enum kl_next extrq_imm(struct kl_vcpu *v, const struct kl_op *op)
{
	check_sse(v);
	extract(v, op->reg, op->imm);
	return KL_NEXT;
}

static enum kl_next extrq(struct kl_vcpu *v, const struct kl_op *op)
{
	check_sse(v);
	extract(v, op->reg, *(uint64_t *)(void *)kl_xmm(v, op->rm));
	return KL_NEXT;
}

static enum kl_next insertq_imm(struct kl_vcpu *v, const struct kl_op *op)
{
	check_sse(v);
	insert(v, op->reg, *(uint64_t *)(void *)kl_xmm(v, op->rm), op->imm);
	return KL_NEXT;
}

static enum kl_next insertq(struct kl_vcpu *v, const struct kl_op *op)
{
	const uint64_t *from = (uint64_t *)(void *)kl_xmm(v, op->rm);

	check_sse(v);
	insert(v, op->reg, from[0], from[1]);
	return KL_NEXT;
}

/* ---- thunks ------------------------------------------------------------------------------ */

#define LOAD_ALL                                                                                  \
	"movups 128(%%rdi), %%xmm0\n\tmovups 144(%%rdi), %%xmm1\n\tmovups 160(%%rdi), %%xmm2\n\t" \
	"movups 176(%%rdi), %%xmm3\n\tmovq 192(%%rdi), %%rax\n\tmovq 200(%%rdi), %%rcx\n\t"       \
	"movq 208(%%rdi), %%rdx\n\tmovq 216(%%rdi), %%rsi\n\t"
#define SAVE_ALL                                                                                  \
	"movups %%xmm0, 128(%%rdi)\n\tmovups %%xmm1, 144(%%rdi)\n\tmovups %%xmm2, 160(%%rdi)\n\t" \
	"movups %%xmm3, 176(%%rdi)\n\tmovq %%rax, 192(%%rdi)\n\tmovq %%rcx, 200(%%rdi)\n\t"       \
	"movq %%rdx, 208(%%rdi)\n\tmovq %%rsi, 216(%%rdi)\n\t"
#define FLAGS_LOAD "pushq 224(%%rdi)\n\tpopfq\n\t"
#define FLAGS_SAVE "pushfq\n\tpopq 224(%%rdi)\n\t"
#define MXCSR_LOAD "stmxcsr 236(%%rdi)\n\tldmxcsr 232(%%rdi)\n\t"
#define MXCSR_SAVE "stmxcsr 232(%%rdi)\n\tldmxcsr 236(%%rdi)\n\t"
#define RUN(before, after)                                                                   \
	__asm__ volatile(LOAD_ALL before "call *%[fn]\n\t" after SAVE_ALL                    \
			 :                                                                   \
			 : "D"(c), [fn] "r"(fn)                                              \
			 : "rax", "rcx", "rdx", "rsi", "xmm0", "xmm1", "xmm2", "xmm3", "cc", \
			   "memory")

static void run(struct kl_thunk_ctx *c, void *thunk, unsigned info)
{
	register void *fn __asm__("r8") = thunk;

	switch (info & (I_FP | I_FLAGS)) {
	case 0:
		RUN("", "");
		break;
	case I_FP:
		RUN(MXCSR_LOAD, MXCSR_SAVE);
		break;
	case I_FLAGS:
		RUN(FLAGS_LOAD, FLAGS_SAVE);
		break;
	default:
		RUN(MXCSR_LOAD FLAGS_LOAD, FLAGS_SAVE MXCSR_SAVE);
		break;
	}
}

static void put_gpr(struct kl_vcpu *v, uint8_t offset, uint64_t x, unsigned info)
{
	kl_gpr_set(v, offset, x, info & I_WIDE ? 8 : 4);
}

static enum kl_next thunked(struct kl_vcpu *v, const struct kl_op *op)
{
	struct kl_thunk_ctx c;
	unsigned info = (unsigned)op->imm, size = (unsigned)(op->imm >> I_SIZE_SHIFT) & 0xff;
	unsigned first = info & I_X0 ? 1 : 0;
	uint64_t lin = 0;

	if (!(info & I_GPR))
		check_sse(v);
	else if (KL_UNLIKELY((info & I_VEX) && (!(v->cr0 & KL_CR0_PE) || (v->rflags & KL_FL_VM))))
		kl_raise(v, KL_EXC_UD);
	if (info & (I_MEM_R | I_MEM_W)) {
		lin = kl_mem_lin(v, op, size, info & I_MEM_W);
		if (KL_UNLIKELY((info & I_ALIGN) && (lin & 15)) && !(*kl_mxcsr(v) & MXCSR_MM))
			kl_raise_error(v, KL_EXC_GP, 0);
		if (info & I_MEM_R)
			kl_vec_read(v, lin, c.mem, size);
	}
	if (info & I_X0)
		memcpy(c.x[0], kl_xmm(v, 0), 16);
	if (info & I_REG_X)
		memcpy(c.x[first], kl_xmm(v, op->reg), 16);
	if (info & I_RM_X)
		memcpy(c.x[first + 1], kl_xmm(v, op->rm), 16);
	if (info & I_REG_G)
		c.rax = *(uint64_t *)kl_gpr(v, op->reg);
	if (info & I_RM_G)
		c.rcx = *(uint64_t *)kl_gpr(v, op->rm);
	if (info & I_VVVV_G)
		c.rsi = *(uint64_t *)kl_gpr(v, op->cond);
	if (info & I_RAX)
		c.rax = v->gpr[KL_RAX];
	if (info & I_RDX)
		c.rdx = v->gpr[KL_RDX];
	if (info & I_FLAGS)
		c.flags = (v->rflags & KL_FL_STATUS) | 0x202;
	if (info & I_FP)
		c.mxcsr = kl_mxcsr_quiet(v);
	run(&c, op->thunk, info);
	if (info & I_FP)
		kl_mxcsr_note(v, c.mxcsr);
	if (info & I_MEM_W)
		kl_vec_write(v, lin, c.mem, size);
	if (info & I_X0_W)
		memcpy(kl_xmm(v, 0), c.x[0], 16);
	if ((info & (I_RM_X | I_RM_W)) == (I_RM_X | I_RM_W))
		memcpy(kl_xmm(v, op->rm), c.x[first + 1], 16);
	if ((info & (I_REG_X | I_REG_W)) == (I_REG_X | I_REG_W))
		memcpy(kl_xmm(v, op->reg), c.x[first], 16);
	if ((info & (I_RM_G | I_RM_W)) == (I_RM_G | I_RM_W))
		put_gpr(v, op->rm, c.rcx, info);
	if ((info & (I_VVVV_G | I_VVVV_W)) == (I_VVVV_G | I_VVVV_W))
		put_gpr(v, op->cond, c.rsi, info);
	if ((info & (I_REG_G | I_REG_W)) == (I_REG_G | I_REG_W))
		put_gpr(v, op->reg, c.rax, info);
	if (info & I_RCX_W)
		put_gpr(v, 8 * KL_RCX, c.rcx, info);
	if (info & I_FLAGS)
		v->rflags = (v->rflags & ~(uint64_t)KL_FL_STATUS) | (c.flags & KL_FL_STATUS);
	return KL_NEXT;
}

/* ---- selection --------------------------------------------------------------------------- */

enum kind { NOT_OURS, INTEGER, FLOATING, UNALIGNED };

#define EACH4(X, n) X(n##PS) X(n##PD) X(n##SS) X(n##SD)
#define EACH2(X, n) X(n##PS) X(n##PD)
#define CASE(n)     case ZYDIS_MNEMONIC_##n:

/* The allow-list. UNALIGNED: a 16-byte memory operand need not be aligned. */
static enum kind kind_of(ZydisMnemonic m)
{
	switch (m) {
		/* clang-format off */
	EACH4(CASE, ADD) EACH4(CASE, SUB) EACH4(CASE, MUL) EACH4(CASE, DIV) EACH4(CASE, SQRT)
	EACH4(CASE, MIN) EACH4(CASE, MAX) EACH4(CASE, CMP) EACH4(CASE, ROUND) EACH2(CASE, HADD)
	EACH2(CASE, HSUB) EACH2(CASE, ADDSUB) EACH2(CASE, DP) CASE(COMISS) CASE(COMISD)
	CASE(UCOMISS) CASE(UCOMISD) CASE(CVTDQ2PD) CASE(CVTDQ2PS) CASE(CVTPD2DQ) CASE(CVTPD2PS)
	CASE(CVTPS2DQ) CASE(CVTPS2PD) CASE(CVTSD2SI) CASE(CVTSD2SS) CASE(CVTSI2SD) CASE(CVTSI2SS)
	CASE(CVTSS2SD) CASE(CVTSS2SI) CASE(CVTTPD2DQ) CASE(CVTTPS2DQ) CASE(CVTTSD2SI)
	CASE(CVTTSS2SI)
		return FLOATING;
	EACH2(CASE, AND) EACH2(CASE, ANDN) EACH2(CASE, OR) EACH2(CASE, XOR) EACH2(CASE, SHUF)
	EACH2(CASE, UNPCKH) EACH2(CASE, UNPCKL) EACH2(CASE, MOVMSK) EACH2(CASE, MOVH)
	EACH2(CASE, MOVL) EACH2(CASE, BLEND) EACH2(CASE, BLENDV) CASE(MOVHLPS) CASE(MOVLHPS)
	CASE(MOVSS) CASE(MOVSD) CASE(MOVQ) CASE(MOVD) CASE(RCPPS) CASE(RCPSS) CASE(RSQRTPS)
	CASE(RSQRTSS) CASE(MOVSLDUP) CASE(MOVSHDUP) CASE(MOVDDUP) CASE(EXTRACTPS) CASE(INSERTPS)
	CASE(PACKSSDW) CASE(PACKSSWB) CASE(PACKUSWB) CASE(PACKUSDW) CASE(PADDB) CASE(PADDW)
	CASE(PADDD) CASE(PADDQ) CASE(PADDSB) CASE(PADDSW) CASE(PADDUSB) CASE(PADDUSW) CASE(PSUBB)
	CASE(PSUBW) CASE(PSUBD) CASE(PSUBQ) CASE(PSUBSB) CASE(PSUBSW) CASE(PSUBUSB) CASE(PSUBUSW)
	CASE(PAND) CASE(PANDN) CASE(POR) CASE(PXOR) CASE(PAVGB) CASE(PAVGW) CASE(PCMPEQB)
	CASE(PCMPEQW) CASE(PCMPEQD) CASE(PCMPEQQ) CASE(PCMPGTB) CASE(PCMPGTW) CASE(PCMPGTD)
	CASE(PCMPGTQ) CASE(PEXTRB) CASE(PEXTRW) CASE(PEXTRD) CASE(PEXTRQ) CASE(PINSRB) CASE(PINSRW)
	CASE(PINSRD) CASE(PINSRQ) CASE(PMADDWD) CASE(PMADDUBSW) CASE(PMAXSB) CASE(PMAXSW)
	CASE(PMAXSD) CASE(PMAXUB) CASE(PMAXUW) CASE(PMAXUD) CASE(PMINSB) CASE(PMINSW) CASE(PMINSD)
	CASE(PMINUB) CASE(PMINUW) CASE(PMINUD) CASE(PMOVMSKB) CASE(PMULHUW) CASE(PMULHW)
	CASE(PMULLW) CASE(PMULLD) CASE(PMULDQ) CASE(PMULUDQ) CASE(PMULHRSW) CASE(PSADBW)
	CASE(MPSADBW) CASE(PSHUFB) CASE(PSHUFD) CASE(PSHUFHW) CASE(PSHUFLW) CASE(PSLLW) CASE(PSLLD)
	CASE(PSLLQ) CASE(PSLLDQ) CASE(PSRLW) CASE(PSRLD) CASE(PSRLQ) CASE(PSRLDQ) CASE(PSRAW)
	CASE(PSRAD) CASE(PUNPCKHBW) CASE(PUNPCKHWD) CASE(PUNPCKHDQ) CASE(PUNPCKHQDQ) CASE(PUNPCKLBW)
	CASE(PUNPCKLWD) CASE(PUNPCKLDQ) CASE(PUNPCKLQDQ) CASE(PHADDW) CASE(PHADDD) CASE(PHADDSW)
	CASE(PHSUBW) CASE(PHSUBD) CASE(PHSUBSW) CASE(PSIGNB) CASE(PSIGNW) CASE(PSIGND) CASE(PABSB)
	CASE(PABSW) CASE(PABSD) CASE(PALIGNR) CASE(PBLENDVB) CASE(PBLENDW) CASE(PHMINPOSUW)
	CASE(PMOVSXBW) CASE(PMOVSXBD) CASE(PMOVSXBQ) CASE(PMOVSXWD) CASE(PMOVSXWQ) CASE(PMOVSXDQ)
	CASE(PMOVZXBW) CASE(PMOVZXBD) CASE(PMOVZXBQ) CASE(PMOVZXWD) CASE(PMOVZXWQ) CASE(PMOVZXDQ)
	CASE(PTEST) CASE(AESDEC) CASE(AESDECLAST) CASE(AESENC) CASE(AESENCLAST) CASE(AESIMC)
	CASE(AESKEYGENASSIST) CASE(PCLMULQDQ) 	CASE(GF2P8AFFINEINVQB) CASE(GF2P8AFFINEQB) CASE(GF2P8MULB) CASE(ANDN) CASE(BEXTR)
	CASE(BLSI) CASE(BLSMSK) CASE(BLSR) CASE(BZHI) CASE(MULX) CASE(PDEP) CASE(PEXT) CASE(RORX)
	CASE(SARX) CASE(SHLX) CASE(SHRX) CASE(ADCX) CASE(ADOX)
		return INTEGER;
	CASE(PCMPESTRI) CASE(PCMPESTRM) CASE(PCMPISTRI) CASE(PCMPISTRM)
		return UNALIGNED;
	CASE(SHA1MSG1) CASE(SHA1MSG2) CASE(SHA1NEXTE) CASE(SHA1RNDS4) CASE(SHA256MSG1)
	CASE(SHA256MSG2) CASE(SHA256RNDS2)
		return kl_host_is_intel() ? INTEGER : UNALIGNED;
	/* clang-format on */
	default:
		return NOT_OURS;
	}
}

/* A word of leaf 7. CPUID may be a trap: once. Bit 63 marks that it was asked. */
static uint64_t leaf7(void)
{
	static _Atomic uint64_t cached;
	uint64_t r = atomic_load_explicit(&cached, memory_order_relaxed);
	unsigned a, b, c, d;

	if (!r) {
		r = 1ull << 63;
		if (__get_cpuid_count(7, 0, &a, &b, &c, &d))
			r |= b | (uint64_t)(c & 0x7fffffff) << 32;
		atomic_store_explicit(&cached, r, memory_order_relaxed);
	}
	return r;
}

/* ECX of leaf 1, for features that clang 14 has no name for. */
static uint32_t leaf1(void)
{
	static _Atomic uint32_t cached; /* CPUID is slow in a virtual machine */
	uint32_t ecx = atomic_load_explicit(&cached, memory_order_relaxed), a, b, d;

	if (!ecx && __get_cpuid(1, &a, &b, &ecx, &d))
		atomic_store_explicit(&cached, ecx, memory_order_relaxed);
	return ecx;
}
#define ECX1(n) (1u << (n))

static bool host_has_clzero(void)
{
	static _Atomic int cached;
	int r = atomic_load_explicit(&cached, memory_order_relaxed);
	unsigned a, b, c, d;

	if (!r) {
		r = __get_cpuid(0x80000008, &a, &b, &c, &d) && (b & 1) ? 1 : -1;
		atomic_store_explicit(&cached, r, memory_order_relaxed);
	}
	return r > 0;
}

#define EBX(n) (1ull << (n))
#define ECX(n) (1ull << (32 + (n)))

bool kl_host_has(const struct kl_decode *d)
{
	bool vex = d->in.encoding == ZYDIS_INSTRUCTION_ENCODING_VEX;

	switch (d->in.meta.isa_ext) {
	case ZYDIS_ISA_EXT_SSE:
	case ZYDIS_ISA_EXT_SSE2:
		return true;
	case ZYDIS_ISA_EXT_SSE3:
		return __builtin_cpu_supports("sse3");
	case ZYDIS_ISA_EXT_SSSE3:
		return __builtin_cpu_supports("ssse3");
	case ZYDIS_ISA_EXT_SSE4:
		return __builtin_cpu_supports("sse4.2");
	case ZYDIS_ISA_EXT_SSE4A:
		return __builtin_cpu_supports("sse4a");
	case ZYDIS_ISA_EXT_AES:
		return __builtin_cpu_supports("aes");
	case ZYDIS_ISA_EXT_PCLMULQDQ:
		return __builtin_cpu_supports("pclmul");
	case ZYDIS_ISA_EXT_BMI1:
		return __builtin_cpu_supports("bmi");
	case ZYDIS_ISA_EXT_BMI2:
		return __builtin_cpu_supports("bmi2");
	case ZYDIS_ISA_EXT_RDRAND:
		return leaf1() & ECX1(30);
	case ZYDIS_ISA_EXT_RDSEED:
		return leaf7() & EBX(18);
	case ZYDIS_ISA_EXT_CLZERO:
		return host_has_clzero();
	case ZYDIS_ISA_EXT_SHA:
		return leaf7() & EBX(29);
	case ZYDIS_ISA_EXT_ADOX_ADCX:
		return leaf7() & EBX(19);
	case ZYDIS_ISA_EXT_AVX:
		return __builtin_cpu_supports("avx");
	case ZYDIS_ISA_EXT_AVX2:
	case ZYDIS_ISA_EXT_AVX2GATHER:
		return __builtin_cpu_supports("avx2");
	case ZYDIS_ISA_EXT_FMA:
		return __builtin_cpu_supports("fma");
	case ZYDIS_ISA_EXT_F16C:
		return __builtin_cpu_supports("avx") && (leaf1() & ECX1(29));
	case ZYDIS_ISA_EXT_AVXAES:
		return __builtin_cpu_supports("avx") && __builtin_cpu_supports("aes");
	case ZYDIS_ISA_EXT_GFNI:
		return (leaf7() & ECX(8)) && (!vex || __builtin_cpu_supports("avx"));
	/* Zydis names the extension of the wider form. */
	case ZYDIS_ISA_EXT_VAES:
		return vex && __builtin_cpu_supports("avx") &&
		       (d->in.raw.vex.L ? (leaf7() & ECX(9)) != 0 : __builtin_cpu_supports("aes"));
	case ZYDIS_ISA_EXT_VPCLMULQDQ:
		return vex && __builtin_cpu_supports("avx") &&
		       (d->in.raw.vex.L ? (leaf7() & ECX(10)) != 0
					: __builtin_cpu_supports("pclmul"));
	default:
		return false;
	}
}

/* Note one operand in *info; false: a shape that thunks do not have. */
static bool note_operand(struct kl_decode *d, const ZydisDecodedOperand *o, uint64_t *info)
{
	bool written = o->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE;
	bool x = kl_is_class(o, ZYDIS_REGCLASS_XMM), g = kl_is_gpr(o);
	struct kl_op *op = d->op;

	if (o->type == ZYDIS_OPERAND_TYPE_IMMEDIATE)
		return true;
	if (o->type == ZYDIS_OPERAND_TYPE_MEMORY) {
		if (o->visibility == ZYDIS_OPERAND_VISIBILITY_HIDDEN || o->size > 128)
			return false;
		*info |= (uint64_t)(o->size / 8) << I_SIZE_SHIFT;
		if (o->actions & ZYDIS_OPERAND_ACTION_MASK_READ)
			*info |= I_MEM_R;
		if (written)
			*info |= I_MEM_W;
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
		*info |= (x ? I_REG_X : I_REG_G) | (written ? I_REG_W : 0);
		return x || g;
	case ZYDIS_OPERAND_ENCODING_MODRM_RM:
		op->rm = g ? (uint8_t)(8 * kl_register_number(o)) : kl_register_number(o);
		*info |= (x ? I_RM_X : I_RM_G) | (written ? I_RM_W : 0);
		return x || g;
	case ZYDIS_OPERAND_ENCODING_NDSNDD:
		op->cond = (uint8_t)(8 * kl_register_number(o));
		*info |= I_VVVV_G | (written ? I_VVVV_W : 0);
		return g;
	default:
		break;
	}
	/* Hidden ones. */
	if (x && kl_register_number(o) == 0)
		*info |= I_X0 | (written ? I_X0_W : 0);
	else if (g && kl_register_number(o) == KL_RAX && !written)
		*info |= I_RAX;
	else if (g && kl_register_number(o) == KL_RDX && !written)
		*info |= I_RDX;
	else if (g && kl_register_number(o) == KL_RCX && written)
		*info |= I_RCX_W;
	else
		return false;
	return true;
}

static bool select_thunk(struct kl_decode *d)
{
	enum kind kind = kind_of(d->in.mnemonic);
	uint64_t info = kind == FLOATING ? I_FP : 0;
	uint8_t code[16];
	unsigned len;

	if (kind == NOT_OURS || !kl_host_has(d))
		return false;
	for (unsigned i = 0; i < d->in.operand_count; i++)
		if (!note_operand(d, &d->opnd[i], &info))
			return false;
	if (!(info & (I_REG_X | I_RM_X)))
		info |= I_GPR;
	if (d->in.encoding == ZYDIS_INSTRUCTION_ENCODING_VEX)
		info |= I_VEX;
	if (d->in.encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY && kind != UNALIGNED &&
	    info >> I_SIZE_SHIFT == 16)
		info |= I_ALIGN;
	len = kl_thunk_rewrite(d, info & I_X0 ? 1 : 0, code);
	d->op->thunk = len ? kl_thunk_get(code, len) : NULL;
	if (!d->op->thunk)
		return false;
	d->op->imm = info;
	d->op->fn = thunked;
	d->reads_flags = true;
	d->stores = info & I_MEM_W;
	return true;
}

static bool select_move128(struct kl_decode *d, bool aligned)
{
	kl_number_registers(d);
	if (d->opnd[0].type == ZYDIS_OPERAND_TYPE_MEMORY)
		kl_select_move(d, mov128_mr);
	else
		kl_select_move(d, d->opnd[1].type == ZYDIS_OPERAND_TYPE_MEMORY ? mov128_rm
									       : mov128_rr);
	d->op->imm = aligned;
	return true;
}

static bool select_move_low(struct kl_decode *d, unsigned size)
{
	const ZydisDecodedOperand *a = &d->opnd[0], *b = &d->opnd[1];
	bool wide = size == 8;

	if (kl_is_class(a, ZYDIS_REGCLASS_XMM) && kl_is_class(b, ZYDIS_REGCLASS_XMM))
		return select_thunk(d);
	kl_number_registers(d);
	if (a->type == ZYDIS_OPERAND_TYPE_MEMORY)
		return kl_select_move(d, wide ? movlow8_mr : movlow4_mr);
	if (b->type == ZYDIS_OPERAND_TYPE_MEMORY)
		return kl_select_move(d, wide ? movlow8_rm : movlow4_rm);
	if (kl_is_class(a, ZYDIS_REGCLASS_XMM))
		return kl_select_move(d, wide ? movlow8_xg : movlow4_xg);
	return kl_select_move(d, wide ? movlow8_gx : movlow4_gx);
}

static bool select_field(struct kl_decode *d, kl_op_fn *regs, kl_op_fn *imm)
{
	const ZydisDecodedInstruction *in = &d->in;

	kl_number_registers(d);
	if (!in->raw.imm[0].size)
		return kl_select_move(d, regs);
	kl_select_move(d, imm);
	d->op->imm = (in->raw.imm[0].value.u & 0xff) | (in->raw.imm[1].value.u & 0xff) << 8;
	return true;
}

static bool select_sse4a(struct kl_decode *d)
{
	switch (d->in.mnemonic) {
	case ZYDIS_MNEMONIC_EXTRQ:
		return select_field(d, extrq, extrq_imm);
	case ZYDIS_MNEMONIC_INSERTQ:
		return select_field(d, insertq, insertq_imm);
	case ZYDIS_MNEMONIC_MOVNTSS:
		return select_move_low(d, 4);
	case ZYDIS_MNEMONIC_MOVNTSD:
		return select_move_low(d, 8);
	default:
		return false;
	}
}

bool kl_select_sse(struct kl_decode *d)
{
	for (unsigned i = 0; i < d->in.operand_count_visible; i++)
		if (kl_is_class(&d->opnd[i], ZYDIS_REGCLASS_MMX))
			return false; /* ops_mmx.c */
	if (d->in.meta.isa_ext == ZYDIS_ISA_EXT_SSE4A)
		return kl_host_has(d) && select_sse4a(d);
	switch (d->in.mnemonic) {
	case ZYDIS_MNEMONIC_MOVAPS:
	case ZYDIS_MNEMONIC_MOVAPD:
	case ZYDIS_MNEMONIC_MOVDQA:
	case ZYDIS_MNEMONIC_MOVNTPS:
	case ZYDIS_MNEMONIC_MOVNTPD:
	case ZYDIS_MNEMONIC_MOVNTDQ:
		return select_move128(d, true);
	case ZYDIS_MNEMONIC_MOVNTDQA:
		return kl_host_has(d) && select_move128(d, true);
	case ZYDIS_MNEMONIC_MOVUPS:
	case ZYDIS_MNEMONIC_MOVUPD:
	case ZYDIS_MNEMONIC_MOVDQU:
		return select_move128(d, false);
	case ZYDIS_MNEMONIC_LDDQU:
		return kl_host_has(d) && select_move128(d, false);
	case ZYDIS_MNEMONIC_MOVSS:
	case ZYDIS_MNEMONIC_MOVD:
		return select_move_low(d, 4);
	case ZYDIS_MNEMONIC_MOVSD:
	case ZYDIS_MNEMONIC_MOVQ:
		return select_move_low(d, 8);
	case ZYDIS_MNEMONIC_MASKMOVDQU:
		kl_number_registers(d);
		kl_select_move(d, maskmovdqu);
		d->stores = true;
		return true;
	default:
		return select_thunk(d);
	}
}
