/* SPDX-License-Identifier: MIT */
/*
 * Memory for generated code, and what is common to all of it: the way in, and the ways out into C.
 *
 * One per vCPU, so that whoever changes code runs none of it.
 *
 * In generated code rsp is as in any C function: handlers, gdb and longjmp find what they expect.
 */
#include "base/failpoint.h"
#include "host/code_memory.h"
#include "x86/xlate/emit.h"

/*
 * Guest rAX leaves the host's to the flags, whose instructions want that; rSP cannot be in its own
 * place. Compilers use the four that stay in memory least, or only after all others.
 */
const uint8_t kl_host_of[16] = {
	[KL_RAX] = H_R13, [KL_RCX] = H_RCX,  [KL_RDX] = H_RDX,  [KL_RBX] = H_RBX,
	[KL_RSP] = H_R12, [KL_RBP] = H_RBP,  [KL_RSI] = H_RSI,  [KL_RDI] = H_RDI,
	[KL_R8] = H_R8,   [KL_R9] = H_R9,    [KL_R10] = H_R10,  [KL_R11] = H_NONE,
	[KL_R12] = H_R11, [KL_R13] = H_NONE, [KL_R14] = H_NONE, [KL_R15] = H_NONE,
};

/* Context: a handler of the thread whose generated code it is, at @pc in it. */
static uint64_t way_out(const struct kl_generated *g, uint64_t pc)
{
	const struct kl_xlate *x = (const struct kl_xlate *)g;
	uint32_t at = (uint32_t)(pc - g->start);
	const struct kl_xlate_part *p;
	unsigned lo = 0, hi;

	if (at < x->start)
		return 0;
	p = &x->parts[(at - x->start) / x->part_size];
	hi = p->nr_points;
	while (lo < hi) {
		unsigned mid = lo + (hi - lo) / 2;

		if (p->points[mid].at == at)
			return g->start + p->points[mid].slow;
		if (p->points[mid].at < at)
			lo = mid + 1;
		else
			hi = mid;
	}
	return 0;
}

static size_t map_size(const struct kl_xlate *x)
{
	return KL_XLATE_COMMON + (size_t)KL_XLATE_PARTS * x->part_size;
}

void kl_xlate_unmap(struct kl_xlate *x)
{
	kl_code_unmap(&(struct kl_code_memory){x->rw, x->rx}, map_size(x));
}

bool kl_xlate_map(struct kl_xlate *x)
{
	struct kl_code_memory m;

	if (kl_failpoint("x86-xlate-code") || !kl_code_map(&m, "kvmlet-code", map_size(x)))
		return false;
	x->rw = m.rw;
	x->rx = m.rx;
	x->generated =
		(struct kl_generated){(uint64_t)x->rx, (uint64_t)x->rx + map_size(x), way_out};
	return true;
}

/* ---- what is common ---- */

static void spill(struct kl_emit *e)
{
	for (unsigned i = 0; i < 16; i++)
		if (kl_host_of[i] != H_NONE)
			kl_e_store(e, kl_host_of[i], KL_CTX_GPR(i));
}

static void reload(struct kl_emit *e)
{
	for (unsigned i = 0; i < 16; i++)
		if (kl_host_of[i] != H_NONE)
			kl_e_load(e, kl_host_of[i], KL_CTX_GPR(i));
}

static const uint8_t kept[] = {H_RBP, H_RBX, H_R12, H_R13, H_R14, H_R15};

static void push(struct kl_emit *e, unsigned r)
{
	if (r >> 3)
		kl_e8(e, 0x41);
	kl_e8(e, 0x50 | (r & 7));
}

static void pop(struct kl_emit *e, unsigned r)
{
	if (r >> 3)
		kl_e8(e, 0x41);
	kl_e8(e, 0x58 | (r & 7));
}

static void jump_reg(struct kl_emit *e, unsigned r)
{
	kl_e_rr(e, 0xff, 0, 4, r);
}

static void begin(struct kl_emit *e)
{
	while ((uint64_t)e->p & 15)
		kl_e8(e, 0xcc);
}

