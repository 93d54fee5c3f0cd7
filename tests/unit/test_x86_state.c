/* SPDX-License-Identifier: MIT */
/*
 * What KVM's get and set ioctls mean for a vCPU: power-on state, checks, CPUID and its rules,
 * the MSR lists, XSAVE areas, events.
 */
#include "x86_env.h"

#include "host/cpu.h"
#include "x86/tsc.h"

static void power_on(void **state)
{
	struct env *e = *state;
	struct kvm_sregs s;
	struct kvm_regs r;
	struct kvm_fpu f;

	kl_x86_get_regs(e->v, &r);
	assert_int_equal(r.rip, 0xfff0);
	assert_int_equal(r.rflags, 2);
	assert_int_equal(r.rdx, 0x600);
	kl_x86_get_sregs(e->v, &s);
	assert_int_equal(s.cr0, 0x60000010);
	assert_int_equal(s.cs.base, 0xffff0000);
	assert_int_equal(s.cs.selector, 0xf000);
	assert_int_equal(s.cs.limit, 0xffff);
	assert_int_equal(s.apic_base, 0xfee00900);
	assert_int_equal(s.tr.type, 3);
	assert_int_equal(s.ldt.type, 2);
	kl_x86_get_fpu(e->v, &f);
	assert_int_equal(f.fcw, 0x37f);
}

/* Refused sregs change nothing at all. */
static void sregs_checks(void **state)
{
	struct env *e = *state;
	struct kvm_sregs good, bad, now;

	mode64(e, 0);
	kl_x86_get_sregs(e->v, &good);
	for (unsigned i = 0; i < 9; i++) {
		bad = good;
		switch (i) {
		case 0:
			bad.cr0 |= 1ull << 32;
			break;
		case 1:
			bad.cr0 |= KL_CR0_NW;
			break;
		case 2:
			bad.cr0 &= ~(uint64_t)KL_CR0_PE;
			break;
		case 3:
			bad.cr4 &= ~(uint64_t)KL_CR4_PAE;
			break;
		case 4:
			bad.efer &= ~(uint64_t)KL_EFER_LMA;
			break;
		case 5:
			bad.cr4 |= 1u << 13; /* VMXE */
			break;
		case 6:
			bad.cr3 |= 1ull << 51;
			break;
		case 7:
			bad.apic_base = KL_CR4_PAE;
			break;
		default:
			bad.cr0 &= ~(uint64_t)KL_CR0_PG; /* then LMA and CS.L are wrong */
			break;
		}
		bad.cr2 = 0x1234;
		assert_int_equal(kl_x86_set_sregs(e->v, &bad), -EINVAL);
		kl_x86_get_sregs(e->v, &now);
		assert_memory_equal(&now, &good, sizeof(now));
	}
	good.interrupt_bitmap[1] = 4;
	assert_int_equal(kl_x86_set_sregs(e->v, &good), 0);
	assert_true(e->v->irq.injected);
	assert_int_equal(e->v->irq.nr, 66);
	kl_x86_get_sregs(e->v, &now);
	assert_int_equal(now.interrupt_bitmap[1], 4);
}

static void sregs2_pdptrs(void **state)
{
	struct env *e = *state;
	struct kvm_sregs2 s, now;

	kl_x86_get_sregs2(e->v, &s);
	assert_int_equal(s.flags, 0);
	s.flags = KVM_SREGS2_FLAGS_PDPTRS_VALID;
	assert_int_equal(kl_x86_set_sregs2(e->v, &s), -EINVAL); /* not PAE */
	s.cr0 = KL_CR0_PE | KL_CR0_PG;
	s.cr4 = KL_CR4_PAE;
	s.pdptrs[2] = 0x5001;
	assert_int_equal(kl_x86_set_sregs2(e->v, &s), 0);
	kl_x86_get_sregs2(e->v, &now);
	assert_int_equal(now.flags, KVM_SREGS2_FLAGS_PDPTRS_VALID);
	assert_int_equal(now.pdptrs[2], 0x5001);
	/* Without them they are read from memory. */
	put64(e, 0x20008, 0x7001);
	s.flags = 0;
	s.cr3 = 0x20000;
	assert_int_equal(kl_x86_set_sregs2(e->v, &s), 0);
	assert_int_equal(e->v->pdptrs[1], 0x7001);
	s.flags = 2;
	assert_int_equal(kl_x86_set_sregs2(e->v, &s), -EINVAL);
}

static void cr4_follows_cpuid(void **state)
{
	struct env *e = *state;
	struct kvm_cpuid_entry2 one = {.function = 1};
	struct kvm_sregs s;

	kl_x86_get_sregs(e->v, &s);
	s.cr4 = KL_CR4_PCIDE | KL_CR4_OSXSAVE;
	assert_int_equal(kl_x86_set_sregs(e->v, &s), 0);
	assert_true(kl_x86_find_cpuid(e->v, 1, 0)->ecx & (1u << 27)); /* OSXSAVE shows */
	s.cr4 = 0;
	assert_int_equal(kl_x86_set_sregs(e->v, &s), 0);
	assert_false(kl_x86_find_cpuid(e->v, 1, 0)->ecx & (1u << 27));
	assert_int_equal(kl_x86_set_cpuid(e->v, &one, 1), 0);
	s.cr4 = KL_CR4_PCIDE;
	assert_int_equal(kl_x86_set_sregs(e->v, &s), -EINVAL);
	assert_int_equal(e->v->maxphyaddr, 36);
}

