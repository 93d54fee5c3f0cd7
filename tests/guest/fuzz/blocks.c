/* SPDX-License-Identifier: MIT */
/*
 * Random blocks: a main line and functions that it calls, of instructions from all of the table,
 * with branches to each other.
 *
 * Some registers have a role throughout, so that a program gets far before it faults: pointers into
 * DATA, small indices, and one that counts. The counter is touched by nothing but backward
 * branches, each of which takes one off it and falls through when it is negative: so every program
 * ends. All other registers, flags and memory are anybody's, and now and then somebody ruins a
 * pointer.
 *
 * Instructions are made first, with branches that name what they go to by number; then what is not
 * dropped is laid out. So less of the same program is again a program.
 */
#include <string.h>

#include "fuzz.h"

enum fix {
	FIX_NONE,
	FIX_BRANCH, /* relative branch to @to */
	FIX_LABEL,  /* 32-bit displacement or immediate: where @to is */
	FIX_SLOT,   /* displacement: the slot that holds where @to is */
	FIX_DATA,   /* RIP-relative: @address */
	FIX_OPCODE, /* displacement: an opcode that may be changed, */
	FIX_IMM,    /* an immediate of @size bytes; NOP if there is none */
};

struct item {
	struct insn insn;
	enum fix fix;
	uint8_t size;
	bool glued; /* to what comes before it: nothing jumps here */
	bool fixed; /* cannot be dropped */
	int to, slot;
	uint64_t address;
	uint64_t at;
};

#define NR_SLOTS      16
#define MAX_FUNCTIONS 3

/* The program that is being made, and what its registers are for. */
static struct item items[MAX_INSNS];
static int nr_items;
static int slot_of[NR_SLOTS], nr_slots;
static uint64_t slots_at;
static struct rng *rnd;
static enum kl_code_mode mode;
static bool patching, checks_alignment, common;
static uint16_t pointers, indices;
static unsigned counter;
static int function[MAX_FUNCTIONS], nr_functions;
/* Where branches of what is being made may go: the items from here on, */
static int region;
/* and calls: to functions from this one on. */
static int callee;

static uint8_t code[MAX_INSNS * 16 + NR_SLOTS * 8];
static unsigned code_size;
static uint64_t code_at;
static uint8_t begins[sizeof(code)];
uint8_t blocks_made_as[MAX_INSNS];

/* ---- what instructions do to registers ---- */

static unsigned gpr_bit(ZydisRegister reg)
{
	ZydisMachineMode m =
		mode == KL_CODE64 ? ZYDIS_MACHINE_MODE_LONG_64 : ZYDIS_MACHINE_MODE_LONG_COMPAT_32;
	ZydisRegister whole = ZydisRegisterGetLargestEnclosing(m, reg);
	ZydisRegisterClass c = ZydisRegisterGetClass(whole);

	if (c != ZYDIS_REGCLASS_GPR64 && c != ZYDIS_REGCLASS_GPR32)
		return 0;
	return 1u << (ZydisRegisterGetId(whole) & 15);
}

static unsigned written(const struct insn *i)
{
	unsigned w = 0;

	if (i->in.mnemonic == ZYDIS_MNEMONIC_POPA || i->in.mnemonic == ZYDIS_MNEMONIC_POPAD)
		return 0xff & ~(1u << KL_RSP);
	for (unsigned k = 0; k < i->in.operand_count; k++)
		if (i->op[k].type == ZYDIS_OPERAND_TYPE_REGISTER &&
		    (i->op[k].actions & ZYDIS_OPERAND_ACTION_MASK_WRITE))
			w |= gpr_bit(i->op[k].reg.value);
	return w;
}

static bool mentions_counter(const struct insn *i)
{
	for (unsigned k = 0; k < i->in.operand_count; k++)
		if (i->op[k].type == ZYDIS_OPERAND_TYPE_REGISTER &&
		    (gpr_bit(i->op[k].reg.value) >> counter & 1))
			return true;
	return false;
}

static bool is_string(const struct insn *i)
{
	return i->in.meta.category == ZYDIS_CATEGORY_STRINGOP;
}

/* What such instructions change anyway: they would hardly come up. */
static unsigned pardoned(const struct insn *i)
{
	if (is_string(i))
		return 1u << KL_RSI | 1u << KL_RDI | 1u << KL_RCX;
	switch (i->in.mnemonic) {
	case ZYDIS_MNEMONIC_PUSH:
	case ZYDIS_MNEMONIC_PUSHA:
	case ZYDIS_MNEMONIC_PUSHAD:
	case ZYDIS_MNEMONIC_PUSHF:
	case ZYDIS_MNEMONIC_PUSHFD:
	case ZYDIS_MNEMONIC_PUSHFQ:
	case ZYDIS_MNEMONIC_POP:
		return 1u << KL_RSP;
	case ZYDIS_MNEMONIC_ENTER:
	case ZYDIS_MNEMONIC_LEAVE:
		return 1u << KL_RSP | 1u << KL_RBP;
	default:
		return 0;
	}
}

