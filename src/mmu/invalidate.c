/* SPDX-License-Identifier: MIT */
/*
 * Notifier events (N2, N3, N5) and ageing (N6).
 *
 * Bookkeeping of events, read by faults under the read lock:              PAIR(inval-seq)
 *   begin: in_progress++, range widened, under the write lock, before the first SPTE goes. So
 *          between the batches of a zap nothing is installed behind it.
 *   end:   seq++, then in_progress--, without the lock: it never waits.
 * A fault reads in_progress first and seq second: if it misses the count, it sees the sequence.
 * The range only ever shrinks when the count has been 0; wider than needed does no harm.
 *
 * An event that must not sleep does all its work in one hold of the lock. It may find, after it
 * has zapped, that a vCPU entered guest mode meanwhile: it fails, the flush is owed, and the next
 * zap of whatever range pays it before it returns.
 */
#include <errno.h>

#include "base/log.h"
#include "base/racepoint.h"
#include "mem/notifier.h"
#include "mem/subscribers.h"
#include "mmu/zap.h"

/* Overlapping events share one range: the smallest that holds all of them. */
static void raise_in_progress(struct kl_vm *vm, kl_gfn_t first, kl_gfn_t last)
{
	if (atomic_fetch_add(&vm->mmu_invalidate_in_progress, 1)) {
		first = kl_min(first, vm->mmu_invalidate_start);
		last = kl_max(last, vm->mmu_invalidate_end);
	}
	vm->mmu_invalidate_start = first;
	vm->mmu_invalidate_end = last;
}

static struct kl_sweep sweep_of(struct kl_vm *vm, unsigned as, const struct kl_overlap *o,
				enum kl_sweep_what what)
{
	return (struct kl_sweep){.vm = vm,
				 .as = as,
				 .next = o->first,
				 .last = o->last,
				 .what = what,
				 .only = o->in_gmem ? KL_SWEEP_GMEM : KL_SWEEP_HVA};
}

/* Would a zap of @r have to wait for a vCPU? Context: lock held for writing. */
static bool would_wait(struct kl_vm *vm, const struct kl_notifier_range *r)
{
	bool mapped = vm->mmu->flush_owed;
	struct kl_overlap o;

	for (unsigned as = 0; as < KL_NR_AS && !mapped; as++)
		kl_for_each_overlap (&o, kl_memslots(vm, as), r->start, r->end) {
			struct kl_sweep s = sweep_of(vm, as, &o, KL_SWEEP_MAPPED);

			kl_stage2_sweep(&s, KL_SWEEP_UNLIMITED);
			if (s.hit) {
				mapped = true;
				break;
			}
		}
	return mapped && kl_vcpus_in_guest(vm);
}

/* Context: lock held for writing. 0 or -EAGAIN. */
static int zap_at_once(struct kl_vm *vm, const struct kl_notifier_range *r,
		       struct kl_flush_report *f)
{
	struct kl_overlap o;
	bool hit = false;

	for (unsigned as = 0; as < KL_NR_AS; as++)
		kl_for_each_overlap (&o, kl_memslots(vm, as), r->start, r->end) {
			struct kl_sweep s = sweep_of(vm, as, &o, KL_SWEEP_ZAP);

			/* A table can be freed only by who may wait for the vCPUs that walk it. */
			s.keep_tables = true;
			kl_stage2_sweep(&s, KL_SWEEP_UNLIMITED);
			hit |= s.hit;
			f->leaves += s.leaves;
		}
	racepoint("mmu-zapped");
	return kl_mmu_flush(vm, hit, false, f);
}

/* Context: lock held for writing; released between batches. */
static void zap_in_batches(struct kl_vm *vm, const struct kl_notifier_range *r,
			   struct kl_flush_report *f)
{
	struct kl_overlap o;

	for (unsigned as = 0; as < KL_NR_AS; as++)
		kl_for_each_overlap (&o, kl_memslots(vm, as), r->start, r->end) {
			struct kl_sweep s = sweep_of(vm, as, &o, KL_SWEEP_ZAP);

			kl_mmu_sweep_locked(&s, f);
		}
}

