/* SPDX-License-Identifier: MIT */
/*
 * Birth, reset and death of VMs and vCPUs, and the vCPU's state as KVM's get and set ioctls
 * show it: their checks, their errnos, and segment attributes as the AMD hardware under KVM
 * reports them.
 */
#include <cpuid.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/config.h"
#include "base/failpoint.h"
#include "host/sys.h"
#include "x86/code.h"
#include "x86/control.h"
#include "x86/debug.h"
#include "x86/guest_cpuid.h"
#include "x86/fpu.h"
#include "x86/irqchip.h"
#include "x86/lapic.h"
#include "x86/mce.h"
#include "x86/msr.h"
#include "x86/paging.h"
#include "x86/paravirt.h"
#include "x86/segment.h"
#include "x86/tsc.h"

#define RFLAGS_KNOWN 0x3f7fd5ull

/* ---- VM ---- */

int kl_x86_vm_init(struct kl_x86_vm *vm)
{
	int r = kl_vm_init(&vm->mem);

	kl_config_init(); /* of tests, which make VMs without the library's calls */
	if (r)
		return r;
	kl_mutex_init(&vm->lock, KL_RANK_VM);
	kl_mutex_init(&vm->tsc_lock, KL_RANK_LEAF);
	vm->tsc_khz = kl_host_tsc_khz();
	atomic_init(&vm->default_tsc_khz, vm->tsc_khz);
	r = kl_code_create(vm);
	if (!r) {
		r = kl_pv_vm_create(vm);
		if (r)
			kl_code_destroy(vm);
	}
	if (r) {
		kl_mutex_destroy(&vm->tsc_lock);
		kl_mutex_destroy(&vm->lock);
		kl_vm_destroy(&vm->mem);
		return r;
	}
	kl_apic_vm_init(vm);
	return 0;
}

void kl_x86_vm_destroy(struct kl_x86_vm *vm)
{
	kl_pv_vm_destroy(vm); /* its caches are the VM's */
	kl_code_destroy(vm);
	kl_vm_destroy(&vm->mem);
	kl_msr_filter_free(vm);
	kl_apic_vm_destroy(vm);
	kl_mutex_destroy(&vm->tsc_lock);
	kl_mutex_destroy(&vm->lock);
}

/* ---- vCPU ---- */

int kl_x86_vcpu_create(struct kl_x86_vm *vm, unsigned id, struct kl_vcpu **out)
{
	struct kl_vcpu *v = kl_failpoint("x86-vcpu-map") ? NULL : kl_sys_map(sizeof(*v));
	uint32_t state = KVM_MP_STATE_RUNNABLE;
	int r;

	if (!v)
		return -ENOMEM;
	v->kvm = vm;
	v->core.id = id;
	v->core.vm = &vm->mem;
	v->pio_data = v->pio_page_;
	v->ext_vector = v->eoi_exit = -1;
	kl_cpuid_defaults(v);
	kl_mce_init(v);
	r = vm->irqchip ? kl_apic_create(v) : 0;
	if (r)
		goto out_free;
	kl_x86_reset(v, false);
	r = kl_tsc_set_khz(v, vm->default_tsc_khz);
	if (r)
		goto out_apic;
	if (vm->irqchip && id != vm->boot_cpu_id)
		state = KVM_MP_STATE_UNINITIALIZED;
	atomic_store_explicit(&v->mp_state, state, memory_order_relaxed);
	r = kl_blocks_create(v);
	if (r)
		goto out_apic;
	r = kl_pv_vcpu_create(v);
	if (r)
		goto out_blocks;
	/* From here on others find it. */
	r = kl_vcpu_core_add(&vm->mem, &v->core, id);
	if (r)
		goto out_pv;
	kl_tsc_synchronize(v, NULL);
	kl_apic_online(v);
	*out = v;
	return 0;
out_pv:
	kl_pv_vcpu_destroy(v);
out_blocks:
	kl_blocks_destroy(v);
out_apic:
	kl_apic_destroy(v);
out_free:
	kl_sys_unmap(v, sizeof(*v));
	return r;
}

