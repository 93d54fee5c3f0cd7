/* SPDX-License-Identifier: MIT */
/*
 * The local APIC's registers: what guest and program read and write, priorities, INIT and SIPI,
 * APIC_BASE, KVM_GET_LAPIC and KVM_SET_LAPIC.
 */
#include "x86/lapic.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/failpoint.h"
#include "x86/guest_cpuid.h"
#include "x86/irqchip.h"
#include "x86/lapic_state.h"
#include "x86/paging.h"
#include "x86/paravirt.h"

#define VERSION     0x14u
#define NR_LVT      6u
#define MMIO_LENGTH KL_PAGE_SIZE
#define BASE_ADDR   0xffffff000ull

/* ICR in x2APIC mode: bits that must be 0 (the busy bit is ignored). */
#define X2APIC_ICR_RESERVED (0xfff00000u | 3u << 16 | 1u << 13)

/* ---- life ---- */

int kl_apic_create(struct kl_vcpu *v)
{
	struct kl_lapic *a = kl_failpoint("apic-alloc") ? NULL : calloc(1, sizeof(*a));
	int r;

	if (!a)
		return -ENOMEM;
	kl_not_leaked(a);
	r = kl_timer_get();
	if (r) {
		free(a);
		return r;
	}
	a->v = v;
	a->nr_lvt = NR_LVT;
	kl_apic_timer_init(a);
	v->apic = a;
	return 0;
}

void kl_apic_destroy(struct kl_vcpu *v)
{
	if (!v->apic)
		return;
	kl_timer_cancel(&v->apic->timer.t);
	kl_timer_put();
	free(v->apic);
	v->apic = NULL;
}

void kl_apic_online(struct kl_vcpu *v)
{
	if (!v->apic)
		return;
	kl_apic_map_dirty(v->kvm);
	kl_apic_map_update(v->kvm);
}

/* ---- vectors ---- */

static int highest(struct kl_lapic *a, unsigned bitmap)
{
	for (int i = 7; i >= 0; i--) {
		uint32_t word = atomic_load(&a->regs[(bitmap >> 4) + (unsigned)i]);

		if (word)
			return i * 32 + 31 - __builtin_clz(word);
	}
	return -1;
}

static int highest_irr(struct kl_lapic *a)
{
	return atomic_load(&a->irr_pending) ? highest(a, APIC_IRR) : -1;
}

bool kl_apic_pending_eoi(struct kl_vcpu *v, unsigned vector)
{
	return kl_apic_test(v->apic, APIC_ISR, vector) || kl_apic_test(v->apic, APIC_IRR, vector);
}

static uint32_t update_ppr(struct kl_lapic *a)
{
	uint32_t tpr = kl_apic_reg(a, APIC_TPR) & 0xff, ppr = tpr;
	int isr = highest(a, APIC_ISR);

	if (isr >= 0 && (tpr & 0xf0) < ((uint32_t)isr & 0xf0))
		ppr = (uint32_t)isr & 0xf0;
	kl_apic_set_reg(a, APIC_PPR, ppr);
	return ppr;
}

int kl_apic_interrupt(struct kl_vcpu *v)
{
	struct kl_lapic *a = v->apic;
	int vector;

	if (!kl_apic_hw_enabled(a))
		return -1;
	vector = highest_irr(a);
	return vector >= 0 && ((uint32_t)vector & 0xf0) > update_ppr(a) ? vector : -1;
}

void kl_apic_ack(struct kl_vcpu *v, unsigned vector)
{
	struct kl_lapic *a = v->apic;
	uint32_t bit = 1u << vector % 32;

	/* The hint first: a vector that is set while the bits are looked at sets it again. */
	atomic_store(&a->irr_pending, false);
	atomic_fetch_and(kl_apic_word(a, APIC_IRR, vector), ~bit);
	racepoint("apic-irr-cleared");
	if (highest(a, APIC_IRR) >= 0)
		atomic_store(&a->irr_pending, true);
	atomic_fetch_or(kl_apic_word(a, APIC_ISR, vector), bit);
	update_ppr(a);
}

