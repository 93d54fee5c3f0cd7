/* SPDX-License-Identifier: MIT */
/*
 * PROCMAP_QUERY (Linux 6.11) asks for one mapping; before, all of /proc/self/maps is read.
 *
 * The descriptor to ask is kept, high and hidden: one that comes and goes among the program's own
 * could meet its dup2() or its close().
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/ioctl.h>
#include <linux/types.h>
#include <string.h>
#include <sys/mman.h>

#include "base/failpoint.h"
#include "host/mapping.h"
#include "host/maps.h"
#include "host/sys.h"

/* The kernel's ABI; Debian 12's headers are older. */
struct query {
	__u64 size;
	__u64 query_flags;
	__u64 query_addr;
	__u64 vma_start, vma_end;
	__u64 vma_flags;
	__u64 vma_page_size;
	__u64 vma_offset;
	__u64 inode;
	__u32 dev_major, dev_minor;
	__u32 vma_name_size;
	__u32 build_id_size;
	__u64 vma_name_addr;
	__u64 build_id_addr;
};
_Static_assert(sizeof(struct query) == 104, "ABI");

#define QUERY          _IOWR('f', 17, struct query)
#define VMA_READABLE   1u
#define VMA_WRITABLE   2u
#define VMA_EXECUTABLE 4u

#define CHUNK_PAGES 512 /* 2 MiB at a time */

static unsigned prot_of(uint64_t flags)
{
	return (flags & VMA_READABLE ? PROT_READ : 0) | (flags & VMA_WRITABLE ? PROT_WRITE : 0) |
	       (flags & VMA_EXECUTABLE ? PROT_EXEC : 0);
}

/* pid << 32 | descriptor: a forked child's own memory is behind another one. */
static _Atomic uint64_t kept;

/* A descriptor for this process, or -1. */
static int query_fd(void)
{
	uint64_t pid = (uint64_t)kl_sys(SYS_getpid, 0) << 32;
	uint64_t old = atomic_load_explicit(&kept, memory_order_relaxed);
	long low;
	int fd;

	if (KL_LIKELY((old & ~0xffffffffull) == pid))
		return (int)old;
	low = kl_sys(SYS_openat, AT_FDCWD, "/proc/self/maps", O_RDONLY | O_CLOEXEC);
	if (low < 0)
		return -1;
	fd = kl_sys_dup((int)low);
	kl_sys(SYS_close, low);
	if (fd < 0)
		return -1;
	if (atomic_compare_exchange_strong(&kept, &old, pid | (uint32_t)fd)) {
		if (old)
			kl_sys_close((int)old); /* the parent's */
		return fd;
	}
	/* Another thread was first. */
	kl_sys_close(fd);
	return (old & ~0xffffffffull) == pid ? (int)old : -1;
}

static bool read_all(uint64_t addr, struct kl_mapping *m)
{
	struct kl_maps_entry e;
	struct kl_maps maps;
	bool found = false;

	if (!kl_maps_open(&maps))
		return false;
	while (!found && kl_maps_next(&maps, &e) && e.start <= addr)
		found = addr < e.end;
	if (found)
		*m = (struct kl_mapping){e.start, e.end, KL_PAGE_SIZE, e.prot};
	kl_maps_close(&maps);
	return found;
}

bool kl_host_mapping(uint64_t addr, struct kl_mapping *m)
{
	struct query q = {.size = sizeof(q), .query_addr = addr};
	static _Atomic bool unsupported;
	int fd = -1;
	long r;

	if (kl_failpoint("host-mapping"))
		return false;
	if (!atomic_load_explicit(&unsupported, memory_order_relaxed))
		fd = query_fd();
	if (fd < 0)
		return read_all(addr, m);
	r = kl_sys(SYS_ioctl, fd, QUERY, &q);
	if (r == -ENOTTY) {
		atomic_store_explicit(&unsupported, true, memory_order_relaxed);
		return read_all(addr, m);
	}
	if (r)
		return false;
	*m = (struct kl_mapping){q.vma_start, q.vma_end, q.vma_page_size, prot_of(q.vma_flags)};
	return true;
}

bool kl_host_resident(uint64_t start, uint64_t end)
{
	unsigned char vec[CHUNK_PAGES];

	for (uint64_t at = start; at < end; at += CHUNK_PAGES * KL_PAGE_SIZE) {
		uint64_t len = kl_min(end - at, CHUNK_PAGES * KL_PAGE_SIZE);

		if (kl_sys(SYS_mincore, at, len, vec))
			return false;
		for (unsigned i = 0; i < len / KL_PAGE_SIZE; i++)
			if (!(vec[i] & 1))
				return false;
	}
	return true;
}
