/* SPDX-License-Identifier: MIT */
/*
 * What of the vCPU's TLB comes back with an address space (x86/tlb.h), and what must not: entries
 * of page tables are changed while CR3 points elsewhere and while it does not, at every level, by
 * the guest and by the program through its own mapping, which tells the guest by an interrupt or
 * lets it poll (T8).
 */
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include "base/racepoint.h"
#include "host/sys.h"
#include "x86_env.h"

#define P ((uint64_t)1)
#define W ((uint64_t)2)
#define U ((uint64_t)4)
#define A ((uint64_t)0x20)
#define D ((uint64_t)0x40)
#define G ((uint64_t)0x100)

#define LIN    0x20a000ul /* the page that is looked at; it is supervisor's data */
#define BESIDE 0x20b000ul /* and one in the same table */
#define OLD    0x210000ul
#define NEW    0x212000ul
#define OTHER  0x20000ul /* tables like those at TABLES, with the other data at LIN */
#define SPARE  0x30000ul /* room for a table */
#define WORDS  0x50000ul
#define FLAG   (WORDS + 0x00) /* the round that is to be done */
#define ACK    (WORDS + 0x40) /* the last that was */
#define RESULT (WORDS + 0x48)
#define STOP   (WORDS + 0x80)

/* The entry of LIN at @level (1 is the last), below @root. */
static uint64_t entry_at(uint64_t root, unsigned level)
{
	return level == 4   ? root
	       : level == 3 ? root + 0x1000
	       : level == 2 ? root + 0x2008
			    : root + 0x4000 + (LIN >> 9 & 0xff8);
}

/* TABLES: LIN -> OLD, which is full of 0x11. OTHER: NEW, 0x22. */
static void two_spaces(struct env *e, uint64_t bits)
{
	mode64(e, 0);
	memset(e->mem + OLD, 0x11, 0x1000);
	memset(e->mem + NEW, 0x22, 0x1000);
	put64(e, entry_at(TABLES, 2), (TABLES + 0x4000) | P | W | U);
	put64(e, entry_at(TABLES, 1), OLD | P | W | U | bits);
	put64(e, entry_at(TABLES, 1) + 8, OLD | P | W | U | bits);
	memcpy(e->mem + OTHER, e->mem + TABLES, 0x5000);
	put64(e, OTHER, (OTHER + 0x1000) | P | W | U);
	put64(e, OTHER + 0x1000, (OTHER + 0x2000) | P | W | U);
	put64(e, entry_at(OTHER, 2), (OTHER + 0x4000) | P | W | U);
	put64(e, entry_at(OTHER, 1), NEW | P | W | U | bits);
	e->v->cr4 |= KL_CR4_PGE;
	kl_tlb_flush(e->v);
}

/* mov cr3, rcx; mov al, [rbx]; hlt */
static const uint8_t load_and_look[] = {0x0f, 0x22, 0xd9, 0x8a, 0x03, 0xf4};

static void run(struct env *e, const void *code, size_t len, uint64_t rbx, uint64_t rcx)
{
	struct kvm_regs r = {
		.rip = CODE, .rsp = STACK, .rflags = 2, .rbx = rbx, .rcx = rcx, .rdi = WORDS};

	memcpy(e->mem + CODE, code, len);
	kl_x86_set_regs(e->v, &r);
	assert_run(e, KVM_EXIT_HLT);
}

static unsigned look(struct env *e, uint64_t root)
{
	run(e, load_and_look, sizeof(load_and_look), LIN, root);
	return (uint8_t)e->v->gpr[KL_RAX];
}

/* mov cr3, rcx; hlt: what is in the TLB then? */
static bool kept(struct env *e, uint64_t root)
{
	static const uint8_t code[] = {0x0f, 0x22, 0xd9, 0xf4};

	run(e, code, sizeof(code), LIN, root);
	return kl_tlb_entry(e->v, e->v->tlb_mode, LIN)->rtag == LIN;
}

