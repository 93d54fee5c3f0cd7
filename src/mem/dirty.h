/* SPDX-License-Identifier: MIT */
/*
 * Dirty logs (D1, D3, D4): which pages of a slot were written.
 *
 * Stage 2 has no part in it. A page is marked when somebody in guest mode looks it up for writing,
 * before it gets the pointer (mmu/fault.c); who looks it up for reading may write through the
 * pointer only if the page is marked already. Pointers are kept, by vCPU TLBs, so
 *
 *   (L1) who is in guest mode with a pointer that it may write through, and has no flush to serve,
 *        has its page marked in the current half of the log.
 *
 * To take marks away is to take them out of the current half, then to flush: after the flush
 * nobody writes a page without having marked it anew. Stores in between were made by those whom the
 * flush waited for, so they are visible when the call returns, and the program looks at the pages
 * that the log names after that. (L1) holds for slots of which the log is new because turning it on
 * flushes, too. So neither the log nor its end needs the mmu lock, nor do leaves have to be split.
 *
 * Who writes without being in guest mode (the holder of a gpc) marks after its store, each time:
 * kl_dirty_mark().
 *
 * The bitmap is there twice. Reading the log makes the other half the current one, flushes, and
 * then has the old half for itself: nothing in it needs an atomic operation. For each 512 pages, a
 * cache line of the bitmap, a half has a bit in `lines`: it is set if the line may have marks (a
 * word first, then its line). What is clean is not looked at.
 *
 * A late kl_dirty_mark() may set a bit in the old half. It then finds that the sequence has moved,
 * and marks in the current half again; the bit that stays behind is reported once more in time.
 *
 * A log is the slot's, for the slot's life with KVM_MEM_LOG_DIRTY_PAGES; it moves with it. Before
 * it is freed no set of slots has it, readers and holders of caches have left, and vCPUs were
 * flushed.
 *
 * A slot may have a second log, `heat`, which the engine reads for itself (mem/heat.h) and the
 * program knows nothing of. It is there for as long as the slot is. Who marks a page does so in
 * both: the program's names the other in `also`, for all of its life.
 */
#pragma once

#include "mem/vm.h"

#define KL_DIRTY_LINE_WORDS 8
#define KL_DIRTY_LINE_PAGES (64 * KL_DIRTY_LINE_WORDS)

struct kl_heat_record;

struct kl_dirty_half {
	_Atomic uint64_t *words; /* a bit for each page */
	_Atomic uint64_t *lines; /* a bit for each line of words */
};

struct kl_dirty_log {
	uint64_t npages;
	uint32_t slot;        /* as KVM's interfaces have it: address space << 16 | id */
	_Atomic uint64_t seq; /* the current half is half[seq & 1]; slots_lock to change it */
	struct kl_dirty_half half[2];
	struct kl_dirty_log *also;     /* to be marked, too: the slot's second log; or NULL */
	struct kl_heat_record *record; /* of a second one: mem/heat.c's */
	_Atomic uint64_t *in_ring;     /* a bit for each page, see dirty_ring.h; NULL: no rings */
	uint64_t *scratch;             /* slots_lock; as many words as a half has */
	size_t size;                   /* of the mapping that all of it is in */
};

/* Where a write to @slot is to be marked, or NULL. */
KL_INLINE struct kl_dirty_log *kl_dirty_log_of(const struct kl_memslot *slot)
{
	return slot->log ? slot->log : slot->heat;
}

/* May some slot log? If not, no lookup has to care. */
KL_INLINE bool kl_vm_logs(struct kl_vm *vm)
{
	return atomic_load_explicit(&vm->nr_logs, memory_order_relaxed);
}

/*
 * May @c, in guest mode, write guest page @gfn through the pointer that it is looking up now?
 * @write: it wants to, so the page is marked. False: look it up again for writing; or, if @write,
 * the vCPU's ring is full.
 */
