/* SPDX-License-Identifier: MIT */
/*
 * The engine's own system calls. They never go through libc symbols that the preload
 * library wraps, so the engine's mappings are not mistaken for the program's.
 *
 * All return the kernel's value: >= 0, or -errno.
 */
#pragma once

#include <signal.h>
#include <sys/types.h>
#include <linux/futex.h>
#include <time.h>

#include "base/compiler.h"
#include "base/syscall.h"

/* An anonymous private mapping, or NULL. */
void *kl_sys_map(size_t len);
void kl_sys_unmap(void *p, size_t len);
/* memfd above the program's descriptors, close-on-exec; or -errno. */
int kl_sys_memfd(const char *name, size_t size, unsigned seals);
/* A duplicate of @fd above the program's descriptors, close-on-exec; or -errno. */
int kl_sys_dup(int fd);
/*
 * Closes what kl_sys_memfd() or kl_sys_dup() returned. Until then the program cannot close it
 * (base/hidden_fd.h).
 */
void kl_sys_close(int fd);

/* *addr != val: -EAGAIN; signal: -EINTR; timeout: -ETIMEDOUT. @timeout relative or NULL. */
int kl_futex_wait(_Atomic uint32_t *addr, uint32_t val, const struct timespec *timeout);
/* @deadline: absolute, CLOCK_MONOTONIC, or NULL. */
int kl_futex_wait_until(_Atomic uint32_t *addr, uint32_t val, const struct timespec *deadline);
void kl_futex_wake(_Atomic uint32_t *addr, int n);

/* Our pid and tid, cached; correct in a forked child. */
pid_t kl_gettid(void);

/*
 * How handlers are installed: libc's sigaction, or the preload library's way around its own
 * wrapper. Set once, before the first VM exists.
 */
extern int (*kl_sys_sigaction)(int, const struct sigaction *, struct sigaction *);
