/* SPDX-License-Identifier: MIT */
/*
 * Dirty logs as the memory engine keeps them (D1, D3, D4).
 */
#include "mmu_env.h"

#include "mem/dirty.h"

#define MB  (1ul << 20)
#define GB  (1ul << 30)
#define GPA (1ul << 32)
#define LOG KVM_MEM_LOG_DIRTY_PAGES

#define ROUNDS 100

static uint64_t get_log(struct fixture *f)
{
	uint64_t word = ~0ull;

	assert_int_equal(kl_dirty_log_get(&f->vm, 0, 0, &word, false), 0);
	return word;
}

static uint64_t peek_log(struct fixture *f)
{
	uint64_t word = ~0ull;

	assert_int_equal(kl_dirty_log_get(&f->vm, 0, 0, &word, true), 0);
	return word;
}

static int log_on(struct fixture *f)
{
	return set(&f->vm, 0, LOG, 0, NPAGES * PG, f->ram);
}

static int log_off(struct fixture *f)
{
	return set(&f->vm, 0, 0, 0, NPAGES * PG, f->ram);
}

/* In guest mode, with a pointer for @access. */
static uint8_t *enter(struct fixture *f, uint64_t gpa, unsigned access, bool *writable)
{
	for (;;) {
		bool mmio;
		uint8_t *p;

		kl_vcpu_enter_guest(&f->vcpu);
		kl_vcpu_take_requests(&f->vcpu, KL_REQ_TLB_FLUSH);
		p = kl_mmu_lookup(&f->vcpu, gpa, access, writable, &mmio);
		if (p)
			return p;
		kl_vcpu_leave_guest(&f->vcpu);
		assert_int_equal(kl_mmu_fault(&f->vcpu, gpa, access), KL_FAULT_MAPPED);
	}
}

static void store(struct fixture *f, uint64_t gpa)
{
	bool writable;
	uint8_t *p = enter(f, gpa, KL_ACC_WRITE, &writable);

	assert_true(writable);
	kl_store8(p, kl_load8(p) + 1);
	kl_vcpu_leave_guest(&f->vcpu);
}

/* May a vCPU that has read the page write it, without looking again? */
static bool may_write_after_read(struct fixture *f, uint64_t gpa)
{
	bool writable;

	enter(f, gpa, KL_ACC_READ, &writable);
	kl_vcpu_leave_guest(&f->vcpu);
	return writable;
}

/* D1: errors as KVM's. */
static void errors(void **state)
{
	struct fixture *f = *state;
	uint64_t word;

	assert_int_equal(kl_dirty_log_get(&f->vm, 0, 0, &word, false), -ENOENT);
	assert_int_equal(kl_dirty_log_get(&f->vm, 0, 1, &word, false), -ENOENT);
	assert_int_equal(kl_dirty_log_get(&f->vm, 0, KL_USER_MEM_SLOTS, &word, false), -EINVAL);
	assert_int_equal(kl_dirty_log_get(&f->vm, KL_NR_AS, 0, &word, false), -EINVAL);
	assert_int_equal(log_on(f), 0);
	assert_int_equal(kl_dirty_log_get(&f->vm, 0, 0, &word, false), 0);
	assert_int_equal(log_off(f), 0);
	assert_int_equal(kl_dirty_log_get(&f->vm, 0, 0, &word, false), -ENOENT);
}

/* D1, D3: what is written is in the next log, once; what is read is not. */
static void writes_are_logged(void **state)
{
	struct fixture *f = *state;

	assert_int_equal(log_on(f), 0);
	assert_false(may_write_after_read(f, 2 * PG));
	store(f, 3 * PG);
	store(f, 15 * PG);
	assert_true(may_write_after_read(f, 3 * PG));
	assert_int_equal(peek_log(f), 1u << 3 | 1u << 15);
	assert_int_equal(get_log(f), 1u << 3 | 1u << 15);
	/* Taken: to be marked again, but not to fault. */
	assert_false(may_write_after_read(f, 3 * PG));
	assert_int_equal(get_log(f), 0);
	store(f, 3 * PG);
	assert_int_equal(get_log(f), 1u << 3);
	assert_int_equal(get_log(f), 0);
}

