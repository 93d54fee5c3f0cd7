/* SPDX-License-Identifier: MIT */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/failpoint.h"
#include "base/log.h"

_Atomic int kl_failpoints_on;
static _Atomic unsigned any_left; /* passages until one fails; 0: none does */
static const char *_Atomic any_failed;

/* Is this the passage that arm_any() meant? */
static bool any_hit(const struct kl_testpoint *p)
{
	unsigned left = atomic_load(&any_left);

	do {
		if (!left)
			return false;
	} while (!atomic_compare_exchange_weak(&any_left, &left, left - 1));
	if (left > 1)
		return false;
	atomic_store(&any_failed, p->name);
	kl_log(KL_LOG_DEBUG, "failpoint %s fails", p->name);
	return true;
}

bool kl_failpoint_hit(const struct kl_testpoint *p)
{
	struct kl_testpoint *first = kl_testpoint_find(KL_FAILPOINT, p->name);
	unsigned hit = atomic_fetch_add(&first->hits, 1) + 1;

	if (any_hit(p))
		return true;
	/* Overshooting is harmless: exactly one passage has the number. */
	if (hit != atomic_load(&first->fail_at))
		return false;
	atomic_store(&first->fired, 1);
	kl_log(KL_LOG_DEBUG, "failpoint %s fails", p->name);
	return true;
}

void kl_failpoint_arm(const char *name, unsigned nth)
{
	struct kl_testpoint *p = kl_testpoint_find(KL_FAILPOINT, name);

	if (!p) {
		kl_testpoint_unknown(KL_FAILPOINT, name);
		return;
	}
	atomic_store(&p->fired, 0);
	atomic_store(&p->fail_at, atomic_load(&p->hits) + nth);
	atomic_fetch_add(&kl_failpoints_on, 1);
}

bool kl_failpoint_disarm(const char *name)
{
	struct kl_testpoint *p = kl_testpoint_find(KL_FAILPOINT, name);

	if (!p || !atomic_exchange(&p->fail_at, 0))
		return false;
	atomic_fetch_sub(&kl_failpoints_on, 1);
	return atomic_load(&p->fired);
}

void kl_failpoint_arm_any(unsigned nth)
{
	atomic_store(&any_failed, NULL);
	atomic_store(&any_left, nth);
	atomic_fetch_add(&kl_failpoints_on, 1);
}

const char *kl_failpoint_disarm_any(void)
{
	atomic_store(&any_left, 0);
	atomic_fetch_sub(&kl_failpoints_on, 1);
	return atomic_exchange(&any_failed, NULL);
}

void kl_failpoint_count_start(void)
{
	for (struct kl_testpoint *p = NULL; (p = kl_testpoint_next(KL_FAILPOINT, p));)
		atomic_store(&p->hits, 0);
	atomic_fetch_add(&kl_failpoints_on, 1);
}

void kl_failpoint_count_stop(void)
{
	atomic_fetch_sub(&kl_failpoints_on, 1);
}

void kl_failpoint_each(void (*fn)(const char *name, unsigned passed, void *arg), void *arg)
{
	for (struct kl_testpoint *p = NULL; (p = kl_testpoint_next(KL_FAILPOINT, p));)
		fn(p->name, atomic_load(&p->hits), arg);
}

bool kl_failpoints_enabled(void)
{
#ifdef KL_FAILPOINTS
	return true;
#else
	return false;
#endif
}

#ifdef KL_FAILPOINTS
static const char *env;

static void tell(const char *name, unsigned passed, void *arg)
{
	(void)arg;
	if (passed)
		kl_log(KL_LOG_WARN, "failpoint %s: passed %u times", name, passed);
}

__attribute__((constructor)) static void arm_from_environment(void)
{
	char name[64];
	unsigned nth;
	int len;

	env = getenv("KVMLET_FAIL");
	if (!env || !*env)
		return;
	if (!strcmp(env, "list")) {
		kl_failpoint_count_start();
		return;
	}
	for (const char *s = env; sscanf(s, "%63[^:,]:%u%n", name, &nth, &len) == 2; s += len + 1) {
		kl_failpoint_arm(name, nth);
		if (s[len] != ',')
			return;
	}
	kl_log(KL_LOG_WARN, "KVMLET_FAIL is not NAME:NTH[,NAME:NTH...] or 'list'");
}

__attribute__((destructor)) static void list_at_exit(void)
{
	if (env && !strcmp(env, "list"))
		kl_failpoint_each(tell, NULL);
}
#endif
