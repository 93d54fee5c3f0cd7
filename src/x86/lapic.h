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
 * Returns: > 0, how many vCPUs accepted it, also where it was pending already; 0, those that are
 * addressed have their APIC disabled; -1, nobody is addressed.
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
/* A tick of the PIT, for those that have LINT0 in NMI mode. */
void kl_apic_nmi_watchdog(struct kl_x86_vm *vm);
/* A corrected machine check. */
void kl_apic_deliver_cmci(struct kl_vcpu *v);

/*
 * ---- the rest is for the vCPU's own files ----
 * Context: the vCPU's thread. What writes registers is OUTSIDE guest mode: the map of
 * destinations may have to be made, a timer's callback to be waited for.
 */

void kl_apic_vm_init(struct kl_x86_vm *vm);
void kl_apic_vm_destroy(struct kl_x86_vm *vm);
/* v->apic. 0, -ENOMEM, -EAGAIN (no thread for timers). Before the first kl_x86_reset(). */
int kl_apic_create(struct kl_vcpu *v) KL_MUST_CHECK;
void kl_apic_destroy(struct kl_vcpu *v);
/* The vCPU is in the VM's table now: it can be addressed. */
void kl_apic_online(struct kl_vcpu *v);
/* Also without an APIC: APIC_BASE. */
void kl_apic_reset(struct kl_vcpu *v, bool init_event);
void kl_apic_cpuid_changed(struct kl_vcpu *v);
/* MCG_CAP has, or has not, CMCI_P: there is an LVT entry for it. */
void kl_apic_set_cmci(struct kl_vcpu *v, bool cmci);

/* An access to the register page. -EOPNOTSUPP: it is not there. */
int kl_apic_mmio(struct kl_vcpu *v, uint64_t gpa, unsigned len, void *data, bool write);
/* x2APIC: MSRs 0x800 to 0x8ff. False: #GP. To read, too, OUTSIDE while PV EOI is pending or the
 * vapic page is lent. */
bool kl_apic_msr_read(struct kl_vcpu *v, uint32_t index, uint64_t *data);
bool kl_apic_msr_write(struct kl_vcpu *v, uint32_t index, uint64_t data);
/* A register as MSRs have it, in any mode; the ICR is one of 64 bits. False: #GP. There is an APIC.
 */
bool kl_apic_wide_read(struct kl_vcpu *v, unsigned reg, uint64_t *data);
bool kl_apic_wide_write(struct kl_vcpu *v, unsigned reg, uint64_t data);
uint64_t kl_apic_tsc_deadline(struct kl_vcpu *v);
void kl_apic_set_tsc_deadline(struct kl_vcpu *v, uint64_t tsc);

/* The vector that is to be delivered now, or -1. */
int kl_apic_interrupt(struct kl_vcpu *v);
/* It is: from IRR to ISR. */
void kl_apic_ack(struct kl_vcpu *v, unsigned vector);
/* The guest ends the interrupt in service. */
void kl_apic_end_of_interrupt(struct kl_vcpu *v);
/* The vector in service, if it is edge-triggered and none is requested meanwhile; else -1. */
int kl_apic_quiet_in_service(struct kl_vcpu *v);
bool kl_apic_accepts_extint(struct kl_vcpu *v);
/* The task priority: the register, whatever a vapic page has. */
void kl_apic_set_tpr(struct kl_vcpu *v, uint8_t tpr);
/* What a vapic page shows: TPR, the class in service, the vector requested. False: not enabled. */
bool kl_apic_priorities(struct kl_vcpu *v, uint32_t *word);
/* The timer has expired and its interrupt is to be made. */
bool kl_apic_timer_due(struct kl_vcpu *v);
void kl_apic_inject_timer(struct kl_vcpu *v);

bool kl_apic_has_init_or_sipi(struct kl_vcpu *v);
bool kl_apic_init_pending(struct kl_vcpu *v);
void kl_apic_set_init_pending(struct kl_vcpu *v, bool pending);
void kl_apic_set_sipi_pending(struct kl_vcpu *v);
void kl_apic_set_sipi_vector(struct kl_vcpu *v, uint8_t vector);
/* Act on INIT and SIPI: mp_state changes, the vCPU may be reset. Not in an instruction. */
void kl_apic_accept_events(struct kl_vcpu *v);

void kl_apic_get_state(struct kl_vcpu *v, struct kvm_lapic_state *s);
int kl_apic_set_state(struct kl_vcpu *v, const struct kvm_lapic_state *s) KL_MUST_CHECK;
