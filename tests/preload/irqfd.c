/* SPDX-License-Identifier: MIT */
/*
 * irqfds of a program that knows nothing of the thread and the descriptors behind them: signalled
 * by another process, across close_range(), fork and signals.
 */
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/syscall.h>

#include "t.h"

#define MANY 100

static int kvm, vm;

static int make_vm(void)
{
	int fd = ioctl(kvm, KVM_CREATE_VM, 0);

	NEED(fd >= 0);
	NEED(!ioctl(fd, KVM_CREATE_IRQCHIP, 0));
	return fd;
}

/* A masked pin shows in irr what its level is. */
static void level_triggered(int v, unsigned pin)
{
	struct kvm_irqchip c = {.chip_id = KVM_IRQCHIP_IOAPIC};

	NEED(!ioctl(v, KVM_GET_IRQCHIP, &c));
	c.chip.ioapic.redirtbl[pin].bits = 0x18050 + pin;
	NEED(!ioctl(v, KVM_SET_IRQCHIP, &c));
}

static uint32_t irr(int v)
{
	struct kvm_irqchip c = {.chip_id = KVM_IRQCHIP_IOAPIC};

	NEED(!ioctl(v, KVM_GET_IRQCHIP, &c));
	return c.chip.ioapic.irr;
}

static bool comes(int v, unsigned pin)
{
	for (int i = 0; i < 20000; i++) {
		if (irr(v) & 1u << pin)
			return true;
		usleep(500);
	}
	return false;
}

static int irqfd(int v, int fd, unsigned gsi, unsigned flags, int resample)
{
	struct kvm_irqfd f = {.fd = fd, .gsi = gsi, .flags = flags, .resamplefd = resample};

	return ioctl(v, KVM_IRQFD, &f);
}

static bool signal_fd(int fd)
{
	uint64_t one = 1;

	return write(fd, &one, sizeof(one)) == sizeof(one);
}

/* A child signals it. */
static void other_process(void)
{
	int go[2], fd = eventfd(0, EFD_CLOEXEC), r = eventfd(0, 0);
	pid_t child;
	char c = 0;

	NEED(!pipe(go));
	level_triggered(vm, 10);
	NEED(!irqfd(vm, fd, 10, KVM_IRQFD_FLAG_RESAMPLE, r));
	child = fork();
	NEED(child >= 0);
	if (!child)
		_exit(read(go[0], &c, 1) == 1 && signal_fd(fd) ? 0 : 1);
	CHECK(!irr(vm));
	NEED(write(go[1], &c, 1) == 1);
	CHECK(comes(vm, 10));
	waitpid(child, NULL, 0);
	CHECK(!irqfd(vm, fd, 10, KVM_IRQFD_FLAG_DEASSIGN, 0));
	close(fd);
	close(r);
	close(go[0]);
	close(go[1]);
}

/* Everything above the eventfd is closed, as daemons do. */
static void close_everything(void)
{
	int fd = eventfd(0, 0), r = eventfd(0, 0), keep, copy;

	level_triggered(vm, 11);
	NEED(!irqfd(vm, fd, 11, KVM_IRQFD_FLAG_RESAMPLE, r));
	copy = dup(fd);
	keep = copy > r ? copy : r;
	CHECK(!syscall(SYS_close_range, keep + 1, ~0u, 0) || errno == ENOSYS);
	closefrom(keep + 1);
	CHECK(signal_fd(copy));
	CHECK(comes(vm, 11));
	CHECK(!irqfd(vm, copy, 11, KVM_IRQFD_FLAG_DEASSIGN, 0));
	CHECK(!(irr(vm) & 1u << 11));
	close(fd);
	close(r);
	close(copy);
}

