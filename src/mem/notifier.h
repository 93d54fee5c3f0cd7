/* SPDX-License-Identifier: MIT */
/*
 * MMU notifiers: the bracket around every change of host memory (N1-N7).
 *
 *     kl_notifier_begin(range) ... the host call ... kl_notifier_end(range)
 *
 * Process-wide: finds the VMs whose slots overlap. When begin() returns 0, no vCPU and no
 * engine code reaches the range through an old pointer until it has faulted again (N2).
 *
 * Context: kl_engine_enter() done; any thread, also inside the program's allocator (N4): no
 * allocation, and no lock at all when nothing overlaps.
 */
#pragma once

#include <kvmlet/types.h>

#include "base/compiler.h"

struct kl_vm;

enum kl_notifier_event {
	KL_EVENT_UNMAP,
	KL_EVENT_REMAP,
	KL_EVENT_PROTECT,
	KL_EVENT_DISCARD,
	KL_EVENT_TRUNCATE,
	KL_EVENT_REPLACE,
};

struct kl_notifier_range {
	uint64_t start, end; /* hva, bytes; rounded outwards to pages by begin() */
	enum kl_notifier_event event;
	bool may_block;
	bool no_queue;     /* never wait for an update: it may be waiting for whom we serve */
	const char *cause; /* the host call, for --trace; may be NULL */
};

/* Returns 0; -EAGAIN if !may_block and it would have had to wait (nothing changed then). */
int kl_notifier_begin(struct kl_notifier_range *r) KL_MUST_CHECK;
/* Must follow a begin() that returned 0, on the same thread, with the same object. */
void kl_notifier_end(struct kl_notifier_range *r);

/*
 * Is some page of host memory [start, end) young, that is, accessed by a guest since it was last
 * cleared (N6)? Nothing is zapped. 1 or 0.
 */
int kl_notifier_test_young(uint64_t start, uint64_t end);
int kl_notifier_clear_young(uint64_t start, uint64_t end);

/*
 * A change of which slots lie over host memory [start, end) waits until no bracket over that
 * memory is in flight, and holds new ones off (S7). Between the two calls: no sleep, no lock
 * but leaves.
 * Context: no bracket of this thread is open.
 */
struct kl_notifier_update {
	uint64_t start, end;
	uint64_t start2, end2; /* and this; may be empty */
	/* private */
	struct kl_vm *vm;
	struct kl_notifier_update *next;
};
void kl_notifier_update_begin(struct kl_notifier_update *u);
void kl_notifier_update_end(struct kl_notifier_update *u);

/*
 * False while the process has no VM: a wrapper then has nothing to bracket. (A host call that
 * began before the first VM was created is not seen; KVM's registration waits for those.)
 */
bool kl_notifier_active(void);
