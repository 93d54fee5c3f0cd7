/* SPDX-License-Identifier: MIT */
/*
 * Descriptors and lifetimes (U4, U5): what keeps what alive, identity, limits, fork.
 */
#include <pthread.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include "uapi_util.h"

static void identity(struct dev *d, uint64_t *dev, uint64_t *ino)
{
	struct stat st;

	assert_int_equal(fstat(d->fd, &st), 0);
	*dev = st.st_dev;
	*ino = st.st_ino;
}

static struct kl_object *find(uint64_t dev, uint64_t ino)
{
	struct kl_object *o;

	kl_engine_enter();
	o = kl_object_find(dev, ino);
	kl_engine_leave();
	return o;
}

static void put(struct kl_object *o)
{
	kl_engine_enter();
	kl_object_put(o);
	kl_engine_leave();
}

static void any_close_order(void **state)
{
	int before = count_fds();
	struct kvm_regs regs;

	(void)state;
	for (int order = 0; order < 24; order++) {
		struct dev kvm = open_kvm(), vm = make_vm(&kvm);
		struct dev vcpu = make_vcpu(&vm, 0), stats = make(&vcpu, KVM_GET_STATS_FD, 0);
		struct dev *all[] = {&kvm, &vm, &vcpu, &stats};
		char byte;
		int n = order;

		for (int left = 4; left; left--) {
			int pick = n % left;

			n /= left;
			dev_close(all[pick]);
			all[pick] = all[left - 1];
			if (vcpu.obj)
				assert_int_equal(dev_ioctl_p(&vcpu, KVM_GET_REGS, &regs), 0);
			if (vm.obj)
				assert_int_equal(dev_ioctl(&vm, KVM_SET_NR_MMU_PAGES, 64), 0);
			if (stats.obj)
				assert_int_equal(kl_uapi_read(stats.obj, &byte, 1, &(off_t){0}), 1);
		}
	}
	assert_int_equal(count_fds(), before);
}

static void identity_is_the_memfd(void **state)
{
	struct dev kvm = open_kvm(), vm = make_vm(&kvm), vcpu = make_vcpu(&vm, 3);
	struct dev *all[] = {&kvm, &vm, &vcpu};
	uint64_t dev[3], ino[3];

	(void)state;
	for (int i = 0; i < 3; i++) {
		identity(all[i], &dev[i], &ino[i]);
		assert_ptr_equal(find(dev[i], ino[i]), all[i]->obj);
		put(all[i]->obj);
	}
	assert_null(find(dev[0], ~0ull));
	/* A reference found keeps the object when the descriptor is closed. */
	assert_ptr_equal(find(dev[2], ino[2]), vcpu.obj);
	struct dev again = vcpu;

	dev_close(&vcpu);
	dev_close(&vm);
	assert_int_equal(dev_ioctl(&again, KVM_NMI, 0), 0);
	put(again.obj);
	for (int i = 1; i < 3; i++)
		assert_null(find(dev[i], ino[i]));
	dev_close(&kvm);
}

static void descriptors(void **state)
{
	int expected = dup(0);
	struct dev kvm, vm, vcpu, stats;
	struct stat st;

	(void)state;
	close(expected);
	kvm = open_kvm();
	assert_int_equal(kvm.fd, expected);
	vm = make_vm(&kvm);
	assert_int_equal(vm.fd, expected + 1);
	vcpu = make_vcpu(&vm, 0);
	assert_int_equal(vcpu.fd, expected + 2);
	stats = make(&vm, KVM_GET_STATS_FD, 0);
	assert_int_equal(stats.fd, expected + 3);
	assert_int_equal(fcntl(stats.fd, F_GETFL) & O_ACCMODE, O_RDONLY);
	for (int fd = expected; fd < expected + 4; fd++)
		assert_int_equal(fcntl(fd, F_GETFD), FD_CLOEXEC);
	assert_int_equal(fstat(vcpu.fd, &st), 0);
	assert_int_equal(st.st_size, RUN_SIZE);
	assert_int_equal(ftruncate(vcpu.fd, 0), -1);
	assert_int_equal(ftruncate(vcpu.fd, 1 << 20), -1);
	assert_int_equal(ftruncate(vm.fd, 4096), -1);
	dev_close(&stats);
	dev_close(&vcpu);
	dev_close(&vm);
	dev_close(&kvm);
}

