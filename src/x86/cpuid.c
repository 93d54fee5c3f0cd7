/* SPDX-License-Identifier: MIT */
/*
 * CPUID: what kvmlet can honestly offer, what the program chose, the instruction.
 *
 * A feature is offered if the host has it (native thunks run on the host) and the engine
 * implements it: the masks below are the list of what it implements. Whoever adds
 * instructions adds the bit here; nothing else turns a feature on.
 */
#include "x86/guest_cpuid.h"

#include <cpuid.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "x86/control.h"
#include "x86/fpu.h"
#include "x86/insn.h"
#include "x86/lapic.h"
#include "x86/msr.h"
#include "x86/paravirt.h"
#include "x86/tsc.h"

#define BIT(n) (1u << (n))
static const char KVM_SIGNATURE[12] = "KVMKVMKVM"; /* EBX, ECX, EDX */
static const char XEN_SIGNATURE[] = "XenVMMXenVMM";
#define KVM_FEATURES_LEAF 0x40000001u
#define XCR0_TILE_DATA    (1u << 18)

#define MAX_ENTRIES 256u

/* ---- what the engine implements ---- */

enum { EAX, EBX, ECX, EDX };

#define F_1_ECX                                                                                   \
	(BIT(0) /* SSE3 */ | BIT(1) /* PCLMULQDQ */ | BIT(9) /* SSSE3 */ | BIT(13) /* CX16 */ |   \
	 BIT(17) /* PCID */ | BIT(19) /* SSE4.1 */ | BIT(20) /* SSE4.2 */ | BIT(22) /* MOVBE */ | \
	 BIT(23) /* POPCNT */ | BIT(25) /* AES */ | BIT(26) /* XSAVE */ | BIT(12) /* FMA */ |     \
	 BIT(28) /* AVX */ | BIT(29) /* F16C */ | BIT(30) /* RDRAND */)
#define F_1_ECX_EMULATED BIT(21) /* x2APIC: software, whatever the host has */
#define F_1_EDX                                                                                 \
	(BIT(0) /* FPU */ | BIT(1) /* VME */ | BIT(2) /* DE */ | BIT(3) /* PSE */ |             \
	 BIT(4) /* TSC */ | BIT(5) /* MSR */ | BIT(6) /* PAE */ | BIT(7) /* MCE */ |            \
	 BIT(8) /* CX8 */ | BIT(9) /* APIC */ | BIT(11) /* SEP */ | BIT(12) /* MTRR */ |        \
	 BIT(13) /* PGE */ | BIT(14) /* MCA */ | BIT(15) /* CMOV */ | BIT(16) /* PAT */ |       \
	 BIT(17) /* PSE36 */ | BIT(19) /* CLFLUSH */ | BIT(23) /* MMX */ | BIT(24) /* FXSR */ | \
	 BIT(25) /* SSE */ | BIT(26) /* SSE2 */ | BIT(27) /* SS */)
#define F_7_EBX                                                                          \
	(BIT(0) /* FSGSBASE */ | BIT(3) /* BMI1 */ | BIT(6) /* FDP_EXCPTN_ONLY */ |      \
	 BIT(5) /* AVX2 */ | BIT(7) /* SMEP */ | BIT(8) /* BMI2 */ | BIT(9) /* ERMS */ | \
	 BIT(10) /* INVPCID */ | BIT(13) /* ZERO_FCS_FDS */ | BIT(19) /* ADX */ |        \
	 BIT(18) /* RDSEED */ | BIT(20) /* SMAP */ | BIT(23) /* CLFLUSHOPT */ |          \
	 BIT(24) /* CLWB */ | BIT(29) /* SHA */)
#define F_7_EBX_EMULATED BIT(1) /* TSC_ADJUST: software, whatever the host has */
#define F_7_ECX                                                                                 \
	(BIT(2) /* UMIP */ | BIT(8) /* GFNI */ | BIT(9) /* VAES */ | BIT(10) /* VPCLMULQDQ */ | \
	 BIT(16) /* LA57 */ | BIT(22) /* RDPID */)
