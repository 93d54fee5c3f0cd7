/* SPDX-License-Identifier: MIT */
/*
 * The library in an emulator: two devices work on descriptor chains in guest memory (a split
 * virtqueue each, as in virtio) while memory is pulled out, replaced and discarded under them.
 *
 *   device thread   takes chains from its queue, checks what the driver sent, answers
 *   driver thread   plays the guest: writes requests, checks answers; one for each queue
 *   main thread     unplugs and plugs in DIMMs, maps new memory over them, discards them, and
 *                   moves the rings to other host pages
 *
 * Rings are read and written with atomics and copies, payload through windows: host pointers
 * that stay good from lock to unlock. What is checked: a page is what was written last, or
 * zeros (it was lost), or not there, never anything else; nobody writes to memory after it was
 * taken away; no request is lost.
 *
 *   cc embed.c $(pkg-config --cflags --libs kvmlet) -lpthread
 *   ./embed [requests for each device]
 */
#include <kvmlet/kvmlet.h>

#include <err.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE   4096ul
#define QUEUES 2
#define BATCH  4 /* requests in flight in each queue */

/* Guest-physical: a page of rings for each queue, then three DIMMs side by side. */
#define RINGS(q)   ((q)*PAGE)
#define DIMMS      3
#define DIMM_PAGES 32ul
#define DIMM_SIZE  (DIMM_PAGES * PAGE)
#define DIMM(d)    (0x100000ul + (d)*DIMM_SIZE)

/* Each request in flight has twelve pages of its own; some lie in two DIMMs. */
#define REQUEST_PAGES 12ul
#define AREA(q, i)    (DIMM(0) + ((q)*BATCH + (i)) * REQUEST_PAGES * PAGE)
_Static_assert(QUEUES *BATCH *REQUEST_PAGES <= DIMMS * DIMM_PAGES, "DIMMs hold all requests");

/* ---- a split virtqueue -------------------------------------------------------------------- */

#define QUEUE_SIZE 16
#define F_NEXT     1
#define F_WRITE    2 /* for the device to write */

struct desc {
	uint64_t addr;
	uint32_t len;
	uint16_t flags, next;
};
struct used_elem {
	uint32_t id, len;
};
struct rings {
	struct desc desc[QUEUE_SIZE];
	uint16_t avail_flags, avail_idx, avail[QUEUE_SIZE];
	uint16_t used_flags, used_idx;
	struct used_elem used[QUEUE_SIZE];
	uint8_t status[QUEUE_SIZE]; /* what a chain's last descriptor names */
};
_Static_assert(sizeof(struct rings) <= PAGE, "one page of rings");

enum { DONE, LOST, GONE, NO_ANSWER = 0xff }; /* status of a request */

struct queue {
	unsigned nr;
	kl_gpa_t rings;
	int kick, call; /* eventfds */
	uint16_t last_avail;
	pthread_t device, driver;
	unsigned seed;
	unsigned long requests, entries;
	_Atomic unsigned long count[3]; /* by status */
};

static struct kvmlet_vm *vm;
static struct queue queues[QUEUES];
static unsigned long wanted = 20000;
static atomic_bool stop;

/* Rings are never unplugged: every access must succeed, whatever is being remapped. */
static void must(int error, const char *what)
{
	if (error)
		errx(1, "%s: %s", what, strerror(-error));
}
#define RING(q, member) ((q)->rings + offsetof(struct rings, member))
#define RING_AT(q, member, i) \
	(RING(q, member) + (i) % QUEUE_SIZE * sizeof(((struct rings *)0)->member[0]))

static uint16_t load16(kl_gpa_t gpa)
{
	uint64_t v = 0;

	must(kvmlet_vm_load(vm, 0, gpa, 2, &v), "load");
	return (uint16_t)v;
}

static void ring(int eventfd)
{
	if (eventfd_write(eventfd, 1))
		err(1, "eventfd");
}

static void wait_for(int eventfd)
{
	eventfd_t n;

	if (eventfd_read(eventfd, &n))
		err(1, "eventfd");
}

/* ---- payload ------------------------------------------------------------------------------ */

/* Word i of every page of request @seq is pattern + i; the device's answer has all bits flipped. */
static uint64_t pattern(const struct queue *q, unsigned long seq)
{
	return (uint64_t)(q->nr + 1) << 56 | (uint64_t)seq << 16;
}

