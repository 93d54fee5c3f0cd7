/* SPDX-License-Identifier: MIT */
/*
 * Random instructions, executed by this processor and by the vCPU: the same state comes out,
 * or the same fault.
 *
 *   isa.c       which instructions take part
 *   generate.c  random encodings
 *   blocks.c    random blocks: instructions in a row, with branches between them
 *   state.c     random registers, and memory operands that lie where they are interesting
 *   guest.c     the vCPU's side: a VM at CPL 3 whose page tables mirror the process's mappings
 *   native.c    the processor's side
 *   compare.c   what must be equal
 *   mmio.c      operands that belong to no slot
 *   main.c      insn-fuzz: batches, worker processes, coverage, replaying
 *   block_main.c  block-fuzz: the same for blocks, each with many states; minimising
 *
 * Guest linear addresses are those of the process; contents and rights are the same on both
 * sides. The vCPU goes first: what it would do outside of the shared memory is not tried
 * natively.
 *
 * Everything about instance N follows from the seed and N's batch: batches begin with the
 * same memory, and are run by any worker.
 */
#pragma once

#include <stdio.h>

#include <Zydis/Zydis.h>

#include "base/compiler.h"
#include "x86/vcpu.h"

/* ---- memory: below 2 GiB, where 32-bit code reaches it ---- */

#define CODE       0x20000000ul /* two pages for code, read-only; nothing behind them */
#define CODE_SIZE  0x2000ul
#define LEAVE      0x20010000ul /* code that jumps to LEAVE + 16 * n ends with exit n; read-only */
#define LEAVE_SIZE 0x1000ul
#define PATCH      0x20020000ul /* two pages for code that writes to itself */
#define PATCH_SIZE 0x2000ul
#define DATA       0x10000000ul
#define DATA_PAGES 8

/* The pages at DATA: each transition between two rights that an operand may cross. */
enum { PAGE_NONE, PAGE_RO, PAGE_RW };
static const uint8_t data_rights[DATA_PAGES] = {
	PAGE_NONE, PAGE_RW, PAGE_RW, PAGE_RO, PAGE_RW, PAGE_NONE, PAGE_RO, PAGE_NONE,
};

/* ---- state ---- */

#define X_SIZE 832 /* XSAVE area, standard layout: x87, SSE, AVX */

struct machine {
	uint64_t gpr[16], rip, rflags, fs_base, gs_base;
	uint64_t pad[4];
	uint8_t x[X_SIZE];
} __attribute__((aligned(64)));
_Static_assert(offsetof(struct machine, x) == 192, "enter.S");

/* How an instance ended. */
#define NO_VECTOR (-1)
struct outcome {
	struct machine m;
	int vector;     /* exception, or NO_VECTOR: it left by LEAVE + 16 * way */
	unsigned way;   /* 1: a branch was taken */
	uint32_t error; /* of an exception that has one */
	uint64_t cr2;   /* #PF */
};

/* Ways out: for 64-bit code; NR_WAYS further on those for 32-bit code. */
enum { WAY_THROUGH, WAY_BRANCH, NR_WAYS };
#define WAY(mode, way) (LEAVE + 16 * ((way) + ((mode) == KL_CODE64 ? 0 : NR_WAYS)))

/* ---- random numbers ---- */

struct rng {
	uint64_t s;
};
KL_INLINE uint64_t rng(struct rng *r)
{
	r->s ^= r->s << 13;
	r->s ^= r->s >> 7;
	r->s ^= r->s << 17;
	return r->s;
}
/* 0 .. n - 1 */
KL_INLINE unsigned pick(struct rng *r, unsigned n)
{
	return (unsigned)((rng(r) >> 32) * n >> 32);
}
KL_INLINE bool chance(struct rng *r, unsigned percent)
{
	return pick(r, 100) < percent;
}
void rng_seed(struct rng *r, uint64_t seed, uint64_t batch);

/* ---- instructions ---- */

#define MAX_INSNS 128

struct insn {
	uint8_t bytes[16];
	uint8_t len;
	bool legal; /* else: what Zydis does not decode */
	ZydisDecodedInstruction in;
	ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT];
};

/* What is executed: one instruction, a straight line, or blocks. */
struct program {
	enum kl_code_mode mode;
	uint64_t at; /* linear address */
	unsigned n, len;
	struct insn insn[MAX_INSNS];
};

/* isa.c */
void isa_init(const struct kl_vcpu *v);
/* CPUID offers the guest the instructions of @set; bit @bit of register @reg (0 EAX ...). */
bool isa_offered(ZydisISASet set);
bool isa_has(uint32_t fn, uint32_t index, unsigned reg, unsigned bit);
bool isa_reserved_bytes(const uint8_t *p, unsigned n);
bool isa_usable(const ZydisDecodedInstruction *in, const ZydisDecodedOperand *op);
uint64_t isa_undefined_flags(ZydisMnemonic m);
bool isa_saves_pointers(ZydisMnemonic m);
bool isa_compares_strings(ZydisMnemonic m); /* CMPS, SCAS */
bool isa_piecewise(const ZydisDecodedInstruction *in);
const ZydisDecoder *isa_decoder(enum kl_code_mode mode);

