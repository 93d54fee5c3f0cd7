/* SPDX-License-Identifier: MIT */
/*
 * Everything that the memory layer tells a higher one, in the order in which it tells it.
 * The functions are implemented by the layer named; this list is the only way up.
 *
 *   1. gpc    the gfn->pfn caches (mem/gpc.c)
 *   2. mmu    stage 2
 *   3. track  (to come with page tracking)
 */
#pragma once

#include <kvmlet/types.h>

#include "base/compiler.h"

struct kl_vm;
struct kl_memslot;
struct kl_notifier_range;

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

/* mmu: the slot is invalid in the published set and readers have left: zap and flush (S4). */
void kl_mmu_zap_slot(struct kl_vm *vm, const struct kl_memslot *slot);
/*
 * mmu: ageing (N6). 1 if a vCPU has accessed host memory of @r since the last call with @clear,
 * else 0. Context: as kl_mmu_invalidate_begin(), without a bracket.
 */
int kl_mmu_age(struct kl_vm *vm, const struct kl_notifier_range *r, bool clear);

/* mmu: the MMIO generation wrapped (S6). */
void kl_mmu_zap_mmio(struct kl_vm *vm);
