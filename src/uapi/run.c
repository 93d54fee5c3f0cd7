/* SPDX-License-Identifier: MIT */
/*
 * KVM_RUN: struct kvm_run to the engine and back.
 *
 * The program shares struct kvm_run and may write to it at any time, so every field is read
 * once, and what was read is what is used.
 */
#include <errno.h>
#include <string.h>

#include "base/config.h"
#include "base/log.h"
#include "host/sys.h"
#include "host/thread.h"
#include "uapi/object.h"
#include "x86/irqchip.h"

#define SYNC_FIELDS (KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS)

/* ---- in ---------------------------------------------------------------------------- */

static void sync_done(struct kvm_run *run, uint64_t field)
{
	kl_run_set(run->kvm_dirty_regs, kl_run_get(run->kvm_dirty_regs) & ~field);
}

static int sync_regs_in(struct kl_uvcpu *vc, uint64_t dirty)
{
	struct kvm_run *run = vc->run;

	if (dirty & KVM_SYNC_X86_REGS) {
		struct kvm_regs regs = run->s.regs.regs;

		kl_x86_set_regs(vc->v, &regs);
		sync_done(run, KVM_SYNC_X86_REGS);
	}
	if (dirty & KVM_SYNC_X86_SREGS) {
		struct kvm_sregs sregs = run->s.regs.sregs;

		if (kl_x86_set_sregs(vc->v, &sregs))
			return -EINVAL;
		sync_done(run, KVM_SYNC_X86_SREGS);
	}
	if (dirty & KVM_SYNC_X86_EVENTS) {
		struct kvm_vcpu_events events = run->s.regs.events;

		if (kl_x86_set_events(vc->v, &events))
			return -EINVAL;
		sync_done(run, KVM_SYNC_X86_EVENTS);
	}
	return 0;
}

/* The program's answer to the exit that it is coming back from. PIO data is in pio_data. */
static void take_answer(struct kl_vcpu *v, const struct kvm_run *run)
{
	switch (v->pending) {
	case KL_PENDING_MMIO_READ:
		memcpy(v->exit.mmio.data, run->mmio.data, sizeof(v->exit.mmio.data));
		break;
	case KL_PENDING_MSR:
		v->exit.msr.data = kl_run_get(run->msr.data);
		v->exit.msr.error = kl_run_get(run->msr.error);
		break;
	case KL_PENDING_HYPERCALL:
		v->exit.hypercall.ret = kl_run_get(run->hypercall.ret);
		break;
	case KL_PENDING_XEN:
		v->exit.xen.result = kl_run_get(run->xen.u.hcall.result);
		break;
	case KL_PENDING_HYPERV:
		v->exit.hyperv.result = kl_run_get(run->hyperv.u.hcall.result);
		break;
	default:
		break;
	}
}

static int settings_in(struct kl_uvcpu *vc)
{
	struct kvm_run *run = vc->run;
	uint64_t dirty = kl_run_get(run->kvm_dirty_regs);
	struct kl_vcpu *v = vc->v;
	int r;

	if ((kl_run_get(run->kvm_valid_regs) | dirty) & ~(uint64_t)SYNC_FIELDS)
		return -EINVAL;
	r = dirty ? sync_regs_in(vc, dirty) : 0;
	if (r)
		return r;
	if (!v->apic) {
		uint64_t cr8 = kl_run_get(run->cr8);

		if (cr8 > 15)
			return -EINVAL;
		v->cr8 = cr8;
	}
	v->request_interrupt_window =
		!kl_irqchip_in_kernel(&vc->vm->kvm) && kl_run_get(run->request_interrupt_window);
	return 0;
}

/* ---- out --------------------------------------------------------------------------- */

static void mmio_out(struct kvm_run *run, const struct kl_exit *e)
{
	run->mmio.phys_addr = e->mmio.gpa;
	run->mmio.len = e->mmio.len;
	run->mmio.is_write = e->mmio.is_write;
	if (e->mmio.is_write)
		memcpy(run->mmio.data, e->mmio.data, sizeof(run->mmio.data));
}

