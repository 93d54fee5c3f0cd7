/* SPDX-License-Identifier: MIT */
/*
 * Between generated code and the rest: when a block is translated, and what generated code calls.
 *
 * Invariants
 *   - A translation is entered only while kl_block.pass equals the 64 bits at core.requests: no
 *     request is pending, pointers from the TLB are what they were, and the block was compared
 *     with memory in this epoch, while its page was live.
 *   - As long as its page is tracked, a store into it takes the slow path. Before it ceases to be,
 *     all vCPUs have a request (code.c), and whoever comes out of a slow path with a request
 *     pending leaves the block. So stores need not look whether they hit the block they are in.
 */
#include <string.h>

#include "base/config.h"
#include "host/cpu.h"
#include "x86/fast.h"
#include "x86/xlate/xlate.h"

_Static_assert(offsetof(struct kl_vcpu_core, pass) == offsetof(struct kl_vcpu_core, requests) + 4 &&
		       offsetof(struct kl_vcpu, core.requests) % 8 == 0,
	       "one word");

static uint64_t pass_now(const struct kl_vcpu *v)
{
	return (uint64_t)v->core.pass << 32;
}

void kl_xlate_prepare(struct kl_block *b)
{
	b->host = NULL;
	b->pass = KL_STALE;
	b->heat = 0;
	b->repeatable = 0;
	b->differed = 0;
	b->brief = 0;
	/* Its page, too, is asked for as soon. */
	if (kl_config.translate_after < b->until)
		b->until = kl_config.translate_after + 1;
	b->run0 = b->ops[0].run;
	b->ops[0].run = kl_xlate_first;
}

static KL_NOINLINE void translate(struct kl_vcpu *v, struct kl_xlate *x, struct kl_block *b)
{
	struct kl_xlate_part *p;

	if (!kl_xlate_ready(v, x)) {
		b->ops[0].run = b->run0;
		return;
	}
	kl_xlate_make_room(x);
	if (kl_xlate_translate(v, x, b)) {
		p = &x->parts[x->part];
		p->blocks[p->nr_blocks++] = b;
		x->nr_translated++;
	} else {
		b->ops[0].run = b->run0;
	}
	kl_xlate_serialize();
}

/* ---- the way in ---- */

const struct kl_op *kl_xlate_enter(struct kl_vcpu *v, struct kl_block *b)
{
	b->pass = pass_now(v);
	return v->blocks->xlate->enter(v, b->host);
}

/* The segment shows all 4 GiB of the address space, or with @base those from its base on. */
static bool whole(const struct kvm_segment *s, bool base, bool data)
{
	return (base || !s->base) && s->limit == 0xffffffff && !s->unusable && s->present &&
	       (!data || (s->type & 0xe) == 2);
}

/*
 * 32-bit code runs translated if its segments do nothing. They stay as they are until the
 * interpreter goes on: what loads one ends a block.
 */
static bool flat(struct kl_vcpu *v)
{
	const struct kvm_segment *s = v->seg;

	if (!whole(&s[KL_CS], false, false) || !whole(&s[KL_DS], false, true) ||
	    !whole(&s[KL_ES], false, true) || !whole(&s[KL_SS], false, true) || !s[KL_SS].db)
		return false;
	v->whole_fs = whole(&s[KL_FS], true, true);
	v->whole_gs = whole(&s[KL_GS], true, true);
	return true;
}

/*
 * What comes back after a few instructions each time is as fast interpreted, so the interpreter
 * keeps it. Other translations may still go there.
 */
static const struct kl_op *enter(struct kl_vcpu *v, struct kl_block *b)
{
	uint64_t before = v->insn_count;
	const struct kl_op *op = kl_xlate_enter(v, b);

	if (KL_LIKELY(v->insn_count - before >= KL_XLATE_BRIEF))
		b->brief = 0;
	else if (++b->brief == KL_XLATE_BRIEF_TIMES)
		b->ops[0].run = b->run0;
	return op;
}

