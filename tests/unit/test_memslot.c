/* SPDX-License-Identifier: MIT */
/* Memslots: validation, lookups against a brute-force model, generations (S1-S5). */
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <cmocka.h>

#include "base/racepoint.h"
#include "host/thread.h"
#include "mem/notifier.h"
#include "mem/vm.h"
#include "mmu/mmu.h"

#define HVA 0x7f0000000000ull
#define PG  KL_PAGE_SIZE

static int set(struct kl_vm *vm, uint32_t slot, uint32_t flags, uint64_t gpa, uint64_t size,
	       uint64_t hva)
{
	struct kl_uapi_memory_region2 r = {slot, flags, gpa, size, hva, 0, 0, 0, {0}};

	return kl_set_memory_region(vm, &r);
}

static int setup(void **state)
{
	struct kl_vm *vm = malloc(sizeof(*vm));

	*state = vm;
	return kl_vm_init(vm);
}

static int teardown(void **state)
{
	kl_vm_destroy(*state);
	free(*state);
	return 0;
}

/* S2: each refusal has KVM's errno and leaves the set as it was. */
static void refusals(void **state)
{
	struct kl_vm *vm = *state;
	uint64_t gen;

	assert_int_equal(set(vm, 1, 0, 0x10000, 4 * PG, HVA), 0);
	gen = kl_generation(vm, 0);
	assert_int_equal(set(vm, 2, 0, 0x10001, PG, HVA), -EINVAL);
	assert_int_equal(set(vm, 2, 0, 0x20000, PG + 1, HVA), -EINVAL);
	assert_int_equal(set(vm, 2, 0, 0x20000, PG, HVA + 1), -EINVAL);
	assert_int_equal(set(vm, 2, 0, 0x20000, PG, 0xffff800000000000ull), -EINVAL);
	assert_int_equal(set(vm, 2, 0, -PG, 2 * PG, HVA), -EINVAL);
	assert_int_equal(set(vm, 2, 0, 0x20000, 1ull << 43, 0), -EINVAL);
	assert_int_equal(set(vm, KL_USER_MEM_SLOTS, 0, 0x20000, PG, HVA), -EINVAL);
	assert_int_equal(set(vm, KL_NR_AS << 16, 0, 0x20000, PG, HVA), -EINVAL);
	assert_int_equal(set(vm, 2, 1u << 31, 0x20000, PG, HVA), -EINVAL);
	assert_int_equal(set(vm, 2, 0, 0, 0, 0), -EINVAL); /* delete nothing */
	assert_int_equal(set(vm, 2, 0, 1ull << 52, PG, HVA), -EINVAL);
	/* Overlaps: from below, inside, over, at the last page. */
	assert_int_equal(set(vm, 2, 0, 0xf000, 2 * PG, HVA), -EEXIST);
	assert_int_equal(set(vm, 2, 0, 0x11000, PG, HVA), -EEXIST);
	assert_int_equal(set(vm, 2, 0, 0x8000, 64 * PG, HVA), -EEXIST);
	assert_int_equal(set(vm, 2, 0, 0x13000, PG, HVA), -EEXIST);
	/* A live slot keeps its size, its memory and whether it is read-only. */
	assert_int_equal(set(vm, 1, 0, 0x10000, 5 * PG, HVA), -EINVAL);
	assert_int_equal(set(vm, 1, 0, 0x10000, 4 * PG, HVA + PG), -EINVAL);
	assert_int_equal(set(vm, 1, KVM_MEM_READONLY, 0x10000, 4 * PG, HVA), -EINVAL);
	/* No change at all. */
	assert_int_equal(set(vm, 1, 0, 0x10000, 4 * PG, HVA), 0);
	assert_int_equal(kl_generation(vm, 0), gen);
	/* The gaps next to it are free. */
	assert_int_equal(set(vm, 2, 0, 0x14000, PG, HVA), 0);
	assert_int_equal(set(vm, 3, 0, 0xf000, PG, HVA), 0);
	/* A move onto a neighbour is refused, one that overlaps only itself is not. */
	assert_int_equal(set(vm, 1, 0, 0x11000, 4 * PG, HVA), -EEXIST);
	assert_int_equal(set(vm, 2, 0, 0, 0, 0), 0);
	assert_int_equal(set(vm, 1, 0, 0x11000, 4 * PG, HVA), 0);
}

