/* SPDX-License-Identifier: MIT */
/*
 * The library's public functions on dirty logs (include/kvmlet/dirty.h): D1, D2, D3.
 */
#include "api_env.h"

#include "base/failpoint.h"

#define LOG  KVMLET_MEM_LOG_DIRTY
#define SIZE (NPAGES * PG)
#define FAR  (1ul << 32) /* slot 1: MANY pages */
#define MANY 1000u

static int log_on(struct fixture *f)
{
	return kvmlet_memslot_set(f->vm, 0, LOG, 0, SIZE, kl_hva(f->ram));
}

static uint64_t get(struct fixture *f)
{
	uint64_t word = ~0ull;

	assert_int_equal(kvmlet_dirty_get(f->vm, 0, &word, NPAGES), 0);
	return word;
}

static void store(struct fixture *f, uint64_t gpa)
{
	assert_int_equal(kvmlet_vm_store(f->vm, 0, gpa, 8, gpa + 1), 0);
}

/* D3: by each way to write there is. */
static void every_writer(void **state)
{
	struct fixture *f = *state;
	struct kvmlet_gpc *gpc;
	struct iovec iov[2];
	uint64_t old;
	unsigned n;
	void *p;

	assert_int_equal(log_on(f), 0);
	assert_int_equal(get(f), 0);
	assert_int_equal(kvmlet_vm_write(f->vm, 0, PG - 4, "written", 8, NULL), 0);
	assert_int_equal(get(f), 3);
	assert_int_equal(kvmlet_vm_read(f->vm, 0, PG, &old, 8, NULL), 0);
	assert_int_equal(get(f), 0);
	store(f, 2 * PG);
	assert_int_equal(kvmlet_vm_exchange(f->vm, 0, 3 * PG, 8, 1, &old), 0);
	assert_int_equal(kvmlet_vm_fetch_add(f->vm, 0, 4 * PG, 4, 1, &old), 0);
	assert_int_equal(get(f), 1u << 2 | 1u << 3 | 1u << 4);
	assert_int_equal(kvmlet_window_lock(f->vm, 0, 5 * PG, 2 * PG, KVMLET_WRITE, iov, 2, &n), 0);
	memset(iov[0].iov_base, 1, iov[0].iov_len);
	kvmlet_window_unlock(f->vm);
	assert_int_equal(get(f), 1u << 5 | 1u << 6);
	assert_int_equal(kvmlet_gpc_init(f->vm, 0, &gpc), 0);
	assert_int_equal(kvmlet_gpc_activate(gpc, 7 * PG, 8), 0);
	for (unsigned written = 0; written < 2; written++) {
		assert_int_equal(kvmlet_gpc_lock(gpc, 8, &p), 0);
		kvmlet_gpc_unlock(gpc, (int)written);
		assert_int_equal(get(f), written << 7);
	}
	kvmlet_gpc_destroy(gpc);
}

/* D1: what it refuses, with nothing changed. */
static void refusals(void **state)
{
	struct fixture *f = *state;
	uint64_t words[2] = {0};
	struct iovec iov;
	unsigned n;

	assert_int_equal(kvmlet_dirty_get(f->vm, 0, words, NPAGES), -ENOENT);
	assert_int_equal(kvmlet_dirty_clear(f->vm, 0, 0, NPAGES, words), -ENOENT);
	assert_int_equal(log_on(f), 0);
	store(f, PG);
	assert_int_equal(kvmlet_dirty_get(f->vm, 1, words, NPAGES), -ENOENT);
	assert_int_equal(kvmlet_dirty_get(f->vm, 0, words, NPAGES - 1), -EINVAL);
	assert_int_equal(kvmlet_dirty_get(f->vm, 0xfffe, words, NPAGES), -EINVAL);
	assert_int_equal(kvmlet_dirty_get(f->vm, 2u << 16, words, NPAGES), -EINVAL);
	assert_int_equal(kvmlet_dirty_get(f->vm, 0, (void *)8, NPAGES), -EFAULT);
	assert_int_equal(kvmlet_dirty_clear(f->vm, 0, 1, NPAGES - 1, words), -EINVAL);
	assert_int_equal(kvmlet_dirty_clear(f->vm, 0, 0, NPAGES + 1, words), -EINVAL);
	assert_int_equal(kvmlet_dirty_clear(f->vm, 0, 0, NPAGES, (void *)8), -EFAULT);
	assert_int_equal(kvmlet_dirty_set_mode(f->vm, KVMLET_DIRTY_ALL_SET), -EINVAL);
	assert_int_equal(kvmlet_dirty_set_mode(f->vm, 4), -EINVAL);
	assert_int_equal(kvmlet_dirty_ring_collect(f->vm, NULL, 0, &n), -EINVAL);
	assert_int_equal(kvmlet_dirty_ring_create(f->vm, 256), -EBUSY);
	assert_int_equal(kvmlet_memslot_set(f->vm, 0, 1u << 2, 0, SIZE, kl_hva(f->ram)), -EINVAL);
	assert_int_equal(kvmlet_window_lock(f->vm, 0, 0, PG, KVMLET_READ, &iov, 1, &n), 0);
	assert_int_equal(kvmlet_dirty_get(f->vm, 0, words, NPAGES), -EDEADLK);
	assert_int_equal(kvmlet_dirty_clear(f->vm, 0, 0, NPAGES, words), -EDEADLK);
	assert_int_equal(kvmlet_dirty_set_mode(f->vm, 0), -EDEADLK);
	assert_int_equal(kvmlet_dirty_ring_create(f->vm, 256), -EDEADLK);
	assert_int_equal(kvmlet_dirty_ring_collect(f->vm, NULL, 0, &n), -EDEADLK);
	kvmlet_window_unlock(f->vm);
	/* A word of one's own behind the slot's is left alone. */
	words[1] = 7;
	assert_int_equal(kvmlet_dirty_get(f->vm, 0, words, 128), 0);
	assert_int_equal(words[0], 1u << 1);
	assert_int_equal(words[1], 7);
}

