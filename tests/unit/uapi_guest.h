/* SPDX-License-Identifier: MIT */
/*
 * A guest of one vCPU: 64 KiB of RAM at 0, code at CODE. It starts in real mode, with DS based at
 * MMIO; guest_long_mode() makes it a 64-bit one.
 */
#pragma once

#include "uapi_util.h"

#define CODE  0x1000
#define STACK 0x8000
#define RAM   0x10000
#define MMIO  0x100000ul

struct guest {
	struct dev kvm, vm, vcpu;
	struct kvm_run *run;
	uint8_t *ram;
};

static inline long set_slot(struct guest *g, uint32_t slot, uint32_t flags, uint64_t gpa,
			    uint64_t size, void *hva)
{
	struct kvm_userspace_memory_region r = {
		.slot = slot,
		.flags = flags,
		.guest_phys_addr = gpa,
		.memory_size = size,
		.userspace_addr = (uint64_t)hva,
	};

	return dev_ioctl_p(&g->vm, KVM_SET_USER_MEMORY_REGION, &r);
}

static inline void guest_regs(struct guest *g)
{
	struct kvm_regs regs = {.rip = CODE, .rsp = STACK, .rflags = 2};
	struct kvm_sregs s;

	assert_int_equal(dev_ioctl_p(&g->vcpu, KVM_GET_SREGS, &s), 0);
	s.cs.base = 0;
	s.cs.selector = 0;
	s.ds.base = MMIO;
	s.ds.selector = MMIO >> 4 & 0xffff;
	assert_int_equal(dev_ioctl_p(&g->vcpu, KVM_SET_SREGS, &s), 0);
	assert_int_equal(dev_ioctl_p(&g->vcpu, KVM_SET_REGS, &regs), 0);
}

/* Two steps, for what must be set between them: the VM; its vCPU and RAM. */
static inline void guest_make_vm(struct guest *g)
{
	g->kvm = open_kvm();
	g->vm = make_vm(&g->kvm);
}

static inline void guest_make_rest(struct guest *g)
{
	g->vcpu = make_vcpu(&g->vm, 0);
	g->run = map_run(&g->vcpu);
	g->ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	assert_true(g->ram != MAP_FAILED);
	assert_int_equal(set_slot(g, 0, 0, 0, RAM, g->ram), 0);
	guest_regs(g);
}

static inline void guest_make(struct guest *g, bool irqchip)
{
	guest_make_vm(g);
	if (irqchip)
		assert_int_equal(dev_ioctl(&g->vm, KVM_CREATE_IRQCHIP, 0), 0);
	guest_make_rest(g);
}

static inline void guest_free(struct guest *g)
{
	munmap(g->run, RUN_SIZE);
	dev_close(&g->vcpu);
	dev_close(&g->vm);
	dev_close(&g->kvm);
	munmap(g->ram, RAM);
}

/*
 * 64-bit code at CODE with privilege @cpl: PD_PAGES large pages of 2 MiB that both privileges may
 * use, linear = physical. Page tables are at TABLES, three pages.
 */
#define TABLES   0x2000
#define PD       (TABLES + 0x2000)
#define PD_PAGES 512

static inline uint64_t *guest_table(struct guest *g, unsigned at)
{
	return (uint64_t *)(void *)(g->ram + at);
}

static inline void guest_long_mode(struct guest *g, unsigned cpl)
{
	const struct kvm_segment data = {
		.limit = ~0u, .selector = 0x10, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1};
	struct kvm_regs regs = {.rip = CODE, .rsp = STACK, .rflags = 2};
	struct kvm_sregs s;

	guest_table(g, TABLES)[0] = (TABLES + 0x1000) | 7;
	guest_table(g, TABLES + 0x1000)[0] = PD | 7;
	for (uint64_t i = 0; i < PD_PAGES; i++)
		guest_table(g, PD)[i] = i << 21 | 0x87;
	assert_int_equal(dev_ioctl_p(&g->vcpu, KVM_GET_SREGS, &s), 0);
	s.ds = s.es = s.fs = s.gs = s.ss = s.cs = data;
	s.cs.selector = 8;
	s.cs.type = 11;
	s.cs.db = 0;
	s.cs.l = 1;
	s.cs.dpl = s.ss.dpl = (uint8_t)cpl;
	s.cs.selector |= (uint16_t)cpl;
	s.ss.selector |= (uint16_t)cpl;
	s.cr3 = TABLES;
	s.cr4 |= 1 << 5;
	s.cr0 |= 0x80000001;
	s.efer |= 0x500;
	assert_int_equal(dev_ioctl_p(&g->vcpu, KVM_SET_SREGS, &s), 0);
	assert_int_equal(dev_ioctl_p(&g->vcpu, KVM_SET_REGS, &regs), 0);
}

#define guest_code(g, ...)                                     \
	do {                                                   \
		static const uint8_t code_[] = {__VA_ARGS__};  \
		memcpy((g)->ram + CODE, code_, sizeof(code_)); \
		guest_regs(g);                                 \
	} while (0)

static inline long guest_run(struct guest *g)
{
	return dev_ioctl(&g->vcpu, KVM_RUN, 0);
}

#define assert_exit(g, reason)                                   \
	do {                                                     \
		assert_int_equal(guest_run(g), 0);               \
		assert_int_equal((g)->run->exit_reason, reason); \
	} while (0)

/* What the ioctl returns. */
static inline long guest_set_msr(struct guest *g, uint32_t index, uint64_t data)
{
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry e;
	} m = {.head.nmsrs = 1, .e = {.index = index, .data = data}};

	return dev_ioctl_p(&g->vcpu, KVM_SET_MSRS, &m);
}

static inline uint64_t guest_get_msr(struct guest *g, uint32_t index)
{
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry e;
	} m = {.head.nmsrs = 1, .e = {.index = index}};

	assert_int_equal(dev_ioctl_p(&g->vcpu, KVM_GET_MSRS, &m), 1);
	return m.e.data;
}

static inline struct kvm_regs guest_get(struct guest *g)
{
	struct kvm_regs r;

	assert_int_equal(dev_ioctl_p(&g->vcpu, KVM_GET_REGS, &r), 0);
	return r;
}

static inline void set_vector(struct guest *g, int vector, uint16_t ip)
{
	memcpy(g->ram + 4 * vector, &ip, 2);
	memset(g->ram + 4 * vector + 2, 0, 2);
}
