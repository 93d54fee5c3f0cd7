/* SPDX-License-Identifier: MIT */
#include <fcntl.h>
#include <sys/mman.h>

#include "base/syscall.h"
#include "host/maps.h"

static int next_char(struct kl_maps *m)
{
	if (m->pos == m->len) {
		long n = kl_sys(SYS_read, m->fd, m->buf, sizeof(m->buf));

		if (n <= 0)
			return -1;
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
	m->pos = m->len = 0;
	m->fd = (int)kl_sys(SYS_openat, AT_FDCWD, "/proc/self/maps", O_RDONLY | O_CLOEXEC);
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
	kl_sys(SYS_close, m->fd);
}
