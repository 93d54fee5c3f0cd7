/* SPDX-License-Identifier: MIT */
/*
 * A guarded touch of just the page that is needed: a userfaultfd user sees the fault that
 * KVM would cause, and a signal can interrupt it.
 */
#include <errno.h>

#include "base/failpoint.h"
#include "host/atomic.h"
#include "host/guard.h"
#include "host/populate.h"
#include "host/sys.h"
#include "host/uffd.h"

static bool interrupted(void)
{
	if (kl_self.give_up && atomic_load(kl_self.give_up))
		return true;
	return kl_self.sig_pending && (kl_self.running || kl_self.interruptible);
}

int kl_host_populate(kl_hva_t hva, bool write, bool *writable)
{
	uint8_t *p = (uint8_t *)(uintptr_t)hva.addr;
	jmp_buf *outer = kl_self.guard;
	volatile enum kl_guard_reason why;
	jmp_buf here;

	if (kl_failpoint("populate"))
		return -EFAULT;
	if (kl_failpoint("populate-hwpoison")) {
		kl_self.fault_addr = hva.addr;
		return -EHWPOISON;
	}
	/*
	 * Between the caller's last look for signals and the touch, a signal may be deferred; it
	 * leaves all others blocked, and the touch could then sleep for ever. So: from
	 * "touching" on a handler abandons the touch wherever it finds this thread; before,
	 * sig_pending says that it came.
	 *
	 * The same holds for give_up and the kick that follows it.
	 *
	 * Only KVM_RUN and refreshes of caches are interrupted; and a kick that was meant for guest
	 * mode and came late is no reason to give up.
	 */
	do {
		why = kl_guard_enter(&here);
		if (why == KL_GUARD_NONE) {
			kl_self.touching = 1;
			atomic_signal_fence(memory_order_seq_cst);
			if (interrupted())
				why = KL_GUARD_INTR;
			else
				kl_touch(p, write);
			atomic_signal_fence(memory_order_seq_cst);
			kl_self.touching = 0;
		}
	} while (why == KL_GUARD_INTR && !interrupted());
	kl_guard_leave(outer);
	/* A read does not try to write: that would break copy-on-write for nothing. */
	*writable = write;
	return kl_guard_errno(why);
}

bool kl_host_must_wait(kl_hva_t hva)
{
	uint64_t page = hva.addr & KL_PAGE_MASK;
	unsigned char resident;

	return kl_uffd_overlaps(page, page + KL_PAGE_SIZE) &&
	       !kl_sys(SYS_mincore, page, KL_PAGE_SIZE, &resident) && !(resident & 1);
}
