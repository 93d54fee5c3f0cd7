/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <string.h>

#include "oracle.h"

const char *const kind_name[NR_KINDS] = {
#define OP(kind, name, calls) [kind] = (name),
#include "ops.def"
#undef OP
};

void oracle_init(struct oracle *o)
{
	memset(o, 0, sizeof(*o));
	for (unsigned i = 0; i < POOL_PAGES; i++)
		o->host[i].prot = 2;
}

/* ---- S: slots ---- */

static int slot_of(const struct oracle *o, unsigned gfn)
{
	for (int i = 0; i < NR_SLOTS; i++)
		if (o->slot[i].used && gfn >= o->slot[i].gfn && gfn < o->slot[i].gfn + o->slot[i].n)
			return i;
	return -1;
}

static bool overlaps(const struct oracle *o, unsigned but, unsigned gfn, unsigned n)
{
	for (unsigned i = 0; i < n; i++) {
		int s = slot_of(o, gfn + i);

		if (s >= 0 && (unsigned)s != but)
			return true;
	}
	return false;
}

/* D: the log of a slot begins. */
static void log_begins(struct oracle *o, unsigned slot)
{
	o->slot[slot].log = true;
	for (unsigned i = 0; i < GUEST_PAGES && i < o->slot[slot].n; i++)
		o->slot[slot].dirty[i] = o->dirty_mode == 3 ? THERE : NOT;
}

void oracle_log(struct oracle *o, struct written w)
{
	int s = slot_of(o, w.gfn);
	enum there *now;

	if (s < 0 || !o->slot[s].log)
		return;
	now = &o->slot[s].dirty[w.gfn - o->slot[s].gfn];
	*now = *now > w.there ? *now : w.there;
}

static void wrote(struct oracle *o, unsigned gfn, enum there there)
{
	o->written[o->nr_written++] = (struct written){gfn, there};
}

/* T: with their slot pages are tracked no more. */
static void forget(struct oracle *o, unsigned slot)
{
	for (unsigned i = 0; i < GUEST_PAGES && i < o->slot[slot].n; i++)
		o->tracked[o->slot[slot].gfn + i] = 0;
}

static bool any_tracker(const struct oracle *o)
{
	for (unsigned i = 0; i < MAX_THREADS; i++)
		if (o->tracker[i])
			return true;
	return false;
}

static bool set(struct oracle *o, const struct op *op, int ret)
{
	bool used = o->slot[op->slot].used, log = op->prot == 2;

	if (!op->n) {
		if (!used)
			return ret == -EINVAL;
		forget(o, op->slot);
		o->slot[op->slot].used = false;
		return !ret;
	}
	if (used) {
		if (o->slot[op->slot].gmem || o->slot[op->slot].n != op->n ||
		    o->slot[op->slot].page != op->page || o->slot[op->slot].ro != op->flag)
			return ret == -EINVAL;
		if (o->slot[op->slot].gfn == op->gfn) {
			if (log && !o->slot[op->slot].log)
				log_begins(o, op->slot);
			o->slot[op->slot].log = log;
			return !ret;
		}
		if (any_tracker(o))
			return ret == -EINVAL ||
			       (ret == -EEXIST && overlaps(o, op->slot, op->gfn, op->n));
	}
	if (overlaps(o, op->slot, op->gfn, op->n))
		return ret == -EEXIST;
	if (used)
		forget(o, op->slot);
	o->slot[op->slot].used = true;
	o->slot[op->slot].ro = op->flag;
	o->slot[op->slot].gmem = false;
	o->slot[op->slot].gfn = op->gfn;
	o->slot[op->slot].n = op->n;
	o->slot[op->slot].page = op->page;
	/* A slot that is moved keeps no marks. */
	o->slot[op->slot].log = false;
	if (log)
		log_begins(o, op->slot);
	return !ret;
}

static bool set_gmem(struct oracle *o, const struct op *op, int ret)
{
	bool bound = false, over = overlaps(o, op->slot, op->gfn, op->n);

	if (o->slot[op->slot].used)
		return ret == -EINVAL;
	for (unsigned i = 0; i < NR_SLOTS; i++)
		bound |= o->slot[i].used && o->slot[i].gmem &&
			 op->off < o->slot[i].off + o->slot[i].n &&
			 o->slot[i].off < op->off + op->n;
	if (bound || over)
		return (bound && ret == -EINVAL) || (over && ret == -EEXIST);
	o->slot[op->slot].used = o->slot[op->slot].gmem = true;
	o->slot[op->slot].ro = o->slot[op->slot].log = false;
	o->slot[op->slot].gfn = op->gfn;
	o->slot[op->slot].n = op->n;
	o->slot[op->slot].page = op->page;
	o->slot[op->slot].off = op->off;
	return !ret;
}

