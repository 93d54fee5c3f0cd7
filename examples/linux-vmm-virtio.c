/* SPDX-License-Identifier: MIT */
/*
 * linux-vmm's devices: virtio over MMIO, as version 1.2 of its specification has it. Rings and
 * registers; what the devices do is in linux-vmm-devices.c.
 */
#include "linux-vmm-virtio.h"

#include <err.h>
#include <errno.h>
#include <linux/virtio_config.h>
#include <linux/virtio_mmio.h>
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

static void ring(int eventfd)
{
	if (eventfd_write(eventfd, 1))
		err(1, "eventfd");
}

/* An eventfd that raises the interrupt @gsi when it is written. */
int interrupt(unsigned gsi)
{
	struct kvm_irqfd irqfd = {.fd = (uint32_t)eventfd(0, EFD_CLOEXEC), .gsi = gsi};

	CALL(vm, KVM_IRQFD, &irqfd);
	return (int)irqfd.fd;
}

/* ---- rings: what caches are for ------------------------------------------------------------ */

static int part_activate(struct part *p, size_t len)
{
	p->len = len;
	p->first = PAGE - p->gpa % PAGE;
	if (p->first > len)
		p->first = len;
	return kvmlet_gpc_activate_area(p->gpc, CACHE_PIECES, p->gpa, len);
}

/*
 * Copy @len bytes at @off from the guest or to it. Between lock and unlock nobody can take the page
 * away; that is why there is only a copy between them. Fields are aligned, and cross no page.
 */
static int part_copy(struct part *p, size_t off, void *buf, size_t len, bool write)
{
	unsigned piece = off >= p->first;
	size_t start = piece ? p->first : 0, have = piece ? p->len - p->first : p->first;
	void *at;
	int error = kvmlet_gpc_lock(p->gpc[piece], have, &at);

	if (error)
		return error;
	at = (uint8_t *)at + (off - start);
	/* An index says that what it counts is there: the other side reads it first, or last. */
	if (len == 2 && write)
		__atomic_store_n((uint16_t *)at, *(uint16_t *)buf, __ATOMIC_RELEASE);
	else if (len == 2)
		*(uint16_t *)buf = __atomic_load_n((uint16_t *)at, __ATOMIC_ACQUIRE);
	else
		memcpy(write ? at : buf, write ? buf : at, len);
	kvmlet_gpc_unlock(p->gpc[piece], write);
	return 0;
}

int queue_take(struct queue *q, struct chain *c)
{
	uint16_t avail, i;
	int error = part_copy(&q->avail, offsetof(struct vring_avail, idx), &avail, 2, false);

	if (error || avail == q->next_avail)
		return error;
	error = part_copy(&q->avail,
			  offsetof(struct vring_avail, ring) + q->next_avail % q->size * 2,
			  &c->head, 2, false);
	for (c->n = 0, i = c->head; !error; i = c->desc[c->n++].next) {
		if (i >= q->size || c->n == q->size)
			return -EINVAL;
		error = part_copy(&q->desc, i * sizeof(c->desc[0]), &c->desc[c->n],
				  sizeof(c->desc[0]), false);
		if (!error && !(c->desc[c->n].flags & VRING_DESC_F_NEXT)) {
			c->n++;
			q->next_avail++;
			return 1;
		}
	}
	return error;
}

int queue_give(struct queue *q, const struct chain *c, uint32_t len)
{
	struct vring_used_elem e = {.id = c->head, .len = len};
	int error = part_copy(
		&q->used, offsetof(struct vring_used, ring) + q->next_used % q->size * sizeof(e),
		&e, sizeof(e), true);

	q->next_used++;
	return error ? error
		     : part_copy(&q->used, offsetof(struct vring_used, idx), &q->next_used, 2,
				 true);
}

/* ---- virtio devices: registers, and a thread ------------------------------------------------ */

struct device devices[NR_DEVICES];

void notify_driver(struct device *d, uint32_t why)
{
	d->interrupts |= why;
	ring(d->irq);
}

/* The driver is told that its configuration is another one. */
void config_changed(struct device *d)
{
	if (d->status & VIRTIO_CONFIG_S_DRIVER_OK)
		notify_driver(d, VIRTIO_MMIO_INT_CONFIG);
}

static void *device_thread(void *arg)
{
	struct device *d = arg;
	eventfd_t n;

	while (!eventfd_read(d->kick, &n)) {
		int error = 0;

		pthread_mutex_lock(&d->lock);
		for (unsigned i = 0; i < d->nr_queues && !error; i++)
			if (d->queue[i].ready)
				error = d->work(d, i);
		if (error) { /* memory that is not there, or nonsense: the driver has to start again
			      */
			d->status |= VIRTIO_CONFIG_S_NEEDS_RESET;
			notify_driver(d, VIRTIO_MMIO_INT_CONFIG);
		}
		pthread_mutex_unlock(&d->lock);
	}
	return NULL;
}

