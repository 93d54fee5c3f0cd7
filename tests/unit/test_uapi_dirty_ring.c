/* SPDX-License-Identifier: MIT */
/*
 * Dirty rings through the ioctls (D2, U4): what is refused, what is mapped, exits of a full ring.
 * What gets into a ring is in uapi_dirty. With KVMLET_TEST_REAL=1 on the real /dev/kvm, as far as
 * it goes.
 */
#include <unistd.h>

#include "uapi_guest.h"
#include "uapi/abi.h"

#define PAGE        KL_PAGE_SIZE
#define SLOT_1      1
#define SLOT        0x200000ul
#define PAGES       1024u
#define ENTRIES     1024u
#define BYTES       (ENTRIES * sizeof(struct kvm_dirty_gfn))
#define RING_OFFSET (KVM_DIRTY_LOG_PAGE_OFFSET * PAGE)

static struct guest g;
static uint8_t *mem;
static struct kvm_dirty_gfn *ring;
static uint32_t next;

static long enable(uint32_t what, uint64_t arg)
{
	struct kvm_enable_cap cap = {.cap = what, .args = {arg}};

	return dev_ioctl_p(&g.vm, KVM_ENABLE_CAP, &cap);
}

static long cap_of(uint32_t what)
{
	return dev_ioctl(&g.vm, KVM_CHECK_EXTENSION, what);
}

static int setup_vm(void **state)
{
	(void)state;
	guest_make_vm(&g);
	mem = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	return mem == MAP_FAILED;
}

static int teardown_vm(void **state)
{
	(void)state;
	guest_free(&g);
	return munmap(mem, PAGES * PAGE);
}

static int setup(void **state)
{
	if (setup_vm(state) || enable(KVM_CAP_DIRTY_LOG_RING, BYTES))
		return -1;
	guest_make_rest(&g);
	next = 0;
	ring = map_vcpu(&g.vcpu, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, RING_OFFSET);
	return ring == MAP_FAILED ||
	       set_slot(&g, SLOT_1, KVM_MEM_LOG_DIRTY_PAGES, SLOT, PAGES * PAGE, mem);
}

static int teardown(void **state)
{
	munmap(ring, BYTES);
	return teardown_vm(state);
}

/* Entries that are new; they are marked as collected. */
static unsigned collect(void)
{
	unsigned n = 0;

	for (;; n++, next++) {
		struct kvm_dirty_gfn *e = &ring[next % ENTRIES];

		if (__atomic_load_n(&e->flags, __ATOMIC_ACQUIRE) != KVM_DIRTY_GFN_F_DIRTY)
			return n;
		__atomic_store_n(&e->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
	}
}

/* D2: what is refused, and with which errno. */
static void errors(void **state)
{
	struct kvm_enable_cap flags = {.cap = KVM_CAP_DIRTY_LOG_RING, .flags = 1, .args = {BYTES}};

	(void)state;
	assert_int_equal(cap_of(KVM_CAP_DIRTY_LOG_RING), 1 << 20);
	assert_int_equal(cap_of(KVM_CAP_DIRTY_LOG_RING_ACQ_REL), 1 << 20);
	if (!on_real_kvm())
		assert_int_equal(cap_of(KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP), 1);
	assert_int_equal(dev_ioctl(&g.vm, KVM_RESET_DIRTY_RINGS, 0), -EINVAL);
	assert_int_equal(enable(KVM_CAP_DIRTY_LOG_RING, 0), -EINVAL);
	assert_int_equal(enable(KVM_CAP_DIRTY_LOG_RING, BYTES + 1), -EINVAL);
	assert_int_equal(enable(KVM_CAP_DIRTY_LOG_RING, 2048), -EINVAL);
	assert_int_equal(enable(KVM_CAP_DIRTY_LOG_RING, 2 << 20), -E2BIG);
	assert_int_equal(enable(KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP, 0), -EINVAL);
	guest_make_rest(&g);
	assert_int_equal(enable(KVM_CAP_DIRTY_LOG_RING, BYTES), -EINVAL); /* there is a vCPU */
	dev_close(&g.vcpu);
	dev_close(&g.vm);
	g.vm = make_vm(&g.kvm);
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_ENABLE_CAP, &flags), 0);
	flags.cap = KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_ENABLE_CAP, &flags), -EINVAL);
	g.vcpu = make_vcpu(&g.vm, 0);
}

