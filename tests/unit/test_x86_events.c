/* SPDX-License-Identifier: MIT */
/*
 * Exceptions and interrupts as the guest and the program see them, in all modes; transfers
 * between privileges; single-step.
 */
#include "x86_env.h"

#include "host/cpu.h"

/* The frame of a 64-bit event with an error code. */
struct frame64 {
	uint64_t error, rip, cs, rflags, rsp, ss;
};

static struct frame64 frame_at_sp(struct env *e)
{
	struct frame64 f;

	memcpy(&f, e->mem + e->v->gpr[KL_RSP], sizeof(f));
	return f;
}

static void page_fault_frame(void **state)
{
	struct env *e = *state;
	struct frame64 f;

	env_code(e, 0x48, 0x8b, 0x04, 0x25, 0, 0, 0x10, 0); /* mov rax, [P_ABSENT] */
	mode64(e, 0);
	e->v->gpr[KL_RSP] = STACK - 3; /* delivery aligns the stack */
	assert_vector(e, 14);
	f = frame_at_sp(e);
	assert_int_equal(f.error, 0);
	assert_int_equal(f.rip, CODE);
	assert_int_equal(f.cs, SEL_CODE);
	assert_int_equal(f.rflags, 2 | KL_FL_RF);
	assert_int_equal(f.rsp, STACK - 3);
	assert_int_equal(f.ss, SEL_DATA);
	assert_int_equal(e->v->gpr[KL_RSP], STACK - 16 - 48);
	assert_int_equal(e->v->cr2, P_ABSENT);
	assert_int_equal(e->v->rflags, 2);
}

static void write_protection(void **state)
{
	struct env *e = *state;

	env_code(e, 0x48, 0x89, 0x04, 0x25, 0, 0x10, 0x10, 0); /* mov [P_RO], rax */
	mode64(e, 0);
	assert_vector(e, 14);
	assert_int_equal(frame_at_sp(e).error, 3);
}

static void user_fault_switches_stacks(void **state)
{
	struct env *e = *state;
	struct frame64 f;

	env_code(e, 0x8a, 0x04, 0x25, 0, 0x20, 0x10, 0); /* mov al, [P_SUPER] */
	mode64(e, 3);
	assert_vector(e, 14);
	assert_int_equal(e->v->cpl, 0);
	assert_int_equal(e->v->gpr[KL_RSP], STACK0 - 48);
	f = frame_at_sp(e);
	assert_int_equal(f.error, 5);
	assert_int_equal(f.cs, SEL_UCODE);
	assert_int_equal(f.rsp, STACK);
	assert_int_equal(f.ss, SEL_UDATA);
	assert_int_equal(e->v->seg[KL_SS].selector, 0);
}

static void no_execute(void **state)
{
	struct env *e = *state;
	struct frame64 f;

	env_code(e, 0xb8, 0, 0x30, 0x10, 0, 0xff, 0xe0); /* mov eax, P_NX; jmp rax */
	mode64(e, 0);
	assert_vector(e, 14);
	f = frame_at_sp(e);
	assert_int_equal(f.error, 0x11);
	assert_int_equal(f.rip, P_NX);
	assert_int_equal(e->v->cr2, P_NX);
}

static void ist_stack(void **state)
{
	struct env *e = *state;

	env_code(e, 0x48, 0x8b, 0x04, 0x25, 0, 0, 0x10, 0);
	mode64(e, 0);
	gate64(e, 14, 0, 1, true);
	assert_vector(e, 14);
	assert_int_equal(e->v->gpr[KL_RSP], IST1 - 48);
}

static void gate_privilege(void **state)
{
	struct env *e = *state;

	env_code(e, 0xcd, 0x30); /* int 0x30, gate DPL 0 */
	mode64(e, 3);
	assert_vector(e, 13);
	assert_int_equal(frame_at_sp(e).error, 0x30 * 8 + 2);
	assert_int_equal(frame_at_sp(e).rip, CODE);
}

static void breakpoint_from_user(void **state)
{
	struct env *e = *state;
	uint64_t f[5];

	env_code(e, 0xcc);
	mode64(e, 3);
	assert_vector(e, 3);
	memcpy(f, e->mem + e->v->gpr[KL_RSP], sizeof(f));
	assert_int_equal(f[0], CODE + 1); /* a trap: behind the instruction */
	assert_int_equal(f[1], SEL_UCODE);
	assert_int_equal(f[2], 2);
}

