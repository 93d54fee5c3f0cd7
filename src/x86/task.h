/* SPDX-License-Identifier: MIT */
/*
 * Hardware task switches (never in long mode).
 *
 * Everything that the old task can be blamed for leaves before anything changes; what is wrong
 * with the new task is an exception in it. In between, memory may have to be waited for, and
 * the instruction or event begins again: registers are put back (kl_task_undo), and what was
 * stored until then is stored alike once more.
 */
#pragma once

#include "x86/segment.h"

enum kl_task_cause { KL_TASK_JMP, KL_TASK_CALL, KL_TASK_IRET, KL_TASK_EVENT };

/*
 * The TSS that the task gate @gate names; @ext: EXT bit of error codes. May leave. Returns the
 * selector.
 */
uint16_t kl_task_gate(struct kl_vcpu *v, const struct kl_desc *gate, uint32_t ext,
		      struct kl_desc *tss);
/* JMP and CALL to the TSS descriptor @d of @sel: privileges and type. May leave. */
void kl_task_check(struct kl_vcpu *v, uint16_t sel, const struct kl_desc *d);
/*
 * Switch to the checked TSS. @rip is where the old task goes on; @error (may be NULL) is pushed
 * onto the new stack. May leave.
 */
void kl_task_switch(struct kl_vcpu *v, uint16_t sel, struct kl_desc *d, enum kl_task_cause cause,
		    uint64_t rip, const uint32_t *error, uint32_t ext);
/* IRET with NT: back to the task that the current TSS links to. */
void kl_task_return(struct kl_vcpu *v, uint64_t rip);
/* An instruction or event left in the middle, and will be begun again. */
void kl_task_undo(struct kl_vcpu *v);
