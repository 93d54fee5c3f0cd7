/* SPDX-License-Identifier: MIT */
#include "mem/heat.h"

#include <stdlib.h>
#include <string.h>

#include "base/failpoint.h"
#include "base/log.h"
#include "host/sys.h"
#include "mem/dirty.h"
#include "mem/vm.h"

static struct kl_mutex list_lock = KL_MUTEX_INITIALIZER(HEAT);
static struct kl_vm *vms; /* list_lock */

static struct kl_mutex lock = KL_MUTEX_INITIALIZER(HEAT_RECORDS);
static struct kl_heat heat; /* lock */
static struct kl_heat_record **last = &heat.records;
static uint64_t start_ns; /* lock */

uint64_t kl_heat_ahead_ns;

/* Since the first VM. */
static uint64_t now(void)
{
	return kl_trace_ns() + kl_heat_ahead_ns - start_ns;
}

/* ---- records: lock held ------------------------------------------------------------------ */

/* Each two columns become one. */
static void merge_columns(void)
{
	for (unsigned c = 0; c < KL_HEAT_COLUMNS; c++) {
		uint64_t n = heat.total[c];

		heat.total[c] = 0;
		heat.total[c / 2] += n;
	}
	for (struct kl_heat_record *r = heat.records; r; r = r->next) {
		for (unsigned i = 0; r->cells && i < KL_HEAT_COLUMNS * r->bands; i++) {
			unsigned to = i / r->bands / 2 * r->bands + i % r->bands;
			uint64_t sum = r->cells[i];

			r->cells[i] = 0;
			sum += r->cells[to];
			r->cells[to] = (uint32_t)kl_min(sum, (uint64_t)UINT32_MAX);
		}
	}
	heat.column_ns *= 2;
}

/* The column of what is counted now. */
static unsigned column_now(void)
{
	uint64_t c;

	heat.now_ns = now();
	while ((c = heat.now_ns / heat.column_ns) >= KL_HEAT_COLUMNS)
		merge_columns();
	heat.columns = (unsigned)c + 1;
	return (unsigned)c;
}

/* A slot that comes back to where it was goes on with what it had. */
static bool is_of(const struct kl_heat_record *r, const struct kl_vm *vm,
		  const struct kl_memslot *slot)
{
	return r->vm == vm->serial && r->as == slot->as_id && r->id == slot->id &&
	       r->base_gfn == slot->base_gfn && r->npages == slot->npages;
}

static struct kl_heat_record *find(const struct kl_vm *vm, const struct kl_memslot *slot)
{
	struct kl_heat_record *r = heat.records;

	while (r && !is_of(r, vm, slot))
		r = r->next;
	return r;
}

/* Slots of some number of pages more than there are bands have bands of a power of two. */
static struct kl_heat_record *make(const struct kl_vm *vm, const struct kl_memslot *slot)
{
	struct kl_heat_record *r;

	if (heat.nr_records >= KL_HEAT_SLOTS)
		return NULL;
	r = kl_failpoint("heat-record") ? NULL : calloc(1, sizeof(*r));
	if (!r)
		return NULL;
	*r = (struct kl_heat_record){
		.index = heat.nr_records,
		.vm = vm->serial,
		.as = slot->as_id,
		.id = slot->id,
		.base_gfn = slot->base_gfn,
		.npages = slot->npages,
		.begun_ns = now(),
	};
	while (((r->npages - 1) >> r->band_shift) >= KL_HEAT_BANDS)
		r->band_shift++;
	r->bands = (unsigned)((r->npages - 1) >> r->band_shift) + 1;
	*last = r;
	last = &r->next;
	heat.nr_records++;
	return r;
}

static bool has_cells(struct kl_heat_record *r)
{
	size_t size = (r->npages + 63) / 64 * sizeof(*r->ever);

	if (r->cells)
		return true;
	r->ever = kl_sys_map(size);
	if (!r->ever)
		return false;
	r->cells = calloc((size_t)KL_HEAT_COLUMNS * r->bands, sizeof(*r->cells));
	if (!r->cells) {
		kl_sys_unmap(r->ever, size);
		r->ever = NULL;
	}
	return r->cells;
}

/* ---- counting ---------------------------------------------------------------------------- */

struct count {
	struct kl_heat_record *r; /* NULL: none */
	unsigned column;
	uint64_t pages;
};

static void add_word(void *arg, uint64_t word, uint64_t pages)
{
	struct count *n = arg;
	struct kl_heat_record *r = n->r;

	n->pages += (uint64_t)__builtin_popcountll(pages);
	if (!r || !has_cells(r))
		return;
	r->distinct += (uint64_t)__builtin_popcountll(pages & ~r->ever[word]);
	r->ever[word] |= pages;
	/* Bands may be smaller than a word. */
	for (; pages; pages &= pages - 1) {
		uint64_t page = word * 64 + (unsigned)__builtin_ctzll(pages);
		uint32_t *cell = &r->cells[n->column * r->bands + (page >> r->band_shift)];

		*cell += *cell < UINT32_MAX;
	}
}

static void count(struct kl_vm *vm, struct kl_dirty_log *log, bool keep)
{
	struct count n = {.r = log->record, .column = column_now()};

	kl_dirty_log_harvest(vm, log, keep, add_word, &n);
	heat.written += n.pages;
	heat.total[n.column] += n.pages;
	if (n.r) {
		n.r->written += n.pages;
		n.r->peak = kl_max(n.r->peak, n.pages);
	} else {
		heat.unrecorded += n.pages;
	}
}

