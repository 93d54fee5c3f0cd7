/* SPDX-License-Identifier: MIT */
/*
 * A guest with interrupt controllers, whose ports and IOAPIC a test reads and writes as the guest
 * does: each access is a few real-mode instructions that end with an OUT to DONE_PORT.
 */
#pragma once

#include "uapi_guest.h"

#define DONE_PORT   0x500
#define IOAPIC_BASE 0xfec00000u
#define ENTRIES     0x10 /* IOAPIC: the first redirection entry's register */

#define E_LEVEL (1ull << 15)
#define E_MASK  (1ull << 16)
#define E_RIRR  (1ull << 14)

static inline uint8_t *run_data(struct guest *g)
{
	return (uint8_t *)g->run + g->run->io.data_offset;
}

static inline void expect_done(struct guest *g)
{
	assert_exit(g, KVM_EXIT_IO);
	assert_int_equal(g->run->io.port, DONE_PORT);
	assert_int_equal(g->run->io.direction, KVM_EXIT_IO_OUT);
}

/* mov $val, %al; out %al, port */
static inline void port_out(struct guest *g, uint16_t port, uint8_t val)
{
	const uint8_t code[] = {
		0xb0,
		val,
		0xba,
		(uint8_t)port,
		(uint8_t)(port >> 8),
		0xee, /* the write */
		0xba,
		(uint8_t)DONE_PORT,
		DONE_PORT >> 8,
		0xee,
	};

	memcpy(g->ram + CODE, code, sizeof(code));
	guest_regs(g);
	expect_done(g);
}

/* in port, %al (or %ax, %eax); out to the program */
static inline uint32_t port_in_size(struct guest *g, uint16_t port, unsigned size)
{
	const uint8_t prefix = size == 4 ? 0x66 : 0x90, op = size == 1 ? 0xec : 0xed;
	const uint8_t code[] = {
		0xba, (uint8_t)port,      (uint8_t)(port >> 8), prefix, op, /* the read */
		0xba, (uint8_t)DONE_PORT, DONE_PORT >> 8,       prefix, (uint8_t)(op + 2),
	};
	uint32_t val = 0;

	memcpy(g->ram + CODE, code, sizeof(code));
	guest_regs(g);
	expect_done(g);
	memcpy(&val, run_data(g), size);
	return val;
}

static inline uint8_t port_in(struct guest *g, uint16_t port)
{
	return (uint8_t)port_in_size(g, port, 1);
}

static inline void ds_at(struct guest *g, uint64_t base)
{
	struct kvm_sregs s;

	assert_int_equal(dev_ioctl_p(&g->vcpu, KVM_GET_SREGS, &s), 0);
	s.ds.base = base;
	s.ds.selector = (uint16_t)(base >> 4);
	assert_int_equal(dev_ioctl_p(&g->vcpu, KVM_SET_SREGS, &s), 0);
}

/* mov $reg, %eax; mov %eax, (0); then a read or write of (0x10) */
static inline uint32_t ioapic_access(struct guest *g, uint8_t reg, bool write, uint32_t val)
{
	const uint8_t code[] = {
		0x66,
		0xb8,
		reg,
		0,
		0,
		0,
		0x66,
		0xa3,
		0,
		0, /* select */
		0x66,
		0xb8,
		(uint8_t)val,
		(uint8_t)(val >> 8),
		(uint8_t)(val >> 16),
		(uint8_t)(val >> 24),
		0x66,
		(uint8_t)(write ? 0xa3 : 0xa1),
		0x10,
		0, /* window */
		0xba,
		(uint8_t)DONE_PORT,
		DONE_PORT >> 8,
		0x66,
		0xef,
	};

	memcpy(g->ram + CODE, code, sizeof(code));
	guest_regs(g);
	ds_at(g, IOAPIC_BASE);
	expect_done(g);
	memcpy(&val, run_data(g), sizeof(val));
	return val;
}

static inline uint32_t ioapic_read(struct guest *g, uint8_t reg)
{
	return ioapic_access(g, reg, false, 0);
}

static inline void ioapic_write(struct guest *g, uint8_t reg, uint32_t val)
{
	ioapic_access(g, reg, true, val);
}

static inline void ioapic_entry(struct guest *g, unsigned pin, uint64_t e)
{
	ioapic_write(g, (uint8_t)(ENTRIES + 2 * pin + 1), (uint32_t)(e >> 32));
	ioapic_write(g, (uint8_t)(ENTRIES + 2 * pin), (uint32_t)e);
}

static inline struct kvm_irqchip get_chip(struct guest *g, uint32_t id)
{
	struct kvm_irqchip c = {.chip_id = id};

	assert_int_equal(dev_ioctl_p(&g->vm, KVM_GET_IRQCHIP, &c), 0);
	return c;
}

static inline struct kvm_pic_state get_pic(struct guest *g, bool slave)
{
	return get_chip(g, slave).chip.pic;
}

static inline struct kvm_ioapic_state get_ioapic(struct guest *g)
{
	return get_chip(g, KVM_IRQCHIP_IOAPIC).chip.ioapic;
}

static inline uint64_t get_entry(struct guest *g, unsigned pin)
{
	return get_ioapic(g).redirtbl[pin].bits;
}

static inline void irq_line(struct guest *g, uint32_t gsi, uint32_t level)
{
	struct kvm_irq_level l = {.irq = gsi, .level = level};

	assert_int_equal(dev_ioctl_p(&g->vm, KVM_IRQ_LINE, &l), 0);
}

static inline int irq_status(struct guest *g, uint32_t gsi, uint32_t level)
{
	struct kvm_irq_level l = {.irq = gsi, .level = level};

	assert_int_equal(dev_ioctl_p(&g->vm, KVM_IRQ_LINE_STATUS, &l), 0);
	return (int)l.status;
}

/* As firmware does: vectors from @master and @slave, everything unmasked. */
static inline void pic_init(struct guest *g, uint8_t master, uint8_t slave, uint8_t icw4)
{
	port_out(g, 0x20, 0x11);
	port_out(g, 0x21, master);
	port_out(g, 0x21, 4);
	port_out(g, 0x21, icw4);
	port_out(g, 0xa0, 0x11);
	port_out(g, 0xa1, slave);
	port_out(g, 0xa1, 2);
	port_out(g, 0xa1, icw4);
	port_out(g, 0x21, 0);
	port_out(g, 0xa1, 0);
}
