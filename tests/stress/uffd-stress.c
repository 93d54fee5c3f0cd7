/* SPDX-License-Identifier: MIT */
/*
 * No deadlock: userfaultfd handlers that change slots and memory while a vCPU waits for their
 * page; monitors that do so before they read an event which another thread's munmap or madvise
 * waits for; brackets that nest, of several threads, against slot changes.
 *
 * A hang is the failure: the watchdog calls it one after minutes.
 *
 *     uffd-stress [--steps N] [--seed N] [--limit SECONDS]
 */
#include <getopt.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <linux/userfaultfd.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "../preload/t.h"

#define NPAGES     4u /* watched */
#define NVCPUS     3u
#define SLOT_OTHER 5u
#define OTHER_GPA  0x100000u
#define OTHER_SIZE (16 * T_PAGE)
#define FILLED     0x5a

static struct vm v, vcpus[NVCPUS];
static uint8_t *watched, *other, *spare, *source;
static int uffd, quit_fd;
static unsigned steps = 300, limit = 180;
static uint64_t seed = 1;
static _Atomic bool stop;
static _Atomic unsigned long faults, other_events;
static _Atomic unsigned long progress;
static _Atomic(const char *) doing[8];
static bool events;
static pthread_mutex_t slots = PTHREAD_MUTEX_INITIALIZER;

/* As in mem-stress.c: what mmap() returns counts as written, after the call. */
__attribute__((visibility("default"))) const char *__tsan_default_suppressions(void);
const char *__tsan_default_suppressions(void)
{
	return "race_top:mmap\n";
}

static uint64_t rnd(uint64_t *s)
{
	*s ^= *s << 13;
	*s ^= *s >> 7;
	*s ^= *s << 17;
	return *s * 0x2545f4914f6cdd1dull >> 16;
}

static void *watchdog(void *arg)
{
	unsigned long seen = 0;
	unsigned still = 0;

	for (;;) {
		sleep(1);
		if (progress != seen) {
			seen = progress;
			still = 0;
		} else if (++still == limit) {
			for (unsigned i = 0; i < 8; i++)
				if (doing[i])
					fprintf(stderr, "thread %u: %s\n", i, doing[i]);
			fprintf(stderr, "uffd-stress: FAILED: deadlock (seed %llu)\n",
				(unsigned long long)seed);
			/* For a debugger */
			if (getenv("STRESS_STOP"))
				raise(SIGSTOP);
			_exit(1);
		}
	}
	return NULL;
}

static void note(unsigned thread, const char *what)
{
	doing[thread] = what;
	progress++;
}

/* ---- what handlers and others do -------------------------------------------------------- */

static int slot(int fd, unsigned id, uint64_t gpa, uint64_t size, void *p)
{
	struct vm w = {.vm = fd};

	return t_slot(&w, id, gpa, size, p);
}

/* The slot that vCPUs wait on goes and comes, or moves there and back. */
static void own_slot(bool move)
{
	pthread_mutex_lock(&slots);
	if (move) {
		CHECK(!slot(v.vm, SLOT_DATA, DATA + 0x10000, NPAGES * T_PAGE, watched));
		CHECK(!slot(v.vm, SLOT_DATA, DATA, NPAGES * T_PAGE, watched));
	} else {
		CHECK(!slot(v.vm, SLOT_DATA, 0, 0, NULL));
		CHECK(!slot(v.vm, SLOT_DATA, DATA, NPAGES * T_PAGE, watched));
	}
	pthread_mutex_unlock(&slots);
}

static void other_slot(void)
{
	pthread_mutex_lock(&slots);
	CHECK(!slot(v.vm, SLOT_OTHER, 0, 0, NULL));
	CHECK(!slot(v.vm, SLOT_OTHER, OTHER_GPA, OTHER_SIZE, other));
	pthread_mutex_unlock(&slots);
}

static void another_vm(void)
{
	int fd = ioctl(v.kvm, KVM_CREATE_VM, 0);

	if (!CHECK(fd >= 0))
		return;
	CHECK(!slot(fd, 0, 0, NPAGES * T_PAGE, watched));
	CHECK(!slot(fd, 1, OTHER_GPA, OTHER_SIZE, other));
	CHECK(!close(fd));
}

static pthread_mutex_t other_lock = PTHREAD_MUTEX_INITIALIZER;

