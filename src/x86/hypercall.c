/* SPDX-License-Identifier: MIT */
/*
 * VMCALL and VMMCALL. The host processor's vendor decides which of the two is a hypercall; the
 * other one is #UD there, which KVM answers by writing the right instruction over it, as an
 * ordinary guest store, unless the quirk is disabled.
 */
#include "x86/access.h"
#include "x86/guest_cpuid.h"
#include "x86/hypercall.h"
#include "x86/insn.h"
#include "x86/paravirt.h"

#define HC_VAPIC_POLL_IRQ 1
#define HC_EPERM          1
#define HC_EINVAL         22
#define HC_ENOSYS         1000

static bool is_64_bit(const struct kl_vcpu *v)
{
	return v->code_mode == KL_CODE64;
}

static void set_result(struct kl_vcpu *v, uint64_t ret)
{
	v->gpr[KL_RAX] = is_64_bit(v) ? ret : (uint32_t)ret;
	kl_stat_own_add(&v->core.stats.hypercalls, 1);
}

static uint64_t argument(const struct kl_vcpu *v, enum kl_gpr reg)
{
	return is_64_bit(v) ? v->gpr[reg] : (uint32_t)v->gpr[reg];
}

/* 0: the program is to answer. Else what the guest gets. */
static int64_t map_gpa_range(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t gpa = argument(v, KL_RBX), npages = argument(v, KL_RCX);
	uint64_t gfn = gpa >> KL_PAGE_SHIFT;

	if (!(v->kvm->hypercall_exit_enabled & (1u << KL_HC_MAP_GPA_RANGE)))
		return -HC_ENOSYS;
	if ((gpa & ~KL_PAGE_MASK) || !npages || gfn + npages <= gfn)
		return -HC_EINVAL;
	v->exit.reason = KVM_EXIT_HYPERCALL;
	v->exit.hypercall.nr = KL_HC_MAP_GPA_RANGE;
	v->exit.hypercall.args[0] = gpa;
	v->exit.hypercall.args[1] = npages;
	v->exit.hypercall.args[2] = argument(v, KL_RDX);
	v->exit.hypercall.longmode = is_64_bit(v);
	v->exit_pending = true;
	v->pending = KL_PENDING_HYPERCALL;
	v->pending_len = op->len;
	return 0;
}

static enum kl_next hv_hypercall(struct kl_vcpu *v, const struct kl_op *op)
{
	if (kl_pv_hv_hypercall(v)) {
		kl_stat_own_add(&v->core.stats.hypercalls, 1);
		return KL_NEXT;
	}
	v->exit_pending = true;
	v->pending = KL_PENDING_HYPERV;
	v->pending_len = op->len;
	return KL_JUMPED_STOP;
}

#define XEN_HYPERV_MARK 0x80000000u /* in EAX: the call is Hyper-V's */

static enum kl_next xen_hypercall(struct kl_vcpu *v, const struct kl_op *op)
{
	if ((v->gpr[KL_RAX] & XEN_HYPERV_MARK) && kl_pv_hv_enabled(v))
		return hv_hypercall(v, op);
	if (kl_pv_xen_hypercall(v)) {
		kl_stat_own_add(&v->core.stats.hypercalls, 1);
		return KL_NEXT;
	}
	v->exit_pending = true;
	v->pending = KL_PENDING_XEN;
	v->pending_rip = v->rip + (v->long_mode ? 0 : v->seg[KL_CS].base);
	v->pending_len = op->len;
	return KL_JUMPED_STOP;
}

static enum kl_next hypercall(struct kl_vcpu *v, const struct kl_op *op)
{
	const uint64_t arg[4] = {argument(v, KL_RBX), argument(v, KL_RCX), argument(v, KL_RDX),
				 argument(v, KL_RSI)};
	int64_t ret = -HC_ENOSYS;

	if (KL_UNLIKELY(atomic_load_explicit(&v->kvm->xen_hypercalls, memory_order_relaxed)))
		return xen_hypercall(v, op);
	if (kl_pv_hv_enabled(v))
		return hv_hypercall(v, op);
	if (v->cpl) {
		ret = -HC_EPERM;
	} else if (argument(v, KL_RAX) == HC_VAPIC_POLL_IRQ) {
		ret = 0;
	} else if (argument(v, KL_RAX) == KL_HC_MAP_GPA_RANGE) {
		ret = map_gpa_range(v, op);
		if (!ret)
			return KL_JUMPED_STOP; /* counted when the answer is there */
	} else if (!kl_pv_hypercall(v, argument(v, KL_RAX), arg, &ret)) {
		ret = -HC_ENOSYS;
	}
	set_result(v, (uint64_t)ret);
	/* The guest has lowered its priority in the vapic page, and knows of a request. */
	return KL_UNLIKELY(v->vapic_lent) ? KL_STOP : KL_NEXT;
}

void kl_hypercall_complete(struct kl_vcpu *v)
{
	set_result(v, v->exit.hypercall.ret);
}

void kl_hypercall_complete_xen(struct kl_vcpu *v)
{
	v->gpr[KL_RAX] = v->exit.xen.result;
	kl_stat_own_add(&v->core.stats.hypercalls, 1);
}

void kl_hypercall_complete_hyperv(struct kl_vcpu *v)
{
	kl_pv_hv_result(v, v->exit.hyperv.result);
	kl_stat_own_add(&v->core.stats.hypercalls, 1);
}

/* The instruction runs again, as what it is now. */
static enum kl_next fix(struct kl_vcpu *v, uint8_t modrm)
{
	const uint8_t insn[] = {0x0f, 0x01, modrm};

	if (v->kvm->disabled_quirks & KL_QUIRK_FIX_HYPERCALL_INSN)
		kl_raise(v, KL_EXC_UD);
	kl_write_bytes(v, kl_linear_add(v, v->long_mode ? 0 : v->seg[KL_CS].base, v->rip), insn,
		       sizeof(insn));
	return v->exit_pending ? KL_JUMPED_STOP : KL_JUMPED;
}

enum kl_next kl_op_vmcall(struct kl_vcpu *v, const struct kl_op *op)
{
	if (kl_host_is_intel())
		return hypercall(v, op);
	if (v->cpl)
		kl_raise_error(v, KL_EXC_GP, 0);
	return fix(v, 0xd9);
}

enum kl_next kl_op_vmmcall(struct kl_vcpu *v, const struct kl_op *op)
{
	if (!kl_host_is_intel())
		return hypercall(v, op);
	if (!(v->cr0 & KL_CR0_PE) || (v->rflags & KL_FL_VM))
		kl_raise(v, KL_EXC_UD);
	return fix(v, 0xc1);
}
