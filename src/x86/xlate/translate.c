/* SPDX-License-Identifier: MIT */
/*
 * A block's translation.
 *
 *	entry	mov rax, [&block->pass]; cmp rax, [requests, pass]; jne again
 *	op 0	...
 *	op n	...
 *	edge	add [insn_count], n; jmp to the next block's entry, or to the edge's way out
 *	again	is memory what it was? pass for this epoch and jmp to the entry, or call reenter
 *	then, out of line, for each op that has one, its slow path:
 *		mov rax, op; call slow; get the flags if the next op wants them; jmp behind it
 *	and for each edge that is not linked: mov rax, op; call edge; where the jump is
 */
#include "host/cpu.h"
#include "x86/fast.h"
#include "x86/xlate/lower.h"

const size_t kl_xlate_work_size = sizeof(struct kl_translation);

/* ---- memory ---- */

bool kl_t_can_address(const struct kl_translation *t, const struct kl_t_op *o)
{
	const struct kl_op *op = &o->op;

	if (!(op->flags & KL_OPF_MEM) || (op->addrsize != t->word && op->addrsize != 4))
		return false;
	if (t->word == 4)
		return op->seg != KL_CS;
	/* Not by the base of FS or GS alone: kl_seg_linear(). */
	if (op->seg >= KL_FS && (op->base < 16 || op->index != KL_NOREG) && !kl_host_is_intel())
		return false;
	return op->base == KL_NOREG || op->base < 16;
}

void kl_t_address(struct kl_translation *t, const struct kl_t_op *o, unsigned reg, bool segment)
{
	const struct kl_op *op = &o->op;
	struct kl_emit *e = &t->e;
	struct kl_mem m = {.base = H_NONE, .index = H_NONE, .scale = op->scale};
	unsigned size = op->addrsize;

	if (op->base < 16)
		m.base = (uint8_t)kl_t_use(t, op->base, H_S1);
	if (op->index != KL_NOREG)
		m.index = (uint8_t)kl_t_use(t, op->index, H_S0);
	if (op->disp == (int32_t)op->disp) {
		m.disp = (int32_t)op->disp;
		if (m.index == H_NONE && m.base == H_NONE)
			kl_e_imm(e, reg, size == 4 ? (uint32_t)op->disp : (uint64_t)op->disp);
		else
			kl_e_lea(e, size, reg, m);
	} else if (m.base == H_NONE && m.index == H_NONE) {
		kl_e_imm(e, reg, size == 4 ? (uint32_t)op->disp : (uint64_t)op->disp);
	} else {
		/* MOV moffs and RIP have no registers: an index or a base only in 32-bit addresses
		 */
		kl_e_lea(e, size, reg, m);
		kl_e_lea(e, size, reg, KL_AT(reg, (int32_t)op->disp));
	}
	if (!segment || op->seg < KL_FS)
		return;
	if (t->word == 4) {
		kl_e_rm(e, 0x80, 0, 7,
			KL_AT(H_CTX, op->seg == KL_FS ? KL_CTX(whole_fs) : KL_CTX(whole_gs)));
		kl_e8(e, 0);
		kl_t_slow_if(t, 4);
	}
	kl_e_rm(e, 0x03, t->word, reg,
		KL_AT(H_CTX, op->seg == KL_FS ? KL_CTX(seg[KL_FS].base) : KL_CTX(seg[KL_GS].base)));
}

void kl_t_slow_if(struct kl_translation *t, unsigned cc)
{
	t->at->slow[t->at->nr_slow++] = kl_e_jcc(&t->e, cc);
}

/* The check of a group: to the second version, which does this instruction from its beginning. */
static void bail_if(struct kl_translation *t, unsigned cc, uint32_t xmm_dirty)
{
	t->bail[t->nr_bails].field = kl_e_jcc(&t->e, cc);
	t->bail[t->nr_bails].op = (unsigned)(t->at - t->version[0]);
	t->bail[t->nr_bails++].xmm_dirty = xmm_dirty;
}

/* What is looked at: @span bytes from H_S1 on, one operand or those of a group. */
struct look {
	unsigned span;
	bool write, group;
	uint32_t xmm_dirty;
};

