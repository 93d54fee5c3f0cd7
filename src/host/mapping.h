/* SPDX-License-Identifier: MIT */
/*
 * What the kernel says about the program's memory: which mapping holds an address, and whether
 * all of a range is resident.
 *
 * Context: any but a signal handler; no lock (the kernel may sleep), no allocation.
 */
#pragma once

#include "base/compiler.h"

struct kl_mapping {
	uint64_t start, end;
	uint64_t page_size; /* larger than KL_PAGE_SIZE: hugetlb; as far as the kernel tells */
	unsigned prot;      /* PROT_* */
};

/* False: no mapping there, or nobody can say. */
bool kl_host_mapping(uint64_t addr, struct kl_mapping *m);

/*
 * True if every page of [@start, @end) is resident, or the kernel does not tell this caller
 * (files of others). Page-aligned; stops at the first chunk with an absent page.
 */
bool kl_host_resident(uint64_t start, uint64_t end);
