/* SPDX-License-Identifier: MIT */
/*
 * Locks: code->lock (rank CODE), while a page begins or ceases to be tracked, and while pages are
 * added. A writer's callback takes none, since some writers hold locks: it finds the page in a hash
 * from which nothing is ever removed.
 */
#include <errno.h>
#include <stdlib.h>

#include "base/failpoint.h"
#include "base/racepoint.h"
#include "mmu/track.h"
#include "x86/access.h"
#include "x86/block.h"
#include "x86/code.h"
#include "x86/xlate/xlate.h"

#define HASH      1024u
#define MAX_PAGES 65536u
#define MAX_SHIFT 12 /* of the number of entries after which a page is asked for again */

struct kl_code {
	struct kl_mutex lock;
	struct kl_x86_vm *vm;
	struct kl_tracker tracker;
	unsigned nr_pages;
	_Atomic(struct kl_code_page *) dead; /* by next_dead */
	_Atomic(struct kl_code_page *) hash[HASH];
};

static _Atomic(struct kl_code_page *) *chain(struct kl_code *code, unsigned as, kl_gfn_t gfn)
{
	return &code->hash[(gfn ^ gfn >> 10 ^ as) % HASH];
}

static struct kl_code_page *find(struct kl_code *code, unsigned as, kl_gfn_t gfn)
{
	struct kl_code_page *p = atomic_load_explicit(chain(code, as, gfn), memory_order_acquire);

	while (p && (p->gfn != gfn || p->as != as))
		p = atomic_load_explicit(&p->next, memory_order_acquire);
	return p;
}

struct kl_code_page *kl_code_find(struct kl_vcpu *v, kl_gfn_t gfn)
{
	return find(v->kvm->code, v->core.as_id, gfn);
}

/* Context: lock. */
static struct kl_code_page *add(struct kl_code *code, unsigned as, kl_gfn_t gfn)
{
	_Atomic(struct kl_code_page *) *head = chain(code, as, gfn);
	struct kl_code_page *p;

	if (code->nr_pages == MAX_PAGES)
		return NULL;
	p = calloc(1, sizeof(*p));
	if (!p)
		return NULL;
	p->as = as;
	p->gfn = gfn;
	atomic_init(&p->next, atomic_load_explicit(head, memory_order_relaxed));
	code->nr_pages++;
	atomic_store_explicit(head, p, memory_order_release);
	return p;
}

/*
 * Through another slot over the same host memory, writes are not reported. (A slot that comes later
 * is the program's to announce: docs/deviations.md.)
 */
static bool shared(struct kl_vm *vm, unsigned as, kl_gfn_t gfn)
{
	int token = kl_srcu_read_lock(&vm->srcu);
	const struct kl_memslot *slot = kl_memslot_find(kl_memslots(vm, as), gfn);
	struct kl_overlap o;
	unsigned n = 0;

	if (slot) {
		uint64_t hva = kl_memslot_hva(slot, gfn).addr;

		for (unsigned i = 0; i < KL_NR_AS; i++)
			kl_for_each_overlap (&o, kl_memslots(vm, i), hva, hva + KL_PAGE_SIZE)
				n++;
	}
	kl_srcu_read_unlock(&vm->srcu, token);
	return n != 1;
}

/* Context: lock. */
static void reap_locked(struct kl_code *code)
{
	struct kl_code_page *p = atomic_exchange(&code->dead, NULL), *next;

	kl_assert_held(&code->lock);
	/*
	 * Between here and the end of a translated block that lies in such a page, a store could
	 * hit the block without anybody noticing [T8]. So nobody is in one when it goes on.
	 */
	if (p && kl_xlate_wanted())
		kl_vcpus_request_all(&code->vm->mem, KL_REQ_CODE);
	for (; p; p = next) {
		next = p->next_dead;
		/* The slot may have gone, and the count with it. */
		(void)!kl_track_remove(&code->vm->mem, p->as, p->gfn);
		atomic_store_explicit(&p->state, KL_CODE_OFF, memory_order_release);
	}
}

struct kl_code_page *kl_code_want(struct kl_x86_vm *vm, unsigned as, kl_gfn_t gfn)
{
	struct kl_code *code = vm->code;
	struct kl_code_page *p;

