/* SPDX-License-Identifier: MIT */
/*
 * Model-specific registers: what they are and take; KVM_GET_MSRS and KVM_SET_MSRS. The lists are in
 * msr_list.c, MTRRs in mtrr.c, the program's filter in msr_filter.c, RDMSR and WRMSR in ops_msr.c.
 *
 * One get and one set function serve guest and program; "host" says which. An MSR that is
 * not here does not exist: #GP for the guest, an error for the program, as KVM without
 * ignore_msrs.
 */
#include "x86/msr.h"

#include <errno.h>

#include "x86/access.h"
#include "x86/control.h"
#include "x86/guest_cpuid.h"
#include "x86/lapic.h"
#include "x86/mce.h"
#include "x86/paging.h"
#include "x86/paravirt.h"
#include "x86/tsc.h"

#define MISC_ENABLE_EMON          (1ull << 7)
#define MISC_ENABLE_MWAIT         (1ull << 18)
#define MISC_ENABLE_PMU_RO        (MISC_ENABLE_EMON | KL_MISC_ENABLE_DEFAULT)
#define MISC_FEATURES_CPUID_FAULT 1ull
#define PLATFORM_INFO_CPUID_FAULT (1ull << 31)
#define FEATURE_CONTROL_LOCKED    (1ull << 0)
#define FEATURE_CONTROL_LMCE      (1ull << 20)

#define OK      KL_MSR_OK
#define REFUSED KL_MSR_REFUSED
#define UNKNOWN KL_MSR_UNKNOWN
_Static_assert((int)OK == KL_PV_OK && (int)REFUSED == KL_PV_REFUSED &&
		       (int)UNKNOWN == KL_PV_UNKNOWN,
	       "the results of pv/");

void kl_msr_reset(struct kl_vcpu *v, bool init_event)
{
	if (init_event)
		return;
	v->msr_pat = KL_PAT_DEFAULT;
	v->msr_misc_enable = KL_MISC_ENABLE_DEFAULT;
	v->msr_misc_features = 0;
	v->msr_platform_info = PLATFORM_INFO_CPUID_FAULT;
	if (kl_x86_get_feature_msr(KL_MSR_UCODE_REV, &v->msr_ucode_rev) ||
	    kl_x86_get_feature_msr(KL_MSR_DE_CFG, &v->msr_de_cfg) ||
	    kl_x86_get_feature_msr(KL_MSR_ARCH_CAPABILITIES, &v->msr_arch_capabilities))
		return;
	v->msr_xss = 0;
}

/* ---- get ---- */

/* SVM and its relatives are not in CPUID, but KVM has the registers. */
static enum kl_msr_result get_amd_msr(struct kl_vcpu *v, uint32_t index, uint64_t *data, bool host)
{
	if (kl_host_is_intel())
		return UNKNOWN;
	if (index == KL_MSR_VM_CR) {
		*data = v->msr_vm_cr;
		return OK;
	}
	*data = index == KL_MSR_TSC_RATIO ? KL_TSC_ONE : v->msr_virt_spec_ctrl;
	return host ? OK : REFUSED;
}

static enum kl_msr_result get_apic_msr(struct kl_vcpu *v, uint32_t index, uint64_t *data, bool host)
{
	bool outside = !host && (v->pv_eoi_pending | v->vapic_lent), ok;

	if (outside)
		kl_guest_pause(v);
	ok = kl_apic_msr_read(v, index, data);
	if (outside)
		kl_guest_resume(v);
	return ok ? OK : REFUSED;
}

enum kl_msr_result kl_msr_get(struct kl_vcpu *v, uint32_t index, uint64_t *data, bool host)
{
	int slot = kl_mtrr_slot(index);

