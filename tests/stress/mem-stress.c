/* SPDX-License-Identifier: MIT */
/*
 * Stress: VMs whose vCPUs touch memory, while other threads change slots and everything about
 * the memory behind them. A shadow model (model.c) checks every value that a guest reads, every
 * EFAULT and every exit to a device.
 *
 *     kvmlet run -- mem-stress --seed 1 --seconds 1800
 *
 * A round is a fixed amount of work from one seed; the next round's seed is the next number. A
 * watchdog takes a thread that makes no progress for minutes for a deadlock.
 */
#include <dlfcn.h>
#include <fcntl.h>
#include <getopt.h>
#include <time.h>

#include "stress.h"

struct options opt = {
	.seed = 1, .rounds = 1, .vms = 4, .vcpus = 4, .mutators = 4, .ops = 400, .limit = 180};
struct counters counters;
struct place places[NPLACES];
struct file files[NFILES];
struct vm vms[MAX_VMS];
int kvm_fd;
_Atomic bool stop;
_Atomic uint64_t *the_clock;

/*
 * ThreadSanitizer takes what mmap() returns for written, after the call: by then guests may use
 * what lies at a fixed address already.
 */
__attribute__((visibility("default"))) const char *__tsan_default_suppressions(void);
const char *__tsan_default_suppressions(void)
{
	return "race_top:mmap\n";
}

/* ---- watchdog ------------------------------------------------------------------------- */

#define MAX_THREADS 128

static struct progress {
	_Atomic bool used;
	_Atomic(const char *) what;
	_Atomic unsigned long count;
	pid_t tid;
} progress[MAX_THREADS];
static __thread struct progress *me;

void at(const char *what)
{
	if (!me) {
		for (unsigned i = 0; i < MAX_THREADS && !me; i++) {
			bool no = false;

			if (atomic_compare_exchange_strong(&progress[i].used, &no, true))
				me = &progress[i];
		}
		NEED(me);
		me->tid = gettid();
	}
	me->what = what;
	me->count++;
}

static void not_here(void)
{
	if (me)
		me->used = false;
	me = NULL;
}

static void *watchdog(void *arg)
{
	unsigned long seen[MAX_THREADS] = {0};
	unsigned still[MAX_THREADS] = {0};

	for (;;) {
		sleep(1);
		for (unsigned i = 0; i < MAX_THREADS; i++) {
			struct progress *p = &progress[i];

			if (!p->used || p->count != seen[i]) {
				seen[i] = p->count;
				still[i] = 0;
			} else if (++still[i] >= opt.limit) {
				for (unsigned k = 0; k < MAX_THREADS; k++)
					if (progress[k].used)
						fprintf(stderr, "thread %d: %s, still for %u s\n",
							progress[k].tid, progress[k].what,
							still[k]);
				/* For a debugger */
				if (getenv("STRESS_STOP"))
					raise(SIGSTOP);
				fail("no progress");
			}
		}
	}
	return NULL;
}

/* ---- mutators ------------------------------------------------------------------------- */

bool wanted(const char *name)
{
	size_t n = strlen(name);

	for (const char *p = opt.only; p; p = strchr(p, ',')) {
		p += *p == ',';
		if (!strncmp(p, name, n) && (!p[n] || p[n] == ','))
			return true;
	}
	return !opt.only;
}

static void disturb(uint64_t *rng)
{
	struct vm *vm = &vms[below(rng, opt.vms)];
	struct vcpu *v = &vm->vcpus[below(rng, vm->nvcpus)];
	struct kvm_regs regs;

	if (below(rng, 4)) {
		if (!wanted("signals"))
			return;
		at("signal");
		NEED(!pthread_kill(v->thread, v->masked || below(rng, 2) ? SIGUSR1 : SIGUSR2));
	} else if (wanted("ioctls")) {
		at("KVM_GET_REGS");
		NEED(!ioctl(v->fd, KVM_GET_REGS, &regs) || errno == EINTR);
	}
}

struct mutator {
	pthread_t thread;
	uint64_t rng;
};

static void *mutator_thread(void *arg)
{
	struct mutator *m = arg;

	for (unsigned n = 0; n < opt.ops; n++) {
		unsigned pick = below(&m->rng, 20);

		at("between");
		if (pick < 10)
			place_op(&m->rng);
		else if (pick < 19)
			slot_op(&m->rng);
		else
			disturb(&m->rng);
	}
	not_here();
	return NULL;
}

static _Atomic unsigned long handled;

static void handler(int sig)
{
	handled++;
}

/* ---- rounds --------------------------------------------------------------------------- */

static void *vcpu_main(void *arg)
{
	vcpu_thread(arg);
	not_here();
	return NULL;
}

