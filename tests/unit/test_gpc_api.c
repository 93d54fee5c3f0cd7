/* SPDX-License-Identifier: MIT */
/*
 * The library's public functions on caches (include/kvmlet/gpc.h): what a program gets and what it
 * is refused. What goes on inside is in museum/test_gpc.c.
 */
#include <sys/wait.h>

#include "api_env.h"
#include "mem/gpc.h"

#define GPC(name, gpa)                                           \
	struct kvmlet_gpc *name;                                 \
	assert_int_equal(kvmlet_gpc_init(f->vm, 0, &(name)), 0); \
	assert_int_equal(kvmlet_gpc_activate((name), (gpa), 8), 0)

/* G1: the whole of it. */
static void life(void **state)
{
	struct fixture *f = *state;
	struct kvmlet_gpc *gpc;
	void *p;

	assert_int_equal(kvmlet_gpc_init(f->vm, 2, &gpc), -EINVAL);
	assert_int_equal(kvmlet_gpc_init(f->vm, 0, &gpc), 0);
	assert_int_equal(kvmlet_gpc_check(gpc, 8), 0);
	assert_int_equal(kvmlet_gpc_lock(gpc, 8, &p), -EINVAL);
	assert_int_equal(kvmlet_gpc_refresh(gpc, 8), -EINVAL);
	assert_int_equal(kvmlet_gpc_activate(gpc, PG + 24, 8), 0);
	assert_int_equal(kvmlet_gpc_check(gpc, 8), 1);
	assert_int_equal(kvmlet_gpc_lock(gpc, 8, &p), 0);
	assert_ptr_equal(p, f->ram + PG + 24);
	*(volatile uint64_t *)p = 42;
	kvmlet_gpc_unlock(gpc, 1);
	unmap(f->ram + PG, PG);
	assert_int_equal(kvmlet_gpc_check(gpc, 8), 0);
	assert_int_equal(kvmlet_gpc_trylock(gpc, 8, &p), -EAGAIN);
	assert_int_equal(kvmlet_gpc_lock(gpc, 8, &p), -EFAULT);
	mprotect(f->ram + PG, PG, PROT_READ | PROT_WRITE);
	assert_int_equal(kvmlet_gpc_refresh(gpc, 8), 0);
	assert_int_equal(kvmlet_gpc_trylock(gpc, 8, &p), 0);
	kvmlet_gpc_unlock(gpc, 0);
	assert_int_equal(kvmlet_gpc_activate(gpc, KVMLET_INVALID_GPA, 1), -EINVAL);
	assert_int_equal(kvmlet_gpc_activate_hva(gpc, kl_hva(f->ram), 8), 0);
	assert_int_equal(kvmlet_gpc_lock(gpc, 8, &p), 0);
	assert_ptr_equal(p, f->ram);
	kvmlet_gpc_unlock(gpc, 0);
	kvmlet_gpc_unlock(gpc, 0); /* complained about, and ignored */
	assert_int_equal(kvmlet_gpc_deactivate(gpc), 0);
	kvmlet_gpc_destroy(gpc);
	kvmlet_gpc_destroy(NULL);
}

