/* SPDX-License-Identifier: MIT */
/*
 * Descriptors and privilege changes, shared by segment.c, transfer.c and exception.c.
 */
#pragma once

#include "x86/vcpu.h"

/* A descriptor as it lies in a table; @base_hi only for 16-byte system descriptors. */
struct kl_desc {
	uint64_t low;
	uint32_t base_hi;
	uint64_t addr; /* linear address it was read from */
};

KL_INLINE unsigned kl_desc_type(const struct kl_desc *d)
{
	return (d->low >> 40) & 15;
}
KL_INLINE bool kl_desc_s(const struct kl_desc *d)
{
	return (d->low >> 44) & 1;
}
KL_INLINE unsigned kl_desc_dpl(const struct kl_desc *d)
{
	return (d->low >> 45) & 3;
}
KL_INLINE bool kl_desc_present(const struct kl_desc *d)
{
	return (d->low >> 47) & 1;
}
KL_INLINE bool kl_desc_l(const struct kl_desc *d)
{
	return (d->low >> 53) & 1;
}
KL_INLINE bool kl_desc_db(const struct kl_desc *d)
{
	return (d->low >> 54) & 1;
}
KL_INLINE bool kl_desc_is_code(const struct kl_desc *d)
{
	return kl_desc_s(d) && (kl_desc_type(d) & 8);
}
KL_INLINE bool kl_desc_conforming(const struct kl_desc *d)
{
	return kl_desc_type(d) & 4;
}

#define KL_DESC_NULL(sel) (((sel)&0xfffc) == 0)

KL_INLINE bool kl_real_mode(struct kl_vcpu *v)
{
	return !(v->cr0 & KL_CR0_PE);
}
KL_INLINE bool kl_vm86(struct kl_vcpu *v)
{
	return (v->cr0 & KL_CR0_PE) && (v->rflags & KL_FL_VM);
}

/* Read @sel's descriptor; outside the table: @vector(@error_sel & ~3 | ext). */
void kl_desc_read(struct kl_vcpu *v, uint16_t sel, struct kl_desc *d, unsigned vector,
		  uint32_t ext);
/* False if @sel lies outside its table. May leave for page faults. */
bool kl_desc_try_read(struct kl_vcpu *v, uint16_t sel, struct kl_desc *d);
/* The descriptor cache of @d. */
void kl_desc_to_segment(const struct kl_desc *d, uint16_t sel, struct kvm_segment *s);
/* Set the accessed bit in memory if it is clear. May leave. */
void kl_desc_set_accessed(struct kl_vcpu *v, struct kl_desc *d);
/* Make @s unusable: a null selector. */
void kl_segment_null(struct kvm_segment *s, uint16_t sel);

/* Stack pointer for privilege @cpl from the TSS; 32-bit also the selector. May leave (#TS). */
void kl_tss_stack(struct kl_vcpu *v, unsigned cpl, uint64_t *sp, uint16_t *ss, uint32_t ext);
/* 64-bit: stack @ist (1-7) of the TSS. */
uint64_t kl_tss_ist(struct kl_vcpu *v, unsigned ist, uint32_t ext);
/* Check @sel as the stack segment of privilege @cpl; faults are #TS(@sel | ext). */
void kl_check_inner_ss(struct kl_vcpu *v, uint16_t sel, unsigned cpl, struct kl_desc *d,
		       uint32_t ext);

/* A frame of @size bytes at @sp of the stack @ss: #SS(@error) if it does not fit. */
void kl_stack_room(struct kl_vcpu *v, const struct kvm_segment *ss, uint64_t sp, unsigned size,
		   uint32_t error);

/* Load DS, ES, FS, GS or SS as MOV does. May leave before anything changed. */
void kl_load_segment(struct kl_vcpu *v, enum kl_seg seg, uint16_t sel);
/* Real and virtual-8086 mode: base from selector. */
void kl_load_real_segment(struct kl_vcpu *v, enum kl_seg seg, uint16_t sel);
/* Set CS and CPL together; derived fields follow. */
void kl_set_cs(struct kl_vcpu *v, const struct kvm_segment *cs, unsigned cpl);
/* After a return to @cpl: data segments that it may not use become null. */
void kl_drop_inner_segments(struct kl_vcpu *v, unsigned cpl);

/* Stack pointer arithmetic by SS.B and mode. */
uint64_t kl_sp_mask(struct kl_vcpu *v);
KL_INLINE void kl_set_sp(struct kl_vcpu *v, uint64_t sp)
{
	uint64_t mask = kl_sp_mask(v);

	v->gpr[KL_RSP] = (v->gpr[KL_RSP] & ~mask) | (sp & mask);
	if (mask == 0xffffffff)
		v->gpr[KL_RSP] = (uint32_t)sp;
}

/* Effective RFLAGS after loading @val for the bits in @mask. */
void kl_load_flags(struct kl_vcpu *v, uint64_t val, uint64_t mask);
