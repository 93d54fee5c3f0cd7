/* SPDX-License-Identifier: MIT */
/*
 * Drives every statistic that kvmlet keeps, and prints what KVM_GET_STATS_FD says of them at
 * the end: "vm NAME VALUE" and "vcpu NAME VALUE". Knows nothing of kvmlet: on a real
 * /dev/kvm it prints the statistics that are there.
 */
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define RAM    0x200000ul
#define GDT    0x4000ul
#define IDT    0x5000ul
#define CODE   0x10000ul
#define SPIN   0x11000ul /* a word that the guest raises while it spins */
#define STACK  0x20000ul
#define PLUG   0x200000ul   /* slot 1, read while the guest spins */
#define HOLE   0x400000ul   /* no memory */
#define LARGE  0x40000000ul /* slots 2 and 3: 1 GiB here, 2 MiB behind it */
#define IRQ    0x20
#define ROUNDS 50

/* What the engine writes into the guest's memory, each in a page from here on. */
#define SHARED 0x30000ul
enum { CLOCK, STEAL, EOI, WALL_CLOCK, VCPU_INFO, TIME_INFO, RUNSTATE, SHARED_INFO, NR_SHARED };
#define PAGE(which) (SHARED + (which)*4096ul)

/* Guest: each OUT names the step that is done, in %al. */
__asm__(".pushsection .rodata\n"
	"guest:	mov $1, %al; out %al, $0x10\n"
	"	mov 0x400000, %eax\n"             /* MMIO */
	"	mov $1, %eax\n"                   /* hypercall: both vendors' opcodes are */
	"hc:	.byte 0x0f, 0x01, 0xc1\n"         /* the same length */
	"	mov %cr3, %rax; mov %rax, %cr3\n" /* TLB flush */
	"	mov 0x600000, %eax\n"             /* 7 bytes; #PF skips them */
	"	mov $2, %al; out %al, $0x10\n"    /* the VMM injects an interrupt here */
	"	mov $3, %al; out %al, $0x10\n"    /* and an NMI here */
	"	mov $4, %al; out %al, $0x10\n"
	"	hlt\n"
	"1:	mov 0x200000, %rax\n"
	"	mov 0x800000, %ecx; mov 0xa00000, %ecx\n" /* a large page of each kind */
	"	incl 0x11000; jmp 1b\n"
	"pf:	addq $7, 8(%rsp)\n"
	"	add $8, %rsp; iretq\n"
	"irq:	incl 0x11004; iretq\n"
	"nmi:	incl 0x11008; iretq\n"
	"guest_end:\n"
	".popsection\n");
extern const char guest[], hc[], pf[], irq[], nmi[], guest_end[];

static int kvm, vm, vcpu;
static struct kvm_run *run;
static char *ram;
static pthread_t main_thread;

static int call(int fd, const char *name, unsigned long cmd, unsigned long arg)
{
	int ret = ioctl(fd, cmd, arg);

	if (ret < 0)
		err(1, "%s", name);
	return ret;
}
#define CALL(fd, cmd, arg) call(fd, #cmd, cmd, (unsigned long)(arg))

static void *map(size_t size)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		err(1, "mmap");
	return p;
}

static void set_slot(unsigned slot, uint64_t gpa, uint64_t size, void *mem)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot,
		.guest_phys_addr = gpa,
		.memory_size = size,
		.userspace_addr = (uintptr_t)mem,
	};

	CALL(vm, KVM_SET_USER_MEMORY_REGION, &region);
}

/*
 * Memory at a multiple of its size, all of it there: zeroes that the kernel shares, which cost
 * nothing.
 */
static void set_large_slot(unsigned slot, uint64_t gpa, uint64_t size)
{
	char *p = map(2 * size);

	p = (char *)(((uintptr_t)p + size - 1) & ~(size - 1));
	madvise(p, size, MADV_HUGEPAGE); /* faster, where the kernel can */
	if (madvise(p, size, 22 /* MADV_POPULATE_READ */))
		for (uint64_t i = 0; i < size; i += 4096)
			(void)((volatile char *)p)[i];
	set_slot(slot, gpa, size, p);
}

static void set_gate(unsigned vector, uint64_t to)
{
	uint64_t *gate = (uint64_t *)(ram + IDT) + 2 * vector;

	gate[0] = (to & 0xffff) | 8ull << 16 | 0x8e00ull << 32 | (to >> 16 & 0xffff) << 48;
	gate[1] = to >> 32;
}

static uint64_t guest_addr(const char *symbol)
{
	return CODE + (uint64_t)(symbol - guest);
}

