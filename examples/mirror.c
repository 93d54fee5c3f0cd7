/* SPDX-License-Identifier: MIT */
/*
 * A copy of one page of guest memory that is kept up to date by what writers are said to have
 * written (kvmlet/track.h), while two threads write to it: a display, or a shadow page table, is
 * kept in this way.
 *
 *     cc mirror.c $(pkg-config --cflags --libs kvmlet) -lpthread
 */
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <kvmlet/kvmlet.h>

#define PAGE   4096ul
#define GPA    0x10000ul
#define WRITES 100000u

/* Protects the copy. Not held around changes of the slots: callbacks take it. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint8_t copy[PAGE];
static int have_page; /* "is this gfn mine" */
static unsigned reports;

static struct kvmlet_vm *vm;

/* Two writers of one place may report in either order: what is in memory then is true. */
static void wrote(void *self, unsigned as, kl_gpa_t gpa, const void *bytes, size_t len)
{
	(void)self;
	(void)bytes;
	pthread_mutex_lock(&lock);
	if (have_page && gpa >= GPA && gpa < GPA + PAGE) {
		if (kvmlet_vm_read(vm, as, gpa, copy + (gpa - GPA), len, NULL))
			have_page = 0;
		reports++;
	}
	pthread_mutex_unlock(&lock);
}

static void gone(void *self, unsigned as, kl_gfn_t gfn, uint64_t npages)
{
	(void)self;
	(void)as;
	pthread_mutex_lock(&lock);
	if (GPA / PAGE >= gfn && GPA / PAGE < gfn + npages)
		have_page = 0;
	pthread_mutex_unlock(&lock);
}

static const struct kvmlet_track_ops ops = {wrote, gone};

static void *device(void *arg)
{
	unsigned me = *(unsigned *)arg;

	for (unsigned i = 0; i < WRITES; i++)
		if (kvmlet_vm_store(vm, 0, GPA + (i * 2 + me) % 512 * 8, 8, i))
			return arg;
	return NULL;
}

int main(void)
{
	uint8_t *page =
		mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct kvmlet_tracker *tracker;
	unsigned number[2] = {0, 1};
	pthread_t thread[2];
	void *failed[2];
	int same, err;

	if (page == MAP_FAILED)
		return 1;
	err = kvmlet_vm_create(&vm);
	if (!err)
		err = kvmlet_memslot_set(vm, 0, 0, GPA, PAGE, kl_hva(page));
	if (!err)
		err = kvmlet_track_register(vm, &ops, NULL, &tracker);
	if (err) {
		fprintf(stderr, "setup: %s\n", strerror(-err));
		return 1;
	}
	for (unsigned i = 0; i < 2; i++)
		pthread_create(&thread[i], NULL, device, &number[i]);

	/* First track the page, then read it: what is written from then on is reported. */
	pthread_mutex_lock(&lock);
	have_page = 1;
	err = kvmlet_track_add_page(vm, 0, GPA / PAGE);
	if (!err)
		err = kvmlet_vm_read(vm, 0, GPA, copy, PAGE, NULL);
	pthread_mutex_unlock(&lock);

	for (unsigned i = 0; i < 2; i++)
		pthread_join(thread[i], &failed[i]);
	same = have_page && !memcmp(copy, page, PAGE);
	printf("%u reports; the copy %s\n", reports, same ? "is the page" : "differs");

	/* Unplugged: told once, and nothing is tracked any more. */
	if (!err)
		err = kvmlet_memslot_set(vm, 0, 0, 0, 0, kl_hva(NULL));
	if (!err)
		err = kvmlet_track_unregister(tracker);
	kvmlet_vm_destroy(vm);
	return err || failed[0] || failed[1] || !same || have_page;
}
