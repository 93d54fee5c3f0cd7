/* SPDX-License-Identifier: MIT */
/*
 * Dirty logs: their life, and marking pages in them.
 */
#include <string.h>

#include "base/failpoint.h"
#include "base/log.h"
#include "base/racepoint.h"
#include "host/sys.h"
#include "host/thread.h"
#include "mem/dirty.h"
#include "mem/dirty_ring.h"

/* ---- life -------------------------------------------------------------------------------- */

/*
 * To map and unmap memory whenever a log is turned on or off costs an interrupt to every other
 * running thread, so the last log is kept, if it is not large.
 */
#define SPARE_MAX (1ul << 20)

static uint64_t nr_lines(uint64_t npages)
{
	return (npages + KL_DIRTY_LINE_PAGES - 1) / KL_DIRTY_LINE_PAGES;
}

static size_t bitmap_bytes(uint64_t npages)
{
	return nr_lines(npages) * KL_DIRTY_LINE_WORDS * sizeof(uint64_t);
}

static size_t summary_bytes(uint64_t npages)
{
	return (nr_lines(npages) + 511) / 512 * 64; /* whole cache lines */
}

/* The parts behind each other; @p is 0 or the mapping. Returns the end. */
static uintptr_t lay_out(struct kl_dirty_log *log, uintptr_t p, uint64_t npages, bool rings)
{
	p += (sizeof(*log) + 63) & ~63ul;
	for (unsigned h = 0; h < 2; h++) {
		log->half[h].lines = (_Atomic uint64_t *)p;
		p += summary_bytes(npages);
	}
	for (unsigned h = 0; h < 2; h++) {
		log->half[h].words = (_Atomic uint64_t *)p;
		p += bitmap_bytes(npages);
	}
	log->scratch = (uint64_t *)p;
	p += bitmap_bytes(npages);
	log->in_ring = rings ? (_Atomic uint64_t *)p : NULL;
	return rings ? p + bitmap_bytes(npages) : p;
}

static void clear_words(_Atomic uint64_t *words, unsigned n)
{
	for (unsigned i = 0; i < n; i++)
		atomic_store_explicit(&words[i], 0, memory_order_relaxed);
}

/* Make a log that was used as good as new. */
static void wipe(struct kl_dirty_log *log)
{
	for (unsigned h = 0; h < 2; h++) {
		struct kl_dirty_half *half = &log->half[h];

		for (uint64_t i = 0; i < summary_bytes(log->npages) / 8; i++) {
			uint64_t lines =
				atomic_exchange_explicit(&half->lines[i], 0, memory_order_relaxed);

			for (; lines; lines &= lines - 1)
				clear_words(
					&half->words[(i * 64 + (unsigned)__builtin_ctzll(lines)) *
						     KL_DIRTY_LINE_WORDS],
					KL_DIRTY_LINE_WORDS);
		}
	}
	if (log->in_ring)
		memset((void *)log->in_ring, 0, bitmap_bytes(log->npages));
}

/* KVM_DIRTY_LOG_INITIALLY_SET */
static void mark_all(struct kl_dirty_log *log)
{
	struct kl_dirty_half *half = &log->half[0];
	uint64_t lines = nr_lines(log->npages);

	for (uint64_t i = 0; i < log->npages / 64; i++)
		atomic_store_explicit(&half->words[i], ~0ull, memory_order_relaxed);
	if (log->npages % 64)
		atomic_store_explicit(&half->words[log->npages / 64],
				      (1ull << log->npages % 64) - 1, memory_order_relaxed);
	for (uint64_t i = 0; i < lines; i++)
		half->lines[i / 64] |= 1ull << i % 64;
}

static struct kl_dirty_log *new_log(struct kl_vm *vm, unsigned as, unsigned id, uint64_t npages,
				    bool rings)
{
	struct kl_dirty_log *log, sizes;
	size_t size = lay_out(&sizes, 0, npages, rings);

	kl_assert_held(&vm->slots_lock);
	if (kl_failpoint("dirty-log-alloc"))
		return NULL;
	log = vm->spare_log;
	if (log && log->npages == npages && !log->in_ring == !rings) {
		wipe(log);
		vm->spare_log = NULL;
	} else {
		log = kl_sys_map(size);
		if (!log)
			return NULL;
		lay_out(log, (uintptr_t)log, npages, rings);
		log->npages = npages;
		log->size = size;
	}
	log->slot = as << 16 | id;
	log->also = NULL;
	atomic_init(&log->seq, 0);
	/* Before the slot is published: whoever finds it there does not find 0 here. */
	atomic_fetch_add(&vm->nr_logs, 1);
	return log;
}

struct kl_dirty_log *kl_dirty_log_new(struct kl_vm *vm, unsigned as, unsigned id, uint64_t npages,
				      struct kl_dirty_log *also)
{
	bool rings = vm->dirty_ring_size;
	struct kl_dirty_log *log = new_log(vm, as, id, npages, rings);

	if (!log)
		return NULL;
	log->also = also;
	/* With rings the bitmap is for others than vCPUs. */
	if ((vm->manual_dirty_log & KVM_DIRTY_LOG_INITIALLY_SET) &&
	    (!rings || vm->dirty_ring_with_bitmap))
		mark_all(log);
	return log;
}

struct kl_dirty_log *kl_dirty_log_new_own(struct kl_vm *vm, unsigned as, unsigned id,
					  uint64_t npages)
{
	return new_log(vm, as, id, npages, false);
}

