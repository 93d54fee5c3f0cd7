/* SPDX-License-Identifier: MIT */
/*
 * Exhibit B14: what an invalidation asks of a vCPU is consumed, does not make it spin, and wakes
 * nobody who is halted (M6).
 */
#include <pthread.h>
#include <sched.h>
#include <stdio.h>

#include "mem/notifier.h"
#include "unit/x86_env.h"

#define ROUNDS  200
#define COUNTER 0x5000ul

static void *run_vcpu(void *arg)
{
	struct env *e = arg;

	return (void *)(intptr_t)env_run(e);
}

static uint64_t counter(struct env *e)
{
	return __atomic_load_n((uint64_t *)(e->mem + COUNTER), __ATOMIC_RELAXED);
}

static void invalidate(struct env *e)
{
	struct kl_notifier_range r = {.start = (uint64_t)e->mem + COUNTER,
				      .end = (uint64_t)e->mem + COUNTER + KL_PAGE_SIZE,
				      .may_block = true};

	kl_engine_enter();
	assert_int_equal(kl_notifier_begin(&r), 0);
	kl_notifier_end(&r);
	kl_engine_leave();
}

static void stop(struct env *e, pthread_t t)
{
	void *r;

	/* The only request that ends KVM_RUN without a signal. */
	kl_vcpu_request(&e->v->core, KL_REQ_VM_DEAD);
	pthread_join(t, &r);
	assert_int_equal((intptr_t)r, -EIO);
}

/* B14: a running vCPU consumes each request once, and runs guest code in between. */
static void running(void **state)
{
	struct env *e = *state;
	uint64_t flushes, faults, requests;
	pthread_t t;

	env_code(e, 0x48, 0xff, 0x04, 0x25, 0, 0x50, 0, 0, /* inc qword [COUNTER] */
		 0xeb, 0xf6);                              /* jmp back */
	mode64(e, 0);
	pthread_create(&t, NULL, run_vcpu, e);
	while (!counter(e))
		sched_yield();
	flushes = kl_stat_get(&e->v->core.stats.tlb_flush);
	faults = kl_stat_get(&e->v->core.stats.pf_taken);
	requests = kl_stat_get(&e->v->core.stats.request_exits);
	for (unsigned i = 0; i < ROUNDS; i++) {
		uint64_t seen;

		invalidate(e);
		/* Whatever is set besides the flush is set for ever. */
		assert_int_equal(kl_vcpu_requests(&e->v->core) & ~KL_REQ_TLB_FLUSH, 0);
		seen = counter(e);
		while (counter(e) == seen)
			sched_yield();
	}
	assert_true(kl_stat_get(&e->v->core.stats.tlb_flush) - flushes <= ROUNDS + 1);
	/* The page itself, and what may be faulted in anew because a fault met the bracket. */
	assert_true(kl_stat_get(&e->v->core.stats.pf_taken) - faults >= ROUNDS);
	assert_int_equal(kl_stat_get(&e->v->core.stats.request_exits), requests);
	stop(e, t);
}

/* Voluntary context switches of thread @tid, and whether it sleeps. */
static uint64_t switches(pid_t tid, bool *asleep)
{
	unsigned long long n = 0;
	char path[64], line[128], state = 0;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/self/task/%d/status", (int)tid);
	f = fopen(path, "r");
	assert_non_null(f);
	while (fgets(line, sizeof(line), f)) {
		sscanf(line, "State: %c", &state);
		sscanf(line, "voluntary_ctxt_switches: %llu", &n);
	}
	fclose(f);
	*asleep = state == 'S';
	return n;
}

/* B14: a halted vCPU is neither woken nor sent into the guest by what goes on with memory. */
static void halted(void **state)
{
	struct env *e = *state;
	struct kl_vcpu_core *c = &e->v->core;
	uint64_t before, halts;
	bool asleep, undisturbed;
	pthread_t t;
	pid_t tid;

	env_code(e, 0x48, 0xff, 0x04, 0x25, 0, 0x50, 0, 0, 0xf4);
	mode64(e, 0);
	pthread_create(&t, NULL, run_vcpu, e);
	while (!atomic_load(&c->sleeping))
		sched_yield();
	tid = atomic_load(&c->tid);
	do
		before = switches(tid, &asleep);
	while (!asleep);
	halts = kl_stat_get(&c->stats.halt_exits);
	for (unsigned i = 0; i < ROUNDS; i++)
		invalidate(e);
	undisturbed = switches(tid, &asleep) == before && asleep;
	assert_true(undisturbed);
	assert_int_equal(counter(e), 1);
	assert_int_equal(kl_stat_get(&c->stats.halt_exits), halts);
	assert_int_equal(kl_vcpu_requests(c) & ~KL_REQ_TLB_FLUSH, 0);
	stop(e, t);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
#define T(f)      cmocka_unit_test_setup_teardown(f, env_setup, env_teardown)
#define T_APIC(f) cmocka_unit_test_setup_teardown(f, env_setup_apic, env_teardown)
		T(running),
		T_APIC(halted),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
