/* SPDX-License-Identifier: MIT */
/*
 * Virtual machines, and access to their memory by threads that are no vCPUs: device threads,
 * loaders, debuggers.
 *
 * All accesses are safe against concurrent change. While one touches a page, no notifier
 * bracket over the page and no change of its slot completes (kvmlet/notifier.h,
 * kvmlet/memslot.h); one that comes later sees the new state or -EFAULT. Memory that vanished
 * without a bracket is -EFAULT too, not a crash. An access that meets a bracket or a slot
 * change in progress waits for it to end.
 *
 * Common to all calls
 *   - Any thread may make them at any time, except that a VM must not be used while or after it
 *     is destroyed. Not from a signal handler.
 *   - Signals are not held off: handlers run in the middle of a call, as they would anywhere, and
 *     the call goes on afterwards. A handler must not leave a call by longjmp or by ending the
 *     thread. Faults of its own go to the handlers of SIGSEGV and SIGBUS that were there when
 *     the first VM was created.
 *   - A thread's first access unblocks SIGSEGV, SIGBUS and SIGRTMAX-1 for the thread, which the
 *     library needs: a thread may be created with all signals blocked. It must not block them again
 *     later. The library looks again where an access meets a page that was not accessed
 *     before, or not since it was last changed; elsewhere memory that vanishes under a thread that
 *     blocks them ends the process, and a change may wait for as long as an access of its does.
 *   - In a forked child, a VM of the parent is unusable: -EIO.
 *   - `as` is the address space: 0, or 1 for that of system management mode.
 *   - `access` is KVMLET_READ, KVMLET_WRITE or both.
 */
#ifndef KVMLET_VM_H
#define KVMLET_VM_H

#include <stddef.h>
#include <sys/uio.h>

#include <kvmlet/types.h>

