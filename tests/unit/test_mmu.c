/* SPDX-License-Identifier: MIT */
/*
 * Stage 2 under change: faults, notifiers and slot updates with forced interleavings (N2, N3,
 * N5, N7, S4, M2, M4, M6; exhibits B16, B17, B31, B32).
 *
 * A "vCPU" here is a thread that follows the protocol of mem/vcpu_core.h without executing
 * guest code: it looks pages up and stores through the pointer while IN_GUEST.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <cmocka.h>

#include "base/pool.h"
#include "base/racepoint.h"
#include "host/access.h"
#include "host/guard.h"
#include "host/sys.h"
#include "mem/notifier.h"
#include "mem/vm.h"
#include "mmu/mmu.h"

#define PG      KL_PAGE_SIZE
#define NPAGES  16
#define TIMEOUT 10000

struct fixture {
	struct kl_vm vm;
	struct kl_vcpu_core vcpu;
	uint8_t *ram;
	uint64_t pages_before;
};

static int set(struct kl_vm *vm, uint32_t slot, uint32_t flags, uint64_t gpa, uint64_t size,
	       void *hva)
{
	struct kl_uapi_memory_region2 r = {slot, flags, gpa, size, (uint64_t)hva, 0, 0, 0, {0}};

	return kl_set_memory_region(vm, &r);
}

static int setup(void **state)
{
	struct fixture *f = calloc(1, sizeof(*f));

	*state = f;
	f->pages_before = kl_pages_in_use();
	f->ram =
		mmap(NULL, NPAGES * PG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	return f->ram == MAP_FAILED || kl_vm_init(&f->vm) ||
	       kl_vcpu_core_add(&f->vm, &f->vcpu, 0) || set(&f->vm, 0, 0, 0, NPAGES * PG, f->ram);
}

static int teardown(void **state)
{
	struct fixture *f = *state;

	kl_vm_destroy(&f->vm);
	munmap(f->ram, NPAGES * PG);
	/* No page table leaks, whatever happened. */
	if (kl_pages_in_use() != f->pages_before)
		return -1;
	free(f);
	return 0;
}

static bool mapped(struct fixture *f, uint64_t gpa, unsigned access)
{
	bool writable, mmio, there;

	kl_vcpu_enter_guest(&f->vcpu);
	kl_vcpu_take_requests(&f->vcpu, KL_REQ_TLB_FLUSH);
	there = kl_mmu_lookup(&f->vcpu, gpa, access, &writable, &mmio) != NULL;
	kl_vcpu_leave_guest(&f->vcpu);
	return there;
}

static bool mmio_cached(struct fixture *f, uint64_t gpa)
{
	bool writable, mmio;

	kl_vcpu_enter_guest(&f->vcpu);
	kl_mmu_lookup(&f->vcpu, gpa, KL_ACC_READ, &writable, &mmio);
	kl_vcpu_leave_guest(&f->vcpu);
	return mmio;
}

static struct kl_notifier_range range_of(void *p, size_t len)
{
	return (struct kl_notifier_range){
		.start = (uint64_t)p, .end = (uint64_t)p + len, .may_block = true};
}

/* M2, M3: read maps read-only, write upgrades; the statistics count leaves that exist. */
static void faults(void **state)
{
	struct fixture *f = *state;

	assert_false(mapped(f, 0, KL_ACC_READ));
	assert_int_equal(kl_mmu_fault(&f->vcpu, 0, KL_ACC_READ), KL_FAULT_MAPPED);
	assert_true(mapped(f, 0, KL_ACC_READ));
	assert_false(mapped(f, 0, KL_ACC_WRITE));
	assert_int_equal(kl_mmu_fault(&f->vcpu, 0, KL_ACC_WRITE), KL_FAULT_MAPPED);
	assert_true(mapped(f, 0, KL_ACC_WRITE));
	assert_int_equal(kl_stat_get(&f->vm.stats.pages_4k), 1);
	assert_int_equal(kl_mmu_fault(&f->vcpu, 5 * PG, KL_ACC_WRITE), KL_FAULT_MAPPED);
	assert_int_equal(kl_stat_get(&f->vm.stats.pages_4k), 2);
	assert_int_equal(set(&f->vm, 0, 0, 0, 0, NULL), 0);
	assert_int_equal(kl_stat_get(&f->vm.stats.pages_4k), 0);
	assert_false(mapped(f, 0, KL_ACC_READ));
}

