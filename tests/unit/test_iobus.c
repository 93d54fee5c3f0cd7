/* SPDX-License-Identifier: MIT */
/*
 * Coalesced zones and ioeventfds (M4): registration, lookup, the ring, races.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/failpoint.h"
#include "mmu/iobus.h"

#define RING_ENTRIES \
	((4096 - sizeof(struct kvm_coalesced_mmio_ring)) / sizeof(struct kvm_coalesced_mmio))

static struct kl_iobus bus;
static struct kvm_coalesced_mmio_ring *ring;

static int setup(void **state)
{
	(void)state;
	ring = aligned_alloc(4096, 4096);
	memset(ring, 0, 4096);
	kl_iobus_init(&bus, ring);
	return 0;
}

static int teardown(void **state)
{
	(void)state;
	kl_iobus_destroy(&bus);
	free(ring);
	return 0;
}

static int zone(uint64_t addr, uint32_t size, uint32_t pio, bool add)
{
	struct kvm_coalesced_mmio_zone z = {.addr = addr, .size = size, .pio = pio};

	return add ? kl_iobus_add_zone(&bus, &z) : kl_iobus_del_zone(&bus, &z);
}

static int efd_call(int fd, uint64_t addr, uint32_t len, uint32_t flags, uint64_t match)
{
	struct kvm_ioeventfd a = {
		.datamatch = match, .addr = addr, .len = len, .fd = fd, .flags = flags};

	return kl_iobus_ioeventfd(&bus, &a);
}

static int put(enum kl_bus which, uint64_t addr, unsigned len, uint64_t val)
{
	return kl_iobus_write(&bus, which, addr, len, &val);
}

static uint64_t drain(int fd)
{
	uint64_t n = 0;

	return read(fd, &n, sizeof(n)) == sizeof(n) ? n : 0;
}

/* ---- zones ------------------------------------------------------------------------- */

static void zone_boundaries(void **state)
{
	(void)state;
	assert_int_equal(put(KL_BUS_MMIO, 0x1000, 4, 1), -EOPNOTSUPP);
	assert_int_equal(zone(0x1000, 8, 0, true), 0);
	assert_int_equal(put(KL_BUS_MMIO, 0xffc, 4, 1), -EOPNOTSUPP);
	assert_int_equal(put(KL_BUS_MMIO, 0xffe, 4, 1), -EOPNOTSUPP);
	assert_int_equal(put(KL_BUS_MMIO, 0x1006, 4, 1), -EOPNOTSUPP);
	assert_int_equal(put(KL_BUS_MMIO, 0x1008, 1, 1), -EOPNOTSUPP);
	assert_int_equal(put(KL_BUS_PIO, 0x1000, 4, 1), -EOPNOTSUPP);
	assert_int_equal(ring->last, 0);
	assert_int_equal(put(KL_BUS_MMIO, 0x1000, 8, 0x1122334455667788), 0);
	assert_int_equal(put(KL_BUS_MMIO, 0x1004, 4, 0xaabbccdd), 0);
	assert_int_equal(put(KL_BUS_MMIO, 0x1007, 1, 0xee), 0);
	assert_int_equal(ring->last, 3);
	assert_int_equal(ring->first, 0);
	assert_int_equal(ring->coalesced_mmio[0].phys_addr, 0x1000);
	assert_int_equal(ring->coalesced_mmio[0].len, 8);
	assert_int_equal(*(uint64_t *)ring->coalesced_mmio[0].data, 0x1122334455667788);
	assert_int_equal(ring->coalesced_mmio[1].phys_addr, 0x1004);
	assert_int_equal(ring->coalesced_mmio[1].len, 4);
	assert_int_equal(*(uint32_t *)ring->coalesced_mmio[1].data, 0xaabbccdd);
	assert_int_equal(ring->coalesced_mmio[2].len, 1);
	assert_int_equal(ring->coalesced_mmio[2].pio, 0);
}

static void pio_zones(void **state)
{
	(void)state;
	assert_int_equal(zone(0x80, 2, 1, true), 0);
	assert_int_equal(put(KL_BUS_PIO, 0x80, 2, 0x1234), 0);
	assert_int_equal(put(KL_BUS_PIO, 0x80, 4, 0x1234), -EOPNOTSUPP);
	assert_int_equal(put(KL_BUS_MMIO, 0x80, 2, 0x1234), -EOPNOTSUPP);
	assert_int_equal(ring->coalesced_mmio[0].pio, 1);
	assert_int_equal(zone(0x80, 2, 2, true), -EINVAL);
	assert_int_equal(zone(0x80, 2, 2, false), -EINVAL);
	assert_int_equal(zone(0x80, 2, 0, false), 0);
	assert_int_equal(put(KL_BUS_PIO, 0x80, 2, 0), 0);
	assert_int_equal(zone(0x80, 2, 1, false), 0);
	assert_int_equal(put(KL_BUS_PIO, 0x80, 2, 0), -EOPNOTSUPP);
}