static void open_flags(void **state)
{
	struct kl_object *o = NULL;
	int fd = kl_uapi_open_system(O_RDWR, &o);

	(void)state;
	assert_true(fd >= 0);
	assert_int_equal(fcntl(fd, F_GETFD), 0);
	close(fd);
	put(o);
	fd = kl_uapi_open_system(O_RDWR | O_NONBLOCK | O_CLOEXEC, &o);
	assert_true(fcntl(fd, F_GETFL) & O_NONBLOCK);
	close(fd);
	put(o);
	assert_int_equal(kl_uapi_open_system(O_RDWR | O_CREAT | O_EXCL, &o), -EEXIST);
	assert_int_equal(kl_uapi_open_system(O_RDONLY | O_DIRECTORY, &o), -ENOTDIR);
	assert_null(o);
}

static void closed_vcpu_keeps_its_id(void **state)
{
	struct dev kvm = open_kvm(), vm = make_vm(&kvm), vcpu = make_vcpu(&vm, 7);

	(void)state;
	dev_close(&vcpu);
	assert_int_equal(dev_ioctl(&vm, KVM_CREATE_VCPU, 7), -EEXIST);
	vcpu = make_vcpu(&vm, 4095);
	dev_close(&vcpu);
	dev_close(&vm);
	dev_close(&kvm);
}

static void raise_fd_limit(void)
{
	struct rlimit lim;

	assert_int_equal(getrlimit(RLIMIT_NOFILE, &lim), 0);
	lim.rlim_cur = lim.rlim_max;
	assert_int_equal(setrlimit(RLIMIT_NOFILE, &lim), 0);
}

static void many_vcpus(void **state)
{
	struct dev kvm = open_kvm(), vm = make_vm(&kvm);
	static struct dev vcpus[1024];
	int before = count_fds();
	struct rlimit lim;

	(void)state;
	raise_fd_limit();
	getrlimit(RLIMIT_NOFILE, &lim);
	if (lim.rlim_cur < 1024 + 100)
		skip();
	for (int i = 0; i < 1024; i++)
		vcpus[i] = make_vcpu(&vm, 4095 - i);
	assert_int_equal(dev_ioctl(&vm, KVM_CREATE_VCPU, 0), -EINVAL);
	for (int i = 0; i < 1024; i++)
		dev_close(&vcpus[i]);
	assert_int_equal(count_fds(), before);
	assert_int_equal(dev_ioctl(&vm, KVM_CREATE_VCPU, 0), -EINVAL);
	dev_close(&vm);
	dev_close(&kvm);
}

/* No descriptor left: refused with EMFILE, and nothing is kept of it. */
static void no_descriptors_left(void **state)
{
	struct dev kvm = open_kvm(), vm = make_vm(&kvm), vcpu = make_vcpu(&vm, 0), late;
	struct rlimit lim, low;
	int next = dup(0);

	(void)state;
	close(next);
	getrlimit(RLIMIT_NOFILE, &lim);
	low = lim;
	low.rlim_cur = (rlim_t)next;
	assert_int_equal(setrlimit(RLIMIT_NOFILE, &low), 0);
	assert_int_equal(dev_ioctl(&kvm, KVM_CREATE_VM, 0), -EMFILE);
	assert_int_equal(dev_ioctl(&vm, KVM_CREATE_VCPU, 1), -EMFILE);
	assert_int_equal(dev_ioctl(&vm, KVM_GET_STATS_FD, 0), -EMFILE);
	assert_int_equal(dev_ioctl(&vcpu, KVM_GET_STATS_FD, 0), -EMFILE);
	assert_int_equal(setrlimit(RLIMIT_NOFILE, &lim), 0);
	late = make_vcpu(&vm, 1);
	dev_close(&late);
	dev_close(&vcpu);
	dev_close(&vm);
	dev_close(&kvm);
}

