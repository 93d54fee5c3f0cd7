/* SPDX-License-Identifier: MIT */
/* Hyper-V: life, CPUID, MSRs, the hypercall page, and the eventfds that guests signal. */
#include "pv/hyperv.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/failpoint.h"
#include "host/cpu.h"
#include "host/eventfd.h"
#include "host/sys.h"
#include "pv/pv.h"
#include "x86/access.h"
#include "x86/guest_cpuid.h"
#include "x86/lapic.h"

#define ENABLED           1ull
#define CRASH_NOTIFY      (1ull << 63)
#define EXPOSE_INVARIANT  1ull
#define NS_PER_UNIT       100u
#define NS_PER_S          1000000000ull
#define CPUID_INTERFACE   0x40000001u
#define CPUID_FEATURES    0x40000003u
#define CPUID_HINTS       0x40000004u
#define CPUID_LIMITS      0x40000005u
#define CPUID_NESTED      0x4000000au
#define CPUID_DEBUG       0x40000080u
#define CPUID_DEBUG_LAST  0x40000082u
#define INTERFACE         0x31237648u /* "Hv#1" */
#define DEBUG_INTERFACE   0x31235356u /* "VS#1" */
#define SIGNATURE         "Linux KVM Hv"
#define SPINS_BEFORE_CALL 0xfffu

/* How a hypervisor in the guest may nest; without SVM or VMX in CPUID there is none. */
#define NESTED_EAX (1u << 17 | 1u << 19) /* direct flush, MSR bitmap */
#define NESTED_EBX (1u << 0)             /* PERF_GLOBAL_CTRL in eVMCS */

static struct kl_hv_vm *hv_of(struct kl_x86_vm *vm)
{
	return &vm->pv->hv;
}

void kl_hv_vm_init(struct kl_x86_vm *vm)
{
	kl_mutex_init(&hv_of(vm)->lock, KL_RANK_LEAF);
}

void kl_hv_vm_destroy(struct kl_x86_vm *vm)
{
	struct kl_hv_vm *hv = hv_of(vm);

	while (hv->events) {
		struct kl_hv_event *e = hv->events;

		hv->events = e->next;
		kl_sys_close(e->fd);
		free(e);
	}
	kl_mutex_destroy(&hv->lock);
}

void kl_hv_vcpu_init(struct kl_vcpu *v)
{
	atomic_init(&v->pv->hv.vp_index, UINT32_MAX); /* it has no place yet */
}

uint32_t kl_hv_vp_index(const struct kl_vcpu *v)
{
	uint32_t index = atomic_load(&v->pv->hv.vp_index);

	return index == UINT32_MAX ? v->core.index : index;
}

/* ---- CPUID ------------------------------------------------------------------------------- */

