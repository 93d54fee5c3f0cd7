/* SPDX-License-Identifier: MIT */
/* Xen HVM: a vCPU's attributes, and what it does for them when it enters. */
#include <errno.h>

#include "pv/pv.h"
#include "pv/xen_abi.h"

#define FIRST_VECTOR 0x10

int kl_xen_vcpu_init(struct kl_vcpu *v)
{
	struct kl_xen_vcpu *xv = &v->pv->xen;
	struct kl_gpc *c[] = {&xv->info, &xv->time, &xv->runstate[0], &xv->runstate[1]};
	static const enum kl_gpc_kind kind[] = {KL_GPC_VCPU_INFO, KL_GPC_TIME_INFO, KL_GPC_RUNSTATE,
						KL_GPC_RUNSTATE};

	for (unsigned i = 0; i < KL_ARRAY_SIZE(c); i++) {
		int r = kl_gpc_init(c[i], &v->kvm->mem, 0, kind[i]);

		if (r) {
			while (i--)
				kl_gpc_destroy(c[i]);
			return r;
		}
	}
	xv->info_gpa = xv->time_gpa = xv->runstate_gpa = KL_XEN_INVALID;
	xv->vcpu_id = UINT32_MAX; /* it has no place yet */
	kl_xen_timers_init(v);
	return 0;
}

void kl_xen_vcpu_destroy(struct kl_vcpu *v)
{
	struct kl_xen_vcpu *xv = &v->pv->xen;

	kl_xen_timers_destroy(v);
	kl_gpc_destroy(&xv->runstate[1]);
	kl_gpc_destroy(&xv->runstate[0]);
	kl_gpc_destroy(&xv->time);
	kl_gpc_destroy(&xv->info);
}

uint32_t kl_xen_vcpu_id(const struct kl_vcpu *v)
{
	uint32_t id = v->pv->xen.vcpu_id;

	return id == UINT32_MAX ? v->core.index : id;
}

int kl_xen_enter(struct kl_vcpu *v)
{
	struct kl_x86_vm *vm = v->kvm;

	if (atomic_load(&vm->pv->xen.wall_clock_due) && kl_xen_wall_clock(vm))
		return -EINTR;
	return kl_xen_runstate_set(v, KL_XEN_RUNNING);
}

int kl_xen_apic_enabled(struct kl_vcpu *v)
{
	if (atomic_load(&v->kvm->xen_msr) && atomic_load(&v->pv->xen.upcall_vector) &&
	    kl_xen_upcall_pending(v))
		kl_xen_inject_vector(v);
	return 0;
}

static int set_info(struct kl_vcpu *v, uint64_t gpa, uint64_t hva)
{
	struct kl_xen_vcpu *xv = &v->pv->xen;
	int r;

	if (gpa == KL_XEN_INVALID && !hva) {
		r = kl_gpc_deactivate(&xv->info);
	} else {
		if ((hva ? hva : gpa) & 3)
			return -ENXIO;
		r = hva ? kl_gpc_activate_hva(&xv->info, (kl_hva_t){hva}, KL_XEN_INFO_SIZE)
			: kl_gpc_activate(&xv->info, gpa, KL_XEN_INFO_SIZE);
	}
	if (r)
		return r;
	xv->info_gpa = gpa;
	xv->info_hva = hva;
	kl_pv_ask(v, KL_PV_CLOCK | KL_PV_XEN_EVENTS);
	return 0;
}

static int set_time_info(struct kl_vcpu *v, uint64_t gpa)
{
	struct kl_xen_vcpu *xv = &v->pv->xen;
	int r = gpa == KL_XEN_INVALID ? kl_gpc_deactivate(&xv->time)
				      : kl_gpc_activate(&xv->time, gpa, sizeof(struct kl_pvclock));

	if (r)
		return r;
	xv->time_gpa = gpa;
	kl_pv_ask(v, KL_PV_CLOCK);
	return 0;
}

static int set_timer(struct kl_vcpu *v, const struct kvm_xen_vcpu_attr *a)
{
	struct kl_xen_vcpu *xv = &v->pv->xen;
	int r;

	if (a->u.timer.port && a->u.timer.priority != KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL)
		return -EINVAL;
	r = kl_xen_timers_use(v);
	if (r)
		return -ENOMEM; /* as far as programs know */
	kl_xen_timer_stop(v);
	atomic_store(&xv->timer_port, a->u.timer.port);
	if (a->u.timer.port && a->u.timer.expires_ns)
		kl_xen_timer_start(v, a->u.timer.expires_ns, false);
	return 0;
}

static bool is_runstate(uint16_t type)
{
	return type >= KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR &&
	       type <= KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST;
}

int kl_xen_vcpu_set_attr(struct kl_vcpu *v, const struct kvm_xen_vcpu_attr *a)
{
	struct kl_xen_vcpu *xv = &v->pv->xen;

	if (is_runstate(a->type) && !kl_pv_steal_supported())
		return -EOPNOTSUPP;
	switch (a->type) {
	case KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO:
		return set_info(v, a->u.gpa, 0);
	case KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA:
		return set_info(v, KL_XEN_INVALID, a->u.gpa);
	case KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO:
		return set_time_info(v, a->u.gpa);
	case KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR:
		return kl_xen_runstate_move(v, a->u.gpa);
	case KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT:
		if (a->u.runstate.state > KL_XEN_OFFLINE)
			return -EINVAL;
		return kl_xen_runstate_set(v, (uint32_t)a->u.runstate.state);
	case KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA:
		return kl_xen_runstate_load(v, a);
	case KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST:
		return kl_xen_runstate_adjust(v, a);
	case KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID:
		if (a->u.vcpu_id >= KL_MAX_VCPUS)
			return -EINVAL;
		xv->vcpu_id = a->u.vcpu_id;
		return 0;
	case KVM_XEN_VCPU_ATTR_TYPE_TIMER:
		return set_timer(v, a);
	case KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR:
		if (a->u.vector && a->u.vector < FIRST_VECTOR)
			return -EINVAL;
		atomic_store(&xv->upcall_vector, a->u.vector);
		return 0;
	default:
		return -ENOENT;
	}
}

int kl_xen_vcpu_get_attr(struct kl_vcpu *v, struct kvm_xen_vcpu_attr *a)
{
	struct kl_xen_vcpu *xv = &v->pv->xen;

	if (is_runstate(a->type) && a->type != KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST &&
	    !kl_pv_steal_supported())
		return -EOPNOTSUPP;
	switch (a->type) {
	case KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO:
		a->u.gpa = xv->info_gpa;
		return 0;
	case KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA:
		a->u.gpa = xv->info_hva;
		return 0;
	case KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO:
		a->u.gpa = xv->time_gpa;
		return 0;
	case KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR:
		if (xv->runstate_gpa == KL_XEN_INVALID)
			return -ENOENT;
		a->u.gpa = xv->runstate_gpa;
		return 0;
	case KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT:
		a->u.runstate.state = xv->state;
		return 0;
	case KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA:
		kl_xen_runstate_get(v, a);
		return 0;
	case KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST:
		return -EINVAL;
	case KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID:
		a->u.vcpu_id = kl_xen_vcpu_id(v);
		return 0;
	case KVM_XEN_VCPU_ATTR_TYPE_TIMER:
		kl_xen_timer_get(v, a);
		return 0;
	case KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR:
		a->u.vector = atomic_load(&xv->upcall_vector);
		return 0;
	default:
		return -ENOENT;
	}
}
