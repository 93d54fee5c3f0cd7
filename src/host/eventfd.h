/* SPDX-License-Identifier: MIT */
/*
 * The program's eventfds. The engine works on duplicates of its own, so that it keeps the eventfd
 * whatever the program does to its descriptors.
 *
 * Context of all: no guest memory; they do not block.
 */
#pragma once

#include "base/compiler.h"

/*
 * Is @fd an eventfd, and which one? *id: the kernel's number + 1, or 0 where it has none or does
 * not say. 0; -EBADF; -EINVAL, something else.
 */
int kl_eventfd_identify(int fd, uint64_t *id) KL_MUST_CHECK;

/* Do two descriptors stand for the same eventfd? The ids are kl_eventfd_identify()'s. */
bool kl_eventfd_same(int fd1, uint64_t id1, int fd2, uint64_t id2);

bool kl_eventfd_readable(int fd);

/* Add 1, unless it is full: then it stays so, and readable, as in the kernel. */
void kl_eventfd_signal(int fd);

/* Take what it holds (one, if it is a semaphore), unless somebody was quicker. */
void kl_eventfd_consume(int fd);
