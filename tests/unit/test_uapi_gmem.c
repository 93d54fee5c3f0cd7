/* SPDX-License-Identifier: MIT */
/* guest_memfd, attributes and private memory as ioctls (F1, F2, F5). */
#include <linux/falloc.h>

#include "uapi_guest.h"

#define PAGES   16
#define GPA     0x200000ul /* of the slot with private memory */
#define PRIVATE KVM_MEMORY_ATTRIBUTE_PRIVATE

static struct guest g;
static struct dev file;
static char *mem;

static struct dev make_file(struct dev *vm, uint64_t size)
{
	struct kvm_create_guest_memfd a = {.size = size};

	return make(vm, KVM_CREATE_GUEST_MEMFD, (unsigned long)&a);
}

static long bind_slot(uint32_t slot, uint32_t flags, uint64_t gpa, uint64_t size, int fd,
		      uint64_t off)
{
	struct kl_uapi_memory_region2 r = {.slot = slot,
					   .flags = flags,
					   .guest_phys_addr = gpa,
					   .memory_size = size,
					   .userspace_addr = (uint64_t)mem,
					   .guest_memfd = (uint32_t)fd,
					   .guest_memfd_offset = off};

	return dev_ioctl_p(&g.vm, KVM_SET_USER_MEMORY_REGION2, &r);
}

static long attributes(uint64_t gpa, uint64_t size, uint64_t attr)
{
	struct kvm_memory_attributes a = {.address = gpa, .size = size, .attributes = attr};

	return dev_ioctl_p(&g.vm, KVM_SET_MEMORY_ATTRIBUTES, &a);
}

static long change_file(struct dev *d, int mode, off_t off, off_t len)
{
	long r;

	kl_engine_enter();
	r = kl_uapi_fallocate(d->obj, mode, off, len);
	kl_engine_leave();
	return r;
}

static int setup(void **state)
{
	(void)state;
	mem = mmap(NULL, PAGES * KL_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
		   -1, 0);
	assert_true(mem != MAP_FAILED);
	g.kvm = open_kvm();
	g.vm = make(&g.kvm, KVM_CREATE_VM, KVM_X86_SW_PROTECTED_VM);
	g.vcpu = make_vcpu(&g.vm, 0);
	g.run = map_run(&g.vcpu);
	g.ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	assert_int_equal(set_slot(&g, 0, 0, 0, RAM, g.ram), 0);
	guest_regs(&g);
	guest_long_mode(&g, 0);
	file = make_file(&g.vm, PAGES * KL_PAGE_SIZE);
	assert_int_equal(bind_slot(1, KVM_MEM_GUEST_MEMFD, GPA, PAGES * KL_PAGE_SIZE, file.fd, 0),
			 0);
	return 0;
}

static int teardown(void **state)
{
	(void)state;
	if (file.obj)
		dev_close(&file);
	guest_free(&g);
	munmap(mem, PAGES * KL_PAGE_SIZE);
	return 0;
}

/* mov eax, [GPA]; mov [GPA + 4096], eax; hlt */
static void copy_code(void)
{
	static const uint8_t code[] = {0x8b, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00, 0x89,
				       0x04, 0x25, 0x00, 0x10, 0x20, 0x00, 0xf4};
	struct kvm_regs regs = {.rip = CODE, .rsp = STACK, .rflags = 2};

	memcpy(g.ram + CODE, code, sizeof(code));
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &regs), 0);
}

static void assert_memory_fault(long r, long expected, uint64_t gpa)
{
	struct kl_uapi_memory_fault m;

	assert_int_equal(r, expected);
	assert_int_equal(g.run->exit_reason, KVM_EXIT_MEMORY_FAULT);
	memcpy(&m, g.run->padding, sizeof(m));
	assert_int_equal(m.flags, KVM_MEMORY_EXIT_FLAG_PRIVATE);
	assert_int_equal(m.gpa, gpa);
	assert_int_equal(m.size, KL_PAGE_SIZE);
}

