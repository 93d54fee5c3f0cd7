/* SPDX-License-Identifier: MIT */
/*
 * A guarded touch of just the page that is needed: a userfaultfd user sees the fault that
 * KVM would cause, and a signal can interrupt it.
 */
#include <errno.h>

#include "host/access.h"
#include "host/guard.h"
#include "host/populate.h"

/* A write that changes nothing, whoever else writes the byte at the same time. */
static void touch_write(uint8_t *p)
{
#if KL_TSAN
	__atomic_fetch_or(p, 0, __ATOMIC_RELAXED);
#else
	__asm__ volatile("1: lock orb $0, %0\n\t" KL_EXTABLE("1b") : "+m"(*p) : : "memory", "cc");
#endif
}

int kl_host_populate(kl_hva_t hva, bool write, bool *writable)
{
	uint8_t *p = (uint8_t *)(uintptr_t)hva.addr;
	jmp_buf *outer = kl_self.guard;
	enum kl_guard_reason why;
	jmp_buf here;

	/* A kick that was meant for guest mode and came late is no reason to give up. */
	do {
		why = kl_guard_enter(&here);
		if (why == KL_GUARD_NONE) {
			if (write)
				touch_write(p);
			else
				kl_load8(p);
		}
	} while (why == KL_GUARD_INTR && !kl_self.sig_pending);
	kl_guard_leave(outer);
	/* A read does not try to write: that would break copy-on-write for nothing. */
	*writable = write;
	switch (why) {
	case KL_GUARD_NONE:
		return 0;
	case KL_GUARD_HWPOISON:
		return -EHWPOISON;
	case KL_GUARD_INTR:
		return -EINTR;
	default:
		return -EFAULT;
	}
}