static void cpuid_is_fixed_after_running(void **state)
{
	struct env *e = *state;
	struct kvm_cpuid_entry2 list[100];
	int n = kl_x86_supported_cpuid(list, 100);

	assert_true(n > 0);
	assert_int_equal(kl_x86_supported_cpuid(list, 3), -E2BIG);
	env_code(e, 0xf4);
	mode64(e, 0);
	assert_run(e, KVM_EXIT_HLT);
	n = kl_x86_supported_cpuid(list, 100);
	assert_int_equal(kl_x86_set_cpuid(e->v, list, (unsigned)n), 0);
	list[0].ebx++;
	assert_int_equal(kl_x86_set_cpuid(e->v, list, (unsigned)n), -EINVAL);
	assert_int_equal(kl_x86_set_cpuid(e->v, list, (unsigned)n - 1), -EINVAL);
}

static void cpuid_instruction(void **state)
{
	struct env *e = *state;
	const struct kvm_cpuid_entry2 *want;

	env_code(e, 0x0f, 0xa2, 0xf4);
	mode64(e, 0);
	e->v->gpr[KL_RAX] = 0x40000000;
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->gpr[KL_RBX], 0x4b4d564b); /* "KVMK" */
	enter_at(e, CODE, STACK);
	e->v->gpr[KL_RAX] = 7;
	assert_run(e, KVM_EXIT_HLT);
	want = kl_x86_find_cpuid(e->v, 7, 0);
	assert_non_null(want);
	assert_int_equal(e->v->gpr[KL_RBX], want->ebx);
	/* What the engine lacks is not offered, whatever the host has: VMX, SVM, AVX-512, AMX. */
	assert_int_equal(kl_x86_find_cpuid(e->v, 1, 0)->ecx & (1u << 5), 0);
	/* The x2APIC is the engine's own. */
	assert_true(kl_x86_find_cpuid(e->v, 1, 0)->ecx & 1u << 21);
	assert_int_equal(kl_x86_find_cpuid(e->v, 0x80000001, 0)->ecx & (1u << 2), 0);
	assert_int_equal(want->ebx & (1u << 16), 0);
	assert_int_equal(want->edx & (7u << 22 | 1u << 25), 0);
}

/* Every listed MSR can be read, and what was read can be written back. */
static void msr_lists(void **state)
{
	struct env *e = *state;
	uint64_t val, again;

	for (unsigned i = 0; i < kl_x86_nr_msrs(); i++) {
		uint32_t msr = kl_x86_msr_list[i];

		assert_int_equal(kl_x86_get_msr(e->v, msr, &val), 0);
		if (msr == 0x4b564d06) { /* ASYNC_PF_INT: there is no APIC here */
			assert_int_equal(kl_x86_set_msr(e->v, msr, val), -EINVAL);
			continue;
		}
		assert_int_equal(kl_x86_set_msr(e->v, msr, val), 0);
		/* The TSC, and Hyper-V's runtime and reference counter: they go on. */
		if (msr == 0x10 || msr == 0x40000010 || msr == 0x40000020)
			continue;
		assert_int_equal(kl_x86_get_msr(e->v, msr, &again), 0);
		assert_int_equal(val, again);
	}
	for (unsigned i = 0; i < kl_x86_nr_feature_msrs; i++)
		assert_int_equal(kl_x86_get_feature_msr(kl_x86_feature_msr_list[i], &val), 0);
	/* Of the others, what is in the list of a vCPU's reads as 0. */
	assert_int_equal(kl_x86_get_feature_msr(0x10, &val), 0);
	assert_int_equal(val, 0);
	assert_int_equal(kl_x86_get_feature_msr(0xdeadbeef, &val), -EINVAL);
	assert_int_equal(kl_x86_get_msr(e->v, 0xdeadbeef, &val), -EINVAL);
	assert_int_equal(kl_x86_set_msr(e->v, 0xdeadbeef, 0), -EINVAL);
}

/* Without a CPUID that says AMD the guest is an Intel, on any host. */
static void msr_of_no_vendor(void **state)
{
	struct env *e = *state;
	struct kvm_cpuid_entry2 amd = {.ebx = 0x68747541, .edx = 0x69746e65, .ecx = 0x444d4163};
	uint64_t val;

	assert_int_equal(kl_x86_set_cpuid(e->v, NULL, 0), 0);
	assert_int_equal(kl_x86_set_msr(e->v, 0xc0000103, 1ull << 32 | 5), -EINVAL);
	assert_int_equal(kl_x86_set_cpuid(e->v, &amd, 1), 0);
	assert_int_equal(kl_x86_set_msr(e->v, 0xc0000103, 1ull << 32 | 5), 0);
	assert_int_equal(kl_x86_get_msr(e->v, 0xc0000103, &val), 0);
	assert_int_equal(val, 5);
}

