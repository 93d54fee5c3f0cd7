/* SPDX-License-Identifier: MIT */
/*
 * kl_failpoint(NAME): true when the step that follows shall fail, because a test said so.
 * Compiled to false unless KL_FAILPOINTS is defined (debug and sanitizer builds).
 *
 *     p = kl_failpoint("mmu-create") ? NULL : calloc(1, sizeof(*p));
 *
 * Test side:
 *     kl_failpoint_arm("mmu-create", 1);         the next passage fails, later ones do not
 *     ...
 *     assert_true(kl_failpoint_disarm("mmu-create"));    it did
 *
 * Whole programs: KVMLET_FAIL=NAME:NTH[,NAME:NTH...] arms at start; KVMLET_FAIL=list logs at exit
 * how often each failpoint was passed, which is what NTH may be.
 *
 * Context: any; no lock, no allocation.
 */
#pragma once

#include "base/testpoint.h"

/* Counting or armed: else a passage costs this one load. */
extern _Atomic int kl_failpoints_on;
bool kl_failpoint_hit(const struct kl_testpoint *p);

#ifdef KL_FAILPOINTS
#define kl_failpoint(name)                                                             \
	(KL_UNLIKELY(atomic_load_explicit(&kl_failpoints_on, memory_order_relaxed)) && \
	 kl_failpoint_hit(KL_TESTPOINT(KL_FAILPOINT, name)))
#else
#define kl_failpoint(name) false
#endif

/* The @nth passage of @name from now on fails, once (1: the next). */
void kl_failpoint_arm(const char *name, unsigned nth);
/* Returns whether it failed since it was armed. */
bool kl_failpoint_disarm(const char *name);

/*
 * The same for whichever failpoint is passed, counted together: for runs that fail the first step
 * of a call, then the second, until there is none. disarm_any() returns the name of the one that
 * has failed, or NULL.
 */
void kl_failpoint_arm_any(unsigned nth);
const char *kl_failpoint_disarm_any(void);

/*
 * Count passages between start and stop; each() tells the counts, those that are 0 too. For runs
 * that fail every passage in turn.
 */
void kl_failpoint_count_start(void);
void kl_failpoint_count_stop(void);
void kl_failpoint_each(void (*fn)(const char *name, unsigned passed, void *arg), void *arg);

/* True where failpoints are compiled in. */
bool kl_failpoints_enabled(void);