static void mmap_rules(void **state)
{
	struct dev kvm = open_kvm(), vm = make_vm(&kvm), vcpu = make_vcpu(&vm, 0);
	const int rw = PROT_READ | PROT_WRITE;
	struct kl_overlay o = {.fd = -1, .at = 99};

	(void)state;
	assert_int_equal(kl_uapi_mmap(kvm.obj, 4096, rw, MAP_SHARED, 0, &o), -ENODEV);
	assert_int_equal(kl_uapi_mmap(vm.obj, 4096, rw, MAP_SHARED, 0, &o), -ENODEV);
	assert_int_equal(kl_uapi_mmap(vcpu.obj, 4096, rw | PROT_EXEC, MAP_SHARED, 0, &o), -EPERM);
	assert_int_equal(kl_uapi_mmap(vcpu.obj, 4096, rw, MAP_SHARED, 0, &o), 0);
	assert_int_equal(kl_uapi_mmap(vcpu.obj, 8192, rw, MAP_PRIVATE, 0, &o), 0);
	assert_int_equal(kl_uapi_mmap(vcpu.obj, 4096, rw, MAP_SHARED, 3 * 4096, &o), 0);
	assert_int_equal(o.fd, -1);
	assert_int_equal(kl_uapi_mmap(vcpu.obj, 8193, rw, MAP_SHARED, 0, &o), 4096);
	assert_int_equal(o.at, 8192);
	assert_int_equal(kl_uapi_mmap(vcpu.obj, 40960, rw, MAP_SHARED, 4096, &o), 4096);
	assert_int_equal(o.at, 4096);
	assert_int_equal(kl_uapi_mmap(vcpu.obj, 1, rw, MAP_SHARED, 8192, &o), 4096);
	assert_int_equal(o.at, 0);
	dev_close(&vcpu);
	dev_close(&vm);
	dev_close(&kvm);
}

static void ring_is_the_vms(void **state)
{
	struct dev kvm = open_kvm(), vm = make_vm(&kvm), a = make_vcpu(&vm, 0),
		   b = make_vcpu(&vm, 1);
	char *pa = map_run(&a), *pb = map_run(&b);

	(void)state;
	pa[0] = 1;
	pa[4096] = 2;
	pa[8192] = 3;
	assert_int_equal(pb[0], 0);
	assert_int_equal(pb[4096], 0);
	assert_int_equal(pb[8192], 3);
	/* The mappings outlive everything else. */
	dev_close(&a);
	dev_close(&b);
	dev_close(&vm);
	dev_close(&kvm);
	pa[8192] = 4;
	assert_int_equal(pb[8192], 4);
	munmap(pa, RUN_SIZE);
	munmap(pb, RUN_SIZE);
}

static void read_and_seek(void **state)
{
	struct dev kvm = open_kvm(), vm = make_vm(&kvm), vcpu = make_vcpu(&vm, 0);
	struct dev *all[] = {&kvm, &vm, &vcpu};
	char buf[8];

	(void)state;
	for (int i = 0; i < 3; i++) {
		assert_int_equal(kl_uapi_read(all[i]->obj, buf, 8, NULL), -EINVAL);
		assert_int_equal(kl_uapi_read(all[i]->obj, buf, 8, &(off_t){0}), -EINVAL);
		assert_int_equal(kl_uapi_lseek(all[i]->obj, 100, SEEK_SET), 0);
		assert_int_equal(kl_uapi_lseek(all[i]->obj, 100, 77), -EINVAL);
	}
	dev_close(&vcpu);
	dev_close(&vm);
	dev_close(&kvm);
}

/* ---- fork -------------------------------------------------------------------------- */

