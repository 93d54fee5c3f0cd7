/* SPDX-License-Identifier: MIT */
/*
 * A KVM program that is in the middle of its work when its end comes: two vCPUs spin, one
 * makes exits, memory slots come and go.
 * usage: spin-vm spin|exit|_exit|abort|segv|thread-exit
 */
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

static int kvm, vm;
static size_t run_size;
static pthread_barrier_t ready;
static volatile int *volatile nowhere;

static int call(int fd, const char *name, unsigned long cmd, unsigned long arg)
{
	int ret = ioctl(fd, cmd, arg);

	if (ret < 0)
		err(1, "%s", name);
	return ret;
}
#define CALL(fd, cmd, arg) call(fd, #cmd, cmd, (unsigned long)(arg))

static void set_slot(unsigned slot, uint64_t gpa, uint64_t size, void *mem)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot,
		.guest_phys_addr = gpa,
		.memory_size = size,
		.userspace_addr = (uintptr_t)mem,
	};

	CALL(vm, KVM_SET_USER_MEMORY_REGION, &region);
}

static void *vcpu(void *arg)
{
	int id = (int)(intptr_t)arg, fd = CALL(vm, KVM_CREATE_VCPU, id);
	struct kvm_run *run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	struct kvm_regs regs = {.rip = id ? 0x1010u : 0x1000u, .rflags = 2};
	struct kvm_sregs sregs;

	if (run == MAP_FAILED)
		err(1, "mmap");
	CALL(fd, KVM_GET_SREGS, &sregs);
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	CALL(fd, KVM_SET_SREGS, &sregs);
	CALL(fd, KVM_SET_REGS, &regs);
	for (int n = 0;; n++) {
		CALL(fd, KVM_RUN, 0);
		if (run->exit_reason != KVM_EXIT_IO)
			errx(1, "exit reason %u", run->exit_reason);
		if (!n)
			pthread_barrier_wait(&ready);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	/* out %al,$16; jmp to it (vCPU 0)   |   out %al,$16; jmp to itself (the others) */
	static const uint8_t code0[] = {0xe6, 16, 0xeb, 0xfc}, code1[] = {0xe6, 16, 0xeb, 0xfe};
	const char *how = argc > 1 ? argv[1] : "spin";
	char *ram = mmap(NULL, 0x4000, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	pthread_t thread;

	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		err(1, "/dev/kvm");
	if (ram == MAP_FAILED)
		err(1, "mmap");
	vm = CALL(kvm, KVM_CREATE_VM, 0);
	run_size = (size_t)CALL(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	memcpy(ram + 0x1000, code0, sizeof(code0));
	memcpy(ram + 0x1010, code1, sizeof(code1));
	set_slot(0, 0, 0x4000, ram);
	pthread_barrier_init(&ready, NULL, 4);
	for (intptr_t i = 0; i < 3; i++)
		if (pthread_create(&thread, NULL, vcpu, (void *)i))
			errx(1, "cannot create a thread");
	pthread_barrier_wait(&ready);
	puts("ready");
	fflush(stdout);

	if (!strcmp(how, "exit"))
		return 3;
	if (!strcmp(how, "_exit"))
		_exit(3);
	if (!strcmp(how, "abort"))
		abort();
	if (!strcmp(how, "segv"))
		*nowhere = 1;
	if (!strcmp(how, "thread-exit"))
		pthread_exit(NULL);
	for (;;) {
		set_slot(1, 0x100000, 0x1000, ram);
		set_slot(1, 0x100000, 0, NULL);
	}
}
