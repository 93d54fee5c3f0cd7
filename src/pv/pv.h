/* SPDX-License-Identifier: MIT */
/*
 * What the engine writes into guest memory for guests that know that they run on KVM: kvmclock,
 * steal time, asynchronous page faults (X3); or that believe to run on Xen (xen.h) or on Hyper-V
 * (hyperv.h).
 *
 * All of it belongs to the vCPU's thread (uapi holds the vCPU's mutex), except kl_pv_vm. Pages are
 * reached through caches (mem/gpc.h) and never matter to the guest's progress: one that is missing
 * is written when it is there (B26).
 */
#pragma once

#include "host/await.h"
#include "mem/gpc.h"
#include "pv/hyperv.h"
#include "pv/xen.h"
#include "x86/paravirt.h"

/* The same instant on three clocks. */
struct kl_pv_moment {
	uint64_t tsc;  /* the host's */
	uint64_t boot; /* ns since the host was started, not slewed */
	uint64_t real; /* ns since 1970 */
};

/* struct pvclock_vcpu_time_info: ABI. */
struct kl_pvclock {
	uint32_t version, pad0;
	uint64_t tsc_timestamp, system_time;
	uint32_t tsc_to_system_mul;
	int8_t tsc_shift;
	uint8_t flags, pad[2];
};
#define KL_PVCLOCK_TSC_STABLE    (1u << 0)
#define KL_PVCLOCK_GUEST_STOPPED (1u << 1)

struct kl_pv_vm {
	struct kl_mutex lock;       /* rank LEAF; the rest */
	struct kl_pv_moment master; /* where all vCPUs' clocks start from */
	int64_t clock_offset;       /* kvmclock = boot + offset */
	bool old_clock;             /* vCPU 0 uses the old MSR: its clock is never stable */
	_Atomic uint64_t wall_clock;
	struct kl_xen_vm xen;
	struct kl_hv_vm hv;
};

/* Work that a guest's MSR write or hypercall left. */
enum kl_pv_todo {
	KL_PV_CLOCK = 1 << 0,       /* write the clock page */
	KL_PV_CLOCK_MOVED = 1 << 1, /* its MSR changed */
	KL_PV_STEAL = 1 << 2,
	KL_PV_STEAL_MOVED = 1 << 3,
	KL_PV_WALL_CLOCK = 1 << 4,
	KL_PV_CLOCK_PAIRING = 1 << 5,
	KL_PV_XEN_ENTER = 1 << 6,
	KL_PV_XEN_PORTS =
		1 << 7, /* events that were put off: any thread sets it, and the next two */
	KL_PV_XEN_EVENTS = 1 << 8, /* words for vcpu_info */
	KL_PV_XEN_TIMER = 1 << 9,
	KL_PV_XEN_APIC = 1 << 10, /* it was enabled */
	KL_PV_EOI_MOVED = 1 << 11,
	KL_PV_ASYNC_PF_MOVED = 1 << 12,
	KL_PV_ASYNC_PF_READY = 1 << 13, /* a page has come: any thread */
	KL_PV_VAPIC_MOVED = 1 << 14,
};

#define KL_PV_MAX_ASYNC_PF 64 /* of a vCPU, as in KVM */

/* async_pf.c */
struct kl_pv_apf {
	uint64_t en_msr, int_msr;
	struct kl_gpc area;
	uint32_t last_id;
	unsigned in_use;          /* items */
	bool helpers;             /* it has a reference on them */
	_Atomic uint64_t nr_done; /* that ever were */
	struct kl_pv_apf_item {
		struct kl_pv_apf *apf;
		struct kl_await wait;
		kl_gfn_t gfn;
		uint32_t token;         /* 0: free */
		_Atomic uint64_t done;  /* the page has come, as the how many-th; 0: not yet */
	} item[KL_PV_MAX_ASYNC_PF + 1]; /* the last one is for all tokens */
};

struct kl_pv_vcpu {
	struct kl_vcpu *v;
	_Atomic uint32_t todo; /* enum kl_pv_todo; others set CLOCK */
	uint32_t features;     /* KVM_CPUID_FEATURES.EAX of the guest's CPUID */
	bool enforce;          /* KVM_CAP_ENFORCE_PV_FEATURE_CPUID */

	uint64_t clock_msr;
	struct kl_gpc clock;
	bool stopped; /* KVM_KVMCLOCK_CTRL: tell the guest */
	uint64_t pairing_gpa;
	struct kl_gpc once; /* for areas that are written once */

	uint64_t steal_msr;
	struct kl_gpc steal;
	uint64_t run_delay;      /* of thread steal_tid, when it was read last */
	uint64_t run_delay_read; /* the host's TSC then */
	pid_t steal_tid;         /* of the thread that steal_fd tells of; 0: none */
	int steal_fd;

	uint64_t eoi_msr;
	struct kl_gpc eoi;

	uint64_t vapic_addr, vapic_next; /* 0: none; the second from the next KVM_RUN on */
	struct kl_gpc vapic;

	struct kl_pv_apf apf;

	uint64_t poll_control;
	struct kl_xen_vcpu xen;
	struct kl_hv_vcpu hv;
};

KL_INLINE bool kl_pv_has(const struct kl_vcpu *v, enum kl_pv_feature f)
{
	return !v->pv->enforce || (v->pv->features >> f & 1);
}

