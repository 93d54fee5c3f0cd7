/* SPDX-License-Identifier: MIT */
/*
 * Random encodings. At the start all opcode maps are walked and what decodes to a usable
 * instruction is noted as a template, by mnemonic: mandatory prefix, map, opcode, the bits of
 * ModRM and VEX that select. An encoding is a template, every mnemonic with the same
 * probability, whose free bits are random and which has random prefixes more; or random
 * bytes throughout.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"

struct mnemonic {
	uint32_t first, n;
};

static struct template *templates[3];
static uint32_t nr_templates[3];
static struct mnemonic by_mnemonic[3][ZYDIS_MNEMONIC_MAX_VALUE + 1];
static uint16_t mnemonics[3][ZYDIS_MNEMONIC_MAX_VALUE + 1];
static unsigned nr_mnemonics[3];

unsigned generate_assemble(const struct template *t, uint8_t *p, unsigned rex, unsigned vvvv)
{
	unsigned n = 0;

	if (t->vex) {
		unsigned pp = t->prefix == 0x66 ? 1 : t->prefix == 0xf3 ? 2 : t->prefix ? 3 : 0;

		p[n++] = 0xc4;
		p[n++] = (uint8_t)((~rex & 7) << 5 | t->map);
		p[n++] = (uint8_t)(t->w << 7 | (~vvvv & 15) << 3 | t->l << 2 | pp);
	} else {
		if (t->prefix)
			p[n++] = t->prefix;
		if (rex || t->w)
			p[n++] = (uint8_t)(0x40 | rex | t->w << 3);
		if (t->map)
			p[n++] = 0x0f;
		if (t->map == 2)
			p[n++] = 0x38;
		else if (t->map == 3)
			p[n++] = 0x3a;
	}
	p[n++] = t->opcode;
	if (t->has_modrm)
		p[n++] = t->modrm;
	return n;
}

static void note(enum kl_code_mode mode, struct template *t)
{
	static uint32_t room[3];
	uint8_t bytes[24] = {0};
	ZydisDecodedInstruction in;
	ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT];
	unsigned n = generate_assemble(t, bytes, 0, 0);

	memset(bytes + n, 0, sizeof(bytes) - n);
	if (!ZYAN_SUCCESS(ZydisDecoderDecodeFull(isa_decoder(mode), bytes, 15, &in, op)) ||
	    !isa_usable(&in, op))
		return;
	if (!(in.attributes & ZYDIS_ATTRIB_HAS_MODRM) != !t->has_modrm)
		return;
	t->mnemonic = (uint16_t)in.mnemonic;
	if (nr_templates[mode] == room[mode]) {
		room[mode] = room[mode] ? 2 * room[mode] : 4096;
		templates[mode] = realloc(templates[mode], room[mode] * sizeof(*t));
		if (!templates[mode])
			abort();
	}
	templates[mode][nr_templates[mode]++] = *t;
}

/* None, or every ModRM that may select: reg always, rm where there is no memory. */
static void note_all_modrm(enum kl_code_mode mode, struct template *t)
{
	t->has_modrm = false;
	t->modrm = 0;
	note(mode, t);
	t->has_modrm = true;
	for (unsigned reg = 0; reg < 8; reg++) {
		t->modrm = (uint8_t)(reg << 3 | 3);
		note(mode, t);
		for (unsigned rm = 0; rm < 8; rm++) {
			t->modrm = (uint8_t)(0xc0 | reg << 3 | rm);
			note(mode, t);
		}
	}
}

static int by_name(const void *a, const void *b)
{
	return ((const struct template *)a)->mnemonic - ((const struct template *)b)->mnemonic;
}

