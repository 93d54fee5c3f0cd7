/* SPDX-License-Identifier: MIT */
/*
 * Every step of the memory engine that can fail, failed in turn: at each of its passages in the
 * life of a VM (S2, N7). The step reports the errno, changes nothing, and works the second time.
 */
#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>
#include <cmocka.h>

#include "base/pool.h"
#include "base/racepoint.h"
#include "host/await.h"
#include "host/timer.h"
#include "mem/dirty_ring.h"
#include "mem/gmem.h"
#include "mem/gpc.h"
#include "mem/private.h"
#include "mem/vm.h"
#include "mmu/iobus.h"
#include "mmu/mmu.h"
#include "mmu/track.h"
#include "failpoint_sites.h"

#define PG     KL_PAGE_SIZE
#define NPAGES 16

static uint8_t *ram;

struct life {
	struct kl_vm vm;
	struct kl_vcpu_core vcpu;
	struct kl_gpc gpc;
	struct kl_gmem *file, *link;
	struct kl_iobus bus;
	int memfd, eventfd;
	bool alive;
	int expected; /* errno of the failing step; 0: nothing is armed */
	int failures;
};

/* What must not change when a step fails: pages held, and all that a lookup can tell. */
struct snapshot {
	uint64_t pages, generation;
	struct {
		uint64_t base_gfn, npages, hva;
		uint32_t flags, id, invalid;
	} slot[2 * NPAGES];
};

static void take_snapshot(struct life *l, struct snapshot *s)
{
	memset(s, 0, sizeof(*s));
	if (!l->alive) {
		s->pages = kl_pages_in_use();
		return;
	}
	s->generation = kl_generation(&l->vm, 0);
	for (unsigned i = 0; i < 2 * NPAGES; i++) {
		const struct kl_memslot *m = kl_memslot_find(kl_memslots(&l->vm, 0), i);

		if (!m)
			continue;
		s->slot[i].base_gfn = m->base_gfn;
		s->slot[i].npages = m->npages;
		s->slot[i].hva = m->hva;
		s->slot[i].flags = m->flags;
		s->slot[i].id = m->id + 1u;
		s->slot[i].invalid = m->invalid;
	}
}

static int set(struct life *l, uint32_t id, uint32_t flags, uint64_t gpa, uint64_t npages)
{
	struct kl_uapi_memory_region2 r = {id, flags, gpa, npages * PG, npages ? (uint64_t)ram : 0,
					   0,  0,     0,   {0}};

	return kl_set_memory_region(&l->vm, &r);
}

static int create_vm(struct life *l)
{
	int r = kl_vm_init(&l->vm);

	l->alive = !r;
	if (!r)
		kl_vm_make_private(&l->vm);
	return r;
}

static int make_ring(struct life *l)
{
	return kl_dirty_ring_make(&l->vm, 256);
}

static int start_timers(struct life *l)
{
	return kl_timer_get();
}

struct awaited {
	struct kl_await await;
	sem_t came;
};

static void page_came(struct kl_await *a)
{
	sem_post(&kl_container_of(a, struct awaited, await)->came);
}

static int await_page(struct life *l)
{
	struct awaited a = {.await.done = page_came};
	int r;

	(void)l;
	sem_init(&a.came, 0, 0);
	r = kl_await_start(&a.await, kl_hva(ram), true);
	if (!r) {
		while (sem_wait(&a.came))
			;
		r = a.await.result;
		kl_await_cancel(&a.await);
	}
	sem_destroy(&a.came);
	return r;
}

static int create_cache(struct life *l)
{
	return kl_gpc_init(&l->gpc, &l->vm, 0, KL_GPC_USER);
}

static int refresh_cache(struct life *l)
{
	return kl_gpc_refresh(&l->gpc, 8);
}

static int create_slot(struct life *l)
{
	return set(l, 0, 0, 0, NPAGES);
}

static int create_readonly_slot(struct life *l)
{
	return set(l, 1, KVM_MEM_READONLY, 0x40000000, NPAGES);
}

static int write_fault(struct life *l)
{
	return kl_mmu_fault(&l->vcpu, PG, KL_ACC_WRITE);
}

static int read_fault_elsewhere(struct life *l)
{
	return kl_mmu_fault(&l->vcpu, 0x40000000, KL_ACC_READ);
}

static int mmio_fault(struct life *l)
{
	int r = kl_mmu_fault(&l->vcpu, 0x80000000, KL_ACC_READ);

	return r == KL_FAULT_MMIO ? 0 : r;
}

