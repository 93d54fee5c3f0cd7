/* SPDX-License-Identifier: MIT */
/*
 * What racepoints (racepoint.h) and failpoints (failpoint.h) have in common: a named place in the
 * code that a test can find. Every place puts a pointer to its record into one section of the
 * program, so all of them are known before any is passed, and a misspelt name is an error.
 *
 * The record of the first place with a name stands for all places with that name.
 */
#pragma once

#include "base/compiler.h"

enum kl_testpoint_kind { KL_RACEPOINT, KL_FAILPOINT };

struct kl_testpoint {
	const char *name;
	enum kl_testpoint_kind kind;
	union {
		struct {            /* under the mutex of racepoint.c */
			bool armed; /* counted in kl_racepoints_on */
			int to_park;
			int parked;
			unsigned epoch; /* raised by release */
		};
		struct {
			_Atomic unsigned hits;    /* since counting began */
			_Atomic unsigned fail_at; /* the hit that fails; 0: none */
			_Atomic unsigned fired;
		};
	};
};

#define KL_TESTPOINT(kind_, name_)                                                      \
	({                                                                              \
		static struct kl_testpoint point_ = {.name = (name_), .kind = (kind_)}; \
		static struct kl_testpoint *const ref_                                  \
			__attribute__((section("kl_testpoints"), used)) = &point_;      \
		(void)ref_;                                                             \
		&point_;                                                                \
	})

/* The record that stands for @name, or NULL. */
struct kl_testpoint *kl_testpoint_find(enum kl_testpoint_kind kind, const char *name);
/* For a test's own mistake: no such place, in a build that has places. */
void kl_testpoint_unknown(enum kl_testpoint_kind kind, const char *name);
/* All records of @kind that stand for a name: start with NULL. */
struct kl_testpoint *kl_testpoint_next(enum kl_testpoint_kind kind, struct kl_testpoint *after);