void kl_x86_vcpu_destroy(struct kl_vcpu *v)
{
	kl_pv_vcpu_destroy(v);
	kl_apic_destroy(v);
	kl_blocks_destroy(v);
	free(v->cpuid);
	kl_sys_unmap(v, sizeof(*v));
}

static void reset_segment(struct kvm_segment *s, uint8_t type, bool code_or_data)
{
	*s = (struct kvm_segment){.limit = 0xffff, .type = type, .present = 1, .s = code_or_data};
}

void kl_x86_reset(struct kl_vcpu *v, bool init_event)
{
	const struct kvm_cpuid_entry2 *e;
	uint64_t cr0 = KL_CR0_ET;

	cr0 |= init_event ? v->cr0 & (KL_CR0_NW | KL_CR0_CD) : KL_CR0_NW | KL_CR0_CD;
	v->exc = (struct kl_event_exception){0};
	v->irq.injected = v->irq.soft = false;
	v->nmi.injected = v->nmi.masked = false;
	atomic_store_explicit(&v->nmi.pending, 0, memory_order_relaxed);
	v->int_shadow = 0;
	v->triple_fault_pending = false;
	v->pio_left = v->nr_mmio = v->mmio_used = 0;
	v->mmio_replay = false;
	v->pending = KL_PENDING_NONE;

	memset(v->dr, 0, sizeof(v->dr));
	v->dr6 = KL_DR6_FIXED;
	v->dr7 = KL_DR7_FIXED;
	v->bp.trap = v->bp.hit = 0;
	kl_debug_update(v);
	v->cr2 = v->cr3 = v->cr4 = v->cr8 = v->efer = 0;
	v->cr0 = cr0;
	kl_msr_reset(v, init_event);
	kl_apic_reset(v, init_event);
	if (init_event)
		kl_pv_vcpu_reset(v);
	if (!init_event) {
		v->xcr0 = 1;
		kl_fpu_reset(v);
	}
	memset(v->gpr, 0, sizeof(v->gpr));
	e = kl_x86_find_cpuid(v, 1, 0);
	v->gpr[KL_RDX] = e ? e->eax : 0x600;
	v->rflags = 2;
	v->rip = 0xfff0;

	reset_segment(&v->seg[KL_CS], 0xb, true);
	v->seg[KL_CS].selector = 0xf000;
	v->seg[KL_CS].base = 0xffff0000;
	for (unsigned i = 0; i < KL_LDTR; i++)
		if (i != KL_CS)
			reset_segment(&v->seg[i], 3, true);
	reset_segment(&v->seg[KL_LDTR], 2, false);
	reset_segment(&v->seg[KL_TR], 3, false);
	v->gdt = (struct kvm_dtable){.limit = 0xffff};
	v->idt = (struct kvm_dtable){.limit = 0xffff};
	v->cpl = 0;
	kl_tlb_flush(v);
	kl_x86_update_mode(v);
	kl_x86_refresh_cpuid(v);
	kl_vcpu_request(&v->core, KL_REQ_EVENT);
}

/* ---- registers ---- */

void kl_x86_get_regs(struct kl_vcpu *v, struct kvm_regs *r)
{
	memset(r, 0, sizeof(*r));
	r->rax = v->gpr[KL_RAX];
	r->rbx = v->gpr[KL_RBX];
	r->rcx = v->gpr[KL_RCX];
	r->rdx = v->gpr[KL_RDX];
	r->rsi = v->gpr[KL_RSI];
	r->rdi = v->gpr[KL_RDI];
	r->rsp = v->gpr[KL_RSP];
	r->rbp = v->gpr[KL_RBP];
	r->r8 = v->gpr[KL_R8];
	r->r9 = v->gpr[KL_R9];
	r->r10 = v->gpr[KL_R10];
	r->r11 = v->gpr[KL_R11];
	r->r12 = v->gpr[KL_R12];
	r->r13 = v->gpr[KL_R13];
	r->r14 = v->gpr[KL_R14];
	r->r15 = v->gpr[KL_R15];
	r->rip = v->rip;
	r->rflags = v->rflags;
	/* While the program steps, TF is its own affair, as far as KVM tells. */
	if (v->debug.control & KVM_GUESTDBG_SINGLESTEP)
		r->rflags &= ~(uint64_t)KL_FL_TF;
}

