/* SPDX-License-Identifier: MIT */
/* Xen HVM through KVM's ioctls: attributes, hypercalls, shared_info, runstate, time (X1, X2, X4).
 */
#include <pthread.h>
#include <sys/eventfd.h>
#include <time.h>

#include "base/racepoint.h"
#include "host/cpu.h"
#include "xen_guest.h"

#define WAIT_MS 10000

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

/* KVM_XEN_HVM_CONFIG and the capability. */
static void config(void **state)
{
	const int always = KVM_XEN_HVM_CONFIG_HYPERCALL_MSR | KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL |
			   KVM_XEN_HVM_CONFIG_SHARED_INFO | KVM_XEN_HVM_CONFIG_EVTCHN_2LEVEL |
			   KVM_XEN_HVM_CONFIG_EVTCHN_SEND |
			   KVM_XEN_HVM_CONFIG_PVCLOCK_TSC_UNSTABLE |
			   KVM_XEN_HVM_CONFIG_SHARED_INFO_HVA;
	struct kvm_xen_hvm_config c = {.msr = HCALL_MSR};

	(void)state;
	assert_int_equal(dev_ioctl(&g.kvm, KVM_CHECK_EXTENSION, KVM_CAP_XEN_HVM) & always, always);
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_XEN_HVM_CONFIG, &c), 0);
	for (unsigned bit = 0; bit < 32; bit++) {
		bool known = bit == 1 || bit == 5 || bit == 7;

		c.flags = 1u << bit;
		assert_int_equal(dev_ioctl_p(&g.vm, KVM_XEN_HVM_CONFIG, &c), known ? 0 : -EINVAL);
	}
	c.flags = KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL;
	c.blob_size_32 = 1;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_XEN_HVM_CONFIG, &c), -EINVAL);
	c.blob_size_32 = 0;
	c.blob_addr_64 = 0x1000;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_XEN_HVM_CONFIG, &c), -EINVAL);
	assert_int_equal(dev_ioctl(&g.vm, KVM_XEN_HVM_CONFIG, 8), -EFAULT);
}

/* X1: the VM's attributes. */
static void vm_attributes(void **state)
{
	uint64_t val;

	(void)state;
	for (uint16_t type = 7; type < 40; type++) {
		assert_int_equal(xen_set(&g, type, 0), -ENOENT);
		assert_int_equal(xen_get(&g, type, &val), -ENOENT);
	}
	assert_int_equal(xen_get(&g, KVM_XEN_ATTR_TYPE_EVTCHN, &val), -ENOENT);
	assert_int_equal(dev_ioctl(&g.vm, KVM_XEN_HVM_SET_ATTR, 8), -EFAULT);
	assert_int_equal(dev_ioctl(&g.vm, KVM_XEN_HVM_GET_ATTR, 8), -EFAULT);

	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_LONG_MODE, 7), 0);
	assert_int_equal(xen_get(&g, KVM_XEN_ATTR_TYPE_LONG_MODE, &val), 0);
	assert_int_equal(val, 1);
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, 15), -EINVAL);
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, 16), 0);
	assert_int_equal(xen_get(&g, KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, &val), 0);
	assert_int_equal(val, 16);
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, 0), 0);
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_XEN_VERSION, 0x40011), 0);
	assert_int_equal(xen_get(&g, KVM_XEN_ATTR_TYPE_XEN_VERSION, &val), 0);
	assert_int_equal(val, 0x40011);
	if (xen_has_runstate(&g)) {
		assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG, 5), 0);
		assert_int_equal(xen_get(&g, KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG, &val), 0);
		assert_int_equal(val, 1);
	}

	/* shared_info is at one of the two. */
	assert_int_equal(xen_get(&g, KVM_XEN_ATTR_TYPE_SHARED_INFO, &val), 0);
	assert_true(val == INVALID);
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_SHARED_INFO, SHINFO >> 12), 0);
	assert_int_equal(xen_get(&g, KVM_XEN_ATTR_TYPE_SHARED_INFO, &val), 0);
	assert_int_equal(val, SHINFO >> 12);
	assert_int_equal(xen_get(&g, KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA, &val), 0);
	assert_int_equal(val, 0);
	assert_int_equal(
		xen_set(&g, KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA, (uint64_t)g.ram + SHINFO + 8),
		-EINVAL);
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA, (uint64_t)g.ram + SHINFO),
			 0);
	assert_int_equal(xen_get(&g, KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA, &val), 0);
	assert_true(val == (uint64_t)g.ram + SHINFO);
	assert_int_equal(xen_get(&g, KVM_XEN_ATTR_TYPE_SHARED_INFO, &val), 0);
	assert_true(val == INVALID);
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA, 1ull << 63), -EINVAL);
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA, 0), 0);
	assert_int_equal(xen_get(&g, KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA, &val), 0);
	assert_int_equal(val, 0);
}

