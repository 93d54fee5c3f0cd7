/* SPDX-License-Identifier: MIT */
/*
 * Every ioctl with bad arguments: wrong scope, null, unmapped, half-mapped, misaligned and
 * read-only pointers, huge counts (U1). With KVMLET_TEST_REAL=1 on the real /dev/kvm.
 */
#include <limits.h>

#include "uapi_util.h"

static struct dev kvm, vm, empty_vm, vcpu;

static int setup(void **state)
{
	(void)state;
	kvm = open_kvm();
	vm = make_vm(&kvm);
	empty_vm = make_vm(&kvm);
	vcpu = make_vcpu(&vm, 0);
	return 0;
}

static int teardown(void **state)
{
	(void)state;
	dev_close(&vcpu);
	dev_close(&vm);
	dev_close(&empty_vm);
	dev_close(&kvm);
	return 0;
}

struct pointer_ioctl {
	struct dev *d;
	unsigned long cmd;
	size_t size; /* what is read or written at least */
	bool get;    /* writes before it needs anything valid */
	bool null_ok;
};

static const struct pointer_ioctl pointer_ioctls[] = {
	{&kvm, KVM_GET_MSR_INDEX_LIST, 4},
	{&kvm, KVM_GET_MSR_FEATURE_INDEX_LIST, 4},
	{&kvm, KVM_GET_SUPPORTED_CPUID, 8},
	{&kvm, KVM_GET_EMULATED_CPUID, 8},
	{&kvm, KVM_GET_MSRS, 8},
	{&vm, KVM_SET_USER_MEMORY_REGION, 32},
	{&vm, KVM_SET_USER_MEMORY_REGION2, 160},
	{&vm, KVM_ENABLE_CAP, sizeof(struct kvm_enable_cap)},
	{&vm, KVM_GET_DIRTY_LOG, sizeof(struct kvm_dirty_log)},
	{&vm, KVM_CLEAR_DIRTY_LOG, sizeof(struct kvm_clear_dirty_log)},
	{&vm, KVM_REGISTER_COALESCED_MMIO, sizeof(struct kvm_coalesced_mmio_zone)},
	{&vm, KVM_UNREGISTER_COALESCED_MMIO, sizeof(struct kvm_coalesced_mmio_zone)},
	{&vm, KVM_IOEVENTFD, sizeof(struct kvm_ioeventfd)},
	{&vm, KVM_IRQFD, sizeof(struct kvm_irqfd)},
	{&vm, KVM_SIGNAL_MSI, sizeof(struct kvm_msi)},
	{&vm, KVM_IRQ_LINE, sizeof(struct kvm_irq_level)},
	{&vm, KVM_IRQ_LINE_STATUS, sizeof(struct kvm_irq_level)},
	{&vm, KVM_SET_GSI_ROUTING, 8},
	{&vm, KVM_CREATE_DEVICE, sizeof(struct kvm_create_device)},
	{&vm, KVM_GET_IRQCHIP, sizeof(struct kvm_irqchip)},
	{&vm, KVM_SET_IRQCHIP, sizeof(struct kvm_irqchip)},
	{&vm, KVM_CREATE_PIT2, sizeof(struct kvm_pit_config)},
	{&vm, KVM_GET_PIT, sizeof(struct kvm_pit_state)},
	{&vm, KVM_SET_PIT, sizeof(struct kvm_pit_state)},
	{&vm, KVM_SET_PIT2, sizeof(struct kvm_pit_state2)},
	{&vm, KVM_REINJECT_CONTROL, sizeof(struct kvm_reinject_control)},
	{&vm, KVM_X86_SET_MSR_FILTER, sizeof(struct kvm_msr_filter)},
	{&empty_vm, KVM_SET_IDENTITY_MAP_ADDR, 8},
	{&vcpu, KVM_GET_REGS, sizeof(struct kvm_regs), .get = true},
	{&vcpu, KVM_SET_REGS, sizeof(struct kvm_regs)},
	{&vcpu, KVM_GET_SREGS, sizeof(struct kvm_sregs), .get = true},
	{&vcpu, KVM_SET_SREGS, sizeof(struct kvm_sregs)},
	{&vcpu, KVM_GET_SREGS2, sizeof(struct kvm_sregs2), .get = true},
	{&vcpu, KVM_SET_SREGS2, sizeof(struct kvm_sregs2)},
	{&vcpu, KVM_GET_FPU, sizeof(struct kvm_fpu), .get = true},
	{&vcpu, KVM_SET_FPU, sizeof(struct kvm_fpu)},
	{&vcpu, KVM_GET_XSAVE, sizeof(struct kvm_xsave), .get = true},
	{&vcpu, KVM_GET_XSAVE2, sizeof(struct kvm_xsave), .get = true},
	{&vcpu, KVM_SET_XSAVE, sizeof(struct kvm_xsave)},
	{&vcpu, KVM_GET_XCRS, sizeof(struct kvm_xcrs), .get = true},
	{&vcpu, KVM_SET_XCRS, sizeof(struct kvm_xcrs)},
	{&vcpu, KVM_GET_DEBUGREGS, sizeof(struct kvm_debugregs), .get = true},
	{&vcpu, KVM_SET_DEBUGREGS, sizeof(struct kvm_debugregs)},
	{&vcpu, KVM_X86_SETUP_MCE, sizeof(uint64_t)},
	{&vcpu, KVM_X86_SET_MCE, sizeof(struct kvm_x86_mce)},
	{&vcpu, KVM_SET_GUEST_DEBUG, sizeof(struct kvm_guest_debug)},
	{&vcpu, KVM_GET_VCPU_EVENTS, sizeof(struct kvm_vcpu_events), .get = true},
	{&vcpu, KVM_SET_VCPU_EVENTS, sizeof(struct kvm_vcpu_events)},
	{&vcpu, KVM_GET_MP_STATE, sizeof(struct kvm_mp_state), .get = true},
	{&vcpu, KVM_SET_MP_STATE, sizeof(struct kvm_mp_state)},
	{&vcpu, KVM_TRANSLATE, sizeof(struct kvm_translation)},
	{&vcpu, KVM_PRE_FAULT_MEMORY, sizeof(struct kvm_pre_fault_memory)},
	{&vcpu, KVM_INTERRUPT, sizeof(struct kvm_interrupt)},
	{&vcpu, KVM_GET_MSRS, 8},
	{&vcpu, KVM_SET_MSRS, 8},
	{&vcpu, KVM_GET_CPUID2, 8},
	{&vcpu, KVM_SET_CPUID2, 8},
	{&vcpu, KVM_SET_CPUID, 8},
	{&vcpu, KVM_ENABLE_CAP, sizeof(struct kvm_enable_cap)},
	{&vcpu, KVM_SET_SIGNAL_MASK, 4, .null_ok = true},
};

