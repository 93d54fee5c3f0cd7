/* SPDX-License-Identifier: MIT */
/*
 * Asynchronous page faults (X3): a guest that knows them goes on while the program brings a page by
 * userfaultfd. With KVMLET_TEST_REAL=1 on the real /dev/kvm.
 */
#include "uapi_guest.h"

#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sys/syscall.h>

#include "base/failpoint.h"
#include "base/racepoint.h"
#include "host/await.h"
#include "host/uffd.h"

#define WAIT_MS 20000

/*
 * Who waits for a page that nobody brings: /dev/kvm's worker, whose end KVM waits for without being
 * interruptible itself; and under ThreadSanitizer, whose runtime holds signals back.
 */
#define CANT_INTERRUPT (on_real_kvm() || KL_TSAN)

#define APF_EN  0x4b564d02u
#define APF_INT 0x4b564d06u
#define APF_ACK 0x4b564d07u
#define ENABLED 1u
#define ALWAYS  2u /* at CPL 0, too */
#define VMEXIT  4u
#define BY_INT  8u
#define ALL     (ENABLED | ALWAYS | BY_INT)

#define AREA_AT    0x20000000u /* slot 2 */
#define IDT        0x9000u
#define TSS        0xc000u
#define APIC_TABLE 0xb000u
#define PF_HANDLER 0xa000u
#define HANDLER    0xa100u
#define VECTOR     0x41u
#define IST_STACKS 0x7000u
#define SLOT       0x400000u
#define PAGES      64u

#define IF   0x202u
#define CLI  0x002u
#define IOPL 0x3000u /* for OUT and STI at CPL 3 */

/* Ports that the guest's code writes to. */
enum { LOADED = 0x10, NOT_PRESENT = 0x21, READY = 0x22 };

static struct guest g;
static uint32_t *area;
static uint8_t *pages;
static int uffd;
static unsigned next_page; /* that no test has touched */
static unsigned load_cpl;

/* To CPL 0, on a stack of its own. */
static void set_gate(unsigned vector, uint64_t to, unsigned ist)
{
	uint64_t *gate = (uint64_t *)(void *)(g.ram + IDT) + 2 * vector;

	gate[0] =
		(to & 0xffff) | 0x18ull << 16 | (0x8e00ull | ist) << 32 | (to >> 16 & 0xffff) << 48;
	gate[1] = to >> 32;
}

static long get_msr(uint32_t index, uint64_t *data)
{
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry e;
	} m = {.head.nmsrs = 1, .e = {.index = index}};
	long r = dev_ioctl_p(&g.vcpu, KVM_GET_MSRS, &m);

	*data = m.e.data;
	return r;
}

/* cr2 to NOT_PRESENT; flags = 0; sti; hlt until the interrupt; cli; iretq */
static const uint8_t pf_handler[] = {
	0x50, 0x0f, 0x20, 0xd0, 0xe7, NOT_PRESENT,                           /* push, mov, out */
	0xc7, 0x04, 0x25, 0,    0,    0,           0x20, 0,    0,    0,   0, /* movl $0, AREA_AT */
	0x58, 0x48, 0x83, 0xc4, 8,    0xfb,        0xf4, 0xfa, 0x48, 0xcf    /* ... */
};

/* token to READY; token = 0; wrmsr APF_ACK, 1; EOI; iretq */
static const uint8_t irq_handler[] = {
	0x50, 0x51, 0x52, 0x8b, 0x04, 0x25, 4,    0,    0, 0x20, 0xe7, READY, 0xc7,
	0x04, 0x25, 4,    0,    0,    0x20, 0,    0,    0, 0, /* movl $0, AREA_AT+4 */
	0xb9, 7,    0x4d, 0x56, 0x4b, 0xb8, 1,    0,    0, 0,    0x31, 0xd2,  0x0f,
	0x30, 0xb8, 0xb0, 0x00, 0xe0, 0xfe, 0xc7, 0x00, 0, 0,    0,    0, /* movl $0, 0xfee000b0 */
	0x5a, 0x59, 0x58, 0x48, 0xcf};