/* X1: a vCPU's attributes. */
static void vcpu_attributes(void **state)
{
	struct kvm_xen_vcpu_attr t = {.type = KVM_XEN_VCPU_ATTR_TYPE_TIMER, .u.timer.port = 9};
	uint64_t val;

	(void)state;
	for (uint16_t type = 10; type < 40; type++) {
		assert_int_equal(xen_vcpu_set(&g, type, 0), -ENOENT);
		assert_int_equal(xen_vcpu_get(&g, type, &val), -ENOENT);
	}
	assert_int_equal(dev_ioctl(&g.vcpu, KVM_XEN_VCPU_SET_ATTR, 8), -EFAULT);
	assert_int_equal(dev_ioctl(&g.vcpu, KVM_XEN_VCPU_GET_ATTR, 8), -EFAULT);

	assert_int_equal(xen_vcpu_get(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, &val), 0);
	assert_true(val == INVALID);
	assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, INFO + 2), -ENXIO);
	assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, 0xafc4), -EINVAL);
	assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, INFO), 0);
	assert_int_equal(xen_vcpu_get(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, &val), 0);
	assert_int_equal(val, INFO);
	assert_int_equal(
		xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA, (uint64_t)g.ram + INFO + 1),
		-ENXIO);
	assert_int_equal(
		xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA, (uint64_t)g.ram + INFO), 0);
	assert_int_equal(xen_vcpu_get(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, &val), 0);
	assert_true(val == INVALID);
	assert_int_equal(xen_vcpu_get(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA, &val), 0);
	assert_true(val == (uint64_t)g.ram + INFO);
	assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA, 0), 0);
	assert_int_equal(xen_vcpu_get(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA, &val), 0);
	assert_int_equal(val, 0);

	assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO, 0xaff0), -EINVAL);
	assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO, TIME), 0);
	assert_int_equal(xen_vcpu_get(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO, &val), 0);
	assert_int_equal(val, TIME);
	assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO, INVALID), 0);
	assert_int_equal(xen_vcpu_get(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO, &val), 0);
	assert_true(val == INVALID);

	assert_int_equal(xen_vcpu_get(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID, &val), 0);
	assert_int_equal(val, 0);
	assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID, 1u << 20), -EINVAL);
	assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID, 77), 0);
	assert_int_equal(xen_vcpu_get(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID, &val), 0);
	assert_int_equal(val, 77);
	assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR, 1), -EINVAL);
	assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR, 0x20), 0);
	assert_int_equal(xen_vcpu_get(&g, KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR, &val), 0);
	assert_int_equal(val, 0x20);

	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_XEN_VCPU_SET_ATTR, &t), -EINVAL);
	t.u.timer.priority = PRIO;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_XEN_VCPU_SET_ATTR, &t), 0);
	memset(&t.u, 0, sizeof(t.u));
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_XEN_VCPU_GET_ATTR, &t), 0);
	assert_int_equal(t.u.timer.port, 9);
	assert_int_equal(t.u.timer.priority, PRIO);
	assert_int_equal(t.u.timer.expires_ns, 0);
}

/* ---- hypercalls ------------------------------------------------------------------------- */

static void wrmsr_hlt(uint64_t val)
{
	struct kvm_regs r = guest_get(&g);

	memcpy(g.ram + CODE, "\x0f\x30\xe6\x80", 4); /* wrmsr; out %al, $DONE */
	r.rip = CODE;
	r.rcx = HCALL_MSR;
	r.rax = (uint32_t)val;
	r.rdx = val >> 32;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &r), 0);
	assert_int_equal(guest_run(&g), 0);
}

/* X1: the engine fills the page; what it does not answer is the program's. */
static void hypercall_page(void **state)
{
	const uint8_t *page = g.ram + PARAM;
	uint64_t val;
	uint32_t nr;

	(void)state;
	guest_long_mode(&g, 0);
	wrmsr_hlt(PARAM);
	assert_int_equal(g.run->exit_reason, KVM_EXIT_IO);
	for (unsigned i = 0; i < 128; i++) {
		memcpy(&nr, page + 32 * i + 1, sizeof(nr));
		assert_int_equal(page[32 * i], 0xb8);
		assert_int_equal(nr, i);
		assert_memory_equal(page + 32 * i + 5, "\x0f\x01", 2);
		assert_int_equal(page[32 * i + 8], 0xc3);
		assert_int_equal(page[32 * i + 31], 0xcc);
	}
	/* It tells the mode, too (X2). */
	assert_int_equal(xen_get(&g, KVM_XEN_ATTR_TYPE_LONG_MODE, &val), 0);
	assert_int_equal(val, 1);

	for (unsigned i = 0; i < 2; i++) {
		xen_hypercall(&g, 0x1234567800000011ull, 1, 0xdeadbeef00000002ull, 3);
		assert_exit(&g, KVM_EXIT_XEN);
		assert_int_equal(g.run->xen.type, KVM_EXIT_XEN_HCALL);
		assert_int_equal(g.run->xen.u.hcall.longmode, 1);
		assert_int_equal(g.run->xen.u.hcall.cpl, 0);
		assert_true(g.run->xen.u.hcall.input == 0x1234567800000011ull);
		assert_int_equal(g.run->xen.u.hcall.params[0], 1);
		assert_true(g.run->xen.u.hcall.params[1] == 0xdeadbeef00000002ull);
		assert_int_equal(g.run->xen.u.hcall.params[2], 3);
		assert_int_equal(g.run->xen.u.hcall.params[3], 0x44);
		assert_int_equal(g.run->xen.u.hcall.params[4], 0x55);
		assert_int_equal(g.run->xen.u.hcall.params[5], 0x66);
		assert_int_equal(guest_get(&g).rip, CODE);
		g.run->xen.u.hcall.result = 0xcafef00dfbfbffffull;
		if (i) { /* The program moves the guest elsewhere: no result. */
			struct kvm_regs r = guest_get(&g);

			r.rip = CODE + 3;
			r.rax = 5;
			assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &r), 0);
		}
		assert_port(&g, DONE);
		assert_true(guest_get(&g).rax == (i ? 5 : 0xcafef00dfbfbffffull));
	}

	/* A second page there is not, and what has no memory cannot be written: #GP. */
	wrmsr_hlt(PARAM + 1);
	assert_int_equal(g.run->exit_reason, KVM_EXIT_SHUTDOWN);
}

