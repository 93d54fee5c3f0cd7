/* SPDX-License-Identifier: MIT */
/*
 * Dirty logging through the ioctls (D1, D3, D4): whatever way a guest writes, the page is in the
 * log, and no other page is. With KVMLET_TEST_REAL=1 on the real /dev/kvm.
 */
#include <pthread.h>
#include <stdatomic.h>

#include "uapi_guest.h"

#define SLOT     0x200000ul
#define PAGES    520 /* 2 MiB, which may become one large leaf, and part of a word */
#define WORDS    9
#define PAGE     KL_PAGE_SIZE
#define SLOT_1   1
#define LARGE    0x200000ul
#define MAP_SIZE (LARGE + PAGES * PAGE)

static struct guest g;
static uint8_t *map, *mem;

static void log_flag(bool on)
{
	assert_int_equal(
		set_slot(&g, SLOT_1, on ? KVM_MEM_LOG_DIRTY_PAGES : 0, SLOT, PAGES * PAGE, mem), 0);
}

#define RING_BYTES  (256 * sizeof(struct kvm_dirty_gfn))
#define RING_OFFSET (KVM_DIRTY_LOG_PAGE_OFFSET * PAGE)

/* Dirty rings instead of bitmaps: what was collected of each vCPU's. */
static bool rings;
static struct ring {
	struct dev *vcpu;
	struct kvm_dirty_gfn *entries;
	uint32_t next;
} ring[2];

static void map_ring(struct ring *r, struct dev *vcpu)
{
	*r = (struct ring){.vcpu = vcpu};
	r->entries = map_vcpu(vcpu, RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, RING_OFFSET);
	assert_true(r->entries != MAP_FAILED);
}

static long enable(uint32_t what, uint64_t arg)
{
	struct kvm_enable_cap cap = {.cap = what, .args = {arg}};

	return dev_ioctl_p(&g.vm, KVM_ENABLE_CAP, &cap);
}

