/* SPDX-License-Identifier: MIT */
/*
 * Write tracking as stage 2 and the slots keep it (T1-T6).
 */
#include "mmu_env.h"

#include "mem/dirty.h"
#include "mmu/track.h"

#define MB  (1ul << 20)
#define GPA (1ul << 32)
#define LOG KVM_MEM_LOG_DIRTY_PAGES

/* A tracker that keeps what it was told last. */
struct watcher {
	struct kl_tracker t;
	struct kl_vm *vm;
	_Atomic unsigned writes, removals;
	kl_gpa_t gpa;
	uint8_t bytes[16];
	size_t len;
	kl_gfn_t gfn;
	uint64_t npages;
	bool was_tracked; /* when it was told of the removal */
};

static void wrote(void *opaque, unsigned as, kl_gpa_t gpa, const void *bytes, size_t len)
{
	struct watcher *w = opaque;

	assert_int_equal(as, 0);
	w->gpa = gpa;
	w->len = len;
	memcpy(w->bytes, bytes, len < 16 ? len : 16);
	atomic_fetch_add(&w->writes, 1);
}

static void gone(void *opaque, unsigned as, kl_gfn_t gfn, uint64_t npages)
{
	struct watcher *w = opaque;

	assert_int_equal(as, 0);
	w->gfn = gfn;
	w->npages = npages;
	w->was_tracked = kl_track_is(w->vm, 0, gfn);
	atomic_fetch_add(&w->removals, 1);
}

static void watch(struct fixture *f, struct watcher *w, bool internal)
{
	*w = (struct watcher){
		.t = {.ops = {wrote, gone}, .opaque = w, .internal = internal},
		.vm = &f->vm,
	};
	kl_track_register(&f->vm, &w->t);
}

enum how { ABSENT, PLAIN, TRACKED, READ_ONLY };

/* What a vCPU that wants to write finds. */
static enum how found(struct fixture *f, uint64_t gpa)
{
	bool writable = false, mmio;
	uint8_t *p, *r;

	kl_vcpu_enter_guest(&f->vcpu);
	kl_vcpu_take_requests(&f->vcpu, KL_REQ_TLB_FLUSH);
	p = kl_mmu_lookup(&f->vcpu, gpa, KL_ACC_WRITE, &writable, &mmio);
	r = kl_mmu_lookup(&f->vcpu, gpa, KL_ACC_READ, &writable, &mmio);
	kl_vcpu_leave_guest(&f->vcpu);
	if (!p)
		return r ? READ_ONLY : ABSENT;
	return writable ? PLAIN : TRACKED;
}

static void map_page(struct fixture *f, uint64_t gpa)
{
	assert_int_equal(kl_mmu_fault(&f->vcpu, gpa, KL_ACC_WRITE), KL_FAULT_MAPPED);
}

/* T2: counts, and what is refused. */
static void counts(void **state)
{
	struct fixture *f = *state;

	assert_int_equal(kl_track_remove(&f->vm, 0, 1), -ENOENT);
	assert_int_equal(kl_track_add(&f->vm, 0, NPAGES), -ENOENT);
	assert_int_equal(kl_track_add(&f->vm, 1, 1), -ENOENT);
	assert_int_equal(kl_track_add(&f->vm, 0, 1), 0);
	assert_int_equal(kl_track_add(&f->vm, 0, 1), 0);
	assert_true(kl_track_is(&f->vm, 0, 1));
	assert_false(kl_track_is(&f->vm, 0, 2));
	assert_int_equal(kl_track_remove(&f->vm, 0, 1), 0);
	assert_true(kl_track_is(&f->vm, 0, 1));
	assert_int_equal(kl_track_remove(&f->vm, 0, 1), 0);
	assert_false(kl_track_is(&f->vm, 0, 1));
	assert_int_equal(kl_track_remove(&f->vm, 0, 1), -ENOENT);
	assert_false(kl_track_any(&f->vm));
	for (unsigned i = 0; i < UINT16_MAX; i++)
		assert_int_equal(kl_track_add(&f->vm, 0, 2), 0);
	assert_int_equal(kl_track_add(&f->vm, 0, 2), -EOVERFLOW);
	assert_true(kl_track_is(&f->vm, 0, 2));
}

