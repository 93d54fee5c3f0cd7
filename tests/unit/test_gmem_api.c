/* SPDX-License-Identifier: MIT */
/* The library's functions on private memory (kvmlet/gmem.h). */
#include <sys/wait.h>

#include "api_env.h"

#include "base/bias.h"

#define GPA (1ull << 32)

struct private_vm {
	struct kvmlet_vm *vm;
	struct kvmlet_gmem *file;
	uint8_t *ram;
};

static int private_setup(void **state)
{
	struct private_vm *p = calloc(1, sizeof(*p));

	*state = p;
	p->ram = new_memory(NPAGES * PG);
	return kvmlet_vm_create_private(&p->vm) ||
	       kvmlet_gmem_create(p->vm, NPAGES * PG, &p->file) ||
	       kvmlet_memslot_set_gmem(p->vm, 0, GPA, NPAGES * PG, kl_hva(p->ram), p->file, 0);
}

static int private_teardown(void **state)
{
	struct private_vm *p = *state;

	kvmlet_gmem_close(p->file);
	kvmlet_vm_destroy(p->vm);
	if (kl_self.depth)
		return -1;
	munmap(p->ram, NPAGES * PG);
	free(p);
	return 0;
}

static uint64_t load(struct kvmlet_vm *vm, uint64_t gpa)
{
	uint64_t val;

	assert_int_equal(kvmlet_vm_load(vm, 0, gpa, 8, &val), 0);
	return val;
}

/* F5, F7: accesses, windows, caches and translations by pages' attributes. */
static void accesses_follow(void **state)
{
	struct private_vm *p = *state;
	struct kvmlet_gpc *c;
	uint64_t len;
	struct iovec iov[4];
	kl_hva_t hva;
	unsigned n;
	void *ptr;
	int is;

	assert_int_equal(kvmlet_gpc_init(p->vm, 0, &c), 0);
	assert_int_equal(kvmlet_gpc_activate(c, GPA, 8), 0);
	assert_int_equal(kvmlet_vm_store(p->vm, 0, GPA, 8, 1), 0);
	assert_int_equal(*(uint64_t *)(void *)p->ram, 1);
	assert_int_equal(kvmlet_vm_is_private(p->vm, GPA, &is), 0);
	assert_int_equal(is, 0);
	assert_int_equal(kvmlet_vm_set_private(p->vm, GPA, 2 * PG, 1), 0);
	assert_int_equal(kvmlet_vm_is_private(p->vm, GPA + PG, &is), 0);
	assert_int_equal(is, 1);
	assert_int_equal(kvmlet_vm_is_private(p->vm, GPA + 2 * PG, &is), 0);
	assert_int_equal(is, 0);
	assert_int_equal(load(p->vm, GPA), 0);
	assert_int_equal(kvmlet_vm_store(p->vm, 0, GPA, 8, 2), 0);
	assert_int_equal(*(uint64_t *)(void *)p->ram, 1);
	assert_int_equal(kvmlet_gpc_lock(c, 8, &ptr), 0);
	assert_int_equal(*(uint64_t *)ptr, 2);
	kvmlet_gpc_unlock(c, 0);
	/* Two runs: private, then shared. */
	assert_int_equal(kvmlet_window_lock(p->vm, 0, GPA, 4 * PG, KVMLET_READ, iov, 4, &n), 0);
	assert_int_equal(n, 2);
	assert_int_equal(*(uint64_t *)iov[0].iov_base, 2);
	assert_int_equal(iov[0].iov_len, 2 * PG);
	assert_ptr_equal(iov[1].iov_base, p->ram + 2 * PG);
	kvmlet_window_unlock(p->vm);
	/* A translation is of the shared memory, always. */
	assert_int_equal(kvmlet_vm_translate(p->vm, 0, GPA, &hva, &len), 0);
	assert_int_equal(hva.addr, (uint64_t)p->ram);
	assert_int_equal(kvmlet_vm_set_private(p->vm, GPA, 2 * PG, 0), 0);
	assert_int_equal(load(p->vm, GPA), 1);
	kvmlet_gpc_destroy(c);
}

