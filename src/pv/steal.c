/* SPDX-License-Identifier: MIT */
/*
 * Steal time: for how long the vCPU's thread was ready to run on the host and did not (X3). The
 * kernel tells it in /proc/thread-self/schedstat; where it does not, the feature is not offered.
 *
 * KVM writes the area whenever the thread is scheduled. A process does not learn of that, so it is
 * written when KVM_RUN begins and, with "preempted" set, when it ends. The time itself is read anew
 * after some 50 us: it costs a system call, a run a twentieth of a microsecond.
 */
#include "pv/pv.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>

#include "host/access.h"
#include "host/atomic.h"
#include "host/sys.h"
#include "x86/tsc.h"

#define PREEMPTED (1u << 0)
#define FLUSH_TLB (1u << 1)
#define ENABLED   1ull

/* struct kvm_steal_time: ABI. */
struct steal_time {
	uint64_t steal;
	uint32_t version, flags;
	uint8_t preempted, pad8[3];
	uint32_t pad[11];
};
_Static_assert(sizeof(struct steal_time) == 64, "ABI");
#define LOW_BITS 0x3full /* the area is aligned to its size */

static long open_schedstat(void)
{
	return kl_sys(SYS_openat, AT_FDCWD, "/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
}

/* "running waiting slices", in ns. False: this kernel does not say. */
static bool read_run_delay(long fd, uint64_t *ns)
{
	char buf[80], *space;
	long n = kl_sys(SYS_pread64, fd, buf, sizeof(buf) - 1, 0);

	if (n <= 0)
		return false;
	buf[n] = 0;
	space = strchr(buf, ' ');
	if (!space)
		return false;
	*ns = strtoull(space, NULL, 10);
	return true;
}

bool kl_pv_steal_supported(void)
{
	static _Atomic int cached;
	int yes = atomic_load_explicit(&cached, memory_order_relaxed);
	uint64_t ns;
	long fd;

	if (!yes) {
		fd = open_schedstat();
		yes = read_run_delay(fd, &ns) ? 1 : -1;
		kl_sys(SYS_close, fd);
		atomic_store_explicit(&cached, yes, memory_order_relaxed);
	}
	return yes > 0;
}

/* The descriptor for the calling thread, kept as long as it runs this vCPU. */
static bool follow_thread(struct kl_pv_vcpu *pv)
{
	long fd;

	if (pv->steal_tid == kl_gettid())
		return true;
	kl_pv_steal_close(pv);
	fd = open_schedstat();
	if (fd < 0)
		return false;
	pv->steal_fd = kl_sys_dup((int)fd);
	kl_sys(SYS_close, fd);
	if (pv->steal_fd < 0)
		return false;
	pv->steal_tid = kl_gettid();
	return true;
}

void kl_pv_steal_close(struct kl_pv_vcpu *pv)
{
	if (pv->steal_tid)
		kl_sys_close(pv->steal_fd);
	pv->steal_tid = 0;
}

/* What has come to it since the last time. */
static uint64_t stolen(struct kl_vcpu *v, bool exact)
{
	struct kl_pv_vcpu *pv = v->pv;
	uint64_t now = kl_host_tsc(), ns, delta;
	/* What a thread waited before it became this vCPU's is not the vCPU's; but as in KVM, what
	 * the first one did is. */
	bool same = pv->steal_tid == kl_gettid() || !pv->run_delay_read;

	if (!exact && same && now - pv->run_delay_read < v->kvm->tsc_khz / 20)
		return 0;
	if (!follow_thread(pv) || !read_run_delay(pv->steal_fd, &ns))
		return 0;
	delta = same ? ns - pv->run_delay : 0;
	pv->run_delay = ns;
	pv->run_delay_read = now;
	return delta;
}

uint64_t kl_pv_stolen(struct kl_vcpu *v)
{
	return stolen(v, true);
}

struct update {
	uint64_t stolen;
	bool flush;
};

static void write_area(void *p, void *arg)
{
	struct update *u = arg;
	uint8_t *at = p, *version = at + offsetof(struct steal_time, version);
	uint32_t n = kl_load32(version);

	/* The guest may ask for a flush at any time while "preempted" is set. */
	u->flush = kl_xchg8(at + offsetof(struct steal_time, preempted), 0) & FLUSH_TLB;
	n += n & 1 ? 2 : 1; /* odd: being written */
	kl_store32(version, n);
	kl_store64(at, kl_load64(at) + u->stolen);
	kl_store32(version, n + 1);
}

int kl_pv_steal_update(struct kl_vcpu *v)
{
	struct update u = {0};
	int r;

	if (!(v->pv->steal_msr & ENABLED))
		return 0;
	u.stolen = stolen(v, false);
	r = kl_pv_write(&v->pv->steal, sizeof(struct steal_time), write_area, &u);
	if (r && u.stolen)
		v->pv->run_delay -= u.stolen; /* the next time tells it */
	if (!r && u.flush)
		kl_tlb_flush(v);
	return r;
}

int kl_pv_steal_moved(struct kl_vcpu *v)
{
	uint64_t msr = v->pv->steal_msr;
	int r = msr & ENABLED
			? kl_gpc_activate(&v->pv->steal, msr & ~LOW_BITS, sizeof(struct steal_time))
			: kl_gpc_deactivate(&v->pv->steal);

	return r == -EINTR ? r : 0;
}

static void write_preempted(void *p, void *arg)
{
	(void)arg;
	kl_store8((uint8_t *)p + offsetof(struct steal_time, preempted), PREEMPTED);
}

/* KVM_RUN ends: for the other vCPUs this one does not run. Not worth waiting for its page. */
void kl_pv_steal_leave(struct kl_vcpu *v)
{
	if (v->pv->steal_msr & ENABLED)
		kl_pv_trywrite(&v->pv->steal, sizeof(struct steal_time), write_preempted, NULL);
}
