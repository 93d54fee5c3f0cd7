/* SPDX-License-Identifier: MIT */
/*
 * Locks: kl_mmu_trace.lock (rank LEAF).
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "host/sys.h"
#include "mmu/mmu.h"
#include "mmu/trace.h"

#define REMEMBERED        64 /* invalidations of one VM */
#define TRIES_BEFORE_LINE 1024

struct event {
	uint64_t number;
	uint64_t start, end; /* hva, of an open bracket */
	kl_gfn_t first, last;
	uint64_t begun_ns;
	pid_t tid;
	bool open;
};

struct kl_mmu_trace {
	struct kl_mutex lock;
	uint64_t last_number;
	struct event events[REMEMBERED]; /* by number */
};

/* The attempts of this thread at one page, until one succeeds. */
static KL_TLS struct {
	struct kl_vcpu_core *vcpu;
	kl_gfn_t gfn;
	uint64_t begun_ns;
	uint64_t awaited; /* number of the last invalidation that was in the way */
	unsigned retries[KL_RETRY_SLOTS + 1];
} attempt;

static const char *const event_names[] = {
	[KL_EVENT_UNMAP] = "unmap",       [KL_EVENT_REMAP] = "remap",
	[KL_EVENT_PROTECT] = "protect",   [KL_EVENT_DISCARD] = "discard",
	[KL_EVENT_TRUNCATE] = "truncate", [KL_EVENT_REPLACE] = "replace",
};

struct kl_mmu_trace *kl_mmu_trace_create(void)
{
	struct kl_mmu_trace *t = kl_trace_on ? calloc(1, sizeof(*t)) : NULL;

	if (t)
		kl_mutex_init(&t->lock, KL_RANK_LEAF);
	return t;
}

void kl_mmu_trace_destroy(struct kl_mmu_trace *t)
{
	if (!t)
		return;
	kl_mutex_destroy(&t->lock);
	free(t);
}

/* The latest invalidation for which @match holds; number 0: none is remembered. */
static struct event *latest(struct kl_mmu_trace *t, bool (*match)(struct event *, const void *),
			    const void *arg)
{
	for (uint64_t n = t->last_number; n > 0 && n + REMEMBERED > t->last_number; n--) {
		struct event *e = &t->events[n % REMEMBERED];

		if (e->number == n && match(e, arg))
			return e;
	}
	return NULL;
}

static bool covers(struct event *e, const void *gfn)
{
	return *(const kl_gfn_t *)gfn >= e->first && *(const kl_gfn_t *)gfn < e->last;
}

static bool is_open_bracket(struct event *e, const void *arg)
{
	const struct kl_notifier_range *r = arg;

	return e->open && e->start == r->start && e->end == r->end && e->tid == kl_gettid();
}

static uint64_t number_of(struct kl_mmu_trace *t, kl_gfn_t gfn)
{
	struct event *e;
	uint64_t n;

	kl_mutex_lock(&t->lock);
	e = latest(t, covers, &gfn);
	n = e ? e->number : 0;
	kl_mutex_unlock(&t->lock);
	return n;
}

static uint64_t remember(struct kl_mmu_trace *t, const struct kl_notifier_range *r, kl_gfn_t first,
			 kl_gfn_t last, uint64_t begun_ns)
{
	uint64_t n;

	kl_mutex_lock(&t->lock);
	n = ++t->last_number;
	t->events[n % REMEMBERED] = (struct event){
		.number = n,
		.start = r ? r->start : 0,
		.end = r ? r->end : 0,
		.first = first,
		.last = last,
		.begun_ns = begun_ns,
		.tid = kl_gettid(),
		.open = r != NULL,
	};
	kl_mutex_unlock(&t->lock);
	return n;
}

#define ULL(x) ((unsigned long long)(x))

/* A vCPU, or a thread that calls the library. */
static const char *name_of(unsigned id, char buf[16])
{
	if (id == KL_ACCESSOR_ID)
		return "accessor";
	snprintf(buf, 16, "vcpu%u", id);
	return buf;
}

