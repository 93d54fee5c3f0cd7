/* SPDX-License-Identifier: MIT */
/*
 * The library without a guest: an emulator's memory map, and memory that is unmapped the safe
 * way.
 *
 *   cc memslots.c $(pkg-config --cflags --libs kvmlet)
 */
#include <kvmlet/kvmlet.h>

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

static int show(struct kvmlet_vm *vm, kl_gpa_t gpa)
{
	kl_hva_t hva;
	int err = kvmlet_memslot_find(vm, gpa, &hva);

	if (err)
		printf("gpa %#8" PRIx64 ": %s\n", gpa, strerror(-err));
	else
		printf("gpa %#8" PRIx64 ": memory\n", gpa);
	return err;
}

int main(void)
{
	const size_t size = 1 << 20;
	void *mem = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct kvmlet_notifier_range range = {.may_block = 1};
	struct kvmlet_vm *vm;
	int bad = 0, err;

	if (mem == MAP_FAILED)
		return 1;
	err = kvmlet_vm_create(&vm);
	if (!err)
		err = kvmlet_memslot_set(vm, 0, 0, 0x100000, size, kl_hva(mem));
	if (err) {
		fprintf(stderr, "kvmlet: %s\n", strerror(-err));
		return 1;
	}
	printf("libkvmlet %s, generation %" PRIu64 "\n", kvmlet_version(),
	       kvmlet_memslot_generation(vm));
	bad |= show(vm, 0x100000) != 0;
	bad |= show(vm, 0x200000) == 0;

	/* Nobody reaches the memory once begin has returned: now it may go. */
	range.start = kl_hva(mem).addr;
	range.end = range.start + size;
	err = kvmlet_notifier_begin(&range);
	if (!err) {
		munmap(mem, size);
		kvmlet_notifier_end(&range);
	}
	bad |= err;
	bad |= kvmlet_memslot_set(vm, 0, 0, 0, 0, kl_hva(NULL)); /* delete */
	bad |= show(vm, 0x100000) == 0;
	kvmlet_vm_destroy(vm);
	return bad != 0;
}