const struct kl_op *kl_xlate_first(struct kl_vcpu *v, const struct kl_op *op)
{
	struct kl_block *b = kl_block_of(op);
	struct kl_xlate *x = v->blocks->xlate;

	if (v->code_mode != KL_CODE64 && !flat(v))
		return b->run0(v, op);
	/* Not live: each entry compares. 32-bit code is always looked up, so that is counted here.
	 */
	if (b->seen != v->code_epoch || b->gen != v->code_gen) {
		if (v->code_mode != KL_CODE64 && b->until > 1)
			b->until--;
		return b->run0(v, op);
	}
	if (KL_UNLIKELY(!b->host)) {
		if (++b->heat <= kl_min(kl_config.translate_after, KL_XLATE_PATIENCE))
			return b->run0(v, op);
		translate(v, x, b);
		if (!b->host)
			return b->run0(v, op);
	}
	return KL_UNLIKELY(kl_config.check) ? kl_check_block(v, b) : enter(v, b);
}

/* ---- the ways out ---- */

static const struct kl_xlate_to leave, stay = {&leave, NULL};

/* As while a fast handler of @op runs. */
static void in_block(struct kl_vcpu *v, struct kl_block *b, const struct kl_op *op)
{
	v->block = b;
	v->cur_op = op;
	v->lazy = true;
	v->code_page = (uint8_t *)((uint64_t)b->code & KL_PAGE_MASK);
}

static bool requested(struct kl_vcpu *v)
{
	return atomic_load_explicit(&v->core.requests, memory_order_relaxed);
}

/* An access of generated code that has faulted has not happened, and does not now. */
static void leave_if_landed(void)
{
	int why = kl_self.landed;

	if (KL_LIKELY(!why))
		return;
	kl_self.landed = 0;
	_longjmp(*kl_self.guard, why);
}

struct kl_xlate_to kl_xlate_slow(struct kl_vcpu *v, const struct kl_op *op)
{
	bool lent, avx;

	in_block(v, kl_block_of(op), op);
	leave_if_landed();
	if (KL_UNLIKELY(v->check) && kl_check_stops(v, op)) {
		kl_fast_leave(v);
		return leave;
	}
	lent = v->mxcsr_lent;
	avx = v->avx_lent;
	if (!kl_fast_do(v, op))
		return leave;
	/* What follows may count on it. */
	if (KL_UNLIKELY(requested(v)) || (lent && !kl_fast_lend_mxcsr(v)) ||
	    (avx && !v->avx_lent)) {
		v->cur_op = op + 1;
		kl_fast_leave(v);
		return leave;
	}
	return stay;
}

/* Before @op, which uses vector registers; not @lent: it can't be done natively. */
static struct kl_xlate_to lend(struct kl_vcpu *v, const struct kl_op *op, bool lent)
{
	if (KL_LIKELY(lent))
		return stay;
	in_block(v, kl_block_of(op), op);
	if (KL_UNLIKELY(v->check) && kl_check_stops(v, op)) {
		kl_fast_leave(v);
		return leave;
	}
	if (kl_fast_do(v, op)) {
		v->cur_op = op + 1;
		kl_fast_leave(v);
	}
	return leave;
}

struct kl_xlate_to kl_xlate_lend(struct kl_vcpu *v, const struct kl_op *op)
{
	return lend(v, op, kl_fast_lend_mxcsr(v));
}

struct kl_xlate_to kl_xlate_lend_avx(struct kl_vcpu *v, const struct kl_op *op)
{
	return lend(v, op, kl_fast_lend_mxcsr(v) && v->avx_lent);
}

/* The translation's page may have been mapped anew where it was. */
static bool still_mapped(struct kl_vcpu *v, struct kl_block *b)
{
	const uint8_t *code;
	kl_gfn_t gfn;

	if (KL_LIKELY(b->gen == v->code_gen))
		return true;
	if (b->gen == KL_STALE)
		return false;
	code = kl_fetch_pointer(v, b->rip);
	if (!code)
		return false;
	gfn = kl_fetch_gfn(v, b->rip);
	if (b->gfn != gfn)
		return false;
	b->code = code;
	v->code_page = (uint8_t *)((uint64_t)b->code & KL_PAGE_MASK);
	b->gen = v->code_gen;
	b->seen = KL_STALE;
	return true;
}

/* Memory has changed, and another block has come in @b's place: there, as far as that is known. */
static struct kl_xlate_to instead(struct kl_vcpu *v, struct kl_block *b)
{
	struct kl_block *to = kl_fast_find_in(v, b->rip, v->code_mode);

