/* SPDX-License-Identifier: MIT */
/*
 * Single-instruction loads and stores of guest memory.
 *
 * Each is exactly one host instruction whose address is listed in the kl_extable section:
 * a thread that blocks in it (userfaultfd, swap) can be signalled out, and the access has
 * then not happened. Under ThreadSanitizer they are relaxed atomics in C instead, and a
 * blocked access is not abandoned.
 *
 * x86 makes aligned accesses up to 8 bytes single-copy atomic; that is the guest's promise
 * too.
 */
#pragma once

#include "base/compiler.h"

#if KL_TSAN
#define KL_ACCESS_FN(bits, insn, reg)                                                \
	KL_INLINE uint##bits##_t kl_load##bits(const void *p)                        \
	{                                                                            \
		return __atomic_load_n((const uint##bits##_t *)p, __ATOMIC_RELAXED); \
	}                                                                            \
	KL_INLINE void kl_store##bits(void *p, uint##bits##_t v)                     \
	{                                                                            \
		__atomic_store_n((uint##bits##_t *)p, v, __ATOMIC_RELAXED);          \
	}
#else
#define KL_EXTABLE(label) ".pushsection kl_extable,\"a\"\n\t.long " label " - .\n\t.popsection\n\t"
#define KL_ACCESS_FN(bits, insn, reg)                                      \
	KL_INLINE uint##bits##_t kl_load##bits(const void *p)              \
	{                                                                  \
		uint##bits##_t v;                                          \
		__asm__ volatile("1: " insn " %1, %0\n\t" KL_EXTABLE("1b") \
				 : "=" reg(v)                              \
				 : "m"(*(const uint##bits##_t *)p)         \
				 : "memory");                              \
		return v;                                                  \
	}                                                                  \
	KL_INLINE void kl_store##bits(void *p, uint##bits##_t v)           \
	{                                                                  \
		__asm__ volatile("1: " insn " %1, %0\n\t" KL_EXTABLE("1b") \
				 : "=m"(*(uint##bits##_t *)p)              \
				 : reg(v)                                  \
				 : "memory");                              \
	}
#endif
typedef long long kl_v128 __attribute__((vector_size(16), aligned(1), may_alias));

/* Not atomic. */
#if KL_TSAN
KL_INLINE kl_v128 kl_load128(const void *p)
{
	return (kl_v128){__atomic_load_n((const long long *)p, __ATOMIC_RELAXED),
			 __atomic_load_n((const long long *)p + 1, __ATOMIC_RELAXED)};
}

KL_INLINE void kl_store128(void *p, kl_v128 v)
{
	__atomic_store_n((long long *)p, v[0], __ATOMIC_RELAXED);
	__atomic_store_n((long long *)p + 1, v[1], __ATOMIC_RELAXED);
}
#else
KL_INLINE kl_v128 kl_load128(const void *p)
{
	kl_v128 v;

	__asm__ volatile("1: movdqu %1, %0\n\t" KL_EXTABLE("1b")
			 : "=x"(v)
			 : "m"(*(const kl_v128 *)p)
			 : "memory");
	return v;
}

KL_INLINE void kl_store128(void *p, kl_v128 v)
{
	__asm__ volatile("1: movdqu %1, %0\n\t" KL_EXTABLE("1b")
			 : "=m"(*(kl_v128 *)p)
			 : "x"(v)
			 : "memory");
}
#endif
KL_ACCESS_FN(8, "movb", "q")
KL_ACCESS_FN(16, "movw", "r")
KL_ACCESS_FN(32, "movl", "r")
KL_ACCESS_FN(64, "movq", "r")
#undef KL_ACCESS_FN

/* size 1, 2, 4 or 8; zero-extended. */
KL_INLINE uint64_t kl_load(const void *p, unsigned size)
{
	switch (size) {
	case 1:
		return kl_load8(p);
	case 2:
		return kl_load16(p);
	case 4:
		return kl_load32(p);
	default:
		return kl_load64(p);
	}
}

KL_INLINE void kl_store(void *p, uint64_t v, unsigned size)
{
	switch (size) {
	case 1:
		kl_store8(p, (uint8_t)v);
		break;
	case 2:
		kl_store16(p, (uint16_t)v);
		break;
	case 4:
		kl_store32(p, (uint32_t)v);
		break;
	default:
		kl_store64(p, v);
		break;
	}
}

/* Any length, forwards, restartable; the listed instruction is a rep movsb. */
void kl_access_copy(void *dst, const void *src, size_t len);