bool kl_apic_accepts_extint(struct kl_vcpu *v)
{
	uint32_t lvt0 = kl_apic_reg(v->apic, APIC_LVT0);

	if (!kl_apic_hw_enabled(v->apic))
		return true;
	return !(lvt0 & LVT_MASKED) && (lvt0 & LVT_MODE) >> 8 == KL_APIC_EXTINT;
}

/* To the I/O APIC: the engine's, or the program's. */
static void broadcast_eoi(struct kl_lapic *a, unsigned vector)
{
	struct kl_x86_vm *vm = a->v->kvm;
	bool level = kl_apic_test(a, APIC_TMR, vector);

	if (!kl_irqchip_in_kernel(vm)) {
		if (kl_irqchip_eoi_exits(vm, a->v, vector, level))
			a->v->eoi_exit = (int)vector;
		return;
	}
	/* Directed EOI: who listens is told, the pin is not served. */
	if (kl_apic_reg(a, APIC_SPIV) & SPIV_DIRECTED_EOI)
		level = false;
	kl_ioapic_eoi(vm, a->v, vector, level);
}

static void end_of_interrupt(struct kl_lapic *a)
{
	int vector = highest(a, APIC_ISR);

	if (vector < 0)
		return;
	atomic_fetch_and(kl_apic_word(a, APIC_ISR, (unsigned)vector), ~(1u << vector % 32));
	update_ppr(a);
	broadcast_eoi(a, (unsigned)vector);
}

void kl_apic_end_of_interrupt(struct kl_vcpu *v)
{
	end_of_interrupt(v->apic);
}

int kl_apic_quiet_in_service(struct kl_vcpu *v)
{
	struct kl_lapic *a = v->apic;
	int vector;

	if (!kl_apic_hw_enabled(a) || atomic_load(&a->irr_pending))
		return -1;
	vector = highest(a, APIC_ISR);
	return vector >= 0 && !kl_apic_test(a, APIC_TMR, (unsigned)vector) ? vector : -1;
}

/*
 * Before an access of the guest: it may have ended an interrupt without one, or changed its
 * priority. After a signal the loop does it, before the next interrupt.
 */
static void see_guest(struct kl_vcpu *v)
{
	if (KL_UNLIKELY(v->pv_eoi_pending))
		(void)kl_pv_eoi_from_guest(v);
	if (KL_UNLIKELY(v->vapic_lent)) {
		(void)kl_pv_vapic_from_guest(v);
		v->vapic_lent = true; /* an RDMSR's guest goes on with it */
	}
}

/* The program is told when the instruction is done. As in KVM, of its last access only. */
static void report_tpr(struct kl_vcpu *v, uint64_t rip, bool write)
{
	if (KL_LIKELY(!v->tpr_reporting))
		return;
	v->tpr_access.rip = rip;
	v->tpr_access.is_write = write;
	v->tpr_access.due = true;
	kl_vcpu_request(&v->core, KL_REQ_EVENT);
}

/* ---- CR8 ---- */

uint64_t kl_x86_get_cr8(struct kl_vcpu *v)
{
	return v->apic ? (kl_apic_reg(v->apic, APIC_TPR) & 0xf0) >> 4 : v->cr8;
}

void kl_x86_set_cr8(struct kl_vcpu *v, uint64_t cr8)
{
	if (!v->apic) {
		v->cr8 = cr8;
		return;
	}
	kl_apic_set_tpr(v, (uint8_t)(cr8 << 4));
}

/* ---- the task priority ---- */

void kl_apic_set_tpr(struct kl_vcpu *v, uint8_t tpr)
{
	kl_apic_set_reg(v->apic, APIC_TPR, tpr);
	update_ppr(v->apic);
	v->vapic_lent = false;
}

bool kl_apic_priorities(struct kl_vcpu *v, uint32_t *word)
{
	struct kl_lapic *a = v->apic;
	int irr, isr;

	if (!kl_apic_hw_enabled(a) || !kl_apic_sw_enabled(a))
		return false;
	irr = highest_irr(a);
	isr = highest(a, APIC_ISR);
	*word = kl_apic_reg(a, APIC_TPR) | (isr < 0 ? 0 : (uint32_t)isr & 0xf0) << 8 |
		(irr < 0 ? 0 : (uint32_t)irr) << 24;
	return true;
}

