/* SPDX-License-Identifier: MIT */
/*
 * Random states. Registers that form addresses are solved for, so that operands lie where it
 * is interesting: in the middle of memory mostly, over each kind of page boundary, where
 * nothing may be written or nothing is, at addresses that are none.
 */
#include <stdio.h>
#include <string.h>

#include "fuzz.h"

void rng_seed(struct rng *r, uint64_t seed, uint64_t batch)
{
	r->s = (seed + 1) * 0x9e3779b97f4a7c15 ^ (batch + 1) * 0xd1342543de82ef95;
	if (!r->s)
		r->s = 1;
	for (unsigned i = 0; i < 8; i++)
		rng(r);
}

uint64_t state_value(struct rng *r)
{
	static const uint64_t edge[] = {
		0,
		1,
		2,
		-1ull,
		-2ull,
		0x7f,
		0x80,
		0xff,
		0x7fff,
		0x8000,
		0xffff,
		0x7fffffff,
		0x80000000,
		0xffffffff,
		0x7fffffffffffffff,
		0x8000000000000000,
		0x100000000,
		0x20,
		0x40,
	};
	uint64_t x = rng(r);

	switch (x >> 60) {
	case 0 ... 3:
		return edge[(x & 0xffff) % KL_ARRAY_SIZE(edge)];
	case 4:
	case 5:
		return x & 0xff;
	case 6:
		return x & 0xffff;
	case 7:
		return x & 0xffffffff;
	case 8:
		return x | 0xffffffff00000000;
	default:
		return x << 4 ^ x >> 17;
	}
}

/* Integers and floating-point numbers of all kinds. */
#define POOL 32768
static uint8_t pool[POOL];

static void fill_pool(void)
{
	static const uint64_t fp[] = {
		0x3ff0000000000000, 0xbff8000000000000, 0x7ff0000000000000, 0x7ff8000000000001,
		0x7ff0000000000001, 0x0000000000000001, 0x3f8000003f000000, 0x7f800000ff800000,
		0x7fc000007f800001, 0x00000001bf800000, 0x41f0000000000000, 0xc1e0000000200000,
		0x4330000000000001, 0x40490fdb3fb504f3, 0x0000000000000000, 0x8000000080000000,
		0x000fffffffffffff, 0x0010000000000000, 0x7fefffffffffffff, 0x007fffff00800000,
		0xfff8000000000000, 0x3c003c00bc007c00, 0x7e0001000001fc00, 0x43e0000000000000,
	};
	struct rng r;

	rng_seed(&r, 0, 0);
	for (unsigned i = 0; i < POOL; i += 8) {
		uint64_t x = pick(&r, 4) ? state_value(&r) : fp[pick(&r, KL_ARRAY_SIZE(fp))];

		memcpy(pool + i, &x, 8);
	}
}

static uint32_t mxcsr_mask;
static uint32_t foreign; /* XSAVE components that the process has and the guest has not */

void state_init(void)
{
	uint8_t fx[512] __attribute__((aligned(16))) = {0};
	uint32_t xcr0, high;

	__asm__ volatile("fxsave %0" : "=m"(fx));
	memcpy(&mxcsr_mask, fx + 28, 4);
	__asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
	foreign = xcr0 & ~(uint32_t)native_features;
	fill_pool();
}

void state_reset_memory(bool all)
{
	for (unsigned i = 0; i < DATA_PAGES; i++) {
		uint64_t lin = DATA + i * KL_PAGE_SIZE;

		if (data_rights[i] == PAGE_NONE || (data_rights[i] == PAGE_RO && !all))
			continue;
		memcpy(guest_memory(lin), pool + i * 1024, KL_PAGE_SIZE);
		memcpy((void *)lin, pool + i * 1024, KL_PAGE_SIZE);
	}
}

static bool writable(uint64_t lin)
{
	return lin - DATA < DATA_PAGES * KL_PAGE_SIZE &&
	       data_rights[(lin - DATA) >> KL_PAGE_SHIFT] == PAGE_RW;
}

