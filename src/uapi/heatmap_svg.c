/* SPDX-License-Identifier: MIT */
/*
 * The picture of --heatmap: time from left to right, guest memory from top to bottom, slot by slot;
 * the colour is the dirty rate. Below it, the rate of all slots together.
 */
#include <fcntl.h>
#include <string.h>

#include "host/sys.h"
#include "uapi/heatmap.h"

#define LEFT      230u
#define WIDTH     768u /* of the plot */
#define RIGHT     30u
#define TOP       70u
#define SLOT_GAP  8u
#define MIN_SLOT  30u /* two lines of text */
#define BAND      4u
#define TOTAL     80u
#define DRAWN_MAX 40u
#define FEW       16u /* no column is wider than if there were so many */

_Static_assert(WIDTH >= KL_HEAT_COLUMNS, "a pixel for each");

/* From seldom to often; readable by those who see no colours, too. */
static const char *const colours[] = {"#ffeda0", "#fed976", "#feb24c", "#fd8d3c",
				      "#fc4e2a", "#e31a1c", "#bd0026", "#6a0020"};
#define CLASSES KL_ARRAY_SIZE(colours)
#define STEP    3.16227766016837933 /* from one to the next: two are a power of ten */

struct picture {
	struct kl_heatmap_out *o;
	const struct kl_heat *heat;
	double top_class;          /* the lowest rate of the last colour */
	uint64_t least;            /* slots of which fewer pages were written are left out */
	unsigned plot_end, height; /* y */
	unsigned cell;             /* the width of a column */
};

#define put(p, ...) kl_heatmap_put((p)->o, __VA_ARGS__)

static double seconds(uint64_t ns)
{
	return (double)ns / 1e9;
}

/* How long column @c was, so far. */
static double column_seconds(const struct kl_heat *heat, unsigned c)
{
	uint64_t ns = kl_min((c + 1) * heat->column_ns, heat->now_ns) - c * heat->column_ns;

	return seconds(kl_max(ns, KL_HEAT_TICK_NS));
}

static double cell_rate(const struct kl_heat *heat, const struct kl_heat_record *r, unsigned c,
			unsigned band)
{
	return r->cells[c * r->bands + band] / column_seconds(heat, c);
}

/* 0: nothing; else its colour + 1. */
static unsigned class_of(const struct picture *p, double rate)
{
	double from = p->top_class;
	unsigned class = CLASSES;

	if (rate <= 0)
		return 0;
	for (; class > 1 && rate < from; class --)
		from /= STEP;
	return class;
}

static void find_scale(struct picture *p)
{
	double most = 10;

	for (const struct kl_heat_record *r = p->heat->records; r; r = r->next)
		for (unsigned i = 0; r->cells && i < p->heat->columns * r->bands; i++)
			most = kl_max(most, cell_rate(p->heat, r, i / r->bands, i % r->bands));
	for (p->top_class = 10; p->top_class * STEP <= most;)
		p->top_class *= STEP;
}

/* ---- which slots, and where -------------------------------------------------------------- */

static unsigned band_height(const struct kl_heat_record *r)
{
	return kl_max(BAND, MIN_SLOT / r->bands);
}

static unsigned slot_height(const struct kl_heat_record *r)
{
	return kl_max(MIN_SLOT, r->bands * band_height(r));
}

static unsigned nr_with(const struct kl_heat *heat, uint64_t least)
{
	unsigned n = 0;

	for (const struct kl_heat_record *r = heat->records; r; r = r->next)
		n += r->written >= least;
	return n;
}

/* No more than a reader takes in: those of which most was written. */
static void choose_slots(struct picture *p)
{
	uint64_t low = 0, high = p->heat->written + 1;

	while (low < high && nr_with(p->heat, low) > DRAWN_MAX) {
		uint64_t middle = low + (high - low) / 2;

		if (nr_with(p->heat, middle) > DRAWN_MAX)
			low = middle + 1;
		else
			high = middle;
		if (low == high)
			break;
	}
	p->least = low;
	p->plot_end = TOP;
	for (const struct kl_heat_record *r = p->heat->records; r; r = r->next)
		if (r->written >= p->least)
			p->plot_end += slot_height(r) + SLOT_GAP;
	p->height = p->plot_end + 40 + TOTAL + 110;
}

