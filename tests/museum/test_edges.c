/* SPDX-License-Identifier: MIT */
/*
 * The edges of docs/memory-model.md that no exhibit stands for: what a flush, a zap and a change of
 * slots promise when they return, and in which order they do what (S3, S4, M5, M6).
 */
#include "unit/mmu_env.h"

/* Far away from the slot of the fixture, with page tables of its own. */
#define FAR 0x4000000000ul

struct worker {
	struct fixture *f;
	pthread_t thread;
	_Atomic bool done;
};

static void *delete_far_slot(void *arg)
{
	struct worker *w = arg;

	assert_int_equal(set(&w->f->vm, 1, 0, 0, 0, NULL), 0);
	atomic_store(&w->done, true);
	return NULL;
}

static void *invalidate(void *arg)
{
	struct worker *w = arg;
	struct kl_notifier_range r = range_of(w->f->ram, NPAGES * PG);

	assert_int_equal(kl_notifier_begin(&r), 0);
	atomic_store(&w->done, true);
	kl_notifier_end(&r);
	return NULL;
}

static void map_far_slot(struct fixture *f)
{
	assert_int_equal(set(&f->vm, 1, 0, FAR, NPAGES * PG, f->ram), 0);
	assert_int_equal(kl_mmu_fault(&f->vcpu, FAR, KL_ACC_WRITE), KL_FAULT_MAPPED);
	assert_true(mapped(f, FAR, KL_ACC_WRITE));
}

/* Until the vCPU has been asked to flush; fails if the worker is done without having asked. */
static void wait_for_flush_request(struct fixture *f, struct worker *w)
{
	while (!(kl_vcpu_requests(&f->vcpu) & KL_REQ_TLB_FLUSH)) {
		assert_false(atomic_load(&w->done));
		sched_yield();
	}
}

static void start(struct fixture *f, struct worker *w, void *(*fn)(void *))
{
	*w = (struct worker){.f = f};
	/* Nothing is owed from before. */
	kl_vcpu_enter_guest(&f->vcpu);
	kl_vcpu_take_requests(&f->vcpu, KL_REQ_TLB_FLUSH);
	pthread_create(&w->thread, NULL, fn, w);
}

static void finish(struct fixture *f, struct worker *w)
{
	kl_vcpu_leave_guest(&f->vcpu);
	pthread_join(w->thread, NULL);
}

/* M5, S4: a deleted slot's zap has flushed: it waits for a vCPU in guest mode. */
static void deletion_flushes(void **state)
{
	struct fixture *f = *state;

	for (int all = 0; all < 2; all++) {
		struct worker w;

		atomic_store(&f->vm.slot_zap_all_quirk, all);
		map_far_slot(f);
		start(f, &w, delete_far_slot);
		wait_for_flush_request(f, &w);
		assert_false(atomic_load(&w.done));
		finish(f, &w);
	}
}

/* M6: a page table is not given back while a vCPU may be walking it. */
static void flush_before_free(void **state)
{
	struct fixture *f = *state;
	uint64_t pages;
	struct worker w;

	map_far_slot(f);
	pages = kl_pages_in_use();
	start(f, &w, invalidate);
	wait_for_flush_request(f, &w);
	assert_int_equal(kl_pages_in_use(), pages);
	finish(f, &w);
	assert_true(kl_pages_in_use() < pages);
}

/* M6: the entry goes before the request: who sees the request finds no entry. */
static void zap_before_request(void **state)
{
	struct fixture *f = *state;
	bool writable, mmio;
	struct worker w;

	map_far_slot(f);
	start(f, &w, invalidate);
	wait_for_flush_request(f, &w);
	assert_null(kl_mmu_lookup(&f->vcpu, FAR, KL_ACC_READ, &writable, &mmio));
	finish(f, &w);
}

/* M6: a vCPU that is out of the guest finds the request when it comes back. */
static void request_for_who_is_outside(void **state)
{
	struct fixture *f = *state;
	struct kl_notifier_range r = range_of(f->ram, PG);

	assert_int_equal(kl_mmu_fault(&f->vcpu, 0, KL_ACC_WRITE), KL_FAULT_MAPPED);
	kl_vcpu_take_requests(&f->vcpu, KL_REQ_TLB_FLUSH);
	assert_int_equal(kl_notifier_begin(&r), 0);
	kl_notifier_end(&r);
	assert_int_equal(kl_vcpu_requests(&f->vcpu), KL_REQ_TLB_FLUSH);
}

/* N2, M6: each of a VM's vCPUs is waited for, whichever is in guest mode. */
static void every_vcpu(void **state)
{
	struct kl_vcpu_core second = {0}, *inside[2];
	struct fixture *f = *state;
	struct worker w;

	NEED_RACEPOINTS;
	assert_int_equal(kl_vcpu_core_add(&f->vm, &second, 1), 0);
	inside[0] = &f->vcpu;
	inside[1] = &second;
	for (int i = 0; i < 2; i++) {
		assert_int_equal(kl_mmu_fault(&f->vcpu, 0, KL_ACC_WRITE), KL_FAULT_MAPPED);
		w = (struct worker){.f = f};
		kl_vcpu_enter_guest(inside[i]);
		kl_vcpu_take_requests(inside[i], KL_REQ_TLB_FLUSH);
		kl_racepoint_arm("vcpu-awaited", 1);
		pthread_create(&w.thread, NULL, invalidate, &w);
		assert_true(kl_racepoint_wait("vcpu-awaited", TIMEOUT));
		assert_false(atomic_load(&w.done));
		kl_racepoint_release("vcpu-awaited");
		kl_vcpu_leave_guest(inside[i]);
		pthread_join(w.thread, NULL);
	}
	kl_vcpu_core_remove(&second);
}

