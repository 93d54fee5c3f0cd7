/* SPDX-License-Identifier: MIT */
/*
 * Capabilities: what is there, in one table, and KVM_ENABLE_CAP of a VM.
 *
 * A capability is in the table when everything that it stands for works; what is missing is
 * 0, and its ioctls answer as KVM does where it is configured out.
 */
#include <errno.h>
#include <unistd.h>

#include "uapi/object.h"
#include "x86/hypercall.h"
#include "x86/mce.h"
#include "x86/irq_routing.h"

/* Quirks that the engine has, and lets be disabled. */
#define QUIRKS                                                                   \
	(KVM_X86_QUIRK_LINT0_REENABLED | KVM_X86_QUIRK_LAPIC_MMIO_HOLE |         \
	 KVM_X86_QUIRK_SLOT_ZAP_ALL | KVM_X86_QUIRK_OUT_7E_INC_RIP |             \
	 KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT | KVM_X86_QUIRK_FIX_HYPERCALL_INSN | \
	 KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS)

#define GUEST_DEBUG                                                                 \
	(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_USE_SW_BP |   \
	 KVM_GUESTDBG_USE_HW_BP | KVM_GUESTDBG_INJECT_DB | KVM_GUESTDBG_INJECT_BP | \
	 KVM_GUESTDBG_BLOCKIRQ)

#define SYNC_FIELDS (KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS)

#define X2APIC_API_FLAGS (KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK)

/* There is no exit for PAUSE or a C-state, so these two are always so; MWAIT is never idle. */
#define DISABLE_EXITS \
	(KVM_X86_DISABLE_EXITS_PAUSE | KVM_X86_DISABLE_EXITS_HLT | KVM_X86_DISABLE_EXITS_CSTATE)

#define DIRTY_LOG_MANUAL (KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET)

#define DIRTY_RING_MAX (KL_DIRTY_RING_MAX_ENTRIES * sizeof(struct kvm_dirty_gfn))

