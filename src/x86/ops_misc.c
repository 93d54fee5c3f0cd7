/* SPDX-License-Identifier: MIT */
/* NOP and hints, fences, BOUND, random numbers, and the decimal instructions of 16- and 32-bit
 * code. */
#include "host/cpu.h"
#include "x86/decode.h"
#include "x86/guest_cpuid.h"
#include "x86/ops.h"

#define AL(v) (*(uint8_t *)&(v)->gpr[KL_RAX])
#define AH(v) (((uint8_t *)&(v)->gpr[KL_RAX])[1])

static enum kl_next nop(struct kl_vcpu *v, const struct kl_op *op)
{
	return KL_NEXT;
}

static enum kl_next mfence(struct kl_vcpu *v, const struct kl_op *op)
{
	__builtin_ia32_mfence();
	return KL_NEXT;
}

static enum kl_next lfence(struct kl_vcpu *v, const struct kl_op *op)
{
	__builtin_ia32_lfence();
	return KL_NEXT;
}

static enum kl_next sfence(struct kl_vcpu *v, const struct kl_op *op)
{
	__builtin_ia32_sfence();
	return KL_NEXT;
}

static enum kl_next bound(struct kl_vcpu *v, const struct kl_op *op)
{
	unsigned size = op->opsize, shift = size == 2 ? 16 : 0;
	int32_t x = (int32_t)((uint32_t)kl_gpr_get(v, op->reg, size) << shift);
	int32_t lo = (int32_t)((uint32_t)kl_mem_read(v, op, size) << shift), hi;

	if (x < lo && kl_host_is_intel()) /* the upper bound is not looked at */
		kl_raise(v, KL_EXC_BR);
	hi = (int32_t)((uint32_t)kl_read(v, kl_mem_part(v, op, size, size, false), size) << shift);
	if (x < lo || x > hi)
		kl_raise(v, KL_EXC_BR);
	return KL_NEXT;
}

static void put_flags(struct kl_vcpu *v, unsigned fl)
{
	v->rflags = (v->rflags & ~(uint64_t)KL_FL_STATUS) | fl;
}

/* ---- random numbers: the host's ------------------------------------------------------------ */

/*
 * Only where the host has them. VMX can refuse these to a guest that was not promised them, and
 * KVM does; SVM cannot.
 */
static void check_random(struct kl_vcpu *v, bool seed)
{
	if (kl_host_is_intel() &&
	    !(seed ? kl_guest_has(v, 7, 0, 1, 18) : kl_guest_has(v, 1, 0, 2, 30)))
		kl_raise(v, KL_EXC_UD);
}

static enum kl_next put_random(struct kl_vcpu *v, const struct kl_op *op, uint64_t x, bool valid)
{
	kl_gpr_set(v, op->reg, valid ? x : 0, op->opsize);
	put_flags(v, valid ? KL_FL_CF : 0);
	return KL_NEXT;
}

static enum kl_next rdrand(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t x;
	bool valid;

	check_random(v, false);
	__asm__ volatile("rdrand %0" : "=r"(x), "=@ccc"(valid));
	return put_random(v, op, x, valid);
}

static enum kl_next rdseed(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t x;
	bool valid;

	check_random(v, true);
	__asm__ volatile("rdseed %0" : "=r"(x), "=@ccc"(valid));
	return put_random(v, op, x, valid);
}

/* AMD: clear the cache line that rAX points into. */
static enum kl_next clzero(struct kl_vcpu *v, const struct kl_op *op)
{
	static const uint8_t zero[64];
	uint64_t ea = v->gpr[KL_RAX];

	ea = op->addrsize == 8 ? ea : op->addrsize == 4 ? (uint32_t)ea : (uint16_t)ea;
	kl_write_bytes(v, kl_seg_linear(v, op->seg, ea & ~63ull, 64, true), zero, 64);
	return KL_NEXT;
}

/* ---- decimal ------------------------------------------------------------------------------ */

static unsigned szp(uint8_t x)
{
	return (x & KL_FL_SF) | (x ? 0 : KL_FL_ZF) | (__builtin_parity(x) ? 0 : KL_FL_PF);
}

KL_INLINE enum kl_next adjust_packed(struct kl_vcpu *v, bool subtract)
{
	uint8_t al = AL(v), old = al;
	bool cf = v->rflags & KL_FL_CF, af = v->rflags & KL_FL_AF;
	unsigned fl = 0;

	if ((old & 15) > 9 || af) {
		al = (uint8_t)(subtract ? al - 6 : al + 6);
		fl |= KL_FL_AF;
		if (subtract && old < 6)
			fl |= KL_FL_CF;
	}
	if (old > 0x99 || cf) {
		al = (uint8_t)(subtract ? al - 0x60 : al + 0x60);
		fl |= KL_FL_CF;
	}
	AL(v) = al;
	put_flags(v, fl | szp(al));
	return KL_NEXT;
}

