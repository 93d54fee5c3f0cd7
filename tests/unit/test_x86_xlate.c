/* SPDX-License-Identifier: MIT */
/*
 * What the translator owes the rest: code and blocks that go while others refer to them, memory
 * that cannot be had, faults that are none of its own. That translations do what the guest's code
 * says is compared elsewhere (tests/guest).
 */
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include "base/config.h"
#include "base/failpoint.h"
#include "base/racepoint.h"
#include "mmu/track.h"
#include "x86/block.h"
#include "x86/code.h"
#include "x86/xlate/xlate.h"
#include "x86_env.h"
#include "../random.h"

/* Blocks are translated at their first use. */
static int setup(void **state)
{
	kl_config_init();
	kl_config.translate = true;
	kl_config.check = false;
	kl_config.translate_after = 0;
	kl_config.block_part = kl_config.code_part = 0;
	return env_setup(state);
}

static int setup_few_blocks(void **state)
{
	int r = setup(state);

	/* They are looked at when the first block is made, and translated. */
	kl_config.block_part = 8 << 10;
	kl_config.code_part = 256 << 10;
	return r;
}

static int setup_little_code(void **state)
{
	int r = setup(state);

	kl_config.code_part = 256 << 10;
	return r;
}

static struct kl_xlate *xlate(struct env *e)
{
	return e->v->blocks->xlate;
}

/* 1: inc eax; dec ecx; jnz 1b; hlt */
static const uint8_t count[] = {0xff, 0xc0, 0xff, 0xc9, 0x75, 0xfa, 0xf4};

static void run_count(struct env *e)
{
	memcpy(e->mem + CODE, count, sizeof(count));
	enter_at(e, CODE, STACK);
	e->v->gpr[KL_RCX] = 1000;
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal((uint32_t)e->v->gpr[KL_RAX], 1000);
}

static void rel32(uint8_t **p, const uint8_t *mem, uint64_t to)
{
	int32_t rel = (int32_t)(to - (uint64_t)(*p + 4 - mem));

	memcpy(*p, &rel, 4);
	*p += 4;
}

/* ---- state ---- */

/* V4: what looks whether a quotient will do spoils the host's flags, which #DE shows. */
static void flags_before_quotient(void **state)
{
	/* stc; dec qword [rsi]; idiv qword [rsi + 8]; hlt */
	static const uint8_t code[] = {0xf9, 0x48, 0xff, 0x0e, 0x48, 0xf7, 0x7e, 0x08, 0xf4};
	const uint64_t data = 0xc000,
		       flags = KL_FL_CF | KL_FL_PF | KL_FL_AF | KL_FL_SF | KL_FL_RF | 2;
	struct env *e = *state;

	mode64(e, 0);
	memcpy(e->mem + CODE, code, sizeof(code));
	for (uint64_t i = 0; i < 5; i++) {
		put64(e, data, 0);
		put64(e, data + 8, i < 4); /* 0: #DE */
		enter_at(e, CODE, STACK);
		e->v->gpr[KL_RSI] = data;
		assert_run(e, KVM_EXIT_HLT);
		assert_int_equal(e->v->rip, i < 4 ? CODE + sizeof(code) : HANDLER(0) + 1);
	}
	assert_int_not_equal(xlate(e)->nr_translated, 0);
	assert_int_equal(get64(e, e->v->gpr[KL_RSP] + 16), flags);
}

