/* SPDX-License-Identifier: MIT */
/*
 * cmocka replaces the handlers of SIGSEGV and SIGBUS around every test. The engine needs its
 * own there: keep cmocka's hands off. A crash then ends the test program, which is a failure
 * too.
 *
 * Also: KVMLET_TEST=NAME runs only that test of the program; and where coverage is measured, what
 * children have reached that end with _exit() counts.
 */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <cmocka.h>

typedef void (*handler_t)(int);
/* Found by libcmocka only if the program exports it. */
__attribute__((visibility("default"))) handler_t signal(int sig, handler_t handler);

handler_t signal(int sig, handler_t handler)
{
	struct sigaction sa = {.sa_handler = handler}, old;

	if (sig == SIGSEGV || sig == SIGBUS)
		return SIG_DFL;
	sigemptyset(&sa.sa_mask);
	return sigaction(sig, &sa, &old) ? SIG_ERR : old.sa_handler;
}

__attribute__((constructor)) static void choose_test(void)
{
	const char *name = getenv("KVMLET_TEST");

	if (name)
		cmocka_set_test_filter(name);
}

#ifdef KL_COVERAGE
void __gcov_dump(void);

__attribute__((visibility("default"))) void _exit(int status)
{
	__gcov_dump();
	syscall(SYS_exit_group, status);
	__builtin_unreachable();
}
#endif
