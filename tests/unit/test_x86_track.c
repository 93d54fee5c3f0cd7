/* SPDX-License-Identifier: MIT */
/*
 * What a vCPU writes to a tracked page is reported, by whatever instruction, with the bytes that
 * are in memory then, before the next instruction (T1); and what it writes beside is not.
 */
#include "base/racepoint.h"
#include "host/cpu.h"
#include "mmu/track.h"
#include "x86/report.h"
#include "x86_env.h"

#define PAGE   0x30000ul /* tracked */
#define BESIDE 0x31000ul
#define PTE(l) (TABLES + 0x3000 + ((l) >> 9))

struct rec {
	uint64_t gpa;
	unsigned len;
};

static struct watcher {
	struct kl_tracker t;
	struct env *e;
	uint64_t first, last; /* gpas of interest */
	struct rec rec[64];
	unsigned n;
	uint64_t rip; /* at the last report */
	bool inside;  /* of guest mode: never */
} w;

static void wrote(void *opaque, unsigned as, kl_gpa_t gpa, const void *bytes, size_t len)
{
	assert_int_equal(as, 0);
	assert_memory_equal(w.e->mem + gpa, bytes, len);
	w.inside |= atomic_load(&w.e->v->core.mode) == KL_IN_GUEST;
	w.rip = w.e->v->rip;
	if (gpa >= w.first && gpa < w.last && w.n < KL_ARRAY_SIZE(w.rec))
		w.rec[w.n++] = (struct rec){gpa, (unsigned)len};
}

static void watch(struct env *e, uint64_t page)
{
	w = (struct watcher){
		.t = {.ops = {wrote, NULL}}, .e = e, .first = page, .last = page + 4096};
	kl_track_register(&e->vm->mem, &w.t);
	assert_int_equal(kl_track_add(&e->vm->mem, 0, page >> 12), 0);
}

static void unwatch(struct env *e)
{
	assert_false(w.inside);
	kl_track_unregister(&e->vm->mem, &w.t);
}