/* V4: no target is taken for what is in the table of targets where nothing is. */
static void jumps_anywhere(void **state)
{
	/* jmp rax; hlt */
	static const uint8_t code[] = {0xff, 0xe0, 0xf4};
	static const uint64_t none[] = {1ull << 63, 1ull << 63 | 1, 1ull << 63 | 2, 1ull << 62};
	struct env *e = *state;

	mode64(e, 0);
	memcpy(e->mem + CODE, code, sizeof(code));
	for (unsigned i = 0; i < 5 + KL_ARRAY_SIZE(none); i++) {
		enter_at(e, CODE, STACK);
		e->v->gpr[KL_RAX] = i < 5 ? CODE + 2 : none[i - 5];
		assert_run(e, KVM_EXIT_HLT);
		assert_int_equal(e->v->rip, i < 5 ? CODE + 3 : HANDLER(KL_EXC_GP) + 1);
	}
	assert_int_not_equal(xlate(e)->nr_translated, 0);
}

/* ---- faults ---- */

static sigjmp_buf back;
static bool expected;

static void own_handler(int sig)
{
	static const char text[] = "a fault of the engine's\n";

	if (expected)
		siglongjmp(back, 1);
	(void)!write(STDERR_FILENO, text, sizeof(text) - 1);
	_exit(1);
}

/* A fault of the program's, in a thread whose vCPU has gone. */
static void own_fault(void **state)
{
	char *nowhere = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct env *e;
	void *other;

	assert_int_equal(env_setup(&other), 0);
	e = other;
	mode64(e, 0);
	run_count(e);
	assert_null(kl_self.generated);
	/* Out of translated code by longjmp: [rbx] is a device. */
	env_code(e, 0xff, 0xc0, 0xff, 0xc9, 0x75, 0xfa, 0x8a, 0x03, 0xf4);
	enter_at(e, CODE, STACK);
	e->v->gpr[KL_RCX] = 1000;
	e->v->gpr[KL_RBX] = P_MMIO;
	assert_run(e, KVM_EXIT_MMIO);
	assert_true(xlate(e)->nr_translated > 0);
	assert_null(kl_self.generated);
	env_teardown(&other);
	/* The engine's own access, and the program's. */
	assert_int_equal(kl_guard_copy(nowhere, "x", 1), -EFAULT);
	expected = true;
	if (!sigsetjmp(back, 1)) {
		*(volatile char *)nowhere = 1;
		fail();
	}
	expected = false;
	munmap(nowhere, 4096);
}

/* ---- memory that cannot be had ---- */

static void without(struct env *e, const char *what)
{
	mode64(e, 0);
	kl_failpoint_arm(what, 1);
	run_count(e);
	run_count(e);
	assert_true(xlate(e)->refused);
	assert_int_equal(xlate(e)->nr_translated, 0);
}

/* Where nothing may be executed that was written, the interpreter goes on. */
static void no_code(void **state)
{
	if (!kl_failpoints_enabled())
		skip();
	without(*state, "x86-xlate-code");
}

static void no_lists(void **state)
{
	if (!kl_failpoints_enabled())
		skip();
	without(*state, "x86-xlate-lists");
}

/* ---- entries ---- */

static unsigned nr_may_be_entered(struct env *e)
{
	unsigned n = 0;

	for (unsigned i = 0; i < KL_XLATE_PARTS; i++)
		for (unsigned k = 0; k < xlate(e)->parts[i].nr_blocks; k++)
			n += xlate(e)->parts[i].blocks[k]->pass != KL_STALE;
	return n;
}

/* T8: when core.pass begins anew, what blocks remember of it is no valid value any more. */
static void pass_wraps(void **state)
{
	struct env *e = *state;

	mode64(e, 0);
	run_count(e);
	run_count(e);
	assert_int_not_equal(nr_may_be_entered(e), 0);
	e->v->core.pass = UINT32_MAX - 4; /* the access mode is in two bits */
	kl_code_void(e->v);
	assert_int_not_equal(nr_may_be_entered(e), 0);
	kl_code_void(e->v);
	assert_int_equal(e->v->core.pass >> 2, 0);
	assert_int_equal(nr_may_be_entered(e), 0);
	run_count(e);
}

/* ---- code that is written while it runs ---- */

#define ALIAS 0x200000ul /* lower 2 MiB again */

