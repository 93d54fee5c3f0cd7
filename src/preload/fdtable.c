/* SPDX-License-Identifier: MIT */
/*
 * Calls in flight are counted in the slot's high bits, so that finding the object and keeping
 * it alive is one step. Binding adds BIAS to the object's references; unbinding turns the
 * slot's count into references by taking back only what is left of BIAS. In between, calls
 * that return and do not find their count in the slot drop a reference of the object: it
 * cannot reach zero under them. Counts of one object are interchangeable, so a descriptor
 * that was closed and bound to the same object again needs no generation.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

#include "host/sys.h"
#include "preload/preload.h"

#define COUNT_SHIFT 48
#define ONE         (1ull << COUNT_SHIFT)
#define BIAS        (1u << 16)

_Atomic(_Atomic uint64_t *) kl_fd_pages[KL_FD_PAGES];
static _Atomic pid_t table_pid;

static struct kl_object *object_of(uint64_t v)
{
	return (struct kl_object *)(uintptr_t)(v & KL_FD_PTR_MASK);
}

static bool is_object(uint64_t v)
{
	return (v & KL_FD_PTR_MASK) > KL_FD_CLOSING;
}

static _Atomic uint64_t *slot_make(int fd)
{
	_Atomic(_Atomic uint64_t *) *p;
	_Atomic uint64_t *page, *expected = NULL;

	if ((unsigned)fd >= KL_FD_MAX)
		return NULL;
	p = &kl_fd_pages[(unsigned)fd >> KL_FD_PAGE_SHIFT];
	page = atomic_load_explicit(p, memory_order_acquire);
	if (!page) {
		page = kl_sys_map(KL_FD_PAGE * sizeof(*page));
		if (!page)
			return NULL;
		if (!atomic_compare_exchange_strong(p, &expected, page)) {
			kl_sys_unmap((void *)page, KL_FD_PAGE * sizeof(*page));
			page = expected;
		}
	}
	return &page[(unsigned)fd & (KL_FD_PAGE - 1)];
}

struct kl_object *kl_fd_get(int fd)
{
	_Atomic uint64_t *s = kl_fd_slot(fd);
	uint64_t v;

	if (!s)
		return NULL;
	v = atomic_load_explicit(s, memory_order_relaxed);
	do {
		if (!is_object(v))
			return NULL;
	} while (!atomic_compare_exchange_weak_explicit(s, &v, v + ONE, memory_order_acquire,
							memory_order_relaxed));
	return object_of(v);
}

void kl_fd_put(int fd, struct kl_object *obj)
{
	_Atomic uint64_t *s = kl_fd_slot(fd);
	uint64_t v = atomic_load_explicit(s, memory_order_relaxed);

	do {
		if (object_of(v) != obj || v < ONE) {
			kl_object_put(obj);
			return;
		}
	} while (!atomic_compare_exchange_weak_explicit(s, &v, v - ONE, memory_order_release,
							memory_order_relaxed));
}

/* Replace what the slot holds; returns what it held, its calls now counted in the object. */
static struct kl_object *swap(_Atomic uint64_t *s, uint64_t new)
{
	uint64_t v = atomic_exchange_explicit(s, new, memory_order_acq_rel);
	struct kl_object *obj = object_of(v);

	if (!is_object(v))
		return NULL;
	atomic_fetch_sub_explicit(&obj->refs, BIAS - (unsigned)(v >> COUNT_SHIFT),
				  memory_order_acq_rel);
	return obj;
}

int kl_fd_bind(int fd, struct kl_object *obj)
{
	_Atomic uint64_t *s = slot_make(fd);
	struct kl_object *old;

	if (!s)
		return (unsigned)fd >= KL_FD_MAX ? -EMFILE : -ENOMEM;
	if (!atomic_load_explicit(&table_pid, memory_order_relaxed))
		kl_fd_after_fork();
	atomic_fetch_add_explicit(&obj->refs, BIAS, memory_order_relaxed);
	old = swap(s, (uint64_t)(uintptr_t)obj);
	if (old)
		kl_object_put(old);
	return 0;
}

