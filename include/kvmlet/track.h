/* SPDX-License-Identifier: MIT */
/*
 * Write tracking: to be told of every write to chosen pages of guest memory, by the guest or by
 * this library.
 *
 *     static void wrote(void *self, unsigned as, kl_gpa_t gpa, const void *bytes, size_t len) ...
 *     static void gone(void *self, unsigned as, kl_gfn_t gfn, uint64_t npages) ...
 *     static const struct kvmlet_track_ops ops = {wrote, gone};
 *
 *     kvmlet_track_register(vm, &ops, self, &tracker);
 *     kvmlet_track_add_page(vm, 0, gfn);
 *     ... wrote() is called for each write to the page
 *     kvmlet_track_remove_page(vm, 0, gfn);
 *     kvmlet_track_unregister(tracker);
 *
 * For what must follow guest memory that it has read: translated code, shadow page tables, a
 * display. Trackers are independent of one another. How many of them want a page is counted, and a
 * page is tracked while the count is not 0; all trackers are told of writes to it, so each looks
 * for itself whether the page is one of its own, in a table of its own and under a lock of its own.
 *
 * What is reported: what the guest writes (also the accessed and dirty bits in its page tables),
 * kvmlet_vm_write and the atomics (kvmlet/vm.h), what is written under a gfn-to-pfn cache, when it
 * is unlocked as written (kvmlet/gpc.h: all of the area that was locked), and what may have been
 * written in a window for writing, when that is unlocked (all of it). What the program writes
 * through pointers of its own is not seen, nor what comes through a cache at a fixed host address,
 * or through another slot over the same host memory.
 *
 * The callbacks
 *   - track_write comes after the write is visible, and before the writer goes on: on the vCPU's
 *     thread before the next instruction, else before the call of the library returns. Several
 *     threads may be in it at the same time. Reports of two writers may come in another order than
 *     their writes; what is in memory is true.
 *   - track_remove_region comes when pages have gone from guest memory (a slot was deleted): once,
 *     after the change is complete, and after all reports of writes to those pages. They are
 *     not tracked any more.
 *   - Both may sleep, take locks, read and write guest memory, and add and remove pages, with two
 *     limits. What would wait for them is refused (-EDEADLK): to change slots, and to register or
 *     unregister a tracker. And an unlock may come while the thread still holds other caches:
 *     then what is refused to their holder is refused to the callback.
 *   - A lock that a callback takes is not held around a change of slots, kvmlet_track_unregister,
 *     or the wait for a thread that does one of these. It may be held around
 *     kvmlet_track_add_page and kvmlet_track_remove_page: no callback comes from there.
 *   - They do not leave by longjmp and do not end their thread.
 *
 * Common to all calls: any thread, not from a signal handler. kvmlet/vm.h has what there is to know
 * about signals. In a forked child, a VM of the parent is unusable: -EIO.
 */
#ifndef KVMLET_TRACK_H
#define KVMLET_TRACK_H

#include <stddef.h>

#include <kvmlet/types.h>

#ifdef __cplusplus
extern "C" {
#endif

struct kvmlet_vm;
struct kvmlet_tracker;

struct kvmlet_track_ops {
	/**
	 * @len bytes at @gpa in address space @as were written. They lie in one page, which is
	 * tracked (or was a moment ago). @bytes: what was written; of a locked instruction, a cache
	 * and a window, what was there afterwards. Required.
	 */
	void (*track_write)(void *opaque, unsigned as, kl_gpa_t gpa, const void *bytes, size_t len);
	/** The @npages pages from @gfn on are no guest memory any more. May be NULL. */
	void (*track_remove_region)(void *opaque, unsigned as, kl_gfn_t gfn, uint64_t npages);
};

/**
 * Begin to be told. While there is a tracker, slots cannot be moved: kvmlet_memslot_set is
 * -EINVAL.
 *
 * @param ops      is copied
 * @param opaque   handed to the callbacks
 * @param tracker  out: for kvmlet_track_unregister
 * Context: may sleep; waits for changes of slots.
 * Returns: 0; -EINVAL no track_write; -ENOMEM; -EDEADLK in a callback, or the calling thread holds
 * a cache, a window or a notifier bracket; -EIO the VM is unusable.
 */
int kvmlet_track_register(struct kvmlet_vm *vm, const struct kvmlet_track_ops *ops, void *opaque,
			  struct kvmlet_tracker **tracker);

/**
 * Be told no more: when this returns none of the tracker's callbacks runs, and none will. It waits
 * for those that run. The pages that it has added stay tracked; it removes them before.
 * Every tracker of a VM is unregistered before the VM is destroyed.
 *
 * Context: may sleep.
 * Returns: 0; -EDEADLK as kvmlet_track_register, above all in a callback: the tracker stays;
 * -EIO the VM is the parent's.
 */
int kvmlet_track_unregister(struct kvmlet_tracker *tracker);

/**
 * One tracker more wants to know of writes to the page. When this returns, every write that begins
 * is reported, and what was written before is visible: so one reads the page afterwards.
 *
 * Context: may sleep; waits for those who hold the page as a window or in a cache.
 * Returns: 0; -ENOENT no slot has the page, or its slot is being deleted; -EOVERFLOW 65535 want it;
 * -EINVAL no such address space; -EDEADLK the calling thread holds a cache, a window or a notifier
 * bracket; -ENOMEM; -EIO.
 */
int kvmlet_track_add_page(struct kvmlet_vm *vm, unsigned as, kl_gfn_t gfn);

/**
 * One tracker less. What was written before is still reported.
 *
 * Context, Returns: as kvmlet_track_add_page; -ENOENT also if nobody wants it: after its slot was
 * deleted there is nothing to remove.
 */
int kvmlet_track_remove_page(struct kvmlet_vm *vm, unsigned as, kl_gfn_t gfn);

#ifdef __cplusplus
}
#endif

#endif
