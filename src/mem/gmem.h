/* SPDX-License-Identifier: MIT */
/*
 * guest_memfd (F1-F4): memory that slots are bound to by file and offset, and that nobody has
 * mapped but the engine.
 *
 * An inode is the memory: a memfd, and one mapping of all of it that the engine makes when the
 * inode is made. The pfn of (inode, index) is the address in that mapping, for every VM. Files are
 * what programs hold: each belongs to one VM, several may share an inode (F3). A binding is a
 * slot's hold on a range of one file; it lives as long as the slot, and says when the file has been
 * closed (F2).
 *
 * The mapping makes gmem ordinary host memory to the rest of the engine. A slot has its range of
 * the mapping in the index of its VM's slots by host address (mem/memslot.h), beside that of the
 * program's memory. So a hole is punched in a notifier bracket over its addresses, which finds the
 * slots and the caches of all VMs that are bound to them, through whatever file, each clipped to
 * its binding; which slots those are does not change from begin to end (F4); and there is no second
 * protocol to prove.
 *
 * Lifetimes: files, bindings, and faults on their way to touching a page hold references to the
 * inode. The last file to be closed gives the memory back; the addresses stay reserved, and cannot
 * become somebody else's, until the last reference goes.
 *
 * Locks: bindings of a file are changed under the slots_lock of its VM. A mutex of the
 * process (rank GMEM), outside it, holds a file's closing against the death of its VM.
 */
#pragma once

#include <kvmlet/types.h>

#include "base/compiler.h"

struct kl_vm;

struct kl_gmem_inode {
	_Atomic unsigned refs, nr_files;
	int fd;         /* the engine's own open file */
	uint64_t size;  /* bytes */
	uint64_t flags; /* KL_GMEM_* */
	uint64_t hva;   /* of the mapping; 0: there is none, and nothing can be bound */
};

struct kl_gmem_binding {
	struct kl_gmem_inode *inode;
	struct kl_gmem *file; /* slots_lock; NULL when closed */
	_Atomic bool closed;
	uint64_t hva, npages;
	kl_gfn_t base_gfn;
	struct kl_gmem_binding *next, **pprev; /* slots_lock: of the file */
};

struct kl_gmem {
	struct kl_gmem_inode *inode;
	_Atomic(struct kl_vm *) vm;       /* rank GMEM; NULL: it has died */
	struct kl_gmem_binding *bindings; /* slots_lock */
	struct kl_gmem *next, **pprev;    /* rank GMEM: of the VM */
};

/* GUEST_MEMFD_FLAG_* */
#define KL_GMEM_MMAP        (1ull << 0)
#define KL_GMEM_INIT_SHARED (1ull << 1)

/*
 * A file of @size bytes, not 0 and a multiple of 4096, on a new inode; @memfd: what backs it,
 * of this size and sealed, which the caller keeps. 0; -ENOMEM, or what opening it fails with.
 */
int kl_gmem_create(struct kl_vm *vm, int memfd, uint64_t size, uint64_t flags,
		   struct kl_gmem **out) KL_MUST_CHECK;
/* Another file on the inode of @file, for @vm. 0 or -ENOMEM. */
int kl_gmem_link(struct kl_gmem *file, struct kl_vm *vm, struct kl_gmem **out) KL_MUST_CHECK;
/*
 * The last user of @file lets go: what is mapped through it is unmapped, its slots stay, and faults
 * on private memory of theirs fail from now on.
 * Context: may sleep; no lock above GMEM; no bracket of this thread.
 */
void kl_gmem_close(struct kl_gmem *file);

/*
 * fallocate with KEEP_SIZE: of [@off, @off + @len), multiples of 4096. Allocation fails with
 * -EINVAL beyond the end, -ENOSPC, -EINTR; punching does not, and has no effect there. Context: may
 * sleep; no bracket of this thread.
 */
int kl_gmem_allocate(struct kl_gmem *file, uint64_t off, uint64_t len) KL_MUST_CHECK;
int kl_gmem_punch(struct kl_gmem *file, uint64_t off, uint64_t len) KL_MUST_CHECK;
/* Bytes of host memory behind it. */
uint64_t kl_gmem_allocated(const struct kl_gmem *file);

/*
 * Bind @npages from @off bytes on, for a slot of @vm at @base_gfn.
 * Context: slots_lock.
 * Returns: 0; -EINVAL: another VM's file, or not all in the file, or some of it is bound through
 * this file; -ENOMEM.
 */
int kl_gmem_bind(struct kl_vm *vm, struct kl_gmem *file, uint64_t off, kl_gfn_t base_gfn,
		 uint64_t npages, struct kl_gmem_binding **out) KL_MUST_CHECK;
/* No slot has it any more, and readers have left. Context: slots_lock, or nobody else uses the VM.
 */
void kl_gmem_unbind(struct kl_gmem_binding *b);

/* The VM dies: its files belong to nobody. */
void kl_gmem_vm_gone(struct kl_vm *vm);
void kl_gmem_after_fork(void);

KL_INLINE void kl_gmem_inode_get(struct kl_gmem_inode *i)
{
	atomic_fetch_add_explicit(&i->refs, 1, memory_order_relaxed);
}
void kl_gmem_inode_put(struct kl_gmem_inode *i);

/* Where the page of @gfn, which @b has, is. */
KL_INLINE uint64_t kl_gmem_hva(const struct kl_gmem_binding *b, kl_gfn_t gfn)
{
	return b->hva + ((gfn - b->base_gfn) << KL_PAGE_SHIFT);
}
