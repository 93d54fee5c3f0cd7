/* SPDX-License-Identifier: MIT */
/*
 * Every form of insns.S, with random operands and flags, executed by this processor and by
 * the interpreter: registers, flags, memory and vector registers must be equal. Also random
 * straight lines of them, as one block (flags that are not computed because they are dead),
 * and what has no native oracle: prefixes, page crossings, self-modifying code.
 */
#include <cpuid.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <Zydis/Zydis.h>

#include "env.h"
#include "x86/block.h"

enum { ATTR_REP = 1, ATTR_ALIGN = 2, ATTR_PURE = 4 };

struct native_ctx {
	uint64_t gpr[16], flags, unused, host_rsp, pad[5];
	uint8_t fx[512]; /* an XSAVE area: the legacy region, the header, upper halves of ymm */
	uint64_t header[8];
	uint8_t hi[256];
} __attribute__((aligned(64)));
_Static_assert(offsetof(struct native_ctx, fx) == 192, "native.S");
_Static_assert(offsetof(struct native_ctx, host_rsp) == 144, "native.S");

struct insn {
	const uint8_t *bytes;
	uint16_t len, attr;
	uint32_t pad;
};

extern const struct insn insn_table[], insn_table_end[];
void native_enter(struct native_ctx *ctx, const void *code);
extern const char native_exit[];
extern bool native_avx; /* XSAVE and AVX: load and save ymm */

static uint8_t before[ENV_ARENA], wanted[ENV_ARENA];

static uint64_t rng_state = 88172645463325252ull;

static uint64_t rng(void)
{
	rng_state ^= rng_state << 13;
	rng_state ^= rng_state >> 7;
	rng_state ^= rng_state << 17;
	return rng_state;
}

static uint64_t operand(void)
{
	static const uint64_t edge[] = {
		0,
		1,
		2,
		-1ull,
		-2ull,
		0x7f,
		0x80,
		0xff,
		0x7fff,
		0x8000,
		0xffff,
		0x7fffffff,
		0x80000000,
		0xffffffff,
		0x7fffffffffffffff,
		0x8000000000000000,
		0x100000000,
	};
	uint64_t x = rng();

	switch (x >> 60) {
	case 0:
	case 1:
	case 2:
	case 3:
	case 4:
		return edge[(x & 0xffff) % KL_ARRAY_SIZE(edge)];
	case 5:
	case 6:
		return rng() & 0xffff;
	case 7:
		return rng() & 0xffffffff;
	case 8:
		return rng() | 0xffffffff00000000;
	default:
		return rng();
	}
}

/* Vector registers and memory: integers and floating-point values of every kind. */
static void fill_values(uint8_t *p, size_t n)
{
	static const uint64_t fp[] = {
		0x3ff0000000000000, 0xbff8000000000000, 0x7ff0000000000000,
		0x7ff8000000000001, 0x7ff0000000000001, 0x0000000000000001,
		0x3f8000003f000000, 0x7f800000ff800000, 0x7fc000007f800001,
		0x00000001bf800000, 0x41f0000000000000, 0xc1e0000000200000,
		0x4330000000000001, 0x40490fdb3fb504f3, 0,
		0x8000000080000000,
	};

	for (size_t i = 0; i + 8 <= n; i += 8) {
		uint64_t x = rng() & 3 ? operand() : fp[rng() % KL_ARRAY_SIZE(fp)];

		memcpy(p + i, &x, 8);
	}
}

/* The arena's contents: some window of a pool that is made once. */
static void fill_arena(void)
{
	static uint8_t pool[2 * ENV_ARENA];

	if (!pool[0] && !pool[1] && !memcmp(pool, pool + 1, sizeof(pool) - 1))
		fill_values(pool, sizeof(pool));
	memcpy(env.data, pool + (rng() & (ENV_ARENA - 8)), ENV_ARENA);
}

static void random_state(struct native_ctx *c, unsigned attr)
{
	uint16_t fcw = 0x37f;
	uint32_t mxcsr = 0x1f80 | (uint32_t)(rng() & 3) << 13;

	for (unsigned i = 0; i < 16; i++)
		c->gpr[i] = operand();
	c->gpr[KL_RBX] = (uint64_t)env.data + 0x4000 + (rng() & 0xff0);
	c->gpr[KL_RSI] = (uint64_t)env.data + 0x6000 + (rng() & 0xff0);
	c->gpr[KL_RDI] = (uint64_t)env.data + 0x8000 + (rng() & 0xff0);
	c->gpr[KL_RBP] = (uint64_t)env.data + 0xa000 + (rng() & 0xff0);
	c->gpr[KL_RSP] = (uint64_t)env.data + 0xc000 + (rng() & 0xff0);
	c->gpr[KL_R9] = (rng() & 127) - 64;
	if (attr & ATTR_REP)
		c->gpr[KL_RCX] = rng() % 90;
	c->flags = 2 | (rng() & KL_FL_STATUS);
	if ((attr & ATTR_REP) && !(rng() & 3))
		c->flags |= KL_FL_DF;
	memset(c->fx, 0, sizeof(c->fx) + sizeof(c->header) + sizeof(c->hi));
	c->header[0] = 7;
	memcpy(c->fx, &fcw, 2);
	memcpy(c->fx + 24, &mxcsr, 4);
	fill_values(c->fx + 160, 256);
	if (native_avx)
		fill_values(c->hi, 256);
	fill_arena();
	if (!(rng() & 7)) /* something to find for CMPS */
		memcpy(env.data + 0x8000, env.data + 0x6000, 0x1000);
}

static sigjmp_buf native_fault;
static volatile int native_vector;

static void on_signal(int sig, siginfo_t *info, void *uc)
{
	native_vector = sig == SIGFPE   ? (info->si_code == FPE_INTDIV ? KL_EXC_DE : KL_EXC_XM)
			: sig == SIGILL ? KL_EXC_UD
					: KL_EXC_GP;
	siglongjmp(native_fault, 1);
}

/* cmocka has its own handlers while a test runs. */
static void catch_signals(void)
{
	static uint8_t stack[65536];
	static const int sigs[] = {SIGFPE, SIGILL, SIGSEGV, SIGBUS};
	stack_t ss = {.ss_sp = stack, .ss_size = sizeof(stack)};
	struct sigaction sa = {
		.sa_sigaction = on_signal,
		.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK,
	};

	sigaltstack(&ss, NULL);
	for (unsigned i = 0; i < KL_ARRAY_SIZE(sigs); i++)
		sigaction(sigs[i], &sa, NULL);
}

/* Place code at @at in the code arena, run it natively. Vector or -1. */
static int run_native(struct native_ctx *c, const uint8_t *code, unsigned len, unsigned at)
{
	static const uint8_t leave[6] = {0xff, 0x25}; /* jmp *0(%rip) */
	const char *target = native_exit;
	uint8_t *p = env.code_rw + at;

	memcpy(p, code, len);
	memcpy(p + len, leave, 6);
	memcpy(p + len + 6, &target, 8);
	native_vector = -1;
	if (sigsetjmp(native_fault, 1) == 0)
		native_enter(c, env.code + at);
	else
		__asm__ volatile("cld; fninit");
	return native_vector;
}

