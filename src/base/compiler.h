/* SPDX-License-Identifier: MIT */
/*
 * Compiler helpers. Owns nothing; included by everything.
 */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define KL_LIKELY(x)    __builtin_expect(!!(x), 1)
#define KL_UNLIKELY(x)  __builtin_expect(!!(x), 0)
#define KL_MUST_CHECK   __attribute__((warn_unused_result))
#define KL_PRINTF(f, a) __attribute__((format(printf, f, a)))
#define KL_NORETURN     __attribute__((noreturn))
#define KL_NOINLINE     __attribute__((noinline))
#define KL_COLD         __attribute__((cold))
#define KL_EXPORT       __attribute__((visibility("default")))
#define KL_CACHELINE    __attribute__((aligned(64)))
/* Initial-exec: readable from a signal handler, and one instruction. */
#define KL_TLS    _Thread_local __attribute__((tls_model("initial-exec")))
#define KL_UNUSED __attribute__((unused))
/* Where coverage is measured, one function each, whose branches count once (meson.build). */
#ifdef KL_COVERAGE
#define KL_INLINE static KL_UNUSED KL_NOINLINE
#else
#define KL_INLINE static inline __attribute__((always_inline))
#endif

#define KL_ARRAY_SIZE(a)                   (sizeof(a) / sizeof((a)[0]))
#define kl_container_of(ptr, type, member) ((type *)(void *)((char *)(ptr)-offsetof(type, member)))
#define kl_min(a, b)                  \
	({                            \
		__auto_type a_ = (a); \
		__auto_type b_ = (b); \
		a_ < b_ ? a_ : b_;    \
	})
#define kl_max(a, b)                  \
	({                            \
		__auto_type a_ = (a); \
		__auto_type b_ = (b); \
		a_ > b_ ? a_ : b_;    \
	})

#define KL_PAGE_SHIFT 12
#define KL_PAGE_SIZE  4096UL
#define KL_PAGE_MASK  (~(KL_PAGE_SIZE - 1))

#if defined(KL_TSAN) /* of a file that is not instrumented, in a build that is */
#elif defined(__SANITIZE_THREAD__)
#define KL_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define KL_TSAN 1
#endif
#endif
#ifndef KL_TSAN
#define KL_TSAN 0
#endif

/* Whether `return f(x)` reuses the frame, so that functions may call on without end. meson.build
 * defines KL_NO_TAILCALLS for sanitizers, and where little is optimized. */
#if defined(__OPTIMIZE__) && !defined(KL_NO_TAILCALLS)
#define KL_TAILCALLS 1
#else
#define KL_TAILCALLS 0
#endif
KL_INLINE void kl_cpu_relax(void)
{
	__builtin_ia32_pause();
}

/*
 * For objects that only raw mappings point to: a leak checker in the program (which this code
 * may be preloaded into) would take them for lost when it exits with its VMs alive.
 */
void __lsan_ignore_object(const void *p) __attribute__((weak));
KL_INLINE void kl_not_leaked(const void *p)
{
	if (__lsan_ignore_object && p)
		__lsan_ignore_object(p);
}
