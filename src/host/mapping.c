/* SPDX-License-Identifier: MIT */
/*
 * PROCMAP_QUERY (Linux 6.11) asks for one mapping; before, all of /proc/self/maps is read.
 */
#include <fcntl.h>
#include <linux/ioctl.h>
#include <linux/types.h>
#include <string.h>
#include <sys/mman.h>

#include "base/syscall.h"
#include "host/mapping.h"
#include "host/maps.h"

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

static bool read_all(struct kl_maps *maps, uint64_t addr, struct kl_mapping *m)
{
	struct kl_maps_entry e;

	while (kl_maps_next(maps, &e) && e.start <= addr)
		if (addr < e.end) {
			*m = (struct kl_mapping){e.start, e.end, KL_PAGE_SIZE, e.prot};
			return true;
		}
	return false;
}

bool kl_host_mapping(uint64_t addr, struct kl_mapping *m)
{
	struct query q = {.size = sizeof(q), .query_addr = addr};
	struct kl_maps maps;
	bool found = false;

	if (!kl_maps_open(&maps))
		return false;
	if (!kl_sys(SYS_ioctl, maps.fd, QUERY, &q)) {
		*m = (struct kl_mapping){q.vma_start, q.vma_end, q.vma_page_size,
					 prot_of(q.vma_flags)};
		found = true;
	} else {
		found = read_all(&maps, addr, m);
	}
	kl_maps_close(&maps);
	return found;
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
