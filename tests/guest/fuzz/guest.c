/* SPDX-License-Identifier: MIT */
/*
 * The vCPU's side: one VM whose page tables map the same addresses with the same rights as
 * the process has them. The way out is a page that may not be executed.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "fuzz.h"
#include "base/config.h"
#include "host/guard.h"
#include "host/thread.h"
#include "x86/code.h"
#include "x86/xlate/xlate.h"

#define RAM_SIZE  0x100000ul
#define GPA_CODE  0x10000ul
#define GPA_LEAVE 0x20000ul
#define GPA_DATA  0x30000ul
#define TABLES    0x40000ul
#define GPA_PATCH 0x50000ul

#define PTE_P  1ul
#define PTE_W  2ul
#define PTE_U  4ul
#define PTE_AD 0x60ul
#define PTE_NX (1ul << 63)

static struct kl_x86_vm vm;
static struct kl_vcpu *vcpu;
static uint8_t *ram;

static _Noreturn void give_up(const char *what)
{
	fprintf(stderr, "insn-fuzz: %s failed\n", what);
	exit(2);
}

uint8_t *guest_memory(uint64_t lin)
{
	if (lin - CODE < CODE_SIZE)
		return ram + GPA_CODE + (lin - CODE);
	if (lin - LEAVE < LEAVE_SIZE)
		return ram + GPA_LEAVE + (lin - LEAVE);
	if (lin - PATCH < PATCH_SIZE)
		return ram + GPA_PATCH + (lin - PATCH);
	return ram + GPA_DATA + (lin - DATA);
}

static void put64(uint64_t gpa, uint64_t val)
{
	memcpy(ram + gpa, &val, 8);
}

/* Page table of the 2 MiB around @lin, number @table. */
static void map_page(unsigned table, uint64_t lin, uint64_t gpa, uint64_t rights)
{
	uint64_t pt = TABLES + 0x3000 + 0x1000ul * table;

	put64(TABLES + 0x2000 + (lin >> 21 & 511) * 8, pt | PTE_P | PTE_W | PTE_U | PTE_AD);
	put64(pt + (lin >> 12 & 511) * 8, gpa | PTE_P | PTE_U | PTE_AD | rights);
}

static void build_tables(void)
{
	put64(TABLES, (TABLES + 0x1000) | PTE_P | PTE_W | PTE_U | PTE_AD);
	put64(TABLES + 0x1000, (TABLES + 0x2000) | PTE_P | PTE_W | PTE_U | PTE_AD);
	for (uint64_t i = 0; i < CODE_SIZE; i += KL_PAGE_SIZE)
		map_page(0, CODE + i, GPA_CODE + i, 0);
	for (uint64_t i = 0; i < PATCH_SIZE; i += KL_PAGE_SIZE)
		map_page(0, PATCH + i, GPA_PATCH + i, PTE_W);
	map_page(0, LEAVE, GPA_LEAVE, PTE_NX);
	for (unsigned i = 0; i < DATA_PAGES; i++) {
		uint64_t off = i * KL_PAGE_SIZE;

		if (data_rights[i] != PAGE_NONE)
			map_page(1, DATA + off, GPA_DATA + off,
				 PTE_NX | (data_rights[i] == PAGE_RW ? PTE_W : 0));
	}
}

/* Linux's selectors, so that the same ones may be loaded on both sides. */
#define SEL_CODE32 0x23
#define SEL_DATA   0x2b
#define SEL_CODE64 0x33

static void segment(struct kvm_segment *s, uint16_t sel, unsigned type, bool l, bool db)
{
	*s = (struct kvm_segment){.limit = 0xffffffff,
				  .selector = sel,
				  .type = (uint8_t)type,
				  .present = 1,
				  .dpl = 3,
				  .s = 1,
				  .g = 1,
				  .l = l,
				  .db = db};
}

