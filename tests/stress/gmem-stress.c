/* SPDX-License-Identifier: MIT */
/*
 * Private memory under all that may happen to it (F1-F7): frames are converted, holes punched,
 * slots bound and deleted, shared memory discarded, files closed, and VMs destroyed, in every
 * order, while vCPUs and users of caches store to it and check what they see. (TSan-clean.)
 *
 * The checker. Every value that is stored says which kind of memory it was meant for, and the host
 * page: so nothing of one page may ever be seen in another, nor private content in shared memory,
 * where a thread looks for it all the time, nor in another VM that is not bound to it. While a vCPU
 * is in guest mode, or a cache is held,
 *   - the memory that it got is of the kind that the frame's attribute says, from lookup to the
 * end;
 *   - what it stored is there: no hole was punched, and nothing discarded, under its pointer.
 * At the end all memory of files is given back.
 *
 *     gmem-stress [--seed N] [--rounds N | --seconds N]
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
#include <unistd.h>

#include "base/pool.h"
#include "host/access.h"
#include "mem/gmem.h"
#include "mem/gpc.h"
#include "mem/notifier.h"
#include "mem/private.h"
#include "mem/vm.h"
#include "mmu/mmu.h"

#define VMS        2u
#define VCPUS      2u /* of each VM */
#define CACHES     4u /* of each VM */
#define INODES     3u
#define SLOTS      4u
#define SLOT_PAGES 16u
#define SLOT_STEP  64u /* frames from one slot to the next */
#define FILE_PAGES 48u
#define PAGE       KL_PAGE_SIZE

enum { SHARED = 0x51, PRIVATE = 0x9e }; /* highest byte of a value */

static struct guest {
	pthread_rwlock_t lock; /* for writing: the VM is another one then */
	struct kl_vm *vm;
	struct kl_vcpu_core vcpu[VCPUS];
	struct kl_gpc *cache[CACHES];
	uint8_t *ram; /* of all slots */
	pthread_mutex_t slots;
	bool there[SLOTS];
} guests[VMS];

static struct file {
	pthread_rwlock_t lock; /* for writing: it is closed, or another one */
	struct kl_gmem *f;
} files[VMS][INODES];
static pthread_mutex_t opening = PTHREAD_MUTEX_INITIALIZER;

static _Atomic bool stop;
static _Atomic unsigned long stores, private_stores, cached, memory_faults, conversions, holes,
	bindings, discards, closings, deaths, scans;

static unsigned next(unsigned *seed, unsigned below)
{
	return (unsigned)rand_r(seed) % below;
}

static void fail(const char *what, const uint8_t *p, uint64_t val)
{
	fprintf(stderr, "gmem-stress: %s: value %#lx at %p\n", what, (unsigned long)val,
		(const void *)p);
	abort();
}

static bool is_shared(const struct guest *g, const uint8_t *p)
{
	return p >= g->ram && p < g->ram + SLOTS * SLOT_PAGES * PAGE;
}

static uint64_t value(bool shared, const uint8_t *p, unsigned long n)
{
	return (uint64_t)(shared ? SHARED : PRIVATE) << 56 |
	       ((uint64_t)(uintptr_t)p >> 12 & 0xfffffffffull) << 20 | (n & 0xfffff);
}

static void check_word(bool shared, const uint8_t *p, uint64_t val)
{
	if (val && (val ^ value(shared, p, 0)) >> 20)
		fail(shared ? "foreign content in shared memory"
			    : "foreign content in private memory",
		     p, val);
}

static void check_kind(struct guest *g, kl_gfn_t gfn, bool shared, const uint8_t *p)
{
	int token = kl_srcu_read_lock(&g->vm->srcu);
	unsigned level;

	if (kl_attr_private(&g->vm->attrs, gfn, &level) == shared)
		fail("memory of the other kind", p, gfn);
	kl_srcu_read_unlock(&g->vm->srcu, token);
}

