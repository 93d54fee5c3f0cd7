/* SPDX-License-Identifier: MIT */
/*
 * What a guest that was made for Xen finds: the hypercall page, shared_info, each vCPU's
 * vcpu_info, time, runstate and timer, and event channels in two levels (X1, X2, X4).
 *
 *   xen.c           life, configuration, the VM's attributes, hypercall page, wall clock
 *   xen_vcpu.c      a vCPU's attributes, what it does when it enters
 *   xen_event.c     event channels: delivery, what was put off, ports of the guest's own
 *   xen_runstate.c  runstate
 *   xen_timer.c     the one-shot timer
 *   xen_hcall.c     hypercalls that the engine answers
 *
 * Who may do what
 *   - A vCPU's attributes and runstate belong to its thread (uapi holds the vCPU's mutex), the
 *     VM's to xen->lock.
 *   - Any thread delivers events, with xen->lock or anything else held by others: it takes no
 *     lock, and reaches the pages by trying. Whoever may sleep waits for shared_info.
 *
 * Guarantees
 *   (a) An event that finds shared_info absent, from who must not sleep, is delivered by the
 *       thread of the vCPU that it is for: a bit in "deferred", then KL_PV_XEN_PORTS.
 *   (b) One that finds vcpu_info absent is in shared_info, and its word in "pending_sel" until
 *       the vCPU's thread has moved it to vcpu_info.
 *   (c) No wake-up of SCHEDOP_poll is lost: the poller sets "polling" and looks at the bits; who
 *       delivers sets the bit and looks at "polling".  PAIR(xen-poll)
 *   (d) What a page holds is laid out by the mode that is current when it is written.
 */
#pragma once

#include <linux/kvm.h>

#include "host/timer.h"
#include "mem/gpc.h"

struct kl_vcpu;
struct kl_x86_vm;

#define KL_XEN_PORTS_32  1024u
#define KL_XEN_PORTS_64  4096u
#define KL_XEN_INVALID   (~0ull)
#define KL_XEN_INFO_SIZE 64u /* struct vcpu_info */
#define KL_XEN_INFO_TIME 32u

enum kl_xen_runstate {
	KL_XEN_RUNNING,
	KL_XEN_RUNNABLE,
	KL_XEN_BLOCKED,
	KL_XEN_OFFLINE,
	KL_XEN_NR_RUNSTATES
};

/* Where an event goes that the guest sends from one of its ports. */
struct kl_xen_target {
	uint32_t type; /* EVTCHNSTAT_*; 0: nobody has set it up */
	uint32_t port; /* 0: to an eventfd */
	uint32_t vcpu;
	int fd;
};

struct kl_xen_vm {
	struct kl_mutex lock; /* rank XEN: changes of what follows */
	_Atomic uint32_t flags;
	uint64_t blob[2]; /* the program's hypercall pages, 32 and 64 bit ... */
	uint8_t blob_pages[2];
	_Atomic bool long_mode, runstate_update_flag;
	_Atomic bool wall_clock_due; /* shared_info was absent */
	_Atomic uint8_t upcall_vector;
	_Atomic uint32_t version;
	uint64_t shinfo_gfn, shinfo_hva; /* KL_XEN_INVALID, 0: not by this */
	struct kl_gpc shinfo;

	struct kl_mutex ports_lock;  /* rank LEAF */
	struct kl_xen_target *ports; /* NULL: none; KL_XEN_PORTS_64 of them */
};

struct kl_xen_vcpu {
	struct kl_gpc info, time, runstate[2];
	uint64_t info_gpa, info_hva, time_gpa, runstate_gpa; /* KL_XEN_INVALID or 0 as above */
	bool clock_due;                                      /* one of the first two was absent */
	uint32_t vcpu_id; /* UINT32_MAX: the vCPU's place among all of them */
	_Atomic uint8_t upcall_vector;

	/* Any thread. */
	_Atomic uint64_t pending_sel;
	_Atomic uint64_t deferred[KL_XEN_PORTS_64 / 64];
	_Atomic bool polling;
	_Atomic int64_t poll_port; /* -1: any */

	bool timers; /* kl_timer_get() was called */
	struct kl_timer timer, poll_timer, retry;
	_Atomic uint32_t timer_port;
	_Atomic uint64_t timer_expires; /* kvmclock; 0: not armed */
	_Atomic bool timer_pending;     /* has fired, but could not be delivered there */
	uint64_t timer_deadline;

	uint32_t state;
	uint64_t state_entry_time, state_time[KL_XEN_NR_RUNSTATES];
};