	if (slot >= 0) {
		*data = v->msr_mtrr[slot];
		return OK;
	}
	if (kl_mce_msr(index))
		return kl_mce_msr_read(v, index, data, host) ? OK : REFUSED;
	*data = 0;
	switch (index) {
	case KL_MSR_TSC:
		*data = kl_x86_tsc(v);
		break;
	case KL_MSR_APIC_BASE:
		*data = v->apic_base;
		break;
	case KL_MSR_TSC_ADJUST:
		*data = v->msr_tsc_adjust;
		break;
	case KL_MSR_UCODE_REV:
		*data = v->msr_ucode_rev;
		break;
	case KL_MSR_FSB_FREQ:
		*data = 3;
		break;
	case KL_MSR_PLATFORM_INFO:
		if (!host && v->kvm->hide_platform_info)
			return REFUSED;
		*data = v->msr_platform_info;
		break;
	case KL_MSR_MTRRCAP:
		*data = 0x500 | KL_NR_VAR_MTRR;
		break;
	case KL_MSR_ARCH_CAPABILITIES:
		if (!host)
			return REFUSED; /* not in CPUID */
		*data = v->msr_arch_capabilities;
		break;
	case KL_MSR_MISC_FEATURES:
		*data = v->msr_misc_features;
		break;
	case KL_MSR_SYSENTER_CS:
		*data = v->msr_sysenter_cs;
		break;
	case KL_MSR_SYSENTER_ESP:
		*data = v->msr_sysenter_esp;
		break;
	case KL_MSR_SYSENTER_EIP:
		*data = v->msr_sysenter_eip;
		break;
	case KL_MSR_MCG_CAP:
		*data = v->mcg_cap;
		break;
	case KL_MSR_MCG_EXT_CTL:
		if (!kl_host_is_intel())
			return UNKNOWN;
		if (!host && !(v->msr_feature_control & FEATURE_CONTROL_LMCE))
			return REFUSED;
		*data = v->mcg_ext_ctl;
		break;
	case KL_MSR_FEATURE_CONTROL:
		if (!kl_host_is_intel())
			return UNKNOWN;
		*data = v->msr_feature_control;
		break;
	case KL_MSR_PERF_STATUS:
		*data = 1000 | 4ull << 40;
		break;
	case KL_MSR_MISC_ENABLE:
		*data = v->msr_misc_enable;
		break;
	case KL_MSR_DEBUGCTL:
		*data = v->msr_debugctl;
		break;
	case KL_MSR_POWER_CTL:
		*data = v->msr_power_ctl;
		break;
	case KL_MSR_PAT:
		*data = v->msr_pat;
		break;
	case KL_MSR_XSS:
		if (!host && !kl_guest_has(v, 0xd, 1, 0, 3)) /* XSAVES */
			return REFUSED;
		*data = v->msr_xss;
		break;
	case KL_MSR_EFER:
		*data = v->efer;
		break;
	case KL_MSR_STAR:
		*data = v->msr_star;
		break;
	case KL_MSR_LSTAR:
		*data = v->msr_lstar;
		break;
	case KL_MSR_CSTAR:
		*data = v->msr_cstar;
		break;
	case KL_MSR_FMASK:
		*data = v->msr_fmask;
		break;
	case KL_MSR_FS_BASE:
		*data = v->seg[KL_FS].base;
		break;
	case KL_MSR_GS_BASE:
		*data = v->seg[KL_GS].base;
		break;
	case KL_MSR_KERNEL_GS_BASE:
		*data = v->msr_kernel_gs_base;
		break;
	case KL_MSR_TSC_AUX:
		if (!host && !v->has_rdtscp && !v->has_rdpid)
			return REFUSED;
		*data = v->msr_tsc_aux;
		break;
	case KL_MSR_HWCR:
		*data = v->msr_hwcr;
		break;
	case KL_MSR_DE_CFG:
		*data = v->msr_de_cfg;
		break;
	case KL_MSR_SMI_COUNT:
		*data = v->msr_smi_count;
		break;
	case KL_MSR_PERF_CAPABILITIES: /* no PMU */
		return host ? OK : REFUSED;
	case KL_MSR_VM_HSAVE_PA:
		*data = v->msr_hsave_pa;
		break;
	case KL_MSR_VM_CR:
	case KL_MSR_VIRT_SPEC_CTRL:
	case KL_MSR_TSC_RATIO:
		return get_amd_msr(v, index, data, host);
	/* Registers of processors and chipsets that read as zero in KVM. */
	case 0: /* P5_MC_ADDR, P5_MC_TYPE */
	case 1:
	case KL_MSR_PLATFORM_ID:
	case KL_MSR_EBL_CR_POWERON:
	case KL_MSR_PERF_CTL:
	case 0x1db ... 0x1de: /* last branch and exception */
	case 0x606:           /* RAPL: units and energy counters */
	case 0x611:
	case 0x619:
	case 0x639:
	case 0x641:
	case KL_MSR_P6_PERFCTR0:
	case KL_MSR_P6_PERFCTR1:
	case KL_MSR_P6_EVNTSEL0:
	case KL_MSR_P6_EVNTSEL1:
	case KL_MSR_K7_EVNTSEL0 ... KL_MSR_K7_PERFCTR3:
	case 0xc0010010: /* SYSCFG */
	case 0xc001001f: /* NB_CFG */
	case 0xc0010055: /* INT_PENDING_MSG */
	case 0xc0010058: /* MMIO_CONF_BASE */
	case 0xc0010112: /* TSEG_ADDR */
	case 0xc0010113: /* TSEG_MASK */
	case 0xc0011022: /* DC_CFG */
	case 0xc0011023: /* TW_CFG */
	case 0xc001102a: /* BU_CFG2 */
	case 0xc001102c: /* EX_CFG */
		break;
	/* Those that have one value. */
	case KL_MSR_EBC_FREQUENCY_ID:
		*data = 1 << 24; /* the bus: 133 MHz */
		break;
	case KL_MSR_BBL_CR_CTL3:
		*data = 0xbe702111;
		break;
	case KL_MSR_K7_CLK_CTL:
		*data = 0x20000000;
		break;
	case KL_MSR_X2APIC ... KL_MSR_X2APIC + 0xff:
		return get_apic_msr(v, index, data, host);
	case KL_MSR_TSC_DEADLINE:
		*data = kl_apic_tsc_deadline(v);
		break;
	default:
		return (enum kl_msr_result)kl_pv_get_msr(v, index, data, host);
	}
	return OK;
}