/*
 * An emulation failure's data: flags, then the instruction's bytes if they are known, then
 * five words that describe the hardware's exit (there is no hardware: 0), then the engine's.
 */
static void emulation_failure_out(struct kvm_run *run, const struct kl_exit *e)
{
	enum { NR_EXIT_INFO = 5 };
	unsigned n = 1, room;

	memset(run->internal.data, 0, sizeof(run->internal.data));
	if (e->internal.insn_len) {
		unsigned len = kl_min((size_t)e->internal.insn_len,
				      sizeof(run->emulation_failure.insn_bytes));

		run->emulation_failure.flags = KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES;
		run->emulation_failure.insn_size = (uint8_t)len;
		memset(run->emulation_failure.insn_bytes, 0x90,
		       sizeof(run->emulation_failure.insn_bytes));
		memcpy(run->emulation_failure.insn_bytes, e->internal.insn, len);
		n += 2;
	}
	n += NR_EXIT_INFO;
	room = KL_ARRAY_SIZE(run->internal.data) - n;
	room = kl_min(room, e->internal.ndata);
	memcpy(&run->internal.data[n], e->internal.data, room * sizeof(run->internal.data[0]));
	run->emulation_failure.ndata = n + room;
}

static void internal_out(struct kvm_run *run, const struct kl_exit *e)
{
	unsigned n = kl_min((size_t)e->internal.ndata, KL_ARRAY_SIZE(run->internal.data));

	run->internal.suberror = e->internal.suberror;
	if (e->internal.suberror == KVM_INTERNAL_ERROR_EMULATION) {
		emulation_failure_out(run, e);
		return;
	}
	run->internal.ndata = n;
	memcpy(run->internal.data, e->internal.data, n * sizeof(run->internal.data[0]));
}

void kl_memory_fault_out(struct kvm_run *run, const struct kl_vcpu *v)
{
	const struct kl_uapi_memory_fault m = {
		.flags = v->core.memory_fault_private ? KVM_MEMORY_EXIT_FLAG_PRIVATE : 0,
		.gpa = v->core.memory_fault_gpa,
		.size = KL_PAGE_SIZE,
	};

	run->exit_reason = KVM_EXIT_MEMORY_FAULT;
	memcpy(run->padding, &m, sizeof(m)); /* the union */
}

static void exit_out(struct kvm_run *run, const struct kl_exit *e)
{
	run->exit_reason = e->reason;
	switch (e->reason) {
	case KVM_EXIT_IO:
		run->io.direction = e->io.in ? KVM_EXIT_IO_IN : KVM_EXIT_IO_OUT;
		run->io.size = e->io.size;
		run->io.port = e->io.port;
		run->io.count = e->io.count;
		run->io.data_offset = KL_PIO_PAGE * KL_PAGE_SIZE;
		break;
	case KVM_EXIT_MMIO:
		mmio_out(run, e);
		break;
	case KVM_EXIT_X86_RDMSR:
	case KVM_EXIT_X86_WRMSR:
		run->msr.error = 0;
		memset(run->msr.pad, 0, sizeof(run->msr.pad));
		run->msr.reason = e->msr.why;
		run->msr.index = e->msr.index;
		run->msr.data = e->msr.data;
		break;
	case KVM_EXIT_INTERNAL_ERROR:
		internal_out(run, e);
		break;
	case KVM_EXIT_FAIL_ENTRY:
		run->fail_entry.hardware_entry_failure_reason =
			e->fail_entry.hardware_entry_failure_reason;
		run->fail_entry.cpu = e->fail_entry.cpu;
		break;
	case KVM_EXIT_HYPERCALL:
		run->hypercall.nr = e->hypercall.nr;
		memcpy(run->hypercall.args, e->hypercall.args, 3 * sizeof(run->hypercall.args[0]));
		run->hypercall.ret = 0;
		run->hypercall.longmode = e->hypercall.longmode;
		run->hypercall.pad = 0;
		break;
	case KVM_EXIT_XEN: /* the result is what it was */
		run->xen.type = KVM_EXIT_XEN_HCALL;
		run->xen.u.hcall.longmode = e->xen.longmode;
		run->xen.u.hcall.cpl = e->xen.cpl;
		run->xen.u.hcall.input = e->xen.input;
		memcpy(run->xen.u.hcall.params, e->xen.params, sizeof(e->xen.params));
		break;
	case KVM_EXIT_HYPERV: /* likewise */
		run->hyperv.type = KVM_EXIT_HYPERV_HCALL;
		run->hyperv.u.hcall.input = e->hyperv.input;
		memcpy(run->hyperv.u.hcall.params, e->hyperv.params, sizeof(e->hyperv.params));
		break;
	case KVM_EXIT_SYSTEM_EVENT:
		run->system_event.type = e->system_event;
		run->system_event.ndata = 0;
		break;
	case KVM_EXIT_IOAPIC_EOI:
		run->eoi.vector = e->eoi_vector;
		break;
	case KVM_EXIT_TPR_ACCESS:
		run->tpr_access.rip = e->tpr_access.rip;
		run->tpr_access.is_write = e->tpr_access.is_write;
		break;
	case KVM_EXIT_DEBUG:
		run->debug.arch.exception = e->debug.exception;
		run->debug.arch.pc = e->debug.pc;
		if (e->debug.exception != KL_EXC_DB)
			break; /* KVM leaves the rest what it was */
		run->debug.arch.dr6 = e->debug.dr6;
		run->debug.arch.dr7 = e->debug.dr7;
		break;
	default: /* the reason says it all */
		break;
	}
}

