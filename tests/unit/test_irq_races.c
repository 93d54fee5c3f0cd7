/* SPDX-License-Identifier: MIT */
/*
 * irqfds, routing and controllers that many threads use at once, while a guest takes the interrupts
 * and the VM goes away; and the interleavings that matter, forced.
 */
#include <pthread.h>
#include <sys/eventfd.h>

#include "base/racepoint.h"
#include "irq_guest.h"

#define ROUNDS  400
#define NR_FDS  6
#define STOP_AT 0x600 /* the guest looks at this byte */

static long irqfd(struct guest *g, int fd, uint32_t gsi, uint32_t flags, int resample)
{
	struct kvm_irqfd f = {
		.fd = (uint32_t)fd,
		.gsi = gsi,
		.flags = flags,
		.resamplefd = (uint32_t)resample,
	};

	return dev_ioctl_p(&g->vm, KVM_IRQFD, &f);
}

static void signal_fd(int fd)
{
	uint64_t one = 1;

	assert_int_equal(write(fd, &one, sizeof(one)), sizeof(one));
}

static uint64_t count_of(int fd)
{
	uint64_t n = 0;

	return read(fd, &n, sizeof(n)) == sizeof(n) ? n : 0;
}

static void wait_irr(struct guest *g, uint32_t bit)
{
	for (unsigned i = 0; !(get_ioapic(g).irr & bit); i++) {
		assert_true(i < 200000);
		usleep(100);
	}
}

/* ---- the storm --------------------------------------------------------------------- */

struct storm {
	struct guest g;
	int fds[NR_FDS], resample[2];
	unsigned seed;
};

static unsigned rnd(unsigned *seed, unsigned n)
{
	*seed = *seed * 1103515245 + 12345;
	return (*seed >> 16) % n;
}

static void *signals(void *arg)
{
	struct storm *s = arg;
	unsigned seed = 1;

	for (unsigned i = 0; i < ROUNDS * 8; i++) {
		signal_fd(s->fds[rnd(&seed, NR_FDS)]);
		if (!rnd(&seed, 64))
			count_of(s->fds[rnd(&seed, NR_FDS)]);
	}
	return NULL;
}

static void *assignments(void *arg)
{
	struct storm *s = arg;
	unsigned seed = (unsigned)(uintptr_t)pthread_self();

	for (unsigned i = 0; i < ROUNDS; i++) {
		int fd = s->fds[rnd(&seed, NR_FDS)];
		uint32_t gsi = rnd(&seed, 26), flags = rnd(&seed, 2) ? KVM_IRQFD_FLAG_RESAMPLE : 0;
		long r = irqfd(&s->g, fd, gsi, flags, s->resample[rnd(&seed, 2)]);

		assert_true(r == 0 || r == -EBUSY);
		if (!rnd(&seed, 3))
			assert_int_equal(
				irqfd(&s->g, fd, rnd(&seed, 26), KVM_IRQFD_FLAG_DEASSIGN, 0), 0);
		if (r == 0 && rnd(&seed, 4))
			assert_int_equal(irqfd(&s->g, fd, gsi, KVM_IRQFD_FLAG_DEASSIGN, 0), 0);
	}
	return NULL;
}

static void *routings(void *arg)
{
	struct storm *s = arg;
	struct {
		struct kvm_irq_routing head;
		struct kvm_irq_routing_entry e[26];
	} t = {.head.nr = 26};
	unsigned seed = 3;

	for (unsigned i = 0; i < ROUNDS; i++) {
		for (uint32_t gsi = 0; gsi < 26; gsi++) {
			struct kvm_irq_routing_entry *e = &t.e[gsi];

			e->gsi = gsi;
			if (gsi < 24 && rnd(&seed, 3)) {
				e->type = KVM_IRQ_ROUTING_IRQCHIP;
				e->u.irqchip.irqchip = gsi < 8 ? rnd(&seed, 2) * 2 : 2;
				e->u.irqchip.pin = gsi;
			} else {
				e->type = KVM_IRQ_ROUTING_MSI;
				e->u.msi.address_lo = 0xfee00000;
				e->u.msi.address_hi = 0;
				e->u.msi.data = 0x40 + gsi + (rnd(&seed, 2) << 15);
			}
		}
		assert_int_equal(dev_ioctl_p(&s->g.vm, KVM_SET_GSI_ROUTING, &t), 0);
	}
	return NULL;
}

