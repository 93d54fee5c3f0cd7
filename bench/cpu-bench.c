/* SPDX-License-Identifier: MIT */
/*
 * What guest code costs. One flat program, run in four ways:
 *
 *   cpu-bench native       its kernels called in this process
 *   cpu-bench kvm          as a guest of /dev/kvm, in ring 3; under `kvmlet run`, of kvmlet
 *   cpu-bench ring0        the same in ring 0, with the kernels that need it
 *   cpu-bench qemu PROGRAM as a guest of QEMU's system emulator, which is the command given
 *   cpu-bench code ...     not the kernels, but from 16 KiB to 64 MiB of code (... as above)
 *
 * It prints "name ns" for each run of each kernel, and as third column the instructions of it if
 * they are known: the vCPU has that statistic, or code was made to have so many. The guest brackets
 * each kernel with an OUT; what counts is the CPU time in between, of QEMU the time.
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
#define IMAGE   0x100000ul /* Multiboot header and start for QEMU */
#define CODE    0x101000ul
#define TABLE   0x10f000ul /* where guest_main is, then the list of kernels */
#define PAGES   0x110000ul /* page tables: top, next, large pages, then the small ones */
#define STACK   0x200000ul
#define DATA    0x4000000ul
#define SIZE    (64 * MIB)
#define SMALL   0x10000000ul /* where DATA is seen with 4 KiB pages */
#define AREA    0x14000000ul /* where code is made: up to 128 MiB at once, */
#define LARGEST (128 * MIB)
#define AREAS   (256 * MIB) /* all in all */
#define RAM     (making_code ? AREA + AREAS : DATA + SIZE)
#define PORT    0xe9 /* QEMU's debug console */

static int making_code;

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
	/* 16 KiB, word by word, loaded or added to */
	"load:		xor %ecx, %ecx\n"
	"1:		mov (%rdi,%rcx), %rax; mov 8(%rdi,%rcx), %rdx\n"
	"		mov 16(%rdi,%rcx), %r8; mov 24(%rdi,%rcx), %r9\n"
	"		add $32, %ecx; cmp $16384, %ecx; jb 1b\n"
	"		dec %rsi; jnz load\n"
	"		ret\n"
	"addm:		xor %ecx, %ecx; xor %eax, %eax\n"
	"1:		add %rax, (%rdi,%rcx); add %rax, 8(%rdi,%rcx)\n"
	"		add %rax, 16(%rdi,%rcx); add %rax, 24(%rdi,%rcx)\n"
	"		add $32, %ecx; cmp $16384, %ecx; jb 1b\n"
	"		dec %rsi; jnz addm\n"
	"		ret\n"
