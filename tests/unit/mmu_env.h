/* SPDX-License-Identifier: MIT */
/*
 * A VM with one slot of NPAGES pages at guest-physical 0, for tests of stage 2 under change.
 *
 * A "vCPU" here is a thread that follows the protocol of mem/vcpu_core.h without executing
 * guest code: it looks pages up and stores through the pointer while IN_GUEST.
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
#include <unistd.h>
#include <cmocka.h>

#include "base/pool.h"
#include "base/racepoint.h"
#include "host/access.h"
#include "host/guard.h"
#include "host/sys.h"
#include "mem/notifier.h"
#include "mem/vm.h"
#include "mmu/mmu.h"

#define PG      KL_PAGE_SIZE
#define NPAGES  16
#define TIMEOUT wait_ms()

/* How long a test waits for what must happen. tests/mutants, where it may not, shortens it. */
static inline int wait_ms(void)
{
	const char *ms = getenv("KVMLET_TEST_WAIT_MS");

	return ms ? atoi(ms) : 10000;
}

struct fixture {
	struct kl_vm vm;
	struct kl_vcpu_core vcpu;
	uint8_t *ram;
	uint64_t pages_before;
};

static inline int set(struct kl_vm *vm, uint32_t slot, uint32_t flags, uint64_t gpa, uint64_t size,
		      void *hva)
{
	struct kl_uapi_memory_region2 r = {slot, flags, gpa, size, (uint64_t)hva, 0, 0, 0, {0}};

	return kl_set_memory_region(vm, &r);
}

static inline int setup(void **state)
{
	struct fixture *f = calloc(1, sizeof(*f));

	*state = f;
	f->pages_before = kl_pages_in_use();
	f->ram =
		mmap(NULL, NPAGES * PG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	return f->ram == MAP_FAILED || kl_vm_init(&f->vm) ||
	       kl_vcpu_core_add(&f->vm, &f->vcpu, 0) || set(&f->vm, 0, 0, 0, NPAGES * PG, f->ram);
}

static inline int teardown(void **state)
{
	struct fixture *f = *state;

	kl_vm_destroy(&f->vm);
	munmap(f->ram, NPAGES * PG);
	/* No page table leaks, whatever happened. */
	if (kl_pages_in_use() != f->pages_before)
		return -1;
	free(f);
	return 0;
}

static inline bool mapped(struct fixture *f, uint64_t gpa, unsigned access)
{
	bool writable, mmio, there;

	kl_vcpu_enter_guest(&f->vcpu);
	kl_vcpu_take_requests(&f->vcpu, KL_REQ_TLB_FLUSH);
	there = kl_mmu_lookup(&f->vcpu, gpa, access, &writable, &mmio) != NULL;
	kl_vcpu_leave_guest(&f->vcpu);
	return there;
}

static inline bool mmio_cached(struct fixture *f, uint64_t gpa)
{
	bool writable, mmio;

	kl_vcpu_enter_guest(&f->vcpu);
	kl_mmu_lookup(&f->vcpu, gpa, KL_ACC_READ, &writable, &mmio);
	kl_vcpu_leave_guest(&f->vcpu);
	return mmio;
}

static inline struct kl_notifier_range range_of(void *p, size_t len)
{
	return (struct kl_notifier_range){
		.start = (uint64_t)p, .end = (uint64_t)p + len, .may_block = true};
}

struct faulter {
	struct fixture *f;
	uint64_t gpa;
	unsigned access;
	int r;
};

static inline void *fault_thread(void *arg)
{
	struct faulter *t = arg;

	t->r = kl_mmu_fault(&t->f->vcpu, t->gpa, t->access);
	return NULL;
}

#define NEED_RACEPOINTS                       \
	do {                                  \
		if (!kl_racepoints_enabled()) \
			skip();               \
	} while (0)

struct slot_change {
	struct fixture *f;
	uint64_t gpa, size;
	int r;
};

static inline void *change_slot_1(void *arg)
{
	struct slot_change *c = arg;

	c->r = set(&c->f->vm, 1, 0, c->gpa, c->size, c->f->ram);
	return NULL;
}

/* @size bytes, aligned to it. */
static inline uint8_t *map_aligned(size_t size, int prot)
{
	uint8_t *p = mmap(NULL, 2 * size, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), *a;

	assert_true(p != MAP_FAILED);
	a = (uint8_t *)(((uint64_t)p + size - 1) & ~(size - 1));
	munmap(p, (size_t)(a - p));
	munmap(a + size, (size_t)(p + size - a));
	return a;
}

/* The same, all of it written. */
static inline uint8_t *map_written(size_t size)
{
	uint8_t *a = map_aligned(size, PROT_READ | PROT_WRITE);

	memset(a, 1, size);
	return a;
}

struct bracket {
	struct fixture *f;
	_Atomic bool begun, finish;
};

static inline void *bracket_thread(void *arg)
{
	struct bracket *b = arg;
	struct kl_notifier_range r = range_of(b->f->ram, PG);

	assert_int_equal(kl_notifier_begin(&r), 0);
	atomic_store(&b->begun, true);
	while (!atomic_load(&b->finish))
		kl_cpu_relax();
	kl_notifier_end(&r);
	return NULL;
}