/* ---- pieces ------------------------------------------------------------------------------ */

static void put_escaped(struct picture *p, const char *s)
{
	for (; *s; s++)
		switch (*s) {
		case '<':
			put(p, "&lt;");
			break;
		case '>':
			put(p, "&gt;");
			break;
		case '&':
			put(p, "&amp;");
			break;
		default:
			/* What is no letter in every encoding is none here. */
			put(p, "%c", *s >= ' ' && *s < 0x7f ? *s : '?');
		}
}

static void put_program(struct picture *p)
{
	char name[64] = "program";
	long fd = kl_sys(SYS_openat, AT_FDCWD, "/proc/self/comm", O_RDONLY | O_CLOEXEC), n;

	if (fd >= 0) {
		n = kl_sys(SYS_read, fd, name, sizeof(name) - 1);
		name[n > 0 ? n : 0] = 0;
		name[strcspn(name, "\n")] = 0;
		kl_sys(SYS_close, fd);
	}
	put_escaped(p, name);
}

static void put_head(struct picture *p)
{
	const struct kl_heat *h = p->heat;

	put(p,
	    "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n"
	    "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%u\" height=\"%u\" "
	    "viewBox=\"0 0 %u %u\" font-family=\"sans-serif\" font-size=\"12\">\n",
	    LEFT + WIDTH + RIGHT, p->height, LEFT + WIDTH + RIGHT, p->height);
	put(p, "<title>kvmlet heatmap: dirty rate of guest memory</title>\n");
	put(p, "<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n");
	put(p, "<text x=\"%u\" y=\"26\" font-size=\"18\">Dirty rate of guest memory: ", LEFT);
	put_program(p);
	put(p, ", pid %d</text>\n", (int)kl_sys(SYS_getpid));
	put(p,
	    "<text x=\"%u\" y=\"46\">%.1f s, %u VM%s, %u slot%s: %llu pages (%s) written, each at "
	    "most once in 0.1 s; a column is %g s</text>\n",
	    LEFT, seconds(h->now_ns), h->nr_vms, h->nr_vms == 1 ? "" : "s", h->nr_records,
	    h->nr_records == 1 ? "" : "s", (unsigned long long)h->written,
	    kl_heatmap_size(h->written).s, seconds(h->column_ns));
	put(p,
	    "<text x=\"14\" y=\"%u\" transform=\"rotate(-90 14 %u)\" text-anchor=\"middle\">"
	    "guest memory</text>\n",
	    (TOP + p->plot_end) / 2, (TOP + p->plot_end) / 2);
}

static unsigned x_of(const struct picture *p, uint64_t ns)
{
	return LEFT + (unsigned)(ns / p->heat->column_ns) * p->cell;
}

/* All cells of one colour: each run of them is a rectangle. */
static void put_class(struct picture *p, const struct kl_heat_record *r, unsigned class, unsigned y)
{
	unsigned bh = band_height(r);
	bool any = false;

	for (unsigned b = 0; b < r->bands; b++) {
		for (unsigned c = 0, run; c < p->heat->columns; c += run) {
			for (run = 0; c + run < p->heat->columns &&
				      class_of(p, cell_rate(p->heat, r, c + run, b)) == class;)
				run++;
			if (!run) {
				run = 1;
				continue;
			}
			put(p, "%sM%u %uh%uv%uh-%uz", any ? "" : "<path d=\"", LEFT + c * p->cell,
			    y + b * bh, run * p->cell, bh, run * p->cell);
			any = true;
		}
	}
	if (any)
		put(p, "\" fill=\"%s\"/>\n", colours[class - 1]);
}

