/* SPDX-License-Identifier: MIT */
/*
 * KVMLET_VCPU=check: the interpreter's run before each translation's is seen by nobody, what others
 * write in between is not taken for a difference, and what is one is found.
 */
#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/config.h"
#include "x86/block.h"
#include "x86/vector.h"
#include "x86/xlate/emit.h"
#include "x86/xlate/xlate.h"
#include "x86_env.h"

#define WORD 0x200000ul - 0x1000

/* Blocks are translated at their first use, and compared. */
static int setup(void **state)
{
	kl_config_init();
	kl_config.translate = kl_config.check = true;
	kl_config.translate_after = 0;
	return env_setup(state);
}

struct other {
	_Atomic uint32_t *word;
	_Atomic bool stop;
	uint32_t count;
	bool wrong;
};

static void run_beside(struct env *e, const uint8_t *code, size_t len, uint32_t times,
		       struct other *o, void *(*fn)(void *arg))
{
	pthread_t thread;

	mode64(e, 0);
	memcpy(e->mem + CODE, code, len);
	o->word = (_Atomic uint32_t *)(e->mem + WORD);
	pthread_create(&thread, NULL, fn, o);
	e->v->gpr[KL_RBX] = WORD;
	e->v->gpr[KL_RCX] = times;
	assert_run(e, KVM_EXIT_HLT);
	atomic_store(&o->stop, true);
	pthread_join(thread, NULL);
	assert_int_not_equal(e->v->blocks->xlate->nr_translated, 0);
	assert_non_null(e->v->blocks->xlate->check);
}

static void *count(void *arg)
{
	struct other *o = arg;

	while (!atomic_load(&o->stop)) {
		atomic_fetch_add(o->word, 1);
		o->count++;
	}
	return NULL;
}

/* A thread of the program counts in the same word, by locked instructions as the guest does. */
static void counted_once(void **state)
{
	/* 1: lock inc dword [rbx]; dec ecx; jnz 1b; hlt */
	static const uint8_t code[] = {0xf0, 0xff, 0x03, 0xff, 0xc9, 0x75, 0xf9, 0xf4};
	struct env *e = *state;
	struct other o = {0};

	run_beside(e, code, sizeof(code), 200000, &o, count);
	assert_int_equal(atomic_load(o.word), 200000 + o.count);
}

static void *watch(void *arg)
{
	struct other *o = arg;
	uint32_t last_first = 0, last_second = 0;

	while (!atomic_load(&o->stop)) {
		uint32_t second = atomic_load(o->word + 16), first = atomic_load(o->word);

		o->wrong |= first < second || first < last_first || second < last_second;
		last_first = first;
		last_second = second;
	}
	return NULL;
}

/* It sees what the guest stores in its order, and nothing that was taken back. */
static void seen_once(void **state)
{
	/* 1: inc eax; mov [rbx], eax; mov [rbx + 64], eax; dec ecx; jnz 1b; hlt */
	static const uint8_t code[] = {0xff, 0xc0, 0x89, 0x03, 0x89, 0x43,
				       0x40, 0xff, 0xc9, 0x75, 0xf5, 0xf4};
	struct other o = {0};

	run_beside(*state, code, sizeof(code), 200000, &o, watch);
	assert_int_equal(atomic_load(o.word), 200000);
	assert_false(o.wrong);
}

static void *scribble(void *arg)
{
	struct other *o = arg;

	while (!atomic_load(&o->stop))
		atomic_store(o->word, o->count++);
	return NULL;
}

/* It writes what the guest reads, and what the guest writes, too. */
static void not_taken_for_wrong(void **state)
{
	/* 1: mov eax, [rbx]; add edx, eax; mov [rbx], ecx; dec ecx; jnz 1b; hlt */
	static const uint8_t code[] = {0x8b, 0x03, 0x01, 0xc2, 0x89, 0x0b,
				       0xff, 0xc9, 0x75, 0xf6, 0xf4};
	struct other o = {0};

	run_beside(*state, code, sizeof(code), 200000, &o, scribble);
}

/* ---- what is wrong is found ---- */

/* Where @from stands in the translations there is to be @to, which is as long. */
static void patch(struct kl_xlate *x, const char *from, const char *to)
{
	uint8_t *at = memmem(x->rw + x->start, x->used - x->start, from, strlen(from));

	if (!at)
		_exit(1);
	memcpy(at, to, strlen(from));
	kl_xlate_serialize();
}

/* The guest's @code has a translation in which @from stands; it ends the process with @to. */
static void found(const uint8_t *code, size_t len, const char *from, const char *to)
{
	pid_t pid = fork();
	int status;

	if (!pid) {
		struct other o = {0};
		void *state;

		signal(SIGABRT, SIG_DFL);
		if (setup(&state))
			_exit(1);
		o.stop = true;
		run_beside(state, code, len, 1000, &o, count);
		patch(((struct env *)state)->v->blocks->xlate, from, to);
		run_beside(state, code, len, 1000, &o, count);
		_exit(2);
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_true(WIFSIGNALED(status));
	assert_int_equal(WTERMSIG(status), SIGABRT);
}

static void wrong_register(void **state)
{
	/* 1: inc edx; dec ecx; jnz 1b; hlt */
	static const uint8_t code[] = {0xff, 0xc2, 0xff, 0xc9, 0x75, 0xfa, 0xf4};

	(void)state;
	found(code, sizeof(code), "\xff\xc2", "\xff\xca");
}

static void wrong_store(void **state)
{
	/* 1: mov [rbx], edx; dec ecx; jnz 1b; hlt */
	static const uint8_t code[] = {0x89, 0x13, 0xff, 0xc9, 0x75, 0xfa, 0xf4};

	(void)state;
	found(code, sizeof(code), "\x41\x89\x16", "\x41\x89\x0e");
}

/* Such a block is not executed again, but is wrong each time. */
static void wrong_locked(void **state)
{
	/* 1: lock inc dword [rbx]; dec ecx; jnz 1b; hlt */
	static const uint8_t code[] = {0xf0, 0xff, 0x03, 0xff, 0xc9, 0x75, 0xf9, 0xf4};

	(void)state;
	found(code, sizeof(code), "\xf0\x41\xff\x06", "\xf0\x41\xff\x0e");
}

/* Vectors are compared where the block has none, too, if not each time. */
static void wrong_vector(void **state)
{
	/* 1: lea rdx, [rdx], three times; dec ecx; jnz 1b; hlt */
	static const uint8_t code[] = {0x48, 0x8d, 0x12, 0x48, 0x8d, 0x12, 0x48,
				       0x8d, 0x12, 0xff, 0xc9, 0x75, 0xf3, 0xf4};
	int32_t disp = KL_CTX(xsave) + KL_XMM_OFFSET;
	char to[] = "\x49\x89\x8f....\x66\x90"; /* mov [xmm0], rcx; nop */

	(void)state;
	memcpy(to + 3, &disp, 4);
	found(code, sizeof(code), "\x48\x8d\x12\x48\x8d\x12\x48\x8d\x12", to);
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, env_teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(counted_once),
		T(seen_once),
		T(not_taken_for_wrong),
		cmocka_unit_test(wrong_register),
		cmocka_unit_test(wrong_store),
		cmocka_unit_test(wrong_locked),
		cmocka_unit_test(wrong_vector),
	};

	/* There is no translator there. */
	return !KL_TSAN && cmocka_run_group_tests(tests, NULL, NULL);
}
