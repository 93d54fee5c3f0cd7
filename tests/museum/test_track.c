/* SPDX-License-Identifier: MIT */
/*
 * Exhibits B20-B23: write tracking (S8, T1-T7).
 */
#include "base/failpoint.h"
#include "mmu/track.h"
#include "unit/mmu_env.h"

#define GPA (1ul << 32)
#define GFN (GPA >> KL_PAGE_SHIFT)

static unsigned removals;

static void wrote(void *opaque, unsigned as, kl_gpa_t gpa, const void *bytes, size_t len)
{
}

static void gone(void *opaque, unsigned as, kl_gfn_t gfn, uint64_t npages)
{
	removals++;
}

static struct kl_tracker tracker = {.ops = {wrote, gone}};

static void watch(struct fixture *f, bool internal)
{
	removals = 0;
	tracker.internal = internal;
	kl_track_register(&f->vm, &tracker);
	assert_int_equal(set(&f->vm, 1, 0, GPA, 2 * PG, f->ram), 0);
	assert_int_equal(kl_track_add(&f->vm, 0, GFN + 1), 0);
}

/* Mapped for writing all the same, by who reports it; or as any page. */
static bool reported(struct fixture *f, uint64_t gpa)
{
	bool writable = true, mmio;

	kl_vcpu_enter_guest(&f->vcpu);
	kl_vcpu_take_requests(&f->vcpu, KL_REQ_TLB_FLUSH);
	assert_non_null(kl_mmu_lookup(&f->vcpu, gpa, KL_ACC_WRITE, &writable, &mmio));
	kl_vcpu_leave_guest(&f->vcpu);
	return !writable;
}

static int fail_change(struct fixture *f, uint64_t gpa, uint64_t size)
{
	int r;

	kl_failpoint_arm("memslot-alloc", 1);
	r = set(&f->vm, 1, 0, gpa, size, size ? f->ram : NULL);
	assert_true(kl_failpoint_disarm("memslot-alloc"));
	return r;
}

/* B20, T5: a change that fails as late as it can: nobody was told, and the page is tracked still.
 */
static void refused_late(void **state)
{
	struct fixture *f = *state;

	if (!kl_failpoints_enabled())
		skip();
	watch(f, true);
	assert_int_equal(fail_change(f, 0, 0), -ENOMEM);
	assert_int_equal(fail_change(f, GPA + PG, 2 * PG), -ENOMEM);
	kl_failpoint_arm("memslot-alloc", 2); /* the second that a MOVE needs */
	assert_int_equal(set(&f->vm, 1, 0, GPA + PG, 2 * PG, f->ram), -ENOMEM);
	assert_true(kl_failpoint_disarm("memslot-alloc"));
	assert_int_equal(set(&f->vm, 1, 0, PG, 2 * PG, f->ram), -EEXIST);
	assert_int_equal(removals, 0);
	assert_true(kl_track_is(&f->vm, 0, GFN + 1));
	assert_int_equal(kl_mmu_fault(&f->vcpu, GPA + PG, KL_ACC_WRITE), KL_FAULT_MAPPED);
	assert_true(reported(f, GPA + PG));
	/* And told once when it is true. */
	assert_int_equal(set(&f->vm, 1, 0, 0, 0, NULL), 0);
	assert_int_equal(removals, 1);
	kl_track_unregister(&f->vm, &tracker);
}

static void *deleter(void *arg)
{
	struct fixture *f = arg;

	assert_int_equal(set(&f->vm, 1, 0, 0, 0, NULL), 0);
	return NULL;
}

/* B20, T5: not while the slot is still in the set, marked as invalid. */
static void told_last(void **state)
{
	struct fixture *f = *state;
	pthread_t t;

	NEED_RACEPOINTS;
	watch(f, false);
	kl_racepoint_arm("track-slot-gone", 1);
	pthread_create(&t, NULL, deleter, f);
	assert_true(kl_racepoint_wait("track-slot-gone", TIMEOUT));
	assert_null(kl_memslot_find(kl_memslots(&f->vm, 0), GFN));
	assert_false(kl_generation(&f->vm, 0) & 1);
	assert_int_equal(removals, 0);
	kl_racepoint_release("track-slot-gone");
	pthread_join(t, NULL);
	assert_int_equal(removals, 1);
	kl_track_unregister(&f->vm, &tracker);
}

/* ---- B21 ---- */

#define ROUNDS 3000

struct worker {
	struct fixture *f;
	_Atomic bool stop;
	struct kl_vcpu_core core;
};

/* Who writes, and looks whether he has to report. */
static void *looker(void *arg)
{
	struct worker *w = arg;

	while (!atomic_load(&w->stop)) {
		bool tracked = kl_track_is(&w->f->vm, 0, GFN + 1);
		int token = kl_track_begin(&w->f->vm);

		if (tracked)
			kl_track_write(&w->f->vm, 0, GPA + PG, "x", 1);
		kl_track_end(&w->f->vm, token);
	}
	return NULL;
}

static void *mapper(void *arg)
{
	struct worker *w = arg;

	while (!atomic_load(&w->stop))
		assert_true(kl_mmu_fault(&w->core, GPA + PG, KL_ACC_WRITE) >= 0);
	return NULL;
}

static void *look_once(void *arg)
{
	struct fixture *f = arg;

	kl_track_is(&f->vm, 0, GFN + 1);
	return NULL;
}

