/* SPDX-License-Identifier: MIT */
/*
 * Memory as KVM_RUN sees it: read-only slots and host mappings, no slot, memory that is gone,
 * slots that come and go, address spaces. With KVMLET_TEST_REAL=1 on the real /dev/kvm.
 */
#include <pthread.h>
#include <sys/syscall.h>

#include "base/racepoint.h"
#include "uapi_guest.h"

static struct guest g;
static uint8_t *mem;

static int setup(void **state)
{
	(void)state;
	guest_make(&g, false);
	mem = mmap(NULL, KL_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	assert_true(mem != MAP_FAILED);
	return 0;
}

static int teardown(void **state)
{
	(void)state;
	guest_free(&g);
	munmap(mem, KL_PAGE_SIZE);
	return 0;
}

static void protect(int prot)
{
	assert_int_equal(mprotect(mem, KL_PAGE_SIZE, prot), 0);
}

static void assert_mmio_write(uint64_t gpa, unsigned len, uint64_t data)
{
	uint64_t got = 0;

	assert_exit(&g, KVM_EXIT_MMIO);
	assert_int_equal(g.run->mmio.is_write, 1);
	assert_int_equal(g.run->mmio.phys_addr, gpa);
	assert_int_equal(g.run->mmio.len, len);
	memcpy(&got, g.run->mmio.data, len);
	assert_int_equal(got, data);
}

/* M3: a write to a read-only slot is MMIO; what is read before it comes from memory. */
static void read_only_slot(void **state)
{
	uint16_t *words = (void *)mem;

	(void)state;
	words[0] = 41;
	words[4] = 0x77;
	assert_int_equal(set_slot(&g, 1, KVM_MEM_READONLY, MMIO, KL_PAGE_SIZE, mem), 0);
	guest_code(&g, 0x83, 0x06, 0x00, 0x00, 0x01,   /* add word [0],1 */
		   0xb8, 0x34, 0x12,                   /* mov ax,0x1234 */
		   0x87, 0x06, 0x04, 0x00,             /* xchg [4],ax */
		   0xf0, 0x0f, 0xb1, 0x0e, 0x08, 0x00, /* lock cmpxchg [8],cx: not equal */
		   0xf0, 0x0f, 0xb1, 0x26, 0x08, 0x00, /* lock cmpxchg [8],sp: equal */
		   0xf0, 0x0f, 0xc1, 0x06, 0x00, 0x00, /* lock xadd [0],ax */
		   0xf4);
	assert_mmio_write(MMIO, 2, 42);
	assert_mmio_write(MMIO + 4, 2, 0x1234);
	assert_mmio_write(MMIO + 8, 2, 0x77);
	assert_mmio_write(MMIO + 8, 2, STACK);
	assert_mmio_write(MMIO, 2, 41 + 0x77);
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(guest_get(&g).rax, 41);
	assert_int_equal(words[0], 41);
	assert_int_equal(words[4], 0x77);
}

/* M3: the same where the host's mapping is read-only, too. */
static void read_only_slot_and_mapping(void **state)
{
	(void)state;
	mem[0] = 0x33;
	protect(PROT_READ);
	assert_int_equal(set_slot(&g, 1, KVM_MEM_READONLY, MMIO, KL_PAGE_SIZE, mem), 0);
	guest_code(&g, 0xa0, 0x00, 0x00, 0xa2, 0x01, 0x00, 0xf4); /* mov al,[0]; mov [1],al */
	assert_mmio_write(MMIO + 1, 1, 0x33);
	assert_exit(&g, KVM_EXIT_HLT);
}

/*
 * M3, N7: a writable slot over a read-only mapping: reads work, a write is EFAULT with nothing
 * done; when the mapping may be written, the guest goes on where it was.
 */
static void read_only_mapping(void **state)
{
	(void)state;
	if (on_real_kvm())
		skip(); /* where KVM emulates the access in software, it takes this for MMIO */
	mem[0] = 0x33;
	protect(PROT_READ);
	assert_int_equal(set_slot(&g, 1, 0, MMIO, KL_PAGE_SIZE, mem), 0);
	guest_code(&g, 0xa0, 0x00, 0x00, 0xa2, 0x01, 0x00, 0xf4); /* mov al,[0]; mov [1],al */
	for (int i = 0; i < 2; i++) {
		g.run->exit_reason = 0x55;
		assert_int_equal(guest_run(&g), -EFAULT);
		assert_int_equal(g.run->exit_reason, KVM_EXIT_UNKNOWN);
		assert_int_equal(guest_get(&g).rip, CODE + 3);
		assert_int_equal(guest_get(&g).rax, 0x33);
	}
	protect(PROT_READ | PROT_WRITE);
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(mem[1], 0x33);
	/* Taken away again behind the engine's back, when it is mapped for writing. */
	protect(PROT_READ);
	guest_regs(&g);
	assert_int_equal(guest_run(&g), -EFAULT);
	protect(PROT_READ | PROT_WRITE);
	assert_exit(&g, KVM_EXIT_HLT);
}

/* N7: the page is gone: unmapped, or beyond the end of its file. */
static void vanished(void **state)
{
	int fd = (int)syscall(SYS_memfd_create, "slot", 0);
	uint8_t *file;

	(void)state;
	if (on_real_kvm())
		skip();
	assert_int_equal(ftruncate(fd, KL_PAGE_SIZE), 0);
	file = mmap(NULL, KL_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	assert_true(file != MAP_FAILED);
	file[0] = 7;
	assert_int_equal(set_slot(&g, 1, 0, MMIO, KL_PAGE_SIZE, file), 0);
	guest_code(&g, 0xa0, 0x00, 0x00, 0xa2, 0x01, 0x00, 0xf4);
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(ftruncate(fd, 0), 0);
	guest_regs(&g);
	assert_int_equal(guest_run(&g), -EFAULT);
	assert_int_equal(guest_get(&g).rip, CODE);
	assert_int_equal(ftruncate(fd, KL_PAGE_SIZE), 0);
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(guest_get(&g).rax & 0xff, 0);
	munmap(file, KL_PAGE_SIZE);
	guest_regs(&g);
	assert_int_equal(guest_run(&g), -EFAULT);
	close(fd);
}

static void *run_thread(void *arg)
{
	*(long *)arg = guest_run(&g);
	return NULL;
}

/*
 * N7: the page is gone, and back before the engine has looked. Which slots hold it is a question of
 * the vCPU's own address space: what lies there at another one's guest address is of no interest.
 */
static void vanished_and_back(void **state)
{
	uint8_t *gone = mmap(NULL, KL_PAGE_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	pthread_t thread;
	long r = -1;

	(void)state;
	assert_true(gone != MAP_FAILED);
	if (on_real_kvm())
		skip();
	if (!kl_racepoints_enabled())
		return; /* TAP has no skips here: see meson.build */
	assert_int_equal(set_slot(&g, 1, 0, MMIO, KL_PAGE_SIZE, mem), 0);
	assert_int_equal(set_slot(&g, 2, 0, 0x400000, KL_PAGE_SIZE, gone), 0);
	assert_int_equal(set_slot(&g, 1 << 16, 0, 0x400000, KL_PAGE_SIZE, mem), 0);
	guest_code(&g, 0xa0, 0x00, 0x00, 0xf4); /* mov al,[0]; hlt */
	assert_exit(&g, KVM_EXIT_HLT);
	protect(PROT_NONE);
	guest_regs(&g);
	kl_racepoint_arm("fault-populate", 1);
	assert_int_equal(pthread_create(&thread, NULL, run_thread, &r), 0);
	assert_true(kl_racepoint_wait("fault-populate", 10000));
	protect(PROT_READ | PROT_WRITE);
	mem[0] = 0x17;
	kl_racepoint_release("fault-populate");
	pthread_join(thread, NULL);
	assert_int_equal(r, 0);
	assert_int_equal(g.run->exit_reason, KVM_EXIT_HLT);
	assert_int_equal(guest_get(&g).rax & 0xff, 0x17);
	munmap(gone, KL_PAGE_SIZE);
}

/* M4: no slot is MMIO for data, and an emulation failure for code, before and after a slot. */
static void no_slot(void **state)
{
	struct kvm_sregs s;

	(void)state;
	mem[0] = 0x61;
	mem[1] = 0xf4;
	guest_code(&g, 0xa0, 0x00, 0x00, 0xf4); /* mov al,[0]; hlt */
	for (int i = 0; i < 3; i++) {
		assert_exit(&g, KVM_EXIT_MMIO);
		assert_int_equal(g.run->mmio.is_write, 0);
		g.run->mmio.data[0] = 0x99;
		assert_exit(&g, KVM_EXIT_HLT);
		assert_int_equal(guest_get(&g).rax & 0xff, 0x99);
		assert_int_equal(set_slot(&g, 1, 0, MMIO, KL_PAGE_SIZE, mem), 0);
		guest_regs(&g);
		assert_exit(&g, KVM_EXIT_HLT);
		assert_int_equal(guest_get(&g).rax & 0xff, 0x61);
		assert_int_equal(set_slot(&g, 1, 0, MMIO, 0, mem), 0);
		guest_regs(&g);
	}
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_SREGS, &s), 0);
	s.cs.base = MMIO + 1 - CODE;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_SREGS, &s), 0);
	assert_exit(&g, KVM_EXIT_INTERNAL_ERROR);
	assert_int_equal(g.run->internal.suberror, KVM_INTERNAL_ERROR_EMULATION);
	assert_int_equal(set_slot(&g, 1, 0, MMIO, KL_PAGE_SIZE, mem), 0);
	guest_regs(&g);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_SREGS, &s), 0);
	assert_exit(&g, KVM_EXIT_HLT);
}

