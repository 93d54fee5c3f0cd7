/* SPDX-License-Identifier: MIT */
/* What linux-vmm's devices (linux-vmm-devices.c) and their rings and registers share. */
#pragma once

#include "linux-vmm.h"

#include <linux/virtio_ring.h>

#define QUEUES       2
#define QUEUE_SIZE   128
#define CACHE_PIECES 2 /* no ring is longer than a page, but it may cross one */

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

struct chain {
	uint16_t head;
	unsigned n;
	struct vring_desc desc[QUEUE_SIZE];
};

struct device {
	uint32_t id;
	unsigned nr_queues;
	uint8_t config[64];
	/* The driver has put chains into queue @nr. */
	int (*work)(struct device *d, unsigned nr);
	void (*configured)(struct device *d); /* it has written config; or NULL */
	int fd;                               /* the disk's */
	int kick, irq;                        /* eventfds: from the driver, and to it */
	pthread_mutex_t lock; /* what is below: vCPUs set it up, the device's threads use it */
	struct queue queue[QUEUES];
	uint32_t select, feature_select, status, interrupts;
};
extern struct device devices[NR_DEVICES];

/* The next chain of descriptors. Returns: 1; 0 there is none; less: the driver made a mistake. */
int queue_take(struct queue *q, struct chain *c);
/* Give it back, with @len bytes written. */
int queue_give(struct queue *q, const struct chain *c, uint32_t len);

/* An interrupt. The device's lock is held, as in what it calls. */
void notify_driver(struct device *d, uint32_t why);
void config_changed(struct device *d);

/* A thread that calls @work when the driver has put something into a queue. */
void device_start(unsigned nr, uint32_t id, unsigned nr_queues,
		  int (*work)(struct device *, unsigned));
