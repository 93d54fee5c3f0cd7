/* SPDX-License-Identifier: MIT */
/*
 * The library's public functions, to the errno. What they do while others change memory and
 * slots is in test_api_race.c.
 */
#include "api_env.h"
#include "host/sys.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <sys/wait.h>

/* S1, S5: a translation is that of the current slots, also when one like it came before. */
static void translate(void **state)
{
	struct fixture *f = *state;
	struct kvmlet_vm *other;
	uint64_t len;
	kl_hva_t h;

	for (int i = 0; i < 3; i++) {
		assert_int_equal(kvmlet_vm_translate(f->vm, 0, PG + 5, &h, &len), 0);
		assert_int_equal(h.addr, kl_hva(f->ram).addr + PG + 5);
		assert_int_equal(len, (NPAGES - 1) * PG - 5);
	}
	assert_int_equal(kvmlet_vm_translate(f->vm, 0, NPAGES * PG - 1, &h, NULL), 0);
	assert_int_equal(kvmlet_vm_translate(f->vm, 0, NPAGES * PG, &h, NULL), -EFAULT);
	assert_int_equal(kvmlet_vm_translate(f->vm, 1, 0, &h, NULL), -EFAULT);
	assert_int_equal(kvmlet_vm_translate(f->vm, 2, 0, &h, NULL), -EINVAL);
	assert_int_equal(kvmlet_memslot_find(f->vm, 7, &h), 0);
	assert_int_equal(h.addr, kl_hva(f->ram).addr + 7);

	/* Another VM with the same generation, another address space. */
	assert_int_equal(kvmlet_vm_create(&other), 0);
	assert_int_equal(kvmlet_memslot_set(other, 0, 0, 0, PG, kl_hva(f->ram + PG)), 0);
	assert_int_equal(kvmlet_memslot_generation(other), kvmlet_memslot_generation(f->vm));
	assert_int_equal(kvmlet_vm_translate(other, 0, 0, &h, NULL), 0);
	assert_int_equal(h.addr, kl_hva(f->ram + PG).addr);
	assert_int_equal(kvmlet_memslot_set(other, 1 << 16, 0, 0, PG, kl_hva(f->ram + 2 * PG)), 0);
	assert_int_equal(kvmlet_vm_translate(other, 1, 0, &h, NULL), 0);
	assert_int_equal(h.addr, kl_hva(f->ram + 2 * PG).addr);
	assert_int_equal(kvmlet_vm_translate(other, 0, 0, &h, NULL), 0);
	assert_int_equal(h.addr, kl_hva(f->ram + PG).addr);
	kvmlet_vm_destroy(other);

	/* Moved, and deleted. */
	assert_int_equal(kvmlet_memslot_find(f->vm, 0, &h), 0);
	assert_int_equal(kvmlet_memslot_set(f->vm, 0, 0, 0x100000, NPAGES * PG, kl_hva(f->ram)), 0);
	assert_int_equal(kvmlet_memslot_find(f->vm, 0, &h), -EFAULT);
	assert_int_equal(kvmlet_memslot_find(f->vm, 0x100000, &h), 0);
	assert_int_equal(h.addr, kl_hva(f->ram).addr);
	assert_int_equal(kvmlet_memslot_set(f->vm, 0, 0, 0, 0, kl_hva(NULL)), 0);
	assert_int_equal(kvmlet_memslot_find(f->vm, 0x100000, &h), -EFAULT);
}

/* S2: slots that are refused leave the others as they were. */
static void memslot_refused(void **state)
{
	struct fixture *f = *state;
	uint64_t gen = kvmlet_memslot_generation(f->vm);
	kl_hva_t ram = kl_hva(f->ram);

	assert_int_equal(kvmlet_memslot_set(f->vm, 1, 8, 0x100000, PG, ram), -EINVAL);
	assert_int_equal(kvmlet_memslot_set(f->vm, 1, 4, 0x100000, PG, ram), -EINVAL);
	assert_int_equal(kvmlet_memslot_set(f->vm, 1, 0, 0x100001, PG, ram), -EINVAL);
	assert_int_equal(kvmlet_memslot_set(f->vm, 1, 0, 0x100000, PG + 1, ram), -EINVAL);
	assert_int_equal(kvmlet_memslot_set(f->vm, 1, 0, 0x100000, 0, ram), -EINVAL);
	assert_int_equal(kvmlet_memslot_set(f->vm, 32764, 0, 0x100000, PG, ram), -EINVAL);
	assert_int_equal(kvmlet_memslot_set(f->vm, 2 << 16, 0, 0x100000, PG, ram), -EINVAL);
	assert_int_equal(kvmlet_memslot_set(f->vm, 1, 0, PG, PG, ram), -EEXIST);
	assert_int_equal(kvmlet_memslot_generation(f->vm), gen);
	assert_int_equal(kvmlet_vm_store(f->vm, 0, 0, 8, 1), 0);
}

