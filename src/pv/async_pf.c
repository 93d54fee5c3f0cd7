/* SPDX-License-Identifier: MIT */
/*
 * Asynchronous page faults: where the vCPU would have to wait for a page, the guest gets #PF with a
 * token, and the token again in its area, by an interrupt, when the page is there (X3).
 *
 *   flags   1, written before each #PF; the guest takes it back
 *   token   of a page that has come; 0: the guest has taken it
 *
 * Every #PF is followed by its token, unless the guest disables the whole or is reset: that alone
 * ends what is under way. So first a helper is found that waits (host/await.h), then the flags are
 * written, and only if both are done is there a #PF. Tokens are told in the order in which their
 * pages came, one at a time; the next one when the guest acknowledges.
 *
 * Helpers set an item's done, and KL_PV_ASYNC_PF. All else is the vCPU's thread's.
 */
#include <errno.h>

#include "base/racepoint.h"
#include "host/access.h"
#include "pv/pv.h"
#include "x86/access.h"
#include "x86/lapic.h"
#include "x86/lapic_state.h"

#define ENABLED      (1ull << 0)
#define SEND_ALWAYS  (1ull << 1)
#define AS_VMEXIT    (1ull << 2)
#define BY_INTERRUPT (1ull << 3)
#define RESERVED     (3ull << 4)
#define LOW_BITS     0x3full
#define WAKE_ALL     (~0u) /* a token: whatever was waited for before the area was there */

/* struct kvm_vcpu_pv_apf_data, as far as it is used: ABI. */
struct area {
	uint32_t flags, token;
};
#define NOT_PRESENT 1u

void kl_pv_async_pf_init(struct kl_vcpu *v)
{
	for (unsigned i = 0; i < KL_ARRAY_SIZE(v->pv->apf.item); i++)
		v->pv->apf.item[i].apf = &v->pv->apf;
}

static void cancel_all(struct kl_vcpu *v)
{
	struct kl_pv_apf *a = &v->pv->apf;

	for (unsigned i = 0; i < KL_ARRAY_SIZE(a->item) && a->in_use; i++) {
		struct kl_pv_apf_item *it = &a->item[i];

		if (!it->token)
			continue;
		kl_await_cancel(&it->wait);
		it->token = 0;
		a->in_use--;
	}
}

void kl_pv_async_pf_stop(struct kl_vcpu *v)
{
	v->pv_apf = false;
	v->pv->apf.en_msr = v->pv->apf.int_msr = 0;
	cancel_all(v);
}

void kl_pv_async_pf_destroy(struct kl_vcpu *v)
{
	kl_pv_async_pf_stop(v);
	if (v->pv->apf.helpers)
		kl_await_put();
}

/* ---- page not present ------------------------------------------------------------------- */

/* Helper: the page is there, or will not come; the guest's next access tells. */
static void page_came(struct kl_await *w)
{
	struct kl_pv_apf_item *it = kl_container_of(w, struct kl_pv_apf_item, wait);
	struct kl_pv_apf *a = it->apf;

	atomic_store(&it->done, atomic_fetch_add(&a->nr_done, 1) + 1);
	kl_pv_ask(kl_container_of(a, struct kl_pv_vcpu, apf)->v, KL_PV_ASYNC_PF_READY);
	racepoint("apf-page-came");
}

/* NULL: @gfn is waited for already, or too many are. */
static struct kl_pv_apf_item *new_item(struct kl_pv_apf *a, kl_gfn_t gfn)
{
	struct kl_pv_apf_item *free = NULL;

	for (unsigned i = 0; i < KL_PV_MAX_ASYNC_PF; i++) {
		struct kl_pv_apf_item *it = &a->item[i];

		if (!it->token)
			free = it;
		else if (it->gfn == gfn)
			return NULL;
	}
	return free;
}

/* Never 0, nor another vCPU's. */
static uint32_t new_token(struct kl_vcpu *v)
{
	uint32_t *id = &v->pv->apf.last_id;

	if (!(uint32_t)(++*id << 12))
		*id = 1;
	return *id << 12 | v->core.id;
}

static void write_flags(void *p, void *arg)
{
	(void)arg;
	kl_store32((uint8_t *)p + offsetof(struct area, flags), NOT_PRESENT);
}

int kl_pv_async_pf(struct kl_vcpu *v, uint64_t gpa, bool write, uint32_t *token)
{
	struct kl_pv_apf *a = &v->pv->apf;
	struct kl_pv_apf_item *it = new_item(a, gpa >> KL_PAGE_SHIFT);
	int r;

	if (!it)
		return -EAGAIN;
	it->gfn = gpa >> KL_PAGE_SHIFT;
	atomic_store(&it->done, 0);
	it->wait.done = page_came;
	if (kl_await_start(&it->wait, v->core.awaited, write))
		return -EAGAIN;
	r = kl_pv_write(&a->area, sizeof(struct area), write_flags, NULL);
	if (r) {
		kl_await_cancel(&it->wait);
		return r == -EINTR ? r : -EAGAIN;
	}
	a->in_use++;
	*token = it->token = new_token(v);
	racepoint("apf-not-present");
	return 0;
}