	v->blocks->xlate->nr_instead++;
	/* Edges that lead here are worth looking for if this happens often. */
	if (++b->heat >= KL_XLATE_PATIENCE) {
		kl_xlate_unlink(v->blocks->xlate, b);
		b->heat = 0;
	}
	if (!to || to == b || v->check)
		return leave;
	if (to->host)
		return (struct kl_xlate_to){.host = to->host};
	in_block(v, to, to->ops);
	return kl_block_verify(v, to) ? (struct kl_xlate_to){.op = to->ops} : leave;
}

struct kl_xlate_to kl_xlate_reenter(struct kl_vcpu *v, struct kl_block *b)
{
	struct kl_xlate_to to = leave;

	in_block(v, b, b->ops);
	leave_if_landed();
	if (KL_LIKELY(!requested(v))) {
		bool moved = b->gen != v->code_gen;

		if (!still_mapped(v, b)) {
			if (b->gen == KL_STALE)
				to = instead(v, b);
		} else if (moved && kl_code_live(b->page)) {
			/* It compares by itself, and if that fails comes back here. */
			return (struct kl_xlate_to){.host = b->host};
		} else if (kl_block_verify(v, b) && b->seen == v->code_epoch) {
			b->pass = pass_now(v);
			return (struct kl_xlate_to){.host = b->host};
		}
	}
	if (!to.host && !to.op)
		kl_fast_leave(v);
	return to;
}

static uint64_t target_of(const struct kl_block *b, const struct kl_op *op)
{
	uint64_t to = b->rip + op->offset + op->len;

	/* The op behind the last goes on where it is. */
	if (op->flags & KL_OPF_LINK)
		to += op->imm;
	return (b->key & 3) == KL_CODE64 ? to : (uint32_t)to;
}

/*
 * @op has gone where its link goes, and is counted. Next time it goes there directly, from the
 * jump whose distance lies where the 4 bytes at @site say: they are in the code, not aligned.
 */
struct kl_xlate_to kl_xlate_edge(struct kl_vcpu *v, const struct kl_op *op, const void *site)
{
	struct kl_block *b = kl_block_of(op), *to = op->link;
	struct kl_xlate *x = v->blocks->xlate;
	uint64_t rip = target_of(b, op);

	if (!to || to->gen != v->code_gen)
		to = kl_fast_find_in(v, rip, v->code_mode);
	if (to && kl_fast_may_enter(v, to) && KL_LIKELY(!v->check)) {
		kl_block_link(v->blocks, op, to);
		if (to->host) {
			int32_t at, rel;

			memcpy(&at, site, 4);
			rel = (int32_t)(to->host - (x->rx + at + 4));
			/* The same thread: it jumps here or there. */
			memcpy(x->rw + at, &rel, 4);
			return (struct kl_xlate_to){.host = to->host};
		}
		in_block(v, to, to->ops);
		if (to->seen == v->code_epoch || kl_block_verify(v, to))
			return (struct kl_xlate_to){.op = to->ops};
		kl_fast_leave(v);
		return leave;
	}
	if (KL_UNLIKELY(v->mxcsr_lent))
		kl_fast_return_mxcsr(v);
	v->rip = rip;
	kl_flags_put(v, v->flags_now);
	v->lazy = false;
	v->block = NULL;
	v->blocks->from = (struct kl_op *)(uintptr_t)op;
	return leave;
}

/* Nothing of @op has happened; it goes to @target. Again, if that is known now. */
struct kl_xlate_to kl_xlate_indirect(struct kl_vcpu *v, const struct kl_op *op, uint64_t target)
{
	struct kl_block *to = kl_fast_find_in(v, target, v->code_mode);

	if (to && to->host && KL_LIKELY(!v->check)) {
		struct kl_xlate_jump *jumps = v->code_mode == KL_CODE64 ? v->jumps : v->jumps32;
		struct kl_xlate_jump *j = &jumps[target >> 1 & (KL_XLATE_JUMPS - 1)];

		j->rip = target;
		j->host = to->host;
		return stay;
	}
	in_block(v, kl_block_of(op), op);
	/* The first op's fast handler is the way into its translation. */
	if (op->nth > 1 && !v->check)
		return (struct kl_xlate_to){.op = op};
	(void)kl_fast_do(v, op);
	return leave;
}
