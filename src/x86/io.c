/* SPDX-License-Identifier: MIT */
/*
 * IN, OUT, INS, OUTS: permissions, and the exits they end in. run.c offers an OUT to the
 * engine's own devices before it leaves KVM_RUN, and completes what comes back.
 */
#include <string.h>

#include "x86/access.h"
#include "x86/debug.h"
#include "x86/insn.h"
#include "x86/segment.h"

#define READ_AHEAD 1024u /* bytes that KVM lets a REP INS ask for at once */

static void check_port(struct kl_vcpu *v, unsigned port, unsigned size)
{
	const struct kvm_segment *tr = &v->seg[KL_TR];
	uint16_t base, bits;

	if (kl_real_mode(v))
		return;
	if (!kl_vm86(v) && v->cpl <= ((v->rflags & KL_FL_IOPL) >> 12))
		return;
	if (tr->unusable || (tr->type & 13) != 9 || tr->limit < 103)
		kl_raise_error(v, KL_EXC_GP, 0);
	kl_read_system(v, tr->base + 102, &base, 2);
	if (base + port / 8 + 1 > tr->limit)
		kl_raise_error(v, KL_EXC_GP, 0);
	kl_read_system(v, tr->base + base + port / 8, &bits, 2);
	if ((bits >> (port & 7)) & ((1u << size) - 1))
		kl_raise_error(v, KL_EXC_GP, 0);
}

static void io_exit(struct kl_vcpu *v, const struct kl_op *op, bool in, unsigned port,
		    unsigned count, enum kl_pending pending)
{
	v->exit.reason = KVM_EXIT_IO;
	v->exit.io.in = in;
	v->exit.io.size = op->opsize;
	v->exit.io.port = (uint16_t)port;
	v->exit.io.count = count;
	v->exit_pending = true;
	v->pending = pending;
	v->pending_rip = v->rip + (v->long_mode ? 0 : v->seg[KL_CS].base);
	v->pending_len = op->len;
	v->pending_size = op->opsize;
}

static unsigned port_of(struct kl_vcpu *v, const struct kl_op *op)
{
	return op->rm == KL_NOREG ? (uint8_t)op->imm : (uint16_t)v->gpr[KL_RDX];
}

enum kl_next kl_op_in(struct kl_vcpu *v, const struct kl_op *op)
{
	unsigned port = port_of(v, op);

	check_port(v, port, op->opsize);
	kl_debug_io(v, port, op->opsize);
	memset(v->pio_data, 0, op->opsize);
	io_exit(v, op, true, port, 1, KL_PENDING_PIO_IN);
	return KL_JUMPED_STOP; /* rip moves when the answer is there */
}

enum kl_next kl_op_out(struct kl_vcpu *v, const struct kl_op *op)
{
	unsigned port = port_of(v, op);

	check_port(v, port, op->opsize);
	kl_debug_io(v, port, op->opsize);
	memcpy(v->pio_data, &v->gpr[KL_RAX], op->opsize);
	io_exit(v, op, false, port, 1, KL_PENDING_PIO_OUT);
	return KL_JUMPED_STOP;
}

/* ---- strings ---- */

static uint64_t address_mask(const struct kl_op *op)
{
	return op->addrsize == 8 ? ~0ull : op->addrsize == 4 ? 0xffffffff : 0xffff;
}

static bool repeated(const struct kl_op *op)
{
	return op->flags & (KL_OPF_REP | KL_OPF_REPNE);
}

static void advance(struct kl_vcpu *v, const struct kl_op *op, enum kl_gpr index)
{
	uint64_t step = v->rflags & KL_FL_DF ? -(uint64_t)op->opsize : op->opsize;

	kl_gpr_set(v, (uint8_t)(index * 8), v->gpr[index] + step, op->addrsize);
	if (repeated(op))
		kl_gpr_set(v, KL_RCX * 8, v->gpr[KL_RCX] - 1, op->addrsize);
}

/*
 * The data of an INS comes for several elements at once where they lie in one page; it is
 * stored when the instruction runs again. RCX is looked at anew for each element: the
 * program may have changed it.
 */
enum kl_next kl_op_ins(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t mask = address_mask(op), di = v->gpr[KL_RDI] & mask;
	unsigned in_page, n, size = op->opsize;

	if (v->pio_left && v->pending_size != size)
		v->pio_left = 0;
	while (v->pio_left) {
		uint64_t val = 0;

		if (repeated(op) && !(v->gpr[KL_RCX] & mask))
			break;
		di = v->gpr[KL_RDI] & mask;
		memcpy(&val, v->pio_data + v->pio_pos * size, size);
		kl_write(v, kl_seg_linear(v, KL_ES, di, size, true), val, size);
		kl_debug_io(v, (uint16_t)v->gpr[KL_RDX], size);
		advance(v, op, KL_RDI);
		v->pio_pos++;
		v->pio_left--;
		if (!repeated(op)) {
			v->pio_left = 0;
			return v->exit_pending ? KL_STOP : KL_NEXT;
		}
		if (v->exit_pending)
			return KL_JUMPED_STOP;
		if (!v->pio_left && (v->gpr[KL_RCX] & mask))
			return KL_JUMPED_STOP; /* events, then the rest */
	}
	v->pio_left = 0;
	check_port(v, (uint16_t)v->gpr[KL_RDX], size); /* also if there is nothing to do */
	if (repeated(op) && !(v->gpr[KL_RCX] & mask))
		return KL_NEXT;

	in_page = (unsigned)(di & ~KL_PAGE_MASK);
	if (!(v->rflags & KL_FL_DF))
		in_page = (unsigned)KL_PAGE_SIZE - in_page;
	n = kl_min(in_page, READ_AHEAD / size);
	if (!repeated(op))
		n = 1;
	else if ((v->gpr[KL_RCX] & mask) < n)
		n = (unsigned)(v->gpr[KL_RCX] & mask);
	if (!n)
		n = 1;
	memset(v->pio_data, 0, n * size);
	io_exit(v, op, true, (uint16_t)v->gpr[KL_RDX], n, KL_PENDING_PIO_STRING);
	return KL_JUMPED_STOP;
}

enum kl_next kl_op_outs(struct kl_vcpu *v, const struct kl_op *op)
{
	uint64_t mask = address_mask(op), val;
	unsigned port = (uint16_t)v->gpr[KL_RDX];

	check_port(v, port, op->opsize);
	if (repeated(op) && !(v->gpr[KL_RCX] & mask))
		return KL_NEXT;
	val = kl_read(v, kl_seg_linear(v, op->seg, v->gpr[KL_RSI] & mask, op->opsize, false),
		      op->opsize);
	memcpy(v->pio_data, &val, op->opsize);
	kl_debug_io(v, port, op->opsize);
	io_exit(v, op, false, port, 1, KL_PENDING_NONE);
	advance(v, op, KL_RSI);
	return repeated(op) && (v->gpr[KL_RCX] & mask) ? KL_JUMPED_STOP : KL_STOP;
}
