/* SPDX-License-Identifier: MIT */
/*
 * Control registers and RFLAGS: what may be set, and what follows from it.
 */
#include "x86/control.h"

#include <errno.h>
#include <string.h>

#include "x86/access.h"
#include "x86/debug.h"
#include "x86/insn.h"
#include "x86/paging.h"
#include "x86/segment.h"
#include "x86/vm86.h"

bool kl_cr0_valid(uint64_t cr0)
{
	if (cr0 >> 32)
		return false;
	if ((cr0 & KL_CR0_NW) && !(cr0 & KL_CR0_CD))
		return false;
	return !(cr0 & KL_CR0_PG) || (cr0 & KL_CR0_PE);
}

bool kl_cr4_valid(struct kl_vcpu *v, uint64_t cr4)
{
	return !(cr4 & ~kl_cr4_supported()) && !(cr4 & v->cr4_reserved);
}

bool kl_efer_valid(struct kl_vcpu *v, uint64_t efer)
{
	return !(efer & ~(v->efer_allowed | KL_EFER_SCE));
}

bool kl_xcr0_valid(struct kl_vcpu *v, uint64_t xcr0)
{
	if (!(xcr0 & 1))
		return false;
	if ((xcr0 & 4) && !(xcr0 & 2))
		return false;
	return !(xcr0 & ~(v->supported_xcr0 | 1));
}

int kl_read_pdptes(struct kl_vcpu *v, uint64_t cr3, uint64_t pdpte[4])
{
	int r = kl_x86_read_phys(v, cr3 & 0xffffffe0, pdpte, 32);

	if (r)
		return r;
	return kl_pdptes_valid(v, pdpte) ? 0 : -EINVAL;
}

/* PDPTEs for new control registers; leaves with #GP if they are malformed. */
static void load_pdptes(struct kl_vcpu *v, uint64_t cr3)
{
	uint64_t pdpte[4];
	int r;

	kl_vcpu_leave_guest(&v->core);
	r = kl_read_pdptes(v, cr3, pdpte);
	kl_vcpu_enter_guest(&v->core);
	if (kl_vcpu_requests(&v->core) & KL_REQ_TLB_FLUSH)
		kl_serve_flush(v);
	if (r == -EINTR)
		kl_leave(v, KL_LEAVE_RESTART);
	if (r)
		kl_raise_error(v, KL_EXC_GP, 0);
	memcpy(v->pdptrs, pdpte, sizeof(pdpte));
	v->pdptrs_valid = true;
}

static KL_NORETURN KL_COLD void gp(struct kl_vcpu *v)
{
	kl_raise_error(v, KL_EXC_GP, 0);
}

void kl_write_cr0(struct kl_vcpu *v, uint64_t val)
{
	uint64_t old = v->cr0, efer = v->efer;

	if (!kl_cr0_valid(val))
		gp(v);
	val = (val & KL_CR0_KNOWN) | KL_CR0_ET;
	if ((val & ~old) & KL_CR0_PG) {
		if (efer & KL_EFER_LME) {
			if (!(v->cr4 & KL_CR4_PAE) || v->seg[KL_CS].l)
				gp(v);
			efer |= KL_EFER_LMA;
		}
	} else if ((old & ~val) & KL_CR0_PG) {
		if (v->long_mode || (v->cr4 & KL_CR4_PCIDE))
			gp(v);
		efer &= ~(uint64_t)KL_EFER_LMA;
	}
	if (kl_pae_paging(val, v->cr4, efer) && ((val ^ old) & (KL_CR0_PG | KL_CR0_CD | KL_CR0_NW)))
		load_pdptes(v, v->cr3);
	v->cr0 = val;
	v->efer = efer;
	if ((val ^ old) & (KL_CR0_PG | KL_CR0_WP | KL_CR0_PE))
		kl_tlb_flush(v);
	if (((val ^ old) & KL_CR0_PE) && !(val & KL_CR0_PE))
		v->cpl = 0;
	kl_x86_update_mode(v);
}

void kl_write_cr3(struct kl_vcpu *v, uint64_t val)
{
	if (v->cr4 & KL_CR4_PCIDE)
		val &= ~(1ull << 63); /* "keep the TLB": what is kept is read again (tlb.h) */
	if (v->efer & KL_EFER_LMA) {
		if (val >> 52 || (val & kl_reserved_gpa_bits(v)))
			gp(v);
	} else if (kl_pae_paging(v->cr0, v->cr4, v->efer)) {
		load_pdptes(v, val);
	}
	v->cr3 = val;
	kl_tlb_load_space(v);
}

