/* SPDX-License-Identifier: MIT */
/*
 * Guest memory: the slow path behind the vCPU TLB, accesses of any length, MMIO fragments.
 *
 * Every access that needs two pages holds both translations in one stay in guest mode: a
 * stage-2 miss leaves guest mode, so it starts the access over from the first page. What was
 * learnt outside and needs no pointer (this page is MMIO) is kept across the new start.
 *
 * MMIO (M3, M4, U2): a read that has no answer yet records its fragments and leaves with
 * KL_LEAVE_EXIT; run.c restarts the instruction when the answers are there, and the same
 * reads then consume them in order. A write records fragments and lets the instruction
 * finish.
 */
#include "x86/access.h"

#include <errno.h>
#include <string.h>
#include <Zydis/Zydis.h>

#include "base/log.h"
#include "base/racepoint.h"
#include "host/cpu.h"
#include "host/guard.h"
#include "host/sys.h"
#include "x86/debug.h"
#include "x86/fast.h"
#include "x86/insn.h"
#include "x86/paging.h"
#include "x86/paravirt.h"
#include "x86/report.h"
#include "x86/xlate/xlate.h"

/* One page of an access. */
struct page {
	uint8_t *ptr;
	uint64_t gpa;
	bool mmio;
	bool tracked; /* what is written there is to be reported (report.h) */
	bool skip_ad; /* the guest's page tables are in read-only memory */
};

/* ---- TLB ---- */

void kl_serve_flush(struct kl_vcpu *v)
{
	if (!kl_vcpu_take_requests(&v->core, KL_REQ_TLB_FLUSH))
		return;
	kl_tlb_flush(v);
	memset(v->table_page, 0, sizeof(v->table_page));
	/* What is being executed may have been decoded from a page that is gone. */
	v->code_written = true;
	kl_stat_own_add(&v->core.stats.tlb_flush, 1);
}

static enum kl_tlb_mode mode_of(struct kl_vcpu *v, unsigned cpl, bool implicit)
{
	if (cpl == 3 && !implicit)
		return (v->cr0 & KL_CR0_AM) && (v->rflags & KL_FL_AC) ? KL_TLB_ALIGNED
								      : KL_TLB_USER;
	if (!(v->cr4 & KL_CR4_SMAP))
		return KL_TLB_SUPER;
	return !implicit && (v->rflags & KL_FL_AC) ? KL_TLB_SUPER : KL_TLB_SUPER_SMAP;
}

enum kl_tlb_mode kl_tlb_mode_of(struct kl_vcpu *v, unsigned cpl, bool implicit)
{
	enum kl_tlb_mode mode = mode_of(v, cpl, implicit);

	if (KL_UNLIKELY(!v->tlbs.made[mode]))
		kl_tlb_make(v, mode);
	return mode;
}

void kl_x86_update_mode(struct kl_vcpu *v)
{
	const struct kvm_segment *cs = &v->seg[KL_CS];

	v->long_mode = (v->efer & KL_EFER_LMA) && cs->l;
	v->code_mode = v->long_mode ? KL_CODE64 : cs->db ? KL_CODE32 : KL_CODE16;
	v->tlb_mode = (uint8_t)kl_tlb_mode_of(v, v->cpl, false);
	v->tlb_now = v->tlb[v->tlb_mode];
	v->code_gen = v->tlbs.gen[v->tlb_mode];
	kl_code_mode_changed(v);
}

/* ---- translation ---- */

/*
 * May a stage-2 miss become an asynchronous page fault? As KVM asks: the guest could take an
 * interrupt now, no event is on its way. Besides, nothing of the instruction is done that cannot be
 * done again, because a device has answered.
 */
static bool may_be_async(const struct kl_vcpu *v)
{
	bool event = v->delivering || v->exc.pending || v->exc.injected || v->irq.injected ||
		     v->nmi.injected;
	bool begun = v->mmio_replay || v->nr_mmio || v->pio_left || v->task_undo.valid || v->check;

	return (v->rflags & KL_FL_IF) && !v->int_shadow && !v->shadowed && !event && !begun &&
	       (v->cr0 & KL_CR0_PG) && (v->cpl || !v->pv_apf_user_only);
}

