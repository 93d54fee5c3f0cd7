/* SPDX-License-Identifier: MIT */
/* A guest with APIC that was made for Xen; the layouts of what it shares with the engine. */
#pragma once

#include "pv/xen_abi.h"
#include "uapi_guest.h"

#define HCALL_MSR 0x40000000u
#define INVALID   (~0ull)

/* In the guest's RAM, away from code, stack and tables. */
#define SHINFO  0x9000u
#define INFO    0xa040u
#define TIME    0xa080u
#define PARAM   0xb000u
#define RUNST   0xc000u /* two pages */
#define AWAY    0x40000000ul
#define DONE    0x80 /* ports of the guest's OUT */
#define UPCALL  0x81
#define HANDLER 0x1800
#define VECTOR  0x40

#define PENDING     0x800
#define MASK(wide)  ((wide) ? 0xa00 : 0x880)
#define WALL(wide)  ((wide) ? 0xc00 : 0x900)
#define HIGH(wide)  ((wide) ? 0xc0c : 0x924)
#define SEL(wide)   ((wide) ? 8 : 4)
#define PRIO        KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL
#define RS_SIZE(w)  ((w) ? 48u : 44u)
#define RS_ENTRY(w) ((w) ? 8u : 4u)

static inline long xen_set(struct guest *g, uint16_t type, uint64_t val)
{
	struct kvm_xen_hvm_attr a = {.type = type, .u.shared_info.gfn = val};

	return dev_ioctl_p(&g->vm, KVM_XEN_HVM_SET_ATTR, &a);
}

static inline long xen_get(struct guest *g, uint16_t type, uint64_t *val)
{
	struct kvm_xen_hvm_attr a = {.type = type};
	long r = dev_ioctl_p(&g->vm, KVM_XEN_HVM_GET_ATTR, &a);

	*val = a.u.shared_info.gfn;
	return r;
}

static inline long xen_vcpu_set(struct guest *g, uint16_t type, uint64_t val)
{
	struct kvm_xen_vcpu_attr a = {.type = type, .u.gpa = val};

	return dev_ioctl_p(&g->vcpu, KVM_XEN_VCPU_SET_ATTR, &a);
}

static inline long xen_vcpu_get(struct guest *g, uint16_t type, uint64_t *val)
{
	struct kvm_xen_vcpu_attr a = {.type = type};
	long r = dev_ioctl_p(&g->vcpu, KVM_XEN_VCPU_GET_ATTR, &a);

	*val = a.u.gpa;
	return r;
}

static inline long xen_send(struct guest *g, uint32_t port, uint32_t vcpu)
{
	struct kvm_irq_routing_xen_evtchn e = {.port = port, .vcpu = vcpu, .priority = PRIO};

	return dev_ioctl_p(&g->vm, KVM_XEN_HVM_EVTCHN_SEND, &e);
}

static inline long xen_config(struct guest *g, uint32_t flags)
{
	struct kvm_xen_hvm_config c = {.flags = flags, .msr = HCALL_MSR};

	return dev_ioctl_p(&g->vm, KVM_XEN_HVM_CONFIG, &c);
}

static inline void xen_make(struct guest *g)
{
	guest_make(g, true);
	assert_int_equal(
		xen_config(g, KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL | KVM_XEN_HVM_CONFIG_EVTCHN_SEND),
		0);
}

static inline bool xen_bit(const uint8_t *bits, unsigned n)
{
	return bits[n / 8] >> n % 8 & 1;
}

/* In real mode: STI, HLT, OUT to DONE; the upcall's handler does OUT to UPCALL, and IRET. */
static inline void xen_wait_for_upcall(struct guest *g)
{
	static const uint8_t code[] = {0xfb, 0xf4, 0xe6, DONE, 0xf4};
	static const uint8_t handler[] = {0xe6, UPCALL, 0xcf};

	memcpy(g->ram + CODE, code, sizeof(code));
	memcpy(g->ram + HANDLER, handler, sizeof(handler));
	set_vector(g, VECTOR, HANDLER);
	guest_regs(g);
}

