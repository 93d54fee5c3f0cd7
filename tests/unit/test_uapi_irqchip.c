/* SPDX-License-Identifier: MIT */
/*
 * The interrupt controllers' ioctls and registers: errnos, states that are got and set, what the
 * guest reads from its ports. With KVMLET_TEST_REAL=1 on the real /dev/kvm.
 */
#include <sys/eventfd.h>

#include "irq_guest.h"

#define MAX_ROUTES 4096

static struct guest g;

static int setup(void **state)
{
	(void)state;
	guest_make(&g, true);
	return 0;
}

static int teardown(void **state)
{
	(void)state;
	guest_free(&g);
	return 0;
}

/* ---- creation ---------------------------------------------------------------------- */

static long enable_split(struct dev *vm, uint64_t pins)
{
	struct kvm_enable_cap cap = {.cap = KVM_CAP_SPLIT_IRQCHIP, .args = {pins}};

	return dev_ioctl_p(vm, KVM_ENABLE_CAP, &cap);
}

static void one_irqchip_before_vcpus(void **state)
{
	struct dev kvm = open_kvm(), vm = make_vm(&kvm), vcpu;
	struct kvm_irq_level l = {.irq = 1, .level = 1};
	struct kvm_irqchip chip = {0};
	struct kvm_pit_state2 ps2 = {0};
	struct kvm_pit_config pc = {0};
	struct kvm_msi msi = {0};

	(void)state;
	/* Without one. */
	assert_int_equal(dev_ioctl_p(&vm, KVM_IRQ_LINE, &l), -ENXIO);
	assert_int_equal(dev_ioctl_p(&vm, KVM_IRQ_LINE_STATUS, &l), -ENXIO);
	assert_int_equal(dev_ioctl_p(&vm, KVM_GET_IRQCHIP, &chip), -ENXIO);
	assert_int_equal(dev_ioctl_p(&vm, KVM_SET_IRQCHIP, &chip), -ENXIO);
	assert_int_equal(dev_ioctl_p(&vm, KVM_CREATE_PIT2, &pc), -ENOENT);
	assert_int_equal(dev_ioctl(&vm, KVM_CREATE_PIT, 0), -ENOENT);
	assert_int_equal(dev_ioctl_p(&vm, KVM_GET_PIT2, &ps2), -ENXIO);
	assert_int_equal(dev_ioctl_p(&vm, KVM_SET_PIT2, &ps2), -ENXIO);
	assert_int_equal(dev_ioctl_p(&vm, KVM_SIGNAL_MSI, &msi), -EINVAL);
	/* Too many pins comes first. */
	assert_int_equal(enable_split(&vm, MAX_ROUTES + 1), -EINVAL);

	assert_int_equal(dev_ioctl(&vm, KVM_CREATE_IRQCHIP, 0), 0);
	assert_int_equal(dev_ioctl(&vm, KVM_CREATE_IRQCHIP, 0), -EEXIST);
	assert_int_equal(enable_split(&vm, 24), -EEXIST);
	assert_int_equal(enable_split(&vm, MAX_ROUTES + 1), -EINVAL);
	dev_close(&vm);

	vm = make_vm(&kvm);
	vcpu = make_vcpu(&vm, 0);
	assert_int_equal(dev_ioctl(&vm, KVM_CREATE_IRQCHIP, 0), -EINVAL);
	assert_int_equal(enable_split(&vm, 24), -EEXIST);
	dev_close(&vcpu);
	dev_close(&vm);
	dev_close(&kvm);
}

static void split_has_no_pins(void **state)
{
	struct dev kvm = open_kvm(), vm = make_vm(&kvm);
	struct kvm_irq_level l = {.irq = 1, .level = 1};
	struct kvm_irqchip chip = {0};
	struct kvm_pit_config pc = {0};
	struct {
		struct kvm_irq_routing head;
		struct kvm_irq_routing_entry e;
	} r = {.head = {.nr = 1}, .e = {.gsi = 1, .type = KVM_IRQ_ROUTING_IRQCHIP}};
	struct kvm_irqfd f = {.gsi = 1, .flags = KVM_IRQFD_FLAG_RESAMPLE};
	char odd[sizeof(r) + 8] __attribute__((aligned(8)));
	int fd = eventfd(0, 0);

	(void)state;
	assert_int_equal(enable_split(&vm, MAX_ROUTES), 0);
	assert_int_equal(enable_split(&vm, 24), -EEXIST);
	assert_int_equal(dev_ioctl(&vm, KVM_CREATE_IRQCHIP, 0), -EEXIST);
	assert_int_equal(dev_ioctl_p(&vm, KVM_GET_IRQCHIP, &chip), -ENXIO);
	assert_int_equal(dev_ioctl_p(&vm, KVM_SET_IRQCHIP, &chip), -ENXIO);
	assert_int_equal(dev_ioctl_p(&vm, KVM_CREATE_PIT2, &pc), -ENOENT);
	/* No routes yet: nobody's line. */
	assert_int_equal(dev_ioctl_p(&vm, KVM_IRQ_LINE_STATUS, &l), 0);
	assert_int_equal((int)l.status, -1);
	assert_int_equal(dev_ioctl_p(&vm, KVM_SET_GSI_ROUTING, &r), -EINVAL);
	r.e.type = KVM_IRQ_ROUTING_MSI;
	r.e.u.msi.address_lo = 0xfee00000;
	assert_int_equal(dev_ioctl_p(&vm, KVM_SET_GSI_ROUTING, &r), 0);
	/* At any address: UBSan looks here. */
	memcpy(odd + 4, &r, sizeof(r));
	assert_int_equal(dev_ioctl_p(&vm, KVM_SET_GSI_ROUTING, odd + 4), 0);
	/* A line that can be resampled needs an IOAPIC. */
	f.fd = f.resamplefd = (uint32_t)fd;
	assert_int_equal(dev_ioctl_p(&vm, KVM_IRQFD, &f), -EINVAL);
	f.flags = 0;
	assert_int_equal(dev_ioctl_p(&vm, KVM_IRQFD, &f), 0);
	dev_close(&vm);
	dev_close(&kvm);
	close(fd);
}

