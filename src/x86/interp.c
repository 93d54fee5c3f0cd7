/* SPDX-License-Identifier: MIT */
/*
 * The run loop: finds blocks and starts them. What is in them runs by itself (fast.h): an op
 * calls the next one, and a jump whose target is known the first op of that block. They come back
 * here for everything else. Requests are polled before every block (M6).
 */
#include "x86/fast.h"
#include "x86/report.h"

/*
 * Whatever leaves a block by longjmp leaves block, lazy and cur_op behind: everything before
 * cur_op has been executed.
 */
void kl_interp_settle(struct kl_vcpu *v)
{
	if (!v->block)
		return;
	if (v->lazy)
		kl_fast_sync(v, v->cur_op);
	v->insn_count += v->cur_op->nth - 1u;
	v->block = NULL;
}

const struct kl_op *kl_fast_leave(struct kl_vcpu *v)
{
	kl_interp_settle(v);
	return NULL;
}

/* The next block is where @op jumps, always. */
static void ask_for_link(struct kl_vcpu *v, const struct kl_op *op)
{
	v->blocks->from = (struct kl_op *)op;
}

static void link_to(struct kl_block_cache *c, struct kl_block *b)
{
	if (c->from)
		kl_block_link(c, c->from, b);
	c->from = NULL;
}

bool kl_fast_do(struct kl_vcpu *v, const struct kl_op *op)
{
	enum kl_next r;

	v->cur_op = op;
	kl_fast_sync(v, op);
	if (op->flags & KL_OPF_END) {
		v->insn_count += op->nth - 1u;
		v->block = NULL;
		if (op->flags & KL_OPF_EPOCH)
			kl_code_new_epoch(v);
		r = op->fn(v, op);
		v->insn_count++;
	} else {
		r = op->fn(v, op);
		if (KL_LIKELY(!(r | v->code_written | v->exit_pending))) {
			kl_fast_unsync(v);
			return true;
		}
		v->insn_count += op->nth;
		v->block = NULL;
	}
	if (!(r & KL_JUMPED))
		v->rip = kl_next_rip(v, op);
	else if (op->flags & KL_OPF_LINK)
		ask_for_link(v, op);
	if (KL_UNLIKELY(v->nr_notes))
		kl_report_notes(v);
	v->blocks->stop = (r & KL_STOP) || v->exit_pending;
	return false;
}

const struct kl_op *kl_fast_call(struct kl_vcpu *v, const struct kl_op *op)
{
	if (!kl_fast_do(v, op))
		return NULL;
	KL_NEXT_OP(v, op + 1);
}

const struct kl_op *kl_fast_go_on(struct kl_vcpu *v, const struct kl_op *op)
{
	struct kl_block *b = op->link;

	v->cur_op = op;
	/* Elsewhere CS's limit is to be looked at; translated code has done that. */
	if (KL_LIKELY(v->code_mode == KL_CODE64)) {
		if (KL_LIKELY(kl_fast_may_enter(v, b)))
			return kl_fast_enter(v, b, op->nth - 1u, true);
		ask_for_link(v, op);
	}
	return kl_fast_leave(v);
}

/*
 * RF holds for one instruction, all iterations of it: a breakpoint on a repeated one that was
 * passed must not be met again. IRET and task switches load it for the next. @rip and @rf are from
 * before the instruction.
 */
static KL_COLD void resume_flag(struct kl_vcpu *v, const struct kl_op *op, uint64_t rip, bool rf)
{
	if (v->rip == rip && (op->flags & (KL_OPF_REP | KL_OPF_REPNE)))
		v->rflags |= KL_FL_RF;
	else if (rf && op->fn != kl_op_iret)
		v->rflags &= ~(uint64_t)KL_FL_RF;
}

/* One instruction outside of blocks. True: return to run.c. */
static bool run_one(struct kl_vcpu *v)
{
	const struct kl_op *op = kl_block_one(v);
	uint64_t rip = v->rip, rf = v->rflags & KL_FL_RF;
	enum kl_next r;

	v->cur_op = op;
	if (op->flags & KL_OPF_EPOCH)
		kl_code_new_epoch(v);
	r = op->fn(v, op);
	v->insn_count++;
	if (!(r & KL_JUMPED))
		v->rip = kl_next_rip(v, op);
	if (KL_UNLIKELY((v->rflags & (KL_FL_RF | KL_FL_TF)) | v->bp.exec))
		resume_flag(v, op, rip, rf);
	if (KL_UNLIKELY(v->nr_notes))
		kl_report_notes(v);
	return (r & KL_STOP) || v->exit_pending;
}

void kl_interp_run(struct kl_vcpu *v)
{
	struct kl_block_cache *c = v->blocks;

	kl_interp_settle(v);
	kl_self.generated = (const struct kl_generated *)c->xlate;
	c->stepping = c->stop = false;
	c->from = NULL;
	if (c->ask)
		c->ask->until = 1; /* a request came first: the next time, then */
	c->ask = NULL;
	if (!v->same_epoch)
		kl_code_new_epoch(v);
	v->same_epoch = false;
	v->tlb_now = v->tlb[v->tlb_mode];
	/* Only run.c's events, the program and IRET set RF, and all of them come through here. */
	while (KL_UNLIKELY(v->rflags & KL_FL_RF) &&
	       !atomic_load_explicit(&v->core.requests, memory_order_relaxed)) {
		v->code_written = false;
		if (run_one(v))
			return;
	}
	while (KL_LIKELY(!atomic_load_explicit(&v->core.requests, memory_order_relaxed))) {
		struct kl_block *b;
		const struct kl_op *op;

		if (KL_UNLIKELY(c->ask)) {
			kl_code_answer(v);
			continue; /* there may be a request now */
		}
		b = kl_block_get(v);
		v->code_written = false;
		if (KL_UNLIKELY(!b)) {
			c->from = NULL;
			if (run_one(v))
				return;
			continue;
		}
		link_to(c, b);
		if (KL_UNLIKELY(b->until == 1) && b->seen == KL_STALE) {
			c->ask = b; /* a translation is wanted at its first use */
			continue;
		}
		op = b->ops;
		v->block = b;
		v->cur_op = op;
		kl_fast_unsync(v);
		do
			op = op->run(v, op);
		while (op);
		if (KL_UNLIKELY(c->stop)) {
			v->same_epoch = !v->exit_pending;
			return;
		}
	}
}

void kl_interp_one(struct kl_vcpu *v)
{
	kl_interp_settle(v);
	v->blocks->stepping = true;
	v->code_written = false;
	run_one(v);
	v->blocks->stepping = false;
}
