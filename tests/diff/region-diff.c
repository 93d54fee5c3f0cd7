/* SPDX-License-Identifier: MIT */
/*
 * Carries out sequences of memory-region calls (region.h), each in a fresh VM, and prints what
 * came of every call, one line each: the error, or what the guest saw when it touched memory,
 * or what the program saw of it. A plain KVM program: the same one runs under kvmlet and on
 * /dev/kvm, and tests/diff/regions compares.
 *
 *   region-diff --seed N --count N [--features N] [--digest] [--drop I,J...]
 *   region-diff --features
 *
 * Lines that begin with '~' are not part of a sequence's digest: references differ there
 * (region-known.txt).
 *
 * The guest is a loop in ring 3 of 64-bit mode: OUT, take a command, touch memory, again.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "region.h"

/* struct kvm_userspace_memory_region2 and its ioctl, which older headers lack. */
struct region2 {
	uint32_t slot, flags;
	uint64_t gpa, size, hva, gmem_offset;
	uint32_t gmem, pad1;
	uint64_t pad2[14];
};
#define SET_REGION2 _IOW(KVMIO, 0x49, struct region2)
#define CAP_SET2    231

/* In the code slot. */
#define CODE_GVA (1ull << 30)
#define PML4     0x1000
#define PDPT     0x2000
#define PD_LOW   0x3000
#define PD_CODE  0x4000
#define PT_CODE  0x5000
#define CODE     0x8000
#define COMMAND  0x9000
#define STACK0   0xc000
#define IDT      0xd000
#define GDT      0xe000
#define TSS      0xe100
#define HANDLERS 0xf000
#define PORT     0x80 /* + n: exception n */
#define STACK    0xb000

struct command {
	uint64_t addr, value, op, result;
};

#define BITMAP_SIZE (1ul << 22)

__asm__(".pushsection .rodata\n"
	"g_again:	out %al, %dx\n"
	"		mov (%r8), %rbx; mov 8(%r8), %rax; jmp *16(%r8)\n"
	"g_0:		xor %eax, %eax; mov (%rbx), %al; mov %rax, 24(%r8); jmp g_again\n"
	"g_1:		xor %eax, %eax; mov (%rbx), %ax; mov %rax, 24(%r8); jmp g_again\n"
	"g_2:		mov (%rbx), %eax; mov %rax, 24(%r8); jmp g_again\n"
	"g_3:		mov (%rbx), %rax; mov %rax, 24(%r8); jmp g_again\n"
	"g_4:		mov %al, (%rbx); jmp g_again\n"
	"g_5:		mov %ax, (%rbx); jmp g_again\n"
	"g_6:		mov %eax, (%rbx); jmp g_again\n"
	"g_7:		mov %rax, (%rbx); jmp g_again\n"
	"g_8:		xchg %rax, (%rbx); mov %rax, 24(%r8); jmp g_again\n"
	"g_9:		lock; add %eax, (%rbx); jmp g_again\n"
	"g_10:		call *%rbx; jmp g_again\n"
	"g_end:\n"
	".popsection\n");
extern const uint8_t g_again[], g_0[], g_1[], g_2[], g_3[], g_4[], g_5[], g_6[], g_7[], g_8[],
	g_9[], g_10[], g_end[];
static const uint8_t *const guest_code[OPS] = {g_0, g_1, g_2, g_3, g_4, g_5,
					       g_6, g_7, g_8, g_9, g_10};

static int kvm, vm, vcpu, file;
static size_t run_size;
static struct kvm_run *run;
static uint8_t *code;         /* the code slot's memory */
static uint8_t *bitmap;       /* BITMAP_SIZE, then nothing */
static uint8_t *edge;         /* one page, then nothing */
static char prot[POOL_PAGES]; /* 'w' or 'r': what the program may do there; '-': nothing */
static bool relaid;           /* the pool's layout has changed */
static size_t widest;         /* bytes of a bitmap that a sequence's largest slot may fill */

static uint64_t digest;
static bool digest_only;
static bool loose; /* this line is not part of the digest */

/*
 * KVM also logs pages that a read made it map writable; whether a page that was only read is in a
 * log says nothing. So what happened is kept, in calls since the VM began: */
