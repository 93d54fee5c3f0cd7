/* SPDX-License-Identifier: MIT */
/*
 * A free list over chunks of raw mmap. Chunks are never given back one by one; pages on the
 * free list beyond a limit give their memory back to the kernel with MADV_DONTNEED, which
 * also zeroes them.
 */
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>

#include "base/failpoint.h"
#include "base/log.h"
#include "base/pool.h"
#include "base/syscall.h"

#define CHUNK_PAGES 64
#define KEEP_PAGES  1024 /* resident pages on the free list */

struct free_page {
	struct free_page *next;
};

/* A leaf by nature: nothing is taken inside. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct free_page *free_list;
static uint64_t in_use, nr_free;

static bool grow(void)
{
	size_t len = CHUNK_PAGES * KL_PAGE_SIZE;
	long p = kl_sys(SYS_mmap, NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			-1, 0);

	if (p < 0)
		return false;
	for (size_t off = 0; off < len; off += KL_PAGE_SIZE) {
		struct free_page *fp = (struct free_page *)(p + (long)off);

		fp->next = free_list;
		free_list = fp;
		nr_free++;
	}
	return true;
}

void *kl_page_alloc(void)
{
	struct free_page *p = NULL;

	if (kl_failpoint("page-alloc"))
		return NULL;
	pthread_mutex_lock(&lock);
	if (free_list || grow()) {
		p = free_list;
		free_list = p->next;
		nr_free--;
		in_use++;
	}
	pthread_mutex_unlock(&lock);
	if (p)
		memset(p, 0, KL_PAGE_SIZE);
	return p;
}

void kl_page_free(void *page)
{
	struct free_page *p = page;

	if (!p)
		return;
	pthread_mutex_lock(&lock);
	KL_ASSERT(in_use > 0);
	in_use--;
	if (nr_free >= KEEP_PAGES)
		kl_sys(SYS_madvise, p, KL_PAGE_SIZE, MADV_DONTNEED);
	p->next = free_list;
	free_list = p;
	nr_free++;
	pthread_mutex_unlock(&lock);
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
