/* SPDX-License-Identifier: MIT */
/*
 * Who may execute what: every system instruction in real mode, protected mode, virtual-8086 mode
 * and 64-bit mode at CPL 0 and 3, against tables from the manuals; #NM and #UD of x87 and SSE by
 * CR0 and CR4; and each bit of the control, debug and extended control registers and of EFER.
 */
#include <stdio.h>

#include "x86_env.h"

#include "x86/control.h"
#include "x86/insn.h"

#define DE 0
#define UD KL_EXC_UD
#define NM KL_EXC_NM
#define GP KL_EXC_GP
#define OK (-1)

enum mode { REAL, PROT0, PROT3, VM86, LONG0, LONG3, NMODES };
static const char *const mode_names[NMODES] = {"real", "prot/0", "prot/3",
					       "vm86", "long/0", "long/3"};

static void enter(struct env *e, enum mode mode)
{
	struct kl_vcpu *v = e->v;

	switch (mode) {
	case REAL:
		mode16(e);
		v->cr0 &= ~(uint64_t)KL_CR0_PE;
		v->efer = 0;
		break;
	case LONG0:
	case LONG3:
		mode64(e, mode == LONG3 ? 3 : 0);
		break;
	default:
		mode32(e, mode == PROT0 ? 0 : 3);
	}
	if (mode == VM86) {
		v->rflags |= KL_FL_VM;
		set_segment_cache(&v->seg[KL_CS], 0, 3, 3, false, false);
		set_segment_cache(&v->seg[KL_DS], 0, 3, 3, false, false);
		for (unsigned s = 0; s < KL_LDTR; s++) {
			set_segment_cache(&v->seg[s], 0, 3, 3, false, false);
			v->seg[s].limit = 0xffff;
			v->seg[s].g = 0;
		}
	}
	kl_x86_update_mode(v);
	kl_tlb_flush(v);
}

/* A register that was left from another mode must not reach the next. */
static void leave(struct env *e)
{
	struct kvm_sregs s;

	e->v->rflags = 2;
	kl_x86_get_sregs(e->v, &s);
	s.cr0 = KL_CR0_ET;
	s.cr3 = s.cr4 = s.efer = 0;
	s.cs.l = 0;
	assert_int_equal(kl_x86_set_sregs(e->v, &s), 0);
}

static int one(struct env *e, const uint8_t *bytes, unsigned n, uint32_t *error)
{
	memset(e->mem + CODE, 0x90, 16);
	memcpy(e->mem + CODE, bytes, n);
	e->v->rip = CODE;
	return env_one(e, error);
}

/* ---- instructions ---- */

#define ROW(name, real, prot0, prot3, vm86, long0, long3, ...)                 \
	{                                                                      \
		name, {real, prot0, prot3, vm86, long0, long3}, {__VA_ARGS__}, \
			sizeof((uint8_t[]){__VA_ARGS__})                       \
	}

/*
 * Operands are registers, or [rbx] = [ebx] = [bx+di]... which is memory in all modes. IOPL is 0;
 * the TSS has no I/O bitmap; CR4 is 0 but for PAE, OSFXSR in 64-bit mode.
 */