static void devices_of_no_type(void **state)
{
	struct kvm_create_device d = {.type = KVM_DEV_TYPE_FSL_MPIC_20};

	(void)state;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_CREATE_DEVICE, &d), -ENODEV);
	d.flags = KVM_CREATE_DEVICE_TEST;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_CREATE_DEVICE, &d), -ENODEV);
	d.type = UINT32_MAX;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_CREATE_DEVICE, &d), -ENODEV);
	assert_int_equal(dev_ioctl(&g.vm, KVM_CREATE_DEVICE, 0), -EFAULT);
}

static void capabilities(void **state)
{
	static const struct {
		int cap, val;
	} expect[] = {
		{KVM_CAP_IRQCHIP, 1},
		{KVM_CAP_SPLIT_IRQCHIP, 1},
		{KVM_CAP_IRQ_ROUTING, 4096},
		{KVM_CAP_IRQ_INJECT_STATUS, 1},
		{KVM_CAP_SIGNAL_MSI, 1},
		{KVM_CAP_IRQFD, 1},
		{KVM_CAP_IRQFD_RESAMPLE, 1},
		{KVM_CAP_PIT, 1},
		{KVM_CAP_PIT2, 1},
		{KVM_CAP_PIT_STATE2, 1},
		{KVM_CAP_REINJECT_CONTROL, 1},
		{KVM_CAP_DEVICE_CTRL, 1},
		{KVM_CAP_MSI_DEVID, 0},
	};

	(void)state;
	for (unsigned i = 0; i < KL_ARRAY_SIZE(expect); i++)
		assert_int_equal(
			dev_ioctl(&g.vm, KVM_CHECK_EXTENSION, (unsigned long)expect[i].cap),
			expect[i].val);
}

/* What cannot be read or written, once everything is there. */
static void bad_pointers(void **state)
{
	static const struct {
		unsigned long cmd;
		size_t size;
	} reads[] = {
		{KVM_GET_IRQCHIP, sizeof(struct kvm_irqchip)},
		{KVM_SET_IRQCHIP, sizeof(struct kvm_irqchip)},
		{KVM_GET_PIT, sizeof(struct kvm_pit_state)},
		{KVM_SET_PIT, sizeof(struct kvm_pit_state)},
		{KVM_SET_PIT2, sizeof(struct kvm_pit_state2)},
		{KVM_CREATE_PIT2, sizeof(struct kvm_pit_config)},
		{KVM_REINJECT_CONTROL, sizeof(struct kvm_reinject_control)},
		{KVM_IRQ_LINE, sizeof(struct kvm_irq_level)},
		{KVM_IRQ_LINE_STATUS, sizeof(struct kvm_irq_level)},
		{KVM_SIGNAL_MSI, sizeof(struct kvm_msi)},
		{KVM_SET_GSI_ROUTING, sizeof(struct kvm_irq_routing)},
		{KVM_IRQFD, sizeof(struct kvm_irqfd)},
	};
	static const unsigned long writes[] = {KVM_GET_IRQCHIP, KVM_GET_PIT, KVM_GET_PIT2,
					       KVM_IRQ_LINE_STATUS};
	struct kvm_pit_config c = {0};
	char *p = half_mapped();
	struct kvm_irq_routing *head;

	(void)state;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_CREATE_PIT2, &c), 0);
	for (unsigned i = 0; i < KL_ARRAY_SIZE(reads); i++) {
		assert_int_equal(dev_ioctl(&g.vm, reads[i].cmd, 0), -EFAULT);
		assert_int_equal(
			dev_ioctl_p(&g.vm, reads[i].cmd, p + KL_PAGE_SIZE - reads[i].size + 1),
			-EFAULT);
	}
	/* The table ends in the middle of an entry. */
	head = (void *)(p + KL_PAGE_SIZE - sizeof(*head) -
			sizeof(struct kvm_irq_routing_entry) * 3 / 2);
	*head = (struct kvm_irq_routing){.nr = 2};
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_GSI_ROUTING, head), -EFAULT);
	memset(p, 0, KL_PAGE_SIZE);
	assert_int_equal(mprotect(p, KL_PAGE_SIZE, PROT_READ), 0);
	for (unsigned i = 0; i < KL_ARRAY_SIZE(writes); i++)
		assert_int_equal(dev_ioctl_p(&g.vm, writes[i], p), -EFAULT);
	munmap(p, 2 * KL_PAGE_SIZE);
}

/* ---- states ------------------------------------------------------------------------ */

static void chips_as_made(void **state)
{
	struct kvm_ioapic_state io = get_ioapic(&g);
	struct kvm_pic_state pic, zero = {0};
	struct kvm_irqchip chip = {.chip_id = 3};

	(void)state;
	for (int slave = 0; slave < 2; slave++) {
		pic = get_pic(&g, slave);
		assert_int_equal(pic.elcr_mask, slave ? 0xde : 0xf8);
		pic.elcr_mask = 0;
		assert_memory_equal(&pic, &zero, sizeof(pic));
	}
	assert_int_equal(io.base_address, IOAPIC_BASE);
	assert_int_equal(io.ioregsel, 0);
	assert_int_equal(io.id, 0);
	assert_int_equal(io.irr, 0);
	for (unsigned i = 0; i < KVM_IOAPIC_NUM_PINS; i++)
		assert_int_equal(io.redirtbl[i].bits, E_MASK);
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_GET_IRQCHIP, &chip), -EINVAL);
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_IRQCHIP, &chip), -EINVAL);
}