static void walk(enum kl_code_mode mode)
{
	static const uint8_t prefixes[] = {0, 0x66, 0xf2, 0xf3};
	unsigned last = ZYDIS_MNEMONIC_INVALID;

	for (unsigned map = 0; map < 4; map++)
		for (unsigned o = 0; o < 256; o++)
			for (unsigned p = 0; p < 4; p++)
				for (unsigned w = 0; w < 2; w++) {
					struct template t = {.prefix = prefixes[p],
							     .map = (uint8_t)map,
							     .opcode = (uint8_t)o,
							     .w = (uint8_t)w};

					if (!w || mode == KL_CODE64)
						note_all_modrm(mode, &t);
					t.vex = 1;
					for (unsigned l = 0; map && l < 2; l++) {
						t.l = (uint8_t)l;
						note_all_modrm(mode, &t);
					}
				}
	qsort(templates[mode], nr_templates[mode], sizeof(struct template), by_name);
	for (uint32_t i = 0; i < nr_templates[mode]; i++) {
		unsigned m = templates[mode][i].mnemonic;

		if (m != last) {
			by_mnemonic[mode][m].first = i;
			mnemonics[mode][nr_mnemonics[mode]++] = (uint16_t)m;
		}
		by_mnemonic[mode][m].n++;
		last = m;
	}
}

void generate_init(void)
{
	walk(KL_CODE64);
	walk(KL_CODE32);
}

const struct template *generate_pick(struct rng *r, enum kl_code_mode mode, ZydisMnemonic m)
{
	if (m == ZYDIS_MNEMONIC_INVALID)
		m = (ZydisMnemonic)mnemonics[mode][pick(r, nr_mnemonics[mode])];
	if (!by_mnemonic[mode][m].n)
		return NULL;
	return &templates[mode][by_mnemonic[mode][m].first + pick(r, by_mnemonic[mode][m].n)];
}

bool generate_expects(enum kl_code_mode mode, ZydisMnemonic m)
{
	return by_mnemonic[mode][m].n > 0;
}

/* ---- one encoding ---- */

static unsigned random_prefixes(struct rng *r, uint8_t *p)
{
	static const uint8_t list[] = {0x66, 0x66, 0x66, 0xf2, 0xf3, 0x67, 0x67, 0x64,
				       0x65, 0x2e, 0x36, 0x3e, 0x26, 0xf0, 0xf0, 0x64};
	unsigned n = 0, want = chance(r, 55) ? 0 : chance(r, 70) ? 1 : 1 + pick(r, 4);

	while (n < want)
		p[n++] = list[pick(r, KL_ARRAY_SIZE(list))];
	return n;
}

/* ModRM with the template's selecting bits and any memory operand. */
static uint8_t random_modrm(struct rng *r, const struct template *t)
{
	unsigned m = (unsigned)rng(r) & 0xff;

	if (t->has_modrm && t->modrm < 0xc0)
		return (uint8_t)((m % 0xc0 & ~0x38u) | (t->modrm & 0x38));
	/* Every rm is a template of its own, so that those that select come up. */
	return t->modrm;
}

static unsigned from_template(struct rng *r, enum kl_code_mode mode, uint8_t *p)
{
	const struct mnemonic *m = &by_mnemonic[mode][mnemonics[mode][pick(r, nr_mnemonics[mode])]];
	struct template t = templates[mode][m->first + pick(r, m->n)];
	unsigned n = random_prefixes(r, p),
		 rex = mode == KL_CODE64 && chance(r, 50) ? (unsigned)rng(r) & 7 : 0;
	unsigned vvvv = chance(r, 60) ? (unsigned)rng(r) & 15 : 0;

	t.modrm = random_modrm(r, &t);
	if (mode != KL_CODE64)
		vvvv &= 7;
	if (t.vex && chance(r, 97))
		n = 0; /* prefixes make #UD of most */
	return n + generate_assemble(&t, p + n, rex, vvvv);
}

