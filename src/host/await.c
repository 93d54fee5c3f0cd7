/* SPDX-License-Identifier: MIT */
/*
 * Locks: AWAIT_LIFE counts references and ends helpers; AWAIT protects who waits for what.
 *
 * A cancellation must not be lost between the helper's look at it and the touch. cancelled is set
 * before the kick is sent; the helper looks at it when a kick already abandons the touch
 * (kl_host_populate()). So the kick comes before the look, which then sees it, or it abandons.
 */
#include "host/await.h"

#include <errno.h>
#include <pthread.h>
#include <stdint.h>

#include "base/failpoint.h"
#include "base/lock.h"
#include "base/racepoint.h"
#include "host/guard.h"
#include "host/populate.h"
#include "host/sys.h"
#include "host/thread.h"

static struct kl_mutex life = KL_MUTEX_INITIALIZER(AWAIT_LIFE);
static unsigned refs; /* life */

static struct kl_mutex lock = KL_MUTEX_INITIALIZER(AWAIT);
static struct helper {
	pthread_t thread;
	pid_t tid;              /* 0: it has not begun yet */
	struct kl_await *job;   /* NULL: idle */
	_Atomic uint32_t wakes; /* futex */
} helpers[KL_MAX_AWAITED];      /* lock */
static unsigned nr_helpers;     /* lock */
static bool stop;               /* lock */
static _Atomic uint32_t ended;  /* futex: jobs that are over */

static void wake(struct helper *h)
{
	atomic_fetch_add(&h->wakes, 1);
	kl_futex_wake(&h->wakes, 1);
}

static void serve(struct kl_await *a)
{
	bool writable;

	kl_self.give_up = &a->cancelled;
	racepoint("await-touch");
	a->result = kl_host_populate(a->hva, a->write, &writable);
	kl_self.give_up = NULL;
	racepoint("await-touched");
	if (!atomic_load(&a->cancelled))
		a->done(a);
}

static void *helper_main(void *arg)
{
	struct helper *h = arg;

	kl_engine_enter();
	kl_guard_unblock_own();
	kl_mutex_lock(&lock);
	h->tid = kl_gettid();
	while (!stop) {
		uint32_t seen = atomic_load(&h->wakes);
		struct kl_await *a = h->job;

		kl_mutex_unlock(&lock);
		if (a)
			serve(a);
		else
			kl_futex_wait(&h->wakes, seen, NULL);
		kl_mutex_lock(&lock);
		if (a) {
			h->job = NULL;
			atomic_fetch_add(&ended, 1);
			kl_futex_wake(&ended, INT32_MAX);
		}
	}
	kl_mutex_unlock(&lock);
	kl_engine_leave();
	return NULL;
}

/* Context: lock. */
static struct helper *helper_of(const struct kl_await *a)
{
	for (unsigned i = 0; i < nr_helpers; i++)
		if (helpers[i].job == a)
			return &helpers[i];
	return NULL;
}

/* Context: lock. NULL: all are busy, or there is no thread to be had. */
static struct helper *idle_helper(void)
{
	struct helper *h = helper_of(NULL);

	if (h || nr_helpers == KL_MAX_AWAITED || kl_failpoint("await-thread"))
		return h;
	h = &helpers[nr_helpers];
	h->tid = 0;
	if (kl_thread_create(&h->thread, "kvmlet-await", helper_main, h))
		return NULL;
	nr_helpers++;
	return h;
}

int kl_await_start(struct kl_await *a, kl_hva_t hva, bool write)
{
	struct helper *h;

	a->hva = hva;
	a->write = write;
	atomic_store(&a->cancelled, false);
	kl_mutex_lock(&lock);
	h = idle_helper();
	if (h) {
		h->job = a;
		wake(h);
	}
	kl_mutex_unlock(&lock);
	return h ? 0 : -EAGAIN;
}

void kl_await_cancel(struct kl_await *a)
{
	struct helper *h;

	kl_mutex_lock(&lock);
	h = helper_of(a);
	if (h) {
		atomic_store(&a->cancelled, true);
		if (h->tid)
			kl_guard_kick(h->tid);
	}
	for (; h; h = helper_of(a)) {
		uint32_t seen = atomic_load(&ended);

		kl_mutex_unlock(&lock);
		kl_rank_wait(KL_RANK_AWAIT_WAIT);
		racepoint("await-cancel-waits");
		kl_futex_wait(&ended, seen, NULL);
		kl_mutex_lock(&lock);
	}
	kl_mutex_unlock(&lock);
}

void kl_await_get(void)
{
	kl_mutex_lock(&life);
	refs++;
	kl_mutex_unlock(&life);
}

static void end_helpers(void)
{
	unsigned n;

	kl_mutex_lock(&lock);
	stop = true;
	n = nr_helpers;
	for (unsigned i = 0; i < n; i++)
		wake(&helpers[i]);
	kl_mutex_unlock(&lock);
	kl_rank_wait(KL_RANK_AWAIT_WAIT);
	for (unsigned i = 0; i < n; i++)
		pthread_join(helpers[i].thread, NULL);
	kl_mutex_lock(&lock);
	nr_helpers = 0;
	stop = false;
	kl_mutex_unlock(&lock);
}

void kl_await_put(void)
{
	kl_mutex_lock(&life);
	if (!--refs)
		end_helpers();
	kl_mutex_unlock(&life);
}

void kl_await_after_fork(void)
{
	kl_mutex_init(&life, KL_RANK_AWAIT_LIFE);
	kl_mutex_init(&lock, KL_RANK_AWAIT);
	refs = nr_helpers = 0;
	stop = false;
}
