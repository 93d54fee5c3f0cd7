/* SPDX-License-Identifier: MIT */
/*
 * Saving and loading x87 and SSE state: FXSAVE, XSAVE and relatives, MXCSR, XCR0.
 *
 * v->xsave is an XSAVE area in the standard format and the only home of that state. Its
 * header says "in use" for x87 and SSE always.
 */
#include <string.h>
#include <Zydis/Zydis.h>

#include "x86/control.h"
#include "x86/fpu.h"
#include "x86/insn.h"

#define XHDR      512
#define XFEATURES (1ull | 2)
#define FX_USED   416 /* FXSAVE leaves the rest of its 512 bytes alone */

static uint32_t mxcsr_mask(void)
{
	static _Atomic uint32_t cached; /* the same whoever finds out first */
	uint8_t fx[512] __attribute__((aligned(16)));
	uint32_t mask = atomic_load_explicit(&cached, memory_order_relaxed);

	if (!mask) {
		memset(fx, 0, sizeof(fx));
		__asm__ volatile("fxsave %0" : "=m"(fx));
		memcpy(&mask, fx + 28, 4);
		if (!mask)
			mask = 0xffbf;
		atomic_store_explicit(&cached, mask, memory_order_relaxed);
	}
	return mask;
}

bool kl_mxcsr_valid(uint32_t mxcsr)
{
	return !(mxcsr & ~mxcsr_mask());
}

void kl_fpu_reset(struct kl_vcpu *v)
{
	uint64_t used = XFEATURES;
	uint16_t fcw = 0x37f;
	uint32_t mxcsr = 0x1f80, mask = mxcsr_mask();

	memset(v->xsave, 0, sizeof(v->xsave));
	memcpy(v->xsave, &fcw, 2);
	memcpy(v->xsave + 24, &mxcsr, 4);
	memcpy(v->xsave + 28, &mask, 4);
	memcpy(v->xsave + XHDR, &used, 8);
}

static uint64_t linear(struct kl_vcpu *v, const struct kl_op *op, unsigned size, unsigned align,
		       bool write)
{
	uint64_t lin = kl_seg_linear(v, op->seg, kl_ea(v, op), size, write);

	if (lin & (align - 1))
		kl_raise_error(v, KL_EXC_GP, 0);
	return lin;
}

enum kl_next kl_op_fxsave(struct kl_vcpu *v, const struct kl_op *op)
{
	if (v->cr0 & (KL_CR0_TS | KL_CR0_EM))
		kl_raise(v, KL_EXC_NM);
	kl_write_bytes(v, linear(v, op, 512, 16, true), v->xsave, FX_USED);
	return KL_NEXT;
}

enum kl_next kl_op_fxrstor(struct kl_vcpu *v, const struct kl_op *op)
{
	uint8_t buf[FX_USED];
	uint32_t mxcsr, mask = mxcsr_mask();

	if (v->cr0 & (KL_CR0_TS | KL_CR0_EM))
		kl_raise(v, KL_EXC_NM);
	kl_read_bytes(v, linear(v, op, 512, 16, false), buf, sizeof(buf));
	memcpy(&mxcsr, buf + 24, 4);
	if (!kl_mxcsr_valid(mxcsr))
		kl_raise_error(v, KL_EXC_GP, 0);
	memcpy(v->xsave, buf, sizeof(buf));
	memcpy(v->xsave + 28, &mask, 4);
	kl_fpu_summarize(v);
	return KL_NEXT;
}

static uint64_t requested(struct kl_vcpu *v)
{
	return (((v->gpr[KL_RDX] & 0xffffffff) << 32) | (uint32_t)v->gpr[KL_RAX]) & v->xcr0;
}

static void need_xsave(struct kl_vcpu *v)
{
	if (!(v->cr4 & KL_CR4_OSXSAVE))
		kl_raise(v, KL_EXC_UD);
	if (v->cr0 & KL_CR0_TS)
		kl_raise(v, KL_EXC_NM);
}

enum kl_next kl_op_xsave(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t lin, rfbm, bv;
	uint8_t buf[XHDR + 8];

	need_xsave(v);
	if (op->mnemonic != ZYDIS_MNEMONIC_XSAVE && op->mnemonic != ZYDIS_MNEMONIC_XSAVE64 &&
	    op->mnemonic != ZYDIS_MNEMONIC_XSAVEOPT && op->mnemonic != ZYDIS_MNEMONIC_XSAVEOPT64)
		kl_raise(v, KL_EXC_UD); /* XSAVEC and XSAVES are not advertised */
	rfbm = requested(v);
	lin = linear(v, op, XHDR + 64, 64, true);
	/* Parts that are not asked for keep their bytes: read, change, write. */
	kl_read_bytes(v, lin, buf, sizeof(buf));
	if (rfbm & 1) {
		memcpy(buf, v->xsave, 24);
		memcpy(buf + 32, v->xsave + 32, 128);
	}
	if (rfbm & 2) {
		memcpy(buf + 24, v->xsave + 24, 8);
		memcpy(buf + 160, v->xsave + 160, 256);
	}
	memcpy(&bv, buf + XHDR, 8);
	bv = (bv & ~rfbm) | (rfbm & XFEATURES);
	memcpy(buf + XHDR, &bv, 8);
	kl_write_bytes(v, lin, buf, sizeof(buf));
	return KL_NEXT;
}