/* Fit for the middle of a program. */
static bool is_plain(const struct insn *i)
{
	const ZydisDecodedOperand *m = NULL;
	unsigned roles;

	switch (i->in.meta.category) {
	case ZYDIS_CATEGORY_COND_BR:
	case ZYDIS_CATEGORY_UNCOND_BR:
	case ZYDIS_CATEGORY_CALL:
	case ZYDIS_CATEGORY_RET:
	case ZYDIS_CATEGORY_XSAVE: /* bitmaps in registers */
	case ZYDIS_CATEGORY_XSAVEOPT:
		return false;
	default:
		break;
	}
	switch (i->in.mnemonic) {
	case ZYDIS_MNEMONIC_POPF: /* TF */
	case ZYDIS_MNEMONIC_POPFD:
	case ZYDIS_MNEMONIC_POPFQ:
		return false;
	default:
		break;
	}
	if ((i->in.attributes & ZYDIS_ATTRIB_IS_PRIVILEGED) && !chance(rnd, 5))
		return false;
	if (checks_alignment && !state_checks_alignment(i))
		return false;
	if (isa_saves_pointers(i->in.mnemonic) || (written(i) >> counter & 1))
		return false;
	roles = written(i) & ~pardoned(i) & (pointers | indices);
	if (roles && !chance(rnd, 2))
		return false;
	/* Bit strings reach far. */
	for (unsigned k = 0; k < i->in.operand_count_visible && !m; k++)
		if (i->op[k].type == ZYDIS_OPERAND_TYPE_MEMORY)
			m = &i->op[k];
	if (m &&
	    (i->in.mnemonic == ZYDIS_MNEMONIC_BT || i->in.mnemonic == ZYDIS_MNEMONIC_BTS ||
	     i->in.mnemonic == ZYDIS_MNEMONIC_BTR || i->in.mnemonic == ZYDIS_MNEMONIC_BTC) &&
	    i->op[1].type == ZYDIS_OPERAND_TYPE_REGISTER)
		return (gpr_bit(i->op[1].reg.value) & indices) || chance(rnd, 5);
	if (m && m->mem.type == ZYDIS_MEMOP_TYPE_VSIB)
		return chance(rnd, 10);
	return true;
}

/* ---- encodings ---- */

static unsigned one_of(unsigned set)
{
	unsigned n = pick(rnd, (unsigned)__builtin_popcount(set));

	while (n--)
		set &= set - 1;
	return (unsigned)__builtin_ctz(set);
}

static uint64_t data_address(void)
{
	uint64_t a = chance(rnd, 88) ? DATA + KL_PAGE_SIZE + pick(rnd, 2 * KL_PAGE_SIZE)
				     : DATA + pick(rnd, DATA_PAGES * KL_PAGE_SIZE);

	return chance(rnd, 60) ? a & ~31ull : a;
}

/* A random operand in memory: ModRM (with @reg), SIB, displacement; adds to @rex. */
static unsigned memory_operand(uint8_t reg, uint8_t *p, unsigned *rex, struct item *i)
{
	unsigned n = 0, how = pick(rnd, 100), base = one_of(pointers), index = 4, scale = 0, size;
	int32_t disp = (int32_t)(rng(rnd) >> 52) - 2048;

	if (chance(rnd, 60))
		disp &= ~15;
	if (how < 18) { /* no base: relative to RIP, or absolute */
		i->address = data_address();
		disp = (int32_t)i->address;
		if (mode == KL_CODE64 && how < 5) {
			p[n++] = (uint8_t)(reg << 3 | 4);
			p[n++] = 0x25;
		} else {
			p[n++] = (uint8_t)(reg << 3 | 5);
			i->fix = mode == KL_CODE64 ? FIX_DATA : FIX_NONE;
		}
		memcpy(p + n, &disp, 4);
		return n + 4;
	}
	if (how < 20) /* anywhere */
		base = pick(rnd, mode == KL_CODE64 ? 16 : 8);
	if (how > 65 && indices) {
		index = one_of(indices);
		scale = pick(rnd, 4);
	}
	size = chance(rnd, 25) && (base & 7) != 5 ? 0 : chance(rnd, 60) ? 1 : 4;
	p[n++] = (uint8_t)((size == 0 ? 0 : size == 1 ? 0x40 : 0x80) | reg << 3);
	if (index == 4 && (base & 7) != 4 && chance(rnd, 90)) {
		p[0] |= (uint8_t)(base & 7);
	} else {
		p[0] |= 4;
		p[n++] = (uint8_t)(scale << 6 | (index & 7) << 3 | (base & 7));
	}
	*rex |= base >> 3 | index >> 3 << 1;
	memcpy(p + n, &disp, size);
	return n + size;
}

static bool lockable(const struct template *t)
{
	switch (t->mnemonic) {
	case ZYDIS_MNEMONIC_ADD:
	case ZYDIS_MNEMONIC_OR:
	case ZYDIS_MNEMONIC_ADC:
	case ZYDIS_MNEMONIC_SBB:
	case ZYDIS_MNEMONIC_AND:
	case ZYDIS_MNEMONIC_SUB:
	case ZYDIS_MNEMONIC_XOR:
	case ZYDIS_MNEMONIC_INC:
	case ZYDIS_MNEMONIC_DEC:
	case ZYDIS_MNEMONIC_NOT:
	case ZYDIS_MNEMONIC_NEG:
	case ZYDIS_MNEMONIC_BTS:
	case ZYDIS_MNEMONIC_BTR:
	case ZYDIS_MNEMONIC_BTC:
	case ZYDIS_MNEMONIC_XADD:
	case ZYDIS_MNEMONIC_CMPXCHG:
	case ZYDIS_MNEMONIC_CMPXCHG8B:
	case ZYDIS_MNEMONIC_CMPXCHG16B:
	case ZYDIS_MNEMONIC_XCHG:
		return true;
	default:
		return false;
	}
}