static void expect(const struct pointer_ioctl *p, const void *arg, long want, const char *what)
{
	long r = dev_ioctl_p(p->d, p->cmd, arg);

	if (r != want)
		fail_msg("ioctl 0x%lx, %s: %ld, expected %ld", p->cmd, what, r, want);
}

static void bad_pointers(void **state)
{
	char *half = half_mapped();
	char *ro = mmap(NULL, 2 * KL_PAGE_SIZE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	(void)state;
	assert_true(ro != MAP_FAILED);
	for (size_t i = 0; i < sizeof(pointer_ioctls) / sizeof(pointer_ioctls[0]); i++) {
		const struct pointer_ioctl *p = &pointer_ioctls[i];

		expect(p, NULL, p->null_ok ? 0 : -EFAULT, "null");
		expect(p, half + KL_PAGE_SIZE, -EFAULT, "unmapped");
		expect(p, (void *)-1l, -EFAULT, "all ones");
		expect(p, (void *)(1ul << 63), -EFAULT, "not canonical");
		expect(p, half + KL_PAGE_SIZE - p->size + 1, -EFAULT, "last byte missing");
		if (p->get)
			expect(p, ro, -EFAULT, "read-only");
	}
	munmap(half, 2 * KL_PAGE_SIZE);
	munmap(ro, 2 * KL_PAGE_SIZE);
}

/* What fits exactly before the hole, at an odd address where the size is odd, works. */
static void tight_pointers(void **state)
{
	char *half = half_mapped();

	(void)state;
	for (size_t i = 0; i < sizeof(pointer_ioctls) / sizeof(pointer_ioctls[0]); i++) {
		const struct pointer_ioctl *p = &pointer_ioctls[i];

		if (!p->get || p->size > KL_PAGE_SIZE - 1)
			continue;
		expect(p, half + KL_PAGE_SIZE - p->size, 0, "tight");
		memset(half, 0x5a, KL_PAGE_SIZE);
		expect(p, half + KL_PAGE_SIZE - p->size - 1, 0, "misaligned");
		assert_int_equal(half[KL_PAGE_SIZE - 1], 0x5a);
		assert_int_equal(half[KL_PAGE_SIZE - p->size - 2], 0x5a);
	}
	munmap(half, 2 * KL_PAGE_SIZE);
}

static void misaligned_is_the_same(void **state)
{
	struct kvm_regs regs;
	char buf[sizeof(regs) + 1];

	(void)state;
	assert_int_equal(dev_ioctl_p(&vcpu, KVM_GET_REGS, &regs), 0);
	regs.rbx = 0x1122334455667788;
	memcpy(buf + 1, &regs, sizeof(regs));
	assert_int_equal(dev_ioctl_p(&vcpu, KVM_SET_REGS, buf + 1), 0);
	memset(buf, 0, sizeof(buf));
	assert_int_equal(dev_ioctl_p(&vcpu, KVM_GET_REGS, buf + 1), 0);
	assert_memory_equal(buf + 1, &regs, sizeof(regs));
}

static void wrong_scope_or_unknown(void **state)
{
	static const unsigned long junk[] = {0, 0x1234, _IO(KVMIO, 0xfe), _IO(KVMIO, 0xff),
					     _IOW('x', 0x80, int)};

	(void)state;
	for (size_t i = 0; i < sizeof(junk) / sizeof(junk[0]); i++) {
		assert_int_equal(dev_ioctl(&kvm, junk[i], 0), -EINVAL);
		assert_int_equal(dev_ioctl(&vm, junk[i], 0), -ENOTTY);
		assert_int_equal(dev_ioctl(&vcpu, junk[i], 0), -EINVAL);
	}
	assert_int_equal(dev_ioctl(&kvm, KVM_RUN, 0), -EINVAL);
	assert_int_equal(dev_ioctl(&kvm, KVM_CREATE_VCPU, 0), -EINVAL);
	assert_int_equal(dev_ioctl(&kvm, KVM_GET_STATS_FD, 0), -EINVAL);
	assert_int_equal(dev_ioctl(&vm, KVM_RUN, 0), -ENOTTY);
	assert_int_equal(dev_ioctl(&vm, KVM_GET_REGS, 0), -ENOTTY);
	assert_int_equal(dev_ioctl(&vm, KVM_CREATE_VM, 0), -ENOTTY);
	assert_int_equal(dev_ioctl(&vm, KVM_GET_API_VERSION, 0), -ENOTTY);
	assert_int_equal(dev_ioctl(&vcpu, KVM_CREATE_VCPU, 0), -EINVAL);
	assert_int_equal(dev_ioctl(&vcpu, KVM_CHECK_EXTENSION, 0), -EINVAL);
}

static void system_values(void **state)
{
	(void)state;
	assert_int_equal(dev_ioctl(&kvm, KVM_GET_API_VERSION, 0), 12);
	assert_int_equal(dev_ioctl(&kvm, KVM_GET_API_VERSION, 1), -EINVAL);
	assert_int_equal(dev_ioctl(&kvm, KVM_GET_VCPU_MMAP_SIZE, 0), RUN_SIZE);
	assert_int_equal(dev_ioctl(&kvm, KVM_GET_VCPU_MMAP_SIZE, 1), -EINVAL);
	assert_int_equal(dev_ioctl(&kvm, KVM_CREATE_VM, 1ul << 40), -EINVAL);
	assert_int_equal(dev_ioctl(&kvm, KVM_CREATE_VM, -1ul), -EINVAL);
}

static void capabilities(void **state)
{
	static const struct {
		long cap;
		long want;
	} same[] = {
		{KVM_CAP_USER_MEMORY, 1},
		{KVM_CAP_USER_MEMORY2, 1},
		{KVM_CAP_NR_MEMSLOTS, 32764},
		{KVM_CAP_READONLY_MEM, 1},
		{KVM_CAP_SYNC_MMU, 1},
		{KVM_CAP_COALESCED_MMIO, 2},
		{KVM_CAP_COALESCED_PIO, 1},
		{KVM_CAP_IMMEDIATE_EXIT, 1},
		{KVM_CAP_SYNC_REGS, 7},
		{KVM_CAP_MAX_VCPUS, 1024},
		{KVM_CAP_MAX_VCPU_ID, 4096},
		{KVM_CAP_IRQCHIP, 1},
		{KVM_CAP_BINARY_STATS_FD, 1},
		{KVM_CAP_X86_MSR_FILTER, 1},
		{KVM_CAP_VM_TYPES, 3},
		{KVM_CAP_MEMORY_FAULT_INFO, 1},
		{KVM_CAP_XSAVE2, 4096},
		{KVM_CAP_GET_TSC_KHZ, 1},
		{KVM_CAP_VM_TSC_CONTROL, 1},
		{KVM_CAP_VCPU_ATTRIBUTES, 1},
		{KVM_CAP_MSR_PLATFORM_INFO, 1},
		{KVM_CAP_SET_GUEST_DEBUG, 1},
		{KVM_CAP_MCE, 32},
		{KVM_CAP_SET_GUEST_DEBUG2, 0x1f0003},
		{KVM_CAP_SMALLER_MAXPHYADDR, 0},
		{-1, 0},
		{1 << 20, 0},
		{LONG_MAX, 0},
		{LONG_MIN, 0},
	};

	(void)state;
	for (size_t i = 0; i < sizeof(same) / sizeof(same[0]); i++) {
		long s = dev_ioctl(&kvm, KVM_CHECK_EXTENSION, (unsigned long)same[i].cap);
		long v = dev_ioctl(&vm, KVM_CHECK_EXTENSION, (unsigned long)same[i].cap);

		if (s != same[i].want || v != same[i].want)
			fail_msg("capability %ld: %ld, %ld, expected %ld", same[i].cap, s, v,
				 same[i].want);
	}
	assert_int_equal(dev_ioctl(&kvm, KVM_CHECK_EXTENSION, KVM_CAP_NR_VCPUS),
			 sysconf(_SC_NPROCESSORS_ONLN));
}

static void vm_arguments(void **state)
{
	uint64_t zero = 0;

	(void)state;
	assert_int_equal(dev_ioctl(&vm, KVM_CREATE_VCPU, 4096), -EINVAL);
	assert_int_equal(dev_ioctl(&vm, KVM_CREATE_VCPU, 1ul << 32), -EINVAL);
	assert_int_equal(dev_ioctl(&vm, KVM_CREATE_VCPU, 0), -EEXIST);
	assert_int_equal(dev_ioctl(&vm, KVM_SET_TSS_ADDR, 0xffffe000), -EINVAL);
	assert_int_equal(dev_ioctl(&vm, KVM_SET_TSS_ADDR, 0xfffbd000), 0);
	assert_int_equal(dev_ioctl_p(&vm, KVM_SET_IDENTITY_MAP_ADDR, &zero), -EINVAL);
	assert_int_equal(dev_ioctl(&vm, KVM_SET_IDENTITY_MAP_ADDR, 0), -EINVAL);
	assert_int_equal(dev_ioctl_p(&empty_vm, KVM_SET_IDENTITY_MAP_ADDR, &zero), 0);
	assert_int_equal(dev_ioctl(&vm, KVM_SET_NR_MMU_PAGES, 63), -EINVAL);
	assert_int_equal(dev_ioctl(&vm, KVM_SET_NR_MMU_PAGES, 64), 0);
	assert_int_equal(dev_ioctl(&vm, KVM_GET_NR_MMU_PAGES, 0), -ENOTTY);
	assert_int_equal(dev_ioctl(&vm, KVM_SET_BOOT_CPU_ID, 0), -EBUSY);
	assert_int_equal(dev_ioctl(&empty_vm, KVM_SET_BOOT_CPU_ID, 4097), -EINVAL);
	assert_int_equal(dev_ioctl(&empty_vm, KVM_SET_BOOT_CPU_ID, 1ul << 32), -EINVAL);
	assert_int_equal(dev_ioctl(&empty_vm, KVM_SET_BOOT_CPU_ID, 1), 0);
	assert_int_equal(dev_ioctl(&vm, KVM_CREATE_IRQCHIP, 0), -EINVAL);
	assert_int_equal(dev_ioctl(&vm, KVM_RESET_DIRTY_RINGS, 0), -EINVAL);
	assert_int_equal(dev_ioctl(&vm, KVM_GET_PIT2, 0), -ENXIO);
	assert_int_equal(dev_ioctl(&vm, KVM_CREATE_PIT, 0), -ENOENT);
	assert_true(dev_ioctl(&vm, KVM_GET_TSC_KHZ, 0) > 0);
	assert_int_equal(dev_ioctl(&empty_vm, KVM_SET_TSC_KHZ, 0), 0);
}

static void irqchip_once(void **state)
{
	struct dev fresh = make_vm(&kvm), late;

	(void)state;
	assert_int_equal(dev_ioctl(&fresh, KVM_CREATE_IRQCHIP, 0), 0);
	assert_int_equal(dev_ioctl(&fresh, KVM_CREATE_IRQCHIP, 0), -EEXIST);
	late = make_vcpu(&fresh, 0);
	assert_int_equal(dev_ioctl(&fresh, KVM_CREATE_IRQCHIP, 0), -EEXIST);
	dev_close(&late);
	dev_close(&fresh);
}

static long enable(struct dev *d, uint32_t cap, uint32_t flags, uint64_t arg)
{
	struct kvm_enable_cap c = {.cap = cap, .flags = flags, .args = {arg}};

	return dev_ioctl_p(d, KVM_ENABLE_CAP, &c);
}

static void enable_cap(void **state)
{
	struct dev fresh = make_vm(&kvm);

	(void)state;
	assert_int_equal(enable(&vm, 9999, 0, 0), -EINVAL);
	assert_int_equal(enable(&vm, KVM_CAP_EXCEPTION_PAYLOAD, 1, 1), -EINVAL);
	assert_int_equal(enable(&vm, KVM_CAP_EXCEPTION_PAYLOAD, 0, 1), 0);
	assert_int_equal(enable(&vm, KVM_CAP_X86_USER_SPACE_MSR, 0, ~0ull), -EINVAL);
	assert_int_equal(enable(&vm, KVM_CAP_X86_USER_SPACE_MSR, 0, 7), 0);
	assert_int_equal(enable(&vm, KVM_CAP_EXIT_ON_EMULATION_FAILURE, 0, 2), -EINVAL);
	assert_int_equal(enable(&vm, KVM_CAP_EXIT_ON_EMULATION_FAILURE, 0, 1), 0);
	assert_int_equal(enable(&vm, KVM_CAP_DISABLE_QUIRKS2, 0, 1ull << 60), -EINVAL);
	assert_int_equal(enable(&vm, KVM_CAP_DISABLE_QUIRKS2, 0, KVM_X86_QUIRK_SLOT_ZAP_ALL), 0);
	assert_int_equal(enable(&vm, KVM_CAP_DISABLE_QUIRKS, 0, 1ull << 60), 0);
	/* Set for good when the first vCPU is made. */
	assert_int_equal(enable(&vm, KVM_CAP_MAX_VCPU_ID, 0, 4096), 0);
	assert_int_equal(enable(&vm, KVM_CAP_MAX_VCPU_ID, 0, 8), -EINVAL);
	assert_int_equal(dev_ioctl(&fresh, KVM_SET_BOOT_CPU_ID, 2), 0);
	assert_int_equal(enable(&fresh, KVM_CAP_MAX_VCPU_ID, 0, 4097), -EINVAL);
	assert_int_equal(enable(&fresh, KVM_CAP_MAX_VCPU_ID, 0, 1), -EINVAL);
	assert_int_equal(enable(&fresh, KVM_CAP_MAX_VCPU_ID, 0, 2), 0);
	assert_int_equal(enable(&fresh, KVM_CAP_MAX_VCPU_ID, 0, 3), -EINVAL);
	assert_int_equal(dev_ioctl(&fresh, KVM_CREATE_VCPU, 2), -EINVAL);
	assert_int_equal(enable(&vcpu, 9999, 0, 0), -EINVAL);
	/* Of the rings' size 32 bits are looked at. */
	assert_int_equal(enable(&fresh, KVM_CAP_DIRTY_LOG_RING, 0, 1ull << 40), -EINVAL);
	assert_int_equal(enable(&fresh, KVM_CAP_DIRTY_LOG_RING, 0, 1ull << 30), -E2BIG);
	dev_close(&fresh);
}

/* U1: each quirk that is advertised can be disabled; of the others only the old call takes notice.
 */
static void quirks(void **state)
{
	struct dev fresh = make_vm(&kvm);
	uint64_t all = (uint64_t)dev_ioctl(&kvm, KVM_CHECK_EXTENSION, KVM_CAP_DISABLE_QUIRKS2);

	(void)state;
	assert_int_equal(dev_ioctl(&fresh, KVM_CHECK_EXTENSION, KVM_CAP_DISABLE_QUIRKS2), all);
	if (!on_real_kvm())
		assert_int_equal(
			all,
			KVM_X86_QUIRK_LINT0_REENABLED | KVM_X86_QUIRK_LAPIC_MMIO_HOLE |
				KVM_X86_QUIRK_OUT_7E_INC_RIP | KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT |
				KVM_X86_QUIRK_FIX_HYPERCALL_INSN |
				KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS | KVM_X86_QUIRK_SLOT_ZAP_ALL);
	for (unsigned i = 0; i < 64; i++) {
		assert_int_equal(enable(&fresh, KVM_CAP_DISABLE_QUIRKS, 0, 1ull << i), 0);
		assert_int_equal(enable(&fresh, KVM_CAP_DISABLE_QUIRKS2, 0, 1ull << i),
				 all >> i & 1 ? 0 : -EINVAL);
	}
	assert_int_equal(enable(&fresh, KVM_CAP_DISABLE_QUIRKS2, 0, all), 0);
	assert_int_equal(enable(&fresh, KVM_CAP_DISABLE_QUIRKS2, 0, 0), 0);
	dev_close(&fresh);
}

static void memory_regions(void **state)
{
	struct kl_uapi_memory_region2 r = {0};

	(void)state;
	for (int bit = 2; bit < 32; bit++) {
		r.flags = 1u << bit;
		assert_int_equal(dev_ioctl_p(&vm, KVM_SET_USER_MEMORY_REGION, &r), -EINVAL);
		if (r.flags != KVM_MEM_GUEST_MEMFD || !on_real_kvm())
			assert_int_equal(dev_ioctl_p(&vm, KVM_SET_USER_MEMORY_REGION2, &r),
					 -EINVAL);
	}
	r.flags = 0;
	r.memory_size = 123;
	assert_int_equal(dev_ioctl_p(&vm, KVM_SET_USER_MEMORY_REGION, &r), -EINVAL);
	r.memory_size = KL_PAGE_SIZE;
	r.slot = 32764;
	assert_int_equal(dev_ioctl_p(&vm, KVM_SET_USER_MEMORY_REGION2, &r), -EINVAL);
	/* There is no such slot to delete. */
	r.slot = 0;
	r.memory_size = 0;
	assert_int_equal(dev_ioctl_p(&vm, KVM_SET_USER_MEMORY_REGION, &r), -EINVAL);
}

static void no_dirty_log(void **state)
{
	struct kvm_dirty_log log = {.slot = 5};
	struct kvm_clear_dirty_log clear = {.slot = 5, .num_pages = 64};

	(void)state;
	assert_int_equal(dev_ioctl_p(&vm, KVM_GET_DIRTY_LOG, &log), -ENOENT);
	assert_int_equal(dev_ioctl_p(&vm, KVM_CLEAR_DIRTY_LOG, &clear), -ENOENT);
	log.slot = clear.slot = 32764;
	assert_int_equal(dev_ioctl_p(&vm, KVM_GET_DIRTY_LOG, &log), -EINVAL);
	assert_int_equal(dev_ioctl_p(&vm, KVM_CLEAR_DIRTY_LOG, &clear), -EINVAL);
}

/* ---- counts ------------------------------------------------------------------------ */

static void msr_counts(void **state)
{
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry e[256];
	} * m;
	char *half = half_mapped();

	(void)state;
	m = calloc(1, sizeof(*m));
	for (struct dev *d = &kvm;; d = &vcpu) {
		m->head.nmsrs = 256;
		assert_int_equal(dev_ioctl_p(d, KVM_GET_MSRS, m), -E2BIG);
		m->head.nmsrs = UINT32_MAX;
		assert_int_equal(dev_ioctl_p(d, KVM_GET_MSRS, m), -E2BIG);
		m->head.nmsrs = 0;
		assert_int_equal(dev_ioctl_p(d, KVM_GET_MSRS, m), 0);
		/* The first that does not exist ends it. */
		m->head.nmsrs = 255;
		m->e[0].index = 0xdead0000;
		assert_int_equal(dev_ioctl_p(d, KVM_GET_MSRS, m), 0);
		((struct kvm_msrs *)(half + KL_PAGE_SIZE - 24))->nmsrs = 2;
		assert_int_equal(dev_ioctl_p(d, KVM_GET_MSRS, half + KL_PAGE_SIZE - 24), -EFAULT);
		if (d == &vcpu)
			break;
	}
	m->head.nmsrs = 256;
	assert_int_equal(dev_ioctl_p(&vcpu, KVM_SET_MSRS, m), -E2BIG);
	m->head.nmsrs = 1;
	assert_int_equal(dev_ioctl_p(&vcpu, KVM_SET_MSRS, m), 0);
	free(m);
	munmap(half, 2 * KL_PAGE_SIZE);
}