/* Segments of @cpl, code of the handlers, and their stacks. */
static void segments(unsigned cpl)
{
	uint64_t *gdt = (uint64_t *)(void *)(g.ram + IDT - 0x100), dpl = (uint64_t)cpl << 45;
	uint64_t ist[2] = {IST_STACKS, IST_STACKS - 0x800};
	struct kvm_sregs s;

	gdt[1] = 0x00af9b000000ffff | dpl;
	gdt[2] = 0x00cf93000000ffff | dpl;
	gdt[3] = 0x00af9b000000ffff;
	memcpy(g.ram + TSS + 0x24, ist, sizeof(ist));
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_SREGS, &s), 0);
	s.idt.base = IDT;
	s.idt.limit = 0xfff;
	s.gdt.base = IDT - 0x100;
	s.gdt.limit = 63;
	s.tr = (struct kvm_segment){
		.base = TSS, .limit = 0x67, .selector = 0x20, .type = 11, .present = 1};
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_SREGS, &s), 0);
}

static void at_cpl(unsigned cpl)
{
	guest_long_mode(&g, cpl);
	guest_table(&g, TABLES + 0x1000)[3] = APIC_TABLE | 7;
	guest_table(&g, APIC_TABLE)[0xfee00000u >> 21 & 511] = 0xfee00000u | 0x87;
	segments(cpl);
}

static int setup(void **state)
{
	struct kvm_lapic_state lapic;
	struct uffdio_api api = {.api = UFFD_API};
	struct uffdio_register r = {.mode = UFFDIO_REGISTER_MODE_MISSING};

	(void)state;
	uffd = (int)syscall(SYS_userfaultfd,
			    O_CLOEXEC | O_NONBLOCK | (on_real_kvm() ? 0 : UFFD_USER_MODE_ONLY));
	if (uffd < 0)
		return 0;
	guest_make(&g, true);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_LAPIC, &lapic), 0);
	lapic.regs[0xf1] |= 1;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_LAPIC, &lapic), 0);
	memcpy(g.ram + PF_HANDLER, pf_handler, sizeof(pf_handler));
	memcpy(g.ram + HANDLER, irq_handler, sizeof(irq_handler));
	set_gate(14, PF_HANDLER, 1);
	set_gate(VECTOR, HANDLER, 2);

	area = mmap(NULL, KL_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	pages = mmap(NULL, PAGES * KL_PAGE_SIZE, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	assert_true(area != MAP_FAILED && pages != MAP_FAILED);
	assert_int_equal(set_slot(&g, 2, 0, AREA_AT, KL_PAGE_SIZE, area), 0);
	assert_int_equal(set_slot(&g, 1, 0, SLOT, PAGES * KL_PAGE_SIZE, pages), 0);
	r.range.start = (uint64_t)pages;
	r.range.len = PAGES * KL_PAGE_SIZE;
	assert_int_equal(ioctl(uffd, UFFDIO_API, &api), 0);
	assert_int_equal(ioctl(uffd, UFFDIO_REGISTER, &r), 0);
	kl_uffd_add(r.range.start, r.range.start + r.range.len);
	next_page = 0;
	load_cpl = on_real_kvm() ? 3 : 0; /* some software KVMs have none at CPL 0 */
	return 0;
}

static int teardown(void **state)
{
	(void)state;
	if (uffd < 0)
		return 0;
	guest_free(&g);
	close(uffd);
	kl_uffd_remove((uint64_t)pages, (uint64_t)pages + PAGES * KL_PAGE_SIZE);
	munmap(pages, PAGES * KL_PAGE_SIZE);
	munmap(area, KL_PAGE_SIZE);
	return 0;
}

/* A page of @byte there. */
static void bring(unsigned page, uint8_t byte)
{
	static uint8_t from[KL_PAGE_SIZE] __attribute__((aligned(KL_PAGE_SIZE)));
	struct uffdio_copy c = {.dst = (uint64_t)pages + page * KL_PAGE_SIZE,
				.src = (uint64_t)from,
				.len = KL_PAGE_SIZE};

	memset(from, byte, sizeof(from));
	assert_int_equal(ioctl(uffd, UFFDIO_COPY, &c), 0);
}

/* Wait until somebody waits for a page; which. */
static unsigned asked_for(void)
{
	struct pollfd p = {.fd = uffd, .events = POLLIN};
	struct uffd_msg msg;

	assert_int_equal(poll(&p, 1, -1), 1);
	assert_int_equal(read(uffd, &msg, sizeof(msg)), sizeof(msg));
	assert_int_equal(msg.event, UFFD_EVENT_PAGEFAULT);
	return (unsigned)((msg.arg.pagefault.address - (uint64_t)pages) / KL_PAGE_SIZE);
}

static void *bring_next(void *arg)
{
	(void)arg;
	bring(asked_for(), 0x5a);
	return NULL;
}

static unsigned run_to_port(uint32_t *data)
{
	assert_exit(&g, KVM_EXIT_IO);
	*data = 0;
	memcpy(data, (uint8_t *)g.run + g.run->io.data_offset, g.run->io.size);
	return g.run->io.port;
}

/* @code, then mov (%rbx), %al; out %al, $LOADED, of a page. */
static void begin_load(unsigned page, uint64_t rflags, const void *code, unsigned len)
{
	struct kvm_regs r = {
		.rip = CODE, .rsp = STACK, .rflags = rflags, .rbx = SLOT + page * KL_PAGE_SIZE};

	at_cpl(load_cpl);
	if (len)
		memcpy(g.ram + CODE, code, len);
	memcpy(g.ram + CODE + len, (const uint8_t[]){0x8a, 0x03, 0xe6, LOADED, 0xf4}, 5);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &r), 0);
}

