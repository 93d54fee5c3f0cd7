/* SPDX-License-Identifier: MIT */
/*
 * block-fuzz --seed S --count N [--threads T]   until N instructions have been executed
 * block-fuzz --seed S --only P                  the blocks of number P again, told in full
 *            --from Q                           those of Q to P - 1 before
 *            --drop 3,5,...                     without some instructions
 *            --states K                         with K sets of registers
 *            --quiet                            exit status only
 *
 * Each program of blocks is run with many states, so that whatever a vCPU does to code that it
 * sees often is done. Per state it is run by the vCPU one instruction at a time, which shows where
 * it goes; by the vCPU at full speed, or a bit of both, or with requests from another
 * thread; and by the processor. The first difference is reduced by leaving out instructions.
 *
 * Exit status 1: a difference.
 */
#include <getopt.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fuzz.h"
#include "host/cpu.h"

#define STATES     64
#define MAX_STEPS  20000
#define DROP_WORDS (MAX_INSNS / 64)

/* What workers share. */
struct shared {
	_Atomic uint64_t next, programs, translations, runs, insns, discarded, ways, faults[32],
		differences;
	_Atomic uint64_t failed; /* program, the state with which it did, its instructions */
	_Atomic unsigned failed_state, failed_made;
	_Atomic bool stop;
	_Atomic uint64_t reached[ZYDIS_MNEMONIC_MAX_VALUE + 1];
};

static struct shared *shared;
static struct {
	uint64_t seed, count, only, from;
	uint64_t drop[DROP_WORDS];
	unsigned threads, states;
	bool replay, quiet;
} opt = {.seed = 1, .count = 1000000, .threads = 1, .states = STATES, .from = UINT64_MAX};

static uint64_t current;
static unsigned current_state;

void native_crashed(int sig, siginfo_t *info, void *uc);

/* A signal outside of native code: the engine's or the test's own. */
void native_crashed(int sig, siginfo_t *info, void *uc)
{
	const ucontext_t *c = uc;
	uint64_t rip = (uint64_t)c->uc_mcontext.gregs[REG_RIP];

	fprintf(stderr,
		"block-fuzz: signal %d at address %p, rip %lx: --seed %lu --only %lu, state %u\n",
		sig, info->si_addr, rip, opt.seed, current, current_state);
	/* It may be in code that is gone when the process is. */
	if (rip)
		for (unsigned i = 0; i < 16; i++)
			fprintf(stderr, "%02x ", ((const uint8_t *)rip)[i]);
	fprintf(stderr, "\n");
	signal(sig, SIG_DFL);
	_exit(3);
}

/* ---- requests from elsewhere ---- */

/* While it is set, another thread sets requests as fast as it can. */
static _Atomic bool kicking;
static pthread_mutex_t kick_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t kick_cond = PTHREAD_COND_INITIALIZER;

static void *kicker(void *arg)
{
	struct rng r = {.s = opt.seed + 1};

	for (;;) {
		pthread_mutex_lock(&kick_lock);
		while (!kicking)
			pthread_cond_wait(&kick_cond, &kick_lock);
		pthread_mutex_unlock(&kick_lock);
		while (kicking) {
			for (unsigned n = pick(&r, 400); n; n--)
				__builtin_ia32_pause();
			kl_vcpu_request(&guest_vcpu()->core,
					chance(&r, 50) ? KL_REQ_EVENT : KL_REQ_TLB_FLUSH);
		}
	}
	return arg;
}

static void kick(bool on)
{
	static bool started;
	pthread_t t;

	if (on && !started) {
		if (pthread_create(&t, NULL, kicker, NULL))
			abort();
		started = true;
	}
	pthread_mutex_lock(&kick_lock);
	kicking = on;
	pthread_cond_signal(&kick_cond);
	pthread_mutex_unlock(&kick_lock);
}

/* ---- one run ---- */

static uint64_t watched; /* steps of this run */

/* Only instructions of the program are executed, and not for ever; no traps. */
static bool watch(const struct kl_vcpu *v)
{
	if (v->rflags & KL_FL_TF || ++watched > MAX_STEPS)
		return false;
	if (blocks_has(v->rip))
		return true;
	/* Nothing is there, or a way out: it will fault. */
	if (v->rip - LEAVE < LEAVE_SIZE)
		return v->rip - LEAVE < 32 * NR_WAYS && !(v->rip & 15);
	return v->rip - CODE >= CODE_SIZE && v->rip - PATCH >= PATCH_SIZE;
}

