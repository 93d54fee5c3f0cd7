/* SPDX-License-Identifier: MIT */
/*
 * Breakpoints and single-step: the guest's own, and the program's through
 * KVM_SET_GUEST_DEBUG.
 */
#include "x86_env.h"

#include "x86/debug.h"

#define EXEC(n)          (2ull << (2 * (n)))
#define DATA(n, rw, len) (EXEC(n) | (uint64_t)((rw) | (len) << 2) << (16 + 4 * (n)))
#define WRITE            1u
#define IO               2u
#define ACCESS           3u
#define LEN1             0u
#define LEN2             1u
#define LEN4             3u
#define LEN8             2u

#define WATCHED 0x5000ul

/* The frame of a 64-bit event without an error code. */
struct frame {
	uint64_t rip, cs, rflags, rsp, ss;
};

static struct frame frame_at_sp(struct env *e)
{
	struct frame f;

	memcpy(&f, e->mem + e->v->gpr[KL_RSP], sizeof(f));
	return f;
}

static void guest_breakpoints(struct env *e, uint64_t dr7, uint64_t a0, uint64_t a1)
{
	struct kvm_debugregs d = {.db = {a0, a1}, .dr6 = 0xffff0ff0, .dr7 = dr7 | 0x400};

	assert_int_equal(kl_x86_set_debugregs(e->v, &d), 0);
}

static void program_breakpoints(struct env *e, uint32_t control, uint64_t dr7, uint64_t a0)
{
	struct kvm_guest_debug d = {.control = KVM_GUESTDBG_ENABLE | control};

	d.arch.debugreg[0] = a0;
	d.arch.debugreg[7] = dr7 | 0x400;
	assert_int_equal(kl_x86_set_guest_debug(e->v, &d), 0);
}

#define assert_debug(e, pc_, dr6_)                                 \
	do {                                                       \
		assert_run(e, KVM_EXIT_DEBUG);                     \
		assert_int_equal((e)->v->exit.debug.exception, 1); \
		assert_int_equal((e)->v->exit.debug.pc, pc_);      \
		assert_int_equal((e)->v->exit.debug.dr6, dr6_);    \
	} while (0)

/* ---- the guest's own ---- */

static void instruction_breakpoint(void **state)
{
	struct env *e = *state;

	env_code(e, 0x90, 0x40, 0xff, 0xc0, 0x90, 0xf4); /* nop; inc eax; nop; hlt */
	mode64(e, 0);
	guest_breakpoints(e, EXEC(1), 0, CODE + 1);
	assert_vector(e, 1);
	assert_int_equal(frame_at_sp(e).rip, CODE + 1);
	assert_int_equal(e->v->gpr[KL_RAX], 0);
	assert_int_equal(e->v->dr6, 0xffff0ff2);
}

/* RF lets one instruction pass, and only one: IRET sets it, the next pass is caught. */
static void resume_flag(void **state)
{
	struct env *e = *state;
	uint64_t *f;

	env_code(e, 0x48, 0xcf); /* iretq */
	mode64(e, 0);
	/* inc eax; jmp back */
	memcpy(e->mem + 0x1100, (uint8_t[]){0xff, 0xc0, 0xeb, 0xfc}, 4);
	f = (uint64_t *)(void *)(e->mem + STACK);
	f[0] = 0x1100;
	f[1] = SEL_CODE;
	f[2] = 2 | KL_FL_RF;
	f[3] = STACK - 0x800;
	f[4] = SEL_DATA;
	guest_breakpoints(e, EXEC(0), 0x1100, 0);
	assert_vector(e, 1);
	assert_int_equal(frame_at_sp(e).rip, 0x1100);
	assert_int_equal(frame_at_sp(e).rflags & KL_FL_RF, 0);
	assert_int_equal(e->v->gpr[KL_RAX], 1);
}