static void load(const struct native_ctx *c, unsigned at)
{
	struct kl_vcpu *v = env.v;

	memcpy(v->gpr, c->gpr, sizeof(v->gpr));
	v->rip = (uint64_t)env.code + at;
	v->rflags = c->flags;
	memcpy(v->xsave, c->fx, 512);
	memcpy(v->xsave + 512, c->header, 8);
	memcpy(v->xsave + 576, c->hi, 256);
}

static void run_interpreted(const struct native_ctx *c, unsigned len, unsigned at, bool step)
{
	env.code_rw[at + len] = 0xf4; /* HLT */
	load(c, at);
	if (!step) {
		env_run(false);
		return;
	}
	for (unsigned i = 0; i < 5000; i++) {
		env_run(true);
		if (env.halted || env.failed || env.vector >= 0)
			return;
	}
}

static void describe(const struct insn *in, const char *what)
{
	fprintf(stderr, "%s:", what);
	for (unsigned i = 0; i < in->len; i++)
		fprintf(stderr, " %02x", in->bytes[i]);
	fprintf(stderr, "\n");
}

static bool compare(const struct native_ctx *start, const struct native_ctx *want,
		    const uint8_t *memory)
{
	struct kl_vcpu *v = env.v;
	bool ok = true;

	for (unsigned i = 0; i < 16; i++)
		if (v->gpr[i] != want->gpr[i]) {
			fprintf(stderr, "r%u: %#lx, not %#lx (was %#lx)\n", i, v->gpr[i],
				want->gpr[i], start->gpr[i]);
			ok = false;
		}
	if ((v->rflags ^ want->flags) & (KL_FL_STATUS | KL_FL_DF)) {
		fprintf(stderr, "flags: %#lx, not %#lx (were %#lx)\n", v->rflags & 0xcd5,
			want->flags & 0xcd5, start->flags & 0xcd5);
		ok = false;
	}
	if (memcmp(v->xsave, want->fx, 5) || memcmp(v->xsave + 24, want->fx + 24, 4)) {
		fprintf(stderr, "x87 or MXCSR: %08x, not %08x; %08x, not %08x\n",
			*(uint32_t *)v->xsave, *(const uint32_t *)want->fx,
			*(uint32_t *)(v->xsave + 24), *(const uint32_t *)(want->fx + 24));
		ok = false;
	}
	for (unsigned i = 0; i < 8; i++)
		if (memcmp(v->xsave + 32 + 16 * i, want->fx + 32 + 16 * i, 10)) {
			fprintf(stderr, "st%u differs\n", i);
			ok = false;
		}
	for (unsigned i = 0; i < 16; i++) {
		const uint64_t *a = (uint64_t *)(v->xsave + 160 + 16 * i);
		const uint64_t *b = (const uint64_t *)(want->fx + 160 + 16 * i);
		const uint64_t *s = (const uint64_t *)(start->fx + 160 + 16 * i);

		if (a[0] != b[0] || a[1] != b[1]) {
			fprintf(stderr,
				"xmm%u: %016lx%016lx, not %016lx%016lx (was %016lx%016lx)\n", i,
				a[1], a[0], b[1], b[0], s[1], s[0]);
			ok = false;
		}
	}
	for (unsigned i = 0; i < 16; i++) {
		const uint64_t *a = (uint64_t *)(v->xsave + 576 + 16 * i);
		const uint64_t *b = (const uint64_t *)(want->hi + 16 * i);
		const uint64_t *s = (const uint64_t *)(start->hi + 16 * i);

		if (a[0] != b[0] || a[1] != b[1]) {
			fprintf(stderr,
				"ymm%u: upper %016lx%016lx, not %016lx%016lx (was %016lx%016lx)\n",
				i, a[1], a[0], b[1], b[0], s[1], s[0]);
			ok = false;
		}
	}
	for (unsigned i = 0; memcmp(env.data, memory, ENV_ARENA) && i < ENV_ARENA; i++)
		if (env.data[i] != memory[i]) {
			fprintf(stderr, "memory at data + %#x: %#x, not %#x (was %#x)\n", i,
				env.data[i], memory[i], before[i]);
			ok = false;
			break;
		}
	return ok;
}

/* Changes the random state before it is used, or NULL. */
static void (*prepare)(struct native_ctx *c);

/* Once natively, once interpreted. */
static bool check(const uint8_t *code, unsigned len, unsigned attr, bool step)
{
	static struct native_ctx start, want;
	unsigned at = (unsigned)(rng() % (ENV_ARENA - 8192));
	int vector;

	random_state(&start, attr);
	if (prepare)
		prepare(&start);
	want = start;
	memcpy(before, env.data, ENV_ARENA);
	vector = run_native(&want, code, len, at);
	memcpy(wanted, env.data, ENV_ARENA);
	memcpy(env.data, before, ENV_ARENA);
	run_interpreted(&start, len, at, step);
	if (env.failed) {
		fprintf(stderr, "not implemented\n");
		return false;
	}
	if (vector != env.vector) {
		fprintf(stderr, "exception %d, not %d\n", env.vector, vector);
		return false;
	}
	if (vector >= 0)
		return true; /* nothing native to compare with */
	if (!env.halted) {
		fprintf(stderr, "lost at %#lx\n", env.v->rip);
		return false;
	}
	return compare(&start, &want, wanted);
}

static void test_forms(void **state)
{
	unsigned bad = 0, forms = 0;

	catch_signals();
	for (const struct insn *in = insn_table; in < insn_table_end; in++, forms++) {
		for (unsigned i = 0; i < 40; i++) {
			if (check(in->bytes, in->len, in->attr, i & 1))
				continue;
			describe(in, "failed");
			bad++;
			break;
		}
	}
	printf("# %u forms\n", forms);
	assert_true(forms > 2700);
	assert_int_equal(bad, 0);
}

/* ---- the VEX opcode space ------------------------------------------------------------------- */

static bool host_avx(void)
{
	return __builtin_cpu_supports("avx");
}

