/* SPDX-License-Identifier: MIT */
/* The exhibits that came with Xen, by the ioctls that they came by. */
#include <pthread.h>

#include "base/racepoint.h"
#include "unit/xen_guest.h"

#define WAIT_MS 10000
#define ROUNDS  300

static struct guest g;

static int setup(void **state)
{
	(void)state;
	xen_make(&g);
	return 0;
}

static int teardown(void **state)
{
	(void)state;
	guest_free(&g);
	return 0;
}

/* ---- shared_info comes and goes under senders ---------------------------------------------- */

static _Atomic bool stop;

static void *sender(void *arg)
{
	uint32_t port = (uint32_t)(uintptr_t)arg;

	while (!stop) {
		long r = xen_send(&g, port++ % 1000 + 1, 0);

		assert_true(!r || r == -EINVAL);
	}
	return NULL;
}

/* By a route, as an irqfd does: it must not wait. */
static void *line_driver(void *arg)
{
	struct kvm_irq_level l = {.irq = 40, .level = 1};

	(void)arg;
	while (!stop)
		assert_int_equal(dev_ioctl_p(&g.vm, KVM_IRQ_LINE, &l), 0);
	return NULL;
}

static void flip(unsigned i)
{
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_SHARED_INFO, SHINFO >> 12), 0);
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_LONG_MODE, i & 1), 0);
	assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, i & 2 ? INFO : INVALID),
			 0);
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_SHARED_INFO, INVALID), 0);
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA, (uint64_t)g.ram + SHINFO),
			 0);
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA, 0), 0);
}

/* B6, B7, X1: SHARED_INFO set and taken off in a circle while others send. */
static void send_against_attributes(void **state)
{
	struct {
		struct kvm_irq_routing head;
		struct kvm_irq_routing_entry e;
	} r = {
		.head.nr = 1,
		.e = {.gsi = 40,
		      .type = KVM_IRQ_ROUTING_XEN_EVTCHN,
		      .u.xen_evtchn = {.port = 500, .vcpu = 0, .priority = PRIO}},
	};
	pthread_t t[3];

	(void)state;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_GSI_ROUTING, &r), 0);
	stop = false;
	assert_int_equal(pthread_create(&t[0], NULL, line_driver, NULL), 0);
	for (uintptr_t i = 1; i < 3; i++)
		assert_int_equal(pthread_create(&t[i], NULL, sender, (void *)(i * 300)), 0);
	for (unsigned i = 0; i < ROUNDS; i++)
		flip(i);
	stop = true;
	for (unsigned i = 0; i < 3; i++)
		pthread_join(t[i], NULL);
	/* Nothing is stuck, and an event arrives. */
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_SHARED_INFO, SHINFO >> 12), 0);
	memset(g.ram + SHINFO, 0, KL_PAGE_SIZE);
	assert_int_equal(xen_send(&g, 77, 0), 0);
	assert_true(xen_bit(g.ram + SHINFO + PENDING, 77));
}

/* ---- nothing is lost ------------------------------------------------------------------------ */

#define ACC PARAM /* the words that the guest has seen selected */

/* In real mode: wait until every word of 32 has been selected, then OUT to DONE. */
static void wait_for_all_words(void)
{
	static const uint8_t code[] = {
		0xfb,                                   /* sti */
		0xf4,                                   /* hlt */
		0xfa,                                   /* cli */
		0x66, 0x83, 0x3e, 0x00, ACC >> 8, 0xff, /* cmpl $-1, ACC */
		0x75, 0xf5,                             /* jne */
		0xe6, DONE,
	};
	static const uint8_t handler[] = {
		0xc6, 0x06, 0x40, INFO >> 8, 0x00,      /* movb $0, INFO */
		0x66, 0x31, 0xc0,                       /* xor %eax, %eax */
		0x66, 0x87, 0x06, 0x44,      INFO >> 8, /* xchg %eax, INFO + SEL */
		0x66, 0x09, 0x06, 0x00,      ACC >> 8,  /* or %eax, ACC */
		0xcf,
	};
	struct kvm_sregs s;

	xen_wait_for_upcall(&g);
	memcpy(g.ram + CODE, code, sizeof(code));
	memcpy(g.ram + HANDLER, handler, sizeof(handler));
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_SREGS, &s), 0);
	s.ds.base = s.ds.selector = 0;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_SREGS, &s), 0);
}

static void *send_third(void *arg)
{
	for (uint32_t port = 1 + (uint32_t)(uintptr_t)arg; port < 1024; port += 3)
		assert_int_equal(xen_send(&g, port, 0), 0);
	return NULL;
}

static void *run_to_done(void *arg)
{
	(void)arg;
	assert_port(&g, DONE);
	return NULL;
}

/*
 * X1: each port is raised once, from three threads, while shared_info moves; the guest sees every
 * word, and the page every bit.
 */
