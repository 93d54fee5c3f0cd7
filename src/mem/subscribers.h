/* SPDX-License-Identifier: MIT */
/*
 * Everything that the memory layer tells a higher one, in the order in which it tells it.
 * The functions are implemented by the layer named; this list is the only way up.
 *
 *   1. gpc    the gfn->pfn caches (mem/gpc.c)
 *   2. mmu    stage 2
 *   3. track  who watches writes to guest pages (mmu/track.c)
 */
#pragma once

#include <kvmlet/types.h>

#include "base/compiler.h"

struct kl_vm;
struct kl_memslot;
struct kl_notifier_range;
struct kl_track_counts;

/*
 * gpc: the host memory of @r is being invalidated (N2). begin() makes the caches over it invalid
 * and waits for their holders. !r->may_block: -EAGAIN, with nothing changed, if it would wait.
 * undo(): a later subscriber has refused. end(): which caches lie there may have changed since.
 * Context: reader section of vm->srcu, inside the bracket.
 */
int kl_gpc_invalidate_begin(struct kl_vm *vm, const struct kl_notifier_range *r);
void kl_gpc_invalidate_undo(struct kl_vm *vm, const struct kl_notifier_range *r);
void kl_gpc_invalidate_end(struct kl_vm *vm, const struct kl_notifier_range *r);
/*
 * gpc: @slot is not in the published set any more, readers have left, and the generation is odd:
 * wait for who holds a pointer that came from it (S8).
 */
void kl_gpc_zap_slot(struct kl_vm *vm, const struct kl_memslot *slot);

/*
 * gpc: writes to page @gfn of @slot are reported from now on. Who holds a cache of it from before
 * has left it when this returns. Context: reader section of vm->srcu; as a refresh of the caches.
 */
void kl_gpc_close_page(struct kl_vm *vm, const struct kl_memslot *slot, kl_gfn_t gfn);
/*
 * gpc: what backs the frames [@first, @last) is about to change (mem/private.h): caches over their
 * memory become invalid, and holders are waited for. Context: slots_lock; kl_gfn_changing().
 */
void kl_gpc_zap_gfns(struct kl_vm *vm, kl_gfn_t first, kl_gfn_t last);

/* mmu: birth and death with the VM. 0 or -ENOMEM. */
int kl_mmu_create(struct kl_vm *vm) KL_MUST_CHECK;
void kl_mmu_destroy(struct kl_vm *vm);

/*
 * mmu: the host memory of @r is being invalidated (N2), and some slot of @vm overlaps it.
 * begin() raises in_progress over the overlapping gfns, zaps, flushes and waits; end() is
 * called for exactly the VMs whose begin() returned 0.
 * !r->may_block: -EAGAIN, with nothing left changed, if it would wait.
 * Context: reader section of vm->srcu, inside the bracket: which slots overlap @r does not
 * change from begin() to end().
 */
int kl_mmu_invalidate_begin(struct kl_vm *vm, const struct kl_notifier_range *r);
void kl_mmu_invalidate_end(struct kl_vm *vm, const struct kl_notifier_range *r);

/*
 * mmu: the same for frames: begin() raises in_progress over [@first, @last), zaps what is there,
 * also that nothing is, flushes and waits. Context: slots_lock.
 */
void kl_mmu_change_begin(struct kl_vm *vm, kl_gfn_t first, kl_gfn_t last, const char *cause);
void kl_mmu_change_end(struct kl_vm *vm);

/* mmu: the slot is invalid in the published set and readers have left: zap and flush (S4). */
void kl_mmu_zap_slot(struct kl_vm *vm, const struct kl_memslot *slot);
/*
 * mmu: ageing (N6). 1 if a vCPU has accessed host memory of @r since the last call with @clear,
 * else 0. Context: as kl_mmu_invalidate_begin(), without a bracket.
 */
int kl_mmu_age(struct kl_vm *vm, const struct kl_notifier_range *r, bool clear);

/*
 * mmu: @slot logs from now on, and vCPUs know it; it does not any more, likewise; of its pages
 * [@first, @last) some were taken by KVM_CLEAR_DIRTY_LOG (D4). Context: slots_lock.
 */
void kl_mmu_log_begun(struct kl_vm *vm, const struct kl_memslot *slot);
void kl_mmu_log_ended(struct kl_vm *vm, const struct kl_memslot *slot);
void kl_mmu_log_cleared(struct kl_vm *vm, const struct kl_memslot *slot, uint64_t first,
			uint64_t last);

/* mmu: the MMIO generation wrapped (S6). */
void kl_mmu_zap_mmio(struct kl_vm *vm);

/* track: birth (-ENOMEM) and death with the VM; to die, it need not have been born. */
int kl_track_create(struct kl_vm *vm) KL_MUST_CHECK;
void kl_track_destroy(struct kl_vm *vm);
/* track: is somebody there whom a MOVE would mislead (S8, T6)? Context: slots_lock. */
bool kl_track_forbids_move(struct kl_vm *vm);
/*
 * track: @slot is marked invalid in the published set, readers have left, stage 2 is zapped: nobody
 * adds to its counts. Takes them away.
 */
struct kl_track_counts *kl_track_detach(struct kl_vm *vm, const struct kl_memslot *slot);
/*
 * track: @slot is in no set any more, and nothing can fail: its @counts are freed, and trackers are
 * told, after all writes to it were reported (T5). Context: slots_lock.
 */
void kl_track_slot_gone(struct kl_vm *vm, const struct kl_memslot *slot,
			struct kl_track_counts *counts);
/*
 * track: a holder of a cache that is about to leave it has written @len bytes at @khva, which is
 * @gpa. Between begin and report he leaves. False: nobody is interested.
 */
struct kl_track_copy {
	int token;
	unsigned as;
	kl_gpa_t gpa;
	size_t len;
	uint8_t bytes[KL_PAGE_SIZE];
};
bool kl_track_cache_begin(struct kl_vm *vm, unsigned as, kl_gpa_t gpa, const void *khva, size_t len,
			  struct kl_track_copy *copy);
void kl_track_cache_report(struct kl_vm *vm, const struct kl_track_copy *copy);
