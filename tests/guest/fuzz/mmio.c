/* SPDX-License-Identifier: MIT */
/*
 * U2: which instructions may have an operand in MMIO. The list is of mnemonics, written from what
 * KVM 6.12's emulator is known to handle, and knows nothing of emul_table.c, which goes by
 * opcodes.
 */
#include <stdio.h>
#include <string.h>

#include "fuzz.h"

/* And SETcc, CMOVcc, and one form of MOVQ. */
static const char *const emulated[] = {
	"add",
	"or",
	"adc",
	"sbb",
	"and",
	"sub",
	"xor",
	"cmp",
	"test",
	"mov",
	"xchg",
	"inc",
	"dec",
	"not",
	"neg",
	"mul",
	"imul",
	"div",
	"idiv",
	"rol",
	"ror",
	"rcl",
	"rcr",
	"shl",
	"shr",
	"sar",
	"shld",
	"shrd",
	"bt",
	"bts",
	"btr",
	"btc",
	"bsf",
	"bsr",
	"movzx",
	"movsx",
	"movsxd",
	"movnti",
	"movbe",
	"xadd",
	"cmpxchg",
	"cmpxchg8b",
	"push",
	"pop",
	"jmp",
	"call",
	"movups",
	"movupd",
	"movaps",
	"movapd",
	"movntps",
	"movntpd",
	"movdqa",
	"movdqu",
	"movntdq",
	"fnstcw",
	"fnstsw",
	/* F3 before BSF and BSR is ignored, as on processors without them. */
	"tzcnt",
	"lzcnt",
	"fxsave",
	"fxsave64",
	"fxrstor",
	"fxrstor64",
};

static bool is_emulated(const struct insn *i)
{
	const char *name = ZydisMnemonicGetString(i->in.mnemonic);

	if (i->in.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY)
		return false;
	if (!strncmp(name, "set", 3) || !strncmp(name, "cmov", 4))
		return true;
	if (i->in.mnemonic == ZYDIS_MNEMONIC_MOVQ) /* 0F 6F and 0F 7F */
		return (i->in.opcode & 0x6f) == 0x6f;
	for (unsigned k = 0; k < KL_ARRAY_SIZE(emulated); k++)
		if (!strcmp(name, emulated[k]))
			return true;
	return false;
}

static unsigned bad, tried, exits;

static void check(struct program *p)
{
	const struct insn *i = &p->insn[0];
	struct machine m = {.rflags = 2 | KL_FL_IF};
	enum mmio got;

	if (i->op[0].type != ZYDIS_OPERAND_TYPE_MEMORY &&
	    i->op[1].type != ZYDIS_OPERAND_TYPE_MEMORY &&
	    i->op[2].type != ZYDIS_OPERAND_TYPE_MEMORY)
		return;
	memcpy(m.x, (uint8_t[4]){0x7f, 0x03}, 4);
	memcpy(m.x + 24, &(uint32_t){0x1f80}, 4);
	memset(m.x + 160, 0xff, 256); /* masks of all kinds select */
	for (unsigned k = 0; k < 16; k++)
		m.gpr[k] = MMIO + 0x100;
	m.gpr[KL_RCX] = 1;
	m.gpr[KL_RSP] = DATA + 2 * KL_PAGE_SIZE;
	got = guest_run_mmio(p, &m);
	if (got == MMIO_NEITHER)
		return; /* no access, or #UD and #GP before it */
	tried++;
	exits += got == MMIO_EXIT;
	if ((got == MMIO_EXIT) == is_emulated(i))
		return;
	printf("MMIO %s:\n", got == MMIO_EXIT ? "exit" : "failure");
	print_program(p, stdout);
	bad++;
}

bool mmio_check(void)
{
	guest_map_mmio();
	generate_each_memory_form(check);
	printf("MMIO: %u forms, %u of them exit, %u wrongly\n", tried, exits, bad);
	return !bad && exits > 100 && tried > exits;
}
