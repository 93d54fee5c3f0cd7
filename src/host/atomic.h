/* SPDX-License-Identifier: MIT */
/*
 * Sequentially consistent atomics on guest memory, of 1, 2, 4 and 8 bytes, naturally aligned.
 *
 * As in host/access.h, each is one host instruction that is listed in kl_extable: abandoned
 * while it blocks, it has not happened; once it has happened it is not abandoned any more.
 * Under ThreadSanitizer they are C atomics.
 */
#pragma once

#include "host/access.h"

#if KL_TSAN
#define KL_ATOMIC_FN(bits, sfx, reg)                                                    \
	KL_INLINE uint##bits##_t kl_xchg##bits(void *p, uint##bits##_t v)               \
	{                                                                               \
		return __atomic_exchange_n((uint##bits##_t *)p, v, __ATOMIC_SEQ_CST);   \
	}                                                                               \
	KL_INLINE uint##bits##_t kl_xadd##bits(void *p, uint##bits##_t v)               \
	{                                                                               \
		return __atomic_fetch_add((uint##bits##_t *)p, v, __ATOMIC_SEQ_CST);    \
	}                                                                               \
	KL_INLINE uint##bits##_t kl_cmpxchg##bits(void *p, uint##bits##_t expected,     \
						  uint##bits##_t desired)               \
	{                                                                               \
		__atomic_compare_exchange_n((uint##bits##_t *)p, &expected, desired, 0, \
					    __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);        \
		return expected;                                                        \
	}                                                                               \
	KL_INLINE uint##bits##_t kl_load_seq_cst##bits(const void *p)                   \
	{                                                                               \
		return __atomic_load_n((const uint##bits##_t *)p, __ATOMIC_SEQ_CST);    \
	}
#define KL_TOUCH_EXTABLE
#else
#define KL_ATOMIC_FN(bits, sfx, reg)                                                     \
	KL_INLINE uint##bits##_t kl_xchg##bits(void *p, uint##bits##_t v)                \
	{                                                                                \
		__asm__ volatile("1: xchg" sfx " %0, %1\n\t" KL_EXTABLE("1b")            \
				 : "+" reg(v), "+m"(*(uint##bits##_t *)p)                \
				 :                                                       \
				 : "memory");                                            \
		return v;                                                                \
	}                                                                                \
	KL_INLINE uint##bits##_t kl_xadd##bits(void *p, uint##bits##_t v)                \
	{                                                                                \
		__asm__ volatile("1: lock xadd" sfx " %0, %1\n\t" KL_EXTABLE("1b")       \
				 : "+" reg(v), "+m"(*(uint##bits##_t *)p)                \
				 :                                                       \
				 : "memory", "cc");                                      \
		return v;                                                                \
	}                                                                                \
	KL_INLINE uint##bits##_t kl_cmpxchg##bits(void *p, uint##bits##_t expected,      \
						  uint##bits##_t desired)                \
	{                                                                                \
		__asm__ volatile("1: lock cmpxchg" sfx " %2, %1\n\t" KL_EXTABLE("1b")    \
				 : "+a"(expected), "+m"(*(uint##bits##_t *)p)            \
				 : reg(desired)                                          \
				 : "memory", "cc");                                      \
		return expected;                                                         \
	}                                                                                \
	/* Stores are exchanges: a plain load is sequentially consistent beside them. */ \
	KL_INLINE uint##bits##_t kl_load_seq_cst##bits(const void *p)                    \
	{                                                                                \
		return kl_load##bits(p);                                                 \
	}
#define KL_TOUCH_EXTABLE KL_EXTABLE("1b")
#endif
KL_ATOMIC_FN(8, "b", "q")
KL_ATOMIC_FN(16, "w", "r")
KL_ATOMIC_FN(32, "l", "r")
KL_ATOMIC_FN(64, "q", "r")
#undef KL_ATOMIC_FN

/* Fault, or block, as a load or a store would; change nothing. No access for TSan. */
KL_INLINE void kl_touch(uint8_t *p, bool write)
{
	uint8_t byte;

	if (write)
		__asm__ volatile("1: lock orb $0, %0\n\t" KL_TOUCH_EXTABLE : "+m"(*p) : : "cc");
	else
		__asm__ volatile("1: movb %1, %0\n\t" KL_TOUCH_EXTABLE : "=q"(byte) : "m"(*p));
}