/* ---- registers ---- */

static unsigned lvt_offset(unsigned i)
{
	return i == 6 ? APIC_LVTCMCI : APIC_LVTT + (i << 4);
}

static void set_version(struct kl_lapic *a)
{
	uint32_t lvr = VERSION | (a->nr_lvt - 1) << 16;

	/* The engine's I/O APIC has no EOI register, so directed EOI makes no sense with it. */
	if (a->v->has_x2apic && !kl_irqchip_in_kernel(a->v->kvm))
		lvr |= LVR_DIRECTED_EOI;
	kl_apic_set_reg(a, APIC_LVR, lvr);
}

static void set_spiv(struct kl_lapic *a, uint32_t val)
{
	bool was = kl_apic_sw_enabled(a);

	kl_apic_set_reg(a, APIC_SPIV, val);
	if (was == kl_apic_sw_enabled(a))
		return;
	kl_apic_map_dirty(a->v->kvm);
	if (!was && a->v->pv) /* it has been made */
		kl_pv_apic_enabled(a->v);
}

/* In NMI mode LINT0 gets the PIT's ticks: a watchdog. */
static void count_nmi_mode(struct kl_lapic *a, uint32_t lvt0)
{
	bool nmi = (lvt0 & (LVT_MODE | LVT_MASKED)) == KL_APIC_NMI << 8;

	if (nmi == a->lvt0_nmi)
		return;
	a->lvt0_nmi = nmi;
	if (nmi)
		atomic_fetch_add(&a->v->kvm->apics_in_nmi_mode, 1);
	else
		atomic_fetch_sub(&a->v->kvm->apics_in_nmi_mode, 1);
}

static bool readable(const struct kl_lapic *a, unsigned offset)
{
	switch (offset) {
	case APIC_ID:
	case APIC_LVR:
	case APIC_TPR:
	case APIC_PPR:
	case APIC_LDR:
	case APIC_SPIV:
	case APIC_ISR ... APIC_ESR:
	case APIC_ICR:
	case APIC_LVTT ... APIC_TMCCT:
	case APIC_TDCR:
		return true;
	case APIC_LVTCMCI:
		return a->nr_lvt > NR_LVT;
	case APIC_ARBPRI:
	case APIC_DFR:
	case APIC_ICR2:
		return !kl_apic_x2apic(a);
	default:
		return false;
	}
}

/* Some of the bytes of one register. False: there is none. */
static bool read_reg(struct kl_lapic *a, unsigned offset, unsigned len, void *data)
{
	unsigned reg = offset & ~0xfu;
	uint32_t val;

	if ((offset & 0xf) + len > 4 || !readable(a, reg))
		return false;
	switch (reg) {
	case APIC_ARBPRI:
		val = 0;
		break;
	case APIC_TMCCT:
		val = kl_apic_timer_count(a);
		break;
	case APIC_PPR:
		val = update_ppr(a);
		break;
	default:
		val = kl_apic_reg(a, reg);
		break;
	}
	memcpy(data, (uint8_t *)&val + (offset & 0xf), len);
	return true;
}

static void send_ipi(struct kl_lapic *a, uint32_t low, uint32_t high)
{
	struct kl_apic_msg m = {
		.dest = kl_apic_x2apic(a) ? high : high >> 24,
		.logical = low >> 11 & 1,
		.level = low >> 14 & 1,
		.level_triggered = low >> 15 & 1,
		.delivery = low >> 8 & 7,
		.vector = (uint8_t)low,
		.shorthand = low >> 18 & 3,
	};

	kl_apic_send(a->v->kvm, a->v, &m);
}

static void write_spiv(struct kl_lapic *a, uint32_t val)
{
	uint32_t mask = 0x3ff;

	if (kl_apic_reg(a, APIC_LVR) & LVR_DIRECTED_EOI)
		mask |= SPIV_DIRECTED_EOI;
	set_spiv(a, val & mask);
	if (val & SPIV_ENABLED)
		return;
	for (unsigned i = 0; i < a->nr_lvt; i++)
		kl_apic_set_reg(a, lvt_offset(i), kl_apic_reg(a, lvt_offset(i)) | LVT_MASKED);
	kl_apic_timer_update_mode(a);
	atomic_store(&a->timer.pending, 0);
}

