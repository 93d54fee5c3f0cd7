/* SPDX-License-Identifier: MIT */
/*
 * Changes of what backs guest frames, other than by slots or host calls: conversion between shared
 * and private (F5), and the closing of a file that slots are bound to (F2).
 *
 *     kl_gfn_change_begin(range) ... the change ... kl_gfn_change_end()
 *
 * When begin() has returned, nobody reaches the frames through an old pointer until he has looked
 * them up again, and no fault on them installs before end(). Like a notifier bracket, but by frame
 * and for one VM.
 */
#pragma once

#include <kvmlet/types.h>

#include "base/compiler.h"

struct kl_vm;
struct kl_memslot;

/* Context: slots_lock; may sleep; no bracket of this thread. Nothing in between can fail. */
void kl_gfn_change_begin(struct kl_vm *vm, kl_gfn_t first, kl_gfn_t last, const char *cause);
void kl_gfn_change_end(struct kl_vm *vm);

/* Is one under way? See mem/gpc.c, which asks before it looks a frame up. */
bool kl_gfn_changing(struct kl_vm *vm);

/*
 * KVM_SET_MEMORY_ATTRIBUTES: frames [@first, @last) become @private, or shared.
 * Context: may sleep; no bracket of this thread.
 * Returns: 0; -ENOMEM, with nothing changed.
 */
int kl_set_private(struct kl_vm *vm, kl_gfn_t first, kl_gfn_t last, bool private) KL_MUST_CHECK;

/* Where the page of @gfn in @slot is. Context: reader section of vm->srcu, begun before @slot. */
enum kl_backing {
	KL_BACKED_BY_HVA,  /* the program's memory */
	KL_BACKED_BY_GMEM, /* slot->gmem */
	KL_BACKED_BY_NONE, /* private, and no guest_memfd, or it has been closed */
};
enum kl_backing kl_backing_of(struct kl_vm *vm, const struct kl_memslot *slot, kl_gfn_t gfn,
			      bool *private, unsigned *uniform);
