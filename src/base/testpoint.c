/* SPDX-License-Identifier: MIT */
#include <string.h>

#include "base/log.h"
#include "base/testpoint.h"

/* Weak: a program without any place has no such section. */
extern struct kl_testpoint *const __start_kl_testpoints[]
	__attribute__((weak, visibility("hidden")));
extern struct kl_testpoint *const __stop_kl_testpoints[]
	__attribute__((weak, visibility("hidden")));

#define FOR_EACH(p) \
	for (struct kl_testpoint *const *p = __start_kl_testpoints; p < __stop_kl_testpoints; p++)

struct kl_testpoint *kl_testpoint_find(enum kl_testpoint_kind kind, const char *name)
{
	FOR_EACH(p)
	if ((*p)->kind == kind && !strcmp((*p)->name, name))
		return *p;
	return NULL;
}

struct kl_testpoint *kl_testpoint_next(enum kl_testpoint_kind kind, struct kl_testpoint *after)
{
	bool found = !after;

	FOR_EACH(p)
	{
		if (found && (*p)->kind == kind && kl_testpoint_find(kind, (*p)->name) == *p)
			return *p;
		found |= *p == after;
	}
	return NULL;
}

void kl_testpoint_unknown(enum kl_testpoint_kind kind, const char *name)
{
#if defined(KL_RACEPOINTS) || defined(KL_FAILPOINTS)
	kl_log(KL_LOG_ERR, "no %s is called '%s'", kind == KL_RACEPOINT ? "racepoint" : "failpoint",
	       name);
	kl_assert_fail("known test point", __FILE__, __LINE__);
#else
	(void)kind;
	(void)name;
#endif
}
