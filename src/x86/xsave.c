/* SPDX-License-Identifier: MIT */
/*
 * The XSAVE family, XCR0, and KVM's ioctls for both.
 *
 * v->xsave holds the state in the standard format; its header is not used. What is in use
 * (XINUSE) is found by looking at the registers, as AMD's processors do: a component is in use
 * unless it has its initial values. The modified optimization, which may skip what memory has
 * already, is never made. AVX state lies at the same place in the standard and in the compacted
 * format.
 */
#include <cpuid.h>
#include <errno.h>
#include <string.h>
#include <Zydis/Zydis.h>

#include "host/cpu.h"
#include "x86/access.h"
#include "x86/control.h"
#include "x86/fpu.h"
#include "x86/guest_cpuid.h"
#include "x86/paging.h"
#include "x86/vector.h"

#define X87 1ull
#define SSE 2ull
#define AVX 4ull

#define MXCSR_INIT   0x1f80u
#define XMM          160u
#define HEADER       512u
#define YMM_HI       576u
#define AREA_SSE     576u
#define AREA_AVX     832u
#define COMPACTED    (1ull << 63)
#define FX_USED      416u
#define HAS_XSAVEOPT (1u << 0)
#define HAS_XSAVEC   (1u << 1)
#define HAS_XGETBV1  (1u << 2)
#define HAS_XSAVES   (1u << 3)

unsigned kl_xsave_size(uint64_t components)
{
	return components & AVX ? AREA_AVX : AREA_SSE;
}

/* CPUID is slow in a virtual machine: once. Bit 31 marks that it was asked. */
uint32_t kl_xsave_features(void)
{
	static _Atomic uint32_t cached;
	uint32_t r = atomic_load_explicit(&cached, memory_order_relaxed);
	unsigned a, b, c, d;

	if (!r) {
		r = 1u << 31;
		if (__get_cpuid_count(0xd, 1, &a, &b, &c, &d))
			r |= a & (HAS_XSAVEOPT | HAS_XSAVEC | HAS_XGETBV1 | HAS_XSAVES);
		atomic_store_explicit(&cached, r, memory_order_relaxed);
	}
	return r & 0xf;
}

uint64_t kl_xcr0_supported(void)
{
	return X87 | SSE | (__builtin_cpu_supports("avx") ? AVX : 0);
}

/* ---- which components are in use ------------------------------------------------------------ */

static bool all_zero(const uint8_t *p, unsigned n)
{
	uint64_t x = 0, y;

	for (unsigned i = 0; i < n; i += 8) {
		memcpy(&y, p + i, 8);
		x |= y;
	}
	return !x;
}

/* Outside 64-bit code there are eight vector registers. */
static unsigned vector_bytes(const struct kl_vcpu *v)
{
	return 16 * (v->code_mode == KL_CODE64 ? 16 : 8);
}

static uint32_t mxcsr_of(const struct kl_vcpu *v)
{
	uint32_t mxcsr;

	memcpy(&mxcsr, v->xsave + 24, 4);
	return mxcsr;
}

static uint64_t in_use(const struct kl_vcpu *v, unsigned bytes)
{
	static const uint8_t init[8] = {0x7f, 0x03};
	const uint8_t *x = v->xsave;
	uint64_t bv = 0;

	if (memcmp(x, init, 8) || !all_zero(x + 8, 16) || !all_zero(x + 32, 128))
		bv |= X87;
	if (!all_zero(x + XMM, bytes))
		bv |= SSE;
	if (!all_zero(x + YMM_HI, bytes))
		bv |= AVX;
	return bv;
}

/* For what treats MXCSR as a part of SSE. */
static uint64_t in_use_mxcsr(const struct kl_vcpu *v, unsigned bytes)
{
	return in_use(v, bytes) | (mxcsr_of(v) != MXCSR_INIT ? SSE : 0);
}

/* ---- instructions --------------------------------------------------------------------------- */

enum kind { PLAIN, OPT, COMPACT, SUPERVISOR };

static enum kind kind_of(unsigned mnemonic)
{
	switch (mnemonic) {
	case ZYDIS_MNEMONIC_XSAVEOPT:
	case ZYDIS_MNEMONIC_XSAVEOPT64:
		return OPT;
	case ZYDIS_MNEMONIC_XSAVEC:
	case ZYDIS_MNEMONIC_XSAVEC64:
		return COMPACT;
	case ZYDIS_MNEMONIC_XSAVES:
	case ZYDIS_MNEMONIC_XSAVES64:
	case ZYDIS_MNEMONIC_XRSTORS:
	case ZYDIS_MNEMONIC_XRSTORS64:
		return SUPERVISOR;
	default:
		return PLAIN;
	}
}