static unsigned now;
static struct touch {
	uint32_t id;
	bool store;
	uint64_t page; /* of the slot */
	unsigned when;
} touches[2 * MAX_CALLS];
static unsigned ntouches;
static struct slot {
	uint32_t id, flags;
	uint64_t gpa, size;
	unsigned all_clear;  /* when its whole log was last clear */
	unsigned some_clear; /* when parts of it may have been */
	unsigned lost;       /* when it could not be copied: KVM has cleared it all the same */
} slots[MAX_CALLS];
static unsigned nslots;
static bool manual;

static void die(const char *what)
{
	perror(what);
	exit(2);
}

static int check(int r, const char *what)
{
	if (r < 0)
		die(what);
	return r;
}

/* ---- output -------------------------------------------------------------------------- */

static char line[1024];
static size_t line_len;

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
	va_list ap;
	int n;

	va_start(ap, format);
	n = vsnprintf(line + line_len, sizeof(line) - line_len, format, ap);
	va_end(ap);
	if (n < 0 || (size_t)n >= sizeof(line) - line_len)
		n = (int)(sizeof(line) - line_len - 1);
	line_len += (size_t)n;
}

static void end_line(void)
{
	if (!loose)
		for (size_t i = 0; i < line_len; i++)
			digest = (digest ^ (uint8_t)line[i]) * 0x100000001b3;
	if (!digest_only)
		printf("%s%s\n", loose ? "~" : "", line);
	line_len = 0;
	line[0] = 0;
	loose = false;
}

static void say_result(int r)
{
	if (r < 0)
		say(" = %s", strerrorname_np(errno));
	else
		say(" = %d", r);
}

static void say_hva(uint64_t hva)
{
	if (hva - POOL < POOL_PAGES * PAGE && !(hva & (PAGE - 1)))
		say(" P%" PRIu64, (uint64_t)((hva - POOL) / PAGE));
	else
		say(" %" PRIx64, hva);
}

/* ---- the program's memory ------------------------------------------------------------ */

static void map(unsigned page, unsigned npages, int p, int flags, int fd)
{
	void *at = (void *)(POOL + page * PAGE);

	if (mmap(at, npages * PAGE, p, flags | MAP_FIXED, fd,
		 fd < 0 ? 0 : (off_t)((page - POOL_SHARED) * PAGE)) != at)
		die("mmap");
	memset(prot + page, p & PROT_WRITE ? 'w' : 'r', npages);
}

static void hide(unsigned page, unsigned npages)
{
	munmap((void *)(POOL + page * PAGE), npages * PAGE);
	memset(prot + page, '-', npages);
	/* Keep the place: nothing else of the program may get there. */
}

static void lay_out(void)
{
	const int anon = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

	map(POOL_ANON, POOL_RO - POOL_ANON, PROT_READ | PROT_WRITE, anon, -1);
	map(POOL_RO, POOL_HOLE - POOL_RO, PROT_READ, anon, -1);
	hide(POOL_HOLE, POOL_PAST - POOL_HOLE);
	map(POOL_SHARED, POOL_PAGES - POOL_SHARED, PROT_READ | PROT_WRITE, MAP_SHARED, file);
	/* Eight pages past the end of the file. */
	if (mmap((void *)(POOL + POOL_PAST * PAGE), 8 * PAGE, PROT_READ | PROT_WRITE,
		 MAP_SHARED | MAP_FIXED, file, (POOL_PAGES - POOL_SHARED) * PAGE) == MAP_FAILED)
		die("mmap");
	memset(prot + POOL_PAST, '-', POOL_SHARED - POOL_PAST);
	relaid = false;
}

static uint64_t *word(unsigned page, uint64_t offset)
{
	return (uint64_t *)(POOL + page * PAGE + offset);
}

static void fill(bool fresh)
{
	static const uint16_t offsets[] = {0, 8, 0x800, 0xff8};

	if (relaid)
		lay_out();
	if (fresh) {
		madvise((void *)POOL, POOL_HOLE * PAGE, MADV_DONTNEED);
		fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
			  (POOL_PAGES - POOL_SHARED) * PAGE);
		return;
	}
	for (unsigned p = 0; p < POOL_PAGES; p++)
		for (unsigned i = 0; prot[p] == 'w' && i < 4; i++)
			/* RET first, so that the guest can call it */
			*word(p, offsets[i]) = 0xc3 + p * 0x10000ull + i * 0x100;
}