static void fail_if(struct kl_translation *t, const struct look *l, unsigned cc)
{
	if (l->group)
		bail_if(t, cc, l->xmm_dirty);
	else
		kl_t_slow_if(t, cc);
}

/* @remember: what check_stack() looks at. */
static void check(struct kl_translation *t, const struct look *l, bool remember)
{
	enum { SHIFT = 5 };
	struct kl_emit *e = &t->e;

	_Static_assert(sizeof(struct kl_tlb_entry) == 1 << SHIFT, "index times size is one shift");
	/* kl_tlb_index() */
	kl_e_rr(e, 0x8b, 4, H_S0, H_S1);
	kl_e_rr(e, 0xc1, 4, 5, H_S0), kl_e8(e, KL_TLB_BITS);
	kl_e_rr(e, 0x33, 4, H_S0, H_S1);
	kl_e_rr(e, 0xc1, 4, 5, H_S0), kl_e8(e, KL_PAGE_SHIFT - SHIFT);
	kl_e_alu_ri(e, 4, 4, H_S0, (KL_TLB_SIZE - 1) << SHIFT);
	kl_e_rm(e, 0x03, 8, H_S0, KL_AT(H_CTX, KL_CTX(tlb_now)));
	/* The right page, and what is looked at ends in it. */
	kl_e_rm(e, 0x2b, 8, H_S1,
		KL_AT(H_S0, l->write ? offsetof(struct kl_tlb_entry, wtag)
				     : offsetof(struct kl_tlb_entry, rtag)));
	kl_e_alu_ri(e, 7, 8, H_S1, (int32_t)(KL_PAGE_SIZE - l->span));
	fail_if(t, l, 7); /* ja */
	if (remember) {
		/* By way of the stack: there is no third register. */
		kl_e_rm(e, 0xff, 0, 6, KL_AT(H_S0, offsetof(struct kl_tlb_entry, wtag)));
		kl_e_rm(e, 0x8f, 0, 0, KL_AT(H_CTX, KL_CTX(stack_tag)));
		kl_e_rm(e, 0xff, 0, 6, KL_AT(H_S0, offsetof(struct kl_tlb_entry, page)));
		kl_e_rm(e, 0x8f, 0, 0, KL_AT(H_CTX, KL_CTX(stack_page)));
		kl_e_rm(e, 0xc7, 8, 0, KL_AT(H_CTX, KL_CTX(stack_limit)));
		kl_e32(e, KL_PAGE_SIZE - 8 + 1);
	}
	kl_e_rm(e, 0x03, 8, H_S1, KL_AT(H_S0, offsetof(struct kl_tlb_entry, page)));
}

void kl_t_check(struct kl_translation *t, unsigned size, bool write)
{
	t->ptr = KL_AT(H_S1, 0);
	t->group = 0;
	t->aligned = 0;
	check(t, &(struct look){.span = size, .write = write}, false);
}

/* The same for the stack, whose page is remembered. */
static void check_stack(struct kl_translation *t, const struct look *l)
{
	struct kl_emit *e = &t->e;
	unsigned n = t->nr_stack++;

	kl_e_rm(e, 0x2b, 8, H_S1, KL_AT(H_CTX, KL_CTX(stack_tag)));
	kl_e_rm(e, 0x3b, 8, H_S1, KL_AT(H_CTX, KL_CTX(stack_limit)));
	t->stack[n].field = kl_e_jcc(e, 3); /* jae */
	if (l->span > 8) {
		kl_e_alu_ri(e, 7, 8, H_S1, (int32_t)(KL_PAGE_SIZE - l->span));
		/* Its end is in another page. */
		fail_if(t, l, 7);
	}
	kl_e_rm(e, 0x03, 8, H_S1, KL_AT(H_CTX, KL_CTX(stack_page)));
	t->stack[n].back = kl_here(e);
	t->stack[n].op = t->at;
	t->stack[n].span = l->span;
	t->stack[n].write = l->write;
	t->stack[n].group = l->group;
	t->stack[n].xmm_dirty = l->xmm_dirty;
}