/* C += A B, 64 x 64 floats, 4 or 8 at once */
#define MATRIX(name, broadcast, multiply, step, end)                       \
	name ":		xor %r8d, %r8d\n"                                         \
	     "1:		xor %r9d, %r9d\n"                                        \
	     "2:		lea (%rdi,%r8), %r10; " broadcast "\n"     \
	     "		mov %r9, %r11; shl $8, %r11; lea 16384(%rdi,%r11), %r11\n" \
	     "		lea 32768(%r10), %r10; xor %ecx, %ecx\n"                   \
	     "3:		" multiply "\n"                            \
	     "		add $" step ", %ecx; cmp $256, %ecx; jb 3b\n"      \
	     "		inc %r9d; cmp $64, %r9d; jb 2b\n"                          \
	     "		add $256, %r8d; cmp $16384, %r8d; jb 1b\n"                 \
	     "		dec %rsi; jnz " name "\n"                          \
	     "		" end "ret\n"
	MATRIX("ssemat", "movss (%r10,%r9,4), %xmm3; shufps $0, %xmm3, %xmm3",
	       "movaps (%r11,%rcx), %xmm0; mulps %xmm3, %xmm0; addps (%r10,%rcx), %xmm0; "
	       "movaps %xmm0, (%r10,%rcx)",
	       "16", "")
		MATRIX("avxmat", "vbroadcastss (%r10,%r9,4), %ymm3",
		       "vmulps (%r11,%rcx), %ymm3, %ymm0; vaddps (%r10,%rcx), %ymm0, %ymm0; "
		       "vmovaps %ymm0, (%r10,%rcx)",
		       "32", "vzeroupper; ")
	/* a page, 100 bytes, 32 words, and single elements */
	"strings:	mov %rsi, %r8; mov %rdi, %r9; xor %eax, %eax\n"
	"1:		mov %r9, %rsi; lea 65536(%r9), %rdi; mov $512, %ecx; rep movsq\n"
	"		mov %r9, %rsi; lea 65536(%r9), %rdi; mov $100, %ecx; rep movsb\n"
	"		lea 131072(%r9), %rdi; mov $32, %ecx; rep stosq\n"
	"		lodsq; movsb; stosl\n"
	"		dec %r8; jnz 1b\n"
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
	"pages:		mov $88172645463325252, %rax; xor %ecx, %ecx\n"
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
	/* 16 pages change places with their neighbours, one by one */
	"ptes:		mov $0x113000, %r9d\n"
	"2:		xor %ecx, %ecx\n"
	"1:		mov %rcx, %rdx; shr $9, %rdx\n"
	"		mov (%r9,%rdx), %rax; xor $0x1000, %rax; mov %rax, (%r9,%rdx)\n"
	"		invlpg (%rdi,%rcx); mov (%rdi,%rcx), %r8\n"
	"		add $4096, %ecx; cmp $65536, %ecx; jb 1b\n"
	"		dec %rsi; jnz 2b\n"
	"		ret\n"
	/* system calls of ring 3, which do a little */
	"syscalls:	mov $0xc0000080, %ecx; rdmsr; or $1, %eax; wrmsr\n"
	"		mov $0xc0000081, %ecx; xor %eax, %eax; mov $0x130008, %edx; wrmsr\n"
	"		mov $0xc0000082, %ecx; lea 3f(%rip), %rax; xor %edx, %edx; wrmsr\n"
	"		mov $0xc0000084, %ecx; xor %eax, %eax; wrmsr\n"
	"		mov %rsp, %r15; lea 2f(%rip), %rcx; mov $2, %r11d; sysretq\n"
	"2:		mov $1, %eax; syscall; dec %rsi; jnz 2b\n"
	"		xor %eax, %eax; syscall\n"
	"3:		mov %rsp, %r14; mov %r15, %rsp\n"
	"		test %eax, %eax; jz 4f\n"
	"		push %rcx; push %r11; push %rdi; add %rax, (%rdi)\n"
	"		pop %rdi; pop %r11; pop %rcx; mov %r14, %rsp; sysretq\n"
	"4:		ret\n"
	/* rsi blocks of 64 bytes, linked in an order that no cache foresees; the first counts
	   passes */
	"make_code:	xor %eax, %eax; mov %rdi, %r10; lea 3f(%rip), %r8\n"
	"1:		mov %rax, %rdi; shl $6, %rdi; add %r10, %rdi\n"
	"		mov %rsi, %r9; mov %r8, %rsi; mov $8, %ecx; rep movsq; mov %r9, %rsi\n"
	"		imul $0x5deece6d, %rax, %rax; add $0x3ffb, %rax\n"
	"		lea -1(%rsi), %rdx; and %rdx, %rax\n"
	"		mov %rax, %rdx; shl $6, %rdx; add %r10, %rdx; sub %rdi, %rdx\n"
	"		add $18, %edx; mov %edx, -22(%rdi)\n"
	"		lea 2f(%rip), %r8; test %rax, %rax; jnz 1b\n"
	"		ret\n"
	"2:		add $0x12345678, %rax; mov %rax, %rdx; shr $7, %rdx; xor %rdx, %rax\n"
	"		mov %rax, -8(%rsp); add -16(%rsp), %rcx; lea (%rax,%rcx), %r8\n"
	"		test $0x100, %eax; jnz 4f\n"
	"4:		add $1, %r8; .byte 0xe9; .long 0; .org 2b + 64\n"
	"3:		dec %rsi; jnz 5f; ret\n"
	"5:		jmp 6f; .org 3b + 41\n"
	"6:		.byte 0xe9; .long 0; .org 3b + 64\n"
	/* passes through that */
	"run_code:	inc %rsi; jmp *%rdi\n"
	".popsection\n");