/* Any bits at all are kept, and nothing breaks: the guest's accesses that follow, too. */
static void any_state_is_kept(void **state)
{
	struct kvm_irqchip chip, back;
	unsigned seed = 1;

	(void)state;
	for (unsigned round = 0; round < 200; round++) {
		for (uint32_t id = 0; id < 3; id++) {
			uint8_t *p = (uint8_t *)&chip.chip;

			for (unsigned i = 0; i < sizeof(chip.chip); i++)
				p[i] = (uint8_t)((seed = seed * 1103515245 + 12345) >> 16);
			chip.chip_id = id;
			if (id == KVM_IRQCHIP_IOAPIC) {
				/* A request would be delivered at once and change it. */
				chip.chip.ioapic.irr = 0;
				chip.chip.ioapic.base_address = IOAPIC_BASE;
			} else {
				chip.chip.pic.irr = 0;
			}
			assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_IRQCHIP, &chip), 0);
			back = get_chip(&g, id);
			assert_memory_equal(&back.chip, &chip.chip,
					    id == KVM_IRQCHIP_IOAPIC
						    ? sizeof(struct kvm_ioapic_state)
						    : sizeof(struct kvm_pic_state));
		}
	}
	/* No priority, init state or vector makes the devices stumble. */
	chip.chip_id = 0;
	memset(&chip.chip, 0xff, sizeof(chip.chip));
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_IRQCHIP, &chip), 0);
	chip.chip_id = 1;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_IRQCHIP, &chip), 0);
	port_in(&g, 0x20);
	port_in(&g, 0xa0);
	for (unsigned val = 0; val < 256; val++) {
		port_out(&g, 0x20, (uint8_t)val);
		port_out(&g, 0xa1, (uint8_t)val);
		port_in(&g, 0x20);
		port_in(&g, 0xa1);
	}
}

static void moved_ioapic_is_silent(void **state)
{
	struct kvm_irqchip chip = get_chip(&g, KVM_IRQCHIP_IOAPIC);
	static const uint8_t code[] = {0x66, 0xa1, 0x10, 0};

	(void)state;
	chip.chip.ioapic.base_address = 0xfed00000;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_IRQCHIP, &chip), 0);
	memcpy(g.ram + CODE, code, sizeof(code));
	guest_regs(&g);
	ds_at(&g, IOAPIC_BASE);
	assert_exit(&g, KVM_EXIT_MMIO);
	assert_int_equal(g.run->mmio.phys_addr, IOAPIC_BASE + 0x10);
	guest_regs(&g);
	ds_at(&g, 0xfed00000);
	assert_exit(&g, KVM_EXIT_MMIO);
}

/* ---- the 8259s --------------------------------------------------------------------- */

static void pic_initialization(void **state)
{
	struct kvm_pic_state s;

	(void)state;
	port_out(&g, 0x20, 0x11);
	assert_int_equal(get_pic(&g, false).init_state, 1);
	port_out(&g, 0x21, 0x37);
	assert_int_equal(get_pic(&g, false).irq_base, 0x30);
	assert_int_equal(get_pic(&g, false).init_state, 2);
	port_out(&g, 0x21, 4);
	assert_int_equal(get_pic(&g, false).init_state, 3);
	port_out(&g, 0x21, 0x13);
	s = get_pic(&g, false);
	assert_int_equal(s.init_state, 0);
	assert_int_equal(s.auto_eoi, 1);
	assert_int_equal(s.special_fully_nested_mode, 1);
	/* Without ICW4: three words, and its modes are off. */
	port_out(&g, 0x20, 0x10);
	port_out(&g, 0x21, 0x40);
	port_out(&g, 0x21, 4);
	s = get_pic(&g, false);
	assert_int_equal(s.init_state, 0);
	assert_int_equal(s.irq_base, 0x40);
	assert_int_equal(s.auto_eoi, 0);
	assert_int_equal(s.special_fully_nested_mode, 0);
	/* Then the data port is the mask. */
	port_out(&g, 0x21, 0xa5);
	assert_int_equal(port_in(&g, 0x21), 0xa5);
	assert_int_equal(get_pic(&g, false).imr, 0xa5);
	assert_int_equal(get_pic(&g, true).imr, 0);
}

static void pic_edges_and_levels(void **state)
{
	(void)state;
	pic_init(&g, 0x20, 0x28, 1);
	port_out(&g, 0x21, 0xff);
	port_out(&g, 0xa1, 0xff);
	/* Edge: the request stays when the line falls; a second edge is coalesced. */
	irq_line(&g, 4, 1);
	assert_int_equal(get_pic(&g, false).irr, 0x10);
	irq_line(&g, 4, 0);
	assert_int_equal(get_pic(&g, false).irr, 0x10);
	assert_int_equal(get_pic(&g, false).last_irr, 0);
	/* Level: it goes with the line. */
	port_out(&g, 0x4d0, 0xff);
	port_out(&g, 0x4d1, 0xff);
	assert_int_equal(port_in(&g, 0x4d0), 0xf8);
	assert_int_equal(port_in(&g, 0x4d1), 0xde);
	irq_line(&g, 10, 1);
	assert_int_equal(get_pic(&g, true).irr, 0x04);
	irq_line(&g, 10, 0);
	assert_int_equal(get_pic(&g, true).irr, 0);
	/* Initialization keeps the levels and drops the edges. */
	irq_line(&g, 10, 1);
	irq_line(&g, 0, 1);
	port_out(&g, 0x20, 0x11);
	port_out(&g, 0xa0, 0x11);
	assert_int_equal(get_pic(&g, false).irr & 1, 0);
	assert_int_equal(get_pic(&g, true).irr, 0x04);
	assert_int_equal(get_pic(&g, false).imr, 0);
}

static void pic_reads(void **state)
{
	(void)state;
	pic_init(&g, 0x20, 0x28, 1);
	port_out(&g, 0x21, 0xff);
	port_out(&g, 0xa1, 0xff);
	irq_line(&g, 3, 1);
	assert_int_equal(port_in(&g, 0x20), 8);
	port_out(&g, 0x20, 0x0b); /* ISR */
	assert_int_equal(port_in(&g, 0x20), 0);
	port_out(&g, 0x20, 0x0a); /* IRR */
	assert_int_equal(port_in(&g, 0x20), 8);
	/* Poll, with nothing that is wanted. */
	port_out(&g, 0x20, 0x0c);
	assert_int_equal(port_in(&g, 0x20), 7);
	assert_int_equal(port_in(&g, 0x20), 8);
	/* Special mask mode is kept. */
	port_out(&g, 0x20, 0x68);
	assert_int_equal(get_pic(&g, false).special_mask, 1);
	port_out(&g, 0x20, 0x48);
	assert_int_equal(get_pic(&g, false).special_mask, 0);
	/* Two bytes at once: ignored, and 0. */
	assert_int_equal(port_in_size(&g, 0x20, 2), 0);
	assert_int_equal(port_in_size(&g, 0x4d0, 2), 0);
}

