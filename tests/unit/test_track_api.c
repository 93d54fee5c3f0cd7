/* SPDX-License-Identifier: MIT */
/*
 * The library's public functions on write tracking (include/kvmlet/track.h): what is reported, and
 * what is refused (T1, T6).
 */
#include "api_env.h"

#include <malloc.h>

#include "mem/gpc.h"

#define MAX_RECORDS 64

struct record {
	kl_gpa_t gpa;
	size_t len;
	uint8_t bytes[PG];
};

struct recorder {
	struct fixture *f;
	struct kvmlet_tracker *tracker;
	struct record *r;
	unsigned n, removals;
};

static void wrote(void *opaque, unsigned as, kl_gpa_t gpa, const void *bytes, size_t len)
{
	struct recorder *rec = opaque;
	struct record *r = &rec->r[rec->n++];

	assert_int_equal(as, 0);
	assert_true(rec->n <= MAX_RECORDS);
	assert_true(len && (gpa & (PG - 1)) + len <= PG);
	/* After the write is visible. */
	assert_memory_equal(rec->f->ram + gpa, bytes, len);
	r->gpa = gpa;
	r->len = len;
	memcpy(r->bytes, bytes, len);
}

static void gone(void *opaque, unsigned as, kl_gfn_t gfn, uint64_t npages)
{
	struct recorder *rec = opaque;

	rec->removals++;
}

static const struct kvmlet_track_ops ops = {wrote, gone};

static void record(struct recorder *rec, struct fixture *f, kl_gfn_t gfn)
{
	*rec = (struct recorder){.f = f, .r = calloc(MAX_RECORDS, sizeof(*rec->r))};
	assert_int_equal(kvmlet_track_register(f->vm, &ops, rec, &rec->tracker), 0);
	assert_int_equal(kvmlet_track_add_page(f->vm, 0, gfn), 0);
}

static void end(struct recorder *rec)
{
	assert_int_equal(kvmlet_track_unregister(rec->tracker), 0);
	free(rec->r);
}

#define assert_record(rec, i, gpa_, len_)                \
	do {                                             \
		assert_true((i) < (rec)->n);             \
		assert_int_equal((rec)->r[i].gpa, gpa_); \
		assert_int_equal((rec)->r[i].len, len_); \
	} while (0)

/* T1: of a write over several pages the part in the tracked one. */
static void writes(void **state)
{
	struct fixture *f = *state;
	struct recorder rec;
	uint8_t *buf = malloc(3 * PG);
	size_t done;

	record(&rec, f, 1);
	for (unsigned i = 0; i < 3 * PG; i++)
		buf[i] = (uint8_t)(i * 7 + i / PG);
	assert_int_equal(kvmlet_vm_write(f->vm, 0, 0, buf, PG, &done), 0);
	assert_int_equal(kvmlet_vm_write(f->vm, 0, 2 * PG, buf, PG, &done), 0);
	assert_int_equal(rec.n, 0);
	assert_int_equal(kvmlet_vm_write(f->vm, 0, 100, buf, 2 * PG + 50, &done), 0);
	assert_int_equal(done, 2 * PG + 50);
	assert_memory_equal(f->ram + 100, buf, 2 * PG + 50);
	assert_int_equal(rec.n, 1);
	assert_record(&rec, 0, PG, PG);
	assert_memory_equal(rec.r[0].bytes, buf + PG - 100, PG);
	assert_int_equal(kvmlet_vm_write(f->vm, 0, PG + 9, "word", 4, NULL), 0);
	assert_record(&rec, 1, PG + 9, 4);
	assert_int_equal(kvmlet_vm_read(f->vm, 0, PG, buf, PG, NULL), 0);
	assert_int_equal(kvmlet_track_remove_page(f->vm, 0, 1), 0);
	assert_int_equal(kvmlet_vm_write(f->vm, 0, PG + 9, "word", 4, NULL), 0);
	assert_int_equal(rec.n, 2);
	free(buf);
	end(&rec);
}

