/* SPDX-License-Identifier: MIT */
/*
 * Fuzz: VMs with random slots, page tables, descriptors, registers and code, in all modes.
 *
 *     kvmlet run -- guest-fuzz [--seed N] [--count ROUNDS] [--seconds S] [--slice MICROSECONDS]
 *
 * Whatever a guest does, KVM_RUN returns (it is stopped after a slice of time), with an exit
 * that KVM has; nothing outside the guest's slots and nothing in read-only ones changes; and
 * nothing is printed: what a sanitizer or the library says is a finding. A round is one VM,
 * made from one seed; the next round's seed is the next number, and a finding names its own.
 *
 * The rounds run in a child; the parent looks at what it prints, how it ends, and whether it goes
 * on. Plain KVM program: it runs on a real /dev/kvm, too.
 */
#include <fcntl.h>
#include <getopt.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>

#include "fuzz.h"

#define RUNS         24 /* of a round */
#define EXITS        48 /* of a run */
#define CANARY_PAGES 2u
#define HANG_SECONDS 120

static struct options {
	uint64_t seed, count;
	unsigned seconds, slice_us;
	bool verbose;
} opt = {.seed = 1, .slice_us = 2000};

/* Shared with the parent. */
static struct progress {
	_Atomic uint64_t round, run, steps;
	_Atomic uint64_t exits[64];
	_Atomic unsigned mode;
} * progress;

static int kvm, run_size;
static __thread struct kvm_run *this_run;

static void fail(const char *what, uint64_t detail)
{
	fprintf(stderr, "guest-fuzz: %s (%#llx)\n", what, (unsigned long long)detail);
	fflush(stderr);
	_exit(1);
}

#define NEED(cond)                                    \
	do {                                          \
		if (!(cond))                          \
			fail(#cond, (unsigned)errno); \
	} while (0)

/* ---- slots and their canaries ---- */

static uint64_t canary(const uint64_t *at)
{
	return (uintptr_t)at * 0x9e3779b97f4a7c15 ^ 0xc0ffee;
}

static void set_canaries(uint64_t *from)
{
	for (unsigned i = 0; i < CANARY_PAGES * PAGE / 8; i++)
		from[i] = canary(&from[i]);
}

static void check_canaries(const uint64_t *from)
{
	for (unsigned i = 0; i < CANARY_PAGES * PAGE / 8; i++)
		if (from[i] != canary(&from[i]))
			fail("memory outside of slots changed", (uintptr_t)&from[i]);
}

static uint64_t *after(const struct slot *s)
{
	return (uint64_t *)(s->host + s->r.memory_size);
}

static bool overlaps(const struct vm *vm, uint64_t gpa, uint64_t size)
{
	for (unsigned i = 0; i < vm->nslots; i++) {
		const struct kvm_userspace_memory_region *r = &vm->slots[i].r;

		if (gpa < r->guest_phys_addr + r->memory_size && r->guest_phys_addr < gpa + size)
			return true;
	}
	return false;
}

static void add_slot(struct vm *vm, uint64_t *rng, uint64_t gpa, uint64_t size, uint32_t flags)
{
	struct slot *s = &vm->slots[vm->nslots];
	size_t edge = CANARY_PAGES * PAGE;

	if (overlaps(vm, gpa, size))
		return;
	s->map = mmap(NULL, size + 2 * edge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
		      -1, 0);
	NEED(s->map != MAP_FAILED);
	s->host = s->map + edge;
	s->r = (struct kvm_userspace_memory_region){
		.slot = vm->nslots,
		.flags = flags,
		.guest_phys_addr = gpa,
		.memory_size = size,
		.userspace_addr = (uintptr_t)s->host,
	};
	if (ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION, &s->r)) {
		NEED(errno == EINVAL); /* beyond the physical addresses */
		munmap(s->map, size + 2 * edge);
		return;
	}
	vm->nslots++;
	set_canaries((uint64_t *)s->map);
	set_canaries(after(s));
	fill_random(rng, s->host, size);
	if (flags & KVM_MEM_READONLY) {
		s->before = malloc(size);
		NEED(s->before);
		memcpy(s->before, s->host, size);
	}
	if (!vm->low)
		vm->low = s->host;
	else if (once_in(rng, 6)) {
		s->holes = vm->fault_ok = true;
		NEED(!mprotect(s->host, size / 2 & ~(PAGE - 1ull),
			       once_in(rng, 2) ? PROT_NONE : PROT_READ));
	}
}