/* OUTSIDE. As kl_mmu_fault(); with *@token set, the guest is to get #PF instead of the page. */
static int resolve(struct kl_vcpu *v, uint64_t gpa, unsigned access, uint32_t *token)
{
	int r;

	if (KL_UNLIKELY(v->pv_apf) && may_be_async(v)) {
		r = kl_mmu_fault(&v->core, gpa, access | KL_ACC_NOWAIT);
		if (r == -EAGAIN)
			r = kl_pv_async_pf(v, gpa, access & KL_ACC_WRITE, token);
		if (r != -EAGAIN)
			return r;
	}
	return kl_mmu_fault(&v->core, gpa, access);
}

/* A stage-2 miss. Leaves if the fault can't be resolved or the vCPU is wanted elsewhere. */
static bool resolve_is_mmio(struct kl_vcpu *v, uint64_t gpa, unsigned access)
{
	jmp_buf *guard = kl_self.guard;
	bool alone = v->core.alone;
	uint32_t req, token = 0;
	int r;

	kl_vcpu_leave_guest(&v->core);
	if (KL_UNLIKELY(alone)) /* this may take long */
		kl_vcpus_go(&v->core);
	kl_self.guard = NULL; /* a trap in the engine is not the guest's */
	r = resolve(v, gpa, access, &token);
	kl_self.guard = guard;
	kl_vcpu_enter_guest(&v->core);
	req = kl_vcpu_requests(&v->core);
	if (req & KL_REQ_TLB_FLUSH)
		kl_serve_flush(v);
	if (token)
		kl_raise_pf(v, token, 0);
	if (r < 0) {
		v->exit_errno = r;
		kl_leave(v, KL_LEAVE_EXIT);
	}
	if (alone || (req & (KL_REQ_SIGNAL | KL_REQ_VM_DEAD)))
		kl_leave(v, KL_LEAVE_RESTART);
	return r == KL_FAULT_MMIO;
}

void kl_raise_not_canonical(struct kl_vcpu *v, uint64_t lin)
{
	const struct kl_op *op = v->cur_op;
	bool stack = op && (op->flags & KL_OPF_STACK);

	/*
	 * CALL [m], PUSH [m], POP [m] have one of each. BT's operand may lie anywhere. Not by
	 * kl_seg_linear(), which raises what is wrong with the other.
	 */
	if (op && (op->flags & KL_OPF_MEM)) {
		uint64_t mem = kl_ea(v, op) + (op->seg >= KL_FS ? v->seg[op->seg].base : 0);

		if (!stack || lin - mem < 8)
			stack = op->seg == KL_SS;
	}
	kl_raise_error(v, stack ? KL_EXC_SS : KL_EXC_GP, 0);
}

/* True: guest mode was left meanwhile, start the access again. */
static bool translate(struct kl_vcpu *v, uint64_t lin, unsigned access, enum kl_tlb_mode mode,
		      struct page *p)
{
	struct kl_tlb_entry *e = kl_tlb_entry(v, mode, lin);
	uint64_t tag = access == KL_ACC_READ ? e->rtag : access == KL_ACC_WRITE ? e->wtag : e->xtag;
	struct kl_walk w = {.skip_ad = p->skip_ad};
	bool writable = false, mmio = false;
	enum kl_walk_status st;
	uint8_t *page;

	p->tracked = false;
	if (tag == (lin & KL_PAGE_MASK)) {
		p->ptr = kl_tlb_host(e, lin);
		return false;
	}
	if (v->mmio_tag == ((lin & KL_PAGE_MASK) | mode) && (v->mmio_access & access)) {
		p->gpa = v->mmio_gpa | (lin & ~KL_PAGE_MASK);
		page = kl_mmu_lookup(&v->core, v->mmio_gpa, access, &writable, &mmio);
		if (KL_LIKELY(!page && mmio)) {
			p->mmio = true;
			return false;
		}
		v->mmio_tag = KL_MMIO_NONE;
	}
	st = kl_walk(v, lin, access, mode, true, &w);
	if (KL_UNLIKELY(v->nr_notes)) {
		kl_report_notes(v);
		return true;
	}
	switch (st) {
	case KL_WALK_OK:
		break;
	case KL_WALK_FAULT:
		kl_raise_pf(v, lin, w.error);
	case KL_WALK_GP:
		kl_raise_not_canonical(v, lin);
	case KL_WALK_MMIO:
		kl_emulation_failure(v);
	case KL_WALK_MISS:
		if (resolve_is_mmio(v, w.miss_gpa, w.miss_access)) {
			if (w.miss_access != KL_ACC_WRITE)
				kl_emulation_failure(v);
			p->skip_ad = true;
		}
		return true;
	}
	p->gpa = w.gpa;
	page = kl_mmu_lookup(&v->core, w.gpa & KL_PAGE_MASK, access, &writable, &mmio);
	if (KL_LIKELY(page)) {
		kl_tlb_fill(v, lin, mode, &w, page, access, writable);
		p->tracked = access == KL_ACC_WRITE && !writable;
		p->ptr = page + (lin & ~KL_PAGE_MASK);
		return false;
	}
	if (mmio) {
		v->mmio_tag = (lin & KL_PAGE_MASK) | mode;
		v->mmio_gpa = w.gpa & KL_PAGE_MASK;
		v->mmio_access = kl_walk_allowed(v, &w, mode);
		if (!w.dirty)
			v->mmio_access &= ~KL_ACC_WRITE;
		p->mmio = true;
		return false;
	}
	p->mmio = resolve_is_mmio(v, w.gpa, access);
	return true;
}

