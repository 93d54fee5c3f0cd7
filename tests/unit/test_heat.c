/* SPDX-License-Identifier: MIT */
/*
 * What --heatmap counts (D1, D3): each page once for each sample, without the program's own logs
 * noticing.
 */
#include <sys/wait.h>

#include "mmu_env.h"

#include "base/failpoint.h"
#include "mem/dirty.h"
#include "mem/gpc.h"
#include "mem/heat.h"

#define LOG KVM_MEM_LOG_DIRTY_PAGES

static int hot_setup(void **state)
{
	int r = setup(state);
	struct fixture *f = *state;

	if (r)
		return r;
	kl_heat_ahead_ns = 0;
	kl_heat_add_vm(&f->vm);
	return set(&f->vm, 0, 0, 0, 0, f->ram) || set(&f->vm, 0, 0, 0, NPAGES * PG, f->ram);
}

/* What is counted is the process's, to its end. */
static int hot_teardown(void **state)
{
	struct fixture *f = *state;

	kl_heat_remove_vm(&f->vm);
	kl_heat_forget();
	return teardown(state);
}

static void store(struct fixture *f, uint64_t gpa)
{
	for (;;) {
		bool writable, mmio;
		uint8_t *p;

		kl_vcpu_enter_guest(&f->vcpu);
		kl_vcpu_take_requests(&f->vcpu, KL_REQ_TLB_FLUSH);
		p = kl_mmu_lookup(&f->vcpu, gpa, KL_ACC_WRITE, &writable, &mmio);
		if (p)
			kl_store8(p, kl_load8(p) + 1);
		kl_vcpu_leave_guest(&f->vcpu);
		if (p)
			return;
		assert_int_equal(kl_mmu_fault(&f->vcpu, gpa, KL_ACC_WRITE), KL_FAULT_MAPPED);
	}
}

/* May a vCPU that has read the page write it, without looking again? */
static bool may_write_after_read(struct fixture *f, uint64_t gpa)
{
	bool writable = false, mmio;

	kl_vcpu_enter_guest(&f->vcpu);
	kl_vcpu_take_requests(&f->vcpu, KL_REQ_TLB_FLUSH);
	assert_non_null(kl_mmu_lookup(&f->vcpu, gpa, KL_ACC_READ, &writable, &mmio));
	kl_vcpu_leave_guest(&f->vcpu);
	return writable;
}

static const struct kl_heat_record *record(unsigned index)
{
	const struct kl_heat *heat = kl_heat_read_lock(true);
	const struct kl_heat_record *r = heat->records;

	while (r && r->index != index)
		r = r->next;
	kl_heat_read_unlock();
	return r;
}

static uint64_t get_log(struct fixture *f)
{
	uint64_t word = ~0ull;

	assert_int_equal(kl_dirty_log_get(&f->vm, 0, 0, &word, false), 0);
	return word;
}

/* Each sample counts a page once, however often it is written; and which ones is known. */
static void counted_once_a_sample(void **state)
{
	struct fixture *f = *state;
	const struct kl_heat_record *r = record(0);

	kl_heat_sample();
	assert_non_null(r);
	assert_int_equal(r->written, 0);
	assert_null(r->cells);
	for (unsigned i = 0; i < 3; i++)
		store(f, 2 * PG);
	store(f, 9 * PG);
	kl_heat_sample();
	kl_heat_sample();
	assert_int_equal(r->written, 2);
	assert_int_equal(r->peak, 2);
	store(f, 9 * PG);
	kl_heat_sample();
	assert_int_equal(r->written, 3);
	assert_int_equal(r->distinct, 2);
	assert_int_equal(r->peak, 2);
	assert_int_equal(r->bands, NPAGES);
	/* The log that was never asked for is not there. */
	assert_int_equal(kl_dirty_log_get(&f->vm, 0, 0, &(uint64_t){0}, false), -ENOENT);
}

