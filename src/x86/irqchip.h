/* SPDX-License-Identifier: MIT */
/*
 * The interrupt controllers beside the local APIC, as the rest of the engine sees them: two 8259s
 * (pic.h), the IOAPIC (ioapic.h), the i8254 (pit.h) and the table that says which pins an
 * interrupt number reaches (irq_routing.h).
 *
 *   kvm.irqchip   the engine has the local APICs: KVM_CREATE_IRQCHIP or KVM_CAP_SPLIT_IRQCHIP
 *   kvm.pic       ... and the other controllers: KVM_CREATE_IRQCHIP
 *
 * Both are set once, under kvm.lock, before the first vCPU exists; whoever sees kvm.irqchip set
 * sees pic, ioapic and the routing table that belong to it.
 *
 * Locks, in order: IRQFD, PIT, IOAPIC, PIC, then whatever kl_apic_send() takes. A line is raised
 * or lowered with none of IOAPIC and PIC held.
 */
#pragma once

#include "x86/vcpu.h"

/* Who drives a line: its level is the OR over these. */
enum kl_irq_source { KL_IRQ_USER, KL_IRQ_RESAMPLE, KL_IRQ_PIT, KL_NR_IRQ_SOURCES };

/* The engine has PIC and IOAPIC. */
KL_INLINE bool kl_irqchip_in_kernel(struct kl_x86_vm *vm)
{
	return vm->irqchip && vm->ioapic;
}

/* The engine has local APICs only; PIC and IOAPIC are the program's. */
KL_INLINE bool kl_irqchip_split(struct kl_x86_vm *vm)
{
	return vm->irqchip && !vm->ioapic;
}

/* KVM_CREATE_IRQCHIP. Context: kvm.lock; no vCPU, no irqchip. 0 or -ENOMEM. */
int kl_irqchip_create(struct kl_x86_vm *vm) KL_MUST_CHECK;
/* KVM_CAP_SPLIT_IRQCHIP, with @pins of an IOAPIC that the program has. The same. */
int kl_irqchip_create_split(struct kl_x86_vm *vm, unsigned pins) KL_MUST_CHECK;
/* With the VM: no vCPU is left, and nobody raises a line. */
void kl_irqchip_destroy(struct kl_x86_vm *vm);

/*
 * ---- for the local APIC and the vCPU loop ----
 * Context of all: not IN_GUEST; no lock of the controllers.
 */

/*
 * A vCPU has ended an interrupt (EOI to its APIC, of @vector; @level: its TMR bit). For every
 * EOI: an edge-triggered one, too, may have somebody who waits for it. Cheap if nobody does.
 */
void kl_ioapic_eoi(struct kl_x86_vm *vm, struct kl_vcpu *v, unsigned vector, bool level);

/* Has a pin of the engine's I/O APIC this vector? */
bool kl_ioapic_has_vector(struct kl_x86_vm *vm, unsigned vector);

/*
 * Split irqchip: must the EOI of @vector on @v (@level: its TMR bit) be told to the program
 * (KVM_EXIT_IOAPIC_EOI)? True if a route of one of the program's pins sends it there
 * level-triggered. False without a split irqchip.
 */
bool kl_irqchip_eoi_exits(struct kl_x86_vm *vm, struct kl_vcpu *v, unsigned vector, bool level);

/* KVM_SET_LAPIC: what the IOAPIC knows of interrupts whose EOI is to come (the RTC's). */
void kl_ioapic_lapic_restored(struct kl_x86_vm *vm, struct kl_vcpu *v);

/* The PIC's output is asserted. */
bool kl_pic_pending(struct kl_x86_vm *vm);
/* INTA: the vector (a spurious one if the request has gone), or -1 without a PIC. */
int kl_pic_ack(struct kl_x86_vm *vm);

/*
 * A guest's access to the IOAPIC (MMIO), or to PIC, ELCR, PIT and the speaker's port (PIO).
 * 0 if a device took it, else -EOPNOTSUPP.
 */
int kl_irqchip_mmio(struct kl_x86_vm *vm, uint64_t gpa, unsigned len, void *data,
		    bool write) KL_MUST_CHECK;
int kl_irqchip_pio(struct kl_x86_vm *vm, uint16_t port, unsigned len, void *data,
		   bool write) KL_MUST_CHECK;
