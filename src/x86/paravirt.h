/* SPDX-License-Identifier: MIT */
/*
 * Everything that the vCPU asks of the paravirtual interfaces, which are above it and implemented
 * in pv/: like mem/subscribers.h, this list is the only way up.
 *
 * MSRs and hypercalls are executed in guest mode, where nothing may sleep. What they ask for is
 * noted, KL_REQ_PV is set, and kl_pv_update() does it outside, before the next instruction.
 */
#pragma once

#include "x86/vcpu.h"

/* Bits of KVM_CPUID_FEATURES.EAX that kvmlet knows. */
enum kl_pv_feature {
	KL_PV_CLOCKSOURCE = 0,
	KL_PV_NOP_IO_DELAY = 1,
	KL_PV_CLOCKSOURCE2 = 3,
	KL_PV_ASYNC_PF = 4,
	KL_PV_STEAL_TIME = 5,
	KL_PV_EOI = 6,
	KL_PV_UNHALT = 7,
	KL_PV_TLB_FLUSH = 9,
	KL_PV_ASYNC_PF_VMEXIT = 10, /* not offered */
	KL_PV_SEND_IPI = 11,
	KL_PV_POLL_CONTROL = 12,
	KL_PV_SCHED_YIELD = 13,
	KL_PV_ASYNC_PF_INT = 14,
	KL_PV_CLOCKSOURCE_STABLE = 24,
};

/* With the VM and the vCPU. 0 or -ENOMEM. */
int kl_pv_vm_create(struct kl_x86_vm *vm) KL_MUST_CHECK;
void kl_pv_vm_destroy(struct kl_x86_vm *vm);
int kl_pv_vcpu_create(struct kl_vcpu *v) KL_MUST_CHECK;
void kl_pv_vcpu_destroy(struct kl_vcpu *v);
/* INIT. Context: OUTSIDE; may sleep. */
void kl_pv_vcpu_reset(struct kl_vcpu *v);

/* What GET_SUPPORTED_CPUID says in KVM_CPUID_FEATURES.EAX. */
uint32_t kl_pv_supported_features(void);
/* The program has set @v's CPUID. */
void kl_pv_cpuid_changed(struct kl_vcpu *v);

enum kl_pv_result { KL_PV_OK, KL_PV_REFUSED, KL_PV_UNKNOWN };
/* @host: for the program, OUTSIDE, may sleep. Else for the guest, IN_GUEST. */
enum kl_pv_result kl_pv_get_msr(struct kl_vcpu *v, uint32_t index, uint64_t *data, bool host);
enum kl_pv_result kl_pv_set_msr(struct kl_vcpu *v, uint32_t index, uint64_t data, bool host);

/* Xen: the hypercall page's MSR was written. @host as above; may leave the instruction. */
enum kl_pv_result kl_pv_xen_set_msr(struct kl_vcpu *v, uint64_t data, bool host);
/* Xen: any hypercall. True: it is done; false: v->exit has what the program is asked. IN_GUEST;
 * may leave. */
bool kl_pv_xen_hypercall(struct kl_vcpu *v);
/* PV EOI: has the guest ended its interrupt; may it? OUTSIDE, may sleep. The first: 0 or -EINTR. */
int kl_pv_eoi_from_guest(struct kl_vcpu *v);
void kl_pv_eoi_to_guest(struct kl_vcpu *v);
/* The page of the virtual APIC (KVM_SET_VAPIC_ADDR): fetch the priority while v->vapic_lent; lend
 * it to the guest. OUTSIDE, may sleep. 0 or -EINTR. */
int kl_pv_vapic_from_guest(struct kl_vcpu *v);
int kl_pv_vapic_to_guest(struct kl_vcpu *v) KL_MUST_CHECK;
/* Where it is, 0: nowhere. 0, or -EINVAL: no memory that can be written. The vCPU is not running.
 */
int kl_pv_vapic_set(struct kl_vcpu *v, uint64_t addr) KL_MUST_CHECK;

/*
 * Asynchronous page faults: @v->core.awaited is to be waited for in the guest's place, at @gpa. 0:
 * the guest gets #PF with *@token; -EAGAIN: not this time, the vCPU waits itself; -EINTR: a signal.
 * Context: OUTSIDE, the vCPU's thread; may sleep.
 */
int kl_pv_async_pf(struct kl_vcpu *v, uint64_t gpa, bool write, uint32_t *token) KL_MUST_CHECK;

/* Hyper-V: are there hypercalls of its kind? */
bool kl_pv_hv_enabled(struct kl_vcpu *v);
/* Any of them, as kl_pv_xen_hypercall(); and what the guest gets. */
bool kl_pv_hv_hypercall(struct kl_vcpu *v);
void kl_pv_hv_result(struct kl_vcpu *v, uint64_t result);
/* Does CPUID not show the guest that its TSC is invariant, although it is? */
bool kl_pv_hides_invariant_tsc(struct kl_vcpu *v);
/* Xen: is its interrupt, kl_x86_vm.xen_vector, asserted? OUTSIDE; may sleep. */
bool kl_pv_xen_interrupt(struct kl_vcpu *v);
/* Xen: a route to an event channel. As kl_irq_set(), whose context it has. */
int kl_pv_xen_irq(struct kl_x86_vm *vm, uint32_t port, uint32_t vcpu);
/* @v's APIC was enabled by software. */
void kl_pv_apic_enabled(struct kl_vcpu *v);

/* A hypercall of CPL 0. IN_GUEST. Returns what the guest gets; false: there is no such. */
bool kl_pv_hypercall(struct kl_vcpu *v, uint64_t nr, const uint64_t arg[4], int64_t *ret);

/*
 * KVM_RUN begins, and ends; KL_REQ_PV was taken. Context: OUTSIDE, the vCPU's thread; may sleep.
 * A page that is not there is no error, as in KVM. -EINTR: a signal; what was to be done is still.
 */
void kl_pv_enter(struct kl_vcpu *v);
int kl_pv_update(struct kl_vcpu *v) KL_MUST_CHECK;
void kl_pv_leave(struct kl_vcpu *v);