/* G1a: what could wait for the holder is refused to him. */
static void holder(void **state)
{
	struct fixture *f = *state;
	struct kvmlet_notifier_range r = range_of(f->ram + PG, PG);
	struct kvmlet_gpc *list[KVMLET_GPC_MAX_HELD + 1];
	void *p, *ptrs[KVMLET_GPC_MAX_HELD + 1];
	size_t lens[KVMLET_GPC_MAX_HELD + 1];
	struct iovec iov[4];
	unsigned n;
	uint64_t v;

	GPC(a, PG);
	GPC(b, 2 * PG);
	assert_int_equal(kvmlet_gpc_lock(a, 8, &p), 0);
	assert_int_equal(kvmlet_notifier_begin(&r), -EDEADLK);
	assert_int_equal(kvmlet_memslot_set(f->vm, 1, 0, 0x100000, PG, kl_hva(f->ram)), -EDEADLK);
	assert_int_equal(kvmlet_vm_read(f->vm, 0, 0, &v, 8, NULL), -EDEADLK);
	assert_int_equal(kvmlet_vm_load(f->vm, 0, 0, 8, &v), -EDEADLK);
	assert_int_equal(kvmlet_window_lock(f->vm, 0, 0, 8, KVMLET_READ, iov, 4, &n), -EDEADLK);
	assert_int_equal(kvmlet_notifier_uffd_source(1), -EDEADLK);
	assert_int_equal(kvmlet_gpc_activate(a, PG, 8), -EDEADLK);
	assert_int_equal(kvmlet_gpc_activate_hva(b, kl_hva(f->ram), 8), -EDEADLK);
	assert_int_equal(kvmlet_gpc_deactivate(b), -EDEADLK);
	assert_int_equal(kvmlet_gpc_refresh(b, 8), 0 - EDEADLK);
	kvmlet_gpc_destroy(b);    /* ignored */
	kvmlet_vm_destroy(f->vm); /* ignored */
	assert_int_equal(kvmlet_gpc_lock(b, 8, &p), 0);
	kvmlet_gpc_unlock(a, 0);
	kvmlet_gpc_unlock(b, 0);
	/* A window is no better. */
	assert_int_equal(kvmlet_window_lock(f->vm, 0, 0, 8, KVMLET_READ, iov, 4, &n), 0);
	assert_int_equal(kvmlet_gpc_activate(a, PG, 8), -EDEADLK);
	assert_int_equal(kvmlet_gpc_refresh(a, 8), -EDEADLK);
	assert_int_equal(kvmlet_gpc_deactivate(a), -EDEADLK);
	assert_int_equal(kvmlet_gpc_trylock(a, 8, &p), -EDEADLK);
	assert_int_equal(kvmlet_gpc_lock(a, PG + 1, &p), -EDEADLK);
	lens[0] = 8;
	assert_int_equal(kvmlet_gpc_lock_many(&a, lens, ptrs, 1), -EDEADLK);
	kvmlet_window_unlock(f->vm);
	/* Inside a bracket of its own. */
	assert_int_equal(kvmlet_notifier_begin(&r), 0);
	assert_int_equal(kvmlet_gpc_lock(b, 8, &p), -EDEADLK);
	assert_int_equal(kvmlet_gpc_activate_area(&a, 1, PG, 8), -EDEADLK);
	kvmlet_notifier_end(&r);
	/* As many as there may be, and one more. */
	for (unsigned i = 0; i <= KVMLET_GPC_MAX_HELD; i++) {
		assert_int_equal(kvmlet_gpc_init(f->vm, 0, &list[i]), 0);
		assert_int_equal(kvmlet_gpc_activate(list[i], PG * i, 8), 0);
		lens[i] = 8;
	}
	assert_int_equal(kvmlet_gpc_lock_many(list, lens, ptrs, KVMLET_GPC_MAX_HELD), 0);
	assert_int_equal(kvmlet_gpc_lock(list[KVMLET_GPC_MAX_HELD], 8, &p), -E2BIG);
	kvmlet_gpc_unlock_many(list, KVMLET_GPC_MAX_HELD, 1);
	assert_int_equal(kvmlet_gpc_lock_many(list, lens, ptrs, KVMLET_GPC_MAX_HELD + 1), -EINVAL);
	assert_int_equal(kvmlet_gpc_lock_many(list, lens, ptrs, 0), -EINVAL);
	for (unsigned i = 0; i <= KVMLET_GPC_MAX_HELD; i++)
		kvmlet_gpc_destroy(list[i]);
	kvmlet_gpc_destroy(a);
	kvmlet_gpc_destroy(b);
}

/* G1a: lock_many has all of them or none, whichever is not valid. */
static void many(void **state)
{
	struct fixture *f = *state;
	struct kvmlet_gpc *list[3];
	size_t lens[3] = {8, 8, 8};
	void *ptrs[3];

	for (unsigned i = 0; i < 3; i++) {
		assert_int_equal(kvmlet_gpc_init(f->vm, 0, &list[i]), 0);
		assert_int_equal(kvmlet_gpc_activate(list[i], i * PG, 8), 0);
	}
	for (unsigned bad = 0; bad < 3; bad++) {
		unmap(f->ram + bad * PG, PG);
		assert_int_equal(kvmlet_gpc_lock_many(list, lens, ptrs, 3), -EFAULT);
		for (unsigned i = 0; i < 3; i++)
			assert_int_equal(kvmlet_gpc_check(list[i], 8), i != bad);
		mprotect(f->ram + bad * PG, PG, PROT_READ | PROT_WRITE);
		assert_int_equal(kvmlet_gpc_lock_many(list, lens, ptrs, 3), 0);
		for (unsigned i = 0; i < 3; i++)
			assert_ptr_equal(ptrs[i], f->ram + i * PG);
		kvmlet_gpc_unlock_many(list, 3, 1);
	}
	/* Nothing is held any more: a bracket does not wait. */
	unmap(f->ram, 3 * PG);
	for (unsigned i = 0; i < 3; i++)
		kvmlet_gpc_destroy(list[i]);
}

