/* SPDX-License-Identifier: MIT */
/*
 * What the program does with userfaultfd (N1): which memory is registered, and brackets around
 * the ioctls after which a page must be looked at anew. COPY, ZEROPAGE, CONTINUE and POISON only
 * fill in what was absent: nobody can have a pointer to it, so they are no events.
 *
 * The structures are copied, so that nothing of the program's memory is touched while a bracket
 * is open: its userfaultfd's own monitor may be the one that has to provide it.
 */
#include <errno.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>

#include "host/uffd.h"
#include "mem/uffd_source.h"
#include "preload/preload.h"

/* Since 6.8. */
struct move {
	uint64_t dst, src, len, mode;
	int64_t move;
};
#define MOVE _IOWR(UFFDIO, 0x05, struct move)

bool kl_uffd_is_ioctl(unsigned cmd)
{
	switch (cmd) {
	case UFFDIO_API:
	case UFFDIO_REGISTER:
	case UFFDIO_UNREGISTER:
	case UFFDIO_WRITEPROTECT:
	case MOVE:
		return true;
	default:
		return false;
	}
}

union arg {
	struct uffdio_api api;
	struct uffdio_register reg;
	struct uffdio_range range;
	struct uffdio_writeprotect wp;
	struct move move;
};

static int copy_in(union arg *a, unsigned long arg, size_t size)
{
	struct kl_entry e;
	int r;

	kl_pl_enter(&e);
	r = kl_copy_from_user(a, (const void *)arg, size);
	kl_pl_leave(&e);
	return r;
}

static int copy_out(unsigned long arg, const union arg *a, size_t size)
{
	struct kl_entry e;
	int r;

	kl_pl_enter(&e);
	r = kl_copy_to_user((void *)arg, a, size);
	kl_pl_leave(&e);
	return r;
}

static long bracketed(int fd, unsigned cmd, union arg *a, const struct uffdio_range *range,
		      enum kl_notifier_event ev, const char *cause)
{
	uint64_t start = range->start, end = start + range->len;
	struct kl_bracket b;
	long r;

	kl_bracket_begin(&b, (void *)(uintptr_t)start, range->len, ev, cause);
	/* Memory can be registered once: where the program does, it shall. */
	if (kl_uffd_source_on() && cmd == UFFDIO_REGISTER && start < end)
		kl_uffd_source_yield(start, end);
	r = kl_sys(SYS_ioctl, fd, cmd, a);
	/* Out of memory in the middle: some of it is registered. */
	if (cmd == UFFDIO_REGISTER && (!r || r == -ENOMEM) && start < end)
		kl_uffd_add(start, end);
	if (cmd == UFFDIO_UNREGISTER && !r)
		kl_uffd_remove(start, end);
	if (kl_uffd_source_on() && start < end)
		kl_uffd_source_rewatch(start, end);
	kl_bracket_end(&b);
	return r;
}

int kl_uffd_ioctl(int fd, unsigned cmd, unsigned long arg)
{
	struct uffdio_range moved;
	uint64_t wanted;
	union arg a;
	long r;

	if (copy_in(&a, arg, _IOC_SIZE(cmd))) /* its last word may be output */
		return REAL(ioctl)(fd, cmd, arg);
	switch (cmd) {
	case UFFDIO_API:
		wanted = a.api.features;
		r = kl_sys(SYS_ioctl, fd, cmd, &a);
		if (!r)
			kl_uffd_add_features(wanted);
		break;
	case UFFDIO_REGISTER:
		r = bracketed(fd, cmd, &a, &a.reg.range, KL_EVENT_PROTECT, "UFFDIO_REGISTER");
		break;
	case UFFDIO_UNREGISTER:
		r = bracketed(fd, cmd, &a, &a.range, KL_EVENT_PROTECT, "UFFDIO_UNREGISTER");
		break;
	case UFFDIO_WRITEPROTECT:
		r = bracketed(fd, cmd, &a, &a.wp.range, KL_EVENT_PROTECT, "UFFDIO_WRITEPROTECT");
		break;
	default:
		moved = (struct uffdio_range){a.move.src, a.move.len};
		r = bracketed(fd, cmd, &a, &moved, KL_EVENT_PROTECT, "UFFDIO_MOVE");
		break;
	}
	/* A refused API and an interrupted MOVE say how much there was, too. */
	if ((!r || ((cmd == UFFDIO_API || cmd == MOVE) && (r == -EINVAL || r == -EAGAIN))) &&
	    (cmd == UFFDIO_API || cmd == UFFDIO_REGISTER || cmd == MOVE) &&
	    copy_out(arg, &a, _IOC_SIZE(cmd)))
		r = -EFAULT;
	return (int)kl_ret(r);
}