/* T1: what atomic operations store, exactly; what stores nothing is not reported. */
static void atomics(void **state)
{
	struct fixture *f = *state;
	struct recorder rec;
	uint64_t old;

	record(&rec, f, 1);
	assert_int_equal(kvmlet_vm_store(f->vm, 0, PG, 8, 0x1122334455667788), 0);
	assert_int_equal(kvmlet_vm_exchange(f->vm, 0, PG + 8, 4, 5, &old), 0);
	assert_int_equal(kvmlet_vm_fetch_add(f->vm, 0, PG, 1, 0x80, NULL), 0);
	assert_int_equal(kvmlet_vm_fetch_or(f->vm, 0, PG, 2, 0x8000, NULL), 0);
	assert_int_equal(kvmlet_vm_fetch_and(f->vm, 0, PG, 4, 0xffff0000, NULL), 0);
	assert_int_equal(kvmlet_vm_compare_exchange(f->vm, 0, PG + 8, 4, 5, 6, &old), 0);
	assert_int_equal(rec.n, 6);
	assert_int_equal(kvmlet_vm_compare_exchange(f->vm, 0, PG + 8, 4, 5, 7, &old), 0);
	assert_int_equal(old, 6);
	assert_int_equal(kvmlet_vm_load(f->vm, 0, PG, 8, &old), 0);
	assert_int_equal(rec.n, 6);
	assert_record(&rec, 0, PG, 8);
	assert_record(&rec, 1, PG + 8, 4);
	assert_record(&rec, 2, PG, 1);
	assert_record(&rec, 3, PG, 2);
	assert_record(&rec, 4, PG, 4);
	assert_record(&rec, 5, PG + 8, 4);
	assert_int_equal(rec.r[2].bytes[0], 0x08);
	assert_int_equal(rec.r[5].bytes[0], 6);
	end(&rec);
}

/* T1, G13: a cache, when it is unlocked as written; of as much as was ever locked. */
static void caches(void **state)
{
	struct fixture *f = *state;
	struct kvmlet_gpc *gpc, *by_hva, *many[2];
	size_t lens[2] = {4, 8};
	struct recorder rec;
	void *p, *ptrs[2];

	assert_int_equal(kvmlet_gpc_init(f->vm, 0, &gpc), 0);
	assert_int_equal(kvmlet_gpc_activate(gpc, PG + 16, 8), 0);
	assert_int_equal(kvmlet_gpc_init(f->vm, 0, &by_hva), 0);
	assert_int_equal(kvmlet_gpc_activate_hva(by_hva, kl_hva(f->ram + PG + 16), 8), 0);
	record(&rec, f, 1);
	for (int written = 0; written < 2; written++) {
		assert_int_equal(kvmlet_gpc_lock(gpc, 8, &p), 0);
		memcpy(p, "12345678", 8);
		assert_int_equal(rec.n, 0);
		kvmlet_gpc_unlock(gpc, written);
		assert_int_equal(rec.n, written);
	}
	assert_record(&rec, 0, PG + 16, 8);
	assert_memory_equal(rec.r[0].bytes, "12345678", 8);
	assert_int_equal(kvmlet_gpc_lock(gpc, 64, &p), 0);
	kvmlet_gpc_unlock(gpc, 1);
	assert_record(&rec, 1, PG + 16, 64);
	assert_int_equal(kvmlet_gpc_lock(by_hva, 8, &p), 0);
	kvmlet_gpc_unlock(by_hva, 1);
	assert_int_equal(rec.n, 2);
	/* Elsewhere it is another area. */
	assert_int_equal(kvmlet_gpc_activate(gpc, PG + 32, 4), 0);
	assert_int_equal(kvmlet_gpc_init(f->vm, 0, &many[1]), 0);
	assert_int_equal(kvmlet_gpc_activate(many[1], 2 * PG, 8), 0);
	many[0] = gpc;
	assert_int_equal(kvmlet_gpc_lock_many(many, lens, ptrs, 2), 0);
	kvmlet_gpc_unlock_many(many, 2, 1);
	assert_int_equal(rec.n, 3);
	assert_record(&rec, 2, PG + 32, 4);
	kvmlet_gpc_destroy(many[1]);
	kvmlet_gpc_destroy(by_hva);
	kvmlet_gpc_destroy(gpc);
	end(&rec);
}

/* T1: all of a window for writing that lies in tracked pages, when it is unlocked. */
static void windows(void **state)
{
	struct fixture *f = *state;
	struct recorder rec;
	struct iovec iov[8];
	unsigned n;

	record(&rec, f, 1);
	assert_int_equal(kvmlet_track_add_page(f->vm, 0, 3), 0);
	assert_int_equal(kvmlet_window_lock(f->vm, 0, 100, 3 * PG, KVMLET_READ, iov, 8, &n), 0);
	kvmlet_window_unlock(f->vm);
	assert_int_equal(kvmlet_window_lock(f->vm, 0, 2 * PG, PG, KVMLET_WRITE, iov, 8, &n), 0);
	kvmlet_window_unlock(f->vm);
	assert_int_equal(rec.n, 0);
	assert_int_equal(kvmlet_window_lock(f->vm, 0, 100, 3 * PG, KVMLET_WRITE, iov, 8, &n), 0);
	for (unsigned i = 0; i < n; i++)
		memset(iov[i].iov_base, 0x5a, iov[i].iov_len);
	assert_int_equal(rec.n, 0);
	kvmlet_window_unlock(f->vm);
	assert_int_equal(rec.n, 2);
	assert_record(&rec, 0, PG, PG);
	assert_record(&rec, 1, 3 * PG, 100);
	assert_int_equal(rec.r[1].bytes[99], 0x5a);
	end(&rec);
}