static bool write_lvt(struct kl_lapic *a, unsigned reg, uint32_t val)
{
	uint32_t mask = LVT_MASKED | LVT_PENDING | LVT_VECTOR;

	switch (reg) {
	case APIC_LVTT:
		mask |= a->timer.mode_mask;
		break;
	case APIC_LVT0:
	case APIC_LVT1:
		mask |= LVT_MODE | LVT_POLARITY | LVT_REMOTE_IRR | LVT_LEVEL;
		break;
	case APIC_LVTCMCI:
		if (a->nr_lvt <= NR_LVT)
			return false;
		mask |= LVT_MODE;
		break;
	case APIC_LVTERR:
		break;
	default:
		mask |= LVT_MODE;
		break;
	}
	if (reg == APIC_LVT0)
		count_nmi_mode(a, val);
	if (!kl_apic_sw_enabled(a))
		val |= LVT_MASKED;
	kl_apic_set_reg(a, reg, val & mask);
	if (reg == APIC_LVTT)
		kl_apic_timer_update_mode(a);
	return true;
}

/* Context: OUTSIDE guest mode. False: there is no such register, or not in this mode. */
static bool write_reg(struct kl_lapic *a, unsigned reg, uint32_t val)
{
	struct kl_x86_vm *vm = a->v->kvm;
	bool x2apic = kl_apic_x2apic(a);

	switch (reg) {
	case APIC_ID:
	case APIC_LDR:
	case APIC_DFR:
		if (x2apic)
			return false;
		if (reg == APIC_DFR)
			val |= 0x0fffffff;
		else
			val &= 0xff000000;
		kl_apic_set_reg(a, reg, val);
		kl_apic_map_dirty(vm);
		break;
	case APIC_TPR:
		kl_apic_set_tpr(a->v, (uint8_t)val);
		break;
	case APIC_EOI:
		end_of_interrupt(a);
		break;
	case APIC_SPIV:
		write_spiv(a, val);
		break;
	case APIC_ICR:
		val &= ~ICR_BUSY;
		send_ipi(a, val, kl_apic_reg(a, APIC_ICR2));
		kl_apic_set_reg(a, APIC_ICR, val);
		break;
	case APIC_ICR2:
		if (x2apic)
			return false;
		kl_apic_set_reg(a, APIC_ICR2, val & 0xff000000);
		break;
	case APIC_LVTCMCI:
	case APIC_LVTT ... APIC_LVTERR:
		if (!write_lvt(a, reg, val))
			return false;
		break;
	case APIC_TMICT:
		if ((kl_apic_reg(a, APIC_LVTT) & a->timer.mode_mask) == TIMER_TSCDEADLINE)
			break;
		kl_apic_timer_cancel(a);
		kl_apic_set_reg(a, APIC_TMICT, val);
		kl_apic_timer_start(a, APIC_TMICT);
		break;
	case APIC_TDCR:
		kl_apic_set_reg(a, APIC_TDCR, val & 0xb);
		kl_apic_timer_update_divide(a);
		break;
	case APIC_ESR: /* no error is ever recorded */
		return !x2apic || !val;
	case APIC_SELF_IPI:
		if (!x2apic || val & ~LVT_VECTOR)
			return false;
		send_ipi(a, KL_APIC_SELF << 18 | val, 0);
		break;
	default:
		return false;
	}
	kl_apic_map_update(vm);
	return true;
}

int kl_apic_mmio(struct kl_vcpu *v, uint64_t gpa, unsigned len, void *data, bool write)
{
	struct kl_lapic *a = v->apic;
	uint64_t offset = gpa - (kl_apic_base(a) & BASE_ADDR);
	uint32_t val;

	if (offset >= MMIO_LENGTH)
		return -EOPNOTSUPP;
	if (!kl_apic_hw_enabled(a) || kl_apic_x2apic(a)) {
		if (v->kvm->disabled_quirks & KL_QUIRK_LAPIC_MMIO_HOLE)
			return -EOPNOTSUPP;
		if (!write)
			memset(data, 0xff, len);
		return 0;
	}
	see_guest(v);
	if (!write) {
		if (read_reg(a, (unsigned)offset, len, data) && (offset & ~0xfull) == APIC_TPR)
			report_tpr(v, v->mmio_rip, false);
	} else if (len == 4 && !(offset & 0xf)) {
		memcpy(&val, data, 4);
		if (offset == APIC_TPR)
			report_tpr(v, v->mmio_rip, true);
		(void)write_reg(a, (unsigned)offset, val);
	}
	return 0;
}

