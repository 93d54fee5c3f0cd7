/* SPDX-License-Identifier: MIT */
/*
 * KVM_RUN: completion of the last exit, requests, events, halt, and the loop that enters the
 * guest.
 *
 * Guest code, event delivery and the completion of an instruction all run through
 * protected(): it sets the jmp_buf that kl_leave() and the memory guard return to, goes
 * IN_GUEST and comes back OUTSIDE. Everything else here is OUTSIDE and may sleep.
 *
 * A step function returns STEP_ON (go on), STEP_EXIT (v->exit is filled) or -errno.
 */
#include <errno.h>
#include <string.h>

#include "base/log.h"
#include "host/cpu.h"
#include "host/sys.h"
#include "mem/dirty_ring.h"
#include "x86/access.h"
#include "x86/block.h"
#include "x86/code.h"
#include "x86/debug.h"
#include "x86/fpu.h"
#include "x86/hypercall.h"
#include "x86/insn.h"
#include "x86/irqchip.h"
#include "x86/lapic.h"
#include "x86/msr.h"
#include "x86/paravirt.h"
#include "x86/segment.h"
#include "x86/task.h"

#define STEP_EXIT 0
#define STEP_ON   1

static bool single_step(const struct kl_vcpu *v)
{
	return v->debug.control & KVM_GUESTDBG_SINGLESTEP;
}

/* The instruction that exited is done: step over it. */
static void skip(struct kl_vcpu *v)
{
	uint64_t rip = v->rip + v->pending_len;

	v->rip = v->code_mode == KL_CODE64   ? rip
		 : v->code_mode == KL_CODE32 ? (uint32_t)rip
					     : (uint16_t)rip;
	v->int_shadow = 0;
	v->rflags &= ~(uint64_t)KL_FL_RF;
	kl_debug_done(v, (v->rflags & KL_FL_TF) || single_step(v));
}

/* ---- exits ---- */

/* The engine's own devices. 0, or -EOPNOTSUPP: none is there. */
static int own_mmio(struct kl_vcpu *v, struct kl_mmio_fragment *f)
{
	struct kl_x86_vm *vm = v->kvm;

	if (v->apic && !kl_apic_mmio(v, f->gpa, f->len, f->data, f->is_write))
		return 0;
	if (!kl_irqchip_mmio(vm, f->gpa, f->len, f->data, f->is_write))
		return 0;
	return f->is_write && vm->io_write ? vm->io_write(vm, false, f->gpa, f->len, f->data)
					   : -EOPNOTSUPP;
}

static int own_port(struct kl_vcpu *v, uint16_t port, unsigned size, uint8_t *data, bool write)
{
	struct kl_x86_vm *vm = v->kvm;

	if (!kl_irqchip_pio(vm, port, size, data, write))
		return 0;
	return write && vm->io_write ? vm->io_write(vm, true, port, size, data) : -EOPNOTSUPP;
}

static void mmio_clear(struct kl_vcpu *v)
{
	v->nr_mmio = v->cur_mmio = v->mmio_used = 0;
	v->mmio_replay = false;
}

/* The next fragment that the program must see. False: none is left. */
static bool mmio_exit(struct kl_vcpu *v)
{
	for (; v->cur_mmio < v->nr_mmio; v->cur_mmio++) {
		struct kl_mmio_fragment *f = &v->mmio[v->cur_mmio];

		if (f->done)
			continue;
		if (!own_mmio(v, f)) {
			f->done = true;
			continue;
		}
		v->exit.reason = KVM_EXIT_MMIO;
		v->exit.mmio.gpa = f->gpa;
		v->exit.mmio.len = f->len;
		v->exit.mmio.is_write = f->is_write;
		memset(v->exit.mmio.data, 0, sizeof(v->exit.mmio.data));
		memcpy(v->exit.mmio.data, f->data, f->len);
		v->pending = f->is_write ? KL_PENDING_MMIO_WRITE : KL_PENDING_MMIO_READ;
		kl_stat_own_add(&v->core.stats.mmio_exits, 1);
		return true;
	}
	return false;
}

