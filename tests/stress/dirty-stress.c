/* SPDX-License-Identifier: MIT */
/*
 * A hunt for lost writes (D1-D4, G13). Two vCPUs and two threads with caches write to random pages
 * of a slot, all the time, while its log is read, cleared, or its rings are reset. A reader keeps a
 * copy of the memory up to date by copying the pages that the log names, and no others. Whenever
 * the writers have stopped, and the log was read once more, the copy must equal the memory, byte
 * for byte.
 *
 * Every other round the log is read only when the writers have stopped. What it names then and is
 * equal to the copy all the same was not written: the log said too much. (While writers run that
 * cannot be told: a page may be named twice for a store between its mark and its copy.)
 *
 * Every other VM is in a heatmap: a thread takes the slot's second log all the time, which must not
 * matter to the first.
 *
 * The modes take turns: bitmap; manual protection; the same with all pages set at first; rings;
 * rings with a bitmap.
 *
 *     dirty-stress [--seed N] [--rounds N | --seconds N] [--mode N]
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <time.h>

#include "unit/uapi_guest.h"
#include "mem/gpc.h"
#include "mem/heat.h"
#include "uapi/object.h"

#define PAGE        KL_PAGE_SIZE
#define SLOT        0x200000ul
#define PAGES       1024u
#define WORDS       (PAGES / 64)
#define ENTRIES     512u
#define BYTES       (ENTRIES * sizeof(struct kvm_dirty_gfn))
#define RING_OFFSET (KVM_DIRTY_LOG_PAGE_OFFSET * PAGE)
#define VCPUS       2u
#define CACHES      2u
#define ROUNDS      8u /* with one VM */
#define HARVESTS    20u

enum mode { BITMAP, MANUAL, INITIALLY_SET, RINGS, RINGS_BITMAP, MODES };
static const char *const mode_names[MODES] = {"bitmap", "manual", "initially-set", "rings",
					      "rings-bitmap"};

/*
 * RBX: the slot; RBP: its size less 64; RSI: a page of its own: [0] counts, [8] stops; R8: the
 * seed; R9: how many turns.
 * Each turn: a store of 8 bytes anywhere, also across pages; a locked one; a vector; a string.
 */
__asm__(".pushsection .rodata\n"
	"hunted: imul $1664525, %r8, %r8; add $1013904223, %r8\n"
	"	mov %r8, %rax; shr $16, %rax; xor %edx, %edx; div %rbp\n"
	"	mov %r8, (%rbx,%rdx)\n"
	"	mov %rdx, %rdi; imul $40503, %rdi; mov %rdi, %rax; xor %edx, %edx; div %rbp\n"
	"	and $-8, %rdx; mov %r8, %rax; lock xadd %rax, (%rbx,%rdx)\n"
	"	test $0x70000, %r8; jnz 1f\n"
	"	movq %r8, %xmm0; movups %xmm0, 20(%rbx,%rdx)\n"
	"	lea 3(%rbx,%rdx), %rdi; mov $29, %ecx; mov %r8, %rax; rep stosb\n"
	"1:	incq (%rsi); dec %r9; jz 2f; cmpq $0, 8(%rsi); je hunted\n"
	"2:	hlt\n"
	"hunted_end:\n"
	".popsection\n");
extern const uint8_t hunted[], hunted_end[];

#define CONTROL(vcpu) (0x8000 + 0x1000 * (vcpu))

struct control {
	_Atomic uint64_t count, stop;
};

static struct guest g;
static struct dev vcpu1;
static struct kvm_run *run1;
static uint8_t *mem, *copy;
static enum mode mode;
static struct kvm_dirty_gfn *ring[VCPUS];
static uint32_t next_entry[VCPUS];
static unsigned seed = 1;
static _Atomic bool stop;
static struct {
	unsigned long rounds, harvests, stores, by_caches, named, too_many, quiet_named;
} total;

static bool hot;
static _Atomic bool stop_samples;
static pthread_t sampler;

static unsigned rnd(unsigned below)
{
	return (unsigned)rand_r(&seed) % below;
}

/* ---- writers ------------------------------------------------------------------------------ */

static struct runner {
	struct dev *vcpu;
	struct kvm_run *run;
	struct control *control;
	pthread_t thread;
} runners[VCPUS];

