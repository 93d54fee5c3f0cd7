/* SPDX-License-Identifier: MIT */
/*
 * Objects and their identity: (st_dev, st_ino) of the memfd that stands for them (U4).
 */
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/failpoint.h"
#include "base/log.h"
#include "host/guard.h"
#include "host/sys.h"
#include "uapi/heatmap.h"
#include "uapi/object.h"

#define HASH_SIZE 1024

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8u
#endif

struct kl_mutex kl_objects_lock = KL_MUTEX_INITIALIZER(OBJECTS);
pid_t kl_uapi_pid;

static struct kl_mutex table_lock = KL_MUTEX_INITIALIZER(LEAF);
static struct kl_object *table[HASH_SIZE]; /* table_lock */

static struct kl_object **bucket(uint64_t dev, uint64_t ino)
{
	return &table[(ino ^ dev) % HASH_SIZE];
}

/* ---- descriptors ------------------------------------------------------------------- */

static long new_memfd(const char *name, size_t size)
{
	long fd = kl_sys(SYS_memfd_create, name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
	long r;

	if (fd == -EACCES) /* vm.memfd_noexec=2 */
		fd = kl_sys(SYS_memfd_create, name,
			    MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
	if (fd < 0)
		return fd;
	r = size ? kl_sys(SYS_ftruncate, fd, size) : 0;
	if (!r)
		r = kl_sys(SYS_fcntl, fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
	if (r < 0) {
		kl_sys(SYS_close, fd);
		return r;
	}
	return fd;
}

/*
 * The same file, the same number, another access mode. Without /proc the descriptor stays
 * writable, which nobody but fcntl(F_GETFL) can see: there is nothing to write to.
 */
static void reopen_readonly(long fd)
{
	char path[40];
	long ro;

	snprintf(path, sizeof(path), "/proc/self/fd/%ld", fd);
	ro = kl_sys(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
	if (ro < 0)
		return;
	kl_sys(SYS_dup3, ro, fd, O_CLOEXEC);
	kl_sys(SYS_close, ro);
}

int kl_object_open(struct kl_object *obj, enum kl_object_kind kind, const char *name, size_t size,
		   int flags)
{
	struct stat st;
	long fd, r;

	fd = kl_failpoint("object-memfd") ? -EMFILE : new_memfd(name, size);
	if (fd < 0)
		return (int)fd;
	if ((flags & O_ACCMODE) == O_RDONLY && (kind == KL_OBJ_STATS || kind == KL_OBJ_SYSTEM))
		reopen_readonly(fd);
	if (!(flags & O_CLOEXEC))
		kl_sys(SYS_fcntl, fd, F_SETFD, 0);
	if (flags & O_NONBLOCK)
		kl_sys(SYS_fcntl, fd, F_SETFL, O_RDWR | O_NONBLOCK);
	r = kl_sys(SYS_fstat, fd, &st);
	if (r < 0) {
		kl_sys(SYS_close, fd);
		return (int)r;
	}
	obj->kind = kind;
	obj->dev = st.st_dev;
	obj->ino = st.st_ino;
	obj->owner = kl_uapi_pid;
	atomic_init(&obj->refs, 1);
	return (int)fd;
}

void kl_object_publish(struct kl_object *obj)
{
	struct kl_object **head = bucket(obj->dev, obj->ino);

	kl_object_complete(obj);
	kl_mutex_lock(&table_lock);
	obj->hash_next = *head;
	*head = obj;
	kl_mutex_unlock(&table_lock);
}

static void unlink_object(struct kl_object *obj)
{
	struct kl_object **p;

	kl_mutex_lock(&table_lock);
	p = bucket(obj->dev, obj->ino);
	while (*p && *p != obj)
		p = &(*p)->hash_next;
	if (*p)
		*p = obj->hash_next;
	kl_mutex_unlock(&table_lock);
}

/* ---- references -------------------------------------------------------------------- */

void kl_object_get(struct kl_object *obj)
{
	atomic_fetch_add_explicit(&obj->refs, 1, memory_order_relaxed);
}

static void destroy(struct kl_object *obj)
{
	KL_TRACE("destroy kind=%d ino=%lu", obj->kind, (unsigned long)obj->ino);
	/* Another process's: its locks and its threads are not here. */
	if (obj->kind != KL_OBJ_SYSTEM && obj->owner != kl_uapi_pid)
		return;
	switch (obj->kind) {
	case KL_OBJ_SYSTEM:
		free(obj);
		break;
	case KL_OBJ_VM:
		kl_uvm_destroy(kl_uvm(obj));
		break;
	case KL_OBJ_VCPU:
		/* The vCPU itself stays with its VM. */
		kl_object_put(&kl_uvcpu(obj)->vm->obj);
		break;
	case KL_OBJ_GMEM:
		kl_ugmem_destroy(kl_ugmem(obj));
		break;
	case KL_OBJ_STATS: {
		struct kl_uvm *vm = kl_ustats(obj)->vm;

		kl_mutex_destroy(&kl_ustats(obj)->lock);
		free(obj);
		kl_object_put(&vm->obj);
		break;
	}
	}
}

void kl_object_put(struct kl_object *obj)
{
	if (atomic_fetch_sub_explicit(&obj->refs, 1, memory_order_acq_rel) > 1)
		return;
	kl_object_no_user(obj);
	unlink_object(obj);
	destroy(obj);
}

/* A reference, unless the last one has just gone. */
static bool get_unless_dead(struct kl_object *obj)
{
	unsigned n = atomic_load_explicit(&obj->refs, memory_order_relaxed);

	while (n) {
		if (atomic_compare_exchange_weak_explicit(
			    &obj->refs, &n, n + 1, memory_order_acquire, memory_order_relaxed))
			return true;
	}
	return false;
}

struct kl_object *kl_object_find(uint64_t dev, uint64_t ino)
{
	struct kl_object *obj;

	kl_mutex_lock(&table_lock);
	obj = *bucket(dev, ino);
	while (obj && (obj->dev != dev || obj->ino != ino))
		obj = obj->hash_next;
	if (obj && !get_unless_dead(obj))
		obj = NULL;
	kl_mutex_unlock(&table_lock);
	return obj;
}

/* ---- /dev/kvm ---------------------------------------------------------------------- */

int kl_uapi_open_system(int flags, struct kl_object **out)
{
	struct kl_object *obj;
	int fd;

	*out = NULL;
	if ((flags & (O_CREAT | O_EXCL)) == (O_CREAT | O_EXCL))
		return -EEXIST;
	if (flags & O_DIRECTORY)
		return -ENOTDIR;
	if (flags & O_DIRECT)
		return -EINVAL;
	if (!kl_uapi_pid)
		kl_uapi_pid = (pid_t)kl_sys(SYS_getpid);
	fd = kl_guard_init();
	if (fd)
		return fd;
	obj = calloc(1, sizeof(*obj));
	if (!obj)
		return -ENOMEM;
	fd = kl_object_open(obj, KL_OBJ_SYSTEM, "kvm", 0, flags);
	KL_TRACE("open /dev/kvm = %d", fd);
	if (fd < 0) {
		free(obj);
		return fd;
	}
	kl_object_publish(obj);
	*out = obj;
	return fd;
}

void kl_uapi_after_fork(void)
{
	kl_uapi_pid = (pid_t)kl_sys(SYS_getpid);
	kl_mutex_init(&kl_objects_lock, KL_RANK_OBJECTS);
	kl_mutex_init(&table_lock, KL_RANK_LEAF);
	kl_vms_after_fork();
	kl_irqfd_after_fork();
	kl_stats_after_fork();
	kl_heatmap_after_fork();
}
