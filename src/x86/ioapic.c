/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/failpoint.h"
#include "host/timer.h"
#include "x86/ioapic.h"
#include "x86/irq_routing.h"
#include "x86/lapic.h"

#define MMIO_SIZE 0x100u
#define REG_SEL   0x00
#define REG_WIN   0x10

#define REG_ID      0
#define REG_VERSION 1
#define REG_ARB     2
#define REG_REDIR   0x10
#define VERSION     0x11u

#define RTC_PIN 8

/* A guest that EOIs a line this often without serving the device gets a pause. */
#define MAX_SUCCESSIVE_EOIS 10000
#define EOI_PAUSE_NS        10000000ull

/* Fields of a redirection entry. */
#define E_VECTOR(e)   ((uint8_t)(e))
#define E_DELIVERY(e) ((uint8_t)((e) >> 8 & 7))
#define E_LOGICAL     (1ull << 11)
#define E_STATUS      (1ull << 12)
#define E_REMOTE_IRR  (1ull << 14)
#define E_LEVEL       (1ull << 15)
#define E_MASK        (1ull << 16)
#define E_DEST(e)     ((uint8_t)((e) >> 56))
#define E_READ_ONLY   (E_REMOTE_IRR | E_STATUS)

_Static_assert(sizeof(((struct kvm_ioapic_state *)0)->redirtbl[0]) == 8, "an entry is 64 bits");

struct kl_ioapic {
	struct kl_x86_vm *vm;
	struct kl_mutex lock; /* rank IOAPIC */
	struct kvm_ioapic_state s;
	uint32_t edges_delivered;       /* bits of s.irr that stand for no request any more */
	uint8_t driven[KL_IOAPIC_PINS]; /* bit per enum kl_irq_source: it drives the pin high */
	uint32_t successive_eois[KL_IOAPIC_PINS];
	struct kl_apic_dest_set reached[KL_IOAPIC_PINS]; /* vCPUs whose EOI is to come */
	struct kl_timer pause;                           /* after too many EOIs: deliver again */
	/*
	 * The RTC's interrupt is edge-triggered, but the program wants to know whether the last
	 * one was served, to make up for those that were lost.
	 */
	struct {
		unsigned pending_eois;
		struct kl_apic_dest_set dests;
		uint8_t vector[KL_MAX_VCPUS]; /* of those in dests */
	} rtc;
	/* Vectors in the table: an EOI of another one is nobody's. Written under the lock. */
	_Atomic uint64_t vectors[256 / 64];
};

static uint64_t entry(const struct kl_ioapic *io, unsigned pin)
{
	return io->s.redirtbl[pin].bits;
}

static bool dest_test(const struct kl_apic_dest_set *set, unsigned index)
{
	return set->bits[index / 64] >> (index % 64) & 1;
}

static void dest_clear(struct kl_apic_dest_set *set, unsigned index)
{
	set->bits[index / 64] &= ~(1ull << (index % 64));
}

static unsigned dest_count(const struct kl_apic_dest_set *set)
{
	unsigned n = 0;

	for (unsigned i = 0; i < KL_ARRAY_SIZE(set->bits); i++)
		n += (unsigned)__builtin_popcountll(set->bits[i]);
	return n;
}

static void publish_vectors(struct kl_ioapic *io)
{
	uint64_t v[KL_ARRAY_SIZE(io->vectors)] = {0};

	for (unsigned pin = 0; pin < KL_IOAPIC_PINS; pin++)
		v[E_VECTOR(entry(io, pin)) / 64] |= 1ull << (E_VECTOR(entry(io, pin)) % 64);
	/* A pending EOI of the RTC's old vector. */
	for (unsigned i = 0; io->rtc.pending_eois && i < KL_MAX_VCPUS; i++) {
		if (dest_test(&io->rtc.dests, i))
			v[io->rtc.vector[i] / 64] |= 1ull << (io->rtc.vector[i] % 64);
	}
	for (unsigned i = 0; i < KL_ARRAY_SIZE(v); i++)
		atomic_store_explicit(&io->vectors[i], v[i], memory_order_release);
}

/* ---- delivery ---------------------------------------------------------------------- */

static void expect_rtc_eois(struct kl_ioapic *io, const struct kl_apic_dest_set *reached,
			    uint8_t vector)
{
	io->rtc.dests = *reached;
	io->rtc.pending_eois = dest_count(reached);
	for (unsigned i = 0; i < KL_MAX_VCPUS; i++) {
		if (dest_test(reached, i))
			io->rtc.vector[i] = vector;
	}
	publish_vectors(io);
}

