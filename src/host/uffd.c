/* SPDX-License-Identifier: MIT */
/*
 * A sorted array of disjoint ranges under a sequence counter: readers look again if it moved.
 * When it is full, the two closest ranges become one, gap included.
 */
#include <linux/userfaultfd.h>

#include "base/racepoint.h"
#include "base/syscall.h"
#include "host/uffd.h"

#define MAX_RANGES 128

static struct {
	_Atomic uint64_t start, end;
} ranges[MAX_RANGES];
_Atomic unsigned kl_uffd_nr_ranges;
static _Atomic uint64_t seq; /* odd: being changed */
static _Atomic uint64_t all_features;

/*
 * The counter is the writers' lock as well. Loads of ranges acquire and stores release, so that
 * who sees one new value sees the odd counter too.                        PAIR(uffd-ranges)
 */
static uint64_t write_begin(void)
{
	uint64_t s = atomic_load_explicit(&seq, memory_order_relaxed);

	for (unsigned spins = 0;; spins++) {
		if (!(s & 1) &&
		    atomic_compare_exchange_weak_explicit(&seq, &s, s + 1, memory_order_acquire,
							  memory_order_relaxed))
			return s + 1;
		racepoint("uffd-busy");
		if (spins % 64 == 63)
			kl_sys(SYS_sched_yield, 0);
		kl_cpu_relax();
		s = atomic_load_explicit(&seq, memory_order_relaxed);
	}
}

static void write_end(uint64_t s)
{
	atomic_store_explicit(&seq, s + 1, memory_order_release); /* PAIR(uffd-ranges) */
}

static uint64_t start_of(unsigned i)
{
	return atomic_load_explicit(&ranges[i].start, memory_order_acquire);
}

static uint64_t end_of(unsigned i)
{
	return atomic_load_explicit(&ranges[i].end, memory_order_acquire);
}

static void set(unsigned i, uint64_t start, uint64_t end)
{
	atomic_store_explicit(&ranges[i].start, start, memory_order_release);
	racepoint("uffd-range");
	atomic_store_explicit(&ranges[i].end, end, memory_order_release);
}

static unsigned count(void)
{
	return atomic_load_explicit(&kl_uffd_nr_ranges, memory_order_relaxed);
}

static void set_count(unsigned n)
{
	atomic_store_explicit(&kl_uffd_nr_ranges, n, memory_order_release);
}

/* Index of the first range that ends behind @addr. */
static unsigned first_behind(unsigned n, uint64_t addr)
{
	unsigned lo = 0, hi = n;

	while (lo < hi) {
		unsigned mid = lo + (hi - lo) / 2;

		if (end_of(mid) > addr)
			hi = mid;
		else
			lo = mid + 1;
	}
	return lo;
}

bool kl_uffd_overlaps_slow(uint64_t start, uint64_t end)
{
	for (unsigned spins = 0;; spins++) {
		uint64_t s = atomic_load_explicit(&seq, memory_order_acquire);

		if (!(s & 1)) {
			unsigned n = kl_min(count(), MAX_RANGES + 0u);
			unsigned i = first_behind(n, start);
			bool hit = i < n && start_of(i) < end;

			if (atomic_load_explicit(&seq, memory_order_relaxed) == s)
				return hit;
		}
		racepoint("uffd-busy");
		if (spins % 64 == 63)
			kl_sys(SYS_sched_yield, 0);
		kl_cpu_relax();
	}
}

bool kl_uffd_gap(uint64_t *start, uint64_t *end)
{
	uint64_t s, from, to;
	unsigned i, n;

	do {
		while ((s = atomic_load_explicit(&seq, memory_order_acquire)) & 1) {
			racepoint("uffd-busy");
			kl_sys(SYS_sched_yield, 0);
		}
		from = *start;
		n = kl_min(count(), MAX_RANGES + 0u);
		for (i = first_behind(n, from); i < n && start_of(i) <= from; i++)
			from = end_of(i);
		to = i < n ? kl_min(*end, start_of(i)) : *end;
	} while (atomic_load_explicit(&seq, memory_order_relaxed) != s);
	*start = from;
	*end = to;
	return from < to;
}