static int setup(void **state)
{
	(void)state;
	guest_make_vm(&g);
	if (rings)
		assert_int_equal(enable(KVM_CAP_DIRTY_LOG_RING_ACQ_REL, RING_BYTES), 0);
	guest_make_rest(&g);
	if (rings)
		map_ring(&ring[0], &g.vcpu);
	map = mmap(NULL, MAP_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	assert_true(map != MAP_FAILED);
	mem = map + (-(uintptr_t)map & (LARGE - 1));
	madvise(mem, LARGE, MADV_HUGEPAGE);
	log_flag(true);
	return 0;
}

static int teardown(void **state)
{
	(void)state;
	if (rings)
		munmap(ring[0].entries, RING_BYTES);
	memset(ring, 0, sizeof(ring));
	rings = false;
	guest_free(&g);
	munmap(map, MAP_SIZE);
	return 0;
}

static int setup_rings(void **state)
{
	rings = true;
	return setup(state);
}

static long get_log(uint32_t slot, void *bitmap)
{
	struct kvm_dirty_log log = {.slot = slot, .dirty_bitmap = bitmap};

	return dev_ioctl_p(&g.vm, KVM_GET_DIRTY_LOG, &log);
}

static long clear_log(uint32_t slot, uint64_t first, uint32_t n, void *bitmap)
{
	struct kvm_clear_dirty_log log = {
		.slot = slot, .first_page = first, .num_pages = n, .dirty_bitmap = bitmap};

	return dev_ioctl_p(&g.vm, KVM_CLEAR_DIRTY_LOG, &log);
}

struct bits {
	uint64_t w[WORDS];
};

/* Collect what is in the ring. Returns how many entries that were. */
static long collect(struct ring *r, struct bits *b)
{
	long n = 0;

	for (; r->entries; n++, r->next++) {
		struct kvm_dirty_gfn *e = &r->entries[r->next % (RING_BYTES / sizeof(*r->entries))];

		if (__atomic_load_n(&e->flags, __ATOMIC_ACQUIRE) != KVM_DIRTY_GFN_F_DIRTY)
			break;
		assert_int_equal(e->slot, SLOT_1);
		assert_true(e->offset < PAGES);
		b->w[e->offset / 64] |= 1ull << e->offset % 64;
		__atomic_store_n(&e->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
	}
	return n;
}

static struct bits harvest(void)
{
	struct bits b;

	if (rings) {
		long n;

		memset(&b, 0, sizeof(b));
		n = collect(&ring[0], &b) + collect(&ring[1], &b);
		assert_int_equal(dev_ioctl(&g.vm, KVM_RESET_DIRTY_RINGS, 0), n);
		return b;
	}
	memset(&b, 0xff, sizeof(b));
	assert_int_equal(get_log(SLOT_1, &b), 0);
	assert_int_equal(b.w[WORDS - 1] >> PAGES % 64, 0);
	return b;
}

/* Of the pages from 64 on. */
static bool is_clean_above(const struct bits *b)
{
	uint64_t any = 0;

	for (unsigned i = 1; i < WORDS; i++)
		any |= b->w[i];
	return !any;
}

static bool is_dirty(const struct bits *b, unsigned page)
{
	return b->w[page / 64] >> page % 64 & 1;
}

/* Exactly the pages in @low, of the first 64. */
#define assert_log(low)                         \
	do {                                    \
		struct bits b_ = harvest();     \
		assert_int_equal(b_.w[0], low); \
		assert_int_equal(b_.w[1], 0);   \
	} while (0)

/* ---- the ioctl --------------------------------------------------------------------- */

/* D1, U1: what is refused, and with which errno. */
static void errors(void **state)
{
	char *half = half_mapped();
	struct bits b;

	(void)state;
	assert_int_equal(get_log(32764, &b), -EINVAL);
	assert_int_equal(get_log(0xffff, &b), -EINVAL);
	assert_int_equal(get_log(2 << 16 | SLOT_1, &b), -EINVAL);
	assert_int_equal(get_log(0, &b), -ENOENT); /* it does not log */
	assert_int_equal(get_log(SLOT_1 + 1, &b), -ENOENT);
	if (!on_real_kvm())
		assert_int_equal(get_log(1 << 16 | SLOT_1, &b), -ENOENT);
	assert_int_equal(get_log(0, NULL), -ENOENT); /* before the pointer is looked at */
	assert_int_equal(get_log(SLOT_1, NULL), -EFAULT);
	assert_int_equal(get_log(SLOT_1, half + PAGE - 8), -EFAULT);
	assert_int_equal(get_log(SLOT_1, half + PAGE - sizeof(b)), 0);
	assert_int_equal(get_log(SLOT_1, half + PAGE - sizeof(b) - 3), 0);
	log_flag(false);
	assert_int_equal(get_log(SLOT_1, &b), -ENOENT);
	assert_int_equal(set_slot(&g, SLOT_1, 0, SLOT, 0, mem), 0);
	assert_int_equal(get_log(SLOT_1, &b), -ENOENT);
	munmap(half, 2 * PAGE);
}

/* ---- kinds of stores --------------------------------------------------------------- */

/*
 * 64-bit snippets: RBX is the slot, RDX its page 5; they end in HLT. Each has its own page or two.
 */
#define SNIPPET(name, code)                                                         \
	__asm__(".pushsection .rodata\n" #name ": " code "\n hlt\n" #name "_end:\n" \
		".popsection\n");                                                   \
	extern const uint8_t name[], name##_end[]

SNIPPET(reads_only, "mov (%rbx),%rax; mov 4092(%rbx),%rax; lea 4096(%rbx),%rsi; lodsb;"
		    "cmpxchg %rax,%rcx; cmpb $0,8192(%rbx); movups (%rbx),%xmm0; prefetchw (%rbx)");
SNIPPET(store_1, "movb $1,(%rdx)");
SNIPPET(store_2, "movw $1,(%rdx)");
SNIPPET(store_4, "movl $1,(%rdx)");
SNIPPET(store_8, "movq $1,(%rdx)");
SNIPPET(store_16, "movups %xmm0,(%rdx)");
SNIPPET(same_value, "mov (%rdx),%rax; mov %rax,(%rdx)");
SNIPPET(cross_2, "movw $0x5555,4095(%rdx)");
SNIPPET(cross_4, "movl $0x5555,4094(%rdx)");
SNIPPET(cross_8, "movq $0x5555,4089(%rdx)");
SNIPPET(cross_16, "movups %xmm0,4088(%rdx)");
SNIPPET(read_modify_write, "incl (%rdx)");
SNIPPET(locked, "lock xaddl %eax,(%rdx)");
SNIPPET(locked_cross, "lock addq $1,4092(%rdx)");
SNIPPET(exchange, "xchg %rax,(%rdx)");
SNIPPET(compare_fails, "mov $-1,%rax; lock cmpxchg %rcx,(%rdx)"); /* writes back what it read */
SNIPPET(compare_16, "mov %rdx,%rdi; xor %eax,%eax; xor %edx,%edx; lock cmpxchg16b (%rdi)");
SNIPPET(bit_set, "mov $4096*8+3,%eax; bts %rax,(%rdx)"); /* one page on */
SNIPPET(stack, "lea 4096(%rdx),%rsp; push %rax; push $7");
SNIPPET(stack_call, "lea 8192(%rdx),%rsp; call 1f; 1:");
SNIPPET(string, "mov %rdx,%rdi; mov $2*4096/8,%ecx; rep stosq");
SNIPPET(string_down, "lea 4096(%rdx),%rdi; std; mov $2,%ecx; rep stosb; cld");
SNIPPET(string_copy, "lea 4096*8(%rbx),%rsi; lea 4090(%rdx),%rdi; mov $12,%ecx; rep movsb");
SNIPPET(fp_state, "fxsave (%rdx)");
SNIPPET(fp_cross, "fldz; fstpt 4090(%rdx)");
SNIPPET(fp_environment, "fnstenv (%rdx)");
SNIPPET(masked, "pcmpeqd %xmm0,%xmm0; mov %rdx,%rdi; maskmovdqu %xmm0,%xmm0");
SNIPPET(compare_8, "mov %rdx,%rdi; xor %eax,%eax; xor %edx,%edx; lock cmpxchg8b (%rdi)");
SNIPPET(frame, "lea 64(%rdx),%rsp; enter $16,$0");
SNIPPET(flags_pushed, "lea 4096(%rdx),%rsp; pushf");
SNIPPET(condition, "setc 4095(%rdx)");
SNIPPET(shift, "shll $1,4094(%rdx)");
SNIPPET(table_register, "sgdt 4092(%rdx)");
SNIPPET(non_temporal, "movnti %rax,(%rdx)");

static const struct snippet {
	const char *name;
	const uint8_t *code, *end;
	uint64_t pages; /* from page 5 on: bit 0 is page 5 */
} snippets[] = {
#define S(name, pages)                         \
	{                                      \
#name, name, name##_end, pages \
	}
	S(reads_only, 0),     S(store_1, 1),      S(store_2, 1),     S(store_4, 1),
	S(store_8, 1),        S(store_16, 1),     S(same_value, 1),  S(cross_2, 3),
	S(cross_4, 3),        S(cross_8, 3),      S(cross_16, 3),    S(read_modify_write, 1),
	S(locked, 1),         S(locked_cross, 3), S(exchange, 1),    S(compare_fails, 1),
	S(compare_16, 1),     S(bit_set, 2),      S(stack, 1),       S(stack_call, 2),
	S(string, 3),         S(string_down, 3),  S(string_copy, 3), S(fp_state, 1),
	S(table_register, 3), S(non_temporal, 1), S(fp_cross, 3),    S(fp_environment, 1),
	S(masked, 1),         S(compare_8, 1),    S(frame, 1),       S(flags_pushed, 1),
	S(condition, 1),      S(shift, 3),
#undef S
};

static void long_mode(void)
{
	struct kvm_sregs s;

	guest_long_mode(&g, 0);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_SREGS, &s), 0);
	s.cr4 |= 1 << 9;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_SREGS, &s), 0);
}