/* M9: an address space that comes back has its translations, unless their entries have changed. */
static void come_back(void **state)
{
	struct env *e = *state;
	uint64_t gen;

	two_spaces(e, 0);
	look(e, TABLES); /* from here on they are kept */
	assert_int_equal(look(e, TABLES), 0x11);
	assert_true(kept(e, TABLES));
	gen = e->v->code_gen;
	assert_false(kept(e, OTHER));
	assert_int_not_equal(e->v->code_gen, gen);
	assert_int_equal(look(e, OTHER), 0x22);
	assert_true(kept(e, TABLES));
	assert_int_equal(e->v->code_gen, gen);
	assert_int_equal(look(e, TABLES), 0x11);
	assert_true(kept(e, OTHER));
	assert_int_equal(look(e, OTHER), 0x22);
	/* More of them than are kept. */
	for (unsigned i = 0; i < 2 * KL_SPACES; i++) {
		uint64_t root = 0x60000 + i * 0x1000ul;

		memcpy(e->mem + root, e->mem + (i & 1 ? OTHER : TABLES), 0x1000);
		assert_int_equal(look(e, root), i & 1 ? 0x22 : 0x11);
	}
	assert_false(kept(e, TABLES));
	assert_int_equal(look(e, TABLES), 0x11);
}

/* Where an entry of @level leads, from the root. */
static const uint64_t table[] = {0, 0, 0x4000, 0x2000, 0x1000};

/* LIN's entry at @level below TABLES is to lead to NEW. */
static void change(struct env *e, unsigned level)
{
	if (level == 1) {
		put64(e, entry_at(TABLES, 1), NEW | P | W | U);
		return;
	}
	put64(e, entry_at(TABLES, level), (OTHER + table[level]) | P | W | U);
}

/* T8: an entry at any level has changed while the address space was away, and while it was not. */
static void changed(void **state)
{
	struct env *e = *state;

	for (unsigned level = 1; level <= 4; level++) {
		for (unsigned away = 0; away < 2; away++) {
			two_spaces(e, 0);
			look(e, TABLES);
			assert_int_equal(look(e, TABLES), 0x11);
			if (away)
				look(e, OTHER);
			change(e, level);
			assert_int_equal(look(e, TABLES), 0x22);
		}
	}
}

/* T8: A and D of an entry were cleared: the next access sets them. */
static void cleared(void **state)
{
	/* mov cr3, rcx; mov [rbx], al; hlt */
	static const uint8_t store[] = {0x0f, 0x22, 0xd9, 0x88, 0x03, 0xf4};
	struct env *e = *state;
	uint64_t pte = entry_at(TABLES, 1);

	for (unsigned away = 0; away < 2; away++) {
		two_spaces(e, 0);
		look(e, TABLES);
		run(e, store, sizeof(store), LIN, TABLES);
		assert_int_equal(get64(e, pte) & (A | D), A | D);
		if (away)
			look(e, OTHER);
		put64(e, pte, get64(e, pte) & ~D);
		run(e, store, sizeof(store), LIN, TABLES);
		assert_int_equal(get64(e, pte) & (A | D), A | D);
		if (away)
			look(e, OTHER);
		put64(e, pte, get64(e, pte) & ~(A | D));
		look(e, TABLES);
		assert_int_equal(get64(e, pte) & (A | D), A);
	}
}

/*
 * T8: a level above has changed, another page was translated by it, and it is as it was again: what
 * is in memory is what the first walk has read, but not what the second came from.
 */
static void torn(void **state)
{
	/* mov cr3, rcx; mov al, [rbx]; mov rdx, [rdi]; mov r9, [r8]; mov [r8], rdx; invlpg [rbx +
	 * 4096]; mov al, [rbx + 4096]; mov [r8], r9; mov ah, al; mov cr3, rcx; mov al, [rbx +
	 * 4096]; hlt */
	static const uint8_t code[] = {
		0x0f, 0x22, 0xd9, 0x8a, 0x03, 0x48, 0x8b, 0x17, 0x4d, 0x8b, 0x08, 0x49, 0x89, 0x10,
		0x0f, 0x01, 0xbb, 0,    0x10, 0,    0,    0x8a, 0x83, 0,    0x10, 0,    0,    0x4d,
		0x89, 0x08, 0x88, 0xc4, 0x0f, 0x22, 0xd9, 0x8a, 0x83, 0,    0x10, 0,    0,    0xf4};
	struct env *e = *state;
	struct kvm_regs r = {
		.rip = CODE, .rsp = STACK, .rflags = 2, .rbx = LIN, .rcx = TABLES, .rdi = WORDS};

	for (unsigned level = 2; level <= 4; level++) {
		two_spaces(e, 0);
		put64(e, entry_at(OTHER, 1) + 8, NEW | P | W | U);
		look(e, TABLES);
		memcpy(e->mem + CODE, code, sizeof(code));
		r.r8 = entry_at(TABLES, level);
		put64(e, WORDS, (OTHER + table[level]) | P | W | U | A);
		kl_x86_set_regs(e->v, &r);
		assert_run(e, KVM_EXIT_HLT);
		assert_int_equal((uint16_t)e->v->gpr[KL_RAX], 0x2211);
	}
}

