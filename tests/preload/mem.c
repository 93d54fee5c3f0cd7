/* SPDX-License-Identifier: MIT */
/*
 * Every call that changes the program's memory, against a vCPU that has just used it: what
 * the guest reads next is what the memory now is, or KVM_RUN fails as KVM's does (N1, N2).
 */
#include <linux/falloc.h>
#include <malloc.h>
#include <pthread.h>
#include <sys/ipc.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "t.h"

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif

static struct vm v;

/* A page at a fixed place that holds @value, as slot DATA; the guest has read it. */
static uint8_t *place;

static void use(uint8_t *p, uint8_t value)
{
	NEED(!t_slot(&v, SLOT_DATA, DATA, 0, NULL) || errno == EINVAL);
	*p = value;
	NEED(!t_slot(&v, SLOT_DATA, DATA, T_PAGE, p));
	t_rewind(&v);
	t_expect(&v, value);
}

static void *anon_at(void *at, int flags)
{
	void *p = mmap(at, T_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1,
		       0);

	NEED(p != MAP_FAILED);
	return p;
}

static void fresh(uint8_t value)
{
	anon_at(place, MAP_FIXED);
	use(place, value);
}

static void unmaps(void)
{
	void *p;

	fresh(1);
	CHECK(!munmap(place, T_PAGE));
	t_gone(&v);
	/* Something else appears there. */
	p = mmap(place, T_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(p == place);
	place[0] = 9;
	t_expect(&v, 9);
	CHECK(!syscall(SYS_munmap, place, T_PAGE));
	t_gone(&v);
	CHECK(mmap(place, T_PAGE, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == place);
	t_expect(&v, 0);
	/* Refused calls change nothing. */
	FAILS(munmap(place + 1, T_PAGE), EINVAL);
	FAILS(munmap(place, ~0ul), EINVAL);
	FAILS(munmap(place, 0), EINVAL);
	FAILS((long)mmap(place, T_PAGE, PROT_READ,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0),
	      EEXIST);
	t_expect(&v, 0);
}

static void replaces(void)
{
	int fd = memfd_create("x", 0);
	long p;

	NEED(!ftruncate(fd, T_PAGE) && pwrite(fd, "\x21", 1, 0) == 1);
	fresh(1);
	CHECK(mmap(place, T_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == place);
	t_expect(&v, 0x21);
	anon_at(place, MAP_FIXED);
	t_expect(&v, 0);
	CHECK(mmap64(place, T_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) ==
	      place);
	t_expect(&v, 0x21);
	p = syscall(SYS_mmap, place, T_PAGE, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	CHECK(p == (long)place);
	t_expect(&v, 0);
	close(fd);
}

static void remaps(void)
{
	uint8_t *q, *r;

	/* Away. */
	fresh(3);
	q = mremap(place, T_PAGE, T_PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, anon_at(NULL, 0));
	CHECK(q != MAP_FAILED && q[0] == 3);
	t_gone(&v);
	/* And back, over what is there. */
	fresh(4);
	CHECK(mremap(q, T_PAGE, T_PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place) == place);
	t_expect(&v, 3);
	/* Grown where it cannot grow. */
	fresh(5);
	r = mmap(place + T_PAGE, T_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	NEED(r != MAP_FAILED);
	q = mremap(place, T_PAGE, 2 * T_PAGE, MREMAP_MAYMOVE);
	CHECK(q != MAP_FAILED && q != place);
	t_gone(&v);
	munmap(q, 2 * T_PAGE);
	/* Shrunk, and by number. */
	fresh(6);
	q = anon_at(NULL, 0);
	use(q, 7);
	CHECK(syscall(SYS_mremap, q, T_PAGE, T_PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place) ==
	      (long)place);
	t_gone(&v);
	use(place, 8);
	/* Refused: all is as it was. */
	FAILS((long)mremap(place, T_PAGE, 3 * T_PAGE, 0), ENOMEM);
	t_expect(&v, 8);
	FAILS((long)mremap(place + 1, T_PAGE, T_PAGE, 0), EINVAL);
	t_expect(&v, 8);
	munmap(r, T_PAGE);
}

static void discards(void)
{
	struct iovec iov = {place, T_PAGE};
	int fd = memfd_create("x", 0), pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0);

	fresh(11);
	CHECK(!madvise(place, T_PAGE, MADV_DONTNEED));
	t_expect(&v, 0);
	use(place, 12);
	CHECK(!syscall(SYS_madvise, place, T_PAGE, MADV_DONTNEED));
	t_expect(&v, 0);
	use(place, 13);
	if (!madvise(place, T_PAGE, MADV_DONTNEED_LOCKED))
		t_expect(&v, 0);
	use(place, 14);
	CHECK(!madvise(place, T_PAGE, MADV_FREE));
	CHECK(t_out(&v) == 14 || place[0] == 0);
	NEED(!ftruncate(fd, T_PAGE));
	NEED(mmap(place, T_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == place);
	use(place, 15);
	CHECK(!madvise(place, T_PAGE, MADV_REMOVE));
	t_expect(&v, 0);
	FAILS(madvise(place + 1, T_PAGE, MADV_DONTNEED), EINVAL);
	FAILS(madvise(place, T_PAGE, 9999), EINVAL);
	fresh(16);
	/* Not allowed on every kernel; where it is, the guest must see it. */
	if (process_madvise(pidfd, &iov, 1, MADV_DONTNEED, 0) == T_PAGE)
		t_expect(&v, 0);
	else
		t_expect(&v, 16);
	CHECK(process_madvise(pidfd, &iov, 1, MADV_PAGEOUT, 0) == T_PAGE || errno == EINVAL);
	FAILS(process_madvise(pidfd, (struct iovec *)8, 1, MADV_PAGEOUT, 0), EFAULT);
	close(fd);
	close(pidfd);
}

static void protections(void)
{
	fresh(20);
	CHECK(!mprotect(place, T_PAGE, PROT_NONE));
	t_gone(&v);
	CHECK(!mprotect(place, T_PAGE, PROT_READ));
	t_expect(&v, 20);
	CHECK(!syscall(SYS_mprotect, place, T_PAGE, PROT_NONE));
	t_gone(&v);
	CHECK(!mprotect(place, T_PAGE, PROT_READ | PROT_WRITE));
	t_expect(&v, 20);
	CHECK(!pkey_mprotect(place, T_PAGE, PROT_NONE, -1));
	t_gone(&v);
	CHECK(!pkey_mprotect(place, T_PAGE, PROT_READ | PROT_WRITE, -1));
	t_expect(&v, 20);
	FAILS(mprotect(place + 1, T_PAGE, PROT_READ), EINVAL);
	t_expect(&v, 20);
}

static void files(void)
{
	char path[] = "/tmp/kvm-mem-XXXXXX";
	int fd = memfd_create("x", 0), tmp;

	NEED(!ftruncate(fd, 2 * T_PAGE));
	NEED(mmap(place, T_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, T_PAGE) ==
	     place);
	use(place, 30);
	CHECK(!fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, T_PAGE, T_PAGE));
	t_expect(&v, 0);
	use(place, 31);
	CHECK(!fallocate64(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, T_PAGE));
	t_expect(&v, 31);
	CHECK(!syscall(SYS_fallocate, fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, T_PAGE,
		       T_PAGE));
	t_expect(&v, 0);
	use(place, 32);
	CHECK(!ftruncate(fd, T_PAGE));
	t_gone(&v);
	CHECK(!ftruncate64(fd, 2 * T_PAGE));
	t_expect(&v, 0);
	use(place, 33);
	CHECK(!syscall(SYS_ftruncate, fd, T_PAGE));
	t_gone(&v);
	close(fd);
	/* By name, and with the descriptor closed. */
	tmp = mkstemp(path);
	NEED(tmp >= 0 && !ftruncate(tmp, T_PAGE));
	NEED(mmap(place, T_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, tmp, 0) == place);
	close(tmp);
	use(place, 34);
	CHECK(!truncate(path, 0));
	t_gone(&v);
	CHECK(!truncate64(path, T_PAGE));
	t_expect(&v, 0);
	FAILS(truncate("/nonexistent/x", 0), ENOENT);
	FAILS(ftruncate(-1, 0), EBADF);
	FAILS(fallocate(-1, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 1), EBADF);
	unlink(path);
}

static void system_v(void)
{
	int id = shmget(IPC_PRIVATE, T_PAGE, IPC_CREAT | 0600);
	uint8_t *p;

	if (!CHECK(id >= 0))
		return;
	p = shmat(id, NULL, 0);
	NEED(p != (void *)-1);
	use(p, 40);
	CHECK(!shmdt(p));
	t_gone(&v);
	fresh(41);
	CHECK(shmat(id, place, SHM_REMAP) == place);
	t_expect(&v, 40);
	CHECK(!shmdt(place));
	t_gone(&v);
	CHECK(shmat(id, place, 0) == place);
	t_expect(&v, 40);
	FAILS(shmdt(place + 1), EINVAL);
	CHECK(syscall(SYS_shmdt, place) == 0);
	t_gone(&v);
	shmctl(id, IPC_RMID, NULL);
}

/* Blocks that the allocator maps on their own. */
static void heap(void)
{
	size_t big = 1 << 20;
	uint8_t *p, *q;

	mallopt(M_MMAP_THRESHOLD, 128 << 10);
	NEED(!posix_memalign((void **)&p, T_PAGE, big));
	use(p, 50);
	free(p);
	t_gone(&v);
	p = aligned_alloc(T_PAGE, big);
	use(p + 8 * T_PAGE, 51);
	/* Blocks change places. */
	q = realloc(p, 64 * big);
	NEED(q);
	CHECK(q[8 * T_PAGE] == 51);
	if (q != p)
		t_gone(&v);
	use((uint8_t *)(((uintptr_t)q + T_PAGE) & ~(uintptr_t)(T_PAGE - 1)), 52);
	p = reallocarray(q, 128, big);
	NEED(p);
	if (p != q)
		t_gone(&v);
	free(p);
	t_gone(&v);
	free(NULL);
	p = realloc(NULL, 10);
	free(p);
}

static void breaks(void)
{
	uint8_t *p = sbrk(0), *page;
	size_t room = 4 * T_PAGE;

	if (!CHECK(sbrk((intptr_t)room) == p))
		return;
	page = (uint8_t *)(((uintptr_t)p + T_PAGE - 1) & ~(uintptr_t)(T_PAGE - 1));
	use(page, 60);
	CHECK(sbrk(-(intptr_t)room) == p + room);
	t_gone(&v);
	CHECK(!brk(p + room));
	use(page, 61);
	CHECK(!brk(p));
	t_gone(&v);
}

/* A vCPU that never leaves the guest, and memory that comes and goes under it. */
static _Atomic bool stop;

static void *runner(void *arg)
{
	while (!stop) {
		int r = t_run(&v);

		if (r && errno == EFAULT)
			t_rewind(&v);
		else
			CHECK(!r && (v.run->exit_reason == KVM_EXIT_IO || !t_preloaded()));
	}
	return NULL;
}

static void churn(void)
{
	pthread_t t;

	fresh(1);
	NEED(!pthread_create(&t, NULL, runner, NULL));
	for (int i = 0; i < 300; i++) {
		switch (i % 4) {
		case 0:
			CHECK(!munmap(place, T_PAGE));
			anon_at(place, MAP_FIXED);
			break;
		case 1:
			CHECK(!madvise(place, T_PAGE, MADV_DONTNEED));
			break;
		case 2:
			CHECK(!mprotect(place, T_PAGE, PROT_NONE));
			CHECK(!mprotect(place, T_PAGE, PROT_READ | PROT_WRITE));
			break;
		case 3:
			CHECK(mremap(place, T_PAGE, T_PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
				     place + 4 * T_PAGE) != MAP_FAILED);
			CHECK(mremap(place + 4 * T_PAGE, T_PAGE, T_PAGE,
				     MREMAP_MAYMOVE | MREMAP_FIXED, place) == place);
			break;
		}
	}
	stop = true;
	pthread_join(t, NULL);
	use(place, 70);
}

int main(void)
{
	place = mmap(NULL, 16 * T_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	NEED(place != MAP_FAILED);
	/* What lies around it stays reserved, so that nothing else moves in there. */
	place += 8 * T_PAGE;
	anon_at(place, MAP_FIXED);
	T_VM(&v, code_read);
	unmaps();
	replaces();
	remaps();
	discards();
	protections();
	files();
	system_v();
	if (!t_sanitized())
		heap();
	breaks();
	churn();
	t_free(&v);
	return t_done();
}
