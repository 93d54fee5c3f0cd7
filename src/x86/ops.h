/* SPDX-License-Identifier: MIT */
/*
 * What the handlers of ops_*.c are made of: operands, flags, stack, branches.
 *
 * Flags are the host's: a handler runs the instruction itself and takes its flags with
 * LAHF/SETO, so that flags the manuals leave undefined are those of this machine too. A
 * packed flags word ("ax") has OF in bit 0 and SF, ZF, AF, PF, CF in bits 8..15.
 */
#pragma once

#include "x86/insn.h"

#if KL_TSAN
#define KL_OP_EXTABLE(label) ""
#else
#define KL_OP_EXTABLE(label) KL_EXTABLE(label)
#endif

/* Asm fragments around an instruction: flags from and to eax. */
#define KL_FLAGS_IN  "addb $127, %%al\n\tsahf\n\t"
#define KL_FLAGS_OUT "\n\tlahf\n\tseto %%al"
/* The same for what must leave OF alone. */
#define KL_FLAGS_IN_OF_KEPT  KL_FLAGS_IN "seto %%al\n\t"
#define KL_FLAGS_OUT_OF_KEPT "\n\tlahf"

KL_INLINE uint32_t kl_flags_pack(const struct kl_vcpu *v)
{
	return ((uint32_t)v->rflags & 0xd5) << 8 | ((uint32_t)(v->rflags >> 11) & 1);
}

KL_INLINE void kl_flags_put(struct kl_vcpu *v, uint32_t ax)
{
	v->rflags = (v->rflags & ~(uint64_t)KL_FL_STATUS) | ((ax >> 8) & 0xd5) |
		    (uint64_t)(ax & 1) << 11;
}

/* The condition codes in encoding order, as Zydis spells the mnemonics' suffixes. */
// clang-format off
#define KL_CONDITIONS(X) \
	X(0, O) X(1, NO) X(2, B) X(3, NB) X(4, Z) X(5, NZ) X(6, BE) X(7, NBE) \
	X(8, S) X(9, NS) X(10, P) X(11, NP) X(12, L) X(13, NL) X(14, LE) X(15, NLE)
// clang-format on

/* Condition code @cc (encoding order) of @fl. */
KL_INLINE bool kl_cond(uint64_t fl, unsigned cc)
{
	bool r;

	switch (cc >> 1) {
	case 0:
		r = fl & KL_FL_OF;
		break;
	case 1:
		r = fl & KL_FL_CF;
		break;
	case 2:
		r = fl & KL_FL_ZF;
		break;
	case 3:
		r = fl & (KL_FL_CF | KL_FL_ZF);
		break;
	case 4:
		r = fl & KL_FL_SF;
		break;
	case 5:
		r = fl & KL_FL_PF;
		break;
	case 6:
		r = ((fl >> 11) ^ (fl >> 7)) & 1;
		break;
	default:
		r = (((fl >> 11) ^ (fl >> 7)) & 1) || (fl & KL_FL_ZF);
		break;
	}
	return r ^ (cc & 1);
}

/* Linear address of the memory operand. */
KL_INLINE uint64_t kl_mem_lin(struct kl_vcpu *v, const struct kl_op *op, unsigned size, bool write)
{
	return kl_seg_linear(v, op->seg, kl_ea(v, op), size, write);
}

/*
 * A part of the memory operand, @byte into it, that is an access of its own: it has a limit check
 * of its own, and offsets wrap between parts.
 */
KL_INLINE uint64_t kl_mem_part(struct kl_vcpu *v, const struct kl_op *op, unsigned byte,
			       unsigned size, bool write)
{
	uint64_t ea = kl_ea(v, op) + byte;

	ea = op->addrsize == 8 ? ea : op->addrsize == 4 ? (uint32_t)ea : (uint16_t)ea;
	return kl_seg_linear(v, op->seg, ea, size, write);
}

KL_INLINE uint64_t kl_mem_read(struct kl_vcpu *v, const struct kl_op *op, unsigned size)
{
	return kl_read(v, kl_mem_lin(v, op, size, false), size);
}

/* After a store through a pointer: was it into the running code? */
KL_INLINE void kl_note_store(struct kl_vcpu *v, const void *p)
{
	if (KL_UNLIKELY((uint64_t)p - (uint64_t)v->code_page + 16 < KL_PAGE_SIZE + 16))
		v->code_written = true;
}

