/* SPDX-License-Identifier: MIT */
/* What must be equal, and how a difference is told. */
#include <stdio.h>
#include <string.h>

#include "fuzz.h"
#include "host/cpu.h"

#define FLAGS                                                                               \
	(KL_FL_STATUS | KL_FL_TF | KL_FL_IF | KL_FL_DF | KL_FL_IOPL | KL_FL_NT | KL_FL_AC | \
	 KL_FL_ID)

static const char *const gpr_name[16] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
					 "r8",  "r9",  "r10", "r11", "r12", "r13", "r14", "r15"};

static bool say(FILE *out, const char *what, uint64_t guest, uint64_t native)
{
	if (guest == native)
		return true;
	if (out)
		fprintf(out, "  %-8s vCPU %016lx, processor %016lx\n", what, guest, native);
	return false;
}

static uint64_t word(const uint8_t *p, unsigned n)
{
	uint64_t x = 0;

	memcpy(&x, p, n);
	return x;
}

/*
 * The last instruction and operand pointers are not compared: processors of AMD store them
 * only while an exception is pending, and others may store no selectors.
 */
static bool compare_x(const struct insn *faulted, const uint8_t *g, const uint8_t *n, FILE *out)
{
	uint64_t ignored = 0;
	char name[16];
	bool ok = true;

	ok &= say(out, "fcw", word(g, 2), word(n, 2));
	ok &= say(out, "fsw", word(g + 2, 2), word(n + 2, 2));
	ok &= say(out, "ftw", g[4], n[4]);
	/* Whether an overflow or underflow that is not masked was exact: docs/deviations.md. */
	if (word(n + 24, 4) & ~(word(n + 24, 4) >> 7) & 0x18)
		ignored = 0x20;
	/* Dot products end at the first operation of several that raises #XM. */
	if (faulted && (faulted->in.mnemonic == ZYDIS_MNEMONIC_DPPS ||
			faulted->in.mnemonic == ZYDIS_MNEMONIC_DPPD ||
			faulted->in.mnemonic == ZYDIS_MNEMONIC_VDPPS ||
			faulted->in.mnemonic == ZYDIS_MNEMONIC_VDPPD))
		ignored = 0x3f;
	ok &= say(out, "mxcsr", word(g + 24, 4) & ~ignored, word(n + 24, 4) & ~ignored);
	for (unsigned i = 0; i < 8; i++) {
		const uint8_t *a = g + 32 + 16 * i, *b = n + 32 + 16 * i;

		snprintf(name, sizeof(name), "st%u", i);
		ok &= say(out, name, word(a, 8), word(b, 8));
		ok &= say(out, name, word(a + 8, 2), word(b + 8, 2));
	}
	if (!memcmp(g + 160, n + 160, 256) &&
	    (!(native_features & 4) || !memcmp(g + 576, n + 576, 256)))
		return ok;
	for (unsigned i = 0; i < 32; i++) {
		snprintf(name, sizeof(name), "xmm%u%s", i / 2, i & 1 ? ".hi" : "");
		say(out, name, word(g + 160 + 8 * i, 8), word(n + 160 + 8 * i, 8));
		snprintf(name, sizeof(name), "ymmh%u%s", i / 2, i & 1 ? ".hi" : "");
		if (native_features & 4)
			say(out, name, word(g + 576 + 8 * i, 8), word(n + 576 + 8 * i, 8));
	}
	return false;
}

static const struct insn *insn_at(const struct program *p, uint64_t rip)
{
	uint64_t at = p->at;

	for (unsigned k = 0; k < p->n; at += p->insn[k].len, k++)
		if (at == rip)
			return &p->insn[k];
	return NULL;
}

/*
 * What counts of a gather's mask are the signs of its elements. Intel's processors have spread them
 * over the elements if the system took over before the fault that is seen.
 */
static void spread_mask(const struct insn *i, struct outcome *o)
{
	unsigned size = i->op[0].element_size / 8,
		 mask = (unsigned)ZydisRegisterGetId(i->op[2].reg.value);
	uint8_t *low = o->m.x + 160 + 16 * mask, *high = o->m.x + 576 + 16 * mask;

	if (!i->in.raw.vex.L)
		memset(high, 0, 16);
	for (unsigned k = 0; k < 16; k += size) {
		memset(low + k, low[k + size - 1] & 0x80 ? 0xff : 0, size);
		memset(high + k, high[k + size - 1] & 0x80 ? 0xff : 0, size);
	}
}

