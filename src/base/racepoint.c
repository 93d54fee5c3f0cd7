/* SPDX-License-Identifier: MIT */
/*
 * All state is under one mutex. An unarmed racepoint costs a relaxed load; nothing at all where
 * racepoints are compiled out.
 */
#include <pthread.h>
#include <time.h>

#include "base/racepoint.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t cond = PTHREAD_COND_INITIALIZER;

#ifdef KL_RACEPOINTS
_Atomic int kl_racepoints_on;
static void (*_Atomic hook)(const char *name);

void kl_racepoint_hit(const struct kl_testpoint *point)
{
	void (*fn)(const char *name) = atomic_load(&hook);
	struct kl_testpoint *p;

	if (fn)
		fn(point->name);
	pthread_mutex_lock(&lock);
	p = kl_testpoint_find(KL_RACEPOINT, point->name);
	if (p->to_park > 0) {
		unsigned epoch = p->epoch;

		p->to_park--;
		p->parked++;
		pthread_cond_broadcast(&cond);
		while (p->epoch == epoch)
			pthread_cond_wait(&cond, &lock);
		p->parked--;
	}
	pthread_mutex_unlock(&lock);
}
#else
static _Atomic int kl_racepoints_on;
#endif

/* NULL only where there are no racepoints. */
static struct kl_testpoint *find(const char *name)
{
	struct kl_testpoint *p = kl_testpoint_find(KL_RACEPOINT, name);

	if (!p)
		kl_testpoint_unknown(KL_RACEPOINT, name);
	return p;
}

void kl_racepoint_arm(const char *name, int count)
{
	struct kl_testpoint *p = find(name);

	pthread_mutex_lock(&lock);
	if (p) {
		p->to_park = count;
		if (!p->armed)
			atomic_fetch_add(&kl_racepoints_on, 1);
		p->armed = true;
	}
	pthread_mutex_unlock(&lock);
}

bool kl_racepoint_wait_for(const char *name, int count, int timeout_ms)
{
	struct kl_testpoint *p = find(name);
	struct timespec until;
	bool there;
	int r = 0;

	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += timeout_ms / 1000;
	until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
	if (until.tv_nsec >= 1000000000) {
		until.tv_sec++;
		until.tv_nsec -= 1000000000;
	}
	pthread_mutex_lock(&lock);
	while (p && p->parked < count && !r)
		r = pthread_cond_timedwait(&cond, &lock, &until);
	there = p && p->parked >= count;
	pthread_mutex_unlock(&lock);
	return there;
}

bool kl_racepoint_wait(const char *name, int timeout_ms)
{
	return kl_racepoint_wait_for(name, 1, timeout_ms);
}

void kl_racepoint_release(const char *name)
{
	struct kl_testpoint *p = find(name);

	pthread_mutex_lock(&lock);
	if (p) {
		p->epoch++;
		p->to_park = 0;
		/* Else those armed next would never be looked at. */
		if (p->armed)
			atomic_fetch_sub(&kl_racepoints_on, 1);
		p->armed = false;
		pthread_cond_broadcast(&cond);
	}
	pthread_mutex_unlock(&lock);
}

void kl_racepoint_hook(void (*fn)(const char *name))
{
#ifdef KL_RACEPOINTS
	void (*old)(const char *name) = atomic_exchange(&hook, fn);

	atomic_fetch_add(&kl_racepoints_on, !!fn - !!old);
#else
	(void)fn;
#endif
}

bool kl_racepoints_enabled(void)
{
#ifdef KL_RACEPOINTS
	return true;
#else
	return false;
#endif
}
