/* SPDX-License-Identifier: MIT */
/*
 * KVM's ioctl interface on kvmlet objects: what the preload library (and tests) call.
 *
 * An object (system device, VM, vCPU, statistics file) is reference-counted. A descriptor is
 * a memfd; the preload library maps descriptors to objects and holds one reference for each
 * descriptor that it knows.
 *
 * Every function: Context: kl_engine_enter() done, no engine lock. Values are the kernel's:
 * >= 0 or -errno.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/compiler.h"

enum kl_object_kind { KL_OBJ_SYSTEM, KL_OBJ_VM, KL_OBJ_VCPU, KL_OBJ_STATS, KL_OBJ_GMEM };

struct kl_object {
	enum kl_object_kind kind;
	_Atomic unsigned refs;
	uint64_t ino; /* of the memfd that stands for it, and its device: identity of a fd */
	uint64_t dev;
	pid_t owner;                 /* process that made it; elsewhere: -EIO (all but system) */
	struct kl_object *hash_next; /* object.c */
};

/* Open /dev/kvm: a new descriptor (O_CLOEXEC in @flags honoured) and its object with one
 * reference, or -errno. */
int kl_uapi_open_system(int flags, struct kl_object **obj);

/*
 * ioctl(2). *new_obj: set, with one reference, when the call returned a new descriptor; else
 * NULL. The caller holds a reference to @obj until it returns. What the kernel answers for
 * every descriptor before it asks the driver (FIOCLEX, FIONCLEX, FIONBIO, FIOASYNC) is for
 * the caller to pass on to the real descriptor.
 */
long kl_uapi_ioctl(struct kl_object *obj, unsigned long cmd, unsigned long arg,
		   struct kl_object **new_obj);

void kl_object_get(struct kl_object *obj);
/* The last one destroys the object. */
void kl_object_put(struct kl_object *obj);
/* The object with this identity, with a new reference, or NULL (SCM_RIGHTS, inherited). */
struct kl_object *kl_object_find(uint64_t dev, uint64_t ino);

/*
 * mmap(2) of a descriptor: may this be mapped, and what must be mapped over it?
 * 0: map @fd itself as asked; > 0: that many bytes at o->at within the request must be
 * mapped from descriptor o->fd, offset o->off, instead; -errno.
 */
struct kl_overlay {
	int fd;
	size_t at;
	off_t off;
};
long kl_uapi_mmap(struct kl_object *obj, size_t len, int prot, int flags, off_t off,
		  struct kl_overlay *o);

/*
 * read(2)/pread(2): -EINVAL for everything but statistics. @pos NULL: the file position.
 * (A statistics file is not open for writing: write(2) is EBADF there, EINVAL elsewhere.)
 */
ssize_t kl_uapi_read(struct kl_object *obj, void *buf, size_t len, off_t *pos);
/* Is what a mapping of this descriptor shows guest memory? */
bool kl_uapi_maps_memory(const struct kl_object *obj);
/* fallocate(2) */
long kl_uapi_fallocate(struct kl_object *obj, int mode, off_t off, off_t len);
/* lseek(2): moves nothing and returns the position, as KVM's files do. */
off_t kl_uapi_lseek(struct kl_object *obj, off_t off, int whence);

/*
 * irqfds, for whoever sees the program's writes: @fd may be one, or have been one. Then the
 * interrupt of what has just been written is there when kl_irqfd_written() returns, as with KVM;
 * else a helper thread sees to it a moment later.
 */
#define KL_IRQFD_HINTS 4096u
extern _Atomic uint64_t kl_irqfd_hints[KL_IRQFD_HINTS / 64];
KL_INLINE bool kl_irqfd_may_be(int fd)
{
	return (unsigned)fd < KL_IRQFD_HINTS &&
	       (atomic_load_explicit(&kl_irqfd_hints[fd / 64], memory_order_relaxed) >> (fd % 64) &
		1);
}
void kl_irqfd_written(void);

/* Exit table of `kvmlet run --stats`, of everything that this process did. */
void kl_uapi_print_stats(int fd);

/* The picture of --heatmap, for the last time, and its summary. */
void kl_uapi_finish_heatmap(int fd);

/*
 * fork(): in the child, before anything else of the engine. Calls the lower layers' own
 * kl_*_after_fork(). Objects that the child inherited stay in the table; of those only
 * /dev/kvm works.
 */
void kl_uapi_after_fork(void);
