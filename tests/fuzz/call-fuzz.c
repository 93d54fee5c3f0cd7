/* SPDX-License-Identifier: MIT */
/*
 * Carries out sequences of KVM calls (call.h). A plain KVM program.
 *
 *   call-fuzz --seed N --count N [--features HEX] [--drop I,J...] [--full]
 *       each sequence in fresh VMs; prints what came of every call, one line each. The same program
 *       runs under kvmlet and on /dev/kvm, and tests/diff/calls compares.
 *   call-fuzz --features
 *       the capabilities that are there, one bit each.
 *   call-fuzz --threads N (--rounds N | --seconds N) [--seed N]
 *       several threads make calls of sequences of their own on the same VMs, and are interrupted
 * by signals. It is an error if one of them does not come back.
 *
 * The guest is in real mode: a few bytes of code, and handlers that say by a port that they ran.
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "call.h"

#define PAGE    4096u
#define MEMORY  0x10000u
#define EVENTFD 100
#define CODE    0x1000
/* Of a structure: 256 entries of CPUID, and what an XSAVE area may come to. Calls with an odd count
 * copy that much, whatever the sequence put there. */
#define MAX_SIZE 16384

struct vm {
	_Atomic int fd;
	_Atomic int vcpu[NR_VCPUS];
	struct kvm_run *_Atomic run[NR_VCPUS];
	uint8_t *memory;
	_Atomic bool irqchip; /* HLT sleeps */
};

static struct vm vms[NR_VMS];
static int kvm;
static size_t run_size;
static bool full, shared; /* print outputs whole; several threads */
static uint8_t *edge;     /* one page, then nothing */

static void die(const char *what)
{
	perror(what);
	exit(2);
}

static int check(int r, const char *what)
{
	if (r < 0)
		die(what);
	return r;
}

/* ---- output ----------------------------------------------------------------------------- */

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
	va_list ap;

	if (shared)
		return;
	va_start(ap, format);
	vprintf(format, ap);
	va_end(ap);
}

static void say_result(long r)
{
	if (r < 0)
		say(" = %s", strerrorname_np(errno));
	else
		say(" = %ld", r);
}

static void say_bytes(const uint8_t *p, unsigned n)
{
	uint64_t digest = 0xcbf29ce484222325;

	for (unsigned i = 0; i < n; i++)
		digest = (digest ^ p[i]) * 0x100000001b3;
	say(" #%08" PRIx32, (uint32_t)(digest ^ digest >> 32));
	if (!full)
		return;
	for (unsigned i = 0; i + 4 <= n; i += 4) {
		uint32_t w;

		memcpy(&w, p + i, 4);
		if (w)
			say(" %x:%" PRIx32, i, w);
	}
}

static void say_masked(const struct form *f, uint8_t *p)
{
	for (unsigned i = 0; i < sizeof(f->mask) / sizeof(f->mask[0]); i++)
		memset(p + f->mask[i].from, 0, f->mask[i].len);
	say_bytes(p, f->size);
}

/* ---- objects ---------------------------------------------------------------------------- */

static void close_once(_Atomic int *fd)
{
	int old = atomic_exchange(fd, -1);

	if (old >= 0)
		close(old);
}

static void drop_vm(struct vm *vm)
{
	for (unsigned i = 0; i < NR_VCPUS; i++) {
		close_once(&vm->vcpu[i]);
		/* Another thread may look at it: those are unmapped at the end of the round. */
		if (!shared && vm->run[i])
			munmap(vm->run[i], run_size);
		if (!shared)
			vm->run[i] = NULL;
	}
	close_once(&vm->fd);
	vm->irqchip = false;
}

/* IVT: each vector goes to 0:0x400 + 4 * n, which says n by port 0x99. */
static void fill_memory(uint8_t *m)
{
	memset(m, 0, MEMORY);
	for (unsigned n = 0; n < 256; n++) {
		m[4 * n] = (uint8_t)(4 * n);
		m[4 * n + 1] = (uint8_t)(4 + n / 64);
		memcpy(m + 0x400 + 4 * n, (uint8_t[]){0xb0, (uint8_t)n, 0xe6, 0x99}, 4);
	}
}

