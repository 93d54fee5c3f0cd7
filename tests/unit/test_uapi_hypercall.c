/* SPDX-License-Identifier: MIT */
/*
 * Hypercalls: what the guest gets, KVM_CAP_EXIT_HYPERCALL, and the quirk that patches the other
 * vendor's instruction (U1). With KVMLET_TEST_REAL=1 on the real /dev/kvm, if it uses VMX or SVM.
 */
#include <cpuid.h>

#include "uapi_guest.h"

#define HC_VAPIC_POLL_IRQ 1
#define HC_MAP_GPA_RANGE  12
#define EXIT_MASK         (1u << HC_MAP_GPA_RANGE)
#define INSN_LEN          3

static struct guest g;

static const uint8_t vmcall[] = {0x0f, 0x01, 0xc1}, vmmcall[] = {0x0f, 0x01, 0xd9};

static bool on_intel(void)
{
	unsigned a, b, c, d;

	__cpuid(0, a, b, c, d);
	return b == 0x756e6547;
}

static const uint8_t *native(void)
{
	return on_intel() ? vmcall : vmmcall;
}

static const uint8_t *foreign(void)
{
	return on_intel() ? vmmcall : vmcall;
}

static int setup(void **state)
{
	(void)state;
	guest_make(&g, false);
	return 0;
}

static int teardown(void **state)
{
	(void)state;
	guest_free(&g);
	return 0;
}

static long enable(uint32_t cap, uint64_t arg)
{
	struct kvm_enable_cap c = {.cap = cap, .args = {arg}};

	return dev_ioctl_p(&g.vm, KVM_ENABLE_CAP, &c);
}

/* The hypercall @insn, then HLT. */
static void load(const uint8_t *insn)
{
	memcpy(g.ram + CODE, insn, INSN_LEN);
	g.ram[CODE + INSN_LEN] = 0xf4;
}

static void set_args(uint64_t nr, uint64_t a0, uint64_t a1, uint64_t a2)
{
	struct kvm_regs r = guest_get(&g);

	r.rax = nr;
	r.rbx = a0;
	r.rcx = a1;
	r.rdx = a2;
	r.rip = CODE;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &r), 0);
}

/* What the guest finds in RAX when the program is not asked. */
static uint64_t call(uint64_t nr, uint64_t a0, uint64_t a1, uint64_t a2)
{
	set_args(nr, a0, a1, a2);
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(guest_get(&g).rip, CODE + INSN_LEN + 1);
	return guest_get(&g).rax;
}

/* U1: the capability's mask, and what may be enabled. */
static void capability(void **state)
{
	(void)state;
	assert_int_equal(dev_ioctl(&g.vm, KVM_CHECK_EXTENSION, KVM_CAP_EXIT_HYPERCALL), EXIT_MASK);
	assert_int_equal(enable(KVM_CAP_EXIT_HYPERCALL, EXIT_MASK | 1), -EINVAL);
	assert_int_equal(enable(KVM_CAP_EXIT_HYPERCALL, 1ull << 40), -EINVAL);
	assert_int_equal(enable(KVM_CAP_EXIT_HYPERCALL, EXIT_MASK), 0);
	assert_int_equal(enable(KVM_CAP_EXIT_HYPERCALL, 0), 0);
}

/* U1: results that the program does not see. */
static void answered_by_the_engine(void **state)
{
	(void)state;
	load(native());
	assert_int_equal(call(HC_VAPIC_POLL_IRQ, 0, 0, 0), 0);
	assert_int_equal(call(999, 0, 0, 0), (uint32_t)-1000);
	/* Not enabled: before its arguments are looked at. */
	assert_int_equal(call(HC_MAP_GPA_RANGE, 1, 0, 0), (uint32_t)-1000);
	assert_int_equal(enable(KVM_CAP_EXIT_HYPERCALL, EXIT_MASK), 0);
	assert_int_equal(call(HC_MAP_GPA_RANGE, 0x1001, 1, 0), (uint32_t)-22);
	assert_int_equal(call(HC_MAP_GPA_RANGE, 0x1000, 0, 0), (uint32_t)-22);
	assert_int_equal(enable(KVM_CAP_EXIT_HYPERCALL, 0), 0);
	assert_int_equal(call(HC_MAP_GPA_RANGE, 0x1000, 1, 0), (uint32_t)-1000);

	guest_long_mode(&g, 0);
	load(native());
	assert_int_equal(enable(KVM_CAP_EXIT_HYPERCALL, EXIT_MASK), 0);
	assert_int_equal(call(999, 0, 0, 0), (uint64_t)-1000);
	assert_int_equal(call(HC_MAP_GPA_RANGE | 1ull << 32, 0x1000, 1, 0), (uint64_t)-1000);
}

