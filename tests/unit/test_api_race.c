/* SPDX-License-Identifier: MIT */
/*
 * The library's accesses against concurrent change, with forced interleavings (N2, N5, N7, S4,
 * M6): a thread stands between its lookup and its access, or holds a window, while another one
 * unmaps the page or takes the slot away.
 */
#include "api_env.h"

#include <kvmlet/gpc.h>
#include <kvmlet/track.h>

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

#include "mem/dirty.h"

/* A thread that does one thing; `done` when it has. */
struct worker {
	struct fixture *f;
	pthread_t thread;
	int (*fn)(struct worker *w);
	uint64_t gpa, val;
	_Atomic int done;
	int r;
};

static void *work(void *arg)
{
	struct worker *w = arg;

	w->r = w->fn(w);
	atomic_store(&w->done, 1);
	return NULL;
}

static void start(struct worker *w, struct fixture *f, int (*fn)(struct worker *w), uint64_t gpa)
{
	*w = (struct worker){.f = f, .fn = fn, .gpa = gpa};
	assert_int_equal(pthread_create(&w->thread, NULL, work, w), 0);
}

static int finish(struct worker *w)
{
	pthread_join(w->thread, NULL);
	return w->r;
}

static int do_read(struct worker *w)
{
	return kvmlet_vm_read(w->f->vm, 0, w->gpa, &w->val, sizeof(w->val), NULL);
}

static int do_write(struct worker *w)
{
	w->val = 0x77;
	return kvmlet_vm_write(w->f->vm, 0, w->gpa, &w->val, sizeof(w->val), NULL);
}

static int do_load(struct worker *w)
{
	return kvmlet_vm_load(w->f->vm, 0, w->gpa, 8, &w->val);
}

static int do_add(struct worker *w)
{
	return kvmlet_vm_fetch_add(w->f->vm, 0, w->gpa, 8, 1, &w->val);
}

static int do_unmap(struct worker *w)
{
	unmap(w->f->ram + w->gpa, PG);
	return 0;
}

/* A bracket around nothing. */
static int do_bracket(struct worker *w)
{
	struct kvmlet_notifier_range r = range_of(w->f->ram + w->gpa, PG);
	int ret = kvmlet_notifier_begin(&r);

	if (!ret)
		kvmlet_notifier_end(&r);
	return ret;
}

static int do_try_bracket(struct worker *w)
{
	struct kvmlet_notifier_range r = range_of(w->f->ram + w->gpa, PG);
	int ret;

	r.may_block = 0;
	ret = kvmlet_notifier_begin(&r);
	if (!ret)
		kvmlet_notifier_end(&r);
	return ret;
}

static int do_delete(struct worker *w)
{
	return kvmlet_memslot_set(w->f->vm, 0, 0, 0, 0, kl_hva(NULL));
}

static int do_delete_slot_1(struct worker *w)
{
	return kvmlet_memslot_set(w->f->vm, 1, 0, 0, 0, kl_hva(NULL));
}

/* Somebody in guest mode has been asked to drop his pointers and has not answered. */
static bool flush_is_waiting(struct fixture *f)
{
	struct kl_accessor *a = atomic_load(&f->vm->vm.accessors);

	for (unsigned i = 0; a && i < KL_NR_ACCESSORS; i++)
		if (atomic_load(&a[i].core.mode) == KL_IN_GUEST &&
		    (atomic_load(&a[i].core.requests) & KL_REQ_TLB_FLUSH))
			return true;
	return false;
}

/* @w is a change that must wait for an accessor; it has come to that point and stays there. */
static void assert_waits(struct fixture *f, struct worker *w)
{
	while (!flush_is_waiting(f)) {
		assert_int_equal(atomic_load(&w->done), 0);
		sched_yield();
	}
	for (int i = 0; i < 2000; i++) {
		assert_int_equal(atomic_load(&w->done), 0);
		sched_yield();
	}
}

/*
 * N2: a bracket does not begin while an access stands between its lookup and its touch; the
 * access is as if it had come before; the next one faults again and finds nothing.
 */
static void unmap_during_access(void **state)
{
	struct fixture *f = *state;
	int (*const accesses[])(struct worker *) = {do_read, do_write};
	struct worker access, change, quick;

	NEED_RACEPOINTS;
	for (unsigned i = 0; i < KL_ARRAY_SIZE(accesses); i++) {
		uint64_t gpa = i * PG;

		memset(f->ram + gpa, 0x21, PG);
		kl_racepoint_arm("access-looked-up", 1);
		start(&access, f, accesses[i], gpa);
		assert_true(kl_racepoint_wait("access-looked-up", TIMEOUT));
		start(&quick, f, do_try_bracket, gpa);
		assert_int_equal(finish(&quick), -EAGAIN); /* N5 */
		start(&change, f, do_unmap, gpa);
		assert_waits(f, &change);
		kl_racepoint_release("access-looked-up");
		assert_int_equal(finish(&access), 0);
		if (accesses[i] == do_read)
			assert_int_equal(access.val, 0x2121212121212121);
		finish(&change);
		start(&access, f, accesses[i], gpa);
		assert_int_equal(finish(&access), -EFAULT);
	}
}

