/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <kvmlet/dirty.h>
#include <kvmlet/gmem.h>
#include <kvmlet/gpc.h>
#include <kvmlet/memslot.h>
#include <kvmlet/notifier.h>
#include <kvmlet/track.h>
#include <kvmlet/vm.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/racepoint.h"
#include "engine.h"
#include "host/access.h"
#include "mmu/api.h"
#include "mmu/mmu.h"

#define PAGE 4096ull

static struct kvmlet_vm *vm;
static struct kvmlet_gmem *file;
static struct kvmlet_gpc *cache[NR_CACHES], *area[MAX_THREADS][2];
static struct kvmlet_tracker *tracker[MAX_THREADS];
static uint8_t *pool;
/* A thread's vCPU. */
static struct kl_vcpu_core vcpu[MAX_THREADS];

static _Thread_local unsigned self;
static _Thread_local unsigned reports[MAX_THREADS]; /* by the calling thread, to each tracker */

static void must(int r, const char *what)
{
	if (!r)
		return;
	fprintf(stderr, "explore: %s: %s\n", what, strerror(-r));
	abort();
}

static void track_write(void *opaque, unsigned as, kl_gpa_t gpa, const void *bytes, size_t len)
{
	(void)as, (void)gpa, (void)bytes, (void)len;
	reports[(uintptr_t)opaque]++;
}

static const struct kvmlet_track_ops track_ops = {.track_write = track_write};

static kl_hva_t host(unsigned page)
{
	return kl_hva(pool + page * PAGE);
}

