/* SPDX-License-Identifier: MIT */
/* Xen HVM: the VM's part. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/racepoint.h"
#include "host/access.h"
#include "host/cpu.h"
#include "host/guard.h"
#include "host/sys.h"
#include "pv/pv.h"
#include "pv/xen_abi.h"
#include "x86/access.h"

#define NS_PER_S 1000000000ull

#define HCALL_ENTRY 32u /* bytes of the hypercall page for each number */

#define FIRST_VECTOR 0x10

static struct kl_xen_vm *xen_of(struct kl_x86_vm *vm)
{
	return &vm->pv->xen;
}

int kl_xen_vm_init(struct kl_x86_vm *vm)
{
	struct kl_xen_vm *xen = xen_of(vm);
	int r = kl_gpc_init(&xen->shinfo, &vm->mem, 0, KL_GPC_SHARED_INFO);

	if (r)
		return r;
	kl_mutex_init(&xen->lock, KL_RANK_XEN);
	kl_mutex_init(&xen->ports_lock, KL_RANK_LEAF);
	xen->shinfo_gfn = KL_XEN_INVALID;
	return 0;
}

void kl_xen_vm_destroy(struct kl_x86_vm *vm)
{
	struct kl_xen_vm *xen = xen_of(vm);

	for (unsigned i = 0; xen->ports && i < KL_XEN_PORTS_64; i++) {
		if (xen->ports[i].type && !xen->ports[i].port)
			kl_sys_close(xen->ports[i].fd);
	}
	free(xen->ports);
	kl_gpc_destroy(&xen->shinfo);
	kl_mutex_destroy(&xen->ports_lock);
	kl_mutex_destroy(&xen->lock);
}

unsigned kl_xen_max_port(struct kl_x86_vm *vm)
{
	return atomic_load(&xen_of(vm)->long_mode) ? KL_XEN_PORTS_64 : KL_XEN_PORTS_32;
}

int kl_xen_config(struct kl_x86_vm *vm, const struct kvm_xen_hvm_config *c)
{
	const uint32_t known = KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL | KVM_XEN_HVM_CONFIG_EVTCHN_SEND |
			       KVM_XEN_HVM_CONFIG_PVCLOCK_TSC_UNSTABLE;
	struct kl_xen_vm *xen = xen_of(vm);
	uint32_t old;

	if (c->flags & ~known)
		return -EINVAL;
	if ((c->flags & KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL) &&
	    (c->blob_addr_32 || c->blob_addr_64 || c->blob_size_32 || c->blob_size_64))
		return -EINVAL;
	kl_mutex_lock(&xen->lock);
	old = atomic_exchange(&xen->flags, c->flags);
	xen->blob[0] = c->blob_addr_32;
	xen->blob[1] = c->blob_addr_64;
	xen->blob_pages[0] = c->blob_size_32;
	xen->blob_pages[1] = c->blob_size_64;
	atomic_store(&vm->xen_msr, c->msr);
	atomic_store(&vm->xen_hypercalls,
		     c->msr && (c->flags & KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL));
	kl_mutex_unlock(&xen->lock);
	if ((old ^ c->flags) & KVM_XEN_HVM_CONFIG_PVCLOCK_TSC_UNSTABLE)
		kl_pv_ask_all(vm);
	return 0;
}

/* ---- shared_info ------------------------------------------------------------------------ */

struct wall_clock {
	bool wide;
	uint64_t s;
	uint32_t ns;
};

static void write_wall_clock(void *p, void *arg)
{
	struct wall_clock *w = arg;
	uint8_t *at = (uint8_t *)p + (w->wide ? 0xc00 : 0x900);
	uint8_t *high = (uint8_t *)p + (w->wide ? 0xc0c : 0x924);
	uint32_t version = (kl_load32(at) + 1) | 1; /* odd: being written */

	kl_store32(at, version);
	kl_store32(at + 4, (uint32_t)w->s);
	kl_store32(at + 8, w->ns);
	kl_store32(high, (uint32_t)(w->s >> 32));
	kl_store32(at, version + 1);
}

