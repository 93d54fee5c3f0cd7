/* SPDX-License-Identifier: MIT */
/*
 * Vector registers and vector operands in memory, for ops_sse.c and ops_avx*.c.
 *
 * The guest's registers live only in v->xsave: the low halves in the legacy region, the upper
 * ones KL_YMM_HI further on.
 */
#pragma once

#include "x86/ops.h"

#define KL_XMM_OFFSET 160u
#define KL_YMM_OFFSET 576u
#define KL_YMM_HI     (KL_YMM_OFFSET - KL_XMM_OFFSET)

/* The low half; the upper one lies KL_YMM_HI behind it. */
KL_INLINE uint8_t *kl_xmm(struct kl_vcpu *v, unsigned n)
{
	return v->xsave + KL_XMM_OFFSET + 16 * n;
}

KL_INLINE const uint32_t *kl_mxcsr(const struct kl_vcpu *v)
{
	return (const uint32_t *)(const void *)(v->xsave + 24);
}

#define KL_MXCSR_FLAGS 0x3fu
#define KL_MXCSR_FIRST 0x07u /* IE, DE, ZE: found before anything is computed */
#define KL_MXCSR_UE    0x10u
#define KL_MXCSR_MASKS 0x1f80u
#define KL_MXCSR_UM    0x0800u
#define KL_MXCSR_FZ    0x8000u

/*
 * What an instruction of the guest runs with: no exception noted, all masked. If the guest
 * wants underflows, those must show that are exact, too: they do if the result is flushed to
 * zero. (That they are exact does not show then: PE is set.)
 */
KL_INLINE uint32_t kl_mxcsr_quiet(const struct kl_vcpu *v)
{
	uint32_t x = *kl_mxcsr(v) & 0xffc0;

	return (x & KL_MXCSR_UM ? x : x | KL_MXCSR_FZ) | KL_MXCSR_MASKS;
}

/* Will kl_mxcsr_note() raise? */
KL_INLINE bool kl_mxcsr_raises(const struct kl_vcpu *v, uint32_t after)
{
	return after & KL_MXCSR_FLAGS & ~(*kl_mxcsr(v) >> 7);
}

/*
 * #XM, or note the masked exceptions that an instruction left in @after, which began with
 * kl_mxcsr_quiet(). Nothing else may have happened yet.
 */
KL_INLINE void kl_mxcsr_note(struct kl_vcpu *v, uint32_t after)
{
	uint32_t *mxcsr = (uint32_t *)(void *)(v->xsave + 24), flags = after & KL_MXCSR_FLAGS;
	uint32_t unmasked = ~(*mxcsr >> 7);

	if (KL_LIKELY(!(flags & unmasked))) {
		*mxcsr |= flags;
		return;
	}
	if (flags & unmasked & KL_MXCSR_FIRST)
		flags &= KL_MXCSR_FIRST;
	*mxcsr |= flags;
	kl_raise(v, v->cr4 & KL_CR4_OSXMMEXCPT ? KL_EXC_XM : KL_EXC_UD);
}

/* VEX: in protected mode only, with the state enabled by the guest. CR0.EM is not looked at. */
KL_INLINE bool kl_avx_enabled(const struct kl_vcpu *v)
{
	return (v->cr0 & (KL_CR0_PE | KL_CR0_TS)) == KL_CR0_PE && (v->cr4 & KL_CR4_OSXSAVE) &&
	       (v->xcr0 & 6) == 6 && !(v->rflags & KL_FL_VM);
}

KL_INLINE void kl_check_avx(struct kl_vcpu *v)
{
	const uint64_t bits = KL_CR0_PE | KL_CR0_TS;

	if (KL_UNLIKELY(!kl_avx_enabled(v)))
		kl_raise(v, (v->cr0 & bits) != bits || !(v->cr4 & KL_CR4_OSXSAVE) ||
					    (v->xcr0 & 6) != 6 || (v->rflags & KL_FL_VM)
				    ? KL_EXC_UD
				    : KL_EXC_NM);
}