/*
 * N2, N7: inside a bracket the memory is gone for a moment. An access that comes then waits for the
 * end, and its answer is that of the memory that is there afterwards.
 */
static void access_meets_bracket(void **state)
{
	struct fixture *f = *state;
	struct kvmlet_notifier_range r = range_of(f->ram, PG);
	struct worker access;

	NEED_RACEPOINTS;
	assert_int_equal(kvmlet_notifier_begin(&r), 0);
	vanish(f->ram, PG);
	kl_racepoint_arm("fault-populate", 1);
	start(&access, f, do_load, 0);
	assert_true(kl_racepoint_wait("fault-populate", TIMEOUT));
	kl_racepoint_release("fault-populate");
	for (int i = 0; i < 2000; i++)
		sched_yield();
	assert_int_equal(atomic_load(&access.done), 0);
	assert_int_equal(mprotect(f->ram, PG, PROT_READ | PROT_WRITE), 0);
	memset(f->ram, 0x55, PG);
	kvmlet_notifier_end(&r);
	assert_int_equal(finish(&access), 0);
	assert_int_equal(access.val, 0x5555555555555555);
}

/*
 * N7: memory that is missing is -EFAULT also if there is no moment without a bracket elsewhere; not
 * so long as one is over it.
 */
static void missing_among_brackets(void **state)
{
	struct fixture *f = *state;
	struct kvmlet_notifier_range elsewhere = range_of(f->ram + 8 * PG, PG);
	static const char *const places[] = {"fault-lookup", "fault-populate"};
	struct worker access;
	int rounds = 0;

	NEED_RACEPOINTS;
	vanish(f->ram, PG);
	kl_racepoint_arm(places[0], 1);
	start(&access, f, do_load, 0);
	for (int at = 0; rounds < 1000; at ^= 1, rounds++) {
		while (!kl_racepoint_wait(places[at], 10) && !atomic_load(&access.done))
			;
		if (atomic_load(&access.done))
			break;
		/* One comes between each look at the sequence and the next. */
		assert_int_equal(kvmlet_notifier_begin(&elsewhere), 0);
		kvmlet_notifier_end(&elsewhere);
		kl_racepoint_arm(places[at ^ 1], 1);
		kl_racepoint_release(places[at]);
	}
	for (int i = 0; i < 2; i++)
		kl_racepoint_release(places[i]);
	assert_int_equal(finish(&access), -EFAULT);
	assert_true(rounds < 1000);
	assert_true(rounds > 2); /* it did look again */
}

/* S4, S8: the same with a slot that is deleted. */
static void delete_during_access(void **state)
{
	struct fixture *f = *state;
	struct worker access, change;

	NEED_RACEPOINTS;
	kl_racepoint_arm("access-looked-up", 1);
	start(&access, f, do_read, 3 * PG);
	assert_true(kl_racepoint_wait("access-looked-up", TIMEOUT));
	start(&change, f, do_delete, 0);
	assert_waits(f, &change);
	kl_racepoint_release("access-looked-up");
	assert_int_equal(finish(&access), 0);
	assert_int_equal(finish(&change), 0);
	start(&access, f, do_read, 3 * PG);
	assert_int_equal(finish(&access), -EFAULT);
}

/* S4: an access that meets a slot while it is marked invalid maps nothing and ends up without. */
static void access_meets_invalid_slot(void **state)
{
	struct fixture *f = *state;
	struct worker access, change;
	kl_hva_t h;

	NEED_RACEPOINTS;
	assert_int_equal(kvmlet_memslot_set(f->vm, 1, 0, 0x100000, PG, kl_hva(f->ram)), 0);
	kl_racepoint_arm("memslot-invalid", 1);
	start(&change, f, do_delete_slot_1, 0);
	assert_true(kl_racepoint_wait("memslot-invalid", TIMEOUT));
	assert_int_equal(kvmlet_memslot_find(f->vm, 0x100000, &h), -EFAULT);
	kl_racepoint_arm("fault-lookup", 1);
	start(&access, f, do_load, 0x100000);
	assert_true(kl_racepoint_wait("fault-lookup", TIMEOUT));
	kl_racepoint_release("fault-lookup");
	for (int i = 0; i < 1000; i++) {
		assert_int_equal(atomic_load(&access.done), 0);
		sched_yield();
	}
	kl_racepoint_release("memslot-invalid");
	assert_int_equal(finish(&change), 0);
	assert_int_equal(finish(&access), -EFAULT);
}