/* M3: a write to a read-only slot is MMIO, and never reaches memory. */
static void readonly_slot(void **state)
{
	struct fixture *f = *state;

	assert_int_equal(set(&f->vm, 1, KVM_MEM_READONLY, 0x100000, PG, f->ram), 0);
	assert_int_equal(kl_mmu_fault(&f->vcpu, 0x100000, KL_ACC_READ), KL_FAULT_MAPPED);
	assert_true(mapped(f, 0x100000, KL_ACC_READ));
	assert_int_equal(kl_mmu_fault(&f->vcpu, 0x100000, KL_ACC_WRITE), KL_FAULT_MMIO);
	assert_false(mapped(f, 0x100000, KL_ACC_WRITE));
}

/* N7: memory that is not there is -EFAULT, read-only memory for a write too. */
static void no_memory(void **state)
{
	struct fixture *f = *state;
	struct kl_notifier_range r = range_of(f->ram, PG);

	assert_int_equal(kl_notifier_begin(&r), 0);
	mprotect(f->ram, PG, PROT_READ);
	kl_notifier_end(&r);
	assert_int_equal(kl_mmu_fault(&f->vcpu, 0, KL_ACC_WRITE), -EFAULT);
	assert_int_equal(kl_mmu_fault(&f->vcpu, 0, KL_ACC_READ), KL_FAULT_MAPPED);
	mprotect(f->ram + PG, PG, PROT_NONE); /* unseen: a raw call */
	assert_int_equal(kl_mmu_fault(&f->vcpu, PG, KL_ACC_READ), -EFAULT);
	assert_int_equal(kl_guard_copy(&(char){0}, f->ram + PG, 1), -EFAULT);
}

/* M4, S6: "no slot" is cached with the generation; any slot change voids it. */
static void mmio_sptes(void **state)
{
	struct fixture *f = *state;
	uint64_t gpa = 0x200000;

	assert_false(mmio_cached(f, gpa));
	assert_int_equal(kl_mmu_fault(&f->vcpu, gpa, KL_ACC_READ), KL_FAULT_MMIO);
	assert_true(mmio_cached(f, gpa));
	assert_int_equal(set(&f->vm, 1, 0, 0x300000, PG, f->ram), 0);
	assert_false(mmio_cached(f, gpa));
	/* The stale entry is replaced when a slot appears there. */
	assert_int_equal(set(&f->vm, 2, 0, gpa, PG, f->ram), 0);
	assert_int_equal(kl_mmu_fault(&f->vcpu, gpa, KL_ACC_READ), KL_FAULT_MAPPED);
	assert_true(mapped(f, gpa, KL_ACC_READ));
}

/* B17, S6: over the wrap an ancient MMIO entry does not match again. */
static void mmio_generation_wrap(void **state)
{
	struct fixture *f = *state;
	uint64_t gpa = 0x200000, start;
	bool wrapped = false;

	assert_int_equal(kl_mmu_fault(&f->vcpu, gpa, KL_ACC_READ), KL_FAULT_MMIO);
	start = KL_MMIO_GEN(kl_generation(&f->vm, 0));
	for (int i = 0; i < 200; i++) {
		assert_int_equal(set(&f->vm, 1, 0, 0x300000, i & 1 ? 0 : PG, f->ram), 0);
		wrapped |= KL_MMIO_GEN(kl_generation(&f->vm, 0)) < start;
		assert_false(mmio_cached(f, gpa));
	}
	assert_true(wrapped);
	/* Set the counter to where the entry was made: it must be gone, not just stale. */
	atomic_store(&f->vm.generation[0], KL_FIRST_GENERATION(0) + 2);
	assert_false(mmio_cached(f, gpa));
}