static void do_host(const struct call *c)
{
	static const char *const names[] = {"load", "store", "discard", "readonly", "writable",
					    "none", "unmap", "map",     "punch"};
	void *at = (void *)(POOL + c->page * PAGE);
	size_t len = c->npages * PAGE;
	bool same = true;

	say("host %s P%u", names[c->op], c->page);
	if (c->op >= HOST_DISCARD)
		say(" n%u", c->npages);
	else
		say("+%" PRIx64, c->first);
	for (unsigned i = 0; i < c->npages; i++)
		same &= prot[c->page + i] != '-';
	switch (c->op) {
	case HOST_LOAD:
		if (same)
			say(" = %" PRIx64, *word(c->page, c->first));
		break;
	case HOST_STORE:
		if (prot[c->page] == 'w')
			*word(c->page, c->first) = c->value;
		break;
	case HOST_DISCARD:
		say_result(madvise(at, len, MADV_DONTNEED));
		break;
	case HOST_READONLY:
	case HOST_WRITABLE:
	case HOST_NONE:
		if (!same)
			break;
		relaid = true;
		say_result(mprotect(at, len,
				    c->op == HOST_NONE       ? PROT_NONE
				    : c->op == HOST_READONLY ? PROT_READ
							     : PROT_READ | PROT_WRITE));
		memset(prot + c->page,
		       c->op == HOST_NONE       ? '-'
		       : c->op == HOST_READONLY ? 'r'
						: 'w',
		       c->npages);
		break;
	case HOST_UNMAP:
		relaid = true;
		hide(c->page, c->npages);
		break;
	case HOST_MAP:
		relaid = true;
		map(c->page, c->npages, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
		break;
	case HOST_PUNCH:
		say_result(fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
				     (off_t)(c->page % 8 * PAGE), (off_t)len));
		break;
	}
	end_line();
}

/* ---- the guest ----------------------------------------------------------------------- */

static void build_guest(void)
{
	uint64_t *pml4 = (uint64_t *)(code + PML4), *pdpt = (uint64_t *)(code + PDPT);
	uint64_t *low = (uint64_t *)(code + PD_LOW), *high = (uint64_t *)(code + PD_CODE);

	pml4[0] = (CODE_GPA + PDPT) | 0x27;
	pdpt[0] = (CODE_GPA + PD_LOW) | 0x27;
	pdpt[1] = (CODE_GPA + PD_CODE) | 0x27;
	for (unsigned w = 0; w < WINDOWS; w++)
		low[w] = windows[w] | 0xe7;
	high[0] = (CODE_GPA + PT_CODE) | 0x27;
	for (uint64_t p = 0; p < CODE_SIZE; p += PAGE)
		((uint64_t *)(code + PT_CODE))[p / PAGE] = (CODE_GPA + p) | 0x67;
	memcpy(code + CODE, g_again, (size_t)(g_end - g_again));
}

/* Exception n goes to ring 0, and there to OUT PORT + n. */
static void build_exceptions(void)
{
	uint64_t *gdt = (uint64_t *)(code + GDT), *idt = (uint64_t *)(code + IDT);
	uint64_t stack = CODE_GVA + STACK0, tss = CODE_GVA + TSS;

	gdt[0x08 / 8] = 0x00af9b000000ffff;
	gdt[0x10 / 8] = 0x00cf93000000ffff;
	gdt[0x20 / 8] = 0x00cff3000000ffff;
	gdt[0x28 / 8] = 0x00affb000000ffff;
	gdt[0x50 / 8] = 0x67 | (tss & 0xffffff) << 16 | 0x8bull << 40 | (tss >> 24 & 0xff) << 56;
	gdt[0x58 / 8] = tss >> 32;
	memcpy(code + TSS + 4, &stack, 8);
	for (unsigned v = 0; v < 32; v++) {
		uint64_t to = CODE_GVA + HANDLERS + 4 * v;
		const uint8_t out[] = {0xe6, (uint8_t)(PORT + v), 0xf4};

		memcpy(code + HANDLERS + 4 * v, out, sizeof(out));
		idt[2 * v] = (to & 0xffff) | 8 << 16 | 0x8eull << 40 | (to >> 16 & 0xffff) << 48;
		idt[2 * v + 1] = to >> 32;
	}
}

