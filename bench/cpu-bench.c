/* SPDX-License-Identifier: MIT */
/*
 * What guest code costs. One flat program, run in four ways:
 *
 *   cpu-bench native       its kernels called in this process
 *   cpu-bench kvm          as a guest of /dev/kvm, in ring 3; under `kvmlet run`, of kvmlet
 *   cpu-bench ring0        the same in ring 0, with the kernels that need it
 *   cpu-bench qemu PROGRAM as a guest of QEMU's system emulator, which is the command given
 *
 * It prints "name ns" for each run of each kernel, and as third column the instructions of it if
 * the vCPU has that statistic. The guest brackets each kernel with an OUT; what counts is the CPU
 * time in between, of QEMU the time.
 */
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MIB (1ul << 20)

/* Physical addresses. The second view of the data is the one with 4 KiB pages. */
#define IMAGE  0x100000ul /* Multiboot header and start for QEMU */
#define CODE   0x101000ul
#define TABLE  0x10f000ul /* where guest_main is, then the list of kernels */
#define PAGES  0x110000ul /* page tables: top, next, large pages, then the small ones */
#define STACK  0x200000ul
#define DATA   0x4000000ul
#define SIZE   (64 * MIB)
#define SMALL  0x10000000ul /* where DATA is seen with 4 KiB pages */
#define RAM    (DATA + SIZE)
#define PORT   0xe9 /* QEMU's debug console */
#define ROUNDS 5

/* ---- the guest's code ----------------------------------------------------------------------- */

/* Everything in this section is copied; it refers to nothing outside. */
#define GUEST __attribute__((section("guest"), noinline, used, noclone, no_sanitize("all")))

struct entry {
	uint64_t fn, data, count;
};

typedef uint64_t kernel_fn(uint64_t *data, uint64_t count);

/* guest_main: rdi is the list. Each kernel between an 'S' and an 'E' on the debug console. */
__asm__(".pushsection guest, \"ax\"\n"
	"guest_main:	mov %rdi, %r12\n"
	"1:		mov (%r12), %rbx; test %rbx, %rbx; jz 2f\n"
	"		mov $'S', %eax; out %al, $0xe9\n"
	"		mov 8(%r12), %rdi; mov 16(%r12), %rsi; call *%rbx\n"
	"		mov $'E', %eax; out %al, $0xe9\n"
	"		add $24, %r12; jmp 1b\n"
	"2:		xor %eax, %eax; out %al, $0xf4\n" /* isa-debug-exit */
	"		jmp 2b\n"
	/* xorshift: registers only */
	"integer:	mov $88172645463325252, %rax\n"
	"1:		mov %rax, %rdx; shl $13, %rdx; xor %rdx, %rax\n"
	"		mov %rax, %rdx; shr $7, %rdx; xor %rdx, %rax\n"
	"		mov %rax, %rdx; shl $17, %rdx; xor %rdx, %rax\n"
	"		dec %rsi; jnz 1b\n"
	"		ret\n"
	/* each address depends on the load before, over 1 MiB; the word is written back changed */
	"chain:		xor %ecx, %ecx\n"
	"1:		mov (%rdi,%rcx,8), %rax; add $1, %rax; mov %rax, (%rdi,%rcx,8)\n"
	"		lea 7919(%rcx,%rax), %rcx; and $0x1ffff, %ecx\n"
	"		dec %rsi; jnz 1b\n"
	"		ret\n"
	/* 64 MiB, word by word */
	"sum:		xor %eax, %eax; xor %ecx, %ecx\n"
	"1:		add (%rdi,%rcx), %rax; add $8, %rcx; cmp $0x4000000, %rcx; jb 1b\n"
	"		dec %rsi; jnz sum\n"
	"		ret\n"
	/* y += a * x over 32 KiB of floats, 4 at once */
	"sse:		mov $0x3f800001, %eax; movd %eax, %xmm3; shufps $0, %xmm3, %xmm3\n"
	"2:		xor %ecx, %ecx\n"
	"1:		movaps (%rdi,%rcx), %xmm0; mulps %xmm3, %xmm0\n"
	"		addps 16384(%rdi,%rcx), %xmm0; movaps %xmm0, 16384(%rdi,%rcx)\n"
	"		add $16, %rcx; cmp $16384, %rcx; jb 1b\n"
	"		dec %rsi; jnz 2b\n"
	"		ret\n"
	/* one word of a random page of 64 MiB */
	"pages:		mov $88172645463325252, %rax\n"
	"1:		mov %rax, %rdx; shl $13, %rdx; xor %rdx, %rax\n"
	"		mov %rax, %rdx; shr $7, %rdx; xor %rdx, %rax\n"
	"		mov %rax, %rdx; shl $17, %rdx; xor %rdx, %rax\n"
	"		mov %rax, %rdx; and $0x3fff000, %edx; add %rcx, (%rdi,%rdx)\n"
	"		dec %rsi; jnz 1b\n"
	"		ret\n"
	/* a new address space, and 16 pages of it */
	"cr3:		mov %cr3, %rax; mov %rax, %cr3\n"
	"		xor %ecx, %ecx\n"
	"1:		add %rax, (%rdi,%rcx); add $4096, %ecx; cmp $65536, %ecx; jb 1b\n"
	"		dec %rsi; jnz cr3\n"
	"		ret\n"
	".popsection\n");