struct faulter {
	struct fixture *f;
	uint64_t gpa;
	unsigned access;
	int r;
};

static void *fault_thread(void *arg)
{
	struct faulter *t = arg;

	t->r = kl_mmu_fault(&t->f->vcpu, t->gpa, t->access);
	return NULL;
}

#define NEED_RACEPOINTS                       \
	do {                                  \
		if (!kl_racepoints_enabled()) \
			skip();               \
	} while (0)

/* B31: the slot is deleted while a fault is between populate and install. */
static void delete_during_populate(void **state)
{
	struct fixture *f = *state;
	struct faulter t = {f, PG, KL_ACC_WRITE, -1};
	pthread_t thread;

	NEED_RACEPOINTS;
	kl_racepoint_arm("fault-populated", 1);
	pthread_create(&thread, NULL, fault_thread, &t);
	assert_true(kl_racepoint_wait("fault-populated", TIMEOUT));
	assert_int_equal(set(&f->vm, 0, 0, 0, 0, NULL), 0);
	kl_racepoint_release("fault-populated");
	pthread_join(thread, NULL);
	assert_int_equal(t.r, KL_FAULT_MAPPED); /* "look again" */
	assert_false(mapped(f, PG, KL_ACC_READ));
	assert_int_equal(kl_mmu_fault(&f->vcpu, PG, KL_ACC_READ), KL_FAULT_MMIO);
}

/* M2: a whole bracket between populate and install, seen only through the sequence. */
static void bracket_during_populate(void **state)
{
	struct fixture *f = *state;
	struct faulter t = {f, PG, KL_ACC_WRITE, -1};
	struct kl_notifier_range r = range_of(f->ram + PG, PG);
	pthread_t thread;

	NEED_RACEPOINTS;
	kl_racepoint_arm("fault-populated", 1);
	pthread_create(&thread, NULL, fault_thread, &t);
	assert_true(kl_racepoint_wait("fault-populated", TIMEOUT));
	assert_int_equal(kl_notifier_begin(&r), 0);
	kl_notifier_end(&r);
	kl_racepoint_release("fault-populated");
	pthread_join(thread, NULL);
	assert_false(mapped(f, PG, KL_ACC_READ));
}

/* M2, N3: inside the bracket faults on the range do not install; others do. */
static void fault_inside_bracket(void **state)
{
	struct fixture *f = *state;
	struct kl_notifier_range r = range_of(f->ram + 2 * PG, 2 * PG);

	assert_int_equal(kl_notifier_begin(&r), 0);
	assert_int_equal(kl_mmu_fault(&f->vcpu, 2 * PG, KL_ACC_READ), KL_FAULT_MAPPED);
	assert_false(mapped(f, 2 * PG, KL_ACC_READ));
	assert_int_equal(kl_mmu_fault(&f->vcpu, 4 * PG, KL_ACC_READ), KL_FAULT_MAPPED);
	assert_true(mapped(f, 4 * PG, KL_ACC_READ));
	kl_notifier_end(&r);
	assert_int_equal(kl_mmu_fault(&f->vcpu, 2 * PG, KL_ACC_READ), KL_FAULT_MAPPED);
	assert_true(mapped(f, 2 * PG, KL_ACC_READ));
	assert_int_equal(f->vm.mmu_invalidate_in_progress, 0);
}

/* B16: a vCPU decided "no slot" on the old set and tags after the update. */
static void mmio_tag_across_update(void **state)
{
	struct fixture *f = *state;
	uint64_t gpa = 0x200000;
	struct faulter t = {f, gpa, KL_ACC_READ, -1};
	pthread_t thread;

	NEED_RACEPOINTS;
	kl_racepoint_arm("fault-mmio-tag", 1);
	pthread_create(&thread, NULL, fault_thread, &t);
	assert_true(kl_racepoint_wait("fault-mmio-tag", TIMEOUT));
	assert_int_equal(set(&f->vm, 1, 0, gpa, PG, f->ram), 0);
	kl_racepoint_release("fault-mmio-tag");
	pthread_join(thread, NULL);
	assert_int_equal(t.r, KL_FAULT_MMIO);
	assert_false(mmio_cached(f, gpa));
	assert_int_equal(kl_mmu_fault(&f->vcpu, gpa, KL_ACC_READ), KL_FAULT_MAPPED);
}

