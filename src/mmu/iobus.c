/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/failpoint.h"
#include "base/log.h"
#include "host/eventfd.h"
#include "host/sys.h"
#include "mmu/iobus.h"

#define RING_ENTRIES                                               \
	((KL_PAGE_SIZE - sizeof(struct kvm_coalesced_mmio_ring)) / \
	 sizeof(struct kvm_coalesced_mmio))

/* The engine's own descriptor for one eventfd of the program, however often it is used. */
struct kl_eventfd {
	struct kl_eventfd *next;
	uint64_t id; /* the kernel's, or 0 where it does not say */
	int fd;
	unsigned refs;
};

struct kl_iodev {
	uint64_t addr;
	uint32_t len;
	bool wildcard; /* ioeventfd without datamatch */
	uint64_t datamatch;
	struct kl_eventfd *efd; /* NULL: a coalesced zone */
};

/* Sorted by addr. max_end[i]: the largest end among dev[0..i]. */
struct kl_iodevs {
	unsigned n, nr_zones;
	uint64_t *max_end;
	struct kl_iodev dev[];
};

void kl_iobus_init(struct kl_iobus *bus, struct kvm_coalesced_mmio_ring *ring)
{
	kl_mutex_init(&bus->lock, KL_RANK_IOBUS);
	kl_mutex_init(&bus->ring_lock, KL_RANK_LEAF);
	kl_srcu_init(&bus->srcu);
	bus->ring = ring;
	bus->eventfds = NULL;
	for (int i = 0; i < KL_NR_BUSES; i++)
		atomic_init(&bus->devs[i], NULL);
}

static void devs_free(struct kl_iodevs *d)
{
	if (d)
		free(d->max_end);
	free(d);
}

void kl_iobus_destroy(struct kl_iobus *bus)
{
	for (int i = 0; i < KL_NR_BUSES; i++)
		devs_free(atomic_load_explicit(&bus->devs[i], memory_order_relaxed));
	while (bus->eventfds) {
		struct kl_eventfd *e = bus->eventfds;

		bus->eventfds = e->next;
		kl_sys_close(e->fd);
		free(e);
	}
	kl_srcu_destroy(&bus->srcu);
	kl_mutex_destroy(&bus->ring_lock);
	kl_mutex_destroy(&bus->lock);
}

/* ---- registration ------------------------------------------------------------------ */

static struct kl_iodevs *current_devs(struct kl_iobus *bus, enum kl_bus which)
{
	return atomic_load_explicit(&bus->devs[which], memory_order_relaxed);
}

static struct kl_iodevs *devs_alloc(unsigned n)
{
	struct kl_iodevs *d =
		kl_failpoint("iobus-devs") ? NULL : calloc(1, sizeof(*d) + n * sizeof(d->dev[0]));

	if (!d)
		return NULL;
	d->max_end = calloc(n + 1, sizeof(d->max_end[0]));
	if (!d->max_end) {
		free(d);
		return NULL;
	}
	return d;
}

static void append(struct kl_iodevs *d, const struct kl_iodev *dev)
{
	/* A device without length answers to one address. Ends that wrap contain nothing. */
	uint64_t end = dev->addr + (dev->len ? dev->len : 1);
	uint64_t before = d->n ? d->max_end[d->n - 1] : 0;

	d->max_end[d->n] = kl_max(end, before);
	d->nr_zones += !dev->efd;
	d->dev[d->n++] = *dev;
}

static void publish(struct kl_iobus *bus, enum kl_bus which, struct kl_iodevs *d)
{
	struct kl_iodevs *old = current_devs(bus, which);

	atomic_store_explicit(&bus->devs[which], d, memory_order_release); /* PAIR(iobus-devs) */
	kl_srcu_synchronize(&bus->srcu);
	devs_free(old);
}

static int add_dev(struct kl_iobus *bus, enum kl_bus which, const struct kl_iodev *dev)
{
	struct kl_iodevs *old = current_devs(bus, which), *d;
	unsigned n = old ? old->n : 0, i = 0;

	kl_assert_held(&bus->lock);
	if (old && old->nr_zones >= KL_MAX_ZONES)
		return -ENOSPC;
	d = devs_alloc(n + 1);
	if (!d)
		return -ENOMEM;
	for (; i < n && old->dev[i].addr <= dev->addr; i++)
		append(d, &old->dev[i]);
	append(d, dev);
	for (; i < n; i++)
		append(d, &old->dev[i]);
	publish(bus, which, d);
	return 0;
}