static bool must_discard(const struct outcome *o)
{
	return o->vector == STOPPED || (o->m.rflags & KL_FL_TF) ||
	       (o->vector == KL_EXC_PF && native_has(o->cr2));
}

/* Flags at a fault: insn-fuzz's can_step(). */
static bool steps_show_all(const struct program *p)
{
	for (unsigned i = 0; i < p->n && kl_host_is_intel(); i++)
		if (p->insn[i].legal && isa_compares_strings(p->insn[i].in.mnemonic))
			return false;
	return true;
}

static uint8_t memory_of_steps[DATA_PAGES * KL_PAGE_SIZE + PATCH_SIZE];

/*
 * Guest memory to what is kept of the steps, compared with that, or from the processor's. Any
 * program may reach the memory of those that write to themselves.
 */
enum copy { SAVE, COMPARE, RESET, TELL };
static bool copy_memory(enum copy how)
{
	bool same = true;

	for (unsigned i = 0; i < DATA_PAGES + PATCH_SIZE / KL_PAGE_SIZE; i++) {
		uint64_t lin = i < DATA_PAGES ? DATA + i * KL_PAGE_SIZE
					      : PATCH + (i - DATA_PAGES) * KL_PAGE_SIZE;
		uint8_t *saved = memory_of_steps + i * KL_PAGE_SIZE;

		if (i < DATA_PAGES && data_rights[i] != PAGE_RW)
			continue;
		if (how == SAVE)
			memcpy(saved, guest_memory(lin), KL_PAGE_SIZE);
		else if (how == RESET)
			memcpy(guest_memory(lin), native_memory(lin), KL_PAGE_SIZE);
		else if (memcmp(saved, guest_memory(lin), KL_PAGE_SIZE))
			same = false;
		for (unsigned k = 0; how == TELL && k < KL_PAGE_SIZE; k++)
			if (saved[k] != *guest_memory(lin + k))
				printf("  memory at %#lx: steps %02x, blocks %02x\n", lin + k,
				       saved[k], *guest_memory(lin + k));
	}
	return same;
}

/* @steps: the first of both are single steps. */
static void report(const struct program *p, const struct machine *start, const char *what,
		   bool steps, const struct outcome *a, const struct outcome *b)
{
	if (atomic_fetch_add(&shared->differences, 1) == 0) {
		shared->failed = current;
		shared->failed_state = current_state;
		shared->failed_made = blocks_made_as[p->n - 1] + 1u;
	} else if (!opt.replay) {
		return;
	}
	shared->stop = true;
	if (opt.quiet)
		return;
	printf("program %lu, state %u: %s\n", current, current_state, what);
	print_program(p, stdout);
	printf(" as they were made:");
	for (unsigned k = 0; k < p->n; k++)
		printf(" %u", blocks_made_as[k]);
	printf("\n");
	compare(p, a, b, stdout);
	if (steps)
		copy_memory(TELL);
	else
		compare_memory(true, stdout);
	printf(" before:\n");
	print_machine(start, stdout);
	printf(" first, vector %d, rip %lx, cr2 %lx:\n", a->vector, a->m.rip, a->cr2);
	print_machine(&a->m, stdout);
	printf(" second, vector %d, rip %lx, cr2 %lx:\n", b->vector, b->m.rip, b->cr2);
	print_machine(&b->m, stdout);
	fflush(stdout);
}

enum way_to_run { RUN, STEP_AND_RUN, KICKED };

/* One state. False: a difference. */
static bool run_state(const struct program *p, struct rng *r, enum way_to_run how)
{
	static struct machine start;
	static struct outcome stepped, guest, native;
	bool compare_steps = steps_show_all(p);
	uint64_t before, steps = 0;

	blocks_state(r, p, &start);
	if (blocks_patch(p))
		blocks_put();
	watched = 0;
	guest_watch = watch;
	if (!guest_run(p, &start, ALL_STEPS, &stepped)) {
		report(p, &start, "not implemented", true, &stepped, &stepped);
		return false;
	}
	guest_watch = NULL;
	if (must_discard(&stepped)) {
		atomic_fetch_add_explicit(&shared->discarded, 1, memory_order_relaxed);
		copy_memory(RESET);
		return true;
	}
	copy_memory(SAVE);
	copy_memory(RESET);
	before = guest_vcpu()->insn_count;
	if (how == STEP_AND_RUN && compare_steps)
		steps = pick(r, (unsigned)watched + 1);
	guest_run(p, &start, steps, &guest);
	atomic_fetch_add_explicit(&shared->insns, guest_vcpu()->insn_count - before,
				  memory_order_relaxed);
	atomic_fetch_add_explicit(&shared->runs, 1, memory_order_relaxed);
	if (compare_steps && !(compare(p, &stepped, &guest, NULL) & copy_memory(COMPARE))) {
		report(p, &start, "one by one, and blocks", true, &stepped, &guest);
		return false;
	}
	native_run(p, &start, &native);
	if (native.vector == NO_VECTOR)
		atomic_fetch_add_explicit(&shared->ways, 1, memory_order_relaxed);
	else
		atomic_fetch_add_explicit(&shared->faults[native.vector & 31], 1,
					  memory_order_relaxed);
	if (!(compare(p, &guest, &native, NULL) & compare_memory(true, NULL))) {
		report(p, &start,
		       how == RUN            ? "vCPU and processor"
		       : how == STEP_AND_RUN ? "vCPU, stepped first, and processor"
					     : "vCPU, with requests, and processor",
		       false, &guest, &native);
		return false;
	}
	return true;
}

