/* SPDX-License-Identifier: MIT */
/*
 * KVM_RUN: every exit's fields and its completion (M3, M4, N7), struct kvm_run's settings.
 * With KVMLET_TEST_REAL=1 on the real /dev/kvm.
 */
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>

#include "uapi_guest.h"

static struct guest g;

static int setup(void **state)
{
	(void)state;
	guest_make(&g, false);
	return 0;
}

static int teardown(void **state)
{
	(void)state;
	guest_free(&g);
	return 0;
}

static void pio_out(void **state)
{
	(void)state;
	/* mov al,0x41; out 0x80,al; mov ax,0x1234; mov dx,0x1000; out dx,ax; hlt */
	guest_code(&g, 0xb0, 0x41, 0xe6, 0x80, 0xb8, 0x34, 0x12, 0xba, 0x00, 0x10, 0xef, 0xf4);
	assert_exit(&g, KVM_EXIT_IO);
	assert_int_equal(g.run->io.direction, KVM_EXIT_IO_OUT);
	assert_int_equal(g.run->io.port, 0x80);
	assert_int_equal(g.run->io.size, 1);
	assert_int_equal(g.run->io.count, 1);
	assert_int_equal(g.run->io.data_offset, 4096);
	assert_int_equal(((uint8_t *)g.run)[4096], 0x41);
	assert_exit(&g, KVM_EXIT_IO);
	assert_int_equal(g.run->io.port, 0x1000);
	assert_int_equal(g.run->io.size, 2);
	assert_int_equal(*(uint16_t *)((uint8_t *)g.run + g.run->io.data_offset), 0x1234);
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(guest_get(&g).rip, CODE + 12);
}

/* The answer is taken at the start of the next KVM_RUN, with immediate_exit too. */
static void pio_in_completes_first(void **state)
{
	(void)state;
	/* in al,0x81; hlt */
	guest_code(&g, 0xe4, 0x81, 0xf4);
	assert_exit(&g, KVM_EXIT_IO);
	assert_int_equal(g.run->io.direction, KVM_EXIT_IO_IN);
	assert_int_equal(g.run->io.port, 0x81);
	((uint8_t *)g.run)[4096] = 0x5c;
	g.run->immediate_exit = 1;
	assert_int_equal(guest_run(&g), -EINTR);
	assert_int_equal(guest_get(&g).rax & 0xff, 0x5c);
	assert_int_equal(guest_get(&g).rip, CODE + 2);
	((uint8_t *)g.run)[4096] = 0x77;
	assert_int_equal(guest_run(&g), -EINTR);
	assert_int_equal(guest_get(&g).rax & 0xff, 0x5c);
	g.run->immediate_exit = 0;
	assert_exit(&g, KVM_EXIT_HLT);
}

/* M4: no slot where data should be. */
static void mmio(void **state)
{
	(void)state;
	/* mov eax,0x11223344; mov [0],eax; mov eax,[4]; mov bl,[9]; hlt */
	guest_code(&g, 0x66, 0xb8, 0x44, 0x33, 0x22, 0x11, 0x66, 0xa3, 0x00, 0x00, 0x66, 0xa1, 0x04,
		   0x00, 0x8a, 0x1e, 0x09, 0x00, 0xf4);
	assert_exit(&g, KVM_EXIT_MMIO);
	assert_int_equal(g.run->mmio.phys_addr, MMIO);
	assert_int_equal(g.run->mmio.len, 4);
	assert_int_equal(g.run->mmio.is_write, 1);
	assert_int_equal(*(uint32_t *)g.run->mmio.data, 0x11223344);
	assert_exit(&g, KVM_EXIT_MMIO);
	assert_int_equal(g.run->mmio.phys_addr, MMIO + 4);
	assert_int_equal(g.run->mmio.len, 4);
	assert_int_equal(g.run->mmio.is_write, 0);
	*(uint64_t *)g.run->mmio.data = 0x99999999cafebabe;
	g.run->immediate_exit = 1;
	assert_int_equal(guest_run(&g), -EINTR);
	g.run->immediate_exit = 0;
	assert_int_equal(guest_get(&g).rax, 0xcafebabe);
	assert_int_equal(guest_get(&g).rip, CODE + 14);
	assert_exit(&g, KVM_EXIT_MMIO);
	assert_int_equal(g.run->mmio.phys_addr, MMIO + 9);
	assert_int_equal(g.run->mmio.len, 1);
	g.run->mmio.data[0] = 0x42;
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(guest_get(&g).rbx & 0xff, 0x42);
}

