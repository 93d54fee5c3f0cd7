/* SPDX-License-Identifier: MIT */
/*
 * The arena of native thunks and the rewriting of instructions for it.
 *
 * One arena per process, of fixed size, shared by all vCPUs. A thunk is written once, then
 * published in a lock-free hash; it is never changed or freed. The arena is not inherited over
 * fork: a child that makes VMs gets its own.
 */
#include <string.h>
#include <sys/syscall.h>

#include "host/code_memory.h"
#include "host/sys.h"
#include "x86/thunk.h"

#define SLOT 32u /* the instruction, RET, padding; the last byte is its length */
/*
 * No guest can fill it: rewriting leaves some 200000 instructions, most of them by their immediate
 * bytes. What is not used takes no memory.
 */
#define NR_SLOTS  262144u
#define HASH_SIZE 524288u

enum { NONE, BUSY, READY, REFUSED };

static struct {
	_Atomic uint64_t state; /* and in the upper half the process whose mappings they are */
	struct kl_code_memory code;
	_Atomic uint32_t used;
	_Atomic uint32_t hash[HASH_SIZE]; /* slot + 1 */
} arena;

void kl_thunk_init(void)
{
	uint64_t pid = (uint64_t)kl_sys(SYS_getpid, 0) << 32, state = atomic_load(&arena.state);
	bool mapped;

	do {
		if (state == (pid | READY) || state == (pid | REFUSED))
			return;
		if (state == (pid | BUSY)) {
			kl_sys(SYS_sched_yield, 0);
			state = atomic_load(&arena.state);
			continue;
		}
		/* Nobody's yet, or the parent's: a forked child has no mappings. */
	} while (state == (pid | BUSY) ||
		 !atomic_compare_exchange_weak(&arena.state, &state, pid | BUSY));
	atomic_store(&arena.used, 0);
	for (unsigned i = 0; i < HASH_SIZE; i++)
		if (atomic_load_explicit(&arena.hash[i], memory_order_relaxed))
			atomic_store_explicit(&arena.hash[i], 0, memory_order_relaxed);
	mapped = kl_code_map(&arena.code, "kvmlet-thunks", (size_t)SLOT * NR_SLOTS);
	atomic_store(&arena.state, pid | (mapped ? READY : REFUSED));
}

static bool slot_is(uint32_t slot, const uint8_t *insn, unsigned len)
{
	const uint8_t *p = arena.code.rw + (size_t)slot * SLOT;

	return p[SLOT - 1] == len && !memcmp(p, insn, len);
}

void *kl_thunk_get(const uint8_t *insn, unsigned len)
{
	uint32_t h = 2166136261u, mine = 0, found;

	if ((uint32_t)atomic_load_explicit(&arena.state, memory_order_acquire) != READY)
		return NULL;
	for (unsigned i = 0; i < len; i++)
		h = (h ^ insn[i]) * 16777619u;
	h ^= h >> 15;
	for (;; h++) {
		_Atomic uint32_t *entry = &arena.hash[h % HASH_SIZE];

		found = atomic_load_explicit(entry, memory_order_acquire);
		if (!found) {
			if (!mine) {
				uint32_t slot = atomic_load(&arena.used);
				uint8_t *p;

				/* Never past the end, however many threads try. */
				do {
					if (slot >= NR_SLOTS)
						return NULL;
				} while (!atomic_compare_exchange_weak(&arena.used, &slot,
								       slot + 1));
				p = arena.code.rw + (size_t)slot * SLOT;
				memset(p, 0xcc, SLOT);
				memcpy(p, insn, len);
				p[len] = 0xc3;
				p[SLOT - 1] = (uint8_t)len;
				mine = slot + 1;
			}
			if (atomic_compare_exchange_strong(entry, &found, mine))
				found = mine;
		}
		if (slot_is(found - 1, insn, len))
			return arena.code.rx + (size_t)(found - 1) * SLOT;
	}
}

/* ---- rewriting ------------------------------------------------------------------------- */

static const ZydisDecodedOperand *field(const struct kl_decode *d, ZydisOperandEncoding e)
{
	for (unsigned i = 0; i < d->in.operand_count_visible; i++)
		if (d->opnd[i].encoding == e && d->opnd[i].type == ZYDIS_OPERAND_TYPE_REGISTER)
			return &d->opnd[i];
	return NULL;
}

static bool is_gpr(const ZydisDecodedOperand *o)
{
	ZydisRegisterClass c = ZydisRegisterGetClass(o->reg.value);

	return c == ZYDIS_REGCLASS_GPR32 || c == ZYDIS_REGCLASS_GPR64 ||
	       c == ZYDIS_REGCLASS_GPR16 || c == ZYDIS_REGCLASS_GPR8;
}

static bool uses_gpr(const struct kl_decode *d)
{
	/* From memory, too, they convert what a general register may hold. */
	if (d->in.mnemonic == ZYDIS_MNEMONIC_VCVTSI2SS ||
	    d->in.mnemonic == ZYDIS_MNEMONIC_VCVTSI2SD)
		return true;
	for (unsigned i = 0; i < d->in.operand_count; i++)
		if (d->opnd[i].type == ZYDIS_OPERAND_TYPE_REGISTER && is_gpr(&d->opnd[i]))
			return true;
	return false;
}

