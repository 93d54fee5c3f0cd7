/* SPDX-License-Identifier: MIT */
/* A bitmap in pages that are mapped on first use and never go. */
#include <sys/mman.h>

#include "base/hidden_fd.h"
#include "base/syscall.h"

#define PAGE_BITS (1u << 15)
#define NR_PAGES  512u
#define WORDS     (PAGE_BITS / 64)

static _Atomic(_Atomic uint64_t *) pages[NR_PAGES];

static _Atomic uint64_t *word_of(int fd)
{
	_Atomic uint64_t *page;

	if ((unsigned)fd >= PAGE_BITS * NR_PAGES)
		return NULL;
	page = atomic_load_explicit(&pages[(unsigned)fd / PAGE_BITS], memory_order_acquire);
	return page ? &page[(unsigned)fd % PAGE_BITS / 64] : NULL;
}

void kl_fd_hide(int fd)
{
	_Atomic uint64_t *expected = NULL;
	long page;

	if ((unsigned)fd >= PAGE_BITS * NR_PAGES)
		return;
	if (!word_of(fd)) {
		page = kl_sys(SYS_mmap, NULL, WORDS * 8, PROT_READ | PROT_WRITE,
			      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (page < 0)
			return;
		if (!atomic_compare_exchange_strong(&pages[(unsigned)fd / PAGE_BITS], &expected,
						    (_Atomic uint64_t *)page))
			kl_sys(SYS_munmap, page, WORDS * 8);
	}
	atomic_fetch_or(word_of(fd), 1ull << (fd & 63));
}

void kl_fd_unhide(int fd)
{
	_Atomic uint64_t *w = word_of(fd);

	if (w)
		atomic_fetch_and(w, ~(1ull << (fd & 63)));
}

bool kl_fd_hidden(int fd)
{
	_Atomic uint64_t *w = word_of(fd);

	return w && (atomic_load_explicit(w, memory_order_relaxed) >> (fd & 63) & 1);
}

int kl_fd_next_hidden(unsigned from)
{
	for (unsigned fd = from; fd < PAGE_BITS * NR_PAGES;) {
		_Atomic uint64_t *w;
		uint64_t bits;

		if (!atomic_load_explicit(&pages[fd / PAGE_BITS], memory_order_acquire)) {
			fd = (fd / PAGE_BITS + 1) * PAGE_BITS;
			continue;
		}
		w = word_of((int)fd);
		bits = atomic_load_explicit(w, memory_order_relaxed) >> (fd & 63);
		if (bits)
			return (int)fd + __builtin_ctzll(bits);
		fd = (fd | 63) + 1;
	}
	return -1;
}