/* M9: an entry above that was relaxed need not be invalidated: the fault that is met looks anew. */
static void relaxed_without_invalidation(void **state)
{
	/* mov cr3, rcx; mov al, [rbx]; mov rdx, [rdi]; mov [r8], rdx; mov [rbx + 4096], al; hlt */
	static const uint8_t code[] = {0x0f, 0x22, 0xd9, 0x8a, 0x03, 0x48, 0x8b, 0x17, 0x49,
				       0x89, 0x10, 0x88, 0x83, 0,    0x10, 0,    0,    0xf4};
	struct env *e = *state;
	struct kvm_regs r = {
		.rip = CODE, .rsp = STACK, .rflags = 2, .rbx = LIN, .rcx = TABLES, .rdi = WORDS};

	two_spaces(e, 0);
	e->v->cr0 |= KL_CR0_WP;
	look(e, TABLES);
	memcpy(e->mem + CODE, code, sizeof(code));
	r.r8 = entry_at(TABLES, 2);
	put64(e, WORDS, get64(e, r.r8));
	put64(e, r.r8, get64(e, r.r8) & ~W); /* read-only, until the guest says otherwise */
	kl_x86_set_regs(e->v, &r);
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->rip, CODE + sizeof(code)); /* not in a handler */
}

/* M9: INVLPG forgets how a walk came to the table, too. */
static void dropped_by_address(void **state)
{
	/* invlpg [rbx]; mov al, [rbx]; hlt */
	static const uint8_t drop[] = {0x0f, 0x01, 0x3b, 0x8a, 0x03, 0xf4};
	struct env *e = *state;

	for (unsigned level = 1; level <= 4; level++) {
		two_spaces(e, 0);
		assert_int_equal(look(e, TABLES), 0x11);
		change(e, level);
		run(e, drop, sizeof(drop), LIN, 0);
		assert_int_equal((uint8_t)e->v->gpr[KL_RAX], 0x22);
	}
}

/* M9: a global page stays where it is over CR3 writes, until it is dropped by its address. */
static void global(void **state)
{
	/* invlpg [rbx]; mov al, [rbx]; hlt */
	static const uint8_t drop[] = {0x0f, 0x01, 0x3b, 0x8a, 0x03, 0xf4};
	static const uint8_t drop_only[] = {0x0f, 0x01, 0x3b, 0xf4};
	struct env *e = *state;

	two_spaces(e, G);
	look(e, TABLES);
	assert_int_equal(look(e, TABLES), 0x11);
	assert_true(kept(e, OTHER));
	assert_int_equal(look(e, OTHER), 0x11);
	run(e, drop, sizeof(drop), LIN, 0);
	assert_int_equal((uint8_t)e->v->gpr[KL_RAX], 0x22);
	/* The other space had it, too, before G was set. */
	two_spaces(e, 0);
	look(e, OTHER);
	assert_int_equal(look(e, OTHER), 0x22);
	put64(e, entry_at(TABLES, 1), OLD | P | W | U | G);
	assert_int_equal(look(e, TABLES), 0x11);
	run(e, drop_only, sizeof(drop_only), LIN, 0);
	assert_int_equal(look(e, OTHER), 0x22);
}

/* mov cr3, rcx; call rbx; hlt */
static const uint8_t load_and_call[] = {0x0f, 0x22, 0xd9, 0xff, 0xd3, 0xf4};

static uint32_t call(struct env *e, uint64_t root)
{
	run(e, load_and_call, sizeof(load_and_call), LIN, root);
	return (uint32_t)e->v->gpr[KL_RAX];
}

/* mov eax, imm32; ret */
static const uint8_t one[] = {0xb8, 1, 0, 0, 0, 0xc3}, two[] = {0xb8, 2, 0, 0, 0, 0xc3};