static int do_create_slot_1(struct worker *w)
{
	return kvmlet_memslot_set(w->f->vm, 1, 0, 0x100000, PG, kl_hva(w->f->ram));
}

/* S5: what is translated while a change is being installed is not kept. */
static void translate_during_change(void **state)
{
	struct fixture *f = *state;
	struct worker change;
	kl_hva_t h;

	NEED_RACEPOINTS;
	assert_int_equal(kvmlet_memslot_find(f->vm, 0, &h), 0);
	for (int i = 0; i < 4; i++) {
		kl_racepoint_arm("memslots-published", 1);
		start(&change, f, do_create_slot_1, 0);
		assert_true(kl_racepoint_wait("memslots-published", TIMEOUT));
		assert_true(kvmlet_memslot_generation(f->vm) & 1);
		assert_int_equal(kvmlet_memslot_find(f->vm, 0x100000, &h), 0);
		assert_int_equal(h.addr, kl_hva(f->ram).addr);
		kl_racepoint_release("memslots-published");
		assert_int_equal(finish(&change), 0);
		assert_int_equal(kvmlet_memslot_find(f->vm, 0x100000, &h), 0);
		start(&change, f, do_delete_slot_1, 0);
		assert_int_equal(finish(&change), 0);
		assert_int_equal(kvmlet_memslot_find(f->vm, 0x100000, &h), -EFAULT);
	}
}

/* N2: a bracket over a window waits for its holder; what he wrote is there. */
static void window_against_unmap(void **state)
{
	struct fixture *f = *state;
	struct worker change, access;
	struct iovec iov[2];
	unsigned n;

	assert_int_equal(kvmlet_window_lock(f->vm, 0, 0, 2 * PG, KVMLET_WRITE, iov, 2, &n), 0);
	assert_int_equal(n, 1);
	start(&change, f, do_unmap, 0);
	assert_waits(f, &change);
	memset(iov[0].iov_base, 0x33, 2 * PG);
	/* Others are served meanwhile, unless they need a page that is being taken away. */
	start(&access, f, do_load, PG);
	kvmlet_window_unlock(f->vm);
	finish(&change);
	assert_int_equal(finish(&access), 0);
	assert_int_equal(access.val, 0x3333333333333333);
	assert_int_equal(kvmlet_window_lock(f->vm, 0, 0, 2 * PG, KVMLET_WRITE, iov, 2, &n),
			 -EFAULT);
	assert_int_equal(kvmlet_window_lock(f->vm, 0, PG, PG, KVMLET_WRITE, iov, 2, &n), 0);
	kvmlet_window_unlock(f->vm);
}

/* N5: a bracket that may not wait does not wait for the holder of a window, and does nothing. */
static void window_against_nonblocking(void **state)
{
	struct fixture *f = *state;
	struct worker change;
	struct iovec iov[2];
	unsigned n;

	assert_int_equal(kvmlet_window_lock(f->vm, 0, 0, 2 * PG, KVMLET_WRITE, iov, 2, &n), 0);
	start(&change, f, do_try_bracket, 0);
	assert_int_equal(finish(&change), -EAGAIN);
	memset(iov[0].iov_base, 0x55, 2 * PG);
	kvmlet_window_unlock(f->vm);
	start(&change, f, do_try_bracket, 0);
	assert_int_equal(finish(&change), 0);
	assert_int_equal(f->ram[PG], 0x55);
}

/*
 * N5: nor for one that is locked between its look and its zap, maybe with a page from before; it
 * fails, and the next bracket waits.
 */
static void window_after_look(void **state)
{
	struct fixture *f = *state;
	struct worker quick, change;
	struct iovec iov[1];
	unsigned n;

	NEED_RACEPOINTS;
	for (uint64_t gpa = 0; gpa < 2 * PG; gpa += PG)
		assert_int_equal(kvmlet_vm_store(f->vm, 0, gpa, 8, 1), 0);
	kl_racepoint_arm("mmu-zapped", 1);
	start(&quick, f, do_try_bracket, 0);
	assert_true(kl_racepoint_wait("mmu-zapped", TIMEOUT));
	assert_int_equal(kvmlet_window_lock(f->vm, 0, PG, PG, KVMLET_WRITE, iov, 1, &n), 0);
	kl_racepoint_release("mmu-zapped");
	assert_int_equal(finish(&quick), -EAGAIN);
	start(&change, f, do_bracket, 0);
	assert_waits(f, &change);
	kvmlet_window_unlock(f->vm);
	assert_int_equal(finish(&change), 0);
}

