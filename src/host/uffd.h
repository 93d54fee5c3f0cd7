/* SPDX-License-Identifier: MIT */
/*
 * Which host memory the program has registered with a userfaultfd of its own, as far as somebody
 * told: the preload library sees the ioctls, a program that links the library says so itself.
 *
 * The answer errs on one side only. Memory that is registered is always reported; memory that was
 * registered once may be reported too (a userfaultfd that was closed, gaps between ranges when
 * there are more of them than fit). Whoever asks does without something, a huge leaf for example.
 *
 * A change is told while a notifier bracket over the range is open: a fault that asks under
 * mmu_lock then sees either the change or the bracket.
 *
 * Context of all: any thread, inside the program's allocator and inside brackets too; nothing is
 * allocated, nothing sleeps. Reading takes no lock. Not from a signal handler.
 */
#pragma once

#include "base/compiler.h"

extern _Atomic unsigned kl_uffd_nr_ranges;

KL_INLINE bool kl_uffd_any(void)
{
	return KL_UNLIKELY(atomic_load_explicit(&kl_uffd_nr_ranges, memory_order_acquire));
}

/* [@start, @end) is being registered; bytes, rounded outwards to pages. */
void kl_uffd_add(uint64_t start, uint64_t end);

bool kl_uffd_remove_slow(uint64_t start, uint64_t end);
/* No longer; rounded inwards. True if something of it was registered. */
KL_INLINE bool kl_uffd_remove(uint64_t start, uint64_t end)
{
	return kl_uffd_any() && kl_uffd_remove_slow(start, end);
}

bool kl_uffd_overlaps_slow(uint64_t start, uint64_t end);
/* May some byte of [@start, @end) be registered? */
KL_INLINE bool kl_uffd_overlaps(uint64_t start, uint64_t end)
{
	return kl_uffd_any() && kl_uffd_overlaps_slow(start, end);
}

/* The first piece of [*@start, *@end) that is not registered. False: there is none. */
bool kl_uffd_gap(uint64_t *start, uint64_t *end);

/*
 * UFFDIO_API asked for @features. With UFFD_FEATURE_EVENT_* a call that changes registered memory
 * sleeps in the kernel until somebody has read the event.
 */
void kl_uffd_add_features(uint64_t features);
/* Those of all userfaultfds that there ever were. */
uint64_t kl_uffd_features(void);

/* The child's memory is registered only where the parent asked for UFFD_FEATURE_EVENT_FORK. */
void kl_uffd_after_fork(void);
