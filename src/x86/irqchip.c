/* SPDX-License-Identifier: MIT */
/*
 * The set of interrupt controllers: its birth, its death, and which of them a port belongs to.
 */
#include <errno.h>

#include "x86/ioapic.h"
#include "x86/irq_routing.h"
#include "x86/irqchip.h"
#include "x86/pic.h"
#include "x86/pit.h"

int kl_irqchip_create(struct kl_x86_vm *vm)
{
	int r;

	kl_assert_held(&vm->lock);
	r = kl_irq_routing_create(&vm->routing);
	if (!r)
		r = kl_irq_set_default_routing(vm);
	if (!r)
		r = kl_pic_create(vm, &vm->pic);
	if (!r)
		r = kl_ioapic_create(vm, &vm->ioapic);
	if (r) {
		kl_irqchip_destroy(vm);
		return r;
	}
	atomic_store_explicit(&vm->irqchip, true, memory_order_release);
	return 0;
}

int kl_irqchip_create_split(struct kl_x86_vm *vm, unsigned pins)
{
	int r;

	kl_assert_held(&vm->lock);
	r = kl_irq_routing_create(&vm->routing);
	if (r)
		return r;
	vm->nr_program_pins = pins;
	atomic_store_explicit(&vm->irqchip, true, memory_order_release);
	return 0;
}

void kl_irqchip_destroy(struct kl_x86_vm *vm)
{
	/* Timers first: they raise lines. */
	kl_pit_destroy(atomic_load_explicit(&vm->pit, memory_order_relaxed));
	atomic_store_explicit(&vm->pit, NULL, memory_order_relaxed);
	kl_ioapic_destroy(vm->ioapic);
	vm->ioapic = NULL;
	kl_pic_destroy(vm->pic);
	vm->pic = NULL;
	kl_irq_routing_destroy(vm->routing);
	vm->routing = NULL;
}

int kl_irqchip_pio(struct kl_x86_vm *vm, uint16_t port, unsigned len, void *data, bool write)
{
	struct kl_pit *pit;
	int r;

	if (!vm->pic)
		return -EOPNOTSUPP;
	r = kl_pic_pio(vm->pic, port, len, data, write);
	if (r != -EOPNOTSUPP)
		return r;
	pit = atomic_load_explicit(&vm->pit, memory_order_acquire);
	return pit ? kl_pit_pio(pit, port, len, data, write) : r;
}