/* The guest gets #PF for a new page, and stands in its handler. Returns the token. */
static uint32_t fault(void)
{
	uint32_t token;

	area[0] = 0;
	begin_load(next_page++, IF, NULL, 0);
	assert_int_equal(run_to_port(&token), NOT_PRESENT);
	assert_int_equal(area[0], 1);
	return token;
}

/* A load from a new page, which comes as soon as it is asked for. True: by #PF and a token. */
static bool load(uint64_t rflags, const void *code, unsigned len)
{
	uint32_t token, ready;
	unsigned port;
	pthread_t t;

	begin_load(next_page++, rflags, code, len);
	pthread_create(&t, NULL, bring_next, NULL);
	port = run_to_port(&token);
	if (port == NOT_PRESENT) {
		assert_int_equal(area[0], 1);
		assert_int_equal(run_to_port(&ready), READY);
		assert_int_equal(ready, token);
		assert_int_equal(run_to_port(&ready), LOADED);
		assert_int_equal(ready, 0x5a);
		assert_int_equal(area[1], 0);
	} else {
		assert_int_equal(port, LOADED);
		assert_int_equal(token, 0x5a);
		assert_int_equal(area[0], 0);
	}
	pthread_join(t, NULL);
	return port == NOT_PRESENT;
}

/* The guest waits for an interrupt, then writes to LOADED. */
static void idle(void)
{
	struct kvm_regs r = {.rip = CODE, .rsp = STACK, .rflags = CLI};

	at_cpl(0);
	memcpy(g.ram + CODE, (const uint8_t[]){0xfb, 0xf4, 0xe6, LOADED, 0xf4}, 5); /* sti; hlt */
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &r), 0);
}

/* With interrupts on, the guest has none to take. */
static void nothing_to_take(void)
{
	struct kvm_regs r = {.rip = CODE, .rsp = STACK, .rflags = IF};
	uint32_t data;

	at_cpl(0);
	memcpy(g.ram + CODE, (const uint8_t[]){0x90, 0x90, 0xe6, LOADED, 0xf4}, 5);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &r), 0);
	assert_int_equal(run_to_port(&data), LOADED);
}

/* In HLT, the guest is told of a page; it acknowledges. */
static uint32_t idle_until_ready(void)
{
	uint32_t token, data;

	idle();
	assert_int_equal(run_to_port(&token), READY);
	assert_int_equal(area[1], token);
	assert_int_equal(run_to_port(&data), LOADED);
	assert_int_equal(area[1], 0);
	return token;
}

/* The guest is told at once that whatever it waits for may have come. */
static void enable(uint64_t bits)
{
	assert_int_equal(guest_set_msr(&g, APF_INT, VECTOR), 1);
	assert_int_equal(guest_set_msr(&g, APF_EN, AREA_AT | bits), 1);
	if ((bits & ENABLED) && (bits & BY_INT))
		assert_int_equal(idle_until_ready(), ~0u);
}

