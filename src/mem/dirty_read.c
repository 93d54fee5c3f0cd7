/* SPDX-License-Identifier: MIT */
/*
 * Reading and clearing a dirty log (D1).
 *
 * Locks: slots_lock (rank SLOTS) throughout, so that the slot stays; as in KVM, a program must not
 * make the copy wait for a change of slots.
 */
#include <errno.h>
#include <string.h>

#include "base/log.h"
#include "base/racepoint.h"
#include "host/guard.h"
#include "mem/dirty.h"
#include "mem/subscribers.h"

#define CHUNK_LINES 64 /* of one word of `lines` */
#define CHUNK_WORDS (CHUNK_LINES * KL_DIRTY_LINE_WORDS)

static uint64_t nr_words(const struct kl_dirty_log *log)
{
	return (log->npages + 63) / 64;
}

static uint64_t nr_chunks(const struct kl_dirty_log *log)
{
	return (nr_words(log) + CHUNK_WORDS - 1) / CHUNK_WORDS;
}

static bool is_clean(const struct kl_dirty_log *log, const struct kl_dirty_half *half)
{
	for (uint64_t i = 0; i < nr_chunks(log); i++)
		if (atomic_load_explicit(&half->lines[i], memory_order_acquire))
			return false;
	return true;
}

/* A chunk to the program: as the words are, or, if it has no @lines, as zeros. */
static int copy_chunk(const struct kl_dirty_log *log, const struct kl_dirty_half *half, uint64_t i,
		      uint64_t lines, char *bitmap)
{
	static const uint64_t zeros[CHUNK_WORDS];
	uint64_t at = i * CHUNK_WORDS;
	size_t n = kl_min((uint64_t)CHUNK_WORDS, nr_words(log) - at) * sizeof(uint64_t);
	const void *from = lines ? (const void *)&half->words[at] : zeros;

	return kl_copy_to_user(bitmap + at * sizeof(uint64_t), from, n);
}

#define for_each_line(line, i, lines)                                                           \
	for (uint64_t left_ = (lines), line;                                                    \
	     left_ ? (line = (i)*CHUNK_LINES + (unsigned)__builtin_ctzll(left_), true) : false; \
	     left_ &= left_ - 1)

/* The old half is ours: who marks in it comes too late, knows it, and marks again. */
static void wipe_chunk(struct kl_dirty_half *half, uint64_t i, uint64_t lines)
{
	for_each_line(line, i, lines) for (unsigned w = 0; w < KL_DIRTY_LINE_WORDS; w++)
		atomic_store_explicit(&half->words[line * KL_DIRTY_LINE_WORDS + w], 0,
				      memory_order_relaxed);
}

/* Into the half that is current now. Context: slots_lock, so it stays the current one. */
static void mark_word(struct kl_dirty_log *log, uint64_t word, uint64_t pages)
{
	struct kl_dirty_half *half = &log->half[log->seq & 1];
	uint64_t line = word / KL_DIRTY_LINE_WORDS;

	atomic_fetch_or(&half->words[word], pages);
	/* The word first: dirty.h. */
	if (!kl_dirty_test(half->lines, line))
		atomic_fetch_or(&half->lines[line / 64], 1ull << line % 64);
}

/* What the program did not get stays dirty. */
static void put_back(struct kl_dirty_log *log, struct kl_dirty_half *half, uint64_t i,
		     uint64_t lines)
{
	for_each_line(line, i, lines) for (uint64_t w = line * KL_DIRTY_LINE_WORDS;
					   w < (line + 1) * KL_DIRTY_LINE_WORDS; w++)
	{
		uint64_t left = atomic_load_explicit(&half->words[w], memory_order_relaxed);

		if (left)
			mark_word(log, w, left);
	}
}

/* Read, and leave as it is: of chunk @i, from the current half. */
static int keep_all(const struct kl_dirty_log *log, const struct kl_dirty_half *half, char *bitmap)
{
	int r = 0;

	for (uint64_t i = 0; i < nr_chunks(log) && !r; i++)
		r = copy_chunk(log, half, i,
			       atomic_load_explicit(&half->lines[i], memory_order_acquire), bitmap);
	return r;
}