/* ---- set ---- */

static enum kl_msr_result set_efer(struct kl_vcpu *v, uint64_t efer, bool host)
{
	uint64_t old = v->efer;

	if (efer & ~(uint64_t)KL_EFER_KNOWN)
		return REFUSED;
	if (!host) {
		if (!kl_efer_valid(v, efer))
			return REFUSED;
		if ((v->cr0 & KL_CR0_PG) && ((old ^ efer) & KL_EFER_LME))
			return REFUSED;
	}
	v->efer = (efer & ~(uint64_t)KL_EFER_LMA) | (old & KL_EFER_LMA);
	if ((old ^ v->efer) & KL_EFER_NX)
		kl_tlb_flush(v);
	kl_x86_update_mode(v);
	return OK;
}

static enum kl_msr_result set_misc_enable(struct kl_vcpu *v, uint64_t data, bool host)
{
	uint64_t old = v->msr_misc_enable;

	if (!host) {
		if ((old ^ data) & MISC_ENABLE_PMU_RO & ~MISC_ENABLE_EMON)
			return REFUSED;
		data = (data & ~MISC_ENABLE_EMON) | (old & MISC_ENABLE_EMON);
	}
	v->msr_misc_enable = data;
	if ((v->kvm->disabled_quirks & KL_QUIRK_MISC_ENABLE_NO_MWAIT) &&
	    ((old ^ data) & MISC_ENABLE_MWAIT))
		kl_x86_refresh_cpuid(v);
	return OK;
}

/* Intel's: locked it stays, and nothing but LMCE can be switched on. */
static enum kl_msr_result set_feature_control(struct kl_vcpu *v, uint64_t data, bool host)
{
	uint64_t valid = FEATURE_CONTROL_LOCKED;

	if (!kl_host_is_intel())
		return UNKNOWN;
	if (!host && (v->msr_feature_control & FEATURE_CONTROL_LOCKED))
		return REFUSED;
	if (host || (v->mcg_cap & KL_MCG_LMCE_P))
		valid |= FEATURE_CONTROL_LMCE;
	if (data & ~valid)
		return REFUSED;
	v->msr_feature_control = data;
	return OK;
}

#define VM_CR_VALID 0x1full
#define VM_CR_LOCKS 0x18ull /* SVM disabled, and for good */

static enum kl_msr_result set_amd_msr(struct kl_vcpu *v, uint32_t index, uint64_t data, bool host)
{
	uint64_t change = VM_CR_VALID;

	if (kl_host_is_intel())
		return index == KL_MSR_VM_HSAVE_PA ? OK : UNKNOWN;
	switch (index) {
	case KL_MSR_VM_HSAVE_PA:
		if (!host &&
		    ((data & ~KL_PAGE_MASK) || (data & kl_reserved_gpa_bits(v)) || data >> 52))
			return REFUSED;
		v->msr_hsave_pa = data & KL_PAGE_MASK;
		return OK;
	case KL_MSR_VM_CR:
		if (data & ~VM_CR_VALID)
			return REFUSED;
		if (v->msr_vm_cr & 0x10)
			change &= ~VM_CR_LOCKS;
		v->msr_vm_cr = (v->msr_vm_cr & ~change) | (data & change);
		return OK;
	case KL_MSR_TSC_RATIO:
		return host && (!data || data == KL_TSC_ONE) ? OK : REFUSED;
	default: /* VIRT_SPEC_CTRL: SSBD */
		if (!host || (data & ~4ull))
			return REFUSED;
		v->msr_virt_spec_ctrl = data;
		return OK;
	}
}