/* Displacements that are not ours: hidden operands, and what needs a register. */
static void fix_enter(struct insn *i)
{
	uint8_t *imm = i->bytes + i->in.raw.imm[0].offset;

	if (i->in.mnemonic != ZYDIS_MNEMONIC_ENTER)
		return;
	imm[0] = (uint8_t)pick(rnd, 100);
	imm[1] = 0;
	i->bytes[i->in.raw.imm[1].offset] = (uint8_t)pick(rnd, 4);
}

/* Try: a random encoding of a template. */
static bool encode(const struct template *from, bool want_memory, bool want_lock, struct item *i)
{
	static const uint8_t reps[] = {0xf2, 0xf3};
	struct template t = *from;
	uint8_t bytes[40], operand[8];
	unsigned n = 0, m = 0, rex = 0;
	bool wide = mode == KL_CODE64;
	struct insn *insn = &i->insn;

	memset(i, 0, sizeof(*i));
	i->to = i->slot = -1;
	if (wide && chance(rnd, 60))
		rex = (unsigned)rng(rnd) & 5;
	if (t.has_modrm && (want_memory || t.modrm < 0xc0)) {
		rex &= 4;
		m = memory_operand(t.modrm >> 3 & 7, operand, &rex, i);
		t.modrm = operand[0];
		if (chance(rnd, 5))
			bytes[n++] = chance(rnd, 50) ? 0x64 : 0x65;
		if (wide && chance(rnd, 5))
			bytes[n++] = 0x67;
		if (want_lock && lockable(&t))
			bytes[n++] = 0xf0;
	}
	if (!t.has_modrm && !t.map && t.opcode >= 0xa4 && t.opcode <= 0xaf && chance(rnd, 50))
		bytes[n++] = reps[pick(rnd, 2)];
	n += generate_assemble(&t, bytes + n, rex,
			       chance(rnd, 60) ? (unsigned)rng(rnd) & (wide ? 15 : 7) : 0);
	if (m) {
		memcpy(bytes + n, operand + 1, m - 1);
		n += m - 1;
	}
	fill_random(rnd, bytes + n, 16);
	if (!ZYAN_SUCCESS(
		    ZydisDecoderDecodeFull(isa_decoder(mode), bytes, 15, &insn->in, insn->op)) ||
	    !isa_usable(&insn->in, insn->op))
		return false;
	insn->legal = true;
	insn->len = insn->in.length;
	memcpy(insn->bytes, bytes, 16);
	/* MOV from and to control registers takes any ModRM for registers. */
	if (i->fix == FIX_DATA && insn->in.raw.disp.size != 32)
		return false;
	fix_enter(insn);
	return is_plain(insn);
}

/* ---- which instructions ---- */

#define CONDITIONS(x)                                                                   \
	ZYDIS_MNEMONIC_##x##O, ZYDIS_MNEMONIC_##x##NO, ZYDIS_MNEMONIC_##x##B,           \
		ZYDIS_MNEMONIC_##x##NB, ZYDIS_MNEMONIC_##x##Z, ZYDIS_MNEMONIC_##x##NZ,  \
		ZYDIS_MNEMONIC_##x##BE, ZYDIS_MNEMONIC_##x##NBE, ZYDIS_MNEMONIC_##x##S, \
		ZYDIS_MNEMONIC_##x##NS, ZYDIS_MNEMONIC_##x##P, ZYDIS_MNEMONIC_##x##NP,  \
		ZYDIS_MNEMONIC_##x##L, ZYDIS_MNEMONIC_##x##NL, ZYDIS_MNEMONIC_##x##LE,  \
		ZYDIS_MNEMONIC_##x##NLE

