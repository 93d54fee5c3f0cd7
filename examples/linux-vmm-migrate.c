/* SPDX-License-Identifier: MIT */
/*
 * How linux-vmm's guest moves to another process over a Unix socket, and runs there as if nothing
 * had happened. Memory goes first, while the guest runs; then again what it has written meanwhile,
 * until that is little; then everything stops, and the rest goes, with the state of vCPUs and
 * devices.
 *
 * The stream: a header; records, each of a page, of a block that is plugged, or of the end; then
 * the state, in an order that both sides know. Both are the same program on the same kind of
 * processor.
 */
#include "linux-vmm.h"

#include <err.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define MAX_ROUNDS 10
#define FEW_PAGES  256

static const char magic[8] = "LINUXVMM";

struct header {
	char magic[8];
	uint64_t memory;
	uint32_t cpus, blocks;
};

struct record {
	enum { BLOCK_PLUGGED, PAGE_DATA, PAGE_ZERO, END } what;
	uint64_t gpa; /* BLOCK_PLUGGED: the block's number */
};

static int peer;   /* the socket */
static bool first; /* the first round: what is zero need not be said */

static int put(const void *buf, size_t len)
{
	for (size_t done = 0; done < len;) {
		ssize_t n = send(peer, (const char *)buf + done, len - done, MSG_NOSIGNAL);

		if (n <= 0)
			return -errno;
		done += (size_t)n;
	}
	return 0;
}

static void get(void *buf, size_t len)
{
	if (recv(peer, buf, len, MSG_WAITALL) != (ssize_t)len)
		errx(1, "the other side has ended");
}

/* ---- the state of KVM's parts ------------------------------------------------------------------
 */

/* Structures that one ioctl gets and another one sets, in the order in which they are set. */
struct part {
	unsigned long get, set;
	size_t size;
};
#define PART(what, type)                                     \
	{                                                    \
		KVM_GET_##what, KVM_SET_##what, sizeof(type) \
	}

static const struct part vcpu_parts[] = {
	PART(SREGS, struct kvm_sregs), /* the APIC's mode is in it */
	PART(REGS, struct kvm_regs),           PART(XCRS, struct kvm_xcrs),
	PART(XSAVE, struct kvm_xsave),         PART(LAPIC, struct kvm_lapic_state),
	PART(DEBUGREGS, struct kvm_debugregs),
};
/* Behind the MSRs */
static const struct part vcpu_last[] = {
	PART(VCPU_EVENTS, struct kvm_vcpu_events),
	PART(MP_STATE, struct kvm_mp_state),
};

static union {
	struct kvm_xsave xsave;
	struct kvm_irqchip irqchip;
	struct kvm_pit_state2 pit;
	struct kvm_clock_data clock;
	struct {
		struct kvm_msr_list head;
		uint32_t index[1000];
	} msr_list;
} state;

static int put_parts(int fd, const struct part *part, unsigned n)
{
	int error = 0;

	for (unsigned i = 0; i < n && !error; i++) {
		call(fd, "KVM_GET_...", part[i].get, (unsigned long)&state);
		error = put(&state, part[i].size);
	}
	return error;
}

static void get_parts(int fd, const struct part *part, unsigned n)
{
	for (unsigned i = 0; i < n; i++) {
		get(&state, part[i].size);
		call(fd, "KVM_SET_...", part[i].set, (unsigned long)&state);
	}
}

struct one_msr {
	struct kvm_msrs head;
	struct kvm_msr_entry entry;
};

/* All that KVM knows and this vCPU has. A list ends with an index of ~0. */
static int put_msrs(int fd)
{
	struct one_msr msr = {.head.nmsrs = 1};
	int error = 0;

	state.msr_list.head.nmsrs = 1000;
	CALL(kvm, KVM_GET_MSR_INDEX_LIST, &state.msr_list);
	for (unsigned i = 0; i < state.msr_list.head.nmsrs && !error; i++) {
		msr.entry.index = state.msr_list.index[i];
		if (ioctl(fd, KVM_GET_MSRS, &msr) == 1)
			error = put(&msr.entry, sizeof(msr.entry));
	}
	msr.entry.index = ~0u;
	return error ? error : put(&msr.entry, sizeof(msr.entry));
}

