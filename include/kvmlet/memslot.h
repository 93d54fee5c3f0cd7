/* SPDX-License-Identifier: MIT */
/*
 * Memslots: which host memory a VM sees at which guest-physical address.
 *
 * Every call may be made by any thread at any time, except that a VM must not be used while or
 * after it is destroyed. No call may be made from a signal handler.
 */
#ifndef KVMLET_MEMSLOT_H
#define KVMLET_MEMSLOT_H

#include <kvmlet/types.h>
#include <kvmlet/vm.h>

#ifdef __cplusplus
extern "C" {
#endif

/** What is written to the slot is logged (kvmlet/dirty.h; KVM_MEM_LOG_DIRTY_PAGES). */
#define KVMLET_MEM_LOG_DIRTY (1u << 0)
/** A slot may be read only: guest writes do not reach host memory (KVM_MEM_READONLY). */
#define KVMLET_MEM_READONLY (1u << 1)

/**
 * Create, delete, move or change a memslot, as KVM_SET_USER_MEMORY_REGION does
 * [KVM API documentation, 4.35].
 *
 * @param slot   bits 0 to 15: slot number, 0 to 32763; bits 16 to 31: address space, 0 or 1
 * @param flags  0, KVMLET_MEM_READONLY, KVMLET_MEM_LOG_DIRTY, or both
 * @param gpa    guest-physical address in bytes, a multiple of 4096
 * @param size   bytes, a multiple of 4096; 0 deletes the slot
 * @param hva    host memory behind it, a multiple of 4096
 *
 * When the call returns, no engine user of this VM reaches memory through a translation of
 * the slot as it was before; it waits for those that do.
 *
 * Context: may sleep; not inside a notifier bracket or a window of the calling thread.
 * Returns: 0;
 *   -EINVAL  misaligned, out of range, unknown flag, or a change that KVM refuses: other
 *            size, other hva, or other KVMLET_MEM_READONLY of a live slot; deletion of a
 *            slot that is not there
 *   -EEXIST  overlaps another slot
 *   -ENOMEM
 *   -EDEADLK the calling thread holds a notifier bracket, a window or a cache
 *   -EIO     the VM is unusable: an internal error, or a VM of the parent process
 * After an error the slots are as they were.
 */
int kvmlet_memslot_set(struct kvmlet_vm *vm, uint32_t slot, uint32_t flags, kl_gpa_t gpa,
		       uint64_t size, kl_hva_t hva);

/**
 * The generation of the slots of address space 0: even while the set is stable, odd while a
 * change is being installed.
 * Context: any.
 */
uint64_t kvmlet_memslot_generation(struct kvmlet_vm *vm);

/**
 * kvmlet_vm_translate in address space 0, without the length.
 *
 * Context: never sleeps.
 * Returns: 0; -EFAULT no slot there; -EIO.
 */
int kvmlet_memslot_find(struct kvmlet_vm *vm, kl_gpa_t gpa, kl_hva_t *hva);

#ifdef __cplusplus
}
#endif

#endif
