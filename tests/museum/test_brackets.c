/* SPDX-License-Identifier: MIT */
/*
 * Exhibits B19, B28 and B32 (the half of slots): brackets against updates, against vCPUs that would
 * have to be waited for, and against the end of the VM (N3, N4, N5, S7).
 */
#include <stdio.h>

#include "mem/subscribers.h"
#include "mmu/stage2.h"
#include "unit/mmu_env.h"

/* A bracket over page 0 of the RAM, on a thread of its own. */
struct worker {
	struct fixture *f;
	pthread_t thread;
	_Atomic bool begun, finish;
};

static void *bracket_worker(void *arg)
{
	struct worker *w = arg;
	struct kl_notifier_range r = range_of(w->f->ram, PG);

	assert_int_equal(kl_notifier_begin(&r), 0);
	atomic_store(&w->begun, true);
	while (!atomic_load(&w->finish))
		sched_yield();
	kl_notifier_end(&r);
	return NULL;
}

/* B32, N4: a bracket that touched nothing when it began holds a new slot off until it ends. */
static void slot_during_bracket(void **state)
{
	struct fixture *f = *state;
	struct slot_change c = {f, 0x100000, PG, 1};
	struct worker w = {.f = f};
	pthread_t updater;

	NEED_RACEPOINTS;
	assert_int_equal(set(&f->vm, 0, 0, 0, 0, NULL), 0);
	pthread_create(&w.thread, NULL, bracket_worker, &w);
	while (!atomic_load(&w.begun))
		sched_yield();
	kl_racepoint_arm("notifier-update-waits", 1);
	pthread_create(&updater, NULL, change_slot_1, &c);
	assert_true(kl_racepoint_wait("notifier-update-waits", TIMEOUT));
	/* The slot is made and waits for the bracket: nobody can map its memory meanwhile. */
	assert_int_equal(kl_mmu_fault(&f->vcpu, 0x100000, KL_ACC_READ), KL_FAULT_MMIO);
	assert_false(mapped(f, 0x100000, KL_ACC_READ));
	kl_racepoint_release("notifier-update-waits");
	atomic_store(&w.finish, true);
	pthread_join(w.thread, NULL);
	pthread_join(updater, NULL);
	assert_int_equal(c.r, 0);
	assert_int_equal(f->vm.mmu_invalidate_in_progress, 0);
}

/* B32, N4: a bracket that has published its range, and not looked yet, is waited for as well. */
static void bracket_before_it_looks(void **state)
{
	struct fixture *f = *state;
	struct slot_change c = {f, 0x100000, PG, 1};
	struct worker w = {.f = f};
	pthread_t updater;

	NEED_RACEPOINTS;
	assert_int_equal(set(&f->vm, 0, 0, 0, 0, NULL), 0);
	kl_racepoint_arm("notifier-begin-counted", 1);
	pthread_create(&w.thread, NULL, bracket_worker, &w);
	assert_true(kl_racepoint_wait("notifier-begin-counted", TIMEOUT));
	kl_racepoint_arm("notifier-update-waits", 1);
	pthread_create(&updater, NULL, change_slot_1, &c);
	assert_true(kl_racepoint_wait("notifier-update-waits", TIMEOUT));
	kl_racepoint_release("notifier-begin-counted");
	while (!atomic_load(&w.begun))
		sched_yield();
	kl_racepoint_release("notifier-update-waits");
	atomic_store(&w.finish, true);
	pthread_join(w.thread, NULL);
	pthread_join(updater, NULL);
	assert_int_equal(c.r, 0);
	assert_int_equal(f->vm.mmu_invalidate_in_progress, 0);
}

/* B32, S7: the update waits for a nested bracket that began while it was waiting for the outer one.
 */