/* G4: an area that crosses pages has a cache for each; it moves, and shrinks to one and back. */
static void area(void **state)
{
	struct fixture *f = *state;
	struct kvmlet_gpc *gpcs[3];
	struct iovec iov[3];
	unsigned n;

	for (unsigned i = 0; i < 3; i++)
		assert_int_equal(kvmlet_gpc_init(f->vm, 0, &gpcs[i]), 0);
	for (uint64_t gpa = PG - 64; gpa <= PG; gpa++) {
		assert_int_equal(kvmlet_gpc_activate_area(gpcs, 2, gpa, 48), 0);
		assert_int_equal(kvmlet_gpc_lock_area(gpcs, 2, gpa, 48, iov, &n), 0);
		assert_int_equal(n, gpa > PG - 48 && gpa < PG ? 2 : 1);
		assert_ptr_equal(iov[0].iov_base, f->ram + gpa);
		if (n == 2) {
			assert_int_equal(iov[0].iov_len + iov[1].iov_len, 48);
			assert_ptr_equal(iov[1].iov_base, f->ram + PG);
		} else {
			assert_int_equal(iov[0].iov_len, 48);
		}
		kvmlet_gpc_unlock_many(gpcs, n, 1);
		assert_int_equal(kvmlet_gpc_check(gpcs[1], 1), n == 2);
	}
	/* Not where it is any more. */
	assert_int_equal(kvmlet_gpc_activate_area(gpcs, 3, PG - 8, PG + 16), 0);
	assert_int_equal(kvmlet_gpc_lock_area(gpcs, 3, PG - 16, 32, iov, &n), -ESTALE);
	assert_int_equal(kvmlet_gpc_lock_area(gpcs, 3, PG - 8, PG + 16, iov, &n), 0);
	assert_int_equal(n, 3);
	kvmlet_gpc_unlock_many(gpcs, n, 0);
	assert_int_equal(kvmlet_gpc_activate_area(gpcs, 3, PG, 8), 0);
	assert_int_equal(kvmlet_gpc_lock_area(gpcs, 3, PG - 8, 16, iov, &n), -ESTALE);
	assert_int_equal(kvmlet_gpc_lock_area(gpcs, 3, PG, PG + 16, iov, &n), -ESTALE);
	/* What is no area. */
	assert_int_equal(kvmlet_gpc_activate_area(gpcs, 2, PG - 8, PG + 16), -EINVAL);
	assert_int_equal(kvmlet_gpc_activate_area(gpcs, 2, PG, 0), -EINVAL);
	assert_int_equal(kvmlet_gpc_activate_area(gpcs, 2, UINT64_MAX - 4, 8), -EINVAL);
	assert_int_equal(kvmlet_gpc_activate_area(gpcs, 0, PG, 8), -EINVAL);
	assert_int_equal(kvmlet_gpc_lock_area(gpcs, 3, PG, 8, iov, &n), 0);
	kvmlet_gpc_unlock_many(gpcs, n, 0);
	for (unsigned i = 0; i < 3; i++)
		kvmlet_gpc_destroy(gpcs[i]);
}

/* G12: deactivations at once, and against locks. */
static struct kvmlet_gpc *shared;
static _Atomic bool stop;

static void *locker(void *arg)
{
	void *p;

	while (!atomic_load(&stop)) {
		int r = kvmlet_gpc_lock(shared, 8, &p);

		if (!r) {
			(*(_Atomic uint64_t *)p)++;
			kvmlet_gpc_unlock(shared, 1);
		} else if (r != -EINVAL) {
			*(int *)arg = r;
		}
	}
	return NULL;
}

static void *switcher(void *arg)
{
	for (unsigned i = 0; i < 300; i++) {
		int r = i & 1 ? kvmlet_gpc_deactivate(shared)
			      : kvmlet_gpc_activate(shared, i % 16 * PG, 8);

		if (r)
			*(int *)arg = r;
	}
	return NULL;
}

/* G7, G12 */
static void deactivate_at_once(void **state)
{
	struct fixture *f = *state;
	pthread_t t[4];
	int r[4] = {0};

	assert_int_equal(kvmlet_gpc_init(f->vm, 0, &shared), 0);
	atomic_store(&stop, false);
	for (unsigned i = 0; i < 4; i++)
		pthread_create(&t[i], NULL, i < 2 ? locker : switcher, &r[i]);
	pthread_join(t[2], NULL);
	pthread_join(t[3], NULL);
	atomic_store(&stop, true);
	pthread_join(t[0], NULL);
	pthread_join(t[1], NULL);
	for (unsigned i = 0; i < 4; i++)
		assert_int_equal(r[i], 0);
	kvmlet_gpc_destroy(shared);
}

