/* SPDX-License-Identifier: MIT */
/*
 * Gfn-to-pfn caches: what an 8-byte store through one costs, beside a bare store and beside the
 * same cache behind a pthread rwlock, which is how KVM does it; how readers scale and whether
 * unrelated unmaps disturb them; what refreshes and invalidations cost.
 *
 *     gpc-bench [MILLISECONDS]     per figure; default 200
 */
#include <err.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <kvmlet/kvmlet.h>

#define PAGE   4096ul
#define PAGES  16384ul
#define ROUNDS 5

static struct kvmlet_vm *vm;
static uint8_t *ram, *elsewhere;
static unsigned ms = 200;

static double clock_ns(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static double now(void)
{
	return clock_ns(CLOCK_MONOTONIC);
}

static void check(int r, const char *what)
{
	if (r)
		errx(1, "%s: %s", what, strerror(-r));
}

static struct kvmlet_gpc *cache_at(uint64_t gpa)
{
	struct kvmlet_gpc *gpc;

	check(kvmlet_gpc_init(vm, 0, &gpc), "init");
	check(kvmlet_gpc_activate(gpc, gpa, 8), "activate");
	return gpc;
}

/* ---- stores ------------------------------------------------------------------------------- */

/* The baseline: valid, generation and pointer behind a rwlock. */
struct rw_cache {
	pthread_rwlock_t lock;
	bool valid;
	uint64_t generation;
	uint64_t khva;
};

struct worker {
	pthread_t thread;
	struct kvmlet_gpc *gpc;
	struct rw_cache *rw;
	uint64_t *bare;
	size_t offset; /* of its line in the area: not the first, which lock reads (N7) */
	uint64_t n;
	double ns;  /* of the fastest batch */
	double cpu; /* nanoseconds that it ran */
};

#define AREA 192

static _Atomic bool stop;
static _Atomic unsigned ready;

#define BATCH 2048

/*
 * In batches, of which the fastest is kept: on a machine that others use, that is one in which
 * nobody else ran.
 */
#define WORKER(name, store)                                                  \
	static void *name(void *arg)                                         \
	{                                                                    \
		struct worker *w = arg;                                      \
		double fastest = 1e18, begun, cpu;                           \
		uint64_t n = 0;                                              \
                                                                             \
		atomic_fetch_add(&ready, 1);                                 \
		cpu = clock_ns(CLOCK_THREAD_CPUTIME_ID);                     \
		while (!atomic_load_explicit(&stop, memory_order_relaxed)) { \
			begun = now();                                       \
			for (unsigned i = 0; i < BATCH; i++) {               \
				store;                                       \
				n++;                                         \
			}                                                    \
			begun = now() - begun;                               \
			fastest = begun < fastest ? begun : fastest;         \
		}                                                            \
		w->n = n;                                                    \
		w->cpu = clock_ns(CLOCK_THREAD_CPUTIME_ID) - cpu;            \
		w->ns = fastest / BATCH;                                     \
		return NULL;                                                 \
	}

WORKER(store_bare, *(volatile uint64_t *)w->bare = n)

static __attribute__((noinline)) void *rw_lock(struct rw_cache *c, size_t len)
{
	pthread_rwlock_rdlock(&c->lock);
	if (!c->valid || c->generation != kvmlet_memslot_generation(vm) ||
	    (c->khva & (PAGE - 1)) + len > PAGE)
		abort();
	return (void *)c->khva;
}

WORKER(store_rw, {
	uint8_t *p = rw_lock(w->rw, AREA);

	*(volatile uint64_t *)(p + w->offset) = n;
	pthread_rwlock_unlock(&w->rw->lock);
})

WORKER(store_gpc, {
	void *p;

	if (kvmlet_gpc_lock(w->gpc, AREA, &p))
		abort();
	*(volatile uint64_t *)((uint8_t *)p + w->offset) = n;
	kvmlet_gpc_unlock(w->gpc, 1);
})

/* Stores per second of time that they ran, of @threads threads together. */
static double rate(void *(*fn)(void *), struct worker *w, unsigned threads)
{
	double sum = 0;

	atomic_store(&stop, false);
	atomic_store(&ready, 0);
	for (unsigned i = 0; i < threads; i++) {
		cpu_set_t cpus;

		/* Each on a processor of its own: they have to run at the same time. */
		CPU_ZERO(&cpus);
		CPU_SET(i, &cpus);
		pthread_create(&w[i].thread, NULL, fn, &w[i]);
		(void)pthread_setaffinity_np(w[i].thread, sizeof(cpus), &cpus);
	}
	while (atomic_load(&ready) < threads)
		;
	usleep(ms * 1000);
	atomic_store(&stop, true);
	for (unsigned i = 0; i < threads; i++) {
		pthread_join(w[i].thread, NULL);
		sum += (double)w[i].n * 1e9 / w[i].cpu;
	}
	return sum;
}

/*
 * What others on this machine take away is not ours: of one thread, the best of some rounds. Of two
 * the worst: in the best they may not have met.
 */
static double over_rounds(void *(*fn)(void *), struct worker *w, unsigned threads)
{
	double min = 1e18, max = 0;

	for (unsigned i = 0; i < ROUNDS; i++) {
		double r = rate(fn, w, threads);

		min = r < min ? r : min;
		max = r > max ? r : max;
	}
	return threads > 1 ? min : max;
}

/* Nanoseconds each of one thread alone. */
static double alone(void *(*fn)(void *), struct worker *w)
{
	double min = 1e18;

	for (unsigned i = 0; i < ROUNDS; i++) {
		(void)rate(fn, w, 1);
		min = w->ns < min ? w->ns : min;
	}
	return min;
}

static void row(const char *name, void *(*fn)(void *), struct worker *same, struct worker *own,
		double bare_ns)
{
	double ns = alone(fn, own), one = over_rounds(fn, own, 1);

	printf("  %-28s %8.2f ns  %+8.2f  %8.2fx  %8.2fx\n", name, ns, ns - bare_ns,
	       over_rounds(fn, same, 2) / one, over_rounds(fn, own, 2) / one);
}

static _Atomic bool quiet;

/* 1,000 a second of memory that no slot and no cache has. */
static void *unmapper(void *arg)
{
	(void)arg;
	while (!atomic_load(&quiet)) {
		struct kvmlet_notifier_range r = {.start = (uint64_t)elsewhere,
						  .end = (uint64_t)elsewhere + PAGE,
						  .may_block = 1};
		struct timespec t = {.tv_nsec = 1000000};

		check(kvmlet_notifier_begin(&r), "begin");
		madvise(elsewhere, PAGE, MADV_DONTNEED);
		kvmlet_notifier_end(&r);
		nanosleep(&t, NULL);
	}
	return NULL;
}

static void stores(void)
{
	static struct rw_cache rw[2];
	struct worker same[2], own[2];
	double bare, calm = 0, busy = 0;
	pthread_t t;

	for (unsigned i = 0; i < 2; i++) {
		pthread_rwlock_init(&rw[i].lock, NULL);
		rw[i] = (struct rw_cache){.lock = rw[i].lock,
					  .valid = true,
					  .generation = kvmlet_memslot_generation(vm),
					  .khva = (uint64_t)ram + i * PAGE};
		own[i] = (struct worker){.gpc = cache_at(i * PAGE),
					 .rw = &rw[i],
					 .bare = (uint64_t *)(ram + i * PAGE)};
	}
	same[0] = same[1] = own[0];
	same[0].offset = 64;
	same[1].offset = 128;
	bare = alone(store_bare, own);
	printf("%-30s %11s  %8s  %9s  %9s\n", "8-byte store, 1 thread", "", "over bare", "2, one",
	       "2, apart");
	printf("  %-28s %8.2f ns\n", "bare", bare);
	row("rwlock", store_rw, same, own, bare);
	row("gpc", store_gpc, same, own, bare);
	/* Alternately, so that both see the same machine. */
	for (unsigned i = 0; i < 2 * ROUNDS; i++) {
		double r = rate(store_gpc, own, 1);

		calm = r > calm ? r : calm;
		atomic_store(&quiet, false);
		pthread_create(&t, NULL, unmapper, NULL);
		r = rate(store_gpc, own, 1);
		busy = r > busy ? r : busy;
		atomic_store(&quiet, true);
		pthread_join(t, NULL);
	}
	printf("  1,000 unrelated unmaps/s: %+.2f %%\n", (busy / calm - 1) * 100);
	for (unsigned i = 0; i < 2; i++)
		kvmlet_gpc_destroy(own[i].gpc);
}

/* ---- refreshes and invalidations ------------------------------------------------------------ */

static double bracket_ns(uint64_t start, uint64_t len, unsigned n)
{
	double best_ns = 1e18;

	for (unsigned round = 0; round < ROUNDS; round++) {
		double begun = now(), ns;

		for (unsigned i = 0; i < n; i++) {
			struct kvmlet_notifier_range r = {
				.start = start, .end = start + len, .may_block = 1};

			check(kvmlet_notifier_begin(&r), "begin");
			kvmlet_notifier_end(&r);
		}
		ns = (now() - begun) / n;
		best_ns = ns < best_ns ? ns : best_ns;
	}
	return best_ns;
}

/* Brackets over @pages pages and refreshes of all caches in turn. */
static void hit(struct kvmlet_gpc **gpc, unsigned n, uint8_t *base, const char *what)
{
	unsigned rounds = n > 1000 ? 5 : 2000;
	double inval = 0, refresh = 0;

	for (unsigned i = 0; i < rounds; i++) {
		struct kvmlet_notifier_range r = {
			.start = (uint64_t)base, .end = (uint64_t)base + n * PAGE, .may_block = 1};
		double a = now(), b;

		check(kvmlet_notifier_begin(&r), "begin");
		b = now();
		kvmlet_notifier_end(&r);
		inval += b - a;
		a = now();
		for (unsigned k = 0; k < n; k++)
			check(kvmlet_gpc_refresh(gpc[k], 8), "refresh");
		refresh += now() - a;
	}
	printf("  %5u caches %-18s begin %10.0f ns, refresh %7.0f ns each\n", n, what,
	       inval / rounds, refresh / rounds / n);
}

static void invalidations(void)
{
	static struct kvmlet_gpc *gpc[10000];
	unsigned have = 0, sizes[] = {1, 100, 10000};
	uint8_t *memory = mmap(NULL, 20000 * PAGE, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct worker w = {.n = 0};

	if (memory == MAP_FAILED)
		err(1, "mmap");
	printf("brackets over memory without a slot\n");
	printf("  %5u caches %-18s %10.0f ns a pair\n", 0, "in the VM",
	       bracket_ns((uint64_t)memory, PAGE, 20000));
	/* Every other page, so that a miss lies between two hits. */
	for (unsigned s = 0; s < 3; s++) {
		for (; have < sizes[s]; have++) {
			check(kvmlet_gpc_init(vm, 0, &gpc[have]), "init");
			check(kvmlet_gpc_activate_hva(gpc[have], kl_hva(memory + 2 * have * PAGE),
						      8),
			      "activate");
		}
		printf("  %5u caches %-18s %10.0f ns a pair\n", have, "missed",
		       bracket_ns((uint64_t)memory + (have | 1) * PAGE, PAGE, 20000));
	}
	for (unsigned i = 0; i < have; i++)
		check(kvmlet_gpc_activate_hva(gpc[i], kl_hva(memory + i * PAGE), 8), "move");
	for (unsigned s = 0; s < 3; s++)
		hit(gpc, sizes[s], memory, "hit");
	/* Its own cache is in the range, too: the bracket waits for it. */
	w.gpc = gpc[0];
	atomic_store(&stop, false);
	atomic_store(&ready, 0);
	pthread_create(&w.thread, NULL, store_gpc, &w);
	while (!atomic_load(&ready))
		;
	hit(gpc, 1, memory, "hit, busy reader");
	atomic_store(&stop, true);
	pthread_join(w.thread, NULL);
	for (unsigned i = 0; i < have; i++)
		kvmlet_gpc_destroy(gpc[i]);
}

int main(int argc, char **argv)
{
	if (argc > 1)
		ms = (unsigned)atoi(argv[1]);
	ram = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	elsewhere = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (ram == MAP_FAILED || elsewhere == MAP_FAILED)
		err(1, "mmap");
	check(kvmlet_vm_create(&vm), "create");
	check(kvmlet_memslot_set(vm, 0, 0, 0, PAGES * PAGE, kl_hva(ram)), "slot");
	stores();
	invalidations();
	kvmlet_vm_destroy(vm);
	return 0;
}