static bool compare_fault(const struct program *p, const struct outcome *g, const struct outcome *n,
			  FILE *out)
{
	const struct insn *i = insn_at(p, g->m.rip);
	uint32_t ignored = 0;
	bool ok = say(out, "rip", g->m.rip, n->m.rip);

	if (g->vector == KL_EXC_PF) {
		/* The kernel hides whether there is something at an address of its own. */
		if (n->cr2 >> 63)
			ignored = 1;
		if (i && isa_piecewise(&i->in))
			return ok;
		ok &= say(out, "cr2", g->cr2, n->cr2);
	}
	return ok & say(out, "error", g->error & ~ignored, n->error & ~ignored);
}

/* REP CMPS: #PF for one operand, #GP for the other; either may come first. */
static bool two_operands_fault(const struct insn *i, const struct outcome *g,
			       const struct outcome *n)
{
	return i->legal && i->in.meta.category == ZYDIS_CATEGORY_STRINGOP &&
	       isa_piecewise(&i->in) && g->vector + n->vector == KL_EXC_PF + KL_EXC_GP;
}

/* An operand of SS beyond the limit and misaligned, too: #SS or #GP. */
static bool limit_and_alignment(const struct program *p, const struct insn *i,
				const struct outcome *g, const struct outcome *n)
{
	if (p->mode == KL_CODE64 || !i->legal || g->vector + n->vector != KL_EXC_SS + KL_EXC_GP)
		return false;
	for (unsigned k = 0; k < i->in.operand_count_visible; k++)
		if (i->op[k].type == ZYDIS_OPERAND_TYPE_MEMORY && i->op[k].size >= 128 &&
		    i->op[k].mem.segment == ZYDIS_REGISTER_SS)
			return true;
	return false;
}

static bool compare_all(const struct program *p, const struct outcome *g, const struct outcome *n,
			FILE *out)
{
	const struct insn *faulted = g->vector == NO_VECTOR ? NULL : insn_at(p, g->m.rip);
	/* What 32-bit code leaves above its registers is not defined. */
	uint64_t mask = p->mode == KL_CODE64 ? ~0ull : 0xffffffff, flags = FLAGS;
	bool ok = true, popa;

	if (g->vector == NO_VECTOR && n->vector == NO_VECTOR)
		ok = say(out, "way", g->way, n->way);
	else if (faulted && !faulted->legal && g->vector + n->vector == KL_EXC_UD + KL_EXC_GP)
		; /* no instruction, and longer than one may be */
	else if (!(faulted && n->m.rip == g->m.rip &&
		   (two_operands_fault(faulted, g, n) || limit_and_alignment(p, faulted, g, n))))
		ok = say(out, "vector", (uint64_t)g->vector, (uint64_t)n->vector) &&
		     compare_fault(p, g, n, out);
	/* A fault of POPA may leave registers that have come already: it will be run again. */
	popa = faulted && faulted->legal &&
	       (faulted->in.mnemonic == ZYDIS_MNEMONIC_POPA ||
		faulted->in.mnemonic == ZYDIS_MNEMONIC_POPAD);
	for (unsigned i = 0; !popa && i < (p->mode == KL_CODE64 ? 16 : 8); i++)
		ok &= say(out, gpr_name[i], g->m.gpr[i] & mask, n->m.gpr[i] & mask);
	if (p->n == 1 && p->insn[0].legal)
		flags &= ~isa_undefined_flags(p->insn[0].in.mnemonic);
	/* If an interrupt came on the way, what the elements before it made of them is seen. */
	if (faulted && faulted->legal && isa_compares_strings(faulted->in.mnemonic) &&
	    (faulted->in.attributes & (ZYDIS_ATTRIB_HAS_REPE | ZYDIS_ATTRIB_HAS_REPNE)))
		flags &= ~(uint64_t)KL_FL_STATUS;
	ok &= say(out, "rflags", g->m.rflags & flags, n->m.rflags & flags);
	ok &= say(out, "fs base", g->m.fs_base, n->m.fs_base);
	ok &= say(out, "gs base", g->m.gs_base, n->m.gs_base);
	return ok &
	       compare_x(g->vector == KL_EXC_XM ? insn_at(p, g->m.rip) : NULL, g->m.x, n->m.x, out);
}

