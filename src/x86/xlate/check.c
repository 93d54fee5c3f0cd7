/* SPDX-License-Identifier: MIT */
/*
 * KVMLET_VCPU=check: each translation is compared with the interpreter each time that it runs.
 *
 * The block's ops are executed by op->fn one by one, without effect on memory: while v->tlb_now has
 * no tags, each access goes by way of access.c, which puts a copy of the line in place of it
 * (kl_check_access). Then registers are put back, and the translation runs and stops where the
 * interpreter did. Registers, flags, vectors, the fault and the bytes stored must be the same, or
 * the program is aborted with both states on stderr. The guest goes on with what the translation
 * has done, which it has done once.
 *
 * Not executed by both, and so the end of what is compared in a block: system instructions, random
 * numbers, accesses to MMIO and to pages that are tracked or logged, locked ones over a page's end,
 * long string instructions. What comes next in the block is the interpreter's. A block is not
 * compared while there are breakpoints; nor if a request, or a host page that is not there, comes
 * in between.
 *
 * Others may write what a block reads: other vCPUs, devices, the program. So a difference counts
 * only if all bytes that were read, and not written by the block itself, are still what the
 * interpreter read, if nobody is seen to write what the block has stored, and if it is there
 * ATTEMPTS times in a row, memory and registers being as before each time. What a block with locked
 * instructions has stored is not put back, as others may have built upon it: such a block is wrong
 * if it differs ONCE_ATTEMPTS times that it is entered, one after the other.
 *
 * Blocks that use general registers only have their vectors compared now and then.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <Zydis/Zydis.h>

#include "host/sys.h"
#include "x86/fast.h"
#include "x86/xlate/copies.h"
#include "x86/xlate/xlate.h"

#define ATTEMPTS      10
#define ONCE_ATTEMPTS 100
#define VECTORS_EACH  64

#define X_SIZE 832 /* x87, SSE, AVX */
_Static_assert(X_SIZE % 8 == 0, "whole words");

/* Elements of a string: with more, the instruction is left out, which is interpreted anyway. */
#define MAX_ELEMENTS 32

/* Beside enum kl_leave: the op that runs is not to be executed twice. */
#define LEAVE_OP 64

struct state {
	uint64_t gpr[16], rip, rflags, insn_count;
	struct kl_event_exception exc;
	uint8_t int_shadow;
	bool code_written;
	uint8_t x[X_SIZE];
};

struct kl_check {
	unsigned stop, at;  /* op that is not executed any more; that is */
	bool translated;    /* it is the translation that runs */
	int why, why_xlate; /* 0, or how they ended early */
	bool broken_off;    /* the interpreter would look at something else now */
	bool locked;        /* one of the ops is */
	bool vectors;       /* are compared, too */
	unsigned blocks;
	struct state start, interp, xlate;
	jmp_buf outer;
	struct kl_tlb_entry no_tags[KL_TLB_SIZE];
	struct kl_copies copies;
};

static bool requested(struct kl_vcpu *v)
{
	return atomic_load_explicit(&v->core.requests, memory_order_relaxed);
}

/* ---- memory ---- */

/* By a prefix, or without one. */
static bool is_locked(const struct kl_op *op)
{
	return op && ((op->flags & KL_OPF_LOCK) || op->mnemonic == ZYDIS_MNEMONIC_XCHG);
}

uint8_t *kl_check_access(struct kl_vcpu *v, unsigned access, bool once, bool part, uint8_t *p,
			 unsigned len)
{
	struct kl_check *c = v->check;
	uint8_t *copy;

	if (c->translated)
		return p;
	if (once || (part && is_locked(v->cur_op)))
		_longjmp(v->jmp, LEAVE_OP);
	c->locked |= is_locked(v->cur_op);
	copy = kl_copies_lend(&c->copies, p, len, access == KL_ACC_WRITE);
	if (!copy)
		_longjmp(v->jmp, LEAVE_OP);
	return copy;
}

/* ---- states ---- */

/*
 * Neither memcpy() nor memcmp(): they are the program's if it has its own, and the kernel's
 * selftests have some that go byte by byte.
 */
static void copy_words(void *to, const void *from, size_t len)
{
	len /= 8;
	__asm__ volatile("rep movsq" : "+D"(to), "+S"(from), "+c"(len) : : "memory");
}

/*
 * One by one, as they were stored a moment ago: the processor is slow to make one load of two
 * stores that it has not done with.
 */