/* S4, S8: so does the deletion of its slot. */
static void window_against_delete(void **state)
{
	struct fixture *f = *state;
	struct worker change;
	struct iovec iov[2];
	unsigned n;

	assert_int_equal(kvmlet_window_lock(f->vm, 0, 0, 2 * PG, KVMLET_WRITE, iov, 2, &n), 0);
	start(&change, f, do_delete, 0);
	assert_waits(f, &change);
	memset(iov[0].iov_base, 0x44, 2 * PG);
	kvmlet_window_unlock(f->vm);
	assert_int_equal(finish(&change), 0);
	assert_int_equal(kvmlet_window_lock(f->vm, 0, 0, PG, KVMLET_READ, iov, 2, &n), -EFAULT);
	assert_int_equal(f->ram[0], 0x44);
}

/* What a holder of a window may try while a bracket waits for him. */
static int hold_and_ask(struct worker *w)
{
	uint64_t at = kl_hva(w->f->ram).addr;
	struct worker change;
	struct kvmlet_vm *vm;
	struct iovec iov[2];
	int young = -1;
	unsigned n;

	assert_int_equal(kvmlet_vm_create(&vm), 0);
	assert_int_equal(kvmlet_memslot_set(vm, 0, 0, 0, PG, kl_hva(w->f->ram + 8 * PG)), 0);
	assert_int_equal(kvmlet_window_lock(w->f->vm, 0, 0, PG, KVMLET_WRITE, iov, 2, &n), 0);
	start(&change, w->f, do_bracket, 0);
	assert_waits(w->f, &change);
	assert_int_equal(kvmlet_notifier_test_young(at, at + PG, &young), -EDEADLK);
	assert_int_equal(kvmlet_notifier_clear_young(at, at + PG, &young), -EDEADLK);
	assert_int_equal(kvmlet_notifier_uffd_source(0), -EDEADLK);
	kvmlet_vm_destroy(vm); /* complained about, and ignored */
	assert_int_equal(atomic_load(&change.done), 0);
	kvmlet_window_unlock(w->f->vm);
	assert_int_equal(finish(&change), 0);
	assert_int_equal(young, -1);
	assert_int_equal(kvmlet_vm_load(vm, 0, 0, 8, &w->val), 0);
	kvmlet_vm_destroy(vm);
	return 0;
}

/* S7, N6: nothing that the holder of a window calls waits for a bracket that waits for him. */
static void holder_never_waits(void **state)
{
	struct worker holder;

	start(&holder, *state, hold_and_ask, 0);
	for (int i = 0; !atomic_load(&holder.done); i++) {
		assert_true(i < TIMEOUT);
		usleep(1000);
	}
	assert_int_equal(finish(&holder), 0);
}

static int do_get_log(struct worker *w)
{
	w->val = 0;
	return kl_dirty_log_get(&w->f->vm->vm, 0, 2, &w->val, false);
}

static uint64_t dirty_log(struct fixture *f)
{
	struct worker w = {.f = f};

	assert_int_equal(do_get_log(&w), 0);
	return w.val;
}

/*
 * D1, D3: what the library writes is in the log, in each way and each time; reading the log waits
 * for the holder of a window, so that the log it returns covers what he has written.
 */
static void writes_are_logged(void **state)
{
	struct fixture *f = *state;
	struct kl_uapi_memory_region2 r = {
		.slot = 2,
		.flags = KVM_MEM_LOG_DIRTY_PAGES,
		.guest_phys_addr = 0x100000,
		.memory_size = NPAGES * PG,
		.userspace_addr = kl_hva(f->ram).addr,
	};
	uint64_t v = 1, base = r.guest_phys_addr;
	struct worker log;
	struct iovec iov[2];
	unsigned n;

	assert_int_equal(kl_set_memory_region(&f->vm->vm, &r), 0);
	assert_int_equal(dirty_log(f), 0);
	for (int round = 0; round < 2; round++) {
		assert_int_equal(kvmlet_vm_read(f->vm, 0, base, &v, 8, NULL), 0);
		assert_int_equal(kvmlet_vm_load(f->vm, 0, base + PG, 8, &v), 0);
		assert_int_equal(dirty_log(f), 0);
		assert_int_equal(kvmlet_vm_write(f->vm, 0, base + 2 * PG - 1, &v, 2, NULL), 0);
		assert_int_equal(kvmlet_vm_fetch_add(f->vm, 0, base + 4 * PG, 8, 1, NULL), 0);
		assert_int_equal(dirty_log(f), 1 << 1 | 1 << 2 | 1 << 4);
		assert_int_equal(dirty_log(f), 0);
	}
	assert_int_equal(
		kvmlet_window_lock(f->vm, 0, base + 6 * PG, 2 * PG, KVMLET_READ, iov, 2, &n), 0);
	kvmlet_window_unlock(f->vm);
	assert_int_equal(dirty_log(f), 0);
	assert_int_equal(
		kvmlet_window_lock(f->vm, 0, base + 6 * PG, 2 * PG, KVMLET_WRITE, iov, 2, &n), 0);
	start(&log, f, do_get_log, 0);
	assert_waits(f, &log);
	memset(iov[0].iov_base, 1, 2 * PG);
	kvmlet_window_unlock(f->vm);
	assert_int_equal(finish(&log), 0);
	assert_int_equal(log.val, 1 << 6 | 1 << 7);
	assert_int_equal(dirty_log(f), 0);
}