/* Publish the bus without those that @drop names. -ENOMEM: unchanged. */
static int drop_devs(struct kl_iobus *bus, enum kl_bus which,
		     bool (*drop)(const struct kl_iodev *, const void *), const void *arg,
		     unsigned max, struct kl_iodev *last_dropped)
{
	struct kl_iodevs *old = current_devs(bus, which), *d;
	unsigned dropped = 0;

	kl_assert_held(&bus->lock);
	if (!old)
		return 0;
	d = devs_alloc(old->n);
	if (!d)
		return -ENOMEM;
	for (unsigned i = 0; i < old->n; i++) {
		if (dropped < max && drop(&old->dev[i], arg)) {
			*last_dropped = old->dev[i];
			dropped++;
		} else {
			append(d, &old->dev[i]);
		}
	}
	if (dropped)
		publish(bus, which, d);
	else
		devs_free(d);
	return (int)dropped;
}

static bool zone_contains(const struct kl_iodev *z, uint64_t addr, uint32_t len)
{
	if (len > INT32_MAX || addr + len < addr)
		return false;
	return addr >= z->addr && addr + len <= z->addr + z->len;
}

static bool is_zone_around(const struct kl_iodev *dev, const void *arg)
{
	const struct kvm_coalesced_mmio_zone *z = arg;

	return !dev->efd && zone_contains(dev, z->addr, z->size);
}

int kl_iobus_add_zone(struct kl_iobus *bus, const struct kvm_coalesced_mmio_zone *z)
{
	struct kl_iodev dev = {.addr = z->addr, .len = z->size};
	int r;

	if (z->pio > 1)
		return -EINVAL;
	kl_mutex_lock(&bus->lock);
	r = add_dev(bus, z->pio ? KL_BUS_PIO : KL_BUS_MMIO, &dev);
	kl_mutex_unlock(&bus->lock);
	return r;
}

int kl_iobus_del_zone(struct kl_iobus *bus, const struct kvm_coalesced_mmio_zone *z)
{
	struct kl_iodev gone;
	int r;

	if (z->pio > 1)
		return -EINVAL;
	kl_mutex_lock(&bus->lock);
	r = drop_devs(bus, z->pio ? KL_BUS_PIO : KL_BUS_MMIO, is_zone_around, z, UINT32_MAX, &gone);
	kl_mutex_unlock(&bus->lock);
	return r < 0 ? r : 0;
}

/* ---- eventfds ---------------------------------------------------------------------- */

static struct kl_eventfd *eventfd_find(struct kl_iobus *bus, int fd, uint64_t id)
{
	struct kl_eventfd *e = bus->eventfds;

	kl_assert_held(&bus->lock);
	while (e && !kl_eventfd_same(e->fd, e->id, fd, id))
		e = e->next;
	return e;
}

static int eventfd_get(struct kl_iobus *bus, int fd, uint64_t id, struct kl_eventfd **out)
{
	struct kl_eventfd *e = eventfd_find(bus, fd, id);

	if (!e) {
		e = kl_failpoint("iobus-eventfd") ? NULL : calloc(1, sizeof(*e));
		if (!e)
			return -ENOMEM;
		e->fd = kl_sys_dup(fd);
		if (e->fd < 0) {
			int r = e->fd;

			free(e);
			return r;
		}
		e->id = id;
		e->next = bus->eventfds;
		bus->eventfds = e;
	}
	e->refs++;
	*out = e;
	return 0;
}

static void eventfd_put(struct kl_iobus *bus, struct kl_eventfd *e)
{
	struct kl_eventfd **p = &bus->eventfds;

	kl_assert_held(&bus->lock);
	if (--e->refs)
		return;
	while (*p != e)
		p = &(*p)->next;
	*p = e->next;
	kl_sys_close(e->fd);
	free(e);
}

static bool collides(const struct kl_iodev *a, const struct kl_iodev *b)
{
	if (!a->efd || a->addr != b->addr)
		return false;
	if (!a->len || !b->len)
		return true;
	return a->len == b->len && (a->wildcard || b->wildcard || a->datamatch == b->datamatch);
}

static bool is_same_ioeventfd(const struct kl_iodev *dev, const void *arg)
{
	const struct kl_iodev *want = arg;

	return dev->efd && dev->efd == want->efd && dev->addr == want->addr &&
	       dev->len == want->len && dev->wildcard == want->wildcard &&
	       (dev->wildcard || dev->datamatch == want->datamatch);
}

static int assign(struct kl_iobus *bus, enum kl_bus which, struct kl_iodev *dev, int fd,
		  uint64_t id)
{
	struct kl_iodevs *d = current_devs(bus, which);
	int r;

	for (unsigned i = 0; d && i < d->n; i++) {
		if (collides(&d->dev[i], dev))
			return -EEXIST;
	}
	r = eventfd_get(bus, fd, id, &dev->efd);
	if (r)
		return r;
	r = add_dev(bus, which, dev);
	if (r)
		eventfd_put(bus, dev->efd);
	return r;
}

