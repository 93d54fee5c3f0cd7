/* SPDX-License-Identifier: MIT */
/* guest_memfd, bindings and attributes in the memory engine (F1-F7). */
#include "gmem_env.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/wait.h>

#include "mem/gpc.h"

#define KiB 1024ull
#define MiB (1024 * KiB)
#define GiB (1024 * MiB)

/* F5: which memory a frame is, is what its attribute says; both keep what they have. */
static void attribute_decides(void **state)
{
	struct gmem_fixture *g = *state;

	assert_ptr_equal(page_at(g, PG, KL_ACC_WRITE), g->f.ram + PG);
	g->f.ram[PG] = 1;
	convert(g, 1, 1, true);
	assert_ptr_equal(page_at(g, PG, KL_ACC_READ), private_page(g, 1));
	assert_int_equal(*private_page(g, 1), 0);
	*private_page(g, 1) = 2;
	/* Its neighbours are not concerned. */
	assert_ptr_equal(page_at(g, 0, KL_ACC_WRITE), g->f.ram);
	assert_ptr_equal(page_at(g, 2 * PG, KL_ACC_WRITE), g->f.ram + 2 * PG);
	convert(g, 1, 1, false);
	assert_ptr_equal(page_at(g, PG, KL_ACC_WRITE), g->f.ram + PG);
	assert_int_equal(g->f.ram[PG], 1);
	convert(g, 1, 1, true);
	assert_int_equal(*page_at(g, PG, KL_ACC_WRITE), 2);
}

/* F5: a fault that the slot's backing does not go with says so, and where. */
static void memory_fault(void **state)
{
	struct gmem_fixture *g = *state;
	struct kl_vcpu_core *c = &g->f.vcpu;

	/* No slot: shared is MMIO, private is not. */
	assert_int_equal(kl_mmu_fault(c, 0x1000000, KL_ACC_READ), KL_FAULT_MMIO);
	assert_false(c->memory_fault);
	assert_true(mmio_cached(&g->f, 0x1000000));
	convert(g, 0x1000, 1, true);
	assert_false(mmio_cached(&g->f, 0x1000000));
	assert_int_equal(kl_mmu_fault(c, 0x1000123, KL_ACC_WRITE), -EFAULT);
	assert_true(c->memory_fault && c->memory_fault_private);
	assert_int_equal(c->memory_fault_gpa, 0x1000000);
	/* A slot without guest_memfd. */
	assert_int_equal(set(&g->f.vm, 1, 0, 0x1000000, PG, g->f.ram), 0);
	assert_int_equal(kl_mmu_fault(c, 0x1000000, KL_ACC_READ), -EFAULT);
	assert_true(c->memory_fault && c->memory_fault_private);
	convert(g, 0x1000, 1, false);
	assert_ptr_equal(page_at(g, 0x1000000, KL_ACC_READ), g->f.ram);
	/* An ordinary failure is none. */
	munmap(g->f.ram, PG);
	assert_int_equal(kl_mmu_fault(c, 0, KL_ACC_READ), -EFAULT);
	assert_false(c->memory_fault);
	assert_int_not_equal(
		mmap(g->f.ram, PG, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0),
		MAP_FAILED);
}