/* What the program writes into kvm_run while it answers is not taken for the engine's. */
static void scribbled_run(void **state)
{
	(void)state;
	guest_code(&g, 0x66, 0xa1, 0x04, 0x00, 0xe4, 0x81, 0xf4);
	assert_exit(&g, KVM_EXIT_MMIO);
	*(uint32_t *)g.run->mmio.data = 0x12345678;
	g.run->mmio.len = UINT32_MAX;
	g.run->mmio.phys_addr = ~0ull;
	g.run->mmio.is_write = 1;
	g.run->exit_reason = 0xdeadbeef;
	assert_exit(&g, KVM_EXIT_IO);
	assert_int_equal(guest_get(&g).rax, 0x12345678);
	((uint8_t *)g.run)[4096] = 0x9a;
	g.run->io.data_offset = ~0ull;
	g.run->io.size = 255;
	g.run->io.count = UINT32_MAX;
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(guest_get(&g).rax, 0x1234569a);
}

/* M3: a write to a read-only slot. */
static void read_only_slot(void **state)
{
	uint8_t *page =
		mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	(void)state;
	page[0] = 0x33;
	assert_int_equal(set_slot(&g, 1, KVM_MEM_READONLY, MMIO, 4096, page), 0);
	/* mov al,[0]; mov [1],al; hlt */
	guest_code(&g, 0xa0, 0x00, 0x00, 0xa2, 0x01, 0x00, 0xf4);
	assert_exit(&g, KVM_EXIT_MMIO);
	assert_int_equal(g.run->mmio.is_write, 1);
	assert_int_equal(g.run->mmio.phys_addr, MMIO + 1);
	assert_int_equal(g.run->mmio.data[0], 0x33);
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(page[1], 0);
	munmap(page, 4096);
}

/* N7: memory that is not there: -EFAULT, and KVM leaves exit_reason at 0. */
static void vanished_memory(void **state)
{
	uint8_t *page = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	(void)state;
	if (on_real_kvm())
		skip(); /* where KVM emulates the access in software, it takes this for MMIO */
	assert_int_equal(set_slot(&g, 1, 0, MMIO, 4096, page), 0);
	guest_code(&g, 0xa0, 0x00, 0x00, 0xf4);
	g.run->exit_reason = 0x55;
	assert_int_equal(guest_run(&g), -EFAULT);
	assert_int_equal(g.run->exit_reason, KVM_EXIT_UNKNOWN);
	assert_int_equal(guest_get(&g).rip, CODE);
	assert_int_equal(mprotect(page, 4096, PROT_READ | PROT_WRITE), 0);
	page[0] = 0x21;
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(guest_get(&g).rax & 0xff, 0x21);
	munmap(page, 4096);
}

/* M4: no slot where code should be. */
static void fetch_from_nowhere(void **state)
{
	struct kvm_sregs s;

	(void)state;
	guest_code(&g, 0xf4);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_SREGS, &s), 0);
	s.cs.base = 0x200000;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_SREGS, &s), 0);
	assert_exit(&g, KVM_EXIT_INTERNAL_ERROR);
	assert_int_equal(g.run->internal.suberror, KVM_INTERNAL_ERROR_EMULATION);
	assert_true(g.run->emulation_failure.ndata >= 1);
	assert_int_equal(g.run->emulation_failure.flags &
				 ~KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
			 0);
	assert_int_equal(guest_get(&g).rip, CODE);
}