static void setup(void)
{
	struct kvm_segment seg = {.limit = -1u, .present = 1, .s = 1, .g = 1};
	struct kvm_regs regs = {.rip = CODE, .rflags = 0x202, .rsp = STACK};
	struct kvm_sregs sregs;
	uint64_t *table;
	FILE *cpuinfo;
	char line[256];

	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		err(1, "/dev/kvm");
	vm = CALL(kvm, KVM_CREATE_VM, 0);
	ram = map(RAM);
	memcpy(ram + CODE, guest, (size_t)(guest_end - guest));
	cpuinfo = fopen("/proc/cpuinfo", "re");
	while (cpuinfo && fgets(line, sizeof(line), cpuinfo))
		if (strstr(line, "AuthenticAMD"))
			ram[guest_addr(hc) + 2] = (char)0xd9; /* VMMCALL */
	if (cpuinfo)
		fclose(cpuinfo);
	table = (uint64_t *)ram;
	table[0x1000 / 8] = 0x2003;
	table[0x2000 / 8] = 0x3003;
	for (uint64_t i = 0; i < 3; i++) /* 0x600000 is not present */
		table[0x3000 / 8 + i] = i << 21 | 0x83;
	table[0x3000 / 8 + 4] = LARGE | 0x83;
	table[0x3000 / 8 + 5] = 2 * LARGE | 0x83;
	table[GDT / 8 + 1] = 0x00af9b000000ffff;
	table[GDT / 8 + 2] = 0x00cf93000000ffff;
	set_gate(2, guest_addr(nmi));
	set_gate(14, guest_addr(pf));
	set_gate(IRQ, guest_addr(irq));
	set_slot(0, 0, RAM, ram);
	set_large_slot(2, LARGE, LARGE);
	set_large_slot(3, 2 * LARGE, 0x200000);

	vcpu = CALL(vm, KVM_CREATE_VCPU, 0);
	run = mmap(NULL, (size_t)CALL(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE,
		   MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED)
		err(1, "mmap of the vCPU");
	CALL(vcpu, KVM_GET_SREGS, &sregs);
	sregs.cr0 = 0x80050033;
	sregs.cr3 = 0x1000;
	sregs.cr4 = 0x620;
	sregs.efer = 0x500;
	sregs.gdt.base = GDT;
	sregs.gdt.limit = 23;
	sregs.idt.base = IDT;
	sregs.idt.limit = 0xfff;
	seg.type = 3;
	seg.selector = 16;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = seg;
	seg.type = 11;
	seg.selector = 8;
	seg.l = 1;
	sregs.cs = seg;
	CALL(vcpu, KVM_SET_SREGS, &sregs);
	CALL(vcpu, KVM_SET_REGS, &regs);
}

static void run_until(unsigned reason)
{
	CALL(vcpu, KVM_RUN, 0);
	if (run->exit_reason != reason)
		errx(1, "exit reason %u, not %u", run->exit_reason, reason);
}

static void run_to_step(int step)
{
	run_until(KVM_EXIT_IO);
	if (((uint8_t *)run)[run->io.data_offset] != step)
		errx(1, "step %u, not %d", ((uint8_t *)run)[run->io.data_offset], step);
}

static void inject(unsigned vector)
{
	struct kvm_vcpu_events events;

	CALL(vcpu, KVM_GET_VCPU_EVENTS, &events);
	if (vector == 2) {
		events.nmi.pending = 1;
		events.flags |= KVM_VCPUEVENT_VALID_NMI_PENDING;
	} else {
		events.interrupt.injected = 1;
		events.interrupt.nr = (uint8_t)vector;
	}
	CALL(vcpu, KVM_SET_VCPU_EVENTS, &events);
}

static void on_signal(int sig)
{
}

static void wait_for_spins(void)
{
	_Atomic uint32_t *spin = (_Atomic uint32_t *)(ram + SPIN);
	uint32_t before = atomic_load(spin);

	while (atomic_load(spin) - before < 3)
		;
}

/*
 * While the guest spins: slots come and go, host memory too. Then a signal, at a moment when
 * the slot is there: no exit can have taken the main thread out of KVM_RUN, where the signal
 * would be lost.
 */
static void *disturb(void *arg)
{
	for (int i = 0; i < ROUNDS; i++) {
		void *plug = map(4096);

		set_slot(1, PLUG, 4096, plug);
		wait_for_spins();
		if (mprotect(plug, 4096, PROT_READ))
			err(1, "mprotect");
		wait_for_spins();
		set_slot(1, PLUG, 0, NULL);
		munmap(plug, 4096);
	}
	set_slot(1, PLUG, 4096, map(4096));
	wait_for_spins();
	pthread_kill(main_thread, SIGUSR1);
	return NULL;
}

static void spin(void)
{
	struct sigaction sa = {.sa_handler = on_signal};
	pthread_t thread;

	sigaction(SIGUSR1, &sa, NULL);
	main_thread = pthread_self();
	if (pthread_create(&thread, NULL, disturb, NULL))
		errx(1, "cannot create a thread");
	while (!ioctl(vcpu, KVM_RUN, 0))
		if (run->exit_reason != KVM_EXIT_MMIO)
			errx(1, "exit reason %u", run->exit_reason);
	if (errno != EINTR)
		err(1, "KVM_RUN");
	pthread_join(thread, NULL);
}

static void set_msr(uint32_t index, uint64_t data)
{
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry e;
	} m = {.head.nmsrs = 1, .e = {.index = index, .data = data}};

	if (CALL(vcpu, KVM_SET_MSRS, &m) != 1)
		warnx("no MSR %#x", index); /* steal time: not on every host */
}

