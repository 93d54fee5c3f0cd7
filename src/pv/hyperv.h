/* SPDX-License-Identifier: MIT */
/*
 * What a guest that was made for Hyper-V finds: the part of Hyper-V's interface that KVM has
 * without being asked, but for the synthetic interrupt controller with its timers, the debugger and
 * nesting.
 *
 *   hyperv.c        life, CPUID, MSRs, the hypercall page
 *   hyperv_time.c   the reference counter and the page from which the guest computes it
 *   hyperv_hcall.c  hypercalls
 *
 * A guest whose CPUID does not have Hyper-V's interface knows none of it; a vCPU that enforces
 * (KVM_CAP_HYPERV_ENFORCE_CPUID) has what its CPUID says. MSRs and hypercalls run in the
 * instruction, out of guest mode.
 */
#pragma once

#include <linux/kvm.h>

#include "base/lock.h"
#include "x86/paravirt.h"

struct kl_pvclock;

enum kl_hv_msr {
	KL_HV_GUEST_OS_ID = 0x40000000,
	KL_HV_HYPERCALL = 0x40000001,
	KL_HV_VP_INDEX = 0x40000002,
	KL_HV_RESET = 0x40000003,
	KL_HV_VP_RUNTIME = 0x40000010,
	KL_HV_TIME_REF_COUNT = 0x40000020,
	KL_HV_REFERENCE_TSC = 0x40000021,
	KL_HV_TSC_FREQUENCY = 0x40000022,
	KL_HV_APIC_FREQUENCY = 0x40000023,
	KL_HV_EOI = 0x40000070,
	KL_HV_ICR = 0x40000071,
	KL_HV_TPR = 0x40000072,
	KL_HV_VP_ASSIST_PAGE = 0x40000073,
	KL_HV_SINT15 = 0x4000009f, /* the last of the first range */
	KL_HV_STIMER0_CONFIG = 0x400000b0,
	KL_HV_STIMER3_COUNT = 0x400000b7,
	KL_HV_SYNDBG_CONTROL = 0x400000f1,
	KL_HV_SYNDBG_PENDING_BUFFER = 0x400000f5,
	KL_HV_SYNDBG_OPTIONS = 0x400000ff,
	KL_HV_CRASH_P0 = 0x40000100,
	KL_HV_CRASH_P4 = 0x40000104,
	KL_HV_CRASH_CTL = 0x40000105,
	KL_HV_REENLIGHTENMENT_CONTROL = 0x40000106,
	KL_HV_TSC_EMULATION_CONTROL = 0x40000107,
	KL_HV_TSC_EMULATION_STATUS = 0x40000108,
	KL_HV_TSC_INVARIANT_CONTROL = 0x40000118,
};

/* CPUID leaf 0x40000003: EAX, EBX, EDX; 0x40000004: EAX. */
#define KL_HV_HAS_VP_RUNTIME      (1u << 0)
#define KL_HV_HAS_TIME_REF_COUNT  (1u << 1)
#define KL_HV_HAS_APIC            (1u << 4)
#define KL_HV_HAS_HYPERCALL       (1u << 5)
#define KL_HV_HAS_VP_INDEX        (1u << 6)
#define KL_HV_HAS_RESET           (1u << 7)
#define KL_HV_HAS_REFERENCE_TSC   (1u << 9)
#define KL_HV_HAS_FREQUENCIES     (1u << 11)
#define KL_HV_HAS_REENLIGHTENMENT (1u << 13)
#define KL_HV_HAS_TSC_INVARIANT   (1u << 15)

#define KL_HV_MAY_POST_MESSAGES (1u << 4)
#define KL_HV_MAY_SIGNAL_EVENTS (1u << 5)
#define KL_HV_MAY_CALL_EXTENDED (1u << 20)

#define KL_HV_XMM_INPUT   (1u << 4)
#define KL_HV_FREQUENCIES (1u << 8)
#define KL_HV_CRASH_MSRS  (1u << 10)
#define KL_HV_GVA_RANGES  (1u << 14)

