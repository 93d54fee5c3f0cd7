/* SPDX-License-Identifier: MIT */
/*
 * A VM of the library, for the tests of its public functions:
 *   address space 0, gpa 0             NPAGES pages of anonymous memory (f->ram), slot 0
 *   the rest                           no slot
 */
#pragma once

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>
#include <cmocka.h>

#include "base/racepoint.h"
#include "host/thread.h"
#include "mmu/api.h"

#define PG      KL_PAGE_SIZE
#define NPAGES  16
#define TIMEOUT 10000

struct fixture {
	struct kvmlet_vm *vm;
	uint8_t *ram;
};

#define NEED_RACEPOINTS                       \
	do {                                  \
		if (!kl_racepoints_enabled()) \
			skip();               \
	} while (0)

KL_UNUSED static uint8_t *new_memory(size_t size)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	assert_ptr_not_equal(p, MAP_FAILED);
	return p;
}

KL_UNUSED static int setup(void **state)
{
	struct fixture *f = calloc(1, sizeof(*f));

	*state = f;
	f->ram = new_memory(NPAGES * PG);
	return kvmlet_vm_create(&f->vm) ||
	       kvmlet_memslot_set(f->vm, 0, 0, 0, NPAGES * PG, kl_hva(f->ram));
}

KL_UNUSED static int teardown(void **state)
{
	struct fixture *f = *state;

	kvmlet_vm_destroy(f->vm);
	/* Whatever was called has left the engine (U3). */
	if (kl_self.depth || kl_self.only_listed)
		return -1;
	munmap(f->ram, NPAGES * PG);
	free(f);
	return 0;
}

KL_UNUSED static struct kvmlet_notifier_range range_of(void *p, size_t len)
{
	return (struct kvmlet_notifier_range){
		.start = kl_hva(p).addr, .end = kl_hva(p).addr + len, .may_block = 1};
}

/* Not there any more; still reserved, so that nothing else comes to lie there. */
KL_UNUSED static void vanish(void *p, size_t len)
{
	assert_ptr_equal(mmap(p, len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0),
			 p);
}

/* The same in brackets, as a program does it. */
KL_UNUSED static void unmap(void *p, size_t len)
{
	struct kvmlet_notifier_range r = range_of(p, len);

	assert_int_equal(kvmlet_notifier_begin(&r), 0);
	vanish(p, len);
	kvmlet_notifier_end(&r);
}
