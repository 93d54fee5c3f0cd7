/* SPDX-License-Identifier: MIT */
/*
 * Caches under all that may happen to them (G1-G17): threads lock, store and unlock; others
 * refresh, move and deactivate the caches, flip between 32 and 64 bit, change slots, and take
 * memory away. (TSan-clean.)
 *
 * Of the 64 caches a part is used in pairs, for areas as Xen's guests have them (X4): in 32-bit
 * mode an area ends with its page, and in 64-bit mode it needs the second cache for the next.
 *
 * The checker: memory is inaccessible from the moment that its bracket is open, so a store through
 * a pointer that should not be used any more is a SIGSEGV. And every store is of a value that says
 * where it belongs: the pages of slots and of fixed addresses are in different mappings, so one
 * that lands in the other kind is found at the end.
 *
 *     gpc-stress [--seed N] [--threads N] [--ops N | --seconds N]
 */
#include <err.h>
#include <errno.h>
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
#define CACHES 48u /* used alone */
#define AREAS  8u  /* of two caches each */
#define PAGES  32u /* of each kind of memory */
#define SLOT   8u  /* pages of a slot; there are PAGES / SLOT */

#define NARROW 40u /* bytes of an area in 32-bit mode, */
#define WIDE   48u /* and in 64-bit mode */

#define IN_SLOT 0x5107u
#define FIXED   0xf17edu

static struct kvmlet_vm *vm;
static struct kvmlet_gpc *caches[CACHES]; /* the first half follows slots, the rest is fixed */
static struct area {
	struct kvmlet_gpc *part[2];
	uint64_t gpa;
	_Atomic bool wide;
} areas[AREAS];
static uint8_t *ram, *fixed;
static _Atomic bool stop;
static _Atomic unsigned long stores, crossing, refused, brackets, unmaps, changes, moves, flips,
	busy;
static unsigned long ops = 20000;
static unsigned seconds;

static unsigned next(unsigned *seed, unsigned below)
{
	return (unsigned)rand_r(seed) % below;
}

static void check(int r, const char *what)
{
	if (r)
		errx(1, "%s: %s", what, strerror(-r));
}

static bool of_slot(const struct kvmlet_gpc *c)
{
	for (unsigned i = 0; i < CACHES / 2; i++)
		if (caches[i] == c)
			return true;
	return false;
}

/* What lock may say while everything changes. */
static void expect(int r)
{
	if (r && r != -EFAULT && r != -EINVAL && r != -EAGAIN)
		errx(1, "lock: %s", strerror(-r));
	if (r)
		atomic_fetch_add(&refused, 1);
}

static void store(struct kvmlet_gpc *c, void *p)
{
	/* The low half; who is where is found out later. */
	__atomic_store_n((uint64_t *)p, of_slot(c) ? IN_SLOT : FIXED, __ATOMIC_RELAXED);
	atomic_fetch_add_explicit(&stores, 1, memory_order_relaxed);
}

/* As who writes a runstate: it goes by the mode that it believes in, and tries again if it is
 * moved. */
static void use_area(struct area *a)
{
	size_t len = atomic_load(&a->wide) ? WIDE : NARROW;
	struct iovec iov[2];
	unsigned n;
	int r = kvmlet_gpc_lock_area(a->part, 2, a->gpa, len, iov, &n);

	if (r == -ESTALE)
		return;
	expect(r);
	if (r)
		return;
	for (unsigned i = 0; i < n; i++)
		for (size_t at = 0; at < iov[i].iov_len; at += 8)
			__atomic_store_n((uint64_t *)((uint8_t *)iov[i].iov_base + at), IN_SLOT,
					 __ATOMIC_RELAXED);
	kvmlet_gpc_unlock_many(a->part, n, 1);
	atomic_fetch_add_explicit(n > 1 ? &crossing : &stores, 1, memory_order_relaxed);
}

/* On a busy machine some threads may not have had a turn when others are done. */
static bool all_happened(void)
{
	return atomic_load(&stores) && atomic_load(&crossing) && atomic_load(&brackets) &&
	       atomic_load(&unmaps) && atomic_load(&changes) && atomic_load(&moves) &&
	       atomic_load(&flips);
}

