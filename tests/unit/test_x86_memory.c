/* SPDX-License-Identifier: MIT */
/*
 * The vCPU TLB against the guest's page tables and against the program's changes: what must
 * be dropped, and when (M6, M9).
 */
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/racepoint.h"
#include "host/cpu.h"
#include "host/thread.h"
#include "mem/notifier.h"
#include "x86/fpu.h"
#include "x86_env.h"

#define PTE(lin) (TABLES + 0x3000 + ((lin) >> 9))
#define A        0x20000ul
#define B        0x21000ul

/* rax = [A]; PTE of A = rsi; drop; rbx = [A] */
static void remap(struct env *e)
{
	mode64(e, 0);
	e->mem[A] = 0xaa;
	e->mem[B] = 0xbb;
	e->v->gpr[KL_RSI] = B | 7;
	e->v->gpr[KL_RDI] = A;
	e->v->gpr[KL_RDX] = PTE(A);
	e->v->gpr[KL_RCX] = TABLES;
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->gpr[KL_RAX] & 0xff, 0xaa);
	assert_int_equal(e->v->gpr[KL_RBX] & 0xff, 0xbb);
}

static void invlpg(void **state)
{
	struct env *e = *state;

	/* mov al, [rdi]; mov [rdx], rsi; invlpg [rdi]; mov bl, [rdi]; hlt */
	env_code(e, 0x8a, 0x07, 0x48, 0x89, 0x32, 0x0f, 0x01, 0x3f, 0x8a, 0x1f, 0xf4);
	remap(e);
}

static void write_cr3(void **state)
{
	struct env *e = *state;

	/* mov al, [rdi]; mov [rdx], rsi; mov cr3, rcx; mov bl, [rdi]; hlt */
	env_code(e, 0x8a, 0x07, 0x48, 0x89, 0x32, 0x0f, 0x22, 0xd9, 0x8a, 0x1f, 0xf4);
	remap(e);
}

/* INVLPG of one address drops the whole large page. */
static void invlpg_large(void **state)
{
	struct env *e = *state;

	/* mov al, [rdi]; mov al, [rdi+0x5000]; mov [rdx], rsi; invlpg [rdi+0x5000]; mov bl, [rdi]
	 */
	env_code(e, 0x8a, 0x07, 0x8a, 0x87, 0, 0x50, 0, 0, 0x48, 0x89, 0x32, 0x0f, 0x01, 0xbf, 0,
		 0x50, 0, 0, 0x8a, 0x1f, 0xf4);
	mode64(e, 0);
	e->mem[0x300000] = 0x11;
	e->mem[0x100000] = 0x22;
	put64(e, TABLES + 0x2008, 0x200000 | 0x87); /* 2 MiB at 0x200000 */
	e->v->gpr[KL_RDI] = 0x300000;
	e->v->gpr[KL_RSI] = 0x87; /* then the first 2 MiB */
	e->v->gpr[KL_RDX] = TABLES + 0x2008;
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->gpr[KL_RBX] & 0xff, 0x22);
}

/* A read does not make the page writable in the TLB before D is set. */
static void dirty_bit(void **state)
{
	struct env *e = *state;

	/*
	 * mov [rdi], al; mov [rdx], rsi; invlpg [rdi] -- writable in stage 2, clean in the PTE
	 * mov al, [rdi]; mov rbx, [rdx]; mov [rdi], al; mov rcx, [rdx]; hlt
	 */
	env_code(e, 0x88, 0x07, 0x48, 0x89, 0x32, 0x0f, 0x01, 0x3f, 0x8a, 0x07, 0x48, 0x8b, 0x1a,
		 0x88, 0x07, 0x48, 0x8b, 0x0a, 0xf4);
	mode64(e, 0);
	e->v->gpr[KL_RDI] = A;
	e->v->gpr[KL_RSI] = A | 7;
	e->v->gpr[KL_RDX] = PTE(A);
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->gpr[KL_RBX] & 0x60, 0x20);
	assert_int_equal(e->v->gpr[KL_RCX] & 0x60, 0x60);
}

