/* SPDX-License-Identifier: MIT */
/*
 * A complete KVM program: two vCPUs in 64-bit mode, a console on an I/O port, a memory-mapped
 * device, and a memory slot that is pulled out and plugged in again while both vCPUs read it.
 *
 * Nothing here knows of kvmlet: only <linux/kvm.h> is used, and it runs the same on a real
 * /dev/kvm (./hello-vmm) and without one (kvmlet run -- ./hello-vmm).
 */
#include <err.h>
#include <fcntl.h>
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

#define VCPUS  2
#define ROUNDS 200

/* Guest-physical addresses; the guest's page tables map them one to one. */
#define CODE   0x10000ul
#define STOP   0x11000ul  /* a word: guests go on while it is 0 */
#define RAM    0x200000ul /* size of slot 0 */
#define PLUG   0x200000ul /* slot 1: the one that comes and goes */
#define DEVICE 0x400000ul /* never memory */

/*
 * The guest: %edi is the number of the vCPU. It greets, then reads PLUG until it is told to
 * stop: r8 counts what memory answered, r9 what the VMM answered (nothing plugged in), r11
 * contents older than what it had seen before (r10), which must not happen.
 */
__asm__(".pushsection .rodata\n"
	"guest:	lea hello(%rip), %rsi; mov $0x3f8, %edx\n"
	"1:	lodsb; test %al, %al; jz 2f; out %al, %dx; jmp 1b\n"
	"2:	lea 0x30(%rdi), %eax; out %al, %dx; mov $0x0a, %al; out %al, %dx\n"
	"	xor %r8d, %r8d; xor %r9d, %r9d; xor %r10d, %r10d; xor %r11d, %r11d\n"
	"3:	mov 0x200000, %rax; cmp $-1, %rax; je 5f\n"
	"	inc %r8; cmp %r10, %rax; jae 4f; inc %r11\n"
	"4:	mov %rax, %r10; jmp 6f\n"
	"5:	inc %r9\n"
	"6:	cmpl $0, 0x11000; je 3b\n"
	"	mov $0x400000, %ebx\n" /* report to the device */
	"	mov %r8, 0(%rbx); mov %r9, 8(%rbx); mov %r11, 16(%rbx); hlt\n"
	"hello:	.asciz \"hello from vCPU \"\n"
	"guest_end:\n"
	".popsection\n");
extern const char guest[], guest_end[];

struct vcpu {
	pthread_t thread;
	int id, fd;
	struct kvm_run *run;
	char line[80];
	unsigned len;
	uint64_t report[3]; /* the device's registers: from memory, from the hole, stale */
};

static int vm;
static atomic_int greeted;

static int call(int fd, const char *name, unsigned long cmd, unsigned long arg)
{
	int ret = ioctl(fd, cmd, arg);

	if (ret < 0)
		err(1, "%s", name);
	return ret;
}
#define CALL(fd, cmd, arg) call(fd, #cmd, cmd, (unsigned long)(arg))

