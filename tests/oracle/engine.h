/* SPDX-License-Identifier: MIT */
/* The operations of ops.def, carried out by the library in a world like the oracle's. */
#pragma once

#include "oracle.h"

/* A fresh world; all of it. */
void engine_begin(void);
void engine_end(void);
/* Context: the thread is registered by engine_thread(). Aborts where the library makes no sense. */
void engine_do(const struct op *op, struct outcome *out);
/* The calling thread is thread @n of the scenario. */
void engine_thread(unsigned n);