/* S8, T6: no MOVE while there is a tracker; all else goes. */
static void moves(void **state)
{
	struct fixture *f = *state;
	struct recorder rec;

	assert_int_equal(kvmlet_memslot_set(f->vm, 0, 0, 64 * PG, NPAGES * PG, kl_hva(f->ram)), 0);
	assert_int_equal(kvmlet_memslot_set(f->vm, 0, 0, 0, NPAGES * PG, kl_hva(f->ram)), 0);
	record(&rec, f, 1);
	assert_int_equal(kvmlet_memslot_set(f->vm, 0, 0, 64 * PG, NPAGES * PG, kl_hva(f->ram)),
			 -EINVAL);
	assert_int_equal(kvmlet_vm_write(f->vm, 0, PG, "x", 1, NULL), 0);
	assert_int_equal(rec.n, 1);
	assert_int_equal(kvmlet_memslot_set(f->vm, 1, 0, 64 * PG, PG, kl_hva(f->ram)), 0);
	assert_int_equal(kvmlet_memslot_set(f->vm, 1, 0, 0, 0, kl_hva(NULL)), 0);
	assert_int_equal(rec.removals, 1);
	end(&rec);
	assert_int_equal(kvmlet_memslot_set(f->vm, 0, 0, 64 * PG, NPAGES * PG, kl_hva(f->ram)), 0);
}

struct actor {
	struct fixture *f;
	struct kvmlet_tracker *tracker;
	unsigned writes, removals;
};

static void refusals(struct actor *a)
{
	struct kvmlet_tracker *t;

	assert_int_equal(kvmlet_track_unregister(a->tracker), -EDEADLK);
	assert_int_equal(kvmlet_track_register(a->f->vm, &ops, NULL, &t), -EDEADLK);
	assert_int_equal(kvmlet_memslot_set(a->f->vm, 5, 0, 64 * PG, PG, kl_hva(a->f->ram)),
			 -EDEADLK);
	assert_int_equal(kvmlet_notifier_uffd_source(1), -EDEADLK);
	kvmlet_vm_destroy(a->f->vm); /* complains */
}

static void acts(void *opaque, unsigned as, kl_gpa_t gpa, const void *bytes, size_t len)
{
	struct actor *a = opaque;
	struct kvmlet_gpc *gpc;
	uint8_t x;
	void *p;

	refusals(a);
	assert_int_equal(kvmlet_vm_read(a->f->vm, 0, gpa, &x, 1, NULL), 0);
	assert_int_equal(kvmlet_vm_write(a->f->vm, 0, 5 * PG, &x, 1, NULL), 0);
	assert_int_equal(kvmlet_gpc_init(a->f->vm, 0, &gpc), 0);
	assert_int_equal(kvmlet_gpc_activate(gpc, 6 * PG, 8), 0);
	assert_int_equal(kvmlet_gpc_lock(gpc, 8, &p), 0);
	kvmlet_gpc_unlock(gpc, 1);
	kvmlet_gpc_destroy(gpc);
	assert_int_equal(kvmlet_track_add_page(a->f->vm, 0, 7), 0);
	assert_int_equal(kvmlet_track_remove_page(a->f->vm, 0, 7), 0);
	a->writes++;
	if (a->writes < 3) /* once more, from inside */
		assert_int_equal(kvmlet_vm_write(a->f->vm, 0, gpa, &x, 1, NULL), 0);
}

static void acts_on_removal(void *opaque, unsigned as, kl_gfn_t gfn, uint64_t npages)
{
	struct actor *a = opaque;
	uint8_t x;

	refusals(a);
	assert_int_equal(kvmlet_vm_read(a->f->vm, 0, gfn * PG, &x, 1, NULL), -EFAULT);
	assert_int_equal(kvmlet_track_add_page(a->f->vm, 0, gfn), -ENOENT);
	a->removals++;
}