static const int caps[] = {
	[KVM_CAP_CHECK_EXTENSION_VM] = 1,
	[KVM_CAP_ENABLE_CAP] = 1,
	[KVM_CAP_ENABLE_CAP_VM] = 1,
	[KVM_CAP_VM_TYPES] = 1 << KVM_X86_DEFAULT_VM | 1 << KVM_X86_SW_PROTECTED_VM,
	[KVM_CAP_BINARY_STATS_FD] = 1,
	[KVM_CAP_SYS_ATTRIBUTES] = 1,
	[KVM_CAP_DISABLE_QUIRKS] = 1,
	[KVM_CAP_DISABLE_QUIRKS2] = QUIRKS,

	/* Memory. */
	[KVM_CAP_USER_MEMORY] = 1,
	[KVM_CAP_USER_MEMORY2] = 1,
	[KVM_CAP_DESTROY_MEMORY_REGION_WORKS] = 1,
	[KVM_CAP_JOIN_MEMORY_REGIONS_WORKS] = 1,
	[KVM_CAP_NR_MEMSLOTS] = KL_USER_MEM_SLOTS,
	[KVM_CAP_READONLY_MEM] = 1,
	[KVM_CAP_SYNC_MMU] = 1,
	[KVM_CAP_MULTI_ADDRESS_SPACE] = KL_NR_AS,
	[KVM_CAP_MEMORY_FAULT_INFO] = 1,
	[KVM_CAP_MEMORY_ATTRIBUTES] = KVM_MEMORY_ATTRIBUTE_PRIVATE,
	[KVM_CAP_GUEST_MEMFD] = 1,
	[KVM_CAP_PRE_FAULT_MEMORY] = 1,
	[KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2] = DIRTY_LOG_MANUAL,
	[KVM_CAP_DIRTY_LOG_RING] = DIRTY_RING_MAX,
	[KVM_CAP_DIRTY_LOG_RING_ACQ_REL] = DIRTY_RING_MAX,
	[KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP] = 1,
	[KVM_CAP_MMU_SHADOW_CACHE_CONTROL] = 1,
	[KVM_CAP_SET_TSS_ADDR] = 1,
	[KVM_CAP_SET_IDENTITY_MAP_ADDR] = 1,

	/* Exits and in-engine devices. */
	[KVM_CAP_COALESCED_MMIO] = KL_COALESCED_PAGE,
	[KVM_CAP_COALESCED_PIO] = 1,
	[KVM_CAP_IOEVENTFD] = 1,
	[KVM_CAP_IOEVENTFD_NO_LENGTH] = 1,
	[KVM_CAP_IOEVENTFD_ANY_LENGTH] = 1,
	[KVM_CAP_IMMEDIATE_EXIT] = 1,
	[KVM_CAP_SYNC_REGS] = SYNC_FIELDS,
	[KVM_CAP_INTERNAL_ERROR_DATA] = 1,
	[KVM_CAP_LAST_CPU] = 1,
	[KVM_CAP_EXIT_ON_EMULATION_FAILURE] = 1,
	[KVM_CAP_EXIT_HYPERCALL] = KL_HYPERCALL_EXITS_MASK,

	/* vCPUs. */
	[KVM_CAP_MAX_VCPUS] = KL_MAX_VCPUS,
	[KVM_CAP_MAX_VCPU_ID] = KL_MAX_VCPU_IDS,
	[KVM_CAP_SET_BOOT_CPU_ID] = 1,
	[KVM_CAP_HLT] = 1,
	[KVM_CAP_X2APIC_API] = X2APIC_API_FLAGS,
	[KVM_CAP_TSC_DEADLINE_TIMER] = 1,
	[KVM_CAP_X86_APIC_BUS_CYCLES_NS] = 1,
	[KVM_CAP_X86_DISABLE_EXITS] = DISABLE_EXITS,
	[KVM_CAP_MP_STATE] = 1,
	[KVM_CAP_USER_NMI] = 1,
	[KVM_CAP_VCPU_EVENTS] = 1,
	[KVM_CAP_EXCEPTION_PAYLOAD] = 1,
	[KVM_CAP_X86_TRIPLE_FAULT_EVENT] = 1,
	[KVM_CAP_MCE] = KL_MCE_BANKS,
	[KVM_CAP_DEBUGREGS] = 1,
	[KVM_CAP_SET_GUEST_DEBUG] = 1,
	[KVM_CAP_SET_GUEST_DEBUG2] = GUEST_DEBUG,
	[KVM_CAP_X86_ROBUST_SINGLESTEP] = 1,
	[KVM_CAP_XSAVE] = 1,
	[KVM_CAP_XSAVE2] = KL_XSAVE_SIZE,
	[KVM_CAP_XCRS] = 1,
	[KVM_CAP_SREGS2] = 1,
	[KVM_CAP_GET_TSC_KHZ] = 1,
	[KVM_CAP_TSC_CONTROL] = 1,
	[KVM_CAP_VM_TSC_CONTROL] = 1,
	[KVM_CAP_VCPU_ATTRIBUTES] = 1,

	/* Interrupt controllers. */
	[KVM_CAP_IRQCHIP] = 1,
	[KVM_CAP_VAPIC] = 1, /* as where the processor has no TPR of its own for guests */
	[KVM_CAP_SPLIT_IRQCHIP] = 1,
	[KVM_CAP_IRQ_INJECT_STATUS] = 1,
	[KVM_CAP_IRQ_ROUTING] = KL_MAX_IRQ_ROUTES,
	[KVM_CAP_SIGNAL_MSI] = 1,
	[KVM_CAP_IRQFD] = 1,
	[KVM_CAP_IRQFD_RESAMPLE] = 1,
	[KVM_CAP_PIT] = 1,
	[KVM_CAP_PIT2] = 1,
	[KVM_CAP_PIT_STATE2] = 1,
	[KVM_CAP_REINJECT_CONTROL] = 1,
	[KVM_CAP_DEVICE_CTRL] = 1, /* of which there are no types */

	/* Paravirtual. */
	[KVM_CAP_ADJUST_CLOCK] = KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC,
	[KVM_CAP_KVMCLOCK_CTRL] = 1,
	[KVM_CAP_ENFORCE_PV_FEATURE_CPUID] = 1,
	[KVM_CAP_CLOCKSOURCE] = 1,
	[KVM_CAP_ASYNC_PF] = 1,
	[KVM_CAP_ASYNC_PF_INT] = 1,
	[KVM_CAP_HYPERV] = 1,
	[KVM_CAP_HYPERV_VAPIC] = 1,
	[KVM_CAP_HYPERV_SPIN] = 1,
	[KVM_CAP_HYPERV_TIME] = 1,
	[KVM_CAP_HYPERV_VP_INDEX] = 1,
	[KVM_CAP_HYPERV_EVENTFD] = 1,
	[KVM_CAP_HYPERV_TLBFLUSH] = 1,
	[KVM_CAP_HYPERV_SEND_IPI] = 1,
	[KVM_CAP_HYPERV_CPUID] = 1,
	[KVM_CAP_HYPERV_ENFORCE_CPUID] = 1,
	[KVM_CAP_SYS_HYPERV_CPUID] = 1,

	/* CPUID and MSRs. */
	[KVM_CAP_EXT_CPUID] = 1,
	[KVM_CAP_EXT_EMUL_CPUID] = 1,
	[KVM_CAP_GET_MSR_FEATURES] = 1,
	[KVM_CAP_MSR_PLATFORM_INFO] = 1,
	[KVM_CAP_X86_USER_SPACE_MSR] = 1,
	[KVM_CAP_X86_MSR_FILTER] = 1,
};

