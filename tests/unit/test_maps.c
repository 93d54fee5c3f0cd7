/* SPDX-License-Identifier: MIT */
/*
 * The reader of /proc/self/maps: it keeps out of the program's descriptors, and what it shows is
 * this process's memory as it is (N1: which memory a change of a file touches, U4, U5).
 */
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

#include "base/hidden_fd.h"
#include "host/maps.h"
#include "mem/vm.h"

#define PG KL_PAGE_SIZE

static void *map(int prot)
{
	void *p = mmap(NULL, PG, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	assert_ptr_not_equal(p, MAP_FAILED);
	return p;
}

/* Its protection, or -1: nothing is mapped there; -2: maps cannot be read; -3: nonsense. */
static int prot_of(const void *p)
{
	uint64_t addr = (uint64_t)(uintptr_t)p;
	struct kl_maps_entry e;
	struct kl_maps m;
	int prot = -1;

	if (!kl_maps_open(&m))
		return -2;
	while (kl_maps_next(&m, &e)) {
		/* (One that was joined to its neighbour between two reads is shown again, whole.)
		 */
		if (e.end <= e.start)
			prot = -3;
		if (e.start <= addr && addr < e.end && prot == -1)
			prot = (int)e.prot;
	}
	kl_maps_close(&m);
	return prot;
}

static int lowest_free(void)
{
	int fd = dup(0);

	close(fd);
	return fd;
}

/* U4: from the second time on, no descriptor below comes or goes. */
static void out_of_the_way(void **state)
{
	int low = lowest_free();
	struct kl_maps_entry e;
	struct kl_maps m;

	assert_true(kl_maps_open(&m));
	kl_maps_close(&m);
	for (int i = 0; i < 3; i++) {
		assert_true(kl_maps_open(&m));
		assert_int_equal(lowest_free(), low);
		assert_true(m.fd > low);
		assert_true(kl_fd_hidden(m.fd));
		/* The program's dup2 onto what was free, and its close, do us no harm, nor we it.
		 */
		assert_int_equal(dup2(0, low), low);
		assert_true(kl_maps_next(&m, &e));
		kl_maps_close(&m);
		assert_int_equal(fcntl(low, F_GETFD), 0);
		close(low);
	}
}

/* N1: what is mapped and unmapped is seen at once, also by two readers one inside the other. */
static void up_to_date(void **state)
{
	struct kl_maps_entry e;
	struct kl_maps m;
	bool found = false;
	void *p[64];

	for (int i = 0; i < 64; i++) { /* each another mapping than its neighbour */
		p[i] = map(i & 1 ? PROT_READ : PROT_READ | PROT_WRITE);
		assert_int_equal(prot_of(p[i]), i & 1 ? PROT_READ : PROT_READ | PROT_WRITE);
	}
	assert_true(kl_maps_open(&m));
	assert_true(kl_maps_next(&m, &e));
	for (int i = 0; i < 64; i++) {
		munmap(p[i], PG);
		assert_int_equal(prot_of(p[i]), -1);
	}
	for (uint64_t last = e.end; kl_maps_next(&m, &e); last = e.end) {
		assert_true(last <= e.start && e.start < e.end);
		found |= e.start <= (uint64_t)(uintptr_t)&m && (uint64_t)(uintptr_t)&m < e.end;
	}
	assert_true(found); /* the stack, near the end */
	kl_maps_close(&m);
}

static _Atomic bool stop;

static void *keep_changing(void *arg)
{
	while (!atomic_load(&stop)) {
		void *p = map(PROT_NONE);

		mprotect(p, PG, PROT_READ | PROT_EXEC);
		munmap(p, PG);
	}
	return NULL;
}

static void *keep_reading(void *arg)
{
	for (int i = 0; i < 200; i++)
		assert_int_equal(prot_of(arg), PROT_WRITE);
	return NULL;
}

/* N1: more readers than descriptors are kept, while mappings come and go: no line is torn. */
static void many_readers(void **state)
{
	void *p = map(PROT_WRITE);
	pthread_t t[12], other;

	atomic_store(&stop, false);
	assert_int_equal(pthread_create(&other, NULL, keep_changing, NULL), 0);
	for (int i = 0; i < 12; i++)
		assert_int_equal(pthread_create(&t[i], NULL, keep_reading, p), 0);
	for (int i = 0; i < 12; i++)
		pthread_join(t[i], NULL);
	atomic_store(&stop, true);
	pthread_join(other, NULL);
	munmap(p, PG);
}

/* 0, or the number of what is wrong. */
static int look_in_child(void *parents, void *common)
{
	void *own;

	if (munmap(parents, PG))
		return 1;
	if (prot_of(parents) != -1)
		return 2; /* the parent's */
	own = mmap(NULL, PG, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (prot_of(own) != PROT_READ || prot_of(common) != PROT_WRITE)
		return 3;
	return 0;
}

static int status_of(pid_t pid)
{
	int status;

	assert_true(pid > 0);
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_true(WIFEXITED(status));
	return WEXITSTATUS(status);
}

/* U5: a child sees its own memory: of fork(), and of a clone() that nobody tells us of. */
static void children(void **state)
{
	void *p = map(PROT_READ), *q = map(PROT_WRITE);
	int before = lowest_free(), wrong;
	struct kl_maps m;
	pid_t pid;

	assert_int_equal(prot_of(p), PROT_READ);
	pid = fork();
	if (!pid) {
		kl_vms_after_fork();
		if (lowest_free() != before)
			_exit(9);
		wrong = look_in_child(p, q);
		_exit(wrong ? wrong : !kl_maps_open(&m) || !kl_fd_hidden(m.fd));
	}
	assert_int_equal(status_of(pid), 0);
	pid = (pid_t)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, NULL);
	if (!pid)
		_exit(look_in_child(p, q));
	assert_int_equal(status_of(pid), 0);
	/* A child of vfork() has the same memory, and leaves no trace in it. */
	pid = vfork();
	if (!pid)
		_exit(prot_of(p) != PROT_READ);
	assert_int_equal(status_of(pid), 0);
	assert_int_equal(lowest_free(), before);
	assert_int_equal(prot_of(p), PROT_READ);
	out_of_the_way(state);
	munmap(p, PG);
	munmap(q, PG);
}

/* U4: without the preload library a program may close it, and get the number for a file. */
static void closed_by_program(void **state)
{
	void *p = map(PROT_READ);
	struct kl_maps m;
	int fd;

	assert_true(kl_maps_open(&m));
	fd = m.fd;
	kl_maps_close(&m);
	close(fd);
	assert_int_equal(prot_of(p), PROT_READ);
	assert_true(kl_maps_open(&m));
	fd = m.fd;
	kl_maps_close(&m);
	assert_int_equal(dup2(0, fd), fd);
	assert_int_equal(prot_of(p), PROT_READ);
	assert_int_equal(fcntl(fd, F_GETFD), 0);
	close(fd);
	munmap(p, PG);
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(out_of_the_way),    cmocka_unit_test(up_to_date),
		cmocka_unit_test(many_readers),      cmocka_unit_test(children),
		cmocka_unit_test(closed_by_program),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