kernel_fn integer, chain, sum, sse, pages, cr3, load, addm, ssemat, avxmat, strings, ptes, syscalls,
	make_code, run_code;
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

struct kernel {
	const char *name; /* NULL: not measured */
	kernel_fn *fn;
	uint64_t data, count;
	int ring0;
	uint64_t insns; /* 0: not known */
};

static const struct kernel kernels[] = {
	{"integer", integer, DATA, 12000000},
	{"chain", chain, DATA, 6000000},
	{"sum", sum, DATA, 1},
	{"sort", sort, DATA, 8},
	{"calls", calls, DATA, 60},
	{"addm", addm, DATA + 16 * MIB, 6000},
	{"load", load, DATA + 16 * MIB, 8000},
	{"sse", sse, DATA + 16 * MIB, 16000}, /* zeros: no slow numbers */
	{"ssemat", ssemat, DATA + 16 * MIB, 60},
	{"avxmat", avxmat, DATA + 16 * MIB, 120},
	{"strings", strings, DATA + 16 * MIB, 40000},
	{"pages", pages, SMALL, 300000},
	{"cr3", cr3, SMALL, 20000, 1},
	{"ptes", ptes, SMALL, 10000, 1},
	{"syscalls", syscalls, DATA, 400000, 1},
};
#define NR_KERNELS (sizeof(kernels) / sizeof(kernels[0]))

/* What is run, @rounds times. */
static struct kernel list[64];
static unsigned nr_list, rounds;

static void choose_kernels(int ring0)
{
	rounds = 5;
	for (unsigned i = 0; i < NR_KERNELS; i++) {
		if ((kernels[i].ring0 && !ring0) ||
		    (kernels[i].fn == avxmat && !__builtin_cpu_supports("avx")))
			continue;
		list[nr_list++] = kernels[i];
	}
}

#define BLOCK       64
#define BLOCK_INSNS 11

/* Areas of code that each have been run through before they are measured. */
static void choose_code(void)
{
	static char names[16][16];
	uint64_t area = AREA, size = 16 << 10;

	rounds = 1;
	for (unsigned i = 0; size <= LARGEST; i++, area += size, size *= size < 16 * MIB ? 4 : 2) {
		uint64_t n = size / BLOCK, passes = 2000000 / (n * BLOCK_INSNS);

		passes = passes ? passes : 1;
		snprintf(names[i], sizeof(names[i]), "%lu", size >> 10);
		list[nr_list++] = (struct kernel){NULL, make_code, area, n};
		list[nr_list++] = (struct kernel){NULL, run_code, area, 1};
		for (unsigned k = 0; k < 3; k++)
			list[nr_list++] = (struct kernel){
				names[i], run_code, area, passes, 0, passes * n * BLOCK_INSNS};
	}
}

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
	"		mov $0x40620, %eax; mov %eax, %cr4\n"
	"		xor %ecx, %ecx; xor %edx, %edx; mov $7, %eax; xsetbv\n"
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
static void fill_image(char *image)
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
	for (unsigned r = 0; r < rounds; r++)
		for (unsigned i = 0; i < nr_list; i++)
			*e++ = (struct entry){guest_address(list[i].fn), list[i].data,
					      list[i].count};
	if ((char *)(e + 1) > image + PAGES - IMAGE)
		errx(1, "too many kernels");
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
static void report(unsigned i, uint64_t ns, uint64_t insns)
{
	const struct kernel *k = &list[i % nr_list];

	if (!k->name)
		return;
	printf("%s %lu", k->name, ns);
	if (k->insns || insns)
		printf(" %lu", k->insns ? k->insns : insns);
	printf("\n");
}