/* Those of them that need the wide registers, which the host's kernel must have enabled. */
#define F_1_ECX_AVX     (BIT(12) | BIT(28) | BIT(29))
#define F_7_EBX_AVX     BIT(5)
#define F_7_ECX_AVX     (BIT(9) | BIT(10))
#define XSAVE_COMPACTED (BIT(1) /* XSAVEC */ | BIT(3) /* XSAVES */)
#define F_7_EDX         BIT(4) /* FSRM */
#define F_8_1_ECX                                                                   \
	(BIT(0) /* LAHF_LM */ | BIT(1) /* CMP_LEGACY */ | BIT(4) /* CR8_LEGACY */ | \
	 BIT(5) /* ABM */ | BIT(6) /* SSE4A */ | BIT(7) /* MISALIGNSSE */ |         \
	 BIT(8) /* 3DNOWPREFETCH */ | BIT(22) /* TOPOEXT */)
#define F_8_1_EDX                                                                       \
	((F_1_EDX & 0x0183f3ff & ~BIT(25)) | BIT(11) /* SYSCALL */ | BIT(20) /* NX */ | \
	 BIT(22) /* MMXEXT */ | BIT(26) /* 1 GiB pages */ | BIT(27) /* RDTSCP */ |      \
	 BIT(29) /* LM */)
#define F_8_8_EBX  (BIT(0) /* CLZERO */ | BIT(2) /* error pointers always saved */)
#define F_8_7_EDX  BIT(8) /* invariant TSC */
#define F_8_21_EAX (BIT(2) /* LFENCE serializes */ | BIT(6) /* null selectors clear the base */)

struct regs {
	uint32_t r[4];
};

static struct regs host(uint32_t fn, uint32_t index)
{
	struct regs x = {{0, 0, 0, 0}};
	uint32_t base = fn & 0x80000000u;

	if (fn <= (uint32_t)__get_cpuid_max(base, NULL))
		__cpuid_count(fn, index, x.r[0], x.r[1], x.r[2], x.r[3]);
	return x;
}

/* ---- KVM_GET_SUPPORTED_CPUID ---- */

struct list {
	struct kvm_cpuid_entry2 *e;
	unsigned n, max;
};

static bool indexed(uint32_t fn)
{
	switch (fn) {
	case 4:
	case 7:
	case 0xb:
	case 0xd:
	case 0xf:
	case 0x10:
	case 0x12:
	case 0x14:
	case 0x17:
	case 0x18:
	case 0x1d:
	case 0x1e:
	case 0x1f:
	case 0x24:
	case 0x8000001d:
		return true;
	default:
		return false;
	}
}

static struct kvm_cpuid_entry2 *add(struct list *l, uint32_t fn, uint32_t index)
{
	struct kvm_cpuid_entry2 *e;
	struct regs x = {{0, 0, 0, 0}};

	if (l->n == l->max)
		return NULL;
	if ((fn & 0xc0000000) != 0x40000000)
		x = host(fn, index);
	e = &l->e[l->n++];
	*e = (struct kvm_cpuid_entry2){.function = fn,
				       .index = index,
				       .flags = indexed(fn) ? KVM_CPUID_FLAG_SIGNIFCANT_INDEX : 0,
				       .eax = x.r[0],
				       .ebx = x.r[1],
				       .ecx = x.r[2],
				       .edx = x.r[3]};
	return e;
}

static void zero(struct kvm_cpuid_entry2 *e)
{
	e->eax = e->ebx = e->ecx = e->edx = 0;
}

/* Entries until the cache type is 0. */
static int add_caches(struct list *l, struct kvm_cpuid_entry2 *e)
{
	uint32_t fn = e->function;

	for (uint32_t i = 1; e->eax & 0x1f; i++) {
		e = add(l, fn, i);
		if (!e)
			return -E2BIG;
	}
	return 0;
}

/* The instructions, then a subleaf per component beyond x87 and SSE. XSS has no bits. */
static int add_xsave(struct list *l)
{
	struct kvm_cpuid_entry2 *e = add(l, 0xd, 1);

	if (!e)
		return -E2BIG;
	e->eax = kl_xsave_features();
	e->ebx = e->eax & XSAVE_COMPACTED ? kl_xsave_size(kl_xcr0_supported()) : 0;
	e->ecx = e->edx = 0;
	if (!(kl_xcr0_supported() & 4))
		return 0;
	e = add(l, 0xd, 2);
	if (!e)
		return -E2BIG;
	e->ecx = e->edx = 0;
	return 0;
}