/* As a guest polls that takes no interrupts: masked at the CPU, wanted by the chip. */
static void pic_poll(void **state)
{
	(void)state;
	pic_init(&g, 0x20, 0x28, 1);
	irq_line(&g, 5, 1);
	irq_line(&g, 6, 1);
	port_out(&g, 0x20, 0x0c);
	assert_int_equal(port_in(&g, 0x20), 0x85);
	assert_int_equal(get_pic(&g, false).irr, 0x40);
	assert_int_equal(get_pic(&g, false).isr, 0);
	port_out(&g, 0x20, 0x0c);
	assert_int_equal(port_in(&g, 0x20), 0x86);
	/* The slave's takes the cascade's request, too. */
	irq_line(&g, 9, 1);
	assert_int_equal(get_pic(&g, false).irr, 4);
	port_out(&g, 0xa0, 0x0c);
	assert_int_equal(port_in(&g, 0xa0), 0x81);
	assert_int_equal(get_pic(&g, false).irr, 0);
	assert_int_equal(get_pic(&g, true).irr, 0);
}

static void set_isr(bool slave, uint8_t isr)
{
	struct kvm_irqchip c = get_chip(&g, slave);

	c.chip.pic.isr = isr;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_IRQCHIP, &c), 0);
}

static void pic_eois(void **state)
{
	(void)state;
	pic_init(&g, 0x20, 0x28, 1);
	set_isr(false, 0x58);
	port_out(&g, 0x20, 0x20); /* the highest: 3 */
	assert_int_equal(get_pic(&g, false).isr, 0x50);
	port_out(&g, 0x20, 0x66); /* specific: 6 */
	assert_int_equal(get_pic(&g, false).isr, 0x10);
	port_out(&g, 0x20, 0xa0); /* rotate on non-specific: 4 becomes the lowest */
	assert_int_equal(get_pic(&g, false).isr, 0);
	assert_int_equal(get_pic(&g, false).priority_add, 5);
	/* Now 5 is the highest, and 6 comes before 0. */
	set_isr(false, 0x41);
	port_out(&g, 0x20, 0x20);
	assert_int_equal(get_pic(&g, false).isr, 0x01);
	port_out(&g, 0x20, 0xe0); /* rotate on specific 0 */
	assert_int_equal(get_pic(&g, false).isr, 0);
	assert_int_equal(get_pic(&g, false).priority_add, 1);
	port_out(&g, 0x20, 0xc7); /* set priority: 7 is the lowest */
	assert_int_equal(get_pic(&g, false).priority_add, 0);
	port_out(&g, 0x20, 0x80); /* rotate on automatic EOI */
	assert_int_equal(get_pic(&g, false).rotate_on_auto_eoi, 1);
	port_out(&g, 0x20, 0x00);
	assert_int_equal(get_pic(&g, false).rotate_on_auto_eoi, 0);
	/* Nothing in service, and the command that does nothing. */
	port_out(&g, 0x20, 0x20);
	port_out(&g, 0x20, 0x40);
	assert_int_equal(get_pic(&g, false).isr, 0);
}

/* ---- the IOAPIC -------------------------------------------------------------------- */

static void ioapic_registers(void **state)
{
	(void)state;
	assert_int_equal(ioapic_read(&g, 1), 0x170011);
	ioapic_write(&g, 1, 0x12345678);
	assert_int_equal(ioapic_read(&g, 1), 0x170011);
	ioapic_write(&g, 0, 0x5f000000);
	assert_int_equal(ioapic_read(&g, 0), 0x0f000000);
	assert_int_equal(ioapic_read(&g, 2), 0x0f000000);
	ioapic_write(&g, 2, 0x03000000);
	assert_int_equal(ioapic_read(&g, 2), 0x0f000000);
	/* Delivery status and remote IRR are not the guest's to write. */
	ioapic_write(&g, ENTRIES + 2 * 5, 0xffffffff);
	assert_int_equal(ioapic_read(&g, ENTRIES + 2 * 5), 0xffffafff);
	ioapic_write(&g, ENTRIES + 2 * 5 + 1, 0xffffffff);
	assert_int_equal(ioapic_read(&g, ENTRIES + 2 * 5 + 1), 0xffffffff);
	assert_int_equal(get_entry(&g, 5), 0xffffffffffffafff);
	/* Beyond the last pin. */
	assert_int_equal(ioapic_read(&g, ENTRIES + 2 * 24), 0xffffffff);
	ioapic_write(&g, ENTRIES + 2 * 24, 0);
	assert_int_equal(ioapic_read(&g, 3), 0xffffffff);
	assert_int_equal(get_ioapic(&g).ioregsel, 3);
}

static void ioapic_pending_requests(void **state)
{
	(void)state;
	/* Masked: an edge waits, the next one is coalesced; a level goes with its line. */
	ioapic_entry(&g, 20, E_MASK | 0x51);
	assert_int_equal(irq_status(&g, 20, 1), -1);
	assert_int_equal(get_ioapic(&g).irr, 1u << 20);
	assert_int_equal(irq_status(&g, 20, 1), 0);
	assert_int_equal(irq_status(&g, 20, 0), 1);
	assert_int_equal(get_ioapic(&g).irr, 0);
	ioapic_entry(&g, 21, E_MASK | E_LEVEL | 0x52);
	assert_int_equal(irq_status(&g, 21, 1), -1);
	assert_int_equal(irq_status(&g, 21, 1), -1);
	assert_int_equal(get_ioapic(&g).irr, 1u << 21);
	assert_int_equal(irq_status(&g, 21, 0), 1);
	assert_int_equal(get_ioapic(&g).irr, 0);
}