/* ---- native --------------------------------------------------------------------------------- */

static char *map(uint64_t size, int prot)
{
	char *p = mmap(NULL, size, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	if (p == MAP_FAILED)
		err(1, "mmap");
	return p;
}

static void native(void)
{
	uint64_t base = making_code ? AREA : DATA;
	char *data = making_code ? map(AREAS, PROT_READ | PROT_WRITE | PROT_EXEC)
				 : map(SIZE, PROT_READ | PROT_WRITE);

	for (unsigned n = 0; n < rounds * nr_list; n++) {
		const struct kernel *k = &list[n % nr_list];
		uint64_t at = (k->data - base) % (making_code ? AREAS : SIZE), began = now();

		k->fn((uint64_t *)(void *)(data + at), k->count);
		report(n, now() - began, 0);
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

static void set_cpuid(int dev, int vcpu)
{
	struct kvm_cpuid2 *c = calloc(1, sizeof(*c) + 256 * sizeof(c->entries[0]));

	if (!c)
		err(1, "CPUID");
	c->nent = 256;
	CALL(dev, KVM_GET_SUPPORTED_CPUID, c);
	CALL(vcpu, KVM_SET_CPUID2, c);
	free(c);
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

	struct kvm_xcrs xcrs = {.nr_xcrs = 1, .xcrs = {{.value = 7}}};

	CALL(vcpu, KVM_GET_SREGS, &sregs);
	sregs.cr0 = 0x80050033;
	sregs.cr3 = PAGES;
	sregs.cr4 = 0x620;
	if (__builtin_cpu_supports("avx")) {
		sregs.cr4 |= 1 << 18; /* OSXSAVE */
		CALL(vcpu, KVM_SET_XCRS, &xcrs);
	}
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
	char *ram = map(RAM, PROT_READ | PROT_WRITE);
	struct kvm_userspace_memory_region region = {.memory_size = RAM,
						     .userspace_addr = (uintptr_t)ram};
	int dev = open("/dev/kvm", O_RDWR | O_CLOEXEC), vm, vcpu;
	uint64_t began = 0, insns = 0;
	struct kvm_run *run;
	unsigned n = 0;

	if (dev < 0)
		err(1, "/dev/kvm");
	fill_image(ram + IMAGE);
	vm = CALL(dev, KVM_CREATE_VM, 0);
	CALL(vm, KVM_SET_USER_MEMORY_REGION, &region);
	vcpu = CALL(vm, KVM_CREATE_VCPU, 0);
	run = mmap(NULL, (size_t)CALL(dev, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE,
		   MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED)
		err(1, "mmap of the vCPU");
	find_instructions(vcpu);
	set_cpuid(dev, vcpu);
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
			report(n++, t - began, instructions() - insns);
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
	fill_image(image);
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
			report(n++, t - began, 0);
	}
	unlink(path);
	while (waitpid(pid, &status, 0) < 0)
		;
	if (n != rounds * nr_list)
		errx(1, "%s has run %u of %u kernels", args[0], n, rounds * nr_list);
}

int main(int argc, char **argv)
{
	const char *how;

	setvbuf(stdout, NULL, _IOLBF, 0);
	making_code = argc > 1 && !strcmp(argv[1], "code");
	argc -= making_code;
	argv += making_code;
	how = argc > 1 ? argv[1] : "";
	if (making_code)
		choose_code();
	else
		choose_kernels(!strcmp(how, "ring0") || !strcmp(how, "qemu"));
	if (argc == 2 && !strcmp(how, "native"))
		native();
	else if (argc == 2 && (!strcmp(how, "kvm") || !strcmp(how, "ring0")))
		kvm(how[0] == 'r');
	else if (argc > 2 && !strcmp(how, "qemu"))
		qemu(argv + 2);
	else
		errx(2, "usage: cpu-bench [code] native|kvm|ring0|qemu PROGRAM [ARGS...]");
	return 0;
}