static int add_function(struct list *l, uint32_t fn)
{
	struct kvm_cpuid_entry2 *e = add(l, fn, 0);
	bool avx = kl_xcr0_supported() & 4;

	if (!e)
		return -E2BIG;
	switch (fn) {
	case 0:
		e->eax = kl_min(e->eax, 0x24u);
		break;
	case 1:
		e->ecx &= avx ? F_1_ECX : F_1_ECX & ~F_1_ECX_AVX;
		e->ecx |= F_1_ECX_EMULATED;
		e->edx &= F_1_EDX;
		break;
	case 2:
	case 0x80000002 ... 0x80000006:
		if (fn == 0x80000006)
			e->edx &= ~0x30000u;
		break;
	case 4:
	case 0x8000001d:
		return add_caches(l, e);
	case 6:
		zero(e);
		e->eax = 4; /* ARAT */
		break;
	case 7:
		e->eax = 0; /* no further subleaf has anything the engine implements */
		e->ebx = (e->ebx & (avx ? F_7_EBX : F_7_EBX & ~F_7_EBX_AVX)) | F_7_EBX_EMULATED;
		e->ecx &= avx ? F_7_ECX : F_7_ECX & ~F_7_ECX_AVX;
		e->edx &= F_7_EDX;
		break;
	case 0xb:
	case 0x1f: /* no topology: subleaf 1 is missing */
		e->eax = e->ebx = e->ecx = 0;
		break;
	case 0xd:
		if (!(host(1, 0).r[ECX] & BIT(26))) {
			zero(e);
			break;
		}
		e->eax = (uint32_t)kl_xcr0_supported();
		e->ebx = e->ecx = kl_xsave_size(kl_xcr0_supported());
		e->edx = 0;
		return add_xsave(l);
	case 0x40000000:
		e->eax = KVM_FEATURES_LEAF;
		memcpy(&e->ebx, KVM_SIGNATURE, sizeof(KVM_SIGNATURE));
		break;
	case KVM_FEATURES_LEAF:
		e->eax = kl_pv_supported_features();
		break;
	case 0x80000000:
		e->eax = kl_min(e->eax, 0x80000022u);
		if (e->eax >= 0x8000001d)
			e->eax = kl_max(e->eax, 0x80000021u);
		break;
	case 0x80000001:
		e->ebx &= 0xf000ffff;
		e->ecx &= F_8_1_ECX;
		e->edx &= F_8_1_EDX;
		break;
	case 0x80000007:
		e->eax = e->ebx = e->ecx = 0;
		e->edx &= F_8_7_EDX;
		break;
	case 0x80000008: {
		uint32_t phys = kl_min(e->eax & 0xff, 52u);
		uint32_t virt = kl_max((e->eax >> 8) & 0xff, 48u);

		e->eax = phys | virt << 8 | phys << 16;
		e->ebx &= F_8_8_EBX;
		e->ecx &= ~0xffff0f00u;
		e->edx = 0;
		break;
	}
	case 0x80000019:
		e->ecx = e->edx = 0;
		break;
	case 0x8000001a:
		e->eax &= 7;
		e->ebx = e->ecx = e->edx = 0;
		break;
	case 0x80000021:
		zero(e);
		e->eax = F_8_21_EAX;
		break;
	default:
		zero(e);
		break;
	}
	return 0;
}

int kl_x86_supported_cpuid(struct kvm_cpuid_entry2 *entries, unsigned max)
{
	static const uint32_t base[] = {0, 0x80000000, 0x40000000};
	struct list l = {entries, 0, max};

	for (unsigned i = 0; i < KL_ARRAY_SIZE(base); i++) {
		unsigned first = l.n;
		uint32_t limit;
		int r = add_function(&l, base[i]);

		if (r)
			return r;
		limit = entries[first].eax;
		for (uint32_t fn = base[i] + 1; fn <= limit; fn++) {
			r = add_function(&l, fn);
			if (r)
				return r;
		}
	}
	return (int)l.n;
}