static void put_slot(struct picture *p, const struct kl_heat_record *r, unsigned y)
{
	const struct kl_heat *h = p->heat;
	unsigned height = slot_height(r), from = x_of(p, r->begun_ns);
	unsigned to = x_of(p, r->ended_ns ? r->ended_ns : h->now_ns) + p->cell;
	unsigned long long start = (unsigned long long)r->base_gfn << KL_PAGE_SHIFT;
	unsigned long long end = start + (r->npages << KL_PAGE_SHIFT);

	put(p,
	    "<g><title>VM %llu slot %s, %#llx to %#llx: %llu pages written, %s of %s at least "
	    "once</title>\n",
	    (unsigned long long)r->vm, kl_heatmap_slot(r).s, start, end,
	    (unsigned long long)r->written, kl_heatmap_size(r->distinct).s,
	    kl_heatmap_size(r->npages).s);
	put(p, "<rect x=\"%u\" y=\"%u\" width=\"%u\" height=\"%u\" fill=\"#f0f0f0\"/>\n", from, y,
	    kl_min(to, LEFT + WIDTH) - from, height);
	for (unsigned k = 1; r->cells && k <= CLASSES; k++)
		put_class(p, r, k, y);
	put(p,
	    "<rect x=\"%u.5\" y=\"%u.5\" width=\"%u\" height=\"%u\" fill=\"none\" "
	    "stroke=\"#888\"/>\n",
	    LEFT, y, WIDTH - 1, height - 1);
	put(p, "<text x=\"28\" y=\"%u\" font-weight=\"bold\">VM %llu slot %s</text>\n", y + 12,
	    (unsigned long long)r->vm, kl_heatmap_slot(r).s);
	put(p, "<text x=\"28\" y=\"%u\" fill=\"#555\">%s</text>\n", y + 26,
	    kl_heatmap_size(r->npages).s);
	/* The first address at its upper edge, the end at the lower. */
	put(p, "<text x=\"%u\" y=\"%u\" text-anchor=\"end\" font-size=\"10\">%#llx</text>\n",
	    LEFT - 6, y + 9, start);
	put(p, "<text x=\"%u\" y=\"%u\" text-anchor=\"end\" font-size=\"10\">%#llx</text>\n</g>\n",
	    LEFT - 6, y + height, end);
}

/* 1, 2 or 5 times a power of ten: about eight of it. */
static double tick_of(double whole)
{
	double unit = 0.1;

	while (unit * 10 < whole / 8)
		unit *= 10;
	return whole / 8 <= unit       ? unit
	       : whole / 8 <= 2 * unit ? 2 * unit
	       : whole / 8 <= 5 * unit ? 5 * unit
				       : 10 * unit;
}

static void put_time_axis(struct picture *p, unsigned y)
{
	double whole = seconds(p->heat->column_ns) * WIDTH / p->cell, tick = tick_of(whole);

	for (double t = 0; t <= whole; t += tick) {
		unsigned x = LEFT + (unsigned)(t / whole * WIDTH);

		put(p, "<path d=\"M%u.5 %uv5\" stroke=\"#444\"/>", x, y);
		put(p, "<text x=\"%u\" y=\"%u\" text-anchor=\"middle\">%g</text>\n", x, y + 18, t);
	}
	put(p,
	    "<text x=\"%u\" y=\"%u\" text-anchor=\"middle\">time since the first VM (s)</text>\n",
	    LEFT + WIDTH / 2, y + 34);
}

