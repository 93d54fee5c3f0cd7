/* SPDX-License-Identifier: MIT */
/*
 * An emulator's cache of translations by the guest's page tables, which needs no INVLPG to stay
 * right: tables that are walked often are tracked (kvmlet/track.h), and when an entry of one is
 * written, the translations that came from that entry are dropped, and no others. Two threads
 * translate, while a third changes the tables as a guest's kernel does.
 *
 *     cc shadow.c $(pkg-config --cflags --libs kvmlet) -lpthread
 */
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <kvmlet/kvmlet.h>

#define PAGE    4096ul
#define PRESENT 1ul
#define ADDRESS 0x000ffffffffff000ul
#define LEVELS  4
#define OFTEN   4 /* walks, before a table is tracked */

/* What the guest has: two slots; tables for 2 * 512 pages, and pages that hold their number. */
#define TABLES  0x100000ul
#define ROOT    TABLES
#define LAST(n) (TABLES + (3 + (n)) * PAGE) /* tables of the last level */
#define NR_LAST 2ul
#define DATA    0x400000ul
#define NR_DATA 64ul
#define PAGES   (NR_LAST * 512)

#define CHANGES 50000u

static struct kvmlet_vm *vm;
static uint8_t *tables, *data;

static void check(int err, const char *what)
{
	if (!err)
		return;
	fprintf(stderr, "%s: %s\n", what, strerror(-err));
	exit(1);
}

/* ---- the cache ------------------------------------------------------------------------------ */

struct translation;

/* That a translation came from an entry: in the list of that entry. */
struct origin {
	struct origin *next, **link;
	struct translation *of;
};

struct translation {
	bool valid;
	uint64_t page; /* linear address */
	uint64_t gpa;
	struct origin from[LEVELS];
};

struct table {
	kl_gfn_t gfn;
	unsigned walks;
	bool tracked;
	struct origin *entry[512];
};

/* Protects what follows. Callbacks take it, so it is not held around changes of slots. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct translation cache[1024];
static struct table table[16];
static unsigned nr_tables;
static unsigned long hits, walks, dropped;

static void drop(struct translation *t)
{
	for (unsigned i = 0; t->valid && i < LEVELS; i++) {
		struct origin *o = &t->from[i];

		*o->link = o->next;
		if (o->next)
			o->next->link = o->link;
	}
	t->valid = false;
}

static void drop_entry(struct table *t, unsigned index)
{
	for (; t->entry[index]; dropped++)
		drop(t->entry[index]->of);
}

static struct table *find_table(kl_gfn_t gfn)
{
	for (unsigned i = 0; i < nr_tables; i++)
		if (table[i].gfn == gfn)
			return &table[i];
	return NULL;
}

static void wrote(void *self, unsigned as, kl_gpa_t gpa, const void *bytes, size_t len)
{
	struct table *t;

	(void)self;
	(void)as;
	(void)bytes;
	pthread_mutex_lock(&lock);
	t = find_table(gpa / PAGE);
	for (uint64_t i = gpa % PAGE / 8; t && i <= (gpa % PAGE + len - 1) / 8; i++)
		drop_entry(t, (unsigned)i);
	pthread_mutex_unlock(&lock);
}

static void gone(void *self, unsigned as, kl_gfn_t gfn, uint64_t npages)
{
	(void)self;
	(void)as;
	pthread_mutex_lock(&lock);
	for (struct table *t = table; t < table + nr_tables; t++) {
		if (t->gfn < gfn || t->gfn >= gfn + npages)
			continue;
		for (unsigned i = 0; i < 512; i++)
			drop_entry(t, i);
		t->tracked = false;
		t->walks = 0;
	}
	pthread_mutex_unlock(&lock);
}

static const struct kvmlet_track_ops ops = {wrote, gone};

/* The table, if it is tracked by now; else NULL. */
static struct table *count_walk(kl_gfn_t gfn)
{
	struct table *t = find_table(gfn);

	if (!t) {
		if (nr_tables == sizeof(table) / sizeof(table[0]))
			return NULL;
		t = &table[nr_tables++];
		t->gfn = gfn;
	}
	if (!t->tracked && ++t->walks >= OFTEN)
		t->tracked = !kvmlet_track_add_page(vm, 0, gfn);
	return t->tracked ? t : NULL;
}

/*
 * The gpa of the linear address @page, or -ENOENT. @from: where the entries are; NULL if a table is
 * not tracked.
 *
 * A table is tracked before its entry is read. So who writes to the entry later reports it, and
 * finds the translation in the entry's list, for it waits for the lock.
 */
static int walk(uint64_t page, uint64_t *gpa, struct origin **from[LEVELS])
{
	uint64_t at = ROOT;

	for (unsigned i = 0; i < LEVELS; i++) {
		unsigned index = page >> (39 - 9 * i) & 511;
		struct table *t = from ? count_walk(at / PAGE) : NULL;
		uint64_t entry;

		if (from)
			from[i] = t ? &t->entry[index] : NULL;
		if (kvmlet_vm_load(vm, 0, at + 8 * index, 8, &entry) || !(entry & PRESENT))
			return -ENOENT;
		at = entry & ADDRESS;
	}
	*gpa = at;
	return 0;
}

