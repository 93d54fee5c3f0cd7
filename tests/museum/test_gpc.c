/* SPDX-License-Identifier: MIT */
/*
 * Exhibits B1 to B13, B15, B27 (the half of refreshers), B29, B30, B32 (the half of caches), B33
 * and B34: gfn->pfn caches (G1-G17).
 */
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include "base/failpoint.h"
#include "mem/gpc.h"
#include "mem/dirty.h"
#include "unit/mmu_env.h"

struct gpc_fixture {
	struct fixture f; /* first: the tests' helpers take it */
	struct kl_gpc a, b;
};

static int gpc_setup(void **state)
{
	struct gpc_fixture *g = aligned_alloc(64, (sizeof(*g) + 63) / 64 * 64);
	struct fixture *f = &g->f;

	memset(g, 0, sizeof(*g));
	*state = g;
	f->ram =
		mmap(NULL, NPAGES * PG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	return f->ram == MAP_FAILED || kl_vm_init(&f->vm) ||
	       kl_vcpu_core_add(&f->vm, &f->vcpu, 0) || set(&f->vm, 0, 0, 0, NPAGES * PG, f->ram) ||
	       kl_gpc_init(&g->a, &f->vm, 0, KL_GPC_USER) ||
	       kl_gpc_init(&g->b, &f->vm, 0, KL_GPC_USER);
}

static unsigned indexed(struct gpc_fixture *g)
{
	return g->a.gpcs->nr;
}

static int gpc_teardown(void **state)
{
	struct gpc_fixture *g = *state;

	kl_gpc_destroy(&g->a);
	kl_gpc_destroy(&g->b);
	if (g->a.gpcs->nr_objects)
		return -1;
	/* What was put was taken back, exactly once. [B12] */
	if (indexed(g) || g->a.gpcs->tree[0].n || g->a.gpcs->tree[1].n)
		return -1;
	kl_vm_destroy(&g->f.vm);
	munmap(g->f.ram, NPAGES * PG);
	free(g);
	return 0;
}

/* As a program would: a bracket, and nothing accessible from its begin on. */
static void vanish(void *p, size_t len)
{
	struct kl_notifier_range r = range_of(p, len);

	assert_int_equal(kl_notifier_begin(&r), 0);
	assert_ptr_equal(mmap(p, len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0),
			 p);
	kl_notifier_end(&r);
}

static void empty_bracket(void *p, size_t len)
{
	struct kl_notifier_range r = range_of(p, len);

	assert_int_equal(kl_notifier_begin(&r), 0);
	kl_notifier_end(&r);
}

/* Lock, or why not; unlocked again. */
static int use(struct kl_gpc *c, size_t len, void **p)
{
	int r = kl_gpc_lock(c, len, p);

	if (!r)
		assert_true(kl_gpc_unlock(c, false));
	return r;
}

/* A call on a thread of its own. */
struct call {
	pthread_t thread;
	struct kl_gpc *c;
	enum { REFRESH, LOCK, DEACTIVATE, ACTIVATE, ACTIVATE_HVA } what;
	uint64_t addr;
	void *p;
	int r;
	_Atomic bool done;
};

static void *call_thread(void *arg)
{
	struct call *c = arg;

	switch (c->what) {
	case REFRESH:
		c->r = kl_gpc_refresh(c->c, 8);
		break;
	case LOCK:
		c->r = use(c->c, 8, &c->p);
		break;
	case DEACTIVATE:
		c->r = kl_gpc_deactivate(c->c);
		break;
	case ACTIVATE:
		c->r = kl_gpc_activate(c->c, c->addr, 8);
		break;
	case ACTIVATE_HVA:
		c->r = kl_gpc_activate_hva(c->c, (kl_hva_t){c->addr}, 8);
		break;
	}
	atomic_store(&c->done, true);
	return NULL;
}

static void start(struct call *c)
{
	c->r = 1;
	pthread_create(&c->thread, NULL, call_thread, c);
}

/* Until it stands at @point. A macro, so that a failure shows where. */
#define start_until(c, point)                                     \
	do {                                                      \
		kl_racepoint_arm(point, 1);                       \
		start(c);                                         \
		assert_true(kl_racepoint_wait((point), TIMEOUT)); \
	} while (0)

static int join(struct call *c)
{
	pthread_join(c->thread, NULL);
	return c->r;
}

/* A bracket on a thread of its own, that can be told to end. */
struct open_bracket {
	pthread_t thread;
	struct kl_notifier_range r;
	_Atomic bool begun, finish;
	bool vanish; /* the memory, inside */
	int ret;
};

static void *open_bracket_thread(void *arg)
{
	struct open_bracket *b = arg;

	b->ret = kl_notifier_begin(&b->r);
	if (!b->ret && b->vanish)
		mmap((void *)b->r.start, b->r.end - b->r.start, PROT_NONE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	atomic_store(&b->begun, true);
	while (!atomic_load(&b->finish))
		sched_yield();
	if (!b->ret)
		kl_notifier_end(&b->r);
	return NULL;
}

static void start_bracket(struct open_bracket *b, void *p, size_t len)
{
	b->r = range_of(p, len);
	pthread_create(&b->thread, NULL, open_bracket_thread, b);
}

static void wait_begun(struct open_bracket *b)
{
	while (!atomic_load(&b->begun))
		sched_yield();
}

static void finish_bracket(struct open_bracket *b)
{
	atomic_store(&b->finish, true);
	pthread_join(b->thread, NULL);
}

/* ---- refresh ------------------------------------------------------------------------------- */

/* B1, G8: from the first moment of a refresh to its end, check fails and nobody gets a pointer. */
static void check_during_refresh(void **state)
{
	static const char *const points[] = {"gpc-populate", "gpc-populated", "gpc-not-in-flight"};
	struct gpc_fixture *g = *state;
	struct call c = {.c = &g->a, .what = REFRESH};
	void *p;

	NEED_RACEPOINTS;
	assert_int_equal(kl_gpc_activate(&g->a, PG, 8), 0);
	for (unsigned i = 0; i < KL_ARRAY_SIZE(points); i++) {
		empty_bracket(g->f.ram + PG, PG);
		assert_false(kl_gpc_check(&g->a, 8));
		start_until(&c, points[i]);
		assert_false(kl_gpc_check(&g->a, 8));
		assert_int_equal(kl_gpc_trylock(&g->a, 8, &p), -EAGAIN);
		kl_racepoint_release(points[i]);
		assert_int_equal(join(&c), 0);
		assert_true(kl_gpc_check(&g->a, 8));
	}
}

/*
 * B1, G8: a cache that is valid, but stale, and whose page changes, is not handed out while its
 * pointer is exchanged.
 */
static void check_while_page_changes(void **state)
{
	struct gpc_fixture *g = *state;
	struct call c = {.c = &g->a, .what = REFRESH};
	void *p;

	NEED_RACEPOINTS;
	assert_int_equal(kl_gpc_activate(&g->a, PG, 8), 0);
	assert_int_equal(set(&g->f.vm, 0, 0, 0, 0, NULL), 0);
	assert_int_equal(set(&g->f.vm, 0, 0, 0, PG * 2, g->f.ram + 4 * PG), 0);
	start_until(&c, "gpc-populated");
	assert_false(kl_gpc_check(&g->a, 8));
	assert_int_equal(kl_gpc_trylock(&g->a, 8, &p), -EAGAIN);
	kl_racepoint_release("gpc-populated");
	assert_int_equal(join(&c), 0);
	assert_int_equal(use(&g->a, 8, &p), 0);
	assert_ptr_equal(p, g->f.ram + 5 * PG);
}

/*
 * B2, G8, N2: the bracket has made the cache invalid, and has not come to stage 2 yet, where
 * in_progress would rise. A refresh now waits for its end.
 */
static void refresh_before_in_progress(void **state)
{
	struct gpc_fixture *g = *state;
	struct call c = {.c = &g->a, .what = REFRESH};
	struct open_bracket b = {.vanish = true};

	NEED_RACEPOINTS;
	assert_int_equal(kl_gpc_activate(&g->a, PG, 8), 0);
	kl_racepoint_arm("notifier-gpcs-done", 1);
	start_bracket(&b, g->f.ram + PG, PG);
	assert_true(kl_racepoint_wait("notifier-gpcs-done", TIMEOUT));
	assert_int_equal(g->f.vm.mmu_invalidate_in_progress, 0);
	/* It finds the page, and must not keep it: it begins to wait. */
	kl_racepoint_arm("notifier-update-waits", 1);
	start(&c);
	assert_true(kl_racepoint_wait("notifier-update-waits", TIMEOUT));
	assert_false(kl_gpc_check(&g->a, 8));
	kl_racepoint_release("notifier-gpcs-done");
	wait_begun(&b);
	assert_false(kl_gpc_check(&g->a, 8));
	kl_racepoint_release("notifier-update-waits");
	finish_bracket(&b);
	assert_int_equal(join(&c), -EFAULT);
	assert_false(kl_gpc_check(&g->a, 8));
}

/*
 * G8, N3: the page was not there, and came, in a bracket of its own, before the refresh looked for
 * one. What the failure says is old.
 */
static void page_comes_during_refresh(void **state)
{
	struct gpc_fixture *g = *state;
	struct kl_notifier_range r = range_of(g->f.ram + PG, PG);
	struct call c = {.c = &g->a, .what = REFRESH};

	NEED_RACEPOINTS;
	assert_int_equal(kl_gpc_activate(&g->a, PG, 8), 0);
	vanish(g->f.ram + PG, PG);
	start_until(&c, "gpc-populated");
	assert_int_equal(kl_notifier_begin(&r), 0);
	assert_int_equal(mprotect(g->f.ram + PG, PG, PROT_READ | PROT_WRITE), 0);
	kl_notifier_end(&r);
	kl_racepoint_release("gpc-populated");
	assert_int_equal(join(&c), 0);
	assert_true(kl_gpc_check(&g->a, 8));
}

/* B2, G8, N3: a whole bracket while the page is being resolved. */
static void bracket_during_refresh(void **state)
{
	struct gpc_fixture *g = *state;
	struct call c = {.c = &g->a, .what = REFRESH};

	NEED_RACEPOINTS;
	assert_int_equal(kl_gpc_activate(&g->a, PG, 8), 0);
	empty_bracket(g->f.ram + PG, PG);
	start_until(&c, "gpc-populated");
	vanish(g->f.ram + PG, PG);
	kl_racepoint_release("gpc-populated");
	assert_int_equal(join(&c), -EFAULT);
	assert_false(kl_gpc_check(&g->a, 8));
	assert_true(kl_stat_get(&g->f.vm.stats.gpc[KL_GPC_USER].retries) > 0);
}

/* B2, G8: the count first, the sequence second: a bracket that ends between the two looks is seen.
 */
static void bracket_ends_between_looks(void **state)
{
	struct gpc_fixture *g = *state;
	struct call c = {.c = &g->a, .what = REFRESH};

	NEED_RACEPOINTS;
	assert_int_equal(kl_gpc_activate(&g->a, PG, 8), 0);
	empty_bracket(g->f.ram + PG, PG);
	start_until(&c, "gpc-not-in-flight");
	vanish(g->f.ram + PG, PG);
	kl_racepoint_release("gpc-not-in-flight");
	assert_int_equal(join(&c), -EFAULT);
}

/* B3, G7: two refreshes of one cache, the page changes in between: one after the other. */
static void two_refreshers(void **state)
{
	struct gpc_fixture *g = *state;
	struct call first = {.c = &g->a, .what = REFRESH}, second = {.c = &g->a, .what = REFRESH};
	void *p;

	NEED_RACEPOINTS;
	assert_int_equal(kl_gpc_activate(&g->a, PG, 8), 0);
	empty_bracket(g->f.ram + PG, PG);
	start_until(&first, "gpc-populate");
	/* The other would find another page. */
	assert_int_equal(set(&g->f.vm, 0, 0, 0, 0, NULL), 0);
	assert_int_equal(set(&g->f.vm, 0, 0, 0, PG * 2, g->f.ram + 4 * PG), 0);
	start_until(&second, "gpc-lock-waits");
	kl_racepoint_release("gpc-lock-waits");
	assert_false(atomic_load(&second.done));
	kl_racepoint_release("gpc-populate");
	assert_int_equal(join(&first), 0);
	assert_int_equal(join(&second), 0);
	assert_int_equal(use(&g->a, 8, &p), 0);
	assert_ptr_equal(p, g->f.ram + 5 * PG);
	assert_int_equal(indexed(g), 1);
}

/*
 * B4, G6, S5: a refresh has read a generation and has not resolved yet; another thread that sees
 * that generation does not take the old page for the new one.
 */
static void generation_before_lookup(void **state)
{
	struct gpc_fixture *g = *state;
	struct call c = {.c = &g->a, .what = REFRESH};
	void *p;

	NEED_RACEPOINTS;
	assert_int_equal(kl_gpc_activate(&g->a, PG, 8), 0);
	assert_int_equal(set(&g->f.vm, 0, 0, 0, 0, NULL), 0);
	assert_int_equal(set(&g->f.vm, 0, 0, 0, PG * 2, g->f.ram + 4 * PG), 0);
	start_until(&c, "gpc-looked-up");
	assert_false(kl_gpc_check(&g->a, 8));
	assert_int_equal(kl_gpc_trylock(&g->a, 8, &p), -EAGAIN);
	kl_racepoint_release("gpc-looked-up");
	assert_int_equal(join(&c), 0);
	assert_int_equal(use(&g->a, 8, &p), 0);
	assert_ptr_equal(p, g->f.ram + 5 * PG);
}

/* B4, S5, B31: the slot goes while a refresh that has found it resolves. */
static void slot_goes_during_refresh(void **state)
{
	struct gpc_fixture *g = *state;
	struct call c = {.c = &g->a, .what = LOCK};

	NEED_RACEPOINTS;
	assert_int_equal(kl_gpc_activate(&g->a, PG, 8), 0);
	empty_bracket(g->f.ram + PG, PG);
	start_until(&c, "gpc-populated");
	assert_int_equal(set(&g->f.vm, 0, 0, 0, 0, NULL), 0);
	kl_racepoint_release("gpc-populated");
	assert_int_equal(join(&c), -EFAULT);
	assert_false(kl_gpc_check(&g->a, 8));
}

static void *move_slot(void *arg)
{
	struct slot_change *c = arg;

	c->r = set(&c->f->vm, 0, 0, c->gpa, NPAGES * PG, c->f->ram);
	return NULL;
}

/* G1, G6: while a slot changes, lock sleeps; nothing is handed out through the invalid slot. */
static void lock_during_slot_change(void **state)
{
	struct gpc_fixture *g = *state;
	struct slot_change m = {&g->f, 0x1000000, 0, -1};
	struct call c = {.c = &g->a, .what = LOCK};
	pthread_t updater;
	void *p;

	NEED_RACEPOINTS;
	assert_int_equal(kl_gpc_activate(&g->a, PG, 8), 0);
	kl_racepoint_arm("memslot-invalid", 1);
	pthread_create(&updater, NULL, move_slot, &m);
	assert_true(kl_racepoint_wait("memslot-invalid", TIMEOUT));
	assert_false(kl_gpc_check(&g->a, 8));
	assert_int_equal(kl_gpc_trylock(&g->a, 8, &p), -EAGAIN);
	start_until(&c, "gpc-waits-for-slots");
	kl_racepoint_release("gpc-waits-for-slots");
	assert_false(atomic_load(&c.done));
	kl_racepoint_release("memslot-invalid");
	pthread_join(updater, NULL);
	assert_int_equal(m.r, 0);
	assert_int_equal(join(&c), -EFAULT);
	assert_int_equal(kl_gpc_activate(&g->a, 0x1000000 + PG, 8), 0);
	assert_int_equal(use(&g->a, 8, &p), 0);
	assert_ptr_equal(p, g->f.ram + PG);
}

/* B30, G9: a refresh of a valid cache keeps it; of one whose page is the same, its place. */
static void refresh_of_valid(void **state)
{
	struct gpc_fixture *g = *state;
	uint64_t changes, bias;
	void *p;

	assert_int_equal(kl_gpc_activate(&g->a, PG, 8), 0);
	changes = g->a.gpcs->changes;
	bias = kl_bias_state(&g->a.bias);
	assert_int_equal(kl_gpc_refresh(&g->a, 8), 0);
	assert_int_equal(kl_bias_state(&g->a.bias), bias);
	assert_int_equal(g->a.gpcs->changes, changes);
	/* Elsewhere a slot comes: the tag is old, the page is the same, nothing is torn down. */
	assert_int_equal(set(&g->f.vm, 1, 0, 0x4000000, PG, g->f.ram), 0);
	assert_false(kl_gpc_check(&g->a, 8));
	assert_int_equal(use(&g->a, 8, &p), 0);
	assert_int_equal(kl_bias_state(&g->a.bias), bias);
	/* Invalidated, and the page is the same again. */
	empty_bracket(g->f.ram + PG, PG);
	assert_int_equal(use(&g->a, 8, &p), 0);
	assert_ptr_equal(p, g->f.ram + PG);
	assert_int_equal(g->a.gpcs->changes, changes);
}

/* B12, G9: an error at each step of activation, refresh and move leaves nothing behind twice or not
 * at all; teardown counts. */
static void errors_balance(void **state)
{
	static const char *const steps[] = {"gpc-index", "populate", "populate-hwpoison"};
	struct gpc_fixture *g = *state;
	void *p;

	if (!kl_failpoints_enabled())
		skip();
	for (unsigned i = 0; i < KL_ARRAY_SIZE(steps); i++)
		for (unsigned at = 0; at < 3; at++) {
			int r;

			/* Into the index; the same page; another page. */
			if (at == 1)
				assert_int_equal(kl_gpc_activate(&g->a, PG, 8), 0);
			if (at == 1)
				empty_bracket(g->f.ram + PG, PG);
			if (at == 2) {
				assert_int_equal(set(&g->f.vm, 0, 0, 0, 0, NULL), 0);
				assert_int_equal(set(&g->f.vm, 0, 0, 0, PG * 2, g->f.ram + 4 * PG),
						 0);
			}
			kl_failpoint_arm(steps[i], 1);
			r = at ? kl_gpc_refresh(&g->a, 8) : kl_gpc_activate(&g->a, PG, 8);
			if (kl_failpoint_disarm(steps[i]))
				assert_int_equal(r, at && i ? (i == 1 ? -EFAULT : -EHWPOISON)
						    : i     ? 0
							    : -ENOMEM);
			assert_true(indexed(g) <= 1);
			if (r)
				assert_false(kl_gpc_check(&g->a, 8));
			/* And it works afterwards. */
			assert_int_equal(kl_gpc_activate(&g->a, PG, 8), 0);
			assert_int_equal(use(&g->a, 8, &p), 0);
			assert_int_equal(indexed(g), 1);
			if (at == 2) {
				assert_int_equal(set(&g->f.vm, 0, 0, 0, 0, NULL), 0);
				/* The lookup fails after one that succeeded. */
				assert_int_equal(use(&g->a, 8, &p), -EFAULT);
				assert_int_equal(indexed(g), 0);
				assert_int_equal(use(&g->a, 8, &p), -EFAULT);
				assert_int_equal(set(&g->f.vm, 0, 0, 0, NPAGES * PG, g->f.ram), 0);
			}
			if (at != 1)
				assert_int_equal(kl_gpc_deactivate(&g->a), 0);
			if (at != 1)
				assert_int_equal(indexed(g), 0);
		}
}

/* ---- activation ---------------------------------------------------------------------------- */

/* B5, G5, G7: deactivated while a refresh resolves: it ends inactive and not valid. */
static void deactivate_during_refresh(void **state)
{
	struct gpc_fixture *g = *state;
	struct call c = {.c = &g->a, .what = REFRESH}, d = {.c = &g->a, .what = DEACTIVATE};
	void *p;

	NEED_RACEPOINTS;
	assert_int_equal(kl_gpc_activate(&g->a, PG, 8), 0);
	empty_bracket(g->f.ram + PG, PG);
	start_until(&c, "gpc-populated");
	start_until(&d, "gpc-lock-waits");
	kl_racepoint_release("gpc-lock-waits");
	kl_racepoint_release("gpc-populated");
	join(&c);
	assert_int_equal(join(&d), 0);
	assert_false(kl_gpc_check(&g->a, 8));
	assert_false(kl_bias_state(&g->a.bias) & KL_BIAS_OPEN);
	assert_int_equal(indexed(g), 0);
	assert_int_equal(use(&g->a, 8, &p), -EINVAL);
	/* Its memory goes; who comes next must not see it. */
	vanish(g->f.ram + PG, PG);
	assert_int_equal(kl_gpc_activate(&g->a, 2 * PG, 8), 0);
	assert_int_equal(use(&g->a, 8, &p), 0);
	assert_ptr_equal(p, g->f.ram + 2 * PG);
}

/* B6, G6: an inactive cache cannot be refreshed, nor used; activated again it works. */
static void refresh_of_inactive(void **state)
{
	struct gpc_fixture *g = *state;
	void *p;

	assert_int_equal(kl_gpc_refresh(&g->a, 8), -EINVAL);
	assert_int_equal(kl_gpc_activate(&g->a, PG, 8), 0);
	assert_int_equal(kl_gpc_deactivate(&g->a), 0);
	assert_int_equal(kl_gpc_refresh(&g->a, 8), -EINVAL);
	assert_false(kl_gpc_check(&g->a, 8));
	assert_int_equal(use(&g->a, 8, &p), -EINVAL);
	assert_int_equal(kl_gpc_trylock(&g->a, 8, &p), -EAGAIN);
	assert_int_equal(kl_gpc_activate(&g->a, PG, 8), 0);
	assert_int_equal(use(&g->a, 8, &p), 0);
	assert_ptr_equal(p, g->f.ram + PG);
	/* G12: as often as one likes. */
	assert_int_equal(kl_gpc_deactivate(&g->a), 0);
	assert_int_equal(kl_gpc_deactivate(&g->a), 0);
}

/* B7, G12: the cache moves while a reader holds it: the move waits, the reader keeps its page. */
static void activate_under_reader(void **state)
{
	struct gpc_fixture *g = *state;
	struct call c = {.c = &g->a, .what = ACTIVATE, .addr = 2 * PG};
	void *p;

	NEED_RACEPOINTS;
	assert_int_equal(kl_gpc_activate(&g->a, PG, 8), 0);
	assert_int_equal(kl_gpc_lock(&g->a, 8, &p), 0);
	kl_racepoint_arm("bias-waits", 1);
	start(&c);
	assert_true(kl_racepoint_wait("bias-waits", TIMEOUT));
	kl_racepoint_release("bias-waits");
	assert_false(atomic_load(&c.done));
	assert_true(kl_bias_busy(&g->a.bias));
	*(volatile uint64_t *)p = 7;
	assert_true(kl_gpc_unlock(&g->a, false));
	assert_int_equal(join(&c), 0);
	assert_int_equal(g->f.ram[PG], 7);
	assert_int_equal(use(&g->a, 8, &p), 0);
	assert_ptr_equal(p, g->f.ram + 2 * PG);
}

/* B8, G12: activation of a live cache moves it cleanly; for the same address it keeps it. */
static void activate_twice(void **state)
{
	struct gpc_fixture *g = *state;
	uint64_t bias;
	void *p;

	assert_int_equal(kl_gpc_activate(&g->a, PG, 8), 0);
	bias = kl_bias_state(&g->a.bias);
	assert_int_equal(kl_gpc_activate(&g->a, PG, 16), 0);
	assert_int_equal(kl_bias_state(&g->a.bias), bias);
	assert_int_equal(kl_gpc_activate(&g->a, 3 * PG, 8), 0);
	assert_int_equal(use(&g->a, 8, &p), 0);
	assert_ptr_equal(p, g->f.ram + 3 * PG);
	/* Notifiers find it where it is, and not where it was. */
	empty_bracket(g->f.ram + PG, PG);
	assert_true(kl_gpc_check(&g->a, 8));
	empty_bracket(g->f.ram + 3 * PG, PG);
	assert_false(kl_gpc_check(&g->a, 8));
	/* From one kind to the other. */
	assert_int_equal(kl_gpc_activate_hva(&g->a, kl_hva(g->f.ram + 5 * PG), 8), 0);
	assert_int_equal(use(&g->a, 8, &p), 0);
	assert_ptr_equal(p, g->f.ram + 5 * PG);
	assert_int_equal(kl_gpc_activate(&g->a, PG, 8), 0);
	assert_int_equal(use(&g->a, 8, &p), 0);
	assert_ptr_equal(p, g->f.ram + PG);
	assert_int_equal(indexed(g), 1);
}

/* B9, G4: an area that does not fit in its page is refused, and the cache is as it was. */
static void area_past_the_page(void **state)
{
	struct gpc_fixture *g = *state;
	unsigned seed = 1;
	void *p;

	for (int i = 0; i < 2000; i++) {
		uint64_t offset = (unsigned)rand_r(&seed) % PG, gpa = PG + offset;
		size_t len = i % 7 ? (size_t)rand_r(&seed) % (2 * PG) : (size_t) - (i % 5000);
		bool fit = len && len <= PG - offset;
		int r = i & 1 ? kl_gpc_activate(&g->a, gpa, len)
			      : kl_gpc_activate_hva(&g->a, kl_hva(g->f.ram + gpa), len);

		assert_int_equal(r, fit ? 0 : -EINVAL);
		assert_int_equal(g->a.active, fit);
		assert_int_equal(indexed(g), fit);
		if (!fit) {
			assert_int_equal(kl_gpc_refresh(&g->a, 8), -EINVAL);
			continue;
		}
		assert_int_equal(use(&g->a, len, &p), 0);
		assert_ptr_equal(p, g->f.ram + gpa);
		/* G2, G4: a later length is checked, too. */
		assert_int_equal(kl_gpc_refresh(&g->a, PG - offset + 1), -EINVAL);
		assert_int_equal(use(&g->a, PG - offset + 1, &p), -EINVAL);
		assert_int_equal(use(&g->a, 0, &p), -EINVAL);
		assert_true(kl_gpc_check(&g->a, PG - offset));
		assert_false(kl_gpc_check(&g->a, PG - offset + 1));
		assert_int_equal(kl_gpc_deactivate(&g->a), 0);
	}
}

/* B10, G3: INVALID_GPA is no address, and makes no hva-based cache. */
static void invalid_gpa(void **state)
{
	struct gpc_fixture *g = *state;

	assert_int_equal(kl_gpc_activate(&g->a, KL_INVALID_GPA, 1), -EINVAL);
	assert_false(g->a.active);
	assert_int_equal(kl_gpc_activate_hva(&g->a, (kl_hva_t){0}, 1), -EINVAL);
	assert_int_equal(kl_gpc_activate_hva(&g->a, (kl_hva_t){1ull << 47}, 1), -EINVAL);
	assert_int_equal(kl_gpc_activate_hva(&g->a, (kl_hva_t){KL_INVALID_GPA}, 1), -EINVAL);
	assert_false(g->a.active);
	/* An active one stays. */
	assert_int_equal(kl_gpc_activate(&g->a, PG, 8), 0);
	assert_int_equal(kl_gpc_activate(&g->a, KL_INVALID_GPA, 1), -EINVAL);
	assert_true(kl_gpc_check(&g->a, 8));
}

/* B11, G9, G10: within its page the pointer follows the offset. */
static void offset_in_the_page(void **state)
{
	struct gpc_fixture *g = *state;
	void *p;

	for (uint64_t offset = 0; offset < PG; offset += 504) {
		assert_int_equal(kl_gpc_activate(&g->a, PG + offset, 8), 0);
		assert_int_equal(use(&g->a, 8, &p), 0);
		assert_ptr_equal(p, g->f.ram + PG + offset);
		assert_int_equal(kl_gpc_activate_hva(&g->b, kl_hva(g->f.ram + offset), 8), 0);
		assert_int_equal(use(&g->b, 8, &p), 0);
		assert_ptr_equal(p, g->f.ram + offset);
		assert_int_equal(indexed(g), 2);
	}
}

/* B29, G2: no call but activate takes an address, so two users cannot undo each other's. */
static void only_activate_moves(void **state)
{
	struct gpc_fixture *g = *state;
	struct call c[2] = {{.c = &g->a, .what = LOCK}, {.c = &g->a, .what = LOCK}};
	uint64_t refreshes;

	/* Types are the test: these are all the ways to refresh. */
	int (*refresh)(struct kl_gpc *, size_t) = kl_gpc_refresh;
	int (*lock)(struct kl_gpc *, size_t, void **) = kl_gpc_lock_slow;

	assert_int_equal(kl_gpc_activate(&g->a, PG, 8), 0);
	refreshes = kl_stat_get(&g->f.vm.stats.gpc[KL_GPC_USER].refreshes);
	for (int i = 0; i < 50; i++) {
		start(&c[0]);
		start(&c[1]);
		assert_int_equal(join(&c[0]), 0);
		assert_int_equal(join(&c[1]), 0);
		assert_int_equal(refresh(&g->a, 8), 0);
		assert_int_equal(lock(&g->a, 8, &c[0].p), 0);
		assert_true(kl_gpc_unlock(&g->a, false));
	}
	assert_int_equal(kl_stat_get(&g->f.vm.stats.gpc[KL_GPC_USER].refreshes), refreshes);
}

/* ---- the dirty log ------------------------------------------------------------------------- */

static bool logged(struct gpc_fixture *g, unsigned page)
{
	uint64_t log = 0;

	assert_int_equal(kl_dirty_log_get(&g->f.vm, 0, 0, &log, false), 0);
	return log >> page & 1;
}

/* B13, G13, D3: what was written is in the log when unlock returns, each time. */
static void dirty_at_unlock(void **state)
{
	struct gpc_fixture *g = *state;
	void *p;

	assert_int_equal(set(&g->f.vm, 0, KVM_MEM_LOG_DIRTY_PAGES, 0, NPAGES * PG, g->f.ram), 0);
	assert_int_equal(kl_gpc_activate(&g->a, 3 * PG, 8), 0);
	assert_false(logged(g, 3)); /* to make it valid writes nothing */
	for (int i = 0; i < 3; i++) {
		assert_int_equal(kl_gpc_lock(&g->a, 8, &p), 0);
		(*(volatile uint64_t *)p)++;
		assert_true(kl_gpc_unlock(&g->a, true));
		assert_true(logged(g, 3));
		assert_int_equal(use(&g->a, 8, &p), 0);
		assert_false(logged(g, 3));
	}
	/* A fixed address has no log. */
	assert_int_equal(kl_gpc_activate_hva(&g->b, kl_hva(g->f.ram + 4 * PG), 8), 0);
	assert_int_equal(kl_gpc_lock(&g->b, 8, &p), 0);
	assert_true(kl_gpc_unlock(&g->b, true));
	assert_false(logged(g, 4));
}

/* B13, G13: a log that is read between the store and the unlock does not swallow the bit. */
static void log_read_before_unlock(void **state)
{
	struct gpc_fixture *g = *state;
	void *p;

	assert_int_equal(set(&g->f.vm, 0, KVM_MEM_LOG_DIRTY_PAGES, 0, NPAGES * PG, g->f.ram), 0);
	assert_int_equal(kl_gpc_activate(&g->a, 3 * PG, 8), 0);
	assert_int_equal(kl_gpc_lock(&g->a, 8, &p), 0);
	*(volatile uint64_t *)p = 1;
	assert_false(logged(g, 3));
	assert_true(kl_gpc_unlock(&g->a, true));
	assert_true(logged(g, 3));
}

struct flags_change {
	struct gpc_fixture *g;
	uint32_t flags;
	_Atomic bool done;
	int r;
};

static void *change_flags(void *arg)
{
	struct flags_change *c = arg;

	c->r = set(&c->g->f.vm, 0, c->flags, 0, NPAGES * PG, c->g->f.ram);
	atomic_store(&c->done, true);
	return NULL;
}

/* G13, S8: the log goes with its slot's flag: not before who holds a pointer has marked in it. */
static void logging_ends_under_holder(void **state)
{
	struct gpc_fixture *g = *state;
	struct flags_change c = {.g = g};
	pthread_t updater;
	void *p;

	NEED_RACEPOINTS;
	assert_int_equal(set(&g->f.vm, 0, KVM_MEM_LOG_DIRTY_PAGES, 0, NPAGES * PG, g->f.ram), 0);
	assert_int_equal(kl_gpc_activate(&g->a, 3 * PG, 8), 0);
	assert_int_equal(kl_gpc_lock(&g->a, 8, &p), 0);
	kl_racepoint_arm("bias-waits", 1);
	pthread_create(&updater, NULL, change_flags, &c);
	assert_true(kl_racepoint_wait("bias-waits", TIMEOUT));
	kl_racepoint_release("bias-waits");
	assert_false(atomic_load(&c.done));
	assert_true(kl_gpc_unlock(&g->a, true));
	pthread_join(updater, NULL);
	assert_int_equal(c.r, 0);
	assert_int_equal(use(&g->a, 8, &p), 0);
	/* And it begins under one, who then marks in the new log. */
	c.flags = KVM_MEM_LOG_DIRTY_PAGES;
	change_flags(&c);
	assert_int_equal(c.r, 0);
	assert_int_equal(kl_gpc_lock(&g->a, 8, &p), 0);
	assert_true(kl_gpc_unlock(&g->a, true));
	assert_true(logged(g, 3));
}

/*
 * G13, S5: a refresh has found a page in a slot that is replaced before it goes on: its tag is old
 * then. The next one finds the same page, and a log at the same place, in which it has another bit.
 */
static void bit_in_another_log(void **state)
{
	struct gpc_fixture *g = *state;
	struct call c = {.c = &g->a, .what = REFRESH};
	uint64_t log = 0;
	void *p;

	NEED_RACEPOINTS;
	assert_int_equal(set(&g->f.vm, 0, 0, 0, 0, NULL), 0);
	assert_int_equal(
		set(&g->f.vm, 0, KVM_MEM_LOG_DIRTY_PAGES, 2 * PG, 8 * PG, g->f.ram + 2 * PG), 0);
	assert_int_equal(kl_gpc_activate(&g->a, 9 * PG, 8), 0);
	empty_bracket(g->f.ram + 9 * PG, PG);
	start_until(&c, "gpc-looked-up");
	assert_int_equal(set(&g->f.vm, 0, 0, 0, 0, NULL), 0);
	assert_int_equal(
		set(&g->f.vm, 1, KVM_MEM_LOG_DIRTY_PAGES, 8 * PG, 8 * PG, g->f.ram + 8 * PG), 0);
	kl_racepoint_release("gpc-looked-up");
	assert_int_equal(join(&c), 0);
	assert_false(kl_gpc_check(&g->a, 8));
	assert_int_equal(kl_gpc_lock(&g->a, 8, &p), 0);
	assert_ptr_equal(p, g->f.ram + 9 * PG);
	assert_true(kl_gpc_unlock(&g->a, true));
	assert_int_equal(kl_dirty_log_get(&g->f.vm, 0, 1, &log, false), 0);
	assert_int_equal(log, 1 << 1);
}

/* ---- brackets ------------------------------------------------------------------------------ */

/* N2, S8: a bracket, and the end of a slot, wait for the holder; for nobody else's page. */
static void bracket_waits_for_holder(void **state)
{
	struct gpc_fixture *g = *state;
	struct slot_change m = {&g->f, 0x1000000, 0, -1};
	struct open_bracket b = {0};
	pthread_t updater;
	void *p;

	NEED_RACEPOINTS;
	assert_int_equal(kl_gpc_activate(&g->a, PG, 8), 0);
	assert_int_equal(kl_gpc_lock(&g->a, 8, &p), 0);
	kl_racepoint_arm("bias-waits", 1);
	start_bracket(&b, g->f.ram + PG, PG);
	assert_true(kl_racepoint_wait("bias-waits", TIMEOUT));
	kl_racepoint_release("bias-waits");
	assert_false(atomic_load(&b.begun));
	*(volatile uint64_t *)p = 1;
	assert_true(kl_gpc_unlock(&g->a, true));
	wait_begun(&b);
	finish_bracket(&b);

	assert_int_equal(kl_gpc_lock(&g->a, 8, &p), 0);
	kl_racepoint_arm("bias-waits", 1);
	pthread_create(&updater, NULL, move_slot, &m);
	assert_true(kl_racepoint_wait("bias-waits", TIMEOUT));
	kl_racepoint_release("bias-waits");
	*(volatile uint64_t *)p = 2;
	assert_true(kl_gpc_unlock(&g->a, true));
	pthread_join(updater, NULL);
}

/* B15, G15, N4: brackets over memory without a cache disturb none, held or not, and wait for
 * nobody. */
static void unrelated_bracket(void **state)
{
	struct gpc_fixture *g = *state;
	uint64_t bias;
	void *p;

	assert_int_equal(kl_gpc_activate(&g->a, PG, 8), 0);
	bias = kl_bias_state(&g->a.bias);
	assert_int_equal(kl_gpc_lock(&g->a, 8, &p), 0);
	for (int i = 0; i < 1000; i++)
		empty_bracket(g->f.ram + (i & 1 ? 0 : 2) * PG, PG);
	/* Not even for a moment. */
	assert_int_equal(kl_bias_state(&g->a.bias), bias);
	assert_true(kl_gpc_check(&g->a, 8));
	assert_true(kl_gpc_unlock(&g->a, false));
	assert_int_equal(kl_stat_get(&g->f.vm.stats.gpc[KL_GPC_USER].invalidations), 0);
}

/* N5, G15, B28: may_block=false: EAGAIN with the cache as it was if it is held, else done. */
static void nonblocking_bracket(void **state)
{
	struct gpc_fixture *g = *state;
	struct open_bracket b = {0};
	uint64_t refreshes;
	void *p;

	assert_int_equal(kl_gpc_activate(&g->a, PG, 8), 0);
	assert_int_equal(kl_gpc_activate_hva(&g->b, kl_hva(g->f.ram + 2 * PG), 8), 0);
	refreshes = kl_stat_get(&g->f.vm.stats.gpc[KL_GPC_USER].refreshes);
	assert_int_equal(kl_gpc_lock(&g->a, 8, &p), 0);
	b.r = range_of(g->f.ram, 4 * PG);
	b.r.may_block = false;
	atomic_store(&b.finish, true);
	pthread_create(&b.thread, NULL, open_bracket_thread, &b);
	pthread_join(b.thread, NULL);
	assert_int_equal(b.ret, -EAGAIN);
	assert_true(kl_gpc_check(&g->a, 8));
	assert_true(kl_gpc_check(&g->b, 8));
	assert_true(kl_gpc_unlock(&g->a, false));
	assert_int_equal(use(&g->a, 8, &p), 0);
	assert_int_equal(use(&g->b, 8, &p), 0);
	assert_int_equal(kl_stat_get(&g->f.vm.stats.gpc[KL_GPC_USER].refreshes), refreshes);
	assert_int_equal(kl_stat_get(&g->f.vm.stats.gpc[KL_GPC_USER].invalidations), 0);
	/* Stage 2 refuses: the caches are as they were, too. */
	assert_int_equal(kl_mmu_fault(&g->f.vcpu, 0, KL_ACC_READ), KL_FAULT_MAPPED);
	kl_vcpu_enter_guest(&g->f.vcpu);
	pthread_create(&b.thread, NULL, open_bracket_thread, &b);
	pthread_join(b.thread, NULL);
	kl_vcpu_leave_guest(&g->f.vcpu);
	assert_int_equal(b.ret, -EAGAIN);
	assert_true(kl_gpc_check(&g->a, 8));
	assert_true(kl_gpc_check(&g->b, 8));
	/* Nobody holds anything. */
	pthread_create(&b.thread, NULL, open_bracket_thread, &b);
	pthread_join(b.thread, NULL);
	assert_int_equal(b.ret, 0);
	assert_false(kl_gpc_check(&g->a, 8));
	assert_false(kl_gpc_check(&g->b, 8));
}

/*
 * B32, N4, G5: a bracket has looked into the index and found nothing; then a cache's address comes,
 * and the page is resolved before the host call. It does not become valid before the bracket ends.
 */
static void address_during_bracket(void **state)
{
	struct gpc_fixture *g = *state;
	uint8_t *m = mmap(NULL, PG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct call c = {.c = &g->a, .what = ACTIVATE_HVA, .addr = (uint64_t)m};
	struct open_bracket b = {0};
	void *p;

	NEED_RACEPOINTS;
	start_bracket(&b, m, PG);
	wait_begun(&b);
	start_until(&c, "notifier-update-waits");
	assert_true(g->a.active);
	assert_false(kl_gpc_check(&g->a, 8));
	mprotect(m, PG, PROT_NONE); /* the bracket's host call */
	assert_false(kl_gpc_check(&g->a, 8));
	kl_racepoint_release("notifier-update-waits");
	finish_bracket(&b);
	assert_int_equal(join(&c), 0);
	assert_int_equal(use(&g->a, 8, &p), -EFAULT);
	munmap(m, PG);
}

/*
 * B32, G5, N3: a whole bracket over memory without a slot, between insert and use: it ends after
 * the address had entered, so the sequence has moved.
 */
static void bracket_between_insert_and_use(void **state)
{
	static const char *const points[] = {"gpc-indexed", "gpc-populated", "gpc-not-in-flight"};
	struct gpc_fixture *g = *state;

	NEED_RACEPOINTS;
	for (unsigned i = 0; i < KL_ARRAY_SIZE(points); i++) {
		uint8_t *m =
			mmap(NULL, PG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		struct call c = {.c = &g->a, .what = ACTIVATE_HVA, .addr = (uint64_t)m};

		start_until(&c, points[i]);
		vanish(m, PG);
		kl_racepoint_release(points[i]);
		assert_int_equal(join(&c), 0);
		assert_false(kl_gpc_check(&g->a, 8));
		assert_int_equal(kl_gpc_deactivate(&g->a), 0);
		munmap(m, PG);
	}
}

/* B32, G5: it began before the address came, and ends after: only its end can tell. */
static void bracket_ends_after_insert(void **state)
{
	struct gpc_fixture *g = *state;
	uint8_t *m = mmap(NULL, PG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct call c = {.c = &g->a, .what = ACTIVATE_HVA, .addr = (uint64_t)m};
	struct open_bracket b = {0};

	NEED_RACEPOINTS;
	start_bracket(&b, m, PG);
	wait_begun(&b);
	start_until(&c, "gpc-populated");
	mprotect(m, PG, PROT_NONE); /* the bracket's host call */
	finish_bracket(&b);
	kl_racepoint_release("gpc-populated");
	assert_int_equal(join(&c), 0);
	assert_false(kl_gpc_check(&g->a, 8));
	munmap(m, PG);
}

/* G11: a cache at a host address does not care for slots and generations, but for brackets. */
static void fixed_address_ignores_slots(void **state)
{
	struct gpc_fixture *g = *state;
	uint64_t bias;
	void *p;

	assert_int_equal(kl_gpc_activate_hva(&g->a, kl_hva(g->f.ram + PG), 8), 0);
	bias = kl_bias_state(&g->a.bias);
	assert_int_equal(kl_gpc_lock(&g->a, 8, &p), 0);
	assert_true(kl_gpc_unlock(&g->a, false));
	assert_int_equal(set(&g->f.vm, 0, 0, 0, 0, NULL), 0);
	assert_true(kl_gpc_check(&g->a, 8));
	assert_int_equal(kl_bias_state(&g->a.bias), bias);
	vanish(g->f.ram + PG, PG);
	assert_false(kl_gpc_check(&g->a, 8));
	assert_int_equal(use(&g->a, 8, &p), -EFAULT);
}

/* ---- who holds what ------------------------------------------------------------------------ */

/*
 * B33, G1a: who holds a cache does not refresh another, whose refresh would wait for a bracket that
 * waits for the holder. lock_many works.
 */
static void refresh_by_holder(void **state)
{
	struct gpc_fixture *g = *state;
	struct kl_gpc *both[] = {&g->a, &g->b};
	size_t lens[] = {8, 8};
	struct open_bracket br = {0};
	void *p, *q, *ptrs[2];

	NEED_RACEPOINTS;
	assert_int_equal(kl_gpc_activate(&g->a, PG, 8), 0);
	assert_int_equal(kl_gpc_activate(&g->b, 2 * PG, 8), 0);
	/* Valid ones may be locked together. */
	assert_int_equal(kl_gpc_lock(&g->a, 8, &p), 0);
	assert_int_equal(kl_gpc_lock(&g->b, 8, &q), 0);
	assert_int_equal(kl_bias_held(), 2);
	assert_true(kl_gpc_unlock(&g->a, false));
	assert_true(kl_gpc_unlock(&g->b, false));
	empty_bracket(g->f.ram + 2 * PG, PG);
	assert_int_equal(kl_gpc_lock(&g->a, 8, &p), 0);
	kl_racepoint_arm("bias-waits", 1);
	start_bracket(&br, g->f.ram, 4 * PG);
	assert_true(kl_racepoint_wait("bias-waits", TIMEOUT));
	kl_racepoint_release("bias-waits");
	assert_int_equal(kl_gpc_lock(&g->b, 8, &q), -EDEADLK);
	assert_int_equal(kl_gpc_refresh(&g->b, 8), -EDEADLK);
	assert_int_equal(kl_gpc_activate(&g->b, 2 * PG, 8), -EDEADLK);
	assert_int_equal(kl_gpc_deactivate(&g->a), -EDEADLK);
	assert_int_equal(kl_gpc_lock_many(both, lens, ptrs, 2), -EDEADLK);
	assert_int_equal(kl_bias_held(), 1);
	assert_true(kl_gpc_unlock(&g->a, false));
	wait_begun(&br);
	finish_bracket(&br);
	assert_int_equal(kl_gpc_lock_many(both, lens, ptrs, 2), 0);
	assert_ptr_equal(ptrs[0], g->f.ram + PG);
	assert_ptr_equal(ptrs[1], g->f.ram + 2 * PG);
	assert_true(kl_gpc_unlock(&g->b, true));
	assert_true(kl_gpc_unlock(&g->a, true));
	assert_false(kl_gpc_unlock(&g->a, true));
}

/* B33, G1a: inside one's own bracket nothing is locked, valid or not. */
static void lock_in_own_bracket(void **state)
{
	struct gpc_fixture *g = *state;
	struct kl_notifier_range r = range_of(g->f.ram + 5 * PG, PG);
	void *p;

	assert_int_equal(kl_gpc_activate(&g->a, PG, 8), 0);
	assert_int_equal(use(&g->a, 8, &p), 0);
	assert_int_equal(kl_notifier_begin(&r), 0);
	assert_int_equal(kl_gpc_lock(&g->a, 8, &p), -EDEADLK);
	assert_int_equal(kl_gpc_trylock(&g->a, 8, &p), -EDEADLK);
	assert_int_equal(kl_gpc_refresh(&g->a, 8), -EDEADLK);
	assert_int_equal(kl_gpc_activate(&g->a, PG, 8), -EDEADLK);
	assert_int_equal(kl_gpc_activate_hva(&g->a, kl_hva(g->f.ram), 8), -EDEADLK);
	assert_int_equal(kl_gpc_deactivate(&g->b), 0);
	kl_notifier_end(&r);
	assert_int_equal(use(&g->a, 8, &p), 0);
}

/* ---- memory -------------------------------------------------------------------------------- */

/* G16, B26: activation where nothing is succeeds; the first use says so, and sees what comes. */
static void absent_memory(void **state)
{
	struct gpc_fixture *g = *state;
	uint8_t *m = mmap(NULL, PG, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	void *p;

	assert_int_equal(kl_gpc_activate(&g->a, 0x1000000, 8), 0);
	assert_int_equal(use(&g->a, 8, &p), -EFAULT);
	assert_int_equal(kl_gpc_refresh(&g->a, 8), -EFAULT);
	assert_int_equal(set(&g->f.vm, 1, 0, 0x1000000, PG, m), 0);
	assert_int_equal(use(&g->a, 8, &p), -EFAULT);
	mprotect(m, PG, PROT_READ | PROT_WRITE);
	assert_int_equal(use(&g->a, 8, &p), 0);
	assert_ptr_equal(p, m);
	/* What cannot be written is not there, as in KVM. */
	assert_int_equal(set(&g->f.vm, 2, KVM_MEM_READONLY, 0x2000000, PG, g->f.ram), 0);
	assert_int_equal(kl_gpc_activate(&g->b, 0x2000000, 8), 0);
	assert_int_equal(use(&g->b, 8, &p), -EFAULT);
	assert_int_equal(set(&g->f.vm, 1, 0, 0, 0, NULL), 0);
	munmap(m, PG);
}

/* N7: memory that went without an event is found by lock, not by the holder. */
static void vanished_without_event(void **state)
{
	struct gpc_fixture *g = *state;
	void *p, *m = g->f.ram + PG;

	assert_int_equal(kl_gpc_activate(&g->a, PG, 8), 0);
	assert_int_equal(use(&g->a, 8, &p), 0);
	assert_ptr_equal(mmap(m, PG, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0), m);
	assert_int_equal(use(&g->a, 8, &p), -EFAULT);
	assert_int_equal(kl_gpc_trylock(&g->a, 8, &p), -EAGAIN);
	mprotect(m, PG, PROT_READ | PROT_WRITE);
	assert_int_equal(use(&g->a, 8, &p), 0);
}

/* B34, G17: a valid cache keeps no page: a punched file shrinks, discarded memory goes. */
static void nothing_is_pinned(void **state)
{
	struct gpc_fixture *g = *state;
	int fd = kl_sys_memfd("pinned", PG, 0);
	uint8_t *m = mmap(NULL, PG, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	struct kl_notifier_range r = range_of(m, PG);
	struct stat st;
	unsigned char in_core;
	void *p;

	assert_int_equal(kl_gpc_activate_hva(&g->a, kl_hva(m), 8), 0);
	assert_int_equal(kl_gpc_lock(&g->a, 8, &p), 0);
	*(volatile uint64_t *)p = 1;
	assert_true(kl_gpc_unlock(&g->a, true));
	assert_int_equal(fstat(fd, &st), 0);
	assert_true(st.st_blocks > 0);
	r.event = KL_EVENT_TRUNCATE;
	assert_int_equal(kl_notifier_begin(&r), 0);
	assert_int_equal(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, PG), 0);
	kl_notifier_end(&r);
	assert_int_equal(fstat(fd, &st), 0);
	assert_int_equal(st.st_blocks, 0);
	assert_int_equal(use(&g->a, 8, &p), 0);
	assert_int_equal(*(volatile uint64_t *)p, 0);
	assert_int_equal(kl_gpc_deactivate(&g->a), 0);
	munmap(m, PG);
	kl_sys_close(fd);
	/* Anonymous memory, under a valid cache. */
	assert_int_equal(kl_gpc_activate(&g->a, PG, 8), 0);
	assert_int_equal(mincore(g->f.ram + PG, PG, &in_core), 0);
	assert_true(in_core & 1);
	r = range_of(g->f.ram + PG, PG);
	assert_int_equal(kl_notifier_begin(&r), 0);
	assert_int_equal(madvise(g->f.ram + PG, PG, MADV_DONTNEED), 0);
	kl_notifier_end(&r);
	assert_int_equal(mincore(g->f.ram + PG, PG, &in_core), 0);
	assert_false(in_core & 1);
}

static void defer(int sig, siginfo_t *info, void *uc)
{
	if (kl_engine_active())
		kl_thread_defer_signal(sig, info, uc);
}

static void *interruptible_refresh(void *arg)
{
	struct call *c = arg;

	kl_engine_enter();
	c->r = kl_gpc_refresh(c->c, 8);
	kl_engine_leave();
	return NULL;
}

/* B27, G14: a signal ends a refresh that userfaultfd holds, with EINTR; called again it succeeds.
 */
static void signal_interrupts_refresh(void **state)
{
	struct sigaction sa = {.sa_sigaction = defer, .sa_flags = SA_SIGINFO | SA_RESTART};
	struct uffdio_api api = {.api = UFFD_API};
	struct gpc_fixture *g = *state;
	struct uffdio_register reg = {.range = {(uint64_t)g->f.ram, NPAGES * PG},
				      .mode = UFFDIO_REGISTER_MODE_MISSING};
	struct uffdio_zeropage zero = {.range = {(uint64_t)g->f.ram + PG, PG}};
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	NEED_RACEPOINTS;
	if (KL_TSAN) /* its runtime holds signals back */
		skip();
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
		skip();
	/* Active before, so that activation does not wait itself. */
	assert_int_equal(kl_gpc_activate(&g->a, PG, 8), 0);
	vanish(g->f.ram + PG, PG);
	mprotect(g->f.ram + PG, PG, PROT_READ | PROT_WRITE);
	if (ioctl(uffd, UFFDIO_REGISTER, &reg))
		skip();
	sigaction(SIGUSR1, &sa, NULL);
	for (int before = 0; before < 2; before++) {
		struct call c = {.c = &g->a, .r = 1};
		struct pollfd p = {.fd = uffd, .events = POLLIN};
		struct uffd_msg msg;

		if (before)
			kl_racepoint_arm("gpc-populate", 1);
		pthread_create(&c.thread, NULL, interruptible_refresh, &c);
		if (before)
			assert_true(kl_racepoint_wait("gpc-populate", TIMEOUT));
		else
			assert_int_equal(poll(&p, 1, TIMEOUT), 1);
		pthread_kill(c.thread, SIGUSR1);
		if (before)
			kl_racepoint_release("gpc-populate");
		pthread_join(c.thread, NULL);
		assert_int_equal(c.r, -EINTR);
		assert_false(kl_gpc_check(&g->a, 8));
		while (poll(&p, 1, 0) == 1)
			assert_int_equal(read(uffd, &msg, sizeof(msg)), sizeof(msg));
	}
	assert_int_equal(ioctl(uffd, UFFDIO_ZEROPAGE, &zero), 0);
	assert_int_equal(kl_gpc_refresh(&g->a, 8), 0);
	close(uffd);
}

/* G15: of 10,000 caches a bracket touches those that it is over, and leaves the rest valid. */
static void many_caches(void **state)
{
	enum { N = 10000 };
	struct gpc_fixture *g = *state;
	struct kl_gpc *c = aligned_alloc(64, N * sizeof(*c));
	uint8_t *m =
		mmap(NULL, N / 2 * PG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	unsigned invalid = 0;

	for (unsigned i = 0; i < N; i++) {
		assert_int_equal(kl_gpc_init(&c[i], &g->f.vm, 0, KL_GPC_USER), 0);
		/* Two on each page. */
		assert_int_equal(kl_gpc_activate_hva(&c[i], kl_hva(m + i / 2 * PG + i % 2 * 8), 8),
				 0);
	}
	assert_int_equal(indexed(g), N);
	empty_bracket(m + 100 * PG, 50 * PG);
	for (unsigned i = 0; i < N; i++) {
		bool valid = kl_gpc_check(&c[i], 8);

		invalid += !valid;
		assert_int_equal(valid, i < 200 || i >= 300);
	}
	assert_int_equal(invalid, 100);
	assert_int_equal(kl_stat_get(&g->f.vm.stats.gpc[KL_GPC_USER].invalidations), 100);
	/* In another order than they came. */
	for (unsigned i = 0; i < N; i++)
		kl_gpc_destroy(&c[(i * 7919) % N]);
	assert_int_equal(indexed(g), 0);
	munmap(m, N / 2 * PG);
	free(c);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
#define T(f) cmocka_unit_test_setup_teardown(f, gpc_setup, gpc_teardown)
		T(check_during_refresh),
		T(check_while_page_changes),
		T(refresh_before_in_progress),
		T(bracket_during_refresh),
		T(bracket_ends_between_looks),
		T(two_refreshers),
		T(generation_before_lookup),
		T(slot_goes_during_refresh),
		T(lock_during_slot_change),
		T(refresh_of_valid),
		T(errors_balance),
		T(deactivate_during_refresh),
		T(refresh_of_inactive),
		T(activate_under_reader),
		T(activate_twice),
		T(area_past_the_page),
		T(invalid_gpa),
		T(offset_in_the_page),
		T(only_activate_moves),
		T(page_comes_during_refresh),
		T(dirty_at_unlock),
		T(log_read_before_unlock),
		T(logging_ends_under_holder),
		T(bit_in_another_log),
		T(bracket_waits_for_holder),
		T(unrelated_bracket),
		T(nonblocking_bracket),
		T(address_during_bracket),
		T(bracket_between_insert_and_use),
		T(bracket_ends_after_insert),
		T(fixed_address_ignores_slots),
		T(refresh_by_holder),
		T(lock_in_own_bracket),
		T(absent_memory),
		T(vanished_without_event),
		T(nothing_is_pinned),
		T(signal_interrupts_refresh),
		T(many_caches),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