static void run_code(const char *name, const uint8_t *code, const uint8_t *end)
{
	struct kvm_regs r = {.rip = CODE, .rsp = STACK, .rflags = 2, .rbx = SLOT};

	r.rdx = SLOT + 5 * PAGE;
	memcpy(g.ram + CODE, code, (size_t)(end - code));
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_REGS, &r), 0);
	if (guest_run(&g) || g.run->exit_reason != KVM_EXIT_HLT)
		fail_msg("%s: exit %u at offset 0x%llx", name, g.run->exit_reason,
			 guest_get(&g).rip - CODE);
}

#define run_snippet(name) run_code(#name, name, name##_end)

/* D3: every kind of store, the first time and when the page is already mapped. */
static void stores(void **state)
{
	(void)state;
	long_mode();
	for (size_t i = 0; i < sizeof(snippets) / sizeof(snippets[0]); i++) {
		const struct snippet *s = &snippets[i];

		/* Where KVM emulates a store to a protected page in software, it lacks these. */
		if (on_real_kvm() &&
		    (s->code == compare_16 || s->code == fp_state || s->code == fp_cross ||
		     s->code == fp_environment || s->code == masked))
			continue;
		for (int round = 0; round < 3; round++) {
			struct bits b;

			run_code(s->name, s->code, s->end);
			b = harvest();
			if (b.w[0] != s->pages << 5 || !is_clean_above(&b))
				fail_msg("%s, round %d: log 0x%lx..., expected 0x%lx", s->name,
					 round, b.w[0], s->pages << 5);
		}
		/* Not dirty twice. */
		assert_log(0);
	}
}