static void msr_checks(void **state)
{
	static const struct {
		uint32_t msr;
		uint64_t val;
		int want;
	} t[] = {
		{0x277, 0x0606060606060606, 0}, /* PAT */
		{0x277, 0x0206060606060606, -EINVAL},
		{0xc0000082, 0xffff800000000000, 0}, /* LSTAR */
		{0xc0000082, 1ull << 62, -EINVAL},
		{0xc0000080, 0x901, 0}, /* EFER */
		{0xc0000080, 1ull << 20, -EINVAL},
		{0x1b, 0xfee00500, -EINVAL}, /* APIC base: x2APIC, not enabled */
		{0x1b, 0xfee00a00, -EINVAL},
		{0x1b, 0xfee00d00, 0},
		{0x1b, 0xfee00800, 0},
		{0x200, 0xabc00006, 0}, /* MTRR */
		{0x200, 0xabc00002, -EINVAL},
		{0x2ff, 0xc06, 0},
		{0x2ff, 0x1006, -EINVAL},
		{0x250, 0x0606060606060606, 0},
		{0x250, 0x0706060606060606, -EINVAL},
		{0xc0010015, 1ull << 18, 0}, /* HWCR */
		{0xc0010015, 1, -EINVAL},
		{0xda0, 0, 0}, /* XSS */
		{0xda0, 1, -EINVAL},
	};
	struct env *e = *state;

	for (unsigned i = 0; i < KL_ARRAY_SIZE(t); i++)
		assert_int_equal(kl_x86_set_msr(e->v, t[i].msr, t[i].val), t[i].want);
}

/* A second vCPU starts with the first one's TSC; a write shifts it; TSC_ADJUST follows. */
static void tsc(void **state)
{
	struct env *e = *state;
	struct kl_vcpu *second;
	uint64_t val;

	assert_int_equal(kl_x86_vcpu_create(e->vm, 1, &second), 0);
	assert_int_equal(second->tsc_offset, e->v->tsc_offset);
	assert_int_equal(kl_x86_set_msr(e->v, 0x10, 1ull << 50), 0);
	assert_int_equal(kl_x86_get_msr(e->v, 0x10, &val), 0);
	assert_in_range(val, 1ull << 50, (1ull << 50) + 100000000000);
	/* The other vCPU is written a little later: KVM makes them equal. */
	assert_int_equal(kl_x86_set_msr(second, 0x10, 1ull << 50), 0);
	assert_int_equal(second->tsc_offset, e->v->tsc_offset);
	/* wrmsr(TSC, 0): TSC_ADJUST takes the difference. */
	env_code(e, 0x0f, 0x30, 0xf4);
	mode64(e, 0);
	e->v->gpr[KL_RCX] = 0x10;
	assert_run(e, KVM_EXIT_HLT);
	assert_in_range(kl_x86_tsc(e->v), 0, 100000000000);
	assert_int_equal(kl_x86_get_msr(e->v, 0x3b, &val), 0);
	assert_int_equal(val, e->v->tsc_offset - second->tsc_offset);
	kl_notifier_remove_vm(&e->vm->mem);
	kl_vcpu_core_remove(&second->core);
	kl_x86_vcpu_destroy(second);
}

/* Exactly what the ratio says, for the guest's RDTSC as for the program's reads. */
static void tsc_scaling(void **state)
{
	const uint32_t host = kl_host_tsc_khz();
	struct env *e = *state;
	uint64_t before, after, got;

	env_code(e, 0x0f, 0x31, 0xf4); /* rdtsc; hlt */
	mode64(e, 0);
	for (unsigned i = 0; i < 4; i++) {
		uint32_t khz = (const uint32_t[]){host / 3, host * 7 / 5, host, 1}[i];
		uint64_t ratio = i == 2 ? 1ull << 32 : ((uint64_t)khz << 32) / host;

		assert_int_equal(kl_tsc_set_khz(e->v, khz), 0);
		assert_int_equal(e->v->tsc_khz, khz);
		assert_int_equal(e->v->tsc_ratio, ratio);
		kl_tsc_set_offset(e->v, 1ull << 60);
		enter_at(e, CODE, STACK);
		before = kl_host_tsc();
		assert_run(e, KVM_EXIT_HLT);
		after = kl_host_tsc();
		got = (e->v->gpr[KL_RDX] << 32 | e->v->gpr[KL_RAX]) - (1ull << 60);
		assert_true(got >= (uint64_t)((unsigned __int128)before * ratio >> 32));
		assert_true(got <= (uint64_t)((unsigned __int128)after * ratio >> 32));
		/* Back to the host's counter, within one step of the guest's. */
		got = kl_tsc_to_host(e->v, got + (1ull << 60));
		assert_true(got + (1ull << 33) / ratio + 2 >= before);
		assert_true(got <= after + (1ull << 33) / ratio + 2);
	}
	/* 250 ppm do not matter; the highest rate has a ratio below 256. */
	assert_int_equal(kl_tsc_set_khz(e->v, host + host / 5000), 0);
	assert_int_equal(e->v->tsc_ratio, 1ull << 32);
	assert_int_equal(kl_tsc_set_khz(e->v, 0), 0);
	assert_int_equal(e->v->tsc_khz, host);
	assert_int_equal(kl_tsc_set_khz(e->v, 0x7fffffff), -EINVAL);
	assert_int_equal(e->v->tsc_khz, host);
}