/* An instruction that KVM does not emulate, on MMIO: its bytes are told (U2). */
static void emulation_failure_bytes(void **state)
{
	struct kvm_enable_cap cap = {.cap = KVM_CAP_EXIT_ON_EMULATION_FAILURE, .args = {1}};

	(void)state;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_ENABLE_CAP, &cap), 0);
	/* fld dword [0] */
	guest_code(&g, 0xd9, 0x06, 0x00, 0x00, 0xf4);
	assert_exit(&g, KVM_EXIT_INTERNAL_ERROR);
	assert_int_equal(g.run->internal.suberror, KVM_INTERNAL_ERROR_EMULATION);
	assert_true(g.run->emulation_failure.ndata >= 3);
	assert_int_equal(g.run->emulation_failure.flags,
			 KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
	assert_true(g.run->emulation_failure.insn_size >= 4);
	assert_memory_equal(g.run->emulation_failure.insn_bytes, "\xd9\x06\0\0", 4);
	assert_int_equal(guest_get(&g).rip, CODE);
}

static void triple_fault(void **state)
{
	struct kvm_sregs s;

	(void)state;
	guest_code(&g, 0x0f, 0x0b); /* ud2, in protected mode without an IDT */
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_SREGS, &s), 0);
	s.idt.limit = 0;
	s.cr0 |= 1;
	s.cs.type = 11;
	s.cs.selector = 8;
	s.cs.limit = 0xffffffff;
	s.cs.g = s.cs.db = 1;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_SREGS, &s), 0);
	assert_exit(&g, KVM_EXIT_SHUTDOWN);
}

static void msr_exit(void **state)
{
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_X86_USER_SPACE_MSR,
		.args = {KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_INVAL |
			 KVM_MSR_EXIT_REASON_FILTER},
	};
	uint8_t deny = 0;
	struct kvm_msr_filter f = {
		.ranges = {{.flags = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE,
			    .nmsrs = 1,
			    .base = 0x174,
			    .bitmap = &deny}},
	};
	uint64_t bits = 0;

	(void)state;
	f.ranges[0].bitmap = (uint8_t *)&bits;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_ENABLE_CAP, &cap), 0);
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_X86_SET_MSR_FILTER, &f), 0);
	set_vector(&g, 13, 0x2000);
	memcpy(g.ram + 0x2000, "\xe6\x90\xf4", 3); /* out 0x90,al; hlt */
	/* mov ecx,0x174; rdmsr; mov ecx,0x4b564d77; wrmsr; rdmsr; hlt */
	guest_code(&g, 0x66, 0xb9, 0x74, 0x01, 0x00, 0x00, 0x0f, 0x32, 0x66, 0xb9, 0x77, 0x4d, 0x56,
		   0x4b, 0x0f, 0x30, 0x0f, 0x32, 0xf4);
	assert_exit(&g, KVM_EXIT_X86_RDMSR);
	assert_int_equal(g.run->msr.index, 0x174);
	assert_int_equal(g.run->msr.reason, KVM_MSR_EXIT_REASON_FILTER);
	assert_int_equal(g.run->msr.error, 0);
	g.run->msr.data = 0x1111111122222222;
	assert_exit(&g, KVM_EXIT_X86_WRMSR);
	assert_int_equal(g.run->msr.index, 0x4b564d77);
	assert_int_equal(g.run->msr.reason, KVM_MSR_EXIT_REASON_UNKNOWN);
	assert_int_equal(g.run->msr.data, 0x1111111122222222);
	assert_exit(&g, KVM_EXIT_X86_RDMSR);
	g.run->msr.error = 1; /* #GP */
	assert_exit(&g, KVM_EXIT_IO);
	assert_int_equal(g.run->io.port, 0x90);
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(guest_get(&g).rax, 0x22222222);
	assert_int_equal(guest_get(&g).rdx, 0x11111111);
}