static void restart_guest(void)
{
	struct kvm_regs r = {
		.rip = CODE_GVA + CODE,
		.rflags = 0x3002, /* IOPL 3: OUT */
		.rsp = CODE_GVA + STACK,
		.r8 = CODE_GVA + COMMAND,
		.rdx = 0x10,
	};

	/* First finish what the last exit left open: it would go to the new registers. */
	run->immediate_exit = 1;
	ioctl(vcpu, KVM_RUN, 0);
	run->immediate_exit = 0;
	check(ioctl(vcpu, KVM_SET_REGS, &r), "KVM_SET_REGS");
	for (int i = 0;; i++) {
		int e = ioctl(vcpu, KVM_RUN, 0);

		if (!e && run->exit_reason == KVM_EXIT_IO)
			return;
		if ((e && errno != EINTR) || i > 100) {
			fprintf(stderr, "the guest does not start: exit %u\n", run->exit_reason);
			exit(2);
		}
	}
}

static void set_mode(void)
{
	struct kvm_segment seg = {.limit = ~0u, .present = 1, .s = 1, .g = 1, .dpl = 3};
	struct kvm_sregs s;

	check(ioctl(vcpu, KVM_GET_SREGS, &s), "KVM_GET_SREGS");
	s.cr0 = 0x80050033;
	s.cr3 = CODE_GPA + PML4;
	s.cr4 = 0x620;
	s.efer = 0x500;
	seg.type = 3;
	seg.selector = 0x23;
	s.ds = s.es = s.fs = s.gs = s.ss = seg;
	seg.type = 11;
	seg.selector = 0x2b;
	seg.l = 1;
	s.cs = seg;
	s.gdt = (struct kvm_dtable){.base = CODE_GVA + GDT, .limit = 0x5f};
	s.idt = (struct kvm_dtable){.base = CODE_GVA + IDT, .limit = 0x1ff};
	s.tr = (struct kvm_segment){
		.base = CODE_GVA + TSS, .limit = 0x67, .selector = 0x50, .type = 11, .present = 1};
	check(ioctl(vcpu, KVM_SET_SREGS, &s), "KVM_SET_SREGS");
}

static void make_vm(void)
{
	struct kvm_userspace_memory_region r = {
		.slot = CODE_ID,
		.guest_phys_addr = CODE_GPA,
		.memory_size = CODE_SIZE,
		.userspace_addr = (uintptr_t)code,
	};

	vm = check(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &r), "code slot");
	vcpu = check(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
	run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED)
		die("kvm_run");
	set_mode();
	restart_guest();
}

static void free_vm(void)
{
	munmap(run, run_size);
	close(vcpu);
	close(vm);
}

static uint64_t window_gva(uint64_t gpa)
{
	for (uint64_t w = 0; w < WINDOWS; w++)
		if (gpa - windows[w] < 0x200000)
			return (w << 21) + (gpa - windows[w]);
	return 0;
}

static void say_mmio(void)
{
	uint64_t v = 0;

	if (run->mmio.is_write) {
		memcpy(&v, run->mmio.data, run->mmio.len <= 8 ? run->mmio.len : 8);
		say(" W%u@%llx:%" PRIx64, run->mmio.len, run->mmio.phys_addr, v);
	} else {
		v = run->mmio.phys_addr * 0x9e3779b97f4a7c15;
		/* What is called must return. */
		v = (v & ~0xffull) | 0xc3;
		memcpy(run->mmio.data, &v, 8);
		say(" R%u@%llx", run->mmio.len, run->mmio.phys_addr);
	}
}

static void touch(uint64_t gpa, bool store)
{
	for (unsigned i = 0; i < nslots; i++)
		if (gpa - slots[i].gpa < slots[i].size)
			touches[ntouches++] = (struct touch){slots[i].id, store,
							     (gpa - slots[i].gpa) / PAGE, now};
}

