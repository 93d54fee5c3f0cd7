/* SPDX-License-Identifier: MIT */
/*
 * Stage 2 under change: faults, notifiers and slot updates with forced interleavings (N2, N3,
 * N5, N7, S4, M2, M4, M6). tests/museum has those of the exhibits.
 */
#include "mmu_env.h"

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

/* N3: a fault meets a bracket halfway through its end, and cannot see neither of the two. */
static void fault_while_bracket_ends(void **state)
{
	struct fixture *f = *state;
	struct faulter t = {f, 0, KL_ACC_WRITE, -1};
	struct bracket b = {.f = f};
	pthread_t thread, ender;

	NEED_RACEPOINTS;
	kl_racepoint_arm("fault-populated", 1);
	pthread_create(&thread, NULL, fault_thread, &t);
	assert_true(kl_racepoint_wait("fault-populated", TIMEOUT));
	pthread_create(&ender, NULL, bracket_thread, &b);
	while (!atomic_load(&b.begun))
		sched_yield();
	kl_racepoint_arm("mmu-end-seq", 1);
	atomic_store(&b.finish, true);
	assert_true(kl_racepoint_wait("mmu-end-seq", TIMEOUT));
	kl_racepoint_release("fault-populated");
	pthread_join(thread, NULL);
	assert_false(mapped(f, 0, KL_ACC_READ));
	kl_racepoint_release("mmu-end-seq");
	pthread_join(ender, NULL);
	assert_int_equal(f->vm.mmu_invalidate_in_progress, 0);
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
	kl_racepoint_arm("vcpu-awaited", 1);
	pthread_create(&t, NULL, bracket_thread, &b);
	assert_true(kl_racepoint_wait("vcpu-awaited", TIMEOUT));
	assert_false(atomic_load(&b.begun));
	kl_racepoint_release("vcpu-awaited");
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
		T(bracket_during_populate),
		T(fault_while_bracket_ends),
		T(fault_inside_bracket),
		T(fault_meets_invalid_slot),
		T(begin_waits_for_guest_mode),
		T(refused_then_blocking),
		T(refused_after_zap),
		T(odd_brackets),
		T(kicks_do_not_nest),
		T(unmap_under_running_vcpus),
		T(slots_under_running_vcpus),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