/* As kl_apic_send(); -1 if the pin is masked or waits for an EOI. */
static int deliver(struct kl_ioapic *io, unsigned pin, bool line_status)
{
	uint64_t e = entry(io, pin);
	struct kl_apic_msg m = {
		.dest = E_DEST(e),
		.logical = e & E_LOGICAL,
		.level = true,
		.level_triggered = e & E_LEVEL,
		.delivery = E_DELIVERY(e),
		.vector = E_VECTOR(e),
		.shorthand = KL_APIC_NOSHORT,
	};
	struct kl_apic_dest_set *reached = &io->reached[pin];
	int r;

	kl_assert_held(&io->lock);
	if (e & E_MASK || ((e & E_LEVEL) && (e & E_REMOTE_IRR)))
		return -1;
	if (!(e & E_LEVEL))
		io->edges_delivered |= 1u << pin;
	/* An EOI that comes while this runs waits for the lock. */
	if (pin == RTC_PIN && line_status) {
		memset(reached, 0, sizeof(*reached));
		r = kl_apic_send_tracked(io->vm, NULL, &m, reached);
		expect_rtc_eois(io, reached, m.vector);
	} else {
		r = kl_apic_send_tracked(io->vm, NULL, &m, reached);
	}
	if (r && (e & E_LEVEL))
		io->s.redirtbl[pin].bits |= E_REMOTE_IRR;
	return r;
}

static int set_line(struct kl_ioapic *io, unsigned pin, bool level, bool line_status)
{
	uint32_t bit = 1u << pin, old = io->s.irr;
	bool edge = !(entry(io, pin) & E_LEVEL);

	if (!level) {
		io->s.irr &= ~bit;
		return 1;
	}
	if (pin == RTC_PIN && line_status && io->rtc.pending_eois)
		return 0;
	io->s.irr |= bit;
	if (edge) {
		io->edges_delivered &= ~bit;
		if (old & bit)
			return 0;
	}
	return deliver(io, pin, line_status);
}

int kl_ioapic_set_irq(struct kl_ioapic *io, unsigned pin, enum kl_irq_source source, bool level,
		      bool line_status)
{
	uint8_t bit = (uint8_t)(1u << source);
	int r;

	kl_mutex_lock(&io->lock);
	if (level)
		io->driven[pin] |= bit;
	else
		io->driven[pin] &= (uint8_t)~bit;
	r = set_line(io, pin, io->driven[pin], line_status);
	kl_mutex_unlock(&io->lock);
	return r;
}

/* ---- end of interrupt -------------------------------------------------------------- */

static void after_pause(struct kl_timer *t)
{
	struct kl_ioapic *io = kl_container_of(t, struct kl_ioapic, pause);

	kl_mutex_lock(&io->lock);
	for (unsigned pin = 0; pin < KL_IOAPIC_PINS; pin++) {
		if ((entry(io, pin) & (E_LEVEL | E_REMOTE_IRR)) == E_LEVEL &&
		    (io->s.irr >> pin & 1))
			deliver(io, pin, false);
	}
	kl_mutex_unlock(&io->lock);
}

/* Drops the lock for a while. */
static void eoi_pin(struct kl_ioapic *io, struct kl_vcpu *v, unsigned pin, bool level)
{
	kl_assert_held(&io->lock);
	dest_clear(&io->reached[pin], v->core.index);
	kl_mutex_unlock(&io->lock);
	kl_irq_acked(io->vm, KVM_IRQCHIP_IOAPIC, pin);
	kl_mutex_lock(&io->lock);

	if (!level)
		return;
	io->s.redirtbl[pin].bits &= ~E_REMOTE_IRR;
	if ((entry(io, pin) & E_MASK) || !(io->s.irr >> pin & 1)) {
		io->successive_eois[pin] = 0;
	} else if (++io->successive_eois[pin] == MAX_SUCCESSIVE_EOIS) {
		io->successive_eois[pin] = 0;
		kl_timer_arm(&io->pause, kl_timer_now() + EOI_PAUSE_NS);
	} else {
		deliver(io, pin, false);
	}
}

static bool expects_eoi(const struct kl_ioapic *io, struct kl_vcpu *v, unsigned pin)
{
	uint64_t e = entry(io, pin);

	return dest_test(&io->reached[pin], v->core.index) ||
	       kl_apic_match(v, E_DEST(e), e & E_LOGICAL);
}

static void eoi_rtc(struct kl_ioapic *io, struct kl_vcpu *v, unsigned vector)
{
	unsigned i = v->core.index;

	if (!dest_test(&io->rtc.dests, i) || io->rtc.vector[i] != vector)
		return;
	dest_clear(&io->rtc.dests, i);
	io->rtc.pending_eois--;
}

