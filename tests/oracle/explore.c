/* SPDX-License-Identifier: MIT */
/*
 * Explores how operations of the library run beside each other, and holds what comes of it against
 * the oracle: there must be an order of the operations, one after the other, in which the oracle
 * accepts every answer and the memory that is found at the end. An operation that ended before
 * another began comes before it.
 *
 *   explore --sequences N [--seed S]
 *       N random sequences of one thread: the oracle and the library agree step by step.
 *   explore --failures N [--seed S]
 *       the same; in each step what can fail fails first, one after the other until there is
 * nothing left: the error is the right one, and the oracle, which knows nothing of it, still
 * agrees. explore --pairs [--each N] [--seed S] [--kinds A,B] for every pair of kinds (or that one)
 * N scenarios, in which the first two threads begin with one of each, under random schedules.
 * explore --exhaustive N [--seed S] [--kinds A,B] N scenarios of two threads, under every schedule
 * with at most two switches that nobody had to make. explore --scenario SEED,A,B [--choices LIST]
 *       one of them again.
 *   --verbose: each step of a sequence
 */
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/failpoint.h"
#include "base/pool.h"
#include "base/racepoint.h"
#include "../random.h"
#include "engine.h"
#include "schedule.h"

#define MAX_OPS   3 /* of a thread */
#define MAX_SETUP 10
#define SWITCHES  2

struct done {
	struct op op;
	struct outcome out;
	unsigned begin, end; /* when, by a common count */
};

struct scenario {
	uint64_t seed;
	enum kind a, b;
	unsigned threads, ops_each; /* as make() was told */
	unsigned nr_setup, nr_threads;
	struct op setup[MAX_SETUP];
	unsigned nr_ops[MAX_THREADS];
	struct done ops[MAX_THREADS][MAX_OPS];
	struct oracle before;
	unsigned nr_last;
	struct done last[2 * GUEST_PAGES + NR_SLOTS + NR_CACHES + 1];
};

static _Atomic unsigned now;

/* ---- making of ---- */

static uint64_t rnd_state;

static uint64_t rnd(uint64_t n)
{
	return random_next(&rnd_state) % n;
}

static void any_op(struct op *op, enum kind kind, unsigned thread)
{
	*op = (struct op){
		.kind = kind,
		.thread = thread,
		.slot = (unsigned)rnd(NR_SLOTS),
		.gfn = (unsigned)rnd(GUEST_PAGES / 2),
		.n = 1 + (unsigned)rnd(2),
		.page = (unsigned)rnd(POOL_PAGES / 2),
		.off = (unsigned)rnd(FILE_PAGES - 1),
		.flag = !rnd(4),
		.prot = (unsigned)rnd(3),
		.val = rnd(4) ? rnd(256) * 0x0101010101010101 : rnd(1ull << 62),
		.want = 0,
	};
	_Static_assert(NR_SLOTS <= NR_CACHES, "an index for both");
	switch (kind) {
	case SET:
		op->flag = !rnd(6);
		if (!rnd(3))
			op->n = 0;
		break;
	case SET_PRIVATE:
		op->flag = rnd(2);
		break;
	case GPC_LOCK_MANY:
		op->n = (op->slot + 1) % NR_CACHES;
		break;
	default:
		break;
	}
}

static void any_setup(struct scenario *s)
{
	static const enum kind kinds[] = {GPC_ACTIVATE, GPC_ACTIVATE, STORE,       TRACK_ADD,
					  SET_PRIVATE,  GPC_LOCK,     GPC_REFRESH, ALLOCATE,
					  STORE,        LOAD,         REPLACE,     GPC_ACTIVATE_HVA,
					  TRACK_ADD,    SET,          PROTECT};

	s->nr_setup = 3 + (unsigned)rnd(MAX_SETUP - 3);
	for (unsigned i = 0; i < s->nr_setup; i++) {
		struct op *op = &s->setup[i];

		if (i < 2) {
			any_op(op, i && rnd(2) ? SET_GMEM : SET, 0);
			op->slot = i;
			op->gfn = 2 * i;
			op->n = 2;
			op->flag &= !rnd(3);
		} else {
			any_op(op, kinds[rnd(sizeof(kinds) / sizeof(kinds[0]))], 0);
		}
	}
}

