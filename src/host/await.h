/* SPDX-License-Identifier: MIT */
/*
 * Waiting for host pages in somebody's place: a helper thread touches the page as
 * kl_host_populate() does, and tells when that is over, whatever came of it.
 *
 * Guarantees
 *   (a) What kl_await_start() accepts has a helper of its own until it is over: no page waits
 * behind another that its userfaultfd's owner never brings. When all helpers are busy it is
 * refused. (b) done() runs in the helper, with no lock held, once, unless it is cancelled before.
 *   (c) When kl_await_cancel() returns, nobody touches the page for @a any more, and done() has run
 * or never will. It interrupts a touch that blocks.
 *
 * Helpers are started as they are needed, at most KL_MAX_AWAITED, and end with the last reference.
 * In a forked child there are none, and nothing is waited for.
 */
#pragma once

#include <kvmlet/types.h>

#include "base/compiler.h"

#define KL_MAX_AWAITED 16

struct kl_await {
	void (*done)(struct kl_await *a);
	int result; /* in done(): of kl_host_populate() */
	/* The rest is await.c's. */
	kl_hva_t hva;
	bool write;
	_Atomic bool cancelled;
};

/* While somebody has a reference there may be helpers. */
void kl_await_get(void);
/* Nothing is awaited any more that this reference was for. */
void kl_await_put(void);

/*
 * Have the page at @hva touched, for writing if @write, and a->done() called.
 * Context: a reference is held; @a is not awaited. Returns: 0; -EAGAIN, no helper is free.
 */
int kl_await_start(struct kl_await *a, kl_hva_t hva, bool write) KL_MUST_CHECK;

/* Context: not from done(), no lock that done() takes. Nothing, if @a is not awaited. */
void kl_await_cancel(struct kl_await *a);

void kl_await_after_fork(void);
