/* SPDX-License-Identifier: MIT */
/* Which fast handler an op gets. */
#include "host/cpu.h"
#include "x86/fast.h"

#define TERM(field) ((offsetof(struct kl_vcpu, field) - offsetof(struct kl_vcpu, gpr)) / 8)
_Static_assert(TERM(zero) < 256 && TERM(seg[KL_GS].base) < 256, "terms are numbered by bytes");
_Static_assert(sizeof(struct kvm_segment) % 8 == 0, "bases are aligned");

static void address_terms(struct kl_op *op)
{
	op->add_base = op->base < 16 ? op->base : TERM(zero);
	op->add_index = op->index < 16 ? op->index : TERM(zero);
	op->add_seg = op->seg == KL_FS   ? TERM(seg[KL_FS].base)
		      : op->seg == KL_GS ? TERM(seg[KL_GS].base)
					 : TERM(zero);
}

/* Not by the base of FS or GS alone: kl_seg_linear(). A displacement is always canonical. */
static bool offset_is_checked(const struct kl_op *op)
{
	return op->seg >= KL_FS && (op->base < 16 || op->index != KL_NOREG) && !kl_host_is_intel();
}

kl_run_fn *kl_fast_select(const struct kl_decode *d, kl_run_fn **noflags)
{
	struct kl_op *op = d->op;
	kl_run_fn *run = NULL;

	*noflags = NULL;
	/* Then d->in may be what it was before. */
	if (op->fn == kl_op_ud || op->fn == kl_op_too_long || op->fn == kl_op_unsupported)
		return kl_fast_call;
	/* F2 and F3 are part of vector instructions. */
	if ((op->flags & KL_OPF_LOCK) || ((op->flags & (KL_OPF_REP | KL_OPF_REPNE)) &&
					  d->in.opcode_map == ZYDIS_OPCODE_MAP_DEFAULT))
		return kl_fast_call;
	if ((op->flags & KL_OPF_MEM) && (d->mode != KL_CODE64 || op->addrsize != 8))
		return kl_fast_call;
	if ((op->flags & KL_OPF_MEM) && offset_is_checked(op))
		return kl_fast_call;
	address_terms(op);
	run = kl_fast_select_sse(d);
	if (!run)
		run = kl_fast_select_mov(d, noflags);
	if (!run)
		run = kl_fast_select_alu(d, noflags);
	if (!run)
		run = kl_fast_select_branch(d);
	return run ? run : kl_fast_call;
}
