/* SPDX-License-Identifier: MIT */
/*
 * System instructions that belong to no other file: descriptor-table registers, TLB, HLT,
 * time, FS/GS bases.
 */
#include <string.h>

#include "x86/access.h"
#include "x86/control.h"
#include "x86/insn.h"
#include "x86/paging.h"
#include "x86/segment.h"

static void need_cpl0(struct kl_vcpu *v)
{
	if (v->cpl)
		kl_raise_error(v, KL_EXC_GP, 0);
}

static uint64_t mem_linear(struct kl_vcpu *v, const struct kl_op *op, unsigned size, bool write)
{
	return kl_seg_linear(v, op->seg, kl_ea(v, op), size, write);
}

/* ---- descriptor tables ---- */

static enum kl_next load_table(struct kl_vcpu *v, const struct kl_op *op, struct kvm_dtable *t)
{
	unsigned base_len = v->code_mode == KL_CODE64 ? 8 : 4;
	uint64_t lin, base;
	uint16_t limit;

	need_cpl0(v);
	lin = mem_linear(v, op, 2 + base_len, false);
	limit = (uint16_t)kl_read(v, lin, 2);
	base = kl_read(v, kl_linear_add(v, lin, 2), base_len);
	if (v->code_mode != KL_CODE64 && op->opsize == 2)
		base &= 0xffffff;
	if (!kl_canonical(v, base))
		kl_raise_error(v, KL_EXC_GP, 0);
	t->base = base;
	t->limit = limit;
	return KL_NEXT;
}

static enum kl_next store_table(struct kl_vcpu *v, const struct kl_op *op,
				const struct kvm_dtable *t)
{
	unsigned base_len = v->code_mode == KL_CODE64 ? 8 : 4;
	uint8_t buf[10];

	if ((v->cr4 & KL_CR4_UMIP) && v->cpl)
		kl_raise_error(v, KL_EXC_GP, 0);
	memcpy(buf, &t->limit, 2);
	memcpy(buf + 2, &t->base, 8);
	kl_write_bytes(v, mem_linear(v, op, 2 + base_len, true), buf, 2 + base_len);
	return KL_NEXT;
}

enum kl_next kl_op_lgdt(struct kl_vcpu *v, const struct kl_op *op)
{
	return load_table(v, op, &v->gdt);
}

enum kl_next kl_op_lidt(struct kl_vcpu *v, const struct kl_op *op)
{
	return load_table(v, op, &v->idt);
}

enum kl_next kl_op_sgdt(struct kl_vcpu *v, const struct kl_op *op)
{
	return store_table(v, op, &v->gdt);
}

enum kl_next kl_op_sidt(struct kl_vcpu *v, const struct kl_op *op)
{
	return store_table(v, op, &v->idt);
}

/* ---- TLB and caches ---- */

enum kl_next kl_op_invlpg(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t lin = kl_ea(v, op);

	need_cpl0(v);
	if (!v->long_mode)
		lin = (uint32_t)(lin + v->seg[op->seg].base);
	else if (op->seg >= KL_FS)
		lin += v->seg[op->seg].base;
	if (kl_canonical(v, lin))
		kl_tlb_flush_page(v, lin);
	return KL_NEXT;
}

enum kl_next kl_op_invpcid(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t type, d[2];
	bool pcide = v->cr4 & KL_CR4_PCIDE;
	uint64_t current = pcide ? v->cr3 & 0xfff : 0;

	if (!v->has_invpcid || kl_real_mode(v))
		kl_raise(v, KL_EXC_UD);
	need_cpl0(v);
	type = kl_gpr_get(v, op->reg, v->code_mode == KL_CODE64 ? 8 : 4);
	kl_read_bytes(v, mem_linear(v, op, 16, false), d, 16);
	if (type > 3 || d[0] >> 12)
		kl_raise_error(v, KL_EXC_GP, 0);
	if (type == 0 && !kl_canonical(v, d[1]))
		kl_raise_error(v, KL_EXC_GP, 0);
	if (type < 2 && !pcide && d[0])
		kl_raise_error(v, KL_EXC_GP, 0);
	switch (type) {
	case 0:
		/* Of another context nothing is used before it was read again (tlb.h). */
		if (d[0] == current)
			kl_tlb_flush_page(v, d[1]);
		break;
	case 1:
		if (d[0] == current)
			kl_tlb_load_space(v);
		break;
	case 2:
		kl_tlb_flush(v);
		break;
	case 3:
		kl_tlb_load_space(v);
		break;
	}
	return KL_NEXT;
}

enum kl_next kl_op_invd(struct kl_vcpu *v, const struct kl_op *op)
{
	need_cpl0(v);
	return KL_NEXT;
}

enum kl_next kl_op_wbinvd(struct kl_vcpu *v, const struct kl_op *op)
{
	need_cpl0(v);
	return KL_NEXT;
}

enum kl_next kl_op_clflush(struct kl_vcpu *v, const struct kl_op *op)
{
	kl_probe(v, mem_linear(v, op, 1, false));
	return KL_NEXT;
}