static void make(struct scenario *s, uint64_t seed, enum kind a, enum kind b, unsigned threads,
		 unsigned ops)
{
	memset(s, 0, sizeof(*s));
	rnd_state = seed * 0x2545f4914f6cdd1d;
	s->seed = seed;
	s->a = a;
	s->b = b;
	s->threads = threads;
	s->ops_each = ops;
	any_setup(s);
	s->nr_threads = threads ? threads : 2 + (unsigned)!rnd(4);
	for (unsigned t = 0; t < s->nr_threads; t++) {
		s->nr_ops[t] = ops ? ops : 1 + (unsigned)rnd(MAX_OPS);
		for (unsigned i = 0; i < s->nr_ops[t]; i++)
			any_op(&s->ops[t][i].op,
			       i || t > 1 ? (enum kind)rnd(NR_KINDS)
			       : t        ? b
					  : a,
			       t);
	}
}

static void say_op(const struct op *op, const struct outcome *out)
{
	printf("%-16s slot %u gfn %u n %u page %u off %u flag %u prot %u val %" PRIx64,
	       kind_name[op->kind], op->slot, op->gfn, op->n, op->page, op->off, op->flag, op->prot,
	       op->val);
	if (out)
		printf(" = %d %" PRIx64 " %" PRIx64 " reports %u %u %u", out->ret, out->val,
		       out->val2, out->reports[0], out->reports[1], out->reports[2]);
	printf("\n");
}

/* One after the other. */
static bool accepts(struct oracle *o, const struct op *op, const struct outcome *out)
{
	bool good = oracle_accepts(o, op, out);

	for (unsigned i = 0; i < o->nr_written; i++)
		oracle_log(o, o->written[i]);
	return good;
}

/* ---- the order ---- */

struct search {
	const struct scenario *s;
	unsigned at[MAX_THREADS];
};

/* Writes that were seen and are not in the log yet: they are when their operation ends, at the
 * latest. */
struct late {
	unsigned n;
	struct {
		struct written written;
		unsigned end;
	} write[MAX_THREADS * 2];
};

static bool may_come(const struct search *q, unsigned t)
{
	const struct done *d = &q->s->ops[t][q->at[t]];

	for (unsigned i = 0; i < q->s->nr_threads; i++)
		if (i != t && q->at[i] < q->s->nr_ops[i] && q->s->ops[i][q->at[i]].end < d->begin)
			return false;
	return true;
}

static bool explained(struct search *q, const struct oracle *o, const struct late *late);

/* What is found at the end. */
static bool found(const struct search *q, const struct oracle *o)
{
	struct oracle end = *o;

	for (unsigned i = 0; i < q->s->nr_last; i++)
		if (!accepts(&end, &q->s->last[i].op, &q->s->last[i].out))
			return false;
	return true;
}

/* Is @t's next operation the next? */
static bool comes(struct search *q, unsigned t, const struct oracle *o, const struct late *late)
{
	const struct done *d = &q->s->ops[t][q->at[t]];
	struct oracle next = *o;
	struct late l = *late;

	for (unsigned i = 0; i < l.n;)
		if (l.write[i].end < d->begin) {
			oracle_log(&next, l.write[i].written);
			l.write[i] = l.write[--l.n];
		} else {
			i++;
		}
	if (!oracle_accepts(&next, &d->op, &d->out))
		return false;
	for (unsigned i = 0; i < next.nr_written; i++) {
		l.write[l.n].written = next.written[i];
		l.write[l.n++].end = d->end;
	}
	q->at[t]++;
	if (explained(q, &next, &l))
		return true;
	q->at[t]--;
	return false;
}

static bool explained(struct search *q, const struct oracle *o, const struct late *late)
{
	bool more = false;

	for (unsigned t = 0; t < q->s->nr_threads; t++)
		if (q->at[t] < q->s->nr_ops[t]) {
			more = true;
			if (may_come(q, t) && comes(q, t, o, late))
				return true;
		}
	/* Or one of the writes is logged. */
	for (unsigned i = 0; i < late->n; i++) {
		struct oracle next = *o;
		struct late l = *late;

		oracle_log(&next, l.write[i].written);
		l.write[i] = l.write[--l.n];
		if (explained(q, &next, &l))
			return true;
	}
	return !more && !late->n && found(q, o);
}