/* A store to word @who of the page at @p, looked at from beginning to end. */
static void use_page(struct guest *g, kl_gfn_t gfn, uint8_t *p, unsigned who, unsigned *seed)
{
	bool shared = is_shared(g, p);
	uint8_t *word = p + 8 * who;
	uint64_t val = value(shared, p, (unsigned long)rand_r(seed));

	check_kind(g, gfn, shared, p);
	for (unsigned i = 0; i < 16; i++)
		check_word(shared, p, kl_load(p + 8 * i, 8));
	kl_store(word, val, 8);
	for (unsigned i = next(seed, 200); i; i--)
		kl_cpu_relax();
	if (kl_load(word, 8) != val)
		fail("a store was lost", p, kl_load(word, 8));
	check_kind(g, gfn, shared, p);
	atomic_fetch_add_explicit(shared ? &stores : &private_stores, 1, memory_order_relaxed);
}

static kl_gfn_t any_frame(unsigned *seed)
{
	return next(seed, SLOTS) * SLOT_STEP + next(seed, SLOT_PAGES + 1);
}

static void vcpu_access(struct guest *g, struct kl_vcpu_core *c, unsigned who, unsigned *seed)
{
	kl_gfn_t gfn = any_frame(seed);
	bool writable, mmio;
	uint8_t *p;
	int r;

	kl_vcpu_enter_guest(c);
	kl_vcpu_take_requests(c, KL_REQ_TLB_FLUSH);
	p = kl_mmu_lookup(c, gfn << KL_PAGE_SHIFT, KL_ACC_WRITE, &writable, &mmio);
	if (p)
		use_page(g, gfn, p, who, seed);
	kl_vcpu_leave_guest(c);
	if (p || mmio)
		return;
	r = kl_mmu_fault(c, gfn << KL_PAGE_SHIFT, KL_ACC_WRITE);
	if (r == -EFAULT && c->memory_fault)
		atomic_fetch_add_explicit(&memory_faults, 1, memory_order_relaxed);
	else if (r != KL_FAULT_MAPPED && r != KL_FAULT_MMIO)
		fail("a fault failed", NULL, (uint64_t)-r);
}

struct actor {
	pthread_t thread;
	unsigned guest, index, seed;
};

static void *run_vcpu(void *arg)
{
	struct actor *a = arg;
	struct guest *g = &guests[a->guest];

	while (!atomic_load(&stop)) {
		pthread_rwlock_rdlock(&g->lock);
		for (unsigned i = 0; i < 200; i++)
			vcpu_access(g, &g->vcpu[a->index], a->guest * VCPUS + a->index, &a->seed);
		pthread_rwlock_unlock(&g->lock);
	}
	return NULL;
}

static void *run_cache_user(void *arg)
{
	struct actor *a = arg;
	struct guest *g = &guests[a->guest];

	while (!atomic_load(&stop)) {
		pthread_rwlock_rdlock(&g->lock);
		for (unsigned i = 0; i < 50; i++) {
			struct kl_gpc *c = g->cache[next(&a->seed, CACHES)];
			kl_gfn_t gfn = any_frame(&a->seed);
			void *p;
			int r;

			if (!next(&a->seed, 8) && kl_gpc_activate(c, gfn << KL_PAGE_SHIFT, 8))
				fail("activate", NULL, gfn);
			r = kl_gpc_lock(c, 8, &p);
			if (r && r != -EFAULT && r != -EINVAL)
				fail("lock", NULL, (uint64_t)-r);
			if (r)
				continue;
			use_page(g, c->addr >> KL_PAGE_SHIFT, p, 8 + a->guest, &a->seed);
			kl_gpc_unlock(c, true);
			atomic_fetch_add_explicit(&cached, 1, memory_order_relaxed);
		}
		pthread_rwlock_unlock(&g->lock);
	}
	return NULL;
}

static void *run_converter(void *arg)
{
	struct actor *a = arg;

	while (!atomic_load(&stop)) {
		struct guest *g = &guests[next(&a->seed, VMS)];
		kl_gfn_t first = any_frame(&a->seed);
		uint64_t n = 1 + next(&a->seed, next(&a->seed, 3) ? 4 : SLOTS * SLOT_STEP);

		pthread_rwlock_rdlock(&g->lock);
		if (kl_set_private(g->vm, first, first + n, next(&a->seed, 2)))
			fail("conversion", NULL, first);
		pthread_rwlock_unlock(&g->lock);
		atomic_fetch_add_explicit(&conversions, 1, memory_order_relaxed);
	}
	return NULL;
}

