/* SPDX-License-Identifier: MIT */
/*
 * Making a host page present, as KVM's hva_to_pfn does.
 */
#pragma once

#include <kvmlet/types.h>

#include "base/compiler.h"

/*
 * Touch the page at @hva so that it is resident; for writing if @write.
 *
 * On success *writable says whether the page may be written from here on: as @write says. Whether
 * a page that was read could be written, too, is not tried; that would break copy-on-write.
 *
 * Context: no lock, no reader section; may sleep for as long as a userfaultfd handler
 * pleases; interruptible by a program signal while the thread runs a vCPU or said that it is.
 * Returns: 0; -EFAULT nothing there, or not writable and @write; -EINTR; -EHWPOISON.
 */
int kl_host_populate(kl_hva_t hva, bool write, bool *writable) KL_MUST_CHECK;

/*
 * Would a touch of the page at @hva have to wait for the program, because it is absent from memory
 * that is registered with a userfaultfd? Of other reasons to wait (swap, files, a userfaultfd's
 * write protection) nothing is known: false.
 */
bool kl_host_must_wait(kl_hva_t hva);