static void hypercall_page_absent(void **state)
{
	(void)state;
	guest_long_mode(&g, 0);
	wrmsr_hlt(AWAY);
	assert_int_equal(g.run->exit_reason, KVM_EXIT_SHUTDOWN);
}

/* The program's own pages, by mode; hypercalls are KVM's then. */
static void blobs(void **state)
{
	uint8_t *blob = mmap(NULL, 4 * KL_PAGE_SIZE, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct kvm_xen_hvm_config c = {
		.msr = HCALL_MSR,
		.blob_addr_32 = (uint64_t)blob,
		.blob_addr_64 = (uint64_t)blob + 2 * KL_PAGE_SIZE,
		.blob_size_32 = 1,
		.blob_size_64 = 2,
	};

	(void)state;
	for (unsigned i = 0; i < 4; i++)
		memset(blob + i * KL_PAGE_SIZE, (int)i + 1, KL_PAGE_SIZE);
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_XEN_HVM_CONFIG, &c), 0);
	wrmsr_hlt(PARAM);
	assert_int_equal(g.run->exit_reason, KVM_EXIT_IO);
	assert_int_equal(g.ram[PARAM], 1);
	guest_long_mode(&g, 0);
	wrmsr_hlt(PARAM + 1);
	assert_int_equal(g.run->exit_reason, KVM_EXIT_IO);
	assert_int_equal(g.ram[PARAM + KL_PAGE_SIZE - 1], 4);
	assert_int_equal(xen_call(&g, 17, 0, 0, 0), -1000);
	munmap(blob, 4 * KL_PAGE_SIZE);
	wrmsr_hlt(PARAM + 2);
	assert_int_equal(g.run->exit_reason, KVM_EXIT_SHUTDOWN);
}

/* X1: XENVER_version; what is the program's. */
static void answered(void **state)
{
	(void)state;
	guest_long_mode(&g, 0);
	xen_exit(&g, 17, 0, 0, 0);
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_XEN_VERSION, 0x40011), 0);
	assert_int_equal(xen_call(&g, 17, 0, 0, 0), 0x40011);
	xen_exit(&g, 17, 1, 0, 0);
	assert_int_equal(xen_call(&g, 29, 0, 0, 0), 0); /* SCHEDOP_yield */
	xen_exit(&g, 29, 1, 0, 0);                      /* SCHEDOP_block */
	xen_exit(&g, 15, 1000, 0, 0);                   /* set_timer_op without a port for it */
	xen_exit(&g, 24, 8, 0, PARAM);                  /* VCPUOP_set_singleshot_timer, likewise */
	/* From CPL 3 everything is. */
	guest_long_mode(&g, 3);
	xen_hypercall(&g, 17, 0, 0, 0);
	assert_exit(&g, KVM_EXIT_XEN);
	assert_int_equal(g.run->xen.u.hcall.cpl, 3);
}

/* ---- event channels ----------------------------------------------------------------------- */

static void share(bool wide)
{
	memset(g.ram + SHINFO, 0, 2 * KL_PAGE_SIZE);
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_LONG_MODE, wide), 0);
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_SHARED_INFO, SHINFO >> 12), 0);
	assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, INFO), 0);
}

/* X2, X1: shared_info and vcpu_info in both layouts. */
static void layouts(void **state)
{
	const uint8_t *si = g.ram + SHINFO, *vi = g.ram + INFO;

	(void)state;
	for (unsigned round = 0; round < 4; round++) {
		bool wide = round & 1;
		uint32_t wall[3], word = wide ? 64 : 32;
		struct timespec ts;

		share(wide);
		memcpy(wall, si + WALL(wide), sizeof(wall));
		clock_gettime(CLOCK_REALTIME, &ts);
		assert_true(wall[0] && !(wall[0] & 1));
		assert_in_range(wall[1], ts.tv_sec - 600, ts.tv_sec);
		assert_true(wall[2] < 1000000000);

		assert_int_equal(xen_send(&g, word * 3 + 7, 0), 0);
		assert_true(xen_bit(si + PENDING, word * 3 + 7));
		assert_true(xen_bit(vi + SEL(wide), 3));
		assert_int_equal(vi[0], 1);
		assert_int_equal(xen_send(&g, word * 3 + 7, 0), 0);
		/* A masked one only pends. */
		g.ram[SHINFO + MASK(wide) + word * 5 / 8] = 1;
		assert_int_equal(xen_send(&g, word * 5, 0), 0);
		assert_true(xen_bit(si + PENDING, word * 5));
		assert_false(xen_bit(vi + SEL(wide), 5));
		assert_int_equal(xen_send(&g, wide ? 4095 : 1023, 0), 0);
		assert_true(xen_bit(vi + SEL(wide), wide ? 63 : 31));
		assert_int_equal(xen_send(&g, wide ? 4096 : 1024, 0), -EINVAL);
	}
}

/* X1: KVM_XEN_HVM_EVTCHN_SEND's errors. */
static void send_errors(void **state)
{
	struct kvm_irq_routing_xen_evtchn e = {.port = 5, .vcpu = 0, .priority = 0};

	(void)state;
	assert_int_equal(xen_send(&g, 5, 0), -EINVAL); /* no shared_info */
	share(true);
	assert_int_equal(xen_send(&g, 0, 0), -EINVAL);
	assert_int_equal(xen_send(&g, 5, 1), -EINVAL);
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_XEN_HVM_EVTCHN_SEND, &e), -EINVAL);
	assert_int_equal(dev_ioctl(&g.vm, KVM_XEN_HVM_EVTCHN_SEND, 8), -EFAULT);
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_SHARED_INFO, AWAY >> 12), 0); /* G16 */
	assert_int_equal(xen_send(&g, 5, 0), -EFAULT);
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_SHARED_INFO, INVALID), 0);
	assert_int_equal(xen_send(&g, 5, 0), -EINVAL);
}