bool compare(const struct program *p, const struct outcome *guest, const struct outcome *native,
	     FILE *out)
{
	const struct insn *faulted = guest->vector == NO_VECTOR ? NULL : insn_at(p, guest->m.rip);
	struct outcome g, n;

	if (!faulted || !faulted->legal || faulted->in.meta.isa_set != ZYDIS_ISA_SET_AVX2GATHER ||
	    !kl_host_is_intel())
		return compare_all(p, guest, native, out);
	g = *guest;
	n = *native;
	spread_mask(faulted, &g);
	spread_mask(faulted, &n);
	return compare_all(p, &g, &n, out);
}

static bool compare_page(uint64_t lin, FILE *out)
{
	if (!memcmp(guest_memory(lin), native_memory(lin), KL_PAGE_SIZE))
		return true;
	for (unsigned k = 0, told = 0; out && k < KL_PAGE_SIZE && told < 8; k++)
		if (*guest_memory(lin + k) != *native_memory(lin + k)) {
			fprintf(out, "  memory at %#lx: vCPU %02x, processor %02x\n", lin + k,
				*guest_memory(lin + k), *native_memory(lin + k));
			told++;
		}
	return false;
}

bool compare_memory(bool patch, FILE *out)
{
	bool ok = true;

	for (uint64_t i = 0; patch && i < PATCH_SIZE; i += KL_PAGE_SIZE)
		ok &= compare_page(PATCH + i, out);
	for (unsigned i = 0; i < DATA_PAGES; i++)
		if (data_rights[i] == PAGE_RW)
			ok &= compare_page(DATA + i * KL_PAGE_SIZE, out);
	return ok;
}

void compare_resync(void)
{
	for (unsigned i = 0; i < DATA_PAGES; i++)
		if (data_rights[i] == PAGE_RW)
			memcpy(guest_memory(DATA + i * KL_PAGE_SIZE),
			       (void *)(DATA + i * KL_PAGE_SIZE), KL_PAGE_SIZE);
}

void print_program(const struct program *p, FILE *out)
{
	uint64_t at = p->at;
	ZydisFormatter f;
	char text[128];

	ZydisFormatterInit(&f, ZYDIS_FORMATTER_STYLE_INTEL);
	for (unsigned k = 0; k < p->n; k++) {
		const struct insn *i = &p->insn[k];

		fprintf(out, "  %8lx ", at);
		for (unsigned b = 0; b < i->len; b++)
			fprintf(out, " %02x", i->bytes[b]);
		strcpy(text, "(no instruction)");
		if (i->legal)
			ZydisFormatterFormatInstruction(&f, &i->in, i->op,
							i->in.operand_count_visible, text,
							sizeof(text), at, NULL);
		fprintf(out, "%*s%s\n", i->len < 12 ? 3 * (12 - i->len) : 1, "", text);
		at += i->len;
	}
}

void print_machine(const struct machine *m, FILE *out)
{
	for (unsigned i = 0; i < 16; i++)
		fprintf(out, "%s%-3s %016lx", i % 4 ? "  " : "  ", gpr_name[i], m->gpr[i]),
			fputs(i % 4 == 3 ? "\n" : "", out);
	fprintf(out, "  rflags %lx, fs base %lx, gs base %lx\n", m->rflags, m->fs_base, m->gs_base);
	fprintf(out, "  fcw %04lx fsw %04lx ftw %02x mxcsr %08lx\n", word(m->x, 2),
		word(m->x + 2, 2), m->x[4], word(m->x + 24, 4));
	for (unsigned i = 0; i < 8; i++)
		fprintf(out, "  st%u %04lx:%016lx%s", i, word(m->x + 40 + 16 * i, 2),
			word(m->x + 32 + 16 * i, 8), i & 1 ? "\n" : "");
	for (unsigned i = 0; i < 16; i++)
		fprintf(out, "  %2u: %016lx %016lx %016lx %016lx\n", i,
			word(m->x + 576 + 16 * i + 8, 8), word(m->x + 576 + 16 * i, 8),
			word(m->x + 160 + 16 * i + 8, 8), word(m->x + 160 + 16 * i, 8));
}