/* CPL is where the hardware keeps it: SS.DPL in protected mode. */
static void derive_cpl(struct kl_vcpu *v)
{
	if (kl_real_mode(v))
		v->cpl = 0;
	else
		v->cpl = kl_vm86(v) ? 3 : v->seg[KL_SS].dpl;
	kl_x86_update_mode(v);
}

void kl_x86_set_regs(struct kl_vcpu *v, const struct kvm_regs *r)
{
	v->gpr[KL_RAX] = r->rax;
	v->gpr[KL_RBX] = r->rbx;
	v->gpr[KL_RCX] = r->rcx;
	v->gpr[KL_RDX] = r->rdx;
	v->gpr[KL_RSI] = r->rsi;
	v->gpr[KL_RDI] = r->rdi;
	v->gpr[KL_RSP] = r->rsp;
	v->gpr[KL_RBP] = r->rbp;
	v->gpr[KL_R8] = r->r8;
	v->gpr[KL_R9] = r->r9;
	v->gpr[KL_R10] = r->r10;
	v->gpr[KL_R11] = r->r11;
	v->gpr[KL_R12] = r->r12;
	v->gpr[KL_R13] = r->r13;
	v->gpr[KL_R14] = r->r14;
	v->gpr[KL_R15] = r->r15;
	v->rip = r->rip;
	v->rflags = (r->rflags & RFLAGS_KNOWN) | 2;
	v->exc.pending = false;
	v->bp.trap = 0;
	derive_cpl(v);
	kl_vcpu_request(&v->core, KL_REQ_EVENT);
}

/* ---- special registers ---- */

static void get_segment(struct kl_vcpu *v, enum kl_seg which, struct kvm_segment *s)
{
	*s = v->seg[which];
	s->padding = 0;
	s->g = s->limit > 0xfffff;
	s->unusable = !s->present;
	switch (which) {
	case KL_CS:
	case KL_LDTR:
		break;
	case KL_TR:
		s->type |= 2;
		break;
	case KL_SS:
		if (s->unusable)
			s->db = 0;
		s->dpl = v->cpl;
		break;
	default:
		if (!s->unusable)
			s->type |= 1;
		break;
	}
}

static void set_segment(struct kl_vcpu *v, enum kl_seg which, const struct kvm_segment *in)
{
	struct kvm_segment *s = &v->seg[which];

	*s = (struct kvm_segment){
		.base = in->base,
		.limit = in->limit,
		.selector = in->selector,
		.type = in->type & 15,
		.present = (in->present & 1) && !in->unusable,
		.dpl = in->dpl & 3,
		.db = in->db & 1,
		.s = in->s & 1,
		.l = in->l & 1,
		.g = in->g & 1,
		.avl = in->avl & 1,
	};
	s->unusable = !s->present;
}

/* Without the payload capability, what is pending shows its effect to whoever looks. */
static void payload_quirk(struct kl_vcpu *v)
{
	if (!v->kvm->exception_payload && v->exc.pending)
		kl_x86_apply_payload(v);
}

/* The part that KVM_GET_SREGS and KVM_GET_SREGS2 share; the layouts begin alike. */
static void get_common(struct kl_vcpu *v, struct kvm_sregs2 *s)
{
	payload_quirk(v);
	memset(s, 0, sizeof(*s));
	get_segment(v, KL_CS, &s->cs);
	get_segment(v, KL_DS, &s->ds);
	get_segment(v, KL_ES, &s->es);
	get_segment(v, KL_FS, &s->fs);
	get_segment(v, KL_GS, &s->gs);
	get_segment(v, KL_SS, &s->ss);
	get_segment(v, KL_TR, &s->tr);
	get_segment(v, KL_LDTR, &s->ldt);
	s->gdt.base = v->gdt.base;
	s->gdt.limit = v->gdt.limit;
	s->idt.base = v->idt.base;
	s->idt.limit = v->idt.limit;
	s->cr0 = v->cr0;
	s->cr2 = v->cr2;
	s->cr3 = v->cr3;
	s->cr4 = v->cr4;
	s->cr8 = kl_x86_get_cr8(v);
	s->efer = v->efer;
	s->apic_base = v->apic_base;
}

