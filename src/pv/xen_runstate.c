/* SPDX-License-Identifier: MIT */
/*
 * Xen's runstate: in which of four states the vCPU is, since when, and how long it has been in
 * each of them. The area may lie anywhere, also across two pages (X4); in 64-bit mode it is four
 * bytes longer, so that the second page may be needed only after the mode has changed (B24).
 *
 * With the update flag a reader that finds it clear, and the entry time unchanged after it has
 * read, has a whole picture (B25): it is set in guest memory before anything else is written and
 * taken off after everything is.
 */
#include <errno.h>
#include <string.h>

#include "base/racepoint.h"
#include "host/access.h"
#include "pv/pv.h"
#include "pv/xen_abi.h"

#define SIZE_32     44u
#define SIZE_64     48u
#define UPDATE_FLAG 0x80u /* in the last byte of the entry time */

struct area {
	uint8_t buf[SIZE_64];
	uint32_t len[2]; /* of the pieces */
	uint32_t flag;   /* offset of the byte with the flag */
	bool use_flag;
};

static uint8_t *byte_at(void *const *piece, const struct area *a, uint32_t off)
{
	return off < a->len[0] ? (uint8_t *)piece[0] + off
			       : (uint8_t *)piece[1] + (off - a->len[0]);
}

static void write_area(void *p, void *arg)
{
	struct area *a = arg;
	void *const *piece = p;
	uint8_t *flag = byte_at(piece, a, a->flag);

	if (a->use_flag) {
		a->buf[a->flag] |= UPDATE_FLAG;
		kl_store8(flag, a->buf[a->flag]);
	}
	racepoint("xen-runstate-write");
	kl_access_copy(piece[0], a->buf, a->len[0]);
	if (a->len[1])
		kl_access_copy(piece[1], a->buf + a->len[0], a->len[1]);
	racepoint("xen-runstate-written");
	if (a->use_flag)
		kl_store8(flag, a->buf[a->flag] & (uint8_t)~UPDATE_FLAG);
}

/* A page that is not there is no error: what it should say is said the next time. */
static int write_out(struct kl_vcpu *v)
{
	struct kl_xen_vcpu *xv = &v->pv->xen;
	struct kl_xen_vm *xen = &v->kvm->pv->xen;
	struct kl_gpc *c[2] = {&xv->runstate[0], &xv->runstate[1]};
	bool wide = atomic_load(&xen->long_mode);
	uint32_t len = wide ? SIZE_64 : SIZE_32, times = wide ? 8 : 4;
	uint32_t room = (uint32_t)(KL_PAGE_SIZE - (xv->runstate_gpa & ~KL_PAGE_MASK));
	struct area a = {.use_flag = atomic_load(&xen->runstate_update_flag), .flag = times + 7};
	size_t lens[2];
	int r = 0;

	if (xv->runstate_gpa == KL_XEN_INVALID)
		return 0;
	a.len[0] = kl_min(len, room);
	a.len[1] = len - a.len[0];
	memcpy(a.buf, &xv->state, sizeof(xv->state));
	memcpy(a.buf + times, &xv->state_entry_time, sizeof(xv->state_entry_time));
	memcpy(a.buf + times + 8, xv->state_time, sizeof(xv->state_time));
	/* The mode may have made the area longer since it was set up. */
	if (a.len[1])
		r = kl_gpc_activate(c[1], xv->runstate_gpa + a.len[0], a.len[1]);
	lens[0] = a.len[0];
	lens[1] = a.len[1];
	if (!r)
		r = kl_pv_write_many(c, lens, a.len[1] ? 2 : 1, write_area, &a);
	return r == -EINTR ? r : 0;
}

int kl_xen_runstate_move(struct kl_vcpu *v, uint64_t gpa)
{
	struct kl_xen_vcpu *xv = &v->pv->xen;
	uint64_t room = KL_PAGE_SIZE - (gpa & ~KL_PAGE_MASK);
	int r;

	xv->runstate_gpa = KL_XEN_INVALID;
	r = kl_gpc_deactivate(&xv->runstate[1]);
	if (r)
		return r;
	if (gpa == KL_XEN_INVALID)
		return kl_gpc_deactivate(&xv->runstate[0]);
	/* All that there is of the page: the mode may change. */
	r = kl_gpc_activate(&xv->runstate[0], gpa, room);
	if (r)
		return r;
	xv->runstate_gpa = gpa;
	return write_out(v);
}

