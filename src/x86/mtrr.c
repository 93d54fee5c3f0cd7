/* SPDX-License-Identifier: MIT */
/* MTRRs and the PAT: stored, without effect. */
#include "x86/msr.h"
#include "x86/paging.h"

int kl_mtrr_slot(uint32_t index)
{
	if (index >= KL_MSR_MTRR_VAR0 && index <= KL_MSR_MTRR_VAR15)
		return (int)(index - KL_MSR_MTRR_VAR0);
	if (index == KL_MSR_MTRR_FIX64K)
		return 16;
	if (index >= KL_MSR_MTRR_FIX16K && index < KL_MSR_MTRR_FIX16K + 2)
		return (int)(17 + index - KL_MSR_MTRR_FIX16K);
	if (index >= KL_MSR_MTRR_FIX4K && index < KL_MSR_MTRR_FIX4K + 8)
		return (int)(19 + index - KL_MSR_MTRR_FIX4K);
	return index == KL_MSR_MTRR_DEFTYPE ? 27 : -1;
}

static bool memory_type(uint64_t t)
{
	return t < 8 && ((0x73u >> t) & 1);
}

bool kl_mtrr_valid(struct kl_vcpu *v, int slot, uint64_t data)
{
	uint64_t reserved = kl_reserved_gpa_bits(v) | 0xfff0000000000000ull;

	if (slot == 27)
		return !(data & ~0xcffull) && memory_type(data & 0xff);
	if (slot >= 16) {
		for (unsigned i = 0; i < 64; i += 8)
			if (!memory_type((data >> i) & 0xff))
				return false;
		return true;
	}
	if (slot & 1)
		return !(data & (reserved | 0x7ff));
	return memory_type(data & 0xff) && !(data & (reserved | 0xf00));
}

bool kl_pat_valid(uint64_t data)
{
	for (unsigned i = 0; i < 64; i += 8) {
		unsigned t = (data >> i) & 0xff;

		if (t > 7 || t == 2 || t == 3)
			return false;
	}
	return true;
}