static void drop_spare(struct kl_vm *vm)
{
	if (vm->spare_log)
		kl_sys_unmap(vm->spare_log, vm->spare_log->size);
	vm->spare_log = NULL;
}

void kl_dirty_log_free(struct kl_vm *vm, struct kl_dirty_log *log)
{
	kl_assert_held(&vm->slots_lock);
	racepoint("dirty-log-ends");
	(void)kl_vcpus_flush(vm, true);
	atomic_fetch_sub(&vm->nr_logs, 1);
	if (log->size > SPARE_MAX) {
		kl_sys_unmap(log, log->size);
		return;
	}
	drop_spare(vm);
	vm->spare_log = log;
}

void kl_dirty_logs_destroy(struct kl_vm *vm)
{
	drop_spare(vm);
	kl_dirty_ring_destroy(vm);
}

void kl_dirty_log_set_manual(struct kl_vm *vm, uint64_t flags)
{
	kl_mutex_lock(&vm->slots_lock);
	vm->manual_dirty_log = flags;
	kl_mutex_unlock(&vm->slots_lock);
}

/* ---- marking ----------------------------------------------------------------------------- */

/* Who sets the bit in @lines finds the word set, and the other way round: dirty.h. */
static bool line_is_set(const struct kl_dirty_half *half, uint64_t index)
{
	return kl_dirty_test(half->lines, index / KL_DIRTY_LINE_PAGES);
}

static void set_line(struct kl_dirty_half *half, uint64_t index)
{
	uint64_t line = index / KL_DIRTY_LINE_PAGES;

	if (!line_is_set(half, index))
		atomic_fetch_or(&half->lines[line / 64], 1ull << line % 64);
}

/* By who is in guest mode: the half stays the current one, or a flush waits for us. */
static void mark_in_guest(struct kl_dirty_log *log, uint64_t index)
{
	struct kl_dirty_half *half = &log->half[atomic_load(&log->seq) & 1]; /* PAIR(vcpu-mode) */

	racepoint("dirty-marking");
	if (!kl_dirty_test(half->words, index))
		atomic_fetch_or(&half->words[index / 64], 1ull << index % 64);
	set_line(half, index);
}

static bool is_marked(struct kl_dirty_log *log, uint64_t index)
{
	struct kl_dirty_half *half = &log->half[atomic_load(&log->seq) & 1];

	return kl_dirty_test(half->words, index) && line_is_set(half, index);
}

void kl_dirty_mark_half(struct kl_dirty_log *log, uint64_t index)
{
	uint64_t seq;

	do {
		struct kl_dirty_half *half;

		seq = atomic_load(&log->seq);
		half = &log->half[seq & 1];
		racepoint("dirty-mark");
		atomic_fetch_or(&half->words[index / 64], 1ull << index % 64);
		set_line(half, index);
	} while (atomic_load(&log->seq) != seq); /* PAIR(dirty-seq) */
}

void kl_dirty_mark(struct kl_vm *vm, struct kl_dirty_log *log, uint64_t index)
{
	struct kl_vcpu_core *c = kl_self.running;

	if (log->in_ring)
		kl_dirty_ring_mark(vm, c && c->vm == vm ? c : NULL, log, index);
	else
		kl_dirty_mark_half(log, index);
	if (KL_UNLIKELY(log->also != NULL))
		kl_dirty_mark_half(log->also, index);
}

/*
 * The log of the slot that @gfn is in. What was looked up is as good as a pointer into guest
 * memory: a change of slots that is not seen here flushes before it is over. Between the two a page
 * is marked in the log of a slot that is going, or in none where one is being made.
 */
static KL_NOINLINE void find_log(struct kl_vcpu_core *c, kl_gfn_t gfn)
{
	struct kl_vm *vm = c->vm;
	int token = kl_srcu_read_lock(&vm->srcu);
	uint64_t generation = kl_generation(vm, c->as_id);
	const struct kl_memslot *slot = kl_memslot_find(kl_memslots(vm, c->as_id), gfn);

	c->log = (struct kl_slot_log){
		/* An odd one is never current for long. */
		.generation = generation & 1 ? 0 : generation,
		.base_gfn = slot ? slot->base_gfn : gfn,
		.npages = slot ? slot->npages : 0,
		.log = slot ? kl_dirty_log_of(slot) : NULL,
	};
	kl_srcu_read_unlock(&vm->srcu, token);
}

static bool may_write(struct kl_vcpu_core *c, struct kl_dirty_log *log, uint64_t index, bool write)
{
	if (KL_UNLIKELY(log->in_ring) && (c->ring || !c->vm->dirty_ring_with_bitmap))
		return write ? kl_dirty_ring_mark_in_guest(c, log, index)
			     : kl_dirty_test(log->in_ring, index);
	if (!write)
		return is_marked(log, index);
	mark_in_guest(log, index);
	return true;
}

bool kl_dirty_may_write(struct kl_vcpu_core *c, kl_gfn_t gfn, bool write)
{
	struct kl_dirty_log *log;
	uint64_t index;

	if (KL_UNLIKELY(c->log.generation != kl_generation(c->vm, c->as_id) ||
			gfn - c->log.base_gfn >= c->log.npages))
		find_log(c, gfn);
	log = c->log.log;
	index = gfn - c->log.base_gfn;
	racepoint("dirty-log-found");
	if (!log)
		return true;
	/* The program's decides; the other one never refuses a write. */
	if (KL_UNLIKELY(log->also != NULL) && !may_write(c, log->also, index, write))
		return false;
	return may_write(c, log, index, write);
}