/* ---- accesses ---- */

/* The content of a guest page, or NULL: -EFAULT. */
static uint64_t *guest(struct oracle *o, unsigned gfn, bool write)
{
	int s = slot_of(o, gfn);
	unsigned i, page;

	if (s < 0 || (write && o->slot[s].ro))
		return NULL;
	i = gfn - o->slot[s].gfn;
	if (o->private_[gfn])
		return o->slot[s].gmem ? &o->file[o->slot[s].off + i].val : NULL;
	page = o->slot[s].page + i;
	return o->host[page].prot > (write ? 1u : 0u) ? &o->host[page].val : NULL;
}

/* F: a private page that was reached has memory. */
static void reach(struct oracle *o, unsigned gfn, enum there there)
{
	int s = slot_of(o, gfn);

	if (s >= 0 && o->slot[s].gmem && o->private_[gfn]) {
		enum there *now = &o->file[o->slot[s].off + gfn - o->slot[s].gfn].there;

		*now = *now > there ? *now : there;
	}
}

/* T, D: a write to a tracked page is reported to everybody; to another, it may be just after. */
static bool reported(struct oracle *o, unsigned gfn, const struct outcome *out)
{
	wrote(o, gfn, THERE);
	for (unsigned i = 0; i < MAX_THREADS; i++)
		if (o->tracker[i] && o->tracked[gfn] && !out->reports[i])
			return false;
	return true;
}

static bool load(struct oracle *o, const struct op *op, const struct outcome *out, uint64_t mask)
{
	const uint64_t *p = guest(o, op->gfn, false);

	reach(o, op->gfn, THERE);
	return p ? !out->ret && out->val == (*p & mask) : out->ret == -EFAULT;
}

static bool store(struct oracle *o, const struct op *op, const struct outcome *out, uint64_t to,
		  uint64_t *p)
{
	*p = to;
	return !out->ret && reported(o, op->gfn, out);
}

static bool access_op(struct oracle *o, const struct op *op, const struct outcome *out)
{
	uint64_t *p = guest(o, op->gfn, true), old;

	if (!p)
		return out->ret == -EFAULT;
	reach(o, op->gfn, THERE);
	old = *p;
	switch (op->kind) {
	case WRITE:
		return store(o, op, out, (old & ~0xffull) | (op->val & 0xff), p);
	case STORE:
	case GUEST_STORE:
		return store(o, op, out, op->val, p);
	case EXCHANGE:
		return out->val == old && store(o, op, out, op->val, p);
	case CAS: /* one that fails is a write to some, and not to others */
		if (old != op->want) {
			wrote(o, op->gfn, MAYBE);
			return !out->ret && out->val == old;
		}
		return out->val == old && store(o, op, out, op->val, p);
	case ADD:
		return out->val == old && store(o, op, out, old + op->val, p);
	case OR:
		return out->val == old && store(o, op, out, old | op->val, p);
	default:
		return out->val == old && store(o, op, out, old & op->val, p);
	}
}

/* The first page is exchanged; of the second it is enough that it is there. */
static bool window(struct oracle *o, const struct op *op, const struct outcome *out)
{
	uint64_t *p = guest(o, op->gfn, true);

	if (!p || (op->n == 2 && !guest(o, op->gfn + 1, true))) {
		reach(o, op->gfn, MAYBE);
		if (p) /* the other is not there */
			wrote(o, op->gfn, MAYBE);
		return out->ret == -EFAULT;
	}
	reach(o, op->gfn, THERE);
	if (op->n == 2) {
		reach(o, op->gfn + 1, THERE);
		wrote(o, op->gfn + 1, THERE);
	}
	return out->val == *p && store(o, op, out, op->val, p);
}

/* ---- N: host memory ---- */