struct slot_change {
	struct fixture *f;
	uint64_t gpa, size;
	int r;
};

static void *change_slot_1(void *arg)
{
	struct slot_change *c = arg;

	c->r = set(&c->f->vm, 1, 0, c->gpa, c->size, c->f->ram);
	return NULL;
}

/* S4: a fault that meets the slot while it is marked invalid maps nothing. */
static void fault_meets_invalid_slot(void **state)
{
	struct fixture *f = *state;
	struct slot_change c = {f, 0, 0, -1};
	pthread_t thread;

	NEED_RACEPOINTS;
	assert_int_equal(set(&f->vm, 1, 0, 0x100000, PG, f->ram), 0);
	kl_racepoint_arm("memslot-invalid", 1);
	pthread_create(&thread, NULL, change_slot_1, &c);
	assert_true(kl_racepoint_wait("memslot-invalid", TIMEOUT));
	assert_int_equal(kl_mmu_fault(&f->vcpu, 0x100000, KL_ACC_READ), KL_FAULT_MAPPED);
	assert_false(mapped(f, 0x100000, KL_ACC_READ));
	kl_racepoint_release("memslot-invalid");
	pthread_join(thread, NULL);
	assert_int_equal(c.r, 0);
	assert_int_equal(kl_mmu_fault(&f->vcpu, 0x100000, KL_ACC_READ), KL_FAULT_MMIO);
}

struct bracket {
	struct fixture *f;
	_Atomic bool begun, finish;
};

static void *bracket_thread(void *arg)
{
	struct bracket *b = arg;
	struct kl_notifier_range r = range_of(b->f->ram, PG);

	assert_int_equal(kl_notifier_begin(&r), 0);
	atomic_store(&b->begun, true);
	while (!atomic_load(&b->finish))
		kl_cpu_relax();
	kl_notifier_end(&r);
	return NULL;
}

/* B32: a bracket that touched nothing when it began holds a new slot off until it ends. */
static void slot_waits_for_unrelated_bracket(void **state)
{
	struct fixture *f = *state;
	struct slot_change c = {f, 0x100000, PG, 1};
	struct bracket b = {.f = f};
	pthread_t t1, t2;

	NEED_RACEPOINTS;
	assert_int_equal(set(&f->vm, 0, 0, 0, 0, NULL), 0);
	pthread_create(&t1, NULL, bracket_thread, &b);
	while (!atomic_load(&b.begun))
		kl_cpu_relax();
	kl_racepoint_arm("memslots-publish", 1);
	pthread_create(&t2, NULL, change_slot_1, &c);
	assert_true(kl_racepoint_wait("memslots-publish", TIMEOUT));
	kl_racepoint_release("memslots-publish");
	/* It is about to publish; nothing but the bracket holds it off. */
	for (int i = 0; i < 2000; i++) {
		int token = kl_srcu_read_lock(&f->vm.srcu);

		assert_null(kl_memslot_find(kl_memslots(&f->vm, 0), 0x100));
		kl_srcu_read_unlock(&f->vm.srcu, token);
		sched_yield();
	}
	atomic_store(&b.finish, true);
	pthread_join(t1, NULL);
	pthread_join(t2, NULL);
	assert_int_equal(c.r, 0);
}