/* A snippet of 64-bit code; a HLT follows. */
#define SNIPPET(name, text)                                                       \
	extern const uint8_t name[], name##_end[];                                \
	__asm__(".pushsection .rodata\n" #name ":\n.intel_syntax noprefix\n" text \
		"\nhlt\n.att_syntax\n" #name "_end:\n.popsection")

SNIPPET(s_mov, "mov [rdi], al\nmov [rdi + 2], ax\nmov [rdi + 4], eax\nmov [rdi + 8], rax\n"
	       "mov dword ptr [rdi + 16], 7\nmov [rbx], rax");
SNIPPET(s_alu, "add [rdi], rax\ninc dword ptr [rdi + 8]\nneg word ptr [rdi + 12]\n"
	       "shl byte ptr [rdi + 14], 1\nsete [rdi + 15]\nadd [rbx], rax");
SNIPPET(s_lock,
	"lock add [rdi], rax\nxchg [rdi + 8], rax\nlock xadd [rdi + 16], eax\n"
	"lock cmpxchg [rdi + 20], ecx\nlock bts dword ptr [rdi + 24], 3\n"
	"lock cmpxchg16b [rdi + 32]\nlock inc byte ptr [rdi + 48]\nlock inc byte ptr [rbx]");
SNIPPET(s_string, "mov ecx, 5\nrep stosd\nmovsb\nmov ecx, 3\nrep movsq\nmov rdi, rbx\nstosq");
SNIPPET(s_vector, "movaps [rdi], xmm1\nmovups [rdi + 17], xmm1\nmovlps [rdi + 40], xmm1\n"
		  "movd [rdi + 48], xmm1\nmovnti [rdi + 56], rax\nmovaps [rbx], xmm1");
SNIPPET(s_stack,
	"mov rsp, rdi\npush rax\npush 5\npushf\ncall .Lnext\n.Lnext: enter 16, 0\nmov rsp, rdi\n"
	"lea rax, .Lthere[rip]\ncall rax\n.Lthere: mov rsp, rbx\npush rax");
SNIPPET(s_cross, "mov [rdi + 4090], rax\nmov [rdi - 3], rax\nadd [rdi + 4092], rax\n"
		 "lock add [rdi + 4092], rax\nmovups [rdi + 4088], xmm1");
SNIPPET(s_x87, "fninit\nfld1\nfstp tbyte ptr [rdi]\nfnstcw [rdi + 16]\nfxsave [rdi + 512]");
SNIPPET(s_system, "sgdt [rdi]\nstr [rdi + 16]\nsmsw [rdi + 18]\nstmxcsr [rdi + 20]");

static void run_snippet(struct env *e, const uint8_t *s, const uint8_t *end)
{
	mode64(e, 0);
	memcpy(e->mem + CODE, s, (size_t)(end - s));
	for (int pass = 0; pass < 2; pass++) {
		/* The second time everything is in the TLB that may be, and in blocks. */
		w.n = 0;
		enter_at(e, CODE, STACK);
		e->v->gpr[KL_RDI] = PAGE;
		e->v->gpr[KL_RSI] = BESIDE + 0x800;
		e->v->gpr[KL_RBX] = BESIDE + 0x400;
		e->v->gpr[KL_RAX] = 0x1122334455667788;
		assert_run(e, KVM_EXIT_HLT);
		assert_int_equal(e->v->rip, CODE + (uint64_t)(end - s));
	}
}

#define RUN(e, name) run_snippet(e, name, name##_end)

#define EXPECT(...)                                                         \
	do {                                                                \
		static const struct rec expected[] = {__VA_ARGS__};         \
		assert_int_equal(w.n, KL_ARRAY_SIZE(expected));             \
		for (unsigned i_ = 0; i_ < KL_ARRAY_SIZE(expected); i_++) { \
			assert_int_equal(w.rec[i_].gpa, expected[i_].gpa);  \
			assert_int_equal(w.rec[i_].len, expected[i_].len);  \
		}                                                           \
	} while (0)

/* T1 */
static void stores(void **state)
{
	struct env *e = *state;

	watch(e, PAGE);
	RUN(e, s_mov);
	EXPECT({PAGE, 1}, {PAGE + 2, 2}, {PAGE + 4, 4}, {PAGE + 8, 8}, {PAGE + 16, 4});
	RUN(e, s_alu);
	EXPECT({PAGE, 8}, {PAGE + 8, 4}, {PAGE + 12, 2}, {PAGE + 14, 1}, {PAGE + 15, 1});
	RUN(e, s_stack);
	assert_int_equal(w.n, 0); /* all below */
	unwatch(e);
}

/* T1: host atomics on a page that is tracked: what is there afterwards. */
static void locked(void **state)
{
	struct env *e = *state;

	watch(e, PAGE);
	RUN(e, s_lock);
	EXPECT({PAGE, 8}, {PAGE + 8, 8}, {PAGE + 16, 4}, {PAGE + 20, 4}, {PAGE + 24, 4},
	       {PAGE + 32, 16}, {PAGE + 48, 1});
	unwatch(e);
}

/* T1: every element. */
static void strings(void **state)
{
	struct env *e = *state;

	watch(e, PAGE);
	RUN(e, s_string);
	EXPECT({PAGE, 4}, {PAGE + 4, 4}, {PAGE + 8, 4}, {PAGE + 12, 4}, {PAGE + 16, 4},
	       {PAGE + 20, 1}, {PAGE + 21, 8}, {PAGE + 29, 8}, {PAGE + 37, 8});
	unwatch(e);
}

/* T1 */
static void vectors(void **state)
{
	struct env *e = *state;

	watch(e, PAGE);
	RUN(e, s_vector);
	EXPECT({PAGE, 16}, {PAGE + 17, 16}, {PAGE + 40, 8}, {PAGE + 48, 4}, {PAGE + 56, 8});
	RUN(e, s_x87);
	if (kl_host_is_intel()) /* ten bytes are two stores */
		EXPECT({PAGE, 8}, {PAGE + 8, 2}, {PAGE + 16, 2}, {PAGE + 512, 416});
	else
		EXPECT({PAGE, 10}, {PAGE + 16, 2}, {PAGE + 512, 416});
	RUN(e, s_system);
	EXPECT({PAGE, 10}, {PAGE + 16, 2}, {PAGE + 18, 2}, {PAGE + 20, 4});
	unwatch(e);
}

/* T1: of an operand in two pages, the part in the tracked one. */
static void crossing(void **state)
{
	struct env *e = *state;

	watch(e, PAGE);
	RUN(e, s_cross);
	EXPECT({PAGE + 4090, 6}, {PAGE, 5}, {PAGE + 4092, 4}, {PAGE + 4092, 4}, {PAGE + 4088, 8});
	/* Both are. */
	assert_int_equal(kl_track_add(&e->vm->mem, 0, BESIDE >> 12), 0);
	w.last = BESIDE + 0x100;
	RUN(e, s_cross);
	EXPECT({PAGE + 4090, 6}, {BESIDE, 2}, {PAGE, 5}, {PAGE + 4092, 4}, {BESIDE, 4},
	       {PAGE + 4092, 4}, {BESIDE, 4}, {PAGE + 4088, 8}, {BESIDE, 8});
	unwatch(e);
}

/* T1: frames of calls, pushes, and events. */
static void stack(void **state)
{
	struct env *e = *state;

	watch(e, PAGE - 4096);
	RUN(e, s_stack);
	EXPECT({PAGE - 8, 8}, {PAGE - 16, 8}, {PAGE - 24, 8}, {PAGE - 32, 8}, {PAGE - 40, 8},
	       {PAGE - 8, 8});
	/* ud2 */
	mode64(e, 0);
	env_code(e, 0x0f, 0x0b);
	w.n = 0;
	enter_at(e, CODE, PAGE);
	assert_vector(e, KL_EXC_UD);
	EXPECT({PAGE - 40, 40});
	unwatch(e);
}

/* T1, M9: the A and D bits that a walk sets. */
static void accessed_dirty(void **state)
{
	struct env *e = *state;

	mode64(e, 0);
	/* mov al, [rdi]; mov [rdi], al; mov [rbx], al; hlt */
	env_code(e, 0x8a, 0x07, 0x88, 0x07, 0x88, 0x03, 0xf4);
	watch(e, TABLES + 0x3000);
	e->v->gpr[KL_RDI] = PAGE;
	e->v->gpr[KL_RBX] = BESIDE;
	assert_run(e, KVM_EXIT_HLT);
	EXPECT({PTE(CODE), 8}, {PTE(PAGE), 8}, {PTE(PAGE), 8}, {PTE(BESIDE), 8});
	assert_int_equal(get64(e, PTE(PAGE)), PAGE | 0x67);
	assert_int_equal(get64(e, PTE(BESIDE)), BESIDE | 0x67);
	/* Nothing is set twice. */
	w.n = 0;
	kl_tlb_flush(e->v);
	enter_at(e, CODE, STACK);
	e->v->gpr[KL_RDI] = PAGE;
	e->v->gpr[KL_RBX] = BESIDE;
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(w.n, 0);
	unwatch(e);
}

/* T1: of an ioctl's walk, too. */
static void translate(void **state)
{
	struct env *e = *state;
	bool writable, user;
	uint64_t gpa;

	mode64(e, 0);
	watch(e, TABLES + 0x3000);
	kl_engine_enter();
	assert_int_equal(kl_x86_translate(e->v, PAGE + 5, &gpa, &writable, &user), 0);
	kl_engine_leave();
	assert_int_equal(gpa, PAGE + 5);
	EXPECT({PTE(PAGE), 8});
	unwatch(e);
}

/* T1: a guest that writes its own page table through a tracked page, and uses it. */
static void page_table(void **state)
{
	struct env *e = *state;

	mode64(e, 0);
	/* mov al, [rdi]; mov [rdx], rsi; invlpg [rdi]; mov bl, [rdi]; hlt */
	env_code(e, 0x8a, 0x07, 0x48, 0x89, 0x32, 0x0f, 0x01, 0x3f, 0x8a, 0x1f, 0xf4);
	watch(e, TABLES + 0x3000);
	e->mem[PAGE] = 0xaa;
	e->mem[BESIDE] = 0xbb;
	e->v->gpr[KL_RSI] = BESIDE | 0x27;
	e->v->gpr[KL_RDI] = PAGE;
	e->v->gpr[KL_RDX] = PTE(PAGE);
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->gpr[KL_RAX] & 0xff, 0xaa);
	assert_int_equal(e->v->gpr[KL_RBX] & 0xff, 0xbb);
	/* Code, the table's own page, the store (dirty), the entry, its A bit is there. */
	assert_true(w.n >= 2);
	assert_int_equal(w.rec[w.n - 1].gpa, PTE(PAGE));
	unwatch(e);
}

/* T1: between one instruction and the next. */
static void in_order(void **state)
{
	struct env *e = *state;

	mode64(e, 0);
	/* lock inc qword [rdi]; hlt */
	env_code(e, 0xf0, 0x48, 0xff, 0x07, 0xf4);
	watch(e, PAGE);
	e->v->gpr[KL_RDI] = PAGE;
	assert_run(e, KVM_EXIT_HLT);
	EXPECT({PAGE, 8});
	assert_int_equal(w.rip, CODE + 4);
	unwatch(e);
}

#define T(name) cmocka_unit_test_setup_teardown(name, env_setup, env_teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(stores), T(locked),         T(strings),   T(vectors),    T(crossing),
		T(stack),  T(accessed_dirty), T(translate), T(page_table), T(in_order),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