enum third { NO_THIRD, RETURN_ADDRESS, TARGET };

/*
 * Called from generated code: @fn(vCPU, rax, third). If it says go on, back behind the call, or
 * where it says.
 */
static const uint8_t *way_to(struct kl_emit *e, void (*fn)(void), enum third third, bool jump,
			     const uint8_t *leave)
{
	const uint8_t *start;
	uint8_t *stay;

	begin(e);
	start = kl_here(e);
	spill(e);
	kl_e_mov(e, H_RSI, H_RAX);
	if (third == RETURN_ADDRESS)
		kl_e_rm(e, 0x8b, 8, H_RDX, KL_AT(H_RSP, 0));
	else if (third == TARGET)
		kl_e_mov(e, H_RDX, H_S1);
	kl_e_lea(e, 8, H_RDI, KL_AT(H_CTX, -(int32_t)(offsetof(struct kl_vcpu, gpr) + KL_BIAS)));
	kl_e_alu_ri(e, 5, 8, H_RSP, 8);
	if (__builtin_cpu_supports("avx"))
		kl_e_vzeroupper(e);
	kl_e_imm(e, H_RAX, (uint64_t)(uintptr_t)fn);
	kl_e_rr(e, 0xff, 0, 2, H_RAX);
	kl_e_alu_ri(e, 0, 8, H_RSP, 8);
	kl_e_rr(e, 0x85, 8, H_RAX, H_RAX);
	stay = kl_e_jcc(e, 5);
	/* By a return, as it was called: the processor predicts those of all callers by counting.
	 */
	kl_e_imm(e, H_RCX, (uint64_t)(uintptr_t)leave);
	kl_e_rm(e, 0x89, 8, H_RCX, KL_AT(H_RSP, 0));
	kl_e8(e, 0xc3);
	kl_e_bind(e, stay);
	reload(e);
	if (jump) {
		kl_e_alu_ri(e, 0, 8, H_RSP, 8);
		jump_reg(e, H_RAX);
	} else {
		kl_e8(e, 0xc3);
	}
	return start;
}

void kl_xlate_common(struct kl_xlate *x)
{
	struct kl_emit e = {.p = x->rw, .end = x->rw + KL_XLATE_COMMON, .to_rx = x->rx - x->rw};
	const uint8_t *leave;

	x->enter = (const struct kl_op *(*)(struct kl_vcpu *, const void *))(uintptr_t)kl_here(&e);
	for (unsigned i = 0; i < sizeof(kept); i++)
		push(&e, kept[i]);
	kl_e_alu_ri(&e, 5, 8, H_RSP, 8);
	kl_e_lea(&e, 8, H_CTX, KL_AT(H_RDI, (int32_t)(offsetof(struct kl_vcpu, gpr) + KL_BIAS)));
	kl_e_mov(&e, H_RAX, H_RSI);
	reload(&e);
	jump_reg(&e, H_RAX);

	begin(&e);
	leave = kl_here(&e);
	kl_e_mov(&e, H_RAX, H_RDX);
	kl_e_alu_ri(&e, 0, 8, H_RSP, 8);
	for (unsigned i = sizeof(kept); i-- > 0;)
		pop(&e, kept[i]);
	kl_e8(&e, 0xc3);

	x->slow = way_to(&e, (void (*)(void))kl_xlate_slow, NO_THIRD, false, leave);
	x->reenter = way_to(&e, (void (*)(void))kl_xlate_reenter, NO_THIRD, true, leave);
	x->edge = way_to(&e, (void (*)(void))kl_xlate_edge, RETURN_ADDRESS, true, leave);
	x->indirect = way_to(&e, (void (*)(void))kl_xlate_indirect, TARGET, false, leave);
	x->lend = way_to(&e, (void (*)(void))kl_xlate_lend, NO_THIRD, false, leave);
	x->lend_avx = way_to(&e, (void (*)(void))kl_xlate_lend_avx, NO_THIRD, false, leave);
	KL_ASSERT(e.p <= e.end);
	x->start = KL_XLATE_COMMON;
}
