/* SPDX-License-Identifier: MIT */
/*
 * Write tracking: what a write costs to a page that is tracked, to one beside it, and while nothing
 * is tracked: by a guest's store, by the library, and through a cache.
 *
 *     track-bench [MILLISECONDS]     per figure; default 200
 */
#include <err.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "host/guard.h"
#include "mem/gpc.h"
#include "mmu/track.h"
#include "x86/vcpu.h"

#define MEM    0x400000ul
#define CODE   0x1000ul
#define TABLES 0x10000ul
#define PAGE   0x200000ul /* the first of three */
#define ROUNDS 5
#define STORES 20000u /* in one KVM_RUN */

static struct kl_x86_vm *vm;
static struct kl_vcpu *v;
static uint8_t *ram;
static double ms = 200;
static uint64_t reports;

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static void check(int r, const char *what)
{
	if (r)
		errx(1, "%s: %s", what, strerror(-r));
}

static void wrote(void *opaque, unsigned as, kl_gpa_t gpa, const void *bytes, size_t len)
{
	reports++;
}

static struct kl_tracker tracker = {.ops = {wrote, NULL}};

static void make_vm(void)
{
	struct kl_uapi_memory_region2 r = {.memory_size = MEM};
	/* again: mov [rdi], rax; dec rcx; jnz again; hlt */
	static const uint8_t code[] = {0x48, 0x89, 0x07, 0x48, 0xff, 0xc9, 0x75, 0xf8, 0xf4};
	static const uint64_t tables[][2] = {{0, TABLES + 0x1003},
					     {0x1000, TABLES + 0x2003},
					     {0x2000, 0x83},
					     {0x2008, 0x200083}};
	struct kvm_cpuid_entry2 cpuid[100];
	struct kvm_sregs s;
	int n;

	check(kl_guard_init(), "guard");
	vm = calloc(1, sizeof(*vm));
	ram = mmap(NULL, MEM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (!vm || ram == MAP_FAILED)
		err(1, "memory");
	check(kl_x86_vm_init(vm), "vm");
	r.userspace_addr = (uint64_t)ram;
	check(kl_set_memory_region(&vm->mem, &r), "slot");
	check(kl_x86_vcpu_create(vm, 0, &v), "vcpu");
	n = kl_x86_supported_cpuid(cpuid, 100);
	check(kl_x86_set_cpuid(v, cpuid, (unsigned)n), "cpuid");
	memcpy(ram + CODE, code, sizeof(code));
	for (unsigned i = 0; i < 4; i++)
		memcpy(ram + TABLES + tables[i][0], &tables[i][1], 8);
	kl_x86_get_sregs(v, &s);
	s.cr0 = KL_CR0_PE | KL_CR0_PG | KL_CR0_ET;
	s.cr3 = TABLES;
	s.cr4 = KL_CR4_PAE;
	s.efer = KL_EFER_LME | KL_EFER_LMA;
	s.cs = (struct kvm_segment){.selector = 8,
				    .limit = 0xffffffff,
				    .type = 11,
				    .present = 1,
				    .s = 1,
				    .l = 1,
				    .g = 1};
	check(kl_x86_set_sregs(v, &s), "sregs");
}

static void guest_stores(uint64_t gpa)
{
	struct kvm_regs r = {.rip = CODE, .rflags = 2, .rdi = gpa, .rcx = STORES};

	kl_x86_set_regs(v, &r);
	kl_engine_enter();
	check(kl_x86_run(v), "run");
	kl_engine_leave();
}

static struct kl_gpc cache;

static void cache_stores(uint64_t gpa)
{
	void *p;

	check(kl_gpc_activate(&cache, gpa, 8), "activate");
	for (unsigned i = 0; i < STORES; i++) {
		check(kl_gpc_lock(&cache, 8, &p), "lock");
		atomic_store_explicit((_Atomic uint64_t *)p, i, memory_order_relaxed);
		kl_gpc_unlock(&cache, true);
	}
}

/* Nanoseconds of a store: the fastest of some rounds. */
static double measure(void (*stores)(uint64_t gpa), uint64_t gpa)
{
	double best = 1e18;

	stores(gpa);
	for (int i = 0; i < ROUNDS; i++) {
		double begun = now(), end;
		uint64_t n = 0;

		do {
			stores(gpa);
			n += STORES;
			end = now();
		} while (end - begun < ms * 1e6 / ROUNDS);
		if ((end - begun) / (double)n < best)
			best = (end - begun) / (double)n;
	}
	return best;
}

static void row(const char *name, void (*stores)(uint64_t gpa))
{
	double plain, beside, tracked;

	plain = measure(stores, PAGE);
	kl_track_register(&vm->mem, &tracker);
	check(kl_track_add(&vm->mem, 0, PAGE >> 12), "add");
	beside = measure(stores, PAGE + 4096);
	tracked = measure(stores, PAGE);
	check(kl_track_remove(&vm->mem, 0, PAGE >> 12), "remove");
	kl_track_unregister(&vm->mem, &tracker);
	printf("%-28s %8.1f %8.1f %8.1f   %5.2fx %6.1fx\n", name, plain, beside, tracked,
	       beside / plain, tracked / plain);
}

int main(int argc, char **argv)
{
	if (argc > 1)
		ms = atof(argv[1]);
	make_vm();
	check(kl_gpc_init(&cache, &vm->mem, 0, KL_GPC_USER), "cache");
	printf("%-28s %8s %8s %8s   %s\n", "ns a write of 8 bytes", "none", "beside", "tracked",
	       "beside, tracked / none");
	row("guest: mov, dec, jnz", guest_stores);
	row("cache: lock, store, unlock", cache_stores);
	printf("%llu reports\n", (unsigned long long)reports);
	return 0;
}
