/* SPDX-License-Identifier: MIT */
/*
 * Host memory, and everything that can be done to it.
 *
 * Places lie where nothing else goes by itself (the kernel maps top down, and there is room
 * above), so that what is unmapped stays so until it is mapped here again.
 */
#include <linux/falloc.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include "stress.h"

#define PROT_RW (PROT_READ | PROT_WRITE)

static struct hist small_hist[NSMALL][SMALL], big_hist[NBIG][BIG];

/* Pages [a, a + n) of a place whose op lock is held, and what they become. */
struct range {
	struct place *p;
	unsigned a, n;
	struct state next[BIG];
};

static uint8_t *addr(const struct range *r)
{
	return r->p->base + (size_t)r->a * PAGE;
}

static size_t bytes(const struct range *r)
{
	return (size_t)r->n * PAGE;
}

static void load(struct range *r)
{
	/* Only the holder of op changes them. */
	for (unsigned i = 0; i < r->n; i++)
		r->next[i] = hist_last(&r->p->h[r->a + i]);
}

static void begin(struct range *r, const char *what)
{
	uint64_t t = tick();

	pthread_mutex_lock(&r->p->lock);
	for (unsigned i = 0; i < r->n; i++)
		hist_begin(&r->p->h[r->a + i], r->next[i], t, what);
	pthread_mutex_unlock(&r->p->lock);
}

static void end(struct range *r)
{
	uint64_t t;

	pthread_mutex_lock(&r->p->lock);
	t = tick();
	for (unsigned i = 0; i < r->n; i++)
		hist_end(&r->p->h[r->a + i], t);
	pthread_mutex_unlock(&r->p->lock);
}

static void cancel(struct range *r)
{
	pthread_mutex_lock(&r->p->lock);
	for (unsigned i = 0; i < r->n; i++)
		hist_cancel(&r->p->h[r->a + i]);
	pthread_mutex_unlock(&r->p->lock);
}

static void choose(struct range *r, struct place *p, uint64_t *rng)
{
	r->p = p;
	if (p->npages == SMALL) {
		r->n = below(rng, 3) ? 1 + below(rng, SMALL) : 1;
		r->a = below(rng, SMALL - r->n + 1);
	} else if (below(rng, 3) == 0) {
		r->a = 0;
		r->n = BIG;
	} else {
		r->n = below(rng, 2) ? 64 : 1;
		r->a = r->n * below(rng, BIG / r->n);
	}
	load(r);
}

static bool filled(const struct state *s)
{
	return s->kind == ANON && s->prot == PROT_RW;
}

/* ---- host calls ------------------------------------------------------------------------ */

/* Through libc, and now and then by number. */
static bool by_number(void)
{
	static __thread unsigned n;

	return n++ % 8 == 0;
}

static void *host_mmap(void *p, size_t len, int prot, int flags, int fd, off_t off)
{
	return by_number() ? (void *)syscall(SYS_mmap, p, len, prot, flags, fd, off)
			   : mmap(p, len, prot, flags, fd, off);
}

static int host_munmap(void *p, size_t len)
{
	return by_number() ? (int)syscall(SYS_munmap, p, len) : munmap(p, len);
}

static int host_mprotect(void *p, size_t len, int prot)
{
	return by_number() ? (int)syscall(SYS_mprotect, p, len, prot) : mprotect(p, len, prot);
}

static int host_madvise(void *p, size_t len, int advice)
{
	return by_number() ? (int)syscall(SYS_madvise, p, len, advice) : madvise(p, len, advice);
}

static void *host_mremap(void *p, size_t old, size_t len, int flags, void *to)
{
	return by_number() ? (void *)syscall(SYS_mremap, p, old, len, flags, to)
			   : mremap(p, old, len, flags, to);
}

/* ---- contents ------------------------------------------------------------------------- */

static void refill(struct range *r, const char *what)
{
	load(r);
	for (unsigned i = 0; i < r->n; i++)
		if (filled(&r->next[i])) {
			r->next[i].serial = new_serial();
			r->next[i].maybe_zero = false;
		}
	begin(r, what);
	for (unsigned i = 0; i < r->n; i++)
		if (filled(&r->next[i]))
			fill(addr(r) + (size_t)i * PAGE, r->next[i].serial);
	end(r);
}

