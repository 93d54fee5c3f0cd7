/* SPDX-License-Identifier: MIT */
/*
 * Virtual machines and their memslots.
 *
 * Thread safety: every call may be made by any thread at any time, except that a VM must not
 * be used while or after it is destroyed. No call may be made from a signal handler.
 */
#ifndef KVMLET_MEMSLOT_H
#define KVMLET_MEMSLOT_H

#include <kvmlet/types.h>

#ifdef __cplusplus
extern "C" {
#endif

struct kvmlet_vm;

/**
 * Create a VM without memory.
 *
 * The first VM of a process installs handlers for SIGSEGV and SIGBUS (chained to those that
 * are there) and for the signal SIGRTMAX.
 *
 * @param vm  out: the VM
 * Context: may sleep; not inside a notifier bracket.
 * Returns: 0; -ENOMEM.
 */
int kvmlet_vm_create(struct kvmlet_vm **vm);

/**
 * Destroy a VM. Waits for notifier brackets of other threads.
 * Context: may sleep. NULL is ignored.
 */
void kvmlet_vm_destroy(struct kvmlet_vm *vm);

/** A slot may be read only: guest writes do not reach host memory (KVM_MEM_READONLY). */
#define KVMLET_MEM_READONLY (1u << 1)

/**
 * Create, delete, move or change a memslot, as KVM_SET_USER_MEMORY_REGION does
 * [KVM API documentation, 4.35].
 *
 * @param slot   slot number, 0 to 32763
 * @param flags  0 or KVMLET_MEM_READONLY
 * @param gpa    guest-physical address in bytes, a multiple of 4096
 * @param size   bytes, a multiple of 4096; 0 deletes the slot
 * @param hva    host memory behind it, a multiple of 4096
 *
 * When the call returns, no engine user of this VM reaches memory through a translation of
 * the slot as it was before.
 *
 * Context: may sleep; not inside a notifier bracket of the calling thread.
 * Returns: 0;
 *   -EINVAL  misaligned, out of range, unknown flag, or a change that KVM refuses: other
 *            size, other hva, or other KVMLET_MEM_READONLY of a live slot; deletion of a
 *            slot that is not there
 *   -EEXIST  overlaps another slot
 *   -ENOMEM
 *   -EDEADLK the calling thread holds a notifier bracket
 * After an error the slots are as they were.
 */
int kvmlet_memslot_set(struct kvmlet_vm *vm, uint32_t slot, uint32_t flags, kl_gpa_t gpa,
		       uint64_t size, kl_hva_t hva);

/**
 * The slots' generation: even while the set is stable, odd while a change is being installed.
 * Context: any.
 */
uint64_t kvmlet_memslot_generation(struct kvmlet_vm *vm);

/**
 * Translate a guest-physical address to the host address that backs it now.
 *
 * The result is a number, not a promise: the slot may change at any time. It says where the
 * page is, not that it is present.
 *
 * Context: never sleeps.
 * Returns: 0; -EFAULT no slot there.
 */
int kvmlet_memslot_find(struct kvmlet_vm *vm, kl_gpa_t gpa, kl_hva_t *hva);

#ifdef __cplusplus
}
#endif

#endif