static int take_all(struct kl_vm *vm, struct kl_dirty_log *log, char *bitmap)
{
	uint64_t seq = atomic_load_explicit(&log->seq, memory_order_relaxed);
	struct kl_dirty_half *half = &log->half[seq & 1];
	int r = 0;

	if (is_clean(log, half))
		return keep_all(log, half, bitmap); /* nobody may write without marking */
	atomic_store(&log->seq, seq + 1);           /* PAIR(vcpu-mode) PAIR(dirty-seq) */
	racepoint("dirty-swapped");
	(void)kl_vcpus_flush(vm, true);
	racepoint("dirty-flushed");
	for (uint64_t i = 0; i < nr_chunks(log); i++) {
		/* The lines before the words, so that no word is left without its line. */
		uint64_t lines =
			atomic_load_explicit(&half->lines[i], memory_order_relaxed)
				? atomic_exchange_explicit(&half->lines[i], 0, memory_order_acquire)
				: 0;

		if (!r)
			r = copy_chunk(log, half, i, lines, bitmap);
		if (r)
			put_back(log, half, i, lines);
		wipe_chunk(half, i, lines);
	}
	return r;
}

/* Of chunk @i, the words that are not 0. */
static void tell_chunk(const struct kl_dirty_half *half, uint64_t i, uint64_t lines,
		       void (*fn)(void *arg, uint64_t word, uint64_t pages), void *arg)
{
	for_each_line(line, i, lines) for (uint64_t w = line * KL_DIRTY_LINE_WORDS;
					   w < (line + 1) * KL_DIRTY_LINE_WORDS; w++)
	{
		uint64_t pages = atomic_load_explicit(&half->words[w], memory_order_relaxed);

		if (pages)
			fn(arg, w, pages);
	}
}

void kl_dirty_log_harvest(struct kl_vm *vm, struct kl_dirty_log *log, bool keep,
			  void (*fn)(void *arg, uint64_t word, uint64_t pages), void *arg)
{
	uint64_t seq = atomic_load_explicit(&log->seq, memory_order_relaxed);
	struct kl_dirty_half *half = &log->half[seq & 1];

	if (is_clean(log, half))
		return;
	if (!keep) {
		atomic_store(&log->seq, seq + 1); /* PAIR(vcpu-mode) PAIR(dirty-seq) */
		(void)kl_vcpus_flush(vm, true);
	}
	for (uint64_t i = 0; i < nr_chunks(log); i++) {
		uint64_t lines = atomic_load_explicit(&half->lines[i], memory_order_acquire);

		/* As when the program takes it: the lines before the words. */
		if (!keep && lines)
			lines = atomic_exchange_explicit(&half->lines[i], 0, memory_order_acquire);
		tell_chunk(half, i, lines, fn, arg);
		if (!keep)
			wipe_chunk(half, i, lines);
	}
}

/* 0 and the slot's log; the errors that get and clear have in common. Context: slots_lock. */
static int find(struct kl_vm *vm, unsigned as, unsigned id, struct kl_dirty_log **log)
{
	const struct kl_memslot *slot = vm->slot_by_id[as][id];

	if (!slot || !slot->log)
		return -ENOENT;
	*log = slot->log;
	return 0;
}

static int check_args(struct kl_vm *vm, unsigned as, unsigned id)
{
	if (vm->dirty_ring_size && !vm->dirty_ring_with_bitmap)
		return -ENXIO;
	return as >= KL_NR_AS || id >= KL_USER_MEM_SLOTS ? -EINVAL : 0;
}

static int get_locked(struct kl_vm *vm, struct kl_dirty_log *log, void *bitmap, bool keep)
{
	return keep ? keep_all(log, &log->half[log->seq & 1], bitmap) : take_all(vm, log, bitmap);
}

int kl_dirty_log_get(struct kl_vm *vm, unsigned as, unsigned id, void *bitmap, bool keep)
{
	struct kl_dirty_log *log;
	int r = check_args(vm, as, id);

	if (r)
		return r;
	kl_mutex_lock(&vm->slots_lock);
	r = find(vm, as, id, &log);
	if (!r)
		r = get_locked(vm, log, bitmap, keep);
	kl_mutex_unlock(&vm->slots_lock);
	return r;
}

int kl_dirty_log_get_pages(struct kl_vm *vm, unsigned as, unsigned id, void *bitmap,
			   uint64_t npages)
{
	struct kl_dirty_log *log;
	int r = check_args(vm, as, id);

	if (r)
		return r;
	kl_mutex_lock(&vm->slots_lock);
	r = find(vm, as, id, &log);
	if (!r && npages < log->npages)
		r = -EINVAL;
	if (!r)
		r = get_locked(vm, log, bitmap, vm->manual_dirty_log);
	kl_mutex_unlock(&vm->slots_lock);
	return r;
}

static const struct kl_memslot *slot_of(struct kl_vm *vm, const struct kl_dirty_log *log)
{
	return vm->slot_by_id[log->slot >> 16][log->slot & 0xffff];
}