static unsigned from_chaos(struct rng *r, enum kl_code_mode mode, uint8_t *p)
{
	unsigned n = random_prefixes(r, p), map = pick(r, 8);

	if (mode == KL_CODE64 && chance(r, 50))
		p[n++] = (uint8_t)(0x40 | (rng(r) & 15));
	if (map >= 3 && map < 7)
		p[n++] = 0x0f;
	if (map == 5)
		p[n++] = 0x38;
	if (map == 6)
		p[n++] = 0x3a;
	if (map == 7) {
		p[n++] = chance(r, 50) ? 0xc5 : 0xc4;
		if (p[n - 1] == 0xc4)
			p[n++] = (uint8_t)((rng(r) & 0xe0) | (chance(r, 95) ? 1 + pick(r, 3) : 0));
	}
	return n;
}

void fill_random(struct rng *r, uint8_t *p, unsigned n)
{
	for (unsigned i = 0; i < n; i += 8) {
		uint64_t x = rng(r);

		memcpy(p + i, &x, 8);
	}
	/* Displacements and immediates: small ones, too. */
	if (chance(r, 30))
		memset(p + 1 + pick(r, 4), chance(r, 50) ? 0 : 0xff, 4);
}

/* Registers that hold addresses throughout a straight line. */
static bool is_pointer(ZydisRegister reg)
{
	static const uint16_t pointers = 1 << KL_RBX | 1 << KL_RSP | 1 << KL_RBP | 1 << KL_RSI |
					 1 << KL_RDI | 1 << KL_R12 | 1 << KL_R13;
	ZydisRegisterClass c = ZydisRegisterGetClass(reg);

	return c >= ZYDIS_REGCLASS_GPR16 && c <= ZYDIS_REGCLASS_GPR64 &&
	       (pointers >> (ZydisRegisterGetId(reg) & 15) & 1);
}

/* Fit for the inside of a straight line: it goes on behind it, and memory stays in reach. */
static bool is_straight(const struct insn *i)
{
	switch (i->in.meta.category) {
	case ZYDIS_CATEGORY_COND_BR:
	case ZYDIS_CATEGORY_UNCOND_BR:
	case ZYDIS_CATEGORY_CALL:
	case ZYDIS_CATEGORY_RET:
		return false;
	default:
		break;
	}
	if (i->in.mnemonic == ZYDIS_MNEMONIC_POPF || i->in.mnemonic == ZYDIS_MNEMONIC_POPFD ||
	    i->in.mnemonic == ZYDIS_MNEMONIC_POPFQ || i->in.mnemonic == ZYDIS_MNEMONIC_ENTER ||
	    i->in.mnemonic == ZYDIS_MNEMONIC_LEAVE ||
	    (i->in.attributes &
	     (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE | ZYDIS_ATTRIB_HAS_REPNE)))
		return false;
	for (unsigned k = 0; k < i->in.operand_count_visible; k++) {
		const ZydisDecodedOperand *o = &i->op[k];

		if (o->type == ZYDIS_OPERAND_TYPE_REGISTER &&
		    (o->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE) &&
		    (is_pointer(o->reg.value) ||
		     (o->reg.value >= ZYDIS_REGISTER_BL && o->reg.value <= ZYDIS_REGISTER_R13B)))
			return false;
		if (o->type != ZYDIS_OPERAND_TYPE_MEMORY || o->mem.type == ZYDIS_MEMOP_TYPE_AGEN)
			continue;
		if (o->mem.index != ZYDIS_REGISTER_NONE)
			return false;
		if (o->mem.base != ZYDIS_REGISTER_NONE && o->mem.base != ZYDIS_REGISTER_RIP &&
		    (!is_pointer(o->mem.base) || i->in.raw.disp.size > 8))
			return false;
	}
	return true;
}

/*
 * Alone only: XSAVE with a bitmap in registers, x87 pointers, flags that the next instruction
 * must not see.
 */
static bool is_loner(const struct insn *i)
{
	return i->in.meta.category == ZYDIS_CATEGORY_XSAVE ||
	       i->in.meta.category == ZYDIS_CATEGORY_XSAVEOPT ||
	       isa_saves_pointers(i->in.mnemonic) || isa_undefined_flags(i->in.mnemonic);
}

enum wish { ANY, STRAIGHT, LAST };