static void privileged_instruction(void **state)
{
	struct env *e = *state;

	env_code(e, 0x0f, 0x20, 0xc0); /* mov rax, cr0 */
	mode64(e, 3);
	assert_vector(e, 13);
	assert_int_equal(frame_at_sp(e).error, 0);
}

static void double_fault(void **state)
{
	struct env *e = *state;

	env_code(e, 0x48, 0x8b, 0x04, 0x25, 0, 0, 0x10, 0);
	mode64(e, 0);
	gate64(e, 14, 0, 0, false);
	assert_vector(e, 8);
	assert_int_equal(frame_at_sp(e).error, 0);
	assert_int_equal(frame_at_sp(e).rip, CODE);
}

static void serial_faults_are_no_double_fault(void **state)
{
	struct env *e = *state;

	env_code(e, 0x0f, 0x0b); /* ud2 */
	mode64(e, 0);
	gate64(e, 6, 0, 0, false); /* #UD is benign: its #NP is delivered */
	assert_vector(e, 11);
	assert_int_equal(frame_at_sp(e).error, 6 * 8 + 3);
}

static void triple_fault(void **state)
{
	struct env *e = *state;

	env_code(e, 0x48, 0x8b, 0x04, 0x25, 0, 0, 0x10, 0);
	mode64(e, 0);
	e->v->idt.limit = 0;
	assert_run(e, KVM_EXIT_SHUTDOWN);
	assert_false(e->v->exc.pending || e->v->exc.injected);
	/* As INIT leaves it, on AMD. */
	assert_int_equal(e->v->rip, kl_host_is_intel() ? CODE : 0xfff0);
	assert_int_equal(!(e->v->cr0 & KL_CR0_PE), !kl_host_is_intel());
}

static void stack_fault_while_delivering(void **state)
{
	struct env *e = *state;

	env_code(e, 0x0f, 0x0b);
	mode64(e, 0);
	e->v->gpr[KL_RSP] = P_ABSENT + 0x1000;
	gate64(e, 14, 0, 1, true);
	assert_vector(e, 14); /* #UD is benign, so the page fault of its frame is delivered */
	assert_int_equal(frame_at_sp(e).error, 2);
	assert_int_equal(frame_at_sp(e).rip, CODE);
}

static void iret_to_user_and_back(void **state)
{
	struct env *e = *state;
	uint64_t *f;

	env_code(e, 0x48, 0xcf); /* iretq */
	mode64(e, 0);
	e->mem[0x1100] = 0xcc;
	f = (uint64_t *)(void *)(e->mem + STACK);
	f[0] = 0x1100;
	f[1] = SEL_UCODE;
	f[2] = 2 | KL_FL_IF | KL_FL_CF;
	f[3] = STACK - 0x800;
	f[4] = SEL_UDATA;
	e->v->nmi.masked = true;
	assert_vector(e, 3);
	assert_false(e->v->nmi.masked);
	memcpy(f, e->mem + e->v->gpr[KL_RSP], 40);
	assert_int_equal(f[0], 0x1101);
	assert_int_equal(f[2], 2 | KL_FL_IF | KL_FL_CF);
	assert_int_equal(f[3], STACK - 0x800);
}

/*
 * A return to user code makes null selectors 0 and leaves the bases of FS and GS alone: they are
 * where 64-bit programs have their thread's data.
 */
static void iret_keeps_bases(void **state)
{
	struct env *e = *state;
	uint64_t *f;

	env_code(e, 0x48, 0xcf); /* iretq */
	mode64(e, 0);
	e->mem[0x1100] = 0xcc;
	f = (uint64_t *)(void *)(e->mem + STACK);
	f[0] = 0x1100;
	f[1] = SEL_UCODE;
	f[2] = 2;
	f[3] = STACK - 0x800;
	f[4] = SEL_UDATA;
	e->v->seg[KL_FS].selector = 0;
	e->v->seg[KL_FS].base = 0x7f0012345678;
	e->v->seg[KL_GS].selector = 3;
	e->v->seg[KL_GS].unusable = 1;
	e->v->seg[KL_GS].base = 0xabcdef0;
	assert_vector(e, 3);
	assert_int_equal(e->v->seg[KL_FS].base, 0x7f0012345678);
	assert_int_equal(e->v->seg[KL_GS].base, 0xabcdef0);
	assert_int_equal(e->v->seg[KL_GS].selector, 0);
}

