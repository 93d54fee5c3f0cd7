/* SPDX-License-Identifier: MIT */
/*
 * Guest code: random bytes, pieces of this machine's programs, the same with bytes changed, and
 * instructions that change the system's state, mixed.
 */
#include <elf.h>
#include <fcntl.h>
#include <glob.h>
#include <sys/stat.h>

#include "fuzz.h"

#define MAX_TEXTS 64

static struct {
	const uint8_t *p;
	size_t n;
} texts[MAX_TEXTS];
static unsigned ntexts;

/* The executable segments of the ELF file @path. */
static void add_texts(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	const Elf64_Phdr *ph;
	const Elf64_Ehdr *eh;
	const uint8_t *file;
	struct stat st;

	if (fd < 0)
		return;
	if (fstat(fd, &st) || !S_ISREG(st.st_mode) || st.st_size < (off_t)sizeof(*eh) ||
	    (file = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0)) == MAP_FAILED) {
		close(fd);
		return;
	}
	close(fd);
	eh = (const void *)file;
	if (memcmp(eh->e_ident, ELFMAG, SELFMAG) || eh->e_ident[EI_CLASS] != ELFCLASS64)
		return;
	ph = (const void *)(file + eh->e_phoff);
	for (unsigned i = 0; i < eh->e_phnum && ntexts < MAX_TEXTS; i++) {
		if (ph[i].p_type != PT_LOAD || !(ph[i].p_flags & PF_X) || ph[i].p_filesz < 4096 ||
		    ph[i].p_offset + ph[i].p_filesz > (uint64_t)st.st_size)
			continue;
		texts[ntexts].p = file + ph[i].p_offset;
		texts[ntexts++].n = ph[i].p_filesz;
	}
}

void code_init(void)
{
	glob_t g;

	add_texts("/lib/x86_64-linux-gnu/libc.so.6");
	add_texts("/lib/x86_64-linux-gnu/libm.so.6");
	if (glob("/bin/*", 0, NULL, &g))
		return;
	for (size_t i = 0; i < g.gl_pathc && ntexts < MAX_TEXTS; i += 1 + g.gl_pathc / MAX_TEXTS)
		add_texts(g.gl_pathv[i]);
	globfree(&g);
}

static unsigned real_code(uint64_t *rng, uint8_t *at, unsigned n, bool mutate)
{
	if (!ntexts) {
		fill_random(rng, at, n);
		return n;
	}
	for (unsigned t = (unsigned)below(rng, ntexts);;) {
		/* Functions begin at multiples of 16. */
		memcpy(at, texts[t].p + (below(rng, texts[t].n - n) & ~15ull), n);
		break;
	}
	for (unsigned i = mutate ? 1 + (unsigned)below(rng, 1 + n / 16) : 0; i; i--) {
		uint8_t *b = &at[below(rng, n)];

		switch (below(rng, 4)) {
		case 0:
			*b ^= (uint8_t)(1 << below(rng, 8));
			break;
		case 1:
			*b = (uint8_t)rnd(rng);
			break;
		case 2: /* a prefix */
			*b = (const uint8_t[]){0x66, 0x67, 0xf0, 0xf2, 0xf3,
					       0x2e, 0x36, 0x64, 0x48, 0x41}[below(rng, 10)];
			break;
		default: /* a byte more, or less */
			memmove(b, b + 1, (size_t)(at + n - b - 1));
		}
	}
	return n;
}

/*
 * Instructions that do more than compute. "??" is a random byte, "II" a register of MSRs, four
 * bytes wide, "AA" an address of code or data, four bytes wide, "SS" a selector.
 */
