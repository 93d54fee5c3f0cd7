/* SPDX-License-Identifier: MIT */
/*
 * linux-vmm's memory: RAM that is always there, in slot 0, and behind 4 GiB a region of blocks that
 * come and go while the guest runs, each in a slot of its own. What the vCPUs have (KVM's slots)
 * the devices have too (the library's), each with a log of what they write, for migration.
 */
#include "linux-vmm.h"

#include <err.h>
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

uint8_t *ram;
size_t memory = 256ul << 20;
static struct kvmlet_vm *mem;

static uint8_t *block[MAX_BLOCKS]; /* NULL: not plugged */
static bool logging;               /* while a migration runs */

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
		r.flags = logging ? KVM_MEM_LOG_DIRTY_PAGES : 0;
	CALL(vm, KVM_SET_USER_MEMORY_REGION, &r);
	return kvmlet_memslot_set(mem, slot, r.flags ? KVMLET_MEM_LOG_DIRTY : 0, r.guest_phys_addr,
				  r.memory_size, kl_hva((void *)r.userspace_addr));
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

int memory_read(kl_gpa_t gpa, void *buf, size_t len)
{
	return kvmlet_vm_read(mem, 0, gpa, buf, len, NULL);
}

int memory_write(kl_gpa_t gpa, const void *buf, size_t len)
{
	return kvmlet_vm_write(mem, 0, gpa, buf, len, NULL);
}

/* ---- for a migration ----------------------------------------------------------------------------
 */

/* From now on, or no longer, there are logs: KVM's of what vCPUs write, the library's of devices.
 */
void memory_log(bool on)
{
	logging = on;
	for (unsigned slot = 0; slot <= MAX_BLOCKS; slot++)
		if ((!slot || block[slot - 1]) && set_slot(slot))
			errx(1, "the devices' log");
}

/*
 * Call @page for each page that was written since this was last called, or for all. The bits are
 * taken before the pages are read, so that a write that comes between the two has its bit next
 * time.
 */
size_t memory_each_page(bool all, void (*page)(kl_gpa_t gpa, const uint8_t *data))
{
	static uint64_t bits[MAX_MEMORY / PAGE / 64], devices[MAX_MEMORY / PAGE / 64];
	size_t count = 0;

	for (unsigned slot = 0; slot <= MAX_BLOCKS; slot++) {
		struct kvm_userspace_memory_region r = slot_of(slot);
		struct kvm_dirty_log log = {.slot = slot, .dirty_bitmap = bits};

		if (!r.memory_size)
			continue;
		CALL(vm, KVM_GET_DIRTY_LOG, &log);
		if (kvmlet_dirty_get(mem, slot, devices, r.memory_size / PAGE))
			errx(1, "the devices' log");
		for (size_t n = 0; n < r.memory_size / PAGE; n++) {
			kl_gpa_t gpa = r.guest_phys_addr + n * PAGE;
			uint8_t data[PAGE];

			if (!all && !((bits[n / 64] | devices[n / 64]) >> n % 64 & 1))
				continue;
			if (memory_read(gpa, data, PAGE))
				errx(1, "cannot read the guest's memory");
			page(gpa, data);
			count++;
		}
	}
	return count;
}
