/* SPDX-License-Identifier: MIT */
/*
 * MMU notifiers for programs that link the library.
 *
 * Every change of host memory that may lie behind a memslot (munmap, mremap, mmap over it,
 * mprotect, discarding or truncating it) is bracketed:
 *
 *     struct kvmlet_notifier_range r = {.start = p, .end = p + len, .may_block = 1};
 *     kvmlet_notifier_begin(&r);
 *     munmap(p, len);
 *     kvmlet_notifier_end(&r);
 *
 * When begin has returned, no vCPU and no engine code reaches the range through an old
 * translation until it has faulted again, and no fault succeeds before end. A thread that has
 * a bracket open does not itself access guest memory through the library (-EDEADLK). Under
 * `kvmlet run` the program's own calls are bracketed for it.
 */
#ifndef KVMLET_NOTIFIER_H
#define KVMLET_NOTIFIER_H

#include <kvmlet/types.h>

#ifdef __cplusplus
extern "C" {
#endif

/** What happens to the memory. All take translations away; the log tells them apart. */
enum kvmlet_notifier_event {
	KVMLET_EVENT_UNMAP,    /**< munmap */
	KVMLET_EVENT_REMAP,    /**< mremap */
	KVMLET_EVENT_PROTECT,  /**< mprotect, userfaultfd write protection */
	KVMLET_EVENT_DISCARD,  /**< madvise: DONTNEED, FREE, REMOVE ... */
	KVMLET_EVENT_TRUNCATE, /**< ftruncate or fallocate of a file that is mapped there */
	KVMLET_EVENT_REPLACE,  /**< another mapping over it */
};

struct kvmlet_notifier_range {
	uint64_t start, end; /**< host virtual addresses in bytes; rounded outwards to pages */
	int may_block;       /**< 0: never sleep, fail with -EAGAIN instead */
	unsigned event;      /**< enum kvmlet_notifier_event */
};

/**
 * Open a bracket. Brackets of one thread nest.
 *
 * Context: any thread, also from inside a memory allocator: nothing is allocated. Sleeps only
 * if may_block is set. Not from a signal handler.
 * Returns: 0; -EAGAIN may_block is 0 and a vCPU or an update would have to be waited for
 * (no bracket is open then); -EINVAL an empty range or an unknown event; -EDEADLK the calling
 * thread holds a window (kvmlet/vm.h) or a cache (kvmlet/gpc.h).
 */
int kvmlet_notifier_begin(struct kvmlet_notifier_range *range);

/**
 * Close the bracket that begin opened with the same range, on the same thread.
 * Context: as begin; does not sleep.
 */
void kvmlet_notifier_end(struct kvmlet_notifier_range *range);

/**
 * Has some page of host memory [start, end) been accessed through a slot since it was last
 * cleared? By a vCPU or by a call of this library, of any VM. A large page is young as a whole, and
 * what was unmapped from the guest for whatever reason counts as not accessed.
 *
 * Nothing is taken away and no access is delayed for long; what the program does through its own
 * pointers is not seen.
 *
 * @param start, end  host virtual addresses in bytes; rounded outwards to pages
 * @param young       out: 1 or 0
 * Context: any thread, no allocation. May wait for holders of windows.
 * Returns: 0; -EINVAL an empty range; -EDEADLK the calling thread holds a window.
 */
int kvmlet_notifier_test_young(uint64_t start, uint64_t end, int *young);
/** The same, and from here on they count as not accessed. @young may be NULL. */
int kvmlet_notifier_clear_young(uint64_t start, uint64_t end, int *young);

/**
 * Learn of changes of the memory behind slots from userfaultfd events, too: unmapping, remapping
 * and discarding by whoever does it without a bracket. The memory is registered with a
 * userfaultfd of the library's, whose events a helper thread turns into brackets. They come after
 * the change, or beside it: how long an old translation lives is bounded, no more. Changes of
 * protection, and memory that is registered with another userfaultfd, are not covered.
 *
 * @enable: 1: for all VMs from now on; 0: no more. Off at first.
 * Context: no lock that a bracket is opened under; not inside a bracket or a window; may sleep.
 * Returns: 0; -EDEADLK the calling thread has a bracket open or holds a window; otherwise what
 * userfaultfd(2) or pthread_create(3) fails with: -EPERM not permitted, -ENOSYS or -EINVAL the
 * kernel has no such events, -EMFILE, -EAGAIN.
 */
int kvmlet_notifier_uffd_source(int enable);

#ifdef __cplusplus
}
#endif

#endif