static void *run_vcpu(void *arg)
{
	struct runner *r = arg;

	do {
		if (dev_ioctl(r->vcpu, KVM_RUN, 0) ||
		    (r->run->exit_reason != KVM_EXIT_HLT &&
		     r->run->exit_reason != KVM_EXIT_DIRTY_RING_FULL))
			fail_msg("exit %u", r->run->exit_reason);
	} while (r->run->exit_reason != KVM_EXIT_HLT && !atomic_load(&r->control->stop));
	return NULL;
}

static void start_vcpu(unsigned i, bool few)
{
	struct runner *r = &runners[i];
	struct kvm_regs regs = {.rip = CODE, .rsp = STACK, .rflags = 2, .rbx = SLOT};

	regs.rbp = PAGES * PAGE - 64;
	regs.rsi = CONTROL(i);
	regs.r8 = rnd(1u << 30);
	regs.r9 = few ? 1 + rnd(200) : ~0ull;
	*r = (struct runner){.vcpu = i ? &vcpu1 : &g.vcpu,
			     .run = i ? run1 : g.run,
			     .control = (void *)(g.ram + CONTROL(i))};
	memset(r->control, 0, sizeof(*r->control));
	assert_int_equal(dev_ioctl_p(r->vcpu, KVM_SET_REGS, &regs), 0);
	assert_int_equal(pthread_create(&r->thread, NULL, run_vcpu, r), 0);
}

struct cache {
	struct kl_gpc gpc;
	pthread_t thread;
	unsigned seed;
	unsigned long stores, most;
};
static struct cache caches[CACHES];

static void *run_cache(void *arg)
{
	struct cache *c = arg;
	unsigned n = 0;

	while (!atomic_load(&stop) && c->stores < c->most) {
		void *p;

		if (n++ % 16 == 0)
			assert_int_equal(
				kl_gpc_activate(&c->gpc,
						SLOT + ((unsigned)rand_r(&c->seed) % PAGES) * PAGE +
							((unsigned)rand_r(&c->seed) % 512) * 8,
						8),
				0);
		assert_int_equal(kl_gpc_lock(&c->gpc, 8, &p), 0);
		__atomic_fetch_add((uint64_t *)p, 0x0101010101010101, __ATOMIC_SEQ_CST);
		assert_true(kl_gpc_unlock(&c->gpc, true));
		c->stores++;
		if (n % 8 == 0)
			sched_yield();
	}
	return NULL;
}

/* @few: they soon stop of themselves, and many pages stay as they were. */
static void start_writers(bool few)
{
	atomic_store(&stop, false);
	for (unsigned i = 0; i < VCPUS; i++)
		start_vcpu(i, few);
	for (unsigned i = 0; i < CACHES; i++) {
		caches[i].seed = rnd(1u << 30);
		caches[i].stores = 0;
		caches[i].most = few ? 1 + rnd(1000) : ~0ul;
		assert_int_equal(pthread_create(&caches[i].thread, NULL, run_cache, &caches[i]), 0);
	}
}

static void stop_writers(bool few)
{
	if (!few) {
		atomic_store(&stop, true);
		for (unsigned i = 0; i < VCPUS; i++)
			atomic_store(&runners[i].control->stop, 1);
	}
	for (unsigned i = 0; i < VCPUS; i++) {
		pthread_join(runners[i].thread, NULL);
		total.stores += atomic_load(&runners[i].control->count);
	}
	for (unsigned i = 0; i < CACHES; i++) {
		pthread_join(caches[i].thread, NULL);
		total.by_caches += caches[i].stores;
	}
}

/* ---- the log ------------------------------------------------------------------------------ */

static long enable(uint32_t what, uint64_t arg)
{
	struct kvm_enable_cap cap = {.cap = what, .args = {arg}};

	return dev_ioctl_p(&g.vm, KVM_ENABLE_CAP, &cap);
}

