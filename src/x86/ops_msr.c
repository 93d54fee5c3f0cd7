/* SPDX-License-Identifier: MIT */
/* RDMSR and WRMSR: what the filter and the registers refuse goes to the program if it wants it. */
#include "x86/insn.h"
#include "x86/msr.h"

/* The program wants to answer, or #GP. */
static enum kl_next msr_failed(struct kl_vcpu *v, const struct kl_op *op, enum kl_msr_result why,
			       uint32_t index, uint64_t data, bool write)
{
	uint32_t reason = why == KL_MSR_FILTERED  ? KVM_MSR_EXIT_REASON_FILTER
			  : why == KL_MSR_UNKNOWN ? KVM_MSR_EXIT_REASON_UNKNOWN
						  : KVM_MSR_EXIT_REASON_INVAL;

	if (!(v->kvm->user_space_msr_mask & reason))
		kl_raise_error(v, KL_EXC_GP, 0);
	v->exit.reason = write ? KVM_EXIT_X86_WRMSR : KVM_EXIT_X86_RDMSR;
	v->exit.msr.index = index;
	v->exit.msr.why = reason;
	v->exit.msr.data = data;
	v->exit.msr.error = 0;
	v->exit_pending = true;
	v->pending = KL_PENDING_MSR;
	v->pending_write = write;
	v->pending_len = op->len;
	return KL_JUMPED_STOP;
}

bool kl_msr_complete(struct kl_vcpu *v)
{
	if (v->exit.msr.error) {
		v->exc = (struct kl_event_exception){
			.pending = true, .nr = KL_EXC_GP, .has_error = true};
		return false;
	}
	if (!v->pending_write) {
		v->gpr[KL_RAX] = (uint32_t)v->exit.msr.data;
		v->gpr[KL_RDX] = v->exit.msr.data >> 32;
	}
	return true;
}

enum kl_next kl_op_rdmsr(struct kl_vcpu *v, const struct kl_op *op)
{
	uint32_t index = (uint32_t)v->gpr[KL_RCX];
	uint64_t data = 0;
	enum kl_msr_result r;

	if (v->cpl)
		kl_raise_error(v, KL_EXC_GP, 0);
	r = kl_msr_allowed(v, index, KVM_MSR_FILTER_READ) ? kl_msr_get(v, index, &data, false)
							  : KL_MSR_FILTERED;
	if (r != KL_MSR_OK)
		return msr_failed(v, op, r, index, 0, false);
	v->gpr[KL_RAX] = (uint32_t)data;
	v->gpr[KL_RDX] = data >> 32;
	return KL_NEXT;
}

enum kl_next kl_op_wrmsr(struct kl_vcpu *v, const struct kl_op *op)
{
	uint32_t index = (uint32_t)v->gpr[KL_RCX];
	uint64_t data = (v->gpr[KL_RDX] << 32) | (uint32_t)v->gpr[KL_RAX];
	enum kl_msr_result r;

	if (v->cpl)
		kl_raise_error(v, KL_EXC_GP, 0);
	r = kl_msr_allowed(v, index, KVM_MSR_FILTER_WRITE) ? kl_msr_set(v, index, data, false)
							   : KL_MSR_FILTERED;
	if (r != KL_MSR_OK)
		return msr_failed(v, op, r, index, data, true);
	return KL_STOP;
}
