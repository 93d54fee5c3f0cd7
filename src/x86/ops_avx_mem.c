/* SPDX-License-Identifier: MIT */
/*
 * AVX instructions whose elements are accesses of their own: masked moves and gathers. None of
 * them ever runs natively: an element that the mask leaves out is not touched.
 */
#include <string.h>

#include "host/cpu.h"
#include "x86/access.h"
#include "x86/decode.h"
#include "x86/vector.h"

/* Registers as elements; op->opsize is an element's size. */
KL_INLINE uint8_t *element(struct kl_vcpu *v, unsigned reg, unsigned byte)
{
	return kl_xmm(v, reg) + (byte & 15) + (byte & 16 ? KL_YMM_HI : 0);
}

KL_INLINE bool selected(struct kl_vcpu *v, unsigned mask, unsigned byte, unsigned size)
{
	return *element(v, mask, byte + size - 1) & 0x80;
}

static void clear_upper(struct kl_vcpu *v, unsigned reg)
{
	memset(kl_xmm(v, reg) + KL_YMM_HI, 0, 16);
}

/*
 * ---- masked moves: reg data, cond mask, imm bytes of the vector ----------------------------
 *
 * What is not selected is not looked at, not even by the segment.
 */

static enum kl_next masked_load(struct kl_vcpu *v, const struct kl_op *op)
{
	unsigned size = op->opsize, len = (unsigned)op->imm;
	uint8_t x[32] = {0};

	kl_check_avx(v);
	for (unsigned i = 0; i < len; i += size)
		if (selected(v, op->cond, i, size)) {
			uint64_t e = kl_read(v, kl_mem_part(v, op, i, size, false), size);

			memcpy(x + i, &e, size);
		}
	memcpy(kl_xmm(v, op->reg), x, 16);
	memcpy(kl_xmm(v, op->reg) + KL_YMM_HI, x + 16, 16);
	return KL_NEXT;
}

/* The first element of @mask must be writable; what lies below byte @from is not looked at. */
static void probe_element(struct kl_vcpu *v, uint64_t lin, uint32_t mask, unsigned size,
			  unsigned from)
{
	unsigned byte;

	if (!mask)
		return;
	byte = (unsigned)__builtin_ctz(mask) * size;
	/* These instructions do nothing to devices. */
	if (!kl_probe_writable(v, kl_linear_add(v, lin, kl_max(byte, from)), 1))
		kl_emulation_failure(v);
}

/*
 * Store the elements of @x that @mask selects, bit i for element i. If they lie in two pages, both
 * must be writable before anything is stored.
 */
static void masked_store(struct kl_vcpu *v, uint64_t lin, const uint8_t *x, uint32_t mask,
			 unsigned size, unsigned len)
{
	unsigned first = (unsigned)(KL_PAGE_SIZE - (lin & ~KL_PAGE_MASK));

	if (KL_UNLIKELY(first < len)) {
		uint32_t here = (1u << ((first + size - 1) / size)) - 1,
			 there = ~0u << first / size;

		probe_element(v, lin, mask & here, size, 0);
		probe_element(v, lin, mask & there, size, first);
	}
	for (unsigned i = 0; i < len; i += size)
		if (mask >> (i / size) & 1) {
			uint64_t e = 0;

			memcpy(&e, x + i, size);
			kl_write(v, kl_linear_add(v, lin, i), e, size);
		}
}

/* The same where each element must be looked at for itself. */
static void masked_store_segmented(struct kl_vcpu *v, const struct kl_op *op, const uint8_t *x,
				   uint32_t mask, unsigned size)
{
	for (uint32_t m = mask; m; m &= m - 1) {
		unsigned at = (unsigned)__builtin_ctz(m) * size;
		uint64_t lin = kl_mem_part(v, op, at, size, true);

		kl_probe_store(v, lin, size);
		probe_element(v, lin, 1, size, 0);
	}
	for (uint32_t m = mask; m; m &= m - 1) {
		unsigned at = (unsigned)__builtin_ctz(m) * size;
		uint64_t e = 0;

		memcpy(&e, x + at, size);
		kl_write(v, kl_mem_part(v, op, at, size, true), e, size);
	}
}

static enum kl_next masked_move(struct kl_vcpu *v, const struct kl_op *op)
{
	unsigned size = op->opsize, len = (unsigned)op->imm;
	uint32_t mask = 0;
	uint8_t x[32];

	kl_check_avx(v);
	memcpy(x, kl_xmm(v, op->reg), 16);
	memcpy(x + 16, kl_xmm(v, op->reg) + KL_YMM_HI, 16);
	for (unsigned i = 0; i < len; i += size)
		mask |= (uint32_t)selected(v, op->cond, i, size) << (i / size);
	if (!v->long_mode)
		masked_store_segmented(v, op, x, mask, size);
	else if (mask) /* else not even the segment matters */
		masked_store(v, kl_mem_lin(v, op, 1, true), x, mask, size, len);
	return KL_NEXT;
}

void kl_masked_bytes(struct kl_vcpu *v, const struct kl_op *op, const uint8_t *x,
		     const uint8_t *select, unsigned len)
{
	uint64_t ea = v->gpr[KL_RDI], lin;
	uint32_t mask = 0;

	ea = op->addrsize == 8 ? ea : op->addrsize == 4 ? (uint32_t)ea : (uint16_t)ea;
	lin = kl_seg_linear(v, op->seg, ea, len, true);
	kl_probe_store(v, lin, len); /* whatever the mask says */
	for (unsigned i = 0; i < len; i++)
		mask |= (uint32_t)(select[i] >> 7) << i;
	masked_store(v, lin, x, mask, 1, len);
}

