/* SPDX-License-Identifier: MIT */
/*
 * One thread at a time: threads of a scenario stop at every racepoint they pass, and a controller
 * says who goes on. One that sleeps in the engine (for a lock, a bracket, a holder) is left alone;
 * it runs beside another until its next racepoint.
 *
 * Which one goes on is a choice between those that stand at a racepoint. A schedule is the list of
 * the choices; the same list gives the same run, as far as sleeping threads wake up in the same
 * order.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "oracle.h"

#define MAX_CHOICES 512

enum strategy {
	PRIORITIES, /* random priorities, with a few random changes */
	LISTED,     /* choice[] as far as it goes, then the first (it goes on who ran before) */
};

struct schedule {
	enum strategy strategy;
	uint64_t seed;    /* PRIORITIES */
	unsigned changes; /* PRIORITIES: so many times the thread that runs becomes the last */
	unsigned n;       /* LISTED: given; out: made */
	uint8_t choice[MAX_CHOICES], of[MAX_CHOICES]; /* out: which, of how many */
};

/* Run @fn(arg, i) in @n threads. False: nobody went on for a long time (a deadlock). */
bool schedule_run(struct schedule *s, unsigned n, void (*fn)(void *arg, unsigned i), void *arg);
/* A place where the calling thread may be stopped, too. */
void schedule_point(void);
