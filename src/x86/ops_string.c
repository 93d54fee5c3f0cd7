/* SPDX-License-Identifier: MIT */
/*
 * MOVS STOS LODS SCAS CMPS with their repeat prefixes.
 *
 * Registers are updated after every element, so that a fault, an exit or a request finds the
 * instruction ready to be executed again for the rest. Requests are polled at least once per
 * page moved (M6). MOVS and STOS move runs inside one page at once.
 */
#include "host/cpu.h"
#include "x86/access.h"
#include "x86/decode.h"
#include "x86/block.h"
#include "x86/ops.h"

#define REP (KL_OPF_REP | KL_OPF_REPNE)

KL_INLINE uint64_t addr_mask(const struct kl_op *op)
{
	return op->addrsize == 8 ? ~0ull : op->addrsize == 4 ? 0xffffffffull : 0xffffull;
}

KL_INLINE uint64_t reg_masked(struct kl_vcpu *v, unsigned r, const struct kl_op *op)
{
	return v->gpr[r] & addr_mask(op);
}

KL_INLINE void reg_add(struct kl_vcpu *v, unsigned r, const struct kl_op *op, uint64_t n)
{
	kl_gpr_set(v, (uint8_t)(8 * r), v->gpr[r] + n, op->addrsize);
}

KL_INLINE uint64_t step(struct kl_vcpu *v, const struct kl_op *op)
{
	return v->rflags & KL_FL_DF ? -(uint64_t)op->opsize : op->opsize;
}

KL_INLINE uint64_t src_lin(struct kl_vcpu *v, const struct kl_op *op, unsigned size)
{
	return kl_seg_linear(v, op->seg, reg_masked(v, KL_RSI, op), size, false);
}

KL_INLINE uint64_t dst_lin(struct kl_vcpu *v, const struct kl_op *op, unsigned size, bool write)
{
	return kl_seg_linear(v, KL_ES, reg_masked(v, KL_RDI, op), size, write);
}

/* After an element of a repeated instruction of which some is left: go on here? */
KL_INLINE bool must_stop(struct kl_vcpu *v, enum kl_next *how)
{
	if (KL_UNLIKELY(v->exit_pending || v->nr_mmio ||
			atomic_load_explicit(&v->core.requests, memory_order_relaxed))) {
		*how = KL_JUMPED_STOP; /* rip unchanged */
		return true;
	}
	if (KL_UNLIKELY(v->code_written || kl_single_stepping(v))) {
		*how = KL_JUMPED;
		return true;
	}
	return false;
}

/* Intel's processors cut a register that a 32-bit address uses, whatever happens then. */
KL_INLINE void cut(struct kl_vcpu *v, const struct kl_op *op, unsigned r)
{
	if (KL_UNLIKELY(op->addrsize == 4) && (op->flags & REP) && kl_host_is_intel())
		kl_gpr_set(v, 8 * r, (uint32_t)v->gpr[r], 4);
}

/* How many elements there are to do. */
KL_INLINE uint64_t count(struct kl_vcpu *v, const struct kl_op *op)
{
	cut(v, op, KL_RCX);
	return op->flags & REP ? reg_masked(v, KL_RCX, op) : 1;
}

/* ---- runs ------------------------------------------------------------------------------ */

/* The segment adds its base to any address and checks nothing more. */
static bool flat(struct kl_vcpu *v, unsigned seg)
{
	const struct kvm_segment *s = &v->seg[seg];

	return v->long_mode ||
	       (s->limit == 0xffffffff && !s->unusable && ((s->type & 8) || !(s->type & 4)));
}

/* How many elements from @ea, @lin on stay in the page and do not wrap. */
static uint64_t room(const struct kl_op *op, uint64_t ea, uint64_t lin)
{
	uint64_t page = (KL_PAGE_SIZE - (lin & ~KL_PAGE_MASK)) / op->opsize;

	return op->addrsize == 8 ? page : kl_min(page, (addr_mask(op) - ea + 1) / op->opsize);
}

/* Elements moved at once; 0: element by element. */
static uint64_t movs_run(struct kl_vcpu *v, const struct kl_op *op, uint64_t n)
{
	uint64_t src, dst;
	const struct kl_tlb_entry *s, *d;
	uint8_t *sp, *dp;

	if ((v->rflags & KL_FL_DF) || n < 4 || !flat(v, op->seg) || !flat(v, KL_ES))
		return 0;
	src = src_lin(v, op, op->opsize);
	s = kl_tlb_data(v, src);
	if (s->rtag != (src & KL_PAGE_MASK))
		return 0;
	dst = dst_lin(v, op, op->opsize, true);
	d = kl_tlb_data(v, dst);
	if (d->wtag != (dst & KL_PAGE_MASK))
		return 0;
	n = kl_min(n, room(op, reg_masked(v, KL_RSI, op), src));
	n = kl_min(n, room(op, reg_masked(v, KL_RDI, op), dst));
	sp = kl_tlb_host(s, src);
	dp = kl_tlb_host(d, dst);
	if (n < 4 || (uint64_t)(dp - sp) < n * op->opsize || (uint64_t)(sp - dp) < n * op->opsize)
		return 0;
	kl_access_copy(dp, sp, n * op->opsize);
	kl_note_store(v, dp);
	return n;
}

