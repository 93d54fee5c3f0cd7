/* SPDX-License-Identifier: MIT */
/* Threads made before and after; descriptors closed under calls that use them. */
#include <pthread.h>

#include "t.h"

static struct vm v;
static _Atomic int ready, stop;
static pthread_barrier_t barrier;

static void nothing(int sig)
{
}

static void pause_ms(long ms)
{
	usleep((useconds_t)ms * 1000);
}

/* A thread from before /dev/kvm was opened runs the vCPU, and blocks all signals. */
static void *early(void *arg)
{
	sigset_t all;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, NULL);
	pthread_barrier_wait(&barrier);
	for (int i = 0; i < 100; i++)
		CHECK(t_out(&v) == 7);
	FAILS(ioctl(v.vcpu, KVM_GET_REGS, 8), EFAULT);
	return NULL;
}

static void *spinner(void *arg)
{
	int vcpu = *(int *)arg;
	int r;

	ready++;
	r = ioctl(vcpu, KVM_RUN, 0);
	CHECK(r == -1 && errno == EINTR);
	return NULL;
}

static void wait_ready(int n)
{
	while (ready < n)
		pause_ms(1);
	pause_ms(20);
}

/* The descriptor of a vCPU that runs is closed, and its number used again. */
static void close_while_running(void)
{
	struct vm w;
	pthread_t t;
	int null;

	T_VM(&w, code_spin);
	ready = 0;
	NEED(!pthread_create(&t, NULL, spinner, &w.vcpu));
	wait_ready(1);
	CHECK(!close(w.vcpu) && !close(w.vm) && !close(w.kvm));
	null = open("/dev/null", O_RDWR);
	dup2(null, w.vcpu);
	FAILS(ioctl(w.vcpu, KVM_RUN, 0), ENOTTY);
	pause_ms(10);
	CHECK(!pthread_kill(t, SIGUSR1));
	pthread_join(t, NULL);
	close(null);
	close(w.vcpu);
	munmap(w.run, w.run_size);
	munmap(w.code, T_PAGE);
}

static int shared_fd;

static void *user(void *arg)
{
	while (!stop) {
		int r = ioctl(shared_fd, KVM_GET_API_VERSION, 0);

		CHECK(r == 12 || (r == -1 && (errno == EBADF || errno == ENOTTY)));
		r = ioctl(shared_fd, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY);
		CHECK(r == 1 || r == -1);
	}
	return NULL;
}

static void *duplicator(void *arg)
{
	while (!stop) {
		int fd = dup(shared_fd);

		if (fd >= 0)
			CHECK(!close(fd));
	}
	return NULL;
}

/* Opening and closing against using and duplicating. */
static void churn(void)
{
	pthread_t t[4];
	int null = open("/dev/null", O_RDWR);

	shared_fd = fcntl(null, F_DUPFD, 500);
	stop = 0;
	for (int i = 0; i < 4; i++)
		NEED(!pthread_create(&t[i], NULL, i < 2 ? user : duplicator, NULL));
	for (int i = 0; i < 3000; i++) {
		int fd = open("/dev/kvm", O_RDWR);

		CHECK(dup2(fd, shared_fd) == shared_fd);
		CHECK(!close(fd));
		if (i % 3 == 0)
			CHECK(!close(shared_fd));
		else if (i % 3 == 1)
			CHECK(dup2(null, shared_fd) == shared_fd);
	}
	stop = 1;
	for (int i = 0; i < 4; i++)
		pthread_join(t[i], NULL);
	close(null);
	close(shared_fd);
}

static void *many(void *arg)
{
	for (int i = 0; i < 20; i++) {
		struct vm w;

		T_VM(&w, code_out);
		CHECK(t_out(&w) == 0);
		t_free(&w);
	}
	return NULL;
}

static void own_vms(void)
{
	pthread_t t[8];

	for (int i = 0; i < 8; i++)
		NEED(!pthread_create(&t[i], NULL, many, NULL));
	for (int i = 0; i < 8; i++)
		pthread_join(t[i], NULL);
}

/* fork() while other threads are in the middle of everything. */
static int child(void)
{
	struct vm w;

	t_failures = 0;
	T_VM(&w, code_out);
	CHECK(t_out(&w) == 0);
	FAILS(ioctl(v.vm, KVM_CREATE_VCPU, 9), EIO);
	signal(SIGUSR1, SIG_DFL);
	return t_failures;
}

static void *busy(void *arg)
{
	while (!stop) {
		void *p = mmap(NULL, T_PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		t_slot(&v, 5, 0x20000, T_PAGE, p);
		munmap(p, T_PAGE);
		t_slot(&v, 5, 0x20000, 0, NULL);
		signal(SIGUSR2, nothing);
		close(dup(v.kvm));
	}
	return NULL;
}

static void forks(void)
{
	pthread_t t[2];

	stop = 0;
	for (int i = 0; i < 2; i++)
		NEED(!pthread_create(&t[i], NULL, busy, NULL));
	for (int i = 0; i < 30; i++)
		CHECK(t_child(child) == 0);
	stop = 1;
	for (int i = 0; i < 2; i++)
		pthread_join(t[i], NULL);
}

int main(void)
{
	static const uint8_t out7[] = {0xb0, 7, 0xe6, 0x10, 0xeb, 0xfa};
	struct sigaction sa = {.sa_handler = nothing};
	pthread_t t;

	sigaction(SIGUSR1, &sa, NULL);
	pthread_barrier_init(&barrier, NULL, 2);
	NEED(!pthread_create(&t, NULL, early, NULL));
	T_VM(&v, out7);
	pthread_barrier_wait(&barrier);
	pthread_join(t, NULL);
	close_while_running();
	churn();
	own_vms();
	/* A sanitizer's runtime has locks of its own that do not survive fork(). */
	if (!t_sanitized())
		forks();
	t_free(&v);
	return t_done();
}
