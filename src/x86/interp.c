/* SPDX-License-Identifier: MIT */
/*
 * The run loop. v->rip and v->cur_op are exact whenever a handler runs, so that it can leave
 * by longjmp anywhere; requests are polled before every block (M6).
 */
#include "x86/block.h"
#include "x86/ops.h"

/* Instructions of a block are counted when it is entered; take back those not executed. */
void kl_interp_settle(struct kl_vcpu *v)
{
	struct kl_block_cache *c = v->blocks;

	if (c->run_end && v->cur_op)
		v->insn_count -= (uint64_t)(c->run_end - v->cur_op);
	c->run_end = NULL;
}

/*
 * RF holds for one instruction, all iterations of it: a breakpoint on a repeated one that was
 * passed must not be met again. IRET loads it for the next.
 */
static KL_COLD void resume_flag(struct kl_vcpu *v, const struct kl_op *op, uint64_t rip)
{
	if (v->rip == rip && (op->flags & (KL_OPF_REP | KL_OPF_REPNE)))
		v->rflags |= v->bp.exec ? KL_FL_RF : 0;
	else if (op->fn != kl_op_iret)
		v->rflags &= ~(uint64_t)KL_FL_RF;
}

/* One instruction outside of blocks. True: return to run.c. */
static bool run_one(struct kl_vcpu *v)
{
	const struct kl_op *op = kl_block_one(v);
	uint64_t rip = v->rip;
	enum kl_next r;

	v->cur_op = op;
	r = op->fn(v, op);
	v->insn_count++;
	if (!(r & KL_JUMPED))
		v->rip = kl_next_rip(v, op);
	if (KL_UNLIKELY((v->rflags & KL_FL_RF) | v->bp.exec))
		resume_flag(v, op, rip);
	return (r & KL_STOP) || v->exit_pending;
}

void kl_interp_run(struct kl_vcpu *v)
{
	struct kl_block_cache *c = v->blocks;

	kl_interp_settle(v);
	c->stepping = false;
	/* Only run.c's events, the program and IRET set RF, and all of them come through here. */
	while (KL_UNLIKELY(v->rflags & KL_FL_RF) &&
	       !atomic_load_explicit(&v->core.requests, memory_order_relaxed)) {
		v->code_written = false;
		if (run_one(v))
			return;
	}
	while (KL_LIKELY(!atomic_load_explicit(&v->core.requests, memory_order_relaxed))) {
		struct kl_block *b = kl_block_get(v);
		const struct kl_op *op, *end;
		enum kl_next r;
		uint64_t rip;

		v->code_written = false;
		if (KL_UNLIKELY(!b)) {
			if (run_one(v))
				return;
			continue;
		}
		op = b->ops;
		end = op + b->nr_ops;
		rip = v->rip;
		v->insn_count += b->nr_ops;
		c->run_end = end;
		do {
			v->rip = rip;
			v->cur_op = op;
			r = op->fn(v, op);
			rip += op->len;
			op++;
			if (KL_UNLIKELY(r | v->code_written | v->exit_pending))
				break;
		} while (op != end);
		v->insn_count -= (uint64_t)(end - op);
		c->run_end = NULL;
		if (!(r & KL_JUMPED))
			v->rip = v->code_mode == KL_CODE64   ? rip
				 : v->code_mode == KL_CODE32 ? (uint32_t)rip
							     : (uint16_t)rip;
		if (KL_UNLIKELY((r & KL_STOP) | v->exit_pending))
			return;
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