static void fresh(struct range *r, int prot)
{
	for (unsigned i = 0; i < r->n; i++)
		r->next[i] = (struct state){
			.kind = ANON,
			.prot = (uint8_t)prot,
			.inst = new_inst(),
		};
}

static void map_anon(struct range *r, int flags, const char *what)
{
	fresh(r, PROT_RW);
	begin(r, what);
	NEED(host_mmap(addr(r), bytes(r), PROT_RW, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0) ==
	     addr(r));
	end(r);
	if (r->n == BIG)
		host_madvise(addr(r), bytes(r), MADV_HUGEPAGE);
}

static void unmap(struct range *r, const char *what)
{
	for (unsigned i = 0; i < r->n; i++)
		r->next[i] = (struct state){.kind = AWAY};
	begin(r, what);
	NEED(!host_munmap(addr(r), bytes(r)));
	end(r);
}

static void op_unmap(struct range *r, uint64_t *rng)
{
	unmap(r, "munmap");
}

static void op_anon(struct range *r, uint64_t *rng)
{
	map_anon(r, MAP_FIXED, "mmap anon");
	refill(r, "fill");
}

/* Away, and at once something else is there. */
static void op_reuse(struct range *r, uint64_t *rng)
{
	unmap(r, "munmap");
	map_anon(r, MAP_FIXED_NOREPLACE, "mmap again");
	refill(r, "fill");
}

static void op_file(struct range *r, uint64_t *rng)
{
	unsigned f = below(rng, FIRST_SHM), q;
	int prot = below(rng, 6) ? PROT_RW : PROT_READ;

	if (r->n > SMALL)
		r->n = SMALL;
	q = below(rng, SMALL - r->n + 1);
	for (unsigned i = 0; i < r->n; i++)
		r->next[i] = (struct state){
			.kind = FILE_PAGE,
			.prot = (uint8_t)prot,
			.file = (uint16_t)f,
			.page = (uint16_t)(q + i),
		};
	begin(r, "mmap file");
	NEED(host_mmap(addr(r), bytes(r), prot, MAP_SHARED | MAP_FIXED, files[f].fd,
		       (off_t)q * PAGE) == addr(r));
	end(r);
}

static void op_fill(struct range *r, uint64_t *rng)
{
	refill(r, "fill");
}

static bool all_mapped(const struct range *r)
{
	for (unsigned i = 0; i < r->n; i++)
		if (r->next[i].kind == AWAY)
			return false;
	return true;
}

static void op_protect(struct range *r, uint64_t *rng)
{
	static const int prots[] = {PROT_NONE, PROT_READ, PROT_RW, PROT_RW};
	int prot = prots[below(rng, 4)];

	if (!all_mapped(r))
		return;
	for (unsigned i = 0; i < r->n; i++) {
		/* A file's read-only mapping may become writable too: the file is. */
		r->next[i].prot = (uint8_t)prot;
	}
	begin(r, prot == PROT_NONE   ? "mprotect none"
		 : prot == PROT_READ ? "mprotect r"
				     : "mprotect rw");
	NEED(!host_mprotect(addr(r), bytes(r), prot));
	end(r);
	/* What nobody can read does no good for long. */
	if (prot == PROT_RW || below(rng, 2))
		return;
	for (unsigned i = 0; i < r->n; i++)
		r->next[i].prot = PROT_RW;
	begin(r, "mprotect rw");
	NEED(!host_mprotect(addr(r), bytes(r), PROT_RW));
	end(r);
}

/* Advice that leaves the contents alone. */
static void op_advise(struct range *r, uint64_t *rng)
{
	static const int advices[] = {
		MADV_PAGEOUT,    MADV_COLD,          MADV_WILLNEED,       MADV_HUGEPAGE,
		MADV_NOHUGEPAGE, MADV_POPULATE_READ, MADV_POPULATE_WRITE, 25 /* COLLAPSE */};

	(void)host_madvise(addr(r), bytes(r), advices[below(rng, 8)]);
}

