/* SPDX-License-Identifier: MIT */
/* Run code natively with all registers from a struct native_ctx, and save them after it. */
	.text
	.globl native_enter, native_exit
/* void native_enter(struct native_ctx *ctx, const void *code) */
native_enter:
	push %rbx
	push %rbp
	push %r12
	push %r13
	push %r14
	push %r15
	mov %rdi, native_current(%rip)
	mov %rsi, native_target(%rip)
	mov %rsp, 144(%rdi)
	cmpb $0, native_avx(%rip)
	je 1f
	mov $7, %eax
	xor %edx, %edx
	xrstor64 192(%rdi)
	jmp 2f
1:	fxrstor64 192(%rdi)
2:	push 128(%rdi)
	popfq
	mov 0(%rdi), %rax
	mov 8(%rdi), %rcx
	mov 16(%rdi), %rdx
	mov 24(%rdi), %rbx
	mov 32(%rdi), %rsp
	mov 40(%rdi), %rbp
	mov 48(%rdi), %rsi
	mov 64(%rdi), %r8
	mov 72(%rdi), %r9
	mov 80(%rdi), %r10
	mov 88(%rdi), %r11
	mov 96(%rdi), %r12
	mov 104(%rdi), %r13
	mov 112(%rdi), %r14
	mov 120(%rdi), %r15
	mov 56(%rdi), %rdi
	jmp *native_target(%rip)

native_exit:
	mov %rdi, native_save(%rip)
	mov native_current(%rip), %rdi
	mov %rax, 0(%rdi)
	mov %rcx, 8(%rdi)
	mov %rdx, 16(%rdi)
	mov %rbx, 24(%rdi)
	mov %rsp, 32(%rdi)
	mov %rbp, 40(%rdi)
	mov %rsi, 48(%rdi)
	mov %r8, 64(%rdi)
	mov %r9, 72(%rdi)
	mov %r10, 80(%rdi)
	mov %r11, 88(%rdi)
	mov %r12, 96(%rdi)
	mov %r13, 104(%rdi)
	mov %r14, 112(%rdi)
	mov %r15, 120(%rdi)
	mov native_save(%rip), %rax
	mov %rax, 56(%rdi)
	mov 144(%rdi), %rsp
	pushfq
	pop 128(%rdi)
	cld
	cmpb $0, native_avx(%rip)
	je 1f
	mov $7, %eax
	xor %edx, %edx
	xsave64 192(%rdi)
	vzeroupper
	jmp 2f
1:	fxsave64 192(%rdi)
2:	fninit
	ldmxcsr native_mxcsr(%rip)
	pop %r15
	pop %r14
	pop %r13
	pop %r12
	pop %rbp
	pop %rbx
	ret

	.data
	.globl native_avx
	.balign 8
native_avx:	.quad 0
native_mxcsr:	.long 0x1f80
	.balign 8
native_current:	.quad 0
native_target:	.quad 0
native_save:	.quad 0
	.section .note.GNU-stack,"",@progbits
