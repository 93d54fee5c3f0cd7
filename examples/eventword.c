/* SPDX-License-Identifier: MIT */
/*
 * Two device threads count events in a page that they share with a guest, through one cache, while
 * the VMM moves that page around in the guest, takes it away and brings it back.
 *
 *     cc eventword.c $(pkg-config --cflags --libs kvmlet) -lpthread
 */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <kvmlet/kvmlet.h>

#define PAGE   4096ul
#define EVENTS 200000u
#define WORD   128u /* in the page */

static struct kvmlet_gpc *gpc;
static _Atomic unsigned missed, device_errors;

/* An event: some nanoseconds, unless somebody changes the memory just now. */
static int notify(void)
{
	void *word;
	int err = kvmlet_gpc_lock(gpc, sizeof(uint64_t), &word);

	if (err)
		return err;
	atomic_fetch_add((_Atomic uint64_t *)word, 1);
	kvmlet_gpc_unlock(gpc, 1);
	return 0;
}

static void *device(void *arg)
{
	for (unsigned i = 0; i < EVENTS; i++) {
		int err = notify();

		if (err == -EFAULT) /* unplugged: a real device would note it and go on */
			missed++;
		else if (err)
			device_errors++;
	}
	return arg;
}

static int fail(const char *what, int err)
{
	fprintf(stderr, "%s: %s\n", what, strerror(-err));
	return 1;
}

int main(void)
{
	uint8_t *page =
		mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct kvmlet_vm *vm;
	pthread_t threads[2];
	uint64_t counted;
	int err;

	if (page == MAP_FAILED)
		return fail("mmap", -errno);
	err = kvmlet_vm_create(&vm);
	if (!err)
		err = kvmlet_memslot_set(vm, 0, 0, 0x10000, PAGE, kl_hva(page));
	if (!err)
		err = kvmlet_gpc_init(vm, 0, &gpc);
	if (!err)
		err = kvmlet_gpc_activate(gpc, 0x10000 + WORD, sizeof(uint64_t));
	if (err)
		return fail("setup", err);

	for (unsigned i = 0; i < 2; i++)
		pthread_create(&threads[i], NULL, device, NULL);
	for (unsigned i = 0; i < 100 && !err; i++) {
		/* Unplug it, and plug it in again: devices see -EFAULT in between, never a crash.
		 */
		err = kvmlet_memslot_set(vm, 0, 0, 0, 0, kl_hva(NULL));
		if (!err)
			err = kvmlet_memslot_set(vm, 0, 0, 0x10000, PAGE, kl_hva(page));
		/* Protect it: while the bracket is open nobody gets a pointer to it, and they wait.
		 */
		struct kvmlet_notifier_range r = {.start = kl_hva(page).addr,
						  .end = kl_hva(page).addr + PAGE,
						  .may_block = 1,
						  .event = KVMLET_EVENT_PROTECT};

		if (!err)
			err = kvmlet_notifier_begin(&r);
		if (!err) {
			mprotect(page, PAGE, PROT_NONE);
			sched_yield();
			mprotect(page, PAGE, PROT_READ | PROT_WRITE);
			kvmlet_notifier_end(&r);
		}
	}
	for (unsigned i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	if (err || device_errors)
		return fail("while devices ran", err ? err : -EIO);

	kvmlet_gpc_destroy(gpc);
	kvmlet_vm_destroy(vm);
	memcpy(&counted, page + WORD, sizeof(counted));
	printf("%lu events, %u while the page was unplugged\n", counted, (unsigned)missed);
	return counted + missed != 2ul * EVENTS;
}
