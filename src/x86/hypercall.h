/* SPDX-License-Identifier: MIT */
/*
 * Hypercalls: what KVM_CAP_EXIT_HYPERCALL may ask for, and their completion.
 */
#pragma once

#include "x86/vcpu.h"

#define KL_HC_MAP_GPA_RANGE     12
#define KL_HYPERCALL_EXITS_MASK (1u << KL_HC_MAP_GPA_RANGE)

/* The program has answered: v->exit.hypercall.ret goes to the guest. */
void kl_hypercall_complete(struct kl_vcpu *v);
/* KVM_EXIT_XEN: v->exit.xen.result. */
void kl_hypercall_complete_xen(struct kl_vcpu *v);
/* KVM_EXIT_HYPERV: v->exit.hyperv.result. */
void kl_hypercall_complete_hyperv(struct kl_vcpu *v);
