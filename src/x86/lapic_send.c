/* SPDX-License-Identifier: MIT */
/*
 * Interrupt messages: whom a destination addresses, and what an APIC does when it is reached.
 *
 * The map from destinations to APICs is a snapshot, made anew when something that addresses a
 * vCPU has changed; senders read it in a reader section. Where ids are ambiguous, or logical
 * ids of different kinds are mixed, there is no map (or none of logical ids), and each APIC is
 * asked: slower, and what the architecture says.
 *
 *   dirty: 0 clean, 1 being made, 2 dirty. It is set before the change is to be seen in the map;
 *   who makes the map takes it from 2 to 1 first and leaves it alone if it is 2 again at the end.
 */
#include <errno.h>
#include <stdlib.h>

#include "x86/lapic_state.h"

#define BROADCAST        0xffu
#define X2APIC_BROADCAST 0xffffffffu
#define MAP_CLEAN        0u
#define MAP_IN_PROGRESS  1u
#define MAP_DIRTY        2u

enum logical_mode { LOGICAL_NONE, LOGICAL_FLAT, LOGICAL_CLUSTER, LOGICAL_X2APIC, LOGICAL_MIXED };

struct kl_apic_map {
	uint32_t max_id;
	enum logical_mode logical;
	struct kl_lapic *flat[8];
	struct kl_lapic *cluster[16][4];
	struct kl_lapic *phys[];
};

/* The @i-th vCPU's APIC, or NULL. */
static struct kl_lapic *apic_at(struct kl_x86_vm *vm, unsigned i)
{
	struct kl_vcpu_core *c = atomic_load_explicit(&vm->mem.vcpus[i], memory_order_acquire);

	return c ? kl_container_of(c, struct kl_vcpu, core)->apic : NULL;
}

/* Those whose APIC is enabled in APIC_BASE. */
#define for_each_apic(a, vm)                                                                \
	for (unsigned i_ = 0,                                                               \
		      n_ = atomic_load_explicit(&(vm)->mem.nr_vcpus, memory_order_acquire); \
	     i_ < n_; i_++)                                                                 \
		if (((a) = apic_at(vm, i_)) && kl_apic_hw_enabled(a))

static uint32_t xapic_id(const struct kl_lapic *a)
{
	return kl_apic_reg(a, APIC_ID) >> 24;
}

/* ---- making the map ---- */

/* Where @dest looks, and which of the 16 there it means. False: the map cannot say. */
static bool logical_dest(struct kl_apic_map *m, uint32_t dest, struct kl_lapic ***where,
			 uint16_t *mask)
{
	*mask = 0;
	*where = m->flat;
	switch (m->logical) {
	case LOGICAL_NONE:
		return true;
	case LOGICAL_X2APIC: {
		uint32_t first = (dest >> 16) * 16;

		if (first <= m->max_id) {
			uint32_t n = kl_min(m->max_id - first + 1, 16u);

			*where = &m->phys[first];
			*mask = (uint16_t)(dest & (0xffffu >> (16 - n)));
		}
		return true;
	}
	case LOGICAL_FLAT:
		*mask = dest & 0xff;
		return true;
	case LOGICAL_CLUSTER:
		*where = m->cluster[(dest >> 4) & 0xf];
		*mask = dest & 0xf;
		return true;
	default:
		return false;
	}
}

/* 0; -EINVAL: two APICs have one id; -E2BIG: the map is too small. */
static int add_physical(struct kl_apic_map *m, struct kl_x86_vm *vm, struct kl_lapic *a)
{
	uint32_t x2 = kl_apic_x2apic_id(a), x1 = xapic_id(a), id;
	bool x2apic = kl_apic_x2apic(a);

	if (x2 > m->max_id)
		return -E2BIG;
	if (atomic_load_explicit(&vm->x2apic_format, memory_order_relaxed)) {
		/*
		 * Hotplug: a vCPU whose id does not fit into 8 bits is reached by it in xAPIC
		 * mode, too, and an 8-bit id that wraps to somebody else's is not ambiguous.
		 */
		if (x2apic || x2 > 0xff)
			m->phys[x2] = a;
		if (!x2apic && !m->phys[x1])
			m->phys[x1] = a;
		return 0;
	}
	id = x2apic ? x2 : x1;
	if (m->phys[id])
		return -EINVAL;
	m->phys[id] = a;
	return 0;
}

