/* SPDX-License-Identifier: MIT */
/* Bits: BT BTS BTR BTC (with LOCK), BSF BSR LZCNT TZCNT POPCNT, CRC32, RDRAND RDSEED. */
#include <cpuid.h>

#include "x86/decode.h"
#include "x86/ops.h"

#define REG(v, off, bits) (*(uint##bits##_t *)kl_gpr(v, off))
#define SIZES(X, ...) \
	X(16, "w", "%w", __VA_ARGS__) X(32, "l", "%k", __VA_ARGS__) X(64, "q", "%q", __VA_ARGS__)

/* ---- BT and relatives ------------------------------------------------------------------ */

/* Address of the unit that a register bit offset reaches, in memory. */
KL_INLINE uint64_t bit_lin(struct kl_vcpu *v, const struct kl_op *op, int64_t n, unsigned bits,
			   bool write)
{
	uint64_t ea = kl_ea(v, op) + (uint64_t)((n >> (bits == 64   ? 6
						       : bits == 32 ? 5
								    : 4)) *
						(int64_t)(bits / 8));

	ea = op->addrsize == 8 ? ea : op->addrsize == 4 ? (uint32_t)ea : (uint16_t)ea;
	return kl_seg_linear(v, op->seg, ea, bits / 8, write);
}