static int do_window(struct worker *w)
{
	struct iovec iov[4];
	unsigned n;
	int r = kvmlet_window_lock(w->f->vm, 0, w->gpa, 4 * PG, KVMLET_WRITE, iov, 4, &n);

	if (r)
		return r;
	w->val = *(uint64_t *)iov[0].iov_base;
	kvmlet_window_unlock(w->f->vm);
	return n == 1 ? 0 : -EPROTO;
}

/*
 * M6: a flush that comes while a window is being collected voids what there is of it: nobody
 * waits for the holder-to-be, and he gets the pages as they are afterwards.
 */
static void flush_while_locking(void **state)
{
	struct fixture *f = *state;
	struct worker locker;
	uint64_t v;

	NEED_RACEPOINTS;
	for (uint64_t gpa = 0; gpa < 3 * PG; gpa += PG) /* the fourth page misses */
		assert_int_equal(kvmlet_vm_store(f->vm, 0, gpa, 8, 1), 0);
	kl_racepoint_arm("fault-populated", 1);
	start(&locker, f, do_window, 0);
	assert_true(kl_racepoint_wait("fault-populated", TIMEOUT));
	/* It found three pages and is resolving the fourth: it holds none of them. */
	unmap(f->ram, PG);
	assert_ptr_equal(mmap(f->ram, PG, PROT_READ | PROT_WRITE,
			      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0),
			 f->ram);
	memset(f->ram, 0x66, PG);
	kl_racepoint_release("fault-populated");
	assert_int_equal(finish(&locker), 0);
	assert_int_equal(locker.val, 0x6666666666666666);
	assert_int_equal(kvmlet_vm_load(f->vm, 0, 3 * PG, 8, &v), 0);
}

/* M6: the same between two pages that are both there: the bracket waits no longer than that. */
static void flush_between_pages(void **state)
{
	struct fixture *f = *state;
	struct worker locker, change;

	NEED_RACEPOINTS;
	for (uint64_t gpa = 0; gpa < 4 * PG; gpa += PG)
		assert_int_equal(kvmlet_vm_store(f->vm, 0, gpa, 8, 1), 0);
	kl_racepoint_arm("window-page", 1);
	start(&locker, f, do_window, 0);
	assert_true(kl_racepoint_wait("window-page", TIMEOUT));
	start(&change, f, do_unmap, 0);
	assert_waits(f, &change);
	kl_racepoint_release("window-page");
	finish(&change);
	assert_int_equal(finish(&locker), -EFAULT);
}

/* M6: an accessor that flushes have not known yet joins while a bracket runs. */
static void first_use_during_bracket(void **state)
{
	struct fixture *f = *state;
	struct worker access, change;

	NEED_RACEPOINTS;
	kl_racepoint_arm("accessor-used", 1);
	start(&access, f, do_add, 0);
	assert_true(kl_racepoint_wait("accessor-used", TIMEOUT));
	start(&change, f, do_bracket, 0);
	assert_int_equal(finish(&change), 0); /* it is not in guest mode */
	kl_racepoint_release("accessor-used");
	assert_int_equal(finish(&access), 0);
	assert_int_equal(access.val, 0);
}

/* ---- accesses that block in the host -------------------------------------------------------- */

static int uffd_on(void *p, size_t len)
{
	struct uffdio_api api = {.api = UFFD_API};
	struct uffdio_register reg = {.range = {(uint64_t)p, len},
				      .mode = UFFDIO_REGISTER_MODE_MISSING};
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (uffd >= 0 && (ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &reg))) {
		close(uffd);
		uffd = -1;
	}
	return uffd;
}

/* Until somebody waits for the page; its address. */
static uint64_t next_fault(int uffd)
{
	struct pollfd p = {.fd = uffd, .events = POLLIN};
	struct uffd_msg msg;

	assert_int_equal(poll(&p, 1, TIMEOUT), 1);
	assert_int_equal(read(uffd, &msg, sizeof(msg)), sizeof(msg));
	assert_int_equal(msg.event, UFFD_EVENT_PAGEFAULT);
	return msg.arg.pagefault.address & KL_PAGE_MASK;
}

