/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/failpoint.h"
#include "x86/irq_routing.h"
#include "x86/lapic.h"
#include "x86/pic.h"

#define CASCADE  2 /* the master's pin that the slave drives */
#define SPURIOUS 7
#define NO_IRQ   (-1)

#define PORT_MASTER 0x20
#define PORT_SLAVE  0xa0
#define PORT_ELCR   0x4d0

#define ICW1       0x10
#define ICW1_ICW4  0x01
#define ICW4_AEOI  0x02
#define ICW4_SFNM  0x10
#define OCW3       0x08
#define OCW3_POLL  0x04
#define OCW3_RR    0x02
#define OCW3_RIS   0x01
#define OCW3_ESMM  0x40
#define OCW3_SMM   0x20
#define VECTOR_ROW 0xf8

/* kvm_pic_state.init_state: the word that the data port takes. */
enum { NO_INIT, WANT_ICW2, WANT_ICW3, WANT_ICW4 };

/* Bits 7 to 5 of OCW2. */
enum {
	OCW2_ROTATE_AEOI_CLEAR = 0,
	OCW2_EOI = 1,
	OCW2_SPECIFIC_EOI = 3,
	OCW2_ROTATE_AEOI_SET = 4,
	OCW2_ROTATE_EOI = 5,
	OCW2_SET_PRIORITY = 6,
	OCW2_ROTATE_SPECIFIC_EOI = 7,
};

struct kl_pic {
	struct kl_x86_vm *vm;
	struct kl_mutex lock;         /* rank PIC */
	struct kvm_pic_state chip[2]; /* master, slave */
	uint8_t driven[KL_PIC_PINS];  /* per pin, bit per enum kl_irq_source: it drives it high */
	_Atomic bool output;          /* written under the lock, or by who acknowledges */
	bool rose;                    /* output, since the lock was taken */
};

_Static_assert(KL_NR_IRQ_SOURCES <= 8, "driven[]");

int kl_pic_create(struct kl_x86_vm *vm, struct kl_pic **out)
{
	struct kl_pic *pic = kl_failpoint("pic-alloc") ? NULL : calloc(1, sizeof(*pic));

	if (!pic)
		return -ENOMEM;
	pic->vm = vm;
	kl_mutex_init(&pic->lock, KL_RANK_PIC);
	/* The system's own lines cannot be made level-triggered. */
	pic->chip[0].elcr_mask = 0xf8;
	pic->chip[1].elcr_mask = 0xde;
	*out = pic;
	return 0;
}

void kl_pic_destroy(struct kl_pic *pic)
{
	if (!pic)
		return;
	kl_mutex_destroy(&pic->lock);
	free(pic);
}

static void unlock(struct kl_pic *pic)
{
	bool rose = pic->rose;

	pic->rose = false;
	kl_mutex_unlock(&pic->lock);
	if (rose)
		kl_apic_extint_changed(pic->vm);
}

/* ---- priorities and the output ----------------------------------------------------- */

static bool is_slave(const struct kl_pic *pic, const struct kvm_pic_state *s)
{
	return s != &pic->chip[0];
}

/* The distance from the highest priority to the first request in @mask; 8: none. */
static unsigned priority_of(const struct kvm_pic_state *s, uint8_t mask)
{
	unsigned n = 0;

	if (!mask)
		return 8;
	while (!(mask >> ((n + s->priority_add) & 7) & 1))
		n++;
	return n;
}

/* The request that wants to interrupt, or NO_IRQ. */
static int wanted(const struct kl_pic *pic, const struct kvm_pic_state *s)
{
	unsigned request = priority_of(s, s->irr & (uint8_t)~s->imr);
	uint8_t serving = s->isr;

	/* Special fully nested: the slave's higher requests may interrupt its lower ones. */
	if (s->special_fully_nested_mode && !is_slave(pic, s))
		serving &= (uint8_t) ~(1u << CASCADE);
	if (request == 8 || request >= priority_of(s, serving))
		return NO_IRQ;
	return (int)((request + s->priority_add) & 7);
}