static const struct row {
	const char *name;
	int8_t want[NMODES];
	uint8_t bytes[12];
	unsigned n;
} rows[] = {
	/*                        real  p/0  p/3  vm86 l/0  l/3 */
	ROW("hlt", OK, OK, GP, GP, OK, GP, 0xf4),
	ROW("clts", OK, OK, GP, GP, OK, GP, 0x0f, 0x06),
	ROW("invd", OK, OK, GP, GP, OK, GP, 0x0f, 0x08),
	ROW("wbinvd", OK, OK, GP, GP, OK, GP, 0x0f, 0x09),
	ROW("lgdt", OK, OK, GP, GP, OK, GP, 0x0f, 0x01, 0x17),
	ROW("lidt", OK, OK, GP, GP, OK, GP, 0x0f, 0x01, 0x1f),
	ROW("sgdt", OK, OK, OK, OK, OK, OK, 0x0f, 0x01, 0x07),
	ROW("sidt", OK, OK, OK, OK, OK, OK, 0x0f, 0x01, 0x0f),
	ROW("invlpg", OK, OK, GP, GP, OK, GP, 0x0f, 0x01, 0x3f),
	ROW("lmsw", OK, OK, GP, GP, OK, GP, 0x0f, 0x01, 0xf1),
	ROW("smsw", OK, OK, OK, OK, OK, OK, 0x0f, 0x01, 0xe1),
	ROW("sldt", UD, OK, OK, UD, OK, OK, 0x0f, 0x00, 0xc1),
	ROW("str", UD, OK, OK, UD, OK, OK, 0x0f, 0x00, 0xc9),
	ROW("lldt null", UD, OK, GP, UD, OK, GP, 0x0f, 0x00, 0xd0),
	ROW("ltr null", UD, GP, GP, UD, GP, GP, 0x0f, 0x00, 0xd8),
	ROW("verr", UD, OK, OK, UD, OK, OK, 0x0f, 0x00, 0xe1),
	ROW("verw", UD, OK, OK, UD, OK, OK, 0x0f, 0x00, 0xe9),
	ROW("lar", UD, OK, OK, UD, OK, OK, 0x0f, 0x02, 0xc1),
	ROW("lsl", UD, OK, OK, UD, OK, OK, 0x0f, 0x03, 0xc1),
	ROW("mov r, cr0", OK, OK, GP, GP, OK, GP, 0x0f, 0x20, 0xc0),
	ROW("mov r, cr2", OK, OK, GP, GP, OK, GP, 0x0f, 0x20, 0xd0),
	ROW("mov r, cr3", OK, OK, GP, GP, OK, GP, 0x0f, 0x20, 0xd8),
	ROW("mov r, cr4", OK, OK, GP, GP, OK, GP, 0x0f, 0x20, 0xe0),
	ROW("mov r, cr1", UD, UD, UD, UD, UD, UD, 0x0f, 0x20, 0xc8),
	ROW("mov r, cr7", UD, UD, UD, UD, UD, UD, 0x0f, 0x20, 0xf8),
	ROW("mov cr2, r", OK, OK, GP, GP, OK, GP, 0x0f, 0x22, 0xd0),
	ROW("mov cr5, r", UD, UD, UD, UD, UD, UD, 0x0f, 0x22, 0xe8),
	ROW("mov r, dr0", OK, OK, GP, GP, OK, GP, 0x0f, 0x21, 0xc0),
	ROW("mov r, dr4", OK, OK, GP, GP, OK, GP, 0x0f, 0x21, 0xe0),
	ROW("mov dr0, r", OK, OK, GP, GP, OK, GP, 0x0f, 0x23, 0xc0),
	ROW("rdmsr", OK, OK, GP, GP, OK, GP, 0x0f, 0x32),
	ROW("wrmsr", OK, OK, GP, GP, OK, GP, 0x0f, 0x30),
	ROW("rdtsc", OK, OK, OK, OK, OK, OK, 0x0f, 0x31),
	ROW("cpuid", OK, OK, OK, OK, OK, OK, 0x0f, 0xa2),
	ROW("cli", OK, OK, GP, GP, OK, GP, 0xfa),
	ROW("sti", OK, OK, GP, GP, OK, GP, 0xfb),
	ROW("pushf", OK, OK, OK, GP, OK, OK, 0x9c),
	ROW("popf", OK, OK, OK, GP, OK, OK, 0x9d),
	ROW("int n", OK, OK, GP, GP, OK, GP, 0xcd, 0x20),
	ROW("in", OK, OK, GP, GP, OK, GP, 0xe4, 0x80),
	ROW("in dx", OK, OK, GP, GP, OK, GP, 0xec),
	ROW("out", OK, OK, GP, GP, OK, GP, 0xe6, 0x80),
	ROW("out dx", OK, OK, GP, GP, OK, GP, 0xef),
	ROW("insb", OK, OK, GP, GP, OK, GP, 0x6c),
	ROW("outsb", OK, OK, GP, GP, OK, GP, 0x6e),
	ROW("swapgs", UD, UD, UD, UD, OK, GP, 0x0f, 0x01, 0xf8),
	ROW("syscall, SCE 0", UD, UD, UD, UD, UD, UD, 0x0f, 0x05),
	ROW("sysret, SCE 0", UD, UD, UD, UD, UD, UD, 0x0f, 0x07),
	ROW("sysexit", GP, GP, GP, GP, GP, GP, 0x0f, 0x35),
	ROW("rsm", UD, UD, UD, UD, UD, UD, 0x0f, 0xaa),
	ROW("ud0", UD, UD, UD, UD, UD, UD, 0x0f, 0xff, 0xc0),
	ROW("ud1", UD, UD, UD, UD, UD, UD, 0x0f, 0xb9, 0xc0),
	ROW("ud2", UD, UD, UD, UD, UD, UD, 0x0f, 0x0b),
	ROW("rdfsbase, no CR4 bit", UD, UD, UD, UD, UD, UD, 0xf3, 0x0f, 0xae, 0xc0),
	ROW("xgetbv, no OSXSAVE", UD, UD, UD, UD, UD, UD, 0x0f, 0x01, 0xd0),
	ROW("xsetbv, no OSXSAVE", UD, UD, UD, UD, UD, UD, 0x0f, 0x01, 0xd1),
	ROW("stac", OK, OK, UD, UD, OK, UD, 0x0f, 0x01, 0xcb),
	ROW("clac", OK, OK, UD, UD, OK, UD, 0x0f, 0x01, 0xca),
	ROW("vmrun", UD, UD, UD, UD, UD, UD, 0x0f, 0x01, 0xd8),
	ROW("vmload", UD, UD, UD, UD, UD, UD, 0x0f, 0x01, 0xda),
	ROW("stgi", UD, UD, UD, UD, UD, UD, 0x0f, 0x01, 0xdc),
	ROW("vmxoff", UD, UD, UD, UD, UD, UD, 0x0f, 0x01, 0xc4),
	ROW("vmlaunch", UD, UD, UD, UD, UD, UD, 0x0f, 0x01, 0xc2),
	ROW("vmread", UD, UD, UD, UD, UD, UD, 0x0f, 0x78, 0xc0),
	/* LOCK where it may not be */
	ROW("lock nop", UD, UD, UD, UD, UD, UD, 0xf0, 0x90),
	ROW("lock add r", UD, UD, UD, UD, UD, UD, 0xf0, 0x01, 0xc8),
	ROW("lock mov m", UD, UD, UD, UD, UD, UD, 0xf0, 0x89, 0x07),
	ROW("lock cmp m", UD, UD, UD, UD, UD, UD, 0xf0, 0x39, 0x07),
	ROW("lock bt m", UD, UD, UD, UD, UD, UD, 0xf0, 0x0f, 0xa3, 0x07),
	ROW("lock shl m", UD, UD, UD, UD, UD, UD, 0xf0, 0xd1, 0x27),
	ROW("lock push m", UD, UD, UD, UD, UD, UD, 0xf0, 0xff, 0x37),
	ROW("lock hlt", UD, UD, UD, UD, UD, UD, 0xf0, 0xf4),
	/* not in 64-bit mode */
	ROW("push es", OK, OK, OK, OK, UD, UD, 0x06),
	ROW("push cs", OK, OK, OK, OK, UD, UD, 0x0e),
	ROW("daa", OK, OK, OK, OK, UD, UD, 0x27),
	ROW("aaa", OK, OK, OK, OK, UD, UD, 0x37),
	ROW("aam", OK, OK, OK, OK, UD, UD, 0xd4, 0x0a),
	ROW("aam 0", DE, DE, DE, DE, UD, UD, 0xd4, 0x00),
	ROW("aad", OK, OK, OK, OK, UD, UD, 0xd5, 0x0a),
	ROW("pusha", OK, OK, OK, OK, UD, UD, 0x60),
	ROW("popa", OK, OK, OK, OK, UD, UD, 0x61),
	ROW("into", OK, OK, OK, OK, UD, UD, 0xce),
	ROW("group 1, 82", OK, OK, OK, OK, UD, UD, 0x82, 0xc0, 0x01),
	ROW("arpl", UD, OK, OK, UD, OK, OK, 0x63, 0xc0),
	ROW("mov cs, r", UD, UD, UD, UD, UD, UD, 0x8e, 0xc8),
	ROW("mov seg 6, r", UD, UD, UD, UD, UD, UD, 0x8e, 0xf0),
	ROW("lea r, r", UD, UD, UD, UD, UD, UD, 0x8d, 0xc0),
	ROW("lss r, r", UD, UD, UD, UD, UD, UD, 0x0f, 0xb2, 0xc0),
	ROW("far jmp r", UD, UD, UD, UD, UD, UD, 0xff, 0xe8),
	ROW("cmpxchg8b r", UD, UD, UD, UD, UD, UD, 0x0f, 0xc7, 0xc8),
	ROW("pop group /1", UD, UD, UD, UD, UD, UD, 0x8f, 0xc8),
	ROW("ff /7", UD, UD, UD, UD, UD, UD, 0xff, 0xf8),
	ROW("fe /2", UD, UD, UD, UD, UD, UD, 0xfe, 0xd0),
	ROW("invlpg r", UD, UD, UD, UD, UD, UD, 0x0f, 0x01, 0xff),
	ROW("lgdt r", UD, UD, UD, UD, OK, OK, 0x0f, 0x01, 0xd0),
};