static void interrupt_window(void **state)
{
	struct kvm_interrupt irq = {.irq = 0x20};

	(void)state;
	set_vector(&g, 0x20, 0x2000);
	/* cs: mov byte [0x3001],1; out 0x90,al; iret */
	memcpy(g.ram + 0x2000, "\x2e\xc6\x06\x01\x30\x01\xe6\x90\xcf", 9);
	/* out 0x80,al; sti; l: cs: cmp byte [0x3001],0; je l; hlt */
	guest_code(&g, 0xe6, 0x80, 0xfb, 0x2e, 0x80, 0x3e, 0x01, 0x30, 0x00, 0x74, 0xf8, 0xf4);
	g.run->request_interrupt_window = 1;
	assert_exit(&g, KVM_EXIT_IO);
	assert_int_equal(g.run->if_flag, 0);
	assert_int_equal(g.run->ready_for_interrupt_injection, 0);
	assert_exit(&g, KVM_EXIT_IRQ_WINDOW_OPEN);
	assert_int_equal(g.run->if_flag, 1);
	assert_int_equal(g.run->ready_for_interrupt_injection, 1);
	g.run->request_interrupt_window = 0;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_INTERRUPT, &irq), 0);
	assert_exit(&g, KVM_EXIT_IO);
	assert_int_equal(g.run->io.port, 0x90);
	assert_int_equal(g.run->if_flag, 0);
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(g.run->if_flag, 1);
	assert_int_equal(guest_get(&g).rip, CODE + 12);
}

static void nmi(void **state)
{
	(void)state;
	set_vector(&g, 2, 0x2000);
	memcpy(g.ram + 0x2000, "\xe6\x92\xcf", 3);
	guest_code(&g, 0x90, 0xf4);
	assert_int_equal(dev_ioctl(&g.vcpu, KVM_NMI, 0), 0);
	assert_exit(&g, KVM_EXIT_IO);
	assert_int_equal(g.run->io.port, 0x92);
	assert_exit(&g, KVM_EXIT_HLT);
}

/* M4: writes to a registered zone go to the ring. */
static void coalesced_writes(void **state)
{
	struct kvm_coalesced_mmio_ring *ring = (void *)((char *)g.run + 2 * 4096);
	struct kvm_coalesced_mmio_zone z = {.addr = MMIO, .size = 16};

	(void)state;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_REGISTER_COALESCED_MMIO, &z), 0);
	z = (struct kvm_coalesced_mmio_zone){.addr = 0x80, .size = 1, .pio = 1};
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_REGISTER_COALESCED_MMIO, &z), 0);
	/* mov al,7; mov [3],al; out 0x80,al; mov [16],al; hlt */
	guest_code(&g, 0xb0, 0x07, 0xa2, 0x03, 0x00, 0xe6, 0x80, 0xa2, 0x10, 0x00, 0xf4);
	assert_exit(&g, KVM_EXIT_MMIO);
	assert_int_equal(g.run->mmio.phys_addr, MMIO + 16);
	assert_int_equal(ring->first, 0);
	assert_int_equal(ring->last, 2);
	assert_int_equal(ring->coalesced_mmio[0].phys_addr, MMIO + 3);
	assert_int_equal(ring->coalesced_mmio[0].len, 1);
	assert_int_equal(ring->coalesced_mmio[0].data[0], 7);
	assert_int_equal(ring->coalesced_mmio[0].pio, 0);
	assert_int_equal(ring->coalesced_mmio[1].phys_addr, 0x80);
	assert_int_equal(ring->coalesced_mmio[1].pio, 1);
	assert_exit(&g, KVM_EXIT_HLT);
	/* Full: an exit. */
	ring->first = 3;
	guest_code(&g, 0xa2, 0x03, 0x00, 0xf4);
	assert_exit(&g, KVM_EXIT_MMIO);
	assert_int_equal(ring->last, 2);
	assert_exit(&g, KVM_EXIT_HLT);
}

/* M4: a write that an eventfd waits for does not exit. */
static void ioeventfd_writes(void **state)
{
	int fd = eventfd(0, EFD_NONBLOCK), pio = eventfd(0, EFD_NONBLOCK);
	struct kvm_ioeventfd a = {.datamatch = 7,
				  .addr = MMIO + 8,
				  .len = 1,
				  .fd = fd,
				  .flags = KVM_IOEVENTFD_FLAG_DATAMATCH};
	uint64_t n;

	(void)state;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_IOEVENTFD, &a), 0);
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_IOEVENTFD, &a), -EEXIST);
	a = (struct kvm_ioeventfd){
		.addr = 0x80, .len = 1, .fd = pio, .flags = KVM_IOEVENTFD_FLAG_PIO};
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_IOEVENTFD, &a), 0);
	/* mov al,7; mov [8],al; out 0x80,al; inc ax; mov [8],al; hlt */
	guest_code(&g, 0xb0, 0x07, 0xa2, 0x08, 0x00, 0xe6, 0x80, 0x40, 0xa2, 0x08, 0x00, 0xf4);
	assert_exit(&g, KVM_EXIT_MMIO);
	assert_int_equal(g.run->mmio.data[0], 8);
	assert_int_equal(read(fd, &n, 8), 8);
	assert_int_equal(n, 1);
	assert_int_equal(read(pio, &n, 8), 8);
	assert_int_equal(n, 1);
	assert_exit(&g, KVM_EXIT_HLT);
	close(fd);
	close(pio);
}

