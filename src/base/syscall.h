/* SPDX-License-Identifier: MIT */
/*
 * Raw system calls: libc's own entry points, syscall(2) included, are wrapped by the preload
 * library. Returns the kernel's value: >= 0 or -errno.
 */
#pragma once

#include <sys/syscall.h>

#include "base/compiler.h"

KL_INLINE long kl_syscall6(long nr, long a, long b, long c, long d, long e, long f)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	long ret;

	__asm__ volatile("syscall"
			 : "=a"(ret)
			 : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return ret;
}

#define kl_sys(nr, ...) KL_SYS_N_(nr, ##__VA_ARGS__, 0, 0, 0, 0, 0, 0)
#define KL_SYS_N_(nr, a, b, c, d, e, f, ...) \
	kl_syscall6(nr, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))
