/* SPDX-License-Identifier: MIT */
/*
 * KVMLET_VCPU=check: each translation is compared with the interpreter each time that it runs.
 *
 * The block's ops are executed by op->fn one by one, with all stores on the slow path, which logs
 * them: the TLB has write tags only while a translation runs. Memory and state are put back; the
 * translation runs, and stops where the interpreter did. Then registers, flags, vectors, the fault
 * and the bytes stored are the same, or the program is aborted with both states on stderr. What the
 * guest goes on with is the translation's.
 *
 * Not executed twice, and so the end of what is compared in a block: system instructions, random
 * numbers, accesses to MMIO and to pages that are tracked or logged. What comes next in the block
 * is the interpreter's. A block is not compared while there are breakpoints; nor if a request, or a
 * host page that is not there, comes in between.
 *
 * One vCPU of the process at a time does this. Other threads may write what it reads: a difference
 * counts if it is there ATTEMPTS times in a row.
 */
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <Zydis/Zydis.h>

#include "host/guard.h"
#include "x86/fast.h"
#include "x86/xlate/xlate.h"

#define ATTEMPTS   10
#define MAX_STORES 512
#define X_SIZE     832 /* x87, SSE, AVX */
_Static_assert(X_SIZE % 8 == 0, "whole words");

/* Beside enum kl_leave: the op that runs is not to be executed twice. */
#define LEAVE_OP 64

struct store {
	uint8_t *p;
	uint64_t lin, len; /* lin: somewhere in the page */
	uint8_t old[64], new[64];
};

struct state {
	uint64_t gpr[16], rip, rflags, insn_count;
	struct kl_event_exception exc;
	uint8_t int_shadow;
	bool code_written;
	uint8_t x[X_SIZE];
};

struct kl_check {
	bool logging;
	unsigned stop, at; /* op that is not executed any more; that is */
	bool broken_off;
	unsigned nr;
	struct store store[MAX_STORES];
	struct state start, interp, xlate;
	jmp_buf outer;
};

static struct kl_check check;
static atomic_flag busy = ATOMIC_FLAG_INIT;

static bool requested(struct kl_vcpu *v)
{
	return atomic_load_explicit(&v->core.requests, memory_order_relaxed);
}

/* ---- stores ---- */

void kl_check_access(struct kl_vcpu *v, uint64_t lin, unsigned access, bool once, uint8_t *p,
		     unsigned len)
{
	struct kl_check *c = v->check;

	if (!c->logging)
		return;
	if (once)
		_longjmp(v->jmp, LEAVE_OP);
	for (unsigned done = 0, n; access == KL_ACC_WRITE && done < len; done += n) {
		struct store *s = &c->store[c->nr];

		n = kl_min(len - done, (unsigned)sizeof(s->old));
		if (c->nr == MAX_STORES)
			_longjmp(v->jmp, LEAVE_OP);
		kl_access_copy(s->old, p + done, n);
		s->lin = lin;
		s->p = p + done;
		s->len = n;
		c->nr++;
	}
}

/* Again, whatever kicks it out. */
static void copy(uint8_t *to, const uint8_t *from, uint64_t len)
{
	jmp_buf *outer = kl_self.guard;
	jmp_buf here;

	for (volatile unsigned tries = 0; tries < 100; tries++)
		if (kl_guard_enter(&here) == KL_GUARD_NONE) {
			kl_access_copy(to, from, len);
			break;
		}
	kl_guard_leave(outer);
}

static void look_at_stores(struct kl_check *c)
{
	for (unsigned i = 0; i < c->nr; i++)
		copy(c->store[i].new, c->store[i].p, c->store[i].len);
}

static void undo_stores(struct kl_check *c)
{
	for (unsigned i = c->nr; i-- > 0;)
		copy(c->store[i].p, c->store[i].old, c->store[i].len);
}

