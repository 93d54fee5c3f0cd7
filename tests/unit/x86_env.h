/* SPDX-License-Identifier: MIT */
/*
 * One vCPU on the real engine, without uapi: MEM bytes of RAM at guest-physical 0, and
 * builders for the usual modes. Code lies at CODE; the handler of vector n is a HLT at
 * HANDLER(n), so that an event ends in KVM_EXIT_HLT with its frame on the stack.
 */
#pragma once

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <cmocka.h>

#include "host/guard.h"
#include "mem/notifier_gate.h"
#include "mem/vm.h"
#include "x86/access.h"
#include "x86/irqchip.h"
#include "x86/vcpu.h"

#define MEM        0x400000ul
#define CODE       0x1000ul
#define IDT        0x2000ul
#define GDT        0x3000ul
#define TSS        0x4000ul
#define STACK0     0x8000ul /* ring 0, from the TSS */
#define STACK      0x7000ul
#define IST1       0x6000ul
#define HANDLER(n) (0x9000ul + (n))
#define TABLES     0x10000ul

/* Pages of the 64-bit guest that differ from "present, writable, user". */
#define P_ABSENT 0x100000ul
#define P_RO     0x101000ul
#define P_SUPER  0x102000ul
#define P_NX     0x103000ul
#define P_MMIO   0x104000ul /* -> MMIO_GPA, and the page behind it -> MMIO_GPA + 4096 */
#define MMIO_GPA 0x10000000ul

#define SEL_CODE    0x08
#define SEL_DATA    0x10
#define SEL_CODE32  0x18
#define SEL_TSS     0x20
#define SEL_UDATA   0x33
#define SEL_UCODE   0x3b
#define SEL_UCODE32 0x43

struct env {
	struct kl_x86_vm *vm;
	struct kl_vcpu *v;
	uint8_t *mem;
};

static inline void put64(struct env *e, uint64_t gpa, uint64_t val)
{
	memcpy(e->mem + gpa, &val, 8);
}

static inline uint64_t get64(struct env *e, uint64_t gpa)
{
	uint64_t val;

	memcpy(&val, e->mem + gpa, 8);
	return val;
}

static inline int env_slot(struct env *e, uint32_t id, uint32_t flags, uint64_t gpa, uint64_t size,
			   void *hva)
{
	struct kl_uapi_memory_region2 r = {id, flags, gpa, size, (uint64_t)hva, 0, 0, 0, {0}};

	return kl_set_memory_region(&e->vm->mem, &r);
}

