/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/failpoint.h"
#include "base/racepoint.h"
#include "x86/ioapic.h"
#include "x86/irq_routing.h"
#include "x86/lapic.h"
#include "x86/paravirt.h"
#include "x86/pic.h"

#define NO_GSI (-1)

struct route {
	uint32_t type; /* KVM_IRQ_ROUTING_* */
	uint8_t chip, pin;
	union {
		struct kl_msi msi;
		struct {
			uint32_t port, vcpu;
		} evtchn;
	};
};

/* A pin of each chip, or one message; in the program's order. */
struct gsi_routes {
	uint8_t n;
	struct route route[KL_NR_IRQCHIPS];
};

struct table {
	uint32_t nr_gsis;
	int chip_gsi[KL_NR_IRQCHIPS]
		    [KL_IOAPIC_PINS]; /* the last GSI that reaches a pin, or NO_GSI */
	struct gsi_routes gsi[];
};

struct kl_irq_routing {
	struct kl_mutex lock; /* rank IRQ_ROUTING */
	struct kl_srcu srcu;
	_Atomic(struct table *) table;
	_Atomic(struct kl_irq_listener *) listeners;
};

/* ---- tables ------------------------------------------------------------------------ */

static struct table *table_alloc(uint32_t nr_gsis)
{
	struct table *t = kl_failpoint("irq-table-alloc")
				  ? NULL
				  : calloc(1, sizeof(*t) + nr_gsis * sizeof(t->gsi[0]));

	if (!t)
		return NULL;
	t->nr_gsis = nr_gsis;
	for (unsigned c = 0; c < KL_NR_IRQCHIPS; c++) {
		for (unsigned p = 0; p < KL_IOAPIC_PINS; p++)
			t->chip_gsi[c][p] = NO_GSI;
	}
	return t;
}

static bool msi_valid(const struct kl_x86_vm *vm, const struct kl_msi *msi)
{
	return !vm->x2apic_format || !(msi->address_hi & 0xff);
}

/* As numbered by kl_pic_set_irq(): the slave's pins follow the master's. */
static int pin_route(struct route *r, const struct kvm_irq_routing_irqchip *u)
{
	switch (u->irqchip) {
	case KVM_IRQCHIP_PIC_MASTER:
	case KVM_IRQCHIP_PIC_SLAVE:
		if (u->pin >= KL_PIC_PINS / 2)
			return -EINVAL;
		r->pin = (uint8_t)(u->pin + u->irqchip * (KL_PIC_PINS / 2));
		break;
	case KVM_IRQCHIP_IOAPIC:
		if (u->pin >= KL_IOAPIC_PINS)
			return -EINVAL;
		r->pin = (uint8_t)u->pin;
		break;
	default:
		return -EINVAL;
	}
	r->chip = (uint8_t)u->irqchip;
	return 0;
}

static int add_route(struct kl_x86_vm *vm, struct table *t, const struct kvm_irq_routing_entry *e,
		     bool split)
{
	struct gsi_routes *g = &t->gsi[e->gsi];
	struct route r = {.type = e->type};

	if (e->flags & (e->type == KVM_IRQ_ROUTING_MSI ? ~(uint32_t)KVM_MSI_VALID_DEVID : ~0u))
		return -EINVAL;
	for (unsigned i = 0; i < g->n; i++) {
		if (g->route[i].type != KVM_IRQ_ROUTING_IRQCHIP ||
		    e->type != KVM_IRQ_ROUTING_IRQCHIP || g->route[i].chip == e->u.irqchip.irqchip)
			return -EINVAL;
	}
	switch (e->type) {
	case KVM_IRQ_ROUTING_IRQCHIP:
		if (split || pin_route(&r, &e->u.irqchip))
			return -EINVAL;
		t->chip_gsi[r.chip][r.pin] = (int)e->gsi;
		break;
	case KVM_IRQ_ROUTING_MSI:
		r.msi = (struct kl_msi){e->u.msi.address_lo, e->u.msi.address_hi, e->u.msi.data};
		if (!msi_valid(vm, &r.msi))
			return -EINVAL;
		break;
	case KVM_IRQ_ROUTING_XEN_EVTCHN:
		/* Neither the port nor the vCPU has to exist yet. */
		if (e->u.xen_evtchn.priority != KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL)
			return -EINVAL;
		r.evtchn.port = e->u.xen_evtchn.port;
		r.evtchn.vcpu = e->u.xen_evtchn.vcpu;
		break;
	default: /* no Hyper-V */
		return -EINVAL;
	}
	g->route[g->n++] = r;
	return 0;
}

int kl_irq_routing_create(struct kl_irq_routing **out)
{
	struct kl_irq_routing *r = kl_failpoint("irq-routing-alloc") ? NULL : calloc(1, sizeof(*r));
	struct table *t;

	if (!r)
		return -ENOMEM;
	t = table_alloc(0);
	if (!t) {
		free(r);
		return -ENOMEM;
	}
	kl_mutex_init(&r->lock, KL_RANK_IRQ_ROUTING);
	kl_srcu_init(&r->srcu);
	atomic_init(&r->table, t);
	*out = r;
	return 0;
}

