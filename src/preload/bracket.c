/* SPDX-License-Identifier: MIT */
/*
 * The bracket around a change of the program's memory (N1, N2, N4), and who maps a file.
 *
 * Runs inside the program's allocator: nothing here allocates. The program's signal handlers
 * wait until the bracket is closed (U3). Engine code that frees memory of its own comes
 * through the wrappers too; it is not bracketed, since what the engine owns backs no slot.
 */
#include <fcntl.h>
#include <string.h>

#include "host/maps.h"
#include "preload/preload.h"

void kl_bracket_open(struct kl_bracket *b, uint64_t start, uint64_t len, enum kl_notifier_event ev)
{
	int saved = errno;

	if (!len || start + len < start || kl_engine_active())
		return;
	b->r = (struct kl_notifier_range){
		.start = start, .end = start + len, .event = ev, .may_block = true};
	kl_engine_enter();
	if (kl_notifier_begin(&b->r))
		kl_engine_leave();
	else
		b->on = true;
	errno = saved;
}

void kl_bracket_close(struct kl_bracket *b)
{
	int saved = errno;

	kl_notifier_end(&b->r);
	kl_engine_leave();
	if (KL_UNLIKELY(kl_pl_self.nr_parked) && !kl_engine_active())
		kl_parked_release();
	errno = saved;
}

/*
 * Files are compared by inode number alone: the device that maps shows is not always the one
 * that fstat shows (btrfs, overlayfs). A range too many costs a few faults.
 */
bool kl_maps_of_file(int fd, uint64_t off, uint64_t len, uint64_t *start, uint64_t *end)
{
	uint64_t lim = len && off + len > off ? off + len : UINT64_MAX;
	struct kl_maps_entry v;
	struct stat st;
	struct kl_maps m;

	if (kl_sys(SYS_fstat, fd, &st))
		return false;
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

		if (v.ino != st.st_ino || v.off >= lim || v.off + size <= off)
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