/* A repeated instruction is one instruction for RF. */
static void breakpoint_on_repeated(void **state)
{
	struct env *e = *state;

	env_code(e, 0xf3, 0xaa, 0xf4); /* rep stosb; hlt */
	mode64(e, 0);
	e->v->gpr[KL_RCX] = 20;
	e->v->gpr[KL_RDI] = WATCHED;
	e->v->rflags |= KL_FL_RF;
	guest_breakpoints(e, EXEC(0), CODE, 0);
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->rip, CODE + 3);
	assert_int_equal(e->v->gpr[KL_RCX], 0);
	assert_int_equal(e->v->rflags & KL_FL_RF, 0);
}

/* mov [rdi], al/ax/eax/rax against each length; the breakpoint's low address bits don't count. */
static void watch_lengths(void **state)
{
	static const uint8_t store[4][4] = {{0x88, 0x07, 0x90, 0xf4},
					    {0x66, 0x89, 0x07, 0xf4},
					    {0x89, 0x07, 0x90, 0xf4},
					    {0x48, 0x89, 0x07, 0xf4}};
	static const unsigned len_code[4] = {LEN1, LEN2, LEN4, LEN8}, len[4] = {1, 2, 4, 8};
	struct env *e = *state;

	for (unsigned s = 0; s < 4; s++) {
		for (unsigned l = 0; l < 4; l++) {
			for (uint64_t at = WATCHED - 9; at < WATCHED + 20; at++) {
				uint64_t base = (WATCHED + 9) & ~(uint64_t)(len[l] - 1);
				bool hit = at < base + len[l] && base < at + len[s];

				memcpy(e->mem + CODE, store[s], 4);
				mode64(e, 0);
				e->v->gpr[KL_RDI] = at;
				guest_breakpoints(e, DATA(0, WRITE, len_code[l]), WATCHED + 9, 0);
				assert_run(e, KVM_EXIT_HLT);
				if (hit) {
					assert_int_equal(e->v->rip, HANDLER(1) + 1);
					assert_int_equal(frame_at_sp(e).rip,
							 CODE + 2 + (s == 1 || s == 3));
					assert_int_equal(e->v->dr6, 0xffff0ff1);
				} else {
					assert_int_equal(e->v->rip, CODE + 4);
				}
			}
		}
	}
}

static void watch_kinds(void **state)
{
	struct env *e = *state;

	/* mov eax, [WATCHED]; hlt */
	env_code(e, 0x8b, 0x04, 0x25, 0, 0x50, 0, 0, 0xf4);
	mode64(e, 0);
	guest_breakpoints(e, DATA(0, WRITE, LEN4), WATCHED, 0);
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->rip, CODE + 8);
	mode64(e, 0);
	guest_breakpoints(e, DATA(1, ACCESS, LEN4), 0, WATCHED);
	assert_vector(e, 1);
	assert_int_equal(e->v->dr6, 0xffff0ff2);
	/* lock inc dword [WATCHED]; two registers at once, one of them disabled */
	env_code(e, 0xf0, 0xff, 0x04, 0x25, 0, 0x50, 0, 0, 0xf4);
	mode64(e, 0);
	guest_breakpoints(e, DATA(0, WRITE, LEN1) | (DATA(1, WRITE, LEN4) & ~EXEC(1)), WATCHED + 3,
			  WATCHED);
	assert_vector(e, 1);
	assert_int_equal(e->v->dr6, 0xffff0ff1);
	/* push: the stack is memory */
	env_code(e, 0x50, 0xf4);
	mode64(e, 0);
	guest_breakpoints(e, DATA(0, WRITE, LEN8), STACK - 8, 0);
	assert_vector(e, 1);
	assert_int_equal(frame_at_sp(e).rip, CODE + 1);
	/* movups [WATCHED - 8], xmm0: 16 bytes */
	env_code(e, 0x0f, 0x11, 0x04, 0x25, 0xf8, 0x4f, 0, 0, 0xf4);
	mode64(e, 0);
	guest_breakpoints(e, DATA(0, WRITE, LEN1), WATCHED + 7, 0);
	assert_vector(e, 1);
}