/* ---- x2APIC MSRs ---- */

bool kl_apic_msr_read(struct kl_vcpu *v, uint32_t index, uint64_t *data)
{
	unsigned reg = (index - KL_MSR_X2APIC) << 4;

	return v->apic && kl_apic_x2apic(v->apic) && kl_apic_wide_read(v, reg, data);
}

bool kl_apic_msr_write(struct kl_vcpu *v, uint32_t index, uint64_t data)
{
	unsigned reg = (index - KL_MSR_X2APIC) << 4;

	return v->apic && kl_apic_x2apic(v->apic) && kl_apic_wide_write(v, reg, data);
}

bool kl_apic_wide_read(struct kl_vcpu *v, unsigned reg, uint64_t *data)
{
	struct kl_lapic *a = v->apic;
	uint32_t val;

	see_guest(v);
	if (reg > APIC_SELF_IPI || !read_reg(a, reg, 4, &val))
		return false;
	if (reg == APIC_TPR)
		report_tpr(v, v->rip, false);
	*data = val;
	if (reg == APIC_ICR)
		*data |= (uint64_t)kl_apic_reg(a, APIC_ICR2) << 32;
	return true;
}

bool kl_apic_wide_write(struct kl_vcpu *v, unsigned reg, uint64_t data)
{
	struct kl_lapic *a = v->apic;

	see_guest(v);
	if (reg == APIC_ICR) {
		if (data & X2APIC_ICR_RESERVED)
			return false;
		data &= ~(uint64_t)ICR_BUSY;
		send_ipi(a, (uint32_t)data, (uint32_t)(data >> 32));
		kl_apic_set_reg(a, APIC_ICR, (uint32_t)data);
		kl_apic_set_reg(a, APIC_ICR2, (uint32_t)(data >> 32));
		return true;
	}
	if (data >> 32)
		return false;
	if (reg == APIC_TPR)
		report_tpr(v, v->rip, true);
	return write_reg(a, reg, (uint32_t)data);
}

/* ---- APIC_BASE ---- */

enum { MODE_DISABLED, MODE_INVALID, MODE_XAPIC, MODE_X2APIC };

static unsigned mode_of(uint64_t base)
{
	return base >> 10 & 3;
}

static uint32_t x2apic_ldr(uint32_t id)
{
	return (id >> 4) << 16 | 1u << (id & 15);
}

static void set_base(struct kl_vcpu *v, uint64_t base)
{
	uint64_t changed = v->apic_base ^ base;
	struct kl_lapic *a = v->apic;
	uint32_t id = v->core.id;

	v->apic_base = base;
	if (changed & KL_APIC_BASE_ENABLE)
		kl_x86_refresh_cpuid(v);
	if (!a || !(changed & (KL_APIC_BASE_ENABLE | KL_APIC_BASE_X2APIC)))
		return;
	if (base & changed & KL_APIC_BASE_X2APIC) {
		kl_apic_set_reg(a, APIC_ID, id);
		kl_apic_set_reg(a, APIC_LDR, x2apic_ldr(id));
	} else if (base & KL_APIC_BASE_ENABLE) {
		kl_apic_set_reg(a, APIC_ID, id << 24);
	}
	kl_apic_map_dirty(v->kvm);
}

int kl_set_apic_base(struct kl_vcpu *v, uint64_t base, bool host)
{
	uint64_t reserved = kl_reserved_gpa_bits(v) | 0xfff0000000000000ull | 0x2ff;
	unsigned old = mode_of(v->apic_base), new = mode_of(base);

	if (!v->has_x2apic)
		reserved |= KL_APIC_BASE_X2APIC;
	if ((base & reserved) || new == MODE_INVALID)
		return -EINVAL;
	if (!host && ((old == MODE_X2APIC && new == MODE_XAPIC) ||
		      (old == MODE_DISABLED && new == MODE_X2APIC)))
		return -EINVAL;
	set_base(v, base);
	kl_apic_map_update(v->kvm);
	return 0;
}

