/* SPDX-License-Identifier: MIT */
/* What the host's processor is, where vendors differ. */
#pragma once

#include "base/compiler.h"

bool kl_host_is_intel(void);