/* S3: reads and writes cross pages and slots, and say how far they came. */
static void read_write(void **state)
{
	struct fixture *f = *state;
	uint8_t *more = new_memory(2 * PG), *buf = malloc(4 * PG), *back = calloc(4, PG);
	size_t done;

	for (size_t i = 0; i < 4 * PG; i++)
		buf[i] = (uint8_t)(i * 7 + i / 251);
	/* Slots 0, 1 and 2 are neighbours in the guest, not in the host; then nothing. */
	assert_int_equal(kvmlet_memslot_set(f->vm, 1, 0, NPAGES * PG, PG, kl_hva(more + PG)), 0);
	assert_int_equal(kvmlet_memslot_set(f->vm, 2, 0, (NPAGES + 1) * PG, PG, kl_hva(more)), 0);

	assert_int_equal(kvmlet_vm_write(f->vm, 0, NPAGES * PG - 100, buf, 2 * PG, &done), 0);
	assert_int_equal(done, 2 * PG);
	assert_memory_equal(f->ram + NPAGES * PG - 100, buf, 100);
	assert_memory_equal(more + PG, buf + 100, PG);
	assert_memory_equal(more, buf + 100 + PG, PG - 100);
	assert_int_equal(kvmlet_vm_read(f->vm, 0, NPAGES * PG - 100, back, 2 * PG, NULL), 0);
	assert_memory_equal(back, buf, 2 * PG);

	/* The end of slot 2: everything up to it is there. */
	memset(back, 0, 4 * PG);
	done = 1;
	assert_int_equal(kvmlet_vm_read(f->vm, 0, NPAGES * PG - 100, back, 3 * PG, &done), -EFAULT);
	assert_int_equal(done, 2 * PG + 100);
	assert_memory_equal(back, buf, 2 * PG);
	assert_int_equal(kvmlet_vm_write(f->vm, 0, NPAGES * PG + PG, buf, 2 * PG, &done), -EFAULT);
	assert_int_equal(done, PG);
	assert_memory_equal(more, buf, PG);

	assert_int_equal(kvmlet_vm_read(f->vm, 0, 0x7000000, back, 0, &done), 0);
	assert_int_equal(done, 0);
	assert_int_equal(kvmlet_vm_read(f->vm, 0, 0x7000000, back, 1, &done), -EFAULT);
	assert_int_equal(done, 0);
	assert_int_equal(kvmlet_vm_read(f->vm, 0, UINT64_MAX - 1, back, 4, &done), -EFAULT);
	assert_int_equal(kvmlet_vm_read(f->vm, 1, 0, back, 1, NULL), -EFAULT);
	assert_int_equal(kvmlet_vm_read(f->vm, 2, 0, back, 1, NULL), -EINVAL);
	assert_int_equal(kvmlet_vm_write(f->vm, 2, 0, back, 1, NULL), -EINVAL);
	/* The caller's own buffer is not there. */
	assert_int_equal(kvmlet_vm_read(f->vm, 0, 0, (void *)8, 1, NULL), -EFAULT);

	/* The other address space, over the same memory. */
	assert_int_equal(kvmlet_memslot_set(f->vm, 1 << 16 | 3, 0, 0, PG, kl_hva(more)), 0);
	assert_int_equal(kvmlet_vm_read(f->vm, 1, 0, back, PG, NULL), 0);
	assert_memory_equal(back, more, PG);
	assert_int_equal(kvmlet_memslot_set(f->vm, 1, 0, 0, 0, kl_hva(NULL)), 0);
	assert_int_equal(kvmlet_memslot_set(f->vm, 2, 0, 0, 0, kl_hva(NULL)), 0);
	unmap(more, 2 * PG);
	free(buf);
	free(back);
}