static bool skipped(const struct row *r, enum mode mode)
{
	/* The same bytes are XGETBV: it has its own row. */
	if (!strcmp(r->name, "lgdt r"))
		return true;
	return (!strcmp(r->name, "stac") || !strcmp(r->name, "clac")) && mode == REAL &&
	       !(kl_cr4_supported() & KL_CR4_SMAP);
}

static void privileges(void **state)
{
	struct env *e = *state;
	unsigned failures = 0;

	for (enum mode m = 0; m < NMODES; m++) {
		for (unsigned i = 0; i < KL_ARRAY_SIZE(rows); i++) {
			uint32_t error = 0;
			int got, want = rows[i].want[m];

			if (skipped(&rows[i], m))
				continue;
			/* AMD's long mode has no SYSENTER. */
			if (!strcmp(rows[i].name, "sysexit") && m >= LONG0 &&
			    !e->v->intel_compatible)
				want = UD;
			leave(e);
			enter(e, m);
			/* Memory operands: [rdi] or [bx]; both selectors are null. */
			e->v->gpr[KL_RDI] = e->v->gpr[KL_RBX] = 0x5000;
			e->v->gpr[KL_RSI] = 0x5100;
			e->v->gpr[KL_RCX] = 0x10; /* MSR: the TSC */
			e->v->gpr[KL_RAX] = e->v->gpr[KL_RDX] = 0;
			e->v->efer &= ~(uint64_t)KL_EFER_SCE;
			memcpy(e->mem + TSS + 0x66, &(uint16_t){0x68}, 2); /* no I/O bitmap */
			e->v->idt.limit = 0xfff;
			e->v->idt.base = m == REAL ? 0 : IDT;
			memset(e->mem + 0x5000, 0, 0x200);
			memset(e->mem + STACK, 0, 0x100);
			if (m >= LONG0 || m == PROT0 || m == PROT3)
				gate64(e, 0x20, 0, 0, true);
			if (m == PROT0 || m == PROT3)
				put64(e, IDT + 0x20 * 8,
				      HANDLER(0x20) | SEL_CODE << 16 | 0x8eull << 40);
			if (!strcmp(rows[i].name, "lmsw"))
				e->v->gpr[KL_RCX] = e->v->cr0 & 0xf;
			got = one(e, rows[i].bytes, rows[i].n, &error);
			if (got == want && !(got == GP && error && rows[i].bytes[0] != 0xcd))
				continue;
			fprintf(stderr, "%s, %s: exception %d (%x), want %d\n", rows[i].name,
				mode_names[m], got, error, want);
			failures++;
		}
	}
	leave(e);
	assert_int_equal(failures, 0);
}