static void *lines(void *arg)
{
	struct storm *s = arg;
	unsigned seed = 4;

	for (unsigned i = 0; i < ROUNDS * 4; i++) {
		struct kvm_irqchip c;
		struct kvm_msi msi = {.address_lo = 0xfee00000, .data = 0x41};

		irq_status(&s->g, rnd(&seed, 26), rnd(&seed, 2));
		switch (rnd(&seed, 8)) {
		case 0:
			c = get_chip(&s->g, rnd(&seed, 3));
			assert_int_equal(dev_ioctl_p(&s->g.vm, KVM_SET_IRQCHIP, &c), 0);
			break;
		case 1:
			assert_true(dev_ioctl_p(&s->g.vm, KVM_SIGNAL_MSI, &msi) >= -1);
			break;
		case 2: {
			struct kvm_reinject_control rc = {.pit_reinject = (uint8_t)rnd(&seed, 2)};

			assert_int_equal(dev_ioctl_p(&s->g.vm, KVM_REINJECT_CONTROL, &rc), 0);
			break;
		}
		case 3: {
			struct kvm_pit_state2 p;

			assert_int_equal(dev_ioctl_p(&s->g.vm, KVM_GET_PIT2, &p), 0);
			p.channels[0].mode = 2;
			p.channels[0].count = 300;
			assert_int_equal(dev_ioctl_p(&s->g.vm, KVM_SET_PIT2, &p), 0);
			break;
		}
		default:
			break;
		}
	}
	return NULL;
}

/*
 * main: sti; 1: cmpb $0, STOP_AT; je 1b; cli; OUT. Handlers of all vectors: EOI to both 8259s and
 * to the APIC, whose page DS points to; iret.
 */
static void storm_guest(struct guest *g)
{
	static const uint8_t main_code[] = {
		0xfb, 0x2e, 0x80, 0x3e, STOP_AT & 0xff,   STOP_AT >> 8,   0,
		0x74, 0xf8, 0xfa, 0xba, DONE_PORT & 0xff, DONE_PORT >> 8, 0xee,
	};
	static const uint8_t handler[] = {
		0x50, 0xb0, 0x20, 0xe6, 0x20, 0xe6, 0xa0, /* 8259 */
		0x66, 0x31, 0xc0, 0x66, 0xa3, 0xb0, 0x00, /* EOI */
		0x58, 0xcf,
	};

	for (int v = 0; v < 256; v++)
		set_vector(g, v, 0x5000);
	memcpy(g->ram + 0x5000, handler, sizeof(handler));
	memcpy(g->ram + CODE, main_code, sizeof(main_code));
	g->ram[STOP_AT] = 0;
}

static void *runs(void *arg)
{
	struct storm *s = arg;

	guest_regs(&s->g);
	ds_at(&s->g, 0xfee00000);
	expect_done(&s->g);
	return NULL;
}

/* Enable the APIC, and let each pin of the IOAPIC interrupt, every other one level-triggered. */
static void open_lines(struct guest *g)
{
	static const uint8_t svr[] = {0x66,           0xb8, 0xff, 0x01, 0,    0,
				      0x66,           0xa3, 0xf0, 0,    0xba, DONE_PORT & 0xff,
				      DONE_PORT >> 8, 0xee};

	memcpy(g->ram + CODE, svr, sizeof(svr));
	guest_regs(g);
	ds_at(g, 0xfee00000);
	expect_done(g);
	pic_init(g, 0x20, 0x28, 1);
	for (unsigned pin = 0; pin < 24; pin++)
		ioapic_entry(g, pin, (0x60u + pin * 4) | (pin & 1 ? E_LEVEL : 0));
}

/* The IOAPIC's pins alone. */
static void route_pins(struct guest *g)
{
	struct {
		struct kvm_irq_routing head;
		struct kvm_irq_routing_entry e[24];
	} r = {.head.nr = 24};

	for (uint32_t gsi = 0; gsi < 24; gsi++)
		r.e[gsi] = (struct kvm_irq_routing_entry){
			.gsi = gsi,
			.type = KVM_IRQ_ROUTING_IRQCHIP,
			.u.irqchip = {.irqchip = KVM_IRQCHIP_IOAPIC, .pin = gsi},
		};
	assert_int_equal(dev_ioctl_p(&g->vm, KVM_SET_GSI_ROUTING, &r), 0);
}