struct writer {
	struct env *e;
	pthread_t thread;
};

static void *write_code(void *arg)
{
	struct env *e = ((struct writer *)arg)->e;
	int token;

	kl_engine_enter();
	token = kl_track_begin(&e->vm->mem);
	kl_track_write(&e->vm->mem, 0, CODE + 0x800, "x", 1);
	kl_track_end(&e->vm->mem, token);
	kl_engine_leave();
	return NULL;
}

/*
 * T8: somebody has written a page and has not told the vCPUs yet; somebody else sees that it is
 * dead, and takes it off. A block in it goes on, gets an entry of its TLB by which it may write the
 * page, and changes the instruction behind.
 */
static void taken_off(void **state)
{
	struct env *e = *state;
	/* mov [rsi], rax; test ecx, ecx; jz 1f; mov bl, [rdi]; mov [rdi], dl; 1: mov al, 0; hlt */
	static const uint8_t code[] = {0x48, 0x89, 0x06, 0x85, 0xc9, 0x74, 0x04,
				       0x8a, 0x1f, 0x88, 0x17, 0xb0, 0,    0xf4};
	struct writer writer = {.e = e};
	pthread_t vcpu;
	/* mov [CODE + 0x900], al; hlt */
	static const uint8_t touch[] = {0x88, 0x04, 0x25, 0, 0x19, 0, 0, 0xf4};
	struct kvm_sregs sregs;
	struct env other = *e;
	struct kvm_regs r = {.rip = CODE,
			     .rsp = STACK,
			     .rflags = 2,
			     .rsi = ALIAS - 4,
			     .rdi = ALIAS + CODE + 12,
			     .rdx = 7};
	int result;

	if (!kl_racepoints_enabled())
		skip();
	mode64(e, 0);
	put64(e, TABLES + 0x2008, (TABLES + 0x3000) | 7);
	assert_int_equal(kl_x86_vcpu_create(e->vm, 1, &other.v), 0);
	kl_x86_get_sregs(e->v, &sregs);
	assert_int_equal(kl_x86_set_sregs(other.v, &sregs), 0);
	other.v->mp_state = KVM_MP_STATE_RUNNABLE;
	memcpy(e->mem + CODE, code, sizeof(code));
	for (unsigned i = 0; i < 5; i++) {
		kl_x86_set_regs(e->v, &r);
		assert_run(e, KVM_EXIT_HLT);
		assert_int_equal((uint8_t)e->v->gpr[KL_RAX], 0);
	}
	assert_true(kl_track_is(&e->vm->mem, 0, CODE >> KL_PAGE_SHIFT));
	assert_int_not_equal(xlate(e)->nr_translated, 0);

	r.rcx = 1;
	kl_x86_set_regs(e->v, &r);
	kl_racepoint_arm("split-store", 1);
	pthread_create(&vcpu, NULL, env_thread, e);
	assert_true(kl_racepoint_wait("split-store", 10000));
	kl_racepoint_arm("code-killed", 1);
	pthread_create(&writer.thread, NULL, write_code, &writer);
	assert_true(kl_racepoint_wait("code-killed", 10000));
	kl_engine_enter();
	kl_code_reap(e->vm);
	kl_engine_leave();
	assert_false(kl_track_is(&e->vm->mem, 0, CODE >> KL_PAGE_SHIFT));
	/* Another vCPU writes there, so that the page is mapped for writing. */
	memcpy(e->mem + 0xb000, touch, sizeof(touch));
	enter_at(&other, 0xb000, STACK0);
	assert_run(&other, KVM_EXIT_HLT);
	kl_racepoint_release("split-store");
	result = env_join(vcpu);
	kl_racepoint_release("code-killed");
	pthread_join(writer.thread, NULL);
	assert_int_equal(result, 0);
	assert_int_equal(e->v->exit.reason, KVM_EXIT_HLT);
	assert_int_equal((uint8_t)e->v->gpr[KL_RAX], 7);
	kl_notifier_remove_vm(&e->vm->mem);
	kl_x86_vcpu_destroy(other.v);
}

