/* SPDX-License-Identifier: MIT */
/*
 * Lock: LEAF, for starting and stopping. The helper takes none of its own. The descriptor is read
 * without it: a number that has just been closed makes an ioctl fail, at worst.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>

#include "base/lock.h"
#include "host/maps.h"
#include "host/sys.h"
#include "host/thread.h"
#include "host/uffd.h"
#include "mem/notifier.h"
#include "mem/notifier_gate.h"
#include "mem/uffd_source.h"
#include "mem/vm.h"

#define EVENTS (UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE)

_Atomic bool kl_uffd_source_wanted;

static struct kl_mutex lock = KL_MUTEX_INITIALIZER(LEAF);
static _Atomic int uffd = -1;         /* -1: no helper runs */
static int stop_fd = -1;              /* lock */
static _Atomic uint32_t helper_alive; /* futex of who stops it */

/* ---- registration --------------------------------------------------------------------------- */

static long reg(uint64_t start, uint64_t end, bool on)
{
	struct uffdio_register r = {
		.range = {start, end - start},
		.mode = UFFDIO_REGISTER_MODE_WP,
	};
	int fd = atomic_load_explicit(&uffd, memory_order_acquire);

	return fd < 0 ? -EBADF
		      : kl_sys(SYS_ioctl, fd, on ? UFFDIO_REGISTER : UFFDIO_UNREGISTER, &r);
}

/* One mapping that cannot be registered spoils the range: then each for itself. */
static void reg_each(uint64_t start, uint64_t end, bool on)
{
	struct kl_maps_entry e;
	struct kl_maps m;

	if (!reg(start, end, on) || !kl_maps_open(&m))
		return;
	while (kl_maps_next(&m, &e) && e.start < end)
		if (e.end > start)
			(void)reg(kl_max(start, e.start), kl_min(end, e.end), on);
	kl_maps_close(&m);
}

static void watch_slot(uint64_t start, uint64_t end)
{
	reg_each(start, end, true);
}

void kl_uffd_source_rewatch(uint64_t start, uint64_t end)
{
	kl_notifier_walk_slots(start & KL_PAGE_MASK, end, watch_slot);
}

void kl_uffd_source_watch(uint64_t start, uint64_t end)
{
	if (KL_UNLIKELY(atomic_load_explicit(&uffd, memory_order_acquire) < 0)) {
		int r = kl_uffd_source_start();

		if (r) {
			kl_log(KL_LOG_ERR, "no userfaultfd events: %s", strerror(-r));
			atomic_store(&kl_uffd_source_wanted, false);
			return;
		}
	}
	reg_each(start, end, true);
}

/*
 * Not over the program's own registrations: before Linux 6.16 one userfaultfd can take away what
 * another has registered.
 */
static void unregister(uint64_t start, uint64_t end)
{
	uint64_t s = start, e = end;

	for (; kl_uffd_gap(&s, &e); s = e, e = end)
		reg_each(s, e, false);
}

void kl_uffd_source_yield(uint64_t start, uint64_t end)
{
	unregister(start, end);
}

void kl_uffd_source_unwatch(uint64_t start, uint64_t end)
{
	unregister(start, end);
	kl_uffd_source_rewatch(start, end);
}

void kl_uffd_source_vm_gone(struct kl_vm *vm)
{
	struct kl_overlap o;

	for (unsigned as = 0; as < KL_NR_AS; as++)
		kl_for_each_overlap (&o, kl_memslots(vm, as), 0, KL_PAGE_MASK)
			if (!o.in_gmem)
				kl_uffd_source_unwatch(o.slot->hva,
						       o.slot->hva +
							       (o.slot->npages << KL_PAGE_SHIFT));
}

/* ---- the helper ----------------------------------------------------------------------------- */

/*
 * Never behind an update in the queue: it may be waiting for the bracket of a thread that sleeps
 * until the next event has been read here.
 */
static void bracket(uint64_t start, uint64_t len, enum kl_notifier_event event, const char *cause,
		    void (*inside)(uint64_t start, uint64_t end))
{
	struct kl_notifier_range r = {.start = start,
				      .end = start + len,
				      .event = event,
				      .may_block = true,
				      .no_queue = true,
				      .cause = cause};

	if (kl_notifier_begin(&r))
		return;
	/* Before anybody can fault in what is there now. */
	if (inside)
		inside(start, start + len);
	kl_notifier_end(&r);
}

static void handle(const struct uffd_msg *m)
{
	uint64_t start = m->arg.remove.start, len = m->arg.remove.end - start;

	switch (m->event) {
	case UFFD_EVENT_UNMAP:
		bracket(start, len, KL_EVENT_UNMAP, "userfaultfd event UNMAP",
			kl_uffd_source_rewatch);
		break;
	case UFFD_EVENT_REMOVE:
		bracket(start, len, KL_EVENT_DISCARD, "userfaultfd event REMOVE", NULL);
		break;
	case UFFD_EVENT_REMAP:
		start = m->arg.remap.to;
		len = m->arg.remap.len;
		bracket(m->arg.remap.from, len, KL_EVENT_REMAP, "userfaultfd event REMAP",
			kl_uffd_source_rewatch);
		/* The registration has moved along, maybe to where no slot is. */
		bracket(start, len, KL_EVENT_REPLACE, "userfaultfd event REMAP",
			kl_uffd_source_unwatch);
		break;
	case UFFD_EVENT_FORK:
		/* Copy-on-write does not show through an address, and the child has no VM. */
		kl_sys(SYS_close, m->arg.fork.ufd);
		break;
	default:
		break;
	}
}