/* D3: what KVM_RUN writes when it completes an exit, and what event delivery pushes. */
static void completed_stores(void **state)
{
	struct kvm_sregs s;

	(void)state;
	/* insb; movsb (from MMIO); int 0x40 */
	guest_code(&g, 0x6c, 0xa4, 0xcd, 0x40, 0xf4);
	set_vector(&g, 0x40, CODE + 4);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_SREGS, &s), 0);
	s.es.base = SLOT + 3 * PAGE - 1;
	s.ss.base = SLOT; /* STACK is the end of page 7 */
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_SREGS, &s), 0);
	assert_exit(&g, KVM_EXIT_IO);
	assert_log(0);
	((uint8_t *)g.run)[PAGE] = 0x11;
	assert_exit(&g, KVM_EXIT_MMIO);
	assert_int_equal(mem[3 * PAGE - 1], 0x11);
	assert_log(1 << 2);
	g.run->mmio.data[0] = 0x22;
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(mem[3 * PAGE], 0x22);
	assert_log(1 << 3 | 1 << 7);
}

/* D3, M9: accessed and dirty bits that a walk sets in the guest's page tables. */
static void page_table_bits(void **state)
{
	uint64_t *pml4 = (void *)mem, *pdpt = pml4 + 512, *pd = pdpt + 512, *pt = pd + 512;
	struct kvm_sregs s;
	struct bits b;

	(void)state;
	long_mode();
	pml4[0] = (SLOT + PAGE) | 7;
	pdpt[0] = (SLOT + 2 * PAGE) | 7;
	pd[0] = 0x87; /* code: 2 MiB at 0 */
	pd[1] = (SLOT + 3 * PAGE) | 7;
	for (unsigned i = 0; i < 512; i++)
		pt[i] = (SLOT + i * PAGE) | 7;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_SREGS, &s), 0);
	s.cr3 = SLOT;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_SREGS, &s), 0);
	run_snippet(reads_only);
	b = harvest();
	for (unsigned i = 0; i < 4; i++)
		assert_true(is_dirty(&b, i));
	assert_true(pt[0] & 0x20);
	assert_false(pt[5] & 0x60);
	run_snippet(store_1);
	b = harvest();
	assert_true(is_dirty(&b, 3)); /* accessed and dirty */
	assert_true(is_dirty(&b, 5));
	assert_int_equal(pt[5] & 0x60, 0x60);
}