/* ---- reset ---- */

void kl_apic_reset(struct kl_vcpu *v, bool init_event)
{
	bool bsp = v->core.id == v->kvm->boot_cpu_id;
	struct kl_lapic *a = v->apic;

	if (!init_event)
		set_base(v, KL_APIC_BASE_ADDR | KL_APIC_BASE_ENABLE | (bsp ? KL_APIC_BASE_BSP : 0));
	if (!a)
		return;
	kl_timer_cancel(&a->timer.t);
	if (!init_event)
		kl_apic_set_reg(a, APIC_ID, v->core.id << 24);
	set_version(a);
	for (unsigned i = 0; i < a->nr_lvt; i++)
		kl_apic_set_reg(a, lvt_offset(i), LVT_MASKED);
	kl_apic_timer_update_mode(a);
	if (bsp && !(v->kvm->disabled_quirks & KL_QUIRK_LINT0_REENABLED))
		kl_apic_set_reg(a, APIC_LVT0, KL_APIC_EXTINT << 8);
	count_nmi_mode(a, kl_apic_reg(a, APIC_LVT0));
	kl_apic_set_reg(a, APIC_DFR, DFR_FLAT);
	set_spiv(a, 0xff);
	kl_apic_set_reg(a, APIC_TPR, 0);
	if (!kl_apic_x2apic(a))
		kl_apic_set_reg(a, APIC_LDR, 0);
	kl_apic_set_reg(a, APIC_ESR, 0);
	kl_apic_set_reg(a, APIC_ICR, 0);
	kl_apic_set_reg(a, APIC_ICR2, 0);
	kl_apic_set_reg(a, APIC_TDCR, 0);
	kl_apic_set_reg(a, APIC_TMICT, 0);
	atomic_store_explicit(&a->timer.period, 0, memory_order_relaxed);
	for (unsigned i = 0; i < 256; i += 32) {
		atomic_store(kl_apic_word(a, APIC_IRR, i), 0);
		atomic_store(kl_apic_word(a, APIC_ISR, i), 0);
		atomic_store(kl_apic_word(a, APIC_TMR, i), 0);
	}
	kl_apic_timer_update_divide(a);
	atomic_store(&a->timer.pending, 0);
	v->eoi_exit = -1;
	update_ppr(a);
	kl_apic_map_dirty(v->kvm);
	kl_apic_map_update(v->kvm);
}

void kl_apic_cpuid_changed(struct kl_vcpu *v)
{
	struct kl_lapic *a = v->apic;

	if (!a)
		return;
	a->timer.mode_mask = v->has_tsc_deadline ? LVT_TIMER_MODE : TIMER_PERIODIC;
	set_version(a);
}

void kl_apic_set_cmci(struct kl_vcpu *v, bool cmci)
{
	struct kl_lapic *a = v->apic;

	if (!a || cmci == (a->nr_lvt > NR_LVT))
		return;
	if (cmci)
		kl_apic_set_reg(a, APIC_LVTCMCI, LVT_MASKED);
	a->nr_lvt = NR_LVT + cmci;
	set_version(a);
}

/* ---- INIT and SIPI ---- */

bool kl_apic_has_init_or_sipi(struct kl_vcpu *v)
{
	return atomic_load(&v->apic->events);
}

bool kl_apic_init_pending(struct kl_vcpu *v)
{
	return v->apic && (atomic_load(&v->apic->events) & APIC_EVENT_INIT);
}

void kl_apic_set_init_pending(struct kl_vcpu *v, bool pending)
{
	if (!v->apic)
		return;
	if (pending)
		atomic_fetch_or(&v->apic->events, APIC_EVENT_INIT);
	else
		atomic_fetch_and(&v->apic->events, ~APIC_EVENT_INIT);
}