static void *run_puncher(void *arg)
{
	struct actor *a = arg;

	while (!atomic_load(&stop)) {
		struct file *f = &files[next(&a->seed, VMS)][next(&a->seed, INODES)];
		uint64_t off = next(&a->seed, FILE_PAGES) * PAGE;
		uint64_t len = (1 + next(&a->seed, FILE_PAGES)) * PAGE;

		pthread_rwlock_rdlock(&f->lock);
		if (f->f && next(&a->seed, 4)) {
			if (kl_gmem_punch(f->f, off, len))
				fail("punch", NULL, off);
			atomic_fetch_add_explicit(&holes, 1, memory_order_relaxed);
		} else if (f->f) {
			(void)!kl_gmem_allocate(f->f, off, PAGE);
		}
		pthread_rwlock_unlock(&f->lock);
	}
	return NULL;
}

static int set_slot(struct guest *g, unsigned slot, struct kl_gmem *f, uint64_t off, bool add)
{
	struct kl_uapi_memory_region2 r = {
		.slot = slot,
		.flags = f ? KVM_MEM_GUEST_MEMFD : 0,
		.guest_phys_addr = (uint64_t)slot * SLOT_STEP * PAGE,
		.memory_size = add ? SLOT_PAGES * PAGE : 0,
		.userspace_addr = (uint64_t)(uintptr_t)g->ram + slot * SLOT_PAGES * PAGE,
		.guest_memfd_offset = off,
	};

	return kl_set_memory_region_gmem(g->vm, &r, f, -EBADF);
}

static void change_slot(struct guest *g, unsigned *seed)
{
	unsigned slot = next(seed, SLOTS);
	struct file *f = &files[g - guests][next(seed, INODES)];
	int r;

	pthread_mutex_lock(&g->slots);
	if (g->there[slot]) {
		r = set_slot(g, slot, NULL, 0, false);
		g->there[slot] = false;
	} else {
		pthread_rwlock_rdlock(&f->lock);
		r = set_slot(g, slot, next(seed, 8) ? f->f : NULL,
			     next(seed, FILE_PAGES / 8) * 8 * PAGE, true);
		pthread_rwlock_unlock(&f->lock);
		g->there[slot] = !r;
		if (!r)
			atomic_fetch_add_explicit(&bindings, 1, memory_order_relaxed);
		/* Bound already, beyond the end, or of a VM that has died. */
		r = r == -EINVAL ? 0 : r;
	}
	if (r)
		fail("slot", NULL, (uint64_t)-r);
	pthread_mutex_unlock(&g->slots);
}

static void *run_slots(void *arg)
{
	struct actor *a = arg;

	while (!atomic_load(&stop)) {
		struct guest *g = &guests[next(&a->seed, VMS)];

		pthread_rwlock_rdlock(&g->lock);
		change_slot(g, &a->seed);
		pthread_rwlock_unlock(&g->lock);
		for (unsigned i = next(&a->seed, 8); i; i--)
			sched_yield();
	}
	return NULL;
}

static void *run_discarder(void *arg)
{
	struct actor *a = arg;

	while (!atomic_load(&stop)) {
		struct guest *g = &guests[next(&a->seed, VMS)];
		uint8_t *p = g->ram + next(&a->seed, SLOTS * SLOT_PAGES) * PAGE;
		struct kl_notifier_range r = {.start = (uint64_t)(uintptr_t)p,
					      .end = (uint64_t)(uintptr_t)p + PAGE,
					      .may_block = next(&a->seed, 4)};

		if (!kl_notifier_begin(&r)) {
			madvise(p, PAGE, MADV_DONTNEED);
			kl_notifier_end(&r);
			atomic_fetch_add_explicit(&discards, 1, memory_order_relaxed);
		}
		sched_yield();
	}
	return NULL;
}

