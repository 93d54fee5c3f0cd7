/* SPDX-License-Identifier: MIT */
/*
 * Windows: a range of guest memory held as host pointers.
 *
 * The holder is an accessor that stays in guest mode from lock to unlock. So every flush, and
 * with it each notifier bracket over the pages and each change of their slots, waits for it;
 * and so it must not wait for any of those itself: one window per thread, none inside a
 * bracket, and what could wait (faults, brackets, slot changes) is refused while one is held.
 *
 * A window for writing over tracked pages is reported when it is unlocked: all of it, since nobody
 * knows what was written. Pages that become tracked while it is held do not: kl_track_add() waits
 * for the holder.
 *
 * All pages are looked up in one stay. A miss, or a flush request that comes meanwhile, voids
 * what was collected: the rest is made accessible outside, then it starts over.
 */
#include <errno.h>
#include <sys/uio.h>

#include "base/racepoint.h"
#include "host/atomic.h"
#include "host/guard.h"
#include "mmu/accessor.h"
#include "mmu/api.h"
#include "mmu/mmu.h"
#include "mmu/track.h"

KL_TLS struct kl_vcpu_core *kl_api_window;

/* The window's pages, if some of them are tracked and it is for writing; else len is 0. */
static KL_TLS struct {
	kl_gpa_t gpa;
	uint64_t len;
} tracked_window;

struct window {
	struct kl_vm *vm;
	unsigned as, access;
	kl_gpa_t gpa;
	uint64_t len;
	struct iovec *iov;
	unsigned max, n;
	uint64_t done;
	bool tracked; /* some page is */
	/* After a miss: only make the pages accessible from here on. */
	bool prefault;
};

static int add(struct window *w, uint8_t *p, uint64_t len)
{
	struct iovec *last = w->n ? &w->iov[w->n - 1] : NULL;

	if (last && (uint8_t *)last->iov_base + last->iov_len == p) {
		last->iov_len += len;
		return 0;
	}
	if (w->n == w->max)
		return -E2BIG;
	w->iov[w->n++] = (struct iovec){p, len};
	return 0;
}

enum { LOCKED, MISS, FLUSHED };

/* LOCKED: all pages done, none of them taken away meanwhile; MISS; FLUSHED; -errno. */
static int walk(struct window *w, struct kl_vcpu_core *core)
{
	while (w->done < w->len) {
		kl_gpa_t gpa = w->gpa + w->done;
		uint64_t n = kl_min(w->len - w->done, KL_PAGE_SIZE - (gpa & ~KL_PAGE_MASK));
		bool writable, mmio;
		uint8_t *p = kl_mmu_lookup(core, gpa & KL_PAGE_MASK, w->access, &writable, &mmio);

		if (!p)
			return MISS;
		if (!w->prefault) {
			int r = add(w, p + (gpa & ~KL_PAGE_MASK), n);

			if (r)
				return r;
		}
		/* Here memory that is gone is an error; at the holder it would be a crash (N7). */
		kl_touch(p + (gpa & ~KL_PAGE_MASK), w->access & KL_ACC_WRITE);
		w->tracked |= w->access == KL_ACC_WRITE && !writable;
		w->done += n;
		racepoint("window-page");
		if (kl_accessor_flushed(core) && !w->prefault)
			return FLUSHED;
	}
	return LOCKED;
}

/* As walk(), and in guest mode, without a guard, if it returns LOCKED. */
static int stay(struct window *w, struct kl_vcpu_core **core)
{
	jmp_buf *outer = kl_self.guard;
	volatile int result = MISS;
	enum kl_guard_reason why;
	jmp_buf here;
	int r = kl_accessor_enter(w->vm, w->as, true, core);

	if (r)
		return r;
	why = kl_guard_enter(&here);
	if (why == KL_GUARD_NONE)
		result = walk(w, *core);
	kl_guard_leave(outer);
	if (why != KL_GUARD_NONE && why != KL_GUARD_INTR)
		result = kl_guard_errno(why);
	if (result != LOCKED || w->prefault)
		kl_accessor_leave(*core);
	return result;
}

static int lock(struct window *w, struct kl_vcpu_core **core)
{
	for (;;) {
		int r = stay(w, core);

		if (r == LOCKED && !w->prefault)
			return 0;
		if (r < 0)
			return r;
		w->prefault = r == MISS;
		if (r == MISS) {
			r = kl_accessor_fault(w->vm, w->as, w->gpa + w->done, w->access);
			if (r)
				return r;
		} else {
			w->done = 0;
			w->n = 0;
		}
	}
}

KL_EXPORT int kvmlet_window_lock(struct kvmlet_vm *vm, unsigned as, kl_gpa_t gpa, uint64_t len,
				 unsigned access, struct iovec *iov, unsigned max, unsigned *n)
{
	struct window w = {.vm = &vm->vm, .as = as, .gpa = gpa, .len = len, .iov = iov, .max = max};
	struct kl_vcpu_core *core;
	int r = kl_api_may_access(vm, as);

	if (r)
		return r;
	if (!len || len > KVMLET_WINDOW_MAX || !max || (access & ~(KVMLET_READ | KVMLET_WRITE)) ||
	    !access)
		return -EINVAL;
	if (gpa + len < gpa)
		return -EFAULT;
	w.access = access & KVMLET_WRITE ? KL_ACC_WRITE : KL_ACC_READ;
	kl_engine_enter();
	r = lock(&w, &core);
	if (!r) {
		/* From here on nothing interrupts this thread: it is in the program's code. */
		atomic_store_explicit(&core->tid, 0, memory_order_relaxed);
		kl_self.running = NULL;
		kl_api_window = core;
		tracked_window.gpa = gpa;
		tracked_window.len = w.tracked ? len : 0;
		*n = w.n;
		racepoint("window-locked");
	}
	kl_engine_leave();
	return r;
}

/* What the pages of [@gpa, @gpa + @len) that are tracked hold now, to the trackers. */
static KL_NOINLINE void report(struct kvmlet_vm *vm, unsigned as, kl_gpa_t gpa, uint64_t len)
{
	uint8_t bytes[KL_PAGE_SIZE];

	for (uint64_t done = 0, n; done < len; done += n) {
		kl_gpa_t at = gpa + done;

		n = kl_min(len - done, KL_PAGE_SIZE - (at & ~KL_PAGE_MASK));
		/* What is gone by now will be reported as removed. */
		if (kl_track_is(&vm->vm, as, at >> KL_PAGE_SHIFT) &&
		    !kvmlet_vm_read(vm, as, at, bytes, n, NULL))
			kl_track_write(&vm->vm, as, at, bytes, n);
	}
}

KL_EXPORT void kvmlet_window_unlock(struct kvmlet_vm *vm)
{
	struct kl_vcpu_core *core = kl_api_window;
	uint64_t tracked = tracked_window.len;
	unsigned as;
	int token = 0;

	if (KL_WARN_ONCE(!core || core->vm != &vm->vm,
			 "kvmlet_window_unlock without a window of this VM; ignored"))
		return;
	kl_api_window = NULL;
	as = core->as_id; /* somebody else's as soon as it is left */
	kl_engine_enter();
	if (KL_UNLIKELY(tracked))
		token = kl_track_begin(&vm->vm);
	kl_accessor_leave(core);
	if (KL_UNLIKELY(tracked)) {
		report(vm, as, tracked_window.gpa, tracked);
		kl_track_end(&vm->vm, token);
	}
	kl_engine_leave();
}