static void sync_regs_of_a_run(void **state)
{
	(void)state;
	/* in al,0x80; inc ebx; hlt */
	guest_code(&g, 0xe4, 0x80, 0x66, 0x43, 0xf4);
	g.run->kvm_valid_regs = KVM_SYNC_X86_REGS;
	assert_exit(&g, KVM_EXIT_IO);
	g.run->s.regs.regs.rbx = 0x1000;
	g.run->kvm_dirty_regs = KVM_SYNC_X86_REGS;
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(g.run->s.regs.regs.rbx, 0x1001);
	assert_int_equal(g.run->kvm_dirty_regs, 0);
	g.run->kvm_valid_regs = 0;
}

/* ---- threads ----------------------------------------------------------------------- */

static void *run_to_hlt(void *arg)
{
	(void)arg;
	return (void *)(guest_run(&g) ?: (long)g.run->exit_reason);
}

/* Another thread's ioctl waits until KVM_RUN is over. */
static void ioctl_waits_for_run(void **state)
{
	_Atomic uint8_t *flags = (void *)(g.ram + 0x3000);
	pthread_t runner;
	void *r;

	(void)state;
	/* cs: mov byte [0x3000],1; l: cs: cmp byte [0x3001],0; je l; hlt */
	guest_code(&g, 0x2e, 0xc6, 0x06, 0x00, 0x30, 0x01, 0x2e, 0x80, 0x3e, 0x01, 0x30, 0x00, 0x74,
		   0xf8, 0xf4);
	flags[0] = flags[1] = 0;
	assert_int_equal(pthread_create(&runner, NULL, run_to_hlt, NULL), 0);
	while (!flags[0])
		sched_yield();
	/* Let it go some time after the ioctl below has begun to wait, or before: both are right.
	 */
	flags[1] = 1;
	assert_int_equal(guest_get(&g).rip, CODE + 15);
	assert_int_equal(pthread_join(runner, &r), 0);
	assert_int_equal((long)r, KVM_EXIT_HLT);
}

/* S8: a slot that is deleted under a running vCPU turns into MMIO. */
static void slot_deleted_while_running(void **state)
{
	uint8_t *page =
		mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	_Atomic uint8_t *seen = (void *)page;
	pthread_t runner;
	void *r;

	(void)state;
	assert_int_equal(set_slot(&g, 1, 0, MMIO, 4096, page), 0);
	/* l: inc byte [0]; cmp byte [1],0; je l; hlt */
	guest_code(&g, 0xfe, 0x06, 0x00, 0x00, 0x80, 0x3e, 0x01, 0x00, 0x00, 0x74, 0xf5, 0xf4);
	assert_int_equal(pthread_create(&runner, NULL, run_to_hlt, NULL), 0);
	while (!*seen)
		sched_yield();
	assert_int_equal(set_slot(&g, 1, 0, MMIO, 0, page), 0);
	assert_int_equal(pthread_join(runner, &r), 0);
	assert_int_equal((long)r, KVM_EXIT_MMIO);
	assert_int_equal(g.run->mmio.phys_addr & ~1ul, MMIO);
	assert_int_equal(g.run->mmio.is_write, 0);
	munmap(page, 4096);
}

/* ---- signals ----------------------------------------------------------------------- */

static volatile sig_atomic_t handled;

/* As the preload library's: the program's handler does not run inside the engine. */
static void on_signal(int sig, siginfo_t *info, void *uc)
{
	if (kl_engine_active())
		kl_thread_defer_signal(sig, info, uc);
	else
		handled++;
}