#define COMMON_SIZE offsetof(struct kvm_sregs2, flags)
_Static_assert(COMMON_SIZE == offsetof(struct kvm_sregs, interrupt_bitmap), "same beginning");

void kl_x86_get_sregs(struct kl_vcpu *v, struct kvm_sregs *s)
{
	struct kvm_sregs2 common;

	get_common(v, &common);
	memset(s, 0, sizeof(*s));
	memcpy(s, &common, COMMON_SIZE);
	if (v->irq.injected && !v->irq.soft)
		s->interrupt_bitmap[v->irq.nr / 64] |= 1ull << (v->irq.nr % 64);
}

void kl_x86_get_sregs2(struct kl_vcpu *v, struct kvm_sregs2 *s)
{
	get_common(v, s);
	if (kl_pae_paging(v->cr0, v->cr4, v->efer)) {
		memcpy(s->pdptrs, v->pdptrs, sizeof(s->pdptrs));
		s->flags = KVM_SREGS2_FLAGS_PDPTRS_VALID;
	}
}

static bool sregs_valid(struct kl_vcpu *v, const struct kvm_sregs2 *s)
{
	if ((s->efer & KL_EFER_LME) && (s->cr0 & KL_CR0_PG)) {
		if (!(s->cr4 & KL_CR4_PAE) || !(s->efer & KL_EFER_LMA))
			return false;
		if ((s->cr3 >> 52) || (s->cr3 & kl_reserved_gpa_bits(v)))
			return false;
	} else if ((s->efer & KL_EFER_LMA) || s->cs.l) {
		return false;
	}
	return kl_cr4_valid(v, s->cr4) && kl_cr0_valid(s->cr0);
}

static bool is_bsp(struct kl_vcpu *v)
{
	return v->apic_base & KL_APIC_BASE_BSP;
}

static int set_common(struct kl_vcpu *v, const struct kvm_sregs2 *s, bool read_pdptes)
{
	if (!sregs_valid(v, s))
		return -EINVAL;
	if (kl_set_apic_base(v, s->apic_base, true))
		return -EINVAL;
	v->idt.base = s->idt.base;
	v->idt.limit = s->idt.limit;
	v->gdt.base = s->gdt.base;
	v->gdt.limit = s->gdt.limit;
	v->cr2 = s->cr2;
	v->cr3 = s->cr3;
	if (s->cr8 < 16)
		kl_x86_set_cr8(v, s->cr8);
	v->efer = s->efer;
	v->cr0 = s->cr0;
	v->cr4 = s->cr4;
	kl_tlb_flush(v);
	kl_x86_refresh_cpuid(v);
	/* Malformed or unreachable ones stay what they were, as in KVM; the guest will fault. */
	if (read_pdptes && kl_pae_paging(s->cr0, s->cr4, s->efer)) {
		uint64_t pdpte[4];

		v->pdptrs_valid = !kl_read_pdptes(v, s->cr3, pdpte);
		if (v->pdptrs_valid)
			memcpy(v->pdptrs, pdpte, sizeof(pdpte));
	}
	set_segment(v, KL_CS, &s->cs);
	set_segment(v, KL_DS, &s->ds);
	set_segment(v, KL_ES, &s->es);
	set_segment(v, KL_FS, &s->fs);
	set_segment(v, KL_GS, &s->gs);
	set_segment(v, KL_SS, &s->ss);
	set_segment(v, KL_TR, &s->tr);
	set_segment(v, KL_LDTR, &s->ldt);
	derive_cpl(v);
	/* Old programs reset a boot processor without waking it. */
	if (is_bsp(v) && v->rip == 0xfff0 && s->cs.selector == 0xf000 && s->cs.base == 0xffff0000 &&
	    !(s->cr0 & KL_CR0_PE))
		atomic_store_explicit(&v->mp_state, KVM_MP_STATE_RUNNABLE, memory_order_relaxed);
	kl_vcpu_request(&v->core, KL_REQ_EVENT);
	return 0;
}

