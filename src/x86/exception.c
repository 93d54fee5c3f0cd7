/* SPDX-License-Identifier: MIT */
/*
 * Raising exceptions, and the delivery of exceptions and interrupts: real-mode vectors,
 * 16/32-bit gates, 64-bit gates with IST; stack switches through the TSS.
 *
 * Delivery builds the whole frame first and stores it with one access, so a fault in it
 * leaves the state as it was. A fault while an exception is being delivered is combined
 * with it into #DF or a triple fault where it is raised.
 */
#include <string.h>

#include "base/log.h"
#include "x86/access.h"
#include "x86/debug.h"
#include "x86/insn.h"
#include "x86/paging.h"
#include "x86/segment.h"
#include "x86/task.h"
#include "x86/vm86.h"

void kl_leave(struct kl_vcpu *v, enum kl_leave why)
{
	KL_ASSERT(v->in_run);
	longjmp(v->jmp, (int)why);
}

static bool contributory(unsigned vector)
{
	return vector == KL_EXC_DE || (vector >= KL_EXC_TS && vector <= KL_EXC_GP);
}

static KL_NORETURN KL_COLD void raise_event(struct kl_vcpu *v, struct kl_event_exception e)
{
	if (v->exc.injected) {
		unsigned prev = v->exc.nr;

		if (prev == KL_EXC_DF) {
			v->exc.injected = false;
			v->shutdown = true;
			kl_leave(v, KL_LEAVE_EXCEPTION);
		}
		if ((contributory(prev) && contributory(e.nr)) ||
		    (prev == KL_EXC_PF && (contributory(e.nr) || e.nr == KL_EXC_PF)))
			e = (struct kl_event_exception){.nr = KL_EXC_DF, .has_error = true};
	} else if (v->delivering) {
		/* An interrupt that faults in its delivery is lost, as on hardware. */
		v->irq.injected = false;
		v->nmi.injected = false;
	}
	if (!(v->cr0 & KL_CR0_PE))
		e.has_error = false;
	e.pending = true;
	v->exc = e;
	kl_leave(v, KL_LEAVE_EXCEPTION);
}

void kl_raise(struct kl_vcpu *v, unsigned vector)
{
	raise_event(v, (struct kl_event_exception){.nr = (uint8_t)vector});
}

void kl_raise_error(struct kl_vcpu *v, unsigned vector, uint32_t error)
{
	raise_event(v, (struct kl_event_exception){
			       .nr = (uint8_t)vector, .has_error = true, .error = error});
}

void kl_raise_pf(struct kl_vcpu *v, uint64_t gva, uint32_t error)
{
	kl_stat_own_add(&v->core.stats.pf_guest, 1);
	raise_event(v, (struct kl_event_exception){.nr = KL_EXC_PF,
						   .has_error = true,
						   .error = error,
						   .has_payload = true,
						   .payload = gva});
}

void kl_raise_payload(struct kl_vcpu *v, unsigned vector, uint64_t payload)
{
	raise_event(v, (struct kl_event_exception){
			       .nr = (uint8_t)vector, .has_payload = true, .payload = payload});
}

void kl_x86_apply_payload(struct kl_vcpu *v)
{
	struct kl_event_exception *e = &v->exc;

	if (!e->has_payload)
		return;
	if (e->nr == KL_EXC_DB)
		v->dr6 = ((v->dr6 & ~(uint64_t)KL_DR6_TRAPS) | e->payload | KL_DR6_FIXED) &
			 ~(1ull << 12);
	else if (e->nr == KL_EXC_PF)
		v->cr2 = e->payload;
	e->has_payload = false;
	e->payload = 0;
}

/* The bytes of the current instruction, as far as they are known. */
static void insn_bytes(struct kl_vcpu *v, struct kl_exit *x)
{
	const struct kl_op *op = v->cur_op;

	if (!op || !op->len)
		return;
	x->internal.insn_len = op->len;
	memset(x->internal.insn, 0x90, sizeof(x->internal.insn));
	memcpy(x->internal.insn, op->bytes, op->len);
}

void kl_emulation_failure(struct kl_vcpu *v)
{
	struct kl_exit *x = &v->exit;

	kl_stat_own_add(&v->core.stats.insn_emulation_fail, 1);
	if (!v->kvm->exit_on_emulation_error) {
		if (v->cpl && !v->delivering)
			kl_raise(v, KL_EXC_UD);
		/* KVM queues #UD and exits; it is there when the program goes on. */
		if (!v->delivering)
			v->exc = (struct kl_event_exception){.nr = KL_EXC_UD, .pending = true};
	}
	memset(x, 0, sizeof(*x));
	x->reason = KVM_EXIT_INTERNAL_ERROR;
	x->internal.suberror = KVM_INTERNAL_ERROR_EMULATION;
	insn_bytes(v, x); /* uapi lays flags and bytes out as KVM does */
	v->pending = KL_PENDING_NONE;
	kl_leave(v, KL_LEAVE_EXIT);
}