static bool same_stores(struct kl_check *c, bool tell)
{
	bool same = true;

	for (unsigned i = 0; i < c->nr; i++) {
		struct store *s = &c->store[i];
		uint8_t now[sizeof(s->new)];

		copy(now, s->p, s->len);
		if (!memcmp(now, s->new, s->len))
			continue;
		same = false;
		for (unsigned k = 0; tell && k < s->len; k++)
			if (now[k] != s->new[k])
				fprintf(stderr, "  store %u, host %p: %02x, translated %02x\n", i,
					(void *)(s->p + k), s->new[k], now[k]);
	}
	return same;
}

/* For the translation, which is to store without access.c's help. */
static void give_tags(struct kl_vcpu *v, struct kl_check *c)
{
	for (unsigned i = 0; i < c->nr; i++) {
		struct kl_tlb_entry *e = kl_tlb_entry(v, v->tlb_mode, c->store[i].lin);

		if (e->rtag == (c->store[i].lin & KL_PAGE_MASK))
			e->wtag = e->rtag;
	}
}

static void take_tags(struct kl_vcpu *v, struct kl_check *c)
{
	v->stack_limit = 0;
	for (unsigned i = 0; i < c->nr; i++)
		kl_tlb_entry(v, v->tlb_mode, c->store[i].lin)->wtag =
			kl_tlb_none(kl_tlb_index(c->store[i].lin));
}

/* ---- states ---- */

/*
 * Neither memcpy() nor memcmp(): they are the program's if it has its own, and the kernel's
 * selftests have some that go byte by byte.
 */
static void copy_state(void *to, const void *from, size_t len)
{
	len /= 8;
	__asm__ volatile("rep movsq" : "+D"(to), "+S"(from), "+c"(len) : : "memory");
}

static bool same_words(const void *a, const void *b, size_t len)
{
	const uint64_t *x = a, *y = b;
	uint64_t diff = 0;

	for (size_t i = 0; i < len / 8; i++)
		diff |= x[i] ^ y[i];
	return !diff;
}

static void capture(const struct kl_vcpu *v, struct state *s)
{
	copy_state(s->gpr, v->gpr, sizeof(s->gpr));
	s->rip = v->rip;
	s->rflags = v->rflags;
	s->insn_count = v->insn_count;
	s->exc = v->exc;
	s->int_shadow = v->int_shadow;
	s->code_written = v->code_written;
	copy_state(s->x, v->xsave, X_SIZE);
}

/* As at the beginning of the block. */
static void put_back(struct kl_vcpu *v, struct kl_block *b, const struct state *s)
{
	copy_state(v->gpr, s->gpr, sizeof(s->gpr));
	v->rip = s->rip;
	v->rflags = s->rflags;
	v->insn_count = s->insn_count;
	v->exc = s->exc;
	v->int_shadow = s->int_shadow;
	v->code_written = s->code_written;
	copy_state(v->xsave, s->x, X_SIZE);
	v->code_page = (uint8_t *)((uint64_t)b->code & KL_PAGE_MASK);
}

static bool same_exception(const struct state *a, const struct state *b)
{
	return a->exc.pending == b->exc.pending && a->exc.nr == b->exc.nr &&
	       a->exc.error == b->exc.error && a->exc.payload == b->exc.payload;
}

static bool same(const struct state *a, const struct state *b)
{
	return same_words(a->gpr, b->gpr, sizeof(a->gpr)) && a->rip == b->rip &&
	       a->rflags == b->rflags && a->insn_count == b->insn_count && same_exception(a, b) &&
	       same_words(a->x, b->x, X_SIZE);
}

static void print_state(const char *what, const struct state *s, int why)
{
	fprintf(stderr, " %s: rip %lx, rflags %lx, %lu instructions, ends with %d", what, s->rip,
		s->rflags, s->insn_count, why);
	if (s->exc.pending)
		fprintf(stderr, ": exception %u, error %x, address %lx", s->exc.nr, s->exc.error,
			s->exc.payload);
	for (unsigned i = 0; i < 16; i++)
		fprintf(stderr, "%s%016lx", i % 4 ? " " : "\n  ", s->gpr[i]);
	fprintf(stderr, "\n");
}