/* As kl_pic_set_irq(). */
static int set_line(struct kvm_pic_state *s, unsigned irq, bool level)
{
	uint8_t bit = (uint8_t)(1u << irq), off = (uint8_t)~bit;
	int ret = 1;

	if (s->elcr & bit) {
		if (level) {
			ret = !(s->irr & bit);
			s->irr |= bit;
			s->last_irr |= bit;
		} else {
			s->irr &= off;
			s->last_irr &= off;
		}
	} else if (level) {
		if (!(s->last_irr & bit)) {
			ret = !(s->irr & bit);
			s->irr |= bit;
		}
		s->last_irr |= bit;
	} else {
		s->last_irr &= off;
	}
	return s->imr & bit ? -1 : ret;
}

/* After every change that may concern the output. */
static void update(struct kl_pic *pic)
{
	bool high;

	kl_assert_held(&pic->lock);
	if (wanted(pic, &pic->chip[1]) != NO_IRQ) {
		set_line(&pic->chip[0], CASCADE, true);
		set_line(&pic->chip[0], CASCADE, false);
	}
	high = wanted(pic, &pic->chip[0]) != NO_IRQ;
	if (!atomic_exchange_explicit(&pic->output, high, memory_order_acq_rel) && high)
		pic->rose = true;
}

int kl_pic_set_irq(struct kl_pic *pic, unsigned pin, enum kl_irq_source source, bool level)
{
	uint8_t bit = (uint8_t)(1u << source);
	int ret;

	kl_mutex_lock(&pic->lock);
	if (level)
		pic->driven[pin] |= bit;
	else
		pic->driven[pin] &= (uint8_t)~bit;
	ret = set_line(&pic->chip[pin / 8], pin % 8, pic->driven[pin]);
	update(pic);
	unlock(pic);
	return ret;
}

void kl_pic_update(struct kl_pic *pic)
{
	kl_mutex_lock(&pic->lock);
	update(pic);
	unlock(pic);
}

/* ---- acknowledge and end of interrupt ---------------------------------------------- */

/* Drops the lock for a while. */
static void end_of_interrupt(struct kl_pic *pic, struct kvm_pic_state *s, unsigned irq)
{
	unsigned chip = is_slave(pic, s);

	kl_assert_held(&pic->lock);
	s->isr &= (uint8_t) ~(1u << irq);
	unlock(pic);
	kl_irq_acked(pic->vm, chip, irq + chip * 8);
	kl_mutex_lock(&pic->lock);
}

static void acknowledge(struct kl_pic *pic, struct kvm_pic_state *s, unsigned irq)
{
	uint8_t bit = (uint8_t)(1u << irq);

	s->isr |= bit;
	if (!(s->elcr & bit))
		s->irr &= (uint8_t)~bit;
	if (s->auto_eoi) {
		if (s->rotate_on_auto_eoi)
			s->priority_add = (irq + 1) & 7;
		end_of_interrupt(pic, s, irq);
	}
}

bool kl_pic_pending(struct kl_x86_vm *vm)
{
	return vm->pic && atomic_load_explicit(&vm->pic->output, memory_order_acquire);
}

int kl_pic_ack(struct kl_x86_vm *vm)
{
	struct kl_pic *pic = vm->pic;
	struct kvm_pic_state *s;
	int irq, slave_irq, vector;

	if (!pic)
		return -1;
	kl_mutex_lock(&pic->lock);
	/* What is still wanted afterwards is a new interrupt. */
	atomic_store_explicit(&pic->output, false, memory_order_relaxed);
	s = &pic->chip[0];
	irq = wanted(pic, s);
	if (irq == NO_IRQ)
		irq = SPURIOUS;
	else
		acknowledge(pic, s, (unsigned)irq);
	vector = s->irq_base + irq;
	if (irq == CASCADE) {
		s = &pic->chip[1];
		slave_irq = wanted(pic, s);
		if (slave_irq == NO_IRQ)
			slave_irq = SPURIOUS;
		else
			acknowledge(pic, s, (unsigned)slave_irq);
		vector = s->irq_base + slave_irq;
	}
	update(pic);
	unlock(pic);
	return (uint8_t)vector;
}