static int log_slot(struct life *l)
{
	return set(l, 0, KVM_MEM_LOG_DIRTY_PAGES, 0, NPAGES);
}

/* The first of the slot, which makes the counts (T2). */
static int track_page(struct life *l)
{
	return kl_track_add(&l->vm, 0, 1);
}

static int move_slot(struct life *l)
{
	return set(l, 0, KVM_MEM_LOG_DIRTY_PAGES, NPAGES * PG, NPAGES);
}

static int delete_slot(struct life *l)
{
	return set(l, 0, 0, 0, 0);
}

static int create_file(struct life *l)
{
	return kl_gmem_create(&l->vm, l->memfd, NPAGES * PG, 0, &l->file);
}

static int link_file(struct life *l)
{
	return kl_gmem_link(l->file, &l->vm, &l->link);
}

static int create_bound_slot(struct life *l)
{
	struct kl_uapi_memory_region2 r = {
		2, KVM_MEM_GUEST_MEMFD, 0x20000000, NPAGES * PG, (uint64_t)ram, 0, 0, 0, {0}};

	return kl_set_memory_region_gmem(&l->vm, &r, l->link, 0);
}

static int convert(struct life *l)
{
	return kl_set_private(&l->vm, 0x20001, 0x20003, true);
}

static int private_fault(struct life *l)
{
	return kl_mmu_fault(&l->vcpu, 0x20001000, KL_ACC_READ);
}

static int delete_bound_slot(struct life *l)
{
	return set(l, 2, 0, 0, 0);
}

static int add_zone(struct life *l)
{
	const struct kvm_coalesced_mmio_zone z = {.addr = 0x1000, .size = 8};

	return kl_iobus_add_zone(&l->bus, &z);
}

static int del_zone(struct life *l)
{
	const struct kvm_coalesced_mmio_zone z = {.addr = 0x1000, .size = 8};

	return kl_iobus_del_zone(&l->bus, &z);
}

static int assign_eventfd(struct life *l)
{
	const struct kvm_ioeventfd a = {.addr = 0x2000, .len = 4, .fd = l->eventfd};

	return kl_iobus_ioeventfd(&l->bus, &a);
}

static int deassign_eventfd(struct life *l)
{
	const struct kvm_ioeventfd a = {
		.addr = 0x2000, .len = 4, .fd = l->eventfd, .flags = KVM_IOEVENTFD_FLAG_DEASSIGN};

	return kl_iobus_ioeventfd(&l->bus, &a);
}

static void step(struct life *l, int (*op)(struct life *l))
{
	struct snapshot before, after;
	int r;

	take_snapshot(l, &before);
	r = op(l);
	if (!r)
		return;
	assert_int_equal(r, l->expected);
	assert_int_equal(l->failures++, 0);
	take_snapshot(l, &after);
	assert_memory_equal(&before, &after, sizeof(before));
	assert_int_equal(op(l), 0);
}

static void live(struct life *l)
{
	uint64_t pages = kl_pages_in_use();

	step(l, create_vm);
	step(l, make_ring);
	step(l, start_timers);
	assert_int_equal(kl_vcpu_core_add(&l->vm, &l->vcpu, 0), 0);
	step(l, create_cache);
	/* Nothing is there yet, and nothing can fail. */
	assert_int_equal(kl_gpc_activate(&l->gpc, PG, 8), 0);
	step(l, create_slot);
	step(l, refresh_cache);
	kl_gpc_destroy(&l->gpc);
	step(l, create_readonly_slot);
	step(l, write_fault);
	step(l, read_fault_elsewhere);
	step(l, mmio_fault);
	step(l, log_slot);
	step(l, track_page);
	assert_int_equal(kl_track_remove(&l->vm, 0, 1), 0);
	step(l, move_slot);
	step(l, delete_slot);
	l->memfd = memfd_create("test-gmem", MFD_CLOEXEC);
	assert_int_equal(ftruncate(l->memfd, NPAGES * PG), 0);
	step(l, create_file);
	step(l, link_file);
	step(l, create_bound_slot);
	step(l, convert);
	step(l, private_fault);
	step(l, delete_bound_slot);
	kl_gmem_close(l->file);
	kl_gmem_close(l->link);
	close(l->memfd);
	kl_iobus_init(&l->bus, NULL);
	l->eventfd = eventfd(0, EFD_CLOEXEC);
	step(l, add_zone);
	step(l, assign_eventfd);
	step(l, deassign_eventfd);
	step(l, del_zone);
	close(l->eventfd);
	kl_iobus_destroy(&l->bus);
	kl_timer_put();
	kl_await_get();
	step(l, await_page);
	kl_await_put();
	kl_vm_destroy(&l->vm);
	assert_int_equal(kl_pages_in_use(), pages);
}

