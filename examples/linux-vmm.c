/* SPDX-License-Identifier: MIT */
/*
 * A small virtual machine monitor that boots Linux. docs/tutorial.md walks through it.
 *
 *   linux-vmm.c          vCPUs, a serial port, commands
 *   linux-vmm-boot.c     the kernel, and the tables that describe the machine to it
 *   linux-vmm-memory.c   memory, which comes and goes
 *   linux-vmm-virtio.c   virtio: rings and registers, a thread for each device
 *   linux-vmm-devices.c  a disk, a console, a balloon, hot-plugged memory
 *   linux-vmm-migrate.c  the guest moves to another process
 *
 * The processor is whatever answers at /dev/kvm: a real one, or kvmlet's. How the devices get at
 * the guest's memory is what the library is for: they reach the rings through caches
 * (kvmlet/gpc.h), and data through kvmlet/vm.h. Nothing holds a pointer into guest memory for
 * longer than it takes to use it, so the memory may change under the devices: the balloon gives
 * pages back to the host, and slots are unplugged, while the disk reads into their neighbours.
 *
 *   cc linux-vmm*.c $(pkg-config --cflags --libs kvmlet) -lpthread
 *   kvmlet run -- ./linux-vmm KERNEL [--initrd FILE] [--disk FILE] [--memory MIB] [--cpus N]
 *                             [--balloon MIB] [--hotplug MIB] [--append WORDS]
 *                             [--control FIFO] [--incoming SOCKET]
 *
 * Commands come through the FIFO, one a line: "balloon MIB", "hotplug MIB", "migrate SOCKET". It
 * ends when the guest turns its machine off, or has gone to who waits with --incoming SOCKET and
 * otherwise the same arguments.
 */
#include "linux-vmm.h"

#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <linux/serial_reg.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

int kvm, vm, nr_cpus = 1;
struct vcpu vcpus[MAX_CPUS];

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
	uint8_t enabled, line, modem, scratch, divisor[2];
	bool sent; /* the guest has not been told yet that it may send again */
} serial;
static pthread_mutex_t serial_lock = PTHREAD_MUTEX_INITIALIZER;
static int serial_irq; /* an eventfd */