/* N2, M6: begin() does not return while a vCPU in guest mode may hold a pointer. */
static void begin_waits_for_guest_mode(void **state)
{
	struct fixture *f = *state;
	struct bracket b = {.f = f};
	bool writable, mmio;
	pthread_t t;

	assert_int_equal(kl_mmu_fault(&f->vcpu, 0, KL_ACC_WRITE), KL_FAULT_MAPPED);
	for (int way = 0; way < 2; way++) {
		b.begun = b.finish = false;
		kl_vcpu_enter_guest(&f->vcpu);
		kl_vcpu_take_requests(&f->vcpu, KL_REQ_TLB_FLUSH);
		kl_mmu_lookup(&f->vcpu, 0, KL_ACC_WRITE, &writable, &mmio);
		pthread_create(&t, NULL, bracket_thread, &b);
		while (!(kl_vcpu_requests(&f->vcpu) & KL_REQ_TLB_FLUSH))
			sched_yield();
		for (int i = 0; i < 2000; i++) {
			assert_false(atomic_load(&b.begun));
			sched_yield();
		}
		/* Leaving guest mode releases it, and so does consuming the request. */
		if (way == 0)
			kl_vcpu_leave_guest(&f->vcpu);
		else
			kl_vcpu_take_requests(&f->vcpu, KL_REQ_TLB_FLUSH);
		while (!atomic_load(&b.begun))
			sched_yield();
		atomic_store(&b.finish, true);
		pthread_join(t, NULL);
		kl_vcpu_leave_guest(&f->vcpu);
		assert_int_equal(kl_mmu_fault(&f->vcpu, 0, KL_ACC_WRITE), KL_FAULT_MAPPED);
	}
}

/* N5: not allowed to block, with a vCPU in guest mode and with none. */
static void nonblocking(void **state)
{
	struct fixture *f = *state;
	struct kl_notifier_range r = range_of(f->ram, PG);

	r.may_block = false;
	assert_int_equal(kl_mmu_fault(&f->vcpu, 0, KL_ACC_WRITE), KL_FAULT_MAPPED);
	kl_vcpu_enter_guest(&f->vcpu);
	assert_int_equal(kl_notifier_begin(&r), -EAGAIN);
	assert_int_equal(f->vm.mmu_invalidate_in_progress, 0);
	kl_vcpu_leave_guest(&f->vcpu);
	assert_int_equal(kl_mmu_fault(&f->vcpu, 0, KL_ACC_WRITE), KL_FAULT_MAPPED);
	assert_int_equal(kl_notifier_begin(&r), 0);
	assert_false(mapped(f, 0, KL_ACC_READ));
	kl_notifier_end(&r);
	/* Nothing mapped there: nobody to wait for, even with the vCPU in guest mode. */
	kl_vcpu_enter_guest(&f->vcpu);
	assert_int_equal(kl_notifier_begin(&r), 0);
	kl_notifier_end(&r);
	kl_vcpu_leave_guest(&f->vcpu);
}

/* N2, N5: a refused non-blocking event leaves no translation that a later event would miss. */
static void refused_then_blocking(void **state)
{
	struct fixture *f = *state;
	struct kl_notifier_range r = range_of(f->ram, PG);
	struct bracket b = {.f = f};
	bool writable, mmio;
	pthread_t t;

	NEED_RACEPOINTS;
	assert_int_equal(kl_mmu_fault(&f->vcpu, 0, KL_ACC_WRITE), KL_FAULT_MAPPED);
	assert_int_equal(kl_mmu_fault(&f->vcpu, PG, KL_ACC_WRITE), KL_FAULT_MAPPED);
	/* Refused before anything was zapped: the translation is still there. */
	kl_vcpu_enter_guest(&f->vcpu);
	r.may_block = false;
	assert_int_equal(kl_notifier_begin(&r), -EAGAIN);
	assert_non_null(kl_mmu_lookup(&f->vcpu, 0, KL_ACC_WRITE, &writable, &mmio));
	/* The vCPU still holds it: a blocking event waits. */
	pthread_create(&t, NULL, bracket_thread, &b);
	while (!(kl_vcpu_requests(&f->vcpu) & KL_REQ_TLB_FLUSH))
		sched_yield();
	for (int i = 0; i < 1000; i++) {
		assert_false(atomic_load(&b.begun));
		sched_yield();
	}
	kl_vcpu_leave_guest(&f->vcpu);
	while (!atomic_load(&b.begun))
		sched_yield();
	atomic_store(&b.finish, true);
	pthread_join(t, NULL);
}