/* D2: and once there are rings. */
static void errors_of_rings(void **state)
{
	uint64_t bits[PAGES / 64];
	struct kvm_dirty_log log = {.slot = SLOT_1, .dirty_bitmap = bits};
	struct kvm_clear_dirty_log clear = {
		.slot = SLOT_1, .num_pages = PAGES, .dirty_bitmap = bits};

	(void)state;
	assert_int_equal(enable(KVM_CAP_DIRTY_LOG_RING, BYTES), -EINVAL);
	assert_int_equal(enable(KVM_CAP_DIRTY_LOG_RING_ACQ_REL, BYTES), -EINVAL);
	assert_int_equal(enable(KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP, 0), -EINVAL); /* slots */
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_GET_DIRTY_LOG, &log), -ENXIO);
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_CLEAR_DIRTY_LOG, &clear), -ENXIO);
	log.slot = 0xffff;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_GET_DIRTY_LOG, &log), -ENXIO);
	assert_int_equal(dev_ioctl(&g.vm, KVM_RESET_DIRTY_RINGS, 0), 0);
}

/* Is there memory at @p? Asks the kernel, so that no signal comes. */
static bool is_there(const char *p)
{
	int fd[2];
	bool yes;

	assert_int_equal(pipe(fd), 0);
	yes = write(fd[1], p, 1) == 1;
	close(fd[0]);
	close(fd[1]);
	return yes;
}

/* D2, U4: where the ring is mapped, how, and what lies around it. */
static void mapping(void **state)
{
	const size_t all = RING_OFFSET + BYTES + PAGE;
	const int rw = PROT_READ | PROT_WRITE;
	char *p;

	(void)state;
	assert_ptr_equal(map_vcpu(&g.vcpu, BYTES, rw, MAP_PRIVATE, RING_OFFSET), MAP_FAILED);
	assert_int_equal(errno, EINVAL);
	assert_ptr_equal(
		map_vcpu(&g.vcpu, PAGE, PROT_READ, MAP_PRIVATE, RING_OFFSET + BYTES - PAGE),
		MAP_FAILED);
	/* Its last page is the ring's first. */
	assert_ptr_equal(map_vcpu(&g.vcpu, RING_OFFSET + 1, PROT_READ, MAP_PRIVATE, 0), MAP_FAILED);
	assert_ptr_equal(map_vcpu(&g.vcpu, PAGE, PROT_READ | PROT_EXEC, MAP_SHARED, RING_OFFSET),
			 MAP_FAILED);
	/* Neither end is in the ring: as KVM, which looks at the ends. */
	p = map_vcpu(&g.vcpu, all, PROT_READ, MAP_PRIVATE, 0);
	assert_true(p != MAP_FAILED);
	munmap(p, all);

	p = map_vcpu(&g.vcpu, all, rw, MAP_SHARED, 0);
	assert_true(p != MAP_FAILED);
	for (unsigned page = 0; page < all / PAGE; page++) {
		bool is_ring = page >= KVM_DIRTY_LOG_PAGE_OFFSET &&
			       page < KVM_DIRTY_LOG_PAGE_OFFSET + BYTES / PAGE;

		assert_int_equal(is_there(p + page * PAGE), page < RUN_SIZE / PAGE || is_ring);
	}
	ring[5].offset = 77; /* one memory */
	assert_int_equal(((struct kvm_dirty_gfn *)(void *)(p + RING_OFFSET))[5].offset, 77);
	ring[5].offset = 0;
	munmap(p, all);
	p = map_vcpu(&g.vcpu, 4 * PAGE, rw, MAP_SHARED, 62 * PAGE);
	assert_true(p != MAP_FAILED);
	assert_false(is_there(p));
	assert_false(is_there(p + PAGE));
	assert_true(is_there(p + 2 * PAGE));
	munmap(p, 4 * PAGE);
}

static void long_mode(void)
{
	guest_long_mode(&g, 0);
}