/* The same bytes into both memories, where they may be written. */
static void poke(uint64_t lin, const void *buf, unsigned n)
{
	for (unsigned i = 0; i < n; i++) {
		if (!writable(lin + i))
			continue;
		*guest_memory(lin + i) = ((const uint8_t *)buf)[i];
		*(uint8_t *)(lin + i) = ((const uint8_t *)buf)[i];
	}
}

uint64_t state_place(struct rng *r, unsigned size, bool alone)
{
	unsigned where = alone || !pick(r, 8) ? pick(r, 100) : 0;
	uint64_t edge;

	if (where < 76) {
		/* In the writable pages 1 and 2, or 4; aligned half the time */
		uint64_t off = pick(r, 3) ? KL_PAGE_SIZE + pick(r, 8192)
					  : 4 * KL_PAGE_SIZE + pick(r, 4096);

		if (chance(r, 50))
			off &= ~(uint64_t)(size <= 8 ? size - 1 : 63);
		return DATA + off;
	}
	if (where < 88) {
		/* Over a boundary */
		edge = where < 84 ? 2 : where < 86 ? 3 : 4;
	} else if (where < 94) {
		edge = 1 + pick(r, 7);
	} else if (where < 97) {
		return DATA + 3 * KL_PAGE_SIZE + pick(r, 4096); /* read-only */
	} else if (where < 99) {
		return DATA + 5 * KL_PAGE_SIZE + pick(r, 4096); /* nothing */
	} else {
		return rng(r);
	}
	return DATA + edge * KL_PAGE_SIZE -
	       (size > 1 && chance(r, 80) ? 1 + pick(r, size - 1) : size);
}

static uint64_t *gpr(struct machine *m, ZydisRegister reg)
{
	ZydisRegisterClass c = ZydisRegisterGetClass(reg);

	if (c != ZYDIS_REGCLASS_GPR64 && c != ZYDIS_REGCLASS_GPR32 && c != ZYDIS_REGCLASS_GPR16)
		return NULL;
	return &m->gpr[ZydisRegisterGetId(reg) & 15];
}

static uint64_t cut(uint64_t x, unsigned bits)
{
	return bits >= 64 ? x : x & ((1ull << bits) - 1);
}

/* Where the operand is with the registers as they are. */
static uint64_t address(const struct insn *i, const ZydisDecodedOperand *o, struct machine *m,
			uint64_t rip)
{
	unsigned bits = i->in.address_width;
	uint64_t ea = o->mem.disp.has_displacement ? (uint64_t)o->mem.disp.value : 0, *p;

	if (o->mem.base == ZYDIS_REGISTER_RIP || o->mem.base == ZYDIS_REGISTER_EIP)
		ea += rip + i->len;
	if ((p = gpr(m, o->mem.base)))
		ea += *p;
	if ((p = gpr(m, o->mem.index)))
		ea += *p * o->mem.scale;
	ea = cut(ea, bits);
	if (o->mem.segment == ZYDIS_REGISTER_FS)
		ea += m->fs_base;
	if (o->mem.segment == ZYDIS_REGISTER_GS)
		ea += m->gs_base;
	return ea;
}

/* Change registers so that the operand is at @target. */
static void aim(const struct insn *i, const ZydisDecodedOperand *o, struct machine *m, uint64_t rip,
		uint64_t target)
{
	uint64_t *base = gpr(m, o->mem.base), *index = gpr(m, o->mem.index);
	uint64_t off = target - address(i, o, m, rip), old;

	if (base && base == index) {
		*base += off / (1 + o->mem.scale);
	} else if (base) {
		old = *base;
		*base += off;
		/* What is above a 32-bit address does not matter. */
		if (i->in.address_width == 32)
			*base = (old & 0xffffffff00000000) | (uint32_t)*base;
	} else if (index) {
		*index += off / o->mem.scale;
	} else if (o->mem.segment == ZYDIS_REGISTER_FS) {
		m->fs_base += off;
	} else if (o->mem.segment == ZYDIS_REGISTER_GS) {
		m->gs_base += off;
	}
}