/* F1, F2: what is refused, and that nothing has changed then. */
static void refused_bindings(void **state)
{
	struct gmem_fixture *g = *state;
	struct kl_vm *vm = &g->f.vm, *other = calloc(1, sizeof(*other));
	struct kl_uapi_memory_region2 r = {
		1, KVM_MEM_GUEST_MEMFD, 0x1000000, PG, (uint64_t)g->f.ram, 0, 0, 0, {0}};
	struct kl_gmem *huge;
	uint64_t generation = kl_generation(vm, 0);

	assert_int_equal(kl_set_memory_region(vm, &r), -EBADF);
	/* Not a multiple of a page; beyond the end; wraps. */
	assert_int_equal(set_gmem(vm, 1, 0x1000000, PG, g->f.ram, g->file, 512), -EINVAL);
	assert_int_equal(
		set_gmem(vm, 1, 0x1000000, 2 * PG, g->f.ram, g->file, (2 * NPAGES - 1) * PG),
		-EINVAL);
	assert_int_equal(set_gmem(vm, 1, 0x1000000, PG, g->f.ram, g->file, -PG), -EINVAL);
	/* Bound already, in part. */
	assert_int_equal(set_gmem(vm, 1, 0x1000000, 2 * PG, g->f.ram, g->file, (NPAGES - 1) * PG),
			 -EINVAL);
	/* Frames that another slot has. */
	assert_int_equal(set_gmem(vm, 1, PG, PG, g->f.ram, g->file, NPAGES * PG), -EEXIST);
	/* Log, read-only, change: a slot with a guest_memfd can be deleted, and that is all. */
	r.flags = KVM_MEM_GUEST_MEMFD | KVM_MEM_LOG_DIRTY_PAGES;
	assert_int_equal(kl_set_memory_region_gmem(vm, &r, g->file, 0), -EINVAL);
	r.flags = KVM_MEM_GUEST_MEMFD | KVM_MEM_READONLY;
	assert_int_equal(kl_set_memory_region_gmem(vm, &r, g->file, 0), -EINVAL);
	assert_int_equal(set_gmem(vm, 0, 0, NPAGES * PG, g->f.ram, g->file, 0), -EINVAL);
	assert_int_equal(set_gmem(vm, 0, 0x1000000, NPAGES * PG, g->f.ram, g->file, NPAGES * PG),
			 -EINVAL);
	assert_int_equal(set(vm, 0, 0, 0, NPAGES * PG, g->f.ram), -EINVAL);
	/* No second address space. */
	assert_int_equal(set(vm, 1u << 16, 0, 0, PG, g->f.ram), -EINVAL);
	/* Beyond what a guest can have; what it was bound to is free again. */
	assert_int_equal(set_gmem(vm, 1, 1ull << 53, PG, g->f.ram, g->file, NPAGES * PG), -EINVAL);
	/* Larger than any mapping: a file, but nobody can use it. */
	assert_int_equal(new_file(vm, 1ull << 60, &huge), 0);
	assert_int_equal(set_gmem(vm, 1, 0x1000000, PG, g->f.ram, huge, 0), -ENOMEM);
	assert_int_equal(kl_gmem_punch(huge, 0, 1ull << 60), 0);
	kl_gmem_close(huge);
	assert_int_equal(kl_generation(vm, 0), generation);
	/* Another VM's; and of a VM without private memory, any. */
	assert_int_equal(kl_vm_init(other), 0);
	assert_int_equal(set_gmem(other, 0, 0, PG, g->f.ram, g->file, NPAGES * PG), -EINVAL);
	kl_vm_make_private(other);
	assert_int_equal(set_gmem(other, 0, 0, PG, g->f.ram, g->file, NPAGES * PG), -EINVAL);
	kl_vm_destroy(other);
	free(other);
	/* The other half of the file is free, and so is a half that was. */
	assert_int_equal(set_gmem(vm, 1, 0x1000000, NPAGES * PG, g->f.ram, g->file, NPAGES * PG),
			 0);
	assert_int_equal(set(vm, 0, 0, 0, 0, NULL), 0);
	assert_int_equal(set_gmem(vm, 2, 0x2000000, NPAGES * PG, g->f.ram, g->file, 0), 0);
}

