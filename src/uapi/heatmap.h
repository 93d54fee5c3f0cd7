/* SPDX-License-Identifier: MIT */
/*
 * `kvmlet run --heatmap FILE`: who takes the samples (mem/heat.h), and where they go.
 *
 * A helper thread, while there is a VM, samples ten times a second. From the tenth second on it
 * tells every ten seconds how things are, and draws the picture, so that a program which is killed
 * leaves one. Each process has a picture of its own: the first that makes a VM gets FILE, others
 * FILE with their pid in its name.
 *
 * Locks: HEATMAP for the thread's life.
 */
#pragma once

#include <stdio.h>

#include "mem/heat.h"
#include "mem/vm.h"

/* Nothing, unless there is to be a heatmap. Context: no lock. */
void kl_heatmap_add_vm(struct kl_vm *vm);
void kl_heatmap_remove_vm(struct kl_vm *vm);
void kl_heatmap_after_fork(void);

/* A text that is written piece by piece. */
struct kl_heatmap_out {
	int fd;
	size_t n;
	char buf[4096];
};
void kl_heatmap_put(struct kl_heatmap_out *o, const char *fmt, ...) KL_PRINTF(2, 3);
void kl_heatmap_flush(struct kl_heatmap_out *o);

/* "12.3 MiB" */
struct kl_heatmap_text {
	char s[32];
};
struct kl_heatmap_text kl_heatmap_size(uint64_t pages);
/* "3", or "1:3" in the second address space */
struct kl_heatmap_text kl_heatmap_slot(const struct kl_heat_record *r);
/* As often a second, if it came @n times in @ns. */
uint64_t kl_heatmap_rate(uint64_t n, uint64_t ns);

/* heatmap_svg.c: the picture of what @heat has. */
void kl_heatmap_draw(struct kl_heatmap_out *o, const struct kl_heat *heat);