/* vCPUs of one rate are put in step; those of another are not. */
static void tsc_in_step(void **state)
{
	const uint64_t second = (uint64_t)kl_host_tsc_khz() * 1000;
	struct env *e = *state;
	struct kl_vcpu *w;
	uint64_t val;

	assert_int_equal(kl_x86_vcpu_create(e->vm, 1, &w), 0);
	assert_int_equal(w->tsc_offset, e->v->tsc_offset);
	assert_int_equal(kl_x86_set_msr(e->v, 0x10, 50 * second), 0);
	assert_int_not_equal(w->tsc_offset, e->v->tsc_offset);
	val = kl_x86_tsc(e->v);
	assert_int_equal(kl_x86_set_msr(w, 0x10, val), 0);
	assert_int_equal(w->tsc_offset, e->v->tsc_offset);
	val = kl_x86_tsc(w) + second / 2;
	assert_int_equal(kl_x86_set_msr(w, 0x10, val), 0);
	assert_int_equal(w->tsc_offset, e->v->tsc_offset);
	assert_int_equal(kl_x86_set_msr(w, 0x10, 1000 * second), 0);
	assert_int_not_equal(w->tsc_offset, e->v->tsc_offset);
	/* By offset: the second one that is told the same joins the first. */
	kl_tsc_set_offset(w, 4711);
	kl_tsc_set_offset(e->v, 4711);
	assert_int_equal(e->v->tsc_offset, 4711);
	assert_int_equal(kl_tsc_set_khz(w, kl_host_tsc_khz() / 2), 0);
	assert_int_equal(kl_x86_set_msr(w, 0x10, kl_x86_tsc(w)), 0);
	assert_int_not_equal(w->tsc_offset, 4711);
	kl_notifier_remove_vm(&e->vm->mem);
	kl_x86_vcpu_destroy(w);
}

/* What KVM lists although nothing in CPUID goes with it. */
static void listed_msrs(void **state)
{
	struct env *e = *state;
	uint64_t data;

	assert_int_equal(kl_x86_set_msr(e->v, 0x34, 7), 0);
	assert_int_equal(kl_x86_get_msr(e->v, 0x34, &data), 0);
	assert_int_equal(data, 7);
	assert_int_equal(kl_x86_set_msr(e->v, 0x345, 1), -EINVAL);
	assert_int_equal(kl_x86_set_msr(e->v, 0x345, 0), 0);
	if (kl_host_is_intel())
		return;
	assert_int_equal(kl_x86_set_msr(e->v, 0xc0000104, 2ull << 32), -EINVAL);
	assert_int_equal(kl_x86_get_msr(e->v, 0xc0000104, &data), 0);
	assert_int_equal(data, 1ull << 32);
	assert_int_equal(kl_x86_set_msr(e->v, 0xc001011f, 2), -EINVAL);
	assert_int_equal(kl_x86_set_msr(e->v, 0xc001011f, 4), 0);
	assert_int_equal(kl_x86_set_msr(e->v, 0xc0010117, 0x12345), 0);
	assert_int_equal(kl_x86_get_msr(e->v, 0xc0010117, &data), 0);
	assert_int_equal(data, 0x12000);
	assert_int_equal(kl_x86_set_msr(e->v, 0xc0010114, 0x20), -EINVAL);
	assert_int_equal(kl_x86_set_msr(e->v, 0xc0010114, 0x18), 0);
	assert_int_equal(kl_x86_set_msr(e->v, 0xc0010114, 0), 0);
	assert_int_equal(kl_x86_get_msr(e->v, 0xc0010114, &data), 0);
	assert_int_equal(data, 0x18);
	/* The guest has none of the last two. */
	env_code(e, 0x0f, 0x32, 0xf4); /* rdmsr; hlt */
	mode64(e, 0);
	e->v->gpr[KL_RCX] = 0xc0000104;
	assert_vector(e, 13);
}

static void platform_info(void **state)
{
	struct env *e = *state;

	env_code(e, 0xb9, 0xce, 0, 0, 0, 0x0f, 0x32, 0xf4); /* mov ecx, 0xce; rdmsr; hlt */
	mode64(e, 0);
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->gpr[KL_RAX], 1u << 31);
	e->vm->hide_platform_info = true;
	enter_at(e, CODE, STACK);
	assert_vector(e, 13);
}

