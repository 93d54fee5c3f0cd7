/* SPDX-License-Identifier: MIT */
/*
 * The shadow model: what a guest may see, from the histories of windows, places and files.
 *
 * State i of a history may be seen from the begin of event i to the end of event i + 1. An
 * access between two readings of the clock may see every state whose time overlaps. Where the
 * ring no longer reaches back far enough, nothing is known and nothing is checked.
 */
#include <stdarg.h>

#include "stress.h"

static _Atomic uint64_t serials = FIRST_SERIAL;
static _Atomic uint32_t insts = 1;

uint64_t tick(void)
{
	return atomic_fetch_add(the_clock, 1) + 1;
}

uint64_t now(void)
{
	return atomic_load(the_clock);
}

uint64_t new_serial(void)
{
	return atomic_fetch_add(&serials, 1) & 0x3fffffffffull;
}

uint32_t new_inst(void)
{
	return atomic_fetch_add(&insts, 1);
}

void fill(void *page, uint64_t serial)
{
	poke((char *)page + R_WORD, serial << 24);
	poke((char *)page + X_WORD, serial << 24);
	poke((char *)page + S_WORD, serial << 24);
}

/* ---- histories ------------------------------------------------------------------------ */

void hist_reset(struct hist *h, struct state s)
{
	h->n = 1;
	h->e[0] = (struct event){.begin = 1, .end = 1, .s = s, .what = "start"};
}

struct state hist_last(const struct hist *h)
{
	return h->e[(h->n - 1) % HIST].s;
}

void hist_begin(struct hist *h, struct state s, uint64_t at, const char *what)
{
	h->e[h->n++ % HIST] = (struct event){.begin = at, .s = s, .what = what};
}

void hist_end(struct hist *h, uint64_t at)
{
	/* With those before it that were left open. */
	for (unsigned i = h->n; i && h->n - i < HIST && !h->e[(i - 1) % HIST].end; i--)
		h->e[(i - 1) % HIST].end = at;
}

void hist_cancel(struct hist *h)
{
	/* What was evicted for it is lost; that only makes the past unknown. */
	struct state before = h->e[(h->n - 2) % HIST].s;

	h->e[(h->n - 1) % HIST].s = before;
	h->e[(h->n - 1) % HIST].what = "refused";
	hist_end(h, tick());
}

/* Copies what may be seen in [from, to]; returns how many. */
static unsigned visible(const struct hist *h, uint64_t from, uint64_t to, struct state *out,
			bool *unknown)
{
	unsigned first = h->n > HIST ? h->n - HIST : 0, n = 0;

	if (first) {
		uint64_t end = h->e[first % HIST].end;

		if (!end || from < end)
			*unknown = true;
	}
	for (unsigned i = first; i < h->n; i++) {
		const struct event *e = &h->e[i % HIST];
		uint64_t gone = i + 1 < h->n ? h->e[(i + 1) % HIST].end : 0;

		if (e->begin <= to && (!gone || from < gone))
			out[n++] = e->s;
	}
	return n;
}

/* ---- candidates ----------------------------------------------------------------------- */

/* One way in which a guest page may have been backed. */
struct cand {
	struct state win, page;
	bool content; /* else nothing that can be read is behind it */
};

struct cands {
	bool unknown;
	unsigned n;
	struct cand c[512];
};

static void add(struct cands *cs, const struct state *w, const struct state *p, bool content)
{
	if (cs->n == sizeof(cs->c) / sizeof(cs->c[0])) {
		cs->unknown = true;
		return;
	}
	cs->c[cs->n++] = (struct cand){*w, *p, content};
}