/* Features that work although the host CPU lacks them. */
int kl_x86_emulated_cpuid(struct kvm_cpuid_entry2 *e, unsigned max)
{
	if (max < 3)
		return -E2BIG;
	memset(e, 0, 3 * sizeof(*e));
	e[0].eax = 7;
	e[1].function = 1;
	e[1].ecx = BIT(22); /* MOVBE */
	e[2].function = 7;
	e[2].flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
	e[2].ecx = BIT(22); /* RDPID */
	return 3;
}

uint64_t kl_cr4_supported(void)
{
	static _Atomic uint64_t cached;
	uint64_t cr4 = atomic_load_explicit(&cached, memory_order_relaxed);
	struct regs l1, l7;

	if (cr4)
		return cr4;
	l1 = host(1, 0);
	l7 = host(7, 0);
	cr4 = KL_CR4_VME | KL_CR4_PVI | KL_CR4_TSD | KL_CR4_DE | KL_CR4_PSE | KL_CR4_PAE |
	      KL_CR4_MCE | KL_CR4_PGE | KL_CR4_PCE | KL_CR4_OSFXSR | KL_CR4_OSXMMEXCPT;
	l1.r[ECX] &= F_1_ECX;
	l7.r[EBX] &= F_7_EBX;
	l7.r[ECX] &= F_7_ECX;
	cr4 |= l1.r[ECX] & BIT(17) ? KL_CR4_PCIDE : 0;
	cr4 |= l1.r[ECX] & BIT(26) ? KL_CR4_OSXSAVE : 0;
	cr4 |= l7.r[EBX] & BIT(0) ? KL_CR4_FSGSBASE : 0;
	cr4 |= l7.r[EBX] & BIT(7) ? KL_CR4_SMEP : 0;
	cr4 |= l7.r[EBX] & BIT(20) ? KL_CR4_SMAP : 0;
	cr4 |= l7.r[ECX] & BIT(2) ? KL_CR4_UMIP : 0;
	cr4 |= l7.r[ECX] & BIT(16) ? KL_CR4_LA57 : 0;
	atomic_store_explicit(&cached, cr4, memory_order_relaxed);
	return cr4;
}

/* ---- the program's choice ---- */

static const struct kvm_cpuid_entry2 *find(const struct kvm_cpuid_entry2 *e, unsigned n,
					   uint32_t fn, uint32_t index)
{
	for (unsigned i = 0; i < n; i++)
		if (e[i].function == fn &&
		    (!(e[i].flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) || e[i].index == index))
			return &e[i];
	return NULL;
}

const struct kvm_cpuid_entry2 *kl_x86_find_cpuid(struct kl_vcpu *v, uint32_t fn, uint32_t index)
{
	return find(v->cpuid, v->nr_cpuid, fn, index);
}

static uint32_t reg_of(const struct kvm_cpuid_entry2 *e, unsigned reg)
{
	return reg == EAX ? e->eax : reg == EBX ? e->ebx : reg == ECX ? e->ecx : e->edx;
}

bool kl_guest_has(struct kl_vcpu *v, uint32_t fn, uint32_t index, unsigned reg, unsigned bit)
{
	const struct kvm_cpuid_entry2 *e = kl_x86_find_cpuid(v, fn, index);

	return e && (reg_of(e, reg) & BIT(bit));
}

/* Hypervisors' leaves may begin at each of these. */
#define KVM_BASE      0x40000000u
#define KVM_BASE_END  0x40010000u
#define KVM_BASE_STEP 0x100u

#define XEN_CLOCK_LEAF 3u

/* The first leaf of the hypervisor with this signature. */
static const struct kvm_cpuid_entry2 *find_hypervisor(const struct kvm_cpuid_entry2 *e, unsigned n,
						      const char *signature)
{
	for (uint32_t base = KVM_BASE; base < KVM_BASE_END; base += KVM_BASE_STEP) {
		const struct kvm_cpuid_entry2 *s = find(e, n, base, 0);

		if (s && !memcmp(&s->ebx, signature, sizeof(KVM_SIGNATURE)))
			return s;
	}
	return NULL;
}