/* ---- which of several faults ---- */

#define PF KL_EXC_PF

/*
 * Instructions that could fault for two reasons, in 64-bit mode. rdi is P_ABSENT, rsi P_RO, rbx not
 * canonical, rcx 1, the rest 0; with TS, x87 and SSE are not to be used.
 */
static void priorities(void **state)
{
	static const struct {
		const char *name;
		unsigned cpl;
		bool ts;
		int want;
		uint64_t cr2;
		uint8_t bytes[16];
		unsigned n;
	} t[] = {
#define CASE(name, cpl, ts, want, cr2, ...) \
	{name, cpl, ts, want, cr2, {__VA_ARGS__}, sizeof((uint8_t[]){__VA_ARGS__})}
		CASE("lock mov, absent", 0, false, UD, 0, 0xf0, 0x89, 0x07),
		CASE("lock add r, CPL 3", 3, false, UD, 0, 0xf0, 0x01, 0xc8),
		CASE("lock hlt, CPL 3", 3, false, UD, 0, 0xf0, 0xf4),
		CASE("mov cr1, CPL 3", 3, false, UD, 0, 0x0f, 0x22, 0xc8),
		CASE("addps, absent, TS", 0, true, NM, 0, 0x0f, 0x58, 0x07),
		CASE("fld, absent, TS", 0, true, NM, 0, 0xd9, 0x07),
		CASE("fxsave, unaligned, TS", 0, true, NM, 0, 0x0f, 0xae, 0x47, 0x08),
		CASE("addps, unaligned and absent", 0, false, GP, 0, 0x0f, 0x58, 0x47, 0x08),
		CASE("addps, absent", 0, false, PF, P_ABSENT, 0x0f, 0x58, 0x07),
		CASE("movntps, unaligned and read-only", 0, false, GP, 0, 0x0f, 0x2b, 0x46, 0x08),
		CASE("cmpxchg16b, unaligned and absent", 0, false, GP, 0, 0x48, 0x0f, 0xc7, 0x4f,
		     8),
		CASE("cmpxchg16b, read-only, no match", 0, false, PF, P_RO, 0x48, 0x0f, 0xc7, 0x0e),
		CASE("cmpxchg, read-only, no match", 0, false, PF, P_RO, 0x0f, 0xb1, 0x0e),
		CASE("insb, absent, no right", 3, false, GP, 0, 0x6c),
		CASE("outsb, absent, no right", 3, false, GP, 0, 0x48, 0x89, 0xfe, 0x6e),
		CASE("div by an absent zero", 0, false, PF, P_ABSENT, 0xf7, 0x37),
		CASE("movsb, both bad: the source", 0, false, GP, 0, 0x48, 0x89, 0xde, 0xa4),
		CASE("movsb, to absent", 0, false, PF, P_ABSENT, 0xa4),
		CASE("cmpsb, absent second", 0, false, PF, P_ABSENT, 0xa6),
		CASE("rep movsb, no count", 0, false, OK, 0, 0x31, 0xc9, 0xf3, 0xa4),
		CASE("push of absent, no stack", 0, false, PF, P_ABSENT, 0x48, 0x89, 0xdc, 0xff,
		     0x37),
		CASE("push, no stack", 0, false, KL_EXC_SS, 0, 0x48, 0x89, 0xdc, 0x50),
		CASE("call through absent", 0, false, PF, P_ABSENT, 0xff, 0x17),
		CASE("jmp to nowhere", 0, false, GP, 0, 0xff, 0xe3),
		CASE("lss, register", 0, false, UD, 0, 0x0f, 0xb2, 0xc7),
		CASE("lss, absent", 0, false, PF, P_ABSENT, 0x0f, 0xb2, 0x07),
		CASE("lgdt, absent, CPL 3", 3, false, GP, 0, 0x0f, 0x01, 0x17),
		CASE("lgdt, absent", 0, false, PF, P_ABSENT, 0x0f, 0x01, 0x17),
		CASE("sgdt, read-only", 0, false, PF, P_RO, 0x0f, 0x01, 0x06),
		CASE("invlpg, absent", 0, false, OK, 0, 0x0f, 0x01, 0x3f),
		CASE("prefetch, absent", 0, false, OK, 0, 0x0f, 0x18, 0x0f),
		CASE("nop, absent", 0, false, OK, 0, 0x0f, 0x1f, 0x07),
		CASE("lea, not canonical", 0, false, OK, 0, 0x48, 0x8d, 0x03),
		CASE("ldmxcsr, absent", 0, false, PF, P_ABSENT, 0x0f, 0xae, 0x17),
		CASE("not canonical", 0, false, GP, 0, 0x8b, 0x03),
		CASE("15 bytes", 0, false, OK, 0, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66,
		     0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x90),
		CASE("16 bytes", 0, false, GP, 0, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66,
		     0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x90),
		CASE("16 bytes, and not an instruction", 0, false, GP, 0, 0x66, 0x66, 0x66, 0x66,
		     0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x66, 0x06),
#undef CASE
	};
	struct env *e = *state;
	unsigned failures = 0;

	for (unsigned i = 0; i < KL_ARRAY_SIZE(t); i++) {
		struct kl_vcpu *v = e->v;
		uint32_t error = 0;
		int got = OK;

		mode64(e, t[i].cpl);
		memcpy(e->mem + TSS + 0x66, &(uint16_t){0x68}, 2);
		v->cr0 |= t[i].ts ? KL_CR0_TS : 0;
		v->gpr[KL_RDI] = P_ABSENT;
		v->gpr[KL_RSI] = P_RO;
		v->gpr[KL_RBX] = 1ull << 63;
		v->gpr[KL_RCX] = 1;
		v->gpr[KL_RAX] = 0;
		v->gpr[KL_RDX] = 0;
		memset(e->mem + P_RO, 0x77, 0x20);
		memset(e->mem + CODE, 0x90, 32);
		memcpy(e->mem + CODE, t[i].bytes, t[i].n);
		v->rip = CODE;
		v->exc.payload = 0;
		/* Some set a register first. */
		for (unsigned k = 0; k < 4 && got == OK && v->rip < CODE + t[i].n; k++)
			got = env_one(e, &error);
		if (got == t[i].want && (got != PF || v->exc.payload == t[i].cr2))
			continue;
		fprintf(stderr, "%s: exception %d (%x) at %lx, want %d\n", t[i].name, got, error,
			(unsigned long)v->exc.payload, t[i].want);
		failures++;
	}
	/* Code that runs into an absent page: the fetch faults, unless it is too long already. */
	for (unsigned n = 1; n < 16; n++) {
		uint64_t at = P_ABSENT - n;
		uint32_t error = 0;
		int got;

		mode64(e, 0);
		memset(e->mem + at, 0x66, n);
		e->v->rip = at;
		got = env_one(e, &error);
		if (got != (n < 15 ? PF : GP) || (got == PF && (e->v->exc.payload != P_ABSENT))) {
			fprintf(stderr, "%u prefixes: exception %d (%x)\n", n, got, error);
			failures++;
		}
	}
	assert_int_equal(failures, 0);
}