/* U5: in a forked child the parent's caches are unusable, and its own work. */
static void forked_child(void **state)
{
	struct fixture *f = *state;
	int status;
	pid_t pid;
	void *mine;

	GPC(a, PG);
	/* So that nothing but the fork is new to the thread. */
	assert_int_equal(kvmlet_gpc_lock(a, 8, &mine), 0);
	kvmlet_gpc_unlock(a, 0);
	pid = fork();
	if (!pid) {
		struct kvmlet_gpc *b;
		struct kvmlet_vm *vm;
		void *p;
		int bad = kvmlet_gpc_lock(a, 8, &p) != -EIO || kvmlet_gpc_check(a, 8) ||
			  kvmlet_gpc_trylock(a, 8, &p) != -EIO ||
			  kvmlet_gpc_refresh(a, 8) != -EIO || kvmlet_gpc_deactivate(a) != -EIO ||
			  kvmlet_gpc_activate(a, PG, 8) != -EIO ||
			  kvmlet_gpc_lock_many(&a, &(size_t){8}, &p, 1) != -EIO ||
			  kvmlet_gpc_init(f->vm, 0, &b) != -EIO;

		kvmlet_gpc_unlock(a, 0);
		kvmlet_gpc_destroy(a);
		bad = bad || kvmlet_vm_create(&vm) ||
		      kvmlet_memslot_set(vm, 0, 0, 0, PG, kl_hva(f->ram)) ||
		      kvmlet_gpc_init(vm, 0, &b) || kvmlet_gpc_activate(b, 0, 8) ||
		      kvmlet_gpc_lock(b, 8, &p);
		if (!bad) {
			kvmlet_gpc_unlock(b, 1);
			unmap(f->ram, PG);
			bad = kvmlet_gpc_check(b, 8);
		}
		_exit(bad);
	}
	assert_true(pid > 0);
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
	kvmlet_gpc_destroy(a);
}

/* G1: a cache of a VM that is dead is closed, and says so. (kl_vm_bug() aborts in tests.) */
static void dead_vm(void **state)
{
	struct fixture *f = *state;
	void *p;

	GPC(a, PG);
	atomic_store(&f->vm->vm.dead, true);
	kl_gpc_close_all(&f->vm->vm);
	assert_int_equal(kvmlet_gpc_lock(a, 8, &p), -EIO);
	assert_int_equal(kvmlet_gpc_trylock(a, 8, &p), -EIO);
	assert_int_equal(kvmlet_gpc_check(a, 8), 0);
	atomic_store(&f->vm->vm.dead, false);
	assert_int_equal(kvmlet_gpc_lock(a, 8, &p), 0);
	kvmlet_gpc_unlock(a, 0);
	kvmlet_gpc_destroy(a);
}

/* G1: hits, refreshes, invalidations and retries are counted, for each VM. */
static void statistics(void **state)
{
	struct fixture *f = *state;
	struct kl_vm_stats *s = &f->vm->vm.stats;
	struct kvmlet_vm *other;
	void *p;

	assert_int_equal(kvmlet_vm_create(&other), 0);
	GPC(a, PG);
	for (int i = 0; i < 5; i++) {
		assert_int_equal(kvmlet_gpc_lock(a, 8, &p), 0);
		kvmlet_gpc_unlock(a, 1);
	}
	kl_gpc_count_hits(&f->vm->vm);
	assert_int_equal(kl_stat_get(&s->gpc[KL_GPC_USER].hits), 5);
	assert_int_equal(kl_stat_get(&s->gpc[KL_GPC_USER].refreshes), 1);
	for (int i = 0; i < 3; i++) {
		unmap(f->ram + PG, PG);
		mprotect(f->ram + PG, PG, PROT_READ | PROT_WRITE);
		assert_int_equal(kvmlet_gpc_lock(a, 8, &p), 0);
		kvmlet_gpc_unlock(a, 1);
	}
	kl_gpc_count_hits(&f->vm->vm);
	assert_int_equal(kl_stat_get(&s->gpc[KL_GPC_USER].hits), 8);
	assert_int_equal(kl_stat_get(&s->gpc[KL_GPC_USER].refreshes), 4);
	assert_int_equal(kl_stat_get(&s->gpc[KL_GPC_USER].invalidations), 3);
	assert_int_equal(kl_stat_get(&s->gpc[KL_GPC_USER].retries), 0);
	kl_gpc_count_hits(&other->vm);
	assert_int_equal(kl_stat_get(&other->vm.stats.gpc[KL_GPC_USER].hits), 0);
	kvmlet_gpc_destroy(a);
	kvmlet_vm_destroy(other);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
		T(life),         T(holder),  T(many),       T(area), T(deactivate_at_once),
		T(forked_child), T(dead_vm), T(statistics),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
