/* SPDX-License-Identifier: MIT */
/*
 * A program with a userfaultfd of its own, whose monitor changes slots and mappings while somebody
 * sleeps until it has read an event or resolved a fault (N1, S7). SIGALRM ends what hangs.
 */
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "t.h"

#define SLOT_OTHER 2
#define OTHER      0x20000u

/* mov al, 7; mov [DATA], al; out 0x10, al; jmp to the start */
static const uint8_t code_write[] = {0xb0, 7, 0xa2, 0x00, 0x80, 0xe6, 0x10, 0xeb, 0xf7};

static struct vm v;
static uint8_t *place, *other; /* behind SLOT_DATA and SLOT_OTHER */
static int uffd, stop_pipe[2];
static _Atomic int nr_events, nr_faults;
static bool sleeps_for_events;

static bool user_mode_only;

/* The accesses of a KVM in the kernel need one that handles the kernel's faults. */
static int open_uffd(uint64_t features)
{
	struct uffdio_api api = {.api = UFFD_API, .features = features};
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (fd < 0) {
		fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
		user_mode_only = true;
	}
	if (fd >= 0)
		NEED(!ioctl(fd, UFFDIO_API, &api));
	return fd;
}

static void reg(void *p, size_t len, uint64_t mode)
{
	struct uffdio_register r = {.range = {(uintptr_t)p, len}, .mode = mode};

	NEED(!ioctl(uffd, UFFDIO_REGISTER, &r) && r.ioctls);
}

static void *anon_at(void *at, size_t len, int flags)
{
	void *p = mmap(at, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);

	NEED(p != MAP_FAILED);
	return p;
}

/*
 * All that KVM allows at such a moment: the very slot goes and comes, other slots and mappings
 * change. Each would wait for a bracket that is held over the sleep.
 */
static void meddle(void)
{
	CHECK(!t_slot(&v, SLOT_DATA, DATA, 0, NULL));
	CHECK(!t_slot(&v, SLOT_DATA, DATA, T_PAGE, place));
	CHECK(!munmap(other, T_PAGE));
	CHECK(!t_slot(&v, SLOT_OTHER, OTHER, 0, NULL));
	anon_at(other, T_PAGE, MAP_FIXED);
	CHECK(!t_slot(&v, SLOT_OTHER, OTHER, T_PAGE, other));
}

static void resolve(const struct uffd_msg *m)
{
	uint64_t page = m->arg.pagefault.address & ~(uint64_t)(T_PAGE - 1);
	static uint8_t fill[T_PAGE];
	struct uffdio_copy copy = {
		.dst = page, .src = (uintptr_t)fill, .len = T_PAGE, .mode = UFFDIO_COPY_MODE_WP};
	struct uffdio_writeprotect wp = {.range = {page, T_PAGE},
					 .mode = UFFDIO_WRITEPROTECT_MODE_WP};

	nr_faults++;
	if (t_preloaded())
		meddle();
	memset(fill, 77, sizeof(fill));
	if (m->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP) {
		/* Protected once more while a vCPU waits for it, then not any more. */
		CHECK(!ioctl(uffd, UFFDIO_WRITEPROTECT, &wp));
		wp.mode = 0;
		CHECK(!ioctl(uffd, UFFDIO_WRITEPROTECT, &wp));
	} else {
		CHECK(!ioctl(uffd, UFFDIO_COPY, &copy) || errno == EEXIST);
	}
}

/* An event that can be read is one for which a thread sleeps. */
static void *monitor(void *arg)
{
	struct pollfd p[2] = {{.fd = uffd, .events = POLLIN},
			      {.fd = stop_pipe[0], .events = POLLIN}};
	struct uffd_msg m;

	while (poll(p, 2, -1) > 0 && !p[1].revents) {
		/* A KVM that emulates reads memory inside a reader section: no slot can change. */
		if (t_preloaded() || sleeps_for_events)
			meddle();
		if (read(uffd, &m, sizeof(m)) != sizeof(m))
			continue;
		if (m.event == UFFD_EVENT_PAGEFAULT)
			resolve(&m);
		else
			nr_events++;
	}
	return NULL;
}

static void with_monitor(void (*fn)(void))
{
	pthread_t t;
	char c;

	alarm(60);
	NEED(!pipe(stop_pipe));
	NEED(!pthread_create(&t, NULL, monitor, NULL));
	fn();
	NEED(write(stop_pipe[1], "", 1) == 1);
	pthread_join(t, NULL);
	NEED(read(stop_pipe[0], &c, 1) == 1);
	close(stop_pipe[0]);
	close(stop_pipe[1]);
	alarm(0);
}