static void set_mode(enum kl_code_mode mode)
{
	struct kvm_sregs s;
	bool wide = mode == KL_CODE64;

	kl_x86_get_sregs(vcpu, &s);
	s.cr0 = KL_CR0_PE | KL_CR0_PG | KL_CR0_WP | KL_CR0_NE | KL_CR0_ET | KL_CR0_MP | KL_CR0_AM;
	s.cr3 = TABLES;
	s.cr4 = KL_CR4_PAE | KL_CR4_OSFXSR | KL_CR4_OSXMMEXCPT;
	s.cr4 |= kl_x86_find_cpuid(vcpu, 1, 0)->ecx & (1u << 26) ? KL_CR4_OSXSAVE : 0;
	s.cr4 |= kl_x86_find_cpuid(vcpu, 7, 0)->ebx & 1 ? KL_CR4_FSGSBASE : 0;
	s.efer = KL_EFER_LME | KL_EFER_LMA | KL_EFER_NX | KL_EFER_SCE;
	s.gdt.base = 0; /* not mapped: nothing loads from it yet */
	s.gdt.limit = 0;
	s.idt.limit = 0;
	segment(&s.cs, wide ? SEL_CODE64 : SEL_CODE32, 0xb, wide, !wide);
	segment(&s.ss, SEL_DATA, 3, false, true);
	s.ds = s.es = s.fs = s.gs = (struct kvm_segment){.unusable = 1};
	if (!wide)
		s.ds = s.es = s.ss;
	if (kl_x86_set_sregs(vcpu, &s))
		give_up("KVM_SET_SREGS");
}

void guest_init(void)
{
	struct kl_uapi_memory_region2 r = {0, 0, 0, RAM_SIZE, 0, 0, 0, 0, {0}};
	struct kvm_cpuid_entry2 cpuid[100];
	int n;

	kl_config_init();
	ram = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (ram == MAP_FAILED || kl_guard_init() || kl_x86_vm_init(&vm))
		give_up("making a VM");
	r.userspace_addr = (uint64_t)ram;
	if (kl_set_memory_region(&vm.mem, &r) || kl_x86_vcpu_create(&vm, 0, &vcpu))
		give_up("making a vCPU");
	n = kl_x86_supported_cpuid(cpuid, 100);
	if (n <= 0 || kl_x86_set_cpuid(vcpu, cpuid, (unsigned)n))
		give_up("KVM_SET_CPUID2");
	kl_not_leaked(vcpu->cpuid);        /* the VM lives as long as the process */
	vm.exit_on_emulation_error = true; /* or it looks like #UD */
	build_tables();
	set_mode(KL_CODE64);
	vcpu->xcr0 = vcpu->supported_xcr0 ? vcpu->supported_xcr0 : 1;
	native_features = 3 | (vcpu->xcr0 & 4);
}

struct kl_vcpu *guest_vcpu(void)
{
	return vcpu;
}

/* As run.c does. 0, or why it left. */
static int protected(struct kl_vcpu *v, void (*fn)(struct kl_vcpu *))
{
	int why;

	kl_self.guard = &v->jmp;
	why = _setjmp(v->jmp);
	if (!why) {
		v->in_run = true;
		kl_vcpu_enter_guest(&v->core);
		fn(v);
	}
	kl_vcpu_leave_guest(&v->core);
	kl_self.guard = NULL;
	if (why)
		kl_interp_settle(v);
	v->in_run = false;
	v->delivering = false;
	return why;
}

/*
 * INT3, INTO and INT1, which only code has that has written itself: here they end in #GP, as there
 * is no IDT, and under the host's kernel in their own vectors.
 */
static bool trapped(struct kl_vcpu *v, struct outcome *o)
{
	const struct kl_op *op = v->cur_op;
	unsigned vector;

	if (v->exc.nr != KL_EXC_GP || !op)
		return false;
	if (op->fn == kl_op_int3)
		vector = KL_EXC_BP;
	else if (op->fn == kl_op_int1)
		vector = KL_EXC_DB;
	else if (op->fn == kl_op_into)
		vector = KL_EXC_OF;
	else
		return false;
	if ((v->exc.error & ~1u) != 8 * vector + 2)
		return false;
	o->vector = (int)vector;
	v->rip = kl_next_rip(v, op);
	return true;
}

