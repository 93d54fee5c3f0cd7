/* SPDX-License-Identifier: MIT */
/*
 * The local APIC of a vCPU, with KVM_CREATE_IRQCHIP or KVM_CAP_SPLIT_IRQCHIP.
 *
 * Who may do what
 *   - The vCPU's thread, or an ioctl that holds the vCPU's mutex: everything.
 *   - Any thread: kl_apic_send(), kl_apic_match(), kl_apic_pending_eoi(),
 *     kl_apic_extint_changed(). They take no lock and do not sleep, and so may be called with
 *     any lock held and from a timer's callback.
 *
 * Invariant (nothing is lost): who sets an IRR bit, a pending INIT, SIPI, NMI or timer sets it
 * before it sets KL_REQ_EVENT; the vCPU takes KL_REQ_EVENT off before it looks at these.
 */
#pragma once

#include "x86/vcpu.h"

enum kl_apic_delivery {
	KL_APIC_FIXED = 0,
	KL_APIC_LOWEST = 1,
	KL_APIC_SMI = 2,
	KL_APIC_REMRD = 3,
	KL_APIC_NMI = 4,
	KL_APIC_INIT = 5,
	KL_APIC_STARTUP = 6,
	KL_APIC_EXTINT = 7,
};

enum kl_apic_shorthand { KL_APIC_NOSHORT, KL_APIC_SELF, KL_APIC_ALL, KL_APIC_OTHERS };

/* An interrupt message: what an IPI, an I/O APIC's pin or an MSI says. */
struct kl_apic_msg {
	uint32_t dest;
	bool logical;
	bool level;           /* asserted (INIT: de-assert is ignored) */
	bool level_triggered; /* sets the TMR bit: its EOI goes to the I/O APIC */
	bool redir_hint;      /* MSI: lowest priority among the logical destination */
	uint8_t delivery;     /* enum kl_apic_delivery */
	uint8_t vector;
	uint8_t shorthand; /* enum kl_apic_shorthand; needs @from */
};

/* vCPUs, by kl_vcpu_core.index: whom a message reached. */
struct kl_apic_dest_set {
	uint64_t bits[(KL_MAX_VCPUS + 63) / 64];
};

/*
 * Deliver @m. @from: the sending vCPU, NULL for devices. @reached (may be NULL): bits of the
 * vCPUs that accepted it are added.
 * Returns: > 0, how many vCPUs accepted it; 0, all had it pending already (coalesced); -1,
 * nobody was addressed or listens.
 * Context: any thread, any lock; does not sleep.
 */
int kl_apic_send(struct kl_x86_vm *vm, struct kl_vcpu *from, const struct kl_apic_msg *m);
int kl_apic_send_tracked(struct kl_x86_vm *vm, struct kl_vcpu *from, const struct kl_apic_msg *m,
			 struct kl_apic_dest_set *reached);

/* Would a message from a device with this destination reach @v? */
bool kl_apic_match(struct kl_vcpu *v, uint32_t dest, bool logical);
/* Is @vector requested or in service at @v: will its EOI come? */
bool kl_apic_pending_eoi(struct kl_vcpu *v, unsigned vector);

/* The PIC's output rose: wake who accepts ExtINT. */
void kl_apic_extint_changed(struct kl_x86_vm *vm);
