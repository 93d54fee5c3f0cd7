/* SPDX-License-Identifier: MIT */
/*
 * The descriptors are kept, high and hidden: one that comes and goes among the program's own could
 * meet its dup2() or its close(). Each reader claims one to itself, because two readers of one open
 * file disturb each other: the kernel finds the place to go on by counting bytes, of text that
 * changes.
 *
 * They are for one process. Its child by fork() throws them away (kl_maps_after_fork()); others
 * that run this code, a child of vfork() or clone(), see from the pid that they are not theirs, and
 * open one of their own each time: nobody else is there whom it could meet.
 */
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "host/maps.h"
#include "host/sys.h"

#define NR_KEPT    8
#define MAX_ROUNDS 1000 /* then better a low descriptor than none */

static struct kl_maps_kept {
	_Atomic bool claimed;
	/* who has claimed it */
	bool open;
	int fd;
	dev_t dev;
	ino_t ino;
} kept[NR_KEPT];
static _Atomic pid_t owner; /* 0: nobody yet */

static long open_low(void)
{
	return kl_sys(SYS_openat, AT_FDCWD, "/proc/self/maps", O_RDONLY | O_CLOEXEC);
}

/* A program that is not preloaded may have closed it, and the number may be another file's. */
static bool still_there(const struct kl_maps_kept *k)
{
	struct stat st;

	return k->open && !kl_sys(SYS_fstat, k->fd, &st) && st.st_dev == k->dev &&
	       st.st_ino == k->ino;
}

static bool keep(struct kl_maps_kept *k)
{
	struct stat st;
	long low = open_low();

	k->open = false;
	if (low < 0)
		return false;
	k->fd = kl_sys_dup((int)low);
	kl_sys(SYS_close, low);
	if (k->fd < 0)
		return false;
	if (kl_sys(SYS_fstat, k->fd, &st)) {
		kl_sys_close(k->fd);
		return false;
	}
	k->dev = st.st_dev;
	k->ino = st.st_ino;
	k->open = true;
	return true;
}

/* NULL: there is none to have. */
static struct kl_maps_kept *claim(void)
{
	pid_t pid = (pid_t)kl_sys(SYS_getpid, 0), none = 0;

	if (atomic_load_explicit(&owner, memory_order_relaxed) != pid &&
	    !atomic_compare_exchange_strong(&owner, &none, pid) && none != pid)
		return NULL;
	for (unsigned round = 0; round < MAX_ROUNDS; round++) {
		for (struct kl_maps_kept *k = kept; k < kept + NR_KEPT; k++) {
			bool free = false;

			if (!atomic_compare_exchange_strong(&k->claimed, &free, true))
				continue;
			if (still_there(k) || keep(k))
				return k;
			atomic_store(&k->claimed, false);
			return NULL;
		}
		kl_sys(SYS_sched_yield, 0);
	}
	return NULL;
}

void kl_maps_after_fork(void)
{
	for (struct kl_maps_kept *k = kept; k < kept + NR_KEPT; k++) {
		if (still_there(k))
			kl_sys_close(k->fd);
		k->open = false;
		atomic_store(&k->claimed, false);
	}
	atomic_store(&owner, 0);
}

static int next_char(struct kl_maps *m)
{
	if (m->pos == m->len) {
		long n = kl_sys(SYS_pread64, m->fd, m->buf, sizeof(m->buf), m->off);

		if (n <= 0)
			return -1;
		m->off += (uint64_t)n;
		m->len = (unsigned)n;
		m->pos = 0;
	}
	return m->buf[m->pos++];
}

/* Reads digits; returns the character after them, or -1. */
static int number(struct kl_maps *m, unsigned base, uint64_t *v)
{
	int c;

	*v = 0;
	while ((c = next_char(m)) >= 0) {
		unsigned d = c >= '0' && c <= '9'                 ? (unsigned)(c - '0')
			     : base == 16 && c >= 'a' && c <= 'f' ? (unsigned)(c - 'a' + 10)
								  : 99;
		if (d >= base)
			return c;
		*v = *v * base + d;
	}
	return -1;
}

static int skip_word(struct kl_maps *m)
{
	int c;

	do
		c = next_char(m);
	while (c >= 0 && c != ' ');
	return c;
}

static int permissions(struct kl_maps *m, struct kl_maps_entry *e)
{
	int c;

	e->prot = 0;
	e->shared = false;
	while ((c = next_char(m)) >= 0 && c != ' ') {
		if (c == 'r')
			e->prot |= PROT_READ;
		else if (c == 'w')
			e->prot |= PROT_WRITE;
		else if (c == 'x')
			e->prot |= PROT_EXEC;
		else if (c == 's')
			e->shared = true;
	}
	return c;
}

bool kl_maps_open(struct kl_maps *m)
{
	m->off = 0;
	m->pos = m->len = 0;
	m->kept = claim();
	m->fd = m->kept ? m->kept->fd : (int)open_low();
	return m->fd >= 0;
}

bool kl_maps_next(struct kl_maps *m, struct kl_maps_entry *e)
{
	int c;

	if (number(m, 16, &e->start) != '-' || number(m, 16, &e->end) != ' ' ||
	    permissions(m, e) < 0 || number(m, 16, &e->off) != ' ' || skip_word(m) < 0)
		return false;
	c = number(m, 10, &e->ino);
	while (c >= 0 && c != '\n')
		c = next_char(m);
	return c >= 0;
}

void kl_maps_close(struct kl_maps *m)
{
	if (m->kept)
		atomic_store(&m->kept->claimed, false);
	else
		kl_sys(SYS_close, m->fd);
}