static enum kl_msr_result set_address(struct kl_vcpu *v, uint64_t *msr, uint64_t data)
{
	/* 57 bits are legal where the CPU could have them; the guest's mode does not matter. */
	unsigned bits = kl_cr4_supported() & KL_CR4_LA57 ? 57 : 48;

	(void)v;
	if ((uint64_t)((int64_t)(data << (64 - bits)) >> (64 - bits)) != data)
		return REFUSED;
	*msr = data;
	return OK;
}

static enum kl_msr_result set_apic_msr(struct kl_vcpu *v, uint32_t index, uint64_t data, bool host)
{
	bool ok = true;

	if (!host)
		kl_guest_pause(v);
	if (index == KL_MSR_APIC_BASE)
		ok = !kl_set_apic_base(v, data, host);
	else if (index == KL_MSR_TSC_DEADLINE)
		kl_apic_set_tsc_deadline(v, data);
	else
		ok = kl_apic_msr_write(v, index, data);
	if (!host)
		kl_guest_resume(v);
	return ok ? OK : REFUSED;
}

enum kl_msr_result kl_msr_set(struct kl_vcpu *v, uint32_t index, uint64_t data, bool host)
{
	int slot = kl_mtrr_slot(index);

	/* Wherever the program has put it. */
	if (KL_UNLIKELY(index &&
			index == atomic_load_explicit(&v->kvm->xen_msr, memory_order_relaxed)))
		return (enum kl_msr_result)kl_pv_xen_set_msr(v, data, host);
	if (slot >= 0) {
		if (!kl_mtrr_valid(v, slot, data))
			return REFUSED;
		v->msr_mtrr[slot] = data;
		return OK;
	}
	if (kl_mce_msr(index))
		return kl_mce_msr_write(v, index, data, host) ? OK : REFUSED;