/* It is another page: H_S1 is the distance to the one that is remembered. */
static void other_page(struct kl_translation *t, unsigned i)
{
	struct kl_emit *e = &t->e;
	struct look l = {t->stack[i].span, t->stack[i].write, t->stack[i].group,
			 t->stack[i].xmm_dirty};

	kl_e_bind(e, t->stack[i].field);
	t->at = t->stack[i].op;
	kl_e_rm(e, 0x03, 8, H_S1, KL_AT(H_CTX, KL_CTX(stack_tag)));
	check(t, &l, l.write);
	kl_e_bind_to(e, kl_e_jmp(e), t->stack[i].back);
}

/* The pointer that another access of @o's group has got. */
static bool has_pointer(struct kl_translation *t, const struct kl_t_op *o, unsigned size,
			bool write)
{
	if (!t->sharing || !o->group || t->group != o->group || size > o->size || o->at < t->low ||
	    o->at + o->size > t->high || (write && !t->group_write))
		return false;
	t->ptr = KL_AT(H_S1, (int32_t)(o->at - t->low));
	return true;
}

/*
 * What the check for @o is to look at: the rest of its group, too, if there is more of it. Returns
 * what is to be added to the address for that.
 */
static int32_t look_at(struct kl_translation *t, const struct kl_t_op *o, unsigned size, bool write,
		       struct look *l)
{
	unsigned span;
	int64_t low;
	bool any;

	*l = (struct look){.span = size, .write = write, .xmm_dirty = t->xmm_dirty};
	t->ptr = KL_AT(H_S1, 0);
	t->group = 0;
	t->aligned = 0;
	if (!t->sharing || !o->group || size > o->size ||
	    !kl_t_rest_of_group(t, o, &low, &span, &any) || (write && !any))
		return 0;
	l->span = span;
	l->write = any;
	l->group = true;
	t->group = o->group;
	t->low = low;
	t->high = low + span;
	t->group_write = any;
	t->ptr.disp = (int32_t)(o->at - low);
	return -t->ptr.disp;
}

void kl_t_access(struct kl_translation *t, const struct kl_t_op *o, unsigned size, bool write)
{
	struct kl_t_op moved;
	uint8_t group;
	struct look l;

	if (has_pointer(t, o, size, write))
		return;
	kl_t_flags_clobber(t);
	moved.op = o->op;
	moved.op.disp += look_at(t, o, size, write, &l);
	group = t->group;
	kl_t_address(t, &moved, H_S1, true);
	t->group = group; /* which is true of H_S1 again below */
	if (o->op.base == KL_RSP && o->op.index == KL_NOREG && o->op.seg < KL_FS &&
	    o->op.addrsize == t->word && (size <= 8 || l.group))
		check_stack(t, &l);
	else
		check(t, &l, false);
}

void kl_t_stack(struct kl_translation *t, const struct kl_t_op *o, int disp, bool write)
{
	struct look l;

	if (has_pointer(t, o, t->word, write))
		return;
	kl_t_flags_clobber(t);
	disp += look_at(t, o, t->word, write, &l);
	kl_e_lea(&t->e, t->word, H_S1, KL_AT(kl_host_of[KL_RSP], disp));
	check_stack(t, &l);
}

void kl_t_aligned(struct kl_translation *t, unsigned size)
{
	struct kl_emit *e = &t->e;

	if (t->aligned >= size && !((t->ptr.disp - t->aligned_at) & (int32_t)(size - 1)))
		return;
	kl_t_flags_clobber(t);
	if (t->ptr.disp & (int32_t)(size - 1)) {
		kl_e_lea(e, 8, H_S0, t->ptr);
		kl_e_rr(e, 0xf7, 1, 0, H_S0);
	} else {
		kl_e_rr(e, 0xf7, 1, 0, H_S1);
	}
	kl_e8(e, size - 1);
	kl_t_slow_if(t, 5);
	t->aligned = size;
	t->aligned_at = t->ptr.disp;
}

static void point(struct kl_translation *t, unsigned op)
{
	t->point[t->nr_points].at = (uint32_t)(kl_here(&t->e) - t->x->rx);
	t->point[t->nr_points++].op = op;
}

