/* SPDX-License-Identifier: MIT */
/*
 * Random 4-level page tables, control bits, CPL and accesses: prints what each access did, line
 * by line. tests/diff/pages runs it under kvmlet and on /dev/kvm and compares.
 *
 *   page-diff [SEED [COUNT]]
 *
 * The engine's own reference is tests/unit/ref_walk.c; this asks a processor, or what takes its
 * place. Memory: 2 MiB at 0; the page that is accessed has tables of its own.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../random.h"

#define RAM_SIZE 0x200000u
#define GDT      0x1000u
#define IDT      0x2000u
#define TSS      0x3000u
#define HANDLERS 0x6000u /* HLT of vector n at 4n */
#define STACK    0x8000u
#define CODE     0x9000u  /* ring 0 */
#define UCODE    0xa000u  /* ring 3 */
#define TABLES   0x10000u /* PML4, PDPT, PD, PT of low memory */
#define OWN      0x20000u /* PDPT, PD, PT of the page */
#define PAGE     0x30000u
#define LIN      0x8040201000ull /* index 1 at every level */

#define P  1ull
#define RW 2ull
#define US 4ull
#define A  0x20ull
#define D  0x40ull
#define NX (1ull << 63)

static int kvm, vm, vcpu, run_size;
static struct kvm_run *run;
static uint8_t *ram;
static uint64_t rng;

static void die(const char *what)
{
	perror(what);
	exit(2);
}

static uint64_t rnd(void)
{
	return random_next(&rng);
}

static void put(uint64_t at, uint64_t val)
{
	memcpy(ram + at, &val, 8);
}

static uint64_t get(uint64_t at)
{
	uint64_t val;

	memcpy(&val, ram + at, 8);
	return val;
}

static void make_tables(void)
{
	put(GDT + 0x08, 0x00af9b000000ffff);
	put(GDT + 0x10, 0x00cf93000000ffff);
	put(GDT + 0x20, 0x00cff3000000ffff);
	put(GDT + 0x28, 0x00affb000000ffff);
	put(GDT + 0x30, 0x67 | (uint64_t)TSS << 16 | 0x8bull << 40);
	put(TSS + 4, STACK);
	for (unsigned v = 0; v < 32; v++) {
		put(IDT + 16 * v, (HANDLERS + 4 * v) | 8u << 16 | 0x8eull << 40);
		put(IDT + 16 * v + 8, 0);
	}
	memset(ram + HANDLERS, 0xf4, 0x1000);
	put(TABLES, TABLES + 0x1000 + 7);
	put(TABLES + 0x1000, TABLES + 0x2000 + 7);
	put(TABLES + 0x2000, TABLES + 0x3000 + 7);
	for (unsigned i = 0; i < 512; i++)
		put(TABLES + 0x3000 + i * 8, i << 12 | P | RW | (i << 12 == UCODE ? US : 0));
}

/* One for each access: no KVM need notice that the program changes page tables. */
static void make_vm(void)
{
	static struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 e[256];
	} c;
	struct kvm_userspace_memory_region slot = {.memory_size = RAM_SIZE};

	c.head.nent = 256;
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	slot.userspace_addr = (uintptr_t)ram;
	if (vm < 0 || ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000) ||
	    ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot))
		die("VM");
	vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	run = mmap(NULL, (size_t)run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (vcpu < 0 || run == MAP_FAILED || ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &c) ||
	    ioctl(vcpu, KVM_SET_CPUID2, &c))
		die("vCPU");
}

static struct kvm_segment segment(unsigned sel, unsigned type, unsigned dpl, bool l)
{
	return (struct kvm_segment){.limit = 0xffffffff,
				    .selector = (uint16_t)sel,
				    .type = (uint8_t)type,
				    .present = 1,
				    .dpl = (uint8_t)dpl,
				    .db = !l,
				    .s = 1,
				    .l = l,
				    .g = 1};
}

static uint64_t random_entry(uint64_t to)
{
	uint64_t e = to | (rnd() & (A | D)) | (rnd() & 0xe00);

	e |= rnd() % 12 ? P : 0;
	e |= rnd() % 4 ? RW : 0;
	e |= rnd() % 3 ? US : 0;
	e |= rnd() % 8 ? 0 : NX;
	e |= rnd() % 24 ? 0 : 1ull << 51; /* reserved, where addresses are not so long */
	return e;
}

static const char *const kinds[] = {"read", "write", "exec"};
static const uint8_t code[3][4] = {
	{0x8a, 0x03, 0xf4}, /* mov al, [rbx]; hlt */
	{0x88, 0x03, 0xf4}, /* mov [rbx], al; hlt */
	{0xff, 0xe3, 0xf4}, /* jmp rbx */
};