static void provide(int uffd, const void *page, const void *contents)
{
	struct uffdio_copy copy = {.dst = (uint64_t)page, .src = (uint64_t)contents, .len = PG};

	assert_int_equal(ioctl(uffd, UFFDIO_COPY, &copy), 0);
}

/* The page at @gpa is mapped in stage 2, and then gone from the host without a bracket. */
static void lose_page(struct fixture *f, uint64_t gpa)
{
	assert_int_equal(kvmlet_vm_store(f->vm, 0, gpa, 8, 1), 0);
	assert_int_equal(madvise(f->ram + gpa, PG, MADV_DONTNEED), 0);
}

/* Under ThreadSanitizer signals do not reach a thread that blocks in an access. */
#define NEED_UFFD(uffd)                    \
	do {                               \
		if ((uffd) < 0 || KL_TSAN) \
			skip();            \
	} while (0)

/*
 * M6, N2: an access in guest mode blocks in a host page fault. A bracket elsewhere that must
 * flush does not wait for the page to come, and the access is done when it comes, once.
 */
static void kick_blocked_access(void **state)
{
	struct fixture *f = *state;
	int (*const accesses[])(struct worker *) = {do_read, do_write, do_load, do_add, do_window};
	uint8_t *page = calloc(1, PG);
	int uffd = uffd_on(f->ram + 8 * PG, 8 * PG);
	struct worker access, change;

	NEED_UFFD(uffd);
	memset(page, 5, PG);
	for (uint64_t gpa = 8 * PG; gpa < 16 * PG; gpa += PG)
		provide(uffd, f->ram + gpa, page);
	for (unsigned i = 0; i < KL_ARRAY_SIZE(accesses); i++) {
		uint64_t gpa = 8 * PG, v;

		lose_page(f, gpa);
		assert_int_equal(kvmlet_vm_store(f->vm, 0, 0, 8, 1), 0);
		start(&access, f, accesses[i], gpa);
		assert_int_equal(next_fault(uffd), kl_hva(f->ram + gpa).addr);
		start(&change, f, do_bracket, 0);
		assert_int_equal(finish(&change), 0);
		assert_int_equal(atomic_load(&access.done), 0);
		provide(uffd, f->ram + gpa, page);
		assert_int_equal(finish(&access), 0);
		if (accesses[i] != do_write)
			assert_int_equal(access.val, 0x0505050505050505);
		assert_int_equal(kvmlet_vm_load(f->vm, 0, gpa, 8, &v), 0);
		assert_int_equal(v, accesses[i] == do_write ? 0x77
				    : accesses[i] == do_add ? 0x0505050505050506
							    : 0x0505050505050505);
		/* A late fault message of this round is not the next round's. */
		while (poll(&(struct pollfd){.fd = uffd, .events = POLLIN}, 1, 0) == 1)
			next_fault(uffd);
	}
	close(uffd);
	free(page);
}

static int read_with_all_blocked(struct worker *w)
{
	sigset_t all;

	sigfillset(&all);
	assert_int_equal(pthread_sigmask(SIG_SETMASK, &all, NULL), 0);
	return do_read(w);
}

/* A page that stage 2 has, then one that it has not, after blocking everything again. */
static int read_and_block_again(struct worker *w)
{
	uint64_t gpa = w->gpa;

	w->gpa = 0;
	assert_int_equal(read_with_all_blocked(w), 0);
	w->gpa = gpa;
	return read_with_all_blocked(w);
}

/*
 * N7: a thread that was created with all signals blocked, as workers are, gets -EFAULT for memory
 * that has vanished, and does not end the process: with SIGSEGV and with SIGBUS.
 */
