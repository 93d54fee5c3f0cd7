/* SPDX-License-Identifier: MIT */
/*
 * Exhibits B16 and B17: the cached "there is no slot here", and the generation that it is tagged
 * with (M4, S5, S6).
 */
#include "unit/mmu_env.h"

#define GPA 0x200000ul /* where there is no slot at first */

/* B16, S5: decided "no slot" on the old set, tagged after the update. */
static void tag_after_update(void **state)
{
	struct fixture *f = *state;
	struct faulter t = {f, GPA, KL_ACC_READ, -1};
	pthread_t thread;

	NEED_RACEPOINTS;
	kl_racepoint_arm("fault-mmio-tag", 1);
	pthread_create(&thread, NULL, fault_thread, &t);
	assert_true(kl_racepoint_wait("fault-mmio-tag", TIMEOUT));
	assert_int_equal(set(&f->vm, 1, 0, GPA, PG, f->ram), 0);
	kl_racepoint_release("fault-mmio-tag");
	pthread_join(thread, NULL);
	assert_int_equal(t.r, KL_FAULT_MMIO);
	assert_false(mmio_cached(f, GPA));
	assert_int_equal(kl_mmu_fault(&f->vcpu, GPA, KL_ACC_READ), KL_FAULT_MAPPED);
	assert_true(mapped(f, GPA, KL_ACC_READ));
}

/* B16, S5: parked between lookup and tag, in the reader section that the update waits for. */
static void lookup_before_update(void **state)
{
	struct fixture *f = *state;
	struct faulter t = {f, GPA, KL_ACC_READ, -1};
	struct slot_change c = {f, GPA, PG, -1};
	pthread_t vcpu, updater;

	NEED_RACEPOINTS;
	kl_racepoint_arm("fault-lookup", 1);
	pthread_create(&vcpu, NULL, fault_thread, &t);
	assert_true(kl_racepoint_wait("fault-lookup", TIMEOUT));
	kl_racepoint_arm("memslots-published", 1);
	pthread_create(&updater, NULL, change_slot_1, &c);
	assert_true(kl_racepoint_wait("memslots-published", TIMEOUT));
	/* The vCPU goes on while the new set is there and the update is not over. */
	kl_racepoint_release("fault-lookup");
	pthread_join(vcpu, NULL);
	assert_int_equal(t.r, KL_FAULT_MMIO);
	assert_false(mmio_cached(f, GPA));
	kl_racepoint_release("memslots-published");
	pthread_join(updater, NULL);
	assert_int_equal(c.r, 0);
	assert_false(mmio_cached(f, GPA));
	assert_int_equal(kl_mmu_fault(&f->vcpu, GPA, KL_ACC_READ), KL_FAULT_MAPPED);
}

/* S5: what was looked up during a change is not cached, and nothing cached counts meanwhile. */
static void odd_generation(void **state)
{
	struct fixture *f = *state;
	struct slot_change c = {f, 0x300000, PG, -1};
	pthread_t updater;

	NEED_RACEPOINTS;
	assert_int_equal(kl_mmu_fault(&f->vcpu, GPA + PG, KL_ACC_READ), KL_FAULT_MMIO);
	assert_true(mmio_cached(f, GPA + PG));
	kl_racepoint_arm("memslots-published", 1);
	pthread_create(&updater, NULL, change_slot_1, &c);
	assert_true(kl_racepoint_wait("memslots-published", TIMEOUT));
	assert_int_equal(kl_generation(&f->vm, 0) & 1, 1);
	assert_false(mmio_cached(f, GPA + PG));
	assert_int_equal(kl_mmu_fault(&f->vcpu, GPA, KL_ACC_READ), KL_FAULT_MMIO);
	assert_false(mmio_cached(f, GPA));
	kl_racepoint_release("memslots-published");
	pthread_join(updater, NULL);
	assert_false(mmio_cached(f, GPA));
	assert_false(mmio_cached(f, GPA + PG));
}

/* B17, S6: over the wrap an ancient entry does not match again. */
static void wrap(void **state)
{
	struct fixture *f = *state;
	uint64_t start;
	bool wrapped = false;

	/* A deletion that zaps everything would take the entry with it. */
	atomic_store(&f->vm.slot_zap_all_quirk, false);
	assert_int_equal(kl_mmu_fault(&f->vcpu, GPA, KL_ACC_READ), KL_FAULT_MMIO);
	assert_true(mmio_cached(f, GPA));
	start = kl_generation(&f->vm, 0);
	/* A new VM starts so close below the wrap that this crosses it. */
	for (int i = 0; i < 200; i++) {
		assert_int_equal(set(&f->vm, 1, 0, 0x300000, i & 1 ? 0 : PG, f->ram), 0);
		wrapped |= KL_MMIO_GEN(kl_generation(&f->vm, 0)) < KL_MMIO_GEN(start);
		assert_false(mmio_cached(f, GPA));
	}
	assert_true(wrapped);
	/* Back to where the entry was made: it is gone, not just stale. */
	atomic_store(&f->vm.generation[0], start);
	assert_false(mmio_cached(f, GPA));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
		T(tag_after_update),
		T(lookup_before_update),
		T(odd_generation),
		T(wrap),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
