/* SPDX-License-Identifier: MIT */
/*
 * What dirty logs cost. Uses <linux/kvm.h> only, so that the same program measures a real /dev/kvm
 * and, under `kvmlet run`, kvmlet. bench/run-dirty drives it.
 *
 *   dirty-bench bitmap GIB   us for KVM_GET_DIRTY_LOG of a slot of GIB GiB; ns a page for the guest
 *   dirty-bench manual GIB   us for KVM_CLEAR_DIRTY_LOG of all of the slot, and what is read first
 *   dirty-bench ring         ns for each entry that KVM_RESET_DIRTY_RINGS resets
 *
 * The guest writes to 0, 1 (every hundredth) or 100 percent of the pages of the first GiB; the rest
 * of a larger slot is sparse. Each line is "name value unit", a median.
 */
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

#define PAGE    4096ul
#define MIB     (1ul << 20)
#define GIB     (1ul << 30)
#define CODE    0x10000ul
#define STACK   0x80000ul
#define RAM     (4 * MIB)
#define GPA     (4 * GIB)
#define VIRT    GIB /* where the guest sees the first GiB of the slot */
#define PAGES   (GIB / PAGE)
#define SAMPLES 7
#define ENTRIES 65536u

__asm__(".pushsection .rodata\n"
	"g_touch:	mov %rax, (%rbx); add %rdx, %rbx; dec %rcx; jnz g_touch\n"
	"2:		mov $0x3f8, %edx; out %al, %dx; jmp 2b\n"
	"g_end:\n"
	".popsection\n");
extern const char g_touch[], g_end[];

static int kvm, vm, vcpu;
static struct kvm_run *run;
static char *mem;
static uint64_t *bitmap;

static int call(int fd, const char *name, unsigned long cmd, unsigned long arg)
{
	int ret = ioctl(fd, cmd, arg);

	if (ret < 0)
		err(1, "%s", name);
	return ret;
}
#define CALL(fd, cmd, arg) call(fd, #cmd, cmd, (unsigned long)(arg))

static double clock_ns(clockid_t clock)
{
	struct timespec ts;

	clock_gettime(clock, &ts);
	return (double)ts.tv_sec * 1e9 + (double)ts.tv_nsec;
}

static double now(void)
{
	return clock_ns(CLOCK_MONOTONIC);
}

/* For what takes so long that others run in between. */
static double cpu_time(void)
{
	return clock_ns(CLOCK_THREAD_CPUTIME_ID);
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static double median(double *v)
{
	qsort(v, SAMPLES, sizeof(*v), by_value);
	return v[SAMPLES / 2];
}

static void *map(size_t size)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (p == MAP_FAILED)
		err(1, "mmap");
	return p;
}

static void set_slot(uint32_t id, uint32_t flags, uint64_t gpa, uint64_t size, const void *hva)
{
	struct kvm_userspace_memory_region r = {id, flags, gpa, size, (uintptr_t)hva};

	CALL(vm, KVM_SET_USER_MEMORY_REGION, &r);
}

static void enable(uint32_t what, uint64_t arg)
{
	struct kvm_enable_cap cap = {.cap = what, .args = {arg}};

	CALL(vm, KVM_ENABLE_CAP, &cap);
}