static int set_memory(struct vm *vm, int fd)
{
	struct kvm_userspace_memory_region r = {
		.memory_size = MEMORY,
		.userspace_addr = (uint64_t)vm->memory,
	};

	return ioctl(fd, KVM_SET_USER_MEMORY_REGION, &r);
}

static long create_vm(struct vm *vm, unsigned long cmd, uint64_t type)
{
	int fd = ioctl(kvm, cmd, type);

	if (fd < 0)
		return -1;
	if (cmd != KVM_CREATE_VM) { /* another call of the system's */
		return fd;
	}
	drop_vm(vm);
	if (!shared) /* else it stays as it is: others run in it */
		fill_memory(vm->memory);
	set_memory(vm, fd);
	/* Another thread has made one in between. */
	fd = atomic_exchange(&vm->fd, fd);
	if (fd >= 0 && !shared)
		abort();
	if (fd >= 0)
		close(fd);
	return 0;
}

static long create_vcpu(struct vm *vm, unsigned nr, unsigned long cmd, uint64_t id)
{
	int fd = ioctl(vm->fd, cmd, id), none = -1;
	struct kvm_run *run;

	if (fd < 0 || cmd != KVM_CREATE_VCPU)
		return fd;
	run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (run == MAP_FAILED)
		die("mmap");
	if (!atomic_compare_exchange_strong(&vm->vcpu[nr], &none, fd)) {
		munmap(run, run_size);
		close(fd);
		return 0;
	}
	run = atomic_exchange(&vm->run[nr], run);
	if (run && !shared)
		munmap(run, run_size);
	return 0;
}

/* ---- arguments -------------------------------------------------------------------------- */

/* Where @n bytes of @data are to lie, as the call's pointer says. */
static void *place(const struct call *c, uint8_t *data, unsigned n)
{
	unsigned fits;

	switch (c->ptr) {
	case NULL_POINTER:
		return NULL;
	case BAD_POINTER:
		return edge + PAGE;
	case HALF_POINTER:
		fits = n / 2 < PAGE ? n / 2 : PAGE;
		if (!shared)
			memcpy(edge + PAGE - fits, data, fits);
		return edge + PAGE - fits;
	default:
		return data;
	}
}

static void apply(uint8_t *data, const struct patch *p)
{
	uint64_t v = 0;

	memcpy(&v, data + p->at, p->size);
	v = p->how == PUT ? p->value : p->how == FLIP ? v ^ p->value : v + p->value;
	memcpy(data + p->at, &v, p->size);
}

static int the_fd(const struct call *c)
{
	switch (c->on) {
	case ON_KVM:
		return kvm;
	case ON_VM:
		return vms[c->vm].fd;
	default:
		return vms[c->vm].vcpu[c->vcpu];
	}
}

/* ---- the guest -------------------------------------------------------------------------- */

static void real_mode(struct kvm_segment *s, uint16_t selector, uint8_t type)
{
	*s = (struct kvm_segment){
		.base = (uint64_t)selector << 4,
		.limit = 0xffff,
		.selector = selector,
		.type = type,
		.present = 1,
		.s = 1,
	};
}

static bool clean_state(int fd, uint16_t at)
{
	struct kvm_regs regs = {.rip = at, .rflags = 2, .rsp = 0x8000, .rax = 0x5a};
	struct kvm_sregs s;

	if (ioctl(fd, KVM_GET_SREGS, &s))
		return false;
	real_mode(&s.cs, 0, 11);
	real_mode(&s.ds, 0xf000, 3); /* no memory there */
	real_mode(&s.es, 0, 3);
	real_mode(&s.fs, 0, 3);
	real_mode(&s.gs, 0, 3);
	real_mode(&s.ss, 0, 3);
	s.cr0 = 0x60000010;
	s.cr2 = s.cr3 = s.cr4 = s.efer = 0;
	s.idt = (struct kvm_dtable){.limit = 0x3ff};
	s.gdt = (struct kvm_dtable){.limit = 0xffff};
	memset(s.interrupt_bitmap, 0, sizeof(s.interrupt_bitmap));
	return !ioctl(fd, KVM_SET_SREGS, &s) && !ioctl(fd, KVM_SET_REGS, &regs);
}

