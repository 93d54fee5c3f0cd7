/* SPDX-License-Identifier: MIT */
/*
 * Descriptors that belong to the engine and not to the program: the preload library keeps
 * them out of the program's close(), close_range() and closefrom() (U4).
 *
 * Context: any; no lock. Unhide before the raw close.
 */
#pragma once

#include "base/compiler.h"

void kl_fd_hide(int fd);
void kl_fd_unhide(int fd);
bool kl_fd_hidden(int fd);
/* The first hidden descriptor >= @from, or -1. */
int kl_fd_next_hidden(unsigned from);
