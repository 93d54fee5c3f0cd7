/* SPDX-License-Identifier: MIT */
/*
 * PV EOI: a word in the guest's memory whose bit 0 says that the interrupt in service needs no EOI.
 * The guest takes it off instead of sending one, and the engine finds out when it next looks.
 *
 *   bit          v->pv_eoi_pending
 *   any          false               the guest has to send EOIs
 *   1            true                it may take the bit off
 *   0            true                it has: its interrupt is over
 *
 * So it is looked at before anything that depends on what is in service: an interrupt that comes,
 * an access to the APIC, the end of KVM_RUN. Then the bit is taken back, and set again before the
 * guest goes on if that is still right.
 */
#include <errno.h>

#include "host/access.h"
#include "host/atomic.h"
#include "pv/pv.h"
#include "x86/irqchip.h"
#include "x86/lapic.h"

#define ENABLED 1ull
#define NO_EOI  1u

static void take_bit(void *p, void *arg)
{
	*(bool *)arg = kl_xchg8(p, 0) & NO_EOI;
}

static void put_bit(void *p, void *arg)
{
	(void)arg;
	kl_store8(p, NO_EOI);
}

int kl_pv_eoi_from_guest(struct kl_vcpu *v)
{
	bool was_set;
	int r = kl_pv_write(&v->pv->eoi, 1, take_bit, &was_set);

	if (r == -EINTR)
		return r;
	v->pv_eoi_pending = false;
	/* As KVM, where the page has gone. */
	if (r || !was_set)
		kl_apic_end_of_interrupt(v);
	return 0;
}

void kl_pv_eoi_to_guest(struct kl_vcpu *v)
{
	int vector = kl_apic_quiet_in_service(v);

	/* Who waits for the EOI of an I/O APIC's pin is told at once. */
	if (vector < 0 || kl_ioapic_has_vector(v->kvm, (unsigned)vector))
		return;
	if (!kl_pv_write(&v->pv->eoi, 1, put_bit, NULL))
		v->pv_eoi_pending = true;
}

enum kl_pv_result kl_pv_eoi_set(struct kl_vcpu *v, uint64_t msr)
{
	if (msr & ~ENABLED & 3)
		return KL_PV_REFUSED;
	if ((msr & ENABLED) && !kl_pv_is_ram(&v->kvm->mem, msr >> KL_PAGE_SHIFT))
		return KL_PV_REFUSED;
	v->pv->eoi_msr = msr;
	kl_pv_ask(v, KL_PV_EOI_MOVED);
	return KL_PV_OK;
}

int kl_pv_eoi_moved(struct kl_vcpu *v)
{
	uint64_t msr = v->pv->eoi_msr;
	int r;

	/* By the old place. */
	if (v->pv_eoi_pending && kl_pv_eoi_from_guest(v))
		return -EINTR;
	v->pv_eoi = (msr & ENABLED) && v->apic;
	r = msr & ENABLED ? kl_gpc_activate(&v->pv->eoi, msr & ~ENABLED, 1)
			  : kl_gpc_deactivate(&v->pv->eoi);
	return r == -EINTR ? r : 0;
}
