/* SPDX-License-Identifier: MIT */
/*
 * racepoint(NAME): a named place where a test can park a thread, so that interleavings are
 * forced and not hoped for. Compiled to nothing unless KL_RACEPOINTS is defined (debug and
 * sanitizer builds).
 *
 * Test side:
 *     kl_racepoint_arm("fault-populate", 1);     next thread to arrive stops there
 *     kl_racepoint_wait("fault-populate", ms);   until it has
 *     ...
 *     kl_racepoint_release("fault-populate");
 */
#pragma once

#include "base/testpoint.h"

#ifdef KL_RACEPOINTS
/* Something is armed: else a passage costs this one load. */
extern _Atomic int kl_racepoints_on;
void kl_racepoint_hit(const struct kl_testpoint *p);
#define racepoint(name)                                                                         \
	do {                                                                                    \
		if (KL_UNLIKELY(atomic_load_explicit(&kl_racepoints_on, memory_order_relaxed))) \
			kl_racepoint_hit(KL_TESTPOINT(KL_RACEPOINT, name));                     \
	} while (0)
#else
#define racepoint(name) \
	do {            \
	} while (0)
#endif

/* Park the next @count threads that arrive at @name. */
void kl_racepoint_arm(const char *name, int count);
/* Wait until a thread is parked at @name; false after @timeout_ms. */
bool kl_racepoint_wait(const char *name, int timeout_ms);
/* The same for @count threads. */
bool kl_racepoint_wait_for(const char *name, int count, int timeout_ms);
/* Let all threads parked at @name go on, and disarm it. */
void kl_racepoint_release(const char *name);
/*
 * @fn is called by whoever passes a racepoint, and may keep the thread there. NULL: nothing is.
 * Context: as the racepoint's, with any lock of the engine held: it must not touch the engine.
 */
void kl_racepoint_hook(void (*fn)(const char *name));
/* True where racepoints are compiled in. */
bool kl_racepoints_enabled(void);
