/* SPDX-License-Identifier: MIT */
/*
 * What takes a guest's MMIO or PIO write before it becomes an exit: coalesced zones, which
 * queue it in a page shared with the program, and ioeventfds, which signal a descriptor (M4).
 *
 * Each bus is an immutable sorted array, replaced whole; writers of the guest find their
 * device in O(log n + devices that overlap) and never wait for a registration.
 *
 * Locks: kl_iobus.lock (rank IOBUS) for registration; kl_iobus.srcu for lookups; ring_lock
 * (rank LEAF) for the ring.
 */
#pragma once

#include <linux/kvm.h>

#include "base/lock.h"
#include "base/srcu.h"

struct kl_iodev;
struct kl_iodevs;
struct kl_eventfd;

/* CCW: takes what KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY asks for; no x86 guest writes there. */
enum kl_bus { KL_BUS_MMIO, KL_BUS_PIO, KL_BUS_CCW, KL_NR_BUSES };

#define KL_MAX_ZONES 1000 /* per bus, as KVM */

struct kl_iobus {
	struct kl_mutex lock;
	struct kl_srcu srcu;
	struct kl_mutex ring_lock;
	struct kvm_coalesced_mmio_ring *ring; /* one page, shared with the program */
	_Atomic(struct kl_iodevs *) devs[KL_NR_BUSES];
	struct kl_eventfd *eventfds;
};

/* @ring: a zeroed page that outlives @bus. */
void kl_iobus_init(struct kl_iobus *bus, struct kvm_coalesced_mmio_ring *ring);
/* Nobody uses @bus any more. */
void kl_iobus_destroy(struct kl_iobus *bus);

/* KVM_REGISTER_COALESCED_MMIO [api.rst 4.116]. 0; -EINVAL; -ENOSPC; -ENOMEM. */
int kl_iobus_add_zone(struct kl_iobus *bus, const struct kvm_coalesced_mmio_zone *z) KL_MUST_CHECK;
/* Takes off every zone that contains @z. 0, also if there was none; -EINVAL; -ENOMEM. */
int kl_iobus_del_zone(struct kl_iobus *bus, const struct kvm_coalesced_mmio_zone *z) KL_MUST_CHECK;

/*
 * KVM_IOEVENTFD, both ways [api.rst 4.59].
 * 0; -EINVAL; -EBADF; -EEXIST; -ENOENT; -ENOSPC; -ENOMEM; -EMFILE.
 */
int kl_iobus_ioeventfd(struct kl_iobus *bus, const struct kvm_ioeventfd *args) KL_MUST_CHECK;

/*
 * A guest's write of @len (1 to 8) bytes. 0 if a device took it, else -EOPNOTSUPP.
 * Context: not in guest mode, no lock, no reader section.
 */
int kl_iobus_write(struct kl_iobus *bus, enum kl_bus which, uint64_t addr, unsigned len,
		   const void *data) KL_MUST_CHECK;
