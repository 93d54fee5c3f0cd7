/* SPDX-License-Identifier: MIT */
/*
 * Guests that write certain pages, for `kvmlet run --heatmap`: of the first VM, five of slot 0 and
 * three of slot 1; of a second one, a page; of a third one, which is there at the end, two. The
 * first one's slots log as the argument says, and what the logs have is compared with what was
 * written. Knows nothing of kvmlet.
 *
 *     heat-vm plain | log | manual | rings
 */
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE    4096ul
#define PAGES   512u
#define CODE    0x800000u /* slot 2: nobody writes it */
#define LIST    (CODE + 0x100)
#define SECOND  0x40000000u
#define ENTRIES 1024u

/*
 * 32-bit code: lods; test; jz 2f; incl (%eax); jmp 0b; 2: hlt; jmp 0b. The list of addresses has
 * a 0 at its end.
 */
static const uint8_t code[] = {0xad, 0x85, 0xc0, 0x74, 0x04, 0xff,
			       0x00, 0xeb, 0xf7, 0xf4, 0xeb, 0xf4};

struct vm {
	int fd, vcpu;
	struct kvm_run *run;
	uint8_t *code;
	void *slot[2];
};

static int kvm;
static enum { PLAIN, LOG, MANUAL, RINGS } how;

static int call(int fd, const char *name, unsigned long cmd, unsigned long arg)
{
	int ret = ioctl(fd, cmd, arg);

	if (ret < 0)
		err(1, "%s", name);
	return ret;
}
#define CALL(fd, cmd, arg) call(fd, #cmd, cmd, (unsigned long)(arg))

static void *set_slot(struct vm *vm, unsigned id, uint64_t gpa, uint64_t size, uint32_t flags)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct kvm_userspace_memory_region region = {
		.slot = id,
		.flags = flags,
		.guest_phys_addr = gpa,
		.memory_size = size,
		.userspace_addr = (uintptr_t)p,
	};

	if (p == MAP_FAILED)
		err(1, "mmap");
	CALL(vm->fd, KVM_SET_USER_MEMORY_REGION, &region);
	return p;
}

static void enable(struct vm *vm, uint32_t cap, uint64_t arg)
{
	struct kvm_enable_cap c = {.cap = cap, .args[0] = arg};

	CALL(vm->fd, KVM_ENABLE_CAP, &c);
}