#define M(x) ZYDIS_MNEMONIC_##x
static const ZydisMnemonic producers[] = {
	M(ADD),  M(SUB),     M(CMP),   M(TEST),  M(AND),    M(OR),      M(XOR),   M(INC),  M(DEC),
	M(NEG),  M(ADC),     M(SBB),   M(SHL),   M(SHR),    M(SAR),     M(ROL),   M(ROR),  M(RCL),
	M(RCR),  M(SHLD),    M(SHRD),  M(IMUL),  M(MUL),    M(BT),      M(BTS),   M(BTR),  M(BTC),
	M(BSF),  M(BSR),     M(TZCNT), M(LZCNT), M(POPCNT), M(ANDN),    M(BLSI),  M(BLSR), M(BZHI),
	M(XADD), M(CMPXCHG), M(ADD),   M(SUB),   M(CMP),    M(TEST),    M(ADD),   M(SUB),  M(CMP),
	M(STC),  M(CLC),     M(CMC),   M(SAHF),  M(COMISD), M(UCOMISS), M(PTEST), M(DIV),  M(IDIV),
};
static const ZydisMnemonic consumers[] = {
	CONDITIONS(SET), CONDITIONS(CMOV), M(ADC),    M(SBB),    M(RCL),    M(RCR),
	M(LAHF),         M(ADCX),          M(ADOX),   M(CMC),    M(SALC),   M(ADC),
	M(SBB),          M(PUSHF),         M(PUSHFD), M(PUSHFQ), M(FCMOVB), M(FCMOVNE),
};
static const ZydisMnemonic moves[] = {
	M(MOV),  M(MOV),   M(MOV),   M(MOV),  M(MOVZX), M(MOVSX),  M(MOVSXD), M(LEA), M(LEA),
	M(XCHG), M(BSWAP), M(MOVBE), M(CBW),  M(CWDE),  M(CDQE),   M(CWD),    M(CDQ), M(CQO),
	M(NOT),  M(SHLX),  M(RORX),  M(MULX), M(PEXT),  M(MOVNTI), M(XLAT),
};
static const ZydisMnemonic stack[] = {
	M(PUSH),  M(PUSH),  M(PUSH),   M(POP),   M(POP),
	M(ENTER), M(LEAVE), M(PUSHAD), M(POPAD), M(PUSHA),
};
static const ZydisMnemonic strings[] = {
	M(MOVSB), M(MOVSW), M(MOVSD), M(MOVSQ), M(STOSB), M(STOSW), M(STOSD),
	M(STOSQ), M(LODSB), M(LODSW), M(LODSD), M(LODSQ), M(SCASB), M(SCASW),
	M(SCASD), M(SCASQ), M(CMPSB), M(CMPSW), M(CMPSD), M(CMPSQ),
};
static const ZydisMnemonic locked[] = {
	M(ADD),  M(OR),      M(ADC),       M(SBB),        M(AND),  M(SUB), M(XOR),
	M(INC),  M(DEC),     M(NOT),       M(NEG),        M(BTS),  M(BTR), M(BTC),
	M(XADD), M(CMPXCHG), M(CMPXCHG8B), M(CMPXCHG16B), M(XCHG),
};
static const ZydisMnemonic vectors[] = {
	M(MOVAPS),       M(MOVUPS),       M(MOVDQA),      M(MOVDQU),      M(MOVSD),
	M(MOVSS),        M(MOVQ),         M(MOVD),        M(MOVAPD),      M(MOVLPS),
	M(MOVHPD),       M(MOVNTDQ),      M(ADDPS),       M(MULPS),       M(ADDPD),
	M(SUBSD),        M(MULSD),        M(DIVSS),       M(SQRTPD),      M(MINPS),
	M(CVTSI2SD),     M(CVTTSD2SI),    M(CVTPS2PD),    M(COMISD),      M(UCOMISD),
	M(UCOMISS),      M(PTEST),        M(PXOR),        M(POR),         M(PADDD),
	M(PSUBB),        M(PMULLW),       M(PCMPEQB),     M(PCMPGTD),     M(PSHUFB),
	M(PSHUFD),       M(PUNPCKLBW),    M(PMOVMSKB),    M(PINSRW),      M(PEXTRB),
	M(PSLLDQ),       M(SHUFPS),       M(VMOVAPS),     M(VMOVUPS),     M(VMOVDQA),
	M(VMOVDQU),      M(VMOVSD),       M(VMOVQ),       M(VADDPS),      M(VMULPD),
	M(VSUBSS),       M(VXORPS),       M(VPXOR),       M(VPADDQ),      M(VPCMPEQB),
	M(VPMOVMSKB),    M(VPSHUFB),      M(VPERM2F128),  M(VINSERTF128), M(VEXTRACTF128),
	M(VBROADCASTSS), M(VPBROADCASTB), M(VFMADD231PS), M(VFMADD213SD), M(VUCOMISD),
	M(VPTEST),       M(VZEROUPPER),   M(VZEROALL),    M(VPERMD),      M(VMASKMOVPS),
	M(VPMASKMOVD),   M(STMXCSR),      M(LDMXCSR),     M(CVTSD2SS),    M(ROUNDPS),
	M(AESENC),       M(PCLMULQDQ),
};
#undef M

#define FROM(list) list[pick(rnd, KL_ARRAY_SIZE(list))]

static bool full(unsigned room)
{
	return nr_items + (int)room > MAX_INSNS - 8;
}

static struct item *add(void)
{
	return &items[nr_items++];
}

static struct item *put_bytes(const void *bytes, unsigned n)
{
	struct item *i = add();

	memset(i, 0, sizeof(*i));
	i->to = i->slot = -1;
	memcpy(i->insn.bytes, bytes, n);
	i->insn.legal = ZYAN_SUCCESS(
		ZydisDecoderDecodeFull(isa_decoder(mode), bytes, n, &i->insn.in, i->insn.op));
	i->insn.len = (uint8_t)n;
	return i;
}

