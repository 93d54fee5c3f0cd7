/* SPDX-License-Identifier: MIT */
/*
 * Dirty rings as the memory engine keeps them (D2, D3): what is pushed and when, what the program
 * may do to its side of a ring, and writers that are no vCPUs.
 */
#include "mmu_env.h"

#include "host/thread.h"
#include "mem/dirty_ring.h"

#define ENTRIES 256
#define SOFT    (ENTRIES - KL_DIRTY_RING_RESERVED)
#define BYTES   (ENTRIES * sizeof(struct kvm_dirty_gfn))
#define GPA     (1ul << 32)
#define SLOT    3
#define PAGES   1024ul
#define LOG     KVM_MEM_LOG_DIRTY_PAGES

struct ring {
	struct kl_dirty_ring ring;
	struct kvm_dirty_gfn *e;
	uint32_t next; /* to be collected */
};

static struct ring rings[2];
static uint8_t *mem;

static void add_ring(struct ring *r, struct kl_vcpu_core *c)
{
	r->next = 0;
	r->e = calloc(ENTRIES, sizeof(*r->e));
	assert_non_null(r->e);
	kl_dirty_ring_init(&r->ring, c, r->e);
}

static struct kl_dirty_log *the_log(struct fixture *f)
{
	return f->vm.slot_by_id[0][SLOT]->log;
}