/* S2: a slot that is moved is where it is now, and no longer where it was. */
static void moved_slot(void **state)
{
	(void)state;
	mem[0] = 0x61;
	assert_int_equal(set_slot(&g, 1, 0, MMIO, KL_PAGE_SIZE, mem), 0);
	guest_code(&g, 0xa0, 0x00, 0x00, 0xa0, 0x00, 0x10, 0xf4); /* mov al,[0]; mov al,[0x1000] */
	assert_exit(&g, KVM_EXIT_MMIO);
	assert_int_equal(g.run->mmio.phys_addr, MMIO + KL_PAGE_SIZE);
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(set_slot(&g, 1, 0, MMIO + KL_PAGE_SIZE, KL_PAGE_SIZE, mem), 0);
	guest_regs(&g);
	assert_exit(&g, KVM_EXIT_MMIO);
	assert_int_equal(g.run->mmio.phys_addr, MMIO);
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(guest_get(&g).rax & 0xff, 0x61);
}

/*
 * S4: deleting a slot takes all mappings away, or, with the quirk disabled, only the slot's. The
 * guest sees no difference.
 */
static void slot_zap_all_quirk(void **state)
{
	struct kvm_enable_cap cap = {.cap = KVM_CAP_DISABLE_QUIRKS2,
				     .args = {KVM_X86_QUIRK_SLOT_ZAP_ALL}};

	(void)state;
	if (on_real_kvm())
		skip();
	guest_code(&g, 0xa0, 0x00, 0x00, 0xf4); /* mov al,[0]; hlt */
	for (int quirk = 1; quirk >= 0; quirk--) {
		if (!quirk)
			assert_int_equal(dev_ioctl_p(&g.vm, KVM_ENABLE_CAP, &cap), 0);
		assert_int_equal(set_slot(&g, 1, 0, MMIO, KL_PAGE_SIZE, mem), 0);
		guest_regs(&g);
		assert_exit(&g, KVM_EXIT_HLT);
		assert_int_equal(read_stat(&g.vm, "pages_4k"), 2);
		assert_int_equal(set_slot(&g, 1, 0, MMIO, 0, mem), 0);
		assert_int_equal(read_stat(&g.vm, "pages_4k"), !quirk);
		guest_regs(&g);
		assert_exit(&g, KVM_EXIT_MMIO);
		assert_exit(&g, KVM_EXIT_HLT);
	}
}