static void complete_in(struct kl_vcpu *v)
{
	uint32_t val = 0;

	memcpy(&val, v->pio_data, v->pending_size);
	kl_gpr_set(v, KL_RAX * 8, val, v->pending_size);
}

/* All elements of an access to a device of the engine. False: it is the program's. */
static bool own_pio(struct kl_vcpu *v)
{
	unsigned size = v->exit.io.size;

	for (unsigned i = 0; i < v->exit.io.count; i++) {
		uint8_t *data = v->pio_data + i * size;

		/* If the device goes away in between, the rest reads 0. */
		if (own_port(v, v->exit.io.port, size, data, !v->exit.io.in) && !i)
			return false;
	}
	return true;
}

static int pio_exit(struct kl_vcpu *v)
{
	enum kl_pending pending = v->pending;

	if (own_pio(v)) {
		v->pending = KL_PENDING_NONE;
		if (pending == KL_PENDING_PIO_IN)
			complete_in(v);
		if (pending == KL_PENDING_PIO_STRING) { /* the loop runs it again */
			v->pio_left = v->exit.io.count;
			v->pio_pos = 0;
		} else if (pending != KL_PENDING_NONE) {
			skip(v);
		}
		return STEP_ON;
	}
	kl_stat_own_add(&v->core.stats.io_exits, 1);
	/* Some programs rely on rIP being past an OUT to this port when it exits. */
	if (pending == KL_PENDING_PIO_OUT && v->exit.io.port == 0x7e &&
	    !(v->kvm->disabled_quirks & KL_QUIRK_OUT_7E_INC_RIP)) {
		v->pending = KL_PENDING_NONE;
		skip(v);
	}
	return STEP_EXIT;
}

/* An instruction has finished and asked for an exit, or left for one. */
static int take_exit(struct kl_vcpu *v)
{
	v->exit_pending = false;
	if (v->nr_mmio) {
		kl_stat_own_add(&v->core.stats.insn_emulation, 1);
		v->cur_mmio = 0;
		if (mmio_exit(v))
			return STEP_EXIT;
		mmio_clear(v);
		return STEP_ON;
	}
	return v->exit.reason == KVM_EXIT_IO ? pio_exit(v) : STEP_EXIT;
}

/* ---- in and out of the guest ---- */

/*
 * Run @fn IN_GUEST. Returns 0, or why it left: enum kl_leave or enum kl_guard_reason.
 * Context: OUTSIDE, before and after.
 */
static KL_NOINLINE int protected(struct kl_vcpu *v, void (*fn)(struct kl_vcpu *))
{
	int why;

	kl_self.guard = &v->jmp;
	why = _setjmp(v->jmp);
	if (!why) {
		v->in_run = true;
		kl_vcpu_enter_guest(&v->core);
		if (kl_vcpu_requests(&v->core) & KL_REQ_TLB_FLUSH)
			kl_serve_flush(v);
		fn(v);
	}
	kl_vcpu_leave_guest(&v->core);
	if (KL_UNLIKELY(v->core.alone))
		kl_vcpus_go(&v->core);
	kl_self.guard = NULL;
	kl_self.generated = NULL; /* it belongs to the vCPU */
	if (why) {
		v->nr_notes = 0;
		kl_interp_settle(v);
		v->bp.hit = 0; /* the instruction did not finish */
		if (KL_UNLIKELY(v->task_undo.valid) && why != KL_LEAVE_EXCEPTION)
			kl_task_undo(v);
		v->task_undo.valid = false;
	}
	v->in_run = false;
	v->delivering = false;
	v->bp.held = false;
	return why;
}

/* The instruction did not finish: forget what it recorded, keep the answers it waits for. */
static void abandon(struct kl_vcpu *v)
{
	unsigned n = 0;

	v->exit_pending = false;
	if (!v->mmio_replay) {
		mmio_clear(v);
		return;
	}
	while (n < v->nr_mmio && v->mmio[n].done && !v->mmio[n].is_write)
		n++;
	v->nr_mmio = v->cur_mmio = n;
	v->mmio_used = 0;
	v->pending = KL_PENDING_MMIO_READ;
}