/* M3: a read-only slot, and read-only host memory, are read but not written. */
static void read_only(void **state)
{
	struct fixture *f = *state;
	struct iovec iov[2];
	uint64_t v = 1;
	unsigned n;

	f->ram[0] = 0x5a;
	assert_int_equal(
		kvmlet_memslot_set(f->vm, 1, KVMLET_MEM_READONLY, 0x100000, PG, kl_hva(f->ram)), 0);
	mprotect(f->ram + PG, PG, PROT_READ);
	for (uint64_t gpa = PG; gpa <= 0x100000; gpa += 0x100000 - PG) {
		assert_int_equal(kvmlet_vm_load(f->vm, 0, gpa, 1, &v), 0);
		assert_int_equal(v, gpa == PG ? 0 : 0x5a);
		assert_int_equal(kvmlet_vm_write(f->vm, 0, gpa, &v, 8, NULL), -EFAULT);
		assert_int_equal(kvmlet_vm_store(f->vm, 0, gpa, 8, 1), -EFAULT);
		assert_int_equal(kvmlet_vm_fetch_or(f->vm, 0, gpa, 8, 0, NULL), -EFAULT);
		assert_int_equal(kvmlet_window_lock(f->vm, 0, gpa, 8, KVMLET_WRITE, iov, 2, &n),
				 -EFAULT);
		assert_int_equal(kvmlet_window_lock(f->vm, 0, gpa, 8, KVMLET_READ | KVMLET_WRITE,
						    iov, 2, &n),
				 -EFAULT);
		assert_int_equal(kvmlet_window_lock(f->vm, 0, gpa, 8, KVMLET_READ, iov, 2, &n), 0);
		assert_int_equal(*(uint8_t *)iov[0].iov_base, gpa == PG ? 0 : 0x5a);
		kvmlet_window_unlock(f->vm);
	}
	assert_int_equal(f->ram[0], 0x5a);
}

static uint64_t peek(struct fixture *f, uint64_t gpa, unsigned size)
{
	uint64_t v = 0;

	memcpy(&v, f->ram + gpa, size);
	return v;
}

/* M2: atomics of every size do what they say to these bytes alone. */
static void atomics(void **state)
{
	struct fixture *f = *state;

	for (unsigned size = 1; size <= 8; size *= 2) {
		uint64_t mask = size == 8 ? ~0ull : (1ull << 8 * size) - 1;
		uint64_t gpa = 2 * PG + 16, old, a = 0x1122334455667788, b = 0x8877665544332299;

		memset(f->ram + 2 * PG, 0xcc, 64);
		assert_int_equal(kvmlet_vm_store(f->vm, 0, gpa, size, a), 0);
		assert_int_equal(peek(f, gpa, size), a & mask);
		assert_int_equal(kvmlet_vm_load(f->vm, 0, gpa, size, &old), 0);
		assert_int_equal(old, a & mask);
		assert_int_equal(kvmlet_vm_exchange(f->vm, 0, gpa, size, b, &old), 0);
		assert_int_equal(old, a & mask);
		assert_int_equal(peek(f, gpa, size), b & mask);
		assert_int_equal(kvmlet_vm_compare_exchange(f->vm, 0, gpa, size, a, 1, &old), 0);
		assert_int_equal(old, b & mask);
		assert_int_equal(peek(f, gpa, size), b & mask);
		assert_int_equal(kvmlet_vm_compare_exchange(f->vm, 0, gpa, size, b, a, &old), 0);
		assert_int_equal(old, b & mask);
		assert_int_equal(peek(f, gpa, size), a & mask);
		assert_int_equal(kvmlet_vm_fetch_add(f->vm, 0, gpa, size, b, &old), 0);
		assert_int_equal(old, a & mask);
		assert_int_equal(peek(f, gpa, size), (a + b) & mask);
		assert_int_equal(kvmlet_vm_fetch_or(f->vm, 0, gpa, size, 0x0f, &old), 0);
		assert_int_equal(old, (a + b) & mask);
		assert_int_equal(peek(f, gpa, size), ((a + b) | 0x0f) & mask);
		assert_int_equal(kvmlet_vm_fetch_and(f->vm, 0, gpa, size, 0xf3, &old), 0);
		assert_int_equal(old, ((a + b) | 0x0f) & mask);
		assert_int_equal(peek(f, gpa, size), ((a + b) | 0x0f) & 0xf3 & mask);
		assert_int_equal(kvmlet_vm_fetch_add(f->vm, 0, gpa, size, 1, NULL), 0);
		/* The neighbours are as they were. */
		for (unsigned i = 0; i < 32; i++)
			if (i < 16 || i >= 16 + size)
				assert_int_equal(f->ram[2 * PG + i], 0xcc);
	}
}

