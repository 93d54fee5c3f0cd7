/* SPDX-License-Identifier: MIT */
/*
 * Chunks of raw mmap, aligned to their size, so that a page's chunk is found by masking. The
 * first page of a chunk is its header. A chunk all of whose pages are free goes back to the
 * kernel, except for a few.
 */
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>

#include "base/failpoint.h"
#include "base/log.h"
#include "base/pool.h"
#include "base/syscall.h"

#define CHUNK_SIZE  (256 * KL_PAGE_SIZE)
#define CHUNK_PAGES (CHUNK_SIZE / KL_PAGE_SIZE)
#define WORDS       (CHUNK_PAGES / 64)
#define KEEP_CHUNKS 4 /* wholly free */

struct chunk {
	struct chunk *next, *prev; /* of the list of those with a free page */
	unsigned nr_free;
	uint64_t free[WORDS];
	uint64_t used[WORDS]; /* was handed out since it came from the kernel: not zero */
};

/* A leaf by nature: nothing is taken inside. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct chunk *with_free;
static unsigned nr_empty;
static uint64_t in_use;

static void list_add(struct chunk *c)
{
	c->prev = NULL;
	c->next = with_free;
	if (with_free)
		with_free->prev = c;
	with_free = c;
}

static void list_del(struct chunk *c)
{
	if (c->prev)
		c->prev->next = c->next;
	else
		with_free = c->next;
	if (c->next)
		c->next->prev = c->prev;
}

static bool grow(void)
{
	long p = kl_sys(SYS_mmap, NULL, 2 * CHUNK_SIZE, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct chunk *c;
	long start;

	if (p < 0)
		return false;
	start = (p + (long)CHUNK_SIZE - 1) & -(long)CHUNK_SIZE;
	if (start > p)
		kl_sys(SYS_munmap, p, start - p);
	kl_sys(SYS_munmap, start + (long)CHUNK_SIZE, p + (long)CHUNK_SIZE - start);
	c = (struct chunk *)start;
	memset(c->free, 0xff, sizeof(c->free));
	c->free[0] &= ~1ull; /* the header */
	c->nr_free = CHUNK_PAGES - 1;
	nr_empty++;
	list_add(c);
	return true;
}

/* Context: lock. Some page of @c is free. */
static void *take(struct chunk *c, bool *zero)
{
	unsigned w = 0, bit;

	while (!c->free[w])
		w++;
	bit = (unsigned)__builtin_ctzll(c->free[w]);
	c->free[w] &= ~(1ull << bit);
	*zero = !(c->used[w] & 1ull << bit);
	c->used[w] |= 1ull << bit;
	if (c->nr_free-- == CHUNK_PAGES - 1)
		nr_empty--;
	if (!c->nr_free)
		list_del(c);
	in_use++;
	return (char *)c + (w * 64 + bit) * KL_PAGE_SIZE;
}

void *kl_page_alloc(void)
{
	void *page = NULL;
	bool zero = true;

	if (kl_failpoint("page-alloc"))
		return NULL;
	pthread_mutex_lock(&lock);
	if (with_free || grow())
		page = take(with_free, &zero);
	pthread_mutex_unlock(&lock);
	if (page && !zero)
		memset(page, 0, KL_PAGE_SIZE);
	return page;
}

void kl_page_free(void *page)
{
	struct chunk *c = (struct chunk *)((uintptr_t)page & -CHUNK_SIZE);
	unsigned n = (unsigned)(((uintptr_t)page - (uintptr_t)c) / KL_PAGE_SIZE);

	if (!page)
		return;
	pthread_mutex_lock(&lock);
	KL_ASSERT(in_use > 0 && !(c->free[n / 64] & 1ull << n % 64));
	in_use--;
	c->free[n / 64] |= 1ull << n % 64;
	if (!c->nr_free++)
		list_add(c);
	if (c->nr_free < CHUNK_PAGES - 1) {
		c = NULL;
	} else if (nr_empty < KEEP_CHUNKS) {
		nr_empty++;
		c = NULL;
	} else {
		list_del(c);
	}
	pthread_mutex_unlock(&lock);
	if (c)
		kl_sys(SYS_munmap, c, CHUNK_SIZE);
}

uint64_t kl_pages_in_use(void)
{
	uint64_t n;

	pthread_mutex_lock(&lock);
	n = in_use;
	pthread_mutex_unlock(&lock);
	return n;
}

void kl_pool_after_fork(void)
{
	pthread_mutex_init(&lock, NULL);
}