/* X3: what the MSRs take. */
static void msrs(void **state)
{
	uint64_t data;

	(void)state;
	if (uffd < 0)
		skip();
	assert_int_equal(dev_ioctl(&g.vm, KVM_CHECK_EXTENSION, KVM_CAP_ASYNC_PF), 1);
	assert_int_equal(dev_ioctl(&g.vm, KVM_CHECK_EXTENSION, KVM_CAP_ASYNC_PF_INT), 1);
	for (unsigned bit = 4; bit < 6; bit++)
		assert_int_equal(guest_set_msr(&g, APF_EN, AREA_AT | 1u << bit), 0);
	assert_int_equal(guest_set_msr(&g, APF_EN, 0x30000000 | ALL), 0); /* no slot */
	assert_int_equal(guest_set_msr(&g, APF_EN, 0x30000000 | ENABLED), 1);
	assert_int_equal(guest_set_msr(&g, APF_EN, AREA_AT | ALL), 1);
	assert_int_equal(get_msr(APF_EN, &data), 1);
	assert_int_equal(data, AREA_AT | ALL);
	assert_int_equal(guest_set_msr(&g, APF_INT, 0x100), 0);
	assert_int_equal(guest_set_msr(&g, APF_INT, 0xff), 1);
	assert_int_equal(get_msr(APF_INT, &data), 1);
	assert_int_equal(data, 0xff);
	assert_int_equal(guest_set_msr(&g, APF_ACK, ~0ull), 1);
	assert_int_equal(get_msr(APF_ACK, &data), 1);
	assert_int_equal(data, 0);
}

/* X3: KVM_CAP_ENFORCE_PV_FEATURE_CPUID; and VMs without a local APIC. */
static void unavailable(void **state)
{
	struct kvm_enable_cap cap = {.cap = KVM_CAP_ENFORCE_PV_FEATURE_CPUID, .args = {1}};
	struct guest other;

	(void)state;
	if (uffd < 0)
		skip();
	assert_int_equal(guest_set_msr(&g, APF_EN, AREA_AT | ALL | VMEXIT), 1);
	assert_int_equal(guest_set_msr(&g, APF_EN, 0), 1);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_ENABLE_CAP, &cap), 0);
	for (uint32_t msr = APF_INT; msr <= APF_ACK; msr++)
		assert_int_equal(guest_set_msr(&g, msr, 1), 0);
	assert_int_equal(guest_set_msr(&g, APF_EN, AREA_AT | ALL), 0);

	other = g;
	guest_make(&g, false);
	assert_int_equal(guest_set_msr(&g, APF_EN, 0), 1);
	assert_int_equal(guest_set_msr(&g, APF_EN, ENABLED), 0);
	assert_int_equal(guest_set_msr(&g, APF_INT, VECTOR), 0);
	guest_free(&g);
	g = other;
}

/* X3: the guest is in HLT while the page comes, and goes on when it has. */
static void page_comes(void **state)
{
	(void)state;
	if (uffd < 0)
		skip();
	enable(ALL);
	for (unsigned i = 0; i < 3; i++)
		assert_true(load(IF, NULL, 0));
	nothing_to_take();
}

/* X3: a guest that could not take an interrupt now waits, as without the feature. */
static void who_can_take_it(void **state)
{
	(void)state;
	if (uffd < 0)
		skip();
	assert_false(load(IF, NULL, 0));
	enable(ENABLED | ALWAYS); /* page ready by #PF: not any more */
	assert_false(load(IF, NULL, 0));
	enable(ALL);
	assert_false(load(CLI, NULL, 0));
	assert_false(load(CLI, (const uint8_t[]){0xfb}, 1)); /* sti */
	/* mov %ss, %eax; mov %eax, %ss */
	assert_false(load(IF, (const uint8_t[]){0x8c, 0xd0, 0x8e, 0xd0}, 4));
	assert_true(load(CLI, (const uint8_t[]){0xfb, 0x90}, 2));
	assert_true(load(IF, NULL, 0));
}

/* X3: without SEND_ALWAYS it is for CPL 3 alone. */
static void for_user_mode(void **state)
{
	(void)state;
	if (uffd < 0)
		skip();
	enable(ENABLED | BY_INT);
	load_cpl = 0;
	assert_false(load(IF, NULL, 0));
	load_cpl = 3;
	assert_true(load(IF, NULL, 0));
}