static int deassign(struct kl_iobus *bus, enum kl_bus which, struct kl_iodev *dev, int fd,
		    uint64_t id)
{
	struct kl_iodev gone;
	int r;

	dev->efd = eventfd_find(bus, fd, id);
	if (!dev->efd)
		return -ENOENT;
	r = drop_devs(bus, which, is_same_ioeventfd, dev, 1, &gone);
	if (r > 0)
		eventfd_put(bus, gone.efd);
	return r < 0 ? r : r ? 0 : -ENOENT;
}

static bool valid_to_assign(const struct kvm_ioeventfd *a)
{
	bool size_ok = a->len == 0 || a->len == 1 || a->len == 2 || a->len == 4 || a->len == 8;

	return size_ok && a->addr + a->len >= a->addr &&
	       !(a->flags & ~(uint32_t)KVM_IOEVENTFD_VALID_FLAG_MASK) &&
	       (a->len || !(a->flags & KVM_IOEVENTFD_FLAG_DATAMATCH));
}

int kl_iobus_ioeventfd(struct kl_iobus *bus, const struct kvm_ioeventfd *a)
{
	enum kl_bus which = a->flags & KVM_IOEVENTFD_FLAG_PIO                 ? KL_BUS_PIO
			    : a->flags & KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY ? KL_BUS_CCW
									      : KL_BUS_MMIO;
	bool off = a->flags & KVM_IOEVENTFD_FLAG_DEASSIGN;
	struct kl_iodev dev = {
		.addr = a->addr,
		.len = a->len,
		.wildcard = !(a->flags & KVM_IOEVENTFD_FLAG_DATAMATCH),
	};
	uint64_t id;
	int r;

	if (!off && !valid_to_assign(a))
		return -EINVAL;
	if (!dev.wildcard)
		dev.datamatch = a->datamatch;
	r = kl_eventfd_identify(a->fd, &id);
	if (r)
		return r;
	kl_mutex_lock(&bus->lock);
	r = off ? deassign(bus, which, &dev, a->fd, id) : assign(bus, which, &dev, a->fd, id);
	kl_mutex_unlock(&bus->lock);
	return r;
}

/* ---- the guest's writes ------------------------------------------------------------ */

static bool queue_write(struct kl_iobus *bus, bool pio, uint64_t addr, unsigned len,
			const void *data)
{
	volatile struct kvm_coalesced_mmio_ring *ring = bus->ring;
	struct kvm_coalesced_mmio *e;
	uint32_t last, next;
	bool room;

	kl_mutex_lock(&bus->ring_lock);
	/* The program owns first and may write anything into last too. */
	last = ring->last;
	next = (last + 1) % RING_ENTRIES;
	room = last < RING_ENTRIES && next != ring->first;
	if (room) {
		e = &bus->ring->coalesced_mmio[last];
		e->phys_addr = addr;
		e->len = len;
		e->pio = pio;
		memcpy(e->data, data, len);
		__atomic_store_n(&bus->ring->last, next, __ATOMIC_RELEASE);
	}
	kl_mutex_unlock(&bus->ring_lock);
	return room;
}

static bool ioeventfd_hit(const struct kl_iodev *dev, unsigned len, const void *data)
{
	uint64_t val = 0;

	if (!dev->len)
		return true;
	if (dev->len != len)
		return false;
	memcpy(&val, data, len);
	return dev->wildcard || val == dev->datamatch;
}

/* Number of devices whose addr is at most @addr. */
static unsigned upper_bound(const struct kl_iodevs *d, uint64_t addr)
{
	unsigned lo = 0, hi = d->n;

	while (lo < hi) {
		unsigned mid = (lo + hi) / 2;

		if (d->dev[mid].addr <= addr)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo;
}

int kl_iobus_write(struct kl_iobus *bus, enum kl_bus which, uint64_t addr, unsigned len,
		   const void *data)
{
	const struct kl_iodevs *d;
	int r = -EOPNOTSUPP, token;

	/* The usual VM has no devices: then nothing but this load. */
	if (KL_LIKELY(!atomic_load_explicit(&bus->devs[which], memory_order_relaxed)) || len > 8)
		return r;
	token = kl_srcu_read_lock(&bus->srcu);
	d = atomic_load_explicit(&bus->devs[which], memory_order_acquire); /* PAIR(iobus-devs) */
	for (unsigned i = upper_bound(d, addr); r && i-- > 0 && d->max_end[i] > addr;) {
		const struct kl_iodev *dev = &d->dev[i];

		if (dev->efd) {
			if (dev->addr == addr && ioeventfd_hit(dev, len, data)) {
				kl_eventfd_signal(dev->efd->fd);
				r = 0;
			}
		} else if (zone_contains(dev, addr, len) &&
			   queue_write(bus, which == KL_BUS_PIO, addr, len, data)) {
			r = 0;
		}
	}
	kl_srcu_read_unlock(&bus->srcu, token);
	return r;
}
