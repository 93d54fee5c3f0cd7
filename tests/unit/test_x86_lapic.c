/* SPDX-License-Identifier: MIT */
/*
 * The local APIC: registers in both modes, priorities, whom messages reach, INIT and SIPI, the
 * timer, and that nothing sent is lost whatever the vCPU is doing.
 */
#include <pthread.h>

#include "base/racepoint.h"
#include "host/sys.h"
#include "x86_env.h"
#include "x86/lapic_state.h"

#define TIMEOUT  60000
#define BASE     0xfee00000ul
#define NR_APS   4
#define X2APIC   0xfee00c00ul
#define ENABLED  0x1ffu
#define MS       1000000ull
#define MSR(reg) (0x800u + ((reg) >> 4))

static struct kl_vcpu *ap[NR_APS];
static unsigned nr_aps;

static int setup(void **state)
{
	nr_aps = 0;
	return env_setup_apic(state);
}

static int teardown(void **state)
{
	for (unsigned i = 0; i < nr_aps; i++)
		kl_x86_vcpu_destroy(ap[i]);
	return env_teardown(state);
}

static struct kl_vcpu *add_ap(struct env *e, unsigned id)
{
	struct kvm_cpuid_entry2 cpuid[100];
	int n = kl_x86_supported_cpuid(cpuid, 100);

	assert_int_equal(kl_x86_vcpu_create(e->vm, id, &ap[nr_aps]), 0);
	assert_int_equal(kl_x86_set_cpuid(ap[nr_aps], cpuid, (unsigned)n), 0);
	return ap[nr_aps++];
}

static uint32_t get(struct kl_vcpu *v, unsigned reg)
{
	uint32_t val = 0xdeadbeef;

	assert_int_equal(kl_apic_mmio(v, BASE + reg, 4, &val, false), 0);
	return val;
}

static void set(struct kl_vcpu *v, unsigned reg, uint32_t val)
{
	assert_int_equal(kl_apic_mmio(v, BASE + reg, 4, &val, true), 0);
}

static int rdmsr(struct kl_vcpu *v, uint32_t index, uint64_t *val)
{
	return kl_x86_get_msr(v, index, val);
}

static void x2apic(struct kl_vcpu *v)
{
	uint64_t bsp = v->apic_base & KL_APIC_BASE_BSP;

	assert_int_equal(kl_x86_set_msr(v, 0x1b, X2APIC | bsp), 0);
}

/* ---- registers ---- */

static void reset_state(void **state)
{
	struct env *e = *state;
	struct kvm_lapic_state s;
	struct kl_vcpu *v = add_ap(e, 3);

	kl_apic_get_state(e->v, &s);
	for (unsigned reg = 0; reg < 0x400; reg += 16) {
		uint32_t want = 0, val;

		memcpy(&val, s.regs + reg, 4);
		if (reg == APIC_LVR)
			want = 0x01050014; /* directed EOI: the I/O APIC is the program's */
		else if (reg == APIC_DFR)
			want = 0xffffffff;
		else if (reg == APIC_SPIV)
			want = 0xff;
		else if (reg == APIC_LVT0)
			want = 0x700; /* ExtINT, unmasked: a quirk */
		else if (reg >= APIC_LVTT && reg <= APIC_LVTERR)
			want = LVT_MASKED;
		assert_int_equal(val, want);
	}
	assert_int_equal(get(v, APIC_ID), 3u << 24);
	assert_int_equal(get(v, APIC_LVT0), LVT_MASKED);
	assert_int_equal(e->v->apic_base, 0xfee00900);
	assert_int_equal(v->apic_base, 0xfee00800);
	assert_int_equal(v->mp_state, KVM_MP_STATE_UNINITIALIZED);
	assert_int_equal(e->v->mp_state, KVM_MP_STATE_RUNNABLE);
}

static void lint0_quirk(void **state)
{
	struct env *e = *state;

	e->vm->disabled_quirks |= KL_QUIRK_LINT0_REENABLED;
	kl_x86_reset(e->v, false);
	assert_int_equal(get(e->v, APIC_LVT0), LVT_MASKED);
}

/* What can be written, and what of it stays. */
static void writable_bits(void **state)
{
	static const struct {
		unsigned reg;
		uint32_t stays;
	} regs[] = {
		{APIC_ID, 0xff000000},  {APIC_TPR, 0xff},        {APIC_LDR, 0xff000000},
		{APIC_DFR, 0xffffffff}, {APIC_SPIV, 0x13ff},     {APIC_ICR2, 0xff000000},
		{APIC_LVTT, 0x710ff},   {APIC_LVTTHMR, 0x117ff}, {APIC_LVTPC, 0x117ff},
		{APIC_LVT0, 0x1f7ff},   {APIC_LVT1, 0x1f7ff},    {APIC_LVTERR, 0x110ff},
		{APIC_TDCR, 0xb},       {APIC_LVR, 0x01050014},  {APIC_EOI, 0},
		{APIC_ISR, 0},          {APIC_IRR + 0x30, 0},    {APIC_TMR, 0},
		{APIC_ESR, 0},          {APIC_ARBPRI, 0},        {APIC_LVTCMCI, 0},
	};
	struct kl_vcpu *v = ((struct env *)*state)->v;

	v->has_tsc_deadline = true;
	kl_apic_cpuid_changed(v);
	set(v, APIC_SPIV, ENABLED);
	for (unsigned i = 0; i < KL_ARRAY_SIZE(regs); i++) {
		uint32_t val = 0;

		set(v, regs[i].reg, 0xffffffff);
		kl_apic_mmio(v, BASE + regs[i].reg, 4, &val, false);
		assert_int_equal(val, regs[i].stays);
		if (regs[i].reg == APIC_SPIV)
			set(v, APIC_SPIV, ENABLED);
	}
	/* With CMCI in MCG_CAP there is one more entry. */
	kl_apic_set_cmci(v, true);
	assert_int_equal(get(v, APIC_LVR), 0x01060014);
	assert_int_equal(get(v, APIC_LVTCMCI), LVT_MASKED);
	set(v, APIC_LVTCMCI, 0xffffffff);
	assert_int_equal(get(v, APIC_LVTCMCI), 0x117ff);
	kl_apic_set_cmci(v, false);
	assert_int_equal(get(v, APIC_LVR), 0x01050014);
}

