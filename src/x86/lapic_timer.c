/* SPDX-License-Identifier: MIT */
/*
 * The local APIC's timer: one-shot and periodic counts of the APIC bus clock, TSC deadline.
 *
 * Expiry sets timer.pending, in the helper thread or at once; the vCPU's thread makes the
 * interrupt of it (kl_apic_inject_timer()). The callback reads mode, period and target, which
 * the vCPU's thread changes only while the timer is cancelled, or in ways that suit both.
 */
#include "x86/lapic_state.h"
#include "x86/tsc.h"

#define MIN_PERIOD_NS 200000ull
#define FOREVER       (UINT64_MAX / 4)

static uint32_t mode(const struct kl_lapic *a)
{
	return atomic_load_explicit(&a->timer.mode, memory_order_relaxed);
}

static uint64_t get(const _Atomic uint64_t *x)
{
	return atomic_load_explicit(x, memory_order_relaxed);
}

static void set(_Atomic uint64_t *x, uint64_t val)
{
	atomic_store_explicit(x, val, memory_order_relaxed);
}

static uint64_t sum(uint64_t a, uint64_t b)
{
	return b > FOREVER ? a + FOREVER : a + b;
}

/* The interrupt is wanted, and not wanted already. */
static void expired(struct kl_lapic *a)
{
	if (atomic_exchange(&a->timer.pending, 1))
		return;
	racepoint("apic-timer-pending");
	kl_vcpu_request(&a->v->core, KL_REQ_EVENT);
}

/* ns until the host's TSC is @tsc; 0: it has been. */
static uint64_t ns_to_tsc(const struct kl_lapic *a, uint64_t tsc)
{
	uint64_t now = kl_host_tsc();
	unsigned __int128 ns;

	if ((int64_t)(tsc - now) <= 0)
		return 0;
	ns = (unsigned __int128)(tsc - now) * 1000000u / a->v->kvm->tsc_khz;
	return ns > FOREVER ? FOREVER : (uint64_t)ns + 1;
}

static void arm_deadline(struct kl_lapic *a)
{
	uint64_t ns = ns_to_tsc(a, get(&a->timer.host_tsc));

	if (ns)
		kl_timer_arm(&a->timer.t, sum(kl_timer_now(), ns));
	else
		expired(a);
}

/* The next target of a periodic timer. What was missed is not made up for. */
static void advance(struct kl_lapic *a)
{
	uint64_t now = kl_timer_now();
	uint64_t target = sum(get(&a->timer.target), get(&a->timer.period));

	set(&a->timer.target, kl_max(target, now));
}

/* In the helper thread. */
static void fire(struct kl_timer *t)
{
	struct kl_lapic *a = kl_container_of(t, struct kl_lapic, timer.t);

	if (mode(a) == TIMER_TSCDEADLINE) {
		/* The two clocks drift: not before the guest's own clock says so. */
		arm_deadline(a);
		return;
	}
	expired(a);
	if (mode(a) == TIMER_PERIODIC && get(&a->timer.period)) {
		advance(a);
		kl_timer_arm(t, get(&a->timer.target));
	}
}

void kl_apic_timer_init(struct kl_lapic *a)
{
	kl_timer_init(&a->timer.t, fire);
	a->timer.mode_mask = TIMER_PERIODIC;
	a->timer.divide = 2;
}

void kl_apic_timer_cancel(struct kl_lapic *a)
{
	kl_timer_cancel(&a->timer.t);
	atomic_store(&a->timer.pending, 0);
}

static void limit_period(struct kl_lapic *a)
{
	uint64_t period = get(&a->timer.period);

	if (mode(a) == TIMER_PERIODIC && period && period < MIN_PERIOD_NS)
		set(&a->timer.period, MIN_PERIOD_NS);
}

void kl_apic_timer_update_mode(struct kl_lapic *a)
{
	uint32_t old = mode(a), new = kl_apic_reg(a, APIC_LVTT) & a->timer.mode_mask;

	if (new == old)
		return;
	if ((new == TIMER_TSCDEADLINE) != (old == TIMER_TSCDEADLINE)) {
		kl_apic_timer_cancel(a);
		kl_apic_set_reg(a, APIC_TMICT, 0);
		set(&a->timer.period, 0);
		a->timer.tsc_deadline = 0;
	}
	atomic_store_explicit(&a->timer.mode, new, memory_order_relaxed);
	limit_period(a);
}

static uint64_t count_to_ns(const struct kl_lapic *a, uint32_t count)
{
	return (uint64_t)count * a->v->kvm->apic_bus_cycle_ns * a->timer.divide;
}

