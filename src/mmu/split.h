/* SPDX-License-Identifier: MIT */
/*
 * KVM's eager_page_split: large leaves of a slot become small ones when it begins to log, so that a
 * program sees the pages that it is going to migrate counted as 4 KiB, and they become large again
 * when it has ended. The logs themselves have no need of it (mem/dirty.h), so it is off unless
 * asked for.
 *
 * A leaf is replaced by a table whose leaves map the same pages with the same rights: pointers that
 * vCPUs hold stay true, and nothing is flushed. The lock is held for writing, for one table at a
 * time; without it only ACCESSED may change meanwhile, and then the copy is made again.
 */
#pragma once

#include "mmu/stage2.h"

/* As the process was started; before there is a VM. */
extern bool kl_eager_page_split;

/*
 * Split the large leaves of [@first, @last). For lack of memory some may stay, as in KVM.
 * Context: no lock from mmu_lock on.
 */
void kl_mmu_split_range(struct kl_vm *vm, unsigned as, kl_gfn_t first, kl_gfn_t last);
