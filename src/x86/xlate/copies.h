/* SPDX-License-Identifier: MIT */
/*
 * What the interpreter reads and writes instead of guest memory while check.c has it execute a
 * block: copies of the lines that the block touches, by page in the host, and which bytes of them
 * it has read and stored. Aliases of a page have one copy.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include <kvmlet/types.h>

#include "base/compiler.h"

/* Two pages for each of two operands; what touches more has no fast form, and is left out. */
#define KL_MAX_COPIES 160

struct kl_copy {
	uint8_t *page;
	uint64_t lines;                /* that are there */
	uint64_t read[64], stored[64]; /* their bytes */
	/* As the interpreter has it. Aligned, as some instructions want their operands. */
	uint8_t now[KL_PAGE_SIZE] KL_CACHELINE;
	uint8_t before[KL_PAGE_SIZE];
	uint8_t seen[KL_PAGE_SIZE]; /* by kl_copies_are_written() */
};

struct kl_copies {
	bool stored; /* anything */
	unsigned nr;
	struct kl_copy copy[KL_MAX_COPIES];
};

/* KL_NOT_THERE: a page has gone, or whoever wants it to go keeps kicking this thread. */
enum kl_looked { KL_ALL_TRUE, KL_SOME_FALSE, KL_NOT_THERE };

/*
 * The copy of [@p, @p + @len), which lies in one page and is to be read or @write. It is made by
 * loads of guest memory, and may so leave by the guard. NULL: there are too many.
 */
uint8_t *kl_copies_lend(struct kl_copies *c, uint8_t *p, unsigned len, bool write);

/* Is what was stored in the copies in memory? */
enum kl_looked kl_copies_same_stored(struct kl_copies *c);
/* Is what was read, and not stored, in memory as it was? */
enum kl_looked kl_copies_same_read(struct kl_copies *c);
/* Does memory change, if one looks for a while, where something was stored? Or it is not there. */
bool kl_copies_are_written(struct kl_copies *c);
/* Memory where something was stored becomes what it was. */
enum kl_looked kl_copies_undo(struct kl_copies *c);
/* Bytes that differ from what was stored, to stderr. */
void kl_copies_print(struct kl_copies *c);