/* What KVM writes after each KVM_RUN, however it ended. */
static void state_out(struct kl_uvcpu *vc)
{
	struct kvm_run *run = vc->run;
	struct kl_vcpu *v = vc->v;
	uint64_t want = kl_run_get(run->kvm_valid_regs);

	if (KL_UNLIKELY(want)) {
		if (want & KVM_SYNC_X86_REGS)
			kl_x86_get_regs(v, &run->s.regs.regs);
		if (want & KVM_SYNC_X86_SREGS)
			kl_x86_get_sregs(v, &run->s.regs.sregs);
		if (want & KVM_SYNC_X86_EVENTS)
			kl_x86_get_events(v, &run->s.regs.events);
	}
	run->if_flag = !!(v->rflags & KL_FL_IF);
	run->cr8 = kl_x86_get_cr8(v);
	run->apic_base = v->apic_base;
	run->ready_for_interrupt_injection =
		kl_irqchip_in_kernel(&vc->vm->kvm) || kl_x86_ready_for_interrupt(v);
}

static void trace_exit(const struct kl_uvcpu *vc, int r)
{
	const struct kl_exit *e = &vc->v->exit;
	unsigned long vm = (unsigned long)vc->vm->kvm.mem.serial;

	if (r) {
		kl_trace_write("exit vm%lu vcpu%u error=%d", vm, vc->id, r);
		return;
	}
	switch (e->reason) {
	case KVM_EXIT_IO:
		kl_trace_write("exit vm%lu vcpu%u IO %s port=0x%x size=%u count=%u", vm, vc->id,
			       e->io.in ? "in" : "out", e->io.port, e->io.size, e->io.count);
		break;
	case KVM_EXIT_MMIO:
		kl_trace_write("exit vm%lu vcpu%u MMIO %s gpa=0x%lx len=%u", vm, vc->id,
			       e->mmio.is_write ? "write" : "read", (unsigned long)e->mmio.gpa,
			       e->mmio.len);
		break;
	case KVM_EXIT_X86_RDMSR:
	case KVM_EXIT_X86_WRMSR:
		kl_trace_write("exit vm%lu vcpu%u %s index=0x%x why=0x%x", vm, vc->id,
			       kl_exit_name(e->reason), e->msr.index, e->msr.why);
		break;
	case KVM_EXIT_HYPERCALL:
		kl_trace_write(
			"exit vm%lu vcpu%u HYPERCALL nr=%lu args=0x%lx,0x%lx,0x%lx", vm, vc->id,
			(unsigned long)e->hypercall.nr, (unsigned long)e->hypercall.args[0],
			(unsigned long)e->hypercall.args[1], (unsigned long)e->hypercall.args[2]);
		break;
	case KVM_EXIT_XEN:
		kl_trace_write("exit vm%lu vcpu%u XEN input=%lu params=0x%lx,0x%lx,0x%lx", vm,
			       vc->id, (unsigned long)e->xen.input, (unsigned long)e->xen.params[0],
			       (unsigned long)e->xen.params[1], (unsigned long)e->xen.params[2]);
		break;
	case KVM_EXIT_HYPERV:
		kl_trace_write("exit vm%lu vcpu%u HYPERV input=0x%lx params=0x%lx,0x%lx", vm,
			       vc->id, (unsigned long)e->hyperv.input,
			       (unsigned long)e->hyperv.params[0],
			       (unsigned long)e->hyperv.params[1]);
		break;
	case KVM_EXIT_TPR_ACCESS:
		kl_trace_write("exit vm%lu vcpu%u TPR_ACCESS %s rip=0x%lx", vm, vc->id,
			       e->tpr_access.is_write ? "write" : "read",
			       (unsigned long)e->tpr_access.rip);
		break;
	case KVM_EXIT_INTERNAL_ERROR:
		kl_trace_write("exit vm%lu vcpu%u INTERNAL_ERROR suberror=%u rip=0x%lx", vm, vc->id,
			       e->internal.suberror, (unsigned long)vc->v->rip);
		break;
	default:
		kl_trace_write("exit vm%lu vcpu%u %s", vm, vc->id, kl_exit_name(e->reason));
		break;
	}
}