/* S5: even while stable; a create raises it by two, a delete or a move by four. */
static void generations(void **state)
{
	struct kl_vm *vm = *state;
	uint64_t g = kl_generation(vm, 0);

	assert_int_equal(g & 1, 0);
	assert_int_equal(set(vm, 0, 0, 0, PG, HVA), 0);
	assert_int_equal(kl_generation(vm, 0), g + 2);
	assert_int_equal(set(vm, 0, 0, 8 * PG, PG, HVA), 0);
	assert_int_equal(kl_generation(vm, 0), g + 6);
	assert_int_equal(set(vm, 0, 0, 0, 0, 0), 0);
	assert_int_equal(kl_generation(vm, 0), g + 10);
}

#define MODEL_SLOTS 24

struct model {
	bool used;
	uint64_t gpa, npages, hva;
};

static bool model_conflict(const struct model *m, unsigned self, uint64_t gpa, uint64_t npages)
{
	for (unsigned i = 0; i < MODEL_SLOTS; i++)
		if (m[i].used && i != self && gpa < m[i].gpa + m[i].npages * PG &&
		    m[i].gpa < gpa + npages * PG)
			return true;
	return false;
}

/* S1: by gfn and by hva, many random changes; slots may share host memory. */
static void random_against_model(void **state)
{
	struct model m[MODEL_SLOTS] = {0};
	struct kl_vm *vm = *state;

	srand(1);
	for (int step = 0; step < 3000; step++) {
		unsigned id = (unsigned)rand() % MODEL_SLOTS;
		const struct kl_memslots *s;
		uint64_t from, to;
		unsigned found = 0, expected = 0;
		struct kl_overlap o;
		int r;

		if (m[id].used && rand() % 2) {
			assert_int_equal(set(vm, id, 0, 0, 0, 0), 0);
			m[id].used = false;
		} else if (m[id].used) {
			uint64_t gpa = (uint64_t)(rand() % 64) * PG;

			r = set(vm, id, 0, gpa, m[id].npages * PG, m[id].hva);
			assert_int_equal(r, model_conflict(m, id, gpa, m[id].npages) ? -EEXIST : 0);
			if (!r)
				m[id].gpa = gpa;
		} else {
			struct model n = {true, (uint64_t)(rand() % 64) * PG,
					  1 + (uint64_t)(rand() % 8),
					  HVA + (uint64_t)(rand() % 32) * PG};

			r = set(vm, id, 0, n.gpa, n.npages * PG, n.hva);
			assert_int_equal(r, model_conflict(m, id, n.gpa, n.npages) ? -EEXIST : 0);
			if (!r)
				m[id] = n;
		}
		s = kl_memslots(vm, 0);
		for (uint64_t gfn = 0; gfn < 80; gfn++) {
			const struct kl_memslot *slot = kl_memslot_find(s, gfn);
			int want = -1;

			for (int i = 0; i < MODEL_SLOTS; i++)
				if (m[i].used && gfn * PG >= m[i].gpa &&
				    gfn * PG < m[i].gpa + m[i].npages * PG)
					want = i;
			assert_int_equal(slot ? slot->id : -1, want);
		}
		from = HVA + (uint64_t)(rand() % 40) * PG;
		to = from + (1 + (uint64_t)(rand() % 6)) * PG;
		for (int i = 0; i < MODEL_SLOTS; i++)
			expected +=
				m[i].used && m[i].hva < to && m[i].hva + m[i].npages * PG > from;
		kl_for_each_overlap (&o, s, from, to) {
			found++;
			assert_true(o.first < o.last);
		}
		assert_int_equal(found, expected);
	}
}

