/* SPDX-License-Identifier: MIT */
/* Wrappers that other files of preload/ call as the program would. */
#pragma once

#include "preload/real.h"

#define WRAPPED(ret, name, args) ret wrap_##name args __asm__(#name)