/* Two logs: what one of them loses by being read, the other keeps. */
static void logs_do_not_meet(void **state)
{
	struct fixture *f = *state;
	const struct kl_heat_record *r = record(0);

	assert_int_equal(set(&f->vm, 0, LOG, 0, NPAGES * PG, f->ram), 0);
	store(f, PG);
	assert_true(may_write_after_read(f, PG));
	kl_heat_sample();
	assert_int_equal(r->written, 1);
	/* Marked in the program's still, and may be written only when it is in the other, too. */
	assert_false(may_write_after_read(f, PG));
	store(f, PG);
	assert_int_equal(get_log(f), 1u << 1);
	kl_heat_sample();
	assert_int_equal(r->written, 2);
	store(f, 3 * PG);
	assert_int_equal(get_log(f), 1u << 3);
	assert_int_equal(get_log(f), 0);
	assert_false(may_write_after_read(f, 3 * PG));
	store(f, 3 * PG);
	assert_int_equal(get_log(f), 1u << 3);
	kl_heat_sample();
	assert_int_equal(r->written, 3);
	/* The program's ends, and the other one goes on. */
	store(f, 4 * PG);
	assert_int_equal(set(&f->vm, 0, 0, 0, NPAGES * PG, f->ram), 0);
	store(f, 5 * PG);
	kl_heat_sample();
	assert_int_equal(r->written, 5);
}

/* A device's writes count, too, with a log and without. */
static void caches_are_counted(void **state)
{
	struct fixture *f = *state;
	const struct kl_heat_record *r = record(0);
	struct kl_gpc gpc;

	assert_int_equal(kl_gpc_init(&gpc, &f->vm, 0, KL_GPC_USER), 0);
	assert_int_equal(kl_gpc_activate(&gpc, 7 * PG, 8), 0);
	for (unsigned logged = 0; logged < 2; logged++) {
		void *p;

		assert_int_equal(set(&f->vm, 0, logged ? LOG : 0, 0, NPAGES * PG, f->ram), 0);
		assert_int_equal(kl_gpc_lock(&gpc, 8, &p), 0);
		kl_store64(p, 1);
		assert_true(kl_gpc_unlock(&gpc, true));
		kl_heat_sample();
		assert_int_equal(r->written, logged + 1);
	}
	assert_int_equal(get_log(f), 1u << 7);
	kl_gpc_destroy(&gpc);
}

/* A slot that moves or goes takes nothing with it, and one that comes back goes on. */
static void slots_come_and_go(void **state)
{
	struct fixture *f = *state;
	const struct kl_heat_record *r = record(0), *moved;

	store(f, 0);
	assert_int_equal(set(&f->vm, 0, 0, 32 * PG, NPAGES * PG, f->ram), 0);
	moved = record(1);
	assert_int_equal(r->written, 1);
	assert_int_not_equal(r->ended_ns, 0);
	assert_int_equal(moved->base_gfn, 32);
	store(f, 32 * PG);
	assert_int_equal(set(&f->vm, 0, 0, 32 * PG, 0, f->ram), 0);
	assert_int_equal(moved->written, 1);
	assert_int_not_equal(moved->ended_ns, 0);
	assert_int_equal(set(&f->vm, 0, 0, 0, NPAGES * PG, f->ram), 0);
	assert_null(record(2));
	assert_int_equal(r->ended_ns, 0);
	store(f, PG);
	/* What nobody has sampled is counted when the VM goes. */
	kl_heat_remove_vm(&f->vm);
	assert_int_equal(r->written, 2);
	assert_int_not_equal(r->ended_ns, 0);
}

static uint64_t sum(const struct kl_heat_record *r, unsigned columns, unsigned band)
{
	uint64_t n = 0;

	for (unsigned c = 0; c < columns; c++)
		n += r->cells[c * r->bands + band];
	return n;
}

