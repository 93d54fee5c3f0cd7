/* SPDX-License-Identifier: MIT */
/*
 * Runs each snippet of cases.def in a fresh VM and prints everything that a program could see
 * of it: exits with their data, registers, the top of the stack, a checksum of memory. The same
 * program runs under kvmlet and on /dev/kvm; tests/diff/compare runs both and compares.
 *
 *   guest-diff [NAME...]     all cases, or those named
 *
 * Memory: one slot of 3 MiB at 0; 0x300000 and up is MMIO.
 *   0x1000 GDT   0x2000 IDT (real mode: IVT at 0)   0x3000 TSS   0x5000 IST1 top
 *   0x6000 + 4n  HLT: handler of vector n            0x7c00 real-mode code
 *   0x8000 ring-0 stack top   0xa000 + 4n real-mode handlers   0x10000.. page tables
 *   0x100000 code  0x20e000 another stack   0x20f000 stack top
 * Pages from 0x200000 (all user, writable but):
 *   0x201000 absent   0x202000 read-only   0x203000 supervisor   0x204000 no-execute
 *   0x206000 reserved bit set (long mode)
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

enum mode { REAL, PROT0, PROT3, PAGED0, PAGED3, LONG0, LONG3 };

#define CODE_REAL   ".code16\n"
#define CODE_PROT0  ".code32\n"
#define CODE_PROT3  ".code32\n"
#define CODE_PAGED0 ".code32\n"
#define CODE_PAGED3 ".code32\n"
#define CODE_LONG0  ".code64\n"
#define CODE_LONG3  ".code64\n"

#define CASE(name, mode, text)                                                                \
	__asm__(".pushsection .rodata\n" CODE_##mode "case_" #name ":\n" text "\ncase_" #name \
						     "_end:\n.code64\n.popsection\n");        \
	extern const uint8_t case_##name[], case_##name##_end[];
#include "cases.def"
#undef CASE

static const struct test_case {
	const char *name;
	enum mode mode;
	const uint8_t *code, *end;
} cases[] = {
#define CASE(name, mode, text) {#name, mode, case_##name, case_##name##_end},
#include "cases.def"
};

#define RAM_SIZE 0x300000u
#define CODE     0x100000u
#define IDT      0x2000u
#define GDT      0x1000u
#define TSS      0x3000u

static int kvm;
static uint8_t *ram;

static void die(const char *what)
{
	perror(what);
	exit(2);
}

static void put(uint32_t at, uint64_t val, unsigned size)
{
	memcpy(ram + at, &val, size);
}

/* ---- descriptor tables --------------------------------------------------------------- */

static void desc(unsigned sel, uint32_t base, uint32_t limit, unsigned access, unsigned flags)
{
	put(GDT + sel,
	    (limit & 0xffff) | (uint64_t)(base & 0xffffff) << 16 | (uint64_t)access << 40 |
		    (uint64_t)(limit >> 16) << 48 | (uint64_t)flags << 52 |
		    (uint64_t)(base >> 24) << 56,
	    8);
}

static void gate(unsigned vec, bool wide, unsigned dpl, bool present, unsigned ist)
{
	uint32_t to = 0x6000 + 4 * vec;
	uint64_t low = (to & 0xffff) | 8u << 16 | (uint64_t)ist << 32 |
		       (uint64_t)(0xe | dpl << 5 | present << 7) << 40 | (uint64_t)(to >> 16) << 48;

	put(IDT + vec * (wide ? 16 : 8), low, 8);
	if (wide)
		put(IDT + vec * 16 + 8, 0, 8);
}