/* Memory at @p, registered, in use by the guest. */
static void fresh(uint8_t *p, uint8_t value, uint64_t mode)
{
	anon_at(p, T_PAGE, MAP_FIXED);
	*p = value;
	reg(p, T_PAGE, mode);
	place = p;
	t_slot(&v, SLOT_DATA, DATA, 0, NULL);
	NEED(!t_slot(&v, SLOT_DATA, DATA, T_PAGE, p));
	t_rewind(&v);
	t_expect(&v, value);
}

static uint8_t *base;

/* N1, S7: each call that sleeps until its event was read; the reader first changes slots. */
static void events(void)
{
	struct iovec iov[2];
	int before, pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0);
	uint8_t *away = anon_at(NULL, T_PAGE, 0);

	/* The monitor counts when it has read, and the call may be over by then. */
#define SLEEPS(call)                        \
	({                                  \
		before = nr_events;         \
		CHECK(call);                \
		while (nr_events == before) \
			sched_yield();      \
	})
	fresh(base, 1, UFFDIO_REGISTER_MODE_WP);
	SLEEPS(!munmap(base, T_PAGE));
	t_gone(&v);
	fresh(base, 2, UFFDIO_REGISTER_MODE_WP);
	SLEEPS(mmap(base, T_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED,
		    -1, 0) == base);
	t_expect(&v, 0);
	fresh(base, 3, UFFDIO_REGISTER_MODE_WP);
	SLEEPS(!madvise(base, T_PAGE, MADV_DONTNEED));
	t_expect(&v, 0);
	fresh(base, 4, UFFDIO_REGISTER_MODE_WP);
	SLEEPS(mremap(base, T_PAGE, T_PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, away) == away);
	t_gone(&v);
	/* The registration has moved along. */
	CHECK(away[0] == 4);
	SLEEPS(!munmap(away, T_PAGE));
	/* Only the target's bracket would have to be given up, and with it the other. */
	fresh(base, 5, UFFDIO_REGISTER_MODE_WP);
	away = anon_at(NULL, T_PAGE, 0);
	away[0] = 6;
	SLEEPS(mremap(away, T_PAGE, T_PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, base) == base);
	t_expect(&v, 6);
	/* One of two ranges is registered. */
	fresh(base, 7, UFFDIO_REGISTER_MODE_WP);
	iov[0] = (struct iovec){other, T_PAGE};
	iov[1] = (struct iovec){base, T_PAGE};
	before = nr_events;
	if (process_madvise(pidfd, iov, 2, MADV_DONTNEED, 0) == 2 * T_PAGE) {
		while (nr_events == before)
			sched_yield();
		t_expect(&v, 0);
	}
	/* Nothing of it is registered any more where it was replaced: no sleep. */
	SLEEPS(anon_at(base, T_PAGE, MAP_FIXED) == base);
	before = nr_events;
	CHECK(!munmap(base, T_PAGE) && nr_events == before);
	close(pidfd);
}

static void heap_block(void)
{
	size_t len = 1 << 20;
	uint8_t *p = aligned_alloc(T_PAGE, len);
	int before;

	NEED(p);
	p[0] = 50;
	reg(p, T_PAGE, UFFDIO_REGISTER_MODE_WP);
	place = p;
	t_slot(&v, SLOT_DATA, DATA, 0, NULL);
	NEED(!t_slot(&v, SLOT_DATA, DATA, T_PAGE, p));
	t_rewind(&v);
	t_expect(&v, 50);
	before = nr_events;
	free(p);
	while (nr_events == before)
		sched_yield();
	t_gone(&v);
}

/* N1, M2, M6: a vCPU waits for its page; slots, mappings and the page's protection change. */
static void faults(void)
{
	int before = nr_faults;

	fresh(base, 9, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP);
	CHECK(!madvise(base, T_PAGE, MADV_DONTNEED));
	t_expect(&v, 77);
	CHECK(nr_faults == before + 1);
	/* Present and protected: the guest's store faults, and gets through in the end. */
	memcpy(v.code, code_write, sizeof(code_write));
	t_rewind(&v);
	t_expect(&v, 7);
	CHECK(base[0] == 7 && nr_faults == before + 2);
	memcpy(v.code, code_read, sizeof(code_read));
	t_rewind(&v);
	t_expect(&v, 7);
}