/* Ring 3 uses nothing that ring 0 left in the TLB, and delivery nothing of ring 3's. */
static void privilege(void **state)
{
	struct env *e = *state;

	env_code(e, 0x8a, 0x04, 0x25, 0, 0x20, 0x10, 0, 0xf4); /* mov al, [P_SUPER]; hlt */
	mode64(e, 0);
	assert_run(e, KVM_EXIT_HLT);
	mode64(e, 3);
	put64(e, TSS + 4, P_SUPER + 0x1000); /* the ring 0 stack is a supervisor page */
	assert_vector(e, 14);
	assert_int_equal(e->v->gpr[KL_RSP], P_SUPER + 0x1000 - 48);
}

static void smap(void **state)
{
	struct env *e = *state;

	/* mov al, [A] (user page); stac: see below */
	env_code(e, 0x0f, 0x01, 0xcb, 0x8a, 0x04, 0x25, 0, 0, 2, 0, 0x0f, 0x01, 0xca, 0x8a, 0x04,
		 0x25, 0, 0, 2, 0, 0xf4); /* stac; mov; clac; mov */
	mode64(e, 0);
	if (e->v->cr4_reserved & KL_CR4_SMAP)
		return; /* the host has none */
	/* Stack, tables and code must be the supervisor's then. */
	for (uint64_t p = 0; p < 0x20000; p += 0x1000)
		put64(e, PTE(p), p | 3);
	e->v->cr4 |= KL_CR4_SMAP;
	kl_tlb_flush(e->v);
	assert_vector(e, 14);
	assert_int_equal(get64(e, e->v->gpr[KL_RSP]), 1);
	assert_int_equal(get64(e, e->v->gpr[KL_RSP] + 8), CODE + 13);
	assert_int_equal(e->v->cr2, A);
}

/* Page tables in ROM: the guest runs, A and D are not set. */
static void tables_in_rom(void **state)
{
	struct env *e = *state;

	env_code(e, 0x88, 0x04, 0x25, 0, 0, 2, 0, 0xf4); /* mov [A], al; hlt */
	mode64(e, 0);
	assert_int_equal(env_slot(e, 0, 0, 0, 0, e->mem), 0);
	assert_int_equal(env_slot(e, 0, 0, 0, TABLES, e->mem), 0);
	assert_int_equal(env_slot(e, 1, KVM_MEM_READONLY, TABLES, 0x4000, e->mem + TABLES), 0);
	assert_int_equal(
		env_slot(e, 2, 0, TABLES + 0x4000, MEM - TABLES - 0x4000, e->mem + TABLES + 0x4000),
		0);
	e->v->gpr[KL_RAX] = 0x77;
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->mem[A], 0x77);
	assert_int_equal(get64(e, PTE(A)), A | 7);
}

/* A page table where there is no slot. */
static void tables_nowhere(void **state)
{
	struct env *e = *state;

	env_code(e, 0x8a, 0x04, 0x25, 0, 0, 0x40, 0);
	mode64(e, 0);
	put64(e, TABLES + 0x2010, MMIO_GPA | 7);
	assert_run(e, KVM_EXIT_INTERNAL_ERROR);
	assert_int_equal(e->v->exit.internal.suberror, KVM_INTERNAL_ERROR_EMULATION);
}

static void iret_stack_segment(void **state)
{
	struct env *e = *state;
	uint64_t f[5] = {0x1100, SEL_UCODE, 2, STACK, SEL_DATA};

	env_code(e, 0x48, 0xcf);
	mode64(e, 0);
	memcpy(e->mem + STACK, f, sizeof(f));
	assert_vector(e, 13);
	assert_int_equal(get64(e, e->v->gpr[KL_RSP]), SEL_DATA);
	assert_int_equal(get64(e, e->v->gpr[KL_RSP] + 8), CODE);
}

/* Until the guest halts; a read of the hole answers 0. */
static void *runner(void *arg)
{
	struct env *e = arg;

	for (;;) {
		if (env_run(e))
			return NULL;
		if (e->v->exit.reason != KVM_EXIT_MMIO)
			return e;
		memset(e->v->exit.mmio.data, 0, 8);
	}
}

#define POISON 0xdeadul
#define STOP   (~0ul)

static void poke(uint8_t *page, uint64_t val)
{
	__atomic_store_n((uint64_t *)(void *)page, val, __ATOMIC_SEQ_CST);
}