static void add_logical(struct kl_apic_map *m, struct kl_lapic *a)
{
	uint32_t ldr = kl_apic_reg(a, APIC_LDR);
	struct kl_lapic **where;
	enum logical_mode mode;
	uint16_t mask;
	unsigned bit;

	if (m->logical == LOGICAL_MIXED || !kl_apic_sw_enabled(a) || !ldr)
		return;
	if (kl_apic_x2apic(a))
		mode = LOGICAL_X2APIC;
	else
		mode = kl_apic_reg(a, APIC_DFR) == DFR_FLAT ? LOGICAL_FLAT : LOGICAL_CLUSTER;
	if (m->logical == LOGICAL_NONE)
		m->logical = mode;
	if (m->logical != mode) {
		m->logical = LOGICAL_MIXED;
		return;
	}
	/* x2APIC: the logical id is made of the physical one, whose map serves both. */
	if (mode == LOGICAL_X2APIC)
		return;
	if (!logical_dest(m, ldr >> 24, &where, &mask) || !mask)
		return;
	bit = (unsigned)__builtin_ctz(mask);
	if ((mask & (mask - 1)) || where[bit])
		m->logical = LOGICAL_MIXED;
	else
		where[bit] = a;
}

/* NULL: no map can be made. */
static struct kl_apic_map *make_map(struct kl_x86_vm *vm)
{
	uint32_t max_id = 255;
	struct kl_apic_map *m;
	struct kl_lapic *a;
	int r = 0;

	do {
		for_each_apic(a, vm) max_id = kl_max(max_id, kl_apic_x2apic_id(a));
		m = calloc(1, sizeof(*m) + (max_id + 1ull) * sizeof(m->phys[0]));
		if (!m)
			return NULL;
		m->max_id = max_id;
		for_each_apic(a, vm)
		{
			r = add_physical(m, vm, a);
			if (r)
				break;
			add_logical(m, a);
		}
		if (r) {
			free(m);
			m = NULL;
		}
	} while (r == -E2BIG);
	return m;
}

void kl_apic_map_dirty(struct kl_x86_vm *vm)
{
	atomic_store(&vm->apic_map_dirty, MAP_DIRTY);
}

void kl_apic_map_update(struct kl_x86_vm *vm)
{
	uint32_t state = MAP_DIRTY;
	struct kl_apic_map *old;

	if (KL_LIKELY(atomic_load(&vm->apic_map_dirty) == MAP_CLEAN))
		return;
	kl_mutex_lock(&vm->apic_map_lock);
	/* Somebody else may have made it, of what was changed here, too. */
	if (!atomic_compare_exchange_strong(&vm->apic_map_dirty, &state, MAP_IN_PROGRESS) &&
	    state == MAP_CLEAN) {
		kl_mutex_unlock(&vm->apic_map_lock);
		return;
	}
	old = atomic_exchange(&vm->apic_map, make_map(vm));
	racepoint("apic-map-made");
	state = MAP_IN_PROGRESS;
	atomic_compare_exchange_strong(&vm->apic_map_dirty, &state, MAP_CLEAN);
	kl_mutex_unlock(&vm->apic_map_lock);
	if (old) {
		kl_srcu_synchronize(&vm->mem.srcu);
		free(old);
	}
}

void kl_apic_vm_init(struct kl_x86_vm *vm)
{
	kl_mutex_init(&vm->apic_map_lock, KL_RANK_APIC_MAP);
	vm->apic_bus_cycle_ns = 1;
}

void kl_apic_vm_destroy(struct kl_x86_vm *vm)
{
	free(atomic_load(&vm->apic_map));
	kl_mutex_destroy(&vm->apic_map_lock);
}

/* ---- what an APIC does ---- */

static void set_irr(struct kl_lapic *a, unsigned vector, bool level_triggered)
{
	_Atomic uint32_t *tmr = kl_apic_word(a, APIC_TMR, vector);
	uint32_t bit = 1u << vector % 32;

	if (level_triggered)
		atomic_fetch_or(tmr, bit);
	else if (atomic_load(tmr) & bit)
		atomic_fetch_and(tmr, ~bit);
	atomic_fetch_or(kl_apic_word(a, APIC_IRR, vector), bit);
	racepoint("apic-irr-set");
	/* After the bit: whoever clears the hint looks at the bits afterwards. */
	atomic_store(&a->irr_pending, true);
	kl_vcpu_request(&a->v->core, KL_REQ_EVENT);
}