static enum kl_next daa(struct kl_vcpu *v, const struct kl_op *op)
{
	return adjust_packed(v, false);
}

static enum kl_next das(struct kl_vcpu *v, const struct kl_op *op)
{
	return adjust_packed(v, true);
}

KL_INLINE enum kl_next adjust_unpacked(struct kl_vcpu *v, bool subtract)
{
	unsigned fl = 0;
	uint16_t ax = (uint16_t)v->gpr[KL_RAX];

	if ((ax & 15) > 9 || (v->rflags & KL_FL_AF)) {
		ax = (uint16_t)(subtract ? ax - 0x106 : ax + 0x106);
		fl = KL_FL_AF | KL_FL_CF;
	}
	ax &= 0xff0f;
	*(uint16_t *)&v->gpr[KL_RAX] = ax;
	put_flags(v, fl | szp((uint8_t)ax));
	return KL_NEXT;
}

static enum kl_next aaa(struct kl_vcpu *v, const struct kl_op *op)
{
	return adjust_unpacked(v, false);
}

static enum kl_next aas(struct kl_vcpu *v, const struct kl_op *op)
{
	return adjust_unpacked(v, true);
}

static enum kl_next aam(struct kl_vcpu *v, const struct kl_op *op)
{
	uint8_t base = (uint8_t)op->imm, al = AL(v);

	if (!base)
		kl_raise(v, KL_EXC_DE);
	AH(v) = al / base;
	AL(v) = al % base;
	put_flags(v, szp(AL(v)));
	return KL_NEXT;
}

static enum kl_next aad(struct kl_vcpu *v, const struct kl_op *op)
{
	AL(v) = (uint8_t)(AL(v) + AH(v) * (uint8_t)op->imm);
	AH(v) = 0;
	put_flags(v, szp(AL(v)));
	return KL_NEXT;
}

static enum kl_next salc(struct kl_vcpu *v, const struct kl_op *op)
{
	AL(v) = v->rflags & KL_FL_CF ? 0xff : 0;
	return KL_NEXT;
}

static bool plain(struct kl_decode *d, kl_op_fn *fn)
{
	d->op->fn = fn;
	d->simple = true;
	return true;
}

bool kl_select_misc(struct kl_decode *d)
{
	switch (d->in.mnemonic) {
	case ZYDIS_MNEMONIC_NOP:
	case ZYDIS_MNEMONIC_ENDBR32:
	case ZYDIS_MNEMONIC_ENDBR64:
	case ZYDIS_MNEMONIC_PREFETCH:
	case ZYDIS_MNEMONIC_PREFETCHW:
	case ZYDIS_MNEMONIC_PREFETCHWT1:
	case ZYDIS_MNEMONIC_PREFETCHNTA:
	case ZYDIS_MNEMONIC_PREFETCHT0:
	case ZYDIS_MNEMONIC_PREFETCHT1:
	case ZYDIS_MNEMONIC_PREFETCHT2:
	case ZYDIS_MNEMONIC_CLDEMOTE:
		return plain(d, nop);
	case ZYDIS_MNEMONIC_MFENCE:
		return plain(d, mfence);
	case ZYDIS_MNEMONIC_LFENCE:
		return plain(d, lfence);
	case ZYDIS_MNEMONIC_SFENCE:
		return plain(d, sfence);
	case ZYDIS_MNEMONIC_RDRAND:
		d->op->fn = kl_host_has(d) ? rdrand : kl_op_ud;
		d->writes_flags = true;
		return true;
	case ZYDIS_MNEMONIC_RDSEED:
		d->op->fn = kl_host_has(d) ? rdseed : kl_op_ud;
		d->writes_flags = true;
		return true;
	case ZYDIS_MNEMONIC_CLZERO:
		d->op->fn = kl_host_has(d) ? clzero : kl_op_ud;
		d->stores = true;
		return true;
	case ZYDIS_MNEMONIC_BOUND:
		d->op->fn = bound;
		return true;
	case ZYDIS_MNEMONIC_DAA:
		d->op->fn = daa;
		return true;
	case ZYDIS_MNEMONIC_DAS:
		d->op->fn = das;
		return true;
	case ZYDIS_MNEMONIC_AAA:
		d->op->fn = aaa;
		return true;
	case ZYDIS_MNEMONIC_AAS:
		d->op->fn = aas;
		return true;
	case ZYDIS_MNEMONIC_AAM:
		d->op->fn = aam;
		return true;
	case ZYDIS_MNEMONIC_AAD:
		d->op->fn = aad;
		return true;
	case ZYDIS_MNEMONIC_SALC:
		d->op->fn = salc;
		return true;
	default:
		return false;
	}
}
