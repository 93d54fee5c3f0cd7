/* SPDX-License-Identifier: MIT */
/*
 * Code that changes while it is in use (T8): by the code itself, by another vCPU, and by the
 * program through its own mapping, where the guest is told by an interrupt or polls. The pages are
 * hot, so that they are tracked and blocks are not compared each time.
 */
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include "base/racepoint.h"
#include "host/sys.h"
#include "mmu/track.h"
#include "x86/block.h"
#include "x86/code.h"
#include "x86_env.h"

#define ROUNDS 10000u
#define FUNC   0x40000ul /* mov eax, imm32; ret */
#define WORDS  0x50000ul
#define FLAG   (WORDS + 0x00) /* the round that is to be done */
#define ACK    (WORDS + 0x40) /* the last that was */
#define RESULT (WORDS + 0x48)
#define STOP   (WORDS + 0x80)

#define SNIPPET(name, text)                                                       \
	extern const uint8_t name[], name##_end[];                                \
	__asm__(".pushsection .rodata\n" #name ":\n.intel_syntax noprefix\n" text \
		"\n.att_syntax\n" #name "_end:\n.popsection")

static void put(struct env *e, uint64_t gpa, const uint8_t *s, const uint8_t *end)
{
	memcpy(e->mem + gpa, s, (size_t)(end - s));
}
#define PUT(e, gpa, name) put(e, gpa, name, name##_end)

/* FUNC returns @x. Its immediate operand is one store. */
static void put_function(struct env *e, uint32_t x)
{
	e->mem[FUNC] = 0xb8;
	memcpy(e->mem + FUNC + 1, &x, 4);
	e->mem[FUNC + 5] = 0xc3;
}

static uint32_t word(struct env *e, uint64_t gpa)
{
	return __atomic_load_n((uint32_t *)(void *)(e->mem + gpa), __ATOMIC_ACQUIRE);
}

static void set_word(struct env *e, uint64_t gpa, uint32_t x)
{
	__atomic_store_n((uint32_t *)(void *)(e->mem + gpa), x, __ATOMIC_RELEASE);
}

/* ---- one vCPU ---- */

/* The instruction behind the store, in the same block. */
SNIPPET(c_same_block, "lea rdi, .Limm[rip]\n"
		      ".Lagain: mov [rdi + 1], cl\n.Limm: mov al, 0\nmovzx eax, al\nadd rbx, rax\n"
		      "dec ecx\njnz .Lagain\nhlt");

/* T8: a store into the very block that runs. */
static void same_block(void **state)
{
	struct env *e = *state;
	uint64_t sum = 0;

	mode64(e, 0);
	PUT(e, CODE, c_same_block);
	for (unsigned i = 1; i <= ROUNDS; i++)
		sum += (uint8_t)i;
	e->v->gpr[KL_RCX] = ROUNDS;
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->gpr[KL_RBX], sum);
}

/* The function in the next page is called 300 times, so that it is trusted, then changed. */
SNIPPET(c_next_page,
	"mov r8d, 30\n"
	".Lround: mov [rdi + 1], r8d\nmov edx, 300\n"
	".Lcall: call rdi\nadd rbx, rax\n.byte 0xe8\n.long 0x40000 - 0x1000 - (.Lafter - "
	"c_next_page)\n"
	".Lafter: add rbx, rax\ndec edx\njnz .Lcall\ndec r8d\njnz .Lround\n"
	"mov r8d, 10000\n"
	".Leach: mov [rdi + 1], r8d\n.byte 0xe8\n.long 0x40000 - 0x1000 - (.Lback - c_next_page)\n"
	".Lback: add rsi, rax\ndec r8d\njnz .Leach\nhlt");

/* T8: a function in another page, which is hot when it is changed; and is changed all the time. */
static void next_page(void **state)
{
	struct env *e = *state;

	mode64(e, 0);
	PUT(e, CODE, c_next_page);
	put_function(e, 0);
	e->v->gpr[KL_RDI] = FUNC;
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->gpr[KL_RBX], 600 * (30 * 31 / 2));
	assert_int_equal(e->v->gpr[KL_RSI], (uint64_t)ROUNDS * (ROUNDS + 1) / 2);
}

/* An instruction in two pages: the second has the operand. It is the last of a block. */
SNIPPET(c_crossing,
	".Lmore: mov [rdi], ecx\n.byte 0xe9\n.long 0x40fff - 0x1000 - (.Lhere - c_crossing)\n"
	".Lhere: add rbx, rax\ndec ecx\njnz .Lmore\nhlt");