/* Protected behind the vCPU's back: its next store must fault, not go through an old pointer. */
static void write_protects(void)
{
	struct uffdio_writeprotect wp = {.range = {(uintptr_t)base, T_PAGE},
					 .mode = UFFDIO_WRITEPROTECT_MODE_WP};
	struct uffdio_range r = {(uintptr_t)base, T_PAGE};
	int before;

	fresh(base, 10, UFFDIO_REGISTER_MODE_WP);
	memcpy(v.code, code_write, sizeof(code_write));
	t_rewind(&v);
	t_expect(&v, 7);
	before = nr_faults;
	CHECK(!ioctl(uffd, UFFDIO_WRITEPROTECT, &wp));
	t_expect(&v, 7);
	CHECK(nr_faults == before + 1);
	CHECK(!syscall(SYS_ioctl, uffd, UFFDIO_WRITEPROTECT, &wp));
	CHECK(!ioctl(uffd, UFFDIO_UNREGISTER, &r));
	t_expect(&v, 7);
	CHECK(nr_faults == before + 1);
	memcpy(v.code, code_read, sizeof(code_read));
	t_rewind(&v);
}

/* Locked memory that grows is populated inside the call: by the monitor. */
static void grows_locked(void)
{
	int before = nr_faults;

	fresh(base, 11, UFFDIO_REGISTER_MODE_WP);
	munmap(base + T_PAGE, T_PAGE);
	anon_at(base, T_PAGE, MAP_FIXED);
	base[0] = 11;
	/* Sanitizers have an mlock() that does nothing. */
	if (syscall(SYS_mlock, base, T_PAGE))
		return;
	reg(base, T_PAGE, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP);
	t_expect(&v, 11);
	CHECK(mremap(base, T_PAGE, 2 * T_PAGE, 0) == base);
	CHECK(nr_faults > before && base[T_PAGE] == 77);
	munmap(base, 2 * T_PAGE);
	t_gone(&v);
}

/* Answers are the kernel's, whatever the arguments. */
static void answers(void)
{
	struct uffdio_register r = {.range = {(uintptr_t)base + 1, T_PAGE},
				    .mode = UFFDIO_REGISTER_MODE_WP};
	struct uffdio_api api = {.api = UFFD_API, .features = 1ull << 63};
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
	int null = open("/dev/null", O_RDWR);

	FAILS(ioctl(uffd, UFFDIO_REGISTER, &r), EINVAL);
	FAILS(ioctl(uffd, UFFDIO_REGISTER, NULL), EFAULT);
	FAILS(ioctl(uffd, UFFDIO_UNREGISTER, (void *)8), EFAULT);
	FAILS(ioctl(null, UFFDIO_REGISTER, &r), ENOTTY);
	FAILS(ioctl(-1, UFFDIO_REGISTER, &r), EBADF);
	FAILS(ioctl(fd, UFFDIO_REGISTER, &r), EINVAL);
	FAILS(ioctl(fd, UFFDIO_API, &api), EINVAL);
	CHECK(!api.features);
	api.api = UFFD_API;
	CHECK(!ioctl(fd, UFFDIO_API, &api));
	CHECK(api.features & UFFD_FEATURE_PAGEFAULT_FLAG_WP && api.ioctls);
	close(fd);
	close(null);
}

int main(void)
{
	uffd = open_uffd(0);
	if (uffd < 0) {
		fprintf(stderr, "no userfaultfd: %s\n", strerror(errno));
		return 77;
	}
	base = mmap(NULL, 16 * T_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	NEED(base != MAP_FAILED);
	base += 8 * T_PAGE;
	other = anon_at(NULL, T_PAGE, 0);
	T_VM(&v, code_read);
	NEED(!t_slot(&v, SLOT_OTHER, OTHER, T_PAGE, other));
	answers();
	with_monitor(faults);
	with_monitor(write_protects);
	if (!user_mode_only)
		with_monitor(grows_locked);
	close(uffd);
	uffd = open_uffd(UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP |
			 UFFD_FEATURE_EVENT_REMOVE);
	sleeps_for_events = true;
	with_monitor(events);
	if (!t_sanitized())
		with_monitor(heap_block);
	close(uffd);
	t_free(&v);
	return t_done();
}