void engine_begin(void)
{
	if (!pool) {
		pool = mmap(NULL, POOL_PAGES * PAGE, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (pool == MAP_FAILED)
			abort();
	}
	mmap(pool, POOL_PAGES * PAGE, PROT_READ | PROT_WRITE,
	     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	must(kvmlet_vm_create_private(&vm), "create");
	memset(vcpu, 0, sizeof(vcpu));
	for (unsigned i = 0; i < MAX_THREADS; i++)
		must(kl_vcpu_core_add(&vm->vm, &vcpu[i], i), "vcpu");
	must(kvmlet_gmem_create(vm, FILE_PAGES * PAGE, &file), "gmem");
	for (unsigned i = 0; i < NR_CACHES; i++)
		must(kvmlet_gpc_init(vm, 0, &cache[i]), "gpc");
	for (unsigned i = 0; i < 2 * MAX_THREADS; i++)
		must(kvmlet_gpc_init(vm, 0, &area[i / 2][i % 2]), "gpc");
}

void engine_end(void)
{
	for (unsigned i = 0; i < MAX_THREADS; i++) {
		if (tracker[i])
			must(kvmlet_track_unregister(tracker[i]), "unregister");
		tracker[i] = NULL;
	}
	for (unsigned i = 0; i < NR_CACHES; i++)
		kvmlet_gpc_destroy(cache[i]);
	for (unsigned i = 0; i < 2 * MAX_THREADS; i++)
		kvmlet_gpc_destroy(area[i / 2][i % 2]);
	kvmlet_gmem_close(file);
	kvmlet_vm_destroy(vm);
}

void engine_thread(unsigned n)
{
	self = n;
}

/* ---- operations ---- */

static int translate(const struct op *op, struct outcome *out)
{
	uint64_t gpa = op->gfn * PAGE + 8;
	kl_hva_t hva;
	int r = op->kind == FIND ? kvmlet_memslot_find(vm, gpa, &hva)
				 : kvmlet_vm_translate(vm, 0, gpa, &hva, NULL);

	(void)kvmlet_memslot_generation(vm);
	if (!r)
		out->val = (hva.addr - (uintptr_t)pool) / PAGE;
	return r;
}

static int window(const struct op *op, struct outcome *out)
{
	struct iovec iov[2];
	unsigned n;
	int r = kvmlet_window_lock(vm, 0, op->gfn * PAGE, op->n * PAGE, KVMLET_READ | KVMLET_WRITE,
				   iov, 2, &n);

	if (r)
		return r;
	out->val = atomic_exchange((_Atomic uint64_t *)iov[0].iov_base, op->val);
	kvmlet_window_unlock(vm);
	return 0;
}

static int bracket(const struct op *op)
{
	static const int prots[] = {PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE};
	static const unsigned events[NR_KINDS] = {
		[DISCARD] = KVMLET_EVENT_DISCARD,
		[PROTECT] = KVMLET_EVENT_PROTECT,
		[REPLACE] = KVMLET_EVENT_REPLACE,
	};
	uint8_t *p = pool + op->page * PAGE;
	struct kvmlet_notifier_range range = {
		.start = (uintptr_t)p,
		.end = (uintptr_t)p + PAGE,
		.may_block = !op->flag,
		.event = events[op->kind],
	};
	int r = kvmlet_notifier_begin(&range);

	if (r)
		return r;
	if (op->kind == DISCARD) {
		if (madvise(p, PAGE, MADV_DONTNEED))
			abort();
	} else if (op->kind == PROTECT) {
		if (mprotect(p, PAGE, prots[op->prot]))
			abort();
	} else {
		if (mmap(p, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED,
			 -1, 0) != p)
			abort();
		*(_Atomic uint64_t *)p = op->val;
	}
	kvmlet_notifier_end(&range);
	return 0;
}

static int gpc_lock(const struct op *op, struct outcome *out)
{
	struct kvmlet_gpc *c = cache[op->slot];
	void *p;
	int r = op->kind == GPC_TRYLOCK ? kvmlet_gpc_trylock(c, 8, &p) : kvmlet_gpc_lock(c, 8, &p);

	if (r)
		return r;
	out->val = atomic_exchange((_Atomic uint64_t *)p, op->val);
	kvmlet_gpc_unlock(c, 1);
	return 0;
}

static int gpc_lock_many(const struct op *op, struct outcome *out)
{
	struct kvmlet_gpc *const c[2] = {cache[op->slot], cache[op->n]};
	const size_t lens[2] = {8, 8};
	void *p[2];
	int r = kvmlet_gpc_lock_many(c, lens, p, 2);

	if (r)
		return r;
	out->val = atomic_exchange((_Atomic uint64_t *)p[0], op->val);
	out->val2 = atomic_exchange((_Atomic uint64_t *)p[1], op->val);
	kvmlet_gpc_unlock_many(c, 2, 1);
	return 0;
}

static int gpc_area(const struct op *op)
{
	uint64_t gpa = (op->gfn + 1) * PAGE - 4;
	struct iovec iov[2];
	unsigned n;
	int r = kvmlet_gpc_activate_area(area[self], 2, gpa, 8);

	if (r)
		return r;
	r = kvmlet_gpc_lock_area(area[self], 2, gpa, 8, iov, &n);
	if (!r)
		kvmlet_gpc_unlock_many(area[self], n, 0);
	return r;
}

static int gpc_life(void)
{
	struct kvmlet_gpc *c;
	int r = kvmlet_gpc_init(vm, 0, &c);

	if (r)
		return r;
	r = kvmlet_gpc_activate(c, 0, 8);
	kvmlet_gpc_destroy(c);
	return r;
}

/* Files come and go; those of the same memory change nothing. */
static int gmem_life(void)
{
	struct kvmlet_gmem *own, *linked;
	int r = kvmlet_gmem_create(vm, PAGE, &own);

	if (r)
		return r;
	kvmlet_gmem_close(own);
	r = kvmlet_gmem_link(file, vm, &linked);
	if (!r)
		kvmlet_gmem_close(linked);
	return r;
}

static int other_vm(const struct op *op)
{
	struct kvmlet_vm *other;
	int r = op->flag ? kvmlet_vm_create_private(&other) : kvmlet_vm_create(&other);

	if (r)
		return r;
	r = kvmlet_memslot_set(other, 0, 0, 0, PAGE, host(op->page));
	if (!r)
		r = kvmlet_vm_store(other, 0, 0, 8, op->val);
	kvmlet_vm_destroy(other);
	return r;
}

static int ring_life(void)
{
	struct kvmlet_dirty_page p[2];
	struct kvmlet_vm *other;
	static _Thread_local uint8_t own[2 * PAGE];
	unsigned n = 0;
	int r = kvmlet_vm_create(&other);

	if (r)
		return r;
	r = kvmlet_dirty_ring_create(other, KVMLET_DIRTY_RING_MIN);
	if (!r)
		r = kvmlet_memslot_set(other, 1, KVMLET_MEM_LOG_DIRTY, PAGE, PAGE,
				       kl_hva((void *)(((uintptr_t)own + PAGE - 1) & ~(PAGE - 1))));
	for (unsigned i = 0; !r && i < 2; i++)
		r = kvmlet_vm_store(other, 0, PAGE + 8 * i, 8, i);
	if (!r)
		r = kvmlet_dirty_ring_collect(other, p, 2, &n);
	if (!r && (n != 1 || p[0].slot != 1 || p[0].page))
		r = -1;
	kvmlet_vm_destroy(other);
	return r;
}

static int young(const struct op *op)
{
	uint64_t start = (uintptr_t)pool + op->page * PAGE;
	int was;

	return op->flag ? kvmlet_notifier_clear_young(start, start + PAGE, NULL)
			: kvmlet_notifier_test_young(start, start + PAGE, &was);
}

/*
 * As a vCPU does it: in guest mode through what a lookup gave, or after a fault. What is tracked is
 * not for its pointer: as its emulator, and other accessors, write.
 */
static int guest(const struct op *op, struct outcome *out)
{
	struct kl_vcpu_core *c = &vcpu[self];
	unsigned access = op->kind == GUEST_STORE ? KL_ACC_WRITE : KL_ACC_READ;
	uint64_t gpa = op->gfn * PAGE;
	bool writable, mmio, can;
	int r;

	for (;;) {
		uint8_t *p;

		kl_vcpu_enter_guest(c);
		kl_vcpu_take_requests(c, KL_REQ_TLB_FLUSH);
		p = kl_mmu_lookup(c, gpa, access, &writable, &mmio);
		can = p && (access == KL_ACC_READ || writable);
		racepoint("explore-in-guest");
		if (can && access == KL_ACC_READ)
			out->val = kl_load64(p);
		else if (can)
			kl_store64(p, op->val);
		kl_vcpu_leave_guest(c);
		if (can)
			return 0;
		if (p)
			return kvmlet_vm_store(vm, 0, gpa, 8, op->val);
		kl_engine_enter();
		r = kl_mmu_fault(c, gpa, access);
		kl_engine_leave();
		if (r != KL_FAULT_MAPPED)
			return r == KL_FAULT_MMIO ? -EFAULT : r;
	}
}

static int perform(const struct op *op, struct outcome *out)
{
	uint64_t gpa = op->gfn * PAGE;
	struct kvmlet_gpc *c = cache[op->slot];
	int yes, r;

	switch (op->kind) {
	case SET:
		return kvmlet_memslot_set(vm, op->slot,
					  (op->flag ? KVMLET_MEM_READONLY : 0) |
						  (op->prot == 2 ? KVMLET_MEM_LOG_DIRTY : 0),
					  gpa, op->n * PAGE, host(op->page));
	case SET_GMEM:
		return kvmlet_memslot_set_gmem(vm, op->slot, gpa, op->n * PAGE, host(op->page),
					       file, op->off * PAGE);
	case FIND:
	case TRANSLATE:
		return translate(op, out);
	case READ:
		return kvmlet_vm_read(vm, 0, gpa, &out->val, 1, NULL);
	case WRITE:
		return kvmlet_vm_write(vm, 0, gpa, &op->val, 1, NULL);
	case LOAD:
		return kvmlet_vm_load(vm, 0, gpa, 8, &out->val);
	case STORE:
		return kvmlet_vm_store(vm, 0, gpa, 8, op->val);
	case EXCHANGE:
		return kvmlet_vm_exchange(vm, 0, gpa, 8, op->val, &out->val);
	case CAS:
		return kvmlet_vm_compare_exchange(vm, 0, gpa, 8, op->want, op->val, &out->val);
	case ADD:
		return kvmlet_vm_fetch_add(vm, 0, gpa, 8, op->val, &out->val);
	case OR:
		return kvmlet_vm_fetch_or(vm, 0, gpa, 8, op->val, &out->val);
	case AND:
		return kvmlet_vm_fetch_and(vm, 0, gpa, 8, op->val, &out->val);
	case WINDOW:
		return window(op, out);
	case DISCARD:
	case PROTECT:
	case REPLACE:
		return bracket(op);
	case YOUNG:
		return young(op);
	case GPC_ACTIVATE:
		return kvmlet_gpc_activate(c, gpa, 8);
	case GPC_ACTIVATE_HVA:
		return kvmlet_gpc_activate_hva(c, host(op->page), 8);
	case GPC_DEACTIVATE:
		return kvmlet_gpc_deactivate(c);
	case GPC_CHECK:
		return kvmlet_gpc_check(c, 8);
	case GPC_REFRESH:
		return kvmlet_gpc_refresh(c, 8);
	case GPC_LOCK:
	case GPC_TRYLOCK:
		return gpc_lock(op, out);
	case GPC_LOCK_MANY:
		return gpc_lock_many(op, out);
	case GPC_AREA:
		return gpc_area(op);
	case GPC_LIFE:
		return gpc_life();
	case DIRTY_MODE:
		return kvmlet_dirty_set_mode(vm, op->prot == 2 ? 3 : op->prot);
	case DIRTY_GET:
		return kvmlet_dirty_get(vm, op->slot, &out->val, 64);
	case DIRTY_CLEAR:
		return kvmlet_dirty_clear(vm, op->slot, 0, op->n, &op->val);
	case RING_LIFE:
		return ring_life();
	case TRACK_ON: /* a thread has one */
		return tracker[self]
			       ? 0
			       : kvmlet_track_register(vm, &track_ops, (void *)(uintptr_t)self,
						       &tracker[self]);
	case TRACK_OFF:
		r = tracker[self] ? kvmlet_track_unregister(tracker[self]) : 0;
		tracker[self] = NULL;
		return r;
	case TRACK_ADD:
		return kvmlet_track_add_page(vm, 0, op->gfn);
	case TRACK_REMOVE:
		return kvmlet_track_remove_page(vm, 0, op->gfn);
	case ALLOCATE:
		return kvmlet_gmem_allocate(file, op->off * PAGE, PAGE);
	case PUNCH:
		return kvmlet_gmem_punch(file, op->off * PAGE, PAGE);
	case ALLOCATED:
		return kvmlet_gmem_allocated(file, &out->val);
	case GMEM_LIFE:
		return gmem_life();
	case SET_PRIVATE:
		return kvmlet_vm_set_private(vm, gpa, PAGE, op->flag);
	case IS_PRIVATE:
		r = kvmlet_vm_is_private(vm, gpa, &yes);
		out->val = (uint64_t)yes;
		return r;
	case OTHER_VM:
		return other_vm(op);
	case GUEST_LOAD:
	case GUEST_STORE:
		return guest(op, out);
	default:
		abort();
	}
}

void engine_do(const struct op *op, struct outcome *out)
{
	memset(out, 0, sizeof(*out));
	memset(reports, 0, sizeof(reports));
	out->ret = perform(op, out);
	memcpy(out->reports, reports, sizeof(reports));
}