/* Context: file's lock for writing, @v's VM's for reading at least. */
static void open_file(unsigned v, unsigned inode)
{
	struct file *f = &files[v][inode];
	int fd, r = -ENOENT;

	pthread_mutex_lock(&opening);
	for (unsigned o = 0; o < VMS && r; o++) {
		struct file *other = &files[o][inode];

		if (o == v || pthread_rwlock_tryrdlock(&other->lock))
			continue;
		if (other->f)
			r = kl_gmem_link(other->f, guests[v].vm, &f->f);
		pthread_rwlock_unlock(&other->lock);
	}
	if (r) {
		fd = memfd_create("gmem-stress", MFD_CLOEXEC);
		if (fd < 0 || ftruncate(fd, FILE_PAGES * PAGE) ||
		    kl_gmem_create(guests[v].vm, fd, FILE_PAGES * PAGE, 0, &f->f))
			err(1, "file");
		close(fd);
	}
	pthread_mutex_unlock(&opening);
}

static void close_file(struct file *f)
{
	if (f->f)
		kl_gmem_close(f->f);
	f->f = NULL;
	atomic_fetch_add_explicit(&closings, 1, memory_order_relaxed);
}

static void *run_closer(void *arg)
{
	struct actor *a = arg;

	while (!atomic_load(&stop)) {
		unsigned v = next(&a->seed, VMS), inode = next(&a->seed, INODES);
		struct file *f = &files[v][inode];

		pthread_rwlock_rdlock(&guests[v].lock);
		pthread_rwlock_wrlock(&f->lock);
		if (f->f)
			close_file(f);
		else
			open_file(v, inode);
		pthread_rwlock_unlock(&f->lock);
		pthread_rwlock_unlock(&guests[v].lock);
		for (unsigned i = next(&a->seed, 30); i; i--)
			sched_yield();
	}
	return NULL;
}

static void birth(struct guest *g)
{
	g->vm = aligned_alloc(64, (sizeof(*g->vm) + 63) / 64 * 64);
	if (!g->vm || kl_vm_init(g->vm))
		errx(1, "VM");
	kl_vm_make_private(g->vm);
	for (unsigned i = 0; i < VCPUS; i++) {
		memset(&g->vcpu[i], 0, sizeof(g->vcpu[i]));
		if (kl_vcpu_core_add(g->vm, &g->vcpu[i], i))
			errx(1, "vCPU");
	}
	for (unsigned i = 0; i < CACHES; i++) {
		g->cache[i] = aligned_alloc(64, (sizeof(struct kl_gpc) + 63) / 64 * 64);
		if (!g->cache[i] || kl_gpc_init(g->cache[i], g->vm, 0, KL_GPC_USER))
			errx(1, "cache");
	}
}

static void death(struct guest *g)
{
	for (unsigned i = 0; i < CACHES; i++) {
		kl_gpc_destroy(g->cache[i]);
		free(g->cache[i]);
	}
	kl_vm_destroy(g->vm);
	free(g->vm);
	memset(g->there, 0, sizeof(g->there));
}

static void all_files(unsigned v, bool open)
{
	for (unsigned i = 0; i < INODES; i++) {
		struct file *f = &files[v][i];

		pthread_rwlock_wrlock(&f->lock);
		close_file(f);
		if (open)
			open_file(v, i);
		pthread_rwlock_unlock(&f->lock);
	}
}

/* Files first, or the VM first; holes are punched in what is left at the same time. */
static void *run_destroyer(void *arg)
{
	struct actor *a = arg;

	while (!atomic_load(&stop)) {
		unsigned v = next(&a->seed, VMS);
		struct guest *g = &guests[v];

		for (unsigned i = 0; i < 200 && !atomic_load(&stop); i++)
			sched_yield();
		pthread_rwlock_wrlock(&g->lock);
		if (next(&a->seed, 2))
			all_files(v, false);
		death(g);
		birth(g);
		all_files(v, true);
		pthread_rwlock_unlock(&g->lock);
		atomic_fetch_add_explicit(&deaths, 1, memory_order_relaxed);
	}
	return NULL;
}

/* Does anything private show through? */
static void *run_canary(void *arg)
{
	(void)arg;
	while (!atomic_load(&stop)) {
		for (unsigned v = 0; v < VMS; v++)
			for (unsigned i = 0; i < SLOTS * SLOT_PAGES * 16; i++) {
				uint8_t *p = guests[v].ram + i / 16 * PAGE;

				check_word(true, p, kl_load(p + 8 * (i % 16), 8));
			}
		atomic_fetch_add_explicit(&scans, 1, memory_order_relaxed);
		sched_yield();
	}
	return NULL;
}

