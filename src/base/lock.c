/* SPDX-License-Identifier: MIT */
#include "base/lock.h"
#include "base/log.h"

void kl_mutex_init(struct kl_mutex *l, enum kl_rank rank)
{
	pthread_mutex_init(&l->m, NULL);
	l->rank = rank;
}

void kl_mutex_destroy(struct kl_mutex *l)
{
	pthread_mutex_destroy(&l->m);
}

void kl_rwlock_init(struct kl_rwlock *l, enum kl_rank rank)
{
	pthread_rwlockattr_t attr;

	/* A zap must not starve behind a stream of faults. */
	pthread_rwlockattr_init(&attr);
	pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	pthread_rwlock_init(&l->rw, &attr);
	pthread_rwlockattr_destroy(&attr);
	l->rank = rank;
}

void kl_rwlock_destroy(struct kl_rwlock *l)
{
	pthread_rwlock_destroy(&l->rw);
}

#ifdef KL_DEBUG

static const char *const rank_names[] = {
#define KL_LOCK_RANK(id, kind, what) #id,
#include "base/lockrank.def"
#undef KL_LOCK_RANK
};

static KL_TLS uint64_t held; /* bit per rank */

static void check(enum kl_rank rank, const char *verb)
{
	uint64_t not_below = held >> rank;

	if (!not_below)
		return;
	kl_log(KL_LOG_ERR, "lock order: %s %s while holding %s", verb, rank_names[rank],
	       rank_names[63 - __builtin_clzll(held)]);
	kl_assert_fail("lock rank", __FILE__, __LINE__);
}

void kl_rank_acquire(enum kl_rank rank)
{
	check(rank, "taking");
	held |= 1ull << rank;
}

void kl_rank_release(enum kl_rank rank)
{
	held &= ~(1ull << rank);
}

void kl_rank_wait(enum kl_rank rank)
{
	check(rank, "waiting for");
}

bool kl_rank_held(enum kl_rank rank)
{
	return held >> rank & 1;
}

void kl_rank_forget(void)
{
	held = 0;
}
#endif
