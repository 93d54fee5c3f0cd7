/* SPDX-License-Identifier: MIT */
/*
 * Threads' cells, and the closing side.
 *
 * Cells lie in chunks that are never given back, so a closer may look at them at any time. A thread
 * claims a place with its first use and gives it back by a key's destructor; one that uses a lock
 * even later keeps its place for ever.
 *
 * `used` of a chunk is raised before a place behind it is claimed for the first time, so whoever
 * closes an object that a thread reads sees the thread.
 *
 * Why DRAINED survives a second close: the object has not been open in between, so no reader can
 * have come; those whose cells name it find it closed and leave.
 */
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include "base/bias.h"
#include "base/log.h"
#include "base/syscall.h"

#define CHUNK_BYTES        (64ul << 10)
#define CHUNK_THREADS      (CHUNK_BYTES / sizeof(struct kl_bias_thread) - 1)
#define SPINS_BEFORE_YIELD 200

_Static_assert(sizeof(struct kl_bias_thread) == 128, "two cache lines");

struct chunk {
	_Atomic(struct chunk *) next;
	_Atomic unsigned used;
	uint64_t first_index;
	struct kl_bias_thread thread[CHUNK_THREADS];
};
_Static_assert(sizeof(struct chunk) <= CHUNK_BYTES, "as mapped");

KL_TLS struct kl_bias_thread *kl_bias_self, *kl_bias_mine;

static _Atomic(struct chunk *) chunks;
static pthread_key_t key;
static bool have_key;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void release(void *place)
{
	struct kl_bias_thread *t = place;

	kl_bias_self = kl_bias_mine = NULL;
	/* Of a thread that ended as a holder, which it must not: closers would wait for ever. */
	for (unsigned i = 0; i < KL_BIAS_CELLS; i++)
		atomic_store_explicit(&t->cell[i], NULL, memory_order_release);
	t->used = 0;
	atomic_store_explicit(&t->taken, 0, memory_order_release);
}

static void init(void)
{
	have_key = !pthread_key_create(&key, release);
}

/* One more chunk at @end, or the one that another thread put there meanwhile. */
static struct chunk *add_chunk(_Atomic(struct chunk *) *end, uint64_t first_index)
{
	struct chunk *there = NULL, *c;
	long p = kl_sys(SYS_mmap, 0, CHUNK_BYTES, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p < 0)
		return NULL;
	c = (struct chunk *)p;
	c->first_index = first_index;
	if (atomic_compare_exchange_strong(end, &there, c))
		return c;
	kl_sys(SYS_munmap, p, CHUNK_BYTES);
	return there;
}

static struct kl_bias_thread *claim_in(struct chunk *c)
{
	for (unsigned i = 0; i < CHUNK_THREADS; i++) {
		struct kl_bias_thread *t = &c->thread[i];
		unsigned used = atomic_load(&c->used);
		uint32_t no = 0;

		while (used <= i && !atomic_compare_exchange_weak(&c->used, &used, i + 1))
			;
		if (atomic_compare_exchange_strong(&t->taken, &no, 1)) {
			t->index = kl_min(c->first_index + i, (uint64_t)KL_BIAS_INDEXES - 1);
			return t;
		}
	}
	return NULL;
}

struct kl_bias_thread *kl_bias_register(void)
{
	_Atomic(struct chunk *) *p = &chunks;
	struct kl_bias_thread *t = NULL;
	uint64_t index = 0;

	pthread_once(&once, init);
	while (!t) {
		struct chunk *c = atomic_load_explicit(p, memory_order_acquire);

		if (!c)
			c = add_chunk(p, index);
		if (!c)
			return NULL;
		t = claim_in(c);
		index += CHUNK_THREADS;
		p = &c->next;
	}
	if (have_key)
		pthread_setspecific(key, t);
	kl_bias_self = kl_bias_mine = t;
	return t;
}