/* An instruction that takes part, or one that does not exist. */
static void random_insn(struct rng *r, enum kl_code_mode mode, enum wish wish, struct insn *i)
{
	uint8_t bytes[40];
	ZyanStatus status;
	unsigned n;

	for (;;) {
		n = chance(r, 80) ? from_template(r, mode, bytes) : from_chaos(r, mode, bytes);
		fill_random(r, bytes + n, 16);
		status = ZydisDecoderDecodeFull(isa_decoder(mode), bytes, 15, &i->in, i->op);
		if (ZYAN_SUCCESS(status) && isa_usable(&i->in, i->op) &&
		    (wish != STRAIGHT || is_straight(i)) && (wish == ANY || !is_loner(i)))
			break;
		/* VEX: much that the host has and the guest has not. */
		if (ZYAN_SUCCESS(status) || wish != ANY || !chance(r, 8) ||
		    memchr(bytes, 0xc4, n) || memchr(bytes, 0xc5, n))
			continue;
		/* If it exists after all, what follows shall not be just anything. */
		memset(bytes + n + 2, 0xcc, 14);
		status = ZydisDecoderDecodeFull(isa_decoder(mode), bytes, 15, &i->in, i->op);
		if (!ZYAN_SUCCESS(status) && !isa_reserved_bytes(bytes, 15))
			break;
	}
	i->legal = ZYAN_SUCCESS(status);
	i->len = i->legal ? i->in.length : 15;
	memcpy(i->bytes, bytes, 16);
}

/* ---- where code lies, and where it goes ---- */

/* Displacement of a memory operand that has no register to carry its address. */
static void fix_displacement(struct rng *r, const struct program *p, struct insn *i, uint64_t at)
{
	const ZydisDecodedOperand *o = NULL;
	uint64_t target = DATA + KL_PAGE_SIZE + (rng(r) & 0x3fff);
	int64_t disp;
	unsigned size = i->in.raw.disp.size;

	for (unsigned k = 0; k < i->in.operand_count && !o; k++)
		if (i->op[k].type == ZYDIS_OPERAND_TYPE_MEMORY)
			o = &i->op[k];
	if (!o || size < 32 ||
	    (o->mem.index != ZYDIS_REGISTER_NONE && o->mem.type != ZYDIS_MEMOP_TYPE_VSIB))
		return;
	if (o->mem.segment == ZYDIS_REGISTER_FS || o->mem.segment == ZYDIS_REGISTER_GS)
		return; /* the segment's base will do */
	if (chance(r, 30))
		target &= ~63ul;
	if (o->mem.base == ZYDIS_REGISTER_RIP || o->mem.base == ZYDIS_REGISTER_EIP)
		disp = (int64_t)(target - (at + i->len));
	else if (o->mem.base == ZYDIS_REGISTER_NONE)
		disp = (int64_t)target;
	else
		return;
	memcpy(i->bytes + i->in.raw.disp.offset, &disp, size / 8);
}

unsigned put_jump(uint8_t *p, uint64_t at, uint64_t way)
{
	int32_t rel = (int32_t)(way - (at + 5));

	p[0] = 0xe9;
	memcpy(p + 1, &rel, 4);
	return 5;
}

void put_code(uint64_t at, const void *bytes, unsigned n)
{
	if (at - CODE <= CODE_SIZE) /* nothing is behind it */
		n = (unsigned)kl_min((uint64_t)n, CODE + CODE_SIZE - at);
	memcpy(guest_memory(at), bytes, n);
	memcpy(native_memory(at), bytes, n);
}

static bool is_relative(const struct insn *i)
{
	return i->in.raw.imm[0].is_relative;
}