/* D4: logging begins and ends; what was mapped stays mapped. */
static void on_and_off(void **state)
{
	struct fixture *f = *state;
	uint64_t faults;

	store(f, 0);
	assert_true(may_write_after_read(f, 0));
	assert_false(kl_vm_logs(&f->vm));
	assert_int_equal(log_on(f), 0);
	faults = kl_stat_get(&f->vcpu.stats.pf_taken);
	assert_false(may_write_after_read(f, 0));
	assert_int_equal(get_log(f), 0);
	store(f, 0);
	assert_int_equal(get_log(f), 1);
	store(f, 0);
	assert_int_equal(log_off(f), 0);
	assert_false(kl_vm_logs(&f->vm));
	assert_true(may_write_after_read(f, 0));
	/* A log that is used again is empty. */
	assert_int_equal(log_on(f), 0);
	assert_int_equal(get_log(f), 0);
	assert_int_equal(kl_stat_get(&f->vcpu.stats.pf_taken), faults);
}

/* D1: the log that is kept for the next slot is not one of another size. */
static void logs_of_slots(void **state)
{
	struct fixture *f = *state;
	uint64_t bits[2];

	for (unsigned n = 1; n <= 3; n++) {
		assert_int_equal(set(&f->vm, 1, LOG, GPA, n * PG, f->ram), 0);
		store(f, GPA + (n - 1) * PG);
		assert_int_equal(set(&f->vm, 2, LOG, 2 * GPA, n * PG, f->ram), 0);
		store(f, 2 * GPA);
		assert_int_equal(kl_dirty_log_get(&f->vm, 0, 1, &bits[0], false), 0);
		assert_int_equal(kl_dirty_log_get(&f->vm, 0, 2, &bits[1], false), 0);
		assert_int_equal(bits[0], 1u << (n - 1));
		assert_int_equal(bits[1], 1);
		store(f, GPA);
		store(f, 2 * GPA);
		assert_int_equal(set(&f->vm, 1, 0, GPA, 0, f->ram), 0);
		assert_int_equal(set(&f->vm, 2, 0, 2 * GPA, 0, f->ram), 0);
	}
	/* The second address space has its own. */
	assert_int_equal(set(&f->vm, 1 << 16, LOG, 0, NPAGES * PG, f->ram), 0);
	store(f, 0);
	assert_int_equal(kl_dirty_log_get(&f->vm, 1, 0, bits, false), 0);
	assert_int_equal(bits[0], 0);
	f->vcpu.as_id = 1;
	store(f, 2 * PG);
	f->vcpu.as_id = 0;
	assert_int_equal(kl_dirty_log_get(&f->vm, 1, 0, bits, false), 0);
	assert_int_equal(bits[0], 4);
}

/* D4, M1: a log has pages of 4 KiB whatever the size of leaves, which stay what they are. */
static void large_leaves(void **state)
{
	struct fixture *f = *state;
	struct kl_vm_stats *s = &f->vm.stats;
	uint8_t *p = map_written(2 * MB);
	uint64_t bitmap[8];

	assert_int_equal(set(&f->vm, 1, 0, GPA, 2 * MB, p), 0);
	store(f, GPA);
	assert_int_equal(kl_stat_get(&s->pages_2m), 1);
	assert_int_equal(set(&f->vm, 1, LOG, GPA, 2 * MB, p), 0);
	assert_int_equal(kl_stat_get(&s->pages_2m), 1);
	assert_false(may_write_after_read(f, GPA));
	store(f, GPA + 65 * PG);
	assert_int_equal(kl_stat_get(&s->pages_4k), 0);
	assert_int_equal(kl_dirty_log_get(&f->vm, 0, 1, bitmap, false), 0);
	for (int i = 0; i < 8; i++)
		assert_int_equal(bitmap[i], i == 1 ? 2 : 0);
	assert_int_equal(set(&f->vm, 1, 0, GPA, 0, p), 0);
	/* And may be made while the slot logs. */
	assert_int_equal(set(&f->vm, 1, LOG, GPA, 2 * MB, p), 0);
	store(f, GPA + 511 * PG);
	assert_int_equal(kl_stat_get(&s->pages_2m), 1);
	assert_int_equal(kl_dirty_log_get(&f->vm, 0, 1, bitmap, false), 0);
	assert_true(bitmap[7] == 1ull << 63 && !bitmap[0]);
	munmap(p, 2 * MB);
}