void kl_t_point(struct kl_translation *t)
{
	t->at->nr_points++;
	point(t, (unsigned)(t->at - t->version[0]));
}

/* ---- edges ---- */

static void count(struct kl_emit *e, unsigned n)
{
	kl_e_alu_mi(e, 0, 8, KL_AT(H_CTX, KL_CTX(insn_count)), (int32_t)n);
}

static void later(struct kl_translation *t, uint8_t *field, const struct kl_op *own, bool flags_out,
		  unsigned n)
{
	t->edge[t->nr_edges].field = field;
	t->edge[t->nr_edges].op = own;
	t->edge[t->nr_edges].flags_out = flags_out;
	t->edge[t->nr_edges++].count = n;
}

void kl_t_edge(struct kl_translation *t, const struct kl_op *own, unsigned n)
{
	count(&t->e, n);
	later(t, kl_e_jmp(&t->e), own, false, 0);
}

void kl_t_edge_if(struct kl_translation *t, unsigned cc, bool likely)
{
	const struct kl_op *own = t->at->own;
	bool out = t->host && !t->mem;
	uint8_t *over;

	if (!likely) {
		later(t, kl_e_jcc(&t->e, cc), own, out, own->nth);
		return;
	}
	over = kl_e_jcc(&t->e, cc ^ 1);
	if (out)
		kl_e_flags_out(&t->e);
	kl_t_edge(t, own, own->nth);
	kl_e_bind(&t->e, over);
}

void kl_t_jump(struct kl_translation *t, const uint8_t *again, int rsp_change)
{
	struct kl_emit *e = &t->e;

	_Static_assert(sizeof(struct kl_xlate_jump) == 16, "two bits less");
	kl_e_lea(e, 4, H_S0, (struct kl_mem){.base = H_NONE, .index = H_S1, .scale = 3});
	kl_e_alu_ri(e, 4, 4, H_S0, (KL_XLATE_JUMPS - 1) << 4);
	kl_e_rm(e, 0x03, 8, H_S0, KL_AT(H_CTX, t->word == 8 ? KL_CTX(jumps) : KL_CTX(jumps32)));
	kl_e_rm(e, 0x3b, 8, H_S1, KL_AT(H_S0, offsetof(struct kl_xlate_jump, rip)));
	t->indirect[t->nr_indirect].field = kl_e_jcc(e, 5);
	t->indirect[t->nr_indirect].op = t->at->own;
	t->indirect[t->nr_indirect++].again = again;
	if (rsp_change)
		kl_e_lea(e, t->word, kl_host_of[KL_RSP], KL_AT(kl_host_of[KL_RSP], rsp_change));
	count(e, t->at->own->nth);
	kl_e_rm(e, 0xff, 0, 4, KL_AT(H_S0, offsetof(struct kl_xlate_jump, host)));
	t->ended = true;
}

/* ---- out of line ---- */

/* Where the second version begins with instruction @i, with all state in place and to be loaded. */
static void go_on_plainly(struct kl_translation *t, unsigned i)
{
	const struct kl_t_op *before = i ? &t->version[1][i - 1] : NULL;
	struct kl_emit *e = &t->e;

	if (before) {
		kl_t_xmm_load(t, before->next_xmm);
		if (before->next_host)
			kl_e_flags_in(e);
	}
	kl_e_bind_to(e, kl_e_jmp(e), before ? before->next : t->plain);
}

static void bail(struct kl_translation *t, unsigned i)
{
	kl_e_bind(&t->e, t->bail[i].field);
	kl_t_xmm_write_back(t, t->bail[i].xmm_dirty);
	go_on_plainly(t, t->bail[i].op);
}