/* IRET to a selector beyond the GDT: #GP with that selector, nothing changed. */
static void iret_checks(void **state)
{
	struct env *e = *state;
	uint64_t *f;

	env_code(e, 0x48, 0xcf);
	mode64(e, 0);
	f = (uint64_t *)(void *)(e->mem + STACK);
	f[0] = 0x1100;
	f[1] = 0x4b;
	assert_vector(e, 13);
	assert_int_equal(frame_at_sp(e).error, 0x48);
	assert_int_equal(frame_at_sp(e).rsp, STACK);
	/* Never to more privilege. */
	mode64(e, 3);
	f[1] = SEL_CODE;
	f[3] = STACK;
	f[4] = SEL_DATA;
	assert_vector(e, 13);
	assert_int_equal(frame_at_sp(e).error, SEL_CODE);
	assert_int_equal(frame_at_sp(e).cs, SEL_UCODE);
}

static void syscall_and_sysret(void **state)
{
	struct env *e = *state;

	env_code(e, 0x0f, 0x05, 0xcc); /* syscall; int3 */
	mode64(e, 3);
	memcpy(e->mem + 0x1200, (uint8_t[]){0x48, 0x0f, 0x07}, 3); /* sysretq */
	assert_int_equal(kl_x86_set_msr(e->v, 0xc0000081, 0x28ull << 48 | 0x08ull << 32), 0);
	assert_int_equal(kl_x86_set_msr(e->v, 0xc0000082, 0x1200), 0);
	assert_int_equal(kl_x86_set_msr(e->v, 0xc0000084, KL_FL_DF), 0);
	e->v->rflags |= KL_FL_DF;
	assert_vector(e, 3);
	assert_int_equal(get64(e, e->v->gpr[KL_RSP]), CODE + 3);
	assert_int_equal(get64(e, e->v->gpr[KL_RSP] + 8), SEL_UCODE);
	assert_int_equal(get64(e, e->v->gpr[KL_RSP] + 16), 2 | KL_FL_DF);
	assert_int_equal(get64(e, e->v->gpr[KL_RSP] + 32), SEL_UDATA);
	assert_int_equal(e->v->gpr[KL_RCX], CODE + 2);
	/* Not with EFER.SCE clear. */
	mode64(e, 3);
	e->v->efer &= ~(uint64_t)KL_EFER_SCE;
	assert_vector(e, 6);
}

static void not_canonical(void **state)
{
	struct env *e = *state;

	/* mov rax, 1 << 60; mov rbx, [rax] */
	env_code(e, 0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0x10, 0x48, 0x8b, 0x18);
	mode64(e, 0);
	assert_vector(e, 13);
	assert_int_equal(frame_at_sp(e).rip, CODE + 10);
}

/* ---- 32 and 16 bits ---- */

static void protected_mode_inner(void **state)
{
	struct env *e = *state;
	uint32_t f[5];

	env_code(e, 0xcc);
	mode32(e, 3);
	assert_vector(e, 3);
	assert_int_equal(e->v->cpl, 0);
	assert_int_equal(e->v->seg[KL_SS].selector, SEL_DATA);
	assert_int_equal(e->v->gpr[KL_RSP], STACK0 - 20);
	memcpy(f, e->mem + STACK0 - 20, 20);
	assert_int_equal(f[0], CODE + 1);
	assert_int_equal(f[1], SEL_UCODE);
	assert_int_equal(f[2], 2);
	assert_int_equal(f[3], STACK);
	assert_int_equal(f[4], SEL_UDATA);
}

/* The TSS names a stack segment that ring 0 may not have: #TS, on ring 0's next try. */
static void inner_stack_checks(void **state)
{
	struct env *e = *state;

	env_code(e, 0xcc);
	mode32(e, 3);
	put64(e, TSS + 4, STACK0 | (uint64_t)(SEL_UDATA & ~3) << 32);
	/* #TS cannot be delivered either, nor #DF. */
	assert_run(e, KVM_EXIT_SHUTDOWN);
	/* With a conforming handler no new stack is needed, and the error code shows. */
	mode32(e, 3);
	put64(e, TSS + 4, STACK0 | (uint64_t)(SEL_UDATA & ~3) << 32);
	put64(e, GDT + 0x18, descriptor(0xf, 0, false, true));
	put64(e, IDT + 10 * 8, HANDLER(0) | SEL_CODE32 << 16 | 0x8eull << 40);
	memcpy(e->mem + HANDLER(0), (uint8_t[]){0xe6, 0x11}, 2); /* out 0x11, al */
	e->v->rflags |= KL_FL_IOPL;
	assert_run(e, KVM_EXIT_IO);
	assert_int_equal(e->v->cpl, 3);
	assert_int_equal(*(uint32_t *)(void *)(e->mem + e->v->gpr[KL_RSP]), SEL_UDATA & ~3);
}