static void make_slots(struct vm *vm, uint64_t *rng)
{
	static const uint64_t where[] = {
		LOW_SIZE,           LOW_SIZE + 0x3000, 0x200000,       0xc0000000,
		0xfec00000,         0xfee00000,        0xfffff000,     0x100000000,
		0x0000000fffff0000, 0x3ffffff000,      0x3ffffffff000, 0xffffffff000,
	};
	unsigned n = 2 + (unsigned)below(rng, MAX_SLOTS - 2);

	add_slot(vm, rng, 0, LOW_SIZE, once_in(rng, 8) ? KVM_MEM_LOG_DIRTY_PAGES : 0);
	NEED(vm->nslots == 1);
	for (unsigned i = 1; i < n; i++)
		add_slot(vm, rng,
			 once_in(rng, 4) ? LOW_SIZE + below(rng, 0x400) * PAGE
					 : where[below(rng, sizeof(where) / sizeof(*where))],
			 (1 + below(rng, 8)) * PAGE,
			 (once_in(rng, 3) ? KVM_MEM_READONLY : 0) |
				 (once_in(rng, 4) ? KVM_MEM_LOG_DIRTY_PAGES : 0));
}

static void check_slots(struct vm *vm)
{
	for (unsigned i = 0; i < vm->nslots; i++) {
		struct slot *s = &vm->slots[i];

		check_canaries((uint64_t *)s->map);
		check_canaries(after(s));
		/* Where there are holes, that they are still there is enough. */
		if (s->before && !s->holes && memcmp(s->before, s->host, s->r.memory_size))
			fail("a read-only slot changed", i);
	}
}

static void free_slots(struct vm *vm)
{
	for (unsigned i = 0; i < vm->nslots; i++) {
		struct slot *s = &vm->slots[i];

		munmap(s->map, s->r.memory_size + 2ul * CANARY_PAGES * PAGE);
		free(s->before);
	}
}

/* ---- the VM ---- */

static void set_cpuid(struct vcpu *v)
{
	static __thread struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 e[256];
	} c;

	c.head.nent = 256;
	NEED(!ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &c));
	/* A processor that has less, or is of another make. */
	for (unsigned i = 0; i < c.head.nent && once_in(&v->rng, 4); i++) {
		uint32_t *r = &c.e[i].eax;

		if (c.e[i].function == 7 || c.e[i].function == 1)
			r[1 + below(&v->rng, 3)] &= (uint32_t)(rnd(&v->rng) | rnd(&v->rng));
		else if (c.e[i].function == 0x80000008 && once_in(&v->rng, 2))
			*r = (*r & ~0xffu) | (32 + (uint32_t)below(&v->rng, 21));
		else if (once_in(&v->rng, 16))
			r[below(&v->rng, 4)] ^= 1u << below(&v->rng, 32);
	}
	if (ioctl(v->fd, KVM_SET_CPUID2, &c)) {
		NEED(errno == EINVAL);
		c.head.nent = 256;
		NEED(!ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &c));
		NEED(!ioctl(v->fd, KVM_SET_CPUID2, &c));
	}
}