/* S2: what is refused, with which errno, and nothing is changed then. */
static void atomics_refused(void **state)
{
	struct fixture *f = *state;
	static const unsigned bad_size[] = {0, 3, 5, 7, 16, 1u << 31};
	uint64_t old = 42;

	for (unsigned i = 0; i < KL_ARRAY_SIZE(bad_size); i++) {
		assert_int_equal(kvmlet_vm_load(f->vm, 0, 0, bad_size[i], &old), -EINVAL);
		assert_int_equal(kvmlet_vm_store(f->vm, 0, 0, bad_size[i], 1), -EINVAL);
	}
	for (unsigned size = 2; size <= 8; size *= 2)
		for (unsigned off = 1; off < size; off++) {
			assert_int_equal(kvmlet_vm_exchange(f->vm, 0, off, size, 1, &old), -EINVAL);
			assert_int_equal(
				kvmlet_vm_compare_exchange(f->vm, 0, off, size, 0, 1, &old),
				-EINVAL);
			assert_int_equal(kvmlet_vm_fetch_add(f->vm, 0, off, size, 1, &old),
					 -EINVAL);
		}
	assert_int_equal(kvmlet_vm_load(f->vm, 0, NPAGES * PG, 8, &old), -EFAULT);
	assert_int_equal(kvmlet_vm_fetch_and(f->vm, 0, 0x7000000, 4, 0, &old), -EFAULT);
	assert_int_equal(kvmlet_vm_fetch_or(f->vm, 9, 0, 4, 0, &old), -EINVAL);
	assert_int_equal(old, 42);
	assert_int_equal(peek(f, 0, 8), 0);
}

/* S3: a window is one entry for each run of host memory, also across slots. */
static void window_merges(void **state)
{
	struct fixture *f = *state;
	uint8_t *more = new_memory(4 * PG);
	struct iovec iov[4];
	unsigned n = 0;

	/* In the guest: ram, more[2], more[3], more[0]. */
	assert_int_equal(kvmlet_memslot_set(f->vm, 1, 0, NPAGES * PG, PG, kl_hva(more + 2 * PG)),
			 0);
	assert_int_equal(
		kvmlet_memslot_set(f->vm, 2, 0, (NPAGES + 1) * PG, PG, kl_hva(more + 3 * PG)), 0);
	assert_int_equal(kvmlet_memslot_set(f->vm, 3, 0, (NPAGES + 2) * PG, PG, kl_hva(more)), 0);

	assert_int_equal(kvmlet_window_lock(f->vm, 0, 10, 20, KVMLET_READ, iov, 1, &n), 0);
	assert_int_equal(n, 1);
	assert_ptr_equal(iov[0].iov_base, f->ram + 10);
	assert_int_equal(iov[0].iov_len, 20);
	kvmlet_window_unlock(f->vm);

	assert_int_equal(
		kvmlet_window_lock(f->vm, 0, 5, (NPAGES + 3) * PG - 10, KVMLET_WRITE, iov, 4, &n),
		0);
	assert_int_equal(n, 3);
	assert_ptr_equal(iov[0].iov_base, f->ram + 5);
	assert_int_equal(iov[0].iov_len, NPAGES * PG - 5);
	assert_ptr_equal(iov[1].iov_base, more + 2 * PG);
	assert_int_equal(iov[1].iov_len, 2 * PG);
	assert_ptr_equal(iov[2].iov_base, more);
	assert_int_equal(iov[2].iov_len, PG - 5);
	kvmlet_window_unlock(f->vm);

	n = 77;
	assert_int_equal(
		kvmlet_window_lock(f->vm, 0, 5, (NPAGES + 3) * PG - 10, KVMLET_WRITE, iov, 2, &n),
		-E2BIG);
	/* No window is held after that: a bracket does not wait. */
	unmap(more, 4 * PG);
	assert_int_equal(kvmlet_window_lock(f->vm, 0, PG, NPAGES * PG, KVMLET_READ, iov, 4, &n),
			 -EFAULT);
	assert_int_equal(n, 77);
}

/* S2: what a window refuses. */
static void window_refused(void **state)
{
	struct fixture *f = *state;
	struct iovec iov[2];
	unsigned n;

	assert_int_equal(kvmlet_window_lock(f->vm, 0, 0, 0, KVMLET_READ, iov, 2, &n), -EINVAL);
	assert_int_equal(
		kvmlet_window_lock(f->vm, 0, 0, KVMLET_WINDOW_MAX + 1, KVMLET_READ, iov, 2, &n),
		-EINVAL);
	assert_int_equal(kvmlet_window_lock(f->vm, 0, 0, 8, 0, iov, 2, &n), -EINVAL);
	assert_int_equal(kvmlet_window_lock(f->vm, 0, 0, 8, 4, iov, 2, &n), -EINVAL);
	assert_int_equal(kvmlet_window_lock(f->vm, 0, 0, 8, KVMLET_READ, iov, 0, &n), -EINVAL);
	assert_int_equal(kvmlet_window_lock(f->vm, 2, 0, 8, KVMLET_READ, iov, 2, &n), -EINVAL);
	assert_int_equal(kvmlet_window_lock(f->vm, 0, UINT64_MAX, 8, KVMLET_READ, iov, 2, &n),
			 -EFAULT);
	assert_int_equal(kvmlet_window_lock(f->vm, 0, NPAGES * PG - 1, 2, KVMLET_READ, iov, 2, &n),
			 -EFAULT);
	kvmlet_window_unlock(f->vm); /* none: complained about, and ignored */
}

