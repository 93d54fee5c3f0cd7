/* SPDX-License-Identifier: MIT */
/*
 * The lines of --trace that explain memory.
 */
#include "mmu_env.h"

#include <stdio.h>

#include "base/config.h"
#include "base/log.h"

static char *slurp(const char *path)
{
	static char buf[65536];
	FILE *file = fopen(path, "r");
	size_t n;

	assert_non_null(file);
	n = fread(buf, 1, sizeof(buf) - 1, file);
	buf[n] = 0;
	fclose(file);
	return buf;
}

/* A VM like the fixture's, with vCPU 3, traced into a file. */
struct traced {
	struct fixture f;
	char path[32];
};

static void begin_trace(struct traced *t, uint8_t *ram)
{
	int fd;

	*t = (struct traced){.f.ram = ram, .path = "/tmp/kvmlet-test-trace.XXXXXX"};
	fd = mkstemp(t->path);
	assert_true(fd >= 0);
	close(fd);
	kl_config.trace_path = t->path;
	kl_log_init();
	assert_int_equal(kl_vm_init(&t->f.vm), 0);
	assert_int_equal(kl_vcpu_core_add(&t->f.vm, &t->f.vcpu, 3), 0);
	assert_int_equal(set(&t->f.vm, 0, 0, 0, NPAGES * PG, ram), 0);
}

/* Returns what has been written. */
static char *end_trace(struct traced *t)
{
	char *log;

	kl_vm_destroy(&t->f.vm);
	kl_trace_on = false;
	kl_config.trace_path = NULL;
	log = slurp(t->path);
	unlink(t->path);
	return log;
}

/* The trace says what an event took, how long it was open, which fault it held up and caused. */
static void trace(void **state)
{
	struct fixture *f = *state;
	struct kl_notifier_range r = range_of(f->ram, 2 * PG);
	struct bracket b = {.f = f, .finish = true};
	struct traced traced;
	struct fixture *g = &traced.f;
	char *log, *next;
	pthread_t t;

	NEED_RACEPOINTS;
	begin_trace(&traced, f->ram);
	assert_int_equal(kl_mmu_fault(&g->vcpu, 0, KL_ACC_WRITE), KL_FAULT_MAPPED);
	r.cause = "munmap";
	r.event = KL_EVENT_UNMAP;
	assert_int_equal(kl_notifier_begin(&r), 0);
	for (int i = 0; i < 1024; i++)
		assert_int_equal(kl_mmu_fault(&g->vcpu, 0, KL_ACC_READ), KL_FAULT_MAPPED);
	kl_notifier_end(&r);
	assert_int_equal(kl_mmu_fault(&g->vcpu, 0, KL_ACC_READ), KL_FAULT_MAPPED);
	assert_true(mapped(g, 0, KL_ACC_READ));
	assert_int_equal(kl_mmu_fault(&g->vcpu, 5 * PG, KL_ACC_WRITE), KL_FAULT_MAPPED);
	kl_vcpu_take_requests(&g->vcpu, KL_REQ_TLB_FLUSH);
	kl_vcpu_enter_guest(&g->vcpu);
	kl_racepoint_arm("vcpu-awaited", 1);
	pthread_create(&t, NULL, bracket_thread, &b);
	assert_true(kl_racepoint_wait("vcpu-awaited", TIMEOUT));
	kl_vcpu_leave_guest(&g->vcpu);
	kl_racepoint_release("vcpu-awaited");
	pthread_join(t, NULL);
	log = end_trace(&traced);
	assert_non_null(strstr(log, "vcpu3 fault gpa=0 -w- -> 4K"));
	assert_non_null(strstr(log, "invalidate #1 munmap unmap hva="));
	assert_non_null(strstr(log, "gfn=0-0x2: 1 leaves"));
	assert_non_null(strstr(log, "invalidate #1 over, open for"));
	assert_non_null(strstr(log, "vcpu3 fault gpa=0 r-- waits"));
	assert_non_null(strstr(log, "after #1, retries: 1024 range of #1 in progress"));
	/* The next one is another. */
	next = strstr(log, "vcpu3 fault gpa=0x5000 -w- -> 4K");
	assert_non_null(next);
	assert_true(!strstr(next, "retries") || strstr(next, "retries") > strchr(next, '\n'));
	log = strstr(log, "invalidate #2 ");
	assert_non_null(log);
	assert_non_null(strstr(log, "for 1 vCPUs, longest vcpu3"));
}

/* A fault's line says how often this one had to be tried, not the one before at the same page. */
static void each_fault_for_itself(void **state)
{
	struct fixture *f = *state;
	struct kl_notifier_range r = range_of(f->ram, PG);
	struct traced traced;
	char *line;

	begin_trace(&traced, f->ram);
	assert_int_equal(kl_notifier_begin(&r), 0);
	for (int i = 0; i < 2; i++)
		assert_int_equal(kl_mmu_fault(&traced.f.vcpu, 0, KL_ACC_READ), KL_FAULT_MAPPED);
	kl_notifier_end(&r);
	for (int i = 0; i < 2; i++) {
		assert_int_equal(kl_mmu_fault(&traced.f.vcpu, 0, KL_ACC_READ), KL_FAULT_MAPPED);
		assert_int_equal(kl_notifier_begin(&r), 0);
		kl_notifier_end(&r);
	}
	line = strstr(end_trace(&traced), "vcpu3 fault gpa=0 r-- -> 4K");
	assert_non_null(line);
	*strchr(line, '\n') = 0;
	assert_non_null(strstr(line, "retries: 2 range of #1 in progress"));
	line = strstr(line + strlen(line) + 1, "vcpu3 fault gpa=0 r-- -> 4K");
	assert_non_null(line);
	*strchr(line, '\n') = 0;
	assert_null(strstr(line, "retries"));
}

static void *delete_slot(void *arg)
{
	struct fixture *f = arg;

	assert_int_equal(set(&f->vm, 0, 0, 0, 0, NULL), 0);
	return NULL;
}

/* S4: that the slot was on its way out when it was looked up is a reason, too. */
static void fault_meets_deletion(void **state)
{
	struct fixture *f = *state;
	struct traced traced;
	pthread_t t;
	char *log;

	NEED_RACEPOINTS;
	begin_trace(&traced, f->ram);
	kl_racepoint_arm("memslot-invalid", 1);
	pthread_create(&t, NULL, delete_slot, &traced.f);
	assert_true(kl_racepoint_wait("memslot-invalid", TIMEOUT));
	for (int i = 0; i < 3; i++)
		assert_int_equal(kl_mmu_fault(&traced.f.vcpu, PG, KL_ACC_READ), KL_FAULT_MAPPED);
	assert_false(mapped(&traced.f, PG, KL_ACC_READ));
	kl_racepoint_release("memslot-invalid");
	pthread_join(t, NULL);
	assert_int_equal(kl_mmu_fault(&traced.f.vcpu, PG, KL_ACC_READ), KL_FAULT_MMIO);
	log = strstr(end_trace(&traced), "vcpu3 fault gpa=0x1000 r-- -> MMIO");
	assert_non_null(log);
	*strchr(log, '\n') = 0;
	assert_non_null(strstr(log, "0 sequence moved, 3 slots changed"));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(trace, setup, teardown),
		cmocka_unit_test_setup_teardown(each_fault_for_itself, setup, teardown),
		cmocka_unit_test_setup_teardown(fault_meets_deletion, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
