/* SPDX-License-Identifier: MIT */
/*
 * What KVM operations cost. Uses <linux/kvm.h> only, so that the same program measures a
 * real /dev/kvm and, under `kvmlet run`, kvmlet. bench/run drives it.
 *
 *   kvm-bench MEASUREMENT...           prints "name value unit" for each
 *   kvm-bench launch COMMAND ARGS...   starts COMMAND, which measures "start" from here
 */
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CODE    0x10000ul
#define STACK   0x80000ul
#define RAM     0x400000ul /* 4 MiB of memory, then nothing */
#define DEVICE  0x400000ul
#define PORT    0x3f8
#define SAMPLES 5
#define SAMPLE  60000000ull /* ns that one sample lasts at least */

/*
 * The guests. Loops take their count in %rcx and end with an OUT; the number of
 * instructions for one round stands in the table below.
 */
__asm__(".pushsection .rodata\n"
	"g_pio:		mov $0x3f8, %edx\n"
	"1:		out %al, %dx; jmp 1b\n"
	"g_pio_in:	mov $0x3f8, %edx\n"
	"1:		in %dx, %al; jmp 1b\n"
	"g_mmio:	mov $0x400000, %ebx\n"
	"1:		mov %eax, (%rbx); jmp 1b\n"
	"g_mmio_read:	mov $0x400000, %ebx\n"
	"1:		mov (%rbx), %eax; jmp 1b\n"
	/* xorshift: registers only */
	"g_int:		mov $88172645463325252, %rax\n"
	"1:		mov %rax, %rdx; shl $13, %rdx; xor %rdx, %rax\n"
	"		mov %rax, %rdx; shr $7, %rdx; xor %rdx, %rax\n"
	"		mov %rax, %rdx; shl $17, %rdx; xor %rdx, %rax\n"
	"		dec %rcx; jnz 1b\n"
	"		mov $0x3f8, %edx; out %al, %dx; jmp g_int\n"
	/* loads and stores over 1 MiB */
	"g_mem:		mov $0x200000, %ebx; xor %esi, %esi\n"
	"1:		mov (%rbx,%rsi), %rax; add %rcx, %rax; mov %rax, (%rbx,%rsi)\n"
	"		add $72, %esi; and $0xffff8, %esi; dec %rcx; jnz 1b\n"
	"		mov $0x3f8, %edx; out %al, %dx; jmp g_mem\n"
	/* calls, returns, pushes, pops */
	"g_call:	\n"
	"1:		call 2f; dec %rcx; jnz 1b\n"
	"		mov $0x3f8, %edx; out %al, %dx; jmp g_call\n"
	"2:		push %rcx; call 3f; pop %rcx; ret\n"
	"3:		lea 1(%rax), %rax; ret\n"
	"g_end:\n"
	".popsection\n");
extern const char g_pio[], g_pio_in[], g_mmio[], g_mmio_read[], g_int[], g_mem[], g_call[], g_end[];

static int kvm, vm, vcpu;
static struct kvm_run *run;

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