/* Everything that can wait for a bracket or a holder of a window. */
static void assert_all_edeadlk(struct fixture *f)
{
	struct iovec iov[2];
	uint64_t v;
	unsigned n;

	assert_int_equal(kvmlet_vm_read(f->vm, 0, 0, &v, 8, NULL), -EDEADLK);
	assert_int_equal(kvmlet_vm_write(f->vm, 0, 0, &v, 8, NULL), -EDEADLK);
	assert_int_equal(kvmlet_vm_load(f->vm, 0, 0, 8, &v), -EDEADLK);
	assert_int_equal(kvmlet_vm_store(f->vm, 0, 0, 8, 1), -EDEADLK);
	assert_int_equal(kvmlet_vm_fetch_add(f->vm, 0, 0, 8, 1, &v), -EDEADLK);
	assert_int_equal(kvmlet_window_lock(f->vm, 0, 0, 8, KVMLET_READ, iov, 2, &n), -EDEADLK);
	assert_int_equal(kvmlet_memslot_set(f->vm, 5, 0, 0x200000, PG, kl_hva(f->ram)), -EDEADLK);
	assert_int_equal(kvmlet_notifier_uffd_source(0), -EDEADLK);
	assert_int_equal(kvmlet_notifier_uffd_source(1), -EDEADLK);
}

/* S7, N2: inside one's own window or bracket what could only wait for oneself is refused. */
static void own_window_or_bracket(void **state)
{
	struct fixture *f = *state;
	struct kvmlet_notifier_range r = range_of(f->ram, PG);
	struct iovec iov[2];
	uint64_t v = 0;
	kl_hva_t h;
	unsigned n;

	assert_int_equal(kvmlet_window_lock(f->vm, 0, 0, 8, KVMLET_WRITE, iov, 2, &n), 0);
	assert_all_edeadlk(f);
	assert_int_equal(kvmlet_notifier_begin(&r), -EDEADLK);
	r.may_block = 0;
	assert_int_equal(kvmlet_notifier_begin(&r), -EDEADLK);
	assert_int_equal(kvmlet_vm_translate(f->vm, 0, 8, &h, NULL), 0);
	memset(iov[0].iov_base, 0x11, 8);
	kvmlet_window_unlock(f->vm);
	assert_int_equal(kvmlet_vm_load(f->vm, 0, 0, 8, &v), 0);
	assert_int_equal(v, 0x1111111111111111);

	r = range_of(f->ram + PG, PG);
	assert_int_equal(kvmlet_notifier_begin(&r), 0);
	assert_all_edeadlk(f);
	assert_int_equal(kvmlet_vm_translate(f->vm, 0, 8, &h, NULL), 0);
	kvmlet_notifier_end(&r);
	assert_int_equal(kvmlet_vm_load(f->vm, 0, 0, 8, &v), 0);
}

/* N5: a bracket that must not block fails while somebody holds a window, and then succeeds. */
static void *try_bracket(void *arg)
{
	struct kvmlet_notifier_range *r = arg;
	intptr_t ret = kvmlet_notifier_begin(r);

	if (!ret)
		kvmlet_notifier_end(r);
	return (void *)ret;
}

static intptr_t in_thread(void *(*fn)(void *), void *arg)
{
	pthread_t t;
	void *ret;

	assert_int_equal(pthread_create(&t, NULL, fn, arg), 0);
	pthread_join(t, &ret);
	return (intptr_t)ret;
}