/* T8: a store into the next page of what runs. */
static void crossing(void **state)
{
	struct env *e = *state;
	/* jmp back */
	int32_t back = (int32_t)(CODE + 7 - (FUNC + 0x1000 + 9));

	mode64(e, 0);
	PUT(e, CODE, c_crossing);
	e->mem[FUNC + 0xfff] = 0xb8;
	e->mem[FUNC + 0x1004] = 0xe9;
	memcpy(e->mem + FUNC + 0x1005, &back, 4);
	e->v->gpr[KL_RDI] = FUNC + 0x1000;
	e->v->gpr[KL_RCX] = ROUNDS;
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->gpr[KL_RBX], (uint64_t)ROUNDS * (ROUNDS + 1) / 2);
}

/* T8, M4: what went on in the next page becomes an instruction that ends before it. */
static void crosses_no_more(void **state)
{
	/* add eax, 0x90909001, in two pages; dec ecx; jnz back; hlt */
	static const uint8_t code[] = {0x05, 0x01, 0x90, 0x90, 0x90, 0xff, 0xc9, 0x75, 0xf7, 0xf4};
	static const uint8_t inc[] = {0xff, 0xc0}; /* inc eax */
	const uint64_t at = FUNC + 0xffe, entry = TABLES + 0x3000 + ((FUNC + 0x1000) >> 9);
	struct env *e = *state;

	mode64(e, 0);
	memcpy(e->mem + at, code, sizeof(code));
	enter_at(e, at, STACK);
	e->v->gpr[KL_RCX] = ROUNDS;
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->gpr[KL_RAX], (uint32_t)(0x90909001 * ROUNDS));
	/* It needs no more of that page, and the next one does; and it needs it again. */
	put64(e, entry, 0);
	for (unsigned i = 0; i < 2; i++) {
		memcpy(e->mem + at, i ? code : inc, 2);
		enter_at(e, at, STACK);
		kl_tlb_flush(e->v);
		assert_vector(e, KL_EXC_PF);
		assert_int_equal(e->v->cr2, FUNC + 0x1000);
		assert_int_equal(get64(e, e->v->gpr[KL_RSP] + 8), at + (i ? 0 : 2));
		assert_int_equal(e->v->gpr[KL_RAX], i ? 0 : 1);
	}
}

/* T8, T5: a hot page whose slot goes and comes back with other memory. */
static void slot_replaced(void **state)
{
	/* .again: call FUNC; dec ecx; jnz .again; hlt */
	static const uint8_t loop[] = {0xe8, 0, 0, 0, 0, 0xff, 0xc9, 0x75, 0xf7, 0xf4};
	struct env *e = *state;
	uint8_t *other =
		mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int32_t to = (int32_t)(FUNC - (CODE + 5));

	mode64(e, 0);
	/* FUNC's linear address is in that slot. */
	put64(e, TABLES + 0x3000 + (FUNC >> 9), 0x800000 | 7);
	memcpy(e->mem + CODE, loop, sizeof(loop));
	memcpy(e->mem + CODE + 1, &to, 4);
	for (unsigned i = 0; i < 3; i++) {
		other[0] = 0xb8;
		memcpy(other + 1, &i, 4);
		other[5] = 0xc3;
		assert_int_equal(env_slot(e, 3, 0, 0x800000, 4096, other), 0);
		enter_at(e, CODE, STACK);
		e->v->gpr[KL_RCX] = 1000;
		assert_run(e, KVM_EXIT_HLT);
		assert_int_equal((uint32_t)e->v->gpr[KL_RAX], i);
		assert_true(kl_track_is(&e->vm->mem, 0, 0x800));
		assert_int_equal(env_slot(e, 3, 0, 0, 0, NULL), 0);
		assert_false(kl_track_is(&e->vm->mem, 0, 0x800));
	}
	munmap(other, 4096);
}

/* T8: memory that two slots share is not trusted. */
static void shared_memory(void **state)
{
	struct env *e = *state;

	mode64(e, 0);
	PUT(e, CODE, c_next_page);
	put_function(e, 0);
	assert_int_equal(env_slot(e, 3, 0, 0x800000, 4096, e->mem + FUNC), 0);
	e->v->gpr[KL_RDI] = FUNC;
	assert_run(e, KVM_EXIT_HLT);
	assert_false(kl_track_is(&e->vm->mem, 0, FUNC >> 12));
	assert_true(kl_track_is(&e->vm->mem, 0, CODE >> 12));
}