#define assert_port(g, p)                               \
	do {                                            \
		assert_exit(g, KVM_EXIT_IO);            \
		assert_int_equal((g)->run->io.port, p); \
	} while (0)

/* A hypercall of 64-bit code, then OUT to DONE. */
static inline void xen_hypercall(struct guest *g, uint64_t nr, uint64_t a0, uint64_t a1,
				 uint64_t a2)
{
	static const uint8_t code[] = {0x0f, 0x01, 0xd9, 0xe6, DONE, 0xf4};
	struct kvm_regs r = guest_get(g);

	memcpy(g->ram + CODE, code, sizeof(code));
	r.rip = CODE;
	r.rax = nr;
	r.rdi = a0;
	r.rsi = a1;
	r.rdx = a2;
	r.r10 = 0x44;
	r.r8 = 0x55;
	r.r9 = 0x66;
	assert_int_equal(dev_ioctl_p(&g->vcpu, KVM_SET_REGS, &r), 0);
}

/* ... that the engine answers. */
static inline int64_t xen_call(struct guest *g, uint64_t nr, uint64_t a0, uint64_t a1, uint64_t a2)
{
	xen_hypercall(g, nr, a0, a1, a2);
	assert_port(g, DONE);
	return (int64_t)guest_get(g).rax;
}

/* ... that is the program's, which answers 0. */
static inline void xen_exit(struct guest *g, uint64_t nr, uint64_t a0, uint64_t a1, uint64_t a2)
{
	xen_hypercall(g, nr, a0, a1, a2);
	assert_exit(g, KVM_EXIT_XEN);
	assert_int_equal(g->run->xen.u.hcall.input, nr);
	g->run->xen.u.hcall.result = 0;
	assert_port(g, DONE);
	assert_int_equal(guest_get(g).rax, 0);
}

/* ---- runstate ---- */

struct runstate {
	uint32_t state;
	uint64_t entry, time[4];
};

static inline struct runstate read_runstate(const uint8_t *p, bool wide)
{
	struct runstate r;

	memcpy(&r.state, p, 4);
	memcpy(&r.entry, p + RS_ENTRY(wide), 8);
	memcpy(r.time, p + RS_ENTRY(wide) + 8, 32);
	return r;
}

static inline uint64_t runstate_sum(const struct runstate *r)
{
	return r->time[0] + r->time[1] + r->time[2] + r->time[3];
}

static inline long xen_runstate(struct guest *g, uint16_t type, uint64_t state, uint64_t entry,
				uint64_t running, uint64_t runnable)
{
	struct kvm_xen_vcpu_attr a = {.type = type};

	a.u.runstate.state = state;
	a.u.runstate.state_entry_time = entry;
	a.u.runstate.time_running = running;
	a.u.runstate.time_runnable = runnable;
	return dev_ioctl_p(&g->vcpu, KVM_XEN_VCPU_SET_ATTR, &a);
}

/* What the vCPU's attributes say. */
static inline struct runstate kept_runstate(struct guest *g)
{
	struct kvm_xen_vcpu_attr a = {.type = KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA};

	assert_int_equal(dev_ioctl_p(&g->vcpu, KVM_XEN_VCPU_GET_ATTR, &a), 0);
	return (struct runstate){(uint32_t)a.u.runstate.state,
				 a.u.runstate.state_entry_time,
				 {a.u.runstate.time_running, a.u.runstate.time_runnable,
				  a.u.runstate.time_blocked, a.u.runstate.time_offline}};
}

static inline bool xen_has_runstate(struct guest *g)
{
	return dev_ioctl(&g->kvm, KVM_CHECK_EXTENSION, KVM_CAP_XEN_HVM) &
	       KVM_XEN_HVM_CONFIG_RUNSTATE;
}