static uint64_t made_canonical(uint64_t x)
{
	return (uint64_t)((int64_t)(x << 16) >> 16);
}

static bool canonical(uint64_t x)
{
	return made_canonical(x) == x;
}

static bool bit_string(ZydisMnemonic m)
{
	return m == ZYDIS_MNEMONIC_BT || m == ZYDIS_MNEMONIC_BTS || m == ZYDIS_MNEMONIC_BTR ||
	       m == ZYDIS_MNEMONIC_BTC;
}

/* What is better not quite random, before addresses. */
static void tame(struct rng *r, const struct insn *i, struct machine *m)
{
	if (i->in.attributes &
	    (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE | ZYDIS_ATTRIB_HAS_REPNE))
		m->gpr[KL_RCX] = pick(r, 50) | (i->in.address_width < 64 ? rng(r) << 32 : 0);
	if (i->in.meta.category == ZYDIS_CATEGORY_XSAVE ||
	    i->in.meta.category == ZYDIS_CATEGORY_XSAVEOPT) {
		/* The process may have more components than the guest. */
		m->gpr[KL_RAX] = (m->gpr[KL_RAX] & ~0xffffffffull) | (rng(r) & native_features);
		m->gpr[KL_RDX] &= ~0xffffffffull;
	}
	if (bit_string(i->in.mnemonic) && i->op[0].type == ZYDIS_OPERAND_TYPE_MEMORY &&
	    i->op[1].type == ZYDIS_OPERAND_TYPE_REGISTER && chance(r, 90)) {
		uint64_t *p = gpr(m, i->op[1].reg.value);

		if (p)
			*p = (uint64_t)((int64_t)pick(r, 8192) - 4096);
	}
}

/* Indices of a gather: most of them small. */
static void vector_index(struct rng *r, const struct insn *i, const ZydisDecodedOperand *o,
			 struct machine *m)
{
	unsigned reg = (unsigned)ZydisRegisterGetId(o->mem.index) & 15;
	bool wide = i->in.mnemonic == ZYDIS_MNEMONIC_VGATHERQPD ||
		    i->in.mnemonic == ZYDIS_MNEMONIC_VGATHERQPS ||
		    i->in.mnemonic == ZYDIS_MNEMONIC_VPGATHERQD ||
		    i->in.mnemonic == ZYDIS_MNEMONIC_VPGATHERQQ;

	for (unsigned k = 0; k < 32; k += wide ? 8 : 4) {
		int64_t x = (int64_t)pick(r, 256) - 128;

		if (chance(r, 98))
			memcpy(m->x + (k < 16 ? 160 : 560) + 16 * reg + k, &x, wide ? 8 : 4);
	}
}

/* Images that load without #GP, mostly. */
static void poke_image(struct rng *r, const struct insn *i, const struct machine *m, uint64_t lin)
{
	uint64_t header[8] = {rng(r) & native_features};
	uint32_t mxcsr = (uint32_t)rng(r) & 0xffff;

	switch (i->in.mnemonic) {
	case ZYDIS_MNEMONIC_LDMXCSR:
	case ZYDIS_MNEMONIC_VLDMXCSR:
		poke(lin, &mxcsr, 4);
		break;
	case ZYDIS_MNEMONIC_FXRSTOR:
	case ZYDIS_MNEMONIC_FXRSTOR64:
		poke(lin, m->x, 512);
		break;
	case ZYDIS_MNEMONIC_XRSTOR:
	case ZYDIS_MNEMONIC_XRSTOR64:
		if (chance(r, 30))
			header[1] = 1ull << 63 | header[0] | (rng(r) & native_features);
		if (chance(r, 5))
			header[pick(r, 8)] ^= 1ull << pick(r, 64);
		poke(lin, m->x, 512);
		poke(lin + 512, header, 64);
		break;
	default:
		break;
	}
}

