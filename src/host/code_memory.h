/* SPDX-License-Identifier: MIT */
/*
 * Memory for host code that is made at run time: a memfd mapped twice, so that no address is
 * writable and executable. Not inherited over fork.
 *
 * Context: may sleep; no lock, no malloc.
 */
#pragma once

#include <stddef.h>

#include "base/compiler.h"

struct kl_code_memory {
	uint8_t *rw, *rx; /* the same memory */
};

/* False where the host gives none; then @m is zero. */
bool kl_code_map(struct kl_code_memory *m, const char *name, size_t size) KL_MUST_CHECK;
void kl_code_unmap(struct kl_code_memory *m, size_t size);