static void mmio_access_sizes(void **state)
{
	struct kl_vcpu *v = ((struct env *)*state)->v;
	uint8_t bytes[8] = {0};
	uint32_t val = 0x12345678;

	set(v, APIC_LDR, 0xab000000);
	/* Parts of a register can be read, not written; nothing spans two. */
	assert_int_equal(kl_apic_mmio(v, BASE + APIC_LDR + 3, 1, bytes, false), 0);
	assert_int_equal(bytes[0], 0xab);
	assert_int_equal(kl_apic_mmio(v, BASE + APIC_LDR + 2, 2, bytes, false), 0);
	assert_int_equal(bytes[1], 0xab);
	memset(bytes, 0, sizeof(bytes));
	assert_int_equal(kl_apic_mmio(v, BASE + APIC_LDR, 8, bytes, false), 0);
	assert_int_equal(kl_apic_mmio(v, BASE + APIC_LDR + 1, 4, bytes, false), 0);
	assert_int_equal(bytes[3], 0);
	assert_int_equal(kl_apic_mmio(v, BASE + APIC_LDR, 2, &val, true), 0);
	assert_int_equal(kl_apic_mmio(v, BASE + APIC_LDR + 4, 4, &val, true), 0);
	assert_int_equal(get(v, APIC_LDR), 0xab000000);
	/* The page, and no more. */
	assert_int_equal(kl_apic_mmio(v, BASE + 0xffc, 4, &val, true), 0);
	assert_int_equal(kl_apic_mmio(v, BASE + 0x1000, 4, &val, true), -EOPNOTSUPP);
	assert_int_equal(kl_apic_mmio(v, BASE - 4, 4, &val, false), -EOPNOTSUPP);
	assert_int_equal(kl_x86_set_msr(v, 0x1b, 0x12345900), 0);
	assert_int_equal(kl_apic_mmio(v, BASE, 4, &val, false), -EOPNOTSUPP);
	assert_int_equal(kl_apic_mmio(v, 0x12345000 + APIC_LDR, 4, &val, false), 0);
	assert_int_equal(val, 0xab000000);
}

/* Where no APIC answers, writes vanish and reads are all ones; that is a quirk, too. */
static void mmio_hole(void **state)
{
	struct env *e = *state;
	uint32_t val = 0;

	for (unsigned i = 0; i < 2; i++) {
		assert_int_equal(kl_x86_set_msr(e->v, 0x1b, i ? 0xfee00100 : 0xfee00d00), 0);
		set(e->v, APIC_TPR, 0x55);
		assert_int_equal(get(e->v, APIC_TPR), 0xffffffff);
		e->vm->disabled_quirks |= KL_QUIRK_LAPIC_MMIO_HOLE;
		assert_int_equal(kl_apic_mmio(e->v, BASE, 4, &val, false), -EOPNOTSUPP);
		assert_int_equal(kl_apic_mmio(e->v, BASE, 4, &val, true), -EOPNOTSUPP);
		e->vm->disabled_quirks = 0;
	}
	assert_int_equal(kl_x86_set_msr(e->v, 0x1b, 0xfee00900), 0);
	assert_int_equal(get(e->v, APIC_TPR), 0);
}

static void x2apic_registers(void **state)
{
	struct kl_vcpu *v = add_ap(*state, 0x123);
	uint64_t val;

	/* Not in this mode. */
	assert_int_equal(rdmsr(v, MSR(APIC_ID), &val), -EINVAL);
	assert_int_equal(kl_x86_set_msr(v, MSR(APIC_TPR), 0), -EINVAL);
	assert_int_equal(get(v, APIC_ID), 0x23u << 24);
	x2apic(v);
	assert_int_equal(rdmsr(v, MSR(APIC_ID), &val), 0);
	assert_int_equal(val, 0x123);
	assert_int_equal(rdmsr(v, MSR(APIC_LDR), &val), 0);
	assert_int_equal(val, 0x120008);
	for (unsigned i = 0; i < 0x100; i++) {
		static const uint8_t none[] = {0x00, 0x01, 0x04, 0x05, 0x06, 0x07, 0x09, 0x0b,
					       0x0c, 0x0e, 0x29, 0x2a, 0x2b, 0x2c, 0x2d, 0x2e,
					       0x2f, 0x31, 0x3a, 0x3b, 0x3c, 0x3d, 0x3f};
		bool there = i < 0x40 && !memchr(none, (int)i, sizeof(none));

		assert_int_equal(rdmsr(v, 0x800 + i, &val), there ? 0 : -EINVAL);
	}
	/* Read-only, reserved bits, upper halves. */
	assert_int_equal(kl_x86_set_msr(v, MSR(APIC_ID), 0x123), -EINVAL);
	assert_int_equal(kl_x86_set_msr(v, MSR(APIC_LDR), 0x120008), -EINVAL);
	assert_int_equal(kl_x86_set_msr(v, MSR(APIC_DFR), ~0u), -EINVAL);
	assert_int_equal(kl_x86_set_msr(v, MSR(APIC_ICR2), 0), -EINVAL);
	assert_int_equal(kl_x86_set_msr(v, MSR(APIC_ESR), 1), -EINVAL);
	assert_int_equal(kl_x86_set_msr(v, MSR(APIC_ESR), 0), 0);
	assert_int_equal(kl_x86_set_msr(v, MSR(APIC_TPR), 1ull << 32), -EINVAL);
	assert_int_equal(kl_x86_set_msr(v, MSR(APIC_SELF_IPI), 0x100), -EINVAL);
	assert_int_equal(kl_x86_set_msr(v, MSR(APIC_ICR), 1u << 13), -EINVAL);
	assert_int_equal(kl_x86_set_msr(v, MSR(APIC_ICR), 1u << 17), -EINVAL);
	assert_int_equal(kl_x86_set_msr(v, MSR(APIC_ICR), 1u << 20), -EINVAL);
	/* One register of 64 bits; the busy bit never shows. */
	assert_int_equal(kl_x86_set_msr(v, MSR(APIC_ICR), 0x4400001030), 0);
	assert_int_equal(rdmsr(v, MSR(APIC_ICR), &val), 0);
	assert_int_equal(val, 0x4400000030);
	assert_int_equal(kl_x86_set_msr(v, MSR(APIC_SPIV), ENABLED), 0);
	assert_int_equal(kl_x86_set_msr(v, MSR(APIC_SELF_IPI), 0x41), 0);
	assert_int_equal(rdmsr(v, MSR(APIC_IRR + 0x20), &val), 0);
	assert_int_equal(val, 2);
}