/* A handler left to exit: to the program, or with an error. */
static int left_to_exit(struct kl_vcpu *v)
{
	int r = v->exit_errno;

	if (r) {
		v->exit_errno = 0;
		abandon(v);
		if (r == -EINTR)
			kl_stat_own_add(&v->core.stats.signal_exits, 1);
		if (v->pio_left)
			v->pending = KL_PENDING_PIO_STRING;
		if (r != -ENOBUFS)
			return r;
		/* Nor can the page be written before the ring has room. */
		v->exit.reason = KVM_EXIT_DIRTY_RING_FULL;
		return STEP_EXIT;
	}
	v->exit_pending = false;
	if (v->pending == KL_PENDING_MMIO_READ) {
		/* Stores before the read are made again when the instruction is. */
		unsigned n = 0;

		for (unsigned i = 0; i < v->nr_mmio; i++)
			if (!v->mmio[i].is_write)
				v->mmio[n++] = v->mmio[i];
		v->nr_mmio = n;
		v->cur_mmio = 0;
		kl_stat_own_add(&v->core.stats.insn_emulation, 1);
		if (mmio_exit(v))
			return STEP_EXIT;
		/* The engine's devices have answered all of them. */
		v->pending = KL_PENDING_NONE;
		v->mmio_replay = true;
		return STEP_ON;
	}
	mmio_clear(v);
	v->pio_left = 0;
	return STEP_EXIT;
}

/* What protected() came back with. */
static int sort_out(struct kl_vcpu *v, int why)
{
	int r;

	switch (why) {
	case 0:
		return STEP_ON;
	case KL_LEAVE_EXIT:
		return left_to_exit(v);
	case KL_LEAVE_EXCEPTION:
		v->exit_pending = false;
		mmio_clear(v);
		v->pio_left = 0;
		v->pending = KL_PENDING_NONE;
		return STEP_ON;
	case KL_GUARD_FAULT:
	case KL_GUARD_HWPOISON:
		abandon(v);
		r = kl_host_page_vanished(v, kl_self.fault_addr, why == KL_GUARD_HWPOISON);
		return r ? r : STEP_ON;
	default: /* KL_LEAVE_RESTART, KL_GUARD_INTR */
		abandon(v);
		return STEP_ON;
	}
}

/* ---- events ---- */

static bool is_fault(unsigned nr)
{
	return nr != KL_EXC_DB && nr != KL_EXC_BP && nr != KL_EXC_OF && nr != KL_EXC_DF &&
	       nr != KL_EXC_MC && nr != 2;
}

/* A pending exception is about to be delivered: its side effects. */
static void begin_exception(struct kl_vcpu *v)
{
	struct kl_event_exception *e = &v->exc;

	if (is_fault(e->nr))
		v->rflags |= KL_FL_RF;
	if (e->nr == KL_EXC_DB)
		v->dr7 &= ~(uint64_t)KL_DR7_GD;
	kl_x86_apply_payload(v);
	e->pending = false;
	e->injected = true;
}

/* No event is in the way of an interrupt. */
static bool interrupts_allowed(struct kl_vcpu *v)
{
	return (v->rflags & KL_FL_IF) && !v->int_shadow;
}

static int take_extint(struct kl_vcpu *v)
{
	int vector = v->ext_vector;

	if (kl_irqchip_in_kernel(v->kvm))
		return kl_pic_ack(v->kvm);
	v->ext_vector = -1;
	return vector;
}

/* An interrupt by way of the APIC is to be delivered now; then it is acknowledged. */
static bool next_interrupt(struct kl_vcpu *v)
{
	int vector;

	if (!interrupts_allowed(v))
		return false;
	/* Looked at once: what is not there any more must not look like the PIC's. */
	if (kl_x86_has_xen_interrupt(v)) {
		vector = v->kvm->xen_vector;
		if (!vector)
			return false;
	} else if (kl_x86_has_pic_interrupt(v)) {
		vector = take_extint(v);
		if (vector < 0)
			return false;
	} else {
		vector = kl_apic_interrupt(v);
		if (vector < 0)
			return false;
		kl_apic_ack(v, (unsigned)vector);
	}
	v->irq.injected = true;
	v->irq.soft = false;
	v->irq.nr = (uint8_t)vector;
	return true;
}

