/* SPDX-License-Identifier: MIT */
/*
 * An executable specification of guest memory, sequential and without cleverness: what each public
 * operation may answer, and what it changes. Written from docs/requirements.md (S, N, G, T, F) and
 * the public headers, not from the engine.
 *
 * The world: one VM with private memory, a few guest pages, a pool of host pages and a file. A
 * page's content is its first eight bytes.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#define GUEST_PAGES 8
#define POOL_PAGES  8
#define FILE_PAGES  4
#define NR_SLOTS    3
#define NR_CACHES   3
#define MAX_THREADS 4

enum kind {
#define OP(kind, name, calls) kind,
#include "ops.def"
#undef OP
	NR_KINDS
};

extern const char *const kind_name[NR_KINDS];

struct op {
	enum kind kind;
	unsigned thread; /* who does it: trackers and areas are a thread's own */
	unsigned slot;   /* SET*: the slot; GPC_*: the cache */
	unsigned gfn;
	unsigned n;    /* pages; SET: 0 deletes; GPC_LOCK_MANY: the other cache */
	unsigned page; /* of the pool; SET_GMEM: too */
	unsigned off;  /* page of the file */
	bool flag;     /* SET: read-only; SET_PRIVATE: to private; brackets: may not block */
	unsigned prot; /* PROTECT: 0 nothing, 1 read, 2 all; DIRTY_MODE: flags; SET: 2 logs */
	uint64_t val, want;
};

/* What came of it. */
struct outcome {
	int ret;
	uint64_t val, val2; /* what was read; which host page, or bytes */
	/* Reports of this thread's writes that each thread's tracker had meanwhile. */
	unsigned reports[MAX_THREADS];
};

/* MAYBE where the library may do either. */
enum there { NOT, MAYBE, THERE };

struct oracle {
	struct {
		bool used, ro, gmem, log;
		unsigned gfn, n, page, off;
		enum there dirty[GUEST_PAGES];
	} slot[NR_SLOTS];
	unsigned dirty_mode;
	struct {
		uint64_t val;
		unsigned prot;
	} host[POOL_PAGES];
	struct {
		uint64_t val;
		enum there there; /* memory */
	} file[FILE_PAGES];
	bool private_[GUEST_PAGES];
	unsigned tracked[GUEST_PAGES];
	bool tracker[MAX_THREADS];
	struct {
		bool active, hva;
		unsigned where; /* gfn or page of the pool */
	} cache[NR_CACHES];
	/* Guest pages that the last operation wrote, and that are to be logged before it ends. */
	unsigned nr_written;
	struct written {
		unsigned gfn;
		enum there there;
	} written[2];
};

void oracle_init(struct oracle *o);

/* May @op have come to @out? If so, it has: @o is what it is afterwards. Else @o is unspecified. */
bool oracle_accepts(struct oracle *o, const struct op *op, const struct outcome *out);
/* The write of a moment ago is logged now. */
void oracle_log(struct oracle *o, struct written w);
