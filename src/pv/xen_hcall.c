/* SPDX-License-Identifier: MIT */
/*
 * Xen's hypercalls: those that the engine answers, for CPL 0; all others are the program's
 * (KVM_EXIT_XEN).
 *
 * They run in the instruction, out of guest mode for what may sleep.
 */
#include <errno.h>
#include <sched.h>

#include "base/racepoint.h"
#include "host/access.h"
#include "pv/pv.h"
#include "pv/xen_abi.h"
#include "x86/access.h"

#define XEN_SET_TIMER_OP     15
#define XEN_VERSION          17
#define XEN_VCPU_OP          24
#define XEN_SCHED_OP         29
#define XEN_EVENT_CHANNEL_OP 32

#define XENVER_VERSION         0
#define EVTCHNOP_SEND          4
#define SCHEDOP_YIELD          0
#define SCHEDOP_POLL           3
#define VCPUOP_SET_SINGLESHOT  8
#define VCPUOP_STOP_SINGLESHOT 9

/* What a hypercall gives the guest are Xen's numbers, which here are Linux's. */
#define MAX_POLL_PORTS 128u

enum outcome { ANSWERED, PROGRAM, AGAIN };

struct call {
	bool wide;
	uint64_t nr, arg[6];
	int64_t ret;
};

static enum outcome answer(struct call *c, int64_t ret)
{
	c->ret = ret;
	return ANSWERED;
}

/* From the guest's linear addresses, as its kernel. 0, -EFAULT or -EINTR. */
static int read_virt(struct kl_vcpu *v, uint64_t lin, void *buf, size_t len)
{
	while (len) {
		size_t n = kl_min(len, (size_t)(KL_PAGE_SIZE - (lin & ~KL_PAGE_MASK)));
		bool writable, user;
		uint64_t gpa;
		int r = kl_x86_translate(v, lin, &gpa, &writable, &user);

		if (!r)
			r = kl_pv_copy(v, gpa, buf, n, false);
		if (r)
			return r == -EINTR ? r : -EFAULT;
		lin += n;
		buf = (uint8_t *)buf + n;
		len -= n;
	}
	return 0;
}

static enum outcome event_send(struct kl_vcpu *v, struct call *c)
{
	uint32_t port;
	int r = read_virt(v, c->arg[1], &port, sizeof(port));

	if (r)
		return r == -EINTR ? AGAIN : answer(c, r);
	r = kl_xen_send_from(v->kvm, port);
	if (r == -EINTR)
		return AGAIN;
	return r < 0 && r != -ENOTCONN ? PROGRAM : answer(c, 0);
}

/* ---- sched_op ----------------------------------------------------------------------------- */

struct ports {
	const uint32_t *port;
	uint32_t n;
	bool found;
};

static void find_pending(void *p, void *arg)
{
	struct ports *a = arg;
	const uint8_t *pending = (uint8_t *)p + 0x800;

	a->found = false;
	for (uint32_t i = 0; i < a->n; i++)
		a->found |= kl_load8(pending + a->port[i] / 8) >> a->port[i] % 8 & 1;
}

/* Whether there is one, or one cannot say. */
static bool has_pending(struct kl_vcpu *v, struct ports *a)
{
	return kl_pv_read(&v->kvm->pv->xen.shinfo, KL_PAGE_SIZE, find_pending, a) || a->found;
}

static int read_poll(struct kl_vcpu *v, struct call *c, uint64_t *ports, uint32_t *n,
		     uint64_t *timeout)
{
	uint64_t raw[3];
	int r = read_virt(v, c->arg[1], raw, c->wide ? 24 : 16);

	if (r)
		return r;
	*ports = c->wide ? raw[0] : (uint32_t)raw[0];
	*n = (uint32_t)(c->wide ? raw[1] : raw[0] >> 32);
	*timeout = c->wide ? raw[2] : raw[1];
	return 0;
}

static void wait_for_ports(struct kl_vcpu *v, struct ports *a, uint64_t timeout)
{
	struct kl_xen_vcpu *xv = &v->pv->xen;
	bool timed = timeout && !kl_xen_timers_use(v);

	atomic_store(&xv->poll_port, a->n == 1 ? (int64_t)a->port[0] : -1);
	/* First this, then the look; who raises the bit does it the other way. PAIR(xen-poll) */
	atomic_store(&xv->polling, true);
	if (!has_pending(v, a)) {
		racepoint("xen-poll");
		if (timed)
			kl_timer_arm(&xv->poll_timer, kl_timer_now() + timeout);
		kl_x86_wait(v, &xv->polling);
		if (timed)
			kl_timer_cancel(&xv->poll_timer);
	}
	atomic_store(&xv->polling, false);
}

static enum outcome sched_poll(struct kl_vcpu *v, struct call *c)
{
	uint32_t port[MAX_POLL_PORTS], n = 0;
	uint64_t ports = 0, timeout = 0;
	int r = read_poll(v, c, &ports, &n, &timeout);

