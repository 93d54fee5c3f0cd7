/* SPDX-License-Identifier: MIT */
/*
 * A sequence of memory-region calls, made from a seed: shared by its generator and by the
 * program that carries it out. What is generated depends on the seed and the features alone,
 * never on an answer, so that any call can be left out of a sequence.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#define PAGE      4096ull
#define MAX_CALLS 40

/*
 * The program's memory: a pool of pages at an address that is free everywhere, also under
 * sanitizers. Its parts begin as listed; calls change them.
 */
#define POOL        0x7e9000000000ull
#define POOL_ANON   0  /* private anonymous */
#define POOL_RO     64 /* private anonymous, read-only */
#define POOL_HOLE   72 /* not mapped */
#define POOL_PAST   80 /* shared file, past its end */
#define POOL_SHARED 88 /* shared file */
#define POOL_PAGES  96

/* Guest-physical addresses that the guest reaches: 2 MiB windows from these. */
#define WINDOWS 12
extern const uint64_t windows[WINDOWS];
/* Code, page tables: a slot that no generated call uses or overlaps. */
#define CODE_GPA  0x40000000ull
#define CODE_SIZE 0x10000ull
#define CODE_ID   0x1000

/* What a KVM must have for some calls. */
enum {
	FEATURE_SET2 = 1,   /* KVM_SET_USER_MEMORY_REGION2 */
	FEATURE_LOG = 2,    /* KVM_MEM_LOG_DIRTY_PAGES */
	FEATURE_MANUAL = 4, /* KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 */
	FEATURE_CLEAR = 8,  /* KVM_CLEAR_DIRTY_LOG of a log */
	FEATURE_ONE = 16,   /* no second address space: one is refused */
};

enum what { SET, SET2, GET_LOG, CLEAR_LOG, MANUAL, GUEST, HOST };

enum guest_op {
	LOAD1,
	LOAD2,
	LOAD4,
	LOAD8,
	STORE1,
	STORE2,
	STORE4,
	STORE8,
	XCHG8,
	ADD4,
	FETCH,
	OPS
};

enum host_op {
	HOST_LOAD,
	HOST_STORE,
	HOST_DISCARD,  /* madvise(MADV_DONTNEED) */
	HOST_READONLY, /* mprotect */
	HOST_WRITABLE,
	HOST_NONE,
	HOST_UNMAP,
	HOST_MAP,   /* fresh anonymous memory */
	HOST_PUNCH, /* a hole into the shared file */
	HOST_OPS,
};

enum pointer { GOOD, BAD_POINTER, HALF_POINTER };

struct call {
	enum what what;
	enum pointer ptr;
	/* SET, SET2 */
	uint32_t slot, flags;
	uint64_t gpa, size, hva, gmem_offset;
	uint32_t gmem, pad;
	/* logs */
	uint64_t first, bits;
	uint32_t num;
	/* GUEST, HOST */
	unsigned op, page, npages;
	uint64_t value;
};

struct sequence {
	unsigned n;
	bool fresh; /* the pool has not been touched; otherwise each page has its mark */
	struct call calls[MAX_CALLS];
};

void generate(struct sequence *s, uint64_t seed, unsigned features);