static const char *const templates[] = {
	/* control and debug registers, descriptor tables */
	"0f20??",
	"0f22??",
	"440f22c?",
	"0f21??",
	"0f23??",
	"0f01??",
	"0f01??",
	"0f00??",
	"0f00??",
	"0f06",
	"0f01f0",
	"0f01e0",
	"0f01??AA",
	"0f0115AA",
	"0f011dAA",
	"0f013dAA",
	"660f3882??",
	"660f388204??",
	"0f20d80f22d8",
	"0f20e034800f22e0",
	"0f20c00d000001000f22c0",
	"0f20e00d000030000f22e0",
	/* MSRs */
	"b9II0f32",
	"b9II0f30",
	"b9II31d2b8????00000f30",
	"0f33",
	"0f31",
	"0f01f9",
	"f30fc7f?",
	/* segments and far transfers */
	"8e??",
	"66b8SS8ed0",
	"66b8SS8ed8",
	"66b8SS8ec0",
	"66b8SS8ee0",
	"66b8SS8ee8",
	"66b8SS0f00d8",
	"66b8SS0f00d0",
	"66b8SS0f02c0",
	"66b8SS0f03c0",
	"66b8SS0f00e0",
	"66b8SS0f00e8",
	"9aAASS",
	"eaAASS",
	"ff1dAA",
	"ff2dAA",
	"ff1c25AA",
	"48ff1c25AA",
	"cb",
	"ca0800",
	"48cb",
	"cf",
	"48cf",
	"66cf",
	"0fb2??",
	"0fb4??",
	"0fb5??",
	"c5??",
	"c4??",
	"07",
	"17",
	"1f",
	"0fa1",
	"0fa9",
	"06",
	"16",
	"0e",
	"6aSS6a??68AAcb",
	"9c6aSS68AAcf",
	/* interrupts and system calls */
	"cd??",
	"cd80",
	"cc",
	"f1",
	"ce",
	"0f05",
	"0f07",
	"480f07",
	"0f34",
	"0f35",
	"480f35",
	"0f01f8",
	"0f01c1",
	"0f01d9",
	"0f0b",
	"0fb9??",
	"0fff??",
	"0f01ca",
	"0f01cb",
	"0f01c8",
	"0f01c9",
	/* flags, stack */
	"9d",
	"9c",
	"fa",
	"fb",
	"f4",
	"fbf4",
	"fa",
	"68??????009d",
	"6800030000"
	"9d",
	"c8??00??",
	"c9",
	"60",
	"61",
	"bcAA",
	"48c7c4AA",
	"58",
	"5c",
	"8f04??",
	"ff34??",
	/* ports, strings */
	"6c",
	"f36c",
	"f36d",
	"6e",
	"f36e",
	"f36f",
	"e4??",
	"e5??",
	"e6??",
	"e7??",
	"ec",
	"ed",
	"ee",
	"ef",
	"66baf8036cee",
	"f3a4",
	"f3a5",
	"f348a5",
	"f3aa",
	"f3ab",
	"f3a6",
	"f2ae",
	"a4",
	"a5",
	"66f3a5",
	"67f3a4",
	"b9????0000f3a4",
	"bfAA",
	"beAA",
	"fd",
	"fc",
	/* memory with a lock, wide and odd operands */
	"f0??????",
	"f00fc1??",
	"f00fb0??",
	"f00fb1??",
	"0fc708",
	"f00fc70f",
	"480fc70f",
	"f0480fc70e",
	"f00fba??",
	"f00fab??",
	"f0480fb3??",
	"86??",
	"87??",
	"87351000",
	"0fae??",
	"0fae07",
	"0fae0f",
	"480fae07",
	"0fae27",
	"0fae2f",
	"0fae17",
	"0fc727",
	"0fc72f",
	"0fc71f",
	"0f0d??",
	"0f18??",
	"0fae38",
	"62??????",
	"0f1f??",
	"0fc7f?",
	"0fc3??",
	"dd27",
	"dd37",
	"d927",
	"d937",
	"db??",
	"d9??",
	"df??",
	"9b",
	"0f77",
	"0f0e",
	"660f7f07",
	"0f2907",
	"0f2807",
	"660fe707",
	"0ff7??",
	"660ff7??",
	"d7",
	"c5??????",
	"c4??????????",
	"f30fae??",
	"f3480fae??",
	"0f01d0",
	"0f01d1",
	"31c9b80700000031d20f01d1",
	"0f08",
	"0f09",
	"f30f09",
	"0fa2",
	"31c00fa2",
	"0faa",
	"f390",
	"0f38f?????",
	"0f3a????",
	/* control flow */
	"e8AA",
	"e9????ffff",
	"eb??",
	"74??",
	"e2??",
	"ffe?",
	"ffd?",
	"ff25AA",
	"c3",
	"c20800",
	"e3??",
	"ff24c5AA",
};

