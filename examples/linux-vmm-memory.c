/* SPDX-License-Identifier: MIT */
/*
 * linux-vmm's memory: RAM that is always there, in slot 0, and behind 4 GiB a region of blocks that
 * come and go while the guest runs, each in a slot of its own. What the vCPUs have (KVM's slots)
 * the devices have too (the library's). And for migration: who has written what.
 */
#include "linux-vmm.h"

#include <err.h>
#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>

#define PAGES_MAX ((MAX_MEMORY + MAX_BLOCKS * BLOCK) / PAGE)

uint8_t *ram;
size_t memory = 256ul << 20;
static struct kvmlet_vm *mem;

static uint8_t *block[MAX_BLOCKS]; /* NULL: not plugged */
static uint32_t log_flag;          /* KVM_MEM_LOG_DIRTY_PAGES while a migration runs */

/* A bit for each page that a device has written. KVM's log has what the vCPUs did. */
static _Atomic uint64_t written[PAGES_MAX / 64];

/* ---- slots ------------------------------------------------------------------------------------
 */

static struct kvm_userspace_memory_region slot_of(unsigned slot)
{
	if (!slot)
		return (struct kvm_userspace_memory_region){
			.memory_size = memory,
			.userspace_addr = (uint64_t)ram,
		};
	return (struct kvm_userspace_memory_region){
		.slot = slot,
		.guest_phys_addr = HOTPLUG + (slot - 1) * BLOCK,
		.memory_size = block[slot - 1] ? BLOCK : 0,
		.userspace_addr = (uint64_t)block[slot - 1],
	};
}

/* To the vCPUs and to the devices. */
static int set_slot(unsigned slot)
{
	struct kvm_userspace_memory_region r = slot_of(slot);

	if (r.memory_size)
		r.flags = log_flag;
	CALL(vm, KVM_SET_USER_MEMORY_REGION, &r);
	return kvmlet_memslot_set(mem, slot, 0, r.guest_phys_addr, r.memory_size,
				  kl_hva((void *)r.userspace_addr));
}

static void *map(size_t size)
{
	return mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
		    -1, 0);
}

void memory_start(void)
{
	ram = map(memory);
	if (ram == MAP_FAILED)
		err(1, "memory");
	if (kvmlet_vm_create(&mem) || set_slot(0))
		errx(1, "no memory for the devices");
}

struct kvmlet_gpc *memory_cache(void)
{
	struct kvmlet_gpc *gpc;

	if (kvmlet_gpc_init(mem, 0, &gpc))
		errx(1, "no memory for caches");
	return gpc;
}

/* ---- blocks that come and go --------------------------------------------------------------------
 */

bool memory_plugged(unsigned n)
{
	return block[n];
}

int memory_plug(unsigned n)
{
	void *p = map(BLOCK);

	if (p == MAP_FAILED)
		return -errno;
	block[n] = p;
	return set_slot(n + 1);
}

/*
 * When the slot is gone, no vCPU and no device has a pointer into it: those that were using one
 * have been waited for. So the memory can go, too.
 */
void memory_unplug(unsigned n)
{
	void *p = block[n];

	block[n] = NULL;
	if (set_slot(n + 1))
		errx(1, "the devices' memory");
	munmap(p, BLOCK);
}

/*
 * The page stays guest memory, and what is in it goes. Everybody who might use it is told first:
 * vCPUs of kvmlet's, and caches. On a real /dev/kvm the kernel tells its own; the caches are this
 * program's all the same.
 */
int memory_discard(kl_gpa_t gpa)
{
	struct kvmlet_notifier_range range = {.may_block = 1, .event = KVMLET_EVENT_DISCARD};
	kl_hva_t hva;
	int error = kvmlet_memslot_find(mem, gpa, &hva);

	if (error)
		return error;
	range.start = hva.addr;
	range.end = range.start + PAGE;
	error = kvmlet_notifier_begin(&range);
	if (error)
		return error;
	madvise((void *)range.start, PAGE, MADV_DONTNEED);
	kvmlet_notifier_end(&range);
	return 0;
}

/* ---- what devices read and write ----------------------------------------------------------------
 */

/* Where page @n of @slot has its bit. */
static size_t index_of(unsigned slot, size_t n)
{
	return slot ? MAX_MEMORY / PAGE + (slot - 1) * (BLOCK / PAGE) + n : n;
}

void memory_wrote(kl_gpa_t gpa, size_t len)
{
	for (kl_gpa_t page = gpa & ~(PAGE - 1); page < gpa + len; page += PAGE) {
		kl_gpa_t at = page < HOTPLUG ? page : page - HOTPLUG + MAX_MEMORY;

		atomic_fetch_or(&written[at / PAGE / 64], 1ull << at / PAGE % 64);
	}
}

int memory_read(kl_gpa_t gpa, void *buf, size_t len)
{
	return kvmlet_vm_read(mem, 0, gpa, buf, len, NULL);
}

int memory_write(kl_gpa_t gpa, const void *buf, size_t len)
{
	int error = kvmlet_vm_write(mem, 0, gpa, buf, len, NULL);

	if (!error)
		memory_wrote(gpa, len); /* behind the write: who takes the bit finds the data */
	return error;
}

/* ---- for a migration ----------------------------------------------------------------------------
 */

/* From now on, or no longer, KVM keeps a log of what vCPUs write. */
void memory_log(bool on)
{
	log_flag = on ? KVM_MEM_LOG_DIRTY_PAGES : 0;
	for (unsigned slot = 0; slot <= MAX_BLOCKS; slot++)
		if (!slot || block[slot - 1])
			set_slot(slot);
}

/*
 * Call @page for each page that was written since this was last called, or for all. The bits are
 * taken before the pages are read, so that a write that comes between the two has its bit next
 * time.
 */
size_t memory_each_page(bool all, void (*page)(kl_gpa_t gpa, const uint8_t *data))
{
	static uint64_t bits[MAX_MEMORY / PAGE / 64];
	size_t count = 0;

	for (unsigned slot = 0; slot <= MAX_BLOCKS; slot++) {
		struct kvm_userspace_memory_region r = slot_of(slot);
		struct kvm_dirty_log log = {.slot = slot, .dirty_bitmap = bits};

		if (!r.memory_size)
			continue;
		CALL(vm, KVM_GET_DIRTY_LOG, &log);
		for (size_t n = 0; n < r.memory_size / PAGE; n++) {
			kl_gpa_t gpa = r.guest_phys_addr + n * PAGE;
			uint8_t data[PAGE];

			if (n % 64 == 0)
				bits[n / 64] |=
					atomic_exchange(&written[index_of(slot, n) / 64], 0);
			if (!all && !(bits[n / 64] >> n % 64 & 1))
				continue;
			if (memory_read(gpa, data, PAGE))
				errx(1, "cannot read the guest's memory");
			page(gpa, data);
			count++;
		}
	}
	return count;
}
