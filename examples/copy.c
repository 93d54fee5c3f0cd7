/* SPDX-License-Identifier: MIT */
/*
 * A copy of guest memory that is made while two threads write to it, as for a live migration: all
 * of it, then in rounds what was written meanwhile (kvmlet/dirty.h), and the rest when the writers
 * have stopped. Once with a bitmap, once with a ring.
 *
 *     cc copy.c $(pkg-config --cflags --libs kvmlet) -lpthread
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <kvmlet/kvmlet.h>

#define PAGE   4096ul
#define PAGES  2048ul
#define GPA    0x100000ul
#define SLOT   3u
#define ROUNDS 20

static struct kvmlet_vm *vm;
static uint8_t *memory, *copy;
static atomic_int stop;

static void check(int err, const char *what)
{
	if (!err)
		return;
	fprintf(stderr, "%s: %s\n", what, strerror(-err));
	exit(1);
}

static void *device(void *arg)
{
	unsigned seed = (unsigned)(size_t)arg;

	while (!atomic_load(&stop)) {
		/* Most writes go to few pages, as with most programs. */
		uint64_t page = (unsigned)rand_r(&seed) % (rand_r(&seed) % 16 ? 32 : PAGES);

		check(kvmlet_vm_fetch_add(vm, 0, GPA + page * PAGE, 8, 1, NULL), "device");
	}
	return NULL;
}

static void copy_page(uint64_t page)
{
	check(kvmlet_vm_read(vm, 0, GPA + page * PAGE, copy + page * PAGE, PAGE, NULL), "copy");
}

/* Returns how many pages it copied. */
static unsigned long round_with_bitmap(void)
{
	uint64_t bitmap[PAGES / 64];
	unsigned long n = 0;

	check(kvmlet_dirty_get(vm, SLOT, bitmap, PAGES), "get");
	for (uint64_t page = 0; page < PAGES; page++) {
		if (!(bitmap[page / 64] >> page % 64 & 1))
			continue;
		copy_page(page);
		n++;
	}
	return n;
}

static unsigned long round_with_ring(void)
{
	struct kvmlet_dirty_page pages[64];
	unsigned long all = 0;
	unsigned n;

	do {
		check(kvmlet_dirty_ring_collect(vm, pages, 64, &n), "collect");
		for (unsigned i = 0; i < n; i++)
			copy_page(pages[i].page);
		all += n;
	} while (n == 64 && all < PAGES); /* devices may write as fast as we read */
	return all;
}

static int migrate(int ring)
{
	unsigned long (*round)(void) = ring ? round_with_ring : round_with_bitmap;
	unsigned long n = 0, last;
	pthread_t thread[2];
	int same;

	check(kvmlet_vm_create(&vm), "create");
	if (ring)
		check(kvmlet_dirty_ring_create(vm, 1024), "ring");
	check(kvmlet_memslot_set(vm, SLOT, KVMLET_MEM_LOG_DIRTY, GPA, PAGES * PAGE, kl_hva(memory)),
	      "slot");
	atomic_store(&stop, 0);
	for (unsigned i = 0; i < 2; i++)
		pthread_create(&thread[i], NULL, device, (void *)(size_t)(i + 1));

	for (uint64_t page = 0; page < PAGES; page++)
		copy_page(page);
	for (unsigned i = 0; i < ROUNDS; i++)
		n += round();
	/* Now the guest is down for a moment. */
	atomic_store(&stop, 1);
	for (unsigned i = 0; i < 2; i++)
		pthread_join(thread[i], NULL);
	last = 0;
	for (unsigned long more; (more = round()) > 0;)
		last += more;

	same = !memcmp(copy, memory, PAGES * PAGE);
	printf("with a %s: %lu pages while it was written, %lu at the end; the copy %s\n",
	       ring ? "ring" : "bitmap", n, last, same ? "is the memory" : "differs");
	kvmlet_vm_destroy(vm);
	return same;
}

int main(void)
{
	memory = mmap(NULL, 2 * PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
		      -1, 0);
	if (memory == MAP_FAILED)
		return 1;
	copy = memory + PAGES * PAGE;
	return !migrate(0) || !migrate(1);
}