/* F1, F3, G17: a hole gives the memory back, and what is faulted in later is zero. */
static void punched(void **state)
{
	struct gmem_fixture *g = *state;
	uint64_t invalidations;

	convert(g, 0, NPAGES, true);
	assert_int_equal(kl_gmem_allocate(g->file, 0, 2 * NPAGES * PG), 0);
	assert_int_equal(kl_gmem_allocated(g->file), 2 * NPAGES * PG);
	for (unsigned i = 0; i < NPAGES; i++)
		memset(page_at(g, i * PG, KL_ACC_WRITE), 0xaa, PG);
	assert_int_equal(kl_gmem_punch(g->file, PG, 3 * PG), 0);
	assert_int_equal(kl_gmem_allocated(g->file), (2 * NPAGES - 3) * PG);
	for (unsigned i = 0; i < NPAGES; i++) {
		assert_int_equal(mapped(&g->f, i * PG, KL_ACC_READ), i < 1 || i > 3);
		assert_int_equal(*page_at(g, i * PG, KL_ACC_READ), i < 1 || i > 3 ? 0xaa : 0);
	}
	assert_int_equal(kl_gmem_allocated(g->file), 2 * NPAGES * PG);
	/* What is not bound concerns no VM; what is beyond the end, nobody. */
	invalidations = kl_stat_get(&g->f.vm.stats.mmu_invalidations);
	assert_int_equal(kl_gmem_punch(g->file, NPAGES * PG, NPAGES * PG), 0);
	assert_int_equal(kl_gmem_punch(g->file, 2 * NPAGES * PG, PG), 0);
	assert_int_equal(kl_gmem_punch(g->file, 100 * NPAGES * PG, PG), 0);
	assert_int_equal(kl_stat_get(&g->f.vm.stats.mmu_invalidations), invalidations);
	assert_true(mapped(&g->f, 0, KL_ACC_READ));
	/* Both, clipped to the binding. */
	assert_int_equal(kl_gmem_punch(g->file, (NPAGES - 1) * PG, INT64_MAX & ~(PG - 1)), 0);
	assert_int_equal(kl_stat_get(&g->f.vm.stats.mmu_invalidations), invalidations + 1);
	assert_true(mapped(&g->f, (NPAGES - 2) * PG, KL_ACC_READ));
	assert_false(mapped(&g->f, (NPAGES - 1) * PG, KL_ACC_READ));
	assert_int_equal(kl_gmem_allocated(g->file), (NPAGES - 1) * PG);
	/* Beyond the end there is nothing to allocate. */
	assert_int_equal(kl_gmem_allocate(g->file, 2 * NPAGES * PG, PG), -EINVAL);
	assert_int_equal(kl_gmem_allocate(g->file, PG, 2 * NPAGES * PG), -EINVAL);
}

/* F3: two VMs through two files of one inode; each sees the same memory, and a hole in it. */
static void one_inode_two_vms(void **state)
{
	struct gmem_fixture *g = *state;
	struct gmem_fixture b = {.f.ram = g->f.ram};

	assert_int_equal(kl_vm_init(&b.f.vm), 0);
	kl_vm_make_private(&b.f.vm);
	assert_int_equal(kl_vcpu_core_add(&b.f.vm, &b.f.vcpu, 0), 0);
	assert_int_equal(kl_gmem_link(g->file, &b.f.vm, &b.file), 0);
	/* Elsewhere, and another part: pages 2 to 9 of the file at 1 MiB. */
	assert_int_equal(set_gmem(&b.f.vm, 5, MiB, 8 * PG, g->f.ram, b.file, 2 * PG), 0);
	assert_int_equal(set_gmem(&b.f.vm, 6, 0, PG, g->f.ram, g->file, 0), -EINVAL);
	convert(g, 0, NPAGES, true);
	convert(&b, MiB / PG, 8, true);
	memset(page_at(g, 4 * PG, KL_ACC_WRITE), 0x11, PG);
	assert_int_equal(*page_at(&b, MiB + 2 * PG, KL_ACC_READ), 0x11);
	assert_int_equal(kl_gmem_punch(b.file, 4 * PG, PG), 0);
	assert_false(mapped(&g->f, 4 * PG, KL_ACC_READ));
	assert_false(mapped(&b.f, MiB + 2 * PG, KL_ACC_READ));
	assert_int_equal(*page_at(g, 4 * PG, KL_ACC_READ), 0);
	/* One file closes: the memory is the other's still. */
	memset(page_at(g, 5 * PG, KL_ACC_WRITE), 0x22, PG);
	assert_ptr_equal(page_at(&b, MiB + 3 * PG, KL_ACC_READ), private_page(g, 5));
	kl_gmem_close(g->file);
	g->file = NULL;
	assert_false(mapped(&g->f, 5 * PG, KL_ACC_READ));
	assert_int_equal(kl_mmu_fault(&g->f.vcpu, 5 * PG, KL_ACC_READ), -EFAULT);
	assert_int_equal(*page_at(&b, MiB + 3 * PG, KL_ACC_READ), 0x22);
	kl_gmem_close(b.file);
	kl_vm_destroy(&b.f.vm);
}