/* X1: an event that finds vcpu_info absent is kept and delivered when there is one. */
static void info_absent(void **state)
{
	(void)state;
	share(true);
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, VECTOR), 0);
	assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, INVALID), 0);
	assert_int_equal(xen_send(&g, 66, 0), 0);
	assert_int_equal(xen_send(&g, 3, 0), 0);
	assert_int_equal(g.ram[INFO], 0);
	assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, INFO), 0);
	xen_wait_for_upcall(&g);
	assert_port(&g, UPCALL);
	assert_int_equal(g.ram[INFO], 1);
	assert_int_equal(g.ram[INFO + SEL(true)], 3);
	g.ram[INFO] = 0;
	assert_port(&g, DONE);
}

static void *run_to_upcall(void *arg)
{
	(void)arg;
	assert_port(&g, UPCALL);
	return NULL;
}

/* X1: the same when its memory comes while the vCPU sleeps. */
static void info_comes_late(void **state)
{
	uint8_t *page = mmap(NULL, KL_PAGE_SIZE, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	pthread_t t;

	(void)state;
	share(true);
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, VECTOR), 0);
	assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, AWAY), 0);
	xen_wait_for_upcall(&g);
	assert_int_equal(pthread_create(&t, NULL, run_to_upcall, NULL), 0);
	assert_int_equal(xen_send(&g, 3, 0), 0);
	assert_int_equal(set_slot(&g, 1, 0, AWAY, KL_PAGE_SIZE, page), 0);
	pthread_join(t, NULL);
	assert_int_equal(page[0], 1);
	munmap(page, KL_PAGE_SIZE);
}

/* X1: the VM's vector comes as the PIC's would, as long as the guest leaves the flag set. */
static void upcall_vector(void **state)
{
	(void)state;
	share(false);
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, VECTOR), 0);
	g.ram[INFO] = 1; /* the program's own */
	xen_wait_for_upcall(&g);
	assert_port(&g, UPCALL);
	g.ram[INFO] = 0;
	assert_port(&g, DONE);
	assert_int_equal(xen_send(&g, 1, 0), 0);
	xen_wait_for_upcall(&g);
	assert_port(&g, UPCALL);
	assert_port(&g, UPCALL);
	g.ram[INFO] = 0;
	assert_port(&g, DONE);
}

/* X1: a vCPU's own vector is a message to its APIC: once for an event. */
static void upcall_by_apic(void **state)
{
	struct kvm_lapic_state s;

	(void)state;
	share(true);
	assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR, VECTOR), 0);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_LAPIC, &s), 0);
	s.regs[0xf1] |= 1; /* enabled */
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_LAPIC, &s), 0);
	assert_int_equal(xen_send(&g, 5, 0), 0);
	xen_wait_for_upcall(&g);
	assert_port(&g, UPCALL);
	assert_port(&g, DONE); /* though the flag is set */
	assert_int_equal(g.ram[INFO], 1);

	/* When the APIC is enabled with the flag set, it comes, too. */
	s.regs[0xf1] &= (char)~1;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_LAPIC, &s), 0);
	s.regs[0xf1] |= 1;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_LAPIC, &s), 0);
	xen_wait_for_upcall(&g);
	assert_port(&g, UPCALL);
}

static long route(uint32_t port, uint32_t vcpu, uint32_t prio)
{
	struct {
		struct kvm_irq_routing head;
		struct kvm_irq_routing_entry e;
	} r = {
		.head.nr = 1,
		.e = {.gsi = 40,
		      .type = KVM_IRQ_ROUTING_XEN_EVTCHN,
		      .u.xen_evtchn = {.port = port, .vcpu = vcpu, .priority = prio}},
	};

	return dev_ioctl_p(&g.vm, KVM_SET_GSI_ROUTING, &r);
}

static int line(int level)
{
	struct kvm_irq_level l = {.irq = 40, .level = (uint32_t)level};

	assert_int_equal(dev_ioctl_p(&g.vm, KVM_IRQ_LINE_STATUS, &l), 0);
	return l.status;
}

/* X1: routes to event channels, by line and by irqfd. */
static void routed(void **state)
{
	uint8_t *page = mmap(NULL, KL_PAGE_SIZE, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct kvm_irqfd f = {.fd = (uint32_t)eventfd(0, EFD_NONBLOCK), .gsi = 40};

	(void)state;
	assert_int_equal(route(5, 0, 0), -EINVAL);
	assert_int_equal(route(5000, 9, PRIO), 0);
	share(true);
	assert_int_equal(line(1), -1);
	assert_int_equal(route(70, 0, PRIO), 0);
	assert_int_equal(line(1), 1);
	assert_int_equal(line(0), -1);
	assert_int_equal(line(1), 0);
	assert_true(xen_bit(g.ram + SHINFO + PENDING, 70));

	/* An irqfd's event must not wait for shared_info: the vCPU's thread delivers it. */
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, VECTOR), 0);
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_SHARED_INFO, AWAY >> 12), 0);
	g.ram[INFO] = 0;
	memset(g.ram + INFO + 8, 0, 8);
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_IRQFD, &f), 0);
	eventfd_write((int)f.fd, 1);
	kl_engine_enter();
	kl_irqfd_written();
	kl_engine_leave();
	assert_int_equal(set_slot(&g, 1, 0, AWAY, KL_PAGE_SIZE, page), 0);
	xen_wait_for_upcall(&g);
	assert_port(&g, UPCALL);
	assert_true(xen_bit(page + PENDING, 70));
	f.flags = KVM_IRQFD_FLAG_DEASSIGN;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_IRQFD, &f), 0);
	close((int)f.fd);
	munmap(page, KL_PAGE_SIZE);
}