static int queue_ready(struct queue *q)
{
	int error = part_activate(&q->desc, q->size * sizeof(struct vring_desc));

	if (!error)
		error = part_activate(&q->avail, sizeof(struct vring_avail) + q->size * 2);
	if (!error)
		error = part_activate(&q->used, sizeof(struct vring_used) +
							q->size * sizeof(struct vring_used_elem));
	q->next_avail = q->next_used = 0;
	return error;
}

static void device_reset(struct device *d)
{
	for (unsigned i = 0; i < d->nr_queues; i++)
		d->queue[i].ready = false;
	d->status = d->interrupts = 0;
}

static uint32_t register_read(struct device *d, unsigned reg)
{
	switch (reg) {
	case VIRTIO_MMIO_MAGIC_VALUE:
		return 0x74726976; /* "virt" */
	case VIRTIO_MMIO_VERSION:
		return 2;
	case VIRTIO_MMIO_DEVICE_ID:
		return d->id;
	case VIRTIO_MMIO_DEVICE_FEATURES:
		return d->feature_select == VIRTIO_F_VERSION_1 / 32 ? 1u << VIRTIO_F_VERSION_1 % 32
								    : 0;
	case VIRTIO_MMIO_QUEUE_NUM_MAX:
		return d->select < d->nr_queues ? QUEUE_SIZE : 0;
	case VIRTIO_MMIO_QUEUE_READY:
		return d->select < d->nr_queues && d->queue[d->select].ready;
	case VIRTIO_MMIO_INTERRUPT_STATUS:
		return d->interrupts;
	case VIRTIO_MMIO_STATUS:
		return d->status;
	default:
		return 0;
	}
}

static void half(kl_gpa_t *gpa, bool high, uint32_t value)
{
	*gpa = high ? (uint32_t)*gpa | (kl_gpa_t)value << 32 : (*gpa & ~0xffffffffull) | value;
}

static void register_write(struct device *d, unsigned reg, uint32_t value)
{
	struct queue *q = &d->queue[d->select < d->nr_queues ? d->select : 0];

	switch (reg) {
	case VIRTIO_MMIO_DEVICE_FEATURES_SEL:
		d->feature_select = value;
		break;
	case VIRTIO_MMIO_QUEUE_SEL:
		d->select = value;
		break;
	case VIRTIO_MMIO_QUEUE_NUM:
		if (value <= QUEUE_SIZE)
			q->size = value;
		break;
	case VIRTIO_MMIO_QUEUE_READY:
		q->ready = value && q->size && !queue_ready(q);
		break;
	case VIRTIO_MMIO_INTERRUPT_ACK:
		d->interrupts &= ~value;
		break;
	case VIRTIO_MMIO_STATUS:
		d->status = value;
		if (!value)
			device_reset(d);
		break;
	case VIRTIO_MMIO_QUEUE_DESC_LOW:
	case VIRTIO_MMIO_QUEUE_DESC_HIGH:
		half(&q->desc.gpa, reg == VIRTIO_MMIO_QUEUE_DESC_HIGH, value);
		break;
	case VIRTIO_MMIO_QUEUE_AVAIL_LOW:
	case VIRTIO_MMIO_QUEUE_AVAIL_HIGH:
		half(&q->avail.gpa, reg == VIRTIO_MMIO_QUEUE_AVAIL_HIGH, value);
		break;
	case VIRTIO_MMIO_QUEUE_USED_LOW:
	case VIRTIO_MMIO_QUEUE_USED_HIGH:
		half(&q->used.gpa, reg == VIRTIO_MMIO_QUEUE_USED_HIGH, value);
		break;
	}
}

void virtio_mmio(struct kvm_run *run)
{
	uint64_t at = run->mmio.phys_addr - VIRTIO;
	unsigned reg = at % PAGE, len = run->mmio.len;
	struct device *d = &devices[at / PAGE];
	uint32_t value;

	if (run->mmio.phys_addr < VIRTIO || at / PAGE >= NR_DEVICES) {
		memset(run->mmio.data, 0xff, sizeof(run->mmio.data));
		return;
	}
	pthread_mutex_lock(&d->lock);
	if (reg >= VIRTIO_MMIO_CONFIG && reg - VIRTIO_MMIO_CONFIG + len <= sizeof(d->config)) {
		uint8_t *field = d->config + (reg - VIRTIO_MMIO_CONFIG);

		memcpy(run->mmio.is_write ? field : run->mmio.data,
		       run->mmio.is_write ? run->mmio.data : field, len);
		if (run->mmio.is_write && d->configured)
			d->configured(d);
	} else if (run->mmio.is_write) {
		memcpy(&value, run->mmio.data, 4);
		register_write(d, reg, value);
	} else {
		value = register_read(d, reg);
		memcpy(run->mmio.data, &value, 4);
	}
	pthread_mutex_unlock(&d->lock);
}