/* Can REX.W mean anything? General registers or what takes their place in memory. */
static bool w_matters(const struct kl_decode *d)
{
	for (unsigned i = 0; i < d->in.operand_count; i++)
		if (d->opnd[i].type == ZYDIS_OPERAND_TYPE_REGISTER
			    ? is_gpr(&d->opnd[i])
			    : d->opnd[i].type == ZYDIS_OPERAND_TYPE_MEMORY && d->opnd[i].size <= 64)
			return true;
	return false;
}

/* New number of a register field; -1: as it was. */
static int renumber(const ZydisDecodedOperand *o, int gpr, int vectors, int nth)
{
	if (!o)
		return -1;
	return is_gpr(o) ? gpr : vectors < 0 ? -1 : vectors + nth;
}

static unsigned rewrite_modrm(const struct kl_decode *d, int reg, int rm)
{
	unsigned m = (unsigned)(d->in.raw.modrm.mod << 6 | d->in.raw.modrm.reg << 3 |
				d->in.raw.modrm.rm);

	if (reg >= 0)
		m = (m & ~0x38u) | (unsigned)reg << 3;
	if (d->in.raw.modrm.mod != 3)
		return (m & 0x38) | 7; /* [rdi] */
	return rm >= 0 ? (m & ~7u) | (unsigned)rm : m;
}

unsigned kl_thunk_rewrite(const struct kl_decode *d, int vectors, uint8_t *out)
{
	const ZydisDecodedInstruction *in = &d->in;
	const ZydisDecodedOperand *vvvv = field(d, ZYDIS_OPERAND_ENCODING_NDSNDD);
	int reg = renumber(field(d, ZYDIS_OPERAND_ENCODING_MODRM_REG), KL_THUNK_REG, vectors, 0);
	int rm = renumber(field(d, ZYDIS_OPERAND_ENCODING_MODRM_RM), KL_THUNK_RM, vectors, 1);
	const uint8_t *bytes = d->op->bytes;
	unsigned n = 0, at = in->raw.modrm.offset, imm = 0;
	bool wide, r = reg < 0 && in->raw.rex.R,
		   b = rm < 0 && in->raw.modrm.mod == 3 && in->raw.rex.B;

	if (!(in->attributes & ZYDIS_ATTRIB_HAS_MODRM)) {
		if (in->opcode_map != ZYDIS_OPCODE_MAP_0F)
			return 0;
		out[0] = 0x0f; /* EMMS */
		out[1] = in->opcode;
		return 2;
	}
	if (in->encoding == ZYDIS_INSTRUCTION_ENCODING_VEX) {
		const ZydisDecodedInstructionRawVex *x = &in->raw.vex;
		bool dst = vvvv && (vvvv->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE);
		int v = vvvv ? renumber(vvvv, KL_THUNK_VVVV, vectors, dst ? 0 : 2) : -1;

		if (vvvv && v < 0)
			return 0;
		/* Where a field is a general register, or memory in its place, the processor looks
		 * at W in 64-bit code only. */
		wide = x->W && (in->machine_mode == ZYDIS_MACHINE_MODE_LONG_64 ||
				!(uses_gpr(d) || in->mnemonic == ZYDIS_MNEMONIC_VPINSRD ||
				  in->mnemonic == ZYDIS_MNEMONIC_VPEXTRD));
		out[n++] = 0xc4;
		out[n++] = (uint8_t)(0xe0 | x->m_mmmm);
		out[n++] = (uint8_t)(wide << 7 | (vvvv ? ~v & 15 : 15) << 3 | x->L << 2 | x->pp);
		out[n++] = in->opcode;
	} else if (in->encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY) {
		unsigned simd = 0, opsize = 0, first = at - 1;

		for (unsigned i = 0; i < in->raw.prefix_count; i++) {
			uint8_t p = in->raw.prefixes[i].value;

			if (p == 0xf2 || p == 0xf3)
				simd = p;
			else if (p == 0x66)
				opsize = p;
		}
		/*
		 * Nothing that does not matter, or the same instruction takes many slots. x87:
		 * operand size in the code's own mode.
		 */
		if (in->opcode_map == ZYDIS_OPCODE_MAP_DEFAULT) {
			opsize = in->operand_width == 16;
			simd = 0;
		} else if (simd) {
			opsize = 0;
		}
		wide = in->raw.rex.W && w_matters(d);
		if (opsize)
			out[n++] = 0x66;
		if (simd)
			out[n++] = (uint8_t)simd;
		if (wide || r || b)
			out[n++] = (uint8_t)(0x40 | wide << 3 | r << 2 | b);
		if (in->opcode_map == ZYDIS_OPCODE_MAP_0F)
			first = at - 2;
		else if (in->opcode_map != ZYDIS_OPCODE_MAP_DEFAULT)
			first = at - 3;
		while (first < at)
			out[n++] = bytes[first++];
	} else {
		return 0;
	}
	out[n++] = (uint8_t)rewrite_modrm(d, reg, rm);
	if (in->raw.imm[0].size) {
		const ZydisDecodedOperand *is4 = field(d, ZYDIS_OPERAND_ENCODING_IS4);

		imm = in->raw.imm[0].size / 8;
		if (imm != 1)
			return 0;
		out[n++] = is4 ? (uint8_t)((vectors + 3) << 4) : bytes[in->raw.imm[0].offset];
	}
	return n;
}