/* F2: the file is closed: what was mapped is gone, the slot stays, private faults fail. */
static void closed(void **state)
{
	struct gmem_fixture *g = *state;
	struct kl_gmem *file = g->file, *again;

	convert(g, 0, 2, true);
	page_at(g, 0, KL_ACC_WRITE);
	page_at(g, 2 * PG, KL_ACC_WRITE);
	g->file = NULL;
	kl_gmem_close(file);
	assert_false(mapped(&g->f, 0, KL_ACC_READ));
	assert_int_equal(kl_mmu_fault(&g->f.vcpu, 0, KL_ACC_READ), -EFAULT);
	assert_true(g->f.vcpu.memory_fault && g->f.vcpu.memory_fault_private);
	assert_ptr_equal(page_at(g, 2 * PG, KL_ACC_WRITE), g->f.ram + 2 * PG);
	convert(g, 0, 2, false);
	assert_ptr_equal(page_at(g, 0, KL_ACC_WRITE), g->f.ram);
	/* Nothing but deletion, still. */
	assert_int_equal(set(&g->f.vm, 0, 0, 0, NPAGES * PG, g->f.ram), -EINVAL);
	assert_int_equal(set(&g->f.vm, 0, 0, 0, 0, NULL), 0);
	assert_int_equal(new_file(&g->f.vm, NPAGES * PG, &again), 0);
	assert_int_equal(set_gmem(&g->f.vm, 0, 0, NPAGES * PG, g->f.ram, again, 0), 0);
	g->file = again;
	convert(g, 0, 1, true);
	assert_ptr_equal(page_at(g, 0, KL_ACC_READ), private_page(g, 0));
}

static bool in_maps(const char *name)
{
	FILE *f = fopen("/proc/self/maps", "re");
	char line[256];
	bool yes = false;

	while (fgets(line, sizeof(line), f))
		yes |= strstr(line, name) != NULL;
	fclose(f);
	return yes;
}

/* F2, G17: the memory goes with the last file, whatever slots there are. */
static void closed_gives_back(void **state)
{
	struct gmem_fixture *g = *state;
	struct kl_gmem *second;

	assert_int_equal(kl_gmem_link(g->file, &g->f.vm, &second), 0);
	assert_int_equal(kl_gmem_allocate(g->file, 0, PG), 0);
	kl_gmem_close(g->file);
	g->file = NULL;
	assert_true(in_maps("memfd:test-gmem"));
	assert_int_equal(kl_gmem_allocated(second), PG);
	kl_gmem_close(second);
	assert_false(in_maps("memfd:test-gmem"));
}

/* F2: any order of deletion, close and the VM's death. */
static void every_order(void **state)
{
	static const char *const orders[] = {"dcv", "dvc", "cdv", "cv", "vc", "v c"};

	(void)state;
	for (unsigned i = 0; i < 6; i++) {
		struct gmem_fixture *g;
		void *s;

		assert_int_equal(gmem_setup(&s), 0);
		g = s;
		convert(g, 0, NPAGES, true);
		page_at(g, PG, KL_ACC_WRITE);
		for (const char *o = orders[i]; *o; o++)
			switch (*o) {
			case 'd':
				assert_int_equal(set(&g->f.vm, 0, 0, 0, 0, NULL), 0);
				break;
			case 'c':
				kl_gmem_close(g->file);
				break;
			case 'v':
				kl_vm_destroy(&g->f.vm);
				break;
			default: /* the file is an orphan, and a file all the same */
				assert_int_equal(kl_gmem_punch(g->file, 0, NPAGES * PG), 0);
				assert_int_equal(kl_gmem_allocate(g->file, 0, PG), 0);
				assert_int_equal(kl_gmem_allocated(g->file), PG);
				break;
			}
		munmap(g->f.ram, NPAGES * PG);
		assert_int_equal(kl_pages_in_use(), g->f.pages_before);
		free(g);
	}
}