static void set_xen(uint16_t type, uint64_t gpa)
{
	struct kvm_xen_vcpu_attr a = {.type = type, .u.gpa = gpa};

	if (ioctl(vcpu, KVM_XEN_VCPU_SET_ATTR, &a))
		warn("Xen's attribute %u", type);
}

/* KVM_RUN up to the next exit: the caches are written when it begins. */
static void run_once(void)
{
	struct kvm_regs regs;

	CALL(vcpu, KVM_GET_REGS, &regs);
	regs.rip = CODE; /* the first OUT */
	CALL(vcpu, KVM_SET_REGS, &regs);
	run_to_step(1);
}

/* Caches: each is written, loses its page, and is written again. */
static void use_caches(void)
{
	struct kvm_xen_hvm_attr shared = {.type = KVM_XEN_ATTR_TYPE_SHARED_INFO,
					  .u.shared_info.gfn = PAGE(SHARED_INFO) / 4096};
	struct kvm_xen_hvm_config xen = {.msr = 0x40000000};

	set_msr(0x4b564d01, PAGE(CLOCK) | 1);
	set_msr(0x4b564d03, PAGE(STEAL) | 1);
	set_msr(0x4b564d04, PAGE(EOI) | 1);
	set_msr(0x4b564d00, PAGE(WALL_CLOCK));
	run_once();
	CALL(vm, KVM_XEN_HVM_CONFIG, &xen);
	set_xen(KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, PAGE(VCPU_INFO));
	set_xen(KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO, PAGE(TIME_INFO));
	set_xen(KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, PAGE(RUNSTATE));
	CALL(vm, KVM_XEN_HVM_SET_ATTR, &shared);
	run_once();
	if (mprotect(ram + SHARED, NR_SHARED * 4096ul, PROT_READ | PROT_WRITE))
		err(1, "mprotect");
	run_once();
}

static void print_stats(const char *who, int fd)
{
	struct kvm_stats_header head;
	struct kvm_stats_desc *desc;
	uint64_t value;

	if (pread(fd, &head, sizeof(head), 0) != sizeof(head))
		err(1, "statistics");
	desc = calloc(1, sizeof(*desc) + head.name_size);
	if (!desc)
		err(1, NULL);
	for (unsigned i = 0; i < head.num_desc; i++) {
		size_t size = sizeof(*desc) + head.name_size;

		if (pread(fd, desc, size, (off_t)(head.desc_offset + i * size)) != (ssize_t)size ||
		    pread(fd, &value, 8, (off_t)(head.data_offset + desc->offset)) != 8)
			err(1, "statistics");
		printf("%s %s %llu\n", who, desc->name, (unsigned long long)value);
	}
	free(desc);
	close(fd);
}

int main(void)
{
	struct kvm_regs regs;

	setup();
	run_to_step(1);
	use_caches();
	run_until(KVM_EXIT_MMIO);
	run_to_step(2);
	inject(IRQ);
	run_to_step(3);
	inject(2);
	run_to_step(4);
	run_until(KVM_EXIT_HLT);
	if (((uint32_t *)(ram + SPIN))[1] != 1 || ((uint32_t *)(ram + SPIN))[2] != 1)
		errx(1, "the interrupt or the NMI did not arrive");
	spin();
	CALL(vcpu, KVM_GET_REGS, &regs);
	regs.rip = HOLE;
	CALL(vcpu, KVM_SET_REGS, &regs);
	run_until(KVM_EXIT_INTERNAL_ERROR);
	print_stats("vm", CALL(vm, KVM_GET_STATS_FD, 0));
	print_stats("vcpu", CALL(vcpu, KVM_GET_STATS_FD, 0));
	return 0;
}