/* F1-F3: errnos. */
static void errors(void **state)
{
	struct private_vm *p = *state;
	struct kvmlet_vm *plain;
	struct kvmlet_gmem *f;
	uint64_t bytes;

	assert_int_equal(kvmlet_gmem_create(p->vm, 0, &f), -EINVAL);
	assert_int_equal(kvmlet_gmem_create(p->vm, PG + 1, &f), -EINVAL);
	assert_int_equal(kvmlet_gmem_create(p->vm, 1ull << 63, &f), -EINVAL);
	assert_int_equal(kvmlet_gmem_allocate(p->file, 0, 0), -EINVAL);
	assert_int_equal(kvmlet_gmem_allocate(p->file, 1, PG), -EINVAL);
	assert_int_equal(kvmlet_gmem_allocate(p->file, 0, (NPAGES + 1) * PG), -EINVAL);
	assert_int_equal(kvmlet_gmem_punch(p->file, PG, 1), -EINVAL);
	assert_int_equal(kvmlet_gmem_punch(p->file, NPAGES * PG, PG), 0);
	assert_int_equal(kvmlet_gmem_allocate(p->file, 0, 3 * PG), 0);
	assert_int_equal(kvmlet_gmem_allocated(p->file, &bytes), 0);
	assert_int_equal(bytes, 3 * PG);
	assert_int_equal(kvmlet_vm_set_private(p->vm, GPA, 0, 1), -EINVAL);
	assert_int_equal(kvmlet_vm_set_private(p->vm, GPA + 8, PG, 1), -EINVAL);
	assert_int_equal(kvmlet_memslot_set_gmem(p->vm, 1, 0, PG, kl_hva(p->ram), p->file, 0),
			 -EINVAL);
	assert_int_equal(kvmlet_memslot_set_gmem(p->vm, 1, 0, 0, kl_hva(p->ram), p->file, 0),
			 -EINVAL);
	assert_int_equal(kvmlet_memslot_set(p->vm, 0, 0, GPA, NPAGES * PG, kl_hva(p->ram)),
			 -EINVAL);
	assert_int_equal(kvmlet_memslot_set(p->vm, 1u << 16, 0, GPA, PG, kl_hva(p->ram)), -EINVAL);
	assert_int_equal(kvmlet_vm_create(&plain), 0);
	assert_int_equal(kvmlet_vm_set_private(plain, GPA, PG, 1), -EINVAL);
	assert_int_equal(kvmlet_gmem_create(plain, PG, &f), 0);
	assert_int_equal(kvmlet_memslot_set_gmem(plain, 0, 0, PG, kl_hva(p->ram), f, 0), -EINVAL);
	/* The VM first, then the file. */
	kvmlet_vm_destroy(plain);
	assert_int_equal(kvmlet_gmem_punch(f, 0, PG), 0);
	kvmlet_gmem_close(f);
	kvmlet_gmem_close(NULL);
}