kernel_fn integer, chain, sum, sse, pages, cr3;
extern const char guest_main[], __start_guest[], __stop_guest[];

static GUEST uint64_t fib(uint64_t n)
{
	return n < 2 ? n : fib(n - 1) + fib(n - 2);
}

static GUEST uint64_t calls(uint64_t *data, uint64_t count)
{
	uint64_t x = 0;

	while (count--)
		x += fib(22);
	return x;
}

static GUEST void quicksort(int32_t *a, long lo, long hi)
{
	while (lo < hi) {
		int32_t pivot = a[lo + (hi - lo) / 2], x;
		long i = lo, j = hi;

		do {
			while (a[i] < pivot)
				i++;
			while (a[j] > pivot)
				j--;
			if (i <= j) {
				x = a[i];
				a[i++] = a[j];
				a[j--] = x;
			}
		} while (i <= j);
		quicksort(a, lo, j);
		lo = i;
	}
}

static GUEST uint64_t sort(uint64_t *data, uint64_t count)
{
	int32_t *a = (int32_t *)data;
	uint32_t x = 2463534242;

	while (count--) {
		for (long i = 0; i < 16384; i++) {
			x ^= x << 13;
			x ^= x >> 17;
			x ^= x << 5;
			a[i] = (int32_t)x;
		}
		quicksort(a, 0, 16383);
	}
	return (uint64_t)a[0];
}

static const struct kernel {
	const char *name;
	kernel_fn *fn;
	uint64_t data, count;
	int ring0;
} kernels[] = {
	{"integer", integer, DATA, 12000000, 0},
	{"chain", chain, DATA, 6000000, 0},
	{"sum", sum, DATA, 1, 0},
	{"sort", sort, DATA, 8, 0},
	{"sse", sse, DATA + 16 * MIB, 16000, 0}, /* zeros: no slow numbers */
	{"calls", calls, DATA, 60, 0},
	{"pages", pages, SMALL, 300000, 0},
	{"cr3", cr3, SMALL, 20000, 1},
};
#define NR_KERNELS (sizeof(kernels) / sizeof(kernels[0]))

/* CPU time of who runs the guest, where it can be had: other load does not count. */
static clockid_t cpu_clock = CLOCK_THREAD_CPUTIME_ID;