int kl_xen_runstate_set(struct kl_vcpu *v, uint32_t state)
{
	struct kl_xen_vcpu *xv = &v->pv->xen;
	uint64_t now = kl_pv_clock_ns(v->kvm), delta = now - xv->state_entry_time;
	uint64_t stolen = kl_pv_stolen(v);

	if (!xv->state_entry_time)
		xv->state = KL_XEN_OFFLINE;
	/* Who does not run is not kept from it. */
	if (xv->state == KL_XEN_RUNNING) {
		stolen = kl_min(stolen, delta);
		xv->state_time[KL_XEN_RUNNABLE] += stolen;
		delta -= stolen;
	}
	xv->state_time[xv->state] += delta;
	xv->state = state;
	xv->state_entry_time = now;
	return write_out(v);
}

static bool adds_up(const struct kvm_xen_vcpu_attr *a)
{
	return a->u.runstate.state_entry_time ==
	       a->u.runstate.time_running + a->u.runstate.time_runnable +
		       a->u.runstate.time_blocked + a->u.runstate.time_offline;
}

int kl_xen_runstate_load(struct kl_vcpu *v, const struct kvm_xen_vcpu_attr *a)
{
	struct kl_xen_vcpu *xv = &v->pv->xen;

	if (a->u.runstate.state > KL_XEN_OFFLINE || !adds_up(a) ||
	    kl_pv_clock_ns(v->kvm) < a->u.runstate.state_entry_time)
		return -EINVAL;
	xv->state = (uint32_t)a->u.runstate.state;
	xv->state_entry_time = a->u.runstate.state_entry_time;
	xv->state_time[KL_XEN_RUNNING] = a->u.runstate.time_running;
	xv->state_time[KL_XEN_RUNNABLE] = a->u.runstate.time_runnable;
	xv->state_time[KL_XEN_BLOCKED] = a->u.runstate.time_blocked;
	xv->state_time[KL_XEN_OFFLINE] = a->u.runstate.time_offline;
	kl_pv_stolen(v); /* what was stolen so far is told */
	return 0;
}

int kl_xen_runstate_adjust(struct kl_vcpu *v, const struct kvm_xen_vcpu_attr *a)
{
	struct kl_xen_vcpu *xv = &v->pv->xen;
	uint64_t state = a->u.runstate.state;

	if ((state > KL_XEN_OFFLINE && state != ~0ull) || !adds_up(a) ||
	    kl_pv_clock_ns(v->kvm) < xv->state_entry_time + a->u.runstate.state_entry_time)
		return -EINVAL;
	xv->state_entry_time += a->u.runstate.state_entry_time;
	xv->state_time[KL_XEN_RUNNING] += a->u.runstate.time_running;
	xv->state_time[KL_XEN_RUNNABLE] += a->u.runstate.time_runnable;
	xv->state_time[KL_XEN_BLOCKED] += a->u.runstate.time_blocked;
	xv->state_time[KL_XEN_OFFLINE] += a->u.runstate.time_offline;
	return state == ~0ull ? write_out(v) : kl_xen_runstate_set(v, (uint32_t)state);
}

void kl_xen_runstate_get(struct kl_vcpu *v, struct kvm_xen_vcpu_attr *a)
{
	const struct kl_xen_vcpu *xv = &v->pv->xen;

	a->u.runstate.state = xv->state;
	a->u.runstate.state_entry_time = xv->state_entry_time;
	a->u.runstate.time_running = xv->state_time[KL_XEN_RUNNING];
	a->u.runstate.time_runnable = xv->state_time[KL_XEN_RUNNABLE];
	a->u.runstate.time_blocked = xv->state_time[KL_XEN_BLOCKED];
	a->u.runstate.time_offline = xv->state_time[KL_XEN_OFFLINE];
}