int kl_x86_set_sregs(struct kl_vcpu *v, const struct kvm_sregs *s)
{
	struct kvm_sregs2 common = {0};
	int r;

	memcpy(&common, s, COMMON_SIZE);
	r = set_common(v, &common, true);
	if (r)
		return r;
	for (unsigned i = 0; i < 4; i++) {
		uint64_t bits = s->interrupt_bitmap[i];

		if (!bits)
			continue;
		v->irq.injected = true;
		v->irq.soft = false;
		v->irq.nr = (uint8_t)(i * 64 + (unsigned)__builtin_ctzll(bits));
		break;
	}
	return 0;
}

int kl_x86_set_sregs2(struct kl_vcpu *v, const struct kvm_sregs2 *s)
{
	bool given = s->flags & KVM_SREGS2_FLAGS_PDPTRS_VALID;
	int r;

	if (s->flags & ~(uint64_t)KVM_SREGS2_FLAGS_PDPTRS_VALID)
		return -EINVAL;
	if (given && !kl_pae_paging(s->cr0, s->cr4, s->efer))
		return -EINVAL;
	r = set_common(v, s, !given);
	if (r || !given)
		return r;
	memcpy(v->pdptrs, s->pdptrs, sizeof(v->pdptrs));
	v->pdptrs_valid = true;
	return 0;
}

/* ---- vector state ---- */

void kl_x86_get_fpu(struct kl_vcpu *v, struct kvm_fpu *f)
{
	const uint8_t *x = v->xsave;

	memset(f, 0, sizeof(*f));
	memcpy(&f->fcw, x, 2);
	memcpy(&f->fsw, x + 2, 2);
	f->ftwx = x[4];
	memcpy(&f->last_opcode, x + 6, 2);
	memcpy(&f->last_ip, x + 8, 8);
	memcpy(&f->last_dp, x + 16, 8);
	memcpy(f->fpr, x + 32, 128);
	memcpy(f->xmm, x + 160, 256);
}

void kl_x86_set_fpu(struct kl_vcpu *v, const struct kvm_fpu *f)
{
	uint8_t *x = v->xsave;

	memcpy(x, &f->fcw, 2);
	memcpy(x + 2, &f->fsw, 2);
	x[4] = f->ftwx;
	memcpy(x + 6, &f->last_opcode, 2);
	memcpy(x + 8, &f->last_ip, 8);
	memcpy(x + 16, &f->last_dp, 8);
	memcpy(x + 32, f->fpr, 128);
	memcpy(x + 160, f->xmm, 256);
}

/* ---- debug registers, events ---- */

void kl_x86_get_debugregs(struct kl_vcpu *v, struct kvm_debugregs *d)
{
	payload_quirk(v);
	memset(d, 0, sizeof(*d));
	for (unsigned i = 0; i < 4; i++)
		d->db[i] = v->dr[i];
	d->dr6 = v->dr6;
	d->dr7 = v->dr7;
}

int kl_x86_set_debugregs(struct kl_vcpu *v, const struct kvm_debugregs *d)
{
	if (d->flags || (d->dr6 >> 32) || (d->dr7 >> 32))
		return -EINVAL;
	for (unsigned i = 0; i < 4; i++)
		v->dr[i] = d->db[i];
	v->dr6 = d->dr6;
	v->dr7 = d->dr7;
	kl_debug_update(v);
	return 0;
}