#define OUT80 0xe6, 0x80

static void write_code(uint8_t *at, const struct call *c, bool may_halt)
{
	static const uint8_t code[16][16] = {
		{OUT80},
		{0xe4, 0x81, OUT80},                               /* in */
		{0xa2, 0, 0, OUT80},                               /* MMIO store */
		{0xa0, 0, 0, OUT80},                               /* MMIO load */
		{0x66, 0xb8, 0, 0, 0, 0, 0x0f, 0xa2, OUT80},       /* cpuid */
		{0x66, 0xb9, 0, 0, 0, 0, 0x0f, 0x32, OUT80},       /* rdmsr */
		{0x66, 0xb9, 0, 0, 0, 0, 0x0f, 0x30, OUT80},       /* wrmsr */
		{0xcc, OUT80},                                     /* int3 */
		{0x0f, 0x0b},                                      /* ud2 */
		{0xf4, OUT80},                                     /* hlt */
		{0xfb, 0x90, 0x90, OUT80},                         /* sti */
		{0x66, 0xb8, 0, 0, 0, 0, 0x0f, 0x23, 0xf8, OUT80}, /* mov %dr7 */
		{0x0f, 0x20, 0xe0, OUT80},                         /* mov %cr4 */
		{0xcd, 0x21, OUT80},                               /* int */
		{0x66, 0xb9, 0, 0, 0, 0, 0x0f, 0x01, 0xd0, OUT80}, /* xgetbv */
		{0x66, 0xb9, 3, 0, 0, 0, 0xba, 0x82, 0, 0x0e, 0x1f, 0xf3, 0x6e, OUT80}, /* outs */
	};
	unsigned n = (unsigned)c->value % 16;

	if (n == 9 && !may_halt)
		n = 0;
	memset(at, 0, 32);
	memcpy(at, code[n], 16);
	if (n == 4)
		memcpy(at + 2,
		       (uint32_t[]){*(const uint32_t *)(c->data + 8) % 4 +
				    (c->data[12] & 1 ? 0x80000000u : 0)},
		       4);
	else if (n == 5 || n == 6)
		memcpy(at + 2, c->data, 4);
	else if (n == 11)
		memcpy(at + 2, c->data + 8, 4);
}

static void say_exit(const struct kvm_run *run)
{
	say(" exit%u", run->exit_reason);
	switch (run->exit_reason) {
	case KVM_EXIT_IO:
		say(" port %x %u*%u", run->io.port, run->io.size, run->io.count);
		if (run->io.direction == KVM_EXIT_IO_OUT)
			say(" %x", ((const uint8_t *)run)[run->io.data_offset]);
		break;
	case KVM_EXIT_MMIO:
		say(" %llx %u %u", (unsigned long long)run->mmio.phys_addr, run->mmio.len,
		    run->mmio.is_write);
		break;
	case KVM_EXIT_INTERNAL_ERROR:
		say(" %u", run->internal.suberror);
		break;
	case KVM_EXIT_DEBUG:
		say(" %u %llx %llx", run->debug.arch.exception,
		    (unsigned long long)run->debug.arch.dr6,
		    (unsigned long long)run->debug.arch.dr7);
		break;
	case KVM_EXIT_X86_RDMSR:
	case KVM_EXIT_X86_WRMSR:
		say(" %x %x", run->msr.index, run->msr.reason);
		break;
	}
	say(" cr8 %llx if %u ready %u", (unsigned long long)run->cr8, run->if_flag,
	    run->ready_for_interrupt_injection);
}

