/* SPDX-License-Identifier: MIT */
/* Guest MIPS of the interpreter alone; prints, promises nothing. */
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "env.h"

static void loop(const char *name, const void *code, unsigned len)
{
	struct kl_vcpu *v = env.v;
	struct timespec a, b;
	double s;

	memcpy(env.code_rw + 0xc000, code, len); /* another TLB entry than data and stack */
	v->rip = (uint64_t)env.code + 0xc000;
	memset(v->gpr, 0, sizeof(v->gpr));
	v->gpr[KL_RSP] = (uint64_t)env.data + 0x8000;
	v->gpr[KL_RBX] = (uint64_t)env.data;
	v->gpr[KL_RCX] = 20000000;
	v->gpr[KL_RAX] = 88172645463325252ull;
	v->insn_count = 0;
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &a);
	env_run(false);
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &b);
	s = (double)(b.tv_sec - a.tv_sec) + (double)(b.tv_nsec - a.tv_nsec) * 1e-9;
	printf("%-28s %6.0f MIPS%s\n", name, (double)v->insn_count / s / 1e6,
	       env.halted ? "" : " (did not finish)");
}

#define LOOP(name, text)                                                       \
	extern const char name##_code[], name##_end[];                         \
	__asm__(".pushsection .rodata\n" #name "_code:" text "\n\thlt\n" #name \
		"_end:\n.popsection");

LOOP(xorshift, "1: mov %rax, %rdx; shl $13, %rdx; xor %rdx, %rax; mov %rax, %rdx; shr $7, %rdx;"
	       "xor %rdx, %rax; mov %rax, %rdx; shl $17, %rdx; xor %rdx, %rax; dec %rcx; jnz 1b")
LOOP(small, "1: add $3, %rax; cmp $5, %rax; dec %rcx; jnz 1b")
LOOP(memory, "1: mov (%rbx), %rax; add $1, %rax; mov %rax, (%rbx); add %rax, 8(%rbx);"
	     "dec %rcx; jnz 1b")
LOOP(calls, "1: call 2f; dec %rcx; jnz 1b; hlt; 2: push %rbp; mov %rsp, %rbp; pop %rbp; ret")
LOOP(sse, "1: movaps (%rbx), %xmm0; addpd %xmm1, %xmm0; mulsd %xmm2, %xmm0; movaps %xmm0, (%rbx);"
	  "dec %rcx; jnz 1b")

int main(void)
{
	env_init();
#define RUN(name) loop(#name, name##_code, (unsigned)(name##_end - name##_code))
	RUN(xorshift);
	RUN(small);
	RUN(memory);
	RUN(calls);
	RUN(sse);
	return 0;
}