void kl_x86_get_events(struct kl_vcpu *v, struct kvm_vcpu_events *e)
{
	const struct kl_event_exception *x = &v->exc;
	bool soft = x->nr == KL_EXC_BP || x->nr == KL_EXC_OF;

	memset(e, 0, sizeof(*e));
	if (!soft) {
		e->exception.injected = x->injected;
		e->exception.pending = x->pending;
		if (!v->kvm->exception_payload)
			e->exception.injected |= x->pending;
	}
	payload_quirk(v);
	e->exception.nr = x->nr;
	e->exception.has_error_code = x->has_error;
	e->exception.error_code = x->error;
	e->exception_has_payload = x->has_payload;
	e->exception_payload = x->payload;
	e->interrupt.injected = v->irq.injected && !v->irq.soft;
	e->interrupt.nr = v->irq.nr;
	e->interrupt.shadow = v->int_shadow;
	e->nmi.injected = v->nmi.injected;
	e->nmi.pending = (uint8_t)kl_x86_nmis_waiting(v);
	e->nmi.masked = v->nmi.masked;
	e->smi.latched_init = kl_apic_init_pending(v);
	e->flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW |
		   KVM_VCPUEVENT_VALID_SMM;
	if (v->kvm->exception_payload)
		e->flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
	if (v->kvm->triple_fault_event) {
		e->triple_fault.pending = v->triple_fault_pending;
		e->flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
	}
}

static int events_valid(struct kl_vcpu *v, const struct kvm_vcpu_events *e)
{
	const uint32_t known = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SIPI_VECTOR |
			       KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM |
			       KVM_VCPUEVENT_VALID_PAYLOAD | KVM_VCPUEVENT_VALID_TRIPLE_FAULT;

	if (e->flags & ~known)
		return -EINVAL;
	if ((e->flags & KVM_VCPUEVENT_VALID_PAYLOAD) && !v->kvm->exception_payload)
		return -EINVAL;
	if ((e->flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT) && !v->kvm->triple_fault_event)
		return -EINVAL;
	/* There is no SMM. */
	if ((e->flags & KVM_VCPUEVENT_VALID_SMM) &&
	    (e->smi.smm || e->smi.pending || e->smi.smm_inside_nmi))
		return -EINVAL;
	return 0;
}

int kl_x86_set_events(struct kl_vcpu *v, const struct kvm_vcpu_events *e)
{
	bool payload = e->flags & KVM_VCPUEVENT_VALID_PAYLOAD;
	bool pending = payload && e->exception.pending;
	bool injected = e->exception.injected && !pending;

	if (events_valid(v, e))
		return -EINVAL;
	if ((injected || pending) && (e->exception.nr > 31 || e->exception.nr == 2))
		return -EINVAL;
	v->exc = (struct kl_event_exception){
		.injected = injected,
		.pending = pending,
		.nr = e->exception.nr,
		.has_error = e->exception.has_error_code,
		.error = e->exception.error_code,
		.has_payload = pending && e->exception_has_payload,
		.payload = e->exception_payload,
	};
	v->irq.injected = e->interrupt.injected;
	v->irq.nr = e->interrupt.nr;
	v->irq.soft = e->interrupt.soft;
	if (e->flags & KVM_VCPUEVENT_VALID_SHADOW)
		v->int_shadow =
			e->interrupt.shadow & (KVM_X86_SHADOW_INT_MOV_SS | KVM_X86_SHADOW_INT_STI);
	v->nmi.injected = e->nmi.injected;
	if (e->flags & KVM_VCPUEVENT_VALID_NMI_PENDING)
		atomic_store_explicit(&v->nmi.pending, kl_min(e->nmi.pending, (uint8_t)2),
				      memory_order_relaxed);
	v->nmi.masked = e->nmi.masked;
	if ((e->flags & KVM_VCPUEVENT_VALID_SIPI_VECTOR) && v->apic)
		kl_apic_set_sipi_vector(v, (uint8_t)e->sipi_vector);
	if (e->flags & KVM_VCPUEVENT_VALID_SMM)
		kl_apic_set_init_pending(v, e->smi.latched_init);
	if (e->flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT)
		v->triple_fault_pending = e->triple_fault.pending;
	kl_vcpu_request(&v->core, KL_REQ_EVENT);
	return 0;
}

/* ---- multiprocessing state ---- */

