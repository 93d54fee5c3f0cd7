/* SPDX-License-Identifier: MIT */
/*
 * ioctl(): the hot path. The object is counted in the descriptor's slot for as long as the
 * call runs, KVM_RUN included; everything is given back before the program's signal handlers
 * may run, since they may leave by siglongjmp().
 */
#include <linux/kvm.h>
#include <sys/ioctl.h>

#include "preload/preload.h"
#include "preload/wrapped.h"

WRAPPED(int, ioctl, (int, unsigned long, unsigned long));

#ifndef FIGETBSZ
#define FIGETBSZ _IO(0x00, 2)
#endif

/* What the kernel answers before it asks the driver. */
static bool generic(unsigned cmd)
{
	return cmd == FIOCLEX || cmd == FIONCLEX || cmd == FIONBIO || cmd == FIOASYNC ||
	       cmd == FIGETBSZ;
}

static long bind_new(struct kl_object *obj, long fd)
{
	int r = kl_fd_bind((int)fd, obj);

	if (!r)
		return fd;
	kl_object_put(obj);
	kl_sys(SYS_close, fd);
	return r;
}

static KL_NOINLINE int unknown(int fd, unsigned cmd, unsigned long arg)
{
	struct kl_object *obj;
	struct kl_entry e;
	int err;

	if (KL_UNLIKELY(kl_uffd_is_ioctl(cmd)))
		return kl_uffd_ioctl(fd, cmd, arg);
	if (_IOC_TYPE(cmd) != KVMIO || fd < 0)
		return REAL(ioctl)(fd, cmd, arg);
	kl_pl_enter(&e);
	obj = kl_fd_identify(fd, &err);
	if (obj)
		kl_fd_put(fd, obj);
	kl_pl_leave(&e);
	if (obj)
		return wrap_ioctl(fd, cmd, arg);
	return err ? (int)kl_ret(-err) : REAL(ioctl)(fd, cmd, arg);
}

WRAP(int, ioctl, (int fd, unsigned long request, unsigned long arg))
{
	struct kl_object *obj, *new_obj;
	unsigned cmd = (unsigned)request;
	struct kl_entry e;
	long r;

	if (KL_UNLIKELY(!kl_fd_known(fd)))
		return unknown(fd, cmd, arg);
	if (KL_UNLIKELY(generic(cmd)))
		return REAL(ioctl)(fd, request, arg);
	kl_pl_enter(&e);
	obj = kl_fd_get(fd);
	if (KL_UNLIKELY(!obj)) {
		kl_pl_leave(&e);
		return REAL(ioctl)(fd, request, arg);
	}
	new_obj = NULL;
	r = kl_uapi_ioctl(obj, cmd, arg, &new_obj);
	if (KL_UNLIKELY(new_obj != NULL) && r >= 0)
		r = bind_new(new_obj, r);
	kl_fd_put(fd, obj);
	kl_pl_leave(&e);
	return (int)kl_ret(r);
}
