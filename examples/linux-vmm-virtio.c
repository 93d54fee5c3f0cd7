/* SPDX-License-Identifier: MIT */
/*
 * linux-vmm's devices: virtio over MMIO, as version 1.1 of its specification has it. A disk, a
 * console, a balloon; a thread for each.
 */
#include "linux-vmm.h"

#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/virtio_balloon.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_config.h>
#include <linux/virtio_console.h>
#include <linux/virtio_ids.h>
#include <linux/virtio_mmio.h>
#include <linux/virtio_ring.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define QUEUES       2
#define QUEUE_SIZE   128
#define CACHE_PIECES 2 /* no ring is longer than a page, but it may cross one */

static struct kvmlet_vm *mem;

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

/* One part of a virtqueue, where the driver has put it. */
struct part {
	struct kvmlet_gpc *gpc[CACHE_PIECES];
	kl_gpa_t gpa;
	size_t len, first; /* bytes in all; in the first page */
};

struct queue {
	struct part desc, avail, used;
	unsigned size;
	bool ready;
	uint16_t next_avail, next_used;
};

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

struct chain {
	uint16_t head;
	unsigned n;
	struct vring_desc desc[QUEUE_SIZE];
};

/* The next chain of descriptors. Returns: 1; 0 there is none; less: the driver made a mistake. */
static int take(struct queue *q, struct chain *c)
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

/* Give it back, with @len bytes written. */
static int give(struct queue *q, const struct chain *c, uint32_t len)
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

struct device {
	uint32_t id;
	unsigned nr_queues;
	uint8_t config[64];
	/* The driver has put chains into queue @nr. */
	int (*work)(struct device *d, unsigned nr);
	int fd;
	int kick, irq;        /* eventfds: from the driver, and to it */
	pthread_mutex_t lock; /* what is below: vCPUs set it up, the device's threads use it */
	struct queue queue[QUEUES];
	uint32_t select, feature_select, status, interrupts;
};
static struct device devices[NR_DEVICES];

static void notify_driver(struct device *d, uint32_t why)
{
	d->interrupts |= why;
	ring(d->irq);
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
	} else if (run->mmio.is_write) {
		memcpy(&value, run->mmio.data, 4);
		register_write(d, reg, value);
	} else {
		value = register_read(d, reg);
		memcpy(run->mmio.data, &value, 4);
	}
	pthread_mutex_unlock(&d->lock);
}

static void device_start(unsigned nr, uint32_t id, unsigned nr_queues,
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
			if (kvmlet_gpc_init(mem, 0,
					    &parts[k / CACHE_PIECES]->gpc[k % CACHE_PIECES]))
				errx(1, "no memory for caches");
	}
	if (pthread_create(&thread, NULL, device_thread, d))
		errx(1, "no thread for a device");
}

/* ---- a disk -------------------------------------------------------------------------------- */

/* Between the file and the guest, a piece at a time. Returns: 0, or what the driver is told. */
static uint8_t disk_transfer(struct device *d, const struct vring_desc *desc, uint64_t at,
			     bool read)
{
	static uint8_t buf[64 << 10]; /* the one thread's */

	for (uint32_t done = 0, n; done < desc->len; done += n) {
		n = desc->len - done < sizeof(buf) ? desc->len - done : (uint32_t)sizeof(buf);
		if (read ? pread(d->fd, buf, n, (off_t)(at + done)) != n ||
				    kvmlet_vm_write(mem, 0, desc->addr + done, buf, n, NULL)
			 : kvmlet_vm_read(mem, 0, desc->addr + done, buf, n, NULL) ||
				    pwrite(d->fd, buf, n, (off_t)(at + done)) != n)
			return VIRTIO_BLK_S_IOERR;
	}
	return VIRTIO_BLK_S_OK;
}

static int disk_work(struct device *d, unsigned nr)
{
	struct chain c;
	int more, error = 0;
	bool any = false;

	while (!error && (more = take(&d->queue[nr], &c)) > 0) {
		struct virtio_blk_outhdr header;
		uint8_t status = VIRTIO_BLK_S_OK;
		uint32_t written = 1;
		uint64_t at;

		/* A header, the data, a byte for the answer. */
		if (c.n < 2 || c.desc[0].len != sizeof(header))
			return -EINVAL;
		error = kvmlet_vm_read(mem, 0, c.desc[0].addr, &header, sizeof(header), NULL);
		at = header.sector * 512;
		for (unsigned i = 1; i + 1 < c.n && !error; at += c.desc[i++].len) {
			bool in = c.desc[i].flags & VRING_DESC_F_WRITE;

			if (in != (header.type == VIRTIO_BLK_T_IN) ||
			    header.type > VIRTIO_BLK_T_OUT)
				status = VIRTIO_BLK_S_UNSUPP;
			else if (status == VIRTIO_BLK_S_OK)
				status = disk_transfer(d, &c.desc[i], at, in);
			written += in ? c.desc[i].len : 0;
		}
		if (!error)
			error = kvmlet_vm_write(mem, 0, c.desc[c.n - 1].addr, &status, 1, NULL);
		if (!error)
			error = give(&d->queue[nr], &c, written);
		any = true;
	}
	if (any)
		notify_driver(d, VIRTIO_MMIO_INT_VRING);
	return error ? error : more;
}

