/* SPDX-License-Identifier: MIT */
/* The paravirtual part of a VM and of a vCPU: life, MSRs, hypercalls, and when its pages are
 * written. */
#include "pv/pv.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "base/failpoint.h"
#include "host/guard.h"
#include "x86/access.h"
#include "x86/guest_cpuid.h"
#include "x86/lapic.h"
#include "x86/msr.h"

#define STEAL_RESERVED 0x3eull

/* ---- life ------------------------------------------------------------------------------- */

int kl_pv_vm_create(struct kl_x86_vm *vm)
{
	struct kl_pv_vm *pv = kl_failpoint("pv-vm")
				      ? NULL
				      : aligned_alloc(_Alignof(struct kl_pv_vm), sizeof(*pv));
	int r;

	if (!pv)
		return -ENOMEM;
	memset(pv, 0, sizeof(*pv));
	kl_mutex_init(&pv->lock, KL_RANK_LEAF);
	pv->master = kl_pv_now();
	pv->clock_offset = -(int64_t)pv->master.boot;
	vm->pv = pv;
	r = kl_xen_vm_init(vm);
	if (r) {
		kl_mutex_destroy(&pv->lock);
		free(pv);
		return r;
	}
	kl_hv_vm_init(vm);
	return 0;
}

void kl_pv_vm_destroy(struct kl_x86_vm *vm)
{
	kl_hv_vm_destroy(vm);
	kl_xen_vm_destroy(vm);
	kl_mutex_destroy(&vm->pv->lock);
	free(vm->pv);
}

int kl_pv_vcpu_create(struct kl_vcpu *v)
{
	struct kl_pv_vcpu *pv = kl_failpoint("pv-vcpu")
					? NULL
					: aligned_alloc(_Alignof(struct kl_pv_vcpu), sizeof(*pv));
	int r;

	if (!pv)
		return -ENOMEM;
	kl_not_leaked(pv);
	memset(pv, 0, sizeof(*pv));
	pv->poll_control = 1;
	r = kl_gpc_init(&pv->clock, &v->kvm->mem, 0, KL_GPC_CLOCK);
	if (r)
		goto out_free;
	r = kl_gpc_init(&pv->steal, &v->kvm->mem, 0, KL_GPC_STEAL);
	if (r)
		goto out_clock;
	r = kl_gpc_init(&pv->eoi, &v->kvm->mem, 0, KL_GPC_EOI);
	if (r)
		goto out_steal;
	r = kl_gpc_init(&pv->vapic, &v->kvm->mem, 0, KL_GPC_VAPIC);
	if (r)
		goto out_eoi;
	r = kl_gpc_init(&pv->apf.area, &v->kvm->mem, 0, KL_GPC_ASYNC_PF);
	if (r)
		goto out_vapic;
	r = kl_gpc_init(&pv->once, &v->kvm->mem, 0, KL_GPC_ONCE);
	if (r)
		goto out_apf;
	pv->v = v;
	v->pv = pv;
	kl_pv_async_pf_init(v);
	kl_hv_vcpu_init(v);
	r = kl_xen_vcpu_init(v);
	if (!r)
		return 0;
	kl_gpc_destroy(&pv->once);
out_apf:
	kl_gpc_destroy(&pv->apf.area);
out_vapic:
	kl_gpc_destroy(&pv->vapic);
out_eoi:
	kl_gpc_destroy(&pv->eoi);
out_steal:
	kl_gpc_destroy(&pv->steal);
out_clock:
	kl_gpc_destroy(&pv->clock);
out_free:
	free(pv);
	return r;
}

void kl_pv_vcpu_destroy(struct kl_vcpu *v)
{
	kl_xen_vcpu_destroy(v);
	kl_pv_steal_close(v->pv);
	kl_pv_async_pf_destroy(v);
	kl_gpc_destroy(&v->pv->once);
	kl_gpc_destroy(&v->pv->apf.area);
	kl_gpc_destroy(&v->pv->vapic);
	kl_gpc_destroy(&v->pv->eoi);
	kl_gpc_destroy(&v->pv->steal);
	kl_gpc_destroy(&v->pv->clock);
	free(v->pv);
}

