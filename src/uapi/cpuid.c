/* SPDX-License-Identifier: MIT */
/*
 * Tables of CPUID leaves between the program and the engine.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "host/guard.h"
#include "pv/pv.h"
#include "uapi/object.h"

static struct kvm_cpuid_entry2 *user_entries(unsigned long arg)
{
	return (struct kvm_cpuid_entry2 *)(arg + offsetof(struct kvm_cpuid2, entries));
}

/* KVM checks the padding for KVM_GET_EMULATED_CPUID only. */
static bool padding_is_clean(unsigned long arg, unsigned n)
{
	for (unsigned i = 0; i < n; i++) {
		uint32_t pad[3];

		if (kl_copy_from_user(pad, &user_entries(arg)[i].padding, sizeof(pad)) || pad[0] ||
		    pad[1] || pad[2])
			return false;
	}
	return true;
}

long kl_cpuid_get_system(unsigned long arg, bool emulated)
{
	struct kvm_cpuid_entry2 *e;
	struct kvm_cpuid2 head;
	int n;

	if (kl_copy_from_user(&head, (void *)arg, sizeof(head)))
		return -EFAULT;
	if (head.nent < 1)
		return -E2BIG;
	head.nent = kl_min(head.nent, (uint32_t)KL_MAX_CPUID_ENTRIES);
	if (emulated && !padding_is_clean(arg, head.nent))
		return -EINVAL;
	e = calloc(head.nent, sizeof(e[0]));
	if (!e)
		return -ENOMEM;
	n = emulated ? kl_x86_emulated_cpuid(e, head.nent) : kl_x86_supported_cpuid(e, head.nent);
	if (n >= 0) {
		head.nent = (uint32_t)n;
		n = 0;
		if (kl_copy_to_user(user_entries(arg), e, head.nent * sizeof(e[0])) ||
		    kl_copy_to_user((void *)arg, &head, sizeof(head)))
			n = -EFAULT;
	}
	free(e);
	return n;
}

/* A copy of the vCPU's table, or NULL; -E2BIG if the program has room for less. */
static int snapshot(struct kl_uvcpu *vc, unsigned room, struct kvm_cpuid_entry2 **out, unsigned *n)
{
	struct kl_vcpu *v = vc->v;
	int r = 0;

	kl_mutex_lock(&vc->lock);
	*n = v->nr_cpuid;
	*out = NULL;
	if (room < *n) {
		r = -E2BIG;
	} else if (*n) {
		kl_x86_refresh_cpuid(v);
		*out = malloc(*n * sizeof(**out));
		if (*out)
			memcpy(*out, v->cpuid, *n * sizeof(**out));
		else
			r = -ENOMEM;
	}
	kl_mutex_unlock(&vc->lock);
	return r;
}

long kl_cpuid_get(struct kl_uvcpu *vc, unsigned long arg)
{
	struct kvm_cpuid_entry2 *e;
	struct kvm_cpuid2 head;
	unsigned n;
	int r;

	if (kl_copy_from_user(&head, (void *)arg, sizeof(head)))
		return -EFAULT;
	r = snapshot(vc, head.nent, &e, &n);
	if (r)
		return r;
	head.nent = n;
	if ((n && kl_copy_to_user(user_entries(arg), e, n * sizeof(*e))) ||
	    kl_copy_to_user((void *)arg, &head, sizeof(head)))
		r = -EFAULT;
	free(e);
	return r;
}

long kl_cpuid_get_hyperv(struct kl_uvcpu *vc, unsigned long arg)
{
	struct kvm_cpuid_entry2 e[KL_HV_NR_LEAVES];
	struct kvm_cpuid2 head;

	if (kl_copy_from_user(&head, (void *)arg, sizeof(head)))
		return -EFAULT;
	if (head.nent < KL_HV_NR_LEAVES)
		return -E2BIG;
	head.nent = KL_HV_NR_LEAVES;
	kl_hv_supported_cpuid(vc ? vc->v : NULL, e);
	if (kl_copy_to_user(user_entries(arg), e, sizeof(e)) ||
	    kl_copy_to_user((void *)arg, &head, sizeof(head)))
		return -EFAULT;
	return 0;
}

static int copy_entries(struct kvm_cpuid_entry2 *to, unsigned long arg, unsigned n, bool v2)
{
	const struct kvm_cpuid_entry *user = (void *)(arg + offsetof(struct kvm_cpuid, entries));

	if (v2)
		return kl_copy_from_user(to, user_entries(arg), n * sizeof(to[0]));
	for (unsigned i = 0; i < n; i++) {
		struct kvm_cpuid_entry e;

		if (kl_copy_from_user(&e, &user[i], sizeof(e)))
			return -EFAULT;
		to[i] = (struct kvm_cpuid_entry2){
			.function = e.function,
			.eax = e.eax,
			.ebx = e.ebx,
			.ecx = e.ecx,
			.edx = e.edx,
		};
	}
	return 0;
}

long kl_cpuid_set(struct kl_uvcpu *vc, unsigned long arg, bool v2)
{
	struct kvm_cpuid_entry2 *e;
	struct kvm_cpuid2 head;
	int r;

	_Static_assert(sizeof(struct kvm_cpuid) == sizeof(struct kvm_cpuid2), "same head");
	if (kl_copy_from_user(&head, (void *)arg, sizeof(head)))
		return -EFAULT;
	if (head.nent > KL_MAX_CPUID_ENTRIES)
		return -E2BIG;
	e = calloc(head.nent + 1, sizeof(e[0])); /* not on the program's stack */
	if (!e)
		return -ENOMEM;
	r = copy_entries(e, arg, head.nent, v2);
	if (!r) {
		kl_mutex_lock(&vc->lock);
		r = kl_x86_set_cpuid(vc->v, e, head.nent);
		kl_mutex_unlock(&vc->lock);
	}
	free(e);
	return r;
}