void kl_write_cr4(struct kl_vcpu *v, uint64_t val)
{
	uint64_t old = v->cr4;

	if (!kl_cr4_valid(v, val))
		gp(v);
	if (v->efer & KL_EFER_LMA) {
		if (!(val & KL_CR4_PAE) || ((val ^ old) & KL_CR4_LA57))
			gp(v);
	} else if (kl_pae_paging(v->cr0, val, v->efer) &&
		   ((val ^ old) & (KL_CR4_PAE | KL_CR4_PGE | KL_CR4_PSE | KL_CR4_SMEP))) {
		load_pdptes(v, v->cr3);
	}
	if (((val & ~old) & KL_CR4_PCIDE) && (!(v->efer & KL_EFER_LMA) || (v->cr3 & 0xfff)))
		gp(v);
	v->cr4 = val;
	if ((val ^ old) & KL_CR4_OSXSAVE)
		kl_x86_refresh_cpuid(v);
	if ((val ^ old) & (KL_CR4_PAE | KL_CR4_PGE | KL_CR4_PSE | KL_CR4_SMEP | KL_CR4_SMAP |
			   KL_CR4_PCIDE | KL_CR4_LA57))
		kl_tlb_flush(v);
	kl_x86_update_mode(v);
}

void kl_load_flags(struct kl_vcpu *v, uint64_t val, uint64_t mask)
{
	const uint64_t known = 0x3e7fd5;

	mask &= known | KL_FL_RF;
	v->rflags = (v->rflags & ~mask & known) | (val & mask) | 2;
	kl_x86_update_mode(v);
}

/* ---- instructions ---- */

static void need_cpl0(struct kl_vcpu *v)
{
	if (v->cpl)
		gp(v);
}

enum kl_next kl_op_mov_to_cr(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t val;

	if (op->reg != 0 && op->reg != 2 && op->reg != 3 && op->reg != 4 && op->reg != 8)
		kl_raise(v, KL_EXC_UD);
	need_cpl0(v);
	val = kl_gpr_get(v, op->rm, op->opsize);
	switch (op->reg) {
	case 0:
		kl_write_cr0(v, val);
		break;
	case 2:
		v->cr2 = val;
		return KL_NEXT;
	case 3:
		kl_write_cr3(v, val);
		return KL_NEXT;
	case 4:
		kl_write_cr4(v, val);
		break;
	default:
		if (val & ~15ull)
			gp(v);
		kl_x86_set_cr8(v, val);
		break;
	}
	return KL_STOP;
}

enum kl_next kl_op_mov_from_cr(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t val;

	switch (op->reg) {
	case 0:
		val = v->cr0;
		break;
	case 2:
		val = v->cr2;
		break;
	case 3:
		val = v->cr3;
		break;
	case 4:
		val = v->cr4;
		break;
	case 8:
		val = kl_x86_get_cr8(v);
		break;
	default:
		kl_raise(v, KL_EXC_UD);
	}
	need_cpl0(v);
	kl_gpr_set(v, op->rm, val, op->opsize);
	return KL_NEXT;
}

/* DR4 and DR5 are 6 and 7 unless CR4.DE; the rest of the checks is common, too. */
static unsigned debug_register(struct kl_vcpu *v, const struct kl_op *op)
{
	unsigned n = op->reg;

	if (n > 7)
		kl_raise(v, KL_EXC_UD);
	if (n == 4 || n == 5) {
		if (v->cr4 & KL_CR4_DE)
			kl_raise(v, KL_EXC_UD);
		n += 2;
	}
	need_cpl0(v);
	if (kl_debug_dr7(v) & KL_DR7_GD)
		kl_debug_fault(v, KL_DR6_BD);
	return n;
}

enum kl_next kl_op_mov_to_dr(struct kl_vcpu *v, const struct kl_op *op)
{
	unsigned n = debug_register(v, op);
	uint64_t val = kl_gpr_get(v, op->rm, op->opsize);

	if (n >= 6 && (val >> 32))
		gp(v);
	if (n == 6) {
		v->dr6 = (val & 0xe00f) | KL_DR6_FIXED;
		return KL_NEXT;
	}
	if (n == 7)
		v->dr7 = (val & 0xffff2bff) | KL_DR7_FIXED;
	else
		v->dr[n] = val;
	kl_debug_update(v);
	return KL_STOP;
}

enum kl_next kl_op_mov_from_dr(struct kl_vcpu *v, const struct kl_op *op)
{
	unsigned n = debug_register(v, op);

	kl_gpr_set(v, op->rm, n == 6 ? v->dr6 : n == 7 ? v->dr7 : v->dr[n], op->opsize);
	return KL_NEXT;
}