/* F5: what depends on the VM's type. */
static void capabilities(void **state)
{
	static const struct {
		unsigned cap;
		int system, plain, private;
	} c[] = {
		{KVM_CAP_VM_TYPES, 3, 3, 3},
		{KVM_CAP_MEMORY_ATTRIBUTES, PRIVATE, 0, PRIVATE},
		{KVM_CAP_GUEST_MEMFD, 1, 0, 1},
		{KVM_CAP_MULTI_ADDRESS_SPACE, 2, 2, 1},
		{KVM_CAP_MEMORY_FAULT_INFO, 1, 1, 1},
		{KVM_CAP_PRE_FAULT_MEMORY, 1, 1, 1},
		{KVM_CAP_READONLY_MEM, 1, 1, 1},
	};
	struct dev plain = make_vm(&g.kvm);
	struct kvm_memory_attributes a = {.address = 0, .size = KL_PAGE_SIZE};
	struct dev f;

	(void)state;
	for (unsigned i = 0; i < KL_ARRAY_SIZE(c); i++) {
		assert_int_equal(dev_ioctl(&g.kvm, KVM_CHECK_EXTENSION, c[i].cap), c[i].system);
		assert_int_equal(dev_ioctl(&plain, KVM_CHECK_EXTENSION, c[i].cap), c[i].plain);
		assert_int_equal(dev_ioctl(&g.vm, KVM_CHECK_EXTENSION, c[i].cap), c[i].private);
	}
	for (unsigned long type = 2; type < 70; type++)
		assert_int_equal(dev_ioctl(&g.kvm, KVM_CREATE_VM, type), -EINVAL);
	/* A VM of the default type may have files, and nothing to bind them to. */
	f = make_file(&plain, KL_PAGE_SIZE);
	dev_close(&f);
	assert_int_equal(dev_ioctl_p(&plain, KVM_SET_MEMORY_ATTRIBUTES, &a), 0);
	a.attributes = PRIVATE;
	assert_int_equal(dev_ioctl_p(&plain, KVM_SET_MEMORY_ATTRIBUTES, &a), -EINVAL);
	dev_close(&plain);
}

/* F1: KVM_CREATE_GUEST_MEMFD. */
static void creation(void **state)
{
	struct kvm_create_guest_memfd a = {.size = KL_PAGE_SIZE};
	struct stat st;
	struct dev f;

	(void)state;
	assert_int_equal(dev_ioctl(&g.vm, KVM_CREATE_GUEST_MEMFD, 0), -EFAULT);
	for (unsigned bit = 0; bit < 64; bit++) {
		a.flags = 1ull << bit;
		assert_int_equal(dev_ioctl_p(&g.vm, KVM_CREATE_GUEST_MEMFD, &a), -EINVAL);
	}
	a.flags = 0;
	memset(a.reserved, 0xff, sizeof(a.reserved)); /* is not looked at */
	for (unsigned i = 0; i < 3; i++) {
		a.size = (uint64_t[]){0, KL_PAGE_SIZE - 1, 1ull << 63}[i];
		assert_int_equal(dev_ioctl_p(&g.vm, KVM_CREATE_GUEST_MEMFD, &a), -EINVAL);
	}
	a.size = 3 * KL_PAGE_SIZE;
	f = make(&g.vm, KVM_CREATE_GUEST_MEMFD, (unsigned long)&a);
	assert_int_equal(fstat(f.fd, &st), 0);
	assert_int_equal(st.st_size, 3 * KL_PAGE_SIZE);
	assert_int_equal(fcntl(f.fd, F_GETFD), 0);
	assert_int_equal(fcntl(f.fd, F_GETFL) & O_ACCMODE, O_RDWR);
	assert_int_equal(dev_ioctl(&f, KVM_GET_API_VERSION, 0), -ENOTTY);
	dev_close(&f);
	/* As large as a file can be. */
	a.size = INT64_MAX & KL_PAGE_MASK;
	f = make(&g.vm, KVM_CREATE_GUEST_MEMFD, (unsigned long)&a);
	dev_close(&f);
}