static void protected_mode_error_code(void **state)
{
	struct env *e = *state;
	uint32_t f[4];

	env_code(e, 0xb8, 0x48, 0, 0, 0, 0x8e, 0xd8); /* mov eax, 0x48; mov ds, eax */
	mode32(e, 0);
	assert_vector(e, 13);
	memcpy(f, e->mem + e->v->gpr[KL_RSP], 16);
	assert_int_equal(e->v->gpr[KL_RSP], STACK - 16);
	assert_int_equal(f[0], 0x48);
	assert_int_equal(f[1], CODE + 5);
}

static void segment_limit(void **state)
{
	struct env *e = *state;

	env_code(e, 0xa1, 0xfd, 0xff, 0, 0); /* mov eax, [0xfffd]: one byte beyond */
	mode32(e, 0);
	e->v->seg[KL_DS].limit = 0xffff;
	assert_vector(e, 13);
	mode32(e, 0);
	e->v->seg[KL_DS].limit = 0x10000;
	e->mem[CODE + 5] = 0xf4;
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->rip, CODE + 6);
}

static void real_mode_int_iret(void **state)
{
	struct env *e = *state;
	uint16_t f[3];

	env_code(e, 0xf9, 0xfb, 0xcd, 0x21, 0xf4); /* stc; sti; int 0x21; hlt */
	mode16(e);
	memcpy(e->mem + HANDLER(0x21), (uint8_t[]){0xf4, 0xcf}, 2); /* hlt; iret */
	assert_vector(e, 0x21);
	assert_int_equal(e->v->rflags & (KL_FL_IF | KL_FL_CF), KL_FL_CF);
	memcpy(f, e->mem + e->v->gpr[KL_RSP], 6);
	assert_int_equal(f[0], CODE + 4);
	assert_int_equal(f[1], 0);
	assert_int_equal(f[2], 2 | KL_FL_CF | KL_FL_IF);
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->rip, CODE + 5);
	assert_int_equal(e->v->gpr[KL_RSP], STACK);
	assert_int_equal(e->v->rflags & KL_FL_IF, KL_FL_IF);
}

static void far_jump_to_long_mode(void **state)
{
	struct env *e = *state;

	/* 32-bit: mov eax, cr0 | PG...; jmp far SEL_CODE:0x1100 */
	env_code(e, 0xb8, 0x01, 0x00, 0x00, 0x80, 0x0f, 0x22, 0xc0, 0xea, 0x00, 0x11, 0, 0,
		 SEL_CODE, 0);
	mode32(e, 0);
	map64(e);
	put64(e, GDT + 8, descriptor(0xb, 0, true, false));
	e->mem[0x1100] = 0x48; /* mov rax, -1 in 64-bit code only */
	memcpy(e->mem + 0x1101, (uint8_t[]){0xc7, 0xc0, 0xff, 0xff, 0xff, 0xff, 0xf4}, 7);
	e->v->cr3 = TABLES;
	e->v->cr4 = KL_CR4_PAE;
	e->v->efer = KL_EFER_LME;
	e->v->seg[KL_CS].selector = SEL_CODE32;
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->gpr[KL_RAX], ~0ull);
	assert_int_equal(e->v->efer, KL_EFER_LME | KL_EFER_LMA);
	assert_true(e->v->long_mode);
}