int kl_mmu_invalidate_begin(struct kl_vm *vm, const struct kl_notifier_range *r)
{
	kl_gfn_t lowest = UINT64_MAX, highest = 0;
	struct kl_mmu *mmu = vm->mmu;
	struct kl_flush_report f = {.begun_ns = mmu->trace ? kl_trace_ns() : 0};
	struct kl_overlap o;
	int ret = 0;

	for (unsigned as = 0; as < KL_NR_AS; as++)
		kl_for_each_overlap (&o, kl_memslots(vm, as), r->start, r->end) {
			lowest = kl_min(lowest, o.first);
			highest = kl_max(highest, o.last);
		}
	if (r->may_block)
		kl_write_lock(&mmu->lock);
	else if (!kl_write_trylock(&mmu->lock))
		return -EAGAIN;
	/* Nothing has changed yet (N5). */
	if (!r->may_block && would_wait(vm, r)) {
		kl_write_unlock(&mmu->lock);
		return -EAGAIN;
	}
	raise_in_progress(vm, lowest, highest);
	if (r->may_block)
		zap_in_batches(vm, r, &f);
	else
		ret = zap_at_once(vm, r, &f);
	if (ret) /* what was zapped will be faulted in again */
		atomic_fetch_sub(&vm->mmu_invalidate_in_progress, 1);
	kl_write_unlock(&mmu->lock);
	kl_graveyard_reap(&mmu->graveyard, 2);
	if (KL_UNLIKELY(mmu->trace) && !ret)
		kl_mmu_trace_begin(vm, r, r->cause, lowest, highest, &f);
	return ret;
}

static void invalidation_over(struct kl_vm *vm)
{
	atomic_fetch_add(&vm->mmu_invalidate_seq, 1); /* PAIR(inval-seq) */
	racepoint("mmu-end-seq");
	KL_BUG_ON(atomic_fetch_sub(&vm->mmu_invalidate_in_progress, 1) <= 0, vm);
}

void kl_mmu_invalidate_end(struct kl_vm *vm, const struct kl_notifier_range *r)
{
	invalidation_over(vm);
	if (KL_UNLIKELY(vm->mmu->trace))
		kl_mmu_trace_end(vm, r);
}

void kl_mmu_change_begin(struct kl_vm *vm, kl_gfn_t first, kl_gfn_t last, const char *cause)
{
	struct kl_flush_report f = {.begun_ns = vm->mmu->trace ? kl_trace_ns() : 0};

	/* Attributes may be set where no guest can reach. */
	first = kl_min(first, KL_MAX_GFN + 1);
	last = kl_min(last, KL_MAX_GFN + 1);
	kl_write_lock(&vm->mmu->lock);
	raise_in_progress(vm, first, last);
	for (unsigned as = 0; as < KL_NR_AS; as++) {
		struct kl_sweep s = {
			.vm = vm, .as = as, .next = first, .last = last, .what = KL_SWEEP_ZAP};

		kl_mmu_sweep_locked(&s, &f);
	}
	kl_write_unlock(&vm->mmu->lock);
	kl_graveyard_reap(&vm->mmu->graveyard, 2);
	if (KL_UNLIKELY(vm->mmu->trace))
		kl_mmu_trace_begin(vm, NULL, cause, first, last, &f);
}

/* Whether there is a slot or not. [B18] */
void kl_mmu_change_end(struct kl_vm *vm)
{
	invalidation_over(vm);
}

/*
 * The lock for reading is enough: no table goes, and a bit comes off by an atomic operation.
 * A vCPU that holds the translation would not set the bit again, so it is flushed; one that looks
 * it up after the bit went sets it.
 */
int kl_mmu_age(struct kl_vm *vm, const struct kl_notifier_range *r, bool clear)
{
	struct kl_mmu *mmu = vm->mmu;
	struct kl_overlap o;
	bool young = false;

	for (unsigned as = 0; as < KL_NR_AS && (clear || !young); as++)
		kl_for_each_overlap (&o, kl_memslots(vm, as), r->start, r->end) {
			struct kl_sweep s =
				sweep_of(vm, as, &o, clear ? KL_SWEEP_AGE : KL_SWEEP_YOUNG);
			bool more;

			do {
				kl_read_lock(&mmu->lock);
				more = kl_stage2_sweep(&s, KL_SWEEP_BATCH);
				if (clear && s.hit)
					(void)kl_vcpus_flush(vm, true);
				kl_read_unlock(&mmu->lock);
				young |= s.hit;
				s.hit = false;
			} while (more);
			if (young && !clear)
				break;
		}
	return young;
}