/*
 * Linear addresses of code have 32 bits outside 64-bit code; what the processor itself reads
 * and writes (@system: tables, frames) lies anywhere as soon as long mode is active.
 */
static bool wide_linear(struct kl_vcpu *v, bool system)
{
	return v->long_mode || (system && (v->efer & KL_EFER_LMA));
}

/* Both pages of [@lin, @lin + @len), in one stay in guest mode. Returns bytes in the first. */
static unsigned translate_range(struct kl_vcpu *v, uint64_t lin, unsigned len, unsigned access,
				enum kl_tlb_mode mode, bool system, struct page p[2])
{
	unsigned first = kl_min(len, (unsigned)(KL_PAGE_SIZE - (lin & ~KL_PAGE_MASK)));
	uint64_t lin2 = lin + first;

	if (!wide_linear(v, system)) {
		lin = (uint32_t)lin; /* a table's base and an offset */
		lin2 = (uint32_t)lin2;
	}
	memset(p, 0, 2 * sizeof(*p));
again:
	if (!p[0].mmio && translate(v, lin, access, mode, &p[0]))
		goto again;
	if (first < len && !p[1].mmio && translate(v, lin2, access, mode, &p[1]))
		goto again;
	if (KL_UNLIKELY(v->check)) {
		bool once = p[0].mmio || p[0].tracked || p[1].mmio || p[1].tracked;

		p[0].ptr = kl_check_access(v, access, once, first < len, p[0].ptr, first);
		if (first < len)
			p[1].ptr = kl_check_access(v, access, once, true, p[1].ptr, len - first);
	}
	return first;
}

/* ---- MMIO ---- */

static void mmio_check(struct kl_vcpu *v)
{
	if (!v->cur_op || !(v->cur_op->flags & KL_OPF_MMIO_OK))
		kl_emulation_failure(v);
}

/* True if the answer is there; else the fragments wait to be exited with. */
static bool mmio_read(struct kl_vcpu *v, uint64_t gpa, uint8_t *buf, unsigned len)
{
	bool complete = true;

	v->mmio_rip = kl_rip_now(v);
	for (unsigned done = 0, n; done < len; done += n) {
		struct kl_mmio_fragment *f = &v->mmio[v->mmio_used];

		n = kl_min(len - done, 8u);
		if (v->mmio_used < v->nr_mmio &&
		    (f->gpa != gpa + done || f->len != n || f->is_write))
			v->nr_mmio = v->mmio_used; /* not the same instruction any more */
		if (v->mmio_used == v->nr_mmio) {
			if (v->nr_mmio == KL_MAX_MMIO_FRAGMENTS)
				kl_emulation_failure(v);
			*f = (struct kl_mmio_fragment){.gpa = gpa + done, .len = (uint8_t)n};
			v->nr_mmio++;
		}
		if (f->done)
			memcpy(buf + done, f->data, n);
		else
			complete = false;
		v->mmio_used++;
	}
	return complete;
}

static void mmio_write(struct kl_vcpu *v, uint64_t gpa, const uint8_t *buf, unsigned len)
{
	v->mmio_rip = kl_rip_now(v);
	for (unsigned done = 0, n; done < len; done += n) {
		struct kl_mmio_fragment *f = &v->mmio[v->nr_mmio];

		n = kl_min(len - done, 8u);
		if (v->mmio_used < v->nr_mmio)
			v->nr_mmio = v->mmio_used;
		if (v->nr_mmio == KL_MAX_MMIO_FRAGMENTS)
			kl_emulation_failure(v);
		f = &v->mmio[v->nr_mmio++];
		*f = (struct kl_mmio_fragment){
			.gpa = gpa + done, .len = (uint8_t)n, .is_write = true};
		memcpy(f->data, buf + done, n);
		v->mmio_used++;
	}
	v->exit_pending = true;
}

