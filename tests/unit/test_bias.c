/* SPDX-License-Identifier: MIT */
/*
 * The reader-biased lock (src/base/bias.h): forced interleavings, and readers against closers with
 * a checker.
 */
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

#include "base/bias.h"

#define TIMEOUT 10000

#define NEED_RACEPOINTS                       \
	do {                                  \
		if (!kl_racepoints_enabled()) \
			skip();               \
	} while (0)

static struct kl_bias_thread *me(void)
{
	struct kl_bias_thread *t = kl_bias_self ? kl_bias_self : kl_bias_register();

	assert_non_null(t);
	return t;
}

static void open_it(struct kl_bias *b)
{
	assert_true(kl_bias_open(b, kl_bias_state(b)));
}

static void close_it(struct kl_bias *b)
{
	uint64_t now;

	kl_bias_close(b, &now);
	kl_bias_wait(b);
	kl_bias_set_drained(b);
}

struct closer {
	struct kl_bias *b;
	_Atomic bool done;
};

static void *close_thread(void *arg)
{
	struct closer *c = arg;

	close_it(c->b);
	atomic_store(&c->done, true);
	return NULL;
}

/* G15: states, sequence, and what a second close keeps. */
static void states(void **state)
{
	struct kl_bias b = KL_BIAS_INITIALIZER;
	struct kl_bias_thread *t = me();
	uint64_t s, now;

	(void)state;
	assert_false(kl_bias_enter(t, &b));
	assert_int_equal(kl_bias_held(), 0);
	open_it(&b);
	assert_true(kl_bias_enter(t, &b));
	assert_true(kl_bias_busy(&b));
	assert_true(kl_bias_leave(t, &b));
	assert_false(kl_bias_leave(t, &b));
	s = kl_bias_close(&b, &now);
	assert_true(s & KL_BIAS_OPEN);
	assert_false(now & (KL_BIAS_OPEN | KL_BIAS_DRAINED));
	/* Not drained: a second close does not make it so. */
	kl_bias_close(&b, &now);
	assert_false(now & KL_BIAS_DRAINED);
	kl_bias_set_drained(&b);
	s = kl_bias_state(&b);
	kl_bias_close(&b, &now);
	assert_true(now & KL_BIAS_DRAINED);
	/* Somebody closed it since. */
	assert_false(kl_bias_open(&b, s));
	assert_true(kl_bias_open(&b, now));
	/* Undone only if nobody else came. */
	kl_bias_close(&b, &now);
	assert_true(kl_bias_reopen(&b, now));
	assert_true(kl_bias_enter(t, &b));
	assert_true(kl_bias_leave(t, &b));
	kl_bias_close(&b, &now);
	kl_bias_close(&b, &s);
	assert_false(kl_bias_reopen(&b, now));
	assert_false(kl_bias_enter(t, &b));
}

/* G1a: several at a time, left in any order; a cell is found again. */
static void several(void **state)
{
	struct kl_bias b[KL_BIAS_CELLS];
	struct kl_bias_thread *t = me();
	unsigned left = KL_BIAS_CELLS;

	(void)state;
	for (unsigned i = 0; i < KL_BIAS_CELLS; i++) {
		b[i] = (struct kl_bias)KL_BIAS_INITIALIZER;
		open_it(&b[i]);
		assert_true(kl_bias_enter(t, &b[i]));
	}
	for (unsigned i = 3; left > 4; i = (i + 5) % KL_BIAS_CELLS, left--) {
		assert_true(kl_bias_leave(t, &b[i]));
		assert_false(kl_bias_busy(&b[i]));
		assert_int_equal(kl_bias_held(), left - 1);
	}
	for (unsigned i = 0; i < 100; i++) {
		assert_true(kl_bias_enter(t, &b[3]));
		assert_true(kl_bias_busy(&b[3]));
		assert_true(kl_bias_leave(t, &b[3]));
	}
	for (unsigned i = 0; i < KL_BIAS_CELLS; i++)
		left -= kl_bias_leave(t, &b[i]);
	assert_int_equal(left, 0);
}

/* G8, N2: a closer waits for the reader of its object, and for no other's. */
static void closer_waits(void **state)
{
	struct kl_bias b = KL_BIAS_INITIALIZER, other = KL_BIAS_INITIALIZER;
	struct closer c = {.b = &b};
	struct kl_bias_thread *t = me();
	pthread_t thread;

	(void)state;
	NEED_RACEPOINTS;
	open_it(&b);
	open_it(&other);
	assert_true(kl_bias_enter(t, &other));
	close_it(&b); /* no wait */
	open_it(&b);
	assert_true(kl_bias_enter(t, &b));
	kl_racepoint_arm("bias-waits", 1);
	pthread_create(&thread, NULL, close_thread, &c);
	assert_true(kl_racepoint_wait("bias-waits", TIMEOUT));
	kl_racepoint_release("bias-waits");
	assert_false(atomic_load(&c.done));
	assert_true(kl_bias_leave(t, &b));
	pthread_join(thread, NULL);
	assert_true(kl_bias_leave(t, &other));
}

