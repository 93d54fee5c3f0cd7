/* SPDX-License-Identifier: MIT */
/*
 * The guests: one loop in long mode that works through a list of accesses and writes down what
 * it saw and when. List, records and clock are in memory that never changes.
 */
#include "stress.h"

#define CODE     0x1000u
#define TABLES   0x2000u
#define CLOCK    0x200000u
#define AREA(id) (0x100000u + (id)*0x10000u)
#define RECORDS  0x8000u
#define STABLE   0x200000u

#define WINDOWS 0x10000000ull
#define BIGS    0x20000000ull
#define HEAPS   0x30000000ull

_Static_assert(BATCH * sizeof(struct cmd) <= RECORDS, "an area has room");

/* r14, r15: lists; rbx: clock. Accesses go through r10, with the clock in r8 and r9. */
extern const uint8_t guest_begin[], guest_read[], guest_xadd[], guest_store[], guest_movs[],
	guest_skip[], guest_end[];
__asm__(".pushsection .rodata\n"
	"guest_begin:\n"
	"	mov	%r14, %r12\n"
	"	mov	%r15, %r13\n"
	"	mov	%rbp, %rcx\n"
	"1:	mov	(%r12), %r10\n"
	"	mov	8(%r12), %r11\n"
	"	mov	16(%r12), %rax\n"
	"	mov	(%rbx), %r8\n"
	"	cmp	$1, %r11\n"
	"	jb	guest_read\n"
	"	je	guest_xadd\n"
	"	cmp	$2, %r11\n"
	"	je	3f\n"
	"	mov	%r10, %rsi\n"
	"	lea	8(%r13), %rdi\n"
	"guest_movs:\n"
	"	movsq\n"
	"	mov	8(%r13), %rax\n"
	"	jmp	4f\n"
	"guest_read:\n"
	"	mov	(%r10), %rax\n"
	"	jmp	4f\n"
	"guest_xadd:\n"
	"	lock xadd %rax, (%r10)\n"
	"	jmp	4f\n"
	"3:	or	%r8, %rax\n"
	"guest_store:\n"
	"	mov	%rax, (%r10)\n"
	"4:	mov	(%rbx), %r9\n"
	"	mov	%r8, (%r13)\n"
	"	mov	%rax, 8(%r13)\n"
	"	mov	%r9, 16(%r13)\n"
	"guest_skip:\n"
	"	add	$32, %r12\n"
	"	add	$32, %r13\n"
	"	dec	%rcx\n"
	"	jnz	1b\n"
	"	out	%al, $0x10\n"
	"	jmp	guest_begin\n"
	"guest_end:\n"
	".popsection\n");

static uint64_t rip_of(const uint8_t *label)
{
	return CODE + (uint64_t)(label - guest_begin);
}

/* ---- windows -------------------------------------------------------------------------- */

uint64_t win_gpa(unsigned win)
{
	return win < WIN_BIG    ? WINDOWS + (uint64_t)win * SMALL * PAGE
	       : win == WIN_BIG ? BIGS
				: HEAPS;
}

unsigned win_pages(unsigned win)
{
	return win == WIN_BIG ? BIG : SMALL;
}

bool gpa_to_win(uint64_t gpa, unsigned *win, unsigned *page)
{
	for (unsigned w = 0; w < NWIN; w++) {
		uint64_t base = win_gpa(w);

		if (gpa < base || gpa - base >= (uint64_t)win_pages(w) * PAGE)
			continue;
		*win = w;
		*page = (unsigned)((gpa - base) / PAGE);
		return true;
	}
	return false;
}

int set_slot(int fd, unsigned slot, unsigned flags, uint64_t gpa, uint64_t size, const void *hva)
{
	struct kvm_userspace_memory_region r = {
		.slot = slot,
		.flags = flags,
		.guest_phys_addr = gpa,
		.memory_size = size,
		.userspace_addr = (uintptr_t)hva,
	};

	return ioctl(fd, KVM_SET_USER_MEMORY_REGION, &r);
}