/* ---- page ready ------------------------------------------------------------------------- */

static struct kl_pv_apf_item *first_done(struct kl_pv_apf *a)
{
	struct kl_pv_apf_item *first = NULL;
	uint64_t at, best = UINT64_MAX;

	for (unsigned i = 0; i < KL_ARRAY_SIZE(a->item); i++) {
		at = a->item[i].token ? atomic_load(&a->item[i].done) : 0;
		if (at && at < best) {
			best = at;
			first = &a->item[i];
		}
	}
	return first;
}

static void read_token(void *p, void *arg)
{
	*(uint32_t *)arg = kl_load32((const uint8_t *)p + offsetof(struct area, token));
}

static void write_token(void *p, void *arg)
{
	kl_store32((uint8_t *)p + offsetof(struct area, token), *(const uint32_t *)arg);
}

/* 0: the guest has been told; -EAGAIN: not now; -EINTR. */
static int tell(struct kl_vcpu *v, uint32_t token)
{
	struct kl_gpc *area = &v->pv->apf.area;
	uint32_t old;
	int r;

	if (!kl_apic_hw_enabled(v->apic) || !kl_apic_sw_enabled(v->apic))
		return -EAGAIN;
	r = kl_pv_read(area, sizeof(struct area), read_token, &old);
	if (!r && old)
		return -EAGAIN;
	if (!r)
		r = kl_pv_write(area, sizeof(struct area), write_token, &token);
	if (r)
		return r == -EINTR ? r : -EAGAIN;
	kl_pv_inject_vector(v, (uint8_t)v->pv->apf.int_msr);
	/* As KVM: out of HLT, whether or not the interrupt can be delivered. */
	if (atomic_load_explicit(&v->mp_state, memory_order_relaxed) == KVM_MP_STATE_HALTED)
		atomic_store_explicit(&v->mp_state, KVM_MP_STATE_RUNNABLE, memory_order_relaxed);
	return 0;
}

int kl_pv_async_pf_ready(struct kl_vcpu *v)
{
	struct kl_pv_apf *a = &v->pv->apf;
	struct kl_pv_apf_item *it;

	while (v->pv_apf && (it = first_done(a))) {
		int r = tell(v, it->token);

		if (r)
			return r == -EINTR ? r : 0;
		kl_await_cancel(&it->wait); /* the helper may not quite have let go of it */
		it->token = 0;
		a->in_use--;
	}
	return 0;
}

/* ---- MSRs ------------------------------------------------------------------------------- */

/* Whoever sleeps for a page of before: look again. Not needed where a token comes anyway, as in
 * KVM. */
static void wake_all(struct kl_pv_apf *a)
{
	struct kl_pv_apf_item *it = &a->item[KL_PV_MAX_ASYNC_PF];

	if (first_done(a))
		return;
	it->token = WAKE_ALL;
	atomic_store(&it->done, atomic_fetch_add(&a->nr_done, 1) + 1);
	a->in_use++;
}

enum kl_pv_result kl_pv_async_pf_enable(struct kl_vcpu *v, uint64_t msr)
{
	struct kl_pv_apf *a = &v->pv->apf;
	bool on = (msr & ENABLED) && (msr & BY_INTERRUPT);

	if ((msr & RESERVED) || ((msr & AS_VMEXIT) && !kl_pv_has(v, KL_PV_ASYNC_PF_VMEXIT)) ||
	    ((msr & BY_INTERRUPT) && !kl_pv_has(v, KL_PV_ASYNC_PF_INT)))
		return KL_PV_REFUSED;
	if (!v->apic)
		return msr ? KL_PV_REFUSED : KL_PV_OK;
	if (on && !kl_pv_is_ram(&v->kvm->mem, msr >> KL_PAGE_SHIFT))
		return KL_PV_REFUSED;
	a->en_msr = msr;
	v->pv_apf = on;
	v->pv_apf_user_only = !(msr & SEND_ALWAYS);
	kl_pv_ask(v, KL_PV_ASYNC_PF_MOVED | KL_PV_ASYNC_PF_READY);
	if (!on) {
		cancel_all(v);
		return KL_PV_OK;
	}
	if (!a->helpers)
		kl_await_get();
	a->helpers = true;
	wake_all(a);
	return KL_PV_OK;
}

int kl_pv_async_pf_moved(struct kl_vcpu *v)
{
	struct kl_pv_apf *a = &v->pv->apf;
	int r = v->pv_apf ? kl_gpc_activate(&a->area, a->en_msr & ~LOW_BITS, sizeof(struct area))
			  : kl_gpc_deactivate(&a->area);

	return r == -EINTR ? r : 0;
}