/* True if something is to be delivered now; then it is marked as begun. */
static bool next_event(struct kl_vcpu *v)
{
	uint32_t n;

	if (v->exc.injected)
		return true;
	if (v->exc.pending) {
		begin_exception(v);
		return true;
	}
	if (v->nmi.injected || v->irq.injected)
		return true;
	n = kl_x86_nmis_waiting(v);
	if (kl_debug_blocks_irq(v))
		return false;
	if (KL_LIKELY(!n || v->nmi.masked || v->int_shadow))
		return v->apic && next_interrupt(v);
	atomic_fetch_sub_explicit(&v->nmi.pending, 1, memory_order_acq_rel);
	v->nmi.injected = true;
	return true;
}

/* The program hands INT3 or INTO back: the frame has the address behind it. */
static uint64_t behind_instruction(struct kl_vcpu *v)
{
	const struct kl_op *op;

	v->bp.held = true;
	op = kl_block_one(v);
	v->bp.held = false;
	return kl_next_rip(v, op);
}

static void deliver_event(struct kl_vcpu *v)
{
	v->pio_left = 0;
	v->same_epoch = false;
	if (v->exc.injected) {
		struct kl_event_exception e = v->exc;
		bool soft = e.nr == KL_EXC_BP || e.nr == KL_EXC_OF;

		kl_x86_deliver(v, e.nr, e.has_error, e.error, false,
			       soft ? behind_instruction(v) : v->rip);
		v->exc.injected = false;
	} else if (v->nmi.injected) {
		v->nmi.masked = true;
		kl_x86_deliver(v, 2, false, 0, false, v->rip);
		v->nmi.injected = false;
		kl_stat_own_add(&v->core.stats.nmi_injections, 1);
	} else {
		kl_x86_deliver(v, v->irq.nr, false, 0, v->irq.soft, v->rip);
		v->irq.injected = false;
		kl_stat_own_add(&v->core.stats.irq_injections, 1);
	}
}

/* ---- one instruction ---- */

static bool must_step(struct kl_vcpu *v)
{
	return v->int_shadow || (v->rflags & KL_FL_TF) || v->mmio_replay || v->pio_left ||
	       single_step(v);
}

/* INT and SYSCALL clear TF for what follows: no trap behind them. */
static bool vectors(const struct kl_op *op)
{
	return op && (op->fn == kl_op_int_n || op->fn == kl_op_int3 || op->fn == kl_op_int1 ||
		      op->fn == kl_op_into || op->fn == kl_op_syscall);
}

/* Is an access to a port or the like not over yet? skip() does the rest when it is. */
static bool unfinished(const struct kl_vcpu *v)
{
	return v->exit_pending && v->pending != KL_PENDING_NONE;
}

static int step(struct kl_vcpu *v)
{
	bool tf = v->rflags & KL_FL_TF;
	uint8_t shadow = v->int_shadow;
	int why;

	v->int_shadow = 0;
	v->mmio_used = 0;
	v->cur_op = NULL;
	v->bp.held = shadow & KVM_X86_SHADOW_INT_MOV_SS;
	v->shadowed = shadow;
	why = protected(v, kl_interp_one);
	v->shadowed = false;
	if (why) {
		if (why != KL_LEAVE_EXCEPTION)
			v->int_shadow = shadow;
		return sort_out(v, why);
	}
	if (v->mmio_replay) {
		/* Its reads are consumed; only stores are left to exit with. */
		for (unsigned i = 0; i < v->nr_mmio; i++)
			v->mmio[i].done |= !v->mmio[i].is_write;
		v->mmio_replay = false;
		if (!v->exit_pending)
			mmio_clear(v);
	}
	if (!unfinished(v))
		kl_debug_done(v, ((tf && !vectors(v->cur_op)) || single_step(v)) &&
					 v->int_shadow != KVM_X86_SHADOW_INT_MOV_SS);
	return v->exit_pending ? take_exit(v) : STEP_ON;
}