/* ---- #NM and #UD of x87, MMX and SSE ---- */

static void coprocessors(void **state)
{
	static const struct {
		const char *name;
		uint8_t bytes[4];
		unsigned n;
		enum { X87, WAIT, MMX, SSE, FXSAVE } kind;
	} t[] = {
		{"fnop", {0xd9, 0xd0}, 2, X87},
		{"fwait", {0x9b}, 1, WAIT},
		{"paddb mm", {0x0f, 0xfc, 0xc1}, 3, MMX},
		{"addps", {0x0f, 0x58, 0xc1}, 3, SSE},
		{"paddb xmm", {0x66, 0x0f, 0xfc, 0xc1}, 4, SSE},
		{"fxsave", {0x0f, 0xae, 0x07}, 3, FXSAVE},
	};
	struct env *e = *state;
	unsigned failures = 0;

	for (unsigned bits = 0; bits < 16; bits++) {
		bool mp = bits & 1, em = bits & 2, ts = bits & 4, osfxsr = bits & 8;

		for (unsigned i = 0; i < KL_ARRAY_SIZE(t); i++) {
			uint32_t error;
			int got, want = OK;

			mode64(e, 0);
			e->v->cr0 &= ~(uint64_t)(KL_CR0_MP | KL_CR0_EM | KL_CR0_TS);
			e->v->cr0 |=
				(mp ? KL_CR0_MP : 0) | (em ? KL_CR0_EM : 0) | (ts ? KL_CR0_TS : 0);
			e->v->cr4 &= ~(uint64_t)KL_CR4_OSFXSR;
			e->v->cr4 |= osfxsr ? KL_CR4_OSFXSR : 0;
			e->v->gpr[KL_RDI] = 0x5000;
			switch (t[i].kind) {
			case X87:
			case FXSAVE:
				want = em || ts ? NM : OK;
				break;
			case WAIT:
				want = mp && ts ? NM : OK;
				break;
			case MMX:
				want = em ? UD : ts ? NM : OK;
				break;
			case SSE:
				want = em || !osfxsr ? UD : ts ? NM : OK;
				break;
			}
			got = one(e, t[i].bytes, t[i].n, &error);
			if (got == want)
				continue;
			fprintf(stderr, "%s, MP %u EM %u TS %u OSFXSR %u: %d, want %d\n", t[i].name,
				mp, em, ts, osfxsr, got, want);
			failures++;
		}
	}
	assert_int_equal(failures, 0);
}

