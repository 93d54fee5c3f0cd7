/* SPDX-License-Identifier: MIT */
#include "host/valgrind.h"

/* Valgrind's own way to be asked: rotations that do nothing anywhere else. */
bool kl_under_valgrind(void)
{
	enum { RUNNING_ON_VALGRIND = 0x1001 };
	uint64_t request[6] = {RUNNING_ON_VALGRIND}, depth = 0;

	__asm__ volatile("rolq $3, %%rdi\n\t"
			 "rolq $13, %%rdi\n\t"
			 "rolq $61, %%rdi\n\t"
			 "rolq $51, %%rdi\n\t"
			 "xchgq %%rbx, %%rbx"
			 : "+d"(depth)
			 : "a"(request)
			 : "rdi", "cc", "memory");
	return depth;
}
