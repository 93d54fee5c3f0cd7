/* SPDX-License-Identifier: MIT */
/*
 * The i8254: three counters at ports 0x40 to 0x43, of which the first interrupts on GSI 0, and
 * the speaker's port 0x61.
 *
 * Reinjection: ticks that come while the guest has not ended the last one's interrupt are counted
 * (pending) and made up for, one at each end.
 *
 * Invariants
 *   (a) pending is raised before a tick asks whether the last one was acknowledged (irq_ack), and
 *       an acknowledge sets irq_ack before it looks at pending: one of the two injects.
 *   (b) period and periodic change only while the timer is cancelled.
 *
 * Lock: PIT, for registers and for changes of the mode of reinjection. The timer's callback and
 * the listener take it not.
 */
#pragma once

#include "x86/irqchip.h"

/* KVM_CREATE_PIT2. Context: kvm.lock. 0 or -ENOMEM. */
int kl_pit_create(struct kl_x86_vm *vm, uint32_t flags, struct kl_pit **out) KL_MUST_CHECK;
/* No vCPU runs. */
void kl_pit_destroy(struct kl_pit *pit);

void kl_pit_get(struct kl_pit *pit, struct kvm_pit_state2 *s);
/* KVM_SET_PIT leaves the flags alone: @v2 false. Counting starts anew. */
void kl_pit_set(struct kl_pit *pit, const struct kvm_pit_state2 *s, bool v2);
void kl_pit_set_reinject(struct kl_pit *pit, bool reinject);

int kl_pit_pio(struct kl_pit *pit, uint16_t port, unsigned len, void *data,
	       bool write) KL_MUST_CHECK;