/* One entry stays free; what the program writes into the indexes is not believed. */
static void ring_limits(void **state)
{
	(void)state;
	assert_int_equal(zone(0, 4096, 0, true), 0);
	for (unsigned start = 0; start < RING_ENTRIES; start += 13) {
		ring->first = ring->last = start;
		for (unsigned i = 0; i < RING_ENTRIES - 1; i++)
			assert_int_equal(put(KL_BUS_MMIO, 8, 4, i), 0);
		assert_int_equal(put(KL_BUS_MMIO, 8, 4, 0), -EOPNOTSUPP);
		assert_int_equal((ring->last + 1) % RING_ENTRIES, start);
		ring->first = (start + 1) % RING_ENTRIES;
		assert_int_equal(put(KL_BUS_MMIO, 8, 4, 0), 0);
		assert_int_equal(put(KL_BUS_MMIO, 8, 4, 0), -EOPNOTSUPP);
	}
	ring->last = RING_ENTRIES;
	assert_int_equal(put(KL_BUS_MMIO, 8, 4, 0), -EOPNOTSUPP);
	ring->last = UINT32_MAX;
	assert_int_equal(put(KL_BUS_MMIO, 8, 4, 0), -EOPNOTSUPP);
	ring->last = 0;
	ring->first = UINT32_MAX;
	assert_int_equal(put(KL_BUS_MMIO, 8, 4, 0), 0);
}

/* Unregistering takes off every zone around the given range, no other. */
static void unregister(void **state)
{
	(void)state;
	assert_int_equal(zone(0x1000, 0x1000, 0, true), 0);
	assert_int_equal(zone(0x1800, 0x100, 0, true), 0);
	assert_int_equal(zone(0x1800, 0x100, 0, true), 0);
	assert_int_equal(zone(0x9000, 0x100, 0, true), 0);
	assert_int_equal(zone(0x1800, 0x900, 0, false), 0); /* inside none */
	assert_int_equal(put(KL_BUS_MMIO, 0x1800, 4, 0), 0);
	assert_int_equal(zone(0x1810, 4, 0, false), 0);
	assert_int_equal(put(KL_BUS_MMIO, 0x1800, 4, 0), -EOPNOTSUPP);
	assert_int_equal(put(KL_BUS_MMIO, 0x1000, 4, 0), -EOPNOTSUPP);
	assert_int_equal(put(KL_BUS_MMIO, 0x9000, 4, 0), 0);
	assert_int_equal(zone(0x9000, 0x80000000, 0, false), 0);
	assert_int_equal(put(KL_BUS_MMIO, 0x9000, 4, 0), 0);
}

/* A small zone behind a large one, and a large one that starts far below. */
static void overlapping_lookup(void **state)
{
	(void)state;
	assert_int_equal(zone(0x10000, 0x10000, 0, true), 0);
	for (uint64_t a = 0; a < 64; a++)
		assert_int_equal(zone(0x10000 + a * 16, 4, 0, true), 0);
	assert_int_equal(put(KL_BUS_MMIO, 0x1fff8, 8, 0), 0);
	assert_int_equal(put(KL_BUS_MMIO, 0x10008, 8, 0), 0);
	assert_int_equal(put(KL_BUS_MMIO, 0x1fffc, 8, 0), -EOPNOTSUPP);
	assert_int_equal(put(KL_BUS_MMIO, 0x20000, 8, 0), -EOPNOTSUPP);
}

static void odd_zones(void **state)
{
	(void)state;
	assert_int_equal(zone(0x1000, 0, 0, true), 0);
	assert_int_equal(put(KL_BUS_MMIO, 0x1000, 1, 0), -EOPNOTSUPP);
	assert_int_equal(zone(~0ull - 3, 8, 0, true), 0);
	assert_int_equal(put(KL_BUS_MMIO, ~0ull - 3, 2, 0), -EOPNOTSUPP);
	assert_int_equal(put(KL_BUS_MMIO, 2, 2, 0), -EOPNOTSUPP);
	assert_int_equal(put(KL_BUS_MMIO, ~0ull - 3, 8, 0), -EOPNOTSUPP);
}