static const struct kvm_cpuid_entry2 *find_kvm(const struct kvm_cpuid_entry2 *e, unsigned n,
					       uint32_t fn)
{
	const struct kvm_cpuid_entry2 *s = find_hypervisor(e, n, KVM_SIGNATURE);

	return s ? find(e, n, s->function | fn, 0) : NULL;
}

static void put_bit(uint32_t *r, unsigned bit, bool on)
{
	*r = on ? *r | BIT(bit) : *r & ~BIT(bit);
}

/* Bits that follow the state of the vCPU. */
static void refresh(struct kl_vcpu *v, struct kvm_cpuid_entry2 *e, unsigned n)
{
	struct kvm_cpuid_entry2 *x = (struct kvm_cpuid_entry2 *)find(e, n, 1, 0);

	if (x) {
		if (kl_cr4_supported() & KL_CR4_OSXSAVE)
			put_bit(&x->ecx, 27, v->cr4 & KL_CR4_OSXSAVE);
		put_bit(&x->edx, 9, v->apic_base & KL_APIC_BASE_ENABLE);
		if (v->kvm->disabled_quirks & KL_QUIRK_MISC_ENABLE_NO_MWAIT)
			put_bit(&x->ecx, 3, v->msr_misc_enable & (1u << 18));
	}
	x = (struct kvm_cpuid_entry2 *)find(e, n, 0xd, 0);
	if (x)
		x->ebx = kl_xsave_size(v->xcr0);
	x = (struct kvm_cpuid_entry2 *)find(e, n, 0xd, 1);
	if (x && (x->eax & XSAVE_COMPACTED))
		x->ebx = kl_xsave_size(v->xcr0);
	/* A vCPU that halts without exits cannot be kicked out of it. */
	x = (struct kvm_cpuid_entry2 *)find_kvm(e, n, 1);
	if (x && (v->kvm->disabled_exits & KVM_X86_DISABLE_EXITS_HLT))
		put_bit(&x->eax, KL_PV_UNHALT, false);
}

void kl_x86_refresh_cpuid(struct kl_vcpu *v)
{
	refresh(v, v->cpuid, v->nr_cpuid);
	v->has_mwait = kl_guest_has(v, 1, 0, ECX, 3);
}

static bool vendor_is_amd(const struct kvm_cpuid_entry2 *e)
{
	return (e->ebx == 0x68747541 && e->edx == 0x69746e65 && e->ecx == 0x444d4163) ||
	       (e->ebx == 0x6f677948 && e->edx == 0x6e65476e && e->ecx == 0x656e6975);
}

const struct kvm_cpuid_entry2 *kl_kvm_cpuid(struct kl_vcpu *v, uint32_t fn)
{
	return find_kvm(v->cpuid, v->nr_cpuid, fn);
}

void kl_cpuid_set_xen_clock(struct kl_vcpu *v, uint32_t mul, int8_t shift)
{
	const struct kvm_cpuid_entry2 *s = find_hypervisor(v->cpuid, v->nr_cpuid, XEN_SIGNATURE);
	struct kvm_cpuid_entry2 *e;
	uint32_t fn;

	if (!s)
		return;
	fn = s->function | XEN_CLOCK_LEAF;
	if (fn > s->eax)
		return;
	e = (struct kvm_cpuid_entry2 *)find(v->cpuid, v->nr_cpuid, fn, 1);
	if (e) {
		e->ecx = mul;
		e->edx = (uint32_t)shift;
	}
	e = (struct kvm_cpuid_entry2 *)find(v->cpuid, v->nr_cpuid, fn, 2);
	if (e)
		e->eax = v->tsc_khz;
}