static void interrupt_me(bool on)
{
	struct itimerval t = {.it_value.tv_usec = on ? 150000 : 0};

	if (!shared)
		setitimer(ITIMER_REAL, &t, NULL);
}

static void run_guest(const struct call *c, int fd)
{
	struct vm *vm = &vms[c->vm];
	struct kvm_run *run = vm->run[c->vcpu];
	struct kvm_regs regs;
	uint16_t at = CODE;
	long r;

	if (fd < 0 || !run) {
		say(" none");
		return;
	}
	if (shared) /* there are all kinds */
		at = (uint16_t)(CODE + 64 * (c->value % 16));
	if (!clean_state(fd, at)) {
		say(" unclean");
		return;
	}
	if (!shared)
		write_code(vm->memory + at, c, !vm->irqchip);
	/*
	 * Software KVMs run the guest with their emulator, which differs in when an event is
	 * delivered. A comparison is of the calls, so the guest is not entered there.
	 */
	__atomic_store_n(&run->immediate_exit, !shared || c->data[13] % 4 == 0, __ATOMIC_RELAXED);
	if (!shared)
		run->request_interrupt_window = c->data[14] % 4 == 0;
	interrupt_me(true);
	r = ioctl(fd, c->cmd, 0);
	interrupt_me(false);
	say_result(r);
	if (!shared && (!r || errno == EINTR))
		say_exit(run);
	if (!r) { /* finish what was begun */
		__atomic_store_n(&run->immediate_exit, 1, __ATOMIC_RELAXED);
		say_result(ioctl(fd, KVM_RUN, 0));
	}
	__atomic_store_n(&run->immediate_exit, 0, __ATOMIC_RELAXED);
	if (!ioctl(fd, KVM_GET_REGS, &regs)) {
		say(" rip %llx fl %llx rax %llx", (unsigned long long)regs.rip,
		    (unsigned long long)regs.rflags, (unsigned long long)regs.rax);
		/* CPUID's and RDMSR's other results. */
		say(" %llx %llx", (unsigned long long)regs.rbx, (unsigned long long)regs.rdx);
	}
}

/* ---- calls ------------------------------------------------------------------------------ */

static bool changes_by_itself(uint32_t msr)
{
	return msr == 0x10 /* TSC */ || msr == 0x838 || msr == 0x839;
}

static void say_msrs(long r, const uint8_t *data)
{
	const struct kvm_msr_entry *e = (const void *)(data + 8);

	for (long i = 0; i < r && 8 + 16 * (i + 1) <= MAX_DATA; i++)
		if (!changes_by_itself(e[i].index))
			say(" %x:%llx", e[i].index, (unsigned long long)e[i].data);
		else
			say(" %x", e[i].index);
}

/* What calls-known.txt has to tell apart. */
static void say_control(const void *data)
{
	const struct kvm_sregs *s = data;

	if ((s->cr0 >> 31 & 1) && !(s->efer >> 10 & 1))
		say(" paged32");
	say(" cr4 %llx", (unsigned long long)s->cr4);
}

static bool all_zero(const uint8_t *p, size_t n)
{
	while (n && !*p)
		p++, n--;
	return !n;
}

/* Whether registers that are as after a reset count as in use is the processor's affair. */
static void tidy_xsave(uint8_t *x)
{
	static const uint8_t fcw[2] = {0x7f, 0x03};

	if (!memcmp(x, fcw, 2) && all_zero(x + 2, 22) && all_zero(x + 32, 128))
		x[512] &= (uint8_t)~1u;
	if (all_zero(x + 160, 256))
		x[512] &= (uint8_t)~2u;
	if (all_zero(x + 576, 256))
		x[512] &= (uint8_t)~4u;
}