/* ---- accesses ---- */

static void load_part(void *dst, const void *src, unsigned len)
{
	uint64_t val;

	switch (len) {
	case 1:
	case 2:
	case 4:
	case 8:
		val = kl_load(src, len);
		memcpy(dst, &val, len);
		break;
	default:
		kl_access_copy(dst, src, len);
	}
}

static void store_part(struct kl_vcpu *v, uint8_t *dst, const void *src, unsigned len)
{
	uint64_t val = 0;

	switch (len) {
	case 1:
	case 2:
	case 4:
	case 8:
		memcpy(&val, src, len);
		kl_store(dst, val, len);
		break;
	default:
		kl_access_copy(dst, src, len);
	}
	if ((uint8_t *)((uint64_t)dst & KL_PAGE_MASK) == v->code_page)
		v->code_written = true;
}

/* A write that changes nothing: it faults, or waits and is abandoned, as a store would. */
static void touch(uint8_t *p)
{
#if KL_TSAN
	__atomic_fetch_or(p, 0, __ATOMIC_RELAXED);
#else
	__asm__ volatile("1: lock orb $0, %0\n\t" KL_EXTABLE("1b") : "+m"(*p) : : "memory", "cc");
#endif
}

/* Put back what was there, unless that is not possible any more. */
static void restore(uint8_t *p, const uint8_t *old, unsigned len)
{
	jmp_buf here;

	/* Kicks must not be lost for long: whoever sends them waits for this vCPU. */
	for (volatile unsigned tries = 0; tries < 4; tries++) {
		enum kl_guard_reason why = kl_guard_enter(&here);

		if (why == KL_GUARD_NONE)
			kl_access_copy(p, old, len);
		if (why != KL_GUARD_INTR)
			break;
	}
}

#define SPLIT_MAX 32

/*
 * An operand in two pages that are no neighbours in the host. If the second page goes away or
 * the store has to be abandoned the instruction runs again, so the first half must not stay:
 * it may be what the instruction read.
 */
static void store_split(struct kl_vcpu *v, const struct page p[2], const uint8_t *buf,
			unsigned first, unsigned len)
{
	jmp_buf *outer = kl_self.guard;
	uint8_t old[SPLIT_MAX];
	enum kl_guard_reason why;
	uint64_t fault_addr;
	jmp_buf here;

	touch(p[0].ptr);
	touch(p[1].ptr);
	kl_access_copy(old, p[0].ptr, first);
	kl_access_copy(old + first, p[1].ptr, len - first);
	racepoint("split-store");
	why = kl_guard_enter(&here);
	if (KL_LIKELY(why == KL_GUARD_NONE)) {
		store_part(v, p[0].ptr, buf, first);
		store_part(v, p[1].ptr, buf + first, len - first);
		kl_guard_leave(outer);
		return;
	}
	fault_addr = kl_self.fault_addr;
	restore(p[1].ptr, old + first, len - first);
	restore(p[0].ptr, old, first);
	kl_self.fault_addr = fault_addr;
	kl_guard_leave(outer);
	_longjmp(*outer, (int)why);
}

/* Of these Intel's processors do not check the alignment. */
static bool never_checked(const struct kl_op *op, unsigned len)
{
	return kl_host_is_intel() &&
	       (len >= 16 || (op && (op->mnemonic == ZYDIS_MNEMONIC_VCVTPS2PH ||
				     op->mnemonic == ZYDIS_MNEMONIC_VCVTPH2PS)));
}

/*
 * #AC, before anything else that is wrong with the address. Vectors count as 16 bytes, floats of
 * 10 as 8, environments by their words.
 */
static KL_COLD void check_alignment(struct kl_vcpu *v, uint64_t lin, unsigned len)
{
	unsigned align;

	switch (len) {
	case 10:
		align = 8;
		break;
	case 28:
	case 108:
		align = 4;
		break;
	case 14:
	case 94:
		align = 2;
		break;
	default:
		if (len & (len - 1) || never_checked(v->cur_op, len))
			return;
		align = kl_min(len, 16u);
		break;
	}
	if (!(lin & (align - 1)))
		return;
	if (!kl_canonical(v, lin))
		kl_raise_not_canonical(v, lin);
	kl_raise_error(v, KL_EXC_AC, 0);
}

