/* SPDX-License-Identifier: MIT */
/*
 * A 32-bit guest that looks to QEMU's kvmvapic like Windows: its code is above 2 GiB, where all memory
 * is mapped too; FS is the processor's control region; the task priority is raised and lowered all the
 * time. QEMU patches the instructions that do so into calls of its option ROM, which uses the vapic
 * page. Says on port 0xe9 whether interrupts came when they should; ends by port 0xf4.
 *
 *   cc -m32 -nostdlib -static -no-pie -Wl,--build-id=none,-Ttext=0x100000
 */
#define HIGH   0x80000000
#define APIC   0xfffe0000 /* linear */
#define TPR    (APIC + 0x80)
#define VECTOR 0x41
#define ROUNDS 2000

	.text
	.code32
	.globl _start
	.p2align 2
	.long 0x1badb002, 0, -0x1badb002 /* multiboot */

_start:
	mov $stack_end, %esp
	/* Memory at 0 and at HIGH, by pages of 4 MiB; the APIC. */
	mov $0x83, %eax
	mov $page_directory, %edi
1:	mov %eax, (%edi)
	mov %eax, (HIGH >> 20)(%edi)
	add $4, %edi
	add $0x400000, %eax
	cmp $(16 * 0x400000 + 0x83), %eax
	jne 1b
	movl $(page_table + 3), page_directory + 4 * 1023
	movl $0xfee00013, page_table + 4 * ((APIC >> 12) & 1023)
	mov %cr4, %eax
	or $0x10, %eax
	mov %eax, %cr4
	mov $page_directory, %eax
	mov %eax, %cr3
	mov %cr0, %eax
	or $0x80010000, %eax
	mov %eax, %cr0

	/* The control region knows its own address, and its processor. */
	mov $control, %eax
	mov %eax, control + 0x1c
	movw %ax, gdt + 24 + 2
	shr $16, %eax
	movb %al, gdt + 24 + 4
	movb %ah, gdt + 24 + 7
	lgdt gdt_pointer
	ljmp $8, $1f
1:	mov $16, %ax
	mov %ax, %ds
	mov %ax, %es
	mov %ax, %ss
	mov $24, %ax
	mov %ax, %fs
	mov $(handler + HIGH), %eax
	movw %ax, idt + 8 * VECTOR
	movw $8, idt + 8 * VECTOR + 2
	movw $0x8e00, idt + 8 * VECTOR + 4
	shr $16, %eax
	movw %ax, idt + 8 * VECTOR + 6
	lidt idt_pointer
	mov $0xff, %al
	out %al, $0x21
	out %al, $0xa1
	mov $(high + HIGH), %eax
	jmp *%eax

high:
	movl $0x1ff, APIC + 0xf0
	sti
	xor %esi, %esi
round:
	mov $'r', %bl
	mov $0x50, %eax
raise:	mov %eax, TPR
	movl $(0x40000 | VECTOR), APIC + 0x300 /* to itself */
	nop
	mov $'e', %bl /* it came early */
	cmp %esi, count
	jne failed
	mov $'h', %bl /* another value is read */
read:	mov TPR, %ecx
	cmp $0x50, %ecx
	jne failed
	mov $'a', %bl /* the APIC's is another one: an instruction that is not patched */
	movzbl TPR, %ecx
	cmp $0x50, %ecx
	jne failed
	inc %esi
	mov $0x30, %eax
lower:	mov %eax, TPR
	mov $'l', %bl /* it did not come */
	cmp %esi, count
	jne failed
	mov $'p', %bl
push:	push TPR
	pop %edx
	cmp $0x30, %edx
	jne failed
	mov $'i', %bl
immediate: movl $0x20, TPR
	mov TPR, %eax
	cmp $0x20, %eax
	jne failed
	cmp $ROUNDS, %esi
	jne round

	/* All of them are calls by now. */
	mov $'n', %bl
	cmpb $0xe8, raise
	jne failed
	cmpb $0xe8, lower
	jne failed
	cmpw $0xe890, read
	jne failed
	cmpb $0xe8, push + 1
	je 1f
	cmpb $0xe8, push
	jne failed
1:	cmpb $0x68, immediate
	jne failed
	mov $right, %esi
	jmp say

failed:
	movb %bl, wrong_at
	mov $wrong, %esi
say:	lodsb
	out %al, $0xe9
	test %al, %al
	jnz say
	mov $0, %al
	out %al, $0xf4
	cli
	hlt

handler:
	incl count
	movl $0, APIC + 0xb0
	iret

	.data
right:	.asciz "tpr: right\n"
wrong:	.ascii "tpr: wrong: "
wrong_at: .asciz "?\n"
count:	.long 0
	.p2align 3
gdt:	.quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00cf93000000ffff
gdt_pointer:
	.word 31
	.long gdt
idt_pointer:
	.word 0x7ff
	.long idt

	.bss
	.p2align 12
page_directory: .skip 4096
page_table: .skip 4096
idt:	.skip 2048
control: .skip 256
	.skip 4096
stack_end:
	.section .note.GNU-stack, "", @progbits
