/* SPDX-License-Identifier: MIT */
/*
 * The dirty bitmap as stage 2 keeps it (D1, D3, D4, M7).
 */
#include "mmu_env.h"

#include "mmu/dirty.h"

#define MB  (1ul << 20)
#define GPA (1ul << 32)
#define LOG KVM_MEM_LOG_DIRTY_PAGES

#define ROUNDS 100

static uint64_t get_log(struct fixture *f)
{
	uint64_t word = ~0ull;

	assert_int_equal(kl_dirty_log_get(&f->vm, 0, 0, &word), 0);
	return word;
}

static int log_on(struct fixture *f)
{
	return set(&f->vm, 0, LOG, 0, NPAGES * PG, f->ram);
}

/* D1: errors as KVM's. */
static void errors(void **state)
{
	struct fixture *f = *state;
	uint64_t word;

	assert_int_equal(kl_dirty_log_get(&f->vm, 0, 0, &word), -ENOENT);
	assert_int_equal(kl_dirty_log_get(&f->vm, 0, 1, &word), -ENOENT);
	assert_int_equal(kl_dirty_log_get(&f->vm, 0, KL_USER_MEM_SLOTS, &word), -EINVAL);
	assert_int_equal(kl_dirty_log_get(&f->vm, KL_NR_AS, 0, &word), -EINVAL);
	assert_int_equal(log_on(f), 0);
	assert_int_equal(kl_dirty_log_get(&f->vm, 0, 0, &word), 0);
	assert_int_equal(set(&f->vm, 0, 0, 0, NPAGES * PG, f->ram), 0);
	assert_int_equal(kl_dirty_log_get(&f->vm, 0, 0, &word), -ENOENT);
}

/* D1, D3: what is written is in the next log, once; what is read is not. */
static void writes_are_logged(void **state)
{
	struct fixture *f = *state;

	assert_int_equal(log_on(f), 0);
	assert_int_equal(kl_mmu_fault(&f->vcpu, 2 * PG, KL_ACC_READ), KL_FAULT_MAPPED);
	assert_int_equal(kl_mmu_fault(&f->vcpu, 3 * PG, KL_ACC_WRITE), KL_FAULT_MAPPED);
	assert_int_equal(kl_mmu_fault(&f->vcpu, 15 * PG, KL_ACC_WRITE), KL_FAULT_MAPPED);
	assert_true(mapped(f, 3 * PG, KL_ACC_WRITE));
	assert_int_equal(get_log(f), 1u << 3 | 1u << 15);
	/* Write-protected, not zapped. */
	assert_false(mapped(f, 3 * PG, KL_ACC_WRITE));
	assert_true(mapped(f, 3 * PG, KL_ACC_READ));
	assert_int_equal(get_log(f), 0);
	assert_int_equal(kl_mmu_fault(&f->vcpu, 3 * PG, KL_ACC_WRITE), KL_FAULT_MAPPED);
	assert_int_equal(get_log(f), 1u << 3);
}

/* D4: what was writable before logging began has to fault. */
static void logging_protects(void **state)
{
	struct fixture *f = *state;

	assert_int_equal(kl_mmu_fault(&f->vcpu, 0, KL_ACC_WRITE), KL_FAULT_MAPPED);
	assert_true(mapped(f, 0, KL_ACC_WRITE));
	assert_int_equal(log_on(f), 0);
	assert_false(mapped(f, 0, KL_ACC_WRITE));
	assert_true(mapped(f, 0, KL_ACC_READ));
	assert_int_equal(get_log(f), 0);
}

static uint8_t *resident(size_t size)
{
	uint8_t *p = mmap(NULL, 2 * size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
			  0),
		*a;

	assert_true(p != MAP_FAILED);
	a = (uint8_t *)(((uint64_t)p + size - 1) & ~(size - 1));
	munmap(p, (size_t)(a - p));
	munmap(a + size, (size_t)(p + size - a));
	memset(a, 1, size);
	return a;
}

