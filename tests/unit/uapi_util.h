/* SPDX-License-Identifier: MIT */
/*
 * Calls into uapi/ as the preload library makes them; or, with KVMLET_TEST_REAL=1, the same
 * calls on the real /dev/kvm, to check the tests' own expectations.
 */
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "host/thread.h"
#include "uapi/abi.h"
#include "uapi/uapi.h"

#define RUN_SIZE (KL_VCPU_MMAP_PAGES * KL_PAGE_SIZE)

struct dev {
	int fd;
	struct kl_object *obj; /* NULL: a real one */
};

static inline bool on_real_kvm(void)
{
	return getenv("KVMLET_TEST_REAL") != NULL;
}

/* The kernel's value: >= 0 or -errno. @new (may be NULL): what the call made. */
static inline long dev_ioctl_new(struct dev *d, unsigned long cmd, unsigned long arg,
				 struct dev *new)
{
	struct kl_object *obj = NULL;
	long r;

	if (!d->obj) {
		r = ioctl(d->fd, cmd, arg);
		r = r < 0 ? -errno : r;
	} else {
		kl_engine_enter();
		r = kl_uapi_ioctl(d->obj, cmd, arg, &obj);
		kl_engine_leave();
	}
	if (new &&r >= 0)
		*new = (struct dev){.fd = (int)r, .obj = obj};
	else
		assert_null(obj);
	return r;
}

static inline long dev_ioctl(struct dev *d, unsigned long cmd, unsigned long arg)
{
	return dev_ioctl_new(d, cmd, arg, NULL);
}

#define dev_ioctl_p(d, cmd, ptr) dev_ioctl(d, cmd, (unsigned long)(ptr))

static inline struct dev open_kvm(void)
{
	struct dev d = {0};

	if (on_real_kvm()) {
		d.fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	} else {
		kl_engine_enter();
		d.fd = kl_uapi_open_system(O_RDWR | O_CLOEXEC, &d.obj);
		kl_engine_leave();
	}
	assert_true(d.fd >= 0);
	return d;
}

static inline void dev_close(struct dev *d)
{
	close(d->fd);
	if (d->obj) {
		kl_engine_enter();
		kl_object_put(d->obj);
		kl_engine_leave();
	}
	*d = (struct dev){.fd = -1};
}

static inline struct dev make(struct dev *parent, unsigned long cmd, unsigned long arg)
{
	struct dev d = {.fd = -1};

	assert_true(dev_ioctl_new(parent, cmd, arg, &d) >= 0);
	return d;
}

static inline struct dev make_vm(struct dev *kvm)
{
	return make(kvm, KVM_CREATE_VM, 0);
}

static inline struct dev make_vcpu(struct dev *vm, unsigned long id)
{
	return make(vm, KVM_CREATE_VCPU, id);
}

/* mmap of a vCPU descriptor, with what kl_uapi_mmap() wants over it. MAP_FAILED, or where it is. */
static inline void *map_vcpu(struct dev *vcpu, size_t len, int prot, int flags, off_t off)
{
	struct kl_overlay o;
	long n = 0;
	char *p;

	if (vcpu->obj) {
		kl_engine_enter();
		n = kl_uapi_mmap(vcpu->obj, len, prot, flags, off, &o);
		kl_engine_leave();
	}
	if (n < 0) {
		errno = (int)-n;
		return MAP_FAILED;
	}
	p = mmap(NULL, len, prot, flags, vcpu->fd, off);
	if (n && p != MAP_FAILED)
		assert_true(mmap(p + o.at, (size_t)n, prot, flags | MAP_FIXED, o.fd, o.off) !=
			    MAP_FAILED);
	return p;
}

static inline void *map_run(struct dev *vcpu)
{
	void *p = map_vcpu(vcpu, RUN_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, 0);

	assert_true(p != MAP_FAILED);
	return p;
}

/* Two pages, of which the second can't be touched: [0], [4096) is the end. */
static inline char *half_mapped(void)
{
	char *p = mmap(NULL, 2 * KL_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
		       -1, 0);

	assert_true(p != MAP_FAILED);
	assert_int_equal(mprotect(p + KL_PAGE_SIZE, KL_PAGE_SIZE, PROT_NONE), 0);
	return p;
}

#define STAT_NAME_MAX 64

/* A statistic of a VM or vCPU; 0 if there is none of that name. Not on a real /dev/kvm. */
static inline uint64_t read_stat(struct dev *owner, const char *name)
{
	struct dev s = make(owner, KVM_GET_STATS_FD, 0);
	struct kvm_stats_header h;
	uint64_t val = 0;
	off_t pos = 0;

	kl_engine_enter();
	assert_int_equal(kl_uapi_read(s.obj, &h, sizeof(h), &pos), sizeof(h));
	for (unsigned i = 0; i < h.num_desc; i++) {
		char buf[sizeof(struct kvm_stats_desc) + STAT_NAME_MAX];
		struct kvm_stats_desc *d = (void *)buf;
		size_t size = sizeof(*d) + h.name_size;

		pos = h.desc_offset + (off_t)(i * size);
		assert_int_equal(kl_uapi_read(s.obj, d, size, &pos), size);
		if (strcmp(d->name, name))
			continue;
		pos = h.data_offset + d->offset;
		assert_int_equal(kl_uapi_read(s.obj, &val, sizeof(val), &pos), sizeof(val));
	}
	kl_engine_leave();
	dev_close(&s);
	return val;
}

static inline int count_fds(void)
{
	int n = 0;

	for (int fd = 0; fd < 65536; fd++)
		n += fcntl(fd, F_GETFD) >= 0;
	return n;
}