/* The program may read what is in the list of MSRs, of the system too, even if it is nothing there.
 */
static void constant_msrs(void **state)
{
	static const struct {
		uint32_t index;
		uint64_t val;
		bool ignored; /* what is written */
	} msrs[] = {
		{0x2c, 1 << 24, false},
		{0x11e, 0xbe702111, true},
		{0xc001001b, 0x20000000, true},
	};
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry e;
	} m = {.head.nmsrs = 1};

	(void)state;
	for (size_t i = 0; i < sizeof(msrs) / sizeof(msrs[0]); i++) {
		m.e.index = msrs[i].index;
		assert_int_equal(dev_ioctl_p(&vcpu, KVM_GET_MSRS, &m), 1);
		assert_int_equal(m.e.data, msrs[i].val);
		m.e.data = 5;
		assert_int_equal(dev_ioctl_p(&vcpu, KVM_SET_MSRS, &m), msrs[i].ignored);
		assert_int_equal(dev_ioctl_p(&vcpu, KVM_GET_MSRS, &m), 1);
		assert_int_equal(m.e.data, msrs[i].val);
		assert_int_equal(dev_ioctl_p(&kvm, KVM_GET_MSRS, &m), 0);
	}
	m.e.index = 0xc0000082;
	m.e.data = 5;
	assert_int_equal(dev_ioctl_p(&kvm, KVM_GET_MSRS, &m), 1);
	assert_int_equal(m.e.data, 0);
}