static void xsave_area(void **state)
{
	struct env *e = *state;
	uint8_t area[4096];
	uint64_t bv = 2;
	uint32_t bad = 0xffffffff;
	struct kvm_fpu f;

	kl_x86_get_xsave(e->v, area, sizeof(area));
	assert_int_equal(area[512], 0); /* nothing was used yet */
	memset(area + 160, 0x5a, 16);   /* xmm0 */
	memcpy(area, "\x12\x34", 2);    /* fcw, but x87 is declared to be in its initial state */
	memcpy(area + 512, &bv, 8);
	assert_int_equal(kl_x86_set_xsave(e->v, area, sizeof(area)), 0);
	kl_x86_get_fpu(e->v, &f);
	assert_int_equal(f.xmm[0][3], 0x5a);
	assert_int_equal(f.fcw, 0x37f);
	memcpy(area + 24, &bad, 4);
	assert_int_equal(kl_x86_set_xsave(e->v, area, sizeof(area)), -EINVAL);
	kl_x86_get_xsave(e->v, area, sizeof(area));
	area[512] = 15; /* MPX */
	assert_int_equal(kl_x86_set_xsave(e->v, area, sizeof(area)), -EINVAL);
	area[512] = 3;
	area[527] = 0x80; /* compacted */
	assert_int_equal(kl_x86_set_xsave(e->v, area, sizeof(area)), -EINVAL);
	area[527] = 0;
	area[570] = 1;
	assert_int_equal(kl_x86_set_xsave(e->v, area, sizeof(area)), -EINVAL);
	area[570] = 0;

	assert_int_equal(kl_x86_set_xsave(e->v, area, sizeof(area)), 0);
	kl_x86_get_xsave(e->v, area, sizeof(area));
	assert_int_equal(area[512], 2); /* what is not in its initial state */
	if (!__builtin_cpu_supports("avx"))
		return;
	area[512] = 7;
	memset(area + 576, 0x77, 256);
	assert_int_equal(kl_x86_set_xsave(e->v, area, sizeof(area)), 0);
	memset(area, 0, sizeof(area));
	kl_x86_get_xsave(e->v, area, sizeof(area));
	assert_int_equal(area[512], 6);
	assert_int_equal(area[576 + 255], 0x77);
	/* A guest without AVX shows none. */
	e->v->supported_xcr0 = 3;
	kl_x86_get_xsave(e->v, area, sizeof(area));
	assert_int_equal(area[512], 2);
	assert_int_equal(area[576 + 255], 0);
}

static void xcr0(void **state)
{
	struct env *e = *state;
	struct kvm_xcrs x;

	kl_x86_get_xcrs(e->v, &x);
	assert_int_equal(x.nr_xcrs, 1);
	assert_int_equal(x.xcrs[0].value, 1);
	x.xcrs[0].value = 3;
	assert_int_equal(kl_x86_set_xcrs(e->v, &x), 0);
	x.xcrs[0].value = 2;
	assert_int_equal(kl_x86_set_xcrs(e->v, &x), -EINVAL);
	x.xcrs[0].value = 5;
	assert_int_equal(kl_x86_set_xcrs(e->v, &x), -EINVAL);
	x.xcrs[0].value = 0x200;
	assert_int_equal(kl_x86_set_xcrs(e->v, &x), -EINVAL);
	x.xcrs[0].value = 7;
	if (__builtin_cpu_supports("avx")) {
		/* The size of the area in CPUID follows. */
		assert_int_equal(kl_x86_find_cpuid(e->v, 0xd, 0)->ebx, 576);
		assert_int_equal(kl_x86_set_xcrs(e->v, &x), 0);
		assert_int_equal(kl_x86_find_cpuid(e->v, 0xd, 0)->ebx, 832);
		assert_int_equal(kl_x86_find_cpuid(e->v, 0xd, 0)->ecx, 832);
	} else {
		assert_int_equal(kl_x86_set_xcrs(e->v, &x), -EINVAL);
	}
	x.flags = 1;
	assert_int_equal(kl_x86_set_xcrs(e->v, &x), -EINVAL);
}

/* XSAVE and XRSTOR in the guest: what is not asked for stays. */
static void xsave_instructions(void **state)
{
	struct env *e = *state;

	/* xsave [rdi]; xrstor [rdi]; hlt */
	env_code(e, 0x0f, 0xae, 0x27, 0x0f, 0xae, 0x2f, 0xf4);
	mode64(e, 0);
	e->v->cr4 |= KL_CR4_OSXSAVE;
	e->v->xcr0 = 3;
	e->v->gpr[KL_RDI] = 0x20000;
	e->v->gpr[KL_RAX] = 2;
	memset(e->mem + 0x20000, 0xee, 512);
	memset(e->v->xsave + 160, 0x11, 256);
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->mem[0x20000 + 160], 0x11);
	assert_int_equal(e->mem[0x20000], 0xee);
	assert_int_equal(e->mem[0x20000 + 512], 2);
	/* Misaligned, and without CR4.OSXSAVE. */
	enter_at(e, CODE, STACK);
	e->v->gpr[KL_RDI] = 0x20010;
	assert_vector(e, 13);
	mode64(e, 0);
	assert_vector(e, 6);
}