static int nr_online_cpus(void)
{
	static _Atomic int cached;
	int n = atomic_load_explicit(&cached, memory_order_relaxed);

	if (!n) {
		long online = sysconf(_SC_NPROCESSORS_ONLN);

		n = online < 1 ? 1 : (int)kl_min(online, (long)KL_MAX_VCPUS);
		atomic_store_explicit(&cached, n, memory_order_relaxed);
	}
	return n;
}

/* What a VM answers otherwise than /dev/kvm. */
static int vm_extension(const struct kl_vm *mem, long cap)
{
	switch (cap) {
	case KVM_CAP_MULTI_ADDRESS_SPACE:
		return (int)kl_nr_as(mem);
	case KVM_CAP_MEMORY_ATTRIBUTES:
		return mem->private_mem ? caps[cap] : 0;
	case KVM_CAP_GUEST_MEMFD:
		return mem->gmem_slots;
	default:
		return caps[cap];
	}
}

int kl_check_extension(struct kl_uvm *vm, long cap)
{
	if (cap == KVM_CAP_NR_VCPUS)
		return nr_online_cpus();
	if (cap == KVM_CAP_GUEST_MEMFD_FLAGS)
		return kl_gmem_flags(vm);
	if (cap == KVM_CAP_XEN_HVM)
		return kl_xen_capability();
	if (cap < 0 || cap >= (long)KL_ARRAY_SIZE(caps))
		return 0;
	return vm ? vm_extension(&vm->kvm.mem, cap) : caps[cap];
}

/* ---- KVM_ENABLE_CAP ---------------------------------------------------------------- */

static int disable_quirks(struct kl_x86_vm *kvm, uint64_t quirks)
{
	kl_mutex_lock(&kvm->lock);
	kvm->disabled_quirks |= quirks;
	if (kvm->disabled_quirks & KVM_X86_QUIRK_SLOT_ZAP_ALL)
		atomic_store(&kvm->mem.slot_zap_all_quirk, false);
	kl_mutex_unlock(&kvm->lock);
	return 0;
}

/* Can be set once, and not below the boot CPU's id. */
static int set_max_vcpu_id(struct kl_x86_vm *kvm, uint64_t max)
{
	int r = -EINVAL;

	if (max > KL_MAX_VCPU_IDS)
		return r;
	kl_mutex_lock(&kvm->lock);
	if (kvm->boot_cpu_id <= max && (!kvm->max_vcpu_ids || kvm->max_vcpu_ids == max)) {
		kvm->max_vcpu_ids = (uint32_t)max;
		r = 0;
	}
	kl_mutex_unlock(&kvm->lock);
	return r;
}

static int set_x2apic_api(struct kl_x86_vm *kvm, uint64_t flags)
{
	if (flags & ~(uint64_t)X2APIC_API_FLAGS)
		return -EINVAL;
	if (flags & KVM_X2APIC_API_USE_32BIT_IDS)
		atomic_store(&kvm->x2apic_format, true);
	if (flags & KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK)
		atomic_store(&kvm->x2apic_no_broadcast_quirk, true);
	return 0;
}

