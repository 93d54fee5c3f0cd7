/* SPDX-License-Identifier: MIT */
/*
 * KVM's binary interface as of Linux 6.12, where Debian 12's <linux/kvm.h> (6.1) ends before
 * it: numbers and layouts, declared once. struct kvm_userspace_memory_region2 is
 * kl_uapi_memory_region2 in mem/memslot.h.
 */
#pragma once

#include <linux/kvm.h>

#include "base/compiler.h"
#include "mem/attr.h"
#include "mem/memslot.h"

#ifndef KVM_SET_USER_MEMORY_REGION2
#define KVM_SET_USER_MEMORY_REGION2 _IOW(KVMIO, 0x49, struct kl_uapi_memory_region2)
#endif
_Static_assert(sizeof(struct kl_uapi_memory_region2) == 0xa0, "ABI");
_Static_assert(sizeof(struct kvm_userspace_memory_region) ==
		       offsetof(struct kl_uapi_memory_region2, guest_memfd_offset),
	       "the old structure is a prefix of the new one");

#ifndef KVM_CAP_USER_MEMORY2
#define KVM_CAP_USER_MEMORY2 231
#endif
#ifndef KVM_CAP_MEMORY_FAULT_INFO
#define KVM_CAP_MEMORY_FAULT_INFO    232
#define KVM_EXIT_MEMORY_FAULT        39
#define KVM_MEMORY_EXIT_FLAG_PRIVATE (1ULL << 3)
/* In struct kvm_run's union, as its member memory_fault. */
struct kl_uapi_memory_fault {
	__u64 flags;
	__u64 gpa;
	__u64 size;
};
#endif
#ifndef KVM_CAP_MEMORY_ATTRIBUTES
#define KVM_CAP_MEMORY_ATTRIBUTES    233
#define KVM_SET_MEMORY_ATTRIBUTES    _IOW(KVMIO, 0xd2, struct kvm_memory_attributes)
#define KVM_MEMORY_ATTRIBUTE_PRIVATE (1ULL << 3)
struct kvm_memory_attributes {
	__u64 address;
	__u64 size;
	__u64 attributes;
	__u64 flags;
};
#endif
_Static_assert(KVM_MEMORY_ATTRIBUTE_PRIVATE == KL_ATTR_PRIVATE, "one bit, two layers");
#ifndef KVM_CAP_GUEST_MEMFD
#define KVM_CAP_GUEST_MEMFD    234
#define KVM_CREATE_GUEST_MEMFD _IOWR(KVMIO, 0xd4, struct kvm_create_guest_memfd)
struct kvm_create_guest_memfd {
	__u64 size;
	__u64 flags;
	__u64 reserved[6];
};
#endif
_Static_assert(sizeof(struct kvm_create_guest_memfd) == 64, "ABI");
#ifndef KVM_CAP_VM_TYPES
#define KVM_CAP_VM_TYPES 235
#endif
/* Linux 6.18; only with --abi=6.18. */
#ifndef KVM_CAP_GUEST_MEMFD_FLAGS
#define KVM_CAP_GUEST_MEMFD_FLAGS    244
#define GUEST_MEMFD_FLAG_MMAP        (1ULL << 0)
#define GUEST_MEMFD_FLAG_INIT_SHARED (1ULL << 1)
#endif
#ifndef KVM_CAP_PRE_FAULT_MEMORY
#define KVM_CAP_PRE_FAULT_MEMORY 236
#define KVM_PRE_FAULT_MEMORY     _IOWR(KVMIO, 0xd5, struct kvm_pre_fault_memory)
struct kvm_pre_fault_memory {
	__u64 gpa;
	__u64 size;
	__u64 flags;
	__u64 padding[5];
};
#endif
_Static_assert(sizeof(struct kvm_pre_fault_memory) == 64, "ABI");
#ifndef KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP
#define KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP 225
#endif
_Static_assert(sizeof(struct kvm_dirty_gfn) == 16, "ABI");
#ifndef KVM_CAP_X86_APIC_BUS_CYCLES_NS
#define KVM_CAP_X86_APIC_BUS_CYCLES_NS 237
#endif
#ifndef KVM_X86_DEFAULT_VM
#define KVM_X86_DEFAULT_VM 0
#endif
#ifndef KVM_X86_SW_PROTECTED_VM
#define KVM_X86_SW_PROTECTED_VM 1
#endif
#ifndef KVM_X86_QUIRK_SLOT_ZAP_ALL
#define KVM_X86_QUIRK_SLOT_ZAP_ALL (1 << 7)
#endif
#ifndef KVM_MSR_FILTER_RANGE_VALID_MASK
#define KVM_MSR_FILTER_RANGE_VALID_MASK (KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE)
#endif
#ifndef KVM_MSR_FILTER_VALID_MASK
#define KVM_MSR_FILTER_VALID_MASK KVM_MSR_FILTER_DEFAULT_DENY
#endif
#ifndef KVM_MSR_EXIT_REASON_VALID_MASK
#define KVM_MSR_EXIT_REASON_VALID_MASK \
	(KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER)
#endif
#define KL_MSR_FILTER_MAX_BITMAP 0x600

/* What a vCPU descriptor maps, in pages. */
#define KL_VCPU_MMAP_PAGES 3
#define KL_PIO_PAGE        1
#define KL_COALESCED_PAGE  2

#define KL_COALESCED_MAX                                           \
	((KL_PAGE_SIZE - sizeof(struct kvm_coalesced_mmio_ring)) / \
	 sizeof(struct kvm_coalesced_mmio))

#define KL_STATS_NAME_SIZE    48
#define KL_MAX_CPUID_ENTRIES  256
#define KL_MAX_IO_MSRS        256 /* and so many are too many */
#define KL_MIN_MMU_PAGES      64
#define KL_KERNEL_SIGSET_SIZE 8
#define KL_MAX_TSS_ADDR       0xffffd000u