/*
 * Vector instructions of each kind in a VM: whatever the build adds to the handlers, the pieces of
 * code that execute them on the host are entered with what they want. What they compute is
 * test_insn's.
 */
static void vector_instructions(void **state)
{
	struct env *e = *state;
	uint32_t in[8], out[16];
	float f;

	if (!__builtin_cpu_supports("avx2"))
		skip();
	/* vmovups ymm0, [rdi]; vpaddd ymm1, ymm0, ymm0; vaddps ymm2, ymm0, ymm0;
	 * vpaddd ymm1, ymm1, [rdi]; vmovmskps eax, ymm0; vextractf128 xmm3, ymm0, 1;
	 * paddd xmm3, xmm3; vmovups [rdi + 32], ymm1; vmovups [rdi + 64], ymm2; hlt */
	env_code(e, 0xc5, 0xfc, 0x10, 0x07, 0xc5, 0xfd, 0xfe, 0xc8, 0xc5, 0xfc, 0x58, 0xd0, 0xc5,
		 0xf5, 0xfe, 0x0f, 0xc5, 0xfc, 0x50, 0xc0, 0xc4, 0xe3, 0x7d, 0x19, 0xc3, 0x01, 0x66,
		 0x0f, 0xfe, 0xdb, 0xc5, 0xfc, 0x11, 0x4f, 0x20, 0xc5, 0xfc, 0x11, 0x57, 0x40,
		 0xf4);
	mode64(e, 0);
	e->v->cr4 |= KL_CR4_OSXSAVE | KL_CR4_OSFXSR;
	e->v->xcr0 = 7;
	e->v->gpr[KL_RDI] = 0x20000;
	for (unsigned i = 0; i < 8; i++) {
		f = i % 3 ? 1.5f * (float)i : -1.5f * (float)(i + 1);
		memcpy(&in[i], &f, 4);
	}
	memcpy(e->mem + 0x20000, in, 32);
	assert_run(e, KVM_EXIT_HLT);
	memcpy(out, e->mem + 0x20020, 64);
	for (unsigned i = 0; i < 8; i++) {
		float twice;

		assert_int_equal(out[i], 3 * in[i]);
		memcpy(&f, &in[i], 4);
		memcpy(&twice, &out[8 + i], 4);
		assert_true(twice == f + f);
	}
	assert_int_equal(e->v->gpr[KL_RAX], 0x49);
	memcpy(out, e->v->xsave + 160 + 3 * 16, 16);
	for (unsigned i = 0; i < 4; i++)
		assert_int_equal(out[i], 2 * in[4 + i]);
}

/* An x87 exception that is noted and unmasked, but that the summary bits do not show. */
#define HIDDEN_FCW 0x340
#define HIDDEN_FSW 0x0001
#define AREA       0x20000

static void hidden_exception(struct env *e)
{
	static const uint16_t words[2] = {HIDDEN_FCW, HIDDEN_FSW};
	uint64_t bv = 3;

	memset(e->mem + AREA, 0, 4096);
	memcpy(e->mem + AREA, words, 4);
	memcpy(e->mem + AREA + 24, "\x80\x1f", 2);
	memcpy(e->mem + AREA + 512, &bv, 8);
	memcpy(e->mem + AREA + 4096 - 2, "\x7f\x03", 2); /* for FLDCW */
	mode64(e, 0);
	e->v->cr4 |= KL_CR4_OSXSAVE;
	e->v->xcr0 = 3;
	e->v->gpr[KL_RDI] = AREA;
	e->v->gpr[KL_RAX] = 3;
}

