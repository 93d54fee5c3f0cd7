/* SPDX-License-Identifier: MIT */
/*
 * Locks: TIMER_LIFE starts and ends the helper; TIMER protects the heap and what runs.
 *
 * The heap is a pairing heap, its nodes are the timers. A deadline that became earlier wakes the
 * helper, one that became later or went away does not: the helper finds nothing to do, once.
 */
#include "host/timer.h"

#include <errno.h>
#include <pthread.h>
#include <stdint.h>

#include "base/failpoint.h"
#include "base/lock.h"
#include "base/racepoint.h"
#include "host/sys.h"
#include "host/thread.h"

#define NEVER UINT64_MAX

static struct kl_mutex life = KL_MUTEX_INITIALIZER(TIMER_LIFE);
static unsigned refs;    /* life */
static pthread_t helper; /* life; valid while refs */

static struct kl_mutex lock = KL_MUTEX_INITIALIZER(TIMER);
static struct kl_timer *root;    /* lock */
static struct kl_timer *running; /* lock: its callback runs */
static uint64_t sleeps_until;    /* lock: the helper need not wake for later ones; 0: awake */
static bool stop;                /* lock */
static unsigned waiters;         /* lock: threads that wait for the end of a callback */
static _Atomic uint32_t wakeups; /* futex of the helper */
static _Atomic uint32_t ended;   /* futex of waiters: callbacks that have ended */
static KL_TLS bool is_helper;

uint64_t kl_timer_now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* ---- the heap ---- */

/* Both are roots, either may be NULL. */
static struct kl_timer *meld(struct kl_timer *a, struct kl_timer *b)
{
	struct kl_timer *t;

	if (!a || !b)
		return a ? a : b;
	if (b->deadline < a->deadline) {
		t = a;
		a = b;
		b = t;
	}
	b->next = a->child;
	if (b->next)
		b->next->prev = b;
	b->prev = a;
	a->child = b;
	return a;
}

/* The children of a node that goes, as one heap: pairs from the left, then all from the right. */
static struct kl_timer *meld_siblings(struct kl_timer *first)
{
	struct kl_timer *pairs = NULL, *all = NULL;

	while (first) {
		struct kl_timer *a = first, *b = a->next, *m;

		first = b ? b->next : NULL;
		a->next = a->prev = NULL;
		if (b)
			b->next = b->prev = NULL;
		m = meld(a, b);
		m->next = pairs;
		pairs = m;
	}
	while (pairs) {
		struct kl_timer *m = pairs;

		pairs = m->next;
		m->next = NULL;
		all = meld(all, m);
	}
	return all;
}

static void insert(struct kl_timer *t, uint64_t deadline)
{
	t->deadline = deadline;
	t->child = t->next = t->prev = NULL;
	t->armed = true;
	root = meld(root, t);
}

/* True if it was armed. */
static bool remove_timer(struct kl_timer *t)
{
	struct kl_timer *rest;

	if (!t->armed)
		return false;
	t->armed = false;
	rest = meld_siblings(t->child);
	t->child = NULL;
	if (t == root) {
		root = rest;
		return true;
	}
	if (t->prev->child == t)
		t->prev->child = t->next;
	else
		t->prev->next = t->next;
	if (t->next)
		t->next->prev = t->prev;
	t->next = t->prev = NULL;
	root = meld(root, rest);
	return true;
}

/* ---- the helper ---- */

static void run(struct kl_timer *t)
{
	remove_timer(t);
	running = t;
	kl_mutex_unlock(&lock);
	racepoint("timer-callback");
	t->fn(t);
	kl_mutex_lock(&lock);
	running = NULL;
	atomic_fetch_add(&ended, 1);
	if (waiters)
		kl_futex_wake(&ended, INT32_MAX);
}

static void sleep_until(uint64_t deadline, uint32_t seen)
{
	struct timespec ts = {.tv_sec = (time_t)(deadline / 1000000000u),
			      .tv_nsec = (long)(deadline % 1000000000u)};

	kl_futex_wait_until(&wakeups, seen, deadline == NEVER ? NULL : &ts);
}

static void *helper_main(void *arg)
{
	(void)arg;
	is_helper = true;
	kl_sys(SYS_prctl, 29 /* PR_SET_TIMERSLACK */, 1ul);
	kl_engine_enter();
	kl_mutex_lock(&lock);
	while (!stop) {
		uint64_t until;
		uint32_t seen;

		if (root && root->deadline <= kl_timer_now()) {
			run(root);
			continue;
		}
		until = root ? root->deadline : NEVER;
		sleeps_until = until;
		seen = atomic_load(&wakeups);
		kl_mutex_unlock(&lock);
		/* An earlier timer that is armed here changes wakeups. */
		racepoint("timer-sleep");
		sleep_until(until, seen);
		kl_mutex_lock(&lock);
		sleeps_until = 0;
	}
	kl_mutex_unlock(&lock);
	kl_engine_leave();
	return NULL;
}

/* lock held: the helper looks again. */
static void wake_helper(void)
{
	sleeps_until = 0;
	atomic_fetch_add(&wakeups, 1);
	kl_futex_wake(&wakeups, 1);
}

int kl_timer_get(void)
{
	int r = 0;

	kl_mutex_lock(&life);
	if (!refs) {
		stop = false;
		r = kl_failpoint("timer-thread")
			    ? -EAGAIN
			    : kl_thread_create(&helper, "kvmlet-timer", helper_main, NULL);
	}
	if (!r)
		refs++;
	kl_mutex_unlock(&life);
	return r;
}

void kl_timer_put(void)
{
	kl_mutex_lock(&life);
	if (!--refs) {
		kl_mutex_lock(&lock);
		stop = true;
		wake_helper();
		kl_mutex_unlock(&lock);
		kl_rank_wait(KL_RANK_TIMER_WAIT);
		pthread_join(helper, NULL);
	}
	kl_mutex_unlock(&life);
}

void kl_timer_after_fork(void)
{
	kl_mutex_init(&life, KL_RANK_TIMER_LIFE);
	kl_mutex_init(&lock, KL_RANK_TIMER);
	refs = waiters = 0;
	root = running = NULL;
	stop = false;
}

/* ---- timers ---- */

void kl_timer_init(struct kl_timer *t, void (*fn)(struct kl_timer *t))
{
	*t = (struct kl_timer){.fn = fn};
}

void kl_timer_arm(struct kl_timer *t, uint64_t deadline)
{
	kl_mutex_lock(&lock);
	remove_timer(t);
	insert(t, deadline);
	if (deadline < sleeps_until)
		wake_helper();
	kl_mutex_unlock(&lock);
}

bool kl_timer_disarm(struct kl_timer *t)
{
	bool was;

	kl_mutex_lock(&lock);
	was = remove_timer(t);
	kl_mutex_unlock(&lock);
	return was;
}

bool kl_timer_cancel(struct kl_timer *t)
{
	bool was;

	kl_mutex_lock(&lock);
	was = remove_timer(t);
	while (running == t && !is_helper) {
		uint32_t seen = atomic_load(&ended);

		waiters++;
		kl_mutex_unlock(&lock);
		kl_rank_wait(KL_RANK_TIMER_WAIT);
		racepoint("timer-cancel-waits");
		kl_futex_wait(&ended, seen, NULL);
		kl_mutex_lock(&lock);
		waiters--;
		/* The callback may have armed it again. */
		was |= remove_timer(t);
	}
	kl_mutex_unlock(&lock);
	return was;
}