static void delete_ranges(unsigned from, unsigned to)
{
	unsigned n = count();

	for (unsigned i = to; i < n; i++)
		set(from + i - to, start_of(i), end_of(i));
	set_count(n - (to - from));
}

/* Context: there is room. */
static void insert_range(unsigned at, uint64_t start, uint64_t end)
{
	unsigned n = count();

	for (unsigned i = n; i > at; i--)
		set(i, start_of(i - 1), end_of(i - 1));
	set(at, start, end);
	set_count(n + 1);
}

static void merge_closest(void)
{
	unsigned best = 1;

	for (unsigned i = 2; i < MAX_RANGES; i++)
		if (start_of(i) - end_of(i - 1) < start_of(best) - end_of(best - 1))
			best = i;
	set(best - 1, start_of(best - 1), end_of(best));
	delete_ranges(best, best + 1);
}

void kl_uffd_add(uint64_t start, uint64_t end)
{
	unsigned i, last;
	uint64_t s;

	start &= KL_PAGE_MASK;
	end = end > KL_PAGE_MASK ? KL_PAGE_MASK : (end + KL_PAGE_SIZE - 1) & KL_PAGE_MASK;
	if (start >= end)
		return;
	s = write_begin();
	if (count() == MAX_RANGES)
		merge_closest();
	/* Those that it overlaps or touches become one with it. */
	i = start ? first_behind(count(), start - 1) : 0;
	for (last = i; last < count() && start_of(last) <= end; last++) {
		start = kl_min(start, start_of(last));
		end = kl_max(end, end_of(last));
	}
	if (i == last) {
		insert_range(i, start, end);
	} else {
		set(i, start, end);
		delete_ranges(i + 1, last);
	}
	write_end(s);
}

/* What of range @i is left without [@start, @end). Returns how many ranges that is. */
static unsigned cut(unsigned i, uint64_t start, uint64_t end)
{
	uint64_t a = start_of(i), b = end_of(i);

	if (a < start && end < b) {
		if (count() == MAX_RANGES)
			return 1; /* no room for two halves */
		set(i, a, start);
		insert_range(i + 1, end, b);
		return 2;
	}
	if (a < start) {
		set(i, a, start);
		return 1;
	}
	if (end < b) {
		set(i, end, b);
		return 1;
	}
	delete_ranges(i, i + 1);
	return 0;
}

bool kl_uffd_remove_slow(uint64_t start, uint64_t end)
{
	bool found = false;
	unsigned i;
	uint64_t s;

	start = start > KL_PAGE_MASK ? KL_PAGE_MASK : (start + KL_PAGE_SIZE - 1) & KL_PAGE_MASK;
	end &= KL_PAGE_MASK;
	if (start >= end)
		return false;
	s = write_begin();
	for (i = first_behind(count(), start); i < count() && start_of(i) < end;) {
		found = true;
		i += cut(i, start, end);
	}
	write_end(s);
	return found;
}

void kl_uffd_add_features(uint64_t features)
{
	atomic_fetch_or(&all_features, features);
}

uint64_t kl_uffd_features(void)
{
	return atomic_load_explicit(&all_features, memory_order_relaxed);
}

void kl_uffd_after_fork(void)
{
	uint64_t s = atomic_load(&seq);

	/*
	 * Where another thread was in the middle of a change, one entry may be torn: everything
	 * counts as registered then.
	 */
	if (s & 1) {
		set(0, 0, KL_PAGE_MASK);
		set_count(1);
		atomic_store(&seq, s + 1);
	}
	if (!(kl_uffd_features() & UFFD_FEATURE_EVENT_FORK))
		set_count(0);
}
