/* SPDX-License-Identifier: MIT */
/*
 * KVM_SET_SIGNAL_MASK under a storm of signals: after every KVM_RUN the thread's mask is what it
 * was before, whenever the signal came.
 */
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>

#include "t.h"

static volatile long hits;

static void on_alarm(int sig)
{
	(void)sig;
	hits++;
}

/* The kernel's own idea, not what a wrapper says. */
static uint64_t kernel_mask(void)
{
	uint64_t mask = 0;
	char line[128];
	FILE *f = fopen("/proc/thread-self/status", "re");

	while (f && fgets(line, sizeof(line), f))
		if (!strncmp(line, "SigBlk:", 7))
			mask = strtoull(line + 7, NULL, 16);
	if (f)
		fclose(f);
	return mask;
}

static double seconds(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

int main(void)
{
	struct itimerval storm = {{0, 40}, {0, 40}}, off = {{0, 0}, {0, 0}};
	struct sigaction sa = {.sa_handler = on_alarm};
	struct {
		struct kvm_signal_mask head;
		uint8_t set[8];
	} mask = {.head.len = 8};
	int kvm = open("/dev/kvm", O_RDWR), vm, vcpu;
	struct kvm_run *run;
	uint64_t before;
	double end;
	long runs = 0;

	NEED(kvm >= 0);
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	NEED(vcpu >= 0);
	run = mmap(NULL, (size_t)ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE,
		   MAP_SHARED, vcpu, 0);
	NEED(run != MAP_FAILED);
	NEED(!ioctl(vcpu, KVM_SET_SIGNAL_MASK, &mask));
	run->immediate_exit = 1;
	CHECK(ioctl(vcpu, KVM_RUN, 0) == -1 && errno == EINTR);
	before = kernel_mask();
	sigaction(SIGALRM, &sa, NULL);
	setitimer(ITIMER_REAL, &storm, NULL);
	for (end = seconds() + 2; seconds() < end; runs++) {
		long seen = hits;

		CHECK(ioctl(vcpu, KVM_RUN, 0) == -1 && errno == EINTR);
		/* Signals stay away for good only if the mask is wrong. */
		if (runs % 4096 == 4095)
			for (int i = 0; hits == seen && i < 1000; i++)
				usleep(100);
		if (runs % 4096 == 4095 && !CHECK(hits != seen))
			break;
	}
	setitimer(ITIMER_REAL, &off, NULL);
	CHECK(kernel_mask() == before);
	CHECK(hits > 0);
	printf("%ld runs, %ld signals, %d checks, %d failed\n", runs, hits, t_checks, t_failures);
	return t_failures != 0;
}
