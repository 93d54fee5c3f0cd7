/* SPDX-License-Identifier: MIT */
/*
 * What the files of the public functions share.
 */
#pragma once

#include <errno.h>

#include <kvmlet/kvmlet.h>

#include "host/thread.h"
#include "mem/vm.h"

struct kvmlet_vm {
	struct kl_vm vm;
	unsigned forks; /* value of kl_api_forks when it was made */
};

/* Forks between this process and the one that loaded the library (U5). */
extern unsigned kl_api_forks;

/* The window that the calling thread holds (mmu/window.c), or NULL. */
extern KL_TLS struct kl_vcpu_core *kl_api_window;

/* 0, or -EIO: the VM is another process's, or dead. */
KL_INLINE int KL_MUST_CHECK kl_api_vm_usable(const struct kvmlet_vm *vm)
{
	if (KL_UNLIKELY(vm->forks != kl_api_forks ||
			atomic_load_explicit(&vm->vm.dead, memory_order_relaxed)))
		return -EIO;
	return 0;
}

/*
 * May the calling thread reach guest memory? A fault waits for brackets and slot changes, and
 * those wait for holders of windows: who has either open himself is refused.
 * 0, -EINVAL (@as), -EDEADLK, or -EIO.
 */
int kl_api_may_access(const struct kvmlet_vm *vm, unsigned as) KL_MUST_CHECK;

/* May it wait for changes of slots, and for reports to trackers? 0, -EDEADLK, or -EIO. */
int kl_api_may_wait(const struct kvmlet_vm *vm) KL_MUST_CHECK;