static void fill(void *p, size_t len, uint64_t base, uint64_t flip)
{
	uint64_t *w = p;

	for (size_t i = 0; i < len / 8; i++)
		w[i] = (base + i % (PAGE / 8)) ^ flip;
}

/* Whole pages that are all right: DONE; some of them zeros: LOST. Anything else ends the test. */
static int check(const void *p, size_t len, uint64_t base, uint64_t flip)
{
	int result = DONE;

	for (const uint64_t *w = p; len; len -= PAGE, w += PAGE / 8) {
		bool zero = !w[0];

		for (size_t i = 0; i < PAGE / 8; i++)
			if (w[i] != (zero ? 0 : (base + i) ^ flip))
				errx(1, "word %zu of a page is %#lx, not %#lx", i,
				     (unsigned long)w[i], (unsigned long)((base + i) ^ flip));
		if (zero)
			result = LOST;
	}
	return result;
}

/* Fill or check a range in one window. */
static int payload(struct queue *q, bool write, kl_gpa_t gpa, uint64_t len, uint64_t base,
		   uint64_t flip)
{
	int err, result = DONE;
	struct iovec iov[2];
	unsigned n;

	err = kvmlet_window_lock(vm, 0, gpa, len, write ? KVMLET_WRITE : KVMLET_READ, iov, 2, &n);
	if (err == -EFAULT)
		return GONE;
	must(err, "window");
	for (unsigned i = 0; i < n; i++) {
		if (write)
			fill(iov[i].iov_base, iov[i].iov_len, base, flip);
		else if (check(iov[i].iov_base, iov[i].iov_len, base, flip) == LOST)
			result = LOST;
	}
	kvmlet_window_unlock(vm);
	q->entries += n;
	return result;
}

/* ---- the device --------------------------------------------------------------------------- */

static void serve(struct queue *q, uint16_t head)
{
	uint8_t status = DONE;
	uint32_t written = 0;
	struct used_elem e;
	uint64_t base = 0;
	struct desc d;
	uint16_t at;

	for (uint16_t i = head;; i = d.next) {
		must(kvmlet_vm_read(vm, 0, RING_AT(q, desc, i), &d, sizeof(d), NULL), "read");
		if (d.len == 1) { /* the status byte, which is last */
			must(kvmlet_vm_store(vm, 0, d.addr, 1, status), "store");
			written++;
			break;
		}
		if (!(d.flags & F_WRITE)) {
			/* Which request it is, the driver says in the ring, out of band. */
			must(kvmlet_vm_read(vm, 0, q->rings + PAGE - 64 + head / 4 * 8, &base, 8,
					    NULL),
			     "read");
			status = (uint8_t)payload(q, false, d.addr, d.len, base, 0);
		} else if (status == DONE) {
			status = (uint8_t)payload(q, true, d.addr, d.len, base, ~0ull);
			written += d.len;
		}
		if (!(d.flags & F_NEXT))
			errx(1, "a chain without a status byte");
	}
	e = (struct used_elem){head, written};
	at = load16(RING(q, used_idx));
	must(kvmlet_vm_write(vm, 0, RING_AT(q, used, at), &e, sizeof(e), NULL), "write");
	must(kvmlet_vm_store(vm, 0, RING(q, used_idx), 2, at + 1u), "store");
}

static void *device(void *arg)
{
	struct queue *q = arg;

	for (;;) {
		wait_for(q->kick);
		if (atomic_load(&stop))
			return NULL;
		while (q->last_avail != load16(RING(q, avail_idx))) {
			serve(q, load16(RING_AT(q, avail, q->last_avail)));
			q->last_avail++;
		}
		ring(q->call);
	}
}

/* ---- the driver --------------------------------------------------------------------------- */

struct request {
	uint64_t base;
	struct desc d[3];
};