/* [REX] @opcode with register @reg in its low bits, or in those of @modrm. */
static struct item *put_reg(unsigned rex, uint8_t opcode, int modrm, unsigned reg, const void *imm,
			    unsigned size)
{
	uint8_t b[16];
	unsigned n = 0;

	if (rex | reg >> 3)
		b[n++] = (uint8_t)(0x40 | rex | reg >> 3);
	b[n++] = (uint8_t)(modrm < 0 ? opcode | (reg & 7) : opcode);
	if (modrm >= 0)
		b[n++] = (uint8_t)((unsigned)modrm | (reg & 7));
	if (size)
		memcpy(b + n, imm, size);
	return put_bytes(b, n + size);
}

static void put_plain(ZydisMnemonic m, unsigned memory_percent, bool lock)
{
	struct item *i = add();
	const struct template *t;

	for (unsigned tries = 0; tries < 60; tries++) {
		t = generate_pick(rnd, mode, m);
		if (!t)
			break;
		if (!encode(t, chance(rnd, memory_percent), lock, i))
			continue;
		if (isa_undefined_flags(i->insn.in.mnemonic))
			put_bytes("\x84\xc0", 2); /* TEST AL, AL */
		return;
	}
	nr_items--;
}

static void put_mnemonic(void)
{
	unsigned how = pick(rnd, common ? 63 : 100); /* of what every program is made */
	uint32_t few = pick(rnd, 40);

	if (how < 32)
		put_plain(FROM(producers), 40, chance(rnd, 3));
	else if (how < 42)
		put_plain(FROM(consumers), 30, false);
	else if (how < 56)
		put_plain(FROM(moves), 60, chance(rnd, 2));
	else if (how < 63)
		put_plain(FROM(stack), 25, false);
	else if (how < 66) {
		if (chance(rnd, 70) && !(pointers >> KL_RCX & 1))
			put_reg(0, 0xb8, -1, KL_RCX, &few, 4);
		put_plain(FROM(strings), 0, false);
	} else if (how < 70)
		put_plain(FROM(locked), 100, true);
	else if (how < 86)
		put_plain(FROM(vectors), 45, false);
	else
		put_plain(ZYDIS_MNEMONIC_INVALID, 45, chance(rnd, 5));
}

/* ---- what is not plain ---- */

/* A label some way ahead: settled when the region is complete. */
static int ahead(void)
{
	return nr_items + 1 + (int)pick(rnd, 6);
}

/* A conditional branch to @to. */
static void put_condition(int to, bool near)
{
	uint8_t b[8] = {0x0f, (uint8_t)(0x80 | pick(rnd, 16))};
	struct item *i;

	if (!near && chance(rnd, 70)) {
		b[0] = (uint8_t)(0x70 | (b[1] & 15));
		i = put_bytes(b, 2);
	} else if (!near && chance(rnd, 30)) {
		b[0] = (uint8_t)(0xe0 | pick(rnd, 4)); /* LOOPNE, LOOPE, LOOP, JRCXZ */
		i = put_bytes(b, 2);
	} else {
		i = put_bytes(b, 6);
	}
	i->fix = FIX_BRANCH;
	i->to = to;
}

static void put_forward_branch(void)
{
	if (chance(rnd, 50))
		put_plain(chance(rnd, 50) ? ZYDIS_MNEMONIC_CMP : ZYDIS_MNEMONIC_TEST, 40, false);
	put_condition(ahead(), false);
}

/* Take one off the counter; back, unless that makes it negative. */
static void put_backward_branch(void)
{
	int to = region + (int)pick(rnd, (unsigned)(nr_items - region) + 1);
	uint8_t one = 1, jns[6] = {0x0f, 0x89}, js[2] = {0x78};
	struct item *i;

	if (chance(rnd, 50))
		put_reg(0, 0xff, 0xc8, counter, NULL, 0); /* DEC */
	else
		put_reg(0, 0x83, 0xe8, counter, &one, 1); /* SUB */
	if (chance(rnd, 60)) {
		i = put_bytes(jns, 6);
		i->fix = FIX_BRANCH;
		i->to = to;
	} else {
		i = put_bytes(js, 2);
		i->fix = FIX_BRANCH;
		i->to = nr_items + 1;
		i->glued = true;
		put_condition(to, true);
		i = &items[nr_items - 1];
	}
	i->glued = true;
}

/* A slot for what item @k goes to. Where there is none left, the last is shared. */
static int slot_for(int k)
{
	if (nr_slots == NR_SLOTS)
		nr_slots--;
	slot_of[nr_slots] = k;
	return nr_slots++;
}

/* JMP (@reg 4) or CALL (2) to @to, directly or not. */
static void put_transfer(unsigned reg, int to)
{
	uint8_t rel[5] = {reg == 4 ? 0xe9 : 0xe8}, rel8[2] = {0xeb};
	uint8_t memory[6] = {0xff, (uint8_t)(reg << 3 | 5)}, lea[7] = {0x48, 0x8d, 5},
		push[5] = {0x68};
	unsigned how = pick(rnd, 100),
		 through = one_of((mode == KL_CODE64 ? 0xffffu : 0xffu) &
				  ~(pointers | indices | 1u << counter | 1u << KL_RSP));
	struct item *i;

	if (how < 40) {
		i = reg == 4 && chance(rnd, 50) ? put_bytes(rel8, 2) : put_bytes(rel, 5);
		i->fix = FIX_BRANCH;
	} else if (how < 65) {
		i = put_bytes(memory, 6);
		i->fix = FIX_SLOT;
		i->slot = slot_for(nr_items - 1);
	} else if (how < 90 || reg == 2) {
		if (mode == KL_CODE64 && chance(rnd, 50)) {
			lea[0] |= (uint8_t)(through >> 3 << 2);
			lea[2] |= (uint8_t)((through & 7) << 3);
			i = put_bytes(lea, 7);
		} else {
			i = put_reg(0, 0xb8, -1, through, "\0\0\0", 4);
		}
		i->fix = FIX_LABEL;
		i->to = to;
		put_reg(0, 0xff, (int)(0xc0 | reg << 3), through, NULL, 0)->glued = true;
		return;
	} else { /* a return that nobody called */
		i = put_bytes(push, 5);
		i->fix = FIX_LABEL;
		i->to = to;
		put_bytes("\xc3", 1)->glued = true;
		return;
	}
	i->to = to;
}