static void add_page(struct cands *cs, const struct state *w, const struct state *p, uint64_t from,
		     uint64_t to)
{
	struct state fs[HIST];
	struct file *f;
	unsigned n;

	if (p->kind == AWAY || !(p->prot & PROT_READ)) {
		add(cs, w, p, false);
		return;
	}
	if (p->kind != FILE_PAGE) {
		add(cs, w, p, true);
		return;
	}
	f = &files[p->file];
	pthread_mutex_lock(&f->lock);
	n = visible(&f->h[p->page], from, to, fs, &cs->unknown);
	pthread_mutex_unlock(&f->lock);
	for (unsigned i = 0; i < n; i++) {
		struct state s = *p;

		s.serial = fs[i].serial;
		add(cs, w, &s, fs[i].kind != AWAY);
	}
}

static void collect(struct cands *cs, struct vm *vm, unsigned win, unsigned page, uint64_t from,
		    uint64_t to)
{
	struct state ws[HIST], ps[HIST], none = {.kind = AWAY};
	unsigned nw, np;

	cs->n = 0;
	cs->unknown = false;
	pthread_mutex_lock(&vm->lock);
	nw = visible(&vm->win[win], from, to, ws, &cs->unknown);
	pthread_mutex_unlock(&vm->lock);
	for (unsigned i = 0; i < nw; i++) {
		struct place *pl;

		if (ws[i].kind != SLOT || page >= ws[i].n || ws[i].place < 0) {
			if (ws[i].kind == SLOT && page >= ws[i].n)
				ws[i].kind = AWAY;
			add(cs, &ws[i], ws[i].place < 0 ? &ws[i] : &none, ws[i].place < 0);
			continue;
		}
		pl = &places[ws[i].place];
		pthread_mutex_lock(&pl->lock);
		np = visible(&pl->h[ws[i].first + page], from, to, ps, &cs->unknown);
		pthread_mutex_unlock(&pl->lock);
		for (unsigned k = 0; k < np; k++)
			add_page(cs, &ws[i], &ps[k], from, to);
	}
}

static bool same_memory(const struct cand *a, const struct cand *b)
{
	if (!a->content || !b->content || a->page.kind != b->page.kind)
		return false;
	return a->page.kind == ANON ? a->page.inst == b->page.inst
				    : a->page.file == b->page.file && a->page.page == b->page.page;
}

/* May @value, stored by a guest, be in @c's memory? */
static bool stored_there(const struct cand *c, uint64_t value, uint64_t to)
{
	static __thread struct cands writers;
	struct vm *vm = &vms[value >> 60 & 7];
	unsigned win = value >> 56 & 15, page = value >> 47 & 511;
	uint64_t from = value & STORE_CLOCK;

	if (vm >= &vms[opt.vms] || win >= NWIN || page >= win_pages(win) || from > to)
		return false;
	collect(&writers, vm, win, page, from, to);
	if (writers.unknown)
		return true;
	for (unsigned i = 0; i < writers.n; i++)
		if (same_memory(&writers.c[i], c) && !writers.c[i].win.ro)
			return true;
	return false;
}

static bool may_hold(const struct cand *c, unsigned word, uint64_t value, uint64_t to)
{
	bool zero = !c->page.serial || c->page.maybe_zero;

	if (c->win.kind == FOREIGN)
		return true;
	if (c->win.kind != SLOT || !c->content)
		return false;
	switch (word) {
	case X_WORD:
		return SERIAL(value) == c->page.serial || (zero && !SERIAL(value));
	case S_WORD:
		if ((value & STORED) && c->win.place >= 0)
			return stored_there(c, value, to);
		/* fallthrough */
	default:
		return value == c->page.serial << 24 || (zero && !value);
	}
}

/* ---- failure -------------------------------------------------------------------------- */

static pthread_mutex_t failing = PTHREAD_MUTEX_INITIALIZER;

static void describe(const struct state *s)
{
	static const char *const kinds[] = {"away", "anon", "file", "slot", "foreign"};

	fprintf(stderr, "%s", kinds[s->kind]);
	if (s->kind == SLOT)
		fprintf(stderr, " place %d pages %u+%u%s", s->place, s->first, s->n,
			s->ro ? " read-only" : "");
	else if (s->kind == FILE_PAGE)
		fprintf(stderr, " %u page %u prot %u", s->file, s->page, s->prot);
	fprintf(stderr, " serial %#llx inst %u%s\n", (unsigned long long)s->serial, s->inst,
		s->maybe_zero ? " or zero" : "");
}