bool kl_ioapic_has_vector(struct kl_x86_vm *vm, unsigned vector)
{
	struct kl_ioapic *io = vm->ioapic;

	return io && (atomic_load_explicit(&io->vectors[vector / 64], memory_order_acquire) >>
			      vector % 64 &
		      1);
}

void kl_ioapic_eoi(struct kl_x86_vm *vm, struct kl_vcpu *v, unsigned vector, bool level)
{
	struct kl_ioapic *io = vm->ioapic;

	/*
	 * The vector of an interrupt that the pin has delivered is in the table, or the guest has
	 * taken it out since, and its EOI does not concern the pin any more.
	 */
	if (!kl_ioapic_has_vector(vm, vector))
		return;
	kl_mutex_lock(&io->lock);
	eoi_rtc(io, v, vector);
	for (unsigned pin = 0; pin < KL_IOAPIC_PINS; pin++) {
		if (E_VECTOR(entry(io, pin)) == vector && expects_eoi(io, v, pin))
			eoi_pin(io, v, pin, level);
	}
	kl_mutex_unlock(&io->lock);
}

static void restore_rtc(struct kl_ioapic *io, struct kl_vcpu *v)
{
	uint64_t e = entry(io, RTC_PIN);
	unsigned i = v->core.index;
	bool pending;

	if (!kl_apic_match(v, E_DEST(e), e & E_LOGICAL))
		return;
	pending = kl_apic_pending_eoi(v, E_VECTOR(e));
	if (pending == dest_test(&io->rtc.dests, i))
		return;
	if (pending) {
		io->rtc.dests.bits[i / 64] |= 1ull << (i % 64);
		io->rtc.vector[i] = E_VECTOR(e);
		io->rtc.pending_eois++;
	} else {
		dest_clear(&io->rtc.dests, i);
		io->rtc.pending_eois--;
	}
}

void kl_ioapic_lapic_restored(struct kl_x86_vm *vm, struct kl_vcpu *v)
{
	struct kl_ioapic *io = vm->ioapic;

	if (!io)
		return;
	kl_mutex_lock(&io->lock);
	restore_rtc(io, v);
	publish_vectors(io);
	kl_mutex_unlock(&io->lock);
}

/* ---- registers --------------------------------------------------------------------- */

static uint32_t read_register(const struct kl_ioapic *io)
{
	uint32_t reg = io->s.ioregsel, index = (reg - REG_REDIR) >> 1;
	uint64_t e;

	switch (reg) {
	case REG_VERSION:
		return (KL_IOAPIC_PINS - 1) << 16 | VERSION;
	case REG_ID:
	case REG_ARB:
		return (io->s.id & 0xf) << 24;
	default:
		e = index < KL_IOAPIC_PINS ? entry(io, index) : ~0ull;
		return (uint32_t)(reg & 1 ? e >> 32 : e);
	}
}

static void write_entry(struct kl_ioapic *io, unsigned pin, bool high, uint32_t val)
{
	uint64_t old = entry(io, pin), e;

	e = high ? (uint32_t)old | (uint64_t)val << 32 : (old & ~0xffffffffull) | val;
	e = (e & ~E_READ_ONLY) | (old & E_READ_ONLY);
	/* Guests clear remote IRR by making the pin edge-triggered for a moment. */
	if (!(e & E_LEVEL))
		e &= ~E_REMOTE_IRR;
	io->s.redirtbl[pin].bits = e;
	publish_vectors(io);
	if (E_VECTOR(old) != E_VECTOR(e)) /* the EOI that may come is not this pin's */
		memset(&io->reached[pin], 0, sizeof(io->reached[pin]));
	if ((old ^ e) & E_MASK)
		kl_irq_masked(io->vm, KVM_IRQCHIP_IOAPIC, pin, e & E_MASK);
	if ((e & (E_LEVEL | E_MASK | E_REMOTE_IRR)) != E_LEVEL || !(io->s.irr >> pin & 1))
		return;
	/*
	 * The line was high when the pin was masked or waited for an EOI. Its device may have
	 * lowered it without anybody's notice; if somebody can ask, that one raises it anew.
	 */
	if (kl_irq_resample(io->vm, KVM_IRQCHIP_IOAPIC, pin))
		io->s.irr &= ~(1u << pin);
	else
		deliver(io, pin, false);
}