/* D2, U1: the vCPU exits when the ring is nearly full, and again until it is reset. */
static void full(void **state)
{
	struct kvm_regs r = {.rip = CODE, .rsp = STACK, .rflags = 2, .rcx = PAGES};
	/* 1: movb $1, (%rdi); add $4096, %rdi; loop 1b; hlt */
	static const uint8_t code[] = {0xc6, 0x07, 0x01, 0x48, 0x81, 0xc7, 0,
				       0x10, 0,    0,    0xe2, 0xf4, 0xf4};
	unsigned total = 0, exits = 0, n;

	(void)state;
	if (on_real_kvm()) /* how many entries hardware needs in reserve differs */
		skip();
	long_mode();
	memcpy(g.ram + CODE, code, sizeof(code));
	r.rdi = SLOT;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &r), 0);
	for (;;) {
		assert_int_equal(guest_run(&g), 0);
		if (g.run->exit_reason == KVM_EXIT_HLT)
			break;
		assert_int_equal(g.run->exit_reason, KVM_EXIT_DIRTY_RING_FULL);
		exits++;
		r = guest_get(&g);
		assert_int_equal(guest_run(&g), 0);
		assert_int_equal(g.run->exit_reason, KVM_EXIT_DIRTY_RING_FULL);
		assert_int_equal(guest_get(&g).rdi, r.rdi);
		n = collect();
		assert_true(n >= ENTRIES / 2 && n < ENTRIES);
		/* Collected is not reset. */
		assert_int_equal(guest_run(&g), 0);
		assert_int_equal(g.run->exit_reason, KVM_EXIT_DIRTY_RING_FULL);
		assert_int_equal(dev_ioctl(&g.vm, KVM_RESET_DIRTY_RINGS, 0), n);
		total += n;
	}
	n = collect();
	assert_int_equal(dev_ioctl(&g.vm, KVM_RESET_DIRTY_RINGS, 0), n);
	assert_int_equal(exits, 1);
	assert_true(total + n >= PAGES && total + n <= PAGES + 2);
	for (unsigned page = 0; page < PAGES; page++)
		assert_int_equal(mem[page * PAGE], 1);
}

/* D2, D3: one instruction that writes more pages than there is room for. */
static void full_within_instruction(void **state)
{
	struct kvm_regs r = {.rip = CODE, .rsp = STACK, .rflags = 2, .rcx = PAGES * PAGE / 8};
	static const uint8_t code[] = {0xf3, 0x48, 0xab, 0xf4}; /* rep stosq; hlt */
	unsigned exits = 0, n;

	(void)state;
	if (on_real_kvm())
		skip();
	long_mode();
	memcpy(g.ram + CODE, code, sizeof(code));
	r.rdi = SLOT;
	r.rax = 0x0102030405060708;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &r), 0);
	for (;; exits++) {
		assert_int_equal(guest_run(&g), 0);
		if (g.run->exit_reason == KVM_EXIT_HLT)
			break;
		assert_int_equal(g.run->exit_reason, KVM_EXIT_DIRTY_RING_FULL);
		n = collect();
		assert_int_equal(dev_ioctl(&g.vm, KVM_RESET_DIRTY_RINGS, 0), n);
	}
	assert_true(exits);
	for (size_t i = 0; i < PAGES * PAGE; i++)
		assert_int_equal(mem[i], 8 - i % 8);
}

/* D2: a bitmap beside the rings, for what no running vCPU writes; not KVM's on x86. */
static void with_bitmap(void **state)
{
	uint64_t bits[PAGES / 64];
	struct kvm_dirty_log log = {.slot = SLOT_1, .dirty_bitmap = bits};

	if (on_real_kvm())
		skip();
	assert_int_equal(setup_vm(state), 0);
	assert_int_equal(enable(KVM_CAP_DIRTY_LOG_RING, BYTES), 0);
	assert_int_equal(enable(KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP, 0), 0);
	guest_make_rest(&g);
	assert_int_equal(set_slot(&g, SLOT_1, KVM_MEM_LOG_DIRTY_PAGES, SLOT, PAGES * PAGE, mem), 0);
	guest_code(&g, 0xc6, 0x06, 0, 0, 1, 0xf4); /* movb $1, 0; hlt */
	{
		struct kvm_sregs s;

		assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_SREGS, &s), 0);
		s.ds.base = SLOT + 3 * PAGE;
		assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_SREGS, &s), 0);
	}
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_GET_DIRTY_LOG, &log), 0);
	for (unsigned i = 0; i < PAGES / 64; i++)
		assert_int_equal(bits[i], 0);
	ring = map_vcpu(&g.vcpu, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, RING_OFFSET);
	assert_int_equal(ring[0].flags, KVM_DIRTY_GFN_F_DIRTY);
	assert_int_equal(ring[0].slot, SLOT_1);
	assert_int_equal(ring[0].offset, 3);
	munmap(ring, BYTES);
	teardown_vm(state);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
		cmocka_unit_test_setup_teardown(errors, setup_vm, teardown_vm),
		T(errors_of_rings),
		T(mapping),
		T(full),
		T(full_within_instruction),
		cmocka_unit_test(with_bitmap),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
