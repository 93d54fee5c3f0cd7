/* SPDX-License-Identifier: MIT */
/*
 * Until the local APIC is there: what it will define, weakly. No vCPU accepts an interrupt.
 */
#include "x86/lapic.h"

__attribute__((weak)) int kl_apic_send(struct kl_x86_vm *vm, struct kl_vcpu *from,
				       const struct kl_apic_msg *m)
{
	return -1;
}

__attribute__((weak)) int kl_apic_send_tracked(struct kl_x86_vm *vm, struct kl_vcpu *from,
					       const struct kl_apic_msg *m,
					       struct kl_apic_dest_set *reached)
{
	return -1;
}

__attribute__((weak)) bool kl_apic_match(struct kl_vcpu *v, uint32_t dest, bool logical)
{
	return false;
}

__attribute__((weak)) bool kl_apic_pending_eoi(struct kl_vcpu *v, unsigned vector)
{
	return false;
}

__attribute__((weak)) void kl_apic_extint_changed(struct kl_x86_vm *vm)
{
}