/* N1, N5: kinds of events; what begin refuses; what it must not wait for. */
static void brackets(void **state)
{
	struct fixture *f = *state;
	struct kvmlet_notifier_range r = range_of(f->ram, 0);
	struct iovec iov[2];
	uint64_t mapped;
	unsigned n;

	assert_int_equal(kvmlet_notifier_begin(&r), -EINVAL);
	r = range_of(f->ram, PG);
	r.event = KVMLET_EVENT_REPLACE + 1;
	assert_int_equal(kvmlet_notifier_begin(&r), -EINVAL);
	for (unsigned e = KVMLET_EVENT_UNMAP; e <= KVMLET_EVENT_REPLACE; e++) {
		r.event = e;
		assert_int_equal(kvmlet_vm_store(f->vm, 0, 0, 8, 1), 0);
		assert_int_equal(kvmlet_notifier_begin(&r), 0);
		kvmlet_notifier_end(&r);
	}
	r.may_block = 0;
	assert_int_equal(kvmlet_window_lock(f->vm, 0, 0, PG, KVMLET_READ, iov, 2, &n), 0);
	mapped = kl_stat_get(&f->vm->vm.stats.pages_4k);
	assert_int_equal(in_thread(try_bracket, &r), -EAGAIN);
	assert_int_equal(kl_stat_get(&f->vm->vm.stats.pages_4k), mapped); /* nothing changed */
	kvmlet_window_unlock(f->vm);
	assert_int_equal(in_thread(try_bracket, &r), 0);
}

static int young(void *p, size_t len)
{
	int y = -1;

	assert_int_equal(kvmlet_notifier_test_young(kl_hva(p).addr, kl_hva(p).addr + len, &y), 0);
	return y;
}

static int clear_young(void *p, size_t len)
{
	int y = -1;

	assert_int_equal(kvmlet_notifier_clear_young(kl_hva(p).addr, kl_hva(p).addr + len, &y), 0);
	return y;
}

/* N6: young is what a call of the library has accessed since it was cleared, and no more. */
static void ageing(void **state)
{
	struct fixture *f = *state;
	uint64_t start = kl_hva(f->ram).addr, v;
	struct iovec iov[2];
	unsigned n;
	int y = 7;

	assert_int_equal(young(f->ram, NPAGES * PG), 0);
	assert_int_equal(kvmlet_vm_store(f->vm, 0, PG, 8, 1), 0);
	assert_int_equal(young(f->ram, NPAGES * PG), 1);
	assert_int_equal(young(f->ram + PG + 100, 1), 1);
	assert_int_equal(young(f->ram, PG), 0);
	assert_int_equal(young(f->ram + 2 * PG, PG), 0);
	assert_int_equal(clear_young(f->ram, NPAGES * PG), 1);
	assert_int_equal(young(f->ram, NPAGES * PG), 0);
	assert_int_equal(clear_young(f->ram, NPAGES * PG), 0);
	/* Translating is no access. */
	assert_int_equal(kvmlet_vm_translate(f->vm, 0, PG, &(kl_hva_t){0}, NULL), 0);
	assert_int_equal(young(f->ram, NPAGES * PG), 0);
	assert_int_equal(kvmlet_vm_load(f->vm, 0, PG, 8, &v), 0);
	assert_int_equal(clear_young(f->ram + PG, PG), 1);
	assert_int_equal(kvmlet_vm_read(f->vm, 0, PG, &v, 8, NULL), 0);
	assert_int_equal(clear_young(f->ram + PG, PG), 1);

	assert_int_equal(kvmlet_window_lock(f->vm, 0, PG, 8, KVMLET_READ, iov, 2, &n), 0);
	assert_int_equal(kvmlet_notifier_test_young(start, start + PG, &y), -EDEADLK);
	assert_int_equal(kvmlet_notifier_clear_young(start, start + PG, &y), -EDEADLK);
	kvmlet_window_unlock(f->vm);
	assert_int_equal(young(f->ram + PG, PG), 1);
	assert_int_equal(kvmlet_notifier_clear_young(start, start + NPAGES * PG, NULL), 0);
	assert_int_equal(young(f->ram, NPAGES * PG), 0);
	assert_int_equal(kvmlet_notifier_test_young(start, start, &y), -EINVAL);
	assert_int_equal(kvmlet_notifier_clear_young(start + 1, start, &y), -EINVAL);
	assert_int_equal(y, 7);
}

/* Every way to reach the page at @gpa, of which there is nothing left. */
static void assert_all_efault(struct fixture *f, uint64_t gpa)
{
	struct iovec iov[2];
	uint64_t v;
	unsigned n;

	assert_int_equal(kvmlet_vm_read(f->vm, 0, gpa, &v, 8, NULL), -EFAULT);
	assert_int_equal(kvmlet_vm_write(f->vm, 0, gpa, &v, 8, NULL), -EFAULT);
	assert_int_equal(kvmlet_vm_load(f->vm, 0, gpa, 8, &v), -EFAULT);
	assert_int_equal(kvmlet_vm_fetch_add(f->vm, 0, gpa, 8, 1, &v), -EFAULT);
	assert_int_equal(kvmlet_vm_fetch_or(f->vm, 0, gpa, 1, 1, &v), -EFAULT);
	assert_int_equal(kvmlet_window_lock(f->vm, 0, gpa, 8, KVMLET_READ, iov, 2, &n), -EFAULT);
	assert_int_equal(kvmlet_window_lock(f->vm, 0, gpa, 8, KVMLET_WRITE, iov, 2, &n), -EFAULT);
}