	switch (index) {
	case KL_MSR_TSC:
		if (host) {
			kl_tsc_synchronize(v, &data);
		} else {
			kl_tsc_guest_write(v, data);
		}
		break;
	case KL_MSR_APIC_BASE:
	case KL_MSR_TSC_DEADLINE:
	case KL_MSR_X2APIC ... KL_MSR_X2APIC + 0xff:
		return set_apic_msr(v, index, data, host);
	case KL_MSR_TSC_ADJUST:
		if (v->has_tsc_adjust) {
			if (!host)
				v->tsc_offset += data - v->msr_tsc_adjust;
			v->msr_tsc_adjust = data;
		}
		break;
	case KL_MSR_UCODE_REV:
		if (host)
			v->msr_ucode_rev = data;
		break;
	case KL_MSR_PLATFORM_INFO:
		if (!host || (!(data & PLATFORM_INFO_CPUID_FAULT) &&
			      (v->msr_misc_features & MISC_FEATURES_CPUID_FAULT)))
			return REFUSED;
		v->msr_platform_info = data;
		break;
	case KL_MSR_ARCH_CAPABILITIES:
		if (!host)
			return REFUSED;
		v->msr_arch_capabilities = data;
		break;
	case KL_MSR_MISC_FEATURES:
		if ((data & ~MISC_FEATURES_CPUID_FAULT) ||
		    (data && !(v->msr_platform_info & PLATFORM_INFO_CPUID_FAULT)))
			return REFUSED;
		v->msr_misc_features = data;
		break;
	case KL_MSR_SYSENTER_CS:
		v->msr_sysenter_cs = data;
		break;
	case KL_MSR_SYSENTER_ESP:
		v->msr_sysenter_esp = v->intel_compatible ? data : (uint32_t)data;
		break;
	case KL_MSR_SYSENTER_EIP:
		v->msr_sysenter_eip = v->intel_compatible ? data : (uint32_t)data;
		break;
	case KL_MSR_MCG_EXT_CTL:
		if (!kl_host_is_intel())
			return UNKNOWN;
		if ((!host && !(v->msr_feature_control & FEATURE_CONTROL_LMCE)) || (data & ~1ull))
			return REFUSED;
		v->mcg_ext_ctl = data;
		break;
	case KL_MSR_FEATURE_CONTROL:
		return set_feature_control(v, data, host);
	case KL_MSR_MISC_ENABLE:
		return set_misc_enable(v, data, host);
	case KL_MSR_DEBUGCTL:
		/* No branch recording, no branch stepping: their bits do not stick. */
		if (data & ~0x3full)
			return REFUSED;
		break;
	case KL_MSR_POWER_CTL:
		v->msr_power_ctl = data;
		break;
	case KL_MSR_PAT:
		if (!kl_pat_valid(data))
			return REFUSED;
		v->msr_pat = data;
		break;
	case KL_MSR_XSS:
		if (!host && !kl_guest_has(v, 0xd, 1, 0, 3))
			return REFUSED;
		if (data) /* there are no supervisor components */
			return REFUSED;
		break;
	case KL_MSR_EFER:
		return set_efer(v, data, host);
	case KL_MSR_STAR:
		v->msr_star = data;
		break;
	case KL_MSR_LSTAR:
		return set_address(v, &v->msr_lstar, data);
	case KL_MSR_CSTAR:
		return set_address(v, &v->msr_cstar, data);
	case KL_MSR_FMASK:
		v->msr_fmask = data;
		break;
	case KL_MSR_FS_BASE:
		return set_address(v, (uint64_t *)&v->seg[KL_FS].base, data);
	case KL_MSR_GS_BASE:
		return set_address(v, (uint64_t *)&v->seg[KL_GS].base, data);
	case KL_MSR_KERNEL_GS_BASE:
		return set_address(v, &v->msr_kernel_gs_base, data);
	case KL_MSR_TSC_AUX:
		if (!host && !v->has_rdtscp && !v->has_rdpid)
			return REFUSED;
		if (v->intel_compatible && (data >> 32))
			return REFUSED;
		v->msr_tsc_aux = (uint32_t)data;
		break;
	case KL_MSR_HWCR:
		data &= ~0x148ull; /* flush filter, IGNNE, TLB cache: taken and ignored */
		if (data & ~(KL_HWCR_MCSTATUS_WR_EN | 1ull << 24))
			return REFUSED;
		v->msr_hwcr = data;
		break;
	case KL_MSR_DE_CFG:
		if (data & ~2ull)
			return REFUSED;
		v->msr_de_cfg = data;
		break;
	case KL_MSR_SMI_COUNT:
		if (!host)
			return REFUSED;
		v->msr_smi_count = data;
		break;
	case KL_MSR_PERF_CAPABILITIES:
		return host && !data ? OK : REFUSED;
	case KL_MSR_VM_HSAVE_PA:
	case KL_MSR_VM_CR:
	case KL_MSR_VIRT_SPEC_CTRL:
	case KL_MSR_TSC_RATIO:
		return set_amd_msr(v, index, data, host);
	/* Writes that KVM takes and forgets. */
	case KL_MSR_UCODE_WRITE:
	case KL_MSR_P6_PERFCTR0:
	case KL_MSR_P6_PERFCTR1:
	case KL_MSR_BBL_CR_CTL3:
	case KL_MSR_P6_EVNTSEL0:
	case KL_MSR_P6_EVNTSEL1:
	case KL_MSR_K7_EVNTSEL0 ... KL_MSR_K7_PERFCTR3:
	case KL_MSR_K7_CLK_CTL:
	case 0xc001001f: /* NB_CFG */
	case 0xc0010020: /* PATCH_LOADER */
	case 0xc0011022: /* DC_CFG */
	case 0xc0011023: /* TW_CFG */
	case 0xc001102a: /* BU_CFG2 */
	case 0xc001102c: /* EX_CFG */
		break;
	case 0xc0010058: /* MMIO_CONF_BASE */
		return data ? REFUSED : OK;
	default:
		return (enum kl_msr_result)kl_pv_set_msr(v, index, data, host);
	}
	return OK;
}

int kl_x86_get_msr(struct kl_vcpu *v, uint32_t index, uint64_t *data)
{
	enum kl_msr_result r = kl_msr_get(v, index, data, true);

	return r == OK || (r == UNKNOWN && kl_msr_advertised(index)) ? 0 : -EINVAL;
}

int kl_x86_set_msr(struct kl_vcpu *v, uint32_t index, uint64_t data)
{
	enum kl_msr_result r;
	uint64_t old;

	/* What the processor can do must not change once it has run. */
	if (v->runnable_once && (index == KL_MSR_DE_CFG || index == KL_MSR_ARCH_CAPABILITIES))
		return kl_msr_get(v, index, &old, true) == OK && old == data ? 0 : -EINVAL;
	r = kl_msr_set(v, index, data, true);
	return r == OK || (r == UNKNOWN && !data && kl_msr_advertised(index)) ? 0 : -EINVAL;
}
