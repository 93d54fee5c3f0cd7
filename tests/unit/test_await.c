/* SPDX-License-Identifier: MIT */
/*
 * Waiting for pages in somebody's place (host/await.h): each guarantee, with a userfaultfd whose
 * owner brings pages, or does not (X3, M2).
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

#include "base/failpoint.h"
#include "base/racepoint.h"
#include "host/await.h"
#include "host/guard.h"

#define PG      KL_PAGE_SIZE
#define NPAGES  (KL_MAX_AWAITED + 2)
#define WAIT_MS 20000

static uint8_t *mem;
static int uffd = -1;
static sem_t came;
static struct kl_await page[NPAGES];
static unsigned nr_came;

static void on_done(struct kl_await *a)
{
	(void)a;
	nr_came++;
	sem_post(&came);
}

static int setup(void **state)
{
	struct uffdio_api api = {.api = UFFD_API};
	struct uffdio_register r = {.mode = UFFDIO_REGISTER_MODE_MISSING};

	(void)state;
	assert_int_equal(kl_guard_init(), 0);
	sem_init(&came, 0, 0);
	nr_came = 0;
	for (unsigned i = 0; i < NPAGES; i++)
		page[i] = (struct kl_await){.done = on_done};
	mem = mmap(NULL, NPAGES * PG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	assert_true(mem != MAP_FAILED);
	uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	if (uffd >= 0) {
		r.range.start = (uint64_t)mem;
		r.range.len = NPAGES * PG;
		assert_int_equal(ioctl(uffd, UFFDIO_API, &api), 0);
		assert_int_equal(ioctl(uffd, UFFDIO_REGISTER, &r), 0);
	}
	kl_await_get();
	return 0;
}

static int teardown(void **state)
{
	(void)state;
	kl_await_put();
	close(uffd);
	munmap(mem, NPAGES * PG);
	sem_destroy(&came);
	return 0;
}

static int start(unsigned i)
{
	return kl_await_start(&page[i], kl_hva(mem + i * PG), false);
}

static void wait_came(void)
{
	while (sem_wait(&came))
		;
}

static void wait_asked(void)
{
	struct pollfd p = {.fd = uffd, .events = POLLIN};
	struct uffd_msg msg;

	assert_int_equal(poll(&p, 1, WAIT_MS), 1);
	assert_int_equal(read(uffd, &msg, sizeof(msg)), sizeof(msg));
}

static void bring(unsigned i)
{
	struct uffdio_zeropage z = {.range = {(uint64_t)mem + i * PG, PG}};

	assert_int_equal(ioctl(uffd, UFFDIO_ZEROPAGE, &z), 0);
}

/* (a): a page that never comes holds nobody up; what cannot have a helper is refused. */
static void a_helper_for_each(void **state)
{
	(void)state;
	if (uffd < 0 || KL_TSAN) /* its runtime holds signals back */
		skip();
	for (unsigned i = 0; i < KL_MAX_AWAITED; i++)
		assert_int_equal(start(i), 0);
	assert_int_equal(start(KL_MAX_AWAITED), -EAGAIN);
	bring(KL_MAX_AWAITED - 1);
	wait_came();
	kl_await_cancel(&page[KL_MAX_AWAITED - 1]);
	assert_int_equal(page[KL_MAX_AWAITED - 1].result, 0);
	assert_int_equal(start(KL_MAX_AWAITED), 0);
	for (unsigned i = 0; i <= KL_MAX_AWAITED; i++)
		kl_await_cancel(&page[i]);
	assert_int_equal(nr_came, 1);
}

/* (b): also of a page that is not there. */
static void vanished(void **state)
{
	(void)state;
	assert_int_equal(mprotect(mem, PG, PROT_NONE), 0);
	assert_int_equal(start(0), 0);
	wait_came();
	kl_await_cancel(&page[0]);
	assert_int_equal(page[0].result, -EFAULT);
	assert_int_equal(nr_came, 1);
}

/* (c): a helper that blocks is interrupted, and serves the next. */
static void cancel_blocked(void **state)
{
	(void)state;
	if (uffd < 0 || KL_TSAN) /* its runtime holds signals back */
		skip();
	for (unsigned i = 0; i < 50; i++) {
		assert_int_equal(start(0), 0);
		if (i % 2)
			wait_asked();
		kl_await_cancel(&page[0]);
	}
	assert_int_equal(nr_came, 0);
	kl_await_cancel(&page[0]); /* it is not awaited */
}

static void *cancel(void *arg)
{
	kl_await_cancel(arg);
	return NULL;
}

/* (c): done() is running: its end is waited for. */
static void cancel_late(void **state)
{
	pthread_t t;

	(void)state;
	if (uffd < 0 || !kl_racepoints_enabled())
		skip();
	kl_racepoint_arm("await-touched", 1);
	assert_int_equal(start(0), 0);
	bring(0);
	assert_true(kl_racepoint_wait("await-touched", WAIT_MS));
	kl_racepoint_arm("await-cancel-waits", 1);
	pthread_create(&t, NULL, cancel, &page[0]);
	assert_true(kl_racepoint_wait("await-cancel-waits", WAIT_MS));
	kl_racepoint_release("await-cancel-waits");
	kl_racepoint_release("await-touched");
	pthread_join(t, NULL);
	assert_int_equal(nr_came, 0);
}

/* Threads come and go with references, and not without. */
static void no_thread(void **state)
{
	(void)state;
	if (!kl_failpoints_enabled())
		skip();
	kl_failpoint_arm("await-thread", 1);
	assert_int_equal(start(0), -EAGAIN);
	assert_true(kl_failpoint_disarm("await-thread"));
	assert_int_equal(mprotect(mem, PG, PROT_NONE), 0);
	for (unsigned i = 0; i < 3; i++) {
		assert_int_equal(start(0), 0);
		wait_came();
		kl_await_cancel(&page[0]);
		kl_await_put();
		kl_await_get();
	}
}

/* In a forked child nothing is awaited, and new helpers work. */
static void after_fork(void **state)
{
	pid_t child;
	int status;

	(void)state;
	if (uffd < 0 || KL_TSAN) /* it does not follow threads into a child */
		skip();
	assert_int_equal(start(0), 0);
	wait_asked();
	child = fork();
	if (!child) {
		kl_await_after_fork();
		kl_thread_after_fork();
		kl_await_cancel(&page[0]);
		kl_await_get();
		if (start(1))
			_exit(1);
		wait_came();
		kl_await_cancel(&page[1]);
		kl_await_put();
		_exit(nr_came == 1 ? 0 : 2);
	}
	assert_int_equal(waitpid(child, &status, 0), child);
	assert_int_equal(status, 0);
	kl_await_cancel(&page[0]);
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(a_helper_for_each), T(vanished),  T(cancel_blocked),
		T(cancel_late),       T(no_thread), T(after_fork),
	};

	cmocka_set_test_filter(getenv("KVMLET_TEST"));
	return cmocka_run_group_tests(tests, NULL, NULL);
}