/* D1: to get, then to clear. */
static void manual(void **state)
{
	struct fixture *f = *state;
	uint64_t pages = 1u << 2;

	assert_int_equal(kvmlet_dirty_set_mode(f->vm, KVMLET_DIRTY_MANUAL), 0);
	assert_int_equal(log_on(f), 0);
	assert_int_equal(get(f), 0);
	store(f, 2 * PG);
	store(f, 3 * PG);
	assert_int_equal(get(f), 1u << 2 | 1u << 3);
	assert_int_equal(get(f), 1u << 2 | 1u << 3);
	assert_int_equal(kvmlet_dirty_clear(f->vm, 0, 0, NPAGES, &pages), 0);
	assert_int_equal(get(f), 1u << 3);
	store(f, 2 * PG);
	assert_int_equal(get(f), 1u << 2 | 1u << 3);
	assert_int_equal(kvmlet_dirty_set_mode(f->vm, KVMLET_DIRTY_MANUAL | KVMLET_DIRTY_ALL_SET),
			 0);
	assert_int_equal(kvmlet_memslot_set(f->vm, 0, 0, 0, SIZE, kl_hva(f->ram)), 0);
	assert_int_equal(log_on(f), 0);
	assert_int_equal(get(f), (1u << NPAGES) - 1);
	assert_int_equal(kvmlet_dirty_set_mode(f->vm, 0), 0);
	assert_int_equal(get(f), (1u << NPAGES) - 1);
	assert_int_equal(get(f), 0);
}

/* D1: initially set, in a log that ends with a word, and with a line of words. */
static void whole_words(void **state)
{
	struct fixture *f = *state;
	uint64_t words[16];

	assert_int_equal(kvmlet_dirty_set_mode(f->vm, KVMLET_DIRTY_MANUAL | KVMLET_DIRTY_ALL_SET),
			 0);
	for (unsigned n = 1; n <= KL_ARRAY_SIZE(words); n *= 2) {
		uint64_t pages = 64 * n;
		uint8_t *p = new_memory(pages * PG);

		assert_int_equal(kvmlet_memslot_set(f->vm, 1, LOG, FAR, pages * PG, kl_hva(p)), 0);
		assert_int_equal(kvmlet_dirty_get(f->vm, 1, words, pages), 0);
		for (unsigned i = 0; i < n; i++)
			assert_true(words[i] == ~0ull);
		assert_int_equal(kvmlet_dirty_set_mode(f->vm, 0), 0);
		/* To get is to clear now, and what was clear is. */
		assert_int_equal(kvmlet_dirty_get(f->vm, 1, words, pages), 0);
		store(f, FAR + (pages - 1) * PG);
		for (unsigned k = 0; k < 2; k++) {
			assert_int_equal(kvmlet_dirty_get(f->vm, 1, words, pages), 0);
			for (unsigned i = 0; i < n; i++)
				assert_true(words[i] == (!k && i == n - 1 ? 1ull << 63 : 0));
		}
		assert_int_equal(kvmlet_memslot_set(f->vm, 1, 0, FAR, 0, kl_hva(p)), 0);
		assert_int_equal(
			kvmlet_dirty_set_mode(f->vm, KVMLET_DIRTY_MANUAL | KVMLET_DIRTY_ALL_SET),
			0);
		munmap(p, pages * PG);
	}
}

/*
 * D1: of a part of a large log, with a bitmap of just that part; what is not cleared stays, however
 * far behind.
 */