static void storm_loses_nothing(void **state)
{
	pthread_t t[3], vcpu;

	(void)state;
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_SHARED_INFO, SHINFO >> 12), 0);
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, VECTOR), 0);
	assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, INFO), 0);
	for (unsigned round = 0; round < 10; round++) {
		memset(g.ram + SHINFO, 0, KL_PAGE_SIZE);
		memset(g.ram + ACC, 0, 4);
		wait_for_all_words();
		assert_int_equal(pthread_create(&vcpu, NULL, run_to_done, NULL), 0);
		for (uintptr_t i = 0; i < 3; i++)
			assert_int_equal(pthread_create(&t[i], NULL, send_third, (void *)i), 0);
		for (unsigned i = 0; i < 50; i++) {
			assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA,
						 (uint64_t)g.ram + SHINFO),
					 0);
			assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_SHARED_INFO, SHINFO >> 12),
					 0);
		}
		for (unsigned i = 0; i < 3; i++)
			pthread_join(t[i], NULL);
		pthread_join(vcpu, NULL);
		for (unsigned port = 1; port < 1024; port++)
			assert_true(xen_bit(g.ram + SHINFO + PENDING, port));
	}
}

/* ---- and nobody waits for SET_ATTR ----------------------------------------------------------- */

static void *set_shinfo(void *arg)
{
	(void)arg;
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_SHARED_INFO, SHINFO >> 12), 0);
	return NULL;
}

/* X1, B7: who delivers takes no lock that SET_ATTR holds while it activates. */
static void send_while_set(void **state)
{
	pthread_t t;

	(void)state;
	if (!kl_racepoints_enabled())
		skip();
	kl_racepoint_arm("xen-shinfo-set", 1);
	assert_int_equal(pthread_create(&t, NULL, set_shinfo, NULL), 0);
	assert_true(kl_racepoint_wait("xen-shinfo-set", WAIT_MS));
	assert_int_equal(xen_send(&g, 5, 0), 0);
	assert_true(xen_bit(g.ram + SHINFO + PENDING, 5));
	kl_racepoint_release("xen-shinfo-set");
	pthread_join(t, NULL);
}

/* ---- runstate ------------------------------------------------------------------------------- */

static void need_runstate(void)
{
	if (!xen_has_runstate(&g))
		skip();
}

static void rewrite(void)
{
	assert_int_equal(xen_runstate(&g, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST, ~0ull, 0, 0, 0),
			 0);
}

static void assert_area(const uint8_t *p, bool wide)
{
	struct runstate kept = kept_runstate(&g), r = read_runstate(p, wide);

	assert_int_equal(r.state, kept.state);
	assert_true(r.entry == kept.entry);
	assert_memory_equal(r.time, kept.time, sizeof(r.time));
	assert_int_equal(p[-1], 0xa5);
	assert_int_equal(p[RS_SIZE(wide)], 0xa5);
}

/* B24, X2, X4: the guest kexecs to the other mode with its runstate set, and back. */
static void mode_flips(void **state)
{
	/* In one page, in two, and in two only with 64 bits. */
	static const uint32_t at[] = {RUNST + 0x100, RUNST + 0x1000 - 20, RUNST + 0x1000 - 44,
				      RUNST + 0x1000 - 46};

	(void)state;
	need_runstate();
	for (unsigned i = 0; i < 4; i++) {
		assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_LONG_MODE, 0), 0);
		assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, at[i]), 0);
		assert_int_equal(
			xen_runstate(&g, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT, 1, 0, 0, 0), 0);
		for (unsigned wide = 1; wide < 5; wide++) {
			assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_LONG_MODE, wide & 1), 0);
			memset(g.ram + RUNST, 0xa5, 2 * KL_PAGE_SIZE);
			rewrite();
			assert_area(g.ram + at[i], wide & 1);
		}
	}
}

/* B25, X4: any offset, in both modes. */
static void every_offset(void **state)
{
	(void)state;
	need_runstate();
	for (unsigned wide = 0; wide < 2; wide++) {
		assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_LONG_MODE, wide), 0);
		for (uint32_t at = RUNST + 0x1000 - 64; at <= RUNST + 0x1000; at++) {
			memset(g.ram + RUNST, 0xa5, 2 * KL_PAGE_SIZE);
			assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, at),
					 0);
			assert_area(g.ram + at, wide);
		}
	}
}

static _Atomic uint64_t torn, whole;
static uint8_t *area;

static uint64_t entry_time(void)
{
	uint64_t t;

	__asm__ volatile("" ::: "memory"); /* loads stay in order, on x86 */
	memcpy(&t, area + 8, sizeof(t));
	__asm__ volatile("" ::: "memory");
	return t;
}

/* As Linux reads it. */
static void *reader(void *arg)
{
	(void)arg;
	while (!stop) {
		uint64_t before = entry_time();
		struct runstate r = read_runstate(area, true);

		if (entry_time() != before || before >> 63)
			continue;
		if (r.entry == runstate_sum(&r))
			whole++;
		else
			torn++;
	}
	return NULL;
}