/* @len at most a page. */
static void read_any(struct kl_vcpu *v, uint64_t lin, void *buf, unsigned len,
		     enum kl_tlb_mode mode, bool system)
{
	struct page p[2];
	bool complete = true;
	unsigned first;

	if (KL_UNLIKELY(mode == KL_TLB_ALIGNED) && !system)
		check_alignment(v, lin, len);
	first = translate_range(v, lin, len, KL_ACC_READ, mode, system, p);
	if (KL_UNLIKELY(p[0].mmio || p[1].mmio)) {
		if (system)
			kl_emulation_failure(v);
		mmio_check(v);
	}
	if (!system)
		kl_debug_access(v, lin, len, false);
	if (p[0].mmio)
		complete &= mmio_read(v, p[0].gpa, buf, first);
	else
		load_part(buf, p[0].ptr, first);
	if (first < len) {
		if (p[1].mmio)
			complete &= mmio_read(v, p[1].gpa, (uint8_t *)buf + first, len - first);
		else
			load_part((uint8_t *)buf + first, p[1].ptr, len - first);
	}
	if (KL_UNLIKELY(!complete)) {
		v->pending = KL_PENDING_MMIO_READ;
		kl_leave(v, KL_LEAVE_EXIT);
	}
}

void kl_rmw_restart(struct kl_vcpu *v)
{
	v->mmio_replay = false; /* the answers are void */
	kl_leave(v, KL_LEAVE_RESTART);
}

/* Of a store to @p, whose first part had @first bytes. Pointers are void. */
static KL_COLD void report_store(struct kl_vcpu *v, const struct page p[2], const void *buf,
				 unsigned first, unsigned len)
{
	struct kl_written w[2];
	unsigned n = 0;

	if (p[0].tracked)
		w[n++] = (struct kl_written){p[0].gpa, buf, first};
	if (p[1].tracked)
		w[n++] = (struct kl_written){p[1].gpa, (const uint8_t *)buf + first, len - first};
	kl_report_write(v, w, n);
}

static void write_any(struct kl_vcpu *v, uint64_t lin, const void *buf, unsigned len,
		      enum kl_tlb_mode mode, bool system)
{
	struct page p[2];
	unsigned first;

	if (KL_UNLIKELY(mode == KL_TLB_ALIGNED) && !system)
		check_alignment(v, lin, len);
	first = translate_range(v, lin, len, KL_ACC_WRITE, mode, system, p);
	racepoint("write-translated");
	if (KL_UNLIKELY(p[0].mmio || p[1].mmio)) {
		if (system)
			kl_emulation_failure(v);
		mmio_check(v);
	} else if (!system && v->cur_op && (v->cur_op->flags & KL_OPF_LOCK) &&
		   (!v->core.alone || v->mmio_used)) {
		kl_rmw_restart(v);
	}
	if (!system)
		kl_debug_access(v, lin, len, true);
	if (first < len && len <= SPLIT_MAX && p[0].ptr && p[1].ptr) {
		bool one = p[0].ptr + first == p[1].ptr && len <= 8 && !(len & (len - 1));

		if (one) { /* one store of the host, which is whole or not at all */
			store_part(v, p[0].ptr, buf, len);
			v->code_written |= p[1].ptr == v->code_page;
		} else {
			store_split(v, p, buf, first, len);
		}
		if (v->core.alone)
			kl_vcpus_go(&v->core);
		if (KL_UNLIKELY(p[0].tracked | p[1].tracked))
			report_store(v, p, buf, first, len);
		return;
	}
	if (p[0].mmio)
		mmio_write(v, p[0].gpa, buf, first);
	else
		store_part(v, p[0].ptr, buf, first);
	if (first < len) {
		if (p[1].mmio)
			mmio_write(v, p[1].gpa, (const uint8_t *)buf + first, len - first);
		else
			store_part(v, p[1].ptr, (const uint8_t *)buf + first, len - first);
	}
	if (KL_UNLIKELY(p[0].tracked | p[1].tracked))
		report_store(v, p, buf, first, len);
}

