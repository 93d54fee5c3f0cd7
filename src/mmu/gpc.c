/* SPDX-License-Identifier: MIT */
/*
 * The library's public functions on caches: argument checks, what a thread may do that holds a
 * window, a bracket or a cache, and areas of several pages. The caches are in mem/gpc.c.
 *
 * lock and unlock on a valid cache are a few instructions each, without an engine section: they
 * take no lock, and nothing of the program's runs inside that would have to be held off.
 */
#include <errno.h>
#include <stdlib.h>

#include "base/log.h"
#include "mem/gpc.h"
#include "mmu/api.h"

struct kvmlet_gpc {
	struct kl_gpc c;
	const struct kvmlet_vm *vm;
};

_Static_assert(KVMLET_GPC_MAX_HELD == KL_BIAS_CELLS, "public and private limit are the same");
_Static_assert(KVMLET_INVALID_GPA == KL_INVALID_GPA, "the same address inside and outside");

/* 0, -EDEADLK or -EIO: may this thread make a call that could sleep? */
static int may_sleep(const struct kvmlet_gpc *gpc)
{
	int r = kl_api_vm_usable(gpc->vm);

	return r ? r : kl_api_window ? -EDEADLK : 0;
}

/* Program handlers may run in the middle of a touch: their own faults are theirs (host/guard.h). */
static void enter_engine(void)
{
	kl_engine_enter();
	kl_self.only_listed = !KL_TSAN;
}

static void leave_engine(void)
{
	kl_self.only_listed = 0;
	kl_engine_leave();
}

KL_EXPORT int kvmlet_gpc_init(struct kvmlet_vm *vm, unsigned as, struct kvmlet_gpc **out)
{
	struct kvmlet_gpc *gpc;
	int r = kl_api_vm_usable(vm);

	if (r)
		return r;
	if (as >= KL_NR_AS)
		return -EINVAL;
	gpc = aligned_alloc(_Alignof(struct kvmlet_gpc), sizeof(*gpc));
	if (!gpc)
		return -ENOMEM;
	kl_engine_enter();
	r = kl_gpc_init(&gpc->c, &vm->vm, as, KL_GPC_USER);
	kl_engine_leave();
	gpc->vm = vm;
	if (r)
		free(gpc);
	else
		*out = gpc;
	return r;
}

KL_EXPORT void kvmlet_gpc_destroy(struct kvmlet_gpc *gpc)
{
	if (!gpc || gpc->vm->forks != kl_api_forks)
		return;
	if (KL_WARN_ONCE(kl_api_window || kl_bias_held(),
			 "kvmlet_gpc_destroy by the holder of a cache or a window; ignored"))
		return;
	kl_engine_enter();
	kl_gpc_destroy(&gpc->c);
	kl_engine_leave();
	free(gpc);
}

KL_EXPORT int kvmlet_gpc_activate(struct kvmlet_gpc *gpc, kl_gpa_t gpa, size_t len)
{
	int r = may_sleep(gpc);

	if (r)
		return r;
	enter_engine();
	r = kl_gpc_activate(&gpc->c, gpa, len);
	leave_engine();
	return r;
}

KL_EXPORT int kvmlet_gpc_activate_hva(struct kvmlet_gpc *gpc, kl_hva_t hva, size_t len)
{
	int r = may_sleep(gpc);

	if (r)
		return r;
	enter_engine();
	r = kl_gpc_activate_hva(&gpc->c, hva, len);
	leave_engine();
	return r;
}

KL_EXPORT int kvmlet_gpc_deactivate(struct kvmlet_gpc *gpc)
{
	int r = may_sleep(gpc);

	if (r)
		return r;
	kl_engine_enter();
	r = kl_gpc_deactivate(&gpc->c);
	kl_engine_leave();
	return r;
}

KL_EXPORT int kvmlet_gpc_check(const struct kvmlet_gpc *gpc, size_t len)
{
	return !kl_api_vm_usable(gpc->vm) && kl_gpc_check(&gpc->c, len);
}

KL_EXPORT int kvmlet_gpc_refresh(struct kvmlet_gpc *gpc, size_t len)
{
	int r = may_sleep(gpc);

	if (r)
		return r;
	enter_engine();
	r = kl_gpc_refresh(&gpc->c, len);
	leave_engine();
	return r;
}

static KL_NOINLINE int lock_slow(struct kvmlet_gpc *gpc, size_t len, void **p)
{
	int r = may_sleep(gpc);

	if (r)
		return r;
	enter_engine();
	r = kl_gpc_lock_slow(&gpc->c, len, p);
	leave_engine();
	return r;
}

KL_EXPORT int kvmlet_gpc_lock(struct kvmlet_gpc *gpc, size_t len, void **p)
{
	if (KL_LIKELY(kl_gpc_try_fast(&gpc->c, len, p)))
		return 0;
	return lock_slow(gpc, len, p);
}

KL_EXPORT int kvmlet_gpc_trylock(struct kvmlet_gpc *gpc, size_t len, void **p)
{
	int r = may_sleep(gpc);

	return r ? r : kl_gpc_trylock(&gpc->c, len, p);
}