static void put_illegal(void)
{
	/* UD2; LOCK ADD EAX, EAX; UD0 EAX, EAX; LOCK MOV EAX, [RBX] */
	static const char none[][4] = {"\x0f\x0b\x90", "\xf0\x01\xc0", "\x0f\xff\xc0",
				       "\xf0\x8b\x03"};

	put_bytes(none[pick(rnd, KL_ARRAY_SIZE(none))], 3);
}

/* PUSH of flags with no TF; POPF. */
static void put_popf(void)
{
	uint8_t push[5] = {0x68};
	uint32_t flags = (uint32_t)rng(rnd) & (KL_FL_STATUS | KL_FL_ID | KL_FL_NT);

	flags |= chance(rnd, 20) ? KL_FL_DF : 0;
	flags |= checks_alignment ? KL_FL_AC : 0;
	memcpy(push + 1, &flags, 4);
	put_bytes(push, 5);
	put_bytes("\x9d", 1)->glued = true;
}

/* Move a pointer a little; or exchange two, or have two that are the same. */
static void put_bump(void)
{
	unsigned reg = one_of(pointers), other = one_of(pointers);
	uint8_t by = (uint8_t)(pick(rnd, 64) * (chance(rnd, 50) ? 8 : 1)),
		wide = mode == KL_CODE64 ? 8 : 0;
	uint8_t two[3] = {(uint8_t)(0x48 | other >> 3 << 2 | reg >> 3),
			  chance(rnd, 50) ? 0x87 : 0x89,
			  (uint8_t)(0xc0 | (other & 7) << 3 | (reg & 7))};

	by &= 0x7f;
	if (reg != KL_RSP && other != KL_RSP && chance(rnd, 50))
		put_bytes(two + (wide ? 0 : 1), wide ? 3 : 2);
	else
		put_reg(wide, 0x83, chance(rnd, 50) ? 0xc0 : 0xe8, reg, &by, 1);
}

/* Fields of one structure, with little in between: one look at their page may do. */
static void put_fields(void)
{
	static const uint8_t opcode[] = {0x8b, 0x89, 0x03, 0x01, 0x3b, 0x11};
	unsigned base = one_of(pointers), all = mode == KL_CODE64 ? 0xffff : 0xff;
	int32_t disp = (int32_t)pick(rnd, 2048) - 1024;

	for (unsigned n = 2 + pick(rnd, 5); n && !full(3); n--) {
		unsigned reg = one_of(all & ~(pointers | indices | 1u << counter | 1u << KL_RSP));
		int32_t at = disp + (int32_t)pick(rnd, 200);
		uint8_t b[8];
		unsigned k = 0;

		if (mode == KL_CODE64)
			b[k++] = (uint8_t)((chance(rnd, 50) ? 0x48 : 0x40) | reg >> 3 << 2 |
					   base >> 3);
		b[k++] = opcode[pick(rnd, KL_ARRAY_SIZE(opcode))];
		b[k++] = (uint8_t)(0x80 | (reg & 7) << 3 | (base & 7));
		if ((base & 7) == 4)
			b[k++] = 0x24;
		memcpy(b + k, &at, 4);
		put_bytes(b, k + 4);
		if (chance(rnd, 20))
			put_bump();
		for (unsigned m = chance(rnd, 20) ? pick(rnd, 4) : 0; m && !full(3); m--)
			put_reg(0, chance(rnd, 60) ? 0x50 : 0x58, -1, reg, NULL, 0);
	}
}

/* A store into the program: an opcode of another meaning, or an immediate. */
static void put_patch(void)
{
	uint8_t b[8] = {0xf0, 0x80, 0x35, 0, 0, 0, 0, (uint8_t)(8 * (1 + pick(rnd, 7)))};
	uint8_t st[6] = {0x88, (uint8_t)(pick(rnd, 8) << 3 | 5)};
	struct item *i;

	if (chance(rnd, 50)) {
		i = chance(rnd, 20) ? put_bytes(b, 8) : put_bytes(b + 1, 7);
		i->fix = FIX_OPCODE;
	} else {
		st[0] |= (uint8_t)pick(rnd, 2);
		i = put_bytes(st, 6);
		i->fix = FIX_IMM;
		i->size = st[0] & 1 ? 4 : 1;
	}
	i->to = (int)(rng(rnd) & 0xffff); /* where to look for a victim */
}