/* M9, T8: code at the same address in two address spaces, hot enough to be trusted; one moves. */
static void code(void **state)
{
	/* mov cr3, rcx; mov edx, 1000; 1: call rbx; dec edx; jnz 1b; hlt */
	static const uint8_t loop[] = {0x0f, 0x22, 0xd9, 0xba, 0xe8, 3,    0,   0,
				       0xff, 0xd3, 0xff, 0xca, 0x75, 0xfa, 0xf4};
	struct env *e = *state;

	for (unsigned away = 0; away < 2; away++) {
		for (unsigned level = 1; level <= 4; level++) {
			two_spaces(e, 0);
			memcpy(e->mem + OLD, one, sizeof(one));
			memcpy(e->mem + NEW, two, sizeof(two));
			for (unsigned n = 0; n < 3; n++) {
				run(e, loop, sizeof(loop), LIN, OTHER);
				assert_int_equal((uint32_t)e->v->gpr[KL_RAX], 2);
				run(e, loop, sizeof(loop), LIN, TABLES);
				assert_int_equal((uint32_t)e->v->gpr[KL_RAX], 1);
			}
			assert_int_equal(call(e, TABLES), 1);
			if (away)
				assert_int_equal(call(e, OTHER), 2);
			change(e, level);
			assert_int_equal(call(e, TABLES), 2);
		}
	}
}

static void two_global_functions(struct env *e)
{
	two_spaces(e, G);
	memcpy(e->mem + OLD, one, sizeof(one));
	memcpy(e->mem + NEW, two, sizeof(two));
	put64(e, entry_at(OTHER, 1), OLD | P | W | U | G);
}

/*
 * M9: code of a global page is dropped by its address while another address space is in use. Its
 * blocks must not hold again when the first one's generation comes back.
 */
static void global_code(void **state)
{
	/* mov cr3, rcx; invlpg [rbx]; hlt */
	static const uint8_t drop[] = {0x0f, 0x22, 0xd9, 0x0f, 0x01, 0x3b, 0xf4};
	struct env *e = *state;

	two_global_functions(e);
	assert_int_equal(call(e, TABLES), 1);
	assert_int_equal(call(e, OTHER), 1);
	assert_int_equal(call(e, TABLES), 1);
	put64(e, entry_at(TABLES, 1), NEW | P | W | U | G);
	run(e, drop, sizeof(drop), LIN, OTHER);
	assert_int_equal(call(e, TABLES), 2);
}

/* M9: the same in one address space, where nothing but its address says that it is dropped. */
static void global_code_here(void **state)
{
	/* call rbx; mov [rdi], rcx; invlpg [rbx]; call rbx; hlt */
	static const uint8_t code[] = {0xff, 0xd3, 0x48, 0x89, 0x0f, 0x0f,
				       0x01, 0x3b, 0xff, 0xd3, 0xf4};
	struct kvm_regs r = {.rip = CODE, .rsp = STACK, .rflags = 2, .rbx = LIN};
	struct env *e = *state;

	two_global_functions(e);
	assert_int_equal(call(e, TABLES), 1);
	memcpy(e->mem + CODE, code, sizeof(code));
	r.rdi = entry_at(TABLES, 1);
	/* First, so that all of it is decoded, with the page that it is. */
	for (unsigned i = 0; i < 2; i++) {
		r.rcx = (i ? NEW : OLD) | P | W | U | G;
		kl_x86_set_regs(e->v, &r);
		assert_run(e, KVM_EXIT_HLT);
	}
	assert_int_equal((uint32_t)e->v->gpr[KL_RAX], 2);
}

/* ---- page tables that go ---- */