static long target(uint32_t flags, uint32_t from, uint32_t type, uint32_t port, uint32_t vcpu)
{
	struct kvm_xen_hvm_attr a = {.type = KVM_XEN_ATTR_TYPE_EVTCHN};

	a.u.evtchn.flags = flags;
	a.u.evtchn.send_port = from;
	a.u.evtchn.type = type;
	a.u.evtchn.deliver.port.port = port;
	a.u.evtchn.deliver.port.vcpu = vcpu;
	a.u.evtchn.deliver.port.priority = PRIO;
	return dev_ioctl_p(&g.vm, KVM_XEN_HVM_SET_ATTR, &a);
}

/* X1: EVTCHN: assign, update, deassign, reset, and what the guest sends. */
static void targets(void **state)
{
	struct kvm_xen_hvm_attr a = {.type = KVM_XEN_ATTR_TYPE_EVTCHN};
	int fd = eventfd(0, EFD_NONBLOCK), fds;
	eventfd_t n;

	(void)state;
	share(true);
	guest_long_mode(&g, 0);
	assert_int_equal(target(0, 0, 2, 15, 0), -EINVAL);
	assert_int_equal(target(0, 4096, 2, 15, 0), -EINVAL);
	for (uint32_t type = 0; type < 8; type++) {
		if (type != 2 && type != 5)
			assert_int_equal(target(0, 127, type, 15, 0), -EINVAL);
	}
	assert_int_equal(target(0, 127, 5, 15, 0), -EINVAL); /* an IPI comes where it goes */
	assert_int_equal(target(0, 127, 2, 4096, 0), -EINVAL);
	assert_int_equal(target(8, 127, 2, 15, 0), -EINVAL);
	assert_int_equal(target(KVM_XEN_EVTCHN_UPDATE, 127, 2, 15, 0), -ENOENT);
	assert_int_equal(target(KVM_XEN_EVTCHN_DEASSIGN, 127, 2, 15, 0), -ENOENT);
	assert_int_equal(target(0, 127, 2, 15, 1), 0);
	assert_int_equal(target(0, 127, 2, 15, 1), -EEXIST);
	assert_int_equal(target(KVM_XEN_EVTCHN_UPDATE, 127, 5, 15, 0), -EINVAL);
	assert_int_equal(target(KVM_XEN_EVTCHN_UPDATE, 127, 2, 16, 0), -EINVAL);

	*(uint32_t *)(void *)(g.ram + PARAM) = 127;
	xen_exit(&g, 32, 4, PARAM, 0); /* EVTCHNOP_send: there is no vCPU 1 */
	assert_int_equal(target(KVM_XEN_EVTCHN_UPDATE, 127, 2, 15, 0), 0);
	assert_int_equal(xen_call(&g, 32, 4, PARAM, 0), 0);
	assert_true(xen_bit(g.ram + SHINFO + PENDING, 15));
	assert_int_equal(xen_call(&g, 32, 4, AWAY, 0), -14);
	*(uint32_t *)(void *)(g.ram + PARAM) = 128;
	xen_exit(&g, 32, 4, PARAM, 0);

	fds = count_fds();
	a.u.evtchn.send_port = 128;
	a.u.evtchn.type = 2;
	a.u.evtchn.deliver.eventfd.fd = -1;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_XEN_HVM_SET_ATTR, &a), -EBADF);
	a.u.evtchn.deliver.eventfd.fd = g.kvm.fd;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_XEN_HVM_SET_ATTR, &a), -EINVAL);
	a.u.evtchn.deliver.eventfd.fd = fd;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_XEN_HVM_SET_ATTR, &a), 0);
	assert_int_equal(target(KVM_XEN_EVTCHN_UPDATE, 128, 2, 0, 0), -EINVAL);
	assert_int_equal(xen_call(&g, 32, 4, PARAM, 0), 0);
	assert_int_equal(eventfd_read(fd, &n), 0);
	assert_int_equal(n, 1);
	assert_int_equal(target(KVM_XEN_EVTCHN_DEASSIGN, 128, 0, 0, 0), 0);
	assert_int_equal(target(KVM_XEN_EVTCHN_DEASSIGN, 128, 0, 0, 0), -ENOENT);
	assert_int_equal(count_fds(), fds);
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_XEN_HVM_SET_ATTR, &a), 0);
	assert_int_equal(target(KVM_XEN_EVTCHN_RESET, 0, 0, 0, 0), 0);
	assert_int_equal(count_fds(), fds);
	xen_exit(&g, 32, 4, PARAM, 0);
	close(fd);
}

/* ---- SCHEDOP_poll ------------------------------------------------------------------------- */

static int64_t poll_ports(uint32_t n, uint64_t timeout)
{
	uint64_t *p = (void *)(g.ram + PARAM);

	p[0] = PARAM + 64;
	p[1] = n;
	p[2] = timeout;
	return xen_call(&g, 29, 3, PARAM, 0);
}

static void *poll_thread(void *arg)
{
	(void)arg;
	return (void *)(intptr_t)poll_ports(2, 0);
}

