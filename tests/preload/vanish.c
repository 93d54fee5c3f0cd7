/* SPDX-License-Identifier: MIT */
/*
 * N7: memory that goes by raw system calls, which nobody announces, while pointers to it are in
 * use. KVM_RUN fails with EFAULT, whatever the engine was just doing with it, and nothing crashes.
 */
#include <sys/syscall.h>

#include "t.h"

#define PD      0x3000u
#define PT      0x4000u
#define SLOT_PD 2
#define SLOT_PT 3
#define MMIO    0xf000u

static struct vm v;
static uint8_t *data, *pd, *pt;

static long raw(long nr, const void *a, long b, long c)
{
	long ret;

	__asm__ volatile("syscall"
			 : "=a"(ret)
			 : "a"(nr), "D"(a), "S"(b), "d"(c)
			 : "rcx", "r11", "memory");
	return ret;
}

static void unmap(void *p)
{
	NEED(!raw(SYS_munmap, p, T_PAGE, 0));
}

static void protect(void *p, int prot)
{
	NEED(!raw(SYS_mprotect, p, T_PAGE, prot));
}

static void *page_at(void *at)
{
	void *p = mmap(at, T_PAGE, PROT_READ | PROT_WRITE,
		       MAP_SHARED | MAP_ANONYMOUS | (at ? MAP_FIXED : 0), -1, 0);

	NEED(p != MAP_FAILED);
	return p;
}

static void fault(void)
{
	int r = t_run(&v);

	/* As KVM leaves it: kvmlet and KVM without real-mode emulation. */
	if (t_preloaded() && !CHECK(r == -1 && errno == EFAULT))
		fprintf(stderr, "  exit %u\n", v.run->exit_reason);
	if (!r && v.run->exit_reason == KVM_EXIT_MMIO) {
		v.run->immediate_exit = 1;
		t_run(&v);
		v.run->immediate_exit = 0;
	}
}

static void code(const void *c, size_t n)
{
	memcpy(v.code, c, n);
	t_rewind(&v);
}

/* The guest reads and writes through what its TLB has. */
static void plain_accesses(void)
{
	/* mov al, 5; mov [DATA], al; out 0x10, al; jmp to the start */
	static const uint8_t write[] = {0xb0, 5, 0xa2, 0x00, 0x80, 0xe6, 0x10, 0xeb, 0xf7};

	data[0] = 3;
	CHECK(t_out(&v) == 3);
	CHECK(t_out(&v) == 3);
	unmap(data);
	fault();
	fault();
	page_at(data);
	CHECK(t_out(&v) == 0);
	code(write, sizeof(write));
	CHECK(t_out(&v) == 5 && data[0] == 5);
	protect(data, PROT_READ);
	fault();
	CHECK(data[0] == 5);
	protect(data, PROT_READ | PROT_WRITE);
	CHECK(t_out(&v) == 5);
	unmap(data);
	fault();
	page_at(data);
	code(code_read, sizeof(code_read));
	CHECK(t_out(&v) == 0);
}