static void storm(void **state)
{
	void *(*const threads[])(void *) = {signals,     signals,  assignments,
					    assignments, routings, lines};
	pthread_t t[KL_ARRAY_SIZE(threads)], vcpu;
	struct kvm_pit_config pit = {0};
	struct storm s = {0};

	(void)state;
	guest_make(&s.g, true);
	assert_int_equal(dev_ioctl_p(&s.g.vm, KVM_CREATE_PIT2, &pit), 0);
	for (unsigned i = 0; i < NR_FDS; i++)
		s.fds[i] = eventfd(0, EFD_NONBLOCK | (i & 1 ? EFD_SEMAPHORE : 0));
	s.resample[0] = eventfd(0, EFD_NONBLOCK);
	s.resample[1] = eventfd(0, EFD_NONBLOCK);
	open_lines(&s.g);
	storm_guest(&s.g);

	assert_int_equal(pthread_create(&vcpu, NULL, runs, &s), 0);
	for (unsigned i = 0; i < KL_ARRAY_SIZE(t); i++)
		assert_int_equal(pthread_create(&t[i], NULL, threads[i], &s), 0);
	for (unsigned i = 0; i < KL_ARRAY_SIZE(t); i++)
		pthread_join(t[i], NULL);
	/*
	 * Level-triggered lines are let go, or the guest would not come to look; whoever drove one
	 * last may have reached it by another route than there is now.
	 */
	for (unsigned i = 0; i < NR_FDS; i++) {
		for (uint32_t gsi = 0; gsi < 26; gsi++)
			assert_int_equal(irqfd(&s.g, s.fds[i], gsi, KVM_IRQFD_FLAG_DEASSIGN, 0), 0);
	}
	route_pins(&s.g);
	for (uint32_t gsi = 0; gsi < 24; gsi++) {
		irq_line(&s.g, gsi, 0);
		count_of(s.fds[0]);
		assert_int_equal(irqfd(&s.g, s.fds[0], gsi, KVM_IRQFD_FLAG_RESAMPLE, s.resample[0]),
				 0);
		assert_int_equal(irqfd(&s.g, s.fds[0], gsi, KVM_IRQFD_FLAG_DEASSIGN, 0), 0);
	}
	__atomic_store_n(&s.g.ram[STOP_AT], 1, __ATOMIC_RELEASE);
	pthread_join(vcpu, NULL);

	/* It still works. (Of a pin that was edge-triggered before, KVM does not show the request.)
	 */
	ioapic_entry(&s.g, 21, E_MASK | E_LEVEL | 0x55);
	irq_line(&s.g, 21, 0);
	assert_int_equal(irqfd(&s.g, s.fds[0], 21, KVM_IRQFD_FLAG_RESAMPLE, s.resample[0]), 0);
	signal_fd(s.fds[0]);
	wait_irr(&s.g, 1u << 21);
	guest_free(&s.g);
	for (unsigned i = 0; i < NR_FDS; i++)
		close(s.fds[i]);
	close(s.resample[0]);
	close(s.resample[1]);
}

/* ---- the VM goes ------------------------------------------------------------------- */

static _Atomic bool over;

static void *keeps_signalling(void *arg)
{
	int *fds = arg;

	while (!over) {
		for (unsigned i = 0; i < NR_FDS; i++) {
			uint64_t one = 1;

			if (write(fds[i], &one, sizeof(one)) < 0)
				count_of(fds[i]);
		}
	}
	return NULL;
}

/* VMs end, and with the last irqfd the helper, while their eventfds are signalled. */
static void vms_go_while_signalled(void **state)
{
	int fds[NR_FDS], resample = eventfd(0, EFD_NONBLOCK);
	pthread_t t;

	(void)state;
	if (on_real_kvm()) /* Linux 6.17 has come to give an eventfd to one VM only */
		skip();
	for (unsigned i = 0; i < NR_FDS; i++)
		fds[i] = eventfd(0, EFD_NONBLOCK);
	over = false;
	assert_int_equal(pthread_create(&t, NULL, keeps_signalling, fds), 0);
	for (unsigned n = 0; n < 60; n++) {
		struct guest a, b;

		guest_make(&a, true);
		guest_make(&b, true);
		for (unsigned i = 0; i < NR_FDS; i++) {
			uint32_t flags = i & 1 ? KVM_IRQFD_FLAG_RESAMPLE : 0;

			/* One eventfd may serve several VMs. */
			assert_int_equal(irqfd(&a, fds[i], 10 + i, flags, resample), 0);
			assert_int_equal(irqfd(&b, fds[i], 10 + i, flags, resample), 0);
		}
		guest_free(&a);
		guest_free(&b);
	}
	over = true;
	pthread_join(t, NULL);
	for (unsigned i = 0; i < NR_FDS; i++)
		close(fds[i]);
	close(resample);
}

