/* SPDX-License-Identifier: MIT */
/*
 * A VMM with a confidential guest, small enough to read: what a test of one looks like. It is a
 * plain KVM program and knows nothing of kvmlet:
 *
 *     kvmlet run -- private [SECONDS]
 *
 * The guest has two vCPUs. Each goes through its pages again and again: it asks the VMM (by the
 * hypercall KVM_HC_MAP_GPA_RANGE) to make a page private, writes a secret to it, reads it back,
 * asks for the page to be shared again, and leaves a greeting there. The VMM converts, and gives
 * the private memory back. Meanwhile a thread of the VMM reads all of the guest's shared memory: it
 * must never see a secret.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* What older headers lack: KVM's interface for private memory. */
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
#define EXIT_MEMORY_FAULT       39
#define CAP_VM_TYPES            235
#define SW_PROTECTED_VM         1
#define HC_MAP_GPA_RANGE        12
#define MAP_GPA_RANGE_ENCRYPTED 16

#define PAGE     4096ul
#define VCPUS    2
#define PAGES    32       /* of each vCPU */
#define CODE     0x1000ul /* guest-physical, as all below; shared, and stays so */
#define TABLES   0x2000ul
#define DATA     0x200000ul /* may be private */
#define SIZE     (VCPUS * PAGES * PAGE)
#define SECRET   0x5ec2e75ec2e75ec2ull
#define GREETING 0x1111111111111111ull

static int vm, file;
static uint8_t *low, *shared;
static _Atomic int stop;
static _Atomic unsigned long conversions, scans;

/*
 * The guest. rbx: the page; rbp: the first and, as a number, how many follow; r15: the secret.
 * Its hypercall is VMCALL or VMMCALL, as the processor has it.
 */
static const uint8_t guest_code[] = {
	/* again: */
	0x48, 0x89, 0xeb,           /* mov rbx, rbp */
	0x41, 0xbc, PAGES, 0, 0, 0, /* mov r12d, PAGES */
	/* next: rcx = 1 page; rdx = private */
	0xb8, HC_MAP_GPA_RANGE, 0, 0, 0,        /* mov eax, 12 */
	0xb9, 1, 0, 0, 0,                       /* mov ecx, 1 */
	0xba, MAP_GPA_RANGE_ENCRYPTED, 0, 0, 0, /* mov edx, 16 */
	0x0f, 0x01, 0xc1,                       /* vmcall (patched on AMD) */
	0x48, 0x85, 0xc0,                       /* test rax, rax */
	0x75, 0x2f,                             /* jnz bad */
	0x4c, 0x89, 0x3b,                       /* mov [rbx], r15: the secret */
	0x4c, 0x3b, 0x3b,                       /* cmp r15, [rbx] */
	0x75, 0x27,                             /* jne bad */
	0xb8, HC_MAP_GPA_RANGE, 0, 0, 0,        /* mov eax, 12 */
	0xb9, 1, 0, 0, 0,                       /* mov ecx, 1 */
	0x31, 0xd2,                             /* xor edx, edx */
	0x0f, 0x01, 0xc1,                       /* vmcall */
	0x48, 0x85, 0xc0,                       /* test rax, rax */
	0x75, 0x13,                             /* jnz bad */
	0x4c, 0x89, 0x33,                       /* mov [rbx], r14: the greeting */
	0x48, 0x81, 0xc3, 0, 0x10, 0, 0,        /* add rbx, 4096 */
	0x41, 0xff, 0xcc,                       /* dec r12d */
	0x75, 0xbe,                             /* jnz next */
	0xe6, 0x10,                             /* out 0x10, al: a round is done */
	0xeb, 0xb1,                             /* jmp again */
	/* bad: */
	0x0f, 0x0b, /* ud2 */
};

static void check(int r, const char *what)
{
	if (r < 0)
		err(1, "%s", what);
}

static void convert(uint64_t gpa, uint64_t size, int private)
{
	struct memory_attributes a = {
		.address = gpa, .size = size, .attributes = private ? ATTRIBUTE_PRIVATE : 0};

	check(ioctl(vm, SET_MEMORY_ATTRIBUTES, &a), "KVM_SET_MEMORY_ATTRIBUTES");
	/* What is not private any more need not keep what it was. */
	if (!private)
		check(fallocate(file, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE,
				(off_t)(gpa - DATA), (off_t)size),
		      "fallocate");
	atomic_fetch_add(&conversions, 1);
}

static void add_slot(unsigned slot, uint64_t gpa, uint64_t size, void *host, int gmem)
{
	struct memory_region2 r = {
		.slot = slot,
		.flags = gmem >= 0 ? MEM_GUEST_MEMFD : 0,
		.guest_phys_addr = gpa,
		.memory_size = size,
		.userspace_addr = (uintptr_t)host,
		.guest_memfd = (uint32_t)gmem,
	};

	check(ioctl(vm, SET_USER_MEMORY_REGION2, &r), "KVM_SET_USER_MEMORY_REGION2");
}

static void *map(size_t size)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		err(1, "mmap");
	return p;
}