static void put_something(void)
{
	unsigned how = pick(rnd, 1000);

	if (patching && chance(rnd, 15))
		put_patch();
	else if (how < 90)
		put_forward_branch();
	else if (how < 130)
		put_backward_branch();
	else if (how < 160)
		put_transfer(4, ahead());
	else if (how < 210 && callee < nr_functions)
		put_transfer(2, MAX_INSNS + callee +
					(int)pick(rnd, (unsigned)(nr_functions - callee)));
	else if (how < 212)
		put_illegal();
	else if (how < 222)
		put_popf();
	else if (how < 246)
		put_bump();
	else if (how < 300)
		put_fields();
	else
		put_mnemonic();
}

/* Labels ahead end where the region does; none is glued. */
static void close_region(void)
{
	for (int k = region; k < nr_items; k++) {
		if (items[k].fix >= FIX_OPCODE || items[k].to >= MAX_INSNS || items[k].to < 0)
			continue;
		items[k].to = (int)kl_min(items[k].to, nr_items - 1);
		while (items[k].to < nr_items - 1 && items[items[k].to].glued)
			items[k].to++;
	}
}

static void make_line(unsigned n)
{
	for (unsigned k = 0; k < n && !full(3); k++)
		put_something();
}

static void choose_registers(void)
{
	unsigned all = mode == KL_CODE64 ? 0xffff : 0xff, left;

	pointers = 1u << KL_RSP | 1u << KL_RSI | 1u << KL_RDI;
	if (chance(rnd, 40))
		pointers |= 1u << KL_RBP;
	left = all & ~(pointers | 1u << KL_RAX | 1u << KL_RCX | 1u << KL_RDX);
	counter = one_of(left);
	left &= ~(1u << counter);
	indices = 0;
	for (unsigned k = 0; k < 3 && left; k++) {
		unsigned reg = one_of(left);

		left &= ~(1u << reg);
		if (k == 1)
			indices = (uint16_t)(1u << reg);
		else
			pointers |= (uint16_t)(1u << reg);
	}
}

static void put_way(void)
{
	struct item *i = put_bytes("\xe9\0\0\0", 5);

	i->fix = FIX_BRANCH;
	i->address = WAY(mode, WAY_THROUGH);
	i->fixed = true;
}

static void make(void)
{
	nr_items = nr_slots = 0;
	mode = chance(rnd, 75) ? KL_CODE64 : KL_CODE32;
	patching = chance(rnd, 12);
	checks_alignment = chance(rnd, 4);
	common = chance(rnd, 45);
	choose_registers();
	nr_functions = chance(rnd, 50) ? 0 : 1 + (int)pick(rnd, MAX_FUNCTIONS);
	region = callee = 0;
	make_line(1 + (chance(rnd, 60) ? pick(rnd, 15) : pick(rnd, 40)));
	put_way();
	close_region();
	while (callee < nr_functions) {
		region = function[callee++] = nr_items;
		make_line(1 + pick(rnd, 8));
		put_bytes("\xc3", 1);
		close_region();
	}
	put_way();
	code_at = (patching ? PATCH : CODE) + 128 + pick(rnd, 3000);
	if (chance(rnd, 30))
		code_at = (patching ? PATCH : CODE) + KL_PAGE_SIZE - pick(rnd, 150);
}

/* ---- layout ---- */

static uint64_t where(int to)
{
	if (to >= MAX_INSNS)
		to = function[to - MAX_INSNS];
	return items[to].at;
}

static bool can_change_opcode(const struct insn *i)
{
	return i->legal && i->in.opcode_map == ZYDIS_OPCODE_MAP_DEFAULT && i->in.opcode < 0x40 &&
	       (i->in.opcode & 7) < 6 && !(i->in.attributes & ZYDIS_ATTRIB_HAS_LOCK) &&
	       !mentions_counter(i);
}

static bool can_change_immediate(const struct insn *i, unsigned size)
{
	return i->legal && i->in.raw.imm[0].size == size * 8 && !i->in.raw.imm[0].is_relative &&
	       (i->in.mnemonic == ZYDIS_MNEMONIC_MOV || i->in.opcode == 0x80 ||
		i->in.opcode == 0x81 || i->in.opcode == 0x83 || i->in.opcode == 0xc1 ||
		i->in.opcode == 0xa9) &&
	       i->in.opcode_map == ZYDIS_OPCODE_MAP_DEFAULT && !mentions_counter(i);
}

/* Where a store into the program goes; 0: nowhere. */
static uint64_t victim(const struct item *i)
{
	for (int k = 0; k < nr_items; k++) {
		const struct item *v = &items[(i->to + k) % nr_items];
		const struct insn *insn = &v->insn;

		/* What is laid out with a displacement or label of its own keeps it. */
		if (!v->at || v->fix != FIX_NONE || v->fixed)
			continue;
		if (i->fix == FIX_OPCODE && can_change_opcode(insn))
			return v->at - 1 +
			       (insn->in.attributes & ZYDIS_ATTRIB_HAS_MODRM
					? insn->in.raw.modrm.offset
					: insn->in.raw.imm[0].offset);
		if (i->fix == FIX_IMM && can_change_immediate(insn, i->size))
			return v->at + insn->in.raw.imm[0].offset;
	}
	return 0;
}