/*
 * A slot goes away and comes back with other memory while the guest reads it. Once the change
 * has returned nothing reads the old memory: what is written there then is never seen (S8).
 */
static void slot_change_while_running(void **state)
{
	struct env *e = *state;
	uint64_t *count = (uint64_t *)(void *)(e->mem + A);
	uint8_t *page[2];
	unsigned cur = 0;
	pthread_t t;
	void *r;

	/* 1: inc [rsi]; mov rax, [rdi]; cmp rax, rbx; je 2f; cmp rax, rcx; jne 1b; 2: hlt */
	env_code(e, 0x48, 0xff, 0x06, 0x48, 0x8b, 0x07, 0x48, 0x39, 0xd8, 0x74, 0x05, 0x48, 0x39,
		 0xc8, 0x75, 0xf0, 0xf4);
	mode64(e, 0);
	for (unsigned i = 0; i < 2; i++) {
		page[i] = mmap(NULL, 0x1000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			       -1, 0);
		assert_true(page[i] != MAP_FAILED);
	}
	assert_int_equal(env_slot(e, 1, 0, MMIO_GPA, 0x1000, page[cur]), 0);
	e->v->gpr[KL_RDI] = P_MMIO;
	e->v->gpr[KL_RSI] = A;
	e->v->gpr[KL_RBX] = POISON;
	e->v->gpr[KL_RCX] = STOP;
	assert_int_equal(pthread_create(&t, NULL, runner, e), 0);
	for (unsigned n = 0; n < 200; n++) {
		uint64_t seen = __atomic_load_n(count, __ATOMIC_RELAXED);

		for (unsigned i = 0;
		     i < 1000 && __atomic_load_n(count, __ATOMIC_RELAXED) < seen + 3; i++)
			sched_yield();
		assert_int_equal(env_slot(e, 1, 0, MMIO_GPA, 0, NULL), 0);
		poke(page[cur], POISON);
		cur ^= 1;
		poke(page[cur], 0);
		assert_int_equal(env_slot(e, 1, 0, MMIO_GPA, 0x1000, page[cur]), 0);
	}
	poke(page[cur], STOP);
	assert_int_equal(pthread_join(t, &r), 0);
	assert_ptr_equal(r, e);
	assert_int_equal(e->v->exit.reason, KVM_EXIT_HLT);
	assert_int_equal(e->v->gpr[KL_RAX], STOP);
	assert_true(*count > 200);
	munmap(page[0], 0x1000);
	munmap(page[1], 0x1000);
}

/*
 * An operand in two pages that are no neighbours in the host; the second can't be written,
 * from the beginning or (@late) as soon as the instruction has looked. It is not executed in
 * part, however often it is tried.
 */