/* 64-bit mode, the first 4 MiB as they are. */
static void set_up(int vcpu, unsigned n)
{
	const struct kvm_segment code = {
		.limit = ~0u, .selector = 8, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1};
	const struct kvm_segment data = {
		.limit = ~0u, .selector = 16, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1};
	struct kvm_regs regs = {.rip = CODE,
				.rflags = 2,
				.rbp = DATA + n * PAGES * PAGE,
				.r14 = GREETING,
				.r15 = SECRET};
	struct kvm_sregs s;

	check(ioctl(vcpu, KVM_GET_SREGS, &s), "KVM_GET_SREGS");
	s.cs = code;
	s.ds = s.es = s.ss = data;
	s.cr3 = TABLES;
	s.cr4 = 1 << 5;
	s.cr0 = 0x80000001;
	s.efer = 0x500;
	check(ioctl(vcpu, KVM_SET_SREGS, &s), "KVM_SET_SREGS");
	check(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

static void *run(void *arg)
{
	unsigned n = (unsigned)(uintptr_t)arg;
	int vcpu = ioctl(vm, KVM_CREATE_VCPU, n);
	struct kvm_run *r;

	check(vcpu, "KVM_CREATE_VCPU");
	r = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (r == MAP_FAILED)
		err(1, "mmap");
	set_up(vcpu, n);
	for (;;) {
		if (ioctl(vcpu, KVM_RUN, 0) && errno != EINTR)
			err(1, r->exit_reason == EXIT_MEMORY_FAULT
				       ? "the guest touched private memory that there is not"
				       : "KVM_RUN");
		switch (r->exit_reason) {
		case KVM_EXIT_HYPERCALL:
			convert(r->hypercall.args[0], r->hypercall.args[1] * PAGE,
				!!(r->hypercall.args[2] & MAP_GPA_RANGE_ENCRYPTED));
			r->hypercall.ret = 0;
			break;
		case KVM_EXIT_IO:
			if (atomic_load(&stop))
				return NULL;
			break;
		default:
			errx(1, "vCPU %u: exit %u: the guest saw something wrong", n,
			     r->exit_reason);
		}
	}
}

/* What somebody would find who looks at the guest's memory from outside. */
static void *spy(void *arg)
{
	(void)arg;
	while (!atomic_load(&stop)) {
		for (unsigned i = 0; i < VCPUS * PAGES; i++) {
			uint64_t v = __atomic_load_n((uint64_t *)(void *)(shared + i * PAGE),
						     __ATOMIC_RELAXED);

			if (v && v != GREETING)
				errx(1, "a secret in shared memory, page %u: %#lx", i,
				     (unsigned long)v);
		}
		atomic_fetch_add(&scans, 1);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	struct kvm_enable_cap cap = {.cap = KVM_CAP_EXIT_HYPERCALL,
				     .args = {1ull << HC_MAP_GPA_RANGE}};
	struct create_guest_memfd create = {.size = SIZE};
	unsigned seconds = argc > 1 ? (unsigned)atoi(argv[1]) : 1;
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	pthread_t vcpus[VCPUS], eye;
	uint64_t *tables;
	time_t end;

	check(kvm, "/dev/kvm");
	if (!(ioctl(kvm, KVM_CHECK_EXTENSION, CAP_VM_TYPES) & 1 << SW_PROTECTED_VM))
		errx(77, "no VMs with private memory here; try: kvmlet run -- %s", argv[0]);
	vm = ioctl(kvm, KVM_CREATE_VM, SW_PROTECTED_VM);
	check(vm, "KVM_CREATE_VM");
	check(ioctl(vm, KVM_ENABLE_CAP, &cap), "KVM_CAP_EXIT_HYPERCALL");
	file = ioctl(vm, CREATE_GUEST_MEMFD, &create);
	check(file, "KVM_CREATE_GUEST_MEMFD");

	low = map(0x10000);
	shared = map(SIZE);
	memcpy(low + CODE, guest_code, sizeof(guest_code));
	tables = (uint64_t *)(void *)(low + TABLES);
	tables[0] = (TABLES + 0x1000) | 3;
	tables[512] = (TABLES + 0x2000) | 3;
	tables[1024] = 0x83;
	tables[1025] = DATA | 0x83;
	add_slot(0, 0, 0x10000, low, -1);
	add_slot(1, DATA, SIZE, shared, file);

	pthread_create(&eye, NULL, spy, NULL);
	for (uintptr_t i = 0; i < VCPUS; i++)
		pthread_create(&vcpus[i], NULL, run, (void *)i);
	end = time(NULL) + seconds;
	while (time(NULL) < end || !scans || conversions < 4 * VCPUS * PAGES)
		usleep(1000);
	atomic_store(&stop, 1);
	for (unsigned i = 0; i < VCPUS; i++)
		pthread_join(vcpus[i], NULL);
	pthread_join(eye, NULL);
	printf("%lu conversions by %d vCPUs, %lu looks at shared memory, no secret seen\n",
	       conversions, VCPUS, scans);
	return 0;
}
