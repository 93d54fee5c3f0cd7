/* SPDX-License-Identifier: MIT */
/* The program's filter of the guest's MSR accesses: KVM_X86_SET_MSR_FILTER. */
#include <errno.h>
#include <stdlib.h>

#include "host/guard.h"
#include "x86/access.h"
#include "x86/msr.h"

#define MAX_BITMAP 0x600

struct kl_msr_filter {
	bool default_allow;
	unsigned n;
	struct range {
		uint32_t flags, base, nmsrs;
		uint8_t *bitmap;
	} range[KVM_MSR_FILTER_MAX_RANGES];
};

static void filter_free(struct kl_msr_filter *f)
{
	if (!f)
		return;
	for (unsigned i = 0; i < f->n; i++)
		free(f->range[i].bitmap);
	free(f);
}

static int filter_add(struct kl_msr_filter *f, const struct kvm_msr_filter_range *r)
{
	struct range *n = &f->range[f->n];
	size_t size;

	if (!r->nmsrs)
		return 0;
	if (!r->flags || (r->flags & ~(uint32_t)(KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE)))
		return -EINVAL;
	size = ((size_t)r->nmsrs + 63) / 64 * 8;
	if (size > MAX_BITMAP)
		return -EINVAL;
	n->bitmap = malloc(size);
	if (!n->bitmap)
		return -ENOMEM;
	f->n++;
	n->flags = r->flags;
	n->base = r->base;
	n->nmsrs = r->nmsrs;
	return kl_copy_from_user(n->bitmap, r->bitmap, size);
}

int kl_x86_set_msr_filter(struct kl_x86_vm *vm, const struct kvm_msr_filter *in)
{
	struct kl_msr_filter *f, *old;
	bool empty = true;
	int r;

	if (in->flags & ~(uint32_t)KVM_MSR_FILTER_DEFAULT_DENY)
		return -EINVAL;
	for (unsigned i = 0; i < KVM_MSR_FILTER_MAX_RANGES; i++)
		empty &= !in->ranges[i].nmsrs;
	if (empty && (in->flags & KVM_MSR_FILTER_DEFAULT_DENY))
		return -EINVAL;
	f = calloc(1, sizeof(*f));
	if (!f)
		return -ENOMEM;
	f->default_allow = !(in->flags & KVM_MSR_FILTER_DEFAULT_DENY);
	for (unsigned i = 0; i < KVM_MSR_FILTER_MAX_RANGES; i++) {
		r = filter_add(f, &in->ranges[i]);
		if (r) {
			filter_free(f);
			return r;
		}
	}
	old = atomic_exchange(&vm->msr_filter, f);
	kl_srcu_synchronize(&vm->mem.srcu);
	filter_free(old);
	return 0;
}

void kl_msr_filter_free(struct kl_x86_vm *vm)
{
	filter_free(atomic_exchange(&vm->msr_filter, NULL));
}

bool kl_msr_allowed(struct kl_vcpu *v, uint32_t index, uint32_t type)
{
	struct kl_x86_vm *vm = v->kvm;
	const struct kl_msr_filter *f;
	bool ok = true;
	int idx;

	if (!atomic_load_explicit(&vm->msr_filter, memory_order_relaxed))
		return true;
	if (index >= 0x800 && index <= 0x8ff)
		return true;
	kl_guest_pause(v);
	idx = kl_srcu_read_lock(&vm->mem.srcu);
	f = atomic_load_explicit(&vm->msr_filter, memory_order_acquire);
	if (f) {
		ok = f->default_allow;
		for (unsigned i = 0; i < f->n; i++) {
			const struct range *r = &f->range[i];
			uint32_t bit = index - r->base;

			if (index >= r->base && bit < r->nmsrs && (r->flags & type)) {
				ok = (r->bitmap[bit / 8] >> (bit % 8)) & 1;
				break;
			}
		}
	}
	kl_srcu_read_unlock(&vm->mem.srcu, idx);
	kl_guest_resume(v);
	return ok;
}