static void serial_may_send(void)
{
	serial.sent = true;
	if ((serial.enabled & UART_IER_THRI) && eventfd_write(serial_irq, 1))
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

void serial_stop(void)
{
	pthread_mutex_lock(&serial_lock);
}

void serial_go(void)
{
	pthread_mutex_unlock(&serial_lock);
}

int serial_save(put_fn *put)
{
	return put(&serial, sizeof(serial));
}

void serial_load(get_fn *get)
{
	get(&serial, sizeof(serial));
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
	pthread_mutex_lock(&serial_lock);
	for (uint32_t i = 0; i < run->io.count; i++) {
		if (out)
			serial_write(run->io.port - SERIAL, data[i]);
		else
			data[i] = serial_read(run->io.port - SERIAL);
	}
	pthread_mutex_unlock(&serial_lock);
}

static struct {
	pthread_mutex_t lock;
	pthread_cond_t changed;
	atomic_bool stop;
	int stopped;
} pause_state = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

static __thread struct kvm_run *my_run;

/* KVM_RUN ends, or does not begin: the signal may come just before the call. */
static void kicked(int sig)
{
	(void)sig;
	if (my_run)
		my_run->immediate_exit = 1;
}

void vcpus_stop(void)
{
	pthread_mutex_lock(&pause_state.lock);
	atomic_store(&pause_state.stop, true);
	for (int i = 0; i < nr_cpus; i++)
		pthread_kill(vcpus[i].thread, SIGUSR1);
	while (pause_state.stopped < nr_cpus)
		pthread_cond_wait(&pause_state.changed, &pause_state.lock);
	pthread_mutex_unlock(&pause_state.lock);
}

void vcpus_go(void)
{
	pthread_mutex_lock(&pause_state.lock);
	atomic_store(&pause_state.stop, false);
	pthread_cond_broadcast(&pause_state.changed);
	pthread_mutex_unlock(&pause_state.lock);
}

static void wait_to_go(int fd, struct kvm_run *run)
{
	/* The answer to the last exit is taken by the next KVM_RUN; this one does no more. */
	run->immediate_exit = 1;
	ioctl(fd, KVM_RUN, 0);
	pthread_mutex_lock(&pause_state.lock);
	pause_state.stopped++;
	pthread_cond_broadcast(&pause_state.changed);
	while (atomic_load(&pause_state.stop))
		pthread_cond_wait(&pause_state.changed, &pause_state.lock);
	pause_state.stopped--;
	pthread_mutex_unlock(&pause_state.lock);
	run->immediate_exit = 0;
}

static void *vcpu_thread(void *arg)
{
	int fd = ((struct vcpu *)arg)->fd;
	size_t size = (size_t)CALL(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	struct kvm_run *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (run == MAP_FAILED)
		err(1, "a vCPU's run area");
	my_run = run;
	for (;;) {
		if (atomic_load(&pause_state.stop))
			wait_to_go(fd, run);
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

	memory_start();
	serial_irq = interrupt(SERIAL_GSI);
}

/* ---- commands ----------------------------------------------------------------------------------
 */

static void *control_thread(void *arg)
{
	FILE *commands = arg;
	char line[200], path[200];
	unsigned mib;
	int error;

	while (fgets(line, sizeof(line), commands)) {
		if (sscanf(line, "balloon %u", &mib) == 1) {
			balloon_resize(BALLOON, mib);
		} else if (sscanf(line, "hotplug %u", &mib) == 1) {
			hotplug_resize(MEMORY, mib);
		} else if (sscanf(line, "migrate %199s", path) == 1) {
			error = migrate_to(path);
			fprintf(stderr, "linux-vmm: the guest stays: %s\n", strerror(-error));
		} else {
			fprintf(stderr, "linux-vmm: what is %s", line);
		}
	}
	return NULL;
}

static void control_start(const char *file)
{
	int fd = open(file, O_RDWR | O_CLOEXEC); /* it has a writer, and so no end */
	FILE *commands = fd < 0 ? NULL : fdopen(fd, "r");
	pthread_t thread;

	if (!commands)
		err(1, "%s", file);
	if (pthread_create(&thread, NULL, control_thread, commands))
		errx(1, "no thread for commands");
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
		{"initrd", 1, NULL, 'i'},  {"disk", 1, NULL, 'd'},    {"memory", 1, NULL, 'm'},
		{"cpus", 1, NULL, 'c'},    {"balloon", 1, NULL, 'b'}, {"append", 1, NULL, 'a'},
		{"hotplug", 1, NULL, 'h'}, {"control", 1, NULL, 'C'}, {"incoming", 1, NULL, 'I'},
		{NULL, 0, NULL, 0},
	};
	const struct sigaction kick = {.sa_handler = kicked};
	const char *initrd = NULL, *disk = NULL, *words = "console=ttyS0 panic=-1";
	const char *control = NULL, *incoming = NULL;
	unsigned balloon = 0, hotplug = 0;
	int c;

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
			memory = number("memory", optarg, 64, MAX_MEMORY >> 20) << 20;
			break;
		case 'c':
			nr_cpus = (int)number("cpus", optarg, 1, MAX_CPUS);
			break;
		case 'b':
			balloon = (unsigned)number("balloon", optarg, 0, MAX_MEMORY >> 20);
			break;
		case 'h':
			hotplug = (unsigned)number("hotplug", optarg, 0, MAX_BLOCKS * BLOCK >> 20);
			break;
		case 'C':
			control = optarg;
			break;
		case 'I':
			incoming = optarg;
			break;
		default:
			return 2;
		}
	}
	if (optind + 1 != argc)
		errx(2, "usage: linux-vmm [OPTIONS] KERNEL");

	make_machine();
	if (disk)
		disk_start(DISK, disk);
	console_start(CONSOLE);
	balloon_start(BALLOON, balloon);
	hotplug_start(MEMORY, hotplug);
	/* All of them exist before one runs: the guest looks for them. */
	for (int i = 0; i < nr_cpus; i++) {
		vcpus[i].fd = CALL(vm, KVM_CREATE_VCPU, i);
		set_cpuid(vcpus[i].fd, i);
		set_msrs(vcpus[i].fd);
	}
	if (incoming) {
		migrate_from(incoming);
	} else {
		load_linux(argv[optind], initrd, words);
		set_boot_state(vcpus[0].fd); /* the others wait until the guest starts them */
	}
	sigaction(SIGUSR1, &kick, NULL);
	for (int i = 0; i < nr_cpus; i++)
		if (pthread_create(&vcpus[i].thread, NULL, vcpu_thread, &vcpus[i]))
			errx(1, "no thread for a vCPU");
	if (control)
		control_start(control);
	pthread_join(vcpus[0].thread, NULL);
	return 0;
}