/* APIC_BASE: which changes of mode the guest and the program may make. */
static void apic_base_modes(void **state)
{
	static const uint64_t base[] = {0xfee00000, 0xfee00800, X2APIC};
	static const bool guest_may[3][3] = {{1, 1, 0}, {1, 1, 1}, {1, 0, 1}};
	struct env *e = *state;

	for (unsigned from = 0; from < 3; from++)
		for (unsigned to = 0; to < 3; to++) {
			assert_int_equal(kl_set_apic_base(e->v, base[from], true), 0);
			assert_int_equal(kl_set_apic_base(e->v, base[to], false),
					 guest_may[from][to] ? 0 : -EINVAL);
			assert_int_equal(kl_set_apic_base(e->v, base[to], true), 0);
			assert_int_equal(kl_x86_find_cpuid(e->v, 1, 0)->edx >> 9 & 1, to > 0);
		}
	assert_int_equal(kl_set_apic_base(e->v, 0xfee00400, true), -EINVAL);
	assert_int_equal(kl_set_apic_base(e->v, 0xfee00a00, true), -EINVAL);
	assert_int_equal(kl_set_apic_base(e->v, 1ull << 52 | 0x800, true), -EINVAL);
	e->v->has_x2apic = false;
	assert_int_equal(kl_set_apic_base(e->v, X2APIC, true), -EINVAL);
}

/* A disabled APIC has every entry masked, and takes no interrupt. */
static void software_disable(void **state)
{
	struct env *e = *state;
	const struct kl_apic_msg m = {.dest = 0, .level = true, .vector = 0x50};

	set(e->v, APIC_LVTT, 0x31);
	assert_int_equal(get(e->v, APIC_LVTT), 0x10031); /* masked from the start */
	assert_int_equal(kl_apic_send(e->vm, NULL, &m), 0);
	set(e->v, APIC_SPIV, ENABLED);
	set(e->v, APIC_LVTT, 0x31);
	set(e->v, APIC_LVT1, 0x400);
	assert_int_equal(get(e->v, APIC_LVTT), 0x31);
	assert_int_equal(kl_apic_send(e->vm, NULL, &m), 1);
	set(e->v, APIC_SPIV, 0xff);
	assert_int_equal(get(e->v, APIC_LVTT), 0x10031);
	assert_int_equal(get(e->v, APIC_LVT1), 0x10400);
	assert_int_equal(kl_apic_send(e->vm, NULL, &m), 0);
	assert_int_equal(kl_apic_interrupt(e->v), 0x50); /* what it had, it has */
}

/* TPR, PPR and the order of interrupts; CR8 is the upper half of TPR. */
static void priorities(void **state)
{
	struct env *e = *state;
	struct kl_vcpu *v = e->v;

	set(v, APIC_SPIV, ENABLED);
	for (unsigned vector = 0x20; vector <= 0x61; vector += 0x20) {
		const struct kl_apic_msg m = {.level = true, .vector = (uint8_t)vector};

		assert_int_equal(kl_apic_send(e->vm, NULL, &m), 1);
	}
	assert_int_equal(kl_apic_interrupt(v), 0x60);
	set(v, APIC_TPR, 0x61);
	assert_int_equal(kl_apic_interrupt(v), -1); /* classes are compared, not vectors */
	assert_int_equal(get(v, APIC_PPR), 0x61);
	assert_int_equal(kl_x86_get_cr8(v), 6);
	kl_x86_set_cr8(v, 5);
	assert_int_equal(get(v, APIC_TPR), 0x50);
	assert_int_equal(kl_apic_interrupt(v), 0x60);
	kl_apic_ack(v, 0x60);
	assert_int_equal(get(v, APIC_ISR + 0x30), 1);
	assert_int_equal(get(v, APIC_IRR + 0x30), 0);
	assert_int_equal(get(v, APIC_PPR), 0x60);
	assert_true(kl_apic_pending_eoi(v, 0x60));
	kl_x86_set_cr8(v, 0);
	assert_int_equal(kl_apic_interrupt(v), -1); /* 0x60 is in service */
	set(v, APIC_EOI, 0);
	assert_false(kl_apic_pending_eoi(v, 0x60));
	assert_int_equal(kl_apic_interrupt(v), 0x40);
	kl_apic_ack(v, 0x40);
	kl_x86_set_cr8(v, 1);
	set(v, APIC_EOI, 0);
	kl_apic_ack(v, 0x20);
	set(v, APIC_EOI, 0);
	set(v, APIC_EOI, 0); /* of nothing */
	assert_int_equal(get(v, APIC_PPR), 0x10);
	assert_int_equal(kl_apic_interrupt(v), -1);
}

/* ---- messages ---- */

/* Bit n: vCPU n got it; vCPU 0 is the environment's. They forget it. */
static unsigned take(struct env *e, unsigned vector)
{
	unsigned got = 0;

	for (unsigned i = 0; i <= nr_aps; i++) {
		struct kl_vcpu *v = i ? ap[i - 1] : e->v;

		if (kl_apic_test(v->apic, APIC_IRR, vector)) {
			got |= 1u << i;
			kl_apic_ack(v, vector);
			atomic_store(kl_apic_word(v->apic, APIC_ISR, vector), 0);
		}
	}
	return got;
}

static unsigned device(struct env *e, uint32_t dest, bool logical, unsigned delivery,
		       unsigned vector)
{
	const struct kl_apic_msg m = {.dest = dest,
				      .logical = logical,
				      .level = true,
				      .delivery = (uint8_t)delivery,
				      .vector = (uint8_t)vector};
	int r = kl_apic_send(e->vm, NULL, &m);
	unsigned got = take(e, vector);

	assert_int_equal(kl_max(r, 0), __builtin_popcount(got));
	return got;
}

static void enable_all(struct env *e)
{
	set(e->v, APIC_SPIV, ENABLED);
	for (unsigned i = 0; i < nr_aps; i++)
		set(ap[i], APIC_SPIV, ENABLED);
}

