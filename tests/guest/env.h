/* SPDX-License-Identifier: MIT */
/*
 * A vCPU without a VM: linear addresses are host addresses, but only those of one arena are
 * mapped. What the system half of src/x86 would do is replaced by stubs that record it.
 */
#pragma once

#include "x86/vcpu.h"

#define ENV_ARENA (64u << 10)

struct env {
	struct kl_vcpu *v;
	uint8_t *data;       /* ENV_ARENA bytes, read-write */
	uint8_t *code;       /* ENV_ARENA bytes, executable */
	uint8_t *code_rw;    /* the same, writable */
	int vector;          /* exception that ended the last run, or -1 */
	_Atomic bool failed; /* it ended in an emulation failure */
	_Atomic bool halted; /* it executed HLT; a test may run two vCPUs */
};

extern struct env env;

void env_init(void);
/* Run from v->rip until HLT, an exception or a failure. @step: kl_interp_one once. */
void env_run(bool step);