static void dump_hist(const char *name, const struct hist *h)
{
	fprintf(stderr, "%s:\n", name);
	for (unsigned i = h->n > HIST ? h->n - HIST : 0; i < h->n; i++) {
		const struct event *e = &h->e[i % HIST];

		fprintf(stderr, "  [%llu, %llu] %-12s ", (unsigned long long)e->begin,
			(unsigned long long)e->end, e->what);
		describe(&e->s);
	}
}

/* What happened to a guest page lately. Leaves @failing locked: the caller fails. */
static void dump_page(struct vm *vm, unsigned win, unsigned page, uint64_t from)
{
	bool done[NPLACES] = {0}, file_done[NFILES] = {0}, unknown;
	struct state ws[HIST], ps[HIST];
	char name[64];
	unsigned n, np;

	pthread_mutex_lock(&failing);
	snprintf(name, sizeof(name), "vm %d window %u page %u", vm->id, win, page);
	dump_hist(name, &vm->win[win]);
	n = visible(&vm->win[win], from > 1000 ? from - 1000 : 0, UINT64_MAX, ws, &unknown);
	for (unsigned i = 0; i < n; i++) {
		struct hist *h;

		if (ws[i].kind != SLOT || ws[i].place < 0 || page >= ws[i].n || done[ws[i].place])
			continue;
		done[ws[i].place] = true;
		h = &places[ws[i].place].h[ws[i].first + page];
		snprintf(name, sizeof(name), "place %d page %u (%p)", ws[i].place,
			 ws[i].first + page,
			 (void *)(places[ws[i].place].base + (ws[i].first + page) * PAGE));
		dump_hist(name, h);
		np = visible(h, from, UINT64_MAX, ps, &unknown);
		for (unsigned k = 0; k < np; k++) {
			if (ps[k].kind != FILE_PAGE || file_done[ps[k].file])
				continue;
			file_done[ps[k].file] = true;
			snprintf(name, sizeof(name), "file %u page %u", ps[k].file, ps[k].page);
			dump_hist(name, &files[ps[k].file].h[ps[k].page]);
		}
	}
	pthread_mutex_unlock(&failing);
}

void fail(const char *fmt, ...)
{
	int saved = errno;
	va_list ap;

	/* Never unlocked: one failure is enough. */
	pthread_mutex_lock(&failing);
	fprintf(stderr, "mem-stress: FAILED: ");
	errno = saved;
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fprintf(stderr,
		"\nmem-stress: clock %llu; again with: --seed %llu --rounds 1 --vms %u "
		"--vcpus %u --mutators %u --ops %u\n",
		(unsigned long long)now(), (unsigned long long)opt.seed, opt.vms, opt.vcpus,
		opt.mutators, opt.ops);
	_exit(1);
}

/* ---- checks --------------------------------------------------------------------------- */

static __thread struct cands cands;

static void locate(struct vcpu *v, uint64_t gpa, unsigned *win, unsigned *page)
{
	if (!gpa_to_win(gpa, win, page))
		fail("vm %d vcpu %u: an exit for stable memory at %#llx", v->vm->id, v->id,
		     (unsigned long long)gpa);
}

