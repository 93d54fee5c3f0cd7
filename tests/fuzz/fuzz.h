/* SPDX-License-Identifier: MIT */
/*
 * What the files of guest-fuzz share.
 *
 * Low memory (slot 0) of every VM:
 *   0x1000 GDT   0x2000 IDT (real mode: IVT at 0)   0x3000 TSS   0x5000 LDT
 *   0x10000 page tables   0x20000 code   0x40000 data and stacks
 */
#pragma once

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "../random.h"

#define PAGE      4096u
#define LOW_SIZE  0x100000u
#define GDT       0x1000u
#define GDT_LIMIT 0x1ffu
#define IDT       0x2000u
#define TSS       0x3000u
#define LDT       0x5000u
#define TABLES    0x10000u
#define NTABLES   16u
#define CODE      0x20000u
#define CODE_SIZE 0x10000u
#define DATA      0x40000u
#define DATA_SIZE 0x40000u

#define MAX_VCPUS 3
#define MAX_SLOTS 8

/* Segments that the tables always have; the rest of the GDT and the LDT is random. */
#define SEL_CODE   0x08u
#define SEL_DATA   0x10u
#define SEL_CODE64 0x18u
#define SEL_CODE16 0x20u
#define SEL_DATA16 0x28u
#define SEL_UCODE  0x30u
#define SEL_UDATA  0x38u
#define SEL_UCODE6 0x40u
#define SEL_TSS    0x50u
#define SEL_LDT    0x60u

enum mode { REAL, PROT16, PROT32, VM86, PAGED32, PAE32, LONG64, COMPAT32, COMPAT16, LA57, NMODES };

struct slot {
	struct kvm_userspace_memory_region r;
	uint8_t *host;   /* what the guest sees */
	uint8_t *map;    /* that with its canaries */
	uint8_t *before; /* read-only slots: what must still be there */
	bool holes;      /* some pages of it are not accessible in the host */
};

struct vcpu {
	int fd;
	struct vm *vm;
	struct kvm_run *run;
	uint64_t rng;
	bool garbage; /* kvm_run has values that KVM_RUN may refuse */
	const char *problem;
	uint64_t detail;
};

struct vm {
	int fd;
	unsigned nvcpus, nslots;
	bool irqchip, fault_ok;
	struct vcpu vcpus[MAX_VCPUS];
	struct slot slots[MAX_SLOTS];
	uint8_t *low;
};

extern const char *const mode_names[NMODES];

static inline uint64_t rnd(uint64_t *s)
{
	return random_next(s);
}

static inline uint64_t below(uint64_t *s, uint64_t n)
{
	return rnd(s) % n;
}

/* Once in @n times. */
static inline bool once_in(uint64_t *s, unsigned n)
{
	return !below(s, n);
}

static inline void fill_random(uint64_t *s, void *at, size_t n)
{
	for (uint8_t *p = at; n; n -= n < 8 ? n : 8, p += 8) {
		uint64_t r = rnd(s);

		memcpy(p, &r, n < 8 ? n : 8);
	}
}

/* code.c */
void code_init(void);
void make_code(uint64_t *rng, uint8_t *at, unsigned size, enum mode mode);

/* state.c */
/* An address that has some meaning in @vm, or none at all. */
uint64_t some_address(struct vm *vm, uint64_t *rng);
void make_memory(struct vm *vm, uint64_t *rng, enum mode mode);
void make_state(struct vm *vm, struct vcpu *v, enum mode mode);
/* Ioctls with whatever arguments; they may refuse them. */
void disturb(struct vm *vm, struct vcpu *v);
