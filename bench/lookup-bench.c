/* SPDX-License-Identifier: MIT */
/*
 * What finding the slot of an address costs: through the library's kvmlet_memslot_find() and
 * inside the engine (kl_memslot_find() in an open reader section). And what a notifier bracket
 * over memory of no slot costs, which is what kvmlet adds to such a munmap.
 *
 *   lookup-bench SLOTS THREADS    prints "what/random|repeated/SLOTS/THREADS value ns"
 */
#include <err.h>
#include <kvmlet/kvmlet.h>
#include <pthread.h>
#include <stdlib.h>
#include <stdio.h>
#include <time.h>

#include "mem/vm.h"

#define ADDRESSES 4096 /* in an array that stays in the cache */
#define LOOKUPS   (1u << 21)
#define SAMPLES   7
#define STRIDE    (128ull << 10) /* from slot to slot, of 64 KiB each */

static struct kvmlet_vm *vm;
static struct kl_vm engine;
static unsigned slots;
static pthread_barrier_t barrier;

struct job {
	pthread_t thread;
	bool public_api, repeated;
	uint64_t seed, sum;
	double ns[SAMPLES];
};

/* CPU time: what else runs here does not count. */
static uint64_t now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
	return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

static uint64_t find_public(const uint64_t *gpa)
{
	uint64_t sum = 0;
	kl_hva_t hva;

	for (unsigned i = 0; i < LOOKUPS; i++)
		if (!kvmlet_memslot_find(vm, gpa[i % ADDRESSES], &hva))
			sum += hva.addr;
	return sum;
}

static uint64_t find_internal(const uint64_t *gpa)
{
	int token = kl_srcu_read_lock(&engine.srcu);
	const struct kl_memslots *set = kl_memslots(&engine, 0);
	uint64_t sum = 0;

	for (unsigned i = 0; i < LOOKUPS; i++) {
		kl_gfn_t gfn = gpa[i % ADDRESSES] >> KL_PAGE_SHIFT;
		const struct kl_memslot *s = kl_memslot_find(set, gfn);

		if (s)
			sum += kl_memslot_hva(s, gfn).addr;
	}
	kl_srcu_read_unlock(&engine.srcu, token);
	return sum;
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static void measure_bracket(void)
{
	double v[SAMPLES];
	uint64_t t;

	for (int s = -1; s < SAMPLES; s++) {
		t = now();
		for (uint64_t i = 0; i < LOOKUPS; i++) {
			struct kvmlet_notifier_range r = {
				.start = 0x7f0000000000 + i % 512 * KL_PAGE_SIZE,
				.end = 0x7f0000000000 + i % 512 * KL_PAGE_SIZE + KL_PAGE_SIZE,
				.may_block = 1,
			};

			if (kvmlet_notifier_begin(&r))
				errx(1, "kvmlet_notifier_begin");
			kvmlet_notifier_end(&r);
		}
		if (s >= 0)
			v[s] = (double)(now() - t) / LOOKUPS;
	}
	qsort(v, SAMPLES, sizeof(*v), by_value);
	printf("bracket/unrelated/%u/1 %.2f ns\n", slots, v[SAMPLES / 2]);
}

static void *work(void *arg)
{
	struct job *j = arg;
	uint64_t *gpa = malloc(ADDRESSES * sizeof(*gpa)), x = j->seed, t;

	if (!gpa)
		err(1, "malloc");
	for (unsigned i = 0; i < ADDRESSES; i++) {
		x = x * 6364136223846793005 + 1442695040888963407;
		gpa[i] =
			(j->repeated ? slots / 2 : (x >> 33) % slots) * STRIDE + (x >> 20 & 0xfff8);
	}
	for (int s = -1; s < SAMPLES; s++) {
		pthread_barrier_wait(&barrier);
		t = now();
		j->sum += j->public_api ? find_public(gpa) : find_internal(gpa);
		if (s >= 0)
			j->ns[s] = (double)(now() - t) / LOOKUPS;
	}
	free(gpa);
	return NULL;
}

static void measure(bool public_api, bool repeated, unsigned threads)
{
	struct job *jobs = calloc(threads, sizeof(*jobs));
	double *all = calloc(threads * SAMPLES, sizeof(*all));
	uint64_t sum = 0;

	if (!jobs || !all)
		err(1, "calloc");
	pthread_barrier_init(&barrier, NULL, threads);
	for (unsigned i = 0; i < threads; i++) {
		jobs[i] =
			(struct job){.public_api = public_api, .repeated = repeated, .seed = i + 1};
		if (pthread_create(&jobs[i].thread, NULL, work, &jobs[i]))
			errx(1, "pthread_create");
	}
	for (unsigned i = 0; i < threads; i++) {
		pthread_join(jobs[i].thread, NULL);
		sum += jobs[i].sum;
		for (int s = 0; s < SAMPLES; s++)
			all[i * SAMPLES + (unsigned)s] = jobs[i].ns[s];
	}
	if (!sum)
		errx(1, "nothing found");
	qsort(all, threads * SAMPLES, sizeof(*all), by_value);
	printf("%s/%s/%u/%u %.2f ns\n", public_api ? "library" : "engine",
	       repeated ? "repeated" : "random", slots, threads, all[threads * SAMPLES / 2]);
	pthread_barrier_destroy(&barrier);
	free(all);
	free(jobs);
}

int main(int argc, char **argv)
{
	unsigned threads;

	if (argc != 3)
		errx(2, "usage: lookup-bench SLOTS THREADS");
	slots = (unsigned)strtoul(argv[1], NULL, 0);
	threads = (unsigned)strtoul(argv[2], NULL, 0);
	if (!slots || slots > KL_USER_MEM_SLOTS || !threads || threads > 64)
		errx(2, "out of range");
	if (kvmlet_vm_create(&vm) || kl_vm_init(&engine))
		errx(1, "no VM");
	for (unsigned i = 0; i < slots; i++) {
		struct kl_uapi_memory_region2 r = {
			.slot = i,
			.guest_phys_addr = i * STRIDE,
			.memory_size = STRIDE / 2,
			.userspace_addr = 0x100000000000 + i * STRIDE, /* never touched */
		};

		if (kvmlet_memslot_set(vm, i, 0, i * STRIDE, STRIDE / 2,
				       (kl_hva_t){r.userspace_addr}) ||
		    kl_set_memory_region(&engine, &r))
			errx(1, "slot %u", i);
	}
	for (int public_api = 0; public_api < 2; public_api++)
		for (int repeated = 0; repeated < 2; repeated++)
			measure(public_api, repeated, threads);
	kl_vm_destroy(&engine); /* brackets look at each VM */
	if (threads == 1)
		measure_bracket();
	kvmlet_vm_destroy(vm);
	return 0;
}
