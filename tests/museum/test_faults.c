/* SPDX-License-Identifier: MIT */
/*
 * Exhibits B31 and B27 (the half of vCPUs): what may happen between a fault's lookup and its SPTE,
 * while it sleeps and nothing is held (M2, S4).
 */
#include <linux/userfaultfd.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

#include "unit/mmu_env.h"

static void start_parked_fault(struct faulter *t, pthread_t *thread)
{
	kl_racepoint_arm("fault-populated", 1);
	pthread_create(thread, NULL, fault_thread, t);
	assert_true(kl_racepoint_wait("fault-populated", TIMEOUT));
}

static void finish_parked_fault(struct faulter *t, pthread_t thread)
{
	kl_racepoint_release("fault-populated");
	pthread_join(thread, NULL);
	assert_int_equal(t->r, KL_FAULT_MAPPED); /* "look again" */
}

/* B31: the slot is deleted while the fault is between populate and install. */
static void delete_during_populate(void **state)
{
	struct fixture *f = *state;
	struct faulter t = {f, PG, KL_ACC_WRITE, -1};
	pthread_t thread;

	NEED_RACEPOINTS;
	start_parked_fault(&t, &thread);
	assert_int_equal(set(&f->vm, 0, 0, 0, 0, NULL), 0);
	finish_parked_fault(&t, thread);
	assert_false(mapped(f, PG, KL_ACC_READ));
	assert_int_equal(kl_mmu_fault(&f->vcpu, PG, KL_ACC_READ), KL_FAULT_MMIO);
}

/* B31: it is deleted, and another is made at the same place. */
static void replace_during_populate(void **state)
{
	struct fixture *f = *state;
	struct faulter t = {f, PG, KL_ACC_WRITE, -1};
	pthread_t thread;
	bool writable, mmio;

	NEED_RACEPOINTS;
	start_parked_fault(&t, &thread);
	assert_int_equal(set(&f->vm, 0, 0, 0, 0, NULL), 0);
	assert_int_equal(set(&f->vm, 0, 0, 0, PG * 2, f->ram + 4 * PG), 0);
	finish_parked_fault(&t, thread);
	assert_false(mapped(f, PG, KL_ACC_READ));
	assert_int_equal(kl_mmu_fault(&f->vcpu, PG, KL_ACC_READ), KL_FAULT_MAPPED);
	kl_vcpu_enter_guest(&f->vcpu);
	assert_ptr_equal(kl_mmu_lookup(&f->vcpu, PG, KL_ACC_READ, &writable, &mmio),
			 f->ram + 5 * PG);
	kl_vcpu_leave_guest(&f->vcpu);
}

static void *move_slot_0(void *arg)
{
	struct slot_change *c = arg;

	c->r = set(&c->f->vm, 0, 0, c->gpa, NPAGES * PG, c->f->ram);
	return NULL;
}

/* B31, S4: it is marked invalid, and not yet zapped: what would be installed now is not seen again.
 */
static void invalid_during_populate(void **state)
{
	struct fixture *f = *state;
	struct faulter t = {f, PG, KL_ACC_WRITE, -1};
	struct slot_change c = {f, 0x1000000, 0, -1};
	pthread_t vcpu, updater;

	NEED_RACEPOINTS;
	start_parked_fault(&t, &vcpu);
	kl_racepoint_arm("memslot-invalid", 1);
	pthread_create(&updater, NULL, move_slot_0, &c);
	assert_true(kl_racepoint_wait("memslot-invalid", TIMEOUT));
	finish_parked_fault(&t, vcpu);
	assert_false(mapped(f, PG, KL_ACC_READ));
	/* Nor does a new fault map through it. */
	assert_int_equal(kl_mmu_fault(&f->vcpu, PG, KL_ACC_READ), KL_FAULT_MAPPED);
	assert_false(mapped(f, PG, KL_ACC_READ));
	kl_racepoint_release("memslot-invalid");
	pthread_join(updater, NULL);
	assert_int_equal(c.r, 0);
	assert_int_equal(kl_mmu_fault(&f->vcpu, PG, KL_ACC_READ), KL_FAULT_MMIO);
	assert_int_equal(kl_mmu_fault(&f->vcpu, 0x1000000 + PG, KL_ACC_READ), KL_FAULT_MAPPED);
	assert_true(mapped(f, 0x1000000 + PG, KL_ACC_READ));
}

/* ---- a populate that blocks (B27, U3) ------------------------------------------------ */

static void defer(int sig, siginfo_t *info, void *uc)
{
	if (kl_engine_active())
		kl_thread_defer_signal(sig, info, uc);
}

static void *interruptible_fault(void *arg)
{
	struct faulter *t = arg;

	kl_engine_enter();
	kl_self.running = &t->f->vcpu;
	t->r = kl_mmu_fault(&t->f->vcpu, t->gpa, t->access);
	kl_self.running = NULL;
	kl_engine_leave();
	return NULL;
}

/*
 * B27, M2: a signal interrupts a fault that userfaultfd holds, also if it came after the vCPU's
 * last look for signals and before the touch.
 */
static void signal_interrupts_populate(void **state)
{
	struct sigaction sa = {.sa_sigaction = defer, .sa_flags = SA_SIGINFO | SA_RESTART};
	struct uffdio_api api = {.api = UFFD_API};
	struct fixture *f = *state;
	struct uffdio_register reg = {.range = {(uint64_t)f->ram, NPAGES * PG},
				      .mode = UFFDIO_REGISTER_MODE_MISSING};
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	NEED_RACEPOINTS;
	if (KL_TSAN) /* its runtime holds signals back */
		skip();
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &reg))
		skip();
	sigaction(SIGUSR1, &sa, NULL);
	for (int before = 0; before < 2; before++) {
		struct faulter t = {f, 0, KL_ACC_WRITE, 1};
		struct pollfd p = {.fd = uffd, .events = POLLIN};
		struct uffd_msg msg;
		pthread_t thread;

		if (before)
			kl_racepoint_arm("fault-populate", 1);
		pthread_create(&thread, NULL, interruptible_fault, &t);
		if (before)
			assert_true(kl_racepoint_wait("fault-populate", TIMEOUT));
		else
			assert_int_equal(poll(&p, 1, TIMEOUT), 1);
		pthread_kill(thread, SIGUSR1);
		if (before) {
			while (!(kl_vcpu_requests(&f->vcpu) & KL_REQ_SIGNAL))
				sched_yield();
			kl_racepoint_release("fault-populate");
		}
		pthread_join(thread, NULL);
		assert_int_equal(t.r, -EINTR);
		kl_vcpu_take_requests(&f->vcpu, KL_REQ_SIGNAL);
		while (poll(&p, 1, 0) == 1)
			assert_int_equal(read(uffd, &msg, sizeof(msg)), sizeof(msg));
	}
	close(uffd);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
		T(delete_during_populate),
		T(replace_during_populate),
		T(invalid_during_populate),
		T(signal_interrupts_populate),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