static void make_vm(struct vm *vm, uint64_t *rng)
{
	memset(vm, 0, sizeof(*vm));
	vm->fd = ioctl(kvm, KVM_CREATE_VM, 0);
	NEED(vm->fd >= 0);
	NEED(!ioctl(vm->fd, KVM_SET_TSS_ADDR, 0xfffbd000));
	vm->irqchip = once_in(rng, 2) && !ioctl(vm->fd, KVM_CREATE_IRQCHIP);
	if (once_in(rng, 3)) {
		struct kvm_enable_cap cap = {.cap = KVM_CAP_X86_USER_SPACE_MSR, .args = {7}};

		ioctl(vm->fd, KVM_ENABLE_CAP, &cap);
	}
	if (once_in(rng, 4)) {
		struct kvm_enable_cap cap = {.cap = KVM_CAP_EXCEPTION_PAYLOAD, .args = {1}};

		ioctl(vm->fd, KVM_ENABLE_CAP, &cap);
	}
	make_slots(vm, rng);
	vm->nvcpus = once_in(rng, 6) ? 2 + (unsigned)below(rng, MAX_VCPUS - 1) : 1;
	for (unsigned i = 0; i < vm->nvcpus; i++) {
		struct vcpu *v = &vm->vcpus[i];

		v->vm = vm;
		v->rng = rnd(rng);
		v->fd = ioctl(vm->fd, KVM_CREATE_VCPU, i);
		NEED(v->fd >= 0);
		v->run = mmap(NULL, (size_t)run_size, PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, 0);
		NEED(v->run != MAP_FAILED);
		set_cpuid(v);
		if (i) {
			struct kvm_mp_state mp = {.mp_state = KVM_MP_STATE_RUNNABLE};

			ioctl(v->fd, KVM_SET_MP_STATE, &mp);
		}
	}
}

static void free_vm(struct vm *vm)
{
	for (unsigned i = 0; i < vm->nvcpus; i++) {
		munmap(vm->vcpus[i].run, (size_t)run_size);
		close(vm->vcpus[i].fd);
	}
	close(vm->fd);
	free_slots(vm);
}

/* ---- running ---- */

static void slice_over(int sig)
{
	(void)sig;
	if (this_run)
		this_run->immediate_exit = 1;
}

/* One exit. False: the run is over. */
static bool take_exit(struct vcpu *v)
{
	struct kvm_run *run = v->run;

	switch (run->exit_reason) {
	case KVM_EXIT_IO:
		if (run->io.data_offset > (unsigned)run_size ||
		    (uint64_t)run->io.size * run->io.count >
			    (unsigned)run_size - run->io.data_offset) {
			v->problem = "port data outside of kvm_run";
			return false;
		}
		if (!run->io.direction)
			fill_random(&v->rng, (uint8_t *)run + run->io.data_offset,
				    (size_t)run->io.size * run->io.count);
		return true;
	case KVM_EXIT_MMIO:
		if (!run->mmio.len || run->mmio.len > 8) {
			v->problem = "length of MMIO";
			return false;
		}
		if (!run->mmio.is_write)
			fill_random(&v->rng, run->mmio.data, 8);
		return true;
	case KVM_EXIT_X86_RDMSR:
	case KVM_EXIT_X86_WRMSR:
		run->msr.data = rnd(&v->rng);
		run->msr.error = (uint8_t)below(&v->rng, 2);
		return true;
	case KVM_EXIT_IRQ_WINDOW_OPEN:
		run->request_interrupt_window = 0;
		return true;
	case KVM_EXIT_HYPERCALL:
	case KVM_EXIT_DEBUG:
	case KVM_EXIT_HLT:
	case KVM_EXIT_SET_TPR:
	case KVM_EXIT_TPR_ACCESS:
	case KVM_EXIT_IOAPIC_EOI:
		return true;
	case KVM_EXIT_INTR:
	case KVM_EXIT_SHUTDOWN:
	case KVM_EXIT_SYSTEM_EVENT:
	case KVM_EXIT_FAIL_ENTRY:
		return false;
	case KVM_EXIT_INTERNAL_ERROR:
		if (run->internal.suberror != KVM_INTERNAL_ERROR_EMULATION &&
		    run->internal.suberror != KVM_INTERNAL_ERROR_DELIVERY_EV)
			v->problem = "internal error", v->detail = run->internal.suberror;
		return false;
	default:
		v->problem = "exit reason";
		v->detail = run->exit_reason;
		return false;
	}
}

static timer_t slice_timer(void)
{
	struct sigevent ev = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGALRM};
	struct itimerspec slice = {
		.it_value.tv_nsec = opt.slice_us * 1000l,
		/* Again, should it come between the look at kvm_run and the call. */
		.it_interval.tv_nsec = 1000000,
	};
	timer_t t;

	ev._sigev_un._tid = (pid_t)syscall(SYS_gettid);
	NEED(!timer_create(CLOCK_MONOTONIC, &ev, &t));
	NEED(!timer_settime(t, 0, &slice, NULL));
	return t;
}