static void op_dontneed(struct range *r, uint64_t *rng)
{
	bool all = all_mapped(r);
	int err;

	for (unsigned i = 0; i < r->n; i++)
		if (r->next[i].kind == ANON) {
			r->next[i].serial = 0;
			r->next[i].maybe_zero = false;
		}
	begin(r, "DONTNEED");
	err = host_madvise(addr(r), bytes(r), below(rng, 4) ? MADV_DONTNEED : 24 /* _LOCKED */);
	NEED(!err || (!all && errno == ENOMEM));
	end(r);
	if (below(rng, 2))
		refill(r, "fill");
}

static void op_free(struct range *r, uint64_t *rng)
{
	for (unsigned i = 0; i < r->n; i++) {
		if (r->next[i].kind != ANON)
			return;
		r->next[i].maybe_zero = true;
	}
	begin(r, "FREE");
	NEED(!host_madvise(addr(r), bytes(r), MADV_FREE));
	end(r);
	if (below(rng, 2))
		refill(r, "fill");
}

/* ---- moves ---------------------------------------------------------------------------- */

static struct range *other_range(void)
{
	static __thread struct range other;

	return &other;
}

static void op_move(struct range *r, uint64_t *rng)
{
	struct range *to = other_range();
	int flags = MREMAP_MAYMOVE | MREMAP_FIXED;
	bool keep = false;

	to->p = &places[below(rng, NSMALL)];
	if (to->p == r->p || pthread_mutex_trylock(&to->p->op))
		return;
	if (r->n > SMALL || below(rng, 2))
		r->n = 1;
	to->n = r->n;
	to->a = below(rng, SMALL - to->n + 1);
	if (!all_mapped(r))
		goto out;
	if (r->n == 1 && r->next[0].kind == ANON && below(rng, 3) == 0) {
		keep = true;
		flags |= 4; /* MREMAP_DONTUNMAP */
	}
	for (unsigned i = 0; i < r->n; i++) {
		to->next[i] = r->next[i];
		r->next[i] = keep ? (struct state){.kind = ANON,
						   .prot = r->next[i].prot,
						   .inst = new_inst()}
				  : (struct state){.kind = AWAY};
	}
	begin(r, keep ? "mremap keep" : "mremap away");
	begin(to, "mremap here");
	if (host_mremap(addr(r), bytes(r), bytes(r), flags, addr(to)) == addr(to)) {
		end(to);
		end(r);
		goto out;
	}
	/* More than one mapping: some may have been moved. The events are still open. */
	NEED(errno == EFAULT && r->n > 1);
	map_anon(to, MAP_FIXED, "mmap anon");
	map_anon(r, MAP_FIXED, "mmap anon");
out:
	pthread_mutex_unlock(&to->p->op);
}

static void op_resize(struct range *r, uint64_t *rng)
{
	unsigned keep = 1 + below(rng, r->n);
	struct range *tail = other_range();

	if (r->next[0].kind == AWAY || keep == r->n)
		return;
	tail->p = r->p;
	tail->a = r->a + keep;
	tail->n = r->n - keep;
	for (unsigned i = 0; i < tail->n; i++)
		tail->next[i] = (struct state){.kind = AWAY};
	begin(tail, "mremap shrink");
	if (host_mremap(addr(r), bytes(r), (size_t)keep * PAGE, 0, NULL) != addr(r)) {
		/* A hole in it */
		NEED(errno == EFAULT);
		unmap(tail, "munmap");
	} else {
		end(tail);
	}
	r->a += keep - 1;
	r->n = 1;
	load(r);
	if (r->next[0].kind != ANON)
		return;
	for (unsigned i = 0; i < tail->n; i++)
		tail->next[i] =
			(struct state){.kind = ANON, .prot = r->next[0].prot, .inst = new_inst()};
	begin(tail, "mremap grow");
	if (host_mremap(addr(r), PAGE, (size_t)(1 + tail->n) * PAGE, 0, NULL) != addr(r))
		cancel(tail);
	else
		end(tail);
	refill(tail, "fill");
}