static bool enough(unsigned rounds)
{
	return stores > 50 * rounds && private_stores > 50 * rounds && cached > rounds &&
	       memory_faults && conversions > 20 * rounds && holes > 10 * rounds &&
	       bindings > rounds && discards > rounds && closings > rounds &&
	       deaths > rounds / 10 && scans;
}

static bool in_maps(const char *name)
{
	FILE *f = fopen("/proc/self/maps", "re");
	char line[256];
	bool yes = false;

	while (f && fgets(line, sizeof(line), f))
		yes |= strstr(line, name) != NULL;
	if (f)
		fclose(f);
	return yes;
}

#define MAX_ACTORS 32

int main(int argc, char **argv)
{
	void *(*const others[])(void *) = {run_converter, run_converter, run_puncher,
					   run_puncher,   run_slots,     run_discarder,
					   run_closer,    run_destroyer, run_canary};
	unsigned seed = 1, rounds = 20, seconds = 0, n = 0;
	uint64_t pages = kl_pages_in_use();
	pthread_rwlockattr_t fair;
	struct actor actors[MAX_ACTORS];

	for (int i = 1; i + 1 < argc; i += 2) {
		unsigned v = (unsigned)strtoul(argv[i + 1], NULL, 0);

		if (!strcmp(argv[i], "--seed"))
			seed = v;
		else if (!strcmp(argv[i], "--rounds"))
			rounds = v;
		else if (!strcmp(argv[i], "--seconds"))
			seconds = v;
		else
			errx(2, "usage: gmem-stress [--seed N] [--rounds N | --seconds N]");
	}
	pthread_rwlockattr_init(&fair);
	pthread_rwlockattr_setkind_np(&fair, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	for (unsigned v = 0; v < VMS; v++) {
		struct guest *g = &guests[v];

		pthread_rwlock_init(&g->lock, &fair);
		pthread_mutex_init(&g->slots, NULL);
		g->ram = mmap(NULL, SLOTS * SLOT_PAGES * PAGE, PROT_READ | PROT_WRITE,
			      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (g->ram == MAP_FAILED)
			err(1, "mmap");
		birth(g);
		for (unsigned i = 0; i < INODES; i++)
			pthread_rwlock_init(&files[v][i].lock, &fair);
	}
	for (unsigned v = 0; v < VMS; v++) {
		all_files(v, true);
		for (unsigned i = 0; i < VCPUS; i++)
			actors[n++] = (struct actor){.guest = v, .index = i};
	}
	for (unsigned i = 0; i < n; i++) {
		actors[i].seed = seed * 100 + i;
		pthread_create(&actors[i].thread, NULL, run_vcpu, &actors[i]);
	}
	for (unsigned v = 0; v < VMS; v++, n++) {
		actors[n] = (struct actor){.guest = v, .seed = seed * 100 + n};
		pthread_create(&actors[n].thread, NULL, run_cache_user, &actors[n]);
	}
	for (unsigned i = 0; i < KL_ARRAY_SIZE(others); i++, n++) {
		actors[n] = (struct actor){.seed = seed * 100 + n};
		pthread_create(&actors[n].thread, NULL, others[i], &actors[n]);
	}
	if (seconds)
		sleep(seconds);
	while (!seconds && !enough(rounds))
		sched_yield();
	atomic_store(&stop, true);
	while (n)
		pthread_join(actors[--n].thread, NULL);
	for (unsigned v = 0; v < VMS; v++) {
		if (v)
			all_files(v, false);
		death(&guests[v]);
		all_files(v, false);
	}
	printf("%lu stores, %lu to private memory, %lu through caches, %lu memory faults, %lu "
	       "conversions, %lu holes, %lu bindings, %lu discards, %lu closings, %lu deaths, %lu "
	       "scans\n",
	       stores, private_stores, cached, memory_faults, conversions, holes, bindings,
	       discards, closings, deaths, scans);
	if (!enough(1))
		errx(1, "something did not happen");
	if (in_maps("memfd:gmem-stress"))
		errx(1, "a file is mapped still");
	if (kl_pages_in_use() != pages)
		errx(1, "page tables are left");
	return 0;
}