static int run_guest(struct kl_vcpu *v)
{
	int why;

	v->mmio_used = 0;
	v->cur_op = NULL;
	why = protected(v, kl_interp_run);
	if (why)
		return sort_out(v, why);
	if (KL_UNLIKELY(v->bp.hit) && !unfinished(v)) {
		/* Between iterations: no instruction breakpoint when it goes on. */
		if (v->rip == v->bp.hit_rip && (v->cur_op->flags & (KL_OPF_REP | KL_OPF_REPNE)))
			v->rflags |= KL_FL_RF;
		kl_debug_done(v, false);
	}
	return v->exit_pending ? take_exit(v) : STEP_ON;
}

/* ---- completion of the last exit ---- */

static bool signal_pending(struct kl_vcpu *v)
{
	return kl_self.sig_pending || (kl_vcpu_requests(&v->core) & KL_REQ_SIGNAL);
}

/* The instruction again, with its answers. Only a signal while it has to wait stops it. */
static int replay(struct kl_vcpu *v)
{
	for (;;) {
		uint64_t rip = v->rip;
		int r = step(v);

		if (r != STEP_ON)
			return r;
		if (!v->mmio_replay && !(v->pio_left && v->rip == rip && v->pio_pos == 0)) {
			v->pending = KL_PENDING_NONE;
			return STEP_ON;
		}
		if (kl_vcpu_requests(&v->core) & KL_REQ_VM_DEAD)
			return -EIO;
		if (signal_pending(v)) {
			v->pending = v->mmio_replay ? KL_PENDING_MMIO_READ : KL_PENDING_PIO_STRING;
			return -EINTR;
		}
	}
}

static int complete_mmio(struct kl_vcpu *v, bool read)
{
	if (v->cur_mmio < v->nr_mmio) {
		struct kl_mmio_fragment *f = &v->mmio[v->cur_mmio++];

		if (read)
			memcpy(f->data, v->exit.mmio.data, f->len);
		f->done = true;
		if (mmio_exit(v))
			return STEP_EXIT;
	}
	if (!read) {
		mmio_clear(v);
		return STEP_ON;
	}
	v->mmio_replay = true;
	return replay(v);
}

static int complete(struct kl_vcpu *v)
{
	enum kl_pending pending = v->pending;
	/* The program may have moved rIP away from a port access, and that is the end of it. */
	bool same = v->pending_rip == v->rip + (v->long_mode ? 0 : v->seg[KL_CS].base);

	v->pending = KL_PENDING_NONE;
	if (!same)
		v->bp.hit = 0;
	switch (pending) {
	case KL_PENDING_PIO_IN:
		if (same) {
			complete_in(v);
			skip(v);
		}
		return STEP_ON;
	case KL_PENDING_PIO_OUT:
		if (same)
			skip(v);
		return STEP_ON;
	case KL_PENDING_PIO_STRING:
		if (!v->pio_left) {
			v->pio_left = v->exit.io.count;
			v->pio_pos = 0;
		}
		if (!same) {
			v->pio_left = 0;
			return STEP_ON;
		}
		return replay(v);
	case KL_PENDING_MMIO_READ:
		return complete_mmio(v, true);
	case KL_PENDING_MMIO_WRITE:
		return complete_mmio(v, false);
	case KL_PENDING_MSR:
		if (kl_msr_complete(v))
			skip(v);
		return STEP_ON;
	case KL_PENDING_HYPERCALL:
		kl_hypercall_complete(v);
		skip(v);
		return STEP_ON;
	case KL_PENDING_XEN:
		if (same) {
			kl_hypercall_complete_xen(v);
			skip(v);
		}
		return STEP_ON;
	case KL_PENDING_HYPERV:
		kl_hypercall_complete_hyperv(v);
		skip(v);
		return STEP_ON;
	default:
		return STEP_ON;
	}
}

/* ---- waiting ---- */

static uint32_t mp_state(struct kl_vcpu *v)
{
	return atomic_load_explicit(&v->mp_state, memory_order_relaxed);
}