bool kl_fd_bind_if_free(int fd, struct kl_object *obj)
{
	_Atomic uint64_t *s = slot_make(fd);
	uint64_t expected = 0;

	if (!s)
		return false;
	atomic_fetch_add_explicit(&obj->refs, BIAS, memory_order_relaxed);
	if (atomic_compare_exchange_strong(s, &expected, (uint64_t)(uintptr_t)obj))
		return true;
	atomic_fetch_sub_explicit(&obj->refs, BIAS, memory_order_relaxed);
	return false;
}

struct kl_object *kl_fd_unbind(int fd)
{
	_Atomic uint64_t *s = kl_fd_slot(fd);

	return s && atomic_load_explicit(s, memory_order_relaxed) ? swap(s, 0) : NULL;
}

struct kl_object *kl_fd_close_begin(int fd)
{
	_Atomic uint64_t *s = kl_fd_slot(fd);

	return s && atomic_load_explicit(s, memory_order_relaxed) ? swap(s, KL_FD_CLOSING) : NULL;
}

void kl_fd_close_end(int fd)
{
	_Atomic uint64_t *s = kl_fd_slot(fd);
	uint64_t expected = KL_FD_CLOSING;

	/* Between the real close and here the number may have been given out again. */
	if (s)
		atomic_compare_exchange_strong(s, &expected, 0);
}

int kl_fd_next(unsigned from, unsigned last)
{
	if (last >= KL_FD_MAX)
		last = KL_FD_MAX - 1;
	for (unsigned fd = from; fd <= last; fd++) {
		if (!atomic_load_explicit(&kl_fd_pages[fd >> KL_FD_PAGE_SHIFT],
					  memory_order_acquire)) {
			fd |= KL_FD_PAGE - 1;
			continue;
		}
		if (kl_fd_known((int)fd))
			return (int)fd;
	}
	return -1;
}

bool kl_fd_shared_child(void)
{
	pid_t pid = atomic_load_explicit(&table_pid, memory_order_relaxed);

	return pid && pid != (pid_t)kl_sys(SYS_getpid);
}

void kl_fd_after_fork(void)
{
	atomic_store_explicit(&table_pid, (pid_t)kl_sys(SYS_getpid), memory_order_relaxed);
}

/* ---- descriptors that came by other ways --------------------------------------------- */

static long memfd_name(int fd, char *buf, size_t size)
{
	char path[32] = "/proc/self/fd/";
	char digits[12];
	int n = 0, len = (int)strlen(path);
	long r;

	do
		digits[n++] = (char)('0' + fd % 10);
	while ((fd /= 10) != 0);
	while (n)
		path[len++] = digits[--n];
	path[len] = 0;
	r = kl_sys(SYS_readlinkat, AT_FDCWD, path, buf, size - 1);
	buf[r > 0 ? r : 0] = 0;
	return r;
}

struct kl_object *kl_fd_identify(int fd, int *err)
{
	_Atomic uint64_t *s = kl_fd_slot(fd);
	struct kl_object *obj;
	struct stat st, again;
	char name[64];
	int newfd;

	*err = 0;
	if (fd < 0 || (s && atomic_load(s) == KL_FD_CLOSING) || kl_fd_shared_child())
		return NULL;
	if (kl_sys(SYS_fstat, fd, &st) || !S_ISREG(st.st_mode))
		return NULL;
	obj = kl_object_find(st.st_dev, st.st_ino);
	if (!obj) {
		/* Inherited through exec: the name is all that is left. */
		memfd_name(fd, name, sizeof(name));
		if (!strncmp(name, "/memfd:kvm-", 11)) {
			*err = EIO;
			return NULL;
		}
		if (strcmp(name, "/memfd:kvm (deleted)"))
			return NULL;
		kl_pl_take_over();
		newfd = kl_uapi_open_system(O_CLOEXEC, &obj);
		if (newfd < 0)
			return NULL;
		kl_sys(SYS_close, newfd);
	}
	if (!kl_fd_bind_if_free(fd, obj)) {
		kl_object_put(obj);
		return kl_fd_get(fd);
	}
	/* Closed, or replaced, while we looked? */
	if (kl_sys(SYS_fstat, fd, &again) || again.st_ino != st.st_ino ||
	    again.st_dev != st.st_dev) {
		obj = kl_fd_unbind(fd);
		if (obj)
			kl_object_put(obj);
		return NULL;
	}
	return kl_fd_get(fd);
}
