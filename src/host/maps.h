/* SPDX-License-Identifier: MIT */
/*
 * A reader of /proc/self/maps: no allocation, no libc call that the preload library wraps.
 * It runs inside the program's allocator.
 */
#pragma once

#include "base/compiler.h"

struct kl_maps_kept;

struct kl_maps {
	struct kl_maps_kept *kept; /* whose descriptor it is; NULL: our own */
	int fd;
	uint64_t off;
	unsigned pos, len;
	char buf[2048];
};

struct kl_maps_entry {
	uint64_t start, end, off, ino;
	unsigned prot; /* PROT_* */
	bool shared;
};

/* False: there is no /proc. */
bool kl_maps_open(struct kl_maps *m);
/* The next mapping, by address; false after the last. */
bool kl_maps_next(struct kl_maps *m, struct kl_maps_entry *e);
void kl_maps_close(struct kl_maps *m);

/* In a forked child: what is kept shows the parent's memory. */
void kl_maps_after_fork(void);