/* ---- delivery ---- */

struct event {
	unsigned vector;
	bool has_error;
	uint32_t error;
	bool soft;
	uint64_t rip; /* to push */
};

static uint32_t vector_error(const struct event *e)
{
	return e->vector * 8 + 2 + !e->soft;
}

static void deliver_real(struct kl_vcpu *v, const struct event *e)
{
	struct kvm_segment cs = v->seg[KL_CS];
	uint16_t frame[3], vec[2];
	uint64_t mask = kl_sp_mask(v);
	uint64_t sp = (v->gpr[KL_RSP] - 6) & mask;

	if (e->vector * 4 + 3 > v->idt.limit)
		kl_raise_error(v, KL_EXC_GP, vector_error(e));
	kl_read_system(v, v->idt.base + e->vector * 4, vec, sizeof(vec));
	frame[0] = (uint16_t)e->rip;
	frame[1] = v->seg[KL_CS].selector;
	frame[2] = (uint16_t)v->rflags;
	kl_stack_room(v, &v->seg[KL_SS], sp, sizeof(frame), 0);
	kl_write_as(v, (uint32_t)(v->seg[KL_SS].base + sp), frame, sizeof(frame),
		    (enum kl_tlb_mode)v->tlb_mode);

	kl_set_sp(v, sp);
	v->rflags &= ~(uint64_t)(KL_FL_IF | KL_FL_TF | KL_FL_AC | KL_FL_RF);
	cs.selector = vec[1];
	cs.base = (uint32_t)vec[1] << 4;
	kl_set_cs(v, &cs, 0);
	v->rip = vec[0];
}

/* The target code segment of a gate: checked, not yet loaded. Returns the new CPL. */
static unsigned gate_target(struct kl_vcpu *v, uint16_t sel, struct kl_desc *cs, bool wide,
			    uint32_t ext)
{
	unsigned dpl;

	if (KL_DESC_NULL(sel))
		kl_raise_error(v, KL_EXC_GP, ext);
	kl_desc_read(v, sel, cs, KL_EXC_GP, ext);
	dpl = kl_desc_dpl(cs);
	if (!kl_desc_is_code(cs) || dpl > v->cpl)
		kl_raise_error(v, KL_EXC_GP, (sel & 0xfffc) | ext);
	if (wide && (!kl_desc_l(cs) || kl_desc_db(cs)))
		kl_raise_error(v, KL_EXC_GP, (sel & 0xfffc) | ext);
	if (!kl_desc_present(cs))
		kl_raise_error(v, KL_EXC_NP, (sel & 0xfffc) | ext);
	return kl_desc_conforming(cs) ? v->cpl : dpl;
}

static void enter_handler(struct kl_vcpu *v, const struct kl_desc *cs, uint16_t sel, unsigned cpl,
			  uint64_t rip, bool interrupt_gate)
{
	struct kvm_segment s;

	v->rflags &= ~(uint64_t)(KL_FL_TF | KL_FL_NT | KL_FL_RF | KL_FL_VM);
	if (interrupt_gate)
		v->rflags &= ~(uint64_t)KL_FL_IF;
	kl_desc_to_segment(cs, (uint16_t)((sel & ~3u) | cpl), &s);
	kl_set_cs(v, &s, cpl);
	v->rip = rip;
}