static void *delete_slot_0(void *arg)
{
	struct worker *w = arg;

	assert_int_equal(set(&w->f->vm, 0, 0, 0, 0, NULL), 0);
	atomic_store(&w->done, true);
	return NULL;
}

/* S3, S4: a change waits for the readers of the old set. */
static void update_waits_for_readers(void **state)
{
	struct fixture *f = *state;
	const struct kl_memslot *slot;
	struct worker w = {.f = f};
	int token;

	NEED_RACEPOINTS;
	token = kl_srcu_read_lock(&f->vm.srcu);
	slot = kl_memslot_find(kl_memslots(&f->vm, 0), 0);
	kl_racepoint_arm("srcu-wait", 1);
	pthread_create(&w.thread, NULL, delete_slot_0, &w);
	assert_true(kl_racepoint_wait("srcu-wait", TIMEOUT));
	assert_int_equal(kl_generation(&f->vm, 0) & 1, 1);
	kl_racepoint_release("srcu-wait");
	assert_int_equal(slot->hva, (uint64_t)f->ram);
	assert_false(atomic_load(&w.done));
	kl_srcu_read_unlock(&f->vm.srcu, token);
	pthread_join(w.thread, NULL);
}

/* M2: two brackets over different pages: the first to end must not open the other's page. */
static void overlapping_brackets(void **state)
{
	struct fixture *f = *state;
	struct kl_notifier_range a = range_of(f->ram, PG), b = range_of(f->ram + 8 * PG, PG);

	assert_int_equal(kl_notifier_begin(&a), 0);
	assert_int_equal(kl_notifier_begin(&b), 0);
	kl_notifier_end(&b);
	assert_int_equal(kl_mmu_fault(&f->vcpu, 0, KL_ACC_READ), KL_FAULT_MAPPED);
	assert_false(mapped(f, 0, KL_ACC_READ));
	kl_notifier_end(&a);
	assert_int_equal(kl_mmu_fault(&f->vcpu, 0, KL_ACC_READ), KL_FAULT_MAPPED);
	assert_true(mapped(f, 0, KL_ACC_READ));
}

/* ---- what a bracket may not do (N4): it may run inside the program's free() --------------- */

#if !KL_TSAN && !defined(__SANITIZE_ADDRESS__)
static KL_TLS volatile bool watched;
static _Atomic int allocations;

void *__libc_malloc(size_t n);
void *__libc_calloc(size_t n, size_t size);
__attribute__((visibility("default"))) void *malloc(size_t n);
__attribute__((visibility("default"))) void *calloc(size_t n, size_t size);

void *malloc(size_t n)
{
	if (watched)
		allocations++;
	return __libc_malloc(n);
}

void *calloc(size_t n, size_t size)
{
	if (watched)
		allocations++;
	return __libc_calloc(n, size);
}

/* N4: no bracket allocates, whether it touches a slot or not. */
static void bracket_does_not_allocate(void **state)
{
	struct fixture *f = *state;
	static uint8_t elsewhere[2 * PG];
	struct kl_notifier_range near = range_of(f->ram, NPAGES * PG);
	struct kl_notifier_range far = range_of(elsewhere, PG);
	void *volatile p;

	map_far_slot(f);
	watched = true;
	p = malloc(1);
	watched = false;
	assert_int_equal(allocations, 1); /* it would be seen */
	free(p);
	watched = true;
	assert_int_equal(kl_notifier_begin(&near), 0);
	assert_int_equal(kl_notifier_begin(&far), 0);
	kl_notifier_end(&far);
	kl_notifier_end(&near);
	watched = false;
	assert_int_equal(allocations, 1);
}
#else
static void bracket_does_not_allocate(void **state)
{
	(void)state;
	skip();
}
#endif

/* N4: an event that touches no slot takes no lock that a vCPU takes. */
static void unrelated_event_takes_no_lock(void **state)
{
	static uint8_t elsewhere[2 * PG];
	struct fixture *f = *state;
	struct kl_notifier_range far = range_of(elsewhere, PG);
	struct worker w = {.f = f};

	NEED_RACEPOINTS;
	/* Since there were slots on both sides of it, the event is not out of the question. */
	assert_int_equal(set(&f->vm, 1, 0, FAR, PG, (void *)(16 * PG)), 0);
	assert_int_equal(set(&f->vm, 1, 0, 0, 0, NULL), 0);
	assert_int_equal(kl_mmu_fault(&f->vcpu, 0, KL_ACC_WRITE), KL_FAULT_MAPPED);
	kl_racepoint_arm("mmu-zapped", 1);
	pthread_create(&w.thread, NULL, invalidate, &w);
	assert_true(kl_racepoint_wait("mmu-zapped", TIMEOUT)); /* with mmu_lock */
	assert_int_equal(kl_notifier_begin(&far), 0);
	kl_notifier_end(&far);
	assert_false(atomic_load(&w.done));
	kl_racepoint_release("mmu-zapped");
	pthread_join(w.thread, NULL);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
		T(deletion_flushes),
		T(flush_before_free),
		T(zap_before_request),
		T(request_for_who_is_outside),
		T(every_vcpu),
		T(update_waits_for_readers),
		T(overlapping_brackets),
		T(bracket_does_not_allocate),
		T(unrelated_event_takes_no_lock),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
