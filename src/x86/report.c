/* SPDX-License-Identifier: MIT */
#include "x86/report.h"

#include "base/log.h"
#include "mmu/track.h"
#include "x86/access.h"

/*
 * Out of guest mode and back, as for a stage-2 miss. The report begins inside, so that who takes
 * the slot away, and has waited for this vCPU to leave, waits for the report, too.
 */
static jmp_buf *leave(struct kl_vcpu *v, int *token)
{
	jmp_buf *guard = kl_self.guard;

	*token = kl_track_begin(v->core.vm);
	kl_vcpu_leave_guest(&v->core);
	kl_self.guard = NULL; /* a trap in a tracker is not the guest's */
	return guard;
}

static void enter(struct kl_vcpu *v, jmp_buf *guard, int token)
{
	kl_track_end(v->core.vm, token);
	kl_self.guard = guard;
	kl_guest_resume(v);
}

void kl_report_write(struct kl_vcpu *v, const struct kl_written *w, unsigned n)
{
	struct kl_vm *vm = v->core.vm;
	jmp_buf *guard;
	int token;

	guard = leave(v, &token);
	for (unsigned i = 0; i < n; i++)
		kl_track_write(vm, v->core.as_id, w[i].gpa, w[i].bytes, w[i].len);
	enter(v, guard, token);
}

void kl_note_value(struct kl_vcpu *v, uint64_t gpa, uint64_t val, unsigned len)
{
	KL_ASSERT(v->nr_notes < KL_ARRAY_SIZE(v->note));
	v->note[v->nr_notes++] =
		(struct kl_note){.gpa = gpa, .val = val, .len = (uint8_t)len, .known = true};
}

void kl_note_operand(struct kl_vcpu *v, uint64_t gpa, unsigned len)
{
	KL_ASSERT(v->nr_notes < KL_ARRAY_SIZE(v->note));
	v->note[v->nr_notes++] = (struct kl_note){.gpa = gpa, .len = (uint8_t)len};
	/* The block is left after this instruction, which is when the notes are looked at. */
	v->code_written = true;
}

void kl_report_notes(struct kl_vcpu *v)
{
	struct kl_vm *vm = v->core.vm;
	unsigned n = v->nr_notes;
	jmp_buf *guard;
	int token;

	v->nr_notes = 0;
	guard = leave(v, &token);
	for (unsigned i = 0; i < n; i++) {
		const struct kl_note *note = &v->note[i];
		uint8_t bytes[16];

		if (note->known)
			kl_track_write(vm, v->core.as_id, note->gpa, &note->val, note->len);
		else if (!kl_x86_read_phys(v, note->gpa, bytes, note->len))
			kl_track_write(vm, v->core.as_id, note->gpa, bytes, note->len);
	}
	enter(v, guard, token);
}