#if !KL_TSAN
/* 32 bytes in one instruction that can be abandoned; only where the host has AVX. */
KL_INLINE void kl_load_ymm(void *dst, const void *src)
{
	__asm__ volatile("1: vmovups (%1), %%ymm0\n\t" KL_EXTABLE("1b") "vmovups %%ymm0, (%0)\n\t"
									"vzeroupper"
			 :
			 : "r"(dst), "r"(src)
			 : "xmm0", "memory");
}

KL_INLINE void kl_store_ymm(void *dst, const void *src)
{
	__asm__ volatile("vmovups (%1), %%ymm0\n\t"
			 "1: vmovups %%ymm0, (%0)\n\t" KL_EXTABLE("1b") "vzeroupper"
			 :
			 : "r"(dst), "r"(src)
			 : "xmm0", "memory");
}
#else
KL_INLINE void kl_load_words(void *dst, const void *src, unsigned n)
{
	for (unsigned i = 0; i < n; i++) {
		uint64_t x = kl_load64((const uint8_t *)src + 8 * i);

		__builtin_memcpy((uint8_t *)dst + 8 * i, &x, 8);
	}
}

KL_INLINE void kl_store_words(void *dst, const void *src, unsigned n)
{
	for (unsigned i = 0; i < n; i++) {
		uint64_t x;

		__builtin_memcpy(&x, (const uint8_t *)src + 8 * i, 8);
		kl_store64((uint8_t *)dst + 8 * i, x);
	}
}
#define kl_load_ymm(d, s)  kl_load_words(d, s, 4)
#define kl_store_ymm(d, s) kl_store_words(d, s, 4)
#endif

/* Operands of vector instructions: through the TLB, without a call. @buf has 8 bytes or more. */
KL_INLINE void kl_vec_read(struct kl_vcpu *v, uint64_t lin, void *buf, unsigned size)
{
	const struct kl_tlb_entry *e = kl_tlb_data(v, lin);
	uint64_t x;

	if (size == 1 || size == 2 || size == 4 || size == 8) {
		x = kl_read(v, lin, size);
		__builtin_memcpy(buf, &x, 8);
		return;
	}
	if (KL_LIKELY(e->rtag == (lin & KL_PAGE_MASK) &&
		      (lin & ~KL_PAGE_MASK) + size <= KL_PAGE_SIZE)) {
		const void *p = kl_tlb_host(e, lin);

		if (size == 16) {
			*(kl_v128 *)buf = kl_load128(p);
			return;
		}
		if (size == 32) {
			kl_load_ymm(buf, p);
			return;
		}
	}
	kl_read_bytes(v, lin, buf, size);
}

KL_INLINE void kl_vec_write(struct kl_vcpu *v, uint64_t lin, const void *buf, unsigned size)
{
	const struct kl_tlb_entry *e = kl_tlb_data(v, lin);
	uint64_t x = 0;

	if (size == 1 || size == 2 || size == 4 || size == 8) {
		__builtin_memcpy(&x, buf, size);
		kl_write(v, lin, x, size);
		return;
	}
	if (KL_LIKELY(e->wtag == (lin & KL_PAGE_MASK) &&
		      (lin & ~KL_PAGE_MASK) + size <= KL_PAGE_SIZE)) {
		uint8_t *p = kl_tlb_host(e, lin);

		if (size == 16 || size == 32) {
			if (size == 16)
				kl_store128(p, *(const kl_v128 *)buf);
			else
				kl_store_ymm(p, buf);
			if (KL_UNLIKELY((uint8_t *)((uint64_t)p & KL_PAGE_MASK) == v->code_page))
				v->code_written = true;
			return;
		}
	}
	kl_write_bytes(v, lin, buf, size);
}

/* MASKMOVDQU and relatives: store the bytes of @x that @select selects at rDI (ops_avx_mem.c). */
void kl_masked_bytes(struct kl_vcpu *v, const struct kl_op *op, const uint8_t *x,
		     const uint8_t *select, unsigned len);
struct kl_decode;
/* The families of ops_avx.c that touch several places of memory (ops_avx_mem.c). */
bool kl_select_avx_mem(struct kl_decode *d);
