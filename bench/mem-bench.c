/* SPDX-License-Identifier: MIT */
/*
 * What changes of guest memory cost. Uses <linux/kvm.h> only, so that the same program measures a
 * real /dev/kvm and, under `kvmlet run`, kvmlet. bench/run-mem drives it.
 *
 *   mem-bench slots SIZE-MIB OTHERS idle|run  ns for each change of one slot, among OTHERS others
 *   mem-bench fault 4k|2m                     pages/s that a guest touches first
 *   mem-bench fault-native 4k|2m              the same loop in this process
 *   mem-bench unmap none|SLOTS idle|run       ns for a munmap that touches no slot
 *   mem-bench unmap-slot idle|run             ns for a munmap of a page of a slot
 *   mem-bench file SIZE-MIB                   us to create a guest_memfd, allocate and punch all of
 * it mem-bench fault-memory anon|memfd|private 4 KiB pages/s of such memory that a guest touches
 * first mem-bench convert 4k|2m VCPUS             pages/s that are converted, private and back
 *
 * "run": a vCPU runs guest code meanwhile, in ring 3 of 64-bit mode. Each prints "name value unit".
 */
#include <err.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE  4096ul
#define MIB   (1ul << 20)
#define GIB   (1ul << 30)
#define CODE  0x10000ul
#define FLAG  0x20000ul /* a word that ends a running guest */
#define STACK 0x80000ul
#define RAM   (4 * MIB)

/* The slot under test; the others lie below and above it. */
#define TEST_GPA   (64 * GIB)
#define TEST_GPA2  (66 * GIB)
#define OTHERS_LOW (8 * GIB)
#define OTHERS_TOP (128 * GIB)
#define TOUCH_GPA  (1 * GIB) /* what guests touch: one GiB from here */
#define ID_RAM     0
#define ID_TEST    1
#define ID_TOUCH   2
#define ID_OTHERS  3

__asm__(".pushsection .rodata\n"
	/* until the flag is set, compute and touch (%rbx) */
	"g_spin:	cmpl $0, 0x20000; jne 2f; mov (%rbx), %rsi; lea 1(%rax), %rax; jmp g_spin\n"
	/* %rcx pages from %rbx, %rdx apart */
	"g_touch:\n"
	"1:		mov %rax, (%rbx); add %rdx, %rbx; dec %rcx; jnz 1b\n"
	"2:		mov $0x3f8, %edx; out %al, %dx; jmp 2b\n"
	"g_end:\n"
	".popsection\n");
extern const char g_spin[], g_touch[], g_end[];

/* Of Linux 6.8; older headers lack it. */
struct memory_region2 {
	uint32_t slot, flags;
	uint64_t guest_phys_addr, memory_size, userspace_addr, guest_memfd_offset;
	uint32_t guest_memfd, pad1;
	uint64_t pad2[14];
};
struct memory_attributes {
	uint64_t address, size, attributes, flags;
};
struct create_guest_memfd {
	uint64_t size, flags, reserved[6];
};
#define SET_USER_MEMORY_REGION2 _IOW(KVMIO, 0x49, struct memory_region2)
#define SET_MEMORY_ATTRIBUTES   _IOW(KVMIO, 0xd2, struct memory_attributes)
#define CREATE_GUEST_MEMFD      _IOWR(KVMIO, 0xd4, struct create_guest_memfd)
#define MEM_GUEST_MEMFD         (1u << 2)
#define ATTRIBUTE_PRIVATE       (1ull << 3)
#define SW_PROTECTED_VM         1

static unsigned long vm_type;
static int kvm, vm, vcpu;
static struct kvm_run *run;
static char *ram;
static pthread_t thread;

static int call(int fd, const char *name, unsigned long cmd, unsigned long arg)
{
	int ret = ioctl(fd, cmd, arg);

	if (ret < 0)
		err(1, "%s", name);
	return ret;
}
#define CALL(fd, cmd, arg) call(fd, #cmd, cmd, (unsigned long)(arg))

static uint64_t now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static double median(double *v, int n)
{
	qsort(v, (size_t)n, sizeof(*v), by_value);
	return v[n / 2];
}

