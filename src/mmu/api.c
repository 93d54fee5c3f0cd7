/* SPDX-License-Identifier: MIT */
/*
 * The library's public functions on VMs, memslots and notifiers: argument checks, and the
 * brackets that every entry from a program needs (host/thread.h). Accesses to guest memory are
 * in mmu/access.c and mmu/window.c.
 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/bias.h"
#include "base/config.h"
#include "base/log.h"
#include "mem/notifier.h"
#include "mem/uffd_source.h"
#include "mmu/accessor.h"
#include "mmu/api.h"

/*
 * The slot that this thread found last, as values. While the generation is the one of the
 * lookup, and that one is even, they are the published ones (S5); no reader section is needed
 * because nothing is dereferenced. docs/memory-model.md, "A translation without a section".
 */
struct found {
	uint64_t serial;     /* of the VM; never given twice */
	uint64_t generation; /* even, or 0, which no VM ever has; tells the address space, too */
	uint64_t gpa, size, hva;
};
static KL_TLS struct found last_found;

unsigned kl_api_forks;

static void after_fork(void)
{
	kl_api_forks++;
	kl_api_window = NULL;
	last_found.generation = 0;
	kl_vms_after_fork();
}

static void init_process(void)
{
	kl_config_init();
	pthread_atfork(NULL, NULL, after_fork);
}

int kl_api_may_access(const struct kvmlet_vm *vm, unsigned as)
{
	if (KL_UNLIKELY(as >= KL_NR_AS))
		return -EINVAL;
	if (KL_UNLIKELY(kl_self.brackets || kl_api_window || kl_bias_held()))
		return -EDEADLK;
	return kl_api_vm_usable(vm);
}

int kl_api_may_wait(const struct kvmlet_vm *vm)
{
	int r = kl_api_may_access(vm, 0);

	return r ? r : kl_self.reports ? -EDEADLK : 0;
}

KL_EXPORT const char *kvmlet_version(void)
{
	return KVMLET_VERSION;
}

static int create(struct kvmlet_vm **out, bool private)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	struct kvmlet_vm *vm = malloc(sizeof(*vm));
	int r;

	if (!vm)
		return -ENOMEM;
	pthread_once(&once, init_process);
	kl_engine_enter();
	vm->forks = kl_api_forks;
	r = kl_vm_init(&vm->vm);
	if (!r && private)
		kl_vm_make_private(&vm->vm);
	kl_engine_leave();
	if (r)
		free(vm);
	else
		*out = vm;
	return r;
}

KL_EXPORT int kvmlet_vm_create(struct kvmlet_vm **out)
{
	return create(out, false);
}

KL_EXPORT int kvmlet_vm_create_private(struct kvmlet_vm **out)
{
	return create(out, true);
}

KL_EXPORT void kvmlet_vm_destroy(struct kvmlet_vm *vm)
{
	/* A parent's: its locks may be held by threads that do not exist here. */
	if (!vm || vm->forks != kl_api_forks)
		return;
	/* Brackets that it would wait for may be waiting for this thread; so may who tells a
	 * tracker. */
	if (KL_WARN_ONCE(
		    kl_api_window || kl_bias_held() || kl_self.reports,
		    "kvmlet_vm_destroy by the holder of a window or a cache, or in a tracker's "
		    "callback; ignored"))
		return;
	kl_engine_enter();
	kl_vm_destroy(&vm->vm);
	kl_accessors_free(&vm->vm);
	kl_engine_leave();
	free(vm);
}

KL_EXPORT int kvmlet_memslot_set(struct kvmlet_vm *vm, uint32_t slot, uint32_t flags, kl_gpa_t gpa,
				 uint64_t size, kl_hva_t hva)
{
	struct kl_uapi_memory_region2 r = {
		.slot = slot,
		.flags = flags,
		.guest_phys_addr = gpa,
		.memory_size = size,
		.userspace_addr = hva.addr,
	};
	int ret = kl_api_vm_usable(vm);

	if (ret)
		return ret;
	if (kl_api_window || kl_bias_held())
		return -EDEADLK;
	/* What else the engine knows has no function here that goes with it. */
	if (flags & ~(KVMLET_MEM_READONLY | KVMLET_MEM_LOG_DIRTY))
		return -EINVAL;
	kl_engine_enter();
	ret = kl_set_memory_region(&vm->vm, &r);
	kl_engine_leave();
	return ret;
}

KL_EXPORT uint64_t kvmlet_memslot_generation(struct kvmlet_vm *vm)
{
	return kl_generation(&vm->vm, 0);
}