int kl_x86_get_mp_state(struct kl_vcpu *v, struct kvm_mp_state *m)
{
	kl_apic_accept_events(v);
	m->mp_state = atomic_load_explicit(&v->mp_state, memory_order_relaxed);
	if (atomic_load(&v->unhalted) &&
	    (m->mp_state == KVM_MP_STATE_HALTED || m->mp_state == KVM_MP_STATE_AP_RESET_HOLD))
		m->mp_state = KVM_MP_STATE_RUNNABLE;
	return 0;
}

int kl_x86_set_mp_state(struct kl_vcpu *v, const struct kvm_mp_state *m)
{
	uint32_t state = m->mp_state;

	switch (state) {
	case KVM_MP_STATE_RUNNABLE:
		break;
	case KVM_MP_STATE_UNINITIALIZED:
	case KVM_MP_STATE_HALTED:
	case KVM_MP_STATE_AP_RESET_HOLD:
	case KVM_MP_STATE_INIT_RECEIVED:
	case KVM_MP_STATE_SIPI_RECEIVED:
		if (!v->apic)
			return -EINVAL;
		break;
	default:
		return -EINVAL;
	}
	if (state == KVM_MP_STATE_SIPI_RECEIVED) {
		state = KVM_MP_STATE_INIT_RECEIVED;
		kl_apic_set_sipi_pending(v);
	}
	atomic_store_explicit(&v->mp_state, state, memory_order_relaxed);
	kl_vcpu_request(&v->core, KL_REQ_EVENT);
	return 0;
}

/* ---- interrupts from the program ---- */

int kl_x86_interrupt(struct kl_vcpu *v, unsigned vector)
{
	if (vector > 255)
		return -EINVAL;
	if (kl_irqchip_in_kernel(v->kvm))
		return -ENXIO;
	if (v->kvm->irqchip) {
		if (v->ext_vector >= 0)
			return -EEXIST;
		v->ext_vector = (int)vector;
	} else {
		v->irq.injected = true;
		v->irq.soft = false;
		v->irq.nr = (uint8_t)vector;
	}
	kl_vcpu_request(&v->core, KL_REQ_EVENT);
	return 0;
}

uint32_t kl_x86_nmis_waiting(struct kl_vcpu *v)
{
	uint32_t n = atomic_load_explicit(&v->nmi.pending, memory_order_acquire);

	/* Behind one that is being handled only one more waits. Nobody else takes any away. */
	if (n > 1 && (v->nmi.masked || v->nmi.injected)) {
		n = 1;
		atomic_store_explicit(&v->nmi.pending, n, memory_order_relaxed);
	}
	return n;
}

/* More than two wait together only as two, whatever is being delivered. */
void kl_x86_nmi(struct kl_vcpu *v)
{
	uint32_t n = atomic_load_explicit(&v->nmi.pending, memory_order_relaxed);

	while (n < 2 && !atomic_compare_exchange_weak(&v->nmi.pending, &n, n + 1))
		;
	kl_vcpu_request(&v->core, KL_REQ_EVENT | KL_REQ_UNHALT);
}

bool kl_x86_has_xen_interrupt(struct kl_vcpu *v)
{
	return KL_UNLIKELY(atomic_load_explicit(&v->kvm->xen_vector, memory_order_relaxed) != 0) &&
	       v->apic && kl_pv_xen_interrupt(v);
}

bool kl_x86_has_pic_interrupt(struct kl_vcpu *v)
{
	if (!v->apic || !kl_apic_accepts_extint(v))
		return false;
	return kl_irqchip_in_kernel(v->kvm) ? kl_pic_pending(v->kvm) : v->ext_vector >= 0;
}

bool kl_x86_has_extint(struct kl_vcpu *v)
{
	return kl_x86_has_xen_interrupt(v) || kl_x86_has_pic_interrupt(v);
}

bool kl_x86_ready_for_interrupt(struct kl_vcpu *v)
{
	if (v->apic && (!kl_apic_accepts_extint(v) || kl_x86_has_extint(v)))
		return false;
	return (v->rflags & KL_FL_IF) && !v->int_shadow && !v->exc.pending && !v->exc.injected &&
	       !v->irq.injected && !v->nmi.injected;
}