/* U1: the range may not wrap, but may be larger than any guest. */
static void range_checks(void **state)
{
	(void)state;
	guest_long_mode(&g, 0);
	load(native());
	assert_int_equal(enable(KVM_CAP_EXIT_HYPERCALL, EXIT_MASK), 0);
	assert_int_equal(call(HC_MAP_GPA_RANGE, 0x1000, ~0ull, 0), (uint64_t)-22);
	assert_int_equal(call(HC_MAP_GPA_RANGE, ~0xfffull, -((~0xfffull) >> 12), 0), (uint64_t)-22);
	set_args(HC_MAP_GPA_RANGE, ~0xfffull, 1, 0);
	assert_exit(&g, KVM_EXIT_HYPERCALL);
}

/* U1: the exit's fields, and its answer at the next KVM_RUN, with immediate_exit too. */
static void exit_and_answer(void **state)
{
	struct kvm_regs r;

	(void)state;
	guest_long_mode(&g, 0);
	load(native());
	assert_int_equal(enable(KVM_CAP_EXIT_HYPERCALL, EXIT_MASK), 0);
	set_args(HC_MAP_GPA_RANGE, 0x123456000, 1ull << 33, 0x10);
	memset(&g.run->hypercall, 0xa5, sizeof(g.run->hypercall));
	assert_exit(&g, KVM_EXIT_HYPERCALL);
	assert_int_equal(g.run->hypercall.nr, HC_MAP_GPA_RANGE);
	assert_int_equal(g.run->hypercall.args[0], 0x123456000);
	assert_int_equal(g.run->hypercall.args[1], 1ull << 33);
	assert_int_equal(g.run->hypercall.args[2], 0x10);
	assert_int_equal(g.run->hypercall.longmode, 1);
	assert_int_equal(g.run->hypercall.pad, 0);
	assert_int_equal(guest_get(&g).rip, CODE);
	g.run->hypercall.ret = 0x8877665544332211;
	g.run->immediate_exit = 1;
	assert_int_equal(guest_run(&g), -EINTR);
	r = guest_get(&g);
	assert_int_equal(r.rax, 0x8877665544332211);
	assert_int_equal(r.rip, CODE + INSN_LEN);
	g.run->hypercall.ret = 1; /* taken once */
	assert_int_equal(guest_run(&g), -EINTR);
	assert_int_equal(guest_get(&g).rax, 0x8877665544332211);
	g.run->immediate_exit = 0;
	assert_exit(&g, KVM_EXIT_HLT);
}

/* U1: outside 64-bit code arguments and result have 32 bits. */
static void exit_of_16_bit_code(void **state)
{
	(void)state;
	load(native());
	assert_int_equal(enable(KVM_CAP_EXIT_HYPERCALL, EXIT_MASK), 0);
	set_args(HC_MAP_GPA_RANGE, 0x9999999900005000, 0x9999999900000002, ~0ull);
	assert_exit(&g, KVM_EXIT_HYPERCALL);
	assert_int_equal(g.run->hypercall.args[0], 0x5000);
	assert_int_equal(g.run->hypercall.args[1], 2);
	assert_int_equal(g.run->hypercall.args[2], ~0u);
	assert_int_equal(g.run->hypercall.longmode, 0);
	g.run->hypercall.ret = 0xffffffff00000005;
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(guest_get(&g).rax, 5);
}

/* U1: user code may not, whatever is enabled. */
static void user_code(void **state)
{
	struct kvm_regs r;

	(void)state;
	guest_long_mode(&g, 3);
	load(native());
	memcpy(g.ram + CODE + INSN_LEN, (uint8_t[]){0xc6, 0x04, 0x25, 0, 0, 0x10, 0, 1}, 8);
	assert_int_equal(enable(KVM_CAP_EXIT_HYPERCALL, EXIT_MASK), 0);
	set_args(HC_MAP_GPA_RANGE, 0x1000, 1, 0);
	assert_exit(&g, KVM_EXIT_MMIO); /* movb $1, MMIO */
	r = guest_get(&g);
	assert_int_equal(r.rax, (uint64_t)-1);
}