/* X1: what is pending ends it at once, a timeout in time; errors. */
static void poll_ends(void **state)
{
	uint32_t *ports = (void *)(g.ram + PARAM + 64);

	(void)state;
	share(true);
	guest_long_mode(&g, 0);
	ports[0] = 13;
	ports[1] = 200;
	g.ram[SHINFO + PENDING + 200 / 8] = 1;
	assert_int_equal(poll_ports(2, 0), 0);
	assert_int_equal(poll_ports(1, 1000000), 0);
	assert_int_equal(poll_ports(129, 1), -22);
	ports[1] = 4096;
	assert_int_equal(poll_ports(2, 1), -22);
	assert_int_equal(xen_call(&g, 29, 3, AWAY, 0), -14);
	/* It cannot be polled: no waiting. */
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_SHARED_INFO, INVALID), 0);
	assert_int_equal(poll_ports(1, 0), 0);
}

/* X1: a masked event on one of the ports wakes the poller. */
static void poll_wakes(void **state)
{
	uint32_t *ports = (void *)(g.ram + PARAM + 64);
	pthread_t t;
	void *ret;

	(void)state;
	share(true);
	guest_long_mode(&g, 0);
	ports[0] = 13;
	ports[1] = 200;
	memset(g.ram + SHINFO + MASK(true), 0xff, 512);
	assert_int_equal(pthread_create(&t, NULL, poll_thread, NULL), 0);
	assert_int_equal(xen_send(&g, 200, 0), 0);
	pthread_join(t, &ret);
	assert_int_equal((intptr_t)ret, 0);
}

/* X1: the event comes after the poller has looked, and before it sleeps. */
static void poll_lost_wakeup(void **state)
{
	uint32_t *ports = (void *)(g.ram + PARAM + 64);
	pthread_t t;
	void *ret;

	(void)state;
	if (!kl_racepoints_enabled())
		skip();
	share(true);
	guest_long_mode(&g, 0);
	ports[0] = 13;
	ports[1] = 200;
	memset(g.ram + SHINFO + MASK(true), 0xff, 512);
	kl_racepoint_arm("xen-poll", 1);
	assert_int_equal(pthread_create(&t, NULL, poll_thread, NULL), 0);
	assert_true(kl_racepoint_wait("xen-poll", WAIT_MS));
	assert_int_equal(xen_send(&g, 13, 0), 0);
	kl_racepoint_release("xen-poll");
	pthread_join(t, &ret);
	assert_int_equal((intptr_t)ret, 0);
}

/* ---- timers and clocks -------------------------------------------------------------------- */

static uint64_t now(void)
{
	struct kvm_clock_data d;

	assert_int_equal(dev_ioctl_p(&g.vm, KVM_GET_CLOCK, &d), 0);
	return d.clock;
}

static void timer_port(uint64_t expires)
{
	struct kvm_xen_vcpu_attr t = {
		.type = KVM_XEN_VCPU_ATTR_TYPE_TIMER,
		.u.timer = {.port = 9, .priority = PRIO, .expires_ns = expires}};

	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_XEN_VCPU_SET_ATTR, &t), 0);
}

static uint64_t timer_expires(void)
{
	struct kvm_xen_vcpu_attr t = {.type = KVM_XEN_VCPU_ATTR_TYPE_TIMER};

	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_XEN_VCPU_GET_ATTR, &t), 0);
	return t.u.timer.expires_ns;
}

static bool timer_fired(void)
{
	return xen_bit(g.ram + SHINFO + PENDING, 9);
}

/* X1: the one-shot timer, set by program and guest. */
static void timer(void **state)
{
	const uint64_t hour = 3600ull * 1000000000;
	uint64_t later = now() + hour, *p = (void *)(g.ram + PARAM);

	(void)state;
	share(true);
	guest_long_mode(&g, 0);
	timer_port(later);
	assert_true(timer_expires() == later);
	timer_port(1); /* long ago */
	assert_true(timer_fired());
	assert_int_equal(timer_expires(), 0);

	g.ram[SHINFO + PENDING + 1] = 0;
	assert_int_equal(xen_call(&g, 15, later, 0, 0), 0);
	assert_true(timer_expires() == later);
	assert_int_equal(xen_call(&g, 15, 0, 0, 0), 0);
	assert_int_equal(timer_expires(), 0);
	/* As Xen: a time that Linux cannot have meant is soon. */
	assert_int_equal(xen_call(&g, 15, -5ull, 0, 0), 0);
	assert_true(timer_expires() < later);
	p[0] = later + 1;
	assert_int_equal(xen_call(&g, 24, 8, 1, PARAM), -22);
	assert_int_equal(xen_call(&g, 24, 8, 0, AWAY), -14);
	assert_int_equal(xen_call(&g, 24, 8, 0, PARAM), 0);
	g.ram[SHINFO + PENDING + 1] = 0; /* the one before may have fired */
	assert_true(timer_expires() == later + 1);
	assert_int_equal(xen_call(&g, 24, 9, 1, 0), -22);
	assert_int_equal(xen_call(&g, 24, 9, 0, 0), 0);
	assert_int_equal(timer_expires(), 0);
	assert_false(timer_fired());

	/* It fires while the guest polls its port. */
	memset(g.ram + SHINFO + MASK(true), 0xff, 512);
	*(uint32_t *)(void *)(g.ram + PARAM + 64) = 9;
	timer_port(now() + 1000000);
	assert_int_equal(poll_ports(1, 0), 0);
	assert_true(timer_fired());

	/* It fires while shared_info is away: the vCPU's thread delivers it. */
	g.ram[SHINFO + PENDING + 1] = 0;
	assert_int_equal(set_slot(&g, 0, 0, 0, 0, g.ram), 0);
	timer_port(1);
	assert_int_equal(set_slot(&g, 0, 0, 0, RAM, g.ram), 0);
	assert_int_equal(timer_expires(), 0);
	assert_true(timer_fired());
}