/* What KVM makes of events that cannot be. */
static void odd_events(void **state)
{
	struct kvm_guest_debug d = {.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_INJECT_DB};
	struct kvm_vcpu_events e = {.exception_payload = 0x1234};
	struct dev fresh = make_vm(&kvm), v = make_vcpu(&fresh, 0);

	(void)state;
	e.nmi.pending = 200;
	e.flags = KVM_VCPUEVENT_VALID_NMI_PENDING;
	assert_int_equal(dev_ioctl_p(&v, KVM_SET_VCPU_EVENTS, &e), 0);
	assert_int_equal(dev_ioctl_p(&v, KVM_GET_VCPU_EVENTS, &e), 0);
	assert_int_equal(e.nmi.pending, 2);
	assert_int_equal(e.exception_payload, 0x1234); /* kept, whatever it is for */
	/* Behind one that is handled one more waits. */
	e.nmi.masked = 1;
	assert_int_equal(dev_ioctl_p(&v, KVM_SET_VCPU_EVENTS, &e), 0);
	assert_int_equal(dev_ioctl(&v, KVM_NMI, 0), 0);
	assert_int_equal(dev_ioctl_p(&v, KVM_GET_VCPU_EVENTS, &e), 0);
	assert_int_equal(e.nmi.pending, 1);
	/* An exception that is being delivered gives way to the program's, a pending one does not.
	 */
	e.exception.injected = 1;
	e.exception.nr = 6;
	assert_int_equal(dev_ioctl_p(&v, KVM_SET_VCPU_EVENTS, &e), 0);
	assert_int_equal(dev_ioctl_p(&v, KVM_SET_GUEST_DEBUG, &d), 0);
	assert_int_equal(dev_ioctl_p(&v, KVM_SET_GUEST_DEBUG, &d), -EBUSY);
	dev_close(&v);
	dev_close(&fresh);
}