enum kl_next kl_op_clts(struct kl_vcpu *v, const struct kl_op *op)
{
	need_cpl0(v);
	v->cr0 &= ~(uint64_t)KL_CR0_TS;
	return KL_NEXT;
}

enum kl_next kl_op_lmsw(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t val;

	need_cpl0(v);
	if (op->flags & KL_OPF_MEM)
		val = kl_read(v, kl_seg_linear(v, op->seg, kl_ea(v, op), 2, false), 2);
	else
		val = kl_gpr_get(v, op->rm, 2);
	/* PE can be set, never cleared. */
	kl_write_cr0(v, (v->cr0 & ~0xeull) | (val & 0xf));
	return KL_STOP;
}

enum kl_next kl_op_smsw(struct kl_vcpu *v, const struct kl_op *op)
{
	if ((v->cr4 & KL_CR4_UMIP) && v->cpl)
		gp(v);
	if (op->flags & KL_OPF_MEM)
		kl_write(v, kl_seg_linear(v, op->seg, kl_ea(v, op), 2, true), v->cr0 & 0xffff, 2);
	else
		kl_gpr_set(v, op->rm, v->cr0, op->opsize);
	return KL_NEXT;
}

enum kl_next kl_op_cli(struct kl_vcpu *v, const struct kl_op *op)
{
	if (KL_UNLIKELY(kl_below_iopl(v)))
		kl_virtual_if(v, false);
	else
		v->rflags &= ~(uint64_t)KL_FL_IF;
	return KL_NEXT;
}

enum kl_next kl_op_sti(struct kl_vcpu *v, const struct kl_op *op)
{
	if (KL_UNLIKELY(kl_below_iopl(v))) {
		kl_virtual_if(v, true);
		return KL_NEXT;
	}
	if (v->rflags & KL_FL_IF)
		return KL_NEXT;
	v->rflags |= KL_FL_IF;
	v->int_shadow = KVM_X86_SHADOW_INT_STI;
	return KL_STOP;
}

/* PUSHF and POPF in virtual-8086 mode. True: on the virtual flags. */
static bool virtual_flags(struct kl_vcpu *v, const struct kl_op *op)
{
	if (KL_LIKELY(!kl_vm86(v)) || !kl_below_iopl(v))
		return false;
	if (!kl_vme(v) || op->opsize != 2)
		gp(v);
	return true;
}

enum kl_next kl_op_pushf(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t sp = v->gpr[KL_RSP] - op->opsize;
	uint64_t val = v->rflags & ~(uint64_t)(KL_FL_RF | KL_FL_VM);

	if (virtual_flags(v, op))
		val = kl_vm86_flags(v);
	kl_write(v, kl_seg_linear(v, KL_SS, sp & kl_sp_mask(v), op->opsize, true), val, op->opsize);
	kl_set_sp(v, sp);
	return KL_NEXT;
}

enum kl_next kl_op_popf(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t mask = KL_FL_STATUS | KL_FL_TF | KL_FL_DF | KL_FL_NT, val, old;
	bool virtual = virtual_flags(v, op);

	if (op->opsize > 2)
		mask |= KL_FL_AC | KL_FL_ID;
	if (kl_real_mode(v) || v->cpl <= ((v->rflags & KL_FL_IOPL) >> 12))
		mask |= KL_FL_IF;
	if (v->cpl == 0)
		mask |= KL_FL_IOPL;
	val = kl_read(v, kl_seg_linear(v, KL_SS, v->gpr[KL_RSP] & kl_sp_mask(v), op->opsize, false),
		      op->opsize);
	old = v->rflags;
	if (virtual)
		kl_vm86_check_flags(v, val);
	kl_set_sp(v, v->gpr[KL_RSP] + op->opsize);
	if (virtual)
		kl_vm86_load_flags(v, val);
	else
		kl_load_flags(v, val, mask);
	return kl_flags_loaded(v, old);
}

static enum kl_next set_ac(struct kl_vcpu *v, bool on)
{
	if (v->cpl || !(kl_cr4_supported() & ~v->cr4_reserved & KL_CR4_SMAP))
		kl_raise(v, KL_EXC_UD);
	v->rflags = on ? v->rflags | KL_FL_AC : v->rflags & ~(uint64_t)KL_FL_AC;
	kl_x86_update_mode(v);
	return KL_NEXT;
}

enum kl_next kl_op_clac(struct kl_vcpu *v, const struct kl_op *op)
{
	return set_ac(v, false);
}

enum kl_next kl_op_stac(struct kl_vcpu *v, const struct kl_op *op)
{
	return set_ac(v, true);
}
