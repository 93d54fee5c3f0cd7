/* SPDX-License-Identifier: MIT */
/*
 * Lists of MSRs between the program and the engine, and the MSR filter.
 */
#include <errno.h>
#include <stdlib.h>

#include "host/guard.h"
#include "uapi/object.h"

/* Takes the head and entries. Number of entries, or -errno. */
static long copy_msrs(unsigned long arg, struct kvm_msr_entry *e)
{
	struct kvm_msrs head;

	if (kl_copy_from_user(&head, (void *)arg, sizeof(head)))
		return -EFAULT;
	if (head.nmsrs >= KL_MAX_IO_MSRS)
		return -E2BIG;
	if (kl_copy_from_user(e, (char *)arg + offsetof(struct kvm_msrs, entries),
			      head.nmsrs * sizeof(e[0])))
		return -EFAULT;
	return head.nmsrs;
}

long kl_msrs_get(struct kl_uvcpu *vc, unsigned long arg)
{
	struct kvm_msr_entry e[KL_MAX_IO_MSRS];
	long n = copy_msrs(arg, e), i;

	if (vc)
		kl_mutex_lock(&vc->lock);
	for (i = 0; i < n; i++) {
		uint64_t data = e[i].data;
		int r = vc ? kl_x86_get_msr(vc->v, e[i].index, &data)
			   : kl_x86_get_feature_msr(e[i].index, &data);

		if (r)
			break;
		e[i].data = data;
	}
	if (vc)
		kl_mutex_unlock(&vc->lock);
	if (n < 0)
		return n;
	if (kl_copy_to_user((char *)arg + offsetof(struct kvm_msrs, entries), e,
			    (size_t)n * sizeof(e[0])))
		return -EFAULT;
	return i;
}

long kl_msrs_set(struct kl_uvcpu *vc, unsigned long arg)
{
	struct kvm_msr_entry e[KL_MAX_IO_MSRS];
	long n = copy_msrs(arg, e), i;

	kl_mutex_lock(&vc->lock);
	for (i = 0; i < n; i++) {
		if (kl_x86_set_msr(vc->v, e[i].index, e[i].data))
			break;
	}
	kl_mutex_unlock(&vc->lock);
	return n < 0 ? n : i;
}

long kl_msrs_index_list(unsigned long arg, bool features)
{
	const uint32_t *list = features ? kl_x86_feature_msr_list : kl_x86_msr_list;
	unsigned n = features ? kl_x86_nr_feature_msrs : kl_x86_nr_msrs();
	struct kvm_msr_list head;
	unsigned room;

	if (kl_copy_from_user(&head, (void *)arg, sizeof(head)))
		return -EFAULT;
	room = head.nmsrs;
	head.nmsrs = n;
	if (kl_copy_to_user((void *)arg, &head, sizeof(head)))
		return -EFAULT;
	if (room < n)
		return -E2BIG;
	if (kl_copy_to_user((char *)arg + offsetof(struct kvm_msr_list, indices), list,
			    n * sizeof(list[0])))
		return -EFAULT;
	return 0;
}

/* ---- KVM_X86_SET_MSR_FILTER -------------------------------------------------------- */

/* Replaces the program's bitmap by a copy of the engine's, or by NULL for an empty range. */
static int copy_range(struct kvm_msr_filter_range *range)
{
	const uint8_t *user = range->bitmap;
	size_t size;
	uint8_t *copy;

	range->bitmap = NULL;
	if (!range->nmsrs)
		return 0;
	if (!range->flags || (range->flags & ~(uint32_t)KVM_MSR_FILTER_RANGE_VALID_MASK))
		return -EINVAL;
	size = ((size_t)range->nmsrs + 63) / 64 * 8;
	if (size > KL_MSR_FILTER_MAX_BITMAP)
		return -EINVAL;
	copy = malloc(size);
	if (!copy)
		return -ENOMEM;
	if (kl_copy_from_user(copy, user, size)) {
		free(copy);
		return -EFAULT;
	}
	range->bitmap = copy;
	return 0;
}

long kl_vm_set_msr_filter(struct kl_uvm *vm, unsigned long arg)
{
	struct kvm_msr_filter f;
	bool empty = true;
	unsigned done;
	int r = 0;

	if (kl_copy_from_user(&f, (void *)arg, sizeof(f)))
		return -EFAULT;
	if (f.flags & ~(uint32_t)KVM_MSR_FILTER_VALID_MASK)
		return -EINVAL;
	for (unsigned i = 0; i < KL_ARRAY_SIZE(f.ranges); i++)
		empty = empty && !f.ranges[i].nmsrs;
	if (empty && (f.flags & KVM_MSR_FILTER_DEFAULT_DENY))
		return -EINVAL;
	for (done = 0; !r && done < KL_ARRAY_SIZE(f.ranges); done++)
		r = copy_range(&f.ranges[done]);
	if (!r) {
		kl_mutex_lock(&vm->kvm.lock);
		r = kl_x86_set_msr_filter(&vm->kvm, &f);
		kl_mutex_unlock(&vm->kvm.lock);
	}
	for (unsigned i = 0; i < done; i++)
		free(f.ranges[i].bitmap);
	return r;
}
