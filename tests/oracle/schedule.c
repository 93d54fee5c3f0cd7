/* SPDX-License-Identifier: MIT */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "../random.h"
#include "base/racepoint.h"
#include "schedule.h"

enum state { STARTING, RUNNING, STANDING, DONE };

struct runner {
	pthread_t thread;
	enum state state;
	bool asleep; /* RUNNING, but in the kernel or waiting for somebody */
	bool go;
	int tid;
	unsigned i;
	int priority;
	unsigned looks;
};

/* Everything is under the mutex. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER; /* for the controller */
static pthread_cond_t granted = PTHREAD_COND_INITIALIZER;
static struct runner runners[MAX_THREADS];
static unsigned nr;
static void (*body)(void *arg, unsigned i);
static void *body_arg;
static _Thread_local struct runner *me;

static void stand(void)
{
	pthread_mutex_lock(&lock);
	me->state = STANDING;
	me->asleep = false;
	pthread_cond_signal(&changed);
	while (!me->go)
		pthread_cond_wait(&granted, &lock);
	me->go = false;
	me->state = RUNNING;
	pthread_mutex_unlock(&lock);
}

void schedule_point(void)
{
	if (me)
		stand();
}

static void on_racepoint(const char *name)
{
	(void)name;
	schedule_point();
}

static void *run(void *arg)
{
	struct runner *r = arg;

	me = r;
	r->tid = (int)syscall(SYS_gettid);
	stand();
	body(body_arg, r->i);
	pthread_mutex_lock(&lock);
	r->state = DONE;
	pthread_cond_signal(&changed);
	pthread_mutex_unlock(&lock);
	me = NULL;
	return NULL;
}

/* In a system call, as far as /proc tells. */
static bool sleeps(int tid)
{
	char path[64], text[512], *p;
	size_t n;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/self/task/%d/stat", tid);
	f = fopen(path, "re");
	if (!f)
		return false;
	n = fread(text, 1, sizeof(text) - 1, f);
	fclose(f);
	text[n] = 0;
	p = strrchr(text, ')');
	return p && p[1] && (p[2] == 'S' || p[2] == 'D');
}

#define LOOK_NS    200000 /* between two looks at a thread that runs */
#define LOOKS      2      /* so many times asleep in a row: it waits for somebody */
#define SPINS      100    /* so many looks without a racepoint: it waits without sleeping */
#define STUCK_LOOK 100000 /* 20 s and nobody to choose */

/* Everybody stands, waits or is done. Under the mutex, which is let go meanwhile. */
static bool quiet(void)
{
	struct timespec until;
	bool busy;

	for (unsigned look = 0; look < STUCK_LOOK; look++) {
		bool any = false, standing = false;

		busy = false;
		for (unsigned i = 0; i < nr; i++) {
			any |= runners[i].state != DONE;
			standing |= runners[i].state == STANDING;
			busy |= runners[i].state == STARTING ||
				(runners[i].state == RUNNING && !runners[i].asleep);
		}
		if (!any || (!busy && standing))
			return true;
		clock_gettime(CLOCK_REALTIME, &until);
		until.tv_nsec += LOOK_NS;
		if (until.tv_nsec >= 1000000000) {
			until.tv_sec++;
			until.tv_nsec -= 1000000000;
		}
		if (!pthread_cond_timedwait(&changed, &lock, &until))
			continue;
		for (unsigned i = 0; i < nr; i++) {
			struct runner *r = &runners[i];

			if (r->state != RUNNING || r->asleep)
				continue;
			r->looks = sleeps(r->tid) ? r->looks + SPINS / LOOKS : r->looks + 1;
			r->asleep = r->looks >= SPINS;
		}
	}
	return false;
}

/* Who goes on, of those that stand: whoever ran last comes first in the order of choices. */
static struct runner *choose(struct schedule *s, unsigned step, int last, uint64_t *rnd)
{
	struct runner *c[MAX_THREADS], *best;
	unsigned n = 0, k = 0;

	if (last >= 0 && runners[last].state == STANDING)
		c[n++] = &runners[last];
	for (unsigned i = 0; i < nr; i++)
		if ((int)i != last && runners[i].state == STANDING)
			c[n++] = &runners[i];
	if (s->strategy == LISTED) {
		k = step < s->n && s->choice[step] < n ? s->choice[step] : 0;
	} else {
		/* Now and then the one that would go on becomes the last of all. */
		if (n > 1 && last >= 0 && random_next(rnd) % 24 < s->changes)
			runners[last].priority = -(int)step - 1;
		best = c[0];
		for (unsigned i = 1; i < n; i++)
			if (c[i]->priority > best->priority) {
				best = c[i];
				k = i;
			}
	}
	if (step < MAX_CHOICES) {
		s->choice[step] = (uint8_t)k;
		s->of[step] = (uint8_t)n;
	}
	return c[k];
}

bool schedule_run(struct schedule *s, unsigned n, void (*fn)(void *arg, unsigned i), void *arg)
{
	uint64_t rnd = s->seed;
	unsigned step = 0;
	bool good = true;
	int last = -1;

	nr = n;
	body = fn;
	body_arg = arg;
	memset(runners, 0, sizeof(runners));
	kl_racepoint_hook(on_racepoint);
	for (unsigned i = 0; i < n; i++) {
		runners[i].i = i;
		runners[i].priority = (int)(random_next(&rnd) % 1000);
		if (pthread_create(&runners[i].thread, NULL, run, &runners[i]))
			abort();
	}
	pthread_mutex_lock(&lock);
	for (;; step++) {
		struct runner *r = NULL;

		good = quiet();
		for (unsigned i = 0; i < n; i++)
			if (runners[i].state == STANDING)
				r = &runners[i];
		if (!good || !r)
			break;
		r = choose(s, step, last, &rnd);
		last = (int)r->i;
		r->go = true;
		r->state = RUNNING;
		r->looks = 0;
		r->asleep = false;
		/* Who waits may have been woken by what happens now. */
		for (unsigned i = 0; i < n; i++)
			runners[i].looks = 0;
		pthread_cond_broadcast(&granted);
	}
	pthread_mutex_unlock(&lock);
	s->n = step < MAX_CHOICES ? step : MAX_CHOICES;
	if (good)
		for (unsigned i = 0; i < n; i++)
			pthread_join(runners[i].thread, NULL);
	kl_racepoint_hook(NULL);
	return good;
}
