/* SPDX-License-Identifier: MIT */
/*
 * Stage 2 itself: leaves of all sizes, zaps in batches and all at once, ageing (M1, M2, M5, M7, N6,
 * N7, S4, S6).
 */
#include "mmu_env.h"

#include "base/failpoint.h"
#include "host/uffd.h"
#include "mem/subscribers.h"
#include "mmu/stage2.h"

#define MB  (1ul << 20)
#define GB  (1ul << 30)
#define GPA (4 * GB) /* of the second slot */

static uint64_t pages(struct fixture *f, unsigned level)
{
	struct kl_vm_stats *s = &f->vm.stats;

	return kl_stat_get(level == 1 ? &s->pages_4k : level == 2 ? &s->pages_2m : &s->pages_1g);
}

/* @size bytes, aligned to it; resident, as zero pages of 4 KiB, which cost nothing. */
static uint8_t *resident(size_t size)
{
	uint8_t *a = map_aligned(size, PROT_NONE);

	assert_int_equal(mprotect(a, size, PROT_READ | PROT_WRITE), 0);
	assert_int_equal(madvise(a, size, MADV_NOHUGEPAGE), 0);
	assert_int_equal(madvise(a, size, MADV_POPULATE_READ), 0);
	return a;
}

static void fault_ok(struct fixture *f, uint64_t gpa, unsigned access)
{
	assert_int_equal(kl_mmu_fault(&f->vcpu, gpa, access), KL_FAULT_MAPPED);
	assert_true(mapped(f, gpa, access));
}

static uint8_t *lookup(struct fixture *f, uint64_t gpa, unsigned access)
{
	bool writable, mmio;

	return kl_mmu_lookup(&f->vcpu, gpa, access, &writable, &mmio);
}

/* M1, M3: resident memory of one mapping is one leaf; the first write upgrades all of it. */
static void leaf_2m(void **state)
{
	struct fixture *f = *state;
	uint8_t *p = resident(4 * MB);

	assert_int_equal(set(&f->vm, 1, 0, GPA, 4 * MB, p), 0);
	fault_ok(f, GPA + 5 * PG, KL_ACC_READ);
	assert_int_equal(pages(f, 2), 1);
	assert_int_equal(pages(f, 1), 0);
	for (unsigned i = 0; i < 512; i++) {
		kl_vcpu_enter_guest(&f->vcpu);
		assert_ptr_equal(lookup(f, GPA + i * PG, KL_ACC_READ), p + i * PG);
		assert_null(lookup(f, GPA + i * PG, KL_ACC_WRITE));
		kl_vcpu_leave_guest(&f->vcpu);
	}
	assert_false(mapped(f, GPA + 2 * MB, KL_ACC_READ));
	fault_ok(f, GPA + 7 * PG, KL_ACC_WRITE);
	assert_true(mapped(f, GPA + 100 * PG, KL_ACC_WRITE));
	assert_int_equal(pages(f, 2), 1);
	assert_int_equal(set(&f->vm, 1, 0, GPA, 0, NULL), 0);
	assert_int_equal(pages(f, 2), 0);
	munmap(p, 4 * MB);
}

/* M1: a gigabyte at once, and back. */
static void leaf_1g(void **state)
{
	struct fixture *f = *state;
	uint8_t *p = resident(GB);
	struct kl_notifier_range r = range_of(p + 77 * PG, PG);

	assert_int_equal(set(&f->vm, 1, 0, GPA, GB, p), 0);
	fault_ok(f, GPA + 3 * MB, KL_ACC_READ);
	assert_int_equal(pages(f, 3), 1);
	kl_vcpu_enter_guest(&f->vcpu);
	assert_ptr_equal(lookup(f, GPA + GB - PG, KL_ACC_READ), p + GB - PG);
	kl_vcpu_leave_guest(&f->vcpu);
	/* One page of it goes: all of it goes, and comes back smaller. */
	assert_int_equal(kl_notifier_begin(&r), 0);
	assert_int_equal(pages(f, 3), 0);
	assert_false(mapped(f, GPA, KL_ACC_READ));
	madvise(p + 77 * PG, PG, MADV_DONTNEED);
	kl_notifier_end(&r);
	fault_ok(f, GPA + 4 * MB, KL_ACC_READ);
	assert_int_equal(pages(f, 2), 1);
	fault_ok(f, GPA + PG, KL_ACC_READ);
	assert_int_equal(pages(f, 1), 1);
	assert_int_equal(pages(f, 3), 0);
	munmap(p, GB);
}

/* M1: the whole range must lie in the slot, be congruent, resident, one mapping, not watched. */
static void small_where_not_allowed(void **state)
{
	struct fixture *f = *state;
	uint8_t *p = resident(4 * MB);

	for (unsigned way = 0; way < 6; way++) {
		uint64_t gpa = GPA, off = 0, size = 4 * MB;

		switch (way) {
		case 0: /* not congruent */
			gpa += PG;
			break;
		case 1: /* the slot ends before */
			size = 2 * MB - PG;
			break;
		case 2: /* it begins behind */
			gpa += PG;
			off = PG;
			size = 2 * MB - PG;
			break;
		case 3: /* not resident */
			madvise(p + 511 * PG, PG, MADV_DONTNEED);
			break;
		case 4: /* two mappings; all of it resident again */
			madvise(p, 2 * MB, MADV_POPULATE_READ);
			mprotect(p + 300 * PG, PG, PROT_READ);
			break;
		default: /* somebody handles faults there */
			mprotect(p, 4 * MB, PROT_READ | PROT_WRITE);
			kl_uffd_add((uint64_t)p + 400 * PG, (uint64_t)p + 401 * PG);
		}
		assert_int_equal(set(&f->vm, 1, 0, gpa, size, p + off), 0);
		fault_ok(f, GPA + 8 * PG + (way ? 0 : 2 * MB), KL_ACC_READ);
		assert_int_equal(pages(f, 1), 1);
		assert_int_equal(pages(f, 2), 0);
		assert_int_equal(set(&f->vm, 1, 0, gpa, 0, NULL), 0);
	}
	kl_uffd_remove((uint64_t)p + 400 * PG, (uint64_t)p + 401 * PG);
	assert_int_equal(set(&f->vm, 1, 0, GPA, 4 * MB, p), 0);
	fault_ok(f, GPA, KL_ACC_READ);
	assert_int_equal(pages(f, 2), 1);
	munmap(p, 4 * MB);
}