static void build_tables(enum mode mode)
{
	bool wide = mode >= LONG0;
	unsigned code_flags = wide ? 0xa : 0xc;

	desc(0x08, 0, 0xfffff, 0x9b, code_flags);
	desc(0x10, 0, 0xfffff, 0x93, 0xc);
	desc(0x18, 0, 0xfffff, 0xfb, 0xc);
	desc(0x20, 0, 0xfffff, 0xf3, 0xc);
	desc(0x28, 0, 0xfffff, 0xfb, code_flags);
	desc(0x38, 0, 0xfffff, 0x9b, 0xc);
	desc(0x48, 0, 0xfffff, 0x13, 0xc);
	desc(0x60, 0, 0xfff, 0x93, 0x4);
	desc(0x68, 0, 0xfff, 0x97, 0x4);
	desc(0x70, 0, 0xfffff, 0x91, 0xc);
	desc(0x80, TSS, 0x67, 0x8b, 0);
	put(GDT + 0x88, 0, 8);
	/* A call gate for ring 3 to 8:0x6ffc. */
	put(GDT + 0x50, 0x6ffcu | 8u << 16 | (uint64_t)0xec << 40, 8);
	put(GDT + 0x58, 0, 8);
	memset(ram + 0x6000, 0xf4, 0x1000);
	if (mode == REAL) {
		for (unsigned v = 0; v < 256; v++)
			put(4 * v, 0xa000 + 4 * v, 4);
		memset(ram + 0xa000, 0xf4, 0x400);
		put(0x600, 0xff | (uint64_t)GDT << 16, 6);
		return;
	}
	for (unsigned v = 0; v < 0x80; v++)
		gate(v, wide, v == 0x30 || v == 0x34 || v == 0x33 || v == 3 || v == 4 ? 3 : 0,
		     v != 0x32, v == 0x33 || v == 8 ? 1 : 0);
	if (wide) {
		put(TSS + 4, 0x8000, 8);
		put(TSS + 0x24, 0x5000, 8);
		put(TSS + 0x66, 0x68, 2);
	} else {
		put(TSS + 4, 0x8000, 4);
		put(TSS + 8, 0x10, 4);
		put(TSS + 0x66, 0x68, 2);
	}
}

/* Flags of the page at @addr in [0x200000, 0x400000). */
static uint64_t page_flags(uint32_t addr, bool wide)
{
	switch (addr) {
	case 0x201000:
		return 0;
	case 0x202000:
		return 5;
	case 0x203000:
		return 3;
	case 0x204000:
		return wide ? 7 | 1ull << 63 : 7;
	case 0x206000:
		return wide ? 7 | 1ull << 51 : 7;
	default:
		return 7;
	}
}

static void build_pages(bool wide)
{
	if (wide) {
		put(0x10000, 0x11000 | 7, 8);
		put(0x11000, 0x12000 | 7, 8);
		put(0x12000, 0x87, 8);
		put(0x12008, 0x13000 | 7, 8);
		for (uint32_t a = 0x200000, i = 0; a < 0x400000; a += 4096, i++) {
			uint64_t f = page_flags(a, true);

			put(0x13000 + i * 8, f ? f | a : 0, 8);
		}
		return;
	}
	put(0x18000, 0x19000 | 7, 4);
	put(0x18004, 0x87, 4);
	for (uint32_t a = 0, i = 0; a < 0x400000; a += 4096, i++) {
		uint64_t f = a < 0x200000 ? 7 : page_flags(a, false);

		put(0x19000 + i * 4, f ? f | a : 0, 4);
	}
}

/* ---- registers ----------------------------------------------------------------------- */

static struct kvm_segment seg(uint16_t sel, uint8_t type, uint8_t dpl, bool l, bool db)
{
	return (struct kvm_segment){.limit = 0xffffffff,
				    .selector = sel,
				    .type = type,
				    .present = 1,
				    .dpl = dpl,
				    .db = db,
				    .s = 1,
				    .l = l,
				    .g = 1};
}