/* ---- processes and segments ----------------------------------------------------------- */

/* What a child does to its copy is nobody's business. */
static void op_fork(struct range *r, uint64_t *rng)
{
	bool touch = below(rng, 2);
	int status;
	pid_t pid;

	if (below(rng, 8))
		return;
	pid = fork();
	if (!pid) {
		for (unsigned i = 0; touch && i < r->n; i++)
			if (filled(&r->next[i]))
				fill(addr(r) + (size_t)i * PAGE, 0x2bad2bad);
		_exit(0);
	}
	NEED(pid > 0);
	refill(r, "fill");
	while (waitpid(pid, &status, 0) != pid)
		NEED(errno == EINTR);
	if (status)
		fail("a forked child ended with status %#x", status);
}

static void op_shm(struct range *r, uint64_t *rng)
{
	unsigned f = FIRST_SHM + below(rng, NFILES - FIRST_SHM);
	uint32_t inst = new_inst(), found = 0;

	if (r->p->npages != SMALL)
		return;
	r->a = 0;
	r->n = SMALL;
	if (below(rng, 2)) {
		for (unsigned i = 0; i < SMALL; i++)
			r->next[i] = (struct state){.kind = FILE_PAGE,
						    .prot = PROT_RW,
						    .file = (uint16_t)f,
						    .page = (uint16_t)i,
						    .inst = inst};
		begin(r, "shmat");
		NEED(shmat(files[f].fd, r->p->base, SHM_REMAP) == r->p->base);
		end(r);
		return;
	}
	/*
	 * The first piece that looks attached here says which attachment goes, with all its
	 * pieces. A piece of another one, moved here by mremap(), stays, though of the same
	 * segment.
	 */
	load(r);
	for (unsigned i = 0; i < SMALL; i++) {
		const struct state *s = &r->next[i];

		if (s->kind != FILE_PAGE || s->file < FIRST_SHM || s->page != i)
			continue;
		if (!found)
			found = s->inst;
		if (found == s->inst)
			r->next[i] = (struct state){.kind = AWAY};
	}
	begin(r, "shmdt");
	NEED(!shmdt(r->p->base) || (errno == EINVAL && !found));
	end(r);
}

static void op_process_madvise(struct range *r, uint64_t *rng)
{
	struct iovec iov[12];
	int fd = (int)syscall(SYS_pidfd_open, getpid(), 0);
	long n;

	NEED(fd >= 0);
	for (unsigned i = 0; i < 12; i++)
		iov[i] = (struct iovec){places[below(rng, NSMALL)].base, SMALL * PAGE};
	n = syscall(SYS_process_madvise, fd, iov, 12, MADV_PAGEOUT, 0);
	NEED(n >= 0 || errno == ENOMEM || errno == EINVAL);
	close(fd);
}

/* ---- files ---------------------------------------------------------------------------- */

static void file_begin(struct file *f, unsigned a, unsigned n, bool away, uint64_t serial,
		       const char *what)
{
	uint64_t t = tick();

	pthread_mutex_lock(&f->lock);
	for (unsigned i = 0; i < n; i++)
		hist_begin(&f->h[a + i],
			   (struct state){.kind = away ? AWAY : FILE_PAGE,
					  .serial = serial ? serial + i : 0},
			   t, what);
	pthread_mutex_unlock(&f->lock);
}

static void file_end(struct file *f, unsigned a, unsigned n)
{
	uint64_t t;

	pthread_mutex_lock(&f->lock);
	t = tick();
	for (unsigned i = 0; i < n; i++)
		hist_end(&f->h[a + i], t);
	pthread_mutex_unlock(&f->lock);
}

static void file_fill(struct file *f, unsigned a, unsigned n)
{
	uint64_t serial = 0;

	for (unsigned i = 0; i < n; i++) {
		serial = new_serial();
		file_begin(f, a + i, 1, false, serial, "fill");
		fill(f->alias + (a + i) * PAGE, serial);
		file_end(f, a + i, 1);
	}
}

