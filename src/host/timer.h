/* SPDX-License-Identifier: MIT */
/*
 * Timers of the engine's devices: one helper thread per process runs them all.
 *
 * Guarantees
 *   (a) The callback runs in the helper, with no lock held, not before the deadline, once for
 *       each kl_timer_arm() that was not replaced or cancelled before. It may arm or cancel its
 *       own timer and others.
 *   (b) kl_timer_arm() of an armed timer replaces the deadline.
 *   (c) When kl_timer_cancel() returns, the timer is not armed and its callback is not running
 *       (except for the caller, if it is that callback), also if the callback arms it again.
 *   (d) Neither arming nor cancelling allocates or fails.
 *
 * The calls for one timer may come from any threads. Its owner sees to it that nobody but its
 * callback arms it while it is being cancelled.
 *
 * The helper lives while somebody holds a reference (kl_timer_get()), and blocks all signals.
 * In a forked child there is none, and no timer is armed.
 */
#pragma once

#include "base/compiler.h"

struct kl_timer {
	void (*fn)(struct kl_timer *t);
	/* The rest is timer.c's: a node of a pairing heap. */
	uint64_t deadline;
	struct kl_timer *child, *next, *prev; /* prev: elder sibling, or parent of the eldest */
	bool armed;
};

/*
 * Start the helper, if this is the first reference; the last kl_timer_put() ends it. Timers may
 * be armed in between.
 * Context: not in a callback; may sleep. Returns: 0, -EAGAIN or -ENOMEM (no thread).
 */
int kl_timer_get(void) KL_MUST_CHECK;
void kl_timer_put(void);

/* CLOCK_MONOTONIC in ns: what deadlines are compared with. */
uint64_t kl_timer_now(void);

void kl_timer_init(struct kl_timer *t, void (*fn)(struct kl_timer *t));
/* @deadline: CLOCK_MONOTONIC, ns; a past one fires at once. Context: any thread; does not sleep. */
void kl_timer_arm(struct kl_timer *t, uint64_t deadline);
/*
 * Context: may sleep (rank TIMER_WAIT): holds no lock that the callback takes.
 * Returns whether it was armed.
 */
bool kl_timer_cancel(struct kl_timer *t);
/* The same without (c)'s second half: the callback may be running. Does not sleep. */
bool kl_timer_disarm(struct kl_timer *t);

void kl_timer_after_fork(void);