void disk_start(unsigned nr, const char *file)
{
	struct device *d = &devices[nr];
	uint64_t sectors;
	struct stat st;

	d->fd = open(file, O_RDWR | O_CLOEXEC);
	if (d->fd < 0)
		d->fd = open(file, O_RDONLY | O_CLOEXEC);
	if (d->fd < 0 || fstat(d->fd, &st))
		err(1, "%s", file);
	sectors = (uint64_t)st.st_size / 512;
	memcpy(d->config, &sectors, sizeof(sectors));
	device_start(nr, VIRTIO_ID_BLOCK, 1, disk_work);
}

/* ---- a console: queue 0 to the guest, queue 1 from it -----------------------------------------
 */

static int console_work(struct device *d, unsigned nr)
{
	struct chain c;
	int more = 0, error = 0;
	bool any = false;

	/* Queue 0 waits for input. */
	while (nr == 1 && !error && (more = take(&d->queue[1], &c)) > 0) {
		for (unsigned i = 0; i < c.n && !error; i++) {
			char buf[PAGE];
			size_t len = c.desc[i].len < sizeof(buf) ? c.desc[i].len : sizeof(buf);

			error = kvmlet_vm_read(mem, 0, c.desc[i].addr, buf, len, NULL);
			if (!error && write(STDOUT_FILENO, buf, len) < 0)
				error = -errno;
		}
		if (!error)
			error = give(&d->queue[1], &c, 0);
		any = true;
	}
	if (any)
		notify_driver(d, VIRTIO_MMIO_INT_VRING);
	return error ? error : more;
}

static void *console_input(void *arg)
{
	struct device *d = arg;
	struct chain c;
	char buf[256];
	ssize_t n;

	while ((n = read(STDIN_FILENO, buf, sizeof(buf))) > 0) {
		pthread_mutex_lock(&d->lock);
		/* Without a buffer, or with a short one, the rest is lost, as on a real line. */
		if (d->queue[0].ready && take(&d->queue[0], &c) > 0) {
			size_t len = (size_t)n < c.desc[0].len ? (size_t)n : c.desc[0].len;

			if (!kvmlet_vm_write(mem, 0, c.desc[0].addr, buf, len, NULL) &&
			    !give(&d->queue[0], &c, (uint32_t)len))
				notify_driver(d, VIRTIO_MMIO_INT_VRING);
		}
		pthread_mutex_unlock(&d->lock);
	}
	return NULL;
}

void console_start(unsigned nr)
{
	pthread_t thread;

	device_start(nr, VIRTIO_ID_CONSOLE, 2, console_work);
	if (pthread_create(&thread, NULL, console_input, &devices[nr]))
		errx(1, "no thread for input");
}

/* ---- a balloon: queue 0 takes pages from the guest, queue 1 gives them back --------------------
 */

/*
 * The page goes. Everybody who might use it is told first: vCPUs of kvmlet's, and caches. On a
 * real /dev/kvm the kernel tells its own; the caches are this program's all the same.
 */
static int discard(kl_gpa_t gpa)
{
	struct kvmlet_notifier_range range = {
		.start = (uint64_t)(ram + gpa),
		.end = (uint64_t)(ram + gpa + PAGE),
		.may_block = 1,
		.event = KVMLET_EVENT_DISCARD,
	};
	int error;

	if (gpa >= memory)
		return -EINVAL;
	error = kvmlet_notifier_begin(&range);
	if (error)
		return error;
	madvise(ram + gpa, PAGE, MADV_DONTNEED);
	kvmlet_notifier_end(&range);
	return 0;
}

static int balloon_work(struct device *d, unsigned nr)
{
	struct chain c;
	int more, error = 0;
	bool any = false;

	while (!error && (more = take(&d->queue[nr], &c)) > 0) {
		uint32_t pfn[256];

		for (unsigned i = 0; i < c.n && !error && nr == 0; i++) {
			size_t len = c.desc[i].len < sizeof(pfn) ? c.desc[i].len : sizeof(pfn);

			error = kvmlet_vm_read(mem, 0, c.desc[i].addr, pfn, len, NULL);
			for (unsigned k = 0; k < len / 4 && !error; k++)
				error = discard((kl_gpa_t)pfn[k] << VIRTIO_BALLOON_PFN_SHIFT);
		}
		if (!error)
			error = give(&d->queue[nr], &c, 0);
		any = true;
	}
	if (any)
		notify_driver(d, VIRTIO_MMIO_INT_VRING);
	return error ? error : more;
}

void balloon_start(unsigned nr, unsigned mib)
{
	struct virtio_balloon_config config = {.num_pages = mib << (20 - VIRTIO_BALLOON_PFN_SHIFT)};

	memcpy(devices[nr].config, &config, sizeof(config));
	device_start(nr, VIRTIO_ID_BALLOON, 2, balloon_work);
}

/* The same memory as the vCPUs', as the devices see it. */
void virtio_memory(uint32_t slot, kl_gpa_t gpa, size_t size, void *hva)
{
	if ((!mem && kvmlet_vm_create(&mem)) ||
	    kvmlet_memslot_set(mem, slot, 0, gpa, size, kl_hva(hva)))
		errx(1, "no memory for the devices");
}