void kl_pv_vcpu_reset(struct kl_vcpu *v)
{
	v->pv->clock_msr = v->pv->steal_msr = v->pv->eoi_msr = 0;
	v->pv->vapic_next = 0;
	v->vapic = v->vapic_lent = false;
	kl_pv_async_pf_stop(v);
	kl_pv_ask(v, KL_PV_CLOCK_MOVED | KL_PV_STEAL_MOVED | KL_PV_EOI_MOVED | KL_PV_VAPIC_MOVED |
			     KL_PV_ASYNC_PF_MOVED);
}

/* ---- CPUID ------------------------------------------------------------------------------ */

uint32_t kl_pv_supported_features(void)
{
	uint32_t f = 1u << KL_PV_CLOCKSOURCE | 1u << KL_PV_NOP_IO_DELAY | 1u << KL_PV_CLOCKSOURCE2 |
		     1u << KL_PV_ASYNC_PF | 1u << KL_PV_ASYNC_PF_INT | 1u << KL_PV_EOI |
		     1u << KL_PV_UNHALT | 1u << KL_PV_TLB_FLUSH | 1u << KL_PV_SEND_IPI |
		     1u << KL_PV_POLL_CONTROL | 1u << KL_PV_SCHED_YIELD |
		     1u << KL_PV_CLOCKSOURCE_STABLE;

	return kl_pv_steal_supported() ? f | 1u << KL_PV_STEAL_TIME : f;
}

void kl_pv_cpuid_changed(struct kl_vcpu *v)
{
	const struct kvm_cpuid_entry2 *e = kl_kvm_cpuid(v, 1);

	v->pv->features = e ? e->eax : 0;
	kl_hv_cpuid_changed(v);
	kl_pv_ask(v, KL_PV_CLOCK); /* Xen's leaves tell of it */
}

/* ---- MSRs ------------------------------------------------------------------------------- */

/* Is @index one of ours, and may the guest know it? */
static enum kl_pv_result known(struct kl_vcpu *v, uint32_t index)
{
	enum kl_pv_feature f;

	switch (index) {
	case KL_MSR_KVM_WALL_CLOCK:
	case KL_MSR_KVM_SYSTEM_TIME:
		f = KL_PV_CLOCKSOURCE;
		break;
	case KL_MSR_KVM_WALL_CLOCK_NEW:
	case KL_MSR_KVM_SYSTEM_TIME_NEW:
		f = KL_PV_CLOCKSOURCE2;
		break;
	case KL_MSR_KVM_STEAL_TIME:
		f = KL_PV_STEAL_TIME;
		break;
	case KL_MSR_KVM_ASYNC_PF_EN:
		f = KL_PV_ASYNC_PF;
		break;
	case KL_MSR_KVM_ASYNC_PF_INT:
	case KL_MSR_KVM_ASYNC_PF_ACK:
		f = KL_PV_ASYNC_PF_INT;
		break;
	case KL_MSR_KVM_PV_EOI:
		f = KL_PV_EOI;
		break;
	case KL_MSR_KVM_POLL_CONTROL:
		f = KL_PV_POLL_CONTROL;
		break;
	default:
		return KL_PV_UNKNOWN;
	}
	return kl_pv_has(v, f) ? KL_PV_OK : KL_PV_REFUSED;
}

enum kl_pv_result kl_pv_get_msr(struct kl_vcpu *v, uint32_t index, uint64_t *data, bool host)
{
	enum kl_pv_result r = known(v, index);