static void nested_during_wait(void **state)
{
	struct fixture *f = *state;
	struct slot_change c = {f, 0x100000, PG, 1};
	struct kl_notifier_range outer = range_of(f->ram, PG), inner = range_of(f->ram, PG);
	pthread_t updater;

	NEED_RACEPOINTS;
	assert_int_equal(set(&f->vm, 0, 0, 0, 0, NULL), 0);
	assert_int_equal(kl_notifier_begin(&outer), 0);
	kl_racepoint_arm("notifier-update-waits", 1);
	pthread_create(&updater, NULL, change_slot_1, &c);
	assert_true(kl_racepoint_wait("notifier-update-waits", TIMEOUT));
	kl_racepoint_release("notifier-update-waits");
	/* Does not queue behind the update: that would be a deadlock. */
	assert_int_equal(kl_notifier_begin(&inner), 0);
	kl_racepoint_arm("notifier-update-waits", 1);
	kl_notifier_end(&outer);
	assert_true(kl_racepoint_wait("notifier-update-waits", TIMEOUT));
	assert_int_equal(kl_mmu_fault(&f->vcpu, 0x100000, KL_ACC_READ), KL_FAULT_MMIO);
	kl_racepoint_release("notifier-update-waits");
	kl_notifier_end(&inner);
	pthread_join(updater, NULL);
	assert_int_equal(c.r, 0);
}

/* S7: a bracket elsewhere neither holds an update up nor is held up by it. */
static void unrelated_bracket(void **state)
{
	struct fixture *f = *state;
	struct kl_notifier_range r = range_of(f->ram + PG, PG);

	assert_int_equal(set(&f->vm, 0, 0, 0, 0, NULL), 0);
	assert_int_equal(kl_notifier_begin(&r), 0);
	/* By this very thread it is refused: it cannot know what the program is in the middle of.
	 */
	assert_int_equal(set(&f->vm, 1, 0, 0, PG, f->ram), -EDEADLK);
	struct slot_change c = {f, 0x100000, PG, 1};
	pthread_t updater;

	pthread_create(&updater, NULL, change_slot_1, &c);
	pthread_join(updater, NULL); /* while the bracket is open */
	assert_int_equal(c.r, 0);
	kl_notifier_end(&r);
}

/* B19: the VM dies inside a bracket of the same thread. */
static void destroy_inside_bracket(void **state)
{
	struct kl_vm *vm = malloc(sizeof(*vm));
	struct fixture *f = *state;
	struct kl_notifier_range r = range_of(f->ram, PG);

	assert_int_equal(kl_vm_init(vm), 0);
	assert_int_equal(set(vm, 0, 0, 0, PG, f->ram), 0);
	assert_int_equal(kl_notifier_begin(&r), 0);
	kl_vm_destroy(vm);
	free(vm);
	kl_notifier_end(&r);
	assert_int_equal(f->vm.mmu_invalidate_in_progress, 0);
}

struct dying {
	struct kl_vm *vm;
	_Atomic bool dead;
};

static void *destroy_vm(void *arg)
{
	struct dying *d = arg;

	kl_vm_destroy(d->vm);
	atomic_store(&d->dead, true);
	return NULL;
}

/* B19: destroyed by one thread while another is inside a bracket over its memory. */
static void destroy_during_bracket(void **state)
{
	struct dying d = {.vm = malloc(sizeof(struct kl_vm))};
	struct fixture *f = *state;
	struct kl_notifier_range r = range_of(f->ram, PG);
	pthread_t t;

	NEED_RACEPOINTS;
	assert_int_equal(kl_vm_init(d.vm), 0);
	assert_int_equal(set(d.vm, 0, 0, 0, PG, f->ram), 0);
	assert_int_equal(kl_notifier_begin(&r), 0);
	kl_racepoint_arm("notifier-update-waits", 1);
	pthread_create(&t, NULL, destroy_vm, &d);
	assert_true(kl_racepoint_wait("notifier-update-waits", TIMEOUT));
	assert_false(atomic_load(&d.dead));
	kl_racepoint_release("notifier-update-waits");
	kl_notifier_end(&r);
	pthread_join(t, NULL);
	free(d.vm);
}

