/* SPDX-License-Identifier: MIT */
#include "x86/memo.h"

#include <string.h>

/*
 * How many bytes tell the length: prefixes, opcode, ModRM, SIB. It is a guess by which an entry is
 * looked for; whether it is the right one is decided by comparing all that counts.
 */
static unsigned head(const uint8_t *b, enum kl_code_mode mode)
{
	/* A bit for each opcode that has a ModRM byte */
	static const uint32_t one[8] = {0x0f0f0f0f, 0x0f0f0f0f, 0,          0x00000a0c,
					0x0000ffff, 0,          0xff0f00f3, 0xc0c00000};
	unsigned i = 0, op;

	while (i < 10 && (b[i] == 0x66 || b[i] == 0x67 || (b[i] & 0xfe) == 0xf2 || b[i] == 0xf0 ||
			  (b[i] & 0xe7) == 0x26 || (b[i] & 0xfe) == 0x64))
		i++;
	if (mode == KL_CODE64) {
		if ((b[i] & 0xf0) == 0x40)
			i++;
		if ((b[i] & 0xfe) == 0xc4)
			return i + (b[i] == 0xc4 ? 5 : 4);
	}
	op = b[i++];
	if (op == 0x0f) {
		op = b[i++];
		if (op == 0x38 || op == 0x3a)
			i++;
		else if ((op & 0xf0) == 0x80 || (op & 0xf8) == 0xc8)
			return i;
	} else if (!(one[op >> 5] >> (op & 31) & 1)) {
		return i;
	}
	/* ModRM, and SIB */
	return i + 1 + (b[i] < 0xc0 && (b[i] & 7) == 4);
}

static void only(uint64_t x[2], const uint64_t bytes[2], const uint64_t mask[2])
{
	x[0] = bytes[0] & mask[0];
	x[1] = bytes[1] & mask[1];
}

static unsigned hash(const uint64_t x[2], enum kl_code_mode mode)
{
	uint64_t h = (x[0] ^ mode) * 0x9e3779b97f4a7c15 ^ x[1] * 0xc2b2ae3d27d4eb4f;

	return (unsigned)(h >> 40 ^ h >> 20);
}

static unsigned shape_of(const uint64_t all[2], const uint8_t *bytes, enum kl_code_mode mode)
{
	uint64_t x[2], mask[2];

	kl_first_bytes(mask, head(bytes, mode));
	only(x, all, mask);
	return hash(x, mode) % KL_NR_SHAPES;
}

static int64_t signed_at(const uint8_t *bytes, unsigned at, unsigned size)
{
	int64_t x = 0;

	memcpy(&x, bytes + at, size);
	return (int64_t)((uint64_t)x << (64 - 8 * size)) >> (64 - 8 * size);
}

bool kl_memo_find(struct kl_memos *m, struct kl_op *op, struct kl_flag_use *use,
		  enum kl_code_mode mode, uint64_t rip, const uint8_t *bytes, unsigned avail)
{
	const struct kl_memo *e;
	uint64_t all[2], x[2];
	unsigned shape;

	memcpy(all, bytes, 16);
	shape = shape_of(all, bytes, mode);
	only(x, all, m->shape[shape].mask);
	e = &m->memo[hash(x, mode) % KL_NR_MEMOS];
	/* An entry may have another mask than its shape says by now. */
	if (((all[0] ^ e->bytes[0]) & e->mask[0]) | ((all[1] ^ e->bytes[1]) & e->mask[1]) ||
	    e->mode != mode || !e->op.len || e->op.len > avail)
		return false;
	*op = e->op;
	*use = e->use;
	memcpy(op->bytes, bytes, kl_min(avail, 15u));
	if (e->imm_size)
		op->imm = (uint64_t)signed_at(bytes, e->imm_at, e->imm_size);
	if (e->disp_at)
		op->disp = signed_at(bytes, e->disp_at, 4) + (int64_t)(rip + op->len);
	m->nr_found++;
	return true;
}

static bool beside_rip(const struct kl_decode *d)
{
	for (unsigned i = 0; i < d->in.operand_count_visible; i++)
		if (d->opnd[i].type == ZYDIS_OPERAND_TYPE_MEMORY &&
		    (d->opnd[i].mem.base == ZYDIS_REGISTER_RIP ||
		     d->opnd[i].mem.base == ZYDIS_REGISTER_EIP))
			return true;
	return false;
}

/* These bytes do not count. */
static void leave_out(uint64_t mask[2], unsigned at, unsigned size)
{
	uint8_t x[16];

	memcpy(x, mask, 16);
	memset(x + at, 0, size);
	memcpy(mask, x, 16);
}

void kl_memo_add(struct kl_memos *m, const struct kl_decode *d, const struct kl_flag_use *use,
		 uint64_t rip, const uint8_t *bytes)
{
	const struct kl_op *op = d->op;
	struct kl_memo new = {.op = *op, .use = *use, .mode = (uint8_t)d->mode};
	uint64_t all[2], x[2];
	unsigned n = op->len;

	/* What is no instruction depends on bytes that are not its own; d->in is not its. */
	if (op->fn == kl_op_ud || op->fn == kl_op_too_long || op->fn == kl_op_unsupported)
		return;
	kl_first_bytes(new.mask, n);
	if ((op->flags & KL_OPF_LINK) && d->in.raw.imm[0].size) {
		new.imm_at = d->in.raw.imm[0].offset;
		new.imm_size = d->in.raw.imm[0].size / 8;
		if ((uint64_t)signed_at(bytes, new.imm_at, new.imm_size) != op->imm)
			return;
		leave_out(new.mask, new.imm_at, new.imm_size);
	}
	if (beside_rip(d)) {
		if (d->in.raw.disp.size != 32)
			return;
		new.disp_at = d->in.raw.disp.offset;
		if (signed_at(bytes, new.disp_at, 4) + (int64_t)(rip + n) != op->disp)
			return;
		leave_out(new.mask, new.disp_at, 4);
	}
	memcpy(all, bytes, 16);
	only(x, all, new.mask);
	memcpy(new.bytes, x, 16);
	memcpy(m->shape[shape_of(all, bytes, d->mode)].mask, new.mask, 16);
	m->memo[hash(x, d->mode) % KL_NR_MEMOS] = new;
	m->nr_added++;
}