uint64_t kl_read_slow(struct kl_vcpu *v, uint64_t lin, unsigned size)
{
	uint64_t val = 0;

	read_any(v, lin, &val, size, (enum kl_tlb_mode)v->tlb_mode, false);
	return val;
}

void kl_write_slow(struct kl_vcpu *v, uint64_t lin, uint64_t val, unsigned size)
{
	write_any(v, lin, &val, size, (enum kl_tlb_mode)v->tlb_mode, false);
}

void kl_read_bytes(struct kl_vcpu *v, uint64_t lin, void *buf, unsigned len)
{
	read_any(v, lin, buf, len, (enum kl_tlb_mode)v->tlb_mode, false);
}

void kl_write_bytes(struct kl_vcpu *v, uint64_t lin, const void *buf, unsigned len)
{
	write_any(v, lin, buf, len, (enum kl_tlb_mode)v->tlb_mode, false);
}

void kl_write_as(struct kl_vcpu *v, uint64_t lin, const void *buf, unsigned len,
		 enum kl_tlb_mode mode)
{
	write_any(v, lin, buf, len, mode, true);
}

void kl_read_system(struct kl_vcpu *v, uint64_t lin, void *buf, unsigned len)
{
	read_any(v, lin, buf, len, kl_tlb_mode_of(v, 0, true), true);
}

void kl_write_system(struct kl_vcpu *v, uint64_t lin, const void *buf, unsigned len)
{
	write_any(v, lin, buf, len, kl_tlb_mode_of(v, 0, true), true);
}

/*
 * The host cannot lock two pages that are no neighbours: the other vCPUs of the VM stop until
 * the store is done, or whatever else ends the instruction. All translations are void.
 */
static KL_COLD void stop_others(struct kl_vcpu *v)
{
	jmp_buf *guard = kl_self.guard;
	bool alone;

	kl_vcpu_leave_guest(&v->core);
	kl_self.guard = NULL;
	alone = kl_vcpus_stop(&v->core);
	kl_self.guard = guard;
	kl_vcpu_enter_guest(&v->core);
	if (kl_vcpu_requests(&v->core) & KL_REQ_TLB_FLUSH)
		kl_serve_flush(v);
	if (!alone)
		kl_leave(v, KL_LEAVE_RESTART);
}

/* A page-crossing operand has a pointer, too, where the two pages are neighbours in the host. */
static void *write_pointer(struct kl_vcpu *v, uint64_t lin, unsigned size, bool written)
{
	bool lock = v->cur_op && (v->cur_op->flags & KL_OPF_LOCK);
	struct page p[2];
	unsigned first;

	if (KL_UNLIKELY(v->tlb_mode == KL_TLB_ALIGNED))
		check_alignment(v, lin, size);
	for (;;) {
		first = translate_range(v, lin, size, KL_ACC_WRITE, (enum kl_tlb_mode)v->tlb_mode,
					false, p);
		if (p[0].mmio || p[1].mmio || first == size || p[0].ptr + first == p[1].ptr)
			break;
		if (!lock || v->core.alone)
			return NULL;
		stop_others(v);
	}
	if (KL_UNLIKELY(v->core.alone)) /* it is not needed any more */
		kl_vcpus_go(&v->core);
	if (p[0].mmio || p[1].mmio) {
		racepoint("rmw-no-pointer");
		return NULL;
	}
	kl_debug_access(v, lin, size, true);
	(void)kl_load8(p[0].ptr);
	if (first < size)
		(void)kl_load8(p[1].ptr);
	if ((uint64_t)p[0].ptr - (uint64_t)v->code_page + size < KL_PAGE_SIZE + size)
		v->code_written = true;
	if (KL_UNLIKELY(p[0].tracked && written))
		kl_note_operand(v, p[0].gpa, first);
	if (KL_UNLIKELY(p[1].tracked && written))
		kl_note_operand(v, p[1].gpa, size - first);
	return p[0].ptr;
}

void *kl_rmw_pointer(struct kl_vcpu *v, uint64_t lin, unsigned size)
{
	return write_pointer(v, lin, size, true);
}

bool kl_probe_writable(struct kl_vcpu *v, uint64_t lin, unsigned size)
{
	return write_pointer(v, lin, size, false) != NULL;
}