/* S1: a slot of the second address space is not in the first one's way. */
static void address_spaces(void **state)
{
	(void)state;
	if (dev_ioctl(&g.vm, KVM_CHECK_EXTENSION, KVM_CAP_MULTI_ADDRESS_SPACE) != 2)
		skip();
	assert_int_equal(dev_ioctl(&g.kvm, KVM_CHECK_EXTENSION, KVM_CAP_MULTI_ADDRESS_SPACE), 2);
	mem[0] = 0x61;
	assert_int_equal(set_slot(&g, 1 << 16 | 1, 0, MMIO, KL_PAGE_SIZE, mem), 0);
	guest_code(&g, 0xa0, 0x00, 0x00, 0xf4);
	assert_exit(&g, KVM_EXIT_MMIO); /* the vCPU is in the first */
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(set_slot(&g, 1, 0, MMIO, KL_PAGE_SIZE, mem), 0);
	assert_int_equal(set_slot(&g, 2, 0, MMIO, KL_PAGE_SIZE, mem), -EEXIST);
	assert_int_equal(set_slot(&g, 1 << 16 | 2, 0, MMIO, KL_PAGE_SIZE, mem), -EEXIST);
	assert_int_equal(set_slot(&g, 1 << 16 | 1, 0, MMIO, 0, mem), 0);
	assert_int_equal(set_slot(&g, 1 << 16 | 1, 0, MMIO, 0, mem), -EINVAL);
	guest_regs(&g);
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(guest_get(&g).rax & 0xff, 0x61);
	assert_int_equal(set_slot(&g, 2 << 16 | 1, 0, 0x400000, KL_PAGE_SIZE, mem), -EINVAL);
	assert_int_equal(set_slot(&g, 0xffff0001, 0, 0x400000, KL_PAGE_SIZE, mem), -EINVAL);
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(read_only_slot), T(read_only_slot_and_mapping), T(read_only_mapping),
		T(vanished),       T(vanished_and_back),          T(no_slot),
		T(moved_slot),     T(slot_zap_all_quirk),         T(address_spaces),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