static enum kl_next vmaskmovdqu(struct kl_vcpu *v, const struct kl_op *op)
{
	kl_check_avx(v);
	kl_masked_bytes(v, op, kl_xmm(v, op->reg), kl_xmm(v, op->rm), 16);
	return KL_NEXT;
}

/* ---- gathers ------------------------------------------------------------------------------ */

#define G_INDEX8 1u /* indices of 64 bits */
#define G_YMM    2u
#define G_NR(n)  ((n) << 4)

/* Address of element @i: the index register is a vector. */
static uint64_t element_ea(struct kl_vcpu *v, const struct kl_op *op, unsigned i)
{
	uint64_t ea = (uint64_t)op->disp;
	int64_t index;

	if (op->imm & G_INDEX8) {
		memcpy(&index, element(v, op->rm, 8 * i), 8);
	} else {
		int32_t half;

		memcpy(&half, element(v, op->rm, 4 * i), 4);
		index = half;
	}
	ea += (uint64_t)index << op->scale;
	if (op->base < 16)
		ea += v->gpr[op->base];
	return op->addrsize == 8 ? ea : op->addrsize == 4 ? (uint32_t)ea : (uint16_t)ea;
}

/*
 * Elements come from the lowest on; each that has come is in the destination and gone from the
 * mask before the next one is tried, so a fault or an interruption leaves what is to be done.
 */
static enum kl_next gather(struct kl_vcpu *v, const struct kl_op *op)
{
	unsigned size = op->opsize, n = (unsigned)(op->imm >> 4);

	kl_check_avx(v);
	for (unsigned i = 0; i < n; i++) {
		uint8_t *mask = element(v, op->cond, i * size);
		uint64_t e;

		if (!selected(v, op->cond, i * size, size)) {
			memset(mask, 0, size);
			continue;
		}
		e = kl_read(v, kl_seg_linear(v, op->seg, element_ea(v, op, i), size, false), size);
		memcpy(element(v, op->reg, i * size), &e, size);
		memset(mask, 0, size);
	}
	/* What lies above the elements, and what the mask did not select. */
	if (n * size < 16)
		memset(kl_xmm(v, op->reg) + 8, 0, 8);
	if (n * size < 32)
		clear_upper(v, op->reg);
	memset(kl_xmm(v, op->cond), 0, 16);
	clear_upper(v, op->cond);
	return KL_NEXT;
}

/* ---- selection ----------------------------------------------------------------------------- */

static bool select_masked(struct kl_decode *d, unsigned size)
{
	bool load = d->opnd[2].type == ZYDIS_OPERAND_TYPE_MEMORY;

	d->op->reg = kl_register_number(&d->opnd[load ? 0 : 2]);
	d->op->cond = kl_register_number(&d->opnd[1]);
	d->op->imm = d->in.raw.vex.L ? 32 : 16;
	d->op->opsize = (uint8_t)size;
	d->op->fn = load ? masked_load : masked_move;
	d->stores = !load;
	return true;
}

static bool select_gather(struct kl_decode *d, unsigned index, unsigned size)
{
	const ZydisDecodedOperand *m = &d->opnd[1];
	unsigned len = d->in.raw.vex.L ? 32 : 16;
	struct kl_op *op = d->op;

	op->reg = kl_register_number(&d->opnd[0]);
	op->cond = kl_register_number(&d->opnd[2]);
	op->rm = (uint8_t)ZydisRegisterGetId(m->mem.index);
	op->scale = m->mem.scale == 8 ? 3 : m->mem.scale == 4 ? 2 : m->mem.scale == 2;
	op->opsize = (uint8_t)size;
	op->imm = (index == 8 ? G_INDEX8 : 0) | G_NR(len / (index > size ? index : size));
	if (op->reg == op->cond || op->reg == op->rm || op->cond == op->rm)
		op->fn = kl_op_ud;
	else
		op->fn = gather;
	return true;
}

bool kl_select_avx_mem(struct kl_decode *d)
{
	switch (d->in.mnemonic) {
	case ZYDIS_MNEMONIC_VMASKMOVPS:
	case ZYDIS_MNEMONIC_VPMASKMOVD:
		return select_masked(d, 4);
	case ZYDIS_MNEMONIC_VMASKMOVPD:
	case ZYDIS_MNEMONIC_VPMASKMOVQ:
		return select_masked(d, 8);
	case ZYDIS_MNEMONIC_VMASKMOVDQU:
		d->op->reg = kl_register_number(&d->opnd[0]);
		d->op->rm = kl_register_number(&d->opnd[1]);
		d->op->fn = vmaskmovdqu;
		d->stores = true;
		return true;
	case ZYDIS_MNEMONIC_VGATHERDPS:
	case ZYDIS_MNEMONIC_VPGATHERDD:
		return select_gather(d, 4, 4);
	case ZYDIS_MNEMONIC_VGATHERDPD:
	case ZYDIS_MNEMONIC_VPGATHERDQ:
		return select_gather(d, 4, 8);
	case ZYDIS_MNEMONIC_VGATHERQPS:
	case ZYDIS_MNEMONIC_VPGATHERQD:
		return select_gather(d, 8, 4);
	case ZYDIS_MNEMONIC_VGATHERQPD:
	case ZYDIS_MNEMONIC_VPGATHERQQ:
		return select_gather(d, 8, 8);
	default:
		return false;
	}
}