void kl_mmu_trace_begin(struct kl_vm *vm, const struct kl_notifier_range *r, const char *cause,
			kl_gfn_t first, kl_gfn_t last, const struct kl_flush_report *f)
{
	uint64_t n = remember(vm->mmu->trace, r, first, last, f->begun_ns);
	char host[80] = "", waited[96] = "", name[16];

	if (r)
		snprintf(host, sizeof(host), " %s hva=%#llx-%#llx", event_names[r->event],
			 ULL(r->start), ULL(r->end));
	if (f->waits)
		snprintf(waited, sizeof(waited),
			 ", waited %llu ns for %u vCPUs, longest %s %llu ns", ULL(f->flush_ns),
			 f->waits, name_of(f->slowest_id, name), ULL(f->slowest_ns));
	kl_trace_write("vm%llu invalidate #%llu %s%s gfn=%#llx-%#llx: %llu leaves, %llu ns%s",
		       ULL(vm->serial), ULL(n), cause ? cause : "?", host, ULL(first), ULL(last),
		       ULL(f->leaves), ULL(kl_trace_ns() - f->begun_ns), waited);
}

void kl_mmu_trace_end(struct kl_vm *vm, const struct kl_notifier_range *r)
{
	struct kl_mmu_trace *t = vm->mmu->trace;
	uint64_t number = 0, begun = 0;
	struct event *e;

	kl_mutex_lock(&t->lock);
	e = latest(t, is_open_bracket, r);
	if (e) {
		e->open = false;
		number = e->number;
		begun = e->begun_ns;
	}
	kl_mutex_unlock(&t->lock);
	if (number)
		kl_trace_write("vm%llu invalidate #%llu over, open for %llu ns", ULL(vm->serial),
			       ULL(number), ULL(kl_trace_ns() - begun));
}

static const char *size_of(unsigned level)
{
	return level == 3 ? "1G" : level == 2 ? "2M" : "4K";
}

void kl_mmu_trace_fault(struct kl_vcpu_core *c, kl_gpa_t gpa, unsigned access, int result,
			const struct kl_fault_report *rep, uint64_t begun_ns)
{
	struct kl_mmu_trace *t = c->vm->mmu->trace;
	kl_gfn_t gfn = gpa >> KL_PAGE_SHIFT;
	uint64_t number = number_of(t, gfn);
	char outcome[32], retries[160] = "", after[40] = "", name[16];
	unsigned tries;

	if (attempt.vcpu != c || attempt.gfn != gfn) {
		memset(&attempt, 0, sizeof(attempt));
		attempt.vcpu = c;
		attempt.gfn = gfn;
		attempt.begun_ns = begun_ns;
	}
	if (rep->retry)
		attempt.retries[rep->retry]++;
	if (rep->retry == KL_RETRY_IN_PROGRESS)
		attempt.awaited = number;
	tries = attempt.retries[KL_RETRY_IN_PROGRESS] + attempt.retries[KL_RETRY_SEQ] +
		attempt.retries[KL_RETRY_SLOTS];
	/* One line when it is over; and now and then where that takes long. */
	if (rep->retry && (tries < TRIES_BEFORE_LINE || (tries & (tries - 1))))
		return;
	if (rep->retry)
		snprintf(outcome, sizeof(outcome), "waits");
	else if (result == KL_FAULT_MAPPED)
		snprintf(outcome, sizeof(outcome), "-> %s", size_of(rep->level));
	else if (result == KL_FAULT_MMIO)
		snprintf(outcome, sizeof(outcome), "-> MMIO");
	else
		snprintf(outcome, sizeof(outcome), "-> error %d", -result);
	if (number)
		snprintf(after, sizeof(after), ", after #%llu", ULL(number));
	if (tries)
		snprintf(retries, sizeof(retries),
			 ", retries: %u range of #%llu in progress, %u sequence moved, %u slots "
			 "changed",
			 attempt.retries[KL_RETRY_IN_PROGRESS], ULL(attempt.awaited),
			 attempt.retries[KL_RETRY_SEQ], attempt.retries[KL_RETRY_SLOTS]);
	kl_trace_write("vm%llu %s fault gpa=%#llx %c%c%c %s, %llu ns%s%s", ULL(c->vm->serial),
		       name_of(c->id, name), ULL(gpa), access & KL_ACC_READ ? 'r' : '-',
		       access & KL_ACC_WRITE ? 'w' : '-', access & KL_ACC_EXEC ? 'x' : '-', outcome,
		       ULL(kl_trace_ns() - attempt.begun_ns), after, retries);
	if (!rep->retry)
		attempt.vcpu = NULL;
}