static void run_round(void)
{
	uint64_t rng = opt.seed * 0x9e3779b97f4a7c15ull | 1;
	struct mutator m[16] = {0};

	at("setup");
	stop = false;
	files_init();
	places_init(rng);
	for (unsigned i = 0; i < opt.vms; i++) {
		vm_create(&vms[i], i, rng);
		slots_init(&vms[i], &rng);
	}
	for (unsigned i = 0; i < opt.vms; i++)
		for (unsigned k = 0; k < vms[i].nvcpus; k++) {
			struct vcpu *v = &vms[i].vcpus[k];

			NEED(!pthread_create(&v->thread, NULL, vcpu_main, v));
		}
	for (unsigned i = 0; i < opt.mutators; i++) {
		m[i].rng = 1 | (rng + (i + 1) * 0xd1342543de82ef95ull);
		NEED(!pthread_create(&m[i].thread, NULL, mutator_thread, &m[i]));
	}
	for (unsigned n = 0; n < opt.ops / 4; n++)
		heap_op(&rng);
	at("join");
	for (unsigned i = 0; i < opt.mutators; i++) {
		pthread_join(m[i].thread, NULL);
		at("join");
	}
	stop = true;
	for (unsigned i = 0; i < opt.vms; i++)
		for (unsigned k = 0; k < vms[i].nvcpus; k++) {
			pthread_join(vms[i].vcpus[k].thread, NULL);
			at("join");
		}
	check_xadds();
	/* Memory first, or VMs first: neither minds. */
	if (opt.seed & 1)
		places_free();
	for (unsigned i = 0; i < opt.vms; i++)
		vm_destroy(&vms[i]);
	if (!(opt.seed & 1))
		places_free();
	heap_free();
}

static void report(unsigned rounds)
{
	fprintf(stderr,
		"%u rounds; guest accesses %llu (too long ago to judge: %llu), EFAULT %llu, "
		"devices %llu, "
		"EINTR %llu; changes of slots %llu, of memory %llu; quarantines %llu; handlers "
		"%lu\n",
		rounds, (unsigned long long)counters.reads, (unsigned long long)counters.unknown,
		(unsigned long long)counters.efaults, (unsigned long long)counters.mmios,
		(unsigned long long)counters.eintrs, (unsigned long long)counters.slot_ops,
		(unsigned long long)counters.place_ops, (unsigned long long)counters.quarantines,
		handled);
}

static void usage(void)
{
	fprintf(stderr,
		"usage: mem-stress [--seed N] [--rounds N | --seconds N] [--vms N] [--vcpus N]\n"
		"                  [--mutators N] [--ops N] [--only NAME,...] [--limit SECONDS] "
		"[--verbose]\n");
	exit(2);
}

static void parse(int argc, char **argv)
{
	static const struct option longs[] = {
		{"seed", 1, NULL, 's'},
		{"rounds", 1, NULL, 'r'},
		{"seconds", 1, NULL, 't'},
		{"vms", 1, NULL, 'n'},
		{"vcpus", 1, NULL, 'c'},
		{"mutators", 1, NULL, 'm'},
		{"ops", 1, NULL, 'o'},
		{"only", 1, NULL, 'y'},
		{"limit", 1, NULL, 'l'},
		{"verbose", 0, NULL, 'v'},
		{0},
	};
	int c;

	while ((c = getopt_long(argc, argv, "", longs, NULL)) != -1) {
		unsigned long n = optarg ? strtoul(optarg, NULL, 0) : 0;

		switch (c) {
		case 's':
			opt.seed = n;
			break;
		case 'r':
			opt.rounds = (unsigned)n;
			break;
		case 't':
			opt.seconds = (unsigned)n;
			break;
		case 'n':
			opt.vms = (unsigned)n;
			break;
		case 'c':
			opt.vcpus = (unsigned)n;
			break;
		case 'm':
			opt.mutators = (unsigned)n;
			break;
		case 'o':
			opt.ops = (unsigned)n;
			break;
		case 'l':
			opt.limit = (unsigned)n;
			break;
		case 'y':
			opt.only = optarg;
			break;
		case 'v':
			opt.verbose = true;
			break;
		default:
			usage();
		}
	}
	if (!opt.vms || opt.vms > MAX_VMS || !opt.vcpus || opt.vcpus > MAX_VCPUS ||
	    opt.mutators > 16)
		usage();
}

int main(int argc, char **argv)
{
	struct sigaction sa = {.sa_handler = handler};
	time_t start = time(NULL);
	unsigned rounds = 0;
	pthread_t dog;

	parse(argc, argv);
	opt.asan = dlsym(RTLD_DEFAULT, "__asan_init");
	opt.tsan = dlsym(RTLD_DEFAULT, "__tsan_init");
	opt.real = !getenv("LD_PRELOAD");
	sigaction(SIGUSR1, &sa, NULL);
	sa.sa_flags = SA_RESTART;
	sigaction(SIGUSR2, &sa, NULL);
	the_clock = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	NEED(the_clock != MAP_FAILED);
	*the_clock = 1;
	kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm_fd < 0) {
		fprintf(stderr, "/dev/kvm: %m\n");
		return 77;
	}
	NEED(!pthread_create(&dog, NULL, watchdog, NULL));
	do {
		run_round();
		rounds++;
		if (opt.verbose)
			fprintf(stderr, "seed %llu done\n", (unsigned long long)opt.seed);
		opt.seed++;
	} while (opt.seconds ? time(NULL) - start < (time_t)opt.seconds : rounds < opt.rounds);
	report(rounds);
	return 0;
}
