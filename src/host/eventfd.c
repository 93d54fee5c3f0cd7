/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

#include <linux/kcmp.h>

#include "host/eventfd.h"
#include "host/sys.h"

int kl_eventfd_identify(int fd, uint64_t *id)
{
	char path[64], text[512], *p;
	long info, n;

	*id = 0;
	if (kl_sys(SYS_fcntl, fd, F_GETFD) < 0)
		return -EBADF;
	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
	info = kl_sys(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
	if (info < 0)
		return 0;
	n = kl_sys(SYS_read, info, text, sizeof(text) - 1);
	kl_sys(SYS_close, info);
	text[n < 0 ? 0 : n] = '\0';
	if (!strstr(text, "eventfd-count:"))
		return -EINVAL;
	p = strstr(text, "eventfd-id:");
	if (p)
		*id = strtoull(p + strlen("eventfd-id:"), NULL, 10) + 1;
	return 0;
}

bool kl_eventfd_same(int fd1, uint64_t id1, int fd2, uint64_t id2)
{
	long self;

	if (id1 || id2)
		return id1 == id2;
	self = kl_sys(SYS_getpid);
	return kl_sys(SYS_kcmp, self, self, KCMP_FILE, fd1, fd2) == 0;
}

static bool ready(int fd, short events)
{
	struct pollfd p = {.fd = fd, .events = events};

	return kl_sys(SYS_poll, &p, 1, 0) == 1 && (p.revents & events);
}

bool kl_eventfd_readable(int fd)
{
	return ready(fd, POLLIN);
}

void kl_eventfd_signal(int fd)
{
	const uint64_t one = 1;

	if (ready(fd, POLLOUT))
		kl_sys(SYS_write, fd, &one, sizeof(one));
}

void kl_eventfd_consume(int fd)
{
	uint64_t count;
	struct iovec iov = {&count, sizeof(count)};

	/* Not blocking, whatever the program has made of the file. */
	if (kl_sys(SYS_preadv2, fd, &iov, 1, -1l, -1l, RWF_NOWAIT) != -EOPNOTSUPP)
		return;
	if (ready(fd, POLLIN)) /* Linux before 5.8 */
		kl_sys(SYS_read, fd, &count, sizeof(count));
}