static void part_of_large(void **state)
{
	enum { PAGES = 40 * 1024 };
	const size_t size = PAGES * PG;
	struct fixture *f = *state;
	uint8_t *p = mmap(NULL, size, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	uint8_t *end = new_memory(2 * PG) + PG;
	uint64_t *bitmap = calloc(PAGES / 64, 8);
	uint64_t *two = (uint64_t *)(void *)(end - 16); /* and no more */

	assert_int_equal(mprotect(end, PG, PROT_NONE), 0);
	assert_int_equal(kvmlet_dirty_set_mode(f->vm, KVMLET_DIRTY_MANUAL), 0);
	assert_int_equal(kvmlet_memslot_set(f->vm, 1, LOG, FAR, size, kl_hva(p)), 0);
	for (unsigned i = 0; i < PAGES; i += 1000)
		store(f, FAR + i * PG);
	store(f, FAR + 33999 * PG);
	assert_int_equal(kvmlet_dirty_get(f->vm, 1, bitmap, PAGES), 0);
	/* Pages 33984 to 34111: of two that are marked, one is cleared; its neighbour, and more,
	 * stay. */
	two[0] = ~(1ull << (33999 - 33984));
	two[1] = ~0ull;
	assert_int_equal(kvmlet_dirty_clear(f->vm, 1, 33984, 128, two), 0);
	two[0] = two[1] = 1;
	assert_int_equal(kvmlet_dirty_clear(f->vm, 1, 32000, 128, two), 0);
	for (unsigned k = 0; k < 2; k++) {
		assert_int_equal(kvmlet_dirty_get(f->vm, 1, bitmap, PAGES), 0);
		for (unsigned i = 0; i < PAGES; i++)
			assert_int_equal(bitmap[i / 64] >> i % 64 & 1,
					 (i % 1000 == 0 && i != 34000 && i != 32000) || i == 33999);
	}
	/* What stayed can be cleared. */
	two[0] = two[1] = ~0ull;
	assert_int_equal(kvmlet_dirty_clear(f->vm, 1, 33984, 128, two), 0);
	assert_int_equal(kvmlet_dirty_get(f->vm, 1, bitmap, PAGES), 0);
	assert_int_equal(bitmap[33984 / 64], 0);
	assert_int_equal(kvmlet_memslot_set(f->vm, 1, 0, FAR, 0, kl_hva(p)), 0);
	munmap(end - PG, 2 * PG);
	munmap(p, size);
	free(bitmap);
}

/* Slot 1 with more pages than the smallest ring holds, which logs; there is a ring. */
static uint8_t *with_ring(struct fixture *f)
{
	uint8_t *p = new_memory(MANY * PG);

	assert_int_equal(kvmlet_memslot_set(f->vm, 0, 0, 0, 0, kl_hva(f->ram)), 0);
	assert_int_equal(kvmlet_dirty_ring_create(f->vm, 255), -EINVAL);
	assert_int_equal(kvmlet_dirty_ring_create(f->vm, 384), -EINVAL);
	assert_int_equal(kvmlet_dirty_ring_create(f->vm, 1u << 17), -EINVAL);
	assert_int_equal(kvmlet_dirty_ring_create(f->vm, 256), 0);
	assert_int_equal(kvmlet_dirty_ring_create(f->vm, 256), -EEXIST);
	assert_int_equal(kvmlet_memslot_set(f->vm, 1, LOG, FAR, MANY * PG, kl_hva(p)), 0);
	return p;
}

/* D2: each page once, until it is collected. */
static void ring(void **state)
{
	struct fixture *f = *state;
	struct kvmlet_dirty_page pages[8];
	uint8_t *p = with_ring(f);
	uint64_t word;
	unsigned n;

	assert_int_equal(kvmlet_dirty_get(f->vm, 1, &word, NPAGES), -ENXIO);
	assert_int_equal(kvmlet_dirty_ring_collect(f->vm, pages, 8, &n), 0);
	assert_int_equal(n, 0);
	for (unsigned i = 0; i < 3; i++)
		for (uint64_t page = 5; page < 8; page++)
			store(f, FAR + page * PG);
	assert_int_equal(kvmlet_dirty_ring_collect(f->vm, pages, 2, &n), 0);
	assert_int_equal(n, 2);
	assert_int_equal(pages[0].slot, 1);
	assert_int_equal(pages[0].page, 5);
	assert_int_equal(pages[1].page, 6);
	store(f, FAR + 5 * PG);
	assert_int_equal(kvmlet_dirty_ring_collect(f->vm, pages, 8, &n), 0);
	assert_int_equal(n, 2);
	assert_int_equal(pages[0].page, 7);
	assert_int_equal(pages[1].page, 5);
	assert_int_equal(kvmlet_dirty_ring_collect(f->vm, pages, 8, &n), 0);
	assert_int_equal(n, 0);
	munmap(p, MANY * PG);
}

/* D2: what the ring has no room for comes when there is some, and none of it is lost. */
static void full_ring(void **state)
{
	struct fixture *f = *state;
	struct kvmlet_dirty_page pages[64], more[201];
	uint8_t *p = with_ring(f);
	bool seen[MANY] = {false};
	unsigned n, all = 0;

	for (uint64_t page = 0; page < MANY; page++)
		store(f, FAR + page * PG);
	/* Never more than is asked for, in however many steps it is taken. */
	more[200].slot = 0x5eed;
	assert_int_equal(kvmlet_dirty_ring_collect(f->vm, more, 200, &n), 0);
	assert_int_equal(n, 200);
	assert_int_equal(more[200].slot, 0x5eed);
	for (; all < n; all++) {
		assert_true(more[all].page < MANY && !seen[more[all].page]);
		seen[more[all].page] = true;
	}
	do {
		assert_int_equal(kvmlet_dirty_ring_collect(f->vm, pages, 64, &n), 0);
		for (unsigned i = 0; i < n; i++) {
			assert_true(pages[i].page < MANY && !seen[pages[i].page]);
			seen[pages[i].page] = true;
			all++;
		}
	} while (n == 64);
	assert_int_equal(all, MANY);
	/* Written before its slot went: may come still, and does no harm. */
	store(f, FAR);
	assert_int_equal(kvmlet_memslot_set(f->vm, 1, 0, FAR, 0, kl_hva(p)), 0);
	assert_int_equal(kvmlet_dirty_ring_collect(f->vm, pages, 64, &n), 0);
	munmap(p, MANY * PG);
}

static void no_memory(void **state)
{
	struct fixture *f = *state;

	if (!kl_failpoints_enabled())
		skip();
	assert_int_equal(kvmlet_memslot_set(f->vm, 0, 0, 0, 0, kl_hva(f->ram)), 0);
	for (unsigned i = 0; i < 2; i++) {
		const char *site = i ? "dirty-ring-entries" : "dirty-ring";

		kl_failpoint_arm(site, 1);
		assert_int_equal(kvmlet_dirty_ring_create(f->vm, 256), -ENOMEM);
		assert_true(kl_failpoint_disarm(site));
	}
	assert_int_equal(kvmlet_dirty_ring_create(f->vm, 256), 0);
	kl_failpoint_arm("dirty-log-alloc", 1);
	assert_int_equal(log_on(f), -ENOMEM);
	assert_true(kl_failpoint_disarm("dirty-log-alloc"));
	assert_int_equal(log_on(f), 0);
}

/* D3: threads write while another reads the log; what it copies is what is there in the end. */
#define WRITES 20000u

struct writer {
	struct fixture *f;
	pthread_t thread;
	unsigned seed;
};
static _Atomic unsigned writing;

static void *write_some(void *arg)
{
	struct writer *w = arg;

	for (unsigned i = 0; i < WRITES; i++) {
		uint64_t gpa = (unsigned)rand_r(&w->seed) % (SIZE / 8) * 8;

		if (i % 4)
			store(w->f, gpa);
		else
			assert_int_equal(kvmlet_vm_fetch_add(w->f->vm, 0, gpa, 8, 1, NULL), 0);
	}
	atomic_fetch_sub(&writing, 1);
	return NULL;
}

static void a_copy(void **state)
{
	struct fixture *f = *state;
	static uint64_t copy[NPAGES][PG / 8];
	struct writer w[2];
	bool last;

	assert_int_equal(log_on(f), 0);
	atomic_store(&writing, 2);
	for (unsigned i = 0; i < 2; i++) {
		w[i] = (struct writer){.f = f, .seed = i + 1};
		assert_int_equal(pthread_create(&w[i].thread, NULL, write_some, &w[i]), 0);
	}
	memset(copy, 0, sizeof(copy));
	do {
		uint64_t pages;

		last = !atomic_load(&writing);
		for (pages = get(f); pages; pages &= pages - 1) {
			unsigned page = (unsigned)__builtin_ctzll(pages);

			for (unsigned i = 0; i < PG / 8; i++)
				assert_int_equal(kvmlet_vm_load(f->vm, 0, page * PG + i * 8, 8,
								&copy[page][i]),
						 0);
		}
	} while (!last);
	for (unsigned i = 0; i < 2; i++)
		pthread_join(w[i].thread, NULL);
	assert_memory_equal(copy, f->ram, SIZE);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
	const struct CMUnitTest tests[] = {
		TEST(every_writer), TEST(refusals),      TEST(manual),
		TEST(whole_words),  TEST(part_of_large), TEST(ring),
		TEST(full_ring),    TEST(no_memory),     TEST(a_copy),
	};

	cmocka_set_test_filter(getenv("KVMLET_TEST"));
	return cmocka_run_group_tests(tests, NULL, NULL);
}
