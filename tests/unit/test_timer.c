/* SPDX-License-Identifier: MIT */
/* The engine's timers: order, replacement, cancelling against firing, the helper's life. */
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

#include "base/failpoint.h"
#include "base/racepoint.h"
#include "host/sys.h"
#include "host/timer.h"

#define TIMEOUT 60000
#define N       500
#define FAR     (kl_timer_now() + 3600ull * 1000000000u)

struct probe {
	struct kl_timer t; /* first */
	_Atomic uint32_t fired;
	_Atomic uint64_t at;
	uint64_t deadline;
	unsigned rearm;
};

static _Atomic uint32_t total; /* futex */
static struct probe *order[N];

static void fire(struct kl_timer *t)
{
	struct probe *p = (struct probe *)t;
	uint32_t n;

	atomic_store(&p->at, kl_timer_now());
	atomic_fetch_add(&p->fired, 1);
	if (p->rearm) {
		p->rearm--;
		kl_timer_arm(t, kl_timer_now());
	}
	n = atomic_load(&total); /* which only the helper raises */
	if (n < N)
		order[n] = p;
	atomic_fetch_add(&total, 1);
	kl_futex_wake(&total, 1);
}

static void wait_for_total(uint32_t n)
{
	uint32_t seen;

	while ((seen = atomic_load(&total)) < n)
		kl_futex_wait(&total, seen, NULL);
}

static int setup(void **state)
{
	atomic_store(&total, 0);
	return kl_timer_get();
}

static int teardown(void **state)
{
	kl_timer_put();
	return 0;
}

/* Each fires once, not early, in the order of the deadlines whatever the order of arming. */
static void fires_in_order(void **state)
{
	struct probe *p = calloc(N, sizeof(*p));
	uint64_t base;

	assert_non_null(p);
	for (unsigned i = 0; i < N; i++)
		kl_timer_init(&p[i].t, fire);
	base = kl_timer_now() + 50000000u;
	for (unsigned i = 0; i < N; i++) {
		unsigned k = (i * 7919u) % N;

		p[k].deadline = base + k * 1000u;
		kl_timer_arm(&p[k].t, k % 3 ? p[k].deadline : FAR);
	}
	for (unsigned k = 0; k < N; k += 3) /* replaced by an earlier one */
		kl_timer_arm(&p[k].t, p[k].deadline);
	wait_for_total(N);
	for (unsigned i = 0; i < N; i++) {
		assert_int_equal(p[i].fired, 1);
		assert_true(p[i].at >= p[i].deadline);
		assert_ptr_equal(order[i], &p[i]);
		assert_false(kl_timer_cancel(&p[i].t));
	}
	free(p);
}

/* What was cancelled or replaced by a later deadline does not fire. */
static void cancelled(void **state)
{
	struct probe *p = calloc(N, sizeof(*p));
	uint64_t soon = kl_timer_now() + 20000000u;
	unsigned left = 0;

	assert_non_null(p);
	for (unsigned i = 0; i < N; i++) {
		kl_timer_init(&p[i].t, fire);
		p[i].deadline = soon + (uint64_t)(i % 7) * 100000u;
		kl_timer_arm(&p[i].t, i % 5 == 4 ? FAR : FAR + i);
	}
	for (unsigned i = 0; i < N; i++) {
		if (i % 5 == 0)
			assert_true(i % 2 ? kl_timer_cancel(&p[i].t) : kl_timer_disarm(&p[i].t));
		if (i % 5 > 1) {
			kl_timer_arm(&p[i].t, p[i].deadline);
			left++;
		}
	}
	wait_for_total(left);
	for (unsigned i = 0; i < N; i++) {
		assert_int_equal(p[i].fired, i % 5 > 1);
		assert_int_equal(kl_timer_cancel(&p[i].t), i % 5 == 1);
		assert_false(kl_timer_cancel(&p[i].t));
	}
	assert_int_equal(total, left);
	free(p);
}

/* A callback may arm its own timer: a period. */
static void periodic(void **state)
{
	struct probe p = {.rearm = 9};

	kl_timer_init(&p.t, fire);
	kl_timer_arm(&p.t, 0);
	wait_for_total(10);
	assert_int_equal(p.fired, 10);
	assert_false(kl_timer_cancel(&p.t));
}

static void *cancel_thread(void *arg)
{
	kl_timer_cancel(arg);
	return NULL;
}

/*
 * Who cancels while the callback is about to run waits for its end, also when the callback arms
 * the timer again: after the cancelling nothing runs.
 */