static void too_many_zones(void **state)
{
	int fd = eventfd(0, 0);

	(void)state;
	for (unsigned i = 0; i < KL_MAX_ZONES - 1; i++)
		assert_int_equal(zone(0x1000 * i, 4, 0, true), 0);
	/* ioeventfds do not count. */
	assert_int_equal(efd_call(fd, 4, 4, 0, 0), 0);
	assert_int_equal(zone(0, 4, 0, true), 0);
	assert_int_equal(zone(0, 4, 0, true), -ENOSPC);
	assert_int_equal(zone(0, 4, 1, true), 0);
	assert_int_equal(put(KL_BUS_MMIO, 0x1000 * 500, 4, 0), 0);
	close(fd);
}

/* M4: what there was no memory for is refused, and what there was before is there. */
static void no_memory(void **state)
{
	static const char *const steps[] = {"iobus-devs", "iobus-eventfd"};
	int fd = eventfd(0, EFD_NONBLOCK);

	(void)state;
	if (!kl_failpoints_enabled())
		skip();
	kl_failpoint_arm("iobus-devs", 1);
	assert_int_equal(zone(0x1000, 8, 0, true), -ENOMEM);
	assert_int_equal(put(KL_BUS_MMIO, 0x1000, 4, 0), -EOPNOTSUPP);
	for (unsigned i = 0; i < 2; i++) {
		kl_failpoint_arm(steps[i], 1);
		assert_int_equal(efd_call(fd, 0x2000, 4, 0, 0), -ENOMEM);
		assert_true(kl_failpoint_disarm(steps[i]));
		assert_int_equal(put(KL_BUS_MMIO, 0x2000, 4, 0), -EOPNOTSUPP);
		/* Nor is it known. */
		assert_int_equal(efd_call(fd, 0x2000, 4, KVM_IOEVENTFD_FLAG_DEASSIGN, 0), -ENOENT);
	}

	assert_int_equal(zone(0x1000, 8, 0, true), 0);
	assert_int_equal(efd_call(fd, 0x2000, 4, 0, 0), 0);
	kl_failpoint_arm("iobus-devs", 1);
	assert_int_equal(zone(0x1000, 8, 0, false), -ENOMEM);
	kl_failpoint_arm("iobus-devs", 1);
	assert_int_equal(efd_call(fd, 0x2000, 4, KVM_IOEVENTFD_FLAG_DEASSIGN, 0), -ENOMEM);
	assert_int_equal(put(KL_BUS_MMIO, 0x1000, 4, 0), 0);
	assert_int_equal(put(KL_BUS_MMIO, 0x2000, 4, 0), 0);
	assert_int_equal(drain(fd), 1);
	assert_int_equal(zone(0x1000, 8, 0, false), 0);
	assert_int_equal(put(KL_BUS_MMIO, 0x1000, 4, 0), -EOPNOTSUPP);
	assert_int_equal(efd_call(fd, 0x2000, 4, KVM_IOEVENTFD_FLAG_DEASSIGN, 0), 0);
	close(fd);
}

/* ---- ioeventfds -------------------------------------------------------------------- */

static void match_length_and_data(void **state)
{
	int any = eventfd(0, EFD_NONBLOCK), len4 = eventfd(0, EFD_NONBLOCK);
	int data = eventfd(0, EFD_NONBLOCK);

	(void)state;
	assert_int_equal(efd_call(any, 0x100, 0, 0, 0), 0);
	assert_int_equal(efd_call(len4, 0x200, 4, 0, 0), 0);
	assert_int_equal(efd_call(data, 0x300, 2, KVM_IOEVENTFD_FLAG_DATAMATCH, 0xabcd), 0);
	for (unsigned len = 1; len <= 8; len *= 2)
		assert_int_equal(put(KL_BUS_MMIO, 0x100, len, len), 0);
	assert_int_equal(drain(any), 4);
	assert_int_equal(put(KL_BUS_MMIO, 0x101, 1, 0), -EOPNOTSUPP);
	assert_int_equal(put(KL_BUS_MMIO, 0x200, 2, 0), -EOPNOTSUPP);
	assert_int_equal(put(KL_BUS_MMIO, 0x200, 8, 0), -EOPNOTSUPP);
	assert_int_equal(put(KL_BUS_MMIO, 0x1fe, 4, 0), -EOPNOTSUPP);
	assert_int_equal(put(KL_BUS_MMIO, 0x200, 4, 99), 0);
	assert_int_equal(drain(len4), 1);
	assert_int_equal(put(KL_BUS_MMIO, 0x300, 2, 0xabce), -EOPNOTSUPP);
	assert_int_equal(put(KL_BUS_MMIO, 0x300, 2, 0xabcd), 0);
	assert_int_equal(put(KL_BUS_PIO, 0x300, 2, 0xabcd), -EOPNOTSUPP);
	assert_int_equal(drain(data), 1);
	/* The program's descriptors may go; the engine has its own. */
	close(any);
	assert_int_equal(put(KL_BUS_MMIO, 0x100, 1, 0), 0);
	close(len4);
	close(data);
}