/* N7: memory that vanished, with a bracket or unseen, is -EFAULT, whatever was mapped before. */
static void vanished_memory(void **state)
{
	struct fixture *f = *state;
	uint8_t all[2 * PG];
	size_t done;
	int fd = memfd_create("vanished", MFD_CLOEXEC);
	uint8_t *file;

	assert_int_equal(kvmlet_vm_write(f->vm, 0, 0, all, 2 * PG, NULL), 0);
	assert_int_equal(kvmlet_vm_store(f->vm, 0, 2 * PG, 8, 1), 0);
	unmap(f->ram + PG, PG);
	assert_all_efault(f, PG);
	assert_int_equal(kvmlet_vm_read(f->vm, 0, 0, all, 2 * PG, &done), -EFAULT);
	assert_int_equal(done, PG);
	vanish(f->ram + 2 * PG, PG); /* unseen */
	assert_all_efault(f, 2 * PG);
	/* It is back: no error sticks. */
	assert_ptr_equal(mmap(f->ram + PG, 2 * PG, PROT_READ | PROT_WRITE,
			      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0),
			 f->ram + PG);
	assert_int_equal(kvmlet_vm_store(f->vm, 0, PG, 8, 1), 0);
	assert_int_equal(kvmlet_vm_store(f->vm, 0, 2 * PG, 8, 1), 0);

	/* SIGBUS instead of SIGSEGV: a file that became shorter. */
	assert_true(fd >= 0);
	assert_int_equal(ftruncate(fd, PG), 0);
	file = mmap(NULL, PG, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	assert_int_equal(kvmlet_memslot_set(f->vm, 1, 0, 0x100000, PG, kl_hva(file)), 0);
	assert_int_equal(kvmlet_vm_store(f->vm, 0, 0x100000, 8, 1), 0);
	assert_int_equal(ftruncate(fd, 0), 0);
	assert_all_efault(f, 0x100000);
	munmap(file, PG);
	close(fd);
}

/* U5: in a forked child the parent's VM is refused, and a new one works. */
static void forked_child(void **state)
{
	struct fixture *f = *state;
	struct kvmlet_vm *vm;
	uint64_t v;
	kl_hva_t h;
	int status;
	pid_t pid;

	assert_int_equal(kvmlet_vm_store(f->vm, 0, 0, 8, 7), 0);
	assert_int_equal(kvmlet_memslot_find(f->vm, 0, &h), 0);
	pid = fork();
	if (!pid) {
		if (kvmlet_vm_load(f->vm, 0, 0, 8, &v) != -EIO ||
		    kvmlet_vm_read(f->vm, 0, 0, &v, 8, NULL) != -EIO ||
		    kvmlet_memslot_find(f->vm, 0, &h) != -EIO ||
		    kvmlet_memslot_set(f->vm, 0, 0, 0, 0, kl_hva(NULL)) != -EIO)
			_exit(1);
		kvmlet_vm_destroy(f->vm);
		if (kvmlet_vm_create(&vm) || kvmlet_memslot_set(vm, 0, 0, 0, PG, kl_hva(f->ram)) ||
		    kvmlet_vm_load(vm, 0, 0, 8, &v) || v != 7)
			_exit(2);
		unmap(f->ram, PG);
		if (kvmlet_vm_load(vm, 0, 0, 8, &v) != -EFAULT)
			_exit(3);
		kvmlet_vm_destroy(vm);
		_exit(0);
	}
	assert_true(pid > 0);
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
	assert_int_equal(kvmlet_vm_load(f->vm, 0, 0, 8, &v), 0);
	assert_int_equal(v, 7);
}

/*
 * U5, N1: a fork() between begin and end of a bracket. The child's thread is in none, has another
 * id, and changes its own memory and slots.
 */
static void forked_in_bracket(void **state)
{
	struct fixture *f = *state;
	struct kvmlet_notifier_range r = range_of(f->ram, PG);
	struct kvmlet_vm *vm;
	uint64_t v;
	int status;
	pid_t pid;

	assert_int_equal(kl_gettid(), gettid());
	assert_int_equal(kvmlet_notifier_begin(&r), 0);
	pid = fork();
	if (!pid) {
		if (kl_gettid() != gettid() || kl_self.brackets)
			_exit(1);
		if (kvmlet_vm_create(&vm) ||
		    kvmlet_memslot_set(vm, 0, 0, 0, NPAGES * PG, kl_hva(f->ram)) ||
		    kvmlet_vm_load(vm, 0, PG, 8, &v))
			_exit(2);
		unmap(f->ram + PG, PG);
		if (kvmlet_vm_load(vm, 0, PG, 8, &v) != -EFAULT || kvmlet_vm_load(vm, 0, 0, 8, &v))
			_exit(3);
		/* Code that both go through may end it: complained about, and ignored. */
		kvmlet_notifier_end(&r);
		if (kl_self.brackets ||
		    kvmlet_memslot_set(vm, 1, 0, 2 << 20, PG, kl_hva(f->ram + 2 * PG)) ||
		    kvmlet_vm_load(vm, 0, 2 << 20, 8, &v))
			_exit(4);
		kvmlet_vm_destroy(vm);
		_exit(0);
	}
	kvmlet_notifier_end(&r);
	assert_true(pid > 0);
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
	assert_int_equal(kvmlet_vm_load(f->vm, 0, 0, 8, &v), 0);
}

/* U5: so is a VM that an internal error has ended. */
static void dead_vm(void **state)
{
	struct fixture *f = *state;
	struct iovec iov;
	uint64_t v;
	kl_hva_t h;
	unsigned n;

	/* One that is remembered does not hide it. */
	assert_int_equal(kvmlet_vm_translate(f->vm, 0, 8, &h, NULL), 0);
	atomic_store(&f->vm->vm.dead, true);
	assert_int_equal(kvmlet_vm_translate(f->vm, 0, 8, &h, NULL), -EIO);
	assert_int_equal(kvmlet_memslot_find(f->vm, 8, &h), -EIO);
	assert_int_equal(kvmlet_vm_read(f->vm, 0, 0, &v, 8, NULL), -EIO);
	assert_int_equal(kvmlet_vm_store(f->vm, 0, 0, 8, 1), -EIO);
	assert_int_equal(kvmlet_window_lock(f->vm, 0, 0, 8, KVMLET_READ, &iov, 1, &n), -EIO);
	assert_int_equal(kvmlet_memslot_set(f->vm, 0, 0, 0, 0, kl_hva(NULL)), -EIO);
}

static char trace_file[64];

static bool traced(const char *what, const char *and_what)
{
	FILE *file = fopen(trace_file, "r");
	char line[1024];
	bool found = false;

	assert_non_null(file);
	while (!found && fgets(line, sizeof(line), file))
		found = strstr(line, what) && strstr(line, and_what);
	fclose(file);
	return found;
}

/* N1: KVMLET_TRACE tells what was invalidated, why, and which access faulted then. */
static void trace(void **state)
{
	struct fixture *f = *state;
	struct kvmlet_notifier_range r = range_of(f->ram + 5 * PG, PG);
	char where[64];
	uint64_t v;

	r.event = KVMLET_EVENT_DISCARD;
	assert_int_equal(kvmlet_vm_store(f->vm, 0, 5 * PG, 8, 1), 0);
	assert_int_equal(kvmlet_notifier_begin(&r), 0);
	kvmlet_notifier_end(&r);
	assert_int_equal(kvmlet_vm_load(f->vm, 0, 5 * PG, 8, &v), 0);
	snprintf(where, sizeof(where), "hva=%#llx", (unsigned long long)r.start);
	assert_true(traced("discard", where));
	assert_true(traced("accessor fault gpa=0x5000 -w-", "4K"));
	assert_true(traced("accessor fault gpa=0x5000 r--", "after #"));
}

int main(void)
{
#define T(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)
	int failed;
	static const struct CMUnitTest tests[] = {
		T(trace),
		T(translate),
		T(memslot_refused),
		T(read_write),
		T(read_only),
		T(atomics),
		T(atomics_refused),
		T(window_merges),
		T(window_refused),
		T(own_window_or_bracket),
		T(brackets),
		T(ageing),
		T(vanished_memory),
		T(forked_child),
		T(forked_in_bracket),
		T(dead_vm),
	};

	snprintf(trace_file, sizeof(trace_file), "/tmp/kvmlet-test-api.XXXXXX");
	close(mkstemp(trace_file));
	setenv("KVMLET_TRACE", trace_file, 1);
	failed = cmocka_run_group_tests(tests, NULL, NULL);
	unlink(trace_file);
	return failed;
}
