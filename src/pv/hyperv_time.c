/* SPDX-License-Identifier: MIT */
/*
 * The partition's reference time, in units of 100 ns: a counter MSR, and a page with which the
 * guest computes the same from its TSC:
 *
 *     time = (tsc * scale >> 64) + offset, if the page's sequence is not 0
 *
 * The page is written by the thread of a vCPU that finds it due, with no lock held: the host may
 * take its time for it. Whoever changes what it should show meanwhile has raised tsc_changes, and
 * it is written again.
 */
#include <errno.h>

#include "base/racepoint.h"
#include "pv/pv.h"
#include "x86/tsc.h"

#define ENABLED 1ull

#define NS_PER_UNIT 100u

/* struct ms_hyperv_tsc_page, the part that is used: ABI. */
struct page {
	uint32_t sequence, reserved;
	uint64_t scale, offset;
};

static struct kl_hv_vm *hv_of(struct kl_x86_vm *vm)
{
	return &vm->pv->hv;
}

static uint64_t mul_high(uint64_t a, uint64_t b)
{
	return (uint64_t)((unsigned __int128)a * b >> 64);
}

uint64_t kl_hv_reference_count(struct kl_vcpu *v)
{
	struct kl_hv_vm *hv = hv_of(v->kvm);
	uint64_t scale, offset;
	bool set;

	kl_mutex_lock(&hv->lock);
	set = hv->tsc_status == KL_HV_TSC_SET;
	scale = hv->tsc_scale;
	offset = hv->tsc_offset;
	kl_mutex_unlock(&hv->lock);
	/* What the guest computes, to the unit. The page is only set where all TSCs agree. */
	return set ? mul_high(kl_x86_tsc(v), scale) + offset : kl_pv_clock_ns(v->kvm) / NS_PER_UNIT;
}

/*
 * A guest that emulates its TSC after a migration expects the page as it was, until it has noticed.
 * Context: hv->lock.
 */
static bool must_stay(const struct kl_hv_vm *hv)
{
	return hv->tsc_status != KL_HV_TSC_CHANGED_BY_GUEST && hv->tsc_emulation;
}

void kl_hv_tsc_page_moved(struct kl_vcpu *v, uint64_t data, bool host)
{
	struct kl_hv_vm *hv = hv_of(v->kvm);

	kl_assert_held(&hv->lock);
	hv->tsc_page = data;
	hv->tsc_changes++;
	if (!(data & ENABLED)) {
		hv->tsc_status = KL_HV_TSC_UNSET;
		return;
	}
	hv->tsc_status = host ? KL_HV_TSC_CHANGED_BY_HOST : KL_HV_TSC_CHANGED_BY_GUEST;
	kl_pv_ask(v, KL_PV_CLOCK);
}

void kl_hv_clock_changed(struct kl_x86_vm *vm)
{
	struct kl_hv_vm *hv = hv_of(vm);

	kl_mutex_lock(&hv->lock);
	if (hv->tsc_status == KL_HV_TSC_SET && !must_stay(hv))
		hv->tsc_status = KL_HV_TSC_CHANGED_BY_HOST;
	hv->tsc_changes++;
	kl_mutex_unlock(&hv->lock);
}

static bool due(const struct kl_hv_vm *hv)
{
	return hv->tsc_status == KL_HV_TSC_CHANGED_BY_GUEST ||
	       hv->tsc_status == KL_HV_TSC_CHANGED_BY_HOST;
}

bool kl_hv_tsc_page_due(struct kl_x86_vm *vm, uint64_t *changes)
{
	struct kl_hv_vm *hv = hv_of(vm);
	bool yes;

	kl_mutex_lock(&hv->lock);
	yes = due(hv);
	*changes = hv->tsc_changes;
	kl_mutex_unlock(&hv->lock);
	return yes;
}

/* kvmclock's factors as the page has them. False: they have no room there, or TSCs differ. */
static bool compute(const struct kl_pvclock *c, struct page *p)
{
	uint64_t tsc = c->tsc_timestamp, ns = c->system_time;

	if (!(c->flags & KL_PVCLOCK_TSC_STABLE) ||
	    c->tsc_to_system_mul >= (unsigned __int128)NS_PER_UNIT << (32 - c->tsc_shift))
		return false;
	/*
	 * All vCPUs' clocks may start from before this one's TSC was 0. A product of that would not
	 * be the guest's, less something: it starts from 0, then.
	 */
	if ((int64_t)tsc < 0) {
		ns = kl_pvclock_ns(c, 0);
		tsc = 0;
	}
	p->scale = (uint64_t)(((unsigned __int128)c->tsc_to_system_mul << (32 + c->tsc_shift)) /
			      NS_PER_UNIT);
	p->offset = ns / NS_PER_UNIT - mul_high(tsc, p->scale);
	return true;
}

/* 0, and what it shows then in *@p; -errno. */
static int write_page(struct kl_vcpu *v, uint64_t gpa, bool keep, const struct kl_pvclock *c,
		      struct page *p)
{
	uint32_t sequence, none = 0;
	int r = kl_pv_copy(v, gpa, &sequence, sizeof(sequence), false);

	if (r)
		return r;
	if (sequence && keep)
		return kl_pv_copy(v, gpa, p, sizeof(*p), false);
	/* Who reads it meanwhile uses the counter. */
	r = kl_pv_copy(v, gpa, &none, sizeof(none), true);
	racepoint("hv-tsc-page");
	if (!r && !compute(c, p))
		r = -ERANGE;
	p->sequence = p->reserved = 0;
	if (!r)
		r = kl_pv_copy(v, gpa, p, sizeof(*p), true);
	sequence++;
	if (sequence == UINT32_MAX || !sequence)
		sequence = 1;
	return r ? r : kl_pv_copy(v, gpa, &sequence, sizeof(sequence), true);
}

int kl_hv_tsc_page_update(struct kl_vcpu *v, const struct kl_pvclock *c, uint64_t changes)
{
	struct kl_hv_vm *hv = hv_of(v->kvm);
	struct page p = {0};
	uint64_t gpa;
	bool keep;
	int r;

	kl_mutex_lock(&hv->lock);
	if (!due(hv) || hv->tsc_writing) {
		kl_mutex_unlock(&hv->lock);
		return 0;
	}
	hv->tsc_writing = true;
	gpa = hv->tsc_page & KL_PAGE_MASK;
	keep = must_stay(hv);
	kl_mutex_unlock(&hv->lock);

	r = write_page(v, gpa, keep, c, &p);

	kl_mutex_lock(&hv->lock);
	hv->tsc_writing = false;
	if (hv->tsc_changes == changes && r != -EINTR) {
		hv->tsc_status = r ? KL_HV_TSC_BROKEN : KL_HV_TSC_SET;
		hv->tsc_scale = p.scale;
		hv->tsc_offset = p.offset;
	}
	changes = hv->tsc_changes - changes;
	kl_mutex_unlock(&hv->lock);
	if (changes || r == -EINTR)
		kl_pv_ask_all(v->kvm); /* who found "writing" meanwhile has gone on */
	return r == -EINTR ? r : 0;
}
