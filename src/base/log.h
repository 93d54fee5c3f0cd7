/* SPDX-License-Identifier: MIT */
/*
 * Log, trace file and engine assertions.
 *
 * Context: any, including signal handlers and the inside of the program's allocator: one
 * line is formatted on the stack and written with one write(2); no lock, no allocation.
 */
#pragma once

#include "base/compiler.h"

enum kl_log_level { KL_LOG_ERR, KL_LOG_WARN, KL_LOG_INFO, KL_LOG_DEBUG };

/* Opens the files that kl_config names. Called by kl_config_init(). */
void kl_log_init(void);

void kl_log(enum kl_log_level level, const char *fmt, ...) KL_PRINTF(2, 3);

/* --trace: test the flag first, formatting is not free. */
extern bool kl_trace_on;
void kl_trace_write(const char *fmt, ...) KL_PRINTF(1, 2);
#define KL_TRACE(...)                                \
	do {                                         \
		if (KL_UNLIKELY(kl_trace_on))        \
			kl_trace_write(__VA_ARGS__); \
	} while (0)

/* Nanoseconds since the process began: for durations and the trace, not kl_timer_arm()'s clock. */
uint64_t kl_trace_ns(void);

void kl_assert_fail(const char *expr, const char *file, int line) KL_NORETURN KL_COLD;

/* Our own mistake, checked in debug builds only. */
#ifdef KL_DEBUG
#define KL_ASSERT(cond)                                            \
	do {                                                       \
		if (KL_UNLIKELY(!(cond)))                          \
			kl_assert_fail(#cond, __FILE__, __LINE__); \
	} while (0)
#else
#define KL_ASSERT(cond)             \
	do {                        \
		(void)sizeof(cond); \
	} while (0)
#endif

#define KL_WARN_ONCE(cond, ...)                                                      \
	({                                                                           \
		static atomic_bool warned_;                                          \
		bool c_ = (cond);                                                    \
		if (KL_UNLIKELY(c_) &&                                               \
		    !atomic_exchange_explicit(&warned_, true, memory_order_relaxed)) \
			kl_log(KL_LOG_WARN, __VA_ARGS__);                            \
		c_;                                                                  \
	})