static void write_register(struct kl_ioapic *io, uint32_t val)
{
	uint32_t reg = io->s.ioregsel, index = (reg - REG_REDIR) >> 1;

	if (reg == REG_ID)
		io->s.id = val >> 24 & 0xf;
	else if (reg != REG_VERSION && reg != REG_ARB && index < KL_IOAPIC_PINS)
		write_entry(io, index, reg & 1, val);
}

static void mmio_read(struct kl_ioapic *io, uint32_t off, unsigned len, void *data)
{
	uint64_t val = off == REG_SEL ? io->s.ioregsel : off == REG_WIN ? read_register(io) : 0;

	if (len == 1 || len == 2 || len == 4 || len == 8)
		memcpy(data, &val, len);
}

static void mmio_write(struct kl_ioapic *io, uint32_t off, unsigned len, const void *data)
{
	uint32_t val = 0;

	if (len != 1 && len != 2 && len != 4 && len != 8)
		return;
	memcpy(&val, data, kl_min(len, (unsigned)sizeof(val)));
	if (off == REG_SEL)
		io->s.ioregsel = val & 0xff;
	else if (off == REG_WIN)
		write_register(io, val);
}

/* A program may move the base with KVM_SET_IRQCHIP; then nothing answers, as with KVM. */
static bool in_range(const struct kl_ioapic *io, uint64_t gpa)
{
	return gpa >= io->s.base_address && gpa < io->s.base_address + MMIO_SIZE;
}

int kl_irqchip_mmio(struct kl_x86_vm *vm, uint64_t gpa, unsigned len, void *data, bool write)
{
	struct kl_ioapic *io = vm->ioapic;
	int r = -EOPNOTSUPP;

	if (!io || gpa < KL_IOAPIC_BASE || gpa + len > KL_IOAPIC_BASE + MMIO_SIZE)
		return r;
	kl_mutex_lock(&io->lock);
	if (in_range(io, gpa)) {
		if (write)
			mmio_write(io, gpa & 0xff, len, data);
		else
			mmio_read(io, gpa & 0xff, len, data);
		r = 0;
	}
	kl_mutex_unlock(&io->lock);
	return r;
}

/* ---- state ------------------------------------------------------------------------- */

int kl_ioapic_create(struct kl_x86_vm *vm, struct kl_ioapic **out)
{
	struct kl_ioapic *io = kl_failpoint("ioapic-alloc") ? NULL : calloc(1, sizeof(*io));

	if (!io)
		return -ENOMEM;
	if (kl_timer_get()) {
		free(io);
		return -ENOMEM;
	}
	io->vm = vm;
	kl_mutex_init(&io->lock, KL_RANK_IOAPIC);
	kl_timer_init(&io->pause, after_pause);
	io->s.base_address = KL_IOAPIC_BASE;
	for (unsigned pin = 0; pin < KL_IOAPIC_PINS; pin++)
		io->s.redirtbl[pin].bits = E_MASK;
	publish_vectors(io);
	*out = io;
	return 0;
}

void kl_ioapic_destroy(struct kl_ioapic *io)
{
	if (!io)
		return;
	kl_timer_cancel(&io->pause);
	kl_timer_put();
	kl_mutex_destroy(&io->lock);
	free(io);
}

void kl_ioapic_get(struct kl_ioapic *io, struct kvm_ioapic_state *s)
{
	kl_mutex_lock(&io->lock);
	*s = io->s;
	s->irr &= ~io->edges_delivered;
	kl_mutex_unlock(&io->lock);
}

static void restore_all_rtc(struct kl_ioapic *io)
{
	const struct kl_vm *mem = &io->vm->mem;

	memset(&io->rtc, 0, sizeof(io->rtc));
	for (unsigned i = 0; i < KL_MAX_VCPUS; i++) {
		struct kl_vcpu_core *c = atomic_load_explicit(&mem->vcpus[i], memory_order_acquire);

		if (c)
			restore_rtc(io, kl_container_of(c, struct kl_vcpu, core));
	}
}

void kl_ioapic_set(struct kl_ioapic *io, const struct kvm_ioapic_state *s)
{
	kl_mutex_lock(&io->lock);
	io->s = *s;
	io->s.irr = 0;
	io->edges_delivered = 0;
	memset(&io->rtc, 0, sizeof(io->rtc));
	memset(io->reached, 0, sizeof(io->reached));
	for (unsigned pin = 0; pin < KL_IOAPIC_PINS; pin++) {
		if (s->irr >> pin & 1)
			set_line(io, pin, true, true);
	}
	restore_all_rtc(io);
	publish_vectors(io);
	kl_mutex_unlock(&io->lock);
}