static uint64_t now(void)
{
	struct timespec ts;

	clock_gettime(cpu_clock, &ts);
	return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

/* ---- the image ------------------------------------------------------------------------------ */

/* What QEMU's Multiboot loader starts in 32-bit protected mode: on to 64-bit mode. */
#define STR_(x) #x
#define STR(x)  STR_(x)
__asm__(".pushsection .rodata\n"
	".balign 4\n"
	"boot:		.long 0x1badb002, 0x10000, -(0x1badb002 + 0x10000)\n"
	"		.long 0x100000, 0x100000, 0, 0, 0x100000 + 1f - boot\n"
	".code32\n"
	"1:		mov $0x110000, %eax; mov %eax, %cr3\n"
	"		mov $0x620, %eax; mov %eax, %cr4\n"
	"		mov $0xc0000080, %ecx; rdmsr; or $0x100, %eax; wrmsr\n"
	"		mov $0x80050033, %eax; mov %eax, %cr0\n"
	"		lgdt 0x100000 + 3f - boot\n"
	"		ljmp $8, $(0x100000 + 2f - boot)\n"
	".code64\n"
	"2:		mov $16, %eax; mov %eax, %ds; mov %eax, %es; mov %eax, %ss\n"
	"		mov $0x200000, %esp; mov $0x10f008, %edi; jmp *-8(%rdi)\n"
	".balign 8\n"
	"4:		.quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff\n"
	"3:		.word 23; .long 0x100000 + 4b - boot\n"
	"boot_end:\n"
	".popsection\n");
extern const char boot[], boot_end[];

static uint64_t guest_address(const void *p)
{
	return CODE + (uint64_t)((const char *)p - __start_guest);
}

/* Memory from IMAGE to STACK. */
static void fill_image(char *image, int ring0)
{
	uint64_t *start = (uint64_t *)(image + TABLE - IMAGE);
	struct entry *e = (struct entry *)(start + 1);
	uint64_t *table = (uint64_t *)(image + PAGES - IMAGE);
	uint64_t *large = table + 1024, *small = table + 1536;

	if (CODE + (uint64_t)(__stop_guest - __start_guest) > TABLE || boot_end - boot > 4096)
		errx(1, "the guest's code is too long");
	memcpy(image, boot, (size_t)(boot_end - boot));
	memcpy(image + CODE - IMAGE, __start_guest, (size_t)(__stop_guest - __start_guest));
	*start = guest_address(guest_main);
	for (unsigned r = 0; r < ROUNDS; r++)
		for (unsigned i = 0; i < NR_KERNELS; i++)
			if (ring0 || !kernels[i].ring0)
				*e++ = (struct entry){guest_address(kernels[i].fn), kernels[i].data,
						      kernels[i].count};
	table[0] = (PAGES + 4096) | 7;
	table[512] = (PAGES + 8192) | 7;
	for (uint64_t i = 0; i < RAM / (2 * MIB); i++)
		large[i] = i * 2 * MIB | 0xe7;
	for (uint64_t i = 0; i < SIZE / (2 * MIB); i++)
		large[SMALL / (2 * MIB) + i] = (PAGES + 12288 + i * 4096) | 7;
	for (uint64_t i = 0; i < SIZE / 4096; i++)
		small[i] = (DATA + i * 4096) | 0x67;
}

/* The i-th run has taken so long. */
static void report(unsigned i, int ring0, uint64_t ns, uint64_t insns)
{
	unsigned n = 0;

	for (unsigned k = 0; k < NR_KERNELS; k++) {
		if (kernels[k].ring0 && !ring0)
			continue;
		if (i % (NR_KERNELS - !ring0) == n++) {
			printf("%s %lu", kernels[k].name, ns);
			if (insns)
				printf(" %lu", insns);
			printf("\n");
		}
	}
}

/* ---- native --------------------------------------------------------------------------------- */

static void native(void)
{
	uint64_t *data = mmap(NULL, SIZE, PROT_READ | PROT_WRITE,
			      MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	unsigned n = 0;

	if (data == MAP_FAILED)
		err(1, "mmap");
	for (unsigned r = 0; r < ROUNDS; r++) {
		for (unsigned i = 0; i < NR_KERNELS; i++) {
			uint64_t began = now();

			if (kernels[i].ring0)
				continue;
			kernels[i].fn(data + kernels[i].data % SIZE / 8, kernels[i].count);
			report(n++, 0, now() - began, 0);
		}
	}
}

/* ---- KVM ------------------------------------------------------------------------------------ */

static int call(int fd, const char *name, unsigned long cmd, unsigned long arg)
{
	int ret = ioctl(fd, cmd, arg);

	if (ret < 0)
		err(1, "%s", name);
	return ret;
}
#define CALL(fd, cmd, arg) call(fd, #cmd, cmd, (unsigned long)(arg))

/* Where the vCPU's binary statistics have the instructions executed; stats < 0: nowhere. */
static int stats = -1;
static off_t stats_at;

static void find_instructions(int vcpu)
{
	struct kvm_stats_header h;
	char desc[sizeof(struct kvm_stats_desc) + 256];

	stats = ioctl(vcpu, KVM_GET_STATS_FD, NULL);
	if (stats < 0 || pread(stats, &h, sizeof(h), 0) != sizeof(h) || h.name_size > 256)
		goto none;
	for (unsigned i = 0; i < h.num_desc; i++) {
		size_t len = sizeof(struct kvm_stats_desc) + h.name_size;
		struct kvm_stats_desc *d = (struct kvm_stats_desc *)(void *)desc;

		if (pread(stats, desc, len, h.desc_offset + (off_t)(i * len)) != (ssize_t)len)
			break;
		if (!strcmp(desc + sizeof(*d), "instructions")) {
			stats_at = h.data_offset + d->offset;
			return;
		}
	}
none:
	stats = -1;
}

static uint64_t instructions(void)
{
	uint64_t n = 0;

	if (stats >= 0 && pread(stats, &n, sizeof(n), stats_at) != sizeof(n))
		n = 0;
	return n;
}

static void enter_64bit(int vcpu, unsigned ring)
{
	struct kvm_segment seg = {.limit = -1u, .present = 1, .s = 1, .g = 1, .dpl = (uint8_t)ring};
	struct kvm_regs regs = {
		.rip = guest_address(guest_main),
		.rflags = 0x3002, /* IOPL 3: OUT in any ring */
		.rsp = STACK,
		.rdi = TABLE + 8,
	};
	struct kvm_sregs sregs;

	CALL(vcpu, KVM_GET_SREGS, &sregs);
	sregs.cr0 = 0x80050033;
	sregs.cr3 = PAGES;
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
	CALL(vcpu, KVM_SET_REGS, &regs);
}

static void kvm(int ring0)
{
	char *ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	struct kvm_userspace_memory_region region = {.memory_size = RAM,
						     .userspace_addr = (uintptr_t)ram};
	int dev = open("/dev/kvm", O_RDWR | O_CLOEXEC), vm, vcpu;
	uint64_t began = 0, insns = 0;
	struct kvm_run *run;
	unsigned n = 0;

	if (ram == MAP_FAILED)
		err(1, "mmap");
	if (dev < 0)
		err(1, "/dev/kvm");
	fill_image(ram + IMAGE, ring0);
	vm = CALL(dev, KVM_CREATE_VM, 0);
	CALL(vm, KVM_SET_USER_MEMORY_REGION, &region);
	vcpu = CALL(vm, KVM_CREATE_VCPU, 0);
	run = mmap(NULL, (size_t)CALL(dev, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE,
		   MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED)
		err(1, "mmap of the vCPU");
	find_instructions(vcpu);
	enter_64bit(vcpu, ring0 ? 0 : 3);
	for (;;) {
		uint64_t t;

		CALL(vcpu, KVM_RUN, 0);
		t = now();
		if (run->exit_reason != KVM_EXIT_IO)
			errx(1, "exit reason %u", run->exit_reason);
		if (run->io.port != PORT)
			return;
		switch (((char *)run)[run->io.data_offset]) {
		case 'S':
			insns = instructions();
			began = now();
			break;
		default:
			report(n++, ring0, t - began, instructions() - insns);
		}
	}
}

/* ---- QEMU ----------------------------------------------------------------------------------- */

static void qemu(char **argv)
{
	char path[] = "/tmp/cpu-bench-XXXXXX", *image, c, *args[32], memory[32];
	int fd = mkstemp(path), pipes[2], status;
	unsigned n = 0, k = 0;
	uint64_t began = 0;
	pid_t pid;

	snprintf(memory, sizeof(memory), "%lu", RAM / MIB + 64);
	for (; argv[k] && k < 16; k++)
		args[k] = argv[k];
	for (const char *const *a =
		     (const char *const[]){"-accel", "tcg", "-nodefaults", "-display", "none",
					   "-no-reboot", "-debugcon", "stdio", "-device",
					   "isa-debug-exit,iobase=0xf4", "-m", memory, "-kernel",
					   path, NULL};
	     *a; a++)
		args[k++] = (char *)*a;
	args[k] = NULL;
	image = calloc(1, STACK - IMAGE);
	if (fd < 0 || !image || pipe(pipes))
		err(1, "image");
	fill_image(image, 1);
	if (write(fd, image, STACK - IMAGE) != (ssize_t)(STACK - IMAGE))
		err(1, "%s", path);
	close(fd);
	pid = fork();
	if (pid < 0)
		err(1, "fork");
	if (!pid) {
		dup2(pipes[1], 1);
		close(pipes[0]);
		execvp(args[0], args);
		err(127, "%s", args[0]);
	}
	close(pipes[1]);
	/* Another process's CPU clock moves on with the scheduler's ticks only: too coarse. */
	cpu_clock = CLOCK_MONOTONIC;
	while (read(pipes[0], &c, 1) == 1) {
		uint64_t t = now();

		if (c == 'S')
			began = now();
		else
			report(n++, 1, t - began, 0);
	}
	unlink(path);
	while (waitpid(pid, &status, 0) < 0)
		;
	if (n != ROUNDS * NR_KERNELS)
		errx(1, "%s has run %u of %zu kernels", args[0], n, ROUNDS * NR_KERNELS);
}

int main(int argc, char **argv)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (argc == 2 && !strcmp(argv[1], "native"))
		native();
	else if (argc == 2 && (!strcmp(argv[1], "kvm") || !strcmp(argv[1], "ring0")))
		kvm(argv[1][0] == 'r');
	else if (argc > 2 && !strcmp(argv[1], "qemu"))
		qemu(argv + 2);
	else
		errx(2, "usage: cpu-bench native|kvm|ring0|qemu PROGRAM [ARGS...]");
	return 0;
}