/* B19, N3: a VM that dies with an invalidation in progress that nobody will end says so. */
static void imbalance_is_reported(void **state)
{
	struct kl_vm *vm = malloc(sizeof(*vm));
	struct fixture *f = *state;
	struct kl_notifier_range r = range_of(f->ram, PG);
	int saved = dup(STDERR_FILENO), log = memfd_create("log", MFD_CLOEXEC);
	char text[512] = "";

	assert_int_equal(kl_vm_init(vm), 0);
	assert_int_equal(set(vm, 0, 0, 0, PG, f->ram), 0);
	assert_int_equal(kl_mmu_invalidate_begin(vm, &r), 0); /* and no end */
	fflush(stderr);
	dup2(log, STDERR_FILENO);
	kl_vm_destroy(vm);
	dup2(saved, STDERR_FILENO);
	assert_true(pread(log, text, sizeof(text) - 1, 0) > 0);
	assert_non_null(strstr(text, "internal error"));
	close(saved);
	close(log);
	free(vm);
}

struct nonblocking_bracket {
	struct kl_notifier_range r;
	int ret;
};

static void *begin_nonblocking(void *arg)
{
	struct nonblocking_bracket *b = arg;

	b->ret = kl_notifier_begin(&b->r);
	return NULL;
}

/*
 * N5, N3: one VM has begun, the next says EAGAIN, and the way back does not wait for the lock
 * of the first, which somebody may hold for long.
 */
static void way_back_does_not_sleep(void **state)
{
	struct kl_vm *vm = malloc(sizeof(*vm));
	struct fixture *f = *state;
	struct nonblocking_bracket b = {range_of(f->ram, PG), 1};
	pthread_t t;

	NEED_RACEPOINTS;
	assert_int_equal(kl_vm_init(vm), 0); /* the newer one comes first */
	assert_int_equal(set(vm, 0, 0, 0, PG, f->ram), 0);
	assert_int_equal(kl_mmu_fault(&f->vcpu, 0, KL_ACC_WRITE), KL_FAULT_MAPPED);
	kl_vcpu_enter_guest(&f->vcpu);
	b.r.may_block = false;
	kl_racepoint_arm("notifier-begun-one", 1);
	pthread_create(&t, NULL, begin_nonblocking, &b);
	assert_true(kl_racepoint_wait("notifier-begun-one", TIMEOUT));
	assert_int_equal(vm->mmu_invalidate_in_progress, 1);
	kl_read_lock(&vm->mmu->lock);
	kl_racepoint_release("notifier-begun-one");
	pthread_join(t, NULL);
	kl_read_unlock(&vm->mmu->lock);
	kl_vcpu_leave_guest(&f->vcpu);
	assert_int_equal(b.ret, -EAGAIN);
	assert_int_equal(vm->mmu_invalidate_in_progress, 0);
	kl_vm_destroy(vm);
	free(vm);
}

struct destroyer {
	struct kl_vm *own;
	uint8_t *ram;
	pthread_barrier_t *inside;
};

static void *destroy_in_bracket(void *arg)
{
	struct destroyer *d = arg;
	struct kl_notifier_range r = range_of(d->ram, PG);

	assert_int_equal(kl_notifier_begin(&r), 0);
	pthread_barrier_wait(d->inside);
	kl_vm_destroy(d->own);
	kl_notifier_end(&r);
	return NULL;
}

