/* SPDX-License-Identifier: MIT */
/*
 * A slot appears between the two halves of an instruction that reads and writes a device: a
 * locked one acts on the memory, as a whole, and an unlocked one may store what it was about to.
 */
#include "t.h"

/* lock inc word [DATA]; out 0x10, al; jmp start */
static const uint8_t code_inc[] = {0xf0, 0xff, 0x06, 0x00, 0x80, 0xe6, 0x10, 0xeb, 0xf7};
/* xchg [DATA], ax; out 0x10, al; jmp start */
static const uint8_t code_xchg[] = {0x87, 0x06, 0x00, 0x80, 0xe6, 0x10, 0xeb, 0xf8};
/* lock cmpxchg [DATA], bx; out 0x10, al; jmp start */
static const uint8_t code_cas[] = {0xf0, 0x0f, 0xb1, 0x1e, 0x00, 0x80, 0xe6, 0x10, 0xeb, 0xf6};

static uint16_t *place;

/* S3, M4: the device answers 0x1111; then there is memory with 0x2222 in it. */
static void appears(const uint8_t *code, size_t n, uint16_t then, int out)
{
	struct kvm_regs regs = {.rip = CODE, .rflags = 2, .rax = 0x1111, .rbx = 0x3333};
	uint16_t answer = 0x1111;
	struct vm v;

	t_vm(&v, code, n);
	NEED(!ioctl(v.vcpu, KVM_SET_REGS, &regs));
	NEED(!t_run(&v));
	if (v.run->exit_reason == KVM_EXIT_INTERNAL_ERROR && !t_preloaded()) {
		fprintf(stderr, "this KVM does not emulate it\n");
		t_free(&v);
		return;
	}
	NEED(v.run->exit_reason == KVM_EXIT_MMIO && !v.run->mmio.is_write);
	memcpy(v.run->mmio.data, &answer, sizeof(answer));
	*place = 0x2222;
	NEED(!t_slot(&v, SLOT_DATA, DATA, T_PAGE, place));
	CHECK(t_out(&v) == out);
	CHECK(*place == then);
	t_free(&v);
}

int main(void)
{
	place = mmap(NULL, T_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	NEED(place != MAP_FAILED);
	appears(code_inc, sizeof(code_inc), 0x2223, 0x11);
	appears(code_xchg, sizeof(code_xchg), 0x1111, 0x22);
	appears(code_cas, sizeof(code_cas), 0x2222, 0x22);
	return t_done();
}