/* T1: what a callback may do, and what not. */
static void callbacks(void **state)
{
	static const struct kvmlet_track_ops none = {NULL, gone}, active = {acts, acts_on_removal};
	struct fixture *f = *state;
	struct actor a = {.f = f};
	struct kvmlet_gpc *gpc, *other;
	struct kvmlet_tracker *t;
	struct iovec iov[4];
	unsigned n;
	void *p;

	assert_int_equal(kvmlet_track_register(f->vm, &none, NULL, &t), -EINVAL);
	assert_int_equal(kvmlet_track_register(f->vm, &active, &a, &a.tracker), 0);
	assert_int_equal(kvmlet_track_add_page(f->vm, 2, 1), -EINVAL);
	assert_int_equal(kvmlet_track_add_page(f->vm, 0, NPAGES), -ENOENT);
	assert_int_equal(kvmlet_track_remove_page(f->vm, 0, 1), -ENOENT);
	assert_int_equal(kvmlet_track_add_page(f->vm, 0, 1), 0);
	assert_int_equal(kvmlet_vm_write(f->vm, 0, PG, "x", 1, NULL), 0);
	assert_int_equal(a.writes, 3);
	assert_int_equal(kvmlet_window_lock(f->vm, 0, PG, 8, KVMLET_WRITE, iov, 4, &n), 0);
	assert_int_equal(kvmlet_track_add_page(f->vm, 0, 2), -EDEADLK);
	assert_int_equal(kvmlet_track_unregister(a.tracker), -EDEADLK);
	kvmlet_window_unlock(f->vm);
	assert_int_equal(a.writes, 4);
	assert_int_equal(kvmlet_gpc_init(f->vm, 0, &gpc), 0);
	assert_int_equal(kvmlet_gpc_activate(gpc, PG, 8), 0);
	assert_int_equal(kvmlet_gpc_init(f->vm, 0, &other), 0);
	assert_int_equal(kvmlet_gpc_activate(other, 2 * PG, 8), 0);
	assert_int_equal(kvmlet_gpc_lock(gpc, 8, &p), 0);
	assert_int_equal(kvmlet_track_add_page(f->vm, 0, 2), -EDEADLK);
	assert_int_equal(kvmlet_track_register(f->vm, &active, &a, &t), -EDEADLK);
	kvmlet_gpc_unlock(gpc, 1);
	assert_int_equal(a.writes, 5);
	kvmlet_gpc_destroy(gpc);
	kvmlet_gpc_destroy(other);
	assert_int_equal(kvmlet_memslot_set(f->vm, 0, 0, 0, 0, kl_hva(NULL)), 0);
	assert_int_equal(a.removals, 1);
	assert_int_equal(kvmlet_track_unregister(a.tracker), 0);
}

/* ---- threads ---- */

#define ROUNDS 200

/* A tracker as T7 wants it: its own table under its own lock, of what the page holds. */
struct mirror {
	struct fixture *f;
	struct kvmlet_tracker *tracker;
	pthread_mutex_t lock;
	bool mine;
	unsigned updates;
};

static void mirror_wrote(void *opaque, unsigned as, kl_gpa_t gpa, const void *bytes, size_t len)
{
	struct mirror *m = opaque;

	pthread_mutex_lock(&m->lock);
	m->updates += m->mine && gpa / PG == 1;
	pthread_mutex_unlock(&m->lock);
}

struct writer {
	struct fixture *f;
	_Atomic bool stop;
	_Atomic uint64_t written;
	unsigned how;
};

static void *writer_thread(void *arg)
{
	struct writer *w = arg;
	struct kvmlet_gpc *gpc;
	uint64_t x = 0;
	void *p;

	assert_int_equal(kvmlet_gpc_init(w->f->vm, 0, &gpc), 0);
	assert_int_equal(kvmlet_gpc_activate(gpc, PG + 8 * w->how, 8), 0);
	while (!atomic_load(&w->stop)) {
		x++;
		if (w->how) {
			assert_int_equal(kvmlet_vm_store(w->f->vm, 0, PG + 8, 8, x), 0);
		} else {
			assert_int_equal(kvmlet_gpc_lock(gpc, 8, &p), 0);
			atomic_store((_Atomic uint64_t *)p, x);
			kvmlet_gpc_unlock(gpc, 1);
		}
		atomic_store(&w->written, x);
	}
	kvmlet_gpc_destroy(gpc);
	return NULL;
}

/*
 * T1, T2, T3, T7: trackers come and go, and pages with them, while two threads write. From the
 * moment that a page was added, what a writer has done is reported.
 */