	if (!r && n > MAX_POLL_PORTS)
		r = -EINVAL;
	if (!r)
		r = read_virt(v, ports, port, n * sizeof(port[0]));
	for (uint32_t i = 0; !r && i < n; i++) {
		if (port[i] >= kl_xen_max_port(v->kvm))
			r = -EINVAL;
	}
	if (r == -EINTR)
		return AGAIN;
	if (!r)
		wait_for_ports(v, &(struct ports){.port = port, .n = n}, timeout);
	return answer(c, r);
}

static enum outcome sched_op(struct kl_vcpu *v, struct call *c)
{
	uint32_t op = (uint32_t)c->arg[0];

	if (op != SCHEDOP_POLL && op != SCHEDOP_YIELD)
		return PROGRAM;
	if (op == SCHEDOP_POLL && v->apic &&
	    (atomic_load(&v->kvm->pv->xen.flags) & KVM_XEN_HVM_CONFIG_EVTCHN_SEND))
		return sched_poll(v, c);
	sched_yield();
	return answer(c, 0);
}

/* ---- timers ------------------------------------------------------------------------------- */

static enum outcome vcpu_op(struct kl_vcpu *v, struct call *c)
{
	uint32_t op = (uint32_t)c->arg[0];
	uint64_t raw[2];
	int r;

	if (!atomic_load(&v->pv->xen.timer_port) ||
	    (op != VCPUOP_SET_SINGLESHOT && op != VCPUOP_STOP_SINGLESHOT))
		return PROGRAM;
	if ((uint32_t)c->arg[1] != kl_xen_vcpu_id(v))
		return answer(c, -EINVAL);
	if (op == VCPUOP_STOP_SINGLESHOT) {
		kl_xen_timer_stop(v);
		return answer(c, 0);
	}
	/* With its flags, of which none matters; the padding is only in 64-bit mode. */
	r = read_virt(v, c->arg[2], raw, c->wide ? 16 : 12);
	if (r)
		return r == -EINTR ? AGAIN : answer(c, r);
	kl_xen_timer_start(v, raw[0], false);
	return answer(c, 0);
}

static enum outcome set_timer_op(struct kl_vcpu *v, struct call *c)
{
	uint64_t when = c->wide ? c->arg[0] : c->arg[0] | c->arg[1] << 32;

	if (!atomic_load(&v->pv->xen.timer_port))
		return PROGRAM;
	if (when)
		kl_xen_timer_start(v, when, true);
	else
		kl_xen_timer_stop(v);
	return answer(c, 0);
}

/* ---- all ---------------------------------------------------------------------------------- */

static enum outcome execute(struct kl_vcpu *v, struct call *c)
{
	uint32_t version = atomic_load(&v->kvm->pv->xen.version);

	switch (c->nr) {
	case XEN_VERSION:
		return c->arg[0] == XENVER_VERSION && version ? answer(c, version) : PROGRAM;
	case XEN_EVENT_CHANNEL_OP:
		return c->arg[0] == EVTCHNOP_SEND ? event_send(v, c) : PROGRAM;
	case XEN_SCHED_OP:
		return sched_op(v, c);
	case XEN_VCPU_OP:
		return vcpu_op(v, c);
	case XEN_SET_TIMER_OP:
		return set_timer_op(v, c);
	default:
		return PROGRAM;
	}
}

static void read_arguments(const struct kl_vcpu *v, struct call *c)
{
	static const uint8_t narrow[] = {KL_RBX, KL_RCX, KL_RDX, KL_RSI, KL_RDI, KL_RBP};
	static const uint8_t wide[] = {KL_RDI, KL_RSI, KL_RDX, KL_R10, KL_R8, KL_R9};

	c->wide = v->code_mode == KL_CODE64;
	c->nr = c->wide ? v->gpr[KL_RAX] : (uint32_t)v->gpr[KL_RAX];
	for (unsigned i = 0; i < KL_ARRAY_SIZE(c->arg); i++)
		c->arg[i] = c->wide ? v->gpr[wide[i]] : (uint32_t)v->gpr[narrow[i]];
}

bool kl_pv_xen_hypercall(struct kl_vcpu *v)
{
	enum outcome out = PROGRAM;
	struct call c;

	read_arguments(v, &c);
	if (!v->cpl) {
		kl_guest_pause(v);
		out = execute(v, &c);
		kl_guest_resume(v);
	}
	switch (out) {
	case ANSWERED:
		v->gpr[KL_RAX] = (uint64_t)c.ret;
		return true;
	case AGAIN:
		kl_leave(v, KL_LEAVE_RESTART);
	default:
		v->exit.reason = KVM_EXIT_XEN;
		v->exit.xen.longmode = c.wide;
		v->exit.xen.cpl = v->cpl;
		v->exit.xen.input = c.nr;
		for (unsigned i = 0; i < KL_ARRAY_SIZE(c.arg); i++)
			v->exit.xen.params[i] = c.arg[i];
		return false;
	}
}
