/* SPDX-License-Identifier: MIT */
/*
 * Native execution: all registers from a struct machine, and back into one, whether the code
 * comes to a way out or to a signal. One thread per process does this.
 */
	.text
/* void native_enter(const struct machine *from, uint64_t code), for 64-bit code */
	.globl native_enter, native_enter32
native_enter:
	lea go64(%rip), %rax
	jmp enter
/* The same for 32-bit code, with the data segments that it needs. */
native_enter32:
	lea go32(%rip), %rax
	mov $0x2b, %ecx
	mov %ecx, %ds
	mov %ecx, %es
enter:
	push %rbx
	push %rbp
	push %r12
	push %r13
	push %r14
	push %r15
	mov %rsi, target(%rip)
	mov %esi, target32(%rip)
	mov %rax, go(%rip)
	rdfsbase %rax
	mov %rax, host_fs(%rip)
	rdgsbase %rax
	mov %rax, host_gs(%rip)
	mov %rsp, host_rsp(%rip)
	mov native_features(%rip), %eax
	mov native_features+4(%rip), %edx
	xrstor64 192(%rdi)
	mov 144(%rdi), %rax
	wrfsbase %rax
	mov 152(%rdi), %rax
	wrgsbase %rax
	mov 0(%rdi), %rax
	mov 8(%rdi), %rcx
	mov 16(%rdi), %rdx
	mov 24(%rdi), %rbx
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
	movb $1, native_running(%rip)
	push 136(%rdi)
	popfq
	mov 32(%rdi), %rsp
	mov 56(%rdi), %rdi
	jmp *go(%rip)
go64:
	jmp *target(%rip)
go32:
	ljmpl *target32(%rip)

/* The ways out. No flag changes on the way to where they are stored. */
	.globl native_way0, native_way1
native_way0:
	movl $0, native_way(%rip)
	jmp leave
native_way1:
	movl $1, native_way(%rip)
leave:
	mov %rax, native_out+0(%rip)
	mov %rcx, native_out+8(%rip)
	mov %rdx, native_out+16(%rip)
	mov %rbx, native_out+24(%rip)
	mov %rsp, native_out+32(%rip)
	mov %rbp, native_out+40(%rip)
	mov %rsi, native_out+48(%rip)
	mov %rdi, native_out+56(%rip)
	mov %r8, native_out+64(%rip)
	mov %r9, native_out+72(%rip)
	mov %r10, native_out+80(%rip)
	mov %r11, native_out+88(%rip)
	mov %r12, native_out+96(%rip)
	mov %r13, native_out+104(%rip)
	mov %r14, native_out+112(%rip)
	mov %r15, native_out+120(%rip)
	mov host_rsp(%rip), %rsp
	pushfq
	push $0x202
	popfq
	pop native_out+136(%rip)
	rdfsbase %rax
	mov %rax, native_out+144(%rip)
	rdgsbase %rax
	mov %rax, native_out+152(%rip)
	mov native_features(%rip), %eax
	mov native_features+4(%rip), %edx
	lea native_out+192(%rip), %rdi
	xsave64 (%rdi)
back:
	movb $0, native_running(%rip)
	mov host_fs(%rip), %rax
	wrfsbase %rax
	mov host_gs(%rip), %rax
	wrgsbase %rax
	xor %eax, %eax
	mov %eax, %ds
	mov %eax, %es
	fninit
	ldmxcsr mxcsr(%rip)
	pop %r15
	pop %r14
	pop %r13
	pop %r12
	pop %rbp
	pop %rbx
	ret

/*
 * Signal handler, with the FS base and AC of the tested code. There is no return from it: the
 * signal is not blocked, and its stack is used from the top again.
 */
	.globl native_signal
native_signal:
	push $0x202
	popfq
	cmpb $0, native_running(%rip)
	je native_crashed
	mov host_fs(%rip), %rax
	rdfsbase %rcx
	mov %rcx, native_out+144(%rip)
	rdgsbase %rcx
	mov %rcx, native_out+152(%rip)
	wrfsbase %rax
	mov host_gs(%rip), %rax
	wrgsbase %rax
	mov host_rsp(%rip), %rsp
	sub $8, %rsp /* aligned for the call */
	mov %rsp, %rbp
	and $-16, %rsp
	call native_fault
	mov host_rsp(%rip), %rsp
	jmp back

	.globl native_restorer
native_restorer:
	mov $15, %eax /* rt_sigreturn; never used */
	syscall

	.data
	.globl native_running, native_out, native_way
	.balign 64
native_out:	.space 192 + 832
target:		.quad 0
go:		.quad 0
target32:	.long 0
		.word 0x23, 0
host_fs:	.quad 0
host_gs:	.quad 0
host_rsp:	.quad 0
native_way:	.long 0
mxcsr:		.long 0x1f80
native_running:	.byte 0
	.section .note.GNU-stack,"",@progbits
