/* SPDX-License-Identifier: MIT */
/*
 * The dirty rate of each slot over time, for `kvmlet run --heatmap`.
 *
 * A VM for which kl_heat_add_vm() was called gives each slot a second dirty log (mem/dirty.h),
 * which is taken here every now and then, by kl_heat_sample(): the program's own logs, or that it
 * has none, do not matter, and are not disturbed. Where it was not called, nothing is different.
 *
 * What was written in a slot is added up in cells: of a band, an equal part of its pages, and a
 * column, some time. All columns are equally long; when they are used up, each two become one. So
 * memory is bounded for however long it takes.
 *
 * Locks: HEAT for the list of VMs, and all of a sample; HEAT_RECORDS for the records.
 */
#pragma once

#include "base/compiler.h"
#include "mem/memslot.h"

#define KL_HEAT_COLUMNS 256
#define KL_HEAT_BANDS   32
#define KL_HEAT_SLOTS   512 /* more are counted, and not told apart */
#define KL_HEAT_TICK_NS 100000000ull

/* What was written in one slot, for as long as it was at one place. */
struct kl_heat_record {
	struct kl_heat_record *next;
	unsigned index; /* the place in the list */
	uint64_t vm;
	unsigned as, id;
	kl_gfn_t base_gfn;
	uint64_t npages;
	uint64_t begun_ns, ended_ns; /* since the first VM; ended: 0, or when the slot went */
	uint64_t written;            /* pages, once for each sample that they are in */
	uint64_t distinct;           /* pages, once */
	uint64_t peak;               /* the most of a sample */
	unsigned band_shift, bands;  /* a band is 1 << band_shift pages */
	uint32_t *cells;             /* [column * bands + band]; NULL: nothing was written */
	uint64_t *ever;              /* a bit for each page; NULL: nothing was written */
};

struct kl_heat {
	struct kl_heat_record *records; /* in the order in which the slots came */
	unsigned nr_records, nr_vms;
	uint64_t now_ns;    /* of the last sample, since the first VM */
	uint64_t column_ns; /* what a column stands for */
	unsigned columns;   /* that are in use */
	uint64_t total[KL_HEAT_COLUMNS];
	uint64_t written; /* of all slots, also those without a record */
	uint64_t unrecorded;
};

/* A VM that nobody else knows yet. */
void kl_heat_add_vm(struct kl_vm *vm);
/* Before its vCPUs go; once more, or of another VM, is nothing. */
void kl_heat_remove_vm(struct kl_vm *vm);

/* Take all logs. Context: no lock. */
void kl_heat_sample(void);
/*
 * The same, once, when the process ends, perhaps out of the middle of anything: does not wait, and
 * leaves the logs as they are. VMs of which some thread changes the slots are left out. False: a
 * sample is being taken.
 */
bool kl_heat_sample_last(void);

/* Between the two nothing changes. NULL: unless @wait, some thread has it. */
const struct kl_heat *kl_heat_read_lock(bool wait);
void kl_heat_read_unlock(void);

void kl_heat_after_fork(void);

/* For tests: drop all records, while there is no VM; the clock is so much ahead. */
void kl_heat_forget(void);
extern uint64_t kl_heat_ahead_ns;

/* ---- for memslot.c: context slots_lock --------------------------------------------------- */

/* NULL: the VM has none, or there is no memory, which is not the program's worry. */
struct kl_dirty_log *kl_heat_log_new(struct kl_vm *vm, unsigned as, unsigned id, uint64_t npages);
/* @slot has come, or is another one now. */
void kl_heat_slot_set(struct kl_vm *vm, const struct kl_memslot *slot);
/* @slot is in no set any more, and nobody reaches its memory. Frees its log. */
void kl_heat_slot_gone(struct kl_vm *vm, const struct kl_memslot *slot);
