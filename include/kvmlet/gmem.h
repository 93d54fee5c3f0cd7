/* SPDX-License-Identifier: MIT */
/*
 * Private memory: files that only guests reach (guest_memfd), slots that are bound to them, and
 * which guest pages are private.
 *
 * A slot that is bound to a file has two memories: the program's own, at its host address, and a
 * part of the file. For each guest page an attribute says which of the two it is; at first all
 * pages are shared, that is, the program's. Accesses to guest memory (kvmlet/vm.h), windows and
 * caches follow the attribute; kvmlet_vm_translate tells where the shared memory is. Neither memory
 * changes when pages are converted.
 *
 * A file belongs to one VM. Several files, of different VMs, may be linked to the same memory, for
 * example to move a guest to another VM of the process; what is punched out of it is taken from
 * all.
 *
 * Conversions, holes and closing are safe against vCPUs and all users of guest memory: when a call
 * returns, nobody reaches a page that it took away through what he had before; it waits for those
 * who use it.
 *
 * Common to all calls
 *   - Any thread may make them at any time, except that a file must not be used while or after it
 * is closed, nor a VM while or after it is destroyed.
 *   - Offsets and sizes are in bytes, multiples of 4096.
 *   - Errors that several have:
 *       -EDEADLK  the calling thread holds a notifier bracket, a window or a cache, or is in a
 * callback of a tracker -EIO      the VM or the file is unusable: an internal error, or of the
 * parent of a forked child Nothing has changed then.
 */
#ifndef KVMLET_GMEM_H
#define KVMLET_GMEM_H

#include <kvmlet/types.h>
#include <kvmlet/vm.h>

#ifdef __cplusplus
extern "C" {
#endif

struct kvmlet_gmem;

/**
 * Create a VM that may have private memory. It has one address space, and its slots may be bound to
 * files. Otherwise as kvmlet_vm_create.
 *
 * @param vm  out: the VM
 * Context: may sleep; not inside a notifier bracket.
 * Returns: 0; -ENOMEM.
 */
int kvmlet_vm_create_private(struct kvmlet_vm **vm);

/**
 * Create a file. It has no memory until pages of it are allocated, or accessed by a guest.
 *
 * @param vm    whose file it is
 * @param size  of the file, which does not change; not 0
 * @param file  out: the file
 * Context: may sleep.
 * Returns: 0;
 *   -EINVAL  a size that is 0, too large, or not a multiple of 4096
 *   -ENOMEM  no memory, or (also for a size of 64 TiB or more) not that much address space
 *   -EMFILE  too many descriptors: a file takes one
 *   -EDEADLK, -EIO
 */
int kvmlet_gmem_create(struct kvmlet_vm *vm, uint64_t size, struct kvmlet_gmem **file);

/**
 * Another file, of @vm, with the memory of @file.
 *
 * @param file    is not changed, and may be closed before the new one
 * @param linked  out: the file
 * Context: may sleep.
 * Returns: 0; -ENOMEM; -EDEADLK; -EIO.
 */
int kvmlet_gmem_link(struct kvmlet_gmem *file, struct kvmlet_vm *vm, struct kvmlet_gmem **linked);

/**
 * Close a file. Slots that are bound to it stay, and accesses to private pages of theirs fail with
 * -EFAULT from now on. Its memory goes when the last file that it is linked to is closed.
 *
 * A VM may be destroyed before its files: they can then be punched, linked to other VMs, and
 * closed.
 *
 * Context: may sleep. NULL, and a file of the parent of a forked child, are ignored. So is, with a
 * complaint on stderr, a call that would be -EDEADLK.
 */
void kvmlet_gmem_close(struct kvmlet_gmem *file);

/**
 * Give pages of a file memory, where they have none yet. It is zeroed.
 *
 * Context: may sleep.
 * Returns: 0;
 *   -EINVAL  misaligned, an empty range, or one that goes beyond the end of the file
 *   -ENOSPC, -ENOMEM  there is not enough memory
 *   -EINTR   a signal came; some pages may have been allocated
 *   -EDEADLK, -EIO
 */
int kvmlet_gmem_allocate(struct kvmlet_gmem *file, uint64_t offset, uint64_t size);

/**
 * Take the memory of pages of a file away. Who accesses them later finds zeroes.
 *
 * Context: may sleep.
 * Returns: 0, also for what is beyond the end of the file;
 *   -EINVAL  misaligned, or an empty range
 *   -EDEADLK, -EIO
 */
int kvmlet_gmem_punch(struct kvmlet_gmem *file, uint64_t offset, uint64_t size);

/**
 * How much memory a file has.
 * @param bytes  out
 * Context: does not sleep.
 * Returns: 0; -EIO.
 */
int kvmlet_gmem_allocated(const struct kvmlet_gmem *file, uint64_t *bytes);

/**
 * Create a memslot, as kvmlet_memslot_set does, that is bound to a part of a file. It cannot be
 * moved or changed, only deleted: kvmlet_memslot_set with size 0.
 *
 * @param slot    slot number, 0 to 32763
 * @param gpa     guest-physical address
 * @param size    of the slot, and of the part of the file
 * @param hva     shared memory behind it
 * @param file    of the same VM
 * @param offset  of the part
 * Context: may sleep.
 * Returns: 0;
 *   -EINVAL  misaligned or out of range; a VM without private memory; a file of another VM; not all
 *            of the part is in the file, or some of it is bound to another slot through this file;
 *            there is a slot with this number
 *   -EEXIST  overlaps another slot
 *   -ENOMEM
 *   -EDEADLK, -EIO
 */
int kvmlet_memslot_set_gmem(struct kvmlet_vm *vm, uint32_t slot, kl_gpa_t gpa, uint64_t size,
			    kl_hva_t hva, struct kvmlet_gmem *file, uint64_t offset);

/**
 * Convert guest pages. It does not matter whether there are slots, now or later.
 *
 * @param gpa, size  not empty; does not wrap
 * @param private_   1: to private; 0: to shared
 * Context: may sleep.
 * Returns: 0;
 *   -EINVAL  misaligned, an empty range, or a VM without private memory
 *   -ENOMEM  nothing has changed
 *   -EDEADLK, -EIO
 */
int kvmlet_vm_set_private(struct kvmlet_vm *vm, kl_gpa_t gpa, uint64_t size, int private_);

/**
 * Is the page at @gpa private? What is answered may have changed when the call returns.
 * @param private_  out: 1 or 0
 * Context: does not sleep.
 * Returns: 0; -EIO.
 */
int kvmlet_vm_is_private(struct kvmlet_vm *vm, kl_gpa_t gpa, int *private_);

#ifdef __cplusplus
}
#endif

#endif