static void do_guest(const struct call *c)
{
	static const uint8_t sizes[OPS] = {1, 2, 4, 8, 1, 2, 4, 8, 8, 4, 1};
	bool store = c->op >= STORE1 && c->op != FETCH;
	static const char *const names[] = {"load1",  "load2",  "load4",  "load8",
					    "store1", "store2", "store4", "store8",
					    "xchg8",  "add4",   "call"};
	volatile struct command *cmd = (volatile void *)(code + COMMAND);

	say("guest %s %" PRIx64 " =", names[c->op], c->gpa);
	cmd->addr = window_gva(c->gpa);
	cmd->value = c->value;
	cmd->op = CODE_GVA + CODE + (uint64_t)(guest_code[c->op] - g_again);
	cmd->result = 0x5555;
	for (int exits = 0; exits < 12; exits++) {
		if (ioctl(vcpu, KVM_RUN, 0)) {
			if (errno == EINTR)
				continue;
			say(" %s exit%u", strerrorname_np(errno), run->exit_reason);
			break;
		}
		if (run->exit_reason == KVM_EXIT_MMIO) {
			say_mmio();
			continue;
		}
		if (run->exit_reason == KVM_EXIT_IO && run->io.port >= PORT) {
			say(" exception%u", run->io.port - PORT);
			loose = c->op == FETCH && run->io.port == PORT + 6;
			break;
		}
		if (run->exit_reason == KVM_EXIT_IO) {
			say(" %llx", (unsigned long long)cmd->result);
			end_line();
			touch(c->gpa, store);
			touch(c->gpa + sizes[c->op] - 1, store);
			return;
		}
		say(" exit%u", run->exit_reason);
		if (run->exit_reason == KVM_EXIT_INTERNAL_ERROR) {
			say(".%u", run->internal.suberror);
			loose = c->op == FETCH && run->internal.suberror == 1;
		}
		break;
	}
	end_line();
	touch(c->gpa, false); /* perhaps */
	touch(c->gpa + sizes[c->op] - 1, false);
	set_mode();
	restart_guest();
}

/* ---- the calls ----------------------------------------------------------------------- */

/* Where the argument of @size bytes goes. */
static void *argument(const void *data, size_t size, enum pointer p)
{
	if (p == BAD_POINTER)
		return (void *)(POOL - PAGE);
	if (p == HALF_POINTER) {
		memcpy(edge + PAGE - size / 2, data, size / 2);
		return edge + PAGE - size / 2;
	}
	memcpy(edge, data, size);
	return edge;
}

static struct slot *find_slot(uint32_t id)
{
	for (unsigned i = 0; i < nslots; i++)
		if (slots[i].id == id)
			return &slots[i];
	return NULL;
}

/* @c has succeeded. */
static void set_slot(const struct call *c)
{
	struct slot *s = find_slot(c->slot);

	if (!s) {
		s = &slots[nslots++];
		*s = (struct slot){.id = c->slot};
	}
	/* A log outlives a move. */
	if (!c->size || !(s->flags & c->flags & KVM_MEM_LOG_DIRTY_PAGES))
		s->all_clear = s->some_clear = now;
	s->flags = c->size ? c->flags : 0;
	s->gpa = c->gpa;
	s->size = c->size;
}

static void do_set(const struct call *c)
{
	struct region2 r = {
		.slot = c->slot,
		.flags = c->flags,
		.gpa = c->gpa,
		.size = c->size,
		.hva = c->hva,
		.gmem_offset = c->gmem_offset,
		.gmem = c->gmem,
		.pad1 = c->pad,
	};
	bool two = c->what == SET2;
	size_t size = two ? sizeof(r) : sizeof(struct kvm_userspace_memory_region);
	int e;

	loose = two && c->flags & 4;
	say("%s id%x f%x %" PRIx64 " +%" PRIx64, two ? "set2" : "set", c->slot, c->flags, c->gpa,
	    c->size);
	say_hva(c->hva);
	if (c->ptr)
		say(" ptr%u", c->ptr);
	e = ioctl(vm, two ? SET_REGION2 : KVM_SET_USER_MEMORY_REGION, argument(&r, size, c->ptr));
	say_result(e);
	end_line();
	if (e)
		return;
	set_slot(c);
	if (c->size / PAGE / 8 > widest)
		widest = c->size / PAGE / 8;
}