/* While the program steps, GET_REGS does not tell of TF. */
static void stepping_hides_tf(void **state)
{
	struct kvm_guest_debug d = {.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP};
	struct dev fresh = make_vm(&kvm), v = make_vcpu(&fresh, 0);
	struct kvm_regs r;

	(void)state;
	assert_int_equal(dev_ioctl_p(&v, KVM_GET_REGS, &r), 0);
	r.rflags |= 0x100;
	assert_int_equal(dev_ioctl_p(&v, KVM_SET_REGS, &r), 0);
	assert_int_equal(dev_ioctl_p(&v, KVM_GET_REGS, &r), 0);
	assert_int_equal(r.rflags & 0x100, 0x100);
	assert_int_equal(dev_ioctl_p(&v, KVM_SET_GUEST_DEBUG, &d), 0);
	assert_int_equal(dev_ioctl_p(&v, KVM_GET_REGS, &r), 0);
	assert_int_equal(r.rflags & 0x100, 0);
	dev_close(&v);
	dev_close(&fresh);
}

static void msr_lists(void **state)
{
	static const unsigned long cmds[] = {KVM_GET_MSR_INDEX_LIST,
					     KVM_GET_MSR_FEATURE_INDEX_LIST};
	char *half = half_mapped();

	(void)state;
	for (int i = 0; i < 2; i++) {
		struct kvm_msr_list none = {0}, *l;
		uint32_t *tail = (void *)(half + KL_PAGE_SIZE - 8);
		uint32_t n;

		assert_int_equal(dev_ioctl_p(&kvm, cmds[i], &none), -E2BIG);
		n = none.nmsrs;
		assert_true(n > 2);
		tail[0] = n;
		assert_int_equal(dev_ioctl_p(&kvm, cmds[i], tail), -EFAULT);
		l = malloc(sizeof(*l) + n * 4);
		l->nmsrs = n - 1;
		assert_int_equal(dev_ioctl_p(&kvm, cmds[i], l), -E2BIG);
		assert_int_equal(l->nmsrs, n);
		assert_int_equal(dev_ioctl_p(&kvm, cmds[i], l), 0);
		assert_int_equal(l->nmsrs, n);
		free(l);
	}
	munmap(half, 2 * KL_PAGE_SIZE);
}