/* An image must not name what only the process can restore: to the guest that is #GP, and right. */
static void disown_foreign(const struct insn *i, uint64_t lin)
{
	uint64_t header[2]; /* XSTATE_BV, XCOMP_BV */

	if (i->in.mnemonic != ZYDIS_MNEMONIC_XRSTOR && i->in.mnemonic != ZYDIS_MNEMONIC_XRSTOR64)
		return;
	memcpy(header, guest_memory(lin + 512), sizeof(header));
	header[0] &= ~(uint64_t)foreign;
	header[1] &= ~(uint64_t)foreign;
	poke(lin + 512, header, sizeof(header));
}

static void operands(struct rng *r, const struct program *p, const struct insn *i,
		     struct machine *m, uint64_t rip)
{
	for (unsigned k = 0; k < i->in.operand_count; k++) {
		const ZydisDecodedOperand *o = &i->op[k];
		unsigned size = kl_max(o->size / 8u, 1u);
		uint64_t lin;

		if (o->type != ZYDIS_OPERAND_TYPE_MEMORY || o->mem.type == ZYDIS_MEMOP_TYPE_AGEN)
			continue;
		if (o->mem.type == ZYDIS_MEMOP_TYPE_VSIB)
			vector_index(r, i, o, m);
		if (o->visibility == ZYDIS_OPERAND_VISIBILITY_HIDDEN &&
		    (o->mem.base == ZYDIS_REGISTER_RSP || o->mem.base == ZYDIS_REGISTER_ESP ||
		     o->mem.base == ZYDIS_REGISTER_SP))
			continue;
		aim(i, o, m, rip, state_place(r, kl_min(size, 1024u), p->n == 1));
		lin = address(i, o, m, rip);
		if (lin - DATA < DATA_PAGES * KL_PAGE_SIZE) {
			poke(lin, pool + (pick(r, POOL - 1024) & ~7u), kl_min(size, 64u));
			if (size >= 4 && chance(r, 20)) /* equal to what it may be compared with */
				poke(lin, &m->gpr[KL_RAX], kl_min(size, 8u));
			if (chance(r, 80))
				poke_image(r, i, m, lin);
			disown_foreign(i, lin);
		}
	}
}

/* Targets of indirect branches and returns. */
static void branch_target(struct rng *r, const struct program *prog, const struct insn *i,
			  struct machine *m, uint64_t rip)
{
	uint64_t target = chance(r, 90) ? WAY(prog->mode, WAY_BRANCH) : state_value(r), *p;

	if (i->in.mnemonic == ZYDIS_MNEMONIC_RET) {
		poke(m->gpr[KL_RSP], &target, 8);
	} else if ((i->in.mnemonic == ZYDIS_MNEMONIC_JMP ||
		    i->in.mnemonic == ZYDIS_MNEMONIC_CALL) &&
		   !i->in.raw.imm[0].is_relative) {
		if (i->op[0].type == ZYDIS_OPERAND_TYPE_MEMORY)
			poke(address(i, &i->op[0], m, rip), &target, 8);
		else if ((p = gpr(m, i->op[0].reg.value)))
			*p = target;
	}
	if (i->in.mnemonic == ZYDIS_MNEMONIC_POPF || i->in.mnemonic == ZYDIS_MNEMONIC_POPFD ||
	    i->in.mnemonic == ZYDIS_MNEMONIC_POPFQ) {
		target = rng(r) & ~(uint64_t)KL_FL_TF;
		poke(m->gpr[KL_RSP], &target, 8);
	}
}

/* ---- x87 and vectors ---- */