/* Context: the place's op lock, or none. */
static void op_content(struct range *r, uint64_t *rng)
{
	struct file *f = &files[1 + below(rng, NFILES - 1)];
	unsigned n = 1 + below(rng, SMALL), a = below(rng, SMALL - n + 1), how = below(rng, 4);
	uint8_t *p = f->alias + a * PAGE;
	int hole = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;

	if (pthread_mutex_trylock(&f->op))
		return;
	if (f->shm)
		how |= 1; /* has no descriptor */
	switch (how) {
	case 0:
		file_begin(f, a, n, false, 0, "punch");
		NEED(!fallocate(f->fd, hole, (off_t)a * PAGE, (off_t)n * PAGE));
		file_end(f, a, n);
		break;
	case 2:
		n = SMALL - a;
		file_begin(f, a, n, true, 0, "truncate");
		NEED(!ftruncate(f->fd, (off_t)a * PAGE));
		file_end(f, a, n);
		if (below(rng, 2))
			sched_yield();
		file_begin(f, a, n, false, 0, "extend");
		NEED(!ftruncate(f->fd, SMALL * PAGE));
		file_end(f, a, n);
		break;
	case 1:
		/* Through a mapping that backs no slot, or through one that may. */
		if (r->n <= SMALL && r->next[0].kind == FILE_PAGE && r->next[0].prot == PROT_RW &&
		    &files[r->next[0].file] == f) {
			a = r->next[0].page;
			n = 1;
			p = addr(r);
		}
		file_begin(f, a, n, false, 0, "REMOVE");
		NEED(!host_madvise(p, (size_t)n * PAGE, MADV_REMOVE));
		file_end(f, a, n);
		break;
	default:
		break;
	}
	if (how == 3 || below(rng, 2))
		file_fill(f, a, n);
	pthread_mutex_unlock(&f->op);
}

/* ---- all of them ---------------------------------------------------------------------- */

static const struct {
	const char *name;
	void (*fn)(struct range *r, uint64_t *rng);
	unsigned weight;
} ops[] = {
	{"munmap", op_unmap, 4},     {"anon", op_anon, 14},
	{"reuse", op_reuse, 8},      {"file", op_file, 10},
	{"fill", op_fill, 8},        {"mprotect", op_protect, 8},
	{"advise", op_advise, 5},    {"dontneed", op_dontneed, 8},
	{"free", op_free, 4},        {"mremap", op_move, 8},
	{"resize", op_resize, 4},    {"fork", op_fork, 2},
	{"shm", op_shm, 4},          {"process_madvise", op_process_madvise, 2},
	{"content", op_content, 10},
};
#define NOPS (sizeof(ops) / sizeof(ops[0]))

void place_op(uint64_t *rng)
{
	static __thread struct range r;
	unsigned total = 0, pick, i;
	struct place *p = &places[below(rng, 24) ? below(rng, NSMALL) : NSMALL + below(rng, NBIG)];

	for (i = 0; i < NOPS; i++)
		total += wanted(ops[i].name) ? ops[i].weight : 0;
	if (!total)
		return;
	pick = below(rng, total);
	for (i = 0;; i++) {
		unsigned w = wanted(ops[i].name) ? ops[i].weight : 0;

		if (pick < w)
			break;
		pick -= w;
	}
	if (pthread_mutex_trylock(&p->op))
		return;
	at(ops[i].name);
	choose(&r, p, rng);
	ops[i].fn(&r, rng);
	pthread_mutex_unlock(&p->op);
	atomic_fetch_add_explicit(&counters.place_ops, 1, memory_order_relaxed);
}

static void check_poison(const struct range *r)
{
	for (unsigned i = 0; i < r->n; i++) {
		const uint8_t *p = addr(r) + (size_t)i * PAGE;
		uint64_t want = r->next[i].serial << 24;

		if (filled(&r->next[i]) && (peek(p + R_WORD) != want || peek(p + X_WORD) != want ||
					    peek(p + S_WORD) != want))
			fail("place %td page %u (%p) is behind no slot, but somebody wrote to it: "
			     "%#llx became %#llx, %#llx, %#llx",
			     r->p - places, r->a + i, (const void *)p, (unsigned long long)want,
			     (unsigned long long)peek(p + R_WORD),
			     (unsigned long long)peek(p + X_WORD),
			     (unsigned long long)peek(p + S_WORD));
	}
}

