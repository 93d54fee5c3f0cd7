/* SPDX-License-Identifier: MIT */
/*
 * Native thunks: instructions that only compute are run on the host, with their operands in
 * fixed registers and memory operands in a buffer (VCPU-only data, never guest memory).
 */
#pragma once

#include "x86/decode.h"

/* Where operands go: ModRM.reg, ModRM.rm, VEX.vvvv. With hidden XMM0 the others move up. */
struct kl_thunk_ctx {
	uint8_t mem[128];            /* the memory operand: [rdi] */
	uint8_t x[4][16];            /* 128: xmm0..xmm3 */
	uint64_t rax, rcx, rdx, rsi; /* 192 */
	uint64_t flags;              /* 224 */
	uint32_t mxcsr, host_mxcsr;  /* 232 */
	uint8_t pad[16];
	uint8_t y[2][32]; /* 256: ymm0 and ymm1 as they are after it (ops_avx.c) */
} __attribute__((aligned(64)));

/* Prepare the arena, once per process. Without it kl_thunk_get() finds nothing. */
void kl_thunk_init(void);

/*
 * Code that executes @insn and returns, or NULL (no room, or the host refuses executable
 * memory). Any thread, no locks.
 */
void *kl_thunk_get(const uint8_t *insn, unsigned len);

/* General registers that the fields get in rewritten instructions. */
enum { KL_THUNK_REG = 0 /* rax */, KL_THUNK_RM = 1 /* rcx */, KL_THUNK_VVVV = 6 /* rsi */ };

/*
 * Rewrite the decoded instruction: memory operand [rdi]; general registers as above; with
 * @vectors >= 0, vector registers reg, rm, vvvv and imm8[7:4] become @vectors, +1, +2, +3 (vvvv
 * +0 if it is the destination), else they stay.
 * Returns its length, or 0 if it has a shape that is not handled.
 */
unsigned kl_thunk_rewrite(const struct kl_decode *d, int vectors, uint8_t *out);
