/* SPDX-License-Identifier: MIT */
/*
 * A VM with private memory: one slot of NPAGES pages at guest-physical 0, whose shared memory is
 * f->ram, and whose private memory is f->file from its start. The file has twice as many pages.
 */
#pragma once

#include <fcntl.h>

#include "mmu_env.h"

#include "host/populate.h"
#include "mem/gmem.h"
#include "mem/private.h"

struct gmem_fixture {
	struct fixture f; /* first: mmu_env.h's helpers take it */
	struct kl_gmem *file;
};

static inline int new_file(struct kl_vm *vm, uint64_t size, struct kl_gmem **out)
{
	int fd = memfd_create("test-gmem", MFD_CLOEXEC), r;

	assert_true(fd >= 0);
	assert_int_equal(ftruncate(fd, (off_t)size), 0);
	r = kl_gmem_create(vm, fd, size, 0, out);
	close(fd);
	return r;
}

static inline int set_gmem(struct kl_vm *vm, uint32_t slot, uint64_t gpa, uint64_t size, void *hva,
			   struct kl_gmem *file, uint64_t off)
{
	struct kl_uapi_memory_region2 r = {
		slot, KVM_MEM_GUEST_MEMFD, gpa, size, (uint64_t)hva, off, 0, 0, {0}};

	return kl_set_memory_region_gmem(vm, &r, file, -EBADF);
}

static inline int gmem_setup(void **state)
{
	struct gmem_fixture *g = calloc(1, sizeof(*g));
	struct fixture *f = &g->f;

	*state = g;
	f->pages_before = kl_pages_in_use();
	f->ram =
		mmap(NULL, NPAGES * PG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (f->ram == MAP_FAILED || kl_vm_init(&f->vm))
		return -1;
	kl_vm_make_private(&f->vm);
	return kl_vcpu_core_add(&f->vm, &f->vcpu, 0) ||
	       new_file(&f->vm, 2 * NPAGES * PG, &g->file) ||
	       set_gmem(&f->vm, 0, 0, NPAGES * PG, f->ram, g->file, 0);
}

static inline int gmem_teardown(void **state)
{
	struct gmem_fixture *g = *state;

	if (g->file)
		kl_gmem_close(g->file);
	return teardown(state);
}

static inline void convert(struct gmem_fixture *g, uint64_t page, uint64_t n, bool private)
{
	assert_int_equal(kl_set_private(&g->f.vm, page, page + n, private), 0);
}

/* Where a vCPU finds @gpa now, after as many faults as it takes; NULL: it cannot have it. */
static inline uint8_t *page_at(struct gmem_fixture *g, uint64_t gpa, unsigned access)
{
	struct kl_vcpu_core *c = &g->f.vcpu;

	for (;;) {
		bool writable, mmio;
		uint8_t *p;

		kl_vcpu_enter_guest(c);
		kl_vcpu_take_requests(c, KL_REQ_TLB_FLUSH);
		p = kl_mmu_lookup(c, gpa, access, &writable, &mmio);
		kl_vcpu_leave_guest(c);
		if (p)
			return p;
		if (mmio || kl_mmu_fault(c, gpa, access) != KL_FAULT_MAPPED)
			return NULL;
	}
}

static inline uint8_t *private_page(struct gmem_fixture *g, uint64_t page)
{
	return (uint8_t *)(uintptr_t)(g->file->inode->hva + page * PG);
}