/* D1: a page is in the log once for each time that it was written between two reads. */
static void once_per_read(void **state)
{
	(void)state;
	long_mode();
	run_snippet(store_1);
	run_snippet(store_8);
	run_snippet(cross_8);
	assert_log(3 << 5);
	run_snippet(reads_only);
	assert_log(0);
	/* The program's own stores are not the guest's. */
	mem[9 * PAGE] = 1;
	assert_log(0);
	if (!on_real_kvm()) { /* KVM has taken the bits by then */
		run_snippet(store_1);
		assert_int_equal(get_log(SLOT_1, NULL), -EFAULT);
		assert_log(1 << 5);
	}
	if (dev_ioctl(&g.vm, KVM_CHECK_EXTENSION, KVM_CAP_PRE_FAULT_MEMORY)) {
		struct kvm_pre_fault_memory r = {.gpa = SLOT, .size = PAGES * PAGE};

		assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_PRE_FAULT_MEMORY, &r), 0);
		assert_log(0);
		run_snippet(store_1);
		assert_log(1 << 5);
	}
}

/* D1, U1: KVM_CLEAR_DIRTY_LOG works without manual protection, too. */
static void clear_errors(void **state)
{
	char *half = half_mapped();
	struct bits b;

	(void)state;
	memset(&b, 0xff, sizeof(b));
	assert_int_equal(clear_log(32764, 0, 64, &b), -EINVAL);
	assert_int_equal(clear_log(2 << 16 | SLOT_1, 0, 64, &b), -EINVAL);
	assert_int_equal(clear_log(SLOT_1 + 1, 1, 64, &b), -EINVAL); /* before the slot */
	assert_int_equal(clear_log(SLOT_1 + 1, 0, 64, &b), -ENOENT);
	assert_int_equal(clear_log(0, 0, 1 << 20, &b), -ENOENT); /* it does not log */
	assert_int_equal(clear_log(SLOT_1, 32, 64, &b), -EINVAL);
	assert_int_equal(clear_log(SLOT_1, 0, 63, &b), -EINVAL);
	assert_int_equal(clear_log(SLOT_1, 512, 7, &b), -EINVAL);
	assert_int_equal(clear_log(SLOT_1, 512, 9, &b), -EINVAL);
	assert_int_equal(clear_log(SLOT_1, 576, 0, &b), -EINVAL);
	assert_int_equal(clear_log(SLOT_1, 1ull << 63, 64, &b), -EINVAL);
	assert_int_equal(clear_log(SLOT_1, 0, 0, NULL), 0);
	assert_int_equal(clear_log(SLOT_1, 0, 64, NULL), -EFAULT);
	assert_int_equal(clear_log(SLOT_1, 0, PAGES, half + PAGE - 8), -EFAULT);
	assert_int_equal(clear_log(SLOT_1, 0, PAGES, half + PAGE - sizeof(b)), 0);
	assert_int_equal(clear_log(SLOT_1, 512, 8, &b), 0);
	munmap(half, 2 * PAGE);
}