static void ioapic_edge_clears_remote_irr(void **state)
{
	struct kvm_irqchip c = get_chip(&g, KVM_IRQCHIP_IOAPIC);

	(void)state;
	c.chip.ioapic.redirtbl[7].bits = E_LEVEL | E_RIRR | E_MASK | 0x60;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_IRQCHIP, &c), 0);
	ioapic_write(&g, ENTRIES + 2 * 7, (uint32_t)(E_LEVEL | E_MASK | 0x60));
	assert_int_equal(get_entry(&g, 7), E_LEVEL | E_RIRR | E_MASK | 0x60);
	ioapic_write(&g, ENTRIES + 2 * 7, (uint32_t)(E_MASK | 0x60));
	assert_int_equal(get_entry(&g, 7), E_MASK | 0x60);
}

/* ---- the i8254 --------------------------------------------------------------------- */

static struct kvm_pit_state2 get_pit2(void)
{
	struct kvm_pit_state2 s;

	memset(&s, 0xee, sizeof(s));
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_GET_PIT2, &s), 0);
	return s;
}

static void make_pit(uint32_t flags)
{
	struct kvm_pit_config c = {.flags = flags};

	assert_int_equal(dev_ioctl_p(&g.vm, KVM_CREATE_PIT2, &c), 0);
}

static void pit_as_made(void **state)
{
	struct kvm_pit_config c = {.flags = ~0u};
	struct kvm_pit_state2 s;
	struct kvm_pit_state old;

	(void)state;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_CREATE_PIT2, &c), 0);
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_CREATE_PIT2, &c), -EEXIST);
	assert_int_equal(dev_ioctl(&g.vm, KVM_CREATE_PIT, 0), -EEXIST);
	s = get_pit2();
	assert_int_equal(s.flags, 0);
	for (unsigned i = 0; i < 3; i++) {
		assert_int_equal(s.channels[i].count, 0x10000);
		assert_int_equal(s.channels[i].mode, 0xff);
		assert_int_equal(s.channels[i].gate, i != 2);
		assert_int_equal(s.channels[i].rw_mode, 0);
		assert_int_equal(!!s.channels[i].count_load_time, i != 0);
	}
	for (unsigned i = 0; i < KL_ARRAY_SIZE(s.reserved); i++)
		assert_int_equal(s.reserved[i], 0);
	memset(&old, 0xee, sizeof(old));
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_GET_PIT, &old), 0);
	assert_memory_equal(&old, s.channels, sizeof(old));
}

static void pit_without_speaker(void **state)
{
	static const uint8_t in_61[] = {0xe4, 0x61};

	(void)state;
	make_pit(0);
	memcpy(g.ram + CODE, in_61, sizeof(in_61));
	guest_regs(&g);
	assert_exit(&g, KVM_EXIT_IO);
	assert_int_equal(g.run->io.port, 0x61);
}

static void pit_latches(void **state)
{
	struct kvm_pit_state2 s;

	(void)state;
	make_pit(KVM_PIT_SPEAKER_DUMMY);
	port_out(&g, 0x43, 0xb6); /* channel 2, low and high byte, mode 3 */
	port_out(&g, 0x42, 0x34);
	s = get_pit2();
	assert_int_equal(s.channels[2].write_state, 4);
	assert_int_equal(s.channels[2].write_latch, 0x34);
	port_out(&g, 0x42, 0x12);
	s = get_pit2();
	assert_int_equal(s.channels[2].count, 0x1234);
	assert_int_equal(s.channels[2].mode, 3);
	assert_int_equal(s.channels[2].rw_mode, 3);
	assert_int_equal(s.channels[2].write_state, 3);
	/* Modes 6 and 7 are 2 and 3. */
	port_out(&g, 0x43, 0xbc);
	assert_int_equal(get_pit2().channels[2].mode, 2);
	port_out(&g, 0x43, 0xbe);
	assert_int_equal(get_pit2().channels[2].mode, 3);

	/* A latched count is read once, low byte first, and latching again changes nothing. */
	port_out(&g, 0x43, 0x80);
	s = get_pit2();
	assert_int_equal(s.channels[2].count_latched, 3);
	port_out(&g, 0x43, 0x80);
	assert_int_equal(get_pit2().channels[2].latched_count, s.channels[2].latched_count);
	assert_int_equal(port_in(&g, 0x42), s.channels[2].latched_count & 0xff);
	assert_int_equal(get_pit2().channels[2].count_latched, 2);
	assert_int_equal(port_in(&g, 0x42), s.channels[2].latched_count >> 8);
	assert_int_equal(get_pit2().channels[2].count_latched, 0);

	/* Read-back of status and count: the status comes first. */
	port_out(&g, 0x43, 0xc8);
	s = get_pit2();
	assert_int_equal(s.channels[2].status_latched, 1);
	assert_int_equal(s.channels[2].status & 0x3f, 0x36);
	assert_int_equal(s.channels[1].status_latched, 0);
	assert_int_equal(port_in(&g, 0x42) & 0x3f, 0x36);
	assert_int_equal(port_in(&g, 0x42), s.channels[2].latched_count & 0xff);
	assert_int_equal(port_in(&g, 0x42), s.channels[2].latched_count >> 8);
	/* One byte only: the other half is 0. */
	port_out(&g, 0x43, 0x94);
	port_out(&g, 0x42, 0x80);
	assert_int_equal(get_pit2().channels[2].count, 0x80);
	port_out(&g, 0x43, 0xa4);
	port_out(&g, 0x42, 0x80);
	assert_int_equal(get_pit2().channels[2].count, 0x8000);
	port_out(&g, 0x42, 0);
	assert_int_equal(get_pit2().channels[2].count, 0x10000);
}

static void pit_speaker(void **state)
{
	uint8_t val;

	(void)state;
	make_pit(KVM_PIT_SPEAKER_DUMMY);
	port_out(&g, 0x43, 0xb0); /* channel 2, mode 0 */
	port_out(&g, 0x42, 1);
	port_out(&g, 0x42, 0);
	port_out(&g, 0x61, 3);
	assert_int_equal(get_pit2().flags, KVM_PIT_FLAGS_SPEAKER_DATA_ON);
	assert_int_equal(get_pit2().channels[2].gate, 1);
	/* One tick has passed: the output is high. */
	val = port_in(&g, 0x61);
	assert_int_equal(val & 0xef, 0x23);
	port_out(&g, 0x61, 0);
	assert_int_equal(get_pit2().flags, 0);
	assert_int_equal(port_in(&g, 0x61) & 0xef, 0x20);
}