/* xen.c */
int kl_xen_vm_init(struct kl_x86_vm *vm) KL_MUST_CHECK;
void kl_xen_vm_destroy(struct kl_x86_vm *vm);
unsigned kl_xen_max_port(struct kl_x86_vm *vm);
/* The wall clock of shared_info, if it is there. 0 or -EINTR. */
int kl_xen_wall_clock(struct kl_x86_vm *vm) KL_MUST_CHECK;
/* The ioctls. Context: no lock; may sleep. */
int kl_xen_config(struct kl_x86_vm *vm, const struct kvm_xen_hvm_config *c) KL_MUST_CHECK;
int kl_xen_get_attr(struct kl_x86_vm *vm, struct kvm_xen_hvm_attr *a) KL_MUST_CHECK;
int kl_xen_set_attr(struct kl_x86_vm *vm, const struct kvm_xen_hvm_attr *a) KL_MUST_CHECK;
int kl_xen_evtchn_send(struct kl_x86_vm *vm,
		       const struct kvm_irq_routing_xen_evtchn *e) KL_MUST_CHECK;

/* xen_vcpu.c. Context: the vCPU's mutex; may sleep. */
int kl_xen_vcpu_init(struct kl_vcpu *v) KL_MUST_CHECK;
void kl_xen_vcpu_destroy(struct kl_vcpu *v);
uint32_t kl_xen_vcpu_id(const struct kl_vcpu *v);
int kl_xen_vcpu_get_attr(struct kl_vcpu *v, struct kvm_xen_vcpu_attr *a) KL_MUST_CHECK;
int kl_xen_vcpu_set_attr(struct kl_vcpu *v, const struct kvm_xen_vcpu_attr *a) KL_MUST_CHECK;
/* KVM_RUN begins. 0 or -EINTR. */
int kl_xen_enter(struct kl_vcpu *v) KL_MUST_CHECK;
/* The vCPU's APIC was enabled. 0 or -EINTR. */
int kl_xen_apic_enabled(struct kl_vcpu *v) KL_MUST_CHECK;

/* xen_event.c */
/*
 * Deliver @port to the vCPU with id @vcpu. 1; 0, it was pending already; -ENOTCONN, it is masked;
 * -EINVAL; -EAGAIN, shared_info is absent and @wait is false; with @wait also as kl_gpc_lock().
 * Context: any if not @wait.
 */
int kl_xen_raise(struct kl_x86_vm *vm, uint32_t port, uint32_t vcpu, bool wait);
int kl_xen_raise_on(struct kl_vcpu *v, uint32_t port, bool wait);
int kl_xen_set_target(struct kl_x86_vm *vm, const struct kvm_xen_hvm_attr *a) KL_MUST_CHECK;
/* The guest sends from @port. As kl_xen_raise(); -ENOENT, nobody has set it up. */
int kl_xen_send_from(struct kl_x86_vm *vm, uint32_t port);
bool kl_xen_upcall_pending(struct kl_vcpu *v);
void kl_xen_inject_vector(struct kl_vcpu *v);
/* What was put off for this vCPU's thread, and the vcpu_info part. 0 or -EINTR. */
int kl_xen_deliver_deferred(struct kl_vcpu *v) KL_MUST_CHECK;
int kl_xen_deliver_pending_sel(struct kl_vcpu *v) KL_MUST_CHECK;

/* xen_runstate.c. Context: the vCPU's mutex; may sleep. 0 or -errno. */
int kl_xen_runstate_move(struct kl_vcpu *v, uint64_t gpa) KL_MUST_CHECK;
int kl_xen_runstate_set(struct kl_vcpu *v, uint32_t state) KL_MUST_CHECK;
int kl_xen_runstate_load(struct kl_vcpu *v, const struct kvm_xen_vcpu_attr *a) KL_MUST_CHECK;
int kl_xen_runstate_adjust(struct kl_vcpu *v, const struct kvm_xen_vcpu_attr *a) KL_MUST_CHECK;
void kl_xen_runstate_get(struct kl_vcpu *v, struct kvm_xen_vcpu_attr *a);

/* xen_timer.c. Context: the vCPU's mutex; may sleep. */
void kl_xen_timers_init(struct kl_vcpu *v);
/* Before any vCPU of the VM is freed; again is nothing. */
void kl_xen_timers_destroy(struct kl_vcpu *v);
/* Before any of the timers is armed. 0, -EAGAIN or -ENOMEM. */
int kl_xen_timers_use(struct kl_vcpu *v) KL_MUST_CHECK;
void kl_xen_timer_start(struct kl_vcpu *v, uint64_t guest_ns, bool linux_workaround);
void kl_xen_timer_stop(struct kl_vcpu *v);
void kl_xen_timer_get(struct kl_vcpu *v, struct kvm_xen_vcpu_attr *a);
/* KL_PV_XEN_TIMER: what it could not deliver. 0 or -EINTR. */
int kl_xen_timer_deliver(struct kl_vcpu *v) KL_MUST_CHECK;