static void cancel_waits(void **state)
{
	struct probe p = {.rearm = 1000000};
	pthread_t thread;

	if (!kl_racepoints_enabled())
		skip();
	kl_timer_init(&p.t, fire);
	kl_racepoint_arm("timer-callback", 1);
	kl_racepoint_arm("timer-cancel-waits", 1);
	kl_timer_arm(&p.t, 0);
	assert_true(kl_racepoint_wait("timer-callback", TIMEOUT));
	assert_int_equal(pthread_create(&thread, NULL, cancel_thread, &p), 0);
	assert_true(kl_racepoint_wait("timer-cancel-waits", TIMEOUT));
	assert_int_equal(p.fired, 0);
	kl_racepoint_release("timer-cancel-waits");
	kl_racepoint_release("timer-callback");
	pthread_join(thread, NULL);
	assert_false(p.t.armed);
	assert_true(p.fired >= 1);
	assert_true(p.rearm < 1000000);
}

/* An earlier deadline between the helper's look and its sleep is not slept over. */
static void earlier_before_sleep(void **state)
{
	struct probe far = {.rearm = 0}, soon = {.rearm = 0};

	if (!kl_racepoints_enabled())
		skip();
	kl_timer_init(&far.t, fire);
	kl_timer_init(&soon.t, fire);
	kl_racepoint_arm("timer-sleep", 1);
	kl_timer_arm(&far.t, FAR); /* wakes the helper, which finds nothing to do */
	assert_true(kl_racepoint_wait("timer-sleep", TIMEOUT));
	kl_timer_arm(&soon.t, 0);
	kl_racepoint_release("timer-sleep");
	wait_for_total(1);
	assert_int_equal(soon.fired, 1);
	assert_true(kl_timer_cancel(&far.t));
}

static _Atomic int helper_mask_bad;

static void look_at_mask(struct kl_timer *t)
{
	uint64_t mask = 0;

	kl_sys(SYS_rt_sigprocmask, SIG_BLOCK, NULL, &mask, sizeof(mask));
	for (int sig = 1; sig < 32; sig++)
		if (sig != SIGKILL && sig != SIGSTOP && !(mask >> (sig - 1) & 1))
			atomic_store(&helper_mask_bad, sig);
	fire(t);
}

/* The program's signals never find the helper. */
static void helper_blocks_signals(void **state)
{
	struct probe p = {.rearm = 0};

	kl_timer_init(&p.t, look_at_mask);
	kl_timer_arm(&p.t, 0);
	wait_for_total(1);
	assert_int_equal(helper_mask_bad, 0);
}

/* The last reference ends the helper, what stays armed fires when there is one again. */
static void comes_and_goes(void **state)
{
	struct probe p = {.rearm = 0};

	kl_timer_init(&p.t, fire);
	kl_timer_put();
	kl_timer_arm(&p.t, 0);
	assert_int_equal(p.fired, 0);
	assert_int_equal(kl_timer_get(), 0);
	wait_for_total(1);
	assert_int_equal(kl_timer_get(), 0);
	kl_timer_put();
	kl_timer_arm(&p.t, 0);
	wait_for_total(2);
}

static void no_thread(void **state)
{
	if (!kl_failpoints_enabled())
		skip();
	kl_timer_put();
	kl_failpoint_arm("timer-thread", 1);
	assert_int_equal(kl_timer_get(), -EAGAIN);
	assert_true(kl_failpoint_disarm("timer-thread"));
	assert_int_equal(kl_timer_get(), 0);
}

/* U5: a forked child has no timers of the parent's, and a helper of its own on first use. */
static void forked(void **state)
{
	struct probe p = {.rearm = 0}, own = {.rearm = 0};
	int status = -1;
	pid_t pid;

	if (KL_TSAN) /* refuses threads in a child of a process with threads */
		skip();
	kl_timer_init(&p.t, fire);
	kl_timer_arm(&p.t, FAR);
	pid = fork();
	if (!pid) {
		alarm(60);
		kl_timer_after_fork();
		kl_timer_init(&own.t, fire);
		if (kl_timer_get())
			_exit(1);
		kl_timer_arm(&own.t, 0);
		wait_for_total(1);
		kl_timer_put();
		_exit(own.fired == 1 && !p.fired ? 0 : 2);
	}
	assert_true(pid > 0);
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
	assert_true(kl_timer_cancel(&p.t));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(fires_in_order, setup, teardown),
		cmocka_unit_test_setup_teardown(cancelled, setup, teardown),
		cmocka_unit_test_setup_teardown(periodic, setup, teardown),
		cmocka_unit_test_setup_teardown(cancel_waits, setup, teardown),
		cmocka_unit_test_setup_teardown(earlier_before_sleep, setup, teardown),
		cmocka_unit_test_setup_teardown(helper_blocks_signals, setup, teardown),
		cmocka_unit_test_setup_teardown(comes_and_goes, setup, teardown),
		cmocka_unit_test_setup_teardown(no_thread, setup, teardown),
		cmocka_unit_test_setup_teardown(forked, setup, teardown),
	};

	cmocka_set_test_filter(getenv("KVMLET_TEST"));
	return cmocka_run_group_tests(tests, NULL, NULL);
}
