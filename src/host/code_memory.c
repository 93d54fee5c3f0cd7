/* SPDX-License-Identifier: MIT */
#include "host/code_memory.h"

#include <sys/mman.h>
#include <sys/syscall.h>

#include "host/sys.h"

#ifndef MFD_EXEC
#define MFD_EXEC 0x10u
#endif

static uint8_t *map(long fd, size_t size, int prot)
{
	long p = kl_sys(SYS_mmap, 0, size, prot, MAP_SHARED, fd, 0);

	if (p < 0 && p >= -4095)
		return NULL;
	kl_sys(SYS_madvise, p, size, MADV_DONTFORK);
	return (uint8_t *)p;
}

bool kl_code_map(struct kl_code_memory *m, const char *name, size_t size)
{
	long fd = kl_sys(SYS_memfd_create, name, MFD_CLOEXEC | MFD_EXEC);

	*m = (struct kl_code_memory){0};
	if (fd < 0) /* before Linux 6.3 */
		fd = kl_sys(SYS_memfd_create, name, MFD_CLOEXEC);
	if (fd < 0)
		return false;
	if (kl_sys(SYS_ftruncate, fd, size) >= 0) {
		m->rw = map(fd, size, PROT_READ | PROT_WRITE);
		m->rx = map(fd, size, PROT_READ | PROT_EXEC);
	}
	kl_sys(SYS_close, fd);
	if (m->rw && m->rx)
		return true;
	kl_code_unmap(m, size);
	return false;
}

void kl_code_unmap(struct kl_code_memory *m, size_t size)
{
	if (m->rw)
		kl_sys_unmap(m->rw, size);
	if (m->rx)
		kl_sys_unmap(m->rx, size);
	*m = (struct kl_code_memory){0};
}
