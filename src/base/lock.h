/* SPDX-License-Identifier: MIT */
/*
 * Locks with ranks.
 *
 * Thin over pthread mutexes and rwlocks. In debug builds each thread keeps the ranks that
 * it holds; taking a lock, or waiting for something, whose rank is not greater than every
 * held rank aborts with both names. Ranks: lockrank.def.
 */
#pragma once

#include <pthread.h>

#include "base/compiler.h"
#include "base/log.h"

enum kl_rank {
#define KL_LOCK_RANK(id, kind, what) KL_RANK_##id,
#include "base/lockrank.def"
#undef KL_LOCK_RANK
	KL_NR_RANKS
};

struct kl_mutex {
	pthread_mutex_t m;
	enum kl_rank rank;
};

struct kl_rwlock {
	pthread_rwlock_t rw;
	enum kl_rank rank;
};

void kl_mutex_init(struct kl_mutex *l, enum kl_rank rank);
void kl_mutex_destroy(struct kl_mutex *l);
void kl_rwlock_init(struct kl_rwlock *l, enum kl_rank rank);
void kl_rwlock_destroy(struct kl_rwlock *l);

#define KL_MUTEX_INITIALIZER(r)                        \
	{                                              \
		PTHREAD_MUTEX_INITIALIZER, KL_RANK_##r \
	}

#ifdef KL_DEBUG
void kl_rank_acquire(enum kl_rank rank);
void kl_rank_release(enum kl_rank rank);
/* Called before blocking on something that is not a lock. */
void kl_rank_wait(enum kl_rank rank);
bool kl_rank_held(enum kl_rank rank);
/* After fork, in the child: the parent's other threads and their locks are gone. */
void kl_rank_forget(void);
#else
KL_INLINE void kl_rank_acquire(enum kl_rank rank)
{
	(void)rank;
}
KL_INLINE void kl_rank_release(enum kl_rank rank)
{
	(void)rank;
}
KL_INLINE void kl_rank_wait(enum kl_rank rank)
{
	(void)rank;
}
KL_INLINE bool kl_rank_held(enum kl_rank rank)
{
	(void)rank;
	return true;
}
KL_INLINE void kl_rank_forget(void)
{
}
#endif

#define kl_assert_held(l) KL_ASSERT(kl_rank_held((l)->rank))

KL_INLINE void kl_mutex_lock(struct kl_mutex *l)
{
	kl_rank_acquire(l->rank);
	pthread_mutex_lock(&l->m);
}

/* True if taken. */
KL_INLINE bool kl_mutex_trylock(struct kl_mutex *l)
{
	if (pthread_mutex_trylock(&l->m))
		return false;
	kl_rank_acquire(l->rank);
	return true;
}

KL_INLINE void kl_mutex_unlock(struct kl_mutex *l)
{
	pthread_mutex_unlock(&l->m);
	kl_rank_release(l->rank);
}

KL_INLINE void kl_read_lock(struct kl_rwlock *l)
{
	kl_rank_acquire(l->rank);
	pthread_rwlock_rdlock(&l->rw);
}

KL_INLINE void kl_read_unlock(struct kl_rwlock *l)
{
	pthread_rwlock_unlock(&l->rw);
	kl_rank_release(l->rank);
}

/*
 * A fault holds the lock for less time than it takes to fall asleep and be woken (30 us on a
 * virtual machine), so a writer looks again for a while first.
 */
#define KL_WRITE_SPINS 100

KL_INLINE void kl_write_lock(struct kl_rwlock *l)
{
	kl_rank_acquire(l->rank);
	for (unsigned n = 0; n < KL_WRITE_SPINS; n++) {
		if (!pthread_rwlock_trywrlock(&l->rw))
			return;
		kl_cpu_relax();
	}
	pthread_rwlock_wrlock(&l->rw);
}

KL_INLINE bool kl_write_trylock(struct kl_rwlock *l)
{
	if (pthread_rwlock_trywrlock(&l->rw))
		return false;
	kl_rank_acquire(l->rank);
	return true;
}

KL_INLINE void kl_write_unlock(struct kl_rwlock *l)
{
	pthread_rwlock_unlock(&l->rw);
	kl_rank_release(l->rank);
}
