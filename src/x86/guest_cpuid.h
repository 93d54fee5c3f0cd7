/* SPDX-License-Identifier: MIT */
/* CPUID, for the other files of src/x86. */
#pragma once

#include "host/cpu.h"
#include "x86/vcpu.h"

/* The program's CPUID has bit @bit of register @reg (0 EAX ... 3 EDX). */
bool kl_guest_has(struct kl_vcpu *v, uint32_t fn, uint32_t index, unsigned reg, unsigned bit);
/*
 * Leaf @fn of KVM's own, 0 (the signature) or 1 (features), wherever the program has put them; NULL
 * if the guest is not told that it runs on KVM.
 */
const struct kvm_cpuid_entry2 *kl_kvm_cpuid(struct kl_vcpu *v, uint32_t fn);
/* Xen's leaves, if the program has put them there: how the guest scales its TSC, and its rate. */
void kl_cpuid_set_xen_clock(struct kl_vcpu *v, uint32_t mul, int8_t shift);
/* Derived fields of a vCPU without CPUID. */
void kl_cpuid_defaults(struct kl_vcpu *v);