/* 1: accepted. */
static int accept(struct kl_lapic *a, const struct kl_apic_msg *m, struct kl_apic_dest_set *reached)
{
	struct kl_vcpu *v = a->v;

	switch (m->delivery) {
	case KL_APIC_FIXED:
	case KL_APIC_LOWEST:
		if (m->level_triggered && !m->level)
			return 0;
		if (!kl_apic_sw_enabled(a) || !kl_apic_hw_enabled(a))
			return 0;
		if (reached)
			reached->bits[v->core.index / 64] |= 1ull << v->core.index % 64;
		set_irr(a, m->vector, m->level_triggered);
		return 1;
	case KL_APIC_REMRD: /* KVM's own use of it: end this HLT, or the next */
		atomic_store(&v->unhalted, true);
		kl_vcpu_request(&v->core, KL_REQ_EVENT);
		return 1;
	case KL_APIC_NMI:
		kl_x86_nmi(v);
		return 1;
	case KL_APIC_INIT:
		if (m->level_triggered && !m->level)
			return 0;
		/* A SIPI that was sent before is forgotten. */
		atomic_store(&a->events, APIC_EVENT_INIT);
		kl_vcpu_request(&v->core, KL_REQ_EVENT);
		return 1;
	case KL_APIC_STARTUP:
		atomic_store(&a->sipi_vector, m->vector);
		atomic_fetch_or(&a->events, APIC_EVENT_SIPI);
		kl_vcpu_request(&v->core, KL_REQ_EVENT);
		return 1;
	default: /* SMI: there is no SMM. ExtINT: kl_apic_accepts_extint() */
		return 0;
	}
}

/* ---- whom it reaches ---- */

static bool match_physical(const struct kl_lapic *a, uint32_t dest)
{
	bool x2apic = kl_apic_x2apic(a);

	if (dest == (x2apic ? X2APIC_BROADCAST : BROADCAST))
		return true;
	/* An id that xAPIC mode cannot express reaches its vCPU all the same (hotplug). */
	if (x2apic || dest > 0xff)
		return dest == kl_apic_x2apic_id(a);
	return dest == xapic_id(a);
}

static bool match_logical(const struct kl_lapic *a, uint32_t dest)
{
	uint32_t ldr = kl_apic_reg(a, APIC_LDR);

	if (kl_apic_x2apic(a))
		return dest == X2APIC_BROADCAST ||
		       ((ldr >> 16) == (dest >> 16) && (ldr & dest & 0xffff));
	if (dest == BROADCAST)
		return true;
	ldr >>= 24;
	switch (kl_apic_reg(a, APIC_DFR)) {
	case DFR_FLAT:
		return ldr & dest;
	case DFR_CLUSTER:
		return (ldr >> 4) == (dest >> 4) && (ldr & dest & 0xf);
	default:
		return false;
	}
}

static bool match(struct kl_lapic *a, const struct kl_lapic *from, const struct kl_apic_msg *m)
{
	uint32_t dest = m->dest;

	switch (m->shorthand) {
	case KL_APIC_NOSHORT:
		break;
	case KL_APIC_SELF:
		return a == from;
	case KL_APIC_ALL:
		return true;
	default:
		return a != from;
	}
	/* Without interrupt remapping a device's broadcast means x2APICs, too. */
	if (!from && dest == BROADCAST && kl_apic_x2apic(a) &&
	    !atomic_load_explicit(&a->v->kvm->x2apic_no_broadcast_quirk, memory_order_relaxed))
		dest = X2APIC_BROADCAST;
	return m->logical ? match_logical(a, dest) : match_physical(a, dest);
}

bool kl_apic_match(struct kl_vcpu *v, uint32_t dest, bool logical)
{
	struct kl_apic_msg m = {.dest = dest, .logical = logical};

	return match(v->apic, NULL, &m);
}

static bool lowest_priority(const struct kl_apic_msg *m)
{
	return m->delivery == KL_APIC_LOWEST || m->redir_hint;
}

static bool is_broadcast(struct kl_x86_vm *vm, const struct kl_lapic *from,
			 const struct kl_apic_msg *m, const struct kl_apic_map *map)
{
	if (atomic_load_explicit(&vm->x2apic_no_broadcast_quirk, memory_order_relaxed))
		return m->dest == X2APIC_BROADCAST ||
		       (m->dest == BROADCAST && map->logical != LOGICAL_X2APIC);
	return m->dest == (from && kl_apic_x2apic(from) ? X2APIC_BROADCAST : BROADCAST);
}

/* Of several that could take it the vector chooses one, as KVM's vector hashing does. */
static unsigned nth_bit(uint16_t mask, unsigned n)
{
	while (n--)
		mask &= (uint16_t)(mask - 1);
	return (unsigned)__builtin_ctz(mask);
}