static void destinations_xapic(void **state)
{
	struct env *e = *state;

	for (unsigned i = 1; i <= 3; i++)
		add_ap(e, i);
	enable_all(e);
	assert_int_equal(device(e, 2, false, KL_APIC_FIXED, 0x31), 1u << 2);
	assert_int_equal(device(e, 9, false, KL_APIC_FIXED, 0x31), 0);
	assert_int_equal(device(e, 0xff, false, KL_APIC_FIXED, 0x31), 0xf);
	/* Lowest priority to everybody is an ordinary broadcast. */
	assert_int_equal(device(e, 0xff, false, KL_APIC_LOWEST, 0x31), 0xf);
	/* Flat. */
	for (unsigned i = 0; i <= 3; i++)
		set(i ? ap[i - 1] : e->v, APIC_LDR, 0x1000000u << i);
	assert_int_equal(device(e, 5, true, KL_APIC_FIXED, 0x31), 5);
	assert_int_equal(device(e, 0xf0, true, KL_APIC_FIXED, 0x31), 0);
	/* One of several: the vector chooses. */
	for (unsigned vector = 0x30; vector < 0x34; vector++)
		assert_int_equal(device(e, 0xe, true, KL_APIC_LOWEST, vector), 2u << vector % 3);
	/* Two with one logical id: no map, and both get it. */
	set(ap[0], APIC_LDR, 1u << 24);
	assert_int_equal(device(e, 1, true, KL_APIC_FIXED, 0x31), 3);
	/* Clusters; one that stays flat hears what suits it, too. */
	for (unsigned i = 0; i <= 3; i++) {
		set(i ? ap[i - 1] : e->v, APIC_DFR, 0x0fffffff);
		set(i ? ap[i - 1] : e->v, APIC_LDR, (i / 2 << 4 | 1 << i % 2) << 24);
	}
	assert_int_equal(device(e, 0x03, true, KL_APIC_FIXED, 0x31), 3);
	assert_int_equal(device(e, 0x12, true, KL_APIC_FIXED, 0x31), 1u << 3);
	assert_int_equal(device(e, 0x22, true, KL_APIC_FIXED, 0x31), 0);
	set(ap[2], APIC_DFR, 0xffffffff);
	assert_int_equal(device(e, 0x11, true, KL_APIC_FIXED, 0x31), 1u << 2 | 1u << 3);
	/* Two with one id: each hears it. */
	set(ap[1], APIC_ID, 1u << 24);
	assert_int_equal(device(e, 1, false, KL_APIC_FIXED, 0x31), 6);
	assert_int_equal(device(e, 2, false, KL_APIC_FIXED, 0x31), 0);
	/* Disabled in APIC_BASE: it is not there; its id comes back when it does. */
	assert_int_equal(kl_x86_set_msr(ap[1], 0x1b, 0xfee00000), 0);
	assert_int_equal(device(e, 1, false, KL_APIC_FIXED, 0x31), 2);
	assert_int_equal(kl_x86_set_msr(ap[1], 0x1b, 0xfee00800), 0);
	assert_int_equal(device(e, 2, false, KL_APIC_FIXED, 0x31), 4);
}

static void destinations_x2apic(void **state)
{
	struct env *e = *state;

	add_ap(e, 0x11);
	add_ap(e, 0x12);
	add_ap(e, 0x1ff);
	enable_all(e);
	for (unsigned i = 0; i <= 3; i++)
		x2apic(i ? ap[i - 1] : e->v);
	assert_int_equal(device(e, 0x1ff, false, KL_APIC_FIXED, 0x31), 8);
	assert_int_equal(device(e, 0x12, false, KL_APIC_FIXED, 0x31), 4);
	assert_int_equal(device(e, 0x10006, true, KL_APIC_FIXED, 0x31), 6);
	assert_int_equal(device(e, 0x1f8000, true, KL_APIC_FIXED, 0x31), 8);
	assert_int_equal(device(e, 0xff0001, true, KL_APIC_FIXED, 0x31), 0);
	/* A device's 0xff is everybody, until the program says otherwise. */
	assert_int_equal(device(e, 0xff, false, KL_APIC_FIXED, 0x31), 0xf);
	e->vm->x2apic_no_broadcast_quirk = true;
	assert_int_equal(device(e, 0xff, false, KL_APIC_FIXED, 0x31), 0);
	assert_int_equal(device(e, 0xffffffff, false, KL_APIC_FIXED, 0x31), 0xf);
	assert_int_equal(device(e, 0xff, true, KL_APIC_FIXED, 0x31), 1);
	assert_true(kl_apic_match(e->v, 0xff, true));
	assert_false(kl_apic_match(ap[0], 0xff, true));
}

/*
 * Ids above 255 in xAPIC mode wrap. Asked for 32-bit ids, the program reaches such a vCPU by its
 * whole id, and the wrapped one stays the other's; not asked, both hear it.
 */
static void wrapped_ids(void **state)
{
	struct env *e = *state;

	add_ap(e, 0x105);
	add_ap(e, 5);
	enable_all(e);
	assert_int_equal(get(ap[0], APIC_ID), 5u << 24);
	assert_int_equal(device(e, 5, false, KL_APIC_FIXED, 0x31), 6);
	assert_int_equal(device(e, 0x105, false, KL_APIC_FIXED, 0x31), 2);
	e->vm->x2apic_format = true;
	kl_apic_online(e->v); /* anything that makes the map anew */
	assert_int_equal(device(e, 0x105, false, KL_APIC_FIXED, 0x31), 2);
	assert_int_equal(device(e, 5, false, KL_APIC_FIXED, 0x31), 2); /* the first of them */
}

static void shorthands(void **state)
{
	struct env *e = *state;

	add_ap(e, 1);
	add_ap(e, 2);
	enable_all(e);
	set(ap[0], APIC_ICR, 1u << 18 | 0x4000 | 0x31);
	assert_int_equal(take(e, 0x31), 2);
	set(ap[0], APIC_ICR, 2u << 18 | 0x4000 | 0x31);
	assert_int_equal(take(e, 0x31), 7);
	set(ap[0], APIC_ICR, 3u << 18 | 0x4000 | 0x31);
	assert_int_equal(take(e, 0x31), 5);
	set(ap[0], APIC_ICR2, 2u << 24);
	set(ap[0], APIC_ICR, 0x5031);
	assert_int_equal(take(e, 0x31), 4);
	assert_int_equal(get(ap[0], APIC_ICR), 0x4031);
	/* Level-triggered: the TMR bit; deasserted: nothing. */
	set(ap[0], APIC_ICR, 0xc031);
	assert_int_equal(get(ap[1], APIC_TMR + 0x10), 1u << 17);
	assert_int_equal(take(e, 0x31), 4);
	set(ap[0], APIC_ICR, 0x8031);
	assert_int_equal(take(e, 0x31), 0);
	set(ap[0], APIC_ICR, 0x4031);
	assert_int_equal(get(ap[1], APIC_TMR + 0x10), 0);
	take(e, 0x31);
	set(ap[0], APIC_ICR, 0x4400); /* NMI */
	assert_int_equal(ap[1]->nmi.pending, 1);
	set(ap[0], APIC_ICR, 0x4200); /* SMI: there is no SMM */
}

/* ---- running ---- */

/* The handler of @n tells the program of port @n. */
static void handler(struct env *e, unsigned n)
{
	memcpy(e->mem + HANDLER(n), (uint8_t[]){0xe6, (uint8_t)n, 0x48, 0xcf}, 4);
}