static int setup_vm(void **state, bool bitmap)
{
	struct fixture *f;

	if (setup(state))
		return -1;
	f = *state;
	mem = mmap(NULL, PAGES * PG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (mem == MAP_FAILED || kl_dirty_rings_enable(&f->vm, BYTES, false))
		return -1;
	if (bitmap && (set(&f->vm, 0, 0, 0, 0, NULL) || kl_dirty_rings_with_bitmap(&f->vm)))
		return -1;
	return set(&f->vm, SLOT, LOG, GPA, PAGES * PG, mem);
}

static int setup_no_ring(void **state)
{
	memset(rings, 0, sizeof(rings));
	return setup_vm(state, false);
}

static int setup_ring(void **state)
{
	if (setup_no_ring(state))
		return -1;
	add_ring(&rings[0], &((struct fixture *)*state)->vcpu);
	return 0;
}

static int setup_with_bitmap(void **state)
{
	memset(rings, 0, sizeof(rings));
	if (setup_vm(state, true))
		return -1;
	add_ring(&rings[0], &((struct fixture *)*state)->vcpu);
	return 0;
}

static int end(void **state)
{
	int r = teardown(state);

	munmap(mem, PAGES * PG);
	free(rings[0].e);
	free(rings[1].e);
	return r;
}

/* 0; or what the fault that it needs says. */
static int try_store(struct fixture *f, unsigned page)
{
	for (;;) {
		bool writable, mmio;
		uint8_t *p;
		int r;

		kl_vcpu_enter_guest(&f->vcpu);
		kl_vcpu_take_requests(&f->vcpu, KL_REQ_TLB_FLUSH);
		p = kl_mmu_lookup(&f->vcpu, GPA + page * PG, KL_ACC_WRITE, &writable, &mmio);
		if (p)
			kl_store8(p, kl_load8(p) + 1);
		kl_vcpu_leave_guest(&f->vcpu);
		if (p)
			return 0;
		r = kl_mmu_fault(&f->vcpu, GPA + page * PG, KL_ACC_WRITE);
		if (r)
			return r;
	}
}

static void store(struct fixture *f, unsigned page)
{
	assert_int_equal(try_store(f, page), 0);
}

/* A write by who is in no guest mode: a device. */
static void device_store(struct fixture *f, unsigned page)
{
	kl_store8(mem + page * PG, kl_load8(mem + page * PG) + 1);
	kl_dirty_mark(&f->vm, the_log(f), page);
}

/* The next page in the ring, as the program takes it; -1: none. */
static long collect(struct ring *r)
{
	struct kvm_dirty_gfn *e = &r->e[r->next % ENTRIES];

	if (__atomic_load_n(&e->flags, __ATOMIC_ACQUIRE) != KVM_DIRTY_GFN_F_DIRTY)
		return -1;
	assert_int_equal(e->slot, SLOT);
	__atomic_store_n(&e->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
	r->next++;
	return (long)e->offset;
}

static unsigned collect_all(struct ring *r)
{
	unsigned n = 0;

	while (collect(r) >= 0)
		n++;
	return n;
}

/* D2: sizes, and when. */
static void enabling(void **state)
{
	struct fixture *f = *state;
	struct kl_vm *vm = &f->vm;

	assert_int_equal(kl_dirty_rings_reset(vm), -EINVAL);
	assert_int_equal(kl_dirty_rings_with_bitmap(vm), -EINVAL);
	assert_int_equal(kl_dirty_rings_enable(vm, 0, false), -EINVAL);
	assert_int_equal(kl_dirty_rings_enable(vm, 4096 + 16, false), -EINVAL);
	assert_int_equal(kl_dirty_rings_enable(vm, 2048, false), -EINVAL);
	assert_int_equal(kl_dirty_rings_enable(vm, 2 << 20, false), -E2BIG);
	assert_int_equal(kl_dirty_rings_enable(vm, 1ull << 63, false), -E2BIG);
	assert_int_equal(kl_dirty_rings_enable(vm, 4096, true), -EINVAL);
	assert_int_equal(kl_dirty_rings_enable(vm, 1 << 20, false), 0);
	assert_int_equal(kl_dirty_rings_enable(vm, 4096, false), -EINVAL);
	assert_int_equal(kl_dirty_rings_with_bitmap(vm), -EINVAL); /* there is a slot */
	assert_int_equal(set(vm, 0, 0, 0, 0, NULL), 0);
	assert_int_equal(kl_dirty_rings_with_bitmap(vm), 0);
	assert_int_equal(kl_dirty_rings_reset(vm), 0);
}

/* D2, D3: a page is pushed when it is written first, and again after a reset. */
static void push_and_reset(void **state)
{
	struct fixture *f = *state;
	struct ring *r = &rings[0];
	bool writable, mmio;

	assert_int_equal(collect(r), -1);
	for (unsigned round = 0; round < 3 * ENTRIES; round++) {
		unsigned page = round % PAGES;

		store(f, page);
		store(f, page);
		kl_vcpu_enter_guest(&f->vcpu);
		assert_non_null(
			kl_mmu_lookup(&f->vcpu, GPA + page * PG, KL_ACC_READ, &writable, &mmio));
		assert_true(writable);
		kl_vcpu_leave_guest(&f->vcpu);
		assert_int_equal(collect(r), page);
		assert_int_equal(collect(r), -1);
		/* Collected, and not reset: whoever looks at the page does so later. */
		store(f, page);
		assert_int_equal(collect(r), -1);
		assert_int_equal(kl_dirty_rings_reset(&f->vm), 1);
		assert_int_equal(kl_dirty_rings_reset(&f->vm), 0);
		kl_vcpu_enter_guest(&f->vcpu);
		assert_non_null(
			kl_mmu_lookup(&f->vcpu, GPA + page * PG, KL_ACC_READ, &writable, &mmio));
		assert_false(writable);
		kl_vcpu_leave_guest(&f->vcpu);
	}
	store(f, 7);
	store(f, 8);
	assert_int_equal(collect(r), 7);
	assert_int_equal(kl_dirty_rings_reset(&f->vm), 1);
	assert_int_equal(collect(r), 8);
	/* Without a log there is nothing to push, and none that was pushed comes to life. */
	assert_int_equal(set(&f->vm, SLOT, 0, GPA, PAGES * PG, mem), 0);
	store(f, 9);
	assert_int_equal(collect(r), -1);
	assert_int_equal(kl_dirty_rings_reset(&f->vm), 1);
	assert_int_equal(set(&f->vm, SLOT, LOG, GPA, PAGES * PG, mem), 0);
	store(f, 8);
	assert_int_equal(collect(r), 8);
}

/* D2: an exit is asked for before the ring is full; when it is, nothing is written unlogged. */
static void full(void **state)
{
	struct fixture *f = *state;
	struct ring *r = &rings[0];

	store(f, 300); /* it is mapped: no fault is in the way */
	assert_int_equal(collect(r), 300);
	assert_int_equal(kl_dirty_rings_reset(&f->vm), 1);
	for (unsigned round = 0; round < 3; round++) {
		for (unsigned page = 0; page < ENTRIES; page++) {
			assert_int_equal(kl_dirty_ring_soft_full(&r->ring), page >= SOFT);
			assert_int_equal(!!(kl_vcpu_requests(&f->vcpu) & KL_REQ_RING_FULL),
					 page >= SOFT);
			store(f, page);
		}
		assert_true(kl_dirty_ring_full(&r->ring));
		assert_int_equal(try_store(f, 300), -ENOBUFS);
		assert_int_equal(kl_load8(mem + 300 * PG), 1);
		store(f, 5); /* it is in the ring */
		assert_int_equal(kl_mmu_fault(&f->vcpu, GPA + 300 * PG, KL_ACC_READ),
				 KL_FAULT_MAPPED);
		assert_int_equal(collect_all(r), ENTRIES);
		assert_int_equal(kl_dirty_rings_reset(&f->vm), ENTRIES);
		kl_vcpu_take_requests(&f->vcpu, KL_REQ_RING_FULL);
	}
}

/* D2: whatever the program writes into its ring, the engine is well, and so is what it had. */
static void hostile_entries(void **state)
{
	static const struct kvm_dirty_gfn bad[] = {
		{KVM_DIRTY_GFN_F_RESET, SLOT, PAGES},
		{KVM_DIRTY_GFN_F_RESET, SLOT, ~0ull},
		{KVM_DIRTY_GFN_F_RESET, SLOT, 1ull << 63},
		{KVM_DIRTY_GFN_F_RESET, 0, 0}, /* does not log */
		{KVM_DIRTY_GFN_F_RESET, SLOT + 1, 0},
		{KVM_DIRTY_GFN_F_RESET, KL_USER_MEM_SLOTS, 0},
		{KVM_DIRTY_GFN_F_RESET, 0xffff, 0},
		{KVM_DIRTY_GFN_F_RESET, 1 << 16 | SLOT, 0},
		{KVM_DIRTY_GFN_F_RESET, KL_NR_AS << 16 | SLOT, 0},
		{~0u, ~0u, ~0ull},
	};
	struct fixture *f = *state;
	struct ring *r = &rings[0];
	unsigned n = KL_ARRAY_SIZE(bad);

	for (unsigned i = 0; i < n; i++)
		store(f, i);
	memcpy(r->e, bad, sizeof(bad));
	assert_int_equal(kl_dirty_rings_reset(&f->vm), n);
	for (unsigned i = 0; i < n; i++)
		assert_int_equal(r->e[i].flags, 0);
	/* Their pages are in no entry any more, but were not reset: as if they had stayed. */
	store(f, 0);
	r->next = n;
	assert_int_equal(collect(r), -1);
	store(f, n);
	assert_int_equal(collect(r), n);
	/* Entries that nobody has pushed. */
	for (unsigned i = 0; i < ENTRIES; i++)
		r->e[i].flags = KVM_DIRTY_GFN_F_RESET;
	assert_int_equal(kl_dirty_rings_reset(&f->vm), 1);
	assert_int_equal(kl_dirty_rings_reset(&f->vm), 0);
	/* Flags that were taken away, and one that is both: it counts as collected. */
	store(f, 20);
	store(f, 21);
	r->e[r->next % ENTRIES].flags = 0;
	assert_int_equal(kl_dirty_rings_reset(&f->vm), 0);
	r->e[r->next % ENTRIES].flags = KVM_DIRTY_GFN_F_RESET | KVM_DIRTY_GFN_F_DIRTY;
	assert_int_equal(kl_dirty_rings_reset(&f->vm), 1);
	store(f, 20);
	r->next++;
	assert_int_equal(collect(r), 21);
	assert_int_equal(collect(r), 20);
}

/* D2, D3: of two vCPUs that write a page at least one reports it. */
static void two_vcpus(void **state)
{
	struct fixture *f = *state, g = {0};

	assert_int_equal(kl_vcpu_core_add(&f->vm, &g.vcpu, 5), 0);
	add_ring(&rings[1], &g.vcpu);
	store(f, 3);
	store(&g, 3);
	store(&g, 4);
	store(f, 4);
	assert_int_equal(collect(&rings[0]), 3);
	assert_int_equal(collect(&rings[0]), -1);
	assert_int_equal(collect(&rings[1]), 4);
	assert_int_equal(collect(&rings[1]), -1);
	assert_int_equal(kl_dirty_rings_reset(&f->vm), 2);
	store(&g, 3);
	assert_int_equal(collect(&rings[0]), -1);
	assert_int_equal(collect(&rings[1]), 3);
	kl_vcpu_core_remove(&g.vcpu);
}

/* ---- writers that are no vCPUs --------------------------------------------------------- */

/* D2, D3, G13: the thread of a vCPU that writes for its guest pushes to that vCPU's ring. */
static void write_by_vcpu_thread(void **state)
{
	struct fixture *f = *state;
	struct kl_vcpu_core other = {0};

	assert_int_equal(kl_vcpu_core_add(&f->vm, &other, 5), 0);
	add_ring(&rings[1], &other);
	kl_self.running = &other;
	device_store(f, 3);
	kl_self.running = NULL;
	assert_int_equal(collect(&rings[0]), -1);
	assert_int_equal(collect(&rings[1]), 3);
	kl_vcpu_core_remove(&other);
}

/* D2, D3, B13: any other goes to whatever ring has room, */
static void write_by_device(void **state)
{
	struct fixture *f = *state;

	for (int i = 0; i < 2; i++) {
		device_store(f, 3);
		device_store(f, 3);
		assert_int_equal(collect(&rings[0]), 3);
		assert_int_equal(collect(&rings[0]), -1);
		assert_int_equal(kl_dirty_rings_reset(&f->vm), 1);
	}
}

/* D2, D3: and does not vanish when none has: it comes when there is room. */
static void write_by_device_all_full(void **state)
{
	struct fixture *f = *state;
	struct ring *r = &rings[0];

	for (unsigned page = 0; page < ENTRIES; page++)
		store(f, page);
	device_store(f, 600);
	device_store(f, 601);
	assert_true(kl_dirty_left_over(&f->vm));
	kl_dirty_rings_push_left_over(&f->vm);
	assert_true(kl_dirty_left_over(&f->vm));
	assert_int_equal(collect(r), 0);
	assert_int_equal(kl_dirty_rings_reset(&f->vm), 1);
	assert_int_equal(collect_all(r), ENTRIES); /* 255, and one of the two */
	assert_int_equal(kl_dirty_rings_reset(&f->vm), ENTRIES);
	assert_int_equal(collect(r), 601);
	assert_false(kl_dirty_left_over(&f->vm));
}

/* D2, D3: nor when there is no vCPU yet. */
static void write_by_device_before_vcpus(void **state)
{
	struct fixture *f = *state;

	device_store(f, 600);
	add_ring(&rings[0], &f->vcpu);
	assert_true(kl_dirty_left_over(&f->vm));
	kl_dirty_rings_push_left_over(&f->vm);
	assert_int_equal(collect(&rings[0]), 600);
	assert_int_equal(collect(&rings[0]), -1);
}

static uint64_t bitmap_word(struct fixture *f)
{
	uint64_t bits[PAGES / 64];

	assert_int_equal(kl_dirty_log_get(&f->vm, 0, SLOT, bits, false), 0);
	return bits[0];
}

/* D2: with a bitmap beside the rings, what is not a running vCPU's goes there, and only that. */
static void bitmap_beside_ring(void **state)
{
	struct fixture *f = *state;
	uint64_t mask[PAGES / 64] = {1 << 5};

	store(f, 3);
	device_store(f, 4);
	assert_int_equal(collect(&rings[0]), 3);
	assert_int_equal(collect(&rings[0]), -1);
	assert_int_equal(bitmap_word(f), 1 << 4);
	assert_int_equal(bitmap_word(f), 0);
	kl_self.running = &f->vcpu;
	device_store(f, 5);
	kl_self.running = NULL;
	assert_int_equal(collect(&rings[0]), 5);
	device_store(f, 5);
	device_store(f, 6);
	assert_int_equal(kl_dirty_log_clear(&f->vm, 0, SLOT, 0, PAGES, mask), 0);
	assert_int_equal(bitmap_word(f), 1 << 6);
	/* A full ring's, too. */
	for (unsigned page = 0; page < ENTRIES + 3; page++)
		(void)try_store(f, page);
	kl_self.running = &f->vcpu;
	device_store(f, 700);
	kl_self.running = NULL;
	assert_int_equal(kl_dirty_log_get(&f->vm, 0, SLOT, mask, false), 0);
	assert_int_equal(mask[700 / 64], 1ull << 700 % 64);
	assert_false(kl_dirty_left_over(&f->vm));
}

/* D2: without one, the ioctls of the bitmap are refused before anything else. */
static void no_bitmap(void **state)
{
	struct fixture *f = *state;
	uint64_t bits[PAGES / 64];

	assert_int_equal(kl_dirty_log_get(&f->vm, 0, SLOT, bits, false), -ENXIO);
	assert_int_equal(kl_dirty_log_get(&f->vm, KL_NR_AS, 0, NULL, true), -ENXIO);
	assert_int_equal(kl_dirty_log_clear(&f->vm, 0, SLOT, 1, PAGES, bits), -ENXIO);
}

/* ---- interleavings ------------------------------------------------------------------- */

static void *reset_thread(void *arg)
{
	struct fixture *f = arg;

	return (void *)(long)kl_dirty_rings_reset(&f->vm);
}

static void *store_thread(void *arg)
{
	store(arg, 5);
	return NULL;
}

/* D2, D3: a reset returns when nobody writes through an old pointer any more. */
static void reset_waits_for_guest_mode(void **state)
{
	struct fixture *f = *state;
	bool writable, mmio;
	pthread_t t;
	uint8_t *p;
	void *r;

	store(f, 5);
	assert_int_equal(collect(&rings[0]), 5);
	kl_vcpu_enter_guest(&f->vcpu);
	p = kl_mmu_lookup(&f->vcpu, GPA + 5 * PG, KL_ACC_WRITE, &writable, &mmio);
	assert_non_null(p);
	pthread_create(&t, NULL, reset_thread, f);
	while (!(kl_vcpu_requests(&f->vcpu) & KL_REQ_TLB_FLUSH))
		sched_yield();
	assert_int_equal(pthread_tryjoin_np(t, &r), EBUSY);
	kl_store8(p, 99);
	kl_vcpu_leave_guest(&f->vcpu);
	pthread_join(t, &r);
	assert_int_equal((long)r, 1);
	store(f, 5);
	assert_int_equal(collect(&rings[0]), 5);
}

/*
 * D2, D3: an entry is collected and reset between its push and the bit that says that it is there.
 * The reset waits; if it did not, the bit would stay, and the page would never be pushed again.
 */
static void reset_behind_push(void **state)
{
	struct fixture *f = *state;
	pthread_t w, t;
	void *r;

	NEED_RACEPOINTS;
	kl_racepoint_arm("dirty-pushed", 1);
	pthread_create(&w, NULL, store_thread, f);
	assert_true(kl_racepoint_wait("dirty-pushed", TIMEOUT));
	assert_int_equal(collect(&rings[0]), 5);
	pthread_create(&t, NULL, reset_thread, f);
	for (int i = 0; i < 1000; i++) {
		assert_int_equal(pthread_tryjoin_np(t, &r), EBUSY);
		sched_yield();
	}
	kl_racepoint_release("dirty-pushed");
	pthread_join(w, NULL);
	pthread_join(t, &r);
	assert_int_equal((long)r, 1);
	store(f, 5);
	assert_int_equal(collect(&rings[0]), 5);
}

struct writer {
	struct fixture *f;
	_Atomic bool stop;
	_Atomic uint64_t stores;
};

/* A vCPU with a TLB, which waits while its ring is full. */
static void *writer_thread(void *arg)
{
	struct writer *w = arg;
	struct fixture *f = w->f;
	static uint8_t *tlb[PAGES];
	unsigned rnd = 1;

	kl_vcpu_enter_guest(&f->vcpu);
	while (!atomic_load_explicit(&w->stop, memory_order_relaxed)) {
		unsigned page = (rnd = rnd * 1103515245 + 12345) >> 16 & (PAGES - 1);
		bool writable, mmio;
		int r;

		if (kl_vcpu_requests(&f->vcpu) & KL_REQ_TLB_FLUSH) {
			memset(tlb, 0, sizeof(tlb));
			kl_vcpu_take_requests(&f->vcpu, KL_REQ_TLB_FLUSH);
		}
		if (!tlb[page])
			tlb[page] = kl_mmu_lookup(&f->vcpu, GPA + page * PG, KL_ACC_WRITE,
						  &writable, &mmio);
		if (tlb[page]) {
			kl_store32(tlb[page], kl_load32(tlb[page]) + 1);
			atomic_fetch_add(&w->stores, 1);
			continue;
		}
		kl_vcpu_leave_guest(&f->vcpu);
		r = kl_mmu_fault(&f->vcpu, GPA + page * PG, KL_ACC_WRITE);
		if (r == -ENOBUFS)
			sched_yield();
		else if (r)
			return NULL;
		memset(tlb, 0, sizeof(tlb));
		kl_vcpu_enter_guest(&f->vcpu);
	}
	kl_vcpu_leave_guest(&f->vcpu);
	return NULL;
}

/* Another writer, of the other words of the same pages. */
static void *device_thread(void *arg)
{
	struct writer *w = arg;
	unsigned rnd = 77;

	while (!atomic_load_explicit(&w->stop, memory_order_relaxed)) {
		unsigned page = (rnd = rnd * 1103515245 + 12345) >> 16 & (PAGES - 1);
		uint8_t *p = mem + page * PG + 8;

		kl_store32(p, kl_load32(p) + 1);
		kl_dirty_mark(&w->f->vm, the_log(w->f), page);
		atomic_fetch_add(&w->stores, 1);
		sched_yield();
	}
	return NULL;
}

/* D2, D3: a copy that is kept up to date by nothing but the ring equals memory in the end. */
static void copy_by_ring(void **state)
{
	struct fixture *f = *state;
	struct writer w = {.f = f}, d = {.f = f};
	static uint32_t copy[PAGES][2];
	static unsigned pages[4 * ENTRIES];
	pthread_t t[2];

	memset(copy, 0, sizeof(copy));
	pthread_create(&t[0], NULL, writer_thread, &w);
	pthread_create(&t[1], NULL, device_thread, &d);
	for (unsigned round = 0; round <= 200; round++) {
		uint64_t seen = atomic_load(&w.stores);
		unsigned n;
		long page;

		while (round < 200 && atomic_load(&w.stores) == seen &&
		       !kl_dirty_ring_full(&rings[0].ring))
			sched_yield();
		if (round == 200) {
			atomic_store(&w.stop, true);
			atomic_store(&d.stop, true);
			pthread_join(t[0], NULL);
			pthread_join(t[1], NULL);
		}
		do {
			for (n = 0; n < ENTRIES && (page = collect(&rings[0])) >= 0;)
				pages[n++] = (unsigned)page;
			assert_int_equal(kl_dirty_rings_reset(&f->vm), n);
			/* After the reset: api.rst. */
			for (unsigned i = 0; i < n; i++) {
				copy[pages[i]][0] = kl_load32(mem + pages[i] * PG);
				copy[pages[i]][1] = kl_load32(mem + pages[i] * PG + 8);
			}
		} while (round == 200 && n);
	}
	for (unsigned i = 0; i < PAGES; i++) {
		assert_int_equal(copy[i][0], kl_load32(mem + i * PG));
		assert_int_equal(copy[i][1], kl_load32(mem + i * PG + 8));
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
#define T(f)  cmocka_unit_test_setup_teardown(f, setup_ring, end)
#define T0(f) cmocka_unit_test_setup_teardown(f, setup_no_ring, end)
#define TB(f) cmocka_unit_test_setup_teardown(f, setup_with_bitmap, end)
		cmocka_unit_test_setup_teardown(enabling, setup, teardown),
		T(push_and_reset),
		T(full),
		T(hostile_entries),
		T(two_vcpus),
		T(write_by_vcpu_thread),
		T(write_by_device),
		T(write_by_device_all_full),
		T0(write_by_device_before_vcpus),
		TB(bitmap_beside_ring),
		T(no_bitmap),
		T(reset_waits_for_guest_mode),
		T(reset_behind_push),
		T(copy_by_ring),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