int kl_xen_wall_clock(struct kl_x86_vm *vm)
{
	struct kl_xen_vm *xen = xen_of(vm);
	uint64_t ns = kl_pv_wall_epoch(vm);
	struct wall_clock w = {atomic_load(&xen->long_mode), ns / NS_PER_S,
			       (uint32_t)(ns % NS_PER_S)};
	int r = kl_pv_write(&xen->shinfo, KL_PAGE_SIZE, write_wall_clock, &w);

	/* It is written when it is there. [B26] */
	atomic_store(&xen->wall_clock_due, r);
	return r == -EINTR ? r : 0;
}

/* Where the wall clock is depends on the mode, and what it says on all vCPUs' clocks. */
static int shared_info_changed(struct kl_x86_vm *vm)
{
	struct kl_xen_vm *xen = xen_of(vm);
	int r;

	kl_assert_held(&xen->lock);
	if (xen->shinfo_gfn == KL_XEN_INVALID && !xen->shinfo_hva) {
		atomic_store(&xen->wall_clock_due, false);
		return 0;
	}
	r = kl_xen_wall_clock(vm);
	if (!r)
		kl_pv_ask_all(vm);
	return r;
}

static int set_shared_info(struct kl_x86_vm *vm, uint64_t gfn, uint64_t hva)
{
	struct kl_xen_vm *xen = xen_of(vm);
	int r;

	kl_assert_held(&xen->lock);
	if (hva & ~KL_PAGE_MASK)
		return -EINVAL;
	if (hva)
		r = kl_gpc_activate_hva(&xen->shinfo, (kl_hva_t){hva}, KL_PAGE_SIZE);
	else if (gfn != KL_XEN_INVALID)
		r = kl_gpc_activate(&xen->shinfo, gfn << KL_PAGE_SHIFT, KL_PAGE_SIZE);
	else
		r = kl_gpc_deactivate(&xen->shinfo);
	if (r)
		return r;
	racepoint("xen-shinfo-set");
	xen->shinfo_gfn = gfn;
	xen->shinfo_hva = hva;
	return shared_info_changed(vm);
}

/* ---- attributes ------------------------------------------------------------------------- */

static int set_upcall_vector(struct kl_x86_vm *vm, uint8_t vector)
{
	if (vector && vector < FIRST_VECTOR)
		return -EINVAL;
	atomic_store(&vm->xen_vector, vector);
	return 0;
}

static int set_long_mode(struct kl_x86_vm *vm, bool on)
{
	kl_assert_held(&xen_of(vm)->lock);
	atomic_store(&xen_of(vm)->long_mode, on);
	return shared_info_changed(vm);
}

static int set_locked(struct kl_x86_vm *vm, const struct kvm_xen_hvm_attr *a)
{
	struct kl_xen_vm *xen = xen_of(vm);

	switch (a->type) {
	case KVM_XEN_ATTR_TYPE_LONG_MODE:
		return set_long_mode(vm, a->u.long_mode);
	case KVM_XEN_ATTR_TYPE_SHARED_INFO:
		return set_shared_info(vm, a->u.shared_info.gfn, 0);
	case KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA:
		return set_shared_info(vm, KL_XEN_INVALID, a->u.shared_info.gfn);
	case KVM_XEN_ATTR_TYPE_UPCALL_VECTOR:
		return set_upcall_vector(vm, a->u.vector);
	case KVM_XEN_ATTR_TYPE_XEN_VERSION:
		atomic_store(&xen->version, a->u.xen_version);
		return 0;
	case KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG:
		if (!kl_pv_steal_supported())
			return -EOPNOTSUPP;
		atomic_store(&xen->runstate_update_flag, a->u.long_mode);
		return 0;
	default:
		return -ENOENT;
	}
}

int kl_xen_set_attr(struct kl_x86_vm *vm, const struct kvm_xen_hvm_attr *a)
{
	struct kl_xen_vm *xen = xen_of(vm);
	int r;

	if (a->type == KVM_XEN_ATTR_TYPE_EVTCHN)
		return kl_xen_set_target(vm, a);
	kl_mutex_lock(&xen->lock);
	r = set_locked(vm, a);
	kl_mutex_unlock(&xen->lock);
	return r;
}