void kl_irq_routing_destroy(struct kl_irq_routing *r)
{
	if (!r)
		return;
	free(atomic_load_explicit(&r->table, memory_order_relaxed));
	kl_srcu_destroy(&r->srcu);
	kl_mutex_destroy(&r->lock);
	free(r);
}

static void synchronize(struct kl_irq_routing *r)
{
	kl_rank_wait(KL_RANK_IRQ_WAIT);
	kl_srcu_synchronize(&r->srcu);
}

int kl_irq_set_routing(struct kl_x86_vm *vm, const struct kvm_irq_routing_entry *e, unsigned n,
		       bool split)
{
	struct kl_irq_routing *r = vm->routing;
	uint32_t nr_gsis = 1;
	struct table *t;
	int ret = 0;

	for (unsigned i = 0; i < n; i++) {
		if (e[i].gsi >= KL_MAX_IRQ_ROUTES)
			return -EINVAL;
		nr_gsis = kl_max(nr_gsis, e[i].gsi + 1);
	}
	t = table_alloc(nr_gsis);
	if (!t)
		return -ENOMEM;
	for (unsigned i = 0; !ret && i < n; i++)
		ret = add_route(vm, t, &e[i], split);
	if (ret) {
		free(t);
		return ret;
	}
	kl_mutex_lock(&r->lock);
	t = atomic_exchange_explicit(&r->table, t, memory_order_acq_rel); /* PAIR(irq-table) */
	kl_mutex_unlock(&r->lock);
	synchronize(r);
	free(t);
	return 0;
}

int kl_irq_set_default_routing(struct kl_x86_vm *vm)
{
	struct kvm_irq_routing_entry e[KL_IOAPIC_PINS + KL_PIC_PINS] = {0};
	unsigned n = 0;

	for (uint32_t gsi = 0; gsi < KL_IOAPIC_PINS; gsi++) {
		e[n].gsi = gsi;
		e[n].type = KVM_IRQ_ROUTING_IRQCHIP;
		e[n].u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
		e[n++].u.irqchip.pin = gsi;
		if (gsi >= KL_PIC_PINS)
			continue;
		e[n].gsi = gsi;
		e[n].type = KVM_IRQ_ROUTING_IRQCHIP;
		e[n].u.irqchip.irqchip = gsi < 8 ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE;
		e[n++].u.irqchip.pin = gsi % 8;
	}
	return kl_irq_set_routing(vm, e, n, false);
}

static const struct table *current_table(struct kl_irq_routing *r)
{
	return atomic_load_explicit(&r->table, memory_order_acquire); /* PAIR(irq-table) */
}

/* ---- raising ----------------------------------------------------------------------- */

static struct kl_apic_msg msi_message(const struct kl_x86_vm *vm, const struct kl_msi *msi)
{
	uint32_t high = vm->x2apic_format ? msi->address_hi & ~0xffu : 0;

	return (struct kl_apic_msg){
		.dest = (msi->address_lo >> 12 & 0xff) | high,
		.logical = msi->address_lo >> 2 & 1,
		.redir_hint = msi->address_lo >> 3 & 1,
		.vector = (uint8_t)msi->data,
		.delivery = msi->data >> 8 & 7,
		.level_triggered = msi->data >> 15 & 1,
		.level = true,
		.shorthand = KL_APIC_NOSHORT,
	};
}

int kl_irq_send_msi(struct kl_x86_vm *vm, const struct kl_msi *msi)
{
	struct kl_apic_msg m = msi_message(vm, msi);

	return msi_valid(vm, msi) ? kl_apic_send(vm, NULL, &m) : -EINVAL;
}

static int drive(struct kl_x86_vm *vm, const struct route *r, enum kl_irq_source source, bool level,
		 bool line_status)
{
	if (r->type == KVM_IRQ_ROUTING_MSI)
		return level ? kl_irq_send_msi(vm, &r->msi) : -1;
	if (r->type == KVM_IRQ_ROUTING_XEN_EVTCHN)
		return level ? kl_pv_xen_irq(vm, r->evtchn.port, r->evtchn.vcpu) : -1;
	if (r->chip == KVM_IRQCHIP_IOAPIC)
		return kl_ioapic_set_irq(vm->ioapic, r->pin, source, level, line_status);
	return kl_pic_set_irq(vm->pic, r->pin, source, level);
}