static void install_handler(uint64_t signals)
{
	struct sigaction sa = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO};

	if (signals & (1ull << (SIGUSR1 - 1)))
		sigaction(SIGUSR1, &sa, NULL);
}

static pthread_t main_thread;

/* Once the guest runs. */
static void *send_signal(void *arg)
{
	_Atomic uint8_t *running = (void *)(g.ram + 0x3000);

	(void)arg;
	while (!*running)
		sched_yield();
	pthread_kill(main_thread, SIGUSR1);
	return NULL;
}

static void spin_until_signal(void)
{
	pthread_t sender;

	main_thread = pthread_self();
	g.ram[0x3000] = 0;
	/* l: cs: mov byte [0x3000],1; jmp l */
	guest_code(&g, 0x2e, 0xc6, 0x06, 0x00, 0x30, 0x01, 0xeb, 0xf8);
	assert_int_equal(pthread_create(&sender, NULL, send_signal, NULL), 0);
	g.run->exit_reason = 0x66;
	assert_int_equal(guest_run(&g), -EINTR);
	assert_int_equal(g.run->exit_reason, KVM_EXIT_INTR);
	pthread_join(sender, NULL);
}

/* U3: a signal ends KVM_RUN with EINTR. */
static void signal_ends_run(void **state)
{
	(void)state;
	handled = 0;
	install_handler(~0ull);
	for (int i = 1; i <= 5; i++) {
		spin_until_signal();
		assert_int_equal(handled, i);
	}
	signal(SIGUSR1, SIG_DFL);
}

/* U3: under KVM_SET_SIGNAL_MASK, a signal that only KVM_RUN lets through ends it and stays pending.
 */
static void signal_mask(void **state)
{
	struct {
		struct kvm_signal_mask head;
		uint64_t set;
	} __attribute__((packed)) m = {.head.len = 8, .set = 0};
	struct timespec none = {0};
	sigset_t usr1, old, now;

	(void)state;
	kl_thread_on_unblock = install_handler;
	handled = 0;
	sigemptyset(&usr1);
	sigaddset(&usr1, SIGUSR1);
	pthread_sigmask(SIG_BLOCK, &usr1, &old);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_SIGNAL_MASK, &m), 0);
	for (int i = 0; i < 4; i++) {
		if (i & 1) { /* pending before KVM_RUN */
			pthread_kill(pthread_self(), SIGUSR1);
			assert_int_equal(guest_run(&g), -EINTR);
			assert_int_equal(g.run->exit_reason, KVM_EXIT_INTR);
		} else {
			spin_until_signal();
		}
		sigpending(&now);
		assert_true(sigismember(&now, SIGUSR1));
		pthread_sigmask(SIG_SETMASK, NULL, &now);
		assert_true(sigismember(&now, SIGUSR1));
		assert_false(sigismember(&now, SIGUSR2));
		assert_int_equal(sigtimedwait(&usr1, NULL, &none), SIGUSR1);
		assert_int_equal(handled, 0);
	}
	/* No mask again: what is blocked does not end KVM_RUN. */
	assert_int_equal(dev_ioctl(&g.vcpu, KVM_SET_SIGNAL_MASK, 0), 0);
	pthread_kill(pthread_self(), SIGUSR1);
	guest_code(&g, 0xf4);
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(sigtimedwait(&usr1, NULL, &none), SIGUSR1);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	signal(SIGUSR1, SIG_DFL);
	kl_thread_on_unblock = NULL;
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(pio_out),
		T(pio_in_completes_first),
		T(mmio),
		T(scribbled_run),
		T(read_only_slot),
		T(vanished_memory),
		T(fetch_from_nowhere),
		T(emulation_failure_bytes),
		T(triple_fault),
		T(msr_exit),
		T(interrupt_window),
		T(nmi),
		T(coalesced_writes),
		T(ioeventfd_writes),
		T(sync_regs_of_a_run),
		T(ioctl_waits_for_run),
		T(slot_deleted_while_running),
		T(signal_ends_run),
		T(signal_mask),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
