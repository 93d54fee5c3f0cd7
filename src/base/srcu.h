/* SPDX-License-Identifier: MIT */
/*
 * Sleepable-reader sections without thread registration.
 *
 * Guarantees
 *   (a) kl_srcu_read_lock() is wait-free and may be called by any thread, also one that
 *       never met the engine before.
 *   (b) kl_srcu_synchronize() returns after every section that was open when it was called
 *       has closed; sections opened meanwhile do not delay it for ever (two halves that are
 *       flipped, each waited for).
 *   (c) what a reader did in its section happens before synchronize() returns, and what the
 *       updater published before synchronize() is seen by sections that it did not wait for.
 *   (d) sections nest.
 *
 * Calls that exclude each other: synchronize() against synchronize() (internal mutex).
 * A reader section must not span: running guest code, populating a page, taking a lock
 * that an updater holds while it synchronizes.
 *
 * Readers count themselves in and out in one of KL_SRCU_SHARDS cache lines, chosen by
 * thread, so that readers on different CPUs seldom share a line.
 */
#pragma once

#include <pthread.h>

#include "base/compiler.h"

#define KL_SRCU_SHARDS 16

struct kl_srcu_shard {
	_Atomic uint64_t in[2];
	_Atomic uint64_t out[2];
} KL_CACHELINE;

struct kl_srcu {
	_Atomic unsigned idx;
	pthread_mutex_t sync_lock;
	struct kl_srcu_shard shard[KL_SRCU_SHARDS];
};

#define KL_SRCU_INITIALIZER                            \
	{                                              \
		.sync_lock = PTHREAD_MUTEX_INITIALIZER \
	}

void kl_srcu_init(struct kl_srcu *s);
void kl_srcu_destroy(struct kl_srcu *s);

/* Returns the token for kl_srcu_read_unlock(). */
int kl_srcu_read_lock(struct kl_srcu *s);
void kl_srcu_read_unlock(struct kl_srcu *s, int token);

/* Context: may sleep; not inside a section of @s. */
void kl_srcu_synchronize(struct kl_srcu *s);
