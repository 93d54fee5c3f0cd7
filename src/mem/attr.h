/* SPDX-License-Identifier: MIT */
/*
 * Memory attributes: which guest frames are private (F5).
 *
 * A radix tree of one bit per frame, in which whatever is uniform is one entry: a change costs
 * memory for its two edges, not for its size. An entry of level n stands for 512^n frames, and is 0
 * (all shared), 1 (all private), or a node of 512 entries of level n - 1; entries of level 0 are
 * bits. A node that becomes uniform is taken out.
 *
 * Locks: changes under vm->slots_lock. Readers hold vm->srcu; they see each frame as it was before
 * or after a change. Whoever must not act on the former is told so by the change's bracket
 * (mem/gfn_change.h).
 */
#pragma once

#include <kvmlet/types.h>

#include "base/compiler.h"

/* KVM's, of which there is one. */
#define KL_ATTR_PRIVATE (1ull << 3)

struct kl_attr_node;

struct kl_attrs {
	_Atomic uint64_t root;        /* entry of level KL_ATTR_LEVELS */
	struct kl_attr_node *retired; /* slots_lock: to be freed when readers have left */
};

#define KL_ATTR_LEVELS 6 /* 54 bits of frame number; 52 are used */

/*
 * Is @gfn private? @*level: all the frames around it that an entry of this level stands for, are as
 * it is (0: it may be alone).
 * Context: reader section of vm->srcu, or vm->slots_lock.
 */
bool kl_attr_private(const struct kl_attrs *a, kl_gfn_t gfn, unsigned *level);
/* Are all of [@first, @last) @private? Same context. */
bool kl_attr_uniform(const struct kl_attrs *a, kl_gfn_t first, kl_gfn_t last, bool private);

/*
 * A change in two steps, under vm->slots_lock: prepare may fail (-ENOMEM) and changes no frame;
 * after it, set cannot fail. True: something was retired, and reclaim must be called when readers
 * have left.
 */
int kl_attr_prepare(struct kl_attrs *a, kl_gfn_t first, kl_gfn_t last, bool private) KL_MUST_CHECK;
bool kl_attr_set(struct kl_attrs *a, kl_gfn_t first, kl_gfn_t last, bool private);
void kl_attr_reclaim(struct kl_attrs *a);
/* Nobody reads any more. */
void kl_attr_destroy(struct kl_attrs *a);
/* Bytes that the tree takes; tests. */
uint64_t kl_attr_memory(const struct kl_attrs *a);