	if (r != KL_PV_OK)
		return r == KL_PV_UNKNOWN ? kl_hv_get_msr(v, index, data, host) : r;
	switch (index) {
	case KL_MSR_KVM_WALL_CLOCK:
	case KL_MSR_KVM_WALL_CLOCK_NEW:
		*data = atomic_load(&v->kvm->pv->wall_clock);
		break;
	case KL_MSR_KVM_SYSTEM_TIME:
	case KL_MSR_KVM_SYSTEM_TIME_NEW:
		*data = v->pv->clock_msr;
		break;
	case KL_MSR_KVM_STEAL_TIME:
		*data = v->pv->steal_msr;
		break;
	case KL_MSR_KVM_ASYNC_PF_EN:
		*data = v->pv->apf.en_msr;
		break;
	case KL_MSR_KVM_ASYNC_PF_INT:
		*data = v->pv->apf.int_msr;
		break;
	case KL_MSR_KVM_ASYNC_PF_ACK:
		*data = 0;
		break;
	case KL_MSR_KVM_PV_EOI:
		*data = v->pv->eoi_msr;
		break;
	default:
		*data = v->pv->poll_control;
	}
	return KL_PV_OK;
}

static void set_system_time(struct kl_vcpu *v, uint64_t data, bool old, bool host)
{
	struct kl_pv_vm *pv = v->kvm->pv;
	bool changed = false;

	if (!v->core.id && !host) {
		kl_mutex_lock(&pv->lock);
		changed = pv->old_clock != old;
		pv->old_clock = old;
		kl_mutex_unlock(&pv->lock);
	}
	v->pv->clock_msr = data;
	kl_pv_ask(v, KL_PV_CLOCK_MOVED | KL_PV_CLOCK);
	if (changed)
		kl_pv_ask_all(v->kvm);
}

/* For MSRs whose @fn may sleep. */
static enum kl_pv_result set_outside(struct kl_vcpu *v, uint64_t data, bool host,
				     enum kl_pv_result (*fn)(struct kl_vcpu *v, uint64_t data))
{
	enum kl_pv_result r;

	if (!host)
		kl_guest_pause(v);
	r = fn(v, data);
	if (!host)
		kl_guest_resume(v);
	return r;
}

enum kl_pv_result kl_pv_set_msr(struct kl_vcpu *v, uint32_t index, uint64_t data, bool host)
{
	enum kl_pv_result r = known(v, index);

	if (r != KL_PV_OK)
		return r == KL_PV_UNKNOWN ? kl_hv_set_msr(v, index, data, host) : r;
	switch (index) {
	case KL_MSR_KVM_WALL_CLOCK:
	case KL_MSR_KVM_WALL_CLOCK_NEW:
		atomic_store(&v->kvm->pv->wall_clock, data);
		kl_pv_ask(v, KL_PV_WALL_CLOCK);
		break;
	case KL_MSR_KVM_SYSTEM_TIME:
	case KL_MSR_KVM_SYSTEM_TIME_NEW:
		set_system_time(v, data, index == KL_MSR_KVM_SYSTEM_TIME, host);
		break;
	case KL_MSR_KVM_STEAL_TIME:
		if (!kl_pv_steal_supported() || (data & STEAL_RESERVED))
			return KL_PV_REFUSED;
		v->pv->steal_msr = data;
		kl_pv_ask(v, KL_PV_STEAL_MOVED | KL_PV_STEAL);
		break;
	case KL_MSR_KVM_PV_EOI:
		return set_outside(v, data, host, kl_pv_eoi_set);
	case KL_MSR_KVM_ASYNC_PF_EN:
		return set_outside(v, data, host, kl_pv_async_pf_enable);
	case KL_MSR_KVM_ASYNC_PF_INT:
		if (data > 0xff || !v->apic)
			return KL_PV_REFUSED;
		v->pv->apf.int_msr = data;
		break;
	case KL_MSR_KVM_ASYNC_PF_ACK:
		if (data & 1)
			kl_pv_ask(v, KL_PV_ASYNC_PF_READY);
		break;
	default:
		if (data & ~1ull)
			return KL_PV_REFUSED;
		v->pv->poll_control = data;
	}
	return KL_PV_OK;
}

