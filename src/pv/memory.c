/* SPDX-License-Identifier: MIT */
/* How pv/ reaches guest memory: through caches, guarded. */
#include <errno.h>

#include "host/access.h"
#include "host/guard.h"
#include "pv/pv.h"

static int use_and_unlock(struct kl_gpc *const *c, unsigned n, bool written, void *p,
			  kl_pv_write_fn *fn, void *arg)
{
	jmp_buf *outer = kl_self.guard;
	enum kl_guard_reason why;
	jmp_buf here;

	why = kl_guard_enter(&here);
	if (why == KL_GUARD_NONE)
		fn(p, arg);
	kl_guard_leave(outer);
	for (unsigned i = 0; i < n; i++)
		kl_gpc_unlock(c[i], written);
	return kl_guard_errno(why);
}

int kl_pv_write(struct kl_gpc *c, size_t len, kl_pv_write_fn *fn, void *arg)
{
	void *p;
	int r = kl_gpc_lock(c, len, &p);

	return r ? r : use_and_unlock(&c, 1, true, p, fn, arg);
}

int kl_pv_trywrite(struct kl_gpc *c, size_t len, kl_pv_write_fn *fn, void *arg)
{
	void *p;
	int r = kl_gpc_trylock(c, len, &p);

	return r ? r : use_and_unlock(&c, 1, true, p, fn, arg);
}

int kl_pv_read(struct kl_gpc *c, size_t len, kl_pv_write_fn *fn, void *arg)
{
	void *p;
	int r = kl_gpc_lock(c, len, &p);

	return r ? r : use_and_unlock(&c, 1, false, p, fn, arg);
}

int kl_pv_write_many(struct kl_gpc *const *c, const size_t *len, unsigned n, kl_pv_write_fn *fn,
		     void *arg)
{
	void *p[KL_PV_MAX_PIECES];
	int r = kl_gpc_lock_many(c, len, p, n);

	return r ? r : use_and_unlock(c, n, true, p, fn, arg);
}

struct piece {
	uint8_t *buf;
	size_t len;
	bool write;
};

static void copy_piece(void *p, void *arg)
{
	struct piece *c = arg;

	if (c->write)
		kl_access_copy(p, c->buf, c->len);
	else
		kl_access_copy(c->buf, p, c->len);
}

/* Areas of which the guest tells just once, at any address. */
int kl_pv_copy(struct kl_vcpu *v, uint64_t gpa, void *buf, size_t len, bool write)
{
	struct kl_gpc *once = &v->pv->once;
	int r = 0, end;

	while (len && !r) {
		size_t n = kl_min(len, (size_t)(KL_PAGE_SIZE - (gpa & ~KL_PAGE_MASK)));
		struct piece c = {buf, n, write};

		r = kl_gpc_activate(once, gpa, n);
		if (!r)
			r = kl_pv_write(once, n, copy_piece, &c);
		gpa += n;
		buf = (uint8_t *)buf + n;
		len -= n;
	}
	end = kl_gpc_deactivate(once);
	return r ? r : end;
}

bool kl_pv_is_ram(struct kl_vm *vm, kl_gfn_t gfn)
{
	const struct kl_memslot *slot;
	bool yes;
	int idx = kl_srcu_read_lock(&vm->srcu);

	slot = kl_memslot_find(kl_memslots(vm, 0), gfn);
	yes = slot && !(slot->flags & KVM_MEM_READONLY);
	kl_srcu_read_unlock(&vm->srcu, idx);
	return yes;
}

int kl_pv_place(struct kl_vcpu *v, uint64_t gpa, void *buf, size_t len)
{
	int r = kl_pv_copy(v, gpa, buf, len, true);

	return r && (r == -EINTR || kl_pv_is_ram(&v->kvm->mem, gpa >> KL_PAGE_SHIFT)) ? r : !!r;
}

enum kl_pv_result kl_pv_placed(struct kl_vcpu *v, int r, bool host)
{
	if (r >= 0 || host)
		return r ? KL_PV_REFUSED : KL_PV_OK;
	if (r == -EINTR)
		kl_leave(v, KL_LEAVE_RESTART);
	v->exit_errno = r;
	kl_leave(v, KL_LEAVE_EXIT);
}