/* By the map. False: it has no answer. */
static bool send_by_map(struct kl_x86_vm *vm, const struct kl_lapic *from,
			const struct kl_apic_msg *m, struct kl_apic_map *map,
			struct kl_apic_dest_set *reached, int *r)
{
	struct kl_lapic **where = NULL;
	uint16_t mask = 0;

	if (!map || m->shorthand || is_broadcast(vm, from, m, map))
		return false;
	if (!m->logical) {
		if (m->dest <= map->max_id) {
			where = &map->phys[m->dest];
			mask = 1;
		}
	} else {
		if (!logical_dest(map, m->dest, &where, &mask))
			return false;
		if (lowest_priority(m) && mask)
			mask = (uint16_t)(1u << nth_bit(
						  mask,
						  m->vector % (unsigned)__builtin_popcount(mask)));
	}
	*r = 0;
	for (; mask; mask &= (uint16_t)(mask - 1)) {
		struct kl_lapic *a = where[__builtin_ctz(mask)];

		if (a)
			*r += accept(a, m, reached);
	}
	return true;
}

/* By asking each. */
static int send_to_each(struct kl_x86_vm *vm, const struct kl_lapic *from, struct kl_apic_msg *m,
			struct kl_apic_dest_set *reached)
{
	unsigned candidates = 0, n = 0;
	struct kl_lapic *a;
	int r = -1;

	if (!m->logical && m->dest == BROADCAST && lowest_priority(m))
		m->delivery = KL_APIC_FIXED;
	if (!lowest_priority(m)) {
		for_each_apic(a, vm) if (match(a, from, m)) r =
			kl_max(r, 0) + accept(a, m, reached);
		return r;
	}
	for_each_apic(a, vm) candidates += match(a, from, m) && kl_apic_sw_enabled(a);
	if (!candidates)
		return -1;
	n = m->vector % candidates;
	for_each_apic(a, vm) if (match(a, from, m) && kl_apic_sw_enabled(a) &&
				 !n--) return accept(a, m, reached);
	return -1; /* they have changed in between */
}

int kl_apic_send_tracked(struct kl_x86_vm *vm, struct kl_vcpu *from, const struct kl_apic_msg *msg,
			 struct kl_apic_dest_set *reached)
{
	const struct kl_lapic *source = from ? from->apic : NULL;
	struct kl_apic_msg m = *msg;
	int r = -1, idx;

	if (m.shorthand && !source)
		return -1;
	if (m.shorthand == KL_APIC_SELF)
		return accept(from->apic, &m, reached);
	idx = kl_srcu_read_lock(&vm->mem.srcu);
	if (!send_by_map(vm, source, &m, atomic_load_explicit(&vm->apic_map, memory_order_acquire),
			 reached, &r))
		r = send_to_each(vm, source, &m, reached);
	kl_srcu_read_unlock(&vm->mem.srcu, idx);
	return r;
}

int kl_apic_send(struct kl_x86_vm *vm, struct kl_vcpu *from, const struct kl_apic_msg *m)
{
	return kl_apic_send_tracked(vm, from, m, NULL);
}

/* ---- local interrupts ---- */

int kl_apic_deliver_lvt(struct kl_lapic *a, unsigned lvt)
{
	uint32_t reg = kl_apic_reg(a, lvt);
	struct kl_apic_msg m = {
		.level = true,
		.level_triggered = reg & LVT_LEVEL,
		.delivery = (reg & LVT_MODE) >> 8,
		.vector = (uint8_t)reg,
	};

	if (!kl_apic_hw_enabled(a) || (reg & LVT_MASKED))
		return 0;
	return accept(a, &m, NULL);
}

void kl_apic_deliver_cmci(struct kl_vcpu *v)
{
	if (v->apic)
		kl_apic_deliver_lvt(v->apic, APIC_LVTCMCI);
}

void kl_apic_nmi_watchdog(struct kl_x86_vm *vm)
{
	struct kl_lapic *a;

	if (!atomic_load_explicit(&vm->apics_in_nmi_mode, memory_order_relaxed))
		return;
	for_each_apic(a, vm) kl_apic_deliver_lvt(a, APIC_LVT0);
}

void kl_apic_extint_changed(struct kl_x86_vm *vm)
{
	unsigned n = atomic_load_explicit(&vm->mem.nr_vcpus, memory_order_acquire);

	for (unsigned i = 0; i < n; i++) {
		struct kl_lapic *a = apic_at(vm, i);

		if (a && kl_apic_accepts_extint(a->v))
			kl_vcpu_request(&a->v->core, KL_REQ_EVENT);
	}
}
