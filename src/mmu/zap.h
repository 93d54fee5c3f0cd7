/* SPDX-License-Identifier: MIT */
/*
 * Taking translations away, with the lock, the batches and the flush (M5).
 *
 * A zap has flushed before it reports done: between the change of SPTEs and the end of the flush
 * mmu_lock is not released, so no fault can install one that the flush would miss, and no
 * unlinked table is reused.
 */
#pragma once

#include "mmu/trace.h"

/*
 * Flush if @needed or owed. 0, or -EAGAIN if !@may_wait and a vCPU is in the way; then the flush
 * is owed, and the next zap of whatever range pays it.
 * Context: mmu lock for writing.
 */
int kl_mmu_flush(struct kl_vm *vm, bool needed, bool may_wait, struct kl_flush_report *f);

/*
 * Sweep to the end. Called with the lock held for writing, and returns with it; between batches
 * it is released. @s->garbage has been freed.
 */
void kl_mmu_sweep_locked(struct kl_sweep *s, struct kl_flush_report *f);

/* All entries of [@first, @last). @cause: for --trace. Context: no lock from mmu_lock on. */
void kl_mmu_zap_range(struct kl_vm *vm, unsigned as, kl_gfn_t first, kl_gfn_t last,
		      const char *cause);