/* True if something was marked. @mask: of words [@first, @last). */
static bool clear_line(struct kl_dirty_half *half, uint64_t line, uint64_t first, uint64_t last,
		       const uint64_t *mask)
{
	_Atomic uint64_t *lines = &half->lines[line / 64];
	uint64_t begin = line * KL_DIRTY_LINE_WORDS, left = 0;
	bool any = false;

	/* Before the words: who marks one of them now sets it again. */
	atomic_fetch_and(lines, ~(1ull << line % 64));
	for (uint64_t w = begin; w < begin + KL_DIRTY_LINE_WORDS; w++) {
		uint64_t now = atomic_load(&half->words[w]), take;

		take = w >= first && w < last ? now & mask[w - first] : 0;
		if (take) {
			now = atomic_fetch_and(&half->words[w], ~take) & ~take;
			any = true;
		}
		left |= now;
	}
	racepoint("dirty-line-read");
	if (left)
		atomic_fetch_or(lines, 1ull << line % 64);
	return any;
}

/*
 * Marks of all pages: as when the log is taken, the old half is ours after the flush, and needs no
 * atomic operation; what @mask leaves of it goes to the other one. False: there were none.
 */
static bool clear_all(struct kl_vm *vm, struct kl_dirty_log *log, const uint64_t *mask)
{
	uint64_t seq = atomic_load_explicit(&log->seq, memory_order_relaxed);
	struct kl_dirty_half *half = &log->half[seq & 1];

	if (is_clean(log, half))
		return false;
	atomic_store(&log->seq, seq + 1); /* PAIR(vcpu-mode) PAIR(dirty-seq) */
	racepoint("dirty-clear-swapped");
	(void)kl_vcpus_flush(vm, true);
	for (uint64_t i = 0; i < nr_chunks(log); i++) {
		uint64_t lines = atomic_load_explicit(&half->lines[i], memory_order_relaxed);

		if (lines)
			lines = atomic_exchange_explicit(&half->lines[i], 0, memory_order_acquire);
		for_each_line(line, i, lines) for (uint64_t w = line * KL_DIRTY_LINE_WORDS;
						   w < (line + 1) * KL_DIRTY_LINE_WORDS; w++)
		{
			/* The slot may end in the middle of a line. */
			uint64_t taken = w < nr_words(log) ? mask[w] : 0;
			uint64_t left =
				atomic_load_explicit(&half->words[w], memory_order_relaxed) &
				~taken;

			atomic_store_explicit(&half->words[w], 0, memory_order_relaxed);
			if (left)
				mark_word(log, w, left);
		}
	}
	return true;
}

static int clear_locked(struct kl_vm *vm, struct kl_dirty_log *log, uint64_t first_page,
			uint64_t num_pages, const void *bitmap)
{
	struct kl_dirty_half *half = &log->half[log->seq & 1];
	uint64_t first = first_page / 64, last = first + (num_pages + 63) / 64;
	bool any = false;
	uint64_t chunk;

	if (first_page > log->npages || num_pages > log->npages - first_page ||
	    ((num_pages & 63) && num_pages != log->npages - first_page))
		return -EINVAL;
	if (!num_pages)
		return 0;
	if (kl_copy_from_user(log->scratch, bitmap, (last - first) * sizeof(uint64_t)))
		return -EFAULT;
	/* Of one line it would not pay. */
	if (num_pages == log->npages && num_pages > KL_DIRTY_LINE_PAGES) {
		if (clear_all(vm, log, log->scratch))
			kl_mmu_log_cleared(vm, slot_of(vm, log), 0, num_pages);
		return 0;
	}
	for (chunk = first / CHUNK_WORDS; chunk * CHUNK_WORDS < last; chunk++) {
		uint64_t lines = atomic_load_explicit(&half->lines[chunk], memory_order_acquire);

		for_each_line(line, chunk, lines) if (line * KL_DIRTY_LINE_WORDS < last &&
						      (line + 1) * KL_DIRTY_LINE_WORDS > first)
			any |= clear_line(half, line, first, last, log->scratch);
	}
	racepoint("dirty-cleared");
	if (any) {
		(void)kl_vcpus_flush(vm, true);
		kl_mmu_log_cleared(vm, slot_of(vm, log), first_page, first_page + num_pages);
	}
	return 0;
}

int kl_dirty_log_clear(struct kl_vm *vm, unsigned as, unsigned id, uint64_t first_page,
		       uint64_t num_pages, const void *bitmap)
{
	struct kl_dirty_log *log;
	int r = check_args(vm, as, id);

	if (!r && (first_page & 63))
		r = -EINVAL;
	if (r)
		return r;
	kl_mutex_lock(&vm->slots_lock);
	r = find(vm, as, id, &log);
	if (!r)
		r = clear_locked(vm, log, first_page, num_pages, bitmap);
	kl_mutex_unlock(&vm->slots_lock);
	return r;
}