static void several_datamatches(void **state)
{
	int fd[16];

	(void)state;
	for (int i = 0; i < 16; i++) {
		fd[i] = eventfd(0, EFD_NONBLOCK);
		assert_int_equal(efd_call(fd[i], 0xc000, 4,
					  KVM_IOEVENTFD_FLAG_DATAMATCH | KVM_IOEVENTFD_FLAG_PIO,
					  (uint64_t)i),
				 0);
	}
	for (int i = 0; i < 16; i++) {
		assert_int_equal(put(KL_BUS_PIO, 0xc000, 4, (uint64_t)i), 0);
		for (int j = 0; j < 16; j++)
			assert_int_equal(drain(fd[j]), i == j);
	}
	assert_int_equal(put(KL_BUS_PIO, 0xc000, 4, 16), -EOPNOTSUPP);
	for (int i = 0; i < 16; i++)
		close(fd[i]);
}

static void collisions(void **state)
{
	const uint32_t dm = KVM_IOEVENTFD_FLAG_DATAMATCH;
	int fd = eventfd(0, 0), other = eventfd(0, 0);

	(void)state;
	assert_int_equal(efd_call(fd, 0x100, 4, dm, 1), 0);
	assert_int_equal(efd_call(other, 0x100, 4, dm, 1), -EEXIST);
	assert_int_equal(efd_call(other, 0x100, 4, 0, 0), -EEXIST);
	assert_int_equal(efd_call(other, 0x100, 0, 0, 0), -EEXIST);
	assert_int_equal(efd_call(other, 0x100, 4, dm, 2), 0);
	assert_int_equal(efd_call(other, 0x100, 2, 0, 0), 0);
	assert_int_equal(efd_call(other, 0x100, 4, KVM_IOEVENTFD_FLAG_PIO, 0), 0);
	assert_int_equal(efd_call(fd, 0x100, 4, KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY, 0), 0);
	close(fd);
	close(other);
}

static void deassign(void **state)
{
	const uint32_t dm = KVM_IOEVENTFD_FLAG_DATAMATCH, off = KVM_IOEVENTFD_FLAG_DEASSIGN;
	int fd = eventfd(0, EFD_NONBLOCK), other = eventfd(0, 0), copy = dup(fd);

	(void)state;
	assert_int_equal(efd_call(fd, 0x100, 4, dm | off, 1), -ENOENT);
	assert_int_equal(efd_call(fd, 0x100, 4, dm, 1), 0);
	assert_int_equal(efd_call(other, 0x100, 4, dm | off, 1), -ENOENT);
	assert_int_equal(efd_call(fd, 0x100, 4, off, 1), -ENOENT);
	assert_int_equal(efd_call(fd, 0x100, 4, dm | off, 2), -ENOENT);
	assert_int_equal(efd_call(fd, 0x100, 2, dm | off, 1), -ENOENT);
	assert_int_equal(efd_call(fd, 0x104, 4, dm | off, 1), -ENOENT);
	assert_int_equal(efd_call(fd, 0x100, 4, dm | off | KVM_IOEVENTFD_FLAG_PIO, 1), -ENOENT);
	assert_int_equal(put(KL_BUS_MMIO, 0x100, 4, 1), 0);
	/* The same eventfd by another number. */
	assert_int_equal(efd_call(copy, 0x100, 4, dm | off, 1), 0);
	assert_int_equal(put(KL_BUS_MMIO, 0x100, 4, 1), -EOPNOTSUPP);
	assert_int_equal(efd_call(copy, 0x100, 4, dm | off, 1), -ENOENT);
	assert_int_equal(drain(fd), 1);
	close(fd);
	close(other);
	close(copy);
}