bool kl_bias_enter(struct kl_bias_thread *t, const struct kl_bias *b)
{
	unsigned i;

	if (!kl_bias_first(t))
		return kl_bias_enter_first(t, b);
	i = (unsigned)__builtin_ctz(~(t->used | 1));
	KL_ASSERT(i < KL_BIAS_CELLS);
	if (!kl_bias_publish(t, i, b))
		return false;
	t->used |= 1u << i;
	return true;
}

/* The cell of @t that names @b, or -1. A cell never moves: who looks at them would miss it. */
static int cell_of(const struct kl_bias_thread *t, const struct kl_bias *b)
{
	for (int i = 0; t && i < KL_BIAS_CELLS; i++)
		if (atomic_load_explicit(&t->cell[i], memory_order_relaxed) == b)
			return i;
	return -1;
}

bool kl_bias_reads(const struct kl_bias_thread *t, const struct kl_bias *b)
{
	return cell_of(t, b) >= 0;
}

bool kl_bias_leave(struct kl_bias_thread *t, const struct kl_bias *b)
{
	int i = cell_of(t, b);

	if (i < 0)
		return false;
	t->used &= ~(1u << i);
	atomic_store_explicit(&t->cell[i], NULL, memory_order_release);
	return true;
}

/* ---- closing ------------------------------------------------------------------------------ */

uint64_t kl_bias_close(struct kl_bias *b, uint64_t *now)
{
	uint64_t old = atomic_load(&b->state), new;

	do {
		new = (old & ~(KL_BIAS_OPEN | KL_BIAS_DRAINED)) + KL_BIAS_SEQ;
		if (!(old & KL_BIAS_OPEN))
			new |= old &KL_BIAS_DRAINED;
	} while (!atomic_compare_exchange_weak(&b->state, &old, new)); /* PAIR(bias) */
	*now = new;
	return old;
}

bool kl_bias_open(struct kl_bias *b, uint64_t state)
{
	KL_ASSERT(state & KL_BIAS_DRAINED);
	return atomic_compare_exchange_strong(&b->state, &state,
					      (state & ~KL_BIAS_DRAINED) | KL_BIAS_OPEN);
}

bool kl_bias_reopen(struct kl_bias *b, uint64_t now)
{
	uint64_t state = kl_bias_state(b);

	do {
		if ((state ^ now) & ~KL_BIAS_DRAINED)
			return false;
	} while (!atomic_compare_exchange_weak(&b->state, &state,
					       (state & ~KL_BIAS_DRAINED) | KL_BIAS_OPEN));
	return true;
}

void kl_bias_set_drained(struct kl_bias *b)
{
	KL_ASSERT(!(kl_bias_state(b) & KL_BIAS_OPEN));
	atomic_fetch_or(&b->state, KL_BIAS_DRAINED);
}

bool kl_bias_busy(const struct kl_bias *b)
{
	for (struct chunk *c = atomic_load(&chunks); c; c = atomic_load(&c->next)) {
		unsigned n = atomic_load(&c->used);

		for (unsigned i = 0; i < n; i++)
			for (unsigned k = 0; k < KL_BIAS_CELLS; k++)
				if (atomic_load(&c->thread[i].cell[k]) == b) /* PAIR(bias) */
					return true;
	}
	return false;
}

void kl_bias_wait(const struct kl_bias *b)
{
	for (unsigned n = 0; kl_bias_busy(b); n++) {
		if (n == 0)
			racepoint("bias-waits");
		if (n < SPINS_BEFORE_YIELD)
			kl_cpu_relax();
		else
			sched_yield();
	}
}

void kl_bias_after_fork(void)
{
	for (struct chunk *c = atomic_load(&chunks); c; c = atomic_load(&c->next))
		for (unsigned i = 0; i < atomic_load(&c->used); i++) {
			struct kl_bias_thread *t = &c->thread[i];

			for (unsigned k = 0; k < KL_BIAS_CELLS; k++)
				atomic_store(&t->cell[k], NULL);
			t->used = 0;
			if (t != kl_bias_mine)
				atomic_store(&t->taken, 0);
		}
}