/* F1: fallocate, to the errno and its order. */
static void fallocate_errors(void **state)
{
	const int keep = FALLOC_FL_KEEP_SIZE, punch = keep | FALLOC_FL_PUNCH_HOLE;
	const off_t size = PAGES * KL_PAGE_SIZE, page = KL_PAGE_SIZE;

	(void)state;
	assert_int_equal(change_file(&file, keep, -page, page), -EINVAL);
	assert_int_equal(change_file(&file, keep, 0, 0), -EINVAL);
	assert_int_equal(change_file(&file, 0, 0, page), -EOPNOTSUPP);
	assert_int_equal(change_file(&file, 0, 1, page), -EOPNOTSUPP);
	assert_int_equal(change_file(&file, FALLOC_FL_PUNCH_HOLE, 0, page), -EOPNOTSUPP);
	assert_int_equal(change_file(&file, keep | FALLOC_FL_ZERO_RANGE, 0, page), -EOPNOTSUPP);
	assert_int_equal(change_file(&file, FALLOC_FL_COLLAPSE_RANGE, 0, page), -EOPNOTSUPP);
	assert_int_equal(change_file(&file, keep | 0x1000, 0, page), -EOPNOTSUPP);
	assert_int_equal(change_file(&file, keep, INT64_MAX & KL_PAGE_MASK, page), -EFBIG);
	assert_int_equal(change_file(&file, keep, 1, page), -EINVAL);
	assert_int_equal(change_file(&file, punch, page, 1), -EINVAL);
	assert_int_equal(change_file(&file, keep, size, page), -EINVAL);
	assert_int_equal(change_file(&file, keep, 0, size + page), -EINVAL);
	assert_int_equal(change_file(&file, keep, 0, size), 0);
	assert_int_equal(change_file(&file, punch, size, page), 0);
	assert_int_equal(change_file(&file, punch, 0, size + page), 0);
	/* Other descriptors of KVM's have none. */
	assert_int_equal(change_file(&g.vm, keep, 0, page), -ENODEV);
}

/* F2: KVM_SET_USER_MEMORY_REGION2, in the order in which things are looked at. */
static void bindings(void **state)
{
	const uint64_t size = KL_PAGE_SIZE;
	struct dev other = make(&g.kvm, KVM_CREATE_VM, KVM_X86_SW_PROTECTED_VM);
	struct dev foreign = make_file(&other, PAGES * size), mine = make_file(&g.vm, 4 * size);
	int memfd = memfd_create("plain", 0);
	struct kl_uapi_memory_region2 r = {.slot = 2,
					   .flags = KVM_MEM_GUEST_MEMFD,
					   .guest_phys_addr = 4 * GPA,
					   .memory_size = size,
					   .userspace_addr = (uint64_t)mem,
					   .guest_memfd = (uint32_t)mine.fd};

	(void)state;
	assert_int_equal(ftruncate(memfd, (off_t)size), 0);
	/* The older call has no such flag. */
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_USER_MEMORY_REGION, &r), -EINVAL);
	assert_int_equal(bind_slot(2, KVM_MEM_GUEST_MEMFD, 4 * GPA, size, -1, 0), -EBADF);
	assert_int_equal(bind_slot(2, KVM_MEM_GUEST_MEMFD, 4 * GPA, size, -1, 1), -EINVAL);
	assert_int_equal(bind_slot(2, KVM_MEM_GUEST_MEMFD, GPA, size, -1, 0), -EEXIST);
	assert_int_equal(bind_slot(2, KVM_MEM_GUEST_MEMFD, 1ull << 60, size, -1, 0), -EBADF);
	assert_int_equal(bind_slot(2, KVM_MEM_GUEST_MEMFD, 1ull << 60, size, mine.fd, 0), -EINVAL);
	assert_int_equal(bind_slot(2, KVM_MEM_GUEST_MEMFD, 4 * GPA, size, g.kvm.fd, 0), -EINVAL);
	assert_int_equal(bind_slot(2, KVM_MEM_GUEST_MEMFD, 4 * GPA, size, g.vm.fd, 0), -EINVAL);
	assert_int_equal(bind_slot(2, KVM_MEM_GUEST_MEMFD, 4 * GPA, size, memfd, 0), -EINVAL);
	assert_int_equal(bind_slot(2, KVM_MEM_GUEST_MEMFD, 4 * GPA, size, foreign.fd, 0), -EINVAL);
	assert_int_equal(bind_slot(2, KVM_MEM_GUEST_MEMFD, 4 * GPA, 5 * size, mine.fd, 0), -EINVAL);
	assert_int_equal(bind_slot(2, KVM_MEM_GUEST_MEMFD | KVM_MEM_LOG_DIRTY_PAGES, 4 * GPA, size,
				   mine.fd, 0),
			 -EINVAL);
	assert_int_equal(
		bind_slot(2, KVM_MEM_GUEST_MEMFD | KVM_MEM_READONLY, 4 * GPA, size, mine.fd, 0),
		-EINVAL);
	assert_int_equal(bind_slot(2, KVM_MEM_GUEST_MEMFD, 4 * GPA, 2 * size, mine.fd, size), 0);
	assert_int_equal(bind_slot(3, KVM_MEM_GUEST_MEMFD, 5 * GPA, 2 * size, mine.fd, 2 * size),
			 -EINVAL);
	assert_int_equal(bind_slot(3, KVM_MEM_GUEST_MEMFD, 5 * GPA, size, mine.fd, 3 * size), 0);
	assert_int_equal(bind_slot(3, KVM_MEM_GUEST_MEMFD, 5 * GPA, size, mine.fd, 3 * size),
			 -EINVAL);
	assert_int_equal(bind_slot(3, KVM_MEM_LOG_DIRTY_PAGES, 5 * GPA, size, mine.fd, 0), -EINVAL);
	assert_int_equal(bind_slot(3, 0, 5 * GPA, 0, mine.fd, 0), 0);
	assert_int_equal(bind_slot(3, KVM_MEM_GUEST_MEMFD, 5 * GPA, size, mine.fd, 3 * size), 0);
	close(memfd);
	dev_close(&mine);
	dev_close(&foreign);
	dev_close(&other);
}

