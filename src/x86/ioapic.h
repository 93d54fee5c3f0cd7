/* SPDX-License-Identifier: MIT */
/*
 * The IOAPIC: 24 pins at KL_IOAPIC_BASE.
 *
 * Invariants
 *   (a) While a level-triggered interrupt is between its delivery and its EOI (remote IRR), its
 *       pin delivers nothing; if the line is still high at the EOI, it delivers again.
 *   (b) Who listens to the EOI is told before remote IRR is cleared, with the lock dropped: what
 *       a listener raises meanwhile waits in irr and is delivered after it returned.
 *   (c) An EOI is the pin's if the vCPU is among the entry's destinations, or was when the
 *       interrupt was delivered: a guest that retargets a pin with an interrupt in service does
 *       not leave remote IRR set for ever.
 *
 * Lock: IOAPIC; messages are sent with it held.
 */
#pragma once

#include "x86/irqchip.h"

#define KL_IOAPIC_BASE 0xfec00000u

/* 0 or -ENOMEM. */
int kl_ioapic_create(struct kl_x86_vm *vm, struct kl_ioapic **out) KL_MUST_CHECK;
void kl_ioapic_destroy(struct kl_ioapic *io);

/* As kl_irq_set(). Context: IOAPIC not held. */
int kl_ioapic_set_irq(struct kl_ioapic *io, unsigned pin, enum kl_irq_source source, bool level,
		      bool line_status);

/* KVM_GET_IRQCHIP, KVM_SET_IRQCHIP; requests in a state that is set are delivered at once. */
void kl_ioapic_get(struct kl_ioapic *io, struct kvm_ioapic_state *s);
void kl_ioapic_set(struct kl_ioapic *io, const struct kvm_ioapic_state *s);
