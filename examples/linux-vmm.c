/* SPDX-License-Identifier: MIT */
/*
 * A small virtual machine monitor that boots Linux. docs/tutorial.md walks through it.
 *
 *   linux-vmm.c         memory, vCPUs, a serial port
 *   linux-vmm-boot.c    the kernel, and the tables that describe the machine to it
 *   linux-vmm-virtio.c  a disk, a console and a balloon, each with a thread of its own
 *
 * The processor is whatever answers at /dev/kvm: a real one, or kvmlet's. How the devices get at
 * the guest's memory is what the library is for: they reach the rings through caches
 * (kvmlet/gpc.h), and data through kvmlet/vm.h. Nothing holds a pointer into guest memory for
 * longer than it takes to use it, so the memory may change under the devices: the balloon gives
 * pages back to the host while the disk reads into their neighbours.
 *
 *   cc linux-vmm*.c $(pkg-config --cflags --libs kvmlet) -lpthread
 *   kvmlet run -- ./linux-vmm KERNEL [--initrd FILE] [--disk FILE] [--memory MIB] [--cpus N]
 *                             [--balloon MIB] [--append WORDS]
 *
 * It ends when the guest turns its machine off.
 */
#include "linux-vmm.h"

#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <linux/serial_reg.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define MAX_CPUS 16
#define MAX_MIB  2048ul

int vm, nr_cpus = 1;
uint8_t *ram;
size_t memory = 256ul << 20;
static int kvm;

int call(int fd, const char *name, unsigned long cmd, unsigned long arg)
{
	int ret = ioctl(fd, cmd, arg);

	if (ret < 0)
		err(1, "%s", name);
	return ret;
}

/* ---- a serial port, for the kernel's first words -----------------------------------------------
 */

static struct {
	pthread_mutex_t lock;
	int irq; /* an eventfd */
	uint8_t enabled, line, modem, scratch, divisor[2];
	bool sent; /* the guest has not been told yet that it may send again */
} serial = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void serial_may_send(void)
{
	serial.sent = true;
	if ((serial.enabled & UART_IER_THRI) && eventfd_write(serial.irq, 1))
		err(1, "eventfd");
}

static void serial_write(unsigned reg, uint8_t value)
{
	if (reg <= UART_IER && (serial.line & UART_LCR_DLAB)) {
		serial.divisor[reg] = value;
		return;
	}
	switch (reg) {
	case UART_TX:
		if (write(STDOUT_FILENO, &value, 1) != 1)
			err(1, "the console");
		serial_may_send();
		break;
	case UART_IER:
		serial.enabled = value & 15;
		serial_may_send();
		break;
	case UART_LCR:
		serial.line = value;
		break;
	case UART_MCR:
		serial.modem = value;
		break;
	case UART_SCR:
		serial.scratch = value;
		break;
	}
}

static uint8_t serial_read(unsigned reg)
{
	bool told;

	if (reg <= UART_IER && (serial.line & UART_LCR_DLAB))
		return serial.divisor[reg];
	switch (reg) {
	case UART_IER:
		return serial.enabled;
	case UART_IIR:
		told = serial.sent && (serial.enabled & UART_IER_THRI);
		serial.sent = serial.sent && !told;
		return told ? UART_IIR_THRI : UART_IIR_NO_INT;
	case UART_LCR:
		return serial.line;
	case UART_MCR:
		return serial.modem;
	case UART_LSR:
		return UART_LSR_TEMT | UART_LSR_THRE;
	case UART_MSR:
		if (serial.modem & UART_MCR_LOOP)
			return (uint8_t)((serial.modem & UART_MCR_RTS) << 3 |
					 (serial.modem & UART_MCR_DTR) << 5 |
					 (serial.modem & (UART_MCR_OUT1 | UART_MCR_OUT2)) << 4);
		return UART_MSR_DCD | UART_MSR_DSR | UART_MSR_CTS;
	case UART_SCR:
		return serial.scratch;
	default:
		return 0;
	}
}

/* ---- vCPUs -------------------------------------------------------------------------------------
 */

static void port(struct kvm_run *run)
{
	uint8_t *data = (uint8_t *)run + run->io.data_offset;
	bool out = run->io.direction == KVM_EXIT_IO_OUT;

	if (run->io.port == POWER && out && *data == POWER_OFF)
		exit(0);
	if (run->io.port < SERIAL || run->io.port >= SERIAL + 8 || run->io.size != 1) {
		if (!out)
			memset(data, 0xff, run->io.size * run->io.count);
		return;
	}
	pthread_mutex_lock(&serial.lock);
	for (uint32_t i = 0; i < run->io.count; i++) {
		if (out)
			serial_write(run->io.port - SERIAL, data[i]);
		else
			data[i] = serial_read(run->io.port - SERIAL);
	}
	pthread_mutex_unlock(&serial.lock);
}