static void one(unsigned n)
{
	unsigned kind = (unsigned)(rnd() % 3), bits = (unsigned)rnd();
	bool user = bits & 1, wp = bits & 2, nxe = bits & 4, smep = bits & 8, smap = bits & 16,
	     ac = bits & 32;
	struct kvm_regs r = {.rip = user ? UCODE : CODE,
			     .rsp = STACK,
			     .rflags = 2 | (ac ? 1u << 18 : 0),
			     .rbx = LIN,
			     .rax = 0x5a};
	struct kvm_sregs s;
	uint64_t e[4];

	e[3] = random_entry(OWN);
	e[2] = random_entry(OWN + 0x1000);
	e[1] = random_entry(OWN + 0x2000);
	e[0] = random_entry(PAGE);
	make_vm();
	make_tables();
	put(TABLES + 8, e[3]);
	put(OWN + 8, e[2]);
	put(OWN + 0x1008, e[1]);
	put(OWN + 0x2008, e[0]);
	memset(ram + PAGE, 0xf4, 16);
	memcpy(ram + (user ? UCODE : CODE), code[kind], 4);
	if (ioctl(vcpu, KVM_GET_SREGS, &s))
		die("KVM_GET_SREGS");
	s.cs = segment(user ? 0x2b : 8, 11, user ? 3 : 0, true);
	s.ss = s.ds = s.es = s.fs = s.gs = segment(user ? 0x23 : 0x10, 3, user ? 3 : 0, false);
	s.gdt = (struct kvm_dtable){.base = GDT, .limit = 0x3f};
	s.idt = (struct kvm_dtable){.base = IDT, .limit = 0x1ff};
	s.tr = (struct kvm_segment){
		.base = TSS, .limit = 0x67, .selector = 0x30, .type = 11, .present = 1};
	s.cr0 = 0x80000033 | (wp ? 1u << 16 : 0);
	s.cr2 = 0;
	s.cr3 = TABLES;
	s.cr4 = 0x20 | (smep ? 1u << 20 : 0) | (smap ? 1u << 21 : 0);
	s.efer = 0x500 | (nxe ? 0x800 : 0);
	if (ioctl(vcpu, KVM_SET_SREGS, &s)) {
		s.cr4 = 0x20; /* a processor without them, on either side */
		smep = smap = false;
		if (ioctl(vcpu, KVM_SET_SREGS, &s))
			die("KVM_SET_SREGS");
	}
	if (ioctl(vcpu, KVM_SET_REGS, &r))
		die("KVM_SET_REGS");
	if (ioctl(vcpu, KVM_RUN, 0))
		die("KVM_RUN");
	if (ioctl(vcpu, KVM_GET_REGS, &r) || ioctl(vcpu, KVM_GET_SREGS, &s))
		die("KVM_GET_REGS");
	printf("%u cpl%u %s wp%u nxe%u smep%u smap%u ac%u %llx %llx %llx %llx: ", n, user ? 3 : 0,
	       kinds[kind], wp, nxe, smep, smap, ac, (unsigned long long)e[3],
	       (unsigned long long)e[2], (unsigned long long)e[1], (unsigned long long)e[0]);
	if (run->exit_reason != KVM_EXIT_HLT)
		printf("exit %u", run->exit_reason);
	else if (r.rip >= HANDLERS && r.rip < HANDLERS + 0x80)
		printf("vector %llu error %llx cr2 %llx", (r.rip - 1 - HANDLERS) / 4,
		       (r.rip - 1 - HANDLERS) / 4 >= 10 ? (unsigned long long)get(r.rsp) : 0ull,
		       s.cr2);
	else
		printf("done");
	printf(" al %llx page %x ad %llx %llx %llx %llx\n", r.rax & 0xff, ram[PAGE],
	       (unsigned long long)(get(TABLES + 8) & (A | D)),
	       (unsigned long long)(get(OWN + 8) & (A | D)),
	       (unsigned long long)(get(OWN + 0x1008) & (A | D)),
	       (unsigned long long)(get(OWN + 0x2008) & (A | D)));
	munmap(run, (size_t)run_size);
	close(vcpu);
	close(vm);
}

int main(int argc, char **argv)
{
	unsigned count = argc > 2 ? (unsigned)strtoul(argv[2], NULL, 0) : 1000;

	rng = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		die("/dev/kvm");
	run_size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	ram = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (run_size < 0 || ram == MAP_FAILED)
		die("memory");
	for (unsigned n = 0; n < count; n++)
		one(n);
	return 0;
}
