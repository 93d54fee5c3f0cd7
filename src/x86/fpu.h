/* SPDX-License-Identifier: MIT */
/* x87 and SSE state, for all who load it. */
#pragma once

#include "x86/vcpu.h"

#define KL_FPU_FLAGS   0x3fu   /* in FCW: masks, in FSW: exceptions */
#define KL_FSW_SUMMARY 0x8080u /* ES and B */

/*
 * Exceptions that the next waiting instruction raises. ES and B are only a copy of this, and
 * whoever wrote the image of the state may have put anything there.
 */
KL_INLINE uint16_t kl_fpu_pending(const struct kl_vcpu *v)
{
	const uint16_t *fx = (const uint16_t *)(const void *)v->xsave;

	return fx[1] & (uint16_t)~fx[0] & KL_FPU_FLAGS;
}

/* What a processor does when it loads FCW or FSW. */
KL_INLINE void kl_fpu_summarize(struct kl_vcpu *v)
{
	uint16_t *fsw = (uint16_t *)(void *)(v->xsave + 2);

	*fsw = (uint16_t)(kl_fpu_pending(v) ? *fsw | KL_FSW_SUMMARY : *fsw & ~KL_FSW_SUMMARY);
}

bool kl_mxcsr_valid(uint32_t mxcsr);
void kl_fpu_reset(struct kl_vcpu *v);