static void all_slots(void **state)
{
	struct kl_vm *vm = *state;

	for (unsigned i = 0; i < KL_USER_MEM_SLOTS; i++)
		assert_int_equal(set(vm, i, 0, (uint64_t)i * PG, PG, HVA + (uint64_t)i * PG), 0);
	assert_int_equal(set(vm, KL_USER_MEM_SLOTS, 0, 1ull << 40, PG, HVA), -EINVAL);
	assert_int_equal(kl_memslot_find(kl_memslots(vm, 0), 12345)->id, 12345);
	assert_null(kl_memslot_find(kl_memslots(vm, 0), KL_USER_MEM_SLOTS));
}

struct change {
	struct kl_vm *vm;
	int r;
};

static void *delete_slot_0(void *arg)
{
	struct change *c = arg;

	c->r = set(c->vm, 0, 0, 0, 0, 0);
	return NULL;
}

/* S3: a reader's set stays as it was for as long as its section is open. */
static void reader_keeps_its_set(void **state)
{
	struct kl_vm *vm = *state;
	struct change c = {vm, -1};
	const struct kl_memslots *s;
	pthread_t t;
	uint64_t gen;
	int token;

	if (!kl_racepoints_enabled())
		skip();
	assert_int_equal(set(vm, 0, 0, 0, PG, HVA), 0);
	token = kl_srcu_read_lock(&vm->srcu);
	gen = kl_generation(vm, 0);
	s = kl_memslots(vm, 0);
	kl_racepoint_arm("memslots-published", 1);
	pthread_create(&t, NULL, delete_slot_0, &c);
	assert_true(kl_racepoint_wait("memslots-published", 10000));
	/* The slot is marked invalid for new readers; the generation is odd. */
	assert_int_equal(kl_generation(vm, 0), gen + 1);
	assert_true(kl_memslot_find(kl_memslots(vm, 0), 0)->invalid);
	kl_racepoint_release("memslots-published");
	/* Ours still reads what it read. */
	assert_false(kl_memslot_find(s, 0)->invalid);
	assert_int_equal(kl_memslot_find(s, 0)->hva, HVA);
	kl_srcu_read_unlock(&vm->srcu, token);
	pthread_join(t, NULL);
	assert_int_equal(c.r, 0);
	assert_null(kl_memslot_find(kl_memslots(vm, 0), 0));
}

/* S7: an update waits for a bracket over its slot, inside one's own it is refused. */
static void update_waits_for_brackets(void **state)
{
	struct kl_notifier_range far = {.start = HVA, .end = HVA + 65 * PG, .may_block = true};
	struct kl_notifier_range nb = far;
	struct kl_vm *vm = *state;
	struct change c = {vm, 1};
	uint64_t gen;
	pthread_t t;

	assert_int_equal(set(vm, 0, 0, 0, PG, HVA), 0);
	gen = kl_generation(vm, 0);
	assert_int_equal(kl_notifier_begin(&far), 0);
	assert_int_equal(set(vm, 1, 0, PG, PG, HVA), -EDEADLK);
	pthread_create(&t, NULL, delete_slot_0, &c);
	/* Our own nested bracket does not queue behind the waiting update. */
	for (int i = 0; i < 1000; i++) {
		struct kl_notifier_range inner = far;

		assert_int_equal(kl_notifier_begin(&inner), 0);
		kl_notifier_end(&inner);
	}
	assert_int_equal(kl_generation(vm, 0), gen);
	nb.may_block = false;
	assert_int_equal(kl_notifier_begin(&nb), 0); /* nested, too */
	kl_notifier_end(&nb);
	kl_notifier_end(&far);
	pthread_join(t, NULL);
	assert_int_equal(c.r, 0);
	assert_int_equal(kl_generation(vm, 0), gen + 4);
}

struct bracket {
	struct kl_notifier_range r;
	int begun;
	_Atomic int step;
};