static void get_msrs(int fd)
{
	for (;;) {
		struct one_msr msr = {.head.nmsrs = 1}, mine;

		get(&msr.entry, sizeof(msr.entry));
		if (msr.entry.index == ~0u)
			return;
		/* Some only say what the processor is, and cannot be set. */
		mine = msr;
		if (ioctl(fd, KVM_GET_MSRS, &mine) == 1 && mine.entry.data == msr.entry.data)
			continue;
		if (ioctl(fd, KVM_SET_MSRS, &msr) != 1)
			errx(1, "MSR %#x cannot be %#llx here", msr.entry.index,
			     (unsigned long long)msr.entry.data);
	}
}

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static int put_machine(void)
{
	int error = 0;

	for (int i = 0; i < nr_cpus && !error; i++) {
		error = put_parts(vcpus[i].fd, vcpu_parts, COUNT(vcpu_parts));
		if (!error)
			error = put_msrs(vcpus[i].fd);
		if (!error)
			error = put_parts(vcpus[i].fd, vcpu_last, COUNT(vcpu_last));
	}
	for (unsigned chip = 0; chip < 3 && !error; chip++) {
		state.irqchip.chip_id = chip;
		CALL(vm, KVM_GET_IRQCHIP, &state);
		error = put(&state, sizeof(state.irqchip));
	}
	if (error)
		return error;
	CALL(vm, KVM_GET_PIT2, &state);
	error = put(&state, sizeof(state.pit));
	if (error)
		return error;
	CALL(vm, KVM_GET_CLOCK, &state);
	state.clock.flags = 0; /* the guest's time goes on from here */
	return put(&state, sizeof(state.clock));
}

static void get_machine(void)
{
	for (int i = 0; i < nr_cpus; i++) {
		get_parts(vcpus[i].fd, vcpu_parts, COUNT(vcpu_parts));
		get_msrs(vcpus[i].fd);
		get_parts(vcpus[i].fd, vcpu_last, COUNT(vcpu_last));
	}
	for (unsigned chip = 0; chip < 3; chip++) {
		get(&state, sizeof(state.irqchip));
		CALL(vm, KVM_SET_IRQCHIP, &state);
	}
	get(&state, sizeof(state.pit));
	CALL(vm, KVM_SET_PIT2, &state);
	get(&state, sizeof(state.clock));
	CALL(vm, KVM_SET_CLOCK, &state);
}

/* ---- from here
 * ----------------------------------------------------------------------------------- */

static int put_error; /* of put_page(), which has no other way to say it */

static void put_page(kl_gpa_t gpa, const uint8_t *data)
{
	static const uint8_t zero[PAGE];
	struct record r = {.what = PAGE_DATA, .gpa = gpa};

	if (!memcmp(data, zero, PAGE))
		r.what = PAGE_ZERO;
	if (put_error || (first && r.what == PAGE_ZERO))
		return;
	put_error = put(&r, sizeof(r));
	if (!put_error && r.what == PAGE_DATA)
		put_error = put(data, PAGE);
}

/* All but the last pages, while the guest runs. */
static int put_memory(void)
{
	size_t pages = ~0ul;

	for (unsigned n = 0; n < MAX_BLOCKS && !put_error; n++) {
		struct record r = {.what = BLOCK_PLUGGED, .gpa = n};

		if (memory_plugged(n))
			put_error = put(&r, sizeof(r));
	}
	for (unsigned round = 0; round < MAX_ROUNDS && pages > FEW_PAGES && !put_error; round++) {
		first = !round;
		pages = memory_each_page(first, put_page);
		fprintf(stderr, "linux-vmm: round %u, %zu pages\n", round, pages);
	}
	first = false;
	return put_error;
}

