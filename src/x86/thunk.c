/* SPDX-License-Identifier: MIT */
#include "x86/decode.h"

bool kl_select_sse(struct kl_decode *d)
{
	return false;
}

bool kl_select_x87(struct kl_decode *d)
{
	return false;
}
