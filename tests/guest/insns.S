/* SPDX-License-Identifier: MIT */
/*
 * Instruction forms under test. Registers hold random values, except: rbx, rsi, rdi, rbp and
 * rsp point into the data arena, 16-byte aligned; r9 is a small number, maybe negative; with
 * attribute REP, rcx is small. Each entry: address, length, attributes.
 */
#define REP   1 /* small rcx */
#define ALIGN 2 /* may fault: compare the vector only */
#define PURE  4 /* also for random sequences: registers and flags only */

	.macro T attr:req, insn:req
	.pushsection .rodata.insns, "a"
771:	\insn
772:	.popsection
	.pushsection .data.rel.ro.insn_table, "aw"
	.quad 771b
	.short 772b - 771b, \attr
	.long 0
	.popsection
	.endm

	.pushsection .data.rel.ro.insn_table, "aw"
	.globl insn_table, insn_table_end
	.balign 8
insn_table:
	.popsection

	/* Two operands, all sizes and forms. */
	.irp op, add, or, adc, sbb, and, sub, xor, cmp
	T PURE, "\op\()b %dl, %al"
	T PURE, "\op\()b %ah, %ch"
	T PURE, "\op\()b %r10b, %r8b"
	T PURE, "\op\()w %dx, %ax"
	T PURE, "\op\()l %edx, %eax"
	T PURE, "\op\()q %r10, %r11"
	T PURE, "\op\()l %eax, %eax"
	T PURE, "\op\()b $0x85, %al"
	T PURE, "\op\()b $0x7f, %r12b"
	T PURE, "\op\()w $0x1234, %ax"
	T PURE, "\op\()w $-3, %dx"
	T PURE, "\op\()l $0x89abcdef, %eax"
	T PURE, "\op\()l $-1, %r13d"
	T PURE, "\op\()q $-0x76543210, %r14"
	T PURE, "\op\()q $1, %rax"
	T 0, "\op\()b 3(%rbx), %dh"
	T 0, "\op\()w 5(%rbx,%r9,2), %dx"
	T 0, "\op\()l (%rsi,%r9,4), %r15d"
	T 0, "\op\()q -9(%rdi,%r9,8), %rax"
	T 0, "\op\()q (%ebx), %rax"
	T 0, "\op\()b %ah, (%rbx)"
	T 0, "\op\()w %ax, 0x30(%rbp)"
	T 0, "\op\()l %r8d, 0x7d(%rsp)"
	T 0, "\op\()q %rcx, 1(%rbx,%r9,1)"
	T 0, "\op\()b $0x80, 2(%rbx)"
	T 0, "\op\()w $0x7fff, 2(%rbx)"
	T 0, "\op\()l $-128, 2(%rbx)"
	T 0, "\op\()q $0x7fffffff, 2(%rbx)"
	.endr
	.irp op, add, or, adc, sbb, and, sub, xor
	T 0, "lock \op\()b %cl, 1(%rbx)"
	T 0, "lock \op\()w %cx, 2(%rbx)"
	T 0, "lock \op\()l %ecx, 4(%rbx)"
	T 0, "lock \op\()q %rcx, 8(%rbx)"
	T 0, "lock \op\()l $0x12345678, (%rbx,%r9,4)"
	T 0, "lock \op\()q $-2, (%rbx)"
	.endr
	T PURE, "testb %al, %dl"
	T PURE, "testw %ax, %dx"
	T PURE, "testl %eax, %edx"
	T PURE, "testq %r8, %r8"
	T PURE, "testb $0x81, %al"
	T PURE, "testl $0x80000001, %ecx"
	T 0, "testq $-5, (%rbx)"
	T 0, "testb %ah, 7(%rbx)"
	.irp op, inc, dec, neg, not
	T PURE, "\op\()b %al"
	T PURE, "\op\()b %bh"
	T PURE, "\op\()w %cx"
	T PURE, "\op\()l %edx"
	T PURE, "\op\()q %r12"
	T 0, "\op\()b 1(%rbx)"
	T 0, "\op\()w 2(%rbx)"
	T 0, "\op\()l 4(%rbx)"
	T 0, "\op\()q 8(%rbx)"
	T 0, "lock \op\()b 1(%rbx)"
	T 0, "lock \op\()w 2(%rbx)"
	T 0, "lock \op\()l 4(%rbx)"
	T 0, "lock \op\()q 8(%rbx)"
	.endr

	/* Shifts. */
	.irp op, rol, ror, rcl, rcr, shl, shr, sar
	T PURE, "\op\()b %al"
	T PURE, "\op\()w %dx"
	T PURE, "\op\()l %eax"
	T PURE, "\op\()q %r8"
	.irp n, 0, 1, 2, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63
	T PURE, "\op\()b $\n, %dl"
	T PURE, "\op\()w $\n, %ax"
	T PURE, "\op\()l $\n, %edx"
	T PURE, "\op\()q $\n, %r10"
	.endr
	T PURE, "\op\()b %cl, %ah"
	T PURE, "\op\()w %cl, %dx"
	T PURE, "\op\()l %cl, %eax"
	T PURE, "\op\()q %cl, %r11"
	T PURE, "\op\()l %cl, %ecx"
	T 0, "\op\()b $3, (%rbx)"
	T 0, "\op\()w %cl, (%rbx)"
	T 0, "\op\()l (%rbx)"
	T 0, "\op\()q %cl, 3(%rbx)"
	.endr
	.irp op, shld, shrd
	.irp n, 0, 1, 5, 15, 16, 17, 31, 40
	T PURE, "\op\()w $\n, %dx, %ax"
	T PURE, "\op\()l $\n, %edx, %eax"
	T PURE, "\op\()q $\n, %r8, %rax"
	.endr
	T PURE, "\op\()w %cl, %dx, %ax"
	T PURE, "\op\()l %cl, %edx, %eax"
	T PURE, "\op\()q %cl, %rdx, %r15"
	T 0, "\op\()l $7, %edx, (%rbx)"
	T 0, "\op\()q %cl, %rdx, (%rbx)"
	T 0, "\op\()w %cl, %dx, (%rbx)"
	.endr

	/* Multiplication, division. */
	.irp op, mul, imul, div, idiv
	T 0, "\op\()b %dl"
	T 0, "\op\()b %ah"
	T 0, "\op\()w %cx"
	T 0, "\op\()l %r10d"
	T 0, "\op\()q %r11"
	T 0, "\op\()b (%rbx)"
	T 0, "\op\()w 2(%rbx)"
	T 0, "\op\()l 4(%rbx)"
	T 0, "\op\()q 8(%rbx)"
	.endr
	T PURE, "imulw %dx, %ax"
	T PURE, "imull %edx, %eax"
	T PURE, "imulq %r8, %rax"
	T 0, "imull (%rbx), %eax"
	T 0, "imulq (%rbx), %r10"
	T PURE, "imulw $-7, %dx, %ax"
	T PURE, "imull $0x12345, %edx, %r9d"
	T PURE, "imulq $-0x12345, %rdx, %rax"
	T 0, "imulq $100, 8(%rbx), %rax"
	T 0, "imulw $1000, 8(%rbx), %cx"

	/* Moves. */
	T PURE, "movb %dl, %ah"
	T PURE, "movw %dx, %ax"
	T PURE, "movl %edx, %eax"
	T PURE, "movq %r8, %rax"
	T PURE, "movb $5, %dh"
	T PURE, "movw $0x1234, %r8w"
	T PURE, "movl $0x89abcdef, %eax"
	T PURE, "movq $-2, %rax"
	T PURE, "movabsq $0x123456789abcdef0, %r10"
	T 0, "movb (%rbx), %ch"
	T 0, "movw 1(%rbx), %ax"
	T 0, "movl 2(%rbx), %eax"
	T 0, "movq 3(%rbx), %r8"
	T 0, "movb %ch, (%rbx)"
	T 0, "movw %ax, 1(%rbx)"
	T 0, "movl %r8d, 2(%rbx)"
	T 0, "movq %rdx, 3(%rbx,%r9,8)"
	T 0, "movb $1, (%rbx)"
	T 0, "movw $-2, (%rbx)"
	T 0, "movl $0x12345678, (%rbx)"
	T 0, "movq $-0x12345678, (%rbx)"
	T 0, "movabsb 0x10000123, %al"
	T 0, "movabsq 0x10000123, %rax"
	T 0, "movabsl %eax, 0x10000321"
	T 0, "movntil %eax, (%rbx)"
	T 0, "movntiq %rax, 8(%rbx)"
	T PURE, "movzbw %dl, %ax"
	T PURE, "movzbl %dh, %eax"
	T PURE, "movzbq %r8b, %rax"
	T PURE, "movzwl %dx, %eax"
	T PURE, "movzwq %dx, %r9"
	T PURE, "movsbw %dl, %ax"
	T PURE, "movsbl %dh, %eax"
	T PURE, "movsbq %r8b, %rax"
	T PURE, "movswl %dx, %eax"
	T PURE, "movswq %dx, %r9"
	T PURE, "movslq %edx, %rax"
	T 0, "movzbl (%rbx), %eax"
	T 0, "movzwq (%rbx), %rax"
	T 0, "movsbw (%rbx), %ax"
	T 0, "movswl (%rbx), %eax"
	T 0, "movslq (%rbx), %rax"
	T PURE, "leaw (%rdx,%rcx,2), %ax"
	T PURE, "leal 5(%rdx,%rcx,4), %eax"
	T PURE, "leaq -5(%r12,%r13,8), %rax"
	T PURE, "leaq (,%r13,8), %rax"
	T PURE, "leaq 5(%edx,%ecx,2), %rax"
	T PURE, "leaq 0x10(%rip), %rax"
	T PURE, "bswapl %eax"
	T PURE, "bswapq %r12"
	T 0, "movbew (%rbx), %ax"
	T 0, "movbel (%rbx), %eax"
	T 0, "movbeq (%rbx), %rax"
	T 0, "movbew %ax, (%rbx)"
	T 0, "movbel %eax, (%rbx)"
	T 0, "movbeq %rax, (%rbx)"
	T PURE, "cbtw"
	T PURE, "cwtl"
	T PURE, "cltq"
	T PURE, "cwtd"
	T PURE, "cltd"
	T PURE, "cqto"
	T PURE, "lahf"
	T PURE, "sahf"
	T PURE, "clc"
	T PURE, "stc"
	T PURE, "cmc"
	T PURE, "nop"
	T PURE, "nopl (%rax)"
	T PURE, "mfence"
	T PURE, "lfence"
	T PURE, "sfence"
	T 0, "prefetcht0 (%rbx)"
	T 0, "xlat"
	.irp cc, o, no, b, ae, e, ne, be, a, s, ns, p, np, l, ge, le, g
	T PURE, "set\cc %al"
	T PURE, "set\cc %dh"
	T 0, "set\cc (%rbx)"
	T PURE, "cmov\cc\()w %dx, %ax"
	T PURE, "cmov\cc\()l %edx, %eax"
	T PURE, "cmov\cc\()q %r8, %rax"
	T 0, "cmov\cc\()l (%rbx), %ecx"
	T 0, "j\cc 1f; incl %r15d; 1: incl %r14d"
	.endr

	/* Exchanges. */
	T PURE, "xchgb %dl, %ah"
	T PURE, "xchgw %dx, %ax"
	T PURE, "xchgl %edx, %r8d"
	T PURE, "xchgq %rdx, %rax"
	T 0, "xchgb %dl, (%rbx)"
	T 0, "xchgw %dx, 2(%rbx)"
	T 0, "xchgl %edx, 4(%rbx)"
	T 0, "xchgq %rdx, 8(%rbx)"
	.irp lk, lock, nop
	T 0, "\lk; xaddb %dl, (%rbx)"
	T 0, "\lk; xaddw %dx, 2(%rbx)"
	T 0, "\lk; xaddl %edx, 4(%rbx)"
	T 0, "\lk; xaddq %rdx, 8(%rbx)"
	T 0, "\lk; cmpxchgb %dl, (%rbx)"
	T 0, "\lk; cmpxchgw %dx, (%rbx)"
	T 0, "\lk; cmpxchgl %edx, (%rbx)"
	T 0, "\lk; cmpxchgq %rdx, (%rbx)"
	T 0, "\lk; cmpxchg8b (%rbx)"
	T 0, "\lk; cmpxchg16b (%rbx)"
	T 0, "mov (%rbx), %rax; \lk; cmpxchgq %rdx, (%rbx)"
	T 0, "movl (%rbx), %eax; \lk; cmpxchgl %edx, (%rbx)"
	T 0, "movb (%rbx), %al; \lk; cmpxchgb %dh, (%rbx)"
	T 0, "movl (%rbx), %eax; movl 4(%rbx), %edx; \lk; cmpxchg8b (%rbx)"
	T 0, "mov (%rbx), %rax; mov 8(%rbx), %rdx; \lk; cmpxchg16b (%rbx)"
	.endr
	T PURE, "xaddb %dl, %ah"
	T PURE, "xaddw %dx, %ax"
	T PURE, "xaddl %edx, %eax"
	T PURE, "xaddq %rdx, %rdx"
	T PURE, "cmpxchgb %dl, %ch"
	T PURE, "cmpxchgw %dx, %cx"
	T PURE, "cmpxchgl %edx, %ecx"
	T PURE, "cmpxchgq %rdx, %rcx"
	T PURE, "mov %ecx, %eax; cmpxchgl %edx, %ecx"
	T PURE, "mov %cl, %al; cmpxchgb %dh, %cl"

	/* Bits. */
	.irp op, bt, bts, btr, btc
	T PURE, "\op\()w %dx, %ax"
	T PURE, "\op\()l %edx, %eax"
	T PURE, "\op\()q %rdx, %rax"
	T PURE, "\op\()w $19, %ax"
	T PURE, "\op\()l $31, %eax"
	T PURE, "\op\()q $63, %rax"
	T 0, "\op\()w %r9w, (%rbx)"
	T 0, "\op\()l %r9d, 4(%rbx)"
	T 0, "\op\()q %r9, 8(%rbx)"
	T 0, "\op\()w $21, (%rbx)"
	T 0, "\op\()l $35, (%rbx)"
	T 0, "\op\()q $60, (%rbx)"
	.endr
	.irp op, bts, btr, btc
	T 0, "lock \op\()w %r9w, (%rbx)"
	T 0, "lock \op\()l %r9d, (%rbx)"
	T 0, "lock \op\()q %r9, (%rbx)"
	T 0, "lock \op\()l $5, (%rbx)"
	.endr
	.irp op, bsf, bsr, lzcnt, tzcnt, popcnt
	T PURE, "\op\()w %dx, %ax"
	T PURE, "\op\()l %edx, %eax"
	T PURE, "\op\()q %rdx, %rax"
	T PURE, "xorl %edx, %edx; \op\()w %dx, %ax"
	T PURE, "xorl %edx, %edx; \op\()l %edx, %eax"
	T PURE, "xorl %edx, %edx; \op\()q %rdx, %rax"
	T 0, "\op\()l (%rbx), %eax"
	T 0, "\op\()q (%rbx), %rax"
	.endr
	T PURE, "crc32b %dl, %eax"
	T PURE, "crc32w %dx, %eax"
	T PURE, "crc32l %edx, %eax"
	T PURE, "crc32q %rdx, %rax"
	T 0, "crc32q (%rbx), %rax"

	/* Stack and branches. */
	T 0, "push %rax"
	T 0, "push %rsp"
	T 0, "push %r12"
	T 0, "pushw %ax"
	T 0, "push $-5"
	T 0, "push $0x12345678"
	T 0, "pushw $0x1234"
	T 0, "push (%rbx)"
	T 0, "push 8(%rsp)"
	T 0, "pushw (%rbx)"
	T 0, "pop %rax"
	T 0, "pop %rsp"
	T 0, "pop %r12"
	T 0, "popw %dx"
	T 0, "pop (%rbx)"
	T 0, "pop 8(%rsp)"
	T 0, "popw 16(%rsp)"
	T 0, "enter $32, $0"
	T 0, "enter $32, $1"
	T 0, "enter $32, $5"
	T 0, "leave"
	T 0, "mov %rsp, %rbp; push %rax; leave"
	T 0, "call 1f; incl %eax; 1: pop %rax"
	T 0, "lea 1f(%rip), %rax; call *%rax; incl %ecx; 1: pop %rdx"
	T 0, "lea 1f(%rip), %rax; push %rax; ret; incl %ecx; 1: incl %edx"
	T 0, "lea 1f(%rip), %rax; push %rax; ret $24; incl %ecx; 1: incl %edx"
	T 0, "lea 1f(%rip), %rax; mov %rax, (%rbx); jmp *(%rbx); incl %ecx; 1: incl %edx"
	T 0, "lea 1f(%rip), %rax; jmp *%rax; incl %ecx; 1: incl %edx"
	T 0, "jmp 1f; incl %ecx; 1: incl %edx"
	T REP, "incl %ecx; 1: incl %eax; loop 1b"
	T REP, "incl %ecx; 1: decl %eax; loope 1b"
	T REP, "incl %ecx; 1: decl %eax; loopne 1b"
	T REP, "jrcxz 1f; incl %eax; 1: incl %edx"
	T REP, "jecxz 1f; incl %eax; 1: incl %edx"

	/* Strings. */
	.irp sz, b, w, l, q
	T 0, "movs\sz"
	T 0, "stos\sz"
	T 0, "lods\sz"
	T 0, "scas\sz"
	T 0, "cmps\sz"
	T REP, "rep movs\sz"
	T REP, "rep stos\sz"
	T REP, "rep lods\sz"
	T REP, "repe scas\sz"
	T REP, "repne scas\sz"
	T REP, "repe cmps\sz"
	T REP, "repne cmps\sz"
	T REP, "lea 3(%rsi), %rdi; rep movs\sz"
	T REP, "lea 3(%rsi), %rdi; std; rep movs\sz"
	T REP, "lea -3(%rsi), %rdi; rep movs\sz"
	T REP, "mov %rsi, %rdi; repe cmps\sz"
	T REP, "std; rep stos\sz"
	.endr
	T REP, "addr32 rep movsb"
	T REP, "addr32 rep stosl"

	/* SSE: register and memory forms. */
	.macro V op:req, attr=0
	T \attr, "\op %xmm1, %xmm0"
	T \attr, "\op %xmm3, %xmm3"
	T \attr, "\op %xmm15, %xmm9"
	T \attr, "\op 32(%rbx), %xmm2"
	T \attr, "\op (%rsi), %xmm12"
	.endm
	.macro VI op:req, imms:vararg
	.irp i, \imms
	T 0, "\op $\i, %xmm1, %xmm0"
	T 0, "\op $\i, %xmm13, %xmm3"
	T 0, "\op $\i, 16(%rdi), %xmm2"
	.endr
	.endm

	.irp op, add, sub, mul, div, min, max, sqrt
	.irp ty, ps, pd, ss, sd
	V \op\ty
	.endr
	.endr
	.irp op, andps, andpd, andnps, andnpd, orps, orpd, xorps, xorpd, unpckhps, unpckhpd
	V \op
	.endr
	.irp op, unpcklps, unpcklpd, rcpps, rcpss, rsqrtps, rsqrtss, haddps, haddpd, hsubps, hsubpd
	V \op
	.endr
	.irp op, addsubps, addsubpd, movsldup, movshdup, movddup, comiss, comisd, ucomiss, ucomisd
	V \op
	.endr
	.irp op, cvtdq2pd, cvtdq2ps, cvtpd2dq, cvtpd2ps, cvtps2dq, cvtps2pd, cvtsd2ss, cvtss2sd
	V \op
	.endr
	.irp op, cvttpd2dq, cvttps2dq, ptest
	V \op
	.endr
	.irp op, packssdw, packsswb, packuswb, packusdw, paddb, paddw, paddd, paddq, paddsb, paddsw
	V \op
	.endr
	.irp op, paddusb, paddusw, psubb, psubw, psubd, psubq, psubsb, psubsw, psubusb, psubusw
	V \op
	.endr
	.irp op, pand, pandn, por, pxor, pavgb, pavgw, pcmpeqb, pcmpeqw, pcmpeqd, pcmpeqq, pcmpgtb
	V \op
	.endr
	.irp op, pcmpgtw, pcmpgtd, pcmpgtq, pmaddwd, pmaddubsw, pmaxsb, pmaxsw, pmaxsd, pmaxub, pmaxuw
	V \op
	.endr
	.irp op, pmaxud, pminsb, pminsw, pminsd, pminub, pminuw, pminud, pmulhuw, pmulhw, pmullw
	V \op
	.endr
	.irp op, pmulld, pmuldq, pmuludq, pmulhrsw, psadbw, pshufb, psllw, pslld, psllq, psrlw, psrld
	V \op
	.endr
	.irp op, psrlq, psraw, psrad, punpckhbw, punpckhwd, punpckhdq, punpckhqdq, punpcklbw
	V \op
	.endr
	.irp op, punpcklwd, punpckldq, punpcklqdq, phaddw, phaddd, phaddsw, phsubw, phsubd, phsubsw
	V \op
	.endr
	.irp op, psignb, psignw, psignd, pabsb, pabsw, pabsd, phminposuw, pmovsxbw, pmovsxbd, pmovsxbq
	V \op
	.endr
	.irp op, pmovsxwd, pmovsxwq, pmovsxdq, pmovzxbw, pmovzxbd, pmovzxbq, pmovzxwd, pmovzxwq
	V \op
	.endr
	.irp op, pmovzxdq, aesdec, aesdeclast, aesenc, aesenclast, aesimc, sha1msg1, sha1msg2
	V \op
	.endr
	.irp op, sha1nexte, sha256msg1, sha256msg2
	V \op
	.endr
	/* With the hidden XMM0. */
	.irp op, blendvps, blendvpd, pblendvb, sha256rnds2
	T 0, "\op %xmm0, %xmm1, %xmm2"
	T 0, "\op %xmm0, %xmm0, %xmm10"
	T 0, "\op %xmm0, %xmm3, %xmm0"
	T 0, "\op %xmm0, 48(%rbx), %xmm5"
	.endr
	VI shufps, 0, 0x1b, 0xe4
	VI shufpd, 0, 1, 2
	VI cmpps, 0, 1, 3, 6
	VI cmppd, 2, 4, 7
	VI cmpss, 0, 5
	VI cmpsd, 1, 3
	VI pshufd, 0x1b, 0x4e
	VI pshufhw, 0x1b
	VI pshuflw, 0x39
	VI palignr, 3, 20
	VI pblendw, 0x55
	VI blendps, 5
	VI blendpd, 1
	VI dpps, 0xf1, 0x3f
	VI dppd, 0x31
	VI mpsadbw, 1, 6
	VI roundps, 0, 3
	VI roundpd, 1
	VI roundss, 2
	VI roundsd, 4
	VI insertps, 0x1d, 0xc0
	VI pcmpestri, 0, 0x0c, 0x19, 0x44
	VI pcmpestrm, 0x0c, 0x40
	VI pcmpistri, 0, 0x08, 0x3a
	VI pcmpistrm, 0x0d, 0x41
	VI aeskeygenassist, 1, 0x36
	VI pclmulqdq, 0, 1, 0x10, 0x11
	VI sha1rnds4, 0, 3
	.irp op, psllw, pslld, psllq, pslldq, psrlw, psrld, psrlq, psrldq, psraw, psrad
	T 0, "\op $3, %xmm5"
	T 0, "\op $17, %xmm11"
	.endr
	/* Unaligned, aligned and misaligned. */
	.irp op, movups, movupd, movdqu, movaps, movapd, movdqa
	T 0, "\op %xmm4, %xmm7"
	T 0, "\op 16(%rbx), %xmm7"
	T 0, "\op %xmm8, 16(%rbx)"
	T ALIGN, "\op 5(%rbx), %xmm7"
	T ALIGN, "\op %xmm7, 9(%rbx)"
	.endr
	T ALIGN, "addps 8(%rbx), %xmm1"
	T ALIGN, "pxor 1(%rbx), %xmm1"
	T 0, "addsd 3(%rbx), %xmm1"
	T 0, "pcmpistri $0, 3(%rbx), %xmm1"
	T 0, "lddqu 3(%rbx), %xmm1"
	T 0, "movntdqa (%rbx), %xmm1"
	T 0, "movntps %xmm1, (%rbx)"
	T 0, "movntpd %xmm1, (%rbx)"
	T 0, "movntdq %xmm1, (%rbx)"
	.irp op, movhps, movhpd, movlps, movlpd
	T 0, "\op 8(%rbx), %xmm6"
	T 0, "\op %xmm6, 24(%rbx)"
	.endr
	T 0, "movhlps %xmm1, %xmm2"
	T 0, "movlhps %xmm1, %xmm12"
	.irp op, movss, movsd, movq
	T 0, "\op %xmm1, %xmm2"
	T 0, "\op 3(%rbx), %xmm2"
	T 0, "\op %xmm12, 3(%rbx)"
	.endr
	T 0, "movd %eax, %xmm1"
	T 0, "movd %xmm9, %r10d"
	T 0, "movd (%rbx), %xmm1"
	T 0, "movd %xmm1, (%rbx)"
	T 0, "movq %rax, %xmm1"
	T 0, "movq %xmm9, %r10"
	T 0, "maskmovdqu %xmm1, %xmm2"
	.irp op, movmskps, movmskpd, pmovmskb
	T 0, "\op %xmm3, %eax"
	T 0, "\op %xmm13, %r10d"
	.endr
	.irp r, %eax, %r9, %rdx, %r13d
	T 0, "cvtsd2si %xmm1, \r"
	T 0, "cvttsd2si %xmm9, \r"
	T 0, "cvtss2si 8(%rbx), \r"
	T 0, "cvttss2si %xmm1, \r"
	T 0, "cvtsi2sd \r, %xmm2"
	T 0, "cvtsi2ss \r, %xmm12"
	.endr
	T 0, "cvtsi2sdl (%rbx), %xmm2"
	T 0, "cvtsi2ssq (%rbx), %xmm2"
	T 0, "pextrb $5, %xmm1, %eax"
	T 0, "pextrb $5, %xmm1, (%rbx)"
	T 0, "pextrw $5, %xmm9, %eax"
	T 0, "pextrw $5, %xmm1, (%rbx)"
	T 0, "pextrd $1, %xmm1, %r11d"
	T 0, "pextrd $3, %xmm1, (%rbx)"
	T 0, "pextrq $1, %xmm1, %rax"
	T 0, "pextrq $1, %xmm1, (%rbx)"
	T 0, "extractps $2, %xmm1, %eax"
	T 0, "extractps $2, %xmm1, (%rbx)"
	T 0, "pinsrb $5, %eax, %xmm2"
	T 0, "pinsrb $5, (%rbx), %xmm2"
	T 0, "pinsrw $5, %r10d, %xmm2"
	T 0, "pinsrw $5, (%rbx), %xmm2"
	T 0, "pinsrd $2, %eax, %xmm2"
	T 0, "pinsrd $2, (%rbx), %xmm9"
	T 0, "pinsrq $1, %rax, %xmm2"
	T 0, "pinsrq $0, (%rbx), %xmm9"

	/* BMI, ADX. */
	.irp op, andn, mulx, pdep, pext
	T PURE, "\op\()l %ecx, %edx, %eax"
	T PURE, "\op\()q %r8, %r11, %r10"
	T PURE, "\op\()q %rcx, %rax, %rax"
	T 0, "\op\()q (%rbx), %rdx, %rax"
	.endr
	.irp op, bextr, bzhi, sarx, shlx, shrx
	T PURE, "\op\()l %ecx, %edx, %eax"
	T PURE, "\op\()q %r8, %r11, %r10"
	T 0, "\op\()l %ecx, 4(%rbx), %eax"
	.endr
	.irp op, blsi, blsmsk, blsr, adcx, adox
	T PURE, "\op\()l %ecx, %eax"
	T PURE, "\op\()q %r14, %r10"
	T 0, "\op\()q (%rbx), %rcx"
	.endr
	T PURE, "rorx $5, %ecx, %eax"
	T PURE, "rorx $45, %r10, %r11"

	/* x87 and MMX. */
	.irp op, fadd, fsub, fsubr, fmul, fdiv, fdivr
	T 0, "fldl (%rbx); \op\()l 8(%rbx); fstpl 16(%rbx)"
	T 0, "flds (%rbx); \op\()s 8(%rbx); fstps 16(%rbx)"
	T 0, "fldt (%rbx); fldt 16(%rbx); \op %st(1), %st; fstpt 32(%rbx); fstpt 48(%rbx)"
	T 0, "fld1; fldpi; \op\()p"
	.endr
	.irp op, fsqrt, frndint, fabs, fchs, fxam, ftst, fsin, fcos, f2xm1, fsincos, fxtract, fptan
	T 0, "fldl (%rbx); \op"
	T 0, "fldt (%rbx); \op"
	.endr
	.irp op, fscale, fprem, fprem1, fpatan, fyl2x, fyl2xp1, fxch, fcompp, fucompp, fnop, fincstp
	T 0, "fldl (%rbx); fldl 8(%rbx); \op"
	.endr
	.irp op, fcomi, fucomi, fcmovb, fcmove, fcmovbe, fcmovu, fcmovnb, fcmovne, fcmovnbe, fcmovnu
	T 0, "fldl (%rbx); fldl 8(%rbx); \op %st(1), %st"
	.endr
	.irp op, fld1, fldl2t, fldl2e, fldpi, fldlg2, fldln2, fldz, fninit, fnclex, fdecstp
	T 0, "\op"
	.endr
	.irp n, s, l, ll
	T 0, "fild\n (%rbx); fistp\n 8(%rbx)"
	T 0, "fldl (%rbx); fistp\n 8(%rbx)"
	T 0, "fldl (%rbx); fisttp\n 8(%rbx)"
	.endr
	T 0, "fbld (%rbx); fbstp 16(%rbx)"
	T 0, "fldl (%rbx); fstl 16(%rbx); fsts 24(%rbx); ffree %st(0)"
	T 0, "fnstcw (%rbx); fnstsw 8(%rbx); fnstsw %ax"
	T 0, "fldpi; fnstsw %ax; fwait; fnstcw (%rbx)"
	T 0, "movw $0x27f, (%rbx); fldcw (%rbx); fld1; fldpi; fdivrp; fldt 16(%rbx); fstpl 32(%rbx)"
	T 0, "fstp %st(0)"
	.irp op, paddb, pxor, pmullw, punpcklbw, pshufb, packsswb, psadbw, pmuludq, psllw
	T 0, "movq (%rbx), %mm1; movq 8(%rbx), %mm2; \op %mm1, %mm2; movq %mm2, 16(%rbx); emms"
	T 0, "movq (%rbx), %mm1; \op 8(%rbx), %mm1"
	.endr
	T 0, "movd %eax, %mm3; pshufw $0x1b, %mm3, %mm4; pextrw $1, %mm4, %edx; pmovmskb %mm3, %ecx"
	T 0, "movq (%rbx), %mm3; cvtpi2pd %mm3, %xmm9; cvtpi2ps %mm3, %xmm2; movq2dq %mm3, %xmm1"
	T 0, "cvttpd2pi %xmm9, %mm3; cvtps2pi 8(%rbx), %mm4; movdq2q %xmm9, %mm2; movntq %mm2, (%rbx)"
	T 0, "movq (%rbx), %mm3; movq 8(%rbx), %mm4; maskmovq %mm3, %mm4"
	T 0, "movq %rax, %mm3; movq %mm3, %r10"

	.pushsection .data.rel.ro.insn_table, "aw"
insn_table_end:
	.popsection
	.section .note.GNU-stack,"",@progbits