/* Arm what is set up. A count that is over fires at once. */
static void restart(struct kl_lapic *a)
{
	bool periodic = mode(a) == TIMER_PERIODIC;

	if (!periodic && atomic_load(&a->timer.pending))
		return;
	if (mode(a) == TIMER_TSCDEADLINE) {
		if (a->timer.tsc_deadline)
			arm_deadline(a);
		return;
	}
	if (mode(a) > TIMER_PERIODIC || !get(&a->timer.period))
		return;
	if (kl_timer_now() > get(&a->timer.target)) {
		expired(a);
		if (!periodic)
			return;
		advance(a);
	}
	kl_timer_arm(&a->timer.t, get(&a->timer.target));
}

/* False: the count is 0. */
static bool set_target(struct kl_lapic *a, unsigned count)
{
	uint64_t now = kl_timer_now(), ns;

	set(&a->timer.period, count_to_ns(a, kl_apic_reg(a, APIC_TMICT)));
	if (!get(&a->timer.period))
		return false;
	limit_period(a);
	ns = get(&a->timer.period);
	if (count != APIC_TMICT) {
		uint64_t rest = count_to_ns(a, kl_apic_reg(a, count));

		if (rest > ns)
			kl_apic_set_reg(a, count, 0);
		else if (rest)
			ns = rest;
		else if (mode(a) == TIMER_ONESHOT)
			ns = 0;
	}
	set(&a->timer.target, sum(now, ns));
	return true;
}

void kl_apic_timer_start(struct kl_lapic *a, unsigned count)
{
	atomic_store(&a->timer.pending, 0);
	if (mode(a) <= TIMER_PERIODIC && !set_target(a, count))
		return;
	restart(a);
}

void kl_apic_timer_update_divide(struct kl_lapic *a)
{
	uint32_t tdcr = kl_apic_reg(a, APIC_TDCR), old = a->timer.divide;
	uint64_t now, left;

	a->timer.divide = 1u << ((((tdcr & 3) | (tdcr & 8) >> 1) + 1) & 7);
	if (a->timer.divide == old || !get(&a->timer.period))
		return;
	/* The count goes on, at another pace. */
	kl_timer_cancel(&a->timer.t);
	set(&a->timer.period, count_to_ns(a, kl_apic_reg(a, APIC_TMICT)));
	limit_period(a);
	now = kl_timer_now();
	left = get(&a->timer.target);
	left = left > now ? left - now : 0;
	left = (uint64_t)((unsigned __int128)left * a->timer.divide / old);
	set(&a->timer.target, sum(now, left));
	restart(a);
}

uint32_t kl_apic_timer_count(struct kl_lapic *a)
{
	uint64_t period = get(&a->timer.period), target = get(&a->timer.target), now;

	if (mode(a) == TIMER_TSCDEADLINE || !kl_apic_reg(a, APIC_TMICT) || !period)
		return 0;
	now = kl_timer_now();
	if (target <= now)
		return 0;
	return (uint32_t)((target - now) % period /
			  (a->v->kvm->apic_bus_cycle_ns * a->timer.divide));
}

/* ---- for the vCPU ---- */

bool kl_apic_timer_due(struct kl_vcpu *v)
{
	struct kl_lapic *a = v->apic;

	return atomic_load(&a->timer.pending) && kl_apic_sw_enabled(a) && kl_apic_hw_enabled(a) &&
	       !(kl_apic_reg(a, APIC_LVTT) & LVT_MASKED);
}

void kl_apic_inject_timer(struct kl_vcpu *v)
{
	struct kl_lapic *a = v->apic;

	/* First: a periodic timer that expires meanwhile wants one more. */
	atomic_store(&a->timer.pending, 0);
	kl_apic_deliver_lvt(a, APIC_LVTT);
	if (mode(a) == TIMER_TSCDEADLINE)
		a->timer.tsc_deadline = 0;
	else if (mode(a) == TIMER_ONESHOT)
		set(&a->timer.target, 0);
}

static bool deadline_mode(struct kl_vcpu *v)
{
	return v->apic && kl_apic_hw_enabled(v->apic) && mode(v->apic) == TIMER_TSCDEADLINE;
}

uint64_t kl_apic_tsc_deadline(struct kl_vcpu *v)
{
	return deadline_mode(v) ? v->apic->timer.tsc_deadline : 0;
}

void kl_apic_set_tsc_deadline(struct kl_vcpu *v, uint64_t tsc)
{
	struct kl_lapic *a = v->apic;

	if (!deadline_mode(v))
		return;
	kl_timer_cancel(&a->timer.t);
	a->timer.tsc_deadline = tsc;
	set(&a->timer.host_tsc, kl_tsc_to_host(v, tsc));
	kl_apic_timer_start(a, APIC_TMICT);
}