/* T3: what is mapped is protected and flushed; what is not comes protected. */
static void protects(void **state)
{
	struct fixture *f = *state;

	map_page(f, PG);
	map_page(f, 2 * PG);
	assert_int_equal(found(f, PG), PLAIN);
	assert_int_equal(kl_track_add(&f->vm, 0, 1), 0);
	assert_true(kl_vcpu_requests(&f->vcpu) & KL_REQ_TLB_FLUSH);
	assert_int_equal(found(f, PG), TRACKED);
	assert_int_equal(found(f, 2 * PG), PLAIN);
	assert_int_equal(kl_track_add(&f->vm, 0, 3), 0);
	assert_int_equal(found(f, 3 * PG), ABSENT);
	map_page(f, 3 * PG);
	assert_int_equal(found(f, 3 * PG), TRACKED);
	/* A read maps it, and the write that follows does not lose the mark. */
	assert_int_equal(kl_track_add(&f->vm, 0, 4), 0);
	assert_int_equal(kl_mmu_fault(&f->vcpu, 4 * PG, KL_ACC_READ), KL_FAULT_MAPPED);
	map_page(f, 4 * PG);
	assert_int_equal(found(f, 4 * PG), TRACKED);
	assert_int_equal(kl_track_remove(&f->vm, 0, 1), 0);
	assert_int_equal(found(f, PG), PLAIN);
	assert_int_equal(found(f, 4 * PG), TRACKED);
}

/* T3, M1: no large leaf over a tracked page; beside it, and afterwards, as ever. */
static void large_leaves(void **state)
{
	struct fixture *f = *state;
	struct kl_vm_stats *s = &f->vm.stats;
	uint8_t *p = map_written(4 * MB);
	kl_gfn_t gfn = (GPA >> KL_PAGE_SHIFT) + 5;

	assert_int_equal(set(&f->vm, 1, 0, GPA, 4 * MB, p), 0);
	map_page(f, GPA);
	assert_int_equal(kl_stat_get(&s->pages_2m), 1);
	assert_int_equal(kl_track_add(&f->vm, 0, gfn), 0);
	assert_int_equal(kl_stat_get(&s->pages_2m), 0);
	map_page(f, GPA + 4 * PG);
	map_page(f, GPA + 5 * PG);
	map_page(f, GPA + 2 * MB);
	assert_int_equal(kl_stat_get(&s->pages_4k), 2);
	assert_int_equal(kl_stat_get(&s->pages_2m), 1);
	assert_int_equal(found(f, GPA + 4 * PG), PLAIN);
	assert_int_equal(found(f, GPA + 5 * PG), TRACKED);
	assert_int_equal(kl_track_remove(&f->vm, 0, gfn), 0);
	assert_int_equal(set(&f->vm, 1, LOG, GPA, 4 * MB, p), 0);
	assert_int_equal(set(&f->vm, 1, 0, GPA, 4 * MB, p), 0); /* small leaves go */
	map_page(f, GPA + 5 * PG);
	assert_int_equal(kl_stat_get(&s->pages_2m), 1);
	munmap(p, 4 * MB);
}

/* T3, D1, D3: a page that is both tracked and logged: who writes it is in the log, and reports. */
static void tracked_and_logged(void **state)
{
	struct fixture *f = *state;
	uint64_t word;

	map_page(f, PG);
	assert_int_equal(kl_track_add(&f->vm, 0, 1), 0);
	assert_int_equal(set(&f->vm, 0, LOG, 0, NPAGES * PG, f->ram), 0);
	assert_true(kl_track_is(&f->vm, 0, 1));
	map_page(f, PG);
	for (int i = 0; i < 2; i++) {
		assert_int_equal(found(f, PG), TRACKED);
		assert_int_equal(kl_dirty_log_get(&f->vm, 0, 0, &word, false), 0);
		assert_int_equal(word, 2);
	}
	assert_int_equal(kl_track_remove(&f->vm, 0, 1), 0);
	assert_int_equal(found(f, PG), PLAIN);
	assert_int_equal(kl_dirty_log_get(&f->vm, 0, 0, &word, false), 0);
	assert_int_equal(word, 2);
}