static void fix(struct item *i)
{
	struct insn *insn = &i->insn;
	uint64_t next = i->at + insn->len, target = 0;
	int64_t rel;

	switch (i->fix) {
	case FIX_NONE:
		return;
	case FIX_BRANCH:
		target = i->address ? i->address : where(i->to);
		rel = (int64_t)(target - next);
		if (insn->in.raw.imm[0].size == 8 && rel != (int8_t)rel)
			rel = 0;
		memcpy(insn->bytes + insn->in.raw.imm[0].offset, &rel,
		       insn->in.raw.imm[0].size / 8);
		return;
	case FIX_LABEL:
		target = where(i->to);
		if (!insn->in.raw.disp.size) {
			memcpy(insn->bytes + insn->in.raw.imm[0].offset, &target, 4);
			return;
		}
		break;
	case FIX_SLOT:
		target = slots_at + 8u * (unsigned)i->slot;
		break;
	case FIX_DATA:
		target = i->address;
		break;
	case FIX_OPCODE:
	case FIX_IMM:
		target = victim(i);
		if (!target) { /* NOPs of the same length */
			memset(insn->bytes, 0x66, insn->len - 1u);
			insn->bytes[insn->len - 1] = 0x90;
			return;
		}
		break;
	}
	rel = (int64_t)(mode == KL_CODE64 ? target - next : target);
	memcpy(insn->bytes + insn->in.raw.disp.offset, &rel, 4);
}

static bool is_dropped(const uint64_t *dropped, int k)
{
	return dropped && !items[k].fixed && (dropped[k / 64] >> (k % 64) & 1);
}

static void lay_out(const uint64_t *dropped, struct program *p)
{
	uint64_t at = code_at;

	/* The label of what is dropped is that of what comes next. */
	for (int k = 0; k < nr_items; k++) {
		items[k].at = at;
		at += is_dropped(dropped, k) ? 0 : items[k].insn.len;
	}
	slots_at = (at + 7) & ~7ull;
	code_size = (unsigned)(slots_at - code_at) + NR_SLOTS * 8;
	memset(code, 0xcc, sizeof(code));
	memset(begins, 0, sizeof(begins));
	for (int s = 0; s < nr_slots; s++) {
		uint64_t to = where(items[slot_of[s]].to);

		memcpy(code + (slots_at - code_at) + 8 * s, &to, 8);
	}
	*p = (struct program){.mode = mode, .at = code_at, .len = (unsigned)(at - code_at)};
	for (int k = 0; k < nr_items; k++) {
		struct insn *i = &items[k].insn;

		if (is_dropped(dropped, k))
			continue;
		fix(&items[k]);
		if (i->legal)
			ZydisDecoderDecodeFull(isa_decoder(mode), i->bytes, i->len, &i->in, i->op);
		memcpy(code + (items[k].at - code_at), i->bytes, i->len);
		begins[items[k].at - code_at] = 1;
		blocks_made_as[p->n] = (uint8_t)k;
		p->insn[p->n++] = *i;
	}
}

void blocks_generate(uint64_t seed, uint64_t number, const uint64_t *dropped, struct program *p)
{
	struct rng r;

	rng_seed(&r, seed, number);
	rnd = &r;
	make();
	lay_out(dropped, p);
	rnd = NULL;
}

void blocks_put(void)
{
	put_code(code_at, code, code_size);
}

bool blocks_has(uint64_t lin)
{
	return lin - code_at < code_size && begins[lin - code_at];
}

bool blocks_patch(const struct program *p)
{
	return p->at - PATCH < PATCH_SIZE;
}

/* ---- registers ---- */

void blocks_state(struct rng *r, const struct program *p, struct machine *m)
{
	uint64_t mask = p->mode == KL_CODE64 ? ~0ull : 0xffffffff;
	uint64_t align = chance(r, 60) ? ~31ull : ~0ull;

	for (unsigned i = 0; i < 16; i++)
		m->gpr[i] = state_value(r);
	for (unsigned i = 0; i < 16; i++)
		if (pointers >> i & 1)
			m->gpr[i] = state_place(r, 32, !pick(r, 12)) & align;
	for (unsigned i = 0; i < 16; i++)
		if (indices >> i & 1)
			m->gpr[i] = (uint64_t)((int64_t)pick(r, 64) - 32);
	m->gpr[counter] = pick(r, 3) ? pick(r, 8) : pick(r, 150);
	m->rip = p->at;
	m->rflags = 2 | KL_FL_IF | (rng(r) & (KL_FL_STATUS | KL_FL_ID));
	if (chance(r, 15))
		m->rflags |= KL_FL_DF;
	m->fs_base = DATA + KL_PAGE_SIZE + pick(r, 2 * KL_PAGE_SIZE);
	m->gs_base = DATA + pick(r, DATA_PAGES * KL_PAGE_SIZE);
	/* Memory operands with a prefix for these add a pointer to the base. */
	if (chance(r, 70))
		m->fs_base = m->gs_base = 8 * pick(r, 16);
	state_random_x(r, m->x, 90);
	for (unsigned i = 0; i < 16; i++)
		m->gpr[i] &= mask;
}
