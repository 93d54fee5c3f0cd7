/* SPDX-License-Identifier: MIT */
/*
 * What is different under Valgrind
 *   - Code in a file mapping, which a memfd's is, is translated once: what replaces it is never
 *     executed.
 *   - A handler cannot change the signal mask that the context it returns to has: the one that was
 *     there when the signal came is kept elsewhere, and put back.
 *   - SIGRTMAX is not the program's.
 */
#pragma once

#include "base/compiler.h"

bool kl_under_valgrind(void);
