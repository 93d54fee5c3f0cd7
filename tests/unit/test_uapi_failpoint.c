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

/* ---- all kinds of calls ------------------------------------------------------------- */

static bool fits_failpoint(const char *name, long r)
{
	if (!strcmp(name, "populate"))
		return r == -EFAULT;
	if (!strcmp(name, "populate-hwpoison"))
		return r == -EHWPOISON || r == -EFAULT;
	if (strstr(name, "memfd") || !strcmp(name, "gmem-open"))
		return r == -EMFILE;
	if (!strcmp(name, "irqfd-thread") || strstr(name, "thread"))
		return r == -ENOMEM || r == -EAGAIN;
	return r == -ENOMEM;
}

static unsigned failures;

/* The call with its first step failing, then its second, until there is none that fails. */
static long each_step(struct dev *d, unsigned long cmd, void *arg, struct dev *new)
{
	for (unsigned nth = 1;; nth++) {
		struct held before = held(), after;
		const char *name;
		long r;

		kl_failpoint_arm_any(nth);
		r = dev_ioctl_new(d, cmd, (unsigned long)arg, new);
		name = kl_failpoint_disarm_any();
		if (r >= 0)
			return r; /* nothing failed, or it was made up for */
		if (!name)
			fail_msg("call %lx: %ld", cmd, r);
		if (!fits_failpoint(name, r))
			fail_msg("call %lx: %s failed, and it returned %ld", cmd, name, r);
		after = held();
		assert_int_equal(after.fds, before.fds);
		/* Page tables stay for the next who needs them. */
		if (cmd != KVM_RUN)
			assert_int_equal(after.pages, before.pages);
		failures++;
	}
}

#define DO(d, cmd, ...)   each_step(&(d), cmd, &(__VA_ARGS__), NULL)
#define NUMBER(d, cmd, n) each_step(&(d), cmd, (void *)(unsigned long)(n), NULL)

static void run_some(struct dev *vcpu, uint8_t *ram)
{
	/* mov $0x2000, %bx; mov %al, (%bx); mov %al, 0x1000(%bx); hlt */
	static const uint8_t code[] = {0xbb, 0x00, 0x20, 0x88, 0x07, 0x88, 0x87, 0x00, 0x10, 0xf4};
	struct kvm_regs regs = {.rip = GPA, .rflags = 2};
	struct kvm_sregs sregs;

	memcpy(ram, code, sizeof(code));
	DO(*vcpu, KVM_GET_SREGS, sregs);
	sregs.cs.base = sregs.cs.selector = 0;
	DO(*vcpu, KVM_SET_SREGS, sregs);
	DO(*vcpu, KVM_SET_REGS, regs);
	NUMBER(*vcpu, KVM_RUN, 0);
	DO(*vcpu, KVM_GET_REGS, regs);
	assert_int_equal(regs.rip, GPA + sizeof(code));
}

static void memory_calls(struct dev *vm, struct dev *vcpu, uint8_t *ram, uint8_t *more)
{
	struct kvm_userspace_memory_region slot = {
		.guest_phys_addr = GPA,
		.memory_size = 4 * KL_PAGE_SIZE,
		.userspace_addr = (uint64_t)ram,
	};
	struct kl_uapi_memory_region2 bound = {
		.slot = 1,
		.flags = KVM_MEM_GUEST_MEMFD,
		.guest_phys_addr = 0x100000,
		.memory_size = 4 * KL_PAGE_SIZE,
		.userspace_addr = (uint64_t)more,
	};
	struct kvm_create_guest_memfd file = {.size = 4 * KL_PAGE_SIZE};
	struct kvm_memory_attributes a = {.address = 0x101000,
					  .size = KL_PAGE_SIZE,
					  .attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE};
	uint64_t bitmap[1] = {0};
	struct kvm_dirty_log log = {.dirty_bitmap = bitmap};
	struct kvm_clear_dirty_log clear = {.num_pages = 4, .dirty_bitmap = bitmap};
	struct kvm_enable_cap manual = {.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, .args = {3}};
	struct dev gmem;

	DO(*vm, KVM_ENABLE_CAP, manual);
	each_step(vm, KVM_CREATE_GUEST_MEMFD, &file, &gmem);
	bound.guest_memfd = (uint32_t)gmem.fd;
	DO(*vm, KVM_SET_USER_MEMORY_REGION2, bound);
	DO(*vm, KVM_SET_MEMORY_ATTRIBUTES, a);
	DO(*vm, KVM_SET_USER_MEMORY_REGION, slot);
	run_some(vcpu, ram);
	slot.flags = KVM_MEM_LOG_DIRTY_PAGES;
	DO(*vm, KVM_SET_USER_MEMORY_REGION, slot);
	run_some(vcpu, ram);
	DO(*vm, KVM_GET_DIRTY_LOG, log);
	DO(*vm, KVM_CLEAR_DIRTY_LOG, clear);
	run_some(vcpu, ram);
	DO(*vm, KVM_GET_DIRTY_LOG, log);
	assert_true(bitmap[0] & 1u << 1);
	a.attributes = 0;
	DO(*vm, KVM_SET_MEMORY_ATTRIBUTES, a);
	slot.guest_phys_addr += 0x10000;
	DO(*vm, KVM_SET_USER_MEMORY_REGION, slot);
	slot.guest_phys_addr -= 0x10000;
	DO(*vm, KVM_SET_USER_MEMORY_REGION, slot);
	bound.memory_size = 0;
	DO(*vm, KVM_SET_USER_MEMORY_REGION2, bound);
	dev_close(&gmem);
}