/* A file that is cut off behind the mapping: SIGBUS. */
static void truncated(void)
{
	int fd = memfd_create("x", 0);

	NEED(!ftruncate(fd, T_PAGE));
	NEED(mmap(data, T_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == data);
	data[0] = 8;
	CHECK(t_out(&v) == 8);
	NEED(!raw(SYS_ftruncate, (void *)(uintptr_t)fd, 0, 0));
	fault();
	close(fd);
	page_at(data);
	CHECK(t_out(&v) == 0);
}

/* Instructions that copy between memory that has gone and a device. */
static void strings(void)
{
	/* mov si, DATA; mov di, MMIO; movsb; jmp to the start; and the other way */
	static const uint8_t out[] = {0xbe, 0x00, 0x80, 0xbf, 0x00, 0xf0, 0xa4, 0xeb, 0xf7};
	static const uint8_t in[] = {0xbf, 0x00, 0x80, 0xbe, 0x00, 0xf0, 0xa4, 0xeb, 0xf7};

	code(out, sizeof(out));
	data[0] = 6;
	CHECK(!t_run(&v) && v.run->exit_reason == KVM_EXIT_MMIO);
	unmap(data);
	fault();
	page_at(data);
	code(in, sizeof(in));
	CHECK(!t_run(&v) && v.run->exit_reason == KVM_EXIT_MMIO && !v.run->mmio.is_write);
	/* The device's answer has nowhere to go. */
	unmap(data);
	v.run->mmio.data[0] = 9;
	fault();
	page_at(data);
	code(code_read, sizeof(code_read));
	CHECK(t_out(&v) == 0);
}

static void fetches(void)
{
	uint8_t *p = v.code;

	CHECK(t_out(&v) == 0);
	unmap(p);
	fault();
	page_at(p);
	code(code_read, sizeof(code_read));
	CHECK(t_out(&v) == 0);
}

/* Tables that the guest's walk reads and sets A and D bits in. */
static void page_tables(void)
{
	/* again: mov al, [DATA]; out 0x10, al; jmp again */
	static const uint8_t read32[] = {0xa0, 0x00, 0x80, 0, 0, 0xe6, 0x10, 0xeb, 0xf7};
	struct kvm_segment flat = {.limit = 0xffffffff,
				   .selector = 8,
				   .type = 11,
				   .present = 1,
				   .db = 1,
				   .s = 1,
				   .g = 1};
	struct kvm_sregs s, real;
	uint32_t *d = (uint32_t *)pd, *t = (uint32_t *)pt;

	NEED(!ioctl(v.vcpu, KVM_GET_SREGS, &s));
	real = s;
	s.cs = flat;
	flat.type = 3;
	flat.selector = 16;
	s.ds = s.es = s.ss = s.fs = s.gs = flat;
	s.cr0 |= 0x80000001;
	s.cr3 = PD;
	code(read32, sizeof(read32));
	data[0] = 4;
	/* ThreadSanitizer's compare-and-swap holds a lock, which a fault inside it would leave
	 * held. */
	for (int way = 0; way < (dlsym(RTLD_DEFAULT, "__tsan_init") ? 2 : 4); way++) {
		uint8_t *table = way & 1 ? pd : pt;

		memset(pd, 0, T_PAGE);
		memset(pt, 0, T_PAGE);
		d[0] = PT | 3;
		t[1] = CODE | 3;
		t[8] = DATA | 3;
		NEED(!ioctl(v.vcpu, KVM_SET_SREGS, &s));
		t_rewind(&v);
		/* The walk of the second round needs an A bit that the first has not set. */
		CHECK(t_out(&v) == 4);
		CHECK(t_out(&v) == 4 && (t[8] & 0x20) && (d[0] & 0x20));
		d[0] = PT | 3;
		t[1] = CODE | 3;
		t[8] = DATA | 3;
		NEED(!ioctl(v.vcpu, KVM_SET_SREGS, &real));
		NEED(!ioctl(v.vcpu, KVM_SET_SREGS, &s));
		if (way < 2)
			unmap(table);
		else
			protect(table, PROT_READ);
		fault();
		if (way < 2)
			page_at(table);
		else
			protect(table, PROT_READ | PROT_WRITE);
	}
	NEED(!ioctl(v.vcpu, KVM_SET_SREGS, &real));
	code(code_read, sizeof(code_read));
	CHECK(t_out(&v) == 4);
}

/* What ioctls write for the program. */
static void arguments(void)
{
	struct kvm_userspace_memory_region r = {.slot = SLOT_DATA,
						.flags = KVM_MEM_LOG_DIRTY_PAGES,
						.guest_phys_addr = DATA,
						.memory_size = T_PAGE,
						.userspace_addr = (uintptr_t)data};
	uint8_t *p = page_at(NULL);
	struct kvm_dirty_log log = {.slot = SLOT_DATA, .dirty_bitmap = p};

	if (!ioctl(v.vm, KVM_SET_USER_MEMORY_REGION, &r)) {
		CHECK(!ioctl(v.vm, KVM_GET_DIRTY_LOG, &log));
		unmap(p);
		FAILS(ioctl(v.vm, KVM_GET_DIRTY_LOG, &log), EFAULT);
		page_at(p);
		r.flags = 0;
		CHECK(!ioctl(v.vm, KVM_SET_USER_MEMORY_REGION, &r));
	}
	unmap(p);
	FAILS(ioctl(v.vcpu, KVM_GET_REGS, p), EFAULT);
	FAILS(ioctl(v.vcpu, KVM_SET_SREGS, p), EFAULT);
}

int main(void)
{
	data = page_at(NULL);
	pd = page_at(NULL);
	pt = page_at(NULL);
	T_VM(&v, code_read);
	NEED(!t_slot(&v, SLOT_DATA, DATA, T_PAGE, data));
	NEED(!t_slot(&v, SLOT_PD, PD, T_PAGE, pd));
	NEED(!t_slot(&v, SLOT_PT, PT, T_PAGE, pt));
	plain_accesses();
	truncated();
	strings();
	fetches();
	/* Without a TSS a KVM on hardware does not enter protected mode. */
	if (t_preloaded())
		page_tables();
	arguments();
	t_free(&v);
	return t_done();
}