/* All slots of a VM. Context: lock, slots_lock. */
static void count_vm(struct kl_vm *vm, bool keep)
{
	for (unsigned as = 0; as < KL_NR_AS; as++) {
		uint64_t left = kl_memslots(vm, as)->by_gfn.n;

		for (unsigned id = 0; left && id < KL_USER_MEM_SLOTS; id++) {
			const struct kl_memslot *slot = vm->slot_by_id[as][id];

			left -= slot != NULL;
			if (slot && slot->heat)
				count(vm, slot->heat, keep);
		}
	}
}

/* ---- slots ------------------------------------------------------------------------------- */

struct kl_dirty_log *kl_heat_log_new(struct kl_vm *vm, unsigned as, unsigned id, uint64_t npages)
{
	struct kl_dirty_log *log = vm->heat ? kl_dirty_log_new_own(vm, as, id, npages) : NULL;

	if (log)
		log->record = NULL;
	return log;
}

static void end_record(struct kl_heat_record *r)
{
	if (r)
		r->ended_ns = now();
}

void kl_heat_slot_set(struct kl_vm *vm, const struct kl_memslot *slot)
{
	struct kl_heat_record *r = slot->heat->record;

	if (r && is_of(r, vm, slot))
		return;
	kl_mutex_lock(&lock);
	/* What was written before it moved was written there. */
	if (r)
		count(vm, slot->heat, false);
	end_record(r);
	r = find(vm, slot);
	if (!r)
		r = make(vm, slot);
	if (r)
		r->ended_ns = 0;
	slot->heat->record = r;
	kl_mutex_unlock(&lock);
}

void kl_heat_slot_gone(struct kl_vm *vm, const struct kl_memslot *slot)
{
	kl_mutex_lock(&lock);
	count(vm, slot->heat, true);
	end_record(slot->heat->record);
	kl_mutex_unlock(&lock);
	kl_dirty_log_free(vm, slot->heat);
}

/* ---- VMs --------------------------------------------------------------------------------- */

void kl_heat_add_vm(struct kl_vm *vm)
{
	vm->heat = true;
	kl_mutex_lock(&list_lock);
	vm->next_hot = vms;
	vms = vm;
	kl_mutex_lock(&lock);
	if (!heat.nr_vms++) {
		start_ns += now();
		heat.column_ns = KL_HEAT_TICK_NS;
	}
	kl_mutex_unlock(&lock);
	kl_mutex_unlock(&list_lock);
}

void kl_heat_remove_vm(struct kl_vm *vm)
{
	struct kl_vm **p = &vms;

	if (!vm->heat)
		return;
	kl_mutex_lock(&list_lock);
	while (*p != vm)
		p = &(*p)->next_hot;
	*p = vm->next_hot;
	kl_mutex_lock(&vm->slots_lock);
	kl_mutex_lock(&lock);
	count_vm(vm, true);
	for (struct kl_heat_record *r = heat.records; r; r = r->next)
		if (r->vm == vm->serial && !r->ended_ns)
			end_record(r);
	kl_mutex_unlock(&lock);
	kl_mutex_unlock(&vm->slots_lock);
	kl_mutex_unlock(&list_lock);
	vm->heat = false;
}

void kl_heat_sample(void)
{
	kl_mutex_lock(&list_lock);
	for (struct kl_vm *vm = vms; vm; vm = vm->next_hot) {
		kl_mutex_lock(&vm->slots_lock);
		kl_mutex_lock(&lock);
		count_vm(vm, false);
		kl_mutex_unlock(&lock);
		kl_mutex_unlock(&vm->slots_lock);
	}
	kl_mutex_unlock(&list_lock);
}

bool kl_heat_sample_last(void)
{
	if (!kl_mutex_trylock(&list_lock))
		return false;
	for (struct kl_vm *vm = vms; vm; vm = vm->next_hot) {
		if (!kl_mutex_trylock(&vm->slots_lock))
			continue;
		if (kl_mutex_trylock(&lock)) {
			count_vm(vm, true);
			kl_mutex_unlock(&lock);
		}
		kl_mutex_unlock(&vm->slots_lock);
	}
	kl_mutex_unlock(&list_lock);
	return true;
}

const struct kl_heat *kl_heat_read_lock(bool wait)
{
	if (wait)
		kl_mutex_lock(&lock);
	else if (!kl_mutex_trylock(&lock))
		return NULL;
	if (heat.nr_vms)
		(void)column_now();
	return &heat;
}

void kl_heat_read_unlock(void)
{
	kl_mutex_unlock(&lock);
}

void kl_heat_forget(void)
{
	struct kl_heat_record *r, *next;

	for (r = heat.records; r; r = next) {
		next = r->next;
		if (r->ever)
			kl_sys_unmap(r->ever, (r->npages + 63) / 64 * sizeof(*r->ever));
		free(r->cells);
		free(r);
	}
	heat = (struct kl_heat){0};
	last = &heat.records;
	start_ns = 0;
}

/* The records are the parent's. */
void kl_heat_after_fork(void)
{
	kl_mutex_init(&list_lock, KL_RANK_HEAT);
	kl_mutex_init(&lock, KL_RANK_HEAT_RECORDS);
	vms = NULL;
	heat = (struct kl_heat){0};
	last = &heat.records;
}