bool kl_dirty_may_write(struct kl_vcpu_core *c, kl_gfn_t gfn, bool write);

/*
 * Page @index of the slot was written by who is not in guest mode, and is visible. Unconditional: a
 * bit that looks set may be taken before the store is visible. [B13]
 * Context: something keeps the log: a gpc of the slot is held.
 */
void kl_dirty_mark(struct kl_vm *vm, struct kl_dirty_log *log, uint64_t index);

/* Mark a page in the current half, by whom no flush waits for. */
void kl_dirty_mark_half(struct kl_dirty_log *log, uint64_t index);

KL_INLINE bool kl_dirty_test(const _Atomic uint64_t *words, uint64_t index)
{
	return atomic_load_explicit(&words[index / 64], memory_order_relaxed) >> index % 64 & 1;
}

/* ---- life ------------------------------------------------------------------------------- */

/*
 * A log for a slot of @npages, as the program has asked for, beside @also (or NULL). The second
 * one: the engine's own. NULL: out of memory. Context: slots_lock.
 */
struct kl_dirty_log *kl_dirty_log_new(struct kl_vm *vm, unsigned as, unsigned id, uint64_t npages,
				      struct kl_dirty_log *also);
struct kl_dirty_log *kl_dirty_log_new_own(struct kl_vm *vm, unsigned as, unsigned id,
					  uint64_t npages);
/* No set has it. Flushes. Context: slots_lock; not in guest mode. */
void kl_dirty_log_free(struct kl_vm *vm, struct kl_dirty_log *log);
/* KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2. Context: no lock. */
void kl_dirty_log_set_manual(struct kl_vm *vm, uint64_t flags);
/* With the VM: the log that is kept for the next one, and the VM's ring. */
void kl_dirty_logs_destroy(struct kl_vm *vm);

/* ---- reading ---------------------------------------------------------------------------- */

/*
 * KVM_GET_DIRTY_LOG: the log of slot @id into the program's @bitmap. Unless @keep it is taken; what
 * the program did not get, because its memory is not there, stays.
 * Context: may sleep; no lock.
 * Returns: 0; -ENXIO: there are rings, and no bitmap beside them; -EINVAL: no such @as or @id;
 * -ENOENT: no such slot, or it has no log; -EFAULT.
 */
int kl_dirty_log_get(struct kl_vm *vm, unsigned as, unsigned id, void *bitmap,
		     bool keep) KL_MUST_CHECK;

/*
 * The same for a caller whose @bitmap has room for @npages, as vm->manual_dirty_log says; -EINVAL
 * also if the slot has more.
 */
int kl_dirty_log_get_pages(struct kl_vm *vm, unsigned as, unsigned id, void *bitmap,
			   uint64_t npages) KL_MUST_CHECK;

/*
 * The log for the engine itself: @fn gets each word of it that is not 0. It is taken unless @keep;
 * then no vCPU is disturbed, and a write that is under way may be missing.
 * Context: slots_lock, or the log is the caller's alone.
 */
void kl_dirty_log_harvest(struct kl_vm *vm, struct kl_dirty_log *log, bool keep,
			  void (*fn)(void *arg, uint64_t word, uint64_t pages), void *arg);

/*
 * KVM_CLEAR_DIRTY_LOG: of slot @id's pages from @first_page on, @num_pages, take those out of the
 * log that the program's @bitmap names; its bit 0 is @first_page, a multiple of 64. Either all of
 * it is read, or nothing changes.
 * Context: may sleep; no lock.
 * Returns: 0; -ENXIO; -EINVAL: as above, or pages that the slot does not have, or an end within a
 * word that is not the slot's; -ENOENT; -EFAULT.
 */
int kl_dirty_log_clear(struct kl_vm *vm, unsigned as, unsigned id, uint64_t first_page,
		       uint64_t num_pages, const void *bitmap) KL_MUST_CHECK;