static void do_call(const struct call *c)
{
	static _Thread_local uint8_t data[MAX_SIZE + 8] __attribute__((aligned(64)));
	const struct form *f = c->form;
	int fd = the_fd(c);
	long r;

	memset(data, 0, sizeof(data));
	memcpy(data, c->data, c->ndata);
	switch (f->shape) {
	case NO_ARG:
	case CHECK_CAP:
		say(" %" PRIx64, c->value);
		r = ioctl(fd, c->cmd, c->value);
		if (!r && c->cmd == KVM_CREATE_IRQCHIP)
			vms[c->vm].irqchip = true;
		if (r > 0 && c->cmd == KVM_GET_TSC_KHZ)
			r = 1; /* measured */
		say_result(r);
		break;
	case CREATE_VM:
		say(" %" PRIx64, c->value);
		say_result(create_vm(&vms[1], c->cmd, c->value));
		break;
	case CREATE_VCPU:
		say(" %" PRIx64, c->value);
		say_result(create_vcpu(&vms[c->vm], c->vcpu, c->cmd, c->value));
		break;
	case IN:
		if (full)
			say_bytes(data, f->size);
		say_result(ioctl(fd, c->cmd, place(c, data, f->size)));
		break;
	case ENABLE_CAP: {
		const struct kvm_enable_cap *cap = (const void *)data;

		say(" %u %x %llx %llx", cap->cap, cap->flags, (unsigned long long)cap->args[0],
		    (unsigned long long)cap->args[1]);
		r = ioctl(fd, c->cmd, place(c, data, sizeof(*cap)));
		if (!r && cap->cap == KVM_CAP_SPLIT_IRQCHIP)
			vms[c->vm].irqchip = true;
		say_result(r);
		break;
	}
	case OUT:
	case IN_OUT:
		if (full && f->shape == IN_OUT)
			say_bytes(data, f->size);
		r = ioctl(fd, c->cmd, place(c, data, f->size));
		say_result(r);
		/* What was delivered and is no more; flags that are none of the shadow's. */
		if (c->cmd == KVM_GET_VCPU_EVENTS) {
			struct kvm_vcpu_events *e = (void *)data;

			if (!e->exception.injected && !e->exception.pending) {
				memset(&e->exception, 0, sizeof(e->exception));
				e->exception_has_payload = 0;
				e->exception_payload = 0;
			}
			e->interrupt.shadow &= 3;
		}
		/* Whether reserved flags, and VM in real mode, are kept depends on the processor.
		 */
		if (c->cmd == KVM_GET_REGS)
			((struct kvm_regs *)data)->rflags &= 0x3d7fd7;
		if (c->cmd == KVM_GET_XSAVE)
			tidy_xsave(data);
		if (!r && c->ptr == GOOD)
			say_masked(f, data);
		break;
	case CHANGE:
		memcpy(data, &c->value, 8); /* what GET_IRQCHIP reads */
		r = ioctl(fd, f->get, data);
		if (r) {
			say(" get");
			say_result(r);
			break;
		}
		for (unsigned i = 0; i < c->npatches; i++) {
			say(" %x/%u%c%" PRIx64, c->patch[i].at, c->patch[i].size,
			    "=^+"[c->patch[i].how], c -> patch[i].value);
			apply(data, &c->patch[i]);
		}
		if (f->cmd == KVM_SET_SREGS || f->cmd == KVM_SET_SREGS2)
			say_control(data);
		say_result(ioctl(fd, c->cmd, place(c, data, f->size)));
		break;
	case MSRS_GET:
		r = ioctl(fd, c->cmd, place(c, data, c->ndata));
		say_result(r);
		say_msrs(r, data);
		break;
	case MSRS_SET:
		r = ioctl(fd, c->cmd, place(c, data, c->ndata));
		say_msrs((long)*(uint32_t *)data < 6 ? (long)*(uint32_t *)data : 6, data);
		say_result(r);
		break;
	case CPUID_GET:
		say(" %" PRIu32, *(uint32_t *)data);
		r = ioctl(fd, c->cmd, place(c, data, 8 + 40 * 40));
		say_result(r);
		break;
	case CPUID_SET:
		say_result(ioctl(fd, c->cmd, place(c, data, c->ndata)));
		break;
	case RUN:
		say(" %" PRIu64, c->value);
		run_guest(c, fd);
		break;
	}
}

