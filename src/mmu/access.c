/* SPDX-License-Identifier: MIT */
/*
 * The library's reads, writes and atomics of guest memory (N2, N7, M6).
 *
 * An access is one or more stays in guest mode as an accessor. Between the lookup of a page and
 * the end of the access to it, no invalidation of it completes. A page that is not mapped, and
 * an access that was interrupted because it blocked, are resolved outside; then it starts
 * again where it was.
 */
#include <errno.h>

#include "base/racepoint.h"
#include "host/atomic.h"
#include "host/guard.h"
#include "mmu/accessor.h"
#include "mmu/api.h"
#include "mmu/mmu.h"
#include "mmu/track.h"

struct copy {
	struct kl_vm *vm;
	unsigned as;
	unsigned access; /* KL_ACC_WRITE: to the guest */
	kl_gpa_t gpa;
	uint8_t *buf;
	size_t len;
	size_t done; /* whole pieces; in memory, so that it survives the guard */
	/* The last piece went to a tracked page: a report (mmu/track.h) has begun. */
	bool tracked;
	size_t from;
	int token;
};

#define RESOLVE 1 /* the page that comes next must be made accessible */

static int outcome(bool hit, enum kl_guard_reason why)
{
	return hit && why != KL_GUARD_INTR ? kl_guard_errno(why) : RESOLVE;
}

static bool copy_page(struct copy *c, struct kl_vcpu_core *core)
{
	kl_gpa_t gpa = c->gpa + c->done;
	size_t n = kl_min(c->len - c->done, (size_t)(KL_PAGE_SIZE - (gpa & ~KL_PAGE_MASK)));
	bool writable, mmio;
	uint8_t *p = kl_mmu_lookup(core, gpa & KL_PAGE_MASK, c->access, &writable, &mmio);

	if (!p)
		return false;
	racepoint("access-looked-up");
	p += gpa & ~KL_PAGE_MASK;
	if (c->access & KL_ACC_WRITE)
		kl_access_copy(p, c->buf + c->done, n);
	else
		kl_access_copy(c->buf + c->done, p, n);
	c->done += n;
	if (KL_UNLIKELY((c->access & KL_ACC_WRITE) && !writable)) {
		/* Nothing that may fault comes behind it in this stay. */
		c->from = c->done - n;
		c->token = kl_track_begin(c->vm);
		c->tracked = true;
	}
	return true;
}

static void report(struct copy *c)
{
	kl_track_write(c->vm, c->as, c->gpa + c->from, c->buf + c->from, c->done - c->from);
	kl_track_end(c->vm, c->token);
	c->tracked = false;
}

/* One stay in guest mode. 0: all done; RESOLVE; -errno. */
static int copy_stay(struct copy *c)
{
	struct kl_vcpu_core *core;
	jmp_buf *outer = kl_self.guard;
	volatile bool hit = true;
	enum kl_guard_reason why;
	jmp_buf here;
	int r = kl_accessor_enter(c->vm, c->as, true, &core);

	if (r)
		return r;
	why = kl_guard_enter(&here);
	if (why == KL_GUARD_NONE)
		while (hit && c->done < c->len && !c->tracked) {
			hit = copy_page(c, core);
			kl_accessor_flushed(core); /* between pages no pointer is held */
		}
	kl_guard_leave(outer);
	kl_accessor_leave(core);
	if (KL_UNLIKELY(c->tracked))
		report(c);
	return outcome(hit, why);
}

static int copy(struct kvmlet_vm *vm, unsigned as, kl_gpa_t gpa, void *buf, size_t len,
		unsigned access, size_t *done)
{
	struct copy c = {
		.vm = &vm->vm, .as = as, .access = access, .gpa = gpa, .buf = buf, .len = len};
	int r = kl_api_may_access(vm, as);

	if (!r && gpa + len < gpa)
		r = -EFAULT;
	if (!r) {
		kl_engine_enter();
		while (c.done < len && !r) {
			r = copy_stay(&c);
			if (r == RESOLVE)
				r = kl_accessor_fault(c.vm, as, gpa + c.done, access);
		}
		kl_engine_leave();
	}
	if (done)
		*done = c.done;
	return r;
}