/* F2: a file keeps its VM, and both are gone when it goes. */
static void file_keeps_vm(void **state)
{
	struct dev vm = make(&g.kvm, KVM_CREATE_VM, KVM_X86_SW_PROTECTED_VM);
	struct dev f = make_file(&vm, PAGES * KL_PAGE_SIZE);
	int before = count_fds();

	(void)state;
	dev_close(&vm);
	assert_int_equal(change_file(&f, FALLOC_FL_KEEP_SIZE, 0, PAGES * KL_PAGE_SIZE), 0);
	assert_int_equal(change_file(&f, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, 0,
				     PAGES * KL_PAGE_SIZE),
			 0);
	dev_close(&f);
	assert_true(count_fds() < before - 2);
}

/* F5: KVM_SET_MEMORY_ATTRIBUTES' arguments. */
static void attribute_errors(void **state)
{
	struct kvm_memory_attributes a = {.address = GPA, .size = KL_PAGE_SIZE, .flags = 1};

	(void)state;
	assert_int_equal(dev_ioctl(&g.vm, KVM_SET_MEMORY_ATTRIBUTES, 0), -EFAULT);
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_SET_MEMORY_ATTRIBUTES, &a), -EINVAL);
	for (unsigned bit = 0; bit < 64; bit++)
		assert_int_equal(attributes(8 * GPA, KL_PAGE_SIZE, 1ull << bit),
				 bit == 3 ? 0 : -EINVAL);
	assert_int_equal(attributes(GPA, 0, PRIVATE), -EINVAL);
	assert_int_equal(attributes(GPA + 1, KL_PAGE_SIZE, PRIVATE), -EINVAL);
	assert_int_equal(attributes(GPA, KL_PAGE_SIZE + 1, PRIVATE), -EINVAL);
	assert_int_equal(attributes(-KL_PAGE_SIZE, KL_PAGE_SIZE, PRIVATE), -EINVAL);
	assert_int_equal(attributes(KL_PAGE_SIZE, -KL_PAGE_SIZE, PRIVATE), -EINVAL);
	/* All there is, whatever it costs elsewhere. */
	assert_int_equal(attributes(0, -KL_PAGE_SIZE, PRIVATE), 0);
	assert_int_equal(attributes(0, -KL_PAGE_SIZE, 0), 0);
}

/* F5, F7: the guest reads and writes what the attributes say; the program sees the shared copy
 * only. */