/* ---- forced ------------------------------------------------------------------------ */

struct call {
	struct guest *g;
	int fd;
};

static void *assign_20(void *arg)
{
	struct call *c = arg;

	assert_int_equal(irqfd(c->g, c->fd, 20, 0, 0), 0);
	return NULL;
}

/* A signal that comes between the look at the eventfd and the watch on it is not lost. */
static void signal_during_assignment(void **state)
{
	int fd = eventfd(0, EFD_NONBLOCK);
	struct guest g;
	struct call c = {&g, fd};
	pthread_t t;

	(void)state;
	if (!kl_racepoints_enabled() || on_real_kvm())
		skip();
	guest_make(&g, true);
	ioapic_entry(&g, 20, E_MASK | 0x55);
	kl_racepoint_arm("irqfd-armed", 1);
	assert_int_equal(pthread_create(&t, NULL, assign_20, &c), 0);
	assert_true(kl_racepoint_wait("irqfd-armed", 10000));
	signal_fd(fd);
	kl_racepoint_release("irqfd-armed");
	pthread_join(t, NULL);
	/* An edge: raised and let go; irr keeps it only while it is high. Taken, it was injected.
	 */
	for (unsigned i = 0; count_of(fd); i++)
		assert_true(i < 2);
	guest_free(&g);
	close(fd);
}

/*
 * The helper has seen the signal and not acted yet. The deassignment does it: the signal is taken
 * and the interrupt made when it returns, and the helper finds nothing.
 */
static void deassignment_delivers(void **state)
{
	int fd = eventfd(0, EFD_NONBLOCK);
	struct guest g;

	(void)state;
	if (!kl_racepoints_enabled() || on_real_kvm())
		skip();
	guest_make(&g, true);
	pic_init(&g, 0x20, 0x28, 1);
	port_out(&g, 0x21, 0xff);
	assert_int_equal(irqfd(&g, fd, 4, 0, 0), 0);
	kl_racepoint_arm("irqfd-events", 1);
	signal_fd(fd);
	assert_true(kl_racepoint_wait("irqfd-events", 10000));
	assert_int_equal(get_pic(&g, false).irr, 0);
	assert_int_equal(irqfd(&g, fd, 4, KVM_IRQFD_FLAG_DEASSIGN, 0), 0);
	assert_int_equal(get_pic(&g, false).irr, 0x10);
	assert_int_equal(count_of(fd), 0);
	pic_init(&g, 0x20, 0x28, 1);
	kl_racepoint_release("irqfd-events");
	/* The VM's end waits for the helper. */
	signal_fd(fd);
	assert_int_equal(get_pic(&g, false).irr, 0);
	guest_free(&g);
	assert_int_equal(count_of(fd), 1);
	close(fd);
}

static void *line_4(void *arg)
{
	irq_line(arg, 4, 1);
	return NULL;
}

/* Raised under the old table, delivered by it, although the new one is there: nothing is freed. */
static void routing_changes_under_an_interrupt(void **state)
{
	struct kvm_irq_routing none = {0};
	struct guest g;
	pthread_t t;

	(void)state;
	if (!kl_racepoints_enabled() || on_real_kvm())
		skip();
	guest_make(&g, true);
	pic_init(&g, 0x20, 0x28, 1);
	port_out(&g, 0x21, 0xff);
	kl_racepoint_arm("irq-routed", 1);
	assert_int_equal(pthread_create(&t, NULL, line_4, &g), 0);
	assert_true(kl_racepoint_wait("irq-routed", 10000));
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_GSI_ROUTING, &none), 0);
	kl_racepoint_release("irq-routed");
	pthread_join(t, NULL);
	assert_int_equal(get_pic(&g, false).irr, 0x10);
	irq_line(&g, 5, 1);
	assert_int_equal(get_pic(&g, false).irr, 0x10);
	guest_free(&g);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(vms_go_while_signalled),
		cmocka_unit_test(signal_during_assignment),
		cmocka_unit_test(deassignment_delivers),
		cmocka_unit_test(routing_changes_under_an_interrupt),
		cmocka_unit_test(storm),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