/* X1: time in vcpu_info and at its own place, unstable if the program says so. */
static void time_info(void **state)
{
	uint8_t *t[] = {g.ram + INFO + 32, g.ram + TIME};
	uint32_t version;

	(void)state;
	share(true);
	guest_long_mode(&g, 0);
	assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO, TIME), 0);
	assert_int_equal(xen_call(&g, 29, 0, 0, 0), 0);
	for (unsigned i = 0; i < 2; i++) {
		memcpy(&version, t[i], sizeof(version));
		assert_true(version && !(version & 1));
		assert_int_equal(t[i][29] & 1, 1);
	}
	assert_int_equal(xen_config(&g, KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL |
						KVM_XEN_HVM_CONFIG_PVCLOCK_TSC_UNSTABLE),
			 0);
	assert_int_equal(xen_call(&g, 29, 0, 0, 0), 0);
	for (unsigned i = 0; i < 2; i++)
		assert_int_equal(t[i][29] & 1, 0);
}

/* X1: Xen's CPUID leaves tell the TSC's rate and scale, as the clock's page does. */
static void cpuid_leaves(void **state)
{
	struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 e[3];
	} c = {
		.head.nent = 3,
		.e = {{.function = 0x40000100, .eax = 0x40000103},
		      {.function = 0x40000103,
		       .index = 1,
		       .flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX},
		      {.function = 0x40000103,
		       .index = 2,
		       .flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX}},
	};
	uint32_t mul;

	(void)state;
	memcpy(&c.e[0].ebx, "XenVMMXenVMM", 12);
	share(true);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_CPUID2, &c), 0);
	xen_wait_for_upcall(&g);
	memcpy(g.ram + CODE, "\xe6\x80", 2); /* out %al, $DONE */
	assert_port(&g, DONE);
	memset(c.e, 0, sizeof(c.e));
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_CPUID2, &c), 0);
	memcpy(&mul, g.ram + INFO + 32 + 24, sizeof(mul));
	assert_int_equal(c.e[1].ecx, mul);
	assert_int_equal((int8_t)c.e[1].edx, (int8_t)g.ram[INFO + 32 + 28]);
	assert_int_equal(c.e[2].eax, dev_ioctl(&g.vcpu, KVM_GET_TSC_KHZ, 0));
}

/* X4: RUNSTATE_*: values, errors, and what KVM_RUN does. */
static void runstate(void **state)
{
	const uint16_t current = KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT,
		       data = KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA,
		       adjust = KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST;
	const uint64_t hour = 3600ull * 1000000000;
	struct kvm_clock_data clock = {.clock = 2 * hour};
	struct runstate r, kept;
	uint64_t val;

	(void)state;
	guest_long_mode(&g, 0);
	if (!xen_has_runstate(&g)) {
		assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, RUNST),
				 -EOPNOTSUPP);
		assert_int_equal(xen_runstate(&g, current, 0, 0, 0, 0), -EOPNOTSUPP);
		skip();
	}
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_CLOCK, &clock), 0);
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_LONG_MODE, 1), 0);
	assert_int_equal(xen_vcpu_get(&g, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, &val), -ENOENT);
	assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, RUNST), 0);
	assert_int_equal(xen_vcpu_get(&g, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, &val), 0);
	assert_int_equal(val, RUNST);
	assert_int_equal(xen_vcpu_get(&g, adjust, &val), -EINVAL);
	assert_int_equal(xen_runstate(&g, current, 4, 0, 0, 0), -EINVAL);
	assert_int_equal(xen_runstate(&g, data, 4, 0, 0, 0), -EINVAL);
	assert_int_equal(xen_runstate(&g, adjust, 4, 0, 0, 0), -EINVAL);
	assert_int_equal(xen_runstate(&g, data, 0, 5, 2, 2), -EINVAL);
	assert_int_equal(xen_runstate(&g, adjust, 0, 5, 2, 2), -EINVAL);
	assert_int_equal(xen_runstate(&g, data, 0, 4 * hour, 4 * hour, 0), -EINVAL);
	assert_int_equal(xen_runstate(&g, adjust, 0, 4 * hour, 4 * hour, 0), -EINVAL);

	/* Blocked since hour 1, as after a migration; then the vCPU runs. */
	assert_int_equal(xen_runstate(&g, data, 2, hour, hour, 0), 0);
	kept = kept_runstate(&g);
	assert_int_equal(kept.state, 2);
	assert_true(kept.entry == hour && kept.time[0] == hour);
	assert_int_equal(xen_call(&g, 29, 0, 0, 0), 0);
	r = read_runstate(g.ram + RUNST, true);
	assert_int_equal(r.state, 0);
	assert_true(r.time[2] >= hour && r.time[0] == hour);
	assert_true(r.entry == runstate_sum(&r) && r.entry >= 2 * hour);
	/* It is running still between two KVM_RUN, unless the program says otherwise. */
	assert_int_equal(xen_runstate(&g, current, 3, 0, 0, 0), 0);
	r = read_runstate(g.ram + RUNST, true);
	assert_int_equal(r.state, 3);
	assert_true(r.entry == runstate_sum(&r) && r.time[0] >= hour);
	assert_int_equal(xen_vcpu_get(&g, current, &val), 0);
	assert_int_equal(val, 3);
	kept = kept_runstate(&g);
	assert_int_equal(kept.state, r.state);
	assert_true(kept.entry == r.entry);
	assert_memory_equal(kept.time, r.time, sizeof(r.time));
	assert_int_equal(xen_runstate(&g, adjust, ~0ull, 0, -7ull, 7), 0);
	r = read_runstate(g.ram + RUNST, true);
	assert_true(r.time[0] == kept.time[0] - 7 && r.time[1] == kept.time[1] + 7);
	assert_true(r.entry == kept.entry);
	assert_int_equal(xen_vcpu_set(&g, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, INVALID), 0);
	assert_int_equal(xen_vcpu_get(&g, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, &val), -ENOENT);
}

