/* SPDX-License-Identifier: MIT */
/*
 * XCHG (always locked), XADD, CMPXCHG, CMPXCHG8B, CMPXCHG16B. With LOCK they are the host's
 * atomics on guest memory; where there is no host pointer (MMIO) they are a read and a write.
 */
#include "x86/decode.h"
#include "x86/ops.h"

#define REG(v, off, bits) (*(uint##bits##_t *)kl_gpr(v, off))
#define SIZES(X)          X(8, "b") X(16, "w") X(32, "l") X(64, "q")

static enum kl_next xchg_rr(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t a = kl_gpr_get(v, op->reg, op->opsize), b = kl_gpr_get(v, op->rm, op->opsize);

	kl_gpr_set(v, op->reg, b, op->opsize);
	kl_gpr_set(v, op->rm, a, op->opsize);
	return KL_NEXT;
}

#define XCHG(bits, sfx)                                                                  \
	static enum kl_next xchg##bits##_m(struct kl_vcpu *v, const struct kl_op *op)    \
	{                                                                                \
		struct kl_rmw m = {.lin = kl_mem_lin(v, op, bits / 8, true)};            \
		uint##bits##_t r = REG(v, op->reg, bits), old;                           \
                                                                                         \
		m.p = kl_mem_rmw(v, m.lin, bits / 8);                                    \
		if (m.p) {                                                               \
			old = r;                                                         \
			__asm__ volatile("1: xchg" sfx " %0, %1\n\t" KL_OP_EXTABLE("1b") \
					 : "+r"(old), "+m"(*(uint##bits##_t *)m.p)       \
					 :                                               \
					 : "memory");                                    \
			kl_note_store(v, m.p);                                           \
		} else {                                                                 \
			old = (uint##bits##_t)kl_read(v, m.lin, bits / 8);               \
			kl_write_slow(v, m.lin, r, bits / 8);                            \
		}                                                                        \
		kl_gpr_set(v, op->reg, old, bits / 8);                                   \
		return KL_NEXT;                                                          \
	}
SIZES(XCHG)

#define XADD(bits, sfx)                                                                            \
	static enum kl_next xadd##bits##_r(struct kl_vcpu *v, const struct kl_op *op)              \
	{                                                                                          \
		uint##bits##_t d = REG(v, op->reg, bits), s = REG(v, op->rm, bits);                \
		uint32_t ax;                                                                       \
                                                                                                   \
		__asm__("xadd" sfx " %1, %0" KL_FLAGS_OUT : "+r"(d), "+r"(s), "=&a"(ax) : : "cc"); \
		kl_gpr_set(v, op->rm, s, bits / 8);                                                \
		kl_gpr_set(v, op->reg, d, bits / 8);                                               \
		kl_flags_put(v, ax);                                                               \
		return KL_NEXT;                                                                    \
	}                                                                                          \
	static enum kl_next xadd##bits##_m(struct kl_vcpu *v, const struct kl_op *op)              \
	{                                                                                          \
		struct kl_rmw m = {.lin = kl_mem_lin(v, op, bits / 8, true)};                      \
		uint##bits##_t d, s = REG(v, op->reg, bits);                                       \
		uint32_t ax;                                                                       \
                                                                                                   \
		m.p = kl_mem_rmw(v, m.lin, bits / 8);                                              \
		if (m.p && (op->flags & KL_OPF_LOCK)) {                                            \
			__asm__ volatile("1: lock xadd" sfx " %1, %0" KL_FLAGS_OUT                 \
					 "\n\t" KL_OP_EXTABLE("1b")                                \
					 : "+m"(*(uint##bits##_t *)m.p), "+r"(s), "=&a"(ax)        \
					 :                                                         \
					 : "cc", "memory");                                        \
			kl_note_store(v, m.p);                                                     \
		} else {                                                                           \
			d = (uint##bits##_t)(m.p ? kl_load(m.p, bits / 8)                          \
						 : kl_read(v, m.lin, bits / 8));                   \
			__asm__("xadd" sfx " %1, %0" KL_FLAGS_OUT                                  \
				: "+r"(d), "+r"(s), "=&a"(ax)                                      \
				:                                                                  \
				: "cc");                                                           \
			kl_rmw_end(v, &m, d, bits / 8);                                            \
		}                                                                                  \
		kl_gpr_set(v, op->reg, s, bits / 8);                                               \
		kl_flags_put(v, ax);                                                               \
		return KL_NEXT;                                                                    \
	}
SIZES(XADD)

/*
 * In 32-bit form the host's CMPXCHG writes only what it must: EAX on failure, the destination
 * on success; 64-bit variables take its zero extension.
 */
#define CMPXCHG(bits, sfx)                                                                      \
	static enum kl_next cmpxchg##bits##_r(struct kl_vcpu *v, const struct kl_op *op)        \
	{                                                                                       \
		uint##bits##_t d = REG(v, op->reg, bits), s = REG(v, op->rm, bits);             \
		uint##bits##_t a = REG(v, 0, bits), old = a;                                    \
		uint64_t fl;                                                                    \
                                                                                                \
		__asm__ volatile("cmpxchg" sfx " %3, %0\n\tpushfq\n\tpopq %2"                   \
				 : "+&r"(d), "+a"(a), "=&r"(fl)                                 \
				 : "r"(s)                                                       \
				 : "cc", "memory");                                             \
		if (fl & KL_FL_ZF)                                                              \
			kl_gpr_set(v, op->reg, d, bits / 8);                                    \
		else                                                                            \
			kl_gpr_set(v, 0, a, bits / 8);                                          \
		(void)old;                                                                      \
		v->rflags = (v->rflags & ~(uint64_t)KL_FL_STATUS) | (fl & KL_FL_STATUS);        \
		return KL_NEXT;                                                                 \
	}                                                                                       \
	static enum kl_next cmpxchg##bits##_m(struct kl_vcpu *v, const struct kl_op *op)        \
	{                                                                                       \
		struct kl_rmw m = {.lin = kl_mem_lin(v, op, bits / 8, true)};                   \
		uint##bits##_t d, s = REG(v, op->reg, bits), a = REG(v, 0, bits);               \
		uint64_t fl;                                                                    \
                                                                                                \
		m.p = kl_mem_rmw(v, m.lin, bits / 8);                                           \
		if (m.p && (op->flags & KL_OPF_LOCK)) {                                         \
			__asm__ volatile("1: lock cmpxchg" sfx                                  \
					 " %3, %0\n\tpushfq\n\tpopq %2\n\t" KL_OP_EXTABLE("1b") \
					 : "+m"(*(uint##bits##_t *)m.p), "+a"(a), "=&r"(fl)     \
					 : "r"(s)                                               \
					 : "cc", "memory");                                     \
			kl_note_store(v, m.p);                                                  \
		} else {                                                                        \
			d = (uint##bits##_t)(m.p ? kl_load(m.p, bits / 8)                       \
						 : kl_read(v, m.lin, bits / 8));                \
			__asm__ volatile("cmpxchg" sfx " %3, %0\n\tpushfq\n\tpopq %2"           \
					 : "+&r"(d), "+a"(a), "=&r"(fl)                         \
					 : "r"(s)                                               \
					 : "cc", "memory");                                     \
			kl_rmw_end(v, &m, d, bits / 8);                                         \
		}                                                                               \
		if (!(fl & KL_FL_ZF))                                                           \
			kl_gpr_set(v, 0, a, bits / 8);                                          \
		v->rflags = (v->rflags & ~(uint64_t)KL_FL_STATUS) | (fl & KL_FL_STATUS);        \
		return KL_NEXT;                                                                 \
	}
SIZES(CMPXCHG)

static void set_zf(struct kl_vcpu *v, bool zf)
{
	v->rflags = (v->rflags & ~(uint64_t)KL_FL_ZF) | (zf ? KL_FL_ZF : 0);
}

static enum kl_next cmpxchg8b(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t lin = kl_mem_lin(v, op, 8, true);
	uint32_t *p = kl_mem_rmw(v, lin, 8);
	uint64_t old = (uint32_t)v->gpr[KL_RAX] | v->gpr[KL_RDX] << 32;
	uint64_t new = (uint32_t)v->gpr[KL_RBX] | v->gpr[KL_RCX] << 32, cur = old;
	bool same;

	if (p) {
		__asm__ volatile("1: lock cmpxchgq %3, %0\n\t" KL_OP_EXTABLE("1b")
				 : "+m"(*(uint64_t *)p), "+a"(cur), "=@ccz"(same)
				 : "r"(new)
				 : "cc", "memory");
		kl_note_store(v, p);
	} else {
		cur = kl_read(v, lin, 8);
		same = cur == old;
		kl_write_slow(v, lin, same ? new : cur, 8);
	}
	if (!same) {
		v->gpr[KL_RAX] = (uint32_t)cur;
		v->gpr[KL_RDX] = cur >> 32;
	}
	set_zf(v, same);
	return KL_NEXT;
}

static enum kl_next cmpxchg16b(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t lin = kl_mem_lin(v, op, 16, true);
	uint64_t lo = v->gpr[KL_RAX], hi = v->gpr[KL_RDX], buf[2];
	void *p;
	bool same;

	if (lin & 15)
		kl_raise_error(v, KL_EXC_GP, 0);
	p = kl_mem_rmw(v, lin, 16);
	if (p) {
		__asm__ volatile("1: lock cmpxchg16b %0\n\t" KL_OP_EXTABLE("1b")
				 : "+m"(*(unsigned __int128 *)p), "+a"(lo), "+d"(hi), "=@ccz"(same)
				 : "b"(v->gpr[KL_RBX]), "c"(v->gpr[KL_RCX])
				 : "cc", "memory");
		kl_note_store(v, p);
	} else {
		kl_read_bytes(v, lin, buf, 16);
		same = buf[0] == lo && buf[1] == hi;
		lo = buf[0];
		hi = buf[1];
		if (same) {
			buf[0] = v->gpr[KL_RBX];
			buf[1] = v->gpr[KL_RCX];
		}
		kl_write_bytes(v, lin, buf, 16);
	}
	if (!same) {
		v->gpr[KL_RAX] = lo;
		v->gpr[KL_RDX] = hi;
	}
	set_zf(v, same);
	return KL_NEXT;
}

static kl_op_fn *const xchg_m[4] = {xchg8_m, xchg16_m, xchg32_m, xchg64_m};
#define FORMS2(n)                                                 \
	{n##8_r, n##8_m}, {n##16_r, n##16_m}, {n##32_r, n##32_m}, \
	{                                                         \
		n##64_r, n##64_m                                  \
	}
static kl_op_fn *const xadd[4][2] = {FORMS2(xadd)};
static kl_op_fn *const cmpxchg[4][2] = {FORMS2(cmpxchg)};

bool kl_select_atomic(struct kl_decode *d)
{
	bool mem = d->op->flags & KL_OPF_MEM;

	d->stores = mem;
	switch (d->in.mnemonic) {
	case ZYDIS_MNEMONIC_XCHG:
		d->op->fn = mem ? xchg_m[d->size2] : xchg_rr;
		d->simple = true;
		if (mem)
			d->op->flags |= KL_OPF_LOCK;
		return true;
	case ZYDIS_MNEMONIC_XADD:
		d->op->fn = xadd[d->size2][mem];
		d->simple = true;
		d->writes_flags = true;
		return true;
	case ZYDIS_MNEMONIC_CMPXCHG:
		d->op->fn = cmpxchg[d->size2][mem];
		d->simple = true;
		d->writes_flags = true;
		return true;
	case ZYDIS_MNEMONIC_CMPXCHG8B:
		d->op->fn = cmpxchg8b;
		return mem;
	case ZYDIS_MNEMONIC_CMPXCHG16B:
		d->op->fn = cmpxchg16b;
		return mem;
	default:
		d->stores = false;
		return false;
	}
}
