/* SPDX-License-Identifier: MIT */
#include "ref_walk.h"

#include <stdlib.h>
#include <string.h>

#define P  (1ull << 0)
#define RW (1ull << 1)
#define US (1ull << 2)
#define A  (1ull << 5)
#define D  (1ull << 6)
#define PS (1ull << 7)
#define XD (1ull << 63)

/* Bits @lo to @hi; none if there are none between. */
static uint64_t bits(unsigned hi, unsigned lo)
{
	uint64_t m = 0;

	for (unsigned i = lo; i <= hi && hi < 64; i++)
		m |= 1ull << i;
	return m;
}

/*
 * What must be 0 in a present entry of @level (1: PTE ... 5: PML5E); @leaf: it maps a page.
 */
static uint64_t reserved(const struct ref_cfg *c, unsigned level, bool leaf)
{
	uint64_t r = 0;

	if (c->paging == REF_32) {
		/* 4-MByte pages: bits 20:13 are address bits 39:32, as far as there are any. */
		if (level == 2 && leaf) {
			unsigned m = c->maxphyaddr < 40 ? c->maxphyaddr : 40;

			r = bits(21, m - 19);
		}
		return r;
	}
	if (c->maxphyaddr < 52)
		r |= bits(51, c->maxphyaddr);
	if (c->paging == REF_PAE)
		r |= bits(62, 52);
	if (!c->nxe)
		r |= XD;
	if (level >= 4)
		r |= PS;
	if (level >= 4 && c->amd)
		r |= 1ull << 8;
	if (level == 3 && leaf)
		r |= bits(29, 13);
	if (level == 2 && leaf)
		r |= bits(20, 13);
	return r;
}

static bool maps_page(const struct ref_cfg *c, unsigned level, uint64_t entry)
{
	if (level == 1)
		return true;
	if (!(entry & PS))
		return false;
	if (c->paging == REF_32)
		return c->pse;
	return level == 2 || (level == 3 && c->paging >= REF_4LEVEL);
}

static uint64_t load(const uint8_t *mem, uint64_t size, uint64_t at, unsigned n)
{
	uint64_t val = 0;

	if (at + n > size)
		abort(); /* the test's own mistake */
	memcpy(&val, mem + at, n);
	return val;
}

static bool canonical(uint64_t lin, unsigned width)
{
	int64_t s = (int64_t)lin << (64 - width) >> (64 - width);

	return (uint64_t)s == lin;
}

struct rights {
	bool user, writable, nx;
	unsigned key;
};

/* The protection key forbids it. */
static bool key_denies(const struct ref_cfg *c, const struct rights *r, enum ref_kind kind)
{
	bool write = kind == REF_WRITE || kind == REF_SYS_WRITE;
	bool user = c->user && kind < REF_SYS_READ;
	bool ad = c->pkru >> (2 * r->key) & 1, wd = c->pkru >> (2 * r->key + 1) & 1;

	if (!c->pke || c->paging < REF_4LEVEL || !r->user || kind == REF_EXEC)
		return false;
	return ad || (write && wd && (user || c->wp));
}

static bool allowed(const struct ref_cfg *c, const struct rights *r, enum ref_kind kind)
{
	bool user = c->user && kind < REF_SYS_READ;

	if (user) {
		if (!r->user)
			return false;
		switch (kind) {
		case REF_READ:
			return true;
		case REF_WRITE:
			return r->writable;
		default:
			return !r->nx;
		}
	}
	if (kind == REF_EXEC)
		return !r->nx && !(c->smep && r->user);
	/* AC lifts SMAP for explicit accesses alone. */
	if (c->smap && r->user && !(c->ac && kind < REF_SYS_READ))
		return false;
	if (kind == REF_WRITE || kind == REF_SYS_WRITE)
		return r->writable || !c->wp;
	return true;
}

static uint32_t error_code(const struct ref_cfg *c, enum ref_kind kind)
{
	uint32_t e = 0;

	if (kind == REF_WRITE || kind == REF_SYS_WRITE)
		e |= 2;
	if (c->user && kind < REF_SYS_READ)
		e |= 4;
	if (kind == REF_EXEC && ((c->paging >= REF_PAE && c->nxe) || c->smep))
		e |= 16;
	return e;
}

struct ref_result ref_walk(const struct ref_cfg *c, const uint8_t *mem, uint64_t size, uint64_t lin,
			   enum ref_kind kind)
{
	static const struct {
		unsigned top, index_bits, entry_size;
	} shape[] = {
		[REF_32] = {2, 10, 4},
		[REF_PAE] = {3, 9, 8},
		[REF_4LEVEL] = {4, 9, 8},
		[REF_5LEVEL] = {5, 9, 8},
	};
	struct rights r = {.user = true, .writable = true};
	struct ref_result res = {0};
	uint64_t table = c->cr3 & bits(c->paging >= REF_4LEVEL ? 51 : 31, 12);
	uint64_t entry = 0;
	unsigned ib, level, shift = 12;

	if (c->paging == REF_NONE) {
		res.gpa = lin;
		return res;
	}
	if ((c->paging == REF_4LEVEL && !canonical(lin, 48)) ||
	    (c->paging == REF_5LEVEL && !canonical(lin, 57))) {
		res.status = REF_GP;
		return res;
	}
	res.error = error_code(c, kind);
	res.status = REF_PF;
	ib = shape[c->paging].index_bits;
	for (level = shape[c->paging].top; level; level--) {
		uint64_t index, at;
		bool leaf;

		shift = 12 + (level - 1) * ib;
		if (c->paging == REF_PAE && level == 3) {
			/* No rights, no A bit, not read from memory now. */
			entry = c->pdpte[lin >> 30 & 3];
			if (!(entry & P))
				return res;
			table = entry & bits(51, 12);
			continue;
		}
		index = lin >> shift & bits(ib - 1, 0);
		at = table + index * shape[c->paging].entry_size;
		entry = load(mem, size, at, shape[c->paging].entry_size);
		if (!(entry & P))
			return res;
		leaf = maps_page(c, level, entry);
		if (entry & reserved(c, level, leaf)) {
			res.error |= 1 | 8;
			return res;
		}
		r.user &= !!(entry & US);
		r.writable &= !!(entry & RW);
		if (c->paging >= REF_PAE && c->nxe)
			r.nx |= !!(entry & XD);
		res.entry[res.n].gpa = at;
		res.entry[res.n].size = shape[c->paging].entry_size;
		res.entry[res.n++].set = A;
		if (leaf)
			break;
		table = entry & bits(c->paging == REF_32 ? 31 : 51, 12);
	}
	r.key = entry >> 59 & 15;
	res.error |= 1;
	if (key_denies(c, &r, kind))
		res.error |= 32;
	if (!allowed(c, &r, kind) || key_denies(c, &r, kind))
		return res;
	res.status = REF_OK;
	res.error = 0;
	if (kind == REF_WRITE || kind == REF_SYS_WRITE)
		res.entry[res.n - 1].set |= D;
	res.gpa = entry & bits(c->paging == REF_32 ? 31 : 51, shift);
	if (c->paging == REF_32 && level == 2)
		res.gpa |= (entry >> 13 & 0xff) << 32;
	res.gpa |= lin & bits(shift - 1, 0);
	return res;
}