static uint32_t slow_path(struct kl_translation *t, struct kl_t_op *o)
{
	struct kl_emit *e = &t->e;
	uint32_t at = (uint32_t)(kl_here(e) - t->x->rx);

	for (unsigned i = 0; i < o->nr_slow; i++)
		kl_e_bind(e, o->slow[i]);
	kl_t_xmm_write_back(t, o->xmm_dirty);
	kl_e_imm(e, H_S0, (uint64_t)(uintptr_t)o->own);
	kl_e_call(e, t->x->slow);
	if (t->shared && o < t->version[1]) {
		go_on_plainly(t, (unsigned)(o - t->version[0]) + 1);
	} else {
		kl_t_xmm_load(t, o->next_xmm);
		if (o->next_host)
			kl_e_flags_in(e);
		kl_e_bind_to(e, kl_e_jmp(e), o->next);
	}
	return at;
}

static void way_out(struct kl_translation *t, unsigned i)
{
	struct kl_emit *e = &t->e;
	uint8_t *field = t->edge[i].field;

	if (t->edge[i].count) {
		kl_e_bind(e, field);
		if (t->edge[i].flags_out)
			kl_e_flags_out(e);
		count(e, t->edge[i].count);
		field = kl_e_jmp(e);
	}
	kl_e_bind(e, field);
	kl_xlate_add_edge(t->x, (uint32_t)(field - t->x->rw), (uint32_t)(e->p - t->x->rw));
	kl_e_imm(e, H_S0, (uint64_t)(uintptr_t)t->edge[i].op);
	kl_e_call(e, t->x->edge);
	kl_e32(e, (uint32_t)(field - t->x->rw));
}

/* Memory's @size bytes at H_S1 + @at are those that the block was made of, or to the way out. */
static void compare(struct kl_translation *t, unsigned at, unsigned size)
{
	uint64_t x = 0;

	memcpy(&x, t->b->own + at, size);
	kl_e_imm(&t->e, H_S0, x);
	point(t, KL_T_AGAIN);
	kl_e_rm(&t->e, 0x3b, size, H_S0, KL_AT(H_S1, (int32_t)at));
	t->again[t->nr_again++] = kl_e_jcc(&t->e, 5);
}

static void compare_all(struct kl_translation *t)
{
	unsigned n = t->b->nr_bytes, size = n >= 8 ? 8 : n >= 4 ? 4 : n >= 2 ? 2 : 1;

	for (unsigned at = 0; at + size < n; at += size)
		compare(t, at, size);
	compare(t, n - size, size);
}

/*
 * kl_xlate_reenter() without a call, for what is usual in a new epoch: there is no request, the
 * page is mapped where it was, is live, and holds what it did. In this order, as there: a page that
 * has gone is not touched while a request waits, and what is written after the look at live is
 * reported.
 */
static uint32_t enter_again(struct kl_translation *t, uint8_t *field, const uint8_t *entry)
{
	const uint64_t b = (uint64_t)(uintptr_t)t->b;
	struct kl_emit *e = &t->e;
	uint32_t at;

	t->nr_again = 0;
	kl_e_bind(e, field);
	kl_e_alu_mi(e, 7, 4, KL_AT(H_CTX, KL_CTX(core.requests)), 0);
	t->again[t->nr_again++] = kl_e_jcc(e, 5);
	kl_e_imm(e, H_S1, b);
	kl_e_load(e, H_S0, KL_CTX(code_gen));
	kl_e_rm(e, 0x3b, 8, H_S0, KL_AT(H_S1, offsetof(struct kl_block, gen)));
	t->again[t->nr_again++] = kl_e_jcc(e, 5);
	kl_e_rm(e, 0x8b, 8, H_S0, KL_AT(H_S1, offsetof(struct kl_block, page)));
	kl_e_rr(e, 0x85, 8, H_S0, H_S0);
	t->again[t->nr_again++] = kl_e_jcc(e, 4);
	kl_e_alu_mi(e, 7, 4, KL_AT(H_S0, offsetof(struct kl_code_page, state)), KL_CODE_LIVE);
	t->again[t->nr_again++] = kl_e_jcc(e, 5);
	kl_e_rm(e, 0x8b, 8, H_S1, KL_AT(H_S1, offsetof(struct kl_block, code)));
	compare_all(t);
	kl_e_imm(e, H_S1, b);
	kl_e_load(e, H_S0, KL_CTX(code_epoch));
	kl_e_rm(e, 0x89, 8, H_S0, KL_AT(H_S1, offsetof(struct kl_block, seen)));
	/* As it is without requests: the entry sees if there has come one. */
	kl_e_rm(e, 0x8b, 4, H_S0, KL_AT(H_CTX, KL_CTX(core.pass)));
	kl_e_rr(e, 0xc1, 8, 4, H_S0), kl_e8(e, 32);
	kl_e_rm(e, 0x89, 8, H_S0, KL_AT(H_S1, offsetof(struct kl_block, pass)));
	kl_e_bind_to(e, kl_e_jmp(e), entry);
	at = (uint32_t)(kl_here(e) - t->x->rx);
	for (unsigned i = 0; i < t->nr_again; i++)
		kl_e_bind(e, t->again[i]);
	kl_e_imm(e, H_S0, b);
	kl_e_call(e, t->x->reenter);
	return at;
}