static void one_run(struct vcpu *v)
{
	timer_t t;

	this_run = v->run;
	v->run->immediate_exit = 0;
	t = slice_timer();
	for (unsigned i = 0; i < EXITS && !v->problem; i++) {
		int r = ioctl(v->fd, KVM_RUN, 0), err = errno;

		progress->steps++;
		if (r) {
			if (err == EINTR || err == EAGAIN)
				break;
			if ((err == EFAULT && v->vm->fault_ok) || (err == EINVAL && v->garbage))
				break;
			v->problem = "KVM_RUN failed";
			v->detail = (uint64_t)err;
			break;
		}
		progress->exits[v->run->exit_reason & 63]++;
		if (!take_exit(v))
			break;
		if (once_in(&v->rng, 8))
			disturb(v->vm, v);
	}
	timer_delete(t);
	this_run = NULL;
	v->run->immediate_exit = 0;
	v->run->kvm_valid_regs = v->run->kvm_dirty_regs = 0;
	v->run->request_interrupt_window = 0;
	v->run->cr8 = 0;
}

/* What a guest got itself into can be read, and can be set again. */
static void check_state(struct vcpu *v)
{
	struct kvm_vcpu_events e;
	struct kvm_xsave x;
	struct kvm_regs r;
	struct kvm_sregs s;
	struct kvm_debugregs d;

	NEED(!ioctl(v->fd, KVM_GET_REGS, &r));
	NEED(!ioctl(v->fd, KVM_GET_SREGS, &s));
	NEED(!ioctl(v->fd, KVM_GET_VCPU_EVENTS, &e));
	NEED(!ioctl(v->fd, KVM_GET_XSAVE, &x));
	NEED(!ioctl(v->fd, KVM_GET_DEBUGREGS, &d));
	NEED(!ioctl(v->fd, KVM_SET_REGS, &r));
	/* Loaded outside long mode, where KVM_SET_SREGS refuses it */
	if (!(s.efer & 0x400))
		s.cs.l = 0;
	/* KVM_SET_MSRS takes LME away from a processor in long mode. */
	if (!(s.efer & 0x400) == !((s.efer & 0x100) && (s.cr0 & 1u << 31)))
		NEED(!ioctl(v->fd, KVM_SET_SREGS, &s));
	NEED(!ioctl(v->fd, KVM_SET_XSAVE, &x));
	NEED(!ioctl(v->fd, KVM_SET_DEBUGREGS, &d));
}

static void *vcpu_thread(void *arg)
{
	one_run(arg);
	return NULL;
}

static void run_all(struct vm *vm)
{
	pthread_t t[MAX_VCPUS];

	for (unsigned i = 1; i < vm->nvcpus; i++)
		NEED(!pthread_create(&t[i], NULL, vcpu_thread, &vm->vcpus[i]));
	one_run(&vm->vcpus[0]);
	for (unsigned i = 1; i < vm->nvcpus; i++)
		NEED(!pthread_join(t[i], NULL));
	for (unsigned i = 0; i < vm->nvcpus; i++) {
		struct vcpu *v = &vm->vcpus[i];

		if (v->problem)
			fail(v->problem, v->detail);
		check_state(v);
		v->garbage = false;
	}
}

static void one_round(uint64_t seed)
{
	uint64_t rng = seed * 0xd1342543de82ef95 + 1;
	static struct vm vm;

	make_vm(&vm, &rng);
	for (unsigned run = 0; run < RUNS; run++) {
		enum mode mode = (enum mode)below(&rng, NMODES);

		progress->run = run;
		progress->mode = mode;
		if (opt.verbose)
			printf("round %llu run %u %s\n", (unsigned long long)seed, run,
			       mode_names[mode]);
		make_memory(&vm, &rng, mode);
		for (unsigned i = 0; i < vm.nvcpus; i++) {
			make_state(&vm, &vm.vcpus[i], mode);
			if (once_in(&rng, 2))
				disturb(&vm, &vm.vcpus[i]);
		}
		run_all(&vm);
		check_slots(&vm);
	}
	free_vm(&vm);
}

