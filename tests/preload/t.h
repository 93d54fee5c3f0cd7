/* SPDX-License-Identifier: MIT */
/*
 * Helpers of the front-door tests: plain KVM programs that know nothing of kvmlet. Each runs
 * under the preload library in `make test`, and unchanged on a real /dev/kvm.
 */
#pragma once

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>

static int t_failures, t_checks;

#define CHECK(cond)                                                                           \
	({                                                                                    \
		bool c_ = (cond);                                                             \
		int e_ = errno;                                                               \
		__atomic_fetch_add(&t_checks, 1, __ATOMIC_RELAXED);                           \
		if (!c_) {                                                                    \
			__atomic_fetch_add(&t_failures, 1, __ATOMIC_RELAXED);                 \
			fprintf(stderr, "%s:%d: %s: failed (errno %d)\n", __FILE__, __LINE__, \
				#cond, e_);                                                   \
		}                                                                             \
		c_;                                                                           \
	})

/* A precondition of the rest of the program. */
#define NEED(cond)                \
	do {                      \
		if (!CHECK(cond)) \
			exit(1);  \
	} while (0)

#define FAILS(call, err)                              \
	CHECK(({                                      \
		errno = 0;                            \
		(long)(call) == -1 && errno == (err); \
	}))

static inline int t_done(void)
{
	fprintf(stderr, "%d checks, %d failures\n", t_checks, t_failures);
	return t_failures ? 1 : 0;
}

/* The exit status of a child that runs @fn; a signal is 256 + its number. */
static inline int t_child(int (*fn)(void))
{
	pid_t pid = fork();
	int st;

	if (!pid)
		_exit(fn());
	if (pid < 0 || waitpid(pid, &st, 0) != pid)
		return -1;
	return WIFSIGNALED(st) ? 256 + WTERMSIG(st) : WEXITSTATUS(st);
}

/* True if the test runs under the preload library. */
static inline bool t_preloaded(void)
{
	const char *e = getenv("LD_PRELOAD");

	return e && strstr(e, "kvmlet");
}

/* Under a sanitizer's runtime the allocator and some handlers are its own. */
static inline bool t_sanitized(void)
{
	return dlsym(RTLD_DEFAULT, "__asan_init") || dlsym(RTLD_DEFAULT, "__tsan_init");
}

/*
 * A VM with one vCPU in real mode: code at CODE, a page of data at DATA.
 */
#define CODE      0x1000u
#define DATA      0x8000u
#define T_PAGE    4096u
#define SLOT_CODE 0
#define SLOT_DATA 1

struct vm {
	int kvm, vm, vcpu;
	struct kvm_run *run;
	size_t run_size;
	uint8_t *code;
};

/* jmp . */
static const uint8_t code_spin[] = {0xeb, 0xfe};
/* out 0x10, al; jmp . */
static const uint8_t code_out[] = {0xe6, 0x10, 0xeb, 0xfe};
/* again: mov al, [DATA]; out 0x10, al; jmp again */
static const uint8_t code_read[] = {0xa0, 0x00, 0x80, 0xe6, 0x10, 0xe9, 0xf8, 0xff};
static const uint8_t code_hlt[] = {0xf4, 0xeb, 0xfd};

static inline int t_slot(struct vm *v, unsigned slot, uint64_t gpa, uint64_t size, void *host)
{
	struct kvm_userspace_memory_region r = {
		.slot = slot,
		.guest_phys_addr = gpa,
		.memory_size = size,
		.userspace_addr = (uintptr_t)host,
	};

	return ioctl(v->vm, KVM_SET_USER_MEMORY_REGION, &r);
}

static inline void t_rewind(struct vm *v)
{
	struct kvm_regs regs = {.rip = CODE, .rflags = 2};

	NEED(!ioctl(v->vcpu, KVM_SET_REGS, &regs));
}

static inline void t_vcpu(struct vm *v, int id)
{
	struct kvm_sregs s;

	v->vcpu = ioctl(v->vm, KVM_CREATE_VCPU, id);
	NEED(v->vcpu >= 0);
	v->run_size = (size_t)ioctl(v->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	v->run = mmap(NULL, v->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, v->vcpu, 0);
	NEED(v->run != MAP_FAILED);
	NEED(!ioctl(v->vcpu, KVM_GET_SREGS, &s));
	s.cs.base = 0;
	s.cs.selector = 0;
	NEED(!ioctl(v->vcpu, KVM_SET_SREGS, &s));
	t_rewind(v);
}

static inline void t_vm(struct vm *v, const uint8_t *code, size_t n)
{
	v->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	NEED(v->kvm >= 0);
	v->vm = ioctl(v->kvm, KVM_CREATE_VM, 0);
	NEED(v->vm >= 0);
	ioctl(v->vm, KVM_SET_TSS_ADDR, 0xfffbd000ul);
	v->code = mmap(NULL, T_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	NEED(v->code != MAP_FAILED);
	memcpy(v->code, code, n);
	NEED(!t_slot(v, SLOT_CODE, CODE, T_PAGE, v->code));
	t_vcpu(v, 0);
}
#define T_VM(v, code) t_vm(v, code, sizeof(code))

static inline void t_free(struct vm *v)
{
	munmap(v->run, v->run_size);
	CHECK(!close(v->vcpu));
	CHECK(!close(v->vm));
	CHECK(!close(v->kvm));
	munmap(v->code, T_PAGE);
}

static inline int t_run(struct vm *v)
{
	return ioctl(v->vcpu, KVM_RUN, 0);
}

/* The byte that the guest wrote to a port, or -1. */
static inline int t_out(struct vm *v)
{
	if (t_run(v) || v->run->exit_reason != KVM_EXIT_IO)
		return -1;
	return ((uint8_t *)v->run)[v->run->io.data_offset];
}

static inline void t_expect(struct vm *v, int value)
{
	int got = t_out(v);

	if (!CHECK(got == value))
		fprintf(stderr, "  guest read %d, expected %d\n", got, value);
}

/* The memory that the guest reads is not there; it is about to read it again. */
static inline void t_gone(struct vm *v)
{
	int r = t_run(v);

	/* A KVM that emulates real mode sees no memory, hence a device: complete its read. */
	if (!r && !t_preloaded()) {
		CHECK(v->run->exit_reason == KVM_EXIT_MMIO);
		v->run->immediate_exit = 1;
		t_run(v);
		v->run->immediate_exit = 0;
	} else {
		CHECK(r == -1 && errno == EFAULT);
	}
	t_rewind(v);
}