/* D4, M1: large leaves go when logging begins, and come back when it ends. */
static void large_leaves(void **state)
{
	struct fixture *f = *state;
	struct kl_vm_stats *s = &f->vm.stats;
	uint8_t *p = resident(2 * MB);
	uint64_t bitmap[8];

	assert_int_equal(set(&f->vm, 1, 0, GPA, 2 * MB, p), 0);
	assert_int_equal(kl_mmu_fault(&f->vcpu, GPA, KL_ACC_WRITE), KL_FAULT_MAPPED);
	assert_int_equal(kl_stat_get(&s->pages_2m), 1);
	assert_int_equal(set(&f->vm, 1, LOG, GPA, 2 * MB, p), 0);
	assert_int_equal(kl_stat_get(&s->pages_2m), 0);
	assert_int_equal(kl_mmu_fault(&f->vcpu, GPA + 65 * PG, KL_ACC_WRITE), KL_FAULT_MAPPED);
	assert_int_equal(kl_stat_get(&s->pages_4k), 1);
	assert_false(mapped(f, GPA, KL_ACC_READ));
	assert_int_equal(kl_dirty_log_get(&f->vm, 0, 1, bitmap), 0);
	for (int i = 0; i < 8; i++)
		assert_int_equal(bitmap[i], i == 1 ? 2 : 0);
	assert_int_equal(set(&f->vm, 1, 0, GPA, 2 * MB, p), 0);
	assert_int_equal(kl_mmu_fault(&f->vcpu, GPA + 65 * PG, KL_ACC_WRITE), KL_FAULT_MAPPED);
	assert_int_equal(kl_stat_get(&s->pages_2m), 1);
	assert_int_equal(kl_stat_get(&s->pages_4k), 0);
	munmap(p, 2 * MB);
}

/* D3: a bitmap that can't be written loses nothing. */
static void bad_bitmap(void **state)
{
	struct fixture *f = *state;

	assert_int_equal(log_on(f), 0);
	assert_int_equal(kl_mmu_fault(&f->vcpu, 4 * PG, KL_ACC_WRITE), KL_FAULT_MAPPED);
	assert_int_equal(kl_dirty_log_get(&f->vm, 0, 0, NULL), -EFAULT);
	assert_int_equal(get_log(f), 1u << 4);
}

static void *log_thread(void *arg)
{
	struct fixture *f = arg;

	return (void *)get_log(f);
}

/*
 * D3: the vCPU holds a writable translation when its page is taken from the log. The log waits
 * for it, so that a store after the call faults.
 */
static void log_waits_for_guest_mode(void **state)
{
	struct fixture *f = *state;
	bool writable, mmio;
	pthread_t t;
	void *word;

	assert_int_equal(log_on(f), 0);
	assert_int_equal(kl_mmu_fault(&f->vcpu, 0, KL_ACC_WRITE), KL_FAULT_MAPPED);
	kl_vcpu_take_requests(&f->vcpu, KL_REQ_TLB_FLUSH);
	kl_vcpu_enter_guest(&f->vcpu);
	assert_non_null(kl_mmu_lookup(&f->vcpu, 0, KL_ACC_WRITE, &writable, &mmio));
	pthread_create(&t, NULL, log_thread, f);
	while (!(kl_vcpu_requests(&f->vcpu) & KL_REQ_TLB_FLUSH))
		sched_yield();
	assert_int_equal(pthread_tryjoin_np(t, &word), EBUSY);
	f->ram[0] = 1; /* in the log that is being made */
	kl_vcpu_take_requests(&f->vcpu, KL_REQ_TLB_FLUSH);
	assert_null(kl_mmu_lookup(&f->vcpu, 0, KL_ACC_WRITE, &writable, &mmio));
	kl_vcpu_leave_guest(&f->vcpu);
	pthread_join(t, &word);
	assert_int_equal((uint64_t)word, 1);
}

/* D3: a page that is written between being taken and being reported is in the next log, too. */
static void write_during_log(void **state)
{
	struct fixture *f = *state;
	pthread_t t;
	void *word;

	NEED_RACEPOINTS;
	assert_int_equal(log_on(f), 0);
	assert_int_equal(kl_mmu_fault(&f->vcpu, 5 * PG, KL_ACC_WRITE), KL_FAULT_MAPPED);
	kl_racepoint_arm("dirty-harvested", 1);
	pthread_create(&t, NULL, log_thread, f);
	assert_true(kl_racepoint_wait("dirty-harvested", TIMEOUT));
	assert_false(mapped(f, 5 * PG, KL_ACC_WRITE));
	assert_int_equal(kl_mmu_fault(&f->vcpu, 5 * PG, KL_ACC_WRITE), KL_FAULT_MAPPED);
	kl_racepoint_release("dirty-harvested");
	pthread_join(t, &word);
	assert_int_equal((uint64_t)word, 1u << 5);
	assert_int_equal(get_log(f), 1u << 5);
}