/* ---- ports ------------------------------------------------------------------------- */

/* Does any vCPU take the output? */
static bool accepted(struct kl_pic *pic)
{
	const struct kl_vm *mem = &pic->vm->mem;
	unsigned n = atomic_load_explicit(&mem->nr_vcpus, memory_order_acquire);

	for (unsigned i = 0; i < n; i++) {
		struct kl_vcpu_core *c = atomic_load_explicit(&mem->vcpus[i], memory_order_acquire);

		if (c && kl_apic_accepts_extint(kl_container_of(c, struct kl_vcpu, core)))
			return true;
	}
	return false;
}

/* ICW1. Level-triggered lines that are high go on asking. */
static void initialize(struct kl_pic *pic, struct kvm_pic_state *s, uint8_t val)
{
	uint8_t edges = s->irr & (uint8_t)~s->elcr;

	s->init4 = val & ICW1_ICW4;
	s->last_irr = 0;
	s->irr &= s->elcr;
	s->imr = 0;
	s->priority_add = 0;
	s->special_mask = 0;
	s->read_reg_select = 0;
	if (!s->init4) {
		s->special_fully_nested_mode = 0;
		s->auto_eoi = 0;
	}
	s->init_state = WANT_ICW2;
	/* Whose request is dropped need not wait for its end, if that would have come. */
	if (!edges || !accepted(pic))
		return;
	for (unsigned irq = 0; irq < 8; irq++) {
		if (edges >> irq & 1)
			end_of_interrupt(pic, s, irq);
	}
}

static void command_ocw2(struct kl_pic *pic, struct kvm_pic_state *s, uint8_t val)
{
	unsigned irq = val & 7, cmd = val >> 5, n;

	switch (cmd) {
	case OCW2_ROTATE_AEOI_CLEAR:
	case OCW2_ROTATE_AEOI_SET:
		s->rotate_on_auto_eoi = cmd == OCW2_ROTATE_AEOI_SET;
		return;
	case OCW2_EOI:
	case OCW2_ROTATE_EOI:
		n = priority_of(s, s->isr);
		if (n == 8)
			return;
		irq = (n + s->priority_add) & 7;
		if (cmd == OCW2_ROTATE_EOI)
			s->priority_add = (irq + 1) & 7;
		end_of_interrupt(pic, s, irq);
		break;
	case OCW2_ROTATE_SPECIFIC_EOI:
		s->priority_add = (irq + 1) & 7;
		end_of_interrupt(pic, s, irq);
		break;
	case OCW2_SPECIFIC_EOI:
		end_of_interrupt(pic, s, irq);
		break;
	case OCW2_SET_PRIORITY:
		s->priority_add = (irq + 1) & 7;
		break;
	default:
		return;
	}
	update(pic);
}

static void write_command(struct kl_pic *pic, struct kvm_pic_state *s, uint8_t val)
{
	if (val & ICW1) {
		initialize(pic, s, val);
	} else if (val & OCW3) {
		if (val & OCW3_POLL)
			s->poll = 1;
		if (val & OCW3_RR)
			s->read_reg_select = val & OCW3_RIS;
		if (val & OCW3_ESMM)
			s->special_mask = !!(val & OCW3_SMM);
	} else {
		command_ocw2(pic, s, val);
	}
}

