/* SPDX-License-Identifier: MIT */
/*
 * Two halves, each with in- and out-counters in shards. A reader counts itself into the
 * half that idx names and out of the same half. synchronize() waits for each half in turn
 * to be empty, after steering new readers to the other.
 *
 * Why both halves: a reader may load idx, be delayed, and count itself into a half that an
 * updater has just found empty; the second flip of the *same* synchronize() waits for it.
 *
 * Why "out" is summed before "in": a reader that moves between the two sums can then only
 * make the half look busier than it is.  All counter operations are sequentially consistent:
 * reader: in++ ; load what the updater published.   updater: publish ; load in.  PAIR(srcu)
 */
#include <sched.h>

#include "base/racepoint.h"
#include "base/srcu.h"

#define SPINS_BEFORE_YIELD 100

static KL_TLS unsigned my_shard; /* 1-based; 0: not chosen yet */
static _Atomic unsigned next_shard;

void kl_srcu_init(struct kl_srcu *s)
{
	atomic_init(&s->idx, 0);
	pthread_mutex_init(&s->sync_lock, NULL);
	for (unsigned i = 0; i < KL_SRCU_SHARDS; i++)
		for (unsigned h = 0; h < 2; h++) {
			atomic_init(&s->shard[i].in[h], 0);
			atomic_init(&s->shard[i].out[h], 0);
		}
}

void kl_srcu_destroy(struct kl_srcu *s)
{
	pthread_mutex_destroy(&s->sync_lock);
}

static struct kl_srcu_shard *shard(struct kl_srcu *s)
{
	if (KL_UNLIKELY(!my_shard))
		my_shard = 1 + atomic_fetch_add_explicit(&next_shard, 1, memory_order_relaxed) %
				       KL_SRCU_SHARDS;
	return &s->shard[my_shard - 1];
}

int kl_srcu_read_lock(struct kl_srcu *s)
{
	struct kl_srcu_shard *sh = shard(s);
	unsigned half = atomic_load_explicit(&s->idx, memory_order_relaxed) & 1;

	atomic_fetch_add(&sh->in[half], 1); /* PAIR(srcu) */
	return (int)half;
}

void kl_srcu_read_unlock(struct kl_srcu *s, int token)
{
	/* The same shard, and release: what the section did is before it. */
	atomic_fetch_add(&shard(s)->out[token], 1);
}

static bool half_empty(struct kl_srcu *s, unsigned half)
{
	uint64_t in = 0, out = 0;

	for (unsigned i = 0; i < KL_SRCU_SHARDS; i++)
		out += atomic_load(&s->shard[i].out[half]);
	for (unsigned i = 0; i < KL_SRCU_SHARDS; i++)
		in += atomic_load(&s->shard[i].in[half]); /* PAIR(srcu) */
	return in == out;
}

static void wait_half(struct kl_srcu *s, unsigned half)
{
	if (!half_empty(s, half))
		racepoint("srcu-wait");
	for (unsigned n = 0; !half_empty(s, half); n++) {
		if (n < SPINS_BEFORE_YIELD)
			kl_cpu_relax();
		else
			sched_yield();
	}
}

void kl_srcu_synchronize(struct kl_srcu *s)
{
	pthread_mutex_lock(&s->sync_lock);
	for (int i = 0; i < 2; i++) {
		unsigned old = atomic_load_explicit(&s->idx, memory_order_relaxed);

		/* Readers that come from now on use the other half. */
		atomic_store(&s->idx, old + 1);
		wait_half(s, old & 1);
	}
	pthread_mutex_unlock(&s->sync_lock);
}
