/* SPDX-License-Identifier: MIT */
/*
 * What the files of the stress test share. It is a plain KVM program: it knows nothing of
 * kvmlet, and runs on a real /dev/kvm as well, as a check of itself.
 *
 * Places are host memory at fixed addresses, behind slots that come and go in windows of guest
 * memory. Mutator threads change places and slots; vCPUs read and write windows. Every word
 * that a guest can see says who put it there:
 *
 *     63     62..24                23..0
 *     0      serial of the fill    increments by guests since      (X and R words)
 *     1      who stored it, and when                                (S word)
 *
 * A zeroed page has serial 0. Every change of a window, of a page of a place, or of a page of a
 * file is an event in a small history, between two ticks of one clock. The guest reads the
 * clock before and after each access, in memory, so that what it may see is known exactly.
 */
#pragma once

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#define PAGE      4096u
#define MAX_VMS   8
#define MAX_VCPUS 8 /* of a VM */
#define NSMALL    24
#define NBIG      2
#define NPLACES   (NSMALL + NBIG)
#define SMALL     16u  /* pages */
#define BIG       512u /* pages */
#define NFILES    6    /* 0: never discarded; the last two: System V segments */
#define FIRST_SHM (NFILES - 2)
#define NWIN      10 /* of a VM: 8 small ones, a big one, one for the heap */
#define WIN_BIG   8
#define WIN_HEAP  9
#define HIST      12

/* Offsets in a page: never stored to by guests; incremented by them; stored to by them. */
#define R_WORD 0x7f8u
#define X_WORD 0x000u
#define S_WORD 0xff8u

#define SERIAL(v)    ((v) >> 24)
#define COUNT(v)     ((v)&0xffffff)
#define STORED       (1ull << 63)
#define STORE_CLOCK  ((1ull << 40) - 1)
#define MMIO_SERIAL  0x3ddddddddeull
#define FIRST_SERIAL 0x1000ull

enum kind {
	AWAY, /* a page of a place: nothing is mapped; of a window: no slot */
	ANON,
	FILE_PAGE, /* of a place: see the file's page */
	SLOT,      /* of a window */
	FOREIGN,   /* heap that was freed: whatever is there now */
};

struct state {
	uint64_t serial; /* of the last fill; 0: zero */
	uint32_t inst;   /* which mapping: no two share it */
	uint16_t file, page;
	uint8_t kind;
	uint8_t prot;    /* PROT_READ | PROT_WRITE */
	bool maybe_zero; /* MADV_FREE */
	bool ro;         /* a read-only slot */
	int16_t place;   /* a slot's; -1: heap */
	uint16_t first, n;
};

struct event {
	uint64_t begin, end; /* end 0: not over */
	struct state s;
	const char *what;
};

/* Newest at n - 1; ring of HIST. */
struct hist {
	unsigned n;
	struct event e[HIST];
};

struct place {
	pthread_mutex_t op;   /* held by who changes it */
	pthread_mutex_t lock; /* of the histories */
	uint8_t *base;
	unsigned npages;
	_Atomic int users; /* slots that may lie on it */
	_Atomic bool closed;
	struct hist *h;
};

struct file {
	pthread_mutex_t op;
	pthread_mutex_t lock;
	int fd; /* or a segment's id */
	bool shm;
	uint8_t *alias; /* the whole file */
	struct hist h[SMALL];
};

struct vcpu;

struct vm {
	int fd, id;
	pthread_mutex_t slots; /* held by who changes them */
	pthread_mutex_t lock;  /* of the histories */
	struct hist win[NWIN];
	uint8_t *stable;
	unsigned nvcpus;
	struct vcpu *vcpus;
};

struct cmd {
	uint64_t addr, op, value, unused;
};
struct record {
	uint64_t before, value, after, unused;
};
enum op { OP_READ, OP_XADD, OP_STORE, OP_MOVS };
#define BATCH 192