/* ---- running ---- */

static void look(struct scenario *s, enum kind kind, unsigned slot, unsigned gfn)
{
	struct done *d = &s->last[s->nr_last++];

	d->op = (struct op){.kind = kind, .slot = slot, .gfn = gfn, .n = 1};
	engine_do(&d->op, &d->out);
}

static void thread(void *arg, unsigned t)
{
	struct scenario *s = arg;

	engine_thread(t);
	for (unsigned i = 0; i < s->nr_ops[t]; i++) {
		struct done *d = &s->ops[t][i];

		schedule_point();
		d->begin = atomic_fetch_add(&now, 1);
		engine_do(&d->op, &d->out);
		d->end = atomic_fetch_add(&now, 1);
	}
}

static void report(const struct scenario *s, const struct schedule *sch, const char *what)
{
	printf("%s\n", what);
	printf("explore --scenario %" PRIu64 ",%s,%s --threads %u --ops %u --choices ", s->seed,
	       kind_name[s->a], kind_name[s->b], s->threads, s->ops_each);
	for (unsigned i = 0; i < sch->n; i++)
		printf("%u", sch->choice[i]);
	printf("\n  before:\n");
	for (unsigned i = 0; i < s->nr_setup; i++) {
		printf("    ");
		say_op(&s->setup[i], NULL);
	}
	for (unsigned t = 0; t < s->nr_threads; t++)
		for (unsigned i = 0; i < s->nr_ops[t]; i++) {
			printf("  thread %u, %u to %u: ", t, s->ops[t][i].begin, s->ops[t][i].end);
			say_op(&s->ops[t][i].op, &s->ops[t][i].out);
		}
	printf("  after:\n");
	for (unsigned i = 0; i < s->nr_last; i++) {
		printf("    ");
		say_op(&s->last[i].op, &s->last[i].out);
	}
	fflush(stdout);
}

/* False: there is no such order, or nobody goes on. */
static bool once(struct scenario *s, struct schedule *sch)
{
	static const struct late none;
	struct search q = {.s = s};
	struct outcome out;
	bool good;

	engine_begin();
	engine_thread(0);
	oracle_init(&s->before);
	for (unsigned i = 0; i < s->nr_setup; i++) {
		engine_do(&s->setup[i], &out);
		if (!accepts(&s->before, &s->setup[i], &out)) {
			printf("sequence %" PRIu64 ", step %u: ", s->seed, i);
			say_op(&s->setup[i], &out);
			return false;
		}
	}
	s->nr_last = 0;
	good = schedule_run(sch, s->nr_threads, thread, s);
	if (!good) {
		report(s, sch, "nobody goes on");
		_Exit(1);
	}
	engine_thread(0);
	for (unsigned i = 0; i < GUEST_PAGES; i++)
		look(s, TRANSLATE, 0, i);
	look(s, ALLOCATED, 0, 0);
	for (unsigned i = 0; i < GUEST_PAGES; i++)
		look(s, LOAD, 0, i);
	for (unsigned i = 0; i < NR_SLOTS; i++)
		look(s, DIRTY_GET, i, 0);
	for (unsigned i = 0; i < NR_CACHES; i++)
		look(s, GPC_REFRESH, i, 0);
	engine_end();
	good = explained(&q, &s->before, &none);
	if (!good)
		report(s, sch, "no order explains this");
	return good;
}

/* ---- modes ---- */

static unsigned long runs;
static bool verbose;

/* What a sequence begins with, and a step of it. */
static void begin(struct oracle *o, uint64_t seed)
{
	rnd_state = seed * 0x2545f4914f6cdd1d;
	engine_begin();
	engine_thread(0);
	oracle_init(o);
}

static void any_step(struct op *op)
{
	any_op(op, rnd(4) ? (enum kind)rnd(NR_KINDS) : rnd(2) ? SET : SET_GMEM, 0);
}

static bool sequences(unsigned n, uint64_t seed)
{
	struct oracle o;
	struct outcome out;
	struct op op;

	for (; n; n--, seed++, runs++) {
		begin(&o, seed);
		for (unsigned i = 0; i < 200; i++) {
			any_step(&op);
			engine_do(&op, &out);
			if (verbose)
				say_op(&op, &out);
			if (!accepts(&o, &op, &out)) {
				printf("explore --sequences 1 --seed %" PRIu64 ": step %u: ", seed,
				       i);
				say_op(&op, &out);
				return false;
			}
		}
		engine_end();
	}
	return true;
}