static void other_memory(unsigned how)
{
	struct iovec iov[10];
	int fd;

	pthread_mutex_lock(&other_lock);
	switch (how) {
	case 0:
		CHECK(!munmap(other, OTHER_SIZE));
		CHECK(mmap(other, OTHER_SIZE, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == other);
		break;
	case 1:
		CHECK(!mprotect(other, OTHER_SIZE, PROT_READ));
		CHECK(!mprotect(other, OTHER_SIZE, PROT_READ | PROT_WRITE));
		break;
	case 2:
		/* Two brackets each. */
		CHECK(mremap(other, OTHER_SIZE, OTHER_SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, spare) ==
		      spare);
		CHECK(mremap(spare, OTHER_SIZE, OTHER_SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, other) ==
		      other);
		break;
	case 3:
		fd = (int)syscall(SYS_pidfd_open, getpid(), 0);
		for (unsigned i = 0; i < 10; i++)
			iov[i] = (struct iovec){other + (i % 8) * 2 * T_PAGE, T_PAGE};
		CHECK(syscall(SYS_process_madvise, fd, iov, 10, MADV_PAGEOUT, 0) > 0 ||
		      errno == EINVAL);
		close(fd);
		break;
	default:
		CHECK(!madvise(other, OTHER_SIZE, MADV_DONTNEED));
		break;
	}
	pthread_mutex_unlock(&other_lock);
}

static void write_protect(uint8_t *p, bool on)
{
	struct uffdio_writeprotect wp = {
		.range = {(uintptr_t)p, T_PAGE},
		.mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0,
	};

	if (!ioctl(uffd, UFFDIO_WRITEPROTECT, &wp))
		return;
	/* Not registered, or an event is to be read first. Who waits for the page tries again. */
	CHECK(errno == ENOENT || errno == EAGAIN);
	if (!on)
		(void)ioctl(uffd, UFFDIO_WAKE, &wp.range);
}

static void mischief(uint64_t *rng, uint8_t *page)
{
	switch (rnd(rng) % 12) {
	case 0:
		own_slot(false);
		break;
	case 1:
		own_slot(true);
		break;
	case 2:
		other_slot();
		break;
	case 3:
		another_vm();
		break;
	case 4:
		write_protect(page, true);
		break;
	case 5:
		write_protect(page, true);
		write_protect(page, false);
		break;
	case 6:
	case 7:
	case 8:
	case 9:
	case 10:
		other_memory(rnd(rng) % 5);
		break;
	default:
		break;
	}
}

/* ---- the handler -------------------------------------------------------------------------- */

static void resolve(const struct uffd_msg *m)
{
	uint64_t page = m->arg.pagefault.address & ~(uint64_t)(T_PAGE - 1);

	if (m->arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP) {
		write_protect((uint8_t *)page, false);
	} else {
		struct uffdio_copy c = {.dst = page, .src = (uintptr_t)source, .len = T_PAGE};

		/* It may be there by now, or an event is due first: who waits tries again. */
		(void)ioctl(uffd, UFFDIO_COPY, &c);
		if (c.copy != T_PAGE) {
			struct uffdio_range r = {page, T_PAGE};

			(void)ioctl(uffd, UFFDIO_WAKE, &r);
		}
	}
}

static void *handler(void *arg)
{
	uint64_t rng = seed * 77 + 1;

	for (;;) {
		struct pollfd p[2] = {{.fd = uffd, .events = POLLIN},
				      {.fd = quit_fd, .events = POLLIN}};
		struct uffd_msg m;

		doing[0] = "handler polls";
		if (poll(p, 2, -1) < 0)
			continue;
		if (p[1].revents)
			return NULL;
		/* A munmap or madvise may be waiting for this event to be read. */
		note(0, "handler, before it reads");
		mischief(&rng, watched);
		note(0, "handler reads");
		if (read(uffd, &m, sizeof(m)) != sizeof(m))
			continue;
		if (m.event != UFFD_EVENT_PAGEFAULT) {
			other_events++;
			continue;
		}
		faults++;
		note(0, "handler, before it resolves");
		mischief(&rng, (uint8_t *)(uintptr_t)(m.arg.pagefault.address & ~4095ull));
		note(0, "handler resolves");
		resolve(&m);
	}
}

/* ---- the others --------------------------------------------------------------------------- */

/* mov al, [bx]; mov [bx+1], al; out 0x10, al; jmp start: reads and writes where bx points to. */
static const uint8_t code_touch[] = {0x8a, 0x07, 0x88, 0x47, 0x01, 0xe6, 0x10, 0xeb, 0xf7};

static void *runner(void *arg)
{
	struct vm *w = arg;
	uint64_t rng = seed * 131 + (uint64_t)(w - vcpus) + 1;
	unsigned me = 1 + (unsigned)(w - vcpus);

	while (!stop) {
		struct kvm_regs regs = {
			.rip = CODE, .rflags = 2, .rbx = DATA + rnd(&rng) % NPAGES * T_PAGE};

		note(me, "KVM_RUN");
		if (w->run->exit_reason != KVM_EXIT_MMIO)
			CHECK(!ioctl(w->vcpu, KVM_SET_REGS, &regs));
		if (ioctl(w->vcpu, KVM_RUN, 0)) {
			CHECK(errno == EINTR || errno == EFAULT);
			continue;
		}
		if (w->run->exit_reason == KVM_EXIT_IO) {
			uint8_t al = ((uint8_t *)w->run)[w->run->io.data_offset];

			CHECK(al == FILLED || al == 0);
		} else if (w->run->exit_reason == KVM_EXIT_MMIO) {
			memset(w->run->mmio.data, 0, 8);
		} else {
			CHECK(w->run->exit_reason == KVM_EXIT_IO);
			stop = true;
		}
	}
	return NULL;
}

static void *changer(void *arg)
{
	uint64_t rng = seed * 17 + 5;

	while (!stop) {
		note(5, "changer");
		mischief(&rng, watched);
		usleep(100);
	}
	return NULL;
}

static void watch(void)
{
	struct uffdio_register reg = {
		.range = {(uintptr_t)watched, NPAGES * T_PAGE},
		.mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP,
	};

	CHECK(!ioctl(uffd, UFFDIO_REGISTER, &reg));
}

static void step(uint64_t *rng)
{
	uint8_t *p = watched + rnd(rng) % NPAGES * T_PAGE;
	void *q;

	switch (rnd(rng) % 6) {
	case 0:
		note(6, "munmap");
		CHECK(!munmap(watched, NPAGES * T_PAGE));
		note(6, "mmap");
		CHECK(mmap(watched, NPAGES * T_PAGE, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == watched);
		watch();
		break;
	case 1:
		note(6, "mremap");
		q = mremap(watched, NPAGES * T_PAGE, NPAGES * T_PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
			   spare + OTHER_SIZE);
		CHECK(q == spare + OTHER_SIZE);
		note(6, "mremap back");
		CHECK(mremap(q, NPAGES * T_PAGE, NPAGES * T_PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
			     watched) == watched);
		/* Without EVENT_REMAP it is not watched any more. */
		watch();
		break;
	case 2:
		write_protect(p, true);
		break;
	default:
		note(6, "madvise");
		CHECK(!madvise(p, T_PAGE, MADV_DONTNEED));
		break;
	}
	progress++;
}

static void *reserve(size_t size)
{
	/* Low, where nothing goes by itself. */
	static uintptr_t at;
	void *p;

	if (!at)
		at = dlsym(RTLD_DEFAULT, "__asan_init") ? 0x210000000000ul : 0x1100000000ul;
	p = mmap((void *)at, size, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	NEED(p == (void *)at);
	at += size + (1 << 20);
	return p;
}

static bool open_uffd(void)
{
	struct uffdio_api api = {.api = UFFD_API};

	uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (uffd < 0)
		return false;
	if (events)
		api.features = UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP |
			       UFFD_FEATURE_EVENT_REMAP;
	return !ioctl(uffd, UFFDIO_API, &api);
}

static void run(void)
{
	pthread_t h, c, r[NVCPUS];
	uint64_t rng = seed * 1009 + 3;
	uint64_t one = 1;

	stop = false;
	quit_fd = eventfd(0, 0);
	T_VM(&v, code_touch);
	CHECK(!slot(v.vm, SLOT_DATA, DATA, NPAGES * T_PAGE, watched));
	CHECK(!slot(v.vm, SLOT_OTHER, OTHER_GPA, OTHER_SIZE, other));
	vcpus[0] = v;
	for (unsigned i = 1; i < NVCPUS; i++) {
		vcpus[i] = v;
		t_vcpu(&vcpus[i], (int)i);
	}
	watch();
	NEED(!pthread_create(&h, NULL, handler, NULL));
	for (unsigned i = 0; i < NVCPUS; i++)
		NEED(!pthread_create(&r[i], NULL, runner, &vcpus[i]));
	NEED(!pthread_create(&c, NULL, changer, NULL));
	/* Until some vCPU has waited for the handler, however late its thread was. */
	faults = other_events = 0;
	for (unsigned i = 0; (i < steps || !faults) && !stop; i++)
		step(&rng);
	stop = true;
	doing[6] = "join";
	for (unsigned i = 0; i < NVCPUS; i++)
		pthread_join(r[i], NULL);
	pthread_join(c, NULL);
	NEED(write(quit_fd, &one, sizeof(one)) == sizeof(one));
	pthread_join(h, NULL);
	CHECK(!events || other_events);
	close(uffd);
	close(quit_fd);
	for (unsigned i = 1; i < NVCPUS; i++) {
		munmap(vcpus[i].run, v.run_size);
		CHECK(!close(vcpus[i].vcpu));
	}
	t_free(&v);
}

int main(int argc, char **argv)
{
	static const struct option longs[] = {
		{"steps", 1, NULL, 'n'}, {"seed", 1, NULL, 's'}, {"limit", 1, NULL, 'l'}, {0}};
	pthread_t dog;
	int o;

	while ((o = getopt_long(argc, argv, "", longs, NULL)) != -1) {
		if (o == 'n')
			steps = (unsigned)atoi(optarg);
		else if (o == 'l')
			limit = (unsigned)atoi(optarg);
		else if (o == 's')
			seed = strtoul(optarg, NULL, 0);
		else
			return 2;
	}
	watched = reserve(NPAGES * T_PAGE);
	other = reserve(OTHER_SIZE);
	spare = reserve(2 * OTHER_SIZE);
	source = reserve(T_PAGE);
	memset(source, FILLED, T_PAGE);
	NEED(!pthread_create(&dog, NULL, watchdog, NULL));
	for (int i = 0; i < 2; i++) {
		events = i;
		if (!open_uffd()) {
			fprintf(stderr, "userfaultfd: %m\n");
			return 77;
		}
		run();
	}
	return t_done();
}
