/* SPDX-License-Identifier: MIT */
/*
 * What the rest of mem/ tells the notifier gate: births and deaths of VMs.
 */
#pragma once

#include "base/compiler.h"

struct kl_vm;

/* A VM that has no slot yet. */
void kl_notifier_add_vm(struct kl_vm *vm);
/*
 * Waits for brackets of other threads over the VM's memory. Afterwards no bracket knows the VM.
 * A second call does nothing.
 */
void kl_notifier_remove_vm(struct kl_vm *vm);
/* @fn for the host memory in [@start, @end) of every slot of every VM, in a reader section. */
void kl_notifier_walk_slots(uint64_t start, uint64_t end, void (*fn)(uint64_t, uint64_t));
/* Is a bracket over host memory [@start, @end) in flight? No lock. */
bool kl_notifier_in_flight(uint64_t start, uint64_t end);
/*
 * From here on brackets over host memory [@start, @end) look whether they touch something. Waits
 * for none of them. Context: no lock above NOTIFIER.
 */
void kl_notifier_cover(uint64_t start, uint64_t end);
/* In a forked child: no VM, no bracket. */
void kl_notifier_after_fork(void);