static void set_mp_state(struct kl_vcpu *v, uint32_t state)
{
	atomic_store_explicit(&v->mp_state, state, memory_order_relaxed);
}

static bool has_event(struct kl_vcpu *v)
{
	if (v->exc.pending || v->exc.injected || v->irq.injected || v->nmi.injected)
		return true;
	if (atomic_load(&v->unhalted))
		return true;
	if (atomic_load_explicit(&v->nmi.pending, memory_order_acquire) && !v->nmi.masked)
		return true;
	return v->apic && interrupts_allowed(v) &&
	       (kl_x86_has_extint(v) || kl_apic_interrupt(v) >= 0);
}

/* What was sent to the APIC and is not an interrupt yet. */
static void poll_apic(struct kl_vcpu *v)
{
	kl_apic_accept_events(v);
	if (kl_apic_timer_due(v))
		kl_apic_inject_timer(v);
}

/* HLT, or what a program that emulates it has set. */
static bool waits_for_event(struct kl_vcpu *v)
{
	return mp_state(v) == KVM_MP_STATE_HALTED || mp_state(v) == KVM_MP_STATE_AP_RESET_HOLD;
}

static int interrupted(struct kl_vcpu *v)
{
	kl_stat_own_add(&v->core.stats.signal_exits, 1);
	return -EINTR;
}

/* Requests and signals. 0 or -errno. */
static int poll_requests(struct kl_vcpu *v)
{
	uint32_t req = kl_vcpu_requests(&v->core);

	v->same_epoch &= !req;
	if (KL_UNLIKELY(req & KL_REQ_VM_DEAD))
		return -EIO;
	if (KL_UNLIKELY(signal_pending(v)))
		return interrupted(v);
	if (req & (KL_REQ_EVENT | KL_REQ_UNHALT | KL_REQ_STOP)) {
		req |= kl_vcpu_take_requests(&v->core, KL_REQ_EVENT | KL_REQ_UNHALT | KL_REQ_STOP);
		kl_stat_own_add(&v->core.stats.request_exits, 1);
		if ((req & KL_REQ_UNHALT) && waits_for_event(v))
			set_mp_state(v, KVM_MP_STATE_RUNNABLE);
	}
	if (KL_UNLIKELY(req & KL_REQ_CODE)) {
		kl_vcpu_take_requests(&v->core, KL_REQ_CODE);
		kl_code_reap(v->kvm);
	}
	if (KL_UNLIKELY(req & KL_REQ_PV)) {
		kl_vcpu_take_requests(&v->core, KL_REQ_PV);
		if (kl_pv_update(v))
			return interrupted(v);
	}
	return 0;
}

/* The program is asked to empty the dirty ring, and again until it does. */
static bool ring_is_full(struct kl_vcpu *v)
{
	struct kl_dirty_ring *ring = atomic_load_explicit(&v->core.ring, memory_order_relaxed);

	kl_vcpu_take_requests(&v->core, KL_REQ_RING_FULL);
	if (!kl_dirty_ring_soft_full(ring))
		return false;
	v->exit.reason = KVM_EXIT_DIRTY_RING_FULL;
	kl_vcpu_request(&v->core, KL_REQ_RING_FULL);
	return true;
}

/* Sleep until the vCPU is runnable, or its ring is full. 0 or -errno. */
static int block(struct kl_vcpu *v)
{
	for (;;) {
		int r = poll_requests(v);

		if (r || (kl_vcpu_requests(&v->core) & KL_REQ_RING_FULL))
			return r;
		if (v->apic)
			poll_apic(v);
		if (waits_for_event(v) && has_event(v)) {
			atomic_store(&v->unhalted, false);
			set_mp_state(v, KVM_MP_STATE_RUNNABLE);
		}
		if (mp_state(v) == KVM_MP_STATE_RUNNABLE)
			return 0;
		/* What is sent from here on has set a request, and the sleep ends at once. */
		racepoint("vcpu-halts");
		kl_vcpu_sleep(&v->core);
	}
}