static void random_x87(struct rng *r, uint8_t *x, unsigned plain)
{
	uint16_t fcw = 0x37f, fsw = 0;

	if (!chance(r, plain))
		fcw = (uint16_t)(0x40 | (rng(r) & 0xf00) | (chance(r, 50) ? 0x3f : rng(r) & 0x3f));
	fsw = (uint16_t)(rng(r) & (chance(r, 30) ? 0x7f7f : 0x7f00));
	if (fsw & ~fcw & 0x3f)
		fsw |= 0x8080;
	else
		fsw &= 0x7f7f;
	memcpy(x, &fcw, 2);
	memcpy(x + 2, &fsw, 2);
	x[4] = chance(r, 60) ? (uint8_t)(rng(r) | rng(r)) : chance(r, 50) ? 0xff : 0;
	for (unsigned i = 0; i < 8; i++) {
		uint64_t mant = state_value(r);
		uint16_t exp = (uint16_t)state_value(r);

		if (chance(r, 70)) { /* a normal number */
			mant |= 1ull << 63;
			exp = (uint16_t)(0x3fff - 70 + pick(r, 140) + (rng(r) & 0x8000));
		}
		memcpy(x + 32 + 16 * i, &mant, 8);
		memcpy(x + 32 + 16 * i + 8, &exp, 2);
	}
}

/* @plain percent of control words mask all exceptions. */
void state_random_x(struct rng *r, uint8_t *x, unsigned plain)
{
	uint32_t mxcsr = 0x1f80;
	uint64_t bv = native_features;

	memset(x, 0, 576);
	random_x87(r, x, plain);
	if (!chance(r, plain))
		mxcsr = (uint32_t)(rng(r) & 0xe07f) | 0x1f80;
	if (!chance(r, kl_max(plain, 90u)))
		mxcsr &= (uint32_t)rng(r) | 0xffff0000;
	memcpy(x + 24, &mxcsr, 4);
	memcpy(x + 28, &mxcsr_mask, 4);
	memcpy(x + 160, pool + (pick(r, POOL - 256) & ~7u), 256);
	memcpy(x + 512, &bv, 8);
	memcpy(x + 576, pool + (pick(r, POOL - 256) & ~7u), 256);
}

bool state_checks_alignment(const struct insn *i)
{
	return !i->legal ||
	       (!isa_piecewise(&i->in) && i->in.meta.category != ZYDIS_CATEGORY_X87_ALU &&
		i->in.meta.category != ZYDIS_CATEGORY_STRINGOP);
}

void state_random(struct rng *r, const struct program *p, struct machine *m)
{
	uint64_t rip = p->at, mask = p->mode == KL_CODE64 ? ~0ull : 0xffffffff;

	for (unsigned i = 0; i < 16; i++)
		m->gpr[i] = state_value(r) & mask;
	m->rip = p->at;
	m->rflags = 2 | KL_FL_IF | (rng(r) & (KL_FL_STATUS | KL_FL_ID));
	if (chance(r, 25))
		m->rflags |= KL_FL_DF;
	if (chance(r, 3) && p->n == 1 && state_checks_alignment(&p->insn[0]))
		m->rflags |= KL_FL_AC;
	m->fs_base = DATA + pick(r, DATA_PAGES * 4096);
	m->gs_base =
		chance(r, 90) ? DATA + pick(r, DATA_PAGES * 4096) : made_canonical(state_value(r));
	state_random_x(r, m->x, 65);
	for (unsigned k = 0; k < p->n && p->insn[k].legal; k++)
		tame(r, &p->insn[k], m);
	m->gpr[KL_RSP] = state_place(r, 16, p->n == 1);
	for (unsigned k = 0; k < p->n && p->insn[k].legal; k++) {
		operands(r, p, &p->insn[k], m, rip);
		branch_target(r, p, &p->insn[k], m, rip);
		rip += p->insn[k].len;
	}
	for (unsigned i = 0; i < 16; i++)
		m->gpr[i] &= mask;
	/* WRFSBASE and XRSTOR of the loader must not fault. */
	if (!canonical(m->fs_base))
		m->fs_base = DATA;
	if (!canonical(m->gs_base))
		m->gs_base = DATA;
}
