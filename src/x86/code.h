/* SPDX-License-Identifier: MIT */
/*
 * Pages of guest memory that hold code: the tracker (mmu/track.h) by which whatever is derived from
 * guest code learns that it is void (T8).
 *
 * Who has something derived from a page (a decoded block; a translation) asks kl_code_want() for it
 * once it is used often. If the page that comes back is live, every write to it by a guest or the
 * engine is reported; the first one kills the page and sets KL_REQ_CODE on all vCPUs of the VM. A
 * dead page is not tracked any more: pages that are written all the time would only cost. It can be
 * asked for again, each time later.
 *
 * Protocol
 *   user                                        writer
 *   ----                                        ------
 *   page is live?            (acquire)          store
 *   compare with memory                         live -> dead       (compare-and-swap)
 *   use, without comparing, until               KL_REQ_CODE on all vCPUs
 *   KL_REQ_CODE or the next epoch               next instruction
 *
 * The first look comes before the comparison: what was stored while the page was not tracked is
 * seen by the comparison, and what is stored later is reported. The writer's next instruction comes
 * after the requests, so a vCPU that learns of the store from the writer finds its request; it
 * looks for one at each edge between blocks.
 *
 * What the program stores through pointers of its own is not reported. So all that was compared is
 * compared once more in each epoch: v->code_epoch moves whenever guest code is entered (KVM_RUN,
 * after an event was delivered or a request served), with every instruction that serialises
 * (KL_OPF_EPOCH), and with PAUSE. An edge whose target is looked up, and is not a link, compares
 * always.
 */
#pragma once

#include <kvmlet/types.h>

#include "base/compiler.h"

struct kl_vcpu;
struct kl_vm;
struct kl_x86_vm;
struct kl_code;

enum kl_code_state {
	KL_CODE_OFF,  /* not tracked */
	KL_CODE_LIVE, /* tracked, and not written since */
	KL_CODE_DEAD, /* written; to be taken off */
};

/* Exists until its VM goes. */
struct kl_code_page {
	kl_gfn_t gfn;
	unsigned as;
	_Atomic uint32_t state;
	_Atomic uint32_t deaths;
	struct kl_code_page *next_dead;
	_Atomic(struct kl_code_page *) next; /* in its hash chain */
};

KL_INLINE bool kl_code_live(const struct kl_code_page *p)
{
	return p && atomic_load_explicit(&p->state, memory_order_acquire) == KL_CODE_LIVE;
}

/*
 * Have @gfn tracked, if there is memory for it. NULL: compare always.
 * Context: a vCPU's thread, outside guest mode; no lock from CODE on.
 */
struct kl_code_page *kl_code_want(struct kl_x86_vm *vm, unsigned as, kl_gfn_t gfn);

/* The page, if anybody has asked for it, or NULL. Takes no lock. */
struct kl_code_page *kl_code_find(struct kl_vcpu *v, kl_gfn_t gfn);

/* KL_REQ_CODE: dead pages are tracked no more. The same context. */
void kl_code_reap(struct kl_x86_vm *vm);

/* The block that has been entered often enough (block.h). In guest mode, no block is running. */
void kl_code_answer(struct kl_vcpu *v);

/* With the VM. 0 or -ENOMEM. */
int kl_code_create(struct kl_x86_vm *vm) KL_MUST_CHECK;
void kl_code_destroy(struct kl_x86_vm *vm);
