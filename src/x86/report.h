/* SPDX-License-Identifier: MIT */
/*
 * What a vCPU writes to tracked pages, to the trackers (T1, mmu/track.h).
 *
 * Such pages have no write tags in the TLB, so all stores to them end in access.c, and A and D bits
 * in paging.c. A store reports at once, when it is done. What is written through a pointer that a
 * handler still has (locked and other read-modify-writes), and what a page walk writes, whose
 * caller holds pointers, is noted, and reported when nobody holds one: at the end of the
 * instruction; before the access for which there was a walk starts over. An instruction that ends
 * early has written nothing through its pointer.
 */
#pragma once

#include "x86/vcpu.h"

/* Bytes in one page. */
struct kl_written {
	uint64_t gpa;
	const void *bytes;
	unsigned len;
};

/* Context: IN_GUEST, no pointer into guest memory held; none survives. Does not leave by longjmp.
 */
void kl_report_write(struct kl_vcpu *v, const struct kl_written *w, unsigned n);
/* The same, of what was noted. */
void kl_report_notes(struct kl_vcpu *v);

/* A bit in an entry of a page table was set: it is @val now. */
void kl_note_value(struct kl_vcpu *v, uint64_t gpa, uint64_t val, unsigned len);
/* A handler is about to write @len bytes, 16 at most; what they are is looked at afterwards. */
void kl_note_operand(struct kl_vcpu *v, uint64_t gpa, unsigned len);