static void post(struct queue *q, unsigned i, struct request *r)
{
	uint16_t head = (uint16_t)(i * 4), at = load16(RING(q, avail_idx));
	uint64_t out = (uint64_t)rand_r(&q->seed) % 3, pages = 1 + (uint64_t)rand_r(&q->seed) % 4;

	r->base = pattern(q, q->requests++);
	r->d[0] = (struct desc){AREA(q->nr, i) + out * PAGE, (uint32_t)(pages * PAGE), F_NEXT,
				(uint16_t)(head + 1)};
	r->d[1] = (struct desc){AREA(q->nr, i) + 8 * PAGE, (uint32_t)(pages * PAGE),
				F_NEXT | F_WRITE, (uint16_t)(head + 2)};
	r->d[2] = (struct desc){RING_AT(q, status, i), 1, F_WRITE, 0};
	/* A guest does not use memory that is not plugged in. */
	while (payload(q, true, r->d[0].addr, r->d[0].len, r->base, 0) == GONE)
		sched_yield();
	must(kvmlet_vm_write(vm, 0, q->rings + PAGE - 64 + i * 8, &r->base, 8, NULL), "write");
	must(kvmlet_vm_store(vm, 0, r->d[2].addr, 1, NO_ANSWER), "store");
	must(kvmlet_vm_write(vm, 0, RING_AT(q, desc, head), r->d, sizeof(r->d), NULL), "write");
	must(kvmlet_vm_store(vm, 0, RING_AT(q, avail, at), 2, head), "store");
	must(kvmlet_vm_store(vm, 0, RING(q, avail_idx), 2, at + 1u), "store");
}

static void complete(struct queue *q, struct request *requests, uint16_t at)
{
	struct used_elem e;
	struct request *r;
	uint64_t status;
	int result;

	must(kvmlet_vm_read(vm, 0, RING_AT(q, used, at), &e, sizeof(e), NULL), "read");
	if (e.id % 4 || e.id / 4 >= BATCH)
		errx(1, "used: chain %u was never made", e.id);
	r = &requests[e.id / 4];
	/* Taking the status away shows that each chain is used once. */
	must(kvmlet_vm_exchange(vm, 0, r->d[2].addr, 1, NO_ANSWER, &status), "exchange");
	if (status > GONE)
		errx(1, "used: no answer in chain %u", e.id);
	result = (int)status;
	if (result == DONE) {
		result = payload(q, false, r->d[1].addr, r->d[1].len, r->base, ~0ull);
		if (e.len != r->d[1].len + 1)
			errx(1, "used: %u bytes", e.len);
	}
	atomic_fetch_add(&q->count[result], 1);
}

static void *driver(void *arg)
{
	struct request requests[BATCH];
	struct queue *q = arg;
	uint16_t used = 0;

	while (atomic_load(&q->count[DONE]) < wanted) {
		for (unsigned i = 0; i < BATCH; i++)
			post(q, i, &requests[i]);
		ring(q->kick);
		wait_for(q->call);
		if (load16(RING(q, used_idx)) != (uint16_t)(used + BATCH))
			errx(1, "queue %u: a request got lost", q->nr);
		for (unsigned i = 0; i < BATCH; i++)
			complete(q, requests, used++);
	}
	return NULL;
}

/* ---- memory that changes ------------------------------------------------------------------ */

static void *dimm[DIMMS];
static void *rings_mem;
static int rings_fd;

static void *map(void *at, size_t size, int prot, int flags, int fd)
{
	void *p = mmap(at, size, prot, flags, fd, 0);

	if (p == MAP_FAILED)
		err(1, "mmap");
	return p;
}
#define ANON (MAP_PRIVATE | MAP_ANONYMOUS)

static void plug(unsigned d, void *mem)
{
	must(kvmlet_memslot_set(vm, 1 + d, 0, DIMM(d), mem ? DIMM_SIZE : 0, kl_hva(mem)),
	     "memslot");
}

/* The memory is ours alone now: use it for something else. Nobody may see that, or disturb it. */
static void nobody_is_there(void *mem)
{
	unsigned char *p = mem;

	memset(p, 0xee, DIMM_SIZE);
	for (int i = 0; i < 3; i++)
		sched_yield();
	for (size_t i = 0; i < DIMM_SIZE; i++)
		if (p[i] != 0xee)
			errx(1, "somebody wrote to memory that had been taken away");
}

static void unplug(unsigned d)
{
	plug(d, NULL);
	nobody_is_there(dimm[d]);
	munmap(dimm[d], DIMM_SIZE);
	dimm[d] = map(NULL, DIMM_SIZE, PROT_READ | PROT_WRITE, ANON, -1);
	plug(d, dimm[d]);
}

static void begin(struct kvmlet_notifier_range *r, void *mem, size_t size, unsigned event)
{
	*r = (struct kvmlet_notifier_range){.start = kl_hva(mem).addr,
					    .end = kl_hva(mem).addr + size,
					    .may_block = 1,
					    .event = event};
	must(kvmlet_notifier_begin(r), "notifier");
}