static void get_bitmap(uint64_t *bits)
{
	struct kvm_dirty_log log = {.slot = 1, .dirty_bitmap = bits};
	struct kvm_clear_dirty_log clear = {.slot = 1, .dirty_bitmap = bits};

	assert_int_equal(dev_ioctl_p(&g.vm, KVM_GET_DIRTY_LOG, &log), 0);
	if (mode != MANUAL && mode != INITIALLY_SET)
		return;
	/* Sometimes in parts. */
	for (unsigned first = 0, n; first < PAGES; first += n) {
		n = rnd(2) ? PAGES - first : kl_min(PAGES - first, 64 + 64 * rnd(4));
		clear.first_page = first;
		clear.num_pages = n;
		clear.dirty_bitmap = bits + first / 64;
		assert_int_equal(dev_ioctl_p(&g.vm, KVM_CLEAR_DIRTY_LOG, &clear), 0);
	}
}

/* Returns how many entries there were. */
static unsigned get_rings(uint64_t *bits)
{
	unsigned n = 0;

	for (unsigned i = 0; i < VCPUS; i++)
		for (;; next_entry[i]++, n++) {
			struct kvm_dirty_gfn *e = &ring[i][next_entry[i] % ENTRIES];

			if (__atomic_load_n(&e->flags, __ATOMIC_ACQUIRE) != KVM_DIRTY_GFN_F_DIRTY)
				break;
			assert_int_equal(e->slot, 1);
			assert_true(e->offset < PAGES);
			bits[e->offset / 64] |= 1ull << e->offset % 64;
			__atomic_store_n(&e->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
		}
	assert_int_equal(dev_ioctl(&g.vm, KVM_RESET_DIRTY_RINGS, 0), n);
	return n;
}

/* True if @to was different. */
static bool copy_page(unsigned page)
{
	const uint64_t *from = (void *)(mem + page * PAGE);
	uint64_t *to = (void *)(copy + page * PAGE);
	bool differs = false;

	for (unsigned i = 0; i < PAGE / 8; i++) {
		uint64_t now = __atomic_load_n(&from[i], __ATOMIC_RELAXED);

		differs |= to[i] != now;
		to[i] = now;
	}
	return differs;
}

static void harvest(bool quiet)
{
	unsigned entries;

	do {
		uint64_t bits[WORDS] = {0};

		entries = 0;
		if (mode == RINGS_BITMAP || mode < RINGS)
			get_bitmap(bits);
		if (mode >= RINGS)
			entries = get_rings(bits);
		for (unsigned page = 0; page < PAGES; page++) {
			bool differs;

			if (!(bits[page / 64] >> page % 64 & 1))
				continue;
			differs = copy_page(page);
			total.named++;
			total.quiet_named += quiet;
			total.too_many += quiet && !differs;
		}
		total.harvests++;
	} while (quiet && entries); /* what no ring had room for */
}

/* ---- rounds ------------------------------------------------------------------------------- */

static void *run_samples(void *arg)
{
	while (!atomic_load(&stop_samples)) {
		kl_heat_sample();
		sched_yield();
	}
	return arg;
}

static void make_guest(void)
{
	struct kl_vm *vm;

	guest_make_vm(&g);
	vm = &kl_uvm(g.vm.obj)->kvm.mem;
	hot = rnd(2);
	if (hot) {
		kl_heat_add_vm(vm);
		atomic_store(&stop_samples, false);
		assert_int_equal(pthread_create(&sampler, NULL, run_samples, NULL), 0);
	}
	if (mode == MANUAL || mode == INITIALLY_SET)
		assert_int_equal(enable(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, mode == MANUAL ? 1 : 3),
				 0);
	if (mode >= RINGS)
		assert_int_equal(enable(KVM_CAP_DIRTY_LOG_RING_ACQ_REL, BYTES), 0);
	if (mode == RINGS_BITMAP)
		assert_int_equal(enable(KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP, 0), 0);
	guest_make_rest(&g);
	guest_long_mode(&g, 0);
	vcpu1 = make_vcpu(&g.vm, 1);
	run1 = map_run(&vcpu1);
	{
		struct kvm_sregs s;

		assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_SREGS, &s), 0);
		s.cr4 |= 1 << 9;
		assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_SREGS, &s), 0);
		assert_int_equal(dev_ioctl_p(&vcpu1, KVM_SET_SREGS, &s), 0);
	}
	memcpy(g.ram + CODE, hunted, (size_t)(hunted_end - hunted));
	for (unsigned i = 0; mode >= RINGS && i < VCPUS; i++) {
		ring[i] = map_vcpu(i ? &vcpu1 : &g.vcpu, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED,
				   RING_OFFSET);
		assert_true(ring[i] != MAP_FAILED);
		next_entry[i] = 0;
	}
	for (unsigned i = 0; i < CACHES; i++)
		assert_int_equal(kl_gpc_init(&caches[i].gpc, vm, 0, KL_GPC_USER), 0);
}