static KL_NORETURN KL_COLD void gp(struct kl_vcpu *v)
{
	kl_raise_error(v, KL_EXC_GP, 0);
}

/*
 * Only where the host has it. VMX can refuse XSAVES and XRSTORS to a guest that was not
 * promised them, and KVM does; SVM cannot.
 */
static void check(struct kl_vcpu *v, enum kind kind)
{
	static const uint32_t need[] = {0, HAS_XSAVEOPT, HAS_XSAVEC, HAS_XSAVES};

	if (!(v->cr4 & KL_CR4_OSXSAVE) || (need[kind] & ~kl_xsave_features()))
		kl_raise(v, KL_EXC_UD);
	if (kind == SUPERVISOR && kl_host_is_intel() && !kl_guest_has(v, 0xd, 1, 0, 3))
		kl_raise(v, KL_EXC_UD);
	if (v->cr0 & KL_CR0_TS)
		kl_raise(v, KL_EXC_NM);
	if (kind == SUPERVISOR && v->cpl)
		gp(v);
}

/* Requested-feature bitmap. No supervisor component exists. */
static uint64_t requested(const struct kl_vcpu *v)
{
	return (v->gpr[KL_RDX] << 32 | (uint32_t)v->gpr[KL_RAX]) & v->xcr0;
}

static uint64_t area_lin(struct kl_vcpu *v, const struct kl_op *op, uint64_t rfbm, bool write)
{
	uint64_t lin = kl_area_lin(v, op, kl_xsave_size(rfbm), write);

	if (kl_host_is_intel() && !kl_canonical(v, lin)) /* may be #SS, aligned or not */
		kl_raise_not_canonical(v, lin);
	if (lin & 63)
		gp(v);
	return lin;
}

/* @len bytes of the area. With 32-bit addresses offsets wrap on Intel's processors. */
struct area {
	const struct kl_op *op;
	uint64_t lin;
};

static uint64_t part(struct kl_vcpu *v, const struct area *a, unsigned offset, unsigned len,
		     bool write)
{
	if (KL_UNLIKELY(a->op->addrsize != 8) && kl_host_is_intel())
		return kl_mem_part(v, a->op, offset, len, write);
	return kl_linear_add(v, a->lin, offset);
}

static void put(struct kl_vcpu *v, const struct area *a, unsigned offset, const void *src,
		unsigned len)
{
	kl_write_bytes(v, part(v, a, offset, len, true), src, len);
}

static void get(struct kl_vcpu *v, const struct area *a, unsigned offset, void *dst, unsigned len)
{
	kl_read_bytes(v, part(v, a, offset, len, false), dst, len);
}

/* Writes exactly what the instruction is to write: others may use what is next to it. */
enum kl_next kl_op_xsave(struct kl_vcpu *v, const struct kl_op *op)
{
	enum kind kind = kind_of(op->mnemonic);
	unsigned bytes = vector_bytes(v);
	struct area a = {.op = op};
	uint64_t rfbm, save, header[2];
	uint8_t x87[160];
	bool has_mxcsr;
	unsigned first, len;

	check(v, kind);
	rfbm = requested(v);
	a.lin = area_lin(v, op, rfbm, true);
	save = rfbm & (kind == PLAIN ? ~0ull
		       : kind == OPT ? in_use(v, bytes)
				     : in_use_mxcsr(v, bytes));
	has_mxcsr = kind >= COMPACT ? save & SSE : rfbm & (SSE | AVX);
	if (kind >= COMPACT) {
		header[0] = save;
		header[1] = rfbm | COMPACTED;
	} else {
		get(v, &a, HEADER, header, 8);
		header[0] = (header[0] & ~rfbm) | (rfbm & in_use(v, bytes));
	}
	/*
	 * Both pages must be writable before anything is written; on Intel's processors not the
	 * first if nothing in it is.
	 */
	first = kl_host_is_intel() && !(save & (X87 | SSE)) && !has_mxcsr ? HEADER : 0;
	len = (save & AVX ? AREA_AVX : HEADER + 8) - first;
	kl_probe_store(v, part(v, &a, first, len, true), len);
	if (save & AVX)
		put(v, &a, YMM_HI, v->xsave + YMM_HI, bytes);
	if (save & X87) {
		kl_fx_image(v, op->opsize == 8, x87);
		put(v, &a, 0, x87, 24);
		put(v, &a, 32, x87 + 32, 128);
	}
	if (has_mxcsr)
		put(v, &a, 24, kl_mxcsr_words(v).b, 8);
	if (save & SSE)
		put(v, &a, XMM, v->xsave + XMM, bytes);
	put(v, &a, HEADER, header, kind >= COMPACT ? 16 : 8);
	return KL_NEXT;
}

