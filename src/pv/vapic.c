/* SPDX-License-Identifier: MIT */
/*
 * KVM_SET_VAPIC_ADDR: a word in the guest's memory whose lowest byte is its task priority. A 32-bit
 * guest whose firmware has patched it changes the byte instead of the APIC's register, and needs no
 * exit for it; beside the byte it finds what is in service and what is requested.
 *
 * While v->vapic_lent the byte counts, not the register: the word was written, and the guest may
 * have changed it since. So the byte is fetched before anything that depends on the priority: an
 * interrupt that comes, an access to the APIC, the end of KVM_RUN. What sets the register in
 * another way (CR8, the APIC's page, an MSR) takes the word back; all of these leave guest mode,
 * and the word is written again before the guest goes on.
 */
#include <errno.h>

#include "host/access.h"
#include "pv/pv.h"
#include "x86/lapic.h"

#define LENGTH sizeof(uint32_t)

static bool in_one_page(uint64_t addr)
{
	return (addr & ~KL_PAGE_MASK) + LENGTH <= KL_PAGE_SIZE;
}

static void get(void *p, void *arg)
{
	kl_access_copy(arg, p, LENGTH);
}

static void put(void *p, void *arg)
{
	kl_access_copy(p, arg, LENGTH);
}

int kl_pv_vapic_from_guest(struct kl_vcpu *v)
{
	struct kl_pv_vcpu *pv = v->pv;
	uint32_t word;
	int r = in_one_page(pv->vapic_addr) ? kl_pv_read(&pv->vapic, LENGTH, get, &word)
					    : kl_pv_copy(v, pv->vapic_addr, &word, LENGTH, false);

	if (r == -EINTR)
		return r;
	/* Where the page has gone the priority stays what it was. */
	if (!r)
		kl_apic_set_tpr(v, (uint8_t)word);
	v->vapic_lent = false;
	return 0;
}

int kl_pv_vapic_to_guest(struct kl_vcpu *v)
{
	struct kl_pv_vcpu *pv = v->pv;
	uint32_t word;
	int r = 0;

	if (kl_apic_priorities(v, &word))
		r = in_one_page(pv->vapic_addr)
			    ? kl_pv_write(&pv->vapic, LENGTH, put, &word)
			    : kl_pv_copy(v, pv->vapic_addr, &word, LENGTH, true);
	if (r == -EINTR)
		return r;
	v->vapic_lent = true;
	return 0;
}

int kl_pv_vapic_set(struct kl_vcpu *v, uint64_t addr)
{
	struct kl_vm *mem = &v->kvm->mem;

	if (addr && (addr + LENGTH - 1 < addr || !kl_pv_is_ram(mem, addr >> KL_PAGE_SHIFT) ||
		     !kl_pv_is_ram(mem, (addr + LENGTH - 1) >> KL_PAGE_SHIFT)))
		return -EINVAL;
	v->pv->vapic_next = addr;
	kl_pv_ask(v, KL_PV_VAPIC_MOVED);
	return 0;
}

int kl_pv_vapic_moved(struct kl_vcpu *v)
{
	struct kl_pv_vcpu *pv = v->pv;
	int r;

	/* By the old place. */
	if (v->vapic_lent && kl_pv_vapic_from_guest(v))
		return -EINTR;
	pv->vapic_addr = pv->vapic_next;
	v->vapic = pv->vapic_addr;
	r = v->vapic && in_one_page(pv->vapic_addr)
		    ? kl_gpc_activate(&pv->vapic, pv->vapic_addr, LENGTH)
		    : kl_gpc_deactivate(&pv->vapic);
	return r == -EINTR ? r : 0;
}