static void *nonblocking_thread(void *arg)
{
	struct faulter *t = arg;
	struct kl_notifier_range r = range_of(t->f->ram, PG);

	r.may_block = false;
	t->r = kl_notifier_begin(&r);
	return NULL;
}

/* The same when the vCPU enters guest mode between the look and the zap. */
static void refused_after_zap(void **state)
{
	struct fixture *f = *state;
	struct faulter n = {f, 0, 0, 1};
	struct bracket b = {.f = f};
	pthread_t t;

	NEED_RACEPOINTS;
	assert_int_equal(kl_mmu_fault(&f->vcpu, 0, KL_ACC_WRITE), KL_FAULT_MAPPED);
	assert_int_equal(kl_mmu_fault(&f->vcpu, PG, KL_ACC_WRITE), KL_FAULT_MAPPED);
	kl_racepoint_arm("mmu-zapped", 1);
	pthread_create(&t, NULL, nonblocking_thread, &n);
	assert_true(kl_racepoint_wait("mmu-zapped", TIMEOUT));
	kl_vcpu_enter_guest(&f->vcpu); /* with a pointer from before, say */
	kl_racepoint_release("mmu-zapped");
	pthread_join(t, NULL);
	assert_int_equal(n.r, -EAGAIN);
	/* Nothing is mapped any more, and yet the next event has to wait. */
	pthread_create(&t, NULL, bracket_thread, &b);
	for (int i = 0; i < 2000; i++) {
		assert_false(atomic_load(&b.begun));
		sched_yield();
	}
	kl_vcpu_leave_guest(&f->vcpu);
	while (!atomic_load(&b.begun))
		sched_yield();
	atomic_store(&b.finish, true);
	pthread_join(t, NULL);
}

/* Bad brackets: the largest range there is, and an end without a begin. */
static void odd_brackets(void **state)
{
	struct fixture *f = *state;
	struct kl_notifier_range all = {.start = 0, .end = UINT64_MAX, .may_block = true};

	assert_int_equal(kl_mmu_fault(&f->vcpu, 0, KL_ACC_WRITE), KL_FAULT_MAPPED);
	assert_int_equal(kl_notifier_begin(&all), 0);
	assert_false(mapped(f, 0, KL_ACC_READ));
	kl_notifier_end(&all);
	kl_notifier_end(&all); /* ignored, with a warning */
	assert_int_equal(set(&f->vm, 1, 0, 0x100000, PG, f->ram), 0);
	assert_int_equal(f->vm.mmu_invalidate_in_progress, 0);
}

/* ---- a populate that blocks (B27, U3) ------------------------------------------------ */

static void defer(int sig, siginfo_t *info, void *uc)
{
	if (kl_engine_active())
		kl_thread_defer_signal(sig, info, uc);
}

static void *interruptible_fault(void *arg)
{
	struct faulter *t = arg;

	kl_engine_enter();
	kl_self.running = &t->f->vcpu;
	t->r = kl_mmu_fault(&t->f->vcpu, t->gpa, t->access);
	kl_self.running = NULL;
	kl_engine_leave();
	return NULL;
}

/*
 * A signal interrupts a fault that userfaultfd holds, also if it came after the vCPU's last look
 * for signals and before the touch.
 */
static void signal_interrupts_populate(void **state)
{
	struct sigaction sa = {.sa_sigaction = defer, .sa_flags = SA_SIGINFO | SA_RESTART};
	struct uffdio_api api = {.api = UFFD_API};
	struct fixture *f = *state;
	struct uffdio_register reg = {.range = {(uint64_t)f->ram, NPAGES * PG},
				      .mode = UFFDIO_REGISTER_MODE_MISSING};
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	NEED_RACEPOINTS;
	if (KL_TSAN) /* its runtime holds signals back */
		skip();
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &reg))
		skip();
	sigaction(SIGUSR1, &sa, NULL);
	for (int before = 0; before < 2; before++) {
		struct faulter t = {f, 0, KL_ACC_WRITE, 1};
		struct pollfd p = {.fd = uffd, .events = POLLIN};
		struct uffd_msg msg;
		pthread_t thread;

		if (before)
			kl_racepoint_arm("fault-populate", 1);
		pthread_create(&thread, NULL, interruptible_fault, &t);
		if (before)
			assert_true(kl_racepoint_wait("fault-populate", TIMEOUT));
		else
			assert_int_equal(poll(&p, 1, TIMEOUT), 1);
		pthread_kill(thread, SIGUSR1);
		if (before) {
			while (!(kl_vcpu_requests(&f->vcpu) & KL_REQ_SIGNAL))
				sched_yield();
			kl_racepoint_release("fault-populate");
		}
		pthread_join(thread, NULL);
		assert_int_equal(t.r, -EINTR);
		kl_vcpu_take_requests(&f->vcpu, KL_REQ_SIGNAL);
		while (poll(&p, 1, 0) == 1)
			assert_int_equal(read(uffd, &msg, sizeof(msg)), sizeof(msg));
	}
	close(uffd);
}

