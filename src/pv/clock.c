/* SPDX-License-Identifier: MIT */
/*
 * kvmclock: a page for each vCPU with which the guest turns its TSC into nanoseconds.
 *
 * All vCPUs start from one moment ("master") at which the host's TSC and clock were read together,
 * so that their clocks agree to the nanosecond wherever their TSCs do. The moment is taken anew
 * when the program sets the clock; the clock between two moments is the TSC's, here and in the
 * guest.
 */
#include "pv/pv.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#include "base/racepoint.h"
#include "host/access.h"
#include "pv/xen_abi.h"
#include "x86/guest_cpuid.h"
#include "x86/tsc.h"

#define NS_PER_S 1000000000ull

static uint64_t read_clock(clockid_t id)
{
	struct timespec ts;

	clock_gettime(id, &ts);
	return (uint64_t)ts.tv_sec * NS_PER_S + (uint64_t)ts.tv_nsec;
}

/* What the host slept. Less than a millisecond is the time between two readings. */
static uint64_t suspended(void)
{
	uint64_t mono = read_clock(CLOCK_MONOTONIC), boot = read_clock(CLOCK_BOOTTIME);

	return boot < mono + NS_PER_S / 1000 ? 0 : boot - mono;
}

struct kl_pv_moment kl_pv_now(void)
{
	struct kl_pv_moment best = {0};
	uint64_t width = UINT64_MAX;

	/* Of a few readings the one that took the shortest: nothing came in between. */
	for (int i = 0; i < 4; i++) {
		uint64_t before = kl_host_tsc(), after;
		uint64_t boot = read_clock(CLOCK_MONOTONIC_RAW), real = read_clock(CLOCK_REALTIME);

		after = kl_host_tsc();
		if (after - before < width) {
			width = after - before;
			best = (struct kl_pv_moment){before + width / 2, boot, real};
		}
	}
	best.boot += suspended();
	return best;
}

/* ns = ((ticks << shift) * mul) >> 32, with as many bits in mul as it has. */
void kl_pvclock_scale(uint32_t khz, struct kl_pvclock *c)
{
	uint64_t hz = (uint64_t)khz * 1000;

	c->tsc_shift = 0;
	while (hz > 2 * NS_PER_S) {
		hz >>= 1;
		c->tsc_shift--;
	}
	while (hz <= NS_PER_S) {
		hz <<= 1;
		c->tsc_shift++;
	}
	c->tsc_to_system_mul = (uint32_t)((NS_PER_S << 32) / hz);
}

uint64_t kl_pvclock_ns(const struct kl_pvclock *c, uint64_t tsc)
{
	uint64_t delta = tsc - c->tsc_timestamp;

	delta = c->tsc_shift < 0 ? delta >> -c->tsc_shift : delta << c->tsc_shift;
	return c->system_time + (uint64_t)((unsigned __int128)delta * c->tsc_to_system_mul >> 32);
}

/* ---- of the VM -------------------------------------------------------------------------- */

static bool stable(const struct kl_x86_vm *vm)
{
	return !vm->pv->old_clock && kl_tsc_matched(vm);
}

/* The clock of a vCPU whose TSC is the host's. Context: pv->lock. */
static struct kl_pvclock host_clock(const struct kl_x86_vm *vm)
{
	const struct kl_pv_vm *pv = vm->pv;
	struct kl_pvclock c = {
		.tsc_timestamp = pv->master.tsc,
		.system_time = pv->master.boot + (uint64_t)pv->clock_offset,
	};

	kl_pvclock_scale(vm->tsc_khz, &c);
	return c;
}

void kl_pv_get_clock(struct kl_x86_vm *vm, struct kvm_clock_data *d)
{
	struct kl_pv_moment now = kl_pv_now();
	struct kl_pvclock c;

	kl_mutex_lock(&vm->pv->lock);
	*d = (struct kvm_clock_data){0};
	if (stable(vm)) {
		c = host_clock(vm);
		d->clock = kl_pvclock_ns(&c, now.tsc);
		d->flags = KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC;
		d->realtime = now.real;
		d->host_tsc = now.tsc;
	} else {
		d->clock = now.boot + (uint64_t)vm->pv->clock_offset;
	}
	kl_mutex_unlock(&vm->pv->lock);
}