static void out_of_line(struct kl_translation *t, uint32_t reenter)
{
	uint32_t slow[2 * KL_T_MAX_OPS + 1];
	struct kl_t_op *ops = t->version[0]; /* of both */
	struct kl_emit *e = &t->e;

	for (unsigned i = 0; i < t->nr_stack; i++)
		other_page(t, i);
	for (unsigned i = 0; i < t->nr_bails; i++)
		bail(t, i);
	for (unsigned k = 0; k <= t->shared; k++)
		for (unsigned i = k * KL_T_MAX_OPS; i < k * KL_T_MAX_OPS + t->nr; i++)
			if (ops[i].nr_slow || ops[i].nr_points)
				slow[i] = slow_path(t, &ops[i]);
	for (unsigned i = 0; i < t->nr_indirect; i++) {
		kl_e_bind(e, t->indirect[i].field);
		kl_e_imm(e, H_S0, (uint64_t)(uintptr_t)t->indirect[i].op);
		kl_e_call(e, t->x->indirect);
		if (t->indirect[i].again)
			kl_e_bind_to(e, kl_e_jmp(e), t->indirect[i].again);
		else
			go_on_plainly(t, t->indirect[i].op->nth - 1u);
	}
	for (unsigned i = 0; i < t->nr_edges; i++)
		way_out(t, i);
	slow[KL_T_AGAIN] = reenter;
	for (unsigned i = 0; i < t->nr_points; i++)
		kl_xlate_add_point(t->x, t->point[i].at, slow[t->point[i].op]);
}

/* ---- a block ---- */

/* Into H_S0, by the shorter of two instructions if the block is near the vCPU. */
static void load_pass(struct kl_translation *t)
{
	int64_t at = (int64_t)((uint64_t)(uintptr_t)&t->b->pass - (uint64_t)(uintptr_t)t->v->gpr) -
		     KL_BIAS;
	struct kl_emit *e = &t->e;

	if (at == (int32_t)at)
		kl_e_load(e, H_S0, (int32_t)at);
	else
		kl_e8(e, 0x48), kl_e8(e, 0xa1), kl_e64(e, (uint64_t)(uintptr_t)&t->b->pass);
}

static bool decode(struct kl_translation *t)
{
	const struct kl_block *b = t->b;
	bool live = true;

	t->nr = b->nr_ops;
	for (unsigned i = 0; i < t->nr; i++) {
		struct kl_t_op *o = &t->ops[i];

		o->own = &b->ops[i];
		o->nr_slow = o->nr_points = 0;
		o->next = NULL;
		if (kl_decode_one(&o->d, &o->op, t->word == 8 ? KL_CODE64 : KL_CODE32,
				  b->rip + o->own->offset, o->own->bytes,
				  o->own->len) != KL_DECODE_OK ||
		    o->op.len != o->own->len)
			return false;
	}
	/* As drop_dead_flags(). */
	for (unsigned i = t->nr; i-- > 0;) {
		struct kl_t_op *o = &t->ops[i];

		live |= !o->d.simple || o->d.stores;
		o->live_after = live;
		o->sees_before = !o->d.simple || (o->op.flags & KL_OPF_MEM) || o->d.reads_flags;
		live = o->sees_before || (live && !o->d.writes_flags);
		o->sees_before = live;
	}
	return true;
}

