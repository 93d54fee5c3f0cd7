/* SPDX-License-Identifier: MIT */
/*
 * Xen's event channels in two levels. A bit per port in shared_info, a bit per word of those in
 * the vCPU's vcpu_info, and a byte there that says so; then the interrupt.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/failpoint.h"
#include "base/racepoint.h"
#include "host/atomic.h"
#include "host/eventfd.h"
#include "host/sys.h"
#include "pv/pv.h"
#include "pv/xen_abi.h"
#include "x86/lapic.h"

#define RETRY_NS 1000000ull

static struct kl_xen_vm *xen_of(struct kl_x86_vm *vm)
{
	return &vm->pv->xen;
}

static struct kl_vcpu *vcpu_by_id(struct kl_x86_vm *vm, uint32_t id)
{
	unsigned n = atomic_load(&vm->mem.nr_vcpus);

	for (unsigned i = 0; i < n; i++) {
		struct kl_vcpu_core *c = atomic_load(&vm->mem.vcpus[i]);

		if (c && c->id == id)
			return kl_container_of(c, struct kl_vcpu, core);
	}
	return NULL;
}

/* ---- bits in guest memory ----------------------------------------------------------------- */

/* By bytes, which are aligned wherever the guest has put them. Returns what it was. */
static bool set_bit(uint8_t *bits, unsigned n)
{
	uint8_t *p = bits + n / 8, bit = (uint8_t)(1u << n % 8), old = kl_load8(p);

	while (!(old & bit)) {
		uint8_t seen = kl_cmpxchg8(p, old, old | bit);

		if (seen == old)
			return false;
		old = seen;
	}
	return true;
}

struct raise {
	uint32_t port;
	bool wide;
	bool was, masked;
};

static void raise_port(void *p, void *arg)
{
	struct raise *e = arg;
	uint8_t *pending = (uint8_t *)p + 0x800;
	uint8_t *mask = (uint8_t *)p + (e->wide ? 0xa00 : 0x880);

	e->was = set_bit(pending, e->port);
	e->masked = kl_load8(mask + e->port / 8) >> e->port % 8 & 1;
}

struct select {
	uint64_t words;
	bool wide;
	bool news;
};

static void select_words(void *p, void *arg)
{
	struct select *s = arg;
	uint8_t *sel = (uint8_t *)p + (s->wide ? 8 : 4);

	s->news = false;
	for (unsigned i = 0; i < (s->wide ? 64 : 32); i++) {
		if ((s->words >> i & 1) && !set_bit(sel, i))
			s->news = true;
	}
	/* After the words: the guest takes it off before it looks at them. */
	if (s->news)
		kl_store8(p, 1);
}

/* ---- delivery ----------------------------------------------------------------------------- */

void kl_xen_inject_vector(struct kl_vcpu *v)
{
	kl_pv_inject_vector(v, atomic_load(&v->pv->xen.upcall_vector));
}

/* Who waits in SCHEDOP_poll goes on. PAIR(xen-poll) */
static void wake_poller(struct kl_vcpu *v, uint32_t port)
{
	struct kl_xen_vcpu *xv = &v->pv->xen;
	int64_t polled = atomic_load(&xv->poll_port);

	if ((polled == -1 || polled == port) && atomic_exchange(&xv->polling, false))
		kl_vcpu_request(&v->core, KL_REQ_EVENT);
}

static void upcall(struct kl_vcpu *v)
{
	atomic_store(&v->pv->xen.polling, false);
	if (atomic_load(&v->pv->xen.upcall_vector) && v->apic)
		kl_xen_inject_vector(v);
	else
		kl_vcpu_request(&v->core, KL_REQ_EVENT);
}

static void select_word(struct kl_vcpu *v, unsigned word, bool wide)
{
	struct kl_xen_vcpu *xv = &v->pv->xen;
	struct select s = {.words = 1ull << word, .wide = wide};

	if (!kl_pv_trywrite(&xv->info, KL_XEN_INFO_SIZE, select_words, &s)) {
		if (s.news)
			upcall(v);
		return;
	}
	/* The vCPU does it, when it can. */
	racepoint("xen-info-absent");
	if (!(atomic_fetch_or(&xv->pending_sel, 1ull << word) >> word & 1)) {
		atomic_store(&xv->polling, false);
		kl_pv_ask(v, KL_PV_XEN_EVENTS);
	}
}