/* generate.c */
struct template
{
	uint8_t prefix;        /* 0, 66, F2, F3 */
	uint8_t vex;           /* 0: legacy; 1 */
	uint8_t map;           /* 0: one byte, 1: 0F, 2: 0F38, 3: 0F3A */
	uint8_t opcode, modrm; /* as it was found */
	uint8_t w, l;          /* VEX.W or REX.W; VEX.L */
	bool has_modrm;
	uint16_t mnemonic;
};
/* A template of @m, or NULL; of any mnemonic: ZYDIS_MNEMONIC_INVALID. */
const struct template *generate_pick(struct rng *r, enum kl_code_mode mode, ZydisMnemonic m);
/* Its bytes up to ModRM. @rex: R, X and B as in REX. */
unsigned generate_assemble(const struct template *t, uint8_t *p, unsigned rex, unsigned vvvv);
/* The same bytes for both sides. */
void put_code(uint64_t at, const void *bytes, unsigned n);
/* JMP to @way, at @at: 5 bytes. */
unsigned put_jump(uint8_t *p, uint64_t at, uint64_t way);
void fill_random(struct rng *r, uint8_t *p, unsigned n);
void generate_init(void);
void generate_batch(struct rng *r);
void generate(struct rng *r, struct program *p);
/* @fn for every template of 64-bit code with ModRM: its r/m is [RBX], or it takes no operand there.
 */
void generate_each_memory_form(void (*fn)(struct program *p));
/* A mnemonic that must come up in @mode. */
bool generate_expects(enum kl_code_mode mode, ZydisMnemonic m);

/*
 * blocks.c: blocks @number of @seed, without the instructions of @dropped (by their number as they
 * were made), which has MAX_INSNS bits; made_as[] of those that are left.
 */
void blocks_generate(uint64_t seed, uint64_t number, const uint64_t *dropped, struct program *p);
extern uint8_t blocks_made_as[MAX_INSNS];
/* Code into both memories: it may have changed itself. */
void blocks_put(void);
void blocks_state(struct rng *r, const struct program *p, struct machine *m);
/* An instruction of the program begins at @lin. */
bool blocks_has(uint64_t lin);
/* The program is of the kind that writes to itself. */
bool blocks_patch(const struct program *p);

/* state.c */
uint64_t state_value(struct rng *r);
/* Where an operand of @size bytes is to be; where there are several, mostly in the middle. */
uint64_t state_place(struct rng *r, unsigned size, bool alone);
/* False: the parts of some operands are checked one by one, and differently by processors. */
bool state_checks_alignment(const struct insn *i);
void state_random_x(struct rng *r, uint8_t *x, unsigned plain_percent);
void state_init(void);
/* Memory as every batch begins with it; @all: read-only pages, too. */
void state_reset_memory(bool all);
/* Registers for the program, and operands in memory. */
void state_random(struct rng *r, const struct program *p, struct machine *m);

/* guest.c */
void guest_init(void);
struct kl_vcpu *guest_vcpu(void);
/* Host address of guest memory at a linear one of CODE, LEAVE, DATA. */
uint8_t *guest_memory(uint64_t lin);
/*
 * Run from @m to its end, the first @steps instructions one at a time, each decoded on its own.
 * False: emulation failure, that is, the vCPU lacks the instruction.
 */
#define ALL_STEPS UINT64_MAX
bool guest_run(const struct program *p, const struct machine *m, uint64_t steps, struct outcome *o);
/* Blocks that the vCPU has translated since this was asked last. */
uint64_t guest_translations(void);
/* Trust in code at PATCH as if it had never changed: the vCPU asks later each time that it does. */
void guest_new_patch(void);
/* Called before each step. False: stop, the outcome is STOPPED. */
extern bool (*guest_watch)(const struct kl_vcpu *v);
#define STOPPED 512

/*
 * A page that belongs to no slot, for the guest only; nothing is compared with the processor from
 * then on. What the instruction comes to with an operand there.
 */
void guest_map_mmio(void);
#define MMIO (DATA + DATA_PAGES * KL_PAGE_SIZE)
enum mmio { MMIO_EXIT, MMIO_FAILURE, MMIO_NEITHER };
enum mmio guest_run_mmio(const struct program *p, const struct machine *m);

/* mmio.c: true if all forms do what KVM's emulator does with them. */
bool mmio_check(void);

/* native.c */
void native_init(void);
uint8_t *native_memory(uint64_t lin); /* writable, if CODE, LEAVE or a page that may be written */
bool native_has(uint64_t lin);        /* something of the process is there that is not ours */
void native_run(const struct program *p, const struct machine *m, struct outcome *o);
extern uint64_t native_features; /* XSAVE components that are loaded and compared */

/* compare.c */
/* Describes the differences to @out, if it is given. */
bool compare(const struct program *p, const struct outcome *guest, const struct outcome *native,
	     FILE *out);
bool compare_memory(bool patch, FILE *out); /* @patch: code that writes itself, too */
void compare_resync(void);                  /* guest memory := native memory */
void print_program(const struct program *p, FILE *out);
void print_machine(const struct machine *m, FILE *out);
