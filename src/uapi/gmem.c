/* SPDX-License-Identifier: MIT */
/*
 * guest_memfd and memory attributes: the ioctls, and what a program does to a file's descriptor.
 *
 * The descriptor is the memfd itself (U4), so that its size and its identity are the kernel's;
 * reading, writing and mapping it are refused where the calls come in. It holds a reference to its
 * VM (F2).
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/config.h"
#include "base/failpoint.h"
#include "host/guard.h"
#include "host/sys.h"
#include "mem/gmem.h"
#include "mem/private.h"
#include "uapi/object.h"

_Static_assert(KL_GMEM_MMAP == GUEST_MEMFD_FLAG_MMAP &&
		       KL_GMEM_INIT_SHARED == GUEST_MEMFD_FLAG_INIT_SHARED,
	       "the same flags in two layers");

int kl_gmem_flags(const struct kl_uvm *vm)
{
	if (!kl_config.abi_6_18)
		return 0;
	return vm && vm->kvm.mem.private_mem ? KL_GMEM_MMAP : KL_GMEM_MMAP | KL_GMEM_INIT_SHARED;
}

long kl_vm_create_gmem(struct kl_uvm *vm, unsigned long arg, struct kl_object **new_obj)
{
	struct kvm_create_guest_memfd a;
	struct kl_ugmem *g;
	int fd, r;

	if (kl_copy_from_user(&a, (void *)arg, sizeof(a)))
		return -EFAULT;
	if (a.flags & ~(uint64_t)kl_gmem_flags(vm))
		return -EINVAL;
	if (!a.size || (a.size & ~KL_PAGE_MASK) || a.size > INT64_MAX)
		return -EINVAL;
	g = kl_failpoint("gmem-alloc") ? NULL : calloc(1, sizeof(*g));
	if (!g)
		return -ENOMEM;
	g->vm = vm;
	g->flags = a.flags;
	/* As KVM: not close-on-exec. */
	fd = kl_object_open(&g->obj, KL_OBJ_GMEM, "kvm-gmem", a.size, O_RDWR);
	if (fd < 0) {
		free(g);
		return fd;
	}
	r = kl_gmem_create(&vm->kvm.mem, fd, a.size, a.flags, &g->file);
	if (r) {
		kl_sys(SYS_close, fd);
		free(g);
		return r;
	}
	kl_object_get(&vm->obj);
	kl_object_publish(&g->obj);
	*new_obj = &g->obj;
	return fd;
}

void kl_ugmem_destroy(struct kl_ugmem *g)
{
	struct kl_uvm *vm = g->vm;

	kl_gmem_close(g->file);
	free(g);
	kl_object_put(&vm->obj);
}

/* What the descriptor in a slot's structure stands for, with a reference; or NULL, and *error. */
static struct kl_ugmem *find(unsigned fd, int *error)
{
	struct kl_object *obj;
	struct stat st;
	long fl = kl_sys(SYS_fcntl, fd, F_GETFL);

	*error = -EBADF;
	if (fl < 0 || (fl & O_PATH) || kl_sys(SYS_fstat, fd, &st))
		return NULL;
	*error = -EINVAL;
	obj = kl_object_find(st.st_dev, st.st_ino);
	if (obj && obj->kind == KL_OBJ_GMEM && obj->owner == kl_uapi_pid)
		return kl_ugmem(obj);
	if (obj)
		kl_object_put(obj);
	return NULL;
}

int kl_vm_set_gmem_region(struct kl_uvm *vm, const struct kl_uapi_memory_region2 *region)
{
	struct kl_ugmem *g;
	int r, error;

	if (!(region->flags & KVM_MEM_GUEST_MEMFD))
		return kl_set_memory_region(&vm->kvm.mem, region);
	g = find(region->guest_memfd, &error);
	r = kl_set_memory_region_gmem(&vm->kvm.mem, region, g ? g->file : NULL, error);
	if (g)
		kl_object_put(&g->obj);
	return r;
}

long kl_vm_set_memory_attributes(struct kl_uvm *vm, unsigned long arg)
{
	struct kl_vm *mem = &vm->kvm.mem;
	struct kvm_memory_attributes a;

	if (kl_copy_from_user(&a, (void *)arg, sizeof(a)))
		return -EFAULT;
	if (a.flags || (a.attributes & ~(mem->private_mem ? KVM_MEMORY_ATTRIBUTE_PRIVATE : 0)))
		return -EINVAL;
	if (!a.size || a.address + a.size < a.address)
		return -EINVAL;
	if ((a.address | a.size) & ~KL_PAGE_MASK)
		return -EINVAL;
	if (!mem->private_mem)
		return 0; /* shared is what all of it is */
	return kl_set_private(mem, a.address >> KL_PAGE_SHIFT,
			      (a.address + a.size) >> KL_PAGE_SHIFT, a.attributes);
}

/*
 * Pages of a file that may be mapped are there if they were shared from the beginning; else to
 * touch one is SIGBUS, as beyond the end of a file that has none.
 */
long kl_ugmem_mmap(struct kl_ugmem *g, size_t len, int flags, struct kl_overlay *o)
{
	static _Atomic int empty = -1;
	int fd = atomic_load(&empty), none = -1;

	if (!(g->flags & KL_GMEM_MMAP))
		return -ENODEV;
	if ((flags & MAP_TYPE) == MAP_PRIVATE)
		return -EINVAL;
	if (g->flags & KL_GMEM_INIT_SHARED)
		return 0;
	if (fd < 0) {
		fd = kl_sys_memfd("kvmlet-empty", 0, F_SEAL_GROW | F_SEAL_SEAL);
		if (fd < 0)
			return fd;
		if (!atomic_compare_exchange_strong(&empty, &none, fd)) {
			kl_sys_close(fd);
			fd = none;
		}
	}
	*o = (struct kl_overlay){.fd = fd};
	return (long)((len + KL_PAGE_SIZE - 1) & KL_PAGE_MASK);
}

bool kl_uapi_maps_memory(const struct kl_object *obj)
{
	const struct kl_ugmem *g = (const struct kl_ugmem *)obj;

	return obj->kind == KL_OBJ_GMEM && (g->flags & KL_GMEM_INIT_SHARED);
}

/* The order in which the kernel, and then KVM, looks at what is wrong. */
static int fallocate_error(const struct kl_ugmem *g, int mode, off_t off, off_t len)
{
	const int known = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE;

	if (off < 0 || len <= 0)
		return -EINVAL;
	if (!(mode & FALLOC_FL_KEEP_SIZE) || (mode & ~known))
		return -EOPNOTSUPP;
	if (off + (uint64_t)len > INT64_MAX)
		return -EFBIG;
	if ((off | len) & ~KL_PAGE_MASK)
		return -EINVAL;
	return g->obj.owner == kl_uapi_pid ? 0 : -EIO;
}

long kl_uapi_fallocate(struct kl_object *obj, int mode, off_t off, off_t len)
{
	struct kl_ugmem *g = kl_ugmem(obj);
	int r;

	if (obj->kind != KL_OBJ_GMEM)
		return off < 0 || len <= 0 ? -EINVAL : obj->kind == KL_OBJ_STATS ? -EBADF : -ENODEV;
	r = fallocate_error(g, mode, off, len);
	if (r)
		return r;
	return mode & FALLOC_FL_PUNCH_HOLE
		       ? kl_gmem_punch(g->file, (uint64_t)off, (uint64_t)len)
		       : kl_gmem_allocate(g->file, (uint64_t)off, (uint64_t)len);
}