int kl_irq_set(struct kl_x86_vm *vm, enum kl_irq_source source, uint32_t gsi, bool level,
	       bool line_status)
{
	struct gsi_routes routes = {0};
	const struct table *t;
	int ret = -1, token;

	token = kl_srcu_read_lock(&vm->routing->srcu);
	t = current_table(vm->routing);
	if (gsi < t->nr_gsis)
		routes = t->gsi[gsi];
	kl_srcu_read_unlock(&vm->routing->srcu, token);
	racepoint("irq-routed");

	for (unsigned i = 0; i < routes.n; i++) {
		int r = drive(vm, &routes.route[i], source, level, line_status);

		if (r >= 0)
			ret = r + (ret < 0 ? 0 : ret);
	}
	return ret;
}

/*
 * KVM_EXIT_IOAPIC_EOI. KVM computes the vectors when the table changes, and keeps those that are
 * still pending at a vCPU which the new table does not name; this looks when the EOI comes, and
 * takes a level-triggered one (TMR) for such.
 */
bool kl_irqchip_eoi_exits(struct kl_x86_vm *vm, struct kl_vcpu *v, unsigned vector, bool level)
{
	const struct table *t;
	bool yes = false;
	uint32_t n;
	int token;

	if (!kl_irqchip_split(vm))
		return false;
	token = kl_srcu_read_lock(&vm->routing->srcu);
	t = current_table(vm->routing);
	n = kl_min(t->nr_gsis, vm->nr_program_pins);
	for (uint32_t gsi = 0; gsi < n && !yes; gsi++) {
		const struct gsi_routes *g = &t->gsi[gsi];
		struct kl_apic_msg m;

		if (!g->n || g->route[0].type != KVM_IRQ_ROUTING_MSI)
			continue;
		m = msi_message(vm, &g->route[0].msi);
		yes = m.level_triggered && m.vector == vector &&
		      (level || kl_apic_match(v, m.dest, m.logical));
	}
	kl_srcu_read_unlock(&vm->routing->srcu, token);
	return yes;
}

/* ---- listeners --------------------------------------------------------------------- */

void kl_irq_listener_add(struct kl_x86_vm *vm, struct kl_irq_listener *l)
{
	struct kl_irq_routing *r = vm->routing;

	kl_mutex_lock(&r->lock);
	atomic_store_explicit(&l->next, atomic_load_explicit(&r->listeners, memory_order_relaxed),
			      memory_order_relaxed);
	atomic_store_explicit(&r->listeners, l, memory_order_release); /* PAIR(irq-listeners) */
	kl_mutex_unlock(&r->lock);
}

void kl_irq_listener_del(struct kl_x86_vm *vm, struct kl_irq_listener *l)
{
	struct kl_irq_routing *r = vm->routing;
	_Atomic(struct kl_irq_listener *) *p = &r->listeners;

	kl_mutex_lock(&r->lock);
	while (atomic_load_explicit(p, memory_order_relaxed) != l)
		p = &atomic_load_explicit(p, memory_order_relaxed)->next;
	/* A reader that stands on it still finds the rest of the list behind it. */
	atomic_store_explicit(p, atomic_load_explicit(&l->next, memory_order_relaxed),
			      memory_order_release);
	kl_mutex_unlock(&r->lock);
	synchronize(r);
}

void kl_irq_listeners_synchronize(struct kl_x86_vm *vm)
{
	synchronize(vm->routing);
}

enum what { ACKED, MASKED, UNMASKED, RESAMPLE };

/* Returns whether somebody listened. */
static bool tell(struct kl_x86_vm *vm, unsigned chip, unsigned pin, enum what what)
{
	struct kl_irq_routing *r = vm->routing;
	struct kl_irq_listener *l;
	bool told = false;
	int token, gsi;

	/* The usual VM has none, or the PIT's alone. */
	if (!atomic_load_explicit(&r->listeners, memory_order_relaxed))
		return false;
	token = kl_srcu_read_lock(&r->srcu);
	gsi = current_table(r)->chip_gsi[chip][pin];
	l = gsi == NO_GSI ? NULL
			  : atomic_load_explicit(&r->listeners,
						 memory_order_acquire); /* PAIR(irq-listeners) */
	for (; l; l = atomic_load_explicit(&l->next, memory_order_acquire)) {
		if (l->gsi != (uint32_t)gsi)
			continue;
		if (what == ACKED && l->acked)
			l->acked(l);
		else if ((what == MASKED || what == UNMASKED) && l->masked)
			l->masked(l, what == MASKED);
		else if (what == RESAMPLE && l->resample)
			l->resample(l);
		else
			continue;
		told = true;
	}
	kl_srcu_read_unlock(&r->srcu, token);
	return told;
}

void kl_irq_acked(struct kl_x86_vm *vm, unsigned chip, unsigned pin)
{
	tell(vm, chip, pin, ACKED);
}

void kl_irq_masked(struct kl_x86_vm *vm, unsigned chip, unsigned pin, bool mask)
{
	tell(vm, chip, pin, mask ? MASKED : UNMASKED);
}

bool kl_irq_resample(struct kl_x86_vm *vm, unsigned chip, unsigned pin)
{
	return tell(vm, chip, pin, RESAMPLE);
}