static void deliver64(struct kl_vcpu *v, const struct event *e)
{
	uint32_t ext = !e->soft;
	uint64_t gate[2], frame[6], sp, rip;
	struct kl_desc cs;
	unsigned cpl, type, ist, n = 0;
	uint16_t sel;

	if (e->vector * 16 + 15 > v->idt.limit)
		kl_raise_error(v, KL_EXC_GP, vector_error(e));
	kl_read_system(v, v->idt.base + e->vector * 16, gate, sizeof(gate));
	type = (gate[0] >> 40) & 31;
	if (type != 0xe && type != 0xf)
		kl_raise_error(v, KL_EXC_GP, vector_error(e));
	if (e->soft && ((gate[0] >> 45) & 3) < v->cpl)
		kl_raise_error(v, KL_EXC_GP, vector_error(e));
	if (!((gate[0] >> 47) & 1))
		kl_raise_error(v, KL_EXC_NP, vector_error(e));
	sel = (uint16_t)(gate[0] >> 16);
	ist = (gate[0] >> 32) & 7;
	rip = (gate[0] & 0xffff) | ((gate[0] >> 32) & 0xffff0000) | (gate[1] << 32);
	cpl = gate_target(v, sel, &cs, true, ext);

	if (ist)
		sp = kl_tss_ist(v, ist, ext);
	else if (cpl < v->cpl)
		kl_tss_stack(v, cpl, &sp, NULL, ext);
	else
		sp = v->gpr[KL_RSP];
	if (!kl_canonical(v, rip))
		kl_raise_error(v, KL_EXC_GP, ext);
	sp &= ~15ull;
	if (!kl_canonical(v, sp))
		kl_raise_error(v, KL_EXC_SS, ext);

	if (e->has_error)
		frame[n++] = e->error;
	frame[n++] = e->rip;
	frame[n++] = v->seg[KL_CS].selector;
	frame[n++] = v->rflags;
	frame[n++] = v->gpr[KL_RSP];
	frame[n++] = v->seg[KL_SS].selector;
	sp -= n * 8;
	kl_write_as(v, sp, frame, n * 8, kl_tlb_mode_of(v, cpl, cpl < v->cpl));
	kl_desc_set_accessed(v, &cs);

	v->gpr[KL_RSP] = sp;
	if (cpl < v->cpl) {
		kl_segment_null(&v->seg[KL_SS], (uint16_t)cpl);
		v->seg[KL_SS].dpl = (uint8_t)cpl;
	}
	enter_handler(v, &cs, sel, cpl, rip, type == 0xe);
}

/* Frame of @size-byte words, top first. */
static unsigned put_frame(uint8_t *out, const uint32_t *word, unsigned n, unsigned size)
{
	for (unsigned i = 0; i < n; i++)
		memcpy(out + i * size, &word[i], size);
	return n * size;
}

static void deliver32(struct kl_vcpu *v, const struct event *e)
{
	uint32_t ext = !e->soft, word[10];
	struct kl_desc cs, ss_desc;
	struct kvm_segment code;
	uint64_t gate, sp, base, mask;
	unsigned cpl, type, size, n = 0, bytes;
	bool vm86 = kl_vm86(v), inner;
	uint16_t sel, ss = 0;
	uint8_t frame[40];
	uint64_t rip;

	if (e->vector * 8 + 7 > v->idt.limit)
		kl_raise_error(v, KL_EXC_GP, vector_error(e));
	kl_read_system(v, v->idt.base + e->vector * 8, &gate, sizeof(gate));
	type = (gate >> 40) & 31;
	if (type != 5 && type != 6 && type != 7 && type != 14 && type != 15)
		kl_raise_error(v, KL_EXC_GP, vector_error(e));
	if (e->soft && ((gate >> 45) & 3) < v->cpl)
		kl_raise_error(v, KL_EXC_GP, vector_error(e));
	if (!((gate >> 47) & 1))
		kl_raise_error(v, KL_EXC_NP, vector_error(e));
	if (type == 5) {
		struct kl_desc tss;

		sel = kl_task_gate(v, &(struct kl_desc){.low = gate}, ext, &tss);
		kl_task_switch(v, sel, &tss, KL_TASK_EVENT, e->rip, e->has_error ? &e->error : NULL,
			       ext);
		return;
	}
	sel = (uint16_t)(gate >> 16);
	size = type & 8 ? 4 : 2;
	rip = (gate & 0xffff) | (size == 4 ? (gate >> 32) & 0xffff0000 : 0);
	cpl = gate_target(v, sel, &cs, false, ext);
	if (vm86 && (cpl != 0 || kl_desc_conforming(&cs)))
		kl_raise_error(v, KL_EXC_GP, (sel & 0xfffc) | ext);
	inner = cpl < v->cpl;

	if (inner) {
		kl_tss_stack(v, cpl, &sp, &ss, ext);
		kl_check_inner_ss(v, ss, cpl, &ss_desc, ext);
		mask = kl_desc_db(&ss_desc) ? 0xffffffff : 0xffff;
	} else {
		sp = v->gpr[KL_RSP];
		mask = kl_sp_mask(v);
	}
	if (e->has_error)
		word[n++] = e->error;
	word[n++] = (uint32_t)e->rip;
	word[n++] = v->seg[KL_CS].selector;
	word[n++] = (uint32_t)v->rflags;
	if (inner) {
		word[n++] = (uint32_t)v->gpr[KL_RSP];
		word[n++] = v->seg[KL_SS].selector;
	}
	if (vm86) {
		word[n++] = v->seg[KL_ES].selector;
		word[n++] = v->seg[KL_DS].selector;
		word[n++] = v->seg[KL_FS].selector;
		word[n++] = v->seg[KL_GS].selector;
	}
	bytes = put_frame(frame, word, n, size);
	sp = (sp - bytes) & mask;
	if (inner) {
		struct kvm_segment s;

		kl_desc_to_segment(&ss_desc, ss, &s);
		kl_stack_room(v, &s, sp, bytes, (ss & 0xfffcu) | ext);
		base = s.base;
	} else {
		kl_stack_room(v, &v->seg[KL_SS], sp, bytes, ext);
		base = v->seg[KL_SS].base;
	}
	kl_desc_to_segment(&cs, sel, &code);
	if (rip > code.limit)
		kl_raise_error(v, KL_EXC_GP, ext);
	kl_write_as(v, (uint32_t)(base + sp), frame, bytes, kl_tlb_mode_of(v, cpl, inner));
	kl_desc_set_accessed(v, &cs);
	if (inner)
		kl_desc_set_accessed(v, &ss_desc);

	if (vm86) {
		v->rflags &= ~(uint64_t)KL_FL_VM;
		for (unsigned i = 0; i < 4; i++) {
			static const uint8_t seg[4] = {KL_ES, KL_DS, KL_FS, KL_GS};

			kl_segment_null(&v->seg[seg[i]], 0);
		}
	}
	if (inner)
		kl_desc_to_segment(&ss_desc, ss, &v->seg[KL_SS]);
	if (mask == 0xffffffff)
		v->gpr[KL_RSP] = sp;
	else
		v->gpr[KL_RSP] = (v->gpr[KL_RSP] & ~0xffffull) | sp;
	enter_handler(v, &cs, sel, cpl, rip, !(type & 1));
}