static void keep(struct translation *t, uint64_t page, uint64_t gpa, struct origin **from[LEVELS])
{
	for (unsigned i = 0; i < LEVELS; i++)
		if (!from[i])
			return;
	drop(t);
	*t = (struct translation){.valid = true, .page = page, .gpa = gpa};
	for (unsigned i = 0; i < LEVELS; i++) {
		struct origin *o = &t->from[i];

		*o = (struct origin){.next = *from[i], .link = from[i], .of = t};
		if (o->next)
			o->next->link = &o->next;
		*from[i] = o;
	}
}

static int translate(uint64_t page, uint64_t *gpa)
{
	struct translation *t = &cache[page / PAGE % (sizeof(cache) / sizeof(cache[0]))];
	struct origin **from[LEVELS];
	int err = 0;

	pthread_mutex_lock(&lock);
	if (t->valid && t->page == page) {
		hits++;
		*gpa = t->gpa;
	} else {
		walks++;
		err = walk(page, gpa, from);
		if (!err)
			keep(t, page, *gpa, from);
	}
	pthread_mutex_unlock(&lock);
	return err;
}

/* ---- who uses it ---------------------------------------------------------------------------- */

static atomic_int stop;

static void *cpu(void *seed)
{
	unsigned random = *(unsigned *)seed;

	while (!atomic_load(&stop)) {
		uint64_t gpa, number;

		if (translate((unsigned)rand_r(&random) % PAGES * PAGE, &gpa))
			continue;
		check(kvmlet_vm_load(vm, 0, gpa, 8, &number), "a page");
		if (number != (gpa - DATA) / PAGE)
			return seed;
	}
	return NULL;
}

/* As soon as an entry is written, nobody is told what it was before. Returns what went wrong. */
static unsigned kernel(void)
{
	unsigned random = 3, wrong = 0;

	for (unsigned i = 0; i < CHANGES; i++) {
		uint64_t page = (unsigned)rand_r(&random) % PAGES;
		uint64_t want = DATA + (unsigned)rand_r(&random) % NR_DATA * PAGE, gpa = 0;
		uint64_t entry = LAST(page / 512) + page % 512 * 8;
		bool there = i % 8;
		int err;

		check(kvmlet_vm_store(vm, 0, entry, 8, there ? want | PRESENT : 0), "entry");
		err = translate(page * PAGE, &gpa);
		wrong += there ? err || gpa != want : err != -ENOENT;
	}
	return wrong;
}

static void *map(size_t size)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		exit(1);
	return p;
}

static void set_entry(uint64_t at, uint64_t index, uint64_t to)
{
	to |= PRESENT;
	memcpy(tables + (at - TABLES) + index * 8, &to, sizeof(to));
}

static void make_guest(void)
{
	tables = map(16 * PAGE);
	data = map(NR_DATA * PAGE);
	set_entry(ROOT, 0, TABLES + PAGE);
	set_entry(TABLES + PAGE, 0, TABLES + 2 * PAGE);
	for (uint64_t n = 0; n < NR_LAST; n++) {
		set_entry(TABLES + 2 * PAGE, n, LAST(n));
		for (uint64_t i = 0; i < 512; i++)
			set_entry(LAST(n), i, DATA + i % NR_DATA * PAGE);
	}
	for (uint64_t i = 0; i < NR_DATA; i++)
		memcpy(data + i * PAGE, &i, sizeof(i));
	check(kvmlet_memslot_set(vm, 0, 0, TABLES, 16 * PAGE, kl_hva(tables)), "slot");
	check(kvmlet_memslot_set(vm, 1, 0, DATA, NR_DATA * PAGE, kl_hva(data)), "slot");
}

/* How many of the translations are not what the tables say. */
static unsigned compare(void)
{
	unsigned wrong = 0;
	uint64_t gpa;

	for (const struct translation *t = cache; t < cache + sizeof(cache) / sizeof(cache[0]); t++)
		wrong += t->valid && (walk(t->page, &gpa, NULL) || gpa != t->gpa);
	return wrong;
}

int main(void)
{
	struct kvmlet_tracker *tracker;
	unsigned seed[2] = {1, 2}, wrong;
	pthread_t thread[2];
	void *failed[2];
	uint64_t gpa;

	check(kvmlet_vm_create(&vm), "create");
	make_guest();
	check(kvmlet_track_register(vm, &ops, NULL, &tracker), "register");
	for (unsigned i = 0; i < 2; i++)
		pthread_create(&thread[i], NULL, cpu, &seed[i]);
	wrong = kernel();
	/* An entry of an upper level: 512 pages at once. */
	check(kvmlet_vm_store(vm, 0, TABLES + 2 * PAGE, 8, LAST(1) | PRESENT), "entry");
	atomic_store(&stop, 1);
	for (unsigned i = 0; i < 2; i++)
		pthread_join(thread[i], &failed[i]);
	wrong += compare() + !!failed[0] + !!failed[1];
	printf("%lu translations were there, %lu were walked for, %lu dropped; %u wrong\n", hits,
	       walks, dropped, wrong);

	/* The tables are unplugged: told once, nothing is left, and nothing is tracked any more. */
	check(kvmlet_memslot_set(vm, 0, 0, 0, 0, kl_hva(NULL)), "delete");
	wrong += translate(0, &gpa) != -ENOENT;
	check(kvmlet_track_unregister(tracker), "unregister");
	kvmlet_vm_destroy(vm);
	return wrong || !hits || !dropped;
}