/* Not part of what is offered: the processor may have it. */
static bool vex_left_out(const uint8_t *code, unsigned len)
{
	ZydisDecoder dec;
	ZydisDecodedInstruction in;

	/* Mask registers, also with register numbers that Zydis refuses. */
	if ((code[1] & 31) == 1 &&
	    ((code[3] & 0xf0) == 0x40 || (code[3] & 0xf4) == 0x90 || (code[3] & 0xfe) == 0x98))
		return true;
	if ((code[1] & 31) == 3 && (code[3] & 0xfc) == 0x30)
		return true;
	/* VPERMQ and VPERMPD are W1; some processors do not look at W. */
	if ((code[1] & 31) == 3 && code[3] < 2 && !(code[2] & 0x80))
		return true;
	ZydisDecoderInit(&dec, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
	if (!ZYAN_SUCCESS(ZydisDecoderDecodeInstruction(&dec, NULL, code, len, &in)))
		return false;
	switch (in.meta.isa_ext) {
	case ZYDIS_ISA_EXT_AVX512VEX:
	case ZYDIS_ISA_EXT_AVX_VNNI:
	case ZYDIS_ISA_EXT_AMX_BF16:
	case ZYDIS_ISA_EXT_AMX_INT8:
	case ZYDIS_ISA_EXT_AMX_TILE:
		return true;
	default:
		return false;
	}
}

/* Whatever a VEX prefix, an opcode and a ModRM can say: executed, or #UD, as by this processor. */
static void test_vex_space(void **state)
{
	static const uint8_t modrm[] = {
		0xc0, 0xca, 0xd7, 0xdb, 0xe5, 0xec, 0xf1, 0xfe, /* registers */
		0x03, 0x0b, 0x13, 0x1b, 0x23, 0x2b, 0x33, 0x3b, /* [rbx] */
	};
	unsigned bad = 0, done = 0, ud = 0;

	if (!host_avx())
		skip();
	catch_signals();
	for (unsigned i = 0; i < 3u << 14; i++) {
		unsigned map = (i >> 14) + 1, wlpp = (i >> 8) & 15, opcode = i & 0xff;

		for (unsigned n = 0; n < 10; n++) {
			unsigned k = (unsigned)rng() % (2 * KL_ARRAY_SIZE(modrm));
			unsigned vvvv = k & 1 ? 15 : (unsigned)rng() & 15, len = 5;
			uint8_t code[16] = {
				0xc4,
				(uint8_t)(0xe0 | map),
				(uint8_t)((wlpp & 8) << 4 | vvvv << 3 | (wlpp & 7)),
				(uint8_t)opcode,
				modrm[k / 2],
			};
			ZydisDecoder dec;
			ZydisDecodedInstruction in;

			/* A register of the upper eight, sometimes. */
			if (rng() & 1)
				code[1] &= (uint8_t)~0x80;
			if (code[4] >= 0xc0 && (rng() & 1))
				code[1] &= (uint8_t)~0x20;
			code[5] = (uint8_t)rng();
			ZydisDecoderInit(&dec, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
			if (vex_left_out(code, 15))
				continue;
			if (ZYAN_SUCCESS(
				    ZydisDecoderDecodeInstruction(&dec, NULL, code, 15, &in))) {
				len = in.length;
				if (len > 6)
					continue;
			} else {
				ud++;
				if (n >= 2) /* those are one like the other */
					continue;
				len = 6;
			}
			done++;
			if (check(code, len, 0, k & 1))
				continue;
			describe(&(struct insn){code, (uint16_t)len, 0, 0}, "failed");
			if (++bad > 40)
				goto out;
		}
	}
out:
	printf("# %u instructions, %u encodings that are none\n", done, ud);
	assert_true(done > 10000);
	assert_int_equal(bad, 0);
}

/* ---- the legacy opcode space of MMX and SSE -------------------------------------------------- */

/* Groups with other instructions, or none of this kind. */
static bool sse_left_out(unsigned map, unsigned opcode)
{
	switch (map) {
	case 0:
		return !((opcode >= 0x10 && opcode <= 0x17) || (opcode >= 0x28 && opcode <= 0x2f) ||
			 (opcode >= 0x50 && opcode <= 0x7f) || opcode == 0xc2 ||
			 (opcode >= 0xc4 && opcode <= 0xc6) || (opcode >= 0xd0 && opcode <= 0xfe));
	case 1:
		/* INVEPT and others of the system; MOVDIRI and relatives, which are not offered */
		return (opcode >= 0x80 && opcode <= 0x8f) || opcode == 0xf8 || opcode == 0xf9;
	default:
		return false;
	}
}

static void test_sse_space(void **state)
{
	static const uint8_t prefix[] = {0, 0x66, 0xf3, 0xf2};
	static const uint8_t modrm[] = {
		0xc0, 0xca, 0xd7, 0xdb, 0xe5, 0xec, 0xf1, 0xfe, /* registers */
		0x43, 0x4b, 0x53, 0x5b, 0x63, 0x6b, 0x73, 0x7b, /* [rbx + disp8] */
	};
	unsigned bad = 0, done = 0;
	ZydisDecoder dec;

	ZydisDecoderInit(&dec, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
	catch_signals();
	for (unsigned i = 0; i < 3 * 4 * 2 * 256 * KL_ARRAY_SIZE(modrm); i++) {
		unsigned opcode = i & 0xff, map = (i >> 11) % 3, p = i >> 8 & 3, w = i >> 10 & 1;
		unsigned m = (i >> 11) / 3, n = 0, len;
		ZydisDecodedInstruction in;
		uint8_t code[16] = {0};

		if (sse_left_out(map, opcode))
			continue;
		if (p)
			code[n++] = prefix[p];
		if (w)
			code[n++] = (uint8_t)(0x48 | (rng() & (modrm[m] < 0xc0 ? 4 : 5)));
		code[n++] = 0x0f;
		if (map)
			code[n++] = map == 1 ? 0x38 : 0x3a;
		code[n++] = (uint8_t)opcode;
		code[n++] = modrm[m];
		if (modrm[m] < 0xc0)
			code[n++] = rng() & 1 ? 0 : (uint8_t)(rng() & 31);
		code[n] = (uint8_t)rng();
		code[n + 1] = (uint8_t)rng();
		len = n + 1;
		if (ZYAN_SUCCESS(ZydisDecoderDecodeInstruction(&dec, NULL, code, 15, &in)))
			len = in.length;
		done++;
		if (check(code, len, 0, rng() & 1))
			continue;
		describe(&(struct insn){code, (uint16_t)len, 0, 0}, "failed");
		if (++bad > 40)
			goto out;
	}
out:
	printf("# %u instructions\n", done);
	assert_int_equal(bad, 0);
}

/* ---- XSAVE and relatives ----------------------------------------------------------------------
 */

static uint64_t host_xcr0(void)
{
	uint32_t a, d;

	__asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
	return (uint64_t)d << 32 | a;
}

/* An area at rbx with a header that is right, mostly; some components in their initial state. */
static void prepare_xsave(struct native_ctx *c)
{
	unsigned off = 0x4000 + 64 * (unsigned)(rng() & 127), state = (unsigned)rng() & 7;
	uint64_t header[8] = {rng() & 7};
	uint32_t mxcsr = (uint32_t)(rng() & 0xffff);
	uint8_t *area = env.data + off;
	uint16_t fcw = 0x37f;

	if (rng() & 1)
		header[1] = 1ull << 63 | header[0] | (rng() & 7);
	/* A wrong bit; not of a component that the processor has and the vCPU lacks */
	if (!(rng() & 7))
		header[rng() & 7] ^= (1ull << (rng() & 63)) & ~(host_xcr0() & ~7ull);
	if (!(rng() & 7))
		mxcsr |= 1u << (16 + (rng() & 15));
	memcpy(area + 512, header, sizeof(header));
	memcpy(area + 24, &mxcsr, 4);
	c->gpr[KL_RBX] = (uint64_t)area + (rng() & 15 ? 0 : 8);
	c->gpr[KL_RAX] = (c->gpr[KL_RAX] & ~0xffffffffull) | (rng() & 7);
	c->gpr[KL_RDX] &= ~0xffffffffull; /* the process may have more in XCR0 */
	c->header[0] = state;
	/*
	 * A component is in use if it is not in its initial state (AMD) or if it was loaded
	 * (Intel): here both are the same.
	 */
	if (state & 1)
		fcw ^= 0x100;
	else
		memset(c->fx + 32, 0, 128);
	memset(c->fx, 0, 24);
	memcpy(c->fx, &fcw, 2);
	if (!(state & 2))
		memset(c->fx + 160, 0, 256);
	if (!(state & 4))
		memset(c->hi, 0, 256);
	if (rng() & 1)
		memcpy(c->fx + 24, "\x80\x1f\0", 4);
}

static void test_xsave(void **state)
{
	static const struct {
		char bytes[5];
		uint8_t len, bit; /* bit of CPUID.0xD.1:EAX, or 31 */
	} t[] = {
		{"\x0f\xae\x23", 3, 31},    {"\x48\x0f\xae\x23", 4, 31}, /* XSAVE */
		{"\x0f\xae\x33", 3, 0},     {"\x48\x0f\xae\x33", 4, 0},  /* XSAVEOPT */
		{"\x0f\xc7\x63\x00", 4, 1}, {"\x48\x0f\xc7\x23", 4, 1},  /* XSAVEC */
		{"\x0f\xae\x2b", 3, 31},    {"\x48\x0f\xae\x2b", 4, 31}, /* XRSTOR */
		{"\x0f\xae\x03", 3, 31},    {"\x48\x0f\xae\x03", 4, 31}, /* FXSAVE */
		{"\x0f\xae\x0b", 3, 31},    {"\x48\x0f\xae\x0b", 4, 31}, /* FXRSTOR */
	};
	unsigned bad = 0, a = 0, b, c, d;

	if (!host_avx())
		skip();
	catch_signals();
	__get_cpuid_count(0xd, 1, &a, &b, &c, &d);
	a |= 1u << 31;
	prepare = prepare_xsave;
	for (unsigned i = 0; i < 8000 && bad < 20; i++) {
		const uint8_t *code = (const uint8_t *)t[i % KL_ARRAY_SIZE(t)].bytes;
		unsigned len = t[i % KL_ARRAY_SIZE(t)].len, tries = 0;
		uint64_t again = rng_state;

		if (!(a >> t[i % KL_ARRAY_SIZE(t)].bit & 1))
			continue;
		/* Another try if the system put a component into use that was not. */
		for (; tries < 5 && !check(code, len, 0, i & 1); tries++)
			rng_state = again;
		if (tries < 5)
			continue;
		describe(&(struct insn){code, (uint16_t)len, 0, 0}, "failed");
		bad++;
	}
	prepare = NULL;
	assert_int_equal(bad, 0);
}

static void set_mode(enum kl_code_mode mode)
{
	struct kl_vcpu *v = env.v;

	v->code_mode = (uint8_t)mode;
	v->long_mode = mode == KL_CODE64;
	v->seg[KL_SS].db = v->seg[KL_CS].db = mode != KL_CODE16;
	v->seg[KL_CS].limit = mode == KL_CODE16 ? 0xffff : 0xffffffff;
	v->seg[KL_CS].base = mode == KL_CODE16 ? (uint64_t)env.code : 0;
	for (unsigned i = 0; i < 6; i++)
		if (i != KL_CS)
			v->seg[i].base = mode == KL_CODE16 ? (uint64_t)env.data : 0;
}

/* ---- when VEX is none --------------------------------------------------------------------------
 */

static int vector_of(const char *code, unsigned len)
{
	env.v->rip = (uint64_t)env.code;
	memcpy(env.code_rw, code, len);
	env.code_rw[len] = 0xf4;
	env_run(true);
	return env.failed ? 1000 : env.vector;
}

static void test_vex_rules(void **state)
{
#define VADDPS "\xc5\xec\x58\xcb"     /* %ymm3, %ymm2, %ymm1 */
#define ANDN   "\xc4\xe2\x70\xf2\xc2" /* %edx, %ecx, %eax */
	struct kl_vcpu *v = env.v;

	if (!host_avx() || !__builtin_cpu_supports("bmi"))
		skip();
	assert_int_equal(vector_of(VADDPS, 4), -1);
	/* Other prefixes, and what VEX is a part of */
	assert_int_equal(vector_of("\x66" VADDPS, 5), KL_EXC_UD);
	assert_int_equal(vector_of("\xf2" VADDPS, 5), KL_EXC_UD);
	assert_int_equal(vector_of("\xf3" VADDPS, 5), KL_EXC_UD);
	assert_int_equal(vector_of("\x48" VADDPS, 5), KL_EXC_UD);
	assert_int_equal(vector_of("\xf0" VADDPS, 5), KL_EXC_UD);
	assert_int_equal(vector_of("\x2e" VADDPS, 5), -1);
	assert_int_equal(vector_of("\x62\xf1\x6c\x48\x58\xcb", 6), KL_EXC_UD); /* EVEX */
	assert_int_equal(vector_of("\x8f\xe8\x78\xc0\xc1\x03", 6), KL_EXC_UD); /* XOP */
	assert_int_equal(vector_of("\xc5\xf8\x41\xc1", 4), KL_EXC_UD);         /* KANDW */
	assert_int_equal(vector_of("\xc4\xe2\x71\x92\x04\x0b", 6), KL_EXC_UD); /* one register */

	v->cr4 &= ~(uint64_t)KL_CR4_OSXSAVE;
	assert_int_equal(vector_of(VADDPS, 4), KL_EXC_UD);
	assert_int_equal(vector_of(ANDN, 5), -1);
	v->cr4 |= KL_CR4_OSXSAVE;
	v->xcr0 = 3;
	assert_int_equal(vector_of(VADDPS, 4), KL_EXC_UD);
	v->cr0 |= KL_CR0_TS;
	assert_int_equal(vector_of(VADDPS, 4), KL_EXC_UD);
	v->xcr0 = 7;
	assert_int_equal(vector_of(VADDPS, 4), KL_EXC_NM);
	assert_int_equal(vector_of(ANDN, 5), -1);
	v->cr0 = (v->cr0 & ~(uint64_t)KL_CR0_TS) | KL_CR0_EM;
	assert_int_equal(vector_of(VADDPS, 4), -1);
	assert_int_equal(vector_of("\x0f\x58\xcb", 3), KL_EXC_UD); /* ADDPS */
	v->cr0 &= ~(uint64_t)KL_CR0_EM;

	/* 32-bit code: eight registers. Real mode and virtual 8086: no VEX at all. */
	set_mode(KL_CODE32);
	memset(v->xsave + 576, 0x11, 256);
	assert_int_equal(vector_of("\xc5\xfc\x77", 3), -1); /* VZEROALL */
	assert_int_equal(v->xsave[576 + 127], 0);
	assert_int_equal(v->xsave[576 + 128], 0x11);
	v->rflags |= KL_FL_VM;
	assert_int_equal(vector_of(VADDPS, 4), KL_EXC_UD);
	assert_int_equal(vector_of(ANDN, 5), KL_EXC_UD);
	v->rflags &= ~(uint64_t)KL_FL_VM;
	v->cr0 &= ~(uint64_t)KL_CR0_PE;
	assert_int_equal(vector_of(VADDPS, 4), KL_EXC_UD);
	assert_int_equal(vector_of(ANDN, 5), KL_EXC_UD);
	v->cr0 |= KL_CR0_PE;
	set_mode(KL_CODE64);
}

/* ---- elements behind the end of memory ----------------------------------------------------------
 */

static void set_mask(unsigned reg, uint32_t elements)
{
	for (unsigned i = 0; i < 8; i++) {
		uint32_t m = elements >> i & 1 ? 0x80000000 : 0;
		uint8_t *x = env.v->xsave + (i < 4 ? 160 : 576) + 16 * reg;

		memcpy(x + 4 * (i & 3), &m, 4);
	}
}

/* What the mask leaves out is not touched; a fault leaves nothing half-done. */
static void test_masked(void **state)
{
#define MASKED_STORE "\xc4\xe2\x75\x2e\x13"     /* vmaskmovps %ymm2, %ymm1, (%rbx) */
#define MASKED_LOAD  "\xc4\xe2\x75\x2c\x13"     /* vmaskmovps (%rbx), %ymm1, %ymm2 */
#define GATHER       "\xc4\xe2\x75\x92\x14\xa3" /* vgatherdps %ymm1, (%rbx,%ymm4,4), %ymm2 */
	uint8_t *end = env.data + ENV_ARENA, old[8];
	struct kl_vcpu *v = env.v;
	uint32_t *dst = (uint32_t *)(void *)(v->xsave + 160 + 16 * 2);
	uint32_t *mask = (uint32_t *)(void *)(v->xsave + 160 + 16 * 1);

	if (!host_avx())
		skip();
	memset(end - 8, 0x33, 8);
	memset(v->xsave + 160, 0x44, 256);
	memset(v->xsave + 576, 0x44, 256);
	v->gpr[KL_RBX] = (uint64_t)end - 8;
	set_mask(1, 3);
	assert_int_equal(vector_of(MASKED_LOAD, 5), -1);
	assert_int_equal(dst[1], 0x33333333);
	assert_int_equal(dst[2], 0);
	memset(dst, 0x44, 16);
	assert_int_equal(vector_of(MASKED_STORE, 5), -1);
	assert_int_equal(*(uint32_t *)(void *)(end - 4), 0x44444444);

	set_mask(1, 7);
	memset(end - 8, 0x33, 8);
	memcpy(old, end - 8, 8);
	assert_int_equal(vector_of(MASKED_STORE, 5), KL_EXC_PF);
	assert_int_equal(v->cr2, (uint64_t)end);
	assert_memory_equal(end - 8, old, 8);
	assert_int_equal(vector_of(MASKED_LOAD, 5), KL_EXC_PF);
	assert_int_equal(dst[0], 0x44444444);

	/* Indices 0, 1, 2 ...: the third is outside; the first two have come. */
	for (unsigned i = 0; i < 8; i++) {
		uint8_t *x = v->xsave + (i < 4 ? 160 : 576) + 16 * 4;

		memcpy(x + 4 * (i & 3), &i, 4);
	}
	set_mask(1, 0xf5);
	assert_int_equal(vector_of(GATHER, 6), KL_EXC_PF);
	assert_int_equal(v->cr2, (uint64_t)end);
	assert_int_equal(dst[0], 0x33333333);
	assert_int_equal(dst[1], 0x44444444);
	assert_int_equal(mask[0], 0);
	assert_int_equal(mask[1], 0);
	assert_int_equal(mask[2], 0x80000000);
	/* What is left to do is done from the mask, not from the start. */
	memset(end - 8, 0x55, 8);
	v->gpr[KL_RBX] -= 64;
	assert_int_equal(vector_of(GATHER, 6), -1);
	assert_int_equal(dst[0], 0x33333333);
	assert_int_equal(dst[1], 0x44444444);
	assert_int_equal(mask[2], 0);
}

/* Straight lines of register instructions: one block, with dead flags. */
static void test_sequences(void **state)
{
	unsigned n = (unsigned)(insn_table_end - insn_table), bad = 0;

	catch_signals();
	for (unsigned i = 0; i < 3000 && bad < 5; i++) {
		struct insn line = {0};
		uint8_t code[1024];
		unsigned len = 0;

		for (unsigned k = 2 + rng() % 20; k;) {
			const struct insn *in = &insn_table[rng() % n];

			if (!(in->attr & ATTR_PURE))
				continue;
			memcpy(code + len, in->bytes, in->len);
			len += in->len;
			k--;
		}
		if (check(code, len, 0, false))
			continue;
		line.bytes = code;
		line.len = (uint16_t)len;
		describe(&line, "failed");
		bad++;
	}
	assert_int_equal(bad, 0);
}

static void put_code(unsigned at, const void *code, unsigned len)
{
	memcpy(env.code_rw + at, code, len);
	env.v->rip = (uint64_t)env.code + at;
	env.v->rflags = 2;
}

static void test_faults(void **state)
{
	static const uint8_t store[] = {0x01, 0x03, 0xf4}; /* add %eax,(%rbx) */
	static const uint8_t pop[] = {0x8f, 0x03};         /* pop (%rbx) */
	static const uint8_t bad[] = {0x0f, 0xff, 0xc0};   /* UD0 */
	static const uint8_t lock[] = {0xf0, 0x01, 0xc0};  /* lock add %eax,%eax */
	static const uint8_t inval[] = {0x06};             /* push %es in 64-bit code */
	uint8_t longest[20];
	struct kl_vcpu *v = env.v;
	uint64_t rsp = (uint64_t)env.data + 0x800;

	put_code(0, store, sizeof(store));
	v->gpr[KL_RBX] = 0x5000;
	v->gpr[KL_RAX] = 1;
	v->rflags = 2 | KL_FL_CF;
	env_run(false);
	assert_int_equal(env.vector, KL_EXC_PF);
	assert_int_equal(v->rip, (uint64_t)env.code);
	assert_int_equal(v->rflags, 2 | KL_FL_CF);

	put_code(0, pop, sizeof(pop));
	v->gpr[KL_RSP] = rsp;
	env_run(false);
	assert_int_equal(env.vector, KL_EXC_PF);
	assert_int_equal(v->gpr[KL_RSP], rsp);

	put_code(0, bad, sizeof(bad));
	env_run(false);
	assert_int_equal(env.vector, KL_EXC_UD);
	put_code(0, lock, sizeof(lock));
	env_run(false);
	assert_int_equal(env.vector, KL_EXC_UD);
	put_code(0, inval, sizeof(inval));
	env_run(false);
	assert_int_equal(env.vector, KL_EXC_UD);

	memset(longest, 0x66, sizeof(longest));
	longest[14] = 0x90;
	put_code(0, longest, 15);
	env.code_rw[15] = 0xf4;
	env_run(false);
	assert_true(env.halted);
	longest[14] = 0x66;
	longest[15] = 0x90;
	put_code(0, longest, 16);
	env_run(false);
	assert_int_equal(env.vector, KL_EXC_GP);

	/* Non-canonical targets fault at the branch. */
	put_code(0, "\xff\xe0", 2); /* jmp *%rax */
	v->gpr[KL_RAX] = 0x1000000000000000;
	env_run(false);
	assert_int_equal(env.vector, KL_EXC_GP);
	assert_int_equal(v->rip, (uint64_t)env.code);

	/* The second page of an instruction is not there. */
	put_code(ENV_ARENA - 2, "\x48\xb8", 2);
	env_run(false);
	assert_int_equal(env.vector, KL_EXC_PF);
	assert_int_equal(v->cr2, (uint64_t)env.code + ENV_ARENA);
}

/* What vector and x87 instructions raise, and what they leave behind. */
static void test_fpu_exceptions(void **state)
{
	static const uint8_t addsd[] = {0xf2, 0x0f, 0x58, 0xc1, 0xf4};
	static const uint8_t divsd[] = {0xf2, 0x0f, 0x5e, 0xc1, 0xf4};
	static const uint8_t fdiv[] = {0xd9, 0xe8, 0xd9, 0xee, 0xde, 0xf9, /* fld1; fldz; fdivp */
				       0xdf, 0xe0, 0x9b, 0xf4};            /* fnstsw; fwait */
	struct kl_vcpu *v = env.v;
	uint32_t *mxcsr = (uint32_t *)(void *)(v->xsave + 24);
	uint64_t *x0 = (uint64_t *)(void *)(v->xsave + 160);
	uint16_t *fcw = (uint16_t *)(void *)v->xsave;

	put_code(0, divsd, sizeof(divsd));
	*mxcsr = 0x1f80 & ~0x200u; /* zero divide unmasked */
	x0[0] = 0x3ff0000000000000;
	x0[2] = 0;
	env_run(false);
	assert_int_equal(env.vector, KL_EXC_XM);
	assert_int_equal(x0[0], 0x3ff0000000000000);
	assert_int_equal(*mxcsr & 0x3f, 4);
	v->cr4 &= ~(uint64_t)KL_CR4_OSXMMEXCPT;
	env_run(false);
	assert_int_equal(env.vector, KL_EXC_UD);
	v->cr4 |= KL_CR4_OSXMMEXCPT;
	*mxcsr = 0x1f80;
	env_run(false);
	assert_true(env.halted);
	assert_int_equal(x0[0], 0x7ff0000000000000);
	assert_int_equal(*mxcsr, 0x1f84);

	/* A tiny result is an underflow, unmasked, also if it is exact. */
	if (host_avx() && __builtin_cpu_supports("f16c")) {
		put_code(0, "\xc4\xe3\x79\x1d\xc1\x00\xf4", 7); /* vcvtps2ph $0, %xmm0, %xmm1 */
		x0[0] = 0x36a00000;
		x0[1] = 0;
		x0[2] = 1;
		*mxcsr = 0x1f80 & ~0x800u;
		env_run(false);
		assert_int_equal(env.vector, KL_EXC_XM);
		assert_int_equal(*mxcsr & 0x3f, 0x10);
		assert_int_equal(x0[2], 1);
		*mxcsr = 0x1f80;
		env_run(false);
		assert_true(env.halted);
		assert_int_equal(x0[2], 0x50);
		assert_int_equal(*mxcsr, 0x1f80);
	}

	put_code(0, addsd, sizeof(addsd));
	v->cr0 |= KL_CR0_TS;
	env_run(false);
	assert_int_equal(env.vector, KL_EXC_NM);
	v->cr4 &= ~(uint64_t)KL_CR4_OSFXSR;
	env_run(false);
	assert_int_equal(env.vector, KL_EXC_UD);
	v->cr4 |= KL_CR4_OSFXSR;
	v->cr0 = (v->cr0 & ~(uint64_t)KL_CR0_TS) | KL_CR0_EM;
	env_run(false);
	assert_int_equal(env.vector, KL_EXC_UD);
	put_code(0, "\xd9\xe8\xf4", 3);
	env_run(false);
	assert_int_equal(env.vector, KL_EXC_NM);
	v->cr0 &= ~(uint64_t)KL_CR0_EM;

	memset(v->xsave, 0, 160);
	*fcw = 0x37f & ~4; /* zero divide unmasked: the division keeps its operands */
	*mxcsr = 0x1f80;
	put_code(0, fdiv, sizeof(fdiv));
	v->gpr[KL_RAX] = 0;
	env_run(false);
	assert_int_equal(env.vector, KL_EXC_MF);
	assert_int_equal(v->rip, (uint64_t)env.code + 8);
	assert_int_equal(v->gpr[KL_RAX] & 0xb884, 0xb084);
	assert_int_equal(*fcw, 0x37b);
	put_code(0, "\xdb\xe2\x9b\xf4", 4); /* fnclex; fwait */
	env_run(false);
	assert_true(env.halted);
	put_code(0, "\xdb\xe3\xf4", 3); /* fninit */
	env_run(false);
	assert_int_equal(*fcw, 0x37f);

	/* FNSTENV must not show host addresses, but those of what raised an exception. */
	memset(env.data, 0xff, 64);
	*fcw = 0x37f & ~4;
	put_code(0, "\xd9\xe8\xd9\xee\xde\xf9\xd9\x33\xf4", 9); /* 1 / 0; fnstenv (%rbx) */
	v->gpr[KL_RBX] = (uint64_t)env.data;
	env_run(false);
	assert_true(env.halted);
	assert_int_equal(*(uint32_t *)(void *)(env.data + 12), (uint32_t)(uint64_t)env.code + 4);
	assert_int_equal(*(uint32_t *)(void *)(env.data + 16), 0x6f9u << 16);
	assert_int_equal(*(uint32_t *)(void *)(env.data + 20), 0);
	put_code(0, "\xdb\xe3\xf4", 3);
	env_run(false);

	/* Overflow, unmasked: the register gets a scaled result, memory none; #MF comes later. */
	*(uint64_t *)(void *)env.data = 0x7fe0000000000000;
	*(uint64_t *)(void *)(env.data + 8) = 0x1122334455667788;
	*fcw = 0x37f & ~8;
	/* fldl (%rbx); fmul %st(0), %st; fstl 8(%rbx); fnstsw %ax */
	put_code(0, "\xdd\x03\xd8\xc8\xdd\x53\x08\xdf\xe0\xf4", 10);
	env_run(false);
	assert_true(env.halted);
	assert_int_equal(v->gpr[KL_RAX] & 0x88, 0x88);
	assert_int_equal(*(uint64_t *)(void *)(env.data + 8), 0x1122334455667788);
	put_code(0, "\xdb\xe3\xf4", 3);
	env_run(false);
}

/* Code that changes: by its own stores, within the block, and from outside. */
static void test_changing_code(void **state)
{
	struct kl_vcpu *v = env.v;
	static const uint8_t self[] = {
		0xc6, 0x05, 0x01, 0x00, 0x00, 0x00, 0x07, /* movb $7, 1(%rip): the imm below */
		0xb0, 0x01,                               /* mov $1, %al */
		0xf4,
	};

	put_code(64, self, sizeof(self));
	env_run(false);
	assert_true(env.halted);
	assert_int_equal(v->gpr[KL_RAX] & 0xff, 7);

	for (unsigned i = 0; i < 50; i++) {
		put_code(128, self + 7, 3);
		env.code_rw[129] = (uint8_t)i;
		env_run(false);
		assert_true(env.halted);
		assert_int_equal(v->gpr[KL_RAX] & 0xff, i);
	}

	/* What was no instruction becomes one. */
	for (unsigned step = 0; step < 2; step++) {
		put_code(64, "\x0f\xff\xc0\xf4", 4);
		env_run(step);
		assert_int_equal(env.vector, KL_EXC_UD);
		put_code(64, "\x0f\x1f\xc0\xf4", 4);
		env_run(step);
		assert_int_equal(env.vector, -1);
		assert_int_equal(v->rip, (uint64_t)env.code + 67 + !step);
		put_code(64, "\xd9\xd1\xc0\xf4", 4); /* reserved */
		env_run(step);
		assert_true(env.vector == KL_EXC_UD);
		put_code(64, "\xd9\xd0\xf4", 3); /* fnop */
		env_run(step);
		assert_int_equal(env.vector, -1);
	}

	/* ADD turns the next instruction from XOR, which kills its flags, into SBB. */
	put_code(64, "\x80\x05\0\0\0\0\xe8\x31\xc0\xf4", 10);
	v->gpr[KL_RAX] = 1;
	env_run(false);
	assert_true(env.halted);
	assert_int_equal(v->gpr[KL_RAX], 0xffffffff);

	/* LOCK and string stores into the running page. */
	put_code(64, "\xf0\x80\x05\x01\x00\x00\x00\x05\xb0\x01\xf4", 11);
	env_run(false);
	assert_int_equal(v->gpr[KL_RAX] & 0xff, 6);
	put_code(64, "\xf3\xa4\xb0\x01\xf4", 5); /* rep movsb; mov $1,%al; hlt */
	memcpy(env.data, "\x90\x90\x90\x90\x90\xb0\x2a\xf4", 8);
	v->gpr[KL_RSI] = (uint64_t)env.data;
	v->gpr[KL_RDI] = (uint64_t)env.code + 66;
	v->gpr[KL_RCX] = 8;
	env_run(false);
	assert_true(env.halted);
	assert_int_equal(v->gpr[KL_RAX] & 0xff, 0x2a);
	assert_int_equal(v->gpr[KL_RCX], 0);
}

/*
 * A jump that is linked to its target's block sees other bytes there (T8), and, after a flush,
 * another page.
 */
static void test_links(void **state)
{
	static const uint8_t caller[] = {0xe8, 0xfb, 0x0f, 0, 0, 0xf4}; /* call 0x1000; hlt */
	static const uint8_t answers_1[] = {0xb8, 1, 0, 0, 0, 0xc3};    /* mov $1,%eax; ret */
	static const uint8_t answers_2[] = {0xb8, 2, 0, 0, 0, 0xc3};
	struct kl_vcpu *v = env.v;
	unsigned long expect[] = {1, 1, 1, 2, 2, 2, 7, 7};
	struct kl_tlb_entry *e = kl_tlb_entry(v, v->tlb_mode, (uint64_t)env.code + 0x1000);

	memset(v->gpr, 0, sizeof(v->gpr));
	v->gpr[KL_RSP] = (uint64_t)env.data + 0x800;
	put_code(0x1000, answers_1, sizeof(answers_1));
	put_code(0x2000, answers_2, sizeof(answers_2));
	for (unsigned i = 0; i < KL_ARRAY_SIZE(expect); i++) {
		put_code(0, caller, sizeof(caller));
		if (i == 6)
			env.code_rw[0x2001] = 7;
		if (i == 3) { /* as kl_tlb_flush_page() and a new translation would */
			assert_int_equal(e->xtag, (uint64_t)env.code + 0x1000);
			e->page += 0x1000;
			kl_code_unmapped(v);
		}
		env_run(false);
		assert_true(env.halted);
		assert_int_equal(v->gpr[KL_RAX], expect[i]);
		assert_int_equal(v->gpr[KL_RSP], (uint64_t)env.data + 0x800);
	}
	e->xtag = e->rtag = e->wtag = kl_tlb_none(kl_tlb_index((uint64_t)env.code + 0x1000));
	kl_code_unmapped(v);
}

/* More code than the cache holds. */
static void test_eviction(void **state)
{
	struct kl_vcpu *v = env.v;
	uint64_t flushes = v->blocks->nr_evicted;

	memset(env.code_rw, 0x90, ENV_ARENA);
	env.code_rw[ENV_ARENA - 1] = 0xf4;
	for (unsigned round = 0; round < 6; round++) {
		for (unsigned i = 0; i < 4096; i++) {
			v->rip = (uint64_t)env.code + i;
			v->rflags = 2;
			env.code_rw[i + 40] = 0xf4;
			env_run(false);
			env.code_rw[i + 40] = 0x90;
			assert_true(env.halted);
		}
	}
	assert_true(v->blocks->nr_evicted > flushes);
}

/* A request stops a loop and a long string instruction; both go on where they were. */
static void test_requests(void **state)
{
	struct kl_vcpu *v = env.v;

	put_code(0, "\xeb\xfe", 2);
	atomic_store(&v->core.requests, KL_REQ_EVENT);
	env_run(false);
	assert_int_equal(v->rip, (uint64_t)env.code);
	put_code(0, "\xf3\xaa\xf4", 3); /* rep stosb */
	memset(env.data, 0, ENV_ARENA);
	v->gpr[KL_RCX] = 8192;
	v->gpr[KL_RDI] = (uint64_t)env.data;
	v->gpr[KL_RAX] = 0x55;
	for (unsigned i = 0; i < 4; i++) {
		env_run(true); /* a step is one element */
		assert_int_equal(v->rip, (uint64_t)env.code);
	}
	assert_int_equal(v->gpr[KL_RCX], 8188);
	atomic_store(&v->core.requests, 0);
	env_run(false);
	assert_true(env.halted);
	assert_int_equal(v->gpr[KL_RCX], 0);
	assert_int_equal(env.data[8191], 0x55);
	assert_int_equal(env.data[8192], 0);
}

/* Counting: loops, early exits and faults. */
static void test_count(void **state)
{
	struct kl_vcpu *v = env.v;

	put_code(0, "\xff\xc0\xff\xc9\x75\xfa\xf4", 7); /* 1: inc; dec; jnz 1b; hlt */
	v->gpr[KL_RCX] = 1000;
	v->insn_count = 0;
	env_run(false);
	assert_int_equal(v->insn_count, 3001);

	put_code(0, "\x90\x90\x8b\x03\x90", 5); /* nop; nop; mov (%rbx),%eax faults */
	v->gpr[KL_RBX] = 0x5000;
	v->insn_count = 0;
	env_run(false);
	assert_int_equal(env.vector, KL_EXC_PF);
	assert_int_equal(v->insn_count, 2);
}

/* 16- and 32-bit code has no native oracle in a 64-bit process: known answers. */
static void test_legacy_modes(void **state)
{
	struct kl_vcpu *v = env.v;

	set_mode(KL_CODE16);
	memset(env.data, 0, ENV_ARENA);
	/* mov $0x1234,%ax; push %ax; pusha; mov %sp,%bp; mov 16(%bp),%cx; popa; call +1; nop; pop
	 * %dx; aam; hlt */
	put_code(0x100,
		 "\xb8\x34\x12\x50\x60\x89\xe5\x8b\x4e\x10\x61\xe8\x01\x00\x90\x5a\xd4\x0a\xf4",
		 19);
	v->rip = 0x100;
	memset(v->gpr, 0, sizeof(v->gpr));
	v->gpr[KL_RSP] = 0xabcd1000;
	v->gpr[KL_RDX] = 0xffffffff;
	env_run(false);
	assert_true(env.halted);
	assert_int_equal(v->gpr[KL_RAX], 0x0502); /* 0x34 = 52 */
	assert_int_equal(v->gpr[KL_RCX], 0);      /* POPA brought it back */
	assert_int_equal(v->gpr[KL_RSP], 0xabcd0ffe);
	assert_int_equal(v->gpr[KL_RDX], 0xffff010e);
	assert_int_equal(*(uint16_t *)(env.data + 0xffe), 0x1234);

	/* Past the limit of CS: #GP; 16-bit addresses wrap. */
	put_code(0xffff, "\x90", 1);
	v->rip = 0xffff;
	env.code_rw[0] = 0xf4;
	env_run(false);
	assert_true(env.halted);
	assert_int_equal(v->rip, 1);
	put_code(0x100, "\x8a\x40\x7f\xf4", 4); /* mov 0x7f(%bx,%si),%al */
	v->rip = 0x100;
	v->gpr[KL_RBX] = 0xfff0;
	v->gpr[KL_RSI] = 0x20;
	env.data[0x8f] = 0x77;
	env_run(false);
	assert_int_equal(v->gpr[KL_RAX] & 0xff, 0x77);

	set_mode(KL_CODE32);
	/* push %eax; inc %eax (0x40); daa; das; aaa; mov %ds-relative: pop %ebx; hlt */
	put_code(0x100, "\x50\x40\x27\x5b\xf4", 5);
	v->gpr[KL_RAX] = 0x79;
	v->gpr[KL_RSP] = (uint64_t)env.data + 0x1000;
	env_run(false);
	assert_true(env.halted);
	assert_int_equal(v->gpr[KL_RBX], 0x79);
	assert_int_equal(v->gpr[KL_RAX], 0x80); /* 0x7a adjusts to 0x80 */
	put_code(0x100, "\x62\x03\xf4", 3);     /* bound %eax,(%ebx) */
	v->gpr[KL_RBX] = (uint64_t)env.data;
	*(int32_t *)env.data = -5;
	*(int32_t *)(env.data + 4) = 5;
	v->gpr[KL_RAX] = (uint32_t)-5;
	env_run(false);
	assert_true(env.halted);
	v->rip = (uint64_t)env.code + 0x100;
	v->gpr[KL_RAX] = 6;
	env_run(false);
	assert_int_equal(env.vector, KL_EXC_BR);
	set_mode(KL_CODE64);
}

/* ---- two vCPUs ----------------------------------------------------------------------- */

#define ROUNDS 200000

extern const char atomics_code[], atomics_end[];
__asm__(".pushsection .rodata\n"
	"atomics_code:\n"
	"   lock incq 512(%rbx)\n" /* start together */
	"0: cmpq $2, 512(%rbx)\n"
	"   jb 0b\n"
	"1: lock incq (%rbx)\n"
	"   mov $3, %eax\n"
	"   lock xaddq %rax, 64(%rbx)\n"
	"2: mov 128(%rbx), %rax\n"
	"   lea 1(%rax), %rdx\n"
	"   lock cmpxchgq %rdx, 128(%rbx)\n"
	"   jne 2b\n"
	"   lock addl $5, 192(%rbx)\n"
	"   lock decw 256(%rbx)\n"
	"   mov 320(%rbx), %rax\n"
	"   mov 328(%rbx), %rdx\n"
	"4: push %rbx; push %rcx\n" /* they are operands */
	"   mov %rbx, %rdi\n"
	"   mov %rax, %rbx; add $1, %rbx\n"
	"   mov %rdx, %rcx; add $2, %rcx\n"
	"   lock cmpxchg16b 320(%rdi)\n"
	"   pop %rcx; pop %rbx\n"
	"   jne 4b\n"
	"   dec %rcx\n"
	"   jnz 1b\n"
	"   hlt\n"
	"atomics_end:\n.popsection");

static void *second_vcpu(void *arg)
{
	struct kl_vcpu *v = arg;

	if (_setjmp(v->jmp) == 0)
		kl_interp_run(v);
	return NULL;
}

static void test_atomics(void **state)
{
	unsigned len = (unsigned)(atomics_end - atomics_code);
	struct kl_vcpu *v = env.v, *w = aligned_alloc(64, (sizeof(*w) + 63) & ~63ul);
	uint64_t *m = (uint64_t *)(void *)env.data;
	pthread_t thread;

	memset(env.data, 0, ENV_ARENA);
	put_code(0, atomics_code, len);
	v->gpr[KL_RBX] = (uint64_t)env.data;
	v->gpr[KL_RCX] = ROUNDS;
	v->gpr[KL_RSP] = (uint64_t)env.data + 0x8000;
	memcpy(w, v, sizeof(*w));
	w->gpr[KL_RSP] += 0x4000;
	assert_int_equal(kl_blocks_create(w), 0);
	assert_int_equal(pthread_create(&thread, NULL, second_vcpu, w), 0);
	env_run(false);
	pthread_join(thread, NULL);
	assert_int_equal(v->gpr[KL_RCX] + w->gpr[KL_RCX], 0);
	assert_int_equal(m[0], 2 * ROUNDS);
	assert_int_equal(m[8], 6 * ROUNDS);
	assert_int_equal(m[16], 2 * ROUNDS);
	assert_int_equal(m[24], 10 * ROUNDS);
	assert_int_equal(m[32], (uint16_t)(-2 * ROUNDS));
	assert_int_equal(m[40], 2 * ROUNDS);
	assert_int_equal(m[41], 4 * ROUNDS);
	kl_blocks_destroy(w);
	free(w);
}

/* Random bytes in each mode: anything may come out, but not the host's death. */
static void test_random_bytes(void **state)
{
	static const enum kl_code_mode modes[] = {KL_CODE64, KL_CODE32, KL_CODE16};
	struct kl_vcpu *v = env.v;
	struct native_ctx c;
	unsigned done = 0;

	for (unsigned i = 0; i < 60000; i++) {
		unsigned at = 0x100 + (unsigned)(rng() & 0x7fff);

		random_state(&c, ATTR_REP);
		set_mode(modes[i % 3]);
		load(&c, at);
		v->gpr[KL_RCX] &= 0xff;
		if (modes[i % 3] == KL_CODE16)
			v->rip = at;
		for (unsigned k = 0; k < 24; k++)
			env.code_rw[at + k] = (uint8_t)rng();
		/* Any image of the FPU's state: the host must not trap, whatever it unmasks. */
		memcpy(v->xsave, &(uint64_t){rng()}, 6);
		*(uint32_t *)(void *)(v->xsave + 24) = rng() & 0xffff;
		switch (rng() & 7) { /* the interesting maps */
		case 0:
			env.code_rw[at] = 0x0f;
			break;
		case 1:
			memcpy(env.code_rw + at, "\x66\x0f\x38", 3);
			break;
		case 2:
			env.code_rw[at] = (uint8_t)(0xd8 + (rng() & 7));
			break;
		case 3:
			memcpy(env.code_rw + at, rng() & 1 ? "\xc4\xe2" : "\x66\x0f\x3a", 2);
			break;
		default:
			break;
		}
		for (unsigned k = 0; k < 4; k++) {
			env_run(true);
			if (env.vector >= 0 || env.failed || env.halted)
				break;
			done++;
		}
	}
	set_mode(KL_CODE64);
	printf("# %u random instructions completed\n", done);
	assert_true(done > 10000);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_forms),         cmocka_unit_test(test_vex_space),
		cmocka_unit_test(test_sse_space),     cmocka_unit_test(test_xsave),
		cmocka_unit_test(test_vex_rules),     cmocka_unit_test(test_sequences),
		cmocka_unit_test(test_faults),        cmocka_unit_test(test_fpu_exceptions),
		cmocka_unit_test(test_changing_code), cmocka_unit_test(test_eviction),
		cmocka_unit_test(test_links),         cmocka_unit_test(test_requests),
		cmocka_unit_test(test_count),         cmocka_unit_test(test_legacy_modes),
		cmocka_unit_test(test_atomics),       cmocka_unit_test(test_random_bytes),
		cmocka_unit_test(test_masked),
	};
	env_init();
	native_avx = host_avx();
	cmocka_set_test_filter(getenv("KVMLET_TEST"));
	return cmocka_run_group_tests(tests, NULL, NULL);
}