/* T5: told once of a slot that goes, when nothing of it is tracked any more; not of other changes.
 */
static void removal(void **state)
{
	struct fixture *f = *state;
	struct watcher a, b;

	watch(f, &a, false);
	watch(f, &b, true);
	assert_int_equal(set(&f->vm, 1, 0, GPA, 2 * PG, f->ram), 0);
	assert_int_equal(kl_track_add(&f->vm, 0, GPA >> KL_PAGE_SHIFT), 0);
	assert_int_equal(kl_track_add(&f->vm, 0, 3), 0);
	assert_int_equal(set(&f->vm, 1, LOG, GPA, 2 * PG, f->ram), 0);
	assert_int_equal(set(&f->vm, 1, 0, GPA, 2 * PG, f->ram), 0);
	assert_true(kl_track_is(&f->vm, 0, GPA >> KL_PAGE_SHIFT));
	assert_int_equal(a.removals + b.removals, 0);
	assert_int_equal(set(&f->vm, 1, 0, 0, 0, NULL), 0);
	assert_int_equal(a.removals, 1);
	assert_int_equal(b.removals, 1);
	assert_int_equal(a.gfn, GPA >> KL_PAGE_SHIFT);
	assert_int_equal(a.npages, 2);
	assert_false(a.was_tracked);
	/* A new slot in the same place is a new one. */
	assert_int_equal(set(&f->vm, 1, 0, GPA, 2 * PG, f->ram), 0);
	assert_false(kl_track_is(&f->vm, 0, GPA >> KL_PAGE_SHIFT));
	assert_int_equal(kl_track_remove(&f->vm, 0, GPA >> KL_PAGE_SHIFT), -ENOENT);
	assert_true(kl_track_is(&f->vm, 0, 3));
	assert_int_equal(atomic_load(&f->vm.tracked_pages), 1);
	kl_track_unregister(&f->vm, &a.t);
	assert_int_equal(set(&f->vm, 1, 0, 0, 0, NULL), 0);
	assert_int_equal(a.removals, 1);
	assert_int_equal(b.removals, 2);
	kl_track_unregister(&f->vm, &b.t);
}

/* T6: the engine's own trackers cope with a MOVE, by a page, too: they are told of the old place.
 */
static void move_internal(void **state)
{
	struct fixture *f = *state;
	struct watcher w;

	watch(f, &w, true);
	assert_int_equal(set(&f->vm, 1, 0, GPA, 2 * PG, f->ram), 0);
	assert_int_equal(kl_track_add(&f->vm, 0, (GPA >> KL_PAGE_SHIFT) + 1), 0);
	assert_int_equal(set(&f->vm, 1, 0, GPA + PG, 2 * PG, f->ram), 0);
	assert_int_equal(w.removals, 1);
	assert_int_equal(w.gfn, GPA >> KL_PAGE_SHIFT);
	assert_false(kl_track_is(&f->vm, 0, (GPA >> KL_PAGE_SHIFT) + 1));
	map_page(f, GPA + PG);
	assert_int_equal(found(f, GPA + PG), PLAIN);
	kl_track_unregister(&f->vm, &w.t);
}