#ifdef __cplusplus
extern "C" {
#endif

struct kvmlet_vm;

/**
 * Create a VM without memory.
 *
 * The first VM of a process installs handlers for SIGSEGV and SIGBUS (chained to those that
 * are there) and for the signal SIGRTMAX-1. With KVMLET_TRACE=FILE in the environment, it starts a
 * log that explains memory: what was invalidated by what, and which faults followed.
 *
 * @param vm  out: the VM
 * Context: may sleep; not inside a notifier bracket.
 * Returns: 0; -ENOMEM.
 */
int kvmlet_vm_create(struct kvmlet_vm **vm);

/**
 * Destroy a VM. Waits for notifier brackets of other threads. Nobody holds a window of it.
 *
 * Context: may sleep. NULL, and a VM of the parent of a forked child, are ignored. So is, with a
 * complaint on stderr, a call from a thread that holds a window or a cache, of whatever VM: what
 * would be waited for may be waiting for the holder. The VM is then as good as before, and still to
 * be destroyed.
 */
void kvmlet_vm_destroy(struct kvmlet_vm *vm);

#define KVMLET_READ  (1u << 0)
#define KVMLET_WRITE (1u << 1)

/**
 * Translate a guest-physical address to the host address that backs it now.
 *
 * The result is a number, not a promise: the slot may change at any time. It says where the
 * page is, not that it is present. Repeated translations through one slot are very cheap.
 *
 * @param hva  out: the host address
 * @param len  out: bytes from there to the end of the slot; may be NULL
 * Context: never sleeps.
 * Returns: 0; -EFAULT no slot there; -EINVAL no such address space; -EIO.
 */
int kvmlet_vm_translate(struct kvmlet_vm *vm, unsigned as, kl_gpa_t gpa, kl_hva_t *hva,
			uint64_t *len);

/**
 * Copy from guest memory. The range may cross pages and slots.
 *
 * Not atomic: a concurrent writer may be seen in part, also within a word. For words that are
 * shared with others there are the atomics below.
 *
 * @param len   bytes; 0 succeeds
 * @param done  out: so many bytes were copied for certain (all of them, if 0 is returned); may
 *              be NULL
 * Context: may sleep; not inside a notifier bracket or a window of the calling thread.
 * Returns: 0;
 *   -EFAULT      no slot, or no memory behind it, or @buf is not there
 *   -EHWPOISON   the host's memory is broken there
 *   -EDEADLK     the calling thread holds a notifier bracket, a window or a cache (kvmlet/gpc.h)
 *   -EINVAL      no such address space
 *   -ENOMEM
 *   -EIO         the VM is unusable: an internal error, or a parent's
 */
int kvmlet_vm_read(struct kvmlet_vm *vm, unsigned as, kl_gpa_t gpa, void *buf, size_t len,
		   size_t *done);

/**
 * Copy into guest memory; as kvmlet_vm_read.
 * Returns: as kvmlet_vm_read; -EFAULT also for a slot or host memory that is read-only. What was
 * copied before the page that failed stays.
 */
int kvmlet_vm_write(struct kvmlet_vm *vm, unsigned as, kl_gpa_t gpa, const void *buf, size_t len,
		    size_t *done);

/*
 * Atomic accesses, sequentially consistent among themselves, with vCPUs' and with C atomics on
 * the same memory.
 *
 * Values have the guest's (and the host's) byte order; those of less than 8 bytes are
 * zero-extended when read and cut when written. `old` is what was there before; it may be
 * NULL where it is an out-parameter of an operation that also writes.
 *
 * For all:
 * @param gpa   a multiple of @size
 * @param size  1, 2, 4 or 8 bytes
 * Context: as kvmlet_vm_read.
 * Returns: 0;
 *   -EFAULT      no slot, no memory behind it, or (all but load) it is read-only
 *   -EINVAL      a size that is none of these, a misaligned address, no such address space
 *   -EHWPOISON, -EDEADLK, -ENOMEM, -EIO  as kvmlet_vm_read
 * After an error nothing was changed.
 */

/** Read. */
int kvmlet_vm_load(struct kvmlet_vm *vm, unsigned as, kl_gpa_t gpa, unsigned size, uint64_t *val);
/** Write. */
int kvmlet_vm_store(struct kvmlet_vm *vm, unsigned as, kl_gpa_t gpa, unsigned size, uint64_t val);
/** Write, and tell what was there. */
int kvmlet_vm_exchange(struct kvmlet_vm *vm, unsigned as, kl_gpa_t gpa, unsigned size, uint64_t val,
		       uint64_t *old);
/**
 * Write @desired if @expected is there, as far as @size goes. It was, exactly if *old equals
 * @expected; 0 is returned either way.
 */
int kvmlet_vm_compare_exchange(struct kvmlet_vm *vm, unsigned as, kl_gpa_t gpa, unsigned size,
			       uint64_t expected, uint64_t desired, uint64_t *old);
/** Add @val. */
int kvmlet_vm_fetch_add(struct kvmlet_vm *vm, unsigned as, kl_gpa_t gpa, unsigned size,
			uint64_t val, uint64_t *old);
/** Set the bits of @val. */
int kvmlet_vm_fetch_or(struct kvmlet_vm *vm, unsigned as, kl_gpa_t gpa, unsigned size, uint64_t val,
		       uint64_t *old);
/** Keep only the bits of @val. */
int kvmlet_vm_fetch_and(struct kvmlet_vm *vm, unsigned as, kl_gpa_t gpa, unsigned size,
			uint64_t val, uint64_t *old);

/** The longest window, in bytes. */
#define KVMLET_WINDOW_MAX (16ull << 20)

/**
 * Lock a range of guest memory and get it as host pointers: one entry for each run of pages
 * that are neighbours in the host, also across slots.
 *
 * Until kvmlet_window_unlock the pointers are good: every notifier bracket over these pages,
 * and every change of their slots, waits for the holder. (So do those over other pages that
 * have to flush.) With KVMLET_WRITE they may be written, and the pages count as written; else
 * they may only be read.
 *
 * The holder, between lock and unlock:
 *   - is brief, does not sleep, and takes no lock that is ever held around a notifier bracket
 *     or a slot change (allocators unmap memory: under `kvmlet run` that includes theirs);
 *   - does not change memory mappings;
 *   - holds no second window, and calls nothing of this library but kvmlet_vm_translate,
 *     kvmlet_memslot_find and kvmlet_memslot_generation; what could wait for the holder is
 *     -EDEADLK, and kvmlet_vm_destroy does nothing;
 *   - does not end its thread or leave by longjmp.
 * Memory that vanishes without a bracket while a window is held is the holder's SIGSEGV or
 * SIGBUS; when it had vanished before, lock fails. If the memory is registered with
 * userfaultfd or may be write-protected by it, an access may wait for the handler, which then
 * must not wait for brackets or slot changes.
 *
 * @param len     bytes, 1 to KVMLET_WINDOW_MAX
 * @param access  KVMLET_READ or KVMLET_WRITE or both
 * @param iov     out: entries
 * @param max     how many entries there is room for, at least 1
 * @param n       out: how many there are
 * Context: may sleep; not inside a notifier bracket or a window of the calling thread.
 * Returns: 0;
 *   -EFAULT      no slot, no memory behind it, or @access has KVMLET_WRITE and it is read-only
 *   -E2BIG       more than @max entries would be needed
 *   -EINVAL      no such address space, @len, @access or @max out of range
 *   -EDEADLK     the calling thread holds a window, a notifier bracket or a cache
 *   -EHWPOISON, -ENOMEM, -EIO  as kvmlet_vm_read
 * After an error no window is held.
 */
int kvmlet_window_lock(struct kvmlet_vm *vm, unsigned as, kl_gpa_t gpa, uint64_t len,
		       unsigned access, struct iovec *iov, unsigned max, unsigned *n);

/**
 * Let go of the window that this thread holds; its pointers are void.
 * Context: does not sleep.
 */
void kvmlet_window_unlock(struct kvmlet_vm *vm);

#ifdef __cplusplus
}
#endif

#endif