/* Whether it says nothing if page @page of @s is in the log. */
static bool unsure(const struct slot *s, uint64_t page)
{
	unsigned loaded = 0, stored = 0;

	for (const struct touch *t = touches; t < touches + ntouches; t++)
		if (t->id == s->id && t->page == page)
			*(t->store ? &stored : &loaded) = t->when;
	return (loaded > s->all_clear && stored <= s->some_clear) ||
	       (s->lost > s->all_clear && stored <= s->lost);
}

static void say_bits(const struct slot *s, size_t bytes)
{
	uint64_t w;

	for (size_t i = 0; i < bytes; i += 8) {
		memcpy(&w, bitmap + i, 8);
		for (unsigned b = 0; w && b < 64; b++)
			if (w >> b & 1 && s && unsure(s, i * 8 + b))
				w &= ~(1ull << b);
		if (w)
			say(" %zx:%" PRIx64, i / 8, w);
	}
}

static void do_log(const struct call *c)
{
	bool clear = c->what == CLEAR_LOG;
	size_t bytes = (widest + 15) & ~7ul;
	struct slot *s;
	struct kvm_dirty_log get = {.slot = c->slot, .dirty_bitmap = bitmap};
	struct kvm_clear_dirty_log clr = {.slot = c->slot,
					  .num_pages = c->num,
					  .first_page = c->first,
					  .dirty_bitmap = bitmap};
	int r;

	if (bytes > BITMAP_SIZE)
		bytes = BITMAP_SIZE;
	if (c->ptr == HALF_POINTER) /* the bitmap */
		get.dirty_bitmap = clr.dirty_bitmap = (void *)(POOL - PAGE);
	say("%s id%x", clear ? "clear" : "log", c->slot);
	if (c->ptr)
		say(" ptr%u", c->ptr);
	if (clear) {
		say(" %" PRIx64 " +%x %" PRIx64, c->first, c->num, c->bits);
		for (size_t i = 0; i < bytes; i += 8)
			memcpy(bitmap + i, &c->bits, 8);
	} else {
		memset(bitmap, 0, bytes);
	}
	r = ioctl(vm, clear ? KVM_CLEAR_DIRTY_LOG : KVM_GET_DIRTY_LOG,
		  argument(clear ? (void *)&clr : &get, clear ? sizeof(clr) : sizeof(get),
			   c->ptr == HALF_POINTER ? GOOD : c->ptr));
	say_result(r);
	if (!clear && !r)
		say_bits(find_slot(c->slot), bytes);
	end_line();
	s = find_slot(c->slot);
	if (s && (clear || !manual)) {
		s->some_clear = now;
		if (!r && !clear)
			s->all_clear = now;
		if (r && !clear)
			s->lost = now;
	}
}

static void do_manual(const struct call *c)
{
	struct kvm_enable_cap cap = {.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, .args[0] = c->value};
	int r;

	say("manual %" PRIx64, c->value);
	r = ioctl(vm, KVM_ENABLE_CAP, &cap);
	say_result(r);
	end_line();
	if (!r) /* from here on reading a log does not clear it, or does again */
		manual = c->value & 1;
}

static void do_call(const struct call *c)
{
	now++;
	switch (c->what) {
	case SET:
	case SET2:
		do_set(c);
		break;
	case GET_LOG:
	case CLEAR_LOG:
		do_log(c);
		break;
	case MANUAL:
		do_manual(c);
		break;
	case GUEST:
		do_guest(c);
		break;
	case HOST:
		do_host(c);
		break;
	}
}

/* ---- main ---------------------------------------------------------------------------- */