/* ---- each bit of the system registers, in 64-bit mode ---- */

static int write_cr(struct env *e, unsigned cr, uint64_t val)
{
	/* mov cr, rax */
	uint8_t code[] = {cr == 8 ? 0x44 : 0x40, 0x0f, 0x22, (uint8_t)(0xc0 | (cr & 7) << 3)};
	uint32_t error = 0;
	int r;

	e->v->gpr[KL_RAX] = val;
	r = one(e, code, sizeof(code), &error);
	assert_int_equal(error, 0);
	return r;
}

static void control_registers(void **state)
{
	const uint64_t supported = kl_cr4_supported();
	struct env *e = *state;

	for (unsigned bit = 0; bit < 64; bit++) {
		uint64_t b = 1ull << bit, val;
		int want;

		mode64(e, 0);
		val = e->v->cr0 ^ b;
		want = bit >= 32 || bit == 31 || bit == 0 || bit == 29 ? GP : OK;
		if (write_cr(e, 0, val) != want)
			fail_msg("CR0 bit %u", bit);
		if (want == OK && bit != 4) /* ET is 1; reserved ones of the low half read 0 */
			assert_int_equal(e->v->cr0, (val & 0xe005003f) | KL_CR0_ET);

		mode64(e, 0);
		val = e->v->cr4 ^ b;
		want = (val & ~(supported & ~e->v->cr4_reserved)) ? GP : OK;
		if (bit == 5 || bit == 12) /* PAE must stay; LA57 cannot change */
			want = GP;
		if (write_cr(e, 4, val) != want)
			fail_msg("CR4 bit %u", bit);
		if (want == OK)
			assert_int_equal(e->v->cr4, val);

		mode64(e, 0);
		val = e->v->cr3 | b;
		want = bit >= e->v->maxphyaddr ? GP : OK;
		if (bit < 12 || want == GP) { /* where there are no tables the next fetch fails */
			if (write_cr(e, 3, val) != want)
				fail_msg("CR3 bit %u", bit);
		}

		mode64(e, 0);
		if (write_cr(e, 8, b) != (bit < 4 ? OK : GP))
			fail_msg("CR8 bit %u", bit);

		mode64(e, 0);
		want = bit >= 32 ? GP : OK;
		for (unsigned dr = 6; dr < 8; dr++) {
			uint32_t error;
			uint8_t code[] = {0x0f, 0x23, (uint8_t)(0xc0 | dr << 3)};

			e->v->dr7 = 0x400;
			e->v->gpr[KL_RAX] = dr == 7 && bit == 13 ? 0 : b;
			if (one(e, code, sizeof(code), &error) != want)
				fail_msg("DR%u bit %u", dr, bit);
			e->v->gpr[KL_RAX] = 0x400;
			assert_int_equal(one(e, (uint8_t[]){0x0f, 0x23, 0xf8}, 3, &error), OK);
		}
	}
}

