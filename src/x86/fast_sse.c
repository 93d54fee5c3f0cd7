/* SPDX-License-Identifier: MIT */
/*
 * Fast handlers: SSE moves, the usual arithmetic, and through its thunk whatever takes two
 * vector operands and nothing else.
 *
 * MXCSR: if the guest's is the default but for the exception flags, the host's is set to the
 * default with none, and collects them (v->mxcsr_lent) until something else than a fast handler
 * runs. With another MXCSR op->fn does it.
 */
#include "x86/fast.h"
#include "x86/vector.h"

#define HANDLER(name) static const struct kl_op *name(struct kl_vcpu *v, const struct kl_op *op)

#define MXCSR_DEFAULT 0x1f80u

static KL_COLD bool borrow_mxcsr(struct kl_vcpu *v)
{
	if ((*kl_mxcsr(v) & ~KL_MXCSR_FLAGS) != MXCSR_DEFAULT)
		return false;
	v->host_mxcsr = __builtin_ia32_stmxcsr();
	__builtin_ia32_ldmxcsr(MXCSR_DEFAULT);
	v->mxcsr_lent = true;
	v->avx_lent = kl_avx_enabled(v);
	return true;
}

void kl_fast_return_mxcsr(struct kl_vcpu *v)
{
	uint32_t *mxcsr = (uint32_t *)(void *)(v->xsave + 24);

	*mxcsr |= __builtin_ia32_stmxcsr() & KL_MXCSR_FLAGS;
	__builtin_ia32_ldmxcsr(v->host_mxcsr);
	v->mxcsr_lent = v->avx_lent = false;
}

KL_INLINE bool enabled(const struct kl_vcpu *v)
{
	return !(v->cr0 & (KL_CR0_EM | KL_CR0_TS)) && (v->cr4 & KL_CR4_OSFXSR);
}

KL_INLINE bool fp_enabled(struct kl_vcpu *v)
{
	return enabled(v) && (v->mxcsr_lent || borrow_mxcsr(v));
}

bool kl_fast_lend_mxcsr(struct kl_vcpu *v)
{
	return fp_enabled(v);
}

#define XMM(v, n) (*(kl_v128 *)(void *)kl_xmm(v, n))

/* ---- moves of 16 bytes; op->imm: the memory operand must be aligned -------------------------- */

HANDLER(mov128_rr)
{
	if (KL_UNLIKELY(!enabled(v)))
		return kl_fast_call(v, op);
	XMM(v, op->reg) = XMM(v, op->rm);
	KL_NEXT_OP(v, op + 1);
}