/* ---- creation ------------------------------------------------------------------------- */

static void vcpu_create(struct vm *vm, unsigned id, uint64_t seed)
{
	struct vcpu *v = &vm->vcpus[id];
	struct kvm_segment code = {
		.limit = ~0u, .selector = 8, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1};
	struct kvm_segment data = {
		.limit = ~0u, .selector = 16, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1};
	char room[sizeof(struct kvm_cpuid2) + 128 * sizeof(struct kvm_cpuid_entry2)]
		__attribute__((aligned(8))) = {0};
	struct kvm_cpuid2 *cpuid = (struct kvm_cpuid2 *)room;
	struct kvm_sregs s;
	struct kvm_regs regs = {
		.rip = CODE,
		.rflags = 2,
		.rbx = CLOCK,
		.rbp = BATCH,
		.r14 = AREA(id),
		.r15 = AREA(id) + RECORDS,
	};

	v->vm = vm;
	v->id = id;
	/* Never 0, from which the generator would not come back */
	v->rng = (seed ^ (0xbf58476d1ce4e5b9ull * (vm->id * MAX_VCPUS + id + 1))) | 1;
	v->cmds = (struct cmd *)(vm->stable + AREA(id));
	v->records = (struct record *)(vm->stable + AREA(id) + RECORDS);
	v->masked = id % 4 == 1;
	memset(v->xadds, 0, sizeof(v->xadds));
	cpuid->nent = 128;
	v->fd = ioctl(vm->fd, KVM_CREATE_VCPU, id);
	NEED(v->fd >= 0);
	v->run_size = (size_t)ioctl(kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);
	v->run = mmap(NULL, v->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, 0);
	NEED(v->run != MAP_FAILED);
	NEED(!ioctl(kvm_fd, KVM_GET_SUPPORTED_CPUID, cpuid));
	NEED(!ioctl(v->fd, KVM_SET_CPUID2, cpuid));
	NEED(!ioctl(v->fd, KVM_GET_SREGS, &s));
	s.cs = code;
	s.ds = s.es = s.ss = s.fs = s.gs = data;
	s.cr3 = TABLES;
	s.cr4 = 0x20;
	s.cr0 = 0x80010031;
	s.efer = 0x500;
	NEED(!ioctl(v->fd, KVM_SET_SREGS, &s));
	NEED(!ioctl(v->fd, KVM_SET_REGS, &regs));
}