static void begin_round(void)
{
	for (unsigned i = 0; i < NR_VMS; i++) {
		vms[i].fd = -1;
		for (unsigned n = 0; n < NR_VCPUS; n++)
			vms[i].vcpu[n] = -1;
	}
	check((int)create_vm(&vms[0], KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	for (int fd = EVENTFD; fd < EVENTFD + 3; fd++) {
		int e = check(eventfd(0, EFD_NONBLOCK), "eventfd");

		check(dup2(e, fd), "dup2");
		close(e);
	}
}

static void end_round(void)
{
	for (unsigned i = 0; i < NR_VMS; i++)
		drop_vm(&vms[i]);
}

static void one_sequence(uint64_t seed, const struct features *f, const bool *drop)
{
	static struct sequence s;

	generate(&s, seed, f);
	begin_round();
	printf("sequence %" PRIu64 "\n", seed);
	for (unsigned i = 0; i < s.n; i++) {
		const struct call *c = &s.calls[i];

		if (drop[i]) {
			printf("-\n");
			continue;
		}
		printf("%u %s%s%s vm%u.%u%s", i, c->form->name,
		       c->on != c->form->on ? "!object" : "", c->cmd != c->form->cmd ? "!cmd" : "",
		       c->vm, c->vcpu, c->ptr ? &"\0null\0bad \0half"[c->ptr * 5 - 4] : "");
		do_call(c);
		printf("\n");
	}
	end_round();
}

/* ---- several threads -------------------------------------------------------------------- */

struct worker {
	pthread_t thread;
	uint64_t seed;
	const struct features *features;
	_Atomic bool done;
	_Atomic unsigned long calls;
};

static void *work(void *arg)
{
	struct worker *w = arg;
	struct sequence *s = malloc(sizeof(*s));

	if (!s)
		die("malloc");
	for (unsigned n = 0; n < 3; n++) {
		generate(s, w->seed + n, w->features);
		for (unsigned i = 0; i < s->n; i++, w->calls++)
			do_call(&s->calls[i]);
	}
	free(s);
	atomic_store(&w->done, true);
	return NULL;
}

static void threads_round(unsigned n, uint64_t seed, const struct features *f, unsigned long *calls)
{
	struct worker w[16] = {0};
	static struct call c; /* what MSRs and values there are in the code */
	unsigned waited = 0;

	begin_round();
	for (unsigned i = 0; i < NR_VMS; i++) {
		fill_memory(vms[i].memory);
		for (unsigned k = 0; k < 16; k++) {
			c.value = k;
			write_code(vms[i].memory + CODE + 64 * k, &c, false);
		}
	}
	for (unsigned i = 0; i < n; i++) {
		w[i].seed = seed * 1000 + 10 * i;
		w[i].features = f;
		if (pthread_create(&w[i].thread, NULL, work, &w[i]))
			die("pthread_create");
	}
	for (unsigned i = 0; i < n; i++) {
		while (!atomic_load(&w[i].done)) {
			usleep(2000);
			for (unsigned k = i; k < n; k++)
				if (!atomic_load(&w[k].done))
					pthread_kill(w[k].thread, SIGALRM);
			if (++waited > 60000) { /* two minutes and more */
				fprintf(stderr, "call-fuzz: a thread is stuck, seed %" PRIu64 "\n",
					seed);
				abort();
			}
		}
		pthread_join(w[i].thread, NULL);
		*calls += w[i].calls;
	}
	shared = false; /* nobody looks at a kvm_run any more */
	end_round();
	shared = true;
}

static void many_rounds(unsigned n, uint64_t seed, unsigned long rounds, unsigned seconds,
			const struct features *f)
{
	struct timespec begin, now;
	unsigned long calls = 0, done = 0;

	shared = true;
	clock_gettime(CLOCK_MONOTONIC, &begin);
	do {
		threads_round(n, seed + done, f, &calls);
		done++;
		clock_gettime(CLOCK_MONOTONIC, &now);
	} while (rounds ? done < rounds : now.tv_sec - begin.tv_sec < seconds);
	printf("%lu rounds of %u threads, %lu calls\n", done, n, calls);
}

/* ---- main ------------------------------------------------------------------------------- */

static void on_alarm(int sig)
{
	(void)sig;
}

static void read_features(struct features *f, const char *text)
{
	for (unsigned i = 0; i < NR_CAPS / 64; i++)
		if (sscanf(text + 16 * i, "%16" SCNx64, &f->caps[i]) != 1)
			die("--features");
}

static void ask_features(struct features *f)
{
	for (unsigned i = 0; i < NR_CAPS; i++)
		if (ioctl(kvm, KVM_CHECK_EXTENSION, i) > 0)
			f->caps[i / 64] |= 1ull << i % 64;
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{"seed", required_argument, NULL, 's'},
		{"count", required_argument, NULL, 'c'},
		{"features", optional_argument, NULL, 'f'},
		{"drop", required_argument, NULL, 'd'},
		{"full", no_argument, NULL, 'F'},
		{"threads", required_argument, NULL, 't'},
		{"rounds", required_argument, NULL, 'r'},
		{"seconds", required_argument, NULL, 'S'},
		{NULL, 0, NULL, 0},
	};
	uint64_t seed = 1;
	unsigned long count = 1, rounds = 0;
	unsigned threads = 0, seconds = 0;
	struct features features = {0};
	bool drop[MAX_CALLS] = {0}, given = false;
	char *p;
	int o;

	kvm = check(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	run_size = (size_t)check(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
	while ((o = getopt_long(argc, argv, "", options, NULL)) >= 0) {
		switch (o) {
		case 's':
			seed = strtoull(optarg, NULL, 0);
			break;
		case 'c':
			count = strtoul(optarg, NULL, 0);
			break;
		case 'f':
			if (optind < argc && argv[optind][0] != '-')
				optarg = argv[optind++];
			if (!optarg) {
				ask_features(&features);
				for (unsigned i = 0; i < NR_CAPS / 64; i++)
					printf("%016" PRIx64, features.caps[i]);
				printf("\n");
				return 0;
			}
			read_features(&features, optarg);
			given = true;
			break;
		case 'd':
			for (p = strtok(optarg, ","); p; p = strtok(NULL, ","))
				if (strtoul(p, NULL, 0) < MAX_CALLS)
					drop[strtoul(p, NULL, 0)] = true;
			break;
		case 'F':
			full = true;
			break;
		case 't':
			threads = (unsigned)strtoul(optarg, NULL, 0);
			break;
		case 'r':
			rounds = strtoul(optarg, NULL, 0);
			break;
		case 'S':
			seconds = (unsigned)strtoul(optarg, NULL, 0);
			break;
		default:
			return 2;
		}
	}
	if (!given)
		ask_features(&features);
	sigaction(SIGALRM, &(struct sigaction){.sa_handler = on_alarm}, NULL);
	for (unsigned i = 0; i < NR_VMS; i++) {
		vms[i].memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE,
				     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (vms[i].memory == MAP_FAILED)
			die("mmap");
	}
	edge = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (edge == MAP_FAILED || mprotect(edge + PAGE, PAGE, PROT_NONE))
		die("mmap");
	if (threads) {
		many_rounds(threads < 16 ? threads : 16, seed, rounds, seconds, &features);
		return 0;
	}
	for (unsigned long i = 0; i < count; i++) {
		one_sequence(seed + i, &features, drop);
		fflush(stdout);
	}
	return 0;
}