static void *open_and_close(void *arg)
{
	struct bracket *b = arg;

	b->begun = kl_notifier_begin(&b->r);
	atomic_store(&b->step, 1);
	if (!b->begun)
		kl_notifier_end(&b->r);
	return NULL;
}

/*
 * S7, N4: an update does not wait for a bracket elsewhere; while it waits for one over its slot,
 * others over that memory queue behind it, or get EAGAIN; those elsewhere do not.
 */
static void only_overlapping_ones_wait(void **state)
{
	struct kl_notifier_range over = {.start = HVA, .end = HVA + PG, .may_block = true};
	struct bracket queued = {.r = over}, other = {.r = over}, nonblocking = {.r = over};
	struct kl_notifier_range elsewhere = {
		.start = HVA + 8 * PG, .end = HVA + 9 * PG, .may_block = true};
	struct kl_vm *vm = *state;
	struct change c = {vm, 1};
	pthread_t t, q, o;

	assert_int_equal(set(vm, 0, 0, 0, PG, HVA), 0);
	assert_int_equal(set(vm, 1, 0, 8 * PG, PG, HVA + 8 * PG), 0);
	other.r.start += 8 * PG;
	other.r.end += 8 * PG;
	nonblocking.r.may_block = false;
	assert_int_equal(kl_notifier_begin(&elsewhere), 0);
	pthread_create(&t, NULL, delete_slot_0, &c);
	pthread_join(t, NULL); /* it did not wait for us */
	assert_int_equal(c.r, 0);
	kl_notifier_end(&elsewhere);

	assert_int_equal(set(vm, 0, 0, 0, PG, HVA), 0);
	assert_int_equal(kl_notifier_begin(&over), 0);
	pthread_create(&t, NULL, delete_slot_0, &c);
	while (nonblocking.begun != -EAGAIN) {
		pthread_create(&q, NULL, open_and_close, &nonblocking);
		pthread_join(q, NULL);
	}
	pthread_create(&q, NULL, open_and_close, &queued);
	pthread_create(&o, NULL, open_and_close, &other);
	pthread_join(o, NULL);
	assert_int_equal(other.begun, 0);
	assert_int_equal(atomic_load(&queued.step), 0);
	kl_notifier_end(&over);
	pthread_join(t, NULL);
	pthread_join(q, NULL);
	assert_int_equal(queued.begun, 0);
	assert_null(kl_memslot_find(kl_memslots(vm, 0), 0));
}

/*
 * S7, N4: a bracket has published its range, an update sees it and waits. The bracket sees the
 * update, takes its range back to queue behind it, and must wake it: else each waits for the other.
 */
static void bracket_steps_back(void **state)
{
	struct bracket b = {.r = {.start = HVA, .end = HVA + PG, .may_block = true}};
	struct kl_vm *vm = *state;
	struct change c = {vm, 1};
	pthread_t t, q;

	if (!kl_racepoints_enabled())
		skip();
	assert_int_equal(set(vm, 0, 0, 0, PG, HVA), 0);
	kl_racepoint_arm("notifier-published", 1);
	pthread_create(&q, NULL, open_and_close, &b);
	assert_true(kl_racepoint_wait("notifier-published", 10000));
	/* Parked there it has the gate, which it gives up to wait. */
	kl_racepoint_arm("notifier-update-waits", 1);
	pthread_create(&t, NULL, delete_slot_0, &c);
	assert_true(kl_racepoint_wait("notifier-update-waits", 10000));
	kl_racepoint_release("notifier-update-waits");
	kl_racepoint_release("notifier-published");
	pthread_join(t, NULL);
	pthread_join(q, NULL);
	assert_int_equal(c.r, 0);
	assert_int_equal(b.begun, 0);
}

/* A bracket that stays open until `step` is 2. */
static void *open_and_hold(void *arg)
{
	struct bracket *b = arg;

	b->begun = kl_notifier_begin(&b->r);
	atomic_store(&b->step, 1);
	while (atomic_load(&b->step) == 1)
		sched_yield();
	if (!b->begun)
		kl_notifier_end(&b->r);
	return NULL;
}

