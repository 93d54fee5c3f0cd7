/* SPDX-License-Identifier: MIT */
/* The library's public functions on write tracking: argument checks. The rest is in mmu/track.c. */
#include <errno.h>
#include <stdlib.h>

#include "base/bias.h"
#include "mmu/api.h"
#include "mmu/track.h"

struct kvmlet_tracker {
	struct kl_tracker t;
	struct kvmlet_vm *vm;
};

KL_EXPORT int kvmlet_track_register(struct kvmlet_vm *vm, const struct kvmlet_track_ops *ops,
				    void *opaque, struct kvmlet_tracker **out)
{
	struct kvmlet_tracker *t;
	int r = kl_api_may_wait(vm);

	if (r)
		return r;
	if (!ops->track_write)
		return -EINVAL;
	t = malloc(sizeof(*t));
	if (!t)
		return -ENOMEM;
	*t = (struct kvmlet_tracker){.t = {.ops = *ops, .opaque = opaque}, .vm = vm};
	kl_engine_enter();
	kl_track_register(&vm->vm, &t->t);
	kl_engine_leave();
	*out = t;
	return 0;
}

KL_EXPORT int kvmlet_track_unregister(struct kvmlet_tracker *tracker)
{
	int r = tracker->vm->forks == kl_api_forks ? kl_api_may_wait(tracker->vm) : -EIO;

	/* Of a VM that is dead it can be taken off, too: it may not outlive its memory. */
	if (r && !(r == -EIO && tracker->vm->forks == kl_api_forks))
		return r;
	kl_engine_enter();
	kl_track_unregister(&tracker->vm->vm, &tracker->t);
	kl_engine_leave();
	free(tracker);
	return 0;
}

static int change(struct kvmlet_vm *vm, unsigned as, kl_gfn_t gfn,
		  int (*fn)(struct kl_vm *vm, unsigned as, kl_gfn_t gfn))
{
	int r = kl_api_may_access(vm, as);

	if (r)
		return r;
	kl_engine_enter();
	r = fn(&vm->vm, as, gfn);
	kl_engine_leave();
	return r;
}

KL_EXPORT int kvmlet_track_add_page(struct kvmlet_vm *vm, unsigned as, kl_gfn_t gfn)
{
	return change(vm, as, gfn, kl_track_add);
}

KL_EXPORT int kvmlet_track_remove_page(struct kvmlet_vm *vm, unsigned as, kl_gfn_t gfn)
{
	return change(vm, as, gfn, kl_track_remove);
}