int kl_xen_raise_on(struct kl_vcpu *v, uint32_t port, bool wait)
{
	struct kl_xen_vm *xen = xen_of(v->kvm);
	struct raise e = {.port = port, .wide = atomic_load(&xen->long_mode)};
	int r;

	if (port >= (e.wide ? KL_XEN_PORTS_64 : KL_XEN_PORTS_32))
		return -EINVAL;
	racepoint("xen-raise");
	r = kl_pv_trywrite(&xen->shinfo, KL_PAGE_SIZE, raise_port, &e);
	if (r && wait)
		r = kl_pv_write(&xen->shinfo, KL_PAGE_SIZE, raise_port, &e);
	if (r)
		return wait ? r : -EAGAIN;
	if (e.was)
		return 0;
	racepoint("xen-raised");
	wake_poller(v, port);
	if (e.masked)
		return -ENOTCONN;
	select_word(v, port / (e.wide ? 64 : 32), e.wide);
	return 1;
}

int kl_xen_raise(struct kl_x86_vm *vm, uint32_t port, uint32_t vcpu, bool wait)
{
	struct kl_vcpu *v = vcpu_by_id(vm, vcpu);

	return v ? kl_xen_raise_on(v, port, wait) : -EINVAL;
}

int kl_pv_xen_irq(struct kl_x86_vm *vm, uint32_t port, uint32_t vcpu)
{
	struct kl_vcpu *v = vcpu_by_id(vm, vcpu);
	int r = v ? kl_xen_raise_on(v, port, false) : -EINVAL;

	if (r != -EAGAIN)
		return r;
	atomic_fetch_or(&v->pv->xen.deferred[port / 64], 1ull << port % 64);
	kl_pv_ask(v, KL_PV_XEN_PORTS);
	return 1;
}

int kl_xen_deliver_deferred(struct kl_vcpu *v)
{
	struct kl_xen_vcpu *xv = &v->pv->xen;

	for (uint32_t w = 0; w < KL_ARRAY_SIZE(xv->deferred); w++) {
		uint64_t bits = atomic_exchange(&xv->deferred[w], 0);

		for (; bits; bits &= bits - 1) {
			uint32_t port = w * 64 + (uint32_t)__builtin_ctzll(bits);

			if (kl_xen_raise_on(v, port, true) == -EINTR) {
				atomic_fetch_or(&xv->deferred[w], bits);
				return -EINTR;
			}
		}
	}
	return 0;
}

int kl_xen_deliver_pending_sel(struct kl_vcpu *v)
{
	struct kl_xen_vcpu *xv = &v->pv->xen;
	struct select s = {.wide = atomic_load(&xen_of(v->kvm)->long_mode)};
	uint64_t all = atomic_load(&xv->pending_sel);
	int r;

	s.words = s.wide ? all : (uint32_t)all;
	if (!s.words)
		return 0;
	r = kl_pv_write(&xv->info, KL_XEN_INFO_SIZE, select_words, &s);
	if (!r) {
		atomic_fetch_and(&xv->pending_sel, ~s.words);
		if (s.news)
			upcall(v);
		return 0;
	}
	/* It is at a place that has no memory yet: again, without the guest waiting for it. */
	if (r != -EINTR && (xv->info_gpa != KL_XEN_INVALID || xv->info_hva) &&
	    !kl_xen_timers_use(v))
		kl_timer_arm(&xv->retry, kl_timer_now() + RETRY_NS);
	return r == -EINTR ? r : 0;
}

static void read_pending(void *p, void *arg)
{
	*(uint8_t *)arg = kl_load8(p);
}

bool kl_xen_upcall_pending(struct kl_vcpu *v)
{
	uint8_t pending = 0;

	return !kl_pv_read(&v->pv->xen.info, KL_XEN_INFO_SIZE, read_pending, &pending) && pending;
}

bool kl_pv_xen_interrupt(struct kl_vcpu *v)
{
	return atomic_load_explicit(&v->kvm->xen_msr, memory_order_relaxed) &&
	       kl_xen_upcall_pending(v);
}

/* ---- ports of the guest ------------------------------------------------------------------- */

static int make_target(struct kl_x86_vm *vm, const struct kvm_xen_hvm_attr *a,
		       struct kl_xen_target *t)
{
	uint32_t port = a->u.evtchn.deliver.port.port;
	uint64_t id;

	*t = (struct kl_xen_target){.type = a->u.evtchn.type, .port = port, .fd = -1};
	switch (t->type) {
	case KL_EVTCHNSTAT_IPI:
		if (port != a->u.evtchn.send_port)
			return -EINVAL;
		break;
	case KL_EVTCHNSTAT_INTERDOMAIN:
		if (!port) {
			int r = kl_sys_dup(a->u.evtchn.deliver.eventfd.fd);

			if (r < 0)
				return r;
			t->fd = r;
			r = kl_eventfd_identify(t->fd, &id);
			if (r)
				kl_sys_close(t->fd);
			return r;
		}
		if (port >= kl_xen_max_port(vm))
			return -EINVAL;
		break;
	default:
		return -EINVAL;
	}
	if (a->u.evtchn.deliver.port.priority != KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL)
		return -EINVAL;
	t->vcpu = a->u.evtchn.deliver.port.vcpu;
	return 0;
}

