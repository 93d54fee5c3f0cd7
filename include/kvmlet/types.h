/* SPDX-License-Identifier: MIT */
/*
 * Address types of kvmlet.
 *
 * A guest-physical address and a guest frame number are integers, as in KVM. A host
 * virtual address is a one-member struct, so that mixing one up with a guest address
 * does not compile.
 */
#ifndef KVMLET_TYPES_H
#define KVMLET_TYPES_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/** Guest-physical address, in bytes. */
typedef uint64_t kl_gpa_t;
/** Guest frame number: a guest-physical address divided by 4096. */
typedef uint64_t kl_gfn_t;
/** Host virtual address, in bytes, in this process. */
typedef struct kl_hva {
	uint64_t addr;
} kl_hva_t;

/** The host address of a pointer. */
static inline kl_hva_t kl_hva(const void *p)
{
	kl_hva_t h = {(uint64_t)(uintptr_t)p};

	return h;
}

#ifdef __cplusplus
}
#endif

#endif
