/* SPDX-License-Identifier: MIT */
/*
 * A small table of armed racepoints under one mutex. An unarmed racepoint costs a relaxed
 * load; nothing at all where racepoints are compiled out.
 */
#include <pthread.h>
#include <string.h>
#include <time.h>

#include "base/racepoint.h"

#define MAX_POINTS 32

struct point {
	const char *name;
	int to_park; /* arrivals still to be stopped */
	int parked;
	unsigned epoch; /* raised by release */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
static struct point points[MAX_POINTS];
static _Atomic int nr_armed;

static struct point *find(const char *name, bool create)
{
	for (int i = 0; i < MAX_POINTS; i++) {
		if (points[i].name && !strcmp(points[i].name, name))
			return &points[i];
		if (!points[i].name) {
			if (create)
				points[i].name = name;
			return create ? &points[i] : NULL;
		}
	}
	return NULL;
}

#ifdef KL_RACEPOINTS
void kl_racepoint_hit(const char *name)
{
	struct point *p;

	if (!atomic_load_explicit(&nr_armed, memory_order_relaxed))
		return;
	pthread_mutex_lock(&lock);
	p = find(name, false);
	if (p && p->to_park > 0) {
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
#endif

void kl_racepoint_arm(const char *name, int count)
{
	struct point *p;

	pthread_mutex_lock(&lock);
	p = find(name, true);
	if (p) {
		p->to_park = count;
		atomic_fetch_add(&nr_armed, 1);
	}
	pthread_mutex_unlock(&lock);
}

bool kl_racepoint_wait(const char *name, int timeout_ms)
{
	struct timespec until;
	struct point *p;
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
	p = find(name, true);
	while (p && !p->parked && !r)
		r = pthread_cond_timedwait(&cond, &lock, &until);
	there = p && p->parked;
	pthread_mutex_unlock(&lock);
	return there;
}

void kl_racepoint_release(const char *name)
{
	struct point *p;

	pthread_mutex_lock(&lock);
	p = find(name, false);
	if (p) {
		p->epoch++;
		p->to_park = 0;
		atomic_fetch_sub(&nr_armed, 1);
		pthread_cond_broadcast(&cond);
	}
	pthread_mutex_unlock(&lock);
}

bool kl_racepoints_enabled(void)
{
#ifdef KL_RACEPOINTS
	return true;
#else
	return false;
#endif
}