/* M1, F5: one leaf for what is uniform and was touched, and only for that. */
static void large_leaves(void **state)
{
	struct gmem_fixture *g = *state;
	struct kl_vm *vm = &g->f.vm;
	struct kl_gmem *file;
	uint8_t *ram = mmap(NULL, 8 * MiB, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	uint8_t *at = (uint8_t *)(((uint64_t)ram + 2 * MiB - 1) & ~(2 * MiB - 1));

	assert_int_equal(new_file(vm, 4 * MiB, &file), 0);
	assert_int_equal(set_gmem(vm, 1, GiB, 4 * MiB, at, file, 0), 0);
	memset(at, 1, 4 * MiB);
	memset((void *)file->inode->hva, 1, 4 * MiB);
	page_at(g, GiB, KL_ACC_WRITE);
	page_at(g, GiB + 2 * MiB, KL_ACC_WRITE);
	assert_int_equal(kl_stat_get(&vm->stats.pages_2m), 2);
	/* One page of the first 2 MiB: neither the rest of it nor the page is large. */
	convert(g, GiB / PG + 7, 1, true);
	assert_int_equal(kl_stat_get(&vm->stats.pages_2m), 1);
	page_at(g, GiB, KL_ACC_WRITE);
	page_at(g, GiB + 7 * PG, KL_ACC_WRITE);
	assert_int_equal(kl_stat_get(&vm->stats.pages_2m), 1);
	assert_int_equal(kl_stat_get(&vm->stats.pages_4k), 2);
	/* All of it. */
	convert(g, GiB / PG, 512, true);
	page_at(g, GiB + 9 * PG, KL_ACC_READ);
	assert_int_equal(kl_stat_get(&vm->stats.pages_2m), 2);
	assert_int_equal(kl_stat_get(&vm->stats.pages_4k), 0);
	/* A hole, and it is not there as a whole any more. */
	assert_int_equal(kl_gmem_punch(file, 3 * PG, PG), 0);
	page_at(g, GiB + 9 * PG, KL_ACC_READ);
	assert_int_equal(kl_stat_get(&vm->stats.pages_2m), 1);
	assert_int_equal(kl_gmem_allocated(file), 4 * MiB - PG);
	kl_gmem_close(file);
	munmap(ram, 8 * MiB);
}

/* F7: a cache has the page that the attribute says, and lets go of it when that changes. */
static void caches(void **state)
{
	struct gmem_fixture *g = *state;
	struct kl_gpc *c = aligned_alloc(64, (sizeof(*c) + 63) / 64 * 64);
	void *p;

	assert_int_equal(kl_gpc_init(c, &g->f.vm, 0, KL_GPC_USER), 0);
	assert_int_equal(kl_gpc_activate(c, 3 * PG + 8, 8), 0);
	assert_int_equal(kl_gpc_lock(c, 8, &p), 0);
	assert_ptr_equal(p, g->f.ram + 3 * PG + 8);
	kl_gpc_unlock(c, false);
	convert(g, 3, 1, true);
	assert_false(kl_gpc_check(c, 8));
	assert_int_equal(kl_gpc_lock(c, 8, &p), 0);
	assert_ptr_equal(p, private_page(g, 3) + 8);
	*(uint64_t *)p = 0x5ec2e7;
	kl_gpc_unlock(c, true);
	assert_int_equal(g->f.ram[3 * PG + 8], 0);
	/* A hole is an event for it as well, and no page is pinned (G17). */
	assert_int_equal(kl_gmem_punch(g->file, 3 * PG, PG), 0);
	assert_false(kl_gpc_check(c, 8));
	assert_int_equal(kl_gmem_allocated(g->file), 0);
	assert_int_equal(kl_gpc_lock(c, 8, &p), 0);
	assert_int_equal(*(uint64_t *)p, 0);
	kl_gpc_unlock(c, false);
	kl_gmem_close(g->file);
	g->file = NULL;
	assert_false(kl_gpc_check(c, 8));
	assert_int_equal(kl_gpc_lock(c, 8, &p), -EFAULT);
	convert(g, 3, 1, false);
	assert_int_equal(kl_gpc_lock(c, 8, &p), 0);
	assert_ptr_equal(p, g->f.ram + 3 * PG + 8);
	kl_gpc_unlock(c, false);
	assert_int_equal(set(&g->f.vm, 0, 0, 0, 0, NULL), 0);
	assert_int_equal(kl_gpc_lock(c, 8, &p), -EFAULT);
	kl_gpc_destroy(c);
	free(c);
}

/* N2, F3: an event on the one memory of a slot is none on the other. */
static void each_its_events(void **state)
{
	struct gmem_fixture *g = *state;
	struct kl_notifier_range r = range_of(g->f.ram, NPAGES * PG);

	convert(g, 0, 1, true);
	page_at(g, 0, KL_ACC_WRITE);
	page_at(g, PG, KL_ACC_WRITE);
	assert_int_equal(kl_notifier_begin(&r), 0);
	assert_true(mapped(&g->f, 0, KL_ACC_WRITE));
	assert_false(mapped(&g->f, PG, KL_ACC_READ));
	kl_notifier_end(&r);
	page_at(g, PG, KL_ACC_WRITE);
	assert_int_equal(kl_gmem_punch(g->file, 0, NPAGES * PG), 0);
	assert_false(mapped(&g->f, 0, KL_ACC_READ));
	assert_true(mapped(&g->f, PG, KL_ACC_WRITE));
	/* Not even one that may not wait. */
	page_at(g, 0, KL_ACC_WRITE);
	r = range_of(g->f.ram, PG);
	r.may_block = false;
	kl_vcpu_enter_guest(&g->f.vcpu);
	assert_int_equal(kl_notifier_begin(&r), 0);
	kl_notifier_end(&r);
	kl_vcpu_leave_guest(&g->f.vcpu);
}

/* A child has neither the VM nor its memory. */
static void not_inherited(void **state)
{
	struct gmem_fixture *g = *state;
	unsigned char v;

	convert(g, 0, 1, true);
	page_at(g, 0, KL_ACC_WRITE);
	assert_int_equal(mincore(private_page(g, 0), PG, &v), 0);
	if (!fork())
		_exit(mincore(private_page(g, 0), PG, &v) == -1 && errno == ENOMEM ? 0 : 1);
	else {
		int status;

		wait(&status);
		assert_int_equal(status, 0);
	}
}

/* F3: a hole that the file does not allow is none, and says so. */
static void sealed(void **state)
{
	struct gmem_fixture *g = *state;
	int fd = memfd_create("test-gmem", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	struct kl_gmem *file;

	assert_int_equal(ftruncate(fd, 2 * PG), 0);
	assert_int_equal(kl_gmem_create(&g->f.vm, fd, 2 * PG, 0, &file), 0);
	assert_int_equal(kl_gmem_allocate(file, 0, PG), 0);
	assert_int_equal(fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE), 0);
	assert_int_equal(kl_gmem_punch(file, 0, PG), -EPERM);
	assert_int_equal(kl_gmem_allocated(file), PG);
	kl_gmem_close(file);
	close(fd);
}

static unsigned long mapped_pages(void)
{
	unsigned long size = 0;
	FILE *file = fopen("/proc/self/statm", "r");

	assert_non_null(file);
	assert_int_equal(fscanf(file, "%lu", &size), 1);
	fclose(file);
	return size;
}

/* F1, F5: files and conversions, however many, leave neither addresses nor memory behind. */
static void nothing_remains(void **state)
{
	struct gmem_fixture *g = *state;
	unsigned long before = 0;
	uint64_t pages = 0;

	for (unsigned i = 0; i < 64; i++) {
		struct kl_gmem *file;

		if (i == 2) { /* what is made once is there */
			before = mapped_pages();
			pages = kl_pages_in_use();
		}
		assert_int_equal(new_file(&g->f.vm, i & 1 ? GiB : 4 * MiB, &file), 0);
		kl_gmem_close(file);
		convert(g, 1, 1, true);
		convert(g, 1, 1, false);
		convert(g, 0, 513, true);
		convert(g, 0, 513, false);
	}
	assert_true(mapped_pages() <= before + 64);
	assert_int_equal(kl_pages_in_use(), pages);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, gmem_setup, gmem_teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(attribute_decides), TEST(memory_fault),
		TEST(refused_bindings),  TEST(punched),
		TEST(one_inode_two_vms), TEST(closed),
		TEST(closed_gives_back), cmocka_unit_test(every_order),
		TEST(large_leaves),      TEST(caches),
		TEST(each_its_events),   TEST(not_inherited),
		TEST(nothing_remains),   TEST(sealed),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