/* Exactly the next waiting instruction raises #MF, and no processor of ours ever does. */
static void x87_exception_is_found(void **state)
{
	struct bytes {
		uint8_t code[7], len;
	};
	static const struct bytes load[] = {
		{{0x0f, 0xae, 0x0f}, 3}, /* fxrstor [rdi] */
		{{0x0f, 0xae, 0x2f}, 3}, /* xrstor [rdi] */
		{{0}, 0},                /* KVM_SET_FPU */
		{{0}, 0},                /* KVM_SET_XSAVE */
	};
	static const struct bytes use[] = {
		{{0xd9, 0xaf, 0xfe, 0x0f, 0, 0}, 6}, /* fldcw [rdi + 0xffe] */
		{{0xd9, 0x27}, 2},                   /* fldenv [rdi] */
		{{0xdd, 0x27}, 2},                   /* frstor [rdi] */
		{{0xd9, 0xe8}, 2},                   /* fld1 */
		{{0x0f, 0x77}, 2},                   /* emms */
		{{0x0f, 0xfc, 0xc1}, 3},             /* paddb mm0, mm1 */
		{{0x0f, 0xf7, 0xc1}, 3},             /* maskmovq mm0, mm1 */
		{{0x0f, 0x2a, 0xc1}, 3},             /* cvtpi2ps xmm0, mm1 */
		{{0xf2, 0x0f, 0xd6, 0xc1}, 4},       /* movdq2q mm0, xmm1 */
		{{0x9b}, 1},                         /* fwait */
	};
	struct env *e = *state;
	struct kvm_fpu f;

	for (unsigned i = 0; i < KL_ARRAY_SIZE(load); i++) {
		for (unsigned n = 0; n < 2 * KL_ARRAY_SIZE(use); n++) {
			unsigned k = n / 2, len = load[i].len;
			uint8_t *p = e->mem + CODE;

			memset(p, 0xf4, 64);
			memcpy(p, load[i].code, len);
			if (n & 1) { /* fnstsw ax does not wait */
				memcpy(p + len, "\xdf\xe0", 2);
				len += 2;
			}
			memcpy(p + len, use[k].code, use[k].len);
			hidden_exception(e);
			if (i == 2) {
				kl_x86_get_fpu(e->v, &f);
				f.fcw = HIDDEN_FCW;
				f.fsw = HIDDEN_FSW;
				kl_x86_set_fpu(e->v, &f);
				kl_x86_get_fpu(e->v, &f);
				assert_int_equal(f.fsw, HIDDEN_FSW);
			} else if (i == 3) {
				assert_int_equal(kl_x86_set_xsave(e->v, e->mem + AREA, 4096), 0);
			}
			assert_vector(e, 16);
			assert_int_equal(get64(e, e->v->gpr[KL_RSP]), CODE + len);
			assert_int_equal(e->v->gpr[KL_RAX] & 0xffff, n & 1 ? 0x8081 : 3);
			kl_x86_get_fpu(e->v, &f);
			assert_int_equal(f.fcw, HIDDEN_FCW);
			assert_int_equal(f.fsw, 0x8081);
		}
	}
}

/* The summary bits of an image count as little when they are set: nothing is pending. */
static void x87_summary_is_derived(void **state)
{
	struct env *e = *state;
	uint16_t fsw = 0x8081, fcw = 0x37f;

	/* fxrstor [rdi]; fld1; fstp st(0); fldenv [rdi + 0x200]; fwait; fnstsw ax; hlt */
	env_code(e, 0x0f, 0xae, 0x0f, 0xd9, 0xe8, 0xdd, 0xd8, 0xd9, 0xa7, 0, 2, 0, 0, 0x9b, 0xdf,
		 0xe0, 0xf4);
	hidden_exception(e);
	memcpy(e->mem + AREA, &fcw, 2);
	memcpy(e->mem + AREA + 2, &fsw, 2);
	memcpy(e->mem + AREA + 0x200, &fcw, 2);
	memcpy(e->mem + AREA + 0x204, &fsw, 2);
	memset(e->mem + AREA + 0x208, 0xff, 2);
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->rip, CODE + 17);
	assert_int_equal(e->v->gpr[KL_RAX] & 0xffff, 1);
}

/* FLDCW and FLDENV unmask what is noted: it comes with the next waiting instruction. */
static void x87_unmasking(void **state)
{
	struct env *e = *state;
	uint16_t fsw = 1, fcw = HIDDEN_FCW;

	/* fldcw [rdi]; fnstcw [rdi + 8]; fnstsw [rdi + 10]; fwait */
	env_code(e, 0xd9, 0x2f, 0xd9, 0x7f, 8, 0xdd, 0x7f, 10, 0x9b);
	hidden_exception(e);
	e->v->xsave[2] = 1;
	assert_vector(e, 16);
	assert_int_equal(get64(e, e->v->gpr[KL_RSP]), CODE + 8);
	assert_int_equal(get64(e, AREA + 8) & 0xffffffff, 0x80810340);
	/* fldenv [rdi]; fwait */
	env_code(e, 0xd9, 0x27, 0x9b);
	hidden_exception(e);
	kl_x86_reset(e->v, false);
	hidden_exception(e);
	memset(e->mem + AREA, 0, 28);
	memcpy(e->mem + AREA, &fcw, 2);
	memcpy(e->mem + AREA + 4, &fsw, 2);
	assert_vector(e, 16);
	assert_int_equal(get64(e, e->v->gpr[KL_RSP]), CODE + 2);
}

