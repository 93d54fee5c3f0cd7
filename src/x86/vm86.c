/* SPDX-License-Identifier: MIT */
/* Virtual-8086 extensions; vm86.h. */
#include "x86/vm86.h"

#include "x86/access.h"
#include "x86/insn.h"

static KL_NORETURN KL_COLD void gp(struct kl_vcpu *v)
{
	kl_raise_error(v, KL_EXC_GP, 0);
}

void kl_virtual_if(struct kl_vcpu *v, bool on)
{
	if (kl_vm86(v) ? !(v->cr4 & KL_CR4_VME) : v->cpl != 3 || !(v->cr4 & KL_CR4_PVI))
		gp(v);
	if (on && (v->rflags & KL_FL_VIP))
		gp(v); /* an interrupt waits for this */
	v->rflags = on ? v->rflags | KL_FL_VIF : v->rflags & ~(uint64_t)KL_FL_VIF;
}

uint16_t kl_vm86_flags(struct kl_vcpu *v)
{
	uint64_t f = v->rflags & ~(uint64_t)KL_FL_IF;

	return (uint16_t)(f | KL_FL_IOPL | (v->rflags & KL_FL_VIF ? KL_FL_IF : 0));
}

void kl_vm86_check_flags(struct kl_vcpu *v, uint64_t val)
{
	if ((val & KL_FL_TF) || ((val & KL_FL_IF) && (v->rflags & KL_FL_VIP)))
		gp(v);
}

void kl_vm86_load_flags(struct kl_vcpu *v, uint64_t val)
{
	val = (val & 0xffff) | (val & KL_FL_IF ? KL_FL_VIF : 0);
	kl_load_flags(v, val, KL_FL_STATUS | KL_FL_TF | KL_FL_DF | KL_FL_NT | KL_FL_VIF);
}

/* The bit of @vector in the redirection map, which ends where the I/O map begins. */
static bool redirected(struct kl_vcpu *v, unsigned vector)
{
	const struct kvm_segment *tr = &v->seg[KL_TR];
	uint32_t at;
	uint16_t io_map;
	uint8_t bits;

	if (tr->unusable || !(tr->type & 8) || tr->limit < 103)
		gp(v);
	kl_read_system(v, tr->base + 102, &io_map, sizeof(io_map));
	at = io_map - 32u + vector / 8;
	if (io_map < 32 || at > tr->limit)
		gp(v);
	kl_read_system(v, tr->base + at, &bits, 1);
	return !(bits >> (vector % 8) & 1);
}

bool kl_vm86_int(struct kl_vcpu *v, unsigned vector, uint64_t next_rip)
{
	bool virtual = kl_below_iopl(v);
	uint16_t frame[3];
	uint64_t sp, ip, cs;

	if (!(v->cr4 & KL_CR4_VME) || !redirected(v, vector)) {
		if (virtual)
			gp(v);
		return false;
	}
	frame[0] = (uint16_t)next_rip;
	frame[1] = v->seg[KL_CS].selector;
	frame[2] = virtual ? kl_vm86_flags(v) : (uint16_t)v->rflags;
	ip = kl_read(v, vector * 4, 2);
	cs = kl_read(v, vector * 4 + 2, 2);
	sp = (v->gpr[KL_RSP] - sizeof(frame)) & kl_sp_mask(v);
	kl_write_bytes(v, kl_seg_linear(v, KL_SS, sp, sizeof(frame), true), frame, sizeof(frame));
	kl_set_sp(v, sp);
	v->rflags &= ~(uint64_t)(KL_FL_TF | KL_FL_RF | (virtual ? KL_FL_VIF : KL_FL_IF));
	kl_load_real_segment(v, KL_CS, (uint16_t)cs);
	v->rip = ip;
	return true;
}
