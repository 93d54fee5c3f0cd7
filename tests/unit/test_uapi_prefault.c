/* SPDX-License-Identifier: MIT */
/*
 * KVM_PRE_FAULT_MEMORY (M8). With KVMLET_TEST_REAL=1 on the real /dev/kvm, where it has it.
 */
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>

#include "uapi_guest.h"

#define PAGES 16
#define SLOT  MMIO /* where the slot under test lies */

static struct guest g;
static char *mem;

static int setup(void **state)
{
	(void)state;
	guest_make(&g, false);
	mem = mmap(NULL, PAGES * KL_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
		   -1, 0);
	assert_true(mem != MAP_FAILED);
	assert_int_equal(set_slot(&g, 1, 0, SLOT, PAGES * KL_PAGE_SIZE, mem), 0);
	return 0;
}

static int teardown(void **state)
{
	(void)state;
	guest_free(&g);
	munmap(mem, PAGES * KL_PAGE_SIZE);
	return 0;
}

static long pre_fault(struct kvm_pre_fault_memory *r)
{
	return dev_ioctl_p(&g.vcpu, KVM_PRE_FAULT_MEMORY, r);
}

/* The call's value; @left is what remains of @size. */
static long fault_range(uint64_t gpa, uint64_t size, uint64_t *left)
{
	struct kvm_pre_fault_memory r = {.gpa = gpa, .size = size, .padding = {1, 2, 3, 4, 5}};
	long ret = pre_fault(&r);

	assert_int_equal(r.gpa - gpa, size - r.size);
	assert_int_equal(r.padding[4], 5);
	*left = r.size;
	return ret;
}

static bool resident(unsigned page)
{
	unsigned char v[PAGES];

	assert_int_equal(mincore(mem, PAGES * KL_PAGE_SIZE, v), 0);
	return v[page] & 1;
}

/* M8, U1: refused before anything is mapped, and the range stays as it was. */
static void bad_arguments(void **state)
{
	static const struct kvm_pre_fault_memory bad[] = {
		{.gpa = SLOT + 1, .size = KL_PAGE_SIZE},
		{.gpa = SLOT, .size = KL_PAGE_SIZE + 1},
		{.gpa = SLOT, .size = 0},
		{.gpa = ~0xfffull, .size = 0x1000},
		{.gpa = SLOT, .size = ~0xfffull},
		{.gpa = SLOT, .size = KL_PAGE_SIZE, .flags = 1},
		{.gpa = SLOT, .size = KL_PAGE_SIZE, .flags = 1ull << 63},
	};
	char *half = half_mapped();

	(void)state;
	assert_int_equal(dev_ioctl(&g.vm, KVM_CHECK_EXTENSION, KVM_CAP_PRE_FAULT_MEMORY), 1);
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		struct kvm_pre_fault_memory r = bad[i];

		assert_int_equal(pre_fault(&r), -EINVAL);
		assert_memory_equal(&r, &bad[i], sizeof(r));
	}
	assert_false(resident(0));
	assert_int_equal(pre_fault(NULL), -EFAULT);
	assert_int_equal(pre_fault((void *)(half + KL_PAGE_SIZE - sizeof(bad[0]) + 1)), -EFAULT);
	munmap(half, 2 * KL_PAGE_SIZE);
}

