/* SPDX-License-Identifier: MIT */
/*
 * Saving and loading x87 and SSE state: FXSAVE, FXRSTOR, MXCSR; the XSAVE family is in xsave.c.
 *
 * v->xsave is an XSAVE area in the standard format and the only home of that state.
 */
#include <string.h>

#include "host/cpu.h"
#include "x86/access.h"
#include "x86/control.h"
#include "x86/fpu.h"
#include "x86/paging.h"
#include "x86/vector.h"

#define XMM_END 416 /* FXSAVE leaves the rest of its 512 bytes alone */
#define XMM     160

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

struct kl_mxcsr_words kl_mxcsr_words(const struct kl_vcpu *v)
{
	uint32_t mask = mxcsr_mask();
	struct kl_mxcsr_words w;

	memcpy(w.b, v->xsave + 24, 4);
	memcpy(w.b + 4, &mask, 4);
	return w;
}

bool kl_mxcsr_valid(uint32_t mxcsr)
{
	return !(mxcsr & ~mxcsr_mask());
}

void kl_fpu_reset(struct kl_vcpu *v)
{
	uint16_t fcw = 0x37f;
	uint32_t mxcsr = 0x1f80, mask = mxcsr_mask();

	memset(v->xsave, 0, sizeof(v->xsave));
	memcpy(v->xsave, &fcw, 2);
	memcpy(v->xsave + 24, &mxcsr, 4);
	memcpy(v->xsave + 28, &mask, 4);
}

bool kl_checks_parts(const struct kl_op *op)
{
	return op->addrsize != 2 && !kl_host_is_intel();
}

uint64_t kl_area_lin(struct kl_vcpu *v, const struct kl_op *op, unsigned size, bool write)
{
	if (!kl_checks_parts(op))
		return kl_mem_lin(v, op, size, write);
	(void)kl_mem_part(v, op, size - 1, 1, write);
	return kl_mem_part(v, op, 0, 1, write);
}

static uint64_t linear(struct kl_vcpu *v, const struct kl_op *op, unsigned size, unsigned align,
		       bool write)
{
	uint64_t lin =
		align == 16 ? kl_area_lin(v, op, size, write) : kl_mem_lin(v, op, size, write);

	if (align == 16 && !kl_canonical(v, lin)) /* may be #SS, aligned or not */
		kl_raise_not_canonical(v, lin);
	if (lin & (align - 1))
		kl_raise_error(v, KL_EXC_GP, 0);
	return lin;
}

/* Bytes of the area up to its last vector register: outside 64-bit code there are eight. */
static unsigned used_bytes(struct kl_vcpu *v)
{
	return v->code_mode == KL_CODE64 ? XMM_END : XMM + 8 * 16;
}

void kl_fx_image(const struct kl_vcpu *v, bool wide, uint8_t image[160])
{
	memcpy(image, v->xsave, 160);
	if (!wide) { /* selectors, which are 0, in the place of the upper halves */
		memset(image + 12, 0, 4);
		memset(image + 20, 0, 4);
	}
}

void kl_fx_load(struct kl_vcpu *v, bool wide, const uint8_t image[160])
{
	uint16_t word;

	memcpy(v->xsave, image, 24);
	/* Reserved bits */
	memcpy(&word, image, 2);
	word = (word & 0x1f3f) | 0x40;
	memcpy(v->xsave, &word, 2);
	v->xsave[5] = 0;
	v->xsave[7] &= 7;
	if (!wide) {
		memset(v->xsave + 12, 0, 4);
		memset(v->xsave + 20, 0, 4);
	}
	for (unsigned i = 32; i < 160; i += 16) {
		memcpy(v->xsave + i, image + i, 10);
		memset(v->xsave + i + 10, 0, 6);
	}
	kl_fpu_summarize(v);
}

enum kl_next kl_op_fxsave(struct kl_vcpu *v, const struct kl_op *op)
{
	uint8_t buf[XMM_END];
	uint64_t lin;

	if (v->cr0 & (KL_CR0_TS | KL_CR0_EM))
		kl_raise(v, KL_EXC_NM);
	kl_fx_image(v, op->opsize == 8, buf);
	memcpy(buf + 24, kl_mxcsr_words(v).b, 8);
	memcpy(buf + XMM, v->xsave + XMM, sizeof(buf) - XMM);
	lin = linear(v, op, 512, 16, true);
	(void)kl_probe_writable(v, kl_linear_add(v, lin, 511), 1); /* the last byte first */
	kl_write_bytes(v, lin, buf, used_bytes(v));
	return KL_NEXT;
}

enum kl_next kl_op_fxrstor(struct kl_vcpu *v, const struct kl_op *op)
{
	unsigned used = used_bytes(v);
	uint8_t buf[XMM_END];
	uint32_t mxcsr;
	uint64_t lin;

	if (v->cr0 & (KL_CR0_TS | KL_CR0_EM))
		kl_raise(v, KL_EXC_NM);
	lin = linear(v, op, 512, 16, false);
	(void)kl_read(v, kl_linear_add(v, lin, 511), 1);
	kl_read_bytes(v, lin, buf, used);
	memcpy(&mxcsr, buf + 24, 4);
	if (!kl_mxcsr_valid(mxcsr))
		kl_raise_error(v, KL_EXC_GP, 0);
	kl_fx_load(v, op->opsize == 8, buf);
	memcpy(v->xsave + 24, &mxcsr, 4);
	memcpy(v->xsave + XMM, buf + XMM, used - XMM);
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
