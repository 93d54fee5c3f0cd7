/* SPDX-License-Identifier: MIT */
/*
 * Descriptors in SCM_RIGHTS messages (U4).
 *
 * A message keeps the object alive although no descriptor of this process does. Whether the
 * message still exists, or somebody received it, only the kernel knows: the open file
 * description gets a shared lock before it is sent, and another description of the same file
 * asks for an exclusive one. It is granted when the last holder of the first, in whatever
 * process or message, has gone.
 *
 * Lock: flights_lock, a leaf; never held across kl_object_put().
 */
#include <fcntl.h>
#include <string.h>
#include <sys/file.h>

#include "base/lock.h"
#include "preload/preload.h"

#define MAX_FLIGHTS 256
#define MAX_CONTROL 2048

struct flight {
	struct kl_object *obj;
	int probe;
};

_Atomic bool kl_scm_any;
static struct kl_mutex flights_lock = KL_MUTEX_INITIALIZER(LEAF);
static struct flight flights[MAX_FLIGHTS];
static unsigned nr_flights; /* flights_lock */

static int open_probe(int fd)
{
	char path[32];
	long probe, high;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	probe = kl_sys(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
	if (probe < 0)
		return (int)probe;
	high = kl_sys_dup((int)probe);
	kl_sys(SYS_close, probe);
	return (int)high;
}

static void add_flight(struct kl_object *obj, int fd)
{
	bool known = false;
	int probe;

	if (kl_sys(SYS_flock, fd, LOCK_SH | LOCK_NB))
		return;
	kl_mutex_lock(&flights_lock);
	for (unsigned i = 0; i < nr_flights; i++)
		known |= flights[i].obj == obj;
	if (!known && nr_flights < MAX_FLIGHTS) {
		probe = open_probe(fd);
		if (probe >= 0) {
			kl_object_get(obj);
			flights[nr_flights++] = (struct flight){obj, probe};
			atomic_store(&kl_scm_any, true);
			known = true;
		}
	}
	kl_mutex_unlock(&flights_lock);
	/* Cannot be followed: alive for as long as the process. */
	if (!known)
		kl_object_get(obj);
}

static struct kl_object *landed(void)
{
	struct kl_object *obj = NULL;

	kl_mutex_lock(&flights_lock);
	for (unsigned i = 0; i < nr_flights && !obj; i++) {
		if (kl_sys(SYS_flock, flights[i].probe, LOCK_EX | LOCK_NB))
			continue;
		obj = flights[i].obj;
		kl_sys_close(flights[i].probe);
		flights[i] = flights[--nr_flights];
		atomic_store(&kl_scm_any, nr_flights > 0);
	}
	kl_mutex_unlock(&flights_lock);
	return obj;
}

void kl_scm_reap(void)
{
	struct kl_object *obj;
	struct kl_entry e;
	int saved = errno;

	if (kl_fd_shared_child())
		return;
	kl_pl_enter(&e);
	while ((obj = landed()))
		kl_object_put(obj);
	kl_pl_leave(&e);
	errno = saved;
}

void kl_scm_after_fork(void)
{
	kl_mutex_init(&flights_lock, KL_RANK_LEAF);
}

/* Calls @fn for each descriptor in the control data at @p, which is ours or was just written. */
static void each_fd(const char *p, size_t len, void (*fn)(int))
{
	struct cmsghdr h;
	int fd;

	while (len >= sizeof(h)) {
		memcpy(&h, p, sizeof(h));
		if (h.cmsg_len < sizeof(h) || h.cmsg_len > len)
			return;
		if (h.cmsg_level == SOL_SOCKET && h.cmsg_type == SCM_RIGHTS) {
			for (size_t o = CMSG_LEN(0); o + sizeof(fd) <= h.cmsg_len;
			     o += sizeof(fd)) {
				memcpy(&fd, p + o, sizeof(fd));
				fn(fd);
			}
		}
		if (CMSG_ALIGN(h.cmsg_len) >= len)
			return;
		p += CMSG_ALIGN(h.cmsg_len);
		len -= CMSG_ALIGN(h.cmsg_len);
	}
}

static void departing(int fd)
{
	struct kl_object *obj = kl_fd_get(fd);

	if (!obj)
		return;
	add_flight(obj, fd);
	kl_fd_put(fd, obj);
}

static void arriving(int fd)
{
	struct kl_object *obj = kl_fd_unbind(fd);
	int err;

	/* A number that the kernel has just given out stands for nothing old. */
	if (obj)
		kl_object_put(obj);
	obj = kl_fd_identify(fd, &err);
	if (obj)
		kl_fd_put(fd, obj);
}

static bool opened(void)
{
	return atomic_load_explicit(&kl_pl_opened, memory_order_relaxed) && !kl_fd_shared_child();
}

static void before_send(const struct msghdr *umsg)
{
	char control[MAX_CONTROL];
	struct msghdr msg;
	struct kl_entry e;

	kl_pl_enter(&e);
	if (!kl_copy_from_user(&msg, umsg, sizeof(msg)) && msg.msg_controllen &&
	    msg.msg_controllen <= sizeof(control) &&
	    !kl_copy_from_user(control, msg.msg_control, msg.msg_controllen))
		each_fd(control, msg.msg_controllen, departing);
	kl_pl_leave(&e);
}

static void after_receive(const struct msghdr *msg)
{
	struct kl_entry e;
	int saved = errno;

	if (!msg->msg_controllen || !msg->msg_control)
		return;
	kl_pl_enter(&e);
	each_fd(msg->msg_control, msg->msg_controllen, arriving);
	kl_pl_leave(&e);
	if (atomic_load_explicit(&kl_scm_any, memory_order_relaxed))
		kl_scm_reap();
	errno = saved;
}

WRAP(ssize_t, sendmsg, (int fd, const struct msghdr *msg, int flags))
{
	if (KL_UNLIKELY(opened()))
		before_send(msg);
	return REAL(sendmsg)(fd, msg, flags);
}

WRAP(int, sendmmsg, (int fd, struct mmsghdr *vec, unsigned n, int flags))
{
	if (KL_UNLIKELY(opened()))
		for (unsigned i = 0; i < kl_min(n, 1024u); i++)
			before_send(&vec[i].msg_hdr);
	return REAL(sendmmsg)(fd, vec, n, flags);
}

WRAP(ssize_t, recvmsg, (int fd, struct msghdr *msg, int flags))
{
	ssize_t r = REAL(recvmsg)(fd, msg, flags);

	if (r >= 0 && KL_UNLIKELY(opened()))
		after_receive(msg);
	return r;
}

WRAP(int, recvmmsg, (int fd, struct mmsghdr *vec, unsigned n, int flags, struct timespec *timeout))
{
	int r = REAL(recvmmsg)(fd, vec, n, flags, timeout);

	if (r > 0 && KL_UNLIKELY(opened()))
		for (int i = 0; i < r; i++)
			after_receive(&vec[i].msg_hdr);
	return r;
}
