/* SPDX-License-Identifier: MIT */
/* The local APIC's ioctls and capabilities, and KVM_INTERRUPT beside it. */
#include "uapi_guest.h"

#define LVT0 0x350
#define SVR  0xf0

static struct guest g;

static long enable(struct dev *vm, uint32_t cap, uint64_t arg)
{
	struct kvm_enable_cap c = {.cap = cap, .args = {arg}};

	return dev_ioctl_p(vm, KVM_ENABLE_CAP, &c);
}

/* A guest in real mode with a split irqchip. */
static void make_split(void)
{
	g.kvm = open_kvm();
	g.vm = make_vm(&g.kvm);
	assert_int_equal(enable(&g.vm, KVM_CAP_SPLIT_IRQCHIP, 24), 0);
	g.vcpu = make_vcpu(&g.vm, 0);
	g.run = map_run(&g.vcpu);
	g.ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	assert_true(g.ram != MAP_FAILED);
	assert_int_equal(set_slot(&g, 0, 0, 0, RAM, g.ram), 0);
	guest_regs(&g);
}

static void capabilities(void **state)
{
	struct dev kvm = open_kvm(), vm = make_vm(&kvm), vcpu;
	const uint64_t longest = UINT64_MAX / (128ull * UINT32_MAX);

	(void)state;
	assert_int_equal(dev_ioctl(&kvm, KVM_CHECK_EXTENSION, KVM_CAP_X2APIC_API) & 3, 3);
	assert_int_equal(dev_ioctl(&kvm, KVM_CHECK_EXTENSION, KVM_CAP_TSC_DEADLINE_TIMER), 1);
	assert_int_equal(dev_ioctl(&kvm, KVM_CHECK_EXTENSION, KVM_CAP_X86_APIC_BUS_CYCLES_NS), 1);
	assert_int_equal(enable(&vm, KVM_CAP_X2APIC_API, 1ull << 40), -EINVAL);
	assert_int_equal(enable(&vm, KVM_CAP_X2APIC_API, 3), 0);
	assert_int_equal(enable(&vm, KVM_CAP_X86_DISABLE_EXITS, 1 << 20), -EINVAL);
	assert_int_equal(enable(&vm, KVM_CAP_X86_DISABLE_EXITS, KVM_X86_DISABLE_EXITS_PAUSE), 0);
	/* In this order: the value, the APIC, the vCPUs. */
	assert_int_equal(enable(&vm, KVM_CAP_X86_APIC_BUS_CYCLES_NS, 0), -EINVAL);
	assert_int_equal(enable(&vm, KVM_CAP_X86_APIC_BUS_CYCLES_NS, longest + 1), -EINVAL);
	assert_int_equal(enable(&vm, KVM_CAP_X86_APIC_BUS_CYCLES_NS, 10), -ENXIO);
	assert_int_equal(dev_ioctl(&vm, KVM_CREATE_IRQCHIP, 0), 0);
	assert_int_equal(enable(&vm, KVM_CAP_X86_APIC_BUS_CYCLES_NS, longest), 0);
	vcpu = make_vcpu(&vm, 0);
	assert_int_equal(enable(&vm, KVM_CAP_X86_APIC_BUS_CYCLES_NS, 10), -EINVAL);
	dev_close(&vcpu);
	dev_close(&vm);
	dev_close(&kvm);
}

