/* SPDX-License-Identifier: MIT */
/*
 * The reader-biased lock of an object that is read often and closed seldom.
 *
 *     reader    publish "I use X" in a cell of its thread; X open?  use it; clear the cell
 *     closer    close X; wait until no cell names X
 *
 * Each side stores, then loads what the other stored, all sequentially consistent, so one of them
 * sees the other: PAIR(bias). The reader's store is an exchange on a line of its own; why not
 * membarrier(2) on the closer's side is in docs/memory-model.md.
 *
 * The object's word `state`: OPEN, DRAINED, and a sequence that every close raises.
 *   - OPEN only comes by kl_bias_open(), which fails if anybody closed since the state was read;
 *   - DRAINED: not open, and nobody reads. It lasts until the object is opened.
 *
 * Guarantees
 *   (a) while a cell of a thread names X, and X was open after the cell was published, nobody's
 *       kl_bias_wait() for X returns;
 *   (b) what a reader did happens before the wait for it returns, and what was done before X was
 *       opened happens before it is read;
 *   (c) readers never wait, share no written cache line, and make no system call but for a
 *       thread's first use;
 *   (d) closing an object delays no reader of another.
 *
 * Any thread may read; its cells are given back when it ends. Not from a signal handler.
 */
#pragma once

#include "base/compiler.h"
#include "base/racepoint.h"

#define KL_BIAS_OPEN    1ull
#define KL_BIAS_DRAINED 2ull
#define KL_BIAS_SEQ     4ull /* one */

struct kl_bias {
	_Atomic uint64_t state;
};
#define KL_BIAS_INITIALIZER     \
	{                       \
		KL_BIAS_DRAINED \
	}

#define KL_BIAS_CELLS 14 /* objects that a thread may read at a time */

#define KL_BIAS_INDEXES 512

/* Two cache lines that one thread writes and closers read. */
struct kl_bias_thread {
	_Atomic uint32_t taken;
	uint32_t used;  /* a bit for each cell but the first, whose content says it; own thread */
	uint64_t index; /* below KL_BIAS_INDEXES; no two threads share one, but for the last */
	_Atomic(const struct kl_bias *) cell[KL_BIAS_CELLS];
} KL_CACHELINE;

/* The calling thread's; NULL before its first use, and while it is barred. */
extern KL_TLS struct kl_bias_thread *kl_bias_self, *kl_bias_mine;

/* For a thread's first use: NULL if there is no memory. */
struct kl_bias_thread *kl_bias_register(void);

/* A thread that reads nothing must not begin to (true), or may again. */
KL_INLINE void kl_bias_bar(bool barred)
{
	kl_bias_self = barred ? NULL : kl_bias_mine;
}

/* Objects that the calling thread reads. */
KL_INLINE unsigned kl_bias_held(void)
{
	struct kl_bias_thread *t = kl_bias_self;

	return t ? (unsigned)__builtin_popcount(t->used) +
			       (atomic_load_explicit(&t->cell[0], memory_order_relaxed) != NULL)
		 : 0;
}

KL_INLINE bool kl_bias_publish(struct kl_bias_thread *t, unsigned i, const struct kl_bias *b)
{
	atomic_exchange(&t->cell[i], b); /* PAIR(bias) */
	racepoint("bias-published");
	if (KL_LIKELY(atomic_load(&((struct kl_bias *)b)->state) & KL_BIAS_OPEN)) /* PAIR(bias) */
		return true;
	atomic_store_explicit(&t->cell[i], NULL, memory_order_release);
	return false;
}

/*
 * Begin to read @b. False: it is not open, and nothing is held. Context: a cell is free. Never
 * waits.
 */
bool kl_bias_enter(struct kl_bias_thread *t, const struct kl_bias *b);
/* False: it is not held. Objects are left in any order. */
bool kl_bias_leave(struct kl_bias_thread *t, const struct kl_bias *b);
/* Does the thread with cells @t, or NULL, read @b? */
bool kl_bias_reads(const struct kl_bias_thread *t, const struct kl_bias *b);

/*
 * The first cell, for who reads one object at a time: what counts are stores, since the exchange
 * waits for all that came before it.
 */
KL_INLINE const struct kl_bias *kl_bias_first(const struct kl_bias_thread *t)
{
	return atomic_load_explicit(&t->cell[0], memory_order_relaxed);
}

/* As kl_bias_enter(). Context: kl_bias_first() is NULL. */
KL_INLINE bool kl_bias_enter_first(struct kl_bias_thread *t, const struct kl_bias *b)
{
	return kl_bias_publish(t, 0, b);
}

/* Context: kl_bias_first() is what is left. */
KL_INLINE void kl_bias_leave_first(struct kl_bias_thread *t)
{
	atomic_store_explicit(&t->cell[0], NULL, memory_order_release);
}

KL_INLINE uint64_t kl_bias_state(struct kl_bias *b)
{
	return atomic_load(&b->state);
}

/*
 * Close @b and raise its sequence, also if it is not open. Returns the state as it was; *@now is
 * what it became. Any thread, never waits.
 */
uint64_t kl_bias_close(struct kl_bias *b, uint64_t *now);
/* Does any thread read @b? Of those that come after it was closed none does for long. */
bool kl_bias_busy(const struct kl_bias *b);
/* Wait for the readers of @b. Context: closed; the calling thread does not read @b. */
void kl_bias_wait(const struct kl_bias *b);
/* The same is over, and nobody can have opened @b since it was closed: from here on it is DRAINED.
 */
void kl_bias_set_drained(struct kl_bias *b);
/* Open @b if its state is still @state, which has DRAINED. */
bool kl_bias_open(struct kl_bias *b, uint64_t state) KL_MUST_CHECK;
/* Undo the close that found @b open and left it at @now, unless another came since. */
bool kl_bias_reopen(struct kl_bias *b, uint64_t now);

/* In a forked child. */
void kl_bias_after_fork(void);