void vm_create(struct vm *vm, unsigned id, uint64_t seed)
{
	uint64_t *t;

	vm->id = (int)id;
	vm->fd = ioctl(kvm_fd, KVM_CREATE_VM, 0);
	NEED(vm->fd >= 0);
	ioctl(vm->fd, KVM_SET_TSS_ADDR, 0xfffbd000ul);
	pthread_mutex_init(&vm->slots, NULL);
	pthread_mutex_init(&vm->lock, NULL);
	for (unsigned w = 0; w < NWIN; w++)
		hist_reset(&vm->win[w], (struct state){.kind = AWAY});
	vm->stable = mmap(NULL, STABLE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	NEED(vm->stable != MAP_FAILED);
	memcpy(vm->stable + CODE, guest_begin, (size_t)(guest_end - guest_begin));
	t = (uint64_t *)(vm->stable + TABLES);
	t[0] = (TABLES + PAGE) | 7;
	t[512] = (TABLES + 2 * PAGE) | 7;
	for (unsigned i = 0; i < 512; i++)
		t[1024 + i] = (uint64_t)i << 21 | 0x87;
	NEED(!set_slot(vm->fd, 0, 0, 0, STABLE, vm->stable));
	NEED(!set_slot(vm->fd, 1, KVM_MEM_READONLY, CLOCK, PAGE, (void *)the_clock));
	vm->nvcpus = opt.vcpus;
	vm->vcpus = calloc(vm->nvcpus, sizeof(*vm->vcpus));
	NEED(vm->vcpus);
	for (unsigned i = 0; i < vm->nvcpus; i++)
		vcpu_create(vm, i, seed);
}

void vm_destroy(struct vm *vm)
{
	for (unsigned i = 0; i < vm->nvcpus; i++) {
		munmap(vm->vcpus[i].run, vm->vcpus[i].run_size);
		NEED(!close(vm->vcpus[i].fd));
	}
	NEED(!close(vm->fd));
	munmap(vm->stable, STABLE);
	free(vm->vcpus);
	vm->vcpus = NULL;
}

/* ---- running -------------------------------------------------------------------------- */

static void make_batch(struct vcpu *v)
{
	static const unsigned words[] = {R_WORD, R_WORD, X_WORD, S_WORD};

	for (unsigned i = 0; i < BATCH; i++) {
		unsigned pick = below(&v->rng, 24), page, op = below(&v->rng, 10);
		unsigned win = pick < 20 ? pick % WIN_BIG : pick < 22 ? WIN_BIG : WIN_HEAP;
		struct cmd *c = &v->cmds[i];
		unsigned word;

		page = below(&v->rng, win_pages(win));
		if (win == WIN_HEAP)
			op = 0;
		if (op < 5) {
			c->op = OP_READ;
			word = words[below(&v->rng, 4)];
		} else if (op < 7) {
			c->op = OP_XADD;
			c->value = 1;
			word = X_WORD;
		} else if (op < 9) {
			c->op = OP_STORE;
			c->value = STORED | (uint64_t)v->vm->id << 60 | (uint64_t)win << 56 |
				   (uint64_t)page << 47 | (uint64_t)v->id << 40;
			word = S_WORD;
		} else {
			c->op = OP_MOVS;
			word = words[below(&v->rng, 4)];
		}
		c->addr = win_gpa(win) + (uint64_t)page * PAGE + word;
		v->records[i] = (struct record){0};
	}
	memset(v->skipped, 0, sizeof(v->skipped));
}

static unsigned where(struct vcpu *v, struct kvm_regs *regs, bool fault)
{
	NEED(!ioctl(v->fd, KVM_GET_REGS, regs));
	/* A device's write is an exit after its instruction. */
	if (fault && regs->rip != rip_of(guest_read) && regs->rip != rip_of(guest_xadd) &&
	    regs->rip != rip_of(guest_store) && regs->rip != rip_of(guest_movs))
		fail("vm %d vcpu %u: an exit (reason %u) at rip %#llx, which touches stable memory "
		     "only",
		     v->vm->id, v->id, v->run->exit_reason, (unsigned long long)regs->rip);
	return (unsigned)((regs->r12 - AREA(v->id)) / sizeof(struct cmd));
}

static void efault(struct vcpu *v)
{
	struct kvm_regs regs;
	unsigned i = where(v, &regs, true);

	check_efault(v, &v->cmds[i], regs.r8);
	if (below(&v->rng, 4) == 0)
		return; /* once more */
	v->skipped[i] |= 4;
	regs.rip = rip_of(guest_skip);
	NEED(!ioctl(v->fd, KVM_SET_REGS, &regs));
}

static void mmio(struct vcpu *v)
{
	uint64_t value = MMIO_SERIAL << 24;
	struct kvm_regs regs;
	unsigned i = where(v, &regs, false);

	check_mmio(v, v->run->mmio.phys_addr, v->run->mmio.is_write, regs.r8);
	if (v->run->mmio.is_write) {
		v->skipped[i] |= 2;
		return;
	}
	v->skipped[i] |= 1;
	memcpy(v->run->mmio.data, &value, sizeof(value));
}

static void eintr(struct vcpu *v)
{
	struct timespec none = {0};
	sigset_t s;

	atomic_fetch_add_explicit(&counters.eintrs, 1, memory_order_relaxed);
	v->run->immediate_exit = 0;
	if (!v->masked)
		return;
	sigemptyset(&s);
	sigaddset(&s, SIGUSR1);
	while (sigtimedwait(&s, NULL, &none) > 0)
		;
}

static void strange_exit(struct vcpu *v)
{
	struct kvm_regs regs;

	NEED(!ioctl(v->fd, KVM_GET_REGS, &regs));
	/* Not every KVM's emulator has it. */
	if (opt.real && v->run->exit_reason == KVM_EXIT_INTERNAL_ERROR &&
	    regs.rip == rip_of(guest_xadd)) {
		check_mmio(v, regs.r10, true, regs.r8);
		v->skipped[(regs.r12 - AREA(v->id)) / sizeof(struct cmd)] |= 4;
		regs.rip = rip_of(guest_skip);
		NEED(!ioctl(v->fd, KVM_SET_REGS, &regs));
		return;
	}
	fail("vm %d vcpu %u: exit reason %u, suberror %u, rip %#llx (start + %lld), r10 %#llx",
	     v->vm->id, v->id, v->run->exit_reason, v->run->internal.suberror, regs.rip,
	     regs.rip - CODE, regs.r10);
}

/* Until the list is worked through. */
static void run_batch(struct vcpu *v)
{
	for (;;) {
		int r = ioctl(v->fd, KVM_RUN, 0);

		if (r && errno == EINTR) {
			eintr(v);
		} else if (r && errno == EFAULT) {
			efault(v);
		} else if (r) {
			fail("vm %d vcpu %u: KVM_RUN: %m", v->vm->id, v->id);
		} else if (v->run->exit_reason == KVM_EXIT_MMIO) {
			mmio(v);
		} else if (v->run->exit_reason == KVM_EXIT_IO) {
			return;
		} else {
			strange_exit(v);
		}
	}
}

/* What else can be asked of a vCPU between two runs. */
static void vcpu_misc(struct vcpu *v)
{
	struct kvm_translation tr = {.linear_address = win_gpa(below(&v->rng, NWIN))};
	struct kvm_sregs s;
	struct kvm_fpu fpu;

	switch (below(&v->rng, 8)) {
	case 0:
		NEED(!ioctl(v->fd, KVM_GET_SREGS, &s));
		NEED(!ioctl(v->fd, KVM_SET_SREGS, &s));
		break;
	case 1:
		NEED(!ioctl(v->fd, KVM_TRANSLATE, &tr) && tr.valid &&
		     tr.physical_address == tr.linear_address);
		break;
	case 2:
		NEED(!ioctl(v->fd, KVM_GET_FPU, &fpu));
		break;
	case 3:
		v->run->immediate_exit = 1;
		break;
	default:
		break;
	}
}

static void mask_signals(struct vcpu *v)
{
	char room[sizeof(struct kvm_signal_mask) + 8] __attribute__((aligned(8))) = {0};
	struct kvm_signal_mask *m = (struct kvm_signal_mask *)room;
	sigset_t s;

	sigemptyset(&s);
	sigaddset(&s, SIGUSR1);
	pthread_sigmask(SIG_BLOCK, &s, NULL);
	m->len = 8; /* none is blocked in KVM_RUN */
	NEED(!ioctl(v->fd, KVM_SET_SIGNAL_MASK, m));
}

void *vcpu_thread(void *arg)
{
	struct vcpu *v = arg;

	if (v->masked)
		mask_signals(v);
	for (unsigned n = 0; n < 4 || !stop; n++) {
		at("KVM_RUN");
		make_batch(v);
		run_batch(v);
		for (unsigned i = 0; i < BATCH; i++)
			if (!(v->skipped[i] & 4))
				check_record(v, i);
		vcpu_misc(v);
	}
	return NULL;
}