/* T1: reports come to all trackers that there are. */
static void reports(void **state)
{
	struct fixture *f = *state;
	struct watcher a, b;
	int token;

	watch(f, &a, false);
	watch(f, &b, false);
	token = kl_track_begin(&f->vm);
	kl_track_write(&f->vm, 0, 0x1234, "abcd", 4);
	kl_track_end(&f->vm, token);
	assert_int_equal(a.writes, 1);
	assert_int_equal(b.writes, 1);
	assert_int_equal(a.gpa, 0x1234);
	assert_memory_equal(b.bytes, "abcd", 4);
	kl_track_unregister(&f->vm, &a.t);
	token = kl_track_begin(&f->vm);
	kl_track_write(&f->vm, 0, 0x1234, "efgh", 4);
	kl_track_end(&f->vm, token);
	assert_int_equal(a.writes, 1);
	assert_int_equal(b.writes, 2);
	kl_track_unregister(&f->vm, &b.t);
}

static void *report_thread(void *arg)
{
	struct fixture *f = arg;
	int token = kl_track_begin(&f->vm);

	kl_track_write(&f->vm, 0, PG, "x", 1);
	kl_track_end(&f->vm, token);
	return NULL;
}

struct change {
	struct fixture *f;
	struct watcher *w;
	_Atomic bool done;
};

static void *unregister_thread(void *arg)
{
	struct change *c = arg;

	kl_track_unregister(&c->f->vm, &c->w->t);
	atomic_store(&c->done, true);
	return NULL;
}

static void *delete_thread(void *arg)
{
	struct change *c = arg;

	assert_int_equal(set(&c->f->vm, 0, 0, 0, 0, NULL), 0);
	atomic_store(&c->done, true);
	return NULL;
}

/* T1, T5: @thread has to wait for a report that is about to call the tracker. */
static void waits_for_report(struct fixture *f, void *(*thread)(void *), unsigned removals)
{
	struct watcher w;
	struct change c = {.f = f, .w = &w};
	pthread_t reporter, waiter;

	watch(f, &w, false);
	kl_racepoint_arm("track-callback", 1);
	pthread_create(&reporter, NULL, report_thread, f);
	assert_true(kl_racepoint_wait("track-callback", TIMEOUT));
	kl_racepoint_arm("srcu-wait", 1);
	pthread_create(&waiter, NULL, thread, &c);
	assert_true(kl_racepoint_wait("srcu-wait", TIMEOUT));
	assert_false(atomic_load(&c.done));
	assert_int_equal(w.writes, 0);
	assert_int_equal(w.removals, 0);
	kl_racepoint_release("srcu-wait");
	kl_racepoint_release("track-callback");
	pthread_join(reporter, NULL);
	pthread_join(waiter, NULL);
	assert_int_equal(w.writes, 1);
	assert_int_equal(w.removals, removals);
	if (removals)
		kl_track_unregister(&f->vm, &w.t);
}

/* T1: a tracker ends when none of its callbacks runs. */
static void unregister_waits(void **state)
{
	NEED_RACEPOINTS;
	waits_for_report(*state, unregister_thread, 0);
}

/* T5: the removal of a slot is told after the writes to it. */
static void removal_waits(void **state)
{
	NEED_RACEPOINTS;
	waits_for_report(*state, delete_thread, 1);
}

/* In a callback, what would wait for it is refused; the rest works. */
static void wrote_and_acts(void *opaque, unsigned as, kl_gpa_t gpa, const void *bytes, size_t len)
{
	struct watcher *w = opaque;

	assert_int_equal(set(w->vm, 1, 0, GPA, PG, (void *)PG), -EDEADLK);
	assert_int_equal(kl_track_add(w->vm, 0, 5), 0);
	assert_int_equal(kl_track_remove(w->vm, 0, gpa >> KL_PAGE_SHIFT), 0);
	atomic_fetch_add(&w->writes, 1);
}

/* T1 */
static void acts_in_callback(void **state)
{
	struct fixture *f = *state;
	struct watcher w = {
		.t = {.ops = {wrote_and_acts, NULL}, .opaque = &w},
		.vm = &f->vm,
	};

	kl_track_register(&f->vm, &w.t);
	assert_int_equal(kl_track_add(&f->vm, 0, 1), 0);
	report_thread(f);
	assert_int_equal(w.writes, 1);
	assert_true(kl_track_is(&f->vm, 0, 5));
	assert_false(kl_track_is(&f->vm, 0, 1));
	assert_int_equal(set(&f->vm, 0, 0, 0, 0, NULL), 0); /* without a removal callback */
	kl_track_unregister(&f->vm, &w.t);
}