/* A thread that gets a CPU at last finds all its kicks at once; it has one small stack. */
static void kicks_do_not_nest(void **state)
{
	static char stack[32 << 10];
	stack_t ss = {.ss_sp = stack, .ss_size = sizeof(stack)}, off = {.ss_flags = SS_DISABLE};
	sigset_t kick;

	sigemptyset(&kick);
	sigaddset(&kick, KL_KICK_SIGNAL);
	assert_int_equal(sigaltstack(&ss, NULL), 0);
	assert_int_equal(pthread_sigmask(SIG_BLOCK, &kick, NULL), 0);
	for (int i = 0; i < 200; i++)
		kl_guard_kick(kl_gettid());
	assert_int_equal(pthread_sigmask(SIG_UNBLOCK, &kick, NULL), 0);
	assert_int_equal(sigaltstack(&off, NULL), 0);
}

/* B19: the VM dies inside a bracket of the same thread. */
static void destroy_inside_bracket(void **state)
{
	struct kl_vm *vm = malloc(sizeof(*vm));
	struct fixture *f = *state;
	struct kl_notifier_range r = range_of(f->ram, PG);

	assert_int_equal(kl_vm_init(vm), 0);
	assert_int_equal(set(vm, 0, 0, 0, PG, f->ram), 0);
	assert_int_equal(kl_notifier_begin(&r), 0);
	kl_vm_destroy(vm);
	free(vm);
	kl_notifier_end(&r);
	assert_int_equal(f->vm.mmu_invalidate_in_progress, 0);
}

/* ---- a vCPU that stores while memory goes away (N2, M6) ------------------------------ */

struct storer {
	struct fixture *f;
	struct kl_vcpu_core core;
	_Atomic bool stop;
	_Atomic uint64_t stores, mmio;
	int r;
	_Atomic bool faulted;
};

static void *storing_vcpu(void *arg)
{
	struct storer *s = arg;
	uint8_t *tlb[NPAGES] = {0};
	unsigned i = 0;
	jmp_buf env;

	if (kl_guard_enter(&env) != KL_GUARD_NONE) {
		s->faulted = true; /* a store went to memory that was gone */
		kl_vcpu_leave_guest(&s->core);
		kl_guard_leave(NULL);
		return NULL;
	}
	kl_vcpu_enter_guest(&s->core);
	while (!atomic_load_explicit(&s->stop, memory_order_relaxed)) {
		unsigned page = i++ % NPAGES;
		bool writable, mmio;

		if (kl_vcpu_requests(&s->core) & KL_REQ_TLB_FLUSH) {
			memset(tlb, 0, sizeof(tlb));
			kl_vcpu_take_requests(&s->core, KL_REQ_TLB_FLUSH);
		}
		if (!tlb[page])
			tlb[page] =
				kl_mmu_lookup(&s->core, page * PG, KL_ACC_WRITE, &writable, &mmio);
		if (!tlb[page]) {
			kl_vcpu_leave_guest(&s->core);
			s->r = kl_mmu_fault(&s->core, page * PG, KL_ACC_WRITE);
			if (s->r == KL_FAULT_MMIO)
				atomic_fetch_add(&s->mmio, 1);
			memset(tlb, 0, sizeof(tlb));
			kl_vcpu_enter_guest(&s->core);
			continue;
		}
		kl_store8(tlb[page], (uint8_t)i);
		atomic_fetch_add_explicit(&s->stores, 1, memory_order_relaxed);
	}
	kl_vcpu_leave_guest(&s->core);
	kl_guard_leave(NULL);
	return NULL;
}