static void irq_calls(struct dev *vm, int efd, int resample)
{
	struct {
		struct kvm_irq_routing head;
		struct kvm_irq_routing_entry e;
	} routing = {.head = {.nr = 1}, .e = {.gsi = 3, .type = KVM_IRQ_ROUTING_MSI}};
	struct kvm_pit_config pit = {0};
	struct kvm_irqfd irqfd = {.fd = (uint32_t)efd,
				  .gsi = 5,
				  .flags = KVM_IRQFD_FLAG_RESAMPLE,
				  .resamplefd = (uint32_t)resample};
	struct kvm_ioeventfd io = {
		.addr = 0x80, .len = 2, .fd = efd, .flags = KVM_IOEVENTFD_FLAG_PIO};
	struct kvm_coalesced_mmio_zone zone = {.addr = 0xf0000000, .size = KL_PAGE_SIZE};
	struct kvm_hyperv_eventfd event = {.conn_id = 1, .fd = efd};

	NUMBER(*vm, KVM_CREATE_IRQCHIP, 0);
	DO(*vm, KVM_CREATE_PIT2, pit);
	DO(*vm, KVM_SET_GSI_ROUTING, routing);
	DO(*vm, KVM_IRQFD, irqfd);
	DO(*vm, KVM_IOEVENTFD, io);
	DO(*vm, KVM_REGISTER_COALESCED_MMIO, zone);
	DO(*vm, KVM_HYPERV_EVENTFD, event);
	irqfd.flags = KVM_IRQFD_FLAG_DEASSIGN;
	DO(*vm, KVM_IRQFD, irqfd);
	io.flags |= KVM_IOEVENTFD_FLAG_DEASSIGN;
	DO(*vm, KVM_IOEVENTFD, io);
	DO(*vm, KVM_UNREGISTER_COALESCED_MMIO, zone);
	event.flags = KVM_HYPERV_EVENTFD_DEASSIGN;
	event.fd = 0;
	DO(*vm, KVM_HYPERV_EVENTFD, event);
}

static void guest_area_calls(struct dev *vm, struct dev *vcpu, uint8_t *ram)
{
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry e[3];
	} msrs = {.head = {.nmsrs = 3},
		  .e = {{.index = 0x4b564d01, .data = GPA + 0x800 + 1},
			{.index = 0x4b564d03, .data = GPA + 0x840 + 1},
			{.index = 0x4b564d04, .data = GPA + 0x880 + 1}}};
	struct kvm_xen_hvm_config config = {.flags = KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL |
						     KVM_XEN_HVM_CONFIG_EVTCHN_SEND};
	struct kvm_xen_hvm_attr mode = {.type = KVM_XEN_ATTR_TYPE_LONG_MODE, .u.long_mode = 1},
				shared = {.type = KVM_XEN_ATTR_TYPE_SHARED_INFO,
					  .u.shared_info.gfn = GPA / KL_PAGE_SIZE + 3},
				port = {.type = KVM_XEN_ATTR_TYPE_EVTCHN};
	struct kvm_xen_vcpu_attr info = {.type = KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO,
					 .u.gpa = GPA + 3 * KL_PAGE_SIZE};
	struct dev stats;

	each_step(vm, KVM_GET_STATS_FD, NULL, &stats);
	dev_close(&stats);
	each_step(vcpu, KVM_GET_STATS_FD, NULL, &stats);
	dev_close(&stats);
	assert_int_equal(DO(*vcpu, KVM_SET_MSRS, msrs), 3);
	DO(*vm, KVM_XEN_HVM_CONFIG, config);
	DO(*vm, KVM_XEN_HVM_SET_ATTR, mode);
	DO(*vm, KVM_XEN_HVM_SET_ATTR, shared);
	port.u.evtchn.send_port = 7;
	port.u.evtchn.type = 2; /* to a port of another domain */
	port.u.evtchn.deliver.port.port = 9;
	port.u.evtchn.deliver.port.priority = KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL;
	DO(*vm, KVM_XEN_HVM_SET_ATTR, port);
	DO(*vcpu, KVM_XEN_VCPU_SET_ATTR, info);
	run_some(vcpu, ram);
}

/*
 * S2, U4, N7: calls of all kinds, and a guest that runs. Whatever step fails, the call says so with
 * the errno of that step, holds nothing that it did not hold, and works when it is made again.
 */
static void fail_each_step(void **state)
{
	struct held before, after;

	(void)state;
	if (!kl_failpoints_enabled())
		skip();
	for (unsigned i = 0; i < 3; i++) { /* the first makes what is made once */
		uint8_t *ram = mmap(NULL, 8 * KL_PAGE_SIZE, PROT_READ | PROT_WRITE,
				    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		struct dev kvm = open_kvm(), vm, vcpu;
		int efd = eventfd(0, 0), resample = eventfd(0, 0);

		failures = 0;
		before = held();
		each_step(&kvm, KVM_CREATE_VM, (void *)(long)KVM_X86_SW_PROTECTED_VM, &vm);
		if (i == 1) /* else HLT is an exit */
			irq_calls(&vm, efd, resample);
		each_step(&vm, KVM_CREATE_VCPU, NULL, &vcpu);
		if (i != 1) {
			memory_calls(&vm, &vcpu, ram, ram + 4 * KL_PAGE_SIZE);
			guest_area_calls(&vm, &vcpu, ram);
		}
		dev_close(&vcpu);
		dev_close(&vm);
		after = held();
		assert_int_equal(after.pages, before.pages);
		assert_true(!i || after.fds == before.fds);
		assert_true(failures > 10);
		close(efd);
		close(resample);
		dev_close(&kvm);
		munmap(ram, 8 * KL_PAGE_SIZE);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(fail_each_step),
		cmocka_unit_test(fail_each_in_turn),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
