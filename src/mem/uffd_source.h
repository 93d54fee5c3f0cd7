/* SPDX-License-Identifier: MIT */
/*
 * Notifier brackets from userfaultfd events, opt-in (N1): for programs that change mappings by
 * raw system calls, or in code that nobody can wrap.
 *
 * A userfaultfd of kvmlet's own is registered on the memory of all slots, in write-protect mode
 * and without protecting anything, so that no fault is ever diverted to it. A helper thread reads
 * UNMAP, REMAP, REMOVE and FORK; each of the first three becomes a bracket that opens and closes.
 * It comes after the change, or beside it: what is bounded is how long a stale pointer lives. The
 * thread that makes the change sleeps only until the event was read.
 *
 * Not seen: changes of protection; memory that cannot be registered (a mapped file that is neither
 * shared memory nor hugetlb; a kernel without write protection of shared memory); memory that the
 * program registers with a userfaultfd itself, which is left to it; memory that a raw call maps
 * where nothing was, until a slot is set or a wrapped call maps something there.
 */
#pragma once

#include "base/compiler.h"

struct kl_vm;

extern _Atomic bool kl_uffd_source_wanted;
KL_INLINE bool kl_uffd_source_on(void)
{
	return KL_UNLIKELY(atomic_load_explicit(&kl_uffd_source_wanted, memory_order_relaxed));
}

/*
 * Idempotent. Context: no lock, no bracket of this thread; may sleep.
 * Returns: 0, or why there is no such userfaultfd or no thread: -EPERM, -ENOSYS, -EINVAL (the
 * kernel lacks the events), -EMFILE, -EAGAIN ...
 */
int kl_uffd_source_start(void) KL_MUST_CHECK;
/* Afterwards nothing is registered and no bracket of the helper's is open. */
void kl_uffd_source_stop(void);

/*
 * While kl_uffd_source_on(); host addresses in bytes. What cannot be registered is left out.
 * Context: may sleep; reader sections are allowed.
 */
/* A slot is about to lie over the memory. Starts the helper where none runs (a forked child). */
void kl_uffd_source_watch(uint64_t start, uint64_t end);
/* A slot has gone; another may lie there still. */
void kl_uffd_source_unwatch(uint64_t start, uint64_t end);
/* The program wants to register the memory. */
void kl_uffd_source_yield(uint64_t start, uint64_t end);
/* Something may have been mapped anew there: look which slots it belongs to. */
void kl_uffd_source_rewatch(uint64_t start, uint64_t end);
/* The VM, which no notifier sees any more, is about to lose its slots. */
void kl_uffd_source_vm_gone(struct kl_vm *vm);

/* In a forked child: no helper; the next slot starts one. */
void kl_uffd_source_after_fork(void);