/* Can two threads run on one core at a time, where the guest would not know of it? */
static bool smt_possible(void)
{
	char buf[16] = "";
	long fd = kl_sys(SYS_openat, AT_FDCWD, "/sys/devices/system/cpu/smt/control",
			 O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return true;
	if (kl_sys(SYS_read, fd, buf, sizeof(buf) - 1) < 0)
		buf[0] = 0;
	kl_sys(SYS_close, fd);
	return strncmp(buf, "forceoff", 8) != 0 && strncmp(buf, "notsupported", 12) != 0;
}

static void put_signature(struct kvm_cpuid_entry2 *e, uint32_t max)
{
	e->eax = max;
	memcpy(&e->ebx, SIGNATURE, 4);
	memcpy(&e->ecx, SIGNATURE + 4, 4);
	memcpy(&e->edx, SIGNATURE + 8, 4);
}

void kl_hv_supported_cpuid(const struct kl_vcpu *v, struct kvm_cpuid_entry2 e[KL_HV_NR_LEAVES])
{
	static const uint32_t leaf[KL_HV_NR_LEAVES] = {
		0x40000000,   CPUID_INTERFACE, 0x40000002,  CPUID_FEATURES, CPUID_HINTS,
		CPUID_LIMITS, CPUID_DEBUG,     0x40000081u, 0x40000082u,    CPUID_NESTED,
	};

	memset(e, 0, KL_HV_NR_LEAVES * sizeof(*e));
	for (unsigned i = 0; i < KL_HV_NR_LEAVES; i++)
		e[i].function = leaf[i];
	put_signature(&e[0], CPUID_DEBUG_LAST);
	e[1].eax = INTERFACE;
	e[2].eax = 0x3839; /* of 2016 */
	e[2].ebx = 0xa0000;
	e[3].eax = KL_HV_HAS_VP_RUNTIME | KL_HV_HAS_TIME_REF_COUNT | KL_HV_HAS_APIC |
		   KL_HV_HAS_HYPERCALL | KL_HV_HAS_VP_INDEX | KL_HV_HAS_RESET |
		   KL_HV_HAS_REFERENCE_TSC | KL_HV_HAS_FREQUENCIES | KL_HV_HAS_REENLIGHTENMENT |
		   KL_HV_HAS_TSC_INVARIANT;
	e[3].ebx = KL_HV_MAY_SIGNAL_EVENTS | KL_HV_MAY_CALL_EXTENDED;
	e[3].edx = KL_HV_XMM_INPUT | KL_HV_FREQUENCIES | KL_HV_CRASH_MSRS | KL_HV_GVA_RANGES;
	e[4].eax = KL_HV_REMOTE_FLUSH | KL_HV_APIC_MSRS | KL_HV_RELAXED_TIMING | KL_HV_NO_AUTO_EOI |
		   KL_HV_EX_MASKS;
	if (!v || v->apic)
		e[4].eax |= KL_HV_CLUSTER_IPI;
	if (!smt_possible())
		e[4].eax |= KL_HV_NO_CORE_SHARING;
	e[4].ebx = SPINS_BEFORE_CALL;
	e[5].eax = KL_MAX_VCPUS;
	e[5].ebx = 64;
	/* The debugger's leaves are there, and do not allow it. */
	put_signature(&e[6], 0);
	e[7].eax = DEBUG_INTERFACE;
	e[9].eax = NESTED_EAX;
	e[9].ebx = NESTED_EBX;
}

void kl_hv_cpuid_changed(struct kl_vcpu *v)
{
	const struct kvm_cpuid_entry2 *e = kl_x86_find_cpuid(v, CPUID_INTERFACE, 0);
	struct kl_hv_vcpu *hv = &v->pv->hv;

	hv->enabled = e && e->eax == INTERFACE;
	hv->features_eax = hv->features_ebx = hv->features_edx = hv->hints_eax = hv->hints_ebx = 0;
	if (!hv->enabled)
		return;
	e = kl_x86_find_cpuid(v, CPUID_FEATURES, 0);
	if (e) {
		hv->features_eax = e->eax;
		hv->features_ebx = e->ebx;
		hv->features_edx = e->edx;
	}
	e = kl_x86_find_cpuid(v, CPUID_HINTS, 0);
	if (e) {
		hv->hints_eax = e->eax;
		hv->hints_ebx = e->ebx;
	}
}

bool kl_pv_hides_invariant_tsc(struct kl_vcpu *v)
{
	return (v->pv->hv.features_eax & KL_HV_HAS_TSC_INVARIANT) &&
	       !(atomic_load(&hv_of(v->kvm)->tsc_invariant) & EXPOSE_INVARIANT);
}

bool kl_pv_hv_enabled(struct kl_vcpu *v)
{
	return v->pv->hv.enabled && atomic_load(&hv_of(v->kvm)->guest_os_id);
}

/* ---- MSRs -------------------------------------------------------------------------------- */

static bool is_ours(uint32_t index)
{
	return (index >= KL_HV_GUEST_OS_ID && index <= KL_HV_SINT15) ||
	       (index >= KL_HV_STIMER0_CONFIG && index <= KL_HV_STIMER3_COUNT) ||
	       (index >= KL_HV_SYNDBG_CONTROL && index <= KL_HV_SYNDBG_PENDING_BUFFER) ||
	       (index >= KL_HV_SYNDBG_OPTIONS && index <= KL_HV_TSC_EMULATION_STATUS) ||
	       index == KL_HV_TSC_INVARIANT_CONTROL;
}

/* What the guest may see when it is held to its CPUID. */
static bool offered(const struct kl_hv_vcpu *hv, uint32_t index)
{
	switch (index) {
	case KL_HV_GUEST_OS_ID:
	case KL_HV_HYPERCALL:
		return hv->features_eax & KL_HV_HAS_HYPERCALL;
	case KL_HV_VP_RUNTIME:
		return hv->features_eax & KL_HV_HAS_VP_RUNTIME;
	case KL_HV_TIME_REF_COUNT:
		return hv->features_eax & KL_HV_HAS_TIME_REF_COUNT;
	case KL_HV_VP_INDEX:
		return hv->features_eax & KL_HV_HAS_VP_INDEX;
	case KL_HV_RESET:
		return hv->features_eax & KL_HV_HAS_RESET;
	case KL_HV_REFERENCE_TSC:
		return hv->features_eax & KL_HV_HAS_REFERENCE_TSC;
	case KL_HV_EOI:
	case KL_HV_ICR:
	case KL_HV_TPR:
	case KL_HV_VP_ASSIST_PAGE:
		return hv->features_eax & KL_HV_HAS_APIC;
	case KL_HV_TSC_FREQUENCY:
	case KL_HV_APIC_FREQUENCY:
		return hv->features_eax & KL_HV_HAS_FREQUENCIES;
	case KL_HV_REENLIGHTENMENT_CONTROL:
	case KL_HV_TSC_EMULATION_CONTROL:
	case KL_HV_TSC_EMULATION_STATUS:
		return hv->features_eax & KL_HV_HAS_REENLIGHTENMENT;
	case KL_HV_TSC_INVARIANT_CONTROL:
		return hv->features_eax & KL_HV_HAS_TSC_INVARIANT;
	case KL_HV_CRASH_P0 ... KL_HV_CRASH_CTL:
		return hv->features_edx & KL_HV_CRASH_MSRS;
	default:
		return false;
	}
}

static bool allowed(const struct kl_vcpu *v, uint32_t index, bool host)
{
	const struct kl_hv_vcpu *hv = &v->pv->hv;

	return host || (hv->enabled && (!hv->enforce || offered(hv, index)));
}

/* What the calling thread has used of a processor, in units. */
static uint64_t thread_runtime(void)
{
	struct timespec t;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return ((uint64_t)t.tv_sec * NS_PER_S + (uint64_t)t.tv_nsec) / NS_PER_UNIT;
}

static unsigned apic_register(uint32_t index)
{
	return index == KL_HV_EOI ? 0xb0 : index == KL_HV_ICR ? 0x300 : 0x80;
}

/* Of the partition. False: there is no such. Context: hv->lock. */
static bool get_of_vm(const struct kl_hv_vm *hv, uint32_t index, uint64_t *data)
{
	switch (index) {
	case KL_HV_GUEST_OS_ID:
		*data = atomic_load(&hv->guest_os_id);
		return true;
	case KL_HV_HYPERCALL:
		*data = hv->hypercall;
		return true;
	case KL_HV_RESET:
		*data = 0;
		return true;
	case KL_HV_REFERENCE_TSC:
		*data = hv->tsc_page;
		return true;
	case KL_HV_CRASH_P0 ... KL_HV_CRASH_P4:
		*data = hv->crash_param[index - KL_HV_CRASH_P0];
		return true;
	case KL_HV_CRASH_CTL:
		*data = hv->crash_ctl;
		return true;
	case KL_HV_REENLIGHTENMENT_CONTROL:
		*data = hv->reenlightenment;
		return true;
	case KL_HV_TSC_EMULATION_CONTROL:
		*data = hv->tsc_emulation;
		return true;
	case KL_HV_TSC_EMULATION_STATUS:
		*data = hv->tsc_emulation_status;
		return true;
	case KL_HV_TSC_INVARIANT_CONTROL:
		*data = atomic_load(&hv->tsc_invariant);
		return true;
	default:
		return false;
	}
}

static bool get(struct kl_vcpu *v, uint32_t index, uint64_t *data)
{
	struct kl_hv_vm *hv = hv_of(v->kvm);
	bool ok;

	switch (index) {
	case KL_HV_VP_INDEX:
		*data = kl_hv_vp_index(v);
		return true;
	case KL_HV_VP_ASSIST_PAGE:
		*data = v->pv->hv.assist_page;
		return true;
	case KL_HV_VP_RUNTIME:
		*data = thread_runtime() + v->pv->hv.runtime_offset;
		return true;
	case KL_HV_TIME_REF_COUNT:
		*data = kl_hv_reference_count(v);
		return true;
	case KL_HV_TSC_FREQUENCY:
		*data = (uint64_t)v->tsc_khz * 1000;
		return true;
	case KL_HV_APIC_FREQUENCY:
		*data = NS_PER_S / v->kvm->apic_bus_cycle_ns;
		return true;
	case KL_HV_EOI:
	case KL_HV_ICR:
	case KL_HV_TPR:
		return v->apic && kl_apic_wide_read(v, apic_register(index), data);
	default:
		kl_mutex_lock(&hv->lock);
		ok = get_of_vm(hv, index, data);
		kl_mutex_unlock(&hv->lock);
		return ok;
	}
}

enum kl_pv_result kl_hv_get_msr(struct kl_vcpu *v, uint32_t index, uint64_t *data, bool host)
{
	bool ok;

	if (!is_ours(index))
		return KL_PV_UNKNOWN;
	if (!allowed(v, index, host))
		return KL_PV_REFUSED;
	if (!host)
		kl_guest_pause(v);
	ok = get(v, index, data);
	if (!host)
		kl_guest_resume(v);
	return ok ? KL_PV_OK : KL_PV_REFUSED;
}

/* The page: a hypercall and a return. 0; 1, the guest is refused; -errno of KVM_RUN. */
static int set_hypercall(struct kl_vcpu *v, uint64_t data)
{
	static const uint8_t mark[] = {0x0d, 0, 0, 0, 0x80}; /* or $0x80000000, %eax */
	struct kl_hv_vm *hv = hv_of(v->kvm);
	uint8_t code[sizeof(mark) + 4], *p = code;
	int r = 0;

	/* Without an operating system's name there are no hypercalls. */
	if (!atomic_load(&hv->guest_os_id))
		return 0;
	if (data & ENABLED) {
		/* As Xen tells one from its own. */
		if (atomic_load(&v->kvm->xen_hypercalls)) {
			memcpy(p, mark, sizeof(mark));
			p += sizeof(mark);
		}
		*p++ = 0x0f;
		*p++ = 0x01;
		*p++ = kl_host_is_intel() ? 0xc1 : 0xd9;
		*p++ = 0xc3;
		r = kl_pv_place(v, data & KL_PAGE_MASK, code, (size_t)(p - code));
	}
	kl_mutex_lock(&hv->lock);
	/* Another vCPU may have taken the name off meanwhile. */
	if (!r && atomic_load(&hv->guest_os_id))
		hv->hypercall = data;
	kl_mutex_unlock(&hv->lock);
	return r;
}

static void set_crash_control(struct kl_vcpu *v, uint64_t data, bool host)
{
	if (host)
		hv_of(v->kvm)->crash_ctl = data & CRASH_NOTIFY;
	else if (data & CRASH_NOTIFY)
		v->system_events |= 1u << KVM_SYSTEM_EVENT_CRASH;
}

/* Of the partition. False: it is refused. Context: hv->lock. */
static bool set_of_vm(struct kl_vcpu *v, uint32_t index, uint64_t data, bool host)
{
	struct kl_hv_vm *hv = hv_of(v->kvm);

	switch (index) {
	case KL_HV_GUEST_OS_ID:
		atomic_store(&hv->guest_os_id, data);
		if (!data)
			hv->hypercall &= ~ENABLED;
		return true;
	case KL_HV_RESET:
		if (data == 1)
			v->system_events |= 1u << KVM_SYSTEM_EVENT_RESET;
		return true;
	case KL_HV_REFERENCE_TSC:
		kl_hv_tsc_page_moved(v, data, host);
		return true;
	case KL_HV_CRASH_P0 ... KL_HV_CRASH_P4:
		hv->crash_param[index - KL_HV_CRASH_P0] = data;
		return true;
	case KL_HV_CRASH_CTL:
		set_crash_control(v, data, host);
		return true;
	case KL_HV_REENLIGHTENMENT_CONTROL:
		hv->reenlightenment = data;
		return true;
	case KL_HV_TSC_EMULATION_CONTROL:
		hv->tsc_emulation = data;
		return true;
	case KL_HV_TSC_EMULATION_STATUS:
		if (data && !host)
			return false;
		hv->tsc_emulation_status = data;
		return true;
	case KL_HV_TSC_INVARIANT_CONTROL:
		/* The guest cannot hide it again. */
		if ((data & ~EXPOSE_INVARIANT) ||
		    (!host && !data && atomic_load(&hv->tsc_invariant)))
			return false;
		atomic_store(&hv->tsc_invariant, data);
		return true;
	case KL_HV_TIME_REF_COUNT:
		return host; /* and ignored */
	default:
		return false;
	}
}

static bool set_vp_index(struct kl_vcpu *v, uint64_t data, bool host)
{
	if (!host || (uint32_t)data >= KL_MAX_VCPUS)
		return false;
	atomic_store(&v->pv->hv.vp_index, (uint32_t)data);
	return true;
}

/*
 * Of the page the first word is used, as that of PV EOI. What else it holds stays: it may have come
 * with a migration. As set_hypercall().
 */
static int set_assist_page(struct kl_vcpu *v, uint64_t data)
{
	uint32_t none = 0;
	int r = 0;

	if (data & ENABLED)
		r = kl_pv_place(v, data & KL_PAGE_MASK, &none, sizeof(none));
	if (!r)
		r = kl_pv_eoi_set(v, data & ENABLED ? (data & KL_PAGE_MASK) | ENABLED : 0);
	if (!r)
		v->pv->hv.assist_page = data;
	return r;
}

/* As set_hypercall(). */
static int set(struct kl_vcpu *v, uint32_t index, uint64_t data, bool host)
{
	struct kl_hv_vm *hv = hv_of(v->kvm);
	bool ok;

	switch (index) {
	case KL_HV_HYPERCALL:
		return set_hypercall(v, data);
	case KL_HV_VP_ASSIST_PAGE:
		return set_assist_page(v, data);
	case KL_HV_VP_INDEX:
		return !set_vp_index(v, data, host);
	case KL_HV_VP_RUNTIME:
		if (host)
			v->pv->hv.runtime_offset = data - thread_runtime();
		return !host;
	case KL_HV_TSC_FREQUENCY:
	case KL_HV_APIC_FREQUENCY:
		return !host; /* and ignored */
	case KL_HV_EOI:
	case KL_HV_ICR:
	case KL_HV_TPR:
		return !v->apic || !kl_apic_wide_write(v, apic_register(index), data);
	default:
		kl_mutex_lock(&hv->lock);
		ok = set_of_vm(v, index, data, host);
		kl_mutex_unlock(&hv->lock);
		return !ok;
	}
}

enum kl_pv_result kl_hv_set_msr(struct kl_vcpu *v, uint32_t index, uint64_t data, bool host)
{
	int r;

	if (!is_ours(index))
		return KL_PV_UNKNOWN;
	if (!allowed(v, index, host))
		return KL_PV_REFUSED;
	if (!host)
		kl_guest_pause(v);
	r = set(v, index, data, host);
	if (!host)
		kl_guest_resume(v);
	return kl_pv_placed(v, r, host);
}

/* ---- eventfds ---------------------------------------------------------------------------- */

/* Where the event of @conn_id is linked, or would be. Context: hv->lock. */
static struct kl_hv_event **find_event(struct kl_hv_vm *hv, uint32_t conn_id)
{
	struct kl_hv_event **p = &hv->events;

	while (*p && (*p)->conn_id != conn_id)
		p = &(*p)->next;
	return p;
}

static void free_event(struct kl_hv_event *e)
{
	kl_sys_close(e->fd);
	free(e);
}

static int assign(struct kl_hv_vm *hv, uint32_t conn_id, int fd)
{
	struct kl_hv_event *e = kl_failpoint("hv-event") ? NULL : malloc(sizeof(*e)), **p;
	uint64_t id;
	int r;

	if (!e)
		return -ENOMEM;
	r = kl_sys_dup(fd);
	if (r < 0) {
		free(e);
		return r;
	}
	*e = (struct kl_hv_event){.conn_id = conn_id, .fd = r};
	kl_not_leaked(e);
	r = kl_eventfd_identify(e->fd, &id);
	if (!r) {
		kl_mutex_lock(&hv->lock);
		p = find_event(hv, conn_id);
		if (*p)
			r = -EEXIST;
		else
			*p = e;
		kl_mutex_unlock(&hv->lock);
	}
	if (r)
		free_event(e);
	return r;
}

static int deassign(struct kl_hv_vm *hv, uint32_t conn_id)
{
	struct kl_hv_event **p, *e;

	kl_mutex_lock(&hv->lock);
	p = find_event(hv, conn_id);
	e = *p;
	if (e)
		*p = e->next;
	kl_mutex_unlock(&hv->lock);
	if (!e)
		return -ENOENT;
	free_event(e);
	return 0;
}

int kl_hv_eventfd(struct kl_x86_vm *vm, const struct kvm_hyperv_eventfd *e)
{
	if ((e->flags & ~(uint32_t)KVM_HYPERV_EVENTFD_DEASSIGN) ||
	    (e->conn_id & ~(uint32_t)KVM_HYPERV_CONN_ID_MASK))
		return -EINVAL;
	return e->flags ? deassign(hv_of(vm), e->conn_id) : assign(hv_of(vm), e->conn_id, e->fd);
}

bool kl_hv_signal(struct kl_x86_vm *vm, uint32_t conn_id)
{
	struct kl_hv_vm *hv = hv_of(vm);
	struct kl_hv_event *e;

	kl_mutex_lock(&hv->lock);
	e = *find_event(hv, conn_id);
	if (e)
		kl_eventfd_signal(e->fd);
	kl_mutex_unlock(&hv->lock);
	return e;
}