/* X3, B26: the area's slot is gone, and comes back. */
static void area_goes(void **state)
{
	(void)state;
	if (uffd < 0)
		skip();
	enable(ALL);
	assert_int_equal(set_slot(&g, 2, 0, AREA_AT, 0, area), 0);
	assert_false(load(IF, NULL, 0));
	assert_int_equal(set_slot(&g, 2, 0, AREA_AT, KL_PAGE_SIZE, area), 0);
	assert_true(load(IF, NULL, 0));
}

/* X3: memory that nobody has to bring is not waited for. */
static void first_touch(void **state)
{
	struct uffdio_range range = {(uint64_t)pages, KL_PAGE_SIZE};
	uint32_t data;

	(void)state;
	if (uffd < 0)
		skip();
	enable(ALL);
	assert_int_equal(ioctl(uffd, UFFDIO_UNREGISTER, &range), 0);
	kl_uffd_remove(range.start, range.start + range.len);
	begin_load(0, IF, NULL, 0);
	assert_int_equal(run_to_port(&data), LOADED);
	assert_int_equal(data, 0);
}

/* X3: tokens are told in the order in which the pages came, one at a time. */
static void one_at_a_time(void **state)
{
	uint32_t first, second, data;

	(void)state;
	if (uffd < 0 || (!on_real_kvm() && !kl_racepoints_enabled()))
		skip();
	enable(ALL);
	first = fault();
	second = fault();
	assert_int_not_equal(first, second);
	kl_racepoint_arm("apf-page-came", 2);
	bring(1, 1);
	assert_true(on_real_kvm() || kl_racepoint_wait("apf-page-came", WAIT_MS));
	bring(0, 1);
	assert_true(on_real_kvm() || kl_racepoint_wait_for("apf-page-came", 2, WAIT_MS));
	kl_racepoint_release("apf-page-came");
	/* The acknowledgement of one has the other told. */
	idle();
	assert_int_equal(run_to_port(&data), READY);
	assert_int_equal(data, second);
	assert_int_equal(run_to_port(&data), READY);
	assert_int_equal(data, first);
	assert_int_equal(run_to_port(&data), LOADED);
	nothing_to_take();
}

/* X3: the guest is told when its APIC is on again. */
static void apic_is_off(void **state)
{
	struct kvm_lapic_state lapic;
	uint32_t token;

	(void)state;
	if (uffd < 0 || on_real_kvm()) /* which tells at the next acknowledgement only */
		skip();
	enable(ALL);
	token = fault();
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_LAPIC, &lapic), 0);
	lapic.regs[0xf1] &= ~1;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_LAPIC, &lapic), 0);
	bring(0, 1);
	nothing_to_take();
	assert_int_equal(area[1], 0);
	lapic.regs[0xf1] |= 1;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_LAPIC, &lapic), 0);
	assert_int_equal(idle_until_ready(), token);
}

/* X3: who disables it hears no more of what was under way. */
static void disabled(void **state)
{
	(void)state;
	if (uffd < 0 || CANT_INTERRUPT)
		skip();
	enable(ALL);
	for (unsigned i = 0; i < 3; i++)
		fault();
	assert_int_equal(guest_set_msr(&g, APF_EN, 0), 1);
	for (unsigned i = 0; i < 3; i++)
		bring(i, 1);
	enable(ALL);
	nothing_to_take();
	assert_true(load(IF, NULL, 0));
}

/* X3: INIT does; and the MSRs are 0. */
static void init(void **state)
{
	struct kvm_msi msi = {.address_lo = 0xfee00000, .data = 5 << 8};
	uint64_t data;

	(void)state;
	if (uffd < 0 || CANT_INTERRUPT)
		skip();
	enable(ALL);
	fault();
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SIGNAL_MSI, &msi), 1);
	(void)guest_run(&g); /* at the reset vector there is nothing */
	assert_int_equal(get_msr(APF_EN, &data), 1);
	assert_int_equal(data, 0);
	assert_int_equal(get_msr(APF_INT, &data), 1);
	assert_int_equal(data, 0);
}