/* ---- hypercalls ------------------------------------------------------------------------- */

#define HC_KICK_CPU      5
#define HC_CLOCK_PAIRING 9
#define HC_SEND_IPI      10
#define HC_SCHED_YIELD   11
#define HC_EINVAL        22
#define HC_EOPNOTSUPP    95

#define ICR_VECTOR 0xffu
#define ICR_MODE   0x700u
#define ICR_OTHERS (0xc0000u | 0x800u) /* shorthands and logical destinations are not for it */

static int64_t send_ipi(struct kl_vcpu *v, const uint64_t arg[4])
{
	unsigned bits = v->code_mode == KL_CODE64 ? 64 : 32;
	uint32_t icr = (uint32_t)arg[3];
	int64_t n = 0;

	if (icr & ICR_OTHERS)
		return -HC_EINVAL;
	for (unsigned i = 0; i < 2 * bits; i++) {
		struct kl_apic_msg m = {
			.dest = (uint32_t)arg[2] + i,
			.delivery = (uint8_t)((icr & ICR_MODE) >> 8),
			.vector = (uint8_t)(icr & ICR_VECTOR),
			.level = true,
		};
		int r;

		if (!(arg[i / bits] >> i % bits & 1))
			continue;
		r = kl_apic_send(v->kvm, v, &m);
		n += r > 0 ? r : 0;
	}
	return n;
}

void kl_pv_inject_vector(struct kl_vcpu *v, uint8_t vector)
{
	struct kl_apic_msg m = {
		.dest = v->core.id,
		.delivery = KL_APIC_FIXED,
		.vector = vector,
		.level = true,
	};

	kl_apic_send(v->kvm, NULL, &m);
}

static int64_t kick_cpu(struct kl_vcpu *v, uint32_t apic_id)
{
	struct kl_apic_msg m = {.dest = apic_id, .delivery = KL_APIC_REMRD};

	kl_apic_send(v->kvm, NULL, &m);
	return 0;
}

bool kl_pv_hypercall(struct kl_vcpu *v, uint64_t nr, const uint64_t arg[4], int64_t *ret)
{
	switch (nr) {
	case HC_KICK_CPU:
		if (!kl_pv_has(v, KL_PV_UNHALT))
			return false;
		*ret = kick_cpu(v, (uint32_t)arg[1]);
		return true;
	case HC_CLOCK_PAIRING:
		if (arg[1]) { /* KVM_CLOCK_PAIRING_WALLCLOCK is the only one */
			*ret = -HC_EOPNOTSUPP;
			return true;
		}
		v->pv->pairing_gpa = arg[0];
		kl_pv_ask(v, KL_PV_CLOCK_PAIRING);
		*ret = 0;
		return true;
	case HC_SEND_IPI:
		if (!kl_pv_has(v, KL_PV_SEND_IPI))
			return false;
		*ret = send_ipi(v, arg);
		return true;
	case HC_SCHED_YIELD:
		if (!kl_pv_has(v, KL_PV_SCHED_YIELD))
			return false;
		/* To anybody: the host's scheduler cannot be told whom the guest means. */
		kl_guest_pause(v);
		sched_yield();
		kl_guest_resume(v);
		*ret = 0;
		return true;
	default:
		return false;
	}
}

/* ---- writing ---------------------------------------------------------------------------- */

void kl_pv_ask(struct kl_vcpu *v, uint32_t todo)
{
	atomic_fetch_or(&v->pv->todo, todo);
	kl_vcpu_request(&v->core, KL_REQ_PV);
}