/* M8: an answer that can't be written is EFAULT, when the pages are there. */
static void unwritable_answer(void **state)
{
	struct kvm_pre_fault_memory *r = mmap(NULL, KL_PAGE_SIZE, PROT_READ | PROT_WRITE,
					      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	(void)state;
	assert_true(r != MAP_FAILED);
	*r = (struct kvm_pre_fault_memory){.gpa = SLOT, .size = KL_PAGE_SIZE};
	assert_int_equal(mprotect(r, KL_PAGE_SIZE, PROT_READ), 0);
	assert_int_equal(pre_fault(r), -EFAULT);
	assert_true(resident(0));
	munmap(r, KL_PAGE_SIZE);
}

/* M8: progress up to the end of the slots is success; no progress is the error. */
static void progress(void **state)
{
	uint64_t left;

	(void)state;
	assert_int_equal(fault_range(SLOT + KL_PAGE_SIZE, 3 * KL_PAGE_SIZE, &left), 0);
	assert_int_equal(left, 0);
	for (unsigned i = 0; i < PAGES; i++)
		assert_int_equal(resident(i), i >= 1 && i < 4);
	/* Again: nothing to do is no error. */
	assert_int_equal(fault_range(SLOT, 4 * KL_PAGE_SIZE, &left), 0);
	assert_int_equal(left, 0);
	assert_int_equal(fault_range(SLOT, (PAGES + 5) * KL_PAGE_SIZE, &left), 0);
	assert_int_equal(left, 5 * KL_PAGE_SIZE);
	assert_int_equal(fault_range(SLOT + PAGES * KL_PAGE_SIZE, KL_PAGE_SIZE, &left), -ENOENT);
	assert_int_equal(left, KL_PAGE_SIZE);
	/* Beyond what a guest can address. */
	assert_int_equal(fault_range(1ull << 52, KL_PAGE_SIZE, &left), -ENOENT);
	assert_int_equal(fault_range(1ull << 62, KL_PAGE_SIZE, &left), -ENOENT);
}

/* M8, N7: host memory that is not there. */
static void vanished_memory(void **state)
{
	uint64_t left;

	(void)state;
	assert_int_equal(mprotect(mem + 2 * KL_PAGE_SIZE, KL_PAGE_SIZE, PROT_NONE), 0);
	assert_int_equal(fault_range(SLOT, PAGES * KL_PAGE_SIZE, &left), 0);
	assert_int_equal(left, (PAGES - 2) * KL_PAGE_SIZE);
	assert_int_equal(fault_range(SLOT + 2 * KL_PAGE_SIZE, KL_PAGE_SIZE, &left), -EFAULT);
	assert_int_equal(left, KL_PAGE_SIZE);
}

/* M8, M3: it is a read: read-only slots and host mappings are as good as others. */
static void reads(void **state)
{
	uint64_t left;

	(void)state;
	assert_int_equal(mprotect(mem, KL_PAGE_SIZE, PROT_READ), 0);
	assert_int_equal(fault_range(SLOT, KL_PAGE_SIZE, &left), 0);
	assert_int_equal(set_slot(&g, 1, 0, SLOT, 0, mem), 0);
	assert_int_equal(set_slot(&g, 1, KVM_MEM_READONLY, SLOT, PAGES * KL_PAGE_SIZE, mem), 0);
	assert_int_equal(fault_range(SLOT, PAGES * KL_PAGE_SIZE, &left), 0);
	assert_int_equal(left, 0);
}

/* M8: what was pre-faulted is mapped: the guest reads it without a fault. */
static void guest_does_not_fault(void **state)
{
	uint64_t before, left;

	(void)state;
	if (on_real_kvm())
		skip();
	mem[0] = 0x42;
	guest_code(&g, 0xa0, 0x00, 0x00, 0xf4); /* mov al,[0]; hlt */
	assert_int_equal(fault_range(CODE, KL_PAGE_SIZE, &left), 0);
	assert_int_equal(fault_range(SLOT, KL_PAGE_SIZE, &left), 0);
	before = read_stat(&g.vcpu, "pf_taken");
	assert_true(before > 0);
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(guest_get(&g).rax & 0xff, 0x42);
	assert_int_equal(read_stat(&g.vcpu, "pf_taken"), before);
	/* A slot that comes later is not hidden by what was mapped before. */
	assert_int_equal(set_slot(&g, 1, 0, SLOT, 0, mem), 0);
	assert_int_equal(fault_range(SLOT, KL_PAGE_SIZE, &left), -ENOENT);
	assert_int_equal(set_slot(&g, 1, 0, SLOT, KL_PAGE_SIZE, mem + KL_PAGE_SIZE), 0);
	assert_int_equal(fault_range(SLOT, KL_PAGE_SIZE, &left), 0);
	guest_regs(&g);
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(guest_get(&g).rax & 0xff, 0);
}

/* ---- waiting pages ---- */

struct waiter {
	int uffd;
	pthread_t thread, caller;
};

static void on_signal(int sig, siginfo_t *info, void *uc)
{
	(void)info;
	if (kl_engine_active())
		kl_thread_defer_signal(sig, info, uc);
}

/* When the caller waits for the page, a signal comes instead of it. */
static void *interrupt(void *arg)
{
	struct waiter *w = arg;
	struct uffd_msg msg;

	if (read(w->uffd, &msg, sizeof(msg)) == sizeof(msg))
		pthread_kill(w->caller, SIGUSR1);
	return NULL;
}

static int register_missing(char *from, size_t len)
{
	struct uffdio_api api = {.api = UFFD_API};
	struct uffdio_register r = {
		.range = {(uint64_t)from, len},
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);

	if (fd < 0)
		return fd;
	assert_int_equal(ioctl(fd, UFFDIO_API, &api), 0);
	assert_int_equal(ioctl(fd, UFFDIO_REGISTER, &r), 0);
	return fd;
}

/* M8, M2, U3: a signal ends the wait for a page: EINTR, or what was done so far. */
static void signal_while_populating(void **state)
{
	struct sigaction sa = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO}, old;
	struct waiter w = {.caller = pthread_self()};
	uint64_t left;

	(void)state;
	if (KL_TSAN) /* its runtime holds signals back */
		return;
	w.uffd = register_missing(mem + 2 * KL_PAGE_SIZE, KL_PAGE_SIZE);
	if (w.uffd < 0) {
		print_message("# no userfaultfd here\n");
		return;
	}
	assert_int_equal(sigaction(SIGUSR1, &sa, &old), 0);

	assert_int_equal(pthread_create(&w.thread, NULL, interrupt, &w), 0);
	assert_int_equal(fault_range(SLOT, 4 * KL_PAGE_SIZE, &left), 0);
	assert_int_equal(left, 2 * KL_PAGE_SIZE);
	pthread_join(w.thread, NULL);

	assert_int_equal(pthread_create(&w.thread, NULL, interrupt, &w), 0);
	assert_int_equal(fault_range(SLOT + 2 * KL_PAGE_SIZE, KL_PAGE_SIZE, &left), -EINTR);
	assert_int_equal(left, KL_PAGE_SIZE);
	pthread_join(w.thread, NULL);

	/* Nothing of it is left for KVM_RUN. */
	close(w.uffd);
	assert_int_equal(fault_range(SLOT + 2 * KL_PAGE_SIZE, KL_PAGE_SIZE, &left), 0);
	guest_code(&g, 0xf4);
	assert_exit(&g, KVM_EXIT_HLT);
	sigaction(SIGUSR1, &old, NULL);
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(bad_arguments),
		T(unwritable_answer),
		T(progress),
		T(vanished_memory),
		T(reads),
		T(guest_does_not_fault),
		T(signal_while_populating),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