/* Note @todo, and have it done before the next instruction. */
void kl_pv_ask(struct kl_vcpu *v, uint32_t todo);

/* All vCPUs write their clock pages before they go on. Any thread. */
void kl_pv_ask_all(struct kl_x86_vm *vm);

/*
 * Let @fn write the area of @c, locked and guarded. 0; -EINTR; -EFAULT and others: it is not there.
 * The second does not wait for the page: -EAGAIN.
 */
#define KL_PV_MAX_PIECES 2
typedef void kl_pv_write_fn(void *p, void *arg);
int kl_pv_write(struct kl_gpc *c, size_t len, kl_pv_write_fn *fn, void *arg) KL_MUST_CHECK;
int kl_pv_trywrite(struct kl_gpc *c, size_t len, kl_pv_write_fn *fn, void *arg);
/* The same for who only reads, and for an area in @n caches: @fn gets a void *[]. */
int kl_pv_read(struct kl_gpc *c, size_t len, kl_pv_write_fn *fn, void *arg) KL_MUST_CHECK;
int kl_pv_write_many(struct kl_gpc *const *c, const size_t *len, unsigned n, kl_pv_write_fn *fn,
		     void *arg) KL_MUST_CHECK;
/* Guest-physical memory, of any length. Context: the vCPU's thread. */
int kl_pv_copy(struct kl_vcpu *v, uint64_t gpa, void *buf, size_t len, bool write) KL_MUST_CHECK;
/*
 * Code that a guest's MSR write asks for. 0; 1: no memory is there, and the guest is refused;
 * -errno of KVM_RUN, because that the host lacks a page is not the guest's fault. [B26]
 */
int kl_pv_place(struct kl_vcpu *v, uint64_t gpa, void *buf, size_t len) KL_MUST_CHECK;
/* Is there a slot that can be written? */
bool kl_pv_is_ram(struct kl_vm *vm, kl_gfn_t gfn);
/* What becomes of that MSR write, @r being the above; may leave the instruction. */
enum kl_pv_result kl_pv_placed(struct kl_vcpu *v, int r, bool host);
/* An interrupt for @v alone. Any thread, any lock. */
void kl_pv_inject_vector(struct kl_vcpu *v, uint8_t vector);

/* clock.c */
struct kl_pv_moment kl_pv_now(void);
void kl_pvclock_scale(uint32_t khz, struct kl_pvclock *c);
uint64_t kl_pvclock_ns(const struct kl_pvclock *c, uint64_t tsc);
int kl_pv_clock_moved(struct kl_vcpu *v) KL_MUST_CHECK;
int kl_pv_clock_update(struct kl_vcpu *v) KL_MUST_CHECK;
int kl_pv_wall_clock_update(struct kl_vcpu *v) KL_MUST_CHECK;
int kl_pv_clock_pairing(struct kl_vcpu *v) KL_MUST_CHECK;
/* KVM_GET_CLOCK; KVM_SET_CLOCK: 0, or -EINVAL: unknown flags. */
void kl_pv_get_clock(struct kl_x86_vm *vm, struct kvm_clock_data *d);
int kl_pv_set_clock(struct kl_x86_vm *vm, const struct kvm_clock_data *d) KL_MUST_CHECK;
/* kvmclock now; and what the time of day was when it was 0. */
uint64_t kl_pv_clock_ns(struct kl_x86_vm *vm);
uint64_t kl_pv_wall_epoch(struct kl_x86_vm *vm);
/* KVM_KVMCLOCK_CTRL: 0, or -EINVAL: the guest has no clock page. */
int kl_pv_guest_stopped(struct kl_vcpu *v) KL_MUST_CHECK;

/* eoi.c: the MSR, KL_PV_OK or KL_PV_REFUSED; its area. */
enum kl_pv_result kl_pv_eoi_set(struct kl_vcpu *v, uint64_t msr);
int kl_pv_eoi_moved(struct kl_vcpu *v) KL_MUST_CHECK;

/* vapic.c */
int kl_pv_vapic_moved(struct kl_vcpu *v) KL_MUST_CHECK;

/* async_pf.c. Stop: INIT. Enable: the MSR, KL_PV_OK or KL_PV_REFUSED; all three may sleep. */
void kl_pv_async_pf_init(struct kl_vcpu *v);
void kl_pv_async_pf_destroy(struct kl_vcpu *v);
void kl_pv_async_pf_stop(struct kl_vcpu *v);
enum kl_pv_result kl_pv_async_pf_enable(struct kl_vcpu *v, uint64_t msr);
int kl_pv_async_pf_moved(struct kl_vcpu *v) KL_MUST_CHECK;
int kl_pv_async_pf_ready(struct kl_vcpu *v) KL_MUST_CHECK;

/* steal.c */
bool kl_pv_steal_supported(void);
int kl_pv_steal_moved(struct kl_vcpu *v) KL_MUST_CHECK;
int kl_pv_steal_update(struct kl_vcpu *v) KL_MUST_CHECK;
void kl_pv_steal_leave(struct kl_vcpu *v);
/* The run delay since it was asked last: steal time and Xen's runstate exclude one another. */
uint64_t kl_pv_stolen(struct kl_vcpu *v);
void kl_pv_steal_close(struct kl_pv_vcpu *pv);