/* PCID: only in long mode, and only over a CR3 without one; CR3's bit 63 then. */
static void pcide(void **state)
{
	struct env *e = *state;

	mode64(e, 0);
	if (e->v->cr4_reserved & KL_CR4_PCIDE)
		return;
	assert_int_equal(write_cr(e, 3, TABLES | 0x10), OK);
	assert_int_equal(write_cr(e, 4, e->v->cr4 | KL_CR4_PCIDE), GP);
	assert_int_equal(write_cr(e, 3, TABLES), OK);
	assert_int_equal(write_cr(e, 3, TABLES | 1ull << 63), GP);
	assert_int_equal(write_cr(e, 4, e->v->cr4 | KL_CR4_PCIDE), OK);
	assert_int_equal(write_cr(e, 3, TABLES | 0xfff | 1ull << 63), OK);
	assert_int_equal(e->v->cr3, TABLES | 0xfff);
}

static int write_msr(struct env *e, uint32_t index, uint64_t val)
{
	uint32_t error = 0;
	int r;

	e->v->gpr[KL_RCX] = index;
	e->v->gpr[KL_RAX] = (uint32_t)val;
	e->v->gpr[KL_RDX] = val >> 32;
	r = one(e, (uint8_t[]){0x0f, 0x30}, 2, &error);
	assert_int_equal(error, 0);
	return r;
}