/* A relative branch goes to a landing pad near it. */
static void fix_branch(struct rng *r, const struct program *p, struct insn *i, uint64_t at)
{
	unsigned size = i->in.raw.imm[0].size / 8;
	uint64_t pad;
	int64_t rel;
	uint8_t jump[8];

	if (size == 2)
		return; /* somewhere below 64 KiB: a fault */
	pad = at + i->len + 5 + pick(r, size == 1 ? 100 : 200);
	if (p->n == 1 && chance(r, 30)) /* not into a straight line */
		pad = at - 5 - pick(r, 90);
	if (size == 4 && chance(r, 20))
		pad = chance(r, 50) ? WAY(p->mode, WAY_BRANCH) : CODE + CODE_SIZE + pick(r, 100);
	rel = (int64_t)(pad - (at + i->len));
	memcpy(i->bytes + i->in.raw.imm[0].offset, &rel, size);
	if (pad - CODE < CODE_SIZE)
		put_code(pad, jump, put_jump(jump, pad, WAY(p->mode, WAY_BRANCH)));
}

/* What straight lines of a batch are made of: they are found rarely. */
#define NR_STRAIGHT  48
#define MAX_STRAIGHT 20
static struct insn straight[NR_STRAIGHT];
static enum kl_code_mode mode_of_batch;

void generate_batch(struct rng *r)
{
	mode_of_batch = chance(r, 70) ? KL_CODE64 : KL_CODE32;
	for (unsigned i = 0; i < NR_STRAIGHT; i++)
		random_insn(r, mode_of_batch, STRAIGHT, &straight[i]);
}

void generate(struct rng *r, struct program *p)
{
	uint8_t code[MAX_STRAIGHT * 16 + 32];
	unsigned len = 0;

	p->mode = mode_of_batch;
	p->n = chance(r, 20) ? 2 + pick(r, MAX_STRAIGHT - 1) : 1;
	for (unsigned k = 0; k < p->n; k++) {
		if (k + 1 < p->n)
			p->insn[k] = straight[pick(r, NR_STRAIGHT)];
		else
			random_insn(r, p->mode, p->n == 1 ? ANY : LAST, &p->insn[k]);
		len += p->insn[k].len;
	}
	p->len = len;
	p->at = CODE + 128 + pick(r, CODE_SIZE - 1024);
	if (chance(r, 10))
		p->at = CODE + KL_PAGE_SIZE - pick(r, len + 1);
	else if (chance(r, 2) && p->insn[p->n - 1].legal)
		p->at = CODE + CODE_SIZE - pick(r, len + 1);
	for (unsigned k = 0, off = 0; k < p->n; k++) {
		struct insn *i = &p->insn[k];

		if (i->legal && is_relative(i))
			fix_branch(r, p, i, p->at + off);
		else if (i->legal)
			fix_displacement(r, p, i, p->at + off);
		memcpy(code + off, i->bytes, i->len);
		off += i->len;
		/* The operands again, with what was changed. */
		if (i->legal)
			ZydisDecoderDecodeFull(isa_decoder(p->mode), i->bytes, i->len, &i->in,
					       i->op);
	}
	len += put_jump(code + len, p->at + len, WAY(p->mode, WAY_THROUGH));
	put_code(p->at, code, len);
}

void generate_each_memory_form(void (*fn)(struct program *p))
{
	static struct program p;
	uint8_t code[24];

	p.mode = KL_CODE64;
	p.n = 1;
	p.at = CODE + 128;
	for (uint32_t k = 0; k < nr_templates[KL_CODE64]; k++) {
		const struct template *t = &templates[KL_CODE64][k];
		struct insn *i = &p.insn[0];

		if (!t->has_modrm || t->modrm >= 0xc0)
			continue;
		memset(i, 0, sizeof(*i));
		generate_assemble(t, i->bytes, 0, 0);
		if (!ZYAN_SUCCESS(ZydisDecoderDecodeFull(isa_decoder(p.mode), i->bytes, 15, &i->in,
							 i->op)))
			continue;
		i->legal = true;
		i->len = i->in.length;
		p.len = i->len;
		memcpy(code, i->bytes, i->len);
		put_jump(code + i->len, p.at + i->len, WAY(p.mode, WAY_THROUGH));
		put_code(p.at, code, i->len + 5u);
		fn(&p);
	}
}