/* ---- KVM_RUN ----------------------------------------------------------------------- */

static int enter(struct kl_uvcpu *vc)
{
	struct kvm_run *run = vc->run;
	struct kl_vcpu *v = vc->v;
	uint32_t mp_state = atomic_load_explicit(&v->mp_state, memory_order_relaxed);
	int r = 0;

	/* Nothing is read from a vCPU's kvm_run before its INIT. */
	if (KL_LIKELY(mp_state != KVM_MP_STATE_UNINITIALIZED)) {
		r = settings_in(vc);
		if (r)
			return r;
		take_answer(v, run);
	}
	r = kl_x86_run(v);
	if (r == -EHWPOISON && !v->core.memory_fault && kl_thread_poisoned(kl_self.fault_addr))
		r = -EINTR;
	if (KL_LIKELY(!r)) {
		exit_out(run, &v->exit);
		if (v->exit.reason < KL_NR_EXIT_REASONS)
			kl_stat_own_add(&vc->counts.by_reason[v->exit.reason], 1);
	} else if (r == -EINTR) {
		/* immediate_exit leaves everything as it was. */
		if (!v->immediate_exit) {
			run->exit_reason = KVM_EXIT_INTR;
			kl_stat_own_add(&vc->counts.by_reason[KVM_EXIT_INTR], 1);
		}
	} else if (r != -EAGAIN) {
		run->exit_reason = KVM_EXIT_UNKNOWN;
		if (v->core.memory_fault)
			kl_memory_fault_out(run, v);
		kl_stat_own_add(&vc->counts.by_reason[run->exit_reason], 1);
	}
	if (KL_UNLIKELY(kl_trace_on))
		trace_exit(vc, r);
	return r;
}

int kl_uvcpu_run(struct kl_uvcpu *vc)
{
	uint64_t start = KL_UNLIKELY(kl_config.stats) ? kl_trace_ns() : 0;
	bool masked = vc->sigmask_set;
	uint64_t old_mask = 0;
	int r;

	vc->v->immediate_exit = kl_run_get(vc->run->immediate_exit);
	if (KL_UNLIKELY(masked))
		kl_thread_mask_begin(vc->sigmask, &old_mask);
	vc->run->flags = 0;
	vc->v->core.memory_fault = false;
	r = enter(vc);
	state_out(vc);
	if (KL_UNLIKELY(masked))
		kl_thread_mask_end(old_mask);
	if (KL_UNLIKELY(start))
		kl_stat_own_add(&vc->counts.run_ns, kl_trace_ns() - start);
	return r;
}