static KL_NOINLINE void unlock_slow(struct kvmlet_gpc *gpc, int written)
{
	KL_WARN_ONCE(!kl_gpc_unlock_one(&gpc->c, written) && gpc->vm->forks == kl_api_forks,
		     "kvmlet_gpc_unlock of a cache that the thread does not hold; ignored");
}

KL_EXPORT void kvmlet_gpc_unlock(struct kvmlet_gpc *gpc, int written)
{
	if (KL_UNLIKELY(!kl_gpc_unlock_fast(&gpc->c, written)))
		unlock_slow(gpc, written);
}

/* ---- several -------------------------------------------------------------------------------- */

/* Of @n caches, those of the engine. 0, or as may_sleep(), or -EINVAL. */
static int inner(struct kvmlet_gpc *const *gpcs, unsigned n, struct kl_gpc **c)
{
	int r = 0;

	if (!n || n > KVMLET_GPC_MAX_HELD)
		return -EINVAL;
	for (unsigned i = 0; i < n && !r; i++) {
		c[i] = &gpcs[i]->c;
		r = may_sleep(gpcs[i]);
	}
	return r;
}

static int lock_many(struct kvmlet_gpc *const *gpcs, const size_t *lens, void **ptrs, unsigned n)
{
	struct kl_gpc *c[KVMLET_GPC_MAX_HELD];
	int r = inner(gpcs, n, c);

	if (r)
		return r;
	enter_engine();
	r = kl_gpc_lock_many(c, lens, ptrs, n);
	leave_engine();
	return r;
}

KL_EXPORT int kvmlet_gpc_lock_many(struct kvmlet_gpc *const *gpcs, const size_t *lens, void **ptrs,
				   unsigned n)
{
	return lock_many(gpcs, lens, ptrs, n);
}

static void unlock_many(struct kvmlet_gpc *const *gpcs, unsigned n, int written)
{
	while (n)
		kvmlet_gpc_unlock(gpcs[--n], written);
}

KL_EXPORT void kvmlet_gpc_unlock_many(struct kvmlet_gpc *const *gpcs, unsigned n, int written)
{
	unlock_many(gpcs, n, written);
}

/* The pieces of [gpa, gpa + len), one in each page. 0: there are none, or more than @max. */
static unsigned split(kl_gpa_t gpa, size_t len, unsigned max, size_t *lens)
{
	unsigned n = 0;

	if (!len || gpa + len < gpa)
		return 0;
	for (; len; n++) {
		size_t piece = kl_min(len, (size_t)(KL_PAGE_SIZE - (gpa & ~KL_PAGE_MASK)));

		if (n == max)
			return 0;
		lens[n] = piece;
		gpa += piece;
		len -= piece;
	}
	return n;
}

KL_EXPORT int kvmlet_gpc_activate_area(struct kvmlet_gpc *const *gpcs, unsigned n, kl_gpa_t gpa,
				       size_t len)
{
	struct kl_gpc *c[KVMLET_GPC_MAX_HELD];
	size_t lens[KVMLET_GPC_MAX_HELD];
	unsigned pieces;
	int r = inner(gpcs, n, c);

	if (r)
		return r;
	if (kl_bias_held() || kl_self.brackets)
		return -EDEADLK;
	pieces = split(gpa, len, n, lens);
	if (!pieces)
		return -EINVAL;
	enter_engine();
	for (unsigned i = 0; i < n && !r; i++) {
		r = i < pieces ? kl_gpc_activate(c[i], gpa, lens[i]) : kl_gpc_deactivate(c[i]);
		gpa += i < pieces ? lens[i] : 0;
	}
	/* Cannot fail: this thread holds nothing. */
	for (unsigned i = 0; r && i < n; i++)
		r = kl_gpc_deactivate(c[i]) ? -EDEADLK : r;
	leave_engine();
	return r;
}

KL_EXPORT int kvmlet_gpc_lock_area(struct kvmlet_gpc *const *gpcs, unsigned n, kl_gpa_t gpa,
				   size_t len, struct iovec *iov, unsigned *pieces)
{
	size_t lens[KVMLET_GPC_MAX_HELD];
	void *ptrs[KVMLET_GPC_MAX_HELD];
	int r;

	if (n > KVMLET_GPC_MAX_HELD)
		return -EINVAL;
	*pieces = split(gpa, len, n, lens);
	if (!*pieces)
		return -EINVAL;
	r = lock_many(gpcs, lens, ptrs, *pieces);
	/* Inactive, or at a place where the piece does not fit: somebody moves them. */
	if (r == -EINVAL)
		return -ESTALE;
	if (r)
		return r;
	for (unsigned i = 0; i < *pieces; i++) {
		if (!kl_gpc_is_at(&gpcs[i]->c, gpa)) {
			unlock_many(gpcs, *pieces, 0);
			return -ESTALE;
		}
		iov[i] = (struct iovec){ptrs[i], lens[i]};
		gpa += lens[i];
	}
	return 0;
}