/* ---- waiting ---- */

/* run.c sees the state and sleeps, or exits with KVM_EXIT_HLT. */
enum kl_next kl_op_hlt(struct kl_vcpu *v, const struct kl_op *op)
{
	need_cpl0(v);
	atomic_store_explicit(&v->mp_state, KVM_MP_STATE_HALTED, memory_order_relaxed);
	return KL_STOP;
}

enum kl_next kl_op_pause(struct kl_vcpu *v, const struct kl_op *op)
{
	kl_cpu_relax();
	return KL_NEXT;
}

/* KVM never advertises MONITOR and MWAIT, and runs them as no-operations. */
static enum kl_next monitor_mwait(struct kl_vcpu *v)
{
	if (v->cpl)
		kl_raise(v, KL_EXC_UD);
	if ((v->kvm->disabled_quirks & KL_QUIRK_MWAIT_NEVER_UD) && !v->has_mwait)
		kl_raise(v, KL_EXC_UD);
	return KL_NEXT;
}

enum kl_next kl_op_monitor(struct kl_vcpu *v, const struct kl_op *op)
{
	return monitor_mwait(v);
}

enum kl_next kl_op_mwait(struct kl_vcpu *v, const struct kl_op *op)
{
	return monitor_mwait(v);
}

/* ---- time and counters ---- */

static void read_tsc(struct kl_vcpu *v)
{
	uint64_t t;

	if ((v->cr4 & KL_CR4_TSD) && v->cpl && !kl_real_mode(v))
		kl_raise_error(v, KL_EXC_GP, 0);
	t = kl_x86_tsc(v);
	v->gpr[KL_RAX] = (uint32_t)t;
	v->gpr[KL_RDX] = t >> 32;
}

enum kl_next kl_op_rdtsc(struct kl_vcpu *v, const struct kl_op *op)
{
	read_tsc(v);
	return KL_NEXT;
}

enum kl_next kl_op_rdtscp(struct kl_vcpu *v, const struct kl_op *op)
{
	if (!v->has_rdtscp)
		kl_raise(v, KL_EXC_UD);
	read_tsc(v);
	v->gpr[KL_RCX] = (uint32_t)v->msr_tsc_aux;
	return KL_NEXT;
}

enum kl_next kl_op_rdpid(struct kl_vcpu *v, const struct kl_op *op)
{
	if (!v->has_rdpid)
		kl_raise(v, KL_EXC_UD);
	kl_gpr_set(v, op->rm, v->msr_tsc_aux, v->code_mode == KL_CODE64 ? 8 : 4);
	return KL_NEXT;
}

/* There is no PMU. */
enum kl_next kl_op_rdpmc(struct kl_vcpu *v, const struct kl_op *op)
{
	kl_raise_error(v, KL_EXC_GP, 0);
}

/* ---- FS and GS bases ---- */

enum kl_next kl_op_swapgs(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t base = v->seg[KL_GS].base;

	if (v->code_mode != KL_CODE64)
		kl_raise(v, KL_EXC_UD);
	need_cpl0(v);
	v->seg[KL_GS].base = v->msr_kernel_gs_base;
	v->msr_kernel_gs_base = base;
	return KL_NEXT;
}

static enum kl_next read_base(struct kl_vcpu *v, const struct kl_op *op, enum kl_seg seg)
{
	if (v->code_mode != KL_CODE64 || !(v->cr4 & KL_CR4_FSGSBASE))
		kl_raise(v, KL_EXC_UD);
	kl_gpr_set(v, op->rm, v->seg[seg].base, op->opsize);
	return KL_NEXT;
}

static enum kl_next write_base(struct kl_vcpu *v, const struct kl_op *op, enum kl_seg seg)
{
	uint64_t base;

	if (v->code_mode != KL_CODE64 || !(v->cr4 & KL_CR4_FSGSBASE))
		kl_raise(v, KL_EXC_UD);
	base = kl_gpr_get(v, op->rm, op->opsize);
	if (!kl_canonical(v, base))
		kl_raise_error(v, KL_EXC_GP, 0);
	v->seg[seg].base = base;
	return KL_NEXT;
}

enum kl_next kl_op_rdfsbase(struct kl_vcpu *v, const struct kl_op *op)
{
	return read_base(v, op, KL_FS);
}

enum kl_next kl_op_rdgsbase(struct kl_vcpu *v, const struct kl_op *op)
{
	return read_base(v, op, KL_GS);
}

enum kl_next kl_op_wrfsbase(struct kl_vcpu *v, const struct kl_op *op)
{
	return write_base(v, op, KL_FS);
}

enum kl_next kl_op_wrgsbase(struct kl_vcpu *v, const struct kl_op *op)
{
	return write_base(v, op, KL_GS);
}

/* There is no SMM, so RSM is never executed in it. */
enum kl_next kl_op_rsm(struct kl_vcpu *v, const struct kl_op *op)
{
	kl_raise(v, KL_EXC_UD);
}