static void get_and_set(void **state)
{
	struct kvm_lapic_state s, back;
	struct kvm_sregs sregs;
	uint32_t val = 0x1ff;

	(void)state;
	guest_make(&g, false);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_LAPIC, &s), -EINVAL);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_LAPIC, &s), -EINVAL);
	guest_free(&g);
	guest_make(&g, true);
	assert_int_equal(dev_ioctl(&g.vcpu, KVM_GET_LAPIC, 1), -EFAULT);
	assert_int_equal(dev_ioctl(&g.vcpu, KVM_SET_LAPIC, 1), -EFAULT);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_LAPIC, &s), 0);
	memcpy(s.regs + SVR, &val, 4);
	val = 0x5a;
	memcpy(s.regs + 0x80, &val, 4);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_LAPIC, &s), 0);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_LAPIC, &back), 0);
	memcpy(&val, back.regs + SVR, 4);
	assert_int_equal(val, 0x1ff);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_SREGS, &sregs), 0);
	assert_int_equal(sregs.cr8, 5); /* the upper half of TPR */
	sregs.cr8 = 3;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_SREGS, &sregs), 0);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_LAPIC, &back), 0);
	memcpy(&val, back.regs + 0x80, 4);
	assert_int_equal(val, 0x30);
	sregs.apic_base = 0xfee00400; /* x2APIC without the APIC */
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_SREGS, &sregs), -EINVAL);
	/* kvm_run says what the APIC has; what it says of CR8 is not read back. */
	guest_code(&g, 0xe6, 1, 0xe6, 2); /* out 1; out 2 */
	g.run->cr8 = 9;
	assert_exit(&g, KVM_EXIT_IO);
	assert_int_equal(g.run->cr8, 3);
	assert_int_equal(g.run->apic_base, 0xfee00900);
	assert_int_equal(g.run->if_flag, 0);
	assert_int_equal(g.run->ready_for_interrupt_injection, 1); /* the PIC is the kernel's */
	guest_free(&g);
}

/* Split irqchip: KVM_INTERRUPT is the program's PIC, and LINT0 lets it in. */
static void program_has_the_pic(void **state)
{
	struct kvm_interrupt irq = {.irq = 0x21};
	struct kvm_lapic_state s;
	uint32_t val;

	(void)state;
	if (on_real_kvm())
		skip(); /* software KVMs look for the interrupt at their next exit only */
	make_split();
	guest_code(&g, 0xfb, 0x90, 0xe6, 1, 0xf4); /* sti; nop; out 1; hlt */
	memcpy(g.ram + 0x900, (uint8_t[]){0xe6, 2, 0xcf}, 3);
	set_vector(&g, 0x21, 0x900);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_INTERRUPT, &irq), 0);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_INTERRUPT, &irq), -EEXIST);
	assert_exit(&g, KVM_EXIT_IO);
	assert_int_equal(g.run->io.port, 2);
	assert_int_equal(g.run->ready_for_interrupt_injection, 0); /* IF is clear in the handler */
	g.run->request_interrupt_window = 1;
	assert_exit(&g, KVM_EXIT_IRQ_WINDOW_OPEN);
	assert_int_equal(g.run->ready_for_interrupt_injection, 1);
	g.run->request_interrupt_window = 0;
	/* A masked LINT0 does not let it in, nor is the program asked for more. */
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_LAPIC, &s), 0);
	val = 0x10700;
	memcpy(s.regs + LVT0, &val, 4);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_LAPIC, &s), 0);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_INTERRUPT, &irq), 0);
	assert_exit(&g, KVM_EXIT_IO);
	assert_int_equal(g.run->io.port, 1);
	assert_int_equal(g.run->ready_for_interrupt_injection, 0);
	val = 0x700;
	memcpy(s.regs + LVT0, &val, 4);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_LAPIC, &s), 0);
	assert_exit(&g, KVM_EXIT_IO); /* in HLT, or before it */
	assert_int_equal(g.run->io.port, 2);
	guest_free(&g);
	/* The engine's own PIC takes no other's interrupts. */
	guest_make(&g, true);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_INTERRUPT, &irq), -ENXIO);
	guest_free(&g);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(capabilities),
		cmocka_unit_test(get_and_set),
		cmocka_unit_test(program_has_the_pic),
	};

	cmocka_set_test_filter(getenv("KVMLET_TEST"));
	return cmocka_run_group_tests(tests, NULL, NULL);
}