#define KL_HV_REMOTE_FLUSH    (1u << 2)
#define KL_HV_APIC_MSRS       (1u << 3)
#define KL_HV_RELAXED_TIMING  (1u << 5)
#define KL_HV_NO_AUTO_EOI     (1u << 9)
#define KL_HV_CLUSTER_IPI     (1u << 10)
#define KL_HV_EX_MASKS        (1u << 11)
#define KL_HV_NO_CORE_SHARING (1u << 18)

/* What the reference page shows. */
enum kl_hv_tsc_page {
	KL_HV_TSC_UNSET,
	KL_HV_TSC_CHANGED_BY_GUEST, /* to be written */
	KL_HV_TSC_CHANGED_BY_HOST,
	KL_HV_TSC_SET,
	KL_HV_TSC_BROKEN, /* cannot be: the guest has its counter */
};

/* An eventfd that the guest signals. */
struct kl_hv_event {
	struct kl_hv_event *next;
	uint32_t conn_id;
	int fd;
};

struct kl_hv_vm {
	struct kl_mutex lock; /* rank LEAF; the rest, of which what is atomic is read without */
	_Atomic uint64_t guest_os_id;
	uint64_t hypercall, crash_param[5], crash_ctl;
	uint64_t reenlightenment, tsc_emulation, tsc_emulation_status;
	_Atomic uint64_t tsc_invariant;
	uint64_t tsc_page; /* the MSR */
	enum kl_hv_tsc_page tsc_status;
	uint64_t tsc_changes; /* of the two above, or of the clock */
	bool tsc_writing;     /* some vCPU's thread is writing the page, without the lock */
	uint64_t tsc_scale, tsc_offset;
	struct kl_hv_event *events;
};

struct kl_hv_vcpu {
	bool enabled; /* CPUID has Hyper-V's interface */
	bool enforce;
	uint32_t features_eax, features_ebx, features_edx, hints_eax, hints_ebx;
	_Atomic uint32_t vp_index; /* UINT32_MAX: the vCPU's place among all of them */
	uint64_t runtime_offset;
	uint64_t assist_page; /* the MSR */
};

void kl_hv_vm_init(struct kl_x86_vm *vm);
void kl_hv_vm_destroy(struct kl_x86_vm *vm);
void kl_hv_vcpu_init(struct kl_vcpu *v);
void kl_hv_cpuid_changed(struct kl_vcpu *v);
uint32_t kl_hv_vp_index(const struct kl_vcpu *v);

/* KL_PV_UNKNOWN: not Hyper-V's. @host as kl_pv_set_msr(). */
enum kl_pv_result kl_hv_get_msr(struct kl_vcpu *v, uint32_t index, uint64_t *data, bool host);
enum kl_pv_result kl_hv_set_msr(struct kl_vcpu *v, uint32_t index, uint64_t data, bool host);

/* KVM_GET_SUPPORTED_HV_CPUID; @v may be NULL. */
#define KL_HV_NR_LEAVES 10u
void kl_hv_supported_cpuid(const struct kl_vcpu *v, struct kvm_cpuid_entry2 e[KL_HV_NR_LEAVES]);
/* KVM_HYPERV_EVENTFD: 0, -EINVAL, -EBADF, -EEXIST, -ENOENT, -ENOMEM. */
int kl_hv_eventfd(struct kl_x86_vm *vm, const struct kvm_hyperv_eventfd *e) KL_MUST_CHECK;

/* hyperv_time.c */
/* In units of 100 ns. */
uint64_t kl_hv_reference_count(struct kl_vcpu *v);
/* The page's MSR; the clock that all vCPUs share has changed. */
void kl_hv_tsc_page_moved(struct kl_vcpu *v, uint64_t data, bool host);
void kl_hv_clock_changed(struct kl_x86_vm *vm);
/* Is it to be written? *@changes: how often that changed; asked for before the clock is read. */
bool kl_hv_tsc_page_due(struct kl_x86_vm *vm, uint64_t *changes);
/*
 * Write it, from the clock of @v. If there have been more changes than @changes, once more when
 * KL_PV_CLOCK is done next. OUTSIDE, may sleep. 0 or -EINTR.
 */
int kl_hv_tsc_page_update(struct kl_vcpu *v, const struct kl_pvclock *c,
			  uint64_t changes) KL_MUST_CHECK;

/* Signal the eventfd of @conn_id. False: there is none. */
bool kl_hv_signal(struct kl_x86_vm *vm, uint32_t conn_id);
