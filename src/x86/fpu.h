/* SPDX-License-Identifier: MIT */
/* x87 and SSE state, for state.c. */
#pragma once

#include "x86/vcpu.h"

bool kl_mxcsr_valid(uint32_t mxcsr);
void kl_fpu_reset(struct kl_vcpu *v);