	if (shared(&vm->mem, as, gfn))
		return NULL;
	kl_mutex_lock(&code->lock);
	reap_locked(code);
	p = find(code, as, gfn);
	if (!p)
		p = add(code, as, gfn);
	if (p && atomic_load(&p->state) == KL_CODE_OFF && !kl_track_add(&vm->mem, as, gfn)) {
		racepoint("code-tracked");
		/* What is written before this is seen by whoever compares afterwards. */
		atomic_store_explicit(&p->state, KL_CODE_LIVE, memory_order_release);
	}
	kl_mutex_unlock(&code->lock);
	return p;
}

void kl_code_reap(struct kl_x86_vm *vm)
{
	kl_mutex_lock(&vm->code->lock);
	reap_locked(vm->code);
	kl_mutex_unlock(&vm->code->lock);
}

/* False: it was not live. */
static bool die(struct kl_code *code, struct kl_code_page *p)
{
	uint32_t live = KL_CODE_LIVE;

	if (!atomic_compare_exchange_strong(&p->state, &live, KL_CODE_DEAD))
		return false;
	atomic_fetch_add_explicit(&p->deaths, 1, memory_order_relaxed);
	/* Once in the list until it is reaped: only who reaps makes it live again. */
	p->next_dead = atomic_load(&code->dead);
	while (!atomic_compare_exchange_weak(&code->dead, &p->next_dead, p))
		;
	return true;
}

static void track_write(void *opaque, unsigned as, kl_gpa_t gpa, const void *bytes, size_t len)
{
	struct kl_code *code = opaque;
	struct kl_code_page *p = find(code, as, gpa >> KL_PAGE_SHIFT);

	if (!p || !die(code, p))
		return;
	racepoint("code-killed");
	kl_vcpus_request_all(&code->vm->mem, KL_REQ_CODE);
}

/*
 * Translations of the slot have been flushed: whoever enters a block looks the page up anew. Not
 * live any more means that nothing of what comes to lie there is trusted.
 */
static void track_remove_region(void *opaque, unsigned as, kl_gfn_t gfn, uint64_t npages)
{
	struct kl_code *code = opaque;

	kl_mutex_lock(&code->lock);
	/* First those whose count may be taken by now: by nobody, while the change is under way. */
	reap_locked(code);
	for (unsigned i = 0; i < HASH; i++) {
		struct kl_code_page *p = atomic_load(&code->hash[i]);

		for (; p; p = atomic_load(&p->next)) {
			uint32_t live = KL_CODE_LIVE;

			if (p->as == as && p->gfn - gfn < npages)
				atomic_compare_exchange_strong(&p->state, &live, KL_CODE_OFF);
		}
	}
	kl_mutex_unlock(&code->lock);
}

void kl_code_answer(struct kl_vcpu *v)
{
	struct kl_block *b = v->blocks->ask;
	struct kl_code_page *p;

	v->blocks->ask = NULL;
	kl_guest_pause(v);
	p = kl_code_want(v->kvm, v->core.as_id, b->gfn);
	kl_guest_resume(v);
	b->page = p;
	b->until = KL_BLOCK_PATIENCE
		   << kl_min(p ? atomic_load_explicit(&p->deaths, memory_order_relaxed) : MAX_SHIFT,
			     (uint32_t)MAX_SHIFT);
}

int kl_code_create(struct kl_x86_vm *vm)
{
	struct kl_code *code = kl_failpoint("x86-code") ? NULL : calloc(1, sizeof(*code));

	if (!code)
		return -ENOMEM;
	code->vm = vm;
	kl_mutex_init(&code->lock, KL_RANK_CODE);
	code->tracker = (struct kl_tracker){
		.ops = {track_write, track_remove_region}, .opaque = code, .internal = true};
	kl_track_register(&vm->mem, &code->tracker);
	vm->code = code;
	return 0;
}

void kl_code_destroy(struct kl_x86_vm *vm)
{
	struct kl_code *code = vm->code;

	kl_track_unregister(&vm->mem, &code->tracker);
	for (unsigned i = 0; i < HASH; i++) {
		struct kl_code_page *p = atomic_load(&code->hash[i]), *next;

		for (; p; p = next) {
			next = atomic_load(&p->next);
			free(p);
		}
	}
	kl_mutex_destroy(&code->lock);
	free(code);
	vm->code = NULL;
}