enum kl_next kl_op_xrstor(struct kl_vcpu *v, const struct kl_op *op)
{
	static const uint8_t zero[48];
	uint8_t buf[XHDR + 64], init[XHDR];
	uint64_t lin, rfbm, bv, comp;
	uint32_t mxcsr;
	uint16_t fcw = 0x37f;

	need_xsave(v);
	if (op->mnemonic != ZYDIS_MNEMONIC_XRSTOR && op->mnemonic != ZYDIS_MNEMONIC_XRSTOR64)
		kl_raise(v, KL_EXC_UD);
	rfbm = requested(v);
	lin = linear(v, op, sizeof(buf), 64, false);
	kl_read_bytes(v, lin, buf, sizeof(buf));
	memcpy(&bv, buf + XHDR, 8);
	memcpy(&comp, buf + XHDR + 8, 8);
	memcpy(&mxcsr, buf + 24, 4);
	if (comp || (bv & ~v->xcr0) || memcmp(buf + XHDR + 16, zero, sizeof(zero)))
		kl_raise_error(v, KL_EXC_GP, 0);
	if ((rfbm & 6) && !kl_mxcsr_valid(mxcsr))
		kl_raise_error(v, KL_EXC_GP, 0);
	memset(init, 0, sizeof(init));
	memcpy(init, &fcw, 2);
	if (rfbm & 1) {
		const uint8_t *src = bv & 1 ? buf : init;

		memcpy(v->xsave, src, 24);
		memcpy(v->xsave + 32, src + 32, 128);
		kl_fpu_summarize(v);
	}
	if (rfbm & 2) {
		const uint8_t *src = bv & 2 ? buf : init;

		memcpy(v->xsave + 160, src + 160, 256);
	}
	if (rfbm & 6)
		memcpy(v->xsave + 24, &mxcsr, 4);
	return KL_NEXT;
}

static void need_sse(struct kl_vcpu *v)
{
	if ((v->cr0 & KL_CR0_EM) || !(v->cr4 & KL_CR4_OSFXSR))
		kl_raise(v, KL_EXC_UD);
	if (v->cr0 & KL_CR0_TS)
		kl_raise(v, KL_EXC_NM);
}

enum kl_next kl_op_ldmxcsr(struct kl_vcpu *v, const struct kl_op *op)
{
	uint32_t val;

	need_sse(v);
	val = (uint32_t)kl_read(v, linear(v, op, 4, 1, false), 4);
	if (!kl_mxcsr_valid(val))
		kl_raise_error(v, KL_EXC_GP, 0);
	memcpy(v->xsave + 24, &val, 4);
	return KL_NEXT;
}

enum kl_next kl_op_stmxcsr(struct kl_vcpu *v, const struct kl_op *op)
{
	uint32_t val;

	need_sse(v);
	memcpy(&val, v->xsave + 24, 4);
	kl_write(v, linear(v, op, 4, 1, true), val, 4);
	return KL_NEXT;
}

enum kl_next kl_op_xgetbv(struct kl_vcpu *v, const struct kl_op *op)
{
	if (!(v->cr4 & KL_CR4_OSXSAVE))
		kl_raise(v, KL_EXC_UD);
	if ((uint32_t)v->gpr[KL_RCX])
		kl_raise_error(v, KL_EXC_GP, 0);
	v->gpr[KL_RAX] = (uint32_t)v->xcr0;
	v->gpr[KL_RDX] = v->xcr0 >> 32;
	return KL_NEXT;
}

enum kl_next kl_op_xsetbv(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t val = (v->gpr[KL_RDX] << 32) | (uint32_t)v->gpr[KL_RAX];

	if (!(v->cr4 & KL_CR4_OSXSAVE))
		kl_raise(v, KL_EXC_UD);
	if (v->cpl || (uint32_t)v->gpr[KL_RCX] || !kl_xcr0_valid(v, val))
		kl_raise_error(v, KL_EXC_GP, 0);
	v->xcr0 = val;
	return KL_NEXT;
}