/* ns per cycle; the longest count at the largest divider must not overflow. */
static int set_apic_bus_cycle(struct kl_uvm *vm, uint64_t ns)
{
	struct kl_x86_vm *kvm = &vm->kvm;
	int r = 0;

	if (!ns || ns > UINT64_MAX / ((uint64_t)UINT32_MAX * 128))
		return -EINVAL;
	kl_mutex_lock(&kvm->lock);
	if (!kvm->irqchip)
		r = -ENXIO;
	else if (vm->nr_vcpus)
		r = -EINVAL;
	else
		kvm->apic_bus_cycle_ns = ns;
	kl_mutex_unlock(&kvm->lock);
	return r;
}

static int set_manual_dirty_log(struct kl_x86_vm *kvm, uint64_t flags)
{
	uint64_t allowed = flags & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
				   ? DIRTY_LOG_MANUAL
				   : KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;

	if (flags & ~allowed)
		return -EINVAL;
	kl_dirty_log_set_manual(&kvm->mem, flags);
	return 0;
}

static int set_dirty_ring(struct kl_uvm *vm, uint64_t bytes)
{
	int r;

	kl_mutex_lock(&vm->kvm.lock);
	r = kl_dirty_rings_enable(&vm->kvm.mem, bytes, vm->nr_vcpus);
	kl_mutex_unlock(&vm->kvm.lock);
	return r;
}

int kl_vm_enable_cap(struct kl_uvm *vm, const struct kvm_enable_cap *cap)
{
	struct kl_x86_vm *kvm = &vm->kvm;
	uint64_t arg = cap->args[0];

	/* The two that never had any flags checked, and so take whatever there is. */
	if (cap->flags && cap->cap != KVM_CAP_DIRTY_LOG_RING &&
	    cap->cap != KVM_CAP_DIRTY_LOG_RING_ACQ_REL)
		return -EINVAL;
	switch (cap->cap) {
	case KVM_CAP_DISABLE_QUIRKS2:
		return arg & ~(uint64_t)QUIRKS ? -EINVAL : disable_quirks(kvm, arg);
	case KVM_CAP_DISABLE_QUIRKS:
		return disable_quirks(kvm, arg & QUIRKS);
	case KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2:
		return set_manual_dirty_log(kvm, arg);
	case KVM_CAP_DIRTY_LOG_RING:
	case KVM_CAP_DIRTY_LOG_RING_ACQ_REL:
		return set_dirty_ring(vm, (uint32_t)arg); /* KVM looks at no more */
	case KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP:
		return kl_dirty_rings_with_bitmap(&kvm->mem);
	case KVM_CAP_SPLIT_IRQCHIP:
		return kl_vm_split_irqchip(vm, arg);
	case KVM_CAP_X2APIC_API:
		return set_x2apic_api(kvm, arg);
	case KVM_CAP_X86_APIC_BUS_CYCLES_NS:
		return set_apic_bus_cycle(vm, arg);
	case KVM_CAP_X86_DISABLE_EXITS:
		if (arg & ~(uint64_t)KVM_X86_DISABLE_VALID_EXITS)
			return -EINVAL;
		atomic_fetch_or(&kvm->disabled_exits, arg & DISABLE_EXITS);
		return 0;
	case KVM_CAP_MAX_VCPU_ID:
		return set_max_vcpu_id(kvm, arg);
	case KVM_CAP_MSR_PLATFORM_INFO:
		kvm->hide_platform_info = !arg;
		return 0;
	case KVM_CAP_X86_USER_SPACE_MSR:
		if (arg & ~(uint64_t)KVM_MSR_EXIT_REASON_VALID_MASK)
			return -EINVAL;
		kvm->user_space_msr_mask = (uint32_t)arg;
		return 0;
	case KVM_CAP_EXCEPTION_PAYLOAD:
		kvm->exception_payload = arg;
		return 0;
	case KVM_CAP_X86_TRIPLE_FAULT_EVENT:
		kvm->triple_fault_event = arg;
		return 0;
	case KVM_CAP_EXIT_HYPERCALL:
		if (arg & ~(uint64_t)KL_HYPERCALL_EXITS_MASK)
			return -EINVAL;
		kvm->hypercall_exit_enabled = (uint32_t)arg;
		return 0;
	case KVM_CAP_EXIT_ON_EMULATION_FAILURE:
		if (arg > 1)
			return -EINVAL;
		kvm->exit_on_emulation_error = arg;
		return 0;
	default:
		return -EINVAL;
	}
}