static void split_operand(struct env *e, unsigned first, bool late)
{
	uint8_t *host =
		mmap(NULL, 0x2000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint8_t *low = host + 0x2000 - first, *high = host;
	uint64_t val = 0x00fffffffffffffe, seen = 0;
	pthread_t t;
	void *r;

	env_code(e, 0x48, 0x01, 0x07, 0xf4); /* add [rdi], rax; hlt */
	mode64(e, 0);
	assert_true(host != MAP_FAILED);
	assert_int_equal(env_slot(e, 1, 0, MMIO_GPA, 0x1000, host + 0x1000), 0);
	assert_int_equal(env_slot(e, 2, 0, MMIO_GPA + 0x1000, 0x1000, host), 0);
	e->v->gpr[KL_RAX] = 3;
	e->v->gpr[KL_RDI] = P_MMIO + 0x1000 - first;
	assert_run(e, KVM_EXIT_HLT); /* both pages are mapped now */
	e->v->rip = CODE;
	memcpy(low, &val, first);
	memcpy(high, (uint8_t *)&val + first, 8 - first);
	if (late) {
		kl_racepoint_arm("split-store", 1);
		assert_int_equal(pthread_create(&t, NULL, runner, e), 0);
		assert_true(kl_racepoint_wait("split-store", 10000));
		assert_int_equal(mprotect(host, 0x1000, PROT_READ), 0);
		kl_racepoint_release("split-store");
		assert_int_equal(pthread_join(t, &r), 0);
		assert_null(r);
	} else {
		assert_int_equal(mprotect(host, 0x1000, PROT_READ), 0);
	}
	for (unsigned i = 0; i < 3; i++) {
		assert_int_equal(env_run(e), -EFAULT);
		memcpy(&seen, low, first);
		memcpy((uint8_t *)&seen + first, high, 8 - first);
		assert_int_equal(seen, val);
	}
	assert_int_equal(mprotect(host, 0x1000, PROT_READ | PROT_WRITE), 0);
	assert_run(e, KVM_EXIT_HLT);
	memcpy(&seen, low, first);
	memcpy((uint8_t *)&seen + first, high, 8 - first);
	assert_int_equal(seen, val + 3);
	assert_int_equal(env_slot(e, 1, 0, MMIO_GPA, 0, NULL), 0);
	assert_int_equal(env_slot(e, 2, 0, MMIO_GPA + 0x1000, 0, NULL), 0);
	munmap(host, 0x2000);
}

static void split_store_is_whole(void **state)
{
	for (unsigned first = 1; first < 8; first++) {
		split_operand(*state, first, false);
		if (kl_racepoints_enabled())
			split_operand(*state, first, true);
	}
}

/*
 * A locked operation on two pages that are no neighbours in the host: another vCPU that comes in
 * the middle of it waits, and sees it whole.
 */
static void locked_split_is_alone(void **state)
{
	struct env *e = *state, other = *e;
	uint8_t *host =
		mmap(NULL, 0x2000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	const uint64_t val = 0x00000000ffffffff;
	struct kvm_sregs s;
	pthread_t t[2];
	void *r;

	assert_true(host != MAP_FAILED);
	assert_int_equal(env_slot(e, 1, 0, MMIO_GPA, 0x1000, host + 0x1000), 0);
	assert_int_equal(env_slot(e, 2, 0, MMIO_GPA + 0x1000, 0x1000, host), 0);
	memcpy(host + 0x1ffc, &val, 4);
	memcpy(host, (uint8_t *)&val + 4, 4);
	env_code(e, 0xf0, 0x48, 0x01, 0x07, 0xf4); /* lock add [rdi], rax; hlt */
	mode64(e, 0);
	e->v->gpr[KL_RAX] = 1;
	e->v->gpr[KL_RDI] = P_MMIO + 0xffc;
	memcpy(e->mem + CODE + 0x100, (const uint8_t[]){0x48, 0x8b, 0x07, 0xf4},
	       4); /* mov rax, [rdi] */
	assert_int_equal(kl_x86_vcpu_create(e->vm, 1, &other.v), 0);
	kl_x86_get_sregs(e->v, &s);
	assert_int_equal(kl_x86_set_sregs(other.v, &s), 0);
	atomic_store(&other.v->mp_state, KVM_MP_STATE_RUNNABLE);
	enter_at(&other, CODE + 0x100, STACK);
	other.v->gpr[KL_RDI] = P_MMIO + 0xffc;

	if (kl_racepoints_enabled())
		kl_racepoint_arm("split-store", 1);
	assert_int_equal(pthread_create(&t[0], NULL, runner, e), 0);
	if (kl_racepoints_enabled()) {
		assert_true(kl_racepoint_wait("split-store", 10000));
		kl_racepoint_arm("vcpu-stopped", 1);
		assert_int_equal(pthread_create(&t[1], NULL, runner, &other), 0);
		assert_true(kl_racepoint_wait("vcpu-stopped", 10000));
		kl_racepoint_release("split-store");
		kl_racepoint_release("vcpu-stopped");
		assert_int_equal(pthread_join(t[1], &r), 0);
		assert_non_null(r);
		assert_int_equal(other.v->gpr[KL_RAX], val + 1);
	}
	assert_int_equal(pthread_join(t[0], &r), 0);
	assert_non_null(r);
	assert_int_equal(*(uint32_t *)(host + 0x1ffc), 0);
	assert_int_equal(*(uint32_t *)host, 1);
	assert_int_equal(e->vm->mem.alone, 0);
	assert_int_equal(kl_vcpu_requests(&e->v->core) & KL_REQ_STOP, 0);
	assert_int_equal(env_slot(e, 1, 0, MMIO_GPA, 0, NULL), 0);
	assert_int_equal(env_slot(e, 2, 0, MMIO_GPA + 0x1000, 0, NULL), 0);
	munmap(host, 0x2000);
	kl_x86_vcpu_destroy(other.v);
}

/* The same for a plain store where the pages are neighbours; and code in the second one. */
static void store_across_neighbours(void **state)
{
	struct env *e = *state;

	env_code(e, 0x48, 0x89, 0x07, 0xf4); /* mov [rdi], rax; hlt */
	for (unsigned i = 0; i < 2; i++) {
		mode64(e, 0);
		put64(e, B - 4, 0x1111111111111111);
		e->v->gpr[KL_RDI] = B - 4;
		e->v->gpr[KL_RAX] = 0x8877665544332211;
		if (i) {
			e->v->rip = CODE;
			assert_int_equal(mprotect(e->mem + B, 0x1000, PROT_READ), 0);
			assert_int_equal(env_run(e), -EFAULT);
			assert_int_equal(get64(e, B - 4), 0x1111111111111111);
			assert_int_equal(mprotect(e->mem + B, 0x1000, PROT_READ | PROT_WRITE), 0);
		}
		assert_run(e, KVM_EXIT_HLT);
		assert_true(get64(e, B - 4) == 0x8877665544332211);
	}
	/* mov [rdi], rax; inc ebx -> inc ecx; hlt: the store changes what follows it */
	memcpy(e->mem + B, "\x48\x89\x07\xff\xc3\xf4", 6);
	mode64(e, 0);
	e->v->rip = B;
	e->v->gpr[KL_RDI] = B - 3;
	e->v->gpr[KL_RAX] = 0xc1ff078948000000; /* ff c1 in place of ff c3 */
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->gpr[KL_RBX], 0);
	assert_int_equal(e->v->gpr[KL_RCX], 1);
}

/* What follows 4 GiB - 1 is 0, for every part of an operand and for the tables' entries. */
static void linear_addresses_wrap(void **state)
{
	static const struct {
		uint8_t code[8];
		unsigned at; /* of the operand's first byte, before 4 GiB */
	} t[] = {
		{{0x66, 0x0f, 0xf7, 0xc1, 0xf4}, 4},  /* maskmovdqu xmm0, xmm1 */
		{{0x0f, 0xf7, 0xc1, 0xf4}, 4},        /* maskmovq mm0, mm1 */
		{{0x0f, 0x01, 0x17, 0xf4}, 2},        /* lgdt [edi] */
		{{0xff, 0x2f}, 4},                    /* jmp far [edi] */
		{{0x0f, 0xb4, 0x07, 0xf4}, 4},        /* lfs eax, [edi] */
		{{0x62, 0x07, 0xf4}, 4},              /* bound eax, [edi] */
		{{0x01, 0x07, 0xf4}, 2},              /* add [edi], eax */
		{{0xdd, 0x37, 0xf4}, 2},              /* fnsave [edi] */
		{{0x66, 0x0f, 0x7f, 0x07, 0xf4}, 16}, /* movdqa [edi], xmm0: does not wrap */
		{{0xf3, 0x0f, 0x7f, 0x07, 0xf4}, 8},  /* movdqu [edi], xmm0 */
	};
	struct env *e = *state;
	uint8_t *top = mmap(NULL, 0x4000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
			    0),
		*end = top + 0x2000;
	struct kvm_sregs s;

	assert_true(top != MAP_FAILED);
	assert_int_equal(env_slot(e, 1, 0, 0xffffe000, 0x4000, top), 0);
	for (unsigned i = 0; i < KL_ARRAY_SIZE(t); i++) {
		uint32_t handler = HANDLER(0), gdt = GDT, zero = 0;

		memcpy(e->mem + CODE, t[i].code, sizeof(t[i].code));
		mode32(e, 0);
		kl_x86_get_sregs(e->v, &s);
		s.ds.base = 0xfffff000;
		s.cr4 |= KL_CR4_OSFXSR;
		assert_int_equal(kl_x86_set_sregs(e->v, &s), 0);
		e->v->gpr[KL_RDI] = 0x1000 - t[i].at;
		e->v->gpr[KL_RAX] = 0x10000;
		memset(e->v->xsave + 32, 0xee, 128 + 256); /* registers */
		memset(e->mem, 0, 64);
		memset(top, 0, 0x4000);
		switch (i) {
		case 2:
			memcpy(e->mem, &gdt, 4);
			break;
		case 3:
		case 4:
			memcpy(end - 4, &handler, 4);
			e->mem[0] = i == 3 ? SEL_CODE : SEL_DATA;
			break;
		case 5:
			memcpy(end - 4, &zero, 4);
			e->mem[2] = 2;
			break;
		default:
			break;
		}
		assert_run(e, KVM_EXIT_HLT);
		switch (i) {
		case 2:
			assert_int_equal(e->v->gdt.base, GDT);
			break;
		case 3:
			assert_int_equal(e->v->rip, HANDLER(0) + 1);
			break;
		case 4:
			assert_int_equal(e->v->seg[KL_FS].selector, SEL_DATA);
			break;
		case 5:
			assert_int_equal(e->v->rip, CODE + 3);
			break;
		case 6:
			assert_int_equal(e->mem[0], 1);
			break;
		default:
			assert_true(end[-1]);
			assert_true(!!e->mem[0] == (i != 8));
		}
		assert_int_equal(end[0], 0); /* 4 GiB */
	}
	for (unsigned i = 0; i < 3; i++) {
		env_code(e, 0x0f, 0x0b);
		mode32(e, 3);
		kl_x86_get_sregs(e->v, &s);
		switch (i) {
		case 0:
			s.idt.base = 0xffffffd0;
			memcpy(e->mem, e->mem + IDT + 6 * 8, 8);
			break;
		case 1:
			s.gdt.base = 0xfffffff8;
			memcpy(e->mem, e->mem + GDT + 8, 16);
			break;
		default:
			s.tr.base = 0xfffffffc;
			memcpy(e->mem, e->mem + TSS + 4, 8);
			break;
		}
		assert_int_equal(kl_x86_set_sregs(e->v, &s), 0);
		assert_vector(e, 6);
		assert_int_equal(e->v->gpr[KL_RSP], STACK0 - 20);
	}
	assert_int_equal(env_slot(e, 1, 0, 0xffffe000, 0, NULL), 0);
	munmap(top, 0x4000);
}

/*
 * M6: a vCPU that blocks while it sets an accessed bit in a page table (userfaultfd has the page
 * write-protected) can be called out of guest mode, like one that blocks in a store.
 */
static void blocked_in_page_table(void **state)
{
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP};
	struct env *e = *state;
	struct uffdio_register reg = {.range = {(uint64_t)e->mem + TABLES + 0x3000, KL_PAGE_SIZE},
				      .mode = UFFDIO_REGISTER_MODE_WP};
	struct uffdio_writeprotect wp = {.range = reg.range, .mode = UFFDIO_WRITEPROTECT_MODE_WP};
	struct kl_notifier_range r = {.start = (uint64_t)e->mem + A,
				      .end = (uint64_t)e->mem + A + KL_PAGE_SIZE,
				      .may_block = true};
	struct uffd_msg msg;
	pthread_t t;

	/* TSan holds the kick back from a thread that blocks in a page fault. */
	if (KL_TSAN || uffd < 0 || ioctl(uffd, UFFDIO_API, &api)) {
		close(uffd);
		return; /* a skip would be "not ok" in TAP */
	}
	/* 1: incq [A]; cmpb [A + 0x800], 0; je 1b; mov al, [B]; hlt */
	env_code(e, 0x48, 0xff, 0x04, 0x25, 0, 0, 2, 0, 0x80, 0x3c, 0x25, 0, 8, 2, 0, 0, 0x74, 0xee,
		 0x8a, 0x04, 0x25, 0, 0x10, 2, 0, 0xf4);
	mode64(e, 0);
	pthread_create(&t, NULL, env_thread, e);
	while (!__atomic_load_n((uint64_t *)(e->mem + A), __ATOMIC_RELAXED))
		sched_yield();
	assert_int_equal(ioctl(uffd, UFFDIO_REGISTER, &reg), 0);
	assert_int_equal(ioctl(uffd, UFFDIO_WRITEPROTECT, &wp), 0);
	__atomic_store_n(e->mem + A + 0x800, 1, __ATOMIC_RELAXED);
	while (read(uffd, &msg, sizeof(msg)) != sizeof(msg)) /* it blocks */
		sched_yield();
	kl_engine_enter();
	assert_int_equal(kl_notifier_begin(&r), 0);
	kl_notifier_end(&r);
	kl_engine_leave();
	wp.mode = 0;
	assert_int_equal(ioctl(uffd, UFFDIO_WRITEPROTECT, &wp), 0);
	pthread_join(t, NULL);
	assert_true(e->mem[TABLES + 0x3000 + (B >> 9)] & 0x20);
	close(uffd);
}

