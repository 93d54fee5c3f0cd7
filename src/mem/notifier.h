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
	/* private to the implementation */
	uint64_t armed; /* bitmap slot of affected VMs, 0 if none */
	struct kl_vm *vms[16];
};

/* Returns 0; -EAGAIN if !may_block and it would have had to wait (nothing changed then). */
int kl_notifier_begin(struct kl_notifier_range *r) KL_MUST_CHECK;
/* Must follow a begin() that returned 0, on the same thread, with the same object. */
void kl_notifier_end(struct kl_notifier_range *r);

/* True if some VM has a slot: everything else can be skipped if not. */
bool kl_notifier_active(void);