/* Until the vCPU has stored again, so that every round meets a TLB that is in use. */
static void wait_for_progress(struct storer *s)
{
	uint64_t seen = atomic_load(&s->stores);

	while (atomic_load(&s->stores) == seen && !s->faulted)
		sched_yield();
}

/*
 * N2: between begin() and end() the page is inaccessible, and a store to it would fault. Two
 * vCPUs store all the time; none may ever hit the inaccessible page.
 */
static void unmap_under_running_vcpus(void **state)
{
	struct fixture *f = *state;
	struct storer s[2] = {{.f = f}, {.f = f}};
	pthread_t t[2];

	for (int i = 0; i < 2; i++) {
		assert_int_equal(kl_vcpu_core_add(&f->vm, &s[i].core, 1 + (unsigned)i), 0);
		pthread_create(&t[i], NULL, storing_vcpu, &s[i]);
	}
	for (unsigned round = 0; round < 300; round++) {
		uint8_t *page = f->ram + (round % NPAGES) * PG;
		struct kl_notifier_range r = range_of(page, PG);

		assert_int_equal(kl_notifier_begin(&r), 0);
		assert_int_equal(mprotect(page, PG, PROT_NONE), 0);
		assert_int_equal(mprotect(page, PG, PROT_READ | PROT_WRITE), 0);
		kl_notifier_end(&r);
		wait_for_progress(&s[round & 1]);
	}
	for (int i = 0; i < 2; i++)
		atomic_store(&s[i].stop, true);
	for (int i = 0; i < 2; i++) {
		pthread_join(t[i], NULL);
		assert_false(s[i].faulted);
		assert_true(atomic_load(&s[i].stores) > 0);
	}
}

/* S4: after DELETE returns no vCPU stores through the old slot; after MOVE neither. */
static void slots_under_running_vcpus(void **state)
{
	struct fixture *f = *state;
	struct storer s = {.f = f};
	pthread_t t;

	assert_int_equal(kl_vcpu_core_add(&f->vm, &s.core, 7), 0);
	pthread_create(&t, NULL, storing_vcpu, &s);
	for (unsigned round = 0; round < 200; round++) {
		if (round & 1)
			assert_int_equal(set(&f->vm, 0, 0, 0, 0, NULL), 0);
		else
			assert_int_equal(set(&f->vm, 0, 0, 0x1000000, NPAGES * PG, f->ram), 0);
		/* The slot is elsewhere: its memory is ours alone now. */
		assert_int_equal(mprotect(f->ram, NPAGES * PG, PROT_NONE), 0);
		assert_int_equal(mprotect(f->ram, NPAGES * PG, PROT_READ | PROT_WRITE), 0);
		assert_int_equal(set(&f->vm, 0, 0, 0, NPAGES * PG, f->ram), 0);
		wait_for_progress(&s);
	}
	atomic_store(&s.stop, true);
	pthread_join(t, NULL);
	assert_false(s.faulted);
	assert_true(atomic_load(&s.stores) > 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
		T(faults),
		T(readonly_slot),
		T(no_memory),
		T(mmio_sptes),
		T(mmio_generation_wrap),
		T(delete_during_populate),
		T(bracket_during_populate),
		T(fault_inside_bracket),
		T(mmio_tag_across_update),
		T(fault_meets_invalid_slot),
		T(slot_waits_for_unrelated_bracket),
		T(begin_waits_for_guest_mode),
		T(nonblocking),
		T(refused_then_blocking),
		T(refused_after_zap),
		T(odd_brackets),
		T(kicks_do_not_nest),
		T(signal_interrupts_populate),
		T(destroy_inside_bracket),
		T(unmap_under_running_vcpus),
		T(slots_under_running_vcpus),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