/* D1: what is cleared is clean until it is written again; the rest is as it was. */
static void clear_some(void **state)
{
	char *half = half_mapped();
	struct bits b = {{1 << 6}};

	(void)state;
	long_mode();
	run_snippet(cross_8);
	run_snippet(stack_call);
	assert_int_equal(clear_log(SLOT_1, 0, 64, &b), 0);
	assert_log(1 << 5);
	run_snippet(cross_8);
	memset(&b, 0xff, sizeof(b));
	/* A bitmap that can't be read as a whole changes nothing. */
	memcpy(half + PAGE - 8, &b, 8);
	assert_int_equal(clear_log(SLOT_1, 0, PAGES, half + PAGE - 8), -EFAULT);
	assert_int_equal(clear_log(SLOT_1, 64, 128, &b), 0);
	assert_log(3 << 5);
	run_snippet(store_1);
	assert_int_equal(clear_log(SLOT_1, 0, PAGES, &b), 0);
	assert_log(0);
	run_snippet(store_1);
	assert_log(1 << 5);
	munmap(half, 2 * PAGE);
}

static long enable_manual(uint64_t flags)
{
	return enable(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, flags);
}

#define MANUAL KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
#define ALL    KVM_DIRTY_LOG_INITIALLY_SET

/* D1: manual protection: reading leaves the log as it is, clearing takes what it names. */
static void manual_protection(void **state)
{
	struct bits b;

	(void)state;
	assert_int_equal(dev_ioctl(&g.vm, KVM_CHECK_EXTENSION, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2),
			 MANUAL | ALL);
	assert_int_equal(enable_manual(ALL), -EINVAL);
	assert_int_equal(enable_manual(4), -EINVAL);
	assert_int_equal(enable_manual(MANUAL | 4), -EINVAL);
	assert_int_equal(enable_manual(MANUAL), 0);
	long_mode();
	run_snippet(cross_8);
	assert_log(3 << 5);
	assert_log(3 << 5);
	assert_int_equal(get_log(SLOT_1, NULL), -EFAULT);
	memset(&b, 0, sizeof(b));
	b.w[0] = 1 << 6;
	assert_int_equal(clear_log(SLOT_1, 0, 64, &b), 0);
	assert_log(1 << 5);
	/* What was not cleared need not be written again to be there. */
	run_snippet(stack_call);
	assert_log(3 << 5);
	memset(&b, 0xff, sizeof(b));
	assert_int_equal(clear_log(SLOT_1, 0, PAGES, &b), 0);
	assert_log(0);
	run_snippet(store_1);
	assert_log(1 << 5);
	/* And off again: reading takes the bits. */
	assert_int_equal(enable_manual(0), 0);
	assert_log(1 << 5);
	assert_log(0);
}

/* D1: all pages of a log that begins are in it; a log that there is stays what it is. */
static void initially_set(void **state)
{
	struct bits b;

	(void)state;
	assert_int_equal(enable_manual(MANUAL | ALL), 0);
	assert_log(0);
	log_flag(false);
	log_flag(true);
	for (int i = 0; i < 2; i++) {
		b = harvest();
		for (unsigned p = 0; p < PAGES; p++)
			assert_true(is_dirty(&b, p));
	}
	b.w[0] &= ~(1ull << 7);
	assert_int_equal(clear_log(SLOT_1, 0, PAGES, &b), 0);
	assert_log(1 << 7);
	long_mode();
	run_snippet(store_1);
	assert_log(5 << 5);
	/* So is that of a slot that is new. */
	assert_int_equal(set_slot(&g, SLOT_1, 0, 0, 0, mem), 0);
	log_flag(true);
	b = harvest();
	assert_true(is_dirty(&b, 0) && is_dirty(&b, PAGES - 1));
}