/* #GP unless the header may be restored from. True: the compacted format. */
static bool check_header(struct kl_vcpu *v, const uint64_t header[8], enum kind kind)
{
	bool compacted = header[1] & COMPACTED;

	if (!compacted) {
		if (kind == SUPERVISOR || header[1] || header[2] || (header[0] & ~v->xcr0))
			gp(v);
		return false;
	}
	if (!(kl_xsave_features() & HAS_XSAVEC) || (header[1] & ~COMPACTED & ~v->xcr0) ||
	    (header[0] & ~header[1]) || (header[0] & COMPACTED) ||
	    !all_zero((const uint8_t *)&header[2], 48))
		gp(v);
	return true;
}

/*
 * And the faults of what is around it. AMD's processors look at the start before they have read
 * the header, Intel's at the start and the end when they know the layout, and do not yet mind what
 * else the header says.
 */
static void read_header(struct kl_vcpu *v, const struct area *a, uint64_t rfbm, uint64_t header[8])
{
	uint64_t layout;
	bool compacted;

	if (!kl_host_is_intel()) {
		kl_probe(v, a->lin);
		get(v, a, HEADER, header, 64);
		return;
	}
	get(v, a, HEADER, header, 64);
	compacted = header[1] & COMPACTED;
	layout = compacted ? header[1] & ~COMPACTED : v->xcr0;
	if (layout & ~v->xcr0)
		gp(v);
	if (rfbm & (compacted ? X87 | SSE : X87 | SSE | AVX))
		kl_probe(v, part(v, a, 0, 1, false));
	kl_probe(v, part(v, a, kl_xsave_size(rfbm & layout) - 1, 1, false));
}

enum kl_next kl_op_xrstor(struct kl_vcpu *v, const struct kl_op *op)
{
	enum kind kind = kind_of(op->mnemonic);
	unsigned bytes = vector_bytes(v);
	uint8_t buf[FX_USED] = {0x7f, 0x03}, hi[256] = {0};
	struct area a = {.op = op};
	uint64_t header[8], rfbm, load;
	uint32_t mxcsr = MXCSR_INIT;
	bool compacted, has_mxcsr, invalid;

	check(v, kind);
	rfbm = requested(v);
	a.lin = area_lin(v, op, rfbm, false);
	read_header(v, &a, rfbm, header);
	compacted = check_header(v, header, kind);
	load = rfbm & header[0];
	/* Up to the last register, also where code has only half of them. */
	if (!compacted || (load & AVX))
		kl_probe(v, part(v, &a, kl_xsave_size(rfbm) - 1, 1, false));
	has_mxcsr = compacted ? load & SSE : rfbm & (SSE | AVX);
	if (has_mxcsr)
		get(v, &a, 24, &mxcsr, 4);
	/* In the compacted format Intel's processors look at it when they have loaded XMM. */
	invalid = !kl_mxcsr_valid(mxcsr);
	if (invalid && !(compacted && kl_host_is_intel()))
		gp(v);
	if (load & X87) {
		get(v, &a, 0, buf, 24);
		get(v, &a, 32, buf + 32, 128);
	}
	if (load & SSE)
		get(v, &a, XMM, buf + XMM, bytes);
	if (load & AVX)
		get(v, &a, YMM_HI, hi, bytes);
	/* What is not in the image gets its initial values. */
	if (rfbm & X87)
		kl_fx_load(v, op->opsize == 8, buf);
	if (rfbm & SSE)
		memcpy(v->xsave + XMM, buf + XMM, bytes);
	if ((rfbm & AVX) && !(invalid && (load & AVX)))
		memcpy(v->xsave + YMM_HI, hi, bytes);
	if (invalid)
		gp(v);
	if (compacted ? rfbm & SSE : rfbm & (SSE | AVX))
		memcpy(v->xsave + 24, &mxcsr, 4);
	return KL_NEXT;
}