/*
 * Pointer for a locked operation on the memory operand, or NULL: do it without (MMIO).
 * Page-crossing operands work if the two pages are neighbours in the host, too.
 */
KL_INLINE void *kl_mem_rmw(struct kl_vcpu *v, uint64_t lin, unsigned size)
{
	const struct kl_tlb_entry *e = kl_tlb_data(v, lin);
	void *p;

	if (KL_LIKELY(e->wtag == (lin & KL_PAGE_MASK) && e->rtag == e->wtag &&
		      (lin & ~KL_PAGE_MASK) + size <= KL_PAGE_SIZE))
		p = kl_tlb_host(e, lin);
	else
		p = kl_rmw_pointer(v, lin, size);
	return p;
}

/* Fault as a store of @size bytes would. */
KL_INLINE void kl_mem_probe(struct kl_vcpu *v, uint64_t lin, unsigned size)
{
	if (KL_UNLIKELY(kl_tlb_data(v, lin)->wtag != (lin & KL_PAGE_MASK) ||
			(lin & ~KL_PAGE_MASK) + size > KL_PAGE_SIZE))
		(void)kl_probe_writable(v, lin, size);
}

/* Read-modify-write without LOCK: what is written must be writable before anything happens. */
struct kl_rmw {
	void *p;
	uint64_t lin;
};

KL_INLINE uint64_t kl_rmw_begin(struct kl_vcpu *v, const struct kl_op *op, unsigned size,
				struct kl_rmw *m)
{
	m->lin = kl_mem_lin(v, op, size, true);
	m->p = kl_mem_rmw(v, m->lin, size);
	/* A locked operation that did not get a pointer a moment ago */
	if (KL_UNLIKELY((op->flags & KL_OPF_LOCK) && m->p))
		kl_rmw_restart(v);
	return KL_LIKELY(m->p) ? kl_load(m->p, size) : kl_read(v, m->lin, size);
}

KL_INLINE void kl_rmw_end(struct kl_vcpu *v, struct kl_rmw *m, uint64_t val, unsigned size)
{
	if (KL_LIKELY(m->p)) {
		kl_store(m->p, val, size);
		kl_note_store(v, m->p);
	} else {
		kl_write_slow(v, m->lin, val, size);
	}
}

/* Near branch target, checked: canonical in 64-bit code, in the limit elsewhere. */
void kl_branch_check_slow(struct kl_vcpu *v, uint64_t target);

KL_INLINE void kl_branch_check(struct kl_vcpu *v, uint64_t target)
{
	if (KL_LIKELY(v->code_mode == KL_CODE64)) {
		if (KL_UNLIKELY((uint64_t)((int64_t)(target << 16) >> 16) != target))
			kl_branch_check_slow(v, target);
	} else if (KL_UNLIKELY(target > v->seg[KL_CS].limit)) {
		kl_branch_check_slow(v, target);
	}
}

/* The stack. kl_stack_size(): bytes of rSP that count. */
KL_INLINE uint64_t kl_stack_mask(const struct kl_vcpu *v)
{
	return v->long_mode ? ~0ull : v->seg[KL_SS].db ? 0xffffffffull : 0xffffull;
}

KL_INLINE void kl_rsp_set(struct kl_vcpu *v, uint64_t val)
{
	uint64_t mask = kl_stack_mask(v);

	if (mask == 0xffff)
		*(uint16_t *)&v->gpr[KL_RSP] = (uint16_t)val;
	else
		v->gpr[KL_RSP] = val & mask;
}

/* Read @size bytes @off above rSP. */
KL_INLINE uint64_t kl_stack_read(struct kl_vcpu *v, uint64_t off, unsigned size)
{
	uint64_t sp = (v->gpr[KL_RSP] + off) & kl_stack_mask(v);

	return kl_read(v, kl_seg_linear(v, KL_SS, sp, size, false), size);
}

/* Store at rSP + @off; rSP does not move. */
KL_INLINE void kl_stack_write(struct kl_vcpu *v, uint64_t off, uint64_t val, unsigned size)
{
	uint64_t sp = (v->gpr[KL_RSP] + off) & kl_stack_mask(v);

	kl_write(v, kl_seg_linear(v, KL_SS, sp, size, true), val, size);
}

KL_INLINE void kl_push(struct kl_vcpu *v, uint64_t val, unsigned size)
{
	kl_stack_write(v, -(uint64_t)size, val, size);
	kl_rsp_set(v, v->gpr[KL_RSP] - size);
}