/* The trap of a repeated instruction comes after the iteration that hit. */
static void watch_repeated(void **state)
{
	struct env *e = *state;

	env_code(e, 0xf3, 0x48, 0xab, 0xf4); /* rep stosq; hlt */
	mode64(e, 0);
	e->v->gpr[KL_RCX] = 100;
	e->v->gpr[KL_RDI] = WATCHED;
	guest_breakpoints(e, DATA(0, WRITE, LEN1), WATCHED + 9 * 8 + 3, 0);
	assert_vector(e, 1);
	assert_int_equal(frame_at_sp(e).rip, CODE);
	assert_int_equal(e->v->gpr[KL_RCX], 90);
	assert_int_equal(frame_at_sp(e).rflags & KL_FL_RF, KL_FL_RF);
	assert_int_equal(e->v->gpr[KL_RDI], WATCHED + 80);
}

/* An instruction that faults has hit nothing. */
static void fault_drops_the_hit(void **state)
{
	struct env *e = *state;

	env_code(e, 0x48, 0xa5); /* movsq */
	mode64(e, 0);
	e->v->gpr[KL_RSI] = WATCHED;
	e->v->gpr[KL_RDI] = P_ABSENT;
	guest_breakpoints(e, DATA(0, ACCESS, LEN8), WATCHED, 0);
	assert_vector(e, 14);
	assert_int_equal(e->v->dr6, 0xffff0ff0);
}

/* What hits while SS is loaded waits for the next instruction, and no breakpoint is on that. */
static void mov_ss(void **state)
{
	struct env *e = *state;

	/* mov ss, [WATCHED]; inc eax; hlt */
	env_code(e, 0x8e, 0x14, 0x25, 0, 0x50, 0, 0, 0xff, 0xc0, 0xf4);
	mode64(e, 0);
	put64(e, WATCHED, SEL_DATA);
	guest_breakpoints(e, DATA(0, ACCESS, LEN2) | EXEC(1), WATCHED, CODE + 7);
	assert_vector(e, 1);
	assert_int_equal(frame_at_sp(e).rip, CODE + 9);
	assert_int_equal(e->v->gpr[KL_RAX], 1);
	assert_int_equal(e->v->dr6, 0xffff0ff1);
	/* Single-step, too. */
	mode64(e, 0);
	put64(e, WATCHED, SEL_DATA);
	guest_breakpoints(e, 0, 0, 0);
	e->v->rflags |= KL_FL_TF;
	assert_vector(e, 1);
	assert_int_equal(frame_at_sp(e).rip, CODE + 9);
	assert_int_equal(e->v->dr6, 0xffff4ff0);
}

static void port_breakpoint(void **state)
{
	struct env *e = *state;

	env_code(e, 0xe7, 0x40, 0x90, 0xf4); /* out 0x40, eax; nop; hlt */
	mode64(e, 0);
	e->v->cr4 |= KL_CR4_DE;
	guest_breakpoints(e, DATA(0, IO, LEN1), 0x43, 0);
	assert_run(e, KVM_EXIT_IO);
	assert_int_equal(e->v->rip, CODE);
	assert_vector(e, 1);
	assert_int_equal(frame_at_sp(e).rip, CODE + 2);
	assert_int_equal(e->v->dr6, 0xffff0ff1);
	/* Another port; and without CR4.DE. */
	for (unsigned de = 0; de < 2; de++) {
		mode64(e, 0);
		e->v->cr4 |= de ? KL_CR4_DE : 0;
		guest_breakpoints(e, DATA(0, IO, LEN1), de ? 0x44 : 0x43, 0);
		assert_run(e, KVM_EXIT_IO);
		assert_run(e, KVM_EXIT_HLT);
		assert_int_equal(e->v->rip, CODE + 4);
	}
}