void device_start(unsigned nr, uint32_t id, unsigned nr_queues,
		  int (*work)(struct device *, unsigned))
{
	struct device *d = &devices[nr];
	struct kvm_ioeventfd kick = {
		.addr = VIRTIO + nr * PAGE + VIRTIO_MMIO_QUEUE_NOTIFY,
		.len = 4,
	};
	pthread_t thread;

	d->id = id;
	d->nr_queues = nr_queues;
	d->work = work;
	d->irq = interrupt(FIRST_GSI + nr);
	d->kick = kick.fd = eventfd(0, EFD_CLOEXEC);
	/* A notification wakes the thread, and the vCPU goes on. */
	CALL(vm, KVM_IOEVENTFD, &kick);
	for (unsigned i = 0; i < nr_queues; i++) {
		struct part *parts[] = {&d->queue[i].desc, &d->queue[i].avail, &d->queue[i].used};

		for (unsigned k = 0; k < 3 * CACHE_PIECES; k++)
			parts[k / CACHE_PIECES]->gpc[k % CACHE_PIECES] = memory_cache();
	}
	if (pthread_create(&thread, NULL, device_thread, d))
		errx(1, "no thread for a device");
}

/* ---- migration: with its lock held, a device does nothing ---------------------------------------
 */

struct queue_state {
	kl_gpa_t desc, avail, used;
	uint32_t size;
	uint16_t next_avail, next_used;
	bool ready;
};

struct device_state {
	uint8_t config[64];
	uint32_t id, select, feature_select, status, interrupts;
	struct queue_state queue[QUEUES];
};

void virtio_stop(void)
{
	for (unsigned i = 0; i < NR_DEVICES; i++)
		pthread_mutex_lock(&devices[i].lock);
}

void virtio_go(void)
{
	for (unsigned i = 0; i < NR_DEVICES; i++)
		pthread_mutex_unlock(&devices[i].lock);
}

int virtio_save(put_fn *put)
{
	int error = 0;

	for (unsigned i = 0; i < NR_DEVICES && !error; i++) {
		struct device *d = &devices[i];
		struct device_state s = {
			.id = d->id,
			.select = d->select,
			.feature_select = d->feature_select,
			.status = d->status,
			.interrupts = d->interrupts,
		};

		memcpy(s.config, d->config, sizeof(s.config));
		for (unsigned q = 0; q < QUEUES; q++)
			s.queue[q] = (struct queue_state){
				.desc = d->queue[q].desc.gpa,
				.avail = d->queue[q].avail.gpa,
				.used = d->queue[q].used.gpa,
				.size = d->queue[q].size,
				.ready = d->queue[q].ready,
				.next_avail = d->queue[q].next_avail,
				.next_used = d->queue[q].next_used,
			};
		error = put(&s, sizeof(s));
	}
	return error;
}

void virtio_load(get_fn *get)
{
	for (unsigned i = 0; i < NR_DEVICES; i++) {
		struct device *d = &devices[i];
		struct device_state s;

		get(&s, sizeof(s));
		if (s.id != d->id)
			errx(1, "device %u is another one there", i);
		pthread_mutex_lock(&d->lock);
		memcpy(d->config, s.config, sizeof(s.config));
		d->select = s.select;
		d->feature_select = s.feature_select;
		d->status = s.status;
		d->interrupts = s.interrupts;
		for (unsigned q = 0; q < QUEUES; q++) {
			d->queue[q].desc.gpa = s.queue[q].desc;
			d->queue[q].avail.gpa = s.queue[q].avail;
			d->queue[q].used.gpa = s.queue[q].used;
			d->queue[q].size = s.queue[q].size;
			d->queue[q].ready = s.queue[q].ready && !queue_ready(&d->queue[q]);
			d->queue[q].next_avail = s.queue[q].next_avail;
			d->queue[q].next_used = s.queue[q].next_used;
		}
		pthread_mutex_unlock(&d->lock);
		/* What the driver has asked for, and nobody has seen. */
		if (d->id)
			ring(d->kick);
	}
}