/* A count that comes down, whatever is done in between. */
static void pit_counts(void **state)
{
	unsigned last = 0x10000, now = 0;

	(void)state;
	make_pit(KVM_PIT_SPEAKER_DUMMY);
	port_out(&g, 0x43, 0xb0);
	port_out(&g, 0x42, 0xff);
	port_out(&g, 0x42, 0xff);
	for (unsigned i = 0; i < 3; i++) {
		port_out(&g, 0x43, 0x80);
		now = port_in(&g, 0x42);
		now |= (unsigned)port_in(&g, 0x42) << 8;
		/* It wraps after 55 ms, which may well pass on a busy machine. */
		if (now >= last)
			break;
		last = now;
	}
	assert_true(now < 0x10000);
}

static void pit_state_is_kept(void **state)
{
	struct kvm_pit_state2 s = {.flags = KVM_PIT_FLAGS_HPET_LEGACY}, back;
	struct kvm_reinject_control rc = {.pit_reinject = 0};

	(void)state;
	make_pit(0);
	for (unsigned i = 0; i < 3; i++)
		s.channels[i] = (struct kvm_pit_channel_state){
			.count = 0x4000 + i,
			.latched_count = 0x1111,
			.count_latched = 3,
			.status_latched = 1,
			.status = 0x55,
			.read_state = 4,
			.write_state = 3,
			.write_latch = 7,
			.rw_mode = 3,
			.mode = 2,
			.bcd = 1,
			.gate = 1,
		};
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_PIT2, &s), 0);
	back = get_pit2();
	assert_int_equal(back.flags, KVM_PIT_FLAGS_HPET_LEGACY);
	/* The HPET has stopped the timer and not the counter; the mode is as it was. */
	for (unsigned i = 0; i < 3; i++)
		back.channels[i].count_load_time = 0;
	assert_memory_equal(back.channels, s.channels, sizeof(s.channels));
	s.channels[0].count = 0;
	s.flags = 0;
	/* The old call leaves the flags alone. */
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_PIT, s.channels), 0);
	assert_int_equal(get_pit2().flags, KVM_PIT_FLAGS_HPET_LEGACY);
	assert_int_equal(get_pit2().channels[0].count, 0x10000);
	for (unsigned i = 0; i < 2; i++) {
		assert_int_equal(dev_ioctl_p(&g.vm, KVM_REINJECT_CONTROL, &rc), 0);
		assert_int_equal(dev_ioctl_p(&g.vm, KVM_REINJECT_CONTROL, &rc), 0);
		rc.pit_reinject = 1;
	}
}

/* ---- routing ----------------------------------------------------------------------- */

static struct {
	struct kvm_irq_routing head;
	struct kvm_irq_routing_entry e[MAX_ROUTES + 1];
} routes;

static long set_routes(unsigned n)
{
	routes.head.nr = n;
	return dev_ioctl_p(&g.vm, KVM_SET_GSI_ROUTING, &routes);
}

static struct kvm_irq_routing_entry pin(uint32_t gsi, uint32_t chip, uint32_t pin)
{
	return (struct kvm_irq_routing_entry){
		.gsi = gsi,
		.type = KVM_IRQ_ROUTING_IRQCHIP,
		.u.irqchip = {.irqchip = chip, .pin = pin},
	};
}

static struct kvm_irq_routing_entry msi(uint32_t gsi)
{
	return (struct kvm_irq_routing_entry){
		.gsi = gsi,
		.type = KVM_IRQ_ROUTING_MSI,
		.u.msi = {.address_lo = 0xfee00000, .address_hi = 0xff, .data = 0x41},
	};
}

static void routing_is_checked(void **state)
{
	struct dev kvm = open_kvm(), vm = make_vm(&kvm);

	(void)state;
	memset(&routes, 0, sizeof(routes));
	assert_int_equal(dev_ioctl_p(&vm, KVM_SET_GSI_ROUTING, &routes), -EINVAL);
	dev_close(&vm);
	dev_close(&kvm);

	assert_int_equal(set_routes(0), 0);
	assert_int_equal(set_routes(MAX_ROUTES + 1), -EINVAL);
	routes.head.flags = 1;
	assert_int_equal(set_routes(0), -EINVAL);
	routes.head.flags = 0;
	for (unsigned i = 0; i < MAX_ROUTES; i++)
		routes.e[i] = msi(i);
	assert_int_equal(set_routes(MAX_ROUTES), 0);
	routes.e[7].gsi = MAX_ROUTES;
	assert_int_equal(set_routes(MAX_ROUTES), -EINVAL);

	routes.e[0] = pin(0, 3, 0);
	assert_int_equal(set_routes(1), -EINVAL);
	routes.e[0] = pin(0, KVM_IRQCHIP_PIC_MASTER, 8);
	assert_int_equal(set_routes(1), -EINVAL);
	routes.e[0] = pin(0, KVM_IRQCHIP_PIC_SLAVE, UINT32_MAX);
	assert_int_equal(set_routes(1), -EINVAL);
	routes.e[0] = pin(0, KVM_IRQCHIP_IOAPIC, 24);
	assert_int_equal(set_routes(1), -EINVAL);
	routes.e[0] = pin(0, KVM_IRQCHIP_IOAPIC, 23);
	assert_int_equal(set_routes(1), 0);
	routes.e[0].flags = KVM_MSI_VALID_DEVID;
	assert_int_equal(set_routes(1), -EINVAL);
	routes.e[0] = msi(0);
	routes.e[0].flags = KVM_MSI_VALID_DEVID;
	assert_int_equal(set_routes(1), 0);
	routes.e[0].flags = 2;
	assert_int_equal(set_routes(1), -EINVAL);
	routes.e[0] = msi(0);
	routes.e[0].type = 0;
	assert_int_equal(set_routes(1), -EINVAL);
	routes.e[0].type = KVM_IRQ_ROUTING_S390_ADAPTER;
	assert_int_equal(set_routes(1), -EINVAL);

	/* One pin of each chip, or one message. */
	routes.e[0] = pin(5, KVM_IRQCHIP_PIC_MASTER, 1);
	routes.e[1] = pin(5, KVM_IRQCHIP_PIC_SLAVE, 1);
	routes.e[2] = pin(5, KVM_IRQCHIP_IOAPIC, 1);
	assert_int_equal(set_routes(3), 0);
	routes.e[1] = pin(5, KVM_IRQCHIP_PIC_MASTER, 2);
	assert_int_equal(set_routes(3), -EINVAL);
	routes.e[1] = msi(5);
	assert_int_equal(set_routes(3), -EINVAL);
	routes.e[0] = msi(5);
	assert_int_equal(set_routes(2), -EINVAL);
}