static void make_vcpu(struct vm *vm)
{
	struct kvm_segment seg = {.limit = -1u, .present = 1, .s = 1, .g = 1, .db = 1, .type = 3};
	struct kvm_sregs sregs;

	vm->vcpu = CALL(vm->fd, KVM_CREATE_VCPU, 0);
	vm->run = mmap(NULL, (size_t)CALL(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE,
		       MAP_SHARED, vm->vcpu, 0);
	if (vm->run == MAP_FAILED)
		err(1, "mmap of the vCPU");
	CALL(vm->vcpu, KVM_GET_SREGS, &sregs);
	sregs.cr0 |= 1;
	sregs.ds = sregs.es = sregs.ss = seg;
	seg.type = 11;
	sregs.cs = seg;
	CALL(vm->vcpu, KVM_SET_SREGS, &sregs);
}

static void make_vm(struct vm *vm, bool first)
{
	uint32_t flags = first && how != PLAIN ? KVM_MEM_LOG_DIRTY_PAGES : 0;

	vm->fd = CALL(kvm, KVM_CREATE_VM, 0);
	if (first && how == MANUAL)
		enable(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
	if (first && how == RINGS)
		enable(vm, KVM_CAP_DIRTY_LOG_RING, ENTRIES * sizeof(struct kvm_dirty_gfn));
	vm->slot[0] = set_slot(vm, 0, 0, PAGES * PAGE, flags);
	vm->slot[1] = first ? set_slot(vm, 1, SECOND, 64 * PAGE, flags) : NULL;
	vm->code = set_slot(vm, 2, CODE, PAGE, 0);
	memcpy(vm->code, code, sizeof(code));
	make_vcpu(vm);
}

static void write_pages(struct vm *vm, const uint32_t *addresses, unsigned n)
{
	struct kvm_regs regs = {.rip = CODE, .rsi = LIST, .rflags = 2};

	memcpy(vm->code + (LIST - CODE), addresses, n * sizeof(*addresses));
	memset(vm->code + (LIST - CODE) + n * sizeof(*addresses), 0, sizeof(*addresses));
	CALL(vm->vcpu, KVM_SET_REGS, &regs);
	CALL(vm->vcpu, KVM_RUN, 0);
	if (vm->run->exit_reason != KVM_EXIT_HLT)
		errx(1, "exit reason %u", vm->run->exit_reason);
}

static void expect_log(struct vm *vm, unsigned slot, uint64_t want)
{
	uint64_t bitmap[PAGES / 64] = {0};
	struct kvm_dirty_log log = {.slot = slot, .dirty_bitmap = bitmap};

	CALL(vm->fd, KVM_GET_DIRTY_LOG, &log);
	if (bitmap[0] != want)
		errx(1, "log of slot %u: %#lx, not %#lx", slot, (long)bitmap[0], (long)want);
	for (unsigned i = 1; !slot && i < PAGES / 64; i++)
		if (bitmap[i])
			errx(1, "log: pages that were not written");
}

static void clear_log(struct vm *vm, unsigned slot, uint64_t pages)
{
	uint64_t bitmap = pages;
	struct kvm_clear_dirty_log clear = {.slot = slot, .num_pages = 64, .dirty_bitmap = &bitmap};

	CALL(vm->fd, KVM_CLEAR_DIRTY_LOG, &clear);
}

/* All entries, and no others than @want[slot] has. */
static void expect_ring(struct vm *vm, const uint64_t *want)
{
	struct kvm_dirty_gfn *ring =
		mmap(NULL, ENTRIES * sizeof(*ring), PROT_READ | PROT_WRITE, MAP_SHARED, vm->vcpu,
		     KVM_DIRTY_LOG_PAGE_OFFSET * (long)PAGE);
	static unsigned at;
	uint64_t got[2] = {0, 0};

	if (ring == MAP_FAILED)
		err(1, "mmap of the ring");
	for (; __atomic_load_n(&ring[at].flags, __ATOMIC_ACQUIRE) == KVM_DIRTY_GFN_F_DIRTY; at++) {
		got[ring[at].slot & 1] |= 1ull << ring[at].offset;
		__atomic_store_n(&ring[at].flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
	}
	if (got[0] != want[0] || got[1] != want[1])
		errx(1, "ring: %#lx and %#lx", (long)got[0], (long)got[1]);
	CALL(vm->fd, KVM_RESET_DIRTY_RINGS, 0);
	munmap(ring, ENTRIES * sizeof(*ring));
}

/* Written pages @want of slots 0 and 1: is that what the program's log says? */
static void expect(struct vm *vm, const uint64_t *want)
{
	if (how == RINGS)
		expect_ring(vm, want);
	for (unsigned slot = 0; slot < 2 && (how == LOG || how == MANUAL); slot++) {
		expect_log(vm, slot, want[slot]);
		if (how == MANUAL) {
			expect_log(vm, slot, want[slot]);
			clear_log(vm, slot, want[slot]);
		}
		expect_log(vm, slot, 0);
	}
}

static void destroy(struct vm *vm)
{
	munmap(vm->run, (size_t)CALL(kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
	close(vm->vcpu);
	close(vm->fd);
}

int main(int argc, char **argv)
{
	static const char *const names[] = {"plain", "log", "manual", "rings"};
	static const uint32_t all[] = {0x1000, 0x2000, 0x3008,          0x5000,
				       0x8ffc, SECOND, SECOND + 0x7000, SECOND + 0x3f000};
	static const uint32_t again[] = {0x2000, SECOND + 0x7000};
	struct vm first, second, third;

	for (how = PLAIN; argc == 2 && how < RINGS && strcmp(argv[1], names[how]);)
		how++;
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		err(1, "/dev/kvm");
	make_vm(&first, true);
	write_pages(&first, all, 8);
	expect(&first, (uint64_t[]){1 << 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 8,
				    1 | 1ull << 7 | 1ull << 63});
	write_pages(&first, again, 2);
	expect(&first, (uint64_t[]){1 << 2, 1 << 7});
	make_vm(&second, false);
	write_pages(&second, again, 1);
	destroy(&second);
	make_vm(&third, false);
	write_pages(&third, all, 2);
	destroy(&first);
	puts("written");
	return 0;
}