/* D1, S2: the log goes with its slot when that is moved, and is new with a new one. */
static void slot_changes(void **state)
{
	(void)state;
	long_mode();
	run_snippet(store_1);
	assert_int_equal(
		set_slot(&g, SLOT_1, KVM_MEM_LOG_DIRTY_PAGES, SLOT + 2 * PAGE, PAGES * PAGE, mem),
		0);
	run_snippet(store_1); /* page 5 of what was, page 3 of what is */
	assert_log(1 << 5 | 1 << 3);
	run_snippet(store_1);
	assert_int_equal(set_slot(&g, SLOT_1, 0, 0, 0, mem), 0);
	log_flag(true);
	assert_log(0);
	/* A page that is dirty when logging ends is not when it begins again. */
	run_snippet(store_1);
	log_flag(false);
	run_snippet(cross_8);
	log_flag(true);
	assert_log(0);
	run_snippet(store_1);
	assert_log(1 << 5);
	/* A read-only slot can have a log, which stays empty. */
	assert_int_equal(set_slot(&g, SLOT_1, 0, 0, 0, mem), 0);
	assert_int_equal(set_slot(&g, SLOT_1, KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY, SLOT,
				  PAGES * PAGE, mem),
			 0);
	run_snippet(reads_only);
	assert_log(0);
}

/* ---- against running vCPUs --------------------------------------------------------- */

/*
 * RBX: the slot; RBP: its size less 8; RSI: a page of its own, which the program reads and writes:
 * [0] counts, [8] stops. Stores of 8 bytes all over the slot, aligned or not, some of them locked.
 */
__asm__(".pushsection .rodata\n"
	"writer: imul $1664525, %r8, %r8; add $1013904223, %r8\n"
	"	mov %r8, %rax; shr $16, %rax; xor %edx, %edx; div %rbp\n"
	"	mov %r8, (%rbx,%rdx)\n"
	"	and $0xffffff8, %edx; lock xadd %rax, (%rbx,%rdx)\n"
	"	incq (%rsi); cmpq $0, 8(%rsi); je writer\n"
	"	hlt\n"
	"writer_end:\n"
	".popsection\n");
extern const uint8_t writer[], writer_end[];

#define CONTROL(vcpu) (0x8000 + 0x1000 * (vcpu))
#define NR_VCPUS      2

struct control {
	_Atomic uint64_t count, stop;
};

struct runner {
	struct dev *vcpu;
	struct kvm_run *run;
	struct control *control;
	pthread_t thread;
	long r;
};

static void *run_vcpu(void *arg)
{
	struct runner *r = arg;

	do
		r->r = dev_ioctl(r->vcpu, KVM_RUN, 0);
	while (!r->r && r->run->exit_reason == KVM_EXIT_DIRTY_RING_FULL &&
	       !atomic_load(&r->control->stop));
	return NULL;
}

static void start(struct runner *r, struct dev *vcpu, struct kvm_run *run, unsigned id)
{
	struct kvm_regs regs = {.rip = CODE, .rsp = STACK, .rflags = 2, .rbx = SLOT, .r8 = id + 1};
	struct kvm_sregs s;

	if (id) { /* as vCPU 0 */
		assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_SREGS, &s), 0);
		assert_int_equal(dev_ioctl_p(vcpu, KVM_SET_SREGS, &s), 0);
	}
	regs.rbp = PAGES * PAGE - 8;
	regs.rsi = CONTROL(id);
	assert_int_equal(dev_ioctl_p(vcpu, KVM_SET_REGS, &regs), 0);
	*r = (struct runner){
		.vcpu = vcpu, .run = run, .control = (void *)(g.ram + CONTROL(id)), .r = -1};
	memset(r->control, 0, sizeof(*r->control));
	assert_int_equal(pthread_create(&r->thread, NULL, run_vcpu, r), 0);
}

static void stop(struct runner *r)
{
	atomic_store(&r->control->stop, 1);
	pthread_join(r->thread, NULL);
	assert_int_equal(r->r, 0);
	assert_true(r->run->exit_reason == KVM_EXIT_HLT ||
		    (rings && r->run->exit_reason == KVM_EXIT_DIRTY_RING_FULL));
}

