/* SPDX-License-Identifier: MIT */
/*
 * Memory that glibc's allocator gives back to the kernel by calls that cannot be wrapped (N1):
 * blocks that it mapped, and large blocks at the top of the heap. Bracketed while a VM exists.
 *
 * A block's size word is read only if free() is glibc's own; another allocator (jemalloc, a
 * sanitizer's) unmaps through munmap() and madvise(), which are wrapped.
 */
#include <dlfcn.h>
#include <link.h>
#include <stdlib.h>

#include "preload/preload.h"

#define PREV_INUSE 1ul
#define IS_MMAPPED 2ul
#define FLAGS      7ul
/* From here on free() looks whether it should trim the heap. */
#define LARGE (64ul << 10)

enum owner { UNKNOWN, GLIBC, OTHER };
static _Atomic int heap_owner;

static enum owner find_owner(void)
{
	struct link_map *a = NULL, *b = NULL;
	void *libc_free = dlsym(RTLD_NEXT, "__libc_free");
	Dl_info info;

	if (!libc_free || !dladdr1(libc_free, &info, (void **)&a, RTLD_DL_LINKMAP) ||
	    !dladdr1((void *)REAL(free), &info, (void **)&b, RTLD_DL_LINKMAP))
		return OTHER;
	return a == b ? GLIBC : OTHER;
}

static bool is_glibc(void)
{
	int o = atomic_load_explicit(&heap_owner, memory_order_relaxed);

	return o == GLIBC;
}

void kl_heap_init(void)
{
	atomic_store_explicit(&heap_owner, find_owner(), memory_order_relaxed);
}

/* What may leave the address space when @p is freed; false: nothing of interest. */
static bool extent(void *p, uint64_t *start, uint64_t *len)
{
	size_t *chunk = (size_t *)p - 2;
	size_t size;

	if (!p || ((uintptr_t)p & 15) || !is_glibc())
		return false;
	size = chunk[1] & ~FLAGS;
	if (chunk[1] & IS_MMAPPED) {
		/* chunk[0]: distance from the start of the mapping (aligned allocations) */
		*start = (uint64_t)(uintptr_t)chunk - chunk[0];
		*len = chunk[0] + size;
		return true;
	}
	*start = (uint64_t)(uintptr_t)chunk;
	*len = size;
	return size >= LARGE;
}

WRAP(void, free, (void *p))
{
	uint64_t start, len;
	struct kl_bracket b;

	if (KL_LIKELY(!kl_notifier_active()) || kl_engine_active() || !extent(p, &start, &len)) {
		REAL(free)(p);
		return;
	}
	kl_bracket_begin(&b, (void *)(uintptr_t)start, len, KL_EVENT_UNMAP, "free");
	REAL(free)(p);
	kl_bracket_end(&b);
}

WRAP(void *, realloc, (void *p, size_t size))
{
	uint64_t start, len;
	struct kl_bracket b;
	void *q;

	if (KL_LIKELY(!kl_notifier_active()) || kl_engine_active() || !extent(p, &start, &len))
		return REAL(realloc)(p, size);
	kl_bracket_begin(&b, (void *)(uintptr_t)start, len, KL_EVENT_REMAP, "realloc");
	q = REAL(realloc)(p, size);
	kl_bracket_end(&b);
	return q;
}

WRAP(void *, reallocarray, (void *p, size_t n, size_t size))
{
	uint64_t start, len;
	struct kl_bracket b;
	void *q;

	if (KL_LIKELY(!kl_notifier_active()) || kl_engine_active() || !extent(p, &start, &len))
		return REAL(reallocarray)(p, n, size);
	kl_bracket_begin(&b, (void *)(uintptr_t)start, len, KL_EVENT_REMAP, "reallocarray");
	q = REAL(reallocarray)(p, n, size);
	kl_bracket_end(&b);
	return q;
}

/* Gives back free pages anywhere in the heap. */
WRAP(int, malloc_trim, (size_t pad))
{
	struct kl_bracket b = {.state = KL_BRACKET_NONE};
	uint64_t brk, start;
	int r;

	if (kl_notifier_active() && !kl_engine_active() && is_glibc()) {
		brk = (uint64_t)kl_sys(SYS_brk, 0);
		start = kl_maps_heap(brk);
		kl_bracket_begin(&b, (void *)(uintptr_t)start, brk - start, KL_EVENT_DISCARD,
				 "malloc_trim");
	}
	r = REAL(malloc_trim)(pad);
	kl_bracket_end(&b);
	return r;
}

/* ---- the program's own break ------------------------------------------------------------ */

static void shrink(struct kl_bracket *b, uint64_t from, uint64_t to, const char *cause)
{
	if (to < from)
		kl_bracket_begin(b, (void *)(uintptr_t)to, from - to, KL_EVENT_UNMAP, cause);
}

static void grown(uint64_t from, const char *cause)
{
	uint64_t to = (uint64_t)kl_sys(SYS_brk, 0);

	if (to > from)
		kl_bracket_after((void *)(uintptr_t)from, to - from, KL_EVENT_REPLACE, cause);
}

WRAP(int, brk, (void *to))
{
	struct kl_bracket b = {.state = KL_BRACKET_NONE};
	uint64_t cur;
	int r;

	if (KL_LIKELY(!kl_notifier_active()))
		return REAL(brk)(to);
	cur = (uint64_t)kl_sys(SYS_brk, 0);
	if (to)
		shrink(&b, cur, (uint64_t)(uintptr_t)to, "brk");
	r = REAL(brk)(to);
	kl_bracket_end(&b);
	if (!r)
		grown(cur, "brk");
	return r;
}

WRAP(void *, sbrk, (intptr_t delta))
{
	struct kl_bracket b = {.state = KL_BRACKET_NONE};
	uint64_t cur;
	void *r;

	if (!delta || KL_LIKELY(!kl_notifier_active()))
		return REAL(sbrk)(delta);
	cur = (uint64_t)kl_sys(SYS_brk, 0);
	shrink(&b, cur, cur + (uint64_t)delta, "sbrk");
	r = REAL(sbrk)(delta);
	kl_bracket_end(&b);
	if (delta > 0 && r != (void *)-1)
		grown(cur, "sbrk");
	return r;
}

/* brk(2): the kernel's return value, which is never an error. */
long kl_pl_brk(long to)
{
	struct kl_bracket b = {.state = KL_BRACKET_NONE};
	uint64_t cur;
	long r;

	if (!to || !kl_notifier_active())
		return kl_sys(SYS_brk, to);
	cur = (uint64_t)kl_sys(SYS_brk, 0);
	shrink(&b, cur, (uint64_t)to, "brk");
	r = kl_sys(SYS_brk, to);
	kl_bracket_end(&b);
	grown(cur, "brk");
	return r;
}