static void cpuid_counts(void **state)
{
	struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 e[257];
	} *c = calloc(1, sizeof(*c));
	uint32_t n;

	(void)state;
	assert_int_equal(dev_ioctl_p(&kvm, KVM_GET_SUPPORTED_CPUID, c), -E2BIG);
	c->head.nent = 1;
	assert_int_equal(dev_ioctl_p(&kvm, KVM_GET_SUPPORTED_CPUID, c), -E2BIG);
	assert_int_equal(c->head.nent, 1);
	c->head.nent = UINT32_MAX;
	assert_int_equal(dev_ioctl_p(&kvm, KVM_GET_SUPPORTED_CPUID, c), 0);
	n = c->head.nent;
	assert_in_range(n, 2, 256);
	/* AMX without the kernel's permission. */
	c->e[0] = (struct kvm_cpuid_entry2){
		.function = 0xd, .flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX, .eax = 1u << 18};
	c->head.nent = 1;
	assert_int_equal(dev_ioctl_p(&vcpu, KVM_SET_CPUID2, c), -EPERM);
	c->head.nent = n;
	assert_int_equal(dev_ioctl_p(&kvm, KVM_GET_SUPPORTED_CPUID, c), 0);

	assert_int_equal(dev_ioctl_p(&vcpu, KVM_SET_CPUID2, c), 0);
	c->head.nent = n - 1;
	assert_int_equal(dev_ioctl_p(&vcpu, KVM_GET_CPUID2, c), -E2BIG);
	c->head.nent = 256;
	assert_int_equal(dev_ioctl_p(&vcpu, KVM_GET_CPUID2, c), 0);
	assert_int_equal(c->head.nent, n);
	c->head.nent = 257;
	assert_int_equal(dev_ioctl_p(&vcpu, KVM_SET_CPUID2, c), -E2BIG);
	assert_int_equal(dev_ioctl_p(&vcpu, KVM_SET_CPUID, c), -E2BIG);

	memset(c, 0, sizeof(*c));
	c->head.nent = 256;
	c->e[3].padding[1] = 1;
	assert_int_equal(dev_ioctl_p(&kvm, KVM_GET_EMULATED_CPUID, c), -EINVAL);
	c->e[3].padding[1] = 0;
	assert_int_equal(dev_ioctl_p(&kvm, KVM_GET_EMULATED_CPUID, c), 0);
	assert_true(c->head.nent > 0);
	free(c);
}

static void msr_filter(void **state)
{
	uint8_t bits[KL_MSR_FILTER_MAX_BITMAP] = {0};
	struct kvm_msr_filter f = {.flags = 2};

	(void)state;
	assert_int_equal(dev_ioctl_p(&vm, KVM_X86_SET_MSR_FILTER, &f), -EINVAL);
	f.flags = KVM_MSR_FILTER_DEFAULT_DENY;
	assert_int_equal(dev_ioctl_p(&vm, KVM_X86_SET_MSR_FILTER, &f), -EINVAL);
	f.ranges[15] = (struct kvm_msr_filter_range){.nmsrs = 8, .base = 0x10, .bitmap = bits};
	assert_int_equal(dev_ioctl_p(&vm, KVM_X86_SET_MSR_FILTER, &f), -EINVAL);
	f.ranges[15].flags = 4;
	assert_int_equal(dev_ioctl_p(&vm, KVM_X86_SET_MSR_FILTER, &f), -EINVAL);
	f.ranges[15].flags = KVM_MSR_FILTER_READ;
	assert_int_equal(dev_ioctl_p(&vm, KVM_X86_SET_MSR_FILTER, &f), 0);
	f.ranges[15].bitmap = NULL;
	assert_int_equal(dev_ioctl_p(&vm, KVM_X86_SET_MSR_FILTER, &f), -EFAULT);
	f.ranges[15].bitmap = bits;
	f.ranges[15].nmsrs = sizeof(bits) * 8;
	assert_int_equal(dev_ioctl_p(&vm, KVM_X86_SET_MSR_FILTER, &f), 0);
	f.ranges[15].nmsrs++;
	assert_int_equal(dev_ioctl_p(&vm, KVM_X86_SET_MSR_FILTER, &f), -EINVAL);
	f.ranges[15].nmsrs = UINT32_MAX;
	assert_int_equal(dev_ioctl_p(&vm, KVM_X86_SET_MSR_FILTER, &f), -EINVAL);
	memset(&f, 0, sizeof(f));
	assert_int_equal(dev_ioctl_p(&vm, KVM_X86_SET_MSR_FILTER, &f), 0);
}