static unsigned find_features(void)
{
	struct kvm_userspace_memory_region r = {
		.flags = KVM_MEM_LOG_DIRTY_PAGES, .memory_size = PAGE, .userspace_addr = POOL};
	struct kvm_clear_dirty_log clear = {.num_pages = 1, .dirty_bitmap = bitmap};
	int v = check(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	unsigned f = 0;

	if (ioctl(v, KVM_CHECK_EXTENSION, CAP_SET2) > 0)
		f |= FEATURE_SET2;
	if (!ioctl(v, KVM_SET_USER_MEMORY_REGION, &r))
		f |= FEATURE_LOG;
	if (ioctl(v, KVM_CHECK_EXTENSION, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) > 0)
		f |= FEATURE_MANUAL;
	if (f & FEATURE_LOG && !ioctl(v, KVM_CLEAR_DIRTY_LOG, &clear))
		f |= FEATURE_CLEAR;
	if (ioctl(v, KVM_CHECK_EXTENSION, KVM_CAP_MULTI_ADDRESS_SPACE) < 2)
		f |= FEATURE_ONE;
	close(v);
	return f;
}

static void setup(void)
{
	const int anon = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

	kvm = check(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	run_size = (size_t)check(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
	file = check(memfd_create("pool", MFD_CLOEXEC), "memfd_create");
	check(ftruncate(file, (POOL_PAGES - POOL_SHARED) * PAGE), "ftruncate");
	/* The page before the pool stays free: it is the bad pointer. */
	if (mmap((void *)(POOL - PAGE), (POOL_PAGES + 2) * PAGE, PROT_NONE,
		 anon | MAP_FIXED_NOREPLACE, -1, 0) != (void *)(POOL - PAGE))
		die("mmap of the pool");
	code = mmap(NULL, CODE_SIZE, PROT_READ | PROT_WRITE, anon, -1, 0);
	bitmap = mmap(NULL, BITMAP_SIZE + PAGE, PROT_READ | PROT_WRITE, anon, -1, 0);
	edge = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, anon, -1, 0);
	if (code == MAP_FAILED || bitmap == MAP_FAILED || edge == MAP_FAILED)
		die("mmap");
	mprotect(bitmap + BITMAP_SIZE, PAGE, PROT_NONE);
	mprotect(edge + PAGE, PAGE, PROT_NONE);
	lay_out();
	build_guest();
	build_exceptions();
}

static void do_sequence(uint64_t seed, unsigned features, uint64_t dropped)
{
	struct sequence s;

	generate(&s, seed, features);
	fill(s.fresh);
	widest = now = 0;
	manual = false;
	ntouches = nslots = 0;
	digest = 0xcbf29ce484222325;
	if (!digest_only)
		printf("sequence %" PRIu64 "%s\n", seed, s.fresh ? " fresh" : "");
	make_vm();
	for (unsigned i = 0; i < s.n; i++) {
		if (!(dropped >> i & 1))
			do_call(&s.calls[i]);
		else if (!digest_only)
			puts("-");
	}
	free_vm();
	if (digest_only)
		printf("%08x\n", (unsigned)(digest ^ digest >> 32));
}

int main(int argc, char **argv)
{
	uint64_t seed = 1, count = 1, dropped = 0;
	unsigned features = 0;
	bool ask = false;

	for (int i = 1; i < argc; i++) {
		char *value = i + 1 < argc ? argv[i + 1] : NULL;

		if (!strcmp(argv[i], "--digest")) {
			digest_only = true;
			continue;
		}
		if (!strcmp(argv[i], "--features") && !value) {
			ask = true;
			break;
		}
		i++;
		if (!value) {
			fprintf(stderr, "region-diff: %s needs a value\n", argv[i - 1]);
			return 2;
		}
		if (!strcmp(argv[i - 1], "--seed"))
			seed = strtoull(value, NULL, 0);
		else if (!strcmp(argv[i - 1], "--count"))
			count = strtoull(value, NULL, 0);
		else if (!strcmp(argv[i - 1], "--features"))
			features = (unsigned)strtoul(value, NULL, 0);
		else if (!strcmp(argv[i - 1], "--drop"))
			for (char *p = value; *p; p += *p == ',')
				dropped |= 1ull << (strtoul(p, &p, 0) & 63);
		else
			return 2;
	}
	setup();
	if (ask) {
		printf("%u\n", find_features());
		return 0;
	}
	for (uint64_t i = 0; i < count; i++)
		do_sequence(seed + i, features, dropped);
	return fflush(stdout) ? 2 : 0;
}
