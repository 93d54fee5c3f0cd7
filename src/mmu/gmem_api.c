/* SPDX-License-Identifier: MIT */
/* The library's public functions on private memory: argument checks. The rest is in mem/gmem.c. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "base/bias.h"
#include "base/log.h"
#include "host/sys.h"
#include "mem/gmem.h"
#include "mem/private.h"
#include "mmu/api.h"

struct kvmlet_gmem {
	struct kl_gmem *file;
	unsigned forks; /* value of kl_api_forks when it was made */
};

/* What waits for vCPUs, brackets or holders is refused to who may be waited for. */
static bool would_deadlock(void)
{
	return kl_self.brackets || kl_api_window || kl_bias_held() || kl_self.reports;
}

static int vm_ready(const struct kvmlet_vm *vm)
{
	return would_deadlock() ? -EDEADLK : kl_api_vm_usable(vm);
}

static int file_ready(const struct kvmlet_gmem *file)
{
	return would_deadlock() ? -EDEADLK : file->forks == kl_api_forks ? 0 : -EIO;
}

static bool is_range(uint64_t start, uint64_t size)
{
	return size && !((start | size) & ~KL_PAGE_MASK) && start + size > start;
}

static int wrap(int (*make)(struct kl_vm *, void *, struct kl_gmem **), struct kvmlet_vm *vm,
		void *arg, struct kvmlet_gmem **out)
{
	struct kvmlet_gmem *f = malloc(sizeof(*f));
	int r;

	if (!f)
		return -ENOMEM;
	f->forks = kl_api_forks;
	kl_engine_enter();
	r = make(&vm->vm, arg, &f->file);
	kl_engine_leave();
	if (r)
		free(f);
	else
		*out = f;
	return r;
}

static int create(struct kl_vm *vm, void *arg, struct kl_gmem **file)
{
	uint64_t size = *(uint64_t *)arg;
	int fd = kl_sys_memfd("kvmlet-gmem", size, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL), r;

	if (fd < 0)
		return fd;
	r = kl_gmem_create(vm, fd, size, 0, file);
	kl_sys_close(fd);
	return r;
}

static int link_to(struct kl_vm *vm, void *arg, struct kl_gmem **file)
{
	return kl_gmem_link(arg, vm, file);
}

KL_EXPORT int kvmlet_gmem_create(struct kvmlet_vm *vm, uint64_t size, struct kvmlet_gmem **file)
{
	int r = vm_ready(vm);

	if (r)
		return r;
	if (!is_range(0, size) || size > INT64_MAX)
		return -EINVAL;
	return wrap(create, vm, &size, file);
}

KL_EXPORT int kvmlet_gmem_link(struct kvmlet_gmem *file, struct kvmlet_vm *vm,
			       struct kvmlet_gmem **linked)
{
	int r = vm_ready(vm);

	if (!r)
		r = file_ready(file);
	return r ? r : wrap(link_to, vm, file->file, linked);
}

KL_EXPORT void kvmlet_gmem_close(struct kvmlet_gmem *file)
{
	if (!file || file->forks != kl_api_forks)
		return;
	if (KL_WARN_ONCE(would_deadlock(),
			 "kvmlet_gmem_close by the holder of a bracket, a window or a cache, or in "
			 "a callback; ignored"))
		return;
	kl_engine_enter();
	kl_gmem_close(file->file);
	kl_engine_leave();
	free(file);
}

KL_EXPORT int kvmlet_gmem_allocate(struct kvmlet_gmem *file, uint64_t offset, uint64_t size)
{
	int r = file_ready(file);

	if (r)
		return r;
	if (!is_range(offset, size))
		return -EINVAL;
	kl_engine_enter();
	r = kl_gmem_allocate(file->file, offset, size);
	kl_engine_leave();
	return r;
}

KL_EXPORT int kvmlet_gmem_punch(struct kvmlet_gmem *file, uint64_t offset, uint64_t size)
{
	int r = file_ready(file);

	if (r)
		return r;
	if (!is_range(offset, size))
		return -EINVAL;
	kl_engine_enter();
	r = kl_gmem_punch(file->file, offset, size);
	kl_engine_leave();
	return r;
}

KL_EXPORT int kvmlet_gmem_allocated(const struct kvmlet_gmem *file, uint64_t *bytes)
{
	if (file->forks != kl_api_forks)
		return -EIO;
	*bytes = kl_gmem_allocated(file->file);
	return 0;
}

KL_EXPORT int kvmlet_memslot_set_gmem(struct kvmlet_vm *vm, uint32_t slot, kl_gpa_t gpa,
				      uint64_t size, kl_hva_t hva, struct kvmlet_gmem *file,
				      uint64_t offset)
{
	struct kl_uapi_memory_region2 region = {
		.slot = slot,
		.flags = KVM_MEM_GUEST_MEMFD,
		.guest_phys_addr = gpa,
		.memory_size = size,
		.userspace_addr = hva.addr,
		.guest_memfd_offset = offset,
	};
	int r = vm_ready(vm);

	if (!r)
		r = file_ready(file);
	if (r)
		return r;
	if (!size)
		return -EINVAL;
	kl_engine_enter();
	r = kl_set_memory_region_gmem(&vm->vm, &region, file->file, 0);
	kl_engine_leave();
	return r;
}

KL_EXPORT int kvmlet_vm_set_private(struct kvmlet_vm *vm, kl_gpa_t gpa, uint64_t size, int private_)
{
	int r = vm_ready(vm);

	if (r)
		return r;
	if (!vm->vm.private_mem || !is_range(gpa, size))
		return -EINVAL;
	kl_engine_enter();
	r = kl_set_private(&vm->vm, gpa >> KL_PAGE_SHIFT, (gpa + size) >> KL_PAGE_SHIFT, private_);
	kl_engine_leave();
	return r;
}

KL_EXPORT int kvmlet_vm_is_private(struct kvmlet_vm *vm, kl_gpa_t gpa, int *private_)
{
	int r = kl_api_vm_usable(vm), token;
	unsigned level;

	if (r)
		return r;
	kl_engine_enter();
	token = kl_srcu_read_lock(&vm->vm.srcu);
	*private_ = kl_attr_private(&vm->vm.attrs, gpa >> KL_PAGE_SHIFT, &level);
	kl_srcu_read_unlock(&vm->vm.srcu, token);
	kl_engine_leave();
	return 0;
}