uint64_t kl_pv_clock_ns(struct kl_x86_vm *vm)
{
	struct kvm_clock_data d;

	kl_pv_get_clock(vm, &d);
	return d.clock;
}

int kl_pv_set_clock(struct kl_x86_vm *vm, const struct kvm_clock_data *d)
{
	struct kl_pv_moment now = kl_pv_now();
	uint64_t clock = d->clock;

	/* What KVM_GET_CLOCK said may come back whole. */
	if (d->flags & ~(uint32_t)(KVM_CLOCK_REALTIME | KVM_CLOCK_TSC_STABLE | KVM_CLOCK_HOST_TSC))
		return -EINVAL;
	/* The clock had that value at that time of day: it has gone on since. */
	if ((d->flags & KVM_CLOCK_REALTIME) && now.real > d->realtime)
		clock += now.real - d->realtime;
	kl_mutex_lock(&vm->pv->lock);
	vm->pv->master = now;
	vm->pv->clock_offset = (int64_t)(clock - now.boot);
	kl_mutex_unlock(&vm->pv->lock);
	kl_hv_clock_changed(vm);
	kl_pv_ask_all(vm);
	return 0;
}

/* ---- of a vCPU -------------------------------------------------------------------------- */

/* The guest may read it meanwhile: the version is odd then. */
static void write_clock(void *p, void *arg)
{
	struct kl_pvclock *c = arg;
	uint8_t *at = p;
	uint64_t word[3];
	uint8_t flags = kl_load8(at + offsetof(struct kl_pvclock, flags));

	c->version = (kl_load32(at) + 1) | 1;
	/* The guest takes that flag off itself. */
	c->flags |= flags & KL_PVCLOCK_GUEST_STOPPED;
	memcpy(word, &c->tsc_timestamp, sizeof(word));
	kl_store32(at, c->version);
	for (unsigned i = 0; i < 3; i++)
		kl_store64(at + 8 + 8 * i, word[i]);
	kl_store32(at, c->version + 1);
}

static void write_info_clock(void *p, void *arg)
{
	write_clock((uint8_t *)p + KL_XEN_INFO_TIME, arg);
}

/* The same for a guest of Xen, which has up to two. 0 or -EINTR. */
static int xen_clock_update(struct kl_vcpu *v, struct kl_pvclock c)
{
	struct kl_xen_vcpu *xv = &v->pv->xen;
	struct kl_pvclock again;
	int info = 0, time = 0;

	if (atomic_load(&v->kvm->pv->xen.flags) & KVM_XEN_HVM_CONFIG_PVCLOCK_TSC_UNSTABLE)
		c.flags &= (uint8_t)~KL_PVCLOCK_TSC_STABLE;
	again = c;
	if (xv->info_gpa != KL_XEN_INVALID || xv->info_hva)
		info = kl_pv_write(&xv->info, KL_XEN_INFO_SIZE, write_info_clock, &c);
	if (xv->time_gpa != KL_XEN_INVALID)
		time = kl_pv_write(&xv->time, sizeof(again), write_clock, &again);
	/* Once more when KVM_RUN begins: it may be there then. [B26] */
	xv->clock_due = info || time;
	return info == -EINTR || time == -EINTR ? -EINTR : 0;
}

static bool xen_has_clock(const struct kl_vcpu *v)
{
	const struct kl_xen_vcpu *xv = &v->pv->xen;

	return xv->info_gpa != KL_XEN_INVALID || xv->info_hva || xv->time_gpa != KL_XEN_INVALID;
}