struct vcpu {
	struct vm *vm;
	unsigned id;
	int fd;
	struct kvm_run *run;
	size_t run_size;
	pthread_t thread;
	uint64_t rng;
	struct cmd *cmds;
	struct record *records;
	uint8_t skipped[BATCH]; /* an EFAULT was given up on, or a device answered */
	uint64_t xadds[SMALL];  /* on file 0 */
	bool masked, early_signals;
};

struct options {
	uint64_t seed;
	unsigned seconds, rounds, vms, vcpus, mutators, ops, limit;
	const char *only;
	bool asan, tsan, verbose;
	bool real; /* a KVM that takes memory that is not there for a device */
};

struct counters {
	_Atomic uint64_t reads, unknown, efaults, mmios, eintrs, slot_ops, place_ops, quarantines;
};

extern struct options opt;
extern struct counters counters;
extern struct place places[NPLACES];
extern struct file files[NFILES];
extern struct vm vms[MAX_VMS];
extern int kvm_fd;
extern _Atomic bool stop;
extern _Atomic uint64_t *the_clock;

/* ---- model.c ---- */
uint64_t tick(void);
uint64_t now(void);
uint64_t new_serial(void);
uint32_t new_inst(void);
void hist_reset(struct hist *h, struct state s);
struct state hist_last(const struct hist *h);
/* The change is about to be made; and it has been made. Context: the histories' lock. */
void hist_begin(struct hist *h, struct state s, uint64_t at, const char *what);
void hist_end(struct hist *h, uint64_t at);
/* The change was not made after all. */
void hist_cancel(struct hist *h);
void check_record(struct vcpu *v, unsigned i);
void check_efault(struct vcpu *v, const struct cmd *c, uint64_t before);
void check_mmio(struct vcpu *v, uint64_t gpa, bool write, uint64_t before);
void check_xadds(void);
void fill(void *page, uint64_t serial);
__attribute__((noreturn, format(printf, 1, 2))) void fail(const char *fmt, ...);
#define NEED(c)                                                        \
	do {                                                           \
		if (!(c))                                              \
			fail("%s:%d: %s: %m", __FILE__, __LINE__, #c); \
	} while (0)

/* ---- guest.c ---- */
void vm_create(struct vm *vm, unsigned id, uint64_t seed);
void vm_destroy(struct vm *vm);
void *vcpu_thread(void *arg);
uint64_t win_gpa(unsigned win);
unsigned win_pages(unsigned win);
bool gpa_to_win(uint64_t gpa, unsigned *win, unsigned *page);
int set_slot(int fd, unsigned slot, unsigned flags, uint64_t gpa, uint64_t size, const void *hva);

/* ---- places.c ---- */
void places_init(uint64_t seed);
void files_init(void);
void places_free(void);
void place_op(uint64_t *rng);
/* After a slot on it was deleted: if there is no other, its memory is nobody's but ours. */
void quarantine(int place, uint64_t *rng);

/* ---- slots.c ---- */
void slots_init(struct vm *vm, uint64_t *rng);
void slot_op(uint64_t *rng);
void heap_op(uint64_t *rng);
void heap_free(void);

/* ---- mem-stress.c ---- */
/* Is this one of the operations that --only asks for? */
bool wanted(const char *name);
/* Progress of the calling thread, and what it does, for the watchdog. */
void at(const char *what);

static inline uint64_t rnd(uint64_t *s)
{
	*s ^= *s << 13;
	*s ^= *s >> 7;
	*s ^= *s << 17;
	return *s * 0x2545f4914f6cdd1dull >> 16;
}
static inline unsigned below(uint64_t *s, unsigned n)
{
	return (unsigned)(rnd(s) % n);
}
static inline uint64_t peek(const void *p)
{
	return __atomic_load_n((const uint64_t *)p, __ATOMIC_RELAXED);
}
static inline void poke(void *p, uint64_t v)
{
	__atomic_store_n((uint64_t *)p, v, __ATOMIC_RELAXED);
}