static char *map(size_t size)
{
	char *p = mmap(NULL, size, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (p == MAP_FAILED)
		err(1, "mmap");
	return p;
}

static void set_slot(uint32_t id, uint32_t flags, uint64_t gpa, uint64_t size, const void *hva)
{
	struct kvm_userspace_memory_region r = {
		.slot = id,
		.flags = flags,
		.guest_phys_addr = gpa,
		.memory_size = size,
		.userspace_addr = (uintptr_t)hva,
	};

	CALL(vm, KVM_SET_USER_MEMORY_REGION, &r);
}

/* ---- the guest ----------------------------------------------------------------------- */

static void setup(void)
{
	uint64_t *table;

	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		err(1, "/dev/kvm");
	vm = CALL(kvm, KVM_CREATE_VM, vm_type);
	ram = map(RAM);
	memcpy(ram + CODE, g_spin, (size_t)(g_end - g_spin));
	table = (uint64_t *)ram;
	table[0x1000 / 8] = 0x2007;
	table[0x2000 / 8] = 0x3007;
	table[0x2008 / 8] = 0x4007;
	for (uint64_t i = 0; i < 512; i++) {
		table[0x3000 / 8 + i] = i << 21 | 0xe7;
		table[0x4000 / 8 + i] = (TOUCH_GPA + (i << 21)) | 0xe7;
	}
	set_slot(ID_RAM, 0, 0, RAM, ram);
	vcpu = CALL(vm, KVM_CREATE_VCPU, 0);
	run = mmap(NULL, (size_t)CALL(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE,
		   MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED)
		err(1, "mmap of the vCPU");
}

/* Ring 3: some software KVMs run that natively and emulate ring 0. */
static void enter(const char *guest, uint64_t at, uint64_t count, uint64_t step)
{
	struct kvm_segment seg = {.limit = -1u, .present = 1, .s = 1, .g = 1, .dpl = 3};
	struct kvm_regs regs = {
		.rip = CODE + (uint64_t)(guest - g_spin),
		.rflags = 0x3002, /* IOPL 3: OUT in any ring */
		.rsp = STACK,
		.rbx = at,
		.rcx = count,
		.rdx = step,
	};
	struct kvm_sregs sregs;

	/* Finish what the last exit left open: it would go to the new registers. */
	run->immediate_exit = 1;
	ioctl(vcpu, KVM_RUN, 0);
	run->immediate_exit = 0;
	CALL(vcpu, KVM_GET_SREGS, &sregs);
	sregs.cr0 = 0x80050033;
	sregs.cr3 = 0x1000;
	sregs.cr4 = 0x620;
	sregs.efer = 0x500;
	seg.type = 3;
	seg.selector = 0x13;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = seg;
	seg.type = 11;
	seg.selector = 0xb;
	seg.l = 1;
	sregs.cs = seg;
	CALL(vcpu, KVM_SET_SREGS, &sregs);
	CALL(vcpu, KVM_SET_REGS, &regs);
}

static void run_to_end(void)
{
	CALL(vcpu, KVM_RUN, 0);
	if (run->exit_reason != KVM_EXIT_IO)
		errx(1, "exit reason %u", run->exit_reason);
}

static void *spin(void *arg)
{
	if (kvm)
		run_to_end();
	while (!kvm && !__atomic_load_n((uint32_t *)(ram + FLAG), __ATOMIC_RELAXED))
		;
	return NULL;
}

/* @mode: "run" starts a vCPU that runs until stop(); where there is no VM, a mere thread. */
static bool start(const char *mode)
{
	if (strcmp(mode, "run")) {
		if (strcmp(mode, "idle"))
			errx(2, "'%s' is neither idle nor run", mode);
		return false;
	}
	if (kvm)
		enter(g_spin, FLAG + 8, 0, 0);
	if (pthread_create(&thread, NULL, spin, NULL))
		errx(1, "pthread_create");
	usleep(20000); /* into the guest */
	return true;
}

static void stop(bool running)
{
	if (!running)
		return;
	__atomic_store_n((uint32_t *)(ram + FLAG), 1, __ATOMIC_SEQ_CST);
	pthread_join(thread, NULL);
	__atomic_store_n((uint32_t *)(ram + FLAG), 0, __ATOMIC_SEQ_CST);
}

static void make_others(unsigned n)
{
	char *mem = map(n * PAGE + PAGE);

	for (unsigned i = 0; i < n; i++)
		set_slot(ID_OTHERS + i, 0, (i & 1 ? OTHERS_TOP : OTHERS_LOW) + i * 2 * PAGE, PAGE,
			 mem + i * PAGE);
}

/* ---- measurements -------------------------------------------------------------------- */

enum { CREATE, LOG_ON, LOG_OFF, MOVE, DELETE, CHANGES };

static void slots(unsigned long mib, unsigned others, const char *mode)
{
	static const char *const names[CHANGES] = {"create", "log-on", "log-off", "move", "delete"};
	int n = mib > 64 ? 101 : 401;
	double *v[CHANGES];
	char *mem = map(mib * MIB);
	bool running;

	make_others(others);
	for (int c = 0; c < CHANGES; c++)
		v[c] = calloc((size_t)n, sizeof(double));
	running = start(mode);
	for (int i = -5; i < n; i++) {
		uint64_t t[CHANGES + 1];

		t[0] = now();
		set_slot(ID_TEST, 0, TEST_GPA, mib * MIB, mem);
		t[1] = now();
		set_slot(ID_TEST, KVM_MEM_LOG_DIRTY_PAGES, TEST_GPA, mib * MIB, mem);
		t[2] = now();
		set_slot(ID_TEST, 0, TEST_GPA, mib * MIB, mem);
		t[3] = now();
		set_slot(ID_TEST, 0, TEST_GPA2, mib * MIB, mem);
		t[4] = now();
		set_slot(ID_TEST, 0, TEST_GPA2, 0, mem);
		t[5] = now();
		for (int c = 0; i >= 0 && c < CHANGES; c++)
			v[c][i] = (double)(t[c + 1] - t[c]);
	}
	stop(running);
	for (int c = 0; c < CHANGES; c++)
		printf("%s/%lu/%u/%s %.0f ns\n", names[c], mib, others, mode, median(v[c], n));
}

/* Memory of which each page is touched first: @huge of 2 MiB, else of 4 KiB. */
static char *untouched(bool huge, size_t size)
{
	char *mem = map(size + 2 * MIB);

	mem = (char *)(((uintptr_t)mem + 2 * MIB - 1) & ~(2 * MIB - 1));
	if (madvise(mem, size, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE))
		err(1, "madvise");
	return mem;
}

static void touch_native(char *at, uint64_t count, uint64_t step)
{
	__asm__ volatile("1: mov %%rax, (%0); add %2, %0; dec %1; jnz 1b"
			 : "+r"(at), "+r"(count)
			 : "r"(step)
			 : "memory", "cc");
}

static void fault(const char *kind, bool native)
{
	bool huge = !strcmp(kind, "2m");
	size_t size = huge ? GIB : 256 * MIB, step = huge ? 2 * MIB : PAGE;
	char *mem = untouched(huge, size);
	double v[7];

	if (!native) {
		setup();
		set_slot(ID_TOUCH, 0, TOUCH_GPA, size, mem);
	}
	for (int i = -1; i < 7; i++) {
		uint64_t t;

		madvise(mem, size, MADV_DONTNEED);
		if (!native)
			enter(g_touch, GIB, size / step, step);
		t = now();
		if (native)
			touch_native(mem, size / step, step);
		else
			run_to_end();
		t = now() - t;
		if (i >= 0)
			v[i] = (double)(size / step) * 1e9 / (double)t;
	}
	printf("fault%s/%s %.0f pages/s\n", native ? "-native" : "", kind, median(v, 7));
}

/* munmap of a page that was touched and that no slot has to do with. */
static void unmap(const char *slot_count, const char *mode)
{
	enum { N = 256, SAMPLES = 401 };
	static double v[SAMPLES];
	bool running = false;
	char *area;

	if (strcmp(slot_count, "none")) {
		setup();
		make_others((unsigned)strtoul(slot_count, NULL, 0) - 1);
	} else {
		ram = map(RAM);
	}
	running = start(mode);
	area = map(2 * N * PAGE);
	for (int s = 0; s < SAMPLES; s++) {
		uint64_t t;

		for (int i = 0; i < N; i++) {
			char *p = mmap(area + 2 * (size_t)i * PAGE, PAGE, PROT_READ | PROT_WRITE,
				       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);

			*(volatile char *)p = 1;
		}
		t = now();
		for (int i = 0; i < N; i++)
			munmap(area + 2 * (size_t)i * PAGE, PAGE);
		v[s] = (double)(now() - t) / N;
	}
	stop(running);
	printf("unmap/%s/%s %.0f ns\n", slot_count, mode, median(v, SAMPLES));
}

/* munmap of one page of a slot that the guest has mapped. */
static void unmap_slot(const char *mode)
{
	enum { SAMPLES = 501, PAGES = 256 };
	static double v[SAMPLES];
	char *mem = untouched(false, PAGES * PAGE);
	bool running;

	setup();
	set_slot(ID_TOUCH, 0, TOUCH_GPA, PAGES * PAGE, mem);
	for (int s = 0; s < SAMPLES; s += PAGES) {
		/* The guest maps them all, then they go one by one. */
		if (s)
			mmap(mem, PAGES * PAGE, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
		enter(g_touch, GIB, PAGES, PAGE);
		run_to_end();
		running = start(mode);
		for (int i = 0; i < PAGES && s + i < SAMPLES; i++) {
			uint64_t t = now();

			munmap(mem + (size_t)i * PAGE, PAGE);
			v[s + i] = (double)(now() - t);
		}
		stop(running);
	}
	printf("unmap-slot/%s %.0f ns\n", mode, median(v, SAMPLES));
}

/* ---- private memory -------------------------------------------------------------------- */

static int new_file(size_t size)
{
	struct create_guest_memfd c = {.size = size};

	return CALL(vm, CREATE_GUEST_MEMFD, &c);
}

static void bind_slot(size_t size, const char *hva, int file)
{
	struct memory_region2 r = {
		.slot = ID_TOUCH,
		.flags = MEM_GUEST_MEMFD,
		.guest_phys_addr = TOUCH_GPA,
		.memory_size = size,
		.userspace_addr = (uintptr_t)hva,
		.guest_memfd = (uint32_t)file,
	};

	CALL(vm, SET_USER_MEMORY_REGION2, &r);
}

static void convert_range(uint64_t gpa, uint64_t size, bool private)
{
	struct memory_attributes a = {
		.address = gpa, .size = size, .attributes = private ? ATTRIBUTE_PRIVATE : 0};

	CALL(vm, SET_MEMORY_ATTRIBUTES, &a);
}

static void file_calls(unsigned long mib)
{
	enum { CREATE_FILE, ALLOCATE, PUNCH, N };
	static const char *const names[N] = {"create", "allocate", "punch"};
	size_t size = mib * MIB;
	int n = mib > 256 ? 5 : 15;
	double v[N][15];

	setup();
	for (int i = -1; i < n; i++) {
		uint64_t t[N + 1];
		int fd;

		t[0] = now();
		fd = new_file(size);
		t[1] = now();
		if (fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, (off_t)size))
			err(1, "allocate");
		t[2] = now();
		if (fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, 0, (off_t)size))
			err(1, "punch");
		t[3] = now();
		close(fd);
		for (int c = 0; i >= 0 && c < N; c++)
			v[c][i] = (double)(t[c + 1] - t[c]) / 1000;
	}
	for (int c = 0; c < N; c++)
		printf("file-%s/%lu %.0f us\n", names[c], mib, median(v[c], n));
}

static void fault_memory(const char *kind)
{
	bool private = !strcmp(kind, "private");
	size_t size = 256 * MIB;
	char *mem = untouched(false, size);
	int memfd = memfd_create("bench", 0), file = -1;
	double v[7];

	vm_type = SW_PROTECTED_VM;
	setup();
	if (!strcmp(kind, "memfd") &&
	    (ftruncate(memfd, (off_t)size) || mmap(mem, size, PROT_READ | PROT_WRITE,
						   MAP_SHARED | MAP_FIXED, memfd, 0) == MAP_FAILED))
		err(1, "memfd");
	file = new_file(size);
	bind_slot(size, mem, file);
	if (private)
		convert_range(TOUCH_GPA, size, true);
	for (int i = -1; i < 7; i++) {
		int fd = private ? file : memfd;
		uint64_t t;

		if (!strcmp(kind, "anon"))
			madvise(mem, size, MADV_DONTNEED);
		else if (fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, 0, (off_t)size))
			err(1, "fallocate");
		enter(g_touch, GIB, size / PAGE, PAGE);
		t = now();
		run_to_end();
		t = now() - t;
		if (i >= 0)
			v[i] = (double)(size / PAGE) * 1e9 / (double)t;
	}
	printf("fault-memory/%s %.0f pages/s\n", kind, median(v, 7));
}