int kl_xen_get_attr(struct kl_x86_vm *vm, struct kvm_xen_hvm_attr *a)
{
	struct kl_xen_vm *xen = xen_of(vm);
	int r = 0;

	kl_mutex_lock(&xen->lock);
	switch (a->type) {
	case KVM_XEN_ATTR_TYPE_LONG_MODE:
		a->u.long_mode = atomic_load(&xen->long_mode);
		break;
	case KVM_XEN_ATTR_TYPE_SHARED_INFO:
		a->u.shared_info.gfn = xen->shinfo_gfn;
		break;
	case KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA:
		a->u.shared_info.gfn = xen->shinfo_hva;
		break;
	case KVM_XEN_ATTR_TYPE_UPCALL_VECTOR:
		a->u.vector = atomic_load(&vm->xen_vector);
		break;
	case KVM_XEN_ATTR_TYPE_XEN_VERSION:
		a->u.xen_version = atomic_load(&xen->version);
		break;
	case KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG:
		if (kl_pv_steal_supported())
			a->u.long_mode = atomic_load(&xen->runstate_update_flag);
		else
			r = -EOPNOTSUPP;
		break;
	default:
		r = -ENOENT;
	}
	kl_mutex_unlock(&xen->lock);
	return r;
}

int kl_xen_evtchn_send(struct kl_x86_vm *vm, const struct kvm_irq_routing_xen_evtchn *e)
{
	int r;

	if (!e->port || e->port >= kl_xen_max_port(vm) ||
	    e->priority != KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL)
		return -EINVAL;
	r = kl_xen_raise(vm, e->port, e->vcpu, true);
	return r > 0 || r == -ENOTCONN ? 0 : r;
}

/* ---- the hypercall page ------------------------------------------------------------------ */

/* mov $n, %eax; vmcall or vmmcall; ret; the rest traps. */
static void fill_page(uint8_t *page)
{
	memset(page, 0xcc, KL_PAGE_SIZE);
	for (uint32_t n = 0; n < KL_PAGE_SIZE / HCALL_ENTRY; n++) {
		uint8_t *p = page + n * HCALL_ENTRY;

		p[0] = 0xb8;
		memcpy(p + 1, &n, sizeof(n));
		p[5] = 0x0f;
		p[6] = 0x01;
		p[7] = kl_host_is_intel() ? 0xc1 : 0xd9;
		p[8] = 0xc3;
	}
}

/* 0; 1, the guest is refused; -errno of KVM_RUN. */
static int write_page(struct kl_vcpu *v, uint64_t data)
{
	struct kl_xen_vm *xen = xen_of(v->kvm);
	uint64_t nr = data & ~KL_PAGE_MASK, blob;
	bool wide = v->efer & KL_EFER_LMA, own;
	uint8_t page[KL_PAGE_SIZE];
	unsigned pages;
	int r = 0;

	kl_mutex_lock(&xen->lock);
	if (atomic_load(&xen->long_mode) != wide)
		r = set_long_mode(v->kvm, wide);
	own = atomic_load(&xen->flags) & KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL;
	blob = xen->blob[wide];
	pages = xen->blob_pages[wide];
	kl_mutex_unlock(&xen->lock);
	if (r)
		return r;
	if (nr >= (own ? 1 : pages))
		return 1;
	if (own)
		fill_page(page);
	else if (kl_copy_from_user(page, (void *)(blob + nr * KL_PAGE_SIZE), sizeof(page)))
		return -EFAULT;
	return kl_pv_place(v, data & KL_PAGE_MASK, page, sizeof(page));
}

enum kl_pv_result kl_pv_xen_set_msr(struct kl_vcpu *v, uint64_t data, bool host)
{
	int r;

	if (!host)
		kl_guest_pause(v);
	r = write_page(v, data);
	if (!host)
		kl_guest_resume(v);
	return kl_pv_placed(v, r, host);
}
