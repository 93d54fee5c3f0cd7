/* SPDX-License-Identifier: MIT */
/*
 * N7: a page that the host has poisoned. KVM sends the thread a SIGBUS that names the page, and
 * KVM_RUN fails with EINTR. The test runs where a failpoint can stand in for bad memory
 * (KVMLET_FAIL=populate-hwpoison:N); the guest's next access finds the page in order.
 */
#include "t.h"

static struct vm v;
static volatile sig_atomic_t signals, code, lsb;
static void *volatile addr;

static void on_bus(int sig, siginfo_t *info, void *uc)
{
	signals++;
	code = info->si_code;
	addr = info->si_addr;
	lsb = info->si_addr_lsb;
}

int main(void)
{
	struct sigaction sa = {.sa_sigaction = on_bus, .sa_flags = SA_SIGINFO};
	int r;

	NEED(!sigaction(SIGBUS, &sa, NULL));
	T_VM(&v, code_out);
	r = t_run(&v);
	CHECK(r == -1 && errno == EINTR);
	CHECK(v.run->exit_reason == KVM_EXIT_INTR);
	CHECK(signals == 1 && code == BUS_MCEERR_AR && lsb == 12);
	CHECK(addr == (void *)v.code);
	CHECK(t_out(&v) >= 0);
	CHECK(signals == 1);
	t_free(&v);
	return t_done();
}