static bool bracket(struct oracle *o, const struct op *op, int ret)
{
	if (ret == -EAGAIN)
		return op->flag;
	switch (op->kind) {
	case DISCARD:
		o->host[op->page].val = 0;
		break;
	case PROTECT:
		o->host[op->page].prot = op->prot;
		break;
	default:
		o->host[op->page].val = op->val;
		o->host[op->page].prot = 2;
		break;
	}
	return !ret;
}

/* ---- G: caches ---- */

/* Of an active cache. */
static uint64_t *cached(struct oracle *o, unsigned c)
{
	unsigned where = o->cache[c].where;

	if (!o->cache[c].hva)
		return guest(o, where, true);
	return o->host[where].prot == 2 ? &o->host[where].val : NULL;
}

static void reach_cached(struct oracle *o, unsigned c, enum there there)
{
	if (o->cache[c].active && !o->cache[c].hva)
		reach(o, o->cache[c].where, there);
}

static bool gpc_refresh(struct oracle *o, unsigned c, int ret)
{
	if (!o->cache[c].active)
		return ret == -EINVAL;
	reach_cached(o, c, THERE);
	return cached(o, c) ? !ret : ret == -EFAULT;
}

static bool gpc_exchange(struct oracle *o, const struct op *op, unsigned c, uint64_t old,
			 const struct outcome *out)
{
	uint64_t *p = cached(o, c);

	if (*p != old)
		return false;
	reach_cached(o, c, THERE);
	*p = op->val;
	return o->cache[c].hva || reported(o, o->cache[c].where, out);
}

static bool gpc_lock(struct oracle *o, const struct op *op, const struct outcome *out)
{
	if (out->ret == -EAGAIN)
		return op->kind == GPC_TRYLOCK;
	if (!o->cache[op->slot].active || !cached(o, op->slot))
		return op->kind == GPC_LOCK && gpc_refresh(o, op->slot, out->ret);
	return !out->ret && gpc_exchange(o, op, op->slot, out->val, out);
}

static bool gpc_lock_many(struct oracle *o, const struct op *op, const struct outcome *out)
{
	const unsigned c[2] = {op->slot, op->n};
	bool good = true, why = false;

	for (unsigned i = 0; i < 2; i++) {
		good &= o->cache[c[i]].active && cached(o, c[i]);
		why |= out->ret == (o->cache[c[i]].active ? -EFAULT : -EINVAL);
	}
	if (!good) {
		reach_cached(o, c[0], MAYBE);
		reach_cached(o, c[1], MAYBE);
		return why;
	}
	return !out->ret && gpc_exchange(o, op, c[0], out->val, out) &&
	       gpc_exchange(o, op, c[1], out->val2, out);
}

static bool gpc_move(struct oracle *o, const struct op *op, int ret)
{
	o->cache[op->slot].active = true;
	o->cache[op->slot].hva = op->kind == GPC_ACTIVATE_HVA;
	o->cache[op->slot].where = op->kind == GPC_ACTIVATE_HVA ? op->page : op->gfn;
	reach_cached(o, op->slot, MAYBE);
	return !ret;
}

/* ---- D: logs ---- */

static bool dirty_get(struct oracle *o, const struct op *op, const struct outcome *out)
{
	uint64_t least = 0, most = 0;

	if (!o->slot[op->slot].used || !o->slot[op->slot].log)
		return out->ret == -ENOENT;
	for (unsigned i = 0; i < GUEST_PAGES && i < o->slot[op->slot].n; i++) {
		enum there *d = &o->slot[op->slot].dirty[i];

		least |= (uint64_t)(*d == THERE) << i;
		most |= (uint64_t)(*d != NOT) << i;
		*d = o->dirty_mode && out->val >> i & 1 ? THERE : NOT;
	}
	return !out->ret && !(least & ~out->val) && !(out->val & ~most);
}

/* As many pages as the caller believes there are. */
static bool dirty_clear(struct oracle *o, const struct op *op, const struct outcome *out)
{
	if (!o->slot[op->slot].used || !o->slot[op->slot].log)
		return out->ret == -ENOENT;
	if (op->n != o->slot[op->slot].n)
		return out->ret == -EINVAL;
	for (unsigned i = 0; i < GUEST_PAGES && i < op->n; i++)
		if (op->val >> i & 1)
			o->slot[op->slot].dirty[i] = NOT;
	return !out->ret;
}

/* ---- F: private memory ---- */

