/* SPDX-License-Identifier: MIT */
/*
 * The objects behind KVM's descriptors, and what the files of src/uapi share.
 *
 * Lifetimes, as in KVM
 *   - A VM lives while its descriptors, or those of its vCPUs, statistics files or guest_memfds
 * live: each of these objects holds one reference to the VM.
 *   - struct kl_uvcpu lives as long as its VM, even when all its descriptors are closed (its
 *     id stays taken); only its kl_object dies before.
 *   - After fork, the child's copies of the parent's objects are never destroyed: their locks
 *     may be held by threads that the child does not have (U5).
 *
 * Locks: OBJECTS (list of VMs and totals, for --stats), VM (kvm.lock), VCPU (kl_uvcpu.lock); the
 * table of descriptors has a leaf's.
 */
#pragma once

#include <linux/kvm.h>

#include "base/lock.h"
#include "mem/dirty_ring.h"
#include "mmu/iobus.h"
#include "uapi/abi.h"
#include "uapi/uapi.h"
#include "x86/vcpu.h"

#define KL_NR_EXIT_REASONS 40

/* What `--stats` counts beside stats.def: exits to the program by kvm_run.exit_reason. */
struct kl_exit_counts {
	kl_stat_t by_reason[KL_NR_EXIT_REASONS];
	kl_stat_t run_ns; /* time in KVM_RUN; only with --stats */
};

struct kl_uvcpu;
struct kl_gmem;
struct kl_irqfd;
struct kl_resampler;

struct kl_uvm {
	struct kl_object obj; /* first */
	struct kl_x86_vm kvm;
	struct kl_iobus bus;
	int ring_fd; /* the coalesced ring's page: mapped into every vCPU mapping */
	struct kvm_coalesced_mmio_ring *ring;
	struct kl_irqfd *irqfds;         /* IRQFD */
	struct kl_resampler *resamplers; /* IRQFD */
	struct kl_uvcpu *vcpus;          /* kvm.lock; all that were ever made */
	unsigned nr_vcpus;               /* kvm.lock */
	struct kl_uvm *next, **pprev;    /* OBJECTS: list of VMs */
};

struct kl_uvcpu {
	struct kl_object obj; /* first */
	struct kl_uvm *vm;
	struct kl_mutex lock;
	unsigned id;
	struct kl_vcpu *v;
	struct kvm_run *run;       /* page 0 of the descriptor; the program writes it at any time */
	struct kl_dirty_ring ring; /* its entries are the descriptor's, too; NULL: none */
	bool sigmask_set;
	uint64_t sigmask; /* KVM_SET_SIGNAL_MASK */
	struct kl_exit_counts counts;
	struct kl_uvcpu *next;
};

struct kl_ustats {
	struct kl_object obj; /* first */
	struct kl_uvm *vm;
	struct kl_uvcpu *vcpu; /* NULL: the VM's */
	struct kl_mutex lock;  /* rank LEAF: pos */
	off_t pos;
};

struct kl_ugmem {
	struct kl_object obj; /* first */
	struct kl_uvm *vm;    /* with a reference */
	struct kl_gmem *file;
	uint64_t flags; /* GUEST_MEMFD_FLAG_* */
};

KL_INLINE struct kl_uvm *kl_uvm(struct kl_object *o)
{
	return (struct kl_uvm *)o;
}
KL_INLINE struct kl_uvcpu *kl_uvcpu(struct kl_object *o)
{
	return (struct kl_uvcpu *)o;
}
KL_INLINE struct kl_ustats *kl_ustats(struct kl_object *o)
{
	return (struct kl_ustats *)o;
}

KL_INLINE struct kl_ugmem *kl_ugmem(struct kl_object *o)
{
	return (struct kl_ugmem *)o;
}

/* A field of kvm_run, read or written exactly once. */
#define kl_run_get(lv)      (*(const volatile __typeof__(lv) *)&(lv))
#define kl_run_set(lv, val) (*(volatile __typeof__(lv) *)&(lv) = (val))

/*
 * Descriptors are looked up, and uses counted, by the callers of uapi.h, outside of what
 * ThreadSanitizer sees (preload/). Tell it that an object was complete before anybody found it (by
 * a number that another thread has just closed and this one got anew, perhaps), and that this use
 * is over before the object goes. Two addresses, so that uses are not ordered among themselves.
 */
#if KL_TSAN
void __tsan_acquire(void *addr);
void __tsan_release(void *addr);
#define kl_object_complete(obj) __tsan_release(&(obj)->kind)
#define kl_object_found(obj)    __tsan_acquire(&(obj)->kind)
#define kl_object_used(obj)     __tsan_release(&(obj)->refs)
#define kl_object_no_user(obj)  __tsan_acquire(&(obj)->refs)
#else
#define kl_object_complete(obj) ((void)(obj))
#define kl_object_found(obj)    ((void)(obj))
#define kl_object_used(obj)     ((void)(obj))
#define kl_object_no_user(obj)  ((void)(obj))
#endif

/* ---- object.c ---------------------------------------------------------------------- */

extern struct kl_mutex kl_objects_lock; /* list of VMs, totals */
/* This process, without a system call. 0 before the first open. */
extern pid_t kl_uapi_pid;

/*
 * A descriptor for @obj, from the lowest free number: a memfd of @size bytes, sealed against
 * resizing. Fills @obj, with one reference. Nobody finds it before kl_object_publish().
 * Returns the descriptor or -errno.
 */