struct adder {
	struct fixture *f;
	kl_gfn_t gfn;
	int r;
};

static void *add_thread(void *arg)
{
	struct adder *a = arg;

	a->r = kl_track_add(&a->f->vm, 0, a->gfn);
	return NULL;
}

/* T2, T5: nothing is added to a slot that is on its way out. */
static void add_during_removal(void **state)
{
	struct fixture *f = *state;
	struct watcher w;
	struct change c = {.f = f, .w = &w};
	struct adder a = {.f = f, .gfn = 2};
	pthread_t deleter;

	NEED_RACEPOINTS;
	watch(f, &w, false);
	assert_int_equal(kl_track_add(&f->vm, 0, 1), 0);
	kl_racepoint_arm("memslot-invalid", 1);
	pthread_create(&deleter, NULL, delete_thread, &c);
	assert_true(kl_racepoint_wait("memslot-invalid", TIMEOUT));
	add_thread(&a);
	assert_int_equal(a.r, -ENOENT);
	assert_int_equal(w.removals, 0);
	kl_racepoint_release("memslot-invalid");
	pthread_join(deleter, NULL);
	assert_int_equal(w.removals, 1);
	assert_false(kl_track_any(&f->vm));
	kl_track_unregister(&f->vm, &w.t);
}

/* T2, S4: a removal waits for an add that has found the slot. */
static void removal_during_add(void **state)
{
	struct fixture *f = *state;
	struct watcher w;
	struct change c = {.f = f, .w = &w};
	struct adder a = {.f = f, .gfn = 2};
	pthread_t deleter, adder;

	NEED_RACEPOINTS;
	watch(f, &w, false);
	kl_racepoint_arm("track-adds", 1);
	pthread_create(&adder, NULL, add_thread, &a);
	assert_true(kl_racepoint_wait("track-adds", TIMEOUT));
	kl_racepoint_arm("srcu-wait", 1);
	pthread_create(&deleter, NULL, delete_thread, &c);
	assert_true(kl_racepoint_wait("srcu-wait", TIMEOUT));
	kl_racepoint_release("srcu-wait");
	kl_racepoint_release("track-adds");
	pthread_join(adder, NULL);
	pthread_join(deleter, NULL);
	assert_int_equal(a.r, 0);
	assert_int_equal(w.removals, 1);
	assert_false(w.was_tracked);
	assert_false(kl_track_any(&f->vm));
	kl_track_unregister(&f->vm, &w.t);
}

/* T3: a vCPU that could write when the page was added has left guest mode when add returns. */
static void add_waits_for_vcpu(void **state)
{
	struct fixture *f = *state;
	struct adder a = {.f = f, .gfn = 1};
	bool writable = false, mmio;
	pthread_t adder;

	NEED_RACEPOINTS;
	map_page(f, PG);
	kl_vcpu_enter_guest(&f->vcpu);
	assert_non_null(kl_mmu_lookup(&f->vcpu, PG, KL_ACC_WRITE, &writable, &mmio));
	assert_true(writable);
	kl_racepoint_arm("vcpu-awaited", 1);
	pthread_create(&adder, NULL, add_thread, &a);
	assert_true(kl_racepoint_wait("vcpu-awaited", TIMEOUT));
	kl_racepoint_release("vcpu-awaited");
	kl_vcpu_leave_guest(&f->vcpu);
	pthread_join(adder, NULL);
	assert_int_equal(a.r, 0);
	assert_int_equal(found(f, PG), TRACKED);
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(counts),
		T(protects),
		T(large_leaves),
		T(tracked_and_logged),
		T(removal),
		T(move_internal),
		T(reports),
		T(unregister_waits),
		T(removal_waits),
		T(acts_in_callback),
		T(add_during_removal),
		T(removal_during_add),
		T(add_waits_for_vcpu),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
