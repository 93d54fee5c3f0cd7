/* SPDX-License-Identifier: MIT */
/*
 * The state of a local APIC, for the files that make it up: lapic.c (registers), lapic_send.c
 * (addressing and delivery), lapic_timer.c.
 *
 * Registers are atomic words: other threads set IRR and TMR bits, and read what addresses a
 * vCPU (ID, LDR, DFR, SVR) while its thread writes it. All else belongs to the vCPU's thread,
 * what the timer's callback uses to it, too.
 */
#pragma once

#include "host/timer.h"
#include "x86/lapic.h"
#include "x86/msr.h"

enum {
	APIC_ID = 0x20,
	APIC_LVR = 0x30,
	APIC_TPR = 0x80,
	APIC_ARBPRI = 0x90,
	APIC_PPR = 0xa0,
	APIC_EOI = 0xb0,
	APIC_LDR = 0xd0,
	APIC_DFR = 0xe0,
	APIC_SPIV = 0xf0,
	APIC_ISR = 0x100,
	APIC_TMR = 0x180,
	APIC_IRR = 0x200,
	APIC_ESR = 0x280,
	APIC_LVTCMCI = 0x2f0,
	APIC_ICR = 0x300,
	APIC_ICR2 = 0x310,
	APIC_LVTT = 0x320,
	APIC_LVTTHMR = 0x330,
	APIC_LVTPC = 0x340,
	APIC_LVT0 = 0x350,
	APIC_LVT1 = 0x360,
	APIC_LVTERR = 0x370,
	APIC_TMICT = 0x380,
	APIC_TMCCT = 0x390,
	APIC_TDCR = 0x3e0,
	APIC_SELF_IPI = 0x3f0,
};

#define APIC_NR_REGS 64

#define LVR_DIRECTED_EOI  (1u << 24)
#define SPIV_ENABLED      (1u << 8)
#define SPIV_DIRECTED_EOI (1u << 12)
#define DFR_FLAT          0xffffffffu
#define DFR_CLUSTER       0x0fffffffu
#define LVT_VECTOR        0xffu
#define LVT_MODE          0x700u
#define LVT_PENDING       (1u << 12)
#define LVT_POLARITY      (1u << 13)
#define LVT_REMOTE_IRR    (1u << 14)
#define LVT_LEVEL         (1u << 15)
#define LVT_MASKED        (1u << 16)
#define LVT_TIMER_MODE    (3u << 17)
#define TIMER_ONESHOT     (0u << 17)
#define TIMER_PERIODIC    (1u << 17)
#define TIMER_TSCDEADLINE (2u << 17)
#define ICR_BUSY          (1u << 12)

/* kl_lapic.events */
#define APIC_EVENT_INIT (1u << 0)
#define APIC_EVENT_SIPI (1u << 1)

struct kl_apic_timer {
	struct kl_timer t;
	_Atomic uint32_t pending;  /* it has expired and the interrupt is to be made */
	_Atomic uint32_t mode;     /* TIMER_*, from LVTT */
	_Atomic uint64_t period;   /* ns; 0: stopped */
	_Atomic uint64_t target;   /* CLOCK_MONOTONIC, ns */
	_Atomic uint64_t host_tsc; /* TSC_DEADLINE in the host's TSC */
	uint64_t tsc_deadline;     /* the MSR */
	uint32_t mode_mask, divide;
};

struct kl_lapic {
	struct kl_vcpu *v;
	_Atomic uint32_t regs[APIC_NR_REGS]; /* offset / 16 */
	_Atomic bool irr_pending;            /* false: no IRR bit is set */
	_Atomic uint32_t events;             /* INIT and SIPI that were sent here */
	_Atomic uint8_t sipi_vector;         /* written before the SIPI event */
	unsigned nr_lvt;
	bool lvt0_nmi; /* counted in vm->apics_in_nmi_mode */
	struct kl_apic_timer timer;
};

KL_INLINE uint32_t kl_apic_reg(const struct kl_lapic *a, unsigned offset)
{
	return atomic_load_explicit(&a->regs[offset >> 4], memory_order_relaxed);
}

KL_INLINE void kl_apic_set_reg(struct kl_lapic *a, unsigned offset, uint32_t val)
{
	atomic_store_explicit(&a->regs[offset >> 4], val, memory_order_relaxed);
}

KL_INLINE _Atomic uint32_t *kl_apic_word(struct kl_lapic *a, unsigned bitmap, unsigned vector)
{
	return &a->regs[(bitmap >> 4) + vector / 32];
}

KL_INLINE bool kl_apic_test(struct kl_lapic *a, unsigned bitmap, unsigned vector)
{
	return atomic_load_explicit(kl_apic_word(a, bitmap, vector), memory_order_relaxed) >>
		       vector % 32 &
	       1;
}

KL_INLINE uint64_t kl_apic_base(const struct kl_lapic *a)
{
	return atomic_load_explicit(&a->v->apic_base, memory_order_relaxed);
}

KL_INLINE bool kl_apic_hw_enabled(const struct kl_lapic *a)
{
	return kl_apic_base(a) & KL_APIC_BASE_ENABLE;
}

KL_INLINE bool kl_apic_sw_enabled(const struct kl_lapic *a)
{
	return kl_apic_reg(a, APIC_SPIV) & SPIV_ENABLED;
}

KL_INLINE bool kl_apic_x2apic(const struct kl_lapic *a)
{
	return kl_apic_base(a) & KL_APIC_BASE_X2APIC;
}

KL_INLINE uint32_t kl_apic_x2apic_id(const struct kl_lapic *a)
{
	return a->v->core.id;
}

/* ---- lapic_send.c ---- */

/* Something that addresses a vCPU has changed: kl_apic_map_update() is to be called. */
void kl_apic_map_dirty(struct kl_x86_vm *vm);
/* Context: OUTSIDE guest mode; rank APIC_MAP, waits for readers. */
void kl_apic_map_update(struct kl_x86_vm *vm);
/* A message of one vCPU's own: an LVT entry. How many accepted it. */
int kl_apic_deliver_lvt(struct kl_lapic *a, unsigned lvt);

/* ---- lapic_timer.c. Context of all: OUTSIDE guest mode (a cancelling waits). ---- */

void kl_apic_timer_init(struct kl_lapic *a);
void kl_apic_timer_cancel(struct kl_lapic *a);
/* LVTT was written. */
void kl_apic_timer_update_mode(struct kl_lapic *a);
/* TDCR was written. */
void kl_apic_timer_update_divide(struct kl_lapic *a);
/* Start anew, with the count in register @count: TMICT, or TMCCT of a restored state. */
void kl_apic_timer_start(struct kl_lapic *a, unsigned count);
uint32_t kl_apic_timer_count(struct kl_lapic *a);
