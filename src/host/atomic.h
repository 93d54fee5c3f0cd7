/* SPDX-License-Identifier: MIT */
/*
 * Sequentially consistent atomics on guest memory, of 1, 2, 4 and 8 bytes, naturally aligned.
 *
 * As in host/access.h, each is one host instruction that is listed in kl_extable: abandoned
 * while it blocks, it has not happened; once it has happened it is not abandoned any more.
 * ThreadSanitizer is told of their order, but they are assembly there, too: its own atomics hold
 * a lock of its runtime while they fault (N7).
 */
#pragma once

#include "host/access.h"

#if KL_TSAN
void __tsan_acquire(void *addr);
void __tsan_release(void *addr);
#define KL_ATOMIC_EXTABLE(label)
#define kl_before_atomic(p) __tsan_release(p)
#define kl_after_atomic(p)  __tsan_acquire(p)
#else
#define KL_ATOMIC_EXTABLE(label) KL_EXTABLE(label)
#define kl_before_atomic(p)
#define kl_after_atomic(p)
#endif

#define KL_ATOMIC_FN(bits, sfx, reg)                                                         \
	KL_INLINE uint##bits##_t kl_xchg##bits(void *p, uint##bits##_t v)                    \
	{                                                                                    \
		kl_before_atomic(p);                                                         \
		__asm__ volatile("1: xchg" sfx " %0, %1\n\t" KL_ATOMIC_EXTABLE("1b")         \
				 : "+" reg(v), "+m"(*(uint##bits##_t *)p)                    \
				 :                                                           \
				 : "memory");                                                \
		kl_after_atomic(p);                                                          \
		return v;                                                                    \
	}                                                                                    \
	KL_INLINE uint##bits##_t kl_xadd##bits(void *p, uint##bits##_t v)                    \
	{                                                                                    \
		kl_before_atomic(p);                                                         \
		__asm__ volatile("1: lock xadd" sfx " %0, %1\n\t" KL_ATOMIC_EXTABLE("1b")    \
				 : "+" reg(v), "+m"(*(uint##bits##_t *)p)                    \
				 :                                                           \
				 : "memory", "cc");                                          \
		kl_after_atomic(p);                                                          \
		return v;                                                                    \
	}                                                                                    \
	KL_INLINE uint##bits##_t kl_cmpxchg##bits(void *p, uint##bits##_t expected,          \
						  uint##bits##_t desired)                    \
	{                                                                                    \
		kl_before_atomic(p);                                                         \
		__asm__ volatile("1: lock cmpxchg" sfx " %2, %1\n\t" KL_ATOMIC_EXTABLE("1b") \
				 : "+a"(expected), "+m"(*(uint##bits##_t *)p)                \
				 : reg(desired)                                              \
				 : "memory", "cc");                                          \
		kl_after_atomic(p);                                                          \
		return expected;                                                             \
	}                                                                                    \
	/* Stores are exchanges: a plain load is sequentially consistent beside them. */     \
	KL_INLINE uint##bits##_t kl_load_seq_cst##bits(void *p)                              \
	{                                                                                    \
		uint##bits##_t v = kl_load##bits(p);                                         \
                                                                                             \
		kl_after_atomic(p);                                                          \
		return v;                                                                    \
	}
KL_ATOMIC_FN(8, "b", "q")
KL_ATOMIC_FN(16, "w", "r")
KL_ATOMIC_FN(32, "l", "r")
KL_ATOMIC_FN(64, "q", "r")
#undef KL_ATOMIC_FN

/*
 * Fault, or block, as a load or a store would; change nothing, whoever else writes the byte. Not
 * an access to what the memory holds, and so not one for ThreadSanitizer: the memory may have
 * become the program's own again.
 */
KL_INLINE void kl_touch(uint8_t *p, bool write)
{
	uint8_t byte;

	if (write)
		__asm__ volatile("1: lock orb $0, %0\n\t" KL_ATOMIC_EXTABLE("1b")
				 : "+m"(*p)
				 :
				 : "cc");
	else
		__asm__ volatile("1: movb %1, %0\n\t" KL_ATOMIC_EXTABLE("1b")
				 : "=q"(byte)
				 : "m"(*p));
}
