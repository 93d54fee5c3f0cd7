/* SPDX-License-Identifier: MIT */
/*
 * Every step that can fail while a VM, its interrupt controllers and a vCPU are made and run,
 * failed in turn: the errno is KVM's, nothing is left behind, and the second attempt works (S2,
 * U4).
 */
#include <stdio.h>
#include <sys/eventfd.h>

#include "base/pool.h"
#include "uapi_util.h"
#include "failpoint_sites.h"

#define GPA 0x1000ul

struct life {
	uint8_t *ram;
	int efd[2];
	long expected; /* of the step that fails; 0: nothing is armed */
	int failures;
};

/* What must be as before when a step has failed. */
struct held {
	uint64_t pages;
	int fds;
};

static struct held held(void)
{
	return (struct held){kl_pages_in_use(), count_fds()};
}

static long step(struct life *l, struct dev *d, unsigned long cmd, unsigned long arg,
		 struct dev *new)
{
	struct held before = held(), after;
	long r = dev_ioctl_new(d, cmd, arg, new);

	if (r >= 0)
		return r;
	after = held();
	assert_int_equal(r, l->expected);
	assert_int_equal(l->failures++, 0);
	assert_int_equal(after.pages, before.pages);
	assert_int_equal(after.fds, before.fds);
	r = dev_ioctl_new(d, cmd, arg, new);
	assert_true(r >= 0);
	return r;
}

static void live(struct life *l)
{
	struct kvm_userspace_memory_region slot = {.guest_phys_addr = GPA,
						   .memory_size = KL_PAGE_SIZE,
						   .userspace_addr = (uint64_t)l->ram};
	struct held before = held(), after;
	struct dev kvm = open_kvm(), vm, vcpu;
	struct kvm_irq_routing_entry routes[2] = {{.gsi = 3, .type = KVM_IRQ_ROUTING_MSI}};
	struct kvm_irq_routing *routing = (void *)l->ram;
	struct kvm_pit_config pit = {0};
	struct kvm_hyperv_eventfd event = {.conn_id = 1, .fd = l->efd[0]};
	struct kvm_irqfd irqfd = {
		.fd = (uint32_t)l->efd[0],
		.gsi = 5,
		.flags = KVM_IRQFD_FLAG_RESAMPLE,
		.resamplefd = (uint32_t)l->efd[1],
	};

	*routing = (struct kvm_irq_routing){.nr = 1};
	memcpy(routing->entries, routes, sizeof(routes[0]));
	step(l, &kvm, KVM_CREATE_VM, 0, &vm);
	step(l, &vm, KVM_CREATE_IRQCHIP, 0, NULL);
	step(l, &vm, KVM_CREATE_PIT2, (unsigned long)&pit, NULL);
	step(l, &vm, KVM_SET_GSI_ROUTING, (unsigned long)routing, NULL);
	step(l, &vm, KVM_IRQFD, (unsigned long)&irqfd, NULL);
	step(l, &vm, KVM_HYPERV_EVENTFD, (unsigned long)&event, NULL);
	step(l, &vm, KVM_CREATE_VCPU, 0, &vcpu);
	step(l, &vm, KVM_SET_USER_MEMORY_REGION, (unsigned long)&slot, NULL);
	slot.flags = KVM_MEM_LOG_DIRTY_PAGES;
	step(l, &vm, KVM_SET_USER_MEMORY_REGION, (unsigned long)&slot, NULL);
	slot.memory_size = 0;
	step(l, &vm, KVM_SET_USER_MEMORY_REGION, (unsigned long)&slot, NULL);
	dev_close(&vcpu);
	dev_close(&vm);
	dev_close(&kvm);
	after = held();
	assert_int_equal(after.pages, before.pages);
	assert_int_equal(after.fds, before.fds);
}

/* S2, U4: each failure is reported, and leaves no descriptor and no page. */
static void fail_each_in_turn(void **state)
{
	static const char *const ours[] = {
		"vm-alloc",         "coalesced-memfd", "object-memfd",      "vcpu-alloc",
		"vcpu-run-map",     "x86-vcpu-map",    "x86-blocks-map",    "pic-alloc",
		"ioapic-alloc",     "pit-alloc",       "irq-routing-alloc", "irq-table-alloc",
		"irq-routing-copy", "irqfd-alloc",     "irqfd-epoll",       "irqfd-stop",
		"irqfd-thread",     "irqfd-resampler", "irqfd-watch",       "timer-thread",
		"apic-alloc",       "hv-event"};
	struct life l = {.ram = mmap(NULL, KL_PAGE_SIZE, PROT_READ | PROT_WRITE,
				     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0),
			 .efd = {eventfd(0, 0), eventfd(0, 0)}};
	struct sites sites = {.n = 0};

	(void)state;
	if (!kl_failpoints_enabled())
		skip();
	live(&l); /* what is made once in a process is there */
	kl_failpoint_count_start();
	live(&l);
	kl_failpoint_count_stop();
	kl_failpoint_each(note_site, &sites);
	for (unsigned i = 0; i < KL_ARRAY_SIZE(ours); i++) {
		bool passed = false;

		for (unsigned k = 0; k < sites.n; k++)
			passed |= !strcmp(sites.s[k].name, ours[i]) && sites.s[k].passed;
		if (!passed)
			fail_msg("failpoint %s was not passed", ours[i]);
	}
	for (unsigned i = 0; i < sites.n; i++)
		for (unsigned nth = 1; nth <= sites.s[i].passed; nth++) {
			const char *name = sites.s[i].name;
			bool memfd = strstr(name, "memfd");

			/* The first descriptor is /dev/kvm itself: that is open_kvm()'s affair. */
			if (!strcmp(name, "object-memfd") && nth == 1)
				continue;
			l.failures = 0;
			l.expected = memfd ? -EMFILE : -ENOMEM;
			kl_failpoint_arm(name, nth);
			live(&l);
			assert_true(kl_failpoint_disarm(name));
			assert_int_equal(l.failures, 1);
		}
	munmap(l.ram, KL_PAGE_SIZE);
	close(l.efd[0]);
	close(l.efd[1]);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(fail_each_in_turn),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