static bool run_program(uint64_t number, unsigned states)
{
	static struct program p;
	enum way_to_run how;
	struct rng r;
	bool ok = true;

	current = number;
	rng_seed(&r, opt.seed + 1000, number);
	blocks_generate(opt.seed, number, opt.replay ? opt.drop : NULL, &p);
	state_reset_memory(false);
	blocks_put();
	guest_new_patch();
	for (unsigned k = 0; k < p.n && !opt.replay; k++)
		if (p.insn[k].legal)
			atomic_fetch_add_explicit(&shared->reached[p.insn[k].in.mnemonic], 1,
						  memory_order_relaxed);
	how = chance(&r, 85) ? RUN : chance(&r, 70) ? STEP_AND_RUN : KICKED;
	if (how == KICKED)
		kick(true);
	for (unsigned k = 0; k < states && ok; k++) {
		struct rng own;

		/* What a state takes of it depends on what was dropped. */
		rng_seed(&own, opt.seed + 2000 + k, number);
		current_state = k;
		ok = run_state(&p, &own, how);
		if (KL_UNLIKELY(shared->stop && !opt.replay))
			break;
	}
	if (how == KICKED)
		kick(false);
	atomic_fetch_add_explicit(&shared->programs, 1, memory_order_relaxed);
	atomic_fetch_add_explicit(&shared->translations, guest_translations(),
				  memory_order_relaxed);
	return ok;
}

/* ---- */

static void setup(void)
{
	guest_init();
	isa_init(guest_vcpu());
	state_init();
	native_init();
	generate_init();
}

/* In a process of its own: true if it ends with status 1, a difference. */
static bool differs(const uint64_t *drop, unsigned states, bool quiet)
{
	pid_t pid;
	int status;

	fflush(stdout);
	pid = fork();
	if (pid < 0)
		abort();
	if (pid == 0) {
		bool ok = true;

		opt.replay = true;
		opt.quiet = quiet;
		memcpy(opt.drop, drop, sizeof(opt.drop));
		setup();
		for (uint64_t n = opt.from; n < opt.only && ok; n++) {
			memset(opt.drop, 0, sizeof(opt.drop));
			ok = run_program(n, STATES);
		}
		memcpy(opt.drop, drop, sizeof(opt.drop));
		ok = ok && run_program(opt.only, states);
		fflush(stdout);
		_exit(!ok);
	}
	waitpid(pid, &status, 0);
	return WIFEXITED(status) && WEXITSTATUS(status) == 1;
}

static bool dropped(const uint64_t *drop, unsigned k)
{
	return drop[k / 64] >> (k % 64) & 1;
}

static void print_drop(const uint64_t *drop)
{
	const char *before = " --drop ";

	for (unsigned k = 0; k < MAX_INSNS; k++)
		if (dropped(drop, k)) {
			printf("%s%u", before, k);
			before = ",";
		}
}

/* Leave out what can be left out: halves, quarters, ..., one by one. */
static void minimise(void)
{
	uint64_t drop[DROP_WORDS] = {0}, try[DROP_WORDS];
	unsigned states = shared->failed_state + 1, made = shared->failed_made, runs = 0;

	opt.only = shared->failed;
	printf("program %lu differs: --seed %lu --only %lu\n", opt.only, opt.seed, opt.only);
	if (!differs(drop, states, true)) {
		opt.from = opt.only > 200 ? opt.only - 200 : 0;
		if (opt.threads > 1 || !differs(drop, states, true)) {
			printf("not when it is run again alone\n");
			return;
		}
		printf("only after others: --from %lu\n", opt.from);
	}
	for (unsigned size = 32; size && runs < 400; size /= 2)
		for (unsigned k = 0; k < made; k += size) {
			bool more = false;

			memcpy(try, drop, sizeof(try));
			for (unsigned j = k; j < kl_min(k + size, made); j++) {
				more |= !dropped(try, j);
				try[j / 64] |= 1ull << (j % 64);
			}
			if (more && runs++ < 400 && differs(try, states, true))
				memcpy(drop, try, sizeof(drop));
		}
	differs(drop, states, false);
	printf(" again: block-fuzz --seed %lu --only %lu", opt.seed, opt.only);
	if (opt.from != UINT64_MAX)
		printf(" --from %lu", opt.from);
	print_drop(drop);
	printf("\n");
}