static void destroy(void)
{
	for (unsigned i = 0; i < CACHES; i++)
		kl_gpc_destroy(&caches[i].gpc);
	for (unsigned i = 0; mode >= RINGS && i < VCPUS; i++)
		munmap(ring[i], BYTES);
	munmap(run1, RUN_SIZE);
	if (hot) {
		atomic_store(&stop_samples, true);
		pthread_join(sampler, NULL);
		kl_heat_remove_vm(&kl_uvm(g.vm.obj)->kvm.mem);
	}
	dev_close(&vcpu1);
	guest_free(&g);
}

static void round_of(unsigned n)
{
	bool quiet = n & 1;

	start_writers(quiet);
	/* Logging begins, ends and begins again while they write; then all is copied. */
	if (n % 4 == 0) {
		for (int on = 1; on >= 0; on -= !rnd(3))
			assert_int_equal(set_slot(&g, 1, on ? KVM_MEM_LOG_DIRTY_PAGES : 0, SLOT,
						  PAGES * PAGE, mem),
					 0);
		assert_int_equal(set_slot(&g, 1, KVM_MEM_LOG_DIRTY_PAGES, SLOT, PAGES * PAGE, mem),
				 0);
		for (unsigned page = 0; page < PAGES; page++)
			copy_page(page);
	}
	for (unsigned i = 0; i < HARVESTS && !quiet; i++) {
		uint64_t seen = atomic_load(&runners[0].control->count);

		/* Long enough for something to be written. */
		for (unsigned spins = 0; spins < 100; spins++) {
			if (atomic_load(&runners[0].control->count) > seen + rnd(200))
				break;
			sched_yield();
		}
		harvest(false);
	}
	stop_writers(quiet);
	harvest(quiet);
	harvest(true); /* which should name nothing */
	total.rounds++;
	for (size_t i = 0; i < PAGES * PAGE; i++)
		if (copy[i] != mem[i])
			fail_msg("round %lu, mode %s: page %zu, byte %zu: %02x, the copy has %02x",
				 total.rounds, mode_names[mode], i / PAGE, i % PAGE, mem[i],
				 copy[i]);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void report(FILE *to, unsigned begun)
{
	fprintf(to,
		"dirty-stress: seed %u: %lu rounds, %lu harvests, %lu turns of vCPUs, %lu stores "
		"by "
		"caches; %lu pages named; nothing lost; of %lu pages named at rest %lu (%.3f%%) "
		"were "
		"not written\n",
		begun, total.rounds, total.harvests, total.stores, total.by_caches, total.named,
		total.quiet_named, total.too_many,
		total.quiet_named ? 100.0 * (double)total.too_many / (double)total.quiet_named : 0);
}

int main(int argc, char **argv)
{
	unsigned rounds = 0, first = 0, last = MODES - 1, begun = 1;
	double end = 0, said = now();

	for (int i = 1; i + 1 < argc; i += 2) {
		unsigned n = (unsigned)atoi(argv[i + 1]);

		if (!strcmp(argv[i], "--seed"))
			seed = begun = n;
		else if (!strcmp(argv[i], "--rounds"))
			rounds = n;
		else if (!strcmp(argv[i], "--seconds"))
			end = now() + n;
		else if (!strcmp(argv[i], "--mode"))
			first = last = n % MODES;
		else
			fail_msg("what is %s?", argv[i]);
	}
	mem = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	copy = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	assert_true(mem != MAP_FAILED && copy != MAP_FAILED);
	for (mode = first; end > 0 ? now() < end : total.rounds < rounds;
	     mode = mode == last ? first : mode + 1) {
		make_guest();
		assert_int_equal(set_slot(&g, 1, 0, SLOT, PAGES * PAGE, mem), 0);
		for (unsigned n = 0; n < ROUNDS && (end > 0 || total.rounds < rounds); n++)
			round_of(n);
		destroy();
		if (now() > said + 60) {
			report(stderr, begun);
			said = now();
		}
	}
	report(stdout, begun);
	return total.too_many * 100 > total.quiet_named;
}