static const uint32_t msrs[] = {
	0x10,       0x1b,       0x3a,       0x3b,       0x48,       0x49,       0x8b,
	0xfe,       0x10a,      0x174,      0x175,      0x176,      0x179,      0x17a,
	0x1a0,      0x1d9,      0x200,      0x201,      0x250,      0x277,      0x2ff,
	0x400,      0x401,      0x6e0,      0x800,      0x802,      0x808,      0x80b,
	0x80f,      0x830,      0x832,      0x838,      0x83f,      0xda0,      0x9e,
	0xc0000080, 0xc0000081, 0xc0000082, 0xc0000083, 0xc0000084, 0xc0000100, 0xc0000101,
	0xc0000102, 0xc0000103, 0xc0010015, 0xc001001f, 0x4b564d00, 0x4b564d01, 0x40000000,
	0xc0010117,
};

static unsigned nibble(char c, uint64_t *rng)
{
	return c == '?' ? (unsigned)below(rng, 16) : (unsigned)(c <= '9' ? c - '0' : c - 'a' + 10);
}

static unsigned put_le(uint8_t *at, uint64_t val, unsigned n)
{
	memcpy(at, &val, n);
	return n;
}

/* At most 32 bytes. */
static unsigned one_template(uint64_t *rng, uint8_t *at)
{
	const char *t = templates[below(rng, sizeof(templates) / sizeof(*templates))];
	unsigned n = 0;

	if (once_in(rng, 6))
		at[n++] = (const uint8_t[]){0x66, 0x67, 0xf0, 0xf2, 0xf3,
					    0x36, 0x64, 0x48, 0x65, 0x4c}[below(rng, 10)];
	for (; *t; t += 2) {
		if (!strncmp(t, "II", 2))
			n += put_le(at + n, msrs[below(rng, sizeof(msrs) / sizeof(*msrs))], 4);
		else if (!strncmp(t, "AA", 2))
			n += put_le(at + n,
				    once_in(rng, 2) ? CODE + below(rng, CODE_SIZE)
						    : DATA + below(rng, DATA_SIZE),
				    4);
		else if (!strncmp(t, "SS", 2))
			n += put_le(at + n, below(rng, GDT_LIMIT + 1), 2);
		else
			at[n++] = (uint8_t)(nibble(t[0], rng) << 4 | nibble(t[1], rng));
	}
	return n;
}

static unsigned some_templates(uint64_t *rng, uint8_t *at, unsigned n)
{
	unsigned done = 0;

	while (done + 32 <= n)
		done += one_template(rng, at + done);
	return done;
}

void make_code(uint64_t *rng, uint8_t *at, unsigned size, enum mode mode)
{
	unsigned kind = (unsigned)below(rng, 6), done = 0;

	(void)mode;
	while (done + 256 <= size) {
		unsigned n = 32 + (unsigned)below(rng, 192);
		unsigned what = kind < 4 ? kind : (unsigned)below(rng, 4);

		if (what == 0) {
			fill_random(rng, at + done, n);
			done += n;
		} else if (what == 3) {
			done += some_templates(rng, at + done, n);
		} else {
			done += real_code(rng, at + done, n, what == 2);
		}
		/* Go on somewhere else now and then: back, mostly, so that there are loops. */
		if (once_in(rng, 3)) {
			at[done] = 0xe9;
			put_le(at + done + 1, -below(rng, done + 1), 4);
			done += 5;
		}
	}
}