static void *user(void *arg)
{
	unsigned seed = (unsigned)(uintptr_t)arg;

	for (unsigned long n = 0; seconds ? !atomic_load(&stop) : n < ops || !all_happened(); n++) {
		struct kvmlet_gpc *c[2] = {caches[next(&seed, CACHES)],
					   caches[next(&seed, CACHES)]};
		size_t lens[2] = {8, 8};
		void *p[2];
		int r;

		switch (next(&seed, 8)) {
		case 2:
			use_area(&areas[next(&seed, AREAS)]);
			continue;
		case 0:
			r = kvmlet_gpc_trylock(c[0], 8, &p[0]);
			break;
		case 1:
			if (c[0] == c[1])
				continue;
			r = kvmlet_gpc_lock_many(c, lens, p, 2);
			expect(r);
			if (!r) {
				store(c[0], p[0]);
				store(c[1], p[1]);
				kvmlet_gpc_unlock_many(c, 2, 1);
			}
			continue;
		default:
			r = kvmlet_gpc_lock(c[0], 8, &p[0]);
			break;
		}
		expect(r);
		if (!r) {
			store(c[0], p[0]);
			kvmlet_gpc_unlock(c[0], 1);
		}
	}
	return NULL;
}

/* Refreshes, moves, deactivates. */
static void *mover(void *arg)
{
	unsigned seed = (unsigned)(uintptr_t)arg;

	while (!atomic_load(&stop)) {
		unsigned i = next(&seed, CACHES);
		uint64_t at = next(&seed, PAGES) * PAGE + next(&seed, 500) * 8;

		switch (next(&seed, 4)) {
		case 0:
			expect(kvmlet_gpc_refresh(caches[i], 8));
			break;
		case 1:
			check(kvmlet_gpc_deactivate(caches[i]), "deactivate");
			break;
		default:
			check(i < CACHES / 2
				      ? kvmlet_gpc_activate(caches[i], at, 8)
				      : kvmlet_gpc_activate_hva(caches[i], kl_hva(fixed + at), 8),
			      "activate");
			atomic_fetch_add(&moves, 1);
		}
	}
	return NULL;
}

/* The other mode, or at another place, or away for a moment. One thread: an area has one owner. */
static void *flipper(void *arg)
{
	unsigned seed = (unsigned)(uintptr_t)arg;

	while (!atomic_load(&stop)) {
		struct area *a = &areas[next(&seed, AREAS)];
		bool wide = !atomic_load(&a->wide);

		if (!next(&seed, 8))
			check(kvmlet_gpc_deactivate(a->part[next(&seed, 2)]), "deactivate");
		check(kvmlet_gpc_activate_area(a->part, 2, a->gpa, wide ? WIDE : NARROW), "flip");
		atomic_store(&a->wide, wide);
		atomic_fetch_add(&flips, 1);
	}
	return NULL;
}

/* Slot @i covers the i-th part of the RAM; sometimes it is away, sometimes read-only. */
static void set_slot(unsigned i, bool there, uint32_t flags)
{
	check(kvmlet_memslot_set(vm, i, flags, i * SLOT * PAGE, there ? SLOT * PAGE : 0,
				 kl_hva(ram + i * SLOT * PAGE)),
	      "memslot");
}

static void *slot_changer(void *arg)
{
	unsigned seed = (unsigned)(uintptr_t)arg;

	while (!atomic_load(&stop)) {
		unsigned i = next(&seed, PAGES / SLOT);

		set_slot(i, false, 0);
		set_slot(i, true, next(&seed, 4) ? 0 : KVMLET_MEM_READONLY);
		/* A read-only one does not become another by a change of flags. */
		atomic_fetch_add(&changes, 1);
		sched_yield();
	}
	return NULL;
}