/* However long it takes, the columns suffice, and nothing is lost when two become one. */
static void columns_merge(void **state)
{
	struct fixture *f = *state;
	const struct kl_heat_record *r = record(0);
	const struct kl_heat *heat;
	uint64_t total = 0;

	for (unsigned i = 0; i < 3 * KL_HEAT_COLUMNS; i++) {
		kl_heat_ahead_ns += KL_HEAT_TICK_NS;
		store(f, 3 * PG);
		if (i % 2)
			store(f, 8 * PG);
		kl_heat_sample();
	}
	heat = kl_heat_read_lock(true);
	kl_heat_read_unlock();
	/* The test itself takes some time. */
	assert_true(heat->column_ns >= 4 * KL_HEAT_TICK_NS);
	assert_true(heat->columns > KL_HEAT_COLUMNS / 2 && heat->columns <= KL_HEAT_COLUMNS);
	assert_int_equal(sum(r, heat->columns, 3), 3 * KL_HEAT_COLUMNS);
	assert_int_equal(sum(r, heat->columns, 8), 3 * KL_HEAT_COLUMNS / 2);
	assert_int_equal(sum(r, KL_HEAT_COLUMNS, 3), 3 * KL_HEAT_COLUMNS);
	assert_true(r->cells[0 * r->bands + 3] >= 2); /* two or more of what was one */
	for (unsigned c = 0; c < KL_HEAT_COLUMNS; c++) {
		assert_int_equal(heat->total[c],
				 r->cells[c * r->bands + 3] + r->cells[c * r->bands + 8]);
		total += heat->total[c];
	}
	assert_int_equal(total, 9 * KL_HEAT_COLUMNS / 2);
	/* As if nobody had looked for a year. */
	kl_heat_ahead_ns += 365ull * 86400 * 1000000000;
	store(f, 3 * PG);
	kl_heat_sample();
	assert_true(heat->columns <= KL_HEAT_COLUMNS);
	assert_int_equal(sum(r, heat->columns, 3), 3 * KL_HEAT_COLUMNS + 1);
}

static void *change_slots(void *arg)
{
	struct fixture *f = arg;

	kl_mutex_lock(&f->vm.slots_lock);
	racepoint("test-slots-locked");
	kl_mutex_unlock(&f->vm.slots_lock);
	return NULL;
}

/* What is counted when a program ends: as any sample, but nobody is waited for. */
static void last_sample(void **state)
{
	struct fixture *f = *state;
	const struct kl_heat_record *r = record(0);
	pthread_t t;

	store(f, 2 * PG);
	store(f, 9 * PG);
	assert_true(kl_heat_sample_last());
	assert_int_equal(r->written, 2);
	NEED_RACEPOINTS;
	store(f, 3 * PG);
	kl_racepoint_arm("test-slots-locked", 1);
	assert_int_equal(pthread_create(&t, NULL, change_slots, f), 0);
	assert_true(kl_racepoint_wait("test-slots-locked", TIMEOUT));
	assert_true(kl_heat_sample_last());
	assert_int_equal(r->written, 2);
	kl_racepoint_release("test-slots-locked");
	pthread_join(t, NULL);
}

/* Slots of any number, and of one VM only when that VM goes. */
static void each_its_own(void **state)
{
	struct fixture *f = *state, g = {.ram = f->ram};
	const struct kl_heat_record *r;

	assert_int_equal(kl_vm_init(&g.vm), 0);
	assert_int_equal(kl_vcpu_core_add(&g.vm, &g.vcpu, 0), 0);
	kl_heat_add_vm(&g.vm);
	assert_int_equal(set(&g.vm, 300, 0, 0, NPAGES * PG, g.ram), 0);
	store(&g, PG);
	store(f, 2 * PG);
	kl_heat_sample();
	r = record(1);
	assert_non_null(r);
	assert_int_equal(r->written, 1);
	assert_int_equal(record(0)->written, 1);
	kl_heat_remove_vm(&f->vm);
	assert_int_not_equal(record(0)->ended_ns, 0);
	assert_int_equal(r->ended_ns, 0);
	store(&g, PG);
	kl_heat_remove_vm(&g.vm);
	assert_int_not_equal(r->ended_ns, 0);
	assert_int_equal(r->written, 2);
	kl_vm_destroy(&g.vm);
}

