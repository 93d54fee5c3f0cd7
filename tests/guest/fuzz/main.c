/* SPDX-License-Identifier: MIT */
/*
 * insn-fuzz --seed S --count N [--threads T]    N instances, by T processes
 * insn-fuzz --seed S --only I                   instance I again, told in full
 *           --all                               go on after differences: one for each mnemonic
 *
 * Exit status 1: a difference, or a mnemonic that never came up.
 */
#include <getopt.h>
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

#define PROGRAMS 64 /* in a batch */
#define STATES   4  /* for each program */
#define BATCH    (PROGRAMS * STATES)
#define FORMS    (1u << 17)

/* What workers share. */
struct shared {
	_Atomic uint64_t next_batch, compared, discarded, faults, differences;
	_Atomic bool stop;
	_Atomic uint64_t reached[3][ZYDIS_MNEMONIC_MAX_VALUE + 1];
	_Atomic uint64_t failed[ZYDIS_MNEMONIC_MAX_VALUE + 1];
	_Atomic uint64_t forms[FORMS];
	_Atomic uint64_t nr_forms;
};

static struct shared *shared;
static struct {
	uint64_t seed, count, only;
	unsigned threads;
	bool all, replay;
} opt = {.seed = 1, .count = 1000000, .threads = 1};

static uint64_t current; /* instance */

void native_crashed(int sig, siginfo_t *info, void *uc);

/* A signal outside of native code: the engine's or the test's own. */
void native_crashed(int sig, siginfo_t *info, void *uc)
{
	fprintf(stderr, "insn-fuzz: signal %d at address %p: --seed %lu --only %lu\n", sig,
		info->si_addr, opt.seed, current);
	signal(sig, SIG_DFL);
	_exit(3);
}

/* ---- coverage ---- */

static uint64_t form_of(const struct program *p, const struct insn *i)
{
	uint64_t h = (uint64_t)i->in.mnemonic * 4 + p->mode;

	h = h * 31 + i->in.address_width;
	h = h * 31 + !!(i->in.attributes & ZYDIS_ATTRIB_HAS_LOCK);
	h = h * 31 + !!(i->in.attributes & (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE)) +
	    2 * !!(i->in.attributes & ZYDIS_ATTRIB_HAS_REPNE);
	h = h * 31 + i->in.encoding;
	for (unsigned k = 0; k < i->in.operand_count_visible; k++) {
		const ZydisDecodedOperand *o = &i->op[k];

		h = h * 1021 + o->type * 17u + o->size;
		if (o->type == ZYDIS_OPERAND_TYPE_REGISTER)
			h = h * 31 + ZydisRegisterGetClass(o->reg.value);
	}
	return h * 0x9e3779b97f4a7c15 | 1;
}

static void note_form(uint64_t form)
{
	for (unsigned k = 0; k < FORMS; k++) {
		_Atomic uint64_t *slot = &shared->forms[((form >> 40) + k) & (FORMS - 1)];
		uint64_t old = atomic_load_explicit(slot, memory_order_relaxed);

		if (old == form)
			return;
		if (!old && atomic_compare_exchange_strong(slot, &old, form)) {
			atomic_fetch_add(&shared->nr_forms, 1);
			return;
		}
		if (old == form)
			return;
	}
}

static void note_coverage(const struct program *p)
{
	for (unsigned k = 0; k < p->n; k++) {
		if (!p->insn[k].legal)
			continue;
		atomic_fetch_add_explicit(&shared->reached[p->mode][p->insn[k].in.mnemonic], 1,
					  memory_order_relaxed);
		note_form(form_of(p, &p->insn[k]));
	}
}

/* True if everything that should come up did. */
static bool print_coverage(void)
{
	unsigned seen = 0, missing = 0;

	for (unsigned m = 0; m <= ZYDIS_MNEMONIC_MAX_VALUE; m++) {
		bool expected = false, reached = false;

		for (unsigned mode = 0; mode < 3; mode++) {
			expected |= generate_expects((enum kl_code_mode)mode, (ZydisMnemonic)m);
			reached |= shared->reached[mode][m] > 0;
		}
		seen += reached;
		if (expected && !reached) {
			printf("never reached: %s\n", ZydisMnemonicGetString((ZydisMnemonic)m));
			missing++;
		}
	}
	printf("coverage: %u mnemonics, %lu forms\n", seen, shared->nr_forms);
	return !missing;
}

/* ---- one instance ---- */

static void report(const struct program *p, const struct machine *start,
		   const struct outcome *guest, const struct outcome *native, bool step,
		   const char *what)
{
	ZydisMnemonic m = p->insn[p->n - 1].in.mnemonic;

	atomic_fetch_add(&shared->differences, 1);
	if (opt.all && atomic_fetch_add(&shared->failed[m], 1))
		return;
	printf("instance %lu: %s\n", current, what);
	print_program(p, stdout);
	if (native) {
		compare(p, guest, native, stdout);
		compare_memory(false, stdout);
	}
	if (!opt.all || opt.replay) {
		printf(" before:\n");
		print_machine(start, stdout);
		printf(" vCPU (%s), vector %d, rip %lx, cr2 %lx:\n",
		       step ? "kl_interp_one" : "kl_interp_run", guest->vector, guest->m.rip,
		       guest->cr2);
		print_machine(&guest->m, stdout);
		if (native) {
			printf(" processor, vector %d, rip %lx, cr2 %lx:\n", native->vector,
			       native->m.rip, native->cr2);
			print_machine(&native->m, stdout);
		}
	}
	printf(" again: insn-fuzz --seed %lu --only %lu\n", opt.seed, current);
	fflush(stdout);
	if (!opt.all)
		atomic_store(&shared->stop, true);
}