static void bad_ioeventfds(void **state)
{
	int fd = eventfd(0, 0), file = open("/dev/null", O_RDWR), pipes[2];

	(void)state;
	assert_int_equal(pipe(pipes), 0);
	for (uint32_t len = 3; len < 20; len++)
		assert_int_equal(efd_call(fd, 0x100, len, 0, 0),
				 len == 4 || len == 8 ? 0 : -EINVAL);
	assert_int_equal(efd_call(fd, 0x100, UINT32_MAX, 0, 0), -EINVAL);
	assert_int_equal(efd_call(fd, ~0ull - 2, 4, 0, 0), -EINVAL);
	assert_int_equal(efd_call(fd, 0x900, 0, KVM_IOEVENTFD_FLAG_DATAMATCH, 0), -EINVAL);
	assert_int_equal(efd_call(fd, 0x900, 4, 1u << 31, 0), -EINVAL);
	assert_int_equal(efd_call(-1, 0x900, 4, 0, 0), -EBADF);
	assert_int_equal(efd_call(1 << 20, 0x900, 4, 0, 0), -EBADF);
	assert_int_equal(efd_call(-1, 0x900, 4, KVM_IOEVENTFD_FLAG_DEASSIGN, 0), -EBADF);
	assert_int_equal(efd_call(file, 0x900, 4, 0, 0), -EINVAL);
	assert_int_equal(efd_call(pipes[1], 0x900, 4, 0, 0), -EINVAL);
	close(fd);
	close(file);
	close(pipes[0]);
	close(pipes[1]);
}

/* A full counter must not block the guest. */
static void full_counter(void **state)
{
	int fd = eventfd(0, 0);
	uint64_t full = UINT64_MAX - 1;

	(void)state;
	assert_int_equal(write(fd, &full, sizeof(full)), sizeof(full));
	assert_int_equal(efd_call(fd, 0x100, 0, 0, 0), 0);
	alarm(20);
	assert_int_equal(put(KL_BUS_MMIO, 0x100, 4, 0), 0);
	alarm(0);
	assert_int_equal(drain(fd), full);
	close(fd);
}

static int open_fds(void)
{
	int n = 0;

	for (int fd = 0; fd < 1 << 20; fd++)
		n += fcntl(fd, F_GETFD) >= 0;
	return n;
}

/* One descriptor per eventfd, however often it is used, and none when it is not. */
static void few_descriptors(void **state)
{
	int fd = eventfd(0, 0), before = open_fds();

	(void)state;
	for (uint64_t i = 0; i < 100; i++)
		assert_int_equal(efd_call(fd, 0x1000 + 8 * i, 4, 0, 0), 0);
	assert_int_equal(open_fds(), before + 1);
	for (uint64_t i = 0; i < 100; i++)
		assert_int_equal(efd_call(fd, 0x1000 + 8 * i, 4, KVM_IOEVENTFD_FLAG_DEASSIGN, 0),
				 0);
	assert_int_equal(open_fds(), before);
	close(fd);
}

/* ---- races ------------------------------------------------------------------------- */

static atomic_bool stop, running;

static void *writer(void *arg)
{
	uint64_t *hits = arg;

	while (!atomic_load(&stop)) {
		if (!put(KL_BUS_MMIO, 0x2000, 4, 0))
			(*hits)++;
		assert_int_equal(put(KL_BUS_MMIO, 0x1000, 4, 0), 0);
		atomic_store(&running, true);
	}
	return NULL;
}

/* A device that stays is found through every change around it; nothing is lost or twice. */
static void registration_against_writes(void **state)
{
	int stays = eventfd(0, EFD_NONBLOCK), comes = eventfd(0, EFD_NONBLOCK);
	uint64_t hits = 0;
	pthread_t thread;

	(void)state;
	assert_int_equal(efd_call(stays, 0x1000, 4, 0, 0), 0);
	atomic_store(&stop, false);
	atomic_store(&running, false);
	assert_int_equal(pthread_create(&thread, NULL, writer, &hits), 0);
	while (!atomic_load(&running))
		sched_yield();
	for (int i = 0; i < 500; i++) {
		assert_int_equal(efd_call(comes, 0x2000, 4, 0, 0), 0);
		assert_int_equal(efd_call(comes, 0x2000, 4, KVM_IOEVENTFD_FLAG_DEASSIGN, 0), 0);
	}
	atomic_store(&stop, true);
	pthread_join(thread, NULL);
	assert_int_equal(drain(comes), hits);
	assert_true(drain(stays) > 0);
	close(stays);
	close(comes);
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(zone_boundaries),
		T(pio_zones),
		T(ring_limits),
		T(unregister),
		T(overlapping_lookup),
		T(odd_zones),
		T(too_many_zones),
		T(no_memory),
		T(match_length_and_data),
		T(several_datamatches),
		T(collisions),
		T(deassign),
		T(bad_ioeventfds),
		T(full_counter),
		T(few_descriptors),
		T(registration_against_writes),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