/* T8: edges to a block whose bytes have changed lead to the one that has come instead. */
static void replaced(void **state)
{
	enum { FUNC = 0x8000 };
	/* 1: call FUNC; dec ecx; jnz 1b; hlt */
	static const uint8_t loop[] = {0xe8, 0, 0, 0, 0, 0xff, 0xc9, 0x75, 0xf7, 0xf4};
	struct env *e = *state;
	int32_t to = FUNC - (CODE + 5);

	mode64(e, 0);
	memcpy(e->mem + CODE, loop, sizeof(loop));
	memcpy(e->mem + CODE + 1, &to, 4);
	for (uint32_t i = 0; i < 3; i++) {
		uint64_t before = xlate(e)->nr_instead;

		/* mov eax, i; ret */
		e->mem[FUNC] = 0xb8;
		memcpy(e->mem + FUNC + 1, &i, 4);
		e->mem[FUNC + 5] = 0xc3;
		enter_at(e, CODE, STACK);
		e->v->gpr[KL_RCX] = 1000;
		assert_run(e, KVM_EXIT_HLT);
		assert_int_equal((uint32_t)e->v->gpr[KL_RAX], i);
		/* Not each time by way of C */
		assert_in_range(xlate(e)->nr_instead - before, i ? 1 : 0, 100);
	}
}

#define FUNC_PAGE 0x8000ul
#define END       0xb000ul
#define MAX_ADDS  32u

/* What a run has come to, in a number. */
static uint64_t outcome_with(struct env *e, uint64_t rsi)
{
	enter_at(e, CODE, STACK);
	e->v->gpr[KL_RSI] = rsi;
	assert_run(e, KVM_EXIT_HLT);
	return e->v->rip + (e->v->gpr[KL_RAX] << 24) + (e->v->gpr[KL_RSP] << 12);
}

static uint64_t outcome(struct env *e)
{
	return outcome_with(e, 0);
}

static uint8_t *put_jmp(struct env *e, uint8_t *p, uint64_t to)
{
	*p++ = 0xe9;
	rel32(&p, e->mem, to);
	return p;
}

/* call FUNC_PAGE; jmp END; there hlt. Returns FUNC_PAGE's memory. */
static uint8_t *make_caller(struct env *e)
{
	uint8_t *p = e->mem + CODE;

	*p++ = 0xe8;
	rel32(&p, e->mem, FUNC_PAGE);
	put_jmp(e, p, END);
	memset(e->mem + END - 0x1000, 0xf4, 0x2000);
	return e->mem + FUNC_PAGE;
}

/* Each byte of the block in FUNC_PAGE is changed, and does what it does then. */
static void change_each(struct env *e, const uint8_t *change, unsigned len)
{
	uint64_t before = outcome(e);

	for (unsigned at = 0; at < len; at++) {
		for (unsigned k = 0; k < 4; k++)
			assert_int_equal(outcome(e), before);
		e->mem[FUNC_PAGE + at] ^= change[at];
		assert_int_not_equal(outcome(e), before);
		e->mem[FUNC_PAGE + at] ^= change[at];
	}
}

/*
 * T8: a block that is entered from a translation in a new epoch is compared, each byte of it,
 * however long it is. What a byte is changed to is a hlt, or another number.
 */