int kl_pv_clock_update(struct kl_vcpu *v)
{
	struct kl_x86_vm *vm = v->kvm;
	struct kl_pv_moment at;
	struct kl_pvclock c = {0}, xen;
	uint64_t changes;
	bool page_due = kl_hv_tsc_page_due(vm, &changes);
	int r;

	kl_pvclock_scale(v->tsc_khz, &c);
	kl_cpuid_set_xen_clock(v, c.tsc_to_system_mul, c.tsc_shift);
	if (!(v->pv->clock_msr & 1) && !xen_has_clock(v) && !page_due)
		return 0;
	at = kl_pv_now();
	kl_mutex_lock(&vm->pv->lock);
	if (stable(vm)) {
		at = vm->pv->master;
		c.flags = KL_PVCLOCK_TSC_STABLE;
	}
	c.system_time = at.boot + (uint64_t)vm->pv->clock_offset;
	kl_mutex_unlock(&vm->pv->lock);
	c.tsc_timestamp = kl_tsc_scale(v, at.tsc) + v->tsc_offset;
	if (v->pv->stopped)
		c.flags |= KL_PVCLOCK_GUEST_STOPPED;
	racepoint("pv-clock");
	xen = c;
	r = v->pv->clock_msr & 1 ? kl_pv_write(&v->pv->clock, sizeof(c), write_clock, &c) : 0;
	if (!r)
		v->pv->stopped = false;
	if (r != -EINTR)
		r = xen_clock_update(v, xen);
	return r == -EINTR ? r : kl_hv_tsc_page_update(v, &xen, changes);
}

int kl_pv_clock_moved(struct kl_vcpu *v)
{
	uint64_t msr = v->pv->clock_msr;
	int r;

	/* A page that cannot be is none. */
	r = msr & 1 ? kl_gpc_activate(&v->pv->clock, msr & ~1ull, sizeof(struct kl_pvclock))
		    : kl_gpc_deactivate(&v->pv->clock);
	if (r == -EINVAL)
		r = kl_gpc_deactivate(&v->pv->clock);
	return r == -EINTR ? r : 0;
}

int kl_pv_guest_stopped(struct kl_vcpu *v)
{
	uint64_t msr = v->pv->clock_msr, room = KL_PAGE_SIZE - (msr & ~1ull) % KL_PAGE_SIZE;

	/* There is no clock across a page's end. */
	if (!(msr & 1) || room < sizeof(struct kl_pvclock))
		return -EINVAL;
	v->pv->stopped = true;
	kl_pv_ask(v, KL_PV_CLOCK);
	return 0;
}

/* ---- wall clock, and both clocks at once -------------------------------------------------- */

struct wall_clock {
	uint32_t version, sec, nsec;
};

uint64_t kl_pv_wall_epoch(struct kl_x86_vm *vm)
{
	struct kvm_clock_data now;

	kl_pv_get_clock(vm, &now);
	return (now.flags & KVM_CLOCK_REALTIME ? now.realtime : kl_pv_now().real) - now.clock;
}

int kl_pv_wall_clock_update(struct kl_vcpu *v)
{
	struct kl_x86_vm *vm = v->kvm;
	uint64_t gpa = atomic_load(&vm->pv->wall_clock), ns;
	struct wall_clock w = {0};
	int r;

	if (!gpa)
		return 0;
	r = kl_pv_copy(v, gpa, &w.version, 4, false);
	if (r)
		return r;
	ns = kl_pv_wall_epoch(vm);
	w.sec = (uint32_t)(ns / NS_PER_S);
	w.nsec = (uint32_t)(ns % NS_PER_S);
	w.version = (w.version + 1) | 1; /* odd: being written */
	r = kl_pv_copy(v, gpa, &w.version, 4, true);
	if (!r)
		r = kl_pv_copy(v, gpa + 4, &w.sec, 8, true);
	w.version++;
	if (!r)
		r = kl_pv_copy(v, gpa, &w.version, 4, true);
	return r;
}

/* struct kvm_clock_pairing: ABI. */
struct pairing {
	int64_t sec, nsec;
	uint64_t tsc;
	uint32_t flags, pad[9];
};

int kl_pv_clock_pairing(struct kl_vcpu *v)
{
	struct kl_pv_moment now = kl_pv_now();
	struct pairing p = {
		.sec = (int64_t)(now.real / NS_PER_S),
		.nsec = (int64_t)(now.real % NS_PER_S),
		.tsc = kl_tsc_scale(v, now.tsc) + v->tsc_offset,
	};
	int r = kl_pv_copy(v, v->pv->pairing_gpa, &p, sizeof(p), true);

	if (r != -EINTR)
		v->gpr[KL_RAX] = r ? (uint64_t)-14 : 0; /* -KVM_EFAULT */
	return r;
}