static void copy_gprs(uint64_t *to, const uint64_t *from)
{
#pragma GCC unroll 16
	for (unsigned i = 0; i < 16; i++) {
		uint64_t x = from[i];

		__asm__("" : "+r"(x)); /* not two at a time */
		to[i] = x;
	}
}

static bool same_gprs(const uint64_t *a, const uint64_t *b)
{
#pragma GCC unroll 16
	for (unsigned i = 0; i < 16; i++)
		if (a[i] != b[i])
			return false;
	return true;
}

/* All but the signal mask, which _setjmp() does not save. */
static void copy_jmp(jmp_buf *to, const jmp_buf *from)
{
	enum { WORDS = offsetof(struct __jmp_buf_tag, __saved_mask) / 8 };

#pragma GCC unroll 16
	for (unsigned i = 0; i < WORDS; i++)
		((uint64_t *)to)[i] = ((const uint64_t *)from)[i];
}

static bool same_words(const void *a, const void *b, size_t len)
{
	const uint64_t *x = a, *y = b;
	uint64_t diff = 0;

	for (size_t i = 0; i < len / 8; i++)
		diff |= x[i] ^ y[i];
	return !diff;
}

static void capture(const struct kl_vcpu *v, const struct kl_check *c, struct state *s)
{
	copy_gprs(s->gpr, v->gpr);
	s->rip = v->rip;
	s->rflags = v->rflags;
	s->insn_count = v->insn_count;
	s->exc = v->exc;
	s->int_shadow = v->int_shadow;
	s->code_written = v->code_written;
	if (c->vectors)
		copy_words(s->x, v->xsave, X_SIZE);
}

/* About to execute the first op. */
static void at_start(struct kl_vcpu *v, struct kl_block *b)
{
	v->code_page = (uint8_t *)((uint64_t)b->code & KL_PAGE_MASK);
	v->block = b;
	v->cur_op = b->ops;
	v->lazy = false;
}

/* As at the beginning of the block. */
static void begin_again(struct kl_vcpu *v, struct kl_block *b, const struct kl_check *c)
{
	const struct state *s = &c->start;

	copy_gprs(v->gpr, s->gpr);
	v->rip = s->rip;
	v->rflags = s->rflags;
	v->insn_count = s->insn_count;
	v->exc = s->exc;
	v->int_shadow = s->int_shadow;
	v->code_written = s->code_written;
	if (c->vectors)
		copy_words(v->xsave, s->x, X_SIZE);
	at_start(v, b);
}

static bool same_exception(const struct kl_event_exception *a, const struct kl_event_exception *b)
{
	return a->pending == b->pending && a->nr == b->nr && a->error == b->error &&
	       a->payload == b->payload;
}