static bool time_is_over(const struct timespec *begun)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return opt.seconds && now.tv_sec - begun->tv_sec >= opt.seconds;
}

static int rounds(void)
{
	struct sigaction sa = {.sa_handler = slice_over};
	struct timespec begun;

	NEED(!sigaction(SIGALRM, &sa, NULL));
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	NEED(kvm >= 0);
	run_size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	NEED(run_size > 0);
	code_init();
	clock_gettime(CLOCK_MONOTONIC, &begun);
	for (uint64_t i = 0; (!opt.count || i < opt.count) && !time_is_over(&begun); i++) {
		progress->round = opt.seed + i;
		one_round(opt.seed + i);
	}
	return 0;
}

/* ---- the parent ---- */

static void report(void)
{
	printf("%llu rounds, %llu times KVM_RUN; exits:",
	       (unsigned long long)(progress->round - opt.seed + 1),
	       (unsigned long long)progress->steps);
	for (unsigned i = 0; i < 64; i++)
		if (progress->exits[i])
			printf(" %u:%llu", i, (unsigned long long)progress->exits[i]);
	putchar('\n');
}

/* Pass on what the child prints, until it ends. True: it printed something, or hangs. */
static bool watch(int fd, pid_t pid)
{
	uint64_t steps = 0;
	bool finding = false;
	char buf[4096];

	for (unsigned still = 0;;) {
		struct pollfd p = {.fd = fd, .events = POLLIN};
		ssize_t n;

		if (poll(&p, 1, 1000) > 0) {
			n = read(fd, buf, sizeof(buf));
			if (n <= 0)
				return finding;
			finding = true;
			if (write(STDERR_FILENO, buf, (size_t)n) < 0)
				return true;
			continue;
		}
		still = progress->steps == steps ? still + 1 : 0;
		steps = progress->steps;
		if (still < HANG_SECONDS)
			continue;
		fprintf(stderr, "guest-fuzz: no progress for %u seconds\n", HANG_SECONDS);
		kill(pid, SIGABRT);
		return true;
	}
}

static int supervise(void)
{
	int ends[2], st;
	bool finding;
	pid_t pid;

	progress = mmap(NULL, sizeof(*progress), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
			-1, 0);
	NEED(progress != MAP_FAILED && !pipe(ends));
	fflush(stdout);
	pid = fork();
	NEED(pid >= 0);
	if (!pid) {
		close(ends[0]);
		NEED(dup2(ends[1], STDERR_FILENO) == STDERR_FILENO);
		close(ends[1]);
		exit(rounds());
	}
	close(ends[1]);
	finding = watch(ends[0], pid);
	NEED(waitpid(pid, &st, 0) == pid);
	report();
	if (!finding && WIFEXITED(st) && !WEXITSTATUS(st))
		return 0;
	if (WIFSIGNALED(st))
		fprintf(stderr, "guest-fuzz: ended by signal %d\n", WTERMSIG(st));
	fprintf(stderr, "guest-fuzz: a finding in run %llu (%s); again: --seed %llu --count 1\n",
		(unsigned long long)progress->run, mode_names[progress->mode % NMODES],
		(unsigned long long)progress->round);
	return 1;
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{"seed", required_argument, NULL, 's'},    {"count", required_argument, NULL, 'c'},
		{"seconds", required_argument, NULL, 't'}, {"slice", required_argument, NULL, 'u'},
		{"verbose", no_argument, NULL, 'v'},       {0},
	};
	int c;

	while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (c) {
		case 's':
			opt.seed = strtoull(optarg, NULL, 0);
			break;
		case 'c':
			opt.count = strtoull(optarg, NULL, 0);
			break;
		case 't':
			opt.seconds = (unsigned)strtoul(optarg, NULL, 0);
			break;
		case 'u':
			opt.slice_us = (unsigned)strtoul(optarg, NULL, 0);
			break;
		case 'v':
			opt.verbose = true;
			break;
		default:
			return 2;
		}
	}
	if (!opt.count && !opt.seconds)
		opt.count = 100;
	return supervise();
}