static void *helper(void *arg)
{
	struct pollfd p[2] = {{.fd = (int)((uintptr_t)arg & 0xffffffff), .events = POLLIN},
			      {.fd = (int)((uintptr_t)arg >> 32), .events = POLLIN}};
	struct uffd_msg m;

	kl_engine_enter();
	while (kl_sys(SYS_poll, p, 2, -1) > 0 && !p[1].revents) {
		if (kl_sys(SYS_read, p[0].fd, &m, sizeof(m)) == sizeof(m))
			handle(&m);
		else if (p[0].revents & (POLLERR | POLLNVAL))
			break;
	}
	kl_sys_close(p[0].fd); /* wakes who sleeps for an event that nobody will read */
	kl_sys_close(p[1].fd);
	kl_engine_leave();
	atomic_store(&helper_alive, 0);
	kl_futex_wake(&helper_alive, 1);
	return NULL;
}

/* A descriptor out of the program's way. */
static int moved_up(long fd)
{
	int high;

	if (fd < 0)
		return (int)fd;
	high = kl_sys_dup((int)fd);
	kl_sys(SYS_close, fd);
	return high;
}

static long try_api(long fd, uint64_t features)
{
	struct uffdio_api api = {.api = UFFD_API, .features = features};

	return kl_sys(SYS_ioctl, fd, UFFDIO_API, &api);
}

static int open_uffd(void)
{
	uint64_t more = UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
	long fd, r;

	/* No fault is ever handled, so those of the kernel need not be allowed. */
	fd = kl_sys(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	if (fd == -EINVAL)
		fd = kl_sys(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (fd < 0)
		return (int)fd;
	r = try_api(fd, EVENTS | more);
	if (r == -EPERM) /* FORK is for the privileged */
		r = try_api(fd, EVENTS | (more &= ~(uint64_t)UFFD_FEATURE_EVENT_FORK));
	if (r == -EINVAL)
		r = try_api(fd, EVENTS | (more & UFFD_FEATURE_EVENT_FORK));
	if (r < 0) {
		kl_sys(SYS_close, fd);
		return (int)r;
	}
	return moved_up(fd);
}

static int start_locked(void)
{
	int fd, stop, r;
	pthread_t t;

	kl_assert_held(&lock);
	fd = open_uffd();
	if (fd < 0)
		return fd;
	stop = moved_up(kl_sys(SYS_eventfd2, 0, EFD_CLOEXEC));
	if (stop < 0) {
		kl_sys_close(fd);
		return stop;
	}
	atomic_store(&helper_alive, 1);
	r = kl_thread_create(&t, "kvmlet-uffd", helper,
			     (void *)((uintptr_t)(unsigned)stop << 32 | (unsigned)fd));
	if (r) {
		kl_sys_close(fd);
		kl_sys_close(stop);
		return r;
	}
	pthread_detach(t);
	stop_fd = stop;
	atomic_store_explicit(&uffd, fd, memory_order_release);
	return 0;
}

int kl_uffd_source_start(void)
{
	bool started = false;
	int r = 0;

	kl_mutex_lock(&lock);
	if (atomic_load_explicit(&uffd, memory_order_relaxed) < 0) {
		r = start_locked();
		started = !r;
	}
	if (!r)
		atomic_store(&kl_uffd_source_wanted, true);
	kl_mutex_unlock(&lock);
	if (started)
		kl_uffd_source_rewatch(0, KL_PAGE_MASK);
	return r;
}

void kl_uffd_source_stop(void)
{
	uint64_t one = 1;

	kl_mutex_lock(&lock);
	atomic_store(&kl_uffd_source_wanted, false);
	if (atomic_load_explicit(&uffd, memory_order_relaxed) >= 0) {
		atomic_store(&uffd, -1);
		kl_sys(SYS_write, stop_fd, &one, sizeof(one));
		while (atomic_load(&helper_alive))
			kl_futex_wait(&helper_alive, 1, NULL);
		stop_fd = -1;
	}
	kl_mutex_unlock(&lock);
}

void kl_uffd_source_after_fork(void)
{
	int fd = atomic_exchange(&uffd, -1);

	kl_mutex_init(&lock, KL_RANK_LEAF);
	/* They are the parent's: events in there are not ours to read. */
	if (fd >= 0) {
		kl_sys_close(fd);
		kl_sys_close(stop_fd);
	}
	stop_fd = -1;
	atomic_store(&helper_alive, 0);
}