static void setup(void)
{
	char *ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct kvm_userspace_memory_region region = {
		.memory_size = RAM,
		.userspace_addr = (uintptr_t)ram,
	};
	uint64_t *table = (uint64_t *)ram;

	if (ram == MAP_FAILED)
		err(1, "mmap");
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		err(1, "/dev/kvm");
	vm = CALL(kvm, KVM_CREATE_VM, 0);
	memcpy(ram + CODE, g_pio, (size_t)(g_end - g_pio));
	table[0x1000 / 8] = 0x2007;
	table[0x2000 / 8] = 0x3007;
	for (uint64_t i = 0; i < 3; i++)
		table[0x3000 / 8 + i] = i << 21 | 0x87;
	CALL(vm, KVM_SET_USER_MEMORY_REGION, &region);

	vcpu = CALL(vm, KVM_CREATE_VCPU, 0);
	run = mmap(NULL, (size_t)CALL(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE,
		   MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED)
		err(1, "mmap of the vCPU");
}

/*
 * Flat 64-bit mode, ring 0 or 3. Some software KVMs run ring 3 natively and emulate ring 0: a
 * guest that computes does it in ring 3, as most guests do.
 */
static void set_ring(unsigned ring)
{
	struct kvm_segment seg = {.limit = -1u, .present = 1, .s = 1, .g = 1, .dpl = (uint8_t)ring};
	struct kvm_sregs sregs;

	CALL(vcpu, KVM_GET_SREGS, &sregs);
	sregs.cr0 = 0x80050033;
	sregs.cr3 = 0x1000;
	sregs.cr4 = 0x620;
	sregs.efer = 0x500;
	seg.type = 3;
	seg.selector = (uint16_t)(16 | ring);
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = seg;
	seg.type = 11;
	seg.selector = (uint16_t)(8 | ring);
	seg.l = 1;
	sregs.cs = seg;
	CALL(vcpu, KVM_SET_SREGS, &sregs);
}

static void enter(const char *guest, uint64_t count)
{
	struct kvm_regs regs = {
		.rip = CODE + (uint64_t)(guest - g_pio),
		.rflags = 0x3002, /* IOPL 3: OUT in any ring */
		.rsp = STACK,
		.rcx = count,
	};

	/* Finish what the last exit left open: it would go to the new registers. */
	run->immediate_exit = 1;
	if (ioctl(vcpu, KVM_RUN, 0) >= 0 || errno != EINTR)
		errx(1, "KVM_RUN ignores immediate_exit");
	run->immediate_exit = 0;
	CALL(vcpu, KVM_SET_REGS, &regs);
}

static void run_until(unsigned reason)
{
	CALL(vcpu, KVM_RUN, 0);
	if (run->exit_reason != reason)
		errx(1, "exit reason %u, not %u", run->exit_reason, reason);
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

/* ns for one call of @op, which does @arg's exit once. */
static double time_op(void (*op)(unsigned), unsigned arg)
{
	uint64_t n = 1, start, took;
	double v[SAMPLES];

	for (;; n *= 2) { /* warm up, and find how many calls make a sample */
		start = now();
		for (uint64_t i = 0; i < n; i++)
			op(arg);
		took = now() - start;
		if (took > SAMPLE)
			break;
	}
	for (int s = 0; s < SAMPLES; s++) {
		start = now();
		for (uint64_t i = 0; i < n; i++)
			op(arg);
		v[s] = (double)(now() - start) / (double)n;
	}
	return median(v, SAMPLES);
}

static void op_check_extension(unsigned arg)
{
	CALL(vm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY);
}

static double exits(const char *guest, unsigned reason)
{
	enter(guest, 0);
	return time_op(run_until, reason);
}

/* Millions of guest instructions a second. */
static double mips(const char *guest, unsigned per_round)
{
	uint64_t n = 1000, start, took;
	double v[SAMPLES];

	for (;; n *= 2) {
		enter(guest, n);
		start = now();
		run_until(KVM_EXIT_IO);
		took = now() - start;
		if (took > SAMPLE)
			break;
	}
	for (int s = 0; s < SAMPLES; s++) {
		enter(guest, n);
		start = now();
		run_until(KVM_EXIT_IO);
		v[s] = (double)n * per_round * 1e3 / (double)(now() - start);
	}
	return median(v, SAMPLES);
}

/* The instructions of g_int on the bare CPU: what a guest could reach at best. */
static double native_mips(void)
{
	uint64_t n = 20000000, left, x, y, began;
	double v[SAMPLES];

	for (int s = 0; s < SAMPLES; s++) {
		left = n;
		x = 88172645463325252;
		began = now();
		__asm__ volatile("1: mov %0, %1; shl $13, %1; xor %1, %0\n"
				 "   mov %0, %1; shr $7, %1; xor %1, %0\n"
				 "   mov %0, %1; shl $17, %1; xor %1, %0\n"
				 "   dec %2; jnz 1b\n"
				 : "+r"(x), "=&r"(y), "+r"(left)
				 :
				 : "cc");
		v[s] = (double)n * 11e3 / (double)(now() - began);
	}
	return median(v, SAMPLES);
}

static double start(void)
{
	const char *t0 = getenv("KVM_BENCH_T0");

	if (!t0)
		errx(2, "'start' is measured through 'launch'");
	return (double)(now() - strtoull(t0, NULL, 10)) / 1e6;
}

static int launch(char **argv)
{
	char t0[32];
	int status;
	pid_t pid;

	snprintf(t0, sizeof(t0), "%llu", (unsigned long long)now());
	setenv("KVM_BENCH_T0", t0, 1);
	pid = fork();
	if (pid < 0)
		err(1, "fork");
	if (!pid) {
		execvp(argv[0], argv);
		err(127, "%s", argv[0]);
	}
	while (waitpid(pid, &status, 0) < 0)
		;
	return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

static void measure(const char *name)
{
	static const struct {
		const char *name, *guest;
		unsigned reason, per_round;
	} table[] = {
		{"pio", g_pio, KVM_EXIT_IO, 0},     {"pio-in", g_pio_in, KVM_EXIT_IO, 0},
		{"mmio", g_mmio, KVM_EXIT_MMIO, 0}, {"mmio-read", g_mmio_read, KVM_EXIT_MMIO, 0},
		{"int-loop", g_int, 0, 11},         {"mem-loop", g_mem, 0, 7},
		{"call-loop", g_call, 0, 9},
	};

	if (!strcmp(name, "check-extension")) {
		printf("%s %.1f ns\n", name, time_op(op_check_extension, 0));
		return;
	}
	if (!strcmp(name, "int-native")) {
		printf("%s %.1f MIPS\n", name, native_mips());
		return;
	}
	if (!strcmp(name, "start")) { /* the first guest instruction is an OUT */
		set_ring(0);
		enter(g_pio + 5, 0);
		run_until(KVM_EXIT_IO);
		printf("%s %.2f ms\n", name, start());
		return;
	}
	for (unsigned i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
		if (strcmp(name, table[i].name))
			continue;
		set_ring(table[i].per_round ? 3 : 0);
		if (table[i].per_round)
			printf("%s %.1f MIPS\n", name, mips(table[i].guest, table[i].per_round));
		else
			printf("%s %.1f ns\n", name, exits(table[i].guest, table[i].reason));
		return;
	}
	errx(2, "unknown measurement '%s'", name);
}

int main(int argc, char **argv)
{
	if (argc > 2 && !strcmp(argv[1], "launch"))
		return launch(argv + 2);
	if (argc < 2)
		errx(2, "usage: kvm-bench pio|pio-in|mmio|mmio-read|check-extension|int-loop|"
			"mem-loop|call-loop|int-native ...");
	setup();
	for (int i = 1; i < argc; i++) {
		measure(argv[i]);
		fflush(stdout);
	}
	return 0;
}