static uint64_t stos_run(struct kl_vcpu *v, const struct kl_op *op, uint64_t n)
{
	uint64_t dst, x = v->gpr[KL_RAX], bytes;
	const struct kl_tlb_entry *d;
	uint8_t *dp;

	if ((v->rflags & KL_FL_DF) || n < 4 || !flat(v, KL_ES))
		return 0;
	dst = dst_lin(v, op, op->opsize, true);
	d = kl_tlb_data(v, dst);
	if (d->wtag != (dst & KL_PAGE_MASK))
		return 0;
	n = kl_min(n, room(op, reg_masked(v, KL_RDI, op), dst));
	dp = kl_tlb_host(d, dst);
	x = op->opsize == 1   ? (uint8_t)x * 0x0101010101010101ull
	    : op->opsize == 2 ? (uint16_t)x * 0x0001000100010001ull
	    : op->opsize == 4 ? (uint32_t)x * 0x0000000100000001ull
			      : x;
	bytes = n * op->opsize;
	for (; bytes >= 8; bytes -= 8, dp += 8)
		kl_store64(dp, x);
	for (; bytes; bytes -= op->opsize, dp += op->opsize)
		kl_store(dp, x, op->opsize);
	kl_note_store(v, kl_tlb_host(d, dst));
	return n;
}

/* ---- instructions ------------------------------------------------------------------------ */

static enum kl_next movs(struct kl_vcpu *v, const struct kl_op *op)
{
	bool rep = op->flags & REP;
	uint64_t n = count(v, op);
	enum kl_next how;

	/* also if the first element faults, or if there is none */
	cut(v, op, KL_RSI);
	cut(v, op, KL_RDI);
	while (n) {
		uint64_t done = rep && !kl_single_stepping(v) ? movs_run(v, op, n) : 0;

		if (!done) {
			/* The source's page before the destination's segment. */
			uint64_t x = kl_read(v, src_lin(v, op, op->opsize), op->opsize);

			kl_write(v, dst_lin(v, op, op->opsize, true), x, op->opsize);
			done = 1;
		}
		reg_add(v, KL_RSI, op, done * step(v, op));
		reg_add(v, KL_RDI, op, done * step(v, op));
		n -= done;
		if (!rep)
			break;
		kl_gpr_set(v, 8 * KL_RCX, n, op->addrsize);
		if (n && must_stop(v, &how))
			return how;
	}
	return KL_NEXT;
}

static enum kl_next stos(struct kl_vcpu *v, const struct kl_op *op)
{
	bool rep = op->flags & REP;
	uint64_t n = count(v, op);
	enum kl_next how;

	cut(v, op, KL_RDI);
	while (n) {
		uint64_t done = rep && !kl_single_stepping(v) ? stos_run(v, op, n) : 0;

		if (!done) {
			kl_write(v, dst_lin(v, op, op->opsize, true), v->gpr[KL_RAX], op->opsize);
			done = 1;
		}
		reg_add(v, KL_RDI, op, done * step(v, op));
		n -= done;
		if (!rep)
			break;
		kl_gpr_set(v, 8 * KL_RCX, n, op->addrsize);
		if (n && must_stop(v, &how))
			return how;
	}
	return KL_NEXT;
}

static enum kl_next lods(struct kl_vcpu *v, const struct kl_op *op)
{
	bool rep = op->flags & REP;
	uint64_t n = count(v, op);
	enum kl_next how;

	while (n) {
		uint64_t x = kl_read(v, src_lin(v, op, op->opsize), op->opsize);

		kl_gpr_set(v, 0, x, op->opsize);
		reg_add(v, KL_RSI, op, step(v, op));
		n--;
		if (!rep)
			break;
		kl_gpr_set(v, 8 * KL_RCX, n, op->addrsize);
		if (n && must_stop(v, &how))
			return how;
	}
	return KL_NEXT;
}

