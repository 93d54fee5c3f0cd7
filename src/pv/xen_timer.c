/* SPDX-License-Identifier: MIT */
/*
 * Xen's one-shot timer of a vCPU, which raises an event channel; the timeout of SCHEDOP_poll; and
 * the retry of an event whose vcpu_info has no memory.
 */
#include <errno.h>

#include "base/racepoint.h"
#include "pv/pv.h"

#define NS_PER_MS     1000000ull
#define WORKAROUND_NS (100 * NS_PER_MS)

static void fired(struct kl_timer *t)
{
	struct kl_xen_vcpu *xv = kl_container_of(t, struct kl_xen_vcpu, timer);
	struct kl_vcpu *v = kl_container_of(xv, struct kl_pv_vcpu, xen)->v;

	racepoint("xen-timer-fires");
	if (kl_xen_raise_on(v, atomic_load(&xv->timer_port), false) != -EAGAIN) {
		atomic_store(&xv->timer_expires, 0);
		return;
	}
	atomic_store(&xv->timer_pending, true);
	kl_pv_ask(v, KL_PV_XEN_TIMER);
}

static void poll_timed_out(struct kl_timer *t)
{
	struct kl_xen_vcpu *xv = kl_container_of(t, struct kl_xen_vcpu, poll_timer);
	struct kl_vcpu *v = kl_container_of(xv, struct kl_pv_vcpu, xen)->v;

	atomic_store(&xv->polling, false);
	kl_vcpu_request(&v->core, KL_REQ_EVENT);
}

static void retry(struct kl_timer *t)
{
	struct kl_xen_vcpu *xv = kl_container_of(t, struct kl_xen_vcpu, retry);

	kl_pv_ask(kl_container_of(xv, struct kl_pv_vcpu, xen)->v, KL_PV_XEN_EVENTS);
}

void kl_xen_timers_init(struct kl_vcpu *v)
{
	struct kl_xen_vcpu *xv = &v->pv->xen;

	kl_timer_init(&xv->timer, fired);
	kl_timer_init(&xv->poll_timer, poll_timed_out);
	kl_timer_init(&xv->retry, retry);
}

void kl_xen_timers_destroy(struct kl_vcpu *v)
{
	struct kl_xen_vcpu *xv = &v->pv->xen;

	if (!xv->timers)
		return;
	kl_timer_cancel(&xv->timer);
	kl_timer_cancel(&xv->poll_timer);
	kl_timer_cancel(&xv->retry);
	kl_timer_put();
	xv->timers = false;
}

int kl_xen_timers_use(struct kl_vcpu *v)
{
	struct kl_xen_vcpu *xv = &v->pv->xen;
	int r = xv->timers ? 0 : kl_timer_get();

	if (!r)
		xv->timers = true;
	return r;
}

void kl_xen_timer_stop(struct kl_vcpu *v)
{
	struct kl_xen_vcpu *xv = &v->pv->xen;

	if (xv->timers)
		kl_timer_cancel(&xv->timer);
	atomic_store(&xv->timer_expires, 0);
	atomic_store(&xv->timer_pending, false);
}

void kl_xen_timer_start(struct kl_vcpu *v, uint64_t guest_ns, bool linux_workaround)
{
	struct kl_xen_vcpu *xv = &v->pv->xen;
	uint64_t host_now, guest_now;
	int64_t delta;

	kl_xen_timer_stop(v);
	guest_now = kl_pv_clock_ns(v->kvm);
	host_now = kl_timer_now();
	delta = (int64_t)(guest_ns - guest_now);
	/* As Xen: times that Linux asks for when it has counted too far mean "soon". */
	if (linux_workaround && ((int64_t)guest_ns < 0 || (delta > 0 && delta >> 50))) {
		delta = (int64_t)WORKAROUND_NS;
		guest_ns = guest_now + WORKAROUND_NS;
	}
	xv->timer_deadline = delta <= 0 ? host_now : host_now + (uint64_t)delta;
	atomic_store(&xv->timer_expires, guest_ns);
	if (delta <= 0)
		fired(&xv->timer);
	else
		kl_timer_arm(&xv->timer, xv->timer_deadline);
}

int kl_xen_timer_deliver(struct kl_vcpu *v)
{
	struct kl_xen_vcpu *xv = &v->pv->xen;
	int r;

	if (!atomic_load(&xv->timer_pending))
		return 0;
	r = kl_xen_raise_on(v, atomic_load(&xv->timer_port), true);
	if (r == -EINTR)
		return r;
	atomic_store(&xv->timer_expires, 0);
	atomic_store(&xv->timer_pending, false);
	return 0;
}

/* Either still armed, or its event is in shared_info; not somewhere between. */
void kl_xen_timer_get(struct kl_vcpu *v, struct kvm_xen_vcpu_attr *a)
{
	struct kl_xen_vcpu *xv = &v->pv->xen;
	bool armed = xv->timers && kl_timer_cancel(&xv->timer);
	int r = kl_xen_timer_deliver(v);

	(void)r; /* a signal: it is pending still, and so is what is told */
	a->u.timer.port = atomic_load(&xv->timer_port);
	a->u.timer.priority = KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL;
	a->u.timer.expires_ns = atomic_load(&xv->timer_expires);
	if (armed)
		kl_timer_arm(&xv->timer, xv->timer_deadline);
}
