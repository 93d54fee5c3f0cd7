/* SPDX-License-Identifier: MIT */
/* Pages for page tables: zeroed, distinct, and given back to the kernel. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

#include "base/pool.h"

#define N 20000

static void *page[N];

static long resident_pages(void)
{
	FILE *f = fopen("/proc/self/statm", "re");
	long size, resident = 0;

	assert_non_null(f);
	assert_int_equal(fscanf(f, "%ld %ld", &size, &resident), 2);
	fclose(f);
	return resident;
}

static bool is_zero(const unsigned char *p)
{
	return p[0] == 0 && !memcmp(p, p + 1, KL_PAGE_SIZE - 1);
}

static void take_all(void)
{
	for (unsigned i = 0; i < N; i++) {
		page[i] = kl_page_alloc();
		assert_non_null(page[i]);
		assert_int_equal((uintptr_t)page[i] % KL_PAGE_SIZE, 0);
		assert_true(is_zero(page[i]));
		memset(page[i], (int)i | 1, KL_PAGE_SIZE);
	}
	for (unsigned i = 0; i < N; i++)
		assert_int_equal(*(unsigned char *)page[i], (unsigned char)(i | 1));
}

/* M5: what a zap frees does not stay with the process. */
static void memory_goes_back(void **state)
{
	uint64_t before = kl_pages_in_use();
	long resident = resident_pages();

	take_all();
	assert_int_equal(kl_pages_in_use(), before + N);
	assert_true(resident_pages() >= resident + N / 2);
	/* In another order than they came. */
	for (unsigned i = 0; i < N; i++)
		kl_page_free(page[(i * 7919ull) % N]);
	assert_int_equal(kl_pages_in_use(), before);
	if (!KL_TSAN) /* whose shadow grows with it, and stays */
		assert_true(resident_pages() < resident + N / 4);
}

/* Pages that were used before are zero again; holes are filled. */
static void reuse(void **state)
{
	uint64_t before = kl_pages_in_use();

	take_all();
	for (unsigned i = 0; i < N; i += 2)
		kl_page_free(page[i]);
	for (unsigned i = 0; i < N; i += 2) {
		page[i] = kl_page_alloc();
		assert_true(is_zero(page[i]));
		memset(page[i], (int)i | 1, KL_PAGE_SIZE);
	}
	for (unsigned i = 0; i < N; i++) {
		assert_int_equal(*(unsigned char *)page[i], (unsigned char)(i | 1));
		kl_page_free(page[i]);
	}
	assert_int_equal(kl_pages_in_use(), before);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(memory_goes_back),
		cmocka_unit_test(reuse),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