/* What does not wait shows the exception, stores it, or clears it. */
static void x87_without_waiting(void **state)
{
	static const struct {
		uint8_t code[3];
		uint16_t fcw, fsw; /* afterwards */
		uint16_t word[2];  /* at rdi */
	} t[] = {
		{{0xdb, 0xe3, 0xf4}, 0x37f, 0, {0x1111, 0x1111}},           /* fninit */
		{{0xdb, 0xe2, 0xf4}, HIDDEN_FCW, 0, {0x1111, 0x1111}},      /* fnclex */
		{{0xd9, 0x3f, 0xf4}, HIDDEN_FCW, 0x8081, {0x340, 0x1111}},  /* fnstcw [rdi] */
		{{0xdd, 0x3f, 0xf4}, HIDDEN_FCW, 0x8081, {0x8081, 0x1111}}, /* fnstsw [rdi] */
		{{0xd9, 0x37, 0xf4}, 0x37f, 1, {0x340, 0xffff}},            /* fnstenv [rdi] */
		{{0xdd, 0x37, 0xf4}, 0x37f, 0, {0x340, 0xffff}},            /* fnsave [rdi] */
	};
	struct env *e = *state;
	struct kvm_fpu f;

	for (unsigned i = 0; i < KL_ARRAY_SIZE(t); i++) {
		memcpy(e->mem + CODE, t[i].code, 3);
		hidden_exception(e);
		assert_int_equal(kl_x86_set_xsave(e->v, e->mem + AREA, 4096), 0);
		memset(e->mem + AREA, 0x11, 128);
		assert_run(e, KVM_EXIT_HLT);
		assert_int_equal(e->v->rip, CODE + 3);
		assert_memory_equal(e->mem + AREA, t[i].word, 4);
		if (i >= 4)
			assert_memory_equal(e->mem + AREA + 4, "\x81\x80", 2);
		kl_x86_get_fpu(e->v, &f);
		assert_int_equal(f.fcw, t[i].fcw);
		assert_int_equal(f.fsw, t[i].fsw);
	}
}

static void events(void **state)
{
	struct env *e = *state;
	struct kvm_vcpu_events ev;

	kl_x86_get_events(e->v, &ev);
	ev.exception.injected = 1;
	ev.exception.nr = 2;
	assert_int_equal(kl_x86_set_events(e->v, &ev), -EINVAL); /* an NMI is no exception */
	ev.exception.nr = 32;
	assert_int_equal(kl_x86_set_events(e->v, &ev), -EINVAL);
	ev.exception.nr = 6;
	ev.flags |= 1u << 20;
	assert_int_equal(kl_x86_set_events(e->v, &ev), -EINVAL);
	ev.flags = KVM_VCPUEVENT_VALID_PAYLOAD;
	assert_int_equal(kl_x86_set_events(e->v, &ev), -EINVAL);
	ev.flags = KVM_VCPUEVENT_VALID_SMM;
	ev.smi.smm = 1;
	assert_int_equal(kl_x86_set_events(e->v, &ev), -EINVAL);
	/* Pending counts only with the payload capability; it wins over injected. */
	e->vm->exception_payload = true;
	memset(&ev, 0, sizeof(ev));
	ev.flags = KVM_VCPUEVENT_VALID_PAYLOAD;
	ev.exception.pending = ev.exception.injected = 1;
	ev.exception.nr = 14;
	ev.exception_has_payload = 1;
	ev.exception_payload = 0xabc;
	assert_int_equal(kl_x86_set_events(e->v, &ev), 0);
	kl_x86_get_events(e->v, &ev);
	assert_int_equal(ev.exception.pending, 1);
	assert_int_equal(ev.exception.injected, 0);
	assert_int_equal(ev.exception_payload, 0xabc);
	assert_int_equal(e->v->cr2, 0);
}

static void mp_states(void **state)
{
	struct env *e = *state;
	struct kvm_mp_state m = {KVM_MP_STATE_HALTED};

	assert_int_equal(kl_x86_set_mp_state(e->v, &m), -EINVAL);
	m.mp_state = KVM_MP_STATE_RUNNABLE;
	assert_int_equal(kl_x86_set_mp_state(e->v, &m), 0);
}

static void debug_registers(void **state)
{
	struct env *e = *state;
	struct kvm_debugregs d;

	kl_x86_get_debugregs(e->v, &d);
	assert_int_equal(d.dr6, 0xffff0ff0);
	assert_int_equal(d.dr7, 0x400);
	d.db[2] = 0x1234;
	assert_int_equal(kl_x86_set_debugregs(e->v, &d), 0);
	d.dr7 = 1ull << 32;
	assert_int_equal(kl_x86_set_debugregs(e->v, &d), -EINVAL);
	d.dr7 = 0;
	d.flags = 1;
	assert_int_equal(kl_x86_set_debugregs(e->v, &d), -EINVAL);
	assert_int_equal(e->v->dr[2], 0x1234);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, env_setup, env_teardown)
	const struct CMUnitTest tests[] = {
		TEST(power_on),
		TEST(sregs_checks),
		TEST(sregs2_pdptrs),
		TEST(cr4_follows_cpuid),
		TEST(cpuid_is_fixed_after_running),
		TEST(cpuid_instruction),
		TEST(msr_lists),
		TEST(msr_of_no_vendor),
		TEST(msr_checks),
		TEST(tsc),
		TEST(tsc_scaling),
		TEST(tsc_in_step),
		TEST(listed_msrs),
		TEST(platform_info),
		TEST(xsave_area),
		TEST(xcr0),
		TEST(xsave_instructions),
		TEST(vector_instructions),
		TEST(x87_exception_is_found),
		TEST(x87_summary_is_derived),
		TEST(x87_unmasking),
		TEST(x87_without_waiting),
		TEST(events),
		TEST(mp_states),
		TEST(debug_registers),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