#define MOV128(at)                                                           \
	HANDLER(mov128_rm_##at)                                              \
	{                                                                    \
		uint64_t lin = KL_FAST_LIN_##at(v, op);                      \
		void *p = kl_fast_read(v, op, lin, 16);                      \
                                                                             \
		if (KL_UNLIKELY(!p || !enabled(v) || (lin & 15 & -op->imm))) \
			return kl_fast_call(v, op);                          \
		XMM(v, op->reg) = kl_load128(p);                             \
		KL_NEXT_OP(v, op + 1);                                       \
	}                                                                    \
	HANDLER(mov128_mr_##at)                                              \
	{                                                                    \
		uint64_t lin = KL_FAST_LIN_##at(v, op);                      \
		void *p = kl_fast_write(v, op, lin, 16);                     \
                                                                             \
		if (KL_UNLIKELY(!p || !enabled(v) || (lin & 15 & -op->imm))) \
			return kl_fast_call(v, op);                          \
		kl_store128(p, XMM(v, op->reg));                             \
		return kl_fast_stored(v, op, p);                             \
	}
MOV128(b)
MOV128(x)

/* ---- moves of the low 4 or 8 bytes ------------------------------------------------------------
 */

#define MOV_LOW(bits, at)                                                          \
	HANDLER(mov##bits##_rm_##at)                                               \
	{                                                                          \
		void *p = kl_fast_read(v, op, KL_FAST_LIN_##at(v, op), bits / 8);  \
                                                                                   \
		if (KL_UNLIKELY(!p || !enabled(v)))                                \
			return kl_fast_call(v, op);                                \
		XMM(v, op->reg) = (kl_v128){(long long)kl_load##bits(p), 0};       \
		KL_NEXT_OP(v, op + 1);                                             \
	}                                                                          \
	HANDLER(mov##bits##_mr_##at)                                               \
	{                                                                          \
		void *p = kl_fast_write(v, op, KL_FAST_LIN_##at(v, op), bits / 8); \
                                                                                   \
		if (KL_UNLIKELY(!p || !enabled(v)))                                \
			return kl_fast_call(v, op);                                \
		kl_store##bits(p, *(uint##bits##_t *)(void *)kl_xmm(v, op->reg));  \
		return kl_fast_stored(v, op, p);                                   \
	}
#define MOV_GPR(bits)                                                                       \
	HANDLER(mov##bits##_xg)                                                             \
	{                                                                                   \
		if (KL_UNLIKELY(!enabled(v)))                                               \
			return kl_fast_call(v, op);                                         \
		XMM(v, op->reg) = (kl_v128){(long long)KL_FAST_REG(v, op->rm, bits), 0};    \
		KL_NEXT_OP(v, op + 1);                                                      \
	}                                                                                   \
	HANDLER(mov##bits##_gx)                                                             \
	{                                                                                   \
		if (KL_UNLIKELY(!enabled(v)))                                               \
			return kl_fast_call(v, op);                                         \
		KL_FAST_REG(v, op->reg, 64) = *(uint##bits##_t *)(void *)kl_xmm(v, op->rm); \
		KL_NEXT_OP(v, op + 1);                                                      \
	}
#define MOV_LOW_ALL(bits) MOV_LOW(bits, b) MOV_LOW(bits, x) MOV_GPR(bits)
MOV_LOW_ALL(32)
MOV_LOW_ALL(64)

struct moves {
	kl_run_fn *rm[2], *mr[2], *xg, *gx;
};
#define MOVES(n)                                                           \
	{                                                                  \
		{n##_rm_b, n##_rm_x}, {n##_mr_b, n##_mr_x}, n##_xg, n##_gx \
	}
static const struct moves low[2] = {MOVES(mov32), MOVES(mov64)};
static kl_run_fn *const mov128_rm[2] = {mov128_rm_b, mov128_rm_x};
static kl_run_fn *const mov128_mr[2] = {mov128_mr_b, mov128_mr_x};

/* ---- arithmetic --------------------------------------------------------------------------------
 */

#define LOAD_16(p) kl_load128(p)
#define LOAD_8(p)  ((kl_v128){(long long)kl_load64(p), 0})
#define LOAD_4(p)  ((kl_v128){(long long)kl_load32(p), 0})
/* Only 16 bytes have to be aligned. */
#define MISALIGNED_16(lin) ((lin)&15)
#define MISALIGNED_8(lin)  0
#define MISALIGNED_4(lin)  0

#define BINARY_RM(name, size, insn, ready, at)                              \
	HANDLER(name##_rm_##at)                                             \
	{                                                                   \
		uint64_t lin = KL_FAST_LIN_##at(v, op);                     \
		void *p = kl_fast_read(v, op, lin, size);                   \
		kl_v128 s, d;                                               \
                                                                            \
		if (KL_UNLIKELY(!p || !ready(v) || MISALIGNED_##size(lin))) \
			return kl_fast_call(v, op);                         \
		s = LOAD_##size(p);                                         \
		d = XMM(v, op->reg);                                        \
		__asm__ volatile(insn " %1, %0" : "+x"(d) : "x"(s));        \
		XMM(v, op->reg) = d;                                        \
		KL_NEXT_OP(v, op + 1);                                      \
	}
#define BINARY(name, NAME, size, insn, ready)                                     \
	HANDLER(name##_rr)                                                        \
	{                                                                         \
		kl_v128 d = XMM(v, op->reg);                                      \
                                                                                  \
		if (KL_UNLIKELY(!ready(v)))                                       \
			return kl_fast_call(v, op);                               \
		__asm__ volatile(insn " %1, %0" : "+x"(d) : "x"(XMM(v, op->rm))); \
		XMM(v, op->reg) = d;                                              \
		KL_NEXT_OP(v, op + 1);                                            \
	}                                                                         \
	BINARY_RM(name, size, insn, ready, b) BINARY_RM(name, size, insn, ready, x)
#define FLOAT4(X, n, N)                          \
	X(n##ps, N##PS, 16, #n "ps", fp_enabled) \
	X(n##pd, N##PD, 16, #n "pd", fp_enabled) \
	X(n##ss, N##SS, 4, #n "ss", fp_enabled) X(n##sd, N##SD, 8, #n "sd", fp_enabled)
#define PACKED(X, n, N) X(n, N, 16, #n, enabled)
// clang-format off
#define ARITHMETIC(X) \
	FLOAT4(X, add, ADD) FLOAT4(X, sub, SUB) FLOAT4(X, mul, MUL) FLOAT4(X, div, DIV) \
	FLOAT4(X, min, MIN) FLOAT4(X, max, MAX) \
	PACKED(X, andps, ANDPS) PACKED(X, andpd, ANDPD) PACKED(X, orps, ORPS) PACKED(X, orpd, ORPD) \
	PACKED(X, xorps, XORPS) PACKED(X, xorpd, XORPD) PACKED(X, pand, PAND) PACKED(X, pandn, PANDN) \
	PACKED(X, por, POR) PACKED(X, pxor, PXOR) PACKED(X, paddb, PADDB) PACKED(X, paddw, PADDW) \
	PACKED(X, paddd, PADDD) PACKED(X, paddq, PADDQ) PACKED(X, psubb, PSUBB) PACKED(X, psubd, PSUBD) \
	PACKED(X, psubq, PSUBQ) PACKED(X, pcmpeqb, PCMPEQB) PACKED(X, pcmpeqd, PCMPEQD) \
	PACKED(X, pminub, PMINUB) PACKED(X, punpckldq, PUNPCKLDQ) PACKED(X, punpcklqdq, PUNPCKLQDQ)
// clang-format on
ARITHMETIC(BINARY)

/* ---- anything else, through its thunk
 * ------------------------------------------------------------ */

/* As kl_thunk_rewrite() has it: xmm0 and xmm1, or xmm0 and [rdi]. */
KL_INLINE void thunk_rr(void *thunk, kl_v128 *d, kl_v128 s)
{
	register kl_v128 x0 __asm__("xmm0") = *d;
	register kl_v128 x1 __asm__("xmm1") = s;

	__asm__ volatile("call *%2" : "+x"(x0) : "x"(x1), "r"(thunk) : "cc", "memory");
	*d = x0;
}

KL_INLINE void thunk_rm(void *thunk, kl_v128 *d, const uint8_t *s)
{
	register kl_v128 x0 __asm__("xmm0") = *d;
	register const uint8_t *rdi __asm__("rdi") = s;

	__asm__ volatile("call *%2" : "+x"(x0) : "r"(rdi), "r"(thunk) : "cc", "memory");
	*d = x0;
}

HANDLER(thunk_two_rr)
{
	if (KL_UNLIKELY(!fp_enabled(v)))
		return kl_fast_call(v, op);
	thunk_rr(op->thunk, &XMM(v, op->reg), XMM(v, op->rm));
	KL_NEXT_OP(v, op + 1);
}

#define THUNK_RM(at)                                                      \
	HANDLER(thunk_two_rm_##at)                                        \
	{                                                                 \
		uint64_t lin = KL_FAST_LIN_##at(v, op);                   \
		void *p = kl_fast_read(v, op, lin, 16);                   \
                                                                          \
		if (KL_UNLIKELY(!p || !fp_enabled(v) || (lin & 15)))      \
			return kl_fast_call(v, op);                       \
		*(kl_v128 *)(void *)v->vector_operand = kl_load128(p);    \
		thunk_rm(op->thunk, &XMM(v, op->reg), v->vector_operand); \
		KL_NEXT_OP(v, op + 1);                                    \
	}
THUNK_RM(b)
THUNK_RM(x)
static kl_run_fn *const thunk_two_rm[2] = {thunk_two_rm_b, thunk_two_rm_x};

/* ---- selection
 * ----------------------------------------------------------------------------------- */

static bool is_memory(const ZydisDecodedOperand *o)
{
	return o->type == ZYDIS_OPERAND_TYPE_MEMORY;
}

/* op->imm is as ops_sse.c's own moves want it. */
static kl_run_fn *select_move128(const struct kl_decode *d)
{
	return is_memory(&d->opnd[0])   ? kl_fast_pick(d->op, mov128_mr)
	       : is_memory(&d->opnd[1]) ? kl_fast_pick(d->op, mov128_rm)
					: mov128_rr;
}

static kl_run_fn *select_thunk(const struct kl_decode *d)
{
	const ZydisDecodedOperand *a = &d->opnd[0], *b = &d->opnd[1];

	/* No hidden operands, and none but the two and immediates. */
	if (!d->op->thunk || d->in.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY ||
	    d->in.operand_count != d->in.operand_count_visible || d->in.operand_count < 2 ||
	    d->in.operand_count > 3 || !kl_is_class(a, ZYDIS_REGCLASS_XMM) ||
	    a->encoding != ZYDIS_OPERAND_ENCODING_MODRM_REG)
		return NULL;
	if (d->in.operand_count == 3 && d->opnd[2].type != ZYDIS_OPERAND_TYPE_IMMEDIATE)
		return NULL;
	if (is_memory(b))
		return b->size == 128 ? kl_fast_pick(d->op, thunk_two_rm) : NULL;
	return kl_is_class(b, ZYDIS_REGCLASS_XMM) && b->encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM
		       ? thunk_two_rr
		       : NULL;
}

static kl_run_fn *select_move_low(const struct kl_decode *d, bool wide)
{
	const ZydisDecodedOperand *a = &d->opnd[0], *b = &d->opnd[1];
	bool to = kl_is_class(a, ZYDIS_REGCLASS_XMM), from = kl_is_class(b, ZYDIS_REGCLASS_XMM);

	if (is_memory(a))
		return from ? kl_fast_pick(d->op, low[wide].mr) : NULL;
	if (is_memory(b))
		return to ? kl_fast_pick(d->op, low[wide].rm) : NULL;
	if (to && from)
		return select_thunk(d);
	return to ? low[wide].xg : low[wide].gx;
}

kl_run_fn *kl_fast_select_sse(const struct kl_decode *d)
{
	if (d->in.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY ||
	    d->in.operand_count_visible < 2 ||
	    (!kl_is_class(&d->opnd[0], ZYDIS_REGCLASS_XMM) &&
	     !kl_is_class(&d->opnd[1], ZYDIS_REGCLASS_XMM)))
		return NULL;
	switch (d->in.mnemonic) {
	case ZYDIS_MNEMONIC_MOVAPS:
	case ZYDIS_MNEMONIC_MOVAPD:
	case ZYDIS_MNEMONIC_MOVDQA:
	case ZYDIS_MNEMONIC_MOVUPS:
	case ZYDIS_MNEMONIC_MOVUPD:
	case ZYDIS_MNEMONIC_MOVDQU:
		return select_move128(d);
	case ZYDIS_MNEMONIC_MOVSS:
	case ZYDIS_MNEMONIC_MOVD:
		return select_move_low(d, false);
	case ZYDIS_MNEMONIC_MOVSD:
	case ZYDIS_MNEMONIC_MOVQ:
		return select_move_low(d, true);
#define ROW(name, NAME, ...)                                                           \
	case ZYDIS_MNEMONIC_##NAME:                                                    \
		return !is_memory(&d->opnd[1])                           ? name##_rr   \
		       : d->op->index != KL_NOREG || d->op->seg >= KL_FS ? name##_rm_x \
									 : name##_rm_b;
		ARITHMETIC(ROW)
#undef ROW
	default:
		return select_thunk(d);
	}
}