static void general_detect(void **state)
{
	struct env *e = *state;

	env_code(e, 0x0f, 0x21, 0xc0); /* mov rax, dr0 */
	mode64(e, 0);
	guest_breakpoints(e, KL_DR7_GD, 0, 0);
	assert_vector(e, 1);
	assert_int_equal(frame_at_sp(e).rip, CODE);
	assert_int_equal(e->v->dr6, 0xffff2ff0);
	assert_int_equal(e->v->dr7, 0x400);
}

/* The rest of the page is used, too, before and after. */
static void watched_page_is_busy(void **state)
{
	struct env *e = *state;

	/* mov [rdi + 64], al; mov al, [rdi + 64]; mov [rdi], al; hlt */
	env_code(e, 0x88, 0x47, 0x40, 0x8a, 0x47, 0x40, 0x88, 0x07, 0xf4);
	mode64(e, 0);
	e->v->gpr[KL_RDI] = WATCHED;
	guest_breakpoints(e, DATA(0, WRITE, LEN1), WATCHED, 0);
	assert_vector(e, 1);
	assert_int_equal(frame_at_sp(e).rip, CODE + 8);
}

/* Written by the guest itself, and off again. */
static void guest_sets_registers(void **state)
{
	struct env *e = *state;

	/* mov dr0, rdi; mov dr7, rbx; mov [rdi], eax; mov dr7, rcx; mov [rdi], eax; hlt */
	env_code(e, 0x0f, 0x23, 0xc7, 0x0f, 0x23, 0xfb, 0x89, 0x07, 0x0f, 0x23, 0xf9, 0x89, 0x07,
		 0xf4);
	mode64(e, 0);
	e->v->gpr[KL_RDI] = WATCHED;
	e->v->gpr[KL_RBX] = DATA(0, WRITE, LEN4);
	assert_vector(e, 1);
	assert_int_equal(frame_at_sp(e).rip, CODE + 8);
	enter_at(e, CODE + 8, STACK);
	e->v->gpr[KL_RDI] = WATCHED;
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->rip, CODE + 14);
}

/* ---- the program's ---- */

static void program_int3(void **state)
{
	struct kvm_guest_debug d = {.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP};
	struct env *e = *state;

	env_code(e, 0x90, 0xcc);
	mode64(e, 3);
	assert_int_equal(kl_x86_set_guest_debug(e->v, &d), 0);
	assert_run(e, KVM_EXIT_DEBUG);
	assert_int_equal(e->v->exit.debug.exception, 3);
	assert_int_equal(e->v->exit.debug.pc, CODE + 1);
	assert_int_equal(e->v->rip, CODE + 1);
	/* It was the guest's own: hand it back. */
	d.control |= KVM_GUESTDBG_INJECT_BP;
	assert_int_equal(kl_x86_set_guest_debug(e->v, &d), 0);
	assert_int_equal(kl_x86_set_guest_debug(e->v, &d), -EBUSY);
	assert_vector(e, 3);
	assert_int_equal(frame_at_sp(e).rip, CODE + 2);
}

/* The program's registers are in force, the guest's are what it reads. */
static void program_breakpoint(void **state)
{
	struct env *e = *state;

	env_code(e, 0x90, 0x0f, 0x21, 0xc0, 0xf4); /* nop; mov rax, dr0; hlt */
	mode64(e, 0);
	guest_breakpoints(e, EXEC(0), CODE, 0);
	program_breakpoints(e, KVM_GUESTDBG_USE_HW_BP, EXEC(0), CODE + 1);
	assert_debug(e, CODE + 1, 0xffff0ff1);
	assert_int_equal(e->v->exit.debug.dr7, EXEC(0) | 0x400);
	assert_int_equal(e->v->dr6, 0xffff0ff0);
	/* Still there, until the program steps over it. */
	assert_debug(e, CODE + 1, 0xffff0ff1);
	program_breakpoints(e, KVM_GUESTDBG_SINGLESTEP, 0, 0);
	assert_debug(e, CODE + 4, 0xffff4ff0);
	assert_int_equal(e->v->gpr[KL_RAX], CODE);
}