static bool file_range(struct oracle *o, const struct op *op, int ret)
{
	o->file[op->off].there = op->kind == ALLOCATE ? THERE : NOT;
	if (op->kind == PUNCH)
		o->file[op->off].val = 0;
	return !ret;
}

static bool allocated(const struct oracle *o, const struct outcome *out)
{
	uint64_t least = 0, most = 0;

	for (unsigned i = 0; i < FILE_PAGES; i++) {
		least += o->file[i].there == THERE;
		most += o->file[i].there != NOT;
	}
	return !out->ret && out->val >= least * 4096 && out->val <= most * 4096;
}

/* ---- */

bool oracle_accepts(struct oracle *o, const struct op *op, const struct outcome *out)
{
	int s;

	o->nr_written = 0;
	switch (op->kind) {
	case SET:
		return set(o, op, out->ret);
	case SET_GMEM:
		return set_gmem(o, op, out->ret);
	case FIND:
	case TRANSLATE:
		s = slot_of(o, op->gfn);
		if (s < 0)
			return out->ret == -EFAULT;
		return !out->ret && out->val == o->slot[s].page + op->gfn - o->slot[s].gfn;
	case READ:
		return load(o, op, out, 0xff);
	case LOAD:
	case GUEST_LOAD:
		return load(o, op, out, ~0ull);
	case WRITE:
	case STORE:
	case GUEST_STORE:
	case EXCHANGE:
	case CAS:
	case ADD:
	case OR:
	case AND:
		return access_op(o, op, out);
	case WINDOW:
		return window(o, op, out);
	case DISCARD:
	case PROTECT:
	case REPLACE:
		return bracket(o, op, out->ret);
	case GPC_ACTIVATE:
	case GPC_ACTIVATE_HVA:
		return gpc_move(o, op, out->ret);
	case GPC_DEACTIVATE:
		o->cache[op->slot].active = false;
		return !out->ret;
	case GPC_CHECK: /* never good without being good */
		return !out->ret || (o->cache[op->slot].active && cached(o, op->slot));
	case GPC_REFRESH:
		return gpc_refresh(o, op->slot, out->ret);
	case GPC_LOCK:
	case GPC_TRYLOCK:
		return gpc_lock(o, op, out);
	case GPC_LOCK_MANY:
		return gpc_lock_many(o, op, out);
	case GPC_AREA:
		reach(o, op->gfn, MAYBE);
		reach(o, op->gfn + 1, MAYBE);
		if (!guest(o, op->gfn, true) || !guest(o, op->gfn + 1, true))
			return out->ret == -EFAULT;
		return !out->ret;
	case DIRTY_MODE:
		o->dirty_mode = op->prot == 2 ? 3 : op->prot;
		return !out->ret;
	case DIRTY_GET:
		return dirty_get(o, op, out);
	case DIRTY_CLEAR:
		return dirty_clear(o, op, out);
	case TRACK_ON:
		o->tracker[op->thread] = true;
		return !out->ret;
	case TRACK_OFF:
		o->tracker[op->thread] = false;
		return !out->ret;
	case TRACK_ADD:
		if (slot_of(o, op->gfn) < 0)
			return out->ret == -ENOENT;
		o->tracked[op->gfn]++;
		return !out->ret;
	case TRACK_REMOVE:
		if (slot_of(o, op->gfn) < 0 || !o->tracked[op->gfn])
			return out->ret == -ENOENT;
		o->tracked[op->gfn]--;
		return !out->ret;
	case ALLOCATE:
	case PUNCH:
		return file_range(o, op, out->ret);
	case ALLOCATED:
		return allocated(o, out);
	case SET_PRIVATE:
		o->private_[op->gfn] = op->flag;
		return !out->ret;
	case IS_PRIVATE:
		return !out->ret && out->val == o->private_[op->gfn];
	case OTHER_VM: /* stores to the page through a slot of its own */
		if (o->host[op->page].prot < 2)
			return out->ret == -EFAULT;
		o->host[op->page].val = op->val;
		return !out->ret;
	case GPC_LIFE: /* at guest page 0 */
		reach(o, 0, MAYBE);
		return !out->ret;
	case RING_LIFE: /* a store is in it, once */
	case YOUNG:
	case GMEM_LIFE:
		return !out->ret;
	default:
		return false;
	}
}