void check_record(struct vcpu *v, unsigned i)
{
	const struct cmd *c = &v->cmds[i];
	struct record r = v->records[i];
	uint64_t to = now();
	unsigned win, page;
	bool ok = false;

	locate(v, c->addr, &win, &page);
	if (c->op == OP_STORE)
		return;
	/* A store that is seen may be younger than the clock value that the reader saw last. */
	collect(&cands, v->vm, win, page, r.before, r.after);
	if ((v->skipped[i] & 1) && SERIAL(r.value) == MMIO_SERIAL)
		return;
	/* After a device's answer it may have begun anew, on memory; after a device's write not. */
	if (c->op == OP_XADD && SERIAL(r.value) < SMALL && SERIAL(r.value) > 0 &&
	    !(v->skipped[i] & 2))
		v->xadds[SERIAL(r.value)]++;
	for (unsigned k = 0; k < cands.n && !ok; k++)
		ok = may_hold(&cands.c[k], c->addr & (PAGE - 1), r.value, to);
	atomic_fetch_add_explicit(&counters.reads, 1, memory_order_relaxed);
	if (ok)
		return;
	if (cands.unknown) {
		atomic_fetch_add_explicit(&counters.unknown, 1, memory_order_relaxed);
		return;
	}
	dump_page(v->vm, win, page, r.before);
	fail("vm %d vcpu %u op %llu at %#llx (window %u page %u) between %llu and %llu: saw %#llx "
	     "(serial %#llx count %llu), flags %u",
	     v->vm->id, v->id, (unsigned long long)c->op, (unsigned long long)c->addr, win, page,
	     (unsigned long long)r.before, (unsigned long long)r.after, (unsigned long long)r.value,
	     (unsigned long long)SERIAL(r.value), (unsigned long long)COUNT(r.value),
	     v->skipped[i]);
}

void check_efault(struct vcpu *v, const struct cmd *c, uint64_t before)
{
	bool write = c->op == OP_XADD || c->op == OP_STORE;
	unsigned win, page;

	atomic_fetch_add_explicit(&counters.efaults, 1, memory_order_relaxed);
	locate(v, c->addr, &win, &page);
	collect(&cands, v->vm, win, page, before, now());
	for (unsigned k = 0; k < cands.n; k++) {
		const struct cand *d = &cands.c[k];

		if (d->win.kind == FOREIGN ||
		    (d->win.kind == SLOT &&
		     (!d->content || (write && !d->win.ro && !(d->page.prot & PROT_WRITE)))))
			return;
	}
	if (cands.unknown)
		return;
	dump_page(v->vm, win, page, before);
	fail("vm %d vcpu %u op %llu at %#llx (window %u page %u) after %llu: EFAULT, but the "
	     "memory is "
	     "there",
	     v->vm->id, v->id, (unsigned long long)c->op, (unsigned long long)c->addr, win, page,
	     (unsigned long long)before);
}

void check_mmio(struct vcpu *v, uint64_t gpa, bool write, uint64_t before)
{
	unsigned win, page;

	atomic_fetch_add_explicit(&counters.mmios, 1, memory_order_relaxed);
	locate(v, gpa, &win, &page);
	collect(&cands, v->vm, win, page, before, now());
	for (unsigned k = 0; k < cands.n; k++) {
		const struct cand *d = &cands.c[k];

		/* An emulator that cannot read a read-only slot's memory takes it for a device. */
		if (d->win.kind == AWAY || (d->win.ro && (write || !d->content)) ||
		    d->win.kind == FOREIGN)
			return;
		if (opt.real && (!d->content || (write && !(d->page.prot & PROT_WRITE))))
			return;
	}
	if (cands.unknown)
		return;
	dump_page(v->vm, win, page, before);
	fail("vm %d vcpu %u at %#llx (window %u page %u) after %llu: MMIO %s where there is a slot",
	     v->vm->id, v->id, (unsigned long long)gpa, win, page, (unsigned long long)before,
	     write ? "write" : "read");
}

/* Increments of the pages that are never discarded: none lost, none done twice. */
void check_xadds(void)
{
	for (unsigned p = 1; p < SMALL; p++) {
		uint64_t word = peek(files[0].alias + p * PAGE + X_WORD), sum = 0;

		for (unsigned i = 0; i < opt.vms; i++)
			for (unsigned k = 0; k < vms[i].nvcpus; k++)
				sum += vms[i].vcpus[k].xadds[p];
		if (SERIAL(word) != p || COUNT(word) != (sum & 0xffffff))
			fail("file 0 page %u holds %#llx: guests incremented it %llu times", p,
			     (unsigned long long)word, (unsigned long long)sum);
	}
}