static void signal_mask(void **state)
{
	struct {
		struct kvm_signal_mask head;
		uint64_t set;
	} __attribute__((packed)) m = {.head.len = 8};

	(void)state;
	assert_int_equal(dev_ioctl_p(&vcpu, KVM_SET_SIGNAL_MASK, &m), 0);
	m.head.len = 4;
	assert_int_equal(dev_ioctl_p(&vcpu, KVM_SET_SIGNAL_MASK, &m), -EINVAL);
	m.head.len = UINT32_MAX;
	assert_int_equal(dev_ioctl_p(&vcpu, KVM_SET_SIGNAL_MASK, &m), -EINVAL);
	assert_int_equal(dev_ioctl(&vcpu, KVM_SET_SIGNAL_MASK, 0), 0);
}

static void vcpu_arguments(void **state)
{
	struct kvm_interrupt irq = {.irq = 256};
	struct kvm_mp_state mp = {.mp_state = 77};
	struct kvm_translation tr = {.linear_address = 0x1234};
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry e;
	} m = {{.nmsrs = 1}, {.index = 0x12}};

	(void)state;
	assert_int_equal(dev_ioctl(&vcpu, KVM_RUN, 1), -EINVAL);
	assert_int_equal(dev_ioctl_p(&vcpu, KVM_INTERRUPT, &irq), -EINVAL);
	assert_int_equal(dev_ioctl_p(&vcpu, KVM_SET_MP_STATE, &mp), -EINVAL);
	mp.mp_state = KVM_MP_STATE_HALTED; /* there is no in-engine APIC */
	assert_int_equal(dev_ioctl_p(&vcpu, KVM_SET_MP_STATE, &mp), -EINVAL);
	assert_int_equal(dev_ioctl_p(&vcpu, KVM_TRANSLATE, &tr), 0);
	assert_int_equal(tr.valid, 1); /* no paging at reset */
	assert_int_equal(tr.physical_address, 0x1234);
	assert_int_equal(dev_ioctl(&vcpu, KVM_NMI, 0), 0);
	assert_true(dev_ioctl(&vcpu, KVM_GET_TSC_KHZ, 0) > 0);
	assert_int_equal(dev_ioctl(&vcpu, KVM_SET_TSC_KHZ, 0), 0);
	assert_int_equal(dev_ioctl(&vcpu, KVM_SET_TSC_KHZ, 0x7fffffff), -EINVAL);
	assert_int_equal(dev_ioctl(&vcpu, KVM_GET_LAPIC, 0), -EINVAL);
	assert_int_equal(dev_ioctl(&vcpu, KVM_KVMCLOCK_CTRL, 0), -EINVAL);
	/* A clock does not go across a page's end. */
	m.e.data = 0xff1;
	assert_int_equal(dev_ioctl_p(&vcpu, KVM_SET_MSRS, &m), 1);
	assert_int_equal(dev_ioctl(&vcpu, KVM_KVMCLOCK_CTRL, 0), -EINVAL);
	m.e.data = 0xfe1;
	assert_int_equal(dev_ioctl_p(&vcpu, KVM_SET_MSRS, &m), 1);
	assert_int_equal(dev_ioctl(&vcpu, KVM_KVMCLOCK_CTRL, 0), 0);
}

static void tsc_offset_attribute(void **state)
{
	uint64_t offset = 1ull << 50, got = 0;
	struct kvm_device_attr attr = {.group = KVM_VCPU_TSC_CTRL,
				       .attr = KVM_VCPU_TSC_OFFSET,
				       .addr = (uintptr_t)&offset};

	(void)state;
	assert_int_equal(dev_ioctl_p(&vcpu, KVM_HAS_DEVICE_ATTR, &attr), 0);
	assert_int_equal(dev_ioctl_p(&vcpu, KVM_SET_DEVICE_ATTR, &attr), 0);
	attr.addr = (uintptr_t)&got;
	assert_int_equal(dev_ioctl_p(&vcpu, KVM_GET_DEVICE_ATTR, &attr), 0);
	assert_int_equal(got, offset);
	attr.addr = 0;
	assert_int_equal(dev_ioctl_p(&vcpu, KVM_GET_DEVICE_ATTR, &attr), -EFAULT);
	assert_int_equal(dev_ioctl_p(&vcpu, KVM_SET_DEVICE_ATTR, &attr), -EFAULT);
	assert_int_equal(dev_ioctl(&vcpu, KVM_HAS_DEVICE_ATTR, 0), -EFAULT);
	attr.attr++;
	assert_int_equal(dev_ioctl_p(&vcpu, KVM_HAS_DEVICE_ATTR, &attr), -ENXIO);
	attr.group++;
	assert_int_equal(dev_ioctl_p(&vcpu, KVM_SET_DEVICE_ATTR, &attr), -ENXIO);
}