static inline int env_make(void **state, bool irqchip)
{
	struct env *e = calloc(1, sizeof(*e));
	struct kvm_cpuid_entry2 cpuid[100];
	int n;

	*state = e;
	if (kl_guard_init())
		return -1;
	e->vm = calloc(1, sizeof(*e->vm));
	e->mem = mmap(NULL, MEM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (e->mem == MAP_FAILED || kl_x86_vm_init(e->vm) || env_slot(e, 0, 0, 0, MEM, e->mem))
		return -1;
	if (irqchip) {
		kl_mutex_lock(&e->vm->lock);
		if (kl_irqchip_create_split(e->vm, 24))
			return -1;
		kl_mutex_unlock(&e->vm->lock);
	}
	if (kl_x86_vcpu_create(e->vm, 0, &e->v))
		return -1;
	n = kl_x86_supported_cpuid(cpuid, 100);
	return n <= 0 || kl_x86_set_cpuid(e->v, cpuid, (unsigned)n);
}

static inline int env_setup(void **state)
{
	return env_make(state, false);
}

/* With a local APIC, and no other interrupt controller in the engine: HLT waits in KVM_RUN. */
static inline int env_setup_apic(void **state)
{
	return env_make(state, true);
}

static inline int env_teardown(void **state)
{
	struct env *e = *state;

	kl_notifier_remove_vm(&e->vm->mem);
	kl_x86_vcpu_destroy(e->v);
	kl_irqchip_destroy(e->vm);
	kl_x86_vm_destroy(e->vm);
	munmap(e->mem, MEM);
	free(e->vm);
	free(e);
	return 0;
}

#define env_code(e, ...)                                       \
	do {                                                   \
		static const uint8_t code_[] = {__VA_ARGS__};  \
		memcpy((e)->mem + CODE, code_, sizeof(code_)); \
	} while (0)

static inline uint64_t descriptor(unsigned type, unsigned dpl, bool l, bool db)
{
	return 0xffff | (uint64_t)(0x90 | type | dpl << 5) << 40 |
	       (uint64_t)(0x8f | (l ? 0x20 : 0) | (db ? 0x40 : 0)) << 48;
}

/* GDT and TSS; handlers. @wide: 64-bit TSS. */
static inline void build_tables(struct env *e, bool wide)
{
	put64(e, GDT + 8, descriptor(0xb, 0, wide, !wide));
	put64(e, GDT + 16, descriptor(0x3, 0, false, true));
	put64(e, GDT + 24, descriptor(0xb, 0, false, true));
	put64(e, GDT + 0x20, 0x67 | TSS << 16 | 0x8bull << 40);
	put64(e, GDT + 0x28, 0);
	put64(e, GDT + 0x30, descriptor(0x3, 3, false, true));
	put64(e, GDT + 0x38, descriptor(0xb, 3, wide, !wide));
	put64(e, GDT + 0x40, descriptor(0xb, 3, false, true));
	memset(e->mem + TSS, 0, 0x68);
	if (wide) {
		put64(e, TSS + 4, STACK0);
		put64(e, TSS + 0x24, IST1);
	} else {
		put64(e, TSS + 4, STACK0 | (uint64_t)SEL_DATA << 32);
	}
	memset(e->mem + HANDLER(0), 0xf4, 256);
}

static inline void gate64(struct env *e, unsigned n, unsigned dpl, unsigned ist, bool present)
{
	uint64_t off = HANDLER(n);

	put64(e, IDT + n * 16,
	      (off & 0xffff) | (uint64_t)SEL_CODE << 16 | (uint64_t)ist << 32 |
		      (uint64_t)(0xe | dpl << 5 | (present ? 0x80 : 0)) << 40);
	put64(e, IDT + n * 16 + 8, 0);
}

static inline void set_segment_cache(struct kvm_segment *s, uint16_t sel, unsigned type,
				     unsigned dpl, bool l, bool db)
{
	*s = (struct kvm_segment){.limit = 0xffffffff,
				  .selector = sel,
				  .type = (uint8_t)type,
				  .present = 1,
				  .dpl = (uint8_t)dpl,
				  .s = 1,
				  .g = 1,
				  .l = l,
				  .db = db};
}

static inline void enter_at(struct env *e, uint64_t rip, uint64_t rsp)
{
	struct kvm_regs r = {.rip = rip, .rsp = rsp, .rflags = 2};

	kl_x86_set_regs(e->v, &r);
}

/* 4-level paging, identity below 2 MiB but for the special pages. */
static inline void map64(struct env *e)
{
	put64(e, TABLES, TABLES + 0x1000 + 7);
	put64(e, TABLES + 0x1000, TABLES + 0x2000 + 7);
	put64(e, TABLES + 0x2000, TABLES + 0x3000 + 7);
	for (uint64_t i = 0; i < 512; i++)
		put64(e, TABLES + 0x3000 + i * 8, i << 12 | 7);
	put64(e, TABLES + 0x3000 + (P_ABSENT >> 9), 0);
	put64(e, TABLES + 0x3000 + (P_RO >> 9), P_RO | 5);
	put64(e, TABLES + 0x3000 + (P_SUPER >> 9), P_SUPER | 3);
	put64(e, TABLES + 0x3000 + (P_NX >> 9), P_NX | 7 | 1ull << 63);
	put64(e, TABLES + 0x3000 + (P_MMIO >> 9), MMIO_GPA | 7);
	put64(e, TABLES + 0x3000 + (P_MMIO >> 9) + 8, (MMIO_GPA + 0x1000) | 7);
}

/* 64-bit mode at @cpl, code at CODE. */
static inline void mode64(struct env *e, unsigned cpl)
{
	struct kvm_sregs s;

	map64(e);
	build_tables(e, true);
	for (unsigned i = 0; i < 256; i++)
		gate64(e, i, i == 3 ? 3 : 0, 0, true);
	kl_x86_get_sregs(e->v, &s);
	s.cr0 = KL_CR0_PE | KL_CR0_PG | KL_CR0_WP | KL_CR0_NE | KL_CR0_ET;
	s.cr3 = TABLES;
	s.cr4 = KL_CR4_PAE | KL_CR4_OSFXSR;
	s.efer = KL_EFER_LME | KL_EFER_LMA | KL_EFER_NX | KL_EFER_SCE;
	s.gdt.base = GDT;
	s.gdt.limit = 0x47;
	s.idt.base = IDT;
	s.idt.limit = 0xfff;
	set_segment_cache(&s.cs, cpl ? SEL_UCODE : SEL_CODE, 0xb, cpl, true, false);
	set_segment_cache(&s.ss, cpl ? SEL_UDATA : SEL_DATA, 3, cpl, false, true);
	s.ds = s.es = s.fs = s.gs = s.ss;
	s.tr = (struct kvm_segment){
		.base = TSS, .limit = 0x67, .selector = SEL_TSS, .type = 11, .present = 1};
	assert_int_equal(kl_x86_set_sregs(e->v, &s), 0);
	enter_at(e, CODE, STACK);
}

/* 32-bit protected mode without paging at @cpl. */
static inline void mode32(struct env *e, unsigned cpl)
{
	struct kvm_sregs s;

	build_tables(e, false);
	for (unsigned i = 0; i < 256; i++)
		put64(e, IDT + i * 8,
		      HANDLER(i) | SEL_CODE << 16 | (uint64_t)(i == 3 ? 0xee : 0x8e) << 40);
	kl_x86_get_sregs(e->v, &s);
	s.cr0 = KL_CR0_PE | KL_CR0_NE | KL_CR0_ET;
	s.gdt.base = GDT;
	s.gdt.limit = 0x47;
	s.idt.base = IDT;
	s.idt.limit = 0x7ff;
	set_segment_cache(&s.cs, cpl ? SEL_UCODE : SEL_CODE, 0xb, cpl, false, true);
	set_segment_cache(&s.ss, cpl ? SEL_UDATA : SEL_DATA, 3, cpl, false, true);
	s.ds = s.es = s.fs = s.gs = s.ss;
	s.tr = (struct kvm_segment){
		.base = TSS, .limit = 0x67, .selector = SEL_TSS, .type = 11, .present = 1};
	assert_int_equal(kl_x86_set_sregs(e->v, &s), 0);
	enter_at(e, CODE, STACK);
}

static inline void mode16(struct env *e)
{
	struct kvm_sregs s;

	memset(e->mem + HANDLER(0), 0xf4, 256);
	for (unsigned i = 0; i < 256; i++) {
		uint32_t vec = (uint32_t)HANDLER(i);

		memcpy(e->mem + i * 4, &vec, 4);
	}
	kl_x86_get_sregs(e->v, &s);
	s.cs.base = 0;
	s.cs.selector = 0;
	assert_int_equal(kl_x86_set_sregs(e->v, &s), 0);
	enter_at(e, CODE, STACK);
}

static inline int env_run(struct env *e)
{
	int r;

	kl_engine_enter();
	r = kl_x86_run(e->v);
	kl_engine_leave();
	return r;
}

/* The same as a thread, and its result. */
static inline void *env_thread(void *e)
{
	return (void *)(intptr_t)env_run(e);
}

static inline int env_join(pthread_t t)
{
	void *result;

	pthread_join(t, &result);
	return (int)(intptr_t)result;
}

/* The next instruction alone, and no event. -1: done, an exit included; else the exception. */
static inline int env_one(struct env *e, uint32_t *error)
{
	struct kl_vcpu *v = e->v;
	int why;

	kl_engine_enter();
	v->exc.pending = false;
	kl_self.guard = &v->jmp;
	why = _setjmp(v->jmp);
	if (!why) {
		v->in_run = true;
		kl_vcpu_enter_guest(&v->core);
		kl_serve_flush(v);
		kl_interp_one(v);
	}
	kl_vcpu_leave_guest(&v->core);
	kl_self.guard = NULL;
	v->in_run = v->delivering = false;
	kl_engine_leave();
	v->exit_pending = false;
	v->pending = KL_PENDING_NONE;
	v->int_shadow = 0;
	if (why == 0 || why == KL_LEAVE_EXIT)
		return -1;
	assert_int_equal(why, KL_LEAVE_EXCEPTION);
	*error = v->exc.has_error ? v->exc.error : 0;
	return v->exc.nr;
}

#define assert_run(e, reason_)                                  \
	do {                                                    \
		assert_int_equal(env_run(e), 0);                \
		assert_int_equal((e)->v->exit.reason, reason_); \
	} while (0)

/* The event ended in the handler of @n. */
#define assert_vector(e, n)                                    \
	do {                                                   \
		assert_run(e, KVM_EXIT_HLT);                   \
		assert_int_equal((e)->v->rip, HANDLER(n) + 1); \
	} while (0)