static char *new_memory(size_t size)
{
	char *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

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

static void console(struct vcpu *v, char c)
{
	if (v->len < sizeof(v->line) - 1)
		v->line[v->len++] = c;
	if (c == '\n') {
		fwrite(v->line, 1, v->len, stdout);
		v->len = 0;
		greeted++;
	}
}

static void mmio(struct vcpu *v)
{
	uint64_t addr = v->run->mmio.phys_addr;

	if (v->run->mmio.is_write && addr >= DEVICE && addr < DEVICE + sizeof(v->report))
		memcpy(&v->report[(addr - DEVICE) / 8], v->run->mmio.data, 8);
	else if (!v->run->mmio.is_write && addr == PLUG)
		memset(v->run->mmio.data, 0xff, 8); /* nobody there */
	else
		errx(1, "vCPU %d: unexpected access to %#lx", v->id, (unsigned long)addr);
}

static void *run_vcpu(void *arg)
{
	struct vcpu *v = arg;
	struct kvm_run *run = v->run;

	for (;;) {
		CALL(v->fd, KVM_RUN, 0);
		switch (run->exit_reason) {
		case KVM_EXIT_IO:
			console(v, ((char *)run)[run->io.data_offset]);
			break;
		case KVM_EXIT_MMIO:
			mmio(v);
			break;
		case KVM_EXIT_HLT:
			return NULL;
		default:
			errx(1, "vCPU %d: exit reason %u", v->id, run->exit_reason);
		}
	}
}

/* 64-bit mode with paging, as if a boot loader had been there. */
static void new_vcpu(struct vcpu *v, int id, int kvm)
{
	struct kvm_segment seg = {.limit = -1u, .present = 1, .s = 1, .g = 1};
	struct kvm_regs regs = {.rip = CODE, .rflags = 2, .rdi = (uint64_t)id};
	struct kvm_sregs sregs;

	v->id = id;
	v->fd = CALL(vm, KVM_CREATE_VCPU, id);
	v->run = mmap(NULL, (size_t)CALL(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE,
		      MAP_SHARED, v->fd, 0);
	if (v->run == MAP_FAILED)
		err(1, "mmap of vCPU %d", id);
	CALL(v->fd, KVM_GET_SREGS, &sregs);
	sregs.cr0 = 0x80050033; /* PG, AM, WP, NE, ET, MP, PE */
	sregs.cr3 = 0x1000;
	sregs.cr4 = 0x620;  /* PAE, OSFXSR, OSXMMEXCPT */
	sregs.efer = 0x500; /* LME, LMA */
	seg.type = 3;
	seg.selector = 16;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = seg;
	seg.type = 11;
	seg.selector = 8;
	seg.l = 1;
	sregs.cs = seg;
	CALL(v->fd, KVM_SET_SREGS, &sregs);
	CALL(v->fd, KVM_SET_REGS, &regs);
}

int main(void)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), bad = 0;
	struct timespec pause = {.tv_nsec = 200000};
	struct vcpu vcpus[VCPUS] = {0};
	char *ram, *plug;
	uint64_t *table;

	if (kvm < 0)
		err(1, "/dev/kvm");
	vm = CALL(kvm, KVM_CREATE_VM, 0);
	ram = new_memory(RAM);
	plug = new_memory(4096);
	memcpy(ram + CODE, guest, (size_t)(guest_end - guest));
	table = (uint64_t *)ram;
	table[0x1000 / 8] = 0x2003; /* PML4 -> PDPT -> page directory -> 2 MiB pages */
	table[0x2000 / 8] = 0x3003;
	for (uint64_t i = 0; i < 3; i++)
		table[0x3000 / 8 + i] = i << 21 | 0x83;
	set_slot(0, 0, RAM, ram);
	set_slot(1, PLUG, 4096, plug);

	for (int i = 0; i < VCPUS; i++)
		new_vcpu(&vcpus[i], i, kvm);
	for (int i = 0; i < VCPUS; i++)
		if (pthread_create(&vcpus[i].thread, NULL, run_vcpu, &vcpus[i]))
			errx(1, "cannot create a thread");
	while (greeted < VCPUS)
		nanosleep(&pause, NULL);

	for (uint64_t round = 1; round <= ROUNDS; round++) {
		set_slot(1, PLUG, 0, NULL); /* out: from here on nobody reads the page */
		memcpy(plug, &round, sizeof(round));
		nanosleep(&pause, NULL);
		set_slot(1, PLUG, 4096, plug); /* and in again */
		nanosleep(&pause, NULL);
	}
	atomic_store((_Atomic uint32_t *)(ram + STOP), 1);

	for (int i = 0; i < VCPUS; i++) {
		uint64_t *r = vcpus[i].report;

		pthread_join(vcpus[i].thread, NULL);
		printf("vCPU %d: %9lu reads from memory, %6lu from the hole, %lu stale\n", i, r[0],
		       r[1], r[2]);
		bad |= !r[0] || !r[1] || r[2];
	}
	printf("%d unplugs under two running vCPUs: %s\n", ROUNDS, bad ? "FAILED" : "ok");
	return bad;
}
