/* SPDX-License-Identifier: MIT */
/*
 * The two 8259s of a PC, the slave on the master's pin 2, with the edge/level registers (ELCR).
 *
 * Lock: PIC. Listeners to an acknowledge are called with the lock dropped, in the middle of the
 * command that caused it; the chip's state is whole then, and others may change it. The output is
 * read without the lock: who raised it has woken whoever accepts it (kl_apic_extint_changed())
 * afterwards, so that a vCPU which saw the old value looks again.
 */
#pragma once

#include "x86/irqchip.h"

int kl_pic_create(struct kl_x86_vm *vm, struct kl_pic **out) KL_MUST_CHECK;
void kl_pic_destroy(struct kl_pic *pic);

/* Pin 0 to 15. > 0; 0, its request was pending; -1, masked. As kl_irq_set(). */
int kl_pic_set_irq(struct kl_pic *pic, unsigned pin, enum kl_irq_source source, bool level);

/* KVM_GET_IRQCHIP, KVM_SET_IRQCHIP. Any state is accepted, and none does harm. */
void kl_pic_get(struct kl_pic *pic, bool slave, struct kvm_pic_state *s);
void kl_pic_set(struct kl_pic *pic, bool slave, const struct kvm_pic_state *s);
/* KVM_SET_IRQCHIP of any chip looks at the output again. */
void kl_pic_update(struct kl_pic *pic);

int kl_pic_pio(struct kl_pic *pic, uint16_t port, unsigned len, void *data,
	       bool write) KL_MUST_CHECK;
