/* SPDX-License-Identifier: MIT */
/*
 * Several VMs in one process, each with a thread, come, run and go at the same time: what one of
 * them counts, loses and gets is its own, and nothing is left behind (S3, N2, F6).
 */
#include <dirent.h>
#include <pthread.h>

#include "uapi_guest.h"

#define VMS      6
#define ROUNDS   12
#define RUNS     8
#define COUNTER  0x3000
#define LOOPS    0x800
#define IRQ_CODE 0x900
#define VECTOR   0x41

struct owner {
	pthread_t thread;
	unsigned id;
	const char *wrong;
};

static unsigned nr_fds(void)
{
	DIR *d = opendir("/proc/self/fd");
	unsigned n = 0;

	while (readdir(d))
		n++;
	closedir(d);
	return n;
}

/* cmocka's assertions leave by longjmp, and so are the main thread's. */
#define CHECK(cond)                       \
	do {                              \
		if (!(cond)) {            \
			o->wrong = #cond; \
			return false;     \
		}                         \
	} while (0)

static bool run_to(struct owner *o, struct guest *g, uint16_t port)
{
	CHECK(!guest_run(g));
	CHECK(g->run->exit_reason == KVM_EXIT_IO);
	CHECK(g->run->io.port == port);
	return true;
}

static uint16_t counter(struct guest *g)
{
	uint16_t n;

	memcpy(&n, g->ram + COUNTER, 2);
	return n;
}

/* One VM's life. */
static bool live(struct owner *o, unsigned round)
{
	/* sti; 1: mov $LOOPS, %cx; 2: incw %cs:COUNTER; loop 2b; out; jmp 1b */
	static const uint8_t code[] = {0xfb, 0xb9, LOOPS & 0xff, LOOPS >> 8, 0x2e, 0xff, 0x06, 0x00,
				       0x30, 0xe2, 0xf9,         0xe6,       0x10, 0xeb, 0xf2};
	/* out; iret */
	static const uint8_t handler[] = {0xe6, 0x11, 0xcf};
	uint16_t want = (uint16_t)(o->id * 1000 + round);
	struct kvm_msi msi = {.address_lo = 0xfee00000, .data = VECTOR};
	struct kvm_lapic_state lapic;
	struct guest g;

	guest_make(&g, true);
	memcpy(g.ram + CODE, code, sizeof(code));
	memcpy(g.ram + IRQ_CODE, handler, sizeof(handler));
	set_vector(&g, VECTOR, IRQ_CODE);
	memcpy(g.ram + COUNTER, &want, 2);
	CHECK(!dev_ioctl_p(&g.vcpu, KVM_GET_LAPIC, &lapic));
	lapic.regs[0xf1] |= 1;
	CHECK(!dev_ioctl_p(&g.vcpu, KVM_SET_LAPIC, &lapic));
	for (unsigned run = 0; run < RUNS; run++) {
		if (!run_to(o, &g, 0x10))
			return false;
		want = (uint16_t)(want + LOOPS);
		CHECK(counter(&g) == want);
		switch (run % 4) {
		case 0: /* an interrupt: to nobody else; and only once, without an EOI */
			CHECK(dev_ioctl_p(&g.vm, KVM_SIGNAL_MSI, &msi) == 1);
			if (!run && !run_to(o, &g, 0x11))
				return false;
			break;
		case 1: /* the page goes, and another VM's at the same address does not */
			madvise(g.ram + COUNTER, 4096, MADV_DONTNEED);
			want = 0;
			break;
		case 2: /* so does the slot */
			CHECK(!set_slot(&g, 0, 0, 0, 0, NULL));
			CHECK(!set_slot(&g, 0, 0, 0, RAM, g.ram));
			break;
		}
	}
	guest_free(&g);
	return true;
}

static void *own(void *arg)
{
	struct owner *o = arg;

	for (unsigned round = 0; round < ROUNDS && !o->wrong; round++)
		live(o, round);
	return NULL;
}

static void side_by_side(void **state)
{
	struct owner owners[VMS] = {0};
	struct owner alone = {0};
	unsigned before;

	(void)state;
	/* What stays for good, like the timers' thread, is there after the first. */
	if (!live(&alone, 0))
		fail_msg("%s", alone.wrong);
	before = nr_fds();
	for (unsigned i = 0; i < VMS; i++) {
		owners[i].id = i;
		assert_int_equal(pthread_create(&owners[i].thread, NULL, own, &owners[i]), 0);
	}
	for (unsigned i = 0; i < VMS; i++)
		pthread_join(owners[i].thread, NULL);
	for (unsigned i = 0; i < VMS; i++)
		if (owners[i].wrong)
			fail_msg("VM %u: %s", i, owners[i].wrong);
	assert_int_equal(nr_fds(), before);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(side_by_side),
	};

	cmocka_set_test_filter(getenv("KVMLET_TEST"));
	return cmocka_run_group_tests(tests, NULL, NULL);
}
