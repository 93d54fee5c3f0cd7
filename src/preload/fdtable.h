/* SPDX-License-Identifier: MIT */
/*
 * Which descriptors are kvmlet's.
 *
 * A slot is one word: the object and the number of calls that are using the object through
 * this descriptor. Looking up and letting go is one compare-and-swap each; close() in another
 * thread hands the count over to the object, which lives until the last call has returned.
 *
 *   (a) kl_fd_get() never returns an object that can go away before kl_fd_put().
 *   (b) no lock, no allocation in kl_fd_get(), kl_fd_put(), kl_fd_known(): any context.
 *   (c) a descriptor that is being closed is marked: nobody identifies it again in between.
 *
 * A child of vfork() shares the table but not the descriptors: kl_fd_shared_child() says so,
 * and whoever changes descriptors then leaves the table alone.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "base/compiler.h"
#include "uapi/uapi.h"

#define KL_FD_PAGE_SHIFT 12
#define KL_FD_PAGE       (1u << KL_FD_PAGE_SHIFT)
#define KL_FD_PAGES      4096u
#define KL_FD_MAX        (KL_FD_PAGE * KL_FD_PAGES)
#define KL_FD_PTR_MASK   ((1ull << 48) - 1)
#define KL_FD_CLOSING    1ull

extern _Atomic(_Atomic uint64_t *) kl_fd_pages[KL_FD_PAGES];

KL_INLINE _Atomic uint64_t *kl_fd_slot(int fd)
{
	_Atomic uint64_t *page;

	if ((unsigned)fd >= KL_FD_MAX)
		return NULL;
	page = atomic_load_explicit(&kl_fd_pages[(unsigned)fd >> KL_FD_PAGE_SHIFT],
				    memory_order_acquire);
	return page ? &page[(unsigned)fd & (KL_FD_PAGE - 1)] : NULL;
}

/* Cheap, for the forwarding path of every wrapper. */
KL_INLINE bool kl_fd_known(int fd)
{
	_Atomic uint64_t *s = kl_fd_slot(fd);

	return KL_UNLIKELY(s != NULL) &&
	       (atomic_load_explicit(s, memory_order_relaxed) & KL_FD_PTR_MASK) > KL_FD_CLOSING;
}

/* The object of @fd until kl_fd_put(), or NULL. */
struct kl_object *kl_fd_get(int fd);
void kl_fd_put(int fd, struct kl_object *obj);

/* @fd stands for @obj from now on; takes over the caller's reference. 0 or -EMFILE/-ENOMEM (the
 * reference is then still the caller's). */
int kl_fd_bind(int fd, struct kl_object *obj);
/* The same, but only where nothing is bound and nobody is closing: true if bound. */
bool kl_fd_bind_if_free(int fd, struct kl_object *obj);
/* @fd stands for nothing any more. Returns the object with the table's reference, or NULL. */
struct kl_object *kl_fd_unbind(int fd);

/* Around the real close. begin: as kl_fd_unbind(), but marks the slot until end. */
struct kl_object *kl_fd_close_begin(int fd);
void kl_fd_close_end(int fd);

/* The next bound descriptor >= @from and <= @last, or -1. */
int kl_fd_next(unsigned from, unsigned last);

/* After a real dup: @new is now what @old is. @new, or -1 with errno. */
int kl_fd_duplicated(int old, int new);

/* True in a child that shares our memory but has its own descriptors. */
bool kl_fd_shared_child(void);
void kl_fd_after_fork(void);

/*
 * A descriptor that the table does not know, but that may be one of ours all the same: copied
 * by means that are not wrapped, inherited through exec, received. Binds it if so; the object
 * until kl_fd_put(), or NULL. @err: what to answer if it is kvmlet's but not usable here.
 */
struct kl_object *kl_fd_identify(int fd, int *err);