static void *enter_thread(void *arg)
{
	struct kl_bias_thread *t = me();

	return kl_bias_enter(t, arg) ? (kl_bias_leave(t, arg), (void *)1) : NULL;
}

/* G8: who has published, and looks after the close, finds it closed and is waited for meanwhile. */
static void published_before_close(void **state)
{
	struct kl_bias b = KL_BIAS_INITIALIZER;
	struct closer c = {.b = &b};
	pthread_t reader, closer;
	void *entered;

	(void)state;
	NEED_RACEPOINTS;
	open_it(&b);
	kl_racepoint_arm("bias-published", 1);
	pthread_create(&reader, NULL, enter_thread, &b);
	assert_true(kl_racepoint_wait("bias-published", TIMEOUT));
	kl_racepoint_arm("bias-waits", 1);
	pthread_create(&closer, NULL, close_thread, &c);
	assert_true(kl_racepoint_wait("bias-waits", TIMEOUT));
	kl_racepoint_release("bias-waits");
	assert_false(atomic_load(&c.done));
	kl_racepoint_release("bias-published");
	pthread_join(reader, &entered);
	pthread_join(closer, NULL);
	assert_null(entered);
}

/* Places of threads that ended are used again; there is room for more than a chunk has. */
static void many_threads(void **state)
{
	struct kl_bias b = KL_BIAS_INITIALIZER;
	uint64_t highest;

	(void)state;
	open_it(&b);
	for (int round = 0; round < 20; round++) {
		pthread_t t[8];

		for (int i = 0; i < 8; i++)
			pthread_create(&t[i], NULL, enter_thread, &b);
		for (int i = 0; i < 8; i++)
			pthread_join(t[i], NULL);
	}
	highest = me()->index;
	assert_true(highest < 64);
	close_it(&b);
}

/* U5: in a child the parent's readers are gone. */
static void forked_child(void **state)
{
	struct kl_bias b = KL_BIAS_INITIALIZER;
	int status;
	pid_t pid;

	(void)state;
	open_it(&b);
	assert_true(kl_bias_enter(me(), &b));
	pid = fork();
	if (!pid) {
		kl_bias_after_fork();
		close_it(&b);
		_exit(kl_bias_held() || !kl_bias_open(&b, kl_bias_state(&b)) ||
		      !kl_bias_enter(me(), &b));
	}
	assert_true(pid > 0);
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
	assert_true(kl_bias_leave(me(), &b));
	close_it(&b);
}

/* ---- stress -------------------------------------------------------------------------------- */

#define OBJECTS 4
#define READERS 3

static struct object {
	struct kl_bias b;
	unsigned long stamp; /* plain: changes only while closed and drained */
	unsigned long copy;
} objects[OBJECTS];
static _Atomic bool stop;
static _Atomic unsigned long torn, reads;

static void *read_thread(void *arg)
{
	struct kl_bias_thread *t = me();
	unsigned seed = (unsigned)(uintptr_t)arg;

	while (!atomic_load_explicit(&stop, memory_order_relaxed)) {
		struct object *o = &objects[(unsigned)rand_r(&seed) % OBJECTS];
		unsigned long stamp;

		if (!kl_bias_enter(t, &o->b))
			continue;
		stamp = o->stamp;
		if (stamp & 1 || o->copy != stamp)
			atomic_fetch_add(&torn, 1);
		if (!(seed & 63))
			sched_yield();
		if (o->stamp != stamp)
			atomic_fetch_add(&torn, 1);
		kl_bias_leave(t, &o->b);
		atomic_fetch_add_explicit(&reads, 1, memory_order_relaxed);
	}
	return NULL;
}

/* G15, B1: nobody reads what is changed while it is closed and drained. */
static void stress(void **state)
{
	pthread_t t[READERS];

	(void)state;
	atomic_store(&stop, false);
	atomic_store(&torn, 0);
	atomic_store(&reads, 0);
	for (unsigned i = 0; i < OBJECTS; i++) {
		objects[i].b = (struct kl_bias)KL_BIAS_INITIALIZER;
		open_it(&objects[i].b);
	}
	for (uintptr_t i = 0; i < READERS; i++)
		pthread_create(&t[i], NULL, read_thread, (void *)(i + 1));
	for (unsigned i = 0; i < 20000 || atomic_load(&reads) < 100; i++) {
		struct object *o = &objects[i % OBJECTS];

		close_it(&o->b);
		o->stamp++; /* odd: nobody may see it */
		o->copy = o->stamp + 1;
		o->stamp++;
		open_it(&o->b);
		if (i % 64 == 0)
			sched_yield();
	}
	atomic_store(&stop, true);
	for (unsigned i = 0; i < READERS; i++)
		pthread_join(t[i], NULL);
	assert_int_equal(atomic_load(&torn), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(states),       cmocka_unit_test(several),
		cmocka_unit_test(closer_waits), cmocka_unit_test(published_before_close),
		cmocka_unit_test(many_threads), cmocka_unit_test(forked_child),
		cmocka_unit_test(stress),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