enum kl_next kl_op_xgetbv(struct kl_vcpu *v, const struct kl_op *op)
{
	uint32_t index = (uint32_t)v->gpr[KL_RCX];
	uint64_t val = v->xcr0;

	if (!(v->cr4 & KL_CR4_OSXSAVE))
		kl_raise(v, KL_EXC_UD);
	if (index > 1 || (index == 1 && !(kl_xsave_features() & HAS_XGETBV1)))
		gp(v);
	if (index == 1)
		val &= in_use_mxcsr(v, vector_bytes(v));
	v->gpr[KL_RAX] = (uint32_t)val;
	v->gpr[KL_RDX] = val >> 32;
	return KL_NEXT;
}

enum kl_next kl_op_xsetbv(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t val = (v->gpr[KL_RDX] << 32) | (uint32_t)v->gpr[KL_RAX];

	if (!(v->cr4 & KL_CR4_OSXSAVE))
		kl_raise(v, KL_EXC_UD);
	if (v->cpl || (uint32_t)v->gpr[KL_RCX] || !kl_xcr0_valid(v, val))
		gp(v);
	v->xcr0 = val;
	kl_x86_refresh_cpuid(v);
	return KL_NEXT;
}

/* ---- ioctls ---------------------------------------------------------------------------------- */

void kl_x86_get_xsave(struct kl_vcpu *v, void *buf, unsigned size)
{
	uint64_t bv = in_use_mxcsr(v, 256) & (v->supported_xcr0 | X87 | SSE);
	uint8_t area[AREA_AVX] = {0x7f, 0x03};
	uint32_t mxcsr = MXCSR_INIT;

	memcpy(area + 24, bv & (SSE | AVX) ? v->xsave + 24 : (const uint8_t *)&mxcsr, 4);
	memcpy(area + 28, v->xsave + 28, 4);
	if (bv & X87) {
		memcpy(area, v->xsave, 24);
		memcpy(area + 32, v->xsave + 32, 128);
	}
	if (bv & SSE)
		memcpy(area + XMM, v->xsave + XMM, 256);
	if (bv & AVX)
		memcpy(area + YMM_HI, v->xsave + YMM_HI, 256);
	memcpy(area + HEADER, &bv, 8);
	memset(buf, 0, size);
	memcpy(buf, area, kl_min((size_t)size, sizeof(area)));
}

int kl_x86_set_xsave(struct kl_vcpu *v, const void *buf, unsigned size)
{
	const uint8_t *in = buf;
	uint64_t header[8];
	uint32_t mxcsr;

	if (size < AREA_AVX)
		return -EINVAL;
	memcpy(header, in + HEADER, 64);
	memcpy(&mxcsr, in + 24, 4);
	if ((header[0] & ~kl_xcr0_supported()) || !all_zero((const uint8_t *)&header[1], 56))
		return -EINVAL;
	if (header[0] && !kl_mxcsr_valid(mxcsr))
		return -EINVAL;
	kl_fpu_reset(v);
	if (header[0] & X87) {
		memcpy(v->xsave, in, 24);
		memcpy(v->xsave + 32, in + 32, 128);
	}
	if (header[0] & SSE)
		memcpy(v->xsave + XMM, in + XMM, 256);
	if (header[0] & AVX)
		memcpy(v->xsave + YMM_HI, in + YMM_HI, 256);
	if (header[0])
		memcpy(v->xsave + 24, &mxcsr, 4);
	return 0;
}

void kl_x86_get_xcrs(struct kl_vcpu *v, struct kvm_xcrs *x)
{
	memset(x, 0, sizeof(*x));
	if (!(kl_cr4_supported() & KL_CR4_OSXSAVE))
		return;
	x->nr_xcrs = 1;
	x->xcrs[0].value = v->xcr0;
}

int kl_x86_set_xcrs(struct kl_vcpu *v, const struct kvm_xcrs *x)
{
	if (!(kl_cr4_supported() & KL_CR4_OSXSAVE))
		return -EINVAL;
	if (x->nr_xcrs > KVM_MAX_XCRS || x->flags)
		return -EINVAL;
	for (unsigned i = 0; i < x->nr_xcrs; i++) {
		if (x->xcrs[i].xcr)
			continue;
		if (!kl_xcr0_valid(v, x->xcrs[i].value))
			return -EINVAL;
		v->xcr0 = x->xcrs[i].value;
		kl_x86_refresh_cpuid(v);
		break;
	}
	return 0;
}