/* With 32-bit APIC ids the upper address has the upper bits, and nothing below. */
static void messages_to_wide_ids(void **state)
{
	struct kvm_enable_cap cap = {.cap = KVM_CAP_X2APIC_API,
				     .args = {KVM_X2APIC_API_USE_32BIT_IDS}};
	struct kvm_msi m = {.address_lo = 0xfee00000, .address_hi = 0xff, .data = 0x41};

	(void)state;
	memset(&routes, 0, sizeof(routes));
	routes.e[0] = msi(0);
	assert_int_equal(set_routes(1), 0);
	assert_true(dev_ioctl_p(&g.vm, KVM_SIGNAL_MSI, &m) >= 0);
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_ENABLE_CAP, &cap), 0);
	assert_int_equal(set_routes(1), -EINVAL);
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SIGNAL_MSI, &m), -EINVAL);
	/* A route of the time before is none any more. */
	assert_int_equal(irq_status(&g, 0, 1), -1);
	m.address_hi = 0;
	assert_true(dev_ioctl_p(&g.vm, KVM_SIGNAL_MSI, &m) >= 0);
	/* A vCPU that is not there. */
	m.address_hi = 0x100;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SIGNAL_MSI, &m), 0);
	routes.e[0].u.msi.address_hi = 0x100;
	assert_int_equal(set_routes(1), 0);
}

static void routes_lead_to_pins(void **state)
{
	(void)state;
	memset(&routes, 0, sizeof(routes));
	/* As made: both controllers. */
	irq_line(&g, 9, 1);
	assert_int_equal(get_pic(&g, true).irr, 2);
	assert_int_equal(get_ioapic(&g).irr, 1u << 9);
	irq_line(&g, 9, 0);
	irq_line(&g, 23, 1);
	assert_int_equal(get_ioapic(&g).irr, 1u << 23);
	irq_line(&g, 23, 0);

	routes.e[0] = pin(100, KVM_IRQCHIP_IOAPIC, 3);
	assert_int_equal(set_routes(1), 0);
	irq_line(&g, 3, 1);
	assert_int_equal(get_ioapic(&g).irr, 0);
	assert_int_equal(irq_status(&g, 3, 1), -1);
	assert_int_equal(irq_status(&g, 4095, 1), -1);
	assert_int_equal(irq_status(&g, UINT32_MAX, 1), -1);
	irq_line(&g, 100, 1);
	assert_int_equal(get_ioapic(&g).irr, 1u << 3);
	/* A line that nobody reaches any more stays as it is. */
	assert_int_equal(set_routes(0), 0);
	irq_line(&g, 100, 0);
	assert_int_equal(get_ioapic(&g).irr, 1u << 3);
}

/* ---- irqfds ------------------------------------------------------------------------ */

static long irqfd(int fd, uint32_t gsi, uint32_t flags, int resample)
{
	struct kvm_irqfd f = {
		.fd = (uint32_t)fd,
		.gsi = gsi,
		.flags = flags,
		.resamplefd = (uint32_t)resample,
	};

	return dev_ioctl_p(&g.vm, KVM_IRQFD, &f);
}

static void irqfd_errnos(void **state)
{
	int a = eventfd(0, 0), b = eventfd(0, 0), pipes[2], copy = dup(a);

	(void)state;
	assert_int_equal(pipe(pipes), 0);
	assert_int_equal(dev_ioctl(&g.vm, KVM_IRQFD, 0), -EFAULT);
	assert_int_equal(irqfd(-1, 5, 4, 0), -EINVAL);
	assert_int_equal(irqfd(-1, 5, 0, 0), -EBADF);
	assert_int_equal(irqfd(9999, 5, KVM_IRQFD_FLAG_DEASSIGN, 0), -EBADF);
	assert_int_equal(irqfd(pipes[0], 5, 0, 0), -EINVAL);
	assert_int_equal(irqfd(pipes[0], 5, KVM_IRQFD_FLAG_DEASSIGN, 0), -EINVAL);
	assert_int_equal(irqfd(a, 5, KVM_IRQFD_FLAG_RESAMPLE, -1), -EBADF);
	assert_int_equal(irqfd(a, 5, KVM_IRQFD_FLAG_RESAMPLE, pipes[1]), -EINVAL);
	/* Nothing of it was left behind. */
	assert_int_equal(irqfd(a, 5, 0, 0), 0);
	assert_int_equal(irqfd(a, 5, 0, 0), -EBUSY);
	assert_int_equal(irqfd(a, 6, 0, 0), -EBUSY);
	assert_int_equal(irqfd(copy, 6, 0, 0), -EBUSY);
	assert_int_equal(irqfd(a, 6, KVM_IRQFD_FLAG_RESAMPLE, b), -EBUSY);
	/* Many eventfds may raise one GSI. */
	assert_int_equal(irqfd(b, 5, 0, 0), 0);
	/* Another GSI, another eventfd: nothing to do is no error. */
	assert_int_equal(irqfd(a, 6, KVM_IRQFD_FLAG_DEASSIGN, 0), 0);
	assert_int_equal(irqfd(a, 5, 0, 0), -EBUSY);
	assert_int_equal(irqfd(copy, 5, KVM_IRQFD_FLAG_DEASSIGN, 0), 0);
	assert_int_equal(irqfd(a, 5, KVM_IRQFD_FLAG_DEASSIGN, 0), 0);
	assert_int_equal(irqfd(a, 6, 0, 0), 0);
	/* A GSI that means nothing yet. */
	assert_int_equal(irqfd(b, 5, KVM_IRQFD_FLAG_DEASSIGN, 0), 0);
	assert_int_equal(irqfd(b, UINT32_MAX, 0, 0), 0);
	close(a);
	close(b);
	close(copy);
	close(pipes[0]);
	close(pipes[1]);
}