/* N7: the tables of an address space that is away vanish without an event. */
static void tables_vanish(void **state)
{
	struct env *e = *state;
	uint8_t *other =
		mmap(NULL, 0x5000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	const uint64_t root = 0x800000;
	uint64_t link[] = {(root + 0x1000) | P | W | U, (root + 0x2000) | P | W | U,
			   (root + 0x4000) | P | W | U};

	two_spaces(e, 0);
	memcpy(other, e->mem + OTHER, 0x5000);
	memcpy(other, &link[0], 8);
	memcpy(other + 0x1000, &link[1], 8);
	memcpy(other + 0x2008, &link[2], 8);
	assert_int_equal(env_slot(e, 3, 0, root, 0x5000, other), 0);
	look(e, TABLES);
	assert_int_equal(look(e, root), 0x22);
	assert_true(kept(e, root));
	assert_int_equal(look(e, TABLES), 0x11);
	munmap(other, 0x5000);
	memcpy(e->mem + CODE, load_and_look, sizeof(load_and_look));
	enter_at(e, CODE, STACK);
	e->v->gpr[KL_RBX] = LIN;
	e->v->gpr[KL_RCX] = root;
	assert_int_equal(env_run(e), -EFAULT);
	assert_int_equal(e->v->cr3, root); /* the load is complete */
}

/* T8, M6: the slot of the tables is replaced: pointers into it are void. */
static void tables_replaced(void **state)
{
	struct env *e = *state;
	const uint64_t root = 0x800000;

	two_spaces(e, 0);
	for (unsigned i = 0; i < 3; i++) {
		uint8_t *mem = mmap(NULL, 0x1000, PROT_READ | PROT_WRITE,
				    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		memcpy(mem, e->mem + (i & 1 ? OTHER : TABLES), 0x1000);
		assert_int_equal(env_slot(e, 3, 0, root, 0x1000, mem), 0);
		for (unsigned n = 0; n < 3; n++) {
			assert_int_equal(look(e, root), i & 1 ? 0x22 : 0x11);
			look(e, TABLES);
		}
		assert_int_equal(env_slot(e, 3, 0, 0, 0, NULL), 0);
		munmap(mem, 0x1000);
	}
}

/* ---- two threads ---- */

/* T8: the entry is written after CR3 is, and before what was put away is read. */
static void changed_during_load(void **state)
{
	struct env *e = *state;
	pthread_t t;

	if (!kl_racepoints_enabled())
		skip();
	two_spaces(e, 0);
	look(e, TABLES);
	assert_int_equal(look(e, TABLES), 0x11);
	assert_int_equal(look(e, OTHER), 0x22);
	memcpy(e->mem + CODE, load_and_look, sizeof(load_and_look));
	enter_at(e, CODE, STACK);
	e->v->gpr[KL_RBX] = LIN;
	e->v->gpr[KL_RCX] = TABLES;
	kl_racepoint_arm("tlb-takes-back", 1);
	pthread_create(&t, NULL, env_thread, e);
	assert_true(kl_racepoint_wait("tlb-takes-back", 10000));
	__atomic_store_n((uint64_t *)(void *)(e->mem + entry_at(TABLES, 1)), NEW | P | W | U,
			 __ATOMIC_RELAXED);
	kl_racepoint_release("tlb-takes-back");
	assert_int_equal(env_join(t), 0);
	assert_int_equal((uint8_t)e->v->gpr[KL_RAX], 0x22);
}

static uint32_t word(struct env *e, uint64_t gpa)
{
	return __atomic_load_n((uint32_t *)(void *)(e->mem + gpa), __ATOMIC_ACQUIRE);
}

static void set_word(struct env *e, uint64_t gpa, uint32_t x)
{
	__atomic_store_n((uint32_t *)(void *)(e->mem + gpa), x, __ATOMIC_RELEASE);
}

/* The guest and the program race, as they do; ThreadSanitizer knows of nothing that orders them. */
#define NEED_RACES              \
	do {                    \
		if (KL_TSAN)    \
			skip(); \
	} while (0)

#define ROUNDS 1000u

/*
 * The program reads an entry from a file into the table, as a disk would; the guest is told, drops
 * the translation and looks.
 */
static void load_entry(struct env *e, int fd, uint32_t round)
{
	uint64_t pte = (round % 3 ? OLD : NEW) | P | W | U | A;

	assert_int_equal(pwrite(fd, &pte, 8, 0), 8);
	assert_int_equal(pread(fd, e->mem + entry_at(TABLES, 1), 8, 0), 8);
}

static void rounds(struct env *e, bool interrupt)
{
	int fd = kl_sys_memfd("entry", 4096, 0);
	unsigned wrong = 0;
	pthread_t t;

	/* What the last guest was told is not for this one. */
	set_word(e, FLAG, 0);
	set_word(e, ACK, 0);
	set_word(e, STOP, 0);
	pthread_create(&t, NULL, env_thread, e);
	for (uint32_t i = 1; i <= ROUNDS; i++) {
		load_entry(e, fd, i);
		set_word(e, FLAG, i);
		if (interrupt)
			kl_x86_nmi(e->v);
		while (word(e, ACK) != i)
			sched_yield();
		wrong += (uint8_t)word(e, RESULT) != (i % 3 ? 0x11 : 0x22);
	}
	set_word(e, interrupt ? STOP : FLAG, (uint32_t)-1);
	assert_int_equal(env_join(t), 0);
	assert_int_equal(wrong, 0);
	kl_sys_close(fd);
}

#define SNIPPET(name, text)                                                       \
	extern const uint8_t name[], name##_end[];                                \
	__asm__(".pushsection .rodata\n" #name ":\n.intel_syntax noprefix\n" text \
		"\n.att_syntax\n" #name "_end:\n.popsection")

/* Waits for a round, drops, looks, says so. rcx: the address space, r8: the other one. */
#define POLLER(name, drop)                                                                        \
	SNIPPET(name, "xor r9d, r9d\n.Lw" #name ": mov eax, [rdi]\ncmp eax, r9d\nje .Lw" #name    \
		      "\nmov r9d, eax\ntest eax, eax\njs .Le" #name "\n" drop                     \
		      "\nmovzx eax, byte ptr [rbx]\nmov [rdi + 0x48], eax\nmov [rdi + 0x40], r9d" \
		      "\njmp .Lw" #name "\n.Le" #name ": hlt")
POLLER(s_load, "mov cr3, rcx");
POLLER(s_switch, "mov cr3, r8\nmovzx eax, byte ptr [rbx]\nmov cr3, rcx");
POLLER(s_invlpg, "invlpg [rbx]");

static void start_at(struct env *e, const uint8_t *s, const uint8_t *end)
{
	two_spaces(e, 0);
	look(e, TABLES);
	memcpy(e->mem + CODE, s, (size_t)(end - s));
	enter_at(e, CODE, STACK);
	e->v->gpr[KL_RBX] = LIN;
	e->v->gpr[KL_RCX] = TABLES;
	e->v->gpr[KL_R8] = OTHER;
	e->v->gpr[KL_RDI] = WORDS;
}
#define START(e, name) start_at(e, name, name##_end)

/* T8: the guest polls, and drops the translation in each of three ways. */
static void program_polled(void **state)
{
	struct env *e = *state;

	NEED_RACES;
	START(e, s_load);
	rounds(e, false);
	START(e, s_switch);
	rounds(e, false);
	START(e, s_invlpg);
	rounds(e, false);
}

/* The main program goes to and fro, until STOP; the handler of the NMI drops and looks. */
SNIPPET(s_main, ".Lmain: mov cr3, r8\nmovzx eax, byte ptr [rbx]\nmov cr3, rcx\nmovzx eax, byte ptr "
		"[rbx]\ncmp dword ptr [rdi + 0x80], 0\nje .Lmain\nhlt");
SNIPPET(s_nmi, "push rax\npush rdx\nmov r9d, [rdi]\nmov rdx, cr3\nmov cr3, rcx\n"
	       "movzx eax, byte ptr [rbx]\nmov cr3, rdx\n"
	       "mov [rdi + 0x48], eax\nmov [rdi + 0x40], r9d\npop rdx\npop rax\niretq");

/* T8: the program interrupts the guest, which drops the translation. */
static void program_interrupts(void **state)
{
	struct env *e = *state;

	NEED_RACES;
	START(e, s_main);
	memcpy(e->mem + HANDLER(2), s_nmi, (size_t)(s_nmi_end - s_nmi));
	rounds(e, true);
}

/* T8: between two KVM_RUNs. */
static void program_between_runs(void **state)
{
	struct env *e = *state;
	int fd = kl_sys_memfd("entry", 4096, 0);

	two_spaces(e, 0);
	for (uint32_t i = 1; i <= ROUNDS; i++) {
		load_entry(e, fd, i);
		assert_int_equal(look(e, TABLES), i % 3 ? 0x11 : 0x22);
		if (i % 4 == 0)
			assert_int_equal(look(e, OTHER), 0x22);
	}
	kl_sys_close(fd);
}

#define T(name) cmocka_unit_test_setup_teardown(name, env_setup, env_teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(come_back),
		T(changed),
		T(cleared),
		T(torn),
		T(relaxed_without_invalidation),
		T(dropped_by_address),
		T(global),
		T(code),
		T(global_code),
		T(global_code_here),
		T(tables_vanish),
		T(tables_replaced),
		T(changed_during_load),
		T(program_polled),
		T(program_interrupts),
		T(program_between_runs),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
