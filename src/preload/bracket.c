/* SPDX-License-Identifier: MIT */
/*
 * The bracket around a change of the program's memory (N1, N2, N4), and who maps a file.
 *
 * Runs inside the program's allocator: nothing here allocates. The program's signal handlers
 * wait until the bracket is closed (U3). Engine code that frees memory of its own comes
 * through the wrappers too; it is not bracketed, since what the engine owns backs no slot.
 */
#include <linux/userfaultfd.h>

#include "host/maps.h"
#include "host/uffd.h"
#include "mem/uffd_source.h"
#include "preload/preload.h"

/*
 * Memory that is registered with a userfaultfd that reports events: munmap(), mremap() and
 * madvise() sleep in the kernel until the program's monitor has read the event. Before it does,
 * the monitor may change the slot over this very memory, which waits for brackets in flight (S7).
 * KVM's notifiers do not span that sleep either. So nothing is held over it: a bracket before the
 * call, and one after it. In between a vCPU may fault the memory in again, as it is then, and may
 * keep what it found until the second bracket; whatever else is mapped there before that passes
 * a bracket of its own before the program learns its address.
 *
 * Without events mremap() sleeps all the same where locked memory grows: the new pages come from
 * the monitor.
 */
static bool may_sleep(uint64_t start, uint64_t end, enum kl_notifier_event ev)
{
	if (ev == KL_EVENT_PROTECT || ev == KL_EVENT_TRUNCATE || !kl_uffd_overlaps(start, end))
		return false;
	return ev == KL_EVENT_REMAP ||
	       (kl_uffd_features() &
		(UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE));
}

static bool begin(struct kl_bracket *b)
{
	kl_engine_enter();
	if (!kl_notifier_begin(&b->r))
		return true;
	kl_engine_leave();
	return false;
}

static void end(struct kl_bracket *b)
{
	kl_notifier_end(&b->r);
	kl_engine_leave();
	if (KL_UNLIKELY(kl_pl_self.nr_parked) && !kl_engine_active())
		kl_parked_release();
}

void kl_bracket_open(struct kl_bracket *b, uint64_t start, uint64_t len, enum kl_notifier_event ev,
		     const char *cause)
{
	if (!kl_engine_active())
		kl_bracket_open_inside(b, start, len, ev, cause);
}

void kl_bracket_open_inside(struct kl_bracket *b, uint64_t start, uint64_t len,
			    enum kl_notifier_event ev, const char *cause)
{
	int saved = errno;

	if (!len || start + len < start)
		return;
	b->r = (struct kl_notifier_range){
		.start = start, .end = start + len, .event = ev, .may_block = true, .cause = cause};
	if (begin(b)) {
		b->state = KL_BRACKET_OPEN;
		if (KL_UNLIKELY(may_sleep(start, start + len, ev))) {
			end(b);
			b->state = KL_BRACKET_TWICE;
		}
	}
	errno = saved;
}

void kl_bracket_close(struct kl_bracket *b)
{
	int saved = errno;

	/* What has been mapped there now may belong to a slot. */
	if (kl_uffd_source_on() && (b->r.event == KL_EVENT_REPLACE || b->r.event == KL_EVENT_REMAP))
		kl_uffd_source_rewatch(b->r.start, b->r.end);
	if (b->state == KL_BRACKET_OPEN || begin(b))
		end(b);
	errno = saved;
}

void kl_bracket_join(struct kl_bracket *b, unsigned n)
{
	bool twice = false;

	for (unsigned i = 0; i < n; i++)
		twice |= b[i].state == KL_BRACKET_TWICE;
	for (unsigned i = n; twice && i-- > 0;)
		if (b[i].state == KL_BRACKET_OPEN) {
			end(&b[i]);
			b[i].state = KL_BRACKET_TWICE;
		}
}

/*
 * Files are compared by inode number alone: the device that maps shows is not always the one
 * that fstat shows (btrfs, overlayfs). A range too many costs a few faults.
 */
bool kl_maps_of_file(uint64_t ino, uint64_t off, uint64_t len, uint64_t *start, uint64_t *end)
{
	uint64_t lim = len && off + len > off ? off + len : UINT64_MAX;
	struct kl_maps_entry v;
	struct kl_maps m;

	if (!kl_maps_open(&m)) {
		/* Nobody can say where the file is mapped: everywhere. */
		*start = 0;
		*end = 1ull << 47;
		return true;
	}
	*start = UINT64_MAX;
	*end = 0;
	while (kl_maps_next(&m, &v)) {
		uint64_t size = v.end - v.start;

		if (v.ino != ino || v.off >= lim || v.off + size <= off)
			continue;
		*start = kl_min(*start, off > v.off ? v.start + (off - v.off) : v.start);
		*end = kl_max(*end, lim - v.off < size ? v.start + (lim - v.off) : v.end);
	}
	kl_maps_close(&m);
	return *start < *end;
}

uint64_t kl_maps_segment(uint64_t addr)
{
	uint64_t ino = 0, end = addr;
	struct kl_maps_entry v;
	struct kl_maps m;

	if (!kl_maps_open(&m))
		return (1ull << 47) - addr;
	while (kl_maps_next(&m, &v)) {
		if (v.start < addr || v.start - addr != v.off || !v.ino || (ino && v.ino != ino))
			continue;
		ino = v.ino;
		end = v.end;
	}
	kl_maps_close(&m);
	return end - addr;
}

uint64_t kl_maps_heap(uint64_t brk)
{
	uint64_t start = 0, end = 0;
	struct kl_maps_entry v;
	struct kl_maps m;

	if (!kl_maps_open(&m))
		return 0;
	while (kl_maps_next(&m, &v) && v.start < brk) {
		if (v.ino || v.start != end)
			start = v.start;
		end = v.ino ? 0 : v.end;
	}
	kl_maps_close(&m);
	return end >= brk ? start : brk;
}