static void deliver(struct kl_vcpu *v, const struct event *e)
{
	if (kl_real_mode(v))
		deliver_real(v, e);
	else if (v->efer & KL_EFER_LMA)
		deliver64(v, e);
	else
		deliver32(v, e);
	v->int_shadow = 0;
}

void kl_x86_deliver(struct kl_vcpu *v, unsigned vector, bool has_error, uint32_t error, bool soft,
		    uint64_t push_rip)
{
	struct event e = {vector, has_error, error, soft, push_rip};

	v->cur_op = NULL;
	v->delivering = true;
	deliver(v, &e);
	v->delivering = false;
}

void kl_x86_soft_int(struct kl_vcpu *v, unsigned vector, uint64_t next_rip)
{
	struct event e = {vector, false, 0, true, next_rip};

	deliver(v, &e);
}

/* ---- instructions ---- */

enum kl_next kl_op_int_n(struct kl_vcpu *v, const struct kl_op *op)
{
	if (KL_UNLIKELY(kl_vm86(v)) && kl_vm86_int(v, (uint8_t)op->imm, kl_next_rip(v, op)))
		return KL_JUMPED_STOP;
	kl_x86_soft_int(v, (uint8_t)op->imm, kl_next_rip(v, op));
	return KL_JUMPED_STOP;
}

enum kl_next kl_op_int3(struct kl_vcpu *v, const struct kl_op *op)
{
	if (v->debug.control & KVM_GUESTDBG_USE_SW_BP)
		kl_debug_int3(v);
	kl_x86_soft_int(v, KL_EXC_BP, kl_next_rip(v, op));
	return KL_JUMPED_STOP;
}

enum kl_next kl_op_into(struct kl_vcpu *v, const struct kl_op *op)
{
	if (v->code_mode == KL_CODE64)
		kl_raise(v, KL_EXC_UD);
	if (!(v->rflags & KL_FL_OF))
		return KL_NEXT;
	kl_x86_soft_int(v, KL_EXC_OF, kl_next_rip(v, op));
	return KL_JUMPED_STOP;
}

/* INT1 ignores the gate's DPL, as a hardware event would, but it is an instruction. */
enum kl_next kl_op_int1(struct kl_vcpu *v, const struct kl_op *op)
{
	struct event e = {KL_EXC_DB, false, 0, false, kl_next_rip(v, op)};

	v->delivering = true;
	deliver(v, &e);
	v->delivering = false;
	return KL_JUMPED_STOP;
}

enum kl_next kl_op_ud(struct kl_vcpu *v, const struct kl_op *op)
{
	kl_raise(v, KL_EXC_UD);
}
