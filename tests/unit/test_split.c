/* SPDX-License-Identifier: MIT */
/* Large leaves that are split when logging begins, and come back when it ends (D4). */
#include "mmu_env.h"

#include "base/failpoint.h"
#include "mem/dirty.h"
#include "mmu/split.h"

#define MB  (1ul << 20)
#define GB  (1ul << 30)
#define GPA (1ul << 32)
#define LOG KVM_MEM_LOG_DIRTY_PAGES

static int split_setup(void **state)
{
	kl_eager_page_split = true;
	return setup(state);
}

static int split_teardown(void **state)
{
	kl_eager_page_split = false;
	return teardown(state);
}

/* In guest mode, with a pointer for @access. */
static uint8_t *enter(struct fixture *f, uint64_t gpa, unsigned access)
{
	for (;;) {
		bool writable, mmio;
		uint8_t *p;

		kl_vcpu_enter_guest(&f->vcpu);
		kl_vcpu_take_requests(&f->vcpu, KL_REQ_TLB_FLUSH);
		p = kl_mmu_lookup(&f->vcpu, gpa, access, &writable, &mmio);
		if (p)
			return p;
		kl_vcpu_leave_guest(&f->vcpu);
		assert_int_equal(kl_mmu_fault(&f->vcpu, gpa, access), KL_FAULT_MAPPED);
	}
}

static void touch(struct fixture *f, uint64_t gpa, unsigned access)
{
	uint8_t *p = enter(f, gpa, access);

	if (access & KL_ACC_WRITE)
		kl_store8(p, kl_load8(p) + 1);
	kl_vcpu_leave_guest(&f->vcpu);
}

static void assert_leaves(struct fixture *f, uint64_t small, uint64_t large, uint64_t huge)
{
	assert_int_equal(kl_stat_get(&f->vm.stats.pages_4k), small);
	assert_int_equal(kl_stat_get(&f->vm.stats.pages_2m), large);
	assert_int_equal(kl_stat_get(&f->vm.stats.pages_1g), huge);
}

/* The log of slot 1, of so many words, has @word at @at and nothing else. */
static void assert_log(struct fixture *f, unsigned words, unsigned at, uint64_t word)
{
	uint64_t *bitmap = malloc(words * 8);

	assert_int_equal(kl_dirty_log_get(&f->vm, 0, 1, bitmap, false), 0);
	for (unsigned i = 0; i < words; i++)
		assert_int_equal(bitmap[i], i == at ? word : 0);
	free(bitmap);
}

/* D4: split when logging begins, whole again after it, and what is mapped meanwhile is small. */
static void begins_and_ends(void **state)
{
	struct fixture *f = *state;
	uint8_t *p = map_written(4 * MB);

	assert_int_equal(set(&f->vm, 1, 0, GPA, 4 * MB, p), 0);
	touch(f, GPA, KL_ACC_WRITE);
	assert_leaves(f, 0, 1, 0);
	assert_int_equal(set(&f->vm, 1, LOG, GPA, 4 * MB, p), 0);
	assert_leaves(f, 512, 0, 0);
	touch(f, GPA + 65 * PG, KL_ACC_WRITE);
	assert_int_equal(p[65 * PG], 2);
	assert_log(f, 16, 1, 2);
	touch(f, GPA + 2 * MB, KL_ACC_READ);
	assert_leaves(f, 513, 0, 0);
	assert_int_equal(set(&f->vm, 1, 0, GPA, 4 * MB, p), 0);
	assert_leaves(f, 0, 0, 0);
	touch(f, GPA + 3 * PG, KL_ACC_WRITE);
	touch(f, GPA + 3 * MB, KL_ACC_READ);
	assert_leaves(f, 0, 2, 0);
	munmap(p, 4 * MB);
}

/* D4: with all pages set at first, only what is cleared is split. */
static void when_cleared(void **state)
{
	struct fixture *f = *state;
	uint8_t *p = map_written(4 * MB);
	uint64_t bitmap[8];

	f->vm.manual_dirty_log = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
	assert_int_equal(set(&f->vm, 1, 0, GPA, 4 * MB, p), 0);
	touch(f, GPA, KL_ACC_WRITE);
	touch(f, GPA + 2 * MB, KL_ACC_WRITE);
	assert_leaves(f, 0, 2, 0);
	assert_int_equal(set(&f->vm, 1, LOG, GPA, 4 * MB, p), 0);
	assert_leaves(f, 0, 2, 0);
	memset(bitmap, 0xff, sizeof(bitmap));
	assert_int_equal(kl_dirty_log_clear(&f->vm, 0, 1, 512, 512, bitmap), 0);
	assert_leaves(f, 512, 1, 0);
	assert_int_equal(kl_dirty_log_clear(&f->vm, 0, 1, 0, 512, bitmap), 0);
	assert_leaves(f, 1024, 0, 0);
	munmap(p, 4 * MB);
}

