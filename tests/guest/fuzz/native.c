/* SPDX-License-Identifier: MIT */
/*
 * The processor's side. Code is written through a second mapping; a fault comes as a signal,
 * whose frame has the whole state, and is left without returning from the handler.
 */
#include <asm/prctl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "fuzz.h"

void native_enter(const struct machine *from, uint64_t code);
void native_enter32(const struct machine *from, uint64_t code);
void native_signal(int, siginfo_t *, void *);
void native_restorer(void);
void native_crashed(int sig, siginfo_t *info, void *uc);
void native_fault(int sig, siginfo_t *info, void *uc);
extern const char native_way0[], native_way1[];
extern struct machine native_out;
extern uint32_t native_way;
extern uint8_t native_running;

uint64_t native_features = 3;
static uint8_t *code_rw, *leave_rw;
static struct outcome *result;
static uint8_t signal_stack[1 << 16] __attribute__((aligned(64)));

static _Noreturn void give_up(const char *what)
{
	perror(what);
	exit(2);
}

/* @size bytes at the fixed address @lin, executable; the result is their writable twin. */
static uint8_t *map_code(uint64_t lin, size_t size)
{
	int fd = (int)syscall(SYS_memfd_create, "insn-fuzz", MFD_CLOEXEC);
	void *rw, *rx;

	if (fd < 0 || ftruncate(fd, (off_t)size))
		give_up("memfd");
	rw = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
	rx = mmap((void *)lin, size, PROT_READ | PROT_EXEC,
		  MAP_SHARED | MAP_FIXED_NOREPLACE | MAP_POPULATE, fd, 0);
	if (rw == MAP_FAILED || rx != (void *)lin)
		give_up("mmap of code");
	close(fd);
	memset(rw, 0xcc, size);
	return rw;
}

/* Memory that programs write themselves. */
static void map_own(uint64_t lin, size_t size, int prot)
{
	uint8_t *p = mmap((void *)lin, size, prot,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE | MAP_POPULATE, -1, 0);

	if (p != (void *)lin)
		give_up("mmap of data");
}

/* Contents of read-only pages are in place: from here on they are read-only. */
static void protect_data(void)
{
	for (unsigned i = 0; i < DATA_PAGES; i++) {
		void *p = (void *)(DATA + i * KL_PAGE_SIZE);

		if (data_rights[i] == PAGE_RW)
			continue;
		if (mprotect(p, KL_PAGE_SIZE, data_rights[i] == PAGE_RO ? PROT_READ : PROT_NONE))
			give_up("mprotect");
	}
}

/* The kernel's own call: no library between the signal and the handler, which has no TLS. */
static void handle(int sig)
{
	struct {
		void (*handler)(int, siginfo_t *, void *);
		unsigned long flags;
		void (*restorer)(void);
		uint64_t mask;
	} sa = {native_signal, SA_SIGINFO | SA_ONSTACK | SA_NODEFER | 0x04000000, native_restorer,
		0};

	if (syscall(SYS_rt_sigaction, sig, &sa, NULL, 8))
		give_up("rt_sigaction");
}

/* JMP to the way out, as code at LEAVE: an absolute address, so that both sides read the same. */
static void put_way(unsigned way, const char *target)
{
	uint8_t *p = leave_rw + 16 * way;

	memcpy(p, "\xff\x25\x02\x00\x00\x00\x0f\x0b", 8); /* jmp *2(%rip); ud2 */
	memcpy(p + 8, &target, 8);
}

/* 32-bit code goes through a far JMP to the 64-bit way. */
static void put_way32(unsigned way)
{
	uint8_t *p = leave_rw + 16 * (NR_WAYS + way);
	uint32_t target = LEAVE + 16 * way;

	p[0] = 0xea;
	memcpy(p + 1, &target, 4);
	memcpy(p + 5, "\x33\x00", 2);
}

void native_init(void)
{
	static const int sigs[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP};
	stack_t ss = {.ss_sp = signal_stack, .ss_size = sizeof(signal_stack)};

	code_rw = map_code(CODE, CODE_SIZE);
	leave_rw = map_code(LEAVE, LEAVE_SIZE);
	put_way(WAY_THROUGH, native_way0);
	put_way(WAY_BRANCH, native_way1);
	put_way32(WAY_THROUGH);
	put_way32(WAY_BRANCH);
	memcpy(guest_memory(CODE), code_rw, CODE_SIZE);
	memcpy(guest_memory(LEAVE), leave_rw, LEAVE_SIZE);
	map_own(DATA, DATA_PAGES * KL_PAGE_SIZE, PROT_READ | PROT_WRITE);
	map_own(PATCH, PATCH_SIZE, PROT_READ | PROT_WRITE | PROT_EXEC);
	state_reset_memory(true);
	protect_data();
	if (sigaltstack(&ss, NULL))
		give_up("sigaltstack");
	for (unsigned i = 0; i < KL_ARRAY_SIZE(sigs); i++)
		handle(sigs[i]);
}

uint8_t *native_memory(uint64_t lin)
{
	if (lin - CODE < CODE_SIZE)
		return code_rw + (lin - CODE);
	if (lin - LEAVE < LEAVE_SIZE)
		return leave_rw + (lin - LEAVE);
	return (uint8_t *)lin;
}

/*
 * The program itself, libraries, stacks and sanitizers' shadows: a position-independent
 * program has nothing of that below 2 GiB.
 */
bool native_has(uint64_t lin)
{
#if defined(__SANITIZE_ADDRESS__) || KL_TSAN
	const uint64_t start = 0x7fff0000;
#else
	const uint64_t start = 0x500000000000;
#endif
	return (lin >= start && lin < 0x800000000000) || lin >= 0xffffffffff600000;
}

/* Called by native_signal, on the host's stack. */
void native_fault(int sig, siginfo_t *info, void *ucp)
{
	static const uint8_t order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
					  REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
					  REG_R12, REG_R13, REG_R14, REG_R15};
	const ucontext_t *uc = ucp;
	const greg_t *g = uc->uc_mcontext.gregs;

	for (unsigned i = 0; i < 16; i++)
		native_out.gpr[i] = (uint64_t)g[order[i]];
	native_out.rip = (uint64_t)g[REG_RIP];
	native_out.rflags = (uint64_t)g[REG_EFL];
	memcpy(native_out.x, uc->uc_mcontext.fpregs, X_SIZE);
	result->vector = (int)g[REG_TRAPNO];
	result->error = (uint32_t)g[REG_ERR];
	result->cr2 = (uint64_t)g[REG_CR2];
}

void native_run(const struct program *p, const struct machine *m, struct outcome *o)
{
	result = o;
	o->vector = NO_VECTOR;
	native_out.rip = 0;
	if (p->mode == KL_CODE64)
		native_enter(m, p->at);
	else
		native_enter32(m, p->at);
	o->m = native_out;
	o->way = native_way;
}