static KL_NORETURN KL_COLD void differ(struct kl_vcpu *v, const struct kl_block *b,
				       struct kl_check *c, int why, int why_xlate)
{
	ZydisDecoder dec;
	ZydisFormatter f;
	ZydisDecodedInstruction in;
	ZydisDecodedOperand opnd[ZYDIS_MAX_OPERAND_COUNT];
	char text[128];

	ZydisDecoderInit(&dec, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
	ZydisFormatterInit(&f, ZYDIS_FORMATTER_STYLE_INTEL);
	fprintf(stderr, "kvmlet: a translation differs from the interpreter, up to op %u:\n",
		c->stop);
	for (unsigned i = 0; i < b->nr_ops; i++) {
		const struct kl_op *op = &b->ops[i];

		strcpy(text, "?");
		if (ZYAN_SUCCESS(ZydisDecoderDecodeFull(&dec, op->bytes, op->len, &in, opnd)))
			ZydisFormatterFormatInstruction(&f, &in, opnd, in.operand_count_visible,
							text, sizeof(text), b->rip + op->offset,
							NULL);
		fprintf(stderr, "  %lx ", b->rip + op->offset);
		for (unsigned k = 0; k < op->len; k++)
			fprintf(stderr, " %02x", op->bytes[k]);
		fprintf(stderr, "   %s\n", text);
	}
	print_state("before", &c->start, 0);
	print_state("interpreter", &c->interp, why);
	print_state("translation", &c->xlate, why_xlate);
	for (unsigned i = 0; i < X_SIZE; i += 8)
		if (memcmp(c->interp.x + i, c->xlate.x + i, 8)) {
			uint64_t x, y;

			memcpy(&x, c->interp.x + i, 8);
			memcpy(&y, c->xlate.x + i, 8);
			fprintf(stderr, "  xsave + %u: %016lx, translated %016lx\n", i, x, y);
		}
	(void)same_stores(c, true);
	abort();
}

/* ---- the two runs ---- */

/* May be executed as often as one likes: everything but memory is in struct state. */
static bool repeatable(const struct kl_op *op)
{
	static kl_op_fn *const system[] = {
#define FN(name) kl_op_##name,
		KL_SYSTEM_OPS(FN)
#undef FN
			kl_op_too_long,
		kl_op_unsupported,
	};

	if (op->mnemonic == ZYDIS_MNEMONIC_RDRAND || op->mnemonic == ZYDIS_MNEMONIC_RDSEED)
		return false;
	for (unsigned i = 0; i < KL_ARRAY_SIZE(system); i++)
		if (op->fn == system[i])
			return false;
	return true;
}

static unsigned repeatable_ops(struct kl_block *b)
{
	unsigned n = 0;

	if (KL_UNLIKELY(!b->repeatable)) {
		while (n < b->nr_ops && repeatable(&b->ops[n]))
			n++;
		b->repeatable = (uint16_t)(n + 1);
	}
	return b->repeatable - 1u;
}

static int run_interpreter(struct kl_vcpu *v, struct kl_block *b, struct kl_check *c)
{
	int why = _setjmp(v->jmp);
	enum kl_next r;

	if (why)
		return why;
	for (c->at = 0; c->at < c->stop; c->at++) {
		const struct kl_op *op = &b->ops[c->at];

		v->cur_op = op;
		v->rip = kl_fast_rip(v, op);
		r = op->fn(v, op);
		if ((r & KL_STOP) || v->exit_pending || v->code_written)
			c->broken_off = true;
		if (r & KL_JUMPED) {
			v->insn_count += c->at + 1;
			v->block = NULL;
			return 0;
		}
	}
	v->rip = kl_fast_rip(v, &b->ops[c->at]);
	v->insn_count += c->at;
	v->block = NULL;
	return 0;
}

static int run_translation(struct kl_vcpu *v, struct kl_block *b)
{
	int why = _setjmp(v->jmp);

	if (why)
		return why;
	kl_fast_unsync(v);
	kl_xlate_enter(v, b);
	return 0;
}

static void begin(struct kl_vcpu *v, struct kl_block *b, struct kl_check *c)
{
	put_back(v, b, &c->start);
	v->block = b;
	v->cur_op = b->ops;
	v->lazy = false;
}

/* 0, KL_LEAVE_EXCEPTION; or something else, and nothing has happened. */
static int compare(struct kl_vcpu *v, struct kl_block *b, struct kl_check *c)
{
	uint64_t gen = v->code_gen;
	int why, why_xlate = 0;
	unsigned done;

	for (int n = 0; n < ATTEMPTS; n++) {
		do {
			begin(v, b, c);
			c->nr = 0;
			c->logging = true;
			why = run_interpreter(v, b, c);
			c->logging = false;
			kl_interp_settle(v);
			capture(v, &c->interp);
			look_at_stores(c);
			undo_stores(c);
			if (why == LEAVE_OP)
				c->stop = c->at;
		} while (why == LEAVE_OP && c->stop && !requested(v));
		begin(v, b, c);
		if ((why && why != KL_LEAVE_EXCEPTION) || c->broken_off || requested(v) ||
		    v->code_gen != gen)
			return KL_LEAVE_RESTART;
		give_tags(v, c);
		why_xlate = run_translation(v, b);
		take_tags(v, c);
		kl_interp_settle(v);
		capture(v, &c->xlate);
		if (KL_LIKELY(why == why_xlate && same(&c->interp, &c->xlate) &&
			      same_stores(c, false)))
			return why;
		if (requested(v) || v->code_gen != gen ||
		    (why_xlate && why_xlate != KL_LEAVE_EXCEPTION)) {
			undo_stores(c);
			begin(v, b, c);
			return KL_LEAVE_RESTART;
		}
		/* It may leave a block before any op: one that was executed, or has faulted. */
		done = (unsigned)(c->xlate.insn_count - c->start.insn_count);
		if (!why_xlate && done < c->stop &&
		    c->xlate.insn_count < c->interp.insn_count + !!why) {
			c->stop = done;
			n--; /* and this is so less often than there are ops */
		}
		if (n + 1 < ATTEMPTS)
			undo_stores(c);
	}
	differ(v, b, c, why, why_xlate);
}

const struct kl_op *kl_check_block(struct kl_vcpu *v, struct kl_block *b)
{
	struct kl_check *c = &check;
	const struct kl_op *op;
	int why = KL_LEAVE_RESTART;

	if (v->bp.exec | v->bp.write | v->bp.access)
		return b->run0(v, b->ops);
	while (atomic_flag_test_and_set(&busy)) {
		if (requested(v)) {
			v->cur_op = b->ops;
			return kl_fast_leave(v);
		}
		sched_yield();
	}
	kl_fast_sync(v, b->ops);
	capture(v, &c->start);
	c->broken_off = false;
	c->stop = repeatable_ops(b);
	begin(v, b, c);
	if (c->stop) {
		memcpy(c->outer, v->jmp, sizeof(c->outer));
		v->check = c;
		why = compare(v, b, c);
		v->check = NULL;
		memcpy(v->jmp, c->outer, sizeof(c->outer));
		/* A jump that left the translation: what is executed next may be in this block. */
		v->blocks->from = NULL;
	}
	op = &b->ops[c->stop];
	if (why == 0 && (c->stop == b->nr_ops || v->rip != b->rip + op->offset)) {
		atomic_flag_clear(&busy);
		return NULL;
	}
	if (why == KL_LEAVE_EXCEPTION) {
		atomic_flag_clear(&busy);
		_longjmp(v->jmp, why);
	}
	/* The interpreter goes on, where there is nothing that is compared. */
	if (why)
		op = b->ops;
	else
		v->insn_count -= c->stop;
	v->block = b;
	v->cur_op = op;
	v->code_page = (uint8_t *)((uint64_t)b->code & KL_PAGE_MASK);
	kl_fast_unsync(v);
	atomic_flag_clear(&busy);
	return op == b->ops ? b->run0(v, op) : op;
}

bool kl_check_stops(const struct kl_vcpu *v, const struct kl_op *op)
{
	return op->nth > v->check->stop;
}