/* M1: a leaf of 1 GiB becomes 262,144, and all of them map what it did. */
static void huge_leaf(void **state)
{
	struct fixture *f = *state;
	uint8_t *p = map_aligned(GB, PROT_READ | PROT_WRITE);

	/* Zeroes that the kernel shares cost nothing. */
	if (madvise(p, GB, 22 /* MADV_POPULATE_READ */))
		skip();
	assert_int_equal(set(&f->vm, 1, 0, GPA, GB, p), 0);
	touch(f, GPA, KL_ACC_READ);
	if (!kl_stat_get(&f->vm.stats.pages_1g))
		skip();
	assert_int_equal(set(&f->vm, 1, LOG, GPA, GB, p), 0);
	assert_leaves(f, GB / PG, 0, 0);
	for (uint64_t at = 0; at < GB; at += GB / 64 + 17 * PG) {
		assert_ptr_equal(enter(f, GPA + at, KL_ACC_READ), p + at);
		kl_vcpu_leave_guest(&f->vcpu);
	}
	munmap(p, GB);
}

static void *log_on(void *arg)
{
	struct slot_change *c = arg;

	c->r = set(&c->f->vm, 1, LOG, c->gpa, c->size, (void *)c->f->ram);
	return NULL;
}

/* M7, N6: a vCPU looks at the leaf while its copy is being made; that it did is not forgotten. */
static void accessed_meanwhile(void **state)
{
	struct fixture *f = *state;
	uint8_t *ram = f->ram, *p = map_written(2 * MB);
	struct slot_change c = {.f = f, .gpa = GPA, .size = 2 * MB};
	pthread_t thread;

	NEED_RACEPOINTS;
	assert_int_equal(set(&f->vm, 1, 0, GPA, 2 * MB, p), 0);
	touch(f, GPA, KL_ACC_WRITE);
	assert_int_equal(kl_notifier_clear_young((uint64_t)p, (uint64_t)p + 2 * MB), 1);
	f->ram = p;
	kl_racepoint_arm("split-filled", 1);
	pthread_create(&thread, NULL, log_on, &c);
	assert_true(kl_racepoint_wait("split-filled", TIMEOUT));
	touch(f, GPA + 5 * PG, KL_ACC_READ);
	kl_racepoint_release("split-filled");
	pthread_join(thread, NULL);
	assert_int_equal(c.r, 0);
	f->ram = ram;
	assert_leaves(f, 512, 0, 0);
	assert_int_equal(kl_notifier_test_young((uint64_t)p, (uint64_t)p + 2 * MB), 1);
	munmap(p, 2 * MB);
}

/* M6: a pointer from before is good after, and what is written through it is in the log. */
static void pointer_from_before(void **state)
{
	struct fixture *f = *state;
	uint8_t *p = map_written(2 * MB), *khva;

	assert_int_equal(set(&f->vm, 1, LOG, GPA, 2 * MB, p), 0);
	kl_eager_page_split = false;
	assert_int_equal(set(&f->vm, 1, 0, GPA, 2 * MB, p), 0);
	touch(f, GPA, KL_ACC_WRITE);
	assert_leaves(f, 0, 1, 0);
	assert_int_equal(set(&f->vm, 1, LOG, GPA, 2 * MB, p), 0);
	khva = enter(f, GPA + 9 * PG, KL_ACC_WRITE);
	kl_mmu_split_range(&f->vm, 0, GPA / PG, GPA / PG + 512);
	kl_store8(khva, 77);
	kl_vcpu_leave_guest(&f->vcpu);
	assert_leaves(f, 512, 0, 0);
	assert_int_equal(kl_load8(enter(f, GPA + 9 * PG, KL_ACC_READ)), 77);
	kl_vcpu_leave_guest(&f->vcpu);
	assert_log(f, 8, 0, 1u << 9);
	munmap(p, 2 * MB);
}

/* S2: without memory for tables they stay large, and the log is as good. */
static void no_memory(void **state)
{
	struct fixture *f = *state;
	uint8_t *p = map_written(2 * MB);

	if (!kl_failpoints_enabled())
		skip();
	assert_int_equal(set(&f->vm, 1, 0, GPA, 2 * MB, p), 0);
	touch(f, GPA, KL_ACC_WRITE);
	kl_failpoint_arm("page-alloc", 1);
	assert_int_equal(set(&f->vm, 1, LOG, GPA, 2 * MB, p), 0);
	assert_true(kl_failpoint_disarm("page-alloc"));
	assert_leaves(f, 0, 1, 0);
	touch(f, GPA + 511 * PG, KL_ACC_WRITE);
	assert_log(f, 8, 7, 1ull << 63);
	munmap(p, 2 * MB);
}

/* D4: of the slot that logs, and of none that lies beside it. */
static void neighbours_stay(void **state)
{
	struct fixture *f = *state;
	uint8_t *p = map_written(6 * MB);

	for (unsigned i = 0; i < 3; i++)
		assert_int_equal(set(&f->vm, 1 + i, 0, GPA + i * 2 * MB, 2 * MB, p + i * 2 * MB),
				 0);
	for (unsigned i = 0; i < 3; i++)
		touch(f, GPA + i * 2 * MB, KL_ACC_WRITE);
	assert_leaves(f, 0, 3, 0);
	assert_int_equal(set(&f->vm, 2, LOG, GPA + 2 * MB, 2 * MB, p + 2 * MB), 0);
	assert_leaves(f, 512, 2, 0);
	munmap(p, 6 * MB);
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, split_setup, split_teardown)
	const struct CMUnitTest tests[] = {
		T(begins_and_ends),     T(when_cleared), T(huge_leaf),       T(accessed_meanwhile),
		T(pointer_from_before), T(no_memory),    T(neighbours_stay),
	};

	cmocka_set_test_filter(getenv("KVMLET_TEST"));
	return cmocka_run_group_tests(tests, NULL, NULL);
}