/* One process after another has the same addresses: they are set up after the fork. */
static bool run_workers(void)
{
	bool ok = true;
	int status;

	for (unsigned i = 0; i < opt.threads; i++) {
		pid_t pid = fork();

		if (pid < 0) {
			perror("fork");
			exit(2);
		}
		if (pid == 0) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			setup();
			while (!shared->stop && shared->insns < opt.count)
				run_program(atomic_fetch_add(&shared->next, 1), STATES);
			fflush(stdout);
			_exit(0);
		}
	}
	while (wait(&status) > 0)
		if (status) {
			printf("a worker ended with status %#x\n", status);
			shared->stop = true;
			ok = false;
		}
	return ok;
}

static void print_summary(void)
{
	unsigned seen = 0;

	for (unsigned m = 0; m <= ZYDIS_MNEMONIC_MAX_VALUE; m++)
		seen += shared->reached[m] > 0;
	printf("%lu programs of %u mnemonics, %lu blocks translated; %lu runs came through",
	       shared->programs, seen, shared->translations, shared->ways);
	for (unsigned k = 0; k < 32; k++)
		if (shared->faults[k])
			printf(", %lu #%u", shared->faults[k], k);
	printf("\nseed %lu: %lu runs compared, %lu instructions; %lu discarded; %lu differences\n",
	       opt.seed, shared->runs, shared->insns, shared->discarded, shared->differences);
}

static void arguments(int argc, char **argv)
{
	static const struct option list[] = {
		{"seed", required_argument, NULL, 's'},
		{"count", required_argument, NULL, 'c'},
		{"threads", required_argument, NULL, 't'},
		{"only", required_argument, NULL, 'o'},
		{"from", required_argument, NULL, 'f'},
		{"drop", required_argument, NULL, 'd'},
		{"states", required_argument, NULL, 'n'},
		{"quiet", no_argument, NULL, 'q'},
		{NULL, 0, NULL, 0},
	};
	int c;

	while ((c = getopt_long(argc, argv, "", list, NULL)) != -1) {
		switch (c) {
		case 's':
			opt.seed = strtoull(optarg, NULL, 0);
			break;
		case 'c':
			opt.count = strtoull(optarg, NULL, 0);
			break;
		case 't':
			opt.threads = (unsigned)strtoul(optarg, NULL, 0);
			break;
		case 'o':
			opt.only = strtoull(optarg, NULL, 0);
			opt.replay = true;
			break;
		case 'f':
			opt.from = strtoull(optarg, NULL, 0);
			break;
		case 'n':
			opt.states = (unsigned)strtoul(optarg, NULL, 0);
			break;
		case 'q':
			opt.quiet = true;
			break;
		case 'd':
			for (char *s = optarg; *s; s += *s == ',') {
				unsigned k = (unsigned)strtoul(s, &s, 10) % MAX_INSNS;

				opt.drop[k / 64] |= 1ull << (k % 64);
			}
			break;
		default:
			fprintf(stderr,
				"usage: block-fuzz [--seed S] [--count N] [--threads T] [--only P "
				"[--from Q] [--drop N,...] [--states K] [--quiet]]\n");
			exit(2);
		}
	}
}

int main(int argc, char **argv)
{
	bool ok;

	arguments(argc, argv);
	if (!(getauxval(AT_HWCAP2) & 2)) {
		printf("block-fuzz: needs RDFSBASE and WRFSBASE in processes\n");
		return 77;
	}
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1,
		      0);
	if (shared == MAP_FAILED)
		return 2;
	if (opt.replay) {
		ok = !differs(opt.drop, opt.states, opt.quiet);
		if (!opt.quiet)
			printf("program %lu: %s\n", opt.only, ok ? "equal" : "a difference");
		return !ok;
	}
	ok = run_workers();
	if (shared->differences)
		minimise();
	print_summary();
	return !ok || shared->differences;
}