/*
 * M4: an exchange finds no memory; a slot appears there before it reads; another thread stores
 * before it writes. It is one access all the same: what was stored is what it gets.
 */
static void memory_appears_under_exchange(void **state)
{
	struct env *e = *state;
	uint32_t *page = mmap(NULL, KL_PAGE_SIZE, PROT_READ | PROT_WRITE,
			      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	pthread_t t;

	assert_true(page != MAP_FAILED);
	*page = 5;
	env_code(e, 0x87, 0x07, 0xf4); /* xchg [rdi], eax; hlt */
	mode64(e, 0);
	e->v->gpr[KL_RDI] = P_MMIO;
	e->v->gpr[KL_RAX] = 1;
	if (kl_racepoints_enabled()) {
		kl_racepoint_arm("rmw-no-pointer", 1);
		kl_racepoint_arm("write-translated", 1);
		pthread_create(&t, NULL, env_thread, e);
		assert_true(kl_racepoint_wait("rmw-no-pointer", 10000));
		assert_int_equal(env_slot(e, 1, 0, MMIO_GPA, KL_PAGE_SIZE, page), 0);
		kl_racepoint_release("rmw-no-pointer");
		assert_true(kl_racepoint_wait("write-translated", 10000));
		__atomic_store_n(page, 100, __ATOMIC_SEQ_CST);
		kl_racepoint_release("write-translated");
		pthread_join(t, NULL);
		assert_int_equal(e->v->exit.reason, KVM_EXIT_HLT);
		assert_int_equal(e->v->gpr[KL_RAX], 100);
		assert_int_equal(*page, 1);
		assert_int_equal(env_slot(e, 1, 0, MMIO_GPA, 0, NULL), 0);
	}
	munmap(page, KL_PAGE_SIZE);
}

/*
 * What this processor's family does: natural alignment, 16 for vectors of any size (AMD) or none
 * (Intel), 8 for 10 bytes, and before a page fault.
 */
static void alignment_check(void **state)
{
	const struct {
		uint8_t code[5];
		unsigned align;
	} t[] = {
		{{0x8a, 0x07, 0xcc}, 1},             /* mov al, [rdi] */
		{{0x66, 0x8b, 0x07, 0xcc}, 2},       /* mov ax, [rdi] */
		{{0x89, 0x07, 0xcc}, 4},             /* mov [rdi], eax */
		{{0x48, 0x8b, 0x07, 0xcc}, 8},       /* mov rax, [rdi] */
		{{0xf0, 0x48, 0xff, 0x07, 0xcc}, 8}, /* lock inc qword [rdi] */
		/* movups xmm0, [rdi] */
		{{0x0f, 0x10, 0x07, 0xcc}, kl_host_is_intel() ? 1 : 16},
		{{0xdb, 0x2f, 0xcc}, 8}, /* fld tbyte [rdi] */
		{{0xd9, 0x37, 0xcc}, 4}, /* fnstenv [rdi] */
		{{0x48, 0xa7, 0xcc}, 8}, /* cmpsq */
	};
	struct env *e = *state;

	for (unsigned i = 0; i < KL_ARRAY_SIZE(t); i++) {
		for (unsigned off = 0; off < 17; off++) {
			memcpy(e->mem + CODE, t[i].code, 5);
			mode64(e, 3);
			e->v->cr0 |= KL_CR0_AM;
			enter_at(e, CODE, STACK - 0x800);
			e->v->rflags |= KL_FL_AC;
			kl_x86_update_mode(e->v);
			e->v->gpr[KL_RDI] = 0x5000 + off;
			e->v->gpr[KL_RSI] = 0x5100;
			assert_run(e, KVM_EXIT_HLT);
			assert_int_equal(e->v->rip, HANDLER(off % t[i].align ? 17 : 3) + 1);
			if (off % t[i].align)
				assert_int_equal(get64(e, e->v->gpr[KL_RSP]), 0);
		}
	}
	env_code(e, 0x8b, 0x07, 0xcc);
	for (unsigned i = 0; i < 4; i++) {
		mode64(e, i == 3 ? 0 : 3);
		e->v->cr0 |= i == 1 ? 0 : KL_CR0_AM;
		enter_at(e, CODE, STACK - 0x800);
		e->v->rflags |= i == 2 ? 0 : KL_FL_AC;
		kl_x86_update_mode(e->v);
		e->v->gpr[KL_RDI] = P_ABSENT + 1;
		assert_vector(e, i == 0 ? 17 : 14);
	}
	/* A store that an unmasked exception withholds is checked all the same, but not by Intel.
	 */
	env_code(e, 0xd9, 0x17, 0xcc); /* fst dword [rdi], of an empty register */
	for (unsigned off = 0; off < 5; off++) {
		mode64(e, 3);
		e->v->cr0 |= KL_CR0_AM;
		enter_at(e, CODE, STACK - 0x800);
		e->v->rflags |= KL_FL_AC;
		kl_x86_update_mode(e->v);
		kl_fpu_reset(e->v);
		memcpy(e->v->xsave, "\x40\x03", 2);
		e->v->gpr[KL_RDI] = 0x5000 + off;
		assert_vector(e, off % 4 && !kl_host_is_intel() ? 17 : 3);
	}
}

/* AMD's processors look at the offset before they add the base of FS or GS. */
static void offset_is_canonical(void **state)
{
	static const struct {
		uint64_t base, offset;
		bool ok;
	} t[] = {
		{0xffff900000000000, A + 0x700000000000, true},
		{0xffff800000000000, A + 0x800000000000, false},
		{A + 0x800, 0xfffffffffffff800, true},
	};
	struct env *e = *state;

	/* mov al, [A]; mov al, gs:[rdi]; int3: the TLB knows the page by then */
	env_code(e, 0x8a, 0x04, 0x25, 0, 0, 2, 0, 0x65, 0x8a, 0x07, 0xcc);
	for (unsigned i = 0; i < KL_ARRAY_SIZE(t); i++) {
		mode64(e, 0);
		e->v->seg[KL_GS].base = t[i].base;
		e->v->gpr[KL_RDI] = t[i].offset;
		assert_vector(e, t[i].ok || kl_host_is_intel() ? 3 : 13);
	}
}

/* POP's first operand is the stack: whatever is wrong with the other, #SS comes first. */
static void pop_from_nowhere(void **state)
{
	struct env *e = *state;

	/* pop fs:[rsp + r9 * 8 + 0x4c] */
	env_code(e, 0x64, 0x4a, 0x8f, 0x44, 0xcc, 0x4c);
	mode64(e, 3); /* #SS has a stack of its own there */
	e->v->gpr[KL_RSP] = 0x215b4108a8346920;
	e->v->gpr[KL_R9] = -23ul;
	assert_vector(e, 12);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, env_setup, env_teardown)
	const struct CMUnitTest tests[] = {
		TEST(invlpg),
		TEST(write_cr3),
		TEST(invlpg_large),
		TEST(dirty_bit),
		TEST(privilege),
		TEST(smap),
		TEST(tables_in_rom),
		TEST(tables_nowhere),
		TEST(iret_stack_segment),
		TEST(slot_change_while_running),
		TEST(split_store_is_whole),
		TEST(locked_split_is_alone),
		TEST(store_across_neighbours),
		TEST(alignment_check),
		TEST(linear_addresses_wrap),
		TEST(offset_is_canonical),
		TEST(pop_from_nowhere),
		TEST(blocked_in_page_table),
		TEST(memory_appears_under_exchange),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