static void take_away(unsigned *seed)
{
	uint8_t *base = next(seed, 2) ? ram : fixed;
	unsigned first = next(seed, PAGES), n = 1 + next(seed, PAGES - first);
	struct kvmlet_notifier_range r = {.may_block = next(seed, 4) != 0};
	uint8_t *p = base + first * PAGE;
	size_t len = n * PAGE;
	int ret;

	r.start = kl_hva(p).addr;
	r.end = r.start + len;
	ret = kvmlet_notifier_begin(&r);
	if (ret == -EAGAIN && !r.may_block) {
		atomic_fetch_add(&busy, 1);
		return;
	}
	check(ret, "begin");
	mprotect(p, len, PROT_NONE);
	if (next(seed, 2))
		sched_yield();
	switch (next(seed, 4)) {
	case 0:
		madvise(p, len, MADV_DONTNEED);
		break;
	case 1:
		if (mmap(p, len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != p)
			err(1, "mmap");
		break;
	case 2:
		if (munmap(p, len))
			err(1, "munmap");
		if (mmap(p, len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1,
			 0) != p)
			err(1, "mmap of the hole");
		atomic_fetch_add(&unmaps, 1);
		break;
	default:
		break;
	}
	mprotect(p, len, PROT_READ | PROT_WRITE);
	kvmlet_notifier_end(&r);
	atomic_fetch_add(&brackets, 1);
}

/* Several at a time over the same memory would undo each other's protection. */
static void *unmapper(void *arg)
{
	unsigned seed = (unsigned)(uintptr_t)arg;

	while (!atomic_load(&stop))
		take_away(&seed);
	return NULL;
}

/* Each kind of memory holds its own values only. */
static void check_memory(const uint8_t *p, uint64_t mine)
{
	for (uint64_t i = 0; i < PAGES * PAGE; i += 8) {
		uint64_t v = *(const uint64_t *)(p + i);

		if (v && v != mine)
			errx(1, "at %#lx: %#lx, which belongs elsewhere", i, v);
	}
}

/* Far below where the system puts mappings, so that nothing else gets a hole that munmap leaves. */
static uint8_t *new_memory(uintptr_t where)
{
	void *p = mmap((void *)where, PAGES * PAGE, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		err(1, "mmap");
	return p;
}

int main(int argc, char **argv)
{
	void *(*const others[])(void *) = {mover, mover, flipper, slot_changer, unmapper};
	pthread_t t[64], o[5];
	unsigned long seed = 1, threads = 4;

	for (int i = 1; i + 1 < argc; i += 2) {
		unsigned long v = strtoul(argv[i + 1], NULL, 0);

		if (!strcmp(argv[i], "--seed"))
			seed = v;
		else if (!strcmp(argv[i], "--threads"))
			threads = v;
		else if (!strcmp(argv[i], "--ops"))
			ops = v;
		else if (!strcmp(argv[i], "--seconds"))
			seconds = (unsigned)v;
		else
			errx(2,
			     "usage: gpc-stress [--seed N] [--threads N] [--ops N | --seconds N]");
	}
	if (!threads || threads > 64)
		errx(2, "1 to 64 threads");
	ram = new_memory(0x20000000);
	fixed = new_memory(0x28000000);
	check(kvmlet_vm_create(&vm), "create");
	for (unsigned i = 0; i < PAGES / SLOT; i++)
		set_slot(i, true, 0);
	for (unsigned i = 0; i < CACHES; i++)
		check(kvmlet_gpc_init(vm, 0, &caches[i]), "init");
	for (unsigned i = 0; i < AREAS; i++) {
		areas[i].gpa = (i * PAGES / AREAS + 1) * PAGE - NARROW;
		for (unsigned k = 0; k < 2; k++)
			check(kvmlet_gpc_init(vm, 0, &areas[i].part[k]), "init");
	}
	for (unsigned long i = 0; i < 5; i++)
		pthread_create(&o[i], NULL, others[i], (void *)(seed * 100 + i));
	for (unsigned long i = 0; i < threads; i++)
		pthread_create(&t[i], NULL, user, (void *)(seed * 100 + 50 + i));
	if (seconds) {
		sleep(seconds);
		atomic_store(&stop, true);
	}
	for (unsigned i = 0; i < threads; i++)
		pthread_join(t[i], NULL);
	atomic_store(&stop, true);
	for (unsigned i = 0; i < 5; i++)
		pthread_join(o[i], NULL);
	for (unsigned i = 0; i < CACHES; i++)
		kvmlet_gpc_destroy(caches[i]);
	for (unsigned i = 0; i < AREAS; i++)
		for (unsigned k = 0; k < 2; k++)
			kvmlet_gpc_destroy(areas[i].part[k]);
	check_memory(ram, IN_SLOT);
	check_memory(fixed, FIXED);
	kvmlet_vm_destroy(vm);
	printf("%lu stores, %lu across pages, %lu refused, %lu brackets (%lu unmaps), %lu busy, "
	       "%lu slot changes, %lu moves, %lu flips\n",
	       stores, crossing, refused, brackets, unmaps, busy, changes, moves, flips);
	if (!all_happened())
		errx(1, "something did not happen");
	return 0;
}