static void derive(struct kl_vcpu *v)
{
	const struct kvm_cpuid_entry2 *e;

	v->maxphyaddr = 36;
	e = kl_x86_find_cpuid(v, 0x80000000, 0);
	if (e && e->eax >= 0x80000008) {
		e = kl_x86_find_cpuid(v, 0x80000008, 0);
		if (e)
			v->maxphyaddr = e->eax & 0xff;
	}
	v->maxphyaddr = kl_min(v->maxphyaddr, 52u);

	v->cr4_reserved = 0;
	v->cr4_reserved |= kl_guest_has(v, 1, 0, ECX, 26) ? 0 : KL_CR4_OSXSAVE;
	v->cr4_reserved |= kl_guest_has(v, 1, 0, ECX, 17) ? 0 : KL_CR4_PCIDE;
	v->cr4_reserved |= kl_guest_has(v, 7, 0, EBX, 0) ? 0 : KL_CR4_FSGSBASE;
	v->cr4_reserved |= kl_guest_has(v, 7, 0, EBX, 7) ? 0 : KL_CR4_SMEP;
	v->cr4_reserved |= kl_guest_has(v, 7, 0, EBX, 20) ? 0 : KL_CR4_SMAP;
	v->cr4_reserved |= kl_guest_has(v, 7, 0, ECX, 2) ? 0 : KL_CR4_UMIP;
	v->cr4_reserved |= kl_guest_has(v, 7, 0, ECX, 16) ? 0 : KL_CR4_LA57;
	v->cr4_reserved |= kl_guest_has(v, 7, 0, ECX, 3) ? 0 : KL_CR4_PKE;

	v->efer_allowed = KL_EFER_SCE;
	v->efer_allowed |= kl_guest_has(v, 0x80000001, 0, EDX, 29) ? KL_EFER_LME | KL_EFER_LMA : 0;
	v->efer_allowed |= kl_guest_has(v, 0x80000001, 0, EDX, 20) ? KL_EFER_NX : 0;

	e = kl_x86_find_cpuid(v, 0xd, 0);
	v->supported_xcr0 = e ? e->eax & kl_xcr0_supported() : 0;
	v->has_rdtscp = kl_guest_has(v, 0x80000001, 0, EDX, 27);
	v->has_rdpid = kl_guest_has(v, 7, 0, ECX, 22);
	v->has_invpcid = kl_guest_has(v, 7, 0, EBX, 10);
	v->has_tsc_adjust = kl_guest_has(v, 7, 0, EBX, 1);
	v->has_mwait = kl_guest_has(v, 1, 0, ECX, 3);
	v->has_x2apic = kl_guest_has(v, 1, 0, ECX, 21);
	v->has_tsc_deadline = kl_guest_has(v, 1, 0, ECX, 24);
	e = kl_x86_find_cpuid(v, 0, 0);
	v->intel_compatible = !e || !vendor_is_amd(e);
}

void kl_cpuid_defaults(struct kl_vcpu *v)
{
	derive(v);
	/* Without CPUID the program may still set every bit that the engine has. */
	v->cr4_reserved = 0;
}

int kl_x86_set_cpuid(struct kl_vcpu *v, const struct kvm_cpuid_entry2 *in, unsigned n)
{
	struct kvm_cpuid_entry2 *e = NULL;
	const struct kvm_cpuid_entry2 *x;
	int r = 0;

	if (n > MAX_ENTRIES)
		return -E2BIG;
	if (n) {
		e = malloc(n * sizeof(*e));
		if (!e)
			return -ENOMEM;
		memcpy(e, in, n * sizeof(*e));
		kl_not_leaked(e);
	}
	refresh(v, e, n);
	if (v->runnable_once) {
		/* The model is fixed once the vCPU has run; setting it again is allowed. */
		if (n != v->nr_cpuid)
			r = -EINVAL;
		for (unsigned i = 0; !r && i < n; i++)
			if (memcmp(&e[i], &v->cpuid[i], offsetof(struct kvm_cpuid_entry2, padding)))
				r = -EINVAL;
		free(e);
		return r;
	}
	x = find(e, n, 0x80000008, 0);
	if (x) {
		unsigned bits = (x->eax >> 8) & 0xff;

		if (bits != 48 && bits != 57 && bits != 0) {
			free(e);
			return -EINVAL;
		}
	}
	/* AMX's tiles need the kernel's permission (ARCH_REQ_XCOMP_GUEST_PERM), which nobody has.
	 */
	x = find(e, n, 0xd, 0);
	if (x && (x->eax & XCR0_TILE_DATA)) {
		free(e);
		return -EPERM;
	}
	free(v->cpuid);
	v->cpuid = e;
	v->nr_cpuid = n;
	derive(v);
	kl_apic_cpuid_changed(v);
	kl_pv_cpuid_changed(v);
	kl_tlb_flush(v);
	return 0;
}

