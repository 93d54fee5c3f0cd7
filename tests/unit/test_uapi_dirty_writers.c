/* SPDX-License-Identifier: MIT */
/*
 * What the engine itself writes into a guest's memory is in the dirty log (D3): a test for each
 * writer, with a bitmap, and with rings, where the vCPU's ring has it. What guests store is in
 * uapi_dirty, what the library writes in api_race and museum/test_gpc.
 */
#include "xen_guest.h"

#define PAGE        KL_PAGE_SIZE
#define SLOT        0x200000ul
#define PAGES       64u
#define WALL_CLOCK  0x4b564d00
#define SYSTEM_TIME 0x4b564d01
#define STEAL_TIME  0x4b564d03
#define BYTES       (256 * sizeof(struct kvm_dirty_gfn))

static struct guest g;
static uint8_t *mem;
static struct kvm_dirty_gfn *ring; /* NULL: a bitmap */
static uint32_t next;

static void make_slot(void)
{
	mem = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	assert_true(mem != MAP_FAILED);
	assert_int_equal(set_slot(&g, 1, KVM_MEM_LOG_DIRTY_PAGES, SLOT, PAGES * PAGE, mem), 0);
}

static int setup(void **state)
{
	(void)state;
	guest_make(&g, false);
	make_slot();
	return 0;
}

static int setup_ring(void **state)
{
	struct kvm_enable_cap cap = {.cap = KVM_CAP_DIRTY_LOG_RING, .args = {BYTES}};

	(void)state;
	guest_make_vm(&g);
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_ENABLE_CAP, &cap), 0);
	guest_make_rest(&g);
	next = 0;
	ring = map_vcpu(&g.vcpu, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED,
			KVM_DIRTY_LOG_PAGE_OFFSET * PAGE);
	assert_true(ring != MAP_FAILED);
	make_slot();
	return 0;
}

static int setup_xen(void **state)
{
	(void)state;
	xen_make(&g);
	make_slot();
	return 0;
}

static int teardown(void **state)
{
	(void)state;
	if (ring)
		munmap(ring, BYTES);
	ring = NULL;
	guest_free(&g);
	return munmap(mem, PAGES * PAGE);
}

/* The pages that were written since the last call. */
static uint64_t taken(void)
{
	uint64_t bits = 0;

	if (!ring) {
		struct kvm_dirty_log log = {.slot = 1, .dirty_bitmap = &bits};

		assert_int_equal(dev_ioctl_p(&g.vm, KVM_GET_DIRTY_LOG, &log), 0);
		return bits;
	}
	for (; ring[next].flags == KVM_DIRTY_GFN_F_DIRTY; next++) {
		bits |= 1ull << ring[next].offset;
		ring[next].flags = KVM_DIRTY_GFN_F_RESET;
	}
	assert_true(dev_ioctl(&g.vm, KVM_RESET_DIRTY_RINGS, 0) >= 0);
	return bits;
}

static void run(void)
{
	guest_code(&g, 0xe6, DONE, 0xeb, 0xfc); /* 1: out; jmp 1b */
	assert_exit(&g, KVM_EXIT_IO);
}

/* D3, X3: kvmclock and the wall clock. */
static void clocks(void **state)
{
	struct kvm_clock_data d = {.clock = 1000000000000};

	(void)state;
	assert_int_equal(guest_set_msr(&g, SYSTEM_TIME, (SLOT + 3 * PAGE) | 1), 1);
	assert_int_equal(guest_set_msr(&g, WALL_CLOCK, SLOT + 4 * PAGE), 1);
	run();
	assert_int_equal(taken(), 1 << 3 | 1 << 4);
	run();
	assert_int_equal(taken(), 0);
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_CLOCK, &d), 0);
	run();
	assert_int_equal(taken(), 1 << 3);
	/* Of a vCPU that was stopped. */
	assert_int_equal(dev_ioctl(&g.vcpu, KVM_KVMCLOCK_CTRL, 0), 0);
	run();
	assert_int_equal(taken(), 1 << 3);
}

/* D3, X3: steal time, where the host has it. */
static void steal_time(void **state)
{
	(void)state;
	if (guest_set_msr(&g, STEAL_TIME, (SLOT + 5 * PAGE) | 1) != 1)
		return;
	for (int i = 0; i < 3; i++) {
		run();
		assert_int_equal(taken(), 1 << 5);
	}
	assert_int_equal(guest_set_msr(&g, STEAL_TIME, 0), 1);
	(void)taken();
	run();
	assert_int_equal(taken(), 0);
}

/* D3, M9: the accessed bit of a segment descriptor. */
static void descriptor(void **state)
{
	/* mov $0x10, %eax; mov %eax, %ds; hlt */
	static const uint8_t code[] = {0xb8, 0x10, 0, 0, 0, 0x8e, 0xd8, 0xf4};
	uint64_t *gdt = (void *)(mem + 6 * PAGE);
	struct kvm_sregs s;

	(void)state;
	guest_long_mode(&g, 0);
	memcpy(g.ram + CODE, code, sizeof(code));
	gdt[2] = 0x00cf92000000ffff;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_SREGS, &s), 0);
	s.gdt.base = SLOT + 6 * PAGE;
	s.gdt.limit = 0xff;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_SREGS, &s), 0);
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(gdt[2], 0x00cf93000000ffff);
	assert_int_equal(taken(), 1 << 6);
}

/* D3, X1: Xen's pages, but for shared_info and vcpu_info, which KVM does not log either. */
static void xen_pages(void **state)
{
	(void)state;
	assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO, SLOT + 7 * PAGE),
			 0);
	run();
	assert_true(taken() & 1 << 7);
	if (xen_has_runstate(&g)) {
		/* On two pages. */
		assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR,
					      SLOT + 9 * PAGE - 16),
				 0);
		run();
		assert_int_equal(taken() & 3 << 8, 3 << 8);
	}
}

/* D3, X1: the hypercall page. */
static void hypercall_page(void **state)
{
	/* wrmsr; out */
	static const uint8_t code[] = {0x0f, 0x30, 0xe6, DONE};
	struct kvm_regs r;

	(void)state;
	guest_long_mode(&g, 0);
	memcpy(g.ram + CODE, code, sizeof(code));
	r = guest_get(&g);
	r.rcx = HCALL_MSR;
	r.rax = SLOT + 11 * PAGE;
	r.rdx = 0;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &r), 0);
	assert_int_equal(taken(), 0);
	assert_exit(&g, KVM_EXIT_IO);
	assert_int_equal(taken(), 1 << 11);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
#define R(f) {"rings_" #f, f, setup_ring, teardown, NULL}
#define X(f) cmocka_unit_test_setup_teardown(f, setup_xen, teardown)
		T(clocks),     T(steal_time), T(descriptor), R(clocks),
		R(steal_time), R(descriptor), X(xen_pages),  X(hypercall_page),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