void kl_apic_set_sipi_vector(struct kl_vcpu *v, uint8_t vector)
{
	atomic_store(&v->apic->sipi_vector, vector);
}

void kl_apic_set_sipi_pending(struct kl_vcpu *v)
{
	atomic_fetch_or(&v->apic->events, APIC_EVENT_SIPI);
}

void kl_apic_accept_events(struct kl_vcpu *v)
{
	struct kl_lapic *a = v->apic;
	struct kvm_segment *cs = &v->seg[KL_CS];
	uint8_t vector;

	if (!a || KL_LIKELY(!atomic_load(&a->events)))
		return;
	if (atomic_fetch_and(&a->events, ~APIC_EVENT_INIT) & APIC_EVENT_INIT) {
		kl_x86_reset(v, true);
		atomic_store(&v->mp_state, v->apic_base & KL_APIC_BASE_BSP
						   ? KVM_MP_STATE_RUNNABLE
						   : KVM_MP_STATE_INIT_RECEIVED);
		racepoint("apic-init-accepted");
	}
	/* A SIPI for a vCPU that does not wait for one is lost. */
	if (!(atomic_fetch_and(&a->events, ~APIC_EVENT_SIPI) & APIC_EVENT_SIPI) ||
	    atomic_load(&v->mp_state) != KVM_MP_STATE_INIT_RECEIVED)
		return;
	vector = atomic_load(&a->sipi_vector);
	cs->selector = (uint16_t)(vector << 8);
	cs->base = (uint32_t)vector << 12;
	v->rip = 0;
	kl_x86_update_mode(v);
	atomic_store(&v->mp_state, KVM_MP_STATE_RUNNABLE);
}

/* ---- KVM_GET_LAPIC, KVM_SET_LAPIC ---- */

#define STATE_REG(s, offset) ((uint32_t *)(void *)((s)->regs + (offset)))

void kl_apic_get_state(struct kl_vcpu *v, struct kvm_lapic_state *s)
{
	struct kl_lapic *a = v->apic;

	memset(s, 0, sizeof(*s));
	for (unsigned i = 0; i < APIC_NR_REGS; i++)
		*STATE_REG(s, i << 4) = kl_apic_reg(a, i << 4);
	*STATE_REG(s, APIC_TMCCT) = kl_apic_timer_count(a);
	if (kl_apic_x2apic(a) && !v->kvm->x2apic_format)
		*STATE_REG(s, APIC_ID) = kl_apic_x2apic_id(a) << 24;
}

int kl_apic_set_state(struct kl_vcpu *v, const struct kvm_lapic_state *s)
{
	struct kl_lapic *a = v->apic;
	bool x2apic = kl_apic_x2apic(a);
	uint32_t id = kl_apic_x2apic_id(a);

	set_spiv(a, *STATE_REG(s, APIC_SPIV));
	if (x2apic && v->kvm->x2apic_format && *STATE_REG(s, APIC_ID) != id) {
		kl_apic_map_update(v->kvm);
		return -EINVAL;
	}
	for (unsigned i = 0; i < APIC_NR_REGS; i++)
		kl_apic_set_reg(a, i << 4, *STATE_REG(s, i << 4));
	if (x2apic) { /* these are what they are */
		kl_apic_set_reg(a, APIC_ID, id);
		kl_apic_set_reg(a, APIC_LDR, x2apic_ldr(id));
	}
	kl_apic_map_dirty(v->kvm);
	kl_apic_map_update(v->kvm);
	set_version(a);
	v->vapic_lent = false;
	update_ppr(a);
	kl_apic_timer_cancel(a);
	kl_apic_timer_update_mode(a);
	count_nmi_mode(a, kl_apic_reg(a, APIC_LVT0));
	atomic_store_explicit(&a->timer.period, 0, memory_order_relaxed);
	kl_apic_timer_update_divide(a);
	kl_apic_timer_start(a, APIC_TMCCT);
	kl_apic_set_reg(a, APIC_TMCCT, 0);
	atomic_store(&a->irr_pending, true);
	kl_vcpu_request(&v->core, KL_REQ_EVENT);
	if (kl_irqchip_in_kernel(v->kvm))
		kl_ioapic_lapic_restored(v->kvm, v);
	return 0;
}