static void vm86(void **state)
{
	struct env *e = *state;
	uint32_t *f, out[9];

	env_code(e, 0xcf); /* iretd with VM in the image */
	mode32(e, 0);
	memcpy(e->mem + 0x1100, (uint8_t[]){0xfa}, 1); /* cli: IOPL 0, so #GP */
	f = (uint32_t *)(void *)(e->mem + STACK);
	f[0] = 0x100;
	f[1] = 0x100;
	f[2] = 2 | KL_FL_VM;
	f[3] = 0x800;
	f[4] = 0x200;
	f[5] = 0x111;
	f[6] = 0x222;
	f[7] = 0x333;
	f[8] = 0x444;
	assert_vector(e, 13);
	memcpy(out, e->mem + e->v->gpr[KL_RSP], 36);
	assert_int_equal(out[0], 0);     /* error */
	assert_int_equal(out[1], 0x100); /* eip */
	assert_int_equal(out[2], 0x100); /* cs */
	assert_int_equal(out[3] & KL_FL_VM, KL_FL_VM);
	assert_int_equal(out[4], 0x800);
	assert_int_equal(out[5], 0x200);
	assert_int_equal(out[6], 0x111); /* es */
	assert_int_equal(out[7], 0x222); /* ds */
	assert_int_equal(e->v->rflags & KL_FL_VM, 0);
	assert_int_equal(e->v->cpl, 0);
	assert_true(e->v->seg[KL_DS].unusable);
}

static void call_gate(void **state)
{
	struct env *e = *state;
	uint32_t f[5];

	/* push 0x55; call far 0x28:0 -- a gate to ring 0 with one parameter */
	env_code(e, 0x6a, 0x55, 0x9a, 0, 0, 0, 0, 0x2b, 0);
	mode32(e, 3);
	put64(e, GDT + 0x28, 0x1100 | SEL_CODE << 16 | 1ull << 32 | 0xecull << 40);
	e->mem[0x1100] = 0xf4;
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->cpl, 0);
	assert_int_equal(e->v->gpr[KL_RSP], STACK0 - 20);
	memcpy(f, e->mem + STACK0 - 20, 20);
	assert_int_equal(f[0], CODE + 9);
	assert_int_equal(f[1], SEL_UCODE);
	assert_int_equal(f[2], 0x55);
	assert_int_equal(f[3], STACK - 4);
	assert_int_equal(f[4], SEL_UDATA);
}

/* ---- interrupts from outside ---- */

static void interrupt_window(void **state)
{
	struct env *e = *state;

	env_code(e, 0x90, 0xfb, 0x90, 0x90, 0xf4); /* nop; sti; nop; nop; hlt */
	mode64(e, 0);
	assert_false(kl_x86_ready_for_interrupt(e->v));
	e->v->request_interrupt_window = true;
	assert_run(e, KVM_EXIT_IRQ_WINDOW_OPEN);
	assert_int_equal(e->v->rip, CODE + 3); /* one instruction behind STI */
	assert_true(kl_x86_ready_for_interrupt(e->v));
	assert_int_equal(kl_x86_interrupt(e->v, 0x41), 0);
	assert_int_equal(kl_x86_interrupt(e->v, 256), -EINVAL);
	e->v->request_interrupt_window = false;
	assert_vector(e, 0x41);
	assert_int_equal(get64(e, e->v->gpr[KL_RSP]), CODE + 3);
	assert_int_equal(e->v->rflags & KL_FL_IF, 0);
	assert_false(e->v->irq.injected);
}

static void nmi(void **state)
{
	struct env *e = *state;

	env_code(e, 0x90, 0xf4);
	mode64(e, 0);
	atomic_store(&e->v->nmi.pending, 2);
	assert_vector(e, 2);
	assert_true(e->v->nmi.masked);
	assert_int_equal(atomic_load(&e->v->nmi.pending), 1); /* waits for IRET */
	assert_int_equal(get64(e, e->v->gpr[KL_RSP]), CODE);
}

static void pending_exception_from_program(void **state)
{
	struct env *e = *state;
	struct kvm_vcpu_events ev;

	env_code(e, 0xf4);
	mode64(e, 0);
	kl_x86_get_events(e->v, &ev);
	ev.exception.injected = 1;
	ev.exception.nr = 13;
	ev.exception.has_error_code = 1;
	ev.exception.error_code = 0x1234;
	assert_int_equal(kl_x86_set_events(e->v, &ev), 0);
	assert_vector(e, 13);
	assert_int_equal(frame_at_sp(e).error, 0x1234);
}

/* Kernel addresses: the same memory, but not at their low 32 bits. */
#define HIGH 0xffff800040000000ull

