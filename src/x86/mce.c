/* SPDX-License-Identifier: MIT */
/* Machine-check banks; mce.h. */
#include "x86/mce.h"

#include <errno.h>

#include "x86/guest_cpuid.h"
#include "x86/lapic.h"
#include "x86/msr.h"

#define STATUS_VAL  (1ull << 63)
#define STATUS_OVER (1ull << 62)
#define STATUS_UC   (1ull << 61)
#define STATUS_PCC  (1ull << 57)
#define STATUS_S    (1ull << 56)
#define STATUS_AR   (1ull << 55)
#define MCG_MCIP    (1ull << 2)
#define CTL2_EN     (1ull << 30)
#define CTL2_COUNT  0x7fffull

enum { CTL, STATUS, ADDR, MISC }; /* registers of a bank */

static unsigned nr_banks(const struct kl_vcpu *v)
{
	return v->mcg_cap & 0xff;
}

uint64_t kl_mce_cap_supported(void)
{
	return KL_MCG_CTL_P | KL_MCG_SER_P | KL_MCG_CMCI_P |
	       (kl_host_is_intel() ? KL_MCG_LMCE_P : 0);
}

void kl_mce_init(struct kl_vcpu *v)
{
	v->mcg_cap = KL_MCE_BANKS;
}

int kl_mce_setup(struct kl_vcpu *v, uint64_t mcg_cap)
{
	unsigned n = mcg_cap & 0xff;

	if (!n || n > KL_MCE_BANKS || (mcg_cap & ~(kl_mce_cap_supported() | 0xff00ff)))
		return -EINVAL;
	v->mcg_cap = mcg_cap;
	if (mcg_cap & KL_MCG_CTL_P)
		v->mcg_ctl = ~0ull;
	for (unsigned i = 0; i < n; i++) {
		v->mce_banks[4 * i + CTL] = ~0ull;
		if (mcg_cap & KL_MCG_CMCI_P)
			v->mci_ctl2[i] = 0;
	}
	kl_apic_set_cmci(v, mcg_cap & KL_MCG_CMCI_P);
	return 0;
}

/* A new exception, while the program holds the vCPU. */
static void queue_mc(struct kl_vcpu *v)
{
	if ((v->exc.pending || v->exc.injected) && v->exc.nr == KL_EXC_DF)
		v->triple_fault_pending = true;
	else /* benign: it takes the place of another, which will happen again */
		v->exc = (struct kl_event_exception){.pending = true, .nr = KL_EXC_MC};
	kl_vcpu_request(&v->core, KL_REQ_EVENT);
}

static void store(uint64_t *bank, const struct kvm_x86_mce *mce, uint64_t status)
{
	bank[STATUS] = status;
	bank[ADDR] = mce->addr;
	bank[MISC] = mce->misc;
}

int kl_mce_inject(struct kl_vcpu *v, const struct kvm_x86_mce *mce)
{
	bool uncorrected = mce->status & STATUS_UC, ucna;
	uint64_t *bank, over;

	if (mce->bank >= nr_banks(v) || !(mce->status & STATUS_VAL))
		return -EINVAL;
	bank = &v->mce_banks[4 * mce->bank];
	ucna = !mce->mcg_status && !(mce->status & (STATUS_PCC | STATUS_S | STATUS_AR));
	if (ucna) {
		store(bank, mce, mce->status);
		v->mcg_status = mce->mcg_status;
		if ((v->mcg_cap & KL_MCG_CMCI_P) && (v->mci_ctl2[mce->bank] & CTL2_EN))
			kl_apic_deliver_cmci(v);
		return 0;
	}
	/* Reporting is off unless both masks are all ones. */
	if (uncorrected &&
	    (((v->mcg_cap & KL_MCG_CTL_P) && v->mcg_ctl != ~0ull) || bank[CTL] != ~0ull))
		return 0;
	over = bank[STATUS] & STATUS_VAL ? STATUS_OVER : 0;
	if (uncorrected) {
		if ((v->mcg_status & MCG_MCIP) || !(v->cr4 & KL_CR4_MCE)) {
			v->triple_fault_pending = true;
			kl_vcpu_request(&v->core, KL_REQ_EVENT);
			return 0;
		}
		store(bank, mce, mce->status | over);
		v->mcg_status = mce->mcg_status;
		queue_mc(v);
	} else if (over && (bank[STATUS] & STATUS_UC)) {
		bank[STATUS] |= STATUS_OVER;
	} else {
		store(bank, mce, mce->status | over);
	}
	return 0;
}

/* ---- MSRs ---- */

bool kl_mce_msr(uint32_t index)
{
	return index == KL_MSR_MCG_STATUS || index == KL_MSR_MCG_CTL ||
	       index - KL_MSR_MC0_CTL < 4 * KL_MCE_BANKS || index - KL_MSR_MC0_CTL2 < KL_MCE_BANKS;
}

bool kl_mce_msr_read(struct kl_vcpu *v, uint32_t index, uint64_t *data, bool host)
{
	unsigned bank = index - KL_MSR_MC0_CTL, ctl2 = index - KL_MSR_MC0_CTL2;

	switch (index) {
	case KL_MSR_MCG_STATUS:
		*data = v->mcg_status;
		return true;
	case KL_MSR_MCG_CTL:
		*data = v->mcg_ctl;
		return host || (v->mcg_cap & KL_MCG_CTL_P);
	default:
		break;
	}
	if (ctl2 < KL_MCE_BANKS) {
		*data = v->mci_ctl2[ctl2];
		return ctl2 < nr_banks(v) && (host || (v->mcg_cap & KL_MCG_CMCI_P));
	}
	*data = v->mce_banks[bank];
	return bank < 4 * nr_banks(v);
}

static bool write_bank(struct kl_vcpu *v, unsigned i, uint64_t data, bool host)
{
	if (i >= 4 * nr_banks(v))
		return false;
	/* Control registers are all or nothing; some guests clear a bit of bank 1's or 4's. */
	if (i % 4 == CTL && data && (data | 1 << 10 | 1) != ~0ull)
		return false;
	/* AMD's processors let HWCR.McStatusWrEn allow it. */
	if (i % 4 == STATUS && data && !host &&
	    (v->intel_compatible || !(v->msr_hwcr & KL_HWCR_MCSTATUS_WR_EN)))
		return false;
	v->mce_banks[i] = data;
	return true;
}

bool kl_mce_msr_write(struct kl_vcpu *v, uint32_t index, uint64_t data, bool host)
{
	unsigned ctl2 = index - KL_MSR_MC0_CTL2;

	switch (index) {
	case KL_MSR_MCG_STATUS:
		v->mcg_status = data;
		return true;
	case KL_MSR_MCG_CTL:
		if (!(v->mcg_cap & KL_MCG_CTL_P) && (data || !host))
			return false;
		if (data && data != ~0ull)
			return false;
		v->mcg_ctl = data;
		return true;
	default:
		break;
	}
	if (ctl2 >= KL_MCE_BANKS)
		return write_bank(v, index - KL_MSR_MC0_CTL, data, host);
	if (ctl2 >= nr_banks(v) || (!(v->mcg_cap & KL_MCG_CMCI_P) && (data || !host)) ||
	    (data & ~(CTL2_EN | CTL2_COUNT)))
		return false;
	v->mci_ctl2[ctl2] = data;
	return true;
}