static int put_rest(void)
{
	struct record end = {.what = END};

	fprintf(stderr, "linux-vmm: %zu pages at last\n", memory_each_page(false, put_page));
	if (!put_error)
		put_error = put(&end, sizeof(end));
	if (!put_error)
		put_error = put_machine();
	if (!put_error)
		put_error = serial_save(put);
	return put_error ? put_error : virtio_save(put);
}

static struct sockaddr_un address(const char *path)
{
	struct sockaddr_un a = {.sun_family = AF_UNIX};

	snprintf(a.sun_path, sizeof(a.sun_path), "%s", path);
	return a;
}

/*
 * The order in which things stop: vCPUs, which make work for devices; then devices, which write
 * memory and raise interrupts. Whatever they had begun is done, and in what is read after that.
 */
int migrate_to(const char *path)
{
	struct sockaddr_un to = address(path);
	struct header head = {.memory = memory, .cpus = (uint32_t)nr_cpus, .blocks = MAX_BLOCKS};
	char ready;
	int error;

	peer = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (peer < 0 || connect(peer, (struct sockaddr *)&to, sizeof(to))) {
		error = -errno;
		close(peer);
		return error;
	}
	memcpy(head.magic, magic, sizeof(magic));
	put_error = put(&head, sizeof(head));
	hotplug_hold(MEMORY, true); /* no block comes or goes meanwhile */
	memory_log(true);
	error = put_memory();
	vcpus_stop();
	virtio_stop();
	serial_stop();
	if (!error)
		error = put_rest();
	/* It runs there when that has everything; until then it can go on here. */
	if (!error && recv(peer, &ready, 1, 0) == 1)
		exit(0);
	close(peer);
	memory_log(false);
	serial_go();
	virtio_go();
	vcpus_go();
	hotplug_hold(MEMORY, false);
	return error ? error : -EPIPE;
}

/* ---- to here
 * ------------------------------------------------------------------------------------- */

static void get_memory(void)
{
	for (;;) {
		static uint8_t data[PAGE];
		struct record r;

		get(&r, sizeof(r));
		switch (r.what) {
		case BLOCK_PLUGGED:
			if (r.gpa >= MAX_BLOCKS || memory_plug((unsigned)r.gpa))
				errx(1, "block %llu", (unsigned long long)r.gpa);
			break;
		case PAGE_DATA:
		case PAGE_ZERO:
			if (r.what == PAGE_ZERO)
				memset(data, 0, PAGE);
			else
				get(data, PAGE);
			if (memory_write(r.gpa, data, PAGE))
				errx(1, "no memory at %#llx", (unsigned long long)r.gpa);
			break;
		case END:
			return;
		default:
			errx(1, "this is no stream of mine");
		}
	}
}

/* Everything but the vCPUs' threads exists. When this returns, they can start. */
void migrate_from(const char *path)
{
	struct sockaddr_un here = address(path);
	int s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	struct header head;

	if (s < 0 || bind(s, (struct sockaddr *)&here, sizeof(here)) || listen(s, 1))
		err(1, "%s", path);
	fprintf(stderr, "linux-vmm: waiting for a guest\n");
	peer = accept(s, NULL, NULL);
	if (peer < 0)
		err(1, "%s", path);
	close(s);
	unlink(path);
	get(&head, sizeof(head));
	if (memcmp(head.magic, magic, sizeof(magic)) || head.memory != memory ||
	    head.cpus != (uint32_t)nr_cpus || head.blocks != MAX_BLOCKS)
		errx(1, "the guest's machine is another one: %llu MiB, %u processors",
		     (unsigned long long)head.memory >> 20, head.cpus);
	get_memory();
	get_machine();
	serial_load(get);
	virtio_load(get);
	if (put("", 1))
		errx(1, "the other side has ended");
	close(peer);
	fprintf(stderr, "linux-vmm: the guest is here\n");
}