/* EFER; MSRs that hold addresses; PAT's types. */
static void msrs(void **state)
{
	static const uint32_t addresses[] = {0xc0000100, 0xc0000101, 0xc0000102, 0xc0000082,
					     0xc0000083};
	unsigned top = kl_cr4_supported() & KL_CR4_LA57 ? 56 : 47;
	struct env *e = *state;

	for (unsigned bit = 0; bit < 64; bit++) {
		uint64_t val = e->v->efer, b = 1ull << bit;
		int want = OK;

		mode64(e, 0);
		val = e->v->efer ^ b;
		if (bit == 8) /* LME cannot change while there is paging */
			want = GP;
		else if (bit != 0 && bit != 10 && !(e->v->efer_allowed & b))
			want = GP;
		if (write_msr(e, 0xc0000080, val) != want)
			fail_msg("EFER bit %u", bit);
		assert_true(e->v->efer & KL_EFER_LMA);

		for (unsigned i = 0; i < KL_ARRAY_SIZE(addresses); i++) {
			mode64(e, 0);
			if (write_msr(e, addresses[i], b) != (bit < top ? OK : GP))
				fail_msg("MSR %x bit %u", addresses[i], bit);
			if (write_msr(e, addresses[i], ~0ull << bit) != (bit > top ? GP : OK))
				fail_msg("MSR %x from bit %u", addresses[i], bit);
		}
	}
	for (unsigned type = 0; type < 256; type++) {
		bool legal = type == 0 || type == 1 || (type >= 4 && type <= 7);

		for (unsigned byte = 0; byte < 8; byte++) {
			mode64(e, 0);
			if (write_msr(e, 0x277, (uint64_t)type << 8 * byte) != (legal ? OK : GP))
				fail_msg("PAT entry %u, %x", byte, type);
		}
	}
}

static void xcr0(void **state)
{
	struct env *e = *state;

	for (unsigned n = 0; n < 16 + 64; n++) {
		uint64_t val = n < 16 ? n : 1 | 1ull << (n - 16);
		uint64_t known = e->v->supported_xcr0 | 1;
		int want = !(val & 1) || (val & ~known) || ((val & 4) && !(val & 2)) ? GP : OK;
		uint32_t error = 0;

		/* A half of MPX, of AVX-512, of AMX */
		if (!((val & 0x18) == 0 || (val & 0x18) == 0x18))
			want = GP;
		mode64(e, 0);
		if (e->v->cr4_reserved & KL_CR4_OSXSAVE)
			return;
		e->v->cr4 |= KL_CR4_OSXSAVE;
		e->v->gpr[KL_RCX] = 0;
		e->v->gpr[KL_RAX] = (uint32_t)val;
		e->v->gpr[KL_RDX] = val >> 32;
		if (one(e, (uint8_t[]){0x0f, 0x01, 0xd1}, 3, &error) != want && !(val & 0xe0) &&
		    !(val >> 17))
			fail_msg("XCR0 %lx", (unsigned long)val);
		e->v->gpr[KL_RCX] = 1;
		e->v->gpr[KL_RAX] = 1;
		e->v->gpr[KL_RDX] = 0;
		assert_int_equal(one(e, (uint8_t[]){0x0f, 0x01, 0xd1}, 3, &error), GP);
		mode64(e, 3);
		e->v->cr4 |= KL_CR4_OSXSAVE;
		e->v->gpr[KL_RCX] = 0;
		assert_int_equal(one(e, (uint8_t[]){0x0f, 0x01, 0xd1}, 3, &error), GP);
	}
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, env_setup, env_teardown)
	const struct CMUnitTest tests[] = {
		TEST(privileges), TEST(priorities), TEST(coprocessors), TEST(control_registers),
		TEST(pcide),      TEST(msrs),       TEST(xcr0),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