void kl_x86_wait(struct kl_vcpu *v, const _Atomic bool *waiting)
{
	uint32_t old = mp_state(v);

	if (v->pv_eoi_pending)
		(void)kl_pv_eoi_from_guest(v);
	if (v->vapic_lent)
		(void)kl_pv_vapic_from_guest(v);
	set_mp_state(v, KVM_MP_STATE_HALTED);
	for (;;) {
		if ((kl_vcpu_requests(&v->core) &
		     (KL_REQ_VM_DEAD | KL_REQ_PV | KL_REQ_RING_FULL)) ||
		    signal_pending(v))
			break;
		/* First: what comes after the looks sets it again. */
		kl_vcpu_take_requests(&v->core, KL_REQ_EVENT | KL_REQ_UNHALT | KL_REQ_STOP);
		if (v->apic && kl_apic_timer_due(v))
			kl_apic_inject_timer(v);
		if (!atomic_load(waiting) || has_event(v) ||
		    (v->apic && kl_apic_has_init_or_sipi(v)))
			break;
		racepoint("vcpu-waits");
		kl_vcpu_sleep(&v->core);
	}
	set_mp_state(v, old);
	/* The guest goes on behind the hypercall only if there is none. */
	kl_vcpu_request(&v->core, KL_REQ_EVENT);
}

/* Before INIT: one wait, then the program decides. */
static int block_uninitialized(struct kl_vcpu *v)
{
	if (v->immediate_exit)
		return -EINTR;
	for (;;) {
		if (kl_vcpu_requests(&v->core) & KL_REQ_VM_DEAD)
			return -EIO;
		if (signal_pending(v))
			return interrupted(v);
		/* First: what comes after the look sets it again. */
		kl_vcpu_take_requests(&v->core,
				      KL_REQ_EVENT | KL_REQ_UNHALT | KL_REQ_PV | KL_REQ_RING_FULL);
		if (has_event(v) || kl_apic_has_init_or_sipi(v))
			break;
		racepoint("vcpu-uninitialized");
		kl_vcpu_sleep(&v->core);
	}
	kl_apic_accept_events(v);
	return -EAGAIN;
}

/* ---- the loop ---- */

static int halted(struct kl_vcpu *v)
{
	kl_stat_own_add(&v->core.stats.halt_exits, 1);
	if (v->apic || (v->kvm->disabled_exits & KVM_X86_DISABLE_EXITS_HLT))
		return STEP_ON;
	if (single_step(v))
		v->bp.trap = 0; /* as in KVM, this exit takes the place of the other */
	set_mp_state(v, KVM_MP_STATE_RUNNABLE);
	v->exit.reason = KVM_EXIT_HLT;
	return STEP_EXIT;
}

/*
 * AMD's processors leave no state behind when they shut down, and KVM resets the vCPU as INIT
 * would; on Intel's it stays what it was.
 */
static int shutdown(struct kl_vcpu *v)
{
	if (v->shutdown && !kl_host_is_intel())
		kl_x86_reset(v, true);
	v->triple_fault_pending = v->shutdown = false;
	v->exit.reason = KVM_EXIT_SHUTDOWN;
	return STEP_EXIT;
}

