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

/* The trace says what an event took, how long it was open, which fault it held up and caused. */
static void trace(void **state)
{
	char path[] = "/tmp/kvmlet-trace-XXXXXX", *log, *next;
	struct fixture *f = *state, g = {0};
	struct kl_notifier_range r = range_of(f->ram, 2 * PG);
	struct bracket b = {.f = f, .finish = true};
	pthread_t t;
	int fd;

	NEED_RACEPOINTS;
	fd = mkstemp(path);
	assert_true(fd >= 0);
	kl_config.trace_path = path;
	kl_log_init();
	assert_int_equal(kl_vm_init(&g.vm), 0);
	assert_int_equal(kl_vcpu_core_add(&g.vm, &g.vcpu, 3), 0);
	assert_int_equal(set(&g.vm, 0, 0, 0, NPAGES * PG, f->ram), 0);
	assert_int_equal(kl_mmu_fault(&g.vcpu, 0, KL_ACC_WRITE), KL_FAULT_MAPPED);
	r.cause = "munmap";
	r.event = KL_EVENT_UNMAP;
	assert_int_equal(kl_notifier_begin(&r), 0);
	for (int i = 0; i < 1024; i++)
		assert_int_equal(kl_mmu_fault(&g.vcpu, 0, KL_ACC_READ), KL_FAULT_MAPPED);
	kl_notifier_end(&r);
	assert_int_equal(kl_mmu_fault(&g.vcpu, 0, KL_ACC_READ), KL_FAULT_MAPPED);
	assert_true(mapped(&g, 0, KL_ACC_READ));
	assert_int_equal(kl_mmu_fault(&g.vcpu, 5 * PG, KL_ACC_WRITE), KL_FAULT_MAPPED);
	kl_vcpu_take_requests(&g.vcpu, KL_REQ_TLB_FLUSH);
	kl_vcpu_enter_guest(&g.vcpu);
	kl_racepoint_arm("vcpu-awaited", 1);
	pthread_create(&t, NULL, bracket_thread, &b);
	assert_true(kl_racepoint_wait("vcpu-awaited", TIMEOUT));
	kl_vcpu_leave_guest(&g.vcpu);
	kl_racepoint_release("vcpu-awaited");
	pthread_join(t, NULL);
	kl_vm_destroy(&g.vm);
	kl_trace_on = false;
	kl_config.trace_path = NULL;
	log = slurp(path);
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
	close(fd);
	unlink(path);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(trace, setup, teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
