/* SPDX-License-Identifier: MIT */
/*
 * Cancellation of threads that are outside of KVM, with a VM in the process (U3); under every
 * sanitizer, whose runtimes have an interest in threads of their own. deferral.c has the other
 * half.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#include "t.h"

static atomic_int started;

static void *spins(void *type)
{
	atomic_fetch_add(&started, 1);
	if (!type)
		for (;;)
			pthread_testcancel();
	pthread_setcanceltype((int)(intptr_t)type, NULL);
	for (;;)
		__asm__ volatile("pause"); /* nothing of a runtime's is in here */
	return NULL;
}

static void cancel(int type)
{
	int before = atomic_load(&started);
	void *result = NULL;
	pthread_t t;

	NEED(!pthread_create(&t, NULL, spins, (void *)(intptr_t)type));
	while (atomic_load(&started) == before)
		sched_yield();
	CHECK(!pthread_cancel(t));
	CHECK(!pthread_join(t, &result) && result == PTHREAD_CANCELED);
}

int main(void)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	int vm;

	_Static_assert(!PTHREAD_CANCEL_DEFERRED && PTHREAD_CANCEL_ASYNCHRONOUS, "spins()");
	NEED(kvm >= 0);
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	NEED(vm >= 0);
	for (int i = 0; i < 10; i++) {
		cancel(PTHREAD_CANCEL_DEFERRED);
		cancel(PTHREAD_CANCEL_ASYNCHRONOUS);
	}
	close(vm);
	close(kvm);
	return t_done();
}