/* ---- the instruction ---- */

/* Intel: a leaf beyond the last one of its class answers as the last basic leaf. */
static const struct kvm_cpuid_entry2 *out_of_range(struct kl_vcpu *v, uint32_t fn, uint32_t index)
{
	const struct kvm_cpuid_entry2 *basic = kl_x86_find_cpuid(v, 0, 0), *class;

	if (!basic || vendor_is_amd(basic))
		return NULL;
	if (fn >= 0x40000000 && fn <= 0x4fffffff)
		class = kl_x86_find_cpuid(v, fn & 0xffffff00, 0);
	else if (fn >= 0xc0000000)
		class = kl_x86_find_cpuid(v, 0xc0000000, 0);
	else
		class = kl_x86_find_cpuid(v, fn & 0x80000000, 0);
	if (class && fn <= class->eax)
		return NULL;
	return kl_x86_find_cpuid(v, basic->eax, index);
}

enum kl_next kl_op_cpuid(struct kl_vcpu *v, const struct kl_op *op)
{
	uint32_t fn = (uint32_t)v->gpr[KL_RAX], index = (uint32_t)v->gpr[KL_RCX];
	const struct kvm_cpuid_entry2 *e;
	struct regs x = {{0, 0, 0, 0}};

	if ((v->msr_misc_features & 1) && v->cpl)
		kl_raise_error(v, KL_EXC_GP, 0); /* CPUID faulting */
	e = kl_x86_find_cpuid(v, fn, index);
	if (!e)
		e = out_of_range(v, fn, index);
	if (e) {
		x = (struct regs){{e->eax, e->ebx, e->ecx, e->edx}};
	} else if (fn == 0xb || fn == 0x1f) {
		e = kl_x86_find_cpuid(v, fn, 1);
		if (e) {
			x.r[ECX] = index & 0xff;
			x.r[EDX] = e->edx;
		}
	}
	if (fn == 0x80000007 && kl_pv_hides_invariant_tsc(v))
		x.r[EDX] &= ~BIT(8);
	v->gpr[KL_RAX] = x.r[EAX];
	v->gpr[KL_RBX] = x.r[EBX];
	v->gpr[KL_RCX] = x.r[ECX];
	v->gpr[KL_RDX] = x.r[EDX];
	return KL_NEXT;
}

/* ---- TSC frequency ---- */

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC_RAW, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint32_t measure_khz(void)
{
	const struct timespec pause = {0, 4000000};
	uint64_t ns = now_ns(), tsc = __builtin_ia32_rdtsc();

	nanosleep(&pause, NULL);
	ns = now_ns() - ns;
	tsc = __builtin_ia32_rdtsc() - tsc;
	return ns ? (uint32_t)(tsc * 1000000 / ns) : 1000000;
}

uint32_t kl_host_tsc_khz(void)
{
	static _Atomic uint32_t cached;
	uint32_t khz = atomic_load_explicit(&cached, memory_order_relaxed);
	struct regs x;

	if (khz)
		return khz;
	x = host(0x15, 0);
	if (x.r[EAX] && x.r[EBX] && x.r[ECX])
		khz = (uint32_t)((uint64_t)x.r[ECX] * x.r[EBX] / x.r[EAX] / 1000);
	if (!khz && (host(1, 0).r[ECX] & BIT(31))) {
		/* A hypervisor's timing leaf, where there is one. */
		__cpuid(0x40000000, x.r[0], x.r[1], x.r[2], x.r[3]);
		if (x.r[EAX] >= 0x40000010 && x.r[EAX] < 0x40000100) {
			__cpuid(0x40000010, x.r[0], x.r[1], x.r[2], x.r[3]);
			if (x.r[EAX] > 100000 && x.r[EAX] < 20000000)
				khz = x.r[EAX];
		}
	}
	if (!khz)
		khz = measure_khz();
	atomic_store_explicit(&cached, khz, memory_order_relaxed);
	return khz;
}