/* F3: the same memory in another VM; each with its own pages private. */
static void linked(void **state)
{
	struct private_vm *p = *state;
	struct kvmlet_vm *second;
	struct kvmlet_gmem *f;
	uint64_t bytes;

	assert_int_equal(kvmlet_vm_create_private(&second), 0);
	assert_int_equal(kvmlet_gmem_link(p->file, second, &f), 0);
	assert_int_equal(kvmlet_memslot_set_gmem(second, 3, 0, 4 * PG, kl_hva(p->ram), f, PG), 0);
	assert_int_equal(kvmlet_vm_set_private(p->vm, GPA, NPAGES * PG, 1), 0);
	assert_int_equal(kvmlet_vm_set_private(second, 0, 4 * PG, 1), 0);
	assert_int_equal(kvmlet_vm_store(p->vm, 0, GPA + 2 * PG, 8, 0xfeed), 0);
	assert_int_equal(load(second, PG), 0xfeed);
	assert_int_equal(kvmlet_gmem_punch(f, 0, NPAGES * PG), 0);
	assert_int_equal(load(p->vm, GPA + 2 * PG), 0);
	assert_int_equal(kvmlet_vm_store(second, 0, PG, 8, 0xbeef), 0);
	/* The first VM and its file go: a guest has moved. */
	kvmlet_vm_destroy(p->vm);
	kvmlet_gmem_close(p->file);
	assert_int_equal(load(second, PG), 0xbeef);
	assert_int_equal(kvmlet_gmem_allocated(f, &bytes), 0);
	assert_true(bytes >= PG);
	p->file = f;
	p->vm = second;
}

/* F2: the file is closed while its slot stays. */
static void closed(void **state)
{
	struct private_vm *p = *state;
	uint64_t val;

	assert_int_equal(kvmlet_vm_set_private(p->vm, GPA, PG, 1), 0);
	assert_int_equal(kvmlet_vm_store(p->vm, 0, GPA, 8, 1), 0);
	kvmlet_gmem_close(p->file);
	p->file = NULL;
	assert_int_equal(kvmlet_vm_load(p->vm, 0, GPA, 8, &val), -EFAULT);
	assert_int_equal(load(p->vm, GPA + PG), 0);
}

/* G1a: who is waited for may not wait. */
static void refused_to_holders(void **state)
{
	struct private_vm *p = *state;
	struct kvmlet_notifier_range r = range_of(p->ram, PG);
	struct kvmlet_gmem *f;
	struct iovec iov;
	unsigned n;

	for (unsigned i = 0; i < 2; i++) {
		if (i)
			assert_int_equal(
				kvmlet_window_lock(p->vm, 0, GPA, PG, KVMLET_READ, &iov, 1, &n), 0);
		else
			assert_int_equal(kvmlet_notifier_begin(&r), 0);
		assert_int_equal(kvmlet_gmem_create(p->vm, PG, &f), -EDEADLK);
		assert_int_equal(kvmlet_gmem_link(p->file, p->vm, &f), -EDEADLK);
		assert_int_equal(kvmlet_gmem_allocate(p->file, 0, PG), -EDEADLK);
		assert_int_equal(kvmlet_gmem_punch(p->file, 0, PG), -EDEADLK);
		assert_int_equal(kvmlet_vm_set_private(p->vm, GPA, PG, 1), -EDEADLK);
		assert_int_equal(
			kvmlet_memslot_set_gmem(p->vm, 1, 0, PG, kl_hva(p->ram), p->file, 0),
			-EDEADLK);
		kvmlet_gmem_close(p->file); /* ignored */
		if (i)
			kvmlet_window_unlock(p->vm);
		else
			kvmlet_notifier_end(&r);
		assert_int_equal(kvmlet_gmem_punch(p->file, 0, PG), 0);
	}
}

/* U5: in a child. */
static void in_child(void **state)
{
	struct private_vm *p = *state;
	struct kvmlet_gmem *f;
	uint64_t bytes;
	int status;

	if (!fork()) {
		bool ok = kvmlet_gmem_punch(p->file, 0, PG) == -EIO &&
			  kvmlet_gmem_allocated(p->file, &bytes) == -EIO &&
			  kvmlet_gmem_create(p->vm, PG, &f) == -EIO &&
			  kvmlet_vm_set_private(p->vm, GPA, PG, 1) == -EIO;

		kvmlet_gmem_close(p->file);
		_exit(!ok);
	}
	wait(&status);
	assert_int_equal(status, 0);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, private_setup, private_teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(accesses_follow),    TEST(errors),   TEST(linked), TEST(closed),
		TEST(refused_to_holders), TEST(in_child),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