static void *vcpu_thread(void *arg)
{
	int fd = (int)(intptr_t)arg;
	size_t size = (size_t)CALL(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	struct kvm_run *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (run == MAP_FAILED)
		err(1, "a vCPU's run area");
	for (;;) {
		if (ioctl(fd, KVM_RUN, 0)) {
			/* A signal; or this vCPU has just been started by another. */
			if (errno != EINTR && errno != EAGAIN)
				err(1, "KVM_RUN");
			continue;
		}
		switch (run->exit_reason) {
		case KVM_EXIT_IO:
			port(run);
			break;
		case KVM_EXIT_MMIO:
			virtio_mmio(run);
			break;
		case KVM_EXIT_SHUTDOWN:
			errx(1, "the guest has reset its machine");
		default:
			errx(1, "exit %u", run->exit_reason);
		}
	}
}

/* What the host has, and who this vCPU is. */
static void set_cpuid(int fd, int id)
{
	struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[100];
	} cpuid = {.head = {.nent = 100}};

	CALL(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid);
	for (unsigned i = 0; i < cpuid.head.nent; i++) {
		struct kvm_cpuid_entry2 *e = &cpuid.entries[i];

		if (e->function == 1) {
			e->ebx = (e->ebx & 0xffffff) | (uint32_t)id << 24;
			e->ecx |= 1u << 31; /* there is a hypervisor */
			if (ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_TSC_DEADLINE_TIMER) > 0)
				e->ecx |= 1u << 24;
		} else if (e->function == 0xb || e->function == 0x1f) {
			e->edx = (uint32_t)id;
		}
	}
	CALL(fd, KVM_SET_CPUID2, &cpuid);
}

/* What firmware sets on every processor. */
static void set_msrs(int fd)
{
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entries[2];
	} msrs = {
		.head = {.nmsrs = 2},
		.entries = {{.index = 0x1a0, .data = 1},            /* fast string operations */
			    {.index = 0x2ff, .data = 1 << 11 | 6}}, /* memory is write-back */
	};

	if (CALL(fd, KVM_SET_MSRS, &msrs) != 2)
		errx(1, "KVM_SET_MSRS");
}

/* ---- the machine -------------------------------------------------------------------------------
 */

static void make_machine(void)
{
	struct kvm_userspace_memory_region slot = {.memory_size = memory};
	uint64_t identity_map = 0xfffbc000;
	struct kvm_pit_config pit = {0};

	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		err(1, "/dev/kvm (kvmlet run -- ... has one)");
	vm = CALL(kvm, KVM_CREATE_VM, 0);
	CALL(vm, KVM_SET_IDENTITY_MAP_ADDR, &identity_map);
	CALL(vm, KVM_SET_TSS_ADDR, 0xfffbd000);
	CALL(vm, KVM_CREATE_IRQCHIP, 0);
	CALL(vm, KVM_CREATE_PIT2, &pit);

	ram = mmap(NULL, memory, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (ram == MAP_FAILED)
		err(1, "memory");
	slot.userspace_addr = (uint64_t)ram;
	CALL(vm, KVM_SET_USER_MEMORY_REGION, &slot);
	virtio_memory(0, 0, memory, ram);
	serial.irq = interrupt(SERIAL_GSI);
}

static unsigned long number(const char *what, const char *arg, unsigned long min, unsigned long max)
{
	char *end;
	unsigned long n = strtoul(arg, &end, 10);

	if (*end || n < min || n > max)
		errx(2, "--%s: from %lu to %lu", what, min, max);
	return n;
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{"initrd", 1, NULL, 'i'}, {"disk", 1, NULL, 'd'},    {"memory", 1, NULL, 'm'},
		{"cpus", 1, NULL, 'c'},   {"balloon", 1, NULL, 'b'}, {"append", 1, NULL, 'a'},
		{NULL, 0, NULL, 0},
	};
	const char *initrd = NULL, *disk = NULL, *words = "console=ttyS0 panic=-1";
	unsigned balloon = 0;
	pthread_t thread[MAX_CPUS];
	int c, fd[MAX_CPUS];

	while ((c = getopt_long(argc, argv, "", options, NULL)) >= 0) {
		switch (c) {
		case 'i':
			initrd = optarg;
			break;
		case 'd':
			disk = optarg;
			break;
		case 'a':
			words = optarg;
			break;
		case 'm':
			memory = number("memory", optarg, 64, MAX_MIB) << 20;
			break;
		case 'c':
			nr_cpus = (int)number("cpus", optarg, 1, MAX_CPUS);
			break;
		case 'b':
			balloon = (unsigned)number("balloon", optarg, 0, MAX_MIB);
			break;
		default:
			return 2;
		}
	}
	if (optind + 1 != argc)
		errx(2, "usage: linux-vmm [OPTIONS] KERNEL");

	make_machine();
	load_linux(argv[optind], initrd, words);
	if (disk)
		disk_start(0, disk);
	console_start(1);
	balloon_start(2, balloon);
	/* All of them exist before one runs: the guest looks for them. */
	for (int i = 0; i < nr_cpus; i++) {
		fd[i] = CALL(vm, KVM_CREATE_VCPU, i);
		set_cpuid(fd[i], i);
		set_msrs(fd[i]);
	}
	set_boot_state(fd[0]); /* the others wait until the guest starts them */
	for (int i = 0; i < nr_cpus; i++)
		if (pthread_create(&thread[i], NULL, vcpu_thread, (void *)(intptr_t)fd[i]))
			errx(1, "no thread for a vCPU");
	pthread_join(thread[0], NULL);
	return 0;
}