static int errno_of(const char *name)
{
	if (!strcmp(name, "populate"))
		return -EFAULT;
	if (!strcmp(name, "populate-hwpoison"))
		return -EHWPOISON;
	if (!strcmp(name, "timer-thread") || !strcmp(name, "await-thread"))
		return -EAGAIN;
	if (!strcmp(name, "gmem-open"))
		return -EMFILE;
	return -ENOMEM;
}

/* S2, N7: each failure is reported, once, and leaves nothing behind. */
static void fail_each_in_turn(void **state)
{
	struct life *l = *state;
	struct sites sites = {.n = 0};

	if (!kl_failpoints_enabled())
		skip();
	kl_failpoint_count_start();
	live(l);
	kl_failpoint_count_stop();
	kl_failpoint_each(note_site, &sites);
	assert_true(sites.n >= 4);
	for (unsigned i = 0; i < sites.n; i++) {
		unsigned silent = 0;

		/*
		 * Nobody is told: a picture lacks a slot (tests/unit/test_heat.c), a leaf is small
		 * (tests/unit/test_stage2.c).
		 */
		if (!strcmp(sites.s[i].name, "heat-record") ||
		    !strcmp(sites.s[i].name, "host-mapping"))
			continue;
		/* Each is on the way; a new one that is not belongs into live(). */
		if (!sites.s[i].passed)
			fail_msg("failpoint %s was not passed", sites.s[i].name);
		for (unsigned nth = 1; nth <= sites.s[i].passed; nth++) {
			memset(l, 0, sizeof(*l));
			l->expected = errno_of(sites.s[i].name);
			kl_failpoint_arm(sites.s[i].name, nth);
			live(l);
			assert_true(kl_failpoint_disarm(sites.s[i].name));
			silent += !l->failures;
		}
		/* Only the entry that caches "no slot" may be missing without anybody noticing. */
		if (silent && strcmp(sites.s[i].name, "page-alloc") &&
		    strcmp(sites.s[i].name, "mmu-table"))
			fail_msg("a failure of %s was not reported", sites.s[i].name);
		assert_true(silent < sites.s[i].passed);
	}
}

/* Armed for the n-th passage means that one only; a misspelt name does not go unnoticed. */
static void nth_passage(void **state)
{
	void *p[4];

	(void)state;
	if (!kl_failpoints_enabled())
		skip();
	kl_failpoint_arm("page-alloc", 3);
	for (int i = 0; i < 4; i++)
		p[i] = kl_page_alloc();
	assert_true(kl_failpoint_disarm("page-alloc"));
	assert_false(kl_failpoint_disarm("page-alloc"));
	assert_non_null(p[0]);
	assert_non_null(p[1]);
	assert_null(p[2]);
	assert_non_null(p[3]);
	kl_failpoint_arm("page-alloc", 1);
	assert_false(kl_failpoint_disarm("page-alloc"));
	for (int i = 0; i < 4; i++)
		kl_page_free(p[i]);
	assert_null(kl_testpoint_find(KL_FAILPOINT, "no-such-place"));
	assert_null(kl_testpoint_find(KL_RACEPOINT, "page-alloc"));
}

static int setup(void **state)
{
	*state = memset(aligned_alloc(64, sizeof(struct life)), 0, sizeof(struct life));
	ram = mmap(NULL, NPAGES * PG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	return ram == MAP_FAILED;
}

static int teardown(void **state)
{
	munmap(ram, NPAGES * PG);
	free(*state);
	return 0;
}

static void *pass_racepoint(void *arg)
{
	racepoint("test-place");
	return arg;
}

/* A racepoint works whatever was released before without being armed, or armed twice. */
static void released_unarmed(void **state)
{
	pthread_t t;

	(void)state;
	if (!kl_racepoints_enabled())
		skip();
	kl_racepoint_release("test-place");
	kl_racepoint_release("test-place");
	for (int i = 0; i < 2; i++) {
		kl_racepoint_arm("test-place", 1);
		kl_racepoint_arm("test-place", 1);
		assert_int_equal(pthread_create(&t, NULL, pass_racepoint, NULL), 0);
		assert_true(kl_racepoint_wait("test-place", 10000));
		kl_racepoint_release("test-place");
		pthread_join(t, NULL);
	}
	pass_racepoint(NULL); /* and is off again */
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(nth_passage),
		cmocka_unit_test(released_unarmed),
		cmocka_unit_test_setup_teardown(fail_each_in_turn, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