/* @f: what is there now; only kept for later if it was read at an even generation. */
static int find_slot(struct kl_vm *vm, unsigned as, kl_gpa_t gpa, struct found *f)
{
	const struct kl_memslot *slot;
	int token, r = -EFAULT;

	kl_engine_enter();
	token = kl_srcu_read_lock(&vm->srcu);
	f->serial = vm->serial;
	f->generation = kl_generation(vm, as); /* before the set */
	slot = kl_memslot_find(kl_memslots(vm, as), gpa >> KL_PAGE_SHIFT);
	if (slot && !slot->invalid) {
		f->gpa = slot->base_gfn << KL_PAGE_SHIFT;
		f->size = slot->npages << KL_PAGE_SHIFT;
		f->hva = slot->hva;
		r = 0;
	}
	kl_srcu_read_unlock(&vm->srcu, token);
	kl_engine_leave();
	return r;
}

static KL_NOINLINE int translate_slow(struct kvmlet_vm *vm, unsigned as, kl_gpa_t gpa,
				      kl_hva_t *hva, uint64_t *len)
{
	struct found f;
	int r;

	if (as >= KL_NR_AS)
		return -EINVAL;
	r = kl_api_vm_usable(vm);
	if (!r)
		r = find_slot(&vm->vm, as, gpa, &f);
	if (r)
		return r;
	if (!(f.generation & 1))
		last_found = f;
	hva->addr = f.hva + (gpa - f.gpa);
	if (len)
		*len = f.size - (gpa - f.gpa);
	return 0;
}

KL_INLINE int translate(struct kvmlet_vm *vm, unsigned as, kl_gpa_t gpa, kl_hva_t *hva,
			uint64_t *len)
{
	const struct found *f = &last_found;

	if (KL_LIKELY(as < KL_NR_AS &&
		      f->generation ==
			      atomic_load_explicit(&vm->vm.generation[as], memory_order_acquire) &&
		      f->serial == vm->vm.serial && gpa - f->gpa < f->size &&
		      !atomic_load_explicit(&vm->vm.dead, memory_order_relaxed))) {
		hva->addr = f->hva + (gpa - f->gpa);
		if (len)
			*len = f->size - (gpa - f->gpa);
		return 0;
	}
	return translate_slow(vm, as, gpa, hva, len);
}

KL_EXPORT int kvmlet_vm_translate(struct kvmlet_vm *vm, unsigned as, kl_gpa_t gpa, kl_hva_t *hva,
				  uint64_t *len)
{
	return translate(vm, as, gpa, hva, len);
}

KL_EXPORT int kvmlet_memslot_find(struct kvmlet_vm *vm, kl_gpa_t gpa, kl_hva_t *hva)
{
	return translate(vm, 0, gpa, hva, NULL);
}

_Static_assert((int)KVMLET_EVENT_UNMAP == (int)KL_EVENT_UNMAP &&
		       (int)KVMLET_EVENT_REPLACE == (int)KL_EVENT_REPLACE,
	       "the kinds of events are the same inside and outside");

static struct kl_notifier_range internal_range(const struct kvmlet_notifier_range *range)
{
	return (struct kl_notifier_range){
		.start = range->start,
		.end = range->end,
		.event = (enum kl_notifier_event)range->event,
		.may_block = range->may_block,
		.cause = "kvmlet_notifier_begin",
	};
}

KL_EXPORT int kvmlet_notifier_begin(struct kvmlet_notifier_range *range)
{
	struct kl_notifier_range r = internal_range(range);
	int ret;

	if (range->start >= range->end || range->event > KVMLET_EVENT_REPLACE)
		return -EINVAL;
	if (kl_api_window || kl_bias_held())
		return -EDEADLK;
	kl_engine_enter();
	ret = kl_notifier_begin(&r);
	kl_engine_leave();
	return ret;
}

KL_EXPORT void kvmlet_notifier_end(struct kvmlet_notifier_range *range)
{
	struct kl_notifier_range r = internal_range(range);

	kl_engine_enter();
	kl_notifier_end(&r);
	kl_engine_leave();
}

KL_EXPORT int kvmlet_notifier_test_young(uint64_t start, uint64_t end, int *young)
{
	if (start >= end)
		return -EINVAL;
	/* Whoever waits for this thread's window may hold what the look takes. */
	if (kl_api_window)
		return -EDEADLK;
	kl_engine_enter();
	*young = kl_notifier_test_young(start, end);
	kl_engine_leave();
	return 0;
}

KL_EXPORT int kvmlet_notifier_clear_young(uint64_t start, uint64_t end, int *young)
{
	int was;

	if (start >= end)
		return -EINVAL;
	if (kl_api_window)
		return -EDEADLK;
	kl_engine_enter();
	was = kl_notifier_clear_young(start, end);
	kl_engine_leave();
	if (young)
		*young = was;
	return 0;
}

KL_EXPORT int kvmlet_notifier_uffd_source(int enable)
{
	int r = 0;

	/* The helper, and changes of slots, may be waiting for this thread. */
	if (kl_self.brackets || kl_api_window || kl_bias_held() || kl_self.reports)
		return -EDEADLK;
	kl_engine_enter();
	if (enable)
		r = kl_uffd_source_start();
	else
		kl_uffd_source_stop();
	kl_engine_leave();
	return r;
}