/* Compatibility code takes an exception: frame, TSS and GDT lie across pages up there. */
static void high_tables_from_compatibility(void **state)
{
	struct env *e = *state;
	struct kvm_sregs s;

	env_code(e, 0x0f, 0x0b);
	for (unsigned i = 0; i < 3; i++) {
		mode64(e, 3);
		put64(e, TABLES + 0x100 * 8, TABLES + 0x5000 + 7);
		put64(e, TABLES + 0x5008, TABLES + 0x2000 + 7);
		kl_x86_get_sregs(e->v, &s);
		set_segment_cache(&s.cs, SEL_UCODE32, 0xb, 3, false, true);
		put64(e, TSS + 4, HIGH + STACK0 + 0x10); /* the frame crosses */
		if (i == 1) {                            /* the stack pointer in the TSS */
			memcpy(e->mem + 0x1fff8, e->mem + TSS, 0x68);
			s.tr.base = HIGH + 0x1fff8;
		} else if (i == 2) { /* the code descriptor */
			memcpy(e->mem + 0x1fff4, e->mem + GDT, 0x48);
			s.gdt.base = HIGH + 0x1fff4;
		}
		assert_int_equal(kl_x86_set_sregs(e->v, &s), 0);
		assert_vector(e, 6);
		assert_true(e->v->gpr[KL_RSP] == HIGH + STACK0 + 0x10 - 40);
		assert_int_equal(get64(e, STACK0 + 0x10 - 40), CODE);
		assert_int_equal(get64(e, STACK0 + 8), SEL_UDATA);
	}
}

static void single_step(void **state)
{
	struct env *e = *state;

	env_code(e, 0x90, 0x90, 0x8e, 0xd0, 0x90); /* nop; nop; mov ss, eax; nop */
	mode64(e, 0);
	e->v->rflags |= KL_FL_TF;
	assert_vector(e, 1);
	assert_int_equal(get64(e, e->v->gpr[KL_RSP]), CODE + 1);
	assert_int_equal(get64(e, e->v->gpr[KL_RSP] + 16) & KL_FL_TF, KL_FL_TF);
	assert_int_equal(e->v->dr6 & (1 << 14), 1 << 14);
	assert_int_equal(e->v->rflags & KL_FL_TF, 0);
	/* No trap between MOV SS and the instruction behind it. */
	mode64(e, 0);
	e->v->rip = CODE + 2;
	e->v->gpr[KL_RAX] = SEL_DATA;
	e->v->rflags |= KL_FL_TF;
	assert_vector(e, 1);
	assert_int_equal(get64(e, e->v->gpr[KL_RSP]), CODE + 5);
}

/* INT1 and INT n: counted only when they finish, and no single-step trap behind them. */
static void software_interrupts_are_instructions(void **state)
{
	static const uint8_t code[2][3] = {{0x90, 0xf1, 0xf4}, {0x90, 0xcd, 0x01}};
	struct env *e = *state;

	for (unsigned i = 0; i < 2; i++) {
		uint64_t count = e->v->insn_count;

		memcpy(e->mem + CODE, code[i], 3);
		mode64(e, 0);
		gate64(e, 1, 0, 0, false);
		assert_vector(e, 11);
		assert_int_equal(frame_at_sp(e).rip, CODE + 1);
		assert_int_equal(e->v->insn_count - count, 2); /* NOP, HLT */
		mode64(e, 0);
		e->v->rip = CODE + 1;
		e->v->rflags |= KL_FL_TF;
		assert_vector(e, 1);
		assert_int_equal(get64(e, e->v->gpr[KL_RSP]), CODE + 2 + i);
	}
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, env_setup, env_teardown)
	const struct CMUnitTest tests[] = {
		TEST(page_fault_frame),
		TEST(write_protection),
		TEST(user_fault_switches_stacks),
		TEST(no_execute),
		TEST(ist_stack),
		TEST(gate_privilege),
		TEST(breakpoint_from_user),
		TEST(privileged_instruction),
		TEST(double_fault),
		TEST(serial_faults_are_no_double_fault),
		TEST(triple_fault),
		TEST(stack_fault_while_delivering),
		TEST(iret_to_user_and_back),
		TEST(iret_keeps_bases),
		TEST(iret_checks),
		TEST(syscall_and_sysret),
		TEST(not_canonical),
		TEST(protected_mode_inner),
		TEST(inner_stack_checks),
		TEST(protected_mode_error_code),
		TEST(segment_limit),
		TEST(real_mode_int_iret),
		TEST(far_jump_to_long_mode),
		TEST(vm86),
		TEST(call_gate),
		TEST(interrupt_window),
		TEST(nmi),
		TEST(pending_exception_from_program),
		TEST(high_tables_from_compatibility),
		TEST(single_step),
		TEST(software_interrupts_are_instructions),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