static void set_registers(int vcpu, enum mode mode)
{
	bool wide = mode >= LONG0, paged = mode >= PAGED0,
	     user = mode == PROT3 || mode == PAGED3 || mode == LONG3;
	struct kvm_regs r = {
		.rax = 0x1111111111111111,
		.rbx = 0x2222222222222222,
		.rcx = 0x3333333333333333,
		.rdx = 0x4444444444444444,
		.rsi = 0x200400,
		.rdi = 0x200800,
		.rbp = 0x20f800,
		.rsp = 0x20f000,
		.r8 = 8,
		.r9 = 9,
		.r10 = 10,
		.r11 = 11,
		.r12 = 12,
		.r13 = 13,
		.r14 = 14,
		.r15 = 15,
		.rip = CODE,
		.rflags = 2,
	};
	struct kvm_sregs s;

	if (ioctl(vcpu, KVM_GET_SREGS, &s))
		die("KVM_GET_SREGS");
	if (mode == REAL) {
		r.rip = 0x7c00;
		r.rsp = 0x8000;
		r.rax = r.rbx = r.rcx = r.rdx = 0x1111;
		r.rsi = r.rdi = r.rbp = 0x500;
		s.cs.base = s.cs.selector = 0;
	} else {
		uint16_t rpl = user ? 3 : 0;

		s.cs = seg(user ? 0x2b : 8, 11, (uint8_t)rpl, wide, !wide);
		s.ds = s.es = s.ss = seg(user ? 0x23 : 0x10, 3, (uint8_t)rpl, false, true);
		s.fs = s.gs = s.ds;
		s.gdt = (struct kvm_dtable){.base = GDT, .limit = 0xff};
		s.idt = (struct kvm_dtable){.base = IDT, .limit = wide ? 0x7ff : 0x3ff};
		s.tr = (struct kvm_segment){
			.base = TSS, .limit = 0x67, .selector = 0x80, .type = 11, .present = 1};
		s.cr0 = paged ? 0x80010033 : 0x10033;
		s.cr3 = wide ? 0x10000 : 0x18000;
		s.cr4 = wide ? 0x620 : 0x610;
		s.efer = wide ? 0xd01 : 0;
	}
	if (ioctl(vcpu, KVM_SET_SREGS, &s) || ioctl(vcpu, KVM_SET_REGS, &r))
		die("KVM_SET_REGS");
	if (wide) {
		struct {
			struct kvm_msrs head;
			struct kvm_msr_entry e[3];
		} m = {{.nmsrs = 3},
		       {{.index = 0xc0000081, .data = 0x18ull << 48 | 8ull << 32},
			{.index = 0xc0000082, .data = 0x6400},
			{.index = 0xc0000084, .data = 0x3000}}};

		if (ioctl(vcpu, KVM_SET_MSRS, &m) != 3)
			die("KVM_SET_MSRS");
	}
}

static void set_cpuid(int vcpu)
{
	static struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 e[256];
	} c;

	c.head.nent = 256;
	if (ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &c) || ioctl(vcpu, KVM_SET_CPUID2, &c))
		die("CPUID");
}

/* ---- what happened ------------------------------------------------------------------- */

static uint64_t checksum(uint32_t from, uint32_t to)
{
	uint64_t h = 0xcbf29ce484222325;

	for (uint32_t i = from; i < to; i += 8) {
		uint64_t w;

		memcpy(&w, ram + i, 8);
		h = (h ^ w) * 0x100000001b3;
	}
	return h;
}

static void print_bytes(const uint8_t *p, unsigned n)
{
	for (unsigned i = 0; i < n; i++)
		printf("%02x", p[i]);
}

static void print_state(int vcpu)
{
	struct kvm_regs r;
	struct kvm_sregs s;
	uint64_t sp;

	if (ioctl(vcpu, KVM_GET_REGS, &r) || ioctl(vcpu, KVM_GET_SREGS, &s))
		die("KVM_GET_REGS");
	printf("  rip=%llx rfl=%llx ax=%llx bx=%llx cx=%llx dx=%llx si=%llx di=%llx bp=%llx "
	       "sp=%llx\n",
	       r.rip, r.rflags, r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.rsp);
	printf("  cs=%x ss=%x ds=%x es=%x fs=%x gs=%x cr0=%llx cr2=%llx cr4=%llx efer=%llx\n",
	       s.cs.selector, s.ss.selector, s.ds.selector, s.es.selector, s.fs.selector,
	       s.gs.selector, s.cr0, s.cr2, s.cr4, s.efer);
	sp = r.rsp + s.ss.base * !(s.efer & 0x400);
	if (sp < RAM_SIZE - 64) {
		printf("  stack ");
		print_bytes(ram + sp, 48);
		putchar('\n');
	}
	printf("  mem %llx %llx\n", (unsigned long long)checksum(0, 0x10000),
	       (unsigned long long)checksum(0x200000, RAM_SIZE));
}

