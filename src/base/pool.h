/* SPDX-License-Identifier: MIT */
/*
 * Zeroed 4 KiB pages that do not come from the program's allocator: page tables are freed
 * inside notifier brackets, and a bracket may run inside the program's own free() (N4).
 */
#pragma once

#include "base/compiler.h"

/* A zeroed page, or NULL. Context: any but a signal handler. */
void *kl_page_alloc(void);
/* The page's contents may be anything. Context: as alloc. */
void kl_page_free(void *page);
/* Pages handed out and not given back: tests check for leaks. */
uint64_t kl_pages_in_use(void);
/* After fork, in the child. */
void kl_pool_after_fork(void);