/* The child has no thread of ours: its own VM gets its own. */
static void __attribute__((unused)) forked(void)
{
	int fd = eventfd(0, 0), r = eventfd(0, 0), status;
	pid_t child;

	level_triggered(vm, 12);
	NEED(!irqfd(vm, fd, 12, KVM_IRQFD_FLAG_RESAMPLE, r));
	child = fork();
	NEED(child >= 0);
	if (!child) {
		int own = eventfd(0, 0), v, k = open("/dev/kvm", O_RDWR);

		t_failures = 0;
		FAILS(irqfd(vm, own, 12, 0, 0), EIO);
		NEED(k >= 0);
		kvm = k;
		v = make_vm();
		level_triggered(v, 5);
		CHECK(!irqfd(v, own, 5, KVM_IRQFD_FLAG_RESAMPLE, r));
		CHECK(signal_fd(own));
		CHECK(comes(v, 5));
		close(v);
		_exit(t_failures ? 1 : 0);
	}
	NEED(waitpid(child, &status, 0) == child);
	CHECK(WIFEXITED(status) && !WEXITSTATUS(status));
	CHECK(signal_fd(fd));
	CHECK(comes(vm, 12));
	close(fd);
	close(r);
}

static void nothing(int sig)
{
}

/* No thread but the program's own takes its signals. */
static void signals_are_not_taken(void)
{
	sigset_t set, old, pending;

	signal(SIGUSR1, nothing);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	pthread_sigmask(SIG_BLOCK, &set, &old);
	kill(getpid(), SIGUSR1);
	sigpending(&pending);
	CHECK(sigismember(&pending, SIGUSR1));
	pthread_sigmask(SIG_SETMASK, &old, NULL);
}

/* Many of them, and the program's descriptors are numbered as ever. */
static void many(void)
{
	int v = make_vm(), fds[MANY], r = eventfd(0, EFD_NONBLOCK), next;

	for (int i = 0; i < MANY; i++) {
		fds[i] = eventfd(0, 0);
		NEED(!irqfd(v, fds[i], 16, KVM_IRQFD_FLAG_RESAMPLE, r));
		CHECK(i == 0 || fds[i] == fds[i - 1] + 1);
	}
	next = dup(0);
	CHECK(next == fds[MANY - 1] + 1);
	close(next);
	level_triggered(v, 16);
	CHECK(signal_fd(fds[MANY - 1]));
	CHECK(comes(v, 16));
	close(v);
	for (int i = 0; i < MANY; i++)
		close(fds[i]);
	close(r);
}

/* A message is there when the write that caused it returns. */
static void at_once(void)
{
	struct {
		struct kvm_irq_routing head;
		struct kvm_irq_routing_entry e;
	} r = {.head = {.nr = 1},
	       .e = {.gsi = 40,
		     .type = KVM_IRQ_ROUTING_MSI,
		     .u.msi = {.address_lo = 0xfee00000, .data = 0x40}}};
	int v = make_vm(), fd = eventfd(0, 0), vcpu = ioctl(v, KVM_CREATE_VCPU, 0);
	struct kvm_lapic_state l;

	NEED(vcpu >= 0);
	NEED(!ioctl(vcpu, KVM_GET_LAPIC, &l));
	l.regs[0xf1] |= 1; /* enabled */
	NEED(!ioctl(vcpu, KVM_SET_LAPIC, &l));
	NEED(!ioctl(v, KVM_SET_GSI_ROUTING, &r));
	NEED(!irqfd(v, fd, 40, 0, 0));
	for (int i = 0; i < 200; i++) {
		r.e.u.msi.data = 0x40 + i % 0xc0;
		NEED(!ioctl(v, KVM_SET_GSI_ROUTING, &r));
		CHECK(signal_fd(fd));
		NEED(!ioctl(vcpu, KVM_GET_LAPIC, &l));
		CHECK(l.regs[0x200 + 0x10 * (r.e.u.msi.data / 32) + r.e.u.msi.data % 32 / 8] &
		      1 << r.e.u.msi.data % 8);
		memset(l.regs + 0x200, 0, 0x80);
		NEED(!ioctl(vcpu, KVM_SET_LAPIC, &l));
	}
	close(vcpu);
	close(v);
	/* The number of what is no irqfd any more. */
	CHECK(signal_fd(fd));
	close(fd);
}

int main(void)
{
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	NEED(kvm >= 0);
	vm = make_vm();
	other_process();
	close_everything();
#ifndef __SANITIZE_THREAD__ /* whose runtime knows no threads after a fork */
	forked();
#endif
	signals_are_not_taken();
	many();
	at_once();
	close(vm);
	close(kvm);
	return t_done();
}