static void write_mask(struct kl_pic *pic, struct kvm_pic_state *s, uint8_t val)
{
	uint8_t changed = s->imr ^ val;
	unsigned chip = is_slave(pic, s);

	s->imr = val;
	for (unsigned irq = 0; irq < 8; irq++) {
		if (changed >> irq & 1)
			kl_irq_masked(pic->vm, chip, irq + chip * 8, val >> irq & 1);
	}
	update(pic);
}

static void write_data(struct kl_pic *pic, struct kvm_pic_state *s, uint8_t val)
{
	switch (s->init_state) {
	case NO_INIT:
		write_mask(pic, s, val);
		break;
	case WANT_ICW2:
		s->irq_base = val & VECTOR_ROW;
		s->init_state = WANT_ICW3;
		break;
	case WANT_ICW3: /* the wiring is what it is */
		s->init_state = s->init4 ? WANT_ICW4 : NO_INIT;
		break;
	case WANT_ICW4:
		s->special_fully_nested_mode = !!(val & ICW4_SFNM);
		s->auto_eoi = !!(val & ICW4_AEOI);
		s->init_state = NO_INIT;
		break;
	default: /* set so by the program */
		break;
	}
}

/* A read after OCW3's poll: acknowledge without INTA, and without a request in service. */
static uint8_t poll(struct kl_pic *pic, struct kvm_pic_state *s)
{
	const uint8_t cascade_off = (uint8_t) ~(1u << CASCADE);
	int irq = wanted(pic, s);

	s->poll = 0;
	if (irq == NO_IRQ) {
		update(pic);
		return SPURIOUS;
	}
	if (is_slave(pic, s)) {
		pic->chip[0].isr &= cascade_off;
		pic->chip[0].irr &= cascade_off;
	}
	s->irr &= (uint8_t) ~(1u << irq);
	end_of_interrupt(pic, s, (unsigned)irq);
	if (is_slave(pic, s) || irq != CASCADE)
		update(pic);
	return (uint8_t)(irq | 0x80);
}

static uint8_t read_port(struct kl_pic *pic, struct kvm_pic_state *s, bool data_port)
{
	if (s->poll)
		return poll(pic, s);
	if (data_port)
		return s->imr;
	return s->read_reg_select ? s->isr : s->irr;
}

static uint8_t access_port(struct kl_pic *pic, uint16_t port, uint8_t val, bool write)
{
	struct kvm_pic_state *s;

	if ((port & ~1u) == PORT_ELCR) {
		s = &pic->chip[port & 1];
		if (write)
			s->elcr = val & s->elcr_mask;
		return s->elcr;
	}
	s = &pic->chip[(port & ~1u) == PORT_SLAVE];
	if (!write)
		return read_port(pic, s, port & 1);
	if (port & 1)
		write_data(pic, s, val);
	else
		write_command(pic, s, val);
	return 0;
}

/* A device is two ports; an access that it does not contain is not its. */
int kl_pic_pio(struct kl_pic *pic, uint16_t port, unsigned len, void *data, bool write)
{
	uint16_t base = port & (uint16_t)~1u;
	uint8_t val;

	if ((base != PORT_MASTER && base != PORT_SLAVE && base != PORT_ELCR) ||
	    (port & 1u) + len > 2)
		return -EOPNOTSUPP;
	if (len != 1) {
		if (!write)
			memset(data, 0, len);
		return 0;
	}
	kl_mutex_lock(&pic->lock);
	val = access_port(pic, port, *(uint8_t *)data, write);
	unlock(pic);
	if (!write)
		*(uint8_t *)data = val;
	return 0;
}

/* ---- state ------------------------------------------------------------------------- */

void kl_pic_get(struct kl_pic *pic, bool slave, struct kvm_pic_state *s)
{
	kl_mutex_lock(&pic->lock);
	*s = pic->chip[slave];
	unlock(pic);
}

void kl_pic_set(struct kl_pic *pic, bool slave, const struct kvm_pic_state *s)
{
	kl_mutex_lock(&pic->lock);
	pic->chip[slave] = *s;
	unlock(pic);
}
