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

/*
 * Does a segment see large operands by parts? Those of 16-bit addresses, which would wrap in the
 * middle, are checked as a whole.
 */
struct kl_op;
bool kl_checks_parts(const struct kl_op *op);
/* Address of an area of @size bytes, of which AMD's processors show a segment the ends. */
uint64_t kl_area_lin(struct kl_vcpu *v, const struct kl_op *op, unsigned size, bool write);

/*
 * The x87 part of an FXSAVE image (bytes 24 to 31 excepted: MXCSR). @wide: REX.W, which makes
 * the pointers 64 bits wide.
 */
void kl_fx_image(const struct kl_vcpu *v, bool wide, uint8_t image[160]);
void kl_fx_load(struct kl_vcpu *v, bool wide, const uint8_t image[160]);

/* MXCSR and MXCSR_MASK as they are stored. */
struct kl_mxcsr_words {
	uint8_t b[8];
};
struct kl_mxcsr_words kl_mxcsr_words(const struct kl_vcpu *v);

/* XCR0 bits that the engine has on this host; bytes of an XSAVE area; CPUID.0xD.1:EAX. */
uint64_t kl_xcr0_supported(void);
unsigned kl_xsave_size(uint64_t components);
uint32_t kl_xsave_features(void);