/* By the block's own handler, with all state in place. */
static void by_handler(struct kl_translation *t, struct kl_t_op *o)
{
	kl_t_forget_pointer(t);
	kl_t_flags_save(t);
	t->host = false;
	t->mem = true;
	kl_t_xmm_write_back(t, t->xmm_dirty);
	t->xmm = t->xmm_dirty = 0;
	kl_e_imm(&t->e, H_S0, (uint64_t)(uintptr_t)o->own);
	kl_e_call(&t->e, t->x->slow);
	if (o->own->flags & KL_OPF_END)
		t->ended = true;
}

static bool lower(struct kl_translation *t, struct kl_t_op *o)
{
	const struct kl_op *op = &o->op;
	bool prefixed = op->flags & (KL_OPF_REP | KL_OPF_REPNE);

	/* Then d->in may be what it was before. */
	if (op->fn == kl_op_ud || op->fn == kl_op_too_long || op->fn == kl_op_unsupported)
		return false;
	if (prefixed && o->d.in.opcode_map == ZYDIS_OPCODE_MAP_DEFAULT &&
	    o->d.in.mnemonic != ZYDIS_MNEMONIC_RET)
		return false;
	return kl_lower_mov(t, o) || kl_lower_alu(t, o) || kl_lower_branch(t, o) ||
	       kl_lower_bit(t, o) || kl_lower_vector(t, o);
}

/* An instruction that goes the slow way costs what so many that have a fast form gain. */
#define SLOW_COST 3

/* One version. The number of instructions that have a fast form. */
static unsigned make(struct kl_translation *t)
{
	unsigned lowered = 0;

	t->ended = t->lent = t->lent_avx = false;
	t->xmm = t->xmm_dirty = 0;
	t->host = false;
	t->mem = true;
	t->group = 0;
	for (unsigned i = 0; i < t->nr; i++) {
		struct kl_t_op *o = &t->ops[i];

		t->at = o;
		o->xmm_dirty = t->xmm_dirty;
		if (lower(t, o))
			lowered++;
		else
			by_handler(t, o);
		o->next = kl_here(&t->e);
		o->next_host = t->host;
		o->next_xmm = t->xmm;
	}
	if (!t->ended) {
		kl_t_flags_save(t);
		kl_t_xmm_write_back(t, t->xmm_dirty);
		kl_t_edge(t, &t->b->ops[t->nr], t->nr);
	}
	return lowered;
}

bool kl_xlate_translate(struct kl_vcpu *v, struct kl_xlate *x, struct kl_block *b)
{
	struct kl_translation *t = x->work;
	struct kl_emit *e = &t->e;
	const uint8_t *entry;
	uint32_t reenter;
	unsigned lowered;
	uint8_t *again;

	t->v = v;
	t->x = x;
	t->b = b;
	t->word = (b->key & 3) == KL_CODE64 ? 8 : 4;
	t->nr_points = t->nr_edges = t->nr_indirect = t->nr_stack = t->nr_bails = 0;
	*e = (struct kl_emit){x->rw + x->used, x->rw + x->end, x->rx - x->rw};
	t->ops = t->version[0];
	if (!decode(t))
		return false;
	t->shared = t->sharing = kl_t_plan(t);
	if (t->shared)
		memcpy(t->version[1], t->version[0], t->nr * sizeof(t->ops[0]));
	entry = kl_here(e);
	load_pass(t);
	kl_e_rm(e, 0x3b, 8, H_S0, KL_AT(H_CTX, KL_CTX(core.requests)));
	again = kl_e_jcc(e, 5);
	lowered = make(t);
	if (lowered < SLOW_COST * (t->nr - lowered))
		return false;
	reenter = enter_again(t, again, entry);
	if (t->shared) {
		t->ops = t->version[1];
		t->sharing = false;
		t->plain = kl_here(e);
		make(t);
	}
	out_of_line(t, reenter);
	while ((uint64_t)e->p & 15)
		kl_e8(e, 0xcc);
	x->used = (uint32_t)(e->p - x->rw);
	b->host = entry;
	return true;
}