static void compared_again(void **state)
{
	static const uint8_t add[] = {0x05, 0x11, 0x22, 0x33, 0x44}, /* add eax, 0x44332211 */
		add_change[] = {0x05 ^ 0xf4, 1, 1, 1, 1},
			     jmp_change[] = {0xe9 ^ 0xf4, 1, 0x10, 0x20, 1};
	uint8_t change[5 * MAX_ADDS + 5];
	struct env *e = *state;
	uint8_t *func;

	mode64(e, 0);
	func = make_caller(e);
	memset(func, 0xf4, 0x100);
	*func = 0xc3; /* ret */
	change_each(e, (uint8_t[]){0xc3 ^ 0xf4}, 1);
	func[0] = 0xeb, func[1] = 0x40; /* jmp +0x40 */
	change_each(e, (uint8_t[]){0xeb ^ 0xf4, 1}, 2);
	for (unsigned n = 0; n < 31; n++) {
		memset(func, 0x90, n); /* nops */
		memset(change, 0x90 ^ 0xf4, n);
		put_jmp(e, func + n, END);
		memcpy(change + n, jmp_change, 5);
		change_each(e, change, n + 5);
	}
	for (unsigned n = 0; n < MAX_ADDS - 1; n++) {
		memcpy(func + 5ul * n, add, 5);
		memcpy(change + 5ul * n, add_change, 5);
		put_jmp(e, func + 5ul * n + 5, END);
		memcpy(change + 5ul * n + 5, jmp_change, 5);
		change_each(e, change, 5 * n + 10);
	}
	assert_true(xlate(e)->nr_translated > 60);
}

/* Its page is another in the guest, with the same bytes or with others. */
static void compared_where_mapped(void **state)
{
	const uint64_t pte = TABLES + 0x3000 + 8 * (FUNC_PAGE >> KL_PAGE_SHIFT);
	struct env *e = *state;
	uint64_t before;
	uint8_t *func;

	mode64(e, 0);
	func = make_caller(e);
	put_jmp(e, e->mem + CODE, FUNC_PAGE); /* no access to the stack, for that leaves */
	memset(func, 0x90, 10);
	put_jmp(e, func + 10, END);
	before = outcome(e);
	for (unsigned k = 0; k < 4; k++)
		assert_int_equal(outcome(e), before);
	for (unsigned round = 0; round < 4; round++) {
		uint64_t was = get64(e, pte), other = 0xc000 + round * KL_PAGE_SIZE;
		unsigned same = round % 2;

		memcpy(e->mem + other, func, 32);
		if (!same)
			e->mem[other + 5] = 0xf4;
		put64(e, pte, (was & 0xfff) | other);
		kl_tlb_flush(e->v);
		if (same) { /* it is found there by the interpreter, which knows nothing of the page
			     */
			enter_at(e, FUNC_PAGE, STACK);
			assert_run(e, KVM_EXIT_HLT);
		}
		for (unsigned k = 0; k < 4; k++)
			assert_int_equal(outcome(e) == before, same);
		put64(e, pte, was);
		kl_tlb_flush(e->v);
		for (unsigned k = 0; k < 4; k++)
			assert_int_equal(outcome(e), before);
	}
}

/* Its page is not tracked any more: a store into the block would not be noticed. */
static void compared_if_live(void **state)
{
	/* mov byte [rsi], 0xf4; 12 nops */
	static const uint8_t code[] = {0xc6, 0x06, 0xf4, 0x90, 0x90, 0x90, 0x90, 0x90,
				       0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90};
	struct env *e = *state;
	uint64_t before;
	uint8_t *func;

	mode64(e, 0);
	func = make_caller(e);
	put_jmp(e, e->mem + CODE, FUNC_PAGE);
	memcpy(func, code, sizeof(code));
	put_jmp(e, func + sizeof(code), END);
	before = outcome_with(e, 0xd000);
	for (unsigned k = 0; k < 4; k++)
		assert_int_equal(outcome_with(e, 0xd000), before);
	assert_true(kl_track_is(&e->vm->mem, 0, FUNC_PAGE >> KL_PAGE_SHIFT));
	/* Written too often: nobody asks for the page, and it gets into the TLB for writes. */
	for (unsigned k = 0; k < 8; k++)
		assert_int_equal(outcome_with(e, FUNC_PAGE + 0x900), before);
	assert_false(kl_track_is(&e->vm->mem, 0, FUNC_PAGE >> KL_PAGE_SHIFT));
	/* The block changes itself. */
	(void)outcome_with(e, FUNC_PAGE + 10);
	assert_int_equal(e->v->rip, FUNC_PAGE + 11);
}