/* B21, T2: who looks a gfn up keeps the table from going away. */
static void lookup_against_removal(void **state)
{
	struct fixture *f = *state;
	pthread_t a, b;

	NEED_RACEPOINTS;
	watch(f, true);
	kl_racepoint_arm("track-looks", 1);
	pthread_create(&a, NULL, look_once, f);
	assert_true(kl_racepoint_wait("track-looks", TIMEOUT));
	kl_racepoint_arm("srcu-wait", 1);
	pthread_create(&b, NULL, deleter, f);
	assert_true(kl_racepoint_wait("srcu-wait", TIMEOUT));
	assert_int_equal(removals, 0);
	kl_racepoint_release("srcu-wait");
	kl_racepoint_release("track-looks");
	pthread_join(a, NULL);
	pthread_join(b, NULL);
	assert_int_equal(removals, 1);
	kl_track_unregister(&f->vm, &tracker);
}

/*
 * B21, T2, T7: counts and the list of trackers change while others read them, and slots go and
 * come with their counts. Of interest under ThreadSanitizer; and nothing is left afterwards.
 */
static void table_under_change(void **state)
{
	struct fixture *f = *state;
	struct worker w = {.f = f};
	pthread_t a, b;

	assert_int_equal(set(&f->vm, 1, 0, GPA, 2 * PG, f->ram), 0);
	assert_int_equal(kl_vcpu_core_add(&f->vm, &w.core, 1), 0);
	pthread_create(&a, NULL, looker, &w);
	pthread_create(&b, NULL, mapper, &w);
	for (unsigned i = 0; i < ROUNDS; i++) {
		tracker.internal = true;
		kl_track_register(&f->vm, &tracker);
		assert_int_equal(kl_track_add(&f->vm, 0, GFN + 1), 0);
		if (i % 3) {
			assert_int_equal(kl_track_remove(&f->vm, 0, GFN + 1), 0);
		} else {
			assert_int_equal(set(&f->vm, 1, 0, 0, 0, NULL), 0);
			assert_int_equal(set(&f->vm, 1, 0, GPA, 2 * PG, f->ram), 0);
		}
		kl_track_unregister(&f->vm, &tracker);
		assert_false(kl_track_any(&f->vm));
	}
	atomic_store(&w.stop, true);
	pthread_join(a, NULL);
	pthread_join(b, NULL);
	kl_vcpu_core_remove(&w.core);
}

/* ---- B22 ---- */

/* The gfn is added while a fault that will make it writable has looked and waits at @place. */
static void add_during_fault(struct fixture *f, const char *place)
{
	struct faulter t = {f, PG, KL_ACC_WRITE, -1};
	pthread_t thread;

	kl_racepoint_arm(place, 1);
	pthread_create(&thread, NULL, fault_thread, &t);
	assert_true(kl_racepoint_wait(place, TIMEOUT));
	assert_int_equal(kl_track_add(&f->vm, 0, 1), 0);
	kl_racepoint_release(place);
	pthread_join(thread, NULL);
	assert_int_equal(t.r, KL_FAULT_MAPPED);
	if (!mapped(f, PG, KL_ACC_WRITE))
		assert_int_equal(kl_mmu_fault(&f->vcpu, PG, KL_ACC_WRITE), KL_FAULT_MAPPED);
	assert_true(reported(f, PG));
	assert_int_equal(kl_track_remove(&f->vm, 0, 1), 0);
	assert_false(reported(f, PG));
}

/* B22, T4: what the fault saw before it had the lock counts for nothing. */
static void added_after_lookup(void **state)
{
	NEED_RACEPOINTS;
	add_during_fault(*state, "fault-populate");
}

/* B22, T4 */
static void added_after_populate(void **state)
{
	NEED_RACEPOINTS;
	add_during_fault(*state, "fault-populated");
}

/* B22, T4, M1: the same for a large leaf that would have covered it. */
static void added_before_large_leaf(void **state)
{
	struct fixture *f = *state;
	size_t size = 2ul << 20;
	uint8_t *p =
		mmap(NULL, 2 * size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint8_t *ram = (uint8_t *)(((uint64_t)p + size - 1) & ~(size - 1));
	struct faulter t = {f, GPA, KL_ACC_WRITE, -1};
	pthread_t thread;

	NEED_RACEPOINTS;
	memset(ram, 1, size);
	assert_int_equal(set(&f->vm, 1, 0, GPA, size, ram), 0);
	kl_racepoint_arm("fault-huge", 1);
	pthread_create(&thread, NULL, fault_thread, &t);
	assert_true(kl_racepoint_wait("fault-huge", TIMEOUT));
	assert_int_equal(kl_track_add(&f->vm, 0, GFN + 7), 0);
	kl_racepoint_release("fault-huge");
	pthread_join(thread, NULL);
	assert_int_equal(t.r, KL_FAULT_MAPPED);
	assert_int_equal(kl_stat_get(&f->vm.stats.pages_2m), 0);
	assert_false(mapped(f, GPA + 7 * PG, KL_ACC_READ));
	munmap(p, 2 * size);
}

/* ---- B23 ---- */

/* B23, S8, T6: a MOVE would leave the tracker at the old place: refused, and nothing changes. */
static void move_refused(void **state)
{
	struct fixture *f = *state;
	uint64_t gen;

	watch(f, false);
	gen = kl_generation(&f->vm, 0);
	assert_int_equal(set(&f->vm, 1, 0, GPA + 8 * PG, 2 * PG, f->ram), -EINVAL);
	assert_int_equal(kl_generation(&f->vm, 0), gen);
	assert_true(kl_track_is(&f->vm, 0, GFN + 1));
	assert_int_equal(removals, 0);
	kl_track_unregister(&f->vm, &tracker);
	assert_int_equal(set(&f->vm, 1, 0, GPA + 8 * PG, 2 * PG, f->ram), 0);
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(refused_late),
		T(told_last),
		T(lookup_against_removal),
		T(table_under_change),
		T(added_after_lookup),
		T(added_after_populate),
		T(added_before_large_leaf),
		T(move_refused),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