/* Is the state the one that the interpreter came to? */
static bool same(const struct kl_vcpu *v, const struct kl_check *c)
{
	const struct state *s = &c->interp;

	return same_gprs(s->gpr, v->gpr) && s->rip == v->rip && s->rflags == v->rflags &&
	       s->insn_count == v->insn_count && same_exception(&s->exc, &v->exc) &&
	       (!c->vectors || same_words(s->x, v->xsave, X_SIZE));
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

static void make_decoder(ZydisDecoder *dec, const struct kl_block *b)
{
	if ((b->key & 3) == KL_CODE64)
		ZydisDecoderInit(dec, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
	else
		ZydisDecoderInit(dec, ZYDIS_MACHINE_MODE_LEGACY_32, ZYDIS_STACK_WIDTH_32);
}

static KL_NORETURN KL_COLD void differ(const struct kl_block *b, struct kl_check *c)
{
	ZydisDecoder dec;
	ZydisFormatter f;
	ZydisDecodedInstruction in;
	ZydisDecodedOperand opnd[ZYDIS_MAX_OPERAND_COUNT];
	char text[128];

	make_decoder(&dec, b);
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
	print_state("interpreter", &c->interp, c->why);
	print_state("translation", &c->xlate, c->why_xlate);
	for (unsigned i = 0; c->vectors && i < X_SIZE; i += 8)
		if (memcmp(c->interp.x + i, c->xlate.x + i, 8)) {
			uint64_t x, y;

			memcpy(&x, c->interp.x + i, 8);
			memcpy(&y, c->xlate.x + i, 8);
			fprintf(stderr, "  xsave + %u: %016lx, translated %016lx\n", i, x, y);
		}
	kl_copies_print(&c->copies);
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

/* Neither x87, MMX, SSE and AVX registers nor what controls them. */
static bool is_general(const ZydisDecodedInstruction *in)
{
	switch (in->meta.isa_ext) {
	case ZYDIS_ISA_EXT_BASE:
	case ZYDIS_ISA_EXT_LONGMODE:
	case ZYDIS_ISA_EXT_CET: /* ENDBR */
	case ZYDIS_ISA_EXT_BMI1:
	case ZYDIS_ISA_EXT_BMI2:
	case ZYDIS_ISA_EXT_LZCNT:
	case ZYDIS_ISA_EXT_MOVBE:
	case ZYDIS_ISA_EXT_ADOX_ADCX:
		return true;
	default:
		return false;
	}
}

static KL_COLD void look_at_ops(struct kl_block *b)
{
	ZydisDecodedInstruction in;
	ZydisDecoder dec;
	unsigned n = 0;

	while (n < b->nr_ops && repeatable(&b->ops[n]))
		n++;
	make_decoder(&dec, b);
	b->general = true;
	b->strings = 0;
	for (unsigned i = 0; i < b->nr_ops; i++) {
		const struct kl_op *op = &b->ops[i];

		if (!ZYAN_SUCCESS(
			    ZydisDecoderDecodeInstruction(&dec, NULL, op->bytes, op->len, &in)) ||
		    !is_general(&in))
			b->general = false;
		else if (in.meta.category == ZYDIS_CATEGORY_STRINGOP &&
			 (op->flags & (KL_OPF_REP | KL_OPF_REPNE)))
			b->strings |= 1u << i;
	}
	b->repeatable = (uint16_t)(n + 1);
}

/* The ops up to c->stop, the one at c->at being executed. 0, or LEAVE_OP. */
static int run_ops(struct kl_vcpu *v, struct kl_block *b, struct kl_check *c)
{
	enum kl_next r;

	for (c->at = 0; c->at < c->stop; c->at++) {
		const struct kl_op *op = &b->ops[c->at];

		v->cur_op = op;
		v->rip = kl_fast_rip(v, op);
		if ((b->strings >> c->at & 1) && v->gpr[KL_RCX] > MAX_ELEMENTS)
			return LEAVE_OP;
		r = op->fn(v, op);
		if ((r & KL_STOP) || v->exit_pending || v->code_written) {
			c->broken_off = true;
			break;
		}
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

/*
 * The interpreter without effect on memory, and the translation. False: only the former, because
 * of c->why, or because something came in between; nothing has happened.
 */
static bool run_both(struct kl_vcpu *v, struct kl_block *b, struct kl_check *c)
{
	uint64_t gen = v->code_gen;
	int why;

	c->copies.nr = 0;
	c->copies.stored = c->locked = c->broken_off = c->translated = false;
	v->tlb_now = c->no_tags;
	why = _setjmp(v->jmp); /* for both */
	if (!c->translated) {
		if (!why)
			why = run_ops(v, b, c);
		v->tlb_now = v->tlb[v->tlb_mode];
		kl_interp_settle(v);
		c->why = why;
		capture(v, c, &c->interp);
		begin_again(v, b, c);
		if ((why && why != KL_LEAVE_EXCEPTION) || c->broken_off || requested(v) ||
		    v->code_gen != gen) {
			v->exit_errno = 0; /* it comes again, or it does not */
			return false;
		}
		c->translated = true;
		kl_fast_unsync(v);
		kl_xlate_enter(v, b);
		why = 0;
	}
	kl_interp_settle(v);
	c->why_xlate = why;
	return true;
}

static bool only_vcpu(const struct kl_vcpu *v)
{
	return atomic_load_explicit(&v->core.vm->nr_vcpus, memory_order_relaxed) == 1;
}

/*
 * May memory be put back? Not what others may have built upon; nor is it known what the translation
 * has stored where it has gone further than the interpreter.
 */
static bool repeats(const struct kl_vcpu *v, const struct kl_check *c)
{
	return !c->locked && (only_vcpu(v) || c->xlate.insn_count <= c->interp.insn_count);
}

/* They differ, and that may be because of what others did in between. */
static bool excused(const struct kl_vcpu *v, struct kl_block *b, struct kl_check *c)
{
	if (kl_copies_same_read(&c->copies) != KL_ALL_TRUE || kl_copies_are_written(&c->copies))
		return true;
	return !repeats(v, c) && ++b->differed < ONCE_ATTEMPTS;
}

/*
 * 0 or why the translation left, with what it did. KL_LEAVE_RESTART with v->block set: nothing
 * has happened.
 */
static int compare(struct kl_vcpu *v, struct kl_block *b, struct kl_check *c)
{
	uint64_t gen = v->code_gen;

	at_start(v, b);
	for (unsigned n = 0;; n++) {
		enum kl_looked stores;
		unsigned done;
		bool early;

		while (!run_both(v, b, c)) {
			if (c->why != LEAVE_OP || !c->at)
				return KL_LEAVE_RESTART;
			c->stop = c->at;
		}
		stores = kl_copies_same_stored(&c->copies);
		if (KL_LIKELY(c->why == c->why_xlate && stores == KL_ALL_TRUE && same(v, c))) {
			b->differed = 0;
			return c->why;
		}
		capture(v, c, &c->xlate);
		/* It may leave a block before any op: one that was executed, or has faulted. */
		done = (unsigned)(c->xlate.insn_count - c->start.insn_count);
		early = !c->why_xlate && done < c->stop &&
			c->xlate.insn_count < c->interp.insn_count + !!c->why;
		if (requested(v) || v->code_gen != gen || stores == KL_NOT_THERE ||
		    (c->why_xlate && c->why_xlate != KL_LEAVE_EXCEPTION) || (early && c->locked) ||
		    excused(v, b, c))
			return c->why_xlate;
		if (early) {
			c->stop = done;
			n--; /* and this is so less often than there are ops */
		}
		if (!repeats(v, c) || n + 1 == ATTEMPTS)
			differ(b, c);
		if (kl_copies_undo(&c->copies) != KL_ALL_TRUE)
			return c->why_xlate;
		begin_again(v, b, c);
	}
}

const size_t kl_check_size = sizeof(struct kl_check);

/* NULL: there is no memory. */
static struct kl_check *get(struct kl_vcpu *v)
{
	struct kl_xlate *x = v->blocks->xlate;

	if (KL_UNLIKELY(!x->check)) {
		x->check = kl_sys_map(sizeof(*x->check));
		for (unsigned i = 0; x->check && i < KL_TLB_SIZE; i++) {
			struct kl_tlb_entry *e = &x->check->no_tags[i];

			e->rtag = e->wtag = e->xtag = kl_tlb_none(i);
		}
	}
	return x->check;
}

/* Is there anything to compare? */
static bool comparable(struct kl_block *b)
{
	if (KL_UNLIKELY(!b->repeatable))
		look_at_ops(b);
	return b->repeatable > 1;
}

/* @b ended somewhere else than at the op behind those that were compared. */
static bool went_away(const struct kl_vcpu *v, const struct kl_block *b, const struct kl_check *c)
{
	return c->stop == b->nr_ops || v->rip != b->rip + b->ops[c->stop].offset;
}

/* The block that is to be compared next, if it is found as quickly as by an indirect jump. */
static struct kl_block *next_block(struct kl_vcpu *v)
{
	struct kl_block *b = NULL;

	if (v->code_mode == KL_CODE64 && !v->blocks->stop)
		b = kl_fast_find(v, v->rip);
	return b && b->seen == v->code_epoch && b->host && b->ops[0].run == kl_xlate_first &&
			       comparable(b)
		       ? b
		       : NULL;
}

const struct kl_op *kl_check_block(struct kl_vcpu *v, struct kl_block *b)
{
	struct kl_check *c = get(v);
	const struct kl_op *op;
	int why;

	if ((v->bp.exec | v->bp.write | v->bp.access) || !c || !comparable(b))
		return b->run0(v, b->ops);
	kl_fast_sync(v, b->ops);
	copy_jmp(&c->outer, &v->jmp);
	v->check = c;
	for (;;) {
		struct kl_block *next;

		v->code_written = false;
		c->stop = b->repeatable - 1u;
		c->vectors = !b->general || !(++c->blocks % VECTORS_EACH);
		capture(v, c, &c->start);
		why = compare(v, b, c);
		/* A jump that left the translation: what is executed next may be in this block. */
		v->blocks->from = NULL;
		next = !why && went_away(v, b, c) ? next_block(v) : NULL;
		if (!next)
			break;
		b = next;
	}
	v->check = NULL;
	copy_jmp(&v->jmp, &c->outer);
	op = b->ops;
	if (why == 0) {
		/* The interpreter goes on, where there is nothing that is compared. */
		if (went_away(v, b, c))
			return NULL;
		op += c->stop;
		v->insn_count -= c->stop;
	} else if (!v->block) {
		_longjmp(v->jmp, why);
	}
	v->block = b;
	v->cur_op = op;
	v->code_page = (uint8_t *)((uint64_t)b->code & KL_PAGE_MASK);
	kl_fast_unsync(v);
	return op == b->ops ? b->run0(v, op) : op;
}

bool kl_check_stops(const struct kl_vcpu *v, const struct kl_op *op)
{
	return op->nth > v->check->stop;
}