/* May a call whose step @name failed return @r? */
static bool is_errno_of(const char *name, int r)
{
	if (!strcmp(name, "populate"))
		return r == -EFAULT;
	if (!strcmp(name, "populate-hwpoison"))
		return r == -EHWPOISON;
	if (!strcmp(name, "gmem-open"))
		return r == -EMFILE;
	return r == -ENOMEM;
}

/* What an error may leave behind all the same: memory that was touched is there. */
static void after_error(struct oracle *o, const struct op *op, int r)
{
	for (unsigned i = 0; i < FILE_PAGES; i++)
		if (o->file[i].there == NOT)
			o->file[i].there = MAYBE;
	if (r == -ENOMEM && (op->kind == GPC_ACTIVATE || op->kind == GPC_ACTIVATE_HVA))
		o->cache[op->slot].active = false; /* G6 */
}

static unsigned long failures;

/* One step, with everything in it that can fail. False: it came to what it may not. */
static bool step_with_failures(struct oracle *o, const struct op *op, struct outcome *out,
			       const char **name)
{
	for (unsigned nth = 1;; nth++) {
		struct oracle next = *o;

		kl_failpoint_arm_any(nth);
		engine_do(op, out);
		*name = kl_failpoint_disarm_any();
		if (*name && out->ret && is_errno_of(*name, out->ret)) {
			failures++;
			after_error(o, op, out->ret);
			continue;
		}
		/* Nothing failed any more; or it did, and was made up for. */
		if (!accepts(&next, op, out))
			return false;
		*o = next;
		return true;
	}
}

static bool sequences_with_failures(unsigned n, uint64_t seed)
{
	struct oracle o;
	struct outcome out;
	struct op op;

	if (n && !kl_failpoints_enabled())
		exit(77);
	for (; n; n--, seed++, runs++) {
		uint64_t pages = kl_pages_in_use();
		const char *name;

		begin(&o, seed);
		for (unsigned i = 0; i < 100; i++) {
			any_step(&op);
			if (step_with_failures(&o, &op, &out, &name))
				continue;
			printf("explore --failures 1 --seed %" PRIu64 ": step %u, %s failed: ",
			       seed, i, name ? name : "nothing");
			say_op(&op, &out);
			return false;
		}
		engine_end();
		if (kl_pages_in_use() != pages) {
			printf("explore --failures 1 --seed %" PRIu64 ": pages are left\n", seed);
			return false;
		}
	}
	return true;
}

static bool pair(enum kind a, enum kind b, unsigned each, uint64_t seed)
{
	static struct scenario s;
	static struct schedule sch;

	for (unsigned i = 0; i < each; i++, runs++) {
		make(&s, seed + i, a, b, 0, 0);
		sch = (struct schedule){.strategy = PRIORITIES, .seed = seed + i, .changes = i % 8};
		if (!once(&s, &sch))
			return false;
	}
	return true;
}

/*
 * The next schedule after the one that was made: the last choice that can be another one is, with
 * no more than SWITCHES choices in all that are not the first. False: that was the last.
 */
static bool advance(struct schedule *s)
{
	unsigned used[MAX_CHOICES + 1] = {0};

	for (unsigned i = 0; i < s->n; i++)
		used[i + 1] = used[i] + !!s->choice[i];
	for (unsigned i = s->n; i-- > 0;)
		if (s->choice[i] + 1 < s->of[i] && used[i] < SWITCHES) {
			s->choice[i]++;
			s->n = i + 1;
			return true;
		}
	return false;
}

static bool exhaust(enum kind a, enum kind b, uint64_t seed)
{
	static struct scenario s;
	static struct schedule sch;

	sch = (struct schedule){.strategy = LISTED};
	do {
		make(&s, seed, a, b, 2, 1);
		if (!once(&s, &sch))
			return false;
		runs++;
	} while (advance(&sch));
	return true;
}