#define HELD 32

/*
 * S7, N4: a bracket that is about to take a cell that nobody ever had finds that others have taken
 * this one and the next. It takes one further on, and is as narrow as ever: a change elsewhere does
 * not wait for it. Comes before the tests that use many cells.
 */
static void cells_taken_meanwhile(void **state)
{
	struct kl_vm *vm = *state;
	struct bracket b[HELD];
	pthread_t t[HELD];
	unsigned n = 0, late;

	if (!kl_racepoints_enabled())
		skip();
	for (unsigned i = 0; i < HELD; i++)
		b[i] = (struct bracket){.r = {.start = HVA + (8 + i) * PG,
					      .end = HVA + (9 + i) * PG,
					      .may_block = true}};
	kl_racepoint_arm("notifier-new-cell", 1);
	/* Those take the cells that there have been; the last one needs a new one. */
	do {
		assert_true(n < HELD - 2);
		pthread_create(&t[n], NULL, open_and_hold, &b[n]);
		while (!atomic_load(&b[n].step) && !kl_racepoint_wait("notifier-new-cell", 1))
			;
	} while (atomic_load(&b[n++].step));
	late = n - 1;
	for (; n < late + 3; n++) {
		pthread_create(&t[n], NULL, open_and_hold, &b[n]);
		while (!atomic_load(&b[n].step))
			sched_yield();
	}
	kl_racepoint_release("notifier-new-cell");
	while (!atomic_load(&b[late].step))
		sched_yield();
	assert_int_equal(set(vm, 1, 0, 0x100000, PG, HVA), 0); /* or it would wait for ever */
	for (unsigned i = 0; i < n; i++) {
		atomic_store(&b[i].step, 2);
		pthread_join(t[i], NULL);
		assert_int_equal(b[i].begun, 0);
	}
}

/* N3: brackets nest as deep as one likes and end in any order. */
static void deep_nesting(void **state)
{
	struct kl_notifier_range r[40];
	struct kl_vm *vm = *state;

	assert_int_equal(set(vm, 0, 0, 0, 64 * PG, HVA), 0);
	for (int round = 0; round < 2; round++) {
		for (int i = 0; i < 40; i++) {
			r[i] = (struct kl_notifier_range){.start = HVA + (uint64_t)i * PG,
							  .end = HVA + (uint64_t)(i + 1) * PG,
							  .may_block = true};
			assert_int_equal(kl_notifier_begin(&r[i]), 0);
		}
		assert_int_equal(vm->mmu_invalidate_in_progress, 40);
		for (int i = 0; i < 40; i++)
			kl_notifier_end(&r[round ? i : 39 - i]);
		assert_int_equal(vm->mmu_invalidate_in_progress, 0);
		assert_int_equal(kl_self.brackets, 0);
	}
	/* And nothing is left that an update would wait for. */
	assert_int_equal(set(vm, 0, 0, 0, 0, 0), 0);
}

#define STORM_THREADS 4
#define STORM_ROUNDS  3000

static void *storm(void *arg)
{
	struct kl_vm *vm = arg;
	unsigned seed = (unsigned)(uintptr_t)&seed;

	for (int i = 0; i < STORM_ROUNDS; i++) {
		uint64_t at = HVA + (uint64_t)(rand_r(&seed) % 4) * PG;
		struct kl_notifier_range a = {.start = at, .end = at + 2 * PG, .may_block = true};
		struct kl_notifier_range b = {
			.start = HVA, .end = HVA + PG, .may_block = i % 2 == 0};

		if (i % 4 == 0) {
			(void)!set(vm, (uint32_t)(rand_r(&seed) % 4), 0, 0, 0, 0);
			(void)!set(vm, (uint32_t)(rand_r(&seed) % 4), 0,
				   (uint64_t)(rand_r(&seed) % 8) * PG, PG, at);
		}
		if (kl_notifier_begin(&a))
			abort();
		if (!kl_notifier_begin(&b))
			kl_notifier_end(&b);
		kl_notifier_end(&a);
	}
	return NULL;
}