/* In real mode: a hypercall with 32-bit arguments, then OUT to DONE. */
static int32_t narrow_call(uint32_t nr, uint32_t a0, uint32_t a1, uint32_t a2)
{
	const uint8_t code[] = {0x0f, 0x01, kl_host_is_intel() ? 0xc1 : 0xd9, 0xe6, DONE, 0xf4};
	struct kvm_regs r;

	memcpy(g.ram + CODE, code, sizeof(code));
	guest_regs(&g);
	r = guest_get(&g);
	r.rax = 0x5500000000ull | nr; /* the upper halves do not count */
	r.rbx = 0x5500000000ull | a0;
	r.rcx = 0x5500000000ull | a1;
	r.rdx = 0x5500000000ull | a2;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &r), 0);
	assert_port(&g, DONE);
	return (int32_t)guest_get(&g).rax;
}

/* X1, X2: the same by guests that are not in 64-bit mode. */
static void narrow_hypercalls(void **state)
{
	uint64_t later = now() + 3600ull * 1000000000;
	uint32_t *p = (void *)(g.ram + PARAM);

	(void)state;
	share(false);
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_XEN_VERSION, 0x40011), 0);
	assert_int_equal(narrow_call(17, 0, 0, 0), 0x40011);
	assert_int_equal(target(0, 127, 2, 15, 0), 0);
	p[0] = 127;
	assert_int_equal(narrow_call(32, 4, PARAM, 0), 0);
	assert_true(xen_bit(g.ram + SHINFO + PENDING, 15));

	p[0] = PARAM + 64;
	p[1] = 1;
	p[2] = 1000000; /* ns */
	p[3] = 0;
	p[16] = 14;
	assert_int_equal(narrow_call(29, 3, PARAM, 0), 0);
	p[16] = 1024; /* one too many, in this mode */
	assert_int_equal(narrow_call(29, 3, PARAM, 0), -22);

	timer_port(0);
	assert_int_equal(narrow_call(15, (uint32_t)later, (uint32_t)(later >> 32), 0), 0);
	assert_true(timer_expires() == later);
	memcpy(p, &(uint64_t){later + 5}, 8);
	assert_int_equal(narrow_call(24, 8, 0, PARAM), 0);
	assert_true(timer_expires() == later + 5);
	/* The program gets 32 bits of each, too. */
	assert_int_equal(xen_set(&g, KVM_XEN_ATTR_TYPE_XEN_VERSION, 0), 0);
	memcpy(g.ram + CODE, kl_host_is_intel() ? "\x0f\x01\xc1" : "\x0f\x01\xd9", 3);
	guest_regs(&g);
	{
		struct kvm_regs r = guest_get(&g);

		r.rax = 0x5500000011ull;
		r.rbx = 0x5500000001ull;
		r.rbp = 0x5500000006ull;
		assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &r), 0);
	}
	assert_exit(&g, KVM_EXIT_XEN);
	assert_int_equal(g.run->xen.u.hcall.longmode, 0);
	assert_int_equal(g.run->xen.u.hcall.input, 17);
	assert_int_equal(g.run->xen.u.hcall.params[0], 1);
	assert_int_equal(g.run->xen.u.hcall.params[5], 6);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(config, setup, teardown),
		cmocka_unit_test_setup_teardown(vm_attributes, setup, teardown),
		cmocka_unit_test_setup_teardown(vcpu_attributes, setup, teardown),
		cmocka_unit_test_setup_teardown(hypercall_page, setup, teardown),
		cmocka_unit_test_setup_teardown(hypercall_page_absent, setup, teardown),
		cmocka_unit_test_setup_teardown(blobs, setup, teardown),
		cmocka_unit_test_setup_teardown(answered, setup, teardown),
		cmocka_unit_test_setup_teardown(layouts, setup, teardown),
		cmocka_unit_test_setup_teardown(send_errors, setup, teardown),
		cmocka_unit_test_setup_teardown(info_absent, setup, teardown),
		cmocka_unit_test_setup_teardown(info_comes_late, setup, teardown),
		cmocka_unit_test_setup_teardown(upcall_vector, setup, teardown),
		cmocka_unit_test_setup_teardown(upcall_by_apic, setup, teardown),
		cmocka_unit_test_setup_teardown(routed, setup, teardown),
		cmocka_unit_test_setup_teardown(targets, setup, teardown),
		cmocka_unit_test_setup_teardown(poll_ends, setup, teardown),
		cmocka_unit_test_setup_teardown(poll_wakes, setup, teardown),
		cmocka_unit_test_setup_teardown(poll_lost_wakeup, setup, teardown),
		cmocka_unit_test_setup_teardown(timer, setup, teardown),
		cmocka_unit_test_setup_teardown(time_info, setup, teardown),
		cmocka_unit_test_setup_teardown(cpuid_leaves, setup, teardown),
		cmocka_unit_test_setup_teardown(runstate, setup, teardown),
		cmocka_unit_test_setup_teardown(narrow_hypercalls, setup, teardown),
	};

	cmocka_set_test_filter(getenv("KVMLET_TEST"));
	return cmocka_run_group_tests(tests, NULL, NULL);
}
