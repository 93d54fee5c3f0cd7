/* SPDX-License-Identifier: MIT */
/*
 * A sequence of KVM calls, made from a seed: shared by its generator (call-gen.c) and by the
 * program that carries it out (call-fuzz.c). What is generated depends on the seed and the features
 * alone, never on an answer, so that any call can be left out of a sequence.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MAX_CALLS 40
#define MAX_DATA  2048
#define NR_VMS    2
#define NR_VCPUS  2 /* of each VM */
#define MAX_PATCH 3
#define NR_CAPS   256
#define NR_REGS   18

/* Where a call goes. A wrong one is generated now and then: it must be ENOTTY or the like there. */
enum where { ON_KVM, ON_VM, ON_VCPU };

/* How the argument is made, and what is looked at afterwards. */
enum shape {
	NO_ARG,     /* the argument itself is .value */
	IN,         /* a structure, read */
	OUT,        /* a structure, filled in */
	IN_OUT,     /* both */
	CHANGE,     /* what .get returns, with patches, is set by .cmd */
	MSRS_GET,   /* struct kvm_msrs */
	MSRS_SET,   /* the same */
	CPUID_GET,  /* struct kvm_cpuid2 */
	CPUID_SET,  /* the same */
	ENABLE_CAP, /* struct kvm_enable_cap */
	CHECK_CAP,  /* .value is a capability */
	RUN,        /* KVM_RUN */
	CREATE_VM,
	CREATE_VCPU,
};

/* What of a structure's bytes says nothing (time, padding, host addresses). */
struct span {
	uint16_t from, len;
};

struct form {
	const char *name;
	enum where on;
	enum shape shape;
	unsigned long cmd, get; /* get: CHANGE reads with it */
	uint16_t size;
	uint8_t weight;
	uint8_t cap; /* generated only if both know it; 0: always */
	struct span mask[6];
};

extern const struct form forms[];
extern const unsigned nr_forms;

enum pointer { GOOD, NULL_POINTER, BAD_POINTER, HALF_POINTER };

struct patch {
	uint16_t at;
	uint8_t size; /* 1, 2, 4, 8 */
	enum { PUT, FLIP, ADD } how;
	uint64_t value;
};

struct call {
	const struct form *form;
	unsigned vm, vcpu; /* which */
	enum where on;     /* usually form->on */
	unsigned long cmd; /* usually form->cmd */
	enum pointer ptr;
	uint64_t value;
	unsigned npatches;
	struct patch patch[MAX_PATCH];
	uint16_t ndata;
	uint8_t data[MAX_DATA] __attribute__((aligned(8)));
};

struct sequence {
	unsigned n;
	struct call calls[MAX_CALLS];
};

/* Capabilities that both sides have, one bit each. */
struct features {
	uint64_t caps[NR_CAPS / 64];
};

void generate(struct sequence *s, uint64_t seed, const struct features *f);

/* The usual CPUID of the vCPUs: the same everywhere. Returns the number of entries. */
struct kvm_cpuid_entry2;
unsigned usual_cpuid(struct kvm_cpuid_entry2 *e, unsigned room);