/* What CPUID leaf 0xD offers at most, from the system. */
static void xcr0_attribute(void **state)
{
	struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[100];
	} cpuid = {.head = {.nent = 100}};
	uint64_t got = 0, want = 0;
	struct kvm_device_attr attr = {.attr = KVM_X86_XCOMP_GUEST_SUPP, .addr = (uintptr_t)&got};

	(void)state;
	assert_int_equal(dev_ioctl_p(&kvm, KVM_GET_SUPPORTED_CPUID, &cpuid), 0);
	for (unsigned i = 0; i < cpuid.head.nent; i++)
		if (cpuid.entries[i].function == 0xd && !cpuid.entries[i].index)
			want = cpuid.entries[i].eax | (uint64_t)cpuid.entries[i].edx << 32;
	assert_int_equal(dev_ioctl(&kvm, KVM_CHECK_EXTENSION, KVM_CAP_SYS_ATTRIBUTES), 1);
	assert_int_equal(dev_ioctl_p(&kvm, KVM_HAS_DEVICE_ATTR, &attr), 0);
	assert_int_equal(got, 0);
	assert_int_equal(dev_ioctl_p(&kvm, KVM_GET_DEVICE_ATTR, &attr), 0);
	assert_int_equal(got, want);
	attr.addr = 0;
	assert_int_equal(dev_ioctl_p(&kvm, KVM_GET_DEVICE_ATTR, &attr), -EFAULT);
	assert_int_equal(dev_ioctl_p(&kvm, KVM_HAS_DEVICE_ATTR, &attr), 0);
	assert_int_equal(dev_ioctl(&kvm, KVM_HAS_DEVICE_ATTR, 0), -EFAULT);
	assert_int_equal(dev_ioctl_p(&kvm, KVM_SET_DEVICE_ATTR, &attr), -EINVAL);
	attr.attr++;
	assert_int_equal(dev_ioctl_p(&kvm, KVM_GET_DEVICE_ATTR, &attr), -ENXIO);
	attr.attr--;
	attr.group++;
	assert_int_equal(dev_ioctl_p(&kvm, KVM_HAS_DEVICE_ATTR, &attr), -ENXIO);
}

static void sync_regs(void **state)
{
	struct kvm_run *run = map_run(&vcpu);

	(void)state;
	run->immediate_exit = 1;
	assert_int_equal(dev_ioctl(&vcpu, KVM_RUN, 0), -EINTR);
	run->kvm_valid_regs = 8;
	assert_int_equal(dev_ioctl(&vcpu, KVM_RUN, 0), -EINVAL);
	run->kvm_valid_regs = 1ull << 63;
	assert_int_equal(dev_ioctl(&vcpu, KVM_RUN, 0), -EINVAL);
	run->kvm_valid_regs = 7;
	run->kvm_dirty_regs = 8;
	assert_int_equal(dev_ioctl(&vcpu, KVM_RUN, 0), -EINVAL);
	run->kvm_dirty_regs = 0;
	run->cr8 = 16;
	assert_int_equal(dev_ioctl(&vcpu, KVM_RUN, 0), -EINVAL);
	run->cr8 = 3;
	run->exit_reason = 0x77;
	assert_int_equal(dev_ioctl(&vcpu, KVM_RUN, 0), -EINTR);
	assert_int_equal(run->exit_reason, 0x77); /* immediate_exit is no exit */
	assert_int_equal(run->cr8, 3);
	assert_int_equal(run->s.regs.sregs.cr8, 3);
	assert_int_equal(run->apic_base, run->s.regs.sregs.apic_base);
	assert_int_equal(run->s.regs.regs.rflags, 2);
	assert_int_equal(run->if_flag, 0);
	run->s.regs.regs.rbx = 0xfeed;
	run->s.regs.sregs.cr2 = 0xbeef;
	run->kvm_dirty_regs = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;
	assert_int_equal(dev_ioctl(&vcpu, KVM_RUN, 0), -EINTR);
	assert_int_equal(run->kvm_dirty_regs, 0);
	assert_int_equal(run->s.regs.regs.rbx, 0xfeed);
	assert_int_equal(run->s.regs.sregs.cr2, 0xbeef);
	/* A refused set stays dirty. */
	run->s.regs.sregs.cr4 = ~0ull;
	run->kvm_dirty_regs = KVM_SYNC_X86_SREGS;
	assert_int_equal(dev_ioctl(&vcpu, KVM_RUN, 0), -EINVAL);
	assert_int_equal(run->kvm_dirty_regs, KVM_SYNC_X86_SREGS);
	run->kvm_dirty_regs = 0;
	run->s.regs.events.flags = 1u << 31;
	run->kvm_dirty_regs = KVM_SYNC_X86_EVENTS;
	assert_int_equal(dev_ioctl(&vcpu, KVM_RUN, 0), -EINVAL);
	run->kvm_dirty_regs = 0;
	run->kvm_valid_regs = 0;
	run->immediate_exit = 0;
	munmap(run, RUN_SIZE);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(bad_pointers),
		cmocka_unit_test(tight_pointers),
		cmocka_unit_test(misaligned_is_the_same),
		cmocka_unit_test(wrong_scope_or_unknown),
		cmocka_unit_test(system_values),
		cmocka_unit_test(capabilities),
		cmocka_unit_test(vm_arguments),
		cmocka_unit_test(irqchip_once),
		cmocka_unit_test(enable_cap),
		cmocka_unit_test(quirks),
		cmocka_unit_test(memory_regions),
		cmocka_unit_test(no_dirty_log),
		cmocka_unit_test(msr_counts),
		cmocka_unit_test(constant_msrs),
		cmocka_unit_test(odd_events),
		cmocka_unit_test(stepping_hides_tf),
		cmocka_unit_test(msr_lists),
		cmocka_unit_test(cpuid_counts),
		cmocka_unit_test(msr_filter),
		cmocka_unit_test(signal_mask),
		cmocka_unit_test(vcpu_arguments),
		cmocka_unit_test(tsc_offset_attribute),
		cmocka_unit_test(xcr0_attribute),
		cmocka_unit_test(sync_regs),
	};

	return cmocka_run_group_tests(tests, setup, teardown);
}