static enum kind kind_of(const char *name)
{
	for (unsigned i = 0; i < NR_KINDS; i++)
		if (!strcmp(kind_name[i], name))
			return (enum kind)i;
	fprintf(stderr, "explore: no such operation: %s\n", name);
	exit(2);
}

int main(int argc, char **argv)
{
	enum {
		SEQUENCES = 256,
		FAILURES,
		PAIRS,
		EACH,
		EXHAUSTIVE,
		SEED,
		KINDS,
		SCENARIO,
		CHOICES,
		THREADS,
		OPS,
		VERBOSE
	};
	static const struct option options[] = {
		{"sequences", 1, NULL, SEQUENCES},
		{"failures", 1, NULL, FAILURES},
		{"pairs", 0, NULL, PAIRS},
		{"each", 1, NULL, EACH},
		{"exhaustive", 1, NULL, EXHAUSTIVE},
		{"seed", 1, NULL, SEED},
		{"kinds", 1, NULL, KINDS},
		{"scenario", 1, NULL, SCENARIO},
		{"choices", 1, NULL, CHOICES},
		{"threads", 1, NULL, THREADS},
		{"ops", 1, NULL, OPS},
		{"verbose", 0, NULL, VERBOSE},
		{NULL, 0, NULL, 0},
	};
	unsigned n_sequences = 0, n_failures = 0, each = 1, n_exhaustive = 0, threads = 0, ops = 0;
	enum kind from_a = 0, to_a = NR_KINDS - 1, from_b = 0, to_b = NR_KINDS - 1;
	bool pairs = false, scenario = false, good = true;
	static struct schedule sch;
	static struct scenario s;
	uint64_t seed = 1;
	char *p;
	int o;

	if (!kl_racepoints_enabled()) {
		fprintf(stderr, "explore: there are no racepoints in this build\n");
		return 77;
	}
	while ((o = getopt_long(argc, argv, "", options, NULL)) >= 0) {
		switch (o) {
		case SEQUENCES:
			n_sequences = (unsigned)atoi(optarg);
			break;
		case FAILURES:
			n_failures = (unsigned)atoi(optarg);
			break;
		case PAIRS:
			pairs = true;
			break;
		case EACH:
			each = (unsigned)atoi(optarg);
			break;
		case EXHAUSTIVE:
			n_exhaustive = (unsigned)atoi(optarg);
			break;
		case SEED:
			seed = strtoull(optarg, NULL, 0);
			break;
		case SCENARIO:
			scenario = true;
			seed = strtoull(strtok(optarg, ","), NULL, 0);
			p = strtok(NULL, "");
			if (!p)
				return 2;
			optarg = p;
			/* fall through */
		case KINDS:
			p = strchr(optarg, ',');
			if (!p)
				return 2;
			*p = 0;
			from_a = to_a = kind_of(optarg);
			from_b = to_b = kind_of(p + 1);
			break;
		case CHOICES:
			for (p = optarg; *p && sch.n < MAX_CHOICES; p++)
				sch.choice[sch.n++] = (uint8_t)(*p - '0');
			break;
		case THREADS:
			threads = (unsigned)atoi(optarg);
			break;
		case OPS:
			ops = (unsigned)atoi(optarg);
			break;
		case VERBOSE:
			verbose = true;
			break;
		default:
			return 2;
		}
	}
	if (scenario) {
		sch.strategy = LISTED;
		make(&s, seed, from_a, from_b, threads, ops);
		return once(&s, &sch) ? 0 : 1;
	}
	good = sequences(n_sequences, seed) && sequences_with_failures(n_failures, seed);
	if (n_failures)
		printf("explore: %lu failures\n", failures);
	if (pairs)
		for (unsigned a = from_a; good && a <= to_a; a++)
			for (unsigned b = from_b; good && b <= to_b; b++)
				good = pair((enum kind)a, (enum kind)b, each,
					    seed + 1000 * (a * NR_KINDS + b));
	for (unsigned i = 0; good && i < n_exhaustive; i++) {
		rnd_state = seed + i;
		good = exhaust(from_a == to_a ? from_a : (enum kind)rnd(NR_KINDS),
			       from_b == to_b ? from_b : (enum kind)rnd(NR_KINDS), seed + i);
	}
	printf("explore: %lu runs%s\n", runs, good ? ", all explained" : "");
	return good ? 0 : 1;
}
