/* SPDX-License-Identifier: MIT */
/*
 * Segment loads and far transfers as the architecture manuals describe them, in the order in
 * which they check: the reference of test_x86_transfer.c. 32-bit protected mode and 64-bit
 * mode; no task switches, no virtual-8086 mode.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

struct ref_env {
	bool wide; /* 64-bit mode; else 32-bit protected mode */
	unsigned cpl;
	uint64_t gdt[64]; /* limit: all of it */
	uint16_t ss0;     /* stack of ring 0 in the TSS */
	uint64_t sp0;
	uint64_t ist1;
	uint64_t gate[2]; /* of the vector that INT uses; 64-bit mode: both */
	uint64_t rsp;
};

enum ref_insn {
	REF_MOV_DS,
	REF_MOV_SS,
	REF_LLDT,
	REF_LTR,
	REF_JMP,
	REF_CALL,
	REF_RETF,
	REF_IRET,
	REF_INT,
	REF_NR_INSNS
};

/* What the instruction is given. */
struct ref_operands {
	uint16_t sel;
	uint64_t offset;
	/* RETF and IRET: what else lies on the stack */
	uint16_t ss;
	uint64_t sp;
	uint64_t flags;
	unsigned vector; /* INT */
};

struct ref_outcome {
	int vector; /* -1: done */
	uint32_t error;
	/* Done: */
	uint16_t cs; /* 0: unchanged */
	unsigned cpl;
	uint64_t rip;
	bool stack_switched; /* to ss:sp, before what is pushed */
	uint16_t ss;
	uint64_t sp;
	uint64_t accessed; /* bit n: descriptor n was marked accessed, or busy */
};

struct ref_outcome ref_execute(const struct ref_env *e, enum ref_insn insn,
			       const struct ref_operands *o);