static void guest_sees(void **state)
{
	(void)state;
	*(uint32_t *)(void *)mem = 0x1111;
	copy_code();
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(*(uint32_t *)(void *)(mem + KL_PAGE_SIZE), 0x1111);
	/* From shared to private. */
	assert_int_equal(attributes(GPA + KL_PAGE_SIZE, KL_PAGE_SIZE, PRIVATE), 0);
	*(uint32_t *)(void *)mem = 0x2222;
	copy_code();
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(*(uint32_t *)(void *)(mem + KL_PAGE_SIZE), 0x1111);
	/* The other page too: it was never written. */
	assert_int_equal(attributes(GPA, KL_PAGE_SIZE, PRIVATE), 0);
	copy_code();
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(guest_get(&g).rax, 0);
	/* And back: both copies are what they were. */
	assert_int_equal(attributes(GPA, PAGES * KL_PAGE_SIZE, 0), 0);
	copy_code();
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(guest_get(&g).rax, 0x2222);
	assert_int_equal(*(uint32_t *)(void *)(mem + KL_PAGE_SIZE), 0x2222);
}

/* F5, F7: code, page tables and the stack may be private: the engine walks and fetches there. */
static void engine_uses_private(void **state)
{
	struct kvm_regs regs = {.rip = GPA + 2 * KL_PAGE_SIZE, .rsp = STACK, .rflags = 2};
	/* In private memory: mov byte [GPA + 3 pages], 0xf4; jmp there. */
	static const uint8_t loader[] = {0xc6, 0x04, 0x25, 0x00, 0x30, 0x20, 0x00, 0xf4,
					 0xb8, 0x00, 0x30, 0x20, 0x00, 0xff, 0xe0};

	(void)state;
	memcpy(mem + 2 * KL_PAGE_SIZE, loader, sizeof(loader));
	memset(mem + 3 * KL_PAGE_SIZE, 0x90, KL_PAGE_SIZE);
	assert_int_equal(attributes(GPA + 3 * KL_PAGE_SIZE, KL_PAGE_SIZE, PRIVATE), 0);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &regs), 0);
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(guest_get(&g).rip, GPA + 3 * KL_PAGE_SIZE + 1);
	assert_int_equal((uint8_t)mem[3 * KL_PAGE_SIZE], 0x90);
}

/* F7, X3: what the engine writes for the guest is private where the guest has it private. */
static void clock_in_private(void **state)
{
	/* mov eax, [GPA + 24]: the multiplier; hlt */
	static const uint8_t code[] = {0x8b, 0x04, 0x25, 0x18, 0x00, 0x20, 0x00, 0xf4};

	(void)state;
	copy_code();
	memcpy(g.ram + CODE, code, sizeof(code));
	assert_int_equal(attributes(GPA, KL_PAGE_SIZE, PRIVATE), 0);
	assert_int_equal(guest_set_msr(&g, 0x4b564d01, GPA | 1), 1);
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_not_equal(guest_get(&g).rax, 0);
	for (unsigned i = 0; i < 32; i++)
		assert_int_equal(mem[i], 0);
}

/* F5, N7: KVM_EXIT_MEMORY_FAULT, and what a program can do about it. */
static void memory_fault_exits(void **state)
{
	struct kvm_regs regs;

	(void)state;
	/* No slot. */
	assert_int_equal(attributes(GPA, PAGES * KL_PAGE_SIZE, PRIVATE), 0);
	assert_int_equal(bind_slot(1, 0, GPA, 0, 0, 0), 0);
	copy_code();
	assert_memory_fault(guest_run(&g), -EFAULT, GPA);
	/* A slot without private memory; rip is where it was. */
	assert_int_equal(bind_slot(1, 0, GPA, PAGES * KL_PAGE_SIZE, 0, 0), 0);
	assert_memory_fault(guest_run(&g), -EFAULT, GPA);
	assert_int_equal(guest_get(&g).rip, CODE);
	/* Converted, it goes on, to the next one. */
	assert_int_equal(attributes(GPA, KL_PAGE_SIZE, 0), 0);
	*(uint32_t *)(void *)mem = 7;
	assert_memory_fault(guest_run(&g), -EFAULT, GPA + KL_PAGE_SIZE);
	assert_int_equal(attributes(GPA + KL_PAGE_SIZE, KL_PAGE_SIZE, 0), 0);
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(mem[KL_PAGE_SIZE], 7);
	/* An access that spans two pages: the one that is at fault. */
	assert_int_equal(attributes(GPA + KL_PAGE_SIZE, KL_PAGE_SIZE, PRIVATE), 0);
	regs = guest_get(&g);
	memcpy(g.ram + CODE, "\x8b\x04\x25\xfe\x0f\x20\x00\xf4", 8); /* mov eax, [GPA + 0xffe] */
	regs.rip = CODE;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &regs), 0);
	assert_memory_fault(guest_run(&g), -EFAULT, GPA + KL_PAGE_SIZE);
	/* Shared memory that is missing is another matter. */
	assert_int_equal(attributes(GPA, PAGES * KL_PAGE_SIZE, 0), 0);
	munmap(mem, PAGES * KL_PAGE_SIZE);
	assert_int_equal(guest_run(&g), -EFAULT);
	assert_int_equal(g.run->exit_reason, KVM_EXIT_UNKNOWN);
}