#define COMPARE(bits, sfx)                                                                     \
	static uint32_t compare##bits(uint##bits##_t a, uint##bits##_t b)                      \
	{                                                                                      \
		uint32_t ax;                                                                   \
                                                                                               \
		__asm__("cmp" sfx " %2, %1" KL_FLAGS_OUT : "=&a"(ax) : "r"(a), "r"(b) : "cc"); \
		return ax;                                                                     \
	}
COMPARE(8, "b")
COMPARE(16, "w")
COMPARE(32, "l")
COMPARE(64, "q")

static uint32_t compare(uint64_t a, uint64_t b, unsigned size)
{
	return size == 1   ? compare8((uint8_t)a, (uint8_t)b)
	       : size == 2 ? compare16((uint16_t)a, (uint16_t)b)
	       : size == 4 ? compare32((uint32_t)a, (uint32_t)b)
			   : compare64(a, b);
}

/*
 * Without a repeat prefix, a fault of [rDI] comes before one of [rSI]. MMIO is always read the
 * other way round, as KVM's emulator does.
 */
KL_INLINE void fault_first(struct kl_vcpu *v, uint64_t lin, unsigned size)
{
	uint64_t last = lin + size - 1;

	if (KL_LIKELY(kl_tlb_data(v, lin)->rtag == (lin & KL_PAGE_MASK)) &&
	    KL_LIKELY(!((lin ^ last) & KL_PAGE_MASK)))
		return;
	kl_probe(v, lin);
	if ((lin ^ last) & KL_PAGE_MASK)
		kl_probe(v, last & KL_PAGE_MASK);
}

/*
 * CMPS (two addresses) and SCAS (rAX). At a fault the flags are those of the last element, or as
 * Intel has it those of before.
 */
KL_INLINE enum kl_next scan(struct kl_vcpu *v, const struct kl_op *op, bool two)
{
	bool rep = op->flags & REP;
	bool until = op->flags & KL_OPF_REPNE; /* ends when ZF is this */
	bool late = kl_host_is_intel();
	uint64_t n = count(v, op);
	enum kl_next how;

	while (n) {
		unsigned size = op->opsize;
		uint64_t dst = dst_lin(v, op, size, false), a = v->gpr[KL_RAX], b;
		bool done, stop;
		uint32_t ax;

		if (two) {
			if (!rep)
				fault_first(v, dst, size);
			a = kl_read(v, src_lin(v, op, size), size);
		}
		b = kl_read(v, dst, size);
		ax = compare(a, b, size);
		if (two)
			reg_add(v, KL_RSI, op, step(v, op));
		reg_add(v, KL_RDI, op, step(v, op));
		n--;
		if (rep)
			kl_gpr_set(v, 8 * KL_RCX, n, op->addrsize);
		done = !rep || !n || !!(ax & KL_FL_ZF << 8) == until;
		stop = !done && must_stop(v, &how);
		if (done || stop || !late)
			kl_flags_put(v, ax);
		if (done)
			break;
		if (stop)
			return how;
	}
	return KL_NEXT;
}

static enum kl_next cmps(struct kl_vcpu *v, const struct kl_op *op)
{
	return scan(v, op, true);
}

static enum kl_next scas(struct kl_vcpu *v, const struct kl_op *op)
{
	return scan(v, op, false);
}

static bool string(struct kl_decode *d, kl_op_fn *fn, unsigned size)
{
	d->op->fn = fn;
	d->op->opsize = (uint8_t)size;
	return true;
}

bool kl_select_string(struct kl_decode *d)
{
	switch (d->in.mnemonic) {
#define SIZED(name, fn)                  \
	case ZYDIS_MNEMONIC_##name##B:   \
		return string(d, fn, 1); \
	case ZYDIS_MNEMONIC_##name##W:   \
		return string(d, fn, 2); \
	case ZYDIS_MNEMONIC_##name##Q:   \
		return string(d, fn, 8)
		SIZED(MOVS, movs);
		SIZED(STOS, stos);
		SIZED(LODS, lods);
		SIZED(CMPS, cmps);
		SIZED(SCAS, scas);
#undef SIZED
	case ZYDIS_MNEMONIC_MOVSD:
		if (d->in.meta.category != ZYDIS_CATEGORY_STRINGOP)
			return false; /* SSE2's */
		return string(d, movs, 4);
	case ZYDIS_MNEMONIC_CMPSD:
		if (d->in.meta.category != ZYDIS_CATEGORY_STRINGOP)
			return false;
		return string(d, cmps, 4);
	case ZYDIS_MNEMONIC_STOSD:
		return string(d, stos, 4);
	case ZYDIS_MNEMONIC_LODSD:
		return string(d, lods, 4);
	case ZYDIS_MNEMONIC_SCASD:
		return string(d, scas, 4);
	default:
		return false;
	}
}