#define assert_interrupt(e, n)                             \
	do {                                               \
		assert_run(e, KVM_EXIT_IO);                \
		assert_int_equal((e)->v->exit.io.port, n); \
	} while (0)

static void start(struct env *e, pthread_t *t)
{
	assert_int_equal(pthread_create(t, NULL, env_thread, e), 0);
}

static void finish(struct env *e, pthread_t t, unsigned n)
{
	void *r;

	assert_int_equal(pthread_join(t, &r), 0);
	assert_int_equal((intptr_t)r, 0);
	assert_int_equal(e->v->exit.reason, KVM_EXIT_IO);
	assert_int_equal(e->v->exit.io.port, n);
}

static void send(struct env *e, unsigned vector)
{
	const struct kl_apic_msg m = {.level = true, .vector = (uint8_t)vector};

	assert_int_equal(kl_apic_send(e->vm, NULL, &m), 1);
}

/* By priority, when the guest allows it: behind the instruction that follows STI. */
static void guest_takes_interrupts(void **state)
{
	struct env *e = *state;

	env_code(e, 0xe6, 1, 0xfb, 0xe6, 2, 0xf4); /* out 1; sti; out 2; hlt */
	mode64(e, 0);
	set(e->v, APIC_SPIV, ENABLED);
	handler(e, 0x30);
	handler(e, 0x50);
	send(e, 0x30);
	send(e, 0x50);
	assert_run(e, KVM_EXIT_IO);
	assert_int_equal(e->v->exit.io.port, 1);
	assert_run(e, KVM_EXIT_IO);
	assert_int_equal(e->v->exit.io.port, 2);
	assert_interrupt(e, 0x50);
	assert_int_equal(get(e->v, APIC_PPR), 0x50);
	set(e->v, APIC_EOI, 0);
	assert_interrupt(e, 0x30);
}

/* TPR is masked by CR8; lowering it delivers. */
static void cr8_lets_in(void **state)
{
	struct env *e = *state;

	/* mov eax,9; mov cr8,rax; sti; nop; out 1; xor eax,eax; mov cr8,rax; out 2 */
	env_code(e, 0xb8, 9, 0, 0, 0, 0x44, 0x0f, 0x22, 0xc0, 0xfb, 0x90, 0xe6, 1, 0x31, 0xc0, 0x44,
		 0x0f, 0x22, 0xc0, 0xe6, 2);
	mode64(e, 0);
	set(e->v, APIC_SPIV, ENABLED);
	handler(e, 0x90);
	send(e, 0x90);
	assert_interrupt(e, 1);
	assert_int_equal(get(e->v, APIC_TPR), 0x90);
	assert_interrupt(e, 0x90);
}

static uint32_t out_value(struct env *e)
{
	uint32_t val;

	memcpy(&val, e->v->pio_data, 4);
	return val;
}

/* The guest writes and reads the registers in both ways. */
static void guest_accesses(void **state)
{
	struct env *e = *state;

	env_code(e, 0xc7, 0x83, 0xd0, 0, 0, 0, 0, 0, 0, 0x5a, /* mov dword [rbx+0xd0], 0x5a000000 */
		 0x8b, 0x83, 0xd0, 0, 0, 0,                   /* mov eax, [rbx+0xd0] */
		 0xe7, 1,                                     /* out 1, eax */
		 0xb9, 0x1b, 0, 0, 0, 0x0f, 0x32, 0x80, 0xcc, 4, 0x0f, 0x30,       /* x2APIC */
		 0xb9, 0x08, 8, 0, 0, 0xb8, 0x77, 0, 0, 0, 0x31, 0xd2, 0x0f, 0x30, /* TPR */
		 0x31, 0xc0, 0x0f, 0x32, 0xe7, 2, /* rdmsr; out 2, eax */
		 0xb9, 0x0e, 8, 0, 0, 0x0f, 0x32);
	mode64(e, 0);
	put64(e, TABLES + 0x3000 + (P_MMIO >> 9), BASE | 7);
	e->v->gpr[KL_RBX] = P_MMIO;
	assert_run(e, KVM_EXIT_IO);
	assert_int_equal(out_value(e), 0x5a000000);
	assert_run(e, KVM_EXIT_IO);
	assert_int_equal(e->v->exit.io.port, 2);
	assert_int_equal(out_value(e), 0x77);
	assert_int_equal(e->v->apic_base, 0xfee00d00);
	memcpy(e->mem + HANDLER(13), (uint8_t[]){0xe6, 13}, 2);
	assert_interrupt(e, 13); /* DFR is none of x2APIC's: #GP */
}