static int loop(struct kl_vcpu *v)
{
	for (;;) {
		int r;

		/* A device of the engine has answered: no event before the instruction is done. */
		if (KL_UNLIKELY(v->mmio_replay || (v->pio_left && !v->pio_pos))) {
			r = replay(v);
			if (r != STEP_ON)
				return r;
		}
		if (KL_UNLIKELY(kl_vcpu_requests(&v->core) & KL_REQ_RING_FULL) && ring_is_full(v))
			return STEP_EXIT;
		r = poll_requests(v);
		if (KL_UNLIKELY(r))
			return r;
		if (KL_UNLIKELY(v->bp.trap) && kl_debug_take(v))
			return STEP_EXIT;
		if (v->apic) {
			if (KL_UNLIKELY(v->pv_eoi_pending) && kl_pv_eoi_from_guest(v))
				return interrupted(v);
			if (KL_UNLIKELY(v->vapic_lent) && kl_pv_vapic_from_guest(v))
				return interrupted(v);
			poll_apic(v);
			if (KL_UNLIKELY(v->eoi_exit >= 0)) {
				v->exit.reason = KVM_EXIT_IOAPIC_EOI;
				v->exit.eoi_vector = (uint8_t)v->eoi_exit;
				v->eoi_exit = -1;
				return STEP_EXIT;
			}
		}
		if (KL_UNLIKELY(mp_state(v) != KVM_MP_STATE_RUNNABLE)) {
			v->same_epoch = false;
			r = block(v);
			if (r)
				return r;
			if (mp_state(v) != KVM_MP_STATE_RUNNABLE)
				continue;
		}
		if (KL_UNLIKELY(v->tpr_access.due)) {
			v->tpr_access.due = false;
			v->exit.reason = KVM_EXIT_TPR_ACCESS;
			v->exit.tpr_access.rip = v->tpr_access.rip;
			v->exit.tpr_access.is_write = v->tpr_access.is_write;
			return STEP_EXIT;
		}
		if (KL_UNLIKELY(v->triple_fault_pending | v->shutdown))
			return shutdown(v);
		if (KL_UNLIKELY(v->system_events)) {
			/* The crash before the reset. */
			unsigned event = v->system_events >> KVM_SYSTEM_EVENT_CRASH & 1
						 ? KVM_SYSTEM_EVENT_CRASH
						 : KVM_SYSTEM_EVENT_RESET;

			v->system_events &= ~(1u << event);
			v->exit.reason = KVM_EXIT_SYSTEM_EVENT;
			v->exit.system_event = event;
			return STEP_EXIT;
		}
		if (next_event(v))
			r = sort_out(v, protected(v, deliver_event));
		else if (v->request_interrupt_window && kl_x86_ready_for_interrupt(v)) {
			v->exit.reason = KVM_EXIT_IRQ_WINDOW_OPEN;
			return STEP_EXIT;
		} else {
			if (KL_UNLIKELY(v->pv_eoi))
				kl_pv_eoi_to_guest(v);
			if (KL_UNLIKELY(v->vapic) && kl_pv_vapic_to_guest(v))
				return interrupted(v);
			r = must_step(v) ? step(v) : run_guest(v);
		}
		if (r == STEP_ON && mp_state(v) == KVM_MP_STATE_HALTED)
			r = halted(v);
		if (r != STEP_ON)
			return r;
	}
}

int kl_x86_run(struct kl_vcpu *v)
{
	struct kl_vcpu_core *c = &v->core;
	jmp_buf *outer = kl_self.guard;
	int r;

	if (atomic_load_explicit(&c->vm->dead, memory_order_relaxed))
		return -EIO;
	kl_vcpu_take_requests(c, KL_REQ_SIGNAL);
	atomic_store_explicit(&c->tid, kl_gettid(), memory_order_release);
	kl_self.running = c;
	atomic_signal_fence(memory_order_seq_cst);
	v->same_epoch = false;
	kl_fpu_summarize(v); /* KVM_SET_FPU and KVM_SET_XSAVE keep what they are given */

	if (KL_UNLIKELY(mp_state(v) == KVM_MP_STATE_UNINITIALIZED)) {
		r = block_uninitialized(v);
	} else {
		r = complete(v);
		if (r == STEP_ON && v->immediate_exit)
			r = -EINTR;
		if (r == STEP_ON) {
			v->runnable_once = true;
			if (KL_UNLIKELY(kl_dirty_left_over(c->vm)))
				kl_dirty_rings_push_left_over(c->vm);
			kl_pv_enter(v);
			r = loop(v);
			kl_pv_leave(v);
		}
	}

	/* What the guest will get is pending for the program, too. */
	if (KL_UNLIKELY(v->bp.trap) && !kl_debug_program_owns(v))
		kl_debug_take(v);
	atomic_signal_fence(memory_order_seq_cst);
	kl_self.running = NULL;
	kl_self.guard = outer;
	atomic_store_explicit(&c->tid, 0, memory_order_release);
	atomic_store_explicit(&c->stats.instructions, v->insn_count, memory_order_relaxed);
	kl_stat_own_add(&c->stats.exits, 1);
	return r;
}