/* B25, X4: who goes by the update flag never sees half of it. */
static void never_torn(void **state)
{
	static const uint32_t at[] = {RUNST + 0x100, RUNST + 0x1000 - 24, RUNST + 0x1000 - 12};
	pthread_t t;

	(void)state;
	need_runstate();
	if (KL_TSAN) /* such readers are races, for it */
		skip();
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_LONG_MODE, 1), 0);
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG, 1), 0);
	for (unsigned i = 0; i < 3; i++) {
		assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, at[i]), 0);
		area = g.ram + at[i];
		torn = whole = 0;
		stop = false;
		assert_int_equal(pthread_create(&t, NULL, reader, NULL), 0);
		for (unsigned n = 0; n < 5000 || !whole; n++)
			assert_int_equal(xen_runstate(&g, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT,
						      n % 4, 0, 0, 0),
					 0);
		stop = true;
		pthread_join(t, NULL);
		assert_int_equal(torn, 0);
		assert_true(whole);
	}
}

static void *write_it(void *arg)
{
	(void)arg;
	rewrite();
	return NULL;
}

/* B25, X4: the flag is in memory before and after anything else is written. */
static void flag_while_written(void **state)
{
	static const char *const places[] = {"xen-runstate-write", "xen-runstate-written"};

	(void)state;
	if (!kl_racepoints_enabled())
		skip();
	need_runstate();
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_LONG_MODE, 1), 0);
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG, 1), 0);
	for (uint32_t at = RUNST + 0x1000 - 20; at <= RUNST + 0x1000 - 4; at += 4) {
		assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, at), 0);
		for (unsigned i = 0; i < 2; i++) {
			pthread_t t;

			assert_int_equal(g.ram[at + 15] & 0x80, 0);
			kl_racepoint_arm(places[i], 1);
			assert_int_equal(pthread_create(&t, NULL, write_it, NULL), 0);
			assert_true(kl_racepoint_wait(places[i], WAIT_MS));
			assert_int_equal(g.ram[at + 15] & 0x80, 0x80);
			kl_racepoint_release(places[i]);
			pthread_join(t, NULL);
		}
	}
}

/* B26, G16, X2: all of them on memory that is not there; it is used when it is. */
static void empty_slot(void **state)
{
	uint8_t *page = mmap(NULL, 4 * KL_PAGE_SIZE, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	const uint8_t *info = page + KL_PAGE_SIZE + 0x40, *run = page + 3 * KL_PAGE_SIZE - 20;
	const uint64_t info_at = AWAY + KL_PAGE_SIZE + 0x40, run_at = AWAY + 3 * KL_PAGE_SIZE - 20;
	bool rs = xen_has_runstate(&g);

	(void)state;
	guest_long_mode(&g, 0);
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_LONG_MODE, 1), 0);
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_SHARED_INFO, AWAY >> 12), 0);
	assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, info_at), 0);
	assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO, info_at + 0x40),
			 0);
	if (rs)
		assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, run_at), 0);
	assert_int_equal(xen_call(&g, 29, 0, 0, 0), 0);
	assert_int_equal(set_slot(&g, 1, 0, AWAY, 4 * KL_PAGE_SIZE, page), 0);
	assert_int_equal(xen_call(&g, 29, 0, 0, 0), 0);
	assert_true(page[WALL(true)] && info[32] && info[0x40]);
	if (rs) {
		struct runstate r = read_runstate(run, true);

		assert_true(r.entry && r.entry == runstate_sum(&r));
	}
	assert_int_equal(xen_send(&g, 70, 0), 0);
	assert_true(xen_bit(page + PENDING, 70));
	assert_int_equal(info[0], 1);
	munmap(page, 4 * KL_PAGE_SIZE);
}

/* B26, X2: the hypercall page, where the host lacks the memory: no #GP for the guest. */
static void hypercall_page_absent(void **state)
{
	uint8_t *page = mmap(NULL, KL_PAGE_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct kvm_regs r;

	(void)state;
	guest_long_mode(&g, 0);
	assert_int_equal(set_slot(&g, 1, 0, AWAY, KL_PAGE_SIZE, page), 0);
	memcpy(g.ram + CODE, "\x0f\x30\xe6\x80", 4); /* wrmsr; out %al, $DONE */
	r = guest_get(&g);
	r.rcx = HCALL_MSR;
	r.rax = AWAY;
	r.rdx = 0;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &r), 0);
	assert_int_equal(guest_run(&g), -EFAULT);
	assert_int_equal(guest_get(&g).rip, CODE);
	assert_int_equal(mprotect(page, KL_PAGE_SIZE, PROT_READ | PROT_WRITE), 0);
	assert_port(&g, DONE);
	assert_int_equal(page[0], 0xb8);
	munmap(page, KL_PAGE_SIZE);
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(send_against_attributes),
		T(storm_loses_nothing),
		T(send_while_set),
		T(mode_flips),
		T(every_offset),
		T(never_torn),
		T(flag_while_written),
		T(empty_slot),
		T(hypercall_page_absent),
	};

	cmocka_set_test_filter(getenv("KVMLET_TEST"));
	return cmocka_run_group_tests(tests, NULL, NULL);
}
