/* SPDX-License-Identifier: MIT */
#include <string.h>

#include "host/access.h"

void kl_access_copy(void *dst, const void *src, size_t len)
{
#if KL_TSAN
	for (size_t i = 0; i < len; i++)
		kl_store8((uint8_t *)dst + i, kl_load8((const uint8_t *)src + i));
#else
	__asm__ volatile("1: rep movsb\n\t" KL_EXTABLE("1b")
			 : "+D"(dst), "+S"(src), "+c"(len)
			 :
			 : "memory");
#endif
}