const uint8_t *kl_fetch_slow(struct kl_vcpu *v, uint64_t lin)
{
	struct page p = {0};

	while (translate(v, lin, KL_ACC_EXEC, (enum kl_tlb_mode)v->tlb_mode, &p))
		if (p.mmio)
			break;
	if (p.mmio)
		kl_emulation_failure(v); /* M4 */
	return p.ptr;
}

void kl_probe(struct kl_vcpu *v, uint64_t lin)
{
	struct page p = {0};

	while (translate(v, lin, KL_ACC_READ, (enum kl_tlb_mode)v->tlb_mode, &p) && !p.mmio)
		;
}

void kl_probe_store(struct kl_vcpu *v, uint64_t lin, unsigned len)
{
	enum kl_tlb_mode mode = (enum kl_tlb_mode)v->tlb_mode;
	struct page p[2];

	if (KL_UNLIKELY(mode == KL_TLB_ALIGNED))
		check_alignment(v, lin, len);
	(void)translate_range(v, lin, len, KL_ACC_WRITE, mode, false, p);
}

/* ---- outside an instruction ---- */

/*
 * In guest mode from an ioctl: a flusher that waits for this vCPU must be able to kick it out of
 * a blocked access, as in KVM_RUN (M6).
 */
static void enter_from_ioctl(struct kl_vcpu *v)
{
	if (!v->in_run) {
		atomic_store_explicit(&v->core.tid, kl_gettid(), memory_order_release);
		kl_self.running = &v->core;
		atomic_signal_fence(memory_order_seq_cst);
	}
	kl_vcpu_enter_guest(&v->core);
	if (kl_vcpu_requests(&v->core) & KL_REQ_TLB_FLUSH)
		kl_serve_flush(v);
}

static void leave_to_ioctl(struct kl_vcpu *v)
{
	kl_vcpu_leave_guest(&v->core);
	if (!v->in_run) {
		atomic_signal_fence(memory_order_seq_cst);
		kl_self.running = NULL;
		atomic_store_explicit(&v->core.tid, 0, memory_order_release);
	}
}

int kl_x86_read_phys(struct kl_vcpu *v, uint64_t gpa, void *buf, unsigned len)
{
	while (len) {
		unsigned n = kl_min(len, (unsigned)(KL_PAGE_SIZE - (gpa & ~KL_PAGE_MASK)));
		bool writable, mmio = false;
		const uint8_t *page;
		int r = -EAGAIN;

		enter_from_ioctl(v);
		page = kl_mmu_lookup(&v->core, gpa & KL_PAGE_MASK, KL_ACC_READ, &writable, &mmio);
		if (page)
			r = kl_guard_copy(buf, page + (gpa & ~KL_PAGE_MASK), n);
		leave_to_ioctl(v);
		if (mmio)
			return -EFAULT;
		if (!page) {
			r = kl_mmu_fault(&v->core, gpa, KL_ACC_READ);
			if (r == KL_FAULT_MMIO)
				return -EFAULT;
			if (r < 0)
				return r;
			continue;
		}
		if (r == -EINTR)
			continue; /* only kicked: let the flusher go on, and come back */
		if (r)
			return r;
		gpa += n;
		buf = (uint8_t *)buf + n;
		len -= n;
	}
	return 0;
}

/* One page. What a vCPU finds mapped needs no fault. */
static int pre_fault_page(struct kl_vcpu *v, uint64_t gpa)
{
	for (;;) {
		bool writable, mmio;
		const uint8_t *page;
		int r;

		if (kl_self.sig_pending)
			return -EINTR;
		if (kl_vcpu_requests(&v->core) & KL_REQ_VM_DEAD)
			return -EIO;
		kl_vcpu_enter_guest(&v->core);
		if (kl_vcpu_requests(&v->core) & KL_REQ_TLB_FLUSH)
			kl_serve_flush(v);
		page = kl_mmu_lookup(&v->core, gpa, KL_ACC_READ, &writable, &mmio);
		kl_vcpu_leave_guest(&v->core);
		if (page)
			return 0;
		r = kl_mmu_fault(&v->core, gpa, KL_ACC_READ);
		if (r == KL_FAULT_MMIO)
			return -ENOENT;
		if (r < 0)
			return r;
	}
}

