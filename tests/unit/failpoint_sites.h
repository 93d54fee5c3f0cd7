/* SPDX-License-Identifier: MIT */
/* Which failpoints a life has passed, and how often: for runs that fail each in turn. */
#pragma once

#include "base/failpoint.h"

struct site {
	const char *name;
	unsigned passed;
};

struct sites {
	struct site s[128];
	unsigned n;
};

static inline void note_site(const char *name, unsigned passed, void *arg)
{
	struct sites *sites = arg;

	assert_true(sites->n < KL_ARRAY_SIZE(sites->s));
	sites->s[sites->n++] = (struct site){name, passed};
}