static void program_watches(void **state)
{
	struct env *e = *state;

	env_code(e, 0x88, 0x07, 0x90, 0xf4); /* mov [rdi], al; nop; hlt */
	mode64(e, 0);
	e->v->gpr[KL_RDI] = WATCHED;
	program_breakpoints(e, KVM_GUESTDBG_USE_HW_BP, DATA(0, WRITE, LEN1), WATCHED);
	assert_debug(e, CODE + 2, 0xffff0ff1);
	assert_run(e, KVM_EXIT_HLT);
}

static void program_general_detect(void **state)
{
	struct env *e = *state;

	env_code(e, 0x0f, 0x21, 0xc0);
	mode64(e, 0);
	program_breakpoints(e, KVM_GUESTDBG_USE_HW_BP, KL_DR7_GD, 0);
	assert_debug(e, CODE, 0xffff2ff0);
}

static void single_step(void **state)
{
	struct env *e = *state;

	/* nop; out 0x40, al; mov ss, eax; nop; hlt */
	env_code(e, 0x90, 0xe6, 0x40, 0x8e, 0xd0, 0x90, 0xf4);
	mode64(e, 0);
	e->v->gpr[KL_RAX] = SEL_DATA;
	program_breakpoints(e, KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_BLOCKIRQ, 0, 0);
	atomic_store(&e->v->nmi.pending, 1);
	assert_debug(e, CODE + 1, 0xffff4ff0);
	assert_run(e, KVM_EXIT_IO);
	assert_debug(e, CODE + 3, 0xffff4ff0);
	assert_debug(e, CODE + 6, 0xffff4ff0);
	assert_run(e, KVM_EXIT_HLT);
	/* Not in the handler of the NMI before all this is off. */
	assert_int_equal(e->v->rip, CODE + 7);
	program_breakpoints(e, 0, 0, 0);
	assert_vector(e, 2);
}

/* A guest's #DB shows as pending, with DR6 still to come, or with its effect. */
static void payload(void **state)
{
	struct kvm_vcpu_events ev;
	struct env *e = *state;

	for (unsigned cap = 0; cap < 2; cap++) {
		env_code(e, 0x88, 0x04, 0x25, 0, 0x40, 0x10, 0); /* mov [P_MMIO], al */
		mode64(e, 0);
		e->vm->exception_payload = cap;
		guest_breakpoints(e, DATA(0, WRITE, LEN1), P_MMIO, 0);
		assert_run(e, KVM_EXIT_MMIO);
		kl_x86_get_events(e->v, &ev);
		assert_int_equal(ev.exception.nr, 1);
		assert_int_equal(ev.exception.pending, 1);
		assert_int_equal(ev.exception_has_payload, cap);
		assert_int_equal(ev.exception_payload, cap);
		assert_int_equal(e->v->dr6, cap ? 0xffff0ff0 : 0xffff0ff1);
		assert_vector(e, 1);
		assert_int_equal(e->v->dr6, 0xffff0ff1);
	}
}

#define TEST(fn) cmocka_unit_test_setup_teardown(fn, env_setup, env_teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(instruction_breakpoint),
		TEST(resume_flag),
		TEST(breakpoint_on_repeated),
		TEST(watch_lengths),
		TEST(watch_kinds),
		TEST(watch_repeated),
		TEST(fault_drops_the_hit),
		TEST(mov_ss),
		TEST(port_breakpoint),
		TEST(general_detect),
		TEST(watched_page_is_busy),
		TEST(guest_sets_registers),
		TEST(program_int3),
		TEST(program_breakpoint),
		TEST(program_watches),
		TEST(program_general_detect),
		TEST(single_step),
		TEST(payload),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