/* D1: a slot of 64 GiB of which little is there: the bits are where they belong. */
static void sparse(void **state)
{
	enum { WORDS = 64 * GB / PG / 64 };
	static const uint64_t at[] = {0, 64, 511, 512, 32767, 32768, WORDS * 64ul - 1};
	struct fixture *f = *state;
	uint64_t *bitmap = malloc(WORDS * 8);
	uint8_t *p = mmap(NULL, 64 * GB, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	assert_true(p != MAP_FAILED && bitmap);
	madvise(p, 64 * GB, MADV_NOHUGEPAGE);
	assert_int_equal(set(&f->vm, 1, LOG, GPA, 64 * GB, p), 0);
	for (int round = 0; round < 3; round++) {
		bool keep = round == 1;

		for (size_t i = 0; i < KL_ARRAY_SIZE(at) && round < 2; i++)
			store(f, GPA + at[i] * PG);
		memset(bitmap, 0xff, WORDS * 8);
		assert_int_equal(kl_dirty_log_get(&f->vm, 0, 1, bitmap, keep), 0);
		for (size_t i = 0; i < KL_ARRAY_SIZE(at); i++) {
			assert_true(bitmap[at[i] / 64] >> at[i] % 64 & 1);
			bitmap[at[i] / 64] &= ~(1ull << at[i] % 64);
		}
		for (size_t i = 0; i < WORDS; i++)
			assert_int_equal(bitmap[i], 0);
	}
	munmap(p, 64 * GB);
	free(bitmap);
}

/* D3: a bitmap that can't be written loses nothing. */
static void bad_bitmap(void **state)
{
	struct fixture *f = *state;

	assert_int_equal(log_on(f), 0);
	store(f, 4 * PG);
	assert_int_equal(kl_dirty_log_get(&f->vm, 0, 0, NULL, false), -EFAULT);
	assert_int_equal(kl_dirty_log_get(&f->vm, 0, 0, NULL, true), -EFAULT);
	assert_int_equal(get_log(f), 1u << 4);
}

/* The same where the marks are in many words, and of several lines of them. */
static void bad_bitmap_of_many(void **state)
{
	enum { PAGES = 2048 };
	struct fixture *f = *state;
	uint8_t *p =
		mmap(NULL, PAGES * PG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t bitmap[PAGES / 64];

	assert_int_equal(set(&f->vm, 1, KVM_MEM_LOG_DIRTY_PAGES, 1ul << 32, PAGES * PG, p), 0);
	for (unsigned i = 5; i < PAGES; i += 101)
		store(f, (1ul << 32) + i * PG);
	assert_int_equal(kl_dirty_log_get(&f->vm, 0, 1, NULL, false), -EFAULT);
	assert_int_equal(kl_dirty_log_get(&f->vm, 0, 1, bitmap, false), 0);
	for (unsigned i = 0; i < PAGES; i++)
		assert_int_equal(bitmap[i / 64] >> i % 64 & 1, i >= 5 && (i - 5) % 101 == 0);
	assert_int_equal(set(&f->vm, 1, 0, 1ul << 32, 0, p), 0);
	munmap(p, PAGES * PG);
}

/* A log that is used again is empty, both halves of it. */
static void used_again(void **state)
{
	struct fixture *f = *state;

	for (unsigned i = 0; i < 3; i++) {
		assert_int_equal(log_on(f), 0);
		assert_int_equal(get_log(f), 0);
		for (unsigned k = 0; k <= i; k++) {
			store(f, (3 + i + k) * PG);
			if (k < i)
				assert_int_equal(get_log(f), 1u << (3 + i + k));
		}
		assert_int_equal(set(&f->vm, 0, 0, 0, NPAGES * PG, f->ram), 0);
	}
}

/* D1: the log of a slot of the second address space. */
static void second_space(void **state)
{
	const unsigned id = 3;
	struct fixture *f = *state;
	uint64_t mask = ~0ull, word = 0;

	assert_int_equal(
		set(&f->vm, 1u << 16 | id, KVM_MEM_LOG_DIRTY_PAGES, 0, NPAGES * PG, f->ram), 0);
	assert_int_equal(f->vm.slot_by_id[1][id]->log->slot, 1u << 16 | id);
	f->vcpu.as_id = 1;
	for (unsigned i = 0; i < 2; i++) {
		store(f, 5 * PG);
		assert_int_equal(kl_dirty_log_clear(&f->vm, 1, id, 0, NPAGES, &mask), 0);
		store(f, (6 + i) * PG);
		assert_int_equal(kl_dirty_log_get(&f->vm, 1, id, &word, false), 0);
		assert_int_equal(word, 1u << (6 + i));
	}
	assert_int_equal(kl_dirty_log_get(&f->vm, 0, id, &word, false), -ENOENT);
}

/* D1: what clearing takes and what it leaves. */
static void clear(void **state)
{
	struct fixture *f = *state;
	uint64_t mask = 1u << 3;

	assert_int_equal(log_on(f), 0);
	store(f, 3 * PG);
	store(f, 4 * PG);
	assert_int_equal(kl_dirty_log_clear(&f->vm, 0, 0, 0, NPAGES, &mask), 0);
	assert_false(may_write_after_read(f, 3 * PG));
	assert_true(may_write_after_read(f, 4 * PG));
	assert_int_equal(peek_log(f), 1u << 4);
	store(f, 3 * PG);
	assert_int_equal(peek_log(f), 3u << 3);
	mask = ~0ull;
	assert_int_equal(kl_dirty_log_clear(&f->vm, 0, 0, 0, NPAGES, &mask), 0);
	assert_int_equal(peek_log(f), 0);
}

/* D1: KVM_DIRTY_LOG_INITIALLY_SET, and no bits behind the end of the slot. */
static void initially_set(void **state)
{
	struct fixture *f = *state;
	uint64_t mask = 2;

	f->vm.manual_dirty_log = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
	for (int i = 0; i < 2; i++) { /* once with a log that was used before */
		assert_int_equal(log_on(f), 0);
		store(f, 0);
		assert_true(may_write_after_read(f, 0));
		assert_int_equal(peek_log(f), (1u << NPAGES) - 1);
		assert_int_equal(kl_dirty_log_clear(&f->vm, 0, 0, 0, NPAGES, &mask), 0);
		assert_int_equal(peek_log(f), ((1u << NPAGES) - 1) & ~2u);
		assert_int_equal(log_off(f), 0);
	}
}

/* ---- interleavings ------------------------------------------------------------------- */

static void *log_thread(void *arg)
{
	struct fixture *f = arg;

	return (void *)get_log(f);
}

static void *clear_thread(void *arg)
{
	struct fixture *f = arg;
	uint64_t mask = ~0ull;

	return (void *)(long)kl_dirty_log_clear(&f->vm, 0, 0, 0, NPAGES, &mask);
}

static void *log_on_thread(void *arg)
{
	return (void *)(long)log_on(arg);
}

static void *log_off_thread(void *arg)
{
	return (void *)(long)log_off(arg);
}

static void *store_thread(void *arg)
{
	store(arg, 5 * PG);
	return NULL;
}

/* A thread does @fn, which has to wait for the vCPU, which holds a pointer and writes once more. */
static void waits_for_guest_mode(struct fixture *f, void *(*fn)(void *), void **result)
{
	bool writable, mmio;
	pthread_t t;
	uint8_t *p;

	store(f, 0);
	p = enter(f, 0, KL_ACC_WRITE, &writable);
	assert_ptr_equal(p, f->ram);
	pthread_create(&t, NULL, fn, f);
	while (!(kl_vcpu_requests(&f->vcpu) & KL_REQ_TLB_FLUSH))
		sched_yield();
	assert_int_equal(pthread_tryjoin_np(t, result), EBUSY);
	kl_store8(p, 99);
	kl_vcpu_take_requests(&f->vcpu, KL_REQ_TLB_FLUSH);
	if (kl_vm_logs(&f->vm)) {
		assert_non_null(kl_mmu_lookup(&f->vcpu, 0, KL_ACC_READ, &writable, &mmio));
		assert_false(writable);
	}
	kl_vcpu_leave_guest(&f->vcpu);
	pthread_join(t, result);
}

/*
 * D3: the vCPU holds a pointer for writing when its page is taken from the log. The log waits for
 * it, so that the store is in this log.
 */
static void log_waits_for_guest_mode(void **state)
{
	struct fixture *f = *state;
	void *word;

	assert_int_equal(log_on(f), 0);
	waits_for_guest_mode(f, log_thread, &word);
	assert_int_equal((uint64_t)word, 1);
	assert_int_equal(get_log(f), 0);
}

/* D3: so does one that clears, */
static void clear_waits_for_guest_mode(void **state)
{
	struct fixture *f = *state;
	void *r;

	assert_int_equal(log_on(f), 0);
	waits_for_guest_mode(f, clear_thread, &r);
	assert_null(r);
	assert_int_equal(get_log(f), 0);
}

/* D4: and who turns logging on. */
static void logging_waits_for_guest_mode(void **state)
{
	struct fixture *f = *state;
	void *r;

	waits_for_guest_mode(f, log_on_thread, &r);
	assert_null(r);
	assert_int_equal(get_log(f), 0);
}

/*
 * D4: a vCPU has found the log, and has not marked its page, when logging ends: the log is not
 * freed under it.
 */
static void logging_ends_during_lookup(void **state)
{
	struct fixture *f = *state;
	pthread_t w, t;
	void *r;

	NEED_RACEPOINTS;
	assert_int_equal(log_on(f), 0);
	assert_int_equal(kl_mmu_fault(&f->vcpu, 5 * PG, KL_ACC_WRITE), KL_FAULT_MAPPED);
	kl_racepoint_arm("dirty-log-found", 1);
	pthread_create(&w, NULL, store_thread, f);
	assert_true(kl_racepoint_wait("dirty-log-found", TIMEOUT));
	kl_racepoint_arm("vcpu-awaited", 1);
	pthread_create(&t, NULL, log_off_thread, f);
	assert_true(kl_racepoint_wait("vcpu-awaited", TIMEOUT));
	kl_racepoint_release("vcpu-awaited");
	assert_int_equal(pthread_tryjoin_np(t, &r), EBUSY);
	kl_racepoint_release("dirty-log-found");
	pthread_join(w, NULL);
	pthread_join(t, &r);
	assert_null(r);
}

/*
 * D3: a vCPU has seen which half is the current one, and marks in it after it is not that any more.
 * Who reads the log waits for it, and finds the mark.
 */
static void mark_in_old_half(void **state)
{
	struct fixture *f = *state;
	pthread_t w, t;
	void *word;

	NEED_RACEPOINTS;
	assert_int_equal(log_on(f), 0);
	store(f, 6 * PG);
	assert_int_equal(kl_mmu_fault(&f->vcpu, 5 * PG, KL_ACC_WRITE), KL_FAULT_MAPPED);
	kl_racepoint_arm("dirty-marking", 1);
	pthread_create(&w, NULL, store_thread, f);
	assert_true(kl_racepoint_wait("dirty-marking", TIMEOUT));
	kl_racepoint_arm("vcpu-awaited", 1);
	pthread_create(&t, NULL, log_thread, f);
	assert_true(kl_racepoint_wait("vcpu-awaited", TIMEOUT));
	kl_racepoint_release("dirty-marking");
	pthread_join(w, NULL);
	kl_racepoint_release("vcpu-awaited");
	pthread_join(t, &word);
	assert_int_equal((uint64_t)word, 3u << 5);
	assert_int_equal(get_log(f), 0);
}

static void *mark_thread(void *arg)
{
	struct fixture *f = arg;

	kl_store8(f->ram + 7 * PG, 1);
	kl_dirty_mark(&f->vm, f->vm.slot_by_id[0][0]->log, 7);
	return NULL;
}

/*
 * D3, G13: the same with a mark that nobody waits for: it comes after the half was read, and is
 * made again in the other one.
 */
static void late_mark(void **state)
{
	struct fixture *f = *state;
	pthread_t t;

	NEED_RACEPOINTS;
	assert_int_equal(log_on(f), 0);
	store(f, 6 * PG);
	kl_racepoint_arm("dirty-mark", 1);
	pthread_create(&t, NULL, mark_thread, f);
	assert_true(kl_racepoint_wait("dirty-mark", TIMEOUT));
	assert_int_equal(get_log(f), 1u << 6);
	kl_racepoint_release("dirty-mark");
	pthread_join(t, NULL);
	assert_int_equal(get_log(f), 1u << 7);
	/* It is in the half that was read, too: reported once more, not lost and not for ever. */
	assert_int_equal(get_log(f), 1u << 7);
	assert_int_equal(get_log(f), 0);
	assert_int_equal(get_log(f), 0);
}

/* D3: a page that is written while the log is being read is in this log or the next. */
static void write_during_log(void **state)
{
	static const char *const at[] = {"dirty-swapped", "dirty-flushed"};
	struct fixture *f = *state;
	pthread_t t;
	void *word;

	NEED_RACEPOINTS;
	assert_int_equal(log_on(f), 0);
	for (size_t i = 0; i < KL_ARRAY_SIZE(at); i++) {
		store(f, 5 * PG);
		kl_racepoint_arm(at[i], 1);
		pthread_create(&t, NULL, log_thread, f);
		assert_true(kl_racepoint_wait(at[i], TIMEOUT));
		store(f, 5 * PG);
		store(f, 8 * PG);
		kl_racepoint_release(at[i]);
		pthread_join(t, &word);
		assert_int_equal((uint64_t)word, 1u << 5);
		assert_int_equal(get_log(f), 1u << 5 | 1u << 8);
	}
}

/* D1: a page is marked when clearing is done with its word, and when it is done with its line. */
static void mark_during_clear(void **state)
{
	struct fixture *f = *state;
	pthread_t t;
	void *r;

	NEED_RACEPOINTS;
	assert_int_equal(log_on(f), 0);
	store(f, 5 * PG);
	kl_racepoint_arm("dirty-cleared", 1);
	pthread_create(&t, NULL, clear_thread, f);
	assert_true(kl_racepoint_wait("dirty-cleared", TIMEOUT));
	store(f, 8 * PG);
	kl_racepoint_release("dirty-cleared");
	pthread_join(t, &r);
	assert_null(r);
	assert_int_equal(peek_log(f), 1u << 8);

	kl_racepoint_arm("dirty-line-read", 1);
	pthread_create(&t, NULL, clear_thread, f);
	assert_true(kl_racepoint_wait("dirty-line-read", TIMEOUT));
	store(f, 9 * PG);
	kl_racepoint_release("dirty-line-read");
	pthread_join(t, &r);
	assert_int_equal(peek_log(f), 1u << 9);
}

/* ---- all of a larger log is cleared at once ---- */

#define MANY 2000u

static uint64_t many_mask[(MANY + 63) / 64];

static void *clear_many(void *arg)
{
	struct fixture *f = arg;

	return (void *)(long)kl_dirty_log_clear(&f->vm, 0, 1, 0, MANY, many_mask);
}

/* The log of slot 1 has @a and @b, and no others. */
static void assert_many(struct fixture *f, unsigned a, unsigned b)
{
	uint64_t bitmap[(MANY + 63) / 64];

	assert_int_equal(kl_dirty_log_get(&f->vm, 0, 1, bitmap, true), 0);
	for (unsigned page = 0; page < MANY; page++)
		assert_int_equal(bitmap[page / 64] >> page % 64 & 1, page == a || page == b);
}

static uint8_t *many(struct fixture *f)
{
	uint8_t *p =
		mmap(NULL, MANY * PG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	assert_true(p != MAP_FAILED);
	assert_int_equal(set(&f->vm, 1, LOG, GPA, MANY * PG, p), 0);
	memset(many_mask, 0, sizeof(many_mask));
	return p;
}

/* D1: what the mask leaves stays marked, and may be written without being marked anew. */
static void clear_at_once(void **state)
{
	struct fixture *f = *state;
	uint8_t *p = many(f);

	store(f, GPA + 3 * PG);
	store(f, GPA + 600 * PG);
	store(f, GPA + (MANY - 1) * PG);
	many_mask[600 / 64] = ~0ull;
	assert_null(clear_many(f));
	assert_many(f, 3, MANY - 1);
	assert_false(may_write_after_read(f, GPA + 600 * PG));
	assert_true(may_write_after_read(f, GPA + 3 * PG));
	memset(many_mask, 0xff, sizeof(many_mask));
	assert_null(clear_many(f));
	assert_many(f, MANY, MANY);
	store(f, GPA + 5 * PG);
	assert_many(f, 5, 5);
	munmap(p, MANY * PG);
}

static uint64_t flushes(struct fixture *f)
{
	return kl_stat_get(&f->vm.stats.remote_tlb_flush_requests);
}

/* D1, M6: after a part of it has been cleared the log is clean: to clear it all costs no flush. */
static void cleared_is_clean(void **state)
{
	struct fixture *f = *state;
	uint8_t *p = many(f);
	uint64_t mask = 1u << 3, n;

	store(f, GPA + 3 * PG);
	n = flushes(f);
	assert_int_equal(kl_dirty_log_clear(&f->vm, 0, 1, 0, 64, &mask), 0);
	assert_int_equal(flushes(f), n + 1);
	assert_many(f, MANY, MANY);
	memset(many_mask, 0xff, sizeof(many_mask));
	assert_null(clear_many(f));
	assert_int_equal(flushes(f), n + 1);
	/* What is left of a word is not clean. */
	store(f, GPA + 3 * PG);
	store(f, GPA + 4 * PG);
	assert_int_equal(kl_dirty_log_clear(&f->vm, 0, 1, 0, 64, &mask), 0);
	n = flushes(f);
	assert_null(clear_many(f));
	assert_int_equal(flushes(f), n + 1);
	assert_false(may_write_after_read(f, GPA + 4 * PG));
	munmap(p, MANY * PG);
}

/* D1, D3: a page that is written when the halves have been swapped is marked afterwards. */
static void write_during_clear(void **state)
{
	struct fixture *f = *state;
	uint8_t *p;
	pthread_t t;
	void *r;

	NEED_RACEPOINTS;
	p = many(f);
	store(f, GPA + 3 * PG);
	memset(many_mask, 0xff, sizeof(many_mask));
	kl_racepoint_arm("dirty-clear-swapped", 1);
	pthread_create(&t, NULL, clear_many, f);
	assert_true(kl_racepoint_wait("dirty-clear-swapped", TIMEOUT));
	store(f, GPA + 3 * PG);
	store(f, GPA + 700 * PG);
	kl_racepoint_release("dirty-clear-swapped");
	pthread_join(t, &r);
	assert_null(r);
	assert_many(f, 3, 700);
	munmap(p, MANY * PG);
}

/* D1, M6: who clears waits for who may still write without marking. */
static void clear_at_once_waits(void **state)
{
	struct fixture *f = *state;
	bool writable;
	uint8_t *p;
	pthread_t t;
	void *r;

	NEED_RACEPOINTS;
	p = many(f);
	store(f, GPA + 3 * PG);
	memset(many_mask, 0xff, sizeof(many_mask));
	enter(f, GPA + 3 * PG, KL_ACC_WRITE, &writable);
	kl_racepoint_arm("vcpu-awaited", 1);
	pthread_create(&t, NULL, clear_many, f);
	assert_true(kl_racepoint_wait("vcpu-awaited", wait_ms()));
	kl_racepoint_release("vcpu-awaited");
	assert_int_equal(pthread_tryjoin_np(t, &r), EBUSY);
	kl_vcpu_leave_guest(&f->vcpu);
	pthread_join(t, &r);
	assert_null(r);
	munmap(p, MANY * PG);
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
	assert_int_equal(get_log(f), 0);
	store(f, 6 * PG);
	assert_int_equal(get_log(f), 1u << 6);
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
		T(on_and_off),
		T(logs_of_slots),
		T(large_leaves),
		T(sparse),
		T(bad_bitmap),
		T(bad_bitmap_of_many),
		T(used_again),
		T(second_space),
		T(clear),
		T(initially_set),
		T(log_waits_for_guest_mode),
		T(clear_waits_for_guest_mode),
		T(logging_waits_for_guest_mode),
		T(logging_ends_during_lookup),
		T(mark_in_old_half),
		T(late_mark),
		T(write_during_log),
		T(mark_during_clear),
		T(clear_at_once),
		T(cleared_is_clean),
		T(write_during_clear),
		T(clear_at_once_waits),
		T(logging_begins_during_fault),
		T(copy_by_log),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