/*
 * The vCPU would have touched something that is not shared, asked for a trap, or went to
 * where other code lies: it may decode to anything.
 */
static bool must_discard(const struct program *p, const struct outcome *o)
{
	if (o->m.rflags & KL_FL_TF)
		return true;
	if (o->vector == NO_VECTOR)
		return false;
	if (o->m.rip - CODE < CODE_SIZE ? o->m.rip - p->at > p->len : o->m.rip - LEAVE < LEAVE_SIZE)
		return true;
	return o->vector == KL_EXC_PF && native_has(o->cr2);
}

/*
 * Element by element a repeated CMPS or SCAS is many instructions. Intel's processors show that if
 * one faults: the flags are those that the instruction began with.
 */
static bool can_step(const struct program *p)
{
	for (unsigned i = 0; i < p->n && kl_host_is_intel(); i++)
		if (isa_compares_strings(p->insn[i].in.mnemonic))
			return false;
	return true;
}

static void instance(const struct program *p, struct rng *r, bool step)
{
	static struct machine start;
	static struct outcome guest, native;
	bool told = opt.replay && current == opt.only;

	state_random(r, p, &start);
	if (!guest_run(p, &start, step ? ALL_STEPS : 0, &guest)) {
		report(p, &start, &guest, NULL, step, "not implemented");
		compare_resync();
		return;
	}
	if (must_discard(p, &guest)) {
		atomic_fetch_add_explicit(&shared->discarded, 1, memory_order_relaxed);
		compare_resync();
		return;
	}
	native_run(p, &start, &native);
	atomic_fetch_add_explicit(&shared->compared, 1, memory_order_relaxed);
	if (native.vector != NO_VECTOR)
		atomic_fetch_add_explicit(&shared->faults, 1, memory_order_relaxed);
	if (KL_LIKELY(compare(p, &guest, &native, NULL) & compare_memory(false, NULL))) {
		if (told)
			report(p, &start, &guest, &native, step, "equal");
		return;
	}
	if (!opt.replay || told)
		report(p, &start, &guest, &native, step, "difference");
	compare_resync();
}

static void batch(uint64_t number)
{
	static struct program p;
	struct rng r;

	rng_seed(&r, opt.seed, number);
	state_reset_memory(false);
	generate_batch(&r);
	for (unsigned i = 0; i < PROGRAMS; i++) {
		generate(&r, &p);
		note_coverage(&p);
		for (unsigned k = 0; k < STATES; k++) {
			current = number * BATCH + i * STATES + k;
			instance(&p, &r, (k & 1) && can_step(&p));
			if (opt.replay && current == opt.only)
				return;
			if (KL_UNLIKELY(atomic_load_explicit(&shared->stop, memory_order_relaxed)))
				return;
		}
	}
}

static void work(void)
{
	while (!shared->stop && shared->compared < opt.count)
		batch(atomic_fetch_add(&shared->next_batch, 1));
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
			work();
			fflush(stdout);
			_exit(0);
		}
	}
	while (wait(&status) > 0)
		if (status) {
			printf("a worker ended with status %#x\n", status);
			ok = false;
		}
	return ok;
}

static void arguments(int argc, char **argv)
{
	static const struct option list[] = {
		{"seed", required_argument, NULL, 's'},    {"count", required_argument, NULL, 'c'},
		{"threads", required_argument, NULL, 't'}, {"only", required_argument, NULL, 'o'},
		{"all", no_argument, NULL, 'a'},           {NULL, 0, NULL, 0},
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
		case 'a':
			opt.all = true;
			break;
		default:
			fprintf(stderr, "usage: insn-fuzz [--seed S] [--count N] [--threads T] "
					"[--only I] [--all]\n");
			exit(2);
		}
	}
}

int main(int argc, char **argv)
{
	bool ok;

	arguments(argc, argv);
	if (!(getauxval(AT_HWCAP2) & 2)) {
		printf("insn-fuzz: needs RDFSBASE and WRFSBASE in processes\n");
		return 77;
	}
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1,
		      0);
	if (shared == MAP_FAILED)
		return 2;
	if (opt.replay) {
		setup();
		batch(opt.only / BATCH);
		return 0;
	}
	ok = run_workers();
	setup();
	ok &= print_coverage();
	ok &= mmio_check();
	printf("seed %lu: %lu instances compared, %lu of them faults; %lu discarded; "
	       "%lu differences\n",
	       opt.seed, shared->compared, shared->faults, shared->discarded, shared->differences);
	return !ok || shared->differences;
}