static void trackers_under_writers(void **state)
{
	static const struct kvmlet_track_ops mirror_ops = {mirror_wrote, NULL};
	struct fixture *f = *state;
	struct writer w[2] = {{.f = f, .how = 0}, {.f = f, .how = 1}};
	pthread_t thread[2];

	for (unsigned i = 0; i < 2; i++)
		pthread_create(&thread[i], NULL, writer_thread, &w[i]);
	for (unsigned round = 0; round < ROUNDS; round++) {
		struct mirror m = {.f = f, .lock = PTHREAD_MUTEX_INITIALIZER};
		uint64_t before[2];

		assert_int_equal(kvmlet_track_register(f->vm, &mirror_ops, &m, &m.tracker), 0);
		pthread_mutex_lock(&m.lock);
		m.mine = true;
		/* T7: with its lock held. */
		assert_int_equal(kvmlet_track_add_page(f->vm, 0, 1), 0);
		pthread_mutex_unlock(&m.lock);
		for (unsigned i = 0; i < 2; i++)
			before[i] = atomic_load(&w[i].written);
		/* One may have been on its way when the page was added, the next was not. */
		for (unsigned i = 0; i < 2; i++)
			while (atomic_load(&w[i].written) < before[i] + 2)
				sched_yield();
		pthread_mutex_lock(&m.lock);
		assert_true(m.updates >= 2);
		assert_int_equal(kvmlet_track_remove_page(f->vm, 0, 1), 0);
		pthread_mutex_unlock(&m.lock);
		assert_int_equal(kvmlet_track_unregister(m.tracker), 0);
		pthread_mutex_destroy(&m.lock);
	}
	for (unsigned i = 0; i < 2; i++) {
		atomic_store(&w[i].stop, true);
		pthread_join(thread[i], NULL);
	}
}

/* ---- forced ---- */

static void *add_page_thread(void *arg)
{
	struct recorder *rec = arg;

	assert_int_equal(kvmlet_track_add_page(rec->f->vm, 0, 2), 0);
	rec->removals = 100; /* done */
	return NULL;
}

/* T3: who holds a cache of the page when it is added is waited for: what he wrote is visible. */
static void add_waits_for_holder(void **state)
{
	struct fixture *f = *state;
	struct kvmlet_gpc *gpc;
	struct recorder rec;
	pthread_t t;
	void *p;

	NEED_RACEPOINTS;
	record(&rec, f, 1);
	assert_int_equal(kvmlet_gpc_init(f->vm, 0, &gpc), 0);
	assert_int_equal(kvmlet_gpc_activate(gpc, 2 * PG, 8), 0);
	assert_int_equal(kvmlet_gpc_lock(gpc, 8, &p), 0);
	kl_racepoint_arm("bias-waits", 1);
	pthread_create(&t, NULL, add_page_thread, &rec);
	assert_true(kl_racepoint_wait("bias-waits", TIMEOUT));
	kl_racepoint_release("bias-waits");
	assert_int_equal(rec.removals, 0);
	memcpy(p, "abcdefgh", 8);
	kvmlet_gpc_unlock(gpc, 1);
	pthread_join(t, NULL);
	assert_int_equal(rec.n, 1); /* its count was there before he unlocked */
	kvmlet_gpc_destroy(gpc);
	end(&rec);
}

/* T3: the same for a window. */
static void add_waits_for_window(void **state)
{
	struct fixture *f = *state;
	struct recorder rec;
	struct iovec iov[4];
	pthread_t t;
	unsigned n;

	NEED_RACEPOINTS;
	record(&rec, f, 1);
	assert_int_equal(kvmlet_window_lock(f->vm, 0, 2 * PG, 8, KVMLET_WRITE, iov, 4, &n), 0);
	kl_racepoint_arm("vcpu-awaited", 1);
	pthread_create(&t, NULL, add_page_thread, &rec);
	assert_true(kl_racepoint_wait("vcpu-awaited", TIMEOUT));
	kl_racepoint_release("vcpu-awaited");
	assert_int_equal(rec.removals, 0);
	kvmlet_window_unlock(f->vm);
	pthread_join(t, NULL);
	end(&rec);
}

/* T1: trackers that come and go, however many, leave no memory behind. */
static void nothing_remains(void **state)
{
	struct fixture *f = *state;
	struct recorder rec;
	size_t before = 0;

	for (unsigned i = 0; i < 1000; i++) {
		if (i == 2) /* what is made once is there */
			before = mallinfo2().uordblks;
		record(&rec, f, 1);
		end(&rec);
	}
	assert_int_equal(mallinfo2().uordblks, before);
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(writes),
		T(atomics),
		T(caches),
		T(windows),
		T(moves),
		T(callbacks),
		T(trackers_under_writers),
		T(add_waits_for_holder),
		T(add_waits_for_window),
		T(nothing_remains),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