/* ---- two threads ---- */

/*
 * The vCPU that runs FUNC: waits until FLAG is not the last round, calls, notes result and round.
 * eax = 0 in FLAG ends it.
 */
#define WAITER(name, wait)                                                                 \
	SNIPPET(name, "xor r9d, r9d\n.Lw" #name ": " wait "mov eax, [rdi]\ncmp eax, r9d\n" \
		      "je .Lw" #name "\nmov r9d, eax\ntest eax, eax\njs .Le" #name "\n"    \
		      ".byte 0xe8\n.long 0x40000 - 0x1000 - (.Lc" #name " - " #name ")\n"  \
		      ".Lc" #name ": mov [rdi + 0x48], eax\nmov [rdi + 0x40], r9d\n"       \
		      "jmp .Lw" #name "\n.Le" #name ": hlt")
WAITER(c_wait, "");
WAITER(c_wait_pause, "pause\n");
WAITER(c_wait_cpuid, "push rbx\nxor eax, eax\ncpuid\npop rbx\n");

#define CODE2 0x60000ul
/* The vCPU that writes FUNC: for each round from the 1000th on, when it is trusted, stores the
 * operand, then FLAG, and waits for ACK. */
SNIPPET(c_writer,
	"mov ecx, 1\n"
	".Lnext_round: lea eax, [rcx + rcx * 2]\ncmp ecx, 1000\njb .Ltell\nmov [rsi + 1], eax\n"
	".Ltell: mov [rdi], ecx\n"
	".Lwait_ack: cmp [rdi + 0x40], ecx\njne .Lwait_ack\n"
	"mov eax, [rdi + 0x48]\nlea edx, [rcx + rcx * 2]\ncmp ecx, 1000\njb .Lgood\n"
	"cmp eax, edx\njne .Lbad\n"
	".Lgood: inc ecx\ncmp ecx, 10001\njne .Lnext_round\n"
	"mov dword ptr [rdi], -1\n.Lbad: hlt");

static void start_waiter(struct env *e, pthread_t *t)
{
	enter_at(e, CODE, STACK);
	e->v->gpr[KL_RDI] = WORDS;
	pthread_create(t, NULL, env_thread, e);
}

/* T8: one vCPU changes what the other runs, and tells it; without anything that serialises. */
static void cross(void **state)
{
	struct env *e = *state;
	struct kvm_sregs sregs;
	struct kvm_cpuid_entry2 cpuid[100];
	struct env b;
	pthread_t t[2];
	int n = kl_x86_supported_cpuid(cpuid, 100);

	mode64(e, 0);
	b = *e;
	assert_int_equal(kl_x86_vcpu_create(e->vm, 1, &b.v), 0);
	assert_int_equal(kl_x86_set_cpuid(b.v, cpuid, (unsigned)n), 0);
	kl_x86_get_sregs(e->v, &sregs);
	assert_int_equal(kl_x86_set_sregs(b.v, &sregs), 0);
	PUT(e, CODE, c_wait);
	PUT(e, CODE2, c_writer);
	put_function(e, 0);
	b.v->mp_state = KVM_MP_STATE_RUNNABLE;
	enter_at(&b, CODE2, STACK - 0x800);
	b.v->gpr[KL_RDI] = WORDS;
	b.v->gpr[KL_RSI] = FUNC;
	start_waiter(e, &t[0]);
	pthread_create(&t[1], NULL, env_thread, &b);
	assert_int_equal(env_join(t[1]), 0);
	set_word(e, FLAG, (uint32_t)-1);
	assert_int_equal(env_join(t[0]), 0);
	assert_int_equal(b.v->gpr[KL_RCX], ROUNDS + 1);
	kl_notifier_remove_vm(&e->vm->mem);
	kl_x86_vcpu_destroy(b.v);
}

/* The program: reads FUNC's operand from a file into guest memory. */
static int new_file(void)
{
	return kl_sys_memfd("code", 4096, 0);
}

static void load_function(struct env *e, int fd, uint32_t x)
{
	assert_int_equal(pwrite(fd, &x, 4, 0), 4);
	assert_int_equal(pread(fd, e->mem + FUNC + 1, 4, 0), 4);
}

/* The guest and the program race, as they do; ThreadSanitizer knows of nothing that orders them. */
#define NEED_RACES              \
	do {                    \
		if (KL_TSAN)    \
			skip(); \
	} while (0)

/* The first rounds find the same function, so that its page is trusted. */
#define WARM 1000u

static uint32_t operand(uint32_t round)
{
	return round < WARM ? 1 : round * 5;
}

static void wait_for_ack(struct env *e, uint32_t round)
{
	while (word(e, ACK) != round)
		sched_yield();
}

/* T8: the program loads code, and the guest polls. */
static void program_polled(struct env *e)
{
	int fd = new_file();
	unsigned wrong = 0;
	pthread_t t;

	put_function(e, 0);
	start_waiter(e, &t);
	for (uint32_t i = 1; i <= WARM + ROUNDS; i++) {
		load_function(e, fd, operand(i));
		set_word(e, FLAG, i);
		wait_for_ack(e, i);
		wrong += word(e, RESULT) != operand(i);
	}
	set_word(e, FLAG, (uint32_t)-1);
	assert_int_equal(env_join(t), 0);
	assert_int_equal(wrong, 0);
	assert_true(kl_track_is(&e->vm->mem, 0, FUNC >> 12)); /* it was about trusted code */
	kl_sys_close(fd);
}

/* T8 */
static void program_polled_pause(void **state)
{
	struct env *e = *state;

	NEED_RACES;
	mode64(e, 0);
	PUT(e, CODE, c_wait_pause);
	program_polled(e);
}

/* T8 */
static void program_polled_cpuid(void **state)
{
	struct env *e = *state;

	NEED_RACES;
	mode64(e, 0);
	PUT(e, CODE, c_wait_cpuid);
	program_polled(e);
}

/* The handler of the NMI calls FUNC, and so does the main program all the time, until STOP. */
SNIPPET(c_main, ".Lmain: .byte 0xe8\n.long 0x40000 - 0x1000 - (.Lcalled - c_main)\n"
		".Lcalled: cmp dword ptr [rdi + 0x80], 0\nje .Lmain\nhlt");
SNIPPET(c_nmi, "push rax\nmov eax, [rdi]\nmov r9d, eax\n"
	       ".byte 0xe8\n.long 0x40000 - 0x9002 - (.Lnmi - c_nmi)\n"
	       ".Lnmi: mov [rdi + 0x48], eax\nmov [rdi + 0x40], r9d\npop rax\niretq");

/* T8: the program loads code, and interrupts the guest. */
static void program_interrupts(void **state)
{
	struct env *e = *state;
	int fd = new_file();
	unsigned wrong = 0;
	pthread_t t;

	NEED_RACES;
	mode64(e, 0);
	PUT(e, CODE, c_main);
	PUT(e, HANDLER(2), c_nmi);
	put_function(e, 0);
	e->v->gpr[KL_RDI] = WORDS;
	pthread_create(&t, NULL, env_thread, e);
	for (uint32_t i = 1; i <= WARM + ROUNDS; i++) {
		load_function(e, fd, operand(i));
		set_word(e, FLAG, i);
		kl_x86_nmi(e->v);
		wait_for_ack(e, i);
		wrong += word(e, RESULT) != operand(i);
	}
	set_word(e, STOP, 1);
	assert_int_equal(env_join(t), 0);
	assert_int_equal(wrong, 0);
	assert_true(kl_track_is(&e->vm->mem, 0, FUNC >> 12));
	kl_sys_close(fd);
}

/* T8: between two KVM_RUNs. */
static void program_between_runs(void **state)
{
	/* .again: call FUNC; hlt; jmp .again */
	static const uint8_t loop[] = {0xe8, 0, 0, 0, 0, 0xf4, 0xeb, 0xf8};
	struct env *e = *state;
	int32_t to = (int32_t)(FUNC - (CODE + 5));
	int fd = new_file();

	mode64(e, 0);
	memcpy(e->mem + CODE, loop, sizeof(loop));
	memcpy(e->mem + CODE + 1, &to, 4);
	put_function(e, 0);
	for (uint32_t i = 1; i <= WARM + ROUNDS; i++) {
		load_function(e, fd, operand(i));
		assert_run(e, KVM_EXIT_HLT);
		assert_int_equal((uint32_t)e->v->gpr[KL_RAX], operand(i));
	}
	assert_true(kl_track_is(&e->vm->mem, 0, FUNC >> 12));
	kl_sys_close(fd);
}

#define T(name) cmocka_unit_test_setup_teardown(name, env_setup, env_teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(same_block),
		T(next_page),
		T(crossing),
		T(crosses_no_more),
		T(slot_replaced),
		T(shared_memory),
		T(cross),
		T(program_polled_pause),
		T(program_polled_cpuid),
		T(program_interrupts),
		T(program_between_runs),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