static void replace(unsigned d)
{
	struct kvmlet_notifier_range r;

	begin(&r, dimm[d], DIMM_SIZE, KVMLET_EVENT_REPLACE);
	nobody_is_there(dimm[d]);
	map(dimm[d], DIMM_SIZE, PROT_READ | PROT_WRITE, ANON | MAP_FIXED, -1);
	kvmlet_notifier_end(&r);
}

static void discard(unsigned d)
{
	struct kvmlet_notifier_range r;

	begin(&r, dimm[d], DIMM_SIZE, KVMLET_EVENT_DISCARD);
	nobody_is_there(dimm[d]);
	if (madvise(dimm[d], DIMM_SIZE, MADV_DONTNEED))
		err(1, "madvise");
	kvmlet_notifier_end(&r);
}

/* The rings keep their contents; for a moment nothing is mapped there. */
static void remap_rings(void)
{
	struct kvmlet_notifier_range r;

	begin(&r, rings_mem, QUEUES * PAGE, KVMLET_EVENT_UNMAP);
	map(rings_mem, QUEUES * PAGE, PROT_NONE, ANON | MAP_FIXED, -1);
	sched_yield();
	map(rings_mem, QUEUES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, rings_fd);
	kvmlet_notifier_end(&r);
}

static bool busy(void)
{
	for (unsigned i = 0; i < QUEUES; i++)
		if (atomic_load(&queues[i].count[DONE]) < wanted)
			return true;
	return false;
}

int main(int argc, char **argv)
{
	unsigned long changes = 0, count[3] = {0}, entries = 0;
	unsigned seed = 1;

	if (argc > 1)
		wanted = strtoul(argv[1], NULL, 0);
	rings_fd = memfd_create("rings", MFD_CLOEXEC);
	if (rings_fd < 0 || ftruncate(rings_fd, QUEUES * PAGE))
		err(1, "memfd");
	must(kvmlet_vm_create(&vm), "vm");
	rings_mem = map(NULL, QUEUES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, rings_fd);
	must(kvmlet_memslot_set(vm, 0, 0, RINGS(0), QUEUES * PAGE, kl_hva(rings_mem)), "memslot");
	for (unsigned d = 0; d < DIMMS; d++) {
		dimm[d] = map(NULL, DIMM_SIZE, PROT_READ | PROT_WRITE, ANON, -1);
		plug(d, dimm[d]);
	}
	for (unsigned i = 0; i < QUEUES; i++) {
		struct queue *q = &queues[i];

		q->nr = q->seed = i;
		q->rings = RINGS(i);
		q->kick = eventfd(0, EFD_CLOEXEC);
		q->call = eventfd(0, EFD_CLOEXEC);
		if (q->kick < 0 || q->call < 0 || pthread_create(&q->device, NULL, device, q) ||
		    pthread_create(&q->driver, NULL, driver, q))
			errx(1, "cannot start queue %u", i);
	}

	for (; busy(); changes++) {
		switch (rand_r(&seed) % 4) {
		case 0:
			unplug((unsigned)rand_r(&seed) % DIMMS);
			break;
		case 1:
			replace((unsigned)rand_r(&seed) % DIMMS);
			break;
		case 2:
			discard((unsigned)rand_r(&seed) % DIMMS);
			break;
		default:
			remap_rings();
		}
		usleep(50);
	}

	for (unsigned i = 0; i < QUEUES; i++)
		pthread_join(queues[i].driver, NULL);
	atomic_store(&stop, true);
	for (unsigned i = 0; i < QUEUES; i++) {
		ring(queues[i].kick);
		pthread_join(queues[i].device, NULL);
		for (int s = DONE; s <= GONE; s++)
			count[s] += queues[i].count[s];
		entries += queues[i].entries;
		close(queues[i].kick);
		close(queues[i].call);
	}
	kvmlet_vm_destroy(vm);
	for (unsigned d = 0; d < DIMMS; d++)
		munmap(dimm[d], DIMM_SIZE);
	munmap(rings_mem, QUEUES * PAGE);
	close(rings_fd);
	printf("%lu changes of memory under %u devices\n"
	       "requests: %lu answered, %lu lost pages on the way, %lu met a hole; none went "
	       "wrong\n"
	       "windows: %lu entries\nok\n",
	       changes, QUEUES, count[DONE], count[LOST], count[GONE], entries);
	return 0;
}
