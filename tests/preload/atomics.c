/* SPDX-License-Identifier: MIT */
/*
 * Two vCPUs hammer one operand with locked instructions of every width: aligned, across a cache
 * line, across pages that are neighbours in the host, and across pages that are not. The results
 * are exact. A third reads aligned words with plain loads, and never sees a part of a store.
 *
 *     atomics [ITERATIONS]
 */
#include <pthread.h>

#include "t.h"

#define LOW       0x10000u /* tables and code, from 0 */
#define GUEST     0x8000u
#define COUNTER   0xf000u
#define SCATTERED 0x200000u /* two pages; so is the next */
#define NEIGHBOUR 0x204000u
#define MAX_VCPUS 3

/*
 * rdi operand, r8 addend, mask or token, r9 bit offset, r10 ~r8, r15d iterations, ebx errors.
 * A snippet is the body of a loop.
 */
#define SNIPPET(name, text)                                                     \
	__asm__(".pushsection .rodata\nsn_" #name ":\n0:\n" text                \
		"\n dec %r15d\n jnz 0b\n hlt\nsn_" #name "_end:\n.popsection"); \
	extern const uint8_t sn_##name[], sn_##name##_end[];

/* width, suffix, and the names of r8, r10, rax, rcx */
#define WIDTHS(X)                                  \
	X(1, "b", "%r8b", "%r10b", "%al", "%cl")   \
	X(2, "w", "%r8w", "%r10w", "%ax", "%cx")   \
	X(4, "l", "%r8d", "%r10d", "%eax", "%ecx") \
	X(8, "q", "%r8", "%r10", "%rax", "%rcx")
#define OPS(w, s, r8, r10, ax, cx)                                                           \
	SNIPPET(add##w, "lock add" s " " r8 ", (%rdi)")                                      \
	SNIPPET(sub##w, "mov %r10, %rax\n inc %rax\n lock sub" s " " ax ", (%rdi)")          \
	SNIPPET(adc##w, "clc\n lock adc" s " " r8 ", (%rdi)")                                \
	SNIPPET(sbb##w, "stc\n lock sbb" s " " r10 ", (%rdi)")                               \
	SNIPPET(inc##w, "lock inc" s " (%rdi)\n lock add" s " $2, (%rdi)")                   \
	SNIPPET(xadd##w, "mov %r8, %rax\n lock xadd" s " " ax ", (%rdi)")                    \
	SNIPPET(cmpxchg##w, "mov" s " (%rdi), " ax "\n 1: mov %rax, %rcx\n add %r8, %rcx\n " \
			    "lock cmpxchg" s " " cx ", (%rdi)\n jne 1b")                     \
	SNIPPET(xchg##w, "xchg" s " " ax ", (%rdi)")                                         \
	SNIPPET(orand##w, "lock or" s " " r8 ", (%rdi)\n lock and" s " " r10 ", (%rdi)")     \
	SNIPPET(xor##w, "lock xor" s " " r8 ", (%rdi)\n lock xor" s " " r8 ", (%rdi)")       \
	SNIPPET(not ##w, "lock not" s " (%rdi)")                                             \
	SNIPPET(neg##w, "lock neg" s " (%rdi)")
WIDTHS(OPS)

/* The bit is the vCPU's own: BTS finds 0, BTR 1; BTC first the one, then the other. */
#define BITS(w, s, r9)                                                                         \
	SNIPPET(bts##w, "lock bts" s " " r9 ", (%rdi)\n adc $0, %ebx\n lock btr" s " " r9      \
			", (%rdi)\n cmc\n adc $0, %ebx")                                       \
	SNIPPET(btc##w, "lock btc" s " " r9 ", (%rdi)\n adc $0, %ebx\n lock btc" s " " r9      \
			", (%rdi)\n cmc\n adc $0, %ebx")                                       \
	SNIPPET(btsi##w, "lock bts" s " $5, (%rdi)\n jc 1f\n lock btr" s " $5, (%rdi)\n cmc\n" \
			 " adc $0, %ebx\n 1:")
BITS(2, "w", "%r9w")
BITS(4, "l", "%r9d")
BITS(8, "q", "%r9")

SNIPPET(cmpxchg8b,
	"mov (%rdi), %eax\n mov 4(%rdi), %edx\n 1: mov %eax, %ebx\n mov %edx, %ecx\n"
	" add %r8d, %ebx\n adc %r8d, %ecx\n lock cmpxchg8b (%rdi)\n jne 1b\n xor %ebx, %ebx")
SNIPPET(cmpxchg16b,
	"mov (%rdi), %rax\n mov 8(%rdi), %rdx\n 1: mov %rax, %rbx\n mov %rdx, %rcx\n"
	" add %r8, %rbx\n adc %r8, %rcx\n lock cmpxchg16b (%rdi)\n jne 1b\n xor %ebx, %ebx")
/* A lock of one byte, and what it guards */
SNIPPET(spinlock, "1: mov $1, %al\n xchg %al, (%rdi)\n test %al, %al\n jz 2f\n pause\n jmp 1b\n"
		  " 2: incq 0xf000\n movb $0, (%rdi)")
/* The third vCPU: lanes of 16 bits are equal. */
SNIPPET(read4, "mov (%rdi), %eax\n mov %eax, %ecx\n ror $16, %ecx\n cmp %eax, %ecx\n setne %cl\n"
	       " movzbl %cl, %ecx\n add %ecx, %ebx")
SNIPPET(read8, "mov (%rdi), %rax\n mov %rax, %rcx\n ror $16, %rcx\n cmp %rax, %rcx\n setne %cl\n"
	       " movzbl %cl, %ecx\n add %ecx, %ebx")

enum check { SUM, TRIPLE, TOKENS, SAME, BITS_OWN, BITS_ONE, SUM2, GUARDED };

static const struct op {
	const char *name;
	const uint8_t *code, *end;
	unsigned width;
	enum check check;
} ops[] = {
#define ROW(name, w, check) {#name, sn_##name, sn_##name##_end, w, check},
#define ROWS(w, s, r8, r10, ax, cx) \
	ROW(add##w, w, SUM)         \
	ROW(sub##w, w, SUM)         \
	ROW(adc##w, w, SUM)         \
	ROW(sbb##w, w, SUM)         \
	ROW(inc##w, w, TRIPLE)      \
	ROW(xadd##w, w, SUM)        \
	ROW(cmpxchg##w, w, SUM)     \
	ROW(xchg##w, w, TOKENS)     \
	ROW(orand##w, w, SAME)      \
	ROW(xor##w, w, SAME)        \
	ROW(not ##w, w, SAME)       \
	ROW(neg##w, w, SAME)
	WIDTHS(ROWS)
#define BIT_ROWS(w) ROW(bts##w, w, BITS_OWN) ROW(btc##w, w, BITS_OWN) ROW(btsi##w, w, BITS_ONE)
		BIT_ROWS(2) BIT_ROWS(4) BIT_ROWS(8) ROW(cmpxchg8b, 8, SUM2)
			ROW(cmpxchg16b, 16, SUM2) ROW(spinlock, 1, GUARDED)};

static int kvm, vm;
static uint8_t *low, *scattered, *neighbours;
static struct vcpu {
	pthread_t thread;
	int fd;
	struct kvm_run *run;
	struct kvm_regs regs;
	bool halted;
} vcpus[MAX_VCPUS];
static pthread_barrier_t barrier;

static void slot(unsigned id, uint64_t gpa, uint64_t size, void *host)
{
	struct kvm_userspace_memory_region r = {.slot = id,
						.guest_phys_addr = gpa,
						.memory_size = size,
						.userspace_addr = (uintptr_t)host};

	NEED(!ioctl(vm, KVM_SET_USER_MEMORY_REGION, &r));
}

static void *pages(unsigned n)
{
	void *p = mmap(NULL, (size_t)n * T_PAGE, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	NEED(p != MAP_FAILED);
	return p;
}

static void make_vcpu(struct vcpu *v, unsigned id, int size)
{
	struct kvm_segment seg = {.limit = 0xffffffff,
				  .selector = 0x10,
				  .type = 3,
				  .present = 1,
				  .db = 1,
				  .s = 1,
				  .g = 1};
	static struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 e[256];
	} c;
	struct kvm_sregs s;

	v->fd = ioctl(vm, KVM_CREATE_VCPU, id);
	NEED(v->fd >= 0);
	v->run = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, 0);
	NEED(v->run != MAP_FAILED);
	c.head.nent = 256;
	NEED(!ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &c) && !ioctl(v->fd, KVM_SET_CPUID2, &c));
	NEED(!ioctl(v->fd, KVM_GET_SREGS, &s));
	s.ds = s.es = s.fs = s.gs = s.ss = seg;
	seg.selector = 8;
	seg.type = 11;
	seg.l = 1;
	seg.db = 0;
	s.cs = seg;
	s.cr0 = 0x80010033;
	s.cr3 = 0x1000;
	s.cr4 = 0x20;
	s.efer = 0x500;
	NEED(!ioctl(v->fd, KVM_SET_SREGS, &s));
}

static void make_vm(void)
{
	uint64_t *table;
	uint8_t *p;
	int size;

	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	NEED(kvm >= 0);
	size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	NEED(vm >= 0);
	ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000ul);
	low = pages(LOW / T_PAGE);
	/* The second page lies before the first one. */
	p = pages(3);
	scattered = p + 2 * T_PAGE;
	neighbours = pages(2);
	slot(0, 0, LOW, low);
	slot(1, SCATTERED, T_PAGE, scattered);
	slot(2, SCATTERED + T_PAGE, T_PAGE, p);
	slot(3, NEIGHBOUR, 2 * T_PAGE, neighbours);
	table = (uint64_t *)(low + 0x1000);
	table[0] = 0x2000 | 7;
	table[512] = 0x3000 | 7;
	for (unsigned i = 0; i < 4; i++)
		table[1024 + i] = i << 21 | 0x87;
	for (unsigned i = 0; i < MAX_VCPUS; i++)
		make_vcpu(&vcpus[i], i, size);
}

/* ---- operands, as the guest sees them ---- */

static uint8_t *host_of(uint64_t gpa)
{
	if (gpa >= NEIGHBOUR)
		return neighbours + (gpa - NEIGHBOUR);
	if (gpa >= SCATTERED + T_PAGE)
		return scattered - 2 * T_PAGE + (gpa - SCATTERED - T_PAGE);
	return scattered + (gpa - SCATTERED);
}

static unsigned __int128 operand(uint64_t gpa, unsigned width)
{
	unsigned __int128 val = 0;

	for (unsigned i = width; i--;)
		val = val << 8 | *host_of(gpa + i);
	return val;
}

static void set_operand(uint64_t gpa, unsigned width, unsigned __int128 val)
{
	for (unsigned i = 0; i < width; i++, val >>= 8)
		*host_of(gpa + i) = (uint8_t)val;
}

static unsigned __int128 cut(unsigned __int128 val, unsigned width)
{
	return width == 16 ? val : val & (((unsigned __int128)1 << 8 * width) - 1);
}

/* ---- running ---- */

static void *vcpu_thread(void *arg)
{
	struct vcpu *v = arg;

	pthread_barrier_wait(&barrier);
	v->halted = !ioctl(v->fd, KVM_RUN, 0) && v->run->exit_reason == KVM_EXIT_HLT;
	if (!v->halted)
		fprintf(stderr, "exit reason %u\n", v->run->exit_reason);
	return NULL;
}

static void run(unsigned n)
{
	NEED(!pthread_barrier_init(&barrier, NULL, n));
	for (unsigned i = 0; i < n; i++) {
		NEED(!ioctl(vcpus[i].fd, KVM_SET_REGS, &vcpus[i].regs));
		NEED(!pthread_create(&vcpus[i].thread, NULL, vcpu_thread, &vcpus[i]));
	}
	for (unsigned i = 0; i < n; i++) {
		NEED(!pthread_join(vcpus[i].thread, NULL));
		NEED(!ioctl(vcpus[i].fd, KVM_GET_REGS, &vcpus[i].regs));
	}
	pthread_barrier_destroy(&barrier);
}

static bool is_permutation(const unsigned __int128 *a, const unsigned __int128 *b)
{
	return a[0] + a[1] + a[2] == b[0] + b[1] + b[2] &&
	       (a[0] ^ a[1] ^ a[2]) == (b[0] ^ b[1] ^ b[2]) &&
	       (a[0] == b[0] || a[0] == b[1] || a[0] == b[2]);
}

static bool result_is_exact(const struct op *o, uint64_t gpa, uint64_t n, unsigned __int128 initial,
			    uint64_t addend)
{
	unsigned __int128 now = operand(gpa, o->width), want = initial;
	unsigned __int128 tokens[3] = {initial, cut(addend, o->width), cut(~addend, o->width)};
	unsigned __int128 held[3] = {now, cut(vcpus[0].regs.rax, o->width),
				     cut(vcpus[1].regs.rax, o->width)};
	unsigned half = 4 * o->width;

	switch (o->check) {
	case SUM:
		want += (unsigned __int128)2 * n * addend;
		break;
	case SUM2:
		want += 2 * n * (addend | (unsigned __int128)addend << half);
		break;
	case TRIPLE:
		want += 2 * n * 3;
		break;
	case TOKENS:
		return is_permutation(tokens, held);
	case GUARDED:
		return *(uint64_t *)(low + COUNTER) == 2 * n;
	default:
		break;
	}
	return now == cut(want, o->width) && !(uint32_t)vcpus[0].regs.rbx &&
	       !(uint32_t)vcpus[1].regs.rbx;
}

static void hammer(const struct op *o, uint64_t gpa, const char *where, uint64_t n)
{
	/* Lanes of 16 bits do not carry into each other. */
	uint64_t addend = o->width == 1 ? 7 : 0x0001000100010001;
	unsigned __int128 initial =
		o->check == BITS_OWN || o->check == BITS_ONE || o->check == GUARDED ||
				o->check == SAME
			? 0
			: cut((unsigned __int128)0x0003000300030003 << 64 | 0x0003000300030003,
			      o->width);
	bool reader = (o->check == SUM || o->check == SUM2) && (o->width == 4 || o->width == 8) &&
		      !(gpa & 7);
	uint64_t reads = GUEST + 0x800;
	unsigned nvcpus = 2;

	if (!strncmp(o->name, "neg", 3))
		initial = 5;
	memset(low + GUEST, 0xf4, 0x1000);
	memcpy(low + GUEST, o->code, (size_t)(o->end - o->code));
	memset(low + COUNTER, 0, 8);
	set_operand(gpa, o->width, initial);
	for (unsigned i = 0; i < 2; i++) {
		uint64_t mask = i ? 0xaaaaaaaaaaaaaaaa : 0x5555555555555555;
		bool masks = o->check == SAME, tokens = o->check == TOKENS;
		uint64_t r8 = masks ? mask : addend;

		vcpus[i].regs = (struct kvm_regs){
			.rip = GUEST,
			.rflags = 2,
			.rdi = gpa,
			.r8 = r8,
			.r9 = i ? 13 : 3,
			.r10 = ~r8,
			.r15 = n,
			.rax = tokens ? (i ? ~addend : addend) : 0,
			.rsp = GUEST,
		};
	}
	if (reader) {
		const uint8_t *code = o->width == 4 ? sn_read4 : sn_read8;

		memcpy(low + reads, code,
		       (size_t)((o->width == 4 ? sn_read4_end : sn_read8_end) - code));
		vcpus[2].regs = (struct kvm_regs){.rip = reads, .rflags = 2, .rdi = gpa, .r15 = n};
		nvcpus = 3;
	}
	run(nvcpus);
	for (unsigned i = 0; i < nvcpus; i++)
		NEED(vcpus[i].halted);
	if (!CHECK(result_is_exact(o, gpa, n, initial, addend)))
		fprintf(stderr, "  %s, %s: %#llx\n", o->name, where,
			(unsigned long long)operand(gpa, o->width));
	if (reader && !CHECK(!(uint32_t)vcpus[2].regs.rbx))
		fprintf(stderr, "  %s, %s: the reader saw parts of stores\n", o->name, where);
	/* A bit offset that leads behind the operand */
	if (o->check == BITS_OWN && gpa % T_PAGE) {
		uint64_t back = 8ull * o->width;

		for (unsigned i = 0; i < 2; i++)
			vcpus[i].regs = (struct kvm_regs){.rip = GUEST,
							  .rflags = 2,
							  .rdi = gpa - back,
							  .r9 = (i ? 13 : 3) + 8 * back,
							  .r15 = n};
		run(2);
		if (!CHECK(result_is_exact(o, gpa, n, 0, 0)))
			fprintf(stderr, "  %s, %s, far bit\n", o->name, where);
	}
}

int main(int argc, char **argv)
{
	/* Some hosts fine programs for locked accesses to two cache lines. */
	uint64_t n = argc > 1 ? strtoull(argv[1], NULL, 0) : 4000, split = 2 + n / 8;

	make_vm();
	for (unsigned i = 0; i < sizeof(ops) / sizeof(ops[0]); i++) {
		const struct op *o = &ops[i];
		unsigned part = o->width / 2;

		hammer(o, NEIGHBOUR + 0x100, "aligned", n);
		if (o->width == 1 || o->width == 16) /* which must be aligned */
			continue;
		hammer(o, NEIGHBOUR + 0x140 - part, "two cache lines", split);
		hammer(o, NEIGHBOUR + T_PAGE - part, "two pages", split);
		hammer(o, SCATTERED + T_PAGE - part, "two pages apart", split);
		hammer(o, SCATTERED + T_PAGE - o->width + 1, "two pages apart, last byte", split);
	}
	return t_done();
}