/* Until the guest has begun @n more stores than now. */
static void wait_for_stores(struct runner *r, uint64_t n)
{
	uint64_t now = atomic_load(&r->control->count);

	while (atomic_load(&r->control->count) < now + n) {
		if (rings && r->run->exit_reason == KVM_EXIT_DIRTY_RING_FULL)
			break; /* it waits for us */
		sched_yield();
	}
}

static void prepare_writers(void)
{
	long_mode();
	memcpy(g.ram + CODE, writer, (size_t)(writer_end - writer));
}

/* What a migration does: copy what the log names. */
static void copy_dirty(uint8_t *copy)
{
	struct bits b = harvest();

	for (unsigned p = 0; p < PAGES; p++)
		if (is_dirty(&b, p))
			for (size_t i = 0; i < PAGE; i += 8) {
				const uint64_t *from = (void *)(mem + p * PAGE + i);

				*(uint64_t *)(void *)(copy + p * PAGE + i) =
					__atomic_load_n(from, __ATOMIC_RELAXED);
			}
}

/* D3: two vCPUs write while the log is read; a copy by the log ends up as the memory. */
static void nothing_is_lost(void **state)
{
	uint8_t *copy = calloc(PAGES, PAGE);
	struct dev vcpu1 = make_vcpu(&g.vm, 1);
	struct kvm_run *run1 = map_run(&vcpu1);
	struct runner r[NR_VCPUS];

	(void)state;
	assert_non_null(copy);
	if (rings)
		map_ring(&ring[1], &vcpu1);
	prepare_writers();
	start(&r[1], &vcpu1, run1, 1); /* asks vCPU 0, which does not run yet */
	start(&r[0], &g.vcpu, g.run, 0);
	for (int i = 0; i < 50; i++) {
		wait_for_stores(&r[i % NR_VCPUS], 20);
		copy_dirty(copy);
	}
	stop(&r[0]);
	stop(&r[1]);
	copy_dirty(copy);
	assert_memory_equal(copy, mem, PAGES * PAGE);
	assert_log(0);
	if (rings)
		munmap(ring[1].entries, RING_BYTES);
	munmap(run1, RUN_SIZE);
	dev_close(&vcpu1);
	free(copy);
}

/* D4, S8: logging is turned on and off under a running vCPU; when on, it misses nothing. */
static void toggled_while_running(void **state)
{
	uint8_t *copy = malloc(PAGES * PAGE);
	struct runner r;

	(void)state;
	assert_non_null(copy);
	prepare_writers();
	log_flag(false);
	start(&r, &g.vcpu, g.run, 0);
	for (int i = 0; i < 15; i++) {
		wait_for_stores(&r, 50);
		log_flag(true);
		/* From here on all stores are in a log: a copy made now is brought up to date by
		 * it. */
		for (size_t n = 0; n < PAGES * PAGE; n += 8)
			*(uint64_t *)(void *)(copy + n) =
				__atomic_load_n((uint64_t *)(void *)(mem + n), __ATOMIC_RELAXED);
		wait_for_stores(&r, 50);
		copy_dirty(copy);
		if (i < 14)
			log_flag(false);
	}
	stop(&r);
	copy_dirty(copy);
	assert_memory_equal(copy, mem, PAGES * PAGE);
	free(copy);
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
#define R(f)                                                \
	{                                                   \
		"rings_" #f, f, setup_rings, teardown, NULL \
	}

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(errors),
		T(stores),
		T(completed_stores),
		T(page_table_bits),
		T(once_per_read),
		T(clear_errors),
		T(clear_some),
		T(manual_protection),
		T(initially_set),
		T(slot_changes),
		T(nothing_is_lost),
		T(toggled_while_running),
		R(stores),
		R(completed_stores),
		R(page_table_bits),
		R(nothing_is_lost),
		R(toggled_while_running),
	};

	/* The software KVMs that serve as the reference lose writes to rings. */
	return _cmocka_run_group_tests("tests", tests, on_real_kvm() ? 12 : KL_ARRAY_SIZE(tests),
				       NULL, NULL);
}