/* More than a cell can count: it stays at the most. */
static void cell_is_full(void **state)
{
	struct fixture *f = *state;
	const struct kl_heat_record *r = record(0);
	const struct kl_heat *heat;
	unsigned at;

	store(f, 2 * PG);
	kl_heat_sample();
	heat = kl_heat_read_lock(true);
	at = (heat->columns - 1) * r->bands + 2;
	assert_int_equal(r->cells[at], 1);
	r->cells[at] = UINT32_MAX;
	kl_heat_read_unlock();
	store(f, 2 * PG);
	kl_heat_sample();
	/* In the same column, or the next. */
	assert_int_equal(r->cells[at], UINT32_MAX);
	assert_int_equal(r->written, 2);
}

/* U5: a child that is forked while somebody reads counts for itself. */
static void forked(void **state)
{
	struct fixture *f = *state;
	const struct kl_heat *heat;
	int status;
	pid_t pid;

	store(f, PG);
	kl_heat_sample();
	/* ThreadSanitizer believes that the child holds it for ever. */
	if (!KL_TSAN)
		(void)kl_heat_read_lock(true);
	pid = fork();
	if (!pid) {
		struct fixture c = {.ram = f->ram};

		kl_vms_after_fork();
		kl_heat_ahead_ns = 0;
		if (kl_vm_init(&c.vm) || kl_vcpu_core_add(&c.vm, &c.vcpu, 0))
			_exit(1);
		kl_heat_add_vm(&c.vm);
		if (set(&c.vm, 0, 0, 0, NPAGES * PG, c.ram))
			_exit(2);
		store(&c, PG);
		store(&c, 2 * PG);
		kl_heat_sample();
		heat = kl_heat_read_lock(true);
		_exit(!heat->records || heat->records->written != 2 || heat->records->next);
	}
	if (!KL_TSAN)
		kl_heat_read_unlock();
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
}

/* A record's memory goes with it. */
static void forgotten(void **state)
{
	struct fixture *f = *state;
	unsigned char v;
	void *ever;

	store(f, 2 * PG);
	kl_heat_sample();
	ever = (void *)record(0)->ever;
	assert_non_null(ever);
	assert_int_equal(mincore(ever, 1, &v), 0);
	kl_heat_remove_vm(&f->vm);
	kl_heat_forget();
	assert_int_equal(mincore(ever, 1, &v), -1);
	assert_null(kl_heat_read_lock(true)->records);
	kl_heat_read_unlock();
}

/* Memory that is not there for the heatmap is none of the program's worries. */
static void without_memory(void **state)
{
	struct fixture *f = *state;

	if (!kl_failpoints_enabled())
		skip();
	kl_failpoint_arm("dirty-log-alloc", 1);
	assert_int_equal(set(&f->vm, 1, 0, 64 * PG, PG, f->ram), 0);
	assert_true(kl_failpoint_disarm("dirty-log-alloc"));
	store(f, 64 * PG);
	kl_failpoint_arm("heat-record", 1);
	assert_int_equal(set(&f->vm, 2, 0, 65 * PG, PG, f->ram), 0);
	assert_true(kl_failpoint_disarm("heat-record"));
	store(f, 65 * PG);
	kl_heat_sample();
	assert_int_equal(kl_heat_read_lock(true)->unrecorded, 1);
	kl_heat_read_unlock();
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, hot_setup, hot_teardown)
	const struct CMUnitTest tests[] = {
		TEST(counted_once_a_sample), TEST(logs_do_not_meet), TEST(caches_are_counted),
		TEST(slots_come_and_go),     TEST(columns_merge),    TEST(without_memory),
		TEST(last_sample),           TEST(forgotten),        TEST(forked),
		TEST(each_its_own),          TEST(cell_is_full),
	};

	cmocka_set_test_filter(getenv("KVMLET_TEST"));
	return cmocka_run_group_tests(tests, NULL, NULL);
}