/* Memory at the APIC's address is memory. */
static void slot_over_the_page(void **state)
{
	struct env *e = *state;
	uint32_t *page =
		mmap(NULL, 0x1000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	assert_true(page != MAP_FAILED);
	assert_int_equal(env_slot(e, 1, 0, BASE, 0x1000, page), 0);
	/* mov dword [rbx+0x80], 0x55; mov eax, [rbx+0x30]; out 1, eax */
	env_code(e, 0xc7, 0x83, 0x80, 0, 0, 0, 0x55, 0, 0, 0, 0x8b, 0x43, 0x30, 0xe7, 1);
	mode64(e, 0);
	put64(e, TABLES + 0x3000 + (P_MMIO >> 9), BASE | 7);
	e->v->gpr[KL_RBX] = P_MMIO;
	page[APIC_LVR / 4] = 0xabcdef;
	assert_run(e, KVM_EXIT_IO);
	assert_int_equal(out_value(e), 0xabcdef);
	assert_int_equal(page[APIC_TPR / 4], 0x55);
	assert_int_equal(get(e->v, APIC_TPR), 0);
	assert_int_equal(env_slot(e, 1, 0, 0, 0, page), 0);
	munmap(page, 0x1000);
}

/* ---- INIT and SIPI ---- */

static void init_sipi(void **state)
{
	struct env *e = *state, a;
	struct kl_vcpu *v = add_ap(e, 1);
	struct kvm_vcpu_events ev;
	struct kvm_mp_state m;
	pthread_t t;
	void *r;

	enable_all(e);
	a = *e;
	a.v = v;
	set(e->v, APIC_ICR2, 1u << 24);
	/* A SIPI before INIT does nothing. */
	set(e->v, APIC_ICR, 0x4608);
	assert_int_equal(kl_x86_get_mp_state(v, &m), 0);
	assert_int_equal(m.mp_state, KVM_MP_STATE_UNINITIALIZED);
	/* INIT ends the first wait; the program calls again and waits for the SIPI. */
	if (kl_racepoints_enabled())
		kl_racepoint_arm("vcpu-uninitialized", 1);
	start(&a, &t);
	if (kl_racepoints_enabled())
		assert_true(kl_racepoint_wait("vcpu-uninitialized", TIMEOUT));
	set(e->v, APIC_ICR, 0x4500);
	if (kl_racepoints_enabled())
		kl_racepoint_release("vcpu-uninitialized");
	pthread_join(t, &r);
	assert_int_equal((intptr_t)r, -EAGAIN);
	assert_int_equal(v->mp_state, KVM_MP_STATE_INIT_RECEIVED);
	memcpy(e->mem + 0x8000, (uint8_t[]){0xe6, 0x66}, 2);
	start(&a, &t);
	while (!atomic_load(&v->core.sleeping))
		sched_yield();
	set(e->v, APIC_ICR, 0x8500); /* INIT, deasserted: nothing */
	set(e->v, APIC_ICR, 0x4608);
	finish(&a, t, 0x66);
	assert_int_equal(v->seg[KL_CS].selector, 0x800);
	/* INIT wins over a SIPI that came before it, and shows as latched. */
	set(e->v, APIC_ICR, 0x4608);
	set(e->v, APIC_ICR, 0x4500);
	kl_x86_get_events(v, &ev);
	assert_int_equal(ev.smi.latched_init, 1);
	assert_int_equal(kl_x86_get_mp_state(v, &m), 0);
	assert_int_equal(m.mp_state, KVM_MP_STATE_INIT_RECEIVED);
	assert_int_equal(v->seg[KL_CS].selector, 0xf000);
	/* The program can do the same. */
	ev = (struct kvm_vcpu_events){.flags = KVM_VCPUEVENT_VALID_SIPI_VECTOR,
				      .sipi_vector = 0x12};
	assert_int_equal(kl_x86_set_events(v, &ev), 0);
	m.mp_state = KVM_MP_STATE_SIPI_RECEIVED;
	assert_int_equal(kl_x86_set_mp_state(v, &m), 0);
	assert_int_equal(kl_x86_get_mp_state(v, &m), 0);
	assert_int_equal(m.mp_state, KVM_MP_STATE_RUNNABLE);
	assert_int_equal(v->seg[KL_CS].base, 0x12000);
	assert_int_equal(v->rip, 0);
	/* The boot processor goes on after INIT. */
	set(v, APIC_SPIV, ENABLED);
	set(v, APIC_ICR2, 0);
	set(v, APIC_ICR, 0x4500);
	assert_int_equal(kl_x86_get_mp_state(e->v, &m), 0);
	assert_int_equal(m.mp_state, KVM_MP_STATE_RUNNABLE);
	assert_int_equal(e->v->rip, 0xfff0);
	m.mp_state = 77;
	assert_int_equal(kl_x86_set_mp_state(v, &m), -EINVAL);
	m.mp_state = KVM_MP_STATE_HALTED;
	assert_int_equal(kl_x86_set_mp_state(v, &m), 0);
}

/* ---- timer ---- */

static void halting_guest(struct env *e)
{
	env_code(e, 0xfb, 0xf4, 0xeb, 0xfd); /* sti; hlt; jmp to hlt */
	mode64(e, 0);
	set(e->v, APIC_SPIV, ENABLED);
	handler(e, 0x40);
}

static void one_shot(void **state)
{
	struct env *e = *state;

	halting_guest(e);
	set(e->v, APIC_LVTT, 0x40);
	set(e->v, APIC_TMICT, 1000000);
	assert_true(get(e->v, APIC_TMCCT) <= 1000000);
	assert_interrupt(e, 0x40);
	assert_int_equal(get(e->v, APIC_TMCCT), 0);
	assert_int_equal(e->v->apic->timer.pending, 0);
	assert_false(e->v->apic->timer.t.armed);
	/* Masked it fires all the same, and is delivered when it is not masked any more. */
	set(e->v, APIC_EOI, 0);
	set(e->v, APIC_LVTT, LVT_MASKED | 0x40);
	set(e->v, APIC_TMICT, 1);
	while (!atomic_load(&e->v->apic->timer.pending))
		sched_yield();
	assert_false(kl_apic_timer_due(e->v));
	set(e->v, APIC_LVTT, 0x40);
	assert_interrupt(e, 0x40);
	/* A reserved mode counts nothing. */
	e->v->has_tsc_deadline = true;
	kl_apic_cpuid_changed(e->v);
	set(e->v, APIC_LVTT, LVT_TIMER_MODE | 0x40);
	set(e->v, APIC_TMICT, 1);
	assert_false(e->v->apic->timer.t.armed);
	assert_int_equal(e->v->apic->timer.pending, 0);
	set(e->v, APIC_LVTT, 0x40);
	/* 0 stops it. */
	set(e->v, APIC_TMICT, 0xffffffff);
	assert_true(e->v->apic->timer.t.armed);
	set(e->v, APIC_TMICT, 0);
	assert_false(e->v->apic->timer.t.armed);
}

static void periodic(void **state)
{
	struct env *e = *state;

	halting_guest(e);
	set(e->v, APIC_LVTT, TIMER_PERIODIC | 0x40);
	set(e->v, APIC_TMICT, 10); /* too short: 200 us */
	assert_int_equal(e->v->apic->timer.period, 200000);
	for (unsigned i = 0; i < 5; i++) {
		assert_interrupt(e, 0x40);
		set(e->v, APIC_EOI, 0);
	}
	assert_true(get(e->v, APIC_TMICT) == 10);
	set(e->v, APIC_LVTT, 0x40); /* one-shot from here: one more at most */
	set(e->v, APIC_TMICT, 0);
	assert_false(e->v->apic->timer.t.armed);
}

/* The divider changes the pace of what is left; the bus clock is the program's choice. */
static void divider(void **state)
{
	struct env *e = *state;
	uint64_t left, after, now;

	set(e->v, APIC_SPIV, ENABLED);
	e->vm->apic_bus_cycle_ns = 10;
	set(e->v, APIC_LVTT, 0x40);
	set(e->v, APIC_TMICT, 1000000000);
	assert_int_equal(e->v->apic->timer.period, 20000000000ull); /* divided by 2 */
	left = e->v->apic->timer.target - kl_timer_now();
	set(e->v, APIC_TDCR, 0xa); /* by 128 */
	now = kl_timer_now();
	after = e->v->apic->timer.target - now;
	assert_int_equal(e->v->apic->timer.period, 1280000000000ull);
	assert_true(after <= left * 64 && after > left * 64 - 600000 * MS);
	set(e->v, APIC_TDCR, 0xb); /* by 1 */
	assert_int_equal(e->v->apic->timer.period, 10000000000ull);
	assert_true(e->v->apic->timer.t.armed);
}

static void tsc_deadline(void **state)
{
	struct env *e = *state;
	uint64_t val, then;

	halting_guest(e);
	e->v->has_tsc_deadline = true;
	kl_apic_cpuid_changed(e->v);
	then = kl_x86_tsc(e->v) + e->vm->tsc_khz * 10ull;
	assert_int_equal(kl_x86_set_msr(e->v, 0x6e0, then), 0);
	assert_int_equal(rdmsr(e->v, 0x6e0, &val), 0);
	assert_int_equal(val, 0); /* not in that mode */
	set(e->v, APIC_LVTT, TIMER_TSCDEADLINE | 0x40);
	set(e->v, APIC_TMICT, 5);
	assert_int_equal(get(e->v, APIC_TMICT), 0);
	assert_int_equal(kl_x86_set_msr(e->v, 0x6e0, then), 0);
	assert_int_equal(rdmsr(e->v, 0x6e0, &val), 0);
	assert_int_equal(val, then);
	assert_interrupt(e, 0x40);
	assert_true(kl_x86_tsc(e->v) >= then);
	assert_int_equal(rdmsr(e->v, 0x6e0, &val), 0);
	assert_int_equal(val, 0);
	set(e->v, APIC_EOI, 0);
	/* The past fires at once, 0 disarms, leaving the mode does, too. */
	assert_int_equal(kl_x86_set_msr(e->v, 0x6e0, 1), 0);
	assert_interrupt(e, 0x40);
	assert_int_equal(kl_x86_set_msr(e->v, 0x6e0, ~0ull >> 1), 0);
	assert_true(e->v->apic->timer.t.armed);
	assert_int_equal(kl_x86_set_msr(e->v, 0x6e0, 0), 0);
	assert_false(e->v->apic->timer.t.armed);
	assert_int_equal(kl_x86_set_msr(e->v, 0x6e0, ~0ull >> 1), 0);
	set(e->v, APIC_LVTT, 0x40);
	assert_false(e->v->apic->timer.t.armed);
}

/* ---- state ---- */

static void state_round_trip(void **state)
{
	struct env *e = *state;
	struct kvm_lapic_state s, back;
	struct kl_vcpu *v = add_ap(e, 0x21);
	uint32_t id;

	set(v, APIC_SPIV, ENABLED);
	set(v, APIC_LVTT, 0x40);
	set(v, APIC_TMICT, 0xf0000000);
	set(v, APIC_TPR, 0x20);
	kl_apic_get_state(v, &s);
	memcpy(&id, s.regs + APIC_TMCCT, 4);
	assert_true(id > 0xe0000000 && id <= 0xf0000000);
	s.regs[APIC_IRR + 0x20 + 1] = 1; /* 0x48 */
	s.regs[APIC_ISR + 0x10] = 1;     /* 0x20 */
	kl_x86_reset(v, false);
	assert_int_equal(kl_apic_set_state(v, &s), 0);
	kl_apic_get_state(v, &back);
	memcpy(back.regs + APIC_TMCCT, s.regs + APIC_TMCCT, 4);
	memcpy(back.regs + APIC_PPR, s.regs + APIC_PPR, 4);
	assert_memory_equal(&s, &back, sizeof(s));
	assert_int_equal(kl_apic_interrupt(v), 0x48);
	assert_int_equal(get(v, APIC_PPR), 0x20);
	assert_true(v->apic->timer.t.armed);
	assert_true(v->apic->timer.target <= kl_timer_now() + 2ull * id);
	/* x2APIC: the id as 8 bits, or whole; then it must be right. */
	x2apic(v);
	kl_apic_get_state(v, &s);
	memcpy(&id, s.regs + APIC_ID, 4);
	assert_int_equal(id, 0x21u << 24);
	assert_int_equal(kl_apic_set_state(v, &s), 0);
	e->vm->x2apic_format = true;
	kl_apic_get_state(v, &back);
	memcpy(&id, back.regs + APIC_ID, 4);
	assert_int_equal(id, 0x21);
	assert_int_equal(kl_apic_set_state(v, &s), -EINVAL);
	assert_int_equal(kl_apic_set_state(v, &back), 0);
}

/* ---- nothing is lost ---- */

/*
 * A paravirtual kick is kept for the next HLT: the guest that waits for it may be between its
 * last look at a lock and HLT, with interrupts off.
 */
static void kick_before_halt(void **state)
{
	const struct kl_apic_msg kick = {.level = true, .delivery = KL_APIC_REMRD};
	struct env *e = *state;
	struct kvm_mp_state m = {KVM_MP_STATE_HALTED};

	env_code(e, 0xe6, 1, 0xf4, 0xe6, 2); /* out 1; hlt; out 2 */
	mode64(e, 0);
	assert_run(e, KVM_EXIT_IO);
	assert_int_equal(kl_apic_send(e->vm, NULL, &kick), 1);
	assert_run(e, KVM_EXIT_IO);
	assert_int_equal(e->v->exit.io.port, 2);
	/* Once. */
	assert_int_equal(kl_x86_set_mp_state(e->v, &m), 0);
	assert_int_equal(kl_x86_get_mp_state(e->v, &m), 0);
	assert_int_equal(m.mp_state, KVM_MP_STATE_HALTED);
	assert_int_equal(kl_apic_send(e->vm, NULL, &kick), 1);
	assert_int_equal(kl_x86_get_mp_state(e->v, &m), 0);
	assert_int_equal(m.mp_state, KVM_MP_STATE_RUNNABLE);
}

/* Sent between the last look for an interrupt and the sleep of HLT. */
static void sent_before_sleep(void **state)
{
	struct env *e = *state;
	pthread_t t;

	if (!kl_racepoints_enabled())
		skip();
	halting_guest(e);
	kl_racepoint_arm("vcpu-halts", 1);
	start(e, &t);
	assert_true(kl_racepoint_wait("vcpu-halts", TIMEOUT));
	send(e, 0x40);
	kl_racepoint_release("vcpu-halts");
	finish(e, t, 0x40);
}

/* A timer that expires there. */
static void expired_before_sleep(void **state)
{
	struct env *e = *state;
	pthread_t t;

	if (!kl_racepoints_enabled())
		skip();
	halting_guest(e);
	set(e->v, APIC_LVTT, 0x40);
	kl_racepoint_arm("vcpu-halts", 1);
	kl_racepoint_arm("apic-timer-pending", 1);
	start(e, &t);
	assert_true(kl_racepoint_wait("vcpu-halts", TIMEOUT));
	set(e->v, APIC_TMICT, 100000000); /* in the helper, not here */
	assert_true(kl_racepoint_wait("apic-timer-pending", TIMEOUT));
	kl_racepoint_release("vcpu-halts");
	kl_racepoint_release("apic-timer-pending");
	finish(e, t, 0x40);
}

/* Sent to a vCPU that has looked and enters the guest, where nothing ever leaves by itself. */
static void sent_while_entering(void **state)
{
	struct env *e = *state;
	pthread_t t;

	if (!kl_racepoints_enabled())
		skip();
	env_code(e, 0xfb, 0x90, 0xeb, 0xfe); /* sti; nop; jmp $ */
	mode64(e, 0);
	set(e->v, APIC_SPIV, ENABLED);
	handler(e, 0x40);
	kl_racepoint_arm("vcpu-entered", 1);
	start(e, &t);
	assert_true(kl_racepoint_wait("vcpu-entered", TIMEOUT));
	send(e, 0x40);
	kl_racepoint_release("vcpu-entered");
	finish(e, t, 0x40);
}

static void *send_thread(void *arg)
{
	send(arg, 0x40);
	return NULL;
}

/*
 * "Some bit is set" is a hint: the vCPU clears it, looks at the bits and sets it again. A bit that
 * is set after that look is followed by the hint; one that is set before is seen.
 */
static void sent_while_acknowledging(void **state)
{
	struct env *e = *state;
	pthread_t t, ack;

	if (!kl_racepoints_enabled())
		skip();
	halting_guest(e);
	handler(e, 0x60);
	/* The sender stops between bit and hint; all of the acknowledgement comes in between. */
	send(e, 0x60);
	kl_racepoint_arm("apic-irr-set", 1);
	assert_int_equal(pthread_create(&t, NULL, send_thread, e), 0);
	assert_true(kl_racepoint_wait("apic-irr-set", TIMEOUT));
	assert_interrupt(e, 0x60);
	kl_racepoint_release("apic-irr-set");
	pthread_join(t, NULL);
	set(e->v, APIC_EOI, 0);
	assert_interrupt(e, 0x40);
	set(e->v, APIC_EOI, 0);
	/* The vCPU stops between the hint's clearing and its look; all of the sending comes there.
	 */
	send(e, 0x60);
	kl_racepoint_arm("apic-irr-cleared", 1);
	start(e, &ack);
	assert_true(kl_racepoint_wait("apic-irr-cleared", TIMEOUT));
	send(e, 0x40);
	kl_racepoint_release("apic-irr-cleared");
	finish(e, ack, 0x60);
	set(e->v, APIC_EOI, 0);
	assert_interrupt(e, 0x40);
}

static void *online_thread(void *arg)
{
	kl_apic_online(arg);
	return NULL;
}

/* A change while the map is being made: it is made once more. */
static void map_changed_meanwhile(void **state)
{
	struct env *e = *state;
	pthread_t t;

	if (!kl_racepoints_enabled())
		skip();
	add_ap(e, 1);
	enable_all(e);
	kl_racepoint_arm("apic-map-made", 1);
	assert_int_equal(pthread_create(&t, NULL, online_thread, e->v), 0);
	assert_true(kl_racepoint_wait("apic-map-made", TIMEOUT));
	/* As a write of the register does, up to the lock that the other thread has. */
	kl_apic_set_reg(ap[0]->apic, APIC_ID, 7u << 24);
	kl_apic_map_dirty(e->vm);
	kl_racepoint_release("apic-map-made");
	pthread_join(t, NULL);
	kl_apic_map_update(e->vm);
	assert_int_equal(device(e, 7, false, KL_APIC_FIXED, 0x31), 2);
	assert_int_equal(device(e, 1, false, KL_APIC_FIXED, 0x31), 0);
}

/* Senders while ids change: every message is answered, the map is never used after its end. */
static _Atomic bool stop_sending;

static void *storm_thread(void *arg)
{
	struct env *e = arg;

	while (!atomic_load(&stop_sending))
		for (unsigned dest = 0; dest < 4; dest++) {
			const struct kl_apic_msg m = {.dest = dest, .level = true, .vector = 0x31};

			kl_apic_send(e->vm, NULL, &m);
		}
	return NULL;
}

static void ids_change_under_senders(void **state)
{
	struct env *e = *state;
	pthread_t t[2];

	add_ap(e, 1);
	add_ap(e, 2);
	enable_all(e);
	atomic_store(&stop_sending, false);
	for (unsigned i = 0; i < 2; i++)
		assert_int_equal(pthread_create(&t[i], NULL, storm_thread, e), 0);
	for (unsigned i = 0; i < 300; i++) {
		set(ap[0], APIC_ID, (i & 3) << 24);
		set(ap[1], APIC_DFR, i & 1 ? 0x0fffffff : 0xffffffff);
		assert_int_equal(kl_x86_set_msr(ap[1], 0x1b, i & 2 ? 0xfee00800 : 0xfee00000), 0);
	}
	atomic_store(&stop_sending, true);
	for (unsigned i = 0; i < 2; i++)
		pthread_join(t[i], NULL);
	set(ap[0], APIC_ID, 1u << 24);
	take(e, 0x31);
	assert_int_equal(device(e, 1, false, KL_APIC_FIXED, 0x31), 2);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
	const struct CMUnitTest tests[] = {
		TEST(reset_state),
		TEST(lint0_quirk),
		TEST(writable_bits),
		TEST(mmio_access_sizes),
		TEST(mmio_hole),
		TEST(x2apic_registers),
		TEST(apic_base_modes),
		TEST(software_disable),
		TEST(priorities),
		TEST(destinations_xapic),
		TEST(destinations_x2apic),
		TEST(wrapped_ids),
		TEST(shorthands),
		TEST(guest_takes_interrupts),
		TEST(cr8_lets_in),
		TEST(guest_accesses),
		TEST(slot_over_the_page),
		TEST(init_sipi),
		TEST(one_shot),
		TEST(periodic),
		TEST(divider),
		TEST(tsc_deadline),
		TEST(state_round_trip),
		TEST(kick_before_halt),
		TEST(sent_before_sleep),
		TEST(expired_before_sleep),
		TEST(sent_while_entering),
		TEST(sent_while_acknowledging),
		TEST(map_changed_meanwhile),
		TEST(ids_change_under_senders),
	};

	cmocka_set_test_filter(getenv("KVMLET_TEST"));
	return cmocka_run_group_tests(tests, NULL, NULL);
}
