/* SPDX-License-Identifier: MIT */
/*
 * Which instructions take part: those that CPUID offers the guest and that need nothing of
 * the system which differs between a guest of kvmlet and a process of this host.
 */
#include <string.h>

#include "fuzz.h"
#include "host/cpu.h"

static const struct kl_vcpu *cpu;

void isa_init(const struct kl_vcpu *v)
{
	cpu = v;
}

const ZydisDecoder *isa_decoder(enum kl_code_mode mode)
{
	static ZydisDecoder dec[3];
	static bool ready;

	if (!ready) {
		ZydisDecoderInit(&dec[KL_CODE16], ZYDIS_MACHINE_MODE_LONG_COMPAT_16,
				 ZYDIS_STACK_WIDTH_16);
		ZydisDecoderInit(&dec[KL_CODE32], ZYDIS_MACHINE_MODE_LONG_COMPAT_32,
				 ZYDIS_STACK_WIDTH_32);
		ZydisDecoderInit(&dec[KL_CODE64], ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
		for (unsigned i = 0; i < 3; i++) {
			/* NOPs on processors without the features */
			ZydisDecoderEnableMode(&dec[i], ZYDIS_DECODER_MODE_MPX, ZYAN_FALSE);
			ZydisDecoderEnableMode(&dec[i], ZYDIS_DECODER_MODE_CET, ZYAN_FALSE);
			ZydisDecoderEnableMode(&dec[i], ZYDIS_DECODER_MODE_CLDEMOTE, ZYAN_FALSE);
			ZydisDecoderEnableMode(&dec[i], ZYDIS_DECODER_MODE_AMD_BRANCHES,
					       !kl_host_is_intel());
		}
		ready = true;
	}
	return &dec[mode];
}

enum { EAX, EBX, ECX, EDX };

bool isa_has(uint32_t fn, uint32_t index, unsigned reg, unsigned bit)
{
	const struct kvm_cpuid_entry2 *e = kl_x86_find_cpuid((struct kl_vcpu *)cpu, fn, index);
	uint32_t r = 0;

	if (e)
		r = reg == EAX ? e->eax : reg == EBX ? e->ebx : reg == ECX ? e->ecx : e->edx;
	return r >> bit & 1;
}

bool isa_offered(ZydisISASet set)
{
	switch (set) {
	case ZYDIS_ISA_SET_I86:
	case ZYDIS_ISA_SET_I186:
	case ZYDIS_ISA_SET_I286REAL:
	case ZYDIS_ISA_SET_I286PROTECTED:
	case ZYDIS_ISA_SET_I386:
	case ZYDIS_ISA_SET_I486:
	case ZYDIS_ISA_SET_I486REAL:
	case ZYDIS_ISA_SET_PENTIUMREAL:
	case ZYDIS_ISA_SET_PPRO:
	case ZYDIS_ISA_SET_FAT_NOP:
	case ZYDIS_ISA_SET_PREFETCH_NOP:
	case ZYDIS_ISA_SET_LONGMODE:
	case ZYDIS_ISA_SET_PAUSE:
	case ZYDIS_ISA_SET_X87:
		return true;
	case ZYDIS_ISA_SET_CMOV:
	case ZYDIS_ISA_SET_FCMOV:
		return isa_has(1, 0, EDX, 15);
	case ZYDIS_ISA_SET_CLFSH:
		return isa_has(1, 0, EDX, 19);
	case ZYDIS_ISA_SET_PENTIUMMMX:
		return isa_has(1, 0, EDX, 23);
	case ZYDIS_ISA_SET_FXSAVE:
	case ZYDIS_ISA_SET_FXSAVE64:
		return isa_has(1, 0, EDX, 24);
	case ZYDIS_ISA_SET_SSE:
	case ZYDIS_ISA_SET_SSEMXCSR:
	case ZYDIS_ISA_SET_SSE_PREFETCH:
		return isa_has(1, 0, EDX, 25);
	case ZYDIS_ISA_SET_SSE2:
	case ZYDIS_ISA_SET_SSE2MMX:
		return isa_has(1, 0, EDX, 26);
	case ZYDIS_ISA_SET_SSE3:
	case ZYDIS_ISA_SET_SSE3X87:
		return isa_has(1, 0, ECX, 0);
	case ZYDIS_ISA_SET_PCLMULQDQ:
		return isa_has(1, 0, ECX, 1);
	case ZYDIS_ISA_SET_SSSE3:
	case ZYDIS_ISA_SET_SSSE3MMX:
		return isa_has(1, 0, ECX, 9);
	case ZYDIS_ISA_SET_FMA:
		return isa_has(1, 0, ECX, 12);
	case ZYDIS_ISA_SET_CMPXCHG16B:
		return isa_has(1, 0, ECX, 13);
	case ZYDIS_ISA_SET_SSE4:
		return isa_has(1, 0, ECX, 19);
	case ZYDIS_ISA_SET_SSE42:
		return isa_has(1, 0, ECX, 20);
	case ZYDIS_ISA_SET_MOVBE:
		return isa_has(1, 0, ECX, 22);
	case ZYDIS_ISA_SET_POPCNT:
		return isa_has(1, 0, ECX, 23);
	case ZYDIS_ISA_SET_AES:
		return isa_has(1, 0, ECX, 25);
	case ZYDIS_ISA_SET_XSAVE:
		return isa_has(1, 0, ECX, 26);
	case ZYDIS_ISA_SET_AVX:
		return isa_has(1, 0, ECX, 28);
	case ZYDIS_ISA_SET_AVXAES:
		return isa_has(1, 0, ECX, 28) && isa_has(1, 0, ECX, 25);
	case ZYDIS_ISA_SET_F16C:
		return isa_has(1, 0, ECX, 29);
	case ZYDIS_ISA_SET_RDWRFSGS:
		return isa_has(7, 0, EBX, 0);
	case ZYDIS_ISA_SET_BMI1:
		return isa_has(7, 0, EBX, 3);
	case ZYDIS_ISA_SET_AVX2:
	case ZYDIS_ISA_SET_AVX2GATHER:
		return isa_has(7, 0, EBX, 5);
	case ZYDIS_ISA_SET_BMI2:
		return isa_has(7, 0, EBX, 8);
	case ZYDIS_ISA_SET_ADOX_ADCX:
		return isa_has(7, 0, EBX, 19);
	case ZYDIS_ISA_SET_CLFLUSHOPT:
		return isa_has(7, 0, EBX, 23);
	case ZYDIS_ISA_SET_CLWB:
		return isa_has(7, 0, EBX, 24);
	case ZYDIS_ISA_SET_SHA:
		return isa_has(7, 0, EBX, 29);
	case ZYDIS_ISA_SET_GFNI:
	case ZYDIS_ISA_SET_AVX_GFNI:
		return isa_has(7, 0, ECX, 8);
	case ZYDIS_ISA_SET_VAES:
		return isa_has(7, 0, ECX, 9);
	case ZYDIS_ISA_SET_VPCLMULQDQ:
		return isa_has(7, 0, ECX, 10);
	case ZYDIS_ISA_SET_XSAVEOPT:
		return isa_has(0xd, 1, EAX, 0);
	case ZYDIS_ISA_SET_XSAVEC:
		return isa_has(0xd, 1, EAX, 1);
	case ZYDIS_ISA_SET_LAHF:
		return isa_has(0x80000001, 0, ECX, 0);
	case ZYDIS_ISA_SET_LZCNT:
		return isa_has(0x80000001, 0, ECX, 5);
	case ZYDIS_ISA_SET_SSE4A:
		return isa_has(0x80000001, 0, ECX, 6);
	default:
		return false;
	}
}

/* What the system behind it, or the process, would notice. */
static bool excluded(ZydisMnemonic m)
{
	switch (m) {
	/* Calls of the kernel, and traps that are not faults */
	case ZYDIS_MNEMONIC_SYSCALL:
	case ZYDIS_MNEMONIC_SYSENTER:
	case ZYDIS_MNEMONIC_SYSRET:
	case ZYDIS_MNEMONIC_SYSEXIT:
	case ZYDIS_MNEMONIC_INT:
	case ZYDIS_MNEMONIC_INT1:
	case ZYDIS_MNEMONIC_INT3:
	case ZYDIS_MNEMONIC_INTO:
	case ZYDIS_MNEMONIC_VMCALL:
	case ZYDIS_MNEMONIC_VMMCALL:
	/* Differ by what they are asked, or when */
	case ZYDIS_MNEMONIC_CPUID:
	case ZYDIS_MNEMONIC_RDTSC:
	case ZYDIS_MNEMONIC_RDTSCP:
	case ZYDIS_MNEMONIC_RDPID:
	case ZYDIS_MNEMONIC_RDPMC:
	case ZYDIS_MNEMONIC_RDRAND:
	case ZYDIS_MNEMONIC_RDSEED:
	case ZYDIS_MNEMONIC_XGETBV:
	/* The kernel emulates these for processes where they fault (UMIP) */
	case ZYDIS_MNEMONIC_SGDT:
	case ZYDIS_MNEMONIC_SIDT:
	case ZYDIS_MNEMONIC_SLDT:
	case ZYDIS_MNEMONIC_STR:
	case ZYDIS_MNEMONIC_SMSW:
	/* Descriptors */
	case ZYDIS_MNEMONIC_LAR:
	case ZYDIS_MNEMONIC_LSL:
	case ZYDIS_MNEMONIC_VERR:
	case ZYDIS_MNEMONIC_VERW:
	case ZYDIS_MNEMONIC_LDS:
	case ZYDIS_MNEMONIC_LES:
	case ZYDIS_MNEMONIC_LSS:
	case ZYDIS_MNEMONIC_LFS:
	case ZYDIS_MNEMONIC_LGS:
	case ZYDIS_MNEMONIC_IRET:
	case ZYDIS_MNEMONIC_IRETD:
	case ZYDIS_MNEMONIC_IRETQ:
		return true;
	default:
		return false;
	}
}

static bool writes_segment(const ZydisDecodedInstruction *in, const ZydisDecodedOperand *op)
{
	for (unsigned i = 0; i < in->operand_count_visible; i++)
		if (op[i].type == ZYDIS_OPERAND_TYPE_REGISTER &&
		    ZydisRegisterGetClass(op[i].reg.value) == ZYDIS_REGCLASS_SEGMENT &&
		    (op[i].actions & ZYDIS_OPERAND_ACTION_MASK_WRITE))
			return true;
	return false;
}

/* Selectors that no process has in common with the guest: what SS and CS show is fixed. */
static bool far(const ZydisDecodedInstruction *in)
{
	return in->meta.branch_type == ZYDIS_BRANCH_TYPE_FAR ||
	       (in->mnemonic == ZYDIS_MNEMONIC_RET && in->opcode != 0xc3 && in->opcode != 0xc2);
}

/*
 * What manuals call reserved, and this processor gives a meaning of its own: LOOPE and LOOPNE take
 * the condition that a REP prefix has.
 */
static bool reserved(const ZydisDecodedInstruction *in)
{
	if (in->mnemonic != ZYDIS_MNEMONIC_LOOPE && in->mnemonic != ZYDIS_MNEMONIC_LOOPNE)
		return false;
	for (unsigned i = 0; i < in->raw.prefix_count; i++)
		if (in->raw.prefixes[i].value == 0xf2 || in->raw.prefixes[i].value == 0xf3)
			return true;
	return false;
}

/* The same among what is no instruction: Zen 4 takes LOCK VERW for VERW. */
bool isa_reserved_bytes(const uint8_t *p, unsigned n)
{
	bool lock = false;
	unsigned i = 0;

	for (; i < n && p[i] &&
	       (strchr("\x66\x67\xf2\xf3\x26\x2e\x36\x3e\x64\x65\xf0", p[i]) ||
		(p[i] & 0xf0) == 0x40);
	     i++)
		lock |= p[i] == 0xf0;
	return lock && i + 2 < n && p[i] == 0x0f && !p[i + 1] && (p[i + 2] >> 3 & 7) == 5;
}

/*
 * Several accesses: which of them a processor makes first, and so the address of a fault, is its
 * own affair.
 */
bool isa_piecewise(const ZydisDecodedInstruction *in)
{
	switch (in->mnemonic) {
	case ZYDIS_MNEMONIC_FLDENV:
	case ZYDIS_MNEMONIC_FNSTENV:
	case ZYDIS_MNEMONIC_FRSTOR:
	case ZYDIS_MNEMONIC_FNSAVE:
	case ZYDIS_MNEMONIC_FXSAVE:
	case ZYDIS_MNEMONIC_FXSAVE64:
	case ZYDIS_MNEMONIC_FXRSTOR:
	case ZYDIS_MNEMONIC_FXRSTOR64:
	case ZYDIS_MNEMONIC_XSAVE:
	case ZYDIS_MNEMONIC_XSAVE64:
	case ZYDIS_MNEMONIC_XSAVEC:
	case ZYDIS_MNEMONIC_XSAVEC64:
	case ZYDIS_MNEMONIC_XSAVEOPT:
	case ZYDIS_MNEMONIC_XSAVEOPT64:
	case ZYDIS_MNEMONIC_XRSTOR:
	case ZYDIS_MNEMONIC_XRSTOR64:
	case ZYDIS_MNEMONIC_MASKMOVQ:
	case ZYDIS_MNEMONIC_MASKMOVDQU:
	case ZYDIS_MNEMONIC_VMASKMOVDQU:
	case ZYDIS_MNEMONIC_VMASKMOVPS:
	case ZYDIS_MNEMONIC_VMASKMOVPD:
	case ZYDIS_MNEMONIC_VPMASKMOVD:
	case ZYDIS_MNEMONIC_VPMASKMOVQ:
		return true;
	case ZYDIS_MNEMONIC_CMPSB:
	case ZYDIS_MNEMONIC_CMPSW:
	case ZYDIS_MNEMONIC_CMPSD:
	case ZYDIS_MNEMONIC_CMPSQ:
		return in->attributes & (ZYDIS_ATTRIB_HAS_REPE | ZYDIS_ATTRIB_HAS_REPNE);
	default:
		return false;
	}
}

bool isa_compares_strings(ZydisMnemonic m)
{
	switch (m) {
	case ZYDIS_MNEMONIC_CMPSB:
	case ZYDIS_MNEMONIC_CMPSW:
	case ZYDIS_MNEMONIC_CMPSD:
	case ZYDIS_MNEMONIC_CMPSQ:
	case ZYDIS_MNEMONIC_SCASB:
	case ZYDIS_MNEMONIC_SCASW:
	case ZYDIS_MNEMONIC_SCASD:
	case ZYDIS_MNEMONIC_SCASQ:
		return true;
	default:
		return false;
	}
}

/*
 * Show the pointers to the last x87 instruction and its operand, with selectors: the vCPU's are
 * not those of each processor (docs/deviations.md).
 */
bool isa_saves_pointers(ZydisMnemonic m)
{
	switch (m) {
	case ZYDIS_MNEMONIC_FNSTENV:
	case ZYDIS_MNEMONIC_FNSAVE:
	case ZYDIS_MNEMONIC_FXSAVE:
	case ZYDIS_MNEMONIC_FXSAVE64:
		return true;
	default:
		return false;
	}
}

/* Flags that the manuals leave undefined, and that are computed in C, not by the processor. */
uint64_t isa_undefined_flags(ZydisMnemonic m)
{
	switch (m) {
	case ZYDIS_MNEMONIC_AAA:
	case ZYDIS_MNEMONIC_AAS:
		return KL_FL_OF | KL_FL_SF | KL_FL_ZF | KL_FL_PF;
	case ZYDIS_MNEMONIC_DAA:
	case ZYDIS_MNEMONIC_DAS:
		return KL_FL_OF;
	case ZYDIS_MNEMONIC_AAM:
	case ZYDIS_MNEMONIC_AAD:
		return KL_FL_OF | KL_FL_AF | KL_FL_CF;
	default:
		return 0;
	}
}

/* XSAVE with its bitmap in a register of the address: bits that only the process may save. */
static bool bitmap_in_address(const ZydisDecodedInstruction *in, const ZydisDecodedOperand *op)
{
	int base = ZydisRegisterGetId(op[0].mem.base), index = ZydisRegisterGetId(op[0].mem.index);

	return (in->meta.category == ZYDIS_CATEGORY_XSAVE ||
		in->meta.category == ZYDIS_CATEGORY_XSAVEOPT) &&
	       op[0].type == ZYDIS_OPERAND_TYPE_MEMORY &&
	       (base == KL_RAX || base == KL_RDX || index == KL_RAX || index == KL_RDX);
}

bool isa_usable(const ZydisDecodedInstruction *in, const ZydisDecodedOperand *op)
{
	return (in->encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY ||
		in->encoding == ZYDIS_INSTRUCTION_ENCODING_VEX) &&
	       isa_offered(in->meta.isa_set) && !reserved(in) && !excluded(in->mnemonic) &&
	       !far(in) && !(op && (writes_segment(in, op) || bitmap_in_address(in, op)));
}