/* B19: two threads, each in a bracket over the memory of two VMs, destroy one each: no report. */
static void two_destroyers(void **state)
{
	struct kl_vm *vm[2] = {malloc(sizeof(*vm[0])), malloc(sizeof(*vm[0]))};
	int saved = dup(STDERR_FILENO), log = memfd_create("log", MFD_CLOEXEC);
	struct fixture *f = *state;
	pthread_barrier_t inside;
	struct destroyer d[2];
	pthread_t t[2];
	char text[512] = "";

	pthread_barrier_init(&inside, NULL, 2);
	for (int i = 0; i < 2; i++) {
		assert_int_equal(kl_vm_init(vm[i]), 0);
		assert_int_equal(set(vm[i], 0, 0, 0, PG, f->ram), 0);
	}
	fflush(stderr);
	dup2(log, STDERR_FILENO);
	for (int i = 0; i < 2; i++) {
		d[i] = (struct destroyer){vm[i], f->ram, &inside};
		pthread_create(&t[i], NULL, destroy_in_bracket, &d[i]);
	}
	for (int i = 0; i < 2; i++)
		pthread_join(t[i], NULL);
	dup2(saved, STDERR_FILENO);
	assert_int_equal(pread(log, text, sizeof(text) - 1, 0), 0);
	assert_int_equal(f->vm.mmu_invalidate_in_progress, 0);
	close(saved);
	close(log);
	for (int i = 0; i < 2; i++)
		free(vm[i]);
	pthread_barrier_destroy(&inside);
}

/* B28, N5: not allowed to block, with a vCPU in guest mode and with none. */
static void nonblocking(void **state)
{
	struct fixture *f = *state;
	struct kl_notifier_range r = range_of(f->ram, PG);

	r.may_block = false;
	assert_int_equal(kl_mmu_fault(&f->vcpu, 0, KL_ACC_WRITE), KL_FAULT_MAPPED);
	kl_vcpu_enter_guest(&f->vcpu);
	assert_int_equal(kl_notifier_begin(&r), -EAGAIN);
	assert_int_equal(f->vm.mmu_invalidate_in_progress, 0);
	kl_vcpu_leave_guest(&f->vcpu);
	assert_true(mapped(f, 0, KL_ACC_WRITE)); /* nothing has changed */
	assert_int_equal(kl_notifier_begin(&r), 0);
	assert_false(mapped(f, 0, KL_ACC_READ));
	kl_notifier_end(&r);
	/* Nothing mapped there: nobody to wait for, even with the vCPU in guest mode. */
	kl_vcpu_enter_guest(&f->vcpu);
	assert_int_equal(kl_notifier_begin(&r), 0);
	kl_notifier_end(&r);
	kl_vcpu_leave_guest(&f->vcpu);
}

/* B28, B32, S7: not allowed to block, and an update over the same memory is waiting. */
static void nonblocking_behind_update(void **state)
{
	struct fixture *f = *state;
	struct slot_change c = {f, 0x100000, PG, 1};
	struct kl_notifier_range r = range_of(f->ram, PG), far = range_of(f->ram + 4 * PG, PG);
	struct worker w = {.f = f};
	pthread_t updater;

	NEED_RACEPOINTS;
	assert_int_equal(set(&f->vm, 0, 0, 0, 0, NULL), 0);
	pthread_create(&w.thread, NULL, bracket_worker, &w);
	while (!atomic_load(&w.begun))
		sched_yield();
	kl_racepoint_arm("notifier-update-waits", 1);
	pthread_create(&updater, NULL, change_slot_1, &c);
	assert_true(kl_racepoint_wait("notifier-update-waits", TIMEOUT));
	kl_racepoint_release("notifier-update-waits");
	r.may_block = far.may_block = false;
	assert_int_equal(kl_notifier_begin(&r), -EAGAIN);
	assert_int_equal(kl_notifier_begin(&far), 0); /* not in the update's way */
	kl_notifier_end(&far);
	atomic_store(&w.finish, true);
	pthread_join(w.thread, NULL);
	pthread_join(updater, NULL);
	assert_int_equal(c.r, 0);
	assert_int_equal(kl_notifier_begin(&r), 0);
	kl_notifier_end(&r);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
		T(slot_during_bracket),       T(bracket_before_it_looks),
		T(nested_during_wait),        T(unrelated_bracket),
		T(destroy_inside_bracket),    T(destroy_during_bracket),
		T(way_back_does_not_sleep),   T(two_destroyers),
		T(imbalance_is_reported),     T(nonblocking),
		T(nonblocking_behind_update),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