static void put_total(struct picture *p, unsigned y)
{
	const struct kl_heat *h = p->heat;
	double most = 1;

	for (unsigned c = 0; c < h->columns; c++)
		most = kl_max(most, (double)h->total[c] / column_seconds(h, c));
	put(p, "<g><title>dirty rate of all slots</title>\n<path d=\"M%u %u", LEFT, y + TOTAL);
	for (unsigned c = 0; c < h->columns; c++)
		put(p, "V%uh%u",
		    y + TOTAL -
			    (unsigned)((double)h->total[c] / column_seconds(h, c) / most * TOTAL),
		    p->cell);
	put(p, "V%uz\" fill=\"#fc4e2a\" stroke=\"none\"/>\n", y + TOTAL);
	put(p,
	    "<rect x=\"%u.5\" y=\"%u.5\" width=\"%u\" height=\"%u\" fill=\"none\" "
	    "stroke=\"#888\"/>\n",
	    LEFT, y, WIDTH - 1, TOTAL);
	put(p, "<text x=\"28\" y=\"%u\" font-weight=\"bold\">all slots</text>\n", y + 12);
	put(p, "<text x=\"28\" y=\"%u\" fill=\"#555\">pages/s</text>\n", y + 26);
	put(p, "<text x=\"%u\" y=\"%u\" text-anchor=\"end\" font-size=\"10\">%.0f</text>\n",
	    LEFT - 6, y + 9, most);
	put(p, "<text x=\"%u\" y=\"%u\" text-anchor=\"end\" font-size=\"10\">0</text>\n</g>\n",
	    LEFT - 6, y + TOTAL);
	put_time_axis(p, y + TOTAL);
}

static unsigned long long two_digits(double x)
{
	unsigned long long unit = 1;

	while (x / (double)unit >= 100)
		unit *= 10;
	return (unsigned long long)(x / (double)unit + 0.5) * unit;
}

static void put_legend(struct picture *p, unsigned y)
{
	const unsigned step = WIDTH / (CLASSES + 1);

	put(p, "<text x=\"28\" y=\"%u\" font-weight=\"bold\">pages/s in a band</text>\n", y + 12);
	put(p, "<text x=\"28\" y=\"%u\" fill=\"#555\">a slot has up to %u</text>\n", y + 26,
	    KL_HEAT_BANDS);
	put(p,
	    "<rect x=\"%u.5\" y=\"%u.5\" width=\"%u\" height=\"14\" fill=\"#f0f0f0\" "
	    "stroke=\"#888\"/><text x=\"%u\" y=\"%u\">none</text>\n",
	    LEFT, y, step - 8, LEFT, y + 28);
	for (unsigned k = 0; k < CLASSES; k++) {
		double from = p->top_class;

		for (unsigned i = k + 1; i < CLASSES; i++)
			from /= STEP;
		put(p,
		    "<rect x=\"%u.5\" y=\"%u.5\" width=\"%u\" height=\"14\" fill=\"%s\" "
		    "stroke=\"#888\"/>",
		    LEFT + (k + 1) * step, y, step - 8, colours[k]);
		if (k)
			put(p, "<text x=\"%u\" y=\"%u\">from %llu</text>\n", LEFT + (k + 1) * step,
			    y + 28, two_digits(from));
		else
			put(p, "<text x=\"%u\" y=\"%u\">fewer</text>\n", LEFT + step, y + 28);
	}
}

void kl_heatmap_draw(struct kl_heatmap_out *o, const struct kl_heat *heat)
{
	struct picture p = {.o = o, .heat = heat};
	unsigned y = TOP;

	p.cell = WIDTH / kl_max(heat->columns, FEW);
	find_scale(&p);
	choose_slots(&p);
	put_head(&p);
	for (const struct kl_heat_record *r = heat->records; r; r = r->next) {
		if (r->written < p.least)
			continue;
		put_slot(&p, r, y);
		y += slot_height(r) + SLOT_GAP;
	}
	if (p.least)
		put(&p,
		    "<text x=\"%u\" y=\"%u\" fill=\"#555\">not drawn: %u slots with fewer pages "
		    "written</text>\n",
		    LEFT, y + 12, heat->nr_records - nr_with(heat, p.least));
	put_total(&p, p.plot_end + 20);
	put_legend(&p, p.plot_end + 20 + TOTAL + 54);
	put(&p, "</svg>\n");
}