static void on_alarm(int sig)
{
	(void)sig;
}

/* One exit; false: that was the last. */
static bool handle_exit(struct kvm_run *run, unsigned *seed)
{
	uint8_t *data = (uint8_t *)run + run->io.data_offset;
	unsigned n;

	switch (run->exit_reason) {
	case KVM_EXIT_IO:
		n = run->io.size * run->io.count;
		printf("  io %s port=%x size=%u count=%u ", run->io.direction ? "out" : "in",
		       run->io.port, run->io.size, run->io.count);
		if (run->io.direction)
			print_bytes(data, n);
		else
			for (unsigned i = 0; i < n; i++)
				data[i] = (uint8_t)(0x30 + (*seed)++);
		putchar('\n');
		return true;
	case KVM_EXIT_MMIO:
		printf("  mmio %s gpa=%llx len=%u ", run->mmio.is_write ? "write" : "read",
		       run->mmio.phys_addr, run->mmio.len);
		if (run->mmio.is_write)
			print_bytes(run->mmio.data, run->mmio.len);
		else
			for (unsigned i = 0; i < run->mmio.len; i++)
				run->mmio.data[i] = (uint8_t)(0x80 + (*seed)++);
		putchar('\n');
		return true;
	case KVM_EXIT_HLT:
		printf("  hlt\n");
		return false;
	case KVM_EXIT_SHUTDOWN:
		printf("  shutdown\n");
		return false;
	case KVM_EXIT_INTERNAL_ERROR:
		printf("  internal error %u\n", run->internal.suberror);
		return false;
	default:
		printf("  exit %u\n", run->exit_reason);
		return false;
	}
}

static void run_case(const struct test_case *c)
{
	int vm, vcpu, size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	struct kvm_userspace_memory_region slot = {.memory_size = RAM_SIZE};
	struct itimerval limit = {.it_value.tv_sec = 3};
	struct itimerval off = {0};
	struct kvm_run *run;
	bool shutdown = false;
	unsigned seed = 0;

	ram = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	if (ram == MAP_FAILED || vm < 0)
		die("VM");
	slot.userspace_addr = (uintptr_t)ram;
	if (ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000) || ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot))
		die("KVM_SET_USER_MEMORY_REGION");
	vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	if (vcpu < 0)
		die("KVM_CREATE_VCPU");
	run = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED)
		die("kvm_run");
	set_cpuid(vcpu);
	build_tables(c->mode);
	if (c->mode != REAL)
		build_pages(c->mode >= LONG0);
	memcpy(ram + (c->mode == REAL ? 0x7c00 : CODE), c->code, (size_t)(c->end - c->code));
	set_registers(vcpu, c->mode);

	printf("%s\n", c->name);
	setitimer(ITIMER_REAL, &limit, NULL);
	for (int exits = 0; exits < 100; exits++) {
		if (ioctl(vcpu, KVM_RUN, 0)) {
			printf("  KVM_RUN: %s\n", strerror(errno));
			break;
		}
		shutdown = run->exit_reason == KVM_EXIT_SHUTDOWN;
		if (!handle_exit(run, &seed))
			break;
	}
	setitimer(ITIMER_REAL, &off, NULL);
	/* After a shutdown the vCPU's state is not defined. */
	if (!shutdown)
		print_state(vcpu);
	munmap(run, (size_t)size);
	close(vcpu);
	close(vm);
	munmap(ram, RAM_SIZE);
	fflush(stdout);
}

int main(int argc, char **argv)
{
	struct sigaction sa = {.sa_handler = on_alarm};

	sigaction(SIGALRM, &sa, NULL);
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		die("/dev/kvm");
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		bool wanted = argc == 1;

		for (int a = 1; a < argc; a++)
			wanted |= !strcmp(argv[a], cases[i].name);
		if (wanted)
			run_case(&cases[i]);
	}
	return 0;
}
