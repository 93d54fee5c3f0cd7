/* SPDX-License-Identifier: MIT */
/*
 * The doors from a descriptor to its object: ioctl, mmap, read, lseek.
 */
#include <errno.h>
#include <sys/mman.h>

#include "base/log.h"
#include "uapi/object.h"

static bool is_foreign(const struct kl_object *obj)
{
	return KL_UNLIKELY(obj->owner != kl_uapi_pid);
}

/* The VM was made by another process, or is broken. */
static bool vm_unusable(const struct kl_uvm *vm, const struct kl_object *obj)
{
	return is_foreign(obj) ||
	       KL_UNLIKELY(atomic_load_explicit(&vm->kvm.mem.dead, memory_order_relaxed));
}

static void trace_ioctl(const struct kl_object *obj, unsigned cmd, unsigned long arg, long r)
{
	const struct kl_uvcpu *vc = (const struct kl_uvcpu *)obj;
	const struct kl_uvm *vm = obj->kind == KL_OBJ_VCPU ? vc->vm : (const struct kl_uvm *)obj;
	const char *name = kl_ioctl_name(cmd);

	switch (obj->kind) {
	case KL_OBJ_VM:
		kl_trace_write("ioctl vm%lu %s(0x%x) arg=0x%lx = %ld",
			       (unsigned long)vm->kvm.mem.serial, name, cmd, arg, r);
		break;
	case KL_OBJ_VCPU:
		kl_trace_write("ioctl vm%lu vcpu%u %s(0x%x) arg=0x%lx = %ld",
			       (unsigned long)vm->kvm.mem.serial, vc->id, name, cmd, arg, r);
		break;
	default:
		kl_trace_write("ioctl kvm %s(0x%x) arg=0x%lx = %ld", name, cmd, arg, r);
		break;
	}
}

long kl_uapi_ioctl(struct kl_object *obj, unsigned long cmd_long, unsigned long arg,
		   struct kl_object **new_obj)
{
	unsigned cmd = (unsigned)cmd_long; /* as the kernel takes it */
	long r;

	*new_obj = NULL;
	kl_object_found(obj);
	switch (obj->kind) {
	case KL_OBJ_SYSTEM:
		r = kl_system_ioctl(cmd, arg, new_obj);
		break;
	case KL_OBJ_VM:
		r = vm_unusable(kl_uvm(obj), obj) ? -EIO
						  : kl_vm_ioctl(kl_uvm(obj), cmd, arg, new_obj);
		break;
	case KL_OBJ_VCPU:
		r = vm_unusable(kl_uvcpu(obj)->vm, obj)
			    ? -EIO
			    : kl_vcpu_ioctl(kl_uvcpu(obj), cmd, arg, new_obj);
		break;
	default:
		r = -ENOTTY;
		break;
	}
	if (KL_UNLIKELY(kl_trace_on))
		trace_ioctl(obj, cmd, arg, r);
	kl_object_used(obj);
	return r;
}

static bool in_dirty_ring(const struct kl_uvm *vm, uint64_t page)
{
	return page >= KVM_DIRTY_LOG_PAGE_OFFSET &&
	       page - KVM_DIRTY_LOG_PAGE_OFFSET < vm->kvm.mem.dirty_ring_size / KL_PAGE_SIZE;
}

/*
 * KVM maps a vCPU's pages wherever it is asked to and lets what is none of them fault; a memfd does
 * the same beyond its end. Page KL_COALESCED_PAGE belongs to the VM. So, as mappings go, do those
 * between it and the dirty ring: they lie beyond the end of that file.
 */
long kl_uapi_mmap(struct kl_object *obj, size_t len, int prot, int flags, off_t off,
		  struct kl_overlay *o)
{
	const uint64_t first = KL_COALESCED_PAGE * KL_PAGE_SIZE;
	uint64_t start = (uint64_t)off, last, page = start / KL_PAGE_SIZE;
	uint64_t pages = (len + KL_PAGE_SIZE - 1) / KL_PAGE_SIZE;
	struct kl_uvm *vm;

	kl_object_found(obj);
	if (obj->kind != KL_OBJ_VCPU && obj->kind != KL_OBJ_GMEM)
		return -ENODEV;
	/* KVM's files live on a file system that is mounted noexec. */
	if (prot & PROT_EXEC)
		return -EPERM;
	if (obj->kind == KL_OBJ_GMEM)
		return is_foreign(obj) ? -EIO : kl_ugmem_mmap(kl_ugmem(obj), len, flags, o);
	vm = kl_uvcpu(obj)->vm;
	if (!(flags & MAP_SHARED) && pages &&
	    (in_dirty_ring(vm, page) || in_dirty_ring(vm, page + pages - 1)))
		return -EINVAL;
	last = vm->kvm.mem.dirty_ring_size ? KVM_DIRTY_LOG_PAGE_OFFSET * KL_PAGE_SIZE
					   : first + KL_PAGE_SIZE;
	if (start >= last || (start <= first && first - start >= len))
		return 0;
	o->fd = vm->ring_fd;
	o->at = start < first ? first - start : 0;
	o->off = start < first ? 0 : (off_t)(start - first);
	return (long)kl_min(last - start - o->at, pages * KL_PAGE_SIZE - o->at);
}

ssize_t kl_uapi_read(struct kl_object *obj, void *buf, size_t len, off_t *pos)
{
	struct kl_ustats *s = kl_ustats(obj);
	ssize_t r;

	kl_object_found(obj);
	if (obj->kind != KL_OBJ_STATS)
		return -EINVAL;
	if (is_foreign(obj))
		return -EIO;
	if (pos)
		return *pos < 0 ? -EINVAL : kl_stats_read(s, buf, len, pos);
	kl_mutex_lock(&s->lock);
	r = kl_stats_read(s, buf, len, &s->pos);
	kl_mutex_unlock(&s->lock);
	return r;
}

off_t kl_uapi_lseek(struct kl_object *obj, off_t off, int whence)
{
	off_t pos;

	(void)off;
	kl_object_found(obj);
	if (whence < SEEK_SET || whence > SEEK_HOLE)
		return -EINVAL;
	if (obj->kind == KL_OBJ_GMEM)
		return -ESPIPE;
	if (obj->kind != KL_OBJ_STATS || is_foreign(obj))
		return 0;
	kl_mutex_lock(&kl_ustats(obj)->lock);
	pos = kl_ustats(obj)->pos;
	kl_mutex_unlock(&kl_ustats(obj)->lock);
	return pos;
}
