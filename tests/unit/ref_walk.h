/* SPDX-License-Identifier: MIT */
/*
 * Guest paging as the architecture manuals have it, written from them alone: the reference that
 * test_x86_walk.c compares the vCPU with. Slow and plain on purpose: one table per kind of entry.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

enum ref_paging { REF_NONE, REF_32, REF_PAE, REF_4LEVEL, REF_5LEVEL, REF_NR_PAGING };
enum ref_kind { REF_READ, REF_WRITE, REF_EXEC, REF_SYS_READ, REF_SYS_WRITE, REF_NR_KINDS };

struct ref_cfg {
	enum ref_paging paging;
	bool wp, pse, smep, smap, pke, nxe, ac, user;
	bool amd; /* whose manual where they differ */
	uint32_t pkru;
	unsigned maxphyaddr;
	uint64_t cr3;
	uint64_t pdpte[4]; /* PAE: what the last load of CR3 read */
};

enum ref_status { REF_OK, REF_PF, REF_GP };

struct ref_result {
	enum ref_status status;
	uint64_t gpa;
	uint32_t error;
	/* The entries that were used: where they are, and the A and D bits that the access sets. */
	unsigned n;
	struct {
		uint64_t gpa;
		uint64_t set;
		unsigned size;
	} entry[5];
};

/* @mem: guest memory from 0; entries beyond @size do not exist in these tests. */
struct ref_result ref_walk(const struct ref_cfg *c, const uint8_t *mem, uint64_t size, uint64_t lin,
			   enum ref_kind kind);