/* D3, M2: logging begins while a write fault is between its lookup and its SPTE. */
static void logging_begins_during_fault(void **state)
{
	struct fixture *f = *state;
	struct faulter t = {f, 6 * PG, KL_ACC_WRITE, -1};
	pthread_t thread;

	NEED_RACEPOINTS;
	kl_racepoint_arm("fault-populated", 1);
	pthread_create(&thread, NULL, fault_thread, &t);
	assert_true(kl_racepoint_wait("fault-populated", TIMEOUT));
	assert_int_equal(log_on(f), 0);
	kl_racepoint_release("fault-populated");
	pthread_join(thread, NULL);
	assert_false(mapped(f, 6 * PG, KL_ACC_READ));
	assert_int_equal(get_log(f), 0);
	assert_int_equal(kl_mmu_fault(&f->vcpu, 6 * PG, KL_ACC_WRITE), KL_FAULT_MAPPED);
	assert_int_equal(get_log(f), 1u << 6);
}

/* And ends: the bitmap is gone, and the fault does not touch it (D4). */
static void logging_ends_during_fault(void **state)
{
	struct fixture *f = *state;
	struct faulter t = {f, 6 * PG, KL_ACC_WRITE, -1};
	pthread_t thread;

	NEED_RACEPOINTS;
	assert_int_equal(log_on(f), 0);
	kl_racepoint_arm("fault-populated", 1);
	pthread_create(&thread, NULL, fault_thread, &t);
	assert_true(kl_racepoint_wait("fault-populated", TIMEOUT));
	assert_int_equal(set(&f->vm, 0, 0, 0, NPAGES * PG, f->ram), 0);
	kl_racepoint_release("fault-populated");
	pthread_join(thread, NULL);
	assert_false(mapped(f, 6 * PG, KL_ACC_READ));
}

struct writer {
	struct fixture *f;
	struct kl_vcpu_core core;
	_Atomic bool stop;
	_Atomic uint64_t stores;
};

static void *writer_thread(void *arg)
{
	struct writer *w = arg;
	uint8_t *tlb[NPAGES] = {0};
	unsigned rnd = 1;

	kl_vcpu_enter_guest(&w->core);
	while (!atomic_load_explicit(&w->stop, memory_order_relaxed)) {
		unsigned page = (rnd = rnd * 1103515245 + 12345) >> 16 & (NPAGES - 1);
		bool writable, mmio;

		if (kl_vcpu_requests(&w->core) & KL_REQ_TLB_FLUSH) {
			memset(tlb, 0, sizeof(tlb));
			kl_vcpu_take_requests(&w->core, KL_REQ_TLB_FLUSH);
		}
		if (!tlb[page])
			tlb[page] =
				kl_mmu_lookup(&w->core, page * PG, KL_ACC_WRITE, &writable, &mmio);
		if (tlb[page]) {
			kl_store32(tlb[page], kl_load32(tlb[page]) + 1);
			atomic_fetch_add(&w->stores, 1);
			continue;
		}
		kl_vcpu_leave_guest(&w->core);
		if (kl_mmu_fault(&w->core, page * PG, KL_ACC_WRITE) != KL_FAULT_MAPPED)
			return NULL;
		memset(tlb, 0, sizeof(tlb));
		kl_vcpu_enter_guest(&w->core);
	}
	kl_vcpu_leave_guest(&w->core);
	return NULL;
}

/*
 * D3: a copy that is kept up to date by nothing but the log equals memory in the end, while a vCPU
 * writes all the time.
 */
static void copy_by_log(void **state)
{
	struct fixture *f = *state;
	struct writer w = {.f = f};
	uint32_t copy[NPAGES] = {0};
	pthread_t t;

	assert_int_equal(log_on(f), 0);
	assert_int_equal(kl_vcpu_core_add(&f->vm, &w.core, 5), 0);
	pthread_create(&t, NULL, writer_thread, &w);
	for (unsigned round = 0; round <= ROUNDS; round++) {
		uint64_t seen = atomic_load(&w.stores), word;

		while (round < ROUNDS && atomic_load(&w.stores) == seen)
			sched_yield();
		if (round == ROUNDS) {
			atomic_store(&w.stop, true);
			pthread_join(t, NULL);
		}
		word = get_log(f);
		for (unsigned i = 0; i < NPAGES; i++)
			if (word >> i & 1)
				copy[i] = kl_load32(f->ram + i * PG);
	}
	for (unsigned i = 0; i < NPAGES; i++)
		assert_int_equal(copy[i], kl_load32(f->ram + i * PG));
	kl_vcpu_core_remove(&w.core);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
		T(errors),
		T(writes_are_logged),
		T(logging_protects),
		T(large_leaves),
		T(bad_bitmap),
		T(log_waits_for_guest_mode),
		T(write_during_log),
		T(logging_begins_during_fault),
		T(logging_ends_during_fault),
		T(copy_by_log),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
