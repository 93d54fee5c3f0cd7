/* SPDX-License-Identifier: MIT */
/*
 * The vCPU's end of the edges of docs/memory-model.md: a flush that comes while it is out of the
 * guest is served before its next access (M6).
 */
#include <pthread.h>

#include "base/racepoint.h"
#include "unit/x86_env.h"

#define WAIT_MS 10000
#define OTHER   0x150000u /* in the RAM, not touched before */

#define IMM32(x) (x) & 0xff, (x) >> 8 & 0xff, (x) >> 16 & 0xff, (x) >> 24 & 0xff

/* Two pages that take turns behind the slot at MMIO_GPA, which the guest sees at P_MMIO. */
static uint8_t *two_pages(struct env *e)
{
	uint8_t *p = mmap(NULL, 2 * KL_PAGE_SIZE, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	assert_true(p != MAP_FAILED);
	p[0] = 'a';
	p[KL_PAGE_SIZE] = 'b';
	assert_int_equal(env_slot(e, 1, 0, MMIO_GPA, KL_PAGE_SIZE, p), 0);
	return p;
}

static void swap_pages(struct env *e, uint8_t *p)
{
	assert_int_equal(env_slot(e, 1, 0, 0, 0, NULL), 0);
	assert_int_equal(env_slot(e, 1, 0, MMIO_GPA, KL_PAGE_SIZE, p + KL_PAGE_SIZE), 0);
}

/* M6, S8: between two runs. */
static void flush_between_runs(void **state)
{
	struct env *e = *state;
	uint8_t *p = two_pages(e);

	env_code(e, 0x8a, 0x04, 0x25, IMM32(P_MMIO), /* mov al, [P_MMIO] */
		 0xe6, 0x10,                         /* out 0x10, al */
		 0x8a, 0x04, 0x25, IMM32(P_MMIO), 0xe6, 0x10);
	mode64(e, 0);
	assert_run(e, KVM_EXIT_IO);
	assert_int_equal(e->v->gpr[KL_RAX] & 0xff, 'a');
	swap_pages(e, p);
	assert_run(e, KVM_EXIT_IO);
	assert_int_equal(e->v->gpr[KL_RAX] & 0xff, 'b');
	munmap(p, 2 * KL_PAGE_SIZE);
}

static void *run_vcpu(void *arg)
{
	struct env *e = arg;

	return (void *)(intptr_t)env_run(e);
}

/* M6, S8: while a fault on another page keeps the vCPU out, in the middle of a block. */
static void flush_during_fault(void **state)
{
	struct env *e = *state;
	uint8_t *p = two_pages(e);
	pthread_t t;
	void *r;

	if (!kl_racepoints_enabled())
		skip();
	env_code(e, 0x8a, 0x04, 0x25, IMM32(P_MMIO), /* mov al, [P_MMIO] */
		 0xe6, 0x10,                         /* out 0x10, al */
		 0x8a, 0x04, 0x25, IMM32(P_MMIO),    /* mov al, [P_MMIO] */
		 0x88, 0x04, 0x25, IMM32(OTHER),     /* mov [OTHER], al */
		 0x8a, 0x1c, 0x25, IMM32(P_MMIO),    /* mov bl, [P_MMIO] */
		 0xe6, 0x10);
	mode64(e, 0);
	assert_run(e, KVM_EXIT_IO);
	kl_racepoint_arm("fault-populated", 1);
	pthread_create(&t, NULL, run_vcpu, e);
	assert_true(kl_racepoint_wait("fault-populated", WAIT_MS));
	swap_pages(e, p);
	kl_racepoint_release("fault-populated");
	pthread_join(t, &r);
	assert_int_equal((intptr_t)r, 0);
	assert_int_equal(e->v->exit.reason, KVM_EXIT_IO);
	assert_int_equal(e->v->gpr[KL_RAX] & 0xff, 'a');
	assert_int_equal(e->mem[OTHER], 'a');
	assert_int_equal(e->v->gpr[KL_RBX] & 0xff, 'b');
	munmap(p, 2 * KL_PAGE_SIZE);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
#define T(f) cmocka_unit_test_setup_teardown(f, env_setup, env_teardown)
		T(flush_between_runs),
		T(flush_during_fault),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
