/* SPDX-License-Identifier: MIT */
/*
 * kvmlet: KVM's guest-memory subsystem in userspace. This header includes all others.
 *
 * Values are returned as 0 or -errno; results through out-pointers.
 */
#ifndef KVMLET_KVMLET_H
#define KVMLET_KVMLET_H

#include <kvmlet/dirty.h>
#include <kvmlet/gmem.h>
#include <kvmlet/gpc.h>
#include <kvmlet/memslot.h>
#include <kvmlet/notifier.h>
#include <kvmlet/track.h>
#include <kvmlet/types.h>
#include <kvmlet/vm.h>

#ifdef __cplusplus
extern "C" {
#endif

/** Version of the library, "MAJOR.MINOR.PATCH". Context: any. */
const char *kvmlet_version(void);

#ifdef __cplusplus
}
#endif

#endif
