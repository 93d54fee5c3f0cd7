/* SPDX-License-Identifier: MIT */
#include "host/cpu.h"

#include <cpuid.h>

bool kl_host_is_intel(void)
{
	static _Atomic int cached; /* CPUID is slow in a virtual machine */
	int intel = atomic_load_explicit(&cached, memory_order_relaxed);
	uint32_t a, b = 0, c, d;

	if (!intel) {
		__get_cpuid(0, &a, &b, &c, &d);
		intel = b == signature_INTEL_ebx ? 1 : -1;
		atomic_store_explicit(&cached, intel, memory_order_relaxed);
	}
	return intel > 0;
}
