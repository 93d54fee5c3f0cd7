/* SPDX-License-Identifier: MIT */
/*
 * The GSI routing table: which pins, or which message, an interrupt number stands for; and who
 * listens to what becomes of it.
 *
 * Invariants
 *   (a) A table is immutable and replaced whole. Whoever raises a line copies the routes of its
 *       GSI in a reader section and uses them after it: an interrupt that is raised while the
 *       table is replaced takes the old routes or the new ones, not a mixture.
 *   (b) Listeners are called in a reader section. When kl_irq_listener_del() returns, none of its
 *       calls is running and none will come.
 *
 * Locks: IRQ_ROUTING for changes, the srcu for lookups. A listener takes neither IRQ_ROUTING
 * nor a lock that anybody holds around kl_irq_listener_del().
 */
#pragma once

#include "base/srcu.h"
#include "x86/irqchip.h"

#define KL_MAX_IRQ_ROUTES 4096 /* KVM_CAP_IRQ_ROUTING */
#define KL_NR_IRQCHIPS    3    /* PIC master, PIC slave, IOAPIC: KVM_IRQCHIP_* */
#define KL_PIC_PINS       16
#define KL_IOAPIC_PINS    KVM_IOAPIC_NUM_PINS

/* What a message-signalled interrupt says. */
struct kl_msi {
	uint32_t address_lo, address_hi, data;
};

/* Who wants to know of a GSI. Calls that it does not want are NULL. */
struct kl_irq_listener {
	uint32_t gsi;
	/* The guest ended the interrupt. No lock is held. */
	void (*acked)(struct kl_irq_listener *l);
	/* A pin of it was masked or unmasked. PIC or IOAPIC is held. */
	void (*masked)(struct kl_irq_listener *l, bool mask);
	/* Ask the device whether it still wants the interrupt. IOAPIC is held. */
	void (*resample)(struct kl_irq_listener *l);
	_Atomic(struct kl_irq_listener *) next;
};

/* An empty table. 0 or -ENOMEM. */
int kl_irq_routing_create(struct kl_irq_routing **out) KL_MUST_CHECK;
/* Nobody uses it any more. */
void kl_irq_routing_destroy(struct kl_irq_routing *r);

/*
 * KVM_SET_GSI_ROUTING: replace the table by @n entries. @split: there are no pins.
 * 0; -EINVAL, a bad entry; -ENOMEM. Context: may sleep.
 */
int kl_irq_set_routing(struct kl_x86_vm *vm, const struct kvm_irq_routing_entry *e, unsigned n,
		       bool split) KL_MUST_CHECK;
/* What KVM_CREATE_IRQCHIP begins with: each GSI is the IOAPIC's pin, the first 16 PIC's, too. */
int kl_irq_set_default_routing(struct kl_x86_vm *vm) KL_MUST_CHECK;

/*
 * @source drives the line @gsi to @level. @line_status: the caller wants to know whether the
 * interrupt was lost. Returns: > 0, to how many vCPUs it went; 0, one was pending already; -1,
 * masked or nobody's; -EINVAL, a message that has become invalid.
 * Context: any thread; neither IOAPIC nor PIC. Does not sleep.
 */
int kl_irq_set(struct kl_x86_vm *vm, enum kl_irq_source source, uint32_t gsi, bool level,
	       bool line_status);

/* KVM_SIGNAL_MSI: as kl_irq_set(). */
int kl_irq_send_msi(struct kl_x86_vm *vm, const struct kl_msi *msi);

void kl_irq_listener_add(struct kl_x86_vm *vm, struct kl_irq_listener *l);
/* Context: may sleep; not in a listener. */
void kl_irq_listener_del(struct kl_x86_vm *vm, struct kl_irq_listener *l);
/* Until every listener's call that is running now has returned. Context: the same. */
void kl_irq_listeners_synchronize(struct kl_x86_vm *vm);

/* The guest ended the interrupt of a pin. Context: neither IOAPIC nor PIC. */
void kl_irq_acked(struct kl_x86_vm *vm, unsigned chip, unsigned pin);
void kl_irq_masked(struct kl_x86_vm *vm, unsigned chip, unsigned pin, bool mask);
/* True if somebody was asked. */
bool kl_irq_resample(struct kl_x86_vm *vm, unsigned chip, unsigned pin);