KL_EXPORT int kvmlet_vm_read(struct kvmlet_vm *vm, unsigned as, kl_gpa_t gpa, void *buf, size_t len,
			     size_t *done)
{
	return copy(vm, as, gpa, buf, len, KL_ACC_READ, done);
}

KL_EXPORT int kvmlet_vm_write(struct kvmlet_vm *vm, unsigned as, kl_gpa_t gpa, const void *buf,
			      size_t len, size_t *done)
{
	return copy(vm, as, gpa, (void *)(uintptr_t)buf, len, KL_ACC_WRITE, done);
}

/* ---- atomics ------------------------------------------------------------------------------ */

struct atomic_op {
	enum { LOAD, STORE, EXCHANGE, COMPARE_EXCHANGE, FETCH_ADD, FETCH_OR, FETCH_AND } kind;
	unsigned size;
	uint64_t val, expected;
	uint64_t old;
	bool tracked; /* a report has begun */
	int token;
};

/*
 * FETCH_OR and FETCH_AND are loops around a compare-and-swap: interrupted before it succeeds,
 * nothing has happened.
 */
#define DO_ATOMIC(bits)                                                                         \
	static void do_atomic##bits(struct atomic_op *op, void *p)                              \
	{                                                                                       \
		uint##bits##_t val = (uint##bits##_t)op->val, seen, old;                        \
                                                                                                \
		switch (op->kind) {                                                             \
		case LOAD:                                                                      \
			op->old = kl_load_seq_cst##bits(p);                                     \
			break;                                                                  \
		case STORE:                                                                     \
		case EXCHANGE:                                                                  \
			op->old = kl_xchg##bits(p, val);                                        \
			break;                                                                  \
		case COMPARE_EXCHANGE:                                                          \
			op->old = kl_cmpxchg##bits(p, (uint##bits##_t)op->expected, val);       \
			break;                                                                  \
		case FETCH_ADD:                                                                 \
			op->old = kl_xadd##bits(p, val);                                        \
			break;                                                                  \
		case FETCH_OR:                                                                  \
		case FETCH_AND:                                                                 \
			old = kl_load##bits(p);                                                 \
			do {                                                                    \
				seen = old;                                                     \
				old = kl_cmpxchg##bits(p, seen,                                 \
						       (uint##bits##_t)(op->kind == FETCH_OR    \
										? seen | val    \
										: seen & val)); \
			} while (old != seen);                                                  \
			op->old = old;                                                          \
			break;                                                                  \
		}                                                                               \
	}
DO_ATOMIC(8)
DO_ATOMIC(16)
DO_ATOMIC(32)
DO_ATOMIC(64)

static void do_atomic(struct atomic_op *op, void *p)
{
	switch (op->size) {
	case 1:
		do_atomic8(op, p);
		break;
	case 2:
		do_atomic16(op, p);
		break;
	case 4:
		do_atomic32(op, p);
		break;
	default:
		do_atomic64(op, p);
		break;
	}
}

/* What the operation has stored; false: nothing. */
static bool stored(const struct atomic_op *op, uint64_t *val)
{
	*val = op->val;
	switch (op->kind) {
	case COMPARE_EXCHANGE:
		return !((op->old ^ op->expected) << (64 - 8 * op->size));
	case FETCH_ADD:
		*val = op->old + op->val;
		break;
	case FETCH_OR:
		*val = op->old | op->val;
		break;
	case FETCH_AND:
		*val = op->old & op->val;
		break;
	default:
		break;
	}
	return op->kind != LOAD;
}

static KL_NOINLINE void report_atomic(struct kl_vm *vm, unsigned as, kl_gpa_t gpa,
				      const struct atomic_op *op)
{
	uint64_t val;

	if (stored(op, &val))
		kl_track_write(vm, as, gpa, &val, op->size);
	kl_track_end(vm, op->token);
}

static int atomic_stay(struct kl_vm *vm, unsigned as, kl_gpa_t gpa, unsigned access,
		       struct atomic_op *op)
{
	struct kl_vcpu_core *core;
	jmp_buf *outer = kl_self.guard;
	enum kl_guard_reason why;
	volatile bool hit = true;
	bool writable, mmio;
	jmp_buf here;
	uint8_t *p;
	int r = kl_accessor_enter(vm, as, true, &core);