/* The outcome, if an exception ends the instance. */
static void exception(struct kl_vcpu *v, struct outcome *o)
{
	uint64_t way = v->rip - LEAVE;
	bool trap = trapped(v, o);

	if (!trap)
		o->vector = v->exc.nr;
	o->error = v->exc.has_error && !trap ? v->exc.error : 0;
	o->cr2 = v->exc.has_payload ? v->exc.payload : 0;
	if (o->vector == KL_EXC_PF && o->cr2 == v->rip && way < 32 * NR_WAYS && !(way & 15) &&
	    (way >= 16 * NR_WAYS) == (v->code_mode != KL_CODE64)) {
		o->vector = NO_VECTOR;
		o->way = (unsigned)(way / 16) % NR_WAYS;
	}
	v->exc.pending = false;
}

bool (*guest_watch)(const struct kl_vcpu *v);

/* Requests that came from elsewhere, as run.c serves them. */
static void serve(struct kl_vcpu *v)
{
	uint32_t requests = kl_vcpu_take_requests(&v->core, ~0u);

	if (requests & KL_REQ_TLB_FLUSH)
		kl_tlb_flush(v);
	if (requests & KL_REQ_CODE)
		kl_code_reap(&vm);
}

bool guest_run(const struct program *p, const struct machine *m, uint64_t steps, struct outcome *o)
{
	struct kl_vcpu *v = vcpu;
	int why = 0;

	if (KL_UNLIKELY(v->code_mode != p->mode))
		set_mode(p->mode);
	memcpy(v->gpr, m->gpr, sizeof(v->gpr));
	v->rip = p->at;
	v->rflags = m->rflags;
	kl_x86_update_mode(v); /* an instance before this one may have left AC set */
	kl_x86_update_mode(v); /* EFLAGS.AC */
	memcpy(v->xsave, m->x, X_SIZE);
	v->seg[KL_FS].base = m->fs_base;
	v->seg[KL_GS].base = m->gs_base;
	kl_engine_enter();
	for (uint64_t i = 0; i < 100000 && !why; i++) {
		bool step = i < steps;

		if (step && guest_watch && !guest_watch(v)) {
			why = STOPPED - 256;
			break;
		}
		if (KL_UNLIKELY(v->core.requests))
			serve(v);
		v->mmio_used = 0;
		v->cur_op = NULL;
		v->int_shadow = 0;
		why = protected(v, step ? kl_interp_one : kl_interp_run);
		if (v->exit_pending)
			why = KL_LEAVE_EXIT;
	}
	kl_engine_leave();
	v->exit_pending = false;
	v->pending = KL_PENDING_NONE;
	o->vector = 256 + why;
	if (why == KL_LEAVE_EXCEPTION)
		exception(v, o);
	if (v->cpl != 3) { /* it went through a gate: nothing to compare with */
		set_mode(p->mode);
		o->m.rip = LEAVE + LEAVE_SIZE - 1;
		o->vector = 0;
		return true;
	}
	memcpy(o->m.gpr, v->gpr, sizeof(v->gpr));
	o->m.rip = v->rip;
	o->m.rflags = v->rflags;
	o->m.fs_base = v->seg[KL_FS].base;
	o->m.gs_base = v->seg[KL_GS].base;
	memcpy(o->m.x, v->xsave, X_SIZE);
	return why != KL_LEAVE_EXIT;
}

uint64_t guest_translations(void)
{
	static uint64_t before;
	uint64_t now = vcpu->blocks->xlate ? vcpu->blocks->xlate->nr_translated : 0,
		 n = now - before;

	before = now;
	return n;
}

void guest_new_patch(void)
{
	for (uint64_t i = 0; i < PATCH_SIZE; i += KL_PAGE_SIZE) {
		struct kl_code_page *p = kl_code_find(vcpu, (GPA_PATCH + i) >> KL_PAGE_SHIFT);

		if (p)
			atomic_store(&p->deaths, 0);
	}
}

void guest_map_mmio(void)
{
	map_page(1, MMIO, RAM_SIZE, PTE_NX | PTE_W);
}

enum mmio guest_run_mmio(const struct program *p, const struct machine *m)
{
	static struct outcome o;
	enum mmio r = MMIO_NEITHER;

	memset(&vcpu->exit, 0, sizeof(vcpu->exit));
	if (!guest_run(p, m, true, &o))
		r = vcpu->nr_mmio ? MMIO_EXIT : MMIO_FAILURE;
	vcpu->nr_mmio = vcpu->cur_mmio = vcpu->mmio_used = 0;
	vcpu->mmio_replay = false;
	return r;
}