/* U1: the other vendor's instruction becomes this one's, in guest memory. */
static void foreign_instruction_is_patched(void **state)
{
	(void)state;
	if (!on_intel()) { /* VMMCALL is #UD in real mode */
		load(foreign());
		assert_int_equal(call(HC_VAPIC_POLL_IRQ, 0, 0, 0), 0);
		assert_memory_equal(g.ram + CODE, vmmcall, INSN_LEN);
	}
	guest_long_mode(&g, 0);
	load(foreign());
	assert_int_equal(call(HC_VAPIC_POLL_IRQ, 0, 0, 0), 0);
	assert_memory_equal(g.ram + CODE, native(), INSN_LEN);
}

/* Runs into the IDT's absence: a triple fault tells #UD, #GP or #PF from success. */
static void assert_faults(void)
{
	assert_exit(&g, KVM_EXIT_SHUTDOWN);
	assert_memory_equal(g.ram + CODE, foreign(), INSN_LEN);
}

/* U1: with the quirk disabled it is #UD, and memory stays as it is. */
static void quirk_disabled(void **state)
{
	(void)state;
	assert_true(dev_ioctl(&g.vm, KVM_CHECK_EXTENSION, KVM_CAP_DISABLE_QUIRKS2) &
		    KVM_X86_QUIRK_FIX_HYPERCALL_INSN);
	assert_int_equal(enable(KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_FIX_HYPERCALL_INSN), 0);
	/* Real mode: vector 6 goes to a HLT of its own. */
	set_vector(&g, 6, 0x600);
	g.ram[0x600] = 0xf4;
	load(foreign());
	set_args(HC_VAPIC_POLL_IRQ, 0, 0, 0);
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(guest_get(&g).rip, 0x601);
	assert_memory_equal(g.ram + CODE, foreign(), INSN_LEN);
}

/* U1: the patch is a store with the guest's rights: read-only code faults, as in KVM. */
static void patch_needs_write_access(void **state)
{
	struct kvm_sregs s;

	(void)state;
	guest_long_mode(&g, 0);
	load(foreign());
	guest_table(&g, PD)[0] &= ~2ull;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_SREGS, &s), 0);
	s.cr0 |= 1 << 16;
	s.idt.limit = 0;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_SREGS, &s), 0);
	set_args(HC_VAPIC_POLL_IRQ, 0, 0, 0);
	assert_faults();
}

/* U1: VMCALL is for CPL 0 where it is patched; VMMCALL is patched at any privilege. */
static void patch_by_user_code(void **state)
{
	struct kvm_sregs s;

	(void)state;
	guest_long_mode(&g, 3);
	load(foreign());
	memcpy(g.ram + CODE + INSN_LEN, (uint8_t[]){0xc6, 0x04, 0x25, 0, 0, 0x10, 0, 1}, 8);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_SREGS, &s), 0);
	s.idt.limit = 0;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_SREGS, &s), 0);
	set_args(HC_VAPIC_POLL_IRQ, 0, 0, 0);
	if (!on_intel()) {
		assert_faults();
		return;
	}
	assert_exit(&g, KVM_EXIT_MMIO);
	assert_memory_equal(g.ram + CODE, vmcall, INSN_LEN);
}

/* M3: in a read-only slot the patch is an MMIO write, time after time, as in KVM. */
static void patch_in_rom(void **state)
{
	uint8_t *rom = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct kvm_regs r;

	(void)state;
	assert_true(rom != MAP_FAILED);
	memcpy(rom + 8, foreign(), INSN_LEN);
	assert_int_equal(set_slot(&g, 1, KVM_MEM_READONLY, MMIO, 4096, rom), 0);
	guest_long_mode(&g, 0);
	r = guest_get(&g);
	r.rip = MMIO + 8;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &r), 0);
	for (int i = 0; i < 3; i++) {
		assert_exit(&g, KVM_EXIT_MMIO);
		assert_int_equal(g.run->mmio.is_write, 1);
		assert_int_equal(g.run->mmio.phys_addr, MMIO + 8);
		assert_int_equal(g.run->mmio.len, INSN_LEN);
		assert_memory_equal(g.run->mmio.data, native(), INSN_LEN);
		assert_int_equal(guest_get(&g).rip, MMIO + 8);
	}
	assert_memory_equal(rom + 8, foreign(), INSN_LEN);
	munmap(rom, 4096);
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(capability),
		T(answered_by_the_engine),
		T(range_checks),
		T(exit_and_answer),
		T(exit_of_16_bit_code),
		T(user_code),
		T(foreign_instruction_is_patched),
		T(quirk_disabled),
		T(patch_needs_write_access),
		T(patch_by_user_code),
		T(patch_in_rom),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