int kl_object_open(struct kl_object *obj, enum kl_object_kind kind, const char *name, size_t size,
		   int flags) KL_MUST_CHECK;
void kl_object_publish(struct kl_object *obj);

/* ---- the ioctls of each kind ------------------------------------------------------- */

long kl_system_ioctl(unsigned cmd, unsigned long arg, struct kl_object **new_obj);
long kl_vm_ioctl(struct kl_uvm *vm, unsigned cmd, unsigned long arg, struct kl_object **new_obj);
long kl_vcpu_ioctl(struct kl_uvcpu *vc, unsigned cmd, unsigned long arg,
		   struct kl_object **new_obj);

/* vm.c. Destroys the VM and all its vCPUs; nobody refers to it. */
int kl_uvm_create(unsigned long type, struct kl_object **new_obj) KL_MUST_CHECK;
void kl_uvm_destroy(struct kl_uvm *vm);
int kl_vm_create_vcpu(struct kl_uvm *vm, unsigned long id,
		      struct kl_object **new_obj) KL_MUST_CHECK;
void kl_uvcpu_free(struct kl_uvcpu *vc);

/* irq.c: what is not an ioctl of the interrupt controllers is -ENOTTY. */
long kl_vm_irq_ioctl(struct kl_uvm *vm, unsigned cmd, unsigned long arg);
/* KVM_CAP_SPLIT_IRQCHIP. 0; -EINVAL; -EEXIST; -ENOMEM. */
int kl_vm_split_irqchip(struct kl_uvm *vm, uint64_t pins) KL_MUST_CHECK;

/* xen.c: KVM_CAP_XEN_HVM; what is none of its ioctls goes on to irq.c. */
int kl_xen_capability(void);
long kl_vm_xen_ioctl(struct kl_uvm *vm, unsigned cmd, unsigned long arg);
long kl_vcpu_xen_attr(struct kl_uvcpu *vc, unsigned long arg, bool set);

/* gmem.c */
long kl_vm_create_gmem(struct kl_uvm *vm, unsigned long arg, struct kl_object **new_obj);
void kl_ugmem_destroy(struct kl_ugmem *g);
long kl_ugmem_mmap(struct kl_ugmem *g, size_t len, int flags, struct kl_overlay *o);
/* KVM_CAP_GUEST_MEMFD_FLAGS. @vm NULL: /dev/kvm. */
int kl_gmem_flags(const struct kl_uvm *vm);
int kl_vm_set_gmem_region(struct kl_uvm *vm,
			  const struct kl_uapi_memory_region2 *region) KL_MUST_CHECK;
long kl_vm_set_memory_attributes(struct kl_uvm *vm, unsigned long arg);

/* irqfd.c */
long kl_vm_irqfd(struct kl_uvm *vm, unsigned long arg);
/* The VM is about to go: take all of them off. */
void kl_irqfd_release(struct kl_uvm *vm);
void kl_irqfd_after_fork(void);

/* run.c. Context: vc->lock. */
int kl_uvcpu_run(struct kl_uvcpu *vc) KL_MUST_CHECK;
/* KVM_EXIT_MEMORY_FAULT, as the vCPU's last stage-2 fault says. */
void kl_memory_fault_out(struct kvm_run *run, const struct kl_vcpu *v);

/* caps.c. @vm NULL: /dev/kvm. */
int kl_check_extension(struct kl_uvm *vm, long cap);
int kl_vm_enable_cap(struct kl_uvm *vm, const struct kvm_enable_cap *cap) KL_MUST_CHECK;

/* msrs.c: KVM_GET_MSRS and relatives; @vc NULL: feature MSRs of the system. They take vc->lock. */
long kl_msrs_get(struct kl_uvcpu *vc, unsigned long arg);
long kl_msrs_set(struct kl_uvcpu *vc, unsigned long arg);
long kl_msrs_index_list(unsigned long arg, bool features);
long kl_vm_set_msr_filter(struct kl_uvm *vm, unsigned long arg);

/* cpuid.c; takes vc->lock. */
long kl_cpuid_get_system(unsigned long arg, bool emulated);
/* KVM_GET_SUPPORTED_HV_CPUID; @vc NULL: of /dev/kvm. */
long kl_cpuid_get_hyperv(struct kl_uvcpu *vc, unsigned long arg);
long kl_cpuid_get(struct kl_uvcpu *vc, unsigned long arg);
long kl_cpuid_set(struct kl_uvcpu *vc, unsigned long arg, bool v2);

/* stats.c. @vc NULL: the VM's. */
int kl_stats_open(struct kl_uvm *vm, struct kl_uvcpu *vc, struct kl_object **new_obj) KL_MUST_CHECK;
ssize_t kl_stats_read(struct kl_ustats *s, void *buf, size_t len, off_t *pos);
/* OBJECTS held: the VM is about to go; keep its figures for --stats. */
void kl_stats_retire(struct kl_uvm *vm);
void kl_stats_count_vm(void);
void kl_stats_count_vcpu(void);
void kl_stats_after_fork(void);
extern struct kl_uvm *kl_uvms; /* OBJECTS: VMs that live */

/* trace.c: names, for people. */
const char *kl_ioctl_name(unsigned cmd);
const char *kl_exit_name(uint32_t reason);