/* The same, if the page's memory has gone without notice: nothing is executed, and it comes back.
 */
static void compared_with_nothing(void **state)
{
	struct env *e = *state;
	int fd = memfd_create("code", 0);
	uint64_t before;
	uint8_t *func;

	assert_int_equal(ftruncate(fd, KL_PAGE_SIZE), 0);
	assert_ptr_equal(mmap(e->mem + FUNC_PAGE, KL_PAGE_SIZE, PROT_READ | PROT_WRITE,
			      MAP_SHARED | MAP_FIXED, fd, 0),
			 e->mem + FUNC_PAGE);
	mode64(e, 0);
	func = make_caller(e);
	memset(func, 0x90, 20);
	put_jmp(e, func + 20, END);
	before = outcome(e);
	for (unsigned k = 0; k < 4; k++)
		assert_int_equal(outcome(e), before);
	assert_int_equal(ftruncate(fd, 0), 0);
	enter_at(e, CODE, STACK);
	assert_int_equal(env_run(e), -EFAULT);
	assert_int_equal(e->v->rip, FUNC_PAGE);
	/* Nor is that fault taken for another's: three nops; mov al, [rbx]; jmp. */
	env_code(e, 0x90, 0x90, 0x90, 0x8a, 0x03, 0xeb, 0xf9);
	enter_at(e, CODE, STACK);
	e->v->gpr[KL_RBX] = P_MMIO;
	assert_run(e, KVM_EXIT_MMIO);
	assert_int_equal(ftruncate(fd, KL_PAGE_SIZE), 0);
	func = make_caller(e);
	put_jmp(e, func, END);
	for (unsigned k = 0; k < 4; k++)
		assert_int_equal(outcome(e), before);
	close(fd);
}

/* ---- more code than there is room for ---- */

#define FUNCS    0x110000ul
#define FUNC_LEN 64u
#define DATA     0x50000ul
#define STRIDE   1021u

static uint32_t addend(unsigned i)
{
	return i * 2654435761u >> 4;
}

/*
 * A ring of @n functions that add and go on, in an order that is none of memory's, by all that
 * leads from block to block; rcx of them.
 */
static void make_ring(struct env *e, unsigned n)
{
	static const uint8_t access[] = {0x48, 0x03, 0x5f, 0x08, 0x48, 0x89, 0x47, 0x10,
					 0x48, 0x01, 0x77, 0x18, 0x48, 0x3b, 0x57, 0x20};

	for (unsigned i = 0; i < n; i++) {
		uint8_t *p = e->mem + FUNCS + i * FUNC_LEN;
		uint64_t next = FUNCS + (uint64_t)((i + STRIDE) % n) * FUNC_LEN;
		uint32_t x = addend(i);

		*p++ = 0x48, *p++ = 0x05; /* add rax, x */
		memcpy(p, &x, 4);
		p += 4;
		memcpy(p, access, sizeof(access));
		p += sizeof(access);
		*p++ = 0xff, *p++ = 0xc9, *p++ = 0x0f, *p++ = 0x84; /* dec ecx; jz HANDLER(0) */
		rel32(&p, e->mem, HANDLER(0));
		switch (i % 4) {
		case 0: /* mov rsp, rbp; call next */
			*p++ = 0x48, *p++ = 0x89, *p++ = 0xec, *p++ = 0xe8;
			rel32(&p, e->mem, next);
			break;
		case 1: /* lea r8, next; jmp r8 */
			*p++ = 0x4c, *p++ = 0x8d, *p++ = 0x05;
			rel32(&p, e->mem, next);
			*p++ = 0x41, *p++ = 0xff, *p++ = 0xe0;
			break;
		case 2: /* lea r8, next; push r8; ret */
			*p++ = 0x4c, *p++ = 0x8d, *p++ = 0x05;
			rel32(&p, e->mem, next);
			*p++ = 0x41, *p++ = 0x50, *p++ = 0xc3;
			break;
		default: /* test edi, edi; jnz next; ud2 */
			*p++ = 0x85, *p++ = 0xff, *p++ = 0x0f, *p++ = 0x85;
			rel32(&p, e->mem, next);
			*p++ = 0x0f, *p++ = 0x0b;
		}
	}
}