int kl_x86_pre_fault(struct kl_vcpu *v, uint64_t *gpa, uint64_t *size)
{
	int r = 0;

	/* As in KVM_RUN: from here on a signal ends a populate that waits. */
	kl_vcpu_take_requests(&v->core, KL_REQ_SIGNAL);
	atomic_store_explicit(&v->core.tid, kl_gettid(), memory_order_release);
	kl_self.running = &v->core;
	atomic_signal_fence(memory_order_seq_cst);
	while (*size && !r) {
		r = pre_fault_page(v, *gpa);
		if (!r) {
			*gpa += KL_PAGE_SIZE;
			*size -= KL_PAGE_SIZE;
		}
	}
	atomic_signal_fence(memory_order_seq_cst);
	kl_self.running = NULL;
	atomic_store_explicit(&v->core.tid, 0, memory_order_release);
	return r;
}

int kl_x86_translate(struct kl_vcpu *v, uint64_t gva, uint64_t *gpa, bool *writable, bool *usermode)
{
	jmp_buf *outer = kl_self.guard;
	jmp_buf here;
	struct kl_walk w = {.fresh = true};
	enum kl_walk_status st;
	enum kl_guard_reason why;
	bool noted;
	int r;

	*writable = true;
	*usermode = false;
	for (;;) {
		why = kl_guard_enter(&here);
		if (why != KL_GUARD_NONE) {
			leave_to_ioctl(v);
			kl_guard_leave(outer);
			if (why == KL_GUARD_INTR)
				continue;
			return -EFAULT;
		}
		enter_from_ioctl(v);
		st = kl_walk(v, gva, KL_ACC_READ, kl_tlb_mode_of(v, 0, false), true, &w);
		noted = v->nr_notes;
		if (KL_UNLIKELY(noted))
			kl_report_notes(v);
		leave_to_ioctl(v);
		kl_guard_leave(outer);
		if (noted)
			continue;
		if (st != KL_WALK_MISS)
			break;
		r = kl_mmu_fault(&v->core, w.miss_gpa, w.miss_access);
		if (r == KL_FAULT_MMIO && w.miss_access == KL_ACC_WRITE)
			w.skip_ad = true;
		else if (r != KL_FAULT_MAPPED)
			return -EFAULT;
	}
	*gpa = w.gpa;
	return st == KL_WALK_OK ? 0 : -EFAULT;
}

/* A page of a guest_memfd is reported by its guest address: there is no other. */
static void poisoned(struct kl_vcpu *v, uint64_t page)
{
	struct kl_vm *vm = v->core.vm;
	int idx = kl_srcu_read_lock(&vm->srcu);
	struct kl_overlap o;

	kl_for_each_overlap (&o, kl_memslots(vm, v->core.as_id), page, page + KL_PAGE_SIZE)
		if (o.in_gmem) {
			v->core.memory_fault = v->core.memory_fault_private = true;
			v->core.memory_fault_gpa = o.first << KL_PAGE_SHIFT;
		}
	kl_srcu_read_unlock(&vm->srcu, idx);
}

/*
 * The slots that hold the page, in the address space that the vCPU runs in, decide: a fault on each
 * of their frames populates the page again or says why not. A page that is there, read populated,
 * and still traps a second time is one that may not be written.
 */
int kl_host_page_vanished(struct kl_vcpu *v, uint64_t addr, bool poison)
{
	uint64_t page = addr & KL_PAGE_MASK, gpas[8];
	struct kl_vm *vm = v->core.vm;
	unsigned n = 0, access;
	struct kl_overlap o;
	int idx;

	if (poison) {
		poisoned(v, page);
		return -EHWPOISON;
	}
	if (v->guard_addr == page && v->guard_insn == v->insn_count) {
		v->guard_repeat++;
	} else {
		v->guard_addr = page;
		v->guard_insn = v->insn_count;
		v->guard_repeat = 0;
	}
	if (v->guard_repeat > 2)
		return -EFAULT;
	access = v->guard_repeat ? KL_ACC_WRITE : KL_ACC_READ;

	idx = kl_srcu_read_lock(&vm->srcu);
	kl_for_each_overlap (&o, kl_memslots(vm, v->core.as_id), page, page + KL_PAGE_SIZE)
		if (n < KL_ARRAY_SIZE(gpas))
			gpas[n++] = o.first << KL_PAGE_SHIFT;
	kl_srcu_read_unlock(&vm->srcu, idx);
	/* No slot any more: it was deleted, and the access that was under way goes through
	 * stage 2 again. */
	for (unsigned i = 0; i < n; i++) {
		int r = kl_mmu_fault(&v->core, gpas[i], access);

		if (r < 0)
			return r;
	}
	return 0;
}
