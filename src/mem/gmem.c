/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "base/failpoint.h"
#include "base/log.h"
#include "base/racepoint.h"
#include "host/sys.h"
#include "host/thread.h"
#include "mem/gmem.h"
#include "mem/memslot.h"
#include "mem/notifier.h"
#include "mem/private.h"
#include "mem/vm.h"

/* Which VM a file belongs to. */
static struct kl_mutex life = KL_MUTEX_INITIALIZER(GMEM);

/* ---- inodes -------------------------------------------------------------------------------- */

/*
 * So that guest and host addresses agree in their low bits wherever guest addresses and offsets do:
 * else there could be no large leaves.
 */
#define LARGE (1ull << 30)
#define SMALL (1ull << 21)

/* More than there are addresses: such a file can be had, as in KVM, and nothing can be bound to it.
 */
#define UNMAPPABLE (1ull << 46)

static long map_aligned(int fd, uint64_t size)
{
	uint64_t align = size >= LARGE ? LARGE : size >= SMALL ? SMALL : KL_PAGE_SIZE, start;
	long p, r;

	if (kl_failpoint("gmem-map"))
		return -ENOMEM;
	p = kl_sys(SYS_mmap, NULL, size + align, PROT_NONE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (p < 0)
		return p;
	start = ((uint64_t)p + align - 1) & ~(align - 1);
	r = kl_sys(SYS_mmap, start, size, PROT_READ | PROT_WRITE,
		   MAP_SHARED | MAP_FIXED | MAP_NORESERVE, fd, 0);
	if (r < 0) {
		kl_sys(SYS_munmap, p, size + align);
		return r;
	}
	if (start > (uint64_t)p)
		kl_sys(SYS_munmap, p, start - (uint64_t)p);
	if ((uint64_t)p + align > start)
		kl_sys(SYS_munmap, start + size, (uint64_t)p + align - start);
	/* A child has no VMs, and shall not have their memory. */
	kl_sys(SYS_madvise, start, size, MADV_DONTFORK);
	return (long)start;
}

/*
 * Not a duplicate: locks by which the preload library follows the program's descriptors belong to
 * the open file.
 */
static int open_again(int memfd)
{
	char path[40];
	int again;
	long fd;

	if (kl_failpoint("gmem-open"))
		return -EMFILE;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", memfd);
	fd = kl_sys(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC);
	if (fd == -ENOENT || fd == -EACCES)
		return kl_sys_dup(memfd);
	if (fd < 0)
		return (int)fd;
	again = kl_sys_dup((int)fd);
	kl_sys(SYS_close, fd);
	return again;
}

static int inode_create(int memfd, uint64_t size, uint64_t flags, struct kl_gmem_inode **out)
{
	struct kl_gmem_inode *i = kl_failpoint("gmem-inode") ? NULL : calloc(1, sizeof(*i));
	long r;

	if (!i)
		return -ENOMEM;
	r = open_again(memfd);
	if (r < 0)
		goto out_free;
	i->fd = (int)r;
	r = size < UNMAPPABLE ? map_aligned(i->fd, size) : 0;
	if (r < 0)
		goto out_close;
	i->hva = (uint64_t)r;
	i->size = size;
	i->flags = flags;
	atomic_init(&i->refs, 1);
	*out = i;
	return 0;
out_close:
	kl_sys_close(i->fd);
out_free:
	free(i);
	return (int)r;
}

/* No file is left, and nothing of it is mapped anywhere. The addresses stay ours. */
static void inode_empty(struct kl_gmem_inode *i)
{
	if (i->hva)
		kl_sys(SYS_mmap, i->hva, i->size, PROT_NONE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
	kl_sys_close(i->fd);
}

void kl_gmem_inode_put(struct kl_gmem_inode *i)
{
	if (atomic_fetch_sub_explicit(&i->refs, 1, memory_order_acq_rel) > 1)
		return;
	if (i->hva)
		kl_sys_unmap((void *)(uintptr_t)i->hva, i->size);
	free(i);
}

/* ---- files --------------------------------------------------------------------------------- */

/* Takes over a reference to @i, also if it fails. */
static int file_create(struct kl_vm *vm, struct kl_gmem_inode *i, struct kl_gmem **out)
{
	struct kl_gmem *f = kl_failpoint("gmem-file") ? NULL : calloc(1, sizeof(*f));

	if (!f)
		return -ENOMEM;
	f->inode = i;
	f->vm = vm;
	atomic_fetch_add(&i->nr_files, 1);
	kl_mutex_lock(&life);
	f->next = vm->gmem_files;
	f->pprev = &vm->gmem_files;
	if (f->next)
		f->next->pprev = &f->next;
	vm->gmem_files = f;
	kl_mutex_unlock(&life);
	*out = f;
	return 0;
}

int kl_gmem_create(struct kl_vm *vm, int memfd, uint64_t size, uint64_t flags, struct kl_gmem **out)
{
	struct kl_gmem_inode *i = NULL;
	int r = inode_create(memfd, size, flags, &i);

	if (r)
		return r;
	r = file_create(vm, i, out);
	if (r) {
		inode_empty(i);
		kl_gmem_inode_put(i);
	}
	return r;
}

int kl_gmem_link(struct kl_gmem *file, struct kl_vm *vm, struct kl_gmem **out)
{
	int r;

	kl_gmem_inode_get(file->inode);
	r = file_create(vm, file->inode, out);
	if (r)
		kl_gmem_inode_put(file->inode);
	return r;
}

static void unlink_file(struct kl_gmem *f)
{
	kl_assert_held(&life);
	*f->pprev = f->next;
	if (f->next)
		f->next->pprev = f->pprev;
}

static void unlink_binding(struct kl_gmem_binding *b)
{
	*b->pprev = b->next;
	if (b->next)
		b->next->pprev = b->pprev;
	b->file = NULL;
}

/*
 * A fault, or a refresh of a cache, that found the binding open comes after begin and is turned
 * away, or has installed before and is found. Who comes later finds it closed.
 */
static void close_bindings(struct kl_gmem *f)
{
	struct kl_gmem_binding *b;

	while ((b = f->bindings)) {
		kl_gfn_t first = b->base_gfn, last = first + b->npages;

		unlink_binding(b);
		atomic_store(&b->closed, true); /* PAIR(gfn-change) */
		racepoint("gmem-closed");
		kl_gfn_change_begin(f->vm, first, last, "close of a guest_memfd");
		kl_gfn_change_end(f->vm);
	}
}

void kl_gmem_close(struct kl_gmem *f)
{
	struct kl_gmem_inode *i = f->inode;

	kl_mutex_lock(&life);
	if (f->vm) {
		kl_mutex_lock(&f->vm->slots_lock);
		close_bindings(f);
		kl_mutex_unlock(&f->vm->slots_lock);
		unlink_file(f);
	}
	kl_mutex_unlock(&life);
	free(f);
	if (atomic_fetch_sub(&i->nr_files, 1) == 1)
		inode_empty(i);
	kl_gmem_inode_put(i);
}

void kl_gmem_vm_gone(struct kl_vm *vm)
{
	struct kl_gmem *f;

	racepoint("gmem-vm-gone");
	kl_mutex_lock(&life);
	while ((f = vm->gmem_files)) {
		while (f->bindings) {
			atomic_store(&f->bindings->closed, true);
			unlink_binding(f->bindings);
		}
		unlink_file(f);
		f->vm = NULL;
	}
	kl_mutex_unlock(&life);
}

void kl_gmem_after_fork(void)
{
	kl_mutex_init(&life, KL_RANK_GMEM);
}

/* ---- contents ------------------------------------------------------------------------------ */

int kl_gmem_allocate(struct kl_gmem *f, uint64_t off, uint64_t len)
{
	if (off + len < off || off + len > f->inode->size)
		return -EINVAL;
	return (int)kl_sys(SYS_fallocate, f->inode->fd, FALLOC_FL_KEEP_SIZE, off, len);
}

/* F3: one bracket for the files of all VMs. It is there, and ends, whether anything is bound or
 * not. */
int kl_gmem_punch(struct kl_gmem *f, uint64_t off, uint64_t len)
{
	const struct kl_gmem_inode *i = f->inode;
	struct kl_notifier_range r = {
		.event = KL_EVENT_TRUNCATE, .may_block = true, .cause = "hole in a guest_memfd"};
	int ret;

	if (off >= i->size)
		return 0;
	len = kl_min(len, i->size - off);
	r.start = i->hva + off;
	r.end = r.start + len;
	/* Without a mapping there are no bindings. */
	if (i->hva) {
		ret = kl_notifier_begin(&r);
		if (ret)
			return ret;
	}
	racepoint("gmem-punch");
	ret = (int)kl_sys(SYS_fallocate, i->fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, off,
			  len);
	racepoint("gmem-punched");
	if (i->hva)
		kl_notifier_end(&r);
	return ret;
}

uint64_t kl_gmem_allocated(const struct kl_gmem *f)
{
	struct stat st;

	return kl_sys(SYS_fstat, f->inode->fd, &st) ? 0 : (uint64_t)st.st_blocks * 512;
}

/* ---- bindings ------------------------------------------------------------------------------ */

/* Context: slots_lock. */
static bool is_bound(struct kl_vm *vm, const struct kl_gmem *f, uint64_t start, uint64_t end)
{
	struct kl_overlap o;

	for (unsigned as = 0; as < KL_NR_AS; as++)
		kl_for_each_overlap (&o, kl_memslots(vm, as), start, end)
			if (o.in_gmem && o.slot->gmem->file == f)
				return true;
	return false;
}

int kl_gmem_bind(struct kl_vm *vm, struct kl_gmem *f, uint64_t off, kl_gfn_t base_gfn,
		 uint64_t npages, struct kl_gmem_binding **out)
{
	struct kl_gmem_inode *i = f->inode;
	uint64_t size = npages << KL_PAGE_SHIFT;
	struct kl_gmem_binding *b;

	kl_assert_held(&vm->slots_lock);
	if (f->vm != vm || (off & ~KL_PAGE_MASK) || off + size < off || off + size > i->size)
		return -EINVAL;
	if (!i->hva)
		return -ENOMEM;
	if (is_bound(vm, f, i->hva + off, i->hva + off + size))
		return -EINVAL;
	b = kl_failpoint("gmem-bind") ? NULL : calloc(1, sizeof(*b));
	if (!b)
		return -ENOMEM;
	kl_gmem_inode_get(i);
	b->inode = i;
	b->file = f;
	b->hva = i->hva + off;
	b->npages = npages;
	b->base_gfn = base_gfn;
	b->next = f->bindings;
	b->pprev = &f->bindings;
	if (b->next)
		b->next->pprev = &b->next;
	f->bindings = b;
	*out = b;
	return 0;
}

void kl_gmem_unbind(struct kl_gmem_binding *b)
{
	if (b->file)
		unlink_binding(b);
	kl_gmem_inode_put(b->inode);
	free(b);
}