void kl_pv_ask_all(struct kl_x86_vm *vm)
{
	unsigned n = atomic_load(&vm->mem.nr_vcpus);

	for (unsigned i = 0; i < n; i++) {
		struct kl_vcpu_core *c = atomic_load(&vm->mem.vcpus[i]);

		if (c)
			kl_pv_ask(kl_container_of(c, struct kl_vcpu, core), KL_PV_CLOCK);
	}
}

void kl_pv_enter(struct kl_vcpu *v)
{
	uint32_t todo = v->pv->steal_msr & 1 ? KL_PV_STEAL : 0;

	/* As in KVM, runstate takes the place of steal time. */
	if (KL_UNLIKELY(atomic_load_explicit(&v->kvm->xen_msr, memory_order_relaxed)))
		todo = KL_PV_XEN_ENTER | (v->pv->xen.clock_due ? KL_PV_CLOCK : 0) |
		       (atomic_load(&v->pv->xen.pending_sel) ? KL_PV_XEN_EVENTS : 0);

	/* The area may be there now. */
	if (KL_UNLIKELY(v->pv->apf.in_use))
		todo |= KL_PV_ASYNC_PF_READY;

	/* A request may have been taken by a KVM_RUN that did not get as far. */
	if (KL_UNLIKELY(todo || atomic_load_explicit(&v->pv->todo, memory_order_relaxed)))
		kl_pv_ask(v, todo);
}

void kl_pv_leave(struct kl_vcpu *v)
{
	/* So that the program sees what is in service, and the priority. If a signal comes first,
	 * the next KVM_RUN sees. */
	if (v->pv_eoi_pending)
		(void)kl_pv_eoi_from_guest(v);
	if (v->vapic_lent)
		(void)kl_pv_vapic_from_guest(v);
	if (!atomic_load_explicit(&v->kvm->xen_msr, memory_order_relaxed))
		kl_pv_steal_leave(v);
}

void kl_pv_apic_enabled(struct kl_vcpu *v)
{
	kl_pv_ask(v, (atomic_load(&v->kvm->xen_msr) ? KL_PV_XEN_APIC : 0) | KL_PV_ASYNC_PF_READY);
}

int kl_pv_update(struct kl_vcpu *v)
{
	/* In this order: first where, then what. */
	static const struct {
		enum kl_pv_todo what;
		int (*fn)(struct kl_vcpu *v);
	} steps[] = {
		{KL_PV_CLOCK_MOVED, kl_pv_clock_moved},
		{KL_PV_STEAL_MOVED, kl_pv_steal_moved},
		{KL_PV_EOI_MOVED, kl_pv_eoi_moved},
		{KL_PV_VAPIC_MOVED, kl_pv_vapic_moved},
		{KL_PV_ASYNC_PF_MOVED, kl_pv_async_pf_moved},
		{KL_PV_CLOCK, kl_pv_clock_update},
		{KL_PV_STEAL, kl_pv_steal_update},
		{KL_PV_WALL_CLOCK, kl_pv_wall_clock_update},
		{KL_PV_CLOCK_PAIRING, kl_pv_clock_pairing},
		{KL_PV_ASYNC_PF_READY, kl_pv_async_pf_ready},
		{KL_PV_XEN_ENTER, kl_xen_enter},
		{KL_PV_XEN_PORTS, kl_xen_deliver_deferred},
		{KL_PV_XEN_TIMER, kl_xen_timer_deliver},
		{KL_PV_XEN_EVENTS, kl_xen_deliver_pending_sel},
		{KL_PV_XEN_APIC, kl_xen_apic_enabled},
	};
	uint32_t todo = atomic_exchange(&v->pv->todo, 0);

	for (unsigned i = 0; i < KL_ARRAY_SIZE(steps); i++) {
		if (!(todo & steps[i].what))
			continue;
		if (steps[i].fn(v) == -EINTR) {
			kl_pv_ask(v, todo);
			return -EINTR;
		}
		todo &= ~(uint32_t)steps[i].what;
	}
	return 0;
}