/* X3: a vCPU goes while pages are waited for, which nobody will ever bring. */
static void vcpu_goes(void **state)
{
	(void)state;
	if (uffd < 0 || CANT_INTERRUPT)
		skip();
	enable(ALL);
	fault();
	fault();
}

static void *disable(void *arg)
{
	(void)arg;
	assert_int_equal(guest_set_msr(&g, APF_EN, 0), 1);
	return NULL;
}

/* X3, M6: cancelled before the helper touches the page: it never does. */
static void cancelled_first(void **state)
{
	struct pollfd p = {.fd = uffd, .events = POLLIN};
	pthread_t t;

	(void)state;
	if (uffd < 0 || !kl_racepoints_enabled() || on_real_kvm())
		skip();
	enable(ALL);
	kl_racepoint_arm("await-touch", 1);
	fault();
	assert_true(kl_racepoint_wait("await-touch", WAIT_MS));
	kl_racepoint_arm("await-cancel-waits", 1);
	pthread_create(&t, NULL, disable, NULL);
	assert_true(kl_racepoint_wait("await-cancel-waits", WAIT_MS));
	kl_racepoint_release("await-touch");
	kl_racepoint_release("await-cancel-waits");
	pthread_join(t, NULL);
	assert_int_equal(poll(&p, 1, 0), 0);
}

static void *bring_when_asked_twice(void *arg)
{
	(void)arg;
	assert_int_equal(asked_for(), 0);
	assert_int_equal(asked_for(), 0);
	bring(0, 1);
	return NULL;
}

/* X3: a page that is waited for already: the vCPU waits, too. */
static void same_page(void **state)
{
	uint32_t token, data;
	unsigned port;
	pthread_t t;

	(void)state;
	if (uffd < 0 || on_real_kvm())
		skip();
	enable(ALL);
	token = fault();
	area[0] = 0;
	pthread_create(&t, NULL, bring_when_asked_twice, NULL);
	begin_load(0, IF, NULL, 0);
	port = run_to_port(&data);
	if (port == READY) {
		assert_int_equal(data, token);
		port = run_to_port(&data);
	} else {
		assert_int_equal(port, LOADED);
		assert_int_equal(idle_until_ready(), token);
	}
	assert_int_equal(area[0], 0);
	pthread_join(t, NULL);
}

static void *bring_last(void *arg)
{
	(void)arg;
	while (asked_for() != KL_MAX_AWAITED)
		;
	bring(KL_MAX_AWAITED, 0x5a);
	return NULL;
}

/* X3: nothing waits behind pages that nobody brings. */
static void all_helpers_busy(void **state)
{
	uint32_t data;
	pthread_t t;

	(void)state;
	if (uffd < 0 || CANT_INTERRUPT)
		skip();
	enable(ALL);
	for (unsigned i = 0; i < KL_MAX_AWAITED; i++)
		fault();
	area[0] = 0;
	pthread_create(&t, NULL, bring_last, NULL);
	begin_load(next_page++, IF, NULL, 0);
	assert_int_equal(run_to_port(&data), LOADED);
	assert_int_equal(data, 0x5a);
	assert_int_equal(area[0], 0);
	pthread_join(t, NULL);
	/* One has come. The others are given up with the vCPU. */
	bring(3, 1);
	idle_until_ready();
}

/* X3: no thread is to be had. */
static void no_helper(void **state)
{
	(void)state;
	if (uffd < 0 || !kl_failpoints_enabled() || on_real_kvm())
		skip();
	enable(ALL);
	kl_failpoint_arm("await-thread", 1);
	assert_false(load(IF, NULL, 0));
	assert_true(kl_failpoint_disarm("await-thread"));
	assert_true(load(IF, NULL, 0));
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(msrs),
		T(unavailable),
		T(page_comes),
		T(who_can_take_it),
		T(for_user_mode),
		T(area_goes),
		T(first_touch),
		T(one_at_a_time),
		T(apic_is_off),
		T(disabled),
		T(init),
		T(vcpu_goes),
		T(cancelled_first),
		T(same_page),
		T(all_helpers_busy),
		T(no_helper),
	};

	cmocka_set_test_filter(getenv("KVMLET_TEST"));
	return cmocka_run_group_tests(tests, NULL, NULL);
}