static void *run_second(void *arg)
{
	int *second = arg;

	CALL(*second, KVM_RUN, 0);
	return NULL;
}

/* Back and forth, while vCPUs run elsewhere and have to be waited for. */
static void convert(const char *kind, unsigned vcpus)
{
	size_t size = 64 * MIB, step = !strcmp(kind, "2m") ? 2 * MIB : PAGE;
	int rounds = step == PAGE ? 3 : 400, first, second = -1;
	char *mem = untouched(false, size);
	struct kvm_run *first_run;
	pthread_t other;
	bool running;
	double v[5];

	vm_type = SW_PROTECTED_VM;
	setup();
	bind_slot(size, mem, new_file(size));
	running = start("run");
	if (vcpus == 2) {
		first = vcpu;
		first_run = run;
		second = vcpu = CALL(vm, KVM_CREATE_VCPU, 1);
		run = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
		if (run == MAP_FAILED)
			err(1, "mmap of the vCPU");
		enter(g_spin, FLAG + 16, 0, 0);
		vcpu = first;
		run = first_run;
		pthread_create(&other, NULL, run_second, &second);
		usleep(20000);
	}
	for (int i = -1; i < 5; i++) {
		uint64_t t = now();

		for (int r = 0; r < rounds; r++)
			for (int private = 1; private >= 0; private --)
				for (size_t at = 0; at < size; at += step)
					convert_range(TOUCH_GPA + at, step, private);
		t = now() - t;
		if (i >= 0)
			v[i] = 2.0 * rounds * (double)(size / PAGE) * 1e9 / (double)t;
	}
	__atomic_store_n((uint32_t *)(ram + FLAG), 1, __ATOMIC_SEQ_CST);
	if (vcpus == 2)
		pthread_join(other, NULL);
	stop(running);
	printf("convert/%s/%u %.0f pages/s\n", kind, vcpus, median(v, 5));
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";

	if (!strcmp(what, "slots") && argc == 5) {
		setup();
		slots(strtoul(argv[2], NULL, 0), (unsigned)strtoul(argv[3], NULL, 0), argv[4]);
	} else if (!strcmp(what, "fault") && argc == 3) {
		fault(argv[2], false);
	} else if (!strcmp(what, "fault-native") && argc == 3) {
		fault(argv[2], true);
	} else if (!strcmp(what, "unmap") && argc == 4) {
		unmap(argv[2], argv[3]);
	} else if (!strcmp(what, "unmap-slot") && argc == 3) {
		unmap_slot(argv[2]);
	} else if (!strcmp(what, "file") && argc == 3) {
		file_calls(strtoul(argv[2], NULL, 0));
	} else if (!strcmp(what, "fault-memory") && argc == 3) {
		fault_memory(argv[2]);
	} else if (!strcmp(what, "convert") && argc == 4) {
		convert(argv[2], (unsigned)strtoul(argv[3], NULL, 0));
	} else {
		errx(2, "usage: mem-bench slots SIZE-MIB OTHERS idle|run | fault 4k|2m | "
			"fault-native 4k|2m | unmap none|SLOTS idle|run | unmap-slot idle|run | "
			"file SIZE-MIB | fault-memory anon|memfd|private | convert 4k|2m VCPUS");
	}
	return 0;
}