void quarantine(int place, uint64_t *rng)
{
	static __thread struct range r;
	struct place *p = &places[place];
	bool was = false;

	if (!atomic_compare_exchange_strong(&p->closed, &was, true))
		return;
	if (!atomic_load(&p->users)) {
		pthread_mutex_lock(&p->op);
		at("quarantine");
		choose(&r, p, rng);
		if (below(rng, 2))
			map_anon(&r, MAP_FIXED, "mmap poison");
		refill(&r, "poison");
		for (unsigned i = 0; i < 3; i++) {
			check_poison(&r);
			if (below(rng, 4) == 0)
				sched_yield();
		}
		pthread_mutex_unlock(&p->op);
		atomic_fetch_add_explicit(&counters.quarantines, 1, memory_order_relaxed);
	}
	atomic_store(&p->closed, false);
}

void files_init(void)
{
	for (unsigned i = 0; i < NFILES; i++) {
		struct file *f = &files[i];

		f->shm = i >= FIRST_SHM;
		pthread_mutex_init(&f->op, NULL);
		pthread_mutex_init(&f->lock, NULL);
		if (f->shm) {
			f->fd = shmget(IPC_PRIVATE, SMALL * PAGE, IPC_CREAT | 0600);
			NEED(f->fd >= 0);
			f->alias = shmat(f->fd, NULL, 0);
			NEED(f->alias != (void *)-1);
			/* It goes with its last attachment. */
			NEED(!shmctl(f->fd, IPC_RMID, NULL));
		} else {
			f->fd = memfd_create("stress", MFD_CLOEXEC);
			NEED(f->fd >= 0 && !ftruncate(f->fd, SMALL * PAGE));
			f->alias = host_mmap(NULL, SMALL * PAGE, PROT_RW, MAP_SHARED, f->fd, 0);
			NEED(f->alias != MAP_FAILED);
		}
		for (unsigned q = 0; q < SMALL; q++) {
			uint64_t serial = i == 0 && q ? q : new_serial();

			hist_reset(&f->h[q], (struct state){.kind = FILE_PAGE, .serial = serial});
			fill(f->alias + q * PAGE, serial);
		}
	}
}

void places_init(uint64_t seed)
{
	/* In a range that every sanitizer leaves to the program. */
	uint8_t *base = (uint8_t *)(opt.asan ? 0x200000000000ul : 0x1000000000ul);
	uint64_t rng = seed | 1;

	for (unsigned i = 0; i < NPLACES; i++) {
		struct place *p = &places[i];
		struct range r = {.p = p};

		p->npages = i < NSMALL ? SMALL : BIG;
		p->base = i < NSMALL ? base + (size_t)i * SMALL * PAGE
				     : base + (16ul << 20) + (size_t)(i - NSMALL) * BIG * PAGE;
		p->h = i < NSMALL ? small_hist[i] : big_hist[i - NSMALL];
		pthread_mutex_init(&p->op, NULL);
		pthread_mutex_init(&p->lock, NULL);
		p->users = 0;
		p->closed = false;
		for (unsigned k = 0; k < p->npages; k++)
			hist_reset(&p->h[k], (struct state){.kind = AWAY});
		r.n = p->npages;
		map_anon(&r, MAP_FIXED_NOREPLACE, "mmap anon");
		refill(&r, "fill");
		if (i < NSMALL && i % 3 == 0) {
			r.a = below(&rng, SMALL / 2);
			r.n = SMALL / 2;
			op_file(&r, &rng);
		}
	}
}

void places_free(void)
{
	for (unsigned i = 0; i < NPLACES; i++)
		NEED(!host_munmap(places[i].base, (size_t)places[i].npages * PAGE));
	for (unsigned i = 0; i < NFILES; i++)
		if (files[i].shm) {
			NEED(!shmdt(files[i].alias));
		} else {
			NEED(!host_munmap(files[i].alias, SMALL * PAGE));
			close(files[i].fd);
		}
}
