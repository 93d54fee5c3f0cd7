/* SPDX-License-Identifier: MIT */
/*
 * Lines of --trace that explain memory: what was invalidated by which host call, what it cost, how
 * long it lasted, and which faults followed.
 *
 * Every invalidation of a VM has a number. The last few are remembered while tracing, so that a
 * fault can name the one that it follows or waits for.
 *
 * Without tracing vm->mmu->trace is NULL, and nothing here is called.
 */
#pragma once

#include "mem/notifier.h"
#include "mmu/stage2.h"

enum kl_fault_retry {
	KL_RETRY_NONE,
	KL_RETRY_IN_PROGRESS, /* an invalidation that covers the page is under way */
	KL_RETRY_SEQ,         /* one came and went since the fault began */
	KL_RETRY_SLOTS,       /* the slots changed, or are changing */
};

/* How a fault went. */
struct kl_fault_report {
	enum kl_fault_retry retry;
	unsigned level; /* of the leaf */
};

/* What a zap cost, over all its batches. */
struct kl_flush_report {
	uint64_t begun_ns;
	uint64_t leaves;
	uint64_t flush_ns;   /* in all flushes */
	unsigned waits;      /* how often a vCPU was in the way */
	unsigned slowest_id; /* of the vCPU that took longest */
	uint64_t slowest_ns;
};

/* NULL if tracing is off, or there is no memory. */
struct kl_mmu_trace *kl_mmu_trace_create(void);
void kl_mmu_trace_destroy(struct kl_mmu_trace *t);

/* Of [@first, @last), after the flush. @range NULL: a change of slots, which is over with it. */
void kl_mmu_trace_begin(struct kl_vm *vm, const struct kl_notifier_range *range, const char *cause,
			kl_gfn_t first, kl_gfn_t last, const struct kl_flush_report *f);
void kl_mmu_trace_end(struct kl_vm *vm, const struct kl_notifier_range *range);
void kl_mmu_trace_fault(struct kl_vcpu_core *c, kl_gpa_t gpa, unsigned access, int result,
			const struct kl_fault_report *rep, uint64_t begun_ns);
