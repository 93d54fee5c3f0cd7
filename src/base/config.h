/* SPDX-License-Identifier: MIT */
/*
 * Process-wide settings. Filled once from the environment by kl_config_init() (the
 * preload constructor or the first library call) before any thread uses them; read-only
 * afterwards.
 *
 *   KVMLET_LOG=FILE     warnings and errors go to FILE (default: stderr, warnings up)
 *   KVMLET_TRACE=FILE   one line per ioctl, exit and memory event
 *   KVMLET_STATS=1      table at exit, on stderr
 *   KVMLET_HEATMAP=FILE picture of what guests write, and a summary at exit, on stderr
 *   KVMLET_PARAMS=kvm.eager_page_split=Y  module parameters that may be set
 *   KVMLET_UFFD_EVENTS=1  brackets from userfaultfd events, too
 *   KVMLET_KEEP_SECCOMP=1  install the program's seccomp filters
 *   KVMLET_ABI=6.18     also what Linux 6.18 has and 6.12 refuses
 *   KVMLET_VCPU=translate  (the default) 64-bit and flat 32-bit guest code that is used often is
 *                       translated (x86/xlate/); translate:N: after N uses, for tests; interp:
 *                       never; check, check:N: translated code is compared with the interpreter;
 *                       a second :N: so many KiB for decoded blocks, for tests
 */
#pragma once

#include <stdbool.h>

struct kl_config {
	const char *log_path;
	const char *trace_path;
	const char *heatmap_path;
	bool stats;
	bool keep_seccomp;
	bool uffd_events;
	bool eager_page_split;
	bool abi_6_18;
	bool translate;
	bool check;               /* and compare */
	unsigned translate_after; /* this many uses; UINT_MAX: as the engine thinks best */
	/* Bytes of a part of the memory for decoded blocks, for translations; 0: the same. */
	unsigned block_part, code_part;
};

extern struct kl_config kl_config;

/* Idempotent; not thread-safe (constructor context). */
void kl_config_init(void);
