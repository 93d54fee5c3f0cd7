/* SPDX-License-Identifier: MIT */
/*
 * The process-wide gate of MMU-notifier brackets.
 *
 * Invariant: while a bracket is in flight, the list of VMs and the slots of each VM are those
 * that its begin() saw. So end() finds the same VMs by looking again, nothing needs to be
 * remembered or allocated, and begin/end are balanced whatever the program does in between
 * (N3, S7).
 *
 * It is kept by counting: a bracket is counted in from before begin() looks at anything until
 * end() is done with everything; an update runs only at count 0 (its own thread's brackets
 * excepted when a VM is destroyed inside one), and brackets that begin while an update waits
 * queue behind it, unless their thread holds a bracket already.
 *
 * What this gives for B32: a bracket whose range touches nothing still holds off the
 * publication of a slot until the host call is over.
 *
 * No lock here is ever taken by a vCPU; an event that touches no slot costs two short
 * critical sections and a binary search for each VM.
 */
#include <errno.h>
#include <pthread.h>

#include "base/log.h"
#include "base/racepoint.h"
#include "host/thread.h"
#include "mem/notifier.h"
#include "mem/notifier_gate.h"
#include "mem/subscribers.h"
#include "mem/vm.h"

static struct kl_mutex gate = KL_MUTEX_INITIALIZER(NOTIFIER);
static pthread_cond_t gate_cond = PTHREAD_COND_INITIALIZER;
static int active;  /* brackets in flight */
static int waiting; /* updates that wait for active == 0 or run */
static bool updating;
static int parked; /* brackets of threads that wait in kl_notifier_remove_vm() */
static _Atomic(struct kl_vm *) vms;

bool kl_notifier_active(void)
{
	return atomic_load_explicit(&vms, memory_order_relaxed) != NULL;
}

static struct kl_vm *first_vm(void)
{
	return atomic_load_explicit(&vms, memory_order_acquire);
}

static void gate_wait(void)
{
	pthread_cond_wait(&gate_cond, &gate.m);
}

static bool vm_overlaps(struct kl_vm *vm, uint64_t start, uint64_t end)
{
	for (unsigned as = 0; as < KL_NR_AS; as++) {
		struct kl_overlap o;

		kl_overlap_first(&o, kl_memslots(vm, as), start, end);
		if (o.slot)
			return true;
	}
	return false;
}

static void leave_gate(void)
{
	kl_mutex_lock(&gate);
	active--;
	kl_self.brackets--;
	if (waiting)
		pthread_cond_broadcast(&gate_cond);
	kl_mutex_unlock(&gate);
}

static void end_until(const struct kl_notifier_range *r, const struct kl_vm *stop)
{
	for (struct kl_vm *vm = first_vm(); vm != stop; vm = vm->next)
		if (vm_overlaps(vm, r->start, r->end))
			kl_mmu_invalidate_end(vm, r);
}

static void round_to_pages(struct kl_notifier_range *r)
{
	r->start &= KL_PAGE_MASK;
	if (r->end > KL_PAGE_MASK) /* rounding up would wrap */
		r->end = KL_PAGE_MASK;
	r->end = (r->end + KL_PAGE_SIZE - 1) & KL_PAGE_MASK;
}

int kl_notifier_begin(struct kl_notifier_range *r)
{
	round_to_pages(r);
	kl_mutex_lock(&gate);
	while (waiting && !kl_self.brackets) {
		if (!r->may_block) {
			kl_mutex_unlock(&gate);
			return -EAGAIN;
		}
		gate_wait();
	}
	active++;
	kl_self.brackets++;
	kl_mutex_unlock(&gate);

	racepoint("notifier-begin-counted");
	/* The list and the slots are stable from here to the end of the bracket. */
	for (struct kl_vm *vm = first_vm(); vm; vm = vm->next) {
		int ret;

		if (!vm_overlaps(vm, r->start, r->end))
			continue;
		ret = kl_mmu_invalidate_begin(vm, r);
		if (ret) {
			end_until(r, vm);
			leave_gate();
			return ret;
		}
		kl_stat_add(&vm->stats.mmu_invalidations, 1);
		KL_TRACE("vm%llu invalidate event=%d hva=%#llx-%#llx",
			 (unsigned long long)vm->serial, r->event, (unsigned long long)r->start,
			 (unsigned long long)r->end);
	}
	return 0;
}

void kl_notifier_end(struct kl_notifier_range *r)
{
	if (KL_WARN_ONCE(kl_self.brackets <= 0, "end of a notifier bracket that was not begun on "
						"this thread; ignored"))
		return;
	round_to_pages(r);
	end_until(r, NULL);
	leave_gate();
}

int kl_notifier_update_begin(void)
{
	if (kl_self.brackets)
		return -EDEADLK;
	kl_rank_wait(KL_RANK_NOTIFIER_WAIT);
	kl_mutex_lock(&gate);
	waiting++;
	while (active || updating)
		gate_wait();
	updating = true;
	kl_mutex_unlock(&gate);
	return 0;
}

void kl_notifier_update_end(void)
{
	kl_mutex_lock(&gate);
	updating = false;
	waiting--;
	pthread_cond_broadcast(&gate_cond);
	kl_mutex_unlock(&gate);
}

void kl_notifier_add_vm(struct kl_vm *vm)
{
	kl_mutex_lock(&gate);
	/*
	 * A VM without slots overlaps nothing, so a bracket in flight may or may not see it:
	 * pushing at the head does not disturb a walk. It gets slots only through an update.
	 */
	vm->next = first_vm();
	atomic_store_explicit(&vms, vm, memory_order_release);
	kl_mutex_unlock(&gate);
}

/*
 * Destruction inside a bracket of the same thread (B19): nobody else's bracket may be in
 * flight, except of threads that wait here too; our own will not find the VM when it ends, and
 * what it raised dies with the VM.
 */
void kl_notifier_remove_vm(struct kl_vm *vm)
{
	int own = kl_self.brackets;

	kl_rank_wait(KL_RANK_NOTIFIER_WAIT);
	kl_mutex_lock(&gate);
	waiting++;
	parked += own;
	pthread_cond_broadcast(&gate_cond);
	while (active > parked || updating)
		gate_wait();
	parked -= own;
	if (first_vm() == vm) {
		atomic_store(&vms, vm->next);
	} else {
		for (struct kl_vm *p = first_vm(); p; p = p->next)
			if (p->next == vm) {
				p->next = vm->next;
				break;
			}
	}
	waiting--;
	pthread_cond_broadcast(&gate_cond);
	kl_mutex_unlock(&gate);
}

void kl_notifier_after_fork(void)
{
	pthread_mutex_init(&gate.m, NULL);
	pthread_cond_init(&gate_cond, NULL);
	active = kl_self.brackets = 0;
	waiting = 0;
	updating = false;
	parked = 0;
	atomic_store(&vms, NULL);
}