/* Walks from anywhere in a ring of @n functions: what comes next may have gone, or what was before.
 */
static void walk(struct env *e, unsigned n, unsigned walks)
{
	uint64_t random = n;

	mode64(e, 0);
	make_ring(e, n);
	while (walks--) {
		unsigned i = (unsigned)(random_next(&random) % n), steps;
		uint64_t sum = 0;

		steps = 1 + (unsigned)(random_next(&random) % 60);
		enter_at(e, FUNCS + i * FUNC_LEN, STACK);
		e->v->gpr[KL_RCX] = steps;
		e->v->gpr[KL_RBP] = STACK;
		e->v->gpr[KL_RDI] = DATA;
		for (; steps; steps--) {
			sum += addend(i);
			i = (i + STRIDE) % n;
		}
		assert_run(e, KVM_EXIT_HLT);
		assert_int_equal(e->v->rip, HANDLER(0) + 1);
		assert_int_equal(e->v->gpr[KL_RAX], sum);
	}
}

/* Blocks go, and with them what leads to them. */
static void blocks_evicted(void **state)
{
	struct env *e = *state;

	walk(e, 400, 4000);
	assert_true(e->v->blocks->nr_evicted > 100);
	assert_true(xlate(e)->nr_translated > 4000); /* anew */
}

/* Translations go, their blocks stay. */
static void code_evicted(void **state)
{
	struct env *e = *state;

	walk(e, 6000, 4000);
	assert_int_equal(e->v->blocks->nr_evicted, 0);
	assert_true(xlate(e)->nr_evicted > 4);
}

/* The same blocks without translations. */
static void blocks_evicted_interp(void **state)
{
	struct env *e = *state;

	walk(e, 400, 4000);
	assert_true(e->v->blocks->nr_evicted > 100);
}

static int setup_few_interp(void **state)
{
	kl_config_init();
	kl_config.translate = kl_config.check = false;
	kl_config.block_part = 8 << 10;
	return env_setup(state);
}

#define T(name, setup) cmocka_unit_test_setup_teardown(name, setup, env_teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(flags_before_quotient, setup),
		T(jumps_anywhere, setup),
		T(own_fault, setup),
		T(no_code, setup),
		T(no_lists, setup),
		T(pass_wraps, setup),
		T(taken_off, setup),
		T(replaced, setup),
		T(compared_again, setup),
		T(compared_where_mapped, setup),
		T(compared_if_live, setup),
		T(compared_with_nothing, setup),
		T(blocks_evicted, setup_few_blocks),
		T(code_evicted, setup_little_code),
	};
	const struct CMUnitTest interpreted[] = {
		T(blocks_evicted_interp, setup_few_interp),
	};
	struct sigaction sa = {.sa_handler = own_handler, .sa_flags = SA_NODEFER};

	/* Before the engine's, which passes on what is none of its own. */
	sigaction(SIGSEGV, &sa, NULL);
	sigaction(SIGBUS, &sa, NULL);
	sigaction(SIGILL, &sa, NULL);
	/* There is no translator there. */
	return cmocka_run_group_tests(interpreted, NULL, NULL) ||
	       (!KL_TSAN && cmocka_run_group_tests(tests, NULL, NULL));
}
