/* SPDX-License-Identifier: MIT */
/* Breakpoints and single-step; debug.h says how they are found. */
#include "x86/debug.h"

#include <errno.h>

#include "x86/insn.h"

enum kind { EXEC, WRITE, IO, ACCESS }; /* R/W field of DR7 */

void kl_debug_update(struct kl_vcpu *v)
{
	static const uint8_t length[4] = {1, 2, 8, 4};
	const bool program = v->debug.control & KVM_GUESTDBG_USE_HW_BP;
	struct kl_breakpoints *bp = &v->bp;
	uint8_t pages = bp->exec | bp->write | bp->access;
	uint64_t dr7 = kl_debug_dr7(v);

	bp->exec = bp->write = bp->access = bp->io = 0;
	for (unsigned i = 0; i < 4; i++) {
		uint64_t addr = program ? v->debug.arch.debugreg[i] : v->dr[i];
		uint8_t bit = (uint8_t)(1 << i);

		if (!((dr7 >> (2 * i)) & 3))
			continue;
		bp->len[i] = length[(dr7 >> (18 + 4 * i)) & 3];
		bp->addr[i] = addr & ~(uint64_t)(bp->len[i] - 1u);
		switch ((enum kind)((dr7 >> (16 + 4 * i)) & 3)) {
		case EXEC:
			bp->addr[i] = addr;
			bp->exec |= bit;
			break;
		case WRITE:
			bp->write |= bit;
			break;
		case IO:
			bp->io |= bit;
			break;
		case ACCESS:
			bp->access |= bit;
			break;
		}
	}
	if (pages | bp->exec | bp->write | bp->access)
		kl_tlb_flush(v);
}

int kl_x86_set_guest_debug(struct kl_vcpu *v, const struct kvm_guest_debug *d)
{
	int r = 0;

	if (d->control & (KVM_GUESTDBG_INJECT_DB | KVM_GUESTDBG_INJECT_BP)) {
		r = -EBUSY;
		if (v->exc.pending || v->triple_fault_pending)
			goto out;
		v->exc = (struct kl_event_exception){
			.pending = true,
			.nr = d->control & KVM_GUESTDBG_INJECT_DB ? KL_EXC_DB : KL_EXC_BP};
		r = 0;
	}
	v->debug = *d;
	if (!(d->control & KVM_GUESTDBG_ENABLE))
		v->debug.control = 0;
	v->bp.trap = 0;
	kl_debug_update(v);
out:
	return r;
}

/* ---- in an instruction ---- */

static bool in_page(const struct kl_vcpu *v, uint8_t which, uint64_t page)
{
	for (unsigned i = 0; i < 4; i++)
		if ((which >> i & 1) && (v->bp.addr[i] & KL_PAGE_MASK) == page)
			return true;
	return false;
}

void kl_debug_mask_tlb(struct kl_vcpu *v, uint64_t tag, struct kl_tlb_entry *e)
{
	uint64_t none = kl_tlb_none(kl_tlb_index(tag));

	if (in_page(v, v->bp.access, tag))
		e->rtag = e->wtag = none;
	if (in_page(v, v->bp.write, tag))
		e->wtag = none;
	if (in_page(v, v->bp.exec, tag))
		e->xtag = none;
}

bool kl_debug_code_page(struct kl_vcpu *v, uint64_t lin)
{
	return v->bp.exec && in_page(v, v->bp.exec, lin & KL_PAGE_MASK);
}

static void fill_exit(struct kl_vcpu *v, uint32_t exception, uint64_t dr6)
{
	v->exit.reason = KVM_EXIT_DEBUG;
	v->exit.debug.exception = exception;
	v->exit.debug.pc = v->long_mode ? v->rip : (uint32_t)(v->seg[KL_CS].base + v->rip);
	v->exit.debug.dr6 = dr6;
	v->exit.debug.dr7 = kl_debug_dr7(v);
}

void kl_debug_fault(struct kl_vcpu *v, uint32_t dr6_bits)
{
	if (!kl_debug_program_owns(v))
		kl_raise_payload(v, KL_EXC_DB, dr6_bits);
	fill_exit(v, KL_EXC_DB, dr6_bits | KL_DR6_FIXED);
	v->pending = KL_PENDING_NONE;
	kl_leave(v, KL_LEAVE_EXIT);
}

void kl_debug_int3(struct kl_vcpu *v)
{
	fill_exit(v, KL_EXC_BP, 0);
	v->pending = KL_PENDING_NONE;
	kl_leave(v, KL_LEAVE_EXIT);
}

void kl_debug_fetch(struct kl_vcpu *v, uint64_t lin)
{
	uint32_t hit = 0;

	if ((v->rflags & KL_FL_RF) || v->bp.held)
		return;
	for (unsigned i = 0; i < 4; i++)
		if ((v->bp.exec >> i & 1) && v->bp.addr[i] == lin)
			hit |= 1u << i;
	if (hit)
		kl_debug_fault(v, hit);
}

/* Leave the block, and the string instruction, behind what hit. */
static void note_hit(struct kl_vcpu *v, unsigned i)
{
	v->bp.hit |= (uint8_t)(1 << i);
	v->bp.hit_rip = v->rip;
	v->code_written = true;
	kl_vcpu_request(&v->core, KL_REQ_EVENT);
}

void kl_debug_data(struct kl_vcpu *v, uint64_t lin, unsigned len, bool write)
{
	uint8_t which = v->bp.access | (write ? v->bp.write : 0);

	if (!v->long_mode)
		lin = (uint32_t)lin;
	for (unsigned i = 0; i < 4; i++)
		if ((which >> i & 1) && lin < v->bp.addr[i] + v->bp.len[i] &&
		    v->bp.addr[i] < lin + len)
			note_hit(v, i);
}

/* Without CR4.DE the encoding means nothing. */
void kl_debug_port(struct kl_vcpu *v, unsigned port, unsigned size)
{
	if (!(v->cr4 & KL_CR4_DE))
		return;
	for (unsigned i = 0; i < 4; i++)
		if ((v->bp.io >> i & 1) && port < v->bp.addr[i] + v->bp.len[i] &&
		    v->bp.addr[i] < port + size)
			note_hit(v, i);
}

/* ---- between instructions ---- */

bool kl_debug_take(struct kl_vcpu *v)
{
	uint32_t bits = v->bp.trap;

	/* Behind MOV SS it waits for the next instruction; a fault of that comes first. */
	if ((v->int_shadow & KVM_X86_SHADOW_INT_MOV_SS) || v->exc.pending || v->exc.injected)
		return false;
	v->bp.trap = 0;
	if (kl_debug_program_owns(v)) {
		fill_exit(v, KL_EXC_DB, bits | KL_DR6_FIXED);
		return true;
	}
	v->exc = (struct kl_event_exception){
		.pending = true, .nr = KL_EXC_DB, .has_payload = true, .payload = bits};
	return false;
}
