/* SPDX-License-Identifier: MIT */
/* CPUID, for the other files of src/x86. */
#pragma once

#include "host/cpu.h"
#include "x86/vcpu.h"

/* The program's CPUID has bit @bit of register @reg (0 EAX ... 3 EDX). */
bool kl_guest_has(struct kl_vcpu *v, uint32_t fn, uint32_t index, unsigned reg, unsigned bit);
/* Derived fields of a vCPU without CPUID. */
void kl_cpuid_defaults(struct kl_vcpu *v);