/* M1, N7: pages behind the end of a file are not covered, and not a crash. */
static void end_of_file(void **state)
{
	struct fixture *f = *state;
	uint8_t *a = resident(4 * MB), *p;
	int fd = memfd_create("t", 0);

	assert_int_equal(ftruncate(fd, 2 * MB - 3 * PG), 0);
	p = mmap(a, 2 * MB, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
	assert_ptr_equal(p, a);
	memset(p, 1, 2 * MB - 3 * PG);
	assert_int_equal(set(&f->vm, 1, 0, GPA, 4 * MB, p), 0);
	fault_ok(f, GPA, KL_ACC_WRITE);
	assert_int_equal(pages(f, 2), 0);
	assert_int_equal(kl_mmu_fault(&f->vcpu, GPA + 511 * PG, KL_ACC_READ), -EFAULT);
	close(fd);
	munmap(a, 4 * MB);
}

/* M1: a private file's pages are copied by the host; the leaf needs no change. */
static void private_file(void **state)
{
	struct fixture *f = *state;
	uint8_t *a = resident(2 * MB), *p, byte = 0;
	int fd = memfd_create("t", 0);

	assert_int_equal(ftruncate(fd, 2 * MB), 0);
	assert_int_equal(pwrite(fd, "x", 1, 9 * PG), 1);
	p = mmap(a, 2 * MB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, fd, 0);
	assert_ptr_equal(p, a);
	madvise(p, 2 * MB, MADV_POPULATE_READ);
	assert_int_equal(set(&f->vm, 1, 0, GPA, 2 * MB, p), 0);
	fault_ok(f, GPA, KL_ACC_READ);
	assert_int_equal(pages(f, 2), 1);
	fault_ok(f, GPA, KL_ACC_WRITE);
	kl_vcpu_enter_guest(&f->vcpu);
	*lookup(f, GPA + 9 * PG, KL_ACC_WRITE) = 'y';
	kl_vcpu_leave_guest(&f->vcpu);
	assert_int_equal(pread(fd, &byte, 1, 9 * PG), 1);
	assert_int_equal(byte, 'x');
	assert_int_equal(p[9 * PG], 'y');
	close(fd);
	munmap(a, 2 * MB);
}

/* M1: a page of the host's hugetlb is one leaf, by nature. */
static void hugetlb(void **state)
{
	struct fixture *f = *state;
	uint8_t *p = mmap(NULL, 2 * MB, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);

	if (p == MAP_FAILED)
		skip();
	assert_int_equal(set(&f->vm, 1, 0, GPA, 2 * MB, p), 0);
	fault_ok(f, GPA + PG, KL_ACC_WRITE);
	assert_int_equal(pages(f, 2), 1);
	assert_int_equal(pages(f, 1), 0);
	assert_int_equal(set(&f->vm, 1, 0, GPA, 0, NULL), 0);
	munmap(p, 2 * MB);
}

/* M1, M2: a fault that takes long does not hold another up, not even on the next page. */
static void faults_in_parallel(void **state)
{
	static const char *const places[] = {"fault-lookup", "fault-populate", "fault-populated"};
	struct fixture *f = *state;
	struct kl_vcpu_core second = {0};

	NEED_RACEPOINTS;
	assert_int_equal(kl_vcpu_core_add(&f->vm, &second, 1), 0);
	for (unsigned i = 0; i < 3; i++) {
		struct faulter t = {f, 2 * i * PG, KL_ACC_WRITE, -1};
		pthread_t thread;

		kl_racepoint_arm(places[i], 1);
		pthread_create(&thread, NULL, fault_thread, &t);
		assert_true(kl_racepoint_wait(places[i], TIMEOUT));
		assert_int_equal(kl_mmu_fault(&second, (2 * i + 1) * PG, KL_ACC_WRITE),
				 KL_FAULT_MAPPED);
		assert_int_equal(pages(f, 1), 2 * i + 1);
		kl_racepoint_release(places[i]);
		pthread_join(thread, NULL);
		assert_int_equal(t.r, KL_FAULT_MAPPED);
		assert_int_equal(pages(f, 1), 2 * i + 2);
	}
	kl_vcpu_core_remove(&second);
}

/* N7: a page of a large leaf that went unseen: EFAULT, and the leaf goes with it. */
static void vanished_page(void **state)
{
	struct fixture *f = *state;
	uint8_t *p = resident(2 * MB);

	assert_int_equal(set(&f->vm, 1, 0, GPA, 2 * MB, p), 0);
	fault_ok(f, GPA, KL_ACC_WRITE);
	assert_int_equal(pages(f, 2), 1);
	munmap(p + 6 * PG, PG); /* no bracket */
	assert_int_equal(kl_mmu_fault(&f->vcpu, GPA + 6 * PG, KL_ACC_READ), -EFAULT);
	assert_int_equal(pages(f, 2), 0);
	assert_false(mapped(f, GPA + 6 * PG, KL_ACC_READ));
	fault_ok(f, GPA + 7 * PG, KL_ACC_WRITE);
	assert_int_equal(pages(f, 1), 1);
	/* Read-only, unseen: a write is refused and takes the leaf along, a read is not. */
	mprotect(p + 7 * PG, PG, PROT_READ);
	assert_int_equal(kl_mmu_fault(&f->vcpu, GPA + 7 * PG, KL_ACC_WRITE), -EFAULT);
	assert_int_equal(pages(f, 1), 0);
	fault_ok(f, GPA + 7 * PG, KL_ACC_READ);
	munmap(p, 2 * MB);
}

/* N7, N6: the pages beside one that went unseen stay mapped, and as young as they were. */
static void vanished_alone(void **state)
{
	struct fixture *f = *state;
	uint64_t beside[] = {(uint64_t)f->ram, (uint64_t)f->ram + 2 * PG};

	for (uint64_t gpa = 0; gpa < 3 * PG; gpa += PG)
		fault_ok(f, gpa, KL_ACC_WRITE);
	mprotect(f->ram + PG, PG, PROT_NONE); /* no bracket */
	assert_int_equal(kl_mmu_fault(&f->vcpu, PG, KL_ACC_READ), -EFAULT);
	assert_int_equal(pages(f, 1), 2);
	for (unsigned i = 0; i < KL_ARRAY_SIZE(beside); i++)
		assert_int_equal(kl_notifier_test_young(beside[i], beside[i] + PG), 1);
	assert_true(mapped(f, 0, KL_ACC_WRITE) && mapped(f, 2 * PG, KL_ACC_WRITE));
}

/* M1: where the host does not say what is mapped there the leaf is small, whatever it said before.
 */
static void host_does_not_say(void **state)
{
	struct fixture *f = *state;
	uint8_t *p;

	if (!kl_failpoints_enabled())
		skip();
	p = resident(8 * MB);
	assert_int_equal(set(&f->vm, 1, 0, GPA, 8 * MB, p), 0);
	fault_ok(f, GPA, KL_ACC_READ);
	assert_int_equal(pages(f, 2), 1);
	for (uint64_t off = 2 * MB; off < 8 * MB; off += 2 * MB) {
		struct kl_notifier_range r = range_of(p, PG);

		/* It has to be asked anew. */
		assert_int_equal(kl_notifier_begin(&r), 0);
		kl_notifier_end(&r);
		kl_failpoint_arm("host-mapping", 1);
		fault_ok(f, GPA + off, KL_ACC_READ);
		assert_true(kl_failpoint_disarm("host-mapping"));
		assert_int_equal(pages(f, 2), 0);
		fault_ok(f, GPA, KL_ACC_READ);
		assert_int_equal(pages(f, 2), 1);
	}
	assert_int_equal(pages(f, 1), 3);
	munmap(p, 8 * MB);
}

/* M2, M1: no large leaf over a page whose invalidation is in progress. */
static void fault_beside_bracket(void **state)
{
	struct fixture *f = *state;
	uint8_t *p = resident(2 * MB);
	struct kl_notifier_range r = range_of(p + 20 * PG, PG);

	assert_int_equal(set(&f->vm, 1, 0, GPA, 2 * MB, p), 0);
	assert_int_equal(kl_notifier_begin(&r), 0);
	fault_ok(f, GPA, KL_ACC_READ);
	assert_int_equal(pages(f, 1), 1);
	assert_false(mapped(f, GPA + 20 * PG, KL_ACC_READ));
	assert_int_equal(kl_mmu_fault(&f->vcpu, GPA + 20 * PG, KL_ACC_READ), KL_FAULT_MAPPED);
	assert_false(mapped(f, GPA + 20 * PG, KL_ACC_READ));
	kl_notifier_end(&r);
	fault_ok(f, GPA + 20 * PG, KL_ACC_READ);
	munmap(p, 2 * MB);
}

/* M1, M2: a large and a small leaf of two faults in the same range; either way one is right. */
static void two_faults_in_one_range(void **state)
{
	struct fixture *f = *state;
	struct faulter t = {f, GPA, KL_ACC_READ, -1};
	uint8_t *p = resident(2 * MB);
	pthread_t thread;

	NEED_RACEPOINTS;
	for (unsigned way = 0; way < 3; way++) {
		assert_int_equal(set(&f->vm, 1, 0, GPA, 2 * MB, p), 0);
		kl_racepoint_arm("fault-huge", 1);
		pthread_create(&thread, NULL, fault_thread, &t);
		assert_true(kl_racepoint_wait("fault-huge", TIMEOUT));
		if (way == 0) { /* the other one is large, too, and may write */
			fault_ok(f, GPA + PG, KL_ACC_WRITE);
			assert_int_equal(pages(f, 2), 1);
		} else if (way == 1) { /* the other one is small: a page is missing */
			madvise(p + 99 * PG, PG, MADV_DONTNEED);
			fault_ok(f, GPA + PG, KL_ACC_WRITE);
			assert_int_equal(pages(f, 1), 1);
		} else { /* a page of the range is invalidated meanwhile */
			struct kl_notifier_range r = range_of(p + 50 * PG, PG);

			assert_int_equal(kl_notifier_begin(&r), 0);
			kl_notifier_end(&r);
		}
		kl_racepoint_release("fault-huge");
		pthread_join(thread, NULL);
		assert_int_equal(t.r, KL_FAULT_MAPPED);
		assert_int_equal(mapped(f, GPA, KL_ACC_READ), way != 2);
		assert_int_equal(pages(f, 2), way == 0);
		assert_int_equal(pages(f, 1), way == 1 ? 2 : 0);
		if (way == 0)
			assert_true(mapped(f, GPA, KL_ACC_WRITE)); /* and was not taken back */
		assert_int_equal(set(&f->vm, 1, 0, GPA, 0, NULL), 0);
		madvise(p, 2 * MB, MADV_POPULATE_READ);
	}
	munmap(p, 2 * MB);
}

/*
 * M1, N3: a bracket over another page of the range began after the host was asked about it, and
 * ends between the fault's look at the range and its look at the sequence.
 */
static void bracket_ends_over_large_fault(void **state)
{
	struct fixture *f = *state;
	struct faulter t = {f, GPA, KL_ACC_READ, -1};
	uint8_t *p = resident(2 * MB);
	struct kl_notifier_range r = range_of(p + 50 * PG, PG);
	pthread_t thread;

	NEED_RACEPOINTS;
	assert_int_equal(set(&f->vm, 1, 0, GPA, 2 * MB, p), 0);
	kl_racepoint_arm("fault-huge", 1);
	kl_racepoint_arm("fault-huge-level", 1);
	pthread_create(&thread, NULL, fault_thread, &t);
	assert_true(kl_racepoint_wait("fault-huge", TIMEOUT));
	assert_int_equal(kl_notifier_begin(&r), 0);
	kl_racepoint_release("fault-huge");
	assert_true(kl_racepoint_wait("fault-huge-level", TIMEOUT));
	kl_notifier_end(&r);
	kl_racepoint_release("fault-huge-level");
	pthread_join(thread, NULL);
	assert_int_equal(pages(f, 2), 0);
	assert_false(mapped(f, GPA, KL_ACC_READ));
	munmap(p, 2 * MB);
}

/* S1, M1: each address space has its own table, and its own count of leaves. */
static void address_spaces(void **state)
{
	struct fixture *f = *state;
	struct kl_vcpu_core smm = {0};
	uint8_t *p = resident(2 * MB);
	bool writable, mmio;

	assert_int_equal(kl_vcpu_core_add(&f->vm, &smm, 1), 0);
	smm.as_id = 1;
	assert_int_equal(set(&f->vm, 1 << 16 | 1, 0, GPA, 2 * MB, p), 0);
	assert_int_equal(kl_mmu_fault(&smm, GPA, KL_ACC_READ), KL_FAULT_MAPPED);
	assert_int_equal(kl_mmu_fault(&f->vcpu, GPA, KL_ACC_READ), KL_FAULT_MMIO);
	fault_ok(f, 0, KL_ACC_WRITE);
	assert_int_equal(pages(f, 2), 1);
	assert_int_equal(pages(f, 1), 1);
	assert_int_equal(set(&f->vm, 0, 0, 0, 0, NULL), 0);
	assert_int_equal(pages(f, 1), 0);
	assert_int_equal(pages(f, 2), 1);
	kl_vcpu_enter_guest(&smm);
	assert_ptr_equal(kl_mmu_lookup(&smm, GPA, KL_ACC_READ, &writable, &mmio), p);
	kl_vcpu_leave_guest(&smm);
	assert_int_equal(set(&f->vm, 1 << 16 | 1, 0, GPA, 0, NULL), 0);
	assert_int_equal(pages(f, 2), 0);
	kl_vcpu_core_remove(&smm);
	munmap(p, 2 * MB);
}

/* ---- zaps --------------------------------------------------------------------------- */

static void fault_range(struct fixture *f, uint64_t gpa, uint64_t n)
{
	for (uint64_t i = 0; i < n; i++)
		assert_int_equal(kl_mmu_fault(&f->vcpu, gpa + i * PG, KL_ACC_READ),
				 KL_FAULT_MAPPED);
}

/* S4, M5: with the quirk all goes, else just the slot; what exists is counted either way. */
static void zap_slot_or_all(void **state)
{
	struct fixture *f = *state;
	uint8_t *p = resident(2 * MB);

	for (unsigned quirk = 0; quirk < 2; quirk++) {
		atomic_store(&f->vm.slot_zap_all_quirk, quirk);
		assert_int_equal(set(&f->vm, 1, 0, GPA + PG, 2 * MB, p), 0);
		fault_range(f, GPA + PG, 512);
		fault_ok(f, 0, KL_ACC_WRITE);
		assert_int_equal(pages(f, 1), 513);
		assert_int_equal(set(&f->vm, 1, 0, GPA + PG, 0, NULL), 0);
		assert_int_equal(pages(f, 1), !quirk);
		assert_int_equal(mapped(f, 0, KL_ACC_READ), !quirk);
		assert_false(mapped(f, GPA + PG, KL_ACC_READ));
	}
	munmap(p, 2 * MB);
}

/* S6: MMIO entries are void after zap-all as after any change, and can be made again. */
static void mmio_after_zap_all(void **state)
{
	struct fixture *f = *state;

	assert_int_equal(kl_mmu_fault(&f->vcpu, GPA, KL_ACC_READ), KL_FAULT_MMIO);
	assert_true(mmio_cached(f, GPA));
	assert_int_equal(set(&f->vm, 0, 0, 0, 0, NULL), 0);
	assert_false(mmio_cached(f, GPA));
	assert_int_equal(kl_mmu_fault(&f->vcpu, GPA, KL_ACC_READ), KL_FAULT_MMIO);
	assert_true(mmio_cached(f, GPA));
}

/* M4, M5: a guest cannot fill memory with tables by touching addresses without a slot. */
static void mmio_tables_are_bounded(void **state)
{
	struct fixture *f = *state;
	uint64_t before = kl_pages_in_use(), gpa = GPA, full;

	for (unsigned i = 0; i < KL_MAX_MMIO_TABLES; i++, gpa += 2 * MB)
		assert_int_equal(kl_mmu_fault(&f->vcpu, gpa, KL_ACC_READ), KL_FAULT_MMIO);
	assert_true(mmio_cached(f, gpa - 2 * MB));
	full = kl_pages_in_use();
	assert_true(full <= before + KL_MAX_MMIO_TABLES + 64);
	for (unsigned i = 0; i < 100; i++, gpa += 2 * MB) {
		assert_int_equal(kl_mmu_fault(&f->vcpu, gpa, KL_ACC_READ), KL_FAULT_MMIO);
		assert_false(mmio_cached(f, gpa));
	}
	assert_int_equal(kl_pages_in_use(), full);
	/* Where there is a table an entry costs nothing; and memory is mapped as before. */
	assert_int_equal(kl_mmu_fault(&f->vcpu, GPA + PG, KL_ACC_READ), KL_FAULT_MMIO);
	assert_true(mmio_cached(f, GPA + PG));
	fault_ok(f, 0, KL_ACC_WRITE);
	assert_int_equal(set(&f->vm, 0, 0, 0, 0, NULL), 0);
	assert_int_equal(kl_mmu_fault(&f->vcpu, gpa, KL_ACC_READ), KL_FAULT_MMIO);
	assert_true(mmio_cached(f, gpa));
}

static void *delete_slot_1(void *arg)
{
	struct slot_change *c = arg;

	c->r = set(&c->f->vm, 1, 0, c->gpa, 0, NULL);
	return NULL;
}

/* M5, S4: between the batches of a zap others fault, and nothing comes back behind it. */
static void zap_in_batches(void **state)
{
	struct fixture *f = *state;
	struct slot_change c = {f, GPA + PG, 0, -1};
	uint64_t n = 3 * KL_SWEEP_BATCH;
	uint8_t *p = resident(64 * MB);
	pthread_t thread;

	NEED_RACEPOINTS;
	atomic_store(&f->vm.slot_zap_all_quirk, false);
	assert_int_equal(set(&f->vm, 1, 0, GPA + PG, 64 * MB, p), 0);
	fault_range(f, GPA + PG, n);
	kl_racepoint_arm("mmu-batch", 1);
	pthread_create(&thread, NULL, delete_slot_1, &c);
	assert_true(kl_racepoint_wait("mmu-batch", TIMEOUT));
	assert_true(pages(f, 1) < n && pages(f, 1) >= n - KL_SWEEP_BATCH);
	fault_ok(f, 0, KL_ACC_WRITE);
	assert_int_equal(kl_mmu_fault(&f->vcpu, GPA + PG, KL_ACC_READ), KL_FAULT_MAPPED);
	assert_false(mapped(f, GPA + PG, KL_ACC_READ));
	kl_racepoint_release("mmu-batch");
	pthread_join(thread, NULL);
	assert_int_equal(c.r, 0);
	assert_int_equal(pages(f, 1), 1);
	munmap(p, 64 * MB);
}

static void *bracket_1(void *arg)
{
	struct kl_notifier_range *r = arg;

	assert_int_equal(kl_notifier_begin(r), 0);
	kl_notifier_end(r);
	return NULL;
}

/* N2, M5: the same for an event: what is in progress is blocked from the first batch on. */
static void event_in_batches(void **state)
{
	struct fixture *f = *state;
	uint64_t n = 2 * KL_SWEEP_BATCH;
	uint8_t *p = resident(64 * MB);
	struct kl_notifier_range r = range_of(p, n * PG);
	pthread_t thread;

	NEED_RACEPOINTS;
	assert_int_equal(set(&f->vm, 1, 0, GPA + PG, 64 * MB, p), 0);
	fault_range(f, GPA + PG, n + 1);
	kl_racepoint_arm("mmu-batch", 1);
	pthread_create(&thread, NULL, bracket_1, &r);
	assert_true(kl_racepoint_wait("mmu-batch", TIMEOUT));
	assert_int_equal(kl_mmu_fault(&f->vcpu, GPA + PG, KL_ACC_READ), KL_FAULT_MAPPED);
	assert_false(mapped(f, GPA + PG, KL_ACC_READ));
	fault_ok(f, GPA + 40 * MB, KL_ACC_READ); /* not in the range */
	kl_racepoint_release("mmu-batch");
	pthread_join(thread, NULL);
	assert_int_equal(pages(f, 1), 2);
	fault_ok(f, GPA + PG, KL_ACC_READ);
	munmap(p, 64 * MB);
}

/* M5: a large tree is not freed in one go, nor kept: new tables take its place. */
static void large_tree(void **state)
{
	struct fixture *f = *state;
	uint8_t *p = resident(256 * MB);
	uint64_t before = kl_pages_in_use(), full, after;

	for (unsigned round = 0; round < 4; round++) {
		assert_int_equal(set(&f->vm, 1, 0, GPA + PG, 256 * MB, p), 0);
		for (uint64_t gpa = GPA + PG; gpa < GPA + 256 * MB; gpa += 2 * MB)
			assert_int_equal(kl_mmu_fault(&f->vcpu, gpa, KL_ACC_READ), KL_FAULT_MAPPED);
		full = kl_pages_in_use();
		assert_true(full >= before + 128 && full < before + 128 + 8);
		assert_int_equal(set(&f->vm, 1, 0, GPA + PG, 0, NULL), 0);
		assert_int_equal(pages(f, 1), 0);
	}
	after = kl_pages_in_use();
	assert_true(after > before && after < full);
	for (unsigned i = 0; i < 10; i++) {
		assert_int_equal(set(&f->vm, 1, 0, GPA + PG, 256 * MB, p), 0);
		assert_int_equal(set(&f->vm, 1, 0, GPA + PG, 0, NULL), 0);
	}
	assert_true(kl_pages_in_use() <= before);
	munmap(p, 256 * MB);
}

/* M5: nor is what is left of it kept where no new tables are needed: events free it, too. */
static void large_tree_goes_with_events(void **state)
{
	struct fixture *f = *state;
	uint8_t *p = resident(256 * MB);
	struct kl_notifier_range r = range_of(f->ram, PG);
	uint64_t before = kl_pages_in_use(), last;

	assert_int_equal(set(&f->vm, 1, 0, GPA + PG, 256 * MB, p), 0);
	for (uint64_t gpa = GPA + PG; gpa < GPA + 256 * MB; gpa += 2 * MB)
		assert_int_equal(kl_mmu_fault(&f->vcpu, gpa, KL_ACC_READ), KL_FAULT_MAPPED);
	assert_int_equal(set(&f->vm, 1, 0, GPA + PG, 0, NULL), 0);
	last = kl_pages_in_use();
	assert_true(last > before);
	while (last > before) {
		assert_int_equal(kl_notifier_begin(&r), 0);
		assert_true(kl_pages_in_use() < last);
		last = kl_pages_in_use();
		kl_notifier_end(&r);
	}
	munmap(p, 256 * MB);
}

/* M5: tables cost what is touched: a page here and there in a terabyte; events free them. */
static void sparse(void **state)
{
	struct fixture *f = *state;
	uint8_t *p = mmap(NULL, 1024 * GB, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	uint64_t before = kl_pages_in_use();

	if (p == MAP_FAILED)
		skip();
	madvise(p, 1024 * GB, MADV_NOHUGEPAGE);
	assert_int_equal(set(&f->vm, 1, 0, GPA, 1024 * GB, p), 0);
	for (uint64_t off = 0; off < 1024 * GB; off += 16 * GB)
		fault_ok(f, GPA + off, KL_ACC_READ);
	assert_int_equal(pages(f, 1), 64);
	assert_true(kl_pages_in_use() <= before + 3 * 64);
	for (uint64_t off = 0; off < 1024 * GB; off += 16 * GB) {
		struct kl_notifier_range r = range_of(p + off, 2 * PG);

		assert_int_equal(kl_notifier_begin(&r), 0);
		kl_notifier_end(&r);
	}
	assert_int_equal(pages(f, 1), 0);
	assert_true(kl_pages_in_use() <= before);
	munmap(p, 1024 * GB);
}

static uint64_t flushes(struct fixture *f)
{
	return kl_stat_get(&f->vm.stats.remote_tlb_flush_requests);
}

/* M5, M6: what no vCPU can hold needs no flush. */
static void no_needless_flush(void **state)
{
	struct fixture *f = *state;
	struct kl_notifier_range r = range_of(f->ram, NPAGES * PG);
	uint64_t n = flushes(f);

	assert_int_equal(kl_notifier_begin(&r), 0);
	kl_notifier_end(&r);
	assert_int_equal(set(&f->vm, 0, 0, 0, 0, NULL), 0);
	assert_int_equal(flushes(f), n);
	assert_int_equal(set(&f->vm, 0, 0, 0, NPAGES * PG, f->ram), 0);
	fault_ok(f, 0, KL_ACC_READ);
	assert_int_equal(kl_notifier_begin(&r), 0);
	kl_notifier_end(&r);
	assert_int_equal(flushes(f), n + 1);
}

/* ---- accessed bits (M7, N6) --------------------------------------------------------- */

/* N6: young exactly if accessed since the last clear; nothing is zapped. */
static void ageing(void **state)
{
	struct fixture *f = *state;
	struct kl_notifier_range r = range_of(f->ram, 2 * PG),
				 other = range_of(f->ram + 8 * PG, PG);

	assert_int_equal(kl_mmu_age(&f->vm, &r, false), 0);
	assert_int_equal(kl_mmu_fault(&f->vcpu, PG, KL_ACC_READ), KL_FAULT_MAPPED);
	assert_int_equal(kl_mmu_age(&f->vm, &r, false), 0); /* mapped, not yet used */
	assert_true(mapped(f, PG, KL_ACC_READ));
	assert_int_equal(kl_mmu_age(&f->vm, &r, false), 1);
	assert_int_equal(kl_mmu_age(&f->vm, &r, false), 1);
	assert_int_equal(kl_mmu_age(&f->vm, &other, true), 0);
	assert_int_equal(kl_mmu_age(&f->vm, &r, true), 1);
	assert_int_equal(kl_mmu_age(&f->vm, &r, true), 0);
	assert_int_equal(pages(f, 1), 1);
	assert_true(mapped(f, PG, KL_ACC_READ));
	assert_int_equal(kl_mmu_age(&f->vm, &r, true), 1);
}

/* N6: a vCPU that holds the translation looks it up again after a clear. */
static void ageing_flushes(void **state)
{
	struct fixture *f = *state;
	struct kl_notifier_range r = range_of(f->ram, PG);
	uint64_t n;

	fault_ok(f, 0, KL_ACC_WRITE);
	kl_vcpu_take_requests(&f->vcpu, KL_REQ_TLB_FLUSH);
	n = flushes(f);
	assert_int_equal(kl_mmu_age(&f->vm, &r, false), 1);
	assert_int_equal(flushes(f), n);
	assert_int_equal(kl_mmu_age(&f->vm, &r, true), 1);
	assert_true(kl_vcpu_requests(&f->vcpu) & KL_REQ_TLB_FLUSH);
	assert_int_equal(kl_mmu_age(&f->vm, &r, true), 0);
	assert_int_equal(flushes(f), n + 1); /* nothing was cleared the second time */
}

static void *lookup_thread(void *arg)
{
	struct faulter *t = arg;

	kl_vcpu_enter_guest(&t->f->vcpu);
	t->r = lookup(t->f, t->gpa, t->access) != NULL;
	kl_vcpu_leave_guest(&t->f->vcpu);
	return NULL;
}

struct event {
	struct kl_notifier_range r;
	_Atomic bool begun;
};

static void *begin_thread(void *arg)
{
	struct event *e = arg;

	assert_int_equal(kl_notifier_begin(&e->r), 0);
	atomic_store(&e->begun, true);
	kl_notifier_end(&e->r);
	return NULL;
}

/*
 * M7, N2: a vCPU has read the SPTE, and sets its accessed bit when the SPTE is gone: it does not
 * bring it back, and the event waits for the vCPU, which has a pointer.
 */
static void accessed_against_zap(void **state)
{
	struct fixture *f = *state;
	struct faulter t = {f, 0, KL_ACC_READ, -1};
	struct event e = {.r = range_of(f->ram, PG)};
	pthread_t vcpu, event;

	NEED_RACEPOINTS;
	assert_int_equal(kl_mmu_fault(&f->vcpu, 0, KL_ACC_READ), KL_FAULT_MAPPED);
	fault_ok(f, 5 * PG, KL_ACC_READ); /* the table stays */
	kl_racepoint_arm("lookup-spte", 1);
	pthread_create(&vcpu, NULL, lookup_thread, &t);
	assert_true(kl_racepoint_wait("lookup-spte", TIMEOUT));
	pthread_create(&event, NULL, begin_thread, &e);
	while (pages(f, 1) != 1)
		sched_yield();
	for (int i = 0; i < 1000; i++) {
		assert_false(atomic_load(&e.begun));
		sched_yield();
	}
	kl_racepoint_release("lookup-spte");
	pthread_join(vcpu, NULL);
	pthread_join(event, NULL);
	assert_int_equal(t.r, 1);
	assert_false(mapped(f, 0, KL_ACC_READ));
	assert_int_equal(pages(f, 1), 1);
}

/* M7: an upgrade keeps the accessed bit; a racing one is not lost. */
static void accessed_is_kept(void **state)
{
	struct fixture *f = *state;
	struct kl_notifier_range r = range_of(f->ram, PG), r2 = range_of(f->ram + PG, PG);
	struct faulter t = {f, PG, KL_ACC_READ, -1};
	pthread_t vcpu;

	/* Pages that were never written map read-only at first. */
	fault_ok(f, 0, KL_ACC_READ);
	assert_false(mapped(f, 0, KL_ACC_WRITE));
	assert_int_equal(kl_mmu_fault(&f->vcpu, 0, KL_ACC_WRITE), KL_FAULT_MAPPED);
	assert_int_equal(kl_mmu_age(&f->vm, &r, false), 1);
	assert_true(mapped(f, 0, KL_ACC_WRITE));
	NEED_RACEPOINTS;
	fault_ok(f, PG, KL_ACC_READ);
	assert_int_equal(kl_mmu_age(&f->vm, &r2, true), 1);
	kl_racepoint_arm("lookup-spte", 1);
	pthread_create(&vcpu, NULL, lookup_thread, &t);
	assert_true(kl_racepoint_wait("lookup-spte", TIMEOUT));
	/* Upgraded between the vCPU's look and its update. */
	assert_int_equal(kl_mmu_fault(&(struct kl_vcpu_core){.vm = &f->vm}, PG, KL_ACC_WRITE),
			 KL_FAULT_MAPPED);
	kl_racepoint_release("lookup-spte");
	pthread_join(vcpu, NULL);
	assert_int_equal(kl_mmu_age(&f->vm, &r2, false), 1);
	assert_true(mapped(f, PG, KL_ACC_WRITE));
}

/* ---- edges of docs/memory-model.md -------------------------------------------------- */

static void *enter_thread(void *arg)
{
	struct faulter *t = arg;

	kl_vcpu_enter_guest(&t->f->vcpu);
	if (kl_vcpu_requests(&t->f->vcpu) & KL_REQ_TLB_FLUSH) {
		t->r = 1; /* drops its TLB */
		kl_vcpu_take_requests(&t->f->vcpu, KL_REQ_TLB_FLUSH);
	} else {
		t->r = 0;
	}
	kl_vcpu_leave_guest(&t->f->vcpu);
	return NULL;
}

/*
 * M6, N2 (edge 5): the vCPU is in guest mode and has not read its requests yet. The flusher sees
 * the mode and waits; the vCPU sees the request.
 */
static void enters_before_request(void **state)
{
	struct fixture *f = *state;
	struct faulter t = {f, 0, KL_ACC_READ, -1};
	struct event e = {.r = range_of(f->ram, PG)};
	pthread_t vcpu, event;

	NEED_RACEPOINTS;
	fault_ok(f, 0, KL_ACC_WRITE);
	kl_vcpu_take_requests(&f->vcpu, KL_REQ_TLB_FLUSH);
	kl_racepoint_arm("vcpu-entered", 1);
	pthread_create(&vcpu, NULL, enter_thread, &t);
	assert_true(kl_racepoint_wait("vcpu-entered", TIMEOUT));
	pthread_create(&event, NULL, begin_thread, &e);
	while (!(atomic_load(&f->vcpu.requests) & KL_REQ_TLB_FLUSH))
		sched_yield();
	for (int i = 0; i < 1000; i++) {
		assert_false(atomic_load(&e.begun));
		sched_yield();
	}
	kl_racepoint_release("vcpu-entered");
	pthread_join(vcpu, NULL);
	pthread_join(event, NULL);
	assert_int_equal(t.r, 1);
}

/*
 * M6, N2 (edge 5): the vCPU enters when the request is set and its mode not yet read. It drops its
 * TLB, and finds nothing in stage 2.
 */
static void enters_after_request(void **state)
{
	struct fixture *f = *state;
	struct faulter t = {f, 0, KL_ACC_READ, -1};
	struct event e = {.r = range_of(f->ram, PG)};
	pthread_t event;

	NEED_RACEPOINTS;
	fault_ok(f, 0, KL_ACC_WRITE);
	kl_vcpu_take_requests(&f->vcpu, KL_REQ_TLB_FLUSH);
	kl_racepoint_arm("flush-requested", 1);
	pthread_create(&event, NULL, begin_thread, &e);
	assert_true(kl_racepoint_wait("flush-requested", TIMEOUT));
	enter_thread(&t);
	assert_int_equal(t.r, 1);
	assert_false(mapped(f, 0, KL_ACC_READ));
	kl_racepoint_release("flush-requested");
	pthread_join(event, NULL);
}

/* M5, N2 (edge 6): each batch has flushed before the lock is released. */
static void batches_flush(void **state)
{
	struct fixture *f = *state;
	uint64_t n = KL_SWEEP_BATCH + 1024;
	uint8_t *p = resident(64 * MB);
	struct event e = {.r = range_of(p, n * PG)};
	pthread_t event;

	NEED_RACEPOINTS;
	assert_int_equal(set(&f->vm, 1, 0, GPA + PG, 64 * MB, p), 0);
	fault_range(f, GPA + PG, n);
	kl_vcpu_take_requests(&f->vcpu, KL_REQ_TLB_FLUSH);
	kl_vcpu_enter_guest(&f->vcpu);
	assert_non_null(lookup(f, GPA + PG, KL_ACC_READ));
	kl_racepoint_arm("mmu-batch", 1);
	pthread_create(&event, NULL, begin_thread, &e);
	while (!(kl_vcpu_requests(&f->vcpu) & KL_REQ_TLB_FLUSH))
		assert_false(kl_racepoint_wait("mmu-batch", 0));
	for (int i = 0; i < 1000; i++)
		assert_false(kl_racepoint_wait("mmu-batch", 0));
	assert_null(lookup(f, GPA + PG, KL_ACC_READ));
	kl_vcpu_leave_guest(&f->vcpu);
	assert_true(kl_racepoint_wait("mmu-batch", TIMEOUT));
	/* The second batch has a flush of its own. */
	kl_vcpu_take_requests(&f->vcpu, KL_REQ_TLB_FLUSH);
	kl_vcpu_enter_guest(&f->vcpu);
	assert_non_null(lookup(f, GPA + n * PG, KL_ACC_READ));
	kl_racepoint_release("mmu-batch");
	while (!(kl_vcpu_requests(&f->vcpu) & KL_REQ_TLB_FLUSH))
		assert_false(atomic_load(&e.begun));
	assert_false(atomic_load(&e.begun));
	kl_vcpu_leave_guest(&f->vcpu);
	pthread_join(event, NULL);
	munmap(p, 64 * MB);
}

/* M6 (edge 7): a vCPU still walks the tree that a deletion detached; it is freed after the flush.
 */
static void walk_against_zap_all(void **state)
{
	struct fixture *f = *state;
	struct faulter t = {f, 0, KL_ACC_READ, -1};
	struct slot_change c = {f, GPA, 0, -1};
	uint64_t before = kl_pages_in_use();
	pthread_t vcpu, change;

	NEED_RACEPOINTS;
	assert_int_equal(set(&f->vm, 1, 0, GPA, NPAGES * PG, f->ram), 0);
	assert_int_equal(kl_mmu_fault(&f->vcpu, 0, KL_ACC_READ), KL_FAULT_MAPPED);
	kl_racepoint_arm("lookup-spte", 1);
	pthread_create(&vcpu, NULL, lookup_thread, &t);
	assert_true(kl_racepoint_wait("lookup-spte", TIMEOUT));
	kl_racepoint_arm("flush-requested", 1);
	pthread_create(&change, NULL, delete_slot_1, &c);
	assert_true(kl_racepoint_wait("flush-requested", TIMEOUT));
	assert_int_equal(pages(f, 1), 0);
	assert_true(kl_pages_in_use() >= before + 4);
	kl_racepoint_release("flush-requested");
	kl_racepoint_release("lookup-spte");
	pthread_join(vcpu, NULL);
	pthread_join(change, NULL);
	assert_int_equal(t.r, 1);
	assert_int_equal(c.r, 0);
	assert_int_equal(kl_pages_in_use(), before);
}

/* M1, N3: a bracket over any page of its range keeps a large leaf out, the first one and the last.
 */
static void large_beside_bracket(void **state)
{
	struct fixture *f = *state;
	uint8_t *p = resident(4 * MB);

	assert_int_equal(set(&f->vm, 1, 0, GPA, 4 * MB, p), 0);
	for (unsigned i = 0; i < 4; i++) {
		struct kl_notifier_range r = range_of(p + (i & 1 ? 511 * PG : 0), PG);

		assert_int_equal(kl_notifier_begin(&r), 0);
		fault_ok(f, GPA + (i & 2 ? 201 : 300) * PG, KL_ACC_READ);
		assert_int_equal(pages(f, 2), 0);
		kl_notifier_end(&r);
	}
	assert_int_equal(set(&f->vm, 1, 0, GPA, 0, NULL), 0);
	assert_int_equal(set(&f->vm, 1, 0, GPA, 4 * MB, p), 0);
	fault_ok(f, GPA + 400 * PG, KL_ACC_READ);
	assert_int_equal(pages(f, 2), 1);
	munmap(p, 4 * MB);
}

/* A vCPU's place is given again: there is room for 1024 at a time, not in a VM's life. */
static void vcpu_places(void **state)
{
	struct fixture *f = *state;
	struct kl_vcpu_core *c = calloc(2, sizeof(*c));

	for (unsigned i = 0; i < KL_MAX_VCPUS + 2; i++) {
		assert_int_equal(kl_vcpu_core_add(&f->vm, &c[i & 1], 7), 0);
		assert_int_equal(atomic_load(&f->vm.nr_vcpus), 2);
		kl_vcpu_core_remove(&c[i & 1]);
		assert_int_equal(atomic_load(&f->vm.nr_vcpus), 1);
	}
	free(c);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
		T(leaf_2m),
		T(leaf_1g),
		T(small_where_not_allowed),
		T(end_of_file),
		T(private_file),
		T(hugetlb),
		T(faults_in_parallel),
		T(vanished_page),
		T(vanished_alone),
		T(host_does_not_say),
		T(fault_beside_bracket),
		T(two_faults_in_one_range),
		T(bracket_ends_over_large_fault),
		T(address_spaces),
		T(zap_slot_or_all),
		T(mmio_after_zap_all),
		T(mmio_tables_are_bounded),
		T(zap_in_batches),
		T(event_in_batches),
		T(large_tree),
		T(large_tree_goes_with_events),
		T(sparse),
		T(vcpu_places),
		T(large_beside_bracket),
		T(no_needless_flush),
		T(ageing),
		T(ageing_flushes),
		T(accessed_against_zap),
		T(accessed_is_kept),
		T(enters_before_request),
		T(enters_after_request),
		T(batches_flush),
		T(walk_against_zap_all),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
