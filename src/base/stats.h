/* SPDX-License-Identifier: MIT */
/*
 * Counters of a VM and of a vCPU, generated from stats.def.
 *
 * A vCPU's counters are written by its own thread only (relaxed load + store); a VM's by
 * anybody (relaxed add). Both may be read at any time.
 */
#pragma once

#include "base/compiler.h"

typedef _Atomic uint64_t kl_stat_t;

/* What a gfn-to-pfn cache is for. */
#define KL_GPC_STATS(KIND, name) KL_GPC_##KIND,
enum kl_gpc_kind {
#include "base/stats.def"
	KL_NR_GPC_KINDS
};

struct kl_gpc_stats {
	kl_stat_t hits; /* kl_gpc_count_hits() brings it up to date: threads count for themselves */
	kl_stat_t refreshes, invalidations, retries;
};

#define KL_GPC_STATS(KIND, name)
#define KL_VM_STAT(f, n, k) kl_stat_t f;
struct kl_vm_stats {
#include "base/stats.def"
	struct kl_gpc_stats gpc[KL_NR_GPC_KINDS];
};

#define KL_VCPU_STAT(f, n, k) kl_stat_t f;
struct kl_vcpu_stats {
#include "base/stats.def"
};

enum kl_stat_kind { KL_STAT_CUMULATIVE, KL_STAT_INSTANT };

struct kl_stat_desc {
	const char *name;
	enum kl_stat_kind kind;
	uint32_t offset; /* in the struct */
};

extern const struct kl_stat_desc kl_vm_stat_descs[];
extern const struct kl_stat_desc kl_vcpu_stat_descs[];
extern const unsigned kl_vm_nr_stats, kl_vcpu_nr_stats;

/* Any thread. */
KL_INLINE void kl_stat_add(kl_stat_t *s, uint64_t n)
{
	atomic_fetch_add_explicit(s, n, memory_order_relaxed);
}

/* The owning vCPU thread only: no locked instruction. */
KL_INLINE void kl_stat_own_add(kl_stat_t *s, uint64_t n)
{
	atomic_store_explicit(s, atomic_load_explicit(s, memory_order_relaxed) + n,
			      memory_order_relaxed);
}

KL_INLINE uint64_t kl_stat_get(const kl_stat_t *s)
{
	return atomic_load_explicit((kl_stat_t *)s, memory_order_relaxed);
}