/* imm >= 0: bit number; op->cond set: in a register. */
#define BIT_OP(bits, sfx, mod, name, wb)                                                      \
	static enum kl_next name##bits##_r(struct kl_vcpu *v, const struct kl_op *op)         \
	{                                                                                     \
		uint##bits##_t d = REG(v, op->reg, bits);                                     \
		uint##bits##_t n = op->cond ? REG(v, op->rm, bits) : (uint##bits##_t)op->imm; \
		uint32_t ax = kl_flags_pack(v);                                               \
                                                                                              \
		__asm__(KL_FLAGS_IN #name sfx " %2, %0" KL_FLAGS_OUT                          \
			: "+r"(d), "+a"(ax)                                                   \
			: "r"(n)                                                              \
			: "cc");                                                              \
		if (wb)                                                                       \
			kl_gpr_set(v, op->reg, d, bits / 8);                                  \
		kl_flags_put(v, ax);                                                          \
		return KL_NEXT;                                                               \
	}                                                                                     \
	static enum kl_next name##bits##_m(struct kl_vcpu *v, const struct kl_op *op)         \
	{                                                                                     \
		int64_t off = op->cond ? (int##bits##_t)REG(v, op->reg, bits)                 \
				       : (int64_t)(op->imm & (bits - 1));                     \
		uint##bits##_t n = (uint##bits##_t)(off & (bits - 1)), d;                     \
		uint64_t lin = bit_lin(v, op, off, bits, wb);                                 \
		void *p = wb ? kl_mem_rmw(v, lin, bits / 8) : NULL;                           \
		uint32_t ax = kl_flags_pack(v);                                               \
                                                                                              \
		if (wb && p && (op->flags & KL_OPF_LOCK)) {                                   \
			__asm__ volatile(KL_FLAGS_IN "1: " LOCK_##wb #name sfx                \
					 " %2, %0" KL_FLAGS_OUT "\n\t" KL_OP_EXTABLE("1b")    \
					 : "+m"(*(uint##bits##_t *)p), "+a"(ax)               \
					 : "r"(n)                                             \
					 : "cc", "memory");                                   \
			kl_note_store(v, p);                                                  \
			kl_flags_put(v, ax);                                                  \
			return KL_NEXT;                                                       \
		}                                                                             \
		d = (uint##bits##_t)(p ? kl_load(p, bits / 8) : kl_read(v, lin, bits / 8));   \
		__asm__(KL_FLAGS_IN #name sfx " %2, %0" KL_FLAGS_OUT                          \
			: "+r"(d), "+a"(ax)                                                   \
			: "r"(n)                                                              \
			: "cc");                                                              \
		if (wb && p) {                                                                \
			kl_store(p, d, bits / 8);                                             \
			kl_note_store(v, p);                                                  \
		} else if (wb) {                                                              \
			kl_write_slow(v, lin, d, bits / 8);                                   \
		}                                                                             \
		kl_flags_put(v, ax);                                                          \
		return KL_NEXT;                                                               \
	}
#define LOCK_0 ""
#define LOCK_1 "lock "
SIZES(BIT_OP, bt, 0)
SIZES(BIT_OP, bts, 1)
SIZES(BIT_OP, btr, 1)
SIZES(BIT_OP, btc, 1)

#define BIT2(n)              \
	{                    \
		n##_r, n##_m \
	}
#define BY_SIZE(n)                                                  \
	{                                                           \
		{NULL, NULL}, BIT2(n##16), BIT2(n##32), BIT2(n##64) \
	}
static kl_op_fn *const bit_op[4][4][2] = {BY_SIZE(bt), BY_SIZE(bts), BY_SIZE(btr), BY_SIZE(btc)};

/* ---- scans and counts -------------------------------------------------------------------- */

/* The whole old destination goes in: BSF and BSR of 0 leave it. */
#define SCAN(bits, sfx, mod, name)                                                 \
	static enum kl_next name##bits(struct kl_vcpu *v, const struct kl_op *op)  \
	{                                                                          \
		uint64_t s = op->flags & KL_OPF_MEM ? kl_mem_read(v, op, bits / 8) \
						    : REG(v, op->rm, bits);        \
		uint64_t d = REG(v, op->reg, 64);                                  \
		uint32_t ax = kl_flags_pack(v);                                    \
                                                                                   \
		__asm__(KL_FLAGS_IN #name sfx " " mod "2, " mod "0" KL_FLAGS_OUT   \
			: "+r"(d), "+a"(ax)                                        \
			: "r"(s)                                                   \
			: "cc");                                                   \
		REG(v, op->reg, 64) = d;                                           \
		kl_flags_put(v, ax);                                               \
		return KL_NEXT;                                                    \
	}
SIZES(SCAN, bsf)
SIZES(SCAN, bsr)
SIZES(SCAN, lzcnt)
SIZES(SCAN, tzcnt)
SIZES(SCAN, popcnt)
#define SCAN3(n)                          \
	{                                 \
		NULL, n##16, n##32, n##64 \
	}
static kl_op_fn *const scan[5][4] = {
	SCAN3(bsf), SCAN3(bsr), SCAN3(lzcnt), SCAN3(tzcnt), SCAN3(popcnt),
};

static uint32_t crc32c(uint32_t crc, uint64_t x, unsigned size)
{
	for (unsigned i = 0; i < size; i++, x >>= 8) {
		crc ^= (uint8_t)x;
		for (int b = 0; b < 8; b++)
			crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
	}
	return crc;
}

/* imm: size of the source. */
static enum kl_next crc32(struct kl_vcpu *v, const struct kl_op *op)
{
	unsigned size = (unsigned)op->imm;
	uint64_t s =
		op->flags & KL_OPF_MEM ? kl_mem_read(v, op, size) : kl_gpr_get(v, op->rm, size);

	REG(v, op->reg, 64) = crc32c(REG(v, op->reg, 32), s, size);
	return KL_NEXT;
}

/* ---- random numbers: the host's ----------------------------------------------------------- */

#define RANDOM(name)                                                           \
	static enum kl_next name(struct kl_vcpu *v, const struct kl_op *op)    \
	{                                                                      \
		uint64_t r;                                                    \
		bool ok;                                                       \
                                                                               \
		__asm__ volatile(#name " %0" : "=r"(r), "=@ccc"(ok) : : "cc"); \
		kl_gpr_set(v, op->reg, ok ? r : 0, op->opsize);                \
		v->rflags = (v->rflags & ~(uint64_t)KL_FL_STATUS) | ok;        \
		return KL_NEXT;                                                \
	}
RANDOM(rdrand)
RANDOM(rdseed)

static bool host_has(bool seed)
{
	unsigned a, b, c, d;

	if (seed)
		return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & 1u << 18);
	return __get_cpuid(1, &a, &b, &c, &d) && (c & 1u << 30);
}

/* ---- selection --------------------------------------------------------------------------- */

static bool select_bit(struct kl_decode *d, unsigned n)
{
	bool mem = d->opnd[0].type == ZYDIS_OPERAND_TYPE_MEMORY;

	if (d->size2 == 0)
		return false;
	d->op->fn = bit_op[n][d->size2][mem];
	d->op->cond = d->opnd[1].type == ZYDIS_OPERAND_TYPE_REGISTER;
	d->simple = true;
	d->reads_flags = true;
	d->stores = mem && n;
	return true;
}

static bool select_scan(struct kl_decode *d, unsigned n)
{
	if (d->size2 == 0)
		return false;
	d->op->fn = scan[n][d->size2];
	d->simple = true;
	d->reads_flags = true;
	return true;
}

bool kl_select_bit(struct kl_decode *d)
{
	switch (d->in.mnemonic) {
	case ZYDIS_MNEMONIC_BT:
		return select_bit(d, 0);
	case ZYDIS_MNEMONIC_BTS:
		return select_bit(d, 1);
	case ZYDIS_MNEMONIC_BTR:
		return select_bit(d, 2);
	case ZYDIS_MNEMONIC_BTC:
		return select_bit(d, 3);
	case ZYDIS_MNEMONIC_BSF:
		return select_scan(d, 0);
	case ZYDIS_MNEMONIC_BSR:
		return select_scan(d, 1);
	case ZYDIS_MNEMONIC_LZCNT: /* on a host without it, BSR: as the guest would see */
		return select_scan(d, 2);
	case ZYDIS_MNEMONIC_TZCNT:
		return select_scan(d, 3);
	case ZYDIS_MNEMONIC_POPCNT:
		return __builtin_cpu_supports("popcnt") && select_scan(d, 4);
	case ZYDIS_MNEMONIC_CRC32:
		d->op->fn = crc32;
		d->op->imm = d->opnd[1].size / 8;
		d->simple = true;
		return true;
	case ZYDIS_MNEMONIC_RDRAND:
		d->op->fn = rdrand;
		return host_has(false);
	case ZYDIS_MNEMONIC_RDSEED:
		d->op->fn = rdseed;
		return host_has(true);
	default:
		return false;
	}
}
