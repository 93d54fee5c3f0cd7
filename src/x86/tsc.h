/* SPDX-License-Identifier: MIT */
/*
 * The guest's time-stamp counter: guest = host * ratio + offset, where the ratio is a fixed-point
 * number of KL_TSC_FRAC bits, as AMD's processors have it.
 */
#pragma once

#include "x86/vcpu.h"

#define KL_TSC_FRAC    32
#define KL_TSC_ONE     (1ull << KL_TSC_FRAC)
#define KL_TSC_MAX     0xffffffffffull /* greatest ratio, exclusive */
#define KL_TSC_PPM     250u            /* a rate that is this close is the host's */
#define KL_TSC_MAX_KHZ 0x7fffffffu

KL_INLINE uint64_t kl_host_tsc(void)
{
	return __builtin_ia32_rdtsc();
}

KL_INLINE uint64_t kl_tsc_scale(const struct kl_vcpu *v, uint64_t host)
{
	if (KL_LIKELY(v->tsc_ratio == KL_TSC_ONE))
		return host;
	return (uint64_t)((unsigned __int128)host * v->tsc_ratio >> KL_TSC_FRAC);
}

/* The host's counter when the guest's is, was or will be @guest. */
uint64_t kl_tsc_to_host(const struct kl_vcpu *v, uint64_t guest);

/* May @khz be asked for? 0 stands for the host's rate. */
bool kl_tsc_khz_valid(const struct kl_x86_vm *vm, uint32_t khz);
/* KVM_SET_TSC_KHZ of a vCPU: 0 or -EINVAL. */
int kl_tsc_set_khz(struct kl_vcpu *v, uint32_t khz) KL_MUST_CHECK;

/* A host TSC write, or the first sight of a vCPU (NULL): keeps vCPUs in step as KVM does. */
void kl_tsc_synchronize(struct kl_vcpu *v, const uint64_t *user_value);
/* Do all vCPUs have one rate and one offset, as far as the program goes? */
bool kl_tsc_matched(const struct kl_x86_vm *vm);
/* KVM_VCPU_TSC_OFFSET. */
void kl_tsc_set_offset(struct kl_vcpu *v, uint64_t offset);
/* WRMSR of the TSC by the guest: TSC_ADJUST follows. */
void kl_tsc_guest_write(struct kl_vcpu *v, uint64_t data);
/* kHz of the host's TSC. */
uint32_t kl_host_tsc_khz(void);