/* F2: the last descriptor is closed: later private faults fail. */
static void closed_file(void **state)
{
	struct kvm_pre_fault_memory p = {.gpa = GPA, .size = KL_PAGE_SIZE};

	(void)state;
	assert_int_equal(attributes(GPA, PAGES * KL_PAGE_SIZE, PRIVATE), 0);
	copy_code();
	assert_exit(&g, KVM_EXIT_HLT);
	dev_close(&file);
	copy_code();
	assert_memory_fault(guest_run(&g), -EFAULT, GPA);
	g.run->exit_reason = 0;
	assert_memory_fault(dev_ioctl_p(&g.vcpu, KVM_PRE_FAULT_MEMORY, &p), -EFAULT, GPA);
}

/* M8, F7: private ranges are populated in the file, and mapped. */
static void pre_fault(void **state)
{
	struct kvm_pre_fault_memory p = {.gpa = GPA, .size = 4 * KL_PAGE_SIZE};
	struct stat st;

	(void)state;
	assert_int_equal(attributes(GPA, 2 * KL_PAGE_SIZE, PRIVATE), 0);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_PRE_FAULT_MEMORY, &p), 0);
	assert_int_equal(p.size, 0);
	assert_int_equal(fstat(file.fd, &st), 0);
	assert_int_equal(st.st_blocks * 512, 2 * KL_PAGE_SIZE);
	/* Private, and no slot: not "there is nothing" but a memory fault. */
	assert_int_equal(attributes(8 * GPA, KL_PAGE_SIZE, PRIVATE), 0);
	p = (struct kvm_pre_fault_memory){.gpa = 8 * GPA, .size = 2 * KL_PAGE_SIZE};
	assert_memory_fault(dev_ioctl_p(&g.vcpu, KVM_PRE_FAULT_MEMORY, &p), -EFAULT, 8 * GPA);
	p = (struct kvm_pre_fault_memory){.gpa = 8 * GPA + KL_PAGE_SIZE, .size = KL_PAGE_SIZE};
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_PRE_FAULT_MEMORY, &p), -ENOENT);
	/* The last page of a slot is private and the next has none: one page is success. */
	assert_int_equal(attributes(GPA + (PAGES - 1) * KL_PAGE_SIZE, 2 * KL_PAGE_SIZE, PRIVATE),
			 0);
	p = (struct kvm_pre_fault_memory){.gpa = GPA + (PAGES - 1) * KL_PAGE_SIZE,
					  .size = 2 * KL_PAGE_SIZE};
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_PRE_FAULT_MEMORY, &p), 0);
	assert_int_equal(p.size, KL_PAGE_SIZE);
}

/* D1: a log covers what is not private; there is none of a slot that may be. */
static void no_log(void **state)
{
	struct kvm_dirty_log log = {.slot = 1, .dirty_bitmap = mem};

	(void)state;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_GET_DIRTY_LOG, &log), -ENOENT);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(capabilities),     TEST(creation),
		TEST(fallocate_errors), TEST(bindings),
		TEST(file_keeps_vm),    TEST(attribute_errors),
		TEST(guest_sees),       TEST(engine_uses_private),
		TEST(clock_in_private), TEST(memory_fault_exits),
		TEST(closed_file),      TEST(pre_fault),
		TEST(no_log),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
