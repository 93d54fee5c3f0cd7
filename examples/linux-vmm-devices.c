/* SPDX-License-Identifier: MIT */
/*
 * What linux-vmm's devices do when the driver has put something into a ring: a disk, a console, a
 * balloon, memory that is plugged and unplugged.
 */
#include "linux-vmm-virtio.h"

#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/virtio_balloon.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_console.h>
#include <linux/virtio_ids.h>
#include <linux/virtio_mem.h>
#include <linux/virtio_mmio.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- a disk -------------------------------------------------------------------------------- */

/* Between the file and the guest, a piece at a time. Returns: 0, or what the driver is told. */
static uint8_t disk_transfer(struct device *d, const struct vring_desc *desc, uint64_t at,
			     bool read)
{
	static uint8_t buf[64 << 10]; /* the one thread's */

	for (uint32_t done = 0, n; done < desc->len; done += n) {
		n = desc->len - done < sizeof(buf) ? desc->len - done : (uint32_t)sizeof(buf);
		if (read ? pread(d->fd, buf, n, (off_t)(at + done)) != n ||
				    memory_write(desc->addr + done, buf, n)
			 : memory_read(desc->addr + done, buf, n) ||
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

	while (!error && (more = queue_take(&d->queue[nr], &c)) > 0) {
		struct virtio_blk_outhdr header;
		uint8_t status = VIRTIO_BLK_S_OK;
		uint32_t written = 1;
		uint64_t at;

		/* A header, the data, a byte for the answer. */
		if (c.n < 2 || c.desc[0].len != sizeof(header))
			return -EINVAL;
		error = memory_read(c.desc[0].addr, &header, sizeof(header));
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
			error = memory_write(c.desc[c.n - 1].addr, &status, 1);
		if (!error)
			error = queue_give(&d->queue[nr], &c, written);
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
	while (nr == 1 && !error && (more = queue_take(&d->queue[1], &c)) > 0) {
		for (unsigned i = 0; i < c.n && !error; i++) {
			char buf[PAGE];
			size_t len = c.desc[i].len < sizeof(buf) ? c.desc[i].len : sizeof(buf);

			error = memory_read(c.desc[i].addr, buf, len);
			if (!error && write(STDOUT_FILENO, buf, len) < 0)
				error = -errno;
		}
		if (!error)
			error = queue_give(&d->queue[1], &c, 0);
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
		if (d->queue[0].ready && queue_take(&d->queue[0], &c) > 0) {
			size_t len = (size_t)n < c.desc[0].len ? (size_t)n : c.desc[0].len;

			if (!memory_write(c.desc[0].addr, buf, len) &&
			    !queue_give(&d->queue[0], &c, (uint32_t)len))
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
	pthread_detach(thread); /* it may wait for input when the guest ends */
}

/* ---- a balloon: queue 0 takes pages from the guest, queue 1 gives them back --------------------
 */

static int balloon_work(struct device *d, unsigned nr)
{
	struct chain c;
	int more, error = 0;
	bool any = false;

	while (!error && (more = queue_take(&d->queue[nr], &c)) > 0) {
		uint32_t pfn[256];

		for (unsigned i = 0; i < c.n && !error && nr == 0; i++) {
			size_t len = c.desc[i].len < sizeof(pfn) ? c.desc[i].len : sizeof(pfn);

			error = memory_read(c.desc[i].addr, pfn, len);
			for (unsigned k = 0; k < len / 4 && !error; k++)
				error = memory_discard((kl_gpa_t)pfn[k]
						       << VIRTIO_BALLOON_PFN_SHIFT);
		}
		if (!error)
			error = queue_give(&d->queue[nr], &c, 0);
		any = true;
	}
	if (any)
		notify_driver(d, VIRTIO_MMIO_INT_VRING);
	return error ? error : more;
}

/* The driver says how many pages it has given. */
static void balloon_has(struct device *d)
{
	struct virtio_balloon_config config;

	memcpy(&config, d->config, sizeof(config));
	if (config.actual == config.num_pages)
		fprintf(stderr, "linux-vmm: the balloon has %u MiB\n",
			config.actual >> (20 - VIRTIO_BALLOON_PFN_SHIFT));
}

void balloon_start(unsigned nr, unsigned mib)
{
	struct virtio_balloon_config config = {.num_pages = mib << (20 - VIRTIO_BALLOON_PFN_SHIFT)};

	memcpy(devices[nr].config, &config, sizeof(config));
	devices[nr].configured = balloon_has;
	device_start(nr, VIRTIO_ID_BALLOON, 2, balloon_work);
}

void balloon_resize(unsigned nr, unsigned mib)
{
	struct device *d = &devices[nr];
	uint32_t pages = mib << (20 - VIRTIO_BALLOON_PFN_SHIFT);

	pthread_mutex_lock(&d->lock);
	memcpy(d->config + offsetof(struct virtio_balloon_config, num_pages), &pages, 4);
	config_changed(d);
	pthread_mutex_unlock(&d->lock);
}

/* ---- memory: the guest asks for blocks, and gives them back, until it has what it is to have ----
 */

static bool hold_memory;

static uint16_t plug(struct virtio_mem_config *c, uint64_t addr, unsigned n, bool on)
{
	unsigned first = (unsigned)((addr - HOTPLUG) / BLOCK);

	if (addr < HOTPLUG || addr % BLOCK || !n || addr - HOTPLUG + n * BLOCK > c->region_size)
		return VIRTIO_MEM_RESP_ERROR;
	if (hold_memory)
		return VIRTIO_MEM_RESP_BUSY;
	if (on && c->plugged_size + n * BLOCK > c->requested_size)
		return VIRTIO_MEM_RESP_NACK;
	for (unsigned i = first; i < first + n; i++)
		if (memory_plugged(i) == on)
			return VIRTIO_MEM_RESP_ERROR;
	for (unsigned i = first; i < first + n; i++) {
		if (!on)
			memory_unplug(i);
		else if (memory_plug(i))
			errx(1, "no memory for a block");
		c->plugged_size += on ? BLOCK : -BLOCK;
	}
	return VIRTIO_MEM_RESP_ACK;
}

static uint16_t unplug_all(struct virtio_mem_config *c)
{
	if (hold_memory)
		return VIRTIO_MEM_RESP_BUSY;
	for (unsigned i = 0; i < MAX_BLOCKS; i++)
		if (memory_plugged(i))
			memory_unplug(i);
	c->plugged_size = 0;
	return VIRTIO_MEM_RESP_ACK;
}

static uint16_t state_of(uint64_t addr, unsigned n)
{
	unsigned first = (unsigned)((addr - HOTPLUG) / BLOCK), plugged = 0;

	for (unsigned i = first; i < first + n && i < MAX_BLOCKS; i++)
		plugged += memory_plugged(i);
	return plugged == n ? VIRTIO_MEM_STATE_PLUGGED
	       : plugged    ? VIRTIO_MEM_STATE_MIXED
			    : VIRTIO_MEM_STATE_UNPLUGGED;
}

static int hotplug_work(struct device *d, unsigned nr)
{
	struct virtio_mem_config config;
	struct chain c;
	int more, error = 0;
	bool any = false;

	while (!error && (more = queue_take(&d->queue[nr], &c)) > 0) {
		struct virtio_mem_req req;
		struct virtio_mem_resp resp = {.type = VIRTIO_MEM_RESP_ACK};

		if (c.n != 2 || c.desc[0].len < sizeof(req) || c.desc[1].len < sizeof(resp))
			return -EINVAL;
		error = memory_read(c.desc[0].addr, &req, sizeof(req));
		if (error)
			break;
		memcpy(&config, d->config, sizeof(config));
		switch (req.type) {
		case VIRTIO_MEM_REQ_PLUG:
		case VIRTIO_MEM_REQ_UNPLUG: /* the same fields */
			resp.type = plug(&config, req.u.plug.addr, req.u.plug.nb_blocks,
					 req.type == VIRTIO_MEM_REQ_PLUG);
			break;
		case VIRTIO_MEM_REQ_UNPLUG_ALL:
			resp.type = unplug_all(&config);
			break;
		case VIRTIO_MEM_REQ_STATE:
			resp.u.state.state = state_of(req.u.state.addr, req.u.state.nb_blocks);
			break;
		default:
			resp.type = VIRTIO_MEM_RESP_ERROR;
		}
		memcpy(d->config, &config, sizeof(config));
		if (config.plugged_size == config.requested_size &&
		    req.type != VIRTIO_MEM_REQ_STATE)
			fprintf(stderr, "linux-vmm: %llu MiB are plugged\n",
				config.plugged_size >> 20);
		error = memory_write(c.desc[1].addr, &resp, sizeof(resp));
		if (!error)
			error = queue_give(&d->queue[nr], &c, sizeof(resp));
		any = true;
	}
	if (any)
		notify_driver(d, VIRTIO_MMIO_INT_VRING);
	return error ? error : more;
}

static void hotplug_request(struct device *d, unsigned mib)
{
	struct virtio_mem_config config =
					 {
						 .block_size = BLOCK,
						 .addr = HOTPLUG,
						 .region_size = MAX_BLOCKS * BLOCK,
						 .usable_region_size = MAX_BLOCKS * BLOCK,
						 .requested_size =
							 ((uint64_t)mib << 20) / BLOCK * BLOCK,
					 },
				 old;

	memcpy(&old, d->config, sizeof(old));
	config.plugged_size = old.plugged_size;
	memcpy(d->config, &config, sizeof(config));
}

void hotplug_start(unsigned nr, unsigned mib)
{
	hotplug_request(&devices[nr], mib);
	device_start(nr, VIRTIO_ID_MEM, 1, hotplug_work);
}

void hotplug_resize(unsigned nr, unsigned mib)
{
	struct device *d = &devices[nr];

	pthread_mutex_lock(&d->lock);
	if (mib <= MAX_BLOCKS * BLOCK >> 20)
		hotplug_request(d, mib);
	config_changed(d);
	pthread_mutex_unlock(&d->lock);
}

/* Blocks stay as they are: what the guest asks for it asks for again later. */
void hotplug_hold(unsigned nr, bool hold)
{
	pthread_mutex_lock(&devices[nr].lock);
	hold_memory = hold;
	pthread_mutex_unlock(&devices[nr].lock);
}