/* Until the IOAPIC has it. */
static void wait_irr(uint32_t irr)
{
	for (unsigned i = 0; get_ioapic(&g).irr != irr; i++) {
		assert_true(i < 100000);
		usleep(100);
	}
}

static uint64_t count_of(int fd)
{
	uint64_t n = 0;

	return read(fd, &n, sizeof(n)) == sizeof(n) ? n : 0;
}

static void signal_fd(int fd, uint64_t n)
{
	assert_int_equal(write(fd, &n, sizeof(n)), sizeof(n));
}

/* A resampling irqfd of a masked, level-triggered pin shows in irr until it is lowered. */
static void irqfd_raises(void **state)
{
	int a = eventfd(0, EFD_NONBLOCK), b = eventfd(0, EFD_NONBLOCK),
	    r = eventfd(0, EFD_NONBLOCK);

	(void)state;
	ioapic_entry(&g, 18, E_MASK | E_LEVEL | 0x55);
	ioapic_entry(&g, 19, E_MASK | E_LEVEL | 0x56);
	assert_int_equal(irqfd(a, 18, KVM_IRQFD_FLAG_RESAMPLE, r), 0);
	assert_int_equal(irqfd(b, 18, KVM_IRQFD_FLAG_RESAMPLE, r), 0);
	signal_fd(a, 3);
	wait_irr(1u << 18);
	/* The signal was taken. */
	assert_int_equal(count_of(a), 0);
	/* The first that goes leaves the line to the others; the last lowers it. */
	assert_int_equal(irqfd(a, 18, KVM_IRQFD_FLAG_DEASSIGN, 0), 0);
	assert_int_equal(get_ioapic(&g).irr, 1u << 18);
	assert_int_equal(irqfd(b, 18, KVM_IRQFD_FLAG_DEASSIGN, 0), 0);
	assert_int_equal(get_ioapic(&g).irr, 0);
	/* What the program drives with KVM_IRQ_LINE is its own. */
	irq_line(&g, 19, 1);
	assert_int_equal(irqfd(a, 19, KVM_IRQFD_FLAG_RESAMPLE, r), 0);
	signal_fd(a, 1);
	assert_int_equal(irqfd(a, 19, KVM_IRQFD_FLAG_DEASSIGN, 0), 0);
	assert_int_equal(get_ioapic(&g).irr, 1u << 19);
	irq_line(&g, 19, 0);
	assert_int_equal(get_ioapic(&g).irr, 0);
	/* After the deassignment nobody looks at it. */
	signal_fd(a, 5);
	assert_int_equal(count_of(a), 5 + 0);
	close(a);
	close(b);
	close(r);
}

/* Readable when it is assigned: raised, and the count is the program's. */
static void irqfd_readable_at_assignment(void **state)
{
	int a = eventfd(7, EFD_NONBLOCK), r = eventfd(0, EFD_NONBLOCK);

	(void)state;
	ioapic_entry(&g, 18, E_MASK | E_LEVEL | 0x55);
	assert_int_equal(irqfd(a, 18, KVM_IRQFD_FLAG_RESAMPLE, r), 0);
	wait_irr(1u << 18);
	assert_int_equal(count_of(a), 7);
	assert_int_equal(irqfd(a, 18, KVM_IRQFD_FLAG_DEASSIGN, 0), 0);
	close(a);
	close(r);
}

/* Unmasking a level whose device can be asked asks it, and does not deliver. */
static void unmasking_resamples(void **state)
{
	int a = eventfd(0, EFD_NONBLOCK), r = eventfd(0, EFD_NONBLOCK);

	(void)state;
	ioapic_entry(&g, 18, E_MASK | E_LEVEL | 0x55);
	assert_int_equal(irqfd(a, 18, KVM_IRQFD_FLAG_RESAMPLE, r), 0);
	signal_fd(a, 1);
	wait_irr(1u << 18);
	assert_int_equal(count_of(r), 0);
	ioapic_write(&g, ENTRIES + 2 * 18, E_LEVEL | 0x55);
	assert_int_equal(count_of(r), 1);
	assert_int_equal(get_ioapic(&g).irr, 0);
	assert_int_equal(get_entry(&g, 18) & E_RIRR, 0);
	close(a);
	close(r);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
	const struct CMUnitTest tests[] = {
		TEST(one_irqchip_before_vcpus),
		TEST(split_has_no_pins),
		TEST(devices_of_no_type),
		TEST(capabilities),
		TEST(bad_pointers),
		TEST(chips_as_made),
		TEST(any_state_is_kept),
		TEST(moved_ioapic_is_silent),
		TEST(pic_initialization),
		TEST(pic_edges_and_levels),
		TEST(pic_reads),
		TEST(pic_poll),
		TEST(pic_eois),
		TEST(ioapic_registers),
		TEST(ioapic_pending_requests),
		TEST(ioapic_edge_clears_remote_irr),
		TEST(pit_as_made),
		TEST(pit_without_speaker),
		TEST(pit_latches),
		TEST(pit_speaker),
		TEST(pit_counts),
		TEST(pit_state_is_kept),
		TEST(routing_is_checked),
		TEST(messages_to_wide_ids),
		TEST(routes_lead_to_pins),
		TEST(irqfd_errnos),
		TEST(irqfd_raises),
		TEST(irqfd_readable_at_assignment),
		TEST(unmasking_resamples),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