	if (r)
		return r;
	why = kl_guard_enter(&here);
	if (why == KL_GUARD_NONE) {
		p = kl_mmu_lookup(core, gpa & KL_PAGE_MASK, access, &writable, &mmio);
		if (KL_LIKELY(p))
			do_atomic(op, p + (gpa & ~KL_PAGE_MASK));
		else
			hit = false;
		if (KL_UNLIKELY(p && (access & KL_ACC_WRITE) && !writable)) {
			op->token = kl_track_begin(vm);
			op->tracked = true;
		}
	}
	kl_guard_leave(outer);
	kl_accessor_leave(core);
	if (KL_UNLIKELY(op->tracked))
		report_atomic(vm, as, gpa, op);
	return outcome(hit, why);
}

static int atomic(struct kvmlet_vm *vm, unsigned as, kl_gpa_t gpa, struct atomic_op *op)
{
	unsigned access = op->kind == LOAD ? KL_ACC_READ : KL_ACC_WRITE;
	int r = kl_api_may_access(vm, as);

	if (r)
		return r;
	if ((op->size != 1 && op->size != 2 && op->size != 4 && op->size != 8) ||
	    (gpa & (op->size - 1)))
		return -EINVAL;
	kl_engine_enter();
	do {
		r = atomic_stay(&vm->vm, as, gpa, access, op);
		if (r == 0)
			break;
		if (r == RESOLVE)
			r = kl_accessor_fault(&vm->vm, as, gpa, access);
	} while (!r);
	kl_engine_leave();
	return r;
}

KL_EXPORT int kvmlet_vm_load(struct kvmlet_vm *vm, unsigned as, kl_gpa_t gpa, unsigned size,
			     uint64_t *val)
{
	struct atomic_op op = {.kind = LOAD, .size = size};
	int r = atomic(vm, as, gpa, &op);

	if (!r)
		*val = op.old;
	return r;
}

KL_EXPORT int kvmlet_vm_store(struct kvmlet_vm *vm, unsigned as, kl_gpa_t gpa, unsigned size,
			      uint64_t val)
{
	struct atomic_op op = {.kind = STORE, .size = size, .val = val};

	return atomic(vm, as, gpa, &op);
}

static int fetch(struct kvmlet_vm *vm, unsigned as, kl_gpa_t gpa, struct atomic_op op,
		 uint64_t *old)
{
	int r = atomic(vm, as, gpa, &op);

	if (!r && old)
		*old = op.old;
	return r;
}

KL_EXPORT int kvmlet_vm_exchange(struct kvmlet_vm *vm, unsigned as, kl_gpa_t gpa, unsigned size,
				 uint64_t val, uint64_t *old)
{
	return fetch(vm, as, gpa, (struct atomic_op){.kind = EXCHANGE, .size = size, .val = val},
		     old);
}

KL_EXPORT int kvmlet_vm_compare_exchange(struct kvmlet_vm *vm, unsigned as, kl_gpa_t gpa,
					 unsigned size, uint64_t expected, uint64_t desired,
					 uint64_t *old)
{
	return fetch(vm, as, gpa,
		     (struct atomic_op){COMPARE_EXCHANGE, size, desired, expected, 0, false, 0},
		     old);
}

KL_EXPORT int kvmlet_vm_fetch_add(struct kvmlet_vm *vm, unsigned as, kl_gpa_t gpa, unsigned size,
				  uint64_t val, uint64_t *old)
{
	return fetch(vm, as, gpa, (struct atomic_op){.kind = FETCH_ADD, .size = size, .val = val},
		     old);
}

KL_EXPORT int kvmlet_vm_fetch_or(struct kvmlet_vm *vm, unsigned as, kl_gpa_t gpa, unsigned size,
				 uint64_t val, uint64_t *old)
{
	return fetch(vm, as, gpa, (struct atomic_op){.kind = FETCH_OR, .size = size, .val = val},
		     old);
}

KL_EXPORT int kvmlet_vm_fetch_and(struct kvmlet_vm *vm, unsigned as, kl_gpa_t gpa, unsigned size,
				  uint64_t val, uint64_t *old)
{
	return fetch(vm, as, gpa, (struct atomic_op){.kind = FETCH_AND, .size = size, .val = val},
		     old);
}