static void all_signals_blocked(void **state)
{
	struct fixture *f = *state;
	int fd = memfd_create("blocked", MFD_CLOEXEC);
	struct worker access;
	uint8_t *file;

	assert_int_equal(kvmlet_vm_store(f->vm, 0, PG, 8, 1), 0);
	vanish(f->ram + PG, 3 * PG);
	start(&access, f, read_with_all_blocked, PG);
	assert_int_equal(finish(&access), -EFAULT);

	assert_int_equal(ftruncate(fd, PG), 0);
	file = mmap(NULL, PG, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	assert_int_equal(kvmlet_memslot_set(f->vm, 1, 0, 0x100000, PG, kl_hva(file)), 0);
	assert_int_equal(kvmlet_vm_store(f->vm, 0, 0x100000, 8, 1), 0);
	assert_int_equal(ftruncate(fd, 0), 0);
	start(&access, f, read_with_all_blocked, 0x100000);
	assert_int_equal(finish(&access), -EFAULT);

	start(&access, f, read_and_block_again, 3 * PG);
	assert_int_equal(finish(&access), -EFAULT);
	munmap(file, PG);
	close(fd);
}

/* M6: and it is kicked out of an access that blocks: nobody waits for the page to come. */
static void kick_with_all_blocked(void **state)
{
	struct fixture *f = *state;
	uint8_t *page = calloc(1, PG);
	int uffd = uffd_on(f->ram + 8 * PG, PG), waited = 0;
	struct worker access, change;

	NEED_UFFD(uffd);
	provide(uffd, f->ram + 8 * PG, page);
	lose_page(f, 8 * PG);
	assert_int_equal(kvmlet_vm_store(f->vm, 0, 0, 8, 1), 0);
	start(&access, f, read_with_all_blocked, 8 * PG);
	next_fault(uffd);
	start(&change, f, do_bracket, 0);
	while (!atomic_load(&change.done) && waited++ < TIMEOUT)
		usleep(1000);
	assert_int_equal(atomic_load(&access.done), 0);
	provide(uffd, f->ram + 8 * PG, page);
	assert_int_equal(finish(&access), 0);
	assert_int_equal(finish(&change), 0);
	assert_true(waited < TIMEOUT);
	close(uffd);
	free(page);
}

/*
 * M6: every accessor is taken by a thread that waits for a page; whoever brings the page reads
 * guest memory first.
 */
static void all_accessors_block(void **state)
{
	struct fixture *f = *state;
	struct worker *w = calloc(KL_NR_ACCESSORS + 1, sizeof(*w));
	uint8_t *page = calloc(1, PG);
	int uffd = uffd_on(f->ram + 8 * PG, 8 * PG);
	uint64_t v = 0;

	NEED_UFFD(uffd);
	provide(uffd, f->ram + 8 * PG, page);
	lose_page(f, 8 * PG);
	assert_int_equal(kvmlet_vm_store(f->vm, 0, 0, 8, 9), 0);
	for (unsigned i = 0; i <= KL_NR_ACCESSORS; i++)
		start(&w[i], f, do_read, 8 * PG);
	for (unsigned i = 0; i < KL_NR_ACCESSORS; i++)
		next_fault(uffd);
	assert_int_equal(kvmlet_vm_load(f->vm, 0, 0, 8, &v), 0);
	assert_int_equal(v, 9);
	provide(uffd, f->ram + 8 * PG, page);
	for (unsigned i = 0; i <= KL_NR_ACCESSORS; i++)
		assert_int_equal(finish(&w[i]), 0);
	close(uffd);
	free(page);
	free(w);
}

static _Atomic int handled, tracked;
static struct kvmlet_gpc *tracked_cache;

static void track_write(void *opaque, unsigned as, kl_gpa_t gpa, const void *bytes, size_t len)
{
	tracked++;
}

/* The page is lost under the cache's holder; what he wrote is read for the tracker as he lets go.
 */
static int do_tracked_unlock(struct worker *w)
{
	void *p;

	assert_int_equal(kvmlet_gpc_lock(tracked_cache, 8, &p), 0);
	assert_int_equal(madvise(w->f->ram + w->gpa, PG, MADV_DONTNEED), 0);
	kvmlet_gpc_unlock(tracked_cache, 1);
	return 0;
}

static volatile uint8_t *barrier; /* a page of the program's that it makes accessible by faults */

static void on_signal(int sig)
{
	*barrier = 1;
	atomic_fetch_add(&handled, 1);
}

/* The program's own handler of faults, from before the first VM. */
static void on_fault(int sig, siginfo_t *info, void *uc)
{
	if (info->si_addr != (void *)barrier)
		_exit(99);
	mprotect((void *)barrier, PG, PROT_READ | PROT_WRITE);
}

/*
 * M6, N7: a signal of the program's in the middle of a blocked access: its handler runs, faults
 * on its own account, and the access goes on.
 */
static void signal_in_blocked_access(void **state)
{
	struct fixture *f = *state;
	static const struct kvmlet_track_ops ops = {.track_write = track_write};
	struct sigaction sa = {.sa_handler = on_signal}, old;
	uint8_t *page = calloc(1, PG);
	int uffd = uffd_on(f->ram + 8 * PG, 8 * PG);
	struct kvmlet_tracker *tracker;
	struct worker access;

	NEED_UFFD(uffd);
	barrier = new_memory(PG);
	assert_int_equal(sigaction(SIGUSR1, &sa, &old), 0);
	provide(uffd, f->ram + 8 * PG, page);
	for (int round = 0; round < 2; round++) {
		if (round == 0) /* blocks in guest mode ... */
			lose_page(f, 8 * PG);
		start(&access, f, do_add, (8 + (unsigned)round) * PG); /* ... or in a fault */
		next_fault(uffd);
		mprotect((void *)barrier, PG, PROT_NONE);
		pthread_kill(access.thread, SIGUSR1);
		while (atomic_load(&handled) <= round)
			sched_yield();
		assert_int_equal(atomic_load(&access.done), 0);
		provide(uffd, f->ram + (8 + (unsigned)round) * PG, page);
		assert_int_equal(finish(&access), 0);
		assert_int_equal(access.val, 0);
		while (poll(&(struct pollfd){.fd = uffd, .events = POLLIN}, 1, 0) == 1)
			next_fault(uffd);
	}
	/* Or for a tracker. */
	assert_int_equal(kvmlet_track_register(f->vm, &ops, NULL, &tracker), 0);
	assert_int_equal(kvmlet_gpc_init(f->vm, 0, &tracked_cache), 0);
	assert_int_equal(kvmlet_gpc_activate(tracked_cache, 8 * PG, 8), 0);
	assert_int_equal(kvmlet_track_add_page(f->vm, 0, 8), 0);
	start(&access, f, do_tracked_unlock, 8 * PG);
	next_fault(uffd);
	mprotect((void *)barrier, PG, PROT_NONE);
	pthread_kill(access.thread, SIGUSR1);
	while (atomic_load(&handled) <= 2)
		sched_yield();
	assert_int_equal(atomic_load(&tracked), 0);
	provide(uffd, f->ram + 8 * PG, page);
	assert_int_equal(finish(&access), 0);
	assert_int_equal(atomic_load(&tracked), 1);
	kvmlet_gpc_destroy(tracked_cache);
	assert_int_equal(kvmlet_track_unregister(tracker), 0);
	sigaction(SIGUSR1, &old, NULL);
	munmap((void *)barrier, PG);
	close(uffd);
	free(page);
}

/* ---- many at once --------------------------------------------------------------------------- */

#define THREADS 6
#define ROUNDS  3000

struct crowd {
	struct fixture *f;
	_Atomic bool stop;
	_Atomic uint64_t added;
};

static void *adder(void *arg)
{
	struct crowd *c = arg;

	for (int i = 0; i < ROUNDS; i++) {
		int r = kvmlet_vm_fetch_add(c->f->vm, 0, 4 * PG + 8, 8, 1, NULL);

		assert_int_equal(r, 0);
		atomic_fetch_add(&c->added, 1);
	}
	return NULL;
}

static void *changer(void *arg)
{
	struct crowd *c = arg;
	struct kvmlet_notifier_range r = range_of(c->f->ram + 4 * PG, PG);

	while (!atomic_load(&c->stop)) {
		assert_int_equal(kvmlet_notifier_begin(&r), 0);
		kvmlet_notifier_end(&r);
		assert_int_equal(
			kvmlet_memslot_set(c->f->vm, 1, 0, 0x100000, PG, kl_hva(c->f->ram)), 0);
		assert_int_equal(kvmlet_memslot_set(c->f->vm, 1, 0, 0, 0, kl_hva(NULL)), 0);
		sched_yield();
	}
	return NULL;
}

/* N2, M6: atomics of many threads count right under brackets and slot changes. */
static void crowd(void **state)
{
	struct fixture *f = *state;
	struct crowd c = {.f = f};
	pthread_t t[THREADS], other;
	uint64_t v;

	pthread_create(&other, NULL, changer, &c);
	for (int i = 0; i < THREADS; i++)
		pthread_create(&t[i], NULL, adder, &c);
	for (int i = 0; i < THREADS; i++)
		pthread_join(t[i], NULL);
	atomic_store(&c.stop, true);
	pthread_join(other, NULL);
	assert_int_equal(kvmlet_vm_load(f->vm, 0, 4 * PG + 8, 8, &v), 0);
	assert_int_equal(v, THREADS * ROUNDS);
	assert_int_equal(c.added, v);
	assert_false(kl_vcpus_in_guest(&f->vm->vm));
}

int main(void)
{
	struct sigaction sa = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
#define T(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)
	static const struct CMUnitTest tests[] = {
		T(unmap_during_access),
		T(access_meets_bracket),
		T(delete_during_access),
		T(access_meets_invalid_slot),
		T(translate_during_change),
		T(window_against_unmap),
		T(window_against_delete),
		T(window_against_nonblocking),
		T(window_after_look),
		T(writes_are_logged),
		T(flush_while_locking),
		T(flush_between_pages),
		T(first_use_during_bracket),
		T(kick_blocked_access),
		T(all_accessors_block),
		T(signal_in_blocked_access),
		T(crowd),
		T(missing_among_brackets),
		T(holder_never_waits),
		T(all_signals_blocked),
		T(kick_with_all_blocked),
	};

	sigaction(SIGSEGV, &sa, NULL);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