/* N3, S7: nested brackets of several threads against updates: no deadlock, balanced. */
static void bracket_storm(void **state)
{
	struct kl_vm *vm = *state;
	pthread_t t[STORM_THREADS];

	for (int i = 0; i < STORM_THREADS; i++)
		pthread_create(&t[i], NULL, storm, vm);
	for (int i = 0; i < STORM_THREADS; i++)
		pthread_join(t[i], NULL);
	assert_int_equal(vm->mmu_invalidate_in_progress, 0);
	assert_int_equal(kl_generation(vm, 0) & 1, 0);
}

#define HOLDERS 80

static void *hold_elsewhere(void *arg)
{
	pthread_barrier_t *b = arg;
	struct kl_notifier_range r = {
		.start = HVA + 64 * PG, .end = HVA + 65 * PG, .may_block = true};

	if (kl_notifier_begin(&r))
		abort();
	pthread_barrier_wait(b);
	pthread_barrier_wait(b);
	kl_notifier_end(&r);
	return NULL;
}

/*
 * S7: more brackets than the gate has room for count as over all memory. While an update waits
 * for them further ones queue, wherever they are, so that it comes to its turn.
 */
static void more_brackets_than_cells(void **state)
{
	struct bracket late = {.r = {.start = HVA + 70 * PG, .end = HVA + 71 * PG}};
	struct kl_vm *vm = *state;
	struct change c = {vm, 1};
	pthread_t holder[HOLDERS], t, q;
	pthread_barrier_t b;

	pthread_barrier_init(&b, NULL, HOLDERS + 1);
	assert_int_equal(set(vm, 0, 0, 0, PG, HVA), 0);
	for (int i = 0; i < HOLDERS; i++)
		pthread_create(&holder[i], NULL, hold_elsewhere, &b);
	pthread_barrier_wait(&b);
	pthread_create(&t, NULL, delete_slot_0, &c);
	while (late.begun != -EAGAIN) {
		pthread_create(&q, NULL, open_and_close, &late);
		pthread_join(q, NULL);
	}
	pthread_barrier_wait(&b);
	pthread_join(t, NULL);
	for (int i = 0; i < HOLDERS; i++)
		pthread_join(holder[i], NULL);
	assert_int_equal(c.r, 0);
	pthread_barrier_destroy(&b);
}

/* S1, S5: a second address space has slots and generations of its own. */
static void address_spaces(void **state)
{
	struct kl_vm *vm = *state;

	assert_int_equal(set(vm, 7, 0, 0x10000, PG, HVA), 0);
	assert_int_equal(set(vm, 1 << 16 | 7, 0, 0x10000, 2 * PG, HVA), 0);
	assert_int_equal(kl_memslot_find(kl_memslots(vm, 0), 0x10)->npages, 1);
	assert_int_equal(kl_memslot_find(kl_memslots(vm, 1), 0x10)->npages, 2);
	for (int i = 0; i < 100; i++) {
		assert_true(kl_generation(vm, 0) != kl_generation(vm, 1));
		assert_int_equal(set(vm, 8, 0, 0x20000, i % 2 ? 0 : PG, HVA), 0);
	}
	assert_int_equal(set(vm, 7, 0, 0, 0, 0), 0);
	assert_null(kl_memslot_find(kl_memslots(vm, 0), 0x10));
	assert_non_null(kl_memslot_find(kl_memslots(vm, 1), 0x10));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
		T(refusals),
		T(generations),
		T(random_against_model),
		T(all_slots),
		T(reader_keeps_its_set),
		T(update_waits_for_brackets),
		T(only_overlapping_ones_wait),
		T(bracket_steps_back),
		T(cells_taken_meanwhile),
		T(deep_nesting),
		T(bracket_storm),
		T(more_brackets_than_cells),
		T(address_spaces),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