static void setup(uint64_t gib, uint32_t cap, uint64_t arg)
{
	char *ram = map(RAM);
	uint64_t *table = (uint64_t *)(void *)ram;

	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		err(1, "/dev/kvm");
	vm = CALL(kvm, KVM_CREATE_VM, 0);
	if (cap)
		enable(cap, arg);
	memcpy(ram + CODE, g_touch, (size_t)(g_end - g_touch));
	table[0x1000 / 8] = 0x2007;
	table[0x2000 / 8] = 0x3007;
	table[0x2008 / 8] = 0x4007;
	for (uint64_t i = 0; i < 512; i++) {
		table[0x3000 / 8 + i] = i << 21 | 0xe7;
		table[0x4000 / 8 + i] = (GPA + (i << 21)) | 0xe7;
	}
	set_slot(0, 0, 0, RAM, ram);
	vcpu = CALL(vm, KVM_CREATE_VCPU, 0);
	run = mmap(NULL, (size_t)CALL(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE,
		   MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED)
		err(1, "mmap of the vCPU");
	mem = map(gib * GIB);
	madvise(mem, gib * GIB, MADV_NOHUGEPAGE);
	memset(mem, 1, GIB);
	bitmap = map(gib * PAGES / 8);
	memset(bitmap, 1, gib * PAGES / 8);
	set_slot(1, KVM_MEM_LOG_DIRTY_PAGES, GPA, gib * GIB, mem);
}

/* The guest writes @count pages, @step apart. Ring 3: some software KVMs run that natively. */
static double touch(uint64_t count, uint64_t step)
{
	struct kvm_segment seg = {.limit = -1u, .present = 1, .s = 1, .g = 1, .dpl = 3};
	struct kvm_regs regs = {
		.rip = CODE, .rflags = 0x3002, .rsp = STACK, .rbx = VIRT, .rcx = count};
	struct kvm_sregs sregs;
	double t;

	regs.rdx = step * PAGE;
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
	t = cpu_time();
	CALL(vcpu, KVM_RUN, 0);
	t = cpu_time() - t;
	if (run->exit_reason != KVM_EXIT_IO)
		errx(1, "exit reason %u", run->exit_reason);
	return t;
}

static double get(void)
{
	struct kvm_dirty_log log = {.slot = 1, .dirty_bitmap = bitmap};
	double t = now();

	CALL(vm, KVM_GET_DIRTY_LOG, &log);
	return now() - t;
}

static double clear(uint64_t pages)
{
	double t = now();

	/* num_pages has 32 bits. */
	for (uint64_t first = 0; first < pages;) {
		struct kvm_clear_dirty_log log = {.slot = 1,
						  .first_page = first,
						  .num_pages = (uint32_t)(pages - first),
						  .dirty_bitmap = bitmap + first / 64};

		CALL(vm, KVM_CLEAR_DIRTY_LOG, &log);
		first += log.num_pages;
	}
	return now() - t;
}

static void bitmaps(uint64_t gib)
{
	double v[3][SAMPLES], pass[3][SAMPLES];

	setup(gib, 0, 0);
	touch(PAGES, 1);
	get();
	for (int i = 0; i < SAMPLES; i++) {
		get();
		v[0][i] = get() / 1e3;
		touch(PAGES / 100, 100);
		v[1][i] = get() / 1e3;
		pass[0][i] = touch(PAGES, 1) / PAGES; /* behind a log that was taken */
		pass[1][i] = touch(PAGES, 1) / PAGES; /* all of it is marked */
		v[2][i] = get() / 1e3;
	}
	set_slot(1, 0, GPA, gib * GIB, mem);
	touch(PAGES, 1);
	for (int i = 0; i < SAMPLES; i++)
		pass[2][i] = touch(PAGES, 1) / PAGES;
	printf("get/%lu/0 %.2f us\n", gib, median(v[0]));
	printf("get/%lu/1 %.2f us\n", gib, median(v[1]));
	printf("get/%lu/100 %.2f us\n", gib, median(v[2]));
	printf("pass/%lu/taken %.2f ns\n", gib, median(pass[0]));
	printf("pass/%lu/marked %.2f ns\n", gib, median(pass[1]));
	printf("pass/%lu/off %.2f ns\n", gib, median(pass[2]));
}

static void manual(uint64_t gib)
{
	double v[2][3][SAMPLES];

	setup(gib, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
	touch(PAGES, 1);
	get();
	clear(gib * PAGES);
	for (int i = 0; i < SAMPLES; i++)
		for (int k = 0; k < 3; k++) {
			if (k)
				touch(k == 1 ? PAGES / 100 : PAGES, k == 1 ? 100 : 1);
			v[0][k][i] = get() / 1e3;
			v[1][k][i] = clear(gib * PAGES) / 1e3;
		}
	for (int k = 0; k < 3; k++) {
		static const int percent[] = {0, 1, 100};

		printf("keep/%lu/%d %.2f us\n", gib, percent[k], median(v[0][k]));
		printf("clear/%lu/%d %.2f us\n", gib, percent[k], median(v[1][k]));
	}
}

static void ring(void)
{
	struct kvm_dirty_gfn *e;
	double v[SAMPLES];
	uint32_t next = 0;

	setup(1, KVM_CAP_DIRTY_LOG_RING, ENTRIES * sizeof(*e));
	e = mmap(NULL, ENTRIES * sizeof(*e), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu,
		 KVM_DIRTY_LOG_PAGE_OFFSET * PAGE);
	if (e == MAP_FAILED)
		err(1, "mmap of the ring");
	for (int i = 0; i < SAMPLES; i++) {
		int n = 0;
		double t;

		touch(ENTRIES / 2, 1);
		for (; e[next % ENTRIES].flags == KVM_DIRTY_GFN_F_DIRTY; next++, n++)
			e[next % ENTRIES].flags = KVM_DIRTY_GFN_F_RESET;
		t = now();
		if (CALL(vm, KVM_RESET_DIRTY_RINGS, 0) != n || !n)
			errx(1, "%d entries were collected", n);
		v[i] = (now() - t) / n;
	}
	printf("reset %.2f ns\n", median(v));
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";

	if (!strcmp(what, "bitmap") && argc == 3)
		bitmaps(strtoul(argv[2], NULL, 0));
	else if (!strcmp(what, "manual") && argc == 3)
		manual(strtoul(argv[2], NULL, 0));
	else if (!strcmp(what, "ring") && argc == 2)
		ring();
	else
		errx(2, "usage: dirty-bench bitmap GIB | manual GIB | ring");
	return 0;
}