static void close_target(const struct kl_xen_target *t)
{
	if (t->type && !t->port)
		kl_sys_close(t->fd);
}

static int assign(struct kl_x86_vm *vm, const struct kvm_xen_hvm_attr *a)
{
	struct kl_xen_vm *xen = xen_of(vm);
	struct kl_xen_target t, *table = NULL;
	int r = make_target(vm, a, &t);

	if (r)
		return r;
	kl_mutex_lock(&xen->ports_lock);
	while (!xen->ports) {
		/* Not under the lock: to get memory may mean to change mappings. */
		xen->ports = table;
		table = NULL;
		if (xen->ports)
			break;
		kl_mutex_unlock(&xen->ports_lock);
		table = kl_failpoint("xen-ports") ? NULL : calloc(KL_XEN_PORTS_64, sizeof(*table));
		if (!table) {
			close_target(&t);
			return -ENOMEM;
		}
		kl_mutex_lock(&xen->ports_lock);
	}
	if (xen->ports[a->u.evtchn.send_port].type)
		r = -EEXIST;
	else
		xen->ports[a->u.evtchn.send_port] = t;
	kl_mutex_unlock(&xen->ports_lock);
	free(table);
	if (r)
		close_target(&t);
	return r;
}

static int deassign(struct kl_xen_vm *xen, uint32_t port)
{
	struct kl_xen_target t = {0};

	kl_mutex_lock(&xen->ports_lock);
	if (xen->ports) {
		t = xen->ports[port];
		xen->ports[port].type = 0;
	}
	kl_mutex_unlock(&xen->ports_lock);
	close_target(&t);
	return t.type ? 0 : -ENOENT;
}

/* Only the vCPU may change. */
static int update(struct kl_xen_vm *xen, const struct kvm_xen_hvm_attr *a)
{
	struct kl_xen_target *t;
	int r = 0;

	kl_mutex_lock(&xen->ports_lock);
	t = xen->ports ? &xen->ports[a->u.evtchn.send_port] : NULL;
	if (!t || !t->type)
		r = -ENOENT;
	else if (t->type != a->u.evtchn.type || !t->port ||
		 t->port != a->u.evtchn.deliver.port.port ||
		 a->u.evtchn.deliver.port.priority != KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL)
		r = -EINVAL;
	else
		t->vcpu = a->u.evtchn.deliver.port.vcpu;
	kl_mutex_unlock(&xen->ports_lock);
	return r;
}

static int reset(struct kl_xen_vm *xen)
{
	struct kl_xen_target *old;

	kl_mutex_lock(&xen->ports_lock);
	old = xen->ports;
	xen->ports = NULL;
	kl_mutex_unlock(&xen->ports_lock);
	for (unsigned i = 0; old && i < KL_XEN_PORTS_64; i++)
		close_target(&old[i]);
	free(old);
	return 0;
}

int kl_xen_set_target(struct kl_x86_vm *vm, const struct kvm_xen_hvm_attr *a)
{
	struct kl_xen_vm *xen = xen_of(vm);
	uint32_t port = a->u.evtchn.send_port;

	if (a->u.evtchn.flags == KVM_XEN_EVTCHN_RESET)
		return reset(xen);
	if (!port || port >= kl_xen_max_port(vm))
		return -EINVAL;
	switch (a->u.evtchn.flags) {
	case 0:
		return assign(vm, a);
	case KVM_XEN_EVTCHN_DEASSIGN:
		return deassign(xen, port);
	case KVM_XEN_EVTCHN_UPDATE:
		return update(xen, a);
	default:
		return -EINVAL;
	}
}

int kl_xen_send_from(struct kl_x86_vm *vm, uint32_t port)
{
	struct kl_xen_vm *xen = xen_of(vm);
	struct kl_xen_target t = {0};

	kl_mutex_lock(&xen->ports_lock);
	if (xen->ports && port < KL_XEN_PORTS_64)
		t = xen->ports[port];
	/* Under the lock, which keeps it open; it does not block. */
	if (t.type && !t.port)
		kl_eventfd_signal(t.fd);
	kl_mutex_unlock(&xen->ports_lock);
	if (!t.type)
		return -ENOENT;
	return t.port ? kl_xen_raise(vm, t.port, t.vcpu, true) : 0;
}