static int child(struct dev *kvm, struct dev *vm, struct dev *vcpu, struct dev *stats)
{
	struct kl_object *o = NULL, *o2 = NULL;
	struct kvm_regs regs;
	char byte;

	kl_uapi_after_fork();
	if (kl_uapi_ioctl(vm->obj, KVM_CHECK_EXTENSION, 0, &o) != -EIO)
		return 1;
	if (kl_uapi_ioctl(vcpu->obj, KVM_GET_REGS, (unsigned long)&regs, &o) != -EIO)
		return 2;
	if (kl_uapi_ioctl(vcpu->obj, KVM_RUN, 0, &o) != -EIO)
		return 3;
	if (kl_uapi_read(stats->obj, &byte, 1, NULL) != -EIO)
		return 4;
	/* The inherited /dev/kvm works, and so does what is made from it. */
	if (kl_uapi_ioctl(kvm->obj, KVM_GET_API_VERSION, 0, &o) != 12)
		return 5;
	if (kl_uapi_ioctl(kvm->obj, KVM_CREATE_VM, 0, &o) < 0 || !o)
		return 6;
	if (kl_uapi_ioctl(o, KVM_CREATE_VCPU, 0, &o2) < 0 || !o2)
		return 7;
	if (kl_uapi_ioctl(o2, KVM_GET_REGS, (unsigned long)&regs, &(struct kl_object *){0}))
		return 8;
	kl_object_put(o);
	kl_object_put(o2);
	kl_object_put(vcpu->obj);
	kl_object_put(vm->obj);
	kl_object_put(stats->obj);
	kl_object_put(kvm->obj);
	return 0;
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED true
#else
#define SANITIZED false
#endif

static atomic_bool stop;

/* Holds engine locks at random moments, so that a fork finds them held. */
static void *churn(void *arg)
{
	struct dev *kvm = arg;

	while (!atomic_load(&stop)) {
		struct dev vm = make_vm(kvm), vcpu = make_vcpu(&vm, 0);

		dev_close(&vm);
		dev_close(&vcpu);
	}
	return NULL;
}

static void forked_child(void **state)
{
	struct dev kvm = open_kvm(), vm = make_vm(&kvm), vcpu = make_vcpu(&vm, 0);
	struct dev stats = make(&vm, KVM_GET_STATS_FD, 0);
	struct kvm_regs regs;
	pthread_t thread;

	(void)state;
	/* gcc 12's sanitizers have allocators that a forked child finds locked. */
	atomic_store(&stop, false);
	if (!SANITIZED)
		assert_int_equal(pthread_create(&thread, NULL, churn, &kvm), 0);
	for (int i = 0; i < 20; i++) {
		pid_t pid = fork();
		int status;

		if (!pid) {
			alarm(20);
			_exit(child(&kvm, &vm, &vcpu, &stats));
		}
		assert_int_equal(waitpid(pid, &status, 0), pid);
		assert_int_equal(status, 0);
	}
	atomic_store(&stop, true);
	if (!SANITIZED)
		pthread_join(thread, NULL);
	assert_int_equal(dev_ioctl_p(&vcpu, KVM_GET_REGS, &regs), 0);
	dev_close(&stats);
	dev_close(&vcpu);
	dev_close(&vm);
	dev_close(&kvm);
}

/* ---- threads ----------------------------------------------------------------------- */

static void *lookups(void *arg)
{
	uint64_t *id = arg;

	while (!atomic_load(&stop)) {
		struct kl_object *o = find(id[0], id[1]);

		if (o)
			put(o);
	}
	return NULL;
}

static void find_against_last_put(void **state)
{
	struct dev kvm = open_kvm(), vm = make_vm(&kvm);
	pthread_t thread;
	uint64_t id[2];

	(void)state;
	identity(&vm, &id[0], &id[1]);
	atomic_store(&stop, false);
	assert_int_equal(pthread_create(&thread, NULL, lookups, id), 0);
	for (int i = 0; i < 2000; i++) {
		struct kl_object *o = find(id[0], id[1]);

		if (o)
			put(o);
		if (i == 1000)
			dev_close(&vm);
	}
	atomic_store(&stop, true);
	pthread_join(thread, NULL);
	assert_null(find(id[0], id[1]));
	dev_close(&kvm);
}

struct creator {
	struct dev *vm;
	atomic_int *made;
};

static void *create_all_ids(void *arg)
{
	struct creator *c = arg;

	for (unsigned long id = 0; id < 64; id++) {
		struct dev vcpu;
		long r = dev_ioctl_new(c->vm, KVM_CREATE_VCPU, id, &vcpu);

		if (r >= 0) {
			atomic_fetch_add(c->made, 1);
			dev_close(&vcpu);
		} else {
			assert_int_equal(r, -EEXIST);
		}
	}
	return NULL;
}

static void racing_creations(void **state)
{
	struct dev kvm = open_kvm(), vm = make_vm(&kvm);
	pthread_t threads[4];
	atomic_int made = 0;
	struct creator c = {&vm, &made};

	(void)state;
	for (int i = 0; i < 4; i++)
		assert_int_equal(pthread_create(&threads[i], NULL, create_all_ids, &c), 0);
	for (int i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
	assert_int_equal(made, 64);
	dev_close(&vm);
	dev_close(&kvm);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(any_close_order),
		cmocka_unit_test(identity_is_the_memfd),
		cmocka_unit_test(descriptors),
		cmocka_unit_test(open_flags),
		cmocka_unit_test(closed_vcpu_keeps_its_id),
		cmocka_unit_test(many_vcpus),
		cmocka_unit_test(no_descriptors_left),
		cmocka_unit_test(mmap_rules),
		cmocka_unit_test(ring_is_the_vms),
		cmocka_unit_test(read_and_seek),
		cmocka_unit_test(forked_child),
		cmocka_unit_test(find_against_last_put),
		cmocka_unit_test(racing_creations),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
